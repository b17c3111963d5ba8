//! How soon the loss of a lock is told, and what it costs to hold one: the time from `pg_terminate_backend` to a closed
//! channel, over TCP and over a Unix socket, and the processor time of idle held locks.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use dsync::{Config, Context, Lock, LockOptions, PostgresManager, SyncManager};
use support::{Database, Server, process};

const ROUNDS: usize = 200;
const HELD: u32 = 100;
const IDLE: Duration = Duration::from_secs(10);

fn main() {
    let server = Server::shared();
    let database = server.database().expect("a database");
    println!("PostgreSQL {}", server.version());
    for (name, url) in [("TCP on loopback", database.url()), ("Unix socket", database.unix_url())] {
        println!("\n{name}");
        losses(&database, &url);
        idling(&url);
    }
}

fn manager(url: &str, sessions: u32) -> PostgresManager {
    let manager =
        PostgresManager::new(Config::from_url(url).expect("a URL").max_sessions(sessions)).expect("it");
    manager.start().expect("a server");
    manager
}

fn lock(manager: &PostgresManager, key: &str) -> Arc<dyn Lock> {
    let lock = manager.lock(key, LockOptions::new()).expect("a lock");
    lock.lock(&Context::background()).expect("the lock");
    lock
}

fn losses(database: &Database<'_>, url: &str) {
    let manager = manager(url, 1);
    let mut operator = database.client().expect("a session");
    let holder = operator
        .prepare(
            "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND granted \
             AND database = (SELECT oid FROM pg_database WHERE datname = current_database())",
        )
        .expect("a statement");
    let terminate = operator.prepare("SELECT pg_terminate_backend($1)").expect("a statement");
    let (mut told, mut back) = (Vec::new(), Vec::new());
    for round in 0..=ROUNDS {
        let lock = lock(&manager, "bench");
        let lost = lock.lost();
        let listener = thread::spawn(move || {
            let _ = lost.recv();
            Instant::now()
        });
        let backend: i32 = operator.query_one(&holder, &[]).expect("a holder").get(0);
        let begun = Instant::now();
        operator.query_one(&terminate, &[&backend]).expect("its end");
        let heard = listener.join().expect("the listener");
        lock.lock(&Context::background()).expect("the lock again");
        // The first one warms up.
        if round > 0 {
            told.push(heard - begun);
            back.push(begun.elapsed());
        }
        lock.release().expect("the release");
    }
    print("pg_terminate_backend -> lost channel closed", &mut told);
    print("pg_terminate_backend -> held again", &mut back);
}

fn print(what: &str, times: &mut [Duration]) {
    times.sort_unstable();
    let at = |percent: usize| times[(times.len() * percent).div_ceil(100) - 1];
    println!(
        "{what:<44} p50 {:>9.3?}  p90 {:>9.3?}  p99 {:>9.3?}  max {:>9.3?}  ({} runs)",
        at(50),
        at(90),
        at(99),
        at(100),
        times.len()
    );
}

fn idling(url: &str) {
    let manager = manager(url, HELD);
    let locks: Vec<_> = (0..HELD).map(|number| lock(&manager, &format!("idle-{number}"))).collect();
    let Some(before) = process::cpu_time(process::own()) else {
        println!("the processor time is not known on this system");
        return;
    };
    thread::sleep(IDLE);
    let used = process::cpu_time(process::own()).unwrap_or_default().saturating_sub(before);
    println!(
        "{HELD} idle held locks: {used:?} of processor time in {IDLE:?} = {:.2} % of one core (to the nearest {:.2} %)",
        100.0 * used.as_secs_f64() / IDLE.as_secs_f64(),
        // The unit in which the system counts is commonly 10 ms.
        100.0 * 0.01 / IDLE.as_secs_f64()
    );
    assert!(locks.iter().all(|lock| lock.term().is_some()), "all are held still");
    manager.stop().expect("the end");
}
