//! What a token and a row cost the server itself: `pgbench` runs lock and unlock by hand, and then with one thing more each.
//!
//! It is a small program in C that does the same again and again, so all that differs is the work of the server.

mod kit;

use std::time::Duration;

use dsync::{CatalogMode, Context, LockOptions, json_valuer};
use kit::{Bench, Contender, Plan, Row, interleave, pgbench, raw};
use postgres::Client;
use support::Database;

const KEY: i64 = 4711;

/// As on the sessions of the library: nobody waits for a disk.
const SETTINGS: &str = "-c synchronous_commit=off -c plan_cache_mode=force_generic_plan";

const UNLOCK: &str = "SELECT pg_advisory_unlock($1)";

/// Statements that take the lock, and what each does beside that.
const LOCKS: [(&str, &str); 5] = [
    ("nothing", "SELECT pg_advisory_lock($1)"),
    ("a transaction with a number", "SELECT pg_advisory_lock($1), pg_current_xact_id()"),
    ("a token", "SELECT pg_advisory_lock($1), nextval('dsync.token')"),
    (
        "a row",
        "UPDATE dsync.lock SET annotation = '{\"host\":\"db-7\"}', pid = pg_backend_pid(), since = clock_timestamp() \
         WHERE id = $1 AND NOT pair AND (pg_advisory_lock($1))::text = ''",
    ),
    ("token and row", raw::LOCK_WITH_ROW),
];

fn main() {
    let mut bench = Bench::start("row");
    let plan = bench.choose(
        Plan { repetitions: 9, rounds: 1, warm_up: 1 },
        Plan { repetitions: 1, rounds: 1, warm_up: 0 },
    );
    let transactions: u32 = bench.choose(4_000, 200);
    let server = kit::server();
    let database = server.database().expect("a database");
    let [lock, unlock] = of_the_library(&database);
    let pair = |[lock, unlock]: [&str; 2]| {
        let script =
            format!("\\set key {KEY}\n{};\n{};\n", lock.replace("$1", ":key"), unlock.replace("$1", ":key"));
        let database = &database;
        move || {
            let run = pgbench::Run {
                script: &script,
                clients: 1,
                length: format!("--transactions={transactions}"),
                settings: SETTINGS,
            };
            [1e6 / run.on(database)]
        }
    };
    let by_hand = LOCKS.map(|(what, lock)| Contender::new(what, pair([lock, UNLOCK])));
    let [plain, number, token, row, both] = by_hand;
    let library = Contender::new("as the library has it", pair([&lock, &unlock]));
    let [[plain], [number], [token], [row], [both], [library]] =
        interleave(plan, [plain, number, token, row, both, library]);
    bench.heading("lock and unlock by pgbench");
    for (what, ours) in [
        ("lock + unlock in a transaction with a number", &number),
        ("lock + unlock, with a token", &token),
        ("lock + unlock, with a row", &row),
        ("lock + unlock, with token and row", &both),
        ("lock + unlock, with token and row, as the library has it", &library),
    ] {
        bench.row(Row::compared(what, "µs", &plain, ours, None));
    }
    bench.finish();
}

/// The statements by which the library takes and gives back a lock that it has had just before, from the server's own view.
/// `$1` is the key; for the other parameters there are values.
fn of_the_library(database: &Database<'_>) -> [String; 2] {
    let manager = kit::manager(&database.url(), CatalogMode::Automatic, 1);
    let valuer = json_valuer(&serde_json::json!({ "host": "db-7" })).expect("a valuer");
    let lock = manager.lock(KEY, LockOptions::new().valuer(valuer)).expect("a lock");
    let mut operator = database.client().expect("a session");
    // A claim that comes too late for the session to be kept has another one.
    let [lock, unlock] =
        support::wait_for("claims that follow close on each other", Duration::from_secs(30), || {
            let mut texts = [String::new(), String::new()];
            for _ in 0..3 {
                lock.lock(&Context::background()).expect("the lock");
                texts[0] = last_statement(&mut operator);
                lock.release().expect("the release");
                texts[1] = last_statement(&mut operator);
            }
            (texts[0].starts_with("UPDATE") && !texts[1].contains("set_config")).then_some(texts)
        })
        .expect("them");
    let row =
        operator.query_one("SELECT namespace, key FROM dsync.lock WHERE id = $1", &[&KEY]).expect("its row");
    let quoted = |index: usize| format!("'{}'", row.get::<_, String>(index).replace('\'', "''"));
    assert!(
        lock.ends_with("RETURNING lock.token") && unlock.contains("pg_advisory_unlock"),
        "{lock}; {unlock}"
    );
    let lock =
        lock.replace("$2", &quoted(0)).replace("$3", &quoted(1)).replace("$4", "'{\"host\":\"db-7\"}'");
    [lock, unlock]
}

fn last_statement(operator: &mut Client) -> String {
    let query = "SELECT query FROM pg_stat_activity WHERE datname = current_database() \
                 AND backend_type = 'client backend' AND pid <> pg_backend_pid()";
    operator.query_one(query, &[]).expect("one session").get(0)
}
