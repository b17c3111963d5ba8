//! The statements by which successes of work that is done once a period are recorded, read and forgotten.

use super::fence;

/// How the transaction of a statement is to be committed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Commit {
    /// As the application has it, whose transaction it is.
    AsItIs,
    /// Written to the disk, and to a synchronous standby, before the answer.
    Synchronous,
}

/// Records behind the fence when work began that has succeeded: `$1` to `$4` as [`fence`] has them, `$5` the beginning. Gives a row unless
/// the term is over. The row of the term tells namespace and name.
///
/// Runs where [`fence`] does, or on a session of ours.
pub(crate) fn record_success(pair: bool, commit: Commit) -> String {
    let commit = match commit {
        Commit::AsItIs => "",
        // The sessions of locks commit without waiting for the disk.
        Commit::Synchronous => "AND pg_catalog.set_config('synchronous_commit', 'on', true) IS NOT NULL ",
    };
    format!(
        "WITH fenced AS MATERIALIZED ({fence}) \
         INSERT INTO dsync.success AS known (namespace, key, started) \
         SELECT lock.namespace, lock.key, $5::pg_catalog.timestamptz FROM fenced, dsync.lock AS lock \
         WHERE lock.id OPERATOR(pg_catalog.=) $1::pg_catalog.int8 AND lock.pair OPERATOR(pg_catalog.=) $2::pg_catalog.bool \
         {commit}\
         ON CONFLICT (namespace, key) DO UPDATE SET started = excluded.started RETURNING true",
        fence = fence(pair)
    )
}

/// When work began that succeeded last, or null; and the time: `$1` namespace and `$2` name of the key. Gives no row on a standby, which may
/// not know of a success yet. It is a logged table, so a load balancer would have it read there; it does not where it sees functions that
/// are volatile, as both are:
/// <https://www.pgpool.net/docs/latest/en/html/runtime-config-load-balancing.html>.
pub(crate) const LAST_SUCCESS: &str = "SELECT (SELECT known.started FROM dsync.success AS known \
     WHERE known.namespace = $1::text AND known.key = $2::text), pg_catalog.clock_timestamp() WHERE NOT pg_is_in_recovery()";

/// Forgets a success: parameters as [`LAST_SUCCESS`]. Gives a row if there was one.
pub(crate) const FORGET_SUCCESS: &str = "WITH durably AS MATERIALIZED ( \
         SELECT pg_catalog.set_config('synchronous_commit', 'on', true) AS is_set) \
     DELETE FROM dsync.success AS known USING durably \
     WHERE known.namespace = $1::text AND known.key = $2::text AND durably.is_set IS NOT NULL RETURNING true";
