//! Who runs the engine of a claim: one thread at a time, and nobody waits for the turn of another.

use std::time::{Duration, Instant};

use crate::pg::claim::alarm::{Alarm, Bell, Woken};
use crate::sync::{AtomicBool, Mutex, MutexGuard, Ordering::SeqCst};

/// What the thread that runs the engine has to itself, and how the thread that works for its callers gets it next: a supervisor, or
/// a carrier's, which is meant as well below.
///
/// The mutex is only ever tried. A caller that is turned away says so and wakes the supervisor, which does the caller's work.
/// If the supervisor is turned away too, whoever has the turn wakes it once more, until it has had a turn. A supervisor that
/// comes because its time has come does not ask for a turn: a busy caller would wake it at the end of each of its own turns.
#[derive(Debug)]
pub(crate) struct Turns<T, B: Bell> {
    state: Mutex<T>,
    /// A caller was turned away, and the supervisor has not had a turn since.
    is_wanted: AtomicBool,
    alarm: Alarm<B>,
}

impl<T, B: Bell> Turns<T, B> {
    pub(crate) fn new(state: T, bell: B) -> Self {
        Self { state: Mutex::new(state), is_wanted: AtomicBool::new(false), alarm: Alarm::new(bell) }
    }

    // What callers do.

    /// The turn, if nobody has it. Else the supervisor is woken, which may have it and be about to sleep without a look
    /// at what the caller wants.
    pub(crate) fn take(&self) -> Option<MutexGuard<'_, T>> {
        self.state.try_lock().or_else(|| {
            self.is_wanted.swap(true, SeqCst);
            // Whoever had it may have left before it could know.
            let turn = self.state.try_lock();
            if turn.is_none() {
                self.wake();
            }
            turn
        })
    }

    /// Ends a caller's turn. If there is something for the supervisor to see, it is to look at `look_by`, and to watch
    /// `socket` until then, as [`Alarm::attends`] says.
    pub(crate) fn leave(
        &self,
        turn: MutexGuard<'_, T>,
        look_by: Option<Instant>,
        socket: Option<&B::Socket>,
        soon: Duration,
    ) {
        drop(turn);
        // Both sides change the flag, or seem to, so that one comes first: either this one reads what the caller wrote, or the
        // caller's second try, or the supervisor's that it wakes, finds the turn ended. A load here might miss the one.
        let is_wanted = self.is_wanted.fetch_or(false, SeqCst);
        if is_wanted || look_by.is_some_and(|by| !self.alarm.attends(by, socket, soon)) {
            self.wake();
        }
    }

    /// Makes the supervisor look.
    pub(crate) fn wake(&self) {
        self.alarm.wake();
    }

    // What the supervisor does.

    /// The supervisor's turn, if no caller has it.
    pub(crate) fn take_to_look(&self) -> Option<MutexGuard<'_, T>> {
        let turn = self.state.try_lock()?;
        // By a swap: what a caller left before it was turned away is seen in this turn.
        self.is_wanted.swap(false, SeqCst);
        Some(turn)
    }

    /// As [`Alarm::sleep`].
    pub(crate) fn sleep(&self, until: Instant, watch: Option<&B::Socket>) -> Woken {
        self.alarm.sleep(until, watch)
    }
}
