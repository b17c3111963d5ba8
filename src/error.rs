//! The one error of the library: a kind to match on, a text for the operator, the cause kept.

use std::borrow::Cow;
use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;

/// What the library's operations return.
pub type Result<T> = std::result::Result<T, Error>;

/// Why an operation failed.
///
/// Match on [`kind`](Error::kind). The text says what happened and what to change; the cause, where there is one
/// (a [`postgres::Error`], say), is kept as [`source`](StdError::source). Cloning is cheap: several threads that wait
/// for one lock are told of the same failure. `{error:#}` writes the causes behind the text, for a log line.
///
/// ```
/// use dsync::{Context, ErrorKind, Lock, LockOptions, MemoryManager, SyncManager};
///
/// let manager = MemoryManager::new();
/// manager.start()?;
/// let lock = manager.lock("nightly-report", LockOptions::new())?;
/// match lock.try_lock(&Context::background()) {
///     Ok(()) => println!("this process does the work"),
///     Err(error) if error.kind() == ErrorKind::LockUnavailable => println!("another one does"),
///     Err(error) => return Err(error),
/// }
/// lock.release()?;
/// # Ok::<(), dsync::Error>(())
/// ```
#[derive(Clone)]
pub struct Error {
    kind: ErrorKind,
    message: Cow<'static, str>,
    source: Option<Arc<dyn StdError + Send + Sync>>,
}

/// The kinds of [`Error`].
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// Another session holds the lock. The claim goes on in the background until it is released.
    LockUnavailable,
    /// The context's deadline came first. The claim goes on in the background until it is released.
    TimedOut,
    /// The context was cancelled. The claim goes on in the background until it is released.
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
    /// All sessions of the manager's pool are taken by other claims, or all connections that the server, the database or the
    /// role may have.
    PoolExhausted,
    /// The term is over, or a later one has begun.
    Lost,
    /// The release of a lock could not be confirmed, or the server says that the lock was not held.
    UnlockFailed,
    /// The key is empty, too long, contains a NUL, or has the same hash as another one in use.
    InvalidKey,
    /// A setting cannot work.
    InvalidConfig,
}

impl ErrorKind {
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
        }
    }
}

impl Error {
    pub(crate) fn new(kind: ErrorKind, message: impl Into<Cow<'static, str>>) -> Self {
        Self { kind, message: message.into(), source: None }
    }

    pub(crate) fn with_source(self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        Self { source: Some(Arc::from(source.into())), ..self }
    }

    /// What sort of failure this is.
    pub fn kind(&self) -> ErrorKind {
        self.kind
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

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = f.debug_struct("Error");
        debug.field("kind", &self.kind).field("message", &self.message);
        if let Some(source) = &self.source {
            debug.field("source", source);
        }
        debug.finish()
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
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
    }
}
