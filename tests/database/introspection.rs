//! What the manager and the views tell of who holds and who waits.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use dsync::{CatalogMode, Config, ErrorKind, Key, Lock, LockOptions, LockView, PostgresManager, SyncManager};
use postgres::Client;
use support::process::Signal;
use support::{Database, Server};

use crate::common::{self, Lateness, PATIENCE, Process, eventually, kind, lock, number_of, soon, started};

fn config(database: &Database<'_>) -> Config {
    Config::from_url(&database.url()).unwrap().release_timeout(PATIENCE)
}

/// Begins to wait for the lock, and has its place in the queue when this returns.
fn queue(manager: &PostgresManager, key: &str) -> Arc<dyn Lock> {
    let before = manager.inspect(key).unwrap().waiters.len();
    let lock = lock(manager, key);
    assert_eq!(kind(lock.try_lock(&soon())), ErrorKind::LockUnavailable);
    eventually("a place in the queue", || manager.inspect(key).unwrap().waiters.len() == before + 1);
    lock
}

fn is_free(view: &LockView) -> bool {
    view.holder.is_none() && view.waiters.is_empty()
}

/// Number of rows of a view.
fn rows(client: &mut Client, view: &str) -> usize {
    client.query(&format!("SELECT FROM dsync.{view}"), &[]).unwrap().len()
}

#[test]
fn a_lock_s_holder_and_its_waiters_in_order_can_be_seen() {
    let database = Database::fresh().unwrap();
    // Its slices are longer than the test, so that nobody changes places.
    let config = config(&database).wait_slice(Duration::from_secs(60));
    let manager = started(config.clone());
    let free = manager.inspect("x").unwrap();
    assert_eq!((free.namespace.as_str(), free.key.as_str()), ("dsync", "x"));
    assert!(is_free(&free) && manager.inspect_all().unwrap().is_empty());

    let before = SystemTime::now() - Duration::from_secs(1);
    let options = LockOptions::new().valuer(Arc::new(|| b"the note".to_vec()));
    let held = manager.lock_with("x", options).unwrap();
    held.lock(&soon()).unwrap();
    let managers = [(); 3].map(|()| started(config.clone()));
    let waiting: Vec<_> = managers
        .iter()
        .map(|manager| {
            let waiting = queue(manager, "x");
            thread::sleep(Duration::from_millis(20));
            waiting
        })
        .collect();

    let view = manager.inspect("x").unwrap();
    let holder = view.holder.clone().unwrap();
    assert_eq!(holder.annotation.as_deref(), Some(&b"the note"[..]));
    assert_eq!(holder.token, held.term().unwrap().token());
    assert_eq!(holder.client_addr, Some("127.0.0.1".parse().unwrap()));
    assert_eq!(holder.application_name.as_deref(), Some("dsync x"));
    assert!((before..=SystemTime::now() + Duration::from_secs(1)).contains(&holder.since.unwrap()));
    assert_eq!(view.waiters.len(), 3);
    assert!(view.waiters.is_sorted_by(|one, next| one.waiting_for > next.waiting_for), "{view:#?}");
    assert!(view.waiters[0].waiting_for > Duration::from_millis(40));
    assert!(view.waiters.iter().all(|waiter| waiter.application_name.as_deref() == Some("dsync x")));
    let all = manager.inspect_all().unwrap();
    assert_eq!(all.len(), 1);
    assert_eq!(all[0].holder, view.holder);

    // The views say the same.
    let mut client = database.client().unwrap();
    let row =
        client.query_one("SELECT pid, token, annotation, namespace, key FROM dsync.locks", &[]).unwrap();
    assert_eq!((row.get(0), row.get(1)), (holder.pid, holder.token.unwrap()));
    let queue = client.query("SELECT pid, place FROM dsync.waiters ORDER BY place", &[]).unwrap();
    let places: Vec<(i32, i64)> = queue.iter().map(|row| (row.get(0), row.get(1))).collect();
    let wanted: Vec<_> = view.waiters.iter().zip(1..).map(|(waiter, place)| (waiter.pid, place)).collect();
    assert_eq!(places, wanted);

    // The order is that in which they get it.
    held.release().unwrap();
    for (lock, waiter) in waiting.iter().zip(&view.waiters) {
        eventually("the next one's turn", || lock.term().is_some());
        assert_eq!(manager.inspect("x").unwrap().holder.unwrap().pid, waiter.pid);
        lock.release().unwrap();
    }
    assert!(is_free(&manager.inspect("x").unwrap()) && manager.inspect_all().unwrap().is_empty());
    assert_eq!((rows(&mut client, "locks"), rows(&mut client, "waiters")), (0, 0));
}

/// A manager that claims with all its sessions has none to ask with.
#[test]
fn asking_needs_a_session_and_a_manager_that_runs() {
    let database = Database::fresh().unwrap();
    let manager = PostgresManager::new(config(&database).max_sessions(1)).unwrap();
    assert!(is_free(&manager.inspect("x").unwrap()), "who takes no lock need not start");
    manager.start().unwrap();
    assert_eq!(kind(manager.inspect("")), ErrorKind::InvalidKey);
    let lock = lock(&manager, "x");
    lock.lock(&soon()).unwrap();
    assert_eq!(kind(manager.inspect("x")), ErrorKind::PoolExhausted);
    lock.release().unwrap();
    assert!(is_free(&manager.inspect("x").unwrap()));
    manager.stop().unwrap();
    assert_eq!(kind(manager.inspect("x")), ErrorKind::SyncManagerStopped);
    assert_eq!(kind(manager.inspect_all()), ErrorKind::SyncManagerStopped);
}

#[test]
fn asking_a_server_that_stands_still_ends() {
    let server = support::Server::start().unwrap();
    let database = server.database().unwrap();
    let quick = config(&database).lease(Duration::from_secs(2)).connect_timeout(Duration::from_secs(1));
    let manager = started(quick);
    manager.inspect("x").unwrap();
    let frozen = server.freeze().unwrap();
    let (late, begun) = (Lateness::watch(), Instant::now());
    assert_eq!(kind(manager.inspect("x")), ErrorKind::SessionUnavailable);
    late.allow(begun.elapsed(), Duration::from_secs(5));
    frozen.thaw();
    eventually("an answer", || manager.inspect("x").is_ok());
}

#[test]
fn numbers_and_pairs_are_found_whatever_their_signs() {
    let database = Database::fresh().unwrap();
    let manager = started(config(&database));
    let keys = [
        Key::from(i64::MIN),
        Key::from(-1),
        Key::from(0),
        Key::from(i64::MAX),
        Key::from((0, 0)),
        Key::from((-1, -1)),
        Key::from((i32::MIN, i32::MAX)),
        Key::from((1, -2)),
    ];
    let locks = keys.clone().map(|key| manager.lock(key).unwrap());
    for lock in &locks {
        lock.lock(&soon()).unwrap();
    }
    for (key, lock) in keys.iter().zip(&locks) {
        let view = manager.inspect(key.clone()).unwrap();
        assert_eq!((view.namespace.as_str(), view.key), ("", key.to_string()));
        assert_eq!(view.holder.unwrap().token, lock.term().unwrap().token(), "{key}");
    }
    assert_eq!(manager.inspect_all().unwrap().len(), keys.len());
    assert_eq!(rows(&mut database.client().unwrap(), "locks"), keys.len());
}

#[test]
fn databases_of_one_server_and_namespaces_of_one_database_are_apart() {
    let databases = [(); 2].map(|()| Database::fresh().unwrap());
    let managers = databases.each_ref().map(|database| started(config(database)));
    let elsewhere = started(config(&databases[0]).namespace("elsewhere"));
    let locks = [&managers[0], &managers[1], &elsewhere].map(|manager| lock(manager, "x"));
    for lock in &locks {
        lock.try_lock(&soon()).unwrap();
    }
    assert_eq!(managers[1].inspect_all().unwrap().len(), 1);
    let all = managers[0].inspect_all().unwrap();
    let namespaces: Vec<_> = all.iter().map(|view| view.namespace.as_str()).collect();
    assert_eq!(namespaces, ["dsync", "elsewhere"]);
    locks[0].release().unwrap();
    assert!(is_free(&managers[0].inspect("x").unwrap()), "what the other database holds is not shown");
    assert_eq!(rows(&mut databases[0].client().unwrap(), "locks"), 1);
}

#[test]
fn a_row_that_was_left_behind_is_never_shown_as_held() {
    let database = Database::fresh().unwrap();
    let manager = started(config(&database));
    let [mut client, mut other] = [(); 2].map(|()| database.client().unwrap());
    let x = lock(&manager, "x");
    x.lock(&soon()).unwrap();
    let id: i64 = client.query_one("SELECT id FROM dsync.locks", &[]).unwrap().get(0);
    x.release().unwrap();
    assert_eq!(client.query("SELECT FROM dsync.lock", &[]).unwrap().len(), 1, "the row is there still");
    assert!(is_free(&manager.inspect("x").unwrap()));
    assert_eq!(rows(&mut client, "locks"), 0);

    // Somebody else has the lock, without the library.
    let pid: i32 =
        other.query_one("SELECT pg_backend_pid() FROM pg_advisory_lock($1)", &[&id]).unwrap().get(0);
    // By a chance in the numbers of processes, the row even names its backend.
    for row_names_it in [false, true] {
        if row_names_it {
            let query = "UPDATE dsync.lock SET pid = $1, since = now() - interval '1 hour'";
            client.execute(query, &[&pid]).unwrap();
        }
        for view in [manager.inspect("x").unwrap(), manager.inspect_all().unwrap().remove(0)] {
            let holder = view.holder.unwrap();
            assert_eq!((holder.pid, holder.token, holder.annotation, holder.since), (pid, None, None, None));
        }
        let row = client.query_one("SELECT pid, token, since::text FROM dsync.locks", &[]).unwrap();
        assert_eq!((row.get::<_, i32>(0), row.get::<_, Option<i64>>(1)), (pid, None));
        assert_eq!(row.get::<_, Option<String>>(2), None);
    }
}

#[test]
fn without_a_catalog_a_key_can_still_be_asked_for() {
    let database = Database::fresh().unwrap();
    let [first, second] = [(); 2].map(|()| started(config(&database).catalog(CatalogMode::None)));
    let x = lock(&first, "x");
    x.lock(&soon()).unwrap();
    let _waiting = queue(&second, "x");
    let view = first.inspect("x").unwrap();
    assert_eq!(view.holder.as_ref().unwrap().token, None);
    assert_eq!(view.holder.unwrap().application_name.as_deref(), Some("dsync x"));
    assert_eq!(view.waiters.len(), 1);
    assert_eq!(kind(first.inspect_all()), ErrorKind::InvalidConfig);
    // A manager with a catalog sees the holder, whose name it cannot know.
    let with = started(config(&database));
    assert!(with.inspect("x").unwrap().holder.is_some());
    assert!(with.inspect_all().unwrap().is_empty());
}

/// `pg_stat_activity` names the key while a session serves it, and not afterwards.
#[test]
fn sessions_bear_the_name_of_the_key_that_they_serve() {
    let database = Database::fresh().unwrap();
    let mut client = database.client().unwrap();
    let mut names = || -> Vec<String> {
        let query = "SELECT application_name FROM pg_stat_activity WHERE datname = current_database()
                     AND pid <> pg_backend_pid() AND backend_type = 'client backend' ORDER BY 1";
        client.query(query, &[]).unwrap().iter().map(|row| row.get(0)).collect()
    };
    let manager = started(config(&database));
    let short = lock(&manager, "x");
    short.lock(&soon()).unwrap();
    common::becomes("the names", &vec!["dsync x".to_owned()], &mut names);
    short.release().unwrap();
    common::becomes("the names", &vec!["dsync".to_owned()], &mut names);
    let long = lock(&manager, &"y".repeat(1000));
    long.lock(&soon()).unwrap();
    common::becomes("the names", &vec![format!("dsync {}", "y".repeat(57))], &mut names);
    let other = started(config(&database));
    let waiting = lock(&other, &"y".repeat(1000));
    assert_eq!(kind(waiting.try_lock(&soon())), ErrorKind::LockUnavailable);
    waiting.release().unwrap();
    common::becomes("the names", &vec!["dsync".to_owned(), format!("dsync {}", "y".repeat(57))], names);

    let url = format!("{}?application_name=billing", database.url());
    let named = started(Config::from_url(&url).unwrap());
    let lock = lock(&named, "z");
    lock.lock(&soon()).unwrap();
    assert_eq!(named.inspect("z").unwrap().holder.unwrap().application_name.as_deref(), Some("billing z"));
}

/// A role that may look at the views and no more.
#[test]
fn a_role_that_only_looks_sees_what_it_may() {
    let database = Database::fresh().unwrap();
    let manager = started(config(&database));
    let x = lock(&manager, "x");
    x.lock(&soon()).unwrap();
    let mut administrator = database.client().unwrap();
    administrator.batch_execute("CREATE ROLE visitor LOGIN").unwrap();
    let url = database.url().replace("postgres@", "visitor@");
    let mut visitor = Client::connect(&url, postgres::NoTls).unwrap();
    assert!(visitor.batch_execute("SELECT FROM dsync.locks").is_err());
    let error = PostgresManager::new(Config::from_url(&url).unwrap()).unwrap().start().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::FailedInitialization);
    assert!(error.to_string().contains("dsync::CATALOG_SQL"), "{error}");

    administrator
        .batch_execute(
            "GRANT USAGE ON SCHEMA dsync TO visitor; GRANT SELECT ON dsync.locks, dsync.waiters TO visitor",
        )
        .unwrap();
    let query = "SELECT key, token, application_name, client_addr, role FROM dsync.locks";
    let look = |visitor: &mut Client| {
        let row = visitor.query_one(query, &[]).unwrap();
        assert_eq!((row.get(0), row.get(1)), ("x".to_owned(), x.term().unwrap().token()));
        assert_eq!((row.get(2), row.get(4)), ("dsync x".to_owned(), "postgres".to_owned()));
        row.get::<_, Option<std::net::IpAddr>>(3)
    };
    assert_eq!(look(&mut visitor), None);
    administrator.batch_execute("GRANT pg_read_all_stats TO visitor").unwrap();
    assert!(look(&mut visitor).is_some());
    assert_eq!(visitor.query("SELECT FROM dsync.waiters", &[]).unwrap().len(), 0);
    assert!(visitor.batch_execute("SELECT FROM dsync.lock").is_err(), "the table itself is not for it");
    drop(visitor);
    administrator.batch_execute("DROP OWNED BY visitor; DROP ROLE visitor").unwrap();
}

// ---------------------------------------------------------------------------------------------------------------------
// Under load
// ---------------------------------------------------------------------------------------------------------------------

const KEYS: usize = 5;
const THREADS: usize = 12;

/// The load is frozen in the midst of it, again and again: then nothing moves, and all the ways to look must agree.
#[test]
fn what_is_told_agrees_with_the_server_s_own_list_of_locks() {
    let database = Database::fresh().unwrap();
    let manager = started(config(&database));
    let child = Process::start(&mut common::process("introspection::worker", &database.url()));
    child.says("loading");
    let mut client = database.client().unwrap();
    let (mut looks, mut held, mut waited, mut unwritten) = (0, 0, 0, 0);
    let begun = Instant::now();
    // On a busy machine the load is sometimes frozen before it has done anything.
    while looks < 30 || held <= 30 || waited <= 30 {
        assert!(begun.elapsed() < 4 * PATIENCE, "there was a load: {held} {waited} in {looks} looks");
        looks += 1;
        thread::sleep(Duration::from_millis(30));
        support::process::signal(child.id(), Signal::Stop).unwrap();
        // What the load had sent may still be on its way. A look counts if nothing has moved before it was over.
        let (mut server, mut told, frozen) = (Picture::default(), Told::default(), Instant::now());
        eventually("the server to settle", || {
            let before = Picture::take(&mut client);
            told = Told::ask(&manager, &mut client);
            server = Picture::take(&mut client);
            let is_still = server.busy.is_empty() && before == server;
            if !is_still && frozen.elapsed() > PATIENCE / 2 {
                println!("same: {}, busy: {:?}", before == server, server.busy);
            }
            is_still
        });
        let Picture { locks, waiters, .. } = server;
        let holders = |views: &[LockView]| -> Sessions {
            let pid = |view: &LockView| Some((view.key.clone(), view.holder.as_ref()?.pid));
            views.iter().filter_map(pid).collect()
        };
        let queues = |views: &[LockView]| -> Sessions {
            let pids = |view: &LockView| {
                view.waiters.iter().map(|waiter| (view.key.clone(), waiter.pid)).collect::<Vec<_>>()
            };
            views.iter().flat_map(pids).collect()
        };
        assert_eq!((holders(&told.all), queues(&told.all)), (locks.clone(), waiters.clone()), "inspect_all");
        assert_eq!((holders(&told.each), queues(&told.each)), (locks.clone(), waiters.clone()), "inspect");
        assert_eq!((told.locks, told.waiters), (locks.clone(), waiters.clone()), "the views");
        // A session that was granted the lock in the last moment of a slice writes its row with the next statement, for which the
        // load has to be thawed.
        unwritten += told
            .all
            .iter()
            .filter(|view| view.holder.as_ref().is_some_and(|holder| holder.token.is_none()))
            .count();
        held += locks.len();
        waited += waiters.len();
        support::process::signal(child.id(), Signal::Continue).unwrap();
    }
    println!("{looks} looks saw {held} holders and {waited} waiters, {unwritten} holders without their row");
    assert!(unwritten * 10 < held, "{unwritten} of {held} holders have no row");
    child.kill();
}

type Sessions = Vec<(String, i32)>;

/// What the library tells.
#[derive(Default)]
struct Told {
    all: Vec<LockView>,
    each: Vec<LockView>,
    locks: Sessions,
    waiters: Sessions,
}

impl Told {
    fn ask(manager: &PostgresManager, client: &mut Client) -> Self {
        let mut view = |query: &str| -> Sessions {
            client.query(query, &[]).unwrap().iter().map(|row| (row.get(0), row.get(1))).collect()
        };
        Self {
            locks: view("SELECT key, pid FROM dsync.locks ORDER BY key"),
            waiters: view("SELECT key, pid FROM dsync.waiters ORDER BY key, place"),
            all: manager.inspect_all().unwrap(),
            each: (1..=KEYS).map(|n| manager.inspect(format!("key {n}")).unwrap()).collect(),
        }
    }
}

/// What the server says by itself.
#[derive(Default, PartialEq)]
struct Picture {
    locks: Sessions,
    waiters: Sessions,
    rows: Vec<(String, i64)>,
    /// The sessions that are at work, but for those that wait in vain, or for the rest of what a frozen client was sending.
    busy: Vec<String>,
}

impl Picture {
    fn take(client: &mut Client) -> Self {
        // The names are those of the keys, of which the documented rule makes the numbers.
        let locks = format!(
            "SELECT key, pid, granted
             FROM (SELECT 'key ' || n AS key, {number} AS id FROM generate_series(1, {KEYS}) AS n) AS names
             JOIN pg_locks ON locktype = 'advisory' AND objsubid = 1 AND classid::int8 << 32 | objid::int8 = id
              AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
             ORDER BY key, waitstart, pid",
            number = number_of("'key ' || n")
        );
        let busy = "SELECT format('%s %s %s: %s', application_name, wait_event_type, wait_event, query)
                    FROM pg_stat_activity AS session
                    WHERE datname = current_database() AND state = 'active' AND pid <> pg_backend_pid()
                    AND backend_type = 'client backend' AND wait_event IS DISTINCT FROM 'ClientRead'
                    AND NOT EXISTS (SELECT FROM pg_locks WHERE NOT granted AND pg_locks.pid = session.pid)";
        let mut picture = Self::default();
        for row in client.query(&locks, &[]).unwrap() {
            let list = if row.get(2) { &mut picture.locks } else { &mut picture.waiters };
            list.push((row.get(0), row.get(1)));
        }
        let rows = client.query("SELECT key, token FROM dsync.lock ORDER BY key", &[]).unwrap();
        picture.rows = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
        picture.busy = client.query(busy, &[]).unwrap().iter().map(|row| row.get(0)).collect();
        picture
    }
}

/// Not a test: the body of the process that puts a load on the server.
#[test]
#[ignore = "the body of a process, which another test starts"]
fn worker() {
    let Some(url) = common::role() else { return };
    let config = Config::from_url(&url).unwrap().lease(PATIENCE).wait_slice(PATIENCE);
    println!("loading");
    thread::scope(|scope| {
        for number in 0..THREADS {
            let config = config.clone();
            scope.spawn(move || {
                let manager = started(config);
                let mut random = fastrand::Rng::with_seed(number as u64);
                loop {
                    let lock = lock(&manager, &format!("key {}", random.usize(1..=KEYS)));
                    let guard = lock.acquire(soon()).unwrap();
                    thread::sleep(Duration::from_micros(random.u64(0..5000)));
                    drop(guard);
                }
            });
        }
    });
}

/// While all moves, what is shown of a term must have been true of that term.
#[test]
fn what_is_told_in_the_midst_of_a_load_is_of_one_term() {
    let database = Database::fresh().unwrap();
    let manager = started(config(&database));
    let terms = Mutex::new(BTreeMap::new());
    let over = AtomicBool::new(false);
    let told = thread::scope(|scope| {
        for number in 0..6 {
            let (database, terms, over) = (&database, &terms, &over);
            scope.spawn(move || {
                let manager = started(config(database));
                let mut round = 0;
                while !over.load(Ordering::SeqCst) {
                    round += 1;
                    let note = format!("{number}:{round}").into_bytes();
                    let (copy, key) = (note.clone(), format!("key {}", (number + round) % 3));
                    let options = LockOptions::new().valuer(Arc::new(move || copy.clone()));
                    let guard = manager.lock_with(key.as_str(), options).unwrap().acquire(soon()).unwrap();
                    terms.lock().unwrap().insert(guard.term().token().unwrap(), (key, note));
                    drop(guard);
                }
            });
        }
        let mut told = Vec::new();
        let mut newest = BTreeMap::new();
        while told.len() < 300 {
            for view in manager.inspect_all().unwrap() {
                let Some(holder) = view.holder else { continue };
                let Some(token) = holder.token else { continue };
                let before = newest.insert(view.key.clone(), token);
                assert!(before <= Some(token), "a former term is told of after a later one");
                told.push((token, (view.key, holder.annotation.unwrap())));
            }
        }
        over.store(true, Ordering::SeqCst);
        told
    });
    let terms = terms.into_inner().unwrap();
    for (token, told) in told {
        assert_eq!(terms.get(&token), Some(&told), "token {token}");
    }
}

#[test]
fn a_lock_is_broken_by_who_may_end_the_holder_s_session() {
    let database = Database::fresh().unwrap();
    let mut administrator = database.client().unwrap();
    let [holder, operator] = ["holder", "operator"].map(|name| format!("{name}_{}", database.name()));
    administrator
        .batch_execute(&format!("CREATE ROLE {holder} LOGIN; CREATE ROLE {operator} LOGIN; GRANT CREATE ON DATABASE {} TO {holder}", database.name()))
        .unwrap();
    let manager = |role: &str| {
        let url = database.url().replace("postgres@", &format!("{role}@"));
        started(Config::from_url(&url).unwrap().catalog(CatalogMode::None))
    };
    let (ours, theirs) = (manager(&holder), manager(&operator));
    let guard = lock(&ours, "x").acquire(PATIENCE).unwrap();
    let refusal = theirs.break_lock("x").unwrap_err();
    assert_eq!(refusal.kind(), ErrorKind::SessionRefused);
    assert!(refusal.to_string().contains("pg_signal_backend"), "{refusal}");
    assert!(guard.is_held());
    administrator.batch_execute(&format!("GRANT pg_signal_backend TO {operator}")).unwrap();
    let ended = theirs.break_lock("x").unwrap().unwrap();
    assert!(guard.lost().wait_timeout(PATIENCE));
    assert!(theirs.inspect("x").unwrap().holder.is_none());
    let alive = "SELECT FROM pg_stat_activity WHERE pid = $1";
    assert!(administrator.query(alive, &[&ended.pid]).unwrap().is_empty());

    // A superuser's.
    let lock_by_hand = "SELECT pg_advisory_lock(4711)";
    administrator.execute(lock_by_hand, &[]).unwrap();
    let refusal = theirs.break_lock(4711).unwrap_err();
    assert!(
        refusal.kind() == ErrorKind::SessionRefused && refusal.to_string().contains("superuser"),
        "{refusal}"
    );
    // An application's own session, which nothing but its number tells of.
    administrator.execute("SELECT pg_advisory_unlock(4711)", &[]).unwrap();
    let mut application =
        Client::connect(&database.url().replace("postgres@", &format!("{holder}@")), postgres::NoTls)
            .unwrap();
    application.execute(lock_by_hand, &[]).unwrap();
    let ended = theirs.break_lock(4711).unwrap().unwrap();
    assert_eq!(ended.token, None);
    assert!(application.simple_query("SELECT 1").is_err());
    administrator
        .batch_execute(&format!("REVOKE ALL ON DATABASE {} FROM {holder}", database.name()))
        .unwrap();
}

#[test]
fn a_holder_that_does_not_end_when_it_is_told_to_is_told_of() {
    let database = Database::fresh().unwrap();
    let ours = started(config(&database));
    let mut administrator = database.client().unwrap();
    administrator.execute("SELECT pg_advisory_lock(4711)", &[]).unwrap();
    let pid: i32 = administrator.query_one("SELECT pg_backend_pid()", &[]).unwrap().get(0);
    support::process::signal(pid, Signal::Stop).unwrap();
    let outcome = ours.break_lock(4711);
    support::process::signal(pid, Signal::Continue).unwrap();
    let error = outcome.unwrap_err();
    assert!(error.kind() == ErrorKind::TimedOut && error.to_string().contains(&pid.to_string()), "{error}");
    eventually("the end of the session", || ours.inspect(4711).unwrap().holder.is_none());
}

#[test]
fn a_lock_of_a_prepared_transaction_can_be_seen_and_not_broken() {
    let server = Server::builder().setting("max_prepared_transactions", "2").start().unwrap();
    let manager = started(Config::from_url(&server.url()).unwrap());
    // So that the key has a row in the catalog.
    lock(&manager, "x").acquire(PATIENCE).unwrap().release().unwrap();
    let mut client = server.client().unwrap();
    let mut transaction = client.transaction().unwrap();
    manager.transaction_lock("x").unwrap().acquire(&mut transaction, PATIENCE).unwrap();
    transaction.batch_execute("PREPARE TRANSACTION 'x'").unwrap();
    drop(transaction);
    assert_eq!(manager.inspect("x").unwrap().holder.unwrap().pid, 0);
    assert_eq!(manager.inspect_all().unwrap()[0].holder.as_ref().unwrap().pid, 0);
    let error = manager.break_lock("x").unwrap_err();
    assert!(
        error.kind() == ErrorKind::SessionRefused && error.to_string().contains("ROLLBACK PREPARED"),
        "{error}"
    );
    client.batch_execute("ROLLBACK PREPARED 'x'").unwrap();
    assert!(manager.inspect("x").unwrap().holder.is_none());
}

/// A statement whose answer is lost may have been run. The trap counts how often it is, also where the transaction fails.
#[test]
fn what_must_not_be_done_twice_is_asked_once_and_the_error_says_that_nobody_knows() {
    let database = Database::fresh().unwrap();
    let (manager, holder) = (started(config(&database)), started(config(&database)));
    let held = lock(&holder, "x").acquire(soon()).unwrap();
    let semaphore = manager.semaphore("s", 2).unwrap();
    let x = lock(&manager, "x");
    semaphore.set_permits(3).unwrap();
    let mut client = database.client().unwrap();
    client
        .batch_execute(
            "INSERT INTO dsync.success (namespace, key, started) VALUES ('dsync', 'x', now());
             CREATE SEQUENCE public.runs;
             CREATE FUNCTION public.trap() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                 PERFORM nextval('public.runs'); PERFORM pg_terminate_backend(pg_backend_pid()); PERFORM pg_sleep(60);
             END $$",
        )
        .unwrap();
    type Ask<'a> = &'a dyn Fn() -> dsync::Result<()>;
    let asks: [(&str, Ask<'_>); 3] = [
        ("semaphore", &|| semaphore.set_permits(4).map(drop)),
        ("success", &|| x.forget_success().map(drop)),
        ("resignation", &|| x.request_resignation().map(drop)),
    ];
    for (table, ask) in asks {
        // A session that has rested is the one that might have died before.
        x.last_success().unwrap();
        client
            .batch_execute(&format!(
                "ALTER SEQUENCE public.runs RESTART;
                 CREATE TRIGGER trap BEFORE INSERT OR UPDATE OR DELETE ON dsync.{table} FOR EACH ROW EXECUTE FUNCTION public.trap()"
            ))
            .unwrap();
        let error = ask().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::SessionUnavailable, "{table}: {error}");
        let text = error.to_string();
        assert!(
            text.contains("terminated") && text.contains("it is not known whether it was done"),
            "{text}"
        );
        let runs: i64 = client.query_one("SELECT nextval('public.runs') - 1", &[]).unwrap().get(0);
        assert_eq!(runs, 1, "{table}");
        client.batch_execute(&format!("DROP TRIGGER trap ON dsync.{table}")).unwrap();
    }
    held.release().unwrap();
}
