//! Many processes, one key or a thousand: how many times a second a lock is taken and given back, by all together.
//!
//! Beside the library there are the driver by hand in as many processes, and `pgbench` with as many clients, which runs
//! the same two statements from one small program in C.
//!
//! All processors are in use: what is measured is the work for a pair, not how soon one thread is woken.

mod kit;

use std::time::{Duration, Instant};

use dsync::{CatalogMode, Context};
use fastrand::Rng;
use kit::pgbench;
use kit::raw::{self, Raw};
use kit::worker::{Worker, orders, say, say_figures, wait_for_the_end, wait_for_word};
use kit::{Bench, Contender, Plan, Row, SEED, Series, Target, interleave};
use support::{Database, Server};

const PROCESSES: [usize; 4] = [1, 4, 16, 64];
const KEYS: [i64; 2] = [1, 1_000];

/// From this many processes on, one key is held all the time: then what counts is the work for a pair and the hand-over.
const MANY: usize = 16;

/// What many processes on one key are to reach, beside the same by hand.
const TARGET: Target = Target::RatioAtLeast(0.9);

/// The keys of the driver by hand with a row are those of the others, moved up: rows that it has made are not the library's.
const WITH_ROW: i64 = 1_000_000;

/// What a worker does.
const BY_HAND: &str = "raw";
const BY_HAND_WITH_ROW: &str = "raw with a row";
const WITHOUT_CATALOG: &str = "none";
const WITH_CATALOG: &str = "automatic";

fn main() {
    if let Some((url, arguments)) = orders() {
        return work(&url, &arguments);
    }
    let mut bench = Bench::start("contention");
    let plan = bench.choose(
        Plan { repetitions: 3, rounds: 1, warm_up: 0 },
        Plan { repetitions: 1, rounds: 1, warm_up: 0 },
    );
    let seconds = bench.choose(2, 1);
    // A process that starts opens a second session for a moment, to see that it is one.
    let server = kit::start(Server::builder().max_connections(200));
    let database = server.database().expect("a database");
    drop(kit::manager(&database.url(), CatalogMode::Automatic, 1));
    for keys in KEYS {
        let named = if keys == 1 { "one key".to_owned() } else { format!("{keys} keys") };
        bench.heading(&format!("{named}, {seconds} s each"));
        for processes in PROCESSES {
            let crowd = |how: &'static str, name: &str| {
                let database = &database;
                Contender::new(name, move || crowd(database, how, processes, keys, seconds))
            };
            let [pgbench, [raw, raw_least], [raw_row, raw_row_least], [plain, plain_least], [row, row_least]] =
                interleave(
                    plan,
                    [
                        Contender::new("pgbench", || {
                            [by_pgbench(&database, processes, keys, seconds), f64::NAN]
                        }),
                        crowd(BY_HAND, raw::NAME),
                        crowd(BY_HAND_WITH_ROW, raw::NAME_WITH_ROW),
                        crowd(WITHOUT_CATALOG, "dsync"),
                        crowd(WITH_CATALOG, "dsync"),
                    ],
                );
            let what =
                format!("{named}, {processes} {}", if processes == 1 { "process" } else { "processes" });
            let target = (keys == 1 && processes >= MANY).then_some(TARGET);
            let mut compare = |what: String, unit: &str, floor: &Series, ours: &Series, target| {
                bench.row(Row::compared(what, unit, floor, ours, target));
            };
            compare(format!("{what}, no catalog"), "pairs/s", &raw, &plain, target);
            compare(format!("{what}, with token and row"), "pairs/s", &raw_row, &row, target);
            let beside_pgbench = format!("{what}, no catalog, beside pgbench");
            compare(beside_pgbench, "pairs/s", &pgbench[0], &plain, None);
            // With many keys, who gets how much is a matter of luck.
            if processes > 1 && keys == 1 {
                let unit = "of an even share";
                let who = format!("{what}, who got least");
                compare(format!("{who}, no catalog"), unit, &raw_least, &plain_least, None);
                compare(format!("{who}, with token and row"), unit, &raw_row_least, &row_least, None);
            }
        }
    }
    bench.finish();
}

/// Pairs per second of all processes together, and the part of an even share that the least served of them got.
fn crowd(database: &Database<'_>, how: &str, processes: usize, keys: i64, seconds: u32) -> [f64; 2] {
    let mut workers: Vec<Worker> = (0..processes)
        .map(|number| {
            let arguments = [how.to_owned(), number.to_string(), keys.to_string(), seconds.to_string()];
            Worker::start(&database.url(), &arguments)
        })
        .collect();
    for worker in &mut workers {
        assert_eq!(worker.hear(), "ready");
    }
    // All are ready and asleep, so that no start-up is part of the figure.
    workers.iter_mut().for_each(|worker| worker.tell("go"));
    let counts: Vec<f64> = workers.iter_mut().map(|worker| worker.figures::<1>()[0]).collect();
    workers.into_iter().for_each(Worker::end);
    let all: f64 = counts.iter().sum();
    let least = counts.iter().copied().fold(f64::INFINITY, f64::min);
    [all / f64::from(seconds), least / (all / counts.len() as f64)]
}

fn work(url: &str, arguments: &[String]) {
    let [how, number, keys, seconds] = arguments else { panic!("{arguments:?}") };
    let number: u64 = number.parse().expect("a number");
    let keys: i64 = keys.parse().expect("a number");
    let time = Duration::from_secs(seconds.parse().expect("a number"));
    let mut lots = Rng::with_seed(SEED + number);
    let mut key = || lots.i64(1..=keys);
    // A key of our own, to warm up without standing in anybody's way.
    let own = -1 - i64::try_from(number).expect("a small number");
    let count = match how.as_str() {
        BY_HAND => {
            let mut raw = Raw::connect(url);
            count(time, own, key, |key| raw.pair(key))
        }
        BY_HAND_WITH_ROW => {
            let mut raw = Raw::with_rows(url, WITH_ROW + own..=WITH_ROW + keys);
            count(time, WITH_ROW + own, || WITH_ROW + key(), |key| raw.pair(key))
        }
        _ => {
            let mode = if how == WITHOUT_CATALOG { CatalogMode::None } else { CatalogMode::Automatic };
            let manager = kit::manager(url, mode, 1);
            count(time, own, key, |key| {
                // The annotation of the driver by hand is part of the statement's text, and no work either.
                let lock = manager.lock(key).expect("a lock");
                lock.lock(&Context::timeout(Duration::from_secs(60))).expect("the lock");
                lock.release().expect("the release");
            })
        }
    };
    say_figures(&[count as f64]);
    wait_for_the_end();
}

/// How many pairs were over before the time was.
fn count(time: Duration, own: i64, mut key: impl FnMut() -> i64, mut pair: impl FnMut(i64)) -> usize {
    for _ in 0..10 {
        pair(own);
    }
    say("ready");
    assert_eq!(wait_for_word(), "go");
    let end = Instant::now() + time;
    let mut count = 0;
    loop {
        pair(key());
        if Instant::now() >= end {
            return count;
        }
        count += 1;
    }
}

/// Pairs per second of all clients together.
fn by_pgbench(database: &Database<'_>, clients: usize, keys: i64, seconds: u32) -> f64 {
    let script = format!(
        "\\set key random(1, {keys})\nSELECT pg_advisory_lock(:key);\nSELECT pg_advisory_unlock(:key);\n"
    );
    let length = format!("--time={seconds}");
    pgbench::Run { script: &script, session: pgbench::Session::Warm, clients, length, settings: "" }
        .on(database)
}
