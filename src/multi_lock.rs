//! Several locks at once: all of them, or none.

use std::error::Error as _;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use postgres::Transaction;

use crate::context::Context;
use crate::error::{Error, ErrorKind, Result, chain};
use crate::guard::{LockGuard, WhenTaken};
use crate::key::Key;
use crate::lock::Lock;
use crate::loss::{Loss, Lost, Signal};
use crate::process::in_parallel;
use crate::term::Term;
use crate::view::LockView;

/// Several locks that are taken together: all of them, or none.
///
/// Every process takes them in the same order, whatever the order in which the caller names them. So sets that have keys in common wait
/// for each other, and never in a circle. A key that is named twice is taken once.
///
/// ```
/// use std::time::Duration;
/// use dsync::{MemoryManager, SyncManager};
///
/// let manager = MemoryManager::new();
/// manager.start()?;
/// let accounts = manager.multi_lock(["account/17", "account/4"])?;
/// let guard = accounts.acquire(Duration::from_secs(10))?;
/// // … move money from one to the other, and stop when `guard.lost()` disconnects …
/// guard.release()?;
/// # Ok::<(), dsync::Error>(())
/// ```
///
/// Each lock of the set is a lock like any other, made as [`lock`](crate::PostgresManager::lock) of the manager makes it: it excludes guards
/// and claims of its key, those that share the lock too, has a term with a token of its own, and takes a session of the manager (but for those that a
/// [shared session](crate::Config::shared_sessions) carries). None of them can
/// be [shared](crate::PostgresManager::shared_lock). Each may be lost by itself. All methods may be called from any thread.
///
/// A set has to find sessions for all its locks. While other locks use them it may wait long: set
/// [`max_sessions`](crate::Config::max_sessions) above what is used at once.
///
/// A thread that has a guard of one of these keys waits for itself; one that shares one of them is refused with
/// [`WouldDeadlock`](ErrorKind::WouldDeadlock). One that has a guard of another key can wait in a circle with a thread
/// that has one of these keys and wants that one. So take all locks that a piece of work needs with one call.
#[derive(Clone, Debug)]
#[must_use]
pub struct MultiLock {
    /// In the order in which all processes take them. Never empty.
    locks: Vec<Arc<dyn Lock>>,
    /// The keys as they were named, each with the index of its lock.
    named: Arc<[(Key, usize)]>,
}

impl MultiLock {
    pub(crate) fn new(locks: impl IntoIterator<Item = (Key, Result<Arc<dyn Lock>>)>) -> Result<Self> {
        let mut named = Vec::new();
        for (key, lock) in locks {
            named.push((key, lock?));
        }
        let mut locks: Vec<_> = named.iter().map(|(_, lock)| Arc::clone(lock)).collect();
        locks.sort_by_key(|lock| lock.place());
        locks.dedup_by(|a, b| is_same(a, b));
        let Some(first) = locks.first() else {
            let message = "the set of locks is empty; name one key at least";
            return Err(Error::new(ErrorKind::InvalidKey, message));
        };
        if locks.iter().any(|lock| lock.owner() != first.owner()) {
            let message = "the locks of the set are of different managers; take a set of each";
            return Err(Error::new(ErrorKind::InvalidConfig, message));
        }
        if let Some(pair) = locks.windows(2).find(|pair| pair[0].place() == pair[1].place()) {
            let message = format!(
                "the keys {:?} and {:?} are one number for the server; name one of them only",
                pair[0].key(),
                pair[1].key()
            );
            return Err(Error::new(ErrorKind::InvalidKey, message));
        }
        let own: Vec<_> = locks.iter().filter_map(|lock| lock.most_sessions()).collect();
        // The others share one at the least.
        let needed = own.len() + usize::from(own.len() < locks.len());
        if let Some(most) = own.first().filter(|most| usize::try_from(**most).is_ok_and(|most| needed > most))
        {
            let message = format!(
                "the set of {} locks takes {needed} sessions, and the manager may open {most}; raise max_sessions, or take one lock \
                 for all",
                locks.len()
            );
            return Err(Error::new(ErrorKind::InvalidConfig, message));
        }
        let index = |lock| locks.iter().position(|other| is_same(other, lock)).unwrap_or_default();
        let named = named.iter().map(|(key, lock)| (key.clone(), index(lock))).collect();
        Ok(Self { locks, named })
    }

    /// The keys in text, each once, in the order in which they are taken.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.locks.iter().map(|lock| lock.key())
    }

    /// Waits until all the locks are held, for a [`Duration`], until an [`Instant`], or as a [`Context`] says; that bounds all of them
    /// together. A time of zero, or one that has passed before the call, means *try once*, as for a single lock.
    ///
    /// If the manager has no session for one of the locks, or for the thread of this process whose turn it is there, the call gives back what
    /// it has, pauses for up to 100 ms (2 s where it is the server that has none), and starts over. So it does if it has lost one of
    /// them by the time it has the next. The first time is logged.
    ///
    /// An attempt that fails leaves nothing behind. Where the server has to be told of that, it takes up to twice the release timeout
    /// longer.
    ///
    /// # Errors
    /// As `acquire` of a [`Lock`]. The text names the key that was not to be had.
    pub fn acquire(&self, context: impl Into<Context>) -> Result<MultiGuard> {
        self.acquire_as(&context.into())
    }

    fn acquire_as(&self, context: &Context) -> Result<MultiGuard> {
        /// How long to pause where there is no session, at first and after many a pause; and after many where it is the server that
        /// has none.
        const PAUSES: [Duration; 3] =
            [Duration::from_millis(2), Duration::from_millis(100), Duration::from_secs(2)];
        let begun = Instant::now();
        let when_taken = WhenTaken::of(context)?;
        let (mut longest, mut trouble) = (PAUSES[0], None::<Error>);
        loop {
            let outcome = self.collect(|lock, has_others| {
                // A lock of the set before this one may have taken all the time.
                let ended = context.ended().filter(|_| has_others && when_taken == WhenTaken::Waits);
                if let Some(kind) = ended {
                    return Err(gave_up(kind, begun, lock.key()));
                }
                LockGuard::acquire_beside(lock, context, Some(when_taken), has_others)
            });
            let error = match outcome {
                Err(error)
                    if when_taken == WhenTaken::Waits
                        && matches!(error.kind(), ErrorKind::PoolExhausted | ErrorKind::Lost) =>
                {
                    error
                }
                // What was in the way before says more than where the time was over.
                Err(error)
                    if matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::Cancelled)
                        && trouble.is_some() =>
                {
                    let error = gave_up(error.kind(), begun, self.locks[0].key());
                    return Err(trouble.into_iter().fold(error, Error::with_source));
                }
                outcome => return outcome,
            };
            let level = if longest == PAUSES[0] { log::Level::Warn } else { log::Level::Debug };
            log::log!(level, "a set of locks gives back what it has, and begins anew: {}", chain(&error));
            // By lot, so that two sets do not get in each other's way again.
            let pause = longest.mul_f64(fastrand::f64());
            longest = (2 * longest).min(if error.source().is_some() { PAUSES[2] } else { PAUSES[1] });
            let pause = context
                .expires_at()
                .map_or(pause, |end| pause.min(end.saturating_duration_since(Instant::now())));
            let _ = context.cancelled().recv_timeout(pause);
            if let Some(kind) = context.ended() {
                return Err(gave_up(kind, begun, self.locks[0].key()).with_source(error));
            }
            trouble = Some(error);
        }
    }

    /// Takes all the locks if all are free now, and none of them otherwise: then it gives `None`. It takes as long as as many calls of
    /// [`Lock::try_acquire`].
    ///
    /// # Errors
    /// As [`Lock::try_acquire`]; and [`Lost`](ErrorKind::Lost): one of them was lost before the last one was had.
    pub fn try_acquire(&self) -> Result<Option<MultiGuard>> {
        let outcome = self.collect(|lock, _| {
            lock.try_acquire()?.ok_or_else(|| Error::new(ErrorKind::LockUnavailable, "another one has it"))
        });
        match outcome {
            Ok(guard) => Ok(Some(guard)),
            Err(error) if error.kind() == ErrorKind::LockUnavailable => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Waits for all the locks, runs `work` with the guard, and releases them, also if `work` panics.
    ///
    /// # Errors
    /// Those of [`acquire`](Self::acquire); `work` did not run then. And those of [`MultiGuard::release`], [`Lost`](ErrorKind::Lost)
    /// among them: what `work` returned is dropped, since the locks did not last as long as the work.
    pub fn with_lock<T>(
        &self,
        context: impl Into<Context>,
        work: impl FnOnce(&MultiGuard) -> T,
    ) -> Result<T> {
        let guard = self.acquire(context)?;
        // If it panics, the guard is dropped.
        let outcome = work(&guard);
        guard.release().map(|()| outcome)
    }

    /// Who has each of the locks, and who waits for it, in whichever process: one view a key, in the order in which the caller named them. A key
    /// that was named twice is there once, where it was named first. A [semaphore](crate::PostgresManager::semaphore) with such a key is
    /// another thing, and is not shown.
    ///
    /// It asks for one key after the other, as [`PostgresManager::inspect`](crate::PostgresManager::inspect) does, with one round trip a key on
    /// a session of the pool. So the views are of moments that follow each other, and not of one: show them to people, and decide nothing by
    /// them. If the server does not answer, the call ends with the first question that fails, in the time that one of `inspect` has.
    ///
    /// # Errors
    /// Those of [`Lock::holder`].
    ///
    /// ```
    /// use dsync::{MemoryManager, SyncManager};
    ///
    /// # let manager = MemoryManager::new();
    /// # manager.start()?;
    /// let accounts = manager.multi_lock(["account/17", "account/4"])?;
    /// let _other = manager.lock("account/4")?.try_acquire()?;
    /// for view in accounts.inspect()? {
    ///     println!("{}: {}", view.key, if view.holder.is_some() { "taken" } else { "free" });
    /// }
    /// # let taken: Vec<_> = accounts.inspect()?.iter().map(|view| (view.key.clone(), view.holder.is_some())).collect();
    /// # assert_eq!(taken, [("account/17".to_owned(), false), ("account/4".to_owned(), true)]);
    /// # Ok::<(), dsync::Error>(())
    /// ```
    pub fn inspect(&self) -> Result<Vec<LockView>> {
        let is_first = |number: &usize| {
            let index = self.named[*number].1;
            self.named[..*number].iter().all(|(_, before)| *before != index)
        };
        (0..self.named.len()).filter(is_first).map(|number| self.locks[self.named[number].1].view()).collect()
    }

    /// Takes one lock after the other; gives back what it has if there is one that it does not get.
    fn collect(&self, take: impl Fn(&dyn Lock, bool) -> Result<LockGuard>) -> Result<MultiGuard> {
        let (signal, lost) = Signal::new();
        let guards = Vec::with_capacity(self.locks.len());
        let mut taken = MultiGuard { guards, named: Arc::clone(&self.named), lost };
        for lock in &self.locks {
            let guard = take(&**lock, !taken.guards.is_empty())?;
            guard.lost().raises(&signal);
            taken.guards.push(guard);
            if let Some(guard) = taken.guards.iter().find(|guard| !guard.is_held()) {
                return Err(Error::lost(guard.key(), guard.loss().as_ref()));
            }
        }
        Ok(taken)
    }
}

/// True if both are the one handle of a key.
fn is_same(a: &Arc<dyn Lock>, b: &Arc<dyn Lock>) -> bool {
    std::ptr::addr_eq(Arc::as_ptr(a), Arc::as_ptr(b))
}

fn gave_up(kind: ErrorKind, begun: Instant, key: &str) -> Error {
    Error::new(
        kind,
        format!("waited {:.1?} for a set of locks, and then had yet to get {key:?}", begun.elapsed()),
    )
}

/// Held locks of a [`MultiLock`] for the length of a scope: all released when dropped.
///
/// It is lost when any of its terms is lost. The others go on until it is released or dropped, so that whoever has heard of the loss can
/// still bring the work to an end under them. None of them comes back.
#[must_use = "the locks are released as soon as the guard is dropped"]
pub struct MultiGuard {
    /// In the order of the locks. Empty once released.
    guards: Vec<LockGuard>,
    named: Arc<[(Key, usize)]>,
    /// Disconnects at the first end of a term.
    lost: Lost,
}

impl MultiGuard {
    /// The channel that disconnects when the first of the terms ends. It never reopens.
    pub fn lost(&self) -> &Lost {
        // After a freeze of the process this thread may run before the one that closes the channel: then this closes it.
        for guard in &self.guards {
            guard.lost();
        }
        &self.lost
    }

    /// True if this process still regards all the terms as going on: see [`Term::is_held`].
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.guards.iter().all(LockGuard::is_held)
    }

    /// How the first of the terms was lost that were lost; `None` also in another process, after a `fork`.
    pub fn loss(&self) -> Option<Loss> {
        self.guards.iter().filter_map(LockGuard::loss).min_by_key(|loss| loss.moment)
    }

    /// The term of the lock with this key; `None` if that is not of the set.
    pub fn term(&self, key: impl Into<Key>) -> Option<&Term> {
        let key = key.into();
        let (_, index) = self.named.iter().find(|(named, _)| *named == key)?;
        self.guards.get(*index).map(LockGuard::term)
    }

    /// The keys in text, and their terms, in the order of [`MultiLock::keys`].
    pub fn terms(&self) -> impl Iterator<Item = (&str, &Term)> {
        self.guards.iter().map(|guard| (guard.key(), guard.term()))
    }

    /// Lets `transaction` go on only if no later term of any of the keys has begun, and keeps one from beginning until it ends: see
    /// [`Term::fence`]. It takes one round trip for each key.
    ///
    /// # Errors
    /// As [`Term::fence`].
    pub fn fence(&self, transaction: &mut Transaction<'_>) -> Result<()> {
        self.guards.iter().try_for_each(|guard| guard.term().fence(transaction))
    }

    /// Releases all the locks, and says whether all the terms lasted until then and the server has confirmed their ends. It returns within
    /// the release timeout (2 s by default).
    ///
    /// # Errors
    /// One of those that [`LockGuard::release`] would have returned, [`Lost`](ErrorKind::Lost) before others.
    pub fn release(mut self) -> Result<()> {
        let mut failures = self.give_back();
        failures.sort_by_key(|(_, error)| error.kind() != ErrorKind::Lost);
        failures.into_iter().next().map_or(Ok(()), |(_, error)| Err(error))
    }

    /// Releases all that is left, in the time that one release has: at once, so that a session that does not answer holds up its own lock
    /// only. The keys of those for which that failed, and why.
    fn give_back(&mut self) -> Vec<(String, Error)> {
        let Some(first) = self.guards.first() else { return Vec::new() };
        let (by, is_here) = (first.release_by(), first.term().check_process().is_ok());
        let guards = Mutex::new(std::mem::take(&mut self.guards));
        let failures = Mutex::new(Vec::new());
        let give_back = || {
            loop {
                let Some(mut guard) = guards.lock().pop() else { break };
                let key = guard.key().to_owned();
                if let (Err(error), _) = guard.give_back(by) {
                    failures.lock().push((key, error));
                }
            }
        };
        if is_here {
            let count = guards.lock().len();
            in_parallel(count, give_back);
        } else {
            give_back();
            // The mutex of a channel of the parent's may be locked for ever here.
            std::mem::forget(self.lost.clone());
        }
        failures.into_inner()
    }
}

impl Drop for MultiGuard {
    /// Releases the locks, waiting no longer than [`MultiGuard::release`] does. Failures are logged.
    fn drop(&mut self) {
        for (key, error) in self.give_back() {
            // The loss itself was logged; in another process there is nothing to release.
            if !matches!(error.kind(), ErrorKind::Lost | ErrorKind::OtherProcess) {
                log::warn!("lock {key:?}: its release is not confirmed: {}", chain(&error));
            }
        }
    }
}

impl fmt::Debug for MultiGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.terms()).finish()
    }
}
