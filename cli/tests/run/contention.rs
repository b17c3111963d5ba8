//! Who has the lock when many want it.

use std::fs;
use std::process::Command;

use support::Server;

use crate::common::{Process, SHORT, becomes, clean, new_file, pgdsync, run, sessions, text};

/// A term of a holder with [`SHORT`]: the lease of 7 s less a heartbeat, the time to end and a second.
const TERM_MILLIS: f64 = 3_600.0;

#[test]
fn two_at_once_run_one_after_the_other() {
    let database = Server::shared().database().unwrap();
    let (url, file) = (database.url(), new_file("order"));
    let script = format!("echo begin >> {0}; sleep 0.3; echo end >> {0}", file.display());
    let start = || Process::start(pgdsync(&url).args(["run", "k", "--", "sh", "-c", &script]));
    for mut process in [start(), start(), start()] {
        assert!(process.ends().success());
    }
    assert_eq!(fs::read_to_string(&file).unwrap(), "begin\nend\n".repeat(3));
}

#[test]
fn several_that_share_run_at_once_and_one_that_does_not_waits() {
    let database = Server::shared().database().unwrap();
    let url = database.url();
    let share = || {
        Process::start(pgdsync(&url).args(["run", "-s", "k", "--", "sh", "-c", "echo had; exec sleep 1000"]))
    };
    let (first, second) = (share(), share());
    first.says("had");
    second.says("had");
    assert_eq!(run(&url, ["run", "-n", "k", "--", "true"]).status.code(), Some(75));
}

#[test]
fn the_lock_goes_back_when_the_whole_group_is_gone() {
    let database = Server::shared().database().unwrap();
    let url = database.url();
    let fifo = new_file("fifo");
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    // A grandchild that outlives the command.
    let script = format!("(read x < {}) & exit 3", fifo.display());
    let mut holder = Process::start(pgdsync(&url).args(["run", "k", "--", "sh", "-c", &script]));
    holder.says("the lock is held until the processes that it left behind have ended");
    assert_eq!(run(&url, ["run", "-n", "k", "--", "true"]).status.code(), Some(75));
    fs::write(&fifo, "\n").unwrap();
    assert_eq!(holder.ends().code(), Some(3));
    assert_eq!(run(&url, ["run", "-n", "k", "--", "true"]).status.code(), Some(0));
}

/// A term counts from when the lock was asked for, and the wait takes nearly all of it.
#[test]
fn a_lock_that_is_granted_late_in_a_wait_has_its_command_run() {
    let server = Server::start().unwrap();
    let (url, mut client) = (server.url(), server.client().unwrap());
    for millis in [1, 3, 6, 12, 25, 100] {
        let mut holder =
            Process::start(pgdsync(&url).args(["run", "k", "--", "sh", "-c", "echo had; exec sleep 1000"]));
        holder.says("had");
        let backend = crate::loss::holder_of(&server, "k");
        let waiter = pgdsync(&url).arg("run").args(SHORT).args(["k", "--", "echo", "ran"]).spawn().unwrap();
        becomes("the waiters", &1, || sessions(&server, false));
        let at_the_end = "SELECT pg_terminate_backend($1) FROM (SELECT pg_sleep(greatest(0, extract(epoch FROM \
             query_start + $2 * interval '1 ms' - clock_timestamp()))) FROM pg_stat_activity WHERE wait_event = 'advisory') slept";
        client.query_one(at_the_end, &[&backend, &(TERM_MILLIS - f64::from(millis))]).unwrap();
        let output = waiter.wait_with_output().unwrap();
        assert_eq!(
            (output.status.code(), &*text(&output.stdout)),
            (Some(0), "ran\n"),
            "{}",
            text(&output.stderr)
        );
        assert_eq!(holder.ends().code(), Some(79));
    }
}

#[test]
fn it_never_runs_twice_at_a_time() {
    never_twice(160);
}

/// Takes minutes.
#[test]
#[ignore = "long; run with --ignored"]
fn it_never_runs_twice_at_a_time_in_a_thousand_runs() {
    never_twice(1000);
}

fn never_twice(runs: usize) {
    const SHELLS: usize = 8;
    let database = Server::shared().database().unwrap();
    let (folder, file) = (new_file("busy"), new_file("runs"));
    // To make a folder succeeds for one at a time.
    let job =
        format!("mkdir {0} || echo twice; echo ran >> {1}; rmdir {0}", folder.display(), file.display());
    let script =
        r#"i=0; while [ $i -lt $1 ]; do "$2" run -n k -- sh -c "$3"; echo code $?; i=$((i + 1)); done"#;
    let shells: Vec<_> = (0..SHELLS)
        .map(|_| {
            let mut shell = clean(Command::new("sh"), &database.url());
            shell.args([
                "-c",
                script,
                "sh",
                &(runs / SHELLS).to_string(),
                env!("CARGO_BIN_EXE_pgdsync"),
                &job,
            ]);
            Process::start(&mut shell)
        })
        .collect();
    let said: Vec<_> = shells.iter().flat_map(Process::rest).collect();
    let count = |wanted: &str| said.iter().filter(|line| *line == wanted).count();
    let (ran, busy) = (count("code 0"), count("code 75"));
    println!("{runs} runs from {SHELLS} shells: {ran} had the lock, {busy} found it taken");
    assert_eq!(said.len(), runs, "{said:?}");
    assert_eq!(ran + busy, runs, "{said:?}");
    assert!(ran > 0 && busy > 0, "there was no contention");
    assert_eq!(fs::read_to_string(&file).unwrap().lines().count(), ran);
}

#[test]
fn once_a_period_it_runs_in_one_of_many_and_again_only_after_a_failure() {
    let database = Server::shared().database().unwrap();
    let (url, file) = (database.url(), new_file("every"));
    let start = |code: u8| {
        let script = format!("echo ran >> {}; sleep 0.2; exit {code}", file.display());
        Process::start(pgdsync(&url).args(["run", "--every", "24h", "nightly", "--", "sh", "-c", &script]))
    };
    let ran = || fs::read_to_string(&file).unwrap().lines().count();
    // A failure is no success.
    assert_eq!(start(5).ends().code(), Some(5));
    assert_eq!(ran(), 1);
    for mut process in (0..6).map(|_| start(0)).collect::<Vec<_>>() {
        assert_eq!(process.ends().code(), Some(0));
    }
    assert_eq!(ran(), 2);
    let output =
        run(&url, ["run", "--every", "24h", "--done-exit-code", "7", "-v", "nightly", "--", "false"]);
    assert_eq!(output.status.code(), Some(7));
    assert!(text(&output.stderr).contains("due again in 21h 3"), "{}", text(&output.stderr));
}
