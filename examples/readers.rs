//! A price list that many machines read and that is now and then published anew: a lock that readers share and a writer has alone.
//!
//! ```text
//! cargo run --example readers
//! ```
//!
//! With `DATABASE_URL` set, run it in two terminals at once; the table `dsync_demo_page` stays in that database. Without, it starts a PostgreSQL
//! server of its own.

use std::env;
use std::error::Error;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use dsync::postgres::{self, Client, NoTls};
use dsync::{Config, PostgresManager};

const READERS: usize = 4;
const VERSIONS: usize = 8;
const PAGES: i32 = 5;
/// How long it takes to read a page.
const PAGE: Duration = Duration::from_millis(20);
/// How long anybody waits for the list. Who waits for longer ends the example with an error.
const PATIENCE: Duration = Duration::from_secs(20);

type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

/// What is counted.
#[derive(Default)]
struct Shop {
    is_closed: AtomicBool,
    lists_read: AtomicUsize,
    /// How many read now, and how many have at once.
    readers: AtomicUsize,
    most_readers: AtomicUsize,
}

fn main() -> ExitCode {
    env_logger::init();
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("readers: {error}: {:?}", error.source());
            ExitCode::FAILURE
        }
    }
}

fn run() -> Outcome<()> {
    let server;
    let url = match env::var("DATABASE_URL") {
        Ok(url) => url,
        Err(_) => {
            server = support::Server::start()?;
            server.url()
        }
    };
    let shop = Shop::default();
    let (manager, mut client) = machine(&url)?;
    manager.lock("prices")?.with_lock(PATIENCE, |_| {
        client.batch_execute(&format!(
            "CREATE TABLE IF NOT EXISTS dsync_demo_page (number int PRIMARY KEY, version bigint NOT NULL);
             INSERT INTO dsync_demo_page SELECT number, 0 FROM generate_series(1, {PAGES}) AS number ON CONFLICT DO NOTHING"
        ))
    })??;
    let outcomes: Vec<Outcome<()>> = thread::scope(|scope| {
        let readers: Vec<_> = (0..READERS).map(|_| scope.spawn(|| read(&url, &shop))).collect();
        let publisher = scope.spawn(|| publish(&manager, &mut client, &shop));
        let published = publisher.join();
        shop.is_closed.store(true, SeqCst);
        let joined = readers.into_iter().map(|reader| reader.join()).chain([published]);
        joined.map(|outcome| outcome.unwrap_or_else(|_| Err("a thread panicked".into()))).collect()
    });
    outcomes.into_iter().collect::<Outcome<()>>()?;
    let (lists, most) = (shop.lists_read.into_inner(), shop.most_readers.into_inner());
    if most < 2 {
        return Err("no two readers had the list at once".into());
    }
    println!("all done: {lists} lists were read, up to {most} at once, and none was of two versions");
    Ok(())
}

/// What a machine of its own has: the manager of its process, and a connection for its work.
fn machine(url: &str) -> Outcome<(PostgresManager, Client)> {
    // Apart from the locks of whatever else uses the database.
    let config = Config::from_url(url)?.namespace("dsync-example");
    Ok((PostgresManager::connect(config)?, Client::connect(url, NoTls)?))
}

/// Reads the list again and again: somebody does at each moment.
fn read(url: &str, shop: &Shop) -> Outcome<()> {
    let (manager, mut client) = machine(url)?;
    let prices = manager.shared_lock("prices")?;
    while !shop.is_closed.load(SeqCst) {
        // With the other readers, and with no writer.
        let guard = prices.acquire(PATIENCE)?;
        let readers = shop.readers.fetch_add(1, SeqCst) + 1;
        shop.most_readers.fetch_max(readers, SeqCst);
        let version = version_of(&mut client, 1)?;
        for number in 2..=PAGES {
            thread::sleep(PAGE);
            if version_of(&mut client, number)? != version {
                return Err(format!("page {number} is not of version {version}, as page 1 is").into());
            }
        }
        shop.lists_read.fetch_add(1, SeqCst);
        shop.readers.fetch_sub(1, SeqCst);
        guard.release()?;
    }
    Ok(())
}

/// Publishes new versions, each page in a transaction of its own, as a list would be that is too long for one.
fn publish(manager: &PostgresManager, client: &mut Client, shop: &Shop) -> Outcome<()> {
    let prices = manager.lock("prices")?;
    for _ in 0..VERSIONS {
        thread::sleep(Duration::from_millis(300));
        let (begun, readers) = (Instant::now(), shop.readers.load(SeqCst));
        // Readers that come from now on wait behind this one.
        let guard = prices.acquire(PATIENCE)?;
        let waited = begun.elapsed();
        let version = version_of(client, 1)? + 1;
        for number in 1..=PAGES {
            let mut transaction = client.transaction()?;
            // Fails if the lock was lost and somebody has it, a reader say.
            guard.term().fence(&mut transaction)?;
            transaction
                .execute("UPDATE dsync_demo_page SET version = $2 WHERE number = $1", &[&number, &version])?;
            transaction.commit()?;
        }
        // The version is written, whatever comes of the lock.
        drop(guard);
        println!(
            "version {version} is published; {readers} read when it was wanted, and it waited {waited:.0?}"
        );
    }
    Ok(())
}

fn version_of(client: &mut Client, page: i32) -> Result<i64, postgres::Error> {
    client.query_one("SELECT version FROM dsync_demo_page WHERE number = $1", &[&page])?.try_get(0)
}
