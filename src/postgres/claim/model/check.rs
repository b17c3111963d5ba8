//! What must be true of every world.

use std::collections::HashMap;

use super::*;

/// Steps of its own in which a claim whose release has been asked for must be over, when nothing more goes wrong.
const STEPS_TO_THE_END: u8 = 20;

/// In how many steps the claim of a process ends, for each world that was looked at.
#[derive(Default)]
pub(super) struct Ends(HashMap<(u64, usize), Option<u8>, Mixing>);

impl Model {
    /// What must be true of the world, which the step has led to.
    pub(super) fn check(&self, world: &World, step: Step, ends: &mut Ends) -> Checked {
        self.check_locks(world)?;
        self.check_fences(world)?;
        if world.processes[LATE].term.is_some() {
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
            let mut ends_in = || self.steps_to_the_end(world, who, ends);
            if process.released.is_some() && ends_in().is_none_or(|steps| steps > STEPS_TO_THE_END) {
                return Err(format!("the release of {who} does not come to an end"));
            }
            if !self.goes_on(world, who) {
                return Err(format!("{who} is stuck"));
            }
        }
        Ok(())
    }

    fn check_locks(&self, world: &World) -> Checked {
        let holders: Vec<_> = world.server.sessions.iter().filter(|session| session.held).collect();
        if holders.len() > 1 {
            return Err("two sessions hold the lock".to_owned());
        }
        let mut believers = 0;
        for (who, process) in
            world.processes.iter().enumerate().filter(|(_, process)| process.believes(world.now))
        {
            let Some(connection) = &process.connection else {
                return Err(format!("{who} believes to hold the lock, without a session"));
            };
            let holds = holders.first().is_some_and(|holder| holder.id == connection.session);
            if !holds && !connection.terminated {
                return Err(format!("{who} believes to hold the lock, and does not"));
            }
            believers += usize::from(!connection.terminated);
        }
        if believers > 1 { Err("both believe to hold the lock".to_owned()) } else { Ok(()) }
    }

    /// A term does not begin while a fenced transaction of an earlier one is open.
    fn check_fences(&self, world: &World) -> Checked {
        let server = &world.server;
        if server.transactions.iter().any(|transaction| transaction.told && server.begun > transaction.token)
        {
            return Err("a later term began while a fenced transaction was open".to_owned());
        }
        Ok(())
    }

    /// In how many steps of its own the claim ends at the most, whichever they are, when nothing more goes wrong; `None` if it
    /// may never do so. A worker that stands still without the mutex is not waited for, where another one is awake.
    fn steps_to_the_end(&self, world: &World, who: usize, ends: &mut Ends) -> Option<u8> {
        let waited = self.wait_for_step(world, who)?;
        let key = (fingerprint(&waited), who);
        if let Some(known) = ends.0.get(&key) {
            return *known;
        }
        // Who comes here again has gone round in a circle.
        ends.0.insert(key, None);
        let process = &waited.processes[who];
        let mut steps = self.own_steps(&waited, who);
        steps.retain(|step| !self.is_needless(process, *step));
        // Who of two begins makes no difference to where it leads.
        let begins = |step: &Step| matches!(step, Step::Begin(..));
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
            // The release is over when it is given up; what its late workers do is another matter.
            let is_over =
                after.processes[who].lifecycle.is_none() || after.processes[who].owner != process.owner;
            let left = if is_over { 0 } else { self.steps_to_the_end(&after, who, ends)? };
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
