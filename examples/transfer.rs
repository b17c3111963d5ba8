//! Takes two locks at once: moves money between accounts, each of which has a lock, from many threads.
//!
//! ```text
//! cargo run --example transfer
//! ```
//!
//! With `DATABASE_URL` set, run it in several terminals at once; the table `dsync_demo_account` stays in that database. Without, it starts a PostgreSQL
//! server of its own.

use std::env;
use std::error::Error;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use dsync::postgres::{self, Client, NoTls, Transaction};
use dsync::{Config, PostgresManager};

const ACCOUNTS: i32 = 5;
const THREADS: u64 = 4;
const TRANSFERS: usize = 50;

type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

fn main() -> ExitCode {
    env_logger::init();
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("transfer: {error}: {:?}", error.source());
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
    // Apart from the locks of whatever else uses the database.
    let config = Config::from_url(&url)?.namespace("dsync-example");
    let manager = PostgresManager::connect(config)?;
    let mut client = Client::connect(&url, NoTls)?;
    // Two processes that create one table at once would get in each other's way.
    manager.lock("transfer/tables")?.with_lock(Duration::from_secs(60), |_| {
        client.batch_execute(&format!(
            "CREATE TABLE IF NOT EXISTS dsync_demo_account (id int PRIMARY KEY, balance bigint NOT NULL CHECK (balance >= 0));
             INSERT INTO dsync_demo_account SELECT id, 100 FROM generate_series(0, {ACCOUNTS} - 1) AS id ON CONFLICT DO NOTHING"
        ))
    })??;
    let outcomes: Vec<Outcome<()>> = thread::scope(|scope| {
        let clerks: Vec<_> = (0..THREADS).map(|_| scope.spawn(|| transfers(&manager, &url))).collect();
        let joined = clerks.into_iter().map(|clerk| clerk.join());
        joined.map(|outcome| outcome.unwrap_or_else(|_| Err("a thread panicked".into()))).collect()
    });
    outcomes.into_iter().collect::<Outcome<()>>()?;
    let sum: i64 = client.query_one("SELECT sum(balance)::bigint FROM dsync_demo_account", &[])?.get(0);
    println!("all done: the accounts have {sum} together");
    Ok(())
}

fn transfers(manager: &PostgresManager, url: &str) -> Outcome<()> {
    let mut client = Client::connect(url, NoTls)?;
    for _ in 0..TRANSFERS {
        let (from, to) = (fastrand::i32(0..ACCOUNTS), fastrand::i32(0..ACCOUNTS));
        // In whatever order they are named: sets never wait for each other in a circle. An account that is named twice is taken once.
        let accounts = manager.multi_lock([from, to].map(|id| format!("account/{id}")))?;
        let guard = accounts.acquire(Duration::from_secs(60))?;

        let mut transaction = client.transaction()?;
        // Fails if one of the locks was lost and has a later holder.
        guard.fence(&mut transaction)?;
        // Nobody else changes them between the reads and the writes.
        let amount = balance(&mut transaction, from)?.min(fastrand::i64(1..50));
        let rest = balance(&mut transaction, from)? - amount;
        set_balance(&mut transaction, from, rest)?;
        let sum = balance(&mut transaction, to)? + amount;
        set_balance(&mut transaction, to, sum)?;
        transaction.commit()?;
        // The transfer is done, whatever comes of the locks: an error here must not have it done again.
        drop(guard);
    }
    Ok(())
}

fn balance(transaction: &mut Transaction<'_>, account: i32) -> Result<i64, postgres::Error> {
    transaction.query_one("SELECT balance FROM dsync_demo_account WHERE id = $1", &[&account])?.try_get(0)
}

fn set_balance(
    transaction: &mut Transaction<'_>,
    account: i32,
    balance: i64,
) -> Result<u64, postgres::Error> {
    transaction.execute("UPDATE dsync_demo_account SET balance = $2 WHERE id = $1", &[&account, &balance])
}
