//! What a thread of the application does that wants the lock of a claim, or gives it back.

use std::sync::{Arc, Weak};
use std::time::Instant;

use crossbeam_channel::{at, never, select};

use crate::context::{Context, OnCancel};
use crate::error::{Error, ErrorKind, Result};
use crate::pg::carrier::seat::Seat;
use crate::pg::claim::claim::{Claim, Patience, Progress};
use crate::pg::claim::engine::CallKind;
use crate::pg::claim::interrupt::LeaveRequest;
use crate::pg::claim::status::EndReason;
use crate::pg::claim::supervisor::Supervisor;
use crate::process::{Origin, may_drive};

/// A claim, and who works on it.
#[derive(Clone, Debug)]
pub(crate) struct ActiveClaim {
    pub(crate) claim: Arc<Claim>,
    pub(crate) worker: Worker,
}

/// Who works on a claim, beside the threads that call.
#[derive(Clone, Debug)]
pub(crate) enum Worker {
    /// On a session of its own.
    Supervisor(Arc<Supervisor>),
    /// On one that carries many claims; or a supervisor, if it has moved.
    Seat(Arc<Seat>),
}

impl Worker {
    /// The supervisor, if there is one.
    pub(crate) fn supervisor(&self) -> Option<&Arc<Supervisor>> {
        match self {
            Self::Supervisor(supervisor) => Some(supervisor),
            Self::Seat(seat) => seat.supervisor(),
        }
    }

    /// Makes it look at the claim.
    fn wake(&self) {
        match self {
            Self::Supervisor(supervisor) => supervisor.wake(),
            Self::Seat(seat) => seat.wake(),
        }
    }

    /// Runs the engine of the claim as far as this thread may; `false` if it did nothing.
    fn run_engine(&self, claim: &Claim, caller: CallKind, leave: Option<&Arc<LeaveRequest>>) -> bool {
        match (self, self.supervisor()) {
            (_, Some(supervisor)) => may_drive() && supervisor.run_engine(claim, caller, leave),
            (Self::Seat(seat), None) => {
                // Here, so that an application that takes its time is in nobody else's way. A slow valuer must not outlast a caller's patience.
                let annotates = match caller {
                    CallKind::Acquire { until: None, is_cancellable: false, .. } => true,
                    CallKind::Acquire { .. } => seat.spec().annotates_fast(),
                    CallKind::Release => false,
                };
                if annotates && seat.mark_asked() {
                    seat.annotate();
                }
                seat.carrier().run_engine(seat, caller)
            }
            (Self::Supervisor(_), None) => false,
        }
    }
}

impl ActiveClaim {
    /// Blocks until the lock is held, or it is known that it will not be, as [`Lock`](crate::Lock) says.
    ///
    /// A change of threads takes longer than a statement. So this thread runs the engine itself where it may, and waits for the
    /// claim to change where it may not.
    pub(crate) fn lock(&self, patience: Patience, context: &Context) -> Result<()> {
        let Self { claim, worker } = self;
        let begun = Instant::now();
        // An attempt that failed before this call does not count.
        let failures = claim.failures();
        if patience == Patience::TryOnce && !claim.is_for_one_term() {
            claim.hurry();
            worker.wake();
        }
        let caller = may_drive().then(|| CallKind::Acquire {
            until: context.expires_at(),
            waits: patience == Patience::Lock,
            is_cancellable: context.can_be_cancelled(),
        });
        let leave = caller.and_then(|_| self.leave_request(context));
        let asking = (patience != Patience::Lock).then(|| claim.register_try_caller());
        // At first nobody else is likely to be at work, so there is no change to wait for.
        let mut subscribe = false;
        loop {
            let changed = match claim.progress(patience, failures, subscribe)? {
                Progress::Held => {
                    self.tell_and_wait();
                    return Ok(());
                }
                Progress::GaveUp => return Err(claim.gave_up(ErrorKind::TimedOut, begun)),
                Progress::Pending(changed) => changed,
            };
            if let Some(caller) = caller
                && worker.run_engine(claim, caller, leave.as_ref())
            {
                continue;
            }
            let Some(changed) = changed else {
                if caller.is_none() {
                    worker.wake();
                }
                // Before the next try to run the engine, so that a change after that try is not missed.
                subscribe = true;
                continue;
            };
            if asking.is_some() && claim.try_caller_needs_answer() {
                worker.wake();
            }
            select! {
                recv(changed) -> _ => {}
                recv(context.cancelled()) -> _ => return Err(claim.gave_up(ErrorKind::Cancelled, begun)),
                recv(context.expires_at().map_or_else(never, at)) -> _ => {
                    let error = claim.gave_up(ErrorKind::TimedOut, begun);
                    // The time of a single attempt is the server's, and not one that the caller has set.
                    let silence = if patience == Patience::TryOnce { claim.silence() } else { None };
                    return Err(silence.into_iter().fold(error, Error::with_source));
                }
            }
        }
    }

    /// Ends the claim, and blocks until the lock has been given back, by `by` at the latest.
    pub(crate) fn release(&self, by: Instant) -> Result<()> {
        // The lost channel closes here, before the server is told.
        let begins = self.claim.end(EndReason::Released, by);
        // A guard's claim may have ended with its term, which nobody has told the thread that runs the engine.
        if begins || self.claim.is_for_one_term() && !self.claim.is_over() {
            self.give_back(by);
        }
        let outcome = self.claim.wait_ended(by);
        self.tell_and_wait();
        outcome
    }

    /// Sees to it that the observer has been told of the claim before others may have something to tell of the lock. A carrier's thread has that done by
    /// another one.
    fn tell_and_wait(&self) {
        if let Worker::Seat(_) = self.worker {
            self.claim.tell_and_wait();
        }
    }

    /// Gives the lock of an ended claim back, or makes the thread that runs the engine do so.
    pub(crate) fn give_back(&self, by: Instant) {
        let done = self.worker.run_engine(&self.claim, CallKind::Release, None);
        if !done {
            self.worker.wake();
            self.claim.interrupt(by);
        }
    }

    /// Leaves the claim to its supervisor: the caller's context had ended when the call began.
    pub(crate) fn left(&self, kind: ErrorKind) -> Error {
        self.worker.wake();
        self.claim.gave_up(kind, Instant::now())
    }

    /// What wakes the supervisor if `context` is cancelled while this thread runs the engine.
    fn leave_request(&self, context: &Context) -> Option<Arc<LeaveRequest>> {
        context.can_be_cancelled().then(|| {
            let (worker, origin) = (self.worker.clone(), Origin::here());
            let request = LeaveRequest::new(move || {
                // In a forked child the bell is the parent's.
                if origin.is_here() {
                    worker.wake();
                }
            });
            context.on_cancel(Arc::downgrade(&request) as Weak<dyn OnCancel>);
            request
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::clock::Moment;
    use crate::clock::tests::pretend_suspend;
    use crate::expiry::Expiry;
    use crate::loss::LossReason;
    use crate::mode::Mode;
    use crate::pg::claim::status::Span;

    #[test]
    fn a_term_whose_time_is_over_is_lost_and_not_released() {
        let at_most = Duration::from_secs(2);
        for span in [Span::UntilReleased, Span::OneTerm { waits: true, has_others: false, at_most }] {
            let claim = Claim::new("k".to_owned(), Mode::Exclusive, at_most, span, None, None);
            assert!(claim.announce_acquired(Arc::new(Expiry::new(Moment::now())), None, None));
            // As in a process that was frozen, whose watchdog has not looked yet.
            let begins = claim.end(EndReason::Released, Instant::now() + at_most);
            assert_eq!(begins, span == Span::UntilReleased);
            assert_eq!(claim.last_loss().map(|loss| loss.reason), Some(LossReason::LeaseNotRenewed));
            assert!(claim.is_ending());
        }
    }

    #[test]
    fn a_term_goes_on_while_the_machine_is_suspended_and_is_over_when_it_wakes_up() {
        const TERM: Duration = Duration::from_secs(600);
        let ends = || Moment::now().checked_add(TERM).unwrap();
        for (watchdog_is_first, is_asked) in [(false, false), (true, false), (true, true)] {
            let claim = Claim::new("k".to_owned(), Mode::Exclusive, TERM, Span::UntilReleased, None, None);
            assert!(
                claim.announce_acquired(Arc::new(Expiry::new(ends())), None, None)
                    && claim.announce_renewed(ends())
            );
            let (lost, term) = (claim.lost(), claim.term(|_| None).unwrap());
            pretend_suspend(TERM / 2);
            let due = claim.deadline().unwrap().saturating_duration_since(Instant::now());
            assert!(term.is_held() && due <= TERM / 2 && due > TERM / 4, "{due:?}");
            pretend_suspend(TERM / 2);
            // Whoever asks sees the end, and tells no channel of it.
            assert!(!is_asked || !term.is_held() && !lost.is_lost());
            let due = claim.deadline().unwrap();
            assert!(due <= Instant::now(), "the watchdog has something to enforce");
            assert_eq!(claim.deadline(), Some(due), "and is not busy with it");
            if watchdog_is_first {
                claim.enforce_deadline();
                assert!(lost.is_lost() && claim.deadline().is_none());
            }
            assert!(!term.is_held() && claim.term(|_| None).is_none() && lost.is_lost());
            assert!(!claim.announce_renewed(ends()), "nothing brings it back");
            assert_eq!(claim.last_loss().map(|loss| loss.reason), Some(LossReason::LeaseNotRenewed));
        }
    }
}
