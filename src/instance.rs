//! The process-wide manager, for applications that want one without carrying it about.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, OnceLock};
use std::thread::{self, ThreadId};

use parking_lot::{Mutex, MutexGuard};

use crate::error::{Error, ErrorKind, Result, chain};
use crate::key::Key;
use crate::leadership::Campaign;
use crate::lock::{Lock, LockOptions};
use crate::manager::SyncManager;
use crate::pg::{Config, PostgresManager};
use crate::process::PerProcess;

static INSTANCE: PerProcess<Mutex<Stage>> = PerProcess::new();

/// The stage of this process. No code of an application's, a manager's above all, runs under this mutex.
fn stage() -> MutexGuard<'static, Stage> {
    let stage =
        INSTANCE.get(|inherited| Mutex::new(if inherited { Stage::After(INHERITED) } else { Stage::Before }));
    stage.lock()
}

/// ```text
///               init            it succeeds              shutdown           it is done
/// Before, After ────► Starting ─────────────► Running ─────────────► Stopping ───────► After
///                       │ │                                             ▲                ▲
///                       │ └────────────────── shutdown ─────────────────┘                │
///                       └──────────────────── it fails ──────────────────────────────────┘
/// ```
enum Stage {
    Before,
    Starting {
        manager: Arc<dyn SyncManager>,
        init: Arc<Call>,
    },
    Running(Instance),
    Stopping(Arc<Call>),
    /// There is no manager any more, and why.
    After(&'static str),
}

const SHUT_DOWN: &str = "the process-wide manager was shut down; its locks cannot be used any more";
const INHERITED: &str = "the process-wide manager belongs to the process from which this one was forked; call init() here, after \
                         the fork";
const FAILED: &str =
    "init() failed, so there is no process-wide manager; repair what its error names, and call it again";

struct Instance {
    manager: Arc<dyn SyncManager>,
    campaign: Option<Campaign>,
}

/// A call that is under way, for those who wait for its end.
struct Call {
    /// Who must not wait for it: its logger or its manager, which are the application's, may come back here.
    thread: ThreadId,
    outcome: OnceLock<Result<()>>,
}

impl Call {
    fn new() -> Arc<Self> {
        Arc::new(Self { thread: thread::current().id(), outcome: OnceLock::new() })
    }

    /// Waits for its end, and gives its outcome.
    fn wait(&self) -> Result<()> {
        if self.thread == thread::current().id() {
            return Ok(());
        }
        self.outcome.wait().clone()
    }
}

/// Ends a call, also one that panics: the next stage is there, and nobody waits for it any more.
struct Ending<'a> {
    call: &'a Arc<Call>,
    outcome: Result<()>,
    /// Why there is no manager if nobody has gone on to another stage meanwhile.
    why: &'static str,
}

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        let former = {
            let mut stage = stage();
            stage.is_of(self.call).then(|| std::mem::replace(&mut *stage, Stage::After(self.why)))
        };
        // It may be the last owner of the manager.
        drop(former);
        let _ = self.call.outcome.set(self.outcome.clone());
    }
}

impl Stage {
    /// Whether it is that of this call.
    fn is_of(&self, call: &Arc<Call>) -> bool {
        match self {
            Self::Starting { init, .. } => Arc::ptr_eq(init, call),
            Self::Stopping(shutdown) => Arc::ptr_eq(shutdown, call),
            Self::Before | Self::Running(_) | Self::After(_) => false,
        }
    }
}

/// Makes and starts the process-wide manager, and, where the configuration names a service, stands for its leadership.
///
/// For a configuration from the environment: `dsync::init(dsync::Config::from_env()?)`. Blocks for as long as
/// [`SyncManager::start`] at the most: about three times the configuration's `connect_timeout`.
///
/// # Errors
/// - [`InvalidConfig`](ErrorKind::InvalidConfig).
/// - [`FailedInitialization`](ErrorKind::FailedInitialization): the server refuses us, or the process-wide manager
///   exists already, or another thread is making it or shutting it down.
/// - [`SyncManagerStopped`](ErrorKind::SyncManagerStopped): another thread called [`shutdown`] meanwhile.
///
/// ```no_run
/// use dsync::{Config, Context, Lock, LockOptions};
///
/// dsync::init(Config::from_env()?.service("billing"))?;
///
/// if dsync::leadership_lock()?.try_lock(&Context::background()).is_ok() {
///     // do what a leader should do
/// }
/// let lock = dsync::lock_with_key("invoice-run", LockOptions::new())?;
/// # drop(lock);
///
/// dsync::shutdown()?;
/// # Ok::<(), dsync::Error>(())
/// ```
pub fn init(config: Config) -> Result<()> {
    let (service, build) = (config.service.clone(), config.build.clone());
    match PostgresManager::new(config) {
        Ok(manager) => init_with(Arc::new(manager), service.as_deref(), build.as_deref()),
        Err(error) => {
            let mut stage = stage();
            if let Stage::Before = *stage {
                *stage = Stage::After(FAILED);
            }
            Err(error)
        }
    }
}

/// Like [`init`], with a manager of any kind; for tests of an application, a
/// [`MemoryManager`](crate::MemoryManager).
///
/// # Errors
/// As [`init`].
///
/// ```
/// use std::sync::Arc;
/// use dsync::{Context, Lock, MemoryManager};
///
/// dsync::init_with(Arc::new(MemoryManager::new()), Some("billing"), None)?;
/// assert_eq!(dsync::leadership_lock()?.key(), "service/billing/leadership");
/// dsync::shutdown()?;
/// # Ok::<(), dsync::Error>(())
/// ```
pub fn init_with(manager: Arc<dyn SyncManager>, service: Option<&str>, build: Option<&str>) -> Result<()> {
    let call = Call::new();
    {
        let mut stage = stage();
        let obstacle = match *stage {
            Stage::Before | Stage::After(_) => None,
            Stage::Running(_) => {
                Some("the process-wide manager exists already; call init() once, or shutdown() before")
            }
            Stage::Starting { .. } => Some("another thread is in init() already; call it once"),
            Stage::Stopping(_) => {
                Some("the former process-wide manager is being shut down; wait for shutdown() to return")
            }
        };
        if let Some(message) = obstacle {
            return Err(Error::new(ErrorKind::FailedInitialization, message));
        }
        *stage = Stage::Starting { manager: Arc::clone(&manager), init: Arc::clone(&call) };
    }
    // Whoever waits for this call does so in shutdown(), whose own outcome counts.
    let _ending = Ending { call: &call, outcome: Ok(()), why: FAILED };
    let outcome = start(manager, service, build);
    let outcome = {
        let mut stage = stage();
        match outcome {
            Ok(instance) if stage.is_of(&call) => {
                *stage = Stage::Running(instance);
                return Ok(());
            }
            Err(error) if stage.is_of(&call) => return Err(error),
            outcome => outcome,
        }
    };
    let error = Error::new(ErrorKind::SyncManagerStopped, "shutdown() was called while init() was at work");
    match outcome {
        // A manager that was stopped before it had started, or while it did, must not run now.
        Ok(Instance { manager, campaign }) => {
            stop(&*manager);
            drop(campaign);
            Err(error)
        }
        Err(cause) if cause.kind() == ErrorKind::SyncManagerStopped => Err(error),
        Err(cause) => Err(error.with_source(cause)),
    }
}

fn start(manager: Arc<dyn SyncManager>, service: Option<&str>, build: Option<&str>) -> Result<Instance> {
    manager.start()?;
    // The manager may be an application's; if it panics, what it has begun is ended all the same.
    let stand = || service.map(|service| Campaign::start(&*manager, service, build)).transpose();
    match catch_unwind(AssertUnwindSafe(stand)) {
        Ok(Ok(campaign)) => Ok(Instance { manager, campaign }),
        Ok(Err(error)) => {
            stop(&*manager);
            Err(error)
        }
        Err(panic) => {
            stop(&*manager);
            resume_unwind(panic)
        }
    }
}

/// Stops a manager whose failure to do so is no news for the caller.
fn stop(manager: &dyn SyncManager) {
    if let Err(error) = manager.stop() {
        log::warn!("stopping the lock manager: {}", chain(&error));
    }
}

/// Releases all locks of the process-wide manager, and stops it.
///
/// Without one nothing happens. While another thread is in [`init`], that is ended: `init` fails, and nothing runs when both
/// have returned. While another thread is in `shutdown`, this call waits for it and gives the same outcome.
///
/// Returns within the manager's release timeout, and a second in which the thread that logs the leadership ends.
///
/// # Errors
/// As [`SyncManager::stop`]; the manager has stopped all the same.
pub fn shutdown() -> Result<()> {
    let call = Call::new();
    let before = {
        let mut stage = stage();
        match &*stage {
            Stage::Before | Stage::After(_) => return Ok(()),
            Stage::Stopping(other) => {
                let other = Arc::clone(other);
                drop(stage);
                return other.wait();
            }
            Stage::Starting { .. } | Stage::Running(_) => {
                std::mem::replace(&mut *stage, Stage::Stopping(Arc::clone(&call)))
            }
        }
    };
    let mut ending = Ending { call: &call, outcome: Ok(()), why: SHUT_DOWN };
    ending.outcome = match before {
        Stage::Running(Instance { manager, campaign }) => {
            let outcome = manager.stop();
            drop(campaign);
            outcome
        }
        Stage::Starting { manager, init } => {
            let outcome = manager.stop();
            // It finds the stage changed, and stops what it has started since.
            outcome.and(init.wait())
        }
        Stage::Before | Stage::Stopping(_) | Stage::After(_) => Ok(()),
    };
    ending.outcome.clone()
}

/// The process-wide manager.
///
/// # Errors
/// - [`SyncManagerStopped`](ErrorKind::SyncManagerStopped) before the first [`init`], after [`shutdown`], after an [`init`] that
///   failed, and while another thread is in either.
/// - [`OtherProcess`](ErrorKind::OtherProcess) in a process that was forked after [`init`], until it calls that itself.
pub fn instance() -> Result<Arc<dyn SyncManager>> {
    if let Stage::Before = *stage() {
        let message = "dsync::init() was never called in this process; call it first";
        return Err(Error::new(ErrorKind::SyncManagerStopped, message));
    }
    running("instance", |instance| Arc::clone(&instance.manager))
}

/// The lock with this key of the process-wide manager; see [`SyncManager::lock_with_key`].
///
/// # Errors
/// - [`InvalidKey`](ErrorKind::InvalidKey).
/// - [`SyncManagerStopped`](ErrorKind::SyncManagerStopped) after [`shutdown`], after an [`init`] that failed, and while
///   another thread is in either.
/// - [`OtherProcess`](ErrorKind::OtherProcess) in a process that was forked after [`init`], until it calls that itself.
///
/// # Panics
/// If [`init`] has never been called.
#[track_caller]
pub fn lock_with_key(key: impl Into<Key>, options: LockOptions) -> Result<Arc<dyn Lock>> {
    let manager = running("lock_with_key", |instance| Arc::clone(&instance.manager))?;
    manager.lock_with_key(key.into(), options)
}

/// The lock that the leader of this service holds; key `service/{name}/leadership`.
///
/// [`init`] has begun the claim on it, and logs gain and loss. To know whether this process leads, call
/// [`try_lock`](Lock::try_lock); for work that takes a while, watch [`lost`](Lock::lost) as well, since leadership can
/// be lost at any time. [`release`](Lock::release) steps down: this process then does not stand for election again
/// before the next `lock` or `try_lock`. Which process leads, whether this one or another, tells [`holder`](Lock::holder), with the
/// annotation that names service, host, process and build:
///
/// ```no_run
/// # fn example() -> dsync::Result<()> {
/// match dsync::leadership_lock()?.holder()? {
///     Some(leader) => println!("{leader:?} leads"),
///     None => println!("nobody leads"),
/// }
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// - [`InvalidConfig`](ErrorKind::InvalidConfig) if [`init`] was given no service.
/// - [`SyncManagerStopped`](ErrorKind::SyncManagerStopped) after [`shutdown`], after an [`init`] that failed, and while
///   another thread is in either.
/// - [`OtherProcess`](ErrorKind::OtherProcess) in a process that was forked after [`init`], until it calls that itself.
///
/// # Panics
/// If [`init`] has never been called.
#[track_caller]
pub fn leadership_lock() -> Result<Arc<dyn Lock>> {
    let lock = running("leadership_lock", |instance| {
        instance.campaign.as_ref().map(|campaign| Arc::clone(campaign.lock()))
    })?;
    lock.ok_or_else(|| {
        let message = "init() was given no service to lead; set Config::service or DSYNC_SERVICE";
        Error::new(ErrorKind::InvalidConfig, message)
    })
}

/// Runs `look` on the instance, under the mutex. So `look` must not drop the last handle of the manager.
#[track_caller]
fn running<T>(caller: &str, look: impl FnOnce(&Instance) -> T) -> Result<T> {
    let message = match &*stage() {
        Stage::Running(instance) => return Ok(look(instance)),
        Stage::After(INHERITED) => return Err(Error::new(ErrorKind::OtherProcess, INHERITED)),
        Stage::After(why) => why,
        Stage::Stopping(_) => SHUT_DOWN,
        Stage::Starting { .. } => "init() is still at work; wait for it to return",
        Stage::Before => panic!(
            "dsync::{caller}() was called before dsync::init(); call that first, or dsync::instance(), which gives an error"
        ),
    };
    Err(Error::new(ErrorKind::SyncManagerStopped, message))
}
