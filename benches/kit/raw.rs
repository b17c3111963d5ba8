//! The driver used by hand: the floor of all that the library does.

use std::hint::black_box;
use std::ops::RangeInclusive;

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

const LOCK_SHARED: &str = "SELECT pg_advisory_lock_shared($1)";
/// The least that gives a reader the token of the key's row, as it is after the grant.
const LOCK_SHARED_WITH_ROW: &str = "SELECT token FROM dsync.lock \
     WHERE id = $1 AND NOT pair AND (pg_advisory_lock_shared($1))::text = '' FOR SHARE";
const UNLOCK_SHARED: &str = "SELECT pg_advisory_unlock_shared($1)";

/// The least that takes one of three permits, with token and row: the first that is free of the three keys behind this one.
const LOCK_PERMIT_WITH_ROW: &str = "WITH free AS MATERIALIZED ( \
         SELECT id FROM generate_series($1::int8 + 1, $1 + 3) AS id WHERE pg_try_advisory_lock(id) LIMIT 1) \
     UPDATE dsync.lock AS lock SET token = nextval('dsync.token'), annotation = '{\"host\":\"db-7\",\"pid\":4711}', \
         pid = pg_backend_pid(), since = clock_timestamp() \
     FROM free WHERE lock.id = free.id AND NOT lock.pair RETURNING token";
const UNLOCK_PERMIT: &str = "SELECT pg_advisory_unlock($1::int8 + 1)";

/// Where others want the lock too. Who has waited for it finds the row written meanwhile, so the server tries the condition
/// on the new version of the row, and takes the lock once more.
const UNLOCK_ALL: &str = "SELECT pg_advisory_unlock($1), pg_advisory_unlock_all()";

/// A warm session with prepared statements.
pub(crate) struct Raw {
    pub(crate) client: Client,
    lock: Statement,
    unlock: Statement,
}

impl Raw {
    pub(crate) fn connect(url: &str) -> Self {
        Self::prepare(connect(url), LOCK, UNLOCK)
    }

    /// One whose locks draw a token and write the row of the `key`, which nobody else wants at the same time. The catalog must
    /// be there.
    pub(crate) fn with_row(url: &str, key: i64) -> Self {
        Self::with_row_each(url, key..=key)
    }

    /// As `with_row`, for several `keys` at once.
    pub(crate) fn with_row_each(url: &str, keys: RangeInclusive<i64>) -> Self {
        Self::prepare(connect_for_rows(url, keys), LOCK_WITH_ROW, UNLOCK)
    }

    /// As `with_row`, for any number of `keys` and of sessions that want one at the same time. They must not be keys of the
    /// library's, whose rows look different.
    pub(crate) fn with_rows(url: &str, keys: RangeInclusive<i64>) -> Self {
        Self::prepare(connect_for_rows(url, keys), LOCK_WITH_ROW, UNLOCK_ALL)
    }

    /// One that shares its locks.
    pub(crate) fn shared(url: &str) -> Self {
        Self::prepare(connect(url), LOCK_SHARED, UNLOCK_SHARED)
    }

    /// As `shared`; it reads the token of the row of the `key`. The catalog must be there.
    pub(crate) fn shared_with_row(url: &str, key: i64) -> Self {
        Self::prepare(connect_for_rows(url, key..=key), LOCK_SHARED_WITH_ROW, UNLOCK_SHARED)
    }

    /// One that takes one of the three permits behind `key`, which nobody else wants at the same time. The catalog must be there.
    pub(crate) fn permit_with_row(url: &str, key: i64) -> Self {
        Self::prepare(connect_for_rows(url, key + 1..=key + 3), LOCK_PERMIT_WITH_ROW, UNLOCK_PERMIT)
    }

    fn prepare(mut client: Client, lock: &str, unlock: &str) -> Self {
        let lock = client.prepare(lock).expect("a statement");
        let unlock = client.prepare(unlock).expect("a statement");
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

    pub(crate) fn pair(&mut self, key: i64) {
        self.lock(key);
        self.unlock(key);
    }
}

pub(crate) fn connect(url: &str) -> Client {
    Client::connect(url, NoTls).expect("a session")
}

/// A session with the settings that the library gives its own, and the rows of the keys.
fn connect_for_rows(url: &str, keys: RangeInclusive<i64>) -> Client {
    let mut client = connect(url);
    // Nobody waits for a disk.
    client
        .batch_execute("SET synchronous_commit = off; SET plan_cache_mode = force_generic_plan")
        .expect("it");
    let rows = "INSERT INTO dsync.lock SELECT key, false, 'by hand', 'bench', 0, NULL, 0, now() \
                FROM generate_series($1::int8, $2) AS key ON CONFLICT DO NOTHING";
    client.execute(rows, &[keys.start(), keys.end()]).expect("the rows");
    client
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
        Self::prepare(
            url,
            "SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND database = \
             (SELECT oid FROM pg_database WHERE datname = current_database()))",
        )
    }

    /// One that waits for somebody to wait for a permit.
    pub(crate) fn of_permits(url: &str) -> Self {
        Self::prepare(url, "SELECT EXISTS (SELECT FROM dsync.semaphores WHERE waiting > 0)")
    }

    fn prepare(url: &str, waits: &str) -> Self {
        let mut client = connect(url);
        let waits = client.prepare(waits).expect("a statement");
        Self { client, waits }
    }

    pub(crate) fn wait_for_waiter(&mut self) {
        while !self.client.query_one(&self.waits, &[]).expect("pg_locks").get::<_, bool>(0) {}
    }
}
