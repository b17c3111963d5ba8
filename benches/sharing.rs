//! Ten thousand locks on one session: time to acquire them, by one thread and by many; what 64 threads do in a second that take and
//! give back locks of their own; what the locks cost while they are held; and how soon they are back when the session was lost.
//!
//! The floor of a lock on a shared session is one on the driver's, warm, with prepared statements, for all locks one session: no library on that driver
//! could do with less, one by one. The floor of what many threads do is a session for each.

mod kit;

use std::mem;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use dsync::{CatalogMode, Config, Context, Lock, PostgresManager, SyncManager};
use kit::raw::{self, Raw};
use kit::worker::{Worker, orders, say_figures, wait_for_the_end};
use kit::{Bench, Contender, Plan, Row, Series, Target, interleave};
use parking_lot::Mutex;
use support::{Database, Server, Shutdown, process};

/// Threads that take and give back locks at once.
const THREADS: u32 = 64;

/// How long they do.
const FOR: Duration = Duration::from_secs(2);

/// Of the default lease, two heartbeats.
const IDLE: Duration = Duration::from_millis(7_500);

/// The figures of a worker that holds: acquired, memory, descriptors, threads, processor time, lost and held again, stopped.
const FIGURES: usize = 7;

/// The keys of the driver by hand, apart from the library's.
const FIRST_KEY: i64 = 1_000_000;

fn main() {
    if let Some((url, arguments)) = orders() {
        return work(&url, &arguments);
    }
    let mut bench = Bench::start("sharing");
    let most = bench.choose(10_000_u32, 1_000);
    let locks = (2 * most / 100).max(64).to_string();
    let server =
        kit::start(Server::builder().max_connections(100).setting("max_locks_per_transaction", &locks));
    let database = server.database().expect("a database");
    drop(kit::manager(&database.url(), CatalogMode::Automatic, 1));
    let plan = |full| Plan { repetitions: bench.choose(full, 1), rounds: 1, warm_up: 0 };
    let (few, many) = (plan(3), plan(5));

    for (catalog, who) in [(", no catalog", "plain"), (", with token and row", "row")] {
        let [floor, ours] = interleave(
            few,
            [("raw", 1), ("ours", 1)]
                .map(|(side, threads)| worker(&database, &format!("{side}-{who}"), most, threads)),
        );
        bench.heading(&format!("{most} locks on one session{catalog}"));
        let each = |series: &[Series; FIGURES]| series[0].clone();
        let what = format!("one of {most} locks acquired, one after the other{catalog}");
        bench.row(Row::compared(what, "µs", &each(&floor), &each(&ours), Some(Target::Ratio(1.1))));
        let [_, memory, descriptors, threads, processor, back, stopped] = &ours;
        for (what, unit, series, target) in [
            ("memory of one of", "KiB", memory, Some(Target::Median(2.0))),
            ("file descriptors of one of", "descriptors", descriptors, Some(Target::Median(0.01))),
            ("threads of one of", "threads", threads, Some(Target::Median(0.01))),
            ("processor time of", "% of one core", processor, Some(Target::Median(1.0))),
            ("terminated, all lost and held again:", "s", back, None),
            ("stopped:", "s", stopped, None),
        ] {
            bench.row(Row::told(format!("{what} {most} held locks{catalog}"), unit, series, target));
        }
        let [floor, waking, ours] =
            interleave(many, [rate(&database, false, who), wake_ups(), rate(&database, true, who)]);
        let what = format!("{THREADS} threads, each with a lock of its own{catalog}");
        let target = Target::RatioAtLeast(if who == "plain" { 5.0 } else { 3.0 });
        bench.row(Row::compared(what, "pairs/s", &floor[0], &ours[0], Some(target)));
        let what = format!("{THREADS} threads, beside the least that waking them costs{catalog}");
        bench.row(Row::compared(what, "pairs/s", &waking[0], &ours[0], None));
    }
    drop(database);
    restarted(&mut bench, most, &server);
    bench.finish();
}

/// From when the server accepts sessions again until all locks are held again.
fn restarted(bench: &mut Bench, locks: u32, server: &Server) {
    let config = sharing(&server.url(), CatalogMode::None);
    let manager = PostgresManager::connect(config).expect("a server");
    let held = hold(&manager, locks);
    let plan = Plan { repetitions: bench.choose(3, 1), rounds: 1, warm_up: 0 };
    let [series] = interleave(
        plan,
        [Contender::new("dsync", || {
            server.restart(Shutdown::Fast).expect("a restart");
            let begun = Instant::now();
            wait_for_all(&held);
            [begun.elapsed().as_secs_f64()]
        })],
    );
    let what = format!("server accepts again → {locks} locks held again, no catalog");
    bench.row(Row::told(what, "s", &series[0], None));
    manager.stop().expect("the end");
}

fn sharing(url: &str, catalog: CatalogMode) -> Config {
    Config::from_url(url).expect("a URL").catalog(catalog).shared_sessions(1)
}

fn mode(who: &str) -> CatalogMode {
    if who.ends_with("plain") { CatalogMode::None } else { CatalogMode::Automatic }
}

fn hold(manager: &PostgresManager, locks: u32) -> Vec<Arc<dyn Lock>> {
    (0..locks)
        .map(|number| {
            let lock = manager.lock(i64::from(number)).expect("a lock");
            lock.lock(&Context::timeout(Duration::from_secs(60))).expect("the lock");
            lock
        })
        .collect()
}

fn wait_for_all(locks: &[Arc<dyn Lock>]) {
    support::wait_for("all locks", Duration::from_secs(60), || {
        locks.iter().all(|lock| lock.is_held()).then_some(())
    })
    .expect("they come back");
}

/// A process that takes so many locks and holds them.
fn worker<'a>(database: &'a Database<'_>, who: &str, locks: u32, threads: u32) -> Contender<'a, FIGURES> {
    let name = match who {
        "raw-plain" => raw::NAME,
        "raw-row" => raw::NAME_WITH_ROW,
        _ => "dsync",
    };
    let arguments = [who.to_owned(), locks.to_string(), threads.to_string()];
    Contender::new(name, move || {
        let mut worker = Worker::start(&database.url(), &arguments);
        let figures = worker.figures();
        worker.end();
        figures
    })
}

fn work(url: &str, arguments: &[String]) {
    let [who, locks, _] = arguments else { panic!("{arguments:?}") };
    let locks = locks.parse().expect("a number");
    let figures = if who.starts_with("raw") { by_hand(url, who, locks) } else { by_library(url, who, locks) };
    say_figures(&figures);
    wait_for_the_end();
}

fn by_hand(url: &str, who: &str, locks: u32) -> [f64; FIGURES] {
    let last = FIRST_KEY + i64::from(locks);
    let mut raw = match mode(who) {
        CatalogMode::None => Raw::connect(url),
        _ => Raw::with_row_each(url, FIRST_KEY..=last),
    };
    (0..100).for_each(|_| raw.pair(last));
    let begun = Instant::now();
    (FIRST_KEY..last).for_each(|key| raw.lock(key));
    let each = kit::micros(begun.elapsed()) / f64::from(locks);
    let mut figures = [0.0; FIGURES];
    figures[0] = each;
    figures
}

fn by_library(url: &str, who: &str, locks: u32) -> [f64; FIGURES] {
    let manager = PostgresManager::connect(sharing(url, mode(who))).expect("a server");
    let first = manager.lock("the first").expect("a lock");
    for _ in 0..100 {
        first.lock(&Context::background()).expect("the lock");
        first.release().expect("its end");
    }
    // The handles are the application's; what is measured is what a lock costs that is held.
    let handles: Vec<_> = (0..locks).map(|number| manager.lock(i64::from(number)).expect("a lock")).collect();
    first.lock(&Context::background()).expect("the lock");
    let usage = || {
        let own = process::own();
        let known = |figure: Option<usize>| figure.unwrap_or_default() as f64;
        let memory = process::proportional_bytes(own).unwrap_or_default() as f64 / 1024.0;
        [memory, known(process::descriptors(own)), known(process::threads(own))]
    };
    let before = usage();
    let begun = Instant::now();
    let wait = Context::timeout(Duration::from_secs(600));
    handles.iter().for_each(|lock| lock.lock(&wait).expect("the lock"));
    let each = kit::micros(begun.elapsed()) / f64::from(locks);
    let after = usage();
    let [memory, descriptors, threads] =
        [0, 1, 2].map(|index| (after[index] - before[index]) / f64::from(locks));
    let used = process::own_cpu_time();
    thread::sleep(IDLE);
    let processor = 100.0 * process::own_cpu_time().saturating_sub(used).as_secs_f64() / IDLE.as_secs_f64();
    let lost = handles[0].lost();
    let mut operator = raw::connect(url);
    let begun = Instant::now();
    operator
        .execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
             WHERE datname = current_database() AND pid <> pg_backend_pid() AND application_name LIKE 'dsync (%'",
            &[],
        )
        .expect("the end of a session");
    lost.recv().expect_err("the loss");
    wait_for_all(&handles);
    let back = begun.elapsed().as_secs_f64();
    let begun = Instant::now();
    manager.stop().expect("the end");
    [each, memory, descriptors, threads, processor, back, begun.elapsed().as_secs_f64()]
}

/// How many pairs threads do in a second, each with a lock of its own.
fn rate<'a>(database: &'a Database<'_>, shares: bool, who: &'static str) -> Contender<'a, 1> {
    let name = match (shares, who) {
        (true, _) => "dsync",
        (false, "plain") => "the driver by hand, 64 sessions",
        (false, _) => "the driver by hand, with a row, 64 sessions",
    };
    Contender::new(name, move || {
        let url = database.url();
        let manager = shares.then(|| PostgresManager::connect(sharing(&url, mode(who))).expect("a server"));
        [pairs_in_a_second(|number| match &manager {
            Some(manager) => {
                let lock = manager.lock(i64::from(number)).expect("a lock");
                Box::new(move || {
                    lock.lock(&Context::background()).expect("the lock");
                    lock.release().expect("its end");
                })
            }
            None => {
                let key = FIRST_KEY + i64::from(number);
                let mut raw = match mode(who) {
                    CatalogMode::None => Raw::connect(&url),
                    _ => Raw::with_row(&url, key),
                };
                Box::new(move || raw.pair(key))
            }
        })]
    })
}

/// How many pairs threads do in a second if no more is done for them than to wake them for each half of a pair: one thread answers all that
/// have asked meanwhile, and there is no database. The one of many threads that works for all costs so much in any case.
fn wake_ups<'a>() -> Contender<'a, 1> {
    Contender::new("as many threads that one wakes, no database", || {
        let (asking, is_over) = (Mutex::new(Vec::new()), AtomicBool::new(false));
        let rate = thread::scope(|scope| {
            let server = scope.spawn(|| {
                while !is_over.load(SeqCst) {
                    for (asker, is_answered) in mem::take(&mut *asking.lock()) {
                        let (asker, is_answered): (Thread, Arc<AtomicBool>) = (asker, is_answered);
                        is_answered.store(true, SeqCst);
                        asker.unpark();
                    }
                    thread::park();
                }
            });
            let rate = pairs_in_a_second(|_| {
                let is_answered = Arc::new(AtomicBool::new(false));
                let (asking, server) = (&asking, server.thread());
                let ask = move || {
                    asking.lock().push((thread::current(), Arc::clone(&is_answered)));
                    server.unpark();
                    while !is_answered.swap(false, SeqCst) {
                        thread::park();
                    }
                };
                Box::new(move || (0..2).for_each(|_| ask()))
            });
            is_over.store(true, SeqCst);
            server.thread().unpark();
            rate
        });
        [rate]
    })
}

/// How often threads do in a second what each is given by its number.
fn pairs_in_a_second<'a>(pair: impl Fn(u32) -> Box<dyn FnMut() + 'a> + Sync) -> f64 {
    let (is_over, pairs) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        for number in 0..THREADS {
            let (pair, is_over, pairs) = (&pair, &is_over, &pairs);
            scope.spawn(move || {
                let mut pair = pair(number);
                while !is_over.load(SeqCst) {
                    pair();
                    pairs.fetch_add(1, SeqCst);
                }
            });
        }
        // Sessions are opened, and statements prepared.
        thread::sleep(FOR / 2);
        let (before, begun) = (pairs.load(SeqCst), Instant::now());
        thread::sleep(FOR);
        let rate = (pairs.load(SeqCst) - before) as f64 / begun.elapsed().as_secs_f64();
        is_over.store(true, SeqCst);
        rate
    })
}
