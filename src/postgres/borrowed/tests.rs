//! What no race can be made to show: a wait that fails after the grant.

use std::sync::{Arc, Mutex};

use postgres::{Client, NoTls};

use super::rows;
use crate::key::AdvisoryKey;
use crate::pg::sql::{Advisory, Lasting};

/// Of the operators that the statement needs, others come first. They are asked last, and only about a lock that is held.
const TRAPS: &str = "CREATE SCHEMA traps;
    DO $do$ DECLARE type text; BEGIN
        FOREACH type IN ARRAY '{text, oid, int4, int2}'::text[] LOOP
            EXECUTE format('CREATE FUNCTION traps.trap(%1$s, %1$s) RETURNS bool LANGUAGE plpgsql AS
                            $f$ BEGIN RAISE ''trapped''; END $f$;
                            CREATE OPERATOR traps.= (LEFTARG = %1$s, RIGHTARG = %1$s, FUNCTION = traps.trap)', type);
        END LOOP;
    END $do$;
    SET search_path = traps, pg_catalog";

fn locks(operator: &mut Client) -> i64 {
    let query = "SELECT count(*) FROM pg_locks JOIN pg_database ON oid = database
                 WHERE locktype = 'advisory' AND datname = current_database()";
    operator.query_one(query, &[]).unwrap().get(0)
}

#[test]
fn a_lock_of_a_session_that_was_granted_before_the_wait_failed_is_taken_back() {
    let database = support::Database::fresh().unwrap();
    let mut operator = database.client().unwrap();
    let said = Arc::new(Mutex::new(Vec::new()));
    let mut config: postgres::Config = database.url().parse().unwrap();
    let listener = Arc::clone(&said);
    config.notice_callback(move |notice| listener.lock().unwrap().push(notice.message().to_owned()));
    let mut client = config.connect(NoTls).unwrap();
    client.batch_execute(TRAPS).unwrap();
    for key in [
        AdvisoryKey::Single(7),
        AdvisoryKey::Single(-7),
        AdvisoryKey::Single(i64::MIN),
        AdvisoryKey::Pair(7, -7),
        AdvisoryKey::Pair(i32::MIN, i32::MAX),
    ] {
        for shared in [false, true] {
            let advisory = Advisory { key, lasting: Lasting::Session, shared };
            let other = Advisory { shared: !shared, ..advisory };
            rows(&mut client, &other.attempt()).unwrap();
            rows(&mut client, &advisory.attempt()).unwrap();
            assert_eq!(locks(&mut operator), 2, "{key:?}");
            // Twice, of which the second finds nothing: the other one is not touched.
            for _ in 0..2 {
                let answer = rows(&mut client, &advisory.take_back()).unwrap();
                assert_eq!(locks(&mut operator), 1, "{key:?}");
                assert_eq!(answer.last().unwrap()[0].as_deref(), Some("0"), "the statement timeout");
            }
            rows(&mut client, &other.take_back()).unwrap();
            assert_eq!(locks(&mut operator), 0, "{key:?}");
        }
    }
    assert!(said.lock().unwrap().is_empty(), "the server warns of nothing: {said:?}");
}
