//! How one thread ends what another one does on a claim: a release that is given up, and a caller whose context was cancelled.

use super::process::InFlight;
use super::*;
use crate::pg::claim::machine::End;

impl Model {
    /// Whether the time of the release is over, as for `Claim::wait_ended`.
    pub(super) fn gives_up(&self, world: &World, who: usize) -> bool {
        let process = &world.processes[who];
        let is_late = process.released.is_some_and(|at| world.now >= at + SHORTLY);
        who != LATE && who < self.callers && is_late && !process.given_up
    }

    /// Whoever waits for the release first kills the session, and then calls it over: see `Claim::wait_ended`.
    pub(super) fn give_up(&self, world: &mut World, who: usize) -> Checked {
        let now = tick(world.now);
        let process = &mut world.processes[who];
        let Some(end) = process.giving_up else {
            let uncertain =
                process.lifecycle.as_ref().is_some_and(|lifecycle| now < lifecycle.uncertain_until(CLAIM));
            let has_session = process.in_flight == InFlight::Session;
            let confirmed = !has_session && !uncertain || self.has(Flaw::GivenUpAsReleased);
            process.giving_up = Some(if confirmed { End::Released } else { End::Unconfirmed });
            if has_session {
                self.kill(world, who);
            }
            return Ok(());
        };
        let (owner, stays) = (process.owner, process.stays);
        world.ends_as(owner, stays, end)?;
        let process = &mut world.processes[who];
        process.given_up = true;
        process.term = None;
        // The next claim goes to another supervisor, and has another session.
        if world.processes[LATE].lifecycle.is_none() {
            let next = world.processes[who].next();
            let mut late = std::mem::replace(&mut world.processes[who], next);
            (late.claims_left, late.fencing) = (0, None);
            world.processes[LATE] = late;
        }
        Ok(())
    }

    /// Ends what the caller waits for whose context was cancelled: see `Claim::make_caller_leave`. Meanwhile the caller may get
    /// on, so what is decided here may hit what comes next.
    pub(super) fn make_leave(&self, world: &mut World, who: usize) {
        if world.waits(who) && !world.is_cut(who) {
            world.cancel(who);
        } else {
            world.processes[who].is_to_be_killed = true;
        }
    }

    /// The supervisor kills the session, unless it was given back or a term has begun on it.
    pub(super) fn kill_for_caller(&self, world: &mut World, who: usize) {
        let process = &mut world.processes[who];
        process.is_to_be_killed = false;
        let is_spared = process.believes(0, world.now) && !self.has(Flaw::TermKilled);
        if process.in_flight == InFlight::Session && !is_spared {
            self.kill(world, who);
        }
    }

    /// Closes the connection under the engine.
    fn kill(&self, world: &mut World, who: usize) {
        let Some(connection) = &mut world.processes[who].connection else { return };
        connection.killed = true;
        connection.request = None;
        let (id, is_cut) = (connection.session, connection.cut);
        if !is_cut && world.server.session(id).is_some_and(|session| !session.ending) {
            world.end_session(self, id, LossReason::ConnectionClosed);
        }
    }
}

impl World {
    /// Whether the supervisor can do something about a caller that was cancelled.
    pub(super) fn makes_leave(&self, who: usize) -> bool {
        let process = &self.processes[who];
        let is_open = process.connection.as_ref().is_some_and(|connection| !connection.killed);
        let queues = process.is_performing(Action::Claim(CLAIM, claim::Action::Queue));
        process.is_cancelled
            && process.runs_as(Worker::Caller)
            && !process.is_frozen(Worker::Supervisor)
            && matches!(process.doing, Doing::Performing { .. })
            && !process.is_to_be_killed
            && process.in_flight == InFlight::Session
            && is_open
            && (!queues || self.waits(who) || self.is_cut(who))
    }
}
