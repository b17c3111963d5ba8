//! The way to the server: several hosts of which some are dead, in each way that a host can be dead; and a slow link.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::unbounded;
use dsync::{Config, Context, ErrorKind, PostgresManager, SyncManager};
use socket2::{Domain, SockAddr, Socket, Type};
use support::{Frozen, Server};

use crate::common::{
    self, Lateness, SilentHost, becomes, begin, briefly, hear, is_held, kind, lock, soon, started,
    wait_in_thread,
};

/// The time for a session. Every host has its share of it.
const CONNECT: Duration = Duration::from_secs(2);

/// What a busy machine may take beyond a bound.
const SLACK: Duration = Duration::from_secs(5);

/// A host that gives no session, in one of the ways.
enum Dead<'a> {
    /// Its kernel refuses.
    Refuses(Socket),
    /// It swallows packets.
    SwallowsPackets(SilentHost),
    /// It takes connections and says nothing.
    SaysNothing(TcpListener),
    /// Its processes stand still.
    StandsStill(u16, #[expect(dead_code, reason = "thaws it at the end")] Frozen<'a>),
}

impl<'a> Dead<'a> {
    fn in_all_ways(server: &'a Server) -> [(&'static str, Self); 4] {
        let refuses = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        refuses.bind(&SockAddr::from("127.0.0.1:0".parse::<std::net::SocketAddr>().unwrap())).unwrap();
        [
            ("refuses", Self::Refuses(refuses)),
            ("swallows packets", Self::SwallowsPackets(SilentHost::new())),
            ("says nothing", Self::SaysNothing(TcpListener::bind("127.0.0.1:0").unwrap())),
            ("stands still", Self::StandsStill(server.port(), server.freeze().unwrap())),
        ]
    }

    fn port(&self) -> u16 {
        match self {
            Self::Refuses(socket) => socket.local_addr().unwrap().as_socket().unwrap().port(),
            Self::SwallowsPackets(host) => host.port(),
            Self::SaysNothing(listener) => listener.local_addr().unwrap().port(),
            Self::StandsStill(port, _) => *port,
        }
    }
}

fn hosts(ports: &[u16], more: &str) -> Config {
    let hosts = vec!["127.0.0.1"; ports.len()].join(",");
    let ports = ports.iter().map(u16::to_string).collect::<Vec<_>>().join(",");
    let url = format!("host={hosts} port={ports} user=postgres dbname=postgres {more}");
    Config::from_url(&url).unwrap().connect_timeout(CONNECT).release_timeout(Duration::from_secs(20))
}

/// The session is there within `connect_timeout`, and the catalog is.
fn locks_in_time(config: Config, what: &str) {
    let begun = Instant::now();
    let manager = started(config);
    let x = lock(&manager, "x");
    x.try_lock(&soon()).unwrap();
    let time = begun.elapsed();
    println!("{what}: the lock after {time:?}");
    assert!(time < CONNECT + SLACK, "{what}: {time:?}");
    x.release().unwrap();
}

#[test]
fn a_dead_host_takes_its_share_of_the_time_and_no_more_wherever_it_stands() {
    let (alive, other) = (Server::start().unwrap(), Server::start().unwrap());
    let dead = Dead::in_all_ways(&other);
    for (way, host) in &dead {
        for attributes in ["any", "read-write"] {
            let more = format!("target_session_attrs={attributes}");
            for order in [
                vec![host.port(), alive.port()],
                vec![alive.port(), host.port()],
                vec![host.port(), host.port(), alive.port()],
                vec![host.port(), alive.port(), host.port()],
            ] {
                let position = order.iter().position(|port| *port == alive.port()).unwrap();
                locks_in_time(
                    hosts(&order, &more),
                    &format!("a host that {way}, {attributes}, alive at {position}"),
                );
            }
        }
    }
    let all: Vec<u16> = dead.iter().map(|(_, host)| host.port()).chain([alive.port()]).collect();
    locks_in_time(hosts(&all, ""), "all dead ones before it");
    locks_in_time(hosts(&all, "load_balance_hosts=random"), "all in random order");
    locks_in_time(hosts(&all, "connect_timeout=1"), "each with a second");
}

#[test]
fn a_name_that_cannot_be_resolved_costs_its_share_only() {
    let alive = Server::start().unwrap();
    for hosts in ["no-such-host.invalid,127.0.0.1", "127.0.0.1,no-such-host.invalid"] {
        let url = format!("host={hosts} port={} user=postgres dbname=postgres", alive.port());
        locks_in_time(Config::from_url(&url).unwrap().connect_timeout(CONNECT), hosts);
    }
}

/// The first host freezes under the holder; the holder is told, and has the lock again at the second one.
#[test]
fn a_lock_returns_at_another_host_when_its_own_freezes() {
    for frozen_is_first in [true, false] {
        let (first, second) = (Server::start().unwrap(), Server::start().unwrap());
        let order = if frozen_is_first { [&first, &second] } else { [&second, &first] };
        let config =
            hosts(&order.map(Server::port), "target_session_attrs=read-write").lease(Duration::from_secs(2));
        // So that it holds at the host that is to freeze, wherever that stands.
        let away = (!frozen_is_first).then(|| second.freeze().unwrap());
        let manager = started(config);
        let x = lock(&manager, "x");
        x.lock(&soon()).unwrap();
        drop(away);
        let lost = x.lost();
        let frozen = first.freeze().unwrap();
        hear(&lost);
        let begun = Instant::now();
        x.lock(&soon()).unwrap();
        let time = begun.elapsed();
        println!("again after {time:?}");
        assert!(time < CONNECT + SLACK, "{time:?}");
        // From now on it begins there, and does not ask the dead one.
        let (late, begun) = (Lateness::watch(), Instant::now());
        lock(&manager, "y").try_lock(&soon()).unwrap();
        late.allow(begun.elapsed(), CONNECT / 4);
        frozen.thaw();
    }
}

/// An attempt that is ended before its second address is tried leaves that one for the next attempt.
#[test]
fn claims_too_short_for_a_dead_host_begin_with_the_next_one_after_it() {
    let (alive, silent) = (Server::start().unwrap(), SilentHost::new());
    let manager = PostgresManager::new(hosts(&[silent.port(), alive.port()], "")).unwrap();
    // It takes up to the end of its time, and may find the second host or not.
    manager.start().unwrap();
    alive.backend_pids().unwrap().into_iter().for_each(|pid| {
        alive.terminate(pid).unwrap();
    });
    common::eventually("the lock", || {
        let x = lock(&manager, "x");
        let held = x.try_lock(&Context::timeout(Duration::from_millis(300))).is_ok();
        x.release().unwrap();
        held
    });
}

#[test]
fn an_error_tells_of_each_host_what_happened_there_and_has_no_word_of_tls() {
    let other = Server::start().unwrap();
    let dead = Dead::in_all_ways(&other);
    let ports: Vec<u16> = dead.iter().map(|(_, host)| host.port()).collect();
    let manager = started(hosts(&ports, "sslmode=disable"));
    let error = lock(&manager, "x").lock(&Context::timeout(CONNECT * 2)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    let text = format!("{error:#}");
    println!("{text}");
    let happened =
        ["Connection refused", "while we opened the connection", "while we logged in", "while we logged in"];
    for (port, happened) in ports.iter().zip(happened) {
        let told =
            text.split("; ").find(|part| part.contains(&format!("127.0.0.1:{port}: "))).unwrap_or_default();
        assert!(told.contains(happened), "{port} {happened:?}: {text}");
    }
    assert!(text.contains("raise connect_timeout") && !text.contains("TLS"), "{text}");
    let mut next = Some(&error as &dyn std::error::Error);
    while let Some(error) = next {
        assert!(!error.to_string().contains("TLS"), "{error}");
        next = error.source();
    }
}

/// The cancel request goes where the session is, and asks no dead host first.
#[test]
fn a_wait_at_the_second_host_is_cancelled_without_asking_the_first() {
    let (alive, silent) = (Server::start().unwrap(), SilentHost::new());
    let managers = [(); 2].map(|()| started(hosts(&[silent.port(), alive.port()], "")));
    let [held, wanted] = [lock(&managers[0], "x"), lock(&managers[1], "x")];
    held.lock(&soon()).unwrap();
    assert_eq!(kind(wanted.try_lock(&soon())), ErrorKind::LockUnavailable);
    let waiting = wait_in_thread(&wanted);
    let waits = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted";
    becomes("the queue", &1_i64, || alive.client().unwrap().query_one(waits, &[]).unwrap().get(0));
    let (late, begun) = (Lateness::watch(), Instant::now());
    wanted.release().unwrap();
    // A slice is 5 s.
    late.allow(begun.elapsed(), Duration::from_secs(3));
    assert_eq!(kind(waiting.get()), ErrorKind::Released);
    assert!(is_held(&held));
}

// ---------------------------------------------------------------------------------------------------------------------
// A slow link
// ---------------------------------------------------------------------------------------------------------------------

/// Passes on what it is sent, half a round trip later. Gives its port, and how many connections it has carried.
fn slow_link(to: u16, round_trip: Duration) -> (u16, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (port, carried) = (listener.local_addr().unwrap().port(), Arc::<AtomicUsize>::default());
    let counted = Arc::clone(&carried);
    thread::spawn(move || {
        for client in listener.incoming().flatten() {
            counted.fetch_add(1, SeqCst);
            thread::spawn(move || {
                // The handshake of TCP, which the listener's kernel has answered at once.
                thread::sleep(round_trip);
                let server = TcpStream::connect(("127.0.0.1", to)).unwrap();
                for (from, to) in [(&client, &server), (&server, &client)] {
                    later(from.try_clone().unwrap(), to.try_clone().unwrap(), round_trip / 2);
                }
            });
        }
    });
    (port, carried)
}

fn later(mut from: TcpStream, mut to: TcpStream, delay: Duration) {
    to.set_nodelay(true).unwrap();
    let (sender, pieces) = unbounded::<(Instant, Vec<u8>)>();
    thread::spawn(move || {
        for (at, piece) in pieces {
            thread::sleep(at.saturating_duration_since(Instant::now()));
            if to.write_all(&piece).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Both);
    });
    thread::spawn(move || {
        let mut piece = [0; 65_536];
        while let Ok(length @ 1..) = from.read(&mut piece) {
            if sender.send((Instant::now() + delay, piece[..length].to_vec())).is_err() {
                break;
            }
        }
    });
}

#[test]
fn with_a_round_trip_of_400_ms_the_defaults_give_a_lock_from_the_first_attempt_on() {
    let server = Server::builder().password_auth().start().unwrap();
    let (port, carried) = slow_link(server.port(), Duration::from_millis(400));
    let url = server.url_at("127.0.0.1", port) + "?sslmode=disable";
    let manager = PostgresManager::new(Config::from_url(&url).unwrap()).unwrap();
    let begun = Instant::now();
    manager.start().unwrap();
    println!("started after {:?}", begun.elapsed());
    // An attempt opens the session, and at first one that is to see its locks; one that fails has its session closed.
    assert_eq!(carried.load(SeqCst), 2, "after {:?}", begun.elapsed());
    let operator = &mut server.client().unwrap();
    let mut pids =
        |query| operator.query_one(query, &[]).unwrap().get::<_, Option<Vec<i32>>>(0).unwrap_or_default();
    let sessions = "SELECT array_agg(pid) FROM pg_stat_activity WHERE application_name = 'dsync'";
    becomes("the sessions", &1, || pids(sessions).len());
    let session = pids(sessions);
    let x = lock(&manager, "x");
    x.try_lock(&soon()).unwrap();
    assert!(is_held(&x) && x.term().unwrap().token().is_some());
    assert_eq!(pids("SELECT array_agg(DISTINCT pid) FROM pg_locks WHERE locktype = 'advisory'"), session);
    x.release().unwrap();
}

/// Takes everybody for a user that has given the right password, and then says nothing.
fn silent_after_the_login() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        let mut open = Vec::new();
        for mut stream in listener.incoming().flatten() {
            let _ = stream.read(&mut [0; 4096]);
            let _ = stream.write_all(b"R\0\0\0\x08\0\0\0\0Z\0\0\0\x05I");
            open.push(stream);
        }
    });
    port
}

#[test]
fn where_a_link_is_too_slow_the_error_says_at_which_step_and_what_to_raise() {
    let server = Server::builder().password_auth().start().unwrap();
    // A login takes four round trips.
    let slow = slow_link(server.port(), Duration::from_millis(800)).0;
    for (port, step) in
        [(slow, "while we logged in"), (silent_after_the_login(), "while we prepared a session")]
    {
        let url = server.url_at("127.0.0.1", port) + "?sslmode=disable";
        let config = Config::from_url(&url).unwrap().connect_timeout(Duration::from_secs(2));
        let manager = begin(move || started(config)).get();
        let error = lock(&manager, "x").lock(&Context::timeout(Duration::from_secs(5))).unwrap_err();
        println!("{error}");
        let text = error.to_string();
        assert!(text.contains(step) && text.contains("if the link is slow, raise connect_timeout"), "{text}");
        assert_eq!(kind(lock(&manager, "x").try_lock(&briefly())), ErrorKind::TimedOut);
    }
}

/// A host that dies between the login and the first answer is a dead one like another.
#[test]
fn a_host_that_is_silent_after_the_login_takes_its_share_and_no_more() {
    let alive = Server::start().unwrap();
    for order in [[silent_after_the_login(), alive.port()], [alive.port(), silent_after_the_login()]] {
        locks_in_time(hosts(&order, ""), "a host that is silent after the login");
    }
}
