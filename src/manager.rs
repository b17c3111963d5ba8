//! The contract of a manager of locks.

use std::fmt;
use std::sync::Arc;

use crate::error::Result;
use crate::key::Key;
use crate::lock::{Lock, LockOptions};

/// Keeps the locks of an application: one handle per key.
///
/// Two implementations are here: [`PostgresManager`](crate::PostgresManager), and
/// [`MemoryManager`](crate::MemoryManager) for the tests of an application. Code that takes an `Arc<dyn SyncManager>`
/// works with both.
pub trait SyncManager: Send + Sync + fmt::Debug {
    /// Begins the manager's work. Until then no lock can be acquired. Starting twice does nothing; several threads that
    /// start a manager at once wait for the first of them and have its outcome. A [`stop`](Self::stop) ends the call.
    ///
    /// # Errors
    /// - [`FailedInitialization`](crate::ErrorKind::FailedInitialization): what the manager needs is not there, and
    ///   waiting will not bring it.
    /// - [`SyncManagerStopped`](crate::ErrorKind::SyncManagerStopped): a manager that was stopped stays so.
    fn start(&self) -> Result<()>;

    /// Releases all locks, ends all claims, and closes all sessions, within the release timeout (2 s by default).
    ///
    /// Calls that wait in [`Lock::lock`] end with
    /// [`SyncManagerStopped`](crate::ErrorKind::SyncManagerStopped), as does every later one. Stopping twice does
    /// nothing.
    ///
    /// # Errors
    /// The first failure of those that [`Lock::release`] would have returned. The manager has stopped all the same.
    fn stop(&self) -> Result<()>;

    /// The lock with this key. Where there is a handle for it, or a claim on it, that same lock is returned and
    /// `options` are ignored.
    ///
    /// No I/O happens here. See [`Lock`] for the difference between a handle and a claim.
    ///
    /// # Errors
    /// - [`InvalidKey`](crate::ErrorKind::InvalidKey).
    /// - [`SyncManagerStopped`](crate::ErrorKind::SyncManagerStopped).
    /// - [`OtherProcess`](crate::ErrorKind::OtherProcess): the manager was made before a `fork`, by the parent process.
    fn lock_with_key(&self, key: Key, options: LockOptions) -> Result<Arc<dyn Lock>>;
}

impl dyn SyncManager + '_ {
    /// [`lock_with_key`](SyncManager::lock_with_key) for whatever can be a [`Key`]: a name, a number, a pair.
    ///
    /// # Errors
    /// As there.
    pub fn lock(&self, key: impl Into<Key>, options: LockOptions) -> Result<Arc<dyn Lock>> {
        self.lock_with_key(key.into(), options)
    }
}
