//! The driver used by hand: the floor of all that the library does.

use std::hint::black_box;

use postgres::types::Type;
use postgres::{Client, NoTls, Statement};

/// What the driver by hand is called in the results.
pub(crate) const NAME: &str = "the driver by hand";

/// What it is called where each lock draws a token and writes a row.
pub(crate) const NAME_WITH_ROW: &str = "the driver by hand, with a row";

const LOCK: &str = "SELECT pg_advisory_lock($1)";
/// The least that writes what a term of the library leaves, in one round trip, where the key has its row. It does not wait
/// for fenced transactions, would not notice another key with this number, and knows neither a lease nor a crash.
pub(crate) const LOCK_WITH_ROW: &str = "UPDATE dsync.lock SET token = nextval('dsync.token'), \
     annotation = '{\"host\":\"db-7\",\"pid\":4711}', pid = pg_backend_pid(), since = clock_timestamp() \
     WHERE id = $1 AND NOT pair AND (pg_advisory_lock($1))::text = '' RETURNING token";
const UNLOCK: &str = "SELECT pg_advisory_unlock($1)";

/// A warm session with prepared statements.
pub(crate) struct Raw {
    pub(crate) client: Client,
    lock: Statement,
    unlock: Statement,
}

impl Raw {
    pub(crate) fn connect(url: &str) -> Self {
        let mut client = connect(url);
        let lock = client.prepare(LOCK).expect("a statement");
        let unlock = client.prepare(UNLOCK).expect("a statement");
        Self { client, lock, unlock }
    }

    /// One whose locks draw a token and write the row of the `key`. The catalog must be there.
    pub(crate) fn with_row(url: &str, key: i64) -> Self {
        let mut client = connect(url);
        // As the library has it: nobody waits for a disk.
        client
            .batch_execute("SET synchronous_commit = off; SET plan_cache_mode = force_generic_plan")
            .expect("it");
        let row = "INSERT INTO dsync.lock VALUES ($1, false, 'by hand', 'bench', 0, NULL, 0, now()) \
                   ON CONFLICT DO NOTHING";
        client.execute(row, &[&key]).expect("a row");
        let lock = client.prepare(LOCK_WITH_ROW).expect("a statement");
        let unlock = client.prepare(UNLOCK).expect("a statement");
        Self { client, lock, unlock }
    }

    pub(crate) fn lock(&mut self, key: i64) {
        let rows = self.client.execute(&self.lock, &[&key]).expect("the lock");
        assert_eq!(rows, 1, "the lock was taken");
    }

    pub(crate) fn unlock(&mut self, key: i64) {
        let row = self.client.query_one(&self.unlock, &[&key]).expect("the unlock");
        assert!(black_box(row.get::<_, bool>(0)), "the lock was held");
    }
}

pub(crate) fn connect(url: &str) -> Client {
    Client::connect(url, NoTls).expect("a session")
}

/// A new session with the lock in hand, in as few round trips as there can be.
pub(crate) fn hold(url: &str, key: i64) -> Client {
    let mut client = connect(url);
    lock(&mut client, key);
    client
}

/// Takes a lock in one round trip, without a statement that was prepared.
pub(crate) fn lock(client: &mut Client, key: i64) {
    client.execute_typed(LOCK, &[(&key, Type::INT8)]).expect("the lock");
}

/// Waits until somebody waits for an advisory lock in this database.
pub(crate) struct Watcher {
    client: Client,
    waits: Statement,
}

impl Watcher {
    pub(crate) fn connect(url: &str) -> Self {
        let mut client = connect(url);
        let waits = client
            .prepare(
                "SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND database = \
                 (SELECT oid FROM pg_database WHERE datname = current_database()))",
            )
            .expect("a statement");
        Self { client, waits }
    }

    pub(crate) fn wait_for_waiter(&mut self) {
        while !self.client.query_one(&self.waits, &[]).expect("pg_locks").get::<_, bool>(0) {}
    }
}
