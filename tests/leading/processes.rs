//! Five processes that step down again and again: one leads at a time, and each gets its turns.

use std::io::stdin;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, SystemTime};

use crossbeam_channel::unbounded;
use dsync::{Config, Leader, Tenure};

use crate::common::{self, PATIENCE, Process, lock, started};
use crate::crew::{Postgres, World, quick};

const COUNT: usize = 5;

/// In how many terms each process leads. Together they take longer than a busy machine may let one of the processes stand still.
const TERMS: usize = 40;

/// How long the work takes to stop when it is told to. Nobody may lead before it has.
const STOPPING: Duration = Duration::from_millis(5);

/// What the work of one term says of itself: the token, and on the clock of the machine when it began and when it was over.
#[derive(Clone, Copy, Debug)]
struct Work {
    token: i64,
    begun: Duration,
    over: Duration,
}

fn now() -> Duration {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap()
}

/// Not a test: the body of the processes.
#[test]
#[ignore = "the body of a process, which another test starts"]
fn candidate() {
    if common::role().is_none() {
        return;
    }
    let config = Config::from_url(&std::env::var("DATABASE_URL").unwrap()).unwrap();
    let manager = started(config.release_timeout(PATIENCE));
    let (sender, begins) = unbounded();
    let work = move |tenure: &Tenure| {
        let begun = now();
        let _ = sender.send(());
        while !tenure.wait_timeout(PATIENCE) {}
        thread::sleep(STOPPING);
        // On a line of its own: the harness may have begun one.
        let token = tenure.term().token().unwrap();
        println!("\nworked {token} {} {}", begun.as_micros(), now().as_micros());
    };
    let leader = Leader::start_with(lock(&manager, "x"), quick(), work).unwrap();
    // Until all the others wait.
    stdin().read_line(&mut String::new()).unwrap();
    for _ in 0..TERMS {
        begins.recv_timeout(PATIENCE).unwrap();
        assert!(leader.step_down());
    }
    leader.stop(PATIENCE).unwrap();
}

#[test]
fn five_processes_that_step_down_lead_one_at_a_time_and_all_get_their_turns() {
    let world = Postgres::new(0);
    let mut processes = [(); COUNT].map(|()| {
        let mut command = common::process("processes::candidate", "candidate");
        Process::start(command.env("DATABASE_URL", world.url()).stdin(Stdio::piped()))
    });
    (&world as &dyn World).wait_for_waiters(COUNT - 1);
    processes.iter_mut().for_each(Process::go_on);
    let turns: Vec<Vec<Work>> = processes.into_iter().map(|process| read(&process.succeeds())).collect();

    let mut all = turns.concat();
    all.sort_by_key(|work| work.begun);
    for pair in all.windows(2) {
        assert!(pair[0].over <= pair[1].begun && pair[0].token < pair[1].token, "they overlap: {pair:?}");
    }
    // While all of them stood.
    let first_to_finish = turns.iter().map(|work| work[TERMS - 1].begun).min().unwrap();
    let led = turns.iter().map(|work| work.iter().filter(|work| work.begun <= first_to_finish).count());
    let led: Vec<_> = led.collect();
    println!("terms when the first process had {TERMS}: {led:?}");
    assert!(led.iter().all(|terms| *terms >= 2), "somebody is passed over: {led:?}");
}

fn read(said: &str) -> Vec<Work> {
    let lines = said.lines().filter_map(|line| line.strip_prefix("worked "));
    lines
        .map(|line| {
            let [token, begun, over] =
                line.split(' ').map(|word| word.parse::<u64>().unwrap()).collect::<Vec<_>>()[..]
            else {
                panic!("{line:?}")
            };
            let [begun, over] = [begun, over].map(Duration::from_micros);
            Work { token: token.try_into().unwrap(), begun, over }
        })
        .collect()
}
