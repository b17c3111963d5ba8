//! The statements of a claim: they take a lock, with token and row, and give it back.

use super::quiet::{FRONT, WITHOUT_TOKEN};
use super::semaphore::{AGREE, find_permits, take_known_permit, take_permit};
use super::{Shape, batch, era};

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
    /// Queues for the lock until `lock_timeout`; a [newcomer](Place::Newcomer) does not where somebody has the turnstile. Gives the
    /// same as `Try`. Not without a catalog.
    ///
    /// If the slice before ended in an error *after* the lock had been granted, this takes it a second time, at once.
    /// [`Unlock`](Self::Unlock) lets go of it as often as it was taken.
    Queue(Place),
    /// As `Queue`, where the key has a row, or where there is no catalog. Gives the token, or at once no row: then it is for
    /// `Queue` to find out why. Without a catalog, whether the lock is had.
    QueueAgain(Place),
    /// Queues for the turnstile until `lock_timeout`: see [`Shape::turnstile`]. Gives a text when it is had.
    ///
    /// The session may have the lock already, or the turnstile, granted in the last moment of a slice without our knowing. So it first lets go
    /// of all: whoever has the turnstile may wait for the lock; and the session is to have the turnstile once, to give it back.
    Turnstile,
    /// Gives the lock back, says whether it was held, and takes lease and name off the session. Key as above.
    ///
    /// The session holds this one lock only, so letting go of all is letting go of it, however often it was taken.
    Unlock,
    /// As `Unlock`, but leaves lease and name for the next claim on the same key.
    UnlockOnly,
    /// Agrees how many permits semaphores have, where nobody has before.
    Agree,
    /// Finds permits that are free: see [`find_permits`].
    FindPermits,
    /// Takes many locks and gives others back: see [`batch`].
    Batch,
}

/// Where a session stands that queues for a lock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Place {
    /// It has not waited for a slice yet. It must pass the turnstile.
    #[default]
    Newcomer,
    /// It has the turnstile, and gives it back with the grant.
    Front,
}

impl Place {
    /// Part of the name of what is prepared.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Newcomer => "",
            Self::Front => "_front",
        }
    }

    /// Waits for the lock.
    fn wait(self, shape: Shape) -> String {
        let wait = shape.wait_for_lock();
        match self {
            Self::Newcomer => format!("CASE WHEN {} THEN {wait} ELSE false END", shape.pass_turnstile()),
            Self::Front => wait,
        }
    }

    /// One more column, where `granted` says that there is something to give back.
    pub(super) fn leave(self, shape: Shape, granted: &str) -> String {
        match self {
            Self::Front => {
                let turnstile = shape.turnstile();
                format!(", CASE WHEN {granted} THEN pg_catalog.pg_advisory_unlock({turnstile}) END")
            }
            Self::Newcomer => String::new(),
        }
    }
}

/// Takes the lock if it is free. Readers would have it before a writer that is between two slices of its wait, so they pass the turnstile;
/// writers have no way past one that waits.
///
/// Whoever is not let past the turnstile lets go of all: a statement before may have had the lock, but not the row. So who is refused has
/// nothing.
fn try_lock(shape: Shape) -> String {
    let attempt = shape.try_lock();
    if shape.shared {
        let pass = shape.pass_turnstile();
        format!("CASE WHEN {pass} THEN {attempt} ELSE (pg_catalog.pg_advisory_unlock_all())::text <> '' END")
    } else {
        attempt
    }
}

/// Waits for the fenced transactions of former holders, or says whether there is none.
fn pass_fence(fence_lock: &str, waits: bool) -> String {
    if waits {
        format!("(pg_catalog.pg_advisory_xact_lock({fence_lock}))::text = ''")
    } else {
        format!("pg_catalog.pg_try_advisory_xact_lock({fence_lock})")
    }
}

/// The text of a statement. Parameters: `$1` key; for `Try` and `Queue` also `$2` lease in milliseconds, as text, `$3`
/// application name, and with the catalog `$4` namespace, `$5` name of the key, `$6` annotation; for `Again` and
/// `QueueAgain` with the catalog `$2` to `$4` are the last three.
pub(crate) fn statement(verb: Verb, shape: Shape) -> String {
    statement_with(verb, shape, &|_| String::new())
}

/// As [`statement`], with one more column: what `told` makes of the text that says what came of a wait, which is empty if there is nothing to
/// tell.
pub(super) fn statement_with(verb: Verb, shape: Shape, told: &dyn Fn(&str) -> String) -> String {
    if shape.permit {
        return match verb {
            Verb::Agree => AGREE.to_owned(),
            Verb::FindPermits => find_permits(),
            Verb::Again => take_known_permit(),
            verb => take_permit(verb, shape, told),
        };
    }
    if shape.catalog && matches!(verb, Verb::Again | Verb::QueueAgain(_)) {
        return if shape.shared { share_known(verb, shape, told) } else { take_known(verb, shape, told) };
    }
    let unlock = shape.unlock("$1::pg_catalog.int8");
    let (granted, settings) = match verb {
        Verb::Try => (
            try_lock(shape),
            ", pg_catalog.set_config('idle_session_timeout', $2::text, false), \
               pg_catalog.set_config('application_name', $3::text, false)",
        ),
        Verb::QueueAgain(place) => {
            return format!(
                "SELECT attempt.granted{left}{told} FROM (SELECT {granted} AS granted OFFSET 0) AS attempt",
                left = place.leave(shape, "attempt.granted"),
                told = told(&format!("CASE WHEN attempt.granted THEN '{WITHOUT_TOKEN}' ELSE '' END")),
                granted = place.wait(shape)
            );
        }
        Verb::Turnstile => {
            return format!(
                "SELECT place.answer{told} FROM (SELECT CASE WHEN (pg_catalog.pg_advisory_unlock_all())::text = '' \
                     THEN CASE WHEN (pg_catalog.pg_advisory_lock({turnstile}))::text = '' THEN '{FRONT}' END \
                 END AS answer OFFSET 0) AS place",
                told = told("place.answer"),
                turnstile = shape.turnstile()
            );
        }
        // The settings stand from the `Try` before, and are
        // named only for the parameters to be the same.
        Verb::Queue(place) => (place.wait(shape), ", $2::text AS lease, $3::text AS application_name"),
        Verb::Again => return format!("SELECT {}", try_lock(shape)),
        Verb::Unlock => {
            return format!(
                "SELECT {unlock}, pg_catalog.pg_advisory_unlock_all(), \
                        pg_catalog.set_config('idle_session_timeout', '0', false), \
                        pg_catalog.set_config('application_name', NULL, false)"
            );
        }
        Verb::UnlockOnly => {
            return format!("SELECT {unlock}, pg_catalog.pg_advisory_unlock_all()");
        }
        Verb::Agree => return AGREE.to_owned(),
        Verb::FindPermits => return find_permits(),
        Verb::Batch => return batch(shape.catalog),
    };
    if shape.catalog {
        take_unknown(&granted, settings, verb, shape, told)
    } else {
        format!("SELECT {granted}, NULL::int8, NULL::text, NULL::text{settings}")
    }
}

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
/// take back the lease if it failed there, so it does not wait for the fence lock.
///
/// Readers that share the lock share the row, too, and its token: see [`share_known`]. The first of them after a writer makes it theirs, as a
/// term does that is alone. Of two that would at once, one gets no token, and finds the row of the other by its next statement.
fn take_unknown(
    granted: &str,
    settings: &str,
    verb: Verb,
    shape: Shape,
    told: &dyn Fn(&str) -> String,
) -> String {
    let pair = shape.pair;
    let row = format!("dsync.lock AS lock WHERE lock.id = $1::int8 AND lock.pair = {pair}");
    let waits = verb != Verb::Try;
    let mut passed = pass_fence(&shape.fence_lock(), waits);
    if !shape.shared {
        let readers = pass_fence(&shape.readers_fence_lock(), waits);
        passed = format!("CASE WHEN {passed} THEN {readers} END");
    }
    const DRAWN: &str = "pg_catalog.nextval('dsync.token')";
    let begins = |known| {
        format!("attempt WHERE CASE WHEN attempt.granted AND {era} {known} THEN {passed} END", era = era!())
    };
    let (known, columns, values, source, is_new, theirs) = if shape.shared {
        (
            format!(
                "known AS MATERIALIZED ( \
                     SELECT lock.token FROM attempt, {row} AND attempt.granted AND {era} \
                     AND lock.namespace = $4::text AND lock.key = $5::text AND lock.readers = lock.token \
                     FOR SHARE OF lock), ",
                era = era!()
            ),
            (", readers", ", readers = excluded.readers"),
            ("drawn.token", ", drawn.token"),
            format!(
                "(SELECT {DRAWN} AS token FROM {} OFFSET 0) AS drawn",
                begins("AND NOT EXISTS (SELECT FROM known)")
            ),
            "AND lock.readers IS DISTINCT FROM lock.token",
            "UNION ALL SELECT token FROM known",
        )
    } else {
        (String::new(), ("", ""), (DRAWN, ""), begins(""), "", "")
    };
    let ((column, set), (token, value)) = (columns, values);
    let left = match verb {
        Verb::Queue(place) => place.leave(shape, "(SELECT token FROM term) IS NOT NULL"),
        _ => String::new(),
    };
    format!(
        "WITH other AS MATERIALIZED ( \
             SELECT lock.namespace, lock.key FROM {row} \
             AND (lock.namespace <> $4::text OR lock.key <> $5::text)), \
         attempt AS MATERIALIZED ( \
             SELECT {granted} AS granted{settings} WHERE NOT EXISTS (SELECT FROM other)), \
         {known}begun AS ( \
             INSERT INTO dsync.lock AS lock (id, pair, namespace, key, token, annotation, pid, since{column}) \
             SELECT $1::int8, {pair}, $4::text, $5::text, {token}, $6::bytea, \
                    pg_catalog.pg_backend_pid(), pg_catalog.clock_timestamp(){value} \
             FROM {source} \
             ON CONFLICT (id, pair) DO UPDATE \
             SET token = excluded.token, annotation = excluded.annotation, pid = excluded.pid, since = excluded.since{set} \
             WHERE lock.namespace = excluded.namespace AND lock.key = excluded.key {is_new} \
             RETURNING lock.token), \
         term AS MATERIALIZED (SELECT token FROM begun {theirs}) \
         SELECT coalesce((SELECT granted FROM attempt), false), (SELECT token FROM term), \
                (SELECT namespace FROM other), (SELECT key FROM other){left}{told}",
        told = told("coalesce((SELECT token FROM term)::text, '')")
    )
}

/// Lock, token and row where the key has a row: gives the token, or no row at all.
///
/// The condition takes the lock, and the fence lock after it. `CASE` keeps the order, which `AND` alone would not:
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
fn take_known(verb: Verb, shape: Shape, told: &dyn Fn(&str) -> String) -> String {
    let (waits, taken, left) = match verb {
        Verb::QueueAgain(place) => {
            let taken = format!("WHEN NOT {} THEN false WHEN {}", era!(), place.wait(shape));
            (true, taken, place.leave(shape, "true"))
        }
        _ => (false, format!("WHEN {}", try_lock(shape)), String::new()),
    };
    let (writers, readers) =
        (pass_fence(&shape.fence_lock(), waits), pass_fence(&shape.readers_fence_lock(), waits));
    format!(
        "UPDATE dsync.lock AS lock \
         SET token = pg_catalog.nextval('dsync.token'), annotation = $4::bytea, \
             pid = pg_catalog.pg_backend_pid(), since = pg_catalog.clock_timestamp() \
         WHERE lock.id = $1::int8 AND lock.pair = {pair} \
         AND CASE WHEN lock.namespace <> $2::text OR lock.key <> $3::text THEN false \
                  {taken} THEN CASE WHEN NOT {writers} THEN false \
                                    WHEN lock.readers = lock.token THEN {readers} ELSE true END \
                  ELSE false END \
         RETURNING lock.token{left}{told}",
        pair = shape.pair,
        told = told("lock.token::text")
    )
}

/// Lock and token where the key has a row that is readers' already: gives the token, or no row at all. Nothing is written.
///
/// Since the row became theirs no writer's term has begun, so this reader's may have the same token: a fence compares it with the row's. And no
/// fenced transaction of a writer's can be open: whoever made it theirs has waited for them. This statement began to look before it was granted
/// the lock; `FOR SHARE` looks at the row as it is then, and tries the condition once more if it has been written since (`FOR KEY SHARE` would
/// not, since no key was changed). It is in nobody's way: only a writer's term writes the row, which cannot begin now.
fn share_known(verb: Verb, shape: Shape, told: &dyn Fn(&str) -> String) -> String {
    let (taken, left) = match verb {
        Verb::QueueAgain(place) => {
            (format!("WHEN NOT {} THEN false WHEN {}", era!(), place.wait(shape)), place.leave(shape, "true"))
        }
        _ => (format!("WHEN {}", try_lock(shape)), String::new()),
    };
    format!(
        "WITH term AS MATERIALIZED ( \
             SELECT lock.token FROM dsync.lock AS lock WHERE lock.id = $1::int8 AND lock.pair = {pair} AND $4::bytea IS NULL \
             AND CASE WHEN lock.namespace <> $2::text OR lock.key <> $3::text THEN false \
                      {taken} THEN coalesce(lock.readers = lock.token, false) ELSE false END \
             FOR SHARE OF lock) \
         SELECT term.token{left}{told} FROM term",
        pair = shape.pair,
        told = told("term.token::text")
    )
}
