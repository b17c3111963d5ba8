//! Three processes of one service stand for leader; then their leader is struck in four ways, and you watch who takes
//! over, and how fast.
//!
//! ```text
//! cargo run --example failover
//! ```
//!
//! It starts a PostgreSQL server of its own, or uses that of `DATABASE_URL` (without TLS, and without restarting it). It
//! ends with exit code 0 if at no time two of them led and each takeover came within its bound, 1 if not or if something
//! failed, 2 if there is no PostgreSQL to start.
//!
//! `worker.rs` is the service, all that a user of the library would write, with its work in `ledger.rs`. The rest makes
//! a show of it: `crew.rs` runs the processes, `report.rs` is what they say, `show.rs` has the course of it all and
//! `blow.rs` the troubles, `screen.rs` draws, and `verdict.rs` judges by what the two witnesses say: `history.rs`, who
//! believed to lead and when, and again `ledger.rs`, who worked and in which order.

mod blow;
mod crew;
mod history;
mod ledger;
mod report;
mod screen;
mod show;
mod verdict;
mod worker;

use std::env;
use std::error::Error;
use std::io::{self, Write};
use std::process::ExitCode;

use support::Server;

use crate::show::Show;

fn main() -> ExitCode {
    env_logger::init();
    let arguments: Vec<String> = env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let outcome = match arguments[..] {
        [] => show(),
        ["worker", name] => env::var("DATABASE_URL")
            .map_err(Into::into)
            .and_then(|url| worker::run(name, &url))
            .map(|()| true)
            .map_err(|error| format!("{name}: {}", one_line(&*error)).into()),
        _ => Err("it takes no arguments".into()),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("failover: {}", one_line(&*error));
            let missing = error.downcast_ref::<support::Error>().is_some_and(support::Error::is_missing);
            ExitCode::from(if missing { 2 } else { 1 })
        }
    }
}

fn show() -> Result<bool, Box<dyn Error>> {
    let mut out = io::stdout();
    writeln!(
        out,
        "Three processes of one service stand for leader. Then the leader gets into trouble, four times."
    )?;
    if let Some(url) = env::var("DATABASE_URL").ok().filter(|url| !url.is_empty()) {
        writeln!(out, "They use the server of DATABASE_URL.\n")?;
        return Show::new(&url, None)?.run();
    }
    let server = Server::start()?;
    writeln!(out, "A private PostgreSQL {} runs for them on port {}.\n", server.version(), server.port())?;
    Show::new(&server.url(), Some(&server))?.run()
}

/// An error with its causes.
fn one_line(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let part = error.to_string();
        if !text.contains(&part) {
            text.push_str(&format!(": {part}"));
        }
        cause = error.source();
    }
    text.replace('\n', " | ")
}
