//! What a look at the server finds: whether locks will work there, and what to change.

use std::fmt;

use crate::error::{Error, chain};

/// What [`PostgresManager::check`](crate::PostgresManager::check) or [`Config::check`](crate::Config::check) has found.
///
/// To show it to a person, print it: a line of the report is a few lines of text, at most 80 columns wide where no word is longer.
///
/// ```no_run
/// use dsync::Config;
///
/// let report = Config::from_url("postgres://app@localhost/app")?.check();
/// print!("{report}");
/// std::process::exit(if report.is_ok() { 0 } else { 1 });
/// # Ok::<(), dsync::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct CheckReport {
    /// What was looked at, in that order. What could not be looked at, because of what went wrong before, is not among them.
    pub lines: Vec<CheckLine>,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct CheckLine {
    /// What the line is about, in one word; a program may rely on it.
    ///
    /// | topic | what was looked at |
    /// |---|---|
    /// | `settings` | the manager's own settings; only if they cannot work |
    /// | `manager` | the manager; only if it was stopped, or made in another process |
    /// | `connection` | whether there is a session, as whom, and how long a round trip takes |
    /// | `server` | its version; a warning if it is known not to be PostgreSQL, or one of several nodes that keep locks by themselves |
    /// | `primary` | whether it is the primary, and no standby |
    /// | `role` | rights that have nothing to do with the catalog |
    /// | `catalog` | whether tokens and annotations can be kept |
    /// | `takeover` | for how long no lock is granted yet, since the server was taken over ([`Config::takeover`](crate::Config::takeover)), a warning while that lasts; how long it will be after a crash, if another's lease makes that longer than this one's; or that the managers of the database have agreed on more than this one's settings |
    /// | `lease` | whether the server ends the session of a silent holder |
    /// | `clients` | how the server notices clients that are gone |
    /// | `timeouts` | the role's own timeouts; only if there are any |
    /// | `connections` | whether the server, the database and the role allow as many sessions as the manager may open |
    /// | `locks` | whether the server's table of locks has room |
    /// | `replication` | standbys, and what waits for them |
    /// | `quorum` | with [`Config::quorum`](crate::Config::quorum): whether the standbys confirm heartbeats |
    /// | `sessions` | whether two sessions have a backend each, and exclude each other |
    pub topic: &'static str,
    /// Whether it is as it should be.
    pub verdict: Verdict,
    /// What was found. It contains no password.
    pub text: String,
    /// What to change. Always there if the verdict is not good, unless the text says it.
    pub advice: Option<String>,
}

/// Whether something is as it should be; the worst is the greatest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Verdict {
    /// It is.
    Good,
    /// Locks work, but something may go wrong, or work less well than it could.
    Warning,
    /// Locks do not work, or will not when the manager asks for all that it may ask for.
    Wrong,
}

impl CheckReport {
    pub(crate) fn of(line: CheckLine) -> Self {
        Self { lines: vec![line] }
    }

    /// The worst verdict of all lines.
    #[must_use]
    pub fn worst(&self) -> Verdict {
        self.lines.iter().map(|line| line.verdict).max().unwrap_or(Verdict::Good)
    }

    /// True if nothing is wrong. There may be warnings.
    #[must_use]
    pub fn is_ok(&self) -> bool {
        self.worst() < Verdict::Wrong
    }
}

impl CheckLine {
    pub(crate) fn good(topic: &'static str, text: impl Into<String>) -> Self {
        Self { topic, verdict: Verdict::Good, text: text.into(), advice: None }
    }

    pub(crate) fn warning(topic: &'static str, text: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { topic, verdict: Verdict::Warning, text: text.into(), advice: Some(advice.into()) }
    }

    pub(crate) fn wrong(topic: &'static str, text: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { topic, verdict: Verdict::Wrong, text: text.into(), advice: Some(advice.into()) }
    }

    pub(crate) fn from_error(topic: &'static str, error: &Error) -> Self {
        Self::from_text(topic, chain(error))
    }

    /// The text of an error of ours: says what is wrong, and then, behind the first semicolon, what to change.
    pub(crate) fn from_text(topic: &'static str, text: String) -> Self {
        let (text, advice) = match text.split_once("; ") {
            Some((text, advice)) => (text.to_owned(), Some(advice.to_owned())),
            None => (text, None),
        };
        Self { topic, verdict: Verdict::Wrong, text, advice }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Good => "good",
            Self::Warning => "warning",
            Self::Wrong => "wrong",
        })
    }
}

/// The verdict, the topic, and beside them what was found and what to change.
impl fmt::Display for CheckLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const WIDTH: usize = 80;
        const INDENT: usize = "warning  connections  ".len();
        let mut text = format!("{:7}  {:11}  ", self.verdict, self.topic);
        let mut column = INDENT;
        let advice = self.advice.iter().flat_map(|advice| advice.split_whitespace());
        let words = self.text.split_whitespace().map(|word| (word, false));
        let words = words.chain(advice.enumerate().map(|(number, word)| (word, number == 0)));
        for (word, begins_advice) in words {
            let length = word.chars().count() + 1;
            if begins_advice || column + length > WIDTH + 1 && column > INDENT {
                text.truncate(text.trim_end().len());
                text.push_str(&format!("\n{:INDENT$}", ""));
                column = INDENT;
            }
            if begins_advice {
                text.push_str("-> ");
                column += 3;
            }
            text.push_str(word);
            text.push(' ');
            column += length;
        }
        f.write_str(text.trim_end())
    }
}

/// One line below the other, each with an end of line.
impl fmt::Display for CheckReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.lines.iter().try_for_each(|line| writeln!(f, "{line}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn a_report_is_as_bad_as_its_worst_line() {
        let good = CheckLine::good("server", "PostgreSQL 15.18");
        let warning = CheckLine::warning("role", "few rights", "grant some");
        let error = Error::new(ErrorKind::InvalidConfig, "max_sessions is 0; set at least 1; or more");
        let wrong = CheckLine::from_error("settings", &error);
        assert_eq!(wrong.text, "invalid configuration: max_sessions is 0");
        assert_eq!(wrong.advice.as_deref(), Some("set at least 1; or more"));
        for (lines, worst) in [
            (vec![], Verdict::Good),
            (vec![good.clone()], Verdict::Good),
            (vec![warning.clone(), good.clone()], Verdict::Warning),
            (vec![good, wrong, warning], Verdict::Wrong),
        ] {
            let report = CheckReport { lines };
            assert_eq!((report.worst(), report.is_ok()), (worst, worst != Verdict::Wrong));
        }
    }

    #[test]
    fn lines_are_aligned_and_no_wider_than_a_terminal() {
        let long = "word ".repeat(30) + &"x".repeat(90);
        let report = CheckReport {
            lines: vec![
                CheckLine::good("server", "PostgreSQL 15.18"),
                CheckLine::warning("connections", long, "raise it"),
                CheckLine::wrong("x", "", "do it"),
            ],
        };
        let indent = " ".repeat(22);
        let words = ["word"; 11].join(" ");
        let text = format!(
            "good     server       PostgreSQL 15.18\n\
             warning  connections  {words}\n{indent}{words}\n{indent}{}\n{indent}{}\n{indent}-> raise it\n\
             wrong    x\n{indent}-> do it\n",
            ["word"; 8].join(" "),
            "x".repeat(90)
        );
        assert_eq!(report.to_string(), text);
    }
}
