//! The SQL of the library, all of it, with the reasons.
//!
//! Functions are named with their schema, since a role may come with any `search_path`.

use std::time::Duration;

/// The catalog's tables, sequence and views.
pub(super) const CATALOG: &str = include_str!("catalog.sql");

/// What every lock session is set to, whatever its role or database brought along:
///
/// - `statement_timeout`, `transaction_timeout` (17+) and `idle_in_transaction_session_timeout` would end a wait;
/// - `idle_session_timeout` would end a session that waits in the pool, and is the lease while a claim lasts;
/// - `lock_timeout` is the slice of a wait;
/// - read-only or repeatable-read transactions could not write the term's row after the wait;
/// - without `synchronous_commit` a crash could take back the use of a token, and give it out again.
///
/// A setting that the server's version does not know is left out. Answers with what the session must be checked for.
pub(super) fn prepare_session(slice: Duration) -> String {
    format!(
        "SELECT pg_catalog.set_config(wanted.name, wanted.setting, false) \
         FROM (VALUES ('statement_timeout', '0'), ('transaction_timeout', '0'), \
                      ('idle_in_transaction_session_timeout', '0'), ('idle_session_timeout', '0'), \
                      ('lock_timeout', '{slice}'), ('default_transaction_read_only', 'off'), \
                      ('default_transaction_isolation', 'read committed'), ('synchronous_commit', 'on')) \
              AS wanted (name, setting) \
         WHERE pg_catalog.current_setting(wanted.name, true) IS NOT NULL; \
         SELECT pg_catalog.pg_backend_pid(), pg_catalog.pg_is_in_recovery(), \
                pg_catalog.current_setting('server_version_num')",
        slice = slice.as_millis()
    )
}

/// Settings by which the server notices a client that is gone. Each is refused somewhere (by managed servers, by systems
/// that cannot do it), so each is a statement of its own, and a refusal is no error.
///
/// `client_connection_check_interval` lets a *waiting* session notice that its client died, so that it leaves the
/// queue: <https://www.postgresql.org/docs/current/runtime-config-connection.html>.
pub(super) fn notice_dead_clients(lease: Duration) -> [String; 5] {
    let seconds = (lease.as_secs() / 3).clamp(1, 10);
    [
        "SET client_connection_check_interval = '1s'".to_owned(),
        format!("SET tcp_keepalives_idle = {seconds}"),
        format!("SET tcp_keepalives_interval = {seconds}"),
        "SET tcp_keepalives_count = 3".to_owned(),
        format!("SET tcp_user_timeout = {}", lease.as_millis()),
    ]
}

/// What the statements of a claim depend on, beside their parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    /// The key is a pair of 32-bit numbers. It is given as one number all the same: the first is its upper half.
    pub(super) pair: bool,
    /// Each term is written into the catalog.
    pub(super) catalog: bool,
}

/// The statements of a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verb {
    /// Asks for the lock without waiting, and puts the lease on the session. Gives: granted, token, rival.
    ///
    /// The lease goes on in a statement that succeeds whether the lock is had or not, and so before the first wait: a
    /// wait that ends in an error would take it back, and it can end so *after* the lock was granted. A session that
    /// waits is not idle, so the lease does it no harm.
    Try,
    /// Queues for the lock until `lock_timeout`. Gives the same.
    ///
    /// If the slice before ended in an error *after* the lock had been granted, this takes it a second time, at once.
    /// [`Unlock`](Self::Unlock) lets go of it as often as it was taken.
    Queue,
    /// Gives the lock back, says whether it was held, and takes the lease off the session. Key as above.
    ///
    /// The session holds this one lock only, so letting go of all is letting go of it, however often it was taken.
    Unlock,
}

/// The text of a statement. Parameters: `$1` key; for `Try` and `Queue` also `$2` lease in milliseconds, as text, `$3`
/// application name, and with the catalog `$4` namespace, `$5` name of the key, `$6` annotation.
pub(super) fn statement(verb: Verb, shape: Shape) -> String {
    let key = if shape.pair { "($1::int8 >> 32)::int4, ($1::int8 << 32 >> 32)::int4" } else { "$1::int8" };
    let (granted, settings) = match verb {
        Verb::Try => (
            format!("pg_catalog.pg_try_advisory_lock({key})"),
            ", pg_catalog.set_config('idle_session_timeout', $2::text, false), \
               pg_catalog.set_config('application_name', $3::text, false)",
        ),
        // The type of its result is `void`, which is the empty text. The settings stand from the `Try` before, and are
        // named only for the parameters to be the same.
        Verb::Queue => (
            format!("(pg_catalog.pg_advisory_lock({key}))::text = ''"),
            ", $2::text AS lease, $3::text AS application_name",
        ),
        Verb::Unlock => {
            return format!(
                "SELECT pg_catalog.pg_advisory_unlock({key}), pg_catalog.pg_advisory_unlock_all(), \
                        pg_catalog.set_config('idle_session_timeout', '0', false)"
            );
        }
    };
    if shape.catalog {
        acquire_with_catalog(&granted, settings, shape.pair)
    } else {
        format!("SELECT {granted}, NULL::int8, NULL::text{settings}")
    }
}

/// Lock, token and row in one statement. The row is written after the lock was granted, since its source is the grant;
/// and so are the tokens drawn, in the order of the grants.
///
/// Where a row of *another* name has this id, nothing is written, and the other name is given: two names with one hash.
/// Without the lock the row tells of that as well, or the two would wait for each other in one process for ever.
///
/// If a fenced transaction of the former holder is still open, the update of the row waits for it, up to `lock_timeout`.
fn acquire_with_catalog(granted: &str, settings: &str, pair: bool) -> String {
    format!(
        "WITH attempt AS MATERIALIZED (SELECT {granted} AS granted{settings}), \
         term AS ( \
             INSERT INTO dsync.lock AS lock (id, pair, namespace, key, token, annotation, pid, since) \
             SELECT $1::int8, {pair}, $4::text, $5::text, pg_catalog.nextval('dsync.token'), $6::bytea, \
                    pg_catalog.pg_backend_pid(), pg_catalog.clock_timestamp() \
             FROM attempt WHERE granted \
             ON CONFLICT (id, pair) DO UPDATE \
             SET token = excluded.token, annotation = excluded.annotation, pid = excluded.pid, since = excluded.since \
             WHERE lock.namespace = excluded.namespace AND lock.key = excluded.key \
             RETURNING lock.token) \
         SELECT attempt.granted, term.token, CASE WHEN term.token IS NULL THEN ( \
                    SELECT other.namespace || ':' || other.key FROM dsync.lock AS other \
                    WHERE other.id = $1::int8 AND other.pair = {pair} \
                      AND (other.namespace, other.key) <> ($4::text, $5::text)) END \
         FROM attempt LEFT JOIN term ON true"
    )
}

/// Leaves the session without any lock and without the lease, whether it had the lock or not. Unlike
/// `pg_advisory_unlock` it does not put a warning into the server's log if it had not.
pub(super) const SETTLE: &str = "SELECT pg_catalog.pg_advisory_unlock_all(), \
     pg_catalog.set_config('idle_session_timeout', '0', false)";

/// Renews the lease, as any message does, and shows that the session is the one that took the lock, on a primary.
pub(super) const HEARTBEAT: &str = "SELECT pg_catalog.pg_backend_pid(), pg_catalog.pg_is_in_recovery()";

/// The version of the catalog, and whether the role has the rights on it.
pub(super) const CATALOG_STATE: &str = "SELECT version, \
     pg_catalog.has_table_privilege('dsync.lock', 'SELECT') AND \
     pg_catalog.has_table_privilege('dsync.lock', 'INSERT') AND \
     pg_catalog.has_table_privilege('dsync.lock', 'UPDATE') AND \
     pg_catalog.has_sequence_privilege('dsync.token', 'USAGE') FROM dsync.version";

/// Forgets the rows of locks that nobody has held for a day, so that the table does not grow with every key ever used.
///
/// A row that is taken up again meanwhile has a new `since` when the deletion comes to it, and stays.
pub(super) const CATALOG_CLEANING: &str = "DELETE FROM dsync.lock \
     WHERE since < pg_catalog.now() - interval '1 day' AND NOT EXISTS ( \
         SELECT FROM pg_catalog.pg_locks AS held WHERE held.locktype = 'advisory' \
         AND held.classid::int8 << 32 | held.objid::int8 = lock.id)";

/// Creates the catalog. Many processes may do so at once: `CREATE … IF NOT EXISTS` alone does not stand that.
pub(super) fn create_catalog() -> String {
    // The number is of no meaning: "dsync" in ASCII.
    format!(
        "BEGIN; SET LOCAL client_min_messages = warning; SET LOCAL lock_timeout = 0; \
         SELECT pg_catalog.pg_advisory_xact_lock(431500391011); {CATALOG} COMMIT"
    )
}

/// Holds the row of a term while the caller's transaction lasts, if the term's token is still the newest: `$1` key,
/// `$2` whether it is a pair, `$3` token, `$4` the longest pause between two statements, in milliseconds.
///
/// `FOR SHARE` makes a successor's update wait; `FOR KEY SHARE` would not, since the update leaves the key alone. The
/// bound on pauses is what keeps a frozen writer from holding up its successor; a tighter one of the caller's stays.
pub(super) const FENCE: &str = "SELECT pg_catalog.set_config('idle_in_transaction_session_timeout', \
         CASE WHEN pause.now > interval '0' AND pause.now < pause.longest \
              THEN pg_catalog.current_setting('idle_in_transaction_session_timeout') ELSE $4::text END, true) \
     FROM dsync.lock AS lock, \
          (SELECT pg_catalog.current_setting('idle_in_transaction_session_timeout')::interval AS now, \
                  ($4::text || ' ms')::interval AS longest) AS pause \
     WHERE lock.id = $1::int8 AND lock.pair = $2::bool AND lock.token = $3::int8 FOR SHARE OF lock";

/// Whether the term with this token is the newest: `$1` key, `$2` whether it is a pair, `$3` token.
pub(super) const IS_CURRENT: &str =
    "SELECT EXISTS (SELECT FROM dsync.lock WHERE id = $1::int8 AND pair = $2::bool AND token = $3::int8)";
