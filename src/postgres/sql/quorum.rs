//! The statements that tell whether the standbys still follow the server.

/// Who is to confirm, and whether the role may ask them: the setting, whether the role sees how far the standbys are, and whether it
/// may write the record.
pub(crate) const MAY_CONFIRM: &str = "SELECT current_setting('synchronous_standby_names'), \
     pg_has_role(current_user, 'pg_read_all_stats', 'USAGE'), \
     (SELECT bool_and(has_function_privilege(proc.oid, 'EXECUTE')) FROM pg_proc AS proc \
      WHERE proc.proname = 'pg_logical_emit_message' AND proc.pronamespace = 'pg_catalog'::regnamespace)";

/// Writes a record into the log of the server that means nothing to anybody, and gives its place. The commit waits for the disk of the
/// server, since nothing is sent to a standby before, and not for a standby: so it cannot hang, and nothing that ends such a wait early
/// (a cancel request, a change of settings) can look like a confirmation. Named so that logical decoding tells it from others':
/// <https://www.postgresql.org/docs/current/functions-admin.html#FUNCTIONS-REPLICATION>.
pub(crate) const WRITE_RECORD: &str =
    "SET LOCAL synchronous_commit = local; SELECT pg_logical_emit_message(true, 'dsync', ''::text)";

/// Who is to confirm, as the server says now, and which standbys there are: their names, and up to which place each has flushed the log.
pub(crate) const LOOK_AT_STANDBYS: &str = "SELECT current_setting('synchronous_standby_names'), \
            (SELECT jsonb_agg(jsonb_build_array(standby.application_name, standby.flush_lsn)) \
             FROM pg_stat_replication AS standby)";
