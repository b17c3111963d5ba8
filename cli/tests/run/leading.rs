//! `lead`.

use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::time::Duration;

use support::Server;
use support::process::Signal;

use crate::common::{Process, SHORT, becomes, new_file, pgdsync, sessions};
use crate::loss::holder_of;

#[test]
fn the_command_runs_again_and_elsewhere_when_its_machine_is_gone() {
    let server = Server::start().unwrap();
    let url = server.url();
    let lead = |name: &str| {
        let script = format!("echo {name} leads with token $PGDSYNC_TOKEN; exec sleep 1000");
        Process::start(pgdsync(&url).arg("lead").args(SHORT).args(["k", "--", "sh", "-c", &script]))
    };
    let first = lead("first");
    first.says("first leads with token 1");
    let mut second = lead("second");
    becomes("those who wait", &1, || sessions(&server, false));
    // The front and the keeper at once, and the command.
    let keeper = first.keeper();
    for process in support::process::children(first.id()).into_iter().filter(|&child| child != keeper) {
        support::process::signal(process, Signal::Kill).unwrap();
    }
    drop(first);
    second.says("second leads with token 1");
    // After a loss it leads anew.
    server.terminate(holder_of(&server, "k")).unwrap();
    second.says("the lock was lost");
    second.says("second leads with token 1");
    second.signal(Signal::Terminate);
    assert_eq!(second.ends().code(), Some(128 + 15));
    becomes("the holders", &0, || sessions(&server, true));
}

#[test]
fn a_command_that_fails_runs_again_after_a_pause() {
    let database = Server::shared().database().unwrap();
    let file = new_file("failures");
    let script = format!("echo x >> {}; exit 3", file.display());
    let mut leader = Process::start(pgdsync(&database.url()).args(["lead", "k", "--", "sh", "-c", &script]));
    let ends: Vec<_> = (0..4).map(|_| leader.says("the command has ended with code 3").0).collect();
    let pauses: Vec<_> = ends.windows(2).map(|ends| ends[1] - ends[0]).collect();
    println!("pauses of {pauses:.1?}");
    // Each is twice as long as the one before, also where a line is read late.
    assert!(pauses[2] > pauses[0] + Duration::from_secs(1));
    leader.signal(Signal::Terminate);
    assert_eq!(leader.ends().signal(), Some(15));
    assert_eq!(fs::read_to_string(&file).unwrap().lines().count(), ends.len());
}

#[test]
fn one_who_is_asked_to_resign_ends_its_command_first() {
    let server = Server::start().unwrap();
    let url = server.url();
    let file = new_file("order");
    let script = format!(
        "trap 'echo asked; sleep 0.3; echo gone >> {0}; exit 0' TERM; echo leads >> {0}; echo leads; while :; do sleep 0.05; done",
        file.display()
    );
    let lead =
        || Process::start(pgdsync(&url).arg("lead").args(SHORT).args(["k", "--", "sh", "-c", &script]));
    let first = lead();
    first.says("leads");
    let second = lead();
    becomes("those who wait", &1, || sessions(&server, false));
    let manager = dsync::PostgresManager::connect(dsync::Config::from_url(&url).unwrap()).unwrap();
    assert!(manager.request_resignation("k").unwrap());
    first.says("asked");
    second.says("leads");
    assert_eq!(fs::read_to_string(&file).unwrap(), "leads\ngone\nleads\n");
}
