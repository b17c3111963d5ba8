//! What a carrier does for its claims on the session: takes locks and gives them back, many at once.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use postgres::error::SqlState;

use super::Engine;
use crate::error::{Error, chain};
use crate::key::AdvisoryKey;
use crate::loss::LossReason;
use crate::mode::Mode;
use crate::pg::claim::lifecycle::Event;
use crate::pg::claim::machine::{self as claim, Obstacle};
use crate::pg::session::batch::{Done, LockOp};
use crate::pg::session::machine::{self as session, Time};
use crate::pg::session::refusal::Refusal;
use crate::pg::session::wire::Failure;
use crate::pg::sql;
use crate::pg::takeover::GraceLeft;

/// So many are given back by one statement at the most.
const MOST_GIVEN: usize = 4096;

/// How soon a claim asks again for a lock that is taken; each time it is later, up to [`LONGEST_PAUSE`].
const SHORTEST_PAUSE: Duration = Duration::from_millis(5);

/// How long a claim pauses at the most between two attempts at a lock that is taken.
const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// How soon a claim asks again that was refused something; each time it is later, up to [`LONGEST_PAUSE_OF_REFUSED`].
const SHORTEST_PAUSE_OF_REFUSED: Duration = Duration::from_millis(200);

const LONGEST_PAUSE_OF_REFUSED: Duration = Duration::from_secs(2);

/// What is known of a takeover of the server.
enum GraceState {
    /// Locks may be asked for.
    Over,
    /// A takeover grace goes on, for whose end those that are `proven` need not wait.
    Grace { left: GraceLeft, proven: HashSet<usize> },
    /// It could not be asked.
    Unknown { needs_operator: bool, error: Error },
}

impl GraceState {
    /// Whether this claim may ask for its lock.
    fn allows(&self, number: usize) -> bool {
        match self {
            Self::Over => true,
            Self::Grace { proven, .. } => proven.contains(&number),
            Self::Unknown { .. } => false,
        }
    }
}

/// What has happened to claims; `None` if nothing has, and it is to be asked for again at once.
type Happenings = Vec<(usize, Option<claim::Event>)>;

/// Which lost sessions the server was asked for in this step, and whether it has none of them any more. Claims that were lost together ask for the same.
type Settled = HashMap<Vec<i32>, bool>;

impl Engine {
    /// Does what claims ask for on the session, as much as goes into one statement.
    pub(crate) fn work(&mut self) {
        let by = self.answer_by();
        self.asked_at = Instant::now();
        let past = match self.look_at_past(by) {
            Ok(past) => past,
            Err(event) => return self.take_in(event),
        };
        let (mut batch, mut permits, mut takes) = (Vec::new(), Vec::new(), 0);
        let mut settled = Settled::new();
        while let Some(number) = self.ready.pop_front() {
            let Some(seated) = self.seats.get_mut(number).and_then(Option::as_mut) else { continue };
            // One that has ended since may have left its number here, which another claim has now.
            if !std::mem::take(&mut seated.is_ready) {
                continue;
            }
            match self.lifecycle.claim_action(number) {
                claim::Action::Try if takes == sql::MOST_TAKEN => {
                    seated.is_ready = true;
                    self.ready.push_front(number);
                    break;
                }
                claim::Action::Try if !past.allows(number) => {
                    let event = match &past {
                        GraceState::Grace { left, .. } => {
                            seated.grace_ends = Instant::now() + left.all;
                            let until = self.epoch.elapsed() + left.look_again;
                            claim::Event::Later { until, obstacle: Obstacle::Grace }
                        }
                        GraceState::Unknown { needs_operator, error } => {
                            self.refused(number, *needs_operator, error.clone())
                        }
                        GraceState::Over => continue,
                    };
                    self.take_in(Event::Claim(number, event));
                }
                claim::Action::Try if seated.seat.annotation().is_none() => {
                    // Whoever asks already wakes the claim.
                    if seated.seat.mark_asked() {
                        self.unannotated.push(Arc::clone(&seated.seat));
                    }
                }
                claim::Action::Try if seated.seat.spec().request.mode == Mode::Permit => {
                    takes += 1;
                    permits.push(number);
                }
                claim::Action::Try => {
                    let (key, mode) = (seated.seat.spec().request.key, seated.seat.spec().request.mode);
                    // Another claim of this process may have it, on this very session.
                    match self.owned.get(&key) {
                        None => {
                            self.owned.insert(key, mode);
                            seated.lock = Some(key);
                            takes += 1;
                            batch.push(number);
                        }
                        Some(Mode::Shared) if mode == Mode::Shared => self.share(number),
                        Some(_) => self.found_busy(number),
                    }
                }
                claim::Action::Unlock => batch.push(number),
                claim::Action::Settle if self.asked_at.elapsed() > self.plan.heartbeat_timeout / 2 => {
                    seated.is_ready = true;
                    self.ready.push_front(number);
                    break;
                }
                claim::Action::Settle => self.settle(number, &mut settled, by),
                _ => self.sort_in(number),
            }
            if batch.len() == MOST_GIVEN {
                break;
            }
        }
        self.carry_all(&batch, takes > 0, by);
        // They are looked for first, which is not to be in the way of the others.
        if self.has_time() {
            self.carry_all(&permits, true, by);
        } else {
            permits.into_iter().for_each(|number| self.sort_in(number));
        }
        self.move_waiting();
    }

    /// Whether heartbeats have their time, too, if something more is done.
    fn has_time(&self) -> bool {
        self.asked_at.elapsed() <= self.plan.heartbeat_timeout / 2
    }

    /// Does what these claims ask for. The session has the lease before the first lock is asked for.
    fn carry_all(&mut self, numbers: &[usize], takes: bool, by: Instant) {
        if numbers.is_empty() || !self.lifecycle.serves() {
            return;
        }
        let outcome = self.put_on_lease(takes, by).and_then(|()| self.carry(numbers, by));
        match outcome {
            Ok(events) => {
                for (number, event) in events {
                    match event {
                        // The first of them may have come too late, and then all did.
                        _ if !self.lifecycle.serves() => {}
                        Some(event) => self.take_in(Event::Claim(number, event)),
                        None => self.sort_in(number),
                    }
                }
            }
            Err(event) => self.take_in(event),
        }
        // The end of a term that has begun, or the warning of it.
        let seated = numbers.iter().filter_map(|&number| self.seats.get(number)?.as_ref());
        if let Some(due) = seated.filter_map(|seated| seated.seat.claim().deadline()).min() {
            self.pool.watchdog().look_by(due);
        }
    }

    /// Before the first lock is asked for.
    fn put_on_lease(&mut self, wanted: bool, by: Instant) -> Result<(), Event> {
        if self.has_lease || !wanted {
            return Ok(());
        }
        // A table that is locked for long, by an operator say, must not cost what is held: the statement ends well before it is given up.
        let (lease, longest_wait) = (self.plan.lease, self.plan.heartbeat_timeout / 4);
        match self.session().map(|session| session.set_lease(Some(lease), longest_wait, by)) {
            Some(Ok(())) => {
                self.has_lease = true;
                Ok(())
            }
            Some(Err(failure)) => Err(self.lost(failure)),
            None => Err(Event::Session(session::Event::Lost(LossReason::SupervisorFailed))),
        }
    }

    /// Runs one statement for these claims; what happened to each. Where it is refused, finds out for which of them.
    fn carry(&mut self, numbers: &[usize], by: Instant) -> Result<Happenings, Event> {
        let sent = self.now();
        let refused = match self.carry_once(numbers, by) {
            Ok(done) => {
                let event = |(number, done)| (number, self.event_of(number, done, sent));
                return Ok(done.into_iter().map(event).collect());
            }
            Err(failure @ Failure::Lost { .. }) => return Err(self.lost(failure)),
            Err(refused) => refused,
        };
        let has_waited = matches!(&refused, Failure::Refused(error) if error.code() == Some(&SqlState::LOCK_NOT_AVAILABLE));
        let refused = Refusal::from_failure(refused);
        let (mut events, left) = self.put_right(numbers, by)?;
        // A table that is locked is in the way of all.
        if left.len() > 1 && !refused.is_about_catalog() && !has_waited {
            // Those that were refused before are likely to be refused again, and not to be in the way of the others.
            let was_refused = |number: &usize| {
                self.seats[*number].as_ref().is_some_and(|seated| seated.problem.last().is_some())
            };
            let (mut second, mut first): (Vec<_>, Vec<_>) = left.into_iter().partition(was_refused);
            if first.is_empty() {
                first = second.split_off(second.len() / 2);
            } else if second.is_empty() {
                second = first.split_off(first.len() / 2);
            }
            for half in [first, second] {
                // Where the way is slow and many are refused, heartbeats have their time, too.
                if self.has_time() {
                    events.extend(self.carry(&half, by)?);
                } else {
                    for number in half {
                        self.forget_lock(number);
                        self.sort_in(number);
                    }
                }
            }
            return Ok(events);
        }
        if refused.is_about_catalog() {
            self.pool.forget_catalog();
            let pool = Arc::clone(&self.pool);
            if let Some(session) = self.session()
                && let Err(refusal) = pool.look_at_catalog(session, by)
            {
                self.note(refusal.into_error());
            }
        }
        let (needs_operator, error) = (refused.needs_operator(), refused.into_error());
        for number in left {
            events.push((number, Some(self.refused(number, needs_operator, error.clone()))));
        }
        Ok(events)
    }

    /// Runs the statement for these claims, after it has found the permits that some of them want; what has come of each.
    fn carry_once(&mut self, numbers: &[usize], by: Instant) -> Result<Vec<(usize, Done)>, Failure> {
        let mut done = self.find_permits(numbers, by)?;
        let Self { seats, lifecycle, slot, pool, .. } = self;
        let lock_of = |number: &usize| {
            let seated = seats.get(*number)?.as_ref()?;
            Some((*number, seated.lock?, &seated.seat))
        };
        let locks: Vec<_> = numbers.iter().filter_map(lock_of).collect();
        if locks.is_empty() {
            return Ok(done);
        }
        let annotations: Vec<_> = locks.iter().map(|(_, _, seat)| seat.annotation().flatten()).collect();
        let orders: Vec<_> = locks
            .iter()
            .zip(&annotations)
            .map(|((number, key, seat), annotation)| {
                let (key, request) = (*key, &seat.spec().request);
                match lifecycle.claim_action(*number) {
                    claim::Action::Unlock => LockOp::Give { key, request },
                    _ => LockOp::Take { key, request, annotation: annotation.as_deref() },
                }
            })
            .collect();
        let session = slot.as_mut().and_then(|slot| slot.session()).ok_or_else(no_session)?;
        // If that takes too long the next session sees to it before it takes a lock.
        let answers = session.carry(&orders, by, || pool.forget_catalog())?;
        done.extend(locks.iter().map(|(number, ..)| *number).zip(answers));
        Ok(done)
    }

    /// Finds the permits that these claims want, and that are to be asked for by number; what has come of those for which there is none.
    fn find_permits(&mut self, numbers: &[usize], by: Instant) -> Result<Vec<(usize, Done)>, Failure> {
        let (mut wanting, mut specs, mut not_these) = (Vec::new(), Vec::new(), Vec::new());
        for &number in numbers {
            let Some(seated) = self.seats[number].as_ref().filter(|seated| seated.lock.is_none()) else {
                continue;
            };
            let spec = Arc::clone(seated.seat.spec());
            debug_assert_eq!(spec.request.mode, Mode::Permit, "the number of any other lock is known");
            // The server would grant those once more that the session has.
            let is_had = |key: &AdvisoryKey| self.owned.contains_key(key) || seated.missed.contains(key);
            not_these.extend(spec.request.key.permits().filter(is_had));
            wanting.push(number);
            specs.push(spec);
        }
        if wanting.is_empty() {
            return Ok(Vec::new());
        }
        // Each once: the server looks through all of them for each permit.
        let not_these: Vec<_> = not_these.into_iter().collect::<HashSet<_>>().into_iter().collect();
        let requests: Vec<_> = specs.iter().map(|spec| &spec.request).collect();
        let found = self.session().ok_or_else(no_session)?.find_permits(&requests, &not_these, by)?;
        let mut done = Vec::new();
        for (number, found) in wanting.into_iter().zip(found) {
            match (found, self.seats[number].as_mut()) {
                (Ok(key), Some(seated)) if !self.owned.contains_key(&key) => {
                    self.owned.insert(key, Mode::Permit);
                    seated.lock = Some(key);
                }
                // It is about to be another claim's, on this very session.
                (Ok(_), _) => done.push((number, Done::Missed)),
                (Err(other), _) => done.push((number, other)),
            }
        }
        Ok(done)
    }

    /// After a refusal: gives back all that the statement was about. Gives what has happened to those that were to be given back, and which are to
    /// be asked for again.
    ///
    /// Of a lock that the session does not have the server says so. To look first what it has would copy the server's whole table of
    /// locks, for which there may be no room: that may have been the reason.
    fn put_right(&mut self, numbers: &[usize], by: Instant) -> Result<(Happenings, Vec<usize>), Event> {
        let locks: Vec<_> = numbers
            .iter()
            .filter_map(|number| {
                let seated = self.seats[*number].as_ref()?;
                Some((seated.lock?, Arc::clone(seated.seat.spec())))
            })
            .collect();
        let orders: Vec<_> =
            locks.iter().map(|(key, spec)| LockOp::Give { key: *key, request: &spec.request }).collect();
        match self.session().map(|session| session.carry(&orders, by, || {})) {
            Some(Ok(_)) => {}
            // A server that does not take back a lock is of no use.
            Some(Err(failure)) => return Err(self.lost(failure)),
            None => return Err(Event::Session(session::Event::Lost(LossReason::SupervisorFailed))),
        }
        let (given, left): (Vec<_>, Vec<_>) = numbers
            .iter()
            .copied()
            .partition(|number| self.lifecycle.claim_action(*number) == claim::Action::Unlock);
        let given = given
            .into_iter()
            .map(|number| (number, self.event_of(number, Done::Given { held: true }, Time::ZERO)))
            .collect();
        Ok((given, left))
    }

    /// What has happened to a claim.
    fn event_of(&mut self, number: usize, done: Done, sent: Time) -> Option<claim::Event> {
        let seated = self.seats[number].as_mut()?;
        Some(match done {
            Done::Granted { token } => {
                (seated.token, seated.granted_at) = (token, Instant::now());
                seated.seat.claim().announce_unconfirmed(self.pool.confirms());
                seated.pause = Duration::ZERO;
                seated.missed.clear();
                seated.seat.use_annotation();
                if !seated.seat.spec().request.mode.is_shared() {
                    seated.seat.claim().forget_lost_backends();
                }
                claim::Event::Granted { sent }
            }
            Done::Given { held } => {
                self.forget_lock(number);
                claim::Event::Unlocked { held }
            }
            // Another one may be free.
            Done::Busy if seated.permit().is_some() => {
                seated.missed.extend(seated.lock);
                self.forget_lock(number);
                return None;
            }
            Done::Missed => return None,
            Done::Busy => {
                self.forget_lock(number);
                self.later(number)
            }
            Done::Collision { other } => {
                let refusal = Refusal::collision(seated.seat.claim().key(), &other);
                let needs_operator = refusal.needs_operator();
                self.refused(number, needs_operator, refusal.into_error())
            }
            Done::OtherPermits { theirs } => {
                let ours = seated.seat.spec().request.permits;
                let refusal = Refusal::other_permits(seated.seat.claim().key(), ours, theirs);
                let needs_operator = refusal.needs_operator();
                self.refused(number, needs_operator, refusal.into_error())
            }
        })
    }

    /// The session has not the lock of this claim.
    pub(super) fn forget_lock(&mut self, number: usize) {
        if let Some(seated) = self.seats[number].as_mut()
            && let Some(key) = seated.lock.take()
        {
            self.owned.remove(&key);
        }
    }

    /// Another reader has the lock, on this session, which takes a lock once. So this one asks the server on a session of its own.
    fn share(&mut self, number: usize) {
        let is_tried =
            self.seats[number].as_ref().is_some_and(|seated| seated.seat.claim().has_try_callers());
        // One that does not wait is told by its own session that there is none: it may be one that rests with a supervisor.
        let Err(error) = self.move_away(number, is_tried || self.pool.slots().has_room()) else { return };
        if is_tried {
            let event = self.refused(number, false, error);
            self.take_in(Event::Claim(number, event));
        } else {
            self.found_busy(number);
        }
    }

    /// Another session has the lock, or another claim on this one.
    fn found_busy(&mut self, number: usize) {
        let event = self.later(number);
        self.take_in(Event::Claim(number, event));
    }

    /// The lock is taken, so the claim asks again later, if it does not wait for it elsewhere.
    fn later(&mut self, number: usize) -> claim::Event {
        self.waiting.push(number);
        let pause = self.pause(number, SHORTEST_PAUSE, LONGEST_PAUSE);
        claim::Event::Later { until: self.now() + pause, obstacle: Obstacle::Busy }
    }

    /// A statement was refused for this claim alone.
    fn refused(&mut self, number: usize, needs_operator: bool, error: Error) -> claim::Event {
        self.forget_lock(number);
        let shortest = SHORTEST_PAUSE_OF_REFUSED * if needs_operator { 5 } else { 1 };
        let pause = self.pause(number, shortest, LONGEST_PAUSE_OF_REFUSED);
        if let Some(seated) = self.seats[number].as_mut() {
            let text = chain(&error);
            let level = seated.problem.note(error);
            log::log!(level, "lock {:?}: {text}", seated.seat.claim().key());
        }
        claim::Event::Later { until: self.now() + pause, obstacle: Obstacle::Refused }
    }

    /// How long a claim is to pause, twice as long each time; by lot between a half and the whole of that, so that many do not come back in
    /// step.
    fn pause(&mut self, number: usize, shortest: Duration, longest: Duration) -> Duration {
        let Some(seated) = self.seats[number].as_mut() else { return shortest };
        // When it asks again, any permit may be free.
        seated.missed.clear();
        seated.pause = (2 * seated.pause).clamp(shortest, longest);
        seated.pause.mul_f32(0.5 + fastrand::f32() / 2.0)
    }

    /// Asks whether the server still has something of the lost sessions of a claim that has given back a lock which it shared.
    fn settle(&mut self, number: usize, settled: &mut Settled, by: Instant) {
        let Some(seated) = self.seats[number].as_ref() else { return };
        let lost = seated.seat.claim().lost_backends();
        let answer = match settled.get(&lost) {
            Some(clear) => Some(Ok(*clear)),
            None => self.session().map(|session| session.are_gone(&lost, by)),
        };
        let event = match answer {
            Some(Ok(clear)) => {
                settled.insert(lost, clear);
                Event::Claim(number, claim::Event::Settled { clear })
            }
            // It cannot be known, and the time will tell.
            Some(Err(Failure::Refused(_))) => Event::Claim(number, claim::Event::Settled { clear: false }),
            Some(Err(failure)) => self.lost(failure),
            None => Event::Session(session::Event::Lost(LossReason::SupervisorFailed)),
        };
        self.take_in(event);
    }

    /// Sees whether locks may be asked for.
    fn look_at_past(&mut self, by: Instant) -> Result<GraceState, Event> {
        let Some(grace) = self.session().and_then(|session| session.pending().map(str::to_owned)) else {
            return Ok(GraceState::Over);
        };
        let pool = Arc::clone(&self.pool);
        let refusal = match self.session().map(|session| pool.look_at_grace(session, by)) {
            Some(Ok(Ok(None))) | None => return Ok(GraceState::Over),
            Some(Ok(Ok(Some(left)))) => {
                return Ok(GraceState::Grace { left, proven: self.proven(&grace, by)? });
            }
            Some(Ok(Err(refusal))) => refusal,
            Some(Err(failure @ Failure::Lost { .. })) => return Err(self.lost(failure)),
            Some(Err(refused)) => Refusal::from_failure(refused),
        };
        Ok(GraceState::Unknown { needs_operator: refusal.needs_operator(), error: refusal.into_error() })
    }

    /// The claims that ask for their locks, and of which nobody else can believe in the lock any more since the newest term of the key was one of
    /// theirs, which is over and began as long ago as the longest lease.
    fn proven(&mut self, grace: &str, by: Instant) -> Result<HashSet<usize>, Event> {
        let Some(longest_lease) = self.pool.longest_lease(grace) else { return Ok(HashSet::new()) };
        let mut asked = Vec::new();
        for &number in &self.ready {
            let Some(seated) = self.seats.get(number).and_then(Option::as_ref) else { continue };
            if self.lifecycle.claim_action(number) != claim::Action::Try {
                continue;
            }
            let Some((token, began)) = *seated.seat.spec().last_term.lock() else { continue };
            if seated.unproven != Some(token) && began.elapsed() >= longest_lease {
                asked.push((number, Arc::clone(seated.seat.spec()), token));
            }
        }
        if asked.is_empty() {
            return Ok(HashSet::new());
        }
        let terms: Vec<_> = asked.iter().map(|(_, spec, token)| (&spec.request, *token)).collect();
        let places = match self.session().map(|session| session.are_newest_terms(&terms, by)) {
            Some(Ok(places)) => places,
            Some(Err(failure @ Failure::Lost { .. })) => return Err(self.lost(failure)),
            Some(Err(Failure::Refused(_))) | None => Vec::new(),
        };
        let proven: HashSet<_> =
            places.into_iter().filter_map(|place| asked.get(place).map(|(number, ..)| *number)).collect();
        for (number, _, token) in &asked {
            if !proven.contains(number)
                && let Some(seated) = self.seats[*number].as_mut()
            {
                seated.unproven = Some(*token);
            }
        }
        Ok(proven)
    }

    /// Lets claims whose locks are taken go on with sessions of their own, as long as there are any.
    fn move_waiting(&mut self) {
        for number in std::mem::take(&mut self.waiting) {
            let Some(seated) = self.seats.get(number).and_then(Option::as_ref) else { continue };
            let is_waiting = matches!(self.lifecycle.claim_action(number), claim::Action::Pause { .. });
            if seated.is_released || !is_waiting || seated.seat.claim().is_ending() {
                continue;
            }
            let seat = Arc::clone(&seated.seat);
            if self.move_away(number, self.pool.slots().has_room()).is_err() {
                seat.claim().announce_taking_turns();
            }
        }
        self.end_all();
    }

    /// Lets a claim for which the session has nothing go on with one of its own.
    ///
    /// # Errors
    /// If there is none, or no thread for it.
    fn move_away(&mut self, number: usize, has_room: bool) -> Result<(), Error> {
        let Some(seated) = self.seats[number].as_ref() else { return Ok(()) };
        let seat = Arc::clone(&seated.seat);
        let own = self.dedicated.take().filter(|_| has_room);
        let own = own.ok_or_else(|| self.pool.slots().exhausted().into_error())?;
        seat.move_to(own, &self.idle).map_err(Error::no_thread)?;
        self.vacate(number);
        let now = self.now();
        let notices = self.lifecycle.dismiss(number, now);
        self.announce_all(&notices);
        // Whoever waits for the claim is to see who works on it now, who may have the lock already.
        seat.claim().announce_moved();
        Ok(())
    }
}

fn no_session() -> Failure {
    Failure::Lost { reason: LossReason::SupervisorFailed, cause: None }
}
