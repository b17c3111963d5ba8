//! What the thread that works on a claim is using, and how other threads interrupt it.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::claim::Claim;
use super::status::Phase;
use crate::context::OnCancel;
use crate::pg::session::control::SessionControl;
use crate::pg::stream::StreamControl;
use crate::sync::{AtomicBool, AtomicUsize, Ordering::SeqCst};

/// What the thread that runs the engine is using, and so how it can be interrupted.
#[derive(Debug, Clone)]
pub(super) enum InFlight {
    /// No session, so there is nothing to interrupt.
    Nothing,
    /// A session that is being opened; nothing is held.
    Connecting(StreamControl),
    /// An open session.
    Session(Arc<SessionControl>),
    /// A session that other claims use, too, which is not to be ended for this one.
    Carrier,
}

/// A caller that runs the engine and can be cancelled.
#[derive(Debug)]
pub(super) struct Caller {
    request: Arc<LeaveRequest>,
    /// When the supervisor first told it to leave.
    told_at: Option<Instant>,
}

/// The cancellation of a caller's context, while that caller runs the engine.
pub(crate) struct LeaveRequest {
    requested: AtomicBool,
    /// Wakes the thread that makes the caller leave. Must not block.
    wake: Box<dyn Fn() + Send + Sync>,
}

impl LeaveRequest {
    pub(crate) fn new(wake: impl Fn() + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self { requested: AtomicBool::new(false), wake: Box::new(wake) })
    }

    /// True from when the context was cancelled.
    pub(crate) fn is_made(&self) -> bool {
        self.requested.load(SeqCst)
    }
}

impl OnCancel for LeaveRequest {
    fn cancelled(&self) {
        self.requested.store(true, SeqCst);
        (self.wake)();
    }
}

impl fmt::Debug for LeaveRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LeaveRequest").field("requested", &self.requested).finish_non_exhaustive()
    }
}

impl Claim {
    // By the thread that runs the engine.

    /// A session that obeys `control` is being opened; `false` if the claim has ended, so that it should not be.
    pub(crate) fn announce_connecting(&self, control: StreamControl) -> bool {
        self.attempt_was_killed.store(false, SeqCst);
        self.set_in_flight(InFlight::Connecting(control))
    }

    /// The engine uses the session of `control`; `false` if the claim has ended, so that it should not.
    pub(crate) fn announce_session(&self, control: Arc<SessionControl>) -> bool {
        self.set_in_flight(InFlight::Session(control))
    }

    /// There is no session.
    pub(crate) fn announce_no_session(&self) {
        self.set_in_flight(InFlight::Nothing);
        self.status.lock().session_killed = false;
    }

    /// The claim uses a session that others use, too.
    pub(crate) fn announce_carried(&self) {
        self.set_in_flight(InFlight::Carrier);
    }

    /// The two mutexes are taken one after the other, here and in [`end`](Self::end), so that one of the two sees what
    /// the other did.
    fn set_in_flight(&self, in_flight: InFlight) -> bool {
        *self.in_flight.lock() = in_flight;
        !self.is_ending()
    }

    /// A statement is about to wait for the lock without that the server was asked before; `false` if somebody wants to know.
    ///
    /// Whoever asks says so first, and looks for such a statement then: one of the two sees the other.
    pub(crate) fn begin_unasked_wait(&self) -> bool {
        self.waits_unasked.store(true, SeqCst);
        let nobody_asks = self.try_callers.load(SeqCst) == 0;
        if !nobody_asks {
            self.end_unasked_wait();
        }
        nobody_asks
    }

    /// The server has answered.
    pub(crate) fn end_unasked_wait(&self) {
        self.waits_unasked.store(false, SeqCst);
    }

    // By other threads.

    /// A caller wants to know whether the lock can be had, and not to wait for it, until what this gives is dropped.
    pub(crate) fn register_try_caller(&self) -> impl Drop {
        struct TryCaller<'a>(&'a AtomicUsize);
        impl Drop for TryCaller<'_> {
            fn drop(&mut self) {
                self.0.fetch_sub(1, SeqCst);
            }
        }
        self.try_callers.fetch_add(1, SeqCst);
        TryCaller(&self.try_callers)
    }

    /// Interrupts whichever thread is working on this claim.
    ///
    /// If that thread waits for the lock, this sends a cancel request, which blocks for up to half of the time until `by`.
    pub(crate) fn interrupt(&self, by: Instant) {
        let session = match &*self.in_flight.lock() {
            InFlight::Nothing | InFlight::Carrier => None,
            // Under the mutex: as soon as that is released, the session may belong to another claim.
            InFlight::Connecting(control) => {
                control.kill();
                None
            }
            InFlight::Session(control) => Some(Arc::clone(control)),
        };
        if let Some(session) = session {
            let left = by.saturating_duration_since(Instant::now());
            session.interrupt(Instant::now() + left / 2);
        }
    }

    /// Sets the caller that runs the engine; `None` when it has stopped.
    pub(crate) fn set_caller(&self, request: Option<Arc<LeaveRequest>>) {
        *self.caller.lock() = request.map(|request| Caller { request, told_at: None });
    }

    /// If the caller that runs the engine has been cancelled, ends what its thread waits for: a slice, which takes a cancel
    /// request and until `by` at most, or an attempt to connect. A slice that does not end, and after `patience` also a short
    /// statement, is ended with its session. Gives `false` if there is no such caller.
    pub(crate) fn make_caller_leave(&self, patience: Duration, by: Instant) -> bool {
        let slice = {
            // Under the mutex, so that no other caller is hit that comes after this one.
            let mut caller = self.caller.lock();
            let Some(caller) = caller.as_mut().filter(|caller| caller.request.is_made()) else {
                return false;
            };
            let insist = caller.told_at.get_or_insert_with(Instant::now).elapsed() >= patience;
            let session = match &*self.in_flight.lock() {
                InFlight::Nothing | InFlight::Carrier => return true,
                InFlight::Connecting(stream) => {
                    self.attempt_was_killed.store(true, SeqCst);
                    stream.kill();
                    return true;
                }
                InFlight::Session(control) => Arc::clone(control),
            };
            match session.slice() {
                Some(number) => (session, number),
                None => {
                    if insist {
                        self.kill_unless_held(&session);
                    }
                    return true;
                }
            }
        };
        // It may call code of the application's: a logger, a TLS connector.
        let (session, number) = slice;
        if !session.cancel_slice(number, by) && session.slice() == Some(number) {
            self.kill_unless_held(&session);
        }
        true
    }

    /// Kills the session, unless the caller has just got the lock: then the caller leaves by itself, and a kill would free the lock
    /// while its term is open. If it gets the lock after the kill, no term begins.
    fn kill_unless_held(&self, session: &SessionControl) {
        let mut status = self.status.lock();
        if !matches!(status.phase, Phase::Held { .. }) && session.kill() {
            status.session_killed = true;
        }
    }

    /// True if a caller wants to know whether the lock can be had while a statement waits for it, which does not tell.
    pub(crate) fn try_caller_needs_answer(&self) -> bool {
        self.waits_unasked.load(SeqCst) && self.try_callers.load(SeqCst) > 0
    }

    /// Ends that statement, which takes until `by` at most. The claim goes on to wait.
    pub(crate) fn cancel_unasked_wait(&self, by: Instant) {
        let session = match &*self.in_flight.lock() {
            InFlight::Session(control) => Arc::clone(control),
            InFlight::Nothing | InFlight::Connecting(_) | InFlight::Carrier => return,
        };
        if let Some(number) = session.slice()
            && self.try_caller_needs_answer()
        {
            session.cancel_slice(number, by);
        }
    }
}
