//! A leader that steps down does not stand again, whatever the thread does that logs the leadership.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use dsync::{Context, ErrorKind, MemoryManager, MemoryServer};

use crate::common::{Process, process, role};

/// In a process of its own, since a process has one manager.
#[test]
fn a_release_is_never_undone() {
    Process::start(&mut process("stepping_down::scene", "a leader")).succeeds();
}

/// Not a test: the body of the process that the other starts.
#[test]
#[ignore = "the body of a process, which another test starts"]
fn scene() {
    if role().is_none() {
        return;
    }
    let server = MemoryServer::new();
    for round in 0..200 {
        dsync::init_with(Arc::new(MemoryManager::on(&server)), Some("x"), None).unwrap();
        let leadership = dsync::leadership_lock().unwrap();
        if round % 2 == 0 {
            // At once, perhaps before the observer has begun.
            leadership.release().unwrap();
        } else {
            // At the moment of a loss, when the observer begins to wait for the next term.
            leadership.lock(&Context::background()).unwrap();
            let (lost, stepping_down) = (leadership.lost(), Arc::clone(&leadership));
            let listener = thread::spawn(move || {
                lost.recv().unwrap_err();
                stepping_down.release().unwrap();
            });
            server.revoke("service/x/leadership");
            listener.join().unwrap();
        }
        // A claim that is begun anew holds the lock at once, since nobody else wants it.
        let again = leadership.wait(&Context::timeout(Duration::from_millis(50)));
        assert_eq!(again.unwrap_err().kind(), ErrorKind::Released, "round {round}");
        // That the observer might be late is what shutting down waits for.
        dsync::shutdown().unwrap();
        assert!(leadership.term().is_none());
    }
}
