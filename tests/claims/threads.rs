//! What a process is told that can start no thread, and that a manager's threads end with it. Each in a process of its own.

use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use dsync::{Config, ErrorKind, PostgresManager, SyncManager};
use support::{Database, process};

use crate::common::{self, Process, becomes, is_open, kind, lock, soon, started};

fn play(name: &str, stack: &str) {
    let database = Database::fresh().unwrap();
    let mut command = common::process("threads::scene", name);
    command.env("DATABASE_URL", database.url()).env("RUST_MIN_STACK", stack);
    Process::start(&mut command).succeeds();
}

/// Not a test: the body of the processes that the others start.
#[test]
#[ignore = "the body of a process, which another test starts"]
fn scene() {
    let Some(role) = common::role() else { return };
    match &*role {
        "no thread to be had" => no_thread_to_be_had(),
        "threads of managers" => threads_of_managers(),
        other => panic!("there is no scene {other:?}"),
    }
}

fn no_thread_to_be_had() {
    static PANICS: AtomicUsize = AtomicUsize::new(0);
    let tell = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        PANICS.fetch_add(1, SeqCst);
        tell(info);
    }));
    let config = || Config::from_env().unwrap();
    let before = started(config());
    let held = lock(&before, "held");
    held.lock(&soon()).unwrap();
    let unused = PostgresManager::new(config()).unwrap();
    let lost = held.lost();

    assert!(process::limit_address_space(STACK / 2), "this system tells of its processes");
    let error = PostgresManager::new(config()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::FailedInitialization);
    assert!(error.to_string().contains("limit of threads"), "{error}");
    // Nothing that is needed for more than a claim.
    let _ = unused.start();
    let wanted = lock(&unused, "wanted");
    for outcome in [wanted.lock(&soon()), wanted.try_lock(&soon())] {
        let error = outcome.unwrap_err();
        assert!(error.to_string().contains("limit of threads"), "{error}");
    }
    wanted.release().unwrap();
    assert!(is_open(&lost));
    held.release().unwrap();
    before.stop().unwrap();

    process::raise_address_space_limit();
    let _ = unused.start();
    wanted.lock(&soon()).unwrap();
    assert_eq!(kind(unused.stop().and_then(|()| wanted.lock(&soon()))), ErrorKind::SyncManagerStopped);
    assert_eq!(PANICS.load(SeqCst), 0, "panics");
}

/// Of a thread; so large that the limit on addresses is a limit on threads, and the C library keeps none for later.
const STACK: u64 = 512 << 20;

fn threads_of_managers() {
    let config = Config::from_env().unwrap();
    let count = || process::threads(process::own()).expect("this system tells of its processes");
    let before = count();
    // Never started, started, used, stopped, only dropped.
    for used in [0, 1, 2] {
        for stops in [true, false] {
            let managers: Vec<_> = (0..10).map(|_| PostgresManager::new(config.clone()).unwrap()).collect();
            for manager in managers {
                if used > 0 {
                    manager.start().unwrap();
                }
                if used > 1 {
                    let lock = lock(&manager, "k");
                    lock.lock(&soon()).unwrap();
                    lock.release().unwrap();
                }
                if stops {
                    manager.stop().unwrap();
                }
            }
            // Far sooner than the 30 s of r2d2's own.
            let begun = std::time::Instant::now();
            becomes("the threads", &before, count);
            assert!(begun.elapsed().as_secs() < 10, "{:?}", begun.elapsed());
        }
    }
}

#[test]
fn a_process_that_can_start_no_thread_is_told_and_keeps_what_it_has() {
    play("no thread to be had", &STACK.to_string());
}

#[test]
fn the_threads_of_a_manager_end_with_it() {
    play("threads of managers", "1000000");
}
