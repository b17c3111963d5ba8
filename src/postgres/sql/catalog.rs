//! The statements that make the catalog, look after it, and let tokens go on after a crash.

use std::time::Duration;

use super::era;

/// Makes the catalog's tables, sequence, views and function; or brings them up to date, or refuses what somebody else has made there.
pub(crate) const CATALOG: &str = concat!(
    include_str!("catalog.sql"),
    "DO $check$\nDECLARE granted record; problem text := (SELECT found.text FROM (\n",
    include_str!("catalog_check.sql"),
    ") AS found);\nBEGIN\n    IF problem IS NOT NULL THEN RAISE EXCEPTION '%', problem USING ERRCODE = 'ZDS01'; END IF;\n    \
     -- Version 2 had no resignations, version 3 no successes and no function, version 5 no semaphores and no policy. Whoever has the locks has these, and not whoever\n    \
     -- brings them up to date, whom others need not trust; whoever may use the locks may use these.\n    \
     FOR granted IN\n        \
     SELECT known.version AS version, quote_ident(pg_get_userbyid(class.relowner)) AS whom\n        \
     FROM dsync.version AS known, pg_class AS class JOIN pg_namespace AS schema ON schema.oid = class.relnamespace\n        \
     WHERE schema.nspname = 'dsync' AND class.relname = 'lock'\n    \
     LOOP\n        \
     IF granted.version < 3 THEN\n            \
     EXECUTE format('ALTER TABLE %I.resignation OWNER TO %s', 'dsync', granted.whom);\n        \
     END IF;\n        \
     IF granted.version < 4 THEN\n            \
     EXECUTE format('ALTER TABLE %I.success OWNER TO %s', 'dsync', granted.whom);\n            \
     EXECUTE format('ALTER FUNCTION %I.fence(text) OWNER TO %s', 'dsync', granted.whom);\n        \
     END IF;\n        \
     IF granted.version < 6 THEN\n            \
     EXECUTE format('ALTER TABLE %I.semaphore OWNER TO %s', 'dsync', granted.whom);\n            \
     EXECUTE format('ALTER VIEW %I.semaphores OWNER TO %s', 'dsync', granted.whom);\n        \
     EXECUTE format('ALTER TABLE %I.policy OWNER TO %s', 'dsync', granted.whom);\n            \
     EXECUTE format('ALTER TABLE %I.takeover OWNER TO %s', 'dsync', granted.whom);\n        \
     END IF;\n    \
     END LOOP;\n    \
     FOR granted IN\n        \
     SELECT known.version AS version, allowed.privilege_type AS what,\n               \
     CASE WHEN allowed.grantee = 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(allowed.grantee)) END AS whom,\n               \
     bool_or(allowed.privilege_type = 'INSERT') OVER (PARTITION BY allowed.grantee) AS takes_locks\n        \
     FROM dsync.version AS known, pg_class AS class JOIN pg_namespace AS schema ON schema.oid = class.relnamespace,\n             \
     aclexplode(class.relacl) AS allowed\n        \
     WHERE schema.nspname = 'dsync' AND class.relname = 'lock' AND allowed.grantee <> class.relowner\n          \
     AND allowed.privilege_type IN ('SELECT', 'INSERT', 'UPDATE', 'DELETE')\n    \
     LOOP\n        \
     IF granted.version < 3 THEN\n            \
     EXECUTE format('GRANT %s ON %I.resignation TO %s', granted.what, 'dsync', granted.whom);\n        \
     END IF;\n        \
     IF granted.version < 4 AND granted.takes_locks THEN\n            \
     EXECUTE format('GRANT %s ON %I.success TO %s', granted.what, 'dsync', granted.whom);\n        \
     END IF;\n        \
     IF granted.version < 4 AND granted.what = 'UPDATE' THEN\n            \
     EXECUTE format('GRANT EXECUTE ON FUNCTION %I.fence(text) TO %s', 'dsync', granted.whom);\n        \
     END IF;\n        \
     IF granted.version < 6 AND granted.takes_locks THEN\n            \
     EXECUTE format('GRANT %s ON %I.semaphore TO %s', granted.what, 'dsync', granted.whom);\n            \
     EXECUTE format('GRANT SELECT ON %I.semaphores TO %s', 'dsync', granted.whom);\n        \
     END IF;\n        \
     IF granted.version < 6 AND granted.takes_locks AND granted.what <> 'DELETE' THEN\n            \
     EXECUTE format('GRANT %s ON %I.policy, %I.takeover TO %s', granted.what, 'dsync', 'dsync', granted.whom);\n        \
     END IF;\n    \
     END LOOP;\n    \
     -- The first run of the server that is recorded is no takeover: processes of an older version wait for none.\n    \
     INSERT INTO dsync.takeover (id, base, server, over)\n    \
     SELECT gen_random_uuid(), base.oid, pg_postmaster_start_time(), true FROM pg_database AS base\n    \
     WHERE base.datname = current_database() AND NOT EXISTS (SELECT FROM dsync.version AS known WHERE known.version >= 6)\n    \
     ON CONFLICT (sole) DO NOTHING;\n    \
     INSERT INTO dsync.version (version) VALUES (7)\n    \
     ON CONFLICT (sole) DO UPDATE SET version = excluded.version WHERE version.version < excluded.version;\n\
     END $check$;\n\nRESET search_path;\n"
);

/// What speaks against the schema, if anything does, whether that is about trust, and whether all of this version's catalog is
/// there; but for the function, where PL/pgSQL was dropped. It reads nothing but `pg_catalog`, and so neither runs anybody's code nor puts an error into the server's log
/// where there is no catalog.
pub(crate) const CATALOG_CHECK: &str = concat!(
    "WITH found AS MATERIALIZED (",
    include_str!("catalog_check.sql"),
    ") SELECT (SELECT text FROM found), (SELECT about_trust FROM found), \
        (SELECT count(*) = 12 AND bool_and(CASE class.relname \
                WHEN 'era' THEN class.relnatts = 4 \
                WHEN 'lock' THEN EXISTS (SELECT FROM pg_attribute WHERE attrelid = class.oid AND attname = 'readers') \
                ELSE true END) \
         FROM pg_class AS class JOIN pg_namespace AS schema ON schema.oid = class.relnamespace \
         WHERE schema.nspname = 'dsync' \
         AND class.relname IN ('version', 'token', 'era', 'lock', 'resignation', 'success', 'semaphore', 'policy', 'takeover', 'locks', 'waiters', 'semaphores')) \
        AND (EXISTS (SELECT FROM pg_proc AS proc JOIN pg_namespace AS schema ON schema.oid = proc.pronamespace \
                     WHERE schema.nspname = 'dsync' AND proc.proname = 'fence') \
             OR NOT EXISTS (SELECT FROM pg_language WHERE lanname = 'plpgsql'))"
);

/// Whether there is the schema, and whether all that is there is this very role's own and as the library makes it, which is
/// how it mostly is. It takes less than half of the time that [`CATALOG_CHECK`] does, most of which a new backend spends on
/// looking things up; what this does not say yes to, that decides. The numbers of the types `text` and `void`, 25 and 2278, are the same on
/// every server.
pub(crate) const CATALOG_IS_OWN: &str = "WITH object AS MATERIALIZED ( \
         SELECT class.*, schema.nspowner FROM pg_namespace AS schema LEFT JOIN pg_class AS class \
         ON class.relnamespace = schema.oid AND class.relname IN ('version', 'token', 'era', 'lock', 'resignation', 'success', 'semaphore', 'policy', 'takeover', 'locks', 'waiters', 'semaphores') \
         WHERE schema.nspname = 'dsync') \
     SELECT count(*) > 0, count(*) = 12 AND bool_and( \
         pg_get_userbyid(nspowner) = current_user AND pg_get_userbyid(relowner) = current_user \
         AND CASE relname WHEN 'version' THEN relkind = 'r' AND relpersistence = 'p' AND relnatts = 2 \
                          WHEN 'token' THEN relkind = 'S' AND relpersistence = 'p' \
                          WHEN 'era' THEN relkind = 'r' AND relpersistence = 'u' AND relnatts = 4 \
                          WHEN 'lock' THEN relkind = 'r' AND relpersistence = 'u' AND relnatts = 9 \
                          WHEN 'resignation' THEN relkind = 'r' AND relpersistence = 'u' AND relnatts = 4 \
                          WHEN 'success' THEN relkind = 'r' AND relpersistence = 'p' AND relnatts = 3 \
                          WHEN 'semaphore' THEN relkind = 'r' AND relpersistence = 'p' AND relnatts = 6 \
                          WHEN 'policy' THEN relkind = 'r' AND relpersistence = 'p' AND relnatts = 4 \
                          WHEN 'takeover' THEN relkind = 'r' AND relpersistence = 'u' AND relnatts = 8 \
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
     AND (SELECT count(*) = 1 AND bool_and( \
              pg_get_userbyid(proowner) = current_user AND prokind = 'f' AND NOT prosecdef AND pronargs = 1 \
              AND proargtypes[0] = 25 AND prorettype = 2278 \
              AND proconfig[1] = 'search_path=pg_catalog, pg_temp' AND proconfig[2] IS NULL) \
          FROM pg_proc JOIN pg_namespace AS schema ON schema.oid = pronamespace \
          WHERE schema.nspname = 'dsync' AND proname = 'fence') \
     FROM object";

/// The version of the catalog.
pub(crate) const CATALOG_VERSION: &str = "SELECT version FROM dsync.version";

/// Whether the role has the rights on the catalog, whether the era has begun, and whether there are rows of old terms.
pub(crate) const CATALOG_STATE: &str = concat!(
    "SELECT \
     pg_catalog.has_table_privilege('dsync.lock', 'SELECT') AND \
     pg_catalog.has_table_privilege('dsync.lock', 'INSERT') AND \
     pg_catalog.has_table_privilege('dsync.lock', 'UPDATE') AND \
     pg_catalog.has_table_privilege('dsync.era', 'SELECT') AND \
     pg_catalog.has_table_privilege('dsync.era', 'INSERT') AND \
     pg_catalog.has_table_privilege('dsync.era', 'UPDATE') AND \
     pg_catalog.has_table_privilege('dsync.policy', 'SELECT') AND \
     pg_catalog.has_table_privilege('dsync.policy', 'INSERT') AND \
     pg_catalog.has_table_privilege('dsync.policy', 'UPDATE') AND \
     pg_catalog.has_table_privilege('dsync.takeover', 'SELECT') AND \
     pg_catalog.has_table_privilege('dsync.takeover', 'INSERT') AND \
     pg_catalog.has_table_privilege('dsync.takeover', 'UPDATE') AND \
     pg_catalog.has_sequence_privilege('dsync.token', 'USAGE') AND \
     pg_catalog.has_sequence_privilege('dsync.token', 'UPDATE'), \
     ",
    era!(),
    ", EXISTS (SELECT FROM dsync.lock WHERE since < now() - interval '1 day')"
);

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
/// The jump itself is safe before anybody sees the row of the era, on a synchronous standby too: one that had not heard of it, and whose clock is
/// behind, would give tokens again when it is promoted. So the first term after a restart or a promotion waits for such a standby, as all commits
/// do; and with it, what was [agreed on](super::agree_on) before has come there. Who comes while another session makes it waits for that,
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

/// How long a statement that looks at the catalog waits for a table that somebody has locked.
pub(crate) fn wait_for_tables(patience: Duration) -> String {
    format!("SET LOCAL lock_timeout = {}; ", patience.as_millis().max(1))
}

/// Forgets the rows of locks that nobody has held for a day, resignations of that age, and semaphores whose permits nobody has held for a day, so
/// that the tables do not grow with every key ever used. Of semaphores, those stay whose number of permits was changed: the others are what the
/// next one says who comes.
///
/// A row that is taken up again meanwhile has a new `since` when the deletion comes to it, and stays; one that a fenced
/// transaction has is left for another day. A reader takes up a row without writing it: so who has which lock is looked at once more when the
/// rows are locked, which keeps readers that come from then on waiting for what becomes of the row. It waits for nobody for long, and ends by
/// itself if we do not.
pub(crate) const CATALOG_CLEANING: &str = "SET LOCAL lock_timeout = '100ms'; SET LOCAL statement_timeout = '2s'; \
     WITH old AS MATERIALIZED ( \
         SELECT lock.id, lock.pair FROM dsync.lock AS lock \
         WHERE lock.since < now() - interval '1 day' AND NOT EXISTS ( \
             SELECT FROM pg_locks AS held WHERE held.locktype = 'advisory' \
             AND (held.classid::int8 << 32 | held.objid::int8) = lock.id) \
         LIMIT 10000 FOR UPDATE SKIP LOCKED), \
     held AS MATERIALIZED ( \
         SELECT now.id FROM (SELECT count(*) AS rows FROM old) AS locked CROSS JOIN LATERAL ( \
             SELECT (held.classid::int8 << 32 | held.objid::int8) AS id FROM pg_locks AS held \
             WHERE held.locktype = 'advisory' AND locked.rows > 0 OFFSET 0) AS now) \
     DELETE FROM dsync.lock AS gone USING old \
     WHERE gone.id = old.id AND gone.pair = old.pair AND NOT EXISTS (SELECT FROM held WHERE held.id = gone.id); \
     DELETE FROM dsync.resignation WHERE asked < now() - interval '1 day'; \
     DELETE FROM dsync.semaphore AS gone \
     WHERE gone.former IS NULL AND gone.since < now() - interval '1 day' AND NOT EXISTS ( \
         SELECT FROM generate_series(1, gone.permits) AS permit \
         JOIN dsync.lock AS lock ON lock.id = (gone.id | permit) AND NOT lock.pair)";

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
