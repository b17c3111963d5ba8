//! Sees from outside who waits for a lock and who holds one.

use std::thread;
use std::time::{Duration, Instant};

use postgres::{Client, Statement};
use redis::Connection;
use support::Database;

use crate::contenders::Keeper;
use crate::redis::Redis;

/// A waiter that polls pauses after each refusal, for 100 ms on the average. If it were always met right after its first
/// one, that pause would be seen in whole each time. So the release comes at a random moment within several pauses.
const SEVERAL_PAUSES: Duration = Duration::from_millis(500);

/// The watcher of both servers.
pub(crate) struct Watchers {
    postgres: PostgresWatcher,
    redis: Option<Connection>,
    tries_before: u64,
}

impl Watchers {
    pub(crate) fn new(database: &Database<'_>, redis: Option<&Redis>) -> Self {
        Self {
            postgres: PostgresWatcher::new(database),
            redis: redis.map(Redis::connection),
            tries_before: 0,
        }
    }

    /// To be called while the lock is held and nobody waits.
    pub(crate) fn expect_waiter(&mut self, keeper: Keeper) {
        if keeper == Keeper::Redis {
            self.tries_before = self.tries();
        }
    }

    /// Returns when somebody is known to wait.
    pub(crate) fn until_somebody_waits(&mut self, keeper: Keeper) {
        match keeper {
            Keeper::PostgreSql => while self.postgres.count_waiters() == 0 {},
            // While one holds the lock, each try of the other one is refused.
            Keeper::Redis => {
                while self.tries() == self.tries_before {
                    thread::sleep(Duration::from_micros(100));
                }
                thread::sleep(SEVERAL_PAUSES.mul_f64(fastrand::f64()));
            }
        }
    }

    /// Returns when no advisory lock is left of the one before.
    pub(crate) fn until_nobody_holds(&mut self) {
        while self.postgres.holders().next().is_some() {
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Ends the session that holds the lock, and says when that was asked for.
    pub(crate) fn terminate_holder(&mut self) -> Instant {
        let holders: Vec<i32> = self.postgres.holders().collect();
        let [holder] = holders[..] else { panic!("one holder, and not {holders:?}") };
        self.postgres.terminate(holder)
    }

    fn tries(&mut self) -> u64 {
        let redis = self.redis.as_mut().expect("a Redis");
        let said: String =
            redis::cmd("INFO").arg("commandstats").query(redis).expect("what Redis says of its commands");
        said.lines()
            .find_map(|line| line.strip_prefix("cmdstat_set:calls=")?.split(',').next()?.parse().ok())
            .unwrap_or(0)
    }
}

struct PostgresWatcher {
    client: Client,
    waiters: Statement,
    holders: Statement,
    terminate: Statement,
}

impl PostgresWatcher {
    fn new(database: &Database<'_>) -> Self {
        let mut client = database.client().expect("a session");
        let here = "locktype = 'advisory' \
                    AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";
        let mut prepare = |sql: &str| client.prepare(sql).expect("a statement");
        let waiters = prepare(&format!("SELECT count(*) FROM pg_locks WHERE {here} AND NOT granted"));
        let holders = prepare(&format!("SELECT DISTINCT pid FROM pg_locks WHERE {here} AND granted"));
        let terminate = prepare("SELECT pg_terminate_backend($1)");
        Self { client, waiters, holders, terminate }
    }

    fn count_waiters(&mut self) -> i64 {
        self.client.query_one(&self.waiters, &[]).expect("pg_locks").get(0)
    }

    fn holders(&mut self) -> impl Iterator<Item = i32> {
        self.client.query(&self.holders, &[]).expect("pg_locks").into_iter().map(|row| row.get(0))
    }

    fn terminate(&mut self, backend: i32) -> Instant {
        let asked = Instant::now();
        let done: bool = self.client.query_one(&self.terminate, &[&backend]).expect("its end").get(0);
        assert!(done, "the backend is there");
        asked
    }
}
