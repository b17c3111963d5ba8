//! What was explored, and what was found.

use std::collections::BTreeMap;
use std::fmt;
use std::hash::{BuildHasherDefault, Hash, Hasher};

use super::*;

/// A promise broken, and how it came to that.
pub(super) struct Violation {
    pub(super) promise: String,
    pub(super) steps: Vec<Step>,
}

/// What was explored.
#[derive(Default)]
pub(super) struct Tally {
    pub(super) states: usize,
    pub(super) transitions: usize,
    pub(super) depth: usize,
    pub(super) terms: usize,
    pub(super) losses: usize,
    pub(super) ends: BTreeMap<String, usize>,
    /// Ticks while a worker had something to announce.
    pub(super) freezes: usize,
    pub(super) faults: BTreeMap<Fault, usize>,
    /// Fenced transactions that were let through, turned down by the server, and turned down by the second look.
    pub(super) fences: [usize; 3],
    /// Attempts that found the lock free and a fenced transaction open.
    pub(super) fence_waits: usize,
    /// Callers that were made to leave.
    pub(super) left: usize,
    /// Releases that were given up, and late workers that came to an end afterwards.
    pub(super) given_up: [usize; 2],
}

impl Tally {
    pub(super) fn count(&mut self, before: &World, step: Step, after: &World) {
        self.transitions += 1;
        match step {
            Step::Tick => {
                let busy =
                    before.processes.iter().any(|process| matches!(process.doing, Doing::Announcing(_)));
                self.freezes += usize::from(busy);
            }
            Step::Announce(who) => {
                let (before, after) = (&before.processes[who], &after.processes[who]);
                self.terms += usize::from(before.term.is_none() && after.term.is_some());
                self.losses += usize::from(before.term.is_some() && after.term.is_none());
            }
            Step::Fault(fault, _) => *self.faults.entry(fault).or_default() += 1,
            Step::FenceAsk(who) => self.fences[1] += usize::from(after.processes[who].fencing.is_none()),
            Step::FenceAnswer(who) => {
                let is_told = after.server.transactions.iter().any(|open| open.told);
                let is_over = !before.processes[who].believes(before.now);
                self.fences[0] += usize::from(is_told);
                self.fences[2] += usize::from(is_over);
            }
            Step::Process(_) => {
                let is_held = after.server.sessions.iter().filter(|session| session.held).count();
                let was_held = before.server.sessions.iter().filter(|session| session.held).count();
                let is_new = is_held > was_held && !after.server.transactions.is_empty();
                self.fence_waits += usize::from(is_new);
            }
            Step::MakeLeave(_) => self.left += 1,
            Step::GiveUp(who) => {
                self.given_up[0] += usize::from(after.processes[who].lifecycle.is_none());
            }
            Step::Begin(who, _) => {
                let action = before.processes[who].lifecycle.as_ref().map(Lifecycle::action);
                if let Some(Action::Claim(_, claim::Action::Finish(end))) = action {
                    *self.ends.entry(format!("{end:?}")).or_default() += 1;
                    self.given_up[1] += usize::from(who == LATE);
                }
            }
            _ => {}
        }
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { states, transitions, depth, terms, losses, ends, freezes, faults, .. } = self;
        let ([told, refused, over], [given_up, late]) = (self.fences, self.given_up);
        let (fence_waits, left) = (self.fence_waits, self.left);
        write!(
            f,
            "{states} states, {transitions} transitions, {depth} deep; terms begun {terms}, lost {losses}; \
             ends {ends:?}; faults {faults:?}, ticks in which a worker stood still {freezes}; \
             fences let through {told}, refused {refused}, over {over}, waited for {fence_waits}; \
             callers made to leave {left}; releases given up {given_up}, late ends {late}"
        )
    }
}

impl fmt::Debug for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}, after {} steps:", self.promise, self.steps.len())?;
        self.steps.iter().try_for_each(|step| writeln!(f, "  {step:?}"))
    }
}

pub(super) fn fingerprint(world: &World) -> u64 {
    let mut mix = Mix::default();
    world.hash(&mut mix);
    mix.finish()
}

/// A hasher that is fast in a debug build too, where the standard one takes half of the model's time. Each step is a bijection of
/// the state, so that two worlds collide by chance only.
#[derive(Default)]
pub(super) struct Mix(u64);

pub(super) type Mixing = BuildHasherDefault<Mix>;

impl Hasher for Mix {
    fn write_u64(&mut self, word: u64) {
        let mixed = (self.0 ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = mixed ^ (mixed >> 29);
    }

    fn write_u8(&mut self, byte: u8) {
        self.write_u64(u64::from(byte));
    }

    fn write_u32(&mut self, word: u32) {
        self.write_u64(u64::from(word));
    }

    fn write_usize(&mut self, word: usize) {
        self.write_u64(word as u64);
    }

    fn write_isize(&mut self, word: isize) {
        self.write_u64(word as u64);
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u8(*byte));
    }

    fn finish(&self) -> u64 {
        let mixed = (self.0 ^ (self.0 >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
        mixed ^ (mixed >> 32)
    }
}

pub(super) fn path(origins: &[(usize, Step)], mut origin: usize, last: Step) -> Vec<Step> {
    let mut steps = vec![last];
    while origin != 0 {
        let (before, step) = origins[origin];
        steps.push(step);
        origin = before;
    }
    steps.reverse();
    steps
}
