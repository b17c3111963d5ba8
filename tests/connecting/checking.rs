//! What `check` reports of servers, roles and poolers, of broken ones above all.

use std::time::{Duration, Instant};

use dsync::{
    CATALOG_SQL, CatalogMode, CheckLine, CheckReport, Config, PostgresManager, SyncManager, Verdict,
};
use parking_lot::Mutex;
use postgres::{Client, NoTls};
use support::pgbouncer::{self, PoolMode};
use support::{Database, Replication, Server, Shutdown};

use crate::common::{SilentHost, becomes, begin, eventually, is_held, lock, soon, started};

/// The report is good while a round trip takes no more than a twelfth of it, which has to do for a busy machine, too.
const CONNECT: Duration = Duration::from_secs(15);

fn config(url: &str) -> Config {
    Config::from_url(url).unwrap().connect_timeout(CONNECT).release_timeout(Duration::from_secs(20))
}

fn as_user(database: &Database<'_>, user: &str) -> Config {
    let mut postgres: postgres::Config = database.url().parse().unwrap();
    postgres.user(user);
    Config::from_postgres(postgres).connect_timeout(CONNECT)
}

/// The report of a check that ends in time.
fn check(config: Config) -> CheckReport {
    let report = begin(move || config.check()).get();
    println!("{report}");
    report
}

fn line<'a>(report: &'a CheckReport, topic: &str) -> &'a CheckLine {
    report.lines.iter().find(|line| line.topic == topic).unwrap_or_else(|| panic!("no {topic}: {report}"))
}

/// What one line of the report says, and what it advises.
fn says(report: &CheckReport, topic: &str, verdict: Verdict, texts: &[&str]) {
    let line = line(report, topic);
    assert_eq!(line.verdict, verdict, "{report}");
    assert_eq!(line.advice.is_some(), verdict != Verdict::Good, "{report}");
    let all = format!("{} {}", line.text, line.advice.as_deref().unwrap_or_default());
    for text in texts {
        assert!(all.contains(text), "{text:?} is missing: {all}");
    }
}

/// The topics of the lines that are not good.
fn complaints(report: &CheckReport) -> Vec<&'static str> {
    let bad = report.lines.iter().filter(|line| line.verdict != Verdict::Good);
    bad.map(|line| line.topic).collect()
}

/// Waits until no more than so many sessions are left, the operator's among them: the server takes a moment to end those of before, and counts
/// them.
fn only(operator: &Mutex<Client>, sessions: i64) {
    let query = "SELECT sum(numbackends) FROM pg_stat_database";
    becomes("the sessions", &sessions, || operator.lock().query_one(query, &[]).unwrap().get::<_, i64>(0));
}

const ALL: [&str; 11] = [
    "connection",
    "server",
    "primary",
    "role",
    "catalog",
    "lease",
    "clients",
    "connections",
    "locks",
    "replication",
    "sessions",
];

fn topics(report: &CheckReport) -> Vec<&'static str> {
    report.lines.iter().map(|line| line.topic).collect()
}

// ---------------------------------------------------------------------------------------------------------------------
// What is as it should be
// ---------------------------------------------------------------------------------------------------------------------

#[test]
fn a_server_that_is_well_has_a_good_report_and_is_left_as_it_was() {
    let server = Server::start().unwrap();
    let database = server.database().unwrap();
    let has_schema = || {
        let query = "SELECT EXISTS (SELECT FROM pg_namespace WHERE nspname = 'dsync')";
        database.client().unwrap().query_one(query, &[]).unwrap().get::<_, bool>(0)
    };
    for url in [database.url(), database.unix_url()] {
        let report = check(config(&url));
        assert_eq!((report.worst(), topics(&report)), (Verdict::Good, ALL.to_vec()), "{report}");
        says(&report, "server", Verdict::Good, &[&format!("PostgreSQL {}", server.version())]);
        says(&report, "catalog", Verdict::Good, &["not there yet"]);
        says(&report, "lease", Verdict::Good, &["15s"]);
        says(&report, "sessions", Verdict::Good, &["exclude each other", "nothing stands between"]);
        says(&report, "connection", Verdict::Good, &["connected as postgres", "a round trip takes"]);
    }
    assert!(!has_schema(), "a check makes nothing");

    // While a claim has the manager's only session.
    let manager = started(config(&database.url()).max_sessions(1));
    let x = lock(&manager, "x");
    x.lock(&soon()).unwrap();
    let operator = Mutex::new(server.client().unwrap());
    only(&operator, 2);
    let report = manager.check();
    assert_eq!((report.worst(), topics(&report)), (Verdict::Good, ALL.to_vec()), "{report}");
    says(&report, "catalog", Verdict::Good, &["in the schema dsync"]);
    says(&report, "connections", Verdict::Good, &["may open 1 sessions", "others have 1"]);
    assert!(is_held(&x));

    let report = check(config(&database.url()).catalog(CatalogMode::None).schema("elsewhere"));
    says(&report, "catalog", Verdict::Good, &["none, as the settings say"]);
    let report = check(config(&database.url()).schema("elsewhere"));
    says(&report, "catalog", Verdict::Good, &["not there yet", "elsewhere"]);
}

#[test]
fn a_takeover_grace_is_told_with_what_is_left_of_it_until_it_is_over() {
    const LEASE: Duration = Duration::from_secs(15);
    let server = Server::start().unwrap();
    let settings = || config(&server.url()).lease(LEASE);
    let manager = started(settings());
    let x = lock(&manager, "x");
    x.lock(&soon()).unwrap();
    server.restart(Shutdown::Immediate).unwrap();
    let tells = |report: &CheckReport, text| says(report, "takeover", Verdict::Warning, &[text, "wait"]);

    eventually("the grace", || manager.snapshot().claim("x").is_some_and(|claim| claim.grace_left.is_some()));
    let left = |report: &CheckReport| {
        tells(report, "no lock is granted for another ");
        let text = line(report, "takeover").text.split_once("another ").unwrap().1;
        let text = text.split_whitespace().next().unwrap();
        let unit = if text.ends_with("ms") { 1.0 } else { 1000.0 };
        text.trim_end_matches(['m', 's']).parse::<f64>().unwrap() * unit
    };
    let first = left(&manager.check());
    assert!(first <= 15_000.0, "{first} ms");
    let mut by_manager = first;
    eventually("some of it to pass", || {
        by_manager = left(&manager.check());
        by_manager < first
    });
    // The processes of a machine count it together there.
    if cfg!(target_os = "linux") {
        let by_another = left(&check(settings()));
        assert!(by_another <= by_manager, "{by_another} ms, and before {by_manager} ms");
    }
    eventually("the lock", || is_held(&x));
    for report in [manager.check(), check(settings())] {
        assert_eq!((report.worst(), topics(&report)), (Verdict::Good, ALL.to_vec()), "{report}");
    }

    // To look is not to begin to count.
    manager.stop().unwrap();
    server.restart(Shutdown::Immediate).unwrap();
    for _ in 0..2 {
        tells(&check(settings()), "locks are granted 15.0s after the first request from this machine");
    }
    assert!(!topics(&check(settings().catalog(CatalogMode::None))).contains(&"takeover"));
}

#[test]
fn a_check_works_in_async_code() {
    let manager = PostgresManager::new(config(&Server::shared().url())).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    assert!(runtime.block_on(async { manager.check() }).is_ok());
}

// ---------------------------------------------------------------------------------------------------------------------
// No session
// ---------------------------------------------------------------------------------------------------------------------

#[test]
fn a_server_that_is_stopped_is_a_line_of_the_report_until_it_runs() {
    let server = Server::start().unwrap();
    let manager = PostgresManager::new(config(&server.url())).unwrap();
    server.stop(Shutdown::Fast).unwrap();
    let report = manager.check();
    assert_eq!(topics(&report), ["connection"]);
    says(&report, "connection", Verdict::Wrong, &["refused", "check host and port"]);
    assert!(!report.is_ok());
    server.start_again().unwrap();
    assert!(manager.check().is_ok());
    manager.stop().unwrap();
    let report = manager.check();
    assert_eq!(topics(&report), ["manager"]);
    says(&report, "manager", Verdict::Wrong, &["stopped", "make and start a new one"]);
}

/// Nothing of it waits for longer than it says.
#[test]
fn a_server_that_does_not_answer_is_told_in_time() {
    let server = Server::start().unwrap();
    let time = Duration::from_millis(500);
    let silent = SilentHost::new();
    let silent = config(&server.url_at("127.0.0.1", silent.port())).connect_timeout(time);
    let frozen = config(&server.url()).connect_timeout(time);
    let _frozen = server.freeze().unwrap();
    for config in [silent, frozen] {
        let begun = Instant::now();
        let report = check(config);
        assert!(begun.elapsed() < 3 * time + Duration::from_secs(2), "{:?}", begun.elapsed());
        assert_eq!(topics(&report), ["connection"]);
        says(&report, "connection", Verdict::Wrong, &["did not answer", "connect_timeout"]);
    }
}

#[test]
fn a_session_that_is_refused_is_told_without_the_password() {
    let server = Server::builder().password_auth().start().unwrap();
    let url = |user: &str, database: &str| {
        config(&format!("postgres://{user}@127.0.0.1:{}/{database}", server.port()))
    };
    let report = check(url("postgres:hush-hush", "postgres"));
    says(
        &report,
        "connection",
        Verdict::Wrong,
        &["password authentication failed", "check user and password"],
    );
    assert!(!format!("{report} {report:?}").contains("hush"));
    let password = server.password().unwrap();
    let report = check(url(&format!("postgres:{password}"), "nowhere"));
    says(&report, "connection", Verdict::Wrong, &["nowhere", "create the database"]);
}

#[test]
fn settings_that_cannot_work_are_a_line_of_the_report() {
    let report = check(config(&Server::shared().url()).max_sessions(0));
    assert_eq!(topics(&report), ["settings"]);
    says(&report, "settings", Verdict::Wrong, &["max_sessions is 0", "set at least 1"]);
}

// ---------------------------------------------------------------------------------------------------------------------
// Rights
// ---------------------------------------------------------------------------------------------------------------------

#[test]
fn what_a_role_lacks_is_told_with_what_to_grant() {
    let server = Server::start().unwrap();
    let database = server.database().unwrap();
    let sql = "CREATE ROLE app LOGIN; REVOKE USAGE ON LANGUAGE plpgsql FROM PUBLIC";
    database.client().unwrap().batch_execute(sql).unwrap();
    let app = || as_user(&database, "app");

    let report = check(app());
    assert_eq!(complaints(&report), ["role", "catalog"]);
    says(&report, "role", Verdict::Warning, &["PL/pgSQL", "GRANT USAGE ON LANGUAGE plpgsql TO app"]);
    says(&report, "catalog", Verdict::Wrong, &["app may not make a schema", "CATALOG_SQL"]);
    let report = check(app().catalog(CatalogMode::MustExist));
    says(&report, "catalog", Verdict::Wrong, &["not there or too old", "CATALOG_SQL"]);
    assert!(check(app().catalog(CatalogMode::None)).is_ok());

    database.client().unwrap().batch_execute(CATALOG_SQL).unwrap();
    let report = check(app());
    says(&report, "catalog", Verdict::Wrong, &["may not use the catalog", "grant"]);
    let sql = "GRANT USAGE ON LANGUAGE plpgsql TO app; GRANT USAGE ON SCHEMA dsync TO app;
               GRANT SELECT, INSERT, UPDATE ON ALL TABLES IN SCHEMA dsync TO app;
               GRANT USAGE, UPDATE ON SEQUENCE dsync.token TO app";
    database.client().unwrap().batch_execute(sql).unwrap();
    let report = check(app());
    assert_eq!(report.worst(), Verdict::Good, "{report}");
    says(&report, "catalog", Verdict::Good, &["with all rights"]);

    // An older one, and one that somebody else has a hand in.
    let mut owner = database.client().unwrap();
    owner.batch_execute("UPDATE dsync.version SET version = 4").unwrap();
    says(
        &check(config(&database.url())),
        "catalog",
        Verdict::Warning,
        &["of an older version", "CATALOG_SQL"],
    );
    owner.batch_execute("UPDATE dsync.version SET version = 99").unwrap();
    says(&check(app()), "catalog", Verdict::Wrong, &["has version 99", "upgrade the library"]);
    owner.batch_execute("CREATE ROLE stranger; ALTER TABLE dsync.lock OWNER TO stranger").unwrap();
    let report = check(app());
    assert_eq!(line(&report, "catalog").verdict, Verdict::Wrong);
    assert!(line(&report, "catalog").text.contains("belongs to the role stranger"), "{report}");
}

/// It neither waits for long nor fails as a whole.
#[test]
fn a_catalog_that_somebody_has_locked_is_told_in_time() {
    let server = Server::shared();
    let database = server.database().unwrap();
    let manager = started(config(&database.url()).connect_timeout(Duration::from_secs(8)));
    let mut operator = database.client().unwrap();
    let mut transaction = operator.transaction().unwrap();
    transaction.batch_execute("LOCK TABLE dsync.version IN ACCESS EXCLUSIVE MODE").unwrap();
    let begun = Instant::now();
    let report = manager.check();
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
    assert_eq!((complaints(&report), topics(&report)), (vec!["catalog"], ALL.to_vec()), "{report}");
    says(&report, "catalog", Verdict::Wrong, &["locked by another session", "see pg_locks"]);
}

#[test]
fn the_roles_own_timeouts_are_told_of_connections_that_are_not_the_managers() {
    let server = Server::start().unwrap();
    let sql = "CREATE ROLE app LOGIN; ALTER ROLE app SET statement_timeout = '30s'; ALTER ROLE app SET idle_session_timeout = '1min'";
    server.client().unwrap().batch_execute(sql).unwrap();
    let report = check(as_user(&server.database().unwrap(), "app").catalog(CatalogMode::None));
    assert_eq!(report.worst(), Verdict::Good, "{report}");
    let told = ["idle_session_timeout = 60000 ms, statement_timeout = 30000 ms", "transaction_lock"];
    says(&report, "timeouts", Verdict::Good, &told);
}

// ---------------------------------------------------------------------------------------------------------------------
// Room
// ---------------------------------------------------------------------------------------------------------------------

#[test]
fn sessions_that_the_server_cannot_give_are_told_with_whose_limit_it_is() {
    let server = Server::builder().max_connections(20).start().unwrap();
    let database = server.database().unwrap();
    let sql = format!(
        "CREATE ROLE app LOGIN; CREATE ROLE few LOGIN CONNECTION LIMIT 4; GRANT CREATE ON DATABASE {} TO app, few",
        database.name()
    );
    let operator = Mutex::new(server.client().unwrap());
    operator.lock().batch_execute(&sql).unwrap();
    let wanted_beside = |others, user: &str, sessions| {
        only(&operator, others);
        check(as_user(&database, user).max_sessions(sessions))
    };
    let wanted = |user: &str, sessions| wanted_beside(1, user, sessions);

    says(&wanted("postgres", 21), "connections", Verdict::Wrong, &["21 sessions", "20", "max_connections"]);
    // Three are the superusers'.
    says(
        &wanted("app", 18),
        "connections",
        Verdict::Wrong,
        &["18 sessions", "17", "reserved", "max_connections"],
    );
    let told = ["5 sessions", "the role may have 4", "ALTER ROLE ... CONNECTION LIMIT", "lower max_sessions"];
    says(&wanted("few", 5), "connections", Verdict::Wrong, &told);
    says(&wanted("few", 4), "connections", Verdict::Good, &[]);
    says(&wanted("app", 10), "connections", Verdict::Good, &["10 sessions", "17"]);

    let crowd: Vec<Client> = (0..7).map(|_| database.client().unwrap()).collect();
    let report = wanted_beside(8, "app", 10);
    says(&report, "connections", Verdict::Warning, &["17, of which others have 8 now"]);
    drop(crowd);
    let sql = format!("ALTER DATABASE {} CONNECTION LIMIT 3", database.name());
    operator.lock().batch_execute(&sql).unwrap();
    let told = ["the database allows 3", "ALTER DATABASE ... CONNECTION LIMIT"];
    says(&wanted("app", 4), "connections", Verdict::Wrong, &told);

    // No room for the two that ask: first for one of them, then for both.
    let none = |limit: u32| {
        let sql = format!("ALTER ROLE few CONNECTION LIMIT {limit}");
        operator.lock().batch_execute(&sql).unwrap();
        wanted("few", 1)
    };
    says(&none(1), "sessions", Verdict::Warning, &["a second session", "too many connections for role"]);
    let report = none(0);
    assert_eq!(topics(&report), ["connection"]);
    says(&report, "connection", Verdict::Wrong, &["too many connections for role", "CONNECTION LIMIT"]);
}

#[test]
fn a_table_of_locks_that_is_nearly_full_is_told() {
    let server =
        Server::builder().setting("max_locks_per_transaction", "10").max_connections(20).start().unwrap();
    let mut other = server.client().unwrap();
    other.batch_execute("SELECT pg_advisory_lock(number) FROM generate_series(1, 180) AS number").unwrap();
    let report = check(config(&server.url()).max_sessions(10));
    assert_eq!(complaints(&report), ["locks"]);
    says(&report, "locks", Verdict::Warning, &["room for 200", "max_locks_per_transaction", "pg_locks"]);
    // Whose sessions are shared may want thousands.
    let report = check(config(&server.url()).max_sessions(2).shared_sessions(1));
    says(
        &report,
        "locks",
        Verdict::Warning,
        &["room for 200", "shared sessions can carry some 0 locks", "more"],
    );
}

// ---------------------------------------------------------------------------------------------------------------------
// Standbys and poolers
// ---------------------------------------------------------------------------------------------------------------------

#[test]
fn a_standby_is_told_at_its_own_address_and_beside_its_primary() {
    let primary = Server::start().unwrap();
    says(&check(config(&primary.url())), "replication", Verdict::Good, &["no standby is connected"]);
    let standby = primary.standby(Replication::Asynchronous).unwrap();
    standby.wait_caught_up(&primary).unwrap();
    let report = check(config(&standby.url()));
    assert_eq!(complaints(&report), ["primary"]);
    says(&report, "primary", Verdict::Wrong, &["hot standby", "connect to the primary", "read-write"]);
    says(&report, "server", Verdict::Good, &["PostgreSQL"]);

    let report = check(config(&primary.url()));
    assert_eq!(report.worst(), Verdict::Good, "{report}");
    says(&report, "replication", Verdict::Good, &["1 connected, none of them synchronous"]);
    primary.set("synchronous_standby_names", "gone").unwrap();
    let report = check(config(&primary.url()).catalog(CatalogMode::None));
    assert_eq!(complaints(&report), ["replication"]);
    says(&report, "replication", Verdict::Warning, &["gone", "start the standby"]);
}

#[test]
fn a_pooler_is_told_by_whether_it_keeps_sessions_apart() {
    if support::skip_without(pgbouncer::available()) {
        return;
    }
    let server = Server::start().unwrap();
    for mode in [PoolMode::Transaction, PoolMode::Statement] {
        for size in ["1", "20"] {
            let bouncer = pgbouncer::start_with(&server, mode, &[("default_pool_size", size)]).unwrap();
            let report = check(config(&bouncer.url("postgres")));
            assert_eq!(complaints(&report), ["sessions"], "{mode:?} {size}");
            says(
                &report,
                "sessions",
                Verdict::Wrong,
                &["a pooler in transaction or statement mode", "session mode"],
            );
        }
    }
    let bouncer = pgbouncer::start(&server, PoolMode::Session).unwrap();
    let report = check(config(&bouncer.url("postgres")));
    assert_eq!(report.worst(), Verdict::Good, "{report}");
    says(&report, "sessions", Verdict::Good, &["exclude each other", "a pooler"]);
    bouncer.stop().unwrap();
    // It asks for nothing that a session of the server's needs not have.
    let mut client = Client::connect(&server.url(), NoTls).unwrap();
    let left = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'";
    assert_eq!(client.query_one(left, &[]).unwrap().get::<_, i64>(0), 0);
}
