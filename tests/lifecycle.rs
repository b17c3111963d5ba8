//! The calls that begin and end something, two at a time: whatever two threads do to one manager, or to the process-wide
//! one, nobody panics or hangs, and when all is stopped nothing is left, neither on the server nor in the process.

#![allow(
    clippy::unwrap_used,
    reason = "all of this is test code, in which a panic is the report of a failure"
)]

mod common;

use std::fs;
use std::net::TcpListener;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use common::{PATIENCE, becomes, begin, kind, soon};
use dsync::{
    Config, Context, ErrorKind, Lock, LockGuard, LockOptions, MemoryManager, MemoryServer, PostgresManager,
    Result, SyncManager,
};
use parking_lot::Mutex;
use support::Database;

// ---------------------------------------------------------------------------------------------------------------------
// Starting
// ---------------------------------------------------------------------------------------------------------------------

#[test]
fn all_who_start_a_manager_at_once_hear_that_the_server_refuses_it() {
    let database = Database::fresh().unwrap();
    let config = Config::from_url(&format!("{}_nowhere", database.url())).unwrap();
    for round in 0..20 {
        let manager = Arc::new(PostgresManager::new(config.clone()).unwrap());
        let together = Arc::new(Barrier::new(4));
        let starts = [(); 4].map(|()| {
            let (manager, together) = (Arc::clone(&manager), Arc::clone(&together));
            begin(move || {
                together.wait();
                manager.start()
            })
        });
        for start in starts {
            assert_eq!(kind(start.get()), ErrorKind::FailedInitialization, "round {round}");
        }
        assert_eq!(kind(manager.start()), ErrorKind::FailedInitialization, "and so does who comes later");
    }
}

#[test]
fn a_stop_ends_a_start_that_waits_for_a_silent_server() {
    // Its kernel takes connections, and nobody answers.
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("postgres://nobody@127.0.0.1:{}/d", server.local_addr().unwrap().port());
    let config = Config::from_url(&url).unwrap().connect_timeout(PATIENCE * 2);
    let manager = Arc::new(PostgresManager::new(config).unwrap());
    let start = || {
        let manager = Arc::clone(&manager);
        begin(move || manager.start())
    };
    let first = start();
    let _connection = server.accept().unwrap();
    let second = start();
    let begun = Instant::now();
    manager.stop().unwrap();
    for start in [first, second] {
        assert_eq!(kind(start.get()), ErrorKind::SyncManagerStopped);
    }
    assert!(begun.elapsed() < PATIENCE / 2, "the two took {:?}", begun.elapsed());
}

#[test]
fn locks_need_not_wait_for_a_start_that_is_under_way() {
    let database = Database::fresh().unwrap();
    for _ in 0..20 {
        let config = Config::from_url(&database.url()).unwrap().release_timeout(PATIENCE / 3);
        let manager = Arc::new(PostgresManager::new(config).unwrap());
        let lock = manager.lock("x").unwrap();
        let starting = Arc::clone(&manager);
        let start = begin(move || starting.start());
        // There is nothing to wait for before the manager knows of its start.
        while let Err(error) = lock.lock(&soon()) {
            assert_eq!(error.kind(), ErrorKind::SyncManagerStopped);
            assert!(error.to_string().contains("call start()"), "{error}");
            thread::yield_now();
        }
        start.get().unwrap();
        manager.stop().unwrap();
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Every pair of calls
// ---------------------------------------------------------------------------------------------------------------------

/// One of the two implementations.
trait World: Sync {
    fn manager(&self) -> Arc<dyn SyncManager>;

    /// As `dsync::init` does it; in memory there is no configuration to begin with.
    fn init(&self) -> Result<()>;

    /// How many locks are held or waited for.
    fn locks(&self) -> i64;
}

struct Memory(MemoryServer);

impl World for Memory {
    fn manager(&self) -> Arc<dyn SyncManager> {
        Arc::new(MemoryManager::on(&self.0))
    }

    fn init(&self) -> Result<()> {
        dsync::init_with(self.manager(), Some("billing"), None)
    }

    fn locks(&self) -> i64 {
        let rival = MemoryManager::on(&self.0);
        rival.start().unwrap();
        let keys = ["x", LEADERSHIP].map(|key| rival.lock(key).unwrap());
        keys.iter().map(|lock| i64::from(lock.try_lock(&soon()).is_err())).sum()
    }
}

struct Postgres {
    database: Database<'static>,
    operator: Mutex<::postgres::Client>,
}

impl World for Postgres {
    fn manager(&self) -> Arc<dyn SyncManager> {
        Arc::new(PostgresManager::new(self.config()).unwrap())
    }

    fn init(&self) -> Result<()> {
        dsync::init(self.config().service("billing"))
    }

    fn locks(&self) -> i64 {
        let query = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'
                     AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";
        self.operator.lock().query_one(query, &[]).unwrap().get(0)
    }
}

impl Postgres {
    fn config(&self) -> Config {
        // A lock that is forgotten stays longer than anybody waits for its end.
        let config = Config::from_url(&self.database.url()).unwrap();
        config.lease(3 * PATIENCE).release_timeout(PATIENCE / 3)
    }
}

const LEADERSHIP: &str = "service/billing/leadership";

/// What two threads have before them.
struct Stage<'a> {
    world: &'a dyn World,
    /// Taken by the thread that drops it.
    manager: Mutex<Option<Arc<dyn SyncManager>>>,
    lock: Arc<dyn Lock>,
    guard: Mutex<Option<LockGuard>>,
}

impl Stage<'_> {
    fn manager(&self) -> Option<Arc<dyn SyncManager>> {
        self.manager.lock().clone()
    }
}

/// A call, by its name.
type Call = (&'static str, fn(&Stage<'_>) -> Result<()>);

/// For a lock that the other thread, or a guard, may have.
fn briefly() -> Context {
    Context::timeout(Duration::from_millis(5))
}

const CALLS: [Call; 16] = [
    ("init", |stage| stage.world.init()),
    ("init_with", |stage| match stage.manager() {
        Some(manager) => dsync::init_with(manager, Some("billing"), None),
        None => Ok(()),
    }),
    ("shutdown", |_| dsync::shutdown()),
    ("lock_with_key", |_| dsync::lock_with_key("x", LockOptions::new()).map(drop)),
    ("leadership_lock", |_| dsync::leadership_lock()?.try_lock(&soon())),
    ("start", |stage| stage.manager().map_or(Ok(()), |manager| manager.start())),
    ("stop", |stage| stage.manager().map_or(Ok(()), |manager| manager.stop())),
    ("lock", |stage| stage.lock.lock(&briefly())),
    ("acquire", |stage| stage.lock.acquire(briefly()).map(drop)),
    ("try_acquire", |stage| stage.lock.try_acquire().map(drop)),
    ("try_lock", |stage| stage.lock.try_lock(&soon())),
    ("release", |stage| stage.lock.release()),
    ("wait", |stage| stage.lock.wait(&briefly())),
    ("dropping the manager", |stage| {
        let manager = stage.manager.lock().take();
        drop(manager);
        Ok(())
    }),
    ("dropping the guard", |stage| {
        let guard = stage.guard.lock().take();
        drop(guard);
        Ok(())
    }),
    ("inspecting", |stage| {
        let _ =
            (stage.lock.term(), stage.lock.last_loss(), format!("{:?} {:?}", stage.manager(), stage.lock));
        Ok(())
    }),
];

/// The threads of the library, that of the test's name aside.
fn our_threads() -> Vec<String> {
    let tasks = fs::read_dir("/proc/self/task").unwrap();
    let names = tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("comm")).ok());
    names.filter(|name| name.starts_with("dsync")).collect()
}

/// One of the two calls has what the other had not, so all outcomes are right but these: a confirmed server that fails, and
/// a wait that has no end.
fn may_be(outcome: &Result<()>) -> bool {
    use ErrorKind::{FailedInitialization, LockUnavailable, Released, SyncManagerStopped, TimedOut};
    let errors = [FailedInitialization, LockUnavailable, Released, SyncManagerStopped, TimedOut];
    outcome.as_ref().err().is_none_or(|error| errors.contains(&error.kind()))
}

fn play(world: &'static dyn World, rounds: usize) {
    // Nothing panics once there was an init.
    world.init().unwrap();
    dsync::shutdown().unwrap();
    for (index, first) in CALLS.iter().enumerate() {
        for second in &CALLS[index..] {
            for round in 0..rounds {
                play_once(world, round, [*first, *second]);
            }
        }
    }
    becomes("our threads", &Vec::new(), our_threads);
}

fn play_once(world: &'static dyn World, round: usize, calls: [Call; 2]) {
    let scene = format!("{} and {}, round {round}", calls[0].0, calls[1].0);
    // Before some nothing has begun; before others the manager runs, and the lock is held; and before others that manager is
    // the process-wide one.
    let manager = world.manager();
    let lock = manager.lock("x").unwrap();
    let mut guard = None;
    match round % 5 {
        0 => {}
        1 => manager.start().unwrap(),
        2 => {
            manager.start().unwrap();
            lock.lock(&soon()).unwrap();
        }
        3 => {
            manager.start().unwrap();
            guard = Some(lock.acquire(soon()).unwrap());
        }
        _ => {
            dsync::init_with(Arc::clone(&manager), Some("billing"), None).unwrap();
            guard = Some(lock.acquire(soon()).unwrap());
        }
    }
    let stage = Arc::new(Stage { world, manager: Mutex::new(Some(manager)), lock, guard: Mutex::new(guard) });
    let together = Arc::new(Barrier::new(2));
    let outcomes = calls.map(|(_, call)| {
        let (stage, together) = (Arc::clone(&stage), Arc::clone(&together));
        begin(move || {
            together.wait();
            // That it panics must not leave the other one waiting.
            catch_unwind(AssertUnwindSafe(|| call(&stage)))
        })
    });
    for (outcome, (name, _)) in outcomes.into_iter().zip(calls) {
        let outcome = outcome.get().unwrap_or_else(|_| panic!("{scene}: {name} panicked"));
        assert!(may_be(&outcome), "{scene}: {name} said {outcome:?}");
    }
    // The end of all, after which nothing is left.
    dsync::shutdown().unwrap_or_else(|error| panic!("{scene}: {error:?}"));
    if let Some(manager) = stage.manager() {
        manager.stop().unwrap_or_else(|error| panic!("{scene}: {error:?}"));
        assert_eq!(kind(stage.lock.lock(&soon())), ErrorKind::SyncManagerStopped, "{scene}");
    }
    assert!(stage.lock.term().is_none(), "{scene}: the term goes on");
    assert_eq!(kind(dsync::leadership_lock()), ErrorKind::SyncManagerStopped, "{scene}");
    // The server may be a moment later with the session of a start that was cut off.
    becomes(&format!("{scene}: the locks"), &0, || world.locks());
}

/// One test for both, since the manager of a process is one.
#[test]
fn every_pair_of_calls_can_run_at_once() {
    let begun = Instant::now();
    let memory: &'static Memory = Box::leak(Box::new(Memory(MemoryServer::new())));
    play(memory, 100);
    println!("in memory: {:?}", begun.elapsed());
    let database = Database::fresh().unwrap();
    let operator = Mutex::new(database.client().unwrap());
    let postgres: &'static Postgres = Box::leak(Box::new(Postgres { database, operator }));
    play(postgres, 5);
    println!("all: {:?}", begun.elapsed());
}
