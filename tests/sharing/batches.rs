//! One session, one statement for many, and an error that hits one key only.

use std::collections::HashSet;
use std::sync::Arc;
use std::thread;

use dsync::{CatalogMode, ErrorKind, LockOptions, json_valuer};
use support::{Database, Server};

use super::*;
use crate::common::{becomes, begin, eventually, kind};

#[test]
fn a_thousand_locks_are_on_one_session_each_with_a_term_of_its_own() {
    const COUNT: usize = 1_000;
    let database = Database::fresh().unwrap();
    let operator = &mut database.client().unwrap();
    let manager = sharing(&database.url(), 2);
    let locks = locks(&manager, COUNT);
    let threads = support::process::threads(support::process::own());
    locks.iter().for_each(|lock| lock.lock(&soon()).unwrap());
    assert_eq!(held(operator), (COUNT as i64, 1));
    assert_eq!(sessions(&manager), 1);
    let tokens = tokens(&locks);
    assert_eq!(HashSet::<_>::from_iter(&tokens).len(), COUNT);
    assert!(tokens.is_sorted(), "each that was taken later has a greater one");
    if let (Some(before), Some(now)) = (threads, support::process::threads(support::process::own())) {
        // That of the carrier, and that of the watchdog. Other tests run beside this one.
        println!("{} threads more for {COUNT} locks", now.saturating_sub(before));
    }
    // One is given back, and another process gets it; the others stay.
    let other = started(dsync::Config::from_url(&database.url()).unwrap());
    locks[7].release().unwrap();
    let taken = lock(&other, "k7");
    taken.try_lock(&soon()).unwrap();
    assert!(taken.term().unwrap().token() > Some(tokens[COUNT - 1]));
    assert_eq!(held(operator), (COUNT as i64, 2));
    taken.release().unwrap();
    manager.stop().unwrap();
    // The server is a moment later with the session, and so with its witness.
    let locks = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";
    becomes("the locks", &0, || number(operator, locks));
}

#[test]
fn what_is_asked_for_at_once_goes_in_a_few_statements() {
    const COUNT: usize = 64;
    for catalog in [CatalogMode::None, CatalogMode::Automatic] {
        let server = Server::builder().setting("log_statement", "all").start().unwrap();
        let manager = started(config(&server.url(), 1).catalog(catalog).lease(LONG));
        let locks = locks(&manager, COUNT);
        // The session is there, and its statements are prepared.
        for _ in 0..3 {
            locks[0].lock(&soon()).unwrap();
            locks[0].release().unwrap();
        }
        let batches = |server: &Server| server.log().matches("AS op (id, code, place)").count();
        let before = batches(&server);
        let frozen = server.freeze().unwrap();
        let waiting: Vec<_> = locks.iter().map(common::wait_in_thread).collect();
        eventually("claims of all", || manager.snapshot().claims.len() == COUNT);
        drop(frozen);
        waiting.into_iter().for_each(|outcome| outcome.get().unwrap());
        let took = batches(&server) - before;
        // The first went alone, and all that had come meanwhile along with each other; where a thread was late, one more.
        println!("{catalog:?}: {COUNT} locks in {took} statements");
        assert!((2..=COUNT / 4).contains(&took), "{took}");
        let before = batches(&server);
        manager.stop().unwrap();
        println!("{catalog:?}: given back in {} statements", batches(&server) - before);
    }
}

/// In the encoding LATIN1 there is no place for the name of this key, so a statement with it fails as a whole.
const BAD: &str = "鍵";

#[test]
fn a_key_that_the_database_cannot_write_hits_no_other_of_its_batch() {
    const COUNT: usize = 300;
    let server = Server::start().unwrap();
    server
        .client()
        .unwrap()
        .batch_execute("CREATE DATABASE latin TEMPLATE template0 ENCODING 'LATIN1' LOCALE 'C'")
        .unwrap();
    let url = server.url();
    let url = format!("{}/latin", url.rsplit_once('/').unwrap().0);
    let manager = started(config(&url, 1).lease(LONG));
    let locks = locks(&manager, COUNT);
    locks[0].lock(&soon()).unwrap();
    let frozen = server.freeze().unwrap();
    // All come while the server stands still, so they go in few statements, and the bad one with others.
    let bad = lock(&manager, BAD);
    let refused = begin({
        let bad = Arc::clone(&bad);
        move || bad.try_lock(&soon())
    });
    let waiting: Vec<_> = locks.iter().map(common::wait_in_thread).collect();
    eventually("claims of all", || manager.snapshot().claims.len() == COUNT + 1);
    drop(frozen);
    waiting.into_iter().for_each(|outcome| outcome.get().unwrap());
    let error = refused.get().unwrap_err();
    println!("{error}");
    assert!(!is_held(&bad) && locks.iter().all(is_held));
    assert_eq!(tokens(&locks).iter().collect::<HashSet<_>>().len(), COUNT);
    // Nothing of the statements that failed is left.
    bad.release().unwrap();
    locks.iter().for_each(|lock| lock.release().unwrap());
    let operator = &mut postgres::Client::connect(&url, postgres::NoTls).unwrap();
    becomes("the locks", &0, || held(operator).0);
    let other = started(dsync::Config::from_url(&url).unwrap());
    for number in [0, 1, COUNT / 2, COUNT - 1] {
        lock(&other, &format!("k{number}")).try_lock(&soon()).unwrap();
    }
}

#[test]
fn a_full_table_of_locks_is_told_with_advice_and_costs_nobody_a_lock() {
    let server =
        Server::builder().max_connections(10).setting("max_locks_per_transaction", "10").start().unwrap();
    let manager = started(config(&server.url(), 1).catalog(CatalogMode::None).lease(LONG));
    let mut had = Vec::new();
    let error = loop {
        let lock = lock(&manager, &format!("k{}", had.len()));
        match lock.try_lock(&soon()) {
            Ok(()) => had.push(lock),
            Err(error) => {
                lock.release().unwrap();
                break error;
            }
        }
        assert!(had.len() < 100_000, "the table has no end");
    };
    let text = dsync_chain(&error);
    println!("{} locks, and then: {text}", had.len());
    assert!(text.contains("max_locks_per_transaction"), "{text}");
    assert!(had.iter().all(is_held));
    // With room there is one more.
    for lock in had.drain(..20) {
        lock.release().unwrap();
    }
    lock(&manager, "one more").lock(&soon()).unwrap();
    assert!(had.iter().all(is_held));
    manager.stop().unwrap();
}

fn dsync_chain(error: &dsync::Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

#[test]
fn a_row_that_a_fenced_transaction_has_holds_up_its_own_lock_only() {
    let database = Database::fresh().unwrap();
    let former = started(dsync::Config::from_url(&database.url()).unwrap());
    let first = lock(&former, "k0");
    first.lock(&soon()).unwrap();
    let term = first.term().unwrap();
    let client = &mut database.client().unwrap();
    let mut transaction = client.transaction().unwrap();
    term.fence(&mut transaction).unwrap();
    first.release().unwrap();
    let manager = sharing(&database.url(), 2);
    let locks = locks(&manager, 20);
    // The lock itself is free, and no term begins while the transaction is open.
    let waits = begin({
        let lock = Arc::clone(&locks[0]);
        move || lock.lock(&soon())
    });
    lock_all(&locks[1..]);
    eventually("the one that waits", || in_state(&manager, ClaimState::Queueing) == 1);
    assert!(!waits.is_ready() && !is_held(&locks[0]) && locks[1..].iter().all(is_held));
    transaction.commit().unwrap();
    waits.get().unwrap();
    assert!(locks[0].term().unwrap().token() > term.token());
}

/// A statement for many began to look before another session was the first reader of one of its keys.
#[test]
fn readers_of_many_keys_that_begin_at_once_on_several_sessions_have_one_token_for_each_key() {
    const KEYS: usize = 40;
    let database = Database::fresh().unwrap();
    let client = &mut database.client().unwrap();
    let managers = [(); 3].map(|()| sharing(&database.url(), 1));
    let writers = locks(&managers[0], KEYS);
    let reader = |manager: &PostgresManager, number| {
        manager.lock_with(format!("k{number}"), LockOptions::new().shared()).unwrap()
    };
    for round in 0..20 {
        lock_all(&writers);
        let newest = tokens(&writers);
        thread::scope(|scope| {
            for lock in &writers {
                scope.spawn(|| lock.release().unwrap());
            }
        });
        let readers: Vec<Vec<_>> = managers
            .iter()
            .map(|manager| (0..KEYS).map(|number| reader(manager, number)).collect())
            .collect();
        // Nobody is in the way of any.
        thread::scope(|scope| {
            for lock in readers.iter().flatten() {
                scope.spawn(|| lock.lock(&soon()).unwrap());
            }
        });
        let read = tokens(&readers[0]);
        for others in &readers[1..] {
            assert_eq!(tokens(others), read, "round {round}");
        }
        assert!(read.iter().zip(&newest).all(|(reader, writer)| reader > writer), "round {round}");
        for lock in readers.iter().flatten() {
            assert!(passes(client, &lock.term().unwrap()), "round {round}");
        }
        thread::scope(|scope| {
            for lock in readers.iter().flatten() {
                scope.spawn(|| lock.release().unwrap());
            }
        });
    }
}

#[test]
fn a_valuer_that_takes_its_time_holds_up_its_own_lock_only() {
    let database = Database::fresh().unwrap();
    let operator = &mut database.client().unwrap();
    let manager = sharing(&database.url(), 1);
    let (hold, held_up) = crossbeam_channel::bounded::<()>(0);
    let is_second = std::sync::atomic::AtomicBool::new(false);
    let valuer = move || {
        if is_second.swap(true, std::sync::atomic::Ordering::SeqCst) {
            let _ = held_up.recv();
        }
        b"slow".to_vec()
    };
    let slow = manager.lock_with("slow", LockOptions::new().valuer(Arc::new(valuer))).unwrap();
    let quick = manager.lock_with("quick", LockOptions::new().valuer(json_valuer(&7).unwrap())).unwrap();
    slow.lock(&soon()).unwrap();
    quick.lock(&soon()).unwrap();
    let lost = quick.lost();
    operator.execute("SELECT pg_terminate_backend(pid) FROM dsync.locks WHERE key = 'quick'", &[]).unwrap();
    common::hear(&lost);
    eventually("the quick one", || is_held(&quick));
    assert!(!is_held(&slow));
    drop(hold);
    eventually("the slow one", || is_held(&slow));
    let annotation = |key: &str, operator: &mut postgres::Client| -> Vec<u8> {
        operator.query_one("SELECT annotation FROM dsync.locks WHERE key = $1", &[&key]).unwrap().get(0)
    };
    assert_eq!(
        (annotation("slow", operator), annotation("quick", operator)),
        (b"slow".to_vec(), b"7".to_vec())
    );
}

#[test]
fn two_names_with_one_number_are_told_apart_on_one_session() {
    let database = Database::fresh().unwrap();
    let operator = &mut database.client().unwrap();
    let manager = sharing(&database.url(), 2);
    lock(&manager, "a").lock(&soon()).unwrap();
    lock(&manager, "a").release().unwrap();
    // As if the hash of another name were the same.
    operator.execute("UPDATE dsync.lock SET key = 'b' WHERE key = 'a'", &[]).unwrap();
    let others = locks(&manager, 10);
    let a = lock(&manager, "a");
    let outcome = begin(move || a.try_acquire().map(|guard| guard.is_some()));
    lock_all(&others);
    assert_eq!(kind(outcome.get()), ErrorKind::InvalidKey);
    assert!(others.iter().all(is_held));
}

#[test]
fn a_lock_may_have_a_session_of_its_own_and_a_manager_without_shared_ones_may_share_for_some() {
    let database = Database::fresh().unwrap();
    let (sharing, not) =
        (sharing(&database.url(), 3), started(dsync::Config::from_url(&database.url()).unwrap()));
    for (manager, own, shared) in [(&sharing, Some(false), None), (&not, None, Some(true))] {
        let with = |key: &str, choice: Option<bool>| {
            let options =
                choice.map_or_else(LockOptions::new, |shared| LockOptions::new().shared_session(shared));
            manager.lock_with(key, options).unwrap()
        };
        let mine: Vec<_> = (0..5).map(|number| with(&format!("{number} of 5"), shared)).collect();
        mine.iter().for_each(|lock| lock.lock(&soon()).unwrap());
        assert_eq!(sessions(manager), 1);
        let alone = with("alone", own);
        alone.lock(&soon()).unwrap();
        assert_eq!(sessions(manager), 2);
        mine.iter().chain([&alone]).for_each(|lock| lock.release().unwrap());
    }
}

#[test]
fn a_session_without_a_claim_is_given_back_and_the_next_claim_has_one_again() {
    let database = Database::fresh().unwrap();
    let manager = sharing(&database.url(), 1);
    for _ in 0..3 {
        lock(&manager, "x").acquire(LONG).unwrap().release().unwrap();
        eventually("the session's return", || sessions(&manager) == 0);
    }
    lock(&manager, "x").acquire(LONG).unwrap().release().unwrap();
}
