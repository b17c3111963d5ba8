//! How soon the loss of a lock is told: the time from `pg_terminate_backend` to a closed channel, over TCP and over a
//! Unix socket, and to the lock in hand again; on a machine at rest, and with all its processors kept busy. The floor is a
//! thread that does nothing but wait for its session's end.

mod kit;

use std::hint::spin_loop;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::bounded;
use dsync::{CatalogMode, Context, Lock};
use kit::raw;
use kit::{Bench, Contender, Plan, Row, Target, interleave, millis};
use postgres::fallible_iterator::FallibleIterator;
use postgres::{Client, Statement};
use support::{Database, Server};

/// The locks of the driver by hand and of the library never meet.
const RAW_KEY: i64 = 1;
const OUR_KEY: i64 = 2;

/// Whoever is to hear of the loss has gone to sleep by then.
const SETTLING: Duration = Duration::from_millis(3);

/// For the closed channel.
const TARGET: Target = Target::P99(5.0);
const TARGET_WHEN_BUSY: Target = Target::P99(10.0);

/// The processors are not kept busy for longer, whatever happens.
const BUSY_AT_MOST: Duration = Duration::from_secs(300);

fn main() {
    let mut bench = Bench::start("loss");
    let server: Server = kit::server();
    let database = server.database().expect("a database");
    for (way, url) in [("TCP", database.url()), ("Unix socket", database.unix_url())] {
        losses(&mut bench, &database, way, &url, TARGET);
        let way = format!("{way}, all processors busy");
        with_busy_processors(|| losses(&mut bench, &database, &way, &url, TARGET_WHEN_BUSY));
    }
    bench.finish();
}

/// Does it while a thread for each processor does nothing but to use it up.
fn with_busy_processors(run: impl FnOnce()) {
    /// Also after a panic.
    struct Over<'a>(&'a AtomicBool);
    impl Drop for Over<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let is_over = AtomicBool::new(false);
    let until = Instant::now() + BUSY_AT_MOST;
    thread::scope(|scope| {
        let _over = Over(&is_over);
        for _ in 0..thread::available_parallelism().map_or(1, |count| count.get()) {
            scope.spawn(|| {
                while !is_over.load(Ordering::Relaxed) && Instant::now() < until {
                    spin_loop();
                }
            });
        }
        run();
        assert!(Instant::now() < until, "the processors were busy to the end");
    });
}

fn losses(bench: &mut Bench, database: &Database<'_>, way: &str, url: &str, target: Target) {
    let plan = bench.choose(
        Plan { repetitions: 5, rounds: 100, warm_up: 10 },
        Plan { repetitions: 3, rounds: 5, warm_up: 2 },
    );
    let manager = kit::manager(url, CatalogMode::Automatic, 1);
    let lock = manager.lock(OUR_KEY).expect("a lock");
    let [[raw_told, raw_back], [told, back]] = interleave(
        plan,
        [
            Contender::new("the driver by hand, blocked in blocking_iter", {
                let mut operator = Operator::connect(database);
                move || by_hand(&mut operator, url)
            }),
            Contender::new("dsync", {
                let mut operator = Operator::connect(database);
                move || by_library(&mut operator, &lock)
            }),
        ],
    );
    bench.heading(&format!("from pg_terminate_backend, over {way}"));
    let what = format!("backend terminated → loss told, {way}");
    bench.row(Row::compared(what, "ms", &raw_told, &told, Some(target)));
    let what = format!("backend terminated → lock held again, {way}");
    bench.row(Row::compared(what, "ms", &raw_back, &back, None));
}

/// From the call that ends the session to the end of a read that waits, and to the lock in another session.
fn by_hand(operator: &mut Operator, url: &str) -> [f64; 2] {
    let mut client = raw::hold(url, RAW_KEY);
    let (tell, told) = bounded(1);
    let holder = thread::spawn(move || {
        // The end of the connection is the end of the notifications, or an error.
        while let Ok(Some(_)) = client.notifications().blocking_iter().next() {}
        let lost = Instant::now();
        assert!(client.is_closed(), "the session has ended");
        tell.send(lost).expect("the bench");
    });
    let begun = operator.terminate_holder(RAW_KEY);
    let lost: Instant = told.recv().expect("the holder");
    let again = raw::hold(url, RAW_KEY);
    let back = begun.elapsed();
    holder.join().expect("the holder");
    again.close().expect("the end");
    [millis(lost - begun), millis(back)]
}

fn by_library(operator: &mut Operator, lock: &Arc<dyn Lock>) -> [f64; 2] {
    lock.lock(&Context::background()).expect("the lock");
    let lost = lock.lost();
    let listener = thread::spawn(move || {
        lost.recv().expect_err("the loss");
        Instant::now()
    });
    let begun = operator.terminate_holder(OUR_KEY);
    let told = listener.join().expect("the listener");
    lock.lock(&Context::background()).expect("the lock again");
    let back = begun.elapsed();
    lock.release().expect("the release");
    [millis(told - begun), millis(back)]
}

/// Somebody who ends sessions.
struct Operator {
    client: Client,
    holder: Statement,
    terminate: Statement,
}

impl Operator {
    fn connect(database: &Database<'_>) -> Self {
        let mut client = database.client().expect("a session");
        let holder = client
            .prepare(
                "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND granted AND objsubid = 1 \
                 AND (classid::bigint << 32 | objid::bigint) = $1 \
                 AND database = (SELECT oid FROM pg_database WHERE datname = current_database())",
            )
            .expect("a statement");
        let terminate = client.prepare("SELECT pg_terminate_backend($1)").expect("a statement");
        Self { client, holder, terminate }
    }

    /// Ends the session that holds the lock, and says when it was told to end.
    fn terminate_holder(&mut self, key: i64) -> Instant {
        let backend: i32 = self.client.query_one(&self.holder, &[&key]).expect("a holder").get(0);
        thread::sleep(SETTLING);
        let begun = Instant::now();
        let row = self.client.query_one(&self.terminate, &[&backend]).expect("its end");
        assert!(row.get::<_, bool>(0), "there was a session to end");
        begun
    }
}
