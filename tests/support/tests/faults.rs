//! What can befall a server, and that it comes back.

use std::net::TcpStream;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use postgres::{Client, NoTls};
use support::{Replication, Server, Shutdown, process, wait_for};

type Outcome = Result<(), Box<dyn std::error::Error>>;

#[test]
fn a_killed_postmaster_is_replaced() -> Outcome {
    let server = Server::start()?;
    let mut client = server.client()?;
    let first = server.postmaster_pid();
    server.kill_postmaster()?;
    assert!(!server.is_running());
    assert!(server.kill_postmaster().is_err(), "there's none to kill");
    wait_for("the session's end", Duration::from_secs(5), || {
        client.simple_query("SELECT 1").is_err().then_some(())
    })?;
    server.start_again()?;
    assert_ne!(server.postmaster_pid(), first);
    server.client()?.simple_query("SELECT 1")?;
    Ok(())
}

#[test]
fn killed_hard_nothing_of_it_is_left_running() -> Outcome {
    let server = Server::start()?;
    let mut client = server.client()?;
    client.batch_execute("CREATE TABLE kept AS SELECT 1 AS number")?;
    let processes = server.processes();
    assert!(processes.len() > 3, "{processes:?}");
    server.kill_hard()?;
    assert!(processes.iter().all(|&pid| !process::is_alive(pid)));
    assert!(client.simple_query("SELECT 1").is_err());
    server.start_again()?;
    assert_eq!(server.client()?.query("SELECT number FROM kept", &[])?.len(), 1);
    Ok(())
}

#[test]
fn a_frozen_server_answers_when_it_has_thawed() -> Outcome {
    let server = Server::start()?;
    let mut client = Client::connect(&server.url(), NoTls)?;
    let frozen = server.freeze()?;
    let again = server.freeze()?;
    assert!(frozen.processes().len() > 3);
    let (sender, answers) = mpsc::channel();
    let asking = std::thread::spawn(move || sender.send(client.simple_query("SELECT 1").is_ok()));
    assert!(answers.recv_timeout(Duration::from_millis(300)).is_err(), "it answers");
    frozen.thaw();
    assert!(answers.recv_timeout(Duration::from_millis(100)).is_err(), "the second guard holds it");
    drop(again);
    assert!(answers.recv_timeout(Duration::from_secs(5))?, "the connection has survived");
    asking.join().unwrap()?;
    Ok(())
}

/// PostgreSQL turns a client away that it accepts while it stops, but hears it out before, and does not end for so long.
#[test]
fn a_stop_does_not_wait_long_for_clients_that_say_nothing() -> Outcome {
    let server = Server::builder().start()?;
    let frozen = server.freeze()?;
    // In the server's queue of connections, which it goes through one by one.
    let silent: Vec<TcpStream> =
        (0..40).map(|_| TcpStream::connect(("127.0.0.1", server.port()))).collect::<Result<_, _>>()?;
    frozen.thaw();
    let begun = Instant::now();
    server.stop(Shutdown::Fast)?;
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
    drop(silent);
    Ok(())
}

#[test]
fn frozen_servers_can_be_killed_and_databases_on_them_dropped() -> Outcome {
    let server = Server::start()?;
    let database = server.database()?;
    let frozen = server.freeze()?;
    drop(database);
    server.kill_postmaster()?;
    drop(frozen);
    server.start_again()?;
    let frozen = server.freeze()?;
    server.stop(Shutdown::Immediate)?;
    drop(frozen);
    server.start_again()?;
    server.client()?.simple_query("SELECT 1")?;
    Ok(())
}

#[test]
fn a_standby_follows_and_takes_over() -> Outcome {
    let primary = Server::start()?;
    let standby = primary.standby(Replication::Asynchronous)?;
    assert!(standby.is_in_recovery()? && !primary.is_in_recovery()?);
    assert_ne!(primary.port(), standby.port());
    primary.client()?.batch_execute("CREATE TABLE followed AS SELECT 1 AS number")?;
    standby.wait_caught_up(&primary)?;
    let query = "SELECT number FROM followed";
    assert_eq!(standby.client()?.query(query, &[])?.len(), 1);
    assert!(standby.client()?.batch_execute("DELETE FROM followed").is_err(), "it's read only");
    standby.restart(Shutdown::Fast)?;
    assert!(standby.is_in_recovery()?);
    primary.kill_hard()?;
    standby.promote()?;
    assert!(!standby.is_in_recovery()?);
    standby.client()?.batch_execute("DELETE FROM followed")?;
    Ok(())
}

#[test]
fn a_primary_waits_for_its_synchronous_standby() -> Outcome {
    let primary = Server::start()?;
    let standby = primary.standby(Replication::Synchronous)?;
    primary.client()?.batch_execute("CREATE TABLE followed (number int)")?;
    let frozen = standby.freeze()?;
    let mut client = primary.client()?;
    let (sender, answers) = mpsc::channel();
    let asking = std::thread::spawn(move || {
        sender.send(client.batch_execute("INSERT INTO followed VALUES (1)").is_ok())
    });
    assert!(answers.recv_timeout(Duration::from_millis(300)).is_err(), "it doesn't wait");
    drop(frozen);
    assert!(answers.recv_timeout(Duration::from_secs(10))?);
    asking.join().unwrap()?;
    standby.promote()?;
    standby.client()?.batch_execute("INSERT INTO followed VALUES (2)")?;
    Ok(())
}
