//! A slice of a wait that ends without an error, and so without a line in the server's log.
//!
//! A statement that runs into `lock_timeout`, or is cancelled, ends in an error, and the server logs an error together with
//! its statement: 24 lines a minute for each session that waits. An error that PL/pgSQL catches is not logged. A session's
//! advisory lock outlives the subtransaction that is rolled back then, a row that was written does not: so the lock may be
//! had without our knowing, as after an error.
//!
//! A `DO` block has neither parameters nor a result. Both are settings, which the same message sets before and shows
//! after, so that the text of the block is the same for all keys (an extension that counts statements keeps one entry for
//! it). The answer is set by the statement that waits, as one more column of it: what is planned after the grant is what
//! makes a hand-over slow.

use crate::pg::sql::schema::Schema;
use crate::pg::sql::{Entry, Shape, Verb, statement_with};

/// What came of a slice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Told {
    /// The slice is over.
    Over,
    /// The lock is held, and so is the row, if there is a catalog: the token. Of a semaphore, which permit.
    Granted { token: Option<i64>, permit: Option<u32> },
    /// The session has the turnstile.
    Front,
    /// There is no token, for a reason that the plain statement tells.
    Nothing,
}

const OVER: &str = "over";
/// The answer where the turnstile was asked for, and is had.
pub(super) const FRONT: &str = "front";
/// The answer where there is no catalog.
pub(super) const WITHOUT_TOKEN: &str = "granted";

/// Prepares the statement of `verb`, which waits: [`Verb::Queue`], [`Verb::QueueAgain`] or [`Verb::Turnstile`]. To be run once in a session.
///
/// So nothing of it is planned while somebody waits. And a server that logs long waits logs the name of the statement with
/// each, and not its text twice.
pub(crate) fn preparation(verb: Verb, shape: Shape, schema: &Schema) -> String {
    // The setting is called so wherever the catalog is.
    const SETTING: &str = "<answer>";
    let types = match (shape.catalog, verb) {
        _ if shape.permit => "int8, text, text, text, text, bytea, int4, int4",
        (false, _) => "int8",
        (true, Verb::QueueAgain(_)) => "int8, text, text, bytea",
        (true, _) => "int8, text, text, text, text, bytea",
    };
    let answer = |told: &str| format!(", pg_catalog.set_config('{SETTING}', {told}, true)");
    let statement = schema.apply(&statement_with(verb, shape, &answer)).replace(SETTING, "dsync.answer");
    format!("PREPARE {name} ({types}) AS {statement}", name = name(verb, shape))
}

fn name(verb: Verb, shape: Shape) -> String {
    let (verb, place) = match verb {
        Verb::QueueAgain(place) => ("again", place.name()),
        Verb::Queue(place) => ("queue", place.name()),
        _ => ("turnstile", ""),
    };
    format!("dsync_{verb}{}{place}", shape.name())
}

/// The message that runs a slice, for which there must have been a [`preparation`]. Its last row is the answer.
///
/// Only the two errors that end a wait are caught. Whatever else fails is an error of the message.
///
/// Of a semaphore, `looks` says how many permits it is said to have, and for how many milliseconds the session has looked for one.
pub(crate) fn message(verb: Verb, shape: Shape, id: i64, entry: Option<&Entry>, looks: (i32, i32)) -> String {
    const NAMES: &str = "pg_catalog.current_setting('dsync.namespace'), pg_catalog.current_setting('dsync.key'), \
         pg_catalog.decode(pg_catalog.substr(nullif(pg_catalog.current_setting('dsync.annotation'), ''), 2), 'hex')";
    let mut settings = vec![("answer", String::new()), ("id", id.to_string())];
    if let Some(Entry { namespace, key, annotation }) = entry {
        // An empty annotation is not the same as none.
        let annotation = annotation.as_ref().map_or_else(String::new, |bytes| {
            bytes.iter().fold(String::from("x"), |text, byte| text + &format!("{byte:02x}"))
        });
        settings.extend([("namespace", namespace.clone()), ("key", key.clone()), ("annotation", annotation)]);
    }
    if shape.permit {
        settings.extend([("permits", looks.0.to_string()), ("waited", looks.1.to_string())]);
    }
    let settings: Vec<String> = settings
        .iter()
        .map(|(name, value)| format!("pg_catalog.set_config('dsync.{name}', {}, false)", literal(value)))
        .collect();
    let id = "pg_catalog.current_setting('dsync.id')::pg_catalog.int8";
    let parameters = match (shape.catalog, verb) {
        _ if shape.permit => format!(
            "{id}, '', '', {NAMES}, pg_catalog.current_setting('dsync.permits')::pg_catalog.int4, \
             pg_catalog.current_setting('dsync.waited')::pg_catalog.int4"
        ),
        (false, _) => id.to_owned(),
        (true, Verb::QueueAgain(_)) => format!("{id}, {NAMES}"),
        // Lease and name stand from the statement before.
        (true, _) => format!("{id}, '', '', {NAMES}"),
    };
    format!(
        "SELECT {settings}; \
         DO $dsync$BEGIN \
             EXECUTE $wait$EXECUTE {name}({parameters})$wait$; \
         EXCEPTION WHEN lock_not_available OR query_canceled THEN \
             PERFORM pg_catalog.set_config('dsync.answer', '{OVER}', true); \
         END$dsync$; \
         SHOW dsync.answer",
        settings = settings.join(", "),
        name = name(verb, shape)
    )
}

/// What the last row of the message says; `None` if that is no answer.
pub(crate) fn told(answer: &str) -> Option<Told> {
    match answer {
        "" => Some(Told::Nothing),
        OVER => Some(Told::Over),
        WITHOUT_TOKEN => Some(Told::Granted { token: None, permit: None }),
        FRONT => Some(Told::Front),
        granted => {
            let (token, permit) =
                granted.split_once('/').map_or((granted, None), |(token, permit)| (token, Some(permit)));
            let permit = permit.map(str::parse).transpose().ok()?;
            Some(Told::Granted { token: Some(token.parse().ok()?), permit })
        }
    }
}

/// Whether an error says that there are no such blocks here: without PL/pgSQL, without the right to use it, or on a
/// server that has none, or where somebody has taken the prepared statement away.
pub(crate) fn is_unknown_here(code: &str) -> bool {
    matches!(code, "42704" | "42501" | "0A000" | "26000")
}

/// Text as SQL, whatever `standard_conforming_strings` is.
pub(super) fn literal(text: &str) -> String {
    format!("E'{}'", text.replace('\\', "\\\\").replace('\'', "''"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pg::sql::Place;

    #[test]
    fn text_of_the_application_stays_text() {
        assert_eq!(literal(r"a'b\c"), r"E'a''b\\c'");
        assert_eq!(literal(r"\'; DROP TABLE x; --"), r"E'\\''; DROP TABLE x; --'");
    }

    /// The name of the schema is not a part of it.
    #[test]
    fn what_is_prepared_answers_by_the_same_setting_in_every_schema() {
        let shape = Shape { pair: false, catalog: true, shared: true, permit: false };
        for name in ["dsync", "locks"] {
            for verb in [Verb::QueueAgain(Place::Newcomer), Verb::Queue(Place::Front), Verb::Turnstile] {
                let text = preparation(verb, shape, &Schema::new(name));
                assert!(text.starts_with("PREPARE dsync_") && text.contains("('dsync.answer', "), "{text}");
                assert!(name == "dsync" || !text.contains("dsync.lock"), "{text}");
            }
        }
    }

    #[test]
    fn the_block_is_the_same_for_all_keys() {
        let message = |id, key: &str| {
            let shape = Shape { pair: false, catalog: true, shared: false, permit: false };
            let entry = Entry { namespace: "dsync".to_owned(), key: key.to_owned(), annotation: None };
            let text = message(Verb::QueueAgain(Place::Newcomer), shape, id, Some(&entry), (0, 0));
            text.split_once("DO ").unwrap().1.to_owned()
        };
        assert_eq!(message(1, "a"), message(2, "b"));
    }

    #[test]
    fn only_a_token_or_its_word_is_a_grant() {
        assert_eq!(told("17"), Some(Told::Granted { token: Some(17), permit: None }));
        assert_eq!(told("17/3"), Some(Told::Granted { token: Some(17), permit: Some(3) }));
        assert_eq!(told("granted"), Some(Told::Granted { token: None, permit: None }));
        assert_eq!(told("over"), Some(Told::Over));
        assert_eq!(told("front"), Some(Told::Front));
        assert_eq!(told(""), Some(Told::Nothing));
        assert_eq!((told("on"), told("17/"), told("/3")), (None, None, None));
    }
}
