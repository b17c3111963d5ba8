//! All interleavings of two or three claims, within bounds: what the machines of session and claim promise together with
//! those who run them, shown by exhaustion.
//!
//! A [`World`] is a server with PostgreSQL's advisory locks and the rows of the newest terms, two processes with an engine of a
//! claim each on the same lock (what `engine.rs`, `supervisor.rs`, `active_claim.rs`, `claim.rs`, `announce.rs` and `open.rs` do, step by step), the connections
//! between them, and the fenced transactions of the processes. [`Model::explore`] visits every world that can come about, in
//! breadth, and [checks](check) each. Any step may be put off for as long as the clock goes: that is a frozen thread, a late
//! answer, a slow network. The clock has coarse [ticks](tick), so that all that a back-off can do is to wait for the next
//! one.
//!
//! A server may be restarted, or another one take its place: see [`takeover`]. The locks are gone then, and the takeover grace keeps a
//! holder of before, which may be cut off, from meeting one of afterwards. Or a standby is promoted, and the primary of before lives on
//! with one of the processes: see [`split`]. There the confirmation of heartbeats does that.
//!
//! A process may have one session that carries several claims: see [`carrier`]. Each of these comes to its lock when nothing is in its way any
//! more but time.
//!
//! Left out: a request that reaches the server after its connection was closed at the client; a server that drops a
//! silent connection before the lease is over (`sql` must see to it that TCP keepalives do not); a session that keeps its
//! lease for the next claim; and a fenced transaction that runs one statement for longer than the lease.

mod carrier;
mod check;
mod fence;
mod leaving;
mod process;
mod server;
mod split;
mod step;
mod takeover;
mod tally;
mod tests;

use std::collections::HashSet;
use std::time::Duration;

use crate::loss::LossReason;
use crate::pg::claim::lifecycle::{Action, Event, Lifecycle};
use crate::pg::claim::machine::{self as claim, Machine as Claim, Notice, Obstacle};
use crate::pg::session::machine::{self as session, Confirms, Rhythm, Time, Timing};

use carrier::Carrier;
use process::{Doing, Process, Worker};
use server::Server;
use step::{Fault, Step};
use tally::{Mixing, Tally, Violation, fingerprint, path};

/// Ticks from the last word of a client until the server ends its session; and for which a fenced transaction may pause.
const LEASE: u8 = 3;
/// Ticks that a session waits at once for the lock, and again for fenced transactions.
const SLICE: u8 = 2;
/// Ticks that a short statement, or a whole release, may take.
const SHORTLY: u8 = 1;
/// The number of the only claim of a lifecycle.
const CLAIM: usize = 0;
/// In the place of a third process: a claim of one of the two whose release was given up, and its late workers; or one that has left the
/// session that carried it, for one of its own.
const LATE: usize = 2;
/// How many locks there are.
const KEYS: usize = 2;
/// How many claims a session carries.
const SEATS: usize = 2;

/// Longer than any pause between attempts.
fn tick(count: u8) -> Time {
    Duration::from_secs(60) * u32::from(count)
}

/// The tick at which a time has come.
fn ticks(time: Time) -> u8 {
    u8::try_from(time.as_nanos().div_ceil(tick(1).as_nanos())).unwrap_or(u8::MAX)
}

/// What is explored, and how far.
#[derive(Clone, Copy, Debug)]
struct Model {
    timing: Timing,
    uncertainty_window: Duration,
    flaw: Option<Flaw>,
    /// When the clock stops.
    horizon: u8,
    /// How often something goes wrong, in all.
    faults: u8,
    /// Nothing goes wrong but that threads stand still.
    only_freezes: bool,
    /// Nothing goes wrong but that the server is taken over.
    only_takeovers: bool,
    /// The server may be taken over beside all that goes wrong else.
    with_takeovers: bool,
    /// Nothing goes wrong but that a standby is promoted while the primary lives on.
    only_splits: bool,
    /// How often each process claims the lock.
    claims: [u8; 2],
    /// How many fenced transactions are begun, in all.
    fences: u8,
    /// In so many of the processes a caller's thread runs the engine too, and a release is given up that takes too long.
    callers: usize,
    /// So many of the processes have one session for [`SEATS`] claims. The others have one for each claim, on the first lock.
    carriers: usize,
    /// How often the claims of a carrier come, each after its former one, and on which locks.
    seats: [u8; SEATS],
    keys: [usize; SEATS],
    /// A claim whose lock is taken may leave its carrier.
    moves: bool,
}

/// A fault of the library, to show that the checks can fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flaw {
    /// The session of a term that was lost is closed without telling the application.
    LossKeptQuiet,
    /// The time of the answer is taken for the time of the question.
    TermFromAnswer,
    /// A session that has queued is put back into the pool as it is.
    SettleSkipped,
    /// A session that is to be closed is used on.
    CloseSkipped,
    /// The release is not heard.
    Deaf,
    /// The server's word that it ends a session is taken for the end.
    WordTrusted,
    /// The row of a term is written by the first heartbeat, and not with the grant.
    RowWrittenLater,
    /// A term begins while a fenced transaction is open.
    GateIgnored,
    /// A fence does not look at its own term after the answer.
    FenceLooksOnce,
    /// What is announced of a claim that has ended is believed.
    EndNotFinal,
    /// A release that is given up is called confirmed.
    GivenUpAsReleased,
    /// Who works on a claim that has ended does not hear of it.
    EndUnheard,
    /// A caller whose context was cancelled is let wait on.
    CallerLeftAlone,
    /// The session of a caller that was cancelled is killed even if that caller has got the lock meanwhile.
    TermKilled,
    /// A caller whose session was killed after the grant begins a term.
    TermOnKilled,
    /// Locks are granted as soon as a server accepts sessions.
    GraceIgnored,
    /// The takeover grace is shorter than a term may last.
    GraceTooShort,
    /// A crash in the middle of a takeover grace does not begin it again.
    GraceOutlivesCrash,
    /// Whoever has had the lock counts as proven, and not the last one only.
    ProofOfFormer,
    /// The last holder counts as proven however short its term was.
    ProofTooYoung,
    /// A confirmation serves heartbeats that were sent after it, too.
    ConfirmationReused,
    /// Of the claims of a session that is lost, one is told.
    LossToldToOne,
    /// A carrier takes a lock for its own that it has given back.
    NumberKept,
    /// A carrier does not look whether its session has the lock already.
    AskedTwice,
    /// What a refused statement took is not given back.
    NotPutRight,
    /// The lock of another claim is given back.
    WrongOneGiven,
    /// What was granted on a session that is lost is told of the next one.
    AnswerOutlivesSession,
    /// A lock that finds a fenced transaction open is called busy, and kept.
    BusyKept,
    /// The end of all terms is moved though somebody has seen it.
    SeenEndMoved,
    /// A claim that leaves its carrier does not know until when the server may have something of it.
    UncertaintyLeft,
    /// A claim that leaves its carrier does not know which sessions were lost.
    LostForgotten,
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct World {
    now: u8,
    faults_left: u8,
    fences_left: u8,
    server: Server,
    /// The third is [`LATE`].
    processes: [Process; 3],
}

/// A promise broken, or `Ok`.
type Checked = Result<(), String>;

impl Model {
    fn new() -> Self {
        let timing = Timing {
            term: tick(LEASE - 1),
            heartbeat: tick(1),
            // Each tick is one of its times.
            rhythm: Rhythm::of(tick(1), Duration::ZERO),
            begins_fresh: false,
            confirms: Confirms::Nothing,
        };
        Self {
            timing,
            // A session that is lost while it waits may be granted the lock until the slice is over, and its row until a
            // second one is.
            uncertainty_window: tick(LEASE + 2 * SLICE),
            flaw: None,
            horizon: LEASE,
            faults: 1,
            only_freezes: false,
            only_takeovers: false,
            with_takeovers: false,
            only_splits: false,
            claims: [1, 1],
            fences: 0,
            callers: 0,
            carriers: 0,
            seats: [1; SEATS],
            keys: [0, 1],
            moves: false,
        }
    }

    fn with(self, flaw: Flaw) -> Self {
        Self { flaw: Some(flaw), ..self }
    }

    /// Whether the processes are alike.
    fn is_symmetric(&self) -> bool {
        self.claims[0] == self.claims[1] && self.callers != 1 && self.carriers == 0
    }

    fn has(&self, flaw: Flaw) -> bool {
        self.flaw == Some(flaw)
    }

    /// Visits every world within the bounds, the nearest first.
    fn explore(&self) -> Result<Tally, Violation> {
        let new = |who: usize| match who < self.carriers {
            true => Process::carrying(self.seats),
            false => Process::new(self.claims[who]),
        };
        let start = World {
            now: 0,
            faults_left: self.faults,
            fences_left: self.fences,
            server: Server::default(),
            processes: [new(0), new(1), Process::default()],
        };
        let mut tally = Tally::default();
        let mut ends = check::Ends::default();
        let mut seen: HashSet<u64, Mixing> = [fingerprint(&start)].into_iter().collect();
        // How each world was first reached: from which, and by what.
        let mut origins = vec![(0, Step::Tick)];
        let mut frontier = vec![(start, 0)];
        while !frontier.is_empty() {
            let mut next = Vec::new();
            for (world, origin) in frontier {
                for step in self.steps(&world) {
                    let mut after = world.clone();
                    let taken = self.take(&mut after, step);
                    tally.count(&world, step, &after);
                    let broken = |promise| Violation { promise, steps: path(&origins, origin, step) };
                    taken.and_then(|()| self.check_seen(&world, &after)).map_err(broken)?;
                    if seen.insert(fingerprint(&after)) {
                        self.check(&after, step, &mut ends).map_err(broken)?;
                        origins.push((origin, step));
                        next.push((after, origins.len() - 1));
                    }
                }
            }
            tally.depth += usize::from(!next.is_empty());
            frontier = next;
        }
        tally.states = seen.len();
        Ok(tally)
    }

    /// All that can happen next, but for steps whose order makes no difference.
    fn steps(&self, world: &World) -> Vec<Step> {
        let own = [0, 1, LATE].map(|who| self.own_steps(world, who));
        let may_wait = [0, 1, LATE].map(|who| world.may_wait(who, &own[who]));
        let private = (0..own.len()).find(|who| !may_wait[*who] && world.is_private(*who));
        let mut steps = Vec::new();
        for (who, own) in own.into_iter().enumerate() {
            if private.is_none_or(|private| private == who) {
                steps.extend(own);
                self.add_steps(world, who, may_wait[who], &mut steps);
            }
        }
        if private.is_none() && world.has_former_ending() {
            steps.push(Step::ExitOfFormer);
        }
        if world.now < self.horizon && may_wait == [true; 3] {
            steps.push(Step::Tick);
        }
        steps
    }

    /// What can happen next to a process beside its [own steps](Self::own_steps).
    fn add_steps(&self, world: &World, who: usize, may_wait: bool, steps: &mut Vec<Step>) {
        let process = &world.processes[who];
        match (&process.lifecycle, process.released) {
            // Where the two are alike, it does not matter which is the first.
            (None, _)
                if process.claims_left > 0
                    && (who == 0
                        || !self.is_symmetric()
                        || world.processes[0].claims_left < self.claims[0]) =>
            {
                steps.push(Step::Claim(who));
            }
            (Some(_), None) if process.carrier.is_none() => steps.push(Step::Release(who)),
            _ => {}
        }
        steps.extend(self.seat_steps(world, who));
        if process.may_see_end(world.now) {
            steps.push(Step::SeeEndOfTerm(who));
        }
        if process.runs_as(Worker::Caller)
            && process.is_asking()
            && process.released.is_none()
            && !process.is_cancelled
        {
            steps.push(Step::CancelContext(who));
        }
        steps.extend(self.fence_steps(world, who));
        if world.faults_left > 0 {
            steps.extend(self.faults(world, who, may_wait).into_iter().map(|fault| Step::Fault(fault, who)));
        }
    }

    /// What workers, server and network do for a claim when nothing more goes wrong.
    fn own_steps(&self, world: &World, who: usize) -> Vec<Step> {
        let process = &world.processes[who];
        let Some(lifecycle) = &process.lifecycle else { return Vec::new() };
        let now = world.now;
        let mut steps = Vec::new();
        if world.can_process(who) {
            steps.push(Step::Process(who));
        }
        if world.server.is_ending(process.owner) {
            steps.push(Step::Exit(who));
        }
        if process.is_interrupted() && world.waits(who) && !world.is_cut(who) {
            steps.push(Step::Cancel(who));
        }
        if self.gives_up(world, who) {
            steps.push(Step::GiveUp(who));
        }
        if world.makes_leave(who) && !self.has(Flaw::CallerLeftAlone) {
            steps.push(Step::MakeLeave(who));
        }
        if process.is_to_be_killed && !process.is_frozen(Worker::Supervisor) {
            steps.push(Step::Kill(who));
        }
        let workers = self.workers(process);
        steps.extend(
            workers
                .iter()
                .filter(|worker| process.is_frozen(**worker))
                .map(|worker| Step::Thaw(who, *worker)),
        );
        if process.stands_still() {
            return steps;
        }
        let mut awake = workers.iter().copied().filter(|worker| !process.is_frozen(*worker));
        match process.doing {
            Doing::Announcing(_) | Doing::Telling { .. } => steps.push(Step::Announce(who)),
            Doing::Carrying { by, .. } => steps.extend(self.carrying_steps(world, who, by)),
            Doing::TakingIn => steps.extend(self.taking_in_steps(world, who)),
            Doing::Performing { action, by, .. } => {
                let events = self.outcomes(world, who, action, by);
                steps.extend(events.into_iter().map(|event| Step::Conclude(who, event)));
            }
            Doing::Nothing if process.carrier.is_some() => steps.extend(self.carrier_steps(world, who)),
            Doing::Nothing
                if process.is_interrupted()
                    && !self.has(Flaw::Deaf)
                    && !(process.given_up && self.has(Flaw::EndUnheard)) =>
            {
                steps.extend(awake.next().map(|_| Step::Hear(who)));
            }
            Doing::Nothing => match lifecycle.action() {
                Action::Session(session::Action::Serve) | Action::Claim(_, claim::Action::Wait) => {}
                Action::Session(session::Action::Pause { until } | session::Action::Watch { until }) => {
                    if process.is_frozen(Worker::Supervisor) {
                        return steps;
                    }
                    let look = |event| Step::Look(who, Event::Session(event));
                    steps.extend((now >= ticks(until)).then(|| look(session::Event::TimePassed)));
                    if let Action::Session(session::Action::Watch { .. }) = lifecycle.action() {
                        steps.extend(process.lost().map(|reason| look(session::Event::Lost(reason))));
                    }
                }
                Action::Claim(_, claim::Action::Pause { until }) => {
                    if process.is_frozen(Worker::Supervisor) {
                        return steps;
                    }
                    let passed = Event::Claim(CLAIM, claim::Event::TimePassed);
                    steps.extend((now >= ticks(until)).then_some(Step::Look(who, passed)));
                    let lost = process.lost().map(|reason| Event::Session(session::Event::Lost(reason)));
                    steps.extend(lost.map(|lost| Step::Look(who, lost)));
                }
                action => steps.extend(
                    awake
                        .filter(|worker| process.allows(*worker, action))
                        .map(|worker| Step::Begin(who, worker)),
                ),
            },
        }
        steps
    }

    /// Who works on the claim.
    fn workers(&self, process: &Process) -> &'static [Worker] {
        let both = process.owner.0 < self.callers;
        if both { &[Worker::Supervisor, Worker::Caller] } else { &[Worker::Supervisor] }
    }

    /// What can go wrong for a process now.
    fn faults(&self, world: &World, who: usize, may_wait: bool) -> Vec<Fault> {
        let process = &world.processes[who];
        let mut faults = Vec::new();
        if process.lifecycle.is_some() && !may_wait {
            for worker in self.workers(process).iter().filter(|worker| !process.is_frozen(**worker)) {
                let frozen = |with_mutex| Fault::Frozen { worker: *worker, with_mutex };
                match process.holder {
                    None if self.callers > 0 => faults.extend([frozen(false), frozen(true)]),
                    holder => faults.push(frozen(holder == Some(*worker))),
                }
            }
        }
        if self.only_freezes {
            return faults;
        }
        if self.only_splits {
            return Vec::from_iter(world.can_split(who).then_some(Fault::Promoted));
        }
        if (self.only_takeovers || self.with_takeovers) && world.is_connected() {
            faults.extend(takeover::FAULTS);
        }
        if self.only_takeovers {
            faults.retain(|fault| takeover::FAULTS.contains(fault));
            return faults;
        }
        if process.is_performing(Action::Session(session::Action::Open)) && process.released.is_none() {
            faults.push(Fault::ConnectionRefused);
        }
        let usable = |connection: &&process::Connection| !connection.cut && !connection.killed;
        let Some(connection) = process.connection.as_ref().filter(usable) else { return faults };
        faults.push(Fault::NetworkCut);
        if world.server.session(connection.session).is_none_or(|session| session.ending) {
            return faults;
        }
        faults.push(Fault::SessionTerminated);
        match connection.request {
            Some(process::Request::Carrier(statement)) if statement.takes() > 0 => {
                let numbers = (0..SEATS).filter(|number| statement.takes_for(*number));
                faults.extend(numbers.map(Fault::OneRefused));
            }
            Some(_) => faults.push(Fault::StatementRefused),
            None => {}
        }
        if process.is_performing(Action::Claim(CLAIM, claim::Action::Queue))
            && matches!(connection.answer, Some(Event::Claim(_, claim::Event::Granted { .. })))
        {
            faults.push(Fault::SliceEndsInGrant);
        }
        if world.waits(who) {
            faults.push(Fault::WaitCancelled);
        }
        faults
    }

    /// Changes the world by one step.
    fn take(&self, world: &mut World, step: Step) -> Checked {
        match step {
            Step::Tick => world.tick(self),
            Step::Claim(who) => {
                let process = &mut world.processes[who];
                process.claims_left -= 1;
                process.owner = (who, process.claims_left);
                process.lifecycle =
                    Some(Lifecycle::dedicated(self.timing, Claim::new(self.uncertainty_window, false), 7));
            }
            Step::Release(who) => world.processes[who].released = Some(world.now),
            Step::SeeEndOfTerm(who) => world.processes[who].see_end(),
            Step::CancelContext(who) => world.processes[who].is_cancelled = true,
            Step::GiveUp(who) => self.give_up(world, who)?,
            Step::FenceLook(who, seat) => world.fence_look(who, seat),
            Step::FenceAsk(who) => self.fence_ask(world, who)?,
            Step::FenceAnswer(who) => self.fence_answer(world, who)?,
            Step::FenceEnd(who) => self.fence_end(world, who),
            Step::Thaw(who, worker) => world.processes[who].thaw(worker),
            Step::Hear(who) => {
                self.tell(world, who, Event::Claim(CLAIM, claim::Event::Release))?;
            }
            Step::Begin(who, worker) => self.begin(world, who, worker)?,
            Step::Conclude(who, event) => self.conclude(world, who, event)?,
            Step::Announce(who) => self.announce(world, who)?,
            Step::Look(who, event) => self.tell(world, who, event)?,
            Step::MakeLeave(who) => self.make_leave(world, who),
            Step::Kill(who) => self.kill_for_caller(world, who),
            Step::Admit(who, number) => self.admit(world, who, number),
            Step::ReleaseOne(who, number) => world.release_one(who, number),
            Step::HearOne(who, number) => {
                self.tell(world, who, Event::Claim(number, claim::Event::Release))?;
            }
            Step::Move(who, number) => self.move_claim(world, who, number)?,
            Step::Work(who, worker) => self.work(world, who, worker)?,
            Step::Reply(who) => self.take_reply(world, who)?,
            Step::TakeIn(who, place) => self.take_in(world, who, place)?,
            Step::Rest(who) => self.rest_carrier(world, who)?,
            Step::Leave(who) => self.leave_carrier(world, who)?,
            Step::Process(who) => self.process(world, who)?,
            Step::Cancel(who) => world.cancel(who),
            Step::Exit(who) => world.exit(self, who),
            Step::ExitOfFormer => world.exit_of_former(self),
            Step::Fault(fault, who) => {
                world.faults_left -= 1;
                match fault {
                    Fault::Frozen { worker, with_mutex } => world.processes[who].freeze(worker, with_mutex),
                    Fault::SessionTerminated => world.terminate(who),
                    Fault::NetworkCut => world.cut(who),
                    Fault::ConnectionRefused => {
                        let failed = session::Event::OpenFailed { needs_operator: false };
                        self.conclude(world, who, Event::Session(failed))?;
                    }
                    Fault::StatementRefused => world.refuse(who),
                    Fault::OneRefused(number) => {
                        world.processes[who].carrier.iter_mut().for_each(|carrier| carrier.refuse(number));
                        world.refuse(who);
                    }
                    Fault::SliceEndsInGrant => world.slice_ends_in_grant(who),
                    Fault::WaitCancelled => world.cancel(who),
                    Fault::TakenOver { clean, told, in_turn } => world.take_over(clean, told, in_turn),
                    Fault::Promoted => world.split(who),
                }
            }
        }
        world.forget();
        if self.fences > 0 {
            world.renumber_tokens();
        }
        Ok(())
    }
}

impl World {
    /// Whether nothing that concerns this process next concerns the other one, now or by its order: it has neither the lock
    /// nor a place in the queue, and asks for none. If time must not pass before its steps, they come before the other's
    /// (partial order reduction).
    fn is_private(&self, who: usize) -> bool {
        let process = &self.processes[who];
        let idle = process.connection.as_ref().is_none_or(|connection| {
            let holds = self.server.session(connection.session).is_some_and(server::Session::holds);
            connection.request.is_none() && !holds && !self.server.waits(connection.session)
        });
        idle && process.terms() == 0 && process.fencing.is_none() && !self.server.is_ending(process.owner)
    }

    /// Whether time may pass before the next of its own steps: if a worker is frozen, waits for a time or for the server, or
    /// has not noticed yet that its network was cut.
    fn may_wait(&self, who: usize, own_steps: &[Step]) -> bool {
        let process = &self.processes[who];
        let stands_still = process.stands_still();
        let is_cut =
            process.connection.as_ref().is_some_and(|connection| connection.cut && !connection.killed);
        let closed = Event::Session(session::Event::Lost(LossReason::ConnectionClosed));
        own_steps.iter().all(|step| match step {
            Step::Thaw(..) | Step::Exit(_) => true,
            // What it has sent may be on its way for as long.
            Step::Process(_) | Step::Cancel(_) => stands_still,
            Step::Conclude(_, event) | Step::Look(_, event) => *event == closed && is_cut,
            _ => false,
        })
    }

    /// Forgets what nobody can notice any more.
    fn forget(&mut self) {
        let Self { server, processes, .. } = self;
        let Server { sessions, queue, .. } = server;
        sessions.retain(|session| {
            session.holds()
                || queue.iter().any(|waiter| waiter.id == session.id)
                || processes
                    .iter()
                    .flat_map(|process| &process.connection)
                    .any(|connection| connection.session == session.id && !connection.cut)
        });
        for session in sessions.iter_mut().filter(|session| !session.leased) {
            session.idle_since = 0;
        }
        let is_gone = |id: u8| sessions.iter().all(|session| session.id != id);
        for process in processes {
            process.lost.retain(|session| !is_gone(*session));
            process.carrier.iter_mut().for_each(|carrier| carrier.forget(is_gone));
        }
    }
}
