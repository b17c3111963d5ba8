//! What a thread of the application does that wants the lock of a claim, or gives it back.

use std::sync::{Arc, Weak};
use std::time::Instant;

use crossbeam_channel::{at, never, select};

use crate::context::{Context, OnCancel};
use crate::error::{Error, ErrorKind, Result};
use crate::pg::claim::engine::Caller;
use crate::pg::claim::shared::{Claim, EndReason, LeaveRequest, Patience, Progress};
use crate::pg::claim::supervisor::Supervisor;
use crate::process::{Origin, may_drive};

/// A claim, and its supervisor.
#[derive(Clone, Debug)]
pub(crate) struct ActiveClaim {
    pub(crate) claim: Arc<Claim>,
    pub(crate) supervisor: Arc<Supervisor>,
}

impl ActiveClaim {
    /// Blocks until the lock is held, or it is known that it will not be, as [`Lock`](crate::Lock) says.
    ///
    /// A change of threads takes longer than a statement. So this thread runs the engine itself where it may, and waits for the
    /// claim to change where it may not.
    pub(crate) fn lock(&self, patience: Patience, context: &Context) -> Result<()> {
        let Self { claim, supervisor } = self;
        let begun = Instant::now();
        // An attempt that failed before this call does not count.
        let failures = claim.failures();
        if patience == Patience::TryOnce && !claim.is_for_one_term() {
            claim.hurry();
            supervisor.wake();
        }
        let caller = may_drive().then(|| Caller::Acquires {
            until: context.expires_at(),
            waits: patience == Patience::Lock,
            is_cancellable: context.can_be_cancelled(),
        });
        let leave = caller.and_then(|_| self.leave_request(context));
        let asking = (patience != Patience::Lock).then(|| claim.ask());
        // At first nobody else is likely to be at work, so there is no change to wait for.
        let mut subscribe = false;
        loop {
            let changed = match claim.progress(patience, failures, subscribe)? {
                Progress::Held => return Ok(()),
                Progress::GaveUp => return Err(claim.gave_up(ErrorKind::TimedOut, begun)),
                Progress::Pending(changed) => changed,
            };
            if let Some(caller) = caller
                && supervisor.run_engine(claim, caller, leave.as_ref())
            {
                continue;
            }
            let Some(changed) = changed else {
                if caller.is_none() {
                    supervisor.wake();
                }
                // Before the next try to run the engine, so that a change after that try is not missed.
                subscribe = true;
                continue;
            };
            if asking.is_some() && claim.is_asked() {
                supervisor.wake();
            }
            select! {
                recv(changed) -> _ => {}
                recv(context.cancelled()) -> _ => return Err(claim.gave_up(ErrorKind::Cancelled, begun)),
                recv(context.expires_at().map_or_else(never, at)) -> _ => {
                    return Err(claim.gave_up(ErrorKind::TimedOut, begun));
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
        self.claim.wait_ended(by)
    }

    /// Gives the lock of an ended claim back, or makes the thread that runs the engine do so.
    pub(crate) fn give_back(&self, by: Instant) {
        let done = may_drive() && self.supervisor.run_engine(&self.claim, Caller::Releases, None);
        if !done {
            self.supervisor.wake();
            self.claim.interrupt(by);
        }
    }

    /// Leaves the claim to its supervisor: the caller's context had ended when the call began.
    pub(crate) fn left(&self, kind: ErrorKind) -> Error {
        self.supervisor.wake();
        self.claim.gave_up(kind, Instant::now())
    }

    /// What wakes the supervisor if `context` is cancelled while this thread runs the engine.
    fn leave_request(&self, context: &Context) -> Option<Arc<LeaveRequest>> {
        context.can_be_cancelled().then(|| {
            let (supervisor, origin) = (Arc::clone(&self.supervisor), Origin::here());
            let request = LeaveRequest::new(move || {
                // In a forked child the bell is the parent's.
                if origin.is_here() {
                    supervisor.wake();
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
    use crate::loss::LossReason;
    use crate::pg::claim::shared::Span;

    #[test]
    fn a_term_whose_time_is_over_is_lost_and_not_released() {
        let at_most = Duration::from_secs(2);
        for span in [Span::UntilReleased, Span::OneTerm { waits: true, has_others: false, at_most }] {
            let claim = Claim::new("k".to_owned(), at_most, span, None, None);
            assert!(claim.announce_acquired(Instant::now(), None));
            // As in a process that was frozen, whose watchdog has not looked yet.
            let begins = claim.end(EndReason::Released, Instant::now() + at_most);
            assert_eq!(begins, span == Span::UntilReleased);
            assert_eq!(claim.last_loss().map(|loss| loss.reason), Some(LossReason::LeaseNotRenewed));
            assert!(claim.is_ending());
        }
    }
}
