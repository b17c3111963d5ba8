//! `watch`.

use std::process::Command;

use serde_json::Value;
use support::process::Signal;
use support::{Database, Server, Shutdown};

use crate::common::{Running, hold, next, pgdsync, queue, started};

fn watch(url: &str, arguments: &[&str]) -> Command {
    let mut command = pgdsync(&[&["watch", "--interval=50ms"], arguments].concat());
    command.env("DATABASE_URL", url);
    command
}

#[test]
fn each_change_of_holder_is_a_line_and_whole_where_no_terminal_bounds_it() {
    let database = Database::fresh().unwrap();
    let url = database.url();
    let (manager, other) = (started(&url), started(&url));
    let long = "鍵".repeat(100);
    let guards = [hold(&manager, "a"), hold(&manager, "b"), hold(&manager, &long)];
    let keys = ["a", "a", "a", "b", &long].map(dsync::Key::from);
    let others = [(); 5].map(|()| started(&url));
    let waiting: Vec<_> = others.iter().zip(&keys).map(|(other, key)| queue(other, key)).collect();

    let watching = Running::start(&mut watch(&url, &[]));
    for key in ["a", "b", "鍵"] {
        let line = next(&watching.out, &[&format!("Z {key}"), ": held by 127.0.0.1 dsync, token "]);
        println!("{line}");
        assert!(!line.contains('…'), "{line}");
    }
    let [a, b, c] = guards;
    b.release().unwrap();
    let line = next(&watching.out, &["Z b: held by 127.0.0.1 dsync, token "]);
    println!("{line}");
    c.release().unwrap();
    next(&watching.out, &[&format!("Z {long}: held by 127.0.0.1 dsync, token ")]);
    waiting[3].release().unwrap();
    println!("{}", next(&watching.out, &["Z b: free"]));
    // Who is asked for the lock a key at a time sees that it is free.
    let one = Running::start(&mut watch(&url, &["new"]));
    next(&one.out, &["Z new: free"]);
    let guard = hold(&other, "new");
    next(&one.out, &["Z new: held by 127.0.0.1 dsync, token"]);
    next(&watching.out, &["Z new: held by"]);
    guard.release().unwrap();
    next(&one.out, &["Z new: free"]);
    assert_eq!(one.end(Signal::Interrupt), Some(0));
    assert_eq!(watching.end(Signal::Terminate), Some(0));
    waiting.iter().for_each(|lock| lock.release().unwrap());
    a.release().unwrap();
}

#[test]
fn for_programs_a_change_is_a_json_object_in_a_line() {
    let database = Database::fresh().unwrap();
    let url = database.url();
    let manager = started(&url);
    let guard = hold(&manager, "a\nb");
    let watching = Running::start(&mut watch(&url, &["a*", "--output=json"]));
    let line: Value = serde_json::from_str(&next(&watching.out, &[])).unwrap();
    assert_eq!((&line["key"], &line["waiters"]), (&"a\nb".into(), &0.into()));
    assert_eq!(line["holders"][0]["token"], guard.term().token().unwrap());
    let ignored = hold(&manager, "b");
    guard.release().unwrap();
    let line: Value = serde_json::from_str(&next(&watching.out, &[])).unwrap();
    assert_eq!((&line["key"], &line["holders"]), (&"a\nb".into(), &Value::Array(Vec::new())));
    drop(ignored);
}

#[test]
fn a_restart_of_the_server_is_told_and_survived() {
    let server = Server::start().unwrap();
    let url = server.url();
    let manager = started(&url);
    let guard = hold(&manager, "a");
    let watching = Running::start(&mut watch(&url, &["a"]));
    next(&watching.out, &["Z a: held by"]);
    server.stop(Shutdown::Immediate).unwrap();
    next(&watching.err, &["asking again until it answers"]);
    server.start_again().unwrap();
    next(&watching.err, &["the server answers again"]);
    next(&watching.err, &["the server was restarted or replaced; no lock is granted for"]);
    next(&watching.out, &["Z a: free"]);
    drop(guard);
    let again = hold(&manager, "a");
    next(&watching.out, &["Z a: held by"]);
    assert!(watching.err.is_empty());
    drop(again);
    assert_eq!(watching.end(Signal::Interrupt), Some(0));
}
