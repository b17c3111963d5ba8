//! Signals to the front go to the command.

use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, kill_process};
use support::Server;
use support::process::{Signal, children, is_alive, signal};

use crate::common::{
    PATIENCE, Process, SHORT, becomes, can_contain, clean, contained, new_file, pgdsync, run, sessions,
};

#[test]
fn they_are_passed_on_and_the_command_may_end_in_peace() {
    let database = Server::shared().database().unwrap();
    let url = database.url();
    for (which, name) in [(Signal::Terminate, "TERM"), (Signal::Interrupt, "INT"), (Signal::Hangup, "HUP")] {
        let script =
            format!("trap 'echo {name} came; exit 7' {name}; echo had; while :; do sleep 0.05; done");
        let mut holder = Process::start(pgdsync(&url).args(["run", "k", "--", "sh", "-c", &script]));
        holder.says("had");
        holder.signal(which);
        holder.says(&format!("{name} came"));
        assert_eq!(holder.ends().code(), Some(7));
        assert_eq!(run(&url, ["run", "-n", "k", "--", "true"]).status.code(), Some(0));
    }
}

#[test]
fn a_command_that_ignores_them_is_killed_after_its_time() {
    let database = Server::shared().database().unwrap();
    let script = "trap '' TERM; echo had; sleep 1000 & sleep 1000";
    let command = ["run", "--kill-after", "0.7", "k", "--", "sh", "-c", script];
    let mut holder = Process::start(pgdsync(&database.url()).args(command));
    holder.says("had");
    let sent = Instant::now();
    holder.signal(Signal::Terminate);
    assert_eq!(holder.ends().code(), Some(128 + 9));
    assert!(sent.elapsed() > Duration::from_millis(700), "{:?}", sent.elapsed());
}

/// Its first lock does not make a command of it that would have to end.
#[test]
fn a_wait_for_a_set_of_which_one_is_had_ends_at_once() {
    /// In which the keeper would have told of a term, if one of a command had begun: it looks each thirtieth of the lease.
    const SOME_LOOKS: Duration = Duration::from_secs(1);
    let server = Server::start().unwrap();
    let url = server.url();
    let holder =
        Process::start(pgdsync(&url).args(["run", "b", "--", "sh", "-c", "echo had; exec sleep 1000"]));
    holder.says("had");
    let mut waiter =
        Process::start(pgdsync(&url).arg("run").args(SHORT).args(["a", "b", "--", "echo", "ran"]));
    // The first of the set, and the command's.
    becomes("those that have a lock", &2, || sessions(&server, true));
    becomes("those that wait", &1, || sessions(&server, false));
    thread::sleep(SOME_LOOKS);
    let sent = Instant::now();
    waiter.signal(Signal::Terminate);
    assert_eq!(waiter.ends().signal(), Some(15));
    assert!(sent.elapsed() < Duration::from_secs(5), "{:?}", sent.elapsed());
}

/// Whoever sends them to all processes of a service means the command, and not those that wait for their turn.
#[test]
fn what_means_something_to_the_command_only_ends_nobody_who_waits() {
    let database = Server::shared().database().unwrap();
    let url = database.url();
    let script = "trap 'echo USR1 came; exit 0' USR1; echo had; while :; do sleep 0.05; done";
    let mut holder = Process::start(pgdsync(&url).args(["run", "k", "--", "sh", "-c", script]));
    holder.says("had");
    // In a group of its own, since the system lets no terminal stop one that nobody could continue.
    let mut waiter = Process::start(pgdsync(&url).args(["run", "k", "--", "echo", "ran"]).process_group(0));
    // It takes signals before it starts the other process.
    waiter.keeper();
    waiter.signal(Signal::User1);
    // It heeds one after the other, and this one can be seen.
    waiter.signal(Signal::TerminalStop);
    let status = format!("/proc/{}/status", waiter.id());
    becomes("the stop", &true, || std::fs::read_to_string(&status).unwrap().contains("State:\tT"));
    waiter.signal(Signal::Continue);
    holder.signal(Signal::User1);
    holder.says("USR1 came");
    assert_eq!(holder.ends().code(), Some(0));
    let said = waiter.rest();
    assert_eq!((waiter.ends(), said), (std::process::ExitStatus::default(), vec!["ran".to_owned()]));
}

/// It may be in a group that has to be gone before another one's lock.
#[test]
fn one_that_is_killed_when_it_was_told_to_end_leaves_no_command_behind() {
    let database = Server::shared().database().unwrap();
    let script = "trap 'echo told' TERM; echo had $$; while :; do sleep 0.05; done";
    let command = ["run", "--kill-after", "1000", "k", "--", "sh", "-c", script];
    let mut holder = Process::start(pgdsync(&database.url()).args(command));
    let command: i32 = holder.says("had").1["had ".len()..].parse().unwrap();
    holder.signal(Signal::Terminate);
    holder.says("told");
    holder.signal(Signal::Kill);
    becomes("the life of the command", &false, || is_alive(command));
    holder.ends();
}

/// An init system signals all processes of a service at once.
#[test]
fn the_keeper_is_not_ended_by_what_is_meant_for_all() {
    let database = Server::shared().database().unwrap();
    let url = database.url();
    let script = "trap 'exit 7' TERM; echo had; while :; do sleep 0.05; done";
    let mut holder = Process::start(pgdsync(&url).args(["run", "k", "--", "sh", "-c", script]));
    holder.says("had");
    let keeper = holder.keeper();
    for which in [Signal::Terminate, Signal::Interrupt, Signal::Hangup, Signal::Quit] {
        signal(keeper, which).unwrap();
    }
    assert_eq!(run(&url, ["run", "-w", "1", "k", "--", "true"]).status.code(), Some(75));
    holder.signal(Signal::Terminate);
    assert_eq!(holder.ends().code(), Some(7));
}

/// As `nohup` and a shell's background jobs have it.
#[test]
fn a_signal_that_is_ignored_stays_so() {
    let database = Server::shared().database().unwrap();
    let script = r#"trap '' HUP; exec "$0" run k -- sh -c 'echo had; while [ ! -e "$0" ]; do sleep 0.05; done; exit 3' "$1""#;
    let file = new_file("go-on");
    let program = env!("CARGO_BIN_EXE_pgdsync");
    let mut command = clean(Command::new("sh"), &database.url());
    let mut holder = Process::start(command.args(["-c", script, program]).arg(&file));
    holder.says("had");
    holder.signal(Signal::Hangup);
    std::fs::write(&file, "").unwrap();
    assert_eq!(holder.ends().code(), Some(3));
}

/// Whoever stops and continues all processes of a service meets the one that is about to become the command, too.
#[test]
fn a_command_begins_although_its_process_is_stopped_and_continued_before() {
    let database = Server::shared().database().unwrap();
    for _ in 0..30 {
        let mut job = Process::start(pgdsync(&database.url()).args(["run", "k", "--", "echo", "ran"]));
        let (begun, mut met) = (Instant::now(), Vec::new());
        let ended = loop {
            if let Some(ended) = job.child.try_wait().unwrap() {
                break ended;
            }
            assert!(begun.elapsed() < PATIENCE, "the command has not begun");
            // Each of them once, so that none is helped on that stands still since.
            for child in children(job.id()).into_iter().filter_map(Pid::from_raw) {
                if !met.contains(&child) {
                    met.push(child);
                    // It may have ended.
                    let _ = kill_process(child, rustix::process::Signal::STOP);
                    thread::sleep(Duration::from_millis(1));
                    let _ = kill_process(child, rustix::process::Signal::CONT);
                }
            }
        };
        assert_eq!(ended.code(), Some(0));
        job.says("ran");
    }
}

/// The system keeps signals from the first process of a container that it does not ask for. Linux, as root.
#[test]
fn the_first_process_of_a_container_heeds_them_too() {
    if !can_contain() {
        return;
    }
    let server = Server::start().unwrap();
    let url = server.url();
    let start = |script: &str| {
        let mut command = clean(contained(), &url);
        command.arg(env!("CARGO_BIN_EXE_pgdsync")).args(["run", "k", "--", "sh", "-c", script]);
        Process::start(&mut command)
    };
    let first_of = |process: &Process| children(process.id())[0];
    // The orphan it leaves is waited for, and its end makes room for the next.
    let mut holder = start("trap 'exit 7' TERM; (sleep 0.2 &); echo had; while :; do sleep 0.05; done");
    holder.says("had");
    let mut waiter = start("echo ran");
    becomes("the waiters", &1, || sessions(&server, false));
    signal(first_of(&waiter), Signal::Terminate).unwrap();
    assert_eq!(waiter.ends().code(), Some(128 + 15));
    // The process that leads the session is outside.
    signal(first_of(&holder), Signal::Continue).unwrap();
    signal(first_of(&holder), Signal::Terminate).unwrap();
    assert_eq!(holder.ends().code(), Some(7));
}
