//! A process that forks while it holds locks: the child is told, and disturbs nothing.

use std::io::Write;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::{Duration, Instant};

use dsync::{
    Config, Context, Error, ErrorKind, Leader, LockGuard, LockOptions, MultiGuard, MultiLock,
    PostgresManager, SyncManager, Term,
};
use fork::Fork;
use support::Database;

use crate::common::{self, Process, begin, hear, is_open, kind, lock, soon, started};

/// What the parent has when it forks.
struct Inherited {
    manager: PostgresManager,
    held: Arc<dyn dsync::Lock>,
    waiting: Arc<dyn dsync::Lock>,
    guard: LockGuard,
    leader: Leader,
    locks: MultiLock,
    set: MultiGuard,
    term: Term,
    url: String,
}

/// Not a test: the body of the processes that the others start.
#[test]
#[ignore = "the body of a process, which another test starts"]
fn scene() {
    let Some(role) = common::role() else { return };
    let url = std::env::var("DATABASE_URL").unwrap();
    let manager = started(Config::from_url(&url).unwrap());
    let [held, waiting] = ["held", "busy"].map(|key| lock(&manager, key));
    held.lock(&soon()).unwrap();
    assert_eq!(kind(waiting.try_lock(&soon())), ErrorKind::LockUnavailable);
    let guard = lock(&manager, "guarded").acquire(soon()).unwrap();
    let locks = manager.multi_lock(["one", "two"]).unwrap();
    let set = locks.acquire(soon()).unwrap();
    let (begun, begins) = crossbeam_channel::bounded(1);
    let leader = Leader::start(lock(&manager, "led"), move |tenure| {
        begun.send(tenure.clone()).unwrap();
        while !tenure.wait_timeout(common::PATIENCE) {}
    })
    .unwrap();
    let tenure = begins.recv_timeout(common::PATIENCE).unwrap();
    dsync::init(Config::from_url(&url).unwrap().service("billing")).unwrap();
    let leadership = dsync::leadership_lock().unwrap();
    leadership.lock(&soon()).unwrap();
    let losts = [held.lost(), guard.lost().clone(), set.lost().clone(), leadership.lost()];
    let term = held.term().unwrap();
    let inherited = Inherited { manager, held, waiting, guard, leader, locks, set, term, url };
    match fork::fork().unwrap() {
        Fork::Child => {
            child(&role, inherited);
            // No destructor of the harness runs, whose other threads are not here.
            std::process::exit(0);
        }
        Fork::Parent(_) => {
            println!("forked");
            // Until the other process has looked at everything.
            let mut line = String::new();
            std::io::stdin().read_line(&mut line).unwrap();
            assert!(losts.iter().all(is_open), "the child ended a term of the parent");
            assert!(inherited.term.is_held() && !tenure.must_stop() && inherited.leader.status().leads);
            inherited.leader.stop(common::PATIENCE).unwrap();
            inherited.guard.release().unwrap();
            inherited.set.release().unwrap();
            inherited.held.release().unwrap();
            inherited.waiting.release().unwrap();
            inherited.manager.stop().unwrap();
            dsync::shutdown().unwrap();
        }
    }
}

/// What the child does with what it inherited; it says "child: done" at the end.
fn child(role: &str, inherited: Inherited) {
    let begun = Instant::now();
    let Inherited { manager, held, waiting, guard, leader, locks, set, term, url } = inherited;
    let told = |what: &str, outcome: Result<(), Error>| {
        let error = outcome.expect_err(what);
        assert_eq!(error.kind(), ErrorKind::OtherProcess, "{what}: {error}");
        assert!(error.to_string().contains("after the fork"), "{what}: {error}");
    };
    match role {
        "calls" => {
            for lock in [&held, &waiting] {
                told("lock", lock.lock(&Context::background()));
                told("try_lock", lock.try_lock(&Context::background()));
                told("wait", lock.wait(&Context::background()));
                told("release", lock.release());
                told("acquire", lock.acquire(Context::background()).map(drop));
                told("try_acquire", lock.try_acquire().map(drop));
                assert!(lock.term().is_none() && lock.last_loss().is_none() && !is_open(&lock.lost()));
                told("holder", lock.holder().map(drop));
                told("request_resignation", lock.request_resignation().map(drop));
                told("break_lock", lock.break_lock().map(drop));
                let _ = format!("{lock:?}");
            }
            assert!(!leader.step_down() && !leader.status().stands);
            told("stop of a leader", leader.stop(Duration::ZERO));
            told("start of a leader", Leader::start(Arc::clone(&held), |_| {}).map(drop));
            let _ = format!("{leader:?}");
            told("lock_with_key", manager.lock("held").map(drop));
            told("lock_with_key", manager.lock("new").map(drop));
            told("start", manager.start());
            told("stop", manager.stop());
            told("inspect", manager.inspect("held").map(drop));
            told("inspect_all", manager.inspect_all().map(drop));
            assert!(manager.check().lines[0].text.contains("made in another process"));
            let _ = format!("{manager:?}");
            assert!(!term.is_held() && !guard.term().is_held());
            let mut client = postgres::Client::connect(&url, postgres::NoTls).unwrap();
            told("is_current", term.is_current(&mut client).map(drop));
            told("fence", term.fence(&mut client.transaction().unwrap()));
            told("release of a guard", guard.release());
            told("acquire of a set", locks.acquire(soon()).map(drop));
            told("try_acquire of a set", locks.try_acquire().map(drop));
            assert!(!set.is_held() && set.loss().is_none());
            told("release of a set", set.release());
            std::mem::forget(manager);
        }
        "the process-wide instance" => {
            told("lock_with_key", dsync::lock_with_key("held", LockOptions::new()).map(drop));
            told("leadership_lock", dsync::leadership_lock().map(drop));
            dsync::shutdown().unwrap();
            dsync::init(Config::from_url(&url).unwrap()).unwrap();
            let own = dsync::lock_with_key("held", LockOptions::new()).unwrap();
            assert_eq!(kind(own.try_lock(&soon())), ErrorKind::LockUnavailable);
            dsync::shutdown().unwrap();
            drop((leader, guard, set, locks, held, waiting, term, manager));
        }
        "drops" => drop((leader, guard, set, locks, held, waiting, term, manager)),
        "its own manager" => {
            let own = started(Config::from_url(&url).unwrap());
            assert_eq!(kind(lock(&own, "held").try_lock(&soon())), ErrorKind::LockUnavailable);
            let another = lock(&own, "another");
            another.lock(&soon()).unwrap();
            another.release().unwrap();
            own.stop().unwrap();
            drop((leader, guard, set, locks, held, waiting, term, manager));
        }
        other => panic!("there is no role {other:?}"),
    }
    assert!(begun.elapsed() < Duration::from_secs(5), "at once: {:?}", begun.elapsed());
    println!("child: done");
    std::io::stdout().flush().unwrap();
}

fn play(role: &str) {
    let database = Database::fresh().unwrap();
    let rival = started(Config::from_url(&database.url()).unwrap());
    let busy = lock(&rival, "busy");
    busy.lock(&soon()).unwrap();
    let mut command = common::process("forking::scene", role);
    command.env("DATABASE_URL", database.url()).stdin(Stdio::piped());
    let mut process = Process::start(&mut command);
    process.says("child: done");
    for key in ["held", "guarded", "led", "one", "two"] {
        let lock = lock(&rival, key);
        assert_eq!(kind(lock.try_lock(&soon())), ErrorKind::LockUnavailable, "{key} is the parent's still");
        lock.release().unwrap();
    }
    process.go_on();
    process.succeeds();
    for key in ["held", "guarded", "led", "one", "two"] {
        lock(&rival, key).lock(&soon()).unwrap();
    }
}

#[test]
fn every_call_in_a_forked_child_is_refused_and_the_parent_keeps_its_locks() {
    play("calls");
}

#[test]
fn every_drop_in_a_forked_child_leaves_the_parents_sessions_alone() {
    play("drops");
}

#[test]
fn the_process_wide_instance_is_the_parents_until_a_forked_child_makes_its_own() {
    play("the process-wide instance");
}

#[test]
fn a_forked_child_may_have_a_manager_of_its_own() {
    play("its own manager");
}

/// Not a test: the body of a process that is forked while a session of it waits for the password.
#[test]
#[ignore = "the body of a process, which another test starts"]
fn scene_of_a_hook() {
    if common::role().is_none() {
        return;
    }
    let url = std::env::var("DATABASE_URL").unwrap();
    let (parent, hangs) = (std::process::id(), Arc::new(AtomicBool::new(false)));
    let (entered, enters) = crossbeam_channel::bounded(1);
    let (goes_on, gate) = crossbeam_channel::bounded(1);
    let does_hang = Arc::clone(&hangs);
    let config = Config::from_url(&url).unwrap().password_with(move || {
        if std::process::id() == parent && does_hang.load(SeqCst) {
            entered.send(())?;
            gate.recv()?;
        }
        Ok("unused".to_owned())
    });
    let manager = started(config.clone());
    let held = lock(&manager, "held");
    held.lock(&soon()).unwrap();
    let lost = held.lost();
    hangs.store(true, SeqCst);
    let other = lock(&manager, "other");
    let attempt = begin(move || other.lock(&soon()));
    enters.recv_timeout(common::PATIENCE).unwrap();
    match fork::fork().unwrap() {
        Fork::Child => {
            let own = started(config);
            let another = lock(&own, "another");
            another.lock(&soon()).unwrap();
            another.release().unwrap();
            own.stop().unwrap();
            println!("child: done");
            std::process::exit(0);
        }
        Fork::Parent(_) => {
            let mut line = String::new();
            std::io::stdin().read_line(&mut line).unwrap();
            hangs.store(false, SeqCst);
            goes_on.send(()).unwrap();
            attempt.get().unwrap();
            assert!(is_open(&lost));
        }
    }
}

#[test]
fn a_forked_child_asks_the_hook_for_the_password_though_its_parent_is_in_it() {
    let database = Database::fresh().unwrap();
    let mut command = common::process("forking::scene_of_a_hook", "forks");
    command.env("DATABASE_URL", database.url()).stdin(Stdio::piped());
    let mut process = Process::start(&mut command);
    process.says("child: done");
    process.go_on();
    process.succeeds();
}

/// What a pooler does that resets a session, or a child that speaks on the parent's socket.
#[test]
fn a_lock_that_something_else_unlocked_in_its_session_is_lost_with_the_next_heartbeat() {
    let database = Database::fresh().unwrap();
    for catalog in [dsync::CatalogMode::Automatic, dsync::CatalogMode::None] {
        let proxy = common::flood::Proxy::start(database.server().port());
        let url = database.url_at("127.0.0.1", proxy.port()) + "?sslmode=disable";
        // That heartbeats come often is what is wanted, not that they are due soon.
        let config = Config::from_url(&url).unwrap().heartbeat(Duration::from_millis(500)).catalog(catalog);
        let manager = started(config.release_timeout(Duration::from_secs(20)));
        for key in [dsync::Key::from("name"), dsync::Key::from(-7), dsync::Key::from((-1, 2))] {
            let lock = manager.lock(key.clone()).unwrap();
            lock.lock(&soon()).unwrap();
            let lost = lock.lost();
            proxy.inject("SELECT pg_advisory_unlock_all()");
            hear(&lost);
            assert_eq!(lock.last_loss().unwrap().reason, dsync::LossReason::Unlocked, "{key}");
            lock.release().unwrap();
        }
    }
}
