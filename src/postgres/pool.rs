//! The pool of sessions: how many there may be, which are free, and what may not come back.

use std::convert::Infallible;
use std::fmt;
use std::panic::catch_unwind;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use parking_lot::Mutex;
use postgres::Row;
use postgres::types::ToSql;
use r2d2::{ManageConnection, NopErrorHandler, PooledConnection};
use scheduled_thread_pool::{OnPoolDropBehavior, ScheduledThreadPool};

use crate::clock::Moment;
use crate::context::Context;
use crate::error::{Error, ErrorKind, Result, chain};
use crate::local_queue::LocalQueue;
use crate::loss::LossReason;
use crate::observer::Sessions;
use crate::pg::catalog;
use crate::pg::catalog::takeover::{self, Past};
use crate::pg::config::{CatalogMode, Config};
use crate::pg::confirm::{self, Confirmers, Outcome, Wait, Wanted};
use crate::pg::quorum::{Confirmations, Quorum};
use crate::pg::session::machine::{Confirms, Rhythm};
use crate::pg::session::open::{Session, SessionPlan};
use crate::pg::session::refusal::Refusal;
use crate::pg::session::wire::Failure;
use crate::pg::sql::Probe;
use crate::pg::stop_probe::StopProbes;
use crate::pg::stream::{Dialer, Socket, StreamControl};
use crate::pg::takeover::{Agreed, GraceLeft, GraceStep, Graces, TakeoverPolicy};
use crate::pg::watchdog::Watchdog;
use crate::process::{PerProcess, nonce};
use crate::telling::Observing;

/// The sessions of a manager.
///
/// What r2d2 hands out is a [`Slot`]: the right to one session, and that session if it is open. It is opened on the
/// thread of the claim that wants it, not on r2d2's: there its error is a value and not a text, it ends at a deadline,
/// it can be killed, and a server that is down is not called again and again for claims that have ended. The session
/// itself is made by `r2d2_postgres`.
pub(crate) struct Pool {
    slots: r2d2::Pool<Slots>,
    /// Those who wait for a slot, first come, first served. The first one looks for it.
    line: Arc<LocalQueue>,
    idle_thread: IdleThread,
    plan: SessionPlan,
    watchdog: Arc<Watchdog>,
    heartbeat_timeout: Duration,
    connect_timeout: Duration,
    catalog: CatalogMode,
    /// Is told how many sessions are in use.
    observing: Option<Arc<Observing>>,
    /// The takeover policy and the lease, as all managers of the database are to agree on them.
    own: Agreed,
    /// The record of the server's run in which they last did. Whoever has it takes no other mutex.
    agreed_in: Mutex<Option<String>>,
    /// Those that sessions have found. Whoever has it takes no other mutex.
    graces: Mutex<Graces>,
    /// What the standbys have confirmed. Whoever has it takes no other mutex.
    confirmations: Mutex<Confirmations>,
    /// The connections that show whether a server is stopping. Whoever has it takes no other mutex but those of their streams.
    probes: Mutex<StopProbes>,
    /// Whether the catalog has been seen to be there, with settings in it that all managers have agreed on, this one among them.
    catalog_ready: AtomicBool,
    /// Whether it has been seen to be there.
    catalog_seen: AtomicBool,
    /// Whether the server has been shown to keep sessions apart.
    probed: AtomicBool,
    /// When somebody last found no slot, in milliseconds since `made`; 0 if that has not happened.
    crowded_at: AtomicU64,
    made: Moment,
}

/// A checked-out slot. Back in the pool when dropped; its session only if it is open and not [tainted](Slot::taint).
pub(crate) type PooledSlot = PooledConnection<Slots>;

/// What the pool manages: see [`Pool`].
#[derive(Debug)]
pub(crate) struct Slots;

/// The right to one session, and the session.
#[derive(Default)]
pub(crate) struct Slot {
    session: Option<Session>,
}

impl ManageConnection for Slots {
    type Connection = Slot;
    type Error = Infallible;

    fn connect(&self) -> std::result::Result<Slot, Infallible> {
        Ok(Slot::default())
    }

    fn is_valid(&self, _: &mut Slot) -> std::result::Result<(), Infallible> {
        // Not asked: the first statement of a claim tells, and costs no round trip of its own.
        Ok(())
    }

    fn has_broken(&self, slot: &mut Slot) -> bool {
        slot.session.as_ref().is_none_or(Session::is_over)
    }
}

impl Slot {
    /// The session, if it is open.
    pub(crate) fn session(&mut self) -> Option<&mut Session> {
        self.session.as_mut()
    }

    /// The socket of the session.
    pub(crate) fn socket(&self) -> Option<Socket> {
        self.session.as_ref().and_then(Session::socket)
    }

    /// Whether there is a session, and it is not known to be useless.
    fn is_open(&self) -> bool {
        self.session.as_ref().is_some_and(|session| !session.is_over())
    }

    /// Whether there is one that may take locks.
    pub(crate) fn is_ready(&self) -> bool {
        self.is_open() && self.session.as_ref().is_some_and(Session::is_for_locks)
    }

    /// Closes the session and says so to the server, which takes no longer than a goodbye may; after `by`, without a word.
    pub(crate) fn close(&mut self, by: Instant) {
        if Instant::now() >= by {
            self.taint();
        }
        self.session = None;
    }

    /// Marks the session as one that must never be used again, and closes it.
    pub(crate) fn taint(&mut self) {
        if let Some(session) = self.session.take() {
            session.kill();
        }
    }
}

/// How long to wait for a slot at one time. Short, since a release cannot interrupt it; whoever wants to wait longer comes
/// again.
const SLOT_WAIT: Duration = Duration::from_millis(100);

/// How often the watchdog looks at all deadlines, at the least. Often enough that hardly a deadline is nearer, which would
/// wake it; and so seldom that it costs nothing.
const LOOKS_EVERY: Duration = Duration::from_millis(500);

/// The thread on which r2d2 makes slots and closes idle sessions. It ends with the pool; r2d2's own are three, and stay for
/// 30 s.
fn thread_pool() -> Result<ScheduledThreadPool> {
    /// The system counts a thread that has ended for a moment longer, so one more than is needed.
    const SPARE: usize = 2;
    /// What one thread has found to be spare another one must not use up meanwhile.
    static ONE_AT_A_TIME: PerProcess<Mutex<()>> = PerProcess::new();
    let failed = || {
        let message = "the thread of the session pool could not be started; is the limit of threads reached?";
        Error::new(ErrorKind::FailedInitialization, message)
    };
    let _turn = ONE_AT_A_TIME.get(|_| Mutex::default()).lock();
    // The pool's maker panics where there is no thread to be had, so that is tried before.
    let (hold, held) = bounded::<Infallible>(0);
    let spare = [(); SPARE].map(|()| {
        let held = held.clone();
        thread::Builder::new().name("dsync-spare".to_owned()).spawn(move || {
            let _ = held.recv();
        })
    });
    drop(hold);
    for thread in spare {
        // It does nothing that could panic.
        let _ = thread.map_err(|error| failed().with_source(error))?.join();
    }
    catch_unwind(|| {
        ScheduledThreadPool::builder()
            .num_threads(1)
            .thread_name_pattern("dsync-pool")
            .on_drop_behavior(OnPoolDropBehavior::DiscardPendingScheduled)
            .build()
    })
    .map_err(|_| failed())
}

/// Keeps the pool's thread, while it has nothing to do, in a wait of the standard library's; tells it when r2d2 has something.
///
/// By itself it would wait in `parking_lot`, which keeps all waiting threads in one table of the process. A forked child inherits
/// the table and not the thread. If a thread of the child then waits in the same place, at the same address, the table is broken,
/// and the child crashes or hangs.
struct IdleThread(Sender<()>);

impl IdleThread {
    fn new(threads: &ScheduledThreadPool) -> Self {
        /// r2d2 closes idle sessions on this thread, which it looks for every 30 s.
        const AT_MOST: Duration = Duration::from_secs(10);
        /// Whoever has called gives r2d2 its work a moment later, so for so long it makes room for that often.
        const FOR_WORK: Duration = Duration::from_millis(20);
        let (call, called) = bounded(1);
        let mut works_until = Instant::now();
        threads.execute_with_dynamic_delay(Duration::ZERO, move || {
            let at_most = if Instant::now() < works_until { SLOT_LOOKS_EVERY } else { AT_MOST };
            match called.recv_timeout(at_most) {
                Err(RecvTimeoutError::Disconnected) => return None,
                Ok(()) => works_until = Instant::now() + FOR_WORK,
                Err(RecvTimeoutError::Timeout) => {}
            }
            // Behind the work that is due by now. A longer delay would be a wait of the pool's own.
            Some(Duration::ZERO)
        });
        Self(call)
    }

    /// r2d2 is about to have work for the thread.
    fn call(&self) {
        // If it is full the thread has been called already.
        let _ = self.0.try_send(());
    }
}

/// How long a slot is waited for where there is room for one: the thread on which r2d2 makes slots may come late to that on a busy machine.
const MAKES_ROOM_WITHIN: Duration = Duration::from_secs(1);

/// How soon to see whether there is a slot, or work for the thread that makes slots, where somebody waits for one.
const SLOT_LOOKS_EVERY: Duration = Duration::from_micros(200);

impl Pool {
    pub(crate) fn new(config: &Config, observing: Option<Arc<Observing>>) -> Result<Self> {
        let mut postgres = config.postgres.clone();
        if postgres.get_application_name().is_none() {
            postgres.application_name("dsync");
        }
        // An idle session must not stand half-open for the two hours that are the usual default.
        if postgres.get_keepalives_idle() == Duration::from_secs(2 * 60 * 60) {
            postgres.keepalives_idle(Duration::from_secs(10));
        }
        let dialer = Dialer::new(postgres, config.connector()?).map_err(|error| {
            Error::new(ErrorKind::InvalidConfig, "the connection's settings do not fit together")
                .with_source(error)
        })?;
        let threads = thread_pool()?;
        let idle_thread = IdleThread::new(&threads);
        let slots = r2d2::Pool::builder()
            .max_size(config.max_sessions)
            .min_idle(Some(0))
            .max_lifetime(None)
            .idle_timeout(Some(config.idle_timeout))
            .test_on_check_out(false)
            .error_handler(Box::new(NopErrorHandler))
            .thread_pool(Arc::new(threads))
            .build_unchecked(Slots);
        let plan = SessionPlan {
            dialer: Arc::new(
                dialer.with_password(config.password.clone()).with_passwords(config.passwords.clone()),
            ),
            schema: Arc::clone(&config.schema),
            slice: config.wait_slice,
            lease: config.lease,
            heartbeat: config.lease_plan().heartbeat,
        };
        Ok(Self {
            slots,
            line: Arc::default(),
            idle_thread,
            plan,
            watchdog: Watchdog::new((config.lease_plan().heartbeat_timeout / 8).min(LOOKS_EVERY)),
            heartbeat_timeout: config.lease_plan().heartbeat_timeout,
            connect_timeout: config.connect_time(),
            catalog: config.catalog,
            observing,
            own: Agreed::of_manager(config.takeover_policy(), config.lease, config.quorum != Quorum::Server),
            agreed_in: Mutex::default(),
            graces: Mutex::default(),
            confirmations: Mutex::default(),
            probes: Mutex::default(),
            catalog_ready: AtomicBool::new(false),
            catalog_seen: AtomicBool::new(false),
            probed: AtomicBool::new(false),
            crowded_at: AtomicU64::new(0),
            made: Moment::now(),
        })
    }

    /// Enforces the deadlines of the sessions and terms.
    pub(crate) fn watchdog(&self) -> &Arc<Watchdog> {
        &self.watchdog
    }

    /// A slot with an open session, if there is one at hand.
    pub(crate) fn take_open(&self) -> Option<PooledSlot> {
        let _turn = self.line.try_enter()?;
        self.slots.try_get().filter(|slot| slot.is_ready())
    }

    /// How many sessions are in use: the slots that somebody has taken.
    pub(crate) fn sessions(&self) -> Sessions {
        let state = self.slots.state();
        let in_use = state.connections.saturating_sub(state.idle_connections);
        Sessions { in_use, limit: self.slots.max_size() }
    }

    /// How many sessions are open, at the most: in use, or at rest.
    pub(crate) fn opened(&self) -> u32 {
        self.slots.state().connections
    }

    /// Tells the observer of them. To be called after a slot was taken or given back, under no mutex but that of an engine.
    pub(crate) fn tell_of_sessions(&self) {
        if let Some(observing) = &self.observing {
            observing.sessions(|| self.sessions());
        }
    }

    /// True if there is an observer to tell.
    pub(crate) fn is_observed(&self) -> bool {
        self.observing.is_some()
    }

    /// How many slots nobody has taken.
    pub(crate) fn idle(&self) -> usize {
        self.slots.state().idle_connections.try_into().unwrap_or(usize::MAX)
    }

    /// Closes the sessions that nobody uses. Several threads may do it at once, each a part of them.
    pub(crate) fn close_idle(&self, by: Instant) {
        self.probes.lock().clear();
        // A slot without a session does not go back, so there are fewer each time.
        while let Some(mut slot) = self.slots.try_get() {
            slot.close(by);
        }
    }

    /// The rhythm of heartbeats, for a claim whose time begins at `epoch`.
    pub(crate) fn rhythm(&self, epoch: Moment) -> Rhythm {
        Rhythm::of(self.plan.heartbeat, epoch.saturating_duration_since(self.made))
    }

    /// How long it may take to have a slot and to open its session.
    pub(crate) fn takes_at_most(&self) -> Duration {
        let is_known = self.catalog_ready.load(Ordering::Relaxed) && self.probed.load(Ordering::Relaxed);
        let attempts = if is_known { 2 } else { 3 };
        MAKES_ROOM_WITHIN + 2 * SLOT_WAIT + self.connect_timeout * attempts
    }

    /// Whether a slot that is free in all but name is to be given back at once, since others want one.
    pub(crate) fn is_crowded(&self) -> bool {
        const LASTS: u64 = 1_000;
        let at = self.crowded_at.load(Ordering::Relaxed);
        at > 0 && self.now() - at.min(self.now()) < LASTS
    }

    /// Milliseconds since the pool was made, and one.
    fn now(&self) -> u64 {
        u64::try_from(self.made.elapsed().as_millis()).unwrap_or(u64::MAX - 1) + 1
    }

    /// Takes a slot; if `waits`, also one that comes back within the pool's patience.
    pub(crate) fn take(&self, waits: bool) -> std::result::Result<PooledSlot, Refusal> {
        let mut turn = self.line.try_enter();
        if turn.is_some()
            && let Some(slot) = self.slots.try_get()
        {
            return Ok(slot);
        }
        if self.is_full() {
            self.crowded_at.store(self.now(), Ordering::Relaxed);
        }
        let by = Instant::now() + MAKES_ROOM_WITHIN;
        while waits || !self.is_full() {
            // One that comes back is for the first in the line. Where there is room for all in it, and one more, nobody waits for them.
            let may_look = self.has_room_beside(1 + self.line.waiting()) || {
                turn = turn.or_else(|| self.line.enter(&Context::timeout(SLOT_WAIT)).ok());
                turn.is_some()
            };
            if may_look && let Some(slot) = self.await_slot() {
                return Ok(slot);
            }
            if self.is_full() {
                break;
            }
            if Instant::now() >= by {
                let text =
                    "this process has not made room for another session in time: its machine is too busy";
                return Err(Refusal::new(ErrorKind::SessionUnavailable, text.to_owned()));
            }
        }
        Err(self.exhausted())
    }

    /// That there is no slot.
    pub(crate) fn exhausted(&self) -> Refusal {
        Refusal::new(
            ErrorKind::PoolExhausted,
            format!(
                "all {} sessions of this manager are taken; raise max_sessions, or release locks that are not needed",
                self.slots.max_size()
            ),
        )
    }

    /// A slot that is new or comes back within the pool's patience. For the first in the line, and for whoever finds that there is room.
    ///
    /// r2d2 would wait for it in `parking_lot`, and supervisors take slots whenever they like, so also while the process is being
    /// forked: see [`IdleThread`]. It does so here only for the moment in which it is asked for a new slot.
    fn await_slot(&self) -> Option<PooledSlot> {
        let (begun, mut nap, mut is_asked) = (Instant::now(), SLOT_LOOKS_EVERY, false);
        loop {
            let mut slot = self.slots.try_get();
            // Each time that r2d2 is asked it makes another one.
            if slot.is_none() && !is_asked && self.has_room_beside(0) {
                is_asked = true;
                self.idle_thread.call();
                slot = self.slots.get_timeout(Duration::ZERO).ok();
                // It may have looked before there was something to do.
                self.idle_thread.call();
            }
            if slot.is_some() || begun.elapsed() >= SLOT_WAIT {
                return slot;
            }
            thread::sleep(nap);
            nap = (2 * nap).min(SLOT_LOOKS_EVERY * 10);
        }
    }

    /// True if there may be another session.
    pub(crate) fn has_room(&self) -> bool {
        !self.is_full()
    }

    /// True if somebody has taken each slot that there may be.
    fn is_full(&self) -> bool {
        let Sessions { in_use, limit } = self.sessions();
        in_use >= limit
    }

    /// True if another slot can be made, also when so many others have been.
    fn has_room_beside(&self, others: usize) -> bool {
        let (made, limit) = (self.slots.state().connections, self.slots.max_size());
        u32::try_from(others).is_ok_and(|others| made.saturating_add(others) < limit)
    }

    /// Opens the slot's session, if there is none that may take locks. `control` can end the attempt.
    ///
    /// It takes `connect_timeout`; as long again for the probe, and once more for the catalog, which may have to be made, and in which it
    /// looks whether the server was taken over.
    pub(crate) fn open(&self, slot: &mut Slot, control: &StreamControl) -> std::result::Result<(), Refusal> {
        if slot.is_ready() {
            return Ok(());
        }
        let mut session = self.connect(slot, control)?;
        let by = Instant::now() + self.connect_timeout;
        if self.own.quorum {
            confirm::may_confirm(&mut session, by)
                .map_err(|refusal| self.during("looked at the standbys", refusal))?;
        }
        self.look_at_catalog(&mut session, by)
            .map_err(|refusal| self.during("looked at the catalog", refusal))?;
        session.set_for_locks();
        slot.session = Some(session);
        Ok(())
    }

    /// Opens the slot's session, if there is none, for a question. It may take no lock: who only looks agrees on nothing for all managers of
    /// the database, is not refused for what it would agree on, and waits for a standby only if the catalog has to be made.
    fn open_to_ask(&self, slot: &mut Slot) -> std::result::Result<(), Refusal> {
        if slot.is_open() {
            return Ok(());
        }
        let control = StreamControl::new();
        if self.catalog == CatalogMode::None {
            return self.open(slot, &control);
        }
        let mut session = self.connect(slot, &control)?;
        let by = Instant::now() + self.connect_timeout;
        if !self.catalog_ready.load(Ordering::Relaxed) && !self.catalog_seen.load(Ordering::Relaxed) {
            catalog::ensure(&mut session, self.catalog, by)
                .map_err(|refusal| self.during("looked for the catalog", refusal))?;
            self.catalog_seen.store(true, Ordering::Relaxed);
        }
        match takeover::peek(&mut session, by).map_err(Refusal::from_failure)? {
            Some(Past::Pending { id, lasts, seen }) => self.grace_goes_on(&id, lasts, seen),
            Some(Past::Over { id }) => {
                self.graces.lock().ends(&id);
            }
            None => {}
        }
        slot.session = Some(session);
        Ok(())
    }

    fn connect(&self, slot: &mut Slot, control: &StreamControl) -> std::result::Result<Session, Refusal> {
        slot.taint();
        let by = Instant::now() + self.connect_timeout;
        let session = if self.probed.load(Ordering::Relaxed) {
            Session::open(&self.plan, control.clone(), by)?
        } else {
            self.open_and_probe(control, by)?
        };
        if let Err(error) = session.watch_by(&self.watchdog) {
            log::debug!("no thread for the watchdog, so each call has a timer of its own: {error}");
        }
        Ok(session)
    }

    /// Sees that the catalog is there, and whether the session may be granted locks.
    ///
    /// Each session asks for itself, once: it does not outlive its server, so what it has found stays true. And as long as a takeover grace
    /// goes on, it remembers that.
    pub(crate) fn look_at_catalog(
        &self,
        session: &mut Session,
        by: Instant,
    ) -> std::result::Result<(), Refusal> {
        if self.catalog == CatalogMode::None {
            self.catalog_ready.store(true, Ordering::Relaxed);
            return Ok(());
        }
        let mut first = !self.catalog_ready.load(Ordering::Relaxed);
        let over = loop {
            // In a new one there is nothing to be found.
            if first && catalog::ensure(session, self.catalog, by)? {
                break None;
            }
            match takeover::may_ask(session, self.own, first, by).map_err(catalog::failed) {
                // Somebody has dropped it.
                Err(refusal) if refusal.is_about_catalog() && !first => {
                    self.forget_catalog();
                    first = true;
                }
                outcome => break outcome?,
            }
        };
        // In a run of the server that the manager has not seen, it says again what it wants to be agreed on: a standby that was promoted may not know
        // of it, nor a catalog that was made anew.
        let is_told = first || self.own.policy == TakeoverPolicy::Immediate;
        let past = match over {
            Some(id) if is_told || self.agreed_in.lock().as_ref() == Some(&id) => Past::Over { id },
            _ => takeover::look_at_past(session, self.own, None, by).map_err(catalog::failed)??,
        };
        self.catalog_ready.store(true, Ordering::Relaxed);
        self.take_note(session, past);
        Ok(())
    }

    /// Keeps in mind what a session has found, and logs what is new about it.
    fn take_note(&self, session: &mut Session, past: Past) {
        let (Past::Over { id } | Past::Pending { id, .. }) = &past;
        self.agreed_in.lock().replace(id.clone());
        match past {
            Past::Over { id } => {
                self.end_grace(&id);
                session.set_run(id, false);
            }
            Past::Pending { id, lasts, seen } => {
                self.grace_goes_on(&id, lasts, seen);
                session.set_run(id, true);
            }
        }
    }

    fn grace_goes_on(&self, id: &str, lasts: Duration, seen: Duration) {
        let left = lasts.saturating_sub(seen);
        let is_new = self.graces.lock().goes_on(id, lasts, seen, Instant::now());
        if is_new && !left.is_zero() {
            log::warn!(
                "the server was restarted, or another one took its place: locks are granted in {left:.1?}, since a holder of before \
                 may be cut off, and the longest lease is {lasts:?} (takeover policy: {})",
                self.own.policy.name()
            );
        }
    }

    fn end_grace(&self, id: &str) {
        let is_new = self.graces.lock().ends(id);
        if is_new {
            log::info!("all terms from before the takeover of the server are over: locks are granted again");
        }
    }

    /// Looks again at the takeover grace that a session knows of, if it is time for that, and ends one that this process has waited
    /// out. Gives how long it lasts yet; `None` if it is over.
    pub(crate) fn look_at_grace(
        &self,
        session: &mut Session,
        by: Instant,
    ) -> std::result::Result<std::result::Result<Option<GraceLeft>, Refusal>, Failure> {
        loop {
            let Some(id) = session.pending().map(str::to_owned) else { return Ok(Ok(None)) };
            let step = self.graces.lock().next_step(&id, Instant::now());
            let waited_out = match step {
                GraceStep::Over => {
                    session.set_run(id, false);
                    return Ok(Ok(None));
                }
                GraceStep::Wait(left) => return Ok(Ok(Some(left))),
                GraceStep::Mark => Some(id.as_str()),
                GraceStep::Look => None,
            };
            match takeover::look_at_past(session, self.own, waited_out, by)? {
                Ok(past) => self.take_note(session, past),
                Err(refusal) => return Ok(Err(refusal)),
            }
            if Instant::now() >= by {
                return Err(Failure::Lost { reason: LossReason::HeartbeatTimedOut, cause: None });
            }
        }
    }

    /// The longest lease of the time before a takeover, if a session has found its grace.
    pub(crate) fn longest_lease(&self, grace: &str) -> Option<Duration> {
        self.graces.lock().lasts(grace)
    }

    /// How long the takeover grace lasts at the most that goes on, as far as this manager knows.
    pub(crate) fn grace_left(&self) -> Option<Duration> {
        self.graces.lock().of_newest(Instant::now())
    }

    /// Why the managers of the database would not have this one among them, if they would not; or cannot be told of it, where commits wait for a
    /// standby that is away.
    pub(crate) fn objection(
        &self,
        session: &mut Session,
        standby_is_away: bool,
        by: Instant,
    ) -> std::result::Result<Option<Refusal>, Failure> {
        takeover::objection(session, self.own, standby_is_away, by)
    }

    /// How long the takeover grace lasts at the most that goes on, by the word of a session that takes no locks; and whether it is
    /// counted, by this manager or by another process of this machine. To look is not to begin to count: who takes locks does, and logs it.
    pub(crate) fn grace_on(
        &self,
        session: &mut Session,
        by: Instant,
    ) -> std::result::Result<Option<(Duration, bool)>, Failure> {
        let Some(Past::Pending { id, lasts, seen }) = takeover::peek(session, by)? else { return Ok(None) };
        let left = lasts.saturating_sub(seen);
        let by_manager = self.graces.lock().left(&id, Instant::now());
        let is_counted = by_manager.is_some() || !seen.is_zero();
        let left = by_manager.unwrap_or(left).min(left);
        Ok((!left.is_zero()).then_some((left, is_counted)))
    }

    /// What is to be confirmed before it counts.
    pub(crate) fn confirms(&self) -> Confirms {
        match self.own {
            Agreed { quorum: true, .. } => Confirms::All,
            Agreed { policy: TakeoverPolicy::AfterAnyRestart, .. } => Confirms::Grants,
            _ => Confirms::Nothing,
        }
    }

    /// Waits until what is wanted is confirmed. See [`confirm`].
    pub(crate) fn confirm(
        &self,
        session: &mut Session,
        wanted: &Wanted,
        wait: &Wait<impl Fn() -> bool>,
    ) -> std::result::Result<Outcome, Failure> {
        let is_strict = self.own.policy == TakeoverPolicy::AfterAnyRestart;
        let confirmers = Confirmers {
            standbys: self.own.quorum.then_some(&self.confirmations),
            probes: is_strict.then_some(&self.probes),
            connect_timeout: self.connect_timeout,
        };
        confirm::confirm(session, &confirmers, wanted, wait)
    }

    /// What all its sessions have in common.
    pub(crate) fn plan(&self) -> &SessionPlan {
        &self.plan
    }

    /// Opens two sessions at once, and shows that they are two which exclude each other. Gives the one that obeys
    /// `control`; the other one if there can be only one.
    ///
    /// At once, since on a slow link the time is not enough for one after the other.
    fn open_and_probe(&self, control: &StreamControl, by: Instant) -> std::result::Result<Session, Refusal> {
        // Each waits for the other one for half of the time that is left when it is open itself: a pooler in session mode
        // that has one session gives it to one of the two.
        let half_time = move || Instant::now() + by.saturating_duration_since(Instant::now()) / 2;
        let other_control = StreamControl::new();
        let (hand_over, others) = bounded(0);
        let opens_other = {
            let (plan, control) = (self.plan.clone(), other_control.clone());
            move || {
                let outcome = Session::open(&plan, control, by);
                // Closed if nobody wants it by then.
                let _ = hand_over.send_deadline(outcome, half_time());
            }
        };
        thread::Builder::new().name("dsync-probe".into()).spawn(opens_other).map_err(|error| {
            let message = "there is no thread for a second session, by which the server is checked; \
                           raise the limit of threads";
            Refusal::new(ErrorKind::SessionUnavailable, message.to_owned()).because(error)
        })?;
        let session = Session::open(&self.plan, control.clone(), by);
        let other = match &session {
            Err(refusal) if refusal.is_refused() => None,
            _ => await_other(&others, control, half_time()),
        };
        let Some(other) = other else {
            other_control.kill();
            return session;
        };
        control.take_along(&other_control);
        let outcome = match (session, other) {
            (Ok(session), Ok(other)) => self.probe(session, other, Instant::now() + self.connect_timeout),
            // A server that is full for a second session is no proof of anything; the next session asks again.
            (Ok(session), Err(refusal)) if refusal.is_curable() => Ok(session),
            (Ok(_), Err(refusal)) => Err(refusal),
            // Which of the two has the last place is a matter of luck.
            (Err(refusal), Ok(other)) if refusal.is_curable() && !control.is_dead() => Ok(other),
            (Err(refusal), _) => Err(refusal),
        };
        control.leave_behind();
        outcome
    }

    /// Shows once that two sessions which are open at once are two, stay what they are, and exclude each other by locks of each kind.
    ///
    /// A transaction pooler serves both with one and the same backend, or one of them with several, and then two clients
    /// "hold" one lock. A pooler that comes later is noticed by the heartbeat. And there are servers that look like
    /// PostgreSQL, whose advisory locks always succeed.
    pub(crate) fn probe(
        &self,
        mut session: Session,
        mut other: Session,
        by: Instant,
    ) -> std::result::Result<Session, Refusal> {
        let verdict = self.contend(&mut session, &mut other, by);
        if let Err(refusal) = verdict {
            return Err(session.explain_both(&mut other, refusal, by));
        }
        self.probed.store(true, Ordering::Relaxed);
        Ok(session)
    }

    fn contend(
        &self,
        session: &mut Session,
        other: &mut Session,
        by: Instant,
    ) -> std::result::Result<(), Refusal> {
        let told = |failure| match failure {
            Failure::Lost { reason: LossReason::SessionChanged, .. } => Refusal::pooler(),
            // What pgbouncer says in statement mode.
            Failure::Lost { cause: Some(error), .. } | Failure::Refused(error)
                if chain(&error).contains("transaction blocks not allowed") =>
            {
                Refusal::pooler()
            }
            failure => self.during("checked that sessions are not shared", Refusal::from_failure(failure)),
        };
        if session.backend_pid() == other.backend_pid() {
            return Err(Refusal::pooler());
        }
        let probe = Probe::new(nonce().map_err(Refusal::system)?);
        // Twice in a row: a pooler may take turns with its sessions. Then the other one at once: a pooler may serve it by
        // the backend that was free last.
        if let Some(advice) = session.heartbeat_and_look(by).map_err(told)? {
            log::warn!("{advice}");
        }
        session.heartbeat(by).map_err(told)?;
        other.heartbeat(by).map_err(told)?;
        let held = other.hold(probe, self.connect_timeout, by);
        // Only against locks that are held: what a pooler's backend was granted might stay there.
        let contended = match held {
            Ok(true) => session.contend(probe, by).map(Some),
            _ => Ok(None),
        };
        let given_back = other.give_back(probe, matches!(held, Ok(true)), by);
        if !held.map_err(told)? {
            return Err(Refusal::no_locks("does not grant a lock that nobody has"));
        }
        match contended.map_err(told)? {
            Some((true, _)) => Err(Refusal::stub()),
            Some((false, false)) => Err(Refusal::no_locks("does not let two sessions share a lock")),
            _ if given_back.map_err(told)? => Ok(()),
            _ => Err(Refusal::no_locks("does not give back a lock that was held")),
        }
    }

    /// Asks something on a session of the pool, which goes back there. The statement is written for the schema `dsync`, and may be run
    /// twice: where a session has died while it rested in the pool, a new one is asked.
    pub(crate) fn ask(&self, statement: &str, parameters: &[&(dyn ToSql + Sync)]) -> Result<Vec<Row>> {
        self.ask_on_session(statement, parameters, true)
    }

    /// As [`ask`](Self::ask), for a statement that must not be run twice: an empty one before it finds a session that has died.
    pub(crate) fn ask_once(&self, statement: &str, parameters: &[&(dyn ToSql + Sync)]) -> Result<Vec<Row>> {
        self.ask_on_session(statement, parameters, false)
    }

    fn ask_on_session(
        &self,
        statement: &str,
        parameters: &[&(dyn ToSql + Sync)],
        may_repeat: bool,
    ) -> Result<Vec<Row>> {
        let patience = self.heartbeat_timeout;
        let mut slot = self.take(true).map_err(Refusal::into_error)?;
        let refusal = loop {
            let has_rested = slot.is_open();
            self.open_to_ask(&mut slot).map_err(Refusal::into_error)?;
            let Some(session) = slot.session() else { return Err(Refusal::not_postgres().into_error()) };
            let statement = session.schema().apply(statement);
            let seen = if has_rested && !may_repeat {
                session.simple_query("", Instant::now() + patience).map(drop)
            } else {
                Ok(())
            };
            let is_repeated = has_rested && (may_repeat || seen.is_err());
            let asked = seen.and_then(|()| session.query(&statement, parameters, Instant::now() + patience));
            let failure = match asked {
                Ok(rows) => return Ok(rows),
                Err(failure) => failure,
            };
            if let Failure::Lost { .. } = failure {
                slot.taint();
            }
            break match failure {
                // It waits for nothing but a table.
                Failure::Lost { reason: LossReason::HeartbeatTimedOut, .. } => Refusal::new(
                    ErrorKind::SessionUnavailable,
                    format!(
                        "the server has not answered within {patience:?}; see whether it runs, and in pg_locks whether a table \
                         of the catalog is locked by another session"
                    ),
                ),
                Failure::Lost { .. } if is_repeated => continue,
                failure => Refusal::from_failure(failure),
            };
        };
        if refusal.is_about_catalog() {
            self.forget_catalog();
        }
        Err(refusal.into_error())
    }

    /// Says of a refusal for want of time what the time was spent on.
    fn during(&self, step: &str, refusal: Refusal) -> Refusal {
        refusal.during(step, self.connect_timeout)
    }

    /// A session has turned out to be shared, so a pooler has come after the probe: the next session asks again.
    pub(crate) fn probe_again(&self) {
        self.probed.store(false, Ordering::Relaxed);
    }

    /// A statement has found the catalog missing: someone dropped it, or the whole database.
    pub(crate) fn forget_catalog(&self) {
        self.catalog_ready.store(false, Ordering::Relaxed);
        self.catalog_seen.store(false, Ordering::Relaxed);
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.watchdog.close();
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").field("state", &self.slots.state()).field("dialer", &self.plan.dialer).finish()
    }
}

/// The second session, when it has been opened; `None` if `control` was killed, or the time is up.
fn await_other<T>(others: &Receiver<T>, control: &StreamControl, until: Instant) -> Option<T> {
    /// How soon a kill is noticed.
    const SLICE: Duration = Duration::from_millis(20);
    loop {
        let now = Instant::now();
        match others.recv_deadline(until.min(now + SLICE)) {
            Ok(other) => return Some(other),
            Err(RecvTimeoutError::Timeout) if now < until && !control.is_dead() => {}
            Err(_) => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn claims_have_the_rhythm_of_their_manager_whenever_they_begin() {
        let config = Config::from_url("postgres://nobody@localhost").unwrap().lease(Duration::from_secs(8));
        let pool = Pool::new(&config, None).unwrap();
        for late in [0, 1, 130, 999, 5_000].map(Duration::from_millis) {
            assert_eq!(
                pool.rhythm(pool.made.checked_add(late).unwrap()),
                Rhythm::of(Duration::from_secs(2), late),
                "{late:?}"
            );
        }
    }

    /// Whoever gives one back and wants one again is quicker than whoever waits and looks now and then.
    #[test]
    fn a_slot_that_comes_back_is_for_the_first_in_the_line() {
        let config = Config::from_url("postgres://nobody@localhost").unwrap().max_sessions(1);
        let pool = Pool::new(&config, None).unwrap();
        for round in 0..20 {
            let slot = pool.take(true).unwrap();
            thread::scope(|scope| {
                let begun = Instant::now();
                let waits = scope.spawn(|| pool.take(true).map(drop));
                while !waits.is_finished() && pool.line.try_enter().is_some() {
                    thread::sleep(Duration::from_millis(1));
                }
                drop(slot);
                // On a busy machine it may have given up.
                let waits_still = begun.elapsed() < SLOT_WAIT;
                let again = pool.take(true);
                // For longer than the other one waits.
                thread::sleep(2 * SLOT_WAIT);
                drop(again);
                let outcome = waits.join().unwrap();
                assert!(outcome.is_ok() || !waits_still, "overtaken in round {round}");
            });
        }
    }

    /// Each is a session of the server, which one that is not needed costs until it has rested for long.
    #[test]
    fn no_more_slots_are_made_than_are_wanted() {
        let config = Config::from_url("postgres://nobody@localhost").unwrap().max_sessions(10);
        for _ in 0..50 {
            let pool = Pool::new(&config, None).unwrap();
            let begun = Instant::now();
            let slots = [(), ()].map(|()| pool.take(true).unwrap());
            let made = pool.slots.state().connections;
            // Whoever has waited for long asks again.
            assert!(made == 2 || begun.elapsed() >= SLOT_WAIT, "{made}");
            drop(slots);
        }
    }
}
