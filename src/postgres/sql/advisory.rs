//! The statements of locks on connections of the application's own, whose `search_path` may be anything.
//!
//! All are simple queries without parameters. A prepared statement would stay on the server's session, and a pooler in transaction
//! mode lends that session to others. Keys are numbers, so they can stand in the text.

use std::time::Duration;

use crate::key::AdvisoryKey;

/// What a lock lasts for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lasting {
    /// A transaction of the application's.
    Transaction,
    /// A session of the application's, until it is given back.
    Session,
}

/// A lock on a connection of the application's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Advisory {
    pub(crate) key: AdvisoryKey,
    pub(crate) lasting: Lasting,
    pub(crate) shared: bool,
}

/// The words by which [`Advisory::attempt`] and [`Advisory::unlock`] answer.
pub(crate) mod answer {
    pub(crate) const GRANTED: &str = "granted";
    pub(crate) const BUSY: &str = "busy";
    pub(crate) const STANDBY: &str = "standby";
    pub(crate) const OLD_SNAPSHOT: &str = "old snapshot";
    pub(crate) const IN_TRANSACTION: &str = "in transaction";
    pub(crate) const NOT_HELD: &str = "not held";
    pub(crate) const OTHER_BACKEND: &str = "other backend";
}

impl Advisory {
    /// Takes the lock if it is free. Gives what came of it, and the backend.
    ///
    /// What cannot work is refused before anything is taken, since nothing but the end of the transaction would free the lock. On
    /// a standby it would exclude nobody on the primary. A transaction above READ COMMITTED goes on to read with its first
    /// snapshot, which is that of this statement at the latest, and so older than the grant: what the former holder has
    /// committed since would be invisible to it. `statement_timestamp()` is that of the transaction in a transaction's first
    /// message only, and a session's lock is for one that is not in a transaction.
    pub(crate) fn attempt(self) -> String {
        let (refused, why) = match self.lasting {
            Lasting::Transaction => (
                "NOT pg_catalog.starts_with(pg_catalog.current_setting('transaction_isolation'), 'read ')",
                answer::OLD_SNAPSHOT,
            ),
            Lasting::Session => (
                "pg_catalog.statement_timestamp() OPERATOR(pg_catalog.<>) pg_catalog.transaction_timestamp()",
                answer::IN_TRANSACTION,
            ),
        };
        format!(
            "SELECT CASE WHEN pg_catalog.pg_is_in_recovery() THEN '{STANDBY}' \
                         WHEN {refused} THEN '{why}' \
                         WHEN {taken} THEN '{GRANTED}' ELSE '{BUSY}' END, \
                    pg_catalog.pg_backend_pid()",
            taken = self.call("pg_try_advisory", "lock"),
            STANDBY = answer::STANDBY,
            GRANTED = answer::GRANTED,
            BUSY = answer::BUSY,
        )
    }

    /// Waits for the lock for as long as `slice`, by the server's clock, and fails with `lock_timeout` then.
    ///
    /// The setting counts from the moment when the wait begins, so the statement that waits can set it. A session's statement is a
    /// transaction of its own, at the end of which it is as before. In a transaction of the application's it is put back when
    /// the lock is had, since a local setting outlives the release of a savepoint; the rollback to it puts it back too.
    /// `OFFSET 0` keeps the old value from being read when it is the new one already.
    pub(crate) fn wait(self, slice: Duration) -> String {
        // Zero would be no limit.
        let milliseconds = slice.as_micros().div_ceil(1_000).clamp(1, i32::MAX as u128);
        let lock = self.call("pg_advisory", "lock");
        let statement = format!(
            "SELECT CASE WHEN pg_catalog.set_config('lock_timeout', '{milliseconds}', true) IS NULL THEN NULL \
                         WHEN ({lock})::pg_catalog.text IS NULL THEN NULL \
                         ELSE pg_catalog.set_config('lock_timeout', before.lock_timeout, true) END \
             FROM (SELECT pg_catalog.current_setting('lock_timeout') AS lock_timeout OFFSET 0) AS before"
        );
        match self.lasting {
            Lasting::Transaction => {
                format!("SAVEPOINT {SAVEPOINT}; {statement}; RELEASE SAVEPOINT {SAVEPOINT}")
            }
            Lasting::Session => statement,
        }
    }

    /// Takes back what a wait that has failed may have left: a wait can fail *after* the grant. Gives `statement_timeout`, in
    /// seconds.
    ///
    /// A session's lock outlives the error. `pg_advisory_unlock` alone would put a warning into the server's log where nothing is held.
    pub(crate) fn take_back(self) -> String {
        // Quick, since it counts for this statement too. (`pg_settings` takes milliseconds.)
        const STATEMENT_TIMEOUT: &str = "SELECT pg_catalog.date_part('epoch', \
             pg_catalog.current_setting('statement_timeout')::pg_catalog.interval)";
        match self.lasting {
            Lasting::Transaction => {
                // A ROLLBACK TO alone would keep the savepoint.
                format!(
                    "ROLLBACK TO SAVEPOINT {SAVEPOINT}; RELEASE SAVEPOINT {SAVEPOINT}; {STATEMENT_TIMEOUT}"
                )
            }
            Lasting::Session => {
                let id = self.key.id();
                let (upper, lower) = ((id >> 32) as u32, id as u32);
                let half = if self.key.is_pair() { 2 } else { 1 };
                let mode = if self.shared { "ShareLock" } else { "ExclusiveLock" };
                format!(
                    "SELECT {unlock} FROM pg_catalog.pg_locks AS own \
                     WHERE own.locktype OPERATOR(pg_catalog.=) 'advisory' AND own.granted \
                       AND own.pid OPERATOR(pg_catalog.=) pg_catalog.pg_backend_pid() \
                       AND own.mode OPERATOR(pg_catalog.=) '{mode}' \
                       AND own.classid OPERATOR(pg_catalog.=) '{upper}'::pg_catalog.oid \
                       AND own.objid OPERATOR(pg_catalog.=) '{lower}'::pg_catalog.oid \
                       AND own.objsubid OPERATOR(pg_catalog.=) '{half}'::pg_catalog.int2; {STATEMENT_TIMEOUT}",
                    unlock = self.call("pg_advisory", "unlock"),
                )
            }
        }
    }

    /// Gives a session's lock back, if the backend is the one that has it. Gives what came of it.
    pub(crate) fn unlock(self, backend: i32) -> String {
        format!(
            "SELECT CASE WHEN pg_catalog.pg_backend_pid() OPERATOR(pg_catalog.<>) '{backend}'::pg_catalog.int4 \
                         THEN '{OTHER_BACKEND}' \
                         WHEN {unlocked} THEN '{GRANTED}' ELSE '{NOT_HELD}' END",
            unlocked = self.call("pg_advisory", "unlock"),
            OTHER_BACKEND = answer::OTHER_BACKEND,
            GRANTED = answer::GRANTED,
            NOT_HELD = answer::NOT_HELD,
        )
    }

    /// One of PostgreSQL's functions for this lock:
    /// <https://www.postgresql.org/docs/current/functions-admin.html#FUNCTIONS-ADVISORY-LOCKS>.
    fn call(self, prefix: &str, action: &str) -> String {
        let lasting = if self.lasting == Lasting::Transaction { "_xact" } else { "" };
        let shared = if self.shared { "_shared" } else { "" };
        let key = match self.key {
            AdvisoryKey::Single(number) => format!("'{number}'::pg_catalog.int8"),
            AdvisoryKey::Pair(first, second) => {
                format!("'{first}'::pg_catalog.int4, '{second}'::pg_catalog.int4")
            }
        };
        format!("pg_catalog.{prefix}{lasting}_{action}{shared}({key})")
    }
}

/// The application may have one of that name: an inner one hides it until it is released.
const SAVEPOINT: &str = "dsync_lock";
