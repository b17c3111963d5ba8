//! The tasks of those who work on dsync: `cargo xtask` lists them.
//!
//! It installs nothing. What is missing on the machine it says in one line, and then lets cargo and the tests say the rest.

mod benches;
mod cargo;
mod gates;
mod repeat;
mod task;
mod tools;

use std::env;
use std::process::ExitCode;
use std::time::Instant;

use task::Task;

fn main() -> ExitCode {
    let arguments: Vec<String> =
        env::args_os().skip(1).map(|argument| argument.to_string_lossy().into_owned()).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let Some(task) = Task::parse(&arguments) else {
        eprint!("{}", task::USAGE);
        return ExitCode::from(2);
    };
    let begun = Instant::now();
    tools::tell_missing(task.tools());
    match task.run() {
        Ok(()) => {
            eprintln!("xtask: {} passed in {:.0?}", arguments[0], begun.elapsed());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("xtask: {error}");
            ExitCode::FAILURE
        }
    }
}
