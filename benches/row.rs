//! What a token and a row cost the server itself: `pgbench` runs lock and unlock by hand, and then with one thing more each;
//! and the same for the first statement of a session.
//!
//! It is a small program in C that does the same again and again, on one processor, so all that differs is the work of the
//! server.

mod kit;

use std::time::Duration;

use dsync::{CatalogMode, Context, LockOptions, json_valuer};
use kit::pgbench::Session;
use kit::{Bench, Contender, Plan, Row, interleave, pgbench, processors, raw};
use postgres::Client;
use support::{Database, Server};

const KEY: i64 = 4711;

/// As on the sessions of the library: nobody waits for a disk.
const SETTINGS: &str = "-c synchronous_commit=off -c plan_cache_mode=force_generic_plan";

const LOCK: &str = "SELECT pg_advisory_lock($1)";
const UNLOCK: &str = "SELECT pg_advisory_unlock($1)";

const NUMBER: &str = "SELECT pg_advisory_lock($1), pg_current_xact_id()";
const TOKEN: &str = "SELECT pg_advisory_lock($1), nextval('dsync.token')";
const ROW: &str = "UPDATE dsync.lock SET annotation = '{\"host\":\"db-7\"}', pid = pg_backend_pid(), \
     since = clock_timestamp() WHERE id = $1 AND NOT pair AND (pg_advisory_lock($1))::text = ''";

/// The least that leaves a row, whether there is one or not.
const INSERT: &str = "INSERT INTO dsync.lock AS lock (id, pair, namespace, key, token, annotation, pid, since) \
     SELECT $1::int8, false, $4, $5, nextval('dsync.token'), $6::bytea, pg_backend_pid(), clock_timestamp() \
     WHERE pg_try_advisory_lock($1) \
     ON CONFLICT (id, pair) DO UPDATE SET token = excluded.token, annotation = excluded.annotation, \
     pid = excluded.pid, since = excluded.since RETURNING token";

/// It with all that the library's statement sees to, but for saying why there is no lock.
const CAREFUL_INSERT: &str = "INSERT INTO dsync.lock AS lock \
     (id, pair, namespace, key, token, annotation, pid, since) \
     SELECT $1::int8, false, $4, $5, nextval('dsync.token'), $6::bytea, pg_backend_pid(), clock_timestamp() \
     FROM (SELECT set_config('idle_session_timeout', $2, false), \
                  set_config('application_name', $3, false) OFFSET 0) AS lease \
     WHERE CASE WHEN NOT EXISTS (SELECT FROM dsync.era) THEN false \
     WHEN pg_try_advisory_lock($1) THEN pg_try_advisory_xact_lock($1 + 1) END \
     ON CONFLICT (id, pair) DO UPDATE SET token = excluded.token, annotation = excluded.annotation, \
     pid = excluded.pid, since = excluded.since \
     WHERE lock.namespace = excluded.namespace AND lock.key = excluded.key RETURNING token";

fn main() {
    let mut bench = Bench::start("row");
    if !processors::on_one(|| measure(&mut bench)) {
        measure(&mut bench);
    }
    bench.finish();
}

fn measure(bench: &mut Bench) {
    // The statements of the library are longer than what the server shows of one by default.
    let server =
        kit::start(Server::builder().max_connections(100).setting("track_activity_query_size", "16384"));
    let database = server.database().expect("a database");
    let library = Statements::of_the_library(&database);
    warm(bench, &database, &library);
    fresh(bench, &database, &library);
}

fn plan(bench: &Bench) -> Plan {
    bench.choose(
        Plan { repetitions: 9, rounds: 1, warm_up: 1 },
        Plan { repetitions: 1, rounds: 1, warm_up: 0 },
    )
}

/// Lock and unlock, on a session that has done so before.
fn warm(bench: &mut Bench, database: &Database<'_>, library: &Statements) {
    let transactions = bench.choose(4_000, 200);
    let pair = |name: &str, lock: &str, unlock: &str| {
        contender(database, library, name, &[lock, unlock], Session::Warm, transactions)
    };
    let [[plain], [number], [token], [row], [both], [ours]] = interleave(
        plan(bench),
        [
            pair("the pair alone", LOCK, UNLOCK),
            pair("a transaction with a number", NUMBER, UNLOCK),
            pair("a token", TOKEN, UNLOCK),
            pair("a row", ROW, UNLOCK),
            pair("token and row", raw::LOCK_WITH_ROW, UNLOCK),
            pair("as the library has it", &library.again, &library.unlock),
        ],
    );
    bench.heading("lock and unlock by pgbench");
    for (what, ours) in [
        ("lock + unlock in a transaction with a number", &number),
        ("lock + unlock, with a token", &token),
        ("lock + unlock, with a row", &row),
        ("lock + unlock, with token and row", &both),
        ("lock + unlock, with token and row, as the library has it", &ours),
    ] {
        bench.row(Row::compared(what, "µs", &plain, ours, None));
    }
}

/// A connection, and one statement that takes the lock.
fn fresh(bench: &mut Bench, database: &Database<'_>, library: &Statements) {
    let transactions = bench.choose(200, 20);
    let first =
        |name: &str, lock: &str| contender(database, library, name, &[lock], Session::Fresh, transactions);
    let [[plain], [insert], [careful], [ours]] = interleave(
        plan(bench),
        [
            first("the lock alone", LOCK),
            first("the least insert", INSERT),
            first("an insert with conditions", CAREFUL_INSERT),
            first("as the library has it", &library.first),
        ],
    );
    bench.heading("a connection and its first statement, by pgbench");
    for (what, ours) in [
        ("connection + lock, with token and row", &insert),
        ("connection + lock, with token and row, and the library's conditions", &careful),
        ("connection + lock, with token and row, as the library has it", &ours),
    ] {
        bench.row(Row::compared(what, "µs", &plain, ours, None));
    }
}

/// Microseconds of the statements together.
fn contender<'a>(
    database: &'a Database<'a>,
    library: &Statements,
    name: &str,
    statements: &[&str],
    session: Session,
    transactions: u32,
) -> Contender<'a, 1> {
    let statements: String = statements.iter().map(|text| library.filled_in(text) + ";\n").collect();
    let script = format!("\\set key {KEY}\n{statements}");
    Contender::new(name, move || {
        let length = format!("--transactions={transactions}");
        let run = pgbench::Run { script: &script, session, clients: 1, length, settings: SETTINGS };
        [1e6 / run.on(database)]
    })
}

/// The statements by which the library takes and gives back a lock, from the server's own view.
struct Statements {
    /// On a session that has not served the key before.
    first: String,
    /// On one that has, just before.
    again: String,
    unlock: String,
    namespace: String,
    key: String,
}

impl Statements {
    fn of_the_library(database: &Database<'_>) -> Self {
        let manager = kit::manager(&database.url(), CatalogMode::Automatic, 1);
        let valuer = json_valuer(&serde_json::json!({ "host": "db-7" })).expect("a valuer");
        let lock = manager.lock_with(KEY, LockOptions::new().valuer(valuer)).expect("a lock");
        let mut operator = database.client().expect("a session");
        let mut claim = || {
            lock.lock(&Context::background()).expect("the lock");
            let taking = last_statement(&mut operator);
            lock.release().expect("the release");
            [taking, last_statement(&mut operator)]
        };
        let [first, _] = claim();
        // A claim that comes too late does not find the session as the one before has left it.
        let [again, unlock] =
            support::wait_for("claims that follow close on each other", Duration::from_secs(30), || {
                let [again, unlock] = claim();
                (again.starts_with("UPDATE") && !unlock.contains("set_config")).then_some([again, unlock])
            })
            .expect("them");
        assert!(first.starts_with("WITH other") && first.ends_with("FROM other)"), "{first}");
        assert!(again.ends_with("RETURNING lock.token"), "{again}");
        assert!(unlock.contains("pg_advisory_unlock"), "{unlock}");
        let row = "SELECT namespace, key FROM dsync.lock WHERE id = $1";
        let row = operator.query_one(row, &[&KEY]).expect("its row");
        // The parameters numbered as those of the first one.
        let again = again.replace("$4", "$6").replace("$3", "$5").replace("$2", "$4");
        Self { first, again, unlock, namespace: row.get(0), key: row.get(1) }
    }

    /// A statement with values for its parameters, as `pgbench` takes it.
    fn filled_in(&self, text: &str) -> String {
        let quoted = |value: &str| format!("'{}'", value.replace('\'', "''"));
        text.replace("$1", ":key")
            .replace("$2", "'15000'")
            .replace("$3", "'bench'")
            .replace("$4", &quoted(&self.namespace))
            .replace("$5", &quoted(&self.key))
            .replace("$6", "'{\"host\":\"db-7\"}'")
    }
}

fn last_statement(operator: &mut Client) -> String {
    let query = "SELECT query FROM pg_stat_activity WHERE datname = current_database() \
                 AND backend_type = 'client backend' AND pid <> pg_backend_pid()";
    operator.query_one(query, &[]).expect("one session").get(0)
}
