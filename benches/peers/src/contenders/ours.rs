//! dsync.

use std::sync::Arc;
use std::time::{Duration, Instant};

use dsync::{CatalogMode, Config, Context, Lock, PostgresManager, SyncManager};

use super::Party;

pub(super) struct Ours {
    lock: Arc<dyn Lock>,
    _manager: PostgresManager,
}

impl Ours {
    pub(super) fn new(url: &str, mode: CatalogMode) -> Self {
        let config = Config::from_url(url).expect("a URL").catalog(mode);
        let manager = PostgresManager::new(config).expect("a manager");
        manager.start().expect("a server");
        let lock = manager.lock("peers").expect("a lock");
        Self { lock, _manager: manager }
    }
}

impl Party for Ours {
    fn lock(&mut self) -> Instant {
        self.lock.lock(&Context::background()).expect("the lock");
        Instant::now()
    }

    fn release(&mut self) -> Instant {
        let called = Instant::now();
        self.lock.release().expect("the release");
        called
    }

    fn hear_of_loss(&mut self, patience: Duration) -> Option<Instant> {
        let heard = self.lock.lost().recv_timeout(patience);
        let now = Instant::now();
        heard.is_err_and(|error| error.is_disconnected()).then_some(now)
    }
}
