//! `lead`.

use std::fs;
use std::os::unix::process::ExitStatusExt as _;

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
    let (first, _) = leader.says("the command has ended with code 3");
    let (second, _) = leader.says("the command has ended with code 3");
    let (third, _) = leader.says("the command has ended with code 3");
    println!("pauses of {:.1?} and {:.1?}", second - first, third - second);
    assert!(third - second > second - first);
    leader.signal(Signal::Terminate);
    assert_eq!(leader.ends().signal(), Some(15));
    assert_eq!(fs::read_to_string(&file).unwrap().lines().count(), 3);
}

#[test]
fn one_who_is_asked_to_resign_ends_its_command_first() {
    let server = Server::start().unwrap();
    let url = server.url();
    let script =
        "trap 'echo asked; sleep 0.3; echo gone; exit 0' TERM; echo leads; while :; do sleep 0.05; done";
    let lead = || Process::start(pgdsync(&url).arg("lead").args(SHORT).args(["k", "--", "sh", "-c", script]));
    let first = lead();
    first.says("leads");
    let second = lead();
    becomes("those who wait", &1, || sessions(&server, false));
    let manager = dsync::PostgresManager::connect(dsync::Config::from_url(&url).unwrap()).unwrap();
    assert!(manager.request_resignation("k").unwrap());
    first.says("asked");
    let (gone_at, _) = first.says("gone");
    let (leads_at, _) = second.says("leads");
    assert!(gone_at < leads_at);
}
