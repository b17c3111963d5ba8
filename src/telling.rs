//! How an observer is told: outside of all mutexes, in order, and without harm to the locks.

use std::any::Any;
use std::collections::VecDeque;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::loss::LossReason;
use crate::observer::{
    Acquired, Attempt, AttemptFailed, Heartbeat, Observer, Released, Sessions, TermLost, ThreadWaited,
    ThreadWaits, Trouble,
};
use crate::sync::{AtomicBool, Mutex, Ordering::Relaxed};

/// A manager's observer, and what keeps the manager safe from it. No method may be called under a mutex of the library's.
pub struct Observing {
    observer: Arc<dyn Observer>,
    /// A panic was logged.
    has_panicked: AtomicBool,
    sessions: Mutex<SessionsTold>,
}

#[derive(Debug, Default)]
struct SessionsTold {
    last: Option<Sessions>,
    /// A thread is telling the observer of them.
    telling: bool,
    /// There may be another number since that thread last looked.
    changed: bool,
}

/// Runs code of the application's, which must not harm a lock; `true` if it panics.
pub(crate) fn panics(work: impl FnOnce()) -> bool {
    catch_unwind(AssertUnwindSafe(work)).map_err(discard).is_err()
}

/// Drops what a panic has thrown, which may panic in turn.
pub(crate) fn discard(thrown: Box<dyn Any + Send>) {
    if let Err(another) = catch_unwind(AssertUnwindSafe(|| drop(thrown))) {
        std::mem::forget(another);
    }
}

impl Observing {
    pub(crate) fn new(observer: Arc<dyn Observer>) -> Arc<Self> {
        let sessions = Mutex::new(SessionsTold::default());
        Arc::new(Self { observer, has_panicked: AtomicBool::new(false), sessions })
    }

    /// Calls the observer, which is the application's code, and must not harm the lock.
    fn call(&self, tell: impl FnOnce(&dyn Observer)) {
        if panics(|| tell(&*self.observer)) && !self.has_panicked.swap(true, Relaxed) {
            // The logger is the application's code, too.
            panics(|| {
                log::warn!(
                    "the observer of the locks panicked; locks go on, and further panics are not logged"
                );
            });
        }
    }

    /// Makes an attempt at a lock, and tells of it.
    pub(crate) fn attempt<T>(
        observing: Option<&Arc<Self>>,
        key: &str,
        is_guard: bool,
        attempt: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let Some(observing) = observing else { return attempt() };
        observing.call(|observer| observer.attempt(&Attempt { key, is_guard }));
        let begun = Instant::now();
        attempt().inspect_err(|error| {
            let event = AttemptFailed { key, is_guard, error, waited: begun.elapsed() };
            observing.call(|observer| observer.failed(&event));
        })
    }

    /// Waits for another thread of this process, and tells of it.
    pub(crate) fn thread_waits<T>(observing: Option<&Arc<Self>>, key: &str, wait: impl FnOnce() -> T) -> T {
        let Some(observing) = observing else { return wait() };
        observing.call(|observer| observer.thread_waits(&ThreadWaits { key }));
        let begun = Instant::now();
        let outcome = wait();
        let event = ThreadWaited { key, waited: begun.elapsed() };
        observing.call(|observer| observer.thread_waited(&event));
        outcome
    }

    /// Tells how many sessions there are, by what `count` says then, if that has changed. Another thread that is telling it at this moment
    /// does so for this one: else an older number could be told last.
    pub(crate) fn sessions(&self, count: impl Fn() -> Sessions) {
        {
            let mut told = self.sessions.lock();
            told.changed = true;
            if told.telling {
                return;
            }
            told.telling = true;
        }
        loop {
            {
                let mut told = self.sessions.lock();
                if !std::mem::take(&mut told.changed) {
                    told.telling = false;
                    return;
                }
            }
            let now = count();
            let former = self.sessions.lock().last.replace(now);
            if former != Some(now) {
                self.call(|observer| observer.sessions(&now));
            }
        }
    }
}

impl fmt::Debug for Observing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Observing").field("has_panicked", &self.has_panicked).finish_non_exhaustive()
    }
}

/// What the observer is to be told of one claim.
///
/// Things happen under mutexes, where no observer may be called. So they are noted there, and told by the thread that works on
/// the claim when it has let go of them. One thread tells at a time, so that the order stays.
#[derive(Debug)]
pub(crate) struct Story {
    observing: Arc<Observing>,
    key: String,
    is_guard: bool,
    is_shared: bool,
    state: Mutex<StoryState>,
}

#[derive(Debug)]
struct StoryState {
    /// When the lock began to be wanted.
    wanted_since: Instant,
    /// When the current term began; `None` while there is none.
    held_since: Option<Instant>,
    untold: VecDeque<Told>,
    /// A thread is telling.
    telling: bool,
}

/// What is to be told, without what all events of a claim have in common.
#[derive(Debug)]
enum Told {
    Acquired { waited: Duration, token: Option<i64>, permit: Option<u32> },
    Released { held: Duration },
    Lost { held: Duration, reason: LossReason },
    Trouble(Error),
    Heartbeat { round_trip: Duration },
}

impl Story {
    /// That of a claim on a lock that is wanted since `wanted_since`.
    pub(crate) fn new(
        observing: &Arc<Observing>,
        key: &str,
        is_guard: bool,
        is_shared: bool,
        wanted_since: Instant,
    ) -> Self {
        let (observing, key) = (Arc::clone(observing), key.to_owned());
        let untold = VecDeque::new();
        let state = StoryState { wanted_since, held_since: None, untold, telling: false };
        Self { observing, key, is_guard, is_shared, state: Mutex::new(state) }
    }

    // To be called where it happens, under whatever mutex.

    pub(crate) fn acquired(&self, token: Option<i64>, permit: Option<u32>) {
        let (mut state, now) = (self.state.lock(), Instant::now());
        let waited = now - state.wanted_since;
        state.held_since = Some(now);
        state.untold.push_back(Told::Acquired { waited, token, permit });
    }

    /// The application has ended the claim. Nothing is to be told if there is no term.
    pub(crate) fn released(&self) {
        self.ended(|held| Told::Released { held });
    }

    pub(crate) fn lost(&self, reason: LossReason) {
        self.ended(|held| Told::Lost { held, reason });
    }

    fn ended(&self, told: impl FnOnce(Duration) -> Told) {
        let (mut state, now) = (self.state.lock(), Instant::now());
        if let Some(since) = state.held_since.take() {
            state.wanted_since = now;
            state.untold.push_back(told(now - since));
        }
    }

    pub(crate) fn trouble(&self, error: Error) {
        self.state.lock().untold.push_back(Told::Trouble(error));
    }

    pub(crate) fn heartbeat(&self, round_trip: Duration) {
        self.state.lock().untold.push_back(Told::Heartbeat { round_trip });
    }

    // To be called under no mutex.

    /// Tells what there is to tell, unless another thread is at it, which then goes on with that.
    pub(crate) fn tell(&self) {
        {
            let mut state = self.state.lock();
            if state.telling || state.untold.is_empty() {
                return;
            }
            state.telling = true;
        }
        loop {
            let told = {
                let mut state = self.state.lock();
                let next = state.untold.pop_front();
                state.telling = next.is_some();
                next
            };
            let Some(told) = told else { return };
            self.tell_one(&told);
        }
    }

    /// As [`tell`](Self::tell), and waits for a thread that is at it: for a caller that is about to return, after which others may have more to tell
    /// of the lock. It does not wait for long, since that thread may wait for this one.
    pub(crate) fn tell_and_wait(&self) {
        const AT_MOST: Duration = Duration::from_millis(100);
        let begun = Instant::now();
        loop {
            self.tell();
            if !self.state.lock().telling || begun.elapsed() >= AT_MOST {
                return;
            }
            std::thread::yield_now();
        }
    }

    fn tell_one(&self, told: &Told) {
        let Self { observing, key, is_guard, is_shared, .. } = self;
        let (key, is_guard, is_shared) = (key.as_str(), *is_guard, *is_shared);
        observing.call(|observer| match *told {
            Told::Acquired { waited, token, permit } => {
                observer.acquired(&Acquired { key, is_guard, waited, token, is_shared, permit });
            }
            Told::Released { held } => observer.released(&Released { key, is_guard, held }),
            Told::Lost { held, reason } => observer.lost(&TermLost { key, is_guard, held, reason }),
            Told::Trouble(ref error) => observer.trouble(&Trouble { key, is_guard, error }),
            Told::Heartbeat { round_trip } => observer.heartbeat(&Heartbeat { key, is_guard, round_trip }),
        });
    }
}

#[cfg(test)]
mod tests {
    use std::panic::panic_any;

    use super::*;

    #[test]
    fn what_was_thrown_may_panic_when_it_is_dropped() {
        struct Twice;
        impl Drop for Twice {
            fn drop(&mut self) {
                panic!("as it is meant to");
            }
        }
        assert!(panics(|| panic_any(Twice)));
        assert!(!panics(|| ()));
    }
}
