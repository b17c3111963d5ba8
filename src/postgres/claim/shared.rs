//! One claim: what application threads, and whoever works on it, know of each other.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, after, at, bounded, never, select};
use parking_lot::Mutex;

use crate::context::Context;
use crate::error::{Error, ErrorKind, Result};
use crate::expiry::Expiry;
use crate::loss::{Loss, LossReason, Lost, lost_already};
use crate::postgres::session::cancel::Link;
use crate::postgres::stream::StreamControl;
use crate::term::{Fence, Term};

/// A claim, from the first attempt until its end is over.
#[derive(Debug)]
pub(crate) struct Claim {
    /// For messages.
    key: String,
    /// How long the server may keep a lock that it cannot be told of.
    doubt: Duration,
    status: Mutex<Status>,
    /// How to reach the thread that is busy with the server for this claim.
    reach: Mutex<Reach>,
    /// How many threads wait that would rather do the work themselves.
    volunteers: AtomicUsize,
    /// Somebody wants an attempt at once.
    hurry: AtomicBool,
}

/// How to reach the thread that works on a claim.
#[derive(Debug, Clone)]
enum Reach {
    /// It works on no session, so there is no need.
    Idle,
    /// It is opening a session; nothing is held.
    Connecting(StreamControl),
    /// It has a session.
    Session(Arc<Link>),
}

#[derive(Debug)]
struct Status {
    phase: Phase,
    /// Why an attempt failed, most recently, in this phase.
    problem: Option<Error>,
    /// How many attempts have failed so far.
    failed_attempts: u64,
    /// The channel of the current term, or of the last one.
    lost: Lost,
    /// Of the current term, or of the last one.
    token: Option<i64>,
    last_loss: Option<Loss>,
    /// Until when the server may hold something for a session of this claim that was lost.
    in_doubt_until: Option<Instant>,
    /// Disconnects at the next change; there while somebody waits for it.
    changed: Option<(Sender<Infallible>, Receiver<Infallible>)>,
}

#[derive(Debug)]
enum Phase {
    /// No session, or no answer yet.
    Acquiring,
    /// Another session holds the lock.
    Queueing,
    Held {
        until: Arc<Expiry>,
        /// Dropped at the end of the term, which is the signal.
        _term: Sender<Infallible>,
    },
    /// The application has ended the claim; what must be said to the server must be said by then.
    Ending { why: Why, by: Instant },
    /// All is done.
    Ended { why: Why, outcome: Result<()> },
}

/// Why a claim ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Why {
    Released,
    Stopped,
}

/// Whether a call waits for the lock while another session holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Patience {
    Lock,
    TryLock,
    /// As `TryLock`, and an attempt that fails since the server could not be asked is the last.
    TryOnce,
}

impl Claim {
    pub(crate) fn new(key: String, doubt: Duration) -> Arc<Self> {
        let status = Status {
            phase: Phase::Acquiring,
            problem: None,
            failed_attempts: 0,
            lost: lost_already(),
            token: None,
            last_loss: None,
            in_doubt_until: None,
            changed: None,
        };
        Arc::new(Self {
            key,
            doubt,
            status: Mutex::new(status),
            reach: Mutex::new(Reach::Idle),
            volunteers: AtomicUsize::new(0),
            hurry: AtomicBool::new(false),
        })
    }

    /// The lock's key, in text.
    pub(crate) fn key(&self) -> &str {
        &self.key
    }

    // What application threads do.

    /// Blocks until the lock is held, or it is known that it will not be, as [`Lock`](crate::Lock) says.
    ///
    /// `help` does what can be done on this thread, and says whether there was anything; `volunteers` is whether it might.
    pub(crate) fn acquire(
        &self,
        patience: Patience,
        context: &Context,
        volunteers: bool,
        help: impl Fn() -> bool,
    ) -> Result<()> {
        let begun = Instant::now();
        let _volunteer = volunteers.then(|| Volunteer::new(self));
        // At first nobody else is likely to be at work.
        let mut first = true;
        // What an attempt came to that was made before this call says nothing of the one that is wanted.
        let before = if patience == Patience::TryOnce { self.attempts() } else { 0 };
        loop {
            let changed = {
                let mut status = self.current();
                match &status.phase {
                    Phase::Held { .. } => return Ok(()),
                    Phase::Ending { why, .. } | Phase::Ended { why, .. } => return Err(self.ended(*why)),
                    Phase::Queueing if patience != Patience::Lock => {
                        return Err(Error::lock_unavailable(&self.key));
                    }
                    Phase::Queueing | Phase::Acquiring => {}
                }
                if patience != Patience::Lock
                    && let Some(problem) = &status.problem
                {
                    if problem.kind() != ErrorKind::SessionUnavailable {
                        return Err(problem.clone());
                    }
                    if patience == Patience::TryOnce && status.failed_attempts > before {
                        drop(status);
                        return Err(self.gave_up(ErrorKind::TimedOut, begun));
                    }
                }
                // Before the offer, so that what changes after it was turned down is heard.
                if first { None } else { Some(status.subscribe()) }
            };
            first = false;
            if help() {
                continue;
            }
            let Some(changed) = changed else { continue };
            select! {
                recv(changed) -> _ => {}
                recv(context.cancelled()) -> _ => return Err(self.gave_up(ErrorKind::Cancelled, begun)),
                recv(context.expires_at().map_or_else(never, at)) -> _ => {
                    return Err(self.gave_up(ErrorKind::TimedOut, begun));
                }
            }
        }
    }

    /// How many attempts have failed.
    fn attempts(&self) -> u64 {
        self.status.lock().failed_attempts
    }

    /// Whether somebody wants an attempt now, and not after a pause. To be asked by the thread that pauses.
    pub(crate) fn wants_attempt(&self) -> bool {
        self.hurry.swap(false, SeqCst)
    }

    /// Has the pause between two attempts ended. The thread that pauses must be woken after this.
    pub(crate) fn hurry(&self) {
        self.hurry.store(true, SeqCst);
    }

    pub(crate) fn lost(&self) -> Lost {
        self.current().lost.clone()
    }

    /// When the term ends by its lease, if there is one.
    pub(crate) fn term_ends_at(&self) -> Option<Instant> {
        match &self.status.lock().phase {
            Phase::Held { until, .. } => until.at(),
            _ => None,
        }
    }

    /// Closes the lost channel of a term that is over by its time. Blocks for nothing, and calls nobody.
    pub(crate) fn expire(&self) {
        drop(self.current());
    }

    /// The current term, if there is one.
    pub(crate) fn term(&self, fence: Option<Arc<dyn Fence>>) -> Option<Term> {
        let status = self.current();
        let Phase::Held { until, .. } = &status.phase else { return None };
        Some(Term::new(status.lost.clone(), status.token, fence).with_expiry(Arc::clone(until)))
    }

    pub(crate) fn last_loss(&self) -> Option<Loss> {
        self.current().last_loss.clone()
    }

    /// Whether the application has ended this claim.
    pub(crate) fn is_ending(&self) -> bool {
        !self.status.lock().is_open()
    }

    /// Whether all is done for the claim.
    pub(crate) fn is_over(&self) -> bool {
        matches!(self.status.lock().phase, Phase::Ended { .. })
    }

    /// Whether the claim has ended for this reason.
    pub(crate) fn ends_for(&self, reason: Why) -> bool {
        matches!(self.status.lock().phase, Phase::Ending { why, .. } | Phase::Ended { why, .. } if why == reason)
    }

    /// By when the claim must have ended, if the application has ended it.
    pub(crate) fn ends_by(&self) -> Option<Instant> {
        match self.status.lock().phase {
            Phase::Ending { by, .. } => Some(by),
            // Nobody waits any more; there is an end to be made all the same.
            Phase::Ended { .. } => Some(Instant::now()),
            _ => None,
        }
    }

    /// Ends the claim: closes the term. Only the first call does something, and returns `true`: then somebody must give
    /// back what there is, by `by`, or whoever is at work must be [interrupted](Self::interrupt).
    pub(crate) fn end(&self, why: Why, by: Instant) -> bool {
        let mut status = self.status.lock();
        if !status.is_open() {
            return false;
        }
        status.phase = Phase::Ending { why, by };
        status.notify();
        true
    }

    /// Makes the thread that works on the claim come to know that it has ended, whatever it does.
    ///
    /// Sends a cancel request if it waits for the lock, and so takes as long as that does, but no longer than half of the
    /// time until `by`.
    pub(crate) fn interrupt(&self, by: Instant) {
        let link = match &*self.reach.lock() {
            Reach::Idle => None,
            // Under the mutex, so that it is the attempt of this claim still: a moment later the session may be another's.
            Reach::Connecting(control) => {
                control.kill();
                None
            }
            Reach::Session(link) => Some(Arc::clone(link)),
        };
        if let Some(link) = link {
            let left = by.saturating_duration_since(Instant::now());
            link.interrupt(Instant::now() + left / 2);
        }
    }

    /// Blocks until what there was has been given back, and says whether it could be. After `by` whoever is at it is left
    /// alone.
    pub(crate) fn wait_ended(&self, by: Instant) -> Result<()> {
        // What a thread gets that was cut off from its session in the midst of a call to finish by itself.
        let grace = by.saturating_duration_since(Instant::now()) / 10;
        if let Some(outcome) = self.ended_by(by - grace) {
            return outcome;
        }
        let reach = self.reach.lock().clone();
        let outcome = match reach {
            Reach::Session(link) => {
                link.kill();
                Err(self.unconfirmed())
            }
            // It has no session, but may have had one; and ends when the attempt to connect does.
            Reach::Connecting(_) | Reach::Idle if self.is_in_doubt() => Err(self.unconfirmed()),
            Reach::Connecting(_) | Reach::Idle => Ok(()),
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
            self.key, self.doubt
        );
        Error::new(ErrorKind::UnlockFailed, message)
    }

    fn is_in_doubt(&self) -> bool {
        self.status.lock().in_doubt_until.is_some_and(|until| Instant::now() < until)
    }

    /// Blocks until another thread's release of this claim is over; fails if `context` ends before. After `by` it is, even
    /// if that thread is gone.
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
                // How it ended is told to the one who released it.
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

    /// The status, in which no term is held that is over by its time.
    ///
    /// The supervisor sees to that as well, but after a freeze of the whole process any thread may run first.
    fn current(&self) -> parking_lot::MutexGuard<'_, Status> {
        let mut status = self.status.lock();
        if let Phase::Held { until, .. } = &status.phase
            && until.has_passed()
        {
            status.lose(LossReason::LeaseNotRenewed);
        }
        status
    }

    fn ended(&self, why: Why) -> Error {
        match why {
            Why::Released => Error::released(&self.key),
            Why::Stopped => Error::stopped(),
        }
    }

    /// What a call fails with whose context has ended.
    pub(crate) fn gave_up(&self, kind: ErrorKind, begun: Instant) -> Error {
        let status = self.status.lock();
        let obstacle = match (&status.phase, &status.problem, &status.last_loss) {
            (Phase::Queueing, ..) => ", which another session holds".to_owned(),
            (_, Some(problem), _) => format!("; {problem}"),
            (Phase::Ending { .. }, ..) => ", whose former claim is still being released".to_owned(),
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

    // What the thread does that works on the claim.

    /// Whether a thread waits that would do the work itself; then it is told to.
    pub(crate) fn call_volunteer(&self) -> bool {
        let there = self.volunteers.load(SeqCst) > 0;
        if there {
            self.status.lock().notify();
        }
        there
    }

    /// Another session holds the lock.
    pub(crate) fn announce_queueing(&self) {
        let mut status = self.status.lock();
        if status.is_open() {
            status.phase = Phase::Queueing;
            status.problem = None;
            status.notify();
        }
    }

    /// The lock is held until `until` at least.
    pub(crate) fn announce_acquired(&self, until: Instant, token: Option<i64>) {
        let mut status = self.status.lock();
        if status.is_open() {
            let (term, lost) = bounded(0);
            status.phase = Phase::Held { until: Arc::new(Expiry::new(until)), _term: term };
            status.problem = None;
            status.lost = lost;
            status.token = token;
            status.notify();
        }
    }

    /// The term goes on until `until` at least; `false` if it has ended here meanwhile.
    pub(crate) fn announce_renewed(&self, until: Instant) -> bool {
        let mut status = self.status.lock();
        match &status.phase {
            Phase::Held { until: expiry, .. } if !expiry.has_passed() && expiry.move_to(until) => true,
            Phase::Held { .. } => {
                status.lose(LossReason::LeaseNotRenewed);
                false
            }
            // The release will be heard in a moment.
            Phase::Ending { .. } => true,
            _ => false,
        }
    }

    /// The term is over; `false` if that was known already.
    pub(crate) fn announce_lost(&self, reason: LossReason) -> bool {
        let mut status = self.status.lock();
        let held = matches!(status.phase, Phase::Held { .. });
        if held {
            status.lose(reason);
        }
        held
    }

    /// Until when the server may hold something for a session of this claim that was lost.
    pub(crate) fn announce_doubt(&self, until: Option<Instant>) {
        self.status.lock().in_doubt_until = until;
    }

    /// An attempt failed.
    pub(crate) fn announce_problem(&self, problem: Option<Error>) {
        let mut status = self.status.lock();
        if status.is_open() {
            status.phase = Phase::Acquiring;
            status.problem = problem;
            status.failed_attempts += 1;
            status.notify();
        }
    }

    /// A session is being opened that obeys `control`; `false` if it should not.
    pub(crate) fn announce_connecting(&self, control: StreamControl) -> bool {
        self.set_reach(Reach::Connecting(control))
    }

    /// The work is on the session behind `link`; `false` if it should not.
    pub(crate) fn announce_session(&self, link: Arc<Link>) -> bool {
        self.set_reach(Reach::Session(link))
    }

    /// There is no session.
    pub(crate) fn announce_no_session(&self) {
        self.set_reach(Reach::Idle);
    }

    /// The two mutexes are taken one after the other, here and in [`end`](Self::end), so that one of the two sees what
    /// the other did.
    fn set_reach(&self, reach: Reach) -> bool {
        *self.reach.lock() = reach;
        !self.is_ending()
    }

    /// All has been done that could be. Only the first call does something.
    pub(crate) fn finish(&self, outcome: Result<()>) {
        let mut status = self.status.lock();
        let why = match status.phase {
            Phase::Ended { .. } => return,
            Phase::Ending { why, .. } => why,
            _ => Why::Released,
        };
        status.phase = Phase::Ended { why, outcome };
        status.notify();
    }
}

/// A thread that waits for the lock and would rather do the work itself.
struct Volunteer<'a>(&'a Claim);

impl<'a> Volunteer<'a> {
    fn new(claim: &'a Claim) -> Self {
        claim.volunteers.fetch_add(1, SeqCst);
        Self(claim)
    }
}

impl Drop for Volunteer<'_> {
    fn drop(&mut self) {
        self.0.volunteers.fetch_sub(1, SeqCst);
    }
}

impl Status {
    /// Whether the application wants the lock still.
    fn is_open(&self) -> bool {
        !matches!(self.phase, Phase::Ending { .. } | Phase::Ended { .. })
    }

    fn lose(&mut self, reason: LossReason) {
        self.phase = Phase::Acquiring;
        self.problem = None;
        self.last_loss = Some(Loss::now(reason));
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
