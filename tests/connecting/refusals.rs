//! What cannot keep locks is refused, with what to do about it: poolers that share sessions, hot standbys, old servers.
//! And what looks like it and can is not.
//!
//! What is refused by the server itself (passwords, rights, TLS) is in `bad_input.rs`.

use std::error::Error as _;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::thread;
use std::time::Duration;

use dsync::{
    CatalogMode, Config, Context, Error, ErrorKind, LossReason, PostgresManager, SyncManager, json_valuer,
};
use parking_lot::Mutex;
use postgres::{Client, NoTls, SimpleQueryMessage};
use support::pgbouncer::{self, PoolMode};
use support::process::{self, Signal};
use support::{Replication, Server};

use crate::common::{
    Lateness, becomes, begin, briefly, eventually, hear, is_held, kind, lock, soon, started, wait_in_thread,
};

fn config(url: &str) -> Config {
    Config::from_url(url).unwrap().release_timeout(Duration::from_secs(20))
}

fn manager(url: &str) -> PostgresManager {
    PostgresManager::new(config(url)).unwrap()
}

/// That `start` refuses, and the refusal that is the reason.
fn start_refused(manager: PostgresManager) -> Error {
    let error = begin(move || manager.start()).get().expect_err("the server refuses");
    assert_eq!(error.kind(), ErrorKind::FailedInitialization, "{error}");
    let cause = error.source().and_then(|cause| cause.downcast_ref::<Error>()).expect("the cause is kept");
    assert_eq!(cause.kind(), ErrorKind::SessionRefused, "{error}");
    assert!(error.to_string().contains(&cause.to_string()), "the text is the whole story: {error}");
    cause.clone()
}

fn tells(error: &Error, texts: &[&str]) {
    assert_eq!(error.kind(), ErrorKind::SessionRefused, "{error}");
    for text in texts {
        assert!(error.to_string().contains(text), "{text:?} is missing: {error}");
    }
}

/// What an error says about a pooler.
const ADVICE: [&str; 3] = ["a pooler in transaction or statement mode", "directly", "session mode"];

fn is_about_poolers(error: &Error) -> bool {
    error.kind() == ErrorKind::SessionRefused && ADVICE.iter().all(|text| error.to_string().contains(text))
}

fn advisory_locks(operator: &mut Client) -> i64 {
    operator
        .query_one("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted", &[])
        .unwrap()
        .get(0)
}

fn waiters(operator: &mut Client) -> i64 {
    operator
        .query_one("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted", &[])
        .unwrap()
        .get(0)
}

/// The session that holds the lock `x`.
fn holder(operator: &mut Client) -> Option<i32> {
    let query = "SELECT pid FROM pg_locks JOIN pg_stat_activity USING (pid)
                 WHERE locktype = 'advisory' AND granted AND application_name LIKE '% x'";
    operator.query_opt(query, &[]).unwrap().map(|row| row.get(0))
}

// ---------------------------------------------------------------------------------------------------------------------
// Poolers
// ---------------------------------------------------------------------------------------------------------------------

/// A pooler's server sessions: opened at once, and idle when this returns.
fn warm_up(url: &str, count: usize) {
    let mut clients: Vec<Client> = (0..count).map(|_| Client::connect(url, NoTls).unwrap()).collect();
    for client in &mut clients {
        client.simple_query("BEGIN").unwrap();
    }
    for client in &mut clients {
        client.simple_query("COMMIT").unwrap();
    }
}

#[test]
fn a_pooler_that_shares_sessions_is_refused_at_the_start() {
    if support::skip_without(pgbouncer::available()) {
        return;
    }
    let server = Server::start().unwrap();
    for mode in [PoolMode::Transaction, PoolMode::Statement] {
        for size in ["1", "20"] {
            println!("{mode:?}, {size} server sessions");
            let bouncer = pgbouncer::start_with(&server, mode, &[("default_pool_size", size)]).unwrap();
            let url = bouncer.url("postgres");
            tells(&start_refused(manager(&url)), &ADVICE);
            let without = PostgresManager::new(config(&url).catalog(CatalogMode::None)).unwrap();
            tells(&start_refused(without), &ADVICE);
        }
    }
    assert_eq!(advisory_locks(&mut server.client().unwrap()), 0);
}

/// Such a pooler gives each statement to the server session that has rested longest. So two clients may well be served by
/// two sessions at one time, and a statement is not known where it was prepared.
#[test]
fn a_pooler_that_takes_turns_with_its_sessions_is_refused_at_the_start() {
    if support::skip_without(pgbouncer::available()) {
        return;
    }
    let server = Server::start().unwrap();
    for size in 2..=7 {
        println!("{size} server sessions");
        let settings = [("server_round_robin", "1"), ("default_pool_size", &*size.to_string())];
        let bouncer = pgbouncer::start_with(&server, PoolMode::Transaction, &settings).unwrap();
        let url = bouncer.url("postgres");
        warm_up(&url, size);
        for _ in 0..3 {
            tells(&start_refused(manager(&url)), &ADVICE);
        }
    }
}

/// At the start there was nobody to ask.
#[test]
fn a_pooler_that_is_reached_after_the_start_only_is_refused_by_try_lock() {
    if support::skip_without(pgbouncer::available()) {
        return;
    }
    let server = Server::start().unwrap();
    for mode in [PoolMode::Transaction, PoolMode::Statement] {
        let bouncer = pgbouncer::start(&server, mode).unwrap();
        let manager =
            PostgresManager::new(config(&bouncer.url("postgres")).connect_timeout(Duration::from_secs(4)))
                .unwrap();
        process::signal(bouncer.pid(), Signal::Stop).unwrap();
        manager.start().unwrap();
        let x = lock(&manager, "x");
        assert_eq!(kind(x.try_lock(&briefly())), ErrorKind::TimedOut, "nobody can be asked yet");
        process::signal(bouncer.pid(), Signal::Continue).unwrap();

        eventually("the refusal", || {
            let error = x.try_lock(&soon()).expect_err("the pooler keeps no locks");
            // The connect that was under way may end without a word.
            is_about_poolers(&error)
        });
        let error = x.lock(&Context::timeout(Duration::from_secs(3))).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        assert!(ADVICE.iter().all(|text| error.to_string().contains(text)), "{error}");
        assert!(!is_held(&x));
        x.release().unwrap();
        // The probe of an attempt that was ended may have one for a moment.
        becomes("the locks", &0, || advisory_locks(&mut server.client().unwrap()));
    }
}

#[test]
fn through_a_pooler_in_session_mode_locks_work_in_full() {
    if support::skip_without(pgbouncer::available()) {
        return;
    }
    let server = Server::start().unwrap();
    let operator = &mut server.client().unwrap();
    // It forgives nothing that a client may ask for when it connects.
    let settings = [("ignore_startup_parameters", "")];
    let bouncer = pgbouncer::start_with(&server, PoolMode::Session, &settings).unwrap();
    let url = bouncer.url("postgres");
    let [first, second] = [(); 2].map(|()| started(config(&url)));
    let valuer = json_valuer("through the pooler").unwrap();
    let [x, other] = [&first, &second]
        .map(|manager| manager.lock_with("x", dsync::LockOptions::new().valuer(valuer.clone())).unwrap());

    // Lock, annotation, contention.
    x.lock(&soon()).unwrap();
    let token = x.term().unwrap().token();
    let seen = second.inspect("x").unwrap().holder.unwrap();
    assert_eq!((Some(seen.pid), seen.token), (holder(operator), token));
    assert_eq!(seen.annotation.as_deref(), Some(&br#""through the pooler""#[..]));
    assert_eq!(kind(other.try_lock(&soon())), ErrorKind::LockUnavailable);

    // A wait that is ended by a cancel request, which goes by way of the pooler too.
    becomes("the queue", &1, || waiters(operator));
    let (late, ended) = (Lateness::watch(), std::time::Instant::now());
    other.release().unwrap();
    // A slice lasts for five.
    late.allow(ended.elapsed(), Duration::from_secs(3));
    assert_eq!(waiters(operator), 0);

    // Hand-over.
    let waiting = wait_in_thread(&other);
    becomes("the queue", &1, || waiters(operator));
    x.release().unwrap();
    waiting.get().unwrap();
    assert!(other.term().unwrap().token() > token);

    // Loss, by the server and by the pooler, and the lock again.
    let term = other.lost();
    server.terminate(holder(operator).unwrap()).unwrap();
    hear(&term);
    eventually("the lock again", || is_held(&other));
    let term = other.lost();
    bouncer.stop().unwrap();
    hear(&term);
    assert!(!is_held(&other));
    assert_eq!(kind(other.try_lock(&briefly())), ErrorKind::TimedOut);
    becomes("the locks", &0, || advisory_locks(operator));
}

/// What comes of a parameter that a pooler does not know: so none must be needed.
#[test]
fn a_pooler_refuses_startup_parameters_that_it_does_not_know() {
    if support::skip_without(pgbouncer::available()) {
        return;
    }
    let server = Server::shared();
    let bouncer =
        pgbouncer::start_with(server, PoolMode::Session, &[("ignore_startup_parameters", "")]).unwrap();
    let url = format!("{}?options=-cgeqo%3Doff", bouncer.url("postgres"));
    tells(&start_refused(manager(&url)), &["unsupported startup parameter: options"]);
}

/// The probe wants two sessions, and there is one.
#[test]
fn a_pooler_in_session_mode_with_a_single_session_gives_a_lock() {
    if support::skip_without(pgbouncer::available()) {
        return;
    }
    let server = Server::shared();
    let database = server.database().unwrap();
    let settings = [("default_pool_size", "1")];
    let bouncer = pgbouncer::start_with(server, PoolMode::Session, &settings).unwrap();
    let manager = started(
        config(&bouncer.url(database.name())).connect_timeout(Duration::from_secs(2)).max_sessions(1),
    );
    let x = lock(&manager, "x");
    x.lock(&soon()).unwrap();
    assert!(is_held(&x));
    x.release().unwrap();
}

/// Connects its clients to a server that can be exchanged for another one.
struct Switch {
    port: u16,
    server: Arc<AtomicU16>,
    sockets: Arc<Mutex<Vec<TcpStream>>>,
}

impl Switch {
    fn to(port: u16) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let switch = Self {
            port: listener.local_addr().unwrap().port(),
            server: Arc::new(AtomicU16::new(port)),
            sockets: Arc::default(),
        };
        let (server, sockets) = (Arc::clone(&switch.server), Arc::clone(&switch.sockets));
        thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let Ok(server) = TcpStream::connect(("127.0.0.1", server.load(Ordering::SeqCst))) else {
                    continue;
                };
                for (mut from, mut to) in [
                    (client.try_clone().unwrap(), server.try_clone().unwrap()),
                    (server.try_clone().unwrap(), client.try_clone().unwrap()),
                ] {
                    thread::spawn(move || {
                        let _ = std::io::copy(&mut from, &mut to);
                        let _ = to.shutdown(Shutdown::Both);
                    });
                }
                sockets.lock().extend([client, server]);
            }
        });
        switch
    }

    fn switch_to(&self, port: u16) {
        self.server.store(port, Ordering::SeqCst);
        for socket in self.sockets.lock().drain(..) {
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}

fn backend(client: &mut Client) -> i32 {
    let messages = client.simple_query("SELECT pg_backend_pid()").unwrap();
    let pid = messages.iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => row.get(0),
        _ => None,
    });
    pid.unwrap().parse().unwrap()
}

/// A pooler that is put in front of the server while the manager runs has passed no probe. The session that holds the
/// lock is given to somebody else, and the heartbeat is served by another one.
#[test]
fn a_session_that_a_pooler_exchanges_is_noticed_by_the_heartbeat() {
    if support::skip_without(pgbouncer::available()) {
        return;
    }
    let server = Server::start().unwrap();
    let operator = &mut server.client().unwrap();
    let switch = Switch::to(server.port());
    let manager = started(config(&server.url_at("127.0.0.1", switch.port)));
    let x = lock(&manager, "x");
    let bouncer = pgbouncer::start(&server, PoolMode::Transaction).unwrap();
    switch.switch_to(bouncer.port());

    match x.try_lock(&soon()) {
        Ok(()) => {
            let term = x.lost();
            let held = holder(operator).expect("the server shows the holder");
            let mut stranger = Client::connect(&bouncer.url("postgres"), NoTls).unwrap();
            stranger.simple_query("BEGIN").unwrap();
            assert_eq!(backend(&mut stranger), held, "the stranger has the holder's session");
            hear(&term);
            assert_eq!(x.last_loss().unwrap().reason, LossReason::SessionChanged);
            // From here on it is known.
            eventually("the refusal", || x.try_lock(&briefly()).is_err_and(|error| is_about_poolers(&error)));
            assert!(!is_held(&x));
        }
        // Better still.
        Err(error) => assert!(is_about_poolers(&error), "{error}"),
    }
    let _ = x.release();
    // What is left of it is the pooler's, as long as that lives.
    bouncer.stop().unwrap();
    becomes("the locks", &0, || advisory_locks(operator));
}

// ---------------------------------------------------------------------------------------------------------------------
// Standbys
// ---------------------------------------------------------------------------------------------------------------------

#[test]
fn a_hot_standby_is_refused_and_passed_over_where_the_primary_is_named_too() {
    let primary = Server::start().unwrap();
    let standby = primary.standby(Replication::Asynchronous).unwrap();
    let url = |first: &Server, second: &Server, attributes: &str| {
        format!(
            "host=127.0.0.1,127.0.0.1 port={},{} user=postgres dbname=postgres target_session_attrs={attributes}",
            first.port(),
            second.port()
        )
    };
    const ADVICE: [&str; 3] = ["hot standby", "connect to the primary", "target_session_attrs=read-write"];
    tells(&start_refused(manager(&standby.url())), &ADVICE);
    tells(&start_refused(manager(&url(&standby, &primary, "any"))), &ADVICE);
    let without = config(&standby.url()).catalog(CatalogMode::None);
    tells(&start_refused(PostgresManager::new(without).unwrap()), &ADVICE);

    for url in [url(&standby, &primary, "read-write"), url(&primary, &standby, "read-write")] {
        let manager = started(config(&url));
        let x = lock(&manager, "x");
        x.lock(&soon()).unwrap();
        assert!(holder(&mut primary.client().unwrap()).is_some());
        assert_eq!(advisory_locks(&mut standby.client().unwrap()), 0);
        x.release().unwrap();
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Old servers
// ---------------------------------------------------------------------------------------------------------------------

/// Says what PostgreSQL 13 would say to the first question. It is nowhere to be had beside the versions that we support.
fn old_server() -> u16 {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for client in listener.incoming().map_while(Result::ok) {
            // Ends with the client.
            thread::spawn(move || answer_as_version_13(client));
        }
    });
    port
}

fn answer_as_version_13(mut client: TcpStream) -> std::io::Result<()> {
    fn message(kind: u8, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(body.len() + 4).unwrap();
        [&[kind][..], &length.to_be_bytes(), body].concat()
    }
    fn read_body(client: &mut TcpStream) -> std::io::Result<()> {
        let mut length = [0; 4];
        client.read_exact(&mut length)?;
        client.read_exact(&mut vec![0; u32::from_be_bytes(length) as usize - 4])
    }
    let idle = message(b'Z', b"I");
    read_body(&mut client)?;
    client.write_all(
        &[message(b'R', &[0; 4]), message(b'K', &[0, 0, 0, 42, 0, 0, 0, 7]), idle.clone()].concat(),
    )?;
    let answers = ["42", "f", "130014"];
    let mut columns = vec![0, 3];
    let mut row = vec![0, 3];
    for answer in answers {
        // A name; then of no table, of type text, and in text.
        columns.extend(
            [b"?\0".as_slice(), &[0; 6], &[0, 0, 0, 25, 255, 255, 255, 255, 255, 255, 0, 0]].concat(),
        );
        row.extend(u32::try_from(answer.len()).unwrap().to_be_bytes());
        row.extend(answer.as_bytes());
    }
    loop {
        let mut kind = [0];
        client.read_exact(&mut kind)?;
        read_body(&mut client)?;
        let answer =
            [message(b'T', &columns), message(b'D', &row), message(b'C', b"SELECT 1\0"), idle.clone()];
        client.write_all(&answer.concat())?;
    }
}

#[test]
fn a_server_that_is_too_old_is_refused() {
    let url = format!("postgres://app@127.0.0.1:{}/app?sslmode=disable", old_server());
    tells(&start_refused(manager(&url)), &["PostgreSQL 13", "idle_session_timeout", "14 or newer"]);
}
