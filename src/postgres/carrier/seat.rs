//! The place of a claim on a carrier, and where it goes on if it has left that.

use std::fmt;
use std::io;
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;

use crate::pg::carrier::carrier::Carrier;
use crate::pg::carrier::dedicated::DedicatedPermit;
use crate::pg::claim::claim::Claim;
use crate::pg::claim::idle::IdleSupervisors;
use crate::pg::claim::spec::LockSpec;
use crate::pg::claim::supervisor::Supervisor;
use crate::sync::{AtomicBool, AtomicUsize, Ordering::SeqCst};

/// A claim whose lock is to be had on a session that others use, too.
pub(crate) struct Seat {
    claim: Arc<Claim>,
    spec: Arc<LockSpec>,
    carrier: Arc<Carrier>,
    /// Its number in the carrier's engine; [`NOWHERE`] before it was taken in, and when it has left.
    number: AtomicUsize,
    /// It is in the carrier's inbox.
    is_called: AtomicBool,
    /// The carrier is kept up for it.
    counts: AtomicBool,
    /// Of the term to come, if it has been made.
    annotation: Mutex<Annotation>,
    /// Who goes on with the claim.
    moved: OnceLock<Moved>,
}

#[derive(Debug)]
enum Annotation {
    /// The application has to be asked.
    Due,
    /// A thread asks it.
    Asked,
    Made(Option<Arc<[u8]>>),
}

struct Moved {
    supervisor: Arc<Supervisor>,
    _place: DedicatedPermit,
}

const NOWHERE: usize = usize::MAX;

impl Seat {
    /// A seat for a claim. The carrier is running when this returns.
    ///
    /// # Errors
    /// When the process has no thread left.
    pub(crate) fn new(
        claim: &Arc<Claim>,
        spec: &Arc<LockSpec>,
        carrier: &Arc<Carrier>,
    ) -> io::Result<Arc<Self>> {
        carrier.expect_one()?;
        claim.announce_carried();
        let annotation = if spec.valuer.is_some() { Annotation::Due } else { Annotation::Made(None) };
        Ok(Arc::new(Self {
            claim: Arc::clone(claim),
            spec: Arc::clone(spec),
            carrier: Arc::clone(carrier),
            number: AtomicUsize::new(NOWHERE),
            is_called: AtomicBool::new(false),
            counts: AtomicBool::new(true),
            annotation: Mutex::new(annotation),
            moved: OnceLock::new(),
        }))
    }

    pub(crate) fn claim(&self) -> &Arc<Claim> {
        &self.claim
    }

    pub(crate) fn spec(&self) -> &Arc<LockSpec> {
        &self.spec
    }

    pub(crate) fn carrier(&self) -> &Arc<Carrier> {
        &self.carrier
    }

    pub(crate) fn number(&self) -> Option<usize> {
        Some(self.number.load(SeqCst)).filter(|number| *number != NOWHERE)
    }

    /// The engine has taken it in, under this number; or it has left the engine.
    pub(crate) fn set_number(&self, number: Option<usize>) {
        self.number.store(number.unwrap_or(NOWHERE), SeqCst);
        if number.is_none() {
            self.leave();
        }
    }

    /// The carrier need not be kept up for it any more.
    fn leave(&self) {
        if self.counts.swap(false, SeqCst) {
            self.carrier.expect_one_less();
        }
    }

    /// True until it has left. Whoever finds that while it has the mutex of the inbox may put it in: the thread stays until it has taken it out.
    pub(crate) fn is_expected(&self) -> bool {
        self.counts.load(SeqCst)
    }

    /// Marks that it waits in the inbox; `false` if it did already.
    pub(crate) fn mark_called(&self) -> bool {
        !self.is_called.swap(true, SeqCst)
    }

    /// It has been taken out of the inbox.
    pub(crate) fn unmark_called(&self) {
        self.is_called.swap(false, SeqCst);
    }

    /// Marks that this thread is to have the annotation made; `false` if it has been, or another thread is at it.
    pub(crate) fn mark_asked(&self) -> bool {
        let mut annotation = self.annotation.lock();
        let is_due = matches!(*annotation, Annotation::Due);
        if is_due {
            *annotation = Annotation::Asked;
        }
        is_due
    }

    /// True while a thread has the annotation made.
    pub(crate) fn is_asked(&self) -> bool {
        matches!(*self.annotation.lock(), Annotation::Asked)
    }

    /// Makes the annotation of the term to come, which calls the application. To be called after [`mark_asked`](Self::mark_asked).
    pub(crate) fn annotate(&self) {
        let made = self.spec.annotation(self.claim.key()).map(Arc::from);
        *self.annotation.lock() = Annotation::Made(made);
    }

    /// The annotation of the term to come; `None` if it has to be made first.
    pub(crate) fn annotation(&self) -> Option<Option<Arc<[u8]>>> {
        match &*self.annotation.lock() {
            Annotation::Due | Annotation::Asked => None,
            Annotation::Made(annotation) => Some(annotation.clone()),
        }
    }

    /// A term has begun with that annotation, and the next one needs another.
    pub(crate) fn use_annotation(&self) {
        if self.spec.valuer.is_some() {
            *self.annotation.lock() = Annotation::Due;
        }
    }

    /// Lets a supervisor go on with the claim, on a session of its own.
    pub(crate) fn move_to(&self, place: DedicatedPermit, idle: &Arc<IdleSupervisors>) -> io::Result<()> {
        let supervisor = Supervisor::begin(&self.claim, &self.spec, idle)?;
        // One that was idle is asleep, and there may be no caller that runs its engine.
        supervisor.wake();
        let _ = self.moved.set(Moved { supervisor, _place: place });
        Ok(())
    }

    /// Who goes on with the claim, if it has moved.
    pub(crate) fn supervisor(&self) -> Option<&Arc<Supervisor>> {
        self.moved.get().map(|moved| &moved.supervisor)
    }

    /// Makes whoever works on the claim look at it.
    pub(crate) fn wake(self: &Arc<Self>) {
        match self.supervisor() {
            Some(supervisor) => supervisor.wake(),
            None => self.carrier.call(self),
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.leave();
    }
}

impl fmt::Debug for Seat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Seat")
            .field("claim", &self.claim)
            .field("has_moved", &self.moved.get().is_some())
            .finish()
    }
}
