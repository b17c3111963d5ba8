//! The floor: the blocking driver, used by hand.

use std::time::{Duration, Instant};

use postgres::fallible_iterator::FallibleIterator;
use postgres::{Client, NoTls, Statement};

use super::{KEY, Party};

pub(super) struct ByHand {
    client: Client,
    lock: Statement,
    unlock: Statement,
}

impl ByHand {
    pub(super) fn new(url: &str) -> Self {
        let mut client = Client::connect(url, NoTls).expect("a session");
        let lock = client.prepare("SELECT pg_advisory_lock($1)").expect("a statement");
        let unlock = client.prepare("SELECT pg_advisory_unlock($1)").expect("a statement");
        Self { client, lock, unlock }
    }
}

impl Party for ByHand {
    fn lock(&mut self) -> Instant {
        self.client.execute(&self.lock, &[&KEY]).expect("the lock");
        Instant::now()
    }

    fn release(&mut self) -> Instant {
        let called = Instant::now();
        let held: bool = self.client.query_one(&self.unlock, &[&KEY]).expect("the unlock").get(0);
        assert!(held, "it was held");
        called
    }

    fn hear_of_loss(&mut self, patience: Duration) -> Option<Instant> {
        // The one call of this driver that reads without asking anything first.
        let read = self.client.notifications().timeout_iter(patience).next();
        let heard = Instant::now();
        (read.is_err() || self.client.is_closed()).then_some(heard)
    }
}
