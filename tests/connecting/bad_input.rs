//! What is wrong with settings, keys, servers and rights is told in time, by an error that says what to change; and what
//! was put right works, mostly with the very manager that refused.

use std::error::Error as _;
use std::ffi::OsString;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::ffi::OsStringExt;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use dsync::{
    CATALOG_SQL, CatalogMode, Config, Context, Error, ErrorKind, Key, Lock, PostgresManager, SyncManager,
};
use postgres::NoTls;
use socket2::{Domain, SockAddr, Socket, Type};
use support::{Database, Server, Shutdown};

use crate::common::{self, SilentHost, begin, briefly, eventually, is_held, kind, lock, soon, started};

/// For all that has to end by itself, whatever the other side does. Generous: the machine may be busy.
const BOUND: Duration = Duration::from_secs(15);

fn in_time<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    begin(work).get_within(BOUND)
}

fn config(url: &str) -> Config {
    Config::from_url(url).unwrap().release_timeout(Duration::from_secs(20))
}

/// A manager that does not wait long for a server.
fn hasty(url: &str) -> Config {
    config(url).connect_timeout(Duration::from_millis(300))
}

/// The error has this kind, and its text all of `texts`.
fn assert_tells(error: &Error, kind: ErrorKind, texts: &[&str]) {
    assert_eq!(error.kind(), kind, "{error}");
    for text in texts {
        assert!(error.to_string().contains(text), "it does not say {text:?}: {error}");
    }
}

/// Why the manager does not start: the error that is the source of the one returned, whose text holds its text.
fn start_refused(manager: &Arc<PostgresManager>) -> Error {
    let starting = Arc::clone(manager);
    let error = in_time(move || starting.start()).expect_err("the server refuses");
    assert_eq!(error.kind(), ErrorKind::FailedInitialization, "{error}");
    let cause = error.source().and_then(|cause| cause.downcast_ref::<Error>()).expect("the cause is kept");
    assert!(error.to_string().contains(&cause.to_string()), "{error}");
    let attempt = lock(manager, "x").try_lock(&soon());
    assert_eq!(kind(attempt), ErrorKind::SyncManagerStopped, "it has not started");
    cause.clone()
}

fn try_lock_in_time(lock: &Arc<dyn Lock>, context: &Context) -> Error {
    let (lock, context) = (Arc::clone(lock), context.clone());
    in_time(move || lock.try_lock(&context)).expect_err("there is no lock to be had")
}

/// The manager can do what it is there for.
fn assert_works(manager: &PostgresManager) {
    let lock = lock(manager, "works");
    lock.lock(&soon()).unwrap();
    assert!(is_held(&lock));
    lock.release().unwrap();
}

/// Has no answer for anybody who asks about it, but an end.
fn assert_ends_in_time(manager: Arc<PostgresManager>, lock: Arc<dyn Lock>) {
    in_time(move || {
        lock.release().unwrap();
        manager.stop().unwrap();
        drop(manager);
    });
}

// ---------------------------------------------------------------------------------------------------------------------
// Keys
// ---------------------------------------------------------------------------------------------------------------------

#[test]
fn a_key_that_cannot_be_used_is_refused_with_advice() {
    let database = Database::fresh().unwrap();
    let manager = started(config(&database.url()));
    let too_long = "k".repeat(Key::MAX_LEN + 1);
    for (key, advice) in [
        ("", "give the lock a name"),
        (&*too_long, "the limit is 1024; shorten it or use a hash"),
        ("a\0b", r#""a\0b" contains a NUL"#),
    ] {
        let error = manager.lock(key).unwrap_err();
        assert_tells(&error, ErrorKind::InvalidKey, &[advice]);
    }
    assert_works(&manager);
}

// ---------------------------------------------------------------------------------------------------------------------
// Settings
// ---------------------------------------------------------------------------------------------------------------------

#[test]
fn settings_that_cannot_work_are_refused_before_anything_is_connected() {
    const MS: Duration = Duration::from_millis(1);
    let good = || config("host=localhost user=app");
    let cases = [
        (good().lease(100 * MS), "lease is 100ms; it must be between"),
        (good().lease(Duration::MAX), "lease is"),
        (good().heartbeat(10_000 * MS), "lengthen lease"),
        (good().heartbeat_timeout(10_000 * MS), "lengthen lease"),
        (good().margin(5_000 * MS), "lengthen lease"),
        (good().margin(Duration::ZERO), "margin is 0ns; it must be between"),
        (good().heartbeat(Duration::ZERO), "heartbeat is 0ns"),
        (good().heartbeat_timeout(Duration::ZERO), "heartbeat_timeout is 0ns"),
        (good().connect_timeout(Duration::ZERO), "connect_timeout is 0ns"),
        (good().connect_timeout(Duration::MAX), "connect_timeout is"),
        (good().release_timeout(Duration::ZERO), "release_timeout is 0ns"),
        (good().wait_slice(Duration::ZERO), "wait_slice is 0ns"),
        (good().wait_slice(Duration::MAX), "wait_slice is"),
        (good().idle_timeout(Duration::ZERO), "idle_timeout is 0ns"),
        (good().max_sessions(0), "max_sessions is 0"),
        (good().max_sessions(u32::MAX), "max_sessions is 4294967295"),
        (good().namespace("a\0b"), "namespace contains a NUL"),
        (good().service("a\0b"), "service contains a NUL"),
        (good().service(""), "service is empty"),
        (good().service_build("a\0b"), "build contains a NUL"),
        (config("host=localhost user=app sslmode=require sslcrl=/x"), "Config::tls"),
        (config("user=app"), "do not fit together"),
        (config("host=a,b,c port=1,2 user=app"), "do not fit together"),
    ];
    for (config, advice) in cases {
        let error = PostgresManager::new(config).expect_err(advice);
        assert_tells(&error, ErrorKind::InvalidConfig, &[advice]);
    }
    for url in ["postgres://[", "nonsense", "postgres://a/b?c"] {
        let error = Config::from_url(url).expect_err(url);
        assert_tells(&error, ErrorKind::InvalidConfig, &["postgres://user:password@host:5432/database"]);
    }
    for url in ["host=a port=many", "postgres://a/b?sslmode=perhaps"] {
        let error = Config::from_url(url).expect_err(url);
        assert_tells(&error, ErrorKind::InvalidConfig, &["of the connection string"]);
        assert!(error.source().is_none(), "the driver would repeat what it does not understand");
    }
}

/// Not a test: the body of the processes that [`variables_that_cannot_be_understood_are_named`] starts, each with another
/// environment. What the environment gives is told by a line on the standard output.
#[test]
#[ignore = "the body of a process, which another test starts"]
fn reader_of_the_environment() {
    if common::role().is_some() {
        match Config::from_env() {
            Ok(_) => println!("understood"),
            Err(error) => println!("refused: {:?}: {error}", error.kind()),
        }
    }
}

#[test]
fn variables_that_cannot_be_understood_are_named() {
    let read = |name: &str, value: OsString| {
        let mut process = common::process("bad_input::reader_of_the_environment", "reader");
        common::Process::start(process.env(name, value)).succeeds()
    };
    let not_utf8 = || OsString::from_vec(b"caf\xe9".to_vec());
    let cases = [
        ("DATABASE_URL", OsString::from("postgres://["), "cannot be used"),
        ("DATABASE_URL", not_utf8(), "not UTF-8"),
        ("PGHOST", not_utf8(), "not UTF-8"),
        ("PGPASSWORD", not_utf8(), "not UTF-8"),
        ("DSYNC_SERVICE", not_utf8(), "not UTF-8"),
        ("PGHOSTADDR", "localhost".into(), "it should be an IP address"),
        ("PGPORT", "70000".into(), "it should be a port number"),
        ("PGCONNECT_TIMEOUT", "soon".into(), "it should be a number of seconds"),
        ("PGSSLMODE", "allow".into(), "say disable, prefer or require"),
        ("PGSSLNEGOTIATION", "no".into(), "it should be one of postgres, direct"),
        ("PGCHANNELBINDING", "no".into(), "it should be one of disable, prefer, require"),
        ("PGTARGETSESSIONATTRS", "standby".into(), "locks need the primary"),
        ("DSYNC_CATALOG", "maybe".into(), "it should be one of automatic, must-exist, none"),
        ("DSYNC_MAX_SESSIONS", "many".into(), "it should be a number, like 20"),
        ("DSYNC_MAX_SESSIONS", "-1".into(), "it should be a number, like 20"),
        ("DSYNC_LEASE", "15".into(), "it should be a duration, like 15s"),
        ("DSYNC_MARGIN", "-1s".into(), "it should be a duration"),
        ("DSYNC_HEARTBEAT", "x".into(), "it should be a duration"),
        ("DSYNC_HEARTBEAT_TIMEOUT", "1 parsec".into(), "it should be a duration"),
        ("DSYNC_WAIT_SLICE", "".into(), "understood"),
        ("DSYNC_WAIT_SLICE", "s".into(), "it should be a duration"),
        ("DSYNC_CONNECT_TIMEOUT", "s".into(), "it should be a duration"),
        ("DSYNC_RELEASE_TIMEOUT", "s".into(), "it should be a duration"),
        ("DSYNC_IDLE_TIMEOUT", "s".into(), "it should be a duration"),
        ("DSYNC_LEASE", "15s".into(), "understood"),
    ];
    for (name, value, told) in cases {
        let case = format!("{name}={value:?}");
        let said = read(name, value);
        assert!(said.contains(told), "{case}: {said}");
        if told != "understood" {
            assert!(said.contains("refused: InvalidConfig") && said.contains(name), "{case}: {said}");
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Servers that refuse
// ---------------------------------------------------------------------------------------------------------------------

#[test]
fn what_the_server_refuses_is_told_at_start_and_works_once_it_is_put_right() {
    let server = Server::builder().password_auth().start().unwrap();
    let mut administrator = server.client().unwrap();
    for statement in [
        "CREATE ROLE app LOGIN PASSWORD 'right'",
        "CREATE ROLE nologin PASSWORD 'right'",
        "CREATE DATABASE closed",
        "REVOKE CONNECT ON DATABASE closed FROM PUBLIC",
    ] {
        administrator.batch_execute(statement).unwrap();
    }
    let url =
        |user: &str, database: &str| format!("postgres://{user}@127.0.0.1:{}/{database}", server.port());
    let cases = [
        (
            url("app:guess", "postgres"),
            "28P01",
            "check user and password",
            "ALTER ROLE app PASSWORD 'guess'; ALTER ROLE nologin PASSWORD 'guess'",
        ),
        (
            url("app:guess", "nowhere"),
            "3D000",
            "create the database, or name another",
            "CREATE DATABASE nowhere",
        ),
        (
            url("nologin:guess", "postgres"),
            "28000",
            "check the user, and the server's pg_hba",
            "ALTER ROLE nologin LOGIN",
        ),
        (
            url("app:guess", "closed"),
            "42501",
            "grant the role what it lacks",
            "GRANT CONNECT ON DATABASE closed TO app",
        ),
    ];
    for (url, sqlstate, advice, cure) in cases {
        let manager = Arc::new(PostgresManager::new(config(&url).catalog(CatalogMode::None)).unwrap());
        let error = start_refused(&manager);
        assert_tells(&error, ErrorKind::SessionRefused, &[advice, &format!("127.0.0.1:{}", server.port())]);
        assert_eq!(error.sqlstate(), Some(sqlstate), "{error}");
        administrator.batch_execute(cure).unwrap();
        manager.start().unwrap();
        assert_works(&manager);
    }

    let no_password = Arc::new(PostgresManager::new(config(&url("app", "postgres"))).unwrap());
    let error = start_refused(&no_password);
    assert_tells(&error, ErrorKind::SessionRefused, &["password missing", "PGPASSWORD"]);
}

/// A manager that runs hears of the refusal with the next session that it wants, and the lock that it has stays.
#[test]
fn what_the_server_refuses_later_is_told_at_once_and_works_once_it_is_put_right() {
    let server = Server::start().unwrap();
    let mut administrator = server.client().unwrap();
    administrator.batch_execute("CREATE ROLE app LOGIN").unwrap();
    let url = format!("postgres://app@127.0.0.1:{}/postgres", server.port());
    let manager = started(config(&url).catalog(CatalogMode::None));
    let (held, wanted) = (lock(&manager, "held"), lock(&manager, "wanted"));
    held.lock(&soon()).unwrap();
    administrator.batch_execute("ALTER ROLE app NOLOGIN").unwrap();

    let error = try_lock_in_time(&wanted, &soon());
    assert_tells(&error, ErrorKind::SessionRefused, &["not permitted to log in", "check the user"]);
    assert_eq!(error.sqlstate(), Some("28000"));
    // Patience is what `lock` is for, so it is the deadline that ends it.
    let error = wanted.lock(&briefly()).unwrap_err();
    assert_tells(&error, ErrorKind::TimedOut, &["waited", "not permitted to log in", "check the user"]);
    assert_eq!(error.sqlstate(), Some("28000"));
    assert!(is_held(&held) && !is_held(&wanted));

    administrator.batch_execute("ALTER ROLE app LOGIN").unwrap();
    eventually("the lock in the background", || is_held(&wanted));
    wanted.try_lock(&soon()).unwrap();
}

#[test]
fn tls_that_the_server_does_not_offer_is_refused() {
    let database = Database::fresh().unwrap();
    let url = format!("{}?sslmode=require", database.url());
    let manager = Arc::new(PostgresManager::new(config(&url).tls(NoTls)).unwrap());
    let error = start_refused(&manager);
    assert_tells(&error, ErrorKind::SessionRefused, &["server does not support TLS", "sslmode"]);
}

#[test]
fn a_pool_that_is_too_small_is_told_and_works_when_there_is_room() {
    let database = Database::fresh().unwrap();
    let manager = started(config(&database.url()).max_sessions(1));
    let (first, second) = (lock(&manager, "first"), lock(&manager, "second"));
    first.try_lock(&soon()).unwrap();
    let advice = "all 1 sessions of this manager are taken; raise max_sessions, or release locks";
    assert_tells(&try_lock_in_time(&second, &soon()), ErrorKind::PoolExhausted, &[advice]);
    assert_tells(&second.lock(&briefly()).unwrap_err(), ErrorKind::TimedOut, &[advice]);
    assert!(is_held(&first) && !is_held(&second));

    first.release().unwrap();
    eventually("the lock in the background", || is_held(&second));
    assert_eq!(kind(first.try_lock(&soon())), ErrorKind::PoolExhausted);
    first.release().unwrap();
    second.release().unwrap();
    assert_works(&manager);
}

// ---------------------------------------------------------------------------------------------------------------------
// The catalog
// ---------------------------------------------------------------------------------------------------------------------

/// The grants that the first lines of [`CATALOG_SQL`] name for a role that uses locks.
fn grants(role: &str) -> String {
    let block = CATALOG_SQL.lines().skip_while(|line| !line.starts_with("--     GRANT "));
    let grants = block.map_while(|line| line.strip_prefix("--     ")).collect::<Vec<_>>().join("\n");
    assert!(grants.contains("ON SCHEMA dsync TO role;"), "the header has changed: {grants}");
    grants.replace(" role;", &format!(" {role};"))
}

#[test]
fn a_role_without_rights_is_sent_to_the_administrator_whose_work_then_helps() {
    let database = Database::fresh().unwrap();
    let mut administrator = database.client().unwrap();
    for role in ["modest", "writer", "onlooker"] {
        administrator.batch_execute(&format!("CREATE ROLE {role} LOGIN")).unwrap();
    }
    let url = database.url().replace("postgres@", "modest@");
    let manager = Arc::new(PostgresManager::new(config(&url)).unwrap());

    let error = start_refused(&manager);
    assert_tells(
        &error,
        ErrorKind::SessionRefused,
        &["may not make the catalog", "dsync::CATALOG_SQL", "none"],
    );
    assert_eq!(error.sqlstate(), Some("42501"));

    let without = started(config(&url).catalog(CatalogMode::None));
    let plain = lock(&without, "x");
    plain.lock(&soon()).unwrap();
    assert_eq!(plain.term().unwrap().token(), None);
    without.stop().unwrap();

    administrator.batch_execute(CATALOG_SQL).unwrap();
    let error = start_refused(&manager);
    assert_tells(
        &error,
        ErrorKind::SessionRefused,
        &["may not use the catalog", "dsync::CATALOG_SQL", "grant"],
    );

    administrator.batch_execute(&grants("modest")).unwrap();
    administrator.batch_execute("REVOKE UPDATE ON dsync.lock FROM modest").unwrap();
    let error = start_refused(&manager);
    assert_tells(&error, ErrorKind::SessionRefused, &["SELECT, INSERT and UPDATE on dsync.lock"]);

    administrator.batch_execute(&grants("modest")).unwrap();
    manager.start().unwrap();
    let lock = lock(&manager, "x");
    lock.lock(&soon()).unwrap();
    let term = lock.term().unwrap();
    assert!(term.token().is_some());

    // What else the header says: what a role needs that only fences, and one that only looks.
    for grant in [
        "USAGE ON SCHEMA dsync TO writer, onlooker",
        "SELECT, UPDATE ON dsync.lock TO writer",
        "SELECT ON dsync.locks, dsync.waiters TO onlooker",
    ] {
        administrator.batch_execute(&format!("GRANT {grant}")).unwrap();
    }
    let client = |role: &str| {
        postgres::Client::connect(&database.url().replace("postgres@", &format!("{role}@")), NoTls).unwrap()
    };
    for role in ["modest", "writer"] {
        let mut client = client(role);
        let mut transaction = client.transaction().unwrap();
        term.fence(&mut transaction).unwrap();
        transaction.commit().unwrap();
        assert!(term.is_current(&mut client).unwrap());
    }
    for role in ["modest", "onlooker"] {
        let count = client(role).query_one("SELECT count(*) FROM dsync.locks WHERE key = 'x'", &[]).unwrap();
        assert_eq!(count.get::<_, i64>(0), 1);
        client(role).query("SELECT * FROM dsync.waiters", &[]).unwrap();
    }
    manager.stop().unwrap();
    for role in ["modest", "writer", "onlooker"] {
        administrator.batch_execute(&format!("DROP OWNED BY {role}; DROP ROLE {role}")).unwrap();
    }
}

#[test]
fn a_catalog_that_must_exist_is_not_made() {
    let database = Database::fresh().unwrap();
    let manager =
        Arc::new(PostgresManager::new(config(&database.url()).catalog(CatalogMode::MustExist)).unwrap());
    let error = start_refused(&manager);
    assert_tells(&error, ErrorKind::SessionRefused, &["the catalog is not there", "dsync::CATALOG_SQL"]);
    let mut administrator = database.client().unwrap();
    let there = "SELECT count(*) FROM pg_namespace WHERE nspname = 'dsync'";
    assert_eq!(administrator.query_one(there, &[]).unwrap().get::<_, i64>(0), 0);

    administrator.batch_execute(CATALOG_SQL).unwrap();
    administrator.batch_execute(CATALOG_SQL).expect("running it again does no harm");
    manager.start().unwrap();
    assert_works(&manager);
}

// ---------------------------------------------------------------------------------------------------------------------
// Servers that cannot be reached, or are none
// ---------------------------------------------------------------------------------------------------------------------

/// The answer to a connect is an error: the port is ours, so nobody else listens there, and we do not listen either.
#[test]
fn a_closed_port_is_waited_for_and_told() {
    let closed = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    closed.bind(&SockAddr::from("127.0.0.1:0".parse::<std::net::SocketAddr>().unwrap())).unwrap();
    let port = closed.local_addr().unwrap().as_socket().unwrap().port();
    let manager = Arc::new(started(config(&format!("host=127.0.0.1 port={port} user=app"))));
    let lock = lock(&manager, "x");
    let error = try_lock_in_time(&lock, &briefly());
    let address = format!("127.0.0.1:{port}");
    assert_tells(
        &error,
        ErrorKind::TimedOut,
        &[&address, "refused", "check host and port, and that the server runs"],
    );
    let cause = error.source().and_then(|cause| cause.downcast_ref::<Error>()).unwrap();
    assert_eq!(cause.kind(), ErrorKind::SessionUnavailable);
    assert_ends_in_time(manager, lock);
}

#[test]
fn a_host_name_that_does_not_exist_is_waited_for_and_told() {
    let manager = in_time(|| Arc::new(started(hasty("host=no-such-host.invalid user=app"))));
    let lock = lock(&manager, "x");
    let error = try_lock_in_time(&lock, &Context::timeout(Duration::from_secs(5)));
    assert_tells(&error, ErrorKind::TimedOut, &["no-such-host.invalid", "check host and port"]);
    assert_ends_in_time(manager, lock);
}

#[test]
fn a_server_that_is_down_at_the_start_is_waited_for() {
    let server = Server::start().unwrap();
    server.stop(Shutdown::Fast).unwrap();
    let manager = Arc::new(started(config(&server.url())));
    let (waiting, later) = (lock(&manager, "x"), lock(&manager, "y"));
    let error = try_lock_in_time(&waiting, &briefly());
    assert_tells(&error, ErrorKind::TimedOut, &["check host and port, and that the server runs"]);
    server.start_again().unwrap();
    eventually("the lock in the background", || is_held(&waiting));
    later.try_lock(&soon()).unwrap();
}

/// As a host that swallows packets, and then does so no longer.
#[test]
fn a_server_that_does_not_answer_is_waited_for() {
    let server = Server::start().unwrap();
    let frozen = server.freeze().unwrap();
    // Time enough for a session when it answers again, on a busy machine too.
    let settings = config(&server.url()).connect_timeout(Duration::from_secs(1));
    let manager = in_time(move || Arc::new(started(settings)));
    let (waiting, released) = (lock(&manager, "x"), lock(&manager, "y"));
    let error = try_lock_in_time(&waiting, &Context::timeout(Duration::from_secs(2)));
    assert_tells(&error, ErrorKind::TimedOut, &["did not answer", "check host and port"]);
    let error = try_lock_in_time(&released, &briefly());
    assert_tells(&error, ErrorKind::TimedOut, &["waited"]);
    in_time(move || released.release()).unwrap();
    frozen.thaw();
    eventually("the lock in the background", || is_held(&waiting));
}

/// What is no PostgreSQL does with a connection.
type Manners = fn(&mut TcpStream) -> Hold;

/// Whether the connection stays open.
enum Hold {
    Open,
    Close,
}

/// A listener with these manners, for as long as the test's process runs. Its port.
fn impostor(manners: Manners) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        let mut open = Vec::new();
        for mut stream in listener.incoming().flatten() {
            if let Hold::Open = manners(&mut stream) {
                open.push(stream);
            }
        }
    });
    port
}

#[test]
fn what_is_no_postgresql_is_told_in_time() {
    const CHECK: &[&str] = &["; check host and port, and that the server runs"];
    let waited_for: [(&str, &[&str], Manners); 2] = [
        ("says nothing", CHECK, |_| Hold::Open),
        // The one or the other, by whether our first words get there before it has closed.
        (
            "closes at once",
            &["; check host and port", "; the server closed the connection; see its log"],
            |_| Hold::Close,
        ),
    ];
    for (what, advice, manners) in waited_for {
        let url = format!("host=127.0.0.1 port={} user=app", impostor(manners));
        // It may be a server that has trouble, so it is no failure to start.
        let manager = in_time(move || Arc::new(started(hasty(&url))));
        let lock = lock(&manager, "x");
        let error = try_lock_in_time(&lock, &Context::timeout(Duration::from_secs(5)));
        println!("{what}: {error}");
        assert_tells(&error, ErrorKind::TimedOut, &["127.0.0.1:"]);
        assert!(advice.iter().any(|advice| error.to_string().contains(advice)), "{what}: {error}");
        assert_ends_in_time(manager, lock);
    }
}

#[test]
fn what_answers_in_another_protocol_is_refused() {
    let others: [(&str, Manners); 4] = [
        ("HTTP", |stream| {
            let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n");
            Hold::Open
        }),
        ("SSH", |stream| {
            let _ = stream.write_all(b"SSH-2.0-OpenSSH_9.2\r\n");
            Hold::Open
        }),
        ("a message that cannot be", |stream| {
            let _ = stream.write_all(b"R\0\0\0\x01garbage");
            Hold::Open
        }),
        ("zeros", |stream| {
            let _ = stream.write_all(&[0; 4096]);
            Hold::Open
        }),
    ];
    for (what, manners) in others {
        let url = format!("host=127.0.0.1 port={} user=app", impostor(manners));
        let manager = Arc::new(PostgresManager::new(config(&url)).unwrap());
        let error = start_refused(&manager);
        println!("{what}: {error}");
        assert_tells(
            &error,
            ErrorKind::SessionRefused,
            &["does not speak PostgreSQL's protocol", "check host and port"],
        );
    }
}

/// It takes everybody for a user that has given the right password, and answers each question with nothing.
#[test]
fn what_speaks_the_protocol_without_being_postgresql_is_refused() {
    let manners: Manners = |stream| {
        let mut question = [0; 4096];
        let answers: [&[u8]; 2] = [b"R\0\0\0\x08\0\0\0\0Z\0\0\0\x05I", b"I\0\0\0\x04Z\0\0\0\x05I"];
        for answer in answers {
            let _ = stream.read(&mut question);
            let _ = stream.write_all(answer);
        }
        Hold::Open
    };
    let url = format!("host=127.0.0.1 port={} user=app sslmode=disable", impostor(manners));
    let manager = Arc::new(PostgresManager::new(config(&url)).unwrap());
    let error = start_refused(&manager);
    assert_tells(
        &error,
        ErrorKind::SessionRefused,
        &["does not answer as PostgreSQL does", "check host and port"],
    );
}

/// The kernel answers no more connects, as a host that swallows packets does not.
#[test]
fn a_listener_with_a_full_backlog_is_told_in_time() {
    let host = SilentHost::new();
    let url = format!("host=127.0.0.1 port={} user=app", host.port());
    let manager = in_time(move || Arc::new(started(hasty(&url))));
    let lock = lock(&manager, "x");
    let error = try_lock_in_time(&lock, &Context::timeout(Duration::from_secs(1)));
    assert_tells(
        &error,
        ErrorKind::TimedOut,
        &["127.0.0.1:", "; check host and port, and that the server runs"],
    );
    assert_ends_in_time(manager, lock);
}
