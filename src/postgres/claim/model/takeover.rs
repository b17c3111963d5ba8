//! A takeover of the server: it is restarted, or another one takes its place, with or without the old one's unlogged tables. The policy is
//! the strictest one, for which each of them counts.
//!
//! As for the library, the record in the database says whether all terms of before are over, a process counts the grace on its own clock
//! from its first look at that record, and who has waited it out marks it. A process whose term was the last one of the lock
//! need not wait, where the row of that term is there still.

use super::*;

/// In whichever way.
pub(super) const FAULTS: [Fault; 5] = [
    Fault::TakenOver { clean: true, told: true, in_turn: true },
    Fault::TakenOver { clean: true, told: true, in_turn: false },
    Fault::TakenOver { clean: true, told: false, in_turn: false },
    Fault::TakenOver { clean: false, told: true, in_turn: false },
    Fault::TakenOver { clean: false, told: false, in_turn: false },
];

/// What the database knows of the time before.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub(super) struct Past {
    /// The number of the record, another one after each takeover.
    record: u8,
    /// Terms of before may last still.
    pending: bool,
    /// Whose term was the last one of each key, by its row, and when it began.
    last: [Option<(usize, u8)>; KEYS],
    /// Whose terms there were, for [`Flaw::ProofOfFormer`].
    former: [[bool; 2]; KEYS],
}

impl Past {
    pub(super) fn is_pending(&self) -> bool {
        self.pending
    }

    /// A standby was promoted, which has nothing of the unlogged tables.
    pub(super) fn begin_on_standby(&mut self) {
        *self = Self { record: self.record + 1, pending: true, ..Self::default() };
    }

    pub(super) fn begin_term(&mut self, holder: usize, key: usize, now: u8) {
        self.last[key] = Some((holder, now));
        if let Some(former) = self.former[key].get_mut(holder) {
            *former = true;
        }
    }
}

impl Model {
    /// Whether the process may ask for the lock, after a look at the record. One that has waited the grace out ends it.
    pub(super) fn looks_at_past(&self, world: &mut World, who: usize, key: usize) -> bool {
        let now = world.now;
        if world.processes[who].stays {
            return true;
        }
        let past = &mut world.server.past;
        if !past.pending || self.has(Flaw::GraceIgnored) {
            return true;
        }
        let process = &mut world.processes[who];
        let (of, _) = process.owner;
        let proven = match self.has(Flaw::ProofOfFormer) {
            true => past.former[key].get(of).is_some_and(|former| *former),
            // The holder before may have lost its session by the end of the server, and not by its lease.
            false => past.last[key].is_some_and(|(last, began)| {
                last == of && (now >= began + LEASE || self.has(Flaw::ProofTooYoung))
            }),
        };
        if proven {
            return true;
        }
        let lasts = if self.has(Flaw::GraceTooShort) { 1 } else { LEASE };
        let (_, since) = *process.grace.insert(
            process
                .grace
                .filter(|(record, _)| *record == past.record || self.has(Flaw::GraceOutlivesCrash))
                .unwrap_or((past.record, now)),
        );
        past.pending = now < since + lasts;
        !past.pending
    }
}

impl World {
    /// All sessions end, and with them the locks. What a process has been answered before is on its way still, if the process is told
    /// of the end at all. A server that is shut down ends sessions `in_turn`: the holder's may be gone before that of the first waiter, who is
    /// granted the lock for this moment, as after the termination of a session.
    pub(super) fn take_over(&mut self, clean: bool, told: bool, in_turn: bool) {
        if in_turn {
            self.grant_at_the_end();
        }
        self.server.sessions.clear();
        self.server.queue.clear();
        self.server.transactions.clear();
        let past = &mut self.server.past;
        (past.record, past.pending) = (past.record + 1, true);
        if !clean {
            *past = Past { record: past.record, pending: true, ..Past::default() };
        }
        for connection in self.processes.iter_mut().flat_map(|process| &mut process.connection) {
            connection.orphaned = true;
            connection.request = None;
            if told {
                connection.word = connection.word.or(Some(LossReason::ConnectionClosed));
            } else {
                connection.cut();
            }
        }
    }

    fn grant_at_the_end(&mut self) {
        for key in 0..KEYS {
            let Some(first) = self.server.queue.iter().position(|waiter| waiter.key == key) else { continue };
            let waiter = self.server.queue.remove(first);
            let Some(owner) = self.server.session(waiter.id).map(|session| session.owner.0) else { continue };
            self.server.past.begin_term(owner, key, self.now);
            let mut connections = self.processes.iter_mut().flat_map(|process| &mut process.connection);
            let reaches = |connection: &&mut process::Connection| {
                connection.session == waiter.id && !connection.cut && !connection.killed
            };
            if let Some(connection) = connections.find(reaches) {
                let granted = claim::Event::Granted { sent: tick(waiter.sent()) };
                connection.answer = Some(Event::Claim(CLAIM, granted));
                connection.terminated = true;
            }
        }
    }

    /// Whether a process has a session, which a takeover would end.
    pub(super) fn is_connected(&self) -> bool {
        self.processes.iter().flat_map(|process| &process.connection).any(|connection| !connection.orphaned)
    }
}
