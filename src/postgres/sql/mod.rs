//! The SQL of the library, with the reasons; what a wait is wrapped in is in [`quiet`].
//!
//! A role may come with any `search_path`. The lock sessions set one of their own, so their statements need not care; what
//! runs on a connection of the application's names schemas, types and operators in full.

use std::time::Duration;

pub(crate) mod quiet;
pub(crate) mod schema;

use crate::key::AdvisoryKey;

/// Makes the catalog's tables, sequence and views; or brings them up to date, or refuses what somebody else has made there.
pub(crate) const CATALOG: &str = concat!(
    include_str!("catalog.sql"),
    "DO $check$\nDECLARE problem text := (SELECT found.text FROM (\n",
    include_str!("catalog_check.sql"),
    ") AS found);\nBEGIN\n    IF problem IS NOT NULL THEN RAISE EXCEPTION '%', problem USING ERRCODE = 'ZDS01'; END IF;\n    \
     INSERT INTO dsync.version (version) VALUES (2)\n    \
     ON CONFLICT (sole) DO UPDATE SET version = excluded.version WHERE version.version < excluded.version;\n\
     END $check$;\n\nRESET search_path;\n"
);

/// What speaks against the schema, if anything does, whether that is about trust, and whether all of this version's catalog is
/// there. It reads nothing but `pg_catalog`, and so neither runs anybody's code nor puts an error into the server's log
/// where there is no catalog.
pub(crate) const CATALOG_CHECK: &str = concat!(
    "WITH found AS MATERIALIZED (",
    include_str!("catalog_check.sql"),
    ") SELECT (SELECT text FROM found), (SELECT about_trust FROM found), \
        (SELECT count(*) = 6 AND bool_or(class.relname = 'era' AND class.relnatts = 4) \
         FROM pg_class AS class JOIN pg_namespace AS schema ON schema.oid = class.relnamespace \
         WHERE schema.nspname = 'dsync' \
         AND class.relname IN ('version', 'token', 'era', 'lock', 'locks', 'waiters'))"
);

/// Whether there is the schema, and whether all that is there is this very role's own and as the library makes it, which is
/// how it mostly is. It takes less than half of the time that [`CATALOG_CHECK`] does, most of which a new backend spends on
/// looking things up; what this does not say yes to, that decides.
pub(crate) const CATALOG_IS_OWN: &str = "WITH object AS MATERIALIZED ( \
         SELECT class.*, schema.nspowner FROM pg_namespace AS schema LEFT JOIN pg_class AS class \
         ON class.relnamespace = schema.oid AND class.relname IN ('version', 'token', 'era', 'lock', 'locks', 'waiters') \
         WHERE schema.nspname = 'dsync') \
     SELECT count(*) > 0, count(*) = 6 AND bool_and( \
         pg_get_userbyid(nspowner) = current_user AND pg_get_userbyid(relowner) = current_user \
         AND CASE relname WHEN 'version' THEN relkind = 'r' AND relpersistence = 'p' AND relnatts = 2 \
                          WHEN 'token' THEN relkind = 'S' AND relpersistence = 'p' \
                          WHEN 'era' THEN relkind = 'r' AND relpersistence = 'u' AND relnatts = 4 \
                          WHEN 'lock' THEN relkind = 'r' AND relpersistence = 'u' AND relnatts = 8 \
                          ELSE relkind = 'v' END \
         AND NOT relhastriggers AND NOT relhassubclass AND NOT relrowsecurity AND relhasrules = (relkind = 'v')) \
     AND NOT EXISTS ( \
         SELECT FROM object JOIN pg_depend AS part ON part.refobjid = object.oid AND part.refclassid = 'pg_class'::regclass \
         JOIN pg_depend AS used ON used.classid = part.classid AND used.objid = part.objid \
         WHERE relkind <> 'v' AND part.classid <> 'pg_rewrite'::regclass \
         AND used.refclassid IN ('pg_proc'::regclass, 'pg_type'::regclass, 'pg_operator'::regclass)) \
     AND NOT EXISTS ( \
         SELECT FROM object JOIN pg_depend AS used ON used.classid = 'pg_class'::regclass AND used.objid = object.oid \
         AND used.refclassid = 'pg_type'::regclass) \
     FROM object";

/// The version of the catalog.
pub(crate) const CATALOG_VERSION: &str = "SELECT version FROM dsync.version";

/// The setting that tells our sessions apart, of no meaning to the server.
const MARK: &str = "dsync.session";

/// What every lock session is set to, whatever its role or database brought along:
///
/// - `statement_timeout`, `transaction_timeout` (17+) and `idle_in_transaction_session_timeout` would end a wait;
/// - `idle_session_timeout` would end a session that waits in the pool, and is the lease while a claim lasts;
/// - `lock_timeout` is the slice of a wait;
/// - read-only or repeatable-read transactions could not write the term's row after the wait;
/// - `synchronous_commit` would make one acquisition in 32 wait for the disk, and for a standby, which may be gone. What a
///   crash takes back of the tokens is jumped over: see [`NEW_ERA`];
/// - the plans of the statements do not depend on the key, so there is no need to make five before one is kept;
/// - `search_path` could put somebody else's functions and operators in the place of PostgreSQL's.
///
/// A setting that the server's version does not know is left out.
fn settings(slice: Duration) -> Vec<(&'static str, String)> {
    let fixed = [
        ("statement_timeout", "0"),
        ("transaction_timeout", "0"),
        ("idle_in_transaction_session_timeout", "0"),
        ("idle_session_timeout", "0"),
        ("default_transaction_read_only", "off"),
        ("default_transaction_isolation", "read committed"),
        ("synchronous_commit", "off"),
        ("plan_cache_mode", "force_generic_plan"),
        ("search_path", "pg_catalog, pg_temp"),
    ];
    let slice = ("lock_timeout", slice.as_millis().to_string());
    fixed.map(|(name, value)| (name, value.to_owned())).into_iter().chain([slice]).collect()
}

/// Settings by which the server notices a client that is gone. Each is refused somewhere (by managed servers, by systems
/// that cannot do it), and a refusal is no error.
///
/// `client_connection_check_interval` lets a *waiting* session notice that its client died, so that it leaves the
/// queue: <https://www.postgresql.org/docs/current/runtime-config-connection.html>.
pub(crate) fn notice_dead_clients(lease: Duration, heartbeat: Duration) -> Vec<(&'static str, String)> {
    // A silent client is given up after two of these. That must not be before the lease is over, or the lock would be
    // free while its holder may still believe in it.
    let seconds = lease.as_secs() / 2 + 1;
    // A holder that is heard but hears nothing renews its lease once more, by a heartbeat whose answer is never
    // acknowledged. With this it is replaced within the lease all the same. A term must be shorter by that: see
    // `LeasePlan::term`.
    let unacknowledged = lease.saturating_sub(heartbeat);
    vec![
        ("client_connection_check_interval", "1s".to_owned()),
        ("tcp_keepalives_idle", seconds.to_string()),
        ("tcp_keepalives_interval", seconds.to_string()),
        ("tcp_keepalives_count", "2".to_owned()),
        ("tcp_user_timeout", unacknowledged.as_millis().to_string()),
    ]
}

/// Sets one setting, in a statement of its own.
pub(crate) fn set(name: &str, value: &str) -> String {
    format!("SELECT pg_catalog.set_config('{name}', '{value}', false)")
}

/// Prepares a session in one round trip: says what the session must be checked for, sets it up, and puts the mark into it
/// by which our sessions are told apart.
///
/// Gives: backend, whether it is a standby, version, mark, and the port of the server's client (null for a Unix socket). A
/// backend that had a mark before is left as it is, and the
/// mark is null: a pooler has lent us one that another session of ours uses, or used. Then it is to be done again,
/// `by_locks`, which tells the two apart: one that holds a lock is not ours alone. Not at once, since merely to read the
/// question for its locks takes a new backend a millisecond.
pub(crate) fn prepare_session(
    slice: Duration,
    more: &[(&'static str, String)],
    mark: u64,
    by_locks: bool,
) -> String {
    // With its schema even the operator: the role's own search path is in force still.
    let ours = if by_locks {
        "NOT EXISTS (SELECT FROM pg_catalog.pg_locks AS own \
                     WHERE own.locktype OPERATOR(pg_catalog.=) 'advisory' \
                     AND own.pid OPERATOR(pg_catalog.=) pg_catalog.pg_backend_pid())"
            .to_owned()
    } else {
        format!("pg_catalog.current_setting('{MARK}', true) IS NULL")
    };
    let set: String = settings(slice)
        .iter()
        .chain(more)
        .map(|(name, value)| {
            format!(
                ", CASE WHEN backend.ours AND pg_catalog.current_setting('{name}', true) IS NOT NULL \
                   THEN pg_catalog.set_config('{name}', '{value}', false) END"
            )
        })
        .collect();
    // With `OFFSET 0` the backend is looked at once, and first.
    format!(
        "SELECT pg_catalog.pg_backend_pid(), pg_catalog.pg_is_in_recovery(), \
                pg_catalog.current_setting('server_version_num'), \
                CASE WHEN backend.ours THEN pg_catalog.set_config('{MARK}', '{mark}', false) END, \
                pg_catalog.inet_client_port(){set} \
         FROM (SELECT {ours} AS ours OFFSET 0) AS backend"
    )
}

/// What the statements of a claim depend on, beside their parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    /// The key is a pair of 32-bit numbers. It is given as one number all the same: the first is its upper half.
    pub(crate) pair: bool,
    /// Each term is written into the catalog.
    pub(crate) catalog: bool,
}

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
    let key = shape.numbers("$1::pg_catalog.int8");
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
                "SELECT pg_catalog.pg_advisory_unlock({key}), pg_catalog.pg_advisory_unlock_all(), \
                        pg_catalog.set_config('idle_session_timeout', '0', false), \
                        pg_catalog.set_config('application_name', NULL, false)"
            );
        }
        Verb::UnlockOnly => {
            return format!(
                "SELECT pg_catalog.pg_advisory_unlock({key}), pg_catalog.pg_advisory_unlock_all()"
            );
        }
    };
    if shape.catalog {
        take_unknown(&granted, settings, verb, shape)
    } else {
        format!("SELECT {granted}, NULL::int8, NULL::text, NULL::text{settings}")
    }
}

impl Shape {
    /// The arguments of an advisory lock's functions for a key that is one number in SQL. With whatever search path.
    fn numbers(self, number: &str) -> String {
        if self.pair {
            format!(
                "(({number}) OPERATOR(pg_catalog.>>) 32)::pg_catalog.int4, \
                 (({number}) OPERATOR(pg_catalog.<<) 32 OPERATOR(pg_catalog.>>) 32)::pg_catalog.int4"
            )
        } else {
            number.to_owned()
        }
    }

    /// Takes the lock if it is free, twice: see [`heartbeat`].
    fn try_lock(self) -> String {
        let key = self.numbers("$1::pg_catalog.int8");
        let once = format!("pg_catalog.pg_try_advisory_lock({key})");
        format!("CASE WHEN {once} THEN {once} ELSE false END")
    }

    /// Waits for the lock, and takes it twice. The type of the function's result is `void`, which is the empty text.
    fn wait_for_lock(self) -> String {
        let key = self.numbers("$1::pg_catalog.int8");
        format!(
            "CASE WHEN (pg_catalog.pg_advisory_lock({key}))::text = '' \
             THEN pg_catalog.pg_try_advisory_lock({key}) ELSE false END"
        )
    }

    /// The advisory lock that a fenced transaction shares, and that a term takes for itself for a moment at its beginning.
    /// So a term knows at once, without a look at its row, whether it has to wait for fenced transactions.
    ///
    /// That a key of the application's has this number is as unlikely as that two names have one hash.
    fn gate(self) -> String {
        self.numbers(&format!("$1::pg_catalog.int8 OPERATOR(pg_catalog.#) {GATE}::pg_catalog.int8"))
    }
}

/// Whether the era has begun: its row names the file that it is in, which tells this database and this table from all
/// others, and the time when the server was started. Neither can come out of a dump, or out of a copy of the database or of
/// its folder, though the row itself may.
macro_rules! era {
    () => {
        "EXISTS (SELECT FROM dsync.era AS era \
         WHERE era.place = pg_catalog.pg_relation_filepath('dsync.era') \
         AND era.server = pg_catalog.pg_postmaster_start_time())"
    };
}

/// "dsync ga" in ASCII, of no meaning.
const GATE: i64 = 0x6473_796e_6320_6761;

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
/// take back the lease if it failed there, so it does not wait for the gate.
fn take_unknown(granted: &str, settings: &str, verb: Verb, shape: Shape) -> String {
    let (pair, gate) = (shape.pair, shape.gate());
    let row = format!("dsync.lock AS lock WHERE lock.id = $1::int8 AND lock.pair = {pair}");
    let passed = match verb {
        Verb::Try => format!("pg_catalog.pg_try_advisory_xact_lock({gate})"),
        _ => format!("(pg_catalog.pg_advisory_xact_lock({gate}))::text = ''"),
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
/// The condition takes the lock, and the gate after it. `CASE` keeps the order, which `AND` alone would not:
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
    let gate = shape.gate();
    let taken = match verb {
        Verb::Again => format!(
            "WHEN {taken} THEN pg_catalog.pg_try_advisory_xact_lock({gate})",
            taken = shape.try_lock()
        ),
        _ => format!(
            "WHEN NOT {era} THEN false \
             WHEN {taken} \
             THEN (pg_catalog.pg_advisory_xact_lock({gate}))::text = ''",
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

/// Where [`new_era`] is to ask for the timeline, which a promotion raises. Some services refuse it; without, it is 1.
pub(crate) const TIMELINE: &str =
    "('x' || left(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_lsn()), 8))::bit(32)::int8";

/// Makes tokens go on above all that were given out before, once for all sessions.
///
/// What the sequence says may be too little, after a crash or a promotion, since every 32nd value is logged only, and nobody
/// waits for that to reach a disk or a standby; and after a restore, or where the catalog was dropped and made again. So
/// two things are counted on, each of which is enough:
///
/// - **The clock**, in microseconds. An era begins at the clock, and tokens are drawn more slowly than once a microsecond, so
///   none is ever above the clock, and an era that begins later begins above it. This needs nothing to be remembered, and
///   so covers dumps, copies and `DROP SCHEMA`, however many crashes there were. It needs clocks that agree: the server that
///   takes over must not be behind by more than the time from the last era's beginning.
/// - **The sequence and a jump** of 2²⁰, where the clock was set back. In a crash what was drawn since the last flush is
///   lost; the server flushes within three times its `wal_writer_delay`, which is 0.6 s, and 2²⁰ are a million terms. The jump
///   grows with the timeline: so the era after a promotion begins above one after a crash of which the standby never heard.
///
/// Where the jump would lead above the clock, since the last era began less than a second ago, the difference is waited for.
/// Otherwise a row of quick crashes would leave the sequence above the clock, and the next catalog would begin below it.
///
/// The jump itself is safe before anybody sees the row of the era. Who comes while another session makes it waits for that,
/// however short the slices are.
pub(crate) fn new_era(timeline: &str) -> String {
    const JUMP: i64 = 1 << 20;
    const CLOCK: &str = "(extract(epoch FROM pg_catalog.clock_timestamp()) * 1000000)::int8";
    format!(
        "SELECT pg_catalog.set_config('synchronous_commit', 'on', true), \
                pg_catalog.set_config('lock_timeout', '2s', true); \
         WITH made AS ( \
             INSERT INTO dsync.era AS era (place, server) \
             VALUES (pg_catalog.pg_relation_filepath('dsync.era'), pg_catalog.pg_postmaster_start_time()) \
             ON CONFLICT (sole) DO UPDATE \
             SET place = excluded.place, server = excluded.server, since = excluded.since \
             WHERE era.place IS DISTINCT FROM excluded.place OR era.server IS DISTINCT FROM excluded.server \
             RETURNING true), \
         known AS MATERIALIZED (SELECT pg_catalog.nextval('dsync.token') AS token, {CLOCK} AS clock FROM made), \
         waited AS MATERIALIZED ( \
             SELECT token + CASE WHEN clock < token THEN {JUMP} * {timeline} ELSE {JUMP} END AS least, \
                    CASE WHEN clock BETWEEN token AND token + {JUMP} \
                         THEN pg_catalog.pg_sleep((token + {JUMP} - clock) / 1000000.0) END \
             FROM known) \
         SELECT pg_catalog.setval('dsync.token', greatest(least, {CLOCK})) FROM waited"
    )
}

/// Leaves the session without any lock, lease and name, whether it had the lock or not. Unlike
/// `pg_advisory_unlock` it does not put a warning into the server's log if it had not.
///
/// Tells whether the server has none of the `lost` backends any more, with whatever they held or queued for.
pub(crate) fn settle(lost: &[i32]) -> String {
    let clear = if lost.is_empty() {
        "true".to_owned()
    } else {
        let lost = lost.iter().map(i32::to_string).collect::<Vec<_>>().join(", ");
        format!(
            "NOT EXISTS (SELECT FROM pg_catalog.pg_stat_get_activity(NULL) AS backend WHERE backend.pid IN ({lost}))"
        )
    };
    format!(
        "SELECT pg_catalog.pg_advisory_unlock_all(), \
                pg_catalog.set_config('idle_session_timeout', '0', false), \
                pg_catalog.set_config('application_name', NULL, false), \
                {clear}"
    )
}

/// Renews the lease, as any message does, and shows that the session is the one that took the lock, on a primary, and holds
/// it still. Gives: backend, whether it is a standby, mark, whether `held` is held.
///
/// The mark tells a backend that a pooler has lent to another of our sessions in between. The lock itself can be gone while
/// backend and session are the same: something else that speaks on our connection, a pooler or a child process, has said
/// `pg_advisory_unlock_all`.
///
/// A session counts how often it has taken a lock. A term's is taken twice; so to give it back once and to take it again shows
/// that it is held, and it is not free in between. That looks at the session's own memory only. (To read `pg_locks` copies the
/// whole server's table of locks, whoever has them, for each heartbeat of each lock.) Nothing can
/// interrupt the server between the two calls.
pub(crate) fn heartbeat(held: Option<AdvisoryKey>) -> String {
    let holds = held.map_or_else(
        || "true".to_owned(),
        |key| {
            let shape = Shape { pair: key.is_pair(), catalog: false };
            let key = shape.numbers(&format!("'{}'::pg_catalog.int8", key.id()));
            format!(
                "CASE WHEN pg_catalog.pg_advisory_unlock({key}) THEN pg_catalog.pg_try_advisory_lock({key}) ELSE false END"
            )
        },
    );
    format!(
        "SELECT pg_catalog.pg_backend_pid(), pg_catalog.pg_is_in_recovery(), \
                pg_catalog.current_setting('dsync.session', true), {holds}"
    )
}

/// Whether the role has the rights on the catalog, whether the era has begun, and whether there are rows of old terms.
pub(crate) const CATALOG_STATE: &str = concat!(
    "SELECT \
     pg_catalog.has_table_privilege('dsync.lock', 'SELECT') AND \
     pg_catalog.has_table_privilege('dsync.lock', 'INSERT') AND \
     pg_catalog.has_table_privilege('dsync.lock', 'UPDATE') AND \
     pg_catalog.has_table_privilege('dsync.era', 'SELECT') AND \
     pg_catalog.has_table_privilege('dsync.era', 'INSERT') AND \
     pg_catalog.has_table_privilege('dsync.era', 'UPDATE') AND \
     pg_catalog.has_sequence_privilege('dsync.token', 'USAGE') AND \
     pg_catalog.has_sequence_privilege('dsync.token', 'UPDATE'), \
     ",
    era!(),
    ", EXISTS (SELECT FROM dsync.lock WHERE since < now() - interval '1 day')"
);

/// How long a statement that looks at the catalog waits for a table that somebody has locked.
pub(crate) fn wait_for_tables(patience: Duration) -> String {
    format!("SET LOCAL lock_timeout = {}; ", patience.as_millis().max(1))
}

/// Forgets the rows of locks that nobody has held for a day, so that the table does not grow with every key ever used.
///
/// A row that is taken up again meanwhile has a new `since` when the deletion comes to it, and stays; one that a fenced
/// transaction has is left for another day. It waits for nobody for long, and ends by itself if we do not.
pub(crate) const CATALOG_CLEANING: &str = "SET LOCAL lock_timeout = '100ms'; SET LOCAL statement_timeout = '2s'; \
     DELETE FROM dsync.lock AS gone USING ( \
         SELECT lock.id, lock.pair FROM dsync.lock AS lock \
         WHERE lock.since < now() - interval '1 day' AND NOT EXISTS ( \
             SELECT FROM pg_locks AS held WHERE held.locktype = 'advisory' \
             AND (held.classid::int8 << 32 | held.objid::int8) = lock.id) \
         LIMIT 10000 FOR UPDATE SKIP LOCKED) AS old \
     WHERE gone.id = old.id AND gone.pair = old.pair";

/// Begins the making of the catalog. Of many processes that want to make it at once, one does: `CREATE … IF NOT EXISTS`
/// alone does not stand that. The number is of no meaning: "dsync" in ASCII.
///
/// A process that is frozen or cut off between two of its statements must not hold up the others: its session ends after a
/// pause of 2 s. No statement takes longer than `patience`, so that the server says what is in the way before we give up.
pub(crate) fn begin_creation(patience: Duration) -> String {
    let patience = patience.as_millis().max(1);
    format!(
        "BEGIN; SET LOCAL client_min_messages = warning; SET LOCAL synchronous_commit = on; \
         SET LOCAL idle_in_transaction_session_timeout = '2s'; \
         SET LOCAL lock_timeout = {patience}; SET LOCAL statement_timeout = {patience}; \
         SELECT pg_catalog.pg_advisory_xact_lock(431500391011)"
    )
}

/// Ends the making of the catalog, in one message with the script. The script takes the `search_path` back to the role's;
/// ours is another one.
pub(crate) const END_CREATION: &str = "SET search_path = pg_catalog, pg_temp; COMMIT";

/// Holds the row of a term while the caller's transaction lasts, if the term's token is still the newest: `$1` key,
/// `$2` whether it is a pair, `$3` token, `$4` the longest pause between two statements, in milliseconds.
///
/// `FOR SHARE` makes a successor's update wait; `FOR KEY SHARE` would not, since the update leaves the key alone. The
/// gate, taken before that, tells a successor of it without a wait; one that has the gate has the lock too, so the term is
/// over. The bound on pauses is what keeps a frozen writer from holding up its successor; a tighter one of the caller's
/// stays. It is set before anything is taken, and nothing is taken for a token that is known to be an old one: a caller that
/// is refused, and lets its transaction stand open, holds up nobody.
///
/// Runs on a connection of the application's, whose `search_path` may be anything.
pub(crate) fn fence(pair: bool) -> String {
    let gate = Shape { pair, catalog: true }.gate();
    format!(
        "SELECT true FROM dsync.lock AS lock, \
              (SELECT pg_catalog.current_setting('idle_in_transaction_session_timeout')::pg_catalog.interval AS now, \
                      ($4::pg_catalog.text OPERATOR(pg_catalog.||) ' ms')::pg_catalog.interval AS longest) AS pause \
         WHERE lock.id OPERATOR(pg_catalog.=) $1::pg_catalog.int8 AND lock.pair OPERATOR(pg_catalog.=) $2::pg_catalog.bool \
           AND CASE WHEN lock.token OPERATOR(pg_catalog.<>) $3::pg_catalog.int8 THEN false \
                    WHEN pg_catalog.set_config('idle_in_transaction_session_timeout', \
                             CASE WHEN pause.now OPERATOR(pg_catalog.>) '0'::pg_catalog.interval \
                                       AND pause.now OPERATOR(pg_catalog.<) pause.longest \
                                  THEN pg_catalog.current_setting('idle_in_transaction_session_timeout') \
                                  ELSE $4::pg_catalog.text END, true) IS NULL THEN false \
                    ELSE pg_catalog.pg_try_advisory_xact_lock_shared({gate}) END \
         FOR SHARE OF lock"
    )
}

/// Whether the term with this token is the newest: `$1` key, `$2` whether it is a pair, `$3` token. And whether row security
/// may hide its row. Runs where [`fence`] does.
pub(crate) const IS_CURRENT: &str = "SELECT EXISTS (SELECT FROM dsync.lock AS lock \
     WHERE lock.id OPERATOR(pg_catalog.=) $1::pg_catalog.int8 AND lock.pair OPERATOR(pg_catalog.=) $2::pg_catalog.bool \
       AND lock.token OPERATOR(pg_catalog.=) $3::pg_catalog.int8), \
     pg_catalog.row_security_active('dsync.lock')";

/// Whether row security may have hidden the row for which [`fence`] looked in vain. Runs where that does.
pub(crate) const IS_HIDDEN: &str = "SELECT pg_catalog.row_security_active('dsync.lock')";

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

/// Who holds and who waits: namespace, key, granted, backend, address, application name, token, annotation, since, seconds
/// of waiting. Of each key, first the holder, then the waiters in their order.
///
/// `pg_locks` is looked at once, so that what comes is the state of one moment. A row whose holder is not the one that
/// has the lock tells nothing of this term; nor does one that is older than the backend, whose process id is used again.
pub(crate) fn inspect(scope: Scope) -> String {
    const THIS_KEY: &str =
        "AND (locks.classid::int8 << 32 | locks.objid::int8) = $1::int8 AND (locks.objsubid = 2) = $2::bool";
    let (which, row) = match scope {
        Scope::All => ("", "JOIN dsync.lock AS lock ON lock.id = found.id AND lock.pair = found.pair"),
        Scope::One { catalog: true } => (
            THIS_KEY,
            "LEFT JOIN dsync.lock AS lock ON lock.id = found.id AND lock.pair = found.pair \
             AND lock.namespace = $3::text AND lock.key = $4::text",
        ),
        Scope::One { catalog: false } => (
            THIS_KEY,
            "CROSS JOIN (SELECT $3::text AS namespace, $4::text AS key, NULL::int8 AS token, \
                                NULL::bytea AS annotation, NULL::int4 AS pid, NULL::timestamptz AS since) AS lock",
        ),
    };
    format!(
        "WITH found AS MATERIALIZED ( \
             SELECT locks.pid, locks.granted, locks.waitstart, pg_catalog.clock_timestamp() AS now, \
                    (locks.classid::int8 << 32 | locks.objid::int8) AS id, (locks.objsubid = 2) AS pair \
             FROM pg_locks AS locks WHERE locks.locktype = 'advisory' \
             AND locks.database = (SELECT oid FROM pg_database WHERE datname = current_database()) {which}) \
         SELECT lock.namespace, lock.key, found.granted, found.pid, activity.client_addr, activity.application_name, \
                CASE WHEN term.holds THEN lock.token END, CASE WHEN term.holds THEN lock.annotation END, \
                CASE WHEN term.holds THEN lock.since END, \
                coalesce(greatest(extract(epoch FROM found.now - found.waitstart)::float8, 0), 0) \
         FROM found {row} \
         LEFT JOIN pg_stat_activity AS activity ON activity.pid = found.pid \
         CROSS JOIN LATERAL (SELECT found.granted AND found.pid = lock.pid \
                                    AND coalesce(activity.backend_start <= lock.since, true) AS holds) AS term \
         ORDER BY lock.namespace, lock.key, found.id, found.pair, found.granted DESC, \
                  term.holds DESC NULLS LAST, found.waitstart NULLS LAST, found.pid"
    )
}

/// What a session is called while it serves a lock: what the application calls itself, and the key.
///
/// The server keeps 63 bytes of ASCII. It would send a notice with every lock if it had to cut off the rest itself, and an
/// error if it could not write a character in the database's encoding.
pub(crate) fn application_name(own: &str, key: &str) -> String {
    let letters = own.chars().chain([' ']).chain(key.chars());
    letters.take(63).map(|letter| if (' '..='~').contains(&letter) { letter } else { '?' }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_a_session_fits_into_what_the_server_keeps() {
        assert_eq!(application_name("dsync", "billing/run"), "dsync billing/run");
        assert_eq!(application_name("dsync", &"x".repeat(1024)).len(), 63);
        assert_eq!(application_name("dsync", "schl\u{fc}ssel\n"), "dsync schl?ssel?");
    }
}
