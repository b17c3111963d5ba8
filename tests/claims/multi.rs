//! What sets of locks ask of the server; `contract.rs` has what they promise.

use std::thread;
use std::time::{Duration, Instant};

use dsync::{Config, ErrorKind, LossReason, MultiGuard, SyncManager};
use support::{Database, Server};

use crate::common::{self, PATIENCE, Process, becomes, eventually, hear, kind, lock, started};

/// Each of them would wait for a session that another one has, if each took one after the other.
#[test]
fn sets_that_want_more_sessions_than_there_are_take_turns() {
    const SESSIONS: usize = 4;
    let database = Database::fresh().unwrap();
    let sessions = u32::try_from(SESSIONS).unwrap();
    let manager = started(Config::from_url(&database.url()).unwrap().max_sessions(sessions));
    thread::scope(|scope| {
        for thread in 0..8 {
            let manager = &manager;
            scope.spawn(move || {
                for round in 0..5 {
                    let keys = (0..3).map(|key| format!("{thread}/{round}/{key}"));
                    manager.multi_lock(keys).unwrap().acquire(PATIENCE).unwrap().release().unwrap();
                }
            });
        }
    });
    let all = (0..SESSIONS).map(|key| format!("all/{key}"));
    let guard = manager.multi_lock(all.clone()).unwrap().acquire(PATIENCE).unwrap();
    let two = manager.multi_lock(["y", "z"]).unwrap();
    let error = two.try_acquire().unwrap_err();
    assert!(
        error.kind() == ErrorKind::PoolExhausted && error.to_string().contains("max_sessions"),
        "{error}"
    );
    let error = two.acquire(Duration::from_millis(50)).unwrap_err();
    assert!(
        error.kind() == ErrorKind::TimedOut && format!("{error:#}").contains("max_sessions"),
        "{error:#}"
    );
    guard.release().unwrap();
    two.try_acquire().unwrap().expect("they are free").release().unwrap();
    let error = manager.multi_lock(all.chain(["one too many".to_owned()])).unwrap_err();
    assert!(
        error.kind() == ErrorKind::InvalidConfig && error.to_string().contains("max_sessions"),
        "{error}"
    );
}

#[test]
fn a_set_that_loses_one_lock_keeps_the_others_until_its_release() {
    let database = Database::fresh().unwrap();
    let operator = &mut database.client().unwrap();
    let [ours, theirs] = [(); 2].map(|()| started(Config::from_url(&database.url()).unwrap()));
    let guard = ours.multi_lock(["a", "b", "c"]).unwrap().acquire(PATIENCE).unwrap();
    let lost = guard.lost().clone();
    let end = "SELECT pg_terminate_backend(pid) FROM dsync.locks WHERE key = 'b'";
    assert_eq!(operator.query(end, &[]).unwrap().len(), 1);
    hear(&lost);
    assert!(!guard.is_held());
    assert_eq!(guard.loss().unwrap().reason, LossReason::Terminated);
    let is_held = |key: &str| guard.term(key).unwrap().is_held();
    assert!(is_held("a") && !is_held("b") && is_held("c"));
    lock(&theirs, "b").acquire(PATIENCE).unwrap().release().unwrap();
    assert!(lock(&theirs, "a").try_acquire().unwrap().is_none());
    let mut transaction = operator.transaction().unwrap();
    assert_eq!(kind(guard.fence(&mut transaction)), ErrorKind::Lost);
    drop(transaction);
    let error = guard.release().unwrap_err();
    assert!(error.kind() == ErrorKind::Lost && error.to_string().contains("\"b\""), "{error}");
    theirs
        .multi_lock(["a", "b", "c"])
        .unwrap()
        .try_acquire()
        .unwrap()
        .expect("all are free")
        .release()
        .unwrap();
}

#[test]
fn the_release_of_a_set_takes_no_longer_than_one_where_the_server_does_not_answer() {
    let server = Server::start().unwrap();
    let bound = Duration::from_secs(2);
    let manager = started(Config::from_url(&server.url()).unwrap().release_timeout(bound));
    let ways: [fn(MultiGuard); 2] = [
        |guard| {
            guard.release().unwrap_err();
        },
        drop,
    ];
    for way in ways {
        let guard = manager.multi_lock(["a", "b", "c", "d"]).unwrap().acquire(PATIENCE).unwrap();
        let frozen = server.freeze().unwrap();
        let begun = Instant::now();
        way(guard);
        let took = begun.elapsed();
        drop(frozen);
        assert!(took < bound + Duration::from_secs(2), "it took {took:?}");
    }
}

const KEYS: usize = 12;
const PROCESSES: usize = 8;
const SETS: usize = 1_000;

#[test]
fn a_thousand_sets_of_eight_processes_never_wait_for_each_other() {
    let database = Database::fresh().unwrap();
    let operator = &mut database.client().unwrap();
    operator
        .batch_execute("CREATE TABLE inside (key int PRIMARY KEY, visits int NOT NULL); CREATE TABLE witness (key int PRIMARY KEY)")
        .unwrap();
    let insert = "INSERT INTO inside SELECT key, 0 FROM generate_series(0, $1::int4 - 1) AS key";
    operator.execute(insert, &[&i32::try_from(KEYS).unwrap()]).unwrap();
    let workers: Vec<_> = (0..PROCESSES)
        .map(|index| {
            Process::start(&mut common::process("multi::worker", &format!("{index} {}", database.url())))
        })
        .collect();
    let said: Vec<_> =
        workers.into_iter().map(|worker| worker.succeeds_within(Duration::from_secs(300))).collect();
    let locks: i64 = operator.query_one("SELECT sum(visits) FROM inside", &[]).unwrap().get(0);
    let wanted: i64 = said.iter().map(|said| number_after(said, "locks: ")).sum();
    assert_eq!(locks, wanted, "a visit was written over by another");
    let deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()";
    assert_eq!(operator.query_one(deadlocks, &[]).unwrap().get::<_, i64>(0), 0);
    let free = "SELECT count(*) FROM dsync.locks";
    becomes("the locks that are held", &0, || operator.query_one(free, &[]).unwrap().get::<_, i64>(0));
}

fn number_after(text: &str, mark: &str) -> i64 {
    let line = text.lines().find_map(|line| line.split(mark).nth(1));
    line.unwrap_or_else(|| panic!("no {mark:?} in {text}")).trim().parse().unwrap()
}

/// Not a test: the body of the processes that the one above starts. It is told its number and a server.
#[test]
fn worker() {
    let Some(role) = common::role() else { return };
    let (index, url) = role.split_once(' ').unwrap();
    let manager = started(Config::from_url(url).unwrap());
    let mut client = postgres::Client::connect(url, postgres::NoTls).unwrap();
    let mut lots = fastrand::Rng::with_seed(index.parse().unwrap());
    let mut locks = 0;
    for _ in 0..SETS / PROCESSES {
        let count = lots.usize(1..5);
        let mut keys = lots.choose_multiple(0..KEYS, count);
        lots.shuffle(&mut keys);
        let set = manager.multi_lock(keys.iter().map(|key| format!("key {key}"))).unwrap();
        let guard = set.acquire(PATIENCE).unwrap();
        for key in &keys {
            let key = i32::try_from(*key).unwrap();
            // Two that are inside at once collide; and one of two additions is missing.
            client.execute("INSERT INTO witness VALUES ($1)", &[&key]).unwrap();
            let visits: i32 =
                client.query_one("SELECT visits FROM inside WHERE key = $1", &[&key]).unwrap().get(0);
            client.execute("UPDATE inside SET visits = $2 WHERE key = $1", &[&key, &(visits + 1)]).unwrap();
            client.execute("DELETE FROM witness WHERE key = $1", &[&key]).unwrap();
        }
        locks += keys.len();
        assert!(guard.is_held(), "nothing was to end it");
        guard.release().unwrap();
    }
    println!("\nlocks: {locks}");
    manager.stop().unwrap();
}

#[test]
fn the_locks_of_a_process_that_dies_with_a_set_are_free() {
    let database = Database::fresh().unwrap();
    let manager = started(Config::from_url(&database.url()).unwrap());
    let set = manager.multi_lock(["a", "b", "c"]).unwrap();
    let holder = Process::start(&mut common::process("multi::holder", &database.url()));
    holder.says("holds the set");
    assert!(set.try_acquire().unwrap().is_none());
    holder.kill();
    let begun = Instant::now();
    set.acquire(PATIENCE).unwrap().release().unwrap();
    assert!(begun.elapsed() < Duration::from_secs(15), "within the lease");
    eventually("all sessions of the dead one are gone", || set.try_acquire().unwrap().is_some());
}

/// Not a test: a process that takes a set and is killed.
#[test]
fn holder() {
    let Some(url) = common::role() else { return };
    let manager = started(Config::from_url(&url).unwrap());
    let _guard = manager.multi_lock(["c", "a", "b"]).unwrap().acquire(PATIENCE).unwrap();
    println!("\nholds the set");
    thread::sleep(PATIENCE);
}
