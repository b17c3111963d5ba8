//! What held locks cost, a hundred of them and a thousand: time to acquire and to stop, processor time, memory, file
//! descriptors, threads.
//!
//! Each measurement is made in a process of its own, since an allocator that has seen other work tells another story
//! about memory. What a lock costs is the difference that all of them make to a process which already has the first one,
//! divided by their number.

mod kit;

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, bounded};
use dsync::{CatalogMode, Context, Lock, SyncManager};
use kit::raw;
use kit::worker::{Worker, orders, say_figures, wait_for_the_end};
use kit::{Bench, Contender, Plan, Row, Series, Target, interleave};
use postgres::Client;
use postgres::fallible_iterator::FallibleIterator;
use support::{Database, Server, process};

/// Threads that acquire locks where not one does it after the other.
const TOGETHER: usize = 8;

/// A quarter of the default lease: how often a holder renews it.
const HEARTBEAT: Duration = Duration::from_millis(3_750);

/// Whole heartbeats, so that each measurement sees as many of them.
const HEARTBEATS: u32 = 2;

/// How long threads may take that all begin at once.
const GRACE: Duration = Duration::from_millis(300);

/// The figures that a worker gives, in this order.
const FIGURES: usize = 6;

fn main() {
    if let Some((url, arguments)) = orders() {
        return work(&url, &arguments);
    }
    let mut bench = Bench::start("scale");
    let most = bench.choose(1_000, 200);
    let server = kit::start(Server::builder().max_connections(most + 100));
    let database = server.database().expect("a database");
    // The catalog is there, as it is in all processes but the first.
    drop(kit::manager(&database.url(), CatalogMode::Automatic, 1));
    let plan = |full| Plan { repetitions: bench.choose(full, 1), rounds: 1, warm_up: 0 };
    let (few, many) = (plan(5), plan(3));

    let [floor, ours] = interleave(few, ["raw", "ours"].map(|who| contender(&database, who, 100, 1)));
    bench.heading("100 held locks");
    costs(&mut bench, 100, &floor, &ours, true);

    let [floor, ours, plain, floor_together, ours_together] = interleave(
        many,
        [("raw", 1), ("ours", 1), ("plain", 1), ("raw", TOGETHER), ("ours", TOGETHER)]
            .map(|(who, threads)| contender(&database, who, most, threads)),
    );
    bench.heading(&format!("{most} held locks"));
    let target = Some(Target::Ratio(1.4));
    let what = format!("{most} locks acquired, one after the other");
    bench.row(Row::compared(what, "s", &floor[0], &ours[0], target));
    let what = format!("{most} locks acquired, one after the other, no catalog");
    bench.row(Row::compared(what, "s", &floor[0], &plain[0], None));
    let what = format!("{most} locks acquired, by {TOGETHER} threads");
    bench.row(Row::compared(what, "s", &floor_together[0], &ours_together[0], target));
    let what = format!("{most} locks stopped");
    let target = Some(Target::Ratio(1.3));
    bench.row(Row::compared(what, "s", &floor_together[5], &ours_together[5], target));
    costs(&mut bench, most, &floor, &ours, false);
    bench.finish();
}

/// The rows about locks that are held and idle.
fn costs(bench: &mut Bench, locks: u32, floor: &[Series; FIGURES], ours: &[Series; FIGURES], judged: bool) {
    let [_, memory, descriptors, threads, processor, _] = floor;
    let [_, our_memory, our_descriptors, our_threads, our_processor, _] = ours;
    // The targets name the locks that they are about: a hundred for the processor, and each lock for the rest.
    let target = judged.then_some(Target::Median(0.4));
    let what = format!("processor time of {locks} idle locks");
    bench.row(Row::compared(what, "% of one core", processor, our_processor, target));
    for (what, unit, floor, ours, target) in [
        ("memory", "KiB", memory, our_memory, Some(Target::Median(64.0))),
        ("file descriptors", "descriptors", descriptors, our_descriptors, Some(Target::Median(5.0))),
        ("threads", "threads", threads, our_threads, None),
    ] {
        bench.row(Row::compared(format!("{what} of one of {locks} held locks"), unit, floor, ours, target));
    }
}

fn contender<'a>(
    database: &'a Database<'_>,
    who: &'static str,
    locks: u32,
    threads: usize,
) -> Contender<'a, FIGURES> {
    let name = if who == "raw" { "the driver by hand, and a thread" } else { "dsync" };
    let mut operator = database.client().expect("a session");
    Contender::new(name, move || {
        let arguments = [who.to_owned(), locks.to_string(), threads.to_string()];
        let mut worker = Worker::start(&database.url(), &arguments);
        let figures = worker.figures();
        worker.end();
        // The next one begins when the server is done with this one.
        let sessions = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() \
                        AND backend_type = 'client backend' AND application_name <> 'dsync-test-support'";
        support::wait_for("the end of all sessions", Duration::from_secs(30), || {
            let count: i64 = operator.query_one(sessions, &[]).expect("the sessions").get(0);
            (count == 0).then_some(())
        })
        .expect("nothing stays behind");
        figures
    })
}

fn work(url: &str, arguments: &[String]) {
    let [who, locks, threads] = arguments else { panic!("{arguments:?}") };
    let (locks, threads) = (locks.parse().expect("a number"), threads.parse().expect("a number"));
    process::raise_descriptor_limit();
    let figures = match who.as_str() {
        "raw" => by_hand(url, locks, threads),
        "plain" => by_library(url, CatalogMode::None, locks, threads),
        _ => by_library(url, CatalogMode::Automatic, locks, threads),
    };
    say_figures(&figures);
    wait_for_the_end();
}

/// What this process has, that locks add to.
struct Usage {
    memory: f64,
    descriptors: f64,
    threads: f64,
}

impl Usage {
    fn now() -> Self {
        let own = process::own();
        // Elsewhere than on Linux there is no such figure.
        let known = |figure: Option<usize>| figure.unwrap_or_default() as f64;
        Self {
            memory: process::proportional_bytes(own).unwrap_or_default() as f64 / 1024.0,
            descriptors: known(process::descriptors(own)),
            threads: known(process::threads(own)),
        }
    }

    /// What each of `locks` has added.
    fn each(&self, before: &Self, locks: u32) -> [f64; 3] {
        [
            (self.memory - before.memory) / f64::from(locks),
            (self.descriptors - before.descriptors) / f64::from(locks),
            (self.threads - before.threads) / f64::from(locks),
        ]
    }
}

/// The processor time of some idle heartbeats, in percent of one core. `grace` is for heartbeats that come at the very
/// end; where they are spread over the time, as many leave at its beginning as come at its end.
fn idle(grace: Duration) -> f64 {
    let before = process::own_cpu_time();
    thread::sleep(HEARTBEAT * HEARTBEATS + grace);
    let used = process::own_cpu_time().saturating_sub(before);
    100.0 * used.as_secs_f64() / (HEARTBEAT * HEARTBEATS).as_secs_f64()
}

/// Does `acquire` for each number up to `locks`, on as many threads, and gives what it gave.
fn acquire_all<T: Send>(locks: u32, threads: usize, acquire: impl Fn(u32) -> T + Sync) -> (Vec<T>, f64) {
    let begun = Instant::now();
    let threads = u32::try_from(threads).expect("a small number");
    let acquire = &acquire;
    let held = if threads == 1 {
        (0..locks).map(acquire).collect()
    } else {
        thread::scope(|scope| {
            let share = |thread| (thread..locks).step_by(threads as usize);
            let workers: Vec<_> = (0..threads)
                .map(|thread| scope.spawn(move || share(thread).map(acquire).collect::<Vec<_>>()))
                .collect();
            workers.into_iter().flat_map(|worker| worker.join().expect("its locks")).collect()
        })
    };
    (held, begun.elapsed().as_secs_f64())
}

fn by_library(url: &str, mode: CatalogMode, locks: u32, threads: usize) -> [f64; FIGURES] {
    let manager = kit::manager(url, mode, locks + 1);
    let take = |number: u32| -> Arc<dyn Lock> {
        let lock = manager.lock(i64::from(number)).expect("a lock");
        lock.lock(&Context::timeout(Duration::from_secs(60))).expect("the lock");
        lock
    };
    let first = take(locks);
    let before = Usage::now();
    let (held, acquired) = acquire_all(locks, threads, take);
    let [memory, descriptors, more_threads] = Usage::now().each(&before, locks);
    let processor = idle(Duration::ZERO);
    assert!(held.iter().chain([&first]).all(|lock| lock.term().is_some()), "all are held still");
    let begun = Instant::now();
    manager.stop().expect("the end");
    let stopped = begun.elapsed().as_secs_f64();
    [acquired, memory, descriptors, more_threads, processor, stopped]
}

/// Clients that are opened and hold a lock each, and then each in a thread that watches over it: waits for the end of the
/// session, and sends the server a sign of life as often as the library does.
fn by_hand(url: &str, locks: u32, threads: usize) -> [f64; FIGURES] {
    let first = raw::hold(url, i64::from(locks));
    let before = Usage::now();
    let (clients, acquired) = acquire_all(locks, threads, |number| raw::hold(url, i64::from(number)));
    let (begin, begins) = bounded::<()>(0);
    let (end, ends) = bounded::<()>(0);
    let watchers: Vec<_> = clients
        .into_iter()
        .map(|client| {
            let (begins, ends) = (begins.clone(), ends.clone());
            thread::spawn(move || watch(client, &begins, &ends))
        })
        .collect();
    // The threads are parked, or on their way there.
    thread::sleep(GRACE);
    let [memory, descriptors, more_threads] = Usage::now().each(&before, locks);
    // They all begin when the channel is closed, and end in the same way.
    drop(begin);
    let processor = idle(GRACE);
    drop(end);
    let clients: Vec<Client> = watchers.into_iter().map(|watcher| watcher.join().expect("it")).collect();
    let begun = Instant::now();
    drop((clients, first));
    let stopped = begun.elapsed().as_secs_f64();
    [acquired, memory, descriptors, more_threads, processor, stopped]
}

fn watch(mut client: Client, begins: &Receiver<()>, ends: &Receiver<()>) -> Client {
    let _ = begins.recv();
    for _ in 0..HEARTBEATS {
        let heard = client.notifications().timeout_iter(HEARTBEAT).next().expect("a session");
        assert!(heard.is_none() && !client.is_closed(), "nobody sends anything");
        client.batch_execute("").expect("an answer");
    }
    let _ = ends.recv();
    client
}
