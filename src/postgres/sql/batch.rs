//! Many locks in one statement, for a session that carries many claims: some are taken, others given back.

use super::quiet::literal;
use super::{FENCE_LOCK, READERS_FENCE_LOCK, TURNSTILE, era};

/// What is to be done with one lock. The number is what the statement knows it by; a key that is a pair has [`PAIR`] added to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OpCode {
    Take = 0,
    TakeShared = 1,
    Give = 2,
    GiveShared = 3,
}

/// So many locks are taken by one statement at the most: each needs a place for its fence locks in the server's table of locks, too, while the
/// statement runs.
pub(crate) const MOST_TAKEN: usize = 256;

/// Is added to the number of an [`OpCode`].
pub(crate) const PAIR: i16 = 4;

/// The two numbers of a pair.
fn halves(number: &str) -> String {
    format!("(({number}) >> 32)::int4, (({number}) << 32 >> 32)::int4")
}

/// Calls one function for a key that is one number, and the same for one that is a pair.
fn either(pair: &str, call: impl Fn(&str) -> String, number: &str) -> String {
    format!(
        "CASE WHEN {pair} THEN {of_pair} ELSE {of_number} END",
        of_pair = call(&halves(number)),
        of_number = call(number)
    )
}

/// Takes a lock that many may share, if nobody waits for it alone: whoever does has the turnstile between two slices of the wait.
fn take_shared(numbers: &str, turnstile: &str) -> String {
    format!(
        "CASE WHEN pg_try_advisory_lock_shared({turnstile}) \
              THEN CASE WHEN pg_advisory_unlock_shared({turnstile}) THEN pg_try_advisory_lock_shared({numbers}) ELSE false END \
              ELSE false END"
    )
}

/// Does what `$1` and `$2` say, which are numbers of keys and [operations](OpCode), and with `rows` also takes the locks that `$3` to `$8` tell: key,
/// whether it is a pair, whether the lock is to be shared, namespace and name of the key, annotation. Gives a row for each: its place in
/// the order, first those of `$1`; whether the lock was taken, or had been held; and with `rows` the token; namespace and name of another key that the catalog has
/// under this number; whether the era has begun; and whether a reader that has nothing is late.
///
/// It waits for nothing, so that no lock is in the way of another one: the locks and the fence locks are tried, and a row that another
/// transaction has is skipped. A lock whose row was not written is given back in the same statement.
///
/// Each lock is taken once, and no number may be there twice: PostgreSQL counts, and would grant it.
///
/// Beside what [`take_unknown`](super::claim) says of one lock: rows are locked in the order of their keys, by which two such statements do not
/// wait for each other in a circle; and a reader that finds the row of other readers joins them, as there. One whose row became theirs, or is
/// becoming it, since this statement began to look is late: its next statement finds the row. Each row is looked up by itself, in a subquery that
/// the planner leaves alone: it knows nothing of how many keys there are, and would read the whole table.
pub(crate) fn batch(rows: bool) -> String {
    let turnstile = format!("op.id # {TURNSTILE}::int8");
    let ops = format!(
        "SELECT op.place, CASE op.code \
             WHEN 0 THEN pg_try_advisory_lock(op.id) \
             WHEN 1 THEN {share} \
             WHEN 2 THEN pg_advisory_unlock(op.id) \
             WHEN 3 THEN pg_advisory_unlock_shared(op.id) \
             WHEN 4 THEN pg_try_advisory_lock({halves}) \
             WHEN 5 THEN {share_pair} \
             WHEN 6 THEN pg_advisory_unlock({halves}) \
             WHEN 7 THEN pg_advisory_unlock_shared({halves}) \
         END AS done{} \
         FROM unnest($1::int8[], $2::int2[]) WITH ORDINALITY AS op (id, code, place)",
        if rows {
            ", NULL::int8 AS token, NULL::text AS namespace, NULL::text AS key, true AS era, false AS late"
        } else {
            ""
        },
        share = take_shared("op.id", &turnstile),
        share_pair = take_shared(&halves("op.id"), &halves(&turnstile)),
        halves = halves("op.id"),
    );
    if !rows {
        return ops;
    }
    let turnstile = format!("wanted.id # {TURNSTILE}::int8");
    let take = either(
        "wanted.pair",
        |numbers| {
            let turnstile = if numbers == "wanted.id" { turnstile.clone() } else { halves(&turnstile) };
            format!(
                "CASE WHEN wanted.shared THEN {share} ELSE pg_try_advisory_lock({numbers}) END",
                share = take_shared(numbers, &turnstile)
            )
        },
        "wanted.id",
    );
    let pass = |fence_lock: i64, mode: &str| {
        either(
            "wanted.pair",
            |numbers| format!("pg_try_advisory_xact_lock{mode}({numbers})"),
            &format!("wanted.id # {fence_lock}::int8"),
        )
    };
    let (writers, readers) = (pass(FENCE_LOCK, ""), pass(READERS_FENCE_LOCK, ""));
    // Fenced transactions share it; another first reader's statement does not.
    let others = pass(FENCE_LOCK, "_shared");
    let give = either(
        "attempt.pair",
        |numbers| {
            format!(
                "CASE WHEN attempt.shared THEN pg_advisory_unlock_shared({numbers}) ELSE pg_advisory_unlock({numbers}) END"
            )
        },
        "attempt.id",
    );
    let era = era!();
    format!(
        "WITH attempt AS MATERIALIZED ( \
             SELECT wanted.*, known.namespace IS NOT NULL AS is_known, other.namespace AS other_namespace, other.key AS other_key, \
                    CASE WHEN other.key IS NOT NULL THEN '' WHEN NOT {take} THEN '' \
                         WHEN NOT {era} THEN 'granted' \
                         WHEN NOT {writers} THEN CASE WHEN NOT wanted.shared THEN 'granted' WHEN {others} THEN 'granted' ELSE 'late' END \
                         WHEN wanted.shared THEN 'passed' WHEN {readers} THEN 'passed' ELSE 'granted' END AS state \
             FROM unnest($3::int8[], $4::bool[], $5::bool[], $6::text[], $7::text[], $8::bytea[]) WITH ORDINALITY \
                  AS wanted (id, pair, shared, namespace, key, annotation, place) \
             LEFT JOIN LATERAL ( \
                 SELECT lock.namespace, lock.key FROM dsync.lock AS lock WHERE lock.id = wanted.id AND lock.pair = wanted.pair OFFSET 0 \
             ) AS known ON true \
             LEFT JOIN LATERAL ( \
                 SELECT known.namespace, known.key WHERE known.namespace <> wanted.namespace OR known.key <> wanted.key \
             ) AS other ON true), \
         joined AS MATERIALIZED ( \
             SELECT attempt.place, readers.token FROM attempt \
             CROSS JOIN LATERAL ( \
                 SELECT lock.token FROM dsync.lock AS lock \
                 WHERE lock.id = attempt.id AND lock.pair = attempt.pair AND lock.readers = lock.token \
                   AND lock.namespace = attempt.namespace AND lock.key = attempt.key \
                 FOR SHARE OF lock SKIP LOCKED \
             ) AS readers \
             WHERE attempt.shared AND attempt.state <> '' AND {era}), \
         begun AS ( \
             INSERT INTO dsync.lock AS lock (id, pair, namespace, key, token, annotation, pid, since, readers) \
             SELECT drawn.id, drawn.pair, drawn.namespace, drawn.key, drawn.token, drawn.annotation, \
                    pg_backend_pid(), clock_timestamp(), CASE WHEN drawn.shared THEN drawn.token END \
             FROM ( \
                 SELECT passed.*, nextval('dsync.token') AS token \
                 FROM (SELECT attempt.* FROM attempt WHERE attempt.state = 'passed' \
                         AND (NOT attempt.shared OR NOT EXISTS (SELECT FROM joined WHERE joined.place = attempt.place)) \
                       ORDER BY attempt.id, attempt.pair) AS passed \
                 LEFT JOIN LATERAL ( \
                     SELECT true AS locked FROM dsync.lock AS lock \
                     WHERE passed.is_known AND lock.id = passed.id AND lock.pair = passed.pair \
                     FOR NO KEY UPDATE OF lock SKIP LOCKED \
                 ) AS free ON true \
                 WHERE NOT passed.is_known OR free.locked OFFSET 0 \
             ) AS drawn \
             ON CONFLICT (id, pair) DO UPDATE \
             SET token = excluded.token, annotation = excluded.annotation, pid = excluded.pid, since = excluded.since, \
                 readers = excluded.readers \
             WHERE lock.namespace = excluded.namespace AND lock.key = excluded.key \
               AND (excluded.readers IS NULL OR lock.readers IS DISTINCT FROM lock.token) \
             RETURNING lock.id, lock.pair, lock.token), \
         kept AS MATERIALIZED ( \
             SELECT attempt.place, term.token, attempt.other_namespace, attempt.other_key, \
                    attempt.shared AND attempt.state IN ('passed', 'late') AND term.token IS NULL AS late, \
                    CASE WHEN attempt.state = '' THEN false WHEN term.token IS NULL THEN NOT {give} ELSE true END AS done \
             FROM attempt LEFT JOIN ( \
                 SELECT begun.id, begun.pair, begun.token FROM begun \
                 UNION ALL \
                 SELECT attempt.id, attempt.pair, joined.token FROM joined JOIN attempt ON attempt.place = joined.place \
             ) AS term ON term.id = attempt.id AND term.pair = attempt.pair) \
         {ops} UNION ALL \
         SELECT kept.place + coalesce(array_length($1::int8[], 1), 0), kept.done, kept.token, kept.other_namespace, kept.other_key, {era}, kept.late \
         FROM kept"
    )
}

/// Whether the server has none of the `lost` backends any more.
pub(crate) fn are_gone(lost: &[i32]) -> String {
    let lost = lost.iter().map(i32::to_string).collect::<Vec<_>>().join(", ");
    format!(
        "SELECT NOT EXISTS (SELECT FROM pg_stat_get_activity(NULL) AS backend WHERE backend.pid IN ({lost}))"
    )
}

/// Of many terms, those that are the newest of their keys. `$1` are the numbers, `$2` whether they are pairs, `$3` whether they are shared, `$4` and
/// `$5` namespaces and names, `$6` the tokens. Gives their places in the order, from 1.
pub(crate) const ARE_NEWEST_TERMS: &str = "SELECT asked.place \
     FROM unnest($1::int8[], $2::bool[], $3::bool[], $4::text[], $5::text[], $6::int8[]) WITH ORDINALITY \
          AS asked (id, pair, shared, namespace, key, token, place) \
     JOIN dsync.lock AS lock ON lock.id = asked.id AND lock.pair = asked.pair AND lock.namespace = asked.namespace \
      AND lock.key = asked.key AND lock.token = asked.token AND (lock.readers IS NOT DISTINCT FROM lock.token) = asked.shared";

/// Names a session that is to carry claims, and takes the lock by which its heartbeats see that it has its locks still, twice as a
/// [heartbeat](super::heartbeat) needs it. Gives whether it was taken.
pub(crate) fn begin_carrying(name: &str, witness: i64) -> String {
    format!(
        "SELECT CASE WHEN pg_try_advisory_lock({witness}) THEN pg_try_advisory_lock({witness}) ELSE false END, \
                set_config('application_name', {name}, false)",
        name = literal(name)
    )
}

/// Puts the lease on a session, in milliseconds; 0 takes it off. A statement waits for no lock of a table for longer than `longest_wait`: what it
/// takes of advisory locks and rows it tries.
pub(crate) fn set_lease(lease: u128, longest_wait: u128) -> String {
    format!(
        "SELECT set_config('idle_session_timeout', '{lease}', false), set_config('lock_timeout', '{longest_wait}', false)"
    )
}
