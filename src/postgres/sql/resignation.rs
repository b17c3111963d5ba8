//! The statements by which a holder is asked to resign, and hears of it.

/// Asks the holder of a lock to resign: `$1` key, `$2` whether it is a pair, `$3` namespace and `$4` name. Gives a row if there is a
/// holder whose term has a token.
///
/// Those who share a lock are not asked. A row that is left behind by a term which is over has another backend than the one that has the lock, or is older than that.
pub(crate) const REQUEST_RESIGNATION: &str = "INSERT INTO dsync.resignation AS known (id, pair, token, asked) \
     SELECT lock.id, lock.pair, lock.token, pg_catalog.clock_timestamp() FROM dsync.lock AS lock \
     JOIN pg_locks AS held ON held.locktype = 'advisory' AND held.granted AND held.pid = lock.pid AND held.mode <> 'ShareLock' \
      AND held.database = (SELECT oid FROM pg_database WHERE datname = current_database()) \
      AND (held.classid::int8 << 32 | held.objid::int8) = lock.id AND (held.objsubid = 2) = lock.pair \
     LEFT JOIN pg_stat_activity AS activity ON activity.pid = held.pid \
     WHERE lock.id = $1::int8 AND lock.pair = $2::bool AND lock.namespace = $3::text AND lock.key = $4::text \
       AND lock.readers IS DISTINCT FROM lock.token AND coalesce(activity.backend_start <= lock.since, true) \
     LIMIT 1 \
     ON CONFLICT (id, pair) DO UPDATE SET token = excluded.token, asked = excluded.asked RETURNING true";

/// Whether the holder of a term was asked to resign: `$1` key, `$2` whether it is a pair, `$3` token. On the primary only: see
/// [`LAST_SUCCESS`](super::LAST_SUCCESS).
pub(crate) const IS_ASKED_TO_RESIGN: &str = "SELECT EXISTS (SELECT FROM dsync.resignation AS known \
     WHERE known.id = $1::int8 AND known.pair = $2::bool AND known.token = $3::int8 AND NOT pg_is_in_recovery())";
