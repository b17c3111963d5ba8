//! The server: its sessions, the queues for the locks, the rows of the newest terms, and the fenced transactions.

use super::carrier::{Done, LockOp, Reply, Statement};
use super::process::{Connection, Request};
use super::*;

#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub(super) struct Server {
    pub(super) sessions: Vec<Session>,
    pub(super) queue: Vec<Waiter>,
    /// Of each key.
    pub(super) rows: [Row; KEYS],
    pub(super) transactions: Vec<fence::Transaction>,
    pub(super) past: takeover::Past,
}

/// The row of the newest term of a key.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub(super) struct Row {
    pub(super) token: u8,
    /// What it was before it was written last.
    pub(super) before: u8,
    /// The token of the newest term that an application was told of.
    pub(super) begun: u8,
}

#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub(super) struct Session {
    pub(super) id: u8,
    /// The claim that uses it: the process that opened it, and the number of the claim, or [`CARRIER`](super::carrier::CARRIER).
    pub(super) owner: (usize, u8),
    /// For which claim of the process it holds the lock of each key.
    pub(super) held: [Option<u8>; KEYS],
    pub(super) leased: bool,
    /// The server has said that it ends the session, and has not let go of the lock yet.
    pub(super) ending: bool,
    /// When its last statement ended.
    pub(super) idle_since: u8,
    /// A token that is not in the row yet, as [`Flaw::RowWrittenLater`] has it, and of which key.
    pub(super) unwritten: Option<(usize, u8)>,
    /// It is on the primary of before, which lives on beside the promoted standby.
    pub(super) before: bool,
    /// It was confirmed once, as [`Flaw::ConfirmationReused`] has it.
    pub(super) reuses: bool,
}

#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) struct Waiter {
    pub(super) id: u8,
    pub(super) key: usize,
    sent: u8,
    until: u8,
    /// It has the lock, and waits for fenced transactions.
    at_fence_lock: bool,
}

impl Waiter {
    /// When it asked.
    pub(super) fn sent(&self) -> u8 {
        self.sent
    }
}

impl Model {
    /// Executes the request that has arrived.
    pub(super) fn process(&self, world: &mut World, who: usize) -> Checked {
        let (now, key) = (world.now, world.processes[who].key);
        let (Doing::Performing { sent, .. } | Doing::Carrying { sent, .. }) = world.processes[who].doing
        else {
            return Ok(());
        };
        let Some(connection) = &mut world.processes[who].connection else { return Ok(()) };
        let Some(request) = connection.request.take() else { return Ok(()) };
        let id = connection.session;
        if let Request::Carrier(statement) = request {
            return self.carry(world, who, id, statement);
        }
        let may_ask = request != Request::Try || self.looks_at_past(world, who, key);
        let server = &mut world.server;
        let owner = server.session(id).map(|session| session.owner);
        let lost = &world.processes[who].lost;
        let is_clear = |session: &Session| {
            session.id == id || Some(session.owner) != owner && !lost.contains(&session.id)
        };
        let clear = server.sessions.iter().all(is_clear);
        let (is_free, fence_lock_is_free) = (server.is_free(id, key), self.fence_lock_is_free(server, key));
        let Some(session) = server.session_mut(id) else { return Ok(()) };
        let claim = Some(session.owner.1);
        let is_free = is_free || session.held[key].is_some();
        let answer = match request {
            Request::Try if !may_ask => {
                Event::Claim(CLAIM, claim::Event::Later { until: tick(now + 1), obstacle: Obstacle::Grace })
            }
            Request::Try => {
                session.leased = true;
                session.held[key] = claim.filter(|_| is_free);
                if is_free && fence_lock_is_free {
                    self.begin_term(world, id, key, sent);
                    return Ok(());
                }
                Event::Claim(CLAIM, claim::Event::Busy)
            }
            Request::Queue => {
                session.held[key] = claim.filter(|_| is_free);
                if is_free && fence_lock_is_free {
                    self.begin_term(world, id, key, sent);
                    return Ok(());
                }
                server.queue.push(Waiter { id, key, sent, until: now + SLICE, at_fence_lock: is_free });
                return Ok(());
            }
            Request::Renew => {
                if let Some((key, token)) = session.unwritten.take() {
                    server.rows[key].write(token);
                }
                Event::Session(session::Event::Renewed { sent: tick(sent) })
            }
            Request::Confirm => match self.confirmation(server, id, tick(sent)) {
                Some(confirmed) => confirmed,
                None => return Ok(()),
            },
            Request::Unlock | Request::Settle => {
                session.leased = false;
                session.unwritten = None;
                let held = std::mem::take(&mut session.held) != Session::default().held;
                Event::Claim(
                    CLAIM,
                    if request == Request::Unlock {
                        claim::Event::Unlocked { held }
                    } else {
                        claim::Event::Settled { clear }
                    },
                )
            }
            Request::Carrier(_) => return Ok(()),
        };
        world.end_statement(id, answer);
        self.grant(world);
        Ok(())
    }

    /// Executes a statement for many claims.
    fn carry(&self, world: &mut World, who: usize, id: u8, statement: Statement) -> Checked {
        let mut done = [None; SEATS];
        if world.processes[who].carrier.as_ref().is_some_and(|carrier| carrier.is_refused(statement)) {
            world.refuse_carrier(id, statement);
            return Ok(());
        }
        let Some(session) = world.server.session_mut(id) else { return Ok(()) };
        match statement {
            Statement::Lease(leased) => session.leased = leased,
            Statement::Settle => {
                if session.holds() {
                    return Err("a session goes back to the pool with a lock".to_owned());
                }
                session.leased = false;
            }
            Statement::Carry(ops) | Statement::PutRight(ops) => {
                let takes = matches!(statement, Statement::Carry(_));
                for (number, op) in ops.into_iter().enumerate() {
                    done[number] = match op {
                        Some(LockOp::Take { key, claim }) if takes => {
                            Some(self.carry_one(world, who, id, key, claim)?)
                        }
                        Some(LockOp::Take { key, .. } | LockOp::Give { key }) => {
                            let session = world.server.session_mut(id);
                            let held = session.and_then(|session| session.held[key].take()).is_some();
                            Some(Done::Given { held })
                        }
                        None => None,
                    };
                }
            }
        }
        world.end_carrying(id, Reply::Done(done));
        self.grant(world);
        Ok(())
    }

    /// Tries a lock for one of many claims.
    fn carry_one(
        &self,
        world: &mut World,
        who: usize,
        id: u8,
        key: usize,
        claim: u8,
    ) -> Result<Done, String> {
        if !self.looks_at_past(world, who, key) {
            return Ok(Done::InGrace);
        }
        let server = &mut world.server;
        let (is_free, fence_lock_is_free) = (server.is_free(id, key), self.fence_lock_is_free(server, key));
        let Some(session) = server.session_mut(id) else { return Ok(Done::Busy) };
        if session.held[key].is_some() {
            return Err("a session was asked twice for one lock".to_owned());
        }
        if !session.leased {
            return Err("a lock was asked for before the lease was on".to_owned());
        }
        if !is_free || !fence_lock_is_free {
            session.held[key] = Some(claim).filter(|_| is_free && self.has(Flaw::BusyKept));
            return Ok(Done::Busy);
        }
        Ok(Done::Granted { token: self.take_lock(world, id, key, claim) })
    }

    /// The statement of a session that has the lock writes the row, and is answered.
    fn begin_term(&self, world: &mut World, id: u8, key: usize, sent: u8) {
        let claim = world.server.session(id).map_or(0, |session| session.owner.1);
        let token = self.take_lock(world, id, key, claim);
        if let Some(connection) = world.connection_mut(id) {
            connection.token = token;
        }
        world.end_statement(id, Event::Claim(CLAIM, claim::Event::Granted { sent: tick(sent) }));
    }

    /// The session has the lock, and the row is written; gives the token.
    fn take_lock(&self, world: &mut World, id: u8, key: usize, claim: u8) -> u8 {
        let token = if self.fences > 0 { world.newest_token() + 1 } else { 0 };
        if let Some(session) = world.server.session_mut(id) {
            session.held[key] = Some(claim);
            if self.has(Flaw::RowWrittenLater) {
                session.unwritten = Some((key, token));
            }
            let (holder, before, now) = (session.owner.0, session.before, world.now);
            if !before {
                world.server.past.begin_term(holder, key, now);
            }
        }
        if !self.has(Flaw::RowWrittenLater) {
            world.server.rows[key].write(token);
        }
        token
    }

    fn fence_lock_is_free(&self, server: &Server, key: usize) -> bool {
        server.transactions.iter().all(|transaction| transaction.key != key) || self.has(Flaw::GateIgnored)
    }

    /// Gives each lock to the first in its queue, if it is free, and lets through who has waited for fenced transactions.
    pub(super) fn grant(&self, world: &mut World) {
        for key in 0..KEYS {
            self.grant_one(world, key);
        }
    }

    fn grant_one(&self, world: &mut World, key: usize) {
        let now = world.now;
        let server = &mut world.server;
        let fence_lock_is_free = self.fence_lock_is_free(server, key);
        for before in [false, true] {
            let is_next = |waiter: &Waiter| waiter.key == key && server.is_before(waiter.id) == before;
            let first = server.queue.iter().position(is_next);
            let holds = |session: &Session| session.held[key].is_some() && session.before == before;
            let is_held = server.sessions.iter().any(holds);
            if let Some(waiter) = first.filter(|_| !is_held).map(|first| &mut server.queue[first]) {
                let id = waiter.id;
                (waiter.at_fence_lock, waiter.until) = (true, now + SLICE);
                if let Some(session) = server.session_mut(id) {
                    session.held[key] = Some(session.owner.1);
                }
            }
        }
        let passes = |waiter: &Waiter| waiter.key == key && waiter.at_fence_lock;
        if fence_lock_is_free && let Some(position) = server.queue.iter().position(passes) {
            let Waiter { id, sent, .. } = server.queue.remove(position);
            self.begin_term(world, id, key, sent);
        }
    }
}

impl World {
    /// Time passes; what is due comes to pass.
    pub(super) fn tick(&mut self, model: &Model) {
        self.now += 1;
        let now = self.now;
        self.server.transactions.retain(|transaction| transaction.until > now);
        model.grant(self);
        let expired = |server: &Server| {
            let mut idle = server.sessions.iter().filter(|session| !server.waits(session.id));
            idle.find(|session| session.leased && session.idle_since + LEASE <= now).map(|session| session.id)
        };
        while let Some(id) = expired(&self.server) {
            self.end_session(model, id, LossReason::LeaseExpired);
        }
        while let Some(position) = self.server.queue.iter().position(|waiter| waiter.until <= now) {
            let waiter = self.server.queue.remove(position);
            self.end_statement(waiter.id, Event::Claim(CLAIM, claim::Event::SliceOver));
        }
    }

    /// Whether a request of the process is on its way to a session that can hear it.
    pub(super) fn can_process(&self, who: usize) -> bool {
        self.processes[who].connection.as_ref().is_some_and(|connection| {
            connection.request.is_some()
                && !connection.cut
                && self.server.session(connection.session).is_some_and(|session| !session.ending)
        })
    }

    pub(super) fn refuse(&mut self, who: usize) {
        if let Some(connection) = &mut self.processes[who].connection {
            // A heartbeat that is refused says nothing of the lock, so the engine takes the session for lost.
            let refused = match connection.request.take() {
                Some(Request::Renew | Request::Confirm) => {
                    Event::Session(session::Event::Lost(LossReason::ServerError))
                }
                Some(Request::Carrier(statement)) => {
                    let id = connection.session;
                    return self.refuse_carrier(id, statement);
                }
                _ => Event::Claim(CLAIM, claim::Event::Refused { needs_operator: false }),
            };
            let id = connection.session;
            self.end_statement(id, refused);
        }
    }

    /// A statement for many claims fails. What it took before, the session keeps; a row that was written is taken back.
    fn refuse_carrier(&mut self, id: u8, statement: Statement) {
        if let Statement::Carry(ops) = statement {
            for op in ops.into_iter().flatten() {
                if let LockOp::Take { key, claim } = op
                    && self.server.is_free(id, key)
                    && let Some(session) = self.server.session_mut(id)
                {
                    session.held[key] = Some(claim);
                }
            }
        }
        self.end_carrying(id, Reply::Refused);
    }

    /// A cancel request ends a wait, wherever it is in it.
    pub(super) fn cancel(&mut self, who: usize) {
        if let Some(connection) = &self.processes[who].connection {
            let id = connection.session;
            self.server.queue.retain(|waiter| waiter.id != id);
            self.end_statement(id, Event::Claim(CLAIM, claim::Event::SliceOver));
        }
    }

    /// The row that was written is taken back with the statement, the lock is not.
    pub(super) fn slice_ends_in_grant(&mut self, who: usize) {
        let key = self.processes[who].key;
        if let Some(connection) = &mut self.processes[who].connection {
            let row = &mut self.server.rows[key];
            if row.token == connection.token {
                row.token = row.before;
            }
            connection.answer = Some(Event::Claim(CLAIM, claim::Event::SliceOver));
        }
    }

    /// The server says so first, and lets go of the lock afterwards.
    pub(super) fn terminate(&mut self, who: usize) {
        if let Some(connection) = &mut self.processes[who].connection {
            connection.terminated = true;
            connection.word = Some(LossReason::Terminated);
            let id = connection.session;
            self.server.queue.retain(|waiter| waiter.id != id);
            if let Some(session) = self.server.session_mut(id) {
                session.ending = true;
            }
        }
    }

    /// The sessions of the claim that were terminated are gone.
    pub(super) fn exit(&mut self, model: &Model, who: usize) {
        let owner = self.processes[who].owner;
        self.server.sessions.retain(|session| !(session.ending && session.owner == owner));
        model.grant(self);
    }

    /// Whether a claim that is over has left a session behind that was terminated, and is not gone.
    pub(super) fn has_former_ending(&self) -> bool {
        self.server.sessions.iter().any(|session| session.ending && self.is_former(session.owner))
    }

    pub(super) fn exit_of_former(&mut self, model: &Model) {
        let former: Vec<_> = self
            .server
            .sessions
            .iter()
            .map(|session| session.owner)
            .filter(|owner| self.is_former(*owner))
            .collect();
        self.server.sessions.retain(|session| !(session.ending && former.contains(&session.owner)));
        model.grant(self);
    }

    fn is_former(&self, owner: (usize, u8)) -> bool {
        !self.processes.iter().any(|process| process.lifecycle.is_some() && process.owner == owner)
    }

    fn end_statement(&mut self, id: u8, answer: Event) {
        self.idle(id);
        if let Some(connection) = self.connection_mut(id) {
            connection.answer = Some(answer);
        }
    }

    fn end_carrying(&mut self, id: u8, reply: Reply) {
        self.idle(id);
        if let Some(connection) = self.connection_mut(id) {
            connection.reply = Some(reply);
        }
    }

    fn idle(&mut self, id: u8) {
        let now = self.now;
        if let Some(session) = self.server.session_mut(id) {
            session.idle_since = now;
        }
    }

    pub(super) fn end_session(&mut self, model: &Model, id: u8, word: LossReason) {
        self.server.sessions.retain(|session| session.id != id);
        self.server.queue.retain(|waiter| waiter.id != id);
        if let Some(connection) = self.connection_mut(id) {
            connection.word = Some(word);
        }
        model.grant(self);
    }

    /// The connection by which a session can reach its client.
    fn connection_mut(&mut self, id: u8) -> Option<&mut Connection> {
        let mut connections = self.processes.iter_mut().flat_map(|process| &mut process.connection);
        connections.find(|connection| connection.session == id && !connection.cut && !connection.killed)
    }
}

impl Server {
    pub(super) fn session(&self, id: u8) -> Option<&Session> {
        self.sessions.iter().find(|session| session.id == id)
    }

    pub(super) fn session_mut(&mut self, id: u8) -> Option<&mut Session> {
        self.sessions.iter_mut().find(|session| session.id == id)
    }

    /// Whether a session of the claim was terminated, and is not gone.
    pub(super) fn is_ending(&self, owner: (usize, u8)) -> bool {
        self.sessions.iter().any(|session| session.ending && session.owner == owner)
    }

    pub(super) fn waits(&self, id: u8) -> bool {
        self.queue.iter().any(|waiter| waiter.id == id)
    }

    pub(super) fn waits_for(&self, id: u8, key: usize) -> bool {
        self.queue.iter().any(|waiter| waiter.id == id && waiter.key == key)
    }

    /// Whether a session may have the lock, or has it.
    fn is_free(&self, id: u8, key: usize) -> bool {
        let before = self.is_before(id);
        let mut waiters = self.queue.iter().filter(|waiter| waiter.key == key);
        waiters.all(|waiter| self.is_before(waiter.id) != before)
            && self
                .sessions
                .iter()
                .all(|session| session.held[key].is_none() || session.id == id || session.before != before)
    }
}

impl Session {
    /// Whether it holds any lock.
    pub(super) fn holds(&self) -> bool {
        self.held.iter().any(Option::is_some)
    }
}

impl Row {
    fn write(&mut self, token: u8) {
        self.before = std::mem::replace(&mut self.token, token);
    }
}
