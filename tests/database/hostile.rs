//! Roles and databases that bring settings along which could break a lock. Locks behave as always, and a session that goes
//! from claim to claim takes nothing along.

use std::thread;
use std::time::Duration;

use dsync::{Config, ErrorKind, LockOptions, PostgresManager, SyncManager, json_valuer};
use postgres::{Client, IsolationLevel, NoTls};
use support::{Database, Server};

use crate::common::{
    PATIENCE, becomes, eventually, is_held, is_open, kind, lock, soon, started, wait_in_thread,
};

/// Longer than the timeouts that the roles have.
const LONG: &str = "3 s";

/// Enough where no setting is a timeout.
const SHORT: &str = "0.1 s";

/// A database, and a role that may make the catalog there.
struct Place {
    database: Database<'static>,
    operator: Client,
    role: String,
    /// How long sessions are left alone.
    rest: &'static str,
}

impl Place {
    fn new(rest: &'static str) -> Self {
        let database = Database::fresh().unwrap();
        let mut operator = database.client().unwrap();
        let role = format!("app_of_{}", database.name());
        let grant =
            format!("CREATE ROLE {role} LOGIN; GRANT CREATE ON DATABASE {} TO {role}", database.name());
        operator.batch_execute(&grant).unwrap();
        Self { database, operator, role, rest }
    }

    fn url(&self) -> String {
        self.database.url().replace("postgres@", &format!("{}@", self.role))
    }

    fn config(&self, name: &str) -> Config {
        let config = Config::from_url(&format!("{}?application_name={name}", self.url())).unwrap();
        // Some of the settings make each first statement of a session slow, on a busy machine more so. By the lease, how long an answer is
        // waited for.
        config.connect_timeout(PATIENCE).release_timeout(PATIENCE).lease(PATIENCE)
    }

    /// A connection of the application's, with all that its role brings along.
    fn client(&self) -> Client {
        Client::connect(&self.url(), NoTls).unwrap()
    }

    /// How long the session of this name has been in its present state, without a statement in between.
    fn has_rested(&mut self, name: &str, state: &str) -> bool {
        let query = format!(
            "SELECT state = '{state}' AND clock_timestamp() - greatest(state_change, query_start) > '{}'
             FROM pg_stat_activity WHERE application_name = '{name} x' AND datname = current_database()",
            self.rest
        );
        self.operator.query_opt(&query, &[]).unwrap().is_some_and(|row| row.get(0))
    }

    /// Waits until the sessions without a claim have been idle for longer than all the timeouts, or are gone.
    fn rests_in_the_pool(&mut self) {
        let query = "SELECT coalesce(bool_and(clock_timestamp() - state_change > $1::text::interval), true)
                     FROM pg_stat_activity
                     WHERE application_name IN ('first', 'second') AND datname = current_database()";
        eventually("a long rest in the pool", || {
            self.operator.query_one(query, &[&self.rest]).unwrap().get(0)
        });
    }

    fn backends(&mut self) -> Vec<i32> {
        let query = "SELECT pid FROM pg_stat_activity
                     WHERE datname = current_database() AND application_name ~ '^(first|second)' ORDER BY pid";
        self.operator.query(query, &[]).unwrap().iter().map(|row| row.get(0)).collect()
    }

    fn advisory_locks(&mut self) -> i64 {
        let query = "SELECT count(*) FROM pg_locks JOIN pg_database ON oid = database
                     WHERE locktype = 'advisory' AND datname = current_database()";
        self.operator.query_one(query, &[]).unwrap().get(0)
    }
}

/// What every service does with a lock.
fn locks_behave_as_always(place: &mut Place) {
    let [first, second] = ["first", "second"].map(|name| started(place.config(name)));
    let value = json_valuer("it's \\ \"mine\" é").unwrap();
    let x = first.lock_with("x", LockOptions::new().valuer(value)).unwrap();
    let other = lock(&second, "x");
    // The sessions by which the managers looked at the server, before they have served a claim.
    // Each had a second one for a moment.
    becomes("the sessions", &2, || place.backends().len());
    let looked = place.backends();
    place.rests_in_the_pool();
    assert_eq!(place.backends(), looked);

    x.lock(&soon()).unwrap();
    let term = x.term().unwrap();
    assert_eq!(kind(other.try_lock(&soon())), ErrorKind::LockUnavailable);
    let waiting = wait_in_thread(&other);
    // Longer than all the timeouts, the waiter in one and the same statement, and the holder in none.
    eventually("a long wait", || place.has_rested("second", "active"));
    eventually("a long rest", || place.has_rested("first", "idle"));
    assert!(is_open(term.lost()) && !waiting.is_ready());
    let backends = place.backends();

    // What others see.
    let view = second.inspect("x").unwrap();
    let holder = view.holder.unwrap();
    assert_eq!(holder.annotation, Some(serde_json::to_vec("it's \\ \"mine\" é").unwrap()));
    assert_eq!(holder.token, term.token());
    assert!(holder.since.is_some());
    assert_eq!(view.waiters.len(), 1);

    // What the application writes, on a connection that has what the role brings along.
    let mut client = place.client();
    let mut transaction = client.build_transaction().read_only(false).start().unwrap();
    term.fence(&mut transaction).unwrap();
    transaction.execute("SELECT dsync.fence($1)", &[&term.fence_text()]).unwrap();
    transaction.commit().unwrap();
    assert!(term.is_current(&mut client).unwrap());
    locks_of_the_application_behave_as_always(&first, &mut client);

    x.release().unwrap();
    waiting.get().unwrap();
    assert!(other.term().unwrap().token() > term.token());
    // The one of before may have idled for too long.
    let mut client = place.client();
    let mut transaction = client.build_transaction().read_only(false).start().unwrap();
    assert_eq!(kind(term.fence(&mut transaction)), ErrorKind::Lost);
    drop(transaction);
    assert!(!term.is_current(&mut client).unwrap());
    other.release().unwrap();
    assert_eq!(place.advisory_locks(), 0);

    // The sessions rest in their pools, for longer than the timeouts, and serve again.
    place.rests_in_the_pool();
    x.lock(&soon()).unwrap();
    assert_eq!(kind(other.try_lock(&soon())), ErrorKind::LockUnavailable);
    // The session by which `inspect` looked is in the pool too.
    let now = place.backends();
    assert!(backends.iter().all(|backend| now.contains(backend)), "{backends:?} are still there: {now:?}");
    x.release().unwrap();
    for manager in [first, second] {
        manager.stop().unwrap();
    }
    assert_eq!(place.advisory_locks(), 0);
}

/// What the application locks on such a connection. The lock `x` is held.
fn locks_of_the_application_behave_as_always(manager: &PostgresManager, client: &mut Client) {
    // Shorter than the timeouts.
    let shortly = Duration::from_millis(10);
    let before = client.simple_query("SHOW lock_timeout").unwrap();
    for free in [dsync::Key::from("y"), (7, -7).into()] {
        let builder = client.build_transaction().isolation_level(IsolationLevel::ReadCommitted);
        let mut transaction = builder.start().unwrap();
        let [x, y] = [dsync::Key::from("x"), free.clone()].map(|key| manager.transaction_lock(key).unwrap());
        y.acquire(&mut transaction, PATIENCE).unwrap();
        assert_eq!(kind(x.acquire(&mut transaction, shortly)), ErrorKind::TimedOut);
        transaction.commit().unwrap();

        let [x, y] = [dsync::Key::from("x"), free].map(|key| manager.session_lock(key).unwrap());
        let mut guard = y.acquire(client, PATIENCE).unwrap();
        assert_eq!(kind(x.acquire(&mut guard, shortly)), ErrorKind::TimedOut);
        guard.release().unwrap();
    }
    let after = client.simple_query("SHOW lock_timeout").unwrap();
    assert_eq!(format!("{before:?}"), format!("{after:?}"));
}

/// With settings of the role, and with settings of the database.
fn are_survived(settings: &[(&str, &str)]) {
    let with_timeout = settings.iter().any(|(name, _)| name.ends_with("_timeout"));
    let rest = if with_timeout { LONG } else { SHORT };
    // At the same time, since most of it is waiting.
    thread::scope(|scope| {
        for by_role in [true, false] {
            scope.spawn(move || {
                let mut place = Place::new(rest);
                let of = if by_role {
                    format!("ROLE {}", place.role)
                } else {
                    format!("DATABASE {}", place.database.name())
                };
                for (name, value) in settings {
                    place.operator.batch_execute(&format!("ALTER {of} SET {name} = {value}")).unwrap();
                }
                let shown = place.client().query_one(&format!("SHOW {}", settings[0].0), &[]).unwrap();
                println!("{of}: {} is {}", settings[0].0, shown.get::<_, String>(0));
                // What was connected before has the settings from before.
                place.operator = place.database.client().unwrap();
                place
                    .operator
                    .batch_execute("SET statement_timeout = 0; SET idle_session_timeout = 0")
                    .unwrap();
                locks_behave_as_always(&mut place);
            });
        }
    });
}

// ---------------------------------------------------------------------------------------------------------------------
// Settings
// ---------------------------------------------------------------------------------------------------------------------

#[test]
fn a_statement_timeout_is_survived() {
    are_survived(&[("statement_timeout", "'2s'")]);
}

#[test]
fn a_lock_timeout_is_survived() {
    are_survived(&[("lock_timeout", "'50ms'")]);
}

#[test]
fn an_idle_session_timeout_is_survived() {
    are_survived(&[("idle_session_timeout", "'2s'")]);
}

#[test]
fn an_idle_transaction_timeout_is_survived() {
    are_survived(&[("idle_in_transaction_session_timeout", "'2s'")]);
}

#[test]
fn a_transaction_timeout_is_survived() {
    let version = Server::shared().version();
    if version >= 17 {
        are_survived(&[("transaction_timeout", "'2s'")]);
    } else {
        println!("PostgreSQL {version} has no transaction_timeout, so there is nothing to show; 17 has");
    }
}

#[test]
fn other_defaults_for_transactions_are_survived() {
    are_survived(&[
        ("default_transaction_read_only", "on"),
        ("default_transaction_isolation", "serializable"),
        ("default_transaction_deferrable", "on"),
        ("synchronous_commit", "off"),
        ("row_security", "off"),
    ]);
    are_survived(&[("default_transaction_isolation", "'repeatable read'")]);
}

#[test]
fn other_ways_to_write_values_are_survived() {
    are_survived(&[
        ("standard_conforming_strings", "off"),
        ("backslash_quote", "off"),
        ("DateStyle", "'German, DMY'"),
        ("IntervalStyle", "sql_standard"),
        ("bytea_output", "escape"),
        ("extra_float_digits", "-15"),
        ("TimeZone", "'Asia/Kathmandu'"),
        ("client_min_messages", "debug1"),
        ("array_nulls", "off"),
        ("transform_null_equals", "on"),
        ("quote_all_identifiers", "on"),
    ]);
    are_survived(&[
        ("IntervalStyle", "iso_8601"),
        ("client_encoding", "latin1"),
        ("client_min_messages", "error"),
    ]);
}

#[test]
fn other_plans_are_survived() {
    are_survived(&[
        ("jit", "on"),
        ("jit_above_cost", "0"),
        ("plan_cache_mode", "force_generic_plan"),
        ("enable_indexscan", "off"),
        ("enable_nestloop", "off"),
        ("enable_hashjoin", "off"),
        ("from_collapse_limit", "1"),
        ("join_collapse_limit", "1"),
    ]);
    are_survived(&[
        ("plan_cache_mode", "force_custom_plan"),
        ("enable_seqscan", "off"),
        ("work_mem", "'64kB'"),
    ]);
}

/// Everything that the library's statements use has a namesake there, which comes first.
const TRAPS: &str = r"
    CREATE SCHEMA traps;
    CREATE FUNCTION traps.trap() RETURNS bool LANGUAGE plpgsql AS $$ BEGIN RAISE 'trapped'; END $$;
    DO $do$
    DECLARE
        f record;
    BEGIN
        FOR f IN
            SELECT proname, pg_get_function_identity_arguments(oid) AS arguments, pg_get_function_result(oid) AS result
            FROM pg_proc
            WHERE pronamespace = 'pg_catalog'::regnamespace AND prokind = 'f' AND proname IN (
                'pg_try_advisory_lock', 'pg_advisory_lock', 'pg_advisory_unlock', 'pg_advisory_unlock_all',
                'pg_advisory_xact_lock', 'set_config', 'current_setting', 'pg_backend_pid', 'pg_is_in_recovery',
                'pg_try_advisory_xact_lock', 'starts_with', 'statement_timestamp', 'transaction_timestamp', 'date_part',
                'nextval', 'setval', 'clock_timestamp', 'now', 'has_table_privilege', 'has_sequence_privilege',
                'extract', 'current_database', 'textcat')
            AND pg_get_function_arguments(oid) !~ 'VARIADIC'
        LOOP
            EXECUTE format('CREATE FUNCTION traps.%I(%s) RETURNS %s LANGUAGE plpgsql AS
                            $f$ BEGIN RAISE ''trapped by %s''; END $f$', f.proname, f.arguments, f.result, f.proname);
        END LOOP;
        FOR f IN
            SELECT oprname, oprleft::regtype AS l, oprright::regtype AS r, oprresult::regtype AS result
            FROM pg_operator
            WHERE oprnamespace = 'pg_catalog'::regnamespace AND oprkind = 'b'
            AND oprname IN ('||', '=', '<>', '<', '>', '<=', '>=', '<<', '>>', '|', '+', '-', '*', '~~')
            AND oprleft IN ('int8'::regtype, 'int4'::regtype, 'bool'::regtype, 'text'::regtype, 'interval'::regtype,
                            'timestamptz'::regtype, 'oid'::regtype, 'name'::regtype, 'numeric'::regtype, 'int2'::regtype)
            AND oprright NOT IN (SELECT oid FROM pg_type WHERE typtype = 'p')
        LOOP
            EXECUTE format('CREATE FUNCTION traps.operator(%s, %s) RETURNS %s LANGUAGE plpgsql AS
                            $f$ BEGIN RAISE ''trapped by an operator''; END $f$', f.l, f.r, f.result);
            EXECUTE format('CREATE OPERATOR traps.%s (LEFTARG = %s, RIGHTARG = %s, FUNCTION = traps.operator)',
                           f.oprname, f.l, f.r);
            EXECUTE format('ALTER FUNCTION traps.operator(%s, %s) RENAME TO %I', f.l, f.r,
                           'operator_' || md5(f.oprname));
        END LOOP;
    END $do$;
    CREATE DOMAIN traps.text AS pg_catalog.text CHECK (traps.trap());
    CREATE DOMAIN traps.int8 AS pg_catalog.int8 CHECK (traps.trap());
    CREATE DOMAIN traps.int4 AS pg_catalog.int4 CHECK (traps.trap());
    CREATE DOMAIN traps.int2 AS pg_catalog.int2 CHECK (traps.trap());
    CREATE DOMAIN traps.oid AS pg_catalog.oid CHECK (traps.trap());
    CREATE DOMAIN traps.interval AS pg_catalog.interval CHECK (traps.trap());
    CREATE DOMAIN traps.timestamptz AS pg_catalog.timestamptz CHECK (traps.trap());
    CREATE DOMAIN traps.bytea AS pg_catalog.bytea CHECK (traps.trap());
    CREATE VIEW traps.pg_locks AS SELECT traps.trap();
    CREATE VIEW traps.pg_stat_activity AS SELECT traps.trap();
    CREATE VIEW traps.pg_database AS SELECT traps.trap();
    CREATE TABLE traps.lock ();
    CREATE TABLE traps.version ();
    GRANT USAGE ON SCHEMA traps TO PUBLIC;
    GRANT SELECT ON ALL TABLES IN SCHEMA traps TO PUBLIC;
";

#[test]
fn namesakes_of_what_is_built_in_are_survived() {
    for path in ["traps, pg_catalog", "traps, pg_catalog, pg_temp", "nowhere", "''"] {
        let mut place = Place::new(SHORT);
        place.operator.batch_execute(TRAPS).unwrap();
        place.operator.batch_execute(&format!("ALTER ROLE {} SET search_path = {path}", place.role)).unwrap();
        if path.starts_with("traps") {
            // They would be stepped into.
            for statement in ["SELECT 1::int8 = 2::int8", "SELECT pg_backend_pid()", "SELECT 'a'::text"] {
                let error = place.client().simple_query(statement).expect_err("a trap");
                assert!(error.as_db_error().unwrap().message().contains("trapped"), "{statement}: {error}");
            }
        }
        println!("search_path = {path}");
        locks_behave_as_always(&mut place);
    }
}

/// Whoever asks to wait for a standby waits for ever if it is gone. A lock is not worth waiting for.
#[test]
fn a_synchronous_standby_that_is_gone_holds_nobody_up() {
    let server = Server::start().unwrap();
    let config = || Config::from_url(&server.url()).unwrap().release_timeout(PATIENCE);
    let [first, second] = [(); 2].map(|()| started(config()));
    server
        .client()
        .unwrap()
        .batch_execute("ALTER ROLE postgres SET synchronous_commit = remote_apply")
        .unwrap();
    server.set("synchronous_standby_names", "nobody").unwrap();
    let third = started(config());
    for manager in [&first, &second, &third] {
        let x = lock(manager, "x");
        x.lock(&soon()).unwrap();
        assert!(is_held(&x));
        x.release().unwrap();
    }
    server.reset("synchronous_standby_names").unwrap();
}

// ---------------------------------------------------------------------------------------------------------------------
// Nothing is carried over
// ---------------------------------------------------------------------------------------------------------------------

/// What is known of the one session of a manager.
#[derive(Debug, PartialEq)]
struct Seen {
    pid: i32,
    name: String,
    locks: i64,
}

fn seen(operator: &mut Client) -> Seen {
    let query = "SELECT pid, application_name, (SELECT count(*) FROM pg_locks
                        WHERE locktype = 'advisory' AND pg_locks.pid = pg_stat_activity.pid)
                 FROM pg_stat_activity WHERE application_name ~ '^single' AND datname = current_database()";
    let row = operator.query_one(query, &[]).unwrap();
    Seen { pid: row.get(0), name: row.get(1), locks: row.get(2) }
}

#[test]
fn a_session_that_goes_from_claim_to_claim_takes_nothing_along() {
    let database = Database::fresh().unwrap();
    let operator = &mut database.client().unwrap();
    let lease = Duration::from_secs(4);
    let config = |name: &str| {
        let config = Config::from_url(&format!("{}?application_name={name}", database.url())).unwrap();
        config.release_timeout(PATIENCE)
    };
    let leased = config("single").lease(lease).heartbeat(lease / 8).heartbeat_timeout(lease / 2);
    let single: PostgresManager = started(leased.max_sessions(1));
    let others = started(config("others"));
    let pid = {
        lock(&single, "before").lock(&soon()).unwrap();
        lock(&single, "before").release().unwrap();
        // The start had a second one for a moment.
        let count = "SELECT count(*) FROM pg_stat_activity
                     WHERE application_name = 'single' AND datname = current_database()";
        becomes("the sessions", &1, || operator.query_one(count, &[]).unwrap().get::<_, i64>(0));
        seen(operator).pid
    };
    let as_new = || Seen { pid, name: "single".to_owned(), locks: 0 };
    // After a claim that followed close on another one it is kept for a moment as it is.
    let at_rest = |operator: &mut Client| becomes("the session at rest", &as_new(), || seen(operator));
    let free = |key: &str| {
        lock(&others, key).try_lock(&soon()).unwrap();
        lock(&others, key).release().unwrap();
    };
    // Longer than the lease, by which a session that had one would be over.
    let long_rest = |operator: &mut Client| {
        let query = format!(
            "SELECT clock_timestamp() - state_change > '{} s' FROM pg_stat_activity WHERE pid = $1",
            lease.as_secs() + 1
        );
        eventually("a long rest", || {
            operator.query_opt(&query, &[&pid]).unwrap().is_none_or(|row| row.get(0))
        });
    };
    at_rest(operator);

    // A claim that had the lock.
    let held = lock(&single, "held");
    held.lock(&soon()).unwrap();
    assert_eq!(seen(operator), Seen { pid, name: "single held".to_owned(), locks: 1 });
    held.release().unwrap();
    at_rest(operator);
    free("held");

    // A claim that only waited, and one that got the lock while it did.
    let blocker = lock(&others, "wanted");
    for gets_it in [false, true] {
        blocker.lock(&soon()).unwrap();
        let wanted = lock(&single, "wanted");
        let waiting = wait_in_thread(&wanted);
        becomes("the wait", &Seen { pid, name: "single wanted".to_owned(), locks: 1 }, || seen(operator));
        if gets_it {
            blocker.release().unwrap();
            waiting.get().unwrap();
        }
        wanted.release().unwrap();
        at_rest(operator);
        if !gets_it {
            blocker.release().unwrap();
            long_rest(operator);
            at_rest(operator);
        }
        free("wanted");
    }

    // A claim after a wait that was cancelled from outside.
    blocker.lock(&soon()).unwrap();
    let wanted = lock(&single, "wanted");
    drop(wait_in_thread(&wanted));
    for _ in 0..3 {
        let cancel = "SELECT pg_cancel_backend(pid) FROM pg_stat_activity
                      WHERE pid = $1 AND wait_event_type = 'Lock' AND wait_event = 'advisory'";
        eventually("a cancel", || operator.query_opt(cancel, &[&pid]).unwrap().is_some_and(|row| row.get(0)));
    }
    blocker.release().unwrap();
    eventually("the lock", || is_held(&wanted));
    wanted.release().unwrap();
    at_rest(operator);
    free("wanted");

    // The lease of a holder is not on a session that rests.
    long_rest(operator);
    let last = single.lock((7, -7)).unwrap();
    last.lock(&soon()).unwrap();
    assert_eq!((seen(operator).pid, seen(operator).locks), (pid, 1));
    last.release().unwrap();
    at_rest(operator);
}
