//! Pgbouncer in its three modes.

use postgres::{Client, NoTls};
use support::pgbouncer::{self, PoolMode};
use support::{Database, Server, process};

type Outcome = Result<(), Box<dyn std::error::Error>>;

#[test]
fn sessions_are_kept_or_shared_as_the_mode_says() -> Outcome {
    if support::skip_without(pgbouncer::available()) {
        return Ok(());
    }
    let database = Database::fresh()?;
    for mode in [PoolMode::Session, PoolMode::Transaction, PoolMode::Statement] {
        let bouncer = pgbouncer::start_with(Server::shared(), mode, &[("default_pool_size", "2")])?;
        let mut one = Client::connect(&bouncer.url(database.name()), NoTls)?;
        let mut other = Client::connect(&database.url_at("127.0.0.1", bouncer.port()), NoTls)?;
        // Simple queries: pooling by transaction has no prepared statements.
        let backend = |client: &mut Client| -> Result<String, Box<dyn std::error::Error>> {
            let answers = client.simple_query("SELECT pg_backend_pid()")?;
            answers
                .iter()
                .find_map(|answer| match answer {
                    postgres::SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
                    _ => None,
                })
                .ok_or_else(|| "no row".into())
        };
        let own = backend(&mut one)?;
        if mode == PoolMode::Session {
            assert_ne!(own, backend(&mut other)?, "{mode:?}");
        } else {
            assert_eq!(own, backend(&mut other)?, "{mode:?}");
            assert_eq!(one.simple_query("BEGIN").is_err(), mode == PoolMode::Statement);
        }
        let pid = bouncer.pid();
        drop(bouncer);
        assert!(!process::is_alive(pid));
        assert!(other.simple_query("SELECT 1").is_err());
    }
    Ok(())
}

#[test]
fn a_failed_start_shows_the_log() {
    if support::skip_without(pgbouncer::available()) {
        return;
    }
    let Err(error) = pgbouncer::start_with(Server::shared(), PoolMode::Session, &[("auth_type", "nonsense")])
    else {
        panic!("it started");
    };
    assert!(error.to_string().contains("auth_type"), "{error}");
}
