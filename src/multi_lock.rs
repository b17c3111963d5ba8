//! Several locks at once: all of them, or none.

use std::fmt;
use std::sync::Arc;

use postgres::Transaction;

use crate::context::Context;
use crate::error::{Error, ErrorKind, Result, chain};
use crate::guard::{Deed, LockGuard};
use crate::key::Key;
use crate::lock::Lock;
use crate::loss::{Loss, Lost, Signal};
use crate::session_budget::{SessionBudget, Share};
use crate::term::Term;

/// Several locks that are taken together: all of them, or none.
///
/// Every process takes them in the same order, whatever the order in which the caller names them. So two sets that have keys in common never
/// wait for each other. A key that is named twice is taken once.
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
/// Each lock of the set is a lock like any other: it excludes guards and claims of its key, has a term with a token of its own, and
/// takes a session of the manager. Each may be lost by itself. All methods may be called from any thread.
///
/// A thread that has a guard of one of the keys, or waits for a set while it has a guard of another key, may wait for itself, or for a
/// thread that waits for it: take all that a piece of work needs with one call.
#[derive(Clone, Debug)]
#[must_use]
pub struct MultiLock {
    /// In the order in which all processes take them. Never empty.
    locks: Vec<Arc<dyn Lock>>,
}

impl MultiLock {
    pub(crate) fn new(locks: impl IntoIterator<Item = Result<Arc<dyn Lock>>>) -> Result<Self> {
        let mut locks = locks.into_iter().collect::<Result<Vec<_>>>()?;
        locks.sort_by_key(|lock| lock.place());
        locks.dedup_by_key(|lock| lock.place());
        let Some(first) = locks.first() else {
            let message = "the set of locks is empty; name one key at least";
            return Err(Error::new(ErrorKind::InvalidKey, message));
        };
        if let Some(most) = first.budget().map(|budget| budget.total()).filter(|most| locks.len() > *most) {
            let message = format!(
                "the set has {} locks, of which each takes a session, and the manager may open {most}; raise max_sessions, or take \
                 one lock for all",
                locks.len()
            );
            return Err(Error::new(ErrorKind::InvalidConfig, message));
        }
        Ok(Self { locks })
    }

    /// The keys in text, each once, in the order in which they are taken.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.locks.iter().map(|lock| lock.key())
    }

    /// Waits until all the locks are held, for a [`Duration`](std::time::Duration), until an [`Instant`](std::time::Instant), or as a [`Context`] says; that
    /// bounds all of them together. A time of zero, or one that has passed before the call, means *try once*, as for a single lock.
    ///
    /// An attempt that fails gives back what it had. Where the server has to be told of that, it takes up to the release timeout longer.
    ///
    /// # Errors
    /// As `acquire` of a [`Lock`]; the text names the key. Where sets of this manager that hold their locks, or wait for them, have all the
    /// sessions that it may open, the call waits for these first.
    pub fn acquire(&self, context: impl Into<Context>) -> Result<MultiGuard> {
        self.acquire_as(&context.into())
    }

    fn acquire_as(&self, context: &Context) -> Result<MultiGuard> {
        let deed = Deed::of(context)?;
        let share = match (self.budget()?, deed) {
            (None, _) => None,
            (Some(budget), Deed::Waits) => {
                Some(budget.take(self.locks.len(), context).map_err(|kind| no_session(kind, budget))?)
            }
            (Some(budget), Deed::TriesOnce) => Some(self.take_at_once(budget)?),
        };
        self.collect(share, |lock| {
            if deed == Deed::Waits {
                // A lock of the set before this one may have taken all the time.
                context.check()?;
            }
            LockGuard::acquire(lock, context, deed)
        })
    }

    /// Takes all the locks if all are free now, and none of them otherwise: then it gives `None`. It takes as long as as many calls of
    /// [`Lock::try_acquire`].
    ///
    /// # Errors
    /// As [`Lock::try_acquire`]; [`PoolExhausted`](ErrorKind::PoolExhausted) also where other sets of this manager have the sessions.
    pub fn try_acquire(&self) -> Result<Option<MultiGuard>> {
        let share = self.budget()?.map(|budget| self.take_at_once(budget)).transpose()?;
        let outcome = self.collect(share, |lock| {
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

    /// The sessions from which the set takes its own; `None` where a lock takes none, or the set is of one lock, which waits for nothing
    /// while it has another.
    fn budget(&self) -> Result<Option<&Arc<SessionBudget>>> {
        // Fails in a forked child.
        for lock in &self.locks {
            lock.queue()?;
        }
        Ok(self.locks.first().filter(|_| self.locks.len() > 1).and_then(|lock| lock.budget()))
    }

    fn take_at_once(&self, budget: &Arc<SessionBudget>) -> Result<Share> {
        budget.try_take(self.locks.len()).ok_or_else(|| no_session(ErrorKind::PoolExhausted, budget))
    }

    /// Takes one lock after the other; gives back what it has if there is one that it does not get.
    fn collect(
        &self,
        share: Option<Share>,
        take: impl Fn(&dyn Lock) -> Result<LockGuard>,
    ) -> Result<MultiGuard> {
        let (signal, lost) = Signal::new();
        let mut taken = MultiGuard { guards: Vec::with_capacity(self.locks.len()), lost, share };
        for lock in &self.locks {
            let guard = take(&**lock)?;
            guard.lost().raises(&signal);
            taken.guards.push(guard);
        }
        if let Some(guard) = taken.guards.iter().find(|guard| !guard.is_held()) {
            return Err(Error::lost(guard.key(), guard.loss().as_ref()));
        }
        Ok(taken)
    }
}

fn no_session(kind: ErrorKind, budget: &SessionBudget) -> Error {
    let message = format!(
        "sets of locks of this manager have all {} sessions that it may open; raise max_sessions, or release sets that are not needed",
        budget.total()
    );
    let cause = Error::new(ErrorKind::PoolExhausted, message);
    if kind == ErrorKind::PoolExhausted {
        return cause;
    }
    Error::new(kind, "waited for the sessions of a set of locks").with_source(cause)
}

/// Held locks of a [`MultiLock`] for the length of a scope: all released when dropped.
///
/// It is lost when any of its terms is lost. The others go on until it is released or dropped, so that whoever has heard of the loss can
/// still bring the work to an end under them. None of them comes back.
#[must_use = "the locks are released as soon as the guard is dropped"]
pub struct MultiGuard {
    /// In the order of the locks. Empty once released.
    guards: Vec<LockGuard>,
    /// Disconnects at the first end of a term.
    lost: Lost,
    /// Dropped after the guards.
    share: Option<Share>,
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
        self.guards.iter().filter_map(LockGuard::loss).min_by_key(|loss| loss.at)
    }

    /// The term of the lock with this key; `None` if that is not of the set.
    pub fn term(&self, key: impl Into<Key>) -> Option<&Term> {
        let key = key.into().to_string();
        self.terms().find(|(name, _)| *name == key).map(|(_, term)| term)
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
    /// The first of those that [`LockGuard::release`] would have returned, [`Lost`](ErrorKind::Lost) before others.
    pub fn release(mut self) -> Result<()> {
        let mut outcome = Ok(());
        self.give_back(|_, error| {
            let was_lost = outcome.as_ref().is_err_and(|known: &Error| known.kind() == ErrorKind::Lost);
            if outcome.is_ok() || error.kind() == ErrorKind::Lost && !was_lost {
                outcome = Err(error);
            }
        });
        outcome
    }

    /// Releases all that is left, the last one first, in the time that one release has.
    fn give_back(&mut self, mut failed: impl FnMut(&str, Error)) {
        let Some(by) = self.guards.first().map(LockGuard::release_by) else { return };
        while let Some(mut guard) = self.guards.pop() {
            let key = guard.key().to_owned();
            if let (Err(error), _) = guard.give_back(by) {
                if error.kind() == ErrorKind::OtherProcess {
                    // A mutex of the parent's, or of a channel of its, may be locked for ever here.
                    std::mem::forget((self.share.take(), self.lost.clone()));
                }
                failed(&key, error);
            }
        }
    }
}

impl Drop for MultiGuard {
    /// Releases the locks, waiting no longer than [`MultiGuard::release`] does. Failures are logged.
    fn drop(&mut self) {
        self.give_back(|key, error| {
            // The loss itself was logged; in another process there is nothing to release.
            if !matches!(error.kind(), ErrorKind::Lost | ErrorKind::OtherProcess) {
                log::warn!("lock {key:?}: {}", chain(&error));
            }
        });
    }
}

impl fmt::Debug for MultiGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.terms()).finish()
    }
}
