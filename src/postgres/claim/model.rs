//! All interleavings of two claims on one lock, within bounds: what [`Machine`] promises, shown by exhaustion.
//!
//! A [`World`] is a server with PostgreSQL's advisory locks, two processes with the machine and the supervisor of a
//! claim each (what `supervisor.rs`, `claim.rs` and `session.rs` do, step by step), and the connections between them.
//! [`Model::explore`] visits every world that can come about, in breadth, and checks each. Any step may be put off
//! for as long as the clock goes: that is a frozen process, a late answer, a slow network. The clock has coarse
//! [ticks](tick), so that all that a back-off can do is to wait for the next one.
//!
//! Left out: a request that reaches the server after its connection was closed at the client, and a server that drops a
//! silent connection before the lease is over (`sql.rs` must see to it that TCP keepalives do not).

use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::hash::{Hash, Hasher};
use std::time::{Duration, Instant};

use crate::loss::LossReason;
use crate::postgres::claim::machine::{Action, End, Event, Machine, Notice, Rhythm, Time, Timing};

/// Ticks from the last word of a client until the server ends its session.
const LEASE: u8 = 4;
/// Ticks that a session queues at once.
const SLICE: u8 = 2;
/// Ticks that a short statement, or a whole release, may take.
const SHORTLY: u8 = 1;
/// Steps of its own in which a claim whose release has been asked for must be over, when nothing more goes wrong.
const STEPS_TO_THE_END: u8 = 12;

/// Longer than any pause between attempts.
fn tick(count: u8) -> Time {
    Duration::from_secs(60) * u32::from(count)
}

/// What is explored, and how far.
#[derive(Clone, Copy, Debug)]
struct Model {
    timing: Timing,
    flaw: Option<Flaw>,
    /// When the clock stops.
    horizon: u8,
    /// How often something goes wrong, in all.
    faults: u8,
    /// How often each process claims the lock.
    claims: u8,
}

/// A fault in the supervisor, to show that the checks can fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flaw {
    /// It closes the session of a term that was lost without telling the application.
    LossKeptQuiet,
    /// It takes the time of the answer for the time of the question.
    TermFromAnswer,
    /// It puts a session that has queued back into the pool as it is.
    SettleSkipped,
    /// It goes on with a session that it was to discard.
    DiscardSkipped,
    /// It does not hear the release.
    Deaf,
    /// It takes the server's word that it ends a session for the end.
    WordTrusted,
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct World {
    now: u8,
    faults_left: u8,
    server: Server,
    processes: [Process; 2],
}

#[derive(Clone, Default, PartialEq, Eq, Hash)]
struct Server {
    sessions: Vec<Session>,
    queue: Vec<Waiter>,
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct Session {
    id: u8,
    /// The process that opened it, and the number of the claim that uses it.
    owner: (usize, u8),
    /// How often it has taken the lock.
    held: u8,
    leased: bool,
    /// The server has said that it ends the session, and has not let go of the lock yet.
    ending: bool,
    /// When its last statement ended.
    idle_since: u8,
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct Waiter {
    id: u8,
    sent: u8,
    until: u8,
}

#[derive(Clone, Default, PartialEq, Eq, Hash)]
struct Process {
    claims_left: u8,
    /// The claim that goes on, if one does.
    machine: Option<Machine>,
    doing: Doing,
    /// The supervisor stands still, and what it has sent may be on its way for as long.
    frozen: bool,
    /// When the application asked for the release.
    released: Option<u8>,
    /// Whether the machine has been told so.
    release_heard: bool,
    /// The term by what the machine announced: until when. It is closed by the application's own look at the clock too.
    term: Option<u8>,
    /// Whether a term is open by what the machine said.
    in_term: bool,
    /// The claim's, or the one in the pool.
    connection: Option<Connection>,
}

#[derive(Clone, Default, PartialEq, Eq, Hash)]
enum Doing {
    #[default]
    Nothing,
    Performing {
        action: Action,
        sent: u8,
        by: u8,
    },
    Announcing(Notice),
}

/// What lies between a process and its session.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
struct Connection {
    session: u8,
    /// On its way to the server.
    request: Option<Action>,
    /// On its way back.
    answer: Option<Event>,
    /// Why the server closed it, if it did.
    word: Option<LossReason>,
    /// Nothing comes through any more, either way.
    cut: bool,
    /// The server ended the session before its lease was over, so that the holder cannot know before it is told.
    terminated: bool,
}

/// What can happen; `usize` is the process concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Tick,
    /// The application.
    Claim(usize),
    Release(usize),
    SeeEndOfTerm(usize),
    /// The supervisor.
    Thaw(usize),
    Hear(usize),
    Begin(usize),
    Conclude(usize, Event),
    Announce(usize),
    /// The server.
    Process(usize),
    /// The release's cancel request arrives.
    Cancel(usize),
    /// A session that was terminated is gone.
    Exit(usize),
    Fault(Fault, usize),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    ProcessFrozen,
    SessionTerminated,
    NetworkCut,
    ConnectionRefused,
    StatementRefused,
    /// The slice ends in the moment of the grant: the session holds the lock, and is told that it does not.
    SliceEndsInGrant,
    /// By an operator.
    WaitCancelled,
}

/// A promise broken, or `Ok`.
type Checked = Result<(), String>;

/// A promise broken, and how it came to that.
struct Violation {
    promise: String,
    steps: Vec<Step>,
}

/// What was explored.
#[derive(Default)]
struct Tally {
    states: usize,
    transitions: usize,
    depth: usize,
    terms: usize,
    losses: usize,
    ends: BTreeMap<String, usize>,
    /// Ticks while a process had something to do.
    freezes: usize,
    faults: BTreeMap<Fault, usize>,
}

impl Model {
    fn new() -> Self {
        let timing = Timing {
            term: tick(LEASE - 1),
            // A session that is lost while it waits may be granted the lock until the slice is over.
            doubt: tick(LEASE + SLICE),
            heartbeat: tick(1),
            // Each tick is one of its times.
            rhythm: Rhythm::of(tick(1), Duration::ZERO),
        };
        Self { timing, flaw: None, horizon: LEASE, faults: 1, claims: 1 }
    }

    fn with(flaw: Flaw) -> Self {
        Self { flaw: Some(flaw), ..Self::new() }
    }

    /// Visits every world within the bounds, the nearest first.
    fn explore(&self) -> Result<Tally, Violation> {
        let process = Process { claims_left: self.claims, ..Process::default() };
        let start = World {
            now: 0,
            faults_left: self.faults,
            server: Server::default(),
            processes: [process.clone(), process],
        };
        let mut tally = Tally { states: 1, ..Tally::default() };
        let mut seen = HashSet::from([fingerprint(&start)]);
        // How each world was first reached: from which, and by what.
        let mut origins = vec![(0, Step::Tick)];
        let mut frontier = vec![(start, 0)];
        while !frontier.is_empty() {
            let mut next = Vec::new();
            for (world, origin) in frontier {
                for step in self.steps(&world) {
                    let mut after = world.clone();
                    let checked = self.take(&mut after, step).and_then(|()| self.check(&after, step));
                    tally.count(&world, step, &after);
                    if let Err(promise) = checked {
                        return Err(Violation { promise, steps: path(&origins, origin, step) });
                    }
                    if seen.insert(fingerprint(&after)) {
                        origins.push((origin, step));
                        next.push((after, origins.len() - 1));
                    }
                }
            }
            tally.states += next.len();
            tally.depth += usize::from(!next.is_empty());
            frontier = next;
        }
        Ok(tally)
    }

    /// All that can happen next, but for steps whose order makes no difference.
    fn steps(&self, world: &World) -> Vec<Step> {
        if let Some(who) = (0..2).find(|who| self.is_private(world, *who)) {
            return self.steps_of(world, who);
        }
        let mut steps: Vec<_> = (0..2).flat_map(|who| self.steps_of(world, who)).collect();
        if world.now < self.horizon && (0..2).all(|who| self.may_wait(world, who)) {
            steps.push(Step::Tick);
        }
        steps
    }

    /// Whether nothing that concerns this process next concerns the other one, now or by its order: it has neither the lock
    /// nor a place in the queue, and asks for none. Then its steps come before the other's (partial order reduction).
    fn is_private(&self, world: &World, who: usize) -> bool {
        let process = &world.processes[who];
        let idle = process.connection.as_ref().is_none_or(|connection| {
            let holds = world.server.session(connection.session).is_some_and(|session| session.held > 0);
            connection.request.is_none() && !holds && !world.server.waits(connection.session)
        });
        idle && process.term.is_none() && !world.server.is_ending(who) && !self.may_wait(world, who)
    }

    /// What can happen next to a process.
    fn steps_of(&self, world: &World, who: usize) -> Vec<Step> {
        let process = &world.processes[who];
        let mut steps = self.own_steps(world, who);
        match (&process.machine, process.released) {
            // The two are alike, so it does not matter which is the first.
            (None, _)
                if process.claims_left > 0 && (who == 0 || world.processes[0].claims_left < self.claims) =>
            {
                steps.push(Step::Claim(who));
            }
            (Some(_), None) => steps.push(Step::Release(who)),
            _ => {}
        }
        if process.term.is_some_and(|until| world.now >= until) {
            steps.push(Step::SeeEndOfTerm(who));
        }
        if world.faults_left > 0 {
            steps.extend(world.faults(who).into_iter().map(|fault| Step::Fault(fault, who)));
            if process.machine.is_some() && !self.may_wait(world, who) {
                steps.push(Step::Fault(Fault::ProcessFrozen, who));
            }
        }
        steps
    }

    /// What supervisor, server and network do for a claim when nothing more goes wrong.
    fn own_steps(&self, world: &World, who: usize) -> Vec<Step> {
        let process = &world.processes[who];
        if process.machine.is_none() {
            return Vec::new();
        }
        let interrupted = process.released.is_some() && !process.release_heard;
        let mut steps = Vec::new();
        if process.connection.as_ref().is_some_and(|connection| {
            connection.request.is_some()
                && !connection.cut
                && world.server.session(connection.session).is_some_and(|session| !session.ending)
        }) {
            steps.push(Step::Process(who));
        }
        if world.server.is_ending(who) {
            steps.push(Step::Exit(who));
        }
        if interrupted && world.waits(who) {
            steps.push(Step::Cancel(who));
        }
        match process.doing {
            _ if process.frozen => steps.push(Step::Thaw(who)),
            Doing::Announcing(_) => steps.push(Step::Announce(who)),
            Doing::Nothing if interrupted && self.flaw != Some(Flaw::Deaf) => steps.push(Step::Hear(who)),
            Doing::Nothing => steps.push(Step::Begin(who)),
            Doing::Performing { action, by, .. } => {
                let mut events = process.outcomes(action, by, world.now, interrupted);
                let announced =
                    |connection: &&Connection| connection.word.is_some_and(LossReason::is_announced);
                if action == Action::Discard
                    && let Some(connection) = process.connection.as_ref().filter(announced)
                    && (world.server.session(connection.session).is_none()
                        || self.flaw == Some(Flaw::WordTrusted))
                {
                    events.push(Event::Discarded { gone: true });
                }
                steps.extend(events.into_iter().map(|event| Step::Conclude(who, event)));
            }
        }
        steps
    }

    /// Whether time may pass before the next step for the claim: if it is frozen, waits for a time or for the server, or
    /// has not noticed yet that its network was cut.
    fn may_wait(&self, world: &World, who: usize) -> bool {
        let unnoticed = Step::Conclude(who, Event::SessionLost(LossReason::ConnectionClosed));
        let may_come_later = |step| step == unnoticed || step == Step::Exit(who);
        world.processes[who].frozen || self.own_steps(world, who).into_iter().all(may_come_later)
    }

    /// Changes the world by one step.
    fn take(&self, world: &mut World, step: Step) -> Checked {
        match step {
            Step::Tick => world.tick(),
            Step::Claim(who) => {
                let process = &mut world.processes[who];
                process.claims_left -= 1;
                process.machine = Some(Machine::new(self.timing, 7));
            }
            Step::Release(who) => world.processes[who].released = Some(world.now),
            Step::SeeEndOfTerm(who) => world.processes[who].term = None,
            Step::Thaw(who) => world.processes[who].frozen = false,
            Step::Hear(who) => self.tell(world, who, Event::Release)?,
            Step::Begin(who) => self.begin(world, who)?,
            Step::Conclude(who, event) => self.conclude(world, who, event)?,
            Step::Announce(who) => self.announce(world, who)?,
            Step::Process(who) => world.process(who),
            Step::Cancel(who) => world.cancel(who),
            Step::Exit(who) => world.exit(who),
            Step::Fault(fault, who) => {
                world.faults_left -= 1;
                match fault {
                    Fault::ProcessFrozen => world.processes[who].frozen = true,
                    Fault::SessionTerminated => world.terminate(who),
                    Fault::NetworkCut => world.cut(who),
                    Fault::ConnectionRefused => {
                        self.conclude(world, who, Event::ConnectFailed { patient: false })?;
                    }
                    Fault::StatementRefused => world.refuse(who),
                    Fault::SliceEndsInGrant => world.answer(who, Event::SliceOver),
                    Fault::WaitCancelled => world.cancel(who),
                }
            }
        }
        world.forget();
        Ok(())
    }

    /// The supervisor asks the machine what to do, and begins to do it.
    fn begin(&self, world: &mut World, who: usize) -> Checked {
        let now = world.now;
        let process = &mut world.processes[who];
        let Some(action) = process.machine.as_ref().map(Machine::action) else { return Ok(()) };
        let by = match action {
            Action::Finish(end) => return world.finish(who, end),
            Action::Pause { until } | Action::Watch { until } => ticks(until),
            Action::Renew { by } => ticks(by).min(now + SHORTLY),
            Action::Queue => now + SHORTLY + SLICE,
            Action::Unlock | Action::Settle => process.released.unwrap_or(now) + SHORTLY,
            Action::Connect | Action::Try | Action::Discard => now + SHORTLY,
        };
        process.doing = Doing::Performing { action, sent: now, by };
        if matches!(
            action,
            Action::Try | Action::Queue | Action::Renew { .. } | Action::Unlock | Action::Settle
        ) {
            let Some(connection) = &mut process.connection else {
                return Err(format!("{action:?} without a session"));
            };
            if self.flaw == Some(Flaw::SettleSkipped) && action == Action::Settle {
                connection.answer = Some(Event::Settled { clear: false });
            } else {
                connection.request = Some(action);
            }
        }
        Ok(())
    }

    /// What the supervisor has begun is over, with this event.
    fn conclude(&self, world: &mut World, who: usize, mut event: Event) -> Checked {
        if let Some(connection) = &mut world.processes[who].connection {
            connection.request = None;
            connection.answer = None;
        }
        match event {
            Event::Connected => world.connect(who),
            Event::Discarded { .. } if self.flaw != Some(Flaw::DiscardSkipped) => world.disconnect(who),
            Event::Granted { sent } | Event::Renewed { sent } if self.flaw == Some(Flaw::TermFromAnswer) => {
                let sent = tick(world.now).max(sent);
                event = match event {
                    Event::Granted { .. } => Event::Granted { sent },
                    _ => Event::Renewed { sent },
                };
            }
            _ => {}
        }
        self.tell(world, who, event)
    }

    /// The supervisor tells the machine; what that says must be in order.
    fn tell(&self, world: &mut World, who: usize, event: Event) -> Checked {
        let process = &mut world.processes[who];
        let Some(machine) = &mut process.machine else { return Err("an event after the end".to_owned()) };
        let mut notice = machine.handle(event, tick(world.now));
        if event == Event::Release {
            process.release_heard = true;
            process.in_term = false;
        }
        let in_order = match notice {
            Some(Notice::Acquired { .. }) => {
                !process.release_heard && !std::mem::replace(&mut process.in_term, true)
            }
            Some(Notice::Renewed { .. }) => process.in_term,
            Some(Notice::Lost(_)) => std::mem::replace(&mut process.in_term, false),
            Some(Notice::Busy | Notice::Failed) | None => true,
        };
        if !in_order {
            return Err(format!("{notice:?} out of order"));
        }
        let unheard = match notice {
            Some(Notice::Lost(_)) => self.flaw == Some(Flaw::LossKeptQuiet),
            // No promise hangs on these.
            Some(Notice::Busy | Notice::Failed) => true,
            _ => false,
        };
        if unheard {
            notice = None;
        }
        process.doing = notice.map_or(Doing::Nothing, Doing::Announcing);
        Ok(())
    }

    /// The supervisor tells the application, as `Claim` has it: there a term ends by the clock, too.
    fn announce(&self, world: &mut World, who: usize) -> Checked {
        let now = world.now;
        let process = &mut world.processes[who];
        let Doing::Announcing(notice) = std::mem::take(&mut process.doing) else { return Ok(()) };
        match notice {
            _ if process.released.is_some() => {}
            Notice::Acquired { until } => {
                if process.term.replace(ticks(until)).is_some() {
                    return Err("a term began in another".to_owned());
                }
            }
            Notice::Renewed { until } => match &mut process.term {
                Some(end) if now < *end => *end = ticks(until),
                _ => {
                    process.term = None;
                    return self.tell(world, who, Event::SessionLost(LossReason::LeaseNotRenewed));
                }
            },
            Notice::Lost(_) => process.term = None,
            Notice::Busy | Notice::Failed => {}
        }
        Ok(())
    }

    /// What must be true of every world, which the step has led to.
    fn check(&self, world: &World, step: Step) -> Checked {
        let holders: Vec<_> = world.server.sessions.iter().filter(|session| session.held > 0).collect();
        if holders.len() > 1 {
            return Err("two sessions hold the lock".to_owned());
        }
        let mut believers = 0;
        for (who, process) in world.processes.iter().enumerate() {
            if process.believes(world.now) {
                let Some(connection) = &process.connection else {
                    return Err(format!("{who} believes to hold the lock, without a session"));
                };
                let holds = holders.first().is_some_and(|holder| holder.id == connection.session);
                if !holds && !connection.terminated {
                    return Err(format!("{who} believes to hold the lock, and does not"));
                }
                believers += usize::from(!connection.terminated);
            }
            if believers > 1 {
                return Err("both believe to hold the lock".to_owned());
            }
            // What the other process does on its own changes nothing about this.
            if step.process().is_some_and(|concerned| concerned != who) {
                continue;
            }
            if process.released.is_some() && !self.comes_to_an_end(world, who, STEPS_TO_THE_END) {
                return Err(format!("the release of {who} does not come to an end"));
            }
            if process.machine.is_some() && !self.goes_on(world, who) {
                return Err(format!("{who} is stuck"));
            }
        }
        Ok(())
    }

    /// Whether the claim ends within so many steps of its own, whichever they are, when nothing more goes wrong.
    fn comes_to_an_end(&self, world: &World, who: usize, steps_left: u8) -> bool {
        if world.processes[who].machine.is_none() {
            return true;
        }
        let Some(waited) = self.wait_for_step(world, who) else { return false };
        steps_left > 0
            && self.own_steps(&waited, who).into_iter().all(|step| {
                let mut after = waited.clone();
                // What is wrong with a step is found when the step is explored.
                self.take(&mut after, step).is_err() || self.comes_to_an_end(&after, who, steps_left - 1)
            })
    }

    /// Whether there is a step for the claim, now or in time.
    fn goes_on(&self, world: &World, who: usize) -> bool {
        !self.own_steps(world, who).is_empty() || self.wait_for_step(world, who).is_some()
    }

    fn wait_for_step(&self, world: &World, who: usize) -> Option<World> {
        let mut world = world.clone();
        for _ in 0..=LEASE {
            if !self.own_steps(&world, who).is_empty() {
                return Some(world);
            }
            world.tick();
        }
        None
    }
}

impl Step {
    fn process(self) -> Option<usize> {
        match self {
            Self::Tick => None,
            Self::Claim(who)
            | Self::Release(who)
            | Self::SeeEndOfTerm(who)
            | Self::Thaw(who)
            | Self::Hear(who)
            | Self::Begin(who)
            | Self::Conclude(who, _)
            | Self::Announce(who)
            | Self::Process(who)
            | Self::Cancel(who)
            | Self::Exit(who)
            | Self::Fault(_, who) => Some(who),
        }
    }
}

/// The processes and their connections.
impl World {
    fn connect(&mut self, who: usize) {
        let process = &mut self.processes[who];
        let owner = (who, process.claims_left);
        // From the pool, where nobody looks whether it lives still.
        if let Some(connection) = &process.connection {
            if let Some(session) = self.server.session_mut(connection.session) {
                session.owner = owner;
            }
            return;
        }
        let known: Vec<_> = self.processes.iter().flat_map(|process| &process.connection).collect();
        let taken =
            |id| self.server.session(id).is_some() || known.iter().any(|connection| connection.session == id);
        let id = (0..).find(|id| !taken(*id)).unwrap_or_default();
        let session = Session { id, owner, held: 0, leased: false, ending: false, idle_since: self.now };
        self.server.sessions.push(session);
        self.processes[who].connection = Some(Connection { session: id, ..Connection::default() });
    }

    fn disconnect(&mut self, who: usize) {
        if let Some(connection) = self.processes[who].connection.take()
            && !connection.cut
            && self.server.session(connection.session).is_some_and(|session| !session.ending)
        {
            self.end_session(connection.session, LossReason::ConnectionClosed);
        }
    }

    fn finish(&mut self, who: usize, end: End) -> Checked {
        let process = &mut self.processes[who];
        if !process.release_heard {
            return Err(format!("{end:?} without a release"));
        }
        let owner = (who, process.claims_left);
        let pooled =
            process.connection.as_ref().and_then(|connection| self.server.session(connection.session));
        if let Some(session) = pooled
            && (session.held > 0 || session.leased || self.server.waits(session.id))
        {
            return Err("a session went back to the pool with the lock or the lease".to_owned());
        }
        let mut owned = self.server.sessions.iter().filter(|session| session.owner == owner);
        if end == End::Released && owned.any(|session| session.held > 0 || self.server.waits(session.id)) {
            return Err("released, while the server holds something for the claim".to_owned());
        }
        let (claims_left, connection) = (process.claims_left, process.connection.take());
        *process = Process { claims_left, ..Process::default() };
        // What does not serve another claim is of no interest any more.
        process.connection = connection.filter(|_| claims_left > 0);
        Ok(())
    }

    fn cut(&mut self, who: usize) {
        if let Some(connection) = &mut self.processes[who].connection {
            *connection =
                Connection { cut: true, request: None, answer: None, word: None, ..connection.clone() };
        }
    }

    fn answer(&mut self, who: usize, event: Event) {
        if let Some(connection) = &mut self.processes[who].connection {
            connection.answer = Some(event);
        }
    }

    fn waits(&self, who: usize) -> bool {
        self.processes[who]
            .connection
            .as_ref()
            .is_some_and(|connection| self.server.waits(connection.session))
    }

    /// What can go wrong for a process now.
    fn faults(&self, who: usize) -> Vec<Fault> {
        let process = &self.processes[who];
        let mut faults = Vec::new();
        if let Doing::Performing { action: Action::Connect, .. } = process.doing {
            faults.push(Fault::ConnectionRefused);
        }
        let Some(connection) = process.connection.as_ref().filter(|connection| !connection.cut) else {
            return faults;
        };
        faults.push(Fault::NetworkCut);
        if self.server.session(connection.session).is_none_or(|session| session.ending) {
            return faults;
        }
        faults.push(Fault::SessionTerminated);
        if connection.request.is_some() {
            faults.push(Fault::StatementRefused);
        }
        let queueing = matches!(process.doing, Doing::Performing { action: Action::Queue, .. });
        if queueing && matches!(connection.answer, Some(Event::Granted { .. })) {
            faults.push(Fault::SliceEndsInGrant);
        }
        if self.waits(who) {
            faults.push(Fault::WaitCancelled);
        }
        faults
    }

    /// Forgets sessions that nobody can notice any more.
    fn forget(&mut self) {
        let Self { server: Server { sessions, queue }, processes, .. } = self;
        sessions.retain(|session| {
            session.held > 0
                || queue.iter().any(|waiter| waiter.id == session.id)
                || processes
                    .iter()
                    .flat_map(|process| &process.connection)
                    .any(|connection| connection.session == session.id && !connection.cut)
        });
    }
}

impl Process {
    /// Whether the application is right to think that it has the lock.
    fn believes(&self, now: u8) -> bool {
        self.released.is_none() && self.term.is_some_and(|until| now < until)
    }

    /// How what the supervisor does can end now.
    fn outcomes(&self, action: Action, by: u8, now: u8, interrupted: bool) -> Vec<Event> {
        let over = now >= by;
        let (answer, word, cut, unsent) = match &self.connection {
            Some(connection) => {
                (connection.answer, connection.word, connection.cut, connection.request.is_some())
            }
            None => (None, None, false, false),
        };
        let lost = word.or(cut.then_some(LossReason::ConnectionClosed)).map(Event::SessionLost);
        let mut events = Vec::new();
        match action {
            Action::Connect => {
                events.push(Event::Connected);
                events.extend(interrupted.then_some(Event::Release));
            }
            Action::Pause { .. } => {
                events.extend(over.then_some(Event::Quiet));
                events.extend(interrupted.then_some(Event::Release));
            }
            Action::Watch { .. } => {
                events.extend(lost);
                events.extend((over || interrupted).then_some(Event::Quiet));
            }
            Action::Discard => events.push(Event::Discarded { gone: false }),
            Action::Try | Action::Queue | Action::Renew { .. } | Action::Unlock | Action::Settle => {
                events.extend(answer.or(lost));
                events.extend(over.then_some(Event::SessionLost(LossReason::HeartbeatTimedOut)));
                // An interrupted slice does not begin.
                let unsent = unsent && interrupted && action == Action::Queue;
                events.extend(unsent.then_some(Event::SliceOver));
            }
            Action::Finish(_) => {}
        }
        events
    }
}

/// The server.
impl World {
    /// Time passes; what is due comes to pass.
    fn tick(&mut self) {
        self.now += 1;
        let now = self.now;
        let expired = |server: &Server| {
            let mut idle = server.sessions.iter().filter(|session| !server.waits(session.id));
            idle.find(|session| session.leased && session.idle_since + LEASE <= now).map(|session| session.id)
        };
        while let Some(id) = expired(&self.server) {
            self.end_session(id, LossReason::LeaseExpired);
        }
        while let Some(position) = self.server.queue.iter().position(|waiter| waiter.until <= now) {
            let waiter = self.server.queue.remove(position);
            self.end_statement(waiter.id, Event::SliceOver);
        }
    }

    /// Executes the request that has arrived.
    fn process(&mut self, who: usize) {
        let Doing::Performing { sent, .. } = self.processes[who].doing else { return };
        let Some(connection) = &mut self.processes[who].connection else { return };
        let Some(request) = connection.request.take() else { return };
        let (id, question) = (connection.session, tick(sent));
        let now = self.now;
        let free = self.server.queue.is_empty()
            && self.server.sessions.iter().all(|session| session.held == 0 || session.id == id);
        let lost = |session: &Session| {
            session.id != id && Some(session.owner) == self.server.session(id).map(|own| own.owner)
        };
        let clear = !self.server.sessions.iter().any(lost);
        let Some(session) = self.server.session_mut(id) else { return };
        let free = free || session.held > 0;
        session.held += u8::from(free && matches!(request, Action::Try | Action::Queue));
        session.leased |= request == Action::Try;
        let answer = match request {
            Action::Try | Action::Queue if free => Event::Granted { sent: question },
            Action::Try => Event::Busy,
            Action::Queue => {
                self.server.queue.push(Waiter { id, sent, until: now + SLICE });
                return;
            }
            Action::Renew { .. } => Event::Renewed { sent: question },
            _ => {
                session.leased = false;
                let held = std::mem::take(&mut session.held) > 0;
                if request == Action::Unlock { Event::Unlocked { held } } else { Event::Settled { clear } }
            }
        };
        self.end_statement(id, answer);
        self.grant();
    }

    fn refuse(&mut self, who: usize) {
        if let Some(connection) = &mut self.processes[who].connection {
            connection.request = None;
            let id = connection.session;
            self.end_statement(id, Event::Refused { patient: false });
        }
    }

    fn cancel(&mut self, who: usize) {
        if let Some(connection) = &self.processes[who].connection {
            let id = connection.session;
            self.server.queue.retain(|waiter| waiter.id != id);
            self.end_statement(id, Event::SliceOver);
        }
    }

    /// The server says so first, and lets go of the lock afterwards.
    fn terminate(&mut self, who: usize) {
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

    /// The sessions of a process that were terminated are gone.
    fn exit(&mut self, who: usize) {
        self.server.sessions.retain(|session| !(session.ending && session.owner.0 == who));
        self.grant();
    }

    fn end_statement(&mut self, id: u8, answer: Event) {
        if let Some(session) = self.server.session_mut(id) {
            session.idle_since = self.now;
        }
        if let Some(connection) = self.connection_mut(id) {
            connection.answer = Some(answer);
        }
    }

    fn end_session(&mut self, id: u8, word: LossReason) {
        self.server.sessions.retain(|session| session.id != id);
        self.server.queue.retain(|waiter| waiter.id != id);
        if let Some(connection) = self.connection_mut(id) {
            connection.word = Some(word);
        }
        self.grant();
    }

    /// Gives the lock to the first in the queue, if it is free.
    fn grant(&mut self) {
        if self.server.queue.is_empty() || self.server.sessions.iter().any(|session| session.held > 0) {
            return;
        }
        let Waiter { id, sent, .. } = self.server.queue.remove(0);
        if let Some(session) = self.server.session_mut(id) {
            session.held = 1;
        }
        self.end_statement(id, Event::Granted { sent: tick(sent) });
    }

    /// The connection by which a session can reach its client.
    fn connection_mut(&mut self, id: u8) -> Option<&mut Connection> {
        let mut connections = self.processes.iter_mut().flat_map(|process| &mut process.connection);
        connections.find(|connection| connection.session == id && !connection.cut)
    }
}

impl Server {
    fn session(&self, id: u8) -> Option<&Session> {
        self.sessions.iter().find(|session| session.id == id)
    }

    fn session_mut(&mut self, id: u8) -> Option<&mut Session> {
        self.sessions.iter_mut().find(|session| session.id == id)
    }

    /// Whether a session of the process was terminated, and is not gone.
    fn is_ending(&self, who: usize) -> bool {
        self.sessions.iter().any(|session| session.ending && session.owner.0 == who)
    }

    fn waits(&self, id: u8) -> bool {
        self.queue.iter().any(|waiter| waiter.id == id)
    }
}

/// The tick at which a time has come.
fn ticks(time: Time) -> u8 {
    u8::try_from(time.as_secs().div_ceil(60)).unwrap_or(u8::MAX)
}

fn fingerprint(world: &World) -> u64 {
    let mut hasher = DefaultHasher::new();
    world.hash(&mut hasher);
    hasher.finish()
}

fn path(origins: &[(usize, Step)], mut origin: usize, last: Step) -> Vec<Step> {
    let mut steps = vec![last];
    while origin != 0 {
        let (before, step) = origins[origin];
        steps.push(step);
        origin = before;
    }
    steps.reverse();
    steps
}

impl Tally {
    fn count(&mut self, before: &World, step: Step, after: &World) {
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
            Step::Begin(who) => {
                if let Some(Action::Finish(end)) = before.processes[who].machine.as_ref().map(Machine::action)
                {
                    *self.ends.entry(format!("{end:?}")).or_default() += 1;
                }
            }
            _ => {}
        }
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { states, transitions, depth, terms, losses, ends, freezes, faults } = self;
        write!(
            f,
            "{states} states, {transitions} transitions, {depth} deep; terms begun {terms}, lost {losses}; \
             ends {ends:?}; faults {faults:?}, ticks in which a process stood still {freezes}"
        )
    }
}

impl fmt::Debug for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}, after {} steps:", self.promise, self.steps.len())?;
        self.steps.iter().try_for_each(|step| writeln!(f, "  {step:?}"))
    }
}

fn explored(model: Model) -> Tally {
    let begun = Instant::now();
    let tally = model.explore().unwrap_or_else(|violation| panic!("{violation:?}"));
    let Model { horizon, faults, claims, .. } = model;
    println!(
        "model, {faults} faults, {claims} claims each, {horizon} ticks: {tally}; {:.1?}",
        begun.elapsed()
    );
    tally
}

/// The promise that is found broken.
fn broken(model: Model) -> String {
    match model.explore() {
        Ok(tally) => panic!("nothing found: {tally}"),
        Err(violation) => {
            println!("model, {:?}: {violation:?}", model.flaw);
            violation.promise
        }
    }
}

#[test]
fn two_claims_keep_every_promise_whatever_goes_wrong() {
    let tally = explored(Model::new());
    assert!(tally.states > 100_000, "{tally}");
    assert!(tally.terms > 0 && tally.losses > 0 && tally.freezes > 0, "{tally}");
    assert_eq!(tally.faults.len(), 7, "{tally}");
    assert!(tally.ends.contains_key("Released") && tally.ends.contains_key("Unconfirmed"), "{tally}");
}

#[test]
fn two_claims_keep_every_promise_when_they_come_again() {
    explored(Model { faults: 0, claims: 2, ..Model::new() });
}

#[test]
#[ignore = "takes minutes and gigabytes: cargo test --release --lib model -- --ignored --nocapture"]
fn two_claims_keep_every_promise_in_a_larger_world() {
    explored(Model { horizon: 9, ..Model::new() });
    explored(Model { horizon: 2, claims: 2, ..Model::new() });
    explored(Model { horizon: 1, faults: 2, ..Model::new() });
}

#[test]
fn a_term_that_outlives_the_lease_is_found() {
    let sound = Model::new();
    let timing = Timing { term: tick(LEASE + 1), ..sound.timing };
    assert!(broken(Model { timing, ..sound }).contains("believes to hold the lock, and does not"));
}

#[test]
fn a_term_counted_from_the_answer_is_found() {
    assert!(broken(Model::with(Flaw::TermFromAnswer)).contains("believes to hold the lock, and does not"));
}

#[test]
fn a_loss_that_is_kept_quiet_is_found() {
    assert!(broken(Model::with(Flaw::LossKeptQuiet)).contains("believes to hold the lock"));
}

#[test]
fn a_session_that_is_not_settled_is_found() {
    assert!(
        broken(Model::with(Flaw::SettleSkipped)).contains("went back to the pool with the lock or the lease")
    );
}

#[test]
fn a_session_that_is_not_discarded_is_found() {
    assert!(
        broken(Model::with(Flaw::DiscardSkipped))
            .contains("went back to the pool with the lock or the lease")
    );
}

#[test]
fn a_release_that_is_not_heard_is_found() {
    assert!(broken(Model::with(Flaw::Deaf)).contains("does not come to an end"));
}

#[test]
fn a_word_of_the_server_that_is_taken_for_the_end_of_the_session_is_found() {
    assert!(broken(Model::with(Flaw::WordTrusted)).contains("released, while the server holds something"));
}

#[test]
fn a_doubt_that_forgets_the_slice_of_a_lost_waiter_is_found() {
    let sound = Model::new();
    let timing = Timing { doubt: tick(LEASE), ..sound.timing };
    assert!(broken(Model { timing, ..sound }).contains("released, while the server holds something"));
}
