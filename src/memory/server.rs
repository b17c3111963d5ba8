//! What stands in for the database.

use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use parking_lot::Mutex;

use super::state::{Gone, State};
use crate::key::{HandleKey, Key};
use crate::loss::LossReason;

/// Stands in for the database in an application's tests: [`MemoryManager`](crate::MemoryManager)s on one server exclude
/// each other as processes on one database do.
///
/// It also does on demand what is hard to bring about with a real server: [`revoke`](Self::revoke) takes a lock from its
/// holder, and [`go_down`](Self::go_down) and [`come_up`](Self::come_up) make an outage. Each has happened in full when
/// the call returns, so a test needs no pauses. Clones are the same server. A key means the lock with it; or the semaphore, where nobody has
/// the lock or waits for it.
///
/// A test of what a service does when it loses its lock:
///
/// ```
/// use dsync::{Context, ErrorKind, Lock, LockOptions, LossReason, MemoryManager, MemoryServer, SyncManager};
///
/// let server = MemoryServer::new();
/// let (ours, theirs) = (MemoryManager::on(&server), MemoryManager::on(&server));
/// ours.start()?;
/// theirs.start()?;
/// let lock = ours.lock("nightly-report")?;
/// let rival = theirs.lock("nightly-report")?;
///
/// lock.lock(&Context::background())?;
/// let refusal = rival.try_lock(&Context::background()).unwrap_err();
/// assert_eq!(refusal.kind(), ErrorKind::LockUnavailable);
///
/// // An operator takes the lock away: we hear of it, and the rival, who has waited since, has it.
/// let lost = lock.lost();
/// assert!(server.revoke("nightly-report"));
/// assert!(lost.recv().is_err());
/// assert_eq!(lock.last_loss().map(|loss| loss.reason), Some(LossReason::Revoked));
/// rival.lock(&Context::background())?;
///
/// // Our claim went on: when the rival is done, the lock is ours again, in a new term.
/// rival.release()?;
/// assert!(lock.lost().try_recv().is_err_and(|error| error.is_empty()), "held");
/// # Ok::<(), dsync::Error>(())
/// ```
#[derive(Clone, Default)]
pub struct MemoryServer {
    pub(super) server: Arc<Server>,
}

impl MemoryServer {
    /// A server that is up, without locks.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the lock from its holder, as an operator does who terminates the holder's session; of several that share it, from the first
    /// only. Says whether there was a holder.
    ///
    /// The lost channel closes, with [`Revoked`](crate::LossReason::Revoked) as the reason, and the claim goes to the
    /// end of the queue: if nobody else waits, it has the lock again, in a new term, when this returns. A guard's is over.
    pub fn revoke(&self, key: impl Into<Key>) -> bool {
        let place = self.place(key);
        self.server.take_away(&place, LossReason::Revoked)
    }

    /// Warns the holder, of several that share the lock the first, that its term is about to end, as a manager on PostgreSQL does when a renewal is overdue: see
    /// [`Term::warned`](crate::Term::warned). Says whether there was a holder whose lock has a grace.
    pub fn warn(&self, key: impl Into<Key>) -> bool {
        let place = self.place(key);
        self.server.change(|state, _| state.warn(&place))
    }

    /// Makes the work under this key one that last succeeded when it began at `time`, by the clock of this machine, which managers in memory go
    /// by: as if it had been done yesterday, say. See [`Lock::once`](crate::Lock#method.once).
    pub fn set_last_success(&self, key: impl Into<Key>, time: SystemTime) {
        let key = key.into();
        self.server.change(|state, _| state.set_success(&key, Some(time)));
    }

    /// Begins an outage. Nothing happens if there is one already.
    ///
    /// All terms are lost, with [`ConnectionClosed`](crate::LossReason::ConnectionClosed) as the reason. Until
    /// [`come_up`](Self::come_up), `lock` and `try_lock` wait.
    pub fn go_down(&self) {
        self.server.change(|state, gone| state.go_down(gone));
    }

    /// Ends an outage: the claims that were not released have their locks again, in the order in which they had come,
    /// those that held them before the outage first. Nothing happens if there is none.
    pub fn come_up(&self) {
        if !self.server.see(State::is_down) {
            return;
        }
        // Before anybody has a lock: whoever gives one away later does not ask the next one's valuer.
        let claims = self.server.see(State::claims);
        for (claim, lock) in claims {
            let annotated = lock.annotated(claim);
            self.server.change(|state, _| state.annotate(&lock.place, annotated));
        }
        self.server.change(|state, _| state.come_up());
    }

    /// What the present holder's valuer made; `None` if nobody holds the lock, or the holder gave no valuer or shares the lock.
    pub fn annotation(&self, key: impl Into<Key>) -> Option<Vec<u8>> {
        let place = self.place(key);
        self.server.see(|state| state.annotation(&place))
    }

    /// How many claims on the lock wait for it. In an outage that is all of them.
    pub fn waiting(&self, key: impl Into<Key>) -> usize {
        let place = self.place(key);
        self.server.see(|state| state.waiting(&place))
    }

    /// The queue that a test means: of the lock with this key, or of the semaphore where nobody has the lock or waits for it.
    fn place(&self, key: impl Into<Key>) -> HandleKey {
        let key = key.into();
        self.server.see(|state| state.place(key))
    }
}

impl fmt::Debug for MemoryServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (down, keys) = self.server.see(|state| (state.is_down(), state.known_keys()));
        f.debug_struct("MemoryServer").field("down", &down).field("keys", &keys).finish()
    }
}

#[derive(Default)]
pub(super) struct Server {
    state: Mutex<State>,
}

impl Server {
    /// Takes the lock from its holder, for a reason that is told; `false` if there is none.
    pub(super) fn take_away(&self, key: &HandleKey, reason: LossReason) -> bool {
        let Some((claim, lock)) = self.see(|state| state.holder(key)) else { return false };
        let annotated = lock.annotated(claim);
        self.change(|state, gone| state.revoke(key, annotated, reason, gone))
    }

    /// Looks at the state. What is seen must not be dropped while the mutex is held if it may be the last handle.
    pub(super) fn see<T>(&self, look: impl FnOnce(&State) -> T) -> T {
        look(&self.state.lock())
    }

    /// Changes the state, and drops what has gone and tells the observers once the mutex is free: whoever gives a lock away begins
    /// the next one's term, so no thread is needed for that.
    pub(super) fn change<T>(&self, change: impl FnOnce(&mut State, &mut Gone) -> T) -> T {
        let mut gone = Gone::new();
        let (answer, untold) = {
            let mut state = self.state.lock();
            (change(&mut state, &mut gone), state.untold())
        };
        drop(gone);
        untold.iter().for_each(|story| story.tell());
        answer
    }
}
