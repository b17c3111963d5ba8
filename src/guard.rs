//! The everyday interface: a lock for the length of a scope.

use std::cell::RefCell;
use std::fmt;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant, SystemTime};

use crate::context::Context;
use crate::error::{Error, ErrorKind, Result, chain};
use crate::local_queue::{LocalQueue, Turn};
use crate::lock::Lock;
use crate::loss::{Loss, Lost};
use crate::mode::Mode;
use crate::once::Successes;
use crate::process::Origin;
use crate::telling::Observing;
use crate::term::Term;
use crate::view::LockView;

/// What an implementation of [`Lock`] does for guards. Nobody outside of this library can implement it.
pub trait Guarded {
    /// The threads of this process that want a guard of this lock.
    ///
    /// # Errors
    /// In another process than the one that made the lock.
    fn queue(&self) -> Result<&Arc<LocalQueue>>;

    /// The manager's observer.
    fn observing(&self) -> Option<&Arc<Observing>>;

    /// Its place in the order in which every process takes the locks of a set.
    fn place(&self) -> (bool, i64);

    /// Which manager it is of.
    fn owner(&self) -> (usize, u64);

    /// How it is had.
    fn mode(&self) -> Mode;

    /// True if others may hold it at the same time.
    fn is_shared(&self) -> bool {
        self.mode().is_shared()
    }

    /// How many sessions its manager may open, if this lock takes one of its own.
    fn most_sessions(&self) -> Option<u32> {
        None
    }

    /// Begins a claim of its own for one term, and waits as long as `context` says; without a context, tries once. One that
    /// fails leaves nothing behind. The lock is wanted since `wanted_since`.
    ///
    /// A caller that `has_others`, locks for which somebody else may wait with a session, does not wait for a session itself: then this
    /// fails with `PoolExhausted`.
    fn claim_term(
        &self,
        context: Option<&Context>,
        wanted_since: Instant,
        has_others: bool,
    ) -> Result<HeldTerm>;

    /// Why the last attempt of a guard's claim that goes on has failed.
    fn trouble(&self) -> Option<Error>;

    /// True if the manager has stopped, which is for good.
    fn is_stopped(&self) -> bool;

    /// How often a leader is to ask whether it should resign; `None` where nobody can ask it to.
    fn resignation_interval(&self) -> Option<Duration> {
        None
    }

    /// When the work under this lock began that succeeded last, and the server's time now. Asks the server.
    fn successes(&self) -> Result<Successes>;

    /// Records that the work which began at `started` has succeeded; `false` if the term is over. Tells the server.
    fn record_success(&self, term: &Term, started: SystemTime) -> Result<bool>;

    /// Who has this lock, and who waits for it. Asks the server.
    fn view(&self) -> Result<LockView>;

    /// Whether somebody has asked the holder of the term with this token to resign. Asks the server.
    fn is_asked_to_resign(&self, _token: i64) -> Result<bool> {
        Ok(false)
    }
}

/// A term that was begun for a guard.
#[derive(Debug)]
pub struct HeldTerm {
    pub(crate) term: Term,
    pub(crate) hold: Box<dyn Hold>,
}

/// What holds a term.
pub(crate) trait Hold: fmt::Debug + Send + Sync {
    /// The lock's key, in text.
    fn key(&self) -> &str;

    /// How the term was lost, if it was. One whose time is over is lost from then on.
    fn loss(&self) -> Option<Loss>;

    /// When a release that begins now must be over.
    fn release_by(&self) -> Instant;

    /// Gives the lock back, by `by` at the latest. Fails with `Lost` if the term had ended before.
    fn release(&mut self, by: Instant) -> Result<()>;
}

/// What a call does where another one has the lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WhenTaken {
    Waits,
    /// Its context had ended before, and so leaves it one attempt.
    TriesOnce,
}

impl WhenTaken {
    /// What a call with this context does. A cancelled one does nothing.
    pub(crate) fn of(context: &Context) -> Result<Self> {
        match context.ended() {
            None => Ok(Self::Waits),
            Some(ErrorKind::Cancelled) => Err(Error::new(ErrorKind::Cancelled, "the context was cancelled")),
            Some(_) => Ok(Self::TriesOnce),
        }
    }
}

/// The locks of which this thread has taken guards that are there still, whichever thread has them now.
struct Taken {
    by: Origin,
    locks: Vec<TakenLock>,
}

struct TakenLock {
    owner: (usize, u64),
    place: (bool, i64),
    shared: bool,
    /// Gone with the guard.
    guard: Weak<()>,
}

thread_local! {
    static TAKEN: RefCell<Taken> = RefCell::new(Taken { by: Origin::here(), locks: Vec::new() });
}

impl Taken {
    /// Runs `look` on what this thread has taken in this process. Not at the end of the thread, where nothing is known any more.
    fn with<T: Default>(look: impl FnOnce(&mut Vec<TakenLock>) -> T) -> T {
        let looked = TAKEN.try_with(|taken| {
            let mut taken = taken.borrow_mut();
            if !taken.by.is_here() {
                *taken = Self { by: Origin::here(), locks: Vec::new() };
            }
            taken.locks.retain(|lock| lock.guard.strong_count() > 0);
            look(&mut taken.locks)
        });
        looked.unwrap_or_default()
    }

    /// Notes that this thread has taken a guard; it is forgotten when what this gives is dropped.
    fn note<L: Lock + ?Sized>(lock: &L) -> Arc<()> {
        let guard = Arc::new(());
        let (owner, place, shared) = (lock.owner(), lock.place(), lock.is_shared());
        Self::with(|locks| locks.push(TakenLock { owner, place, shared, guard: Arc::downgrade(&guard) }));
        guard
    }
}

/// Refuses a lock that the caller has already the other way by a guard, since it would wait for itself.
pub(crate) fn check_mode<L: Lock + ?Sized>(lock: &L) -> Result<()> {
    let (owner, place, shared) = (lock.owner(), lock.place(), lock.is_shared());
    let is_other = |taken: &TakenLock| (taken.owner, taken.place) == (owner, place) && taken.shared != shared;
    match Taken::with(|locks| locks.iter().any(is_other)) {
        true => Err(Error::would_deadlock(lock.key(), "a guard that this thread has taken", shared)),
        false => Ok(()),
    }
}

/// A held lock for the length of a scope: released when dropped.
///
/// Made by `acquire` and [`try_acquire`](Lock::try_acquire) of a [`Lock`]. Bind it to a name: `let _ = …` would release at
/// once.
///
/// - It excludes the other threads of this process, too. They take turns, first come, first served, each with a term and a
///   token of its own, and other processes are served in between. All that wait use one session of the server.
/// - If the lock is [shared](crate::PostgresManager::shared_lock), it excludes those only who want the lock alone. Each guard has a term of its own
///   then, and a session (but for one of them, where [sessions are shared](crate::Config::shared_sessions)), and one token with the others. All that wait in this process use one session beside those.
/// - Of a [semaphore](crate::PostgresManager::semaphore) it is one permit. Each guard has a term and a token of its own then, and a session, unless
///   [sessions are shared](crate::Config::shared_sessions). All that wait in this process use one session beside those.
/// - It is one term. When that is [lost](Self::lost), it does not come back, [`release`](Self::release) says so, and others
///   may have the lock: a guard does not make the lock safe to lose, so watch the channel.
/// - It ends its own term and nothing else: no other guard's, and no claim of [`Lock::lock`].
/// - It does not keep its manager alive: when that is stopped or dropped, the term ends. So one place decides when a service
///   gives up all that it has.
///
/// ```
/// use std::time::Duration;
/// use dsync::{MemoryManager, SyncManager};
///
/// let manager = MemoryManager::new();
/// manager.start()?;
/// let guard = manager.lock("migrations")?.acquire(Duration::from_secs(60))?;
/// assert!(guard.is_held());
/// // … migrate …
/// guard.release()?; // or let it drop: then a failure is only logged
/// # Ok::<(), dsync::Error>(())
/// ```
#[must_use = "the lock is released as soon as the guard is dropped"]
pub struct LockGuard {
    term: Term,
    /// `None` once released.
    hold: Option<Box<dyn Hold>>,
    /// Dropped after the release: the next thread of this process comes when the lock has been given back. `None` of a shared lock, which
    /// others may have meanwhile.
    turn: Option<Turn>,
    /// Tells the thread that has taken it that the guard is there. `None` once released.
    taken: Option<Arc<()>>,
}

impl LockGuard {
    /// Waits for the lock, or tries once.
    pub(crate) fn acquire<L: Lock + ?Sized>(lock: &L, context: &Context) -> Result<Self> {
        Self::acquire_beside(lock, context, None, false)
    }

    /// As `acquire`; it may be known what is to be done where another one has the lock, and the caller may have other locks.
    pub(crate) fn acquire_beside<L: Lock + ?Sized>(
        lock: &L,
        context: &Context,
        when_taken: Option<WhenTaken>,
        has_others: bool,
    ) -> Result<Self> {
        let begun = Instant::now();
        let (queue, observing) = (lock.queue()?, lock.observing());
        let gave_up = |kind| {
            let (waited, key) = (begun.elapsed(), lock.key());
            if kind == ErrorKind::PoolExhausted {
                let text =
                    format!("the thread whose turn it is at {key:?} finds no session; raise max_sessions");
                return Error::new(kind, text);
            }
            let held_by = match lock.is_shared() {
                true => "for which another thread of this process waits that came before",
                false => {
                    "which a guard of another thread of this process holds, or one of this thread; a thread must drop its guard before it \
                     takes a second one"
                }
            };
            Error::new(kind, format!("waited {waited:.1?} for lock {key:?}, {held_by}"))
        };
        Observing::attempt(observing, lock.key(), true, || {
            check_mode(lock)?;
            let when_taken = when_taken.map_or_else(|| WhenTaken::of(context), Ok)?;
            let tries_once = when_taken == WhenTaken::TriesOnce;
            // Whoever has the turn may wait for a session that somebody has who waits for the caller's other locks.
            let no_session =
                || lock.trouble().map(|error| error.kind()).filter(|kind| *kind == ErrorKind::PoolExhausted);
            let obstacle: Option<&dyn Fn() -> Option<ErrorKind>> =
                if has_others { Some(&no_session) } else { None };
            let turn = match queue.try_enter() {
                // Others may have it as well, so it need not be the turn of who does not wait.
                None if lock.is_shared() && tries_once => None,
                None => {
                    let wait = || queue.enter_unless(context, obstacle);
                    Some(Observing::thread_waits(observing, lock.key(), wait).map_err(gave_up)?)
                }
                turn => turn,
            };
            // Its turn may have come in the very moment in which the context ended, which gives it no attempt of its own.
            if let Some(kind) = context.ended()
                && !(tries_once && kind == ErrorKind::TimedOut)
            {
                return Err(gave_up(kind));
            }
            match Self::begin(lock, turn, (!tries_once).then_some(context), begun, has_others) {
                // The one attempt of a context that had ended.
                Err(error) if error.kind() == ErrorKind::LockUnavailable => Err(error.into_timed_out()),
                outcome => outcome,
            }
        })
    }

    /// Takes the lock if it is free; `None` if it is not, or a takeover grace goes on.
    pub(crate) fn try_acquire<L: Lock + ?Sized>(lock: &L) -> Result<Option<Self>> {
        match Self::acquire_if_free(lock) {
            Err(error) if error.kind() == ErrorKind::LockUnavailable => Ok(None),
            outcome => outcome.map(Some),
        }
    }

    /// Takes the lock if it is free.
    pub(crate) fn acquire_if_free<L: Lock + ?Sized>(lock: &L) -> Result<Self> {
        let (begun, queue) = (Instant::now(), lock.queue()?);
        let outcome = Observing::attempt(lock.observing(), lock.key(), true, || {
            check_mode(lock)?;
            match queue.try_enter() {
                None if !lock.is_shared() => {
                    Err(Error::new(ErrorKind::LockUnavailable, "another thread of this process holds it"))
                }
                turn => Self::begin(lock, turn, None, begun, false),
            }
        });
        // The caller has set no time.
        outcome.map_err(|error| {
            if error.kind() != ErrorKind::TimedOut {
                return error;
            }
            let why = std::error::Error::source(&error).map(|why| format!(": {why}")).unwrap_or_default();
            let text = format!("whether {:?} is free was not to be found out{why}", lock.key());
            Error::new(ErrorKind::SessionUnavailable, text).because_of(error)
        })
    }

    /// Runs `work` while the lock is held.
    pub(crate) fn with<L: Lock + ?Sized, T>(
        lock: &L,
        context: &Context,
        work: impl FnOnce(&Term) -> T,
    ) -> Result<T> {
        let guard = Self::acquire(lock, context)?;
        // If it panics, the guard is dropped.
        let outcome = work(&guard.term);
        guard.release().map(|()| outcome)
    }

    fn begin<L: Lock + ?Sized>(
        lock: &L,
        turn: Option<Turn>,
        context: Option<&Context>,
        begun: Instant,
        has_others: bool,
    ) -> Result<Self> {
        let HeldTerm { term, hold } = lock.claim_term(context, begun, has_others)?;
        // Others may have a lock that is shared meanwhile.
        let turn = turn.filter(|_| !lock.is_shared());
        if let Some(turn) = &turn {
            turn.lasts_until(term.lost().clone());
        }
        Ok(Self { term, hold: Some(hold), turn, taken: Some(Taken::note(lock)) })
    }

    /// The channel of the guard's term. It never reopens.
    pub fn lost(&self) -> &Lost {
        // After a freeze of the process this thread may run before the one that closes the channel: then this closes it.
        if !self.term.is_held() {
            let _ = self.loss();
        }
        self.term.lost()
    }

    /// The key of the lock in text, as [`Key`](crate::Key) displays it.
    pub fn key(&self) -> &str {
        // It is there until the release, which takes the guard.
        self.hold.as_ref().map_or("released", |hold| hold.key())
    }

    /// The guard's term, for its fencing token.
    pub fn term(&self) -> &Term {
        &self.term
    }

    /// How the term was lost, if it was. `None` also in another process, after a `fork`.
    pub fn loss(&self) -> Option<Loss> {
        self.term.check_process().ok().and(self.hold.as_ref())?.loss()
    }

    /// True if this process still regards the term as going on: see [`Term::is_held`].
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.term.is_held()
    }

    /// Releases the lock, and says whether the term lasted until then and the server has confirmed its end. A job that asks this
    /// knows that it had the lock to the end. It returns within the release timeout (2 s by default).
    ///
    /// # Errors
    /// - [`Lost`](ErrorKind::Lost): the term had ended before; another holder may have been at work meanwhile.
    /// - As [`Lock::release`].
    pub fn release(mut self) -> Result<()> {
        self.give_back(self.release_by()).0
    }

    /// Releases the lock as [`release`](Self::release) does, and tells how the term was lost if it did not last until then.
    pub(crate) fn end(mut self) -> (Result<()>, Option<Loss>) {
        self.give_back(self.release_by())
    }

    /// When a release that begins now must be over.
    pub(crate) fn release_by(&self) -> Instant {
        self.hold.as_ref().map_or_else(Instant::now, |hold| hold.release_by())
    }

    /// Releases the lock by `by` at the latest, unless that was done before.
    pub(crate) fn give_back(&mut self, by: Instant) -> (Result<()>, Option<Loss>) {
        let Some(mut hold) = self.hold.take() else { return (Ok(()), None) };
        self.taken = None;
        if let Err(error) = self.term.check_process() {
            // A mutex of the parent's, or of a channel of its, may be locked for ever here. A channel is left alone by all but
            // the last that leaves it, and the clone is never dropped.
            std::mem::forget((hold, self.turn.take(), self.term.clone()));
            return (Err(error), None);
        }
        if let Some(turn) = &self.turn {
            turn.lasts_until_dropped();
        }
        let outcome = hold.release(by);
        // Before anything is logged of it: the next thread has its turn.
        drop(self.turn.take());
        let lost = outcome.as_ref().is_err_and(|error| error.kind() == ErrorKind::Lost);
        (outcome, lost.then(|| hold.loss()).flatten())
    }
}

impl Drop for LockGuard {
    /// Releases the lock, waiting no longer than [`LockGuard::release`] does. A failure is logged.
    fn drop(&mut self) {
        let Some(key) = self.hold.as_ref().map(|hold| hold.key().to_owned()) else { return };
        match self.give_back(self.release_by()).0 {
            // The loss itself was logged; in another process there is nothing to release.
            Err(error) if !matches!(error.kind(), ErrorKind::Lost | ErrorKind::OtherProcess) => {
                log::warn!("lock {key:?}: its release is not confirmed: {}", chain(&error));
            }
            _ => {}
        }
    }
}

impl fmt::Debug for LockGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LockGuard").field("key", &self.key()).field("term", &self.term).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Moment;
    use crate::expiry::Expiry;
    use crate::loss::{Alive, LossReason};
    use crate::sync::Mutex;

    /// Notices only when it is asked that the time is over.
    #[derive(Debug)]
    struct Sleepy(Mutex<Option<Alive>>);

    impl Hold for Sleepy {
        fn key(&self) -> &str {
            "k"
        }

        fn loss(&self) -> Option<Loss> {
            *self.0.lock() = None;
            Some(Loss::now(LossReason::LeaseNotRenewed))
        }

        fn release_by(&self) -> Instant {
            Instant::now()
        }

        fn release(&mut self, _: Instant) -> Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_guard_whose_time_is_over_is_lost_also_where_nobody_has_seen_it() {
        let (alive, lost) = Lost::pair();
        let term = Term::new(lost, None, None).with_expiry(Arc::new(Expiry::new(Moment::now())));
        let guard = LockGuard {
            term,
            hold: Some(Box::new(Sleepy(Mutex::new(Some(alive))))),
            turn: None,
            taken: None,
        };
        assert!(guard.lost().is_lost());
    }
}
