//! Every exit code that the help names.

use std::os::unix::process::ExitStatusExt as _;
use std::time::{Duration, Instant};

use support::Server;
use support::process::Signal;

use crate::common::{Process, SHORT, becomes, new_file, pgdsync, run, sessions, text};

#[test]
fn the_commands_own_codes_are_passed_on() {
    let database = Server::shared().database().unwrap();
    let url = database.url();
    for (script, code) in [
        ("exit 0", 0),
        ("exit 1", 1),
        ("exit 75", 75),
        ("exit 255", 255),
        ("kill -KILL $$", 128 + 9),
        ("kill -TERM $$", 128 + 15),
        ("kill -SEGV $$", 128 + 11),
    ] {
        let output = run(&url, ["run", "codes", "--", "sh", "-c", script]);
        assert_eq!(output.status.code(), Some(code), "{script}: {}", text(&output.stderr));
        assert_eq!((text(&output.stdout), text(&output.stderr)), (String::new(), String::new()), "{script}");
    }
}

#[test]
fn a_command_that_is_not_there_or_cannot_be_executed_is_told_of() {
    let database = Server::shared().database().unwrap();
    let file = new_file("not-executable");
    std::fs::write(&file, "#!/bin/sh\n").unwrap();
    for (command, code) in [("there-is-no-such-command", 127), (file.to_str().unwrap(), 126)] {
        let output = run(&database.url(), ["run", "exec", "--", command]);
        assert_eq!(output.status.code(), Some(code));
        assert!(text(&output.stderr).contains(&format!("cannot run {command}")), "{}", text(&output.stderr));
    }
}

#[test]
fn a_wrong_command_line_is_64_and_says_what_to_change() {
    let database = Server::shared().database().unwrap();
    for (arguments, says) in [
        (&["run", "--no-such-flag", "k", "--", "true"][..], "--no-such-flag"),
        (&["run", "k"], "required"),
        (&["run", "--", "true"], "<KEY>"),
        (&["run", "-w", "soon", "k", "--", "true"], "soon"),
        (&["run", "-w", "1e19", "k", "--", "true"], "30 years"),
        (&["run", "--kill-after", "1e19", "k", "--", "true"], "30 years"),
        (&["run", "--kill-after", "1e9", "k", "--", "true"], "lease is"),
        (&["run", "-k", "--", "true"], "unexpected argument '-k'"),
        (&["run", "-n", "-w", "1", "k", "--", "true"], "cannot be used with"),
        (&["run", "--stop-signal", "HALT", "k", "--", "true"], "HALT"),
        (&["run", "-s", "k", "j", "--", "true"], "--shared goes with one key"),
        (&["run", "--every", "1h", "k", "j", "--", "true"], "--every goes with one key"),
        (&["run", "--permits", "2", "k", "j", "--", "true"], "--permits goes with one key"),
        (&["run", "--permits", "2", "-s", "k", "--", "true"], "cannot be used with"),
        (&["run", "--permits", "2", "--every", "1h", "k", "--", "true"], "cannot be used with"),
        (&["run", "--permits", "0", "k", "--", "true"], "1..=1023"),
        (&["run", "#x", "--", "true"], "##x"),
        (&["lead", "#x", "--", "true"], "##x"),
        (&["permits", "k", "1024"], "1..=1023"),
        (&["run", "--every", "0", "k", "--", "true"], "give a longer one"),
        (
            &["run", "--lease", "30", "k", "--", "true"],
            "--lease is 30s and --kill-after 10s (DSYNC_LEASE counts as --lease)",
        ),
        (&["run", "", "--", "true"], "key"),
        (&["run", "--url", "postgres://localhost:x/", "k", "--", "true"], "connection string"),
    ] {
        let output = run(&database.url(), arguments);
        assert_eq!(output.status.code(), Some(64), "{arguments:?}: {}", text(&output.stderr));
        assert!(text(&output.stderr).contains(says), "{arguments:?}: {}", text(&output.stderr));
        // The command would begin there.
        assert!(!text(&output.stderr).contains("use '-- -k'"), "{}", text(&output.stderr));
    }
}

/// The lease is long enough for these heartbeats, and too short for the usual ones.
#[test]
fn another_setting_that_is_refused_is_not_taken_for_the_lease() {
    let mut command = pgdsync(&Server::shared().database().unwrap().url());
    command.args(["run", "--lease=30", "k", "--", "true"]);
    for (name, value) in
        [("DSYNC_HEARTBEAT", "1s"), ("DSYNC_HEARTBEAT_TIMEOUT", "1s"), ("DSYNC_SHARED_SESSIONS", "3")]
    {
        command.env(name, value);
    }
    let output = command.output().unwrap();
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(64), "{said}");
    assert!(said.contains("shared_sessions is 3") && !said.contains("--lease"), "{said}");
}

/// As in a file of variables that is made of a template.
#[test]
fn a_variable_that_is_empty_says_nothing() {
    let database = Server::shared().database().unwrap();
    let mut command = pgdsync(&database.url());
    command.args(["run", "k", "--", "true"]);
    for name in
        ["DSYNC_LEASE", "DSYNC_HEARTBEAT", "DSYNC_HEARTBEAT_TIMEOUT", "DSYNC_NAMESPACE", "DSYNC_SCHEMA"]
    {
        command.env(name, "");
    }
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
}

#[test]
fn a_server_that_cannot_be_reached_is_69_and_the_command_does_not_run() {
    let file = new_file("ran");
    let script = format!("touch {}", file.display());
    for verb in [&["run"][..], &["run", "-n"], &["run", "-w", "1"], &["run", "--every", "1h"], &["lead"]] {
        // Nobody listens on this port.
        let rest =
            ["--url", "postgres://postgres:secret@127.0.0.1:1/postgres", "k", "--", "sh", "-c", &script];
        let output = run("", [verb, &rest].concat());
        assert_eq!(output.status.code(), Some(69), "{verb:?}: {}", text(&output.stderr));
        let said = text(&output.stderr);
        assert!(said.contains("127.0.0.1:1: could not connect") && !said.contains("secret"), "{said}");
    }
    assert!(!file.exists());
}

#[test]
fn a_quorum_where_no_standby_is_named_is_69_and_the_command_does_not_run() {
    let server = Server::start().unwrap();
    let output = run(&server.url(), ["run", "--quorum", "k", "--", "echo", "it ran"]);
    let told = text(&output.stderr);
    assert_eq!(output.status.code(), Some(69), "{told}");
    assert!(told.contains("synchronous_standby_names") && output.stdout.is_empty(), "{told}");
    // From the first one on that has it, those without are refused.
    assert!(run(&server.url(), ["run", "k", "--", "true"]).status.success());
    server.client().unwrap().batch_execute("UPDATE dsync.policy SET quorum = true").unwrap();
    let output = run(&server.url(), ["run", "k", "--", "echo", "it ran"]);
    let told = text(&output.stderr);
    assert_eq!(output.status.code(), Some(69), "{told}");
    assert!(told.contains("--quorum") && output.stdout.is_empty(), "{told}");
}

/// A program that runs the job again when the server was not to be had must be told that it was done.
#[test]
fn a_success_that_cannot_be_recorded_is_69_and_says_that_the_work_was_done() {
    let database = Server::shared().database().unwrap();
    let url = database.url();
    let file = new_file("go-on");
    let script = format!("echo begun; while [ ! -e {} ]; do sleep 0.05; done", file.display());
    let mut words = vec!["run", "--every", "1h"];
    words.extend(SHORT);
    words.extend(["k", "--", "sh", "-c", &script]);
    let mut job = Process::start(pgdsync(&url).args(words));
    job.says("begun");
    let mut client = database.client().unwrap();
    client.batch_execute("BEGIN; LOCK TABLE dsync.success IN ACCESS EXCLUSIVE MODE").unwrap();
    std::fs::write(&file, "").unwrap();
    job.says("has been done, but it is not known whether that could be recorded");
    assert_eq!(job.child.wait().unwrap().code(), Some(69));
    client.batch_execute("ROLLBACK").unwrap();
    std::fs::remove_file(&file).unwrap();
}

/// The command is over, so nothing is to be ended in time, and what becomes of its success takes longer than its term.
#[test]
fn a_server_that_stands_still_when_the_command_ends_is_waited_for() {
    let server = Server::start().unwrap();
    let file = new_file("go-on");
    let script = format!("echo begun; while [ ! -e {} ]; do sleep 0.05; done; echo ended", file.display());
    // A term that lasts until the command has ended, also on a busy machine.
    let words = ["run", "--every", "1h", "--lease=15", "--kill-after=1", "k", "--", "sh", "-c", &script];
    let mut job = Process::start(pgdsync(&server.url()).args(words));
    job.says("begun");
    let frozen = server.freeze().unwrap();
    std::fs::write(&file, "").unwrap();
    job.says("ended");
    job.says("has ended");
    assert_eq!(job.ends().code(), Some(79));
    frozen.thaw();
    std::fs::remove_file(&file).unwrap();
}

#[test]
fn a_lock_that_another_has_is_75_or_what_was_asked_for() {
    let database = Server::shared().database().unwrap();
    let url = database.url();
    let holder =
        Process::start(pgdsync(&url).args(["run", "k", "--", "sh", "-c", "echo had; exec sleep 1000"]));
    holder.says("had");
    for (arguments, code) in [
        (&["run", "-n", "k"][..], 75),
        (&["run", "--nonblock", "-E", "9", "k"], 9),
        (&["run", "-s", "-n", "k"], 75),
        (&["run", "-n", "j", "k"], 75),
        (&["run", "-w", "0", "k"], 75),
        (&["run", "-w", "0.3", "k"], 75),
        (&["run", "--wait", "300ms", "--conflict-exit-code", "0", "k", "j"], 0),
        (&["run", "--every", "1h", "-n", "k"], 75),
        (&["run", "--every", "1h", "-w", "0.3", "-E", "1", "k"], 1),
    ] {
        let output = run(&url, [arguments, &["--", "echo", "ran"]].concat());
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {}", text(&output.stderr));
        assert_eq!((text(&output.stdout), text(&output.stderr)), (String::new(), String::new()));
    }
    let output = run(&url, ["run", "-n", "-v", "k", "--", "echo", "ran"]);
    assert!(text(&output.stderr).contains("another has k"), "{}", text(&output.stderr));
    // It is another one in another namespace.
    let output = run(&url, ["run", "-n", "--namespace=other", "k", "--", "true"]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let mut client = database.client().unwrap();
    client.batch_execute("SELECT pg_advisory_lock(42), pg_advisory_lock(4, 2)").unwrap();
    for (key, code) in [("#42", 75), ("#4:2", 75), ("42", 0), ("##42", 0)] {
        let output = run(&url, ["run", "-n", key, "--", "true"]);
        assert_eq!(output.status.code(), Some(code), "{key}: {}", text(&output.stderr));
    }
    let output = run(&url, ["run", "-v", "j", "--", "true"]);
    assert!(text(&output.stderr).contains("holds j with token 1"), "{}", text(&output.stderr));
}

#[test]
fn a_lost_lock_is_79() {
    let server = Server::start().unwrap();
    // It ends well, which is of no use any more.
    let script = "trap 'echo INT came; exit 0' INT; echo had; while :; do sleep 0.05; done";
    let mut command = pgdsync(&server.url());
    command.args(["run", "--stop-signal", "int"]).args(SHORT).args(["k", "--", "sh", "-c", script]);
    let mut holder = Process::start(&mut command);
    holder.says("had");
    server.terminate(crate::loss::holder_of(&server, "k")).unwrap();
    // The two streams come in any order.
    let said = holder.rest();
    for part in ["the lock was lost: the session was terminated", "INT came"] {
        assert!(said.iter().any(|line| line.contains(part)), "{part:?} is missing: {said:?}");
    }
    assert_eq!(holder.ends().code(), Some(79));
}

#[test]
fn a_wait_ends_at_once_by_a_signal_and_leaves_nothing() {
    let server = Server::start().unwrap();
    let url = server.url();
    let holder =
        Process::start(pgdsync(&url).args(["run", "k", "--", "sh", "-c", "echo had; exec sleep 1000"]));
    holder.says("had");
    for (which, number) in [(Signal::Terminate, 15), (Signal::Interrupt, 2), (Signal::Hangup, 1)] {
        let mut waiter = Process::start(pgdsync(&url).args(["run", "k", "--", "echo", "ran"]));
        becomes("the waiters", &1, || sessions(&server, false));
        let (keeper, sent) = (waiter.keeper(), Instant::now());
        waiter.signal(which);
        assert_eq!(waiter.ends().signal(), Some(number));
        assert!(sent.elapsed() < Duration::from_secs(10), "{:?}", sent.elapsed());
        becomes("the keeper's life", &false, || support::process::is_alive(keeper));
        becomes("the waiters", &0, || sessions(&server, false));
        assert_eq!(waiter.rest(), Vec::<String>::new());
    }
}
