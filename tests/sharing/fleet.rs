//! Many processes, with more locks than the server has sessions.

use dsync::ErrorKind;
use support::Server;

use super::*;
use crate::common::{Process, becomes, process};

const PROCESSES: usize = 10;
const LOCKS: usize = 500;

/// The body of a process of [`ten_processes_with_500_locks_each_work_on_a_server_with_20_connections`].
#[test]
#[ignore = "the body of a process, which another test starts"]
fn one_of_the_fleet() {
    let Some(role) = common::role() else { return };
    let (name, url) = role.split_once(' ').unwrap();
    let manager = started(config(url, 1));
    let locks: Vec<_> = (0..LOCKS).map(|number| lock(&manager, &format!("{name} {number}"))).collect();
    locks.iter().for_each(|lock| lock.lock(&soon()).unwrap());
    println!("holds all");
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
    assert!(locks.iter().all(is_held));
    manager.stop().unwrap();
}

#[test]
fn ten_processes_with_500_locks_each_work_on_a_server_with_20_connections() {
    let server = Server::builder()
        .max_connections(20)
        // The default of 64 × 20 is too few for 5,000.
        .setting("max_locks_per_transaction", "400")
        .start()
        .unwrap();
    let operator = &mut server.client().unwrap();
    let mut fleet: Vec<_> = (0..PROCESSES)
        .map(|number| {
            let role = format!("p{number} {}", server.url());
            let mut command = process("fleet::one_of_the_fleet", &role);
            command.stdin(std::process::Stdio::piped());
            Process::start(&mut command)
        })
        .collect();
    fleet.iter().for_each(|process| drop(process.says("holds all")));
    assert_eq!(held(operator), ((PROCESSES * LOCKS) as i64, PROCESSES as i64));
    for process in &mut fleet {
        process.go_on();
    }
    fleet.into_iter().for_each(|process| drop(process.succeeds()));
    becomes("the locks", &0, || held(operator).0);
    // With a session for each lock, one such process finds no place, and is told what to change.
    let manager = started(dsync::Config::from_url(&server.url()).unwrap().max_sessions(500));
    let mut had = Vec::new();
    let error = loop {
        let lock = lock(&manager, &format!("dedicated {}", had.len()));
        match lock.lock(&dsync::Context::timeout(Duration::from_secs(8))) {
            Ok(()) => had.push(lock),
            Err(error) => break error,
        }
        assert!(had.len() < 20);
    };
    println!("{} locks on sessions of their own, and then: {error}", had.len());
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    assert!(error.to_string().contains("max_connections"), "{error}");
}
