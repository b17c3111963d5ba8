//! The statement that asks the server what locks on it depend on.

use std::time::Duration;

/// Settings of the server that matter, as `pg_settings` has them: in their units, without a unit's name.
const SETTINGS: [&str; 10] = [
    "client_connection_check_interval",
    "idle_session_timeout",
    "max_connections",
    "max_locks_per_transaction",
    "max_prepared_transactions",
    "reserved_connections",
    "superuser_reserved_connections",
    "synchronous_standby_names",
    "tcp_keepalives_idle",
    "tcp_user_timeout",
];

/// Timeouts that a role or a database may bring along, and that end what is done on connections of the application's.
const TIMEOUTS: [&str; 5] = [
    "idle_in_transaction_session_timeout",
    "idle_session_timeout",
    "lock_timeout",
    "statement_timeout",
    "transaction_timeout",
];

/// Asks for all that a check reports of the server, in one row, within `patience`; on a session that has not been prepared, too.
///
/// It reads and takes no lock but on PostgreSQL's own tables, shared. The lease is put on for the one transaction that these
/// statements are: some systems that look like PostgreSQL say yes to any setting, and keep none.
pub(crate) fn check(lease: Duration, patience: Duration) -> String {
    let list = |names: &[&str]| names.iter().map(|name| format!("'{name}'")).collect::<Vec<_>>().join(", ");
    let (lease, patience) = (lease.as_millis(), patience.as_millis().max(1));
    let (settings, timeouts) = (list(&SETTINGS), list(&TIMEOUTS));
    format!(
        "SET LOCAL search_path = pg_catalog, pg_temp; \
         SET LOCAL lock_timeout = {patience}; SET LOCAL statement_timeout = {patience}; \
         SET LOCAL idle_session_timeout = {lease}; \
         SELECT version() AS version, current_user AS role, current_database() AS database, \
                inet_client_port() IS NOT NULL AS tcp, \
                role.rolsuper AS superuser, role.rolconnlimit AS role_limit, base.datconnlimit AS database_limit, \
                EXISTS (SELECT FROM pg_roles AS reserve WHERE reserve.rolname = 'pg_use_reserved_connections' \
                        AND pg_has_role(reserve.oid, 'USAGE')) AS may_use_reserved, \
                has_database_privilege(base.oid, 'CREATE') AS may_make_schemas, \
                EXISTS (SELECT FROM pg_namespace WHERE nspname = 'dsync') AS has_schema, \
                EXISTS (SELECT FROM pg_language WHERE lanname = 'plpgsql' \
                        AND has_language_privilege(oid, 'USAGE')) AS plpgsql, \
                (SELECT sum(numbackends) FROM pg_stat_database) AS server_used, \
                (SELECT sum(numbackends) FROM pg_stat_database WHERE datid = base.oid) AS database_used, \
                (SELECT count(*) FROM pg_stat_get_activity(NULL) WHERE usesysid = role.oid) AS role_used, \
                (SELECT count(*) FROM pg_locks) AS locks, \
                (SELECT count(*) FROM pg_stat_get_wal_senders()) AS standbys, \
                (SELECT count(sync_state) FROM pg_stat_get_wal_senders()) AS standbys_seen, \
                (SELECT count(*) FROM pg_stat_get_wal_senders() \
                 WHERE sync_state IN ('sync', 'quorum')) AS synchronous, \
                known.settings, known.timeouts \
         FROM pg_roles AS role, pg_database AS base, \
              (SELECT jsonb_object_agg(name, setting) FILTER (WHERE name IN ({settings})) AS settings, \
                      string_agg(name || ' = ' || reset_val || ' ' || unit, ', ' ORDER BY name) \
                          FILTER (WHERE name IN ({timeouts}) AND reset_val <> '0') AS timeouts \
               FROM pg_settings) AS known \
         WHERE role.rolname = current_user AND base.datname = current_database()"
    )
}
