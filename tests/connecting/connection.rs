//! What a connection string, the environment and the hook for the password lead to: the server that `psql` would reach, or an
//! error that names what is in the way. And no text of any kind gives a password away.

use std::collections::HashSet;
use std::error::Error as StdError;
use std::fmt::Write;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};
use std::sync::{Arc, Mutex, Once, OnceLock};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, unbounded};
use dsync::{CatalogMode, Config, Context, Error, ErrorKind, PostgresManager, SyncManager};
use support::Server;

use crate::common::{self, begin, briefly, eventually, hear, is_held, lock, soon, started};

/// For all that has to end by itself, whatever the hook does. Generous: the machine may be busy.
const BOUND: Duration = Duration::from_secs(15);

// ---------------------------------------------------------------------------------------------------------------------
// Secrets
// ---------------------------------------------------------------------------------------------------------------------

/// The two ends of each password that is tried: no part of one may be seen.
const ENDS: [&str; 2] = ["xQ7hushLeft", "wZ9hushRight"];

/// All that was logged in this process.
static LOGGED: Mutex<String> = Mutex::new(String::new());

struct Logger;

impl log::Log for Logger {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        writeln!(LOGGED.lock().unwrap(), "{} {}", record.target(), record.args()).unwrap();
    }

    fn flush(&self) {}
}

fn capture_the_log() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        log::set_logger(&Logger).unwrap();
        log::set_max_level(log::LevelFilter::Trace);
    });
}

/// The error as people and programs get to see it, with all that it is from.
fn shown(error: &Error) -> String {
    let mut shown = format!("{error} {error:#} {error:?} {error:#?}");
    let mut cause = error.source();
    while let Some(error) = cause {
        write!(shown, " {error} {error:#} {error:?} {error:#?}").unwrap();
        cause = error.source();
    }
    shown
}

fn assert_hushed(text: &str, case: &str) {
    for end in ENDS {
        assert!(!text.contains(end), "{case}: {text}");
    }
}

/// Connection strings of many forms, right and wrong, with a password that has `character` in its middle.
fn strings(character: &str) -> Vec<String> {
    let password = format!("{}{character}{}", ENDS[0], ENDS[1]);
    let address = "127.0.0.1:1/app";
    let url = format!("postgres://app:{password}@{address}");
    let mut strings = vec![
        format!(" {url}"),
        format!("{url}\n"),
        format!("\"{url}\""),
        format!("'{url}'"),
        format!("`{url}`"),
        format!("psql {url}"),
        format!("psql '{url}'"),
        format!("DATABASE_URL={url}"),
        format!("export DATABASE_URL=\"{url}\""),
        format!("url: {url}"),
        format!("\u{feff}{url}"),
        format!("{url}?schema=public"),
        format!("{url}?sslmode=verify-full"),
        format!("{url}?application_name=a@b"),
        url.replace("app:", ":"),
        url.replace("app:", "app@corp:"),
        url.replace("postgres://", "postgresql+psycopg2://"),
        url.replace("postgres://", "jdbc:postgresql://"),
        url.replace("postgres://", "mysql://"),
        url.replace("postgres://", "POSTGRES://"),
        url.replace("postgres://", "postgres:/"),
        url.replace("postgres://", "postgres:"),
        url.replace("postgres://", "//"),
        url.replace("postgres://", ""),
        url.replace("127.0.0.1", "::1"),
        url.replace("127.0.0.1", "[::1"),
        url.replace("127.0.0.1", "a b"),
        url.replace(":1/", ":many/"),
        url.replace("/app", ""),
        format!("jdbc:postgresql://{address}?user=app&password={password}"),
        format!("postgres://{address}?user=app&password={password}"),
        format!("postgres://{address}?user=app&pass={password}"),
        format!("postgres://{address}?{password}"),
        format!("postgres://{address}?{password}=1"),
        format!("host=127.0.0.1 port=1 user=app password={password}"),
        format!("host=127.0.0.1 port=1 user=app password='{password}"),
        format!("host=127.0.0.1 port=1 user=app password='{password}' x"),
        format!("host=127.0.0.1 port=1 user=app {password}"),
        format!("host=127.0.0.1 port=1 user=app {password}=1"),
        format!("password={password} host=127.0.0.1 port=1"),
        password.clone(),
        url,
    ];
    // Where something else should stand.
    let others = "port hostaddr connect_timeout keepalives keepalives_idle keepalives_interval keepalives_count \
                  keepalives_retries tcp_user_timeout sslmode sslnegotiation channel_binding target_session_attrs \
                  load_balance_hosts sslrootcert sslpassword passfile service require_auth requirepeer replication \
                  min_protocol_version gssencmode oauth_client_secret scram_client_key client_encoding";
    for name in others.split_whitespace() {
        strings.push(format!("host=127.0.0.1 port=1 {name}={password}"));
        strings.push(format!("postgres://{address}?{name}={password}"));
    }
    strings
}

#[test]
fn no_error_no_debug_text_and_no_log_gives_a_password_away() {
    capture_the_log();
    let (mut refused, mut tried) = (0, HashSet::new());
    let characters = [
        "", "@", "#", "/", "?", ":", "%", "&", "=", ",", ";", " ", "'", "\"", "\\", "[", "]", "\n", "\t",
        "+", "|", "ß", "://", "@/", "/@", "#@", "?@", "@?", ":@", "@:1/", "%00", "%zz", "@@", "?a=", "&a=",
    ];
    for character in characters {
        for text in strings(character) {
            let config = match Config::from_url(&text) {
                Ok(config) => config.catalog(CatalogMode::None).connect_timeout(Duration::from_millis(300)),
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::InvalidConfig);
                    assert_hushed(&shown(&error), &text);
                    refused += 1;
                    continue;
                }
            };
            let debug = format!("{config:?} {config:#?}");
            assert_hushed(&debug, &text);
            let manager = match PostgresManager::new(config) {
                Ok(manager) => manager,
                Err(error) => {
                    assert_hushed(&shown(&error), &text);
                    continue;
                }
            };
            // What differs in the password alone fails in the same way.
            if !tried.insert(debug) {
                continue;
            }
            if let Err(error) = manager.start() {
                assert_hushed(&shown(&error), &text);
            } else {
                let lock = lock(&manager, "x");
                let error = lock.lock(&Context::timeout(Duration::from_millis(20))).unwrap_err();
                assert_hushed(&shown(&error), &text);
                assert_hushed(&format!("{manager:?} {lock:?}"), &text);
            }
            manager.stop().unwrap();
        }
    }
    assert!(refused > 1_000 && tried.len() > 5, "{refused} refused, {} tried", tried.len());
    let logged = LOGGED.lock().unwrap();
    assert!(logged.contains("the lock server cannot be reached"), "{logged}");
    assert_hushed(&logged, "the log");
}

// ---------------------------------------------------------------------------------------------------------------------
// The environment
// ---------------------------------------------------------------------------------------------------------------------

/// Not a test: the body of processes that take a lock on the server that their environment leads to, and say what came of it.
#[test]
#[ignore = "the body of a process, which another test starts"]
fn locker_of_the_environment() {
    if common::role().is_none() {
        return;
    }
    capture_the_log();
    // Twice, as by a program with two managers: what it is warned of, it is warned of once.
    let outcome = Config::from_env().and_then(|_| Config::from_env()).and_then(|config| {
        let manager = PostgresManager::new(config.catalog(CatalogMode::None))?;
        manager.start()?;
        let held = lock(&manager, "x");
        held.lock(&soon())?;
        held.release()?;
        manager.stop()
    });
    match outcome {
        Ok(()) => println!("locked"),
        Err(error) => println!("failed: {error:#}"),
    }
    println!("logged: {}", LOGGED.lock().unwrap());
}

pub(crate) type Variables<'a> = &'a [(&'a str, &'a str)];

pub(crate) fn lock_in(variables: Variables<'_>) -> String {
    let mut process = common::process("connection::locker_of_the_environment", "locker");
    common::Process::start(process.envs(variables.iter().copied())).succeeds()
}

#[test]
fn the_environment_leads_where_it_leads_psql_or_the_variable_in_the_way_is_named() {
    let server = Server::builder().password_auth().start().unwrap();
    let (port, password) = (server.port().to_string(), server.password().unwrap().to_owned());
    let address =
        [("PGHOST", "127.0.0.1"), ("PGPORT", &*port), ("PGUSER", "postgres"), ("PGPASSWORD", &*password)];
    let url = server.url();
    let bare = "postgres://127.0.0.1/postgres";
    let mounted = format!("{url}\n");
    let quoted = format!("\"{url}\"");
    let no_tls = if common::HAS_TLS { "switch TLS on at the server" } else { "the features tls-rustls-ring" };
    let cases: &[(Variables<'_>, Variables<'_>, &str)] = &[
        (&address, &[], "locked"),
        (&[], &[("DATABASE_URL", &*url)], "locked"),
        (&[], &[("DATABASE_URL", &*mounted)], "locked"),
        // The URL leaves port, user and password to the variables.
        (&address, &[("DATABASE_URL", bare)], "locked"),
        (&address, &[("PGTZ", "UTC"), ("PGKRBSRVNAME", "x"), ("PGCLIENTENCODING", "LATIN1")], "locked"),
        (&address, &[("PGSERVICE", "prod")], "PGSERVICE cannot be used"),
        (&address, &[("PGREQUIRESSL", "1")], no_tls),
        (&address, &[("PGSSLROOTCERT", "/nowhere/ca.pem")], "PGSSLROOTCERT"),
        (&address, &[("PGSSLMODE", "allow")], "PGSSLMODE cannot be used"),
        (&address, &[("PGREQUIREAUTH", "scram-sha-256")], "PGREQUIREAUTH cannot be used"),
        (&address, &[("PGTARGETSESSIONATTRS", "standby")], "locks need the primary"),
        (&address, &[("PGHOST", "ss#word@127.0.0.1")], "PGHOST cannot be used"),
        (&[], &[("DATABASE_URL", &*url), ("PGSSLMODE", "require")], no_tls),
        (&[], &[("DATABASE_URL", &*url), ("PGSSLMODE", "verify-ca")], "PGSSL"),
        (&[], &[("DATABASE_URL", &*url), ("PGCHANNELBINDING", "require")], "channel_binding"),
        (&address[..3], &[("PGPASSFILE", "/nowhere")], "password"),
        (&[], &[("DATABASE_URL", &*quoted)], "DATABASE_URL cannot be used: it stands in quotes"),
    ];
    for (variables, more, told) in cases {
        let variables = [*variables, *more].concat();
        let said = lock_in(&variables);
        assert!(said.contains(told), "{more:?}: {said}");
        assert!(!said.contains(&password), "{more:?}: {said}");
        assert_eq!(said.contains("locked"), *told == "locked", "{more:?}: {said}");
    }
}

#[test]
fn the_password_file_has_the_password_of_each_session_unless_others_can_read_it() {
    let server = Server::builder().password_auth().start().unwrap();
    let (port, password) = (server.port().to_string(), server.password().unwrap().to_owned());
    let file = std::env::temp_dir().join(format!("dsync-pgpass-{}", std::process::id()));
    std::fs::write(&file, format!("elsewhere:*:*:*:no\n127.0.0.1:{port}:*:postgres:{password}\n")).unwrap();
    let file = file.to_str().unwrap();
    let variables =
        [("PGHOST", "127.0.0.1"), ("PGPORT", &*port), ("PGUSER", "postgres"), ("PGPASSFILE", file)];
    for (mode, works) in [(0o600, true), (0o640, false), (0o400, true)] {
        std::fs::set_permissions(file, std::fs::Permissions::from_mode(mode)).unwrap();
        let said = lock_in(&variables);
        assert_eq!(said.contains("locked"), works, "{mode:o}: {said}");
        assert_eq!(said.contains("chmod 0600"), !works, "{mode:o}: {said}");
        assert!(!said.contains(&password), "{said}");
    }

    // A password that was changed is used from the next session on.
    let url = format!("postgres://postgres@127.0.0.1:{port}/postgres?passfile={file}");
    std::fs::set_permissions(file, std::fs::Permissions::from_mode(0o600)).unwrap();
    let manager = started(Config::from_url(&url).unwrap());
    let held = lock(&manager, "x");
    held.lock(&soon()).unwrap();
    let lost = held.lost();
    let mut administrator = server.client().unwrap();
    administrator.batch_execute("ALTER ROLE postgres PASSWORD 'another'").unwrap();
    std::fs::write(file, "*:*:*:*:another\n").unwrap();
    let end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
               WHERE client_addr IS NOT NULL AND pid <> pg_backend_pid()";
    administrator.batch_execute(end).unwrap();
    hear(&lost);
    eventually("the claim comes back", || is_held(&held));
    std::fs::remove_file(file).unwrap();
}

#[test]
fn a_variable_that_nobody_reads_is_warned_of_by_its_name_alone() {
    let server = Server::shared();
    let url = server.url();
    let said = lock_in(&[
        ("DATABASE_URL", &url),
        ("DSYNC_LAESE", "5s-typo"),
        ("dsync_lease", "6s-typo"),
        ("DSYNC_HEARTBEATTIMEOUT", "8s-typo"),
        ("DSYNC_COLOUR", "9s-typo"),
        ("DSYNC_LEASE", "7s"),
        ("DSYNC_MARGIN", ""),
    ]);
    assert!(said.contains("locked"), "{said}");
    for (name, meant) in [
        ("DSYNC_LAESE", " (did you mean DSYNC_LEASE?);"),
        ("dsync_lease", " (did you mean DSYNC_LEASE?);"),
        ("DSYNC_HEARTBEATTIMEOUT", " (did you mean DSYNC_HEARTBEAT_TIMEOUT?);"),
        ("DSYNC_COLOUR", ";"),
    ] {
        let told = format!("the environment variable {name} is not one that is read{meant}");
        assert_eq!(said.matches(&told).count(), 1, "{said}");
    }
    assert!(!said.contains("-typo") && !said.contains("variable DSYNC_LEASE "), "{said}");
    assert!(!said.contains("DSYNC_MARGIN"), "{said}");
}

/// Whoever tests a service with the servers of these tests has them set.
#[test]
fn variables_of_the_tests_and_tools_are_not_warned_of() {
    let mut names = Vec::new();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut folders: Vec<_> =
        ["tests/support", "xtask", "tests/public_api.rs"].map(|path| root.join(path)).into();
    while let Some(path) = folders.pop() {
        if path.is_dir() {
            folders.extend(std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = std::fs::read_to_string(&path).unwrap();
            let words = text.split(|letter: char| !letter.is_ascii_uppercase() && letter != '_');
            names
                .extend(words.filter(|word| word.starts_with("DSYNC_") && word.len() > 6).map(str::to_owned));
        }
    }
    names.sort();
    names.dedup();
    assert!(names.iter().any(|name| name == "DSYNC_PG_VERSION"), "{names:?}");
    let server = Server::shared();
    let url = server.url();
    let mut variables = vec![("DATABASE_URL", &*url)];
    variables.extend(names.iter().map(|name| (&**name, "")));
    let said = lock_in(&variables);
    assert!(said.contains("locked") && !said.contains("is not one that is read"), "{said}");
}

// ---------------------------------------------------------------------------------------------------------------------
// Passwords that expire
// ---------------------------------------------------------------------------------------------------------------------

/// A server that asks the role `app` for its password, and the address for `app` with none.
fn asking() -> (Server, postgres::Client, postgres::Config) {
    let server = Server::builder().hba("host all app 127.0.0.1/32 scram-sha-256").start().unwrap();
    let mut administrator = server.client().unwrap();
    administrator.batch_execute("CREATE ROLE app LOGIN PASSWORD 'token-1'").unwrap();
    let mut address: postgres::Config = server.url().parse().unwrap();
    address.user("app");
    (server, administrator, address)
}

#[test]
fn a_claim_comes_back_with_the_password_of_the_day() {
    let (_server, mut administrator, address) = asking();
    let token = Arc::new(Mutex::new("token-1"));
    let current = Arc::clone(&token);
    let mut stale = address;
    stale.password("stale");
    let config = Config::from_postgres(stale)
        .catalog(CatalogMode::None)
        .password_with(move || Ok((*current.lock().unwrap()).to_owned()));
    assert!(!format!("{config:?}").contains("token"), "{config:?}");
    let manager = started(config);
    let held = lock(&manager, "x");
    held.lock(&soon()).unwrap();
    let lost = held.lost();

    administrator.batch_execute("ALTER ROLE app PASSWORD 'token-2'").unwrap();
    *token.lock().unwrap() = "token-2";
    let end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'app'";
    administrator.batch_execute(end).unwrap();
    hear(&lost);
    eventually("the claim comes back", || is_held(&held));
    lock(&manager, "another").try_lock(&soon()).unwrap();
}

/// A hook that says when it is called, and answers what it is told to; the right password once nobody tells it any more.
type Told = Result<String, Box<dyn StdError + Send + Sync>>;

fn hook() -> (impl Fn() -> Told + Send + Sync, Receiver<()>, Sender<Told>) {
    let ((called, calls), (answers, answer)) = (unbounded(), unbounded::<Told>());
    let hook = move || {
        // The test may be over.
        let _ = called.send(());
        answer.recv().unwrap_or_else(|_| Ok("token-1".to_owned()))
    };
    (hook, calls, answers)
}

#[test]
fn a_hook_that_hangs_holds_nothing_up_and_is_entered_once() {
    let (_server, _administrator, address) = asking();
    let (hook, calls, answers) = hook();
    let config = Config::from_postgres(address)
        .catalog(CatalogMode::None)
        .connect_timeout(Duration::from_secs(1))
        .password_with(hook);
    let manager = Arc::new(PostgresManager::new(config).unwrap());
    let starting = Arc::clone(&manager);
    begin(move || starting.start()).get_within(BOUND).expect("it may be a vault that has trouble");
    calls.recv_timeout(BOUND).unwrap();

    let locks: Vec<_> = (0..5).map(|index| lock(&manager, &index.to_string())).collect();
    let attempts = locks.iter().map(|lock| {
        let lock = Arc::clone(lock);
        begin(move || lock.lock(&Context::timeout(Duration::from_secs(2))))
    });
    for attempt in attempts.collect::<Vec<_>>() {
        let error = attempt.get_within(BOUND).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
        assert!(error.to_string().contains("the hook that gives the password did not answer"), "{error}");
    }
    assert!(calls.is_empty(), "it is in its first call still");
    let last = Arc::clone(&locks[4]);
    begin(move || last.release()).get_within(BOUND).unwrap();

    // As soon as it answers all goes on, with the answer of a call that began after the question.
    answers.send(Ok("too old".to_owned())).unwrap();
    drop(answers);
    eventually("the lock in the background", || is_held(&locks[0]));
    let stopping = Arc::clone(&manager);
    begin(move || stopping.stop()).get_within(BOUND).unwrap();
}

#[test]
fn a_manager_stops_while_the_hook_hangs() {
    let (_server, _administrator, address) = asking();
    let (hook, calls, _answers) = hook();
    let config = Config::from_postgres(address).catalog(CatalogMode::None).password_with(hook);
    let manager = Arc::new(PostgresManager::new(config).unwrap());
    let starting = Arc::clone(&manager);
    let start = begin(move || starting.start());
    calls.recv_timeout(BOUND).unwrap();
    let stopping = Arc::clone(&manager);
    begin(move || stopping.stop()).get_within(Duration::from_secs(4)).unwrap();
    let _ = start.get_within(BOUND);
}

#[test]
fn an_error_of_the_hook_may_ask_the_manager_when_it_is_dropped() {
    static MANAGER: OnceLock<PostgresManager> = OnceLock::new();
    static DROPS: AtomicU32 = AtomicU32::new(0);
    #[derive(Debug)]
    struct Curious;
    impl std::fmt::Display for Curious {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("the vault is sealed")
        }
    }
    impl StdError for Curious {}
    impl Drop for Curious {
        fn drop(&mut self) {
            if let Some(manager) = MANAGER.get() {
                assert!(manager.snapshot().claims.len() <= 1);
                DROPS.fetch_add(1, SeqCst);
            }
        }
    }
    let (_server, _administrator, address) = asking();
    let is_open = Arc::new(AtomicBool::new(false));
    let opens = Arc::clone(&is_open);
    let hook = move || if opens.load(SeqCst) { Ok("token-1".to_owned()) } else { Err(Curious.into()) };
    let config = Config::from_postgres(address).catalog(CatalogMode::None).password_with(hook);
    let manager = MANAGER.get_or_init(|| started(config));
    let wanted = lock(manager, "x");
    begin(move || wanted.lock(&briefly())).get_within(BOUND).unwrap_err();
    eventually("the end of some attempts", || DROPS.load(SeqCst) >= 3);
    is_open.store(true, SeqCst);
    let wanted = lock(manager, "x");
    begin(move || wanted.lock(&soon())).get_within(BOUND).unwrap();
}

#[test]
fn what_goes_wrong_in_the_hook_is_told_and_the_claim_goes_on() {
    capture_the_log();
    let (_server, _administrator, address) = asking();
    let calls = Arc::new(AtomicU32::new(0));
    let (phase, counted) = (Arc::new(AtomicU32::new(0)), Arc::clone(&calls));
    let current = Arc::clone(&phase);
    let config = Config::from_postgres(address).catalog(CatalogMode::None).password_with(move || {
        counted.fetch_add(1, SeqCst);
        match current.load(SeqCst) {
            0 => Err("the vault is sealed".into()),
            1 => panic!("told by the panic hook alone"),
            _ => Ok("token-1".to_owned()),
        }
    });
    let manager = started(config);
    let wanted = lock(&manager, "x");
    let error = wanted.lock(&briefly()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    for text in ["the hook that gives the password failed: the vault is sealed", "Config::password_with"] {
        assert!(error.to_string().contains(text), "{error}");
    }
    phase.store(1, SeqCst);
    eventually("the panic is told", || {
        let error = wanted.lock(&briefly()).unwrap_err();
        error.to_string().contains("the hook that gives the password panicked")
    });
    phase.store(2, SeqCst);
    wanted.lock(&soon()).unwrap();
    assert!(calls.load(SeqCst) >= 4, "two at the start, and one an attempt");
    // Not what the administrator says.
    let logged = LOGGED.lock().unwrap();
    assert!(!logged.lines().any(|line| line.starts_with("dsync") && line.contains("token-1")));
}
