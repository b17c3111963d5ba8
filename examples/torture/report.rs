//! What a worker tells the referee: one line on its standard output for each event.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, SystemTime};

/// The keys that everybody fights for. Everywhere else a key is its place in this list.
pub(crate) const KEYS: [&str; 5] = ["red", "green", "blue", "black", "white"];

/// So many of the keys, from the first, have a leader in each process, beside claims and guards.
pub(crate) const LED: usize = 2;

/// How a key is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Holder {
    Claim,
    Guard,
    Leader,
}

impl Holder {
    pub(crate) const ALL: [Self; 3] = [Self::Claim, Self::Guard, Self::Leader];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Claim => "claim",
            Self::Guard => "guard",
            Self::Leader => "leader",
        }
    }
}

/// A moment on the clock that all processes of one machine share, as the time since 1970.
pub(crate) type Moment = Duration;

pub(crate) fn now() -> Moment {
    moment(SystemTime::now())
}

pub(crate) fn moment(time: SystemTime) -> Moment {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}

/// Something that happened to a worker, and when.
#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) at: Moment,
    pub(crate) what: What,
}

#[derive(Debug)]
pub(crate) enum What {
    /// It had this before its manager was made.
    Before(Usage),
    /// It holds the key.
    Begun { key: usize, token: i64, holder: Holder },
    /// It is about to commit a unit of fenced work.
    Commits { key: usize, token: i64 },
    /// The server has confirmed that commit.
    Committed { key: usize },
    /// The fence refused a unit of its work.
    Refused { key: usize },
    /// A unit of its work failed otherwise: the server was away, or the query cancelled.
    Failed { key: usize },
    /// It is about to release the key, and has held it until now.
    Released { key: usize, token: i64 },
    /// It has lost the key. The reason is `None` if nobody told it.
    Lost { key: usize, token: i64, reason: Option<String> },
    /// It has lost the key, was told, and works on. `shown` if the leader's status shows that.
    Ignores { key: usize, token: i64, shown: bool },
    /// A leader of it has told this event.
    Heard { event: String },
    /// It could not get a key.
    Missed { error: String },
    /// A call of the library, a word without blanks, has returned. It was to take no longer than `limit`.
    Returned { call: String, outcome: String, took: Duration, limit: Duration },
    /// It has this after its manager is gone.
    After(Usage),
}

/// What a process uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Usage {
    pub(crate) threads: usize,
    pub(crate) descriptors: usize,
}

/// Begins each line, since others write to the output as well: the harness of the tests.
const MARK: &str = "@";

/// Stands for a loss that nobody told.
const SILENT: &str = "-";

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{MARK} {} ", self.at.as_micros())?;
        match &self.what {
            What::Before(usage) => write!(f, "before {} {}", usage.threads, usage.descriptors),
            What::Begun { key, token, holder } => write!(f, "begun {key} {token} {}", holder.name()),
            What::Commits { key, token } => write!(f, "commits {key} {token}"),
            What::Committed { key } => write!(f, "committed {key}"),
            What::Refused { key } => write!(f, "refused {key}"),
            What::Failed { key } => write!(f, "failed {key}"),
            What::Released { key, token } => write!(f, "released {key} {token}"),
            What::Lost { key, token, reason } => {
                write!(f, "lost {key} {token} {}", reason.as_deref().unwrap_or(SILENT))
            }
            What::Ignores { key, token, shown } => write!(f, "ignores {key} {token} {shown}"),
            What::Heard { event } => write!(f, "heard {event}"),
            What::Missed { error } => write!(f, "missed {error}"),
            What::Returned { call, outcome, took, limit } => {
                write!(f, "returned {call} {outcome} {} {}", took.as_micros(), limit.as_micros())
            }
            What::After(usage) => write!(f, "after {} {}", usage.threads, usage.descriptors),
        }
    }
}

impl Report {
    /// `None` if the line is not a whole report: something else, or cut short by the death of the worker.
    pub(crate) fn read(line: &str) -> Option<Self> {
        let mut words = line.strip_suffix('\n')?.split(' ');
        if words.next()? != MARK {
            return None;
        }
        let words = &mut words;
        let at = Moment::from_micros(number(words)?);
        let what = match words.next()? {
            "before" => What::Before(usage(words)?),
            "begun" => What::Begun { key: key(words)?, token: number(words)?, holder: holder(words)? },
            "commits" => What::Commits { key: key(words)?, token: number(words)? },
            "committed" => What::Committed { key: key(words)? },
            "refused" => What::Refused { key: key(words)? },
            "failed" => What::Failed { key: key(words)? },
            "released" => What::Released { key: key(words)?, token: number(words)? },
            "lost" => {
                let (key, token, reason) = (key(words)?, number(words)?, words.next()?);
                What::Lost { key, token, reason: (reason != SILENT).then(|| reason.to_owned()) }
            }
            "ignores" => What::Ignores { key: key(words)?, token: number(words)?, shown: number(words)? },
            "heard" => What::Heard { event: words.next()?.to_owned() },
            "missed" => What::Missed { error: words.next()?.to_owned() },
            "returned" => What::Returned {
                call: words.next()?.to_owned(),
                outcome: words.next()?.to_owned(),
                took: Duration::from_micros(number(words)?),
                limit: Duration::from_micros(number(words)?),
            },
            "after" => What::After(usage(words)?),
            _ => return None,
        };
        Some(Self { at, what })
    }
}

fn number<'a, N: FromStr>(words: &mut impl Iterator<Item = &'a str>) -> Option<N> {
    words.next()?.parse().ok()
}

fn key<'a>(words: &mut impl Iterator<Item = &'a str>) -> Option<usize> {
    number(words).filter(|key| *key < KEYS.len())
}

fn holder<'a>(words: &mut impl Iterator<Item = &'a str>) -> Option<Holder> {
    let name = words.next()?;
    Holder::ALL.into_iter().find(|holder| holder.name() == name)
}

fn usage<'a>(words: &mut impl Iterator<Item = &'a str>) -> Option<Usage> {
    Some(Usage { threads: number(words)?, descriptors: number(words)? })
}
