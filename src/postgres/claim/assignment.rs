//! Which claim a supervisor serves.

use std::mem;
use std::sync::Arc;

use crate::pg::claim::claim::Claim;
use crate::pg::claim::spec::LockSpec;
use crate::sync::Mutex;

/// Which claim a supervisor serves. Handles assign claims to it, and the watchdog reads the deadline of the term from it.
#[derive(Debug)]
pub(crate) struct AssignmentCell(Mutex<Assignment>);

/// A claim, and the spec of its lock.
type NewClaim = (Arc<Claim>, Arc<LockSpec>);

#[derive(Debug)]
enum Assignment {
    /// No claim; the thread waits for one.
    Free,
    /// A claim without an engine yet.
    New(NewClaim),
    /// A claim with an engine.
    Serving(Arc<Claim>),
    /// The thread takes no more claims.
    Closed,
}

/// What a supervisor without an engine is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum IdleStep {
    /// A claim has just come in: look again.
    TakeUp,
    Wait,
    /// It was idle for long enough, and its assignment is closed now.
    Exit,
    /// It was told to exit.
    ExitNow,
}

impl AssignmentCell {
    pub(crate) fn new(claim: Arc<Claim>, spec: Arc<LockSpec>) -> Self {
        Self(Mutex::new(Assignment::New((claim, spec))))
    }

    /// Gives it another claim; `false` if it is not free for one.
    pub(crate) fn assign(&self, claim: &Arc<Claim>, spec: &Arc<LockSpec>) -> bool {
        let mut assignment = self.0.lock();
        let free = matches!(*assignment, Assignment::Free);
        if free {
            *assignment = Assignment::New((Arc::clone(claim), Arc::clone(spec)));
        }
        free
    }

    /// True if it takes another claim.
    pub(crate) fn is_free(&self) -> bool {
        matches!(*self.0.lock(), Assignment::Free)
    }

    /// Closes it if it is free; `true` if it was.
    pub(crate) fn close_if_free(&self) -> bool {
        let mut assignment = self.0.lock();
        let free = matches!(*assignment, Assignment::Free);
        if free {
            *assignment = Assignment::Closed;
        }
        free
    }

    /// Closes it; returns the claim that has no supervisor any more.
    pub(crate) fn close(&self) -> Option<Arc<Claim>> {
        let former = mem::replace(&mut *self.0.lock(), Assignment::Closed);
        match former {
            Assignment::New((claim, _)) | Assignment::Serving(claim) => Some(claim),
            Assignment::Free | Assignment::Closed => None,
        }
    }

    /// Takes the claim that has no engine yet, for the thread that begins one.
    pub(crate) fn take_up(&self) -> Option<NewClaim> {
        let mut assignment = self.0.lock();
        let Assignment::New(order) = &*assignment else { return None };
        let order = order.clone();
        *assignment = Assignment::Serving(Arc::clone(&order.0));
        Some(order)
    }

    /// Makes room for another claim.
    pub(crate) fn free(&self) {
        let mut assignment = self.0.lock();
        if matches!(*assignment, Assignment::Serving(_)) {
            *assignment = Assignment::Free;
        }
    }

    /// What a supervisor without an engine is to do; `lingered` if it was idle for long enough to exit.
    pub(crate) fn idle_step(&self, lingered: bool) -> IdleStep {
        let mut assignment = self.0.lock();
        match *assignment {
            Assignment::Free if lingered => {
                *assignment = Assignment::Closed;
                IdleStep::Exit
            }
            Assignment::Closed => IdleStep::ExitNow,
            Assignment::New(_) => IdleStep::TakeUp,
            Assignment::Free | Assignment::Serving(_) => IdleStep::Wait,
        }
    }

    pub(crate) fn claim(&self) -> Option<Arc<Claim>> {
        match &*self.0.lock() {
            Assignment::New((claim, _)) | Assignment::Serving(claim) => Some(Arc::clone(claim)),
            Assignment::Free | Assignment::Closed => None,
        }
    }
}
