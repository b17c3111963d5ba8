//! What a worker tells the referee: one line on its standard output for each event.

use std::fmt;
use std::ops::RangeInclusive;
use std::process;
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, SystemTime};

/// What everybody fights for: the keys of locks, and after them the permits of one semaphore, each of which is for one holder. Everywhere else a
/// key is its place in this list.
pub(crate) const KEYS: [&str; 7] = ["red", "green", "blue", "black", "white", "gold/1", "gold/2"];

/// So many of them are the keys of locks.
pub(crate) const LOCKS: usize = 5;

/// The semaphore.
pub(crate) const SEMAPHORE: &str = "gold";
pub(crate) const PERMITS: u32 = (KEYS.len() - LOCKS) as u32;

/// The names of keys, by the columns of `dsync.locks`.
pub(crate) const NAME: &str = "held.key || coalesce('/' || held.permit, '')";

/// So many of the keys, from the first, have a leader in each process, beside claims and guards.
pub(crate) const LED: usize = 2;

/// How a key is held. A reader shares it with other readers; a permit nobody shares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Holder {
    Claim,
    Guard,
    Leader,
    ReaderClaim,
    ReaderGuard,
    PermitClaim,
    PermitGuard,
}

impl Holder {
    pub(crate) const ALL: [Self; 7] = [
        Self::Claim,
        Self::Guard,
        Self::Leader,
        Self::ReaderClaim,
        Self::ReaderGuard,
        Self::PermitClaim,
        Self::PermitGuard,
    ];

    pub(crate) fn is_reader(self) -> bool {
        matches!(self, Self::ReaderClaim | Self::ReaderGuard)
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Claim => "claim",
            Self::Guard => "guard",
            Self::Leader => "leader",
            Self::ReaderClaim => "reader-claim",
            Self::ReaderGuard => "reader-guard",
            Self::PermitClaim => "permit-claim",
            Self::PermitGuard => "permit-guard",
        }
    }
}

/// Tells a term from all others of its key: by the token, which several readers may have, and a number that no two terms have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Id {
    pub(crate) token: i64,
    number: u64,
}

impl Id {
    /// That of a new term of this process.
    pub(crate) fn new(token: i64) -> Self {
        static TERMS: AtomicU64 = AtomicU64::new(0);
        Self { token, number: u64::from(process::id()) << 32 | TERMS.fetch_add(1, Relaxed) }
    }

    /// Those of all terms with this token.
    pub(crate) fn with(token: i64) -> RangeInclusive<Self> {
        Self { token, number: 0 }..=Self { token, number: u64::MAX }
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.token, self.number)
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
    Begun { key: usize, id: Id, holder: Holder },
    /// It is about to commit a unit of fenced work.
    Commits { key: usize, id: Id },
    /// The server has confirmed that commit, of a writer.
    Committed { key: usize },
    /// The same of a reader.
    Read { key: usize },
    /// The fence refused a unit of its work.
    Refused { key: usize },
    /// The fence refused a unit of work that a reader did after its term.
    RefusedLate { key: usize },
    /// A unit of its work failed otherwise: the server was away, or the query cancelled.
    Failed { key: usize },
    /// It is about to release the key, and has held it until now.
    Released { key: usize, id: Id },
    /// It has lost the key. The reason is `None` if nobody told it.
    Lost { key: usize, id: Id, reason: Option<String> },
    /// It has lost the key, was told, and works on. `shown` if the leader's status shows that.
    Ignores { key: usize, id: Id, shown: bool },
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
            What::Begun { key, id, holder } => write!(f, "begun {key} {id} {}", holder.name()),
            What::Commits { key, id } => write!(f, "commits {key} {id}"),
            What::Committed { key } => write!(f, "committed {key}"),
            What::Read { key } => write!(f, "read {key}"),
            What::Refused { key } => write!(f, "refused {key}"),
            What::RefusedLate { key } => write!(f, "refused-late {key}"),
            What::Failed { key } => write!(f, "failed {key}"),
            What::Released { key, id } => write!(f, "released {key} {id}"),
            What::Lost { key, id, reason } => {
                write!(f, "lost {key} {id} {}", reason.as_deref().unwrap_or(SILENT))
            }
            What::Ignores { key, id, shown } => write!(f, "ignores {key} {id} {shown}"),
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
            "begun" => What::Begun { key: key(words)?, id: id(words)?, holder: holder(words)? },
            "commits" => What::Commits { key: key(words)?, id: id(words)? },
            "committed" => What::Committed { key: key(words)? },
            "read" => What::Read { key: key(words)? },
            "refused" => What::Refused { key: key(words)? },
            "refused-late" => What::RefusedLate { key: key(words)? },
            "failed" => What::Failed { key: key(words)? },
            "released" => What::Released { key: key(words)?, id: id(words)? },
            "lost" => {
                let (key, id, reason) = (key(words)?, id(words)?, words.next()?);
                What::Lost { key, id, reason: (reason != SILENT).then(|| reason.to_owned()) }
            }
            "ignores" => What::Ignores { key: key(words)?, id: id(words)?, shown: number(words)? },
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

fn id<'a>(words: &mut impl Iterator<Item = &'a str>) -> Option<Id> {
    Some(Id { token: number(words)?, number: number(words)? })
}

fn holder<'a>(words: &mut impl Iterator<Item = &'a str>) -> Option<Holder> {
    let name = words.next()?;
    Holder::ALL.into_iter().find(|holder| holder.name() == name)
}

fn usage<'a>(words: &mut impl Iterator<Item = &'a str>) -> Option<Usage> {
    Some(Usage { threads: number(words)?, descriptors: number(words)? })
}
