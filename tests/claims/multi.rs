//! What sets of locks ask of the server; `contract.rs` has what they promise.

use std::thread;
use std::time::{Duration, Instant};

use dsync::{Config, Context, ErrorKind, Key, LockOptions, LossReason, MultiGuard, SyncManager};
use support::process::Signal;
use support::{Database, Server};

use crate::common::{self, PATIENCE, Process, becomes, begin, eventually, hear, kind, lock, soon, started};

/// Each could wait for a session that another one has, if it kept its locks meanwhile.
#[test]
fn sets_and_others_that_want_more_sessions_than_there_are_all_have_their_turns() {
    let database = Database::fresh().unwrap();
    let manager = || started(Config::from_url(&database.url()).unwrap().max_sessions(2));
    let managers = [manager(), manager()];
    thread::scope(|scope| {
        // Of the one manager, a set has `a` and wants a session for `b`, while the last session waits for `a`; of the two, each has
        // the lock for which the other one waits.
        for (index, keys) in [&["a", "b"][..], &["c"], &["c", "d"], &["a"]].into_iter().enumerate() {
            let manager = &managers[index / 2];
            scope.spawn(move || {
                for _ in 0..20 {
                    let set = manager.multi_lock(keys.iter().copied()).unwrap();
                    set.acquire(PATIENCE).unwrap().release().unwrap();
                }
            });
        }
        let claimed = lock(&managers[0], "a");
        scope.spawn(move || {
            for _ in 0..20 {
                claimed.lock(&soon()).unwrap();
                claimed.release().unwrap();
            }
        });
    });
}

#[test]
fn a_set_without_a_session_for_all_its_locks_keeps_none_of_them() {
    let database = Database::fresh().unwrap();
    let few = Config::from_url(&database.url()).unwrap().max_sessions(2);
    let (manager, theirs) = (started(few), started(Config::from_url(&database.url()).unwrap()));
    let guard = lock(&manager, "the last but one").acquire(PATIENCE).unwrap();
    let set = manager.multi_lock(["a", "b"]).unwrap();
    let error = set.try_acquire().unwrap_err();
    assert!(
        error.kind() == ErrorKind::PoolExhausted && error.to_string().contains("max_sessions"),
        "{error}"
    );
    // A busy machine has looked for a session by then.
    let error = set.acquire(Duration::from_secs(5)).unwrap_err();
    assert!(
        error.kind() == ErrorKind::TimedOut && format!("{error:#}").contains("max_sessions"),
        "{error:#}"
    );
    let waiting = {
        let set = set.clone();
        begin(move || set.acquire(PATIENCE).map(|set| set.is_held()))
    };
    let both = theirs.multi_lock(["a", "b"]).unwrap();
    for _ in 0..20 {
        both.acquire(PATIENCE).unwrap().release().unwrap();
    }
    assert!(!waiting.is_ready());
    guard.release().unwrap();
    assert!(waiting.get().unwrap());

    let _guard = lock(&manager, "the last but one").acquire(PATIENCE).unwrap();
    let waiting = begin(move || set.acquire(Context::background()).map(drop));
    manager.stop().unwrap();
    assert_eq!(kind(waiting.get()), ErrorKind::SyncManagerStopped);
}

/// The thread whose turn it is waits for a session, which somebody has who waits for what the set has.
#[test]
fn a_set_does_not_wait_behind_a_thread_of_its_process_that_finds_no_session() {
    let database = Database::fresh().unwrap();
    let manager = started(Config::from_url(&database.url()).unwrap().max_sessions(2));
    let set = manager.multi_lock(["a", "b"]).unwrap();
    let keys: Vec<_> = set.keys().map(str::to_owned).collect();
    let [first, second] = [0, 1].map(|index| lock(&manager, &keys[index]));
    let (other, held) = (lock(&manager, "c").acquire(PATIENCE).unwrap(), first.acquire(PATIENCE).unwrap());
    let thread = begin(move || second.acquire(PATIENCE).map(drop));
    eventually("the thread finds no session", || {
        manager.snapshot().claim(&keys[1]).is_some_and(|claim| claim.last_error.is_some())
    });
    let waiting = begin(move || set.acquire(PATIENCE).map(drop));
    eventually("the set waits", || format!("{first:?}").contains("waiting_threads: 1"));
    // The set may have the one session, and must not keep it from the thread.
    held.release().unwrap();
    thread.get().unwrap();
    assert!(!waiting.is_ready(), "there is no session for its second lock");
    other.release().unwrap();
    waiting.get().unwrap();
}

#[test]
fn a_set_that_can_never_be_held_is_refused() {
    let database = Database::fresh().unwrap();
    let manager = started(Config::from_url(&database.url()).unwrap().max_sessions(2));
    let error = manager.multi_lock(["a", "b", "c"]).unwrap_err();
    assert!(
        error.kind() == ErrorKind::InvalidConfig && error.to_string().contains("max_sessions"),
        "{error}"
    );
    // Those that share a session take one together, whichever of the set comes first by its number.
    let keys = ["a", "b", "c"];
    for one in keys {
        for one_shares in [true, false] {
            let options = |key| LockOptions::new().shared_session((key == one) == one_shares);
            let _kept = keys.map(|key| manager.lock_with(key, options(key)).unwrap());
            match manager.multi_lock(keys) {
                Ok(set) => set.try_acquire().unwrap().unwrap().release().unwrap(),
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::InvalidConfig, "{one} {one_shares}: {error}")
                }
            }
            assert_eq!(manager.multi_lock(keys).is_err(), one_shares, "{one} takes part of a session");
        }
    }
    // The number that the name has in this namespace.
    let name = Key::from("billing/invoice-run");
    let error = manager.multi_lock([name, Key::from(-8_639_657_970_933_492_344_i64)]).unwrap_err();
    assert!(error.kind() == ErrorKind::InvalidKey && error.to_string().contains("billing"), "{error}");
}

#[test]
fn a_set_that_loses_a_lock_while_it_waits_for_the_next_begins_anew() {
    let database = Database::fresh().unwrap();
    let operator = &mut database.client().unwrap();
    let config = || Config::from_url(&database.url()).unwrap().release_timeout(PATIENCE / 3);
    let [ours, theirs] = [(); 2].map(|()| started(config()));
    let set = ours.multi_lock(["a", "b"]).unwrap();
    let keys: Vec<_> = set.keys().map(str::to_owned).collect();
    let guard = lock(&theirs, &keys[1]).acquire(PATIENCE).unwrap();
    let waiting = begin(move || {
        let guard = set.acquire(PATIENCE).unwrap();
        (guard.is_held(), guard.release().is_ok())
    });
    eventually("the wait", || theirs.inspect(keys[1].as_str()).unwrap().waiters.len() == 1);
    let end = "SELECT pg_terminate_backend(pid, 60000) FROM dsync.locks WHERE key = $1";
    assert_eq!(operator.query(end, &[&keys[0]]).unwrap().len(), 1);
    let between = lock(&theirs, &keys[0]).acquire(PATIENCE).unwrap();
    guard.release().unwrap();
    between.release().unwrap();
    assert_eq!(waiting.get(), (true, true));
}

#[test]
fn a_set_that_loses_one_lock_keeps_the_others_until_its_release() {
    let database = Database::fresh().unwrap();
    let operator = &mut database.client().unwrap();
    let config = || Config::from_url(&database.url()).unwrap().release_timeout(PATIENCE / 3);
    let [ours, theirs] = [(); 2].map(|()| started(config()));
    let guard = ours.multi_lock(["a", "b", "c"]).unwrap().acquire(PATIENCE).unwrap();
    let lost = guard.lost().clone();
    let mut end = |key: &str| {
        let end = "SELECT pg_terminate_backend(pid) FROM dsync.locks WHERE key = $1";
        assert_eq!(operator.query(end, &[&key]).unwrap().len(), 1);
        hear(guard.term(key).unwrap().lost());
    };
    end("b");
    hear(&lost);
    assert!(!guard.is_held());
    let loss = guard.loss().unwrap();
    assert_eq!(loss.reason, LossReason::Terminated);
    end("c");
    assert_eq!(guard.loss().unwrap(), loss, "the first one");
    let is_held = |key: &str| guard.term(key).unwrap().is_held();
    assert!(is_held("a") && !is_held("b") && !is_held("c"));
    lock(&theirs, "b").acquire(PATIENCE).unwrap().release().unwrap();
    assert!(lock(&theirs, "a").try_acquire().unwrap().is_none());
    let mut transaction = operator.transaction().unwrap();
    assert_eq!(kind(guard.fence(&mut transaction)), ErrorKind::Lost);
    drop(transaction);
    let error = guard.release().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Lost, "{error}");
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

#[test]
fn a_session_that_does_not_answer_holds_up_its_own_lock_only() {
    let database = Database::fresh().unwrap();
    // The hung session is not given up, and its release goes on, until it answers again.
    let config = || {
        let config = Config::from_url(&database.url()).unwrap();
        config.lease(PATIENCE).release_timeout(PATIENCE / 3)
    };
    let [ours, theirs] = [(); 2].map(|()| started(config()));
    let set = ours.multi_lock(["a", "b", "c"]).unwrap();
    let keys: Vec<_> = set.keys().map(str::to_owned).collect();
    for hung in &keys {
        let guard = set.acquire(PATIENCE).unwrap();
        let pid = ours.inspect(hung.as_str()).unwrap().holder.unwrap().pid;
        support::process::signal(pid, Signal::Stop).unwrap();
        let released = begin(move || guard.release());
        for key in keys.iter().filter(|key| *key != hung) {
            lock(&theirs, key).acquire(PATIENCE).unwrap().release().unwrap();
        }
        assert!(!released.is_ready(), "the others did not wait for it");
        support::process::signal(pid, Signal::Continue).unwrap();
        released.get().unwrap();
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
#[ignore = "the body of a process, which another test starts"]
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
    assert!(
        begun.elapsed() < Duration::from_secs(5),
        "the system has told the server at once: {:?}",
        begun.elapsed()
    );
}

/// Not a test: a process that takes a set and is killed.
#[test]
#[ignore = "the body of a process, which another test starts"]
fn holder() {
    let Some(url) = common::role() else { return };
    let manager = started(Config::from_url(&url).unwrap());
    let _guard = manager.multi_lock(["c", "a", "b"]).unwrap().acquire(PATIENCE).unwrap();
    println!("\nholds the set");
    thread::sleep(PATIENCE);
}
