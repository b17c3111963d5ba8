//! Fenced transactions: what `Term::fence` asks, and what the server makes of it.

use super::process::Connection;
use super::*;

/// A fenced transaction that the server has let begin, and that has not ended. It shares the fence lock.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) struct Transaction {
    process: usize,
    pub(super) key: usize,
    pub(super) token: u8,
    /// The application was told that it may go on.
    pub(super) told: bool,
    /// When the server ends it since it pauses for too long.
    pub(super) until: u8,
}

/// How far a fenced transaction has come, for the application. It may stand still before each step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Stage {
    /// It has looked at its term.
    Looked,
    /// The server has let it begin, and the answer is on its way.
    Accepted,
    /// The application was told, whatever it was.
    Answered,
}

/// A fenced transaction as its application sees it: of which seat's term, with which token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Fencing {
    pub(super) seat: usize,
    pub(super) token: u8,
    pub(super) stage: Stage,
}

impl Model {
    pub(super) fn fence_steps(&self, world: &World, who: usize) -> Vec<Step> {
        let process = &world.processes[who];
        match process.fencing.map(|fencing| fencing.stage) {
            None if world.fences_left > 0 => {
                let believing = process.seats().filter(|seat| process.believes(*seat, world.now));
                believing.map(|seat| Step::FenceLook(who, seat)).collect()
            }
            None => Vec::new(),
            Some(Stage::Looked) => vec![Step::FenceAsk(who)],
            Some(Stage::Accepted) => vec![Step::FenceAnswer(who)],
            Some(Stage::Answered) => vec![Step::FenceEnd(who)],
        }
    }

    /// It looks at its term once more, and tells the application.
    pub(super) fn fence_answer(&self, world: &mut World, who: usize) -> Checked {
        let process = &mut world.processes[who];
        let Some(Fencing { seat, token, .. }) = process.fencing else { return Ok(()) };
        process.fencing = Some(Fencing { seat, token, stage: Stage::Answered });
        let is_held = process.believes(seat, world.now) && process.token_of(seat) == Some(token);
        if !is_held && !self.has(Flaw::FenceLooksOnce) {
            return Ok(());
        }
        // A holder whose session was terminated believes in its term until it is told. Its transaction is open no more then, or
        // has kept the later term from beginning, which is checked too.
        let is_excused =
            is_held && process.connection.as_ref().is_some_and(|connection| connection.terminated);
        let key = process.key_of(self, seat);
        if world.server.rows[key].begun > token && !is_excused {
            return Err("a fenced transaction was let through after a later term had begun".to_owned());
        }
        for transaction in world.server.transactions.iter_mut().filter(|open| open.process == who) {
            transaction.told = true;
        }
        Ok(())
    }

    /// The application commits, or rolls back.
    pub(super) fn fence_end(&self, world: &mut World, who: usize) {
        world.processes[who].fencing = None;
        world.server.transactions.retain(|transaction| transaction.process != who);
        self.grant(world);
    }

    /// The statement: the row decides.
    pub(super) fn fence_ask(&self, world: &mut World, who: usize) -> Checked {
        let until = world.now + LEASE;
        let process = &mut world.processes[who];
        let Some(Fencing { seat, token, .. }) = process.fencing else { return Ok(()) };
        let key = process.key_of(self, seat);
        if world.server.rows[key].token != token {
            process.fencing = None;
            return Ok(());
        }
        if world.server.rows[key].begun > token {
            return Err("the server let a fenced transaction begin after a later term had begun".to_owned());
        }
        process.fencing = Some(Fencing { seat, token, stage: Stage::Accepted });
        world.server.transactions.push(Transaction { process: who, key, token, told: false, until });
        Ok(())
    }
}

impl World {
    pub(super) fn fence_look(&mut self, who: usize, seat: usize) {
        let process = &mut self.processes[who];
        process.fencing = process.token_of(seat).map(|token| Fencing { seat, token, stage: Stage::Looked });
        self.fences_left -= 1;
    }

    pub(super) fn newest_token(&mut self) -> u8 {
        self.tokens_mut().into_iter().max().map_or(0, |newest| *newest)
    }

    fn tokens_mut(&mut self) -> Vec<&mut u8> {
        let Self { server, processes, .. } = self;
        let Server { sessions, rows, transactions, .. } = server;
        let mut tokens = Vec::new();
        tokens.extend(rows.iter_mut().flat_map(|row| [&mut row.token, &mut row.before, &mut row.begun]));
        tokens.extend(transactions.iter_mut().map(|transaction| &mut transaction.token));
        tokens.extend(sessions.iter_mut().flat_map(|session| &mut session.unwritten).map(|(_, token)| token));
        for process in processes {
            tokens.push(&mut process.token);
            tokens.extend(process.term.as_mut().map(|term| &mut term.token));
            tokens.extend(process.connection.iter_mut().flat_map(Connection::tokens_mut));
            tokens.extend(process.fencing.as_mut().map(|fencing| &mut fencing.token));
            tokens.extend(process.carrier.iter_mut().flat_map(|carrier| carrier.tokens_mut()));
        }
        tokens
    }

    /// Only the order of the tokens matters, so worlds that differ by their numbers are the same. Without fences they do not
    /// matter at all.
    pub(super) fn renumber_tokens(&mut self) {
        let no_fence =
            self.fences_left == 0 && self.processes.iter().all(|process| process.fencing.is_none());
        let mut ranks: Vec<_> = self.tokens_mut().into_iter().map(|token| *token).collect();
        ranks.sort_unstable();
        ranks.dedup();
        for token in self.tokens_mut() {
            let rank = ranks.binary_search(token).unwrap_or_default();
            *token = if no_fence { 0 } else { u8::try_from(rank).unwrap_or(u8::MAX) };
        }
    }
}
