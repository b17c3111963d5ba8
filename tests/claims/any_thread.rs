//! Calls and drops on threads that cannot call the driver: one that drives an async runtime, and one whose thread-local
//! variables are being destroyed. Nothing panics there, and everything works.

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::thread;
use std::time::Duration;

use dsync::{Config, Context, ErrorKind, PostgresManager, SyncManager};
use support::Database;
use tokio::runtime::{Builder, Runtime};

use crate::common::{self, Process, becomes, hear, is_held, kind, lock, soon, started};

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

/// Runs `what` as a part of async code does, on a thread that ends in time.
fn in_async_code<T: Send + 'static>(what: impl FnOnce() -> T + Send + 'static) -> T {
    common::begin(move || runtime().block_on(async { what() })).get()
}

fn play(name: &str) {
    let database = Database::fresh().unwrap();
    let mut command = common::process("any_thread::scene", name);
    command.env("DATABASE_URL", database.url());
    Process::start(&mut command).succeeds();
}

/// Not a test: the body of the processes that the others start. A panic anywhere in the process makes it fail, since with
/// `panic = "abort"` that would be its end.
#[test]
#[ignore = "the body of a process, which another test starts"]
fn scene() {
    let Some(role) = common::role() else { return };
    static PANICS: AtomicUsize = AtomicUsize::new(0);
    let tell = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        PANICS.fetch_add(1, SeqCst);
        tell(info);
    }));
    match &*role {
        "every call" => scenes::every_call(),
        "every drop" => scenes::every_drop(),
        "the process-wide instance" => scenes::instance(),
        "the end of a thread" => scenes::end_of_thread(),
        other => panic!("there is no scene {other:?}"),
    }
    assert_eq!(PANICS.load(SeqCst), 0, "panics");
}

mod scenes {
    use super::*;

    pub(super) fn every_call() {
        let config = Config::from_env().unwrap();
        let rival = started(config.clone());
        let manager = in_async_code(move || {
            let manager = PostgresManager::new(config).unwrap();
            manager.start().unwrap();
            manager
        });
        let manager = Arc::new(manager);
        for context in [Context::background(), soon(), soon().with_cancel().0] {
            let (held, other) = (lock(&manager, "k"), lock(&rival, "k"));
            let calls = Arc::clone(&manager);
            let lost = in_async_code(move || {
                held.lock(&context).unwrap();
                held.wait(&context).unwrap();
                let lost = held.lost();
                assert_eq!(calls.inspect("k").unwrap().holder.unwrap().token, held.term().unwrap().token());
                assert_eq!(calls.inspect_all().unwrap().len(), 1);
                lost
            });
            assert_eq!(kind(other.try_lock(&soon())), ErrorKind::LockUnavailable);
            other.release().unwrap();
            let held = lock(&manager, "k");
            in_async_code(move || held.release()).unwrap();
            hear(&lost);
            other.lock(&soon()).unwrap();
            let waiting = lock(&manager, "k");
            in_async_code(move || {
                assert_eq!(kind(waiting.try_lock(&soon())), ErrorKind::LockUnavailable);
                assert!(waiting.try_acquire().unwrap().is_none());
                waiting.release().unwrap();
            });
            other.release().unwrap();
        }
        let stopped = Arc::clone(&manager);
        in_async_code(move || stopped.stop()).unwrap();
    }

    pub(super) fn every_drop() {
        let config = Config::from_env().unwrap();
        let rival = started(config.clone());
        let other = lock(&rival, "k");
        let manager = started(config.clone());
        let guard = lock(&manager, "k").acquire(soon()).unwrap();
        let lost = guard.lost().clone();
        in_async_code(move || drop(guard));
        hear(&lost);
        other.lock(&soon()).unwrap();
        other.release().unwrap();

        // A manager with a lock, one that waits, and a session that rests in the pool.
        let held = lock(&manager, "k");
        held.lock(&soon()).unwrap();
        lock(&rival, "busy").lock(&soon()).unwrap();
        assert_eq!(kind(lock(&manager, "busy").try_lock(&soon())), ErrorKind::LockUnavailable);
        let lost = held.lost();
        in_async_code(move || drop(manager));
        hear(&lost);
        other.lock(&soon()).unwrap();
        other.release().unwrap();

        // The last that knows the pool, after the stop, and before it.
        let manager = started(config.clone());
        let held = lock(&manager, "k");
        held.lock(&soon()).unwrap();
        manager.stop().unwrap();
        in_async_code(move || drop((manager, held)));
        let manager = started(config);
        in_async_code(move || drop(manager));
    }

    pub(super) fn instance() {
        in_async_code(|| {
            dsync::init(Config::from_env().unwrap().service("billing")).unwrap();
            let leadership = dsync::leadership_lock().unwrap();
            leadership.lock(&soon()).unwrap();
            assert!(is_held(&leadership));
            dsync::shutdown().unwrap();
            assert!(!is_held(&leadership));
        });
    }

    /// Dropped when the thread that it is kept for ends, before or after what the libraries keep there.
    struct Kept(#[allow(dead_code, reason = "it is there to be dropped")] Box<dyn Send>);

    thread_local! {
        static KEPT: RefCell<Option<Kept>> = const { RefCell::new(None) };
    }

    fn at_the_end_of_a_thread(early: bool, make: impl FnOnce() -> Box<dyn Send> + Send + 'static) {
        let ended = common::begin(move || {
            thread::spawn(move || {
                if early {
                    // Registered first, destroyed last.
                    KEPT.with(|_| ());
                }
                let kept = make();
                KEPT.with(|slot| *slot.borrow_mut() = Some(Kept(kept)));
            })
            .join()
        });
        ended.get().unwrap();
    }

    pub(super) fn end_of_thread() {
        let config = Config::from_env().unwrap();
        let rival = started(config.clone());
        let other = lock(&rival, "k");
        let manager = Arc::new(started(config.clone()));
        for early in [true, false] {
            let makes = Arc::clone(&manager);
            at_the_end_of_a_thread(early, move || {
                Box::new(lock(&makes, "k").acquire(Context::background()).unwrap())
            });
            other.lock(&soon()).unwrap();
            other.release().unwrap();
            let config = config.clone();
            at_the_end_of_a_thread(early, move || {
                let manager = started(config);
                lock(&manager, "k").lock(&Context::background()).unwrap();
                Box::new(manager)
            });
            other.lock(&soon()).unwrap();
            other.release().unwrap();
        }
    }
}

#[test]
fn every_call_works_on_a_thread_that_drives_a_runtime() {
    play("every call");
}

#[test]
fn every_drop_works_on_a_thread_that_drives_a_runtime() {
    play("every drop");
}

#[test]
fn the_process_wide_instance_works_on_a_thread_that_drives_a_runtime() {
    play("the process-wide instance");
}

#[test]
fn guards_and_managers_may_end_with_their_thread() {
    play("the end of a thread");
}

#[test]
fn a_call_on_a_thread_that_drives_a_runtime_ends_in_time_at_a_frozen_server() {
    let server = support::Server::start().unwrap();
    let config = Config::from_url(&server.url()).unwrap().lease(Duration::from_secs(4));
    let manager = Arc::new(started(config.clone()));
    let held = lock(&manager, "k");
    held.lock(&soon()).unwrap();
    let (lost, frozen) = (held.lost(), server.freeze().unwrap());
    let begun = std::time::Instant::now();
    let (looks, releases) = (Arc::clone(&manager), Arc::clone(&held));
    let told = in_async_code(move || {
        let told = (kind(looks.inspect("k")), kind(releases.release()));
        looks.stop().unwrap();
        told
    });
    // `inspect` has the time of a connect and of a heartbeat, the other two that of a release each.
    assert!(begun.elapsed() < Duration::from_secs(5 + 1 + 2 + 2 + 1), "{:?}", begun.elapsed());
    assert_eq!(told.0, ErrorKind::SessionUnavailable);
    assert_eq!(told.1, ErrorKind::UnlockFailed);
    hear(&lost);
    frozen.thaw();
    becomes("what the server holds", &0, || {
        let locks = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'";
        server.client().unwrap().query_one(locks, &[]).unwrap().get::<_, i64>(0)
    });
}
