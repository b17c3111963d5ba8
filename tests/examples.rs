//! The examples do what they say, as two processes on one database.

#![allow(clippy::unwrap_used, reason = "all of it is a test")]

use std::env;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use crossbeam_channel::{Receiver, unbounded};
use support::Database;

const PATIENCE: Duration = Duration::from_secs(60);

/// A running example. It is killed when dropped.
struct Example {
    child: Child,
    lines: Receiver<String>,
}

impl Example {
    fn start(name: &str, database: &Database<'_>) -> Self {
        let mut command = Command::new(program(name));
        // Whatever port is free.
        command.env("DATABASE_URL", database.url()).env("HEALTH_ADDRESS", "127.0.0.1:0");
        Self::run(&mut command)
    }

    fn run(command: &mut Command) -> Self {
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap_or_else(|error| {
                panic!("{}: {error}; run cargo build --examples", command.get_program().display())
            });
        let (sender, lines) = unbounded();
        let output = BufReader::new(child.stdout.take().unwrap());
        thread::spawn(move || output.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
        Self { child, lines }
    }

    /// Waits for a line with `text` in it.
    fn says(&self, text: &str) -> String {
        let mut heard = Vec::new();
        loop {
            match self.lines.recv_timeout(PATIENCE) {
                Ok(line) if line.contains(text) => return line,
                Ok(line) => heard.push(line),
                Err(_) => panic!("the example does not say {text:?}, but: {heard:#?}"),
            }
        }
    }

    fn is_told(&mut self, line: &str) {
        writeln!(self.child.stdin.as_mut().unwrap(), "{line}").unwrap();
    }

    /// Ends its standard input, and waits for its end.
    fn succeeds(mut self) {
        drop(self.child.stdin.take());
        let status = self.child.wait().unwrap();
        assert!(status.success(), "{status}");
    }
}

impl Drop for Example {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Cargo builds the examples along with all tests, or with `--examples`, in a folder beside theirs.
fn program(name: &str) -> PathBuf {
    let folder = env::current_exe().unwrap();
    folder.ancestors().nth(2).unwrap().join("examples").join(name)
}

#[test]
fn a_nightly_job_is_done_by_one_of_two_machines_once_a_night() {
    let database = Database::fresh().unwrap();
    let killed = Example::start("once", &database);
    killed.says("step 1 of");
    drop(killed);
    let first = Example::start("once", &database);
    first.says("step 1 of");
    let second = Example::start("once", &database);
    first.says("all 10 steps are done");
    first.succeeds();
    second.says("done already, due again in 129");
    second.succeeds();
    let third = Example::start("once", &database);
    third.says("done already, due again in 129");
    third.succeeds();
}

#[test]
fn invoices_of_two_machines_have_numbers_without_gaps() {
    let database = Database::fresh().unwrap();
    let machines = [(); 2].map(|()| Example::start("transaction", &database));
    for machine in &machines {
        machine.says("is written");
    }
    for machine in machines {
        machine.says("done");
        machine.succeeds();
    }
    let query = "SELECT count(*), count(DISTINCT number), max(number) FROM dsync_demo_invoice";
    let row = database.client().unwrap().query_one(query, &[]).unwrap();
    assert_eq!([0, 1, 2].map(|column| row.get::<_, i64>(column)), [200; 3]);
}

#[test]
fn leaders_follow_each_other() {
    let database = Database::fresh().unwrap();
    let mut first = Example::start("leader", &database);
    first.says("this process leads");
    let mut second = Example::start("leader", &database);
    second.says("another process leads");
    second.is_told("r");
    second.says("there is a leader to ask: true");
    first.says("this process has stepped down");
    second.says("this process leads");
    // It has let the second one go first, waits again, and so has the lock next.
    first.says("another process leads");
    second.is_told("");
    second.says("this process has stepped down");
    first.says("this process leads");
    first.is_told("s");
    first.says("leads: true");
    second.succeeds();
    first.succeeds();
}

#[test]
fn money_is_moved_and_none_is_made() {
    let database = Database::fresh().unwrap();
    let clerks = [(); 2].map(|()| Example::start("transfer", &database));
    for clerk in clerks {
        clerk.says("the accounts have 500 together");
        clerk.succeeds();
    }
}

#[test]
fn readers_of_two_machines_see_whole_versions_and_writers_get_their_turns() {
    let database = Database::fresh().unwrap();
    let machines = [(); 2].map(|()| Example::start("readers", &database));
    for machine in &machines {
        machine.says("is published");
    }
    for machine in machines {
        machine.says("none was of two versions");
        machine.succeeds();
    }
    let query = "SELECT min(version), max(version) FROM dsync_demo_page";
    let row = database.client().unwrap().query_one(query, &[]).unwrap();
    assert_eq!([0, 1].map(|column| row.get::<_, i64>(column)), [16; 2]);
}

#[test]
fn two_machines_share_three_cards_and_no_card_has_two_pictures() {
    let database = Database::fresh().unwrap();
    let machines = [(); 2].map(|()| Example::start("semaphore", &database));
    for machine in &machines {
        machine.says("is rendered on card");
    }
    for machine in machines {
        machine.says("no card had two");
        machine.succeeds();
    }
    let query = "SELECT count(*), sum(done)::int8, count(picture) FROM dsync_demo_card";
    let row = database.client().unwrap().query_one(query, &[]).unwrap();
    assert_eq!([0, 1, 2].map(|column| row.get::<_, i64>(column)), [3, 80, 0]);
}

/// Its exit code is its judgement. In a network namespace where there can be one, and with proxies.
#[test]
fn a_leader_on_an_old_primary_stands_down_before_the_next_one_begins() {
    let ways = [&[][..], &["proxy"]].map(|arguments| {
        let example = Example::run(Command::new(program("split_brain")).args(arguments));
        thread::spawn(move || {
            let said: Vec<_> = example.lines.iter().collect();
            println!("{}", said.join("\n"));
            example.succeeds();
            said
        })
    });
    for said in ways.map(|way| way.join().unwrap()) {
        let times = said.iter().filter_map(|line| line.split_once(" s  ")?.0.trim().parse::<f64>().ok());
        let times: Vec<_> = times.collect();
        // An act begins anew.
        let acts: Vec<_> = times.chunk_by(|one, next| one <= next).collect();
        assert!(acts.len() == 2 && acts.iter().all(|act| act.len() > 5), "{times:?}");
        assert!(said.iter().all(|line| line.chars().count() < 80), "{said:#?}");
        let of = |text: &str| said.iter().filter(|line| line.contains(text)).count();
        assert_eq!(of("two primaries now"), 2, "{said:#?}");
        let cut_off = said.iter().skip_while(|line| !line.contains("and the primary are cut off"));
        let mut with_the_quorum = cut_off.take_while(|line| !line.starts_with("Without:"));
        assert!(with_the_quorum.any(|line| line.contains("(NotConfirmed)")), "{said:#?}");
    }
}

#[cfg(feature = "metrics")]
#[test]
fn health_and_metrics_are_served() {
    use std::io::Read;
    use std::net::TcpStream;

    let database = Database::fresh().unwrap();
    let example = Example::start("health", &database);
    let line = example.says("/health");
    let address = line.split('/').nth(2).unwrap().to_owned();
    let get = |path: &str| {
        let mut stream = TcpStream::connect(&address).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    };
    let wait_for = |path: &str, text: &str| {
        support::wait_for(text, PATIENCE, || get(path).contains(text).then_some(())).unwrap();
    };
    wait_for("/health", "200 OK");
    wait_for("/health", "billing-leader");
    wait_for("/metrics", "dsync_");
}
