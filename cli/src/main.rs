//! `pgdsync`: runs a job under a distributed lock on PostgreSQL, and shows who holds which.

mod args;
mod bench;
mod catalog;
mod connect;
mod doctor;
mod exit;
mod key;
mod lead;
mod list;
mod logging;
mod look;
mod out;
mod pages;
mod permits;
mod progress;
mod resign;
mod run;
mod show;
mod signals;
mod take;
mod text;
mod watch;

use std::process::ExitCode;

use clap::Parser as _;

use args::{Arguments, Verb};
use exit::Failure;

fn main() -> ExitCode {
    let words: Vec<_> = std::env::args_os().collect();
    if let Some(code) = run::inner(&words) {
        return code;
    }
    let outcome = match Arguments::try_parse_from(words) {
        Ok(arguments) => {
            logging::start(logging::WARNINGS);
            run(&arguments)
        }
        Err(error) if error.use_stderr() => Err(exit::refused(&error)),
        // What was asked for: the help, or the version.
        Err(error) => out::write(&error.render().to_string()).map(|()| 0),
    };
    match outcome {
        Ok(code) => ExitCode::from(code),
        Err(Failure { code, message }) => {
            if !message.is_empty() {
                exit::say(&message);
            }
            ExitCode::from(code)
        }
    }
}

fn run(arguments: &Arguments) -> Result<u8, Failure> {
    match &arguments.verb {
        Verb::Run(arguments) => run::run(arguments),
        Verb::Lead(arguments) => run::lead(arguments),
        Verb::List(verb) => verb.run(arguments),
        Verb::Show(verb) => verb.run(arguments),
        Verb::Watch(verb) => verb.run(arguments),
        Verb::Resign(verb) => verb.run(arguments),
        Verb::Break(verb) => verb.run(arguments),
        Verb::Permits(verb) => verb.run(arguments),
        Verb::Doctor(verb) => verb.run(arguments),
        Verb::Bench(verb) => verb.run(arguments),
        Verb::Catalog(verb) => verb.run(arguments),
        Verb::Completions(verb) => verb.run(),
        Verb::Man(verb) => verb.run(),
    }
}
