//! What the library costs above the driver used by hand: lock and release, and the hand-over to a waiter.
//!
//! Each round measures every contender once, so that whatever else the machine does hits all of them alike; the figures
//! to look at are the ratios.

mod kit;

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::bounded;
use dsync::{CatalogMode, Context, Lock, LockOptions, PostgresManager, json_valuer};
use kit::raw::{self, Raw, Watcher};
use kit::{Bench, Contender, Plan, Row, Target, interleave, micros, time};

/// Keys of the driver by hand.
const KEY: i64 = 4711;
const KEY_WITH_ROW: i64 = 4712;

/// Long enough never to end a call here.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a pair is to reach without the catalog, and with it. The hand-over is to reach the first, catalog or not.
const PLAIN: Target = Target::Ratio(1.10);
const WITH_ROW: Target = Target::Ratio(1.5);

/// How an application begins to hold the lock.
#[derive(Clone, Copy)]
enum Call {
    Lock,
    LockWithDeadline,
    TryLock,
}

impl Call {
    /// The context is made each time, as an application makes it.
    fn make(self, lock: &Arc<dyn Lock>) {
        match self {
            Self::Lock => lock.lock(&Context::background()),
            Self::LockWithDeadline => lock.lock(&Context::timeout(PATIENCE)),
            Self::TryLock => lock.try_lock(&Context::timeout(PATIENCE)),
        }
        .expect("the lock");
    }
}

fn main() {
    let mut bench = Bench::start("floor");
    let server = kit::server();
    let database = server.database().expect("a database");
    pairs(&mut bench, &database.url());
    hand_overs(&mut bench, &database.url());
    bench.finish();
}

fn managers(url: &str) -> [PostgresManager; 2] {
    [CatalogMode::None, CatalogMode::Automatic].map(|mode| kit::manager(url, mode, 2))
}

/// The lock of the bench. With a catalog it has an annotation: a row is to hold all that a row can.
fn lock(manager: &PostgresManager) -> Arc<dyn Lock> {
    let annotation = json_valuer(&serde_json::json!({ "host": "db-7", "pid": 4711 })).expect("a valuer");
    manager.lock("bench", LockOptions::new().valuer(annotation)).expect("a lock")
}

fn pairs(bench: &mut Bench, url: &str) {
    let plan = bench.choose(
        Plan { repetitions: 7, rounds: 1_000, warm_up: 200 },
        Plan { repetitions: 3, rounds: 50, warm_up: 20 },
    );
    let managers = managers(url);
    let [plain, with_row] = managers.each_ref().map(lock);
    let by_hand = |mut raw: Raw, key: i64| {
        move || {
            let taken = time(|| {
                raw.lock(key);
                raw.unlock(key);
            });
            [micros(taken)]
        }
    };
    let ours = |lock: &Arc<dyn Lock>, call: Call| {
        let lock = Arc::clone(lock);
        move || {
            let taken = time(|| {
                call.make(&lock);
                lock.release().expect("the release");
            });
            [micros(taken)]
        }
    };
    let [[floor], [row_floor], [plain], [plain_deadline], [plain_try], [row], [row_deadline], [row_try]] =
        interleave(
            plan,
            [
                Contender::new(raw::NAME, by_hand(Raw::connect(url), KEY)),
                Contender::new(raw::NAME_WITH_ROW, by_hand(Raw::with_row(url, KEY_WITH_ROW), KEY_WITH_ROW)),
                Contender::new("dsync", ours(&plain, Call::Lock)),
                Contender::new("dsync", ours(&plain, Call::LockWithDeadline)),
                Contender::new("dsync", ours(&plain, Call::TryLock)),
                Contender::new("dsync", ours(&with_row, Call::Lock)),
                Contender::new("dsync", ours(&with_row, Call::LockWithDeadline)),
                Contender::new("dsync", ours(&with_row, Call::TryLock)),
            ],
        );
    bench.heading("lock and release, nobody else there");
    for (what, ours, target) in [
        ("lock + release, no catalog", &plain, PLAIN),
        ("lock with a deadline + release, no catalog", &plain_deadline, PLAIN),
        ("try_lock + release, no catalog", &plain_try, PLAIN),
        ("lock + release, with token and row", &row, WITH_ROW),
        ("lock with a deadline + release, with token and row", &row_deadline, WITH_ROW),
        ("try_lock + release, with token and row", &row_try, WITH_ROW),
    ] {
        bench.row(Row::compared(what, "µs", &floor, ours, Some(target)));
    }
    // What of it is the row, and what is ours.
    let what = "lock + release, with token and row, beside the least that writes them";
    bench.row(Row::compared(what, "µs", &row_floor, &row, None));
}

fn hand_overs(bench: &mut Bench, url: &str) {
    let plan = bench.choose(
        Plan { repetitions: 7, rounds: 150, warm_up: 20 },
        Plan { repetitions: 3, rounds: 10, warm_up: 3 },
    );
    // Holder and waiter are two processes in life, so they have a manager each.
    let pairs_of_managers = [managers(url), managers(url)];
    let [holders, waiters] = pairs_of_managers.each_ref().map(|managers| managers.each_ref().map(lock));
    let ours = |mode: usize, call: Call| {
        let (holder, waiter) = (Arc::clone(&holders[mode]), Arc::clone(&waiters[mode]));
        let mut watcher = Watcher::connect(url);
        move || {
            call.make(&holder);
            let wait = |granted: &dyn Fn()| {
                call.make(&waiter);
                granted();
                waiter.release().expect("the release");
            };
            let taken = hand_over(&mut watcher, || holder.release().expect("the release"), wait);
            [micros(taken)]
        }
    };
    let by_hand = |[mut holder, mut waiter]: [Raw; 2], key: i64| {
        let mut watcher = Watcher::connect(url);
        move || {
            holder.lock(key);
            let waiter = &mut waiter;
            let wait = move |granted: &dyn Fn()| {
                waiter.lock(key);
                granted();
                waiter.unlock(key);
            };
            let taken = hand_over(&mut watcher, || holder.unlock(key), wait);
            [micros(taken)]
        }
    };
    let [[floor], [row_floor], [plain], [plain_deadline], [row], [row_deadline]] = interleave(
        plan,
        [
            Contender::new(raw::NAME, by_hand([(); 2].map(|()| Raw::connect(url)), KEY)),
            Contender::new(
                raw::NAME_WITH_ROW,
                by_hand([(); 2].map(|()| Raw::with_row(url, KEY_WITH_ROW)), KEY_WITH_ROW),
            ),
            Contender::new("dsync", ours(0, Call::Lock)),
            Contender::new("dsync", ours(0, Call::LockWithDeadline)),
            Contender::new("dsync", ours(1, Call::Lock)),
            Contender::new("dsync", ours(1, Call::LockWithDeadline)),
        ],
    );
    bench.heading("hand-over: the holder's release is called -> the waiter's lock has returned");
    for (what, ours) in [
        ("hand-over, no catalog", &plain),
        ("hand-over to a waiter with a deadline, no catalog", &plain_deadline),
        ("hand-over, with token and row", &row),
        ("hand-over to a waiter with a deadline, with token and row", &row_deadline),
    ] {
        bench.row(Row::compared(what, "µs", &floor, ours, Some(PLAIN)));
    }
    let what = "hand-over, with token and row, beside the least that writes them";
    bench.row(Row::compared(what, "µs", &row_floor, &row, None));
}

/// The time from the holder's release to the waiter's lock. The lock is held when this begins, and free at its end.
/// `wait` is to take the lock, say so, and give it back.
fn hand_over(watcher: &mut Watcher, release: impl FnOnce(), wait: impl FnOnce(&dyn Fn()) + Send) -> Duration {
    thread::scope(|scope| {
        let (done, granted) = bounded(1);
        scope.spawn(move || wait(&|| done.send(Instant::now()).expect("the bench")));
        watcher.wait_for_waiter();
        let released = Instant::now();
        release();
        granted.recv().expect("the waiter") - released
    })
}
