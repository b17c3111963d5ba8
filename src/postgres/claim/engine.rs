//! The engine of a claim: turns what the machines ask for into I/O, and what comes of it into events and announcements. Any
//! thread may run it, one at a time.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind, chain};
use crate::loss::LossReason;
use crate::pg::claim::lifecycle::{Action, Event, Lifecycle};
use crate::pg::claim::machine::{self as claim, End, Notice};
use crate::pg::claim::shared::{Claim, EndReason};
use crate::pg::claim::spec::LockSpec;
use crate::pg::pool::PooledSlot;
use crate::pg::session::control::SessionControl;
use crate::pg::session::locks::Answer;
use crate::pg::session::machine::{self as session, Time, Timing};
use crate::pg::session::open::Session;
use crate::pg::session::refusal::Refusal;
use crate::pg::session::wire::Failure;
use crate::pg::sql::Request;
use crate::pg::stream::{Socket, StreamControl};

/// The number of the only claim on a dedicated session.
const CLAIM: usize = 0;

/// One claim on a session of its own.
pub(crate) struct Engine {
    spec: Arc<LockSpec>,
    request: Request,
    claim: Arc<Claim>,
    lifecycle: Lifecycle,
    epoch: Instant,
    /// The right to a session lasts as long as the claim: when a session is lost the next one takes its place.
    slot: Option<PooledSlot>,
    control: Option<Arc<SessionControl>>,
    /// The backends of this claim's lost sessions, whose loss the server may not have noticed yet, and when each was lost.
    lost_backends: Vec<(Instant, i32)>,
    uncertain_until: Time,
    /// The server has said that it ends the session at hand.
    end_announced: bool,
    /// Why the last attempt failed.
    problem: Option<Error>,
    /// The kind of problem that was logged last, so that one that goes on is not logged again and again.
    logged: Option<ErrorKind>,
    /// The token of the current term, or of the last one.
    token: Option<i64>,
    /// When the release must be done, from when the machine has been told of it.
    release_by: Option<Instant>,
    /// The claim followed close on another one of its supervisor, so a third may follow on this one: the session stays.
    is_quick: bool,
    /// The attempt that is about to be made may wait for the lock.
    may_wait: bool,
    /// The server has said since the last wait that another session holds the lock, so this one has nothing of the claim's.
    has_nothing: bool,
    /// The annotation was made for the statement before, which found the lock taken, and serves for the first slice too.
    is_annotated: bool,
}

/// What a caller's thread may do.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Caller {
    /// What is over, even at a server that does not answer, before `until`; waiting for the lock only if it `waits`. The
    /// supervisor makes a caller leave that `is_cancellable`, but not from code of the application's.
    Acquires { until: Option<Instant>, waits: bool, is_cancellable: bool },
    /// Nothing but what ends the claim.
    Releases,
}

impl Engine {
    /// Takes up a claim, with a session if one is at hand.
    pub(crate) fn begin(
        spec: &Arc<LockSpec>,
        claim: Arc<Claim>,
        slot: Option<PooledSlot>,
        is_quick: bool,
    ) -> Self {
        let epoch = Instant::now();
        let timing = Timing {
            term: spec.plan.term(),
            heartbeat: spec.plan.heartbeat,
            rhythm: spec.pool.rhythm(epoch),
            begins_fresh: claim.has_grace(),
        };
        Self {
            spec: Arc::clone(spec),
            request: spec.request.clone(),
            claim,
            lifecycle: Lifecycle::dedicated(
                timing,
                spec.uncertainty_window(),
                spec.request.shared,
                fastrand::u64(..),
            ),
            epoch,
            slot,
            control: None,
            lost_backends: Vec::new(),
            uncertain_until: Time::ZERO,
            end_announced: false,
            problem: None,
            logged: None,
            token: None,
            release_by: None,
            is_quick,
            may_wait: false,
            has_nothing: false,
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
            self.take_in(Event::Claim(CLAIM, claim::Event::Release));
        }
        self.lifecycle.action()
    }

    /// True if a caller's thread may do `action`.
    pub(crate) fn allows(&mut self, caller: Caller, action: Action) -> bool {
        match (action, caller) {
            (Action::Session(session::Action::Open), Caller::Acquires { until, .. }) => {
                let by = Instant::now() + self.spec.pool.takes_at_most();
                if until.is_some_and(|until| until < by)
                    && !self.slot.as_mut().is_some_and(|slot| slot.is_open())
                {
                    let open = self.spec.pool.take_open();
                    let is_open = open.is_some();
                    self.slot = open.or(self.slot.take());
                    return is_open;
                }
                true
            }
            // A slow valuer must not outlast a caller's patience.
            (
                Action::Claim(_, claim::Action::Try | claim::Action::Queue),
                Caller::Acquires { until, is_cancellable, .. },
            ) if (until.is_some() || is_cancellable) && !self.spec.annotates_fast() => false,
            (Action::Claim(_, claim::Action::Try), Caller::Acquires { until, waits, .. }) => {
                self.may_wait = waits && until.is_none_or(|until| self.spec.after_slice() <= until);
                until.is_none_or(|until| self.after_try() <= until)
            }
            (Action::Claim(_, claim::Action::Queue), Caller::Acquires { until, waits, .. }) => {
                waits && until.is_none_or(|until| self.spec.after_slice() <= until)
            }
            (Action::Claim(_, claim::Action::Unlock | claim::Action::Settle), caller)
            | (Action::Session(session::Action::Close), caller) => {
                // A caller that wants the lock has a context, which does not bound another thread's release.
                self.release_by.is_some()
                    && (matches!(caller, Caller::Releases) || self.claim.is_for_one_term())
            }
            _ => false,
        }
    }

    /// Does what `action` says, and takes in what came of it.
    pub(crate) fn perform(&mut self, action: Action) {
        let event = match action {
            Action::Session(session::Action::Open) => self.open_session(),
            Action::Session(session::Action::Renew { by }) => self.renew(by),
            Action::Session(session::Action::Close) => self.close_session(),
            Action::Claim(_, claim::Action::Try) => self.try_lock(),
            Action::Claim(_, claim::Action::Queue) => self.queue(),
            Action::Claim(_, claim::Action::Unlock) => self.unlock(),
            Action::Claim(_, claim::Action::Settle) => self.settle(),
            // Nothing is to be done but to wait, and the end is for whoever ends the engine.
            Action::Session(
                session::Action::Pause { .. } | session::Action::Serve | session::Action::Watch { .. },
            )
            | Action::Claim(_, claim::Action::Wait | claim::Action::Finish(_)) => return,
        };
        self.take_in(event);
        self.claim.tell();
    }

    /// The time for a heartbeat has come, or for another attempt.
    pub(crate) fn is_due(&self, until: Time) -> bool {
        self.now() >= until
    }

    pub(crate) fn time_has_passed(&mut self) {
        self.take_in(Event::Session(session::Event::TimePassed));
        self.claim.tell();
    }

    /// Somebody does not want to wait for the end of a pause.
    pub(crate) fn is_wanted(&mut self) {
        self.take_in(Event::Session(session::Event::Wanted));
    }

    /// Takes in what the server has said by itself. To be called when there is something to read.
    pub(crate) fn listen(&mut self) {
        let by = self.spec.soon();
        if let Err(lost) = self.on_session(|session, _, _| session.listen(by)) {
            self.take_in(lost);
        }
        self.claim.tell();
    }

    /// True if there is something to read on the session.
    pub(crate) fn has_news(&self) -> bool {
        self.socket().is_some_and(|socket| socket.has_news())
    }

    /// True if there is an open session at hand.
    pub(crate) fn has_session(&self) -> bool {
        self.slot.as_ref().is_some_and(|slot| slot.is_open())
    }

    /// True if the session is known to be over.
    pub(crate) fn is_cut_off(&mut self) -> bool {
        self.session().is_none_or(|session| session.is_over())
    }

    /// The socket of the session.
    pub(crate) fn socket(&self) -> Option<Socket> {
        self.control.as_ref().and_then(|control| control.stream().socket())
    }

    pub(crate) fn at(&self, time: Time) -> Instant {
        // `Time::MAX` stands for no limit; every use takes the earlier of it and another.
        self.epoch.checked_add(time).unwrap_or_else(|| self.spec.soon())
    }

    // The actions on the session.

    /// Takes a slot and sees to it that its session is open.
    fn open_session(&mut self) -> Event {
        let stream = StreamControl::new();
        if !self.claim.announce_connecting(stream.clone()) {
            return self.released();
        }
        let taken = self.take_session(&stream);
        self.spec.pool.tell_of_sessions();
        match taken {
            Ok(control) => {
                self.control = Some(Arc::clone(&control));
                if !self.claim.announce_session(control) {
                    return self.released();
                }
                Event::Session(session::Event::Opened)
            }
            Err(refusal) => {
                self.claim.announce_no_session();
                let patient = refusal.is_patient();
                self.note(refusal.into_error());
                Event::Session(session::Event::OpenFailed { patient })
            }
        }
    }

    fn take_session(&mut self, stream: &StreamControl) -> Result<Arc<SessionControl>, Refusal> {
        let pool = &self.spec.pool;
        let slot = match &mut self.slot {
            Some(slot) => slot,
            None => self.slot.insert(pool.take(!self.claim.has_others())?),
        };
        pool.open(slot, stream)?;
        slot.session().map(|session| session.control()).ok_or_else(Refusal::not_postgres)
    }

    fn renew(&mut self, by: Time) -> Event {
        let (sent, term_ends) = (self.now(), self.at(by));
        // Who has a grace is to have all of it, from the warning to the end of the lease.
        let by = if self.claim.has_grace() { term_ends } else { self.spec.soon().min(term_ends) };
        match self.on_session(|session, _, _| session.heartbeat(by)) {
            Ok(()) => {
                self.claim.note_heartbeat(self.now() - sent);
                Event::Session(session::Event::Renewed { sent })
            }
            // Nothing is known of a session that does not say whether it holds its lock.
            Err(Event::Claim(..)) => Event::Session(session::Event::Lost(LossReason::ServerError)),
            Err(lost) => lost,
        }
    }

    /// Closes the session. The event says whether the server is known to have ended it.
    fn close_session(&mut self) -> Event {
        /// The server is seldom busy with that for longer, and the next attempt would only wait for the same.
        const AT_MOST: Duration = Duration::from_secs(1);
        let by = (Instant::now() + AT_MOST).min(self.release_by());
        let announced = std::mem::take(&mut self.end_announced);
        let gone = announced && self.session().is_some_and(|session| session.wait_gone(by));
        self.leave_session();
        if let Some(slot) = &mut self.slot {
            if let Some(session) = slot.session()
                && !gone
            {
                let window = self.spec.uncertainty_window();
                self.lost_backends.retain(|(since, _)| since.elapsed() <= window);
                self.lost_backends.push((Instant::now(), session.backend_pid()));
            }
            slot.taint();
        }
        Event::Session(session::Event::Closed { gone })
    }

    /// Takes the session away from the claim: no other thread can reach it any more.
    fn leave_session(&mut self) {
        if let Some(control) = self.control.take() {
            control.close();
        }
        self.claim.announce_no_session();
    }

    // The actions of the claim.

    fn try_lock(&mut self) -> Event {
        self.annotate();
        self.is_annotated = true;
        let by = self.after_try();
        let waits = std::mem::take(&mut self.may_wait);
        if waits && self.is_contended() && self.claim.begin_unasked_wait() {
            // The lock was taken when this session asked last. So one statement does what the try and the first slice would do in
            // two.
            let event =
                self.ask(claim::Event::Busy, |session, control, request| session.queue(request, control, by));
            self.claim.end_unasked_wait();
            return event;
        }
        self.ask(claim::Event::Busy, |session, _, request| session.try_lock(request, waits, by))
    }

    fn queue(&mut self) -> Event {
        if !std::mem::take(&mut self.is_annotated) {
            self.annotate();
        }
        let by = self.spec.after_slice();
        self.ask(claim::Event::SliceOver, |session, control, request| session.queue(request, control, by))
    }

    fn unlock(&mut self) -> Event {
        let by = self.release_by();
        // Nobody comes after a stop, and the session is closed: no need to take lease and name off it.
        let stays = self.stays() || self.claim.ends_for(EndReason::Stopped);
        self.on_session(|session, _, request| session.unlock(request, stays, by))
            .map_or_else(|failed| failed, |held| Event::Claim(CLAIM, claim::Event::Unlocked { held }))
    }

    fn settle(&mut self) -> Event {
        if self.has_nothing && self.lost_backends.is_empty() && self.stays() {
            return Event::Claim(CLAIM, claim::Event::Settled { clear: true });
        }
        let by = self.release_by();
        let lost: Vec<_> = self.lost_backends.iter().map(|(_, pid)| *pid).collect();
        self.on_session(|session, _, _| session.settle(&lost, by))
            .map_or_else(|failed| failed, |clear| Event::Claim(CLAIM, claim::Event::Settled { clear }))
    }

    /// Asks for the lock, with or without waiting; without it, `otherwise` is what happened.
    fn ask(
        &mut self,
        otherwise: claim::Event,
        ask: impl FnOnce(&mut Session, &SessionControl, &Request) -> Result<Answer, Failure>,
    ) -> Event {
        let sent = self.now();
        let outcome = self.on_session(ask);
        self.has_nothing = matches!(outcome, Ok(Answer::Taken));
        match outcome {
            Ok(Answer::Granted { token }) => {
                self.token = token;
                if !self.request.shared {
                    self.lost_backends.clear();
                }
                Event::Claim(CLAIM, claim::Event::Granted { sent })
            }
            Ok(Answer::NotGranted | Answer::Taken) => Event::Claim(CLAIM, otherwise),
            Ok(Answer::Collision { other }) => self.refused(Refusal::collision(self.claim.key(), &other)),
            Err(failed) => failed,
        }
    }

    /// By when the server must have answered the first statement. It may wait for another transaction's lock on the row of
    /// the term, if the session has kept its lease; and for the lock, if that is contended.
    fn after_try(&mut self) -> Instant {
        if self.may_wait && self.is_contended() {
            return self.spec.after_slice();
        }
        let may_wait = self.may_wait && self.session().is_some_and(|session| session.is_leased());
        self.spec.soon() + if may_wait { self.spec.wait_slice } else { Duration::ZERO }
    }

    /// True if this session waited for this very lock the last time, for a short while.
    fn is_contended(&mut self) -> bool {
        let (key, shape) = (self.request.key, self.request.shape());
        self.session().is_some_and(|session| session.is_contended(key, shape))
    }

    /// True if the session is kept for the next claim.
    fn stays(&self) -> bool {
        self.is_quick && !self.spec.pool.is_crowded() && !self.claim.ends_for(EndReason::Stopped)
    }

    /// Makes the annotation of the term to come.
    fn annotate(&mut self) {
        if let Some(entry) = &mut self.request.entry
            && self.spec.valuer.is_some()
        {
            entry.annotation = self.spec.annotation(self.claim.key());
        }
    }

    /// The claim is ending.
    fn released(&mut self) -> Event {
        self.release_by = self.claim.ends_by();
        Event::Claim(CLAIM, claim::Event::Release)
    }

    // What both have in common.

    fn session(&mut self) -> Option<&mut Session> {
        self.slot.as_mut().and_then(|slot| slot.session())
    }

    /// Runs something on the session; what fails becomes an event.
    fn on_session<T>(
        &mut self,
        run: impl FnOnce(&mut Session, &SessionControl, &Request) -> Result<T, Failure>,
    ) -> Result<T, Event> {
        let session = self.slot.as_mut().and_then(|slot| slot.session());
        let (Some(session), Some(control)) = (session, &self.control) else {
            return Err(Event::Session(session::Event::Lost(LossReason::SupervisorFailed)));
        };
        run(session, control, &self.request).map_err(|failure| match failure {
            Failure::Lost { reason, cause } => {
                self.end_announced = reason.is_announced();
                if reason == LossReason::SessionChanged {
                    self.spec.pool.sessions_are_shared();
                }
                self.problem = cause.map(|cause| {
                    let message = format!("the session for {:?} was lost: {reason}", self.claim.key());
                    Error::new(ErrorKind::SessionUnavailable, message).with_source(cause)
                });
                Event::Session(session::Event::Lost(reason))
            }
            refused @ Failure::Refused(_) => self.refused(Refusal::from_failure(refused)),
        })
    }

    /// A statement failed for a reason that is not the session's.
    fn refused(&mut self, refusal: Refusal) -> Event {
        if refusal.is_about_catalog() {
            self.spec.pool.catalog_is_gone();
        }
        let patient = refusal.is_patient();
        self.note(refusal.into_error());
        Event::Claim(CLAIM, claim::Event::Refused { patient })
    }

    /// Keeps an error for those who ask, and logs it: the first of its kind in a series as a warning.
    fn note(&mut self, error: Error) {
        // A set of locks begins anew then, many times, and tells of it once.
        let is_of_set = self.claim.has_others() && error.kind() == ErrorKind::PoolExhausted;
        let known = self.logged.replace(error.kind()) == Some(error.kind()) || is_of_set;
        let level = if known { log::Level::Debug } else { log::Level::Warn };
        log::log!(level, "lock {:?}: {}", self.claim.key(), chain(&error));
        self.problem = Some(error);
    }

    // Events and announcements.

    /// Gives the machines an event, and tells the application what comes of it.
    fn take_in(&mut self, event: Event) {
        let mut notices = self.lifecycle.handle(event, self.now());
        self.announce_uncertainty();
        while let Some((_, notice)) = notices.pop() {
            if let Err(reason) = self.announce(notice) {
                let lost = session::Event::Lost(reason);
                notices = self.lifecycle.handle(Event::Session(lost), self.now());
                self.announce_uncertainty();
            }
        }
    }

    /// Tells the claim until when the server may hold something that this thread cannot reach, if that has changed.
    fn announce_uncertainty(&mut self) {
        let until = self.lifecycle.uncertain_until(CLAIM);
        if self.uncertain_until != until {
            self.uncertain_until = until;
            self.claim.announce_uncertainty((until > Time::ZERO).then(|| self.at(until)));
        }
    }

    /// Tells the application. Fails if the term is over for the application already: with the reason to give the session up.
    fn announce(&mut self, notice: Notice) -> Result<(), LossReason> {
        let claim = &self.claim;
        let key = claim.key();
        match notice {
            Notice::Acquired { until } => {
                let until = self.at(until);
                if !claim.announce_acquired(until, self.token) {
                    return Err(LossReason::ConnectionClosed);
                }
                log::debug!("lock {key:?}: acquired");
                self.spec.pool.watchdog().look_by(claim.deadline().unwrap_or(until));
                (self.problem, self.logged) = (None, None);
            }
            // The term had run out, and an application thread was the first to see it.
            Notice::Renewed { until } if !claim.announce_renewed(self.at(until)) => {
                return Err(LossReason::LeaseNotRenewed);
            }
            Notice::Renewed { .. } => {}
            Notice::Busy => {
                claim.announce_queueing();
                (self.problem, self.logged) = (None, None);
            }
            Notice::Lost(reason) => {
                claim.announce_lost(reason);
                let cause =
                    self.problem.take().map(|error| format!(" ({})", chain(&error))).unwrap_or_default();
                log::warn!("lock {key:?}: lost: {reason}{cause}");
            }
            Notice::Failed => claim.announce_problem(self.problem.clone()),
        }
        Ok(())
    }

    /// Ends the claim: first gives `before_told` the slot whose session is kept for the next claim, if any, and then tells those
    /// who wait for the end.
    pub(crate) fn finish(mut self, end: End, before_told: impl FnOnce(Option<PooledSlot>)) {
        self.leave_session();
        // Before the end is told: whoever claims the lock next finds the session.
        let mut slot = self.slot.take();
        // A stop closes the sessions when they are all in the pool.
        let stays = !self.claim.ends_for(EndReason::Stopped)
            && slot.as_mut().is_some_and(|slot| slot.session().is_some_and(|session| session.is_leased()));
        before_told(slot.filter(|_| stays));
        self.spec.pool.tell_of_sessions();
        self.claim.tell();
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
                    self.spec.uncertainty_window()
                );
                let error = Error::new(ErrorKind::UnlockFailed, message);
                Err(match self.problem.take() {
                    Some(problem) => error.with_source(problem),
                    None => error,
                })
            }
        };
        if let Err(error) = &outcome {
            self.claim.note_trouble(error);
            self.claim.tell();
        }
        self.claim.finish(outcome);
    }

    fn now(&self) -> Time {
        self.epoch.elapsed()
    }

    fn release_by(&self) -> Instant {
        self.release_by.unwrap_or_else(|| Instant::now() + self.spec.release_timeout)
    }
}

impl Drop for Engine {
    /// Only after a panic is there something left to do: nobody must wait for what will not come, and a session whose state
    /// is not known must not go back to the pool.
    fn drop(&mut self) {
        if let Some(mut slot) = self.slot.take() {
            slot.taint();
            drop(slot);
            self.spec.pool.tell_of_sessions();
        }
        self.claim.abandon();
        self.claim.tell();
    }
}
