//! How soon a lock is held again after a restart of the server: from the moment that the server accepts connections, by
//! the word of somebody who does nothing but try, to the moment that the application can go on.
//!
//! `cargo bench --bench recovery [restarts]`

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use dsync::{Config, Context, Lock, LockOptions, PostgresManager, SyncManager};
use postgres::{Client, NoTls};
use support::{Server, Shutdown};

const GOAL: Duration = Duration::from_millis(100);

fn main() {
    // `cargo bench` adds an argument of its own, and so may whoever calls it.
    let restarts = std::env::args().skip(1).find_map(|argument| argument.parse().ok()).unwrap_or(30);
    let server = Server::start().expect("a server");
    println!("PostgreSQL {}, TCP on loopback, {restarts} restarts in fast mode", server.version());
    let manager = PostgresManager::new(Config::from_url(&server.url()).expect("a URL")).expect("a manager");
    manager.start().expect("the server");
    let lock = manager.lock("bench", LockOptions::new()).expect("a lock");
    lock.lock(&Context::background()).expect("the lock");

    let (mut times, mut outages): (Vec<Duration>, Vec<Duration>) =
        (0..restarts).map(|_| restart(&server, &lock)).unzip();
    times.sort();
    outages.sort();
    let at = |times: &[Duration], share: f64| times[((times.len() - 1) as f64 * share) as usize];
    println!("{:36} {:>10} {:>10} {:>10}", "", "median", "p90", "max");
    for (what, times) in
        [("the server was away for", &outages), ("server accepts -> lock held again", &times)]
    {
        println!("{what:36} {:>10.1?} {:>10.1?} {:>10.1?}", at(times, 0.5), at(times, 0.9), at(times, 1.0));
    }
    let median = at(&times, 0.5);
    println!("\ngoal: a median of at most {GOAL:?}; {}", if median <= GOAL { "reached" } else { "MISSED" });
    assert!(median <= GOAL, "median {median:?}");
}

/// How long it took the lock to come back, and how long the server was away.
fn restart(server: &Server, lock: &Arc<dyn Lock>) -> (Duration, Duration) {
    let lost = lock.lost();
    server.stop(Shutdown::Fast).expect("the end of the server");
    lost.recv().expect_err("the loss");
    let gone = Instant::now();
    thread::scope(|scope| {
        let held = scope.spawn(|| {
            lock.lock(&Context::background()).expect("the lock");
            Instant::now()
        });
        let accepts = scope.spawn(|| {
            loop {
                if Client::connect(&server.url(), NoTls).is_ok() {
                    return Instant::now();
                }
                // Without a pause it would take from the server what it measures.
                thread::sleep(Duration::from_millis(1));
            }
        });
        server.start_again().expect("the server");
        let accepts = accepts.join().expect("the probe");
        // The lock may be the first to get in.
        (held.join().expect("the lock").saturating_duration_since(accepts), accepts - gone)
    })
}
