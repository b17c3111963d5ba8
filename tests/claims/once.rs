//! Work that is done once a period, by processes with clocks of their own, that die in the midst of it; `contract.rs` has what both
//! implementations promise.

use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, SystemTime};

use dsync::{CatalogMode, Config, Error, ErrorKind, Once, PostgresManager, Run};
use postgres::{Client, NoTls};
use support::process::{Signal, signal};
use support::{Database, Server};

use crate::common::{PATIENCE, Process, eventually, kind, make_catalog, process, role, started};

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

fn config(database: &Database<'_>) -> Config {
    Config::from_url(&database.url()).unwrap()
}

/// Where the work leaves a line each time that it is done.
fn story(database: &Database<'_>) -> Client {
    let mut client = database.client().unwrap();
    client.batch_execute("CREATE TABLE story (line text)").unwrap();
    client
}

fn lines(client: &mut Client) -> i64 {
    client.query_one("SELECT count(*) FROM story", &[]).unwrap().get(0)
}

fn writes(client: &mut Client) -> Result<(), Error> {
    client.batch_execute("INSERT INTO story VALUES ('done')").unwrap();
    Ok(())
}

fn unreachable(_: &Run<'_>) -> Result<(), Error> {
    unreachable!("it is not due")
}

/// Not a test: the body of the processes that other tests start.
#[test]
#[ignore = "the body of a process, which another test starts"]
fn worker() {
    let Some(role) = role() else { return };
    let words: Vec<_> = role.split(' ').collect();
    let [what, url] = words[..] else { panic!("{role}") };
    env_logger::Builder::new().filter_level(log::LevelFilter::Warn).init();
    let manager = started(Config::from_url(url).unwrap());
    let mut client = Client::connect(url, NoTls).unwrap();
    match what {
        "each-time" => {
            let clock = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
            println!("clock {}", clock.as_secs());
            for line in std::io::stdin().lines() {
                line.unwrap();
                let outcome = manager.once("report", DAY, Duration::ZERO, |_| writes(&mut client)).unwrap();
                println!("outcome {outcome:?}");
            }
        }
        "dies-at-work" => {
            let work = |_: &Run<'_>| -> Result<(), Error> {
                writes(&mut client)?;
                println!("in the midst");
                thread::sleep(PATIENCE);
                Ok(())
            };
            manager.once("report", DAY, Duration::ZERO, work).map(drop).unwrap();
        }
        "dies-before-commit" | "dies-after-commit" => {
            let work = |run: &Run<'_>| -> Result<(), Error> {
                let mut transaction = client.transaction().unwrap();
                run.record(&mut transaction)?;
                transaction.batch_execute("INSERT INTO story VALUES ('done')").unwrap();
                if what == "dies-after-commit" {
                    transaction.commit().unwrap();
                }
                println!("in the midst");
                thread::sleep(PATIENCE);
                Ok(())
            };
            manager.once("report", DAY, Duration::ZERO, work).map(drop).unwrap();
        }
        _ => panic!("{role}"),
    }
}

/// A process with a clock of its own.
fn with_clock(command: &mut Command, hours: i32) -> bool {
    !support::skip_without(support::clock::set_ahead(command, hours))
}

#[test]
fn eight_processes_whose_clocks_are_an_hour_apart_do_it_once() {
    const PROCESSES: i32 = 8;
    let database = Database::fresh().unwrap();
    let mut client = story(&database);
    let mut processes = Vec::new();
    for number in 0..PROCESSES {
        let mut command = process("once::worker", &format!("each-time {}", database.url()));
        if !with_clock(command.stdin(Stdio::piped()), number - PROCESSES / 2) {
            return;
        }
        processes.push(Process::start(&mut command));
    }
    let clocks: Vec<i64> = processes
        .iter()
        .map(|process| process.says("clock ").rsplit(' ').next().unwrap().parse().unwrap())
        .collect();
    for (one, next) in clocks.iter().zip(&clocks[1..]) {
        assert!((next - one - 3600).abs() < 600, "their clocks are an hour apart: {clocks:?}");
    }
    let hour = 3600.0;
    // How long ago it was done, and whether it is to be done again.
    for (round, (hours_ago, is_due)) in
        [(None, true), (Some(0.0), false), (Some(21.0), false), (Some(22.0), true), (Some(-5.0), true)]
            .into_iter()
            .enumerate()
    {
        if let Some(ago) = hours_ago {
            let statement = "UPDATE dsync.success SET started = clock_timestamp() - $1 * interval '1 second'";
            assert_eq!(client.execute(statement, &[&(ago * hour)]).unwrap(), 1);
        }
        let before = lines(&mut client);
        // All at once.
        processes.iter_mut().for_each(Process::go_on);
        let outcomes: Vec<_> = processes.iter().map(|process| process.says("outcome ")).collect();
        let runs = outcomes.iter().filter(|outcome| outcome.contains("Ran")).count();
        assert_eq!(runs, usize::from(is_due), "round {round}: {outcomes:#?}");
        assert_eq!(lines(&mut client) - before, i64::from(is_due), "round {round}");
    }
}

#[test]
fn work_whose_process_is_killed_is_done_again() {
    let database = Database::fresh().unwrap();
    let mut client = story(&database);
    let child = Process::start(&mut process("once::worker", &format!("dies-at-work {}", database.url())));
    child.says("in the midst");
    let manager = started(config(&database));
    assert_eq!(manager.once("report", DAY, Duration::ZERO, unreachable).unwrap(), Once::Busy);
    child.kill();
    let outcome = manager.once("report", DAY, PATIENCE, |_| writes(&mut client));
    assert_eq!(outcome.unwrap(), Once::Ran(()));
    assert_eq!(lines(&mut client), 2, "at least once");
}

/// Nobody knows then whether another process is at it.
#[test]
fn a_wait_that_ends_while_the_server_stands_still_is_no_sign_of_another_holder() {
    let server = Server::start().unwrap();
    let config = Config::from_url(&server.url()).unwrap().lease(Duration::from_secs(4));
    let (holder, manager) = (started(config.clone()), started(config));
    let held = holder.lock("report").unwrap().acquire(PATIENCE).unwrap();
    let mut client = server.client().unwrap();
    let waits = thread::spawn(move || manager.once("report", DAY, Duration::from_secs(3), unreachable));
    eventually("the wait", || {
        let waiters = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted";
        client.query_one(waiters, &[]).unwrap().get::<_, i64>(0) == 1
    });
    let frozen = server.freeze().unwrap();
    let error = waits.join().unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
    let why = std::error::Error::source(&error).and_then(|why| why.downcast_ref::<Error>());
    assert_eq!(why.map(Error::kind), Some(ErrorKind::SessionUnavailable), "{error:?}");
    frozen.thaw();
    drop(held);
}

/// A session that has rested is one of which nobody knows before whether the server answers on it.
#[test]
fn one_attempt_at_a_server_that_stands_still_says_so() {
    let server = Server::start().unwrap();
    for shared_sessions in [0, 1] {
        let config = Config::from_url(&server.url()).unwrap().lease(Duration::from_secs(4));
        let manager = started(config.shared_sessions(shared_sessions));
        let lock = manager.lock("report").unwrap();
        lock.acquire(PATIENCE).unwrap().release().unwrap();
        let frozen = server.freeze().unwrap();
        let error = lock.acquire(Duration::ZERO).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
        let why = std::error::Error::source(&error).and_then(|why| why.downcast_ref::<Error>());
        assert_eq!(why.map(Error::kind), Some(ErrorKind::SessionUnavailable), "{error:?}");
        frozen.thaw();
    }
}

#[test]
fn work_that_records_itself_is_done_exactly_once_whenever_its_process_is_killed() {
    for (what, is_done) in [("dies-before-commit", false), ("dies-after-commit", true)] {
        let database = Database::fresh().unwrap();
        let mut client = story(&database);
        let child = Process::start(&mut process("once::worker", &format!("{what} {}", database.url())));
        child.says("in the midst");
        child.kill();
        let manager = started(config(&database));
        let outcome = manager.once("report", DAY, PATIENCE, |run| -> Result<(), Error> {
            let mut transaction = client.transaction().unwrap();
            run.record(&mut transaction)?;
            transaction.batch_execute("INSERT INTO story VALUES ('done')").unwrap();
            transaction.commit().unwrap();
            Ok(())
        });
        assert_eq!(outcome.unwrap() == Once::Ran(()), !is_done, "{what}");
        assert_eq!(lines(&mut client), 1, "{what}");
        assert!(manager.last_success("report").unwrap().is_some());
    }
}

/// The record is the transaction's, and nobody else's: if that is rolled back, the work is due still.
#[test]
fn a_record_is_committed_with_the_work_or_not_at_all() {
    let database = Database::fresh().unwrap();
    let mut client = story(&database);
    let manager = started(config(&database));
    let mut attempt = |commits: bool| {
        let outcome = manager.once("report", DAY, PATIENCE, |run| -> Result<(), Error> {
            let mut transaction = client.transaction().unwrap();
            run.record(&mut transaction)?;
            if commits {
                transaction.commit().unwrap();
            }
            Ok(())
        });
        outcome.unwrap()
    };
    assert_eq!(attempt(false), Once::Ran(()));
    assert_eq!(manager.last_success("report").unwrap(), None);
    assert_eq!(attempt(true), Once::Ran(()));
    assert!(matches!(attempt(true), Once::NotDue { .. }));
}

/// The fence of the record: a former holder that does not know of its loss writes neither the record nor its work.
#[test]
fn who_was_superseded_records_nothing() {
    let database = Database::fresh().unwrap();
    let (mut client, mut operator) = (story(&database), database.client().unwrap());
    let manager = started(config(&database));
    let mut supersede = || {
        let query = "UPDATE dsync.lock SET token = nextval('dsync.token') WHERE key = 'report'";
        assert_eq!(operator.execute(query, &[]).unwrap(), 1);
    };
    let outcome = manager.once("report", DAY, PATIENCE, |run| {
        supersede();
        assert!(run.term().is_held(), "as far as it knows");
        Ok::<_, Error>(())
    });
    let error = outcome.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Lost);
    assert!(error.to_string().contains("a later one has begun"), "{error}");
    let outcome = manager.once("report", DAY, PATIENCE, |run| {
        supersede();
        let mut transaction = client.transaction().unwrap();
        run.record(&mut transaction)
    });
    assert_eq!(kind(outcome), ErrorKind::Lost);
    assert_eq!(manager.last_success("report").unwrap(), None);
}

/// Nothing of the server is on the disk that nobody waits for.
#[test]
fn a_success_is_on_the_disk_when_the_call_returns() {
    let server = Server::builder().durable().setting("wal_writer_delay", "10s").start().unwrap();
    let manager = started(Config::from_url(&server.url()).unwrap());
    let outcome = manager.once("report", DAY, PATIENCE, |_| Ok::<_, Error>(())).unwrap();
    server.kill_hard().unwrap();
    server.start_again().unwrap();
    assert_eq!(outcome, Once::Ran(()));
    eventually("the server", || manager.last_success("report").is_ok());
    assert!(matches!(manager.once("report", DAY, PATIENCE, unreachable).unwrap(), Once::NotDue { .. }));
    // And so is that it was forgotten.
    assert!(manager.forget_success("report").unwrap());
    server.kill_hard().unwrap();
    server.start_again().unwrap();
    eventually("the server", || manager.last_success("report").is_ok());
    assert_eq!(manager.last_success("report").unwrap(), None);
}

/// In a process of its own, for its logger.
#[test]
fn a_record_in_the_future_is_told() {
    let database = Database::fresh().unwrap();
    let mut client = story(&database);
    make_catalog(config(&database));
    let statement = "INSERT INTO dsync.success VALUES ('dsync', 'report', now() + interval '3 hours')";
    client.batch_execute(statement).unwrap();
    let mut command = process("once::worker", &format!("each-time {}", database.url()));
    let mut child = Process::start(command.stdin(Stdio::piped()));
    child.says("clock ");
    child.go_on();
    // In whichever order: the one comes by its standard error.
    let (mut told, mut outcome) = (None, None);
    while told.is_none() || outcome.is_none() {
        let line = child.lines.recv_timeout(PATIENCE).unwrap();
        told = told.or_else(|| line.contains("WARN").then(|| line.clone()));
        outcome = outcome.or_else(|| line.contains("outcome ").then_some(line));
    }
    let (told, outcome) = (told.unwrap(), outcome.unwrap());
    assert!(told.contains("report") && told.contains("ahead of the server's clock"), "{told}");
    assert!(outcome.contains("Ran"), "{outcome}");
    assert_eq!(lines(&mut client), 1);
}

/// Sessions that rest in the pool die: before the call, and while the work goes on.
#[test]
fn sessions_that_have_died_cost_no_turn() {
    let database = Database::fresh().unwrap();
    let manager = started(config(&database));
    let mut operator = database.client().unwrap();
    let mut end_those_that_rest = || {
        let query = "SELECT count(pg_terminate_backend(pid, 10000)) FROM pg_stat_activity
                     WHERE datname = current_database() AND application_name = 'dsync'";
        assert!(operator.query_one(query, &[]).unwrap().get::<_, i64>(0) > 0, "one rests");
    };
    end_those_that_rest();
    let outcome = manager.once("report", DAY, Duration::ZERO, |_| {
        end_those_that_rest();
        Ok::<_, Error>(())
    });
    assert_eq!(outcome.unwrap(), Once::Ran(()));
    end_those_that_rest();
    assert!(matches!(manager.once("report", DAY, Duration::ZERO, unreachable).unwrap(), Once::NotDue { .. }));
}

/// Behind an address that has moved, or a firewall that has forgotten them, nobody says that they are gone.
#[test]
fn sessions_that_have_died_without_a_word_cost_no_turn() {
    let database = Database::fresh().unwrap();
    let manager = started(config(&database).lease(Duration::from_secs(8)));
    let mut operator = database.client().unwrap();
    let query =
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'dsync'";
    let rest: Vec<i32> = operator.query(query, &[]).unwrap().iter().map(|row| row.get(0)).collect();
    assert!(!rest.is_empty(), "one rests");
    rest.iter().for_each(|&backend| signal(backend, Signal::Stop).unwrap());
    let outcome = manager.last_success("report");
    rest.iter().for_each(|&backend| signal(backend, Signal::Continue).unwrap());
    assert_eq!(outcome.unwrap(), None);
}

/// The work is done, so it is worth a wait: without one, all attempts would be over in half a second.
#[test]
fn a_session_that_another_claim_has_for_a_second_costs_no_turn() {
    let database = Database::fresh().unwrap();
    let manager = started(config(&database).max_sessions(2));
    let other = manager.lock("other").unwrap();
    let mut releasing = None;
    let outcome = manager.once("report", DAY, PATIENCE, |_| {
        let guard = other.acquire(PATIENCE)?;
        releasing = Some(thread::spawn(move || {
            thread::sleep(Duration::from_secs(1));
            guard.release()
        }));
        Ok::<_, Error>(())
    });
    assert_eq!(outcome.unwrap(), Once::Ran(()));
    assert!(manager.last_success("report").unwrap().is_some());
    releasing.unwrap().join().unwrap().unwrap();
}

#[test]
fn what_the_record_needs_is_told() {
    let database = Database::fresh().unwrap();
    let mut administrator = database.client().unwrap();
    let without = started(config(&database).catalog(CatalogMode::None));
    let error = without.once("report", DAY, PATIENCE, unreachable).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidConfig);
    assert!(error.to_string().contains("set the catalog to automatic"), "{error}");
    assert_eq!(kind(without.last_success("report")), ErrorKind::InvalidConfig);

    let one_session = started(config(&database).max_sessions(1));
    let error = one_session.once("report", DAY, PATIENCE, unreachable).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::PoolExhausted);
    assert!(error.to_string().contains("raise max_sessions"), "{error}");

    let role = format!("role_{}", database.name());
    administrator
        .batch_execute(&format!(
            "CREATE ROLE {role} LOGIN; GRANT USAGE ON SCHEMA dsync TO {role}; GRANT ALL ON dsync.token TO {role};
             GRANT ALL ON ALL TABLES IN SCHEMA dsync TO {role}; REVOKE ALL ON dsync.success FROM {role}"
        ))
        .unwrap();
    let url = database.url().replace("postgres@", &format!("{role}@"));
    let (modest, mut client) = (
        PostgresManager::connect(Config::from_url(&url).unwrap()).unwrap(),
        Client::connect(&url, NoTls).unwrap(),
    );
    let error = modest.once("report", DAY, PATIENCE, unreachable).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::SessionRefused);
    assert!(error.to_string().contains("success"), "{error}");
    // The application's role may be another one than that of the locks.
    let outcome = started(config(&database)).once("report", DAY, PATIENCE, |run| {
        let mut transaction = client.transaction().unwrap();
        run.record(&mut transaction)
    });
    let error = outcome.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::SessionRefused);
    assert!(error.to_string().contains("INSERT, UPDATE ON dsync.success"), "{error}");
    drop((modest, client));
    administrator.batch_execute(&format!("DROP OWNED BY {role}; DROP ROLE {role}")).unwrap();
}

/// Operators of somebody else's in front of PostgreSQL's, and a schema of another name.
#[test]
fn the_record_is_written_on_any_connection_and_in_any_schema() {
    let database = Database::fresh().unwrap();
    let mut client = database.client().unwrap();
    client
        .batch_execute(
            "CREATE SCHEMA evil;
             CREATE FUNCTION evil.trap(int8, int8) RETURNS bool LANGUAGE plpgsql AS $$ BEGIN RAISE 'boom'; END $$;
             CREATE OPERATOR evil.= (LEFTARG = int8, RIGHTARG = int8, FUNCTION = evil.trap);
             CREATE FUNCTION evil.trap(text, text) RETURNS bool LANGUAGE plpgsql AS $$ BEGIN RAISE 'boom'; END $$;
             CREATE OPERATOR evil.= (LEFTARG = text, RIGHTARG = text, FUNCTION = evil.trap);
             SET search_path = evil, pg_catalog",
        )
        .unwrap();
    assert!(client.batch_execute("SELECT 1::int8 = 1::int8").is_err(), "the trap works");
    for schema in ["dsync", "it's \"ours\""] {
        let manager = started(config(&database).schema(schema));
        for _ in 0..2 {
            let outcome = manager.once("report", DAY, PATIENCE, |run| -> Result<(), Error> {
                let mut transaction = client.transaction().unwrap();
                run.record(&mut transaction)?;
                transaction.commit().unwrap();
                Ok(())
            });
            assert_eq!(outcome.unwrap(), Once::Ran(()));
            assert!(manager.forget_success("report").unwrap());
        }
    }
}
