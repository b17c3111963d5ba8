//! The manager on PostgreSQL: which locks there are, and which of them are claimed.

use std::collections::HashMap;
use std::convert::Infallible;
use std::fmt;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, OnceLock, Weak};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use parking_lot::Mutex;

use super::catalog::CatalogMode;
use super::claim::Why;
use super::config::Config;
use super::inspect::{self, Named};
use super::lock::{Active, PostgresLock};
use super::pool::{Pool, Slot};
use super::refusal::Refusal;
use super::resting::Resting;
use super::stream::StreamControl;
use crate::error::{Error, ErrorKind, Result, chain};
use crate::key::Key;
use crate::lock::{Lock, LockOptions};
use crate::manager::SyncManager;
use crate::process::{Origin, drive, no_thread};
use crate::view::LockView;

/// Distributed locks on PostgreSQL advisory locks.
///
/// Each claim has a session of its own, from a pool of the manager's that is apart from the application's, and a thread
/// that acquires, watches and re-acquires. Dropping the manager [stops](SyncManager::stop) it; handles that live on
/// then fail with [`SyncManagerStopped`](ErrorKind::SyncManagerStopped).
///
/// # Threads and async code
///
/// All calls and drops work on any thread. On one that drives a tokio runtime (in `async` code, and in `spawn_blocking`),
/// or whose thread-local variables are being destroyed, threads of the library's talk to the server, which takes two
/// changes of threads longer. The calls block all the same: in `async` code use them within `spawn_blocking`, so that they
/// hold up no other task.
///
/// # Forks
///
/// A process that is forked (a daemon, a server that forks workers) inherits the manager's memory and sockets, but not its
/// threads. There every call on the manager, its locks, guards and terms fails at once with
/// [`OtherProcess`](ErrorKind::OtherProcess), [`Term::is_held`](crate::Term::is_held) is `false`, and a drop touches
/// nothing; the parent's locks are not disturbed. Make the manager *after* the fork: a daemon before its first lock, a worker
/// in its own process. Two things cannot be helped. A [`Lost`](crate::Lost) channel that was cloned before the fork stays
/// open in the child for ever, since the thread that closes it is the parent's. And the child keeps the parent's sockets open
/// until it ends or executes another program: so while a child lives on, a parent that was *killed* is not noticed by the
/// end of its connection but by the end of its lease.
///
/// Processes are told apart by their ids. A child that is process 1 of a PID namespace of its own, of a parent that is
/// process 1 too, is taken for its parent. And as with every library that has threads, fork while no other thread is in a
/// call of it: what such a thread has begun stays unfinished in the child.
///
/// ```no_run
/// use dsync::{Config, Context, Lock, LockOptions, PostgresManager, SyncManager};
///
/// let manager = PostgresManager::new(Config::from_url("postgres://app@localhost/app")?)?;
/// manager.start()?;
///
/// let lock = manager.lock("nightly-report", LockOptions::new())?;
/// lock.lock(&Context::background())?;
/// let lost = lock.lost();
/// // … work, and stop when `lost` disconnects …
/// lock.release()?;
/// # Ok::<(), dsync::Error>(())
/// ```
pub struct PostgresManager {
    core: Arc<Core>,
}

impl PostgresManager {
    /// Makes a manager. Nothing is connected before [`start`](SyncManager::start).
    ///
    /// # Errors
    /// - [`InvalidConfig`](ErrorKind::InvalidConfig): the text says which setting cannot work and why.
    /// - [`FailedInitialization`](ErrorKind::FailedInitialization): the thread of the pool could not be started.
    pub fn new(config: Config) -> Result<Self> {
        config.validate()?;
        let pool = Pool::new(&config)?;
        let state =
            Mutex::new(State { stage: Stage::New, pool: Some(Arc::new(pool)), locks: HashMap::new() });
        let origin = Origin::here();
        Ok(Self { core: Arc::new(Core { config, origin, state, resting: Arc::default() }) })
    }

    /// The lock with this key: a name, a number, or a pair of numbers. As
    /// [`lock_with_key`](SyncManager::lock_with_key).
    ///
    /// # Errors
    /// As there.
    pub fn lock(&self, key: impl Into<Key>, options: LockOptions) -> Result<Arc<dyn Lock>> {
        self.lock_with_key(key.into(), options)
    }

    /// Who holds the lock with this key, and who waits for it, in whichever process.
    ///
    /// It takes a session of the pool for one round trip, and may take as long as `connect_timeout` (three times that, if it is
    /// the manager's first session) and the heartbeat's
    /// timeout together, when the server does not answer. The same can be seen with `psql` in the views `dsync.locks` and
    /// `dsync.waiters`.
    ///
    /// ```no_run
    /// # use dsync::{PostgresManager, Result};
    /// # fn example(manager: &PostgresManager) -> Result<()> {
    /// let view = manager.inspect("nightly-report")?;
    /// if let Some(holder) = &view.holder {
    ///     println!("backend {} has it; {} wait", holder.pid, view.waiters.len());
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// - [`InvalidKey`](ErrorKind::InvalidKey), [`SyncManagerStopped`](ErrorKind::SyncManagerStopped),
    ///   [`OtherProcess`](ErrorKind::OtherProcess).
    /// - [`PoolExhausted`](ErrorKind::PoolExhausted): claims have all the sessions.
    /// - [`SessionUnavailable`](ErrorKind::SessionUnavailable), [`SessionRefused`](ErrorKind::SessionRefused).
    pub fn inspect(&self, key: impl Into<Key>) -> Result<LockView> {
        self.core.origin.check(format_args!("the manager"))?;
        let key = key.into();
        key.validate()?;
        let (pool, config) = (self.core.pool()?, &self.core.config);
        let named = Named {
            key: key.advisory(&config.namespace),
            namespace: key.namespace(&config.namespace),
            name: &key.to_string(),
        };
        let catalog = config.catalog != CatalogMode::None;
        let patience = config.lease_plan().heartbeat_timeout;
        drive(|| inspect::one(&pool, &named, catalog, patience)).map_err(no_thread)?
    }

    /// All locks of the database, of all namespaces, that are held or waited for. A key that has never been held is not
    /// among them, and neither is one that only managers without catalog use: nothing tells its name.
    ///
    /// It takes what [`inspect`](Self::inspect) takes.
    ///
    /// ```no_run
    /// # use dsync::{PostgresManager, Result};
    /// # fn example(manager: &PostgresManager) -> Result<()> {
    /// for view in manager.inspect_all()? {
    ///     println!("{}: {:?}, {} wait", view.key, view.holder, view.waiters.len());
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As `inspect`, and [`InvalidConfig`](ErrorKind::InvalidConfig) if this manager does without the catalog.
    pub fn inspect_all(&self) -> Result<Vec<LockView>> {
        self.core.origin.check(format_args!("the manager"))?;
        let (pool, config) = (self.core.pool()?, &self.core.config);
        if config.catalog == CatalogMode::None {
            let message = "the names of all locks are in the catalog, and the manager was told to do without; \
                           set the catalog to automatic, or ask for one key";
            return Err(Error::new(ErrorKind::InvalidConfig, message));
        }
        drive(|| inspect::all(&pool, config.lease_plan().heartbeat_timeout)).map_err(no_thread)?
    }
}

impl SyncManager for PostgresManager {
    /// Begins the manager's work, after a look at the server.
    ///
    /// A server that cannot be reached now, or has no free connection, is no failure: a warning is logged, and claims keep
    /// trying. Blocks for three times `connect_timeout` at the most: to open two sessions, to check the server by them, and to
    /// look for the catalog or make it.
    /// While another thread is in `start`, this call waits for it and gives the same outcome.
    ///
    /// # Errors
    /// - [`FailedInitialization`](ErrorKind::FailedInitialization): the server refuses us, or cannot keep locks: a
    ///   transaction pooler, a hot standby, a version before 14. An error of the server that is not known to be temporary counts as a refusal.
    ///   The source says which.
    /// - [`SyncManagerStopped`](ErrorKind::SyncManagerStopped): at once, if [`stop`](SyncManager::stop) comes meanwhile.
    /// - [`OtherProcess`](ErrorKind::OtherProcess): the manager was made before a `fork`.
    fn start(&self) -> Result<()> {
        self.core.origin.check(format_args!("the manager"))?;
        let (pool, start, under_way) = {
            let mut state = self.core.state.lock();
            match (&state.stage, &state.pool) {
                (Stage::Stopped, _) | (_, None) => return Err(Error::stopped()),
                (Stage::Running, _) => return Ok(()),
                (Stage::Starting(start), Some(pool)) => {
                    let (start, by) = (Arc::clone(start), Instant::now() + pool.takes_at_most());
                    drop(state);
                    return start.wait(by);
                }
                (Stage::New, Some(pool)) => {
                    let (pool, (start, under_way)) = (Arc::clone(pool), Start::new());
                    state.stage = Stage::Starting(Arc::clone(&start));
                    (pool, start, under_way)
                }
            }
        };
        let _ending = EndOfStart { core: &self.core, start: &start, _under_way: under_way };
        let look = || pool.open(&mut pool.take()? as &mut Slot, &start.control);
        let refusal = match drive(look) {
            Ok(outcome) => outcome.err(),
            Err(error) => Some(Refusal::system(no_thread(error))),
        };
        // The session, which a stop that waits for this wants to be over, is closed or in the pool.
        drop(pool);
        let outcome = match refusal {
            None => Ok(()),
            // The claims of other threads were faster.
            Some(refusal) if refusal.is_about_slots() => Ok(()),
            Some(refusal) if refusal.is_curable() => {
                let error = refusal.into_error();
                if !self.core.is_stopped() {
                    log::warn!(
                        "the lock server cannot be reached yet; locks will wait for it: {}",
                        chain(&error)
                    );
                }
                Ok(())
            }
            Some(refusal) => {
                let error = refusal.into_error();
                Err(Error::new(ErrorKind::FailedInitialization, error.to_string()).with_source(error))
            }
        };
        let outcome = if self.core.is_stopped() { Err(Error::stopped()) } else { outcome };
        start.outcome.get_or_init(|| outcome).clone()
    }

    fn stop(&self) -> Result<()> {
        self.core.origin.check(format_args!("the manager"))?;
        // Without a thread it is done on this one, step by step, by the threads of the claims.
        drive(|| self.core.stop()).unwrap_or_else(|_| self.core.stop())
    }

    fn lock_with_key(&self, key: Key, options: LockOptions) -> Result<Arc<dyn Lock>> {
        self.core.origin.check(format_args!("the manager"))?;
        key.validate()?;
        let lock = self.core.lock(key, options)?;
        Ok(lock)
    }
}

impl Drop for PostgresManager {
    fn drop(&mut self) {
        if !self.core.origin.is_here() {
            // Its threads are the parent's, its mutexes may be locked for ever: it is left as it is.
            std::mem::forget(Arc::clone(&self.core));
        } else if let Err(error) = self.stop() {
            log::warn!("stopping the lock manager: {}", chain(&error));
        }
    }
}

impl fmt::Debug for PostgresManager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.core.origin.is_here() {
            return write!(f, "PostgresManager(of process {})", self.core.origin);
        }
        let state = self.core.state.lock();
        f.debug_struct("PostgresManager")
            .field("stage", &state.stage)
            .field("locks", &state.locks.len())
            .field("resting", &self.core.resting.len())
            .field("pool", &state.pool)
            .finish()
    }
}

/// What a manager's handles share; it outlives the manager where they do.
pub(super) struct Core {
    config: Config,
    origin: Origin,
    state: Mutex<State>,
    resting: Arc<Resting>,
}

struct State {
    stage: Stage,
    /// `None` once stopped.
    pool: Option<Arc<Pool>>,
    locks: HashMap<Key, Entry>,
}

#[derive(Debug)]
enum Stage {
    New,
    /// The first look at the server is under way. Claims need not wait for it.
    Starting(Arc<Start>),
    Running,
    Stopped,
}

/// A call of `start` that is under way.
struct Start {
    /// Ends it.
    control: StreamControl,
    /// What came of it, for all who called meanwhile; nothing if it panicked.
    outcome: OnceLock<Result<()>>,
    /// Disconnects when it is over.
    over: Receiver<Infallible>,
}

impl Start {
    /// And what is dropped at its end.
    fn new() -> (Arc<Self>, Sender<Infallible>) {
        let (under_way, over) = bounded(0);
        (Arc::new(Self { control: StreamControl::new(), outcome: OnceLock::new(), over }), under_way)
    }

    /// Waits for its end, and gives its outcome.
    fn wait(&self, by: Instant) -> Result<()> {
        // A little later, so that a call that takes all its time still has the word.
        const GRACE: Duration = Duration::from_secs(1);
        let _ = self.over.recv_deadline(by + GRACE);
        self.outcome.get().cloned().unwrap_or_else(|| {
            let message = "another thread's start(), which this one waited for, came to no end; see its log";
            Err(Error::new(ErrorKind::FailedInitialization, message))
        })
    }
}

impl fmt::Debug for Start {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Start")
    }
}

/// Ends a call of `start`, also one that panics.
struct EndOfStart<'a> {
    core: &'a Core,
    start: &'a Start,
    /// Dropped after the rest, which wakes those who wait.
    _under_way: Sender<Infallible>,
}

impl Drop for EndOfStart<'_> {
    fn drop(&mut self) {
        let mut state = self.core.state.lock();
        // A stop in between stays a stop.
        if let Stage::Starting(_) = state.stage {
            let started = matches!(self.start.outcome.get(), Some(Ok(())));
            state.stage = if started { Stage::Running } else { Stage::New };
        }
    }
}

/// A lock that somebody has a handle of, or that is claimed, or both.
struct Entry {
    handle: Weak<PostgresLock>,
    /// Keeps the lock while it is claimed.
    claimed: Option<Arc<PostgresLock>>,
}

/// A claim that ends since the manager stops.
struct Stopping {
    lock: Arc<PostgresLock>,
    active: Active,
    /// Whether the stop was the first to end it.
    first: bool,
}

impl Core {
    pub(super) fn config(&self) -> &Config {
        &self.config
    }

    /// The process that made the manager.
    pub(super) fn origin(&self) -> Origin {
        self.origin
    }

    /// The supervisors without a claim.
    pub(super) fn resting(&self) -> &Arc<Resting> {
        &self.resting
    }

    /// When a release that begins now must be over.
    pub(super) fn release_by(&self) -> Instant {
        Instant::now() + self.config.release_timeout
    }

    /// When an attempt at a lock that begins now must be over.
    pub(super) fn attempt_by(&self) -> Instant {
        Instant::now() + self.config.connect_time() + self.config.lease_plan().heartbeat_timeout
    }

    /// The pool, for a claim that begins now.
    pub(super) fn pool(&self) -> Result<Arc<Pool>> {
        let state = self.state.lock();
        match (&state.stage, &state.pool) {
            (Stage::Running | Stage::Starting(_), Some(pool)) => Ok(Arc::clone(pool)),
            (Stage::New, _) => Err(Error::not_started()),
            _ => Err(Error::stopped()),
        }
    }

    pub(super) fn is_stopped(&self) -> bool {
        matches!(self.state.lock().stage, Stage::Stopped)
    }

    /// The one handle for `key`.
    fn lock(self: &Arc<Self>, key: Key, options: LockOptions) -> Result<Arc<PostgresLock>> {
        let mut state = self.state.lock();
        if let Stage::Stopped = state.stage {
            return Err(Error::stopped());
        }
        if let Some(lock) = state.locks.get(&key).and_then(|entry| entry.handle.upgrade()) {
            return Ok(lock);
        }
        let lock = PostgresLock::new(key.clone(), options, Arc::clone(self));
        state.locks.insert(key, Entry { handle: Arc::downgrade(&lock), claimed: None });
        Ok(lock)
    }

    /// Keeps `lock` while it is claimed; `false` if the manager has stopped.
    pub(super) fn keep(&self, key: &Key, lock: Arc<PostgresLock>) -> bool {
        let mut state = self.state.lock();
        if !matches!(state.stage, Stage::Running | Stage::Starting(_)) {
            return false;
        }
        if let Some(entry) = state.locks.get_mut(key) {
            entry.claimed = Some(lock);
        }
        true
    }

    /// The claim on `key` is over. The caller drops what it gets, outside of any mutex.
    pub(super) fn let_go(&self, key: &Key) -> Option<Arc<PostgresLock>> {
        self.state.lock().locks.get_mut(key)?.claimed.take()
    }

    /// A handle is gone. Its entry goes too, unless there is a new handle for the key.
    pub(super) fn forget(&self, key: &Key) {
        let mut state = self.state.lock();
        if state.locks.get(key).is_some_and(|entry| entry.handle.strong_count() == 0) {
            state.locks.remove(key);
            // A service that used a million keys once must not keep room for them for ever.
            if state.locks.len() < state.locks.capacity() / 4 {
                state.locks.shrink_to_fit();
            }
        }
    }

    /// Ends all claims, and then the pool.
    fn stop(&self) -> Result<()> {
        let by = self.release_by();
        let (former, pool, claimed, known) = {
            let mut state = self.state.lock();
            let former = std::mem::replace(&mut state.stage, Stage::Stopped);
            let claimed: Vec<_> = state.locks.values().filter_map(|entry| entry.claimed.clone()).collect();
            let known: Vec<_> = state.locks.values().filter_map(|entry| entry.handle.upgrade()).collect();
            (former, state.pool.take(), claimed, known)
        };
        if let Stage::Starting(start) = &former {
            start.control.kill();
        }
        // First all are told, so that no holder hears of the end late because a waiter's cancel request takes its time.
        let claims: Vec<_> = claimed
            .into_iter()
            .filter_map(|lock| {
                let (first, active) = lock.end(Why::Stopped, by)?;
                Some(Stopping { lock, active, first })
            })
            .collect();
        self.resting.close();
        let next = AtomicUsize::new(0);
        by_many_hands(claims.len(), || {
            while let Some(stopping) = claims.get(next.fetch_add(1, Relaxed)) {
                if stopping.first {
                    PostgresLock::give_back(&stopping.active, by);
                }
                if stopping.active.claim.is_over() {
                    // Lets the supervisor go before it waits for a next claim.
                    stopping.lock.forget(&stopping.active.claim);
                }
            }
        });
        // Not before: the server is busy with each session that ends, and the last locks would wait for it.
        let close_idle = || {
            if let Some(pool) = &pool {
                by_many_hands(pool.idle(), || pool.close_idle(by));
            }
        };
        close_idle();
        let mut outcome = Ok(());
        for Stopping { lock, active, .. } in &claims {
            outcome = outcome.and(active.claim.wait_ended(by));
            lock.forget(&active.claim);
        }
        known.iter().for_each(|lock| lock.leave_pool());
        if let Stage::Starting(start) = &former {
            let _ = start.over.recv_deadline(by);
        }
        // What came back meanwhile: of claims that waited, or that others had ended.
        close_idle();
        if let Some(pool) = pool {
            pool.watchdog().close();
        }
        outcome
    }
}

/// Runs `work` on as many threads as there are `pieces`, up to a limit: to give a lock back takes a round trip, and to end a
/// wait a cancel request, which is a connection of its own.
fn by_many_hands(pieces: usize, work: impl Fn() + Sync) {
    const AT_ONCE: usize = 32;
    if pieces == 0 {
        return;
    }
    thread::scope(|scope| {
        for _ in 1..pieces.min(AT_ONCE) {
            // Without a thread to spare it is done by fewer.
            if thread::Builder::new().spawn_scoped(scope, &work).is_err() {
                break;
            }
        }
        work();
    });
}

impl fmt::Debug for Core {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Core").field("config", &self.config).finish_non_exhaustive()
    }
}
