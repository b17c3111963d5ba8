//! `resign` and `break`.

use std::time::Duration;

use dsync::{Leader, LeaderOptions, LossReason};
use support::process::{Signal, signal};
use support::{Database, Server};

use crate::common::{PATIENCE, at, hold, pgdsync, run, started};

#[test]
fn a_leader_is_asked_to_resign_and_others_are_told_of() {
    let database = Database::fresh().unwrap();
    let url = database.url();
    let manager = started(&url);
    at(&url, &["resign", "service"]).badly(1, &["nobody has the lock service"]);
    let options = LeaderOptions::new().watch_interval(Duration::from_millis(50));
    let (sender, ended) = dsync::crossbeam_channel::unbounded();
    let leader = Leader::start_with(manager.lock("service").unwrap(), options, move |tenure| {
        let _ = sender.send(tenure.wait_timeout(PATIENCE));
    });
    let leader = leader.unwrap();
    support::wait_for("a leader", PATIENCE, || leader.status().leads.then_some(())).unwrap();
    let said = at(&url, &["resign", "service"]).well();
    assert!(said.starts_with("asked whoever has service to resign\n"), "{said}");
    assert_eq!(ended.recv_timeout(PATIENCE), Ok(true), "the work is told to stop");
    leader.stop(PATIENCE).unwrap();

    let shared = manager.shared_lock("prices").unwrap().acquire(PATIENCE).unwrap();
    at(&url, &["resign", "prices"]).badly(1, &["cannot be asked", "pgdsync break"]);
    drop(shared);
}

#[test]
fn a_lock_is_broken_only_by_who_says_yes() {
    let database = Database::fresh().unwrap();
    let url = database.url();
    let manager = started(&url);
    let guard = hold(&manager, "a");
    at(&url, &["break", "a"]).badly(64, &["no terminal", "--yes"]);
    assert!(guard.is_held());
    let said = at(&url, &["break", "a", "--yes"]).well();
    println!("{said}");
    assert!(said.contains(&format!("token       {}", guard.term().token().unwrap())), "{said}");
    assert!(said.contains("ended the session of 127.0.0.1 dsync, backend "), "{said}");
    assert!(guard.lost().wait_timeout(PATIENCE));
    assert_eq!(guard.loss().unwrap().reason, LossReason::Terminated);
    at(&url, &["break", "a", "--yes"]).badly(1, &["nobody has the lock a"]);
}

/// It may still end, so that a script must not take it for a lock that another has.
#[test]
fn a_session_that_was_told_to_end_and_does_not_is_69() {
    let database = Database::fresh().unwrap();
    let url = database.url();
    let manager = started(&url);
    let _guard = hold(&manager, "a");
    let backend = manager.inspect("a").unwrap().holder.unwrap().pid;
    signal(backend, Signal::Stop).unwrap();
    let said = at(&url, &["break", "a", "--yes"]);
    signal(backend, Signal::Continue).unwrap();
    said.badly(69, &["has told backend", "has not ended within"]);
}

#[test]
fn who_may_not_break_a_lock_is_told_what_right_is_missing() {
    let server = Server::start().unwrap();
    let url = server.url();
    let manager = started(&url);
    let _guard = hold(&manager, "a");
    let poor = url.replace("postgres@", "poor@");
    server.client().unwrap().batch_execute("CREATE ROLE poor LOGIN").unwrap();
    at(&poor, &["list"]).badly(69, &["may not use the catalog", "pgdsync catalog --grant ROLE"]);
    let grants = at(&url, &["catalog", "--grant=poor"]).well();
    server.client().unwrap().batch_execute(&grants).unwrap();
    at(&poor, &["break", "a", "--yes"]).badly(69, &["pg_signal_backend"]);
    let without = run(pgdsync(&["show", "a"]).env("DATABASE_URL", &poor).env("DSYNC_CATALOG", "none")).well();
    assert!(without.contains("held by") && !without.contains("token"), "{without}");
}
