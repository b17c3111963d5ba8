//! The statements of a semaphore: they find a permit that is free, and agree how many there are.
//!
//! The number of a semaphore has ten bits of zeros at its end, in which its permits have theirs. So a permit is an advisory lock and has a row
//! in `dsync.lock` as any lock does, and is told from its number.

use super::{FENCE_LOCK, Place, Shape, TURNSTILE, Verb, era};
use crate::key::MAX_PERMITS;

/// Whether a session has this permit, for which it asks without waiting.
///
/// A fenced transaction of the permit's former holder may be open still. Then another permit will do as well, so nobody waits for it.
fn take(number: &str) -> String {
    let once = format!("pg_catalog.pg_try_advisory_lock({number})");
    format!(
        "CASE WHEN {once} THEN CASE WHEN pg_catalog.pg_try_advisory_xact_lock({number} # {FENCE_LOCK}::int8) THEN {once} \
                                    ELSE NOT pg_catalog.pg_advisory_unlock({number}) END \
              ELSE false END"
    )
}

/// Takes a permit that is free, with token and row, if there is one; [`Verb::QueueAgain`] goes on looking for the length of a slice, and for no
/// longer than half a second, so that it soon sees another number of permits.
///
/// Parameters: those of [`Verb::Try`], `$7` how many permits the caller says that there are, and `$8` for how many milliseconds the session has
/// looked before. Gives: permit, token, namespace and name of another key that has this number, how many permits there are (null if nobody
/// has said so yet), whether the caller may say what it says, and whether the era has begun.
///
/// A newcomer passes the turnstile first. Whoever looks again has it, and is the only one who does. The looks are steps of a recursion, of
/// which each is made after the one before and only if that has found nothing. They begin at a permit by lot, so that those who come at
/// once do not all ask for the same. The pauses between them are a sixteenth of the time that the session has looked so far, from 1 ms to
/// 50 ms: a wait takes a few hundredths longer than it would with a bell. (The server sleeps for whole milliseconds until the time is over,
/// and so for 1 ms if it is told half of one, and for 2 ms if it is told one.) They hold the statement's snapshot, and no lock but
/// the turnstile.
pub(super) fn take_permit(verb: Verb, shape: Shape, told: &dyn Fn(&str) -> String) -> String {
    let (ready, more, settings, left) = match verb {
        Verb::Queue(Place::Front) | Verb::QueueAgain(Place::Front) => {
            let left = Place::Front.leave(shape, "(SELECT token FROM begun) IS NOT NULL");
            let more = match verb {
                Verb::QueueAgain(_) => {
                    "WHEN (look.step + 1) % known.permits <> 0 THEN true \
                     WHEN pg_catalog.clock_timestamp() > known.begun + least(pg_catalog.current_setting('lock_timeout')::interval, '500 ms') \
                     THEN false \
                     ELSE (pg_catalog.pg_sleep(greatest(0.0005, least(0.05, \
                         ($8::int4 / 1000.0 + extract(epoch FROM pg_catalog.clock_timestamp() - known.begun)) / 16))))::text = '' END"
                }
                _ => "ELSE look.step + 1 < known.permits AND $8::int4 IS NOT NULL END",
            };
            ("true".to_owned(), more, ", $2::text, $3::text", left)
        }
        _ => (
            // A statement before may have had a permit, but not its row.
            format!(
                "CASE WHEN (pg_catalog.pg_advisory_unlock_all())::text = '' THEN {} ELSE false END",
                shape.pass_turnstile()
            ),
            "ELSE look.step + 1 < known.permits AND $8::int4 IS NOT NULL END",
            ", pg_catalog.set_config('idle_session_timeout', $2::text, false), \
               pg_catalog.set_config('application_name', $3::text, false)",
            String::new(),
        ),
    };
    format!(
        "WITH RECURSIVE semaphore AS MATERIALIZED ( \
             SELECT known.namespace, known.key, known.permits, known.namespace = $4::text AND known.key = $5::text AS is_it, \
                    coalesce($7::int4 IN (known.permits, known.former), false) AS is_so, {era} AS has_era \
             FROM dsync.semaphore AS known WHERE known.id = $1::int8), \
         known AS MATERIALIZED ( \
             SELECT semaphore.permits, pg_catalog.floor(pg_catalog.random() * semaphore.permits)::int4 AS start, \
                    pg_catalog.clock_timestamp() AS begun \
             FROM semaphore WHERE CASE WHEN semaphore.is_it AND semaphore.is_so AND semaphore.has_era THEN {ready} ELSE false END), \
         look (step, id, had) AS ( \
             SELECT 0, first.id, {take_first} \
             FROM known CROSS JOIN LATERAL (SELECT $1::int8 | (1 + known.start) AS id) AS first \
             UNION ALL \
             SELECT look.step + 1, next.id, {take_next} \
             FROM look CROSS JOIN known \
             CROSS JOIN LATERAL (SELECT $1::int8 | (1 + (known.start + look.step + 1) % known.permits) AS id) AS next \
             WHERE CASE WHEN look.had THEN false {more}), \
         attempt AS MATERIALIZED (SELECT look.id FROM look WHERE look.had), \
         begun AS ( \
             INSERT INTO dsync.lock AS lock (id, pair, namespace, key, token, annotation, pid, since) \
             SELECT attempt.id, false, $4::text, $5::text, pg_catalog.nextval('dsync.token'), $6::bytea, \
                    pg_catalog.pg_backend_pid(), pg_catalog.clock_timestamp() \
             FROM attempt \
             ON CONFLICT (id, pair) DO UPDATE \
             SET token = excluded.token, annotation = excluded.annotation, pid = excluded.pid, since = excluded.since \
             WHERE lock.namespace = excluded.namespace AND lock.key = excluded.key \
             RETURNING lock.token), \
         other AS MATERIALIZED ( \
             SELECT semaphore.namespace, semaphore.key FROM semaphore WHERE NOT semaphore.is_it \
             UNION ALL \
             SELECT lock.namespace, lock.key FROM attempt JOIN dsync.lock AS lock ON lock.id = attempt.id AND NOT lock.pair \
             WHERE lock.namespace <> $4::text OR lock.key <> $5::text) \
         SELECT (SELECT (attempt.id & {MAX_PERMITS})::int4 FROM attempt), (SELECT token FROM begun), \
                (SELECT namespace FROM other), (SELECT key FROM other), \
                (SELECT permits FROM semaphore), (SELECT is_so FROM semaphore), (SELECT has_era FROM semaphore){left}{settings}{told}",
        era = era!(),
        take_first = take("first.id"),
        take_next = take("next.id"),
        told = told(
            "coalesce((SELECT begun.token::text || '/' || (attempt.id & 1023)::text FROM begun, attempt), '')"
        )
    )
}

/// The same for a session that had this permit last, and has kept lease and name since: takes it if it is free, which it mostly is where
/// nobody else wants one. Gives the token, or no row: it does not tell why not.
///
/// `$1` the number of the permit, `$2` namespace and `$3` name of the key, `$4` annotation, `$5` how many permits the caller says that there are.
pub(super) fn take_known_permit() -> String {
    let semaphore = format!("($1::int8 & ~{MAX_PERMITS}::int8)");
    format!(
        "UPDATE dsync.lock AS lock \
         SET token = pg_catalog.nextval('dsync.token'), annotation = $4::bytea, \
             pid = pg_catalog.pg_backend_pid(), since = pg_catalog.clock_timestamp() \
         WHERE lock.id = $1::int8 AND NOT lock.pair \
         AND CASE WHEN lock.namespace <> $2::text OR lock.key <> $3::text THEN false \
                  WHEN NOT EXISTS (SELECT FROM dsync.semaphore AS known WHERE known.id = {semaphore} \
                       AND known.permits >= ($1::int8 & {MAX_PERMITS}) AND $5::int4 IN (known.permits, known.former)) THEN false \
                  WHEN {pass} THEN {taken} ELSE false END \
         RETURNING lock.token",
        pass = Shape::pass(&format!("{semaphore} # {TURNSTILE}::int8")),
        taken = take("$1::int8")
    )
}

/// Finds a permit of each of many semaphores, for a session that carries many claims. It may have permits of them already, which the server would
/// grant it again, so `$5` are the numbers of permits that are not to be tried. The others are lists, with a place for each semaphore: `$1` its number, `$2`
/// namespace and `$3` name of the key, `$4` how many permits the caller says that there are. Gives in this order: namespace and name of another key that
/// has the number; how many permits there are, if the caller may not say what it says; the permit, null if none is free or somebody waits; and how
/// many there are, null if nobody has said so yet.
///
/// The session does not have the permit yet. It takes it by [`batch`](super::batch), as any lock, without a wait for its row or for a fenced transaction.
/// What this statement takes, the server takes back at its end, also if it fails: so nothing is left of which nobody knows the number. Where another
/// session was faster, or the permit is not to be had, the caller looks again.
///
/// A newcomer passes the turnstile, and whoever has passed it was there before those that wait. As in [`take_permit`], the looks begin at a permit by lot.
pub(super) fn find_permits() -> String {
    format!(
        "SELECT other.namespace, other.key, CASE WHEN NOT known.is_so THEN known.permits END, free.permit, known.permits \
         FROM unnest($1::int8[], $2::text[], $3::text[], $4::int4[]) WITH ORDINALITY AS asked (id, namespace, key, permits, place) \
         LEFT JOIN LATERAL ( \
             SELECT semaphore.namespace, semaphore.key, semaphore.permits, \
                    semaphore.namespace = asked.namespace AND semaphore.key = asked.key AS is_it, \
                    coalesce(asked.permits IN (semaphore.permits, semaphore.former), false) AS is_so \
             FROM dsync.semaphore AS semaphore WHERE semaphore.id = asked.id OFFSET 0 \
         ) AS known ON true \
         LEFT JOIN LATERAL (SELECT known.namespace, known.key WHERE NOT known.is_it) AS other ON true \
         LEFT JOIN LATERAL ( \
             SELECT look.permit \
             FROM (SELECT pg_catalog.floor(pg_catalog.random() * known.permits)::int4 AS start \
                   WHERE CASE WHEN known.is_it AND known.is_so THEN {pass} ELSE false END OFFSET 0) AS passed \
             CROSS JOIN LATERAL ( \
                 SELECT 1 + (passed.start + step) % known.permits AS permit FROM pg_catalog.generate_series(0, known.permits - 1) AS step OFFSET 0 \
             ) AS look \
             WHERE CASE WHEN asked.id | look.permit = ANY ($5::int8[]) THEN false \
                        ELSE pg_catalog.pg_try_advisory_xact_lock(asked.id | look.permit) END \
             LIMIT 1 \
         ) AS free ON true \
         ORDER BY asked.place",
        pass = Shape::pass(&format!("asked.id # {TURNSTILE}::int8"))
    )
}

/// Agrees on numbers of permits where nobody has before: `$1` the numbers of the semaphores, `$2` namespaces and `$3` names of their keys, `$4` how many
/// each has. In the order of their numbers, by which two such statements do not wait for each other in a circle.
pub(super) const AGREE: &str = "INSERT INTO dsync.semaphore (id, namespace, key, permits, since) \
     SELECT asked.id, asked.namespace, asked.key, asked.permits, pg_catalog.clock_timestamp() \
     FROM unnest($1::int8[], $2::text[], $3::text[], $4::int4[]) AS asked (id, namespace, key, permits) \
     ORDER BY asked.id ON CONFLICT (id) DO NOTHING";

/// Gives a semaphore another number of permits: `$1` the number of the semaphore, `$2` namespace and `$3` name of the key, `$4` how many, and `$5` how
/// many it has if nobody has said so yet. Gives how many it had, which it waits for if another session is changing it, or no row if the number is another
/// key's.
pub(crate) const SET_PERMITS: &str = "WITH durably AS MATERIALIZED ( \
         SELECT pg_catalog.set_config('synchronous_commit', 'on', true) AS is_set, \
                (SELECT before.permits FROM dsync.semaphore AS before WHERE before.id = $1::int8 FOR UPDATE) AS permits) \
     INSERT INTO dsync.semaphore AS known (id, namespace, key, permits, former, since) \
     SELECT $1::int8, $2::text, $3::text, $4::int4, $5::int4, pg_catalog.clock_timestamp() FROM durably WHERE durably.is_set IS NOT NULL \
     ON CONFLICT (id) DO UPDATE \
     SET permits = excluded.permits, since = excluded.since, \
         former = CASE WHEN known.permits = excluded.permits THEN known.former ELSE known.permits END \
     WHERE known.namespace = excluded.namespace AND known.key = excluded.key \
     RETURNING coalesce((SELECT durably.permits FROM durably), $5::int4)";
