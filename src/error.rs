//! The one error of the library: a kind to match on, a text for the operator, the cause kept.

use std::borrow::Cow;
use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::loss::Loss;
use crate::mode::Mode;

/// What the library's operations return.
pub type Result<T> = std::result::Result<T, Error>;

/// Why an operation failed.
///
/// Match on [`kind`](Error::kind). The text says what happened and what to change; the cause, where there is one
/// (a [`postgres::Error`], say), is kept as [`source`](StdError::source). Cloning is cheap: several threads that wait
/// for one lock are told of the same failure. `{error:#}` writes the causes behind the text, for a log line; `{error:?}` writes
/// them below it, which is what a `main` shows that returns the error.
///
/// ```
/// use std::time::Duration;
/// use dsync::{ErrorKind, MemoryManager, SyncManager};
///
/// let manager = MemoryManager::new();
/// manager.start()?;
/// let lock = manager.lock("nightly-report")?;
/// match lock.acquire(Duration::from_secs(5)) {
///     Ok(guard) => guard.release()?,
///     Err(error) if error.kind() == ErrorKind::TimedOut => println!("not in five seconds: {error:#}"),
///     Err(error) => return Err(error),
/// }
/// # Ok::<(), dsync::Error>(())
/// ```
#[derive(Clone)]
pub struct Error {
    kind: ErrorKind,
    message: Cow<'static, str>,
    source: Option<Arc<dyn StdError + Send + Sync>>,
    grace_left: Option<Duration>,
}

/// The kinds of [`Error`].
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// Another session holds the lock, or it is wanted to be shared and a writer waits for it, or no permit of the semaphore is to be had, or
    /// one may hold it that was cut off before the server was taken over ([`Config::takeover`](crate::Config::takeover)). Without a guard, the
    /// claim goes on in the background until it is released.
    LockUnavailable,
    /// The context's deadline came first. Without a guard, the claim goes on in the background until it is released.
    TimedOut,
    /// The context was cancelled. Without a guard, the claim goes on in the background until it is released.
    Cancelled,
    /// The claim was released, by this thread or another one, while the call waited.
    Released,
    /// The manager has been stopped, or was never started.
    SyncManagerStopped,
    /// The manager could not start.
    FailedInitialization,
    /// The server could not be asked: it is unreachable, starting, or did not answer in time.
    SessionUnavailable,
    /// The server, or what stands in front of it, cannot serve locks to us as things are: wrong password, missing
    /// database, missing rights, a hot standby, a transaction pooler, a version that is too old. Trying again does not
    /// cure it; changing what the text names does.
    SessionRefused,
    /// All sessions of the manager's pool are taken, or all connections that the server, the database or the
    /// role may have.
    PoolExhausted,
    /// The term is over, or a later one has begun.
    Lost,
    /// The release of a lock could not be confirmed, or the server says that the lock was not held.
    UnlockFailed,
    /// The key is empty, too long, contains a NUL, or has the same hash as another one in use.
    InvalidKey,
    /// A setting cannot work, or contradicts what other processes say: how many permits a semaphore has.
    InvalidConfig,
    /// The caller would wait for itself: it shares the lock and wants it alone, or has it alone and wants to share it. Release the
    /// one before asking for the other: see [`shared_lock`](crate::PostgresManager::shared_lock).
    WouldDeadlock,
    /// The lock or manager was made in another process, before a `fork`. See
    /// [`PostgresManager`](crate::PostgresManager#forks).
    OtherProcess,
}

impl ErrorKind {
    /// Its name in a label of a metric.
    #[cfg(feature = "metrics")]
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::LockUnavailable => "lock_unavailable",
            Self::TimedOut => "timed_out",
            Self::Cancelled => "cancelled",
            Self::Released => "released",
            Self::SyncManagerStopped => "sync_manager_stopped",
            Self::FailedInitialization => "failed_initialization",
            Self::SessionUnavailable => "session_unavailable",
            Self::SessionRefused => "session_refused",
            Self::PoolExhausted => "pool_exhausted",
            Self::Lost => "lost",
            Self::UnlockFailed => "unlock_failed",
            Self::InvalidKey => "invalid_key",
            Self::InvalidConfig => "invalid_config",
            Self::WouldDeadlock => "would_deadlock",
            Self::OtherProcess => "other_process",
        }
    }

    /// The words of the kind, as an error's text begins.
    fn as_str(self) -> &'static str {
        match self {
            Self::LockUnavailable => "lock unavailable",
            Self::TimedOut => "timed out",
            Self::Cancelled => "cancelled",
            Self::Released => "claim released",
            Self::SyncManagerStopped => "sync manager stopped",
            Self::FailedInitialization => "sync manager failed to start",
            Self::SessionUnavailable => "session unavailable",
            Self::SessionRefused => "session refused",
            Self::PoolExhausted => "session pool exhausted",
            Self::Lost => "lock lost",
            Self::UnlockFailed => "failed to release lock",
            Self::InvalidKey => "invalid key",
            Self::InvalidConfig => "invalid configuration",
            Self::WouldDeadlock => "would wait for itself",
            Self::OtherProcess => "made in another process",
        }
    }
}

impl Error {
    pub(crate) fn new(kind: ErrorKind, message: impl Into<Cow<'static, str>>) -> Self {
        Self { kind, message: message.into(), source: None, grace_left: None }
    }

    pub(crate) fn with_source(self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        Self { source: Some(Arc::from(source.into())), ..self }
    }

    /// With the source of another one.
    pub(crate) fn because_of(self, other: Self) -> Self {
        Self { source: other.source, ..self }
    }

    // What every implementation says alike.

    pub(crate) fn stopped() -> Self {
        let text = "the manager was stopped, which is for good; make and start a new one";
        Self::new(ErrorKind::SyncManagerStopped, text)
    }

    pub(crate) fn not_started() -> Self {
        let text = "the manager has not been started; call start() before the first lock()";
        Self::new(ErrorKind::SyncManagerStopped, text)
    }

    pub(crate) fn lock_unavailable(key: &str, mode: Mode) -> Self {
        Self::new(ErrorKind::LockUnavailable, format!("{} {key:?}", mode.who_has()))
    }

    /// The server was taken over a moment ago.
    pub(crate) fn in_grace(key: &str, left: Duration) -> Self {
        let text = format!("a holder of before may believe in {key:?} still: {}", in_grace(left));
        Self::new(ErrorKind::LockUnavailable, text).with_grace(Some(left))
    }

    /// The lock was not had for want of this, if it is a takeover grace.
    pub(crate) fn with_grace(self, grace_left: Option<Duration>) -> Self {
        Self { grace_left, ..self }
    }

    /// Of a claim that its caller does not wait for, and which goes on.
    pub(crate) fn in_background(self) -> Self {
        let message =
            format!("{}; without a guard, the claim goes on in the background until release()", self.message);
        Self { message: message.into(), ..self }
    }

    /// The same for a caller whose time was over, and who got one attempt.
    pub(crate) fn into_timed_out(self) -> Self {
        Self { kind: ErrorKind::TimedOut, ..self }
    }

    /// A claim needs a thread, and the process has none left.
    pub(crate) fn no_thread(error: std::io::Error) -> Self {
        let message = "the thread for the lock could not be started; is the limit of threads, or of open files, reached?";
        Self::new(ErrorKind::SessionUnavailable, message).with_source(error)
    }

    /// The caller has the lock already, as a guard of this thread or a claim of this process: the other way than `wants_shared`.
    pub(crate) fn would_deadlock(key: &str, who: &str, wants_shared: bool) -> Self {
        let text = if wants_shared {
            format!("{who} has {key:?} alone; release it before you ask to share the lock")
        } else {
            format!(
                "{who} shares {key:?}; release it before you ask for the lock alone, and look again at what was read, since a writer \
                 may come in between"
            )
        };
        Self::new(ErrorKind::WouldDeadlock, text)
    }

    /// What is for one at a time was asked of a lock that several have.
    pub(crate) fn is_shared(key: &str, what: &str) -> Self {
        let text = format!(
            "{what} is for one process at a time, and others may have the lock {key:?} at the same time; use lock() in the place of \
             shared_lock() or semaphore()"
        );
        Self::new(ErrorKind::InvalidConfig, text)
    }

    /// A semaphore has another number of permits than the caller says.
    pub(crate) fn other_permits(key: &str, ours: u32, theirs: u32, who: &str) -> Self {
        let text = format!(
            "the semaphore {key:?} is asked for with {ours} permits, and {who} {theirs}; give all processes the same number, or change it for \
             all with set_permits()"
        );
        Self::new(ErrorKind::InvalidConfig, text)
    }

    /// The text, without the words of the kind.
    pub(crate) fn into_message(self) -> String {
        self.message.into_owned()
    }

    pub(crate) fn no_semaphore(key: &str) -> Self {
        let text = format!(
            "the lock {key:?} has no permits that could be changed; ask the manager for it by semaphore()"
        );
        Self::new(ErrorKind::InvalidConfig, text)
    }

    pub(crate) fn no_resignations() -> Self {
        let text = "a holder is asked to resign by the token of its term, and the manager was told to do without the catalog, or the \
                    lock without a token; set the catalog to automatic, or leave LockOptions::without_token out";
        Self::new(ErrorKind::InvalidConfig, text)
    }

    pub(crate) fn no_record() -> Self {
        let text = "what was done once a period is recorded in the catalog, by a term that has a token, and the manager was told to do \
                    without the catalog, or the lock without a token; set the catalog to automatic, or leave \
                    LockOptions::without_token out";
        Self::new(ErrorKind::InvalidConfig, text)
    }

    /// A term had ended before the application ended it.
    pub(crate) fn lost(key: &str, loss: Option<&Loss>) -> Self {
        let why = loss.map_or_else(|| "the manager was stopped".to_owned(), Loss::to_string);
        let text = format!(
            "the lock {key:?} did not last until its release: {why}; another holder may have been at work meanwhile"
        );
        Self::new(ErrorKind::Lost, text)
    }

    /// The claim ended while a call waited.
    pub(crate) fn released(key: &str) -> Self {
        Self::new(ErrorKind::Released, format!("the claim on {key:?} was released while this call waited"))
    }

    pub(crate) fn not_claimed(key: &str) -> Self {
        let text =
            format!("nobody in this process claims {key:?}, so there is nothing to wait for; call lock()");
        Self::new(ErrorKind::Released, text)
    }

    /// What sort of failure this is.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// How long the takeover grace lasts at the most in which the lock was not to be had; `None` if it was for anything else. It tells the
    /// [`LockUnavailable`](ErrorKind::LockUnavailable) or [`TimedOut`](ErrorKind::TimedOut) of a lock that another has from that of one
    /// that is not granted yet, unless to its holder of before, with [`AfterAnyRestart`](crate::TakeoverPolicy::AfterAnyRestart). See
    /// [`Config::takeover`](crate::Config::takeover).
    pub fn grace_left(&self) -> Option<Duration> {
        self.grace_left
    }

    /// The SQLSTATE that PostgreSQL gave, if the failure began with an error of the server.
    ///
    /// See the table of codes in the PostgreSQL manual, appendix A.
    pub fn sqlstate(&self) -> Option<&str> {
        let mut cause = self.source();
        while let Some(error) = cause {
            if let Some(database) = error.downcast_ref::<postgres::error::DbError>() {
                return Some(database.code().code());
            }
            cause = error.source();
        }
        None
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.kind.as_str(), self.message)?;
        if f.alternate() {
            for cause in new_causes(self) {
                write!(f, ": {cause}")?;
            }
        }
        Ok(())
    }
}

/// The text, and below it those of the causes: what a person sees if `main` or a test returns the error.
impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")?;
        let causes = new_causes(self);
        if !causes.is_empty() {
            f.write_str("\n\nCaused by:")?;
        }
        for cause in causes {
            write!(f, "\n    {cause}")?;
        }
        Ok(())
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}

/// What a takeover grace is, and how long it lasts.
pub(crate) fn in_grace(left: Duration) -> String {
    format!(
        "the server was restarted, or another one took its place, and no lock is granted for another {left:.1?} (Config::takeover)"
    )
}

/// An error's text with those of its causes behind it, for a log line or a text of our own.
pub(crate) fn chain(error: &(dyn StdError + 'static)) -> String {
    let mut text = error.to_string();
    for cause in new_causes(error) {
        text.push_str(": ");
        text.push_str(&cause);
    }
    text
}

/// The texts of an error's causes, but for those that the texts before repeat, as those of some drivers do.
fn new_causes(error: &(dyn StdError + 'static)) -> Vec<String> {
    let mut said = error.to_string();
    let mut causes = Vec::new();
    let mut next = error.source();
    while let Some(cause) = next {
        let text = cause.to_string();
        if !said.contains(&text) {
            said.push_str(&text);
            causes.push(text);
        }
        next = cause.source();
    }
    causes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_begins_with_the_kind_and_the_cause_is_kept() {
        let cause = std::io::Error::other("wire cut");
        let error = Error::new(ErrorKind::SessionUnavailable, "the server did not answer").with_source(cause);
        assert_eq!(error.to_string(), "session unavailable: the server did not answer");
        assert_eq!(format!("{error:#}"), chain(&error));
        assert_eq!(chain(&error), "session unavailable: the server did not answer: wire cut");
        assert_eq!(error.clone().source().unwrap().to_string(), "wire cut");
        assert_eq!(error.sqlstate(), None);
        let shown = "session unavailable: the server did not answer\n\nCaused by:\n    wire cut";
        assert_eq!((format!("{error:?}"), format!("{error:#?}")), (shown.to_owned(), shown.to_owned()));
        let alone = Error::new(ErrorKind::Released, "by another thread");
        assert_eq!(format!("{alone:?}"), "claim released: by another thread");
    }
}
