//! The engine of a carrier: turns what the machines of a session and of its many claims ask for into I/O, many claims at once. Any
//! thread may run it, one at a time.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::clock::Moment;
use crate::error::{Error, ErrorKind, chain};
use crate::expiry::Expiry;
use crate::key::AdvisoryKey;
use crate::loss::LossReason;
use crate::mode::Mode;
use crate::pg::carrier::carrier::CarriedClaims;
use crate::pg::carrier::dedicated::DedicatedQuota;
use crate::pg::carrier::seat::Seat;
use crate::pg::claim::claim::Claim;
use crate::pg::claim::engine::outcome_of;
use crate::pg::claim::idle::IdleSupervisors;
use crate::pg::claim::lifecycle::{Event, Lifecycle, Notices};
use crate::pg::claim::machine::{self as claim, End, Notice};
use crate::pg::config::LeasePlan;
use crate::pg::pool::{Pool, PooledSlot};
use crate::pg::problem::Problem;
use crate::pg::session::machine::{self as session, Confirms, Time, Timing};
use crate::pg::session::open::Session;
use crate::pg::session::refusal::Refusal;
use crate::pg::session::wire::Failure;
use crate::pg::stream::Socket;

mod upkeep;
mod work;

/// One session, and the claims that it carries.
pub(crate) struct Engine {
    pool: Arc<Pool>,
    plan: LeasePlan,
    idle: Arc<IdleSupervisors>,
    dedicated: Arc<DedicatedQuota>,
    /// What the watchdog looks at.
    carried: Arc<CarriedClaims>,
    lifecycle: Lifecycle,
    epoch: Moment,
    slot: Option<PooledSlot>,
    /// By number; `None` where one has left.
    seats: Vec<Option<Seated>>,
    vacant: Vec<usize>,
    /// The locks that the session has, or is about to ask for, each with how it is had. The server counts, and would grant one twice.
    owned: HashMap<AdvisoryKey, Mode>,
    /// The claims that ask for something on the session, first come, first served.
    ready: VecDeque<usize>,
    /// When claims that pause ask again. Some of them may do something else by then.
    pauses: BinaryHeap<Reverse<(Time, usize)>>,
    /// Those whose locks were found taken since this was looked at.
    waiting: Vec<usize>,
    /// Those for which the application is to be asked for an annotation first.
    unannotated: Vec<Arc<Seat>>,
    /// Those that are to end, since what was announced has ended them.
    ending: Vec<usize>,
    events: PendingEvents,
    /// When all terms on the session end.
    expiry: Option<Arc<Expiry>>,
    /// As `expiry`, in the time of the machines.
    leased_until: Option<Time>,
    /// The server ends the session when it is silent for the lease.
    has_lease: bool,
    /// When the session was last asked something.
    asked_at: Instant,
    /// When claims were last told why what they wait for is not confirmed.
    told_at: Instant,
    /// The server has said that it ends the session at hand.
    end_announced: bool,
    /// Why the last attempt to have a session failed, or the last heartbeat.
    problem: Problem,
}

/// A claim on the session.
struct Seated {
    seat: Arc<Seat>,
    /// It is in the line of those that ask for something.
    is_ready: bool,
    /// The lock that the session has for it, or is about to ask for. Of a semaphore, the permit that was found.
    lock: Option<AdvisoryKey>,
    /// The permits that were found for this claim and then could not be had, in the attempt that goes on.
    missed: Vec<AdvisoryKey>,
    /// The machine knows that the claim is to end.
    is_released: bool,
    /// The server may hold something for a lost session of the claim.
    is_uncertain: bool,
    /// The token of the current term, or of the last one.
    token: Option<i64>,
    /// When that was granted.
    granted_at: Instant,
    /// How long it paused last.
    pause: Duration,
    /// Which of the lock's terms was asked for last, whether it is the newest of the key; it was not.
    unproven: Option<i64>,
    /// When the takeover grace ends that was found last.
    grace_ends: Instant,
    problem: Problem,
}

impl Seated {
    /// Which permit of its semaphore the session has for it.
    fn permit(&self) -> Option<u32> {
        let is_permit = self.seat.spec().request.mode == Mode::Permit;
        self.lock.filter(|_| is_permit).map(AdvisoryKey::which_permit)
    }
}

/// What the manager's observer is to be told when nobody runs the engine: it may use other locks of the manager.
#[derive(Default)]
pub(crate) struct PendingEvents {
    claims: Vec<Arc<Claim>>,
    /// How many sessions are in use has changed.
    of_sessions: bool,
}

impl PendingEvents {
    pub(crate) fn is_empty(&self) -> bool {
        self.claims.is_empty() && !self.of_sessions
    }

    /// Tells it.
    pub(crate) fn tell(self, pool: &Pool) {
        self.claims.iter().for_each(|claim| claim.tell());
        if self.of_sessions {
            pool.tell_of_sessions();
        }
    }
}

/// What all engines of a carrier have in common.
#[derive(Clone)]
pub(crate) struct CarrierContext {
    pub(crate) pool: Arc<Pool>,
    pub(crate) plan: LeasePlan,
    pub(crate) idle: Arc<IdleSupervisors>,
    pub(crate) dedicated: Arc<DedicatedQuota>,
    pub(crate) carried: Arc<CarriedClaims>,
}

impl Engine {
    pub(crate) fn new(context: CarrierContext) -> Self {
        let CarrierContext { pool, plan, idle, dedicated, carried } = context;
        let epoch = Moment::now();
        let timing = Timing {
            term: plan.term(),
            heartbeat: plan.heartbeat,
            rhythm: pool.rhythm(epoch),
            begins_fresh: true,
            confirms: pool.confirms(),
        };
        Self {
            pool,
            plan,
            idle,
            dedicated,
            carried,
            lifecycle: Lifecycle::carrier(timing, fastrand::u64(..)),
            epoch,
            slot: None,
            seats: Vec::new(),
            vacant: Vec::new(),
            owned: HashMap::new(),
            ready: VecDeque::new(),
            pauses: BinaryHeap::new(),
            waiting: Vec::new(),
            unannotated: Vec::new(),
            ending: Vec::new(),
            events: PendingEvents::default(),
            expiry: None,
            leased_until: None,
            has_lease: false,
            asked_at: Instant::now(),
            told_at: Instant::now(),
            end_announced: false,
            problem: Problem::default(),
        }
    }

    // What whoever runs it asks.

    /// What the session itself has to do next.
    pub(crate) fn session_action(&self) -> session::Action {
        self.lifecycle.session_action()
    }

    /// True if some claim asks for something on the session.
    pub(crate) fn has_work(&self) -> bool {
        !self.ready.is_empty()
    }

    /// True if this claim asks for something on the session.
    pub(crate) fn is_ready(&self, seat: &Seat) -> bool {
        let seated = seat.number().and_then(|number| self.seats.get(number)?.as_ref());
        seated.is_some_and(|seated| seated.is_ready)
    }

    /// True if there is no claim.
    pub(crate) fn is_empty(&self) -> bool {
        self.seats.len() == self.vacant.len()
    }

    /// When the next claim that pauses is to ask again.
    pub(crate) fn next_attempt(&self) -> Option<Time> {
        self.pauses.peek().map(|Reverse((at, _))| *at)
    }

    pub(crate) fn socket(&self) -> Option<Socket> {
        self.slot.as_ref().and_then(|slot| slot.socket())
    }

    /// True if there is something to read on the session.
    pub(crate) fn is_readable(&self) -> bool {
        self.socket().is_some_and(|socket| socket.is_readable())
    }

    /// True if the session is known to be over.
    pub(crate) fn is_cut_off(&mut self) -> bool {
        self.session().is_none_or(|session| session.is_over())
    }

    /// The claims for which the application is to be asked for an annotation.
    pub(crate) fn take_unannotated(&mut self) -> Vec<Arc<Seat>> {
        std::mem::take(&mut self.unannotated)
    }

    /// Those of them that nobody could ask.
    pub(crate) fn put_back_unannotated(&mut self, seats: Vec<Arc<Seat>>) {
        self.unannotated.extend(seats);
    }

    pub(crate) fn has_unannotated(&self) -> bool {
        !self.unannotated.is_empty()
    }

    /// What is to be told when this thread has left the engine.
    pub(crate) fn take_pending_events(&mut self) -> PendingEvents {
        std::mem::take(&mut self.events)
    }

    /// The observer is to be told how many sessions are in use.
    pub(crate) fn note_sessions(&mut self) {
        self.events.of_sessions |= self.pool.is_observed();
    }

    pub(crate) fn has_pending_events(&self) -> bool {
        !self.events.is_empty()
    }

    pub(crate) fn now(&self) -> Time {
        self.epoch.elapsed()
    }

    /// When to stop waiting for `time`.
    pub(crate) fn at(&self, time: Time) -> Instant {
        // `Time::MAX` stands for no limit; every use takes the earlier of it and another.
        self.epoch.checked_add(time).map_or_else(|| self.soon(), Moment::instant)
    }

    fn moment(&self, time: Time) -> Moment {
        self.epoch.checked_add(time).unwrap_or_else(Moment::now)
    }

    /// By when the server must have answered a statement that begins now.
    fn soon(&self) -> Instant {
        Instant::now() + self.plan.heartbeat_timeout
    }

    /// As [`soon`](Self::soon), for what would cost all terms if it were not answered.
    fn answer_by(&self) -> Instant {
        self.carried.answer_by(self.plan.heartbeat_timeout)
    }

    fn session(&mut self) -> Option<&mut Session> {
        self.slot.as_mut().and_then(|slot| slot.session())
    }

    // What comes from outside.

    /// Looks at a claim: takes it in if it is new, and sees whether it is to end.
    pub(crate) fn attend(&mut self, seat: &Arc<Seat>) {
        let claim = seat.claim();
        if let Some(supervisor) = seat.supervisor() {
            return supervisor.wake();
        }
        let number = match seat.number() {
            Some(number) => number,
            None if claim.is_over() => return seat.set_number(None),
            None => self.admit(seat),
        };
        // Its annotation may have been what it waited for.
        self.sort_in(number);
        if claim.is_ending() {
            self.ending.push(number);
        }
        self.end_all();
        if claim.take_attempt_request() {
            self.take_in(Event::Session(session::Event::Wanted));
        }
    }

    fn admit(&mut self, seat: &Arc<Seat>) -> usize {
        let claim = seat.claim();
        let number = self.vacant.pop().unwrap_or(self.seats.len());
        let seated = Seated {
            seat: Arc::clone(seat),
            is_ready: false,
            lock: None,
            missed: Vec::new(),
            is_released: false,
            is_uncertain: false,
            token: None,
            granted_at: Instant::now(),
            pause: Duration::ZERO,
            unproven: None,
            grace_ends: Instant::now(),
            problem: Problem::default(),
        };
        match self.seats.get_mut(number) {
            Some(place) => *place = Some(seated),
            None => self.seats.push(Some(seated)),
        }
        seat.set_number(Some(number));
        self.carried.add(number, claim);
        let spec = seat.spec();
        let machine = claim::Machine::new(spec.uncertainty_window(), spec.request.mode.is_shared());
        self.lifecycle.admit(number, machine, self.now());
        self.sort_in(number);
        number
    }

    /// The session that was to be opened is there, or is not.
    pub(crate) fn opened(&mut self, outcome: Result<PooledSlot, Refusal>) {
        self.note_sessions();
        let event = match outcome {
            Ok(slot) => {
                (self.slot, self.has_lease, self.asked_at) = (Some(slot), false, Instant::now());
                session::Event::Opened
            }
            Err(refusal) => {
                let needs_operator = refusal.needs_operator();
                self.note(refusal.into_error());
                session::Event::OpenFailed { needs_operator }
            }
        };
        self.take_in(Event::Session(event));
    }

    /// The time for a heartbeat has come, or for another attempt to have a session.
    pub(crate) fn pass_time(&mut self) {
        self.take_in(Event::Session(session::Event::TimePassed));
    }

    /// Lets the claims ask again whose pauses are over.
    pub(crate) fn end_pauses(&mut self) {
        let now = self.now();
        while let Some(Reverse((at, number))) = self.pauses.peek().copied() {
            if at > now {
                return;
            }
            self.pauses.pop();
            if let claim::Action::Pause { until } = self.lifecycle.claim_action(number)
                && until <= now
                && self.seats.get(number).is_some_and(Option::is_some)
            {
                self.take_in(Event::Claim(number, claim::Event::TimePassed));
            }
        }
    }

    /// Takes in what the server has said by itself. To be called when there is something to read.
    pub(crate) fn listen(&mut self) {
        let by = self.soon();
        let heard = self.session().map(|session| session.listen(by));
        if let Some(Err(failure)) = heard {
            let lost = self.lost(failure);
            self.take_in(lost);
        }
    }

    fn vacate(&mut self, number: usize) {
        self.forget_lock(number);
        if let Some(seated) = self.seats[number].take() {
            self.vacant.push(number);
            self.carried.remove(number);
            seated.seat.set_number(None);
        }
    }

    // Events and announcements.

    /// A call on the session failed.
    fn lost(&mut self, failure: Failure) -> Event {
        let (reason, cause) = match failure {
            Failure::Lost { reason, cause } => (reason, cause),
            Failure::Refused(cause) => (LossReason::ServerError, Some(cause)),
        };
        self.end_announced = reason.is_announced();
        if reason == LossReason::SessionChanged {
            self.pool.probe_again();
        }
        self.problem.keep(cause.map(|cause| {
            let message = format!("the session that carries the lock was lost: {reason}");
            Error::new(ErrorKind::SessionUnavailable, message).with_source(cause)
        }));
        Event::Session(session::Event::Lost(reason))
    }

    /// Keeps an error for those who ask, and logs it.
    fn note(&mut self, error: Error) {
        let text = chain(&error);
        let level = self.problem.note(error);
        log::log!(level, "a session for many locks: {text}");
    }

    /// Gives the machines an event, and tells the application what comes of it.
    fn take_in(&mut self, event: Event) {
        self.tell_machines(event);
        self.end_all();
    }

    /// Ends the claims that are to end.
    fn end_all(&mut self) {
        while let Some(number) = self.ending.pop() {
            let Some(seated) = self.seats.get_mut(number).and_then(Option::as_mut) else { continue };
            if !std::mem::replace(&mut seated.is_released, true) {
                self.tell_machines(Event::Claim(number, claim::Event::Release));
            }
        }
    }

    fn tell_machines(&mut self, event: Event) {
        let was_closing = self.session_action() == session::Action::Close;
        let notices = self.lifecycle.handle(event, self.now());
        let is_lost = !was_closing && self.session_action() == session::Action::Close;
        if is_lost {
            self.forget_locks();
        }
        self.announce_all(&notices);
        if is_lost {
            // Not before: another thread that sees the end of a term first says by it why it is over.
            for seated in self.seats.iter().flatten() {
                seated.seat.claim().announce_unconfirmed(Confirms::Nothing);
            }
        }
        self.log_losses(&notices, is_lost);
        match event {
            Event::Claim(number, _) if !is_lost => {
                let seated = self.seats.get(number).and_then(Option::as_ref);
                if seated.is_some_and(|seated| seated.is_uncertain) {
                    self.announce_uncertainty(number);
                }
                self.sort_in(number);
            }
            Event::Session(
                session::Event::Renewed { .. }
                | session::Event::Confirmed { .. }
                | session::Event::TimePassed
                | session::Event::Wanted,
            ) if !is_lost => {}
            _ => {
                for number in 0..self.seats.len() {
                    self.announce_uncertainty(number);
                    self.sort_in(number);
                }
            }
        }
    }

    /// The session is over, and all that it had.
    fn forget_locks(&mut self) {
        self.owned.clear();
        for seated in self.seats.iter_mut().flatten() {
            seated.lock = None;
            seated.missed.clear();
        }
    }

    /// After all of them have been announced: the log is the application's, and may take its time.
    fn log_losses(&self, notices: &Notices, is_session: bool) {
        let mut is_told = !is_session;
        for &(number, notice) in notices {
            let Notice::Lost(reason) = notice else { continue };
            if !std::mem::replace(&mut is_told, true) {
                let cause =
                    self.problem.last().map(|error| format!(" ({})", chain(error))).unwrap_or_default();
                log::warn!("a session was lost with all the locks that it carried: {reason}{cause}");
            }
            if let Some(seated) = self.seats.get(number).and_then(Option::as_ref) {
                log::debug!("lock {:?}: lost: {reason}", seated.seat.claim().key());
            }
        }
    }

    /// Tells the claim until when the server may hold something that this process cannot reach.
    fn announce_uncertainty(&mut self, number: usize) {
        let until = self.lifecycle.uncertain_until(number);
        let until = (until > self.now()).then(|| self.moment(until));
        if let Some(Some(seated)) = self.seats.get_mut(number) {
            seated.is_uncertain = until.is_some();
            seated.seat.claim().announce_uncertainty(until);
        }
    }

    /// Puts a claim where it belongs that has something else to do next.
    fn sort_in(&mut self, number: usize) {
        // A claim whose valuer is being asked is told of a takeover grace all the same.
        let may_be_in_grace = self.session().is_some_and(|session| session.pending().is_some());
        let Some(seated) = self.seats.get_mut(number).and_then(Option::as_mut) else { return };
        match self.lifecycle.claim_action(number) {
            // Whoever asks the application wakes the claim. Until then there is nothing to run the engine for.
            claim::Action::Try if seated.seat.is_asked() && !may_be_in_grace => {}
            claim::Action::Try | claim::Action::Unlock | claim::Action::Settle => {
                if !std::mem::replace(&mut seated.is_ready, true) {
                    self.ready.push_back(number);
                }
            }
            claim::Action::Pause { until } => self.pauses.push(Reverse((until, number))),
            claim::Action::Finish(end) => self.finish(number, end),
            claim::Action::Wait | claim::Action::Queue => {}
        }
    }

    /// Follows the session's lease; `false` if somebody has seen the end of it.
    fn follow_lease(&mut self) -> bool {
        let until = self.lifecycle.leased_until();
        if until == self.leased_until {
            return true;
        }
        self.leased_until = until;
        let Some(until) = until.map(|until| self.moment(until)) else {
            self.expiry = None;
            self.carried.set_end(None);
            return true;
        };
        if let Some(expiry) = &self.expiry {
            return expiry.move_to(until);
        }
        let expiry = Arc::new(Expiry::new(until));
        self.carried.set_end(Some(Arc::clone(&expiry)));
        self.expiry = Some(expiry);
        true
    }

    fn announce_all(&mut self, notices: &Notices) {
        // All terms on the session have one end. Where it was seen, none goes on and none begins.
        let goes_on = self.follow_lease();
        for &(number, notice) in notices {
            if goes_on || !matches!(notice, Notice::Acquired { .. }) {
                self.announce(number, notice);
            }
        }
        if !goes_on {
            self.tell_machines(Event::Session(session::Event::Lost(LossReason::LeaseNotRenewed)));
        }
    }

    fn announce(&mut self, number: usize, notice: Notice) {
        let Some(seated) = self.seats.get_mut(number).and_then(Option::as_mut) else { return };
        let claim = seated.seat.claim();
        match notice {
            Notice::Acquired { .. } => {
                if let Some(expiry) = &self.expiry {
                    claim.announce_acquired(Arc::clone(expiry), seated.token, seated.permit());
                    log::debug!("lock {:?}: acquired", claim.key());
                    seated.problem.end();
                    self.problem.end();
                }
            }
            // All terms end with the session's lease, whose end has been moved.
            Notice::Renewed { .. } => {}
            Notice::Busy => {
                claim.announce_queueing();
                seated.problem.end();
            }
            Notice::InGrace => {
                claim.announce_in_grace(seated.grace_ends);
                seated.problem.end();
            }
            Notice::Lost(reason) => {
                claim.announce_lost(reason);
                seated.seat.spec().note_term_end(seated.token, seated.granted_at);
            }
            Notice::Failed => claim.announce_problem(seated.problem.last().or(self.problem.last()).cloned()),
        }
        if claim.is_observed() {
            self.events.claims.push(Arc::clone(claim));
        }
        if claim.is_ending() {
            self.ending.push(number);
        }
    }

    /// The claim is over.
    fn finish(&mut self, number: usize, end: End) {
        let Some(seated) = self.seats[number].as_mut() else { return };
        let seat = Arc::clone(&seated.seat);
        let problem = seated.problem.take();
        seat.spec().note_term_end(seated.token, seated.granted_at);
        // Before the end is told: whoever claims the lock next finds it free.
        self.vacate(number);
        if seat.claim().is_observed() {
            self.events.claims.push(Arc::clone(seat.claim()));
        }
        let outcome = outcome_of(seat.claim(), end, problem);
        seat.claim().finish(outcome);
    }
}

impl Drop for Engine {
    /// Only after a panic is there something left to do: nobody must wait for what will not come, and a session whose state is not known must not
    /// go back to the pool. All losses are announced before the session is closed.
    fn drop(&mut self) {
        for seated in self.seats.iter().flatten() {
            seated.seat.claim().announce_lost(LossReason::SupervisorFailed);
        }
        if let Some(mut slot) = self.slot.take() {
            slot.taint();
            drop(slot);
            self.pool.tell_of_sessions();
        }
        self.carried.clear();
        for seated in self.seats.drain(..).flatten() {
            seated.seat.set_number(None);
            seated.seat.claim().abandon();
            seated.seat.claim().tell();
        }
    }
}
