//! How a term ended that the application did not end.

use std::convert::Infallible;
use std::fmt;
use std::ops::Deref;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use parking_lot::Mutex;

use crate::clock::Moment;

/// Signals the end of a term: a channel that never carries a message, and disconnects when the lock is no longer held.
///
/// Ask it, wait for it, or use it in `select!`, for which it stands for its [`channel`](Self::channel). Clone it for any number of
/// listeners. What is lost stays so: the next term has a `Lost` of its own.
///
/// ```
/// use std::time::Duration;
/// use dsync::crossbeam_channel::{after, select};
/// use dsync::{MemoryManager, SyncManager};
///
/// let manager = MemoryManager::new();
/// manager.start()?;
/// let guard = manager.lock("migrations")?.acquire(Duration::from_secs(60))?;
/// let lost = guard.lost();
/// assert!(!lost.is_lost());
/// select! {
///     recv(lost) -> _ => println!("stop the work"),
///     recv(after(Duration::from_millis(1))) -> _ => println!("do the next piece of it"),
/// }
/// # Ok::<(), dsync::Error>(())
/// ```
#[derive(Clone)]
pub struct Lost {
    channel: Receiver<Infallible>,
    followers: Arc<Followers>,
}

/// What is to be raised when a term ends.
type Followers = Mutex<Vec<Arc<Signal>>>;

impl Lost {
    /// One of a term that lasts until [`Alive`] is dropped.
    pub(crate) fn pair() -> (Alive, Self) {
        let (sender, channel) = bounded(0);
        let followers = Arc::default();
        (Alive { sender: Some(sender), followers: Arc::clone(&followers) }, Self { channel, followers })
    }

    /// Raises `signal` at the end of the term: on the thread that ends it, and so before anybody else can have the lock, as far
    /// as this process has any say in that. At once if the term is over.
    pub(crate) fn raises(&self, signal: &Arc<Signal>) {
        self.followers.lock().push(Arc::clone(signal));
        // If the term ended in between, whoever ended it may have looked before.
        if self.is_lost() {
            signal.raise();
        }
    }

    /// True if the term is over. Does not block. It looks at the channel, which closes a moment late in a process that was frozen;
    /// [`Term::is_held`](crate::Term::is_held) and [`LockGuard::lost`](crate::LockGuard::lost) look at the clock, too.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.channel.try_recv().is_err_and(|error| error.is_disconnected())
    }

    /// Blocks until the term is over.
    pub fn wait(&self) {
        let _ = self.channel.recv();
    }

    /// Blocks until the term is over, or `timeout` has passed; `true` if it is over.
    #[must_use]
    pub fn wait_timeout(&self, timeout: Duration) -> bool {
        self.channel.recv_timeout(timeout) == Err(RecvTimeoutError::Disconnected)
    }

    /// The channel itself, which disconnects at the end of the term.
    pub fn channel(&self) -> &Receiver<Infallible> {
        &self.channel
    }
}

impl Deref for Lost {
    type Target = Receiver<Infallible>;

    fn deref(&self) -> &Self::Target {
        &self.channel
    }
}

impl fmt::Debug for Lost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lost").field("is_lost", &self.is_lost()).finish()
    }
}

/// Keeps a term's [`Lost`] open: dropped when the term ends.
pub(crate) struct Alive {
    /// `None` once dropped.
    sender: Option<Sender<Infallible>>,
    followers: Arc<Followers>,
}

impl Drop for Alive {
    fn drop(&mut self) {
        drop(self.sender.take());
        let followers = std::mem::take(&mut *self.followers.lock());
        followers.iter().for_each(|signal| signal.raise());
    }
}

impl fmt::Debug for Alive {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Alive")
    }
}

/// A channel that any number of parties may close; the first of them does.
pub(crate) struct Signal(Mutex<Option<Alive>>);

impl Signal {
    /// A signal, and the channel that disconnects when it is raised.
    pub(crate) fn new() -> (Arc<Self>, Lost) {
        let (alive, lost) = Lost::pair();
        (Arc::new(Self(Mutex::new(Some(alive)))), lost)
    }

    pub(crate) fn raise(&self) {
        let alive = self.0.lock().take();
        drop(alive);
    }
}

impl fmt::Debug for Signal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Signal")
    }
}

/// That of a lock which is not held.
pub(crate) fn lost_already() -> Lost {
    Lost::pair().1
}

/// A term that was lost: why, and when this process knew.
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Loss {
    /// What ended the term.
    pub reason: LossReason,
    /// When the lost channel was closed, by this machine's clock.
    pub at: SystemTime,
    /// The same by a clock that nobody sets, so that of two losses it is known which came first.
    pub(crate) moment: Moment,
}

impl Loss {
    pub(crate) fn now(reason: LossReason) -> Self {
        Self { reason, at: SystemTime::now(), moment: Moment::now() }
    }

    /// The one that came last.
    pub(crate) fn last_of(losses: impl IntoIterator<Item = Self>) -> Option<Self> {
        losses.into_iter().max_by_key(|loss| loss.moment)
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
        let Self { reason, at, .. } = self;
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
    /// An operator terminated the session (`pg_terminate_backend`), the server is being shut down, or its main process died:
    /// PostgreSQL reports all of them alike (SQLSTATE 57P01).
    Terminated,
    /// Another process of the server crashed, which ends all sessions, and the server said so (57P02). If it had no time to, the reason is
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
    /// The standbys did not confirm a heartbeat within the term, as [`Config::quorum`](crate::Config::quorum) asks for: one of them is
    /// gone, or has become the primary.
    NotConfirmed,
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
    /// The thread that worked on the claim panicked: in the application's logger, say; or by a defect of this
    /// library, which please report.
    SupervisorFailed,
}

impl LossReason {
    /// Its name in a label of a metric.
    #[cfg(feature = "metrics")]
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Terminated => "terminated",
            Self::ServerCrashed => "server_crashed",
            Self::DatabaseDropped => "database_dropped",
            Self::LeaseExpired => "lease_expired",
            Self::LeaseNotRenewed => "lease_not_renewed",
            Self::HeartbeatTimedOut => "heartbeat_timed_out",
            Self::NotConfirmed => "not_confirmed",
            Self::ConnectionClosed => "connection_closed",
            Self::SessionChanged => "session_changed",
            Self::Unlocked => "unlocked",
            Self::ServerIsStandby => "server_is_standby",
            Self::ServerError => "server_error",
            Self::Revoked => "revoked",
            Self::SupervisorFailed => "supervisor_failed",
        }
    }

    /// Whether the server itself said that it ends the session. It says so *before* it lets go of the session's locks; after a crash it lets go
    /// of all of them, when all sessions are over.
    pub(crate) fn is_announced(self) -> bool {
        matches!(self, Self::Terminated | Self::ServerCrashed | Self::DatabaseDropped | Self::LeaseExpired)
    }
}

impl fmt::Display for LossReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Terminated => {
                "the session was terminated by an operator, by a shutdown of the server or by its crash"
            }
            Self::ServerCrashed => "a process of the server crashed, which ends all sessions",
            Self::DatabaseDropped => "the database was dropped",
            Self::LeaseExpired => "the server heard nothing for the length of the lease",
            Self::LeaseNotRenewed => "the lease could not be renewed in time",
            Self::HeartbeatTimedOut => "a heartbeat was not answered in time",
            Self::NotConfirmed => "the standbys did not confirm a heartbeat in time",
            Self::ConnectionClosed => "the connection was closed",
            Self::SessionChanged => "the session was exchanged for another one by a pooler",
            Self::Unlocked => "something else unlocked it in our session",
            Self::ServerIsStandby => "the server became a standby",
            Self::ServerError => "the server answered with an error",
            Self::Revoked => "the lock was revoked",
            Self::SupervisorFailed => "the thread that worked on it panicked",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_term_raises_its_signals_also_those_that_come_later() {
        let ((alive, lost), (first, heard)) = (Lost::pair(), Signal::new());
        lost.raises(&first);
        assert!(!heard.is_lost() && !lost.is_lost());
        drop(alive);
        assert!(heard.is_lost() && lost.is_lost());
        let (late, heard) = Signal::new();
        lost.raises(&late);
        assert!(heard.is_lost());
    }

    #[test]
    fn of_two_losses_the_later_one_is_the_last_though_the_clock_was_set_back_between_them() {
        let first = Loss::now(LossReason::Terminated);
        let later = loop {
            let later = Loss::now(LossReason::Revoked);
            if later.moment > first.moment {
                break Loss { at: first.at - Duration::from_secs(3600), ..later };
            }
        };
        for losses in [[&first, &later], [&later, &first]] {
            assert_eq!(Loss::last_of(losses.into_iter().cloned()), Some(later.clone()));
        }
    }

    #[test]
    fn a_loss_is_shown_with_its_date_and_an_odd_clock_does_no_harm() {
        let loss = |at: Option<SystemTime>| {
            format!("{:?}", Loss { at: at.unwrap(), ..Loss::now(LossReason::Revoked) })
        };
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
