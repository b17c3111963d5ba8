//! What must be true of every world.

use std::collections::HashMap;

use super::*;

/// Steps of its own in which a claim whose release has been asked for must be over, when nothing more goes wrong.
const STEPS_TO_THE_END: u8 = 20;

/// The same for a claim on a carrier, beside what the others there do; and until it has its lock, which may be after a takeover grace.
const STEPS_ON_CARRIER: u8 = 120;

/// What is to come to pass for a claim: that it ends, or that it has its lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Goal {
    End(usize),
    Hold(usize),
}

/// In how many steps a claim of a process comes to its goal, for the fingerprint of each world that was looked at with both.
#[derive(Default)]
pub(super) struct Ends(HashMap<u64, Option<u8>, Mixing>);

impl Goal {
    /// In how many steps it must be reached.
    fn at_most(self, process: &Process) -> u8 {
        if process.carrier.is_some() { STEPS_ON_CARRIER } else { STEPS_TO_THE_END }
    }

    fn is_reached(self, before: &Process, after: &Process) -> bool {
        let Some(carrier) = &after.carrier else {
            // The release is over when it is given up; what its late workers do is another matter.
            return after.lifecycle.is_none() || after.owner != before.owner;
        };
        match self {
            Self::End(number) => carrier.claim(number).is_none(),
            Self::Hold(number) => carrier.holds(number),
        }
    }
}

impl Model {
    /// What must be true of the world, which the step has led to.
    pub(super) fn check(&self, world: &World, step: Step, ends: &mut Ends) -> Checked {
        self.check_locks(world)?;
        self.check_fences(world)?;
        if world.processes[LATE].given_up && world.processes[LATE].term.is_some() {
            return Err("a term of a claim that has ended".to_owned());
        }
        if step == Step::Tick && world.processes.iter().any(Process::keeps_a_cancelled_caller) {
            return Err("a caller stays whose context was cancelled".to_owned());
        }
        for (who, process) in world.processes.iter().enumerate() {
            // What the other process does on its own changes nothing about this.
            if process.lifecycle.is_none() || step.process().is_some_and(|concerned| concerned != who) {
                continue;
            }
            for goal in self.goals(world, who) {
                if self.steps_to(world, who, goal, ends).is_none_or(|steps| steps > goal.at_most(process)) {
                    return Err(match goal {
                        Goal::End(_) => format!("the release of {who} does not come to an end"),
                        Goal::Hold(seat) => format!("{who} does not get lock {seat}, which is free"),
                    });
                }
            }
            if !self.goes_on(world, who) {
                return Err(format!("{who} is stuck"));
            }
            self.check_carrier(world, who)?;
        }
        Ok(())
    }

    /// What is to come to pass for the process when nothing more goes wrong.
    fn goals(&self, world: &World, who: usize) -> Vec<Goal> {
        let process = &world.processes[who];
        let Some(carrier) = &process.carrier else {
            return Vec::from_iter(process.released.map(|_| Goal::End(0)));
        };
        let goals = carrier.claims().filter_map(|(number, claim)| match claim.released {
            true => Some(Goal::End(number)),
            false => self.may_be_had(world, who, number).then_some(Goal::Hold(number)),
        });
        goals.collect()
    }

    fn check_locks(&self, world: &World) -> Checked {
        (0..KEYS).try_for_each(|key| self.check_lock(world, key))
    }

    fn check_lock(&self, world: &World, key: usize) -> Checked {
        let holders: Vec<_> =
            world.server.sessions.iter().filter(|session| session.held[key].is_some()).collect();
        let of_side = |before| holders.iter().filter(|session| session.before == before).count();
        if [false, true].map(of_side).iter().any(|holders| *holders > 1) {
            return Err("two sessions hold the lock".to_owned());
        }
        let mut believers = 0;
        for (who, process) in world.processes.iter().enumerate() {
            for seat in process.seats() {
                if process.key_of(self, seat) != key || !process.believes(seat, world.now) {
                    continue;
                }
                let Some(connection) = &process.connection else {
                    return Err(format!("{who} believes to hold the lock, without a session"));
                };
                let id =
                    process.carrier.as_ref().and_then(|carrier| carrier.claim(seat)).map(|claim| claim.id);
                let holds = |session: &&&server::Session| {
                    session.id == connection.session && (id.is_none() || session.held[key] == id)
                };
                if !holders.iter().any(|session| holds(&session))
                    && !connection.terminated
                    && !connection.orphaned
                {
                    return Err(format!("{who} believes to hold the lock, and does not"));
                }
                believers += usize::from(!connection.terminated);
            }
        }
        if believers > 1 { Err("both believe to hold the lock".to_owned()) } else { Ok(()) }
    }

    /// A term does not begin while a fenced transaction of an earlier one is open.
    fn check_fences(&self, world: &World) -> Checked {
        let server = &world.server;
        let is_late = |open: &fence::Transaction| open.told && server.rows[open.key].begun > open.token;
        if server.transactions.iter().any(is_late) {
            return Err("a later term began while a fenced transaction was open".to_owned());
        }
        Ok(())
    }

    /// In how many steps of its own the claim comes to its goal at the most, whichever they are, when nothing more goes wrong; `None` if it
    /// may never do so. A worker that stands still without the mutex is not waited for, where another one is awake.
    fn steps_to(&self, world: &World, who: usize, goal: Goal, ends: &mut Ends) -> Option<u8> {
        let waited = self.wait_for_step(world, who)?;
        if waited.now > self.horizon + 2 * LEASE + 2 * SLICE {
            return None;
        }
        let key = fingerprint(&(&waited, who, goal));
        if let Some(known) = ends.0.get(&key) {
            return *known;
        }
        // Who comes here again has gone round in a circle.
        ends.0.insert(key, None);
        let process = &waited.processes[who];
        let mut steps = self.own_steps(&waited, who);
        steps.retain(|step| !self.is_needless(process, *step));
        // Who of two begins makes no difference to where it leads.
        let begins = |step: &Step| matches!(step, Step::Begin(..) | Step::Work(..));
        if let Some(first) = steps.iter().copied().find(begins) {
            steps.retain(|step| !begins(step) || *step == first);
        }
        let mut most = 0;
        for step in steps {
            let mut after = waited.clone();
            // What is wrong with a step is found when the step is explored.
            if self.take(&mut after, step).is_err() {
                continue;
            }
            let is_there = goal.is_reached(process, &after.processes[who]);
            let left = if is_there { 0 } else { self.steps_to(&after, who, goal, ends)? };
            most = most.max(left + 1);
        }
        ends.0.insert(key, Some(most));
        Some(most)
    }

    /// Whether there is a step for the claim, now or in time.
    fn goes_on(&self, world: &World, who: usize) -> bool {
        self.wait_for_step(world, who).is_some()
    }

    fn wait_for_step(&self, world: &World, who: usize) -> Option<World> {
        let mut world = world.clone();
        for _ in 0..=LEASE + SLICE {
            let steps = self.own_steps(&world, who);
            if steps.iter().any(|step| !self.is_needless(&world.processes[who], *step)) {
                return Some(world);
            }
            world.tick(self);
        }
        None
    }

    /// The thaw of a worker on whom nothing hangs: it does not have the mutex, and the other one can do all that is to be
    /// done. Of the two, the supervisor can do everything, and a caller can release.
    fn is_needless(&self, process: &process::Process, step: Step) -> bool {
        let Step::Thaw(_, worker) = step else { return false };
        let is_in_the_way = process.holder == Some(worker);
        let other_is_awake = match worker {
            Worker::Caller => !process.is_frozen(Worker::Supervisor),
            Worker::Supervisor => {
                self.workers(process).contains(&Worker::Caller)
                    && !process.is_frozen(Worker::Caller)
                    && process.released.is_some()
            }
        };
        !is_in_the_way && other_is_awake
    }
}
