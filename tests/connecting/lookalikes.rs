//! Servers that look like PostgreSQL, and what stands in front of servers: whatever does not keep locks apart is refused at the start, and a
//! genuine PostgreSQL is not.

use std::error::Error as _;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use dsync::{CatalogMode, Config, Error, ErrorKind, Once, PostgresManager, SyncManager, Verdict};
use support::pgpool::{self, PgPool};
use support::{Database, Replication, Server};

use crate::common::{PATIENCE, begin, hear, lock, soon, started};

fn config(url: &str) -> Config {
    Config::from_url(url).unwrap().release_timeout(PATIENCE)
}

/// That `start` refuses, and with what.
fn start_refused(config: Config, texts: &[&str]) {
    let manager = PostgresManager::new(config).unwrap();
    let error = begin(move || manager.start()).get().expect_err("the server refuses");
    let cause = error.source().and_then(|cause| cause.downcast_ref::<Error>()).expect("the cause is kept");
    assert_eq!(cause.kind(), ErrorKind::SessionRefused, "{error}");
    println!("{error}");
    for text in texts {
        assert!(error.to_string().contains(text), "{text:?} is missing: {error}");
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Servers whose functions are not PostgreSQL's
// ---------------------------------------------------------------------------------------------------------------------

/// A server whose own functions can be replaced, in each database by itself.
fn pliable() -> Server {
    Server::builder().setting("allow_system_table_mods", "on").start().unwrap()
}

fn replace(database: &Database<'_>, function: &str, returns: &str, body: &str) {
    let sql = format!(
        "CREATE OR REPLACE FUNCTION pg_catalog.{function} RETURNS {returns} LANGUAGE sql VOLATILE AS $$SELECT {body}$$"
    );
    database.client().unwrap().batch_execute(&sql).unwrap();
}

const TRIES: [&str; 5] = [
    "pg_try_advisory_lock(bigint)",
    "pg_try_advisory_lock_shared(bigint)",
    "pg_try_advisory_xact_lock(bigint)",
    "pg_try_advisory_xact_lock_shared(bigint)",
    "pg_try_advisory_lock(integer, integer)",
];

/// Each kind of lock by itself, as it is used.
#[test]
fn a_server_with_any_kind_of_lock_that_is_not_one_is_refused() {
    let server = pliable();
    let refused = |functions: &[&str], body: &str, texts: &[&str]| {
        println!("{functions:?} gives {body}");
        let database = server.database().unwrap();
        for function in functions {
            replace(&database, function, "boolean", body);
        }
        start_refused(config(&database.url()).catalog(CatalogMode::None), texts);
    };
    for function in TRIES {
        refused(&[function], "true", &["exclude nobody", "only looks like PostgreSQL"]);
        refused(
            &[function],
            "false",
            &["does not grant a lock that nobody has", "only looks like PostgreSQL"],
        );
    }
    refused(&TRIES, "true", &["exclude nobody"]);
    let alone = "pg_try_advisory_lock($1)";
    refused(&["pg_try_advisory_lock_shared(bigint)"], alone, &["does not let two sessions share a lock"]);
    for function in ["pg_advisory_unlock(bigint)", "pg_advisory_unlock_shared(bigint)"] {
        refused(&[function], "false", &["does not give back a lock that was held"]);
    }
    // Nothing was replaced.
    let database = server.database().unwrap();
    drop(started(config(&database.url()).catalog(CatalogMode::None)));
}

#[test]
fn a_refusal_says_what_the_server_is_if_that_is_known() {
    let server = pliable();
    let database = server.database().unwrap();
    replace(&database, "version()", "text", "'CockroachDB CCL v24.1.0 (x86_64-pc-linux-gnu)'");
    replace(&database, "pg_try_advisory_lock(bigint)", "boolean", "true");
    let advice = "CockroachDB has functions for advisory locks that do nothing";
    start_refused(config(&database.url()), &["exclude nobody", advice]);
    let report = config(&database.url()).check();
    let worst = report.lines.iter().find(|line| line.verdict == Verdict::Wrong).expect("it is refused");
    assert_eq!(worst.topic, "sessions", "{report}");
    assert!(worst.advice.as_deref().is_some_and(|text| text.contains(advice)), "{report}");
    assert!(report.to_string().contains("warning  server"), "{report}");
    // One that does not even take the first statement.
    replace(&database, "set_config(text, text, boolean)", "text", "(1 / 0)::text");
    start_refused(config(&database.url()), &["division by zero", advice]);
}

/// Each node keeps its locks by itself, and two sessions on one of them do exclude each other. So it is no refusal.
#[test]
fn a_node_of_several_is_told_by_the_report() {
    let server = pliable();
    let database = server.database().unwrap();
    let mut client = database.client().unwrap();
    let mut told = |sql: &str| {
        client.batch_execute(sql).unwrap();
        drop(started(config(&database.url()).catalog(CatalogMode::None)));
        let report = config(&database.url()).check();
        assert!(report.is_ok(), "{report}");
        let server = report.lines.into_iter().find(|line| line.topic == "server").unwrap();
        assert_eq!(server.advice.is_some(), server.verdict == Verdict::Warning);
        server.advice.unwrap_or_default()
    };
    // As each of them has one when it is loaded.
    let setting = |setting: &str| {
        format!(
            "ALTER DATABASE {name} RESET ALL; ALTER DATABASE {name} SET {setting} = 1",
            name = database.name()
        )
    };
    let extension = |name: &str| format!("UPDATE pg_extension SET extname = '{name}' WHERE oid = 99999");
    assert_eq!(told("INSERT INTO pg_extension VALUES (99999, 'x', 10, 11, false, '1', NULL, NULL)"), "");

    assert_eq!(told(&setting("citus.shard_count")), "", "it is loaded, and not used in this database");
    told("CREATE TABLE pg_catalog.pg_dist_local_group AS SELECT 0 AS groupid");
    assert_eq!(told(&extension("citus")), "", "it is the coordinator");
    assert!(told("UPDATE pg_catalog.pg_dist_local_group SET groupid = 3").contains("worker of Citus"));

    assert_eq!(told(&(extension("x") + "; " + &setting("spock.conflict_resolution"))), "");
    assert!(told(&extension("spock")).contains("a node of spock"));
    assert_eq!(told(&(extension("x") + "; " + &setting("bdr.ddl_replication"))), "");
    assert!(told(&extension("bdr")).contains("a node of BDR"));
}

// ---------------------------------------------------------------------------------------------------------------------
// Several servers behind one address
// ---------------------------------------------------------------------------------------------------------------------

/// Connects its clients to one of several servers, to each in turn. What the servers say goes through `seen`.
fn balancer(ports: Vec<u16>, seen: impl Fn(&[u8], &mut Messages) + Send + Sync + 'static) -> u16 {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let seen = Arc::new(seen);
    thread::spawn(move || {
        for (client, port) in listener.incoming().map_while(Result::ok).zip(ports.iter().cycle()) {
            let Ok(server) = TcpStream::connect(("127.0.0.1", *port)) else { continue };
            let _ = (client.set_nodelay(true), server.set_nodelay(true));
            let (mut from, mut to) = (client.try_clone().unwrap(), server.try_clone().unwrap());
            thread::spawn(move || {
                let _ = std::io::copy(&mut from, &mut to);
                let _ = to.shutdown(Shutdown::Both);
            });
            let (mut from, mut to, seen) = (server, client, Arc::clone(&seen));
            thread::spawn(move || {
                let (mut buffer, mut messages) = ([0; 8192], Messages::default());
                while let Ok(count @ 1..) = from.read(&mut buffer) {
                    seen(&buffer[..count], &mut messages);
                    if to.write_all(&buffer[..count]).is_err() {
                        break;
                    }
                }
                let _ = to.shutdown(Shutdown::Both);
            });
        }
    });
    port
}

/// The messages of one server session so far.
#[derive(Default)]
struct Messages {
    bytes: Vec<u8>,
}

impl Messages {
    /// How many of those that end with these bytes say that the server is ready for the next statement.
    fn ready(&mut self, bytes: &[u8]) -> usize {
        self.bytes.extend_from_slice(bytes);
        let mut count = 0;
        while let Some(length) = self.bytes.get(1..5) {
            let length = 1 + u32::from_be_bytes(length.try_into().unwrap()) as usize;
            if self.bytes.len() < length {
                break;
            }
            count += usize::from(self.bytes[0] == b'Z');
            self.bytes.drain(..length);
        }
        count
    }
}

/// As two primaries are that replicate each other, behind one name.
#[test]
fn two_servers_behind_one_address_are_refused() {
    let servers = [(); 2].map(|()| Server::start().unwrap());
    let port = balancer(servers.iter().map(Server::port).collect(), |_, _| {});
    let url = servers[0].url_at("127.0.0.1", port);
    start_refused(config(&url), &["exclude nobody", "two servers", "name one server"]);
    let report = config(&url).check();
    println!("{report}");
    assert!(!report.is_ok());
    let wrong = report.lines.last().unwrap();
    assert_eq!((wrong.topic, wrong.verdict), ("sessions", Verdict::Wrong));
    assert!(wrong.advice.as_deref().is_some_and(|advice| advice.contains("two servers")), "{report}");
}

/// The look at the server costs what it costs for the sake of slow links: a round trip is counted where the server is ready for the next.
#[test]
fn a_start_takes_no_more_round_trips_than_it_is_said_to() {
    let server = Server::start().unwrap();
    let count = Arc::new(AtomicUsize::new(0));
    let port = balancer(vec![server.port()], {
        let count = Arc::clone(&count);
        move |bytes, messages| {
            count.fetch_add(messages.ready(bytes), Ordering::SeqCst);
        }
    });
    let url = server.url_at("127.0.0.1", port) + "?sslmode=disable";
    let manager = started(config(&url).catalog(CatalogMode::None));
    // Two sessions that log in and are prepared, and six statements by which they are compared.
    assert_eq!(count.load(Ordering::SeqCst), 2 + 2 + 6);
    drop(manager);
}

/// Pgpool-II, whose standby lags behind for ever; `None` where there is none.
fn behind_pgpool(settings: &[(&str, &str)]) -> Option<(Server, Server, PgPool)> {
    if support::skip_without(pgpool::available()) {
        return None;
    }
    let primary = Server::start().unwrap();
    let standby = primary.standby(Replication::Asynchronous).unwrap();
    // It has the catalog, and not what comes into it from now on.
    primary.client().unwrap().batch_execute(dsync::CATALOG_SQL).unwrap();
    standby.wait_caught_up(&primary).unwrap();
    standby.client().unwrap().batch_execute("SELECT pg_wal_replay_pause()").unwrap();
    let pool = pgpool::start_with(&primary, &standby, settings).unwrap();
    Some((primary, standby, pool))
}

/// It sends to the standby what it takes for reading, statement by statement.
#[test]
fn behind_a_load_balancer_all_that_counts_is_read_from_the_primary() {
    const DAY: Duration = Duration::from_secs(24 * 60 * 60);
    let Some((primary, _standby, pool)) = behind_pgpool(&[]) else { return };
    let manager = started(config(&pool.url("postgres")));
    let x = lock(&manager, "x");
    x.lock(&soon()).unwrap();
    assert_eq!(manager.inspect("x").unwrap().holder.unwrap().token, x.term().unwrap().token());
    assert_eq!(manager.inspect_all().unwrap().len(), 1);
    let once = || manager.once("report", DAY, Duration::ZERO, |_| Ok::<_, Error>(())).unwrap();
    assert!(matches!(once(), Once::Ran(())));
    assert!(matches!(once(), Once::NotDue { .. }), "the standby knows nothing of it");
    assert!(manager.last_success("report").unwrap().is_some());
    let (term, holder) = (x.lost(), manager.inspect("x").unwrap().holder.unwrap());
    primary.terminate(holder.pid).unwrap();
    hear(&term);
    x.lock(&soon()).unwrap();
    assert!(x.term().unwrap().token() > holder.token);
    x.release().unwrap();
    let log = pool.log();
    let statements =
        log.lines().filter_map(|line| line.split_once("DB node id: ")?.1.split_once("statement: "));
    let of_ours = statements.filter(|(_, statement)| statement.contains("dsync."));
    let (primarys, standbys): (Vec<_>, Vec<_>) = of_ours.partition(|(node, _)| node.starts_with('0'));
    assert!(primarys.len() > 10 && standbys.is_empty(), "{standbys:?}");
    // It would have sent them there.
    let mut client = postgres::Client::connect(&pool.url("postgres"), postgres::NoTls).unwrap();
    let read = client.simple_query("SELECT count(*) FROM dsync.success").unwrap();
    let read = read.iter().find_map(|message| match message {
        postgres::SimpleQueryMessage::Row(row) => row.get(0),
        _ => None,
    });
    assert_eq!(read, Some("0"), "Pgpool-II has read from the standby");
    let known: i64 =
        primary.client().unwrap().query_one("SELECT count(*) FROM dsync.success", &[]).unwrap().get(0);
    assert_eq!(known, 1);
    let report = manager.check();
    assert!(report.is_ok(), "{report}");
}

/// With a list of its own of what writes, it takes locks for reading.
#[test]
fn a_load_balancer_that_takes_locks_for_reading_is_refused() {
    let Some((_primary, _standby, pool)) = behind_pgpool(&[("write_function_list", "'nextval,setval'")])
    else {
        return;
    };
    start_refused(config(&pool.url("postgres")), &["hot standby", "Pgpool-II", "write_function_list"]);
    let report = config(&pool.url("postgres")).check();
    assert!(!report.is_ok() && report.to_string().contains("write_function_list"), "{report}");
}

// ---------------------------------------------------------------------------------------------------------------------
// What is genuine
// ---------------------------------------------------------------------------------------------------------------------

fn start_again_and_again(times: usize) {
    let database = Database::fresh().unwrap();
    for _ in 0..times {
        let manager = started(config(&database.url()).catalog(CatalogMode::None));
        manager.stop().unwrap();
    }
    let left = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' \
                AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";
    assert_eq!(database.client().unwrap().query_one(left, &[]).unwrap().get::<_, i64>(0), 0);
}

#[test]
fn a_genuine_server_is_never_refused() {
    start_again_and_again(50);
}

/// As the test before, for longer.
#[test]
#[ignore = "takes half a minute"]
fn a_genuine_server_is_never_refused_in_a_thousand_starts() {
    start_again_and_again(1_000);
}
