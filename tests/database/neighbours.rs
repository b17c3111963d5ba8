//! Locks among other users of the server: waiters hold up neither vacuum nor index builds for longer than a slice, take no
//! more sessions than they were given, and are served in their order.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::unbounded;
use dsync::{CatalogMode, Config, Error, Lock, PostgresManager, SyncManager};
use postgres::Client;
use support::Database;

use crate::common::{
    Outcome, PATIENCE, becomes, begin, eventually, is_held, lock, soon, started, wait_in_thread,
};

const SLICE: Duration = Duration::from_millis(400);

fn config(database: &Database<'_>, name: &str) -> Config {
    let config = Config::from_url(&format!("{}?application_name={name}", database.url())).unwrap();
    config.release_timeout(PATIENCE)
}

/// Processes of their own that wait for the lock `x`, each in the queue when the next one comes.
struct Queue {
    managers: Vec<PostgresManager>,
    locks: Vec<Arc<dyn Lock>>,
    waiting: Vec<Outcome<Result<(), Error>>>,
    sessions: Vec<i32>,
}

impl Queue {
    fn new(database: &Database<'_>, count: usize, config: impl Fn() -> Config) -> Self {
        let operator = &mut database.client().unwrap();
        let mut queue =
            Self { managers: Vec::new(), locks: Vec::new(), waiting: Vec::new(), sessions: Vec::new() };
        for number in 1..=count {
            let manager = started(config());
            let x = lock(&manager, "x");
            queue.waiting.push(wait_in_thread(&x));
            queue.managers.push(manager);
            queue.locks.push(x);
            becomes("the queue", &number, || {
                queue.sessions = pids(operator);
                queue.sessions.len()
            });
        }
        queue
    }

    /// That all wait still, in the sessions in which they began to.
    fn goes_on(&self, operator: &mut Client) {
        becomes("the queue", &self.sessions, || pids(operator));
        assert!(!self.locks.iter().any(is_held) && !self.waiting.iter().any(Outcome::is_ready));
    }

    fn ends(self) {
        for manager in &self.managers {
            manager.stop().unwrap();
        }
    }
}

/// A session in the queue.
#[derive(Clone, Debug, PartialEq)]
struct Waiting {
    pid: i32,
    /// The oldest transaction that its statement may want to see.
    horizon: i64,
    statement: String,
}

fn waiters(operator: &mut Client) -> Vec<Waiting> {
    let query = "SELECT pid, backend_xmin::text::int8, query_start::text FROM pg_stat_activity
                 WHERE datname = current_database() AND wait_event_type = 'Lock' AND wait_event = 'advisory'
                 AND backend_xmin IS NOT NULL ORDER BY pid";
    let rows = operator.query(query, &[]).unwrap();
    rows.iter().map(|row| Waiting { pid: row.get(0), horizon: row.get(1), statement: row.get(2) }).collect()
}

fn pids(operator: &mut Client) -> Vec<i32> {
    waiters(operator).iter().map(|waiter| waiter.pid).collect()
}

/// Uses up a transaction number, which becomes the horizon of whoever begins to look now.
fn next_transaction(operator: &mut Client) -> i64 {
    operator.query_one("SELECT pg_current_xact_id()::text::int8", &[]).unwrap().get(0)
}

fn in_both_modes(test: impl Fn(CatalogMode)) {
    for mode in [CatalogMode::Automatic, CatalogMode::None] {
        println!("catalog: {mode:?}");
        test(mode);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The horizon
// ---------------------------------------------------------------------------------------------------------------------

#[test]
fn a_waiter_holds_the_horizon_for_no_longer_than_a_slice() {
    in_both_modes(|mode| {
        let database = Database::fresh().unwrap();
        let operator = &mut database.client().unwrap();
        let holder = lock_held(&database, mode);
        let queue = Queue::new(&database, 1, || config(&database, "waiter").catalog(mode).wait_slice(SLICE));
        let pid = queue.sessions[0];
        let mut slowest = Duration::ZERO;
        for _ in 0..5 {
            let transaction = next_transaction(operator);
            let since = Instant::now();
            eventually("the horizon to move on", || {
                waiters(operator).first().is_some_and(|waiter| waiter.horizon > transaction)
            });
            slowest = slowest.max(since.elapsed());
            assert_eq!(
                waiters(operator).first().map_or(pid, |waiter| waiter.pid),
                pid,
                "in one and the same session"
            );
        }
        println!("a slice of {SLICE:?}: the horizon moved on within {slowest:?}");
        // A machine under load may take its time, and so may transactions of other tests; without slices it takes for ever.
        assert!(slowest < SLICE + PATIENCE / 2, "{slowest:?}");
        queue.goes_on(operator);
        assert!(is_held(&holder.1));
        queue.ends();
    });
}

fn lock_held(database: &Database<'_>, mode: CatalogMode) -> (PostgresManager, Arc<dyn Lock>) {
    let manager = started(config(database, "holder").catalog(mode));
    let x = lock(&manager, "x");
    x.lock(&soon()).unwrap();
    (manager, x)
}

/// A holder's session rests between heartbeats, and sees nothing.
#[test]
fn a_holder_holds_no_horizon() {
    let database = Database::fresh().unwrap();
    let operator = &mut database.client().unwrap();
    let (_manager, x) = lock_held(&database, CatalogMode::Automatic);
    let query = "SELECT state, backend_xmin IS NULL AND backend_xid IS NULL AND xact_start IS NULL
                 FROM pg_stat_activity WHERE application_name = 'holder x' AND datname = current_database()";
    let row = operator.query_one(query, &[]).unwrap();
    assert_eq!((row.get(0), row.get(1)), ("idle", true));
    assert!(is_held(&x));
}

#[test]
fn vacuum_clears_away_what_was_deleted_while_ten_wait() {
    in_both_modes(|mode| {
        let database = Database::fresh().unwrap();
        let operator = &mut database.client().unwrap();
        operator
            .batch_execute("CREATE TABLE work AS SELECT number FROM generate_series(1, 10000) AS number")
            .unwrap();
        let holder = lock_held(&database, mode);
        let queue = Queue::new(&database, 10, || config(&database, "waiter").catalog(mode).wait_slice(SLICE));
        operator.batch_execute("DELETE FROM work").unwrap();
        // All who looked before see the rows still, and so no vacuum may take them.
        eventually("the table to be empty", || {
            operator.batch_execute("VACUUM work").unwrap();
            operator.query_one("SELECT pg_relation_size('work')", &[]).unwrap().get::<_, i64>(0) == 0
        });
        queue.goes_on(operator);
        assert!(is_held(&holder.1));
        queue.ends();
    });
}

/// A service takes the lock so that one process migrates the database; the others wait for it. The index build waits for
/// all who looked at the database before, and they for the holder. Neither is in a queue of the other's session, so the
/// server sees no deadlock.
#[test]
fn an_index_that_the_holder_builds_concurrently_is_done_while_ten_wait() {
    in_both_modes(|mode| {
        let database = Database::fresh().unwrap();
        let operator = &mut database.client().unwrap();
        operator
            .batch_execute("CREATE TABLE work AS SELECT number FROM generate_series(1, 1000) AS number")
            .unwrap();
        let holder = lock_held(&database, mode);
        let queue = Queue::new(&database, 10, || config(&database, "waiter").catalog(mode).wait_slice(SLICE));
        let mut connection = database.client().unwrap();
        let build = begin(move || {
            let begun = Instant::now();
            connection.batch_execute("CREATE INDEX CONCURRENTLY ON work (number)").unwrap();
            begun.elapsed()
        });
        println!("the index was built in {:?}", build.get());
        let valid = "SELECT indisvalid FROM pg_index WHERE indrelid = 'work'::regclass";
        assert!(operator.query_one(valid, &[]).unwrap().get::<_, bool>(0));
        queue.goes_on(operator);
        assert!(is_held(&holder.1), "nobody gave up for it");
        queue.ends();
    });
}

/// As above, with what a service has if it sets nothing.
#[test]
fn an_index_is_built_with_the_default_slice_too() {
    let database = Database::fresh().unwrap();
    let operator = &mut database.client().unwrap();
    operator.batch_execute("CREATE TABLE work (number int)").unwrap();
    let holder = lock_held(&database, CatalogMode::Automatic);
    let queue = Queue::new(&database, 2, || config(&database, "waiter"));
    let mut connection = database.client().unwrap();
    let build =
        begin(move || connection.batch_execute("CREATE INDEX CONCURRENTLY ON work (number)").unwrap());
    build.get();
    queue.goes_on(operator);
    assert!(is_held(&holder.1));
    queue.ends();
}

// ---------------------------------------------------------------------------------------------------------------------
// Sessions
// ---------------------------------------------------------------------------------------------------------------------

#[test]
fn waiters_have_as_many_sessions_as_they_were_given_and_not_one_of_the_applications() {
    const GIVEN: u32 = 4;
    let database = Database::fresh().unwrap();
    let operator = &mut database.client().unwrap();
    let holder = started(config(&database, "holder"));
    let waiter = started(config(&database, "waiter").max_sessions(GIVEN));
    let keys: Vec<String> = (1..=10).map(|number| format!("key {number}")).collect();
    for key in &keys {
        lock(&holder, key).lock(&soon()).unwrap();
    }
    let mut application: Vec<Client> = (0..3).map(|_| database.client().unwrap()).collect();
    let mut left: Vec<_> = keys.iter().map(|key| (key, wait_in_thread(&lock(&waiter, key)))).collect();
    becomes("the queue", &(GIVEN as usize), || waiters(operator).len());
    let mut sessions = || -> i64 {
        let query = "SELECT count(*) FROM pg_stat_activity
                     WHERE application_name LIKE 'waiter%' AND datname = current_database()";
        operator.query_one(query, &[]).unwrap().get(0)
    };
    // For as long as claims that have no session ask for one several times.
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(1) {
        assert!(sessions() <= i64::from(GIVEN), "no session beside the pool's");
        for client in &mut application {
            client.batch_execute("SELECT 1").unwrap();
        }
    }
    // Each wants one as soon as there is one.
    for key in &keys {
        lock(&holder, key).release().unwrap();
    }
    while !left.is_empty() {
        let (key, waiting) = support::wait_for("a lock", PATIENCE, || {
            left.iter().position(|(_, waiting)| waiting.is_ready()).map(|index| left.swap_remove(index))
        })
        .unwrap();
        waiting.get().unwrap();
        lock(&waiter, key).release().unwrap();
        assert!(sessions() <= i64::from(GIVEN));
    }
}

#[test]
fn within_a_slice_who_came_first_is_served_first() {
    in_both_modes(|mode| {
        let database = Database::fresh().unwrap();
        let holder = lock_held(&database, mode);
        let slice = Duration::from_secs(600);
        let queue = Queue::new(&database, 8, || config(&database, "waiter").catalog(mode).wait_slice(slice));
        let (sender, served) = unbounded();
        for (number, waiting) in queue.waiting.into_iter().enumerate() {
            let (sender, x) = (sender.clone(), Arc::clone(&queue.locks[number]));
            // Told while the lock is held, so in the order of the terms.
            drop(begin(move || {
                waiting.get().unwrap();
                sender.send(number).unwrap();
                x.release().unwrap();
            }));
        }
        holder.1.release().unwrap();
        let order: Vec<usize> = (0..8).map(|_| served.recv_timeout(PATIENCE).unwrap()).collect();
        assert_eq!(order, [0, 1, 2, 3, 4, 5, 6, 7]);
    });
}

/// The heartbeat of a lock costs the server the same, whatever locks others have there.
#[test]
fn locks_are_kept_beside_another_application_s_fifty_thousand() {
    const LOCKS: usize = 60;
    let server = support::Server::builder()
        .setting("max_locks_per_transaction", "512")
        .max_connections(120)
        .start()
        .unwrap();
    let mut other = server.client().unwrap();
    let take = "DO $$ BEGIN FOR i IN 1..50000 LOOP PERFORM pg_advisory_lock(7, i); END LOOP; END $$";
    other.batch_execute(take).unwrap();
    let config = Config::from_url(&server.url())
        .unwrap()
        .max_sessions(LOCKS.try_into().unwrap())
        .lease(Duration::from_secs(3))
        .heartbeat(Duration::from_millis(500))
        .release_timeout(PATIENCE)
        .catalog(CatalogMode::None);
    let manager = started(config);
    let locks: Vec<_> = (0..LOCKS).map(|number| lock(&manager, &number.to_string())).collect();
    for lock in &locks {
        lock.lock(&soon()).unwrap();
    }
    // Some eight heartbeats of each. What the others have would cost a lock each time, and a busy machine now and then.
    eventually("four seconds in which none is lost", || {
        let losts: Vec<_> = locks.iter().map(|lock| lock.lost()).collect();
        let begun = Instant::now();
        losts.iter().all(|lost| {
            let left = Duration::from_secs(4).saturating_sub(begun.elapsed());
            lost.recv_timeout(left).is_err_and(|error| error.is_timeout())
        })
    });
    manager.stop().unwrap();
}

/// A lock has others beside it: the turnstile, which whoever has waited for a slice has, and the fence locks of writers and of readers. If those of two
/// keys were one, a set of the two could wait for itself, and a transaction fenced by the one would keep the other.
#[test]
fn the_locks_beside_a_key_are_far_from_those_of_keys_near_it() {
    const KEY: i64 = 100;
    let database = Database::fresh().unwrap();
    let mut operator = database.client().unwrap();
    let ids = |operator: &mut Client| -> BTreeSet<i64> {
        let query =
            "SELECT classid::int8 << 32 | objid::int8 FROM pg_locks WHERE locktype = 'advisory' AND granted
             AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";
        operator.query(query, &[]).unwrap().iter().map(|row| row.get(0)).collect()
    };
    let manager = started(config(&database, "holder"));
    let waiting = started(config(&database, "waiter").wait_slice(Duration::from_millis(50)));
    let mut client = database.client().unwrap();

    let writer = manager.lock(KEY).unwrap().acquire(PATIENCE).unwrap();
    let waiter = wait_in_thread(&waiting.lock(KEY).unwrap());
    // Whoever passes it shares it for a moment.
    let turnstile = "SELECT count(*) FROM pg_locks AS one JOIN pg_locks AS other USING (pid) WHERE one.locktype = 'advisory' AND NOT one.granted
         AND other.locktype = 'advisory' AND other.granted AND other.mode = 'ExclusiveLock'";
    becomes("the turnstile", &1_i64, || operator.query_one(turnstile, &[]).unwrap().get(0));
    let mut transaction = client.transaction().unwrap();
    writer.term().fence(&mut transaction).unwrap();
    // Between two slices the waiter has no turnstile for a moment.
    let mut beside = BTreeSet::new();
    becomes("the key, the turnstile, and the fence lock", &3, || {
        beside = ids(&mut operator);
        beside.len()
    });
    transaction.commit().unwrap();
    waiting.stop().unwrap();
    assert!(waiter.get().is_err());
    writer.release().unwrap();

    let reader = manager.shared_lock(KEY).unwrap().acquire(PATIENCE).unwrap();
    let mut transaction = client.transaction().unwrap();
    reader.term().fence(&mut transaction).unwrap();
    beside.extend(ids(&mut operator));
    assert_eq!(beside.len(), 4, "and that of readers: {beside:?}");
    transaction.commit().unwrap();
    reader.release().unwrap();

    // Of a pair, each half is a number.
    for one in &beside {
        for other in beside.iter().filter(|other| *other != one) {
            let distance = (one ^ other).cast_unsigned();
            let halves = [distance >> 32, distance & u64::from(u32::MAX)];
            assert!(halves.iter().all(|half| *half >= 1 << 28), "{one:x} and {other:x}");
        }
    }
}
