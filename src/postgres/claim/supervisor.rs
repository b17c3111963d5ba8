//! The thread of a claim: watches and renews what is held, does what callers do not do, and makes cancelled callers leave.

use std::io;
use std::mem;
use std::ptr;
use std::sync::{Arc, OnceLock, Weak};
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

use crate::pg::claim::alarm::Woken;
use crate::pg::claim::assignment::{AssignmentCell, IdleStep};
use crate::pg::claim::bell::PollBell;
use crate::pg::claim::claim::Claim;
use crate::pg::claim::engine::{CallKind, Engine};
use crate::pg::claim::idle::IdleSupervisors;
use crate::pg::claim::interrupt::LeaveRequest;
use crate::pg::claim::lifecycle::Action;
use crate::pg::claim::machine as claim;
use crate::pg::claim::spec::LockSpec;
use crate::pg::claim::turns::Turns;
use crate::pg::pool::{Pool, PooledSlot};
use crate::pg::session::machine as session;
use crate::pg::stream::Socket;
use crate::pg::watchdog::Watched;

/// A claim that follows within 20 ms on another one is quick: the session is kept for the next. A supervisor that the answers
/// to callers have woken naps no longer than that.
const QUICK_CLAIM: Duration = Duration::from_millis(20);

/// A supervisor that an answer to a caller has woken watches nothing for 1 ms; for twice as long each time, if callers come and
/// go.
const SHORTEST_NAP: Duration = Duration::from_millis(1);

/// The thread of a supervisor without a claim exits after 1 s.
const LINGER: Duration = Duration::from_secs(1);

/// While another thread runs the engine, the supervisor looks at least every 500 ms; the thread that runs it wakes the
/// supervisor when there is something to do.
const LOOKS_EVERY: Duration = Duration::from_millis(500);

/// Serves one claim at a time; exits after 1 s idle. The claims that it serves one after the other are on whatever keys of one
/// manager.
///
/// Who runs the engine of the claim is a matter of [`Turns`]. An application thread that wants the lock, or
/// gives it back, does so itself where it can. What takes time is left to the supervisor: to pause, to watch, to renew; and
/// to connect or to wait for a caller whose deadline may come first.
pub(crate) struct Supervisor {
    pool: Arc<Pool>,
    /// How long the server may take to answer a short statement.
    heartbeat_timeout: Duration,
    /// The list on which it waits for the next claim, and from which it takes itself when it exits.
    idle: Weak<IdleSupervisors>,
    // Lock order: `turns` before `assignment`.
    assignment: Arc<AssignmentCell>,
    turns: Turns<RunnerState, PollBell>,
    /// The one that runs it.
    thread: OnceLock<ThreadId>,
}

/// The engine of the claim, and what is kept between two claims.
struct RunnerState {
    engine: Option<Engine>,
    /// A session that has kept its lease.
    slot: Option<PooledSlot>,
    /// When the last claim ended.
    ended_at: Option<Instant>,
    /// When a thread of the application last ran the engine.
    called_at: Instant,
    /// A thread of the application has opened the session, and the supervisor has not looked since.
    has_new_session: bool,
    /// The observer is to be told of the sessions when the turn is over.
    tells_of_sessions: bool,
}

/// What the thread remembers from one look to the next.
struct LoopState {
    /// The key of the claim that it served last, after which the thread is named.
    key: String,
    /// How long it naps next.
    nap: Duration,
    /// When a thread of the application had last run the engine, at the last look.
    called_at: Instant,
    /// The claim beside which it napped last.
    claim: Weak<Claim>,
}

/// What the supervisor does next.
enum Next {
    Sleep { until: Instant, watch: Option<Socket> },
    Exit,
}

impl Next {
    fn sleep(time: Duration) -> Self {
        Self::Sleep { until: Instant::now() + time, watch: None }
    }
}

impl Supervisor {
    /// Has a supervisor work on a claim: an idle one, or one that is started.
    ///
    /// # Errors
    /// When the process has no descriptor or no thread left.
    pub(crate) fn begin(
        claim: &Arc<Claim>,
        spec: &Arc<LockSpec>,
        idle: &Arc<IdleSupervisors>,
    ) -> io::Result<Arc<Self>> {
        while let Some(supervisor) = idle.take(spec.request.key) {
            if supervisor.assign(claim, spec) {
                return Ok(supervisor);
            }
        }
        Self::start(claim, spec, idle)
    }

    /// Starts the thread, with a claim to work on.
    ///
    /// # Errors
    /// When the process has no descriptor or no thread left.
    fn start(claim: &Arc<Claim>, spec: &Arc<LockSpec>, idle: &Arc<IdleSupervisors>) -> io::Result<Arc<Self>> {
        let runner = RunnerState {
            engine: None,
            slot: None,
            ended_at: None,
            called_at: Instant::now(),
            has_new_session: false,
            tells_of_sessions: false,
        };
        let supervisor = Arc::new(Self {
            pool: Arc::clone(&spec.pool),
            heartbeat_timeout: spec.plan.heartbeat_timeout,
            idle: Arc::downgrade(idle),
            assignment: Arc::new(AssignmentCell::new(Arc::clone(claim), Arc::clone(spec))),
            turns: Turns::new(runner, PollBell::new()?),
            thread: OnceLock::new(),
        });
        let assignment = Arc::downgrade(&supervisor.assignment);
        spec.pool.watchdog().watch(assignment as Weak<dyn Watched>)?;
        let body = Arc::clone(&supervisor);
        let key = claim.key().to_owned();
        thread::Builder::new().name(thread_name(&key)).spawn(move || body.run(key))?;
        Ok(supervisor)
    }

    /// Gives it another claim; `false` if it is not free for one. Nor is it for its own thread, which tells an observer something at this moment and
    /// cannot work on what that asks for.
    pub(crate) fn assign(&self, claim: &Arc<Claim>, spec: &Arc<LockSpec>) -> bool {
        self.thread.get() != Some(&thread::current().id()) && self.assignment.assign(claim, spec)
    }

    /// True if it takes another claim.
    pub(crate) fn is_free(&self) -> bool {
        self.assignment.is_free()
    }

    /// Lets the thread exit if it has no claim: the manager has stopped.
    pub(crate) fn dismiss(&self) {
        if self.assignment.close_if_free() {
            self.wake();
        }
    }

    /// Makes the thread look.
    pub(crate) fn wake(&self) {
        self.turns.wake();
    }

    // What application threads do.

    /// Runs the engine of `claim` as far as this thread may; `false` if it did nothing. Returns early when `leave` is
    /// requested.
    pub(crate) fn run_engine(
        &self,
        claim: &Claim,
        caller: CallKind,
        leave: Option<&Arc<LeaveRequest>>,
    ) -> bool {
        let Some(mut runner) = self.turns.take() else { return false };
        if leave.is_some() {
            claim.set_caller(leave.cloned());
        }
        self.take_up(&mut runner);
        let mut helped = false;
        let look_by: Option<Instant> = loop {
            // The claim may be over, and the engine another claim's.
            let Some(engine) =
                runner.engine.as_mut().filter(|engine| ptr::eq(&raw const **engine.claim(), claim))
            else {
                // The supervisor may have been turned away meanwhile, so it is to look at once.
                break runner.engine.is_some().then(Instant::now);
            };
            let action = engine.next();
            if let Action::Claim(_, claim::Action::Finish(_)) = action {
                self.finish(&mut runner);
                helped = true;
                // The supervisor gives a session that was kept to the pool then.
                break runner.slot.is_some().then(|| Instant::now() + QUICK_CLAIM);
            }
            let opens = action == Action::Session(session::Action::Open) && !engine.has_session();
            if leave.is_some_and(|leave| leave.is_made()) || !engine.prepare_for(caller, action) {
                break match action {
                    Action::Session(session::Action::Watch { until })
                    | Action::Claim(_, claim::Action::Pause { until }) => Some(engine.at(until)),
                    _ => Some(Instant::now()),
                };
            }
            runner.has_new_session |= opens;
            self.guarded(&mut runner, |engine| engine.perform(action));
            helped = true;
        };
        // To open a session takes so long that to wake the supervisor costs nothing beside it.
        let look_by = if runner.has_new_session { Some(Instant::now()) } else { look_by };
        if leave.is_some() {
            claim.set_caller(None);
        }
        if helped {
            runner.called_at = Instant::now();
        }
        let socket = runner.engine.as_ref().and_then(Engine::socket);
        let soon = if runner.has_new_session { Duration::ZERO } else { QUICK_CLAIM };
        self.turns.leave(runner, look_by, socket.as_ref(), soon);
        helped
    }

    // What the thread does.

    /// `key` is the lock that the thread is named after.
    fn run(&self, key: String) {
        /// However the thread ends, it takes no further claim, and leaves the list of idle supervisors.
        struct Closing<'a>(&'a Supervisor);
        impl Drop for Closing<'_> {
            fn drop(&mut self) {
                let claim = self.0.assignment.close();
                // The session is dropped with the engine. A caller that has the turn comes to the end by itself.
                let engine = self.0.turns.take().and_then(|mut runner| runner.engine.take());
                drop(engine);
                if let Some(claim) = claim {
                    claim.abandon();
                }
                if let Some(idle) = self.0.idle.upgrade() {
                    idle.remove(self.0);
                }
            }
        }
        let _closing = Closing(self);
        let _ = self.thread.set(thread::current().id());
        let mut state = LoopState { key, nap: SHORTEST_NAP, claim: Weak::new(), called_at: Instant::now() };
        let mut woken = Woken::Called;
        loop {
            let next = match self.turns.take_to_look() {
                Some(mut runner) => {
                    let next = self.look(&mut runner, woken, &mut state);
                    let tells = mem::take(&mut runner.tells_of_sessions);
                    drop(runner);
                    // It is free for the next claim by now, which an observer may begin.
                    if tells {
                        self.pool.tell_of_sessions();
                    }
                    next
                }
                None => self.leave_to_other(woken, &mut state),
            };
            match next {
                Next::Sleep { until, watch } => woken = self.turns.sleep(until, watch.as_ref()),
                Next::Exit => return,
            }
        }
    }

    /// Does all that is due; returns how long to sleep.
    fn look(&self, runner: &mut RunnerState, woken: Woken, state: &mut LoopState) -> Next {
        self.take_up(runner);
        if let Some(engine) = &runner.engine {
            state.serve(engine.claim());
        }
        let mut readable = woken == Woken::Readable;
        loop {
            let called_at = runner.called_at;
            if mem::take(&mut runner.has_new_session) {
                (state.nap, state.called_at) = (SHORTEST_NAP, called_at);
            }
            let Some(engine) = &mut runner.engine else { return self.idle(runner, woken, state) };
            match engine.next() {
                Action::Claim(_, claim::Action::Finish(_)) => self.finish(runner),
                Action::Session(session::Action::Pause { until } | session::Action::Watch { until })
                    if engine.is_due(until) =>
                {
                    self.guarded(runner, Engine::pass_time);
                }
                Action::Session(session::Action::Pause { .. }) if engine.claim().take_attempt_request() => {
                    self.guarded(runner, Engine::attempt_now);
                }
                Action::Claim(_, claim::Action::Pause { until }) if engine.is_due(until) => {
                    self.guarded(runner, Engine::end_pause);
                }
                Action::Session(session::Action::Pause { until }) => {
                    return Next::Sleep { until: engine.at(until), watch: None };
                }
                // What woke it may have been an answer that a caller has read meanwhile.
                Action::Session(session::Action::Watch { .. })
                | Action::Claim(_, claim::Action::Pause { .. })
                    if mem::take(&mut readable) && engine.is_readable() || engine.is_cut_off() =>
                {
                    self.guarded(runner, Engine::listen);
                }
                Action::Session(session::Action::Watch { until })
                | Action::Claim(_, claim::Action::Pause { until }) => {
                    let until = engine.at(until);
                    let is_quick = mem::replace(&mut state.called_at, called_at) != called_at;
                    if is_quick && woken == Woken::Readable {
                        return state.nap(until, QUICK_CLAIM);
                    }
                    if !is_quick {
                        state.nap = SHORTEST_NAP;
                    }
                    return Next::Sleep { until, watch: engine.socket() };
                }
                // The machines wait for a call or a release.
                Action::Session(session::Action::Serve) | Action::Claim(_, claim::Action::Wait) => {
                    return Next::sleep(LOOKS_EVERY);
                }
                action => self.guarded(runner, |engine| engine.perform(action)),
            }
        }
    }

    /// Another thread runs the engine.
    fn leave_to_other(&self, woken: Woken, state: &mut LoopState) -> Next {
        /// A caller that was cancelled has this long to end a short statement, before its session is killed.
        const SHORT_STATEMENT_WAIT: Duration = Duration::from_millis(100);
        /// A cancel request that the server does not heed within this time ends the session.
        const CANCEL_WITHIN: Duration = Duration::from_secs(1);
        /// How soon to look again.
        const AGAIN_AFTER: Duration = Duration::from_millis(5);
        let Some(claim) = self.assignment.claim() else { return Next::sleep(state.nap) };
        state.serve(&claim);
        // Where one claim follows on another, their threads count on it to look often.
        let follows =
            !ptr::eq(mem::replace(&mut state.claim, Arc::downgrade(&claim)).as_ptr(), &raw const *claim);
        let longest = if follows || woken == Woken::Readable { QUICK_CLAIM } else { LOOKS_EVERY };
        if claim.make_caller_leave(
            SHORT_STATEMENT_WAIT,
            Instant::now() + CANCEL_WITHIN.min(self.heartbeat_timeout),
        ) {
            return Next::sleep(AGAIN_AFTER);
        }
        if claim.try_caller_needs_answer() {
            claim.cancel_unasked_wait(Instant::now() + CANCEL_WITHIN.min(self.heartbeat_timeout));
            return Next::sleep(AGAIN_AFTER);
        }
        // The thread that runs the engine sees what is on the socket.
        state.nap(Instant::now() + LOOKS_EVERY, longest)
    }

    /// There is no claim: gives the session back after 20 ms, and exits after 1 s.
    fn idle(&self, runner: &mut RunnerState, woken: Woken, state: &mut LoopState) -> Next {
        let since = *runner.ended_at.get_or_insert_with(Instant::now);
        let is_over = woken == Woken::Readable && self.listen_idle(runner);
        if runner.slot.is_some()
            && (is_over || since.elapsed() >= QUICK_CLAIM || self.pool.slots().is_crowded())
        {
            self.give_back(runner);
        }
        match self.assignment.idle_step(since.elapsed() >= LINGER) {
            IdleStep::TakeUp => Next::sleep(Duration::ZERO),
            IdleStep::Wait => match runner.slot.as_mut().map(|slot| slot.socket()) {
                Some(_) if woken == Woken::Readable => state.nap(since + QUICK_CLAIM, QUICK_CLAIM),
                // Watched, so that the supervisor need not be woken for a term on it.
                Some(watch) => Next::Sleep { until: since + QUICK_CLAIM, watch },
                None => Next::Sleep { until: since + LINGER, watch: None },
            },
            IdleStep::Exit => Next::Exit,
            IdleStep::ExitNow => {
                if let Some(mut slot) = runner.slot.take() {
                    slot.close(Instant::now() + self.heartbeat_timeout);
                    drop(slot);
                    runner.tells_of_sessions = true;
                }
                Next::Exit
            }
        }
    }

    /// Takes in what the server says on the session that was kept for a next claim; `true` if the session is over.
    fn listen_idle(&self, runner: &mut RunnerState) -> bool {
        let by = Instant::now() + self.heartbeat_timeout;
        runner.slot.as_mut().and_then(|slot| slot.session()).is_some_and(|session| {
            session.is_over()
                || session.socket().is_some_and(|socket| socket.is_readable()) && session.listen(by).is_err()
        })
    }

    /// Gives the session that was kept for a next claim to the pool, without lease and name.
    fn give_back(&self, runner: &mut RunnerState) {
        let Some(mut slot) = runner.slot.take() else { return };
        let by = Instant::now() + self.heartbeat_timeout;
        if let Some(session) = slot.session()
            && session.settle(&[], by).is_err()
        {
            slot.taint();
        }
        drop(slot);
        runner.tells_of_sessions = true;
    }

    // What both do.

    /// Begins the engine of a claim that has come in.
    fn take_up(&self, runner: &mut RunnerState) {
        if runner.engine.is_some() {
            return;
        }
        let Some((claim, spec)) = self.assignment.take_up() else { return };
        let is_quick = runner.ended_at.is_some_and(|at| at.elapsed() < QUICK_CLAIM);
        runner.engine = Some(Engine::begin(&spec, claim, runner.slot.take(), is_quick));
    }

    /// Runs `run` on the engine. If it panics, the claim is over.
    fn guarded(&self, runner: &mut RunnerState, run: impl FnOnce(&mut Engine)) {
        /// Drops the engine, which ends the claim, unless it was put back.
        struct Away<'a> {
            supervisor: &'a Supervisor,
            engine: Option<Engine>,
        }
        impl Drop for Away<'_> {
            fn drop(&mut self) {
                if self.engine.is_some() {
                    // Closed first, so that no claim is assigned that nobody would watch.
                    self.supervisor.assignment.close();
                    self.supervisor.wake();
                }
            }
        }
        let mut away = Away { supervisor: self, engine: runner.engine.take() };
        if let Some(engine) = &mut away.engine {
            run(engine);
        }
        runner.engine = away.engine.take();
    }

    /// Finishes a claim whose machine has ended.
    fn finish(&self, runner: &mut RunnerState) {
        let Some(mut engine) = runner.engine.take() else { return };
        if let Action::Claim(_, claim::Action::Finish(end)) = engine.next() {
            runner.ended_at = Some(Instant::now());
            engine.finish(end, |slot| {
                runner.slot = slot;
                self.assignment.free();
            });
        }
    }
}

impl Watched for AssignmentCell {
    fn deadline(&self) -> Option<Instant> {
        self.claim()?.deadline()
    }

    fn enforce(&self) {
        if let Some(claim) = self.claim() {
            claim.enforce_deadline();
        }
    }
}

impl LoopState {
    /// A sleep without a watch, until `until` at the latest; the next one is twice as long, and at most `longest`.
    fn nap(&mut self, until: Instant, longest: Duration) -> Next {
        let nap = self.nap.min(longest);
        self.nap = (2 * nap).min(longest);
        Next::Sleep { until: until.min(Instant::now() + nap), watch: None }
    }

    /// Names the thread after the lock that it serves now, so that an operator sees which lock hangs.
    fn serve(&mut self, claim: &Claim) {
        if self.key != claim.key() {
            claim.key().clone_into(&mut self.key);
            rename_thread(&self.key);
        }
    }
}

fn thread_name(key: &str) -> String {
    format!("dsync:{}", key.replace('\0', ""))
}

/// Renames this thread for tools such as `ps`; the standard library keeps the former name.
#[cfg(target_os = "linux")]
fn rename_thread(key: &str) {
    if let Ok(name) = std::ffi::CString::new(thread_name(key)) {
        // If it fails, the thread keeps its former name.
        let _ = rustix::thread::set_name(&name);
    }
}

/// Elsewhere it keeps the name of the lock that it was started for.
#[cfg(not(target_os = "linux"))]
fn rename_thread(_: &str) {}

impl std::fmt::Debug for Supervisor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Supervisor").finish_non_exhaustive()
    }
}
