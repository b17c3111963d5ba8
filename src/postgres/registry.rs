//! Which locks a manager has, which of them are claimed, and how all of them end when it stops.

use std::collections::HashMap;
use std::convert::Infallible;
use std::fmt;
use std::io;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use parking_lot::Mutex;

use crate::check::{CheckLine, CheckReport};
use crate::error::{Error, ErrorKind, Result, chain};
use crate::key::{AdvisoryKey, HandleKey, Key};
use crate::lock::{Lock as _, LockOptions};
use crate::pg::active_claim::ActiveClaim;
use crate::pg::carrier::carrier::Carrier;
use crate::pg::carrier::dedicated::DedicatedQuota;
use crate::pg::check;
use crate::pg::claim::idle::IdleSupervisors;
use crate::pg::claim::status::EndReason;
use crate::pg::config::{CatalogMode, Config};
use crate::pg::handle::PostgresLock;
use crate::pg::inspect::{self, Named};
use crate::pg::pool::Pool;
use crate::pg::pool::Slot;
use crate::pg::session::refusal::Refusal;
use crate::pg::stream::StreamControl;
use crate::process::{Origin, drive, in_parallel, no_thread};
use crate::snapshot::Snapshot;
use crate::telling::Observing;
use crate::view::LockView;

/// What a manager's handles share; it outlives the manager where they do.
pub(crate) struct Registry {
    config: Config,
    origin: Origin,
    /// The manager's observer.
    observing: Option<Arc<Observing>>,
    state: Mutex<State>,
    idle: Arc<IdleSupervisors>,
    /// Those that have been needed so far, of as many as there may be. Taken under no other mutex but that of a handle.
    carriers: Mutex<Vec<Option<Arc<Carrier>>>>,
    /// How many claims of theirs may go on with sessions of their own.
    dedicated: Arc<DedicatedQuota>,
}

struct State {
    stage: Stage,
    /// `None` once stopped.
    pool: Option<Arc<Pool>>,
    locks: HashMap<HandleKey, Entry>,
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
    /// A call that begins, and the sender that is dropped at its end.
    fn new() -> (Arc<Self>, Sender<Infallible>) {
        let (under_way, over) = bounded(0);
        (Arc::new(Self { control: StreamControl::new(), outcome: OnceLock::new(), over }), under_way)
    }

    /// Waits for its end, and gives its outcome.
    fn wait(&self, by: Instant) -> Result<()> {
        // A little longer, so that a call that takes all its time can still leave its outcome.
        const EXTRA_WAIT: Duration = Duration::from_secs(1);
        let _ = self.over.recv_deadline(by + EXTRA_WAIT);
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
struct StartGuard<'a> {
    registry: &'a Registry,
    start: &'a Start,
    /// Dropped after the rest, which wakes those who wait.
    _under_way: Sender<Infallible>,
}

impl Drop for StartGuard<'_> {
    fn drop(&mut self) {
        let mut state = self.registry.state.lock();
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
    active: ActiveClaim,
    /// Whether the stop was the first to end it.
    first: bool,
}

impl Registry {
    pub(crate) fn new(config: Config) -> Result<Arc<Self>> {
        config.validate()?;
        let observing = config.observer.as_ref().map(|observer| Observing::new(Arc::clone(observer)));
        let pool = Arc::new(Pool::new(&config, observing.clone())?);
        let state = Mutex::new(State { stage: Stage::New, pool: Some(pool), locks: HashMap::new() });
        let own_sessions = config.max_sessions.saturating_sub(config.shared_sessions.max(1));
        let dedicated = DedicatedQuota::new(usize::try_from(own_sessions).unwrap_or(usize::MAX));
        Ok(Arc::new(Self {
            config,
            origin: Origin::here(),
            observing,
            state,
            idle: Arc::default(),
            carriers: Mutex::default(),
            dedicated,
        }))
    }

    /// Looks at the server: see [`PostgresManager`](crate::PostgresManager).
    pub(crate) fn start(&self) -> Result<()> {
        let (pool, start, under_way) = {
            let mut state = self.state.lock();
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
        let ending = StartGuard { registry: self, start: &start, _under_way: under_way };
        let look = || pool.open(&mut pool.slots().take(true)? as &mut Slot, &start.control);
        let refusal = match drive(look) {
            Ok(outcome) => outcome.err(),
            Err(error) => Some(Refusal::system(no_thread(error))),
        };
        // The session, which a stop that waits for this wants to be over, is closed or in the pool.
        pool.tell_of_sessions();
        drop(pool);
        let mut trouble = None;
        let outcome = match refusal {
            None => Ok(()),
            // The claims of other threads were faster.
            Some(refusal) if refusal.is_about_slots() => Ok(()),
            Some(refusal) if refusal.is_curable() => {
                trouble = Some(refusal.into_error());
                Ok(())
            }
            Some(refusal) => {
                let error = refusal.into_error();
                Err(Error::new(ErrorKind::FailedInitialization, error.to_string()).with_source(error))
            }
        };
        let outcome = if self.is_stopped() { Err(Error::stopped()) } else { outcome };
        let outcome = start.outcome.get_or_init(|| outcome).clone();
        // Others that start or stop the manager are not to wait for the logger, which may block.
        drop(ending);
        if let (Ok(()), Some(error)) = (&outcome, trouble) {
            log::warn!("the lock server cannot be reached yet; locks will wait for it: {}", chain(&error));
        }
        outcome
    }

    /// The state, for a `Debug` text.
    pub(crate) fn describe(&self, f: &mut fmt::DebugStruct<'_, '_>) -> fmt::Result {
        // It has a mutex that comes before that of the state.
        let idle = self.idle.len();
        let state = self.state.lock();
        f.field("stage", &state.stage)
            .field("locks", &state.locks.len())
            .field("idle_supervisors", &idle)
            .field("pool", &state.pool)
            .finish()
    }

    /// How the manager and its claims stand.
    pub(crate) fn snapshot(&self) -> Snapshot {
        let (is_running, pool, claimed) = {
            let state = self.state.lock();
            let claimed: Vec<_> = state.locks.values().filter_map(|entry| entry.claimed.clone()).collect();
            (matches!(state.stage, Stage::Starting(_) | Stage::Running), state.pool.clone(), claimed)
        };
        // Not under the mutex: one of the locks may be gone by now but for this.
        let mut claims: Vec<_> = claimed.iter().flat_map(|lock| lock.snapshots()).collect();
        claims.sort_by(|a, b| a.key.cmp(&b.key));
        let sessions = pool.map(|pool| pool.slots().usage());
        Snapshot { is_running, claims, sessions, idle_supervisors: self.idle.len() }
    }

    /// The manager's observer.
    pub(crate) fn observing(&self) -> Option<&Arc<Observing>> {
        self.observing.as_ref()
    }

    pub(crate) fn config(&self) -> &Config {
        &self.config
    }

    /// The process that made the manager.
    pub(crate) fn origin(&self) -> Origin {
        self.origin
    }

    /// The supervisors without a claim.
    pub(crate) fn idle(&self) -> &Arc<IdleSupervisors> {
        &self.idle
    }

    /// The carrier that has the lock with this number.
    ///
    /// # Errors
    /// When the process has no descriptor left.
    pub(crate) fn carrier(&self, number: AdvisoryKey, pool: &Arc<Pool>) -> io::Result<Arc<Carrier>> {
        let config = &self.config;
        let count = usize::try_from(config.shared_sessions.max(1)).unwrap_or(usize::MAX);
        let mut carriers = self.carriers.lock();
        carriers.resize(count, None);
        let place = &mut carriers[Carrier::place_of(number, count)];
        if let Some(carrier) = place {
            return Ok(Arc::clone(carrier));
        }
        let carrier = Carrier::new(
            Arc::clone(pool),
            config.lease_plan(),
            &self.idle,
            &self.dedicated,
            config.own_name(),
        )?;
        *place = Some(Arc::clone(&carrier));
        Ok(carrier)
    }

    /// When a release that begins now must be over.
    pub(crate) fn release_by(&self) -> Instant {
        Instant::now() + self.config.release_timeout
    }

    /// When an attempt at a lock that begins now must be over.
    pub(crate) fn attempt_by(&self) -> Instant {
        Instant::now() + self.config.connect_time() + self.config.lease_plan().heartbeat_timeout
    }

    /// The pool, for a claim that begins now.
    pub(crate) fn pool(&self) -> Result<Arc<Pool>> {
        let state = self.state.lock();
        match (&state.stage, &state.pool) {
            (Stage::Running | Stage::Starting(_), Some(pool)) => Ok(Arc::clone(pool)),
            (Stage::New, _) => Err(Error::not_started()),
            _ => Err(Error::stopped()),
        }
    }

    /// The view of the lock with this key; of the semaphore, where nobody has the lock or waits for it.
    pub(crate) fn inspect(&self, key: &Key) -> Result<LockView> {
        let text = key.to_string();
        match self.config.catalog {
            CatalogMode::None => self.ask(|pool| inspect::one(pool, &self.named(key, &text), false)),
            _ => {
                let semaphore = key.semaphore(&self.config.namespace);
                self.ask(|pool| inspect::either(pool, &self.named(key, &text), semaphore))
            }
        }
    }

    /// The key, of which `text` is the text, as the catalog knows it.
    fn named<'a>(&'a self, key: &'a Key, text: &'a str) -> Named<'a> {
        let namespace = &self.config.namespace;
        Named { key: key.advisory(namespace), namespace: key.namespace(namespace), name: text }
    }

    /// Asks the server something on a session of the pool. A manager that was not started can ask as well, since it takes no locks.
    pub(crate) fn ask<T: Send>(&self, question: impl FnOnce(&Pool) -> Result<T> + Send) -> Result<T> {
        let pool = self.state.lock().pool.clone().ok_or_else(Error::stopped)?;
        let answer = drive(|| question(&pool));
        pool.tell_of_sessions();
        answer.map_err(no_thread)?
    }

    /// Looks at the server for a report: see [`PostgresManager::check`](crate::PostgresManager::check).
    pub(crate) fn check(&self) -> CheckReport {
        let Some(pool) = self.state.lock().pool.clone() else {
            return CheckReport::of(CheckLine::from_error("manager", &Error::stopped()));
        };
        let report = drive(|| check::check(&pool, &self.config));
        report.unwrap_or_else(|error| CheckReport::of(CheckLine::from_error("manager", &no_thread(error))))
    }

    pub(crate) fn is_stopped(&self) -> bool {
        matches!(self.state.lock().stage, Stage::Stopped)
    }

    /// The one handle for `key`, and for the way that `options` say.
    pub(crate) fn lock(self: &Arc<Self>, key: Key, options: LockOptions) -> Result<Arc<PostgresLock>> {
        let key = HandleKey { key, mode: options.mode };
        let mut state = self.state.lock();
        if let Stage::Stopped = state.stage {
            return Err(Error::stopped());
        }
        let known = state.locks.get(&key).and_then(|entry| entry.handle.upgrade());
        if let Some(lock) = known {
            // A handle that is dropped forgets itself under this mutex.
            drop(state);
            options.check_permits(lock.options(), lock.key())?;
            return Ok(lock);
        }
        let lock = PostgresLock::new(key.clone(), options, Arc::clone(self));
        state.locks.insert(key, Entry { handle: Arc::downgrade(&lock), claimed: None });
        Ok(lock)
    }

    /// The lock with this key, if it is claimed.
    pub(crate) fn claimed(&self, key: &HandleKey) -> Option<Arc<PostgresLock>> {
        self.state.lock().locks.get(key)?.claimed.clone()
    }

    /// Keeps `lock` while it is claimed; `false` if the manager has stopped.
    pub(crate) fn keep(&self, key: &HandleKey, lock: Arc<PostgresLock>) -> bool {
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
    pub(crate) fn let_go(&self, key: &HandleKey) -> Option<Arc<PostgresLock>> {
        self.state.lock().locks.get_mut(key)?.claimed.take()
    }

    /// A handle is gone. Its entry goes too, unless there is a new handle for the key.
    pub(crate) fn forget(&self, key: &HandleKey) {
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
    pub(crate) fn stop(&self) -> Result<()> {
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
            .flat_map(|lock| {
                let ended = lock.end(EndReason::Stopped, by).into_iter();
                ended.map(move |(first, active)| Stopping { lock: Arc::clone(&lock), active, first })
            })
            .collect();
        self.idle.close();
        let next = AtomicUsize::new(0);
        in_parallel(claims.len(), || {
            while let Some(stopping) = claims.get(next.fetch_add(1, Relaxed)) {
                if stopping.first {
                    stopping.active.give_back(by);
                }
                if stopping.active.claim.is_over() {
                    // Lets the supervisor go before it waits for a next claim.
                    stopping.lock.forget(&stopping.active.claim);
                }
            }
        });
        // Not before: a claim that had begun when the stop came may have had one made since.
        let carriers = std::mem::take(&mut *self.carriers.lock());
        carriers.iter().flatten().for_each(|carrier| carrier.stop());
        // Not before: the server is busy with each session that ends, and the last locks would wait for it.
        let close_idle = || {
            if let Some(pool) = &pool {
                in_parallel(pool.slots().idle(), || pool.close_idle(by));
            }
        };
        close_idle();
        let mut outcome = Ok(());
        for Stopping { lock, active, .. } in &claims {
            outcome = outcome.and(active.claim.wait_ended(by));
            lock.forget(&active.claim);
        }
        known.iter().for_each(|lock| lock.leave_pool());
        carriers.iter().flatten().for_each(|carrier| carrier.wait_over(by));
        if let Stage::Starting(start) = &former {
            let _ = start.over.recv_deadline(by);
        }
        // What came back meanwhile: of claims that waited, or that others had ended.
        close_idle();
        if let Some(pool) = pool {
            pool.tell_of_sessions();
            pool.watchdog().close();
        }
        outcome
    }
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registry").field("config", &self.config).finish_non_exhaustive()
    }
}
