//! What a worker tells the process that started it: one line on its standard output for each event.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, SystemTime};

/// A moment on the clock that all processes of one machine share, as the time since 1970.
///
/// [`std::time::Instant`] would not do: it means nothing in another process.
pub(crate) type Moment = Duration;

pub(crate) fn now() -> Moment {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}

/// Something that happened to a worker, and when.
#[derive(Debug, PartialEq)]
pub(crate) struct Report {
    pub(crate) at: Moment,
    pub(crate) what: What,
}

#[derive(Debug, PartialEq)]
pub(crate) enum What {
    /// It stands for leader.
    Standing,
    /// It leads, with this fencing token.
    Gained { token: i64 },
    /// It knows that it leads no longer, and why.
    Lost { reason: String },
    /// The fence refused a unit of its work: its term is over.
    Refused,
    /// It was told to end, and has stopped its work; only then does it give the leadership back.
    Stopped,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ", self.at.as_micros())?;
        match &self.what {
            What::Standing => f.write_str("standing"),
            What::Gained { token } => write!(f, "gained {token}"),
            What::Lost { reason } => write!(f, "lost {reason}"),
            What::Refused => f.write_str("refused"),
            What::Stopped => f.write_str("stopped"),
        }
    }
}

impl FromStr for Report {
    type Err = String;

    fn from_str(line: &str) -> Result<Self, Self::Err> {
        let unknown = || format!("a worker says {line:?}, which means nothing here");
        let (micros, what) = line.split_once(' ').ok_or_else(unknown)?;
        let at = Moment::from_micros(micros.parse().map_err(|_| unknown())?);
        let (word, rest) = what.split_once(' ').unwrap_or((what, ""));
        let what = match word {
            "standing" => What::Standing,
            "gained" => What::Gained { token: rest.parse().map_err(|_| unknown())? },
            "lost" => What::Lost { reason: rest.to_owned() },
            "refused" => What::Refused,
            "stopped" => What::Stopped,
            _ => return Err(unknown()),
        };
        Ok(Self { at, what })
    }
}
