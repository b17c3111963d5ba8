//! The thread of a claim: turns the machine's actions into I/O, and what comes of it into events and signals.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError};

use super::claim::{Claim, Command};
use super::config::LeasePlan;
use super::link::Link;
use super::pool::{Pool, PooledSlot, Refusal};
use super::session::{Answer, Failure, Request, Session};
use super::state::{Action, End, Event, Machine, Notice, Time, Timing};
use super::stream::StreamControl;
use crate::error::{Error, ErrorKind, chain};
use crate::lock::{LockValuer, annotate};
use crate::loss::LossReason;

/// All that the thread of a claim works with.
pub(super) struct Supervisor {
    pub(super) request: Request,
    pub(super) valuer: Option<LockValuer>,
    pub(super) plan: LeasePlan,
    pub(super) wait_slice: Duration,
    pub(super) release_timeout: Duration,
    pub(super) pool: Arc<Pool>,
    pub(super) claim: Arc<Claim>,
    pub(super) commands: Receiver<Command>,
}

/// The supervisor at work.
struct Running {
    supervisor: Supervisor,
    epoch: Instant,
    /// The whole claim's: when a session is lost the next one takes its place.
    slot: Option<PooledSlot>,
    link: Option<Arc<Link>>,
    /// Who served the sessions of this claim that were lost and may be in doubt still, and when that was.
    lost_backends: Vec<(Instant, i32)>,
    in_doubt_until: Time,
    /// Why the last attempt failed.
    problem: Option<Error>,
    /// What sort of problem was logged last, so that one that goes on is not logged again and again.
    warned: Option<ErrorKind>,
    /// The token of the current term, or of the last one.
    token: Option<i64>,
    /// When the release must be done.
    release_by: Option<Instant>,
}

impl Supervisor {
    /// How long the server may hold something for a session that was lost without its knowing.
    fn doubt(&self) -> Duration {
        // A slice may wait twice: for the lock, and for the row of a predecessor's fenced transaction.
        self.plan.lease + 2 * self.wait_slice
    }

    /// The body of the thread.
    pub(super) fn run(self) {
        let timing = Timing { term: self.plan.term(), doubt: self.doubt(), heartbeat: self.plan.heartbeat };
        let mut machine = Machine::new(timing, fastrand::u64(..));
        let mut running = Running {
            supervisor: self,
            epoch: Instant::now(),
            slot: None,
            link: None,
            lost_backends: Vec::new(),
            in_doubt_until: Time::ZERO,
            problem: None,
            warned: None,
            token: None,
            release_by: None,
        };
        loop {
            let event = match running.command() {
                Some(event) => event,
                None => match machine.action() {
                    Action::Finish(end) => return running.finish(end),
                    action => running.perform(action),
                },
            };
            let mut notice = machine.handle(event, running.now());
            running.announce_doubt(machine.in_doubt_until());
            while let Some(announced) = notice {
                notice = if running.announce(announced) {
                    None
                } else {
                    // The term had run out, and an application thread was the first to see it.
                    machine.handle(Event::SessionLost(LossReason::LeaseNotRenewed), running.now())
                };
            }
        }
    }
}

impl Running {
    /// A command that has come in, as an event.
    fn command(&mut self) -> Option<Event> {
        self.supervisor.commands.try_recv().ok().map(|command| self.obey(command))
    }

    fn obey(&mut self, command: Command) -> Event {
        let Command::Release { by } = command;
        self.release_by = Some(by);
        Event::Release
    }

    fn perform(&mut self, action: Action) -> Event {
        match action {
            Action::Connect => self.connect(),
            Action::Pause { until } => match self.supervisor.commands.recv_deadline(self.at(until)) {
                Ok(command) => self.obey(command),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => Event::Quiet,
            },
            Action::Try => {
                self.annotate();
                let by = self.soon();
                self.acquire(Event::Busy, |session, _, request| session.try_lock(request, by))
            }
            Action::Queue => {
                // As `Supervisor::doubt` says, a slice may wait twice.
                let by = self.soon() + 2 * self.supervisor.wait_slice;
                self.acquire(Event::SliceOver, |session, link, request| session.queue(request, link, by))
            }
            Action::Watch { until } => {
                let until = self.at(until);
                self.on_session(|session, _, _| session.watch(until))
                    .map_or_else(|lost| lost, |()| Event::Quiet)
            }
            Action::Renew { by } => {
                let (sent, by) = (self.now(), self.soon().min(self.at(by)));
                self.on_session(|session, _, _| session.heartbeat(by))
                    .map_or_else(|lost| lost, |()| Event::Renewed { sent })
            }
            Action::Unlock => {
                let by = self.release_by();
                self.on_session(|session, _, request| session.unlock(request.key, by))
                    .map_or_else(|lost| lost, |held| Event::Unlocked { held })
            }
            Action::Settle => {
                let by = self.release_by();
                let lost: Vec<_> = self.lost_backends.iter().map(|(_, pid)| *pid).collect();
                self.on_session(|session, _, _| session.settle(&lost, by))
                    .map_or_else(|lost| lost, |clear| Event::Settled { clear })
            }
            Action::Discard => {
                if let Some(link) = self.link.take() {
                    link.close();
                }
                self.supervisor.claim.announce_no_session();
                if let Some(slot) = &mut self.slot {
                    if let Some(session) = slot.session() {
                        let doubt = self.supervisor.doubt();
                        self.lost_backends.retain(|(since, _)| since.elapsed() <= doubt);
                        self.lost_backends.push((Instant::now(), session.backend_pid()));
                    }
                    slot.taint();
                }
                Event::Discarded
            }
            // The loop has seen to it.
            Action::Finish(_) => Event::Release,
        }
    }

    /// Takes a slot and sees to it that its session is open.
    fn connect(&mut self) -> Event {
        let control = StreamControl::new();
        if !self.supervisor.claim.announce_connecting(control.clone()) {
            return self.wait_for_release();
        }
        match self.take_session(&control) {
            Ok(link) => {
                self.link = Some(Arc::clone(&link));
                if !self.supervisor.claim.announce_session(link) {
                    return self.wait_for_release();
                }
                Event::Connected
            }
            Err(refusal) => {
                self.supervisor.claim.announce_no_session();
                let patient = refusal.is_patient();
                self.note(refusal.into_error());
                Event::ConnectFailed { patient }
            }
        }
    }

    fn take_session(&mut self, control: &StreamControl) -> Result<Arc<Link>, Refusal> {
        let pool = &self.supervisor.pool;
        let slot = match &mut self.slot {
            Some(slot) => slot,
            None => self.slot.insert(pool.take()?),
        };
        pool.open(slot, control)?;
        slot.session().map(|session| session.link()).ok_or_else(Refusal::not_postgres)
    }

    /// The claim is ending: the command is on its way, a moment behind what the claim's status says.
    fn wait_for_release(&mut self) -> Event {
        match self.supervisor.commands.recv() {
            Ok(command) => self.obey(command),
            Err(_) => Event::Release,
        }
    }

    /// The annotation of the term to come.
    fn annotate(&mut self) {
        if let (Some(valuer), Some(entry)) = (&self.supervisor.valuer, &mut self.supervisor.request.entry) {
            entry.annotation = annotate(self.supervisor.claim.key(), valuer);
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
            Ok(Answer::Collision { other }) => {
                self.refused(Refusal::collision(self.supervisor.claim.key(), &other))
            }
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
        run(session, link, &self.supervisor.request).map_err(|failure| match failure {
            Failure::Lost { reason, cause } => {
                if reason == LossReason::SessionChanged {
                    self.supervisor.pool.sessions_are_shared();
                }
                self.problem = cause.map(|cause| {
                    let message =
                        format!("the session for {:?} was lost: {reason}", self.supervisor.claim.key());
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
            self.supervisor.pool.catalog_is_gone();
        }
        let patient = refusal.is_patient();
        self.note(refusal.into_error());
        Event::Refused { patient }
    }

    /// Keeps an error for those who ask, and logs it: the first of its kind in a series loud enough to be heard.
    fn note(&mut self, error: Error) {
        let known = self.warned.replace(error.kind()) == Some(error.kind());
        let level = if known { log::Level::Debug } else { log::Level::Warn };
        log::log!(level, "lock {:?}: {}", self.supervisor.claim.key(), chain(&error));
        self.problem = Some(error);
    }

    /// Tells the claim until when the server may hold something that this thread cannot reach, if that has changed.
    fn announce_doubt(&mut self, until: Time) {
        if self.in_doubt_until != until {
            self.in_doubt_until = until;
            self.supervisor.claim.announce_doubt((until > Time::ZERO).then(|| self.at(until)));
        }
    }

    /// Tells the application; `false` if it knows better.
    fn announce(&mut self, notice: Notice) -> bool {
        let claim = &self.supervisor.claim;
        let key = claim.key();
        match notice {
            Notice::Acquired { until } => {
                log::debug!("lock {key:?}: acquired");
                claim.announce_acquired(self.at(until), self.token);
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

    /// Puts the session back and tells those who wait for the end.
    fn finish(mut self, end: End) {
        if let Some(link) = self.link.take() {
            link.close();
        }
        self.supervisor.claim.announce_no_session();
        // Before the end is told: whoever claims the lock next finds the session in the pool.
        drop(self.slot.take());
        let key = self.supervisor.claim.key();
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
                     it frees the lock when it notices, after {:?} at the latest",
                    self.supervisor.doubt()
                );
                let error = Error::new(ErrorKind::UnlockFailed, message);
                Err(match self.problem.take() {
                    Some(problem) => error.with_source(problem),
                    None => error,
                })
            }
        };
        self.supervisor.claim.finish(outcome);
    }

    fn now(&self) -> Time {
        self.epoch.elapsed()
    }

    fn at(&self, time: Time) -> Instant {
        // `Time::MAX` stands for no limit; every use takes the earlier of it and another.
        self.epoch.checked_add(time).unwrap_or_else(|| self.soon())
    }

    /// By when the server must have answered a short statement.
    fn soon(&self) -> Instant {
        Instant::now() + self.supervisor.plan.heartbeat_timeout
    }

    fn release_by(&self) -> Instant {
        self.release_by.unwrap_or_else(|| Instant::now() + self.supervisor.release_timeout)
    }
}

impl Drop for Running {
    /// Only after a panic is there something left to do: a session in doubt must not go back to the pool.
    fn drop(&mut self) {
        self.supervisor.claim.announce_lost(LossReason::SupervisorFailed);
        if let Some(slot) = &mut self.slot {
            slot.taint();
        }
    }
}

impl Drop for Supervisor {
    /// Nobody must wait for a thread that is gone, whatever the reason. After a proper end this changes nothing.
    fn drop(&mut self) {
        let message = format!("the supervisor of {:?} failed; its session was closed", self.claim.key());
        self.claim.finish(Err(Error::new(ErrorKind::UnlockFailed, message)));
    }
}
