//! A carrier: the thread of a session that many claims share, and what application threads do with it.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::fmt;
use std::io;
use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use parking_lot::Mutex;

use crate::expiry::Expiry;
use crate::key::AdvisoryKey;
use crate::pg::carrier::dedicated::DedicatedQuota;
use crate::pg::carrier::engine::{CarrierContext, Engine, PendingEvents};
use crate::pg::carrier::seat::Seat;
use crate::pg::claim::alarm::Woken;
use crate::pg::claim::bell::PollBell;
use crate::pg::claim::claim::Claim;
use crate::pg::claim::engine::CallKind;
use crate::pg::claim::idle::IdleSupervisors;
use crate::pg::claim::turns::Turns;
use crate::pg::config::LeasePlan;
use crate::pg::pool::{Pool, PooledSlot};
use crate::pg::session::machine as session;
use crate::pg::session::refusal::Refusal;
use crate::pg::sql;
use crate::pg::stream::{Socket, StreamControl};
use crate::pg::watchdog::Watched;
use crate::process::{may_drive, nonce};
use crate::sync::{AtomicBool, AtomicUsize, MutexGuard, Ordering::SeqCst};
use crate::telling::{discard, panics};

/// A carrier without a claim gives its session back after 1 s, or after the time between two heartbeats if that is shorter, and its thread exits.
const LINGER: Duration = Duration::from_secs(1);

/// While a thread of the application runs the engine, the carrier's looks at least this often; whoever runs it wakes the thread when there is
/// something to do.
const LOOKS_EVERY: Duration = Duration::from_millis(500);

/// A thread that an answer to a caller has woken watches nothing for 1 ms; for twice as long each time, up to 20 ms, if callers come
/// and go.
const SHORTEST_NAP: Duration = Duration::from_millis(1);
const LONGEST_NAP: Duration = Duration::from_millis(20);

/// A session that carries the locks of many claims.
///
/// Whoever wants something of it says so in the inbox, and runs the engine if nobody does; what has come in meanwhile goes along in the
/// next statement. So a thread that is alone waits for nobody, and of many one works for all.
pub(crate) struct Carrier {
    context: CarrierContext,
    /// What its session is called.
    name: String,
    // Lock order: `turns` before `inbox`.
    turns: Turns<Option<Box<Engine>>, PollBell>,
    inbox: Mutex<Inbox>,
    /// The session that is being opened.
    connecting: Mutex<Option<StreamControl>>,
}

#[derive(Default)]
struct Inbox {
    seats: VecDeque<Arc<Seat>>,
    /// How many claims it is kept up for: those that it has or is about to have.
    expected: usize,
    /// Disconnects when its thread has exited.
    running: Option<Receiver<Infallible>>,
    /// The watchdog looks at its claims.
    is_watched: bool,
    /// The manager has stopped.
    has_stopped: bool,
}

impl Inbox {
    /// True if no claim has the carrier, and none is about to.
    fn is_unwanted(&self) -> bool {
        self.expected == 0 && self.seats.is_empty()
    }
}

/// What the watchdog looks at: all claims of a carrier, and the end of their terms, which is one.
#[derive(Default)]
pub(crate) struct CarriedClaims {
    state: Mutex<CarriedState>,
    /// Somebody waits for the engine to look into the inbox.
    is_called: AtomicBool,
}

#[derive(Default)]
struct CarriedState {
    claims: Vec<Option<Arc<Claim>>>,
    ends: Option<Arc<Expiry>>,
    /// How many of them want to be warned before a term ends.
    warned: usize,
}

/// What the thread remembers from one look to the next.
struct LoopState {
    /// How long it naps next.
    nap: Duration,
    /// It has done something for claims since it last looked whether there is more to do.
    has_worked: bool,
    /// Since when there has been no claim.
    idle_since: Option<Instant>,
    /// The thread that tells the observer; `None` before there has been something to tell.
    teller: Option<Sender<PendingEvents>>,
}

/// What the thread does next.
enum Next {
    Sleep {
        until: Instant,
        watch: Option<Socket>,
    },
    /// Opens a session, which takes time, and lets others run the engine meanwhile.
    Open,
    Exit,
}

impl LoopState {
    /// A sleep without a watch; the next one is twice as long, and at most `longest`.
    fn nap(&mut self, longest: Duration) -> Next {
        let nap = self.nap.min(longest);
        self.nap = (2 * nap).min(longest);
        Next::Sleep { until: Instant::now() + nap, watch: None }
    }
}

impl Next {
    /// The same, no longer than until then.
    fn until(self, at_most: Instant) -> Self {
        match self {
            Self::Sleep { until, watch } => Self::Sleep { until: until.min(at_most), watch },
            other => other,
        }
    }
}

impl CarriedClaims {
    pub(crate) fn add(&self, number: usize, claim: &Arc<Claim>) {
        let mut state = self.state.lock();
        if state.claims.len() <= number {
            state.claims.resize(number + 1, None);
        }
        state.warned += usize::from(claim.wants_warning());
        state.claims[number] = Some(Arc::clone(claim));
    }

    pub(crate) fn remove(&self, number: usize) {
        let former = {
            let mut state = self.state.lock();
            let former = state.claims.get_mut(number).and_then(Option::take);
            state.warned -= usize::from(former.as_ref().is_some_and(|claim| claim.wants_warning()));
            former
        };
        drop(former);
    }

    /// The engine is gone, and its claims are over.
    pub(crate) fn clear(&self) {
        let former = std::mem::take(&mut *self.state.lock());
        drop(former);
    }

    pub(crate) fn set_end(&self, ends: Option<Arc<Expiry>>) {
        self.state.lock().ends = ends;
    }

    pub(crate) fn is_called(&self) -> bool {
        self.is_called.load(SeqCst)
    }

    /// By when a statement that begins now must be answered, or the session is lost: within `timeout`; but where a claim is to be warned, not before
    /// the end of the terms, so that it has the whole grace.
    pub(crate) fn answer_by(&self, timeout: Duration) -> Instant {
        let state = self.state.lock();
        let ends = state.ends.as_ref().filter(|_| state.warned > 0).and_then(|ends| ends.at());
        let soon = Instant::now() + timeout;
        ends.map_or(soon, |ends| soon.max(ends.instant()))
    }
}

impl Watched for CarriedClaims {
    fn deadline(&self) -> Option<Instant> {
        let state = self.state.lock();
        let ends = state.ends.as_ref().and_then(|ends| ends.at()).map(|at| at.instant());
        // Of thousands of claims, only those are asked that want to be warned; and all once the lease has ended, or somebody has seen its end:
        // there may be some that do not know of it yet.
        let by_claim = (state.warned > 0 || ends.is_none())
            .then(|| {
                state
                    .claims
                    .iter()
                    .flatten()
                    .filter(|claim| ends.is_none() || claim.wants_warning())
                    .filter_map(|claim| claim.deadline())
                    .min()
            })
            .flatten();
        ends.into_iter().chain(by_claim).min()
    }

    fn enforce(&self) {
        // Their mutexes come after this one, and nobody takes them the other way round.
        for claim in self.state.lock().claims.iter().flatten() {
            claim.enforce_deadline();
        }
    }
}

impl Carrier {
    /// # Errors
    /// When the process has no descriptor left.
    pub(crate) fn new(
        pool: Arc<Pool>,
        plan: LeasePlan,
        idle: &Arc<IdleSupervisors>,
        dedicated: &Arc<DedicatedQuota>,
        own_name: &str,
    ) -> io::Result<Arc<Self>> {
        let context = CarrierContext {
            pool,
            plan,
            idle: Arc::clone(idle),
            dedicated: Arc::clone(dedicated),
            carried: Arc::default(),
        };
        Ok(Arc::new(Self {
            context,
            name: sql::application_name(own_name, "(many locks)"),
            turns: Turns::new(None, PollBell::new()?),
            inbox: Mutex::default(),
            connecting: Mutex::default(),
        }))
    }

    // What application threads do.

    /// Keeps the thread up for one claim more.
    ///
    /// # Errors
    /// When the process has no thread left.
    pub(crate) fn expect_one(self: &Arc<Self>) -> io::Result<()> {
        let mut inbox = self.inbox.lock();
        if inbox.running.is_none() {
            if !inbox.is_watched {
                let carried: Weak<CarriedClaims> = Arc::downgrade(&self.context.carried);
                self.context.pool.watchdog().watch(carried as Weak<dyn Watched>)?;
                inbox.is_watched = true;
            }
            let (runs, running) = bounded(0);
            let body = Arc::clone(self);
            thread::Builder::new().name("dsync-carrier".to_owned()).spawn(move || body.run(runs))?;
            inbox.running = Some(running);
        }
        inbox.expected += 1;
        Ok(())
    }

    /// It need not be kept up for one of the claims any more.
    pub(crate) fn expect_one_less(&self) {
        let mut inbox = self.inbox.lock();
        inbox.expected -= 1;
        let is_last = inbox.expected == 0 && inbox.has_stopped;
        drop(inbox);
        if is_last {
            self.turns.wake();
        }
    }

    /// Has the engine look at a claim, and the thread run it if no other does.
    pub(crate) fn call(&self, seat: &Arc<Seat>) {
        self.put_in(seat);
        self.turns.wake();
    }

    fn put_in(&self, seat: &Arc<Seat>) {
        if !seat.mark_called() {
            return;
        }
        let mut inbox = self.inbox.lock();
        // For one that has left there may be no thread that takes it out again, and it would keep the carrier.
        if seat.is_expected() {
            inbox.seats.push_back(Arc::clone(seat));
            self.context.carried.is_called.store(true, SeqCst);
            return;
        }
        seat.unmark_called();
        drop(inbox);
        // It may have moved a moment ago.
        if let Some(supervisor) = seat.supervisor() {
            supervisor.wake();
        }
    }

    /// Has the engine look at a claim, and runs it as far as this thread may until the claim has had what it asks for; `false` if it did
    /// nothing.
    pub(crate) fn run_engine(&self, seat: &Arc<Seat>, caller: CallKind) -> bool {
        self.put_in(seat);
        // A claim may end without a statement, while the thread opens a session, which takes its time.
        if !matches!(caller, CallKind::Release) && !self.allows(seat, caller) {
            self.turns.wake();
            return false;
        }
        let Some(mut turn) = self.turns.take() else { return false };
        let mut helped = false;
        loop {
            self.take_in(&mut turn);
            let serves = turn.as_ref().is_some_and(|engine| {
                // A heartbeat that is due is for the thread.
                let serves = match engine.session_action() {
                    session::Action::Serve => true,
                    session::Action::Watch { until } => engine.now() < until,
                    _ => false,
                };
                serves && engine.is_ready(seat)
            });
            if !serves || !self.allows(seat, caller) {
                break;
            }
            guarded(&mut turn, Engine::work);
            helped = true;
        }
        // One that no engine has taken in has asked for nothing. It need not wait while the session is given back.
        if turn.is_none()
            && matches!(caller, CallKind::Release)
            && seat.number().is_none()
            && seat.supervisor().is_none()
        {
            seat.set_number(None);
            seat.claim().finish(Ok(()));
            helped = true;
        }
        // It may have come to its end without a statement.
        helped |= turn.is_some() && seat.number().is_none() && seat.supervisor().is_none();
        let look_by = match turn.as_ref().filter(|engine| !engine.has_work() && !engine.has_unannotated()) {
            Some(engine) => Self::next_look(engine),
            None => Some(Instant::now()),
        };
        let socket = turn.as_ref().and_then(|engine| engine.socket());
        let events = turn.as_mut().map(|engine| engine.take_pending_events());
        self.turns.leave(turn, look_by, socket.as_ref(), LONGEST_NAP);
        if let Some(events) = events {
            events.tell(&self.context.pool);
        }
        helped
    }

    /// Whether a caller may run short statements, which a server that does not answer may prolong to the heartbeat's timeout, or to the end of the
    /// terms. The session is not to be killed for one caller, so one that may have to leave before does not begin.
    fn allows(&self, seat: &Seat, caller: CallKind) -> bool {
        let until = match caller {
            CallKind::Acquire { is_cancellable: true, .. } => return false,
            CallKind::Acquire { until, .. } => until,
            CallKind::Release if !may_drive() => return false,
            CallKind::Release => seat.claim().ends_by(),
        };
        until.is_none_or(|until| self.context.carried.answer_by(self.context.plan.heartbeat_timeout) <= until)
    }

    /// When there is something to do next if nothing happens.
    fn next_look(engine: &Engine) -> Option<Instant> {
        let until = match engine.session_action() {
            session::Action::Serve => None,
            session::Action::Watch { until } => Some(until),
            _ => return Some(Instant::now()),
        };
        let due = until.into_iter().chain(engine.next_attempt()).min();
        due.map(|due| engine.at(due))
    }

    /// Ends the thread when all claims have ended, and an attempt to have a session at once: the manager has stopped.
    pub(crate) fn stop(&self) {
        self.inbox.lock().has_stopped = true;
        if let Some(stream) = &*self.connecting.lock() {
            stream.kill();
        }
        self.turns.wake();
    }

    /// Waits until the thread has exited, by `by` at the latest.
    pub(crate) fn wait_over(&self, by: Instant) {
        let running = self.inbox.lock().running.clone();
        if let Some(running) = running {
            let _ = running.recv_deadline(by);
        }
    }

    // What the thread does.

    /// Until nobody needs the thread any more. A panic, of the application's logger say, costs the claims of that moment, and no later ones.
    fn run(self: Arc<Self>, runs: Sender<Infallible>) {
        let mut gave_back = false;
        loop {
            match catch_unwind(AssertUnwindSafe(|| self.serve(gave_back))) {
                Ok(engine) => {
                    // Not in the call: the inbox is to be free while the server is told.
                    let has_stopped = self.inbox.lock().has_stopped;
                    let leave = || engine.is_some_and(|engine| engine.leave(has_stopped));
                    gave_back = catch_unwind(AssertUnwindSafe(leave)).unwrap_or(false);
                    if self.ends() {
                        break;
                    }
                }
                Err(thrown) => {
                    discard(thrown);
                    let engine = self.wait_for_turn().take();
                    panics(|| drop(engine));
                }
            }
        }
        if gave_back {
            self.context.pool.tell_of_sessions();
        }
        drop(runs);
    }

    /// Gives the engine when all is done. `gave_back` if the one before has given back a session, and nobody was told.
    fn serve(&self, gave_back: bool) -> Option<Box<Engine>> {
        // A thread that had run for this carrier before may be leaving still.
        let mut turn = self.wait_for_turn();
        let engine = turn.get_or_insert_with(|| self.new_engine());
        if gave_back {
            engine.note_sessions();
        }
        drop(turn);
        let mut state = LoopState { nap: SHORTEST_NAP, has_worked: false, idle_since: None, teller: None };
        let (mut woken, mut opened) = (Woken::Called, None);
        loop {
            let next = match self.turns.take_to_look() {
                Some(mut turn) => {
                    if let Some(outcome) = opened.take() {
                        guarded(&mut turn, |engine| engine.opened(outcome));
                    }
                    match self.look(&mut turn, woken, &mut state) {
                        Next::Exit => {
                            // Before another thread has the turn, which may be that of the next claim.
                            return turn.take();
                        }
                        next => {
                            let events = turn.as_mut().map(|engine| engine.take_pending_events());
                            drop(turn);
                            if let Some(events) = events.filter(|events| !events.is_empty()) {
                                self.tell_on_thread(events, &mut state.teller);
                            }
                            next
                        }
                    }
                }
                // Whoever has the turn sees what is on the socket.
                None => state.nap(if opened.is_some() { SHORTEST_NAP } else { LOOKS_EVERY }),
            };
            match next {
                Next::Sleep { until, watch } => woken = self.turns.sleep(until, watch.as_ref()),
                Next::Open => (opened, woken) = (Some(self.open()), Woken::Called),
                Next::Exit => return None,
            }
        }
    }

    fn new_engine(&self) -> Box<Engine> {
        Box::new(Engine::new(self.context.clone()))
    }

    fn wait_for_turn(&self) -> MutexGuard<'_, Option<Box<Engine>>> {
        loop {
            match self.turns.take() {
                Some(turn) => return turn,
                None => thread::sleep(SHORTEST_NAP),
            }
        }
    }

    /// Does all that is due; returns how long to sleep.
    fn look(&self, turn: &mut Option<Box<Engine>>, woken: Woken, state: &mut LoopState) -> Next {
        let mut readable = woken == Woken::Readable;
        let mut has_confirmed = false;
        loop {
            // A thread of the application panicked in the former one.
            turn.get_or_insert_with(|| self.new_engine());
            self.take_in(turn);
            guarded(turn, Engine::end_pauses);
            let Some(engine) = turn else { continue };
            if engine.has_pending_events() {
                return Next::Sleep { until: Instant::now(), watch: None };
            }
            let (action, now) = (engine.session_action(), engine.now());
            match action {
                session::Action::Open if !engine.is_empty() => return Next::Open,
                session::Action::Pause { until } | session::Action::Watch { until } if now >= until => {
                    guarded(turn, Engine::pass_time);
                    continue;
                }
                session::Action::Pause { until } if !engine.is_empty() => {
                    return Next::Sleep { until: engine.at(until), watch: None };
                }
                // What claims ask for is not to wait for standbys that do not confirm.
                session::Action::Confirm { .. } if has_confirmed && engine.has_work() => {
                    has_confirmed = false;
                    guarded(turn, Engine::work);
                    continue;
                }
                session::Action::Renew { .. } | session::Action::Confirm { .. } | session::Action::Close => {
                    // Where others are granted locks all the time, there is always something to confirm.
                    if !has_confirmed {
                        Self::ask_for_annotations(engine);
                    }
                    has_confirmed |= matches!(action, session::Action::Confirm { .. });
                    guarded(turn, |engine| engine.serve(action));
                    continue;
                }
                session::Action::Serve | session::Action::Watch { .. } => {
                    if mem::take(&mut readable) && engine.is_readable() || engine.is_cut_off() {
                        guarded(turn, Engine::listen);
                        continue;
                    }
                    if engine.has_work() {
                        guarded(turn, Engine::work);
                        (state.nap, state.has_worked) = (SHORTEST_NAP, true);
                        continue;
                    }
                }
                session::Action::Open | session::Action::Pause { .. } => {}
            }
            Self::ask_for_annotations(engine);
            if engine.is_empty() {
                let since = *state.idle_since.get_or_insert_with(Instant::now);
                let linger = LINGER.min(self.context.plan.heartbeat);
                if self.leaves(since.elapsed() >= linger) {
                    return Next::Exit;
                }
                // One that is expected comes by itself.
                let until = if since.elapsed() < linger { since + linger } else { Instant::now() + linger };
                return Next::Sleep { until, watch: engine.socket() };
            }
            state.idle_since = None;
            // Those that have just had their answers are about to ask for something else, and to fall asleep and be woken takes longer.
            if mem::take(&mut state.has_worked) && self.is_called_soon() {
                continue;
            }
            guarded(turn, Engine::rest);
            let Some(engine) = turn else { continue };
            let at_most = Instant::now() + self.context.plan.heartbeat / 2;
            let until = Self::next_look(engine).map_or(at_most, |until| until.min(at_most));
            if woken == Woken::Readable {
                // It was an answer to a caller, who has read it.
                return state.nap(LONGEST_NAP).until(until);
            }
            state.nap = SHORTEST_NAP;
            return Next::Sleep { until, watch: engine.socket() };
        }
    }

    /// Has the observer told, by a thread that does nothing else: it may want locks of this very carrier.
    fn tell_on_thread(&self, events: PendingEvents, teller: &mut Option<Sender<PendingEvents>>) {
        if teller.is_none() {
            let (sender, receiver) = unbounded::<PendingEvents>();
            let pool = Arc::clone(&self.context.pool);
            let tell = move || receiver.iter().for_each(|events| events.tell(&pool));
            match thread::Builder::new().name("dsync-teller".to_owned()).spawn(tell) {
                Ok(_) => *teller = Some(sender),
                Err(error) => log::debug!("no thread for what the observer is told: {error}"),
            }
        }
        match teller {
            Some(teller) => drop(teller.send(events)),
            None => events.tell(&self.context.pool),
        }
    }

    /// Lets other threads run for a moment; whether one of them has put something into the inbox.
    fn is_called_soon(&self) -> bool {
        const YIELDS: usize = 20;
        (0..YIELDS).any(|_| {
            thread::yield_now();
            self.context.carried.is_called()
        })
    }

    /// Whether the session is to be given back: nobody comes any more, or nobody has come for some time.
    fn leaves(&self, lingered: bool) -> bool {
        let inbox = self.inbox.lock();
        inbox.is_unwanted() && (lingered || inbox.has_stopped)
    }

    /// Whether the thread exits, which has given back the session: nobody has come meanwhile.
    fn ends(&self) -> bool {
        let mut inbox = self.inbox.lock();
        let ends = inbox.is_unwanted();
        // The next claim has another thread started. After a stop there is none, and somebody waits for this one.
        if ends && !inbox.has_stopped {
            inbox.running = None;
        }
        ends
    }

    /// Has a session opened, on which nothing is held.
    fn open(&self) -> Result<PooledSlot, Refusal> {
        let stream = StreamControl::new();
        *self.connecting.lock() = Some(stream.clone());
        if self.inbox.lock().has_stopped {
            stream.kill();
        }
        let outcome = self.open_with(&stream);
        *self.connecting.lock() = None;
        outcome
    }

    fn open_with(&self, stream: &StreamControl) -> Result<PooledSlot, Refusal> {
        let pool = &self.context.pool;
        let mut slot = pool.slots().take(true)?;
        pool.open(&mut slot, stream)?;
        let witness = nonce().map_err(Refusal::system)?.cast_signed();
        let by = Instant::now() + self.context.plan.heartbeat_timeout;
        let session = slot.session().ok_or_else(Refusal::not_postgres)?;
        if let Err(failure) = session.begin_carrying(&self.name, witness, by) {
            slot.taint();
            return Err(Refusal::from_failure(failure));
        }
        Ok(slot)
    }

    /// Asks the application for annotations, on threads that do nothing else: a valuer that takes its time must not be in the way of
    /// heartbeats, nor of other locks.
    fn ask_for_annotations(engine: &mut Engine) {
        /// So many are asked at once at the most.
        const THREADS: usize = 8;
        let seats = engine.take_unannotated();
        if seats.is_empty() {
            return;
        }
        let ask = |seat: &Arc<Seat>| {
            seat.annotate();
            seat.wake();
        };
        let spawn = |body: Box<dyn FnOnce() + Send>| {
            let spawned = thread::Builder::new().name("dsync-valuer".to_owned()).spawn(body);
            spawned.map(drop).map_err(|error| log::warn!("no thread for the annotations of locks: {error}"))
        };
        // Those that took their time before wait for themselves only.
        let (slow, quick): (Vec<_>, Vec<_>) =
            seats.into_iter().partition(|seat| !seat.spec().annotates_fast());
        // Where there is no thread, the next look asks again.
        let mut left = Vec::new();
        for seat in slow {
            let body = Arc::clone(&seat);
            if spawn(Box::new(move || ask(&body))).is_err() {
                left.push(seat);
            }
        }
        let (next, all) = (Arc::new(AtomicUsize::new(0)), Arc::new(quick));
        let mut threads = 0;
        while threads < all.len().min(THREADS) {
            let (next, all) = (Arc::clone(&next), Arc::clone(&all));
            let work = move || {
                while let Some(seat) = all.get(next.fetch_add(1, SeqCst)) {
                    ask(seat);
                }
            };
            if spawn(Box::new(work)).is_err() {
                break;
            }
            threads += 1;
        }
        if threads == 0 {
            left.extend(all.iter().cloned());
        }
        engine.put_back_unannotated(left);
    }

    // What both do.

    /// Has the engine look at all that have come in.
    fn take_in(&self, turn: &mut Option<Box<Engine>>) {
        // Where the thread is not ready yet, it looks when it is.
        if turn.is_none() || !self.context.carried.is_called.swap(false, SeqCst) {
            return;
        }
        let mut untaken = Untaken { carrier: self, seats: std::mem::take(&mut self.inbox.lock().seats) };
        while let Some(seat) = untaken.seats.pop_front() {
            seat.unmark_called();
            guarded(turn, |engine| engine.attend(&seat));
        }
    }

    /// The carrier of a manager with `count` of them that has the lock with this key.
    pub(crate) fn place_of(key: AdvisoryKey, count: usize) -> usize {
        // The number of a name is a hash. Those that applications choose are often close to each other, which is as good. Those of semaphores
        // end with ten zeros.
        let id = key.id().cast_unsigned();
        usize::try_from((id ^ id >> 10) % (count.max(1) as u64)).unwrap_or(0)
    }
}

/// Those that came in and have not been looked at. Where the engine panics they are for the next one, and back in the inbox.
struct Untaken<'a> {
    carrier: &'a Carrier,
    seats: VecDeque<Arc<Seat>>,
}

impl Drop for Untaken<'_> {
    fn drop(&mut self) {
        if !self.seats.is_empty() {
            self.carrier.inbox.lock().seats.append(&mut self.seats);
            self.carrier.context.carried.is_called.store(true, SeqCst);
            self.carrier.turns.wake();
        }
    }
}

/// Runs `run` on the engine. If it panics, the engine is dropped, and its claims are over.
fn guarded(turn: &mut Option<Box<Engine>>, run: impl FnOnce(&mut Engine)) {
    if let Some(mut engine) = turn.take() {
        run(&mut engine);
        *turn = Some(engine);
    }
}

impl fmt::Debug for Carrier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Carrier").field("name", &self.name).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Moment;
    use crate::mode::Mode;
    use crate::pg::claim::status::Span;

    /// The first to see it may be an application that asks about one of the locks, and tells none of their channels.
    #[test]
    fn the_end_of_the_terms_is_due_until_each_claim_knows_of_it() {
        const TERM: Duration = Duration::from_secs(600);
        let ends = Arc::new(Expiry::new(Moment::now().checked_add(TERM).unwrap()));
        let carried = CarriedClaims::default();
        carried.set_end(Some(Arc::clone(&ends)));
        let lost = [0, 1].map(|number| {
            let claim =
                Claim::new(format!("k{number}"), Mode::Exclusive, TERM, Span::UntilReleased, None, None);
            assert!(claim.announce_acquired(Arc::clone(&ends), None, None));
            carried.add(number, &claim);
            claim.lost()
        });
        let is_far = |due: Option<Instant>| due.is_some_and(|due| due > Instant::now() + TERM / 2);
        assert!(is_far(carried.deadline()));
        // The session is over, and they are about to be told.
        carried.set_end(None);
        assert!(is_far(carried.deadline()));
        carried.set_end(Some(Arc::clone(&ends)));
        assert!(ends.move_to(Moment::now()) && ends.has_passed());
        let due = carried.deadline().unwrap();
        assert!(due <= Instant::now() && carried.deadline() == Some(due), "the watchdog is not busy with it");
        assert!(lost.iter().all(|lost| !lost.is_lost()));
        carried.enforce();
        assert!(lost.iter().all(|lost| lost.is_lost()) && carried.deadline().is_none());
    }
}
