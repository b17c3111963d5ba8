//! Three processes of one service stand for leader, at two sites. The site of the leader and of the primary is cut off, the standby
//! at the other one is promoted, and there are two primaries. You watch when the leader stands down, and when the next one begins:
//! once with heartbeats that the standby confirms (`Config::quorum`), and once without, where both lead.
//!
//! ```text
//! cargo run --example split_brain
//! ```
//!
//! It starts PostgreSQL servers of its own, with streaming replication, and takes about half a minute. As root on Linux the leader's site is
//! a network namespace, and its cable is cut; elsewhere, or with the argument `proxy`, proxies stand between the sites and
//! swallow everything. It says which. It ends with exit code 0 if at no time two led with the quorum and two did without, 1 if not or if
//! something failed, 2 if there is no PostgreSQL to start.
//!
//! The service is that of the example `failover`, as are most other files. `sites.rs` has the servers and what is between them, `show.rs` the
//! course of it all and the judgement.

#[path = "../failover/crew.rs"]
#[allow(dead_code, reason = "nobody is struck here")]
mod crew;
#[path = "../failover/history.rs"]
#[allow(dead_code, reason = "nobody is struck here")]
mod history;
#[path = "../failover/outcome.rs"]
mod outcome;
#[path = "../../tests/outages/cutoff/proxy.rs"]
#[allow(dead_code, clippy::unwrap_used, reason = "it is made for tests, which need more of it")]
mod proxy;
#[path = "../failover/report.rs"]
mod report;
#[path = "../failover/screen.rs"]
mod screen;
mod show;
mod sites;
#[path = "../failover/stage.rs"]
mod stage;
#[path = "../failover/worker.rs"]
#[allow(dead_code, reason = "the work here cannot fail")]
mod worker;

use std::env;
use std::error::Error;
use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

use dsync::Quorum;
use support::netns::Netns;

use crate::outcome::{exit, one_line};
use crate::show::{Act, judge};
use crate::sites::Cut;
use crate::worker::Outcome;

/// By this variable a worker knows whether the standbys are to confirm its heartbeats.
const QUORUM: &str = "DSYNC_QUORUM";

const PROXIES: &str = "Proxies stand between their site and the other one, and swallow everything.";

fn main() -> ExitCode {
    env_logger::init();
    let arguments: Vec<String> = env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let outcome = match arguments[..] {
        [] => match Netns::new() {
            Ok(_) => show(Cut::Namespace, "Their site is a network namespace, whose cable is cut."),
            Err(reason) => show(Cut::Proxies, &format!("{PROXIES}\n({})", one_line(&reason))),
        },
        ["proxy"] => show(Cut::Proxies, PROXIES),
        ["worker", name] => work(name).map(|()| true).map_err(|error| format!("{name}: {error}").into()),
        _ => Err("it takes no argument, or `proxy`".into()),
    };
    exit("split_brain", outcome)
}

/// One process of the service.
fn work(name: &str) -> Result<(), Box<dyn Error>> {
    let quorum = if env::var_os(QUORUM).is_some() { Quorum::NamedStandbys } else { Quorum::Server };
    let config = worker::config(&env::var("DATABASE_URL")?)?
        .quorum(quorum)
        // So that those who wait soon notice that their server is cut off.
        .wait_slice(Duration::from_millis(500))
        .connect_timeout(Duration::from_secs(2));
    worker::run(name, config, |_| Outcome::Done)
}

fn show(cut: Cut, how: &str) -> Result<bool, Box<dyn Error>> {
    say("A leader, and the primary that it uses, are cut off from all others. Then the\n\
         standby of that primary is promoted, and there are two primaries.")?;
    say(how)?;
    let mut found = Vec::new();
    for (act, title) in [
        (
            Act { quorum: true, cut },
            "\nWith the quorum: a term lasts while the standby confirms the heartbeats.\n",
        ),
        (Act { quorum: false, cut }, "\nWithout: a term lasts while the server answers the heartbeats.\n"),
    ] {
        say(title)?;
        found.push(act.play()?);
    }
    judge(&found)
}

/// Not `println!`, which panics when nobody listens any more.
fn say(text: &str) -> Result<(), Box<dyn Error>> {
    Ok(writeln!(io::stdout(), "{text}")?)
}
