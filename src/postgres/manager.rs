//! The manager on PostgreSQL: what an application calls.

use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use crate::check::{CheckLine, CheckReport};
use crate::context::Context;
use crate::error::{Error, ErrorKind, Result, chain};
use crate::key::Key;
use crate::lock::{Lock, LockOptions};
use crate::manager::{SyncManager, conveniences};
use crate::mode::Mode;
use crate::multi_lock::MultiLock;
use crate::once::{Once, Period, Run};
use crate::pg::borrowed::{SessionLock, TransactionLock, Wanted};
use crate::pg::config::{CatalogMode, Config};
use crate::pg::inspect;
use crate::pg::registry::Registry;
use crate::pg::sql::{Advisory, Lasting};
use crate::process::drive;
use crate::snapshot::Snapshot;
use crate::view::{Holder, LockView};

/// Distributed locks on PostgreSQL advisory locks.
///
/// Each claim has a session of its own, from a pool of the manager's that is apart from the application's, and a thread
/// that acquires, watches and re-acquires. With [`Config::shared_sessions`] many claims have one session and one thread. Dropping the manager [stops](SyncManager::stop) it; handles that live on
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
/// use std::time::Duration;
/// use dsync::{Config, PostgresManager};
///
/// let manager = PostgresManager::connect(Config::from_url("postgres://app@localhost/app")?)?;
///
/// let guard = manager.lock("nightly-report")?.acquire(Duration::from_secs(60))?;
/// // … work, and stop when `guard.lost()` disconnects …
/// guard.release()?;
/// # Ok::<(), dsync::Error>(())
/// ```
#[must_use = "the manager stops as soon as it is dropped, and with it end all terms"]
pub struct PostgresManager {
    registry: Arc<Registry>,
}

impl PostgresManager {
    /// Makes a manager. Nothing is connected before [`start`](SyncManager::start).
    ///
    /// # Errors
    /// - [`InvalidConfig`](ErrorKind::InvalidConfig): the text says which setting cannot work and why.
    /// - [`FailedInitialization`](ErrorKind::FailedInitialization): the thread of the pool could not be started.
    pub fn new(config: Config) -> Result<Self> {
        Ok(Self { registry: Registry::new(config)? })
    }

    /// Makes a manager and starts it: [`new`](Self::new), then [`start`](SyncManager::start).
    ///
    /// ```no_run
    /// use std::time::Duration;
    /// use dsync::{Config, PostgresManager};
    ///
    /// let manager = PostgresManager::connect(Config::from_url("postgres://app@localhost/app")?)?;
    /// let guard = manager.lock("nightly-report")?.acquire(Duration::from_secs(60))?;
    /// # Ok::<(), dsync::Error>(())
    /// ```
    ///
    /// # Errors
    /// As those two. A server that cannot be reached now is no error: the manager is given, and its claims go on trying to connect.
    pub fn connect(config: Config) -> Result<Self> {
        let manager = Self::new(config)?;
        manager.start()?;
        Ok(manager)
    }

    conveniences!(pub);

    /// The lock with this key, for a transaction of the application's own: see [`TransactionLock`]. It excludes the guards and
    /// claims of [`lock`](Self::lock), and lives without this manager, which need not have been started. No I/O happens here. Where the
    /// manager is the process-wide one, keep it: give [`init_with`](crate::init_with) a clone of the `Arc` that it is in.
    ///
    /// ```no_run
    /// # use std::time::Duration;
    /// # use dsync::PostgresManager;
    /// # fn example(manager: &PostgresManager, client: &mut dsync::postgres::Client) -> Result<(), Box<dyn std::error::Error>> {
    /// let mut transaction = client.transaction()?;
    /// manager.transaction_lock("invoices")?.acquire(&mut transaction, Duration::from_secs(5))?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`InvalidKey`](ErrorKind::InvalidKey), [`OtherProcess`](ErrorKind::OtherProcess).
    pub fn transaction_lock(&self, key: impl Into<Key>) -> Result<TransactionLock> {
        self.wanted(&key.into(), Lasting::Transaction).map(TransactionLock::new)
    }

    /// The lock with this key, for a session of the application's own: see [`SessionLock`]. Otherwise as
    /// [`transaction_lock`](Self::transaction_lock).
    ///
    /// # Errors
    /// As that.
    pub fn session_lock(&self, key: impl Into<Key>) -> Result<SessionLock> {
        let wanted = self.wanted(&key.into(), Lasting::Session)?;
        Ok(SessionLock::new(wanted, self.registry.config().release_timeout))
    }

    fn wanted(&self, key: &Key, lasting: Lasting) -> Result<Wanted> {
        self.registry.origin().check(format_args!("the manager"))?;
        key.validate()?;
        let config = self.registry.config();
        let advisory = Advisory { key: key.advisory(&config.namespace), lasting, shared: false };
        Ok(Wanted { key: key.to_string(), advisory, slice: config.wait_slice })
    }

    /// How the manager, its claims and its sessions stand now, as this process knows. No I/O happens, and no call that is under
    /// way is waited for.
    ///
    /// ```no_run
    /// # fn example(manager: &dsync::PostgresManager) {
    /// for claim in manager.snapshot().claims {
    ///     println!("{claim:?}");
    /// }
    /// # }
    /// ```
    ///
    /// In a process that was forked from the manager's, it is empty.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        if self.registry.origin().is_here() { self.registry.snapshot() } else { Snapshot::default() }
    }

    /// Looks at the server, and reports whether locks work there and what to change. It needs no [`start`](SyncManager::start), and tells
    /// also of a server that refuses to start or cannot be reached, which are lines of the report and no errors. A connection that
    /// is wrong in itself has no manager: see [`Config::check`].
    ///
    /// It opens two sessions beside those of the manager, so that it works while claims have all of these, and asks on the first. Nothing is
    /// changed: a catalog that is not there is not made. It locks nothing that others wait for, and blocks for three times
    /// `connect_timeout` at the most. With [`Config::quorum`](crate::Config::quorum) it also has the standbys confirm a record in the log of the
    /// server, which may take three times the heartbeat timeout (a quarter of the lease each) more.
    ///
    /// ```no_run
    /// # fn example(manager: &dsync::PostgresManager) {
    /// for line in manager.check().lines {
    ///     if line.verdict > dsync::Verdict::Good {
    ///         log::warn!("{}: {} ({:?})", line.topic, line.text, line.advice);
    ///     }
    /// }
    /// # }
    /// ```
    #[must_use]
    pub fn check(&self) -> CheckReport {
        match self.registry.origin().check(format_args!("the manager")) {
            Ok(()) => self.registry.check(),
            Err(error) => CheckReport::of(CheckLine::from_error("manager", &error)),
        }
    }

    /// Who holds the lock with this key, and who waits for it, in whichever process.
    ///
    /// It uses a session of the pool for one round trip. If the server does not answer, it takes up to twice `connect_timeout`
    /// (three times that, for the manager's first session) plus the heartbeat timeout, and that once more if
    /// a session that had rested in the pool has died; on a machine that is too busy to make room for a session, `connect_timeout` more, 1 s at the least. If claims have all the sessions, it fails after 0.2 s. `psql` shows the same in the views
    /// `dsync.locks`, `dsync.waiters` and `dsync.semaphores`.
    ///
    /// Where nobody has the lock with this key or waits for it, it shows the [semaphore](Self::semaphore) with the key, if there is one: also a
    /// free one, for how many [permits](LockView::permits) it has.
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
    /// A manager that was not started can look, too. Who only looks takes no lock, so agrees on nothing with the other managers of the database
    /// ([`Config::takeover`]), and is not refused for a weaker policy.
    ///
    /// # Errors
    /// - [`InvalidKey`](ErrorKind::InvalidKey), [`SyncManagerStopped`](ErrorKind::SyncManagerStopped),
    ///   [`OtherProcess`](ErrorKind::OtherProcess).
    /// - [`PoolExhausted`](ErrorKind::PoolExhausted): claims have all the sessions.
    /// - [`SessionUnavailable`](ErrorKind::SessionUnavailable), [`SessionRefused`](ErrorKind::SessionRefused).
    pub fn inspect(&self, key: impl Into<Key>) -> Result<LockView> {
        self.registry.origin().check(format_args!("the manager"))?;
        let key = key.into();
        key.validate()?;
        self.registry.inspect(&key)
    }

    /// All locks of the database, of all namespaces, that are held or waited for, and after them all such semaphores. A key that has never
    /// been held is not among them, and neither is one that only managers without catalog use: nothing tells its name.
    ///
    /// It takes twice as long as [`inspect`](Self::inspect).
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
        self.registry.origin().check(format_args!("the manager"))?;
        if self.registry.config().catalog == CatalogMode::None {
            let message = "the names of all locks are in the catalog, and the manager was told to do without; \
                           set the catalog to automatic, or ask for one key";
            return Err(Error::new(ErrorKind::InvalidConfig, message));
        }
        self.registry.ask(inspect::all)
    }
}

impl Config {
    /// Looks at the server that these settings lead to, as [`PostgresManager::check`] does. Settings that
    /// cannot work are a line of the report, too.
    ///
    /// ```no_run
    /// use dsync::Config;
    ///
    /// let report = Config::from_env()?.check();
    /// print!("{report}");
    /// assert!(report.is_ok());
    /// # Ok::<(), dsync::Error>(())
    /// ```
    #[must_use]
    pub fn check(&self) -> CheckReport {
        // Nobody is to be told of a manager that is made for this.
        let mut config = self.clone();
        config.observer = None;
        match PostgresManager::new(config) {
            Ok(manager) => manager.check(),
            Err(error) => CheckReport::of(CheckLine::from_error("settings", &error)),
        }
    }
}

impl SyncManager for PostgresManager {
    /// Begins the manager's work, after a look at the server.
    ///
    /// A server that cannot be reached now, or has no free connection, is no failure: a warning is logged, and claims keep
    /// trying. Blocks for three times `connect_timeout` at the most, and on a machine that is very busy for 1.2 s more: to open two sessions, to check the server by them, and to
    /// look for the catalog or make it.
    /// While another thread is in `start`, this call waits for it, 2.2 s longer than that at the most, and gives the same outcome.
    ///
    /// # Errors
    /// - [`FailedInitialization`](ErrorKind::FailedInitialization): the server refuses us, or cannot keep locks: a
    ///   transaction pooler, a hot standby, a version before 14, a system that only looks like PostgreSQL (two sessions do not exclude
    ///   each other). An error of the server that is not known to be temporary counts as a refusal.
    ///   The source says which.
    /// - [`SyncManagerStopped`](ErrorKind::SyncManagerStopped): at once, if [`stop`](SyncManager::stop) comes meanwhile.
    /// - [`OtherProcess`](ErrorKind::OtherProcess): the manager was made before a `fork`.
    fn start(&self) -> Result<()> {
        self.registry.origin().check(format_args!("the manager"))?;
        self.registry.start()
    }

    fn stop(&self) -> Result<()> {
        self.registry.origin().check(format_args!("the manager"))?;
        // Without a thread it is done on this one, step by step, by the threads of the claims.
        drive(|| self.registry.stop()).unwrap_or_else(|_| self.registry.stop())
    }

    fn snapshot(&self) -> Snapshot {
        self.snapshot()
    }

    fn lock_with_key(&self, key: Key, options: LockOptions) -> Result<Arc<dyn Lock>> {
        self.registry.origin().check(format_args!("the manager"))?;
        key.validate()?;
        options.validate(&key)?;
        if options.mode == Mode::Permit && self.registry.config().catalog == CatalogMode::None {
            let message = format!(
                "the number of permits of the semaphore \"{key}\" is agreed in the catalog, and the manager was told to do without; set the \
                 catalog to automatic"
            );
            return Err(Error::new(ErrorKind::InvalidConfig, message));
        }
        if let Some(grace) = options.grace {
            self.registry.config().lease_plan().check_grace(grace)?;
        }
        let lock = self.registry.lock(key, options.clone())?;
        options.tell_if_ignored(lock.key(), lock.options());
        Ok(lock)
    }
}

impl Drop for PostgresManager {
    fn drop(&mut self) {
        if !self.registry.origin().is_here() {
            // Its threads are the parent's, its mutexes may be locked for ever: it is left as it is.
            std::mem::forget(Arc::clone(&self.registry));
        } else if let Err(error) = self.stop() {
            log::warn!("stopping the lock manager: {}", chain(&error));
        }
    }
}

impl fmt::Debug for PostgresManager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.registry.origin().is_here() {
            return write!(f, "PostgresManager(of process {})", self.registry.origin());
        }
        self.registry.describe(&mut f.debug_struct("PostgresManager"))
    }
}
