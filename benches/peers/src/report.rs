//! The figures, as a table for people and as JSON for programs.

use std::fmt::Write;
use std::time::Duration;

use serde_json::{Map, Value, json};

use crate::contenders::{Contender, Signal, TTL};
use crate::rounds::{Losses, Rounds};

/// What is left of many times.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Spread {
    pub(crate) median: Duration,
    pub(crate) p99: Duration,
    count: usize,
}

impl Spread {
    /// None of no times.
    fn of(mut times: Vec<Duration>) -> Option<Self> {
        times.sort_unstable();
        let at = |percent: usize| Some(*times.get((times.len() * percent).div_ceil(100).checked_sub(1)?)?);
        Some(Self { median: at(50)?, p99: at(99)?, count: times.len() })
    }

    pub(crate) fn ratio_to(&self, floor: &Self) -> f64 {
        self.median.as_secs_f64() / floor.median.as_secs_f64()
    }
}

/// How soon one hears of a loss.
#[derive(Debug, Clone, Copy)]
enum Told {
    InTime(Spread),
    AtRenewal(Spread),
    Never(&'static str),
}

/// One contender's figures.
#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) name: String,
    pub(crate) ours: bool,
    pub(crate) pair: Spread,
    pub(crate) hand_over: Spread,
    how: &'static str,
    told: Told,
    told_by: Option<&'static str>,
}

impl Row {
    pub(crate) fn new(
        contender: &Contender,
        pairs: Vec<Duration>,
        hand_overs: Vec<Duration>,
        losses: Losses,
        renewals: &[Duration],
    ) -> Self {
        let told_by = match contender.signal {
            Signal::By(what) | Signal::Renewal(what) => Some(what),
            Signal::None(_) => None,
        };
        let told = match (losses, contender.signal) {
            (Losses::Told(times), _) => Told::InTime(Spread::of(times).expect("times")),
            (Losses::FalseAlarm, _) => Told::Never("is closed while the lock is held, lost or not"),
            (Losses::Silence, _) => Told::Never("has told nothing"),
            (Losses::NoSignal, Signal::Renewal(_)) => {
                Told::AtRenewal(Spread::of(renewals.to_vec()).expect("times"))
            }
            (Losses::NoSignal, Signal::None(why) | Signal::By(why)) => Told::Never(why),
        };
        Self {
            name: contender.name.clone(),
            ours: contender.ours,
            pair: Spread::of(pairs).expect("times"),
            hand_over: Spread::of(hand_overs).expect("times"),
            how: contender.how,
            told,
            told_by,
        }
    }

    /// Whether it tells its user when the session ends, in a word or two.
    pub(crate) fn tells(&self) -> &'static str {
        match self.told {
            Told::InTime(_) => "yes",
            Told::AtRenewal(_) => "at renewal",
            Told::Never(_) => "no",
        }
    }

    /// What there is to say of its signal, if anything.
    fn remark(&self) -> String {
        match (self.told, self.told_by) {
            (Told::Never(what), Some(signal)) => format!("{signal} {what}"),
            (Told::Never(why), None) => why.to_owned(),
            (Told::InTime(_), signal) => signal.unwrap_or_default().to_owned(),
            (Told::AtRenewal(_), signal) => format!(
                "{}; there is no session to end, so the key of a lock with a lease of {TTL:?} was deleted at moments \
                 spread evenly over the time between two renewals",
                signal.unwrap_or_default()
            ),
        }
    }
}

/// All that there is to report.
#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) command: &'static str,
    pub(crate) date: String,
    pub(crate) rounds: Rounds,
    pub(crate) facts: Vec<(&'static str, String)>,
    /// The floor first.
    pub(crate) rows: Vec<Row>,
    pub(crate) left_out: Vec<&'static str>,
}

impl Report {
    /// The three tables, as text that is Markdown too.
    pub(crate) fn tables(&self) -> String {
        let mut text = String::new();
        let mut add = |title: &str, rows: Vec<[String; 4]>| {
            let _ = write!(text, "## {title}\n\n{}\n", table(["", "median", "p99", "to the floor"], &rows));
        };
        let figures = |of: fn(&Row) -> Spread| {
            let floor = of(&self.rows[0]);
            self.rows.iter().map(|row| cells(&row.name, of(row), Some(&floor))).collect()
        };
        add("Lock and release, nobody else there", figures(|row| row.pair));
        add("Hand-over: release is called → the waiter's lock has returned", figures(|row| row.hand_over));
        let floor = self.loss_floor();
        let losses = self.rows.iter().map(|row| match row.told {
            Told::InTime(spread) => cells(&row.name, spread, floor.as_ref()),
            Told::AtRenewal(spread) => {
                let [name, median, p99, _] = cells(&row.name, spread, None);
                [name, median, p99, "at renewal".to_owned()]
            }
            Told::Never(_) => [row.name.clone(), "no signal".to_owned(), String::new(), String::new()],
        });
        add("Loss: pg_terminate_backend is called → the application is told", losses.collect());
        text
    }

    /// None if the floor itself has not told of its losses.
    fn loss_floor(&self) -> Option<Spread> {
        match self.rows[0].told {
            Told::InTime(spread) => Some(spread),
            Told::AtRenewal(_) | Told::Never(_) => None,
        }
    }

    /// The whole page.
    pub(crate) fn markdown(&self) -> String {
        let mut text = format!(
            "# dsync beside its peers\n\n<!-- Generated whole by `{}`: don't edit. -->\n\n\
             Generated whole on {} by\n\n```sh\n{}\n```\n\n",
            self.command, self.date, self.command
        );
        let Rounds { pairs, hand_overs, losses, renewals } = self.rounds;
        let _ = write!(
            text,
            "One run, one machine, TCP on loopback. Each round measures every contender once, in an order drawn afresh: \
             {pairs} rounds of lock and release, {hand_overs} hand-overs, {losses} losses ({renewals} of a lease that is \
             renewed), after a tenth more to warm up. The floor is the first line. Look at the ratios: the times are \
             those of this machine.\n\n{}",
            self.tables()
        );
        text.push_str("## How each is used\n\n");
        for row in &self.rows {
            let _ = writeln!(text, "- **{}**: {}. Loss: {}.", row.name, row.how, row.remark());
        }
        text.push_str(
            "\nAsynchronous libraries run on tokio, each party on a current-thread runtime and a thread of its own, which \
             is the shortest way; their clock is read inside of the task. A waiter is known to wait before the release: \
             `pg_locks` shows it, or Redis has refused it; a waiter that polls is then met at any moment within its \
             pauses. PostgreSQL waits for the disk as in production.\n",
        );
        for line in &self.left_out {
            let _ = write!(text, "\nLeft out: {line}.\n");
        }
        text.push_str("\n## Machine and versions\n\n");
        for (name, value) in &self.facts {
            let _ = writeln!(text, "- {name}: {value}");
        }
        text
    }

    pub(crate) fn json(&self) -> Value {
        let floor = &self.rows[0];
        let contenders: Vec<Value> = self
            .rows
            .iter()
            .map(|row| {
                json!({
                    "name": row.name,
                    "use": row.how,
                    "pair": figures(row.pair, Some(&floor.pair)),
                    "hand_over": figures(row.hand_over, Some(&floor.hand_over)),
                    "loss": match row.told {
                        Told::InTime(spread) => figures(spread, self.loss_floor().as_ref()),
                        Told::AtRenewal(spread) => figures(spread, None),
                        Told::Never(_) => Value::Null,
                    },
                    "loss_remark": row.remark(),
                })
            })
            .collect();
        let facts: Map<String, Value> =
            self.facts.iter().map(|(name, value)| ((*name).to_owned(), json!(value))).collect();
        json!({
            "generated_by": self.command,
            "date": self.date,
            "machine": facts,
            "contenders": contenders,
            "left_out": self.left_out,
        })
    }
}

fn figures(spread: Spread, floor: Option<&Spread>) -> Value {
    let micros = |time: Duration| (time.as_secs_f64() * 1e7).round() / 10.0;
    let mut value =
        json!({ "median_us": micros(spread.median), "p99_us": micros(spread.p99), "runs": spread.count });
    if let Some(floor) = floor {
        value["to_the_floor"] = json!((spread.ratio_to(floor) * 1000.0).round() / 1000.0);
    }
    value
}

fn cells(name: &str, spread: Spread, floor: Option<&Spread>) -> [String; 4] {
    let ratio = floor.map(|floor| ratio(spread.ratio_to(floor))).unwrap_or_default();
    [name.to_owned(), time(spread.median), time(spread.p99), ratio]
}

/// Three digits, as many as such a figure is worth.
pub(crate) fn time(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    let (value, unit) = if seconds < 0.999_5e-3 {
        (seconds * 1e6, "µs")
    } else if seconds < 0.999_5 {
        (seconds * 1e3, "ms")
    } else {
        (seconds, "s")
    };
    format!("{} {unit}", three_digits(value))
}

pub(crate) fn ratio(value: f64) -> String {
    format!("{} ×", three_digits(value))
}

fn three_digits(value: f64) -> String {
    let decimals = if value < 9.995 {
        2
    } else if value < 99.95 {
        1
    } else {
        0
    };
    format!("{value:.decimals$}")
}

/// A Markdown table whose columns are as wide as they have to be, to be read as plain text too.
fn table<const COLUMNS: usize>(head: [&str; COLUMNS], rows: &[[String; COLUMNS]]) -> String {
    let width = |column: usize| {
        let texts = rows.iter().map(|row| row[column].as_str()).chain([head[column]]);
        texts.map(|text| text.chars().count()).max().unwrap_or_default()
    };
    let widths: [usize; COLUMNS] = std::array::from_fn(width);
    let mut text = String::new();
    let mut line = |cells: [&str; COLUMNS]| {
        for (column, (cell, width)) in cells.into_iter().zip(widths).enumerate() {
            // Names to the left, figures to the right.
            let _ = if column == 0 {
                write!(text, "| {cell:width$} ")
            } else {
                write!(text, "| {cell:>width$} ")
            };
        }
        text.push_str("|\n");
    };
    line(head);
    let rule: [String; COLUMNS] = std::array::from_fn(|column| {
        let dashes = "-".repeat(widths[column].max(2) - 1);
        if column == 0 { format!("{dashes}-") } else { format!("{dashes}:") }
    });
    line(rule.each_ref().map(String::as_str));
    for row in rows {
        line(row.each_ref().map(String::as_str));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_the_middle_and_the_hundredth_from_the_top() {
        let spread = Spread::of((1..=200).rev().map(Duration::from_micros).collect()).expect("times");
        assert_eq!((spread.median, spread.p99), (Duration::from_micros(100), Duration::from_micros(198)));
        assert!(Spread::of(Vec::new()).is_none());
    }

    #[test]
    fn writes_times_with_three_digits() {
        let written = [179_400, 999_900, 1_234_000, 101_300_000, 4_650_000_000]
            .map(|nanoseconds| time(Duration::from_nanos(nanoseconds)));
        assert_eq!(written, ["179 µs", "1.00 ms", "1.23 ms", "101 ms", "4.65 s"]);
    }

    #[test]
    fn aligns_tables() {
        let rows = [["dsync".to_owned(), "1 µs".to_owned()]];
        assert_eq!(
            table(["", "median"], &rows),
            "|       | median |\n| ----- | -----: |\n| dsync |   1 µs |\n"
        );
    }
}
