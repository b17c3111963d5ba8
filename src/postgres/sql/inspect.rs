//! The statement that tells who holds and who waits, and the one that ends a holder's session.

use super::TURNSTILE;
use crate::key::MAX_PERMITS;

/// Whose locks are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scope {
    /// All keys that have a row in the catalog, and whose lock is held or waited for.
    All,
    /// One key: `$1` the key, `$2` whether it is a pair, `$3` namespace and `$4` name, by which its row is known.
    One {
        /// Whether there is a catalog to look into.
        catalog: bool,
    },
}

/// Who holds and who waits: namespace, key, granted, backend (0 of a prepared transaction), address, application name, token, annotation, since, seconds
/// of waiting, shared (null if that is not known). Of each key, first the holders, then the waiters in their order.
///
/// `pg_locks` is looked at once, so that what comes is the state of one moment. A row whose holder is not the one that
/// has the lock tells nothing of this term; nor does one that is older than the backend, whose process id is used again. Of those that
/// share the lock, it tells the token only. Whoever waits for the turnstile of a key waits for the lock, behind those that do so there.
pub(crate) fn inspect(scope: Scope) -> String {
    const THIS_KEY: &str = "AND place.id = $1::int8 AND (locks.objsubid = 2) = $2::bool";
    let (which, row) = match scope {
        Scope::All => (
            "",
            // A permit is told with the others of its semaphore.
            "JOIN dsync.lock AS lock ON lock.id = found.id AND lock.pair = found.pair AND NOT EXISTS ( \
                 SELECT FROM dsync.semaphore AS semaphore WHERE semaphore.id = lock.id & ~1023::int8 AND NOT lock.pair \
                 AND semaphore.namespace = lock.namespace AND semaphore.key = lock.key)",
        ),
        Scope::One { catalog: true } => (
            THIS_KEY,
            "LEFT JOIN dsync.lock AS lock ON lock.id = found.id AND lock.pair = found.pair \
             AND lock.namespace = $3::text AND lock.key = $4::text",
        ),
        Scope::One { catalog: false } => (
            THIS_KEY,
            "CROSS JOIN (SELECT $3::text AS namespace, $4::text AS key, NULL::int8 AS token, \
                                NULL::bytea AS annotation, NULL::int4 AS pid, NULL::timestamptz AS since, NULL::int8 AS readers) AS lock",
        ),
    };
    format!(
        "WITH found AS MATERIALIZED ( \
             SELECT locks.pid, locks.granted, locks.waitstart, pg_catalog.clock_timestamp() AS now, \
                    place.id, (locks.objsubid = 2) AS pair, place.turnstile, \
                    CASE WHEN NOT place.turnstile THEN locks.mode = 'ShareLock' END AS shared \
             FROM pg_locks AS locks \
             CROSS JOIN LATERAL (SELECT (locks.classid::int8 << 32 | locks.objid::int8) AS id) AS number \
             CROSS JOIN LATERAL (SELECT number.id, false AS turnstile \
                                 UNION ALL SELECT number.id # {TURNSTILE}, true WHERE NOT locks.granted) AS place \
             WHERE locks.locktype = 'advisory' \
             AND locks.database = (SELECT oid FROM pg_database WHERE datname = current_database()) {which}) \
         SELECT lock.namespace, lock.key, found.granted, coalesce(found.pid, 0), activity.client_addr, activity.application_name, \
                CASE WHEN term.holds OR found.granted AND found.shared AND lock.readers = lock.token THEN lock.token END, \
                CASE WHEN term.holds THEN lock.annotation END, \
                CASE WHEN term.holds THEN lock.since END, \
                coalesce(greatest(extract(epoch FROM found.now - found.waitstart)::float8, 0), 0), found.shared \
         FROM found {row} \
         LEFT JOIN pg_stat_activity AS activity ON activity.pid = found.pid \
         CROSS JOIN LATERAL (SELECT found.granted AND NOT found.shared AND found.pid = lock.pid \
                                    AND lock.readers IS DISTINCT FROM lock.token \
                                    AND coalesce(activity.backend_start <= lock.since, true) AS holds) AS term \
         ORDER BY lock.namespace, lock.key, found.id, found.pair, found.granted DESC, \
                  term.holds DESC NULLS LAST, found.turnstile, found.waitstart NULLS LAST, found.pid"
    )
}

/// Who holds permits and who waits for them: columns as [`inspect`], and how many permits there are, and which one is held. Of each semaphore,
/// first the holders. `All` gives those that are held or waited for; `One` gives a row with nulls for one that is neither, and none for
/// a semaphore that nobody has said anything of. Its `$1` is the number of the semaphore.
///
/// Of those that wait, the first has the turnstile and looks for a permit, and the others wait for the turnstile.
pub(crate) fn inspect_semaphores(scope: Scope) -> String {
    semaphores(scope, "$1::int8 AND NOT $2::bool")
}

/// The lock and the semaphore with one key: the rows of [`inspect`], with more columns, and those of [`inspect_semaphores`], whose number is `$5`.
pub(crate) fn inspect_both() -> String {
    let one = Scope::One { catalog: true };
    format!(
        "SELECT of_lock.*, NULL::int4, NULL::int4, true FROM ({}) AS of_lock UNION ALL SELECT of_semaphore.* FROM ({}) AS of_semaphore",
        inspect(one),
        semaphores(one, "$5::int8")
    )
}

fn semaphores(scope: Scope, is_number: &str) -> String {
    let (join, which) = match scope {
        Scope::All => ("JOIN", String::new()),
        Scope::One { .. } => (
            "LEFT JOIN",
            format!(
                "WHERE semaphore.id = {is_number} AND semaphore.namespace = $3::text AND semaphore.key = $4::text"
            ),
        ),
    };
    format!(
        "WITH found AS MATERIALIZED ( \
             SELECT locks.pid, locks.waitstart, place.id, place.permit, pg_catalog.clock_timestamp() AS now \
             FROM pg_locks AS locks \
             CROSS JOIN LATERAL (SELECT (locks.classid::int8 << 32 | locks.objid::int8) AS id) AS number \
             CROSS JOIN LATERAL (SELECT number.id & ~{MAX_PERMITS}::int8 AS id, (number.id & {MAX_PERMITS})::int4 AS permit WHERE locks.granted \
                                 UNION ALL SELECT number.id # {TURNSTILE}, NULL) AS place \
             WHERE locks.locktype = 'advisory' AND locks.objsubid = 1 AND locks.mode = 'ExclusiveLock' \
             AND locks.database = (SELECT oid FROM pg_database WHERE datname = current_database())) \
         SELECT semaphore.namespace, semaphore.key, found.permit IS NOT NULL, coalesce(found.pid, 0), activity.client_addr, \
                activity.application_name, \
                CASE WHEN term.holds THEN lock.token END, CASE WHEN term.holds THEN lock.annotation END, \
                CASE WHEN term.holds THEN lock.since END, \
                coalesce(greatest(extract(epoch FROM found.now - found.waitstart)::float8, 0), 0), true, \
                semaphore.permits, found.permit, found.id IS NOT NULL \
         FROM dsync.semaphore AS semaphore {join} found ON found.id = semaphore.id \
         LEFT JOIN dsync.lock AS lock ON lock.id = semaphore.id | found.permit AND NOT lock.pair \
         LEFT JOIN pg_stat_activity AS activity ON activity.pid = found.pid \
         CROSS JOIN LATERAL (SELECT found.pid = lock.pid AND coalesce(activity.backend_start <= lock.since, true) AS holds) AS term \
         {which} \
         ORDER BY semaphore.namespace, semaphore.key, found.permit NULLS LAST, found.waitstart NULLS FIRST, found.pid"
    )
}

/// Ends the session of a backend that holds a lock: `$1` key, `$2` whether it is a pair, `$3` the backend, `$4` how long to wait for its
/// end, in milliseconds. Gives a row if that backend has the lock: whether it has ended.
pub(crate) const END_HOLDER: &str = "SELECT pg_terminate_backend(held.pid, $4::int8) FROM pg_locks AS held \
     WHERE held.locktype = 'advisory' AND held.granted AND held.pid = $3::int4 \
       AND held.database = (SELECT oid FROM pg_database WHERE datname = current_database()) \
       AND (held.classid::int8 << 32 | held.objid::int8) = $1::int8 AND (held.objsubid = 2) = $2::bool \
     LIMIT 1";
