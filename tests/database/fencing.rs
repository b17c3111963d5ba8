//! Fenced transactions: what a former holder writes is refused, and a successor waits for what is being written. What a fence asks of the
//! application's own connection is tried in one mode: it does not know which session has the lock. So is what a successor has that waits, which is
//! a session of its own in either mode.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use dsync::{Config, ErrorKind, Key, Lock, LockOptions, MemoryManager, PostgresManager, SyncManager, Term};
use postgres::{Client, GenericClient, IsolationLevel, NoTls, Transaction};
use support::process::Signal;
use support::{Database, Replication, Server};

use crate::common::{
    self, Lateness, PATIENCE, Process, eventually, hear, in_both_modes, kind, lock, soon, started,
    wait_in_thread,
};

in_both_modes! {
    // A holder that was paused.
    a_holder_that_was_frozen_past_its_lease_cannot_write
    a_writer_that_is_frozen_in_its_transaction_holds_up_nobody_for_longer_than_the_lease
    the_database_itself_refuses_a_former_holder
    a_former_term_stays_over_when_the_lock_is_held_again
    a_term_that_ends_while_the_database_looks_is_over
    // A successor waits.
    the_next_term_begins_only_when_the_fenced_transactions_of_the_last_one_have_ended
    the_holder_s_own_next_term_waits_for_the_fenced_transactions_of_its_last_one
    a_transaction_that_was_refused_holds_up_nobody
    // Whose transaction it is.
    transactions_of_every_isolation_level_can_be_fenced
    // By the function of the catalog.
    the_function_refuses_a_former_holder_by_a_state_of_its_own
    the_function_knows_terms_of_numbers_and_pairs
    the_next_term_begins_only_when_transactions_that_called_the_function_have_ended
    a_transaction_that_the_function_has_refused_holds_up_nobody
    above_read_committed_a_transaction_from_before_the_first_term_is_refused
}

fn config(database: &Database<'_>, shared_sessions: u32) -> Config {
    let config = Config::from_url(&database.url()).unwrap().release_timeout(PATIENCE);
    config.shared_sessions(shared_sessions)
}

/// A holder of the lock `x`, a rival, and the connection of somebody who writes.
struct Scene<'a> {
    database: &'a Database<'a>,
    holder: Arc<dyn Lock>,
    rival: Arc<dyn Lock>,
    writer: Client,
    _managers: [PostgresManager; 2],
}

impl<'a> Scene<'a> {
    fn set(database: &'a Database<'a>, shared_sessions: u32) -> Self {
        let managers = [(); 2].map(|()| started(config(database, shared_sessions)));
        let [holder, rival] = [&managers[0], &managers[1]].map(|manager| lock(manager, "x"));
        holder.lock(&soon()).unwrap();
        Self { database, holder, rival, writer: database.client().unwrap(), _managers: managers }
    }

    fn term(&self) -> Term {
        self.holder.term().unwrap()
    }

    /// Ends the holder's session, and its claim, so that it does not come back.
    fn lose(&self) {
        // Before the session ends: a moment later the claim may have another term, which nobody ends.
        let lost = self.holder.lost();
        end_session(&mut self.database.client().unwrap(), "x");
        hear(&lost);
        self.holder.release().unwrap();
    }

    /// A later term begins, and the holder does not know.
    fn supersede(&self) {
        let query = "UPDATE dsync.lock SET token = nextval('dsync.token') WHERE key = 'x'";
        assert_eq!(self.database.client().unwrap().execute(query, &[]).unwrap(), 1);
        assert!(self.term().is_held(), "as far as it knows");
    }
}

fn end_session(operator: &mut Client, key: &str) {
    operator.execute("SELECT pg_terminate_backend(pid) FROM dsync.locks WHERE key = $1", &[&key]).unwrap();
}

/// The bound on pauses that the transaction has.
fn bound(transaction: &mut impl GenericClient) -> String {
    transaction.query_one("SHOW idle_in_transaction_session_timeout", &[]).unwrap().get(0)
}

// ---------------------------------------------------------------------------------------------------------------------
// A holder that was paused
// ---------------------------------------------------------------------------------------------------------------------

/// Of the processes that are frozen. The others have longer ones, so that a busy machine does not cost them their locks.
const LEASE: Duration = Duration::from_secs(5);

fn a_holder_that_was_frozen_past_its_lease_cannot_write(shared_sessions: u32) {
    let database = Database::fresh().unwrap();
    let mut client = database.client().unwrap();
    client.batch_execute("CREATE TABLE story (id serial, writer text, fenced bool)").unwrap();
    let gate = database.server().folder().join(format!("gate-{}", database.name()));
    let role = format!("paused {shared_sessions} {} {}", database.url(), gate.display());
    let child = Process::start(&mut common::process("fencing::worker", &role));
    child.says("held");

    support::process::signal(child.id(), Signal::Stop).unwrap();
    let manager = started(config(&database, shared_sessions));
    let successor = lock(&manager, "x");
    successor.lock(&soon()).unwrap();
    let mut transaction = client.transaction().unwrap();
    successor.term().unwrap().fence(&mut transaction).unwrap();
    transaction.execute("INSERT INTO story (writer, fenced) VALUES ('successor', true)", &[]).unwrap();
    transaction.commit().unwrap();
    fs::write(&gate, "").unwrap();
    support::process::signal(child.id(), Signal::Continue).unwrap();
    assert!(child.says("fenced: ").ends_with("Lost"));
    child.succeeds();

    let rows = client.query("SELECT writer FROM story ORDER BY id", &[]).unwrap();
    let writers: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
    assert_eq!(
        writers,
        ["successor", "former holder"],
        "without the fence, nothing had kept it from writing"
    );
}

fn a_writer_that_is_frozen_in_its_transaction_holds_up_nobody_for_longer_than_the_lease(
    shared_sessions: u32,
) {
    let database = Database::fresh().unwrap();
    let mut client = database.client().unwrap();
    client.batch_execute("CREATE TABLE story (id serial, writer text, fenced bool)").unwrap();
    let role = format!("inside {shared_sessions} {} -", database.url());
    let child = Process::start(&mut common::process("fencing::worker", &role));
    let manager = started(config(&database, shared_sessions));
    let successor = lock(&manager, "x");
    child.says("inside");

    let (late, begun) = (Lateness::watch(), Instant::now());
    support::process::signal(child.id(), Signal::Stop).unwrap();
    successor.lock(&soon()).unwrap();
    let held_up = begun.elapsed();
    println!("held up for {held_up:?}, with a lease of {LEASE:?}");
    // The lease and a second; and two more, for a machine that has others to serve.
    late.allow(held_up, LEASE + Duration::from_secs(3));
    let rows = client.query("SELECT FROM story", &[]).unwrap();
    assert_eq!(rows.len(), 0, "what it wrote went with its session");
    child.kill();
}

/// Not a test: the body of the processes that other tests start.
#[test]
#[ignore = "the body of a process, which another test starts"]
fn worker() {
    let Some(role) = common::role() else { return };
    let words: Vec<_> = role.split(' ').collect();
    let [what, shared, url, gate] = words[..] else { panic!("{role}") };
    let config = Config::from_url(url).unwrap().lease(LEASE).shared_sessions(shared.parse().unwrap());
    let manager = started(config);
    let lock = lock(&manager, "x");
    lock.lock(&soon()).unwrap();
    let term = lock.term().unwrap();
    let mut client = Client::connect(url, NoTls).unwrap();
    let write = |transaction: &mut Transaction<'_>, fenced: bool| {
        let statement = "INSERT INTO story (writer, fenced) VALUES ('former holder', $1)";
        transaction.execute(statement, &[&fenced]).unwrap();
    };
    if what == "inside" {
        let mut transaction = client.transaction().unwrap();
        term.fence(&mut transaction).unwrap();
        write(&mut transaction, true);
        println!("inside");
        thread::sleep(PATIENCE);
        return;
    }
    println!("held");
    eventually("the gate", || Path::new(gate).exists());
    let mut transaction = client.transaction().unwrap();
    match term.fence(&mut transaction) {
        Ok(()) => {
            write(&mut transaction, true);
            transaction.commit().unwrap();
            println!("fenced: written");
        }
        Err(error) => {
            drop(transaction);
            println!("fenced: {:?}", error.kind());
        }
    }
    let mut transaction = client.transaction().unwrap();
    write(&mut transaction, false);
    transaction.commit().unwrap();
}

/// The former holder's own knowledge plays no part here.
fn the_database_itself_refuses_a_former_holder(shared_sessions: u32) {
    let database = Database::fresh().unwrap();
    let mut scene = Scene::set(&database, shared_sessions);
    let term = scene.term();
    assert!(term.is_current(&mut scene.writer).unwrap());
    let mut transaction = scene.writer.transaction().unwrap();
    term.fence(&mut transaction).unwrap();
    term.fence(&mut transaction).unwrap();
    transaction.commit().unwrap();

    scene.supersede();
    assert!(!term.is_current(&mut scene.writer).unwrap());
    let mut transaction = scene.writer.transaction().unwrap();
    assert_eq!(kind(term.fence(&mut transaction)), ErrorKind::Lost);
    transaction.rollback().unwrap();

    scene.writer.batch_execute("DELETE FROM dsync.lock").unwrap();
    let mut transaction = scene.writer.transaction().unwrap();
    assert_eq!(kind(term.fence(&mut transaction)), ErrorKind::Lost);
}

fn a_former_term_stays_over_when_the_lock_is_held_again(shared_sessions: u32) {
    let database = Database::fresh().unwrap();
    let mut scene = Scene::set(&database, shared_sessions);
    let old = scene.term();
    scene.holder.release().unwrap();
    assert!(!old.is_held());
    let mut transaction = scene.writer.transaction().unwrap();
    assert_eq!(kind(old.fence(&mut transaction)), ErrorKind::Lost);
    drop(transaction);
    scene.holder.lock(&soon()).unwrap();
    let new = scene.term();
    let mut transaction = scene.writer.transaction().unwrap();
    assert_eq!(kind(old.fence(&mut transaction)), ErrorKind::Lost);
    new.fence(&mut transaction).unwrap();
    drop(transaction);
    assert!(!old.is_current(&mut scene.writer).unwrap());
    assert!(new.is_current(&mut scene.writer).unwrap());
}

/// The fence waits for the row, which somebody else has, and the term ends meanwhile: it would be the last to know.
fn a_term_that_ends_while_the_database_looks_is_over(shared_sessions: u32) {
    let database = Database::fresh().unwrap();
    let mut scene = Scene::set(&database, shared_sessions);
    let term = scene.term();
    let waits = |operator: &mut Client| {
        eventually("the look at the row", || {
            let query = "SELECT count(*) FROM pg_stat_activity
                         WHERE wait_event_type = 'Lock' AND datname = current_database()";
            operator.query_one(query, &[]).unwrap().get::<_, i64>(0) == 1
        });
    };
    let (mut reader, mut operator) = (database.client().unwrap(), database.client().unwrap());
    for lock in ["SELECT FROM dsync.lock FOR UPDATE", "LOCK TABLE dsync.lock"] {
        let term = scene.term();
        let mut blocking = database.client().unwrap();
        let mut transaction = blocking.transaction().unwrap();
        transaction.batch_execute(lock).unwrap();
        thread::scope(|scope| {
            let fencing = scope.spawn(|| {
                let mut transaction = scene.writer.transaction().unwrap();
                term.fence(&mut transaction)
            });
            waits(&mut operator);
            scene.holder.release().unwrap();
            // Behind the fence, or, where that is not to be had, behind the same lock.
            let next = wait_in_thread(&scene.holder);
            transaction.rollback().unwrap();
            assert_eq!(kind(fencing.join().unwrap()), ErrorKind::Lost, "{lock}");
            next.get().unwrap();
        });
    }
    let new = scene.term();
    assert!(!term.is_current(&mut reader).unwrap());
    let mut blocking = database.client().unwrap();
    let mut transaction = blocking.transaction().unwrap();
    transaction.batch_execute("LOCK TABLE dsync.lock").unwrap();
    thread::scope(|scope| {
        let looking = scope.spawn(|| new.is_current(&mut reader));
        waits(&mut operator);
        scene.holder.release().unwrap();
        transaction.rollback().unwrap();
        assert!(!looking.join().unwrap().unwrap(), "the row is the newest still, but the term is over");
    });
}

/// Row security, enabled on all tables, say, hides the row from a role that is not the owner.
#[test]
fn a_row_that_cannot_be_seen_is_not_taken_for_one_that_is_gone() {
    let database = Database::fresh().unwrap();
    let scene = Scene::set(&database, 0);
    let role = format!("role_{}", database.name());
    let mut administrator = database.client().unwrap();
    administrator
        .batch_execute(&format!(
            "CREATE ROLE {role} LOGIN; GRANT USAGE ON SCHEMA dsync TO {role};
             GRANT SELECT, INSERT, UPDATE ON ALL TABLES IN SCHEMA dsync TO {role};
             GRANT USAGE, UPDATE ON dsync.token TO {role};"
        ))
        .unwrap();
    let url = database.url().replace("postgres@", &format!("{role}@"));
    let mut client = Client::connect(&url, NoTls).unwrap();
    let term = scene.term();
    let fenced = |client: &mut Client| {
        let mut transaction = client.transaction().unwrap();
        term.fence(&mut transaction)
    };
    fenced(&mut client).unwrap();
    assert!(term.is_current(&mut client).unwrap());
    administrator.batch_execute("ALTER TABLE dsync.lock ENABLE ROW LEVEL SECURITY").unwrap();
    let manager = PostgresManager::new(Config::from_url(&url).unwrap()).unwrap();
    for error in [
        fenced(&mut client).unwrap_err(),
        term.is_current(&mut client).unwrap_err(),
        manager.start().unwrap_err(),
    ] {
        let text = error.to_string();
        assert!(
            matches!(error.kind(), ErrorKind::SessionRefused | ErrorKind::FailedInitialization),
            "{text}"
        );
        assert!(text.contains("row security") && text.contains("DISABLE ROW LEVEL SECURITY"), "{text}");
    }
    client.batch_execute("SET row_security = off").unwrap();
    let text = fenced(&mut client).unwrap_err().to_string();
    assert!(text.contains("DISABLE ROW LEVEL SECURITY"), "{text}");
    client.batch_execute("RESET row_security").unwrap();
    // Where a policy lets it see the row, all is well; and lost is lost.
    administrator.batch_execute("CREATE POLICY all_rows ON dsync.lock USING (true)").unwrap();
    fenced(&mut client).unwrap();
    scene.supersede();
    administrator.batch_execute("ALTER TABLE dsync.lock DISABLE ROW LEVEL SECURITY").unwrap();
    assert_eq!(kind(fenced(&mut client)), ErrorKind::Lost);
    administrator.batch_execute(&format!("DROP OWNED BY {role}; DROP ROLE {role}")).unwrap();
}

// ---------------------------------------------------------------------------------------------------------------------
// A successor waits
// ---------------------------------------------------------------------------------------------------------------------

fn the_next_term_begins_only_when_the_fenced_transactions_of_the_last_one_have_ended(shared_sessions: u32) {
    let database = Database::fresh().unwrap();
    let mut scene = Scene::set(&database, shared_sessions);
    scene.writer.batch_execute("CREATE TABLE story (line text)").unwrap();
    let term = scene.term();
    // Two at once: several threads of the holder may write.
    let mut second_writer = database.client().unwrap();
    let mut transaction = scene.writer.transaction().unwrap();
    let mut second = second_writer.transaction().unwrap();
    term.fence(&mut transaction).unwrap();
    term.fence(&mut second).unwrap();

    let lost = scene.holder.lost();
    end_session(&mut database.client().unwrap(), "x");
    hear(&lost);
    scene.holder.release().unwrap();
    // Whoever does not want to wait is told so, also where the row alone is in the way.
    let (late, begun) = (Lateness::watch(), Instant::now());
    assert_eq!(kind(scene.rival.try_lock(&soon())), ErrorKind::LockUnavailable);
    // It does not wait for a slice to end.
    late.allow(begun.elapsed(), Duration::from_secs(4));
    let waiting = wait_in_thread(&scene.rival);
    let mut operator = database.client().unwrap();
    eventually("the successor to wait at the gate", || {
        let query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'dsync x'
                     AND wait_event_type = 'Lock' AND wait_event = 'advisory'
                     AND datname = current_database()";
        operator.query_one(query, &[]).unwrap().get::<_, i64>(0) == 1
    });
    second.commit().unwrap();
    transaction.execute("INSERT INTO story VALUES ('the last word of the old term')", &[]).unwrap();
    assert!(!waiting.is_ready() && scene.rival.term().is_none(), "one of the two is open still");
    transaction.commit().unwrap();
    waiting.get().unwrap();
    assert!(scene.rival.term().unwrap().token() > term.token());

    scene.rival.release().unwrap();
}

/// The holder's own next claim, which may follow so close that it keeps the session, waits as anybody's does.
fn the_holder_s_own_next_term_waits_for_the_fenced_transactions_of_its_last_one(shared_sessions: u32) {
    let database = Database::fresh().unwrap();
    let mut scene = Scene::set(&database, shared_sessions);
    for round in 0..5 {
        let term = scene.term();
        let mut transaction = scene.writer.transaction().unwrap();
        term.fence(&mut transaction).unwrap();
        scene.holder.release().unwrap();
        let (late, begun) = (Lateness::watch(), Instant::now());
        assert_eq!(kind(scene.holder.try_lock(&soon())), ErrorKind::LockUnavailable, "round {round}");
        // The gate tells, not a timeout.
        late.allow(begun.elapsed(), Duration::from_secs(2));
        let waiting = wait_in_thread(&scene.holder);
        assert!(scene.holder.term().is_none());
        transaction.commit().unwrap();
        waiting.get().unwrap();
        assert!(scene.term().token() > term.token());
    }
}

/// It is told to roll back. That it takes its time is no concern of its successors.
fn a_transaction_that_was_refused_holds_up_nobody(shared_sessions: u32) {
    let database = Database::fresh().unwrap();
    let mut scene = Scene::set(&database, shared_sessions);
    scene.supersede();
    let term = scene.term();
    let mut transaction = scene.writer.transaction().unwrap();
    assert_eq!(kind(term.fence(&mut transaction)), ErrorKind::Lost);
    scene.holder.release().unwrap();
    for next in [&scene.rival, &scene.holder, &scene.holder, &scene.rival] {
        next.try_lock(&soon()).unwrap();
        next.release().unwrap();
    }
    drop(transaction);
}

/// The path on which the row is waited for must not lose the lease: a holder that freezes then must be replaced too.
#[test]
fn a_successor_that_waited_for_a_fenced_transaction_has_a_lease() {
    let database = Database::fresh().unwrap();
    let mut client = database.client().unwrap();
    let manager = started(config(&database, 0));
    let first = lock(&manager, "x");
    first.lock(&soon()).unwrap();
    let mut transaction = client.transaction().unwrap();
    first.term().unwrap().fence(&mut transaction).unwrap();
    first.release().unwrap();

    // Slices so short that several end while it waits, with the lock in its hand.
    let url = database.url();
    let child = Process::start(&mut common::process("fencing::worker_waits", &url));
    child.says("asking");
    let mut operator = database.client().unwrap();
    let mut slice = || -> Option<String> {
        let query = "SELECT query_start::text FROM pg_stat_activity WHERE datname = current_database()
                     AND wait_event_type = 'Lock' AND wait_event = 'advisory'";
        operator.query_opt(query, &[]).unwrap().map(|row| row.get(0))
    };
    let mut last = None;
    for _ in 0..3 {
        eventually("the next slice", || {
            let now = slice();
            now.is_some() && std::mem::replace(&mut last, now.clone()) != now
        });
    }
    transaction.commit().unwrap();
    child.says("held");
    support::process::signal(child.id(), Signal::Stop).unwrap();
    let begun = Instant::now();
    first.lock(&soon()).unwrap();
    // Long for a busy machine; without a lease it would not be replaced at all.
    assert!(begun.elapsed() < LEASE + Duration::from_secs(10), "{:?}", begun.elapsed());
}

/// As [`a_successor_that_waited_for_a_fenced_transaction_has_a_lease`], but it freezes while it waits for the row.
#[test]
fn a_successor_that_freezes_while_it_waits_for_a_fenced_transaction_is_replaced() {
    let database = Database::fresh().unwrap();
    let mut client = database.client().unwrap();
    let manager = started(config(&database, 0));
    let first = lock(&manager, "x");
    first.lock(&soon()).unwrap();
    let mut transaction = client.transaction().unwrap();
    first.term().unwrap().fence(&mut transaction).unwrap();
    first.release().unwrap();
    let child = Process::start(&mut common::process("fencing::worker_waits", &database.url()));
    child.says("asking");
    eventually("the child to have the advisory lock", || manager.inspect("x").unwrap().holder.is_some());
    support::process::signal(child.id(), Signal::Stop).unwrap();
    let begun = Instant::now();
    eventually("the lock to be free", || manager.inspect("x").unwrap().holder.is_none());
    // Long for a busy machine; without a lease it would not be replaced at all.
    assert!(begun.elapsed() < LEASE + Duration::from_secs(10), "{:?}", begun.elapsed());
}

/// Not a test: the body of a process that other tests start.
#[test]
#[ignore = "the body of a process, which another test starts"]
fn worker_waits() {
    let Some(url) = common::role() else { return };
    let config = Config::from_url(&url).unwrap().lease(LEASE).wait_slice(Duration::from_millis(100));
    let manager = started(config);
    let lock = lock(&manager, "x");
    println!("asking");
    lock.lock(&soon()).unwrap();
    println!("held");
    thread::sleep(PATIENCE);
}

// ---------------------------------------------------------------------------------------------------------------------
// No update is lost
// ---------------------------------------------------------------------------------------------------------------------

/// Reads and writes as if nobody else did, fenced by `Term::fence` or by the function of the catalog; whether that was committed.
fn increment(term: &Term, by_function: bool, client: &mut Client, key: &str, pauses: [Duration; 2]) -> bool {
    let mut attempt = || -> Result<(), String> {
        let mut transaction = client.transaction().unwrap();
        if by_function {
            call(&mut transaction, &text(term))?;
        } else {
            term.fence(&mut transaction).map_err(|error| format!("{:?}", error.kind()))?;
        }
        let value: i64 =
            transaction.query_one("SELECT value FROM counter WHERE key = $1", &[&key]).unwrap().get(0);
        thread::sleep(pauses[0]);
        transaction.execute("UPDATE counter SET value = $2 WHERE key = $1", &[&key, &(value + 1)]).unwrap();
        thread::sleep(pauses[1]);
        transaction.commit().unwrap();
        Ok(())
    };
    match attempt() {
        Ok(()) => true,
        Err(refusal) => {
            assert_eq!(refusal, if by_function { OVER } else { "Lost" });
            false
        }
    }
}

#[test]
fn a_thousand_interleavings_lose_no_update() {
    interleavings_lose_no_update(125, 0);
}

#[test]
fn interleavings_of_terms_on_shared_sessions_lose_no_update() {
    interleavings_lose_no_update(30, 1);
}

fn interleavings_lose_no_update(rounds: usize, shared_sessions: u32) {
    const THREADS: usize = 8;
    let database = Database::fresh().unwrap();
    database.client().unwrap().batch_execute("CREATE TABLE counter (key text, value int8)").unwrap();
    let refused = AtomicI64::new(0);
    thread::scope(|scope| {
        for number in 0..THREADS {
            let (database, refused) = (&database, &refused);
            scope.spawn(move || {
                let key = format!("counter {number}");
                let managers = [(); 2].map(|()| started(config(database, shared_sessions)));
                let [holder, rival] = [&managers[0], &managers[1]].map(|manager| lock(manager, &key));
                let [mut one, mut other, mut operator] = [(); 3].map(|()| database.client().unwrap());
                operator.execute("INSERT INTO counter VALUES ($1, 0)", &[&key]).unwrap();
                let mut random = fastrand::Rng::with_seed(number as u64);
                let mut committed = 0;
                for _ in 0..rounds {
                    let mut pause = || Duration::from_micros(random.u64(..3000));
                    let (first, second, before) = ([pause(), pause()], [pause(), pause()], pause());
                    let (queues_first, by_function) = (random.bool(), random.bool());
                    holder.lock(&soon()).unwrap();
                    let Some(term) = holder.term() else { continue };
                    let waiting = queues_first.then(|| wait_in_thread(&rival));
                    committed += thread::scope(|scope| {
                        let writer = scope.spawn(|| increment(&term, by_function, &mut one, &key, first));
                        thread::sleep(before);
                        end_session(&mut operator, &key);
                        hear(term.lost());
                        holder.release().unwrap();
                        match waiting {
                            Some(waiting) => waiting.get().unwrap(),
                            None => rival.lock(&soon()).unwrap(),
                        }
                        // It began after the other's transaction had ended, or the other one's is refused.
                        let rivals = rival.term().unwrap();
                        assert!(
                            increment(&rivals, !by_function, &mut other, &key, second),
                            "it is the holder now"
                        );
                        let written = writer.join().unwrap();
                        if !written {
                            refused.fetch_add(1, Ordering::Relaxed);
                        }
                        1 + i64::from(written)
                    });
                    rival.release().unwrap();
                }
                let value: i64 =
                    operator.query_one("SELECT value FROM counter WHERE key = $1", &[&key]).unwrap().get(0);
                assert_eq!(value, committed, "an update was lost");
            });
        }
    });
    let refused = refused.into_inner();
    println!("{refused} of {} former holders were refused", THREADS * rounds);
    assert!(
        refused > 0 && refused < (THREADS * rounds) as i64,
        "both ends of the race have been seen: {refused}"
    );
}

// ---------------------------------------------------------------------------------------------------------------------
// Whose transaction it is
// ---------------------------------------------------------------------------------------------------------------------

#[test]
fn a_tighter_bound_on_pauses_stays_and_a_looser_one_comes_back() {
    let database = Database::fresh().unwrap();
    let mut scene = Scene::set(&database, 0);
    let term = scene.term();
    for (own, wanted) in [("3s", "3s"), ("1h", "15s"), ("0", "15s"), ("14999ms", "14999ms"), ("2d", "15s")] {
        scene.writer.batch_execute(&format!("SET idle_in_transaction_session_timeout = '{own}'")).unwrap();
        let before = bound(&mut scene.writer);
        let mut transaction = scene.writer.transaction().unwrap();
        term.fence(&mut transaction).unwrap();
        assert_eq!(bound(&mut transaction), wanted);
        transaction.commit().unwrap();
        assert_eq!(bound(&mut scene.writer), before);
    }
}

fn begin(client: &mut Client, level: IsolationLevel) -> Transaction<'_> {
    client.build_transaction().isolation_level(level).start().unwrap()
}

fn transactions_of_every_isolation_level_can_be_fenced(shared_sessions: u32) {
    let database = Database::fresh().unwrap();
    let mut scene = Scene::set(&database, shared_sessions);
    let mut operator = database.client().unwrap();
    for level in [IsolationLevel::ReadCommitted, IsolationLevel::RepeatableRead, IsolationLevel::Serializable]
    {
        let term = scene.term();
        let mut transaction = begin(&mut scene.writer, level);
        term.fence(&mut transaction).unwrap();
        transaction.commit().unwrap();

        // It has read already when the next term begins: it must not write by what it has read.
        let mut transaction = begin(&mut scene.writer, level);
        transaction.batch_execute("SELECT 1").unwrap();
        operator.execute("UPDATE dsync.lock SET token = nextval('dsync.token')", &[]).unwrap();
        assert_eq!(kind(term.fence(&mut transaction)), ErrorKind::Lost, "{level:?}");
        drop(transaction);

        // And it has read already when its own term begins.
        let mut writer = database.client().unwrap();
        let mut early = begin(&mut writer, level);
        early.batch_execute("SELECT 1").unwrap();
        scene.holder.release().unwrap();
        scene.holder.lock(&soon()).unwrap();
        let outcome = scene.term().fence(&mut early).map_err(|error| error.kind());
        let sees_the_present = matches!(level, IsolationLevel::ReadCommitted);
        assert_eq!(outcome, if sees_the_present { Ok(()) } else { Err(ErrorKind::Lost) }, "{level:?}");
    }
}

#[test]
fn any_role_on_any_connection_can_fence_if_it_has_the_rights() {
    let database = Database::fresh().unwrap();
    let scene = Scene::set(&database, 0);
    let term = scene.term();
    let mut administrator = database.client().unwrap();
    administrator.batch_execute("CREATE ROLE clerk LOGIN").unwrap();
    let url = database.url().replace("postgres@", "clerk@");
    let mut clerk = Client::connect(&url, NoTls).unwrap();

    let refusal = |clerk: &mut Client| {
        let error = term.fence(&mut clerk.transaction().unwrap()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::SessionRefused);
        assert_eq!(error.sqlstate(), Some("42501"));
        error.to_string()
    };
    assert!(refusal(&mut clerk).contains("permission denied for schema dsync"));
    administrator
        .batch_execute("GRANT USAGE ON SCHEMA dsync TO clerk; GRANT SELECT ON dsync.lock TO clerk")
        .unwrap();
    let text = refusal(&mut clerk);
    assert!(text.contains("GRANT USAGE ON SCHEMA dsync") && text.contains("UPDATE ON dsync.lock"), "{text}");
    assert!(term.is_current(&mut clerk).unwrap(), "asking needs less");
    administrator.batch_execute("GRANT UPDATE ON dsync.lock TO clerk").unwrap();
    let mut transaction = clerk.transaction().unwrap();
    term.fence(&mut transaction).unwrap();
    transaction.commit().unwrap();

    let mut read_only = clerk.build_transaction().read_only(true).start().unwrap();
    let error = term.fence(&mut read_only).unwrap_err();
    assert_eq!(error.sqlstate(), Some("25006"), "{error}");
    drop(read_only);
    drop(clerk);
    administrator.batch_execute("DROP OWNED BY clerk; DROP ROLE clerk").unwrap();
}

#[test]
fn a_connection_that_is_lost_is_no_lost_term() {
    let database = Database::fresh().unwrap();
    let mut scene = Scene::set(&database, 0);
    let term = scene.term();
    let pid: i32 = scene.writer.query_one("SELECT pg_backend_pid()", &[]).unwrap().get(0);
    let mut transaction = scene.writer.transaction().unwrap();
    assert!(database.server().terminate(pid).unwrap());
    assert_eq!(kind(term.fence(&mut transaction)), ErrorKind::SessionUnavailable);
    drop(transaction);
    assert!(term.is_held());
    scene.lose();
}

// ---------------------------------------------------------------------------------------------------------------------
// By the function of the catalog, which any language can call
// ---------------------------------------------------------------------------------------------------------------------

/// The SQLSTATE of a later term's beginning.
const OVER: &str = "ZDF01";

fn text(term: &Term) -> String {
    term.fence_text().unwrap()
}

/// Calls the function in the transaction; the SQLSTATE of its error.
fn call(transaction: &mut impl GenericClient, text: &str) -> Result<(), String> {
    let outcome = transaction.execute("SELECT dsync.fence($1)", &[&text]);
    outcome.map(drop).map_err(|error| error.code().unwrap().code().to_owned())
}

fn refused(code: &str) -> Result<(), String> {
    Err(code.to_owned())
}

fn the_function_refuses_a_former_holder_by_a_state_of_its_own(shared_sessions: u32) {
    let database = Database::fresh().unwrap();
    let mut scene = Scene::set(&database, shared_sessions);
    let text = text(&scene.term());
    let mut transaction = scene.writer.transaction().unwrap();
    call(&mut transaction, &text).unwrap();
    // What some drivers make of a text.
    transaction.execute("SELECT dsync.fence($1::varchar)", &[&text]).unwrap();
    transaction.commit().unwrap();

    scene.supersede();
    assert_eq!(call(&mut scene.writer.transaction().unwrap(), &text), refused(OVER));
    // The term is told to roll back, and need not: its savepoint goes on.
    let mut transaction = scene.writer.transaction().unwrap();
    let mut savepoint = transaction.transaction().unwrap();
    assert_eq!(call(&mut savepoint, &text), refused(OVER));
    savepoint.rollback().unwrap();
    transaction.commit().unwrap();
    scene.writer.batch_execute("DELETE FROM dsync.lock").unwrap();
    assert_eq!(call(&mut scene.writer.transaction().unwrap(), &text), refused(OVER));
}

fn the_function_knows_terms_of_numbers_and_pairs(shared_sessions: u32) {
    let database = Database::fresh().unwrap();
    let manager = started(config(&database, shared_sessions));
    let mut writer = database.client().unwrap();
    for key in [Key::from(-1), Key::from(i64::MAX), Key::from((-1, 2)), Key::from((i32::MIN, -1))] {
        let lock = manager.lock(key.clone()).unwrap();
        let old = lock.acquire(soon()).unwrap();
        let former = text(old.term());
        old.release().unwrap();
        let guard = lock.acquire(soon()).unwrap();
        let mut transaction = writer.transaction().unwrap();
        call(&mut transaction, &text(guard.term())).unwrap();
        guard.release().unwrap();
        assert!(lock.try_acquire().unwrap().is_none(), "{key}: the fence lock is shared");
        transaction.commit().unwrap();
        drop(lock.try_acquire().unwrap().expect("free again"));
        assert_eq!(call(&mut writer.transaction().unwrap(), &former), refused(OVER), "{key}");
    }
}

fn the_next_term_begins_only_when_transactions_that_called_the_function_have_ended(shared_sessions: u32) {
    let database = Database::fresh().unwrap();
    let mut scene = Scene::set(&database, shared_sessions);
    scene.writer.batch_execute("CREATE TABLE story (line text)").unwrap();
    let text = text(&scene.term());
    let mut transaction = scene.writer.transaction().unwrap();
    // As psql sends it.
    transaction.batch_execute(&format!("SELECT dsync.fence('{text}')")).unwrap();
    let lost = scene.holder.lost();
    end_session(&mut database.client().unwrap(), "x");
    hear(&lost);
    scene.holder.release().unwrap();
    let (late, begun) = (Lateness::watch(), Instant::now());
    assert_eq!(kind(scene.rival.try_lock(&soon())), ErrorKind::LockUnavailable);
    // The fence lock tells, and not the end of a slice.
    late.allow(begun.elapsed(), Duration::from_secs(4));
    let waiting = wait_in_thread(&scene.rival);
    transaction.execute("INSERT INTO story VALUES ('the last word of the old term')", &[]).unwrap();
    assert!(!waiting.is_ready() && scene.rival.term().is_none());
    transaction.commit().unwrap();
    waiting.get().unwrap();
    assert_eq!(call(&mut scene.writer.transaction().unwrap(), &text), refused(OVER));
    scene.rival.release().unwrap();
}

fn a_transaction_that_the_function_has_refused_holds_up_nobody(shared_sessions: u32) {
    let database = Database::fresh().unwrap();
    let mut scene = Scene::set(&database, shared_sessions);
    scene.supersede();
    let text = text(&scene.term());
    let mut transaction = scene.writer.transaction().unwrap();
    let mut savepoint = transaction.transaction().unwrap();
    assert_eq!(call(&mut savepoint, &text), refused(OVER));
    savepoint.rollback().unwrap();
    scene.holder.release().unwrap();
    for next in [&scene.rival, &scene.holder, &scene.holder, &scene.rival] {
        next.try_lock(&soon()).unwrap();
        next.release().unwrap();
    }
    transaction.commit().unwrap();
}

#[test]
fn the_function_bounds_the_pauses_of_its_transaction_alone() {
    let database = Database::fresh().unwrap();
    let mut scene = Scene::set(&database, 0);
    let text = text(&scene.term());
    for (own, wanted) in [("3s", "3s"), ("1h", "15s"), ("0", "15s"), ("14999ms", "14999ms"), ("2d", "15s")] {
        scene
            .writer
            .batch_execute(&format!(
                "SET idle_in_transaction_session_timeout = '{own}'; SET search_path = public"
            ))
            .unwrap();
        let before = bound(&mut scene.writer);
        let mut transaction = scene.writer.transaction().unwrap();
        call(&mut transaction, &text).unwrap();
        assert_eq!(bound(&mut transaction), wanted);
        let path: String = transaction.query_one("SHOW search_path", &[]).unwrap().get(0);
        assert_eq!(path, "public", "its own");
        transaction.commit().unwrap();
        assert_eq!(bound(&mut scene.writer), before);
    }
}

/// What any framework tries again, it may try again here: the next attempt sees the present.
#[test]
fn above_read_committed_the_function_has_a_transaction_tried_again() {
    let database = Database::fresh().unwrap();
    let mut scene = Scene::set(&database, 0);
    let mut operator = database.client().unwrap();
    for level in [IsolationLevel::ReadCommitted, IsolationLevel::RepeatableRead, IsolationLevel::Serializable]
    {
        let sees_the_present = matches!(level, IsolationLevel::ReadCommitted);
        let old = text(&scene.term());
        let mut transaction = begin(&mut scene.writer, level);
        call(&mut transaction, &old).unwrap();
        transaction.commit().unwrap();

        // It has read already when the next term begins: it must not write by what it has read.
        let mut transaction = begin(&mut scene.writer, level);
        transaction.batch_execute("SELECT 1").unwrap();
        operator.execute("UPDATE dsync.lock SET token = nextval('dsync.token')", &[]).unwrap();
        let state = if sees_the_present { OVER } else { "40001" };
        assert_eq!(call(&mut transaction, &old), refused(state), "{level:?}");
        drop(transaction);
        assert_eq!(call(&mut begin(&mut scene.writer, level), &old), refused(OVER), "{level:?}");

        // And it has read already when its own term begins.
        let mut writer = database.client().unwrap();
        let mut early = begin(&mut writer, level);
        early.batch_execute("SELECT 1").unwrap();
        scene.holder.release().unwrap();
        scene.holder.lock(&soon()).unwrap();
        let new = text(&scene.term());
        let outcome = call(&mut early, &new);
        if sees_the_present {
            outcome.unwrap();
            drop(early);
        } else {
            assert_eq!(outcome, refused("40001"), "{level:?}");
            drop(early);
            call(&mut begin(&mut writer, level), &new).unwrap();
        }
    }
}

/// No row tells that there is a term.
fn above_read_committed_a_transaction_from_before_the_first_term_is_refused(shared_sessions: u32) {
    let database = Database::fresh().unwrap();
    let manager = started(config(&database, shared_sessions));
    for (number, level) in
        [IsolationLevel::RepeatableRead, IsolationLevel::Serializable].into_iter().enumerate()
    {
        let mut writer = database.client().unwrap();
        let mut early = begin(&mut writer, level);
        early.batch_execute("SELECT 1").unwrap();
        let first = lock(&manager, &format!("new {number}"));
        first.lock(&soon()).unwrap();
        let term = first.term().unwrap();
        assert_eq!(kind(term.fence(&mut early)), ErrorKind::Lost);
        assert_eq!(call(&mut early, &text(&term)), refused(OVER));
        drop(early);
        call(&mut begin(&mut writer, level), &text(&term)).unwrap();
    }
}

#[test]
fn on_a_standby_nothing_can_be_fenced() {
    let primary = Server::start().unwrap();
    let manager = started(Config::from_url(&primary.url()).unwrap());
    let held = lock(&manager, "x");
    held.lock(&soon()).unwrap();
    let term = held.term().unwrap();
    let standby = primary.standby(Replication::Asynchronous).unwrap();
    standby.wait_caught_up(&primary).unwrap();
    let mut client = standby.client().unwrap();
    let error = term.fence(&mut client.transaction().unwrap()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::SessionRefused);
    assert!(error.to_string().contains("must be on the primary"), "{error}");
    assert_eq!(call(&mut client, &text(&term)), refused("0A000"));
}

#[test]
fn the_function_has_the_rights_of_its_caller() {
    let database = Database::fresh().unwrap();
    let scene = Scene::set(&database, 0);
    let text = text(&scene.term());
    let mut administrator = database.client().unwrap();
    let role = format!("role_{}", database.name());
    administrator.batch_execute(&format!("CREATE ROLE {role} LOGIN")).unwrap();
    let url = database.url().replace("postgres@", &format!("{role}@"));
    let mut clerk = Client::connect(&url, NoTls).unwrap();
    let mut fenced = || call(&mut clerk.transaction().unwrap(), &text);
    for grant in ["USAGE ON SCHEMA dsync", "SELECT ON dsync.lock", "UPDATE ON dsync.lock"] {
        assert_eq!(fenced(), refused("42501"), "before {grant}");
        administrator.batch_execute(&format!("GRANT {grant} TO {role}")).unwrap();
    }
    fenced().unwrap();
    administrator.batch_execute("REVOKE EXECUTE ON FUNCTION dsync.fence FROM PUBLIC").unwrap();
    assert_eq!(fenced(), refused("42501"));
    administrator.batch_execute(&format!("GRANT EXECUTE ON FUNCTION dsync.fence TO {role}")).unwrap();
    fenced().unwrap();
    // A row that cannot be seen is not taken for one that is gone.
    administrator.batch_execute("ALTER TABLE dsync.lock ENABLE ROW LEVEL SECURITY").unwrap();
    assert_eq!(fenced(), refused("42501"));
    administrator.batch_execute("CREATE POLICY all_rows ON dsync.lock USING (true)").unwrap();
    fenced().unwrap();
    scene.supersede();
    administrator.batch_execute("ALTER TABLE dsync.lock DISABLE ROW LEVEL SECURITY").unwrap();
    assert_eq!(fenced(), refused(OVER));
    let mut read_only = clerk.build_transaction().read_only(true).start().unwrap();
    assert_eq!(call(&mut read_only, &text), refused("25006"));
    drop(read_only);
    drop(clerk);
    administrator.batch_execute(&format!("DROP OWNED BY {role}; DROP ROLE {role}")).unwrap();
}

#[test]
fn a_text_that_no_term_has_given_is_refused() {
    let database = Database::fresh().unwrap();
    let mut scene = Scene::set(&database, 0);
    let good = text(&scene.term());
    let [kind, id, pair, token, pause] = good.split(':').collect::<Vec<_>>()[..] else { panic!("{good}") };
    let outcome = scene.writer.query_one("SELECT dsync.fence(NULL)", &[]);
    assert_eq!(outcome.unwrap_err().code().unwrap().code(), "22023");
    for bad in [
        "",
        "x",
        &format!("{good} "),
        &format!(" {good}"),
        &format!("{good}\n"),
        &format!("{kind}:{id}:{pair}:{token}"),
        &format!("{kind}:{id}:{pair}:{token}:0"),
        &format!("{kind}:{id}:{pair}:{token}:-1"),
        &format!("{kind}:{id}:x:{token}:{pause}"),
        &format!("{kind}:{}:{pair}:{token}:{pause}", &id[1..]),
        &format!("{kind}:{}:{pair}:{token}:{pause}", id.replace(|_: char| true, "G")),
        &format!("{kind}:{id}:{pair}::{pause}"),
        &format!("fence2:{id}:{pair}:{token}:{pause}"),
    ] {
        assert_eq!(call(&mut scene.writer, bad), refused("22023"), "{bad:?}");
    }
    let huge = format!("{kind}:{id}:{pair}:9999999999999999999:{pause}");
    assert_eq!(call(&mut scene.writer, &huge), refused("22003"));
    assert_eq!(call(&mut scene.writer, &format!("{kind}:{id}:{pair}:{token}:9999999999")), refused("22023"));
    call(&mut scene.writer, &good).unwrap();
}

/// A child that knows nothing of this library, and is given the term by its environment.
#[test]
fn a_child_process_writes_behind_the_fence_of_its_parent_s_term() {
    let database = Database::fresh().unwrap();
    let mut scene = Scene::set(&database, 0);
    scene.writer.batch_execute("CREATE TABLE story (line text)").unwrap();
    let fence = text(&scene.term());
    let psql = database.server().binaries().program("psql");
    let script = "\\set VERBOSITY verbose
        BEGIN; SELECT dsync.fence(:'fence'); INSERT INTO story VALUES ('by the child'); COMMIT;";
    let mut child_writes = || {
        let mut child = Command::new("sh")
            .args(["-c", r#""$PSQL" -q -v ON_ERROR_STOP=1 -v fence="$FENCE" "$URL""#])
            .envs([("PSQL", psql.as_os_str()), ("FENCE", fence.as_ref()), ("URL", database.url().as_ref())])
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        let lines = scene.writer.query_one("SELECT count(*) FROM story", &[]).unwrap();
        (output.status.success(), lines.get::<_, i64>(0), String::from_utf8(output.stderr).unwrap())
    };
    let (success, lines, told) = child_writes();
    assert!(success && lines == 1, "{told}");
    let mut operator = database.client().unwrap();
    operator.execute("UPDATE dsync.lock SET token = nextval('dsync.token')", &[]).unwrap();
    let (success, lines, told) = child_writes();
    assert!(!success && lines == 1 && told.contains("ZDF01: the term is over"), "{told}");
}

#[test]
fn a_term_that_no_database_knows_has_no_fence() {
    let database = Database::fresh().unwrap();
    let mut client = database.client().unwrap();
    let memory = MemoryManager::new();
    memory.start().unwrap();
    let guard = memory.lock("x").unwrap().acquire(soon()).unwrap();
    assert_eq!(guard.term().fence_text(), None);
    let error = guard.term().fence(&mut client.transaction().unwrap()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidConfig);
    assert!(error.to_string().contains("in memory"), "{error}");
    assert_eq!(kind(guard.term().is_current(&mut client)), ErrorKind::InvalidConfig);

    let manager = started(config(&database, 0));
    let tokenless = manager.lock_with("y", LockOptions::new().without_token()).unwrap();
    assert_eq!(tokenless.acquire(soon()).unwrap().term().fence_text(), None);
}
