//! The contract of a lock, its options, and the guard for scoped use.

use std::fmt;
use std::sync::Arc;

use crossbeam_channel::Sender;
use serde_core::Serialize;

use crate::context::Context;
use crate::error::{Error, ErrorKind, Result};
use crate::loss::{Loss, Lost, lost_already};
use crate::term::Term;

/// A distributed lock, shared by all processes that use the same key on the same database.
///
/// # Claims and terms
///
/// The first [`lock`](Self::lock) or [`try_lock`](Self::try_lock) begins a **claim**, and the claim lasts until
/// [`release`](Self::release), whatever the call returned: while it lasts, the lock is being acquired, watched and, if it
/// was lost, acquired again in the background. A **term** is one unbroken stretch of holding within a claim. Each term
/// has a [`lost`](Self::lost) channel of its own.
///
/// A claim belongs to the manager, not to the handle: dropping the handle does not end it, and asking the manager for
/// the same key finds it again. For a scope, use a [`LockGuard`].
///
/// # Safety under failure
///
/// It is **not** safe to assume that the lock is held until `release`: the session may be terminated, the network cut,
/// the process frozen. Watch the lost channel, and stop the work when it disconnects.
///
/// # Threads
///
/// All methods may be called from any thread. The lock is held by the *process*, not by a thread: `lock` on a lock that
/// is held returns at once, in any thread, and one `release` ends the claim for all of them. Coordinating threads of one
/// process is the application's task.
pub trait Lock: Send + Sync + fmt::Debug {
    /// The key in text, as [`Key`](crate::Key) displays it.
    fn key(&self) -> &str;

    /// Acquires the lock, waiting until it is held or `context` ends. Returns at once if it is held already, also where
    /// `context` has ended: a loop that is to end with its context must look at [`Context::check`] as well.
    ///
    /// If the lock is not held and `context` has ended before the call, the claim begins and the call fails at once, even
    /// if the lock is free: a cancelled call does not acquire. While the server cannot be reached the call goes on waiting.
    ///
    /// Whatever it returns, the claim goes on in the background until [`release`](Self::release), which must therefore
    /// follow. (Where another thread is releasing the lock at this moment, the call first waits for that; if `context` ends
    /// meanwhile, there is no claim yet.)
    ///
    /// A cancelled call returns at once; where it has to be told by a server that does not answer, within 1 s.
    ///
    /// # Errors
    /// - [`TimedOut`](ErrorKind::TimedOut), [`Cancelled`](ErrorKind::Cancelled): the context ended first; the last problem
    ///   on the way, if any, is the source.
    /// - [`Released`](ErrorKind::Released): another thread released the claim.
    /// - [`SyncManagerStopped`](ErrorKind::SyncManagerStopped).
    /// - [`SessionUnavailable`](ErrorKind::SessionUnavailable): no thread could be started for the claim.
    /// - [`OtherProcess`](ErrorKind::OtherProcess): the lock was made before a `fork`, by the parent process.
    fn lock(&self, context: &Context) -> Result<()>;

    /// Like [`lock`](Self::lock), but returns as soon as it is known that the lock cannot be had now.
    ///
    /// It waits, until `context` ends, only while the server cannot be asked. A `context` whose deadline has passed before
    /// the call, as that of `Context::timeout(Duration::ZERO)` has, means *try once*: the call makes one attempt, with the
    /// time that an attempt has (`connect_timeout` and `heartbeat_timeout` together at the most), and takes a free lock. A
    /// cancelled one does not.
    ///
    /// # Errors
    /// Those of `lock`, and
    /// - [`LockUnavailable`](ErrorKind::LockUnavailable): another session holds the lock.
    /// - [`SessionRefused`](ErrorKind::SessionRefused): trying again will not help: wrong password, missing database or
    ///   rights, a standby, a transaction pooler.
    /// - [`PoolExhausted`](ErrorKind::PoolExhausted): the manager has no session left for this claim.
    /// - [`InvalidKey`](ErrorKind::InvalidKey): another key has the same hash.
    fn try_lock(&self, context: &Context) -> Result<()>;

    /// Waits until the lock is held, as [`lock`](Self::lock) does, but begins no claim: for threads that observe the work of
    /// another one, which may release the lock at any time.
    ///
    /// # Errors
    /// Those of `lock`; [`Released`](ErrorKind::Released) also where there is no claim, whatever `context` says.
    fn wait(&self, context: &Context) -> Result<()>;

    /// Ends the claim: stops acquiring, and gives the lock back if it is held.
    ///
    /// The [`lost`](Self::lost) channel disconnects before the server is told. Without a claim nothing happens, so
    /// calling it again is harmless. It returns within the manager's release timeout (2 s by default), whatever
    /// server and network do.
    ///
    /// # Errors
    /// [`UnlockFailed`](ErrorKind::UnlockFailed) or [`SessionUnavailable`](ErrorKind::SessionUnavailable): the server
    /// could not be told, or says that the lock was not held. The claim has ended all the same, and the server frees the
    /// lock when it notices that the session is gone, at the latest after the lease and two wait slices (25 s by default).
    fn release(&self) -> Result<()>;

    /// The channel of the current term. Disconnected if the lock is not held.
    fn lost(&self) -> Lost;

    /// The current term, with its fencing token; `None` if the lock is not held.
    fn term(&self) -> Option<Term>;

    /// How the most recent lost term of this handle ended; `None` if none was lost. A `release` is not a loss.
    fn last_loss(&self) -> Option<Loss>;
}

/// Makes the bytes that annotate a lock where an operator can see them: in the view `dsync.locks`.
///
/// It is called for each attempt to acquire the lock, before the lock can be granted: when the attempt begins, and anew for
/// each slice of a wait ([`wait_slice`](crate::Config::wait_slice); in memory each second for which a thread waits). So the
/// annotation of a term is at most a slice older than the term. A manager without catalog has no place for annotations and
/// calls no valuer.
///
/// It is called on a thread of the library's, or on one that waits for this lock in this process, if it does so without a
/// limit and cannot be cancelled, or if the last call took less than a millisecond; in memory on the one that begins the claim or waits, or that calls
/// [`MemoryServer`](crate::MemoryServer), and the wait may then end later than its context. A thread that gives the lock away never calls it. It must not use the lock that it
/// annotates. What it returns is taken literally, up to [`MAX_ANNOTATION`] bytes; if it returns more, or panics, the term
/// goes without annotation and the log says so.
pub type LockValuer = Arc<dyn Fn() -> Vec<u8> + Send + Sync>;

/// The longest annotation, in bytes.
pub const MAX_ANNOTATION: usize = 64 * 1024;

/// The annotation of a term that begins. A valuer is an application's code, and must not harm the lock.
pub(crate) fn annotate(key: &str, valuer: &LockValuer) -> Option<Vec<u8>> {
    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| valuer())) {
        Ok(bytes) if bytes.len() <= MAX_ANNOTATION => Some(bytes),
        Ok(bytes) => {
            let length = bytes.len();
            log::warn!(
                "lock {key:?}: its annotation has {length} bytes, the limit is {MAX_ANNOTATION}; left out"
            );
            None
        }
        Err(_) => {
            log::warn!("lock {key:?}: its valuer panicked; the term goes without annotation");
            None
        }
    }
}

/// The default valuer: `value` as JSON.
///
/// # Errors
/// [`InvalidConfig`](ErrorKind::InvalidConfig) if `value` cannot be written as JSON (a map with keys that are not text,
/// say).
///
/// ```
/// let valuer = dsync::json_valuer(&serde_json::json!({ "host": "db-7", "pid": 4711 }))?;
/// assert_eq!(valuer(), br#"{"host":"db-7","pid":4711}"#);
/// # Ok::<(), dsync::Error>(())
/// ```
pub fn json_valuer(value: &(impl Serialize + ?Sized)) -> Result<LockValuer> {
    let bytes = serde_json::to_vec(value).map_err(|error| {
        Error::new(ErrorKind::InvalidConfig, "the lock's annotation cannot be written as JSON")
            .with_source(error)
    })?;
    Ok(Arc::new(move || bytes.clone()))
}

/// What can be said about a lock when its handle is first made. Ignored where the handle exists already.
#[derive(Clone, Default)]
#[non_exhaustive]
pub struct LockOptions {
    pub(crate) valuer: Option<LockValuer>,
    /// Told whenever a claim has begun, if there is room.
    pub(crate) on_claim: Option<Sender<()>>,
}

impl LockOptions {
    /// No annotation.
    pub fn new() -> Self {
        Self::default()
    }

    /// Annotates the lock with what `valuer` returns; the bytes are taken literally.
    #[must_use]
    pub fn valuer(mut self, valuer: LockValuer) -> Self {
        self.valuer = Some(valuer);
        self
    }

    pub(crate) fn tell_of_claims(mut self, listener: Sender<()>) -> Self {
        self.on_claim = Some(listener);
        self
    }

    /// A claim has begun.
    pub(crate) fn claim_begun(&self) {
        if let Some(listener) = &self.on_claim {
            // Full: it has not looked since the last one. Closed: nobody listens.
            let _ = listener.try_send(());
        }
    }
}

impl fmt::Debug for LockOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LockOptions").field("valuer", &self.valuer.as_ref().map(|_| "..")).finish()
    }
}

/// A held lock for the length of a scope: released when dropped.
///
/// Unlike the bare [`Lock`], an attempt that fails leaves no claim behind. Bind it to a name: `let _ = …` would release
/// at once. A guard does not make the lock safe to lose: watch [`lost`](Self::lost) all the same.
///
/// ```
/// use dsync::{Context, LockGuard, LockOptions, MemoryManager, SyncManager};
///
/// let manager = MemoryManager::new();
/// manager.start()?;
/// {
///     let guard = LockGuard::lock(manager.lock("migrations", LockOptions::new())?, &Context::background())?;
///     assert!(guard.lost().try_recv().is_err_and(|error| error.is_empty()), "held");
///     // … migrate …
///     guard.release()?; // or let it drop: then a failure is only logged
/// }
/// # Ok::<(), dsync::Error>(())
/// ```
#[must_use = "the lock is released as soon as the guard is dropped"]
#[derive(Debug)]
pub struct LockGuard {
    /// `None` once released.
    lock: Option<Arc<dyn Lock>>,
    term: Term,
}

impl LockGuard {
    /// Acquires `lock`, waiting as [`Lock::lock`] does.
    ///
    /// # Errors
    /// As [`Lock::lock`]; the claim is released before the error is returned.
    pub fn lock(lock: Arc<dyn Lock>, context: &Context) -> Result<Self> {
        let outcome = lock.lock(context);
        Self::held(lock, outcome)
    }

    /// Acquires `lock` if it can be had now, as [`Lock::try_lock`] does.
    ///
    /// # Errors
    /// As [`Lock::try_lock`]; the claim is released before the error is returned.
    pub fn try_lock(lock: Arc<dyn Lock>, context: &Context) -> Result<Self> {
        let outcome = lock.try_lock(context);
        Self::held(lock, outcome)
    }

    fn held(lock: Arc<dyn Lock>, outcome: Result<()>) -> Result<Self> {
        // A term that was lost in this very moment is one all the same: over.
        let term = lock.term().unwrap_or_else(|| Term::new(lost_already(), None, None));
        let guard = Self { lock: Some(lock), term };
        outcome.map(|()| guard)
    }

    /// The channel of the term in which the guard was made. It does not come back when the lock is acquired again.
    pub fn lost(&self) -> &Lost {
        self.term.lost()
    }

    /// The term in which the guard was made, for its fencing token.
    pub fn term(&self) -> &Term {
        &self.term
    }

    /// Releases the lock and says whether that could be confirmed.
    ///
    /// # Errors
    /// As [`Lock::release`].
    pub fn release(mut self) -> Result<()> {
        self.lock.take().map_or(Ok(()), |lock| lock.release())
    }
}

impl Drop for LockGuard {
    /// Releases the lock, waiting no longer than [`Lock::release`] does. A failure is logged.
    fn drop(&mut self) {
        if let Some(lock) = self.lock.take()
            && let Err(error) = lock.release()
            && error.kind() != ErrorKind::OtherProcess
        {
            log::warn!("lock {:?}: {}", lock.key(), crate::error::chain(&error));
        }
    }
}
