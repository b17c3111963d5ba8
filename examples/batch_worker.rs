//! A nightly job that is started on several machines, by cron say, and must run on one of them only.
//!
//! ```text
//! cargo run --example batch_worker
//! ```
//!
//! With `DATABASE_URL` set, run it in two terminals at once: the second one leaves the work to the first. Without, it
//! starts a PostgreSQL server of its own and prints the address for the second terminal.

use std::env;
use std::error::Error;
use std::process::ExitCode;
use std::time::Duration;

use dsync::crossbeam_channel::select;
use dsync::{Config, PostgresManager};

const STEPS: u32 = 20;

fn main() -> ExitCode {
    env_logger::init();
    match run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("batch_worker: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<ExitCode, Box<dyn Error>> {
    let server;
    let url = match env::var("DATABASE_URL") {
        Ok(url) => url,
        Err(_) => {
            server = support::Server::start()?;
            println!("in another terminal: DATABASE_URL={} cargo run --example batch_worker", server.url());
            server.url()
        }
    };
    let manager = PostgresManager::connect(Config::from_url(&url)?)?;

    let Some(guard) = manager.lock("nightly-report")?.try_acquire()? else {
        println!("another machine does it already");
        return Ok(ExitCode::SUCCESS);
    };

    for step in 1..=STEPS {
        // A step of real work would write behind the fence of `guard.term()`, and look here between two writes.
        select! {
            recv(guard.lost()) -> _ => {
                println!("the lock is lost: stopping before step {step}, another machine may begin");
                return Ok(ExitCode::FAILURE);
            }
            default(Duration::from_millis(500)) => println!("step {step} of {STEPS} done"),
        }
    }
    guard.release()?;
    println!("all done");
    Ok(ExitCode::SUCCESS)
}
