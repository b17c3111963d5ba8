//! The manager of locks in memory.

use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use parking_lot::Mutex;

use super::lock::MemoryLock;
use super::server::MemoryServer;
use crate::context::Context;
use crate::error::{Error, Result};
use crate::key::{HandleKey, Key};
use crate::lock::{Lock, LockOptions};
use crate::manager::{SyncManager, conveniences};
use crate::multi_lock::MultiLock;
use crate::observer::Observer;
use crate::once::{Once, Period, Run};
use crate::snapshot::{ClaimSnapshot, Snapshot};
use crate::telling::Observing;
use crate::view::Holder;

/// Locks within this process, without a database: for an application's own tests.
///
/// It keeps the same contract as [`PostgresManager`](crate::PostgresManager), but for what only a server can give: no database knows its
/// terms, so [`Term::fence`](crate::Term::fence) and [`Run::record`](crate::Run::record) fail. A
/// manager plays the part of one process; for two that compete, put two on one [`MemoryServer`], which can also take
/// locks away and be down. Dropping a manager stops it.
///
/// ```
/// use std::sync::Arc;
/// use std::time::Duration;
/// use dsync::{Error, MemoryManager, SyncManager};
///
/// // The code under test takes any manager …
/// fn migrate(locks: &dyn SyncManager) -> Result<(), Error> {
///     let _guard = locks.lock("migrations")?.acquire(Duration::from_secs(60))?;
///     // … migrate …
///     Ok(())
/// }
///
/// // … and its test gives it this one.
/// let locks: Arc<dyn SyncManager> = Arc::new(MemoryManager::new());
/// locks.start()?;
/// migrate(&*locks)?;
/// locks.stop()?;
/// # Ok::<(), dsync::Error>(())
/// ```
#[must_use = "the manager stops as soon as it is dropped, and with it end all terms"]
pub struct MemoryManager {
    server: MemoryServer,
    /// This manager's number on the server.
    id: u64,
    observing: Option<Arc<Observing>>,
}

impl MemoryManager {
    /// A manager on a server of its own.
    pub fn new() -> Self {
        Self::on(&MemoryServer::new())
    }

    /// A manager on a server that it shares with others.
    pub fn on(server: &MemoryServer) -> Self {
        let id = server.server.change(|state, _| state.add_manager());
        Self { server: server.clone(), id, observing: None }
    }

    /// Is told what happens to the locks. To be called before the first lock is asked for. [`Observer`] says on which
    /// threads it is called, [`MemoryServer`] among them, and what it may do.
    pub fn observer(mut self, observer: impl Observer + 'static) -> Self {
        self.observing = Some(Observing::new(Arc::new(observer)));
        self
    }

    /// How the manager and its claims stand now.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        let (is_running, claims) = self.server.server.see(|state| state.snapshot(self.id));
        // Not under the mutex: one of the locks may be gone by now but for this.
        let mut claims: Vec<_> = claims
            .iter()
            .map(|(lock, claim)| {
                let (waiting_threads, last_loss) = (lock.queue.waiting(), lock.last_loss.lock().clone());
                ClaimSnapshot { waiting_threads, last_loss, ..claim.clone() }
            })
            .collect();
        claims.sort_by(|a, b| a.key.cmp(&b.key));
        Snapshot { is_running, claims, ..Snapshot::default() }
    }

    conveniences!(pub);
}

impl Default for MemoryManager {
    fn default() -> Self {
        Self::new()
    }
}

impl SyncManager for MemoryManager {
    fn start(&self) -> Result<()> {
        self.server.server.change(|state, _| state.start_manager(self.id))
    }

    fn stop(&self) -> Result<()> {
        self.server.server.change(|state, gone| state.stop_manager(self.id, gone));
        Ok(())
    }

    fn snapshot(&self) -> Snapshot {
        self.snapshot()
    }

    fn lock_with_key(&self, key: Key, options: LockOptions) -> Result<Arc<dyn Lock>> {
        key.validate()?;
        options.validate(&key)?;
        let (server, handle_key) = (&self.server.server, HandleKey { key, mode: options.mode });
        // `options` itself stays out here: the destructor of a valuer that is not wanted must not run under the mutex.
        let make = || {
            Arc::new_cyclic(|this| MemoryLock {
                this: this.clone(),
                server: Arc::clone(server),
                manager: self.id,
                text: handle_key.key.to_string(),
                key: handle_key.clone(),
                place: handle_key.lock(),
                options: options.clone(),
                last_loss: Mutex::default(),
                queue: Arc::default(),
                observing: self.observing.clone(),
            })
        };
        let lock = server.change(|state, _| state.handle(self.id, &handle_key, make))?;
        options.check_permits(&lock.options, &lock.text)?;
        options.tell_if_ignored(&lock.text, &lock.options);
        Ok(lock)
    }
}

impl Drop for MemoryManager {
    fn drop(&mut self) {
        self.server.server.change(|state, gone| state.stop_manager(self.id, gone));
    }
}

impl fmt::Debug for MemoryManager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let stopped = self.server.server.see(|state| state.is_stopped(self.id));
        f.debug_struct("MemoryManager").field("stopped", &stopped).finish()
    }
}
