//! The thread that stands for the lock, and runs the closure while it has it.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{RecvTimeoutError, Sender};

use super::back_off::BackOff;
use super::shared::{Left, Shared, StopReason};
use super::teller::Told;
use super::{LeaderEvent, Tenure};
use crate::error::{Error, ErrorKind, Result, chain};
use crate::guard::LockGuard;
use crate::loss::Lost;
use crate::telling::{discard, panics};

pub(super) struct Runner {
    pub(super) shared: Arc<Shared>,
    pub(super) work: Box<dyn FnMut(&Tenure) + Send>,
    pub(super) tell: Option<Sender<Told>>,
    /// Makes the watcher look what there is to do. Holds one call: more of them say no more.
    pub(super) changed: Sender<()>,
    pub(super) back_off: BackOff,
    pub(super) stand_back: Duration,
}

/// Says that nothing will come any more, also after a panic.
struct Ending(Arc<Shared>);

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.end();
    }
}

impl Runner {
    pub(super) fn run(mut self) {
        let ending = Ending(Arc::clone(&self.shared));
        if let Err(error) = self.stand_and_lead() {
            self.fail(error);
        }
        drop(ending);
        self.emit(LeaderEvent::Stopped);
        // It is an application's, and so is its destructor.
        let work = self.work;
        panics(|| drop(work));
    }

    /// Leads again and again, until the leader is stopped; fails if the manager is.
    fn stand_and_lead(&mut self) -> Result<()> {
        while !self.shared.is_stopping() {
            self.shared.stand_again();
            self.look_again();
            let pause = match self.shared.lock.acquire(&self.shared.stop) {
                Ok(guard) => self.lead(guard),
                Err(error) => match error.kind() {
                    ErrorKind::Cancelled => break,
                    ErrorKind::SyncManagerStopped | ErrorKind::OtherProcess => return Err(error),
                    _ => {
                        self.fail(error);
                        self.back_off.pause(Duration::ZERO)
                    }
                },
            };
            self.pause(pause)?;
        }
        Ok(())
    }

    /// Runs the closure for one term, and gives the lock back; how long to pause before the next one.
    fn lead(&mut self, guard: LockGuard) -> Duration {
        let tenure = match self.shared.begin(guard) {
            Ok(tenure) => tenure,
            Err(guard) => {
                let (_, loss) = guard.end();
                loss.iter().for_each(|loss| self.shared.note_loss(loss));
                return Duration::ZERO;
            }
        };
        let gained = LeaderEvent::Gained { token: tenure.term().token() };
        self.emit_with(gained, Some(tenure.term().lost().clone()));
        self.look_again();
        let outcome = catch_unwind(AssertUnwindSafe(|| (self.work)(&tenure))).map_err(message_of);
        let Some(Left { guard, stop, lasted, loss_told }) = self.shared.leave() else {
            return Duration::ZERO;
        };
        self.look_again();
        let (released, loss) = guard.end();
        if let Some(loss) = loss.filter(|_| !loss_told) {
            self.shared.note_loss(&loss);
            self.emit(LeaderEvent::Lost(loss));
        }
        let panicked = outcome.is_err();
        if let Err(message) = outcome {
            self.shared.note_panic(&message);
            self.emit(LeaderEvent::Panicked(message));
        }
        let was_lost = released.as_ref().is_err_and(|error| error.kind() == ErrorKind::Lost);
        match stop {
            _ if was_lost => {}
            None if !panicked => self.emit(LeaderEvent::Returned),
            Some(StopReason::StepDown) => self.emit(LeaderEvent::SteppedDown),
            None | Some(StopReason::Stop) => {}
        }
        if let Err(error) = released
            && !was_lost
        {
            self.fail(error);
        }
        if panicked {
            return self.back_off.pause(lasted).max(if stop.is_some() {
                self.stand_back
            } else {
                Duration::ZERO
            });
        }
        self.back_off.reset();
        // After a loss others had their chance.
        if was_lost && stop.is_none() { Duration::ZERO } else { self.stand_back }
    }

    /// Lets time pass, or less if the leader is stopped. Fails if the manager is.
    fn pause(&self, pause: Duration) -> Result<()> {
        /// How often to see whether the manager has stopped, of which nothing tells.
        const LOOKS_EVERY: Duration = Duration::from_millis(500);
        let (begun, stopped) = (Instant::now(), self.shared.stop.cancelled());
        loop {
            let left = pause.saturating_sub(begun.elapsed());
            if left.is_zero() || self.shared.is_stopping() {
                return Ok(());
            }
            if self.shared.lock.is_stopped() {
                return Err(Error::stopped());
            }
            if stopped.recv_timeout(left.min(LOOKS_EVERY)) == Err(RecvTimeoutError::Disconnected) {
                return Ok(());
            }
        }
    }

    fn look_again(&self) {
        // Full: it has been called and has not looked since. Closed: nobody looks.
        let _ = self.changed.try_send(());
    }

    fn fail(&self, error: Error) {
        self.shared.note_error(&error);
        self.emit(LeaderEvent::Error(error));
    }

    fn emit(&self, event: LeaderEvent) {
        self.emit_with(event, None);
    }

    fn emit_with(&self, event: LeaderEvent, begun: Option<Lost>) {
        let key = self.shared.lock.key();
        let (level, text) = match &event {
            LeaderEvent::Panicked(_) => (log::Level::Error, event.to_string()),
            LeaderEvent::Error(error) => (log::Level::Warn, chain(error)),
            _ => (log::Level::Info, event.to_string()),
        };
        // Before the line: a logger may block.
        if let Some(tell) = &self.tell {
            // Nobody is there any more to be told if it has panicked, which it does not.
            let _ = tell.send((event, begun));
        }
        match level {
            log::Level::Error => log::error!("leader of {key:?}: {text}"),
            log::Level::Warn => log::warn!("leader of {key:?}: {text}"),
            _ => log::info!("leader of {key:?}: {text}"),
        }
    }
}

/// The message of a panic. What carries it is dropped, and may panic in turn.
pub(super) fn message_of(panic: Box<dyn Any + Send>) -> String {
    let message = (panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "a panic without a text".to_owned());
    discard(panic);
    message
}
