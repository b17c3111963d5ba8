//! The floor of asynchronous libraries: the driver, used by hand.

use std::time::{Duration, Instant};

use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_postgres::{Client, NoTls, Statement};

use super::{AsyncParty, KEY};

pub(super) struct TokioByHand {
    client: Client,
    connection: JoinHandle<()>,
    lock: Statement,
    unlock: Statement,
}

impl TokioByHand {
    pub(super) async fn new(url: &str) -> Self {
        let (client, connection) = tokio_postgres::connect(url, NoTls).await.expect("a session");
        let connection = tokio::spawn(async {
            // Its error is the loss that `hear_of_loss` waits for.
            let _ = connection.await;
        });
        let lock = client.prepare("SELECT pg_advisory_lock($1)").await.expect("a statement");
        let unlock = client.prepare("SELECT pg_advisory_unlock($1)").await.expect("a statement");
        Self { client, connection, lock, unlock }
    }
}

impl AsyncParty for TokioByHand {
    async fn lock(&mut self) {
        self.client.execute(&self.lock, &[&KEY]).await.expect("the lock");
    }

    async fn release(&mut self) {
        let held: bool = self.client.query_one(&self.unlock, &[&KEY]).await.expect("the unlock").get(0);
        assert!(held, "it was held");
    }

    async fn hear_of_loss(&mut self, patience: Duration) -> Option<Instant> {
        timeout(patience, &mut self.connection).await.ok().map(|_| Instant::now())
    }
}
