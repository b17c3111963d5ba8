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

/// The methods that a manager has for who calls it. Written once: managers have them of their own, so that nobody need import a trait, and
/// [`SyncManagerExt`] gives them to all others.
macro_rules! conveniences {
    ($($visibility:tt)?) => {
        /// A handle of the lock with this key, which is whatever can be a [`Key`]: a name, a number, a pair of numbers. **It locks nothing** and
        /// asks no server: call `acquire` or [`try_acquire`](crate::Lock::try_acquire) on it.
        ///
        /// # Errors
        /// As [`lock_with_key`](crate::SyncManager::lock_with_key).
        $($visibility)? fn lock(&self, key: impl Into<Key>) -> Result<Arc<dyn Lock>> {
            self.lock_with_key(key.into(), LockOptions::new())
        }

        /// As `lock`, with options. They count when the handle is made: where there is one with this key, they are ignored. But
        /// [`shared`](crate::LockOptions::shared) and [`permits`](crate::LockOptions::permits) always count: they say which of three
        /// handles is meant.
        ///
        /// # Errors
        /// As [`lock_with_key`](crate::SyncManager::lock_with_key).
        $($visibility)? fn lock_with(&self, key: impl Into<Key>, options: LockOptions) -> Result<Arc<dyn Lock>> {
            self.lock_with_key(key.into(), options)
        }

        /// The lock with this key that others may share. Readers, who take it by this handle, have it together; a writer, who takes it by `lock`,
        /// has it alone.
        ///
        /// The handle does all that a [`Lock`](crate::Lock) does: guards and claims, loss, lease, fence, deadlines. It is another one than that of
        /// `lock`, with options of its own: to give some, call `lock_with` with [`LockOptions::shared`](crate::LockOptions::shared). Each
        /// reader has a session of the server for itself, also where several are in one process, so
        /// [`max_sessions`](crate::Config::max_sessions) bounds the readers of a process.
        ///
        /// First come, first served, readers and writers alike: a reader that comes while a writer waits, waits behind it, and `try_acquire` gives
        /// `None` then. So neither starves the other, however long they hold the lock. Who waits for longer than a
        /// [slice](crate::Config::wait_slice), 5 s by default, may be overtaken once, by those who came in the same slice. Locks of an
        /// application's own do not stand in that line: a [`TransactionLock`](crate::TransactionLock), a [`SessionLock`](crate::SessionLock), what an
        /// application takes by `pg_advisory_lock_shared` itself.
        ///
        /// The readers that follow each other without a writer between have one fencing token. A reader's fence fails when a writer's term has
        /// begun since, and not because another reader's has; a writer waits for the fenced transactions of readers. A reader's term has no
        /// annotation.
        ///
        /// A reader becomes a writer, or a writer a reader, by giving the lock back first: two readers that both wanted it alone would
        /// wait for each other. A thread that has taken a guard which is not released yet, whichever thread has it now, is refused the lock the
        /// other way with [`WouldDeadlock`](crate::ErrorKind::WouldDeadlock); so is a claim beside one of this manager the other way. Let a thread that
        /// reads not take a second guard: behind a writer that waits, it would wait for itself. What is for one at a time, a
        /// [`Leader`](crate::Leader) and `once`, refuses a shared lock with [`InvalidConfig`](crate::ErrorKind::InvalidConfig).
        ///
        /// ```
        /// use std::time::Duration;
        /// use dsync::{MemoryManager, SyncManager};
        ///
        /// # let manager = MemoryManager::new();
        /// # manager.start()?;
        /// let readers = manager.shared_lock("catalog")?;
        /// let (one, other) = (readers.acquire(Duration::from_secs(5))?, readers.acquire(Duration::from_secs(5))?);
        /// assert!(one.is_held() && other.is_held());
        /// drop((one, other));
        ///
        /// let writer = manager.lock("catalog")?.acquire(Duration::from_secs(5))?;
        /// assert!(writer.is_held());
        /// # Ok::<(), dsync::Error>(())
        /// ```
        ///
        /// # Errors
        /// As [`lock_with_key`](crate::SyncManager::lock_with_key).
        $($visibility)? fn shared_lock(&self, key: impl Into<Key>) -> Result<Arc<dyn Lock>> {
            self.lock_with_key(key.into(), LockOptions::new().shared())
        }

        /// The semaphore with this key: at most `permits` holders at the same time, over all processes. Each has one permit, by a guard or a claim.
        ///
        /// The handle does all that a [`Lock`](crate::Lock) does: guards and claims, loss, lease, fence, deadlines, annotations. To give
        /// options, call `lock_with` with [`LockOptions::permits`](crate::LockOptions::permits). A semaphore and the lock that
        /// [`lock`](crate::PostgresManager::lock) and `shared_lock` have under the same key are two things, and neither excludes the other.
        /// Each holder has a session of the server for itself, also where several are in one process, so
        /// [`max_sessions`](crate::Config::max_sessions) bounds the permits of a process; with [`shared_sessions`](crate::Config::shared_sessions) many are
        /// on one session, and those only that wait for a permit have one each.
        ///
        /// First come, first served, of those that wait: who comes while somebody waits, waits behind it, and `try_acquire` gives `None`
        /// then, also where a permit has just come free. Who waits for longer than a [slice](crate::Config::wait_slice), 5 s by default,
        /// and is not the next one, goes to the end of the line. The next one looks for a free permit at times that are a millisecond apart
        /// at first and up to 50 ms after a while. No release depends on it, and the permit of a holder that died is found like any other.
        ///
        /// How many permits there are is agreed in the catalog: by the first call that wants one, which is forgotten after a day in which nobody
        /// has had one, and later by [`Lock::set_permits`](crate::Lock::set_permits), which stays. A process that says another number is refused with
        /// [`InvalidConfig`](crate::ErrorKind::InvalidConfig), which tells both.
        ///
        /// Each permit has terms and tokens of its own: a fence fails when a later term of the *same* permit has begun. So no more holders
        /// pass the fence at the same time than there are permits; but what a token is compared with outside of this database must be one
        /// number for each permit. A thread may have several permits; where several threads take more than one each, they can wait for each
        /// other in a circle, which the deadline of `acquire` ends. What is for one at a time, a [`Leader`](crate::Leader) and `once`,
        /// refuses a semaphore with `InvalidConfig`, and so does [`request_resignation`](crate::Lock::request_resignation).
        ///
        /// ```
        /// use std::time::Duration;
        /// use dsync::{MemoryManager, SyncManager};
        ///
        /// # let manager = MemoryManager::new();
        /// # manager.start()?;
        /// let gpus = manager.semaphore("gpu", 2)?;
        /// let (one, other) = (gpus.acquire(Duration::from_secs(10))?, gpus.acquire(Duration::from_secs(10))?);
        /// assert!(gpus.try_acquire()?.is_none());
        /// drop(one);
        /// assert!(gpus.try_acquire()?.is_some());
        /// # Ok::<(), dsync::Error>(())
        /// ```
        ///
        /// # Errors
        /// As [`lock_with_key`](crate::SyncManager::lock_with_key), and [`InvalidConfig`](crate::ErrorKind::InvalidConfig): there are to be
        /// no permits, or more than 1023; this manager does without the catalog; or it has a handle of the semaphore with another number.
        $($visibility)? fn semaphore(&self, key: impl Into<Key>, permits: u32) -> Result<Arc<dyn Lock>> {
            self.lock_with_key(key.into(), LockOptions::new().permits(permits))
        }

        /// Asks the leader that has the lock with this key to resign: see [`Lock::request_resignation`](crate::Lock::request_resignation). `true` if there is a holder to ask.
        ///
        /// # Errors
        /// As that, and [`InvalidKey`](crate::ErrorKind::InvalidKey).
        $($visibility)? fn request_resignation(&self, key: impl Into<Key>) -> Result<bool> {
            self.lock(key)?.request_resignation()
        }

        /// Ends the session that holds the lock with this key, of several that share it the first: see
        /// [`Lock::break_lock`](crate::Lock::break_lock). Gives who that was.
        ///
        /// # Errors
        /// As that, and [`InvalidKey`](crate::ErrorKind::InvalidKey).
        $($visibility)? fn break_lock(&self, key: impl Into<Key>) -> Result<Option<Holder>> {
            self.lock(key)?.break_lock()
        }

        /// The locks with these keys, to be taken together, in whatever order they are named: see [`MultiLock`](crate::MultiLock). None of
        /// them is shared.
        ///
        /// # Errors
        /// - As [`lock_with_key`](crate::SyncManager::lock_with_key), and [`InvalidKey`](crate::ErrorKind::InvalidKey): there is no key, or two of them are one number for the server.
        /// - [`InvalidConfig`](crate::ErrorKind::InvalidConfig): the locks take more sessions than the manager may open.
        $($visibility)? fn multi_lock<K: Into<Key>>(&self, keys: impl IntoIterator<Item = K>) -> Result<MultiLock> {
            MultiLock::new(keys.into_iter().map(Into::into).map(|key| (key.clone(), self.lock(key))))
        }

        /// Does `work` if it is due by this [`Period`](crate::Period), in one process at a time: see `once` of
        /// [`dyn Lock`](crate::Lock#method.once).
        ///
        /// # Errors
        /// As that, and [`InvalidKey`](crate::ErrorKind::InvalidKey).
        $($visibility)? fn once<T, E: From<Error>>(
            &self,
            key: impl Into<Key>,
            every: impl Into<Period>,
            context: impl Into<Context>,
            work: impl FnOnce(&Run<'_>) -> std::result::Result<T, E>,
        ) -> std::result::Result<Once<T>, E> {
            self.lock(key)?.once(every, context, work)
        }

        /// When the work under this key began the last time that it succeeded: see [`Lock::last_success`](crate::Lock::last_success).
        ///
        /// # Errors
        /// As that, and [`InvalidKey`](crate::ErrorKind::InvalidKey).
        $($visibility)? fn last_success(&self, key: impl Into<Key>) -> Result<Option<SystemTime>> {
            self.lock(key)?.last_success()
        }

        /// Forgets the last success of the work under this key, so that it is due at once: see [`Lock::forget_success`](crate::Lock::forget_success).
        ///
        /// # Errors
        /// As that, and [`InvalidKey`](crate::ErrorKind::InvalidKey).
        $($visibility)? fn forget_success(&self, key: impl Into<Key>) -> Result<bool> {
            self.lock(key)?.forget_success()
        }
    };
}

pub(crate) use conveniences;

/// Keeps the locks of an application: one handle per key, a second one for those who share it, and a third one for its semaphore.
///
/// An application may implement it, to wrap a manager of this library, say. Then the locks that it hands out are this library's:
/// [`Lock`] is not for others to implement.
///
/// Two implementations are here: [`PostgresManager`](crate::PostgresManager), and
/// [`MemoryManager`](crate::MemoryManager) for the tests of an application. Code that takes an `Arc<dyn SyncManager>`
/// works with both.
///
/// `lock`, `once` and the other conveniences are methods of those two and of `dyn SyncManager`. **Generic code, `&impl SyncManager` or
/// `M: SyncManager`, gets them by `use dsync::SyncManagerExt`**: they take whatever can be a key, which no method of a trait object can.
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
    /// `options` are ignored. The lock that others may [share](LockOptions::shared) is another one, and so is the
    /// [semaphore](LockOptions::permits).
    ///
    /// No I/O happens here. See [`Lock`] for the difference between a handle and a claim.
    ///
    /// # Errors
    /// - [`InvalidKey`](crate::ErrorKind::InvalidKey).
    /// - [`InvalidConfig`](crate::ErrorKind::InvalidConfig): a semaphore cannot have so many permits, or this manager no semaphore, or a
    ///   handle of it with another number is there.
    /// - [`SyncManagerStopped`](crate::ErrorKind::SyncManagerStopped).
    /// - [`OtherProcess`](crate::ErrorKind::OtherProcess): the manager was made before a `fork`, by the parent process.
    fn lock_with_key(&self, key: Key, options: LockOptions) -> Result<Arc<dyn Lock>>;
}

impl dyn SyncManager + '_ {
    conveniences!(pub);
}

/// The same for generic code: `manager.lock(key)` on any `M: SyncManager`.
///
/// The managers of this library and `dyn SyncManager` have these methods of their own, without this trait. Whoever finds that `&impl SyncManager`
/// has no `lock` imports it.
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
    conveniences!();
}

impl<M: SyncManager + ?Sized> SyncManagerExt for M {}
