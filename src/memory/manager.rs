//! The manager of locks in memory.

use std::fmt;
use std::sync::Arc;

use parking_lot::Mutex;

use super::lock::MemoryLock;
use super::server::MemoryServer;
use crate::error::Result;
use crate::key::Key;
use crate::lock::{Lock, LockOptions};
use crate::manager::SyncManager;

/// Locks within this process, without a database: for an application's own tests.
///
/// It keeps the same contract as [`PostgresManager`](crate::PostgresManager), but for what only a server can give. A
/// manager plays the part of one process; for two that compete, put two on one [`MemoryServer`], which can also take
/// locks away and be down. Dropping a manager stops it.
///
/// ```
/// use std::sync::Arc;
/// use dsync::{Context, Error, LockGuard, LockOptions, MemoryManager, SyncManager};
///
/// // The code under test takes any manager …
/// fn migrate(locks: &dyn SyncManager) -> Result<(), Error> {
///     let lock = locks.lock("migrations", LockOptions::new())?;
///     let _guard = LockGuard::lock(lock, &Context::background())?;
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
pub struct MemoryManager {
    server: MemoryServer,
    /// This manager's number on the server.
    id: u64,
}

impl MemoryManager {
    /// A manager on a server of its own.
    pub fn new() -> Self {
        Self::on(&MemoryServer::new())
    }

    /// A manager on a server that it shares with others.
    pub fn on(server: &MemoryServer) -> Self {
        let id = server.server.change(|state, _| state.add_manager());
        Self { server: server.clone(), id }
    }

    /// [`lock_with_key`](SyncManager::lock_with_key) for whatever can be a [`Key`]: a name, a number, a pair.
    ///
    /// # Errors
    /// As there.
    pub fn lock(&self, key: impl Into<Key>, options: LockOptions) -> Result<Arc<dyn Lock>> {
        self.lock_with_key(key.into(), options)
    }
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

    fn lock_with_key(&self, key: Key, options: LockOptions) -> Result<Arc<dyn Lock>> {
        key.validate()?;
        let server = &self.server.server;
        // `options` itself stays out here: the destructor of a valuer that is not wanted must not run under the mutex.
        let make = || {
            Arc::new(MemoryLock {
                server: Arc::clone(server),
                manager: self.id,
                text: key.to_string(),
                key: key.clone(),
                options: options.clone(),
                last_loss: Mutex::default(),
            })
        };
        let lock = server.change(|state, _| state.handle(self.id, &key, make))?;
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
