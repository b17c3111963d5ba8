//! The stream against a real server, over each transport.

use std::error::Error;
use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpListener;
use std::sync::Arc;
use std::thread::{self, JoinHandle, sleep};
use std::time::{Duration, Instant};

use postgres::error::SqlState;
use postgres::fallible_iterator::FallibleIterator;
use postgres::{Client, NoTls, Notification};
use rustls::pki_types::CertificateDer;
use tokio_postgres_rustls::MakeRustlsConnect;

use super::*;
use crate::loss::LossReason;
use crate::pg::claim::alarm::{Alarm, Woken};
use crate::pg::claim::bell::PollBell;
use crate::pg::session::wire::{Failure, Wire};
use crate::pg::watchdog::Watchdog;
use server::Server;

mod server;

const SECOND: Duration = Duration::from_secs(1);

/// Long on a busy machine, and short beside what would be waited for otherwise.
const AT_ONCE: Duration = Duration::from_secs(5);

#[derive(Clone, Copy, Debug, PartialEq)]
enum Over {
    Tcp,
    Tls,
    Unix,
}

/// All of them that the server knows.
fn ways(server: &Server) -> impl Iterator<Item = Over> {
    let tls = server.certificate.is_some();
    [Over::Tcp, Over::Tls, Over::Unix].into_iter().filter(move |over| tls || *over != Over::Tls)
}

fn rustls(server: &Server) -> Tls {
    let mut roots = rustls::RootCertStore::empty();
    if let Some(certificate) = &server.certificate {
        roots.add(CertificateDer::from(certificate.clone())).unwrap();
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    Tls::new(MakeRustlsConnect::new(config))
}

fn dialer(url: &str, tls: Option<Tls>) -> Dialer {
    Dialer::new(url.parse().unwrap(), tls).unwrap()
}

fn over(server: &Server, over: Over) -> Dialer {
    match over {
        Over::Tcp => dialer(&format!("{} sslmode=disable", server.url()), None),
        Over::Tls => dialer(&format!("{} sslmode=require", server.url()), Some(rustls(server))),
        Over::Unix => dialer(&server.unix_url(), None),
    }
}

fn soon() -> Instant {
    Instant::now() + 10 * SECOND
}

fn dial(dialer: &Dialer, control: &StreamControl, deadline: Instant) -> Result<Client, DialError> {
    dialer.connect(control, deadline, |client, _| Ok(client))
}

fn open(dialer: &Dialer) -> (Client, StreamControl) {
    let control = StreamControl::new();
    let client = dial(dialer, &control, soon()).unwrap_or_else(|error| panic!("{error}"));
    (client, control)
}

fn next(client: &mut Client, timeout: Duration) -> Result<Option<Notification>, postgres::Error> {
    client.notifications().timeout_iter(timeout).next()
}

fn encrypted(client: &mut Client) -> bool {
    client.query_one("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()", &[]).unwrap().get(0)
}

fn timed<T>(what: impl FnOnce() -> T) -> (T, Duration) {
    let start = Instant::now();
    let outcome = what();
    (outcome, start.elapsed())
}

fn median(mut times: Vec<Duration>) -> (Duration, Duration) {
    times.sort();
    (times[times.len() / 2], times[times.len() * 99 / 100])
}

#[test]
fn the_loss_of_the_session_ends_a_wait() {
    let server = Server::start(true);
    let mut other = Client::connect(&server.unix_url(), NoTls).unwrap();
    for over_ in ways(&server) {
        let dialer = over(&server, over_);
        let mut times = Vec::new();
        for _ in 0..20 {
            let (mut client, control) = open(&dialer);
            let pid: i32 = client.query_one("SELECT pg_backend_pid()", &[]).unwrap().get(0);
            let waiter = thread::spawn(move || {
                let outcome = next(&mut client, 10 * SECOND);
                (outcome.map(|_| ()), client.is_closed(), Instant::now())
            });
            sleep(Duration::from_millis(20));
            let start = Instant::now();
            other.execute("SELECT pg_terminate_backend($1)", &[&pid]).unwrap();
            let (outcome, closed, end) = waiter.join().unwrap();
            assert!(outcome.is_err() || closed);
            assert!(!control.is_dead(), "it was not us");
            times.push(end - start);
        }
        let (middle, worst) = median(times);
        println!("{over_:?}: loss seen after {middle:?}, worst {worst:?}");
        assert!(middle < AT_ONCE);
    }
}

/// The reason and the end of the connection mostly come to the driver at once, since a server closes as soon as it has told the one.
#[test]
fn why_the_server_ends_a_session_in_the_midst_of_a_statement_is_told() {
    let word = b"E\0\0\0\x1dSFATAL\0C57P01\0Mover now\0\0";
    let (dialer, server) = server_that_ends(word, Ends::InAStatement);
    for round in 0..ROUNDS {
        let (mut client, _control) = open(&dialer);
        let error = client.simple_query("SELECT 1").unwrap_err();
        assert_eq!(error.code(), Some(&SqlState::ADMIN_SHUTDOWN), "round {round}: {error:?}");
    }
    server.join().unwrap();
}

#[test]
fn why_the_server_ends_all_sessions_is_told_though_it_is_a_notice() {
    const CRASH: &[u8] = b"N\0\0\0\x1fSWARNING\0C57P02\0Mover now\0\0";
    const OTHER: &[u8] = b"N\0\0\0\x1fSWARNING\0C01000\0Mover now\0\0";
    for (word, reason) in [
        (CRASH, LossReason::ServerCrashed),
        (OTHER, LossReason::ConnectionClosed),
        (b"", LossReason::ConnectionClosed),
    ] {
        for ends in [Ends::InAStatement, Ends::WhileIdle] {
            let (dialer, server) = server_that_ends(word, ends);
            for round in 0..ROUNDS {
                let (client, control) = open(&dialer);
                let mut wire = Wire::new(client, control);
                let failure = match ends {
                    Ends::InAStatement => {
                        wire.call(soon(), |client| client.simple_query("SELECT 1")).unwrap_err()
                    }
                    Ends::WhileIdle => loop {
                        if let Err(failure) = wire.listen(soon()) {
                            break failure;
                        }
                    },
                };
                let Failure::Lost { reason: told, .. } = failure else { panic!("{failure:?}") };
                assert_eq!(told, reason, "{ends:?}, round {round}");
            }
            server.join().unwrap();
        }
    }
}

const ROUNDS: usize = 200;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Ends {
    InAStatement,
    WhileIdle,
}

/// A server that lets in, says this, and closes, so many times.
fn server_that_ends(word: &'static [u8], ends: Ends) -> (Dialer, JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("host=127.0.0.1 port={} user=x", listener.local_addr().unwrap().port());
    let server = thread::spawn(move || {
        for _ in 0..ROUNDS {
            let (mut socket, _) = listener.accept().unwrap();
            let mut words = [0; 512];
            assert!(socket.read(&mut words).unwrap() > 0, "a startup message");
            socket.write_all(b"R\0\0\0\x08\0\0\0\0Z\0\0\0\x05I").unwrap();
            if ends == Ends::InAStatement {
                assert!(socket.read(&mut words).unwrap() > 0, "a statement");
            }
            socket.write_all(word).unwrap();
        }
    });
    (dialer(&url, None), server)
}

/// What a supervisor does: it sleeps on the socket of a session that another thread has.
#[test]
fn the_end_of_a_session_wakes_a_thread_that_watches_its_socket() {
    let server = Server::start(true);
    let mut other = Client::connect(&server.unix_url(), NoTls).unwrap();
    for over_ in ways(&server) {
        for ends in ["by the server", "by a kill", "by a drop"] {
            let (mut client, control) = open(&over(&server, over_));
            let pid: i32 = client.query_one("SELECT pg_backend_pid()", &[]).unwrap().get(0);
            let socket = control.socket().unwrap();
            let alarm = Alarm::new(PollBell::new().unwrap());
            // Nothing is left to read of what the session has said so far.
            assert_eq!(alarm.sleep(Instant::now() + SECOND / 20, Some(&socket)), Woken::Time);
            thread::scope(|scope| {
                let watcher = scope.spawn(|| timed(|| alarm.sleep(soon(), Some(&socket))));
                sleep(SECOND / 50);
                match ends {
                    "by the server" => {
                        other.execute("SELECT pg_terminate_backend($1)", &[&pid]).unwrap();
                    }
                    "by a kill" => control.kill(),
                    _ => {
                        drop(client);
                        control.detach();
                    }
                }
                let (woken, time) = watcher.join().unwrap();
                assert_eq!(woken, Woken::Readable, "{over_:?} {ends}");
                assert!(time < AT_ONCE, "{over_:?} {ends}: {time:?}");
            });
        }
    }
}

#[test]
fn a_call_ends_by_its_deadline_whether_the_watchdog_enforces_it_or_its_own_timer() {
    let server = Server::start(true);
    for over_ in ways(&server) {
        for (watched, closed) in [(false, false), (true, false), (true, true)] {
            let (mut client, control) = open(&over(&server, over_));
            let watchdog = Watchdog::new(10 * SECOND);
            if watched {
                control.watch_by(&watchdog).unwrap();
            }
            if closed {
                watchdog.close();
            }
            let deadline = Instant::now() + SECOND / 5;
            control.set_deadline(Some(deadline));
            let outcome = client.batch_execute("SELECT pg_sleep(60)");
            let late = deadline.elapsed();
            assert_eq!(Ended::find(&outcome.unwrap_err()), Some(Ended::DeadlinePassed));
            assert!(late < AT_ONCE, "{over_:?}, watched {watched}: {late:?} late");
            watchdog.close();
        }
    }
}

#[test]
fn a_kill_ends_a_blocked_query_and_the_drop() {
    let server = Server::start(true);
    for over_ in ways(&server) {
        let (mut client, control) = open(&over(&server, over_));
        let blocked = thread::spawn(move || {
            let error = client.batch_execute("SELECT pg_sleep(60)").unwrap_err();
            let end = Instant::now();
            let ((), dropping) = timed(|| drop(client));
            (error, end, dropping)
        });
        sleep(SECOND / 5);
        let start = Instant::now();
        control.kill();
        let (error, end, dropping) = blocked.join().unwrap();
        println!("{over_:?}: kill ends a query in {:?}, drop takes {dropping:?}", end - start);
        assert_eq!(Ended::find(&error), Some(Ended::Killed));
        assert!(control.is_dead());
        assert!(end - start < AT_ONCE && dropping < AT_ONCE);
    }
}

#[test]
fn a_kill_ends_a_wait_and_a_write_that_is_blocked_and_what_comes_after() {
    let server = Server::start(true);
    for over_ in ways(&server) {
        let dialer = over(&server, over_);
        let (mut waiting, control) = open(&dialer);
        let killer = thread::spawn(move || {
            sleep(SECOND / 10);
            control.kill();
        });
        let (outcome, time) = timed(|| next(&mut waiting, 10 * SECOND));
        assert_eq!(Ended::find(&outcome.unwrap_err()), Some(Ended::Killed));
        assert!(time < AT_ONCE);
        killer.join().unwrap();
        assert!(waiting.batch_execute("SELECT 1").is_err());

        let (mut writing, control) = open(&dialer);
        let frozen = server.freeze();
        let killer = thread::spawn(move || {
            sleep(SECOND / 5);
            control.kill();
        });
        let text = format!("SELECT length('{}')", "x".repeat(50 << 20));
        let (outcome, time) = timed(|| writing.batch_execute(&text));
        assert_eq!(Ended::find(&outcome.unwrap_err()), Some(Ended::Killed));
        assert!(time < AT_ONCE, "{time:?}");
        let ((), time) = timed(|| drop(writing));
        assert!(time < AT_ONCE, "{time:?}");
        killer.join().unwrap();
        drop(frozen);
    }
}

#[test]
fn a_deadline_ends_a_call_on_a_frozen_server() {
    let server = Server::start(true);
    for over_ in ways(&server) {
        let dialer = over(&server, over_);
        let (mut own, own_control) = open(&dialer);
        let (mut others, others_control) = open(&dialer);
        let (mut moved, moved_control) = open(&dialer);
        let _frozen = server.freeze();

        let deadline = Instant::now() + SECOND / 4;
        own_control.set_deadline(Some(deadline));
        let (outcome, time) = timed(|| own.batch_execute("SELECT 1"));
        assert!(Instant::now() >= deadline);
        let error = outcome.unwrap_err();
        assert_eq!(Ended::find(&error), Some(Ended::DeadlinePassed), "{error:?}");
        let io = error.source().unwrap().downcast_ref::<io::Error>().unwrap();
        assert_eq!(io.kind(), ErrorKind::TimedOut);
        own_control.set_deadline(None);
        assert!(own_control.is_dead());
        let ((), dropping) = timed(|| drop(own));
        println!("{over_:?}: deadline of 250 ms ends a query after {time:?}, drop takes {dropping:?}");
        assert!(time < AT_ONCE && dropping < AT_ONCE);

        let setter = thread::spawn(move || {
            sleep(SECOND / 5);
            let deadline = Instant::now() + SECOND / 5;
            others_control.set_deadline(Some(deadline));
            deadline
        });
        let outcome = others.batch_execute("SELECT 1");
        let ended = Instant::now();
        assert_eq!(Ended::find(&outcome.unwrap_err()), Some(Ended::DeadlinePassed));
        let deadline = setter.join().unwrap();
        assert!((deadline..deadline + AT_ONCE).contains(&ended), "{:?}", deadline.elapsed());

        // Moved to later, and then to earlier, while the call is blocked.
        let first = Instant::now() + 2 * SECOND;
        moved_control.set_deadline(Some(first));
        let setter = thread::spawn(move || {
            sleep(SECOND / 10);
            moved_control.set_deadline(Some(first + 60 * SECOND));
            sleep(first.saturating_duration_since(Instant::now()) + SECOND / 10);
            let deadline = Instant::now() + SECOND / 10;
            moved_control.set_deadline(Some(deadline));
            deadline
        });
        let outcome = moved.batch_execute("SELECT 1");
        let ended = Instant::now();
        assert_eq!(Ended::find(&outcome.unwrap_err()), Some(Ended::DeadlinePassed));
        let deadline = setter.join().unwrap();
        assert!((deadline..deadline + AT_ONCE).contains(&ended), "{:?}", deadline.elapsed());
        let ((), dropping) = timed(|| drop((others, moved)));
        assert!(dropping < AT_ONCE, "{dropping:?}");
    }
}

#[test]
fn a_deadline_that_is_met_leaves_the_session_alone() {
    let server = Server::start(true);
    for over_ in ways(&server) {
        let (mut client, control) = open(&over(&server, over_));
        for _ in 0..200 {
            control.set_deadline(Some(Instant::now() + AT_ONCE));
            client.batch_execute("SELECT 1").unwrap();
            control.set_deadline(None);
        }
        control.set_deadline(Some(Instant::now() + 3 * SECOND));
        client.batch_execute("SELECT 1").unwrap();
        control.set_deadline(None);
        // The timer of the deadline that is no more goes off in here.
        assert!(next(&mut client, SECOND * 13 / 4).unwrap().is_none());
        client.batch_execute("SELECT pg_sleep(0.1)").unwrap();
        assert!(!control.is_dead() && !client.is_closed());
    }
}

#[test]
fn a_connect_to_a_server_that_does_not_answer_ends_on_time_and_by_a_kill() {
    let server = Server::start(true);
    let _frozen = server.freeze();
    for over_ in ways(&server) {
        let dialer = over(&server, over_);
        let control = StreamControl::new();
        let (outcome, time) = timed(|| dial(&dialer, &control, Instant::now() + SECOND / 4));
        let error = outcome.err().unwrap();
        assert_eq!(error.ended(), Some(Ended::ConnectTimedOut), "{error}");
        assert!(time < AT_ONCE && !control.is_dead());

        let killer = thread::spawn({
            let control = control.clone();
            move || {
                sleep(SECOND / 5);
                control.kill();
            }
        });
        let (outcome, time) = timed(|| dial(&dialer, &control, soon()));
        let error = outcome.err().unwrap();
        println!("{error}");
        assert_eq!(error.ended(), Some(Ended::Killed), "{error}");
        assert!(time < AT_ONCE);
        killer.join().unwrap();
        let (outcome, time) = timed(|| dial(&dialer, &control, soon()));
        assert_eq!(outcome.err().unwrap().ended(), Some(Ended::Killed));
        assert!(time < AT_ONCE, "a kill before the connect");
    }
}

#[test]
fn hosts_are_tried_in_order_and_all_failures_are_told() {
    let server = Server::start(false);
    // Accepts, and says nothing.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let silent_port = silent.local_addr().unwrap().port();
    let port = server.port();
    let url = format!(
        "host=localhost,/nowhere,localhost hostaddr= port={silent_port},5432,{port} user=postgres connect_timeout=1"
    );
    let url = url.replace(" hostaddr=", "");
    let dialer_ = dialer(&url, None);
    let control = StreamControl::new();
    let (client, time) = timed(|| dial(&dialer_, &control, soon()));
    let mut client = client.unwrap_or_else(|error| panic!("{error}"));
    assert!(time >= SECOND, "the silent one has its time");
    client.batch_execute("SELECT 1").unwrap();

    let refused = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let url = format!("host=127.0.0.1,/nowhere port={refused},5433 user=postgres");
    let error = dial(&dialer(&url, None), &StreamControl::new(), soon()).err().unwrap();
    let text = error.to_string();
    println!("{text}");
    assert!(
        text.contains(&format!("127.0.0.1:{refused}")) && text.contains("/nowhere/.s.PGSQL.5433"),
        "{text}"
    );

    let url = format!("{} load_balance_hosts=random dbname=nowhere", server.url());
    let error = dial(&dialer(&url, None), &StreamControl::new(), soon()).err().unwrap();
    let refusal: &postgres::Error = error.failures().last().unwrap().downcast_ref().unwrap();
    assert_eq!(refusal.code(), Some(&SqlState::UNDEFINED_DATABASE));
    println!("{error}");

    let error =
        dial(&dialer("host=no-such-host.invalid user=x", None), &StreamControl::new(), soon()).err().unwrap();
    println!("{error}");
    assert!(Dialer::new("user=x".parse().unwrap(), None).is_err());
    assert!(Dialer::new("host=a,b port=1,2,3 user=x".parse().unwrap(), None).is_err());
}

#[test]
fn only_an_address_is_enough() {
    let server = Server::start(false);
    let url = format!(
        "hostaddr=127.0.0.1 port={} user=postgres application_name=lab options='-c lock_timeout=4321'",
        server.port()
    );
    let (mut client, _) = open(&dialer(&url, None));
    assert_eq!(client.query_one("SHOW lock_timeout", &[]).unwrap().get::<_, String>(0), "4321ms");
    assert_eq!(client.query_one("SHOW application_name", &[]).unwrap().get::<_, String>(0), "lab");
}

/// The first cause in the chain that is an `io::Error`.
fn io_cause(error: &DialError) -> Option<ErrorKind> {
    let mut next = error.source();
    while let Some(error) = next {
        if let Some(io) = error.downcast_ref::<io::Error>() {
            return Some(io.kind());
        }
        next = error.source();
    }
    None
}

#[test]
fn a_unix_socket_that_cannot_be_opened_is_named_with_the_cause() {
    let server = Server::start(false);
    let folder = server.folder();
    let stale = folder.join(".s.PGSQL.1");
    drop(std::os::unix::net::UnixListener::bind(stale).unwrap());
    let folder = folder.display();
    for (url, kind) in [
        ("host=/nowhere user=x".to_owned(), ErrorKind::NotFound),
        (format!("host={folder} port=1 user=x"), ErrorKind::ConnectionRefused),
    ] {
        let error = dial(&dialer(&url, None), &StreamControl::new(), soon()).err().unwrap();
        println!("{error}");
        assert_eq!(io_cause(&error), Some(kind));
        assert!(error.to_string().contains(".s.PGSQL."));
    }
}

#[test]
fn many_unix_sessions_do_not_fill_the_queue_of_the_decoy() {
    let server = Server::start(false);
    let dialer = over(&server, Over::Unix);
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for _ in 0..50 {
                    let (mut client, _) = open(&dialer);
                    client.batch_execute("SELECT 1").unwrap();
                }
            });
        }
    });
}

#[test]
fn sslmode_means_what_it_means_to_the_driver() {
    for server_tls in [true, false] {
        let server = Server::start(server_tls);
        if server.certificate.is_some() != server_tls {
            continue;
        }
        for mode in ["disable", "prefer", "require"] {
            for given in [true, false] {
                let url = format!("{} sslmode={mode}", server.url());
                let dialer = dialer(&url, given.then(|| rustls(&server)));
                let outcome = dial(&dialer, &StreamControl::new(), soon());
                let case = format!("sslmode={mode}, server {server_tls}, connector {given}");
                match (mode, given, server_tls) {
                    ("require", false, _) => {
                        let error = outcome.err().unwrap().to_string();
                        assert!(error.contains("no TLS connector was given"), "{case}: {error}");
                    }
                    ("require", true, false) => {
                        let error = outcome.err().unwrap().to_string();
                        assert!(error.contains("server does not support TLS"), "{case}: {error}");
                    }
                    _ => {
                        let mut client = outcome.unwrap_or_else(|error| panic!("{case}: {error}"));
                        assert_eq!(
                            encrypted(&mut client),
                            mode != "disable" && given && server_tls,
                            "{case}"
                        );
                    }
                }
            }
        }
        if server_tls {
            // The real name reaches the verification: the certificate does not fit another one.
            let url = server.url().replace("host=localhost", "host=elsewhere.example") + " sslmode=require";
            let error =
                dial(&dialer(&url, Some(rustls(&server))), &StreamControl::new(), soon()).err().unwrap();
            println!("{error}");
            assert!(error.to_string().contains("TLS handshake failed"));
        }
    }
}

#[test]
fn scram_is_bound_to_the_tls_channel() {
    let server = Server::start(true);
    if server.certificate.is_none() {
        return;
    }
    let mut admin = Client::connect(&server.unix_url(), NoTls).unwrap();
    admin.batch_execute("CREATE ROLE scram_user LOGIN PASSWORD 'secret'").unwrap();
    let url = server.url().replace("user=postgres", "user=scram_user password=secret dbname=postgres");
    let bound = format!("{url} sslmode=require channel_binding=require");
    let (mut client, _) = open(&dialer(&bound, Some(rustls(&server))));
    assert!(encrypted(&mut client));
    client.batch_execute("SELECT 1").unwrap();
    let plain = format!("{url} sslmode=disable channel_binding=require");
    let error = dial(&dialer(&plain, None), &StreamControl::new(), soon()).err().unwrap();
    println!("{error}");
    open(&dialer(&format!("{url} sslmode=disable"), None));
}

/// What a client says first to a server that answers `answer`, and how it fails.
fn first_words(url: &str, answer: &'static [u8]) -> (Vec<u8>, String) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("{url} host=127.0.0.1 port={} user=x", listener.local_addr().unwrap().port());
    let server = thread::spawn(move || {
        let (mut socket, _) = listener.accept().unwrap();
        let mut words = vec![0; 8];
        if socket.read_exact(&mut words).is_err() {
            words.clear();
        }
        let _ = socket.write_all(answer);
        words
    });
    let roots = rustls::RootCertStore::empty();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let tls = Tls::new(MakeRustlsConnect::new(config));
    let error = dial(&dialer(&url, Some(tls)), &StreamControl::new(), soon()).err().unwrap();
    (server.join().unwrap(), error.to_string())
}

#[test]
fn direct_negotiation_starts_with_the_handshake() {
    let (words, error) = first_words("sslmode=require sslnegotiation=direct", b"N");
    assert_eq!(words[..2], [0x16, 3], "a TLS ClientHello; {error}");
    let (words, error) = first_words("sslmode=require", b"N");
    assert_eq!(words, [0, 0, 0, 8, 4, 0xd2, 0x16, 0x2f], "{error}");
    assert!(error.contains("server does not support TLS"), "{error}");
    let (words, error) = first_words("sslmode=prefer sslnegotiation=direct", b"N");
    assert!(words.is_empty() && error.contains("weak sslmode"), "{error}");
    let (words, _) = first_words("sslmode=disable", b"N");
    assert_eq!(words[4..8], [0, 3, 0, 0], "a startup message");
}

#[test]
fn a_cancel_hits_the_statement_and_never_a_later_one() {
    let server = Server::start(true);
    let mut other = Client::connect(&server.unix_url(), NoTls).unwrap();
    let sleeps = other
        .prepare("SELECT EXISTS (SELECT FROM pg_stat_activity WHERE pid = $1 AND wait_event = 'PgSleep')")
        .unwrap();
    for over_ in ways(&server) {
        let dialer = over(&server, over_);
        let (mut client, control) = open(&dialer);
        let pid: i32 = client.query_one("SELECT pg_backend_pid()", &[]).unwrap().get(0);
        let token = client.cancel_token();
        let (mut hit, mut times) = (0, Vec::new());
        for round in 0..200_u64 {
            let (outcome, time) = thread::scope(|scope| {
                let (dialer, control, token) = (&dialer, &control, &token);
                let (other, sleeps) = (&mut other, &sleeps);
                let canceller = scope.spawn(move || {
                    if round % 2 == 0 {
                        // A request that comes before the statement would hit nothing.
                        while !other.query_one(sleeps, &[&pid]).unwrap().get::<_, bool>(0) {}
                    } else {
                        // Races with the end of the statement.
                        sleep(Duration::from_micros(1000 + round * 20));
                    }
                    timed(|| dialer.cancel(control, token, soon()))
                });
                let sleep_for = if round % 2 == 0 { "60" } else { "0.003" };
                match client.batch_execute(&format!("SELECT pg_sleep({sleep_for})")) {
                    Ok(()) => assert_eq!(round % 2, 1),
                    Err(error) => {
                        assert_eq!(error.code(), Some(&SqlState::QUERY_CANCELED), "{error:?}");
                        hit += 1;
                    }
                }
                canceller.join().unwrap()
            });
            outcome.unwrap_or_else(|error| panic!("{error}"));
            times.push(time);
            for _ in 0..5 {
                client.batch_execute("SELECT 1").expect("a later statement was hit");
            }
            client.batch_execute("SELECT pg_sleep(0.002)").expect("a later statement was hit");
        }
        let (middle, worst) = median(times);
        println!("{over_:?}: 200 cancels, {hit} hit, a cancel takes {middle:?}, 99 % {worst:?}");
        assert!(hit >= 100 && !control.is_dead());

        let _frozen = server.freeze();
        let (outcome, time) = timed(|| dialer.cancel(&control, &token, Instant::now() + SECOND / 5));
        let error = outcome.unwrap_err();
        println!("{error}");
        assert_eq!(error.ended(), Some(Ended::DeadlinePassed), "{error}");
        assert!(time < AT_ONCE);
        control.kill();
    }
}
