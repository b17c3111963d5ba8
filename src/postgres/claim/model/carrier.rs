//! A process whose session carries several claims: what the engine of a carrier does, step by step, with the machines of the library.
//!
//! As there, one statement serves all that ask for something, the lease is put on before the first lock is asked for, and a statement that is
//! refused is put right and asked again by halves. What has come of it is told to the machines when all is answered, claim by claim. All
//! terms have one end. A claim whose lock is taken pauses and asks again, or goes on as a process of its own in the place of a third one.
//!
//! A claim that is admitted has been taken out of the inbox. What waits there still is as if it had not come, or not been released.
//!
//! Left out: locks that are shared; a release that is given up, which goes on at a carrier; a number that two names share; what is asked of
//! the application for annotations; and a session that lingers on the chance that a claim comes.

use super::process::{InFlight, Request};
use super::*;
use crate::pg::claim::machine::End;

/// In the place of the number of a claim, the owner of a session that carries many.
pub(super) const CARRIER: u8 = u8::MAX;

/// The engine of a carrier, beside its [`Lifecycle`].
#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) struct Carrier {
    /// A claim has the number of its seat.
    pub(super) seats: [Seat; SEATS],
    /// The locks that the session has, or is about to ask for: see `Engine::owned`.
    owned: [bool; KEYS],
    has_lease: bool,
    expiry: Option<Expiry>,
    /// What this run of the engine has still to ask for, the last first.
    statements: Vec<Statement>,
    /// What they have brought and the machines have not been told.
    pub(super) events: Vec<(usize, claim::Event)>,
    /// What is still to be announced.
    notices: Vec<(usize, Notice)>,
    /// The claim for which the statements of this run are refused.
    refused: Option<usize>,
}

/// What an application has: claims on one key, one after the other.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub(super) struct Seat {
    pub(super) claims_left: u8,
    pub(super) claim: Option<Carried>,
}

/// A claim on a carrier.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub(super) struct Carried {
    /// Tells it from all others of the process.
    pub(super) id: u8,
    /// The application has asked for the release, and the machine been told so.
    pub(super) released: bool,
    pub(super) heard: bool,
    /// The session has its lock, or is about to ask for it.
    has_lock: bool,
    /// Its lock was found busy, and it pauses.
    waits: bool,
    /// The token of the term that was announced. It lasts until the [`Expiry`].
    pub(super) term: Option<u8>,
    /// Whether a term is open by what the machine said.
    in_term: bool,
    /// Of the last grant.
    token: u8,
    /// Sessions that may have something of it.
    pub(super) lost: Vec<u8>,
}

/// The end of all terms, final once it was seen.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Expiry {
    until: u8,
    is_seen: bool,
    /// The engine moves it; else some claim has yet to hear of its loss.
    is_live: bool,
}

/// What is asked of a session that carries many claims.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Statement {
    /// Puts the lease on, or takes it off.
    Lease(bool),
    /// What is to be done for each claim.
    Carry([Option<LockOp>; SEATS]),
    /// Gives back what a refused statement was about.
    PutRight([Option<LockOp>; SEATS]),
    /// Leaves the session as the pool wants it.
    Settle,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum LockOp {
    Take { key: usize, claim: u8 },
    Give { key: usize },
}

/// What has come of a [`LockOp`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Done {
    Granted { token: u8 },
    Busy,
    InGrace,
    Given { held: bool },
}

/// What the server says of a [`Statement`].
#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) enum Reply {
    Done([Option<Done>; SEATS]),
    Refused,
}

impl Reply {
    pub(super) fn done(&self) -> impl Iterator<Item = Done> {
        let done = if let Self::Done(done) = self { *done } else { [None; SEATS] };
        done.into_iter().flatten()
    }

    pub(super) fn tokens_mut(&mut self) -> Vec<&mut u8> {
        let Self::Done(done) = self else { return Vec::new() };
        let tokens = done.iter_mut().flatten().filter_map(|done| match done {
            Done::Granted { token } => Some(token),
            _ => None,
        });
        tokens.collect()
    }
}

impl Statement {
    /// For how many claims it takes a lock.
    pub(super) fn takes(self) -> usize {
        (0..SEATS).filter(|number| self.takes_for(*number)).count()
    }

    /// Whether it takes a lock for this claim.
    pub(super) fn takes_for(self, number: usize) -> bool {
        let Self::Carry(ops) = self else { return false };
        matches!(ops[number], Some(LockOp::Take { .. }))
    }
}

impl Carrier {
    pub(super) fn new(claims: [u8; SEATS]) -> Self {
        Self {
            seats: claims.map(|claims_left| Seat { claims_left, claim: None }),
            owned: [false; KEYS],
            has_lease: false,
            expiry: None,
            statements: Vec::new(),
            events: Vec::new(),
            notices: Vec::new(),
            refused: None,
        }
    }

    pub(super) fn claim(&self, number: usize) -> Option<&Carried> {
        self.seats.get(number).and_then(|seat| seat.claim.as_ref())
    }

    /// With their numbers.
    pub(super) fn claims(&self) -> impl Iterator<Item = (usize, &Carried)> {
        self.seats.iter().enumerate().filter_map(|(number, seat)| Some((number, seat.claim.as_ref()?)))
    }

    fn claims_mut(&mut self) -> impl Iterator<Item = &mut Carried> {
        self.seats.iter_mut().flat_map(|seat| &mut seat.claim)
    }

    fn is_empty(&self) -> bool {
        self.claims().next().is_none()
    }

    /// Whether the claim is right to think that it has the lock.
    pub(super) fn believes(&self, number: usize, now: u8) -> bool {
        let lasts = self.expiry.as_ref().is_some_and(|expiry| !expiry.is_seen && now < expiry.until);
        lasts && self.claim(number).is_some_and(|claim| claim.term.is_some() && !claim.released)
    }

    /// Whether the end of the terms has come and nobody has seen it.
    pub(super) fn may_see_end(&self, now: u8) -> bool {
        self.expiry.as_ref().is_some_and(|expiry| !expiry.is_seen && now >= expiry.until)
            && self.claims().any(|(_, claim)| claim.term.is_some())
    }

    /// Whether somebody has seen the end of the terms.
    pub(super) fn has_seen_end(&self) -> bool {
        self.expiry.as_ref().is_some_and(|expiry| expiry.is_seen)
    }

    pub(super) fn see_end(&mut self) {
        if let Some(expiry) = &mut self.expiry {
            expiry.is_seen = true;
        }
    }

    /// Follows the session's lease; `false` if somebody has seen the end of it.
    fn follow_lease(&mut self, model: &Model, until: Option<u8>) -> bool {
        match (self.expiry.as_mut().filter(|expiry| expiry.is_live), until) {
            (Some(expiry), Some(until)) => {
                if expiry.is_seen && !model.has(Flaw::SeenEndMoved) {
                    return false;
                }
                (expiry.until, expiry.is_seen) = (until, false);
            }
            (Some(expiry), None) => expiry.is_live = false,
            (None, Some(until)) => self.expiry = Some(Expiry { until, is_seen: false, is_live: true }),
            (None, None) => {}
        }
        true
    }

    /// Whether the session's lease has changed since it was followed.
    fn is_behind(&self, until: Option<u8>) -> bool {
        let live = self.expiry.as_ref().filter(|expiry| expiry.is_live);
        live.map(|expiry| expiry.until) != until
    }

    /// Whether another claim of the process has the lock, or is about to ask for it.
    fn is_taken(&self, model: &Model, number: usize) -> bool {
        self.owned[model.keys[number]] && !model.has(Flaw::AskedTwice)
    }

    /// The session has not the lock of this claim.
    fn forget_lock(&mut self, model: &Model, number: usize) {
        let claim = self.seats[number].claim.as_mut();
        if claim.is_some_and(|claim| std::mem::take(&mut claim.has_lock)) && !model.has(Flaw::NumberKept) {
            self.owned[model.keys[number]] = false;
        }
    }

    /// The session is over, and all that it had.
    fn forget_locks(&mut self) {
        self.owned = [false; KEYS];
        self.claims_mut().for_each(|claim| claim.has_lock = false);
    }

    /// Forgets lost sessions that the server does not have any more, and the end of terms of which none is left.
    pub(super) fn forget(&mut self, is_gone: impl Fn(u8) -> bool) {
        self.claims_mut().for_each(|claim| claim.lost.retain(|session| !is_gone(*session)));
        if self.claims().all(|(_, claim)| claim.term.is_none()) {
            self.expiry = self.expiry.take().filter(|expiry| expiry.is_live);
        }
    }

    /// What has happened to a claim: see `Engine::event_of`.
    fn event_of(&mut self, model: &Model, number: usize, done: Done, sent: u8, now: u8) -> claim::Event {
        let later = |obstacle| claim::Event::Later { until: tick(now + 1), obstacle };
        if let Done::Granted { token } = done {
            if let Some(claim) = &mut self.seats[number].claim {
                claim.token = token;
                claim.lost.clear();
            }
            return claim::Event::Granted { sent: tick(sent) };
        }
        self.forget_lock(model, number);
        match done {
            Done::Given { held } => claim::Event::Unlocked { held },
            Done::InGrace => later(Obstacle::Grace),
            _ => later(Obstacle::Busy),
        }
    }

    /// Those of a refused statement are asked for by halves, or the one that is left pauses.
    fn ask_again(&mut self, model: &Model, ops: [Option<LockOp>; SEATS], now: u8) {
        let left: Vec<_> = (0..SEATS).filter(|number| ops[*number].is_some()).collect();
        if let [number] = left[..] {
            self.forget_lock(model, number);
            let (until, obstacle) = (tick(now + 1), Obstacle::Refused);
            self.events.push((number, claim::Event::Later { until, obstacle }));
            return;
        }
        for number in left.into_iter().rev() {
            let mut half = [None; SEATS];
            half[number] = ops[number];
            self.statements.push(Statement::Carry(half));
        }
    }

    /// A driver call has failed with the session: what is left of this run is not asked for, nor told, and an answer that is `late` is not read.
    pub(super) fn give_up_run(&mut self, model: &Model, late: Option<Reply>) {
        self.statements.clear();
        if !model.has(Flaw::AnswerOutlivesSession) {
            self.events.clear();
        } else if let Some(Reply::Done(done)) = late {
            for (number, done) in done.into_iter().enumerate() {
                let event = done.map(|done| self.event_of(model, number, done, 0, 0));
                self.events.extend(event.map(|event| (number, event)));
            }
        }
    }

    pub(super) fn refuse(&mut self, number: usize) {
        self.refused = Some(number);
    }

    /// Whether the server refuses this statement.
    pub(super) fn is_refused(&self, statement: Statement) -> bool {
        self.refused.is_some_and(|number| statement.takes_for(number))
    }

    pub(super) fn opened(&mut self) {
        self.has_lease = false;
    }

    /// The server may not have noticed the loss of this session.
    pub(super) fn note_lost(&mut self, session: u8) {
        self.claims_mut().for_each(|claim| claim.lost.push(session));
    }

    pub(super) fn is_called(&self) -> bool {
        self.claims().any(|(_, claim)| claim.released && !claim.heard)
    }

    pub(super) fn carries_two(&self, doing: &Doing) -> bool {
        let first = if let Doing::Carrying { statement, .. } = doing { Some(statement) } else { None };
        let mut statements = first.into_iter().chain(&self.statements);
        statements.any(|statement| matches!(statement, Statement::Carry([Some(_), Some(_)])))
    }

    pub(super) fn loses_two(&self) -> bool {
        matches!(self.notices[..], [(_, Notice::Lost(_)), (_, Notice::Lost(_))])
    }

    pub(super) fn holds(&self, number: usize) -> bool {
        self.claim(number).is_some_and(|claim| claim.in_term)
    }

    pub(super) fn terms(&self) -> usize {
        self.claims().filter(|(_, claim)| claim.term.is_some()).count()
    }

    /// Where a session is to be closed, all claims have heard of their losses.
    pub(super) fn check_told(&self) -> Checked {
        let is_open = |claim: &Carried| claim.term.is_some() && !claim.released;
        if self.claims().any(|(_, claim)| is_open(claim)) {
            return Err("a session is closed, and a claim has not heard of its loss".to_owned());
        }
        Ok(())
    }

    pub(super) fn tokens_mut(&mut self) -> Vec<&mut u8> {
        self.claims_mut().flat_map(|claim| [Some(&mut claim.token), claim.term.as_mut()]).flatten().collect()
    }
}

impl Model {
    /// Whether it does not matter which claim of a carrier comes first.
    fn has_equal_seats(&self) -> bool {
        let [first, second] = self.keys;
        self.seats[0] == self.seats[1] && (first == second || self.carriers == 1 && self.claims[1] == 0)
    }

    /// What may happen next to the claims of a carrier beside what its engine does.
    pub(super) fn seat_steps(&self, world: &World, who: usize) -> Vec<Step> {
        let process = &world.processes[who];
        let Some(carrier) = &process.carrier else { return Vec::new() };
        let is_free = process.doing == Doing::Nothing && !process.stands_still();
        let mut steps = Vec::new();
        for (number, seat) in carrier.seats.iter().enumerate() {
            match &seat.claim {
                None if is_free
                    && seat.claims_left > 0
                    && (number == 0
                        || !self.has_equal_seats()
                        || carrier.seats[0].claims_left < self.seats[0]) =>
                {
                    steps.push(Step::Admit(who, number));
                }
                Some(claim) if !claim.released => {
                    steps.push(Step::ReleaseOne(who, number));
                    let pauses = process.lifecycle.as_ref().is_some_and(|lifecycle| {
                        matches!(lifecycle.claim_action(number), claim::Action::Pause { .. })
                    });
                    let third = &world.processes[LATE];
                    let has_room = third.lifecycle.is_none() && third.fencing.is_none();
                    if self.moves && is_free && claim.waits && pauses && has_room {
                        steps.push(Step::Move(who, number));
                    }
                }
                _ => {}
            }
        }
        steps
    }

    /// What may be done by the engine of a carrier that does nothing.
    pub(super) fn carrier_steps(&self, world: &World, who: usize) -> Vec<Step> {
        let process = &world.processes[who];
        let (Some(carrier), Some(lifecycle)) = (&process.carrier, &process.lifecycle) else {
            return Vec::new();
        };
        let (now, mut steps) = (world.now, Vec::new());
        let awake = self.workers(process).iter().copied().filter(|worker| !process.is_frozen(*worker));
        let awake: Vec<_> = awake.collect();
        // Before all else it looks into the inbox.
        let mut calls = carrier.claims().filter(|(_, claim)| claim.released && !claim.heard);
        if let Some((number, _)) = calls.next().filter(|_| !awake.is_empty()) {
            return vec![Step::HearOne(who, number)];
        }
        let action = lifecycle.session_action();
        let serves = matches!(
            action,
            session::Action::Serve | session::Action::Watch { .. } | session::Action::Confirm { .. }
        );
        let asks = |number: usize| lifecycle.claim_action(number);
        let mut has_work = false;
        for (number, _) in carrier.claims().filter(|_| serves) {
            match asks(number) {
                claim::Action::Try if carrier.is_taken(self, number) => {
                    let (until, obstacle) = (tick(now + 1), Obstacle::Busy);
                    let later = claim::Event::Later { until, obstacle };
                    steps.extend(awake.first().map(|_| Step::Look(who, Event::Claim(number, later))));
                }
                claim::Action::Try | claim::Action::Unlock => has_work = true,
                _ => {}
            }
        }
        if has_work {
            let is_confirming = matches!(action, session::Action::Confirm { .. });
            let may_work = |worker: &&Worker| !is_confirming || **worker == Worker::Supervisor;
            steps.extend(awake.iter().filter(may_work).map(|worker| Step::Work(who, *worker)));
        }
        if self.has(Flaw::AnswerOutlivesSession) && lifecycle.serves() {
            steps.extend((0..carrier.events.len()).map(|place| Step::TakeIn(who, place)));
        }
        if process.is_frozen(Worker::Supervisor) {
            return steps;
        }
        // Its thread begins with pauses that are over.
        let is_due =
            |number: &usize| matches!(asks(*number), claim::Action::Pause { until } if now >= ticks(until));
        if let Some(number) = carrier.claims().map(|(number, _)| number).find(is_due) {
            steps.retain(|step| *step != Step::Work(who, Worker::Supervisor));
            steps.push(Step::Look(who, Event::Claim(number, claim::Event::TimePassed)));
            return steps;
        }
        let look = |event| Step::Look(who, Event::Session(event));
        let is_empty = carrier.is_empty();
        match action {
            session::Action::Open if !is_empty => steps.push(Step::Begin(who, Worker::Supervisor)),
            session::Action::Pause { until } if !is_empty => {
                steps.extend((now >= ticks(until)).then(|| look(session::Event::TimePassed)));
            }
            session::Action::Open | session::Action::Pause { .. } => steps.push(Step::Leave(who)),
            session::Action::Serve | session::Action::Watch { .. } => {
                if let session::Action::Watch { until } = action {
                    steps.extend((now >= ticks(until)).then(|| look(session::Event::TimePassed)));
                }
                steps.extend(process.lost().map(|reason| look(session::Event::Lost(reason))));
                if is_empty {
                    steps.push(Step::Leave(who));
                } else if carrier.has_lease && lifecycle.holding() == 0 && !has_work {
                    steps.push(Step::Rest(who));
                }
            }
            _ => steps.push(Step::Begin(who, Worker::Supervisor)),
        }
        steps
    }

    /// How what the carrier has asked for can end now.
    pub(super) fn carrying_steps(&self, world: &World, who: usize, by: u8) -> Vec<Step> {
        let process = &world.processes[who];
        let Some(connection) = &process.connection else { return Vec::new() };
        let lost = |reason| Step::Conclude(who, Event::Session(session::Event::Lost(reason)));
        let mut steps = Vec::new();
        match connection.reply {
            Some(_) => steps.push(Step::Reply(who)),
            None => steps.extend(process.lost().map(lost)),
        }
        steps.extend((world.now >= by).then(|| lost(LossReason::HeartbeatTimedOut)));
        steps
    }

    /// What the engine may take in of what its statements have brought; and of what has ended a claim meanwhile.
    pub(super) fn taking_in_steps(&self, world: &World, who: usize) -> Vec<Step> {
        let Some(carrier) = &world.processes[who].carrier else { return Vec::new() };
        let mut steps: Vec<_> = (0..carrier.events.len()).map(|place| Step::TakeIn(who, place)).collect();
        for (number, claim) in carrier.claims() {
            if claim.released && !claim.heard && carrier.events.iter().all(|(of, _)| *of != number) {
                steps.push(Step::HearOne(who, number));
            }
        }
        steps
    }

    /// The engine takes a claim out of the inbox.
    pub(super) fn admit(&self, world: &mut World, who: usize, number: usize) {
        let now = tick(world.now);
        let process = &mut world.processes[who];
        let Some(carrier) = &mut process.carrier else { return };
        process.owner = (who, CARRIER);
        let claim = || Claim::new(self.uncertainty_window, false);
        let lifecycle = process.lifecycle.get_or_insert_with(|| {
            let mut lifecycle = Lifecycle::carrier(self.timing, 7);
            // The numbers are given out in order. So there were claims before, which have left.
            for number in 0..SEATS {
                lifecycle.admit(number, claim(), now);
                lifecycle.dismiss(number, now);
            }
            lifecycle
        });
        lifecycle.admit(number, claim(), now);
        let seat = &mut carrier.seats[number];
        seat.claims_left -= 1;
        let id = seat.claims_left * SEATS as u8 + number as u8;
        seat.claim = Some(Carried { id, ..Carried::default() });
    }

    /// A claim goes on in a session of its own: see `Engine::move_waiting`.
    pub(super) fn move_claim(&self, world: &mut World, who: usize, number: usize) -> Checked {
        let now = tick(world.now);
        let process = &mut world.processes[who];
        let (Some(carrier), Some(lifecycle)) = (&mut process.carrier, &mut process.lifecycle) else {
            return Ok(());
        };
        let uncertain_until = lifecycle.uncertain_until(number);
        let before = (lifecycle.session_action(), lifecycle.leased_until(), lifecycle.holding());
        let others: Vec<_> =
            (0..SEATS).filter(|other| *other != number).map(|other| lifecycle.claim_action(other)).collect();
        let notices = lifecycle.dismiss(number, now);
        let after = (lifecycle.session_action(), lifecycle.leased_until(), lifecycle.holding());
        let of_others =
            (0..SEATS).filter(|other| *other != number).map(|other| lifecycle.claim_action(other));
        if !notices.is_empty() || before != after || !of_others.eq(others) {
            return Err("a claim that has left changed something for the others".to_owned());
        }
        carrier.forget_lock(self, number);
        let Some(Carried { id, lost, .. }) = carrier.seats[number].claim.take() else { return Ok(()) };
        let machine = Claim::new(self.uncertainty_window, false);
        let (machine, lost) = match self.flaw {
            Some(Flaw::UncertaintyLeft) => (machine, lost),
            Some(Flaw::LostForgotten) => (machine.uncertain_until_then(uncertain_until), Vec::new()),
            _ => (machine.uncertain_until_then(uncertain_until), lost),
        };
        let lifecycle = Lifecycle::dedicated(self.timing, machine, 7);
        let moved = process.moved((who, id), self.keys[number], lifecycle, lost);
        world.processes[LATE] = moved;
        Ok(())
    }

    /// Asks for what the claims want, in one statement.
    pub(super) fn work(&self, world: &mut World, who: usize, worker: Worker) -> Checked {
        let by = world.now + SHORTLY;
        let process = &mut world.processes[who];
        let (Some(carrier), Some(lifecycle)) = (&mut process.carrier, &process.lifecycle) else {
            return Ok(());
        };
        let mut ops = [None; SEATS];
        for (number, op) in ops.iter_mut().enumerate() {
            let key = self.keys[number];
            let Some(claim) = &mut carrier.seats[number].claim else { continue };
            *op = match lifecycle.claim_action(number) {
                claim::Action::Try if !carrier.owned[key] || self.has(Flaw::AskedTwice) => {
                    claim.has_lock = true;
                    carrier.owned[key] = true;
                    Some(LockOp::Take { key, claim: claim.id })
                }
                claim::Action::Unlock => Some(LockOp::Give { key }),
                claim::Action::Settle => return Err("a lock that is not shared is settled".to_owned()),
                _ => None,
            };
        }
        if self.has(Flaw::WrongOneGiven)
            && let [Some(LockOp::Give { .. }), None] = ops
        {
            ops[0] = Some(LockOp::Give { key: self.keys[1] });
        }
        let statement = Statement::Carry(ops);
        carrier.statements = vec![statement];
        if statement.takes() > 0 && !carrier.has_lease {
            carrier.statements.push(Statement::Lease(true));
        }
        process.holder = Some(worker);
        self.next_statement(world, who, by)
    }

    /// Takes the lease off a session that nobody asks anything of.
    pub(super) fn rest_carrier(&self, world: &mut World, who: usize) -> Checked {
        self.begin_upkeep(world, who, Statement::Lease(false))
    }

    /// Nobody needs the carrier: its session goes back to the pool, if it has one.
    pub(super) fn leave_carrier(&self, world: &mut World, who: usize) -> Checked {
        let process = &mut world.processes[who];
        let has_session = process.lifecycle.as_ref().is_some_and(Lifecycle::serves);
        if has_session {
            return self.begin_upkeep(world, who, Statement::Settle);
        }
        world.end_carrier(self, who);
        Ok(())
    }

    fn begin_upkeep(&self, world: &mut World, who: usize, statement: Statement) -> Checked {
        let by = world.now + SHORTLY;
        let process = &mut world.processes[who];
        process.holder = Some(Worker::Supervisor);
        process.carrier.iter_mut().for_each(|carrier| carrier.statements = vec![statement]);
        self.next_statement(world, who, by)
    }

    fn next_statement(&self, world: &mut World, who: usize, by: u8) -> Checked {
        let sent = world.now;
        let process = &mut world.processes[who];
        let Some(carrier) = &mut process.carrier else { return Ok(()) };
        let Some(statement) = carrier.statements.pop() else { return self.settle_down(world, who) };
        let Some(connection) = &mut process.connection else {
            return Err(format!("{statement:?} without a session"));
        };
        connection.request = Some(Request::Carrier(statement));
        process.doing = Doing::Carrying { statement, sent, by };
        Ok(())
    }

    /// A statement was answered.
    pub(super) fn take_reply(&self, world: &mut World, who: usize) -> Checked {
        let now = world.now;
        let process = &mut world.processes[who];
        let Doing::Carrying { statement, sent, by } = process.doing else { return Ok(()) };
        let Some(reply) = process.connection.as_mut().and_then(|connection| connection.reply.take()) else {
            return Ok(());
        };
        let (Some(carrier), Some(lifecycle)) = (&mut process.carrier, &process.lifecycle) else {
            return Ok(());
        };
        match (statement, reply) {
            (Statement::Lease(on), Reply::Done(_)) => carrier.has_lease = on,
            (Statement::Carry(_), Reply::Done(done)) => {
                for (number, done) in done.into_iter().enumerate() {
                    let event = done.map(|done| carrier.event_of(self, number, done, sent, now));
                    carrier.events.extend(event.map(|event| (number, event)));
                }
            }
            (Statement::Carry(ops), Reply::Refused) if self.has(Flaw::NotPutRight) => {
                carrier.ask_again(self, ops, now);
            }
            (Statement::Carry(ops), Reply::Refused) => {
                carrier.statements.push(Statement::PutRight(ops));
            }
            (Statement::PutRight(mut ops), Reply::Done(_)) => {
                for (number, op) in ops.iter_mut().enumerate() {
                    if lifecycle.claim_action(number) == claim::Action::Unlock && op.take().is_some() {
                        let event = carrier.event_of(self, number, Done::Given { held: true }, sent, now);
                        carrier.events.push((number, event));
                    }
                }
                carrier.ask_again(self, ops, now);
            }
            (Statement::Settle, Reply::Done(_)) => {
                // Back in the pool, where it is of no interest any more.
                process.connection = None;
                world.end_carrier(self, who);
                return Ok(());
            }
            (Statement::Settle, Reply::Refused) => {
                world.end_carrier(self, who);
                return Ok(());
            }
            (Statement::Lease(_) | Statement::PutRight(_), Reply::Refused) => {
                let lost = session::Event::Lost(LossReason::ServerError);
                return self.conclude(world, who, Event::Session(lost));
            }
        }
        self.next_statement(world, who, by)
    }

    /// The machines are told what came of one claim, unless the session was lost meanwhile.
    pub(super) fn take_in(&self, world: &mut World, who: usize, place: usize) -> Checked {
        let process = &mut world.processes[who];
        let (Some(carrier), Some(lifecycle)) = (&mut process.carrier, &process.lifecycle) else {
            return Ok(());
        };
        if !lifecycle.serves() {
            if self.has(Flaw::AnswerOutlivesSession) {
                process.rest();
                return Ok(());
            }
            carrier.events.remove(place);
            return self.settle_down(world, who);
        }
        let (number, event) = carrier.events.remove(place);
        // The machine stops a debug build at what cannot follow, which is not what is to be found.
        let fits = match lifecycle.claim_action(number) {
            claim::Action::Try => true,
            claim::Action::Unlock => matches!(event, claim::Event::Unlocked { .. }),
            _ => false,
        };
        if !fits && self.has(Flaw::AnswerOutlivesSession) {
            return self.settle_down(world, who);
        }
        self.tell(world, who, Event::Claim(number, event))
    }

    /// As `Engine::tell_machines`, up to the announcements.
    pub(super) fn tell_carrier(&self, world: &mut World, who: usize, event: Event) -> Checked {
        let now = tick(world.now);
        let process = &mut world.processes[who];
        let (Some(carrier), Some(lifecycle)) = (&mut process.carrier, &mut process.lifecycle) else {
            return Err("an event after the end".to_owned());
        };
        let was_closing = lifecycle.session_action() == session::Action::Close;
        let mut notices = lifecycle.handle(event, now);
        let is_lost = !was_closing && lifecycle.session_action() == session::Action::Close;
        if is_lost {
            carrier.forget_locks();
        }
        if let Event::Claim(number, event) = event
            && let Some(claim) = &mut carrier.seats[number].claim
        {
            if event == claim::Event::Release {
                (claim.heard, claim.in_term) = (true, false);
            }
            claim.waits = matches!(event, claim::Event::Later { obstacle: Obstacle::Busy, .. });
        }
        for (number, notice) in &notices {
            let claim = carrier.seats.get_mut(*number).and_then(|seat| seat.claim.as_mut());
            let Some(claim) = claim else { return Err(format!("{notice:?} of no claim")) };
            let in_order = match notice {
                Notice::Acquired { .. } => !claim.heard && !std::mem::replace(&mut claim.in_term, true),
                Notice::Lost(_) => std::mem::replace(&mut claim.in_term, false),
                // It is told once for all.
                Notice::Renewed { .. } => false,
                Notice::Busy | Notice::InGrace | Notice::Failed => true,
            };
            if !in_order {
                return Err(format!("{notice:?} out of order"));
            }
        }
        if is_lost && carrier.claims().any(|(_, claim)| claim.in_term) {
            return Err("a session was lost, and not every claim that held is told".to_owned());
        }
        // No promise hangs on the others.
        notices.retain(|(_, notice)| matches!(notice, Notice::Acquired { .. } | Notice::Lost(_)));
        if self.has(Flaw::LossToldToOne) && matches!(notices[..], [(_, Notice::Lost(_)), ..]) {
            notices.truncate(1);
        }
        carrier.notices = notices;
        let follows = carrier.is_behind(lifecycle.leased_until().map(ticks));
        if follows || !carrier.notices.is_empty() {
            process.doing = Doing::Telling { follows, is_over: false };
            process.holder.get_or_insert(Worker::Supervisor);
            return Ok(());
        }
        self.settle_down(world, who)
    }

    /// One announcement of several, or the end of all terms is moved before.
    pub(super) fn announce_carrier(&self, world: &mut World, who: usize) -> Checked {
        let process = &mut world.processes[who];
        let (Some(carrier), Some(lifecycle)) = (&mut process.carrier, &process.lifecycle) else {
            return Ok(());
        };
        let Doing::Telling { follows, mut is_over } = process.doing else { return Ok(()) };
        if follows {
            is_over = !carrier.follow_lease(self, lifecycle.leased_until().map(ticks));
            if is_over {
                carrier.notices.retain(|(_, notice)| !matches!(notice, Notice::Acquired { .. }));
            }
        } else if !carrier.notices.is_empty() {
            let (number, notice) = carrier.notices.remove(0);
            let Some(claim) = &mut carrier.seats[number].claim else { return Ok(()) };
            match notice {
                Notice::Acquired { .. } if !claim.released => {
                    if claim.term.replace(claim.token).is_some() {
                        return Err("a term began in another".to_owned());
                    }
                    let token = claim.token;
                    if world.processes[who].believes(number, world.now) {
                        self.begin_with(world, self.keys[number], token)?;
                    }
                }
                Notice::Lost(_) => claim.term = None,
                _ => {}
            }
        }
        let process = &mut world.processes[who];
        process.doing = Doing::Telling { follows: false, is_over };
        if process.carrier.as_ref().is_some_and(|carrier| !carrier.notices.is_empty()) {
            return Ok(());
        }
        if is_over {
            let lost = session::Event::Lost(LossReason::LeaseNotRenewed);
            return self.tell(world, who, Event::Session(lost));
        }
        self.settle_down(world, who)
    }

    /// Claims that are over leave; then there may be more to take in.
    fn settle_down(&self, world: &mut World, who: usize) -> Checked {
        for number in 0..SEATS {
            let process = &world.processes[who];
            let action = process.lifecycle.as_ref().map(|lifecycle| lifecycle.claim_action(number));
            if let Some(claim::Action::Finish(end)) = action {
                self.finish_one(world, who, number, end)?;
            }
        }
        let process = &mut world.processes[who];
        let Some(carrier) = &mut process.carrier else { return Ok(()) };
        if carrier.events.is_empty() {
            carrier.refused = None;
            process.rest();
        } else {
            process.doing = Doing::TakingIn;
        }
        Ok(())
    }

    fn finish_one(&self, world: &mut World, who: usize, number: usize, end: End) -> Checked {
        let Process { owner, stays, carrier, .. } = &mut world.processes[who];
        let (owner, stays) = (*owner, *stays);
        let Some(carrier) = carrier else { return Ok(()) };
        carrier.forget_lock(self, number);
        let Some(claim) = carrier.seats[number].claim.take() else { return Ok(()) };
        if !claim.heard {
            return Err(format!("{end:?} without a release"));
        }
        if end == End::NotHeld {
            return Err("a lock was given back that the session did not have".to_owned());
        }
        world.ends_as((owner.0, claim.id), stays, end)
    }

    /// What the session has, the engine knows of when it rests.
    pub(super) fn check_carrier(&self, world: &World, who: usize) -> Checked {
        let process = &world.processes[who];
        let (Some(carrier), Some(connection)) = (&process.carrier, &process.connection) else {
            return Ok(());
        };
        let Some(session) = world.server.session(connection.session) else { return Ok(()) };
        let Some(lifecycle) = process.lifecycle.as_ref().filter(|lifecycle| lifecycle.serves()) else {
            return Ok(());
        };
        let holds = carrier.claims().any(|(_, claim)| claim.in_term);
        let lasts = lifecycle.leased_until().is_some();
        if holds && !lasts || lasts && lifecycle.holding() == 0 {
            return Err("a claim holds without a lease, or a lease lasts for nobody".to_owned());
        }
        if process.doing != Doing::Nothing {
            return Ok(());
        }
        for (key, claim) in session.held.iter().enumerate() {
            let is_its = |(number, known): (usize, &Carried)| {
                Some(known.id) == *claim && self.keys[number] == key && known.has_lock
            };
            if claim.is_some() && !carrier.claims().any(is_its) {
                return Err("a session has a lock that nobody wants".to_owned());
            }
        }
        Ok(())
    }

    /// What was seen as over stays over.
    pub(super) fn check_seen(&self, before: &World, after: &World) -> Checked {
        for (before, process) in before.processes.iter().zip(&after.processes) {
            let seen = before.carrier.as_ref().filter(|carrier| carrier.has_seen_end());
            let had = |(number, claim): (usize, &Carried)| {
                claim.term.is_some() && process.believes(number, after.now)
            };
            if seen.is_some_and(|carrier| carrier.claims().any(had)) {
                return Err("a term goes on that was seen as over".to_owned());
            }
        }
        Ok(())
    }

    /// Whether nothing is in the way of this claim's lock but what passes with the time.
    pub(super) fn may_be_had(&self, world: &World, who: usize, number: usize) -> bool {
        let process = &world.processes[who];
        let Some(carrier) = &process.carrier else { return false };
        let key = self.keys[number];
        let wants_it =
            |(other, claim): (usize, &Carried)| other != number && self.keys[other] == key && !claim.released;
        let of_others = |session: &server::Session| {
            session.owner != process.owner
                && (session.held[key].is_some() || world.server.waits_for(session.id, key))
        };
        carrier.claim(number).is_some_and(|claim| !claim.released)
            && !process.stays
            && !carrier.claims().any(wants_it)
            && !world.server.sessions.iter().any(of_others)
    }
}

impl World {
    pub(super) fn release_one(&mut self, who: usize, number: usize) {
        let carrier = self.processes[who].carrier.as_mut();
        let claim = carrier.and_then(|carrier| carrier.seats[number].claim.as_mut());
        claim.into_iter().for_each(|claim| claim.released = true);
    }

    /// The engine of a carrier is gone; a session that is still open is closed.
    pub(super) fn end_carrier(&mut self, model: &Model, who: usize) {
        self.disconnect(model, who);
        let process = &mut self.processes[who];
        (process.lifecycle, process.in_flight) = (None, InFlight::Nothing);
        process.carrier.iter_mut().for_each(|carrier| carrier.give_up_run(model, None));
        process.rest();
    }
}
