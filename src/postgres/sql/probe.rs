//! The statements by which two sessions show that they exclude each other.

use super::Shape;

/// Numbers that nobody else uses, for each way in which locks are held.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Probe {
    number: i64,
}

impl Probe {
    /// `nonce` is random: a key of the application's would be in the way.
    pub(crate) fn new(nonce: u64) -> Self {
        Self { number: nonce.cast_signed() }
    }

    /// Takes a lock of each kind if it is free, as a column that is true: of a transaction and of a session, for itself and shared, and of a
    /// pair. To be followed by [`give_back`](Self::give_back) in the same transaction.
    pub(crate) fn hold(self) -> String {
        let [mine, kept, pair, shared, read] = self.keys();
        format!(
            ", pg_try_advisory_xact_lock({mine}) AND pg_try_advisory_lock({kept}) AND pg_try_advisory_lock({pair}) \
              AND pg_try_advisory_lock_shared({shared}) AND pg_try_advisory_xact_lock_shared({read})"
        )
    }

    /// From another session: whether one of the locks is granted that must not be, and whether those are that others share, as two columns.
    /// It keeps none, also where all are granted.
    pub(crate) fn contend(self) -> String {
        let [mine, kept, pair, shared, read] = self.keys();
        // Given back at once: the session may be a pooler's, and outlive the client.
        let session = |key: &str, suffix: &str| {
            format!(
                "CASE WHEN pg_try_advisory_lock{suffix}({key}) THEN pg_advisory_unlock{suffix}({key}) IS NOT NULL ELSE false END"
            )
        };
        let transaction = |key: &str, suffix: &str| format!("pg_try_advisory_xact_lock{suffix}({key})");
        let both = [session, transaction];
        let mut refused = Vec::new();
        for key in [&mine, &kept] {
            for suffix in ["", "_shared"] {
                refused.extend(both.map(|take| take(key, suffix)));
            }
        }
        for key in [&pair, &shared, &read] {
            refused.extend(both.map(|take| take(key, "")));
        }
        format!(
            ", {}, {} AND {}",
            refused.join(" OR "),
            session(&shared, "_shared"),
            transaction(&read, "_shared")
        )
    }

    /// Gives back what [`hold`](Self::hold) has taken, as a column that is true if all of it was held; and ends the transaction. If `held`
    /// is false, not all was taken, and the server must not be asked for what would be a warning in its log.
    pub(crate) fn give_back(self, held: bool) -> String {
        let [_, kept, pair, shared, _] = self.keys();
        let unlock = if held {
            format!(
                "pg_advisory_unlock({kept}) AND pg_advisory_unlock({pair}) AND pg_advisory_unlock_shared({shared})"
            )
        } else {
            "pg_advisory_unlock_all()".to_owned()
        };
        format!("SELECT {unlock}; ROLLBACK")
    }

    /// The arguments of the functions, for a lock of the transaction, of the session, of a pair, and for two that are shared.
    fn keys(self) -> [String; 5] {
        let number = |offset: i64| self.number ^ offset;
        let single = |offset| format!("'{}'::int8", number(offset));
        let pair = Shape::plain(true).numbers(&format!("'{}'::int8", number(2)));
        [single(0), single(1), pair, single(3), single(4)]
    }
}

/// Whether the server has loaded something by which it may be one node of several, as a column: each has settings of its own. To look for
/// extensions would take a new backend some 0.6 ms at each start.
pub(crate) const IS_NODE: &str = ", coalesce(current_setting('bdr.ddl_replication', true), \
     current_setting('spock.conflict_resolution', true), current_setting('citus.shard_count', true)) IS NOT NULL";

/// Which of them this database uses.
pub(crate) const EXTENSIONS: &str =
    "SELECT string_agg(extname, ' ') FROM pg_extension WHERE extname IN ('bdr', 'citus', 'spock')";

/// What a server is, for one that was refused. Two statements in one message are not taken for a reading one by a load balancer.
pub(crate) const IDENTITY: &str = "SET LOCAL lock_timeout = 0; \
     SELECT pg_catalog.version(), pg_catalog.pg_is_in_recovery(), pg_catalog.pg_postmaster_start_time()";

/// As [`IDENTITY`], for a server that does not even know these functions.
pub(crate) const VERSION: &str = "SELECT pg_catalog.version()";

/// The number of the node, where there is Citus: 0 is the coordinator.
pub(crate) const CITUS_GROUP: &str = "SELECT groupid FROM pg_catalog.pg_dist_local_group";
