//! What the thread that works on a claim says of it.

use std::sync::Arc;
use std::time::Instant;

use super::claim::Claim;
use super::status::{EndReason, Phase, Span, Status, Warning};
use crate::clock::Moment;
use crate::error::{Error, ErrorKind, Result};
use crate::expiry::Expiry;
use crate::loss::{Loss, LossReason, Lost};
use crate::pg::session::machine::Confirms;
use crate::sync::Ordering::SeqCst;

impl Claim {
    /// Another session holds the lock.
    pub(crate) fn announce_queueing(&self) {
        self.announce_obstacle(EndReason::Unavailable, Phase::Queueing { takes_turns: false });
    }

    /// Another session holds the lock, and there is no session by which to queue for it: the claim asks again and again.
    pub(crate) fn announce_taking_turns(&self) {
        let mut status = self.status.lock();
        if let Phase::Queueing { takes_turns } = &mut status.phase {
            *takes_turns = true;
        }
    }

    /// Another one works on the claim now.
    pub(crate) fn announce_moved(&self) {
        self.status.lock().notify();
    }

    /// The server was taken over, and nobody is granted a lock before `ends`, or before another process has waited for that long.
    pub(crate) fn announce_in_grace(&self, ends: Instant) {
        self.announce_obstacle(EndReason::InGrace { ends }, Phase::InGrace { ends });
    }

    /// The lock cannot be had now: the claim ends for `reason` if it does not wait, and is in `waiting` if it does.
    fn announce_obstacle(&self, reason: EndReason, waiting: Phase) {
        let mut status = self.status.lock();
        if status.is_open() {
            status.phase = match self.span {
                Span::OneTerm { waits: false, at_most, .. } => {
                    Phase::Ending { reason, by: Instant::now() + at_most }
                }
                _ => waiting,
            };
            let former = status.problem.take();
            status.notify();
            drop(status);
            drop(former);
        }
    }

    /// The lock is held until `until`, which may be moved on; `false` if its session was killed meanwhile.
    pub(crate) fn announce_acquired(
        &self,
        until: Arc<Expiry>,
        token: Option<i64>,
        permit: Option<u32>,
    ) -> bool {
        let mut status = self.status.lock();
        if status.is_open() {
            if status.session_killed {
                return false;
            }
            let (term, lost) = Lost::pair();
            let warning = Warning::new(self.warn_before.is_some());
            status.phase = Phase::Held { until, _term: term, warning };
            let former = status.problem.take();
            status.unconfirmed = Confirms::Nothing;
            status.lost = lost;
            (status.token, status.permit) = (token, permit);
            if let Some(story) = &self.story {
                story.acquired(token, permit);
            }
            status.notify();
            drop(status);
            drop(former);
        }
        // If the claim has ended, the engine sees the release at its next step.
        true
    }

    /// The term goes on until `until` at least; `false` if it has ended here meanwhile.
    pub(crate) fn announce_renewed(&self, until: Moment) -> bool {
        let mut status = self.status.lock();
        match &status.phase {
            Phase::Held { until: expiry, .. } if !expiry.has_passed() && expiry.move_to(until) => true,
            Phase::Held { .. } => {
                let reason = status.why_over();
                self.lose(&mut status, reason);
                false
            }
            // The engine sees the release at its next step.
            Phase::Ending { .. } => true,
            _ => false,
        }
    }

    /// The term ends. For one term, the claim does.
    pub(super) fn lose(&self, status: &mut Status, reason: LossReason) {
        status.phase = match self.span {
            Span::UntilReleased => Phase::Acquiring,
            Span::OneTerm { at_most, .. } => {
                Phase::Ending { reason: EndReason::Lost, by: Instant::now() + at_most }
            }
        };
        status.last_loss = Some(Loss::now(reason));
        if let Some(story) = &self.story {
            story.lost(reason);
        }
        status.notify();
    }

    /// What is still to be confirmed of what the server has answered.
    pub(crate) fn announce_unconfirmed(&self, unconfirmed: Confirms) {
        self.status.lock().unconfirmed = unconfirmed;
    }

    /// The term is over, if there is one.
    pub(crate) fn announce_lost(&self, reason: LossReason) {
        let mut status = self.status.lock();
        if matches!(status.phase, Phase::Held { .. }) {
            self.lose(&mut status, reason);
        }
    }

    /// Until when the server may hold something for a session of this claim that was lost.
    pub(crate) fn announce_uncertainty(&self, until: Option<Moment>) {
        self.status.lock().uncertain_until = until;
    }

    /// Until when the server may hold something for a session of this claim that was lost.
    pub(crate) fn uncertain_until(&self) -> Option<Moment> {
        self.status.lock().uncertain_until
    }

    /// The server may not have noticed the loss of the session that this backend serves.
    pub(crate) fn note_lost_backend(&self, pid: i32) {
        let lost = &mut self.status.lock().lost_backends;
        lost.retain(|(since, _)| since.elapsed() <= self.uncertainty_window);
        lost.push((Moment::now(), pid));
    }

    /// The backends of its sessions whose loss the server may not have noticed yet.
    pub(crate) fn lost_backends(&self) -> Vec<i32> {
        self.status.lock().lost_backends.iter().map(|(_, pid)| *pid).collect()
    }

    /// None of them has anything of the claim's any more.
    pub(crate) fn forget_lost_backends(&self) {
        self.status.lock().lost_backends.clear();
    }

    /// An attempt failed.
    pub(crate) fn announce_problem(&self, problem: Option<Error>) {
        let was_killed = self.attempt_was_killed.swap(false, SeqCst);
        let mut status = self.status.lock();
        if status.is_open() {
            status.phase = Phase::Acquiring;
            let mut former = None;
            if !was_killed {
                if let (Some(story), Some(problem)) = (&self.story, &problem) {
                    story.trouble(problem.clone());
                }
                former = std::mem::replace(&mut status.problem, problem);
                status.failed_attempts += 1;
            }
            status.notify();
            drop(status);
            drop(former);
        }
    }

    /// The claim's supervisor has failed. Does nothing if the claim is over.
    pub(crate) fn abandon(&self) {
        if self.is_over() {
            return;
        }
        self.announce_lost(LossReason::SupervisorFailed);
        self.finish(Err(Error::new(ErrorKind::UnlockFailed, self.failure())));
    }

    /// The claim is over, with this outcome of its release. Only the first call has an effect.
    pub(crate) fn finish(&self, outcome: Result<()>) {
        let mut status = self.status.lock();
        let reason = match status.phase {
            Phase::Ended { .. } => return,
            Phase::Ending { reason, .. } => reason,
            _ => EndReason::Failed,
        };
        status.phase = Phase::Ended { reason, outcome };
        status.notify();
    }
}
