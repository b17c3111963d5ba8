//! How soon a fresh process holds its first lock: from the call of `dsync::init`, which looks at the server and sees to
//! the catalog. The floor is a connection and the lock.

mod kit;

use std::time::{Duration, Instant};

use dsync::{CatalogMode, Config, Context, LockOptions};
use kit::raw;
use kit::worker::{Worker, orders, say_figures, wait_for_the_end};
use kit::{Bench, Contender, Plan, Row, interleave, millis};
use support::Database;

const KEY: i64 = 4711;

/// What a worker does.
const BY_HAND: &str = "raw";
const WITHOUT_CATALOG: &str = "none";
const WITH_CATALOG: &str = "automatic";

fn main() {
    if let Some((url, arguments)) = orders() {
        return work(&url, &arguments[0]);
    }
    let mut bench = Bench::start("startup");
    let plan = bench.choose(
        Plan { repetitions: 5, rounds: 20, warm_up: 3 },
        Plan { repetitions: 2, rounds: 3, warm_up: 1 },
    );
    let server = kit::server();
    let ready = server.database().expect("a database");
    drop(kit::manager(&ready.url(), CatalogMode::Automatic, 1));
    let bare = server.database().expect("a database");
    let mut janitor = bare.client().expect("a session");
    let [floor, none, there, made] = interleave(
        plan,
        [
            Contender::new(raw::NAME, || first_lock(&ready, BY_HAND)),
            Contender::new("dsync", || first_lock(&ready, WITHOUT_CATALOG)),
            Contender::new("dsync", || first_lock(&ready, WITH_CATALOG)),
            Contender::new("dsync", || {
                janitor.batch_execute("DROP SCHEMA IF EXISTS dsync CASCADE").expect("no catalog");
                first_lock(&bare, WITH_CATALOG)
            }),
        ],
    );
    bench.heading("first lock of a fresh process");
    for (what, ours) in
        [("no catalog used", none), ("catalog there already", there), ("catalog made on the way", made)]
    {
        let [floor, floor_whole] = &floor;
        let [ours, ours_whole] = &ours;
        bench.row(Row::compared(format!("init → first lock, {what}"), "ms", floor, ours, None));
        let what = format!("process started → first lock, {what}");
        bench.row(Row::compared(what, "ms", floor_whole, ours_whole, None));
    }
    bench.finish();
}

/// The time within the process, and from before its start until it is heard of.
fn first_lock(database: &Database<'_>, how: &str) -> [f64; 2] {
    let begun = Instant::now();
    let mut worker = Worker::start(&database.url(), &[how.to_owned()]);
    let [within] = worker.figures();
    let whole = millis(begun.elapsed());
    worker.end();
    [within, whole]
}

fn work(url: &str, how: &str) {
    let begun = Instant::now();
    if how == BY_HAND {
        let client = raw::hold(url, KEY);
        say_figures(&[millis(begun.elapsed())]);
        wait_for_the_end();
        drop(client);
        return;
    }
    let mode = if how == WITHOUT_CATALOG { CatalogMode::None } else { CatalogMode::Automatic };
    dsync::init(Config::from_url(url).expect("a URL").catalog(mode)).expect("a server");
    let lock = dsync::lock_with_key(KEY, LockOptions::new()).expect("a lock");
    lock.lock(&Context::timeout(Duration::from_secs(60))).expect("the lock");
    say_figures(&[millis(begun.elapsed())]);
    wait_for_the_end();
    dsync::shutdown().expect("the end");
}
