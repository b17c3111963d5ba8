//! Why a lock cannot be had for now: the last error, for those who ask, and how loud the log is about it.

use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind};

/// The log is reminded of a problem that goes on, at this distance.
const REMINDER: Duration = Duration::from_secs(60);

/// A problem that comes and goes is logged as a warning at most once in 10 s.
const RETURN: Duration = Duration::from_secs(10);

/// The problem of a session or of a claim, from the first failure until something succeeds.
#[derive(Debug, Default)]
pub(crate) struct Problem {
    last: Option<Error>,
    /// The kinds that the log was warned of, each with the time of the last warning.
    warned: Vec<(ErrorKind, Instant)>,
    now: Now,
}

/// What has happened last.
#[derive(Debug, Default)]
enum Now {
    /// Something succeeded.
    #[default]
    Well,
    /// Something failed. `is_warned` if the log was warned of it since something succeeded.
    Failing { is_warned: bool },
}

impl Problem {
    /// Keeps the error, and gives the level at which it is to be logged: a warning if it is the first of its kind, or the first for a
    /// minute; or for 10 s, if it is a new problem.
    pub(crate) fn note(&mut self, error: Error) -> log::Level {
        let level = self.level(error.kind(), Instant::now());
        self.last = Some(error);
        level
    }

    fn level(&mut self, kind: ErrorKind, now: Instant) -> log::Level {
        let (distance, is_warned) = match self.now {
            Now::Well => (RETURN, false),
            Now::Failing { is_warned } => (REMINDER, is_warned),
        };
        self.now = Now::Failing { is_warned };
        match self.warned.iter_mut().find(|(known, _)| *known == kind) {
            Some((_, at)) if now.duration_since(*at) < distance => return log::Level::Debug,
            Some((_, at)) => *at = now,
            None => self.warned.push((kind, now)),
        }
        self.now = Now::Failing { is_warned: true };
        log::Level::Warn
    }

    /// Keeps the error for those who ask, who are told of it in another way than by a line of its own.
    pub(crate) fn keep(&mut self, error: Option<Error>) {
        self.last = error;
    }

    pub(crate) fn last(&self) -> Option<&Error> {
        self.last.as_ref()
    }

    pub(crate) fn take(&mut self) -> Option<Error> {
        self.last.take()
    }

    /// Something has succeeded: the next error is a new problem. True if the log was warned of the one that is over.
    pub(crate) fn end(&mut self) -> bool {
        self.last = None;
        matches!(std::mem::take(&mut self.now), Now::Failing { is_warned: true })
    }
}

#[cfg(test)]
mod tests {
    use log::Level::{Debug, Warn};

    use super::*;

    #[test]
    fn a_problem_is_warned_of_once_and_then_once_a_minute_for_each_kind() {
        let (mut problem, begun) = (Problem::default(), Instant::now());
        let told = [
            (ErrorKind::SessionUnavailable, 0, Warn),
            (ErrorKind::SessionUnavailable, 1, Debug),
            (ErrorKind::PoolExhausted, 2, Warn),
            // Two kinds by turns are no flood.
            (ErrorKind::SessionUnavailable, 3, Debug),
            (ErrorKind::PoolExhausted, 59, Debug),
            (ErrorKind::SessionUnavailable, 60, Warn),
            (ErrorKind::SessionUnavailable, 61, Debug),
            (ErrorKind::PoolExhausted, 62, Warn),
        ];
        for (kind, second, level) in told {
            assert_eq!(
                problem.level(kind, begun + Duration::from_secs(second)),
                level,
                "{kind:?} after {second} s"
            );
        }
        // One that comes and goes is no flood either.
        let returns = [(63, false), (71, false), (72, true), (73, false), (83, true)];
        assert!(problem.end() && !problem.end());
        for (second, is_told) in returns {
            let level = problem.level(ErrorKind::PoolExhausted, begun + Duration::from_secs(second));
            assert_eq!(level, if is_told { Warn } else { Debug }, "after {second} s");
            assert_eq!(problem.end(), is_told, "after {second} s");
        }
    }
}
