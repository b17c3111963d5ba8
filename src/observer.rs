//! What a manager tells of its locks while it works: to a log, to counters, to a trace.

use std::sync::Arc;
use std::time::Duration;

use crate::error::Error;
use crate::loss::LossReason;

/// Is told what happens to the locks of a manager.
///
/// Each method stands for one kind of event, and does nothing by default: implement those that you want. An observer is given
/// to a manager before that is started: by [`Config::observer`](crate::Config::observer) or
/// [`MemoryManager::observer`](crate::MemoryManager::observer). To know how things are *now*, ask
/// [`SyncManager::snapshot`](crate::SyncManager::snapshot).
///
/// ```
/// use std::sync::Arc;
/// use std::sync::atomic::{AtomicUsize, Ordering};
/// use std::time::Duration;
/// use dsync::observer::TermLost;
/// use dsync::{MemoryManager, MemoryServer, Observer, SyncManager};
///
/// #[derive(Default)]
/// struct Losses(AtomicUsize);
///
/// impl Observer for Losses {
///     fn lost(&self, event: &TermLost<'_>) {
///         eprintln!("lost {:?} after {:?}: {}", event.key, event.held, event.reason);
///         self.0.fetch_add(1, Ordering::Relaxed);
///     }
/// }
///
/// let (server, losses) = (MemoryServer::new(), Arc::new(Losses::default()));
/// let manager = MemoryManager::on(&server).observer(Arc::clone(&losses));
/// manager.start()?;
/// let guard = manager.lock("ledger")?.acquire(Duration::from_secs(10))?;
/// server.revoke("ledger");
/// assert_eq!(losses.0.load(Ordering::Relaxed), 1);
/// # Ok::<(), dsync::Error>(())
/// ```
///
/// # On which threads it is called
///
/// On that which makes the event happen: an application's thread in a call of this library, or the library's thread that works
/// on the lock. So several threads may call it at once. The events of one claim come one at a time, in the order in which they
/// happened, and each comes once. An event may come a moment after the call that it belongs to has returned, where another
/// thread is at work on that claim. A loss that a thread notices which may not call an observer (the end of the
/// lease, in [`Lock::term`](crate::Lock::term) say) is told by the thread that works on the lock, at its next step:
/// at the latest when a heartbeat has timed out.
///
/// # What it may do
///
/// - It **must not block**. The thread that calls it has the lock in hand: it may be the one that renews the lease. What takes
///   longer than some microseconds belongs on a thread of the observer's, behind a channel.
/// - It must not take, release or wait for the lock that it is told of. No mutex is held that another thread waits for, so it may ask that
///   lock for its key and its term, ask for a snapshot, and use other locks (which block, so it should not).
/// - If it panics, the lock goes on as if it had not; the first panic of a manager's observer is logged.
///
/// In a process that was forked from the manager's, nothing is told.
#[allow(unused_variables, reason = "the defaults ignore what they are told")]
pub trait Observer: Send + Sync {
    /// A call begins that wants a lock: `acquire`, `try_acquire`, `with_lock`, `lock` or `try_lock`. The latter two are not
    /// told of where the claim holds the lock already.
    fn attempt(&self, event: &Attempt<'_>) {}

    /// Such a call has ended without the lock. A claim may go on in the background all the same.
    fn failed(&self, event: &AttemptFailed<'_>) {}

    /// A term has begun. A claim has another one after each loss, without another attempt.
    fn acquired(&self, event: &Acquired<'_>) {}

    /// A term has ended since the application, or the manager's stop, has ended it. Each term ends in this or in [`lost`](Self::lost).
    fn released(&self, event: &Released<'_>) {}

    /// A term was lost.
    fn lost(&self, event: &TermLost<'_>) {}

    /// The server could not be asked for a lock, or refused, or did not confirm a release. Told of each time, where the log has
    /// only the first of a series; not where a claim was ended meanwhile. Never in memory.
    fn trouble(&self, event: &Trouble<'_>) {}

    /// The server has answered the heartbeat of a term; of a session that carries many, one of them stands for all. Never in memory, where there are no
    /// leases.
    fn heartbeat(&self, event: &Heartbeat<'_>) {}

    /// The number of sessions in use has changed. The last such event has the present number. Never in memory.
    fn sessions(&self, event: &Sessions) {}

    /// A thread begins to wait for a guard that another thread of this process has, or waits for.
    fn thread_waits(&self, event: &ThreadWaits<'_>) {}

    /// That wait is over: it is the thread's turn to ask the server, or the thread has given up.
    fn thread_waited(&self, event: &ThreadWaited<'_>) {}
}

impl<O: Observer + ?Sized> Observer for Arc<O> {
    fn attempt(&self, event: &Attempt<'_>) {
        (**self).attempt(event);
    }
    fn failed(&self, event: &AttemptFailed<'_>) {
        (**self).failed(event);
    }
    fn acquired(&self, event: &Acquired<'_>) {
        (**self).acquired(event);
    }
    fn released(&self, event: &Released<'_>) {
        (**self).released(event);
    }
    fn lost(&self, event: &TermLost<'_>) {
        (**self).lost(event);
    }
    fn trouble(&self, event: &Trouble<'_>) {
        (**self).trouble(event);
    }
    fn heartbeat(&self, event: &Heartbeat<'_>) {
        (**self).heartbeat(event);
    }
    fn sessions(&self, event: &Sessions) {
        (**self).sessions(event);
    }
    fn thread_waits(&self, event: &ThreadWaits<'_>) {
        (**self).thread_waits(event);
    }
    fn thread_waited(&self, event: &ThreadWaited<'_>) {
        (**self).thread_waited(event);
    }
}

/// A call begins that wants a lock.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Attempt<'a> {
    /// The lock's key, in text.
    pub key: &'a str,
    /// True if the call is for a guard.
    pub is_guard: bool,
}

/// A call has ended without the lock.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct AttemptFailed<'a> {
    /// The lock's key, in text.
    pub key: &'a str,
    /// True if the call was for a guard.
    pub is_guard: bool,
    /// Why. [`LockUnavailable`](crate::ErrorKind::LockUnavailable) also stands for a `try_acquire` that gave `None`.
    pub error: &'a Error,
    /// How long the call took.
    pub waited: Duration,
}

/// A term has begun.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Acquired<'a> {
    /// The lock's key, in text.
    pub key: &'a str,
    /// True if the term is a guard's.
    pub is_guard: bool,
    /// How long the lock was wanted: by a guard since its call began, by a claim since the claim began or since it lost the
    /// term before.
    pub waited: Duration,
    /// The fencing token, if the term has one.
    pub token: Option<i64>,
    /// True if others may have the lock at the same time.
    pub is_shared: bool,
    /// Of a [semaphore](crate::PostgresManager::semaphore), which of its permits it is.
    pub permit: Option<u32>,
}

/// A term was ended.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Released<'a> {
    /// The lock's key, in text.
    pub key: &'a str,
    /// True if the term was a guard's.
    pub is_guard: bool,
    /// How long the lock was held: until the lost channel closed.
    pub held: Duration,
}

/// A term was lost.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct TermLost<'a> {
    /// The lock's key, in text.
    pub key: &'a str,
    /// True if the term was a guard's.
    pub is_guard: bool,
    /// How long the lock was held: until the lost channel closed.
    pub held: Duration,
    /// Why it was lost.
    pub reason: LossReason,
}

/// The server could not be asked, refused, or did not confirm a release.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Trouble<'a> {
    /// The lock's key, in text.
    pub key: &'a str,
    /// True if it is a guard's claim.
    pub is_guard: bool,
    /// What failed.
    pub error: &'a Error,
}

/// A heartbeat was answered.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Heartbeat<'a> {
    /// The lock's key, in text.
    pub key: &'a str,
    /// True if the term is a guard's.
    pub is_guard: bool,
    /// From the sending of the heartbeat until its answer was read.
    pub round_trip: Duration,
}

/// How many sessions a manager has in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Sessions {
    /// Those that claims have, and those that are kept for the next claim for some milliseconds. Not those that lie in the
    /// pool for longer.
    pub in_use: u32,
    /// How many there may be: [`max_sessions`](crate::Config::max_sessions).
    pub limit: u32,
}

/// A thread begins to wait for another thread of its process.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct ThreadWaits<'a> {
    /// The lock's key, in text.
    pub key: &'a str,
}

/// A thread has waited for another thread of its process.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct ThreadWaited<'a> {
    /// The lock's key, in text.
    pub key: &'a str,
    /// How long it waited.
    pub waited: Duration,
}
