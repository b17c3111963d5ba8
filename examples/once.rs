//! A nightly job that several machines start, by cron say, and that is to be done once a night, by one of them.
//!
//! ```text
//! cargo run --example once
//! ```
//!
//! With `DATABASE_URL` set, run it in two terminals at once: the second one waits for the first, and finds the work done. Run it again:
//! it is not due before tomorrow. Kill the one that works while another waits: that one begins at once. Without `DATABASE_URL` it
//! starts a PostgreSQL server of its own and prints the address for the second terminal.

use std::env;
use std::error::Error;
use std::process::ExitCode;
use std::time::Duration;

use dsync::{Config, Once, PostgresManager};

const NIGHTLY: Duration = Duration::from_secs(24 * 60 * 60);
const STEPS: u32 = 10;
/// Longer than a takeover grace, in which nobody is granted the lock, and nobody would do the work. It may begin with this very call.
const WAIT: Duration = Duration::from_secs(120);

fn main() -> ExitCode {
    env_logger::init();
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("once: {error}");
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
            println!("in another terminal:\n  DATABASE_URL={} \\\n  cargo run --example once", server.url());
            server.url()
        }
    };
    // Apart from the locks of whatever else uses the database.
    let config = Config::from_url(&url)?.namespace("dsync-example");
    let manager = PostgresManager::connect(config)?;

    // The success is recorded if the work returns `Ok`. Where it is one transaction in this database, let that transaction record it, by
    // `run.record(&mut transaction)`: then it is done exactly once, and not at least once.
    let outcome = manager.once("nightly-report", NIGHTLY, WAIT, |run| {
        for step in 1..=STEPS {
            // A step of real work would look here between two writes, and write behind the fence of `run.term()`.
            if run.lost().wait_timeout(Duration::from_millis(500)) {
                return Err(format!(
                    "the lock is lost: stopping before step {step}, another machine may begin"
                )
                .into());
            }
            println!("step {step} of {STEPS} done");
        }
        Ok::<_, Box<dyn Error>>(STEPS)
    })?;
    match outcome {
        Once::Ran(steps) => println!("all {steps} steps are done"),
        Once::NotDue { due_in, .. } => {
            println!("done already, due again in {} minutes", due_in.as_secs() / 60)
        }
        Once::Busy => println!("another machine is still at it"),
    }
    Ok(())
}
