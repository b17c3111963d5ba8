//! How a term ended that the application did not end.

use std::convert::Infallible;
use std::fmt;
use std::time::{Duration, SystemTime};

use crossbeam_channel::Receiver;

/// Signals the end of a term: it never carries a message and disconnects when the lock is no longer held.
///
/// Use it in `select!`, block on `recv()` (which returns an error at the end of the term), or ask `try_recv()`. Clone it
/// for any number of listeners. A channel that has disconnected stays so: the next term has a channel of its own.
pub type Lost = Receiver<Infallible>;

/// A channel that has disconnected already: that of a lock which is not held.
pub(crate) fn lost_already() -> Lost {
    crossbeam_channel::bounded(0).1
}

/// A term that was lost: why, and when this process knew.
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Loss {
    /// What ended the term.
    pub reason: LossReason,
    /// When the lost channel was closed, by this machine's clock.
    pub at: SystemTime,
}

impl Loss {
    pub(crate) fn now(reason: LossReason) -> Self {
        Self { reason, at: SystemTime::now() }
    }
}

/// A time as people write it. One that no calendar of four-digit years since 1970 has (a clock may say anything) stays as
/// it is.
pub(crate) fn date(at: SystemTime) -> String {
    const YEAR_9999: Duration = Duration::from_secs(253_370_764_800);
    match at.duration_since(SystemTime::UNIX_EPOCH) {
        Ok(since) if since < YEAR_9999 => humantime::format_rfc3339_millis(at).to_string(),
        _ => format!("{at:?}"),
    }
}

impl fmt::Debug for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { reason, at } = self;
        f.debug_struct("Loss").field("reason", reason).field("at", &format_args!("{}", date(*at))).finish()
    }
}

impl fmt::Display for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.reason.fmt(f)
    }
}

/// Why a term was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum LossReason {
    /// An operator terminated the session (`pg_terminate_backend`), or the server is being shut down: PostgreSQL
    /// reports both alike (SQLSTATE 57P01).
    Terminated,
    /// The server crashed, or was shut down in immediate mode, and said so (57P02). Mostly it has no time to: then it is
    /// [`ConnectionClosed`](Self::ConnectionClosed).
    ServerCrashed,
    /// The database was dropped (57P04).
    DatabaseDropped,
    /// The server ended the session since it heard nothing for the length of the lease (57P05).
    LeaseExpired,
    /// The lease could not be renewed in time: the local deadline passed. The process was frozen or starved, or the
    /// network or the server stood still.
    LeaseNotRenewed,
    /// A heartbeat was not answered within its timeout.
    HeartbeatTimedOut,
    /// The connection was closed without a word, by the server, the network or something in between.
    ConnectionClosed,
    /// The session turned out to be another one than the lock was acquired in: a pooler stands between.
    SessionChanged,
    /// The session lives and does not hold the lock any more: something else that speaks on its connection, a pooler or a
    /// forked process, has unlocked it.
    Unlocked,
    /// The server became a standby.
    ServerIsStandby,
    /// The server answered with an error that has no name of its own here; the log has its text.
    ServerError,
    /// The lock was taken away on purpose, in a test.
    Revoked,
    /// The supervisor of the claim failed; please report it.
    SupervisorFailed,
}

impl LossReason {
    /// Whether the server itself said that it ends the session. It says so *before* it lets go of the session's locks.
    pub(crate) fn is_announced(self) -> bool {
        matches!(self, Self::Terminated | Self::ServerCrashed | Self::DatabaseDropped | Self::LeaseExpired)
    }
}

impl fmt::Display for LossReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Terminated => "the session was terminated by an operator or a shutdown of the server",
            Self::ServerCrashed => "the server crashed or was shut down at once",
            Self::DatabaseDropped => "the database was dropped",
            Self::LeaseExpired => "the server heard nothing for the length of the lease",
            Self::LeaseNotRenewed => "the lease could not be renewed in time",
            Self::HeartbeatTimedOut => "a heartbeat was not answered in time",
            Self::ConnectionClosed => "the connection was closed",
            Self::SessionChanged => "the session was exchanged for another one by a pooler",
            Self::Unlocked => "something else unlocked it in our session",
            Self::ServerIsStandby => "the server became a standby",
            Self::ServerError => "the server answered with an error",
            Self::Revoked => "the lock was revoked",
            Self::SupervisorFailed => "the supervisor failed",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loss_is_shown_with_its_date_and_an_odd_clock_does_no_harm() {
        let loss =
            |at: Option<SystemTime>| format!("{:?}", Loss { reason: LossReason::Revoked, at: at.unwrap() });
        let epoch = SystemTime::UNIX_EPOCH;
        assert_eq!(loss(Some(epoch)), "Loss { reason: Revoked, at: 1970-01-01T00:00:00.000Z }");
        for odd in [
            epoch.checked_sub(Duration::from_secs(1)),
            epoch.checked_add(Duration::from_secs(253_402_300_800)),
        ] {
            assert!(loss(odd).contains("at: SystemTime"), "{}", loss(odd));
        }
    }
}
