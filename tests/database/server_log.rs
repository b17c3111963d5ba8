//! What waiting writes into the server's log, which at default settings holds every error with its statement: nothing.

use std::sync::Arc;
use std::time::{Duration, Instant};

use dsync::{CatalogMode, Config, Context, Error, ErrorKind, Key, Lock, LockOptions, PostgresManager};
use postgres::Client;
use support::{Database, Server};

use crate::common::{
    Outcome, becomes, begin, eventually, hear, is_held, kind, lock, make_catalog, soon, started,
    wait_in_thread,
};

/// As short as a busy machine allows, since a wait is to go on over several.
const SLICE: Duration = Duration::from_millis(100);

/// For waits that are to be ended in the midst of one.
const LONG_SLICE: Duration = Duration::from_secs(600);

/// How many slices a wait goes on for.
const SLICES: usize = 5;

/// A server of its own, since all of its log is looked at.
struct Scene<'a> {
    server: &'a Server,
    database: Database<'a>,
    operator: Client,
    /// What the log held when the story began.
    before: usize,
}

impl<'a> Scene<'a> {
    fn set(server: &'a Server) -> Self {
        let database = server.database().unwrap();
        let operator = database.client().unwrap();
        // Makes the catalog, so that no story begins with that.
        make_catalog(Config::from_url(&database.url()).unwrap());
        let before = server.log().len();
        Self { server, database, operator, before }
    }

    fn config(&self) -> Config {
        Config::from_url(&self.database.url()).unwrap().wait_slice(SLICE)
    }

    fn manager(&self, mode: CatalogMode) -> PostgresManager {
        started(self.config().catalog(mode))
    }

    /// The lines since the story began that tell of an error. What the server says of its own work, of checkpoints say, is
    /// none of ours.
    fn errors(&self) -> Vec<String> {
        let log = self.server.log();
        let words = ["WARNING:", "ERROR:", "FATAL:", "PANIC:", "STATEMENT:", "CONTEXT:"];
        let is_error = |line: &&str| words.iter().any(|word| line.contains(word));
        log[self.before..].lines().filter(is_error).map(str::to_owned).collect()
    }

    fn log_is_quiet(&self) {
        let errors = self.errors();
        assert!(errors.is_empty(), "{} lines:\n{}", errors.len(), errors.join("\n"));
    }

    /// When the statements began that wait.
    fn waits(&mut self) -> Vec<String> {
        let query = "SELECT query_start::text FROM pg_stat_activity WHERE datname = current_database()
                     AND wait_event_type = 'Lock' AND wait_event = 'advisory' ORDER BY pid";
        self.operator.query(query, &[]).unwrap().iter().map(|row| row.get(0)).collect()
    }

    fn becomes_queue(&mut self, count: usize) {
        becomes("the queue", &count, || self.waits().len());
    }

    /// Waits until somebody has waited for several slices.
    fn slices_pass(&mut self) {
        for _ in 0..SLICES {
            self.becomes_queue(1);
            let now = self.waits();
            eventually("the next slice", || {
                let next = self.waits();
                !next.is_empty() && next != now
            });
        }
    }

    /// Waits are given up five times in time and without a line. `give_up` says how long it took until a wait was given up.
    fn giving_up_is_quiet(&mut self, mut give_up: impl FnMut(&mut Self) -> Duration) {
        /// A cancel request that is not heeded for so long is sent again, and may hit what comes after the wait.
        const IN_TIME: Duration = Duration::from_millis(50);
        /// The server signals its process twice for one request, of which the second may hit what comes after the wait, too.
        const MOST_LOUD: usize = 2;
        let (mut quiet, mut loud, mut rounds) = (0, 0, 0);
        while quiet < 5 {
            rounds += 1;
            assert!(rounds < 50, "a wait is given up later than {IN_TIME:?} nearly always");
            self.before = self.server.log().len();
            let took = give_up(self);
            println!("given up within {took:?}");
            if took < IN_TIME && loud < MOST_LOUD && !self.errors().is_empty() {
                loud += 1;
            } else if took < IN_TIME {
                quiet += 1;
                self.log_is_quiet();
            }
        }
    }

    /// Waits until no more sessions than so many are in the midst of a statement.
    fn statements_end(&mut self, but: i64) {
        let query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()
                     AND state = 'active' AND pid <> pg_backend_pid()";
        eventually("the end of the statements", || {
            self.operator.query_one(query, &[]).unwrap().get::<_, i64>(0) <= but
        });
    }

    /// A session that holds the lock with this number by hand.
    fn hold(&self, number: i64) -> Client {
        let mut client = self.database.client().unwrap();
        client.execute("SELECT pg_advisory_lock($1)", &[&number]).unwrap();
        client
    }

    fn held(&mut self) -> i64 {
        let query = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'
                     AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";
        self.operator.query_one(query, &[]).unwrap().get(0)
    }
}

fn waits_in(manager: &PostgresManager, key: Key) -> (Arc<dyn Lock>, Outcome<Result<(), Error>>) {
    let lock = manager.lock(key).unwrap();
    let waiting = wait_in_thread(&lock);
    (lock, waiting)
}

fn in_both_modes(test: impl Fn(CatalogMode)) {
    for mode in [CatalogMode::Automatic, CatalogMode::None] {
        println!("catalog: {mode:?}");
        test(mode);
    }
}

/// Names and pairs, and one that would end a statement if it were taken for a part of it.
fn keys() -> [Key; 4] {
    ["x".into(), 7.into(), (-4, 2).into(), r"it's \'; DROP TABLE dsync.lock; -- $dsync$ $wait$ ü".into()]
}

/// The next one looks again and again, and a second one is behind it: both over several slices, and given up in the midst of one.
#[test]
fn waiting_for_a_permit_is_quiet() {
    let server = Server::start().unwrap();
    let mut scene = Scene::set(&server);
    let managers = [(); 3].map(|()| scene.manager(CatalogMode::Automatic));
    let [holder, next, later] = managers.each_ref().map(|manager| manager.semaphore("x", 1).unwrap());
    let held = holder.acquire(Context::background()).unwrap();
    let is_next = || eventually("the next one", || managers[0].inspect("x").unwrap().waiters.len() == 1);
    let waits = || {
        let (context, canceller) = Context::background().with_cancel();
        let next = Arc::clone(&next);
        let waiting = begin(move || kind(next.acquire(context)));
        is_next();
        (waiting, canceller)
    };
    let times_out = |lock: &Arc<dyn Lock>, time| {
        let begun = Instant::now();
        assert_eq!(kind(lock.acquire(time)), ErrorKind::TimedOut);
        begun.elapsed().checked_sub(time).unwrap()
    };
    let (next_one, canceller) = waits();
    scene.giving_up_is_quiet(|scene| {
        let took = times_out(&later, SLICE * 5 / 2);
        // The next one's.
        scene.statements_end(1);
        took
    });
    canceller.cancel();
    assert_eq!(next_one.get(), ErrorKind::Cancelled);
    scene.giving_up_is_quiet(|scene| {
        let (next_one, canceller) = waits();
        let begun = Instant::now();
        canceller.cancel();
        assert_eq!(next_one.get(), ErrorKind::Cancelled);
        let took = begun.elapsed();
        scene.statements_end(0);
        took
    });
    scene.giving_up_is_quiet(|scene| {
        let took = times_out(&next, SLICE * 3);
        scene.statements_end(0);
        took
    });
    let waiting = wait_in_thread(&next);
    is_next();
    held.release().unwrap();
    waiting.get().unwrap();
    next.release().unwrap();
    assert_eq!(scene.held(), 0);
    drop(managers);
    scene.log_is_quiet();
}

#[test]
fn a_wait_over_many_slices_leaves_no_line() {
    let server = Server::start().unwrap();
    in_both_modes(|mode| {
        let mut scene = Scene::set(&server);
        let (holders, waiters) = (scene.manager(mode), scene.manager(mode));
        for key in keys() {
            let annotation = if key == Key::from(7) { vec![] } else { b"it's \\ \0 \xff".repeat(6_000) };
            let holder = holders.lock(key.clone()).unwrap();
            holder.lock(&soon()).unwrap();
            let valuer = {
                let annotation = annotation.clone();
                Arc::new(move || annotation.clone())
            };
            let waiter = waiters.lock_with(key.clone(), LockOptions::new().valuer(valuer)).unwrap();
            let waiting = wait_in_thread(&waiter);
            scene.slices_pass();
            assert!(!waiting.is_ready() && is_held(&holder));
            holder.release().unwrap();
            waiting.get().unwrap();
            if mode == CatalogMode::Automatic {
                let query = "SELECT token, annotation FROM dsync.locks";
                let row = scene.operator.query_one(query, &[]).unwrap();
                assert_eq!(row.get::<_, Option<i64>>(0), waiter.term().unwrap().token());
                assert!(row.get::<_, Option<Vec<u8>>>(1) == Some(annotation), "the annotation of {key}");
            }
            waiter.release().unwrap();
            assert_eq!(scene.held(), 0, "{key}");
        }
        scene.log_is_quiet();
    });
}

/// The catalog knows nothing of whoever holds the lock.
#[test]
fn a_wait_for_what_somebody_holds_by_hand_leaves_no_line() {
    let server = Server::start().unwrap();
    in_both_modes(|mode| {
        let mut scene = Scene::set(&server);
        let manager = scene.manager(mode);
        let mut holder = scene.hold(7);
        let (x, waiting) = waits_in(&manager, 7.into());
        scene.slices_pass();
        holder.batch_execute("SELECT pg_advisory_unlock(7)").unwrap();
        waiting.get().unwrap();
        assert_eq!(x.term().unwrap().token().is_some(), mode == CatalogMode::Automatic);
        x.release().unwrap();
        assert_eq!(scene.held(), 0);
        scene.log_is_quiet();
    });
}

#[test]
fn a_wait_for_a_fenced_transaction_leaves_no_line() {
    for shares in [false, true] {
        let server = Server::start().unwrap();
        let mut scene = Scene::set(&server);
        let (holder, waiter) = (scene.manager(CatalogMode::Automatic), scene.manager(CatalogMode::Automatic));
        let (holder, mut writer) = (lock(&holder, "x"), scene.database.client().unwrap());
        holder.lock(&soon()).unwrap();
        let mut transaction = writer.transaction().unwrap();
        holder.term().unwrap().fence(&mut transaction).unwrap();
        let x = if shares { waiter.shared_lock("x").unwrap() } else { lock(&waiter, "x") };
        let waiting = wait_in_thread(&x);
        scene.slices_pass();
        holder.release().unwrap();
        // The lock is had, but not the row.
        scene.slices_pass();
        assert!(!waiting.is_ready());
        transaction.commit().unwrap();
        waiting.get().unwrap();
        x.release().unwrap();
        assert_eq!(scene.held(), 0);
        scene.log_is_quiet();
    }
}

#[test]
fn the_release_of_a_claim_that_waits_leaves_no_line() {
    let server = Server::start().unwrap();
    in_both_modes(|mode| {
        let mut scene = Scene::set(&server);
        let manager = started(scene.config().catalog(mode).wait_slice(LONG_SLICE));
        let _holder = scene.hold(7);
        scene.giving_up_is_quiet(|scene| {
            let (x, waiting) = waits_in(&manager, 7.into());
            scene.becomes_queue(1);
            let begun = Instant::now();
            x.release().unwrap();
            let took = begun.elapsed();
            assert_eq!(kind(waiting.get()), ErrorKind::Released);
            scene.becomes_queue(0);
            took
        });
        assert_eq!(scene.held(), 1, "the one of the holder by hand");
    });
}

#[test]
fn another_key_of_the_same_number_is_told_while_the_claim_waits() {
    let server = Server::start().unwrap();
    let mut scene = Scene::set(&server);
    let manager = scene.manager(CatalogMode::Automatic);
    let _holder = scene.hold(7);
    let (x, waiting) = waits_in(&manager, 7.into());
    scene.slices_pass();
    let row = "INSERT INTO dsync.lock VALUES (7, false, 'dsync', 'another', 0, NULL, 0, now())";
    scene.operator.batch_execute(row).unwrap();
    // Whoever waits goes on waiting, since the other key may go; whoever tries is told why there is no lock.
    eventually("the collision to be told", || {
        x.try_lock(&soon()).unwrap_err().to_string().contains("another\"")
    });
    assert!(!waiting.is_ready());
    scene.log_is_quiet();
}

/// An operator's cancel makes a slice shorter, no more.
#[test]
fn a_slice_that_an_operator_cancels_is_followed_by_the_next() {
    let server = Server::start().unwrap();
    in_both_modes(|mode| {
        let mut scene = Scene::set(&server);
        let manager = started(scene.config().catalog(mode).wait_slice(LONG_SLICE));
        let mut holder = scene.hold(7);
        let (x, waiting) = waits_in(&manager, 7.into());
        for _ in 0..SLICES {
            scene.becomes_queue(1);
            let now = scene.waits();
            let cancel =
                "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE datname = current_database()
                          AND wait_event_type = 'Lock' AND wait_event = 'advisory'";
            scene.operator.batch_execute(cancel).unwrap();
            eventually("the next slice", || {
                let next = scene.waits();
                !next.is_empty() && next != now
            });
        }
        assert!(!waiting.is_ready());
        holder.batch_execute("SELECT pg_advisory_unlock(7)").unwrap();
        waiting.get().unwrap();
        x.release().unwrap();
        scene.log_is_quiet();
    });
}

/// A prepared statement is cheaper than a block, so it is used where waits are short; and then a long one has one error.
#[test]
fn a_long_wait_after_short_ones_leaves_one_error_at_the_most() {
    let server = Server::start().unwrap();
    in_both_modes(|mode| {
        let mut scene = Scene::set(&server);
        let (holders, waiters) = (scene.manager(mode), scene.manager(mode));
        let holder = lock(&holders, "x");
        for _ in 0..5 {
            holder.lock(&soon()).unwrap();
            let (x, waiting) = waits_in(&waiters, "x".into());
            scene.becomes_queue(1);
            holder.release().unwrap();
            waiting.get().unwrap();
            x.release().unwrap();
        }
        holder.lock(&soon()).unwrap();
        let (x, waiting) = waits_in(&waiters, "x".into());
        scene.slices_pass();
        holder.release().unwrap();
        waiting.get().unwrap();
        x.release().unwrap();
        let errors = scene.errors();
        let count = errors.iter().filter(|line| line.contains("ERROR:")).count();
        assert!(count <= 1, "{}", errors.join("\n"));
    });
}

/// A database may have no PL/pgSQL, or let a role not use it. Then slices end in errors, and all else is as it was.
#[test]
fn where_there_are_no_blocks_a_claim_waits_without_them() {
    let server = Server::start().unwrap();
    in_both_modes(|mode| {
        for obstacle in ["DROP EXTENSION plpgsql CASCADE", "REVOKE USAGE ON LANGUAGE plpgsql FROM PUBLIC"] {
            println!("{obstacle}");
            let mut scene = Scene::set(&server);
            let role = format!("role_of_{}", scene.database.name());
            scene
                .operator
                .batch_execute(&format!(
                    "CREATE ROLE {role} LOGIN; GRANT USAGE ON SCHEMA dsync TO {role};
                     GRANT USAGE, UPDATE ON SEQUENCE dsync.token TO {role};
                     GRANT SELECT, INSERT, UPDATE, DELETE ON dsync.lock, dsync.era, dsync.resignation, dsync.success, dsync.semaphore TO {role};
                     GRANT SELECT, INSERT, UPDATE ON dsync.policy, dsync.takeover TO {role};
                     GRANT SELECT ON dsync.version, dsync.locks, dsync.waiters TO {role}; {obstacle}"
                ))
                .unwrap();
            let url = scene.database.url().replace("postgres@", &format!("{role}@"));
            let manager = started(Config::from_url(&url).unwrap().wait_slice(SLICE).catalog(mode));
            let mut holder = scene.hold(7);
            let (x, waiting) = waits_in(&manager, 7.into());
            scene.slices_pass();
            let errors = scene.errors();
            let refused = errors.iter().filter(|line| line.contains("ERROR:") && line.contains("plpgsql"));
            assert_eq!(refused.count(), 1, "asked for once:\n{}", errors.join("\n"));
            holder.batch_execute("SELECT pg_advisory_unlock(7)").unwrap();
            waiting.get().unwrap();
            let lost = x.lost();
            x.release().unwrap();
            hear(&lost);
            assert_eq!(scene.held(), 0);
        }
    });
}
