//! Pgpool-II in front of a primary and a standby.

use std::fs;

use postgres::{Client, NoTls};
use support::pgpool;
use support::{Replication, Server, process};

type Outcome = Result<(), Box<dyn std::error::Error>>;

#[test]
fn it_ends_with_its_clients_and_leaves_no_shared_memory() -> Outcome {
    if support::skip_without(pgpool::available()) {
        return Ok(());
    }
    let primary = Server::start()?;
    let standby = primary.standby(Replication::Asynchronous)?;
    let pool = pgpool::start_with(&primary, &standby, &[])?;
    let pid = pool.pid();
    let segments = || fs::read_to_string("/proc/sysvipc/shm").unwrap_or_default();
    // The fifth column is the process that has made it.
    let is_its = |line: &str| line.split_whitespace().nth(4) == Some(pid.to_string().as_str());
    let mut client = Client::connect(&pool.url("postgres"), NoTls)?;
    client.simple_query("SELECT 1")?;
    assert!(!cfg!(target_os = "linux") || segments().lines().any(is_its), "{}", segments());
    drop(pool);
    assert!(!process::is_alive(pid));
    assert!(!segments().lines().any(is_its), "{}", segments());
    assert!(client.simple_query("SELECT 1").is_err());
    Ok(())
}
