//! When a stop is over, so are the sessions, which its threads have closed, and not whoever is the last to know the pool.

use std::collections::HashSet;
use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dsync::{CatalogMode, Config, Lock, PostgresManager, SyncManager};
use support::Server;

use crate::common::{PATIENCE, becomes, lock, soon, started};

const LOCKS: usize = 96;

/// A busy machine does not confirm so many releases within the time that is the default.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(20);

/// How many connections to the server this machine has that nobody has ended, from the client's side. What the server
/// says of its sessions would be late.
fn connections(server: &Server) -> usize {
    let port = format!(":{:04X}", server.port());
    let table = fs::read_to_string("/proc/net/tcp").expect("this system tells of its connections");
    let columns = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let open = columns.filter(|columns| columns[2].ends_with(&port) && columns[3] == "01");
    // The system tells of one twice if others come and go meanwhile.
    open.map(|columns| columns[1].to_owned()).collect::<HashSet<_>>().len()
}

fn hold(manager: &PostgresManager) -> Vec<Arc<dyn Lock>> {
    let locks: Vec<_> = (0..LOCKS).map(|number| lock(manager, &format!("key {number}"))).collect();
    locks.iter().for_each(|lock| lock.lock(&soon()).unwrap());
    locks
}

#[test]
fn sessions_are_closed_when_the_stop_is_over() {
    let server = Server::builder().max_connections(120).start().unwrap();
    let config = Config::from_url(&server.url())
        .unwrap()
        .max_sessions(120)
        .catalog(CatalogMode::None)
        .release_timeout(RELEASE_TIMEOUT);
    for round in 0..6 {
        let manager = started(config.clone());
        let locks = hold(&manager);
        becomes("the connections", &LOCKS, || connections(&server));
        // Half of them are held still, or all, or none.
        let released = LOCKS / 2 * (round % 3);
        locks[..released].iter().for_each(|lock| lock.release().unwrap());
        becomes("the connections", &LOCKS, || connections(&server));
        let begun = Instant::now();
        manager.stop().unwrap();
        assert_eq!(connections(&server), 0, "round {round}");
        println!("{released} of {LOCKS} released: {:?}", begun.elapsed());
        // The server is done with one round before the next.
        let mut operator = server.client().unwrap();
        becomes("the sessions", &0, || -> i64 {
            let query = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'dsync%'
                         AND application_name <> 'dsync-test-support'";
            operator.query_one(query, &[]).unwrap().get(0)
        });
    }
}

/// Of many sessions, that they are closed takes the server longer than that their locks are given back.
#[test]
fn all_locks_are_given_back_before_sessions_are_closed() {
    let server = Server::builder()
        .max_connections(120)
        .setting("log_statement", "all")
        .setting("log_disconnections", "on")
        .start()
        .unwrap();
    // A lock whose heartbeat is under way is given back by the thread that has sent it, so none is.
    let config = Config::from_url(&server.url())
        .unwrap()
        .max_sessions(120)
        .catalog(CatalogMode::None)
        .lease(5 * PATIENCE)
        .release_timeout(RELEASE_TIMEOUT);
    let manager = started(config);
    let _locks = hold(&manager);
    let before = server.log().len();
    manager.stop().unwrap();
    let log = || server.log().split_off(before);
    becomes("the ends of the sessions", &LOCKS, || log().matches("disconnection: ").count());
    let log = log();
    let given_back = |log: &str| log.matches("pg_advisory_unlock(").count();
    let first = log.find("disconnection: ").unwrap();
    assert_eq!(given_back(&log[..first]), LOCKS);
}
