//! The process-wide manager, each time in a process of its own: before `init`, between the two, and after `shutdown`; made
//! from code or from the environment; and processes that stand for the leadership of one service.

use std::net::TcpListener;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use dsync::{
    CatalogMode, Config, Context, Error, ErrorKind, Key, Lock, LockOptions, MemoryManager, SyncManager,
};
use postgres::Client;
use serde_json::Value;
use support::{Database, process};

use crate::common::{self, Process, becomes, begin, eventually, hear, is_held, kind, lock, soon, started};

const LEADERSHIP: &str = "service/billing/leadership";

/// A process that does what `scenario` says, on this database.
fn scenario(name: &str, database: &Database<'_>) -> Command {
    let mut command = common::process("instance::scene", name);
    command.env("DATABASE_URL", database.url());
    command
}

fn play(name: &str) {
    let database = Database::fresh().unwrap();
    Process::start(&mut scenario(name, &database)).succeeds();
}

/// Not a test: the body of the processes that the others start. It plays the scene that it is told.
#[test]
#[ignore = "the body of a process, which another test starts"]
fn scene() {
    let Some(role) = common::role() else { return };
    if role == "a logger that shuts down" {
        return scenes::shutdown_by_logger();
    }
    env_logger::Builder::new().filter_level(log::LevelFilter::Info).init();
    match &*role {
        "before init" => scenes::before_init(),
        "the life of an instance" => scenes::life(),
        "an init that fails" => scenes::failed_init(),
        "stepping down" => scenes::stepping_down(),
        "standing again" => scenes::standing_again(),
        "a shutdown during init" => scenes::shutdown_during_init(),
        "a shutdown during the start of a stubborn manager" => scenes::stubborn_manager(),
        "a manager that panics" => scenes::panicking_manager(),
        "calls during init" => scenes::calls_during_init(),
        "two shutdowns" => scenes::two_shutdowns(),
        "in memory" => scenes::in_memory(),
        "lead" => scenes::lead(),
        other => panic!("there is no scene {other:?}"),
    }
}

/// What happens in those processes. `DATABASE_URL` is set.
mod scenes {
    use super::*;

    /// The text of the panic that `call` ends in.
    fn panic_of<T>(call: impl FnOnce() -> T + std::panic::UnwindSafe) -> String {
        let payload = catch_unwind(call).err().expect("it panics");
        payload.downcast_ref::<String>().expect("a text").clone()
    }

    fn assert_not_initialised() {
        let text = panic_of(|| dsync::lock_with_key("x", LockOptions::new()));
        let advice =
            "was called before dsync::init(); call that first, or dsync::instance(), which gives an error";
        assert_eq!(text, format!("dsync::lock_with_key() {advice}"));
        let text = panic_of(dsync::leadership_lock);
        assert_eq!(text, format!("dsync::leadership_lock() {advice}"));
        let error = dsync::instance().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::SyncManagerStopped);
        assert!(error.to_string().contains("never called"), "{error}");
    }

    /// An `init` that failed is no reason to panic.
    fn assert_failed() {
        let error = dsync::lock_with_key("x", LockOptions::new()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::SyncManagerStopped);
        assert!(error.to_string().contains("init() failed"), "{error}");
        assert_eq!(kind(dsync::leadership_lock()), ErrorKind::SyncManagerStopped);
        dsync::shutdown().expect("there is nothing to shut down");
    }

    pub(super) fn before_init() {
        assert_not_initialised();
        dsync::shutdown().expect("there is nothing to shut down");
        assert_not_initialised();
        dsync::init(Config::from_env().unwrap()).unwrap();
        dsync::lock_with_key("x", LockOptions::new()).unwrap().lock(&soon()).unwrap();
    }

    pub(super) fn life() {
        let config = || Config::from_env().unwrap();
        dsync::init(config()).unwrap();
        let held = dsync::lock_with_key("x", LockOptions::new()).unwrap();
        held.lock(&soon()).unwrap();
        let lost = held.lost();
        let again = dsync::lock_with_key("x", LockOptions::new()).unwrap();
        assert!(Arc::ptr_eq(&held, &again), "one handle for a key");

        let error = dsync::leadership_lock().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidConfig);
        assert!(error.to_string().contains("DSYNC_SERVICE"), "{error}");
        let error = dsync::init(config()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::FailedInitialization);
        assert!(error.to_string().contains("exists already"), "{error}");
        assert!(is_held(&held), "the second init has done nothing");

        dsync::shutdown().unwrap();
        hear(&lost);
        assert_eq!(kind(held.lock(&soon())), ErrorKind::SyncManagerStopped);
        assert_eq!(kind(dsync::lock_with_key("x", LockOptions::new())), ErrorKind::SyncManagerStopped);
        assert_eq!(kind(dsync::leadership_lock()), ErrorKind::SyncManagerStopped);
        dsync::shutdown().expect("once more does nothing");
        assert_eq!(kind(dsync::lock_with_key("x", LockOptions::new())), ErrorKind::SyncManagerStopped);

        dsync::init(config()).expect("a new life");
        let new = dsync::lock_with_key("x", LockOptions::new()).unwrap();
        new.try_lock(&soon()).expect("the shutdown has released it");
        assert_eq!(kind(held.lock(&soon())), ErrorKind::SyncManagerStopped, "the old handle stays dead");
        dsync::shutdown().unwrap();
    }

    pub(super) fn failed_init() {
        let config = || Config::from_env().unwrap();
        let url = std::env::var("DATABASE_URL").unwrap();
        let nowhere = Config::from_url(&format!("{url}_nowhere")).unwrap();
        let error = dsync::init(nowhere).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::FailedInitialization);
        assert_eq!(error.sqlstate(), Some("3D000"), "{error}");
        assert_failed();
        assert_eq!(kind(dsync::init(config().max_sessions(0))), ErrorKind::InvalidConfig);
        assert_failed();
        let too_long = "s".repeat(2_000);
        assert_eq!(kind(dsync::init(config().service(too_long.clone()))), ErrorKind::InvalidConfig);
        assert_failed();
        let manager = Arc::new(dsync::PostgresManager::new(config()).unwrap());
        assert_eq!(kind(dsync::init_with(manager, Some(&too_long), None)), ErrorKind::InvalidKey);
        assert_failed();
        dsync::init(config().service("billing")).unwrap();
        let leadership = dsync::leadership_lock().unwrap();
        leadership.lock(&soon()).unwrap();
        let leader = leadership.holder().unwrap().expect("this process leads");
        let annotation: Value = serde_json::from_slice(&leader.annotation.unwrap()).unwrap();
        assert_eq!(annotation["pid"], std::process::id(), "who leads can be asked of the instance");
        dsync::shutdown().unwrap();
    }

    pub(super) fn stepping_down() {
        dsync::init(Config::from_env().unwrap().service("billing")).unwrap();
        let leadership = dsync::leadership_lock().unwrap();
        // Until the other side has heard in the log that this process leads.
        std::io::stdin().read_line(&mut String::new()).unwrap();
        for _ in 0..3 {
            leadership.lock(&soon()).unwrap();
            leadership.release().unwrap();
            println!("stepped down");
            // Another one can come and go, again and again.
            let rival = started(Config::from_env().unwrap());
            let lock = lock(&rival, LEADERSHIP);
            for _ in 0..20 {
                lock.try_lock(&soon()).expect("nobody else stands for election");
                lock.release().unwrap();
            }
        }
        dsync::shutdown().unwrap();
    }

    /// Once more for each line that the other side sends: leads, and steps down.
    pub(super) fn standing_again() {
        let config = Config::from_env().unwrap().catalog(CatalogMode::None);
        let managers: [Arc<dyn SyncManager>; 2] =
            [Arc::new(MemoryManager::new()), Arc::new(dsync::PostgresManager::new(config).unwrap())];
        for manager in managers {
            dsync::init_with(manager, Some("billing"), None).unwrap();
            let leadership = dsync::leadership_lock().unwrap();
            for round in 0..3 {
                if round % 2 == 0 {
                    leadership.lock(&soon()).unwrap();
                } else {
                    leadership.try_lock(&soon()).unwrap();
                }
                std::io::stdin().read_line(&mut String::new()).unwrap();
                leadership.release().unwrap();
                std::io::stdin().read_line(&mut String::new()).unwrap();
            }
            dsync::shutdown().unwrap();
        }
    }

    /// The library's threads. What is new may not have its name yet, and what has ended may still be listed.
    fn our_threads() -> Vec<String> {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap();
        let names = tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok());
        names.filter(|name| name.starts_with("dsync")).collect()
    }

    pub(super) fn shutdown_during_init() {
        for round in 0..5 {
            // A server that takes connections and says nothing.
            let server = TcpListener::bind("127.0.0.1:0").unwrap();
            let url = format!("postgres://nobody@127.0.0.1:{}/d", server.local_addr().unwrap().port());
            let config = Config::from_url(&url).unwrap().connect_timeout(common::PATIENCE * 2);
            let init = begin(move || dsync::init(config.service("billing")));
            let _connection = server.accept().unwrap();
            let begun = Instant::now();
            // As a handler of signals does, and another one.
            let other = begin(dsync::shutdown);
            dsync::shutdown().unwrap();
            other.get().unwrap();
            assert_eq!(kind(init.get()), ErrorKind::SyncManagerStopped);
            assert!(begun.elapsed() < common::PATIENCE / 2, "{:?}", begun.elapsed());
            assert_eq!(kind(dsync::leadership_lock()), ErrorKind::SyncManagerStopped, "round {round}");
            assert_eq!(kind(dsync::lock_with_key("x", LockOptions::new())), ErrorKind::SyncManagerStopped);
            becomes("our threads", &Vec::new(), our_threads);
        }
        dsync::init(Config::from_env().unwrap()).expect("a new life");
        dsync::shutdown().unwrap();
    }

    /// By the one it says that it is there, and on the other it waits to be told to go on.
    type Pause = (Sender<()>, Receiver<()>);

    /// An application's manager: it stands still where it is told to.
    #[derive(Debug)]
    struct Scripted {
        starting: Option<Pause>,
        stopping: Option<Pause>,
        stops: AtomicUsize,
        outcome: Result<(), Error>,
    }

    impl Scripted {
        fn new() -> Self {
            Self { starting: None, stopping: None, stops: AtomicUsize::new(0), outcome: Ok(()) }
        }
    }

    /// The two ends that a manager has, and those of the test.
    fn script() -> (Pause, (Receiver<()>, Sender<()>)) {
        let ((here, is_there), (go_on, may_go)) = (bounded(1), bounded(1));
        ((here, may_go), (is_there, go_on))
    }

    fn stand_still(pause: Option<&Pause>) {
        if let Some((here, may_go)) = pause {
            here.send(()).unwrap();
            may_go.recv().unwrap();
        }
    }

    impl SyncManager for Scripted {
        fn start(&self) -> dsync::Result<()> {
            stand_still(self.starting.as_ref());
            Ok(())
        }

        fn stop(&self) -> dsync::Result<()> {
            self.stops.fetch_add(1, Ordering::SeqCst);
            stand_still(self.stopping.as_ref());
            self.outcome.clone()
        }

        fn lock_with_key(&self, _: Key, _: LockOptions) -> dsync::Result<Arc<dyn Lock>> {
            panic!("there are no locks in this play")
        }
    }

    pub(super) fn stubborn_manager() {
        let (starting, (is_there, go_on)) = script();
        let manager = Arc::new(Scripted { starting: Some(starting), ..Scripted::new() });
        let own = Arc::clone(&manager);
        let init = begin(move || dsync::init_with(own, None, None));
        is_there.recv().unwrap();
        let shutdown = begin(dsync::shutdown);
        eventually("the stop", || manager.stops.load(Ordering::SeqCst) == 1);
        assert!(!shutdown.is_ready(), "init is at work still");
        go_on.send(()).unwrap();
        assert_eq!(kind(init.get()), ErrorKind::SyncManagerStopped);
        shutdown.get().unwrap();
        assert_eq!(manager.stops.load(Ordering::SeqCst), 2, "what started after all is stopped");
    }

    pub(super) fn panicking_manager() {
        #[derive(Debug)]
        struct Panics;
        impl SyncManager for Panics {
            fn start(&self) -> dsync::Result<()> {
                panic!("on purpose")
            }
            fn stop(&self) -> dsync::Result<()> {
                Ok(())
            }
            fn lock_with_key(&self, _: Key, _: LockOptions) -> dsync::Result<Arc<dyn Lock>> {
                panic!("it never started")
            }
        }
        // The one panics when it starts, the other when the leadership's lock is wanted.
        assert!(catch_unwind(|| dsync::init_with(Arc::new(Panics), None, None)).is_err());
        assert_failed();
        let scripted = Arc::new(Scripted::new());
        let manager = Arc::clone(&scripted);
        assert!(catch_unwind(AssertUnwindSafe(move || dsync::init_with(manager, Some("x"), None))).is_err());
        assert_failed();
        assert_eq!(scripted.stops.load(Ordering::SeqCst), 1, "what had started is stopped");
        dsync::init_with(Arc::new(MemoryManager::new()), Some("x"), None).unwrap();
        dsync::leadership_lock().unwrap().lock(&soon()).unwrap();
        dsync::shutdown().unwrap();
    }

    pub(super) fn calls_during_init() {
        for round in 0..2 {
            let (starting, (is_there, go_on)) = script();
            let manager = Arc::new(Scripted { starting: Some(starting), ..Scripted::new() });
            let init = begin(move || dsync::init_with(manager, None, None));
            is_there.recv().unwrap();
            let error = dsync::lock_with_key("x", LockOptions::new()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::SyncManagerStopped, "round {round}");
            assert!(error.to_string().contains("init() is still at work"), "{error}");
            assert_eq!(kind(dsync::leadership_lock()), ErrorKind::SyncManagerStopped);
            let other = dsync::init_with(Arc::new(MemoryManager::new()), None, None);
            assert_eq!(kind(other), ErrorKind::FailedInitialization);
            go_on.send(()).unwrap();
            init.get().unwrap();
            dsync::shutdown().unwrap();
        }
    }

    pub(super) fn two_shutdowns() {
        let (stopping, (is_there, go_on)) = script();
        let outcome = MemoryManager::new().lock("").map(drop);
        let manager = Arc::new(Scripted { stopping: Some(stopping), outcome, ..Scripted::new() });
        dsync::init_with(manager, None, None).unwrap();
        let first = begin(dsync::shutdown);
        is_there.recv().unwrap();
        let others = [(); 3].map(|()| begin(dsync::shutdown));
        assert_eq!(kind(dsync::lock_with_key("x", LockOptions::new())), ErrorKind::SyncManagerStopped);
        let init = dsync::init_with(Arc::new(MemoryManager::new()), None, None);
        assert_eq!(kind(init), ErrorKind::FailedInitialization, "the former one is not gone yet");
        // Nothing tells that they wait.
        thread::sleep(Duration::from_millis(100));
        assert!(!first.is_ready() && others.iter().all(|other| !other.is_ready()));
        go_on.send(()).unwrap();
        assert_eq!(kind(first.get()), ErrorKind::InvalidKey);
        for other in others {
            assert_eq!(kind(other.get()), ErrorKind::InvalidKey, "the outcome is the same for all");
        }
        dsync::shutdown().expect("that is long over");
    }

    /// The thread that logs the leadership is the one that shuts down, and so cannot wait for itself.
    pub(super) fn shutdown_by_logger() {
        struct ShutsDown(Sender<dsync::Result<()>>);
        impl log::Log for ShutsDown {
            fn enabled(&self, _: &log::Metadata<'_>) -> bool {
                true
            }
            fn log(&self, record: &log::Record<'_>) {
                if record.args().to_string() == r#"this process leads service "billing""# {
                    let _ = self.0.send(dsync::shutdown());
                }
            }
            fn flush(&self) {}
        }
        let (outcome, outcomes) = bounded(1);
        log::set_boxed_logger(Box::new(ShutsDown(outcome))).unwrap();
        log::set_max_level(log::LevelFilter::Info);
        for config in [Some(Config::from_env().unwrap()), None] {
            // It may be told before it has returned.
            let init = match config {
                Some(config) => dsync::init(config.service("billing")),
                None => dsync::init_with(Arc::new(MemoryManager::new()), Some("billing"), None),
            };
            assert!(init.is_ok() || kind(init) == ErrorKind::SyncManagerStopped);
            outcomes.recv_timeout(common::PATIENCE).expect("a shutdown that ends").unwrap();
            assert_eq!(kind(dsync::leadership_lock()), ErrorKind::SyncManagerStopped);
            becomes("our threads", &Vec::new(), our_threads);
        }
    }

    pub(super) fn in_memory() {
        let manager = Arc::new(MemoryManager::new());
        dsync::init_with(manager, Some("billing"), Some("1.0")).unwrap();
        let leadership = dsync::leadership_lock().unwrap();
        assert_eq!(leadership.key(), LEADERSHIP);
        leadership.lock(&soon()).unwrap();
        dsync::lock_with_key(42, LockOptions::new()).unwrap().lock(&soon()).unwrap();
        dsync::shutdown().unwrap();
        assert!(!is_held(&leadership));
    }

    /// Stands for election until it is killed. The log tells of it, and nothing else has to be called.
    pub(super) fn lead() {
        dsync::init(Config::from_env().unwrap()).unwrap();
        println!("stands for election");
        // Nobody cancels it.
        let _ = Context::background().cancelled().recv();
    }
}

#[test]
fn before_init_everything_panics_with_advice() {
    play("before init");
}

#[test]
fn an_instance_lives_from_init_to_shutdown_and_may_live_again() {
    play("the life of an instance");
}

#[test]
fn an_init_that_fails_leaves_nothing_behind_and_may_be_repeated() {
    play("an init that fails");
}

#[test]
fn a_leader_that_steps_down_does_not_stand_again_by_itself() {
    let database = Database::fresh().unwrap();
    let mut process = Process::start(scenario("stepping down", &database).stdin(Stdio::piped()));
    process.says(GAIN);
    process.go_on();
    process.says("does not stand for the leadership of \"billing\" any more");
    process.succeeds();
}

#[test]
fn a_leader_that_stands_again_is_logged_again() {
    let database = Database::fresh().unwrap();
    let mut process = Process::start(scenario("standing again", &database).stdin(Stdio::piped()));
    for _ in 0..6 {
        process.says(GAIN);
        process.go_on();
        process.says(LOSS);
        process.says("does not stand for the leadership of \"billing\" any more");
        process.go_on();
    }
    process.succeeds();
}

#[test]
fn a_shutdown_ends_an_init_and_nothing_runs_afterwards() {
    play("a shutdown during init");
    play("a shutdown during the start of a stubborn manager");
}

#[test]
fn a_manager_that_panics_leaves_room_for_another() {
    play("a manager that panics");
}

#[test]
fn calls_during_an_init_are_told_so() {
    play("calls during init");
}

#[test]
fn all_shutdowns_wait_for_the_first_and_have_its_outcome() {
    play("two shutdowns");
}

#[test]
fn a_logger_may_shut_down_what_it_hears_of() {
    play("a logger that shuts down");
}

#[test]
fn any_manager_can_be_the_instance() {
    play("in memory");
}

// ---------------------------------------------------------------------------------------------------------------------
// Leadership
// ---------------------------------------------------------------------------------------------------------------------

/// A process of the service `billing`.
fn candidate(database: &Database<'_>) -> Process {
    let mut command = scenario("lead", database);
    Process::start(command.env("DSYNC_SERVICE", "billing").env("DSYNC_BUILD", "1.2.3"))
}

const GAIN: &str = r#"INFO  dsync::leadership] this process leads service "billing""#;
const LOSS: &str = r#"INFO  dsync::leadership] this process leads service "billing" no longer"#;

/// The backend that holds the leadership, and what the catalog says of the leader.
fn leader(operator: &mut Client) -> Option<(i32, Value)> {
    let query = "SELECT pid, annotation FROM dsync.locks WHERE namespace = 'dsync' AND key = $1";
    let rows = operator.query(query, &[&LEADERSHIP]).unwrap();
    assert!(rows.len() <= 1, "there is one leader");
    let row = rows.first()?;
    Some((row.get(0), serde_json::from_slice(row.get(1)).unwrap()))
}

/// The process that leads, by what the catalog says.
fn leading_process(operator: &mut Client) -> Option<i64> {
    leader(operator)?.1["pid"].as_i64()
}

#[test]
fn the_leader_is_annotated_with_where_and_what_it_is() {
    let database = Database::fresh().unwrap();
    let process = candidate(&database);
    process.says(GAIN);
    let (backend, annotation) = leader(&mut database.client().unwrap()).expect("a leader");
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    let expected = serde_json::json!({
        "service": "billing", "host": host.trim(), "pid": process.id(), "build": "1.2.3"
    });
    assert_eq!(annotation, expected);
    let query = "SELECT namespace, token > 0, pid FROM dsync.lock WHERE key = $1";
    let row = database.client().unwrap().query_one(query, &[&LEADERSHIP]).unwrap();
    assert_eq!((row.get("namespace"), row.get(1), row.get("pid")), ("dsync", true, backend));
}

#[test]
fn when_the_leader_is_killed_another_process_leads() {
    let database = Database::fresh().unwrap();
    let mut operator = database.client().unwrap();
    let mut leader = candidate(&database);
    leader.says(GAIN);
    for _ in 0..3 {
        let next = candidate(&database);
        next.says("stands for election");
        assert_eq!(leading_process(&mut operator), Some(leader.id().into()));
        std::mem::replace(&mut leader, next).kill();
        leader.says(GAIN);
        assert_eq!(leading_process(&mut operator), Some(leader.id().into()));
    }
}

#[test]
fn a_leader_that_loses_its_session_says_so_and_leads_again() {
    let database = Database::fresh().unwrap();
    let mut operator = database.client().unwrap();
    let process = candidate(&database);
    process.says(GAIN);
    for _ in 0..3 {
        let (backend, _) = leader(&mut operator).expect("a leader");
        assert!(database.server().terminate(backend).unwrap());
        process.says(LOSS);
        process.says(GAIN);
        becomes("the leader", &Some(process.id().into()), || leading_process(&mut operator));
    }
}

#[test]
fn a_leader_that_is_frozen_is_replaced_and_knows_it_when_it_has_thawed() {
    let database = Database::fresh().unwrap();
    let mut operator = database.client().unwrap();
    let short = |mut command: Command| {
        Process::start(command.env("DSYNC_SERVICE", "billing").env("DSYNC_LEASE", "2s"))
    };
    let first = short(scenario("lead", &database));
    first.says(GAIN);
    let second = short(scenario("lead", &database));
    second.says("stands for election");
    process::signal(first.id(), process::Signal::Stop).unwrap();
    second.says(GAIN);
    assert_eq!(leading_process(&mut operator), Some(second.id().into()));
    process::signal(first.id(), process::Signal::Continue).unwrap();
    first.says(LOSS);
    second.kill();
    first.says(GAIN);
    eventually("the first again", || leading_process(&mut operator) == Some(first.id().into()));
}

// ---------------------------------------------------------------------------------------------------------------------
// The environment
// ---------------------------------------------------------------------------------------------------------------------

#[test]
fn the_variables_of_libpq_are_enough() {
    let database = Database::fresh().unwrap();
    let server = database.server();
    let (port, folder) = (server.port().to_string(), server.socket_dir());
    for host in ["127.0.0.1", folder.to_str().unwrap()] {
        let mut command = scenario("lead", &database);
        command.env_remove("DATABASE_URL");
        command
            .env("PGHOST", host)
            .env("PGPORT", &port)
            .env("PGUSER", "postgres")
            .env("PGDATABASE", database.name());
        command
            .env("PGAPPNAME", "ledger")
            .env("DSYNC_SERVICE", "billing")
            .env("DSYNC_NAMESPACE", "elsewhere");
        let process = Process::start(&mut command);
        process.says(GAIN);
        let query = "SELECT namespace, application_name, role FROM dsync.locks WHERE key = $1";
        let row = database.client().unwrap().query_one(query, &[&LEADERSHIP]).unwrap();
        assert_eq!(row.get::<_, &str>("namespace"), "elsewhere");
        assert_eq!(row.get::<_, &str>("application_name"), format!("ledger {LEADERSHIP}"));
        assert_eq!(row.get::<_, &str>("role"), "postgres");
        process.kill();
    }
}
