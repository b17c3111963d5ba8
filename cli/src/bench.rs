//! `bench`: what this server and the way to it take, in a small table.

use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use dsync::crossbeam_channel::{Sender, unbounded};
use dsync::observer::{Heartbeat, Observer};
use dsync::{CatalogMode, Config, Lock, PostgresManager, Quorum, TakeoverPolicy};
use serde_json::json;

use crate::args::{Arguments, Output};
use crate::connect;
use crate::exit::{Failure, UNAVAILABLE, say};
use crate::out::{self, Style};
use crate::text::{self, Column};

/// For what must come in any case.
const PATIENCE: Duration = Duration::from_secs(30);

/// Measures this server: a round trip, a lock, a hand-over.
///
/// Takes and releases a lock of its own, which no other program wants. Without a catalog, the row with a token is left out.
#[derive(Args, Debug)]
pub(crate) struct Bench {
    /// How often to measure each, 10 at least; a hand-over a tenth as often.
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u32).range(10..=100_000))]
    rounds: u32,
}

/// The times of one thing.
struct Row {
    what: &'static str,
    times: Vec<Duration>,
}

impl Bench {
    pub(crate) fn run(&self, arguments: &Arguments) -> Result<u8, Failure> {
        let key = format!("bench/{}", connect::own_name());
        let (beats, times) = unbounded();
        // Whatever the settings say that needs a catalog.
        let without_catalog = |config: Config| {
            config.catalog(CatalogMode::None).takeover(TakeoverPolicy::Immediate).quorum(Quorum::Server)
        };
        let config = || connect::config(&arguments.connection).map(without_catalog);
        let plain = PostgresManager::connect(
            config()?.heartbeat(Duration::from_millis(10)).observer(Beats(Mutex::new(beats))),
        )?;
        let other = PostgresManager::connect(config()?)?;

        // A server that is away is told of at once; a lock would be waited for.
        plain.inspect(&key)?;
        let lock = plain.lock(&key)?;
        // The session is opened, and the server has read its own tables.
        pair(&*lock)?;
        let mut rows = vec![Row { what: "lock and release", times: self.pairs(&*lock)? }];
        let held = lock.acquire(PATIENCE)?;
        let beats: Vec<Duration> =
            (0..self.rounds).map_while(|_| times.recv_timeout(PATIENCE).ok()).collect();
        held.release()?;
        if beats.is_empty() {
            return Err(Failure::new(
                UNAVAILABLE,
                "the server answers no heartbeat; see whether it stands still",
            ));
        }
        rows.insert(0, Row { what: "round trip", times: beats });
        let config = connect::config_without_making(&arguments.connection)?;
        let with_token = || {
            let with_catalog = PostgresManager::connect(config)?;
            let lock = with_catalog.lock(&key)?;
            // In a takeover grace nobody has it in time.
            pair(&*lock)?;
            self.pairs(&*lock)
        };
        if !connect::is_without_catalog() {
            match with_token() {
                Ok(times) => rows.push(Row { what: "lock and release, with a token", times }),
                Err(failure) => say(&format!("a lock with a token is not measured: {}", failure.message)),
            }
        }
        rows.push(Row { what: "hand-over to one that waits", times: self.hand_overs(&plain, &other, &key)? });
        out::print(match arguments.output {
            Output::Json => rows.iter().map(Row::json).collect(),
            Output::Text => table(&rows),
        })?;
        Ok(0)
    }

    fn pairs(&self, lock: &dyn Lock) -> Result<Vec<Duration>, Failure> {
        (0..self.rounds).map(|_| pair(lock)).collect()
    }

    /// From the release by one session to the moment in which the next one knows that it has the lock.
    fn hand_overs(
        &self,
        from: &PostgresManager,
        to: &PostgresManager,
        key: &str,
    ) -> Result<Vec<Duration>, Failure> {
        let (ours, theirs) = (from.lock(key)?, to.lock(key)?);
        let once = |_| -> dsync::Result<Duration> {
            let guard = ours.acquire(PATIENCE)?;
            thread::scope(|scope| {
                let next = scope.spawn(|| -> dsync::Result<Instant> {
                    let guard = theirs.acquire(PATIENCE)?;
                    let had = Instant::now();
                    guard.release()?;
                    Ok(had)
                });
                while !next.is_finished() && from.inspect(key)?.waiters.is_empty() {
                    thread::sleep(Duration::from_millis(1));
                }
                let begun = Instant::now();
                guard.release()?;
                let had = next.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
                Ok(had.saturating_duration_since(begun))
            })
        };
        Ok((0..self.rounds / 10).map(once).collect::<dsync::Result<_>>()?)
    }
}

fn pair(lock: &dyn Lock) -> Result<Duration, Failure> {
    let begun = Instant::now();
    lock.acquire(PATIENCE)?.release()?;
    Ok(begun.elapsed())
}

/// Hands on how long the heartbeats of a lock take, which are one small statement each.
struct Beats(Mutex<Sender<Duration>>);

impl Observer for Beats {
    fn heartbeat(&self, event: &Heartbeat<'_>) {
        // Nobody may listen any more.
        let _ = self.0.lock().unwrap_or_else(PoisonError::into_inner).send(event.round_trip);
    }
}

impl Row {
    /// The time that so many in a hundred do not exceed.
    fn of_hundred(&self, part: usize) -> Duration {
        let mut times = self.times.clone();
        times.sort_unstable();
        times.get((times.len() * part / 100).min(times.len() - 1)).copied().unwrap_or_default()
    }

    fn json(&self) -> String {
        let seconds = |part| self.of_hundred(part).as_secs_f64();
        json!({ "what": self.what, "median_seconds": seconds(50), "p99_seconds": seconds(99), "rounds": self.times.len() })
            .to_string()
    }
}

fn table(rows: &[Row]) -> Vec<String> {
    let columns = [
        Column { title: "WHAT", is_number: false },
        Column { title: "MEDIAN", is_number: true },
        Column { title: "P99", is_number: true },
        Column { title: "ROUNDS", is_number: true },
    ];
    let millis = |time: Duration| format!("{:.2} ms", time.as_secs_f64() * 1_000.0);
    let cells = |row: &Row| {
        vec![
            row.what.to_owned(),
            millis(row.of_hundred(50)),
            millis(row.of_hundred(99)),
            row.times.len().to_string(),
        ]
    };
    let mut lines = text::table(&columns, &rows.iter().map(cells).collect::<Vec<_>>(), out::columns());
    lines[0] = out::styled(Style::Strong, &lines[0]);
    lines
}
