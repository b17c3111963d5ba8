//! distributed-lock-postgres.

use std::time::{Duration, Instant};

use distributed_lock_core::{DistributedLock, LockHandle, LockProvider};
use distributed_lock_postgres::PostgresLockProvider;
use distributed_lock_postgres::handle::PostgresLockHandle;
use distributed_lock_postgres::lock::PostgresDistributedLock;
use sqlx_08::PgPool;
use sqlx_08::postgres::PgPoolOptions;
use tokio::time::timeout;

use super::AsyncParty;

pub(super) struct DistributedLockPostgres {
    pool: PgPool,
    lock: PostgresDistributedLock,
    held: Option<PostgresLockHandle>,
}

impl DistributedLockPostgres {
    pub(super) async fn new(url: &str) -> Self {
        // A second connection would be opened, and paid for, whenever the first is still on its way back to the pool.
        let pool = PgPoolOptions::new().max_connections(1).connect(url).await.expect("a session");
        let provider = PostgresLockProvider::builder().pool(pool.clone()).build().await.expect("a provider");
        Self { pool, lock: provider.create_lock("peers"), held: None }
    }
}

impl AsyncParty for DistributedLockPostgres {
    async fn lock(&mut self) {
        self.held = Some(self.lock.acquire(None).await.expect("the lock"));
    }

    async fn release(&mut self) {
        self.held.take().expect("it is held").release().await.expect("the release");
    }

    async fn hear_of_loss(&mut self, patience: Duration) -> Option<Instant> {
        let mut token = self.held.as_ref().expect("it is held").lost_token().clone();
        // A change and a closed channel both count as told.
        timeout(patience, token.changed()).await.ok().map(|_| Instant::now())
    }

    async fn settle(&mut self) {
        // The connection goes back to the pool in a task of its own.
        while self.pool.num_idle() == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}
