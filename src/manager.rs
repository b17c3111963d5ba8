//! The contract of a manager of locks.

use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use crate::context::Context;
use crate::error::{Error, Result};
use crate::key::Key;
use crate::lock::{Lock, LockOptions};
use crate::multi_lock::MultiLock;
use crate::once::{Once, Period, Run};
use crate::snapshot::Snapshot;
use crate::view::Holder;

/// Keeps the locks of an application: one handle per key.
///
/// An application may implement it, to wrap a manager of this library, say. Then the locks that it hands out are this library's:
/// [`Lock`] is not for others to implement.
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

    /// How the manager and its claims stand now, as this process knows: for a health check, and for people. No I/O happens.
    ///
    /// An implementation that wraps a manager should give that one's. The default is empty.
    fn snapshot(&self) -> Snapshot {
        Snapshot::default()
    }

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
    /// The lock with this key, which is whatever can be a [`Key`]: a name, a number, a pair of numbers.
    ///
    /// # Errors
    /// As [`lock_with_key`](SyncManager::lock_with_key).
    pub fn lock(&self, key: impl Into<Key>) -> Result<Arc<dyn Lock>> {
        self.lock_with_key(key.into(), LockOptions::new())
    }

    /// As `lock`, with options. They count when the handle is made: where there is one with this key, they
    /// are ignored.
    ///
    /// # Errors
    /// As [`lock_with_key`](SyncManager::lock_with_key).
    pub fn lock_with(&self, key: impl Into<Key>, options: LockOptions) -> Result<Arc<dyn Lock>> {
        self.lock_with_key(key.into(), options)
    }

    /// Asks the leader that has the lock with this key to resign: see [`Lock::request_resignation`]. `true` if there is a holder to ask.
    ///
    /// # Errors
    /// As that, and [`InvalidKey`](crate::ErrorKind::InvalidKey).
    pub fn request_resignation(&self, key: impl Into<Key>) -> Result<bool> {
        self.lock(key)?.request_resignation()
    }

    /// Ends the session that holds the lock with this key: see [`Lock::break_lock`]. Gives who that was.
    ///
    /// # Errors
    /// As that, and [`InvalidKey`](crate::ErrorKind::InvalidKey).
    pub fn break_lock(&self, key: impl Into<Key>) -> Result<Option<Holder>> {
        self.lock(key)?.break_lock()
    }

    /// The locks with these keys, to be taken together, in whatever order they are named: see [`MultiLock`].
    ///
    /// # Errors
    /// - As [`lock_with_key`](SyncManager::lock_with_key), and [`InvalidKey`](crate::ErrorKind::InvalidKey): there is no key, or two of them are one number for the server.
    /// - [`InvalidConfig`](crate::ErrorKind::InvalidConfig): there are more keys than sessions that the manager may open.
    pub fn multi_lock<K: Into<Key>>(&self, keys: impl IntoIterator<Item = K>) -> Result<MultiLock> {
        MultiLock::new(keys.into_iter().map(Into::into).map(|key| (key.clone(), self.lock(key))))
    }

    /// Does `work` if it is due by this [`Period`], in one process at a time: see `once` of
    /// [`dyn Lock`](crate::Lock#method.once).
    ///
    /// # Errors
    /// As that, and [`InvalidKey`](crate::ErrorKind::InvalidKey).
    pub fn once<T, E: From<Error>>(
        &self,
        key: impl Into<Key>,
        every: impl Into<Period>,
        context: impl Into<Context>,
        work: impl FnOnce(&Run<'_>) -> std::result::Result<T, E>,
    ) -> std::result::Result<Once<T>, E> {
        self.lock(key)?.once(every, context, work)
    }

    /// When the work under this key began the last time that it succeeded: see [`Lock::last_success`].
    ///
    /// # Errors
    /// As that, and [`InvalidKey`](crate::ErrorKind::InvalidKey).
    pub fn last_success(&self, key: impl Into<Key>) -> Result<Option<SystemTime>> {
        self.lock(key)?.last_success()
    }

    /// Forgets the last success of the work under this key, so that it is due at once: see [`Lock::forget_success`].
    ///
    /// # Errors
    /// As that, and [`InvalidKey`](crate::ErrorKind::InvalidKey).
    pub fn forget_success(&self, key: impl Into<Key>) -> Result<bool> {
        self.lock(key)?.forget_success()
    }
}

/// The same for generic code: `manager.lock(key)` on any `M: SyncManager`.
///
/// The managers of this library and `dyn SyncManager` have these methods of their own, without this trait.
///
/// ```
/// use dsync::{SyncManager, SyncManagerExt};
///
/// fn is_taken<M: SyncManager>(manager: &M) -> dsync::Result<bool> {
///     Ok(manager.lock("nightly-report")?.try_acquire()?.is_none())
/// }
/// # let manager = dsync::MemoryManager::new();
/// # manager.start()?;
/// # assert!(!is_taken(&manager)?);
/// # Ok::<(), dsync::Error>(())
/// ```
pub trait SyncManagerExt: SyncManager {
    /// The lock with this key, which is whatever can be a [`Key`]: a name, a number, a pair of numbers.
    ///
    /// # Errors
    /// As [`lock_with_key`](SyncManager::lock_with_key).
    fn lock(&self, key: impl Into<Key>) -> Result<Arc<dyn Lock>> {
        self.lock_with_key(key.into(), LockOptions::new())
    }

    /// As `lock`, with options. They count when the handle is made: where there is one with this key, they
    /// are ignored.
    ///
    /// # Errors
    /// As [`lock_with_key`](SyncManager::lock_with_key).
    fn lock_with(&self, key: impl Into<Key>, options: LockOptions) -> Result<Arc<dyn Lock>> {
        self.lock_with_key(key.into(), options)
    }

    /// Asks the leader that has the lock with this key to resign: see [`Lock::request_resignation`]. `true` if there is a holder to ask.
    ///
    /// # Errors
    /// As that, and [`InvalidKey`](crate::ErrorKind::InvalidKey).
    fn request_resignation(&self, key: impl Into<Key>) -> Result<bool> {
        self.lock(key)?.request_resignation()
    }

    /// Ends the session that holds the lock with this key: see [`Lock::break_lock`]. Gives who that was.
    ///
    /// # Errors
    /// As that, and [`InvalidKey`](crate::ErrorKind::InvalidKey).
    fn break_lock(&self, key: impl Into<Key>) -> Result<Option<Holder>> {
        self.lock(key)?.break_lock()
    }

    /// The locks with these keys, to be taken together, in whatever order they are named: see [`MultiLock`].
    ///
    /// # Errors
    /// - As [`lock_with_key`](SyncManager::lock_with_key), and [`InvalidKey`](crate::ErrorKind::InvalidKey): there is no key, or two of them are one number for the server.
    /// - [`InvalidConfig`](crate::ErrorKind::InvalidConfig): there are more keys than sessions that the manager may open.
    fn multi_lock<K: Into<Key>>(&self, keys: impl IntoIterator<Item = K>) -> Result<MultiLock> {
        MultiLock::new(keys.into_iter().map(Into::into).map(|key| (key.clone(), self.lock(key))))
    }

    /// Does `work` if it is due by this [`Period`], in one process at a time: see `once` of
    /// [`dyn Lock`](crate::Lock#method.once).
    ///
    /// # Errors
    /// As that, and [`InvalidKey`](crate::ErrorKind::InvalidKey).
    fn once<T, E: From<Error>>(
        &self,
        key: impl Into<Key>,
        every: impl Into<Period>,
        context: impl Into<Context>,
        work: impl FnOnce(&Run<'_>) -> std::result::Result<T, E>,
    ) -> std::result::Result<Once<T>, E> {
        self.lock(key)?.once(every, context, work)
    }

    /// When the work under this key began the last time that it succeeded: see [`Lock::last_success`].
    ///
    /// # Errors
    /// As that, and [`InvalidKey`](crate::ErrorKind::InvalidKey).
    fn last_success(&self, key: impl Into<Key>) -> Result<Option<SystemTime>> {
        self.lock(key)?.last_success()
    }

    /// Forgets the last success of the work under this key, so that it is due at once: see [`Lock::forget_success`].
    ///
    /// # Errors
    /// As that, and [`InvalidKey`](crate::ErrorKind::InvalidKey).
    fn forget_success(&self, key: impl Into<Key>) -> Result<bool> {
        self.lock(key)?.forget_success()
    }
}

impl<M: SyncManager + ?Sized> SyncManagerExt for M {}
