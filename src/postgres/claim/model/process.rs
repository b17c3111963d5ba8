//! A process: its application, the engine of its claim, and who runs that. Of a process whose session carries several claims, what is not the
//! session's is in its [`Carrier`].

use std::ops::Range;

use super::carrier::{Reply, Statement};
use super::server::Session;
use super::*;
use crate::pg::claim::machine::End;

const CLOSE: Action = Action::Session(session::Action::Close);

#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub(super) struct Process {
    pub(super) claims_left: u8,
    /// Which lock it wants.
    pub(super) key: usize,
    /// The claims, if its session carries several.
    pub(super) carrier: Option<Box<Carrier>>,
    /// Of the sessions of this claim: the process, and the number of the claim.
    pub(super) owner: (usize, u8),
    /// The claim that goes on, if one does.
    pub(super) lifecycle: Option<Lifecycle>,
    pub(super) doing: Doing,
    /// Who has the mutex of the engine.
    pub(super) holder: Option<Worker>,
    /// The supervisor, and the caller. Whoever stands still may have sent something that is on its way for as long.
    frozen: [bool; 2],
    /// The context of the caller that acquires was cancelled.
    pub(super) is_cancelled: bool,
    /// The supervisor is about to kill the session of a caller that is cancelled.
    pub(super) is_to_be_killed: bool,
    /// When the application asked for the release.
    pub(super) released: Option<u8>,
    /// Whether the machine has been told so.
    pub(super) release_heard: bool,
    /// How the release ends that has taken its time.
    pub(super) giving_up: Option<End>,
    /// It has ended so, whatever the engine does.
    pub(super) given_up: bool,
    /// The term by what the machine announced. It is closed by the application's own look at the clock too.
    pub(super) term: Option<Term>,
    /// Whether a term is open by what the machine said.
    in_term: bool,
    /// Of the last grant.
    pub(super) token: u8,
    /// By what the engine can be interrupted.
    pub(super) in_flight: InFlight,
    /// The claim's, or the one in the pool.
    pub(super) connection: Option<Connection>,
    /// Sessions that carried the claim before, and may have something of it.
    pub(super) lost: Vec<u8>,
    /// The fenced transaction of the application.
    pub(super) fencing: Option<fence::Fencing>,
    /// The takeover grace that its manager counts: its number, and since when.
    pub(super) grace: Option<(u8, u8)>,
    /// It reaches the primary of before only, which lives on beside a standby that was promoted.
    pub(super) stays: bool,
}

/// A thread that runs the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Worker {
    Supervisor,
    Caller,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Term {
    pub(super) until: u8,
    pub(super) token: u8,
}

/// What the one does who has the mutex.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub(super) enum Doing {
    #[default]
    Nothing,
    Performing {
        action: Action,
        sent: u8,
        by: u8,
    },
    Announcing(Notice),
    /// It asks for something for many claims.
    Carrying {
        statement: Statement,
        sent: u8,
        by: u8,
    },
    /// It announces to many claims what the machines said. If it `follows`, it moves the end of all terms before; if that `is_over`,
    /// somebody had seen it, and the session is lost afterwards.
    Telling {
        follows: bool,
        is_over: bool,
    },
    /// It tells the machines what has come of what it asked for.
    TakingIn,
}

#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub(super) enum InFlight {
    #[default]
    Nothing,
    Connecting,
    Session,
}

/// What lies between a process and its session.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub(super) struct Connection {
    pub(super) session: u8,
    /// On its way to the server.
    pub(super) request: Option<Request>,
    /// On its way back, with the token of a grant.
    pub(super) answer: Option<Event>,
    pub(super) token: u8,
    /// The answer to what was asked for many claims.
    pub(super) reply: Option<Reply>,
    /// Why the server closed it, if it did.
    pub(super) word: Option<LossReason>,
    /// Nothing comes through any more, either way.
    pub(super) cut: bool,
    /// It was closed at the client.
    pub(super) killed: bool,
    /// The server ended the session before its lease was over, so that the holder cannot know before it is told.
    pub(super) terminated: bool,
    /// The server was taken over, which nobody has told its holder, or not yet.
    pub(super) orphaned: bool,
}

/// What a session can be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Request {
    Try,
    Queue,
    Renew,
    Confirm,
    Unlock,
    Settle,
    Carrier(Statement),
}

impl Connection {
    /// Nothing comes through any more.
    pub(super) fn cut(&mut self) {
        let Self { request, answer, reply, word, cut, .. } = self;
        (*request, *answer, *reply, *word, *cut) = (None, None, None, None, true);
    }

    pub(super) fn tokens_mut(&mut self) -> Vec<&mut u8> {
        let replied = self.reply.iter_mut().flat_map(Reply::tokens_mut);
        replied.chain([&mut self.token]).collect()
    }
}

impl Request {
    fn of(action: Action) -> Option<Self> {
        match action {
            Action::Claim(_, claim::Action::Try) => Some(Self::Try),
            Action::Claim(_, claim::Action::Queue) => Some(Self::Queue),
            Action::Claim(_, claim::Action::Unlock) => Some(Self::Unlock),
            Action::Claim(_, claim::Action::Settle) => Some(Self::Settle),
            Action::Session(session::Action::Renew { .. }) => Some(Self::Renew),
            Action::Session(session::Action::Confirm { .. }) => Some(Self::Confirm),
            _ => None,
        }
    }
}

impl Process {
    pub(super) fn new(claims: u8) -> Self {
        Self { claims_left: claims, ..Self::default() }
    }

    /// One whose session carries several claims.
    pub(super) fn carrying(claims: [u8; SEATS]) -> Self {
        Self { carrier: Some(Box::new(Carrier::new(claims))), ..Self::default() }
    }

    pub(super) fn is_frozen(&self, worker: Worker) -> bool {
        self.frozen[worker as usize]
    }

    /// Whoever has the mutex is frozen, so nobody gets on.
    pub(super) fn stands_still(&self) -> bool {
        self.holder.is_some_and(|holder| self.is_frozen(holder))
    }

    pub(super) fn freeze(&mut self, worker: Worker, with_mutex: bool) {
        self.frozen[worker as usize] = true;
        if with_mutex {
            self.holder = Some(worker);
        }
    }

    pub(super) fn thaw(&mut self, worker: Worker) {
        self.frozen[worker as usize] = false;
        if self.doing == Doing::Nothing && self.holder == Some(worker) {
            self.holder = None;
        }
    }

    pub(super) fn rest(&mut self) {
        self.doing = Doing::Nothing;
        self.holder = None;
    }

    pub(super) fn is_performing(&self, wanted: Action) -> bool {
        matches!(self.doing, Doing::Performing { action, .. } if action == wanted)
    }

    /// Whether a caller's thread runs the engine.
    pub(super) fn runs_as(&self, worker: Worker) -> bool {
        self.holder == Some(worker)
    }

    /// A caller is at work whose context was cancelled, and could leave.
    pub(super) fn keeps_a_cancelled_caller(&self) -> bool {
        let is_caller = self.is_cancelled && self.runs_as(Worker::Caller);
        is_caller && self.frozen == [false; 2] && matches!(self.doing, Doing::Performing { .. })
    }

    /// Whether what is performed is on the way to the lock.
    pub(super) fn is_asking(&self) -> bool {
        self.is_performing(Action::Session(session::Action::Open))
            || self.is_performing(Action::Claim(CLAIM, claim::Action::Try))
            || self.is_performing(Action::Claim(CLAIM, claim::Action::Queue))
    }

    /// The claim has ended, and the engine has not been told.
    pub(super) fn is_interrupted(&self) -> bool {
        self.released.is_some() && !self.release_heard
    }

    /// Whether the worker may do it: see `Engine::allows`.
    pub(super) fn allows(&self, worker: Worker, action: Action) -> bool {
        match (worker, action) {
            (Worker::Supervisor, _) => true,
            (
                Worker::Caller,
                Action::Session(session::Action::Open)
                | Action::Claim(_, claim::Action::Try | claim::Action::Queue),
            ) => self.released.is_none() && !self.is_cancelled,
            (
                Worker::Caller,
                Action::Session(session::Action::Close)
                | Action::Claim(_, claim::Action::Unlock | claim::Action::Settle | claim::Action::Finish(_)),
            ) => self.release_heard,
            (Worker::Caller, _) => false,
        }
    }

    /// The numbers of its claims.
    pub(super) fn seats(&self) -> Range<usize> {
        0..if self.carrier.is_some() { SEATS } else { 1 }
    }

    /// Which lock a claim wants.
    pub(super) fn key_of(&self, model: &Model, seat: usize) -> usize {
        if self.carrier.is_some() { model.keys[seat] } else { self.key }
    }

    /// The token of the term by what was announced.
    pub(super) fn token_of(&self, seat: usize) -> Option<u8> {
        match &self.carrier {
            Some(carrier) => carrier.claim(seat).and_then(|claim| claim.term),
            None => self.term.map(|term| term.token),
        }
    }

    /// Whether the application is right to think that it has the lock.
    pub(super) fn believes(&self, seat: usize, now: u8) -> bool {
        match &self.carrier {
            Some(carrier) => carrier.believes(seat, now),
            None => self.released.is_none() && self.term.is_some_and(|term| now < term.until),
        }
    }

    /// How many terms have been announced, and not their ends.
    pub(super) fn terms(&self) -> usize {
        self.carrier.as_ref().map_or(usize::from(self.term.is_some()), |carrier| carrier.terms())
    }

    /// Whether a statement for several claims begins.
    pub(super) fn carries_two(&self) -> bool {
        self.carrier.as_ref().is_some_and(|carrier| carrier.carries_two(&self.doing))
    }

    /// Whether a statement for several claims is to be put right.
    pub(super) fn puts_right(&self) -> bool {
        matches!(self.doing, Doing::Carrying { statement: Statement::PutRight(_), .. })
    }

    /// Whether two claims are about to hear of their losses.
    pub(super) fn loses_two(&self) -> bool {
        self.carrier.as_ref().is_some_and(|carrier| carrier.loses_two())
    }

    /// Whether the time of a term is over.
    pub(super) fn may_see_end(&self, now: u8) -> bool {
        let of_carrier = self.carrier.as_ref().is_some_and(|carrier| carrier.may_see_end(now));
        of_carrier || self.term.is_some_and(|term| now >= term.until)
    }

    pub(super) fn see_end(&mut self) {
        self.term = None;
        self.carrier.iter_mut().for_each(|carrier| carrier.see_end());
    }

    /// What is next for the session, and for the claim if there is but one.
    fn action(&self) -> Option<Action> {
        let lifecycle = self.lifecycle.as_ref()?;
        match self.carrier {
            Some(_) => Some(Action::Session(lifecycle.session_action())),
            None => Some(lifecycle.action()),
        }
    }

    /// Why the connection is over, as far as is to be seen from here.
    pub(super) fn lost(&self) -> Option<LossReason> {
        let connection = self.connection.as_ref()?;
        let is_closed = connection.cut || connection.killed;
        connection.word.filter(|_| !connection.killed).or(is_closed.then_some(LossReason::ConnectionClosed))
    }

    /// A claim of its carrier goes on by itself.
    pub(super) fn moved(&self, owner: (usize, u8), key: usize, lifecycle: Lifecycle, lost: Vec<u8>) -> Self {
        let Self { grace, stays, .. } = *self;
        Self { owner, key, lifecycle: Some(lifecycle), lost, grace, stays, ..Self::default() }
    }

    /// The next one of the same application.
    pub(super) fn next(&self) -> Self {
        let Self { claims_left, key, fencing, grace, stays, .. } = *self;
        Self { claims_left, key, fencing, grace, stays, ..Self::default() }
    }
}

impl Model {
    /// A worker takes the mutex, asks what to do, and begins to do it.
    pub(super) fn begin(&self, world: &mut World, who: usize, worker: Worker) -> Checked {
        let now = world.now;
        let process = &mut world.processes[who];
        let Some(action) = process.action() else { return Ok(()) };
        if let Some(carrier) = process.carrier.as_ref().filter(|_| action == CLOSE) {
            carrier.check_told()?;
        }
        let released = process.released.unwrap_or(now);
        let by = match action {
            Action::Claim(_, claim::Action::Finish(end)) => return self.finish(world, who, end),
            Action::Session(session::Action::Renew { by } | session::Action::Confirm { by, .. }) => {
                ticks(by).min(now + SHORTLY)
            }
            Action::Claim(_, claim::Action::Queue) => now + SHORTLY + 2 * SLICE,
            Action::Claim(_, claim::Action::Unlock | claim::Action::Settle) => released + SHORTLY,
            _ => now + SHORTLY,
        };
        process.holder = Some(worker);
        process.doing = Doing::Performing { action, sent: now, by };
        if action == Action::Session(session::Action::Open) {
            process.in_flight = InFlight::Connecting;
        }
        if let Some(request) = Request::of(action) {
            let Some(connection) =
                process.connection.as_mut().filter(|_| process.in_flight == InFlight::Session)
            else {
                return Err(format!("{action:?} without a session"));
            };
            if self.has(Flaw::SettleSkipped) && request == Request::Settle {
                connection.answer = Some(Event::Claim(CLAIM, claim::Event::Settled { clear: false }));
            } else {
                connection.request = Some(request);
            }
        }
        Ok(())
    }

    /// How what is performed can end now.
    pub(super) fn outcomes(&self, world: &World, who: usize, action: Action, by: u8) -> Vec<Event> {
        let process = &world.processes[who];
        let lost = |reason| Event::Session(session::Event::Lost(reason));
        let failed = Event::Session(session::Event::OpenFailed { needs_operator: false });
        let closed = |gone| Event::Session(session::Event::Closed { gone });
        match action {
            // Its attempt is killed.
            Action::Session(session::Action::Open) if process.released.is_some() => {
                vec![failed, Event::Claim(CLAIM, claim::Event::Release)]
            }
            Action::Session(session::Action::Open) => {
                let opened = Event::Session(session::Event::Opened);
                let is_killed = process.is_cancelled
                    && process.runs_as(Worker::Caller)
                    && !process.is_frozen(Worker::Supervisor);
                if is_killed { vec![opened, failed] } else { vec![opened] }
            }
            Action::Session(session::Action::Close) => {
                let is_told = process.lost().is_some_and(LossReason::is_announced);
                let session =
                    process.connection.as_ref().and_then(|known| world.server.session(known.session));
                let gone = is_told && (session.is_none() || self.has(Flaw::WordTrusted));
                if gone { vec![closed(false), closed(true)] } else { vec![closed(false)] }
            }
            action => {
                let Some(connection) = &process.connection else { return Vec::new() };
                let mut events = Vec::new();
                // What has been read before a kill is an answer still.
                events.extend(connection.answer.or(process.lost().map(lost)));
                if connection.killed {
                    events.extend(process.lost().map(lost));
                }
                let confirms = matches!(action, Action::Session(session::Action::Confirm { .. }));
                let is_called = process.carrier.as_ref().is_some_and(|carrier| carrier.is_called());
                if confirms && (process.is_interrupted() || is_called) {
                    events.push(Event::Session(session::Event::TimePassed));
                }
                if world.now >= by {
                    events.push(match confirms {
                        true => Event::Session(session::Event::Unconfirmed),
                        false => lost(LossReason::HeartbeatTimedOut),
                    });
                }
                // An interrupted slice does not begin.
                let unsent = process.is_interrupted() && connection.request == Some(Request::Queue);
                if unsent && action == Action::Claim(CLAIM, claim::Action::Queue) {
                    events.push(Event::Claim(CLAIM, claim::Event::SliceOver));
                }
                events
            }
        }
    }

    /// What a worker has begun is over, with this event.
    pub(super) fn conclude(&self, world: &mut World, who: usize, mut event: Event) -> Checked {
        let now = tick(world.now);
        let process = &mut world.processes[who];
        let was_opening = process.is_performing(Action::Session(session::Action::Open));
        let is_leaving = matches!(process.doing, Doing::Carrying { statement: Statement::Settle, .. });
        let mut late = None;
        if let Some(connection) = &mut process.connection {
            connection.request = None;
            connection.answer = None;
            late = connection.reply.take();
            process.token = connection.token;
        }
        if is_leaving {
            world.end_carrier(self, who);
            return Ok(());
        }
        if let Some(carrier) = &mut process.carrier {
            carrier.give_up_run(self, late);
            match (event, &process.connection) {
                (Event::Session(session::Event::Opened), _) => carrier.opened(),
                (Event::Session(session::Event::Closed { gone: false }), Some(connection)) => {
                    carrier.note_lost(connection.session);
                }
                _ => {}
            }
        }
        match &mut event {
            Event::Session(session::Event::OpenFailed { .. }) => process.in_flight = InFlight::Nothing,
            Event::Session(session::Event::Opened) | Event::Claim(_, claim::Event::Release)
                if was_opening =>
            {
                process.in_flight = InFlight::Session;
                world.connect(who);
            }
            Event::Session(session::Event::Closed { .. }) if !self.has(Flaw::CloseSkipped) => {
                process.in_flight = InFlight::Nothing;
                world.disconnect(self, who);
            }
            Event::Claim(_, claim::Event::Granted { sent })
            | Event::Session(session::Event::Renewed { sent })
                if self.has(Flaw::TermFromAnswer) =>
            {
                *sent = now.max(*sent);
            }
            _ => {}
        }
        self.tell(world, who, event)
    }

    /// A worker tells the machines; what these say must be in order.
    pub(super) fn tell(&self, world: &mut World, who: usize, event: Event) -> Checked {
        let process = &mut world.processes[who];
        if process.carrier.is_some() {
            return self.tell_carrier(world, who, event);
        }
        let Some(lifecycle) = &mut process.lifecycle else { return Err("an event after the end".to_owned()) };
        let notices = lifecycle.handle(event, tick(world.now));
        let mut notice = match notices[..] {
            [] => None,
            [(CLAIM, notice)] => Some(notice),
            _ => return Err(format!("{notices:?} at once")),
        };
        if event == Event::Claim(CLAIM, claim::Event::Release) {
            process.release_heard = true;
            process.in_term = false;
        }
        let in_order = match notice {
            Some(Notice::Acquired { .. }) => {
                !process.release_heard && !std::mem::replace(&mut process.in_term, true)
            }
            Some(Notice::Renewed { .. }) => process.in_term,
            Some(Notice::Lost(_)) => std::mem::replace(&mut process.in_term, false),
            Some(Notice::Busy | Notice::InGrace | Notice::Failed) | None => true,
        };
        if !in_order {
            return Err(format!("{notice:?} out of order"));
        }
        let unheard = match notice {
            Some(Notice::Lost(_)) => self.has(Flaw::LossKeptQuiet),
            // No promise hangs on these.
            Some(Notice::Busy | Notice::InGrace | Notice::Failed) => true,
            _ => false,
        };
        match notice.take_if(|_| !unheard) {
            Some(notice) => {
                process.doing = Doing::Announcing(notice);
                // What the supervisor sees by its own look, it announces.
                process.holder.get_or_insert(Worker::Supervisor);
            }
            None => process.rest(),
        }
        Ok(())
    }

    /// A worker tells the application, as `Claim` has it: there a term ends by the clock, too.
    pub(super) fn announce(&self, world: &mut World, who: usize) -> Checked {
        let now = world.now;
        let process = &mut world.processes[who];
        let Doing::Announcing(notice) = process.doing else { return self.announce_carrier(world, who) };
        let lost = Event::Session(session::Event::Lost(LossReason::LeaseNotRenewed));
        let is_over = process.released.is_some() && !self.has(Flaw::EndNotFinal);
        match notice {
            Notice::Renewed { .. } if process.given_up => return self.tell(world, who, lost),
            _ if is_over => {}
            // No term begins on a session that was killed, whether or not its loss is known.
            Notice::Acquired { .. }
                if process.connection.as_ref().is_some_and(|connection| connection.killed)
                    && !self.has(Flaw::TermOnKilled)
                    && !(process.given_up && self.has(Flaw::EndNotFinal)) =>
            {
                return self.tell(world, who, lost);
            }
            Notice::Acquired { until } => {
                let term = Term { until: ticks(until), token: process.token };
                let key = process.key;
                if process.term.replace(term).is_some() {
                    return Err("a term began in another".to_owned());
                }
                // One that is over by now is told to nobody: see `Claim::current`.
                if now < term.until {
                    self.begin_with(world, key, term.token)?;
                }
            }
            Notice::Renewed { until } => match &mut process.term {
                Some(term) if now < term.until => term.until = ticks(until),
                _ => {
                    process.term = None;
                    return self.tell(world, who, lost);
                }
            },
            Notice::Lost(_) => process.term = None,
            Notice::Busy | Notice::InGrace | Notice::Failed => {}
        }
        world.processes[who].rest();
        Ok(())
    }

    /// An application is told of a term, with this token.
    pub(super) fn begin_with(&self, world: &mut World, key: usize, token: u8) -> Checked {
        let counts = world.fences_left > 0;
        let begun = &mut world.server.rows[key].begun;
        if counts && token <= *begun {
            return Err("a term began with no higher token than one before".to_owned());
        }
        *begun = token.max(*begun);
        Ok(())
    }

    fn finish(&self, world: &mut World, who: usize, end: End) -> Checked {
        let process = &world.processes[who];
        if !process.release_heard {
            return Err(format!("{end:?} without a release"));
        }
        let known = process.connection.as_ref().filter(|connection| !connection.killed);
        let pooled = known.and_then(|connection| world.server.session(connection.session));
        if let Some(session) = pooled
            && (session.holds() || session.leased || world.server.waits(session.id))
        {
            return Err("a session went back to the pool with the lock or the lease".to_owned());
        }
        if !process.given_up {
            world.ends_as(process.owner, process.stays, end)?;
        }
        let mut next = process.next();
        // What does not serve another claim is of no interest any more.
        next.connection = known.cloned().filter(|_| next.claims_left > 0);
        if process.connection.is_some() && known.is_none() {
            world.disconnect(self, who);
        }
        world.processes[who] = next;
        Ok(())
    }
}

impl World {
    /// What the application is told of the end must be true.
    pub(super) fn ends_as(&self, owner: (usize, u8), stays: bool, end: End) -> Checked {
        // What a primary of before has is of no meaning on the new one.
        let is_own = |session: &&Session| session.owner.0 == owner.0 && session.before == stays;
        let mut own = self.server.sessions.iter().filter(is_own);
        let has_something = |session: &Session| {
            let waits = session.owner == owner && self.server.waits(session.id);
            session.held.contains(&Some(owner.1)) || waits
        };
        if end == End::Released && own.any(has_something) {
            return Err("released, while the server holds something for the claim".to_owned());
        }
        Ok(())
    }

    fn connect(&mut self, who: usize) {
        let process = &mut self.processes[who];
        let owner = process.owner;
        // From the pool, where nobody looks whether it lives still.
        if let Some(connection) = &process.connection {
            if let Some(session) = self.server.session_mut(connection.session) {
                session.owner = owner;
            }
            return;
        }
        let known: Vec<_> = self.processes.iter().flat_map(|process| &process.connection).collect();
        let taken =
            |id| self.server.session(id).is_some() || known.iter().any(|connection| connection.session == id);
        let id = (0..).find(|id| !taken(*id)).unwrap_or_default();
        let session = Session { id, owner, before: self.processes[who].stays, ..Session::default() };
        self.server.sessions.push(session);
        self.processes[who].connection = Some(Connection { session: id, ..Connection::default() });
    }

    pub(super) fn disconnect(&mut self, model: &Model, who: usize) {
        if let Some(connection) = self.processes[who].connection.take()
            && !connection.cut
            && self.server.session(connection.session).is_some_and(|session| !session.ending)
        {
            self.end_session(model, connection.session, LossReason::ConnectionClosed);
        }
    }

    pub(super) fn cut(&mut self, who: usize) {
        if let Some(connection) = &mut self.processes[who].connection {
            connection.cut();
        }
    }

    pub(super) fn is_cut(&self, who: usize) -> bool {
        self.processes[who].connection.as_ref().is_some_and(|connection| connection.cut)
    }

    /// Whether the claim's session queues.
    pub(super) fn waits(&self, who: usize) -> bool {
        self.processes[who].connection.as_ref().is_some_and(|known| self.server.waits(known.session))
    }
}
