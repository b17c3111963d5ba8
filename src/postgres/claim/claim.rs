//! The state of a claim, shared by application threads and the thread that runs its engine.

use std::convert::Infallible;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, after, at, bounded, never, select};

use crate::clock::Moment;
use crate::context::{Context, OnCancel};
use crate::error::{Error, ErrorKind, Result, in_grace};
use crate::expiry::Expiry;
use crate::loss::{Alive, Loss, LossReason, Lost, lost_already};
use crate::mode::Mode;
use crate::pg::session::control::SessionControl;
use crate::pg::session::machine::Confirms;
use crate::pg::stream::StreamControl;
use crate::snapshot::{ClaimSnapshot, ClaimState};
use crate::sync::{AtomicBool, AtomicUsize, Mutex, MutexGuard, Ordering::SeqCst};
use crate::telling::Story;
use crate::term::{Fence, Term};

/// A claim, from the first attempt to the end of its release.
#[derive(Debug)]
pub(crate) struct Claim {
    /// The lock's key, for messages.
    key: String,
    mode: Mode,
    /// How long the server may keep a lock whose session was lost.
    uncertainty_window: Duration,
    span: Span,
    /// How long before its end a term that is not renewed is warned of.
    warn_before: Option<Duration>,
    /// What the manager's observer is to be told, if there is one.
    story: Option<Story>,
    // Lock order: `caller` before the others, of which no two are held at once; the mutex of a `SessionControl` after any of
    // them. That of the story is a leaf.
    status: Mutex<Status>,
    /// How the thread that runs the engine can be interrupted.
    in_flight: Mutex<InFlight>,
    /// The caller that runs the engine, if it can be cancelled.
    caller: Mutex<Option<Caller>>,
    /// The attempt to connect that is under way was killed for a caller that was cancelled, so its failure tells nothing.
    attempt_was_killed: AtomicBool,
    /// Callers that want to know whether the lock can be had, and not to wait for it.
    try_callers: AtomicUsize,
    /// A statement is under way that waits for the lock, and the server has not been asked before whether it is taken.
    waits_unasked: AtomicBool,
    /// A caller wants an attempt at once.
    hurry: AtomicBool,
}

/// How long a claim goes on by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Span {
    /// Until the application ends it: another term follows on one that was lost.
    UntilReleased,
    /// For one term at the most; if it does not wait for that, until the server says that another session holds the lock. Then it
    /// ends, for which it has `at_most`. A caller that `has_others` does not wait for a session while it has these.
    OneTerm { waits: bool, has_others: bool, at_most: Duration },
}

/// What the thread that runs the engine is using, and so how it can be interrupted.
#[derive(Debug, Clone)]
enum InFlight {
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
struct Caller {
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

#[derive(Debug)]
struct Status {
    phase: Phase,
    span: Span,
    /// Why an attempt failed, most recently, in this phase.
    problem: Option<Error>,
    /// How many attempts have failed so far.
    failed_attempts: u64,
    /// The channel of the current term, or of the last one.
    lost: Lost,
    /// Of the current term, or of the last one.
    token: Option<i64>,
    /// The same, of a semaphore: which of its permits.
    permit: Option<u32>,
    last_loss: Option<Loss>,
    /// Until when the server may hold something for a session of this claim that was lost.
    uncertain_until: Option<Moment>,
    /// The backends of its lost sessions, whose loss the server may not have noticed yet, and when each was lost.
    lost_backends: Vec<(Moment, i32)>,
    /// The server has answered what shows that the lock is held, and what must confirm it has not.
    unconfirmed: Confirms,
    /// The session at hand was killed while there was no term, so none may begin on it.
    session_killed: bool,
    /// Disconnects at the next change; there while somebody waits for it.
    changed: Option<(Sender<Infallible>, Receiver<Infallible>)>,
}

#[derive(Debug)]
enum Phase {
    /// No session, or no answer yet.
    Acquiring,
    /// Another session holds the lock. A claim that `takes_turns` has no place in the server's queue.
    Queueing { takes_turns: bool },
    /// The server was taken over: nobody is granted a lock before then.
    InGrace { ends: Instant },
    Held {
        until: Arc<Expiry>,
        /// Dropped at the end of the term, which is the signal.
        _term: Alive,
        warning: Warning,
    },
    /// The application has ended the claim, or one for one term has ended by itself. What must be said to the server must be said by then.
    Ending { reason: EndReason, by: Instant },
    /// All is done.
    Ended { reason: EndReason, outcome: Result<()> },
}

/// What tells that a term is about to end.
#[derive(Debug)]
struct Warning {
    /// Dropped to warn, and `None` afterwards; also where nobody wants to be warned.
    calm: Option<Sender<Infallible>>,
    warned: Option<Receiver<Infallible>>,
}

impl Warning {
    fn new(is_wanted: bool) -> Self {
        let (calm, warned) = is_wanted.then(|| bounded(0)).unzip();
        Self { calm, warned }
    }
}

/// Why a claim ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EndReason {
    Released,
    Stopped,
    /// The one term is over.
    Lost,
    /// Another session holds the lock, and the claim does not wait for it.
    Unavailable,
    /// The server was taken over: nobody is granted a lock before then, and the claim does not wait for that.
    InGrace {
        ends: Instant,
    },
    /// The thread that worked on it panicked.
    Failed,
}

/// How far a claim has come.
#[derive(Debug)]
pub(crate) enum Progress {
    Held,
    /// The caller's only attempt has failed.
    GaveUp,
    Pending(Option<Receiver<Infallible>>),
}

/// Whether a call waits for the lock while another session holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Patience {
    Lock,
    TryLock,
    /// As `TryLock`, but gives up after one attempt in which the server could not be asked.
    TryOnce,
}

impl Claim {
    pub(crate) fn new(
        key: String,
        mode: Mode,
        uncertainty_window: Duration,
        span: Span,
        warn_before: Option<Duration>,
        story: Option<Story>,
    ) -> Arc<Self> {
        let status = Status {
            phase: Phase::Acquiring,
            span,
            problem: None,
            failed_attempts: 0,
            lost: lost_already(),
            token: None,
            permit: None,
            last_loss: None,
            uncertain_until: None,
            lost_backends: Vec::new(),
            unconfirmed: Confirms::Nothing,
            session_killed: false,
            changed: None,
        };
        Arc::new(Self {
            key,
            mode,
            uncertainty_window,
            span,
            warn_before,
            story,
            status: Mutex::new(status),
            in_flight: Mutex::new(InFlight::Nothing),
            caller: Mutex::new(None),
            attempt_was_killed: AtomicBool::new(false),
            try_callers: AtomicUsize::new(0),
            waits_unasked: AtomicBool::new(false),
            hurry: AtomicBool::new(false),
        })
    }

    /// The lock's key, in text.
    pub(crate) fn key(&self) -> &str {
        &self.key
    }

    /// True if the claim has one caller, whose it is alone.
    pub(crate) fn is_for_one_term(&self) -> bool {
        self.span != Span::UntilReleased
    }

    /// True if a caller wants to know whether the lock can be had, and does not wait for it.
    pub(crate) fn has_try_callers(&self) -> bool {
        self.try_callers.load(SeqCst) > 0
    }

    /// True if its caller has other locks, and so does not wait for a session.
    pub(crate) fn has_others(&self) -> bool {
        matches!(self.span, Span::OneTerm { has_others: true, .. })
    }

    /// True if the application wants to be warned before a term ends.
    pub(crate) fn wants_warning(&self) -> bool {
        self.warn_before.is_some()
    }

    // What application threads do.

    /// How far the claim has come, for a thread that wants the lock. `failures` is how many attempts had failed when that thread's
    /// call began. With `subscribe`, gives a channel that disconnects at the next change.
    pub(crate) fn progress(&self, patience: Patience, failures: u64, subscribe: bool) -> Result<Progress> {
        let mut status = self.current();
        match &status.phase {
            Phase::Held { .. } => return Ok(Progress::Held),
            Phase::Ending { reason, .. } | Phase::Ended { reason, .. } => {
                return Err(self.ended(*reason, status.last_loss.as_ref()));
            }
            Phase::Queueing { .. } if patience != Patience::Lock => {
                return Err(Error::lock_unavailable(&self.key, self.mode).in_background());
            }
            Phase::InGrace { ends } if patience != Patience::Lock => {
                return Err(Error::in_grace(&self.key, left_until(*ends)).in_background());
            }
            Phase::Queueing { .. } | Phase::InGrace { .. } | Phase::Acquiring => {}
        }
        if self.has_others()
            && let Some(problem) = &status.problem
            && problem.kind() == ErrorKind::PoolExhausted
        {
            return Err(problem.clone());
        }
        if let Some(problem) = &status.problem
            && (patience != Patience::Lock || problem.kind() == ErrorKind::InvalidConfig)
        {
            if problem.kind() != ErrorKind::SessionUnavailable {
                return Err(problem.clone());
            }
            if patience == Patience::TryOnce && status.failed_attempts > failures {
                return Ok(Progress::GaveUp);
            }
        }
        Ok(Progress::Pending(subscribe.then(|| status.subscribe())))
    }

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

    /// How many attempts have failed.
    pub(crate) fn failures(&self) -> u64 {
        self.status.lock().failed_attempts
    }

    /// True if a caller wants the pause between two attempts to end; clears that wish. For the thread that pauses.
    pub(crate) fn take_attempt_request(&self) -> bool {
        self.hurry.swap(false, SeqCst)
    }

    /// Asks the thread that pauses between two attempts to make the next one. That thread must be woken after this.
    pub(crate) fn hurry(&self) {
        self.hurry.store(true, SeqCst);
    }

    pub(crate) fn lost(&self) -> Lost {
        self.current().lost.clone()
    }

    /// When something is due for the term: its end by its lease, or the warning of that.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        match &self.status.lock().phase {
            Phase::Held { until, warning, .. } => {
                let early = self.warn_before.filter(|_| warning.calm.is_some()).unwrap_or_default();
                let ends_at = until.at()?;
                Some(ends_at.checked_sub(early).unwrap_or(ends_at).instant())
            }
            _ => None,
        }
    }

    /// Closes the lost channel of a term whose time is over, and warns of one whose time will be. Does not block, and calls no
    /// application code.
    pub(crate) fn enforce_deadline(&self) {
        let mut status = self.current();
        if let (Phase::Held { until, warning, .. }, Some(early)) = (&mut status.phase, self.warn_before)
            && until.left() <= early
        {
            warning.calm = None;
        }
    }

    /// The current term, if there is one, with the fence for its permit, of a semaphore.
    pub(crate) fn term(&self, fence: impl FnOnce(Option<u32>) -> Option<Arc<dyn Fence>>) -> Option<Term> {
        let status = self.current();
        let Phase::Held { until, warning, .. } = &status.phase else { return None };
        let term = Term::new(status.lost.clone(), status.token, fence(status.permit))
            .with_permit(status.permit)
            .with_expiry(Arc::clone(until));
        Some(match &warning.warned {
            Some(warned) => term.with_warning(warned.clone()),
            None => term,
        })
    }

    pub(crate) fn last_loss(&self) -> Option<Loss> {
        self.current().last_loss.clone()
    }

    /// True if this claim ends, or has ended.
    pub(crate) fn is_ending(&self) -> bool {
        !self.status.lock().is_open()
    }

    /// Whether all is done for the claim.
    pub(crate) fn is_over(&self) -> bool {
        matches!(self.status.lock().phase, Phase::Ended { .. })
    }

    /// True if the claim is ending, or has ended, for this reason.
    pub(crate) fn ends_for(&self, reason: EndReason) -> bool {
        matches!(self.status.lock().phase, Phase::Ending { reason: known, .. } | Phase::Ended { reason: known, .. } if known == reason)
    }

    /// By when the claim must have ended, if it ends.
    pub(crate) fn ends_by(&self) -> Option<Instant> {
        match self.status.lock().phase {
            Phase::Ending { by, .. } => Some(by),
            // Nobody waits any more, but the engine still has to finish.
            Phase::Ended { .. } => Some(Instant::now()),
            _ => None,
        }
    }

    /// Ends the claim, and closes the lost channel of its term. Only the first call has an effect, and returns `true`: its caller
    /// must give the lock back by `by`, or [interrupt](Self::interrupt) the thread that runs the engine.
    pub(crate) fn end(&self, reason: EndReason, by: Instant) -> bool {
        // A term whose time is over is lost, and not released.
        let mut status = self.current();
        if !status.is_open() {
            return false;
        }
        status.phase = Phase::Ending { reason, by };
        if let Some(story) = &self.story {
            story.released();
        }
        status.notify();
        true
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

    /// Blocks until the lock has been given back, and returns whether the server confirmed it. Returns at `by`, even if the thread
    /// that gives it back is still busy.
    pub(crate) fn wait_ended(&self, by: Instant) -> Result<()> {
        // A thread whose session is killed during a call has this long to finish by itself.
        let rest = by.saturating_duration_since(Instant::now()) / 10;
        if let Some(outcome) = self.ended_by(by - rest) {
            return outcome;
        }
        let in_flight = self.in_flight.lock().clone();
        let outcome = match in_flight {
            InFlight::Session(control) => {
                control.kill();
                Err(self.unconfirmed())
            }
            InFlight::Carrier => Err(self.goes_on()),
            // There is no session now, but there may have been one before.
            InFlight::Connecting(_) | InFlight::Nothing if self.is_uncertain() => Err(self.unconfirmed()),
            InFlight::Connecting(_) | InFlight::Nothing => Ok(()),
        };
        if let Some(outcome) = self.ended_by(by) {
            return outcome;
        }
        self.finish(outcome.clone());
        outcome
    }

    fn unconfirmed(&self) -> Error {
        let message = format!(
            "the release of {:?} was not confirmed in time and its session was closed; \
             the server frees the lock when it notices, after {:?} at the latest",
            self.key, self.uncertainty_window
        );
        Error::new(ErrorKind::UnlockFailed, message)
    }

    fn goes_on(&self) -> Error {
        let message = format!(
            "the release of {:?} was not confirmed in time; it goes on, and is over as soon as the server answers; if its session is lost \
             before, after {:?} at the latest",
            self.key, self.uncertainty_window
        );
        Error::new(ErrorKind::UnlockFailed, message)
    }

    fn is_uncertain(&self) -> bool {
        self.status.lock().uncertain_until.is_some_and(|until| Moment::now() < until)
    }

    /// Blocks until another thread's release of this claim is over; fails if `context` ends before. At `by` the claim ends in any
    /// case, even if that thread is gone.
    pub(crate) fn wait_released(&self, context: &Context, by: Instant) -> Result<()> {
        let begun = Instant::now();
        let cancelled = context.cancelled();
        let deadline = context.expires_at().map_or_else(never, at);
        loop {
            let changed = {
                let mut status = self.status.lock();
                if matches!(status.phase, Phase::Ended { .. }) {
                    return Ok(());
                }
                status.subscribe()
            };
            let left = by.saturating_duration_since(Instant::now());
            if left.is_zero() {
                // The outcome is for the thread that released it.
                let _ = self.wait_ended(Instant::now());
                return Ok(());
            }
            select! {
                recv(changed) -> _ => {}
                recv(after(left)) -> _ => {}
                recv(cancelled) -> _ => return Err(self.gave_up(ErrorKind::Cancelled, begun)),
                recv(deadline) -> _ => return Err(self.gave_up(ErrorKind::TimedOut, begun)),
            }
        }
    }

    fn ended_by(&self, by: Instant) -> Option<Result<()>> {
        loop {
            let changed = {
                let mut status = self.status.lock();
                if let Phase::Ended { outcome, .. } = &status.phase {
                    return Some(outcome.clone());
                }
                status.subscribe()
            };
            let left = by.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            select! {
                recv(changed) -> _ => {}
                recv(after(left)) -> _ => {}
            }
        }
    }

    /// The status, after a term whose time is over has been ended.
    ///
    /// The supervisor ends it as well, but after a freeze of the whole process any thread may run first.
    fn current(&self) -> MutexGuard<'_, Status> {
        let mut status = self.status.lock();
        if let Phase::Held { until, .. } = &status.phase
            && until.has_passed()
        {
            let reason = status.why_over();
            status.lose(reason, self.story.as_ref());
        }
        status
    }

    fn ended(&self, reason: EndReason, loss: Option<&Loss>) -> Error {
        match reason {
            EndReason::Released => Error::released(&self.key),
            EndReason::Stopped => Error::stopped(),
            EndReason::Unavailable => Error::lock_unavailable(&self.key, self.mode),
            EndReason::InGrace { ends } => Error::in_grace(&self.key, left_until(ends)),
            EndReason::Lost => Error::lost(&self.key, loss),
            EndReason::Failed => Error::new(ErrorKind::SessionUnavailable, self.failure()),
        }
    }

    /// The error of a call whose context has ended.
    pub(crate) fn gave_up(&self, kind: ErrorKind, begun: Instant) -> Error {
        let status = self.status.lock();
        let obstacle = match (&status.phase, &status.problem, &status.last_loss) {
            (Phase::Queueing { .. }, ..) => format!(", {}", self.mode.which_has()),
            (Phase::InGrace { ends }, ..) => format!("; {}", in_grace(left_until(*ends))),
            (_, Some(problem), _) => format!("; {problem}"),
            (Phase::Ending { .. }, ..) => ", whose former claim is still being released".to_owned(),
            (Phase::Acquiring, None, _) if status.unconfirmed != Confirms::Nothing => {
                "; the server has granted it, and that is not confirmed yet".to_owned()
            }
            (Phase::Acquiring, None, Some(loss)) => {
                format!("; its session was lost ({}), and another one is being opened", loss.reason)
            }
            (Phase::Acquiring, None, None) => {
                "; the server has not answered yet: check host and port, and in pg_locks whether a table of the \
                 catalog is locked"
                    .to_owned()
            }
            _ => String::new(),
        };
        let message = format!("waited {:.1?} for lock {:?}{obstacle}", begun.elapsed(), self.key);
        let error = Error::new(kind, message);
        match &status.problem {
            Some(problem) => error.with_source(problem.clone()),
            None => error,
        }
    }

    /// How the claim stands; `None` if it is over.
    pub(crate) fn snapshot(&self) -> Option<ClaimSnapshot> {
        let status = self.current();
        let (state, until) = match &status.phase {
            Phase::Acquiring => (ClaimState::Connecting, None),
            Phase::Queueing { takes_turns: false } => (ClaimState::Queueing, None),
            Phase::Queueing { takes_turns: true } => (ClaimState::TakingTurns, None),
            Phase::InGrace { .. } => (ClaimState::InGrace, None),
            Phase::Held { until, .. } => (ClaimState::Held, Some(until)),
            Phase::Ending { .. } => (ClaimState::Releasing, None),
            Phase::Ended { .. } => return None,
        };
        Some(ClaimSnapshot {
            key: self.key.clone(),
            is_guard: self.is_for_one_term(),
            is_shared: self.mode.is_shared(),
            state,
            token: status.token.filter(|_| until.is_some()),
            time_left: until.map(|until| until.left()),
            grace_left: match status.phase {
                Phase::InGrace { ends } => Some(left_until(ends)),
                _ => None,
            },
            last_error: status.problem.clone(),
            last_loss: status.last_loss.clone(),
            waiting_threads: 0,
        })
    }

    // What the manager's observer is told.

    /// As [`tell`](Self::tell), for a caller that is about to return.
    pub(crate) fn tell_and_wait(&self) {
        if let Some(story) = &self.story {
            story.tell_and_wait();
        }
    }

    /// True if there is an observer to tell.
    pub(crate) fn is_observed(&self) -> bool {
        self.story.is_some()
    }

    /// Tells the observer what has happened to the claim. To be called under no mutex but that of the engine, and not by a thread
    /// that must not block.
    pub(crate) fn tell(&self) {
        if let Some(story) = &self.story {
            story.tell();
        }
    }

    /// The server has answered a heartbeat.
    pub(crate) fn note_heartbeat(&self, round_trip: Duration) {
        if let Some(story) = &self.story {
            story.heartbeat(round_trip);
        }
    }

    /// The release was not confirmed.
    pub(crate) fn note_trouble(&self, error: &Error) {
        if let Some(story) = &self.story {
            story.trouble(error.clone());
        }
    }

    // What the supervisor does while another thread runs the engine.

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

    // What the thread that runs the engine does.

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

    /// The claim uses a session that others use, too.
    pub(crate) fn announce_carried(&self) {
        self.set_in_flight(InFlight::Carrier);
    }

    /// The server was taken over, and nobody is granted a lock before `ends`, or before another process has waited for that long.
    pub(crate) fn announce_in_grace(&self, ends: Instant) {
        self.announce_obstacle(EndReason::InGrace { ends }, Phase::InGrace { ends });
    }

    /// The lock cannot be had now: the claim ends for `reason` if it does not wait, and is in `waiting` if it does.
    fn announce_obstacle(&self, reason: EndReason, waiting: Phase) {
        let mut status = self.status.lock();
        if status.is_open() {
            status.phase = match status.span {
                Span::OneTerm { waits: false, at_most, .. } => {
                    Phase::Ending { reason, by: Instant::now() + at_most }
                }
                _ => waiting,
            };
            status.problem = None;
            status.notify();
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
            (status.problem, status.unconfirmed) = (None, Confirms::Nothing);
            status.lost = lost;
            (status.token, status.permit) = (token, permit);
            if let Some(story) = &self.story {
                story.acquired(token, permit);
            }
            status.notify();
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
                status.lose(reason, self.story.as_ref());
                false
            }
            // The engine sees the release at its next step.
            Phase::Ending { .. } => true,
            _ => false,
        }
    }

    /// What is still to be confirmed of what the server has answered.
    pub(crate) fn announce_unconfirmed(&self, unconfirmed: Confirms) {
        self.status.lock().unconfirmed = unconfirmed;
    }

    /// The term is over, if there is one.
    pub(crate) fn announce_lost(&self, reason: LossReason) {
        let mut status = self.status.lock();
        if matches!(status.phase, Phase::Held { .. }) {
            status.lose(reason, self.story.as_ref());
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
            if !was_killed {
                if let (Some(story), Some(problem)) = (&self.story, &problem) {
                    story.trouble(problem.clone());
                }
                status.problem = problem;
                status.failed_attempts += 1;
            }
            status.notify();
        }
    }

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

    /// The two mutexes are taken one after the other, here and in [`end`](Self::end), so that one of the two sees what
    /// the other did.
    fn set_in_flight(&self, in_flight: InFlight) -> bool {
        *self.in_flight.lock() = in_flight;
        !self.is_ending()
    }

    /// The claim's supervisor has failed. Does nothing if the claim is over.
    pub(crate) fn abandon(&self) {
        if self.is_over() {
            return;
        }
        self.announce_lost(LossReason::SupervisorFailed);
        self.finish(Err(Error::new(ErrorKind::UnlockFailed, self.failure())));
    }

    fn failure(&self) -> String {
        format!(
            "the work on {:?} failed by a panic, of the logger say; its session was closed, and a new claim has another one",
            self.key
        )
    }

    /// How long the server may keep a lock whose session was lost.
    pub(crate) fn uncertainty_window(&self) -> Duration {
        self.uncertainty_window
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

fn left_until(at: Instant) -> Duration {
    at.saturating_duration_since(Instant::now())
}

impl Status {
    /// True until the application ends the claim.
    fn is_open(&self) -> bool {
        !matches!(self.phase, Phase::Ending { .. } | Phase::Ended { .. })
    }

    /// Why the time of the term was not prolonged.
    fn why_over(&self) -> LossReason {
        if self.unconfirmed == Confirms::All { LossReason::NotConfirmed } else { LossReason::LeaseNotRenewed }
    }

    fn lose(&mut self, reason: LossReason, story: Option<&Story>) {
        self.phase = match self.span {
            Span::UntilReleased => Phase::Acquiring,
            Span::OneTerm { at_most, .. } => {
                Phase::Ending { reason: EndReason::Lost, by: Instant::now() + at_most }
            }
        };
        self.problem = None;
        self.last_loss = Some(Loss::now(reason));
        if let Some(story) = story {
            story.lost(reason);
        }
        self.notify();
    }

    /// A channel that disconnects at the next change.
    fn subscribe(&mut self) -> Receiver<Infallible> {
        self.changed.get_or_insert_with(|| bounded(0)).1.clone()
    }

    fn notify(&mut self) {
        self.changed = None;
    }
}
