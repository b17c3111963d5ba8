//! What was explored, and what was found.

use std::collections::BTreeMap;
use std::fmt;
use std::hash::{BuildHasherDefault, Hash, Hasher};

use super::carrier::{Done, Reply};
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
    /// Attempts that found a takeover grace, terms that began after one had been waited out, and proven ones that began within one.
    pub(super) graces: usize,
    pub(super) terms_after_grace: usize,
    pub(super) proven: usize,
    /// Callers that were made to leave.
    pub(super) left: usize,
    /// Claims that left their carrier, statements for two claims, refused statements that were put right, and claims that found their locks
    /// taken by another one of their carrier.
    pub(super) moved: usize,
    pub(super) batches: usize,
    pub(super) put_right: usize,
    pub(super) taken: usize,
    /// Sessions that were lost with two terms.
    pub(super) lost_together: usize,
    /// Releases that were given up, and late workers that came to an end afterwards.
    pub(super) given_up: [usize; 2],
}

impl Tally {
    pub(super) fn count(&mut self, before: &World, step: Step, after: &World) {
        self.transitions += 1;
        self.count_ends(before, step, after);
        match step {
            Step::Tick => {
                let is_announcing =
                    |process: &Process| matches!(process.doing, Doing::Announcing(_) | Doing::Telling { .. });
                let busy = before.processes.iter().any(is_announcing);
                self.freezes += usize::from(busy);
            }
            Step::Announce(who) => {
                let (before, after) = (&before.processes[who], &after.processes[who]);
                self.terms += after.terms().saturating_sub(before.terms());
                self.losses += before.terms().saturating_sub(after.terms());
                self.lost_together += usize::from(before.loses_two());
            }
            Step::Fault(fault, _) => *self.faults.entry(fault).or_default() += 1,
            Step::FenceAsk(who) => self.fences[1] += usize::from(after.processes[who].fencing.is_none()),
            Step::FenceAnswer(who) => {
                let is_told = after.server.transactions.iter().any(|open| open.told);
                let process = &before.processes[who];
                let is_over =
                    !process.fencing.is_some_and(|fencing| process.believes(fencing.seat, before.now));
                self.fences[0] += usize::from(is_told);
                self.fences[2] += usize::from(is_over);
            }
            Step::Process(who) => {
                self.count_takeover(before, who, after);
                let is_held = after.server.sessions.iter().filter(|session| session.holds()).count();
                let was_held = before.server.sessions.iter().filter(|session| session.holds()).count();
                let is_new = is_held > was_held && !after.server.transactions.is_empty();
                self.fence_waits += usize::from(is_new);
            }
            Step::MakeLeave(_) => self.left += 1,
            Step::Move(..) => self.moved += 1,
            Step::Work(who, _) => self.batches += usize::from(after.processes[who].carries_two()),
            Step::Reply(who) => self.put_right += usize::from(after.processes[who].puts_right()),
            Step::Look(_, Event::Claim(_, claim::Event::Later { .. })) => self.taken += 1,
            Step::GiveUp(who) => {
                self.given_up[0] += usize::from(after.processes[who].lifecycle.is_none());
            }
            Step::Begin(who, _) => {
                let action = before.processes[who].lifecycle.as_ref().map(Lifecycle::action);
                let is_alone = before.processes[who].carrier.is_none();
                if let Some(Action::Claim(_, claim::Action::Finish(end))) = action.filter(|_| is_alone) {
                    *self.ends.entry(format!("{end:?}")).or_default() += 1;
                    self.given_up[1] += usize::from(who == LATE);
                }
            }
            _ => {}
        }
    }
}

impl Tally {
    /// Of claims on a carrier.
    fn count_ends(&mut self, before: &World, step: Step, after: &World) {
        let Some(who) = step.process() else { return };
        let Some(carrier) = &before.processes[who].carrier else { return };
        let (Some(lifecycle), Some(later)) = (&after.processes[who].lifecycle, &after.processes[who].carrier)
        else {
            return;
        };
        for (number, _) in carrier.claims().filter(|(number, _)| later.claim(*number).is_none()) {
            if let claim::Action::Finish(end) = lifecycle.claim_action(number) {
                *self.ends.entry(format!("{end:?}")).or_default() += 1;
            }
        }
    }

    fn count_takeover(&mut self, before: &World, who: usize, after: &World) {
        let Some(connection) = &after.processes[who].connection else { return };
        let replied = || connection.reply.iter().flat_map(Reply::done);
        let in_grace = matches!(connection.answer, Some(Event::Claim(_, claim::Event::Later { .. })))
            || replied().any(|done| done == Done::InGrace);
        let is_granted = matches!(connection.answer, Some(Event::Claim(_, claim::Event::Granted { .. })))
            || replied().any(|done| matches!(done, Done::Granted { .. }));
        self.graces += usize::from(in_grace);
        if is_granted && before.server.past.is_pending() {
            match after.server.past.is_pending() {
                true => self.proven += 1,
                false => self.terms_after_grace += 1,
            }
        }
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { states, transitions, depth, terms, losses, ends, freezes, faults, .. } = self;
        let ([told, refused, over], [given_up, late]) = (self.fences, self.given_up);
        let (fence_waits, left) = (self.fence_waits, self.left);
        let Self { moved, batches, put_right, taken, lost_together, .. } = self;
        let (graces, after_grace, proven) = (self.graces, self.terms_after_grace, self.proven);
        write!(
            f,
            "{states} states, {transitions} transitions, {depth} deep; terms begun {terms}, lost {losses}; \
             ends {ends:?}; faults {faults:?}, ticks in which a worker stood still {freezes}; \
             fences let through {told}, refused {refused}, over {over}, waited for {fence_waits}; \
             takeover graces found {graces}, waited out {after_grace}, not needed {proven}; callers made to leave {left}; releases given up {given_up}, late ends {late}; \
             statements for two claims {batches}, put right {put_right}, own locks found {taken}, lost with two terms {lost_together}, moved {moved}"
        )
    }
}

impl fmt::Debug for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}, after {} steps:", self.promise, self.steps.len())?;
        self.steps.iter().try_for_each(|step| writeln!(f, "  {step:?}"))
    }
}

pub(super) fn fingerprint(of: &impl Hash) -> u64 {
    let mut mix = Mix::default();
    of.hash(&mut mix);
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
