//! Races, a thousand times each: a release with a loss, and the end of a wait with the grant. Whichever wins, the server
//! keeps nothing, nobody believes to hold what is not held, and the next one has the lock at once.

use std::collections::BTreeMap;
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use dsync::{Config, Context, Error, ErrorKind, Lock, PostgresManager};
use postgres::{Client, NoTls};
use support::{Database, Server};

use crate::common::{self, begin, is_open, soon, started};

const ROUNDS: usize = 1_000;

/// Each has a lock of its own.
const WORKERS: usize = 4;

/// Long for a backend to exit, or for a lock that is free to be had; short to be found hanging.
const AT_ONCE: Duration = Duration::from_secs(5);

/// Numbers that are as good as random here: a linear congruential generator of Knuth's.
struct Dice(u64);

impl Dice {
    fn microseconds(&mut self, most: u64) -> Duration {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        Duration::from_micros((self.0 >> 33) % most)
    }
}

/// Spins, since a sleep is longer than what is to be hit.
fn pause(duration: Duration) {
    let begun = Instant::now();
    while begun.elapsed() < duration {
        std::hint::spin_loop();
    }
}

/// What came first in a round: what the test does to the lock, or what befalls it.
#[derive(Clone, Copy, Debug, PartialEq)]
enum First {
    Ours,
    Theirs,
}

/// The pause before what the test does. How long what befalls the lock takes is the machine's affair, so the pause gets longer where the
/// test was first, and shorter where it was not: either comes first in about half of the rounds.
struct Aim {
    most: Duration,
}

impl Aim {
    fn microseconds(most: u64) -> Self {
        Self { most: Duration::from_micros(most) }
    }

    fn pause(&self, dice: &mut Dice) -> Duration {
        dice.microseconds(u64::try_from(self.most.as_micros()).unwrap().max(1))
    }

    fn learn(&mut self, first: First) {
        match first {
            First::Ours => self.most = self.most * 9 / 8,
            First::Theirs => self.most = self.most * 8 / 9,
        }
    }
}

/// One lock, and an operator who looks at it.
struct Bench {
    number: i64,
    url: String,
    _manager: PostgresManager,
    operator: Client,
    lock: Arc<dyn Lock>,
    dice: Dice,
    longest: Duration,
}

impl Bench {
    fn new(database: &Database<'_>, number: usize) -> Self {
        let number = i64::try_from(number).unwrap() + 1;
        // No race is decided by it.
        let config = Config::from_url(&database.url()).unwrap().release_timeout(Duration::from_secs(20));
        let manager = started(config);
        let lock = manager.lock(number).unwrap();
        let dice = Dice(number.unsigned_abs() * 77);
        let (url, operator) = (database.url(), database.client().unwrap());
        Self { number, url, _manager: manager, operator, lock, dice, longest: Duration::ZERO }
    }

    /// The backends that hold the lock, or wait for it.
    fn backends(&mut self, granted: bool) -> Vec<i32> {
        let query =
            "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND granted = $1 AND objid = $2::int8::oid
                     AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";
        let rows = self.operator.query(query, &[&granted, &self.number]).unwrap();
        rows.iter().map(|row| row.get(0)).collect()
    }

    fn becomes_count(&mut self, granted: bool, count: usize) -> Vec<i32> {
        let begun = Instant::now();
        loop {
            let backends = self.backends(granted);
            if backends.len() == count {
                return backends;
            }
            assert!(begun.elapsed() < AT_ONCE, "granted = {granted}: {backends:?}, and not {count}");
        }
    }

    /// After the race: nothing is held, by anybody's word, and the lock can be had.
    fn all_is_well(&mut self, round: usize) {
        assert!(!is_open(&self.lock.lost()) && self.lock.term().is_none(), "round {round}: said to be held");
        self.becomes_count(true, 0);
        self.becomes_count(false, 0);
        let begun = Instant::now();
        self.lock
            .try_lock(&Context::timeout(AT_ONCE))
            .unwrap_or_else(|error| panic!("round {round}: {error}"));
        self.longest = self.longest.max(begun.elapsed());
        assert!(self.lock.term().is_some());
        assert_eq!(self.backends(true).len(), 1, "round {round}: held by the server's word");
        self.lock.release().unwrap();
        assert_eq!(self.backends(true), [0; 0], "round {round}: a release that was confirmed is one");
    }
}

/// How often each came first, and how the call that raced ended.
type Outcomes = BTreeMap<String, usize>;

fn outcome<T>(result: Result<T, Error>) -> String {
    result.map_or_else(|error| format!("{:?}", error.kind()), |_| "Ok".to_owned())
}

/// Plays a thousand rounds, in several threads. `aim` is for the first of them.
fn play(what: &str, aim: u64, round: fn(&mut Bench, usize, Duration) -> (First, String)) {
    let server = Server::builder().max_connections(100).start().unwrap();
    let database = server.database().unwrap();
    let workers: Vec<_> = (0..WORKERS)
        .map(|worker| {
            let mut bench = Bench::new(&database, worker);
            begin(move || {
                let (mut aim, mut outcomes) = (Aim::microseconds(aim), Outcomes::new());
                for number in 0..ROUNDS.div_ceil(WORKERS) {
                    let pause = aim.pause(&mut bench.dice);
                    let (first, outcome) = round(&mut bench, number, pause);
                    aim.learn(first);
                    *outcomes.entry(format!("{first:?} first, {outcome}")).or_default() += 1;
                    bench.all_is_well(number);
                }
                (outcomes, bench.longest)
            })
        })
        .collect();
    let mut all = Outcomes::new();
    let mut longest = Duration::ZERO;
    for worker in workers {
        let (outcomes, longest_here) = worker.get_within(Duration::from_secs(300));
        longest = longest.max(longest_here);
        for (outcome, count) in outcomes {
            *all.entry(outcome).or_default() += count;
        }
    }
    println!("{what}: {all:?}; the next had the lock within {longest:.1?}");
    for first in [First::Ours, First::Theirs] {
        let begins = format!("{first:?}");
        let won: usize =
            all.iter().filter(|(outcome, _)| outcome.starts_with(&begins)).map(|(_, count)| count).sum();
        assert!(won >= ROUNDS / 10, "{what}: {won} rounds with {first:?} first are no race");
    }
}

#[test]
fn a_release_races_with_a_loss() {
    // The loss takes longer than the kill, so it begins earlier on average.
    play("release and loss", 1_500, |bench, round, before_release| {
        bench.lock.lock(&soon()).unwrap();
        let lost = bench.lock.lost();
        let backend = bench.backends(true)[0];
        let mut killer = Client::connect(&bench.url, NoTls).unwrap();
        let statement = killer.prepare("SELECT pg_terminate_backend($1)").unwrap();
        let barrier = Arc::new(Barrier::new(2));
        let before_kill = bench.dice.microseconds(400);
        let there = Arc::clone(&barrier);
        let killing = begin(move || {
            there.wait();
            pause(before_kill);
            killer.query_one(&statement, &[&backend]).unwrap();
        });
        barrier.wait();
        pause(before_release);
        let first = if is_open(&lost) { First::Ours } else { First::Theirs };
        let released = bench.lock.release();
        assert!(!is_open(&lost), "round {round}");
        if let Err(error) = &released {
            assert_eq!(error.kind(), ErrorKind::UnlockFailed, "round {round}: {error}");
        }
        killing.get();
        (first, outcome(released))
    });
}

/// The session of a claim that was lost has been replaced by one that asks, or waits, or has the lock again.
#[test]
fn a_release_races_with_the_lock_coming_back() {
    play("release and return", 12_000, |bench, round, before_release| {
        bench.lock.lock(&soon()).unwrap();
        let lost = bench.lock.lost();
        let backend = bench.backends(true)[0];
        bench.operator.query_one("SELECT pg_terminate_backend($1)", &[&backend]).unwrap();
        common::hear(&lost);
        pause(before_release);
        let first = if bench.lock.term().is_none() { First::Ours } else { First::Theirs };
        let released = bench.lock.release();
        assert!(released.is_ok(), "round {round}: {released:?}");
        (first, outcome(released))
    });
}

#[test]
fn the_end_of_a_wait_races_with_the_grant() {
    play("release and grant", 800, |bench, round, before_end| {
        let mut holder = Client::connect(&bench.url, NoTls).unwrap();
        holder.execute("SELECT pg_advisory_lock($1)", &[&bench.number]).unwrap();
        let unlock = holder.prepare("SELECT pg_advisory_unlock($1)").unwrap();
        let (context, canceller) = Context::timeout(AT_ONCE).with_cancel();
        let scoped = round % 2 == 0;
        let lock = Arc::clone(&bench.lock);
        // Either a claim that another thread releases, or a guard whose wait is cancelled.
        let waiting =
            begin(
                move || {
                    if scoped { lock.acquire(&context).map(Some) } else { lock.lock(&context).map(|()| None) }
                },
            );
        bench.becomes_count(false, 1);
        let barrier = Arc::new(Barrier::new(2));
        let before_unlock = bench.dice.microseconds(800);
        let number = bench.number;
        let there = Arc::clone(&barrier);
        let unlocking = begin(move || {
            there.wait();
            pause(before_unlock);
            assert!(holder.query_one(&unlock, &[&number]).unwrap().get::<_, bool>(0));
        });
        barrier.wait();
        pause(before_end);
        if scoped {
            canceller.cancel();
        } else {
            bench.lock.release().unwrap_or_else(|error| panic!("round {round}: {error}"));
            assert!(bench.lock.term().is_none() && !is_open(&bench.lock.lost()), "round {round}");
        }
        let ended = waiting.get();
        if let Ok(Some(guard)) = &ended {
            assert!(is_open(guard.lost()), "round {round}");
            assert_eq!(bench.backends(true).len(), 1, "round {round}: held by the server's word");
        }
        unlocking.get();
        let first = if ended.is_err() { First::Ours } else { First::Theirs };
        (first, format!("{}: {}", if scoped { "guard" } else { "claim" }, outcome(ended)))
    });
}

/// Stopping a manager is a release of all its claims.
#[test]
fn a_stop_races_with_grants() {
    let server = Server::builder().max_connections(100).start().unwrap();
    let database = server.database().unwrap();
    let mut operator = database.client().unwrap();
    let mut dice = Dice(5);
    let mut unconfirmed = 0;
    for round in 0..100 {
        let manager = started(Config::from_url(&database.url()).unwrap());
        let mut holder = Client::connect(&database.url(), NoTls).unwrap();
        let locks: Vec<_> = (0..10_i64)
            .map(|number| {
                holder.execute("SELECT pg_advisory_lock($1)", &[&number]).unwrap();
                let lock = manager.lock(number).unwrap();
                drop(common::wait_in_thread(&lock));
                lock
            })
            .collect();
        let mut count = |condition: &str| {
            let query = format!(
                "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND {condition} AND database =
                 (SELECT oid FROM pg_database WHERE datname = current_database())"
            );
            operator.query_one(&query, &[]).unwrap().get::<_, i64>(0)
        };
        common::becomes("the queue", &10, || count("NOT granted"));
        let before_stop = dice.microseconds(3_000);
        thread::scope(|scope| {
            scope.spawn(move || {
                holder.batch_execute("SELECT pg_advisory_unlock_all()").unwrap();
            });
            pause(before_stop);
            match dsync::SyncManager::stop(&manager) {
                // A machine that is too busy does not confirm a release in time. Its session is closed then, which frees the lock.
                Err(error) if error.kind() == ErrorKind::UnlockFailed && unconfirmed < 3 => {
                    println!("round {round}: {error}");
                    unconfirmed += 1;
                }
                outcome => outcome.unwrap_or_else(|error| panic!("round {round}: {error}")),
            }
        });
        assert!(locks.iter().all(|lock| lock.term().is_none()));
        common::becomes("the locks", &0, || count("true"));
    }
}
