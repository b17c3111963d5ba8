//! How soon a lock is held again after a restart of the server: from the moment that the server accepts connections, by
//! the word of somebody who does nothing but try, to the moment that the application can go on.

mod kit;

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use dsync::{Config, Context, Lock, PostgresManager, TakeoverPolicy};
use kit::raw;
use kit::{Bench, Row, Series, Target, millis};
use postgres::{Client, NoTls};
use support::{Server, Shutdown};

/// The lock of the probe is not ours.
const PROBE_KEY: i64 = 1;

/// Tokens are counted on from an era that the first session after a restart begins, in steps of 2^20 µs of the server's clock. A
/// restart within one step of the last one, some 1.05 s, waits for the clock; no server in service is restarted so often.
const APART: Duration = Duration::from_millis(1_100);

/// For the lock in hand again after a plain restart.
const TARGET: Target = Target::Median(20.0);

/// What one restart shows, counted from when the server was gone.
struct Restart {
    accepts: Duration,
    probe_holds: Duration,
    held: Duration,
}

fn main() {
    let mut bench = Bench::start("recovery");
    let server = kit::server();
    // What a takeover grace costs is no matter of speed.
    let config = Config::from_url(&server.url()).expect("a URL").max_sessions(1);
    let manager = PostgresManager::connect(config.takeover(TakeoverPolicy::Immediate)).expect("a server");
    let lock = manager.lock("bench").expect("a lock");
    lock.lock(&Context::background()).expect("the lock");
    restart(&server, &lock, Duration::ZERO);

    let restarts = bench.choose((5, 8), (2, 2));
    run(&mut bench, &server, &lock, "a restart", Duration::ZERO, restarts, Some(TARGET));
    let restarts = bench.choose((3, 4), (1, 1));
    let away = Duration::from_secs(3);
    run(&mut bench, &server, &lock, "3 s without server", away, restarts, None);
    bench.finish();
}

fn run(
    bench: &mut Bench,
    server: &Server,
    lock: &Arc<dyn Lock>,
    after: &str,
    away: Duration,
    (repetitions, rounds): (usize, usize),
    target: Option<Target>,
) {
    let probe = "the driver by hand, every millisecond";
    let mut raw_since_accepts = Series::new(probe);
    let mut since_accepts = Series::new("dsync");
    let mut raw_since_gone = Series::new(probe);
    let mut since_gone = Series::new("dsync");
    for _ in 0..repetitions {
        let all = [&mut raw_since_accepts, &mut since_accepts, &mut raw_since_gone, &mut since_gone];
        all.into_iter().for_each(Series::begin_block);
        for _ in 0..rounds {
            let Restart { accepts, probe_holds, held } = restart(server, lock, away);
            raw_since_accepts.push(millis(probe_holds - accepts));
            // The lock may be the first to get in.
            since_accepts.push(millis(held.saturating_sub(accepts)));
            raw_since_gone.push(millis(probe_holds));
            since_gone.push(millis(held));
        }
    }
    bench.heading(&format!("after {after}"));
    let what = format!("server accepts connections → lock held again, after {after}");
    bench.row(Row::compared(what, "ms", &raw_since_accepts, &since_accepts, target));
    let what = format!("server gone → lock held again, after {after}");
    bench.row(Row::compared(what, "ms", &raw_since_gone, &since_gone, None));
}

/// Restarts the server when its era is old enough, `away` after it has ended.
fn restart(server: &Server, lock: &Arc<dyn Lock>, away: Duration) -> Restart {
    thread::sleep(APART);
    let lost = lock.lost();
    server.stop(Shutdown::Fast).expect("the end of the server");
    let gone = Instant::now();
    lost.recv().expect_err("the loss");
    thread::scope(|scope| {
        let held = scope.spawn(|| {
            lock.lock(&Context::background()).expect("the lock");
            gone.elapsed()
        });
        thread::sleep(away);
        let probe = scope.spawn(|| {
            let mut client = loop {
                match Client::connect(&server.url(), NoTls) {
                    Ok(client) => break client,
                    // Without a pause it would take from the server what it measures.
                    Err(_) => thread::sleep(Duration::from_millis(1)),
                }
            };
            let accepts = gone.elapsed();
            raw::lock(&mut client, PROBE_KEY);
            (accepts, gone.elapsed())
        });
        server.start_again().expect("the server");
        let (accepts, probe_holds) = probe.join().expect("the probe");
        Restart { accepts, probe_holds, held: held.join().expect("the lock") }
    })
}
