//! What the server's answers mean: what waiting does not cure is told at once, by `start` and by a `try_lock` without a
//! deadline, with advice that fits the cause.

use std::error::Error as _;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::thread;

use dsync::{CATALOG_SQL, CatalogMode, Config, Context, Error, ErrorKind, PostgresManager, SyncManager};
use postgres::{Client, NoTls};
use support::pgbouncer::{self, PoolMode};
use support::{Database, Server};
use tokio_postgres_rustls::MakeRustlsConnect;

use crate::common::{self, begin, eventually, lock, started};

fn config(url: &str) -> Config {
    Config::from_url(url).unwrap().release_timeout(common::PATIENCE)
}

fn as_user(database: &Database<'_>, user: &str) -> Config {
    let mut postgres: postgres::Config = database.url().parse().unwrap();
    postgres.user(user);
    Config::from_postgres(postgres).release_timeout(common::PATIENCE)
}

fn tells(error: &Error, texts: &[&str]) {
    let text = format!("{error:#}");
    println!("{text}");
    for expected in texts {
        assert!(text.contains(expected), "{expected:?} is missing: {text}");
    }
}

/// That `start` refuses, and with what.
fn start_refused(config: Config, texts: &[&str]) {
    let manager = PostgresManager::new(config).unwrap();
    let error = begin(move || manager.start()).get().expect_err("the server refuses");
    assert_eq!(error.kind(), ErrorKind::FailedInitialization, "{error}");
    let cause = error.source().and_then(|cause| cause.downcast_ref::<Error>()).expect("the cause is kept");
    assert_eq!(cause.kind(), ErrorKind::SessionRefused, "{error}");
    tells(&error, texts);
}

/// That a manager which runs refuses, without a deadline.
fn try_lock_refused(manager: &PostgresManager, kind: ErrorKind, texts: &[&str]) {
    let x = manager.lock("refused").unwrap();
    let error = begin({
        let x = Arc::clone(&x);
        move || x.try_lock(&Context::background())
    })
    .get()
    .expect_err("the server refuses");
    assert_eq!(error.kind(), kind, "{error}");
    tells(&error, texts);
    x.release().unwrap();
}

#[test]
fn an_event_trigger_that_forbids_the_catalog_is_told() {
    let server = Server::start().unwrap();
    server.client().unwrap().batch_execute("CREATE ROLE app LOGIN").unwrap();
    let database = server.database().unwrap();
    let sql = format!(
        "GRANT CREATE ON DATABASE {} TO app;
         CREATE FUNCTION public.no_ddl() RETURNS event_trigger LANGUAGE plpgsql AS
             $$ BEGIN RAISE EXCEPTION 'DDL is frozen: open a change request'; END $$;
         CREATE EVENT TRIGGER no_changes ON ddl_command_start EXECUTE FUNCTION public.no_ddl()",
        database.name()
    );
    database.client().unwrap().batch_execute(&sql).unwrap();
    start_refused(as_user(&database, "app"), &["DDL is frozen", "event trigger", "CATALOG_SQL"]);
}

#[test]
fn a_database_that_takes_no_connections_is_told_at_the_start_and_later() {
    let server = Server::start().unwrap();
    let database = server.database().unwrap();
    let mut operator = server.client().unwrap();
    let running = started(config(&database.url()).catalog(CatalogMode::None));
    let held = lock(&running, "held");
    held.lock(&common::soon()).unwrap();
    operator.batch_execute(&format!("ALTER DATABASE {} ALLOW_CONNECTIONS false", database.name())).unwrap();
    const ADVICE: [&str; 2] = ["not currently accepting connections", "ALLOW_CONNECTIONS true"];
    start_refused(config(&database.url()).catalog(CatalogMode::None), &ADVICE);
    try_lock_refused(&running, ErrorKind::SessionRefused, &ADVICE);
    assert!(common::is_held(&held));
}

#[test]
fn a_full_lock_table_is_told_with_the_setting_to_raise() {
    let server =
        Server::builder().setting("max_locks_per_transaction", "10").max_connections(20).start().unwrap();
    let manager = started(config(&server.url()).catalog(CatalogMode::None));
    let mut other = server.client().unwrap();
    let error = other
        .batch_execute("DO $$ BEGIN FOR i IN 1..100000 LOOP PERFORM pg_advisory_lock(i); END LOOP; END $$")
        .unwrap_err();
    assert_eq!(error.code().unwrap().code(), "53200");
    try_lock_refused(
        &manager,
        ErrorKind::SessionRefused,
        &["out of shared memory", "max_locks_per_transaction"],
    );
}

/// A limit may be lifted by whoever leaves, so `start` and `lock` wait; it may also be lifted by nobody, so `try_lock` does
/// not.
#[test]
fn a_limit_of_connections_is_told_with_whose_it_is() {
    let server = Server::builder().max_connections(8).start().unwrap();
    let mut operator = server.client().unwrap();
    let database = server.database().unwrap();
    operator.batch_execute("CREATE ROLE few LOGIN CONNECTION LIMIT 0; CREATE ROLE app LOGIN").unwrap();
    let refused = |config: Config, texts: &[&str]| {
        let manager = started(config.catalog(CatalogMode::None));
        try_lock_refused(&manager, ErrorKind::PoolExhausted, texts);
    };
    refused(as_user(&database, "few"), &["too many connections for role", "ALTER ROLE ... CONNECTION LIMIT"]);
    operator.batch_execute(&format!("ALTER DATABASE {} CONNECTION LIMIT 0", database.name())).unwrap();
    refused(
        as_user(&database, "app"),
        &["too many connections for database", "ALTER DATABASE ... CONNECTION LIMIT"],
    );
    let url = format!("postgres://app@127.0.0.1:{}/postgres", server.port());
    // A session that was refused keeps its place for a moment.
    let fill = |url: &str, places: usize| {
        let mut clients: Vec<Client> = Vec::new();
        eventually("the places", || {
            clients.extend(Client::connect(url, NoTls));
            clients.len() == places
        });
        clients
    };
    // The operator has one place, and three are the superusers'.
    let crowd = fill(&url, 4);
    refused(config(&url), &["reserved", "max_connections"]);
    let superusers = fill(&server.url(), 3);
    refused(config(&url), &["too many clients already", "raise the server's max_connections"]);
    drop((crowd, superusers));
    let pooler = refusing("08P01", "no more connections allowed (max_client_conn)");
    refused(config(&pooler), &["raise the pooler's max_client_conn"]);
}

/// The manager asks for two sessions at once to compare them, and has to do with the one that it gets.
#[test]
fn a_role_with_a_single_connection_has_a_lock() {
    let server = Server::start().unwrap();
    let sql = "CREATE ROLE one LOGIN CONNECTION LIMIT 1; GRANT CREATE ON DATABASE postgres TO one";
    server.client().unwrap().batch_execute(sql).unwrap();
    let url = format!("postgres://one@127.0.0.1:{}/postgres", server.port());
    for _ in 0..10 {
        let manager = started(config(&url));
        let x = lock(&manager, "x");
        x.lock(&common::soon()).unwrap();
        x.release().unwrap();
        manager.stop().unwrap();
    }
}

/// A server that answers every session with one error.
fn refusing(code: &'static str, message: &'static str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut length = [0; 4];
            if stream.read_exact(&mut length).is_err() {
                continue;
            }
            let mut rest = vec![0; u32::from_be_bytes(length) as usize - 4];
            let _ = stream.read_exact(&mut rest);
            let fields = [('S', "FATAL"), ('V', "FATAL"), ('C', code), ('M', message)];
            let body: String = fields.iter().map(|(name, text)| format!("{name}{text}\0")).collect();
            let length = u32::try_from(body.len() + 5).unwrap().to_be_bytes();
            let _ = stream.write_all(&[b"E", &length[..], body.as_bytes(), b"\0"].concat());
        }
    });
    format!("postgres://app:secret@127.0.0.1:{port}/app")
}

#[test]
fn what_is_not_known_to_pass_is_refused_and_what_is_known_is_waited_for() {
    for (code, message, advice) in [
        ("XX000", "Tenant or user not found", "what stands in front of it"),
        ("08P01", "no such database: app", "in the pooler's settings"),
        (
            "08P01",
            "server login has been failing, cached error: password authentication failed (server_login_retry)",
            "pooler",
        ),
        ("ZZ999", "never heard of", "change what the server objects to"),
        (
            "28000",
            "no pg_hba.conf entry for host \"127.0.0.1\", user \"app\", database \"app\", no encryption",
            "lets this host, user and database in without TLS: give a TLS connector",
        ),
        (
            "28000",
            "no pg_hba.conf entry for host \"127.0.0.1\", user \"app\", database \"app\", SSL encryption",
            "add a line for this host",
        ),
        ("28000", "role \"app\" does not exist", "check the user"),
        ("53100", "could not extend file", "disk is full"),
    ] {
        start_refused(config(&refusing(code, message)), &[code_free(message), advice]);
    }
    for (code, message) in [
        ("57P03", "the database system is starting up"),
        ("57P01", "terminating connection due to administrator command"),
        ("08P01", "query_wait_timeout"),
        ("08P01", "server login has been failing, cached error: connect failed (server_login_retry)"),
        ("08006", "connection lost"),
    ] {
        let manager = started(config(&refusing(code, message)));
        let error = lock(&manager, "x").try_lock(&common::briefly()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
        tells(&error, &[message]);
    }
}

/// To wait for the dead host would hide it.
#[test]
fn a_refusal_is_told_though_another_host_is_dead() {
    let refusing = refusing("28P01", "password authentication failed for user \"app\"");
    let port = refusing.parse::<postgres::Config>().unwrap().get_ports()[0];
    let dead = common::SilentHost::new();
    for ports in [[port, dead.port()], [dead.port(), port]] {
        let url = format!("host=127.0.0.1,127.0.0.1 port={},{} user=app password=x", ports[0], ports[1]);
        let config = config(&url).connect_timeout(std::time::Duration::from_secs(6));
        start_refused(
            config,
            &["did not answer", "password authentication failed", "check user and password"],
        );
    }
}

fn code_free(message: &str) -> &str {
    message.split(',').next().unwrap()
}

#[test]
fn what_pgbouncer_says_of_passwords_users_and_databases_is_told() {
    if support::skip_without(pgbouncer::available()) {
        return;
    }
    let server = Server::start().unwrap();
    let users = std::env::temp_dir().join(format!("users-{}", std::process::id()));
    std::fs::write(&users, "\"app\" \"right\"\n").unwrap();
    std::fs::set_permissions(&users, std::fs::Permissions::from_mode(0o644)).unwrap();
    let settings = [("auth_type", "plain"), ("auth_file", users.to_str().unwrap())];
    let bouncer = pgbouncer::start_with(&server, PoolMode::Session, &settings).unwrap();
    let url = |user: &str, database: &str| {
        // On a busy machine the pooler takes its time to hear that there is no such database, and a server that is late does not refuse.
        config(&format!("postgres://{user}@127.0.0.1:{}/{database}", bouncer.port()))
            .connect_timeout(common::PATIENCE)
    };
    start_refused(url("app:wrong", "postgres"), &["password authentication failed", "password"]);
    start_refused(url("nobody:right", "postgres"), &["user"]);
    start_refused(url("app:right", "nowhere"), &["nowhere", "database"]);
    let manager = started(url("app:right", "postgres"));
    lock(&manager, "x").lock(&common::soon()).unwrap();
    std::fs::remove_file(users).unwrap();
}

fn rustls(trusted: Option<&Server>) -> MakeRustlsConnect {
    use rustls::pki_types::{CertificateDer, pem::PemObject};
    let mut roots = rustls::RootCertStore::empty();
    if let Some(path) = trusted.and_then(Server::certificate_pem) {
        roots.add(CertificateDer::from_pem_file(path).unwrap()).unwrap();
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    MakeRustlsConnect::new(config)
}

#[test]
fn tls_that_cannot_work_is_told_by_what_is_wrong_with_it() {
    if support::skip_without(support::tls::available()) {
        return;
    }
    let server = Server::builder().tls().hba("hostnossl all all all reject").start().unwrap();
    let url = |host: &str, more: &str| {
        let port = server.port();
        config(&format!("host={host} hostaddr=127.0.0.1 port={port} user=postgres dbname=postgres {more}"))
    };
    let issuer = url("localhost", "sslmode=require").tls(rustls(None));
    start_refused(issuer, &["TLS handshake failed", "UnknownIssuer", "must trust its issuer"]);
    let name = url("elsewhere.example", "sslmode=require").tls(rustls(Some(&server)));
    start_refused(name, &["certificate", "the host name of the connection"]);
    start_refused(url("localhost", "sslmode=disable"), &["encryption", "sslmode=require"]);
    // Before 17 the server takes the handshake for a startup message; from 17 on it wants ALPN.
    let direct = url("localhost", "sslmode=require sslnegotiation=direct").tls(rustls(Some(&server)));
    start_refused(direct, &["PostgreSQL 17", "ALPN", "sslnegotiation=postgres"]);
    let right = url("localhost", "sslmode=require").tls(rustls(Some(&server)));
    lock(&started(right), "x").lock(&common::soon()).unwrap();
}

#[test]
fn settings_of_the_connection_that_cannot_work_are_named() {
    let server = Server::shared();
    let database = server.database().unwrap();
    let url = |more: &str| config(&format!("{}?{more}", database.url()));
    let read_only = format!("{}?target_session_attrs=read-only", database.url());
    let mut given: postgres::Config = database.url().parse().unwrap();
    given.target_session_attrs(postgres::config::TargetSessionAttrs::ReadOnly);
    for error in [
        Config::from_url(&read_only).unwrap_err(),
        PostgresManager::new(Config::from_postgres(given)).unwrap_err(),
    ] {
        assert_eq!(error.kind(), ErrorKind::InvalidConfig);
        tells(&error, &["target_session_attrs", "read-write"]);
    }
    for (setting, value) in
        [("keepalives_idle", "40000"), ("keepalives_interval", "40000"), ("keepalives_retries", "1000")]
    {
        start_refused(
            url(&format!("{setting}={value}")),
            &[&format!("does not take the value of {setting}"), "correct the value"],
        );
    }
}

/// Some servers that speak PostgreSQL's protocol have these functions and do nothing in them.
#[test]
fn a_server_whose_locks_always_succeed_is_refused() {
    let server = Server::builder().setting("allow_system_table_mods", "on").start().unwrap();
    let stub = "CREATE OR REPLACE FUNCTION pg_catalog.pg_try_advisory_lock(bigint) RETURNS boolean
                LANGUAGE sql VOLATILE AS 'SELECT true'";
    server.client().unwrap().batch_execute(stub).unwrap();
    start_refused(config(&server.url()), &["exclude nobody", "only looks like PostgreSQL"]);
}

/// The probe's lock goes with the probe, also where a pooler keeps the session.
#[test]
fn the_probe_leaves_no_lock_behind() {
    if support::skip_without(pgbouncer::available()) {
        return;
    }
    let server = Server::start().unwrap();
    server.client().unwrap().batch_execute(CATALOG_SQL).unwrap();
    let bouncer = pgbouncer::start_with(&server, PoolMode::Session, &[("server_reset_query", "")]).unwrap();
    let manager = started(config(&bouncer.url("postgres")));
    let count = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'";
    assert_eq!(server.client().unwrap().query_one(count, &[]).unwrap().get::<_, i64>(0), 0);
    drop(manager);
}
