//! What befalls servers and sessions, and that locks come back: the loss is told, the lock is acquired again without
//! another call, and who believes to hold it is who holds it by the server's word.
//!
//! Each test has a server of its own. Who waits has a session of its own in either mode, so what befalls it is tried in one of them.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use dsync::{
    ClaimState, Config, ErrorKind, Lock, LossReason, Lost, PostgresManager, SyncManager, TakeoverPolicy,
};
use postgres::types::FromSql;
use postgres::{Client, NoTls};
use support::process::{self, Signal};
use support::{Server, Shutdown};

use crate::common::{
    Outcome, becomes, briefly, eventually, hear, in_both_modes, is_held, is_open, kind, lock, number_of,
    soon, started, wait_in_thread,
};

in_both_modes! {
    // The server ends and comes back.
    a_held_lock_comes_back_however_the_server_ended
    one_of_holder_and_waiter_gets_the_lock_however_the_server_ended
    claims_that_begin_while_the_server_is_down_get_their_lock
    a_server_that_dies_while_a_session_is_being_opened_is_waited_for
    a_smart_shutdown_leaves_the_lock_until_the_session_ends
    restarts_in_a_row_are_survived
    // Sessions end.
    sessions_killed_one_by_one_again_and_again_come_back
    a_backend_killed_hard_takes_all_sessions_along_and_they_come_back
    a_dropped_database_that_is_made_again_has_locks_again
    a_dropped_catalog_is_made_again
    a_dropped_catalog_is_made_again_for_those_who_only_try
    a_full_server_is_waited_for
    a_password_that_is_changed_and_changed_back_is_waited_for
    try_lock_without_time_ends_the_pause_after_an_outage
}

/// A process that wants the lock `x`. Its name is that of its sessions.
struct Rival {
    name: &'static str,
    manager: PostgresManager,
    lock: Arc<dyn Lock>,
}

/// Here is shown how soon locks come back; that a crash costs a lease otherwise is in `takeover.rs`.
fn at_once(url: &str) -> Config {
    Config::from_url(url).unwrap().takeover(TakeoverPolicy::Immediate)
}

impl Rival {
    fn new(name: &'static str, url: &str, shared_sessions: u32) -> Self {
        let config = at_once(&format!("{url}?application_name={name}"));
        let manager = started(config.shared_sessions(shared_sessions));
        Self { name, lock: lock(&manager, "x"), manager }
    }

    fn pair(server: &Server, shared_sessions: u32) -> [Self; 2] {
        ["first", "second"].map(|name| Self::new(name, &server.url(), shared_sessions))
    }

    fn lock(&self) -> Lost {
        self.lock.lock(&soon()).unwrap();
        self.lock.lost()
    }

    fn is_held(&self) -> bool {
        is_held(&self.lock)
    }

    fn loses(&self, term: &Lost, reasons: &[LossReason]) {
        hear(term);
        let loss = self.lock.last_loss().expect("a loss is remembered");
        assert!(reasons.contains(&loss.reason), "{}: {loss:?}", self.name);
    }

    /// Waits until the lock is held, without a call that would acquire it, and sees that the server says the same.
    fn gets_it_again(&self, operator: &mut Client) {
        eventually("the lock in the background", || self.is_held());
        becomes("the holder", &vec![self.name.to_owned()], || holders(operator));
        assert!(self.is_held());
    }

    /// Nobody can be asked now. That is not to say that another one has the lock.
    fn waits_for_the_server(&self) {
        assert_eq!(kind(self.lock.try_lock(&briefly())), ErrorKind::TimedOut);
        assert!(!self.is_held());
    }
}

/// The winner gives the lock to the other one. `waiting` is the call of the second: it ends when that one has the lock, and a
/// release before it has heard so would end it with an error.
fn pass_on(winner: &Rival, other: &Rival, waiting: Outcome<dsync::Result<()>>, operator: &mut Client) {
    if winner.name == "second" {
        waiting.get().unwrap();
        winner.lock.release().unwrap();
        other.gets_it_again(operator);
    } else {
        winner.lock.release().unwrap();
        other.gets_it_again(operator);
        waiting.get().unwrap();
    }
}

/// Who of the two gets the lock first when there is none to tell them apart.
fn winner_and_other<'a>(first: &'a Rival, second: &'a Rival) -> (&'a Rival, &'a Rival) {
    eventually("a holder", || first.is_held() || second.is_held());
    if first.is_held() { (first, second) } else { (second, first) }
}

/// Who holds an advisory lock of the operator's database.
fn holders(operator: &mut Client) -> Vec<String> {
    sessions(operator, "granted")
}

/// Who is in a queue for one.
fn waiters(operator: &mut Client) -> Vec<String> {
    sessions(operator, "NOT granted")
}

fn sessions(operator: &mut Client, condition: &str) -> Vec<String> {
    about_x(operator, "split_part(application_name, ' ', 1)", condition)
}

/// What `column` says of the sessions that have the lock `x` or wait for it, be they its own or those of many locks.
fn about_x<T: for<'a> FromSql<'a>>(operator: &mut Client, column: &str, condition: &str) -> Vec<T> {
    let query = format!(
        "SELECT {column} FROM pg_locks JOIN pg_stat_activity USING (pid)
         WHERE locktype = 'advisory' AND datname = current_database() AND {condition}
           AND (application_name LIKE '% x' OR classid::int8 << 32 | objid::int8 = {x}) ORDER BY 1",
        x = number_of("'x'")
    );
    operator.query(&query, &[]).unwrap().iter().map(|row| row.get(0)).collect()
}

/// A way in which a server ends, and what the holder of a lock may be told.
struct Fault {
    name: &'static str,
    strike: fn(&Server),
    reasons: &'static [LossReason],
}

const FAULTS: [Fault; 4] = [
    Fault {
        name: "shut down in fast mode",
        strike: |server| server.stop(Shutdown::Fast).unwrap(),
        reasons: &[LossReason::Terminated],
    },
    Fault {
        name: "shut down in immediate mode",
        strike: |server| server.stop(Shutdown::Immediate).unwrap(),
        // The server's last word may not arrive, since its processes end at once.
        reasons: &[LossReason::Terminated, LossReason::ConnectionClosed],
    },
    Fault {
        name: "postmaster killed",
        strike: |server| server.kill_postmaster().unwrap(),
        reasons: &[LossReason::Terminated, LossReason::ConnectionClosed],
    },
    Fault {
        name: "all processes killed",
        strike: |server| server.kill_hard().unwrap(),
        reasons: &[LossReason::ConnectionClosed],
    },
];

// ---------------------------------------------------------------------------------------------------------------------
// The server ends and comes back
// ---------------------------------------------------------------------------------------------------------------------

/// While a thread waits by itself, nobody else need look; when it has the lock, somebody watches. The heartbeat, which would
/// tell as well, is half a minute away.
#[test]
fn a_loss_is_told_soon_to_one_who_has_waited_for_the_lock() {
    let server = Server::start().unwrap();
    let operator = &mut server.client().unwrap();
    let [first, mut second] = Rival::pair(&server, 0);
    let url = format!("{}?application_name=second", server.url());
    second.manager = started(at_once(&url).lease(Duration::from_secs(120)));
    second.lock = lock(&second.manager, "x");
    for _ in 0..5 {
        first.lock();
        let waiting = wait_in_thread(&second.lock);
        becomes("the queue", &vec!["second".to_owned()], || waiters(operator));
        // For some 20 ms its supervisor may still look every millisecond. Nothing tells when it is asleep.
        thread::sleep(Duration::from_millis(100));
        first.lock.release().unwrap();
        waiting.get().unwrap();
        let term = second.lock.lost();
        let begun = Instant::now();
        let backend =
            operator.query_one("SELECT pid FROM pg_locks WHERE locktype = 'advisory'", &[]).unwrap();
        assert!(server.terminate(backend.get(0)).unwrap());
        second.loses(&term, &[LossReason::Terminated]);
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
        second.lock.release().unwrap();
    }
}

fn a_held_lock_comes_back_however_the_server_ended(shared_sessions: u32) {
    let server = Server::start().unwrap();
    let only = Rival::new("only", &server.url(), shared_sessions);
    only.lock();
    for Fault { name, strike, reasons } in FAULTS {
        println!("{name}");
        let term = only.lock.lost();
        assert!(is_open(&term));
        strike(&server);
        only.loses(&term, reasons);
        server.start_again().unwrap();
        only.gets_it_again(&mut server.client().unwrap());
        assert!(!is_open(&term), "the old term stays over");
    }
    only.lock.release().unwrap();
}

fn one_of_holder_and_waiter_gets_the_lock_however_the_server_ended(shared_sessions: u32) {
    let server = Server::start().unwrap();
    for Fault { name, strike, reasons } in FAULTS {
        println!("{name}");
        let [first, second] = Rival::pair(&server, shared_sessions);
        let term = first.lock();
        let waiting = wait_in_thread(&second.lock);
        becomes("the queue", &vec!["second".to_owned()], || waiters(&mut server.client().unwrap()));
        strike(&server);
        first.loses(&term, reasons);
        // Backends end one after the other, so that it may have been granted the lock for a moment.
        eventually("the end of the other one's session", || {
            second.manager.snapshot().claim("x").is_some_and(|claim| claim.state == ClaimState::Connecting)
        });
        assert!(
            !waiting.is_ready() || second.lock.last_loss().is_some(),
            "a call that waits does not end with the server"
        );
        server.start_again().unwrap();

        let operator = &mut server.client().unwrap();
        let (winner, other) = winner_and_other(&first, &second);
        winner.gets_it_again(operator);
        becomes("the queue", &vec![other.name.to_owned()], || waiters(operator));
        assert!(!other.is_held());
        pass_on(winner, other, waiting, operator);
    }
}

fn claims_that_begin_while_the_server_is_down_get_their_lock(shared_sessions: u32) {
    let server = Server::start().unwrap();
    let only = Rival::new("only", &server.url(), shared_sessions);
    for Fault { name, strike, .. } in FAULTS {
        println!("{name}");
        // Whatever is in the pool was there before. A backend without its postmaster may grant a lock in its last moment.
        let sessions = "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'only%'";
        let sessions: Vec<i32> =
            server.client().unwrap().query(sessions, &[]).unwrap().iter().map(|row| row.get(0)).collect();
        strike(&server);
        let is_alive = |pid: &i32| process::is_alive(*pid);
        eventually("the end of its sessions", || !sessions.iter().any(is_alive));
        let waiting = wait_in_thread(&only.lock);
        only.waits_for_the_server();
        server.start_again().unwrap();
        waiting.get().unwrap();
        only.gets_it_again(&mut server.client().unwrap());
        only.lock.release().unwrap();
    }
}

/// A connection that is being made is one to a server that hangs, and then to one that has died.
fn a_server_that_dies_while_a_session_is_being_opened_is_waited_for(shared_sessions: u32) {
    let server = Server::start().unwrap();
    let only = Rival::new("only", &server.url(), shared_sessions);
    server.restart(Shutdown::Fast).unwrap(); // so that there is no session in the pool
    let frozen = server.freeze().unwrap();
    let waiting = wait_in_thread(&only.lock);
    only.waits_for_the_server();
    // It dies where it stands. One that went on for a moment might grant the lock.
    server.kill_hard().unwrap();
    drop(frozen);
    only.waits_for_the_server();
    server.start_again().unwrap();
    waiting.get().unwrap();
    only.gets_it_again(&mut server.client().unwrap());
}

/// Such a server refuses new sessions and lets the old ones be.
fn a_smart_shutdown_leaves_the_lock_until_the_session_ends(shared_sessions: u32) {
    let server = Server::start().unwrap();
    let holder = Rival::new("holder", &server.url(), shared_sessions);
    let term = holder.lock();
    let backends = server.backend_pids().unwrap();
    thread::scope(|scope| {
        let stopping = scope.spawn(|| server.stop(Shutdown::Smart));
        eventually("the order to stop", || server.log().contains("received smart shutdown request"));
        let other = Rival::new("other", &server.url(), shared_sessions);
        other.waits_for_the_server();
        assert!(is_open(&term) && server.is_running(), "the server waits for the holder");
        for backend in backends {
            process::signal(backend, Signal::Terminate).unwrap();
        }
        holder.loses(&term, &[LossReason::Terminated]);
        stopping.join().unwrap().unwrap();
        holder.waits_for_the_server();
        other.lock.release().unwrap();
    });
    server.start_again().unwrap();
    holder.gets_it_again(&mut server.client().unwrap());
}

/// The seed's scenario, step by step: the server goes, nothing can be had, the server comes, all is well.
fn restarts_in_a_row_are_survived(shared_sessions: u32) {
    let server = Server::start().unwrap();
    let [first, second] = Rival::pair(&server, shared_sessions);
    first.lock();
    let waiting = wait_in_thread(&second.lock);
    for how in [Shutdown::Fast, Shutdown::Immediate, Shutdown::Fast] {
        server.restart(how).unwrap();
    }
    let operator = &mut server.client().unwrap();
    let (winner, other) = winner_and_other(&first, &second);
    winner.gets_it_again(operator);
    becomes("the queue", &vec![other.name.to_owned()], || waiters(operator));
    pass_on(winner, other, waiting, operator);
}

// ---------------------------------------------------------------------------------------------------------------------
// Sessions end
// ---------------------------------------------------------------------------------------------------------------------

/// The backends that serve `condition` of the locks.
fn backends(operator: &mut Client, condition: &str) -> Vec<i32> {
    about_x(operator, "pid", condition)
}

#[test]
fn a_waiter_whose_session_is_removed_queues_again() {
    let server = Server::start().unwrap();
    let operator = &mut server.client().unwrap();
    let [first, second] = Rival::pair(&server, 0);
    let term = first.lock();
    let waiting = wait_in_thread(&second.lock);
    for _ in 0..5 {
        becomes("the queue", &vec!["second".to_owned()], || waiters(operator));
        let [backend] = backends(operator, "NOT granted")[..] else { panic!("one waiter") };
        assert!(server.terminate(backend).unwrap());
        eventually("its end", || !server.backend_pids().unwrap().contains(&backend));
    }
    becomes("the queue", &vec!["second".to_owned()], || waiters(operator));
    assert!(is_open(&term) && !waiting.is_ready() && !second.is_held(), "nothing has happened to anybody");
    assert_eq!(second.lock.last_loss(), None, "it had nothing to lose");
    first.lock.release().unwrap();
    waiting.get().unwrap();
    second.gets_it_again(operator);
}

fn sessions_killed_one_by_one_again_and_again_come_back(shared_sessions: u32) {
    let server = Server::start().unwrap();
    let operator = &mut server.client().unwrap();
    let [first, second] = Rival::pair(&server, shared_sessions);
    let third = Rival::new("third", &server.url(), shared_sessions);
    let rivals = [&first, &second, &third];
    let waiting = rivals.map(|rival| wait_in_thread(&rival.lock));
    for round in 0..30 {
        let mut terms = rivals.map(|rival| rival.lock.lost());
        // The holder in one round, one that waits in the next.
        eventually("a holder and a queue, and the end of one of them", || {
            if holders(operator).len() != 1 || waiters(operator).len() != 2 {
                return false;
            }
            let victims = backends(operator, if round % 2 == 0 { "granted" } else { "NOT granted" });
            terms = rivals.map(|rival| rival.lock.lost());
            // One of the round before may be among them to its end.
            victims.first().is_some_and(|&victim| server.terminate(victim).unwrap())
        });
        if round % 2 == 0 {
            let [lost] = terms.iter().filter(|term| is_open(term)).collect::<Vec<_>>()[..] else {
                // Its signal was there already.
                continue;
            };
            hear(lost);
        }
    }
    // One after the other has had it, and gets it now.
    let mut left: Vec<_> = rivals.into_iter().zip(waiting).collect();
    while !left.is_empty() {
        becomes("the holders", &1, || left.iter().filter(|(rival, _)| rival.is_held()).count());
        let index = left.iter().position(|(rival, _)| rival.is_held()).unwrap();
        let (holder, waiting) = left.swap_remove(index);
        holder.gets_it_again(operator);
        // It was told that it has it, before it gives it back.
        waiting.get().unwrap();
        holder.lock.release().unwrap();
    }
    becomes("the holders", &Vec::<String>::new(), || holders(operator));
}

/// The server then ends all other sessions too, since the one may have left its memory in disorder.
fn a_backend_killed_hard_takes_all_sessions_along_and_they_come_back(shared_sessions: u32) {
    let server = Server::start().unwrap();
    let [first, second] = Rival::pair(&server, shared_sessions);
    let term = first.lock();
    let waiting = wait_in_thread(&second.lock);
    becomes("the queue", &vec!["second".to_owned()], || waiters(&mut server.client().unwrap()));
    let [backend] = backends(&mut server.client().unwrap(), "NOT granted")[..] else { panic!("one waiter") };
    process::signal(backend, Signal::Kill).unwrap();
    first.loses(&term, &[LossReason::ServerCrashed, LossReason::ConnectionClosed]);
    let (winner, other) = winner_and_other(&first, &second);
    let operator = &mut server.client().unwrap();
    winner.gets_it_again(operator);
    pass_on(winner, other, waiting, operator);
}

fn a_dropped_database_that_is_made_again_has_locks_again(shared_sessions: u32) {
    let server = Server::start().unwrap();
    let mut administrator = server.client().unwrap();
    administrator.batch_execute("CREATE DATABASE fragile").unwrap();
    let url = format!("{}fragile", server.url().strip_suffix("postgres").unwrap());
    let operator = || Client::connect(&url, NoTls).unwrap();
    let [first, second] = ["first", "second"].map(|name| Rival::new(name, &url, shared_sessions));
    let term = first.lock();
    let waiting = wait_in_thread(&second.lock);
    becomes("the queue", &vec!["second".to_owned()], || waiters(&mut operator()));

    administrator.batch_execute("DROP DATABASE fragile WITH (FORCE)").unwrap();
    first.loses(&term, &[LossReason::Terminated, LossReason::DatabaseDropped]);
    eventually("the news", || {
        let error = first.lock.try_lock(&soon()).unwrap_err();
        // The session may be told of its end, before the next one is told of the database's.
        error.kind() == ErrorKind::SessionRefused && error.to_string().contains("create the database")
    });
    // Sessions are ended one after the other, so that it may have been granted the lock for a moment.
    eventually("the end of the other one's term", || !second.is_held());

    administrator.batch_execute("CREATE DATABASE fragile").unwrap();
    let (winner, other) = winner_and_other(&first, &second);
    winner.gets_it_again(&mut operator());
    let token = winner.lock.term().unwrap().token();
    assert!(token.is_some(), "the catalog has been made again");
    let row = operator().query_one("SELECT token FROM dsync.lock WHERE key = 'x'", &[]).unwrap();
    assert_eq!(token, Some(row.get(0)));
    pass_on(winner, other, waiting, &mut operator());
    assert!(other.lock.term().unwrap().token() > token);
    for rival in [first, second] {
        rival.manager.stop().unwrap();
    }
}

fn a_dropped_catalog_is_made_again(shared_sessions: u32) {
    let server = Server::start().unwrap();
    let operator = &mut server.client().unwrap();
    let only = Rival::new("only", &server.url(), shared_sessions);
    only.lock();
    operator.batch_execute("DROP SCHEMA dsync CASCADE").unwrap();
    only.lock.release().unwrap();
    only.lock();
    only.gets_it_again(operator);
    assert!(only.lock.term().unwrap().token().is_some());
}

/// Each attempt gives up at the refusal, and its claim ends before anybody has closed the session.
fn a_dropped_catalog_is_made_again_for_those_who_only_try(shared_sessions: u32) {
    let server = Server::start().unwrap();
    let operator = &mut server.client().unwrap();
    let only = Rival::new("only", &server.url(), shared_sessions);
    for round in 0..4 {
        drop(only.lock.try_acquire().unwrap().expect("nobody else wants it"));
        operator.batch_execute("DROP SCHEMA dsync CASCADE").unwrap();
        let refused = (0..10).take_while(|_| only.lock.try_acquire().is_err()).count();
        assert!(refused <= 2, "{refused} refused in round {round}");
    }
}

fn a_full_server_is_waited_for(shared_sessions: u32) {
    let server = Server::builder().max_connections(10).start().unwrap();
    let operator = &mut server.client().unwrap();
    let others =
        || -> Vec<Client> { std::iter::from_fn(|| Client::connect(&server.url(), NoTls).ok()).collect() };
    let no_room = |rival: &Rival| {
        let error = rival.lock.try_lock(&soon()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::PoolExhausted, "{error}");
        assert_eq!(error.sqlstate(), Some("53300"), "{error}");
        assert!(error.to_string().contains("max_connections"), "it says what to change: {error}");
        assert!(!rival.is_held());
    };

    let crowd = others();
    let first = Rival::new("first", &server.url(), shared_sessions);
    no_room(&first);
    drop(crowd);
    first.gets_it_again(operator);

    // A full server loses the holder's session, and the place may be taken before the next one comes.
    let second = Rival::new("second", &server.url(), shared_sessions);
    let term = first.lock.lost();
    let waiting = wait_in_thread(&second.lock);
    becomes("the queue", &vec!["second".to_owned()], || waiters(operator));
    let mut crowd = others();
    let [backend] = backends(operator, "granted")[..] else { panic!("one holder") };
    assert!(operator.query_one("SELECT pg_terminate_backend($1)", &[&backend]).unwrap().get::<_, bool>(0));
    crowd.extend(others());
    first.loses(&term, &[LossReason::Terminated]);
    waiting.get().unwrap();
    second.gets_it_again(operator);
    drop(crowd);
    becomes("the queue", &vec!["first".to_owned()], || waiters(operator));
    second.lock.release().unwrap();
    first.gets_it_again(operator);
}

fn a_password_that_is_changed_and_changed_back_is_waited_for(shared_sessions: u32) {
    let server = Server::builder().password_auth().start().unwrap();
    let operator = &mut server.client().unwrap();
    operator
        .batch_execute("CREATE ROLE app LOGIN PASSWORD 'right'; GRANT CREATE ON DATABASE postgres TO app")
        .unwrap();
    let url = format!("postgres://app:right@127.0.0.1:{}/postgres", server.port());
    let only = Rival::new("only", &url, shared_sessions);
    let term = only.lock();
    operator.batch_execute("ALTER ROLE app PASSWORD 'another'").unwrap();
    assert!(is_open(&term), "who is in stays in");

    let [backend] = backends(operator, "granted")[..] else { panic!("one holder") };
    assert!(server.terminate(backend).unwrap());
    only.loses(&term, &[LossReason::Terminated]);
    let error = only.lock.try_lock(&soon()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::SessionRefused, "{error}");
    assert!(error.to_string().contains("check user and password"), "{error}");
    let waiting = wait_in_thread(&only.lock);

    operator.batch_execute("ALTER ROLE app PASSWORD 'right'").unwrap();
    only.gets_it_again(operator);
    waiting.get().unwrap();
}

/// A call without time makes an attempt of its own, however long the claim would pause.
fn try_lock_without_time_ends_the_pause_after_an_outage(shared_sessions: u32) {
    let server = Server::start().unwrap();
    let manager = started(Config::from_url(&server.url()).unwrap().shared_sessions(shared_sessions));
    let x = lock(&manager, "x");
    x.lock(&soon()).unwrap();
    let lost = x.lost();
    server.stop(Shutdown::Fast).unwrap();
    hear(&lost);
    // Long enough for pauses of a second.
    let outage = Instant::now();
    while outage.elapsed() < Duration::from_secs(8) {
        assert_eq!(kind(x.lock(&briefly())), ErrorKind::TimedOut);
    }
    server.start_again().unwrap();
    let begun = Instant::now();
    let attempt = || x.try_lock(&dsync::Context::timeout(Duration::ZERO));
    let mut outcome = attempt();
    if outcome.as_ref().is_err_and(|error| error.to_string().contains("starting up")) {
        // That was the answer to an attempt that was under way before the server was ready.
        outcome = attempt();
    }
    println!("{outcome:?} after {:?}", begun.elapsed());
    outcome.unwrap();
}
