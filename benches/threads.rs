//! Many threads of one process: how many times a second a lock is taken and given back, by all together, where they share
//! one lock, and where each has its own.
//!
//! Guards keep threads apart, first come, first served. By hand those that share a lock take turns at a mutex, since a session
//! serves one statement at a time; a mutex lets whoever is awake go first.

mod kit;

use std::sync::{Arc, Barrier, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use dsync::{CatalogMode, Lock, PostgresManager};
use kit::raw::{self, Raw};
use kit::{Bench, Contender, Place, Plan, Row, interleave, processors};
use support::Server;

const THREADS: [usize; 3] = [2, 8, 32];

/// Keys of the driver by hand, with a row; the others are one less than the number of the thread.
const KEYS_WITH_ROW: i64 = 1_000_000;

/// Long enough never to end a call here.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a thread does again and again.
type Pair<'a> = Box<dyn FnMut() + Send + 'a>;

fn main() {
    let mut bench = Bench::start("threads");
    // One statement at a time: where it runs is the scheduler's choice, as in `floor`.
    let bound = processors::on_one(|| share(&mut bench, Place::OneProcessor));
    if !bound || processors::are_several() {
        share(&mut bench, Place::AllProcessors);
    }
    // Statements of many sessions, which are to have all processors.
    each_its_own(&mut bench);
    bench.finish();
}

fn plan(bench: &Bench) -> (Plan, Duration) {
    let plan = bench.choose(
        Plan { repetitions: 11, rounds: 1, warm_up: 0 },
        Plan { repetitions: 1, rounds: 1, warm_up: 0 },
    );
    // Short, and often in turn: whatever else the machine does hits all alike.
    (plan, bench.choose(Duration::from_millis(200), Duration::from_millis(100)))
}

/// All threads want one lock, through one handle.
fn share(bench: &mut Bench, place: Place) {
    let (plan, time) = plan(bench);
    let server = kit::server();
    let database = server.database().expect("a database");
    let url = database.url();
    let [plain, with_row] =
        [CatalogMode::None, CatalogMode::Automatic].map(|mode| kit::manager(&url, mode, 2));
    let by_hand = [(Raw::connect(&url), 0), (Raw::with_row(&url, KEYS_WITH_ROW), KEYS_WITH_ROW)]
        .map(|(raw, key)| (Mutex::new(raw), key));
    let ours = [&plain, &with_row].map(|manager| lock(manager, "bench"));
    bench.heading(&place.heading("threads that share one lock"));
    for threads in THREADS {
        let by_hand = |mode: usize, name| {
            let (raw, key) = &by_hand[mode];
            let pair = move || -> Pair<'_> { Box::new(move || raw.lock().expect("its turn").pair(*key)) };
            Contender::new(name, move || [pairs_per_second(time, (0..threads).map(|_| pair()).collect())])
        };
        let ours = |mode: usize| {
            let lock = &ours[mode];
            let pair = move || -> Pair<'_> { Box::new(move || take_and_give_back(lock)) };
            Contender::new("dsync", move || [pairs_per_second(time, (0..threads).map(|_| pair()).collect())])
        };
        let [[raw], [raw_row], [plain], [row]] =
            interleave(plan, [by_hand(0, raw::NAME), by_hand(1, raw::NAME_WITH_ROW), ours(0), ours(1)]);
        let mut compare = |mode: &str, floor, ours| {
            let what = place.name(&format!("one lock, {threads} threads, {mode}"));
            bench.row(Row::compared(what, "pairs/s", floor, ours, None));
        };
        compare("no catalog", &raw, &plain);
        compare("with token and row", &raw_row, &row);
    }
}

/// Each thread has a lock of its own, and so a session.
fn each_its_own(bench: &mut Bench) {
    let (plan, time) = plan(bench);
    // All contenders keep their sessions.
    let server = kit::start(Server::builder().max_connections(200));
    let database = server.database().expect("a database");
    let url = database.url();
    bench.heading("threads with a lock each");
    for threads in THREADS {
        let sessions = u32::try_from(threads).expect("a small number");
        let managers =
            [CatalogMode::None, CatalogMode::Automatic].map(|mode| kit::manager(&url, mode, sessions));
        let numbers = || 0..i64::try_from(threads).expect("a small number");
        let mut plain: Vec<_> = numbers().map(|number| (Raw::connect(&url), number)).collect();
        let mut with_row: Vec<_> = numbers()
            .map(|number| KEYS_WITH_ROW + number)
            .map(|key| (Raw::with_row(&url, key), key))
            .collect();
        let locks = managers.each_ref().map(|manager| {
            numbers().map(|number| lock(manager, &format!("bench {number}"))).collect::<Vec<_>>()
        });
        let ours = |mode: usize| {
            let locks = &locks[mode];
            Contender::new("dsync", move || {
                let pair = |lock| -> Pair<'_> { Box::new(move || take_and_give_back(lock)) };
                [pairs_per_second(time, locks.iter().map(pair).collect())]
            })
        };
        let [[raw], [raw_row], [plain], [row]] = interleave(
            plan,
            [
                Contender::new(raw::NAME, || [by_hand(time, &mut plain)]),
                Contender::new(raw::NAME_WITH_ROW, || [by_hand(time, &mut with_row)]),
                ours(0),
                ours(1),
            ],
        );
        let mut compare = |mode: &str, floor, ours| {
            let what = format!("{threads} locks, a thread each, {mode}");
            bench.row(Row::compared(what, "pairs/s", floor, ours, None));
        };
        compare("no catalog", &raw, &plain);
        compare("with token and row", &raw_row, &row);
    }
}

fn lock(manager: &PostgresManager, key: &str) -> Arc<dyn Lock> {
    manager.lock_with(key, kit::annotated()).expect("a lock")
}

/// As the README has it.
fn take_and_give_back(lock: &Arc<dyn Lock>) {
    let guard = lock.acquire(PATIENCE).expect("the lock");
    guard.release().expect("the release");
}

fn by_hand(time: Duration, sessions: &mut [(Raw, i64)]) -> f64 {
    let mut threads: Vec<Pair<'_>> = Vec::new();
    for (raw, key) in sessions {
        threads.push(Box::new(|| raw.pair(*key)));
    }
    pairs_per_second(time, threads)
}

/// How many pairs a second all threads have done together, of those that were over before the time was. They begin together,
/// after a pair each to warm up.
fn pairs_per_second(time: Duration, mut threads: Vec<Pair<'_>>) -> f64 {
    threads.iter_mut().for_each(|pair| pair());
    let start = Barrier::new(threads.len());
    let count = |mut pair: Pair<'_>| {
        start.wait();
        let end = Instant::now() + time;
        let mut count = 0_u32;
        loop {
            pair();
            if Instant::now() >= end {
                return count;
            }
            count += 1;
        }
    };
    let counts: u32 = thread::scope(|scope| {
        let threads: Vec<_> = threads.into_iter().map(|pair| scope.spawn(|| count(pair))).collect();
        threads.into_iter().map(|thread| thread.join().expect("its pairs")).sum()
    });
    f64::from(counts) / time.as_secs_f64()
}
