//! A claim: what application threads, the supervisor and the thread that runs the engine share of it.
//!
//! How it stands is in `status.rs`, what the thread that works on it says of it in `announce.rs`, and how that thread is interrupted in
//! `interrupt.rs`.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, after, at, never, select};

use super::interrupt::{Caller, InFlight};
use super::status::{EndReason, Phase, Span, Status};
use crate::clock::Moment;
use crate::context::Context;
use crate::error::{Error, ErrorKind, Result, in_grace};
use crate::loss::{Loss, Lost};
use crate::mode::Mode;
use crate::pg::session::machine::Confirms;
use crate::snapshot::{ClaimSnapshot, ClaimState};
use crate::sync::{AtomicBool, AtomicUsize, Mutex, MutexGuard, Ordering::SeqCst};
use crate::telling::Story;
use crate::term::{Fence, Term};

/// A claim, from the first attempt to the end of its release.
#[derive(Debug)]
pub(crate) struct Claim {
    /// The lock's key, for messages.
    pub(super) key: String,
    mode: Mode,
    /// How long the server may keep a lock whose session was lost.
    pub(super) uncertainty_window: Duration,
    pub(super) span: Span,
    /// How long before its end a term that is not renewed is warned of.
    pub(super) warn_before: Option<Duration>,
    /// What the manager's observer is to be told, if there is one.
    pub(super) story: Option<Story>,
    // Lock order: `caller` before the others, of which no two are held at once; the mutex of a `SessionControl` after any of
    // them. That of the story is a leaf.
    pub(super) status: Mutex<Status>,
    /// How the thread that runs the engine can be interrupted.
    pub(super) in_flight: Mutex<InFlight>,
    /// The caller that runs the engine, if it can be cancelled.
    pub(super) caller: Mutex<Option<Caller>>,
    /// The attempt to connect that is under way was killed for a caller that was cancelled, so its failure tells nothing.
    pub(super) attempt_was_killed: AtomicBool,
    /// Callers that want to know whether the lock can be had, and not to wait for it.
    pub(super) try_callers: AtomicUsize,
    /// A statement is under way that waits for the lock, and the server has not been asked before whether it is taken.
    pub(super) waits_unasked: AtomicBool,
    /// A caller wants an attempt at once.
    hurry: AtomicBool,
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
        Arc::new(Self {
            key,
            mode,
            uncertainty_window,
            span,
            warn_before,
            story,
            status: Mutex::new(Status::new()),
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

    /// How long the server may keep a lock whose session was lost.
    pub(crate) fn uncertainty_window(&self) -> Duration {
        self.uncertainty_window
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
                let ends_at = until.due();
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

    pub(super) fn failure(&self) -> String {
        format!(
            "the work on {:?} failed by a panic, of the logger say; its session was closed, and a new claim has another one",
            self.key
        )
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
    /// The watchdog ends it as well, but after a freeze of the whole process any thread may run first.
    pub(super) fn current(&self) -> MutexGuard<'_, Status> {
        let mut status = self.status.lock();
        if let Phase::Held { until, .. } = &status.phase
            && until.has_passed()
        {
            let reason = status.why_over();
            self.lose(&mut status, reason);
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
        let grace_left = match status.phase {
            Phase::InGrace { ends } => Some(left_until(ends)),
            _ => None,
        };
        let error = Error::new(kind, message).with_grace(grace_left);
        match &status.problem {
            Some(problem) => error.with_source(problem.clone()),
            None => error,
        }
    }

    /// That the server has kept silent, if it has: it has refused nothing, and no other holder is in the way.
    pub(crate) fn silence(&self) -> Option<Error> {
        let status = self.status.lock();
        if !matches!(status.phase, Phase::Acquiring) || status.problem.is_some() {
            return None;
        }
        let text = match status.unconfirmed {
            Confirms::Nothing => {
                "the server has not answered; see whether it runs, and in pg_locks whether a table of the catalog is locked"
            }
            _ => "the server has granted it, and that was not confirmed in time",
        };
        Some(Error::new(ErrorKind::SessionUnavailable, text))
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
}

fn left_until(at: Instant) -> Duration {
    at.saturating_duration_since(Instant::now())
}
