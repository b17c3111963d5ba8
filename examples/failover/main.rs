//! Three processes of one service stand for leader; then their leader is struck in four ways, and you watch who takes
//! over, and how fast.
//!
//! ```text
//! cargo run --example failover
//! ```
//!
//! It starts a PostgreSQL server of its own, or uses that of `DATABASE_URL` (without TLS, and without restarting it). It
//! ends with exit code 0 if no unit of work was done by a former leader and each takeover came within its bound, 1 if not or if something
//! failed, 2 if there is no PostgreSQL to start.
//!
//! `worker.rs` is the service, all that a user of the library would write, with its work in `ledger.rs`. The rest makes
//! a show of it: `crew.rs` runs the processes, `report.rs` is what they say, `show.rs` has the course of it all and
//! `blow.rs` the troubles, `stage.rs` tells what happens, `screen.rs` draws, and `verdict.rs` judges by what the two
//! witnesses say: `history.rs`, who believed to lead and when, and again `ledger.rs`, who worked and in which order.

mod blow;
mod crew;
mod history;
mod ledger;
mod outcome;
mod report;
mod screen;
mod show;
mod stage;
mod verdict;
mod worker;

use std::env;
use std::error::Error;
use std::io::{self, Write};
use std::process::ExitCode;

use support::Server;

use crate::ledger::Writer;
use crate::outcome::{exit, one_line};
use crate::show::Show;

fn main() -> ExitCode {
    env_logger::init();
    let arguments: Vec<String> = env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let outcome = match arguments[..] {
        [] => show(),
        ["worker", name] => env::var("DATABASE_URL")
            .map_err(Into::into)
            .and_then(|url| {
                let mut writer = Writer::new(name, &url);
                worker::run(name, worker::config(&url)?, |term| writer.work(term))
            })
            .map(|()| true)
            .map_err(|error| format!("{name}: {}", one_line(&*error)).into()),
        _ => Err("it takes no arguments".into()),
    };
    exit("failover", outcome)
}

fn show() -> Result<bool, Box<dyn Error>> {
    let mut out = io::stdout();
    writeln!(
        out,
        "Three processes of one service stand for leader. Then the leader gets into\ntrouble, four times."
    )?;
    if let Some(url) = env::var("DATABASE_URL").ok().filter(|url| !url.is_empty()) {
        writeln!(out, "They use the server of DATABASE_URL.\n")?;
        return Show::new(&url, None)?.run();
    }
    let server = Server::start()?;
    writeln!(out, "A private PostgreSQL {} runs for them on port {}.\n", server.version(), server.port())?;
    Show::new(&server.url(), Some(&server))?.run()
}
