//! A service that runs on several machines, of which one leads: sends the invoices, say, while the others stand by.
//!
//! ```text
//! cargo run --example leader
//! ```
//!
//! With `DATABASE_URL` set, run it in two terminals at once, and see what happens when you stop, kill or freeze the one that leads.
//! Without, it starts a PostgreSQL server of its own and prints the address for the second terminal.

use std::env;
use std::error::Error;
use std::io::stdin;
use std::process::{self, ExitCode};
use std::time::Duration;

use dsync::{Config, Leader, LeaderOptions, LockOptions, PostgresManager, json_valuer};

const KEY: &str = "service/billing/leader";

fn main() -> ExitCode {
    env_logger::init();
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("leader: {error}");
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
            println!(
                "in another terminal:\n  DATABASE_URL={} \\\n  cargo run --example leader",
                server.url()
            );
            server.url()
        }
    };
    // Apart from the locks of whatever else uses the database.
    let config = Config::from_url(&url)?.namespace("dsync-example");
    let manager = PostgresManager::connect(config)?;
    // What the others are told of us when we lead.
    let annotated = LockOptions::new().valuer(json_valuer(&format!("process {}", process::id()))?);
    let lock = manager.lock_with(KEY, annotated)?;

    let options = LeaderOptions::new().on_event(|event| println!("{event}"));
    let leader = Leader::start_with(lock, options, |tenure| {
        // A step of real work would write behind the fence of `tenure.term()`, and look here between two writes.
        while !tenure.wait_timeout(Duration::from_secs(1)) {
            println!("doing what a leader does");
        }
    })?;

    println!("Enter: step down. r, Enter: ask whoever leads to resign.\ns, Enter: status. Ctrl-D: stop.");
    for line in stdin().lines() {
        match line?.as_str() {
            "r" => println!("there is a leader to ask: {}", manager.request_resignation(KEY)?),
            "s" => println!("{:#?}", leader.status()),
            _ => println!("stepping down: {}", leader.step_down()),
        }
    }
    leader.stop(Duration::from_secs(10))?;
    Ok(())
}
