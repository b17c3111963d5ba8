//! `PgAdvisoryLock` of sqlx.

use std::time::{Duration, Instant};

use sqlx::postgres::{PgAdvisoryLock, PgAdvisoryLockGuard, PgAdvisoryLockKey};
use sqlx::{Connection, PgConnection};

use super::{AsyncParty, KEY};

pub(super) struct Sqlx {
    lock: PgAdvisoryLock,
    // Locking takes the connection and gives a guard, and releasing the other way round: always one of the two is here.
    idle: Option<PgConnection>,
    held: Option<PgAdvisoryLockGuard<PgConnection>>,
}

impl Sqlx {
    pub(super) async fn new(url: &str) -> Self {
        let connection = PgConnection::connect(url).await.expect("a session");
        let lock = PgAdvisoryLock::with_key(PgAdvisoryLockKey::BigInt(KEY));
        Self { lock, idle: Some(connection), held: None }
    }
}

impl AsyncParty for Sqlx {
    async fn lock(&mut self) {
        let connection = self.idle.take().expect("nothing is held");
        self.held = Some(self.lock.acquire(connection).await.expect("the lock"));
    }

    async fn release(&mut self) {
        let guard = self.held.take().expect("it is held");
        self.idle = Some(guard.release_now().await.expect("the release"));
    }

    async fn hear_of_loss(&mut self, _patience: Duration) -> Option<Instant> {
        None
    }
}
