//! First come, first served, among the threads of one process: those that want guards of one lock, or slots of one pool.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Sender, at, bounded, never, select_biased, tick};

use crate::context::Context;
use crate::error::ErrorKind;
use crate::loss::Lost;
use crate::sync::Mutex;

/// The threads of this process that want a guard of one lock, or a slot of one pool. Of those that want a lock the first takes part at
/// the server, with one session; the others wait here.
///
/// The turn ends with the guard, and also with the guard's term: a term that was lost excludes nobody. Of a shared lock it ends with the grant.
#[derive(Debug, Default)]
pub struct LocalQueue(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    turn: Option<Current>,
    waiting: VecDeque<Waiter>,
    last_number: u64,
}

/// Whose turn it is.
#[derive(Debug)]
struct Current {
    number: u64,
    /// Of the term that is held; `None` while the lock is being taken or given back.
    lost: Option<Lost>,
}

#[derive(Debug)]
struct Waiter {
    number: u64,
    /// Makes it look again. Holds one call: more of them say no more.
    look: Sender<()>,
}

/// The turn of a thread. It ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Turn {
    queue: Arc<LocalQueue>,
    number: u64,
}

/// What a waiter finds.
enum Step {
    Turn,
    /// It is the next one, if this term is lost.
    Next(Option<Lost>),
    Behind,
}

impl LocalQueue {
    /// Waits for a turn, until `context` ends: then gives how.
    pub(crate) fn enter(self: &Arc<Self>, context: &Context) -> Result<Turn, ErrorKind> {
        self.enter_unless(context, None)
    }

    /// As `enter`; asks ten times a second whether there is an obstacle, and gives up for what that says.
    pub(crate) fn enter_unless(
        self: &Arc<Self>,
        context: &Context,
        obstacle: Option<&dyn Fn() -> Option<ErrorKind>>,
    ) -> Result<Turn, ErrorKind> {
        const ASKS_EVERY: Duration = Duration::from_millis(100);
        /// Leaves the line, however the wait ends.
        struct Place<'a> {
            queue: &'a LocalQueue,
            number: u64,
        }
        impl Drop for Place<'_> {
            fn drop(&mut self) {
                let mut state = self.queue.0.lock();
                state.waiting.retain(|waiter| waiter.number != self.number);
                state.call_next();
            }
        }
        if let Some(turn) = self.try_enter() {
            return Ok(turn);
        }
        let (look, called) = bounded(1);
        let number = self.0.lock().join(look);
        let _place = Place { queue: self, number };
        let deadline = context.expires_at().map_or_else(never, at);
        let asks = obstacle.map_or_else(never, |_| tick(ASKS_EVERY));
        loop {
            let lost = match self.0.lock().step(number) {
                Step::Turn => return Ok(Turn { queue: Arc::clone(self), number }),
                Step::Next(lost) => lost.map_or_else(never, |lost| lost.channel().clone()),
                Step::Behind => never(),
            };
            select_biased! {
                recv(called) -> _ => {}
                recv(lost) -> _ => {}
                recv(context.cancelled()) -> _ => return Err(ErrorKind::Cancelled),
                recv(deadline) -> _ => return Err(ErrorKind::TimedOut),
                recv(asks) -> _ => {
                    if let Some(kind) = obstacle.and_then(|obstacle| obstacle()) {
                        return Err(kind);
                    }
                }
            }
        }
    }

    /// A turn, if nobody has it and nobody waits.
    pub(crate) fn try_enter(self: &Arc<Self>) -> Option<Turn> {
        let mut state = self.0.lock();
        if !state.waiting.is_empty() || !state.is_free() {
            return None;
        }
        let number = state.next_number();
        state.turn = Some(Current { number, lost: None });
        Some(Turn { queue: Arc::clone(self), number })
    }

    /// How many threads wait for their turn.
    pub(crate) fn waiting(&self) -> usize {
        self.0.lock().waiting.len()
    }
}

impl State {
    fn next_number(&mut self) -> u64 {
        self.last_number += 1;
        self.last_number
    }

    fn join(&mut self, look: Sender<()>) -> u64 {
        let number = self.next_number();
        self.waiting.push_back(Waiter { number, look });
        number
    }

    /// True if nobody has the turn, or only a term that is over.
    fn is_free(&self) -> bool {
        self.turn.as_ref().is_none_or(|turn| turn.lost.as_ref().is_some_and(Lost::is_lost))
    }

    fn step(&mut self, number: u64) -> Step {
        if self.waiting.front().is_none_or(|front| front.number != number) {
            return Step::Behind;
        }
        if !self.is_free() {
            return Step::Next(self.turn.as_ref().and_then(|turn| turn.lost.clone()));
        }
        self.waiting.pop_front();
        self.turn = Some(Current { number, lost: None });
        Step::Turn
    }

    fn call_next(&self) {
        if let Some(next) = self.waiting.front() {
            // Full: it has been called and has not looked since.
            let _ = next.look.try_send(());
        }
    }
}

impl Turn {
    /// The lock is held: the turn ends with the term at the latest.
    pub(crate) fn lasts_until(&self, lost: Lost) {
        self.set(Some(lost));
    }

    /// The lock is about to be given back, which closes the lost channel before it is free.
    pub(crate) fn lasts_until_dropped(&self) {
        self.set(None);
    }

    fn set(&self, lost: Option<Lost>) {
        let mut state = self.queue.0.lock();
        if let Some(turn) = state.turn.as_mut().filter(|turn| turn.number == self.number) {
            turn.lost = lost;
            state.call_next();
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut state = self.queue.0.lock();
        // After a loss another thread may have it.
        if state.turn.as_ref().is_some_and(|turn| turn.number == self.number) {
            state.turn = None;
            state.call_next();
        }
    }
}
