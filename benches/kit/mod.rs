//! What all benches share: how to measure, what to make of the samples, and how to tell it.
//!
//! A bench is a program of its own (`harness = false`). It measures every contender in the same run, prints what it
//! found, and leaves it as JSON in `bench-results` of the target folder, from where `cargo bench --bench report` puts it
//! into BENCHMARKS.md.

#![allow(dead_code, unused_imports, reason = "each bench uses a part of it")]

pub(crate) mod environment;
pub(crate) mod measure;
pub(crate) mod pgbench;
pub(crate) mod processors;
pub(crate) mod raw;
pub(crate) mod results;
pub(crate) mod statistics;
pub(crate) mod text;
pub(crate) mod worker;

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use dsync::observer::{Acquired, Attempt, Released};
use dsync::{CatalogMode, Config, LockOptions, Observer, PostgresManager, json_valuer};
use support::{Builder, Server};

pub(crate) use measure::{Contender, Plan, interleave, interleave_list};
pub(crate) use processors::Place;
pub(crate) use results::{Row, Target};
pub(crate) use statistics::Series;

use environment::Environment;
use results::Results;

/// Whatever is drawn by lot is drawn alike in each run.
pub(crate) const SEED: u64 = 42;

/// A run of a bench.
pub(crate) struct Bench {
    results: Results,
    quick: bool,
    begun: Instant,
}

impl Bench {
    /// Reads the arguments and looks at the machine.
    pub(crate) fn start(name: &'static str) -> Self {
        let mut quick = false;
        for argument in std::env::args().skip(1) {
            match argument.as_str() {
                "--quick" => quick = true,
                // Added by cargo.
                "--bench" => {}
                other => {
                    eprintln!(
                        "{name}: there is no argument {other:?}; usage: cargo bench --bench {name} [-- --quick]"
                    );
                    std::process::exit(2);
                }
            }
        }
        let environment = Environment::look(quick);
        println!("{name}: {environment}");
        if quick {
            println!("A quick run shows that the bench works. Its figures mean little.");
        }
        Self { results: Results::new(name, environment), quick, begun: Instant::now() }
    }

    pub(crate) fn is_quick(&self) -> bool {
        self.quick
    }

    /// One of two sizes of a run.
    pub(crate) fn choose<T>(&self, full: T, quick: T) -> T {
        if self.quick { quick } else { full }
    }

    /// Prints a heading for the rows that follow.
    pub(crate) fn heading(&self, what: &str) {
        println!("\n{what}");
    }

    /// Prints a row and keeps it.
    pub(crate) fn row(&mut self, row: Row) {
        text::print(&row);
        self.results.rows.push(row);
    }

    /// Writes what was found.
    pub(crate) fn finish(self) {
        let path = self.results.write().expect("the results are written");
        println!("\n{}", text::verdict(&self.results.rows));
        println!("{:.0?}; results in {}", self.begun.elapsed(), path.display());
    }
}

/// A server that waits for the disk as a production server does: a library that writes must not gain by it.
pub(crate) fn server() -> Server {
    start(Server::builder().max_connections(100))
}

/// Starts a server of a special kind in the same way.
pub(crate) fn start(builder: Builder) -> Server {
    builder.durable().start().expect("a server")
}

/// A manager that has been started.
pub(crate) fn manager(url: &str, mode: CatalogMode, sessions: u32) -> PostgresManager {
    let config = Config::from_url(url).expect("a URL").catalog(mode).max_sessions(sessions);
    PostgresManager::connect(config).expect("a server")
}

/// As `manager`, with an observer that counts and times as one that feeds metrics does.
pub(crate) fn observed_manager(url: &str, mode: CatalogMode, sessions: u32) -> PostgresManager {
    let config = Config::from_url(url).expect("a URL").catalog(mode).max_sessions(sessions);
    PostgresManager::connect(config.observer(Counts::default())).expect("a server")
}

/// Counts, and sums up times in nanoseconds.
#[derive(Default)]
struct Counts {
    attempts: AtomicU64,
    waited: AtomicU64,
    held: AtomicU64,
}

impl Observer for Counts {
    fn attempt(&self, _: &Attempt<'_>) {
        self.attempts.fetch_add(1, Relaxed);
    }

    fn acquired(&self, event: &Acquired<'_>) {
        self.waited.fetch_add(event.waited.as_nanos() as u64, Relaxed);
    }

    fn released(&self, event: &Released<'_>) {
        self.held.fetch_add(event.held.as_nanos() as u64, Relaxed);
    }
}

/// For a lock with an annotation, as the driver by hand has one: with a catalog, a row is to hold all that a row can.
pub(crate) fn annotated() -> LockOptions {
    let annotation = serde_json::json!({ "host": "db-7", "pid": 4711 });
    LockOptions::new().valuer(json_valuer(&annotation).expect("a valuer"))
}

pub(crate) fn time(run: impl FnOnce()) -> Duration {
    let begun = Instant::now();
    run();
    begun.elapsed()
}

pub(crate) fn micros(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e6
}

pub(crate) fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
