//! Invoices with numbers that have no gaps, whichever machine writes them: locks on the application's own connection.
//!
//! ```text
//! cargo run --example transaction
//! ```
//!
//! With `DATABASE_URL` set, run it in two terminals at once; the table `dsync_demo_invoice` stays in that database. Without, it starts a PostgreSQL
//! server of its own.

use std::env;
use std::error::Error;
use std::process::ExitCode;
use std::time::Duration;

use dsync::postgres::{Client, NoTls};
use dsync::{Config, ErrorKind, PostgresManager};

const INVOICES: u32 = 100;

fn main() -> ExitCode {
    env_logger::init();
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("transaction: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let server;
    let url = match env::var("DATABASE_URL") {
        Ok(url) => url,
        Err(_) => {
            server = support::Server::start()?;
            server.url()
        }
    };
    // Apart from the locks of whatever else uses the database. Not started: these locks need its namespace only, and none of its sessions.
    let manager = PostgresManager::new(Config::from_url(&url)?.namespace("dsync-example"))?;
    let mut client = Client::connect(&url, NoTls)?;

    // One machine at a time makes the table. A session lock, since migrations may be several transactions; with `CREATE INDEX CONCURRENTLY`
    // among them take a guard, for the reason that `SessionLock` has.
    let mut migrating =
        manager.session_lock("invoices/migrations")?.acquire(&mut client, Duration::from_secs(60))?;
    migrating.batch_execute(
        "CREATE TABLE IF NOT EXISTS dsync_demo_invoice (number int8 NOT NULL, customer text)",
    )?;
    migrating.release()?;

    let lock = manager.transaction_lock("invoices")?;
    let mut written = 0;
    while written < INVOICES {
        let mut transaction = client.transaction()?;
        match lock.acquire(&mut transaction, Duration::from_secs(5)) {
            Ok(()) => {}
            // The transaction could go on without the lock; here it has nothing to do then.
            Err(error) if error.kind() == ErrorKind::TimedOut => {
                println!("{error}; trying again");
                continue;
            }
            Err(error) => return Err(error.into()),
        }
        let statement = "INSERT INTO dsync_demo_invoice SELECT coalesce(max(number), 0) + 1, $1 FROM dsync_demo_invoice RETURNING number";
        let row = transaction.query_one(statement, &[&"Ada"])?;
        // The next one reads this number: the lock goes to others when the commit is visible to them.
        transaction.commit()?;
        written += 1;
        println!("invoice {} is written", row.get::<_, i64>(0));
    }
    println!("done");
    Ok(())
}
