//! What the threads of a leader share.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use crossbeam_channel::Receiver;
use parking_lot::Mutex;

use super::{LeaderStatus, Tenure};
use crate::context::{Canceller, Context};
use crate::error::Error;
use crate::guard::LockGuard;
use crate::lock::Lock;
use crate::loss::{Loss, Signal};
use crate::view::Holder;

pub(super) struct Shared {
    pub(super) lock: Arc<dyn Lock>,
    /// Ends when the leader is stopped.
    pub(super) stop: Context,
    canceller: Canceller,
    /// No application code and no destructor of a guard runs under it. It comes before the mutexes of the lock.
    state: Mutex<State>,
}

struct State {
    phase: Phase,
    terms: u64,
    last_loss: Option<Loss>,
    last_panic: Option<String>,
    last_error: Option<Error>,
    leader: Option<Holder>,
    /// Of the present term, or the last one.
    token: Option<i64>,
}

/// ```text
///            acquired             the closure returns
/// Standing ----------> Leading -----------------------> GivingBack
///    ^                                                       |
///    +-------------------------------------------------------+     each -> Ended
/// ```
enum Phase {
    /// Waits for the lock, or lets time pass before that.
    Standing,
    /// From the moment before the closure begins to the moment after it has returned; also after a loss.
    Leading(Box<CurrentTerm>),
    GivingBack,
    Ended,
}

/// What belongs to one term.
struct CurrentTerm {
    guard: LockGuard,
    since: SystemTime,
    began: Instant,
    /// Tells the closure to stop.
    signal: Arc<Signal>,
    stop: Option<StopReason>,
    /// The loss has been told of, or another thread is about to.
    loss_told: bool,
}

/// Why a closure is told to stop whose term is not lost. `Stop` outranks `StepDown`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum StopReason {
    StepDown,
    Stop,
}

/// A term whose closure has returned.
pub(super) struct Left {
    pub(super) guard: LockGuard,
    pub(super) stop: Option<StopReason>,
    pub(super) lasted: Duration,
    /// It was told that the term is lost.
    pub(super) loss_told: bool,
}

impl Shared {
    pub(super) fn new(lock: Arc<dyn Lock>) -> Arc<Self> {
        let (stop, canceller) = Context::background().with_cancel();
        let state = State {
            phase: Phase::Standing,
            terms: 0,
            last_loss: None,
            last_panic: None,
            last_error: None,
            leader: None,
            token: None,
        };
        Arc::new(Self { lock, stop, canceller, state: Mutex::new(state) })
    }

    /// Begins a term; gives its guard back if the leader was stopped meanwhile, or the term is over.
    pub(super) fn begin(&self, guard: LockGuard) -> Result<Tenure, Box<LockGuard>> {
        let (signal, stopping) = Signal::new();
        guard.lost().raises(&signal);
        let tenure = Tenure { term: guard.term().clone(), stopping: stopping.channel().clone() };
        let mut state = self.state.lock();
        state.token = tenure.term.token();
        // Whoever stops it does so before a look at the phase.
        if self.is_stopping() || tenure.must_stop() {
            drop(state);
            return Err(Box::new(guard));
        }
        state.terms += 1;
        state.leader = None;
        state.phase = Phase::Leading(Box::new(CurrentTerm {
            guard,
            since: SystemTime::now(),
            began: Instant::now(),
            signal,
            stop: None,
            loss_told: false,
        }));
        Ok(tenure)
    }

    /// The closure has returned.
    pub(super) fn leave(&self) -> Option<Left> {
        let phase = std::mem::replace(&mut self.state.lock().phase, Phase::GivingBack);
        let Phase::Leading(term) = phase else { return None };
        let CurrentTerm { guard, began, stop, loss_told, .. } = *term;
        Some(Left { guard, stop, lasted: began.elapsed(), loss_told })
    }

    /// The lock was given back.
    pub(super) fn stand_again(&self) {
        self.state.lock().phase = Phase::Standing;
    }

    /// Nothing will come any more.
    pub(super) fn end(&self) {
        let phase = std::mem::replace(&mut self.state.lock().phase, Phase::Ended);
        // It has a guard only after a panic of ours.
        drop(phase);
    }

    /// The loss of the term whose lost channel this is, for whoever is to tell of it: once, and not if another term has begun since.
    pub(super) fn loss_to_tell(&self, lost: &Receiver<Infallible>) -> Option<Loss> {
        let mut state = self.state.lock();
        let Phase::Leading(term) = &mut state.phase else { return None };
        if term.loss_told || !term.guard.term().lost().channel().same_channel(lost) {
            return None;
        }
        let loss = term.guard.loss()?;
        term.loss_told = true;
        state.last_loss = Some(loss.clone());
        Some(loss)
    }

    pub(super) fn stop(&self) {
        self.canceller.cancel();
        self.end_term(StopReason::Stop);
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.stop.check().is_err()
    }

    /// Tells the closure to stop; `false` if this process does not lead.
    pub(super) fn end_term(&self, reason: StopReason) -> bool {
        self.end_term_if(reason, |_| true)
    }

    /// As [`end_term`](Self::end_term), if the term is still the one with this token.
    pub(super) fn resign(&self, token: i64) -> bool {
        self.end_term_if(StopReason::StepDown, |guard| guard.term().token() == Some(token))
    }

    fn end_term_if(&self, reason: StopReason, is_meant: impl FnOnce(&LockGuard) -> bool) -> bool {
        let mut state = self.state.lock();
        let Phase::Leading(term) = &mut state.phase else { return false };
        if !is_meant(&term.guard) || !term.guard.is_held() {
            return false;
        }
        term.stop = term.stop.max(Some(reason));
        term.signal.raise();
        true
    }

    pub(super) fn duty(&self) -> Duty {
        match &self.state.lock().phase {
            Phase::Standing => Duty::Standing,
            Phase::Leading(term) if term.stop.is_none() => Duty::Leading { token: term.guard.term().token() },
            Phase::Leading(_) | Phase::GivingBack | Phase::Ended => Duty::Neither,
        }
    }

    pub(super) fn note_loss(&self, loss: &Loss) {
        self.state.lock().last_loss = Some(loss.clone());
    }

    pub(super) fn note_panic(&self, message: &str) {
        self.state.lock().last_panic = Some(message.to_owned());
    }

    pub(super) fn note_error(&self, error: &Error) {
        let former = self.state.lock().last_error.replace(error.clone());
        drop(former);
    }

    /// True if this leader's own last term is meant: the server still has its session where the lock could not be given back.
    pub(super) fn was_led_by(&self, holder: &Holder) -> bool {
        holder.token.is_some() && holder.token == self.state.lock().token
    }

    /// Remembers who leads; `false` if this process has begun to lead meanwhile.
    pub(super) fn note_leader(&self, leader: Option<Holder>) -> bool {
        let mut state = self.state.lock();
        let stands = matches!(state.phase, Phase::Standing);
        if stands {
            state.leader = leader;
        }
        stands
    }

    pub(super) fn status(&self) -> LeaderStatus {
        // Why it does not come to lead, which nobody is told while it waits for the lock.
        let trouble = self.lock.trouble();
        let state = self.state.lock();
        let mut status = LeaderStatus {
            stands: !matches!(state.phase, Phase::Ended) && !self.is_stopping(),
            terms: state.terms,
            last_loss: state.last_loss.clone(),
            last_panic: state.last_panic.clone(),
            last_error: trouble.or_else(|| state.last_error.clone()),
            leader: state.leader.clone(),
            ..LeaderStatus::default()
        };
        if let Phase::Leading(term) = &state.phase {
            status.at_work = true;
            status.leads = term.guard.is_held();
            if status.leads {
                status.token = term.guard.term().token();
                status.since = Some(term.since);
            } else {
                status.last_loss = term.guard.loss().or(status.last_loss);
            }
        }
        status
    }
}

/// What the watcher has to look at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Duty {
    /// Who leads.
    Standing,
    /// Whether this process is to resign.
    Leading {
        token: Option<i64>,
    },
    Neither,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manager::SyncManager;
    use crate::memory::MemoryManager;

    #[test]
    fn a_resignation_is_for_one_term_and_a_stop_is_more_than_a_step_down() {
        let manager = MemoryManager::new();
        manager.start().unwrap();
        let shared = Shared::new(manager.lock("x").unwrap());
        let guard = || shared.lock.acquire(Duration::ZERO).unwrap();
        let tenure = shared.begin(guard()).unwrap();
        let token = tenure.term().token().unwrap();
        assert_eq!(shared.duty(), Duty::Leading { token: Some(token) });
        assert!(!shared.resign(token - 1) && !tenure.must_stop());
        assert!(shared.resign(token) && tenure.must_stop());
        assert_eq!(shared.duty(), Duty::Neither);
        shared.stop();
        shared.end_term(StopReason::StepDown);
        let left = shared.leave().unwrap();
        assert_eq!(left.stop, Some(StopReason::Stop));
        left.guard.release().unwrap();
        assert!(shared.begin(guard()).is_err(), "it was stopped");
    }
}
