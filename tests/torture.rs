//! The short form of `examples/torture`: processes fight for locks while everything around them fails.

#![allow(
    clippy::unwrap_used,
    reason = "all of this is test code, in which a panic is the report of a failure"
)]

#[path = "../examples/torture/chaos.rs"]
mod chaos;
#[path = "../examples/torture/course.rs"]
mod course;
#[path = "../examples/torture/crew.rs"]
mod crew;
#[path = "../examples/torture/fault.rs"]
mod fault;
#[path = "../examples/torture/referee.rs"]
mod referee;
#[path = "../examples/torture/report.rs"]
mod report;
#[path = "../examples/torture/stalls.rs"]
mod stalls;
#[path = "../examples/torture/worker.rs"]
mod worker;

use std::env;
use std::process::Command;
use std::time::Duration;

/// With the time that a worker waits for its last threads, 30 s at the most, it is a minute.
const LENGTH: Duration = Duration::from_secs(30);

/// By this variable the process knows that it is a fighter: its place, the server, and a seed.
const ROLE: &str = "TORTURE_FIGHTER";

#[test]
fn no_fault_makes_two_holders_or_a_silent_loss() {
    let seed = fastrand::u64(..1_000_000);
    let clean = course::run(seed, LENGTH, |place, url, seed| {
        let mut command = Command::new(env::current_exe()?);
        command.args(["--exact", "fighter", "--include-ignored", "--nocapture", "--test-threads=1"]);
        command.env(ROLE, format!("{place} {url} {seed}"));
        Ok(command)
    });
    assert!(clean.unwrap(), "violations; again with: cargo run --release --example torture -- --seed {seed}");
}

/// Not a test: the body of the processes that the test starts.
#[test]
#[ignore = "the body of a process, which another test starts"]
fn fighter() {
    let Ok(role) = env::var(ROLE) else { return };
    let words: Vec<&str> = role.split(' ').collect();
    worker::run(words[0].parse().unwrap(), words[1], words[2].parse().unwrap()).unwrap();
}
