//! The engine of a claim: turns what the machines ask for into I/O, and what comes of it into events and announcements. Any
//! thread may run it, one at a time.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::clock::Moment;
use crate::error::{Error, ErrorKind, chain};
use crate::expiry::Expiry;
use crate::loss::LossReason;
use crate::pg::claim::claim::Claim;
use crate::pg::claim::lifecycle::{Action, Event, Lifecycle};
use crate::pg::claim::machine::{self as claim, End, Notice, Obstacle};
use crate::pg::claim::spec::LockSpec;
use crate::pg::claim::status::EndReason;
use crate::pg::confirm::{Outcome, Wait, Wanted};
use crate::pg::pool::PooledSlot;
use crate::pg::problem::Problem;
use crate::pg::session::control::SessionControl;
use crate::pg::session::locks::Answer;
use crate::pg::session::machine::{self as session, Confirms, Time, Timing};
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
    epoch: Moment,
    /// The right to a session lasts as long as the claim: when a session is lost the next one takes its place.
    slot: Option<PooledSlot>,
    control: Option<Arc<SessionControl>>,
    uncertain_until: Time,
    /// The server has said that it ends the session at hand.
    end_announced: bool,
    /// Why the last attempt failed.
    problem: Problem,
    /// The token of the current term, or of the last one.
    token: Option<i64>,
    /// The same of the permit, of a semaphore.
    permit: Option<u32>,
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
    /// When the current term was granted, or the last one.
    granted_at: Instant,
    /// When the takeover grace ends that was found last.
    grace_ends: Instant,
    /// Which of the lock's terms was asked for last, whether it is the newest of the key; it was not.
    unproven: Option<i64>,
}

/// What a caller's thread may do.
#[derive(Clone, Copy, Debug)]
pub(crate) enum CallKind {
    /// What is over, even at a server that does not answer, before `until`; waiting for the lock only if it `waits`. The
    /// supervisor makes a caller leave that `is_cancellable`, but not from code of the application's.
    Acquire { until: Option<Instant>, waits: bool, is_cancellable: bool },
    /// Nothing but what ends the claim.
    Release,
}

impl Engine {
    /// Takes up a claim, with a session if one is at hand.
    pub(crate) fn begin(
        spec: &Arc<LockSpec>,
        claim: Arc<Claim>,
        slot: Option<PooledSlot>,
        is_quick: bool,
    ) -> Self {
        let epoch = Moment::now();
        let timing = Timing {
            term: spec.plan.term(),
            heartbeat: spec.plan.heartbeat,
            rhythm: spec.pool.rhythm(epoch),
            begins_fresh: claim.wants_warning(),
            confirms: spec.pool.confirms(),
        };
        // Sessions that it shared with others may have left something behind.
        let uncertain_until =
            claim.uncertain_until().map_or(Time::ZERO, |until| until.saturating_duration_since(epoch));
        let machine = claim::Machine::new(spec.uncertainty_window(), spec.request.mode.is_shared())
            .uncertain_until_then(uncertain_until);
        Self {
            spec: Arc::clone(spec),
            request: spec.request.clone(),
            claim,
            lifecycle: Lifecycle::dedicated(timing, machine, fastrand::u64(..)),
            epoch,
            slot,
            control: None,
            uncertain_until,
            end_announced: false,
            problem: Problem::default(),
            token: None,
            permit: None,
            release_by: None,
            is_quick,
            may_wait: false,
            has_nothing: false,
            is_annotated: false,
            granted_at: Instant::now(),
            grace_ends: Instant::now(),
            unproven: None,
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
    pub(crate) fn prepare_for(&mut self, caller: CallKind, action: Action) -> bool {
        match (action, caller) {
            (Action::Session(session::Action::Open), CallKind::Acquire { until, .. }) => {
                let by = Instant::now() + self.spec.pool.takes_at_most();
                if until.is_some_and(|until| until < by)
                    && !self.slot.as_mut().is_some_and(|slot| slot.is_ready())
                {
                    let open = self.spec.pool.slots().take_open();
                    let is_open = open.is_some();
                    self.slot = open.or(self.slot.take());
                    return is_open;
                }
                true
            }
            // A slow valuer must not outlast a caller's patience.
            (
                Action::Claim(_, claim::Action::Try | claim::Action::Queue),
                CallKind::Acquire { until, is_cancellable, .. },
            ) if (until.is_some() || is_cancellable) && !self.spec.annotates_fast() => false,
            (Action::Claim(_, claim::Action::Try), CallKind::Acquire { until, waits, .. }) => {
                self.may_wait = waits && until.is_none_or(|until| self.spec.after_slice() <= until);
                until.is_none_or(|until| self.after_try() <= until)
            }
            (Action::Claim(_, claim::Action::Queue), CallKind::Acquire { until, waits, .. }) => {
                waits && until.is_none_or(|until| self.spec.after_slice() <= until)
            }
            (Action::Claim(_, claim::Action::Unlock | claim::Action::Settle), caller)
            | (Action::Session(session::Action::Close), caller) => {
                // A caller that wants the lock has a context, which does not bound another thread's release.
                self.release_by.is_some()
                    && (matches!(caller, CallKind::Release) || self.claim.is_for_one_term())
            }
            _ => false,
        }
    }

    /// Does what `action` says, and takes in what came of it.
    pub(crate) fn perform(&mut self, action: Action) {
        let event = match action {
            Action::Session(session::Action::Open) => self.open_session(),
            Action::Session(session::Action::Renew { by }) => self.renew(by),
            Action::Session(session::Action::Confirm { sent, by, granted, last }) => {
                self.confirm(sent, by, granted, last)
            }
            Action::Session(session::Action::Close) => self.close_session(),
            Action::Claim(_, claim::Action::Try) => self.try_lock(),
            Action::Claim(_, claim::Action::Queue) => self.queue(),
            Action::Claim(_, claim::Action::Unlock) => self.unlock(),
            Action::Claim(_, claim::Action::Settle) => self.settle(),
            // Nothing is to be done but to wait, and the end is for whoever ends the engine.
            Action::Session(
                session::Action::Pause { .. } | session::Action::Serve | session::Action::Watch { .. },
            )
            | Action::Claim(
                _,
                claim::Action::Wait | claim::Action::Pause { .. } | claim::Action::Finish(_),
            ) => return,
        };
        self.take_in(event);
        self.claim.tell();
    }

    /// The time for a heartbeat has come, or for another attempt.
    pub(crate) fn is_due(&self, until: Time) -> bool {
        self.now() >= until
    }

    pub(crate) fn pass_time(&mut self) {
        self.take_in(Event::Session(session::Event::TimePassed));
        self.claim.tell();
    }

    /// The time has come to look again whether the takeover grace is over.
    pub(crate) fn end_pause(&mut self) {
        self.take_in(Event::Claim(CLAIM, claim::Event::TimePassed));
    }

    /// Somebody does not want to wait for the end of a pause.
    pub(crate) fn attempt_now(&mut self) {
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
    pub(crate) fn is_readable(&self) -> bool {
        self.socket().is_some_and(|socket| socket.is_readable())
    }

    /// True if there is an open session at hand.
    pub(crate) fn has_session(&self) -> bool {
        self.slot.as_ref().is_some_and(|slot| slot.is_ready())
    }

    /// True if the session is known to be over.
    pub(crate) fn is_cut_off(&mut self) -> bool {
        self.session().is_none_or(|session| session.is_over())
    }

    /// The socket of the session.
    pub(crate) fn socket(&self) -> Option<Socket> {
        self.control.as_ref().and_then(|control| control.stream().socket())
    }

    /// When to stop waiting for `time`, or when a call must be over.
    pub(crate) fn at(&self, time: Time) -> Instant {
        // `Time::MAX` stands for no limit; every use takes the earlier of it and another.
        self.epoch.checked_add(time).map_or_else(|| self.spec.soon(), Moment::instant)
    }

    /// The end of something that is counted in the machine's time.
    fn moment(&self, time: Time) -> Moment {
        self.epoch.checked_add(time).unwrap_or_else(Moment::now)
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
                let needs_operator = refusal.needs_operator();
                self.note(refusal.into_error());
                Event::Session(session::Event::OpenFailed { needs_operator })
            }
        }
    }

    fn take_session(&mut self, stream: &StreamControl) -> Result<Arc<SessionControl>, Refusal> {
        let pool = &self.spec.pool;
        let slot = match &mut self.slot {
            Some(slot) => slot,
            None => self.slot.insert(pool.slots().take(!self.claim.has_others())?),
        };
        pool.open(slot, stream)?;
        slot.session().map(|session| session.control()).ok_or_else(Refusal::not_postgres)
    }

    fn renew(&mut self, by: Time) -> Event {
        let (sent, term_ends) = (self.now(), self.at(by));
        // Who has a grace is to have all of it, from the warning to the end of the lease.
        let by = if self.claim.wants_warning() { term_ends } else { self.spec.soon().min(term_ends) };
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

    /// Waits until what was sent, or granted, is confirmed; for a heartbeat's timeout, and then sends a heartbeat first.
    fn confirm(&mut self, sent: Option<Time>, by: Time, granted: Option<Time>, last: Time) -> Event {
        let [sent, granted] = [sent, granted].map(|time| time.map(|time| self.moment(time)));
        let wanted = Wanted { sent, granted, last: self.moment(last) };
        let (pool, claim) = (Arc::clone(&self.spec.pool), Arc::clone(&self.claim));
        let (answer_within, by) = (self.spec.plan.heartbeat_timeout, self.at(by));
        let wait = Wait { since: Instant::now(), by, leaves: || claim.is_ending(), answer_within };
        claim.announce_unconfirmed(pool.confirms());
        match self.on_session(|session, _, _| pool.confirm(session, &wanted, &wait)) {
            Ok(Outcome::Confirmed { followed, open }) => {
                claim.announce_unconfirmed(Confirms::Nothing);
                if wanted.is_confirmed(followed, open) && self.problem.end() {
                    log::info!("lock {:?}: confirmed; what was in the way is gone", claim.key());
                }
                let [followed, open] = [followed, open].map(|at| at.and_then(|at| at.since(self.epoch)));
                Event::Session(session::Event::Confirmed { followed, open })
            }
            Ok(Outcome::Missing(refusal)) => {
                self.note(refusal.while_held(self.lifecycle.held_for(self.now())).into_error());
                Event::Session(session::Event::Unconfirmed)
            }
            // The release is what is next, or a heartbeat, or the end of the term.
            Ok(Outcome::Left) => {
                if claim.is_ending() {
                    self.forget_grant();
                }
                Event::Session(session::Event::TimePassed)
            }
            Err(event) => {
                self.forget_grant();
                match event {
                    Event::Claim(..) => Event::Session(session::Event::Lost(LossReason::ServerError)),
                    lost => lost,
                }
            }
        }
    }

    /// What was granted and not confirmed is of no use any more. A heartbeat that the standbys have not confirmed is why a term ends.
    fn forget_grant(&self) {
        if self.spec.pool.confirms() == Confirms::Grants {
            self.claim.announce_unconfirmed(Confirms::Nothing);
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
                self.claim.note_lost_backend(session.backend_pid());
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
        let by = self.after_try();
        if let Some(event) = self.look_at_past(by) {
            return event;
        }
        self.annotate();
        self.is_annotated = true;
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

    /// Sees whether the lock may be asked for. It may not while terms may last that began before the server was taken over. Gives what has
    /// happened then.
    fn look_at_past(&mut self, by: Instant) -> Option<Event> {
        let run = self.session()?.pending()?.to_owned();
        let proven_in = match self.proven_in(&run, by) {
            Ok(Some(Duration::ZERO)) => return None,
            Ok(time) => time.unwrap_or(Duration::MAX),
            Err(event) => return Some(event),
        };
        let pool = Arc::clone(&self.spec.pool);
        let left = match self.on_session(|session, _, _| pool.look_at_grace(session, by)) {
            Ok(Ok(left)) => left?,
            Ok(Err(refusal)) => return Some(self.refused(refusal)),
            Err(event) => return Some(event),
        };
        self.grace_ends = Instant::now() + left.all.min(proven_in);
        Some(Event::Claim(
            CLAIM,
            claim::Event::Later {
                until: self.now() + left.look_again.min(proven_in),
                obstacle: Obstacle::Grace,
            },
        ))
    }

    /// How soon nobody else can believe in the lock any more since the newest term of the key was one of this lock's, which is over; `None`
    /// if it was not.
    ///
    /// The holder before that one may have lost its session to an operator, or to the very end of the server, where it is ended a moment before
    /// others; and may be cut off. So the term must have begun as long ago as the longest lease.
    fn proven_in(&mut self, run: &str, by: Instant) -> Result<Option<Duration>, Event> {
        let Some((token, began)) = *self.spec.last_term.lock() else { return Ok(None) };
        let Some(longest_lease) = self.spec.pool.longest_lease(run) else { return Ok(None) };
        if self.unproven == Some(token) {
            return Ok(None);
        }
        if self.on_session(|session, _, request| session.is_newest_term(request, token, by))? {
            return Ok(Some(longest_lease.saturating_sub(began.elapsed())));
        }
        self.unproven = Some(token);
        Ok(None)
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
        let lost = self.claim.lost_backends();
        if self.has_nothing && lost.is_empty() && self.stays() {
            return Event::Claim(CLAIM, claim::Event::Settled { clear: true });
        }
        let by = self.release_by();
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
        self.has_nothing = matches!(outcome, Ok(Answer::Busy));
        match outcome {
            Ok(Answer::Granted { token, permit }) => {
                (self.token, self.permit, self.granted_at) = (token, permit, Instant::now());
                if !self.request.mode.is_shared() {
                    self.claim.forget_lost_backends();
                }
                Event::Claim(CLAIM, claim::Event::Granted { sent })
            }
            Ok(Answer::NotGranted | Answer::Busy) => Event::Claim(CLAIM, otherwise),
            Ok(Answer::Collision { other }) => self.refused(Refusal::collision(self.claim.key(), &other)),
            Ok(Answer::OtherPermits { theirs }) => {
                self.refused(Refusal::other_permits(self.claim.key(), self.request.permits, theirs))
            }
            Ok(Answer::NoEra) => {
                self.spec.pool.forget_catalog();
                self.refused(Refusal::no_era())
            }
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
        self.is_quick && !self.spec.pool.slots().is_crowded() && !self.claim.ends_for(EndReason::Stopped)
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
                    self.spec.pool.probe_again();
                }
                self.problem.keep(cause.map(|cause| {
                    let message = format!("the session for {:?} was lost: {reason}", self.claim.key());
                    Error::new(ErrorKind::SessionUnavailable, message).with_source(cause)
                }));
                Event::Session(session::Event::Lost(reason))
            }
            refused @ Failure::Refused(_) => self.refused(Refusal::from_failure(refused)),
        })
    }

    /// A statement failed for a reason that is not the session's.
    fn refused(&mut self, refusal: Refusal) -> Event {
        if refusal.is_about_catalog() {
            self.spec.pool.forget_catalog();
        }
        let needs_operator = refusal.needs_operator();
        self.note(refusal.into_error());
        Event::Claim(CLAIM, claim::Event::Refused { needs_operator })
    }

    /// Keeps an error for those who ask, and logs it.
    fn note(&mut self, error: Error) {
        // A set of locks begins anew then, many times, and tells of it once.
        let is_of_set = self.claim.has_others() && error.kind() == ErrorKind::PoolExhausted;
        let text = chain(&error);
        let level = self.problem.note(error);
        let level = if is_of_set { log::Level::Debug } else { level };
        log::log!(level, "lock {:?}: {text}", self.claim.key());
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
            self.claim.announce_uncertainty((until > Time::ZERO).then(|| self.moment(until)));
        }
    }

    /// Tells the application. Fails if the term is over for the application already: with the reason to give the session up.
    fn announce(&mut self, notice: Notice) -> Result<(), LossReason> {
        let claim = &self.claim;
        let key = claim.key();
        match notice {
            Notice::Acquired { until } => {
                let until = self.moment(until);
                if !claim.announce_acquired(Arc::new(Expiry::new(until)), self.token, self.permit) {
                    return Err(LossReason::ConnectionClosed);
                }
                self.spec.pool.watchdog().look_by(claim.deadline().unwrap_or_else(|| until.instant()));
                match claim.last_loss() {
                    Some(loss) => {
                        log::info!(
                            "lock {key:?}: acquired again, {:.1?} after its loss",
                            loss.moment.elapsed()
                        );
                    }
                    None => log::debug!("lock {key:?}: acquired"),
                }
                self.problem.end();
            }
            // The term had run out, and an application thread was the first to see it.
            Notice::Renewed { until } if !claim.announce_renewed(self.moment(until)) => {
                return Err(LossReason::LeaseNotRenewed);
            }
            Notice::Renewed { .. } => {}
            Notice::Busy => {
                claim.announce_queueing();
                self.problem.end();
            }
            Notice::InGrace => {
                claim.announce_in_grace(self.grace_ends);
                self.problem.end();
            }
            Notice::Lost(reason) => {
                claim.announce_lost(reason);
                self.spec.note_term_end(self.token, self.granted_at);
                let cause =
                    self.problem.take().map(|error| format!(" ({})", chain(&error))).unwrap_or_default();
                log::warn!("lock {key:?}: lost: {reason}{cause}");
            }
            Notice::Failed => claim.announce_problem(self.problem.last().cloned()),
        }
        Ok(())
    }

    /// Ends the claim: tells the observer, gives `before_told` the slot whose session is kept for the next claim, if any, and then tells those
    /// who wait for the end. What works on the claim counts as free from `before_told` on, so no application code runs after that.
    pub(crate) fn finish(mut self, end: End, before_told: impl FnOnce(Option<PooledSlot>)) {
        self.leave_session();
        self.spec.note_term_end(self.token, self.granted_at);
        // Before the end is told: whoever claims the lock next finds the session.
        let mut slot = self.slot.take();
        if let Some(slot) = &mut slot
            && self.lifecycle.session_action() == session::Action::Close
        {
            // It has refused something.
            slot.taint();
        }
        // A stop closes the sessions when they are all in the pool.
        let stays = !self.claim.ends_for(EndReason::Stopped)
            && slot.as_mut().is_some_and(|slot| slot.session().is_some_and(|session| session.is_leased()));
        let slot = slot.filter(|_| stays);
        self.spec.pool.tell_of_sessions();
        self.claim.tell();
        let outcome = outcome_of(&self.claim, end, self.problem.take());
        self.claim.tell();
        before_told(slot);
        self.claim.finish(outcome);
    }

    fn now(&self) -> Time {
        self.epoch.elapsed()
    }

    fn release_by(&self) -> Instant {
        self.release_by.unwrap_or_else(|| Instant::now() + self.spec.release_timeout)
    }
}

/// The outcome of the release of a claim that has ended as its machine says. The `problem` is the last one that it had.
pub(crate) fn outcome_of(claim: &Claim, end: End, problem: Option<Error>) -> Result<(), Error> {
    let key = claim.key();
    let outcome = match end {
        End::Released => Ok(()),
        End::NotHeld => Err(Error::new(
            ErrorKind::UnlockFailed,
            format!("the server says that {key:?} was not held: something else unlocked it in our session"),
        )),
        End::Unconfirmed => {
            let message = format!(
                "the session for {key:?} was lost before the server confirmed the release; \
                 the server frees the lock when it notices, after {:?} at the latest",
                claim.uncertainty_window()
            );
            let error = Error::new(ErrorKind::UnlockFailed, message);
            Err(match problem {
                Some(problem) => error.with_source(problem),
                None => error,
            })
        }
    };
    if let Err(error) = &outcome {
        claim.note_trouble(error);
    }
    outcome
}

impl Drop for Engine {
    /// Only after a panic is there something left to do: nobody must wait for what will not come, and a session whose state
    /// is not known must not go back to the pool. The loss is announced before the session is closed.
    fn drop(&mut self) {
        self.claim.announce_lost(LossReason::SupervisorFailed);
        if let Some(mut slot) = self.slot.take() {
            slot.taint();
            drop(slot);
            self.spec.pool.tell_of_sessions();
        }
        self.claim.abandon();
        self.claim.tell();
    }
}
