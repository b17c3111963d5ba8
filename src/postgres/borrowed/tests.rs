//! What no race can be made to show: a wait that fails after the grant.

use std::sync::{Arc, Mutex};

use postgres::{Client, NoTls};

use super::rows;
use crate::key::AdvisoryKey;
use crate::pg::sql::{Advisory, Lasting};

/// A connection of which the server's messages are kept.
fn client(url: &str) -> (Client, Arc<Mutex<Vec<String>>>) {
    let said = Arc::new(Mutex::new(Vec::new()));
    let mut config: postgres::Config = url.parse().unwrap();
    let listener = Arc::clone(&said);
    config.notice_callback(move |notice| listener.lock().unwrap().push(notice.message().to_owned()));
    (config.connect(NoTls).unwrap(), said)
}

fn locks(client: &mut Client) -> i64 {
    let query = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()";
    client.query_one(query, &[]).unwrap().get(0)
}

#[test]
fn a_lock_of_a_session_that_was_granted_before_the_wait_failed_is_taken_back() {
    let database = support::Database::fresh().unwrap();
    let (mut client, said) = client(&database.url());
    for key in [
        AdvisoryKey::Single(7),
        AdvisoryKey::Single(-7),
        AdvisoryKey::Single(i64::MIN),
        AdvisoryKey::Pair(7, -7),
        AdvisoryKey::Pair(i32::MIN, i32::MAX),
    ] {
        for shared in [false, true] {
            let advisory = Advisory { key, lasting: Lasting::Session, shared };
            let others = Advisory { shared: !shared, ..advisory };
            rows(&mut client, &others.attempt()).unwrap();
            rows(&mut client, &advisory.attempt()).unwrap();
            assert_eq!(locks(&mut client), 2, "{key:?}");
            for left in [1, 1] {
                let answer = rows(&mut client, &advisory.take_back()).unwrap();
                assert_eq!(locks(&mut client), left, "{key:?}");
                assert_eq!(answer.last().unwrap()[0].as_deref(), Some("0"), "the statement timeout");
            }
            rows(&mut client, &others.take_back()).unwrap();
            assert_eq!(locks(&mut client), 0, "{key:?}");
        }
    }
    assert!(said.lock().unwrap().is_empty(), "the server warns of nothing: {said:?}");
}
