//! The statements that prepare a session, renew its lease and prove what it holds.

use std::time::Duration;

use super::Shape;
use crate::key::AdvisoryKey;

/// The setting that tells our sessions apart, of no meaning to the server.
const SESSION_NONCE: &str = "dsync.session";

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

/// Prepares a session in one round trip: says what the session must be checked for, sets it up, and puts the nonce into it
/// by which our sessions are told apart.
///
/// Gives: backend, whether it is a standby, version, nonce, and the port of the server's client (null for a Unix socket). A
/// backend that had a nonce before is left as it is, and the
/// nonce is null: a pooler has lent us one that another session of ours uses, or used. Then it is to be done again,
/// `by_locks`, which tells the two apart: one that holds a lock is not ours alone. Not at once, since merely to read the
/// question for its locks takes a new backend a millisecond.
pub(crate) fn prepare_session(
    slice: Duration,
    more: &[(&'static str, String)],
    session_nonce: u64,
    by_locks: bool,
) -> String {
    // With its schema even the operator: the role's own search path is in force still.
    let ours = if by_locks {
        "NOT EXISTS (SELECT FROM pg_catalog.pg_locks AS own \
                     WHERE own.locktype OPERATOR(pg_catalog.=) 'advisory' \
                     AND own.pid OPERATOR(pg_catalog.=) pg_catalog.pg_backend_pid())"
            .to_owned()
    } else {
        format!("pg_catalog.current_setting('{SESSION_NONCE}', true) IS NULL")
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
                CASE WHEN backend.ours THEN pg_catalog.set_config('{SESSION_NONCE}', '{session_nonce}', false) END, \
                pg_catalog.inet_client_port(){set} \
         FROM (SELECT {ours} AS ours OFFSET 0) AS backend"
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
/// it still. Gives: backend, whether it is a standby, nonce, whether `held` is held.
///
/// The nonce tells a backend that a pooler has lent to another of our sessions in between. The lock itself can be gone while
/// backend and session are the same: something else that speaks on our connection, a pooler or a child process, has said
/// `pg_advisory_unlock_all`.
///
/// A session counts how often it has taken a lock. A term's is taken twice; so to give it back once and to take it again shows
/// that it is held, and it is not free in between. That looks at the session's own memory only. (To read `pg_locks` copies the
/// whole server's table of locks, whoever has them, for each heartbeat of each lock.) Nothing can
/// interrupt the server between the two calls.
pub(crate) fn heartbeat(held: Option<(AdvisoryKey, Shape)>) -> String {
    let holds = held.map_or_else(
        || "true".to_owned(),
        |(key, shape)| shape.prove(&format!("'{}'::pg_catalog.int8", key.id())),
    );
    format!(
        "SELECT pg_catalog.pg_backend_pid(), pg_catalog.pg_is_in_recovery(), \
                pg_catalog.current_setting('dsync.session', true), {holds}"
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
