//! The statements of a claim: they take a lock, with token and row, and give it back.

use super::{Shape, era};

/// The statements of a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verb {
    /// Asks for the lock without waiting, and puts the lease on the session. Gives: granted, token, namespace and name of another key.
    ///
    /// It does not wait for fenced transactions of a former holder either: then there is no token, and the session queues,
    /// which keeps the lock and waits for them.
    ///
    /// The lease goes on in a statement that succeeds whether the lock is had or not, and so before the first wait: a
    /// wait that ends in an error would take it back, and it can end so *after* the lock was granted. A session that
    /// waits is not idle, so the lease does it no harm.
    Try,
    /// As `Try`, but for a session that has served the same key before and kept the lease since, and with less to do for the
    /// server: see [`take_known`]. Gives the token, or no row: it does not tell why there is no lock.
    Again,
    /// Queues for the lock until `lock_timeout`. Gives the same as `Try`.
    ///
    /// If the slice before ended in an error *after* the lock had been granted, this takes it a second time, at once.
    /// [`Unlock`](Self::Unlock) lets go of it as often as it was taken.
    Queue,
    /// As `Queue`, where the key has a row, or where there is no catalog. Gives the token, or at once no row: then it is for
    /// `Queue` to find out why. Without a catalog, a row when the lock is had.
    QueueAgain,
    /// Gives the lock back, says whether it was held, and takes lease and name off the session. Key as above.
    ///
    /// The session holds this one lock only, so letting go of all is letting go of it, however often it was taken.
    Unlock,
    /// As `Unlock`, but leaves lease and name for the next claim on the same key.
    UnlockOnly,
}

/// The text of a statement. Parameters: `$1` key; for `Try` and `Queue` also `$2` lease in milliseconds, as text, `$3`
/// application name, and with the catalog `$4` namespace, `$5` name of the key, `$6` annotation; for `Again` and
/// `QueueAgain` with the catalog `$2` to `$4` are the last three.
pub(crate) fn statement(verb: Verb, shape: Shape) -> String {
    if shape.catalog && matches!(verb, Verb::Again | Verb::QueueAgain) {
        return take_known(verb, shape);
    }
    let unlock = shape.unlock("$1::pg_catalog.int8");
    let (granted, settings) = match verb {
        Verb::Try => (
            shape.try_lock(),
            ", pg_catalog.set_config('idle_session_timeout', $2::text, false), \
               pg_catalog.set_config('application_name', $3::text, false)",
        ),
        Verb::QueueAgain => return format!("SELECT {}", shape.wait_for_lock()),
        // The settings stand from the `Try` before, and are
        // named only for the parameters to be the same.
        Verb::Queue => (shape.wait_for_lock(), ", $2::text AS lease, $3::text AS application_name"),
        Verb::Again => return format!("SELECT {}", shape.try_lock()),
        Verb::Unlock => {
            return format!(
                "SELECT {unlock}, pg_catalog.pg_advisory_unlock_all(), \
                        pg_catalog.set_config('idle_session_timeout', '0', false), \
                        pg_catalog.set_config('application_name', NULL, false)"
            );
        }
        Verb::UnlockOnly => {
            return format!("SELECT {unlock}, pg_catalog.pg_advisory_unlock_all()");
        }
    };
    if shape.catalog {
        take_unknown(&granted, settings, verb, shape)
    } else {
        format!("SELECT {granted}, NULL::int8, NULL::text, NULL::text{settings}")
    }
}

/// Lock, token and row in one statement, whatever there is in the catalog. The row is written after the lock was granted,
/// since its source is the grant; and so are the tokens drawn, in the order of the grants.
///
/// Where a row of *another* key has this id, the lock is not asked for, and the other key is given: two names with one
/// hash. If they waited for each other in one process, they would do so for ever. A row that is so new that this statement
/// does not see it keeps the term's from being written; the next statement sees it.
///
/// Without the row of the era no token is drawn: see [`new_era`].
///
/// Many a session runs this once, and as its first statement. So it is written for a backend that has yet to look up what
/// it needs: the operator `||`, and a comparison of rows, took a millisecond.
///
/// If fenced transactions of the former holder are still open, `Queue` waits for them, up to `lock_timeout`. `Try` would
/// take back the lease if it failed there, so it does not wait for the fence lock.
fn take_unknown(granted: &str, settings: &str, verb: Verb, shape: Shape) -> String {
    let (pair, fence_lock) = (shape.pair, shape.fence_lock());
    let row = format!("dsync.lock AS lock WHERE lock.id = $1::int8 AND lock.pair = {pair}");
    let passed = match verb {
        Verb::Try => format!("pg_catalog.pg_try_advisory_xact_lock({fence_lock})"),
        _ => format!("(pg_catalog.pg_advisory_xact_lock({fence_lock}))::text = ''"),
    };
    format!(
        "WITH other AS MATERIALIZED ( \
             SELECT lock.namespace, lock.key FROM {row} \
             AND (lock.namespace <> $4::text OR lock.key <> $5::text)), \
         attempt AS MATERIALIZED ( \
             SELECT {granted} AS granted{settings} WHERE NOT EXISTS (SELECT FROM other)), \
         term AS ( \
             INSERT INTO dsync.lock AS lock (id, pair, namespace, key, token, annotation, pid, since) \
             SELECT $1::int8, {pair}, $4::text, $5::text, pg_catalog.nextval('dsync.token'), $6::bytea, \
                    pg_catalog.pg_backend_pid(), pg_catalog.clock_timestamp() \
             FROM attempt WHERE CASE WHEN attempt.granted AND {era} THEN {passed} END \
             ON CONFLICT (id, pair) DO UPDATE \
             SET token = excluded.token, annotation = excluded.annotation, pid = excluded.pid, since = excluded.since \
             WHERE lock.namespace = excluded.namespace AND lock.key = excluded.key \
             RETURNING lock.token) \
         SELECT coalesce((SELECT granted FROM attempt), false), (SELECT token FROM term), \
                (SELECT namespace FROM other), (SELECT key FROM other)",
        era = era!()
    )
}

/// Lock, token and row where the key has a row: gives the token, or no row at all.
///
/// The condition takes the lock, and the fence lock after it. `CASE` keeps the order, which `AND` alone would not:
/// <https://www.postgresql.org/docs/current/sql-expressions.html#SYNTAX-EXPRESS-EVAL>. If the row has been written since
/// the statement began to look, the condition is tried on the new version once more, and the lock is taken twice; `Unlock`
/// lets go of it as often.
///
/// Without a row the lock may be ours or not: another session holds it, a fenced transaction is open, or the row is gone or
/// another key's. `Queue` finds out.
///
/// `Again` does not ask for the row of the era. A session outlives neither the server nor the database's name, so the row is
/// there as it was when the session drew its token before. Only who drops the catalog and makes it anew, or restores it
/// in place, takes it away. The key's last term was this session's, a few milliseconds ago, so all that the promise asks for
/// is a token above that one's; where it is not, the session notices, and has it drawn again. A session that queues need not
/// have drawn one.
fn take_known(verb: Verb, shape: Shape) -> String {
    let fence_lock = shape.fence_lock();
    let taken = match verb {
        Verb::Again => format!(
            "WHEN {taken} THEN pg_catalog.pg_try_advisory_xact_lock({fence_lock})",
            taken = shape.try_lock()
        ),
        _ => format!(
            "WHEN NOT {era} THEN false \
             WHEN {taken} \
             THEN (pg_catalog.pg_advisory_xact_lock({fence_lock}))::text = ''",
            era = era!(),
            taken = shape.wait_for_lock()
        ),
    };
    format!(
        "UPDATE dsync.lock AS lock \
         SET token = pg_catalog.nextval('dsync.token'), annotation = $4::bytea, \
             pid = pg_catalog.pg_backend_pid(), since = pg_catalog.clock_timestamp() \
         WHERE lock.id = $1::int8 AND lock.pair = {pair} \
         AND CASE WHEN lock.namespace <> $2::text OR lock.key <> $3::text THEN false {taken} ELSE false END \
         RETURNING lock.token",
        pair = shape.pair
    )
}
