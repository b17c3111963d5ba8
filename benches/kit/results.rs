//! What a bench found, and the file that keeps it.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::environment::Environment;
use super::statistics::{Series, Summary};

/// What a bench found.
#[derive(Debug)]
pub(crate) struct Results {
    pub(crate) bench: String,
    pub(crate) environment: Environment,
    pub(crate) rows: Vec<Row>,
}

/// One thing that was measured, of the library and of what it stands on.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    pub(crate) what: String,
    pub(crate) unit: String,
    pub(crate) floor: Option<Summary>,
    pub(crate) ours: Summary,
    /// Ours by the floor, block by block: the median, and the range.
    pub(crate) ratio: Option<f64>,
    pub(crate) ratio_spread: Option<[f64; 2]>,
    pub(crate) target: Option<String>,
    pub(crate) reached: Option<bool>,
}

/// What a row is to reach.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Target {
    /// The ratio to the row's floor is at most this: of times, and of amounts.
    Ratio(f64),
    /// The ratio to the row's floor is at least this: of what is done in a second.
    RatioAtLeast(f64),
    /// The median is at most this.
    Median(f64),
    /// The 99th percentile is at most this.
    P99(f64),
}

impl Row {
    /// A row without floor and target.
    pub(crate) fn new(what: impl Into<String>, unit: &str, ours: &Series) -> Self {
        Self {
            what: what.into(),
            unit: unit.to_owned(),
            floor: None,
            ours: ours.summary(),
            ratio: None,
            ratio_spread: None,
            target: None,
            reached: None,
        }
    }

    /// Compares with what was measured beside it.
    pub(crate) fn compared(
        what: impl Into<String>,
        unit: &str,
        floor: &Series,
        ours: &Series,
        target: Option<Target>,
    ) -> Self {
        let (ratio, spread) = ours.ratio_to(floor);
        let row = Self::new(what, unit, ours);
        let row = Self {
            floor: Some(floor.summary()),
            // Nothing by nothing is no number, and JSON has none for it.
            ratio: ratio.is_finite().then_some(ratio),
            ratio_spread: ratio.is_finite().then_some(spread),
            ..row
        };
        match target {
            Some(target) => row.judged(target),
            None => row,
        }
    }

    /// A row without floor.
    #[allow(dead_code, reason = "not every bench has one with a target")]
    pub(crate) fn told(what: impl Into<String>, unit: &str, ours: &Series, target: Option<Target>) -> Self {
        let row = Self::new(what, unit, ours);
        match target {
            Some(target) => row.judged(target),
            None => row,
        }
    }

    fn judged(mut self, target: Target) -> Self {
        let unit = &self.unit;
        let (text, reached) = match target {
            Target::Ratio(limit) => {
                (format!("≤ {limit:.2} × floor"), self.ratio.is_some_and(|ratio| ratio <= limit))
            }
            Target::RatioAtLeast(limit) => {
                (format!("≥ {limit:.2} × floor"), self.ratio.is_some_and(|ratio| ratio >= limit))
            }
            Target::Median(limit) => (format!("≤ {limit} {unit}"), self.ours.median <= limit),
            Target::P99(limit) => {
                (format!("p99 ≤ {limit} {unit}"), self.ours.p99.is_some_and(|p99| p99 <= limit))
            }
        };
        self.target = Some(text);
        self.reached = Some(reached);
        self
    }

    fn to_json(&self) -> Value {
        json!({
            "what": self.what,
            "unit": self.unit,
            "floor": self.floor.as_ref().map(Summary::to_json),
            "ours": self.ours.to_json(),
            "ratio": self.ratio,
            "ratio_spread": self.ratio_spread,
            "target": self.target,
            "reached": self.reached,
        })
    }

    fn from_json(value: &Value) -> Option<Self> {
        Some(Self {
            what: text(value, "what")?,
            unit: text(value, "unit")?,
            floor: Summary::from_json(&value["floor"]),
            ours: Summary::from_json(&value["ours"])?,
            ratio: value["ratio"].as_f64(),
            ratio_spread: pair(&value["ratio_spread"]),
            target: text(value, "target"),
            reached: value["reached"].as_bool(),
        })
    }
}

impl Summary {
    fn to_json(&self) -> Value {
        json!({
            "name": self.name,
            "median": self.median,
            "p99": self.p99,
            "spread": self.spread,
            "samples": self.samples,
        })
    }

    fn from_json(value: &Value) -> Option<Self> {
        Some(Self {
            name: text(value, "name")?,
            median: value["median"].as_f64()?,
            p99: value["p99"].as_f64(),
            spread: pair(&value["spread"])?,
            samples: usize::try_from(value["samples"].as_u64()?).ok()?,
        })
    }
}

impl Results {
    pub(crate) fn new(bench: &str, environment: Environment) -> Self {
        Self { bench: bench.to_owned(), environment, rows: Vec::new() }
    }

    pub(crate) fn write(&self) -> io::Result<PathBuf> {
        let path = path(&self.bench);
        fs::create_dir_all(folder())?;
        let rows: Vec<Value> = self.rows.iter().map(Row::to_json).collect();
        let value = json!({ "bench": self.bench, "environment": self.environment.to_json(), "rows": rows });
        fs::write(&path, format!("{value:#}\n"))?;
        Ok(path)
    }

    /// What the last run of a bench has left.
    pub(crate) fn read(bench: &str) -> Result<Self, Unreadable> {
        let path = path(bench);
        let said =
            fs::read_to_string(&path).map_err(|error| Unreadable(format!("{error}: {}", path.display())))?;
        Self::parse(&said).ok_or_else(|| Unreadable(format!("not what a bench writes: {}", path.display())))
    }

    fn parse(said: &str) -> Option<Self> {
        let value: Value = serde_json::from_str(said).ok()?;
        Some(Self {
            bench: text(&value, "bench")?,
            environment: Environment::from_json(&value["environment"])?,
            rows: value["rows"].as_array()?.iter().map(Row::from_json).collect::<Option<_>>()?,
        })
    }
}

/// Why there is nothing to read.
#[derive(Debug)]
pub(crate) struct Unreadable(String);

impl fmt::Display for Unreadable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn path(bench: &str) -> PathBuf {
    folder().join(format!("{bench}.json"))
}

/// In the target folder, wherever that is: what cargo gives us is `tmp` within it.
fn folder() -> PathBuf {
    let scratch = scratch();
    scratch.parent().unwrap_or(scratch).join("bench-results")
}

/// A folder for what a bench needs for a while.
pub(crate) fn scratch() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR"))
}

pub(crate) fn text(value: &Value, name: &str) -> Option<String> {
    Some(value[name].as_str()?.to_owned())
}

fn pair(value: &Value) -> Option<[f64; 2]> {
    Some([value[0].as_f64()?, value[1].as_f64()?])
}
