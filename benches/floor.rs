//! What the library costs above the driver used by hand: lock and release, and the hand-over to a waiter.
//!
//! Each round measures every contender once, in turn, so that whatever else the machine does hits all of them alike; the
//! figures to look at are the ratios.

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::bounded;
use dsync::{CatalogMode, Config, Context, Lock, LockOptions, PostgresManager, SyncManager};
use postgres::{Client, NoTls};
use support::Server;

const ROUNDS: usize = 1_000;
const KEY: i64 = 4711;

fn main() {
    let server = Server::shared();
    let database = server.database().expect("a database");
    let url = database.url();
    println!("PostgreSQL {}, TCP on loopback, {ROUNDS} rounds", server.version());
    println!("\nlock + release, nobody else there");
    pairs(&url);
    println!("\nhand-over: the holder's release is called -> the waiter's lock has returned");
    hand_overs(&url);
}

fn manager(url: &str, mode: CatalogMode) -> PostgresManager {
    let config = Config::from_url(url).expect("a URL").catalog(mode);
    let manager = PostgresManager::new(config).expect("a manager");
    manager.start().expect("a server");
    manager
}

fn pairs(url: &str) {
    let mut raw = Client::connect(url, NoTls).expect("a session");
    let lock = raw.prepare("SELECT pg_advisory_lock($1)").expect("a statement");
    let unlock = raw.prepare("SELECT pg_advisory_unlock($1)").expect("a statement");
    let mut raw_pair = || {
        raw.execute(&lock, &[&KEY]).expect("the lock");
        black_box(raw.query_one(&unlock, &[&KEY]).expect("the unlock"));
    };
    let managers = [CatalogMode::None, CatalogMode::Automatic].map(|mode| manager(url, mode));
    let locks = managers.each_ref().map(|manager| manager.lock("bench", LockOptions::new()).expect("a lock"));
    let pair = |lock: &Arc<dyn Lock>| {
        lock.lock(&Context::background()).expect("the lock");
        lock.release().expect("the release");
    };
    let mut times: [Vec<Duration>; 3] = Default::default();
    for _ in 0..ROUNDS {
        times[0].push(time(&mut raw_pair));
        for (lock, times) in locks.iter().zip(&mut times[1..]) {
            times.push(time(|| pair(lock)));
        }
    }
    print(&mut times);
}

fn hand_overs(url: &str) {
    let mut times: [Vec<Duration>; 3] = Default::default();
    let [first, second] = [(); 2].map(|()| Client::connect(url, NoTls).expect("a session"));
    let mut raw = [first, second];
    let statements = raw.each_mut().map(|client| {
        ["SELECT pg_advisory_lock($1)", "SELECT pg_advisory_unlock($1)"]
            .map(|sql| client.prepare(sql).expect("it"))
    });
    let pairs_of_managers =
        [CatalogMode::None, CatalogMode::Automatic].map(|mode| [(); 2].map(|()| manager(url, mode)));
    let mut watcher = Client::connect(url, NoTls).expect("a session");
    let mut wait_for_waiter = || {
        let waits = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted";
        while watcher.query_one(waits, &[]).expect("pg_locks").get::<_, i64>(0) == 0 {}
    };
    for _ in 0..ROUNDS / 5 {
        let [holder, waiter] = &mut raw;
        holder.execute(&statements[0][0], &[&KEY]).expect("the lock");
        times[0].push(std::thread::scope(|scope| {
            let (done, granted) = bounded(1);
            let [lock, unlock] = &statements[1];
            scope.spawn(move || {
                waiter.execute(lock, &[&KEY]).expect("the lock");
                done.send(Instant::now()).expect("the bench");
                waiter.execute(unlock, &[&KEY]).expect("the unlock");
            });
            wait_for_waiter();
            let released = Instant::now();
            holder.execute(&statements[0][1], &[&KEY]).expect("the unlock");
            granted.recv().expect("the waiter") - released
        }));
        for (managers, times) in pairs_of_managers.iter().zip(&mut times[1..]) {
            let [holder, waiter] =
                managers.each_ref().map(|manager| manager.lock("bench", LockOptions::new()).expect("a lock"));
            holder.lock(&Context::background()).expect("the lock");
            times.push(std::thread::scope(|scope| {
                let (done, granted) = bounded(1);
                scope.spawn(move || {
                    waiter.lock(&Context::background()).expect("the lock");
                    done.send(Instant::now()).expect("the bench");
                    waiter.release().expect("the release");
                });
                wait_for_waiter();
                let released = Instant::now();
                holder.release().expect("the release");
                granted.recv().expect("the waiter") - released
            }));
        }
    }
    print(&mut times);
}

fn time(run: impl FnOnce()) -> Duration {
    let begun = Instant::now();
    run();
    begun.elapsed()
}

fn print(times: &mut [Vec<Duration>; 3]) {
    times.iter_mut().for_each(|times| times.sort());
    let at = |times: &[Duration], share: f64| times[((times.len() - 1) as f64 * share) as usize];
    let base = at(&times[0], 0.5);
    println!("{:24} {:>10} {:>10} {:>8}", "", "median", "p99", "ratio");
    for (name, times) in
        ["the driver by hand", "without catalog", "with token and row"].into_iter().zip(times)
    {
        let median = at(times, 0.5);
        let ratio = median.as_secs_f64() / base.as_secs_f64();
        println!("{name:24} {median:>10.1?} {:>10.1?} {ratio:>8.2}", at(times, 0.99));
    }
}
