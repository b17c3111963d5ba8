//! Processes and threads fight for a few locks while everything around them fails, and a referee watches. They hold them by
//! claims, by guards, and by leaders whose closures do the work; as readers, who share them, by claims and guards; and they fight for the permits
//! of a semaphore, by both.
//!
//! ```text
//! cargo run --release --example torture -- --seconds 600 --seed 42
//! ```
//!
//! A seed repeats the choices, not the run: the scheduler has a say too. It ends with exit code 0 if there was no
//! violation, 1 if there was or if something failed, 2 if there is no PostgreSQL to start.
//!
//! `worker.rs` is what the processes do, `report.rs` what they say, `crew.rs` runs them; `chaos.rs` inflicts what
//! `fault.rs` lists; `stalls.rs` sees when the machine stood still; `referee.rs` judges; `course.rs` has the order of it all. `tests/torture.rs` runs the same for a
//! shorter time.

mod chaos;
mod course;
mod crew;
mod fault;
mod referee;
mod report;
mod stalls;
mod worker;

use std::env;
use std::error::Error;
use std::process::{Command, ExitCode};
use std::time::Duration;

const USAGE: &str = "usage: torture [--seconds N] [--seed N]";

fn main() -> ExitCode {
    env_logger::init();
    let arguments: Vec<String> = env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let outcome = match arguments[..] {
        ["worker", worker, seed] => work(worker, seed).map(|()| true),
        _ => torture(&arguments),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("torture: {error}");
            let missing = error.downcast_ref::<support::Error>().is_some_and(support::Error::is_missing);
            ExitCode::from(if missing { 2 } else { 1 })
        }
    }
}

fn torture(arguments: &[&str]) -> Result<bool, Box<dyn Error>> {
    let (mut seconds, mut seed) = (60, fastrand::u64(..1_000_000));
    for pair in arguments.chunks(2) {
        match *pair {
            ["--seconds", number] => seconds = number.parse().map_err(|_| USAGE)?,
            ["--seed", number] => seed = number.parse().map_err(|_| USAGE)?,
            _ => return Err(USAGE.into()),
        }
    }
    let program = env::current_exe()?;
    course::run(seed, Duration::from_secs(seconds), |worker, url, seed| {
        let mut command = Command::new(&program);
        // The address in the environment rather than in an argument: it may hold a password.
        command.args(["worker", &worker.to_string(), &seed.to_string()]).env("DATABASE_URL", url);
        Ok(command)
    })
}

fn work(worker: &str, seed: &str) -> Result<(), Box<dyn Error>> {
    let url = env::var("DATABASE_URL")?;
    worker::run(worker.parse()?, &url, seed.parse()?).map_err(|error| error as Box<dyn Error>)
}
