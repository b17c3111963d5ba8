//! What the tests of cut-off, frozen and dead processes share: parties that want many locks at once, so that one cut is
//! as many runs; processes that watch what they are told; and the clock.
//!
//! The clock is the machine's, which all processes here share, the server among them: it writes into the catalog when it
//! granted a lock, to the microsecond, and a loss says when its channel was closed. A thread that is told of either
//! wakes at some time after it.

#![allow(dead_code, reason = "each file uses a part of it")]

pub(crate) mod proxy;
pub(crate) mod witness;

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crossbeam_channel::{Receiver, bounded};
use dsync::{Config, Context, ErrorKind, Lock, Lost, PostgresManager};
use postgres::Client;

use crate::common::{Lateness, PATIENCE, becomes, begin, is_held, lock, soon, started};

/// The lease in most tests.
pub(crate) const LEASE: Duration = Duration::from_secs(3);

/// What is promised beyond the lease.
pub(crate) const GRACE: Duration = Duration::from_secs(1);

/// Longer than any test, so that the order of a queue stays.
pub(crate) const ONE_SLICE: Duration = Duration::from_secs(100);

/// A time, in microseconds since 1970.
pub(crate) type Micros = i64;

pub(crate) fn micros(at: SystemTime) -> Micros {
    i64::try_from(at.duration_since(UNIX_EPOCH).unwrap().as_micros()).unwrap()
}

pub(crate) fn now() -> Micros {
    micros(SystemTime::now())
}

/// From one time to a later one, in milliseconds for a reader.
pub(crate) fn ms(from: Micros, to: Micros) -> f64 {
    (to - from) as f64 / 1000.0
}

pub(crate) fn length(duration: Duration) -> Micros {
    i64::try_from(duration.as_micros()).unwrap()
}

/// Settings for `count` locks, with a session for each and one that they may share. `name` is that of the sessions.
pub(crate) fn config(name: &str, url: &str, count: usize) -> Config {
    Config::from_url(&format!("{url}?application_name={name}"))
        .unwrap()
        .lease(LEASE)
        .max_sessions(u32::try_from(count).unwrap() + 1)
}

pub(crate) fn key(index: usize) -> String {
    format!("k{index}")
}

/// A manager, and the locks `k0`, `k1`, … that it wants.
pub(crate) struct Party {
    pub(crate) name: String,
    pub(crate) manager: PostgresManager,
    pub(crate) locks: Vec<Arc<dyn Lock>>,
}

impl Party {
    pub(crate) fn new(name: &str, url: &str, count: usize) -> Self {
        Self::with(name, count, config(name, url, count))
    }

    /// One that nobody cuts off: a machine that is so busy that a heartbeat comes too late takes nothing from it.
    pub(crate) fn steady(name: &str, url: &str, count: usize) -> Self {
        Self::with(name, count, config(name, url, count).lease(PATIENCE))
    }

    /// The same; and it keeps its place in the queue.
    pub(crate) fn steady_in_the_queue(name: &str, url: &str, count: usize) -> Self {
        Self::with(name, count, config(name, url, count).lease(PATIENCE).wait_slice(ONE_SLICE))
    }

    pub(crate) fn with(name: &str, count: usize, config: Config) -> Self {
        let manager = started(config);
        let locks = (0..count).map(|index| lock(&manager, &key(index))).collect();
        Self { name: name.to_owned(), manager, locks }
    }

    /// Waits until all are held. The channels of the terms.
    pub(crate) fn lock_all(&self) -> Vec<Lost> {
        let waiting = self.wait_for_all();
        last_of(&waiting, self.locks.len());
        self.locks.iter().map(|lock| lock.lost()).collect()
    }

    /// Waits for each in a thread, and tells which of them has been had, and when.
    pub(crate) fn wait_for_all(&self) -> Receiver<(usize, Micros)> {
        let (sender, receiver) = bounded(self.locks.len());
        for (index, lock) in self.locks.iter().enumerate() {
            let (lock, sender) = (Arc::clone(lock), sender.clone());
            thread::spawn(move || {
                if lock.lock(&Context::background()).is_ok() {
                    let _ = sender.send((index, now()));
                }
            });
        }
        receiver
    }

    pub(crate) fn held(&self) -> usize {
        self.locks.iter().filter(|lock| is_held(lock)).count()
    }

    /// Releases all at once, since each takes its time on a network that is cut.
    pub(crate) fn release_all(&self) {
        thread::scope(|scope| {
            for lock in &self.locks {
                scope.spawn(|| match lock.release() {
                    // A machine that is too busy does not confirm it in time. Its session is closed then, which frees the lock.
                    Err(error) if error.kind() == ErrorKind::UnlockFailed => println!("{error}"),
                    outcome => outcome.unwrap(),
                });
            }
        });
    }
}

/// Waits until `count` locks have been had. When the last one was.
pub(crate) fn last_of(had: &Receiver<(usize, Micros)>, count: usize) -> Micros {
    (0..count).map(|_| had.recv_timeout(PATIENCE).unwrap().1).max().unwrap()
}

/// How many locks the party holds, by the server's word.
pub(crate) fn holds(operator: &mut Client, party: &str) -> usize {
    sessions(operator, party, "granted")
}

/// How many locks the party is in a queue for.
pub(crate) fn queues(operator: &mut Client, party: &str) -> usize {
    sessions(operator, party, "NOT granted")
}

/// A session that carries many locks has one more, by which it sees that it has them.
fn sessions(operator: &mut Client, party: &str, condition: &str) -> usize {
    let query = format!(
        "SELECT count(*) - count(DISTINCT CASE WHEN application_name LIKE '%(many locks)' THEN pid END)
         FROM pg_locks JOIN pg_stat_activity USING (pid)
         WHERE locktype = 'advisory' AND application_name LIKE '{party} %' AND {condition}"
    );
    usize::try_from(operator.query_one(&query, &[]).unwrap().get::<_, i64>(0)).unwrap()
}

/// Waits until the party is in the queue for all its locks.
pub(crate) fn all_queue(operator: &mut Client, party: &Party) {
    becomes(&format!("the queue of {}", party.name), &party.locks.len(), || queues(operator, &party.name));
}

/// When the newest holder of each lock was granted it, and the token of its term.
pub(crate) fn granted(operator: &mut Client, count: usize) -> Vec<(Micros, i64)> {
    (0..count)
        .map(|index| {
            let query =
                "SELECT (extract(epoch FROM since) * 1000000)::int8, token FROM dsync.lock WHERE key = $1";
            let row = operator.query_one(query, &[&key(index)]).unwrap();
            (row.get(0), row.get(1))
        })
        .collect()
}

/// Waits until no advisory lock of a party is held or waited for.
pub(crate) fn nothing_is_left(operator: &mut Client) {
    becomes("the advisory locks", &0, || {
        let query = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'";
        operator.query_one(query, &[]).unwrap().get::<_, i64>(0)
    });
}

/// Waits until all are held again, without a call that would acquire them, and gives them back.
pub(crate) fn gets_all_back(operator: &mut Client, party: &Party) {
    becomes(&format!("what {} says it holds", party.name), &party.locks.len(), || party.held());
    becomes(&format!("what {} holds", party.name), &party.locks.len(), || holds(operator, &party.name));
    for lock in &party.locks {
        lock.lock(&soon()).unwrap();
    }
    thread::scope(|scope| {
        for lock in &party.locks {
            // On a machine that is too busy for its heartbeats, the lease may end first.
            scope.spawn(|| match lock.release() {
                Err(error) if error.kind() != ErrorKind::UnlockFailed => panic!("{error}"),
                _ => {}
            });
        }
    });
}

/// Gives back the locks of one session, a few at a time, beside one there that waits for its confirmation, from `stall` on until what it gives is
/// dropped.
pub(crate) fn releases_are_short<T>(
    operator: &mut Client,
    manager: &PostgresManager,
    mut stall: impl FnMut() -> T,
) {
    const TOGETHER: u64 = 20;
    /// Beside 2 s for a release, and 3.75 s for a confirmation.
    const SHORT: Duration = Duration::from_millis(700);
    for round in 0..6 {
        let acquire = |number| lock(manager, &format!("{round}/{number}")).acquire(PATIENCE).unwrap();
        let held: Vec<_> = (0..TOGETHER).map(acquire).collect();
        let stalled = stall();
        let key = format!("{round}/unconfirmed");
        let wanted = lock(manager, &key);
        let waiting = begin(move || wanted.acquire(PATIENCE).unwrap().release());
        let query =
            "SELECT count(*) FROM dsync.lock WHERE key = $1 AND pid IN (SELECT pid FROM pg_stat_activity)";
        becomes("the grant", &1_i64, || operator.query_one(query, &[&key]).unwrap().get(0));
        let late = &Lateness::watch();
        thread::scope(|scope| {
            for (number, guard) in (0..).zip(held) {
                scope.spawn(move || {
                    // As long as the session needs for some of them.
                    thread::sleep(Duration::from_micros(150 * number));
                    let begun = Instant::now();
                    guard.release().unwrap();
                    late.allow(begun.elapsed(), SHORT);
                });
            }
        });
        assert!(!waiting.is_ready(), "it waited all the time");
        drop(stalled);
        waiting.get().unwrap();
    }
}
