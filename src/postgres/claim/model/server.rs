//! The server: its sessions, the queue for the lock, the row of the newest term, and the fenced transactions.

use super::process::{Connection, Request};
use super::*;

#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub(super) struct Server {
    pub(super) sessions: Vec<Session>,
    pub(super) queue: Vec<Waiter>,
    /// The token in the row.
    pub(super) row: u8,
    /// What it was before it was written last.
    pub(super) row_before: u8,
    /// The token of the newest term that an application was told of.
    pub(super) begun: u8,
    pub(super) transactions: Vec<fence::Transaction>,
}

#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub(super) struct Session {
    pub(super) id: u8,
    /// The claim that uses it: the process that opened it, and the number of the claim.
    pub(super) owner: (usize, u8),
    pub(super) held: bool,
    pub(super) leased: bool,
    /// The server has said that it ends the session, and has not let go of the lock yet.
    pub(super) ending: bool,
    /// When its last statement ended.
    pub(super) idle_since: u8,
    /// A token that is not in the row yet, as [`Flaw::RowWrittenLater`] has it.
    pub(super) unwritten: Option<u8>,
}

#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) struct Waiter {
    pub(super) id: u8,
    sent: u8,
    until: u8,
    /// It has the lock, and waits for fenced transactions.
    at_gate: bool,
}

impl Model {
    /// Executes the request that has arrived.
    pub(super) fn process(&self, world: &mut World, who: usize) {
        let Doing::Performing { sent, .. } = world.processes[who].doing else { return };
        let Some(connection) = &mut world.processes[who].connection else { return };
        let Some(request) = connection.request.take() else { return };
        let (id, now) = (connection.session, world.now);
        let server = &mut world.server;
        let is_free = server.queue.is_empty()
            && server.sessions.iter().all(|session| !session.held || session.id == id);
        let owner = server.session(id).map(|session| session.owner);
        let clear = !server.sessions.iter().any(|session| session.id != id && Some(session.owner) == owner);
        let gate_is_free = self.gate_is_free(server);
        let Some(session) = server.session_mut(id) else { return };
        let is_free = is_free || session.held;
        let answer = match request {
            Request::Try => {
                session.leased = true;
                session.held = is_free;
                if is_free && gate_is_free {
                    return self.begin_term(world, id, sent);
                }
                Event::Claim(CLAIM, claim::Event::Busy)
            }
            Request::Queue => {
                session.held = is_free;
                if is_free && gate_is_free {
                    return self.begin_term(world, id, sent);
                }
                server.queue.push(Waiter { id, sent, until: now + SLICE, at_gate: is_free });
                return;
            }
            Request::Renew => {
                if let Some(token) = session.unwritten.take() {
                    server.write(token);
                }
                Event::Session(session::Event::Renewed { sent: tick(sent) })
            }
            Request::Unlock | Request::Settle => {
                session.leased = false;
                session.unwritten = None;
                let held = std::mem::take(&mut session.held);
                Event::Claim(
                    CLAIM,
                    if request == Request::Unlock {
                        claim::Event::Unlocked { held }
                    } else {
                        claim::Event::Settled { clear }
                    },
                )
            }
        };
        world.end_statement(id, answer);
        self.grant(world);
    }

    /// The statement of a session that has the lock writes the row, and is answered.
    fn begin_term(&self, world: &mut World, id: u8, sent: u8) {
        let token = if self.fences > 0 { world.newest_token() + 1 } else { 0 };
        if let Some(session) = world.server.session_mut(id) {
            session.held = true;
            if self.has(Flaw::RowWrittenLater) {
                session.unwritten = Some(token);
            }
        }
        if !self.has(Flaw::RowWrittenLater) {
            world.server.write(token);
        }
        if let Some(connection) = world.connection_mut(id) {
            connection.token = token;
        }
        world.end_statement(id, Event::Claim(CLAIM, claim::Event::Granted { sent: tick(sent) }));
    }

    fn gate_is_free(&self, server: &Server) -> bool {
        server.transactions.is_empty() || self.has(Flaw::GateIgnored)
    }

    /// Gives the lock to the first in the queue, if it is free, and lets through who has waited for fenced transactions.
    pub(super) fn grant(&self, world: &mut World) {
        let now = world.now;
        let server = &mut world.server;
        let gate_is_free = self.gate_is_free(server);
        if server.sessions.iter().all(|session| !session.held)
            && let Some(first) = server.queue.first_mut()
        {
            let id = first.id;
            (first.at_gate, first.until) = (true, now + SLICE);
            if let Some(session) = server.session_mut(id) {
                session.held = true;
            }
        }
        if gate_is_free && let Some(position) = server.queue.iter().position(|waiter| waiter.at_gate) {
            let Waiter { id, sent, .. } = server.queue.remove(position);
            self.begin_term(world, id, sent);
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
                Some(Request::Renew) => Event::Session(session::Event::Lost(LossReason::ServerError)),
                _ => Event::Claim(CLAIM, claim::Event::Refused { patient: false }),
            };
            let id = connection.session;
            self.end_statement(id, refused);
        }
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
        if let Some(connection) = &mut self.processes[who].connection {
            if self.server.row == connection.token {
                self.server.row = self.server.row_before;
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
        let now = self.now;
        if let Some(session) = self.server.session_mut(id) {
            session.idle_since = now;
        }
        if let Some(connection) = self.connection_mut(id) {
            connection.answer = Some(answer);
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

    fn write(&mut self, token: u8) {
        self.row_before = std::mem::replace(&mut self.row, token);
    }
}
