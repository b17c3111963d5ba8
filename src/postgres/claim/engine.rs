//! The work on a claim: turns the machine's actions into I/O, and what comes of it into events and signals. Any thread may
//! do it, one at a time.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind, chain};
use crate::lock::{LockValuer, annotate};
use crate::loss::LossReason;
use crate::postgres::claim::machine::{Action, End, Event, Machine, Notice, Time, Timing};
use crate::postgres::claim::shared::{Claim, Why};
use crate::postgres::config::LeasePlan;
use crate::postgres::pool::{Pool, PooledSlot};
use crate::postgres::session::cancel::Link;
use crate::postgres::session::open::{Answer, Request, Session};
use crate::postgres::session::refusal::Refusal;
use crate::postgres::session::wire::Failure;
use crate::postgres::stream::{Socket, StreamControl};

/// What all the claims of one lock have in common.
pub(crate) struct Terms {
    pub(crate) request: Request,
    pub(crate) valuer: Option<LockValuer>,
    /// Whether the last call of the valuer took less than 1 ms.
    pub(crate) valuer_is_fast: AtomicBool,
    pub(crate) plan: LeasePlan,
    pub(crate) wait_slice: Duration,
    pub(crate) release_timeout: Duration,
    pub(crate) pool: Arc<Pool>,
}

impl Terms {
    /// How long the server may hold something for a session that was lost without its knowing.
    pub(crate) fn doubt(&self) -> Duration {
        // A slice may wait twice: for the lock, and at the gate for a predecessor's fenced transactions.
        self.plan.lease + 2 * self.wait_slice
    }

    /// By when the server must have answered a short statement.
    fn soon(&self) -> Instant {
        Instant::now() + self.plan.heartbeat_timeout
    }

    /// Whether a thread whose patience lasts `until` may try for the lock, and wait for it, itself.
    pub(crate) fn may_wait(&self, until: Option<Instant>) -> bool {
        until.is_none_or(|until| self.after_slice() <= until)
    }

    /// Whether the annotation, if there is one, takes no time to speak of, going by the last one.
    fn annotates_fast(&self) -> bool {
        self.valuer.is_none() || self.valuer_is_fast.load(Relaxed)
    }

    /// By when the server must have answered a statement that waits for a slice.
    fn after_slice(&self) -> Instant {
        self.soon() + 2 * self.wait_slice
    }
}

impl fmt::Debug for Terms {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Terms").field("request", &self.request).finish_non_exhaustive()
    }
}

/// One claim at work.
pub(crate) struct Work {
    terms: Arc<Terms>,
    request: Request,
    claim: Arc<Claim>,
    machine: Machine,
    epoch: Instant,
    /// The whole claim's: when a session is lost the next one takes its place.
    slot: Option<PooledSlot>,
    link: Option<Arc<Link>>,
    /// Who served the sessions of this claim that were lost and may be in doubt still, and when that was.
    lost_backends: Vec<(Instant, i32)>,
    in_doubt_until: Time,
    /// The server has said that it ends the session at hand.
    end_announced: bool,
    /// Why the last attempt failed.
    problem: Option<Error>,
    /// What sort of problem was logged last, so that one that goes on is not logged again and again.
    warned: Option<ErrorKind>,
    /// The token of the current term, or of the last one.
    token: Option<i64>,
    /// When the release must be done, from when the machine has been told of it.
    release_by: Option<Instant>,
    /// The claim followed close on another one of its supervisor, so a third may follow on this one: the session stays.
    is_quick: bool,
    /// The action that is under way waits for the lock only if somebody wants it whatever it takes.
    is_patient: bool,
    /// The annotation was made for the statement before, which found the lock taken, and serves for the first slice too.
    is_annotated: bool,
}

/// What a thread may do that helps out.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Help {
    /// What is over, even at a server that does not answer, before the time is up, if there is one; and waiting for the lock
    /// only if it is `patient`.
    Acquire { until: Option<Instant>, patient: bool },
    /// Nothing but what ends the claim.
    Release,
}

impl Work {
    /// Takes up a claim, with a session if one is at hand.
    pub(crate) fn begin(
        terms: &Arc<Terms>,
        claim: Arc<Claim>,
        slot: Option<PooledSlot>,
        is_quick: bool,
    ) -> Self {
        let epoch = Instant::now();
        let timing = Timing {
            term: terms.plan.term(),
            doubt: terms.doubt(),
            heartbeat: terms.plan.heartbeat,
            rhythm: terms.pool.rhythm(epoch),
        };
        Self {
            terms: Arc::clone(terms),
            request: terms.request.clone(),
            claim,
            machine: Machine::new(timing, fastrand::u64(..)),
            epoch,
            slot,
            link: None,
            lost_backends: Vec::new(),
            in_doubt_until: Time::ZERO,
            end_announced: false,
            problem: None,
            warned: None,
            token: None,
            release_by: None,
            is_quick,
            is_patient: false,
            is_annotated: false,
        }
    }

    pub(crate) fn claim(&self) -> &Arc<Claim> {
        &self.claim
    }

    /// What is to be done next.
    pub(crate) fn next(&mut self) -> Action {
        if self.release_by.is_none()
            && let Some(by) = self.claim.ends_by()
        {
            self.release_by = Some(by);
            self.take_in(Event::Release);
        }
        self.machine.action()
    }

    /// By when `action` is over, whatever the server does, if a thread that helps out may do it.
    pub(crate) fn allows(&mut self, help: Help, action: Action) -> Option<Instant> {
        match (action, help) {
            (Action::Connect, Help::Acquire { until, .. }) => {
                let by = Instant::now() + self.terms.pool.takes_at_most();
                if until.is_some_and(|until| until < by)
                    && !self.slot.as_mut().is_some_and(|slot| slot.is_open())
                {
                    self.slot = Some(self.terms.pool.take_open()?);
                }
                Some(by)
            }
            // A slow valuer must not outlast a caller's patience.
            (Action::Try | Action::Queue, Help::Acquire { until: Some(_), .. })
                if !self.terms.annotates_fast() =>
            {
                None
            }
            (Action::Try, Help::Acquire { until, patient }) => {
                self.is_patient = patient;
                let by = self.after_try();
                until.is_none_or(|until| by <= until).then_some(by)
            }
            (Action::Queue, Help::Acquire { until, patient: true }) => {
                let by = self.terms.after_slice();
                self.terms.may_wait(until).then_some(by)
            }
            (Action::Unlock | Action::Settle | Action::Discard, _) => self.release_by,
            _ => None,
        }
    }

    /// Does what `action` says.
    pub(crate) fn perform(&mut self, action: Action) {
        let event = self.act(action);
        self.take_in(event);
    }

    /// Gives the machine an event, and tells the application what comes of it.
    fn take_in(&mut self, event: Event) {
        let mut notice = self.machine.handle(event, self.now());
        self.announce_doubt(self.machine.in_doubt_until());
        while let Some(announced) = notice {
            notice = if self.announce(announced) {
                None
            } else {
                // The term had run out, and an application thread was the first to see it.
                self.machine.handle(Event::SessionLost(LossReason::LeaseNotRenewed), self.now())
            };
        }
    }

    /// The time for a heartbeat has come, or for another attempt.
    pub(crate) fn is_due(&self, until: Time) -> bool {
        self.now() >= until
    }

    pub(crate) fn wait_is_over(&mut self) {
        self.take_in(Event::Quiet);
    }

    /// Somebody does not want to wait for the end of a pause.
    pub(crate) fn is_wanted(&mut self) {
        self.take_in(Event::Wanted);
    }

    /// Takes in what the server has said by itself. To be called when there is something to read.
    pub(crate) fn listen(&mut self) {
        let by = self.terms.soon();
        if let Err(lost) = self.on_session(|session, _, _| session.listen(by)) {
            self.take_in(lost);
        }
    }

    /// Whether the session is known to be over.
    pub(crate) fn is_cut_off(&mut self) -> bool {
        self.session().is_none_or(|session| session.is_over())
    }

    /// The socket of the session.
    pub(crate) fn socket(&self) -> Option<Socket> {
        self.link.as_ref().and_then(|link| link.control().socket())
    }

    fn session(&mut self) -> Option<&mut Session> {
        self.slot.as_mut().and_then(|slot| slot.session())
    }

    fn act(&mut self, action: Action) -> Event {
        match action {
            Action::Connect => self.connect(),
            // Whoever waits does so by other means.
            Action::Pause { .. } | Action::Watch { .. } | Action::Finish(_) => Event::Quiet,
            Action::Try => {
                self.annotate();
                self.is_annotated = true;
                let by = self.after_try();
                let waits = std::mem::take(&mut self.is_patient);
                self.acquire(Event::Busy, |session, _, request| session.lock_again(request, waits, by))
            }
            Action::Queue => {
                if !std::mem::take(&mut self.is_annotated) {
                    self.annotate();
                }
                let by = self.terms.after_slice();
                self.acquire(Event::SliceOver, |session, link, request| session.queue(request, link, by))
            }
            Action::Renew { by } => {
                let (sent, by) = (self.now(), self.terms.soon().min(self.at(by)));
                self.on_session(|session, _, _| session.heartbeat(by))
                    .map_or_else(|lost| lost, |()| Event::Renewed { sent })
            }
            Action::Unlock => {
                let by = self.release_by();
                // Nobody comes after a stop, and the session is closed: no need to take lease and name off it.
                let stays = self.stays() || self.claim.ends_for(Why::Stopped);
                self.on_session(|session, _, request| session.unlock(request.key, stays, by))
                    .map_or_else(|lost| lost, |held| Event::Unlocked { held })
            }
            Action::Settle => {
                let by = self.release_by();
                let lost: Vec<_> = self.lost_backends.iter().map(|(_, pid)| *pid).collect();
                self.on_session(|session, _, _| session.settle(&lost, by))
                    .map_or_else(|lost| lost, |clear| Event::Settled { clear })
            }
            Action::Discard => self.discard(),
        }
    }

    /// Closes the session. If the server has said that it ends it, whether it has.
    fn discard(&mut self) -> Event {
        /// The server is seldom busy with that for longer, and the next attempt would only wait for the same.
        const AT_MOST: Duration = Duration::from_secs(1);
        let by = (Instant::now() + AT_MOST).min(self.release_by());
        let announced = std::mem::take(&mut self.end_announced);
        let gone = announced && self.session().is_some_and(|session| session.wait_gone(by));
        if let Some(link) = self.link.take() {
            link.close();
        }
        self.claim.announce_no_session();
        if let Some(slot) = &mut self.slot {
            if let Some(session) = slot.session()
                && !gone
            {
                let doubt = self.terms.doubt();
                self.lost_backends.retain(|(since, _)| since.elapsed() <= doubt);
                self.lost_backends.push((Instant::now(), session.backend_pid()));
            }
            slot.taint();
        }
        Event::Discarded { gone }
    }

    /// By when the server must have answered the first statement, which may wait for a foreign lock on the row of the term
    /// if the session has kept its lease.
    fn after_try(&mut self) -> Instant {
        let may_wait = self.is_patient && self.session().is_some_and(|session| session.is_leased());
        self.terms.soon() + if may_wait { self.terms.wait_slice } else { Duration::ZERO }
    }

    /// Whether the session is kept for the next claim.
    fn stays(&self) -> bool {
        self.is_quick && !self.terms.pool.is_crowded() && !self.claim.ends_for(Why::Stopped)
    }

    /// Takes a slot and sees to it that its session is open.
    fn connect(&mut self) -> Event {
        let control = StreamControl::new();
        if !self.claim.announce_connecting(control.clone()) {
            return self.released();
        }
        match self.take_session(&control) {
            Ok(link) => {
                self.link = Some(Arc::clone(&link));
                if !self.claim.announce_session(link) {
                    return self.released();
                }
                Event::Connected
            }
            Err(refusal) => {
                self.claim.announce_no_session();
                let patient = refusal.is_patient();
                self.note(refusal.into_error());
                Event::ConnectFailed { patient }
            }
        }
    }

    fn take_session(&mut self, control: &StreamControl) -> Result<Arc<Link>, Refusal> {
        let pool = &self.terms.pool;
        let slot = match &mut self.slot {
            Some(slot) => slot,
            None => self.slot.insert(pool.take()?),
        };
        pool.open(slot, control)?;
        slot.session().map(|session| session.link()).ok_or_else(Refusal::not_postgres)
    }

    /// The claim is ending.
    fn released(&mut self) -> Event {
        self.release_by = self.claim.ends_by();
        Event::Release
    }

    /// The annotation of the term to come.
    fn annotate(&mut self) {
        if let (Some(valuer), Some(entry)) = (&self.terms.valuer, &mut self.request.entry) {
            let begun = Instant::now();
            entry.annotation = annotate(self.claim.key(), valuer);
            self.terms.valuer_is_fast.store(begun.elapsed() < Duration::from_millis(1), Relaxed);
        }
    }

    /// Asks for the lock, with or without waiting; without it, `otherwise` is what happened.
    fn acquire(
        &mut self,
        otherwise: Event,
        ask: impl FnOnce(&mut Session, &Link, &Request) -> Result<Answer, Failure>,
    ) -> Event {
        let sent = self.now();
        match self.on_session(ask) {
            Ok(Answer::Granted { token }) => {
                self.token = token;
                self.lost_backends.clear();
                Event::Granted { sent }
            }
            Ok(Answer::NotGranted) => otherwise,
            Ok(Answer::Collision { other }) => self.refused(Refusal::collision(self.claim.key(), &other)),
            Err(failed) => failed,
        }
    }

    /// Runs something on the session; what fails becomes an event.
    fn on_session<T>(
        &mut self,
        run: impl FnOnce(&mut Session, &Link, &Request) -> Result<T, Failure>,
    ) -> Result<T, Event> {
        let session = self.slot.as_mut().and_then(|slot| slot.session());
        let (Some(session), Some(link)) = (session, &self.link) else {
            return Err(Event::SessionLost(LossReason::SupervisorFailed));
        };
        run(session, link, &self.request).map_err(|failure| match failure {
            Failure::Lost { reason, cause } => {
                self.end_announced = reason.is_announced();
                if reason == LossReason::SessionChanged {
                    self.terms.pool.sessions_are_shared();
                }
                self.problem = cause.map(|cause| {
                    let message = format!("the session for {:?} was lost: {reason}", self.claim.key());
                    Error::new(ErrorKind::SessionUnavailable, message).with_source(cause)
                });
                Event::SessionLost(reason)
            }
            refused @ Failure::Refused(_) => self.refused(Refusal::from_failure(refused)),
        })
    }

    /// A statement failed for a reason that is not the session's.
    fn refused(&mut self, refusal: Refusal) -> Event {
        if refusal.is_about_catalog() {
            self.terms.pool.catalog_is_gone();
        }
        let patient = refusal.is_patient();
        self.note(refusal.into_error());
        Event::Refused { patient }
    }

    /// Keeps an error for those who ask, and logs it: the first of its kind in a series loud enough to be heard.
    fn note(&mut self, error: Error) {
        let known = self.warned.replace(error.kind()) == Some(error.kind());
        let level = if known { log::Level::Debug } else { log::Level::Warn };
        log::log!(level, "lock {:?}: {}", self.claim.key(), chain(&error));
        self.problem = Some(error);
    }

    /// Tells the claim until when the server may hold something that this thread cannot reach, if that has changed.
    fn announce_doubt(&mut self, until: Time) {
        if self.in_doubt_until != until {
            self.in_doubt_until = until;
            self.claim.announce_doubt((until > Time::ZERO).then(|| self.at(until)));
        }
    }

    /// Tells the application; `false` if it knows better.
    fn announce(&mut self, notice: Notice) -> bool {
        let claim = &self.claim;
        let key = claim.key();
        match notice {
            Notice::Acquired { until } => {
                log::debug!("lock {key:?}: acquired");
                let until = self.at(until);
                claim.announce_acquired(until, self.token);
                self.terms.pool.watchdog().look_by(until);
                (self.problem, self.warned) = (None, None);
            }
            Notice::Renewed { until } => return claim.announce_renewed(self.at(until)),
            Notice::Busy => {
                claim.announce_queueing();
                (self.problem, self.warned) = (None, None);
            }
            Notice::Lost(reason) => {
                claim.announce_lost(reason);
                let cause =
                    self.problem.take().map(|error| format!(" ({})", chain(&error))).unwrap_or_default();
                log::warn!("lock {key:?}: lost: {reason}{cause}");
            }
            Notice::Failed => claim.announce_problem(self.problem.clone()),
        }
        true
    }

    /// Ends the claim: tells those who wait for it, after `before_told`. What it does not give back is for the next claim.
    pub(crate) fn finish(mut self, end: End, before_told: impl FnOnce(Option<PooledSlot>)) {
        if let Some(link) = self.link.take() {
            link.close();
        }
        self.claim.announce_no_session();
        // Before the end is told: whoever claims the lock next finds the session.
        let mut slot = self.slot.take();
        // A stop closes the sessions when they are all in the pool.
        let stays = !self.claim.ends_for(Why::Stopped)
            && slot.as_mut().is_some_and(|slot| slot.session().is_some_and(|session| session.is_leased()));
        before_told(slot.filter(|_| stays));
        let key = self.claim.key();
        let outcome = match end {
            End::Released => Ok(()),
            End::NotHeld => Err(Error::new(
                ErrorKind::UnlockFailed,
                format!(
                    "the server says that {key:?} was not held: something else unlocked it in our session"
                ),
            )),
            End::Unconfirmed => {
                let message = format!(
                    "the session for {key:?} was lost before the server confirmed the release; \
                     the server frees the lock when it notices, after {:?} at the latest",
                    self.terms.doubt()
                );
                let error = Error::new(ErrorKind::UnlockFailed, message);
                Err(match self.problem.take() {
                    Some(problem) => error.with_source(problem),
                    None => error,
                })
            }
        };
        self.claim.finish(outcome);
    }

    fn now(&self) -> Time {
        self.epoch.elapsed()
    }

    pub(crate) fn at(&self, time: Time) -> Instant {
        // `Time::MAX` stands for no limit; every use takes the earlier of it and another.
        self.epoch.checked_add(time).unwrap_or_else(|| self.terms.soon())
    }

    fn release_by(&self) -> Instant {
        self.release_by.unwrap_or_else(|| Instant::now() + self.terms.release_timeout)
    }
}

impl Drop for Work {
    /// Only after a panic is there something left to do: nobody must wait for what will not come, and a session in doubt
    /// must not go back to the pool.
    fn drop(&mut self) {
        if let Some(slot) = &mut self.slot {
            slot.taint();
        }
        if self.claim.is_over() {
            return;
        }
        self.claim.announce_lost(LossReason::SupervisorFailed);
        let message = format!("the work on {:?} failed; its session was closed", self.claim.key());
        self.claim.finish(Err(Error::new(ErrorKind::UnlockFailed, message)));
    }
}
