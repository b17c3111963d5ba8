//! A primary dies and its streaming standby takes over, or it comes back as a standby itself: locks follow the primary,
//! the holders are told, and no standby ever has a lock.
//!
//! What befalls a single server is in `recovery.rs`.

use std::sync::Arc;

use dsync::{CatalogMode, Config, ErrorKind, Lock, LossReason, PostgresManager, TakeoverPolicy};
use postgres::Client;
use support::{Replication, Server, Shutdown};

use crate::common::{
    self, becomes, briefly, eventually, hear, in_both_modes, is_held, is_open, kind, lock, number_of, soon,
    started, wait_in_thread,
};

in_both_modes! {
    claims_move_over_to_the_standby_that_is_promoted
    claims_move_over_where_any_host_would_do_for_the_driver
    an_old_primary_that_comes_back_does_not_get_its_locks_back
    a_primary_that_is_made_a_standby_under_a_held_lock_is_not_used
}

const KEYS: [&str; 3] = ["a", "b", "c"];

/// One address for both, whichever is the primary. The takeover grace is another matter: see `takeover.rs`.
fn config(name: &str, servers: [&Server; 2], attributes: &str, shared_sessions: u32) -> Config {
    let [first, second] = servers.map(Server::port);
    let url = format!(
        "host=127.0.0.1,127.0.0.1 port={first},{second} user=postgres dbname=postgres \
         target_session_attrs={attributes} application_name={name}"
    );
    Config::from_url(&url).unwrap().takeover(TakeoverPolicy::Immediate).shared_sessions(shared_sessions)
}

fn locks(manager: &PostgresManager) -> Vec<Arc<dyn Lock>> {
    KEYS.map(|key| lock(manager, key)).to_vec()
}

/// Who has advisory locks, or waits for them, and which. A session of many locks has one more, which has no name.
fn on_the_server(operator: &mut Client, condition: &str) -> Vec<String> {
    let query = format!(
        "SELECT replace(application_name, '(many locks)', coalesce(key, '')) AS holding FROM pg_locks JOIN pg_stat_activity USING (pid)
         LEFT JOIN unnest('{{a,b,c,x,y}}'::text[]) AS key ON classid::int8 << 32 | objid::int8 = {number}
         WHERE locktype = 'advisory' AND {condition} AND (key IS NOT NULL OR application_name NOT LIKE '%(many locks)') ORDER BY 1",
        number = number_of("key")
    );
    operator.query(&query, &[]).unwrap().iter().map(|row| row.get(0)).collect()
}

fn named(name: &str) -> Vec<String> {
    KEYS.iter().map(|key| format!("{name} {key}")).collect()
}

fn token(lock: &Arc<dyn Lock>) -> i64 {
    lock.term().unwrap().token().unwrap()
}

/// How many sessions a server has been asked for by this name, up to now.
fn visits(server: &Server, name: &str) -> usize {
    let visit = format!("application_name={name}");
    server
        .log()
        .lines()
        .filter(|line| line.contains("connection authorized") && line.contains(&visit))
        .count()
}

/// `any` is what an operator writes who names two hosts and knows no more. What keeps the library from the standby is then
/// its own question, and not the driver's.
fn claims_move_over(attributes: &str, shared_sessions: u32) {
    let primary = Server::builder().setting("log_connections", "on").start().unwrap();
    let standby = primary.standby(Replication::Asynchronous).unwrap();
    let servers = [&primary, &standby];
    let [first, second] =
        ["first", "second"].map(|name| started(config(name, servers, attributes, shared_sessions)));
    let (held, wanted) = (locks(&first), locks(&second));
    held.iter().for_each(|lock| lock.lock(&soon()).unwrap());
    let waiting: Vec<_> = wanted.iter().map(wait_in_thread).collect();
    let operator = &mut primary.client().unwrap();
    becomes("the queue", &named("second"), || on_the_server(operator, "NOT granted"));
    // Between two slices one that waits has the turnstile for a moment.
    becomes("the holders", &named("first"), || on_the_server(operator, "granted"));
    let terms: Vec<_> = held.iter().map(|lock| lock.term().unwrap()).collect();
    // What has been written last need not have arrived.
    let last = terms.iter().map(|term| term.token().unwrap()).max().unwrap();

    primary.kill_hard().unwrap();
    for (term, lock) in terms.iter().zip(&held) {
        hear(term.lost());
        let reason = lock.last_loss().unwrap().reason;
        assert!(matches!(reason, LossReason::ConnectionClosed | LossReason::Terminated), "{reason:?}");
    }
    let operator = &mut standby.client().unwrap();
    let before = ["first", "second"].map(|name| visits(&standby, name));
    eventually("claims to look at the standby", || {
        let now = ["first", "second"].map(|name| visits(&standby, name));
        now.iter().zip(before).all(|(now, before)| *now >= before + 10)
    });
    assert_eq!(on_the_server(operator, "true"), Vec::<String>::new());
    assert!(!held.iter().chain(&wanted).any(is_held));
    assert!(!waiting.iter().any(common::Outcome::is_ready), "a call that waits goes on waiting");
    let patience = if attributes == "any" { ErrorKind::SessionRefused } else { ErrorKind::TimedOut };
    assert_eq!(kind(held[0].try_lock(&briefly())), patience);
    assert!(standby.is_in_recovery().unwrap());
    assert_eq!(on_the_server(operator, "true"), Vec::<String>::new());

    standby.promote().unwrap();
    eventually("all locks", || held.iter().zip(&wanted).all(|(one, other)| is_held(one) || is_held(other)));
    for (one, other) in held.iter().zip(&wanted) {
        assert_ne!(is_held(one), is_held(other), "{} has one holder", one.key());
        let winner = if is_held(one) { one } else { other };
        assert!(token(winner) > last, "tokens go on: {} after {last}", token(winner));
    }
    becomes("the locks on the new primary", &KEYS.len(), || on_the_server(operator, "granted").len());
    // All have their turn, and nobody's old term has come back.
    for ((one, other), waiting) in held.iter().zip(&wanted).zip(waiting) {
        let (winner, loser) = if is_held(one) { (one, other) } else { (other, one) };
        let had = token(winner);
        let told = |waiting: common::Outcome<dsync::Result<()>>| waiting.get().unwrap();
        // Who waits is told while it is so, or not at all.
        let mut waiting = Some(waiting);
        if is_held(other) {
            waiting.take().map(told);
        }
        winner.release().unwrap();
        eventually("the lock of the other", || is_held(loser));
        assert!(token(loser) > had);
        waiting.map(told);
        loser.release().unwrap();
    }
    assert!(terms.iter().all(|term| !is_open(term.lost())));
    becomes("the locks that are left", &Vec::new(), || on_the_server(operator, "true"));
}

fn claims_move_over_to_the_standby_that_is_promoted(shared_sessions: u32) {
    claims_move_over("read-write", shared_sessions);
}

fn claims_move_over_where_any_host_would_do_for_the_driver(shared_sessions: u32) {
    claims_move_over("any", shared_sessions);
}

/// The old primary returns, as a standby would do best. Both hosts answer then.
fn an_old_primary_that_comes_back_does_not_get_its_locks_back(shared_sessions: u32) {
    let primary = Server::start().unwrap();
    let standby = primary.standby(Replication::Asynchronous).unwrap();
    let manager = started(config("only", [&primary, &standby], "read-write", shared_sessions));
    let x = lock(&manager, "x");
    x.lock(&soon()).unwrap();
    let term = x.term().unwrap();
    primary.kill_hard().unwrap();
    hear(term.lost());
    standby.promote().unwrap();
    eventually("the lock on the new primary", || is_held(&x));
    let now = x.term().unwrap();
    assert!(now.token() > term.token());
    become_standby(&primary);
    assert_eq!(on_the_server(&mut primary.client().unwrap(), "true"), Vec::<String>::new());
    assert_eq!(on_the_server(&mut standby.client().unwrap(), "true"), ["only x"]);

    // And if its session is lost, the standby that is first in the list is passed over.
    let backend: i32 = standby
        .client()
        .unwrap()
        .query_one("SELECT pid FROM dsync.locks WHERE key = 'x'", &[])
        .unwrap()
        .get(0);
    standby.terminate(backend).unwrap();
    hear(now.lost());
    eventually("the lock again", || is_held(&x));
    assert!(x.term().unwrap().token() > now.token());
    assert_eq!(on_the_server(&mut primary.client().unwrap(), "true"), Vec::<String>::new());
}

/// Starts a server that was stopped, as a standby.
fn become_standby(server: &Server) {
    std::fs::write(server.data_dir().join("standby.signal"), "").unwrap();
    server.start_again().unwrap();
    assert!(server.is_in_recovery().unwrap());
}

fn a_primary_that_is_made_a_standby_under_a_held_lock_is_not_used(shared_sessions: u32) {
    let server = Server::start().unwrap();
    let config = || {
        let config = Config::from_url(&server.url()).unwrap().takeover(TakeoverPolicy::Immediate);
        config.shared_sessions(shared_sessions)
    };
    let manager = started(config());
    let x = lock(&manager, "x");
    x.lock(&soon()).unwrap();
    let term = x.term().unwrap();
    // Without a catalog no statement of a claim writes anything, so a standby has no objections.
    let plain = started(config().catalog(CatalogMode::None));
    let y = lock(&plain, "y");
    y.lock(&soon()).unwrap();
    let lost_too = y.lost();
    server.stop(Shutdown::Fast).unwrap();
    hear(term.lost());
    hear(&lost_too);
    become_standby(&server);

    for lock in [&x, &y] {
        eventually("the refusal", || {
            let error = lock.try_lock(&soon()).expect_err("a standby keeps no locks");
            // The attempt that was under way may have found nobody.
            error.kind() == ErrorKind::SessionRefused && error.to_string().contains("hot standby")
        });
        assert!(!is_held(lock));
    }
    let error = x.lock(&briefly()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
    assert!(error.to_string().contains("target_session_attrs=read-write"), "{error}");
    let operator = &mut server.client().unwrap();
    assert_eq!(on_the_server(operator, "true"), Vec::<String>::new());

    server.promote().unwrap();
    eventually("the locks in the background", || is_held(&x) && is_held(&y));
    assert!(x.term().unwrap().token() > term.token());
    assert_eq!(on_the_server(operator, "true"), ["dsync x", "dsync y"]);
}
