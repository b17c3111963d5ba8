//! The process-wide manager, for applications that want one without carrying it about.

use std::sync::Arc;

use parking_lot::RwLock;

use crate::error::{Error, ErrorKind, Result};
use crate::key::Key;
use crate::leadership::Campaign;
use crate::lock::{Lock, LockOptions};
use crate::manager::SyncManager;
use crate::postgres::{Config, PostgresManager};

static INSTANCE: RwLock<Stage> = RwLock::new(Stage::Before);

enum Stage {
    Before,
    /// `init` is at work.
    Starting,
    Running(Arc<Instance>),
    After,
}

struct Instance {
    manager: Arc<dyn SyncManager>,
    campaign: Option<Campaign>,
}

/// Makes and starts the process-wide manager, and, where the configuration names a service, stands for its leadership.
///
/// For a configuration from the environment: `dsync::init(dsync::Config::from_env()?)`. Blocks for no longer than the
/// configuration's `connect_timeout`.
///
/// # Errors
/// - [`InvalidConfig`](ErrorKind::InvalidConfig).
/// - [`FailedInitialization`](ErrorKind::FailedInitialization): the server refuses us, or the process-wide manager
///   exists already.
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
    let manager = PostgresManager::new(config)?;
    init_with(Arc::new(manager), service.as_deref(), build.as_deref())
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
    let before = {
        let mut stage = INSTANCE.write();
        if matches!(*stage, Stage::Running(_) | Stage::Starting) {
            let message = "the process-wide manager exists already; call init() once, or shutdown() before";
            return Err(Error::new(ErrorKind::FailedInitialization, message));
        }
        std::mem::replace(&mut *stage, Stage::Starting)
    };
    // Not under the lock: it takes its time, and what it logs may come back here.
    let (after, outcome) = match start(manager, service, build) {
        Ok(instance) => (Stage::Running(Arc::new(instance)), Ok(())),
        Err(error) => (before, Err(error)),
    };
    *INSTANCE.write() = after;
    outcome
}

fn start(manager: Arc<dyn SyncManager>, service: Option<&str>, build: Option<&str>) -> Result<Instance> {
    manager.start()?;
    match service.map(|service| Campaign::start(&*manager, service, build)).transpose() {
        Ok(campaign) => Ok(Instance { manager, campaign }),
        Err(error) => {
            if let Err(second) = manager.stop() {
                log::warn!("stopping the lock manager: {second:#}");
            }
            Err(error)
        }
    }
}

/// Releases all locks of the process-wide manager, and stops it.
///
/// Without one nothing happens. Returns within the manager's release timeout.
///
/// # Errors
/// As [`SyncManager::stop`]; the manager has stopped all the same.
pub fn shutdown() -> Result<()> {
    let instance = {
        let mut stage = INSTANCE.write();
        match std::mem::replace(&mut *stage, Stage::After) {
            Stage::Running(instance) => instance,
            before @ (Stage::Before | Stage::Starting) => {
                *stage = before;
                return Ok(());
            }
            Stage::After => return Ok(()),
        }
    };
    instance.manager.stop()
}

/// The lock with this key of the process-wide manager; see [`SyncManager::lock_with_key`].
///
/// # Errors
/// - [`InvalidKey`](ErrorKind::InvalidKey).
/// - [`SyncManagerStopped`](ErrorKind::SyncManagerStopped) after [`shutdown`].
///
/// # Panics
/// If [`init`] has not been called yet.
#[track_caller]
pub fn lock_with_key(key: impl Into<Key>, options: LockOptions) -> Result<Arc<dyn Lock>> {
    instance("lock_with_key")?.manager.lock_with_key(key.into(), options)
}

/// The lock that the leader of this service holds; key `service/{name}/leadership`.
///
/// [`init`] has begun the claim on it, and logs gain and loss. To know whether this process leads, call
/// [`try_lock`](Lock::try_lock); for work that takes a while, watch [`lost`](Lock::lost) as well, since leadership can
/// be lost at any time. [`release`](Lock::release) steps down: this process then does not stand for election again
/// before the next `lock` or `try_lock`.
///
/// # Errors
/// - [`InvalidConfig`](ErrorKind::InvalidConfig) if [`init`] was given no service.
/// - [`SyncManagerStopped`](ErrorKind::SyncManagerStopped) after [`shutdown`].
///
/// # Panics
/// If [`init`] has not been called yet.
#[track_caller]
pub fn leadership_lock() -> Result<Arc<dyn Lock>> {
    match &instance("leadership_lock")?.campaign {
        Some(campaign) => Ok(Arc::clone(campaign.lock())),
        None => {
            let message = "init() was given no service to lead; set Config::service or DSYNC_SERVICE";
            Err(Error::new(ErrorKind::InvalidConfig, message))
        }
    }
}

#[track_caller]
fn instance(caller: &str) -> Result<Arc<Instance>> {
    match &*INSTANCE.read() {
        Stage::Running(instance) => Ok(Arc::clone(instance)),
        Stage::After => Err(Error::new(
            ErrorKind::SyncManagerStopped,
            "the process-wide manager was shut down; its locks cannot be used any more",
        )),
        Stage::Before | Stage::Starting => panic!("dsync::{caller}() was called before dsync::init()"),
    }
}
