//! A thread that watches a lock is kept busy: by a server that floods it with messages, or by a logger that blocks. The
//! holder hears of its loss in time all the same, and no peer decides how much memory this process uses.

#![allow(
    clippy::unwrap_used,
    reason = "all of this is test code, in which a panic is the report of a failure"
)]

mod common;

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::{Duration, Instant};

use common::flood::{Flood, Proxy};
use common::{Lateness, Process, eventually, hear, is_open, lock, soon, started};
use dsync::{CatalogMode, Config, Context, ErrorKind, Lost, PostgresManager, SyncManager};
use support::process::Signal;
use support::{Database, Server, process};

const LEASE: Duration = Duration::from_secs(2);

/// More than a session may take, and far less than a peer can send in the time.
const ROOM: u64 = 48 << 20;

/// Fails if a holder has not heard of its loss when another has the lock. From the end of its term on it has a heartbeat and a margin for that;
/// a thread that a busy machine lets run later than that is no fault.
#[track_caller]
fn has_heard(lost: &Lost, late: &Lateness, what: &str) {
    if is_open(lost) {
        let late = late.of_a_loss();
        assert!(
            late > LEASE / 4 + LEASE / 15,
            "{what}: two believe that they have the lock; {late:.0?} late"
        );
    }
}

fn memory() -> u64 {
    process::resident_bytes(process::own()).unwrap_or(0)
}

#[test]
fn a_holder_that_is_flooded_hears_of_its_loss_before_another_has_the_lock() {
    let database = Database::fresh().unwrap();
    let rival = started(Config::from_url(&database.url()).unwrap().lease(LEASE));
    for flood in Flood::ALL {
        let proxy = Proxy::start(database.server().port());
        let url = database.url_at("127.0.0.1", proxy.port()) + "?sslmode=disable";
        let manager = started(Config::from_url(&url).unwrap().lease(LEASE));
        let (held, wanted) = (lock(&manager, "k"), lock(&rival, "k"));
        held.lock(&soon()).unwrap();
        let (term, lost) = (held.term().unwrap(), held.lost());
        // Queues.
        assert!(wanted.try_lock(&soon()).is_err());
        let before = memory();
        let late = Lateness::watch();
        proxy.flood(Some(flood));
        wanted.lock(&soon()).unwrap();
        has_heard(&lost, &late, &format!("{flood:?}"));
        assert!(!term.is_held());
        hear(&lost);
        let grown = memory().saturating_sub(before);
        assert!(grown < ROOM, "{flood:?}: {grown} bytes more");
        // A connect is flooded, too.
        let begun = Instant::now();
        let _ = held.release();
        let other = PostgresManager::new(Config::from_url(&url).unwrap()).unwrap();
        let _ = other.start();
        let _ = other.inspect("k");
        other.stop().unwrap();
        let bound = Duration::from_secs(2 + 5 + 5 + 4 + 1);
        assert!(begun.elapsed() < bound, "{flood:?}: {:?}", begun.elapsed());
        let grown = memory().saturating_sub(before);
        assert!(grown < ROOM, "{flood:?} at the connect: {grown} bytes more");
        proxy.flood(None);
        // Where several floods fill a small machine the server may not confirm it in time. The lock comes back all the same.
        let _ = wanted.release();
        held.lock(&soon()).unwrap();
        if let Err(error) = manager.stop() {
            assert_eq!(error.kind(), ErrorKind::UnlockFailed, "{flood:?}: {error}");
        }
    }
}

static BLOCKED: AtomicBool = AtomicBool::new(false);

/// Blocks the threads of locks, as a pipe does that nobody reads.
struct Blocking;

impl log::Log for Blocking {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        let of_locks = |name: &str| name.starts_with("dsync:") || name == "dsync-carrier";
        let of_a_lock = std::thread::current().name().is_some_and(of_locks);
        let text = record.args().to_string();
        while of_a_lock && BLOCKED.load(SeqCst) && !text.is_empty() {
            std::thread::park_timeout(Duration::from_millis(5));
        }
    }

    fn flush(&self) {}
}

/// Not a test: a process whose logger blocks.
#[test]
#[ignore = "the body of a process, which another test starts"]
fn scene() {
    if common::role().is_none() {
        return;
    }
    log::set_logger(&Blocking).unwrap();
    log::set_max_level(log::LevelFilter::Trace);
    let config = Config::from_env().unwrap().lease(LEASE).catalog(CatalogMode::None);
    let (manager, rival) = (started(config.clone()), started(config));
    let (held, wanted) = (
        manager.lock_with(7, dsync::LockOptions::new()).unwrap(),
        rival.lock_with(7, dsync::LockOptions::new()).unwrap(),
    );
    held.lock(&soon()).unwrap();
    let lost = held.lost();
    // On a connection of its own, since the threads of locks stand still.
    let mut client =
        postgres::Client::connect(&std::env::var("DATABASE_URL").unwrap(), postgres::NoTls).unwrap();
    let late = Lateness::watch();
    BLOCKED.store(true, SeqCst);
    client.execute("SELECT pg_advisory_lock(7)", &[]).unwrap();
    has_heard(&lost, &late, "a logger that blocks");
    hear(&lost);
    let (late, begun) = (Lateness::watch(), Instant::now());
    let _ = held.release();
    late.allow(begun.elapsed(), Duration::from_secs(3));
    BLOCKED.store(false, SeqCst);
    client.execute("SELECT pg_advisory_unlock(7)", &[]).unwrap();
    wanted.lock(&Context::timeout(Duration::from_secs(30))).unwrap();
}

#[test]
fn a_holder_whose_logger_blocks_hears_of_its_loss_before_another_has_the_lock() {
    let database = Database::fresh().unwrap();
    let mut command = common::process("scene", "a logger that blocks");
    command.env("DATABASE_URL", database.url());
    Process::start(&mut command).succeeds();
}

/// Not a test: the same of locks that share a session and are lost together, as an operator ends the session, and as the server crashes. What the
/// logger is told of one of them holds up no news of another.
#[test]
#[ignore = "the body of a process, which another test starts"]
fn shared_scene() {
    if common::role().is_none() {
        return;
    }
    log::set_logger(&Blocking).unwrap();
    // Without the driver's lines, which come with each answer.
    log::set_max_level(log::LevelFilter::Debug);
    let manager = started(Config::from_env().unwrap().catalog(CatalogMode::None).shared_sessions(1));
    let held = [7, 8].map(|key| manager.lock_with(key, dsync::LockOptions::new()).unwrap());
    for crashes in [false, true] {
        held.iter().for_each(|lock| lock.lock(&soon()).unwrap());
        let lost = held.each_ref().map(|lock| lock.lost());
        let mut client =
            postgres::Client::connect(&std::env::var("DATABASE_URL").unwrap(), postgres::NoTls).unwrap();
        let query = "SELECT pid, pg_backend_pid() FROM pg_locks WHERE locktype = 'advisory' AND objid = 7";
        let row = client.query_one(query, &[]).unwrap();
        let (late, begun) = (Lateness::watch(), Instant::now());
        BLOCKED.store(true, SeqCst);
        // The server ends all sessions where one of them was killed.
        let (backend, signal) = if crashes { (1, Signal::Kill) } else { (0, Signal::Terminate) };
        process::signal(row.get(backend), signal).unwrap();
        lost.iter().for_each(hear);
        // The terms would have lasted for longer.
        late.allow(begun.elapsed(), Duration::from_secs(3));
        BLOCKED.store(false, SeqCst);
    }
    held.iter().for_each(|lock| lock.lock(&soon()).unwrap());
}

#[test]
fn holders_on_a_shared_session_hear_of_its_end_though_their_logger_blocks() {
    let server = Server::start().unwrap();
    let mut command = common::process("shared_scene", "a logger that blocks");
    command.env("DATABASE_URL", server.url());
    Process::start(&mut command).succeeds();
}

/// The watch of one lock does not depend on another's.
#[test]
fn a_flood_on_one_lock_leaves_the_others_alone() {
    let database = Database::fresh().unwrap();
    let proxy = Proxy::start(database.server().port());
    let url = database.url_at("127.0.0.1", proxy.port()) + "?sslmode=disable";
    let flooded = started(Config::from_url(&url).unwrap().lease(LEASE));
    let calm = started(Config::from_url(&database.url()).unwrap());
    let (one, other) = (lock(&flooded, "flooded"), lock(&calm, "calm"));
    one.lock(&soon()).unwrap();
    other.lock(&soon()).unwrap();
    let (lost, kept) = (one.lost(), other.lost());
    proxy.flood(Some(Flood::Notices));
    hear(&lost);
    let left = || calm.snapshot().claim("calm").and_then(|claim| claim.time_left);
    let before = left();
    eventually("a heartbeat of the other lock", || left() > before);
    assert!(is_open(&kept));
    proxy.flood(None);
}
