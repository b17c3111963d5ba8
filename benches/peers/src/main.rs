//! dsync beside what one would pick instead, all in one run, against one private PostgreSQL and one private Redis.
//!
//! ```sh
//! cargo run --release --manifest-path benches/peers/Cargo.toml
//! ```
//!
//! prints the comparison, writes `results.json` and `RESULTS.md` beside this package's manifest, and the plot where the guide has it, in
//! `src/guide/comparison.svg`. With `-- --quick` it takes a tenth of the time and writes nothing, since so few rounds are not worth keeping;
//! `-- --output FOLDER` writes elsewhere, and also after a quick run.

mod contenders;
mod machine;
mod plot;
mod redis;
mod report;
mod rounds;
mod watchers;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use support::Server;

use crate::contenders::Keeper;
use crate::redis::Redis;
use crate::report::{Report, Row};
use crate::rounds::Rounds;
use crate::watchers::Watchers;

const COMMAND: &str = "cargo run --release --manifest-path benches/peers/Cargo.toml";
const QUICK_COMMAND: &str = "cargo run --release --manifest-path benches/peers/Cargo.toml -- --quick";

fn main() {
    let options = Options::read();
    // Before our own work shows in the load.
    let facts = machine::facts();
    let report = compare(options.quick, facts);
    println!("{}", report.tables());
    let Some(folder) = options.folder else {
        println!("A quick run: nothing is written.");
        return;
    };
    let json = serde_json::to_string_pretty(&report.json()).expect("JSON");
    let files = [
        ("results.json", json + "\n"),
        ("RESULTS.md", report.markdown()),
        ("comparison.svg", plot::svg(&report.rows)),
    ];
    for (name, text) in files {
        // The guide is in the library's package, which must have what it shows.
        let is_ours = name == "comparison.svg" && folder == Path::new(env!("CARGO_MANIFEST_DIR"));
        let path = if is_ours { folder.join("../../src/guide").join(name) } else { folder.join(name) };
        if let Err(error) = fs::write(&path, text) {
            panic!("can't write {}: {error}", path.display());
        }
        println!("Written: {}", path.display());
    }
}

fn compare(quick: bool, mut facts: Vec<(&'static str, String)>) -> Report {
    let rounds = if quick { Rounds::QUICK } else { Rounds::FULL };
    // As in production: a contender that made the server wait for the disk should be seen to.
    let server = Server::builder().durable().start().unwrap_or_else(|error| panic!("{error}"));
    let database = server.database().expect("a database");
    let redis = Redis::start();
    let mut left_out = Vec::new();
    if redis.is_none() {
        let line = "rslock, since there is no redis-server on this machine (`apt-get install redis-server`)";
        println!("Left out: {line}.");
        left_out.push(line);
    }
    let mut client = database.client().expect("a session");
    let shown = client.query_one("SHOW server_version", &[]).expect("a version").get(0);
    facts.push(("PostgreSQL", shown));
    if let Some(redis) = &redis {
        facts.push(("Redis", redis.version().to_owned()));
    }
    facts.extend(
        ["postgres", "tokio-postgres", "sqlx", "distributed-lock-postgres", "rslock", "redis", "tokio"]
            .map(|package| (package, machine::versions(package).collect::<Vec<_>>().join(" and "))),
    );

    let contenders = contenders::all(&database.url(), redis.as_ref());
    let mut watchers = Watchers::new(&database, redis.as_ref());
    println!("Lock and release, {} rounds …", rounds.pairs);
    let pairs = rounds::pairs(&contenders, rounds.pairs);
    println!("Hand-over, {} rounds …", rounds.hand_overs);
    let hand_overs = rounds::hand_overs(&contenders, &mut watchers, rounds.hand_overs);
    println!("Loss, {} rounds …", rounds.losses);
    let losses = rounds::losses(&contenders, &mut watchers, rounds.losses);
    let renewals = redis.as_ref().map(|redis| contenders::losses_by_renewal(redis, rounds.renewals));
    let renewals = renewals.unwrap_or_default();
    println!();

    let figures = contenders.iter().zip(pairs).zip(hand_overs).zip(losses);
    Report {
        command: if quick { QUICK_COMMAND } else { COMMAND },
        date: humantime::format_rfc3339_seconds(SystemTime::now()).to_string()[..10].to_owned(),
        rounds,
        facts,
        rows: figures
            .map(|(((contender, pairs), hand_overs), losses)| {
                let renewals: &[_] = if contender.keeper == Keeper::Redis { &renewals } else { &[] };
                Row::new(contender, pairs, hand_overs, losses, renewals)
            })
            .collect(),
        left_out,
    }
}

struct Options {
    quick: bool,
    /// Where to write.
    folder: Option<PathBuf>,
}

impl Options {
    fn read() -> Self {
        let (mut quick, mut output) = (false, None);
        let mut arguments = std::env::args_os().skip(1);
        while let Some(argument) = arguments.next() {
            match argument.to_str() {
                Some("--quick") => quick = true,
                Some("--output") => output = arguments.next().map(PathBuf::from),
                _ => {
                    eprintln!("usage: dsync-peers [--quick] [--output FOLDER]");
                    std::process::exit(2);
                }
            }
        }
        let beside_the_manifest = || PathBuf::from(env!("CARGO_MANIFEST_DIR"));
        let folder = output.or_else(|| (!quick).then(beside_the_manifest));
        Self { quick, folder }
    }
}
