//! The catalog: how it comes to be, what stands in it, and the tokens that it gives out.

use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::io::{Read, Write};
use std::net::{Shutdown as Close, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use dsync::{
    CATALOG_SQL, CatalogMode, Config, Context, ErrorKind, Key, Lock, LockOptions, LockValuer, MAX_ANNOTATION,
    PostgresManager, SyncManager, TakeoverPolicy,
};
use postgres::Client;
use support::process::Signal;
use support::{Database, Replication, Server, Shutdown};

use crate::common::{
    self, PATIENCE, Process, becomes, briefly, eventually, kind, lock, make_catalog, number_of, soon, started,
};

/// What is shown here does not depend on how soon a busy server answers.
fn config(database: &Database<'_>) -> Config {
    Config::from_url(&database.url()).unwrap().connect_timeout(PATIENCE).release_timeout(PATIENCE)
}

/// Where the tokens are shown, and not what a takeover of the server costs.
fn at_once(url: &str) -> Config {
    Config::from_url(url).unwrap().takeover(TakeoverPolicy::Immediate).release_timeout(PATIENCE)
}

fn token(lock: &Arc<dyn Lock>) -> i64 {
    lock.term().expect("the lock is held").token().expect("there is a catalog")
}

/// Holds the lock for a moment, and gives the token of that term.
fn one_term(lock: &Arc<dyn Lock>) -> i64 {
    lock.lock(&soon()).unwrap();
    let token = token(lock);
    lock.release().unwrap();
    token
}

fn count(client: &mut Client, query: &str) -> i64 {
    client.query_one(query, &[]).unwrap().get(0)
}

// ---------------------------------------------------------------------------------------------------------------------
// How it comes to be
// ---------------------------------------------------------------------------------------------------------------------

#[test]
fn the_catalog_is_made_or_demanded_or_done_without() {
    let database = Database::fresh().unwrap();

    let without = started(config(&database).catalog(CatalogMode::None));
    let plain = lock(&without, "x");
    plain.lock(&soon()).unwrap();
    let term = plain.term().unwrap();
    assert_eq!(term.token(), None);
    let mut client = database.client().unwrap();
    assert_eq!(kind(term.fence(&mut client.transaction().unwrap())), ErrorKind::InvalidConfig);
    assert_eq!(kind(term.is_current(&mut client)), ErrorKind::InvalidConfig);
    plain.release().unwrap();
    assert_eq!(count(&mut client, "SELECT count(*) FROM pg_namespace WHERE nspname = 'dsync'"), 0);

    let strict = PostgresManager::new(config(&database).catalog(CatalogMode::MustExist)).unwrap();
    let error = strict.start().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::FailedInitialization);
    assert!(error.to_string().contains("dsync::CATALOG_SQL"), "{error}");

    let first = one_term(&lock(&started(config(&database)), "x"));
    strict.start().unwrap();
    assert!(one_term(&lock(&strict, "x")) > first);
}

#[test]
fn an_administrator_may_make_the_catalog_in_any_way_and_again() {
    let database = Database::fresh().unwrap();
    let mut client = database.client().unwrap();
    client.batch_execute(CATALOG_SQL).unwrap();
    client.batch_execute(CATALOG_SQL).unwrap();
    let before = one_term(&lock(&started(config(&database).catalog(CatalogMode::MustExist)), "x"));
    client.batch_execute(&format!("BEGIN; {CATALOG_SQL}; COMMIT")).unwrap();
    assert_eq!(count(&mut client, "SELECT count(*) FROM dsync.version"), 1);
    assert!(one_term(&lock(&started(config(&database)), "x")) > before);
    let path: String = client.query_one("SHOW search_path", &[]).unwrap().get(0);
    assert_eq!(path, r#""$user", public"#, "it is left as it was");
}

#[test]
fn a_newer_catalog_is_refused_and_an_older_one_brought_up_to_date() {
    let database = Database::fresh().unwrap();
    let mut client = database.client().unwrap();
    client.batch_execute(CATALOG_SQL).unwrap();

    // Whatever columns it has.
    for change in ["UPDATE dsync.version SET version = 8", "ALTER TABLE dsync.lock ADD COLUMN more int4"] {
        client.batch_execute(change).unwrap();
        let error = PostgresManager::new(config(&database)).unwrap().start().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::FailedInitialization);
        assert!(error.to_string().contains("version 8, this library needs 7"), "{error}");
    }

    client.batch_execute("ALTER TABLE dsync.lock DROP COLUMN more").unwrap();
    client.batch_execute("UPDATE dsync.version SET version = 0; DROP VIEW dsync.waiters").unwrap();
    let strict = config(&database).catalog(CatalogMode::MustExist);
    assert_eq!(kind(PostgresManager::new(strict).unwrap().start()), ErrorKind::FailedInitialization);
    one_term(&lock(&started(config(&database)), "x"));
    assert_eq!(count(&mut client, "SELECT version::int8 FROM dsync.version"), 7);
    assert_eq!(count(&mut client, "SELECT count(*) FROM dsync.waiters"), 0);
}

#[test]
fn a_catalog_that_is_dropped_comes_back_with_greater_tokens() {
    let database = Database::fresh().unwrap();
    let mut client = database.client().unwrap();
    let manager = started(config(&database));
    let (held, free) = (lock(&manager, "held"), lock(&manager, "free"));
    held.lock(&soon()).unwrap();
    let (term, before) = (held.term().unwrap(), one_term(&free));

    client.batch_execute("DROP SCHEMA dsync CASCADE").unwrap();
    assert!(held.term().is_some(), "the advisory lock is held still");
    assert!(one_term(&free) > before);
    assert!(!term.is_current(&mut client).unwrap(), "its row is gone, and with it the proof");
    held.release().unwrap();
    assert!(one_term(&held) > before);

    // A part of it. On a key of its own each time: a claim that follows close on another one relies on what that one found.
    client.batch_execute("DROP TABLE dsync.era").unwrap();
    let after = one_term(&lock(&manager, "next"));
    client.batch_execute("TRUNCATE dsync.era").unwrap();
    assert!(one_term(&lock(&manager, "last")) > after);
}

/// As version 1 made it, with the rights that its header named.
const VERSION_1: &str = include_str!("fixtures/catalog-version-1.sql");

#[test]
fn a_catalog_of_version_1_is_brought_up_to_date_with_its_rights_and_greater_tokens() {
    let database = Database::fresh().unwrap();
    let mut client = database.client().unwrap();
    client.batch_execute(VERSION_1).unwrap();
    let role = format!("role_{}", database.name());
    // It gave out tokens that are an hour ahead of the clock, after a crash.
    client
        .batch_execute(&format!(
            "INSERT INTO dsync.era DEFAULT VALUES;
             SELECT setval('dsync.token', (extract(epoch FROM now()) * 1000000)::int8 + 4294967296);
             CREATE ROLE {role} LOGIN;
             GRANT USAGE ON SCHEMA dsync TO {role};
             GRANT USAGE, UPDATE ON SEQUENCE dsync.token TO {role};
             GRANT SELECT, INSERT, UPDATE, DELETE ON dsync.lock, dsync.era TO {role};
             GRANT SELECT ON dsync.version, dsync.locks, dsync.waiters TO {role};"
        ))
        .unwrap();
    let last = count(&mut client, "SELECT last_value FROM dsync.token");

    let strict = config(&database).catalog(CatalogMode::MustExist);
    let error = PostgresManager::new(strict.clone()).unwrap().start().unwrap_err();
    assert!(error.to_string().contains("too old") && error.to_string().contains("CATALOG_SQL"), "{error}");
    let modest = Config::from_url(&database.url().replace("postgres@", &format!("{role}@"))).unwrap();
    let error = PostgresManager::new(modest.clone()).unwrap().start().unwrap_err();
    assert!(error.to_string().contains("CATALOG_SQL"), "{error}");

    let after = one_term(&lock(&started(config(&database)), "x"));
    assert!(after > last, "{after} {last}");
    let next = one_term(&lock(&started(strict), "x"));
    assert!(next > after);
    assert!(one_term(&lock(&started(modest), "x")) > next, "the rights are what they were");
    client.batch_execute(&format!("DROP OWNED BY {role}; DROP ROLE {role}")).unwrap();
}

/// As version 2 made it.
const VERSION_2: &str = include_str!("fixtures/catalog-version-2.sql");

#[test]
fn a_catalog_of_version_2_is_brought_up_to_date_and_whoever_could_lock_can_ask_to_resign() {
    let database = Database::fresh().unwrap();
    let mut client = database.client().unwrap();
    let role = format!("role_{}", database.name());
    let script = format!(
        "{VERSION_2}
         CREATE ROLE {role} LOGIN;
         GRANT USAGE ON SCHEMA dsync TO {role};
         GRANT USAGE, UPDATE ON SEQUENCE dsync.token TO {role};
         GRANT SELECT, INSERT, UPDATE, DELETE ON dsync.lock, dsync.era TO {role};
         GRANT SELECT ON dsync.version, dsync.locks, dsync.waiters TO {role};"
    );
    // In a schema of another name, too, which has to be quoted.
    for schema in ["dsync", "it's \"ours\""] {
        let identifier = format!("\"{}\"", schema.replace('"', "\"\""));
        let script =
            script.replace("dsync.", &format!("{identifier}.")).replace("dsync;", &format!("{identifier};"));
        let script = script.replace("SCHEMA dsync", &format!("SCHEMA {identifier}"));
        let script = script.replace("EXISTS dsync", &format!("EXISTS {identifier}"));
        client.batch_execute(&script).unwrap();
        let modest = Config::from_url(&database.url().replace("postgres@", &format!("{role}@"))).unwrap();
        let modest = modest.schema(schema);
        let error = PostgresManager::new(modest.clone()).unwrap().start().unwrap_err();
        assert!(error.to_string().contains("CATALOG_SQL"), "{error}");

        let ours = started(config(&database).schema(schema));
        let theirs = started(modest);
        let held = lock(&ours, schema);
        held.lock(&soon()).unwrap();
        assert!(theirs.request_resignation(schema).unwrap(), "the rights are those on the locks");
        held.release().unwrap();
        assert!(!theirs.request_resignation(schema).unwrap());
        client.batch_execute(&format!("DROP OWNED BY {role}; DROP ROLE {role}")).unwrap();
    }
}

/// As version 3 made it.
const VERSION_3: &str = include_str!("fixtures/catalog-version-3.sql");

#[test]
fn a_catalog_of_version_3_is_brought_up_to_date_with_the_rights_on_its_locks() {
    let database = Database::fresh().unwrap();
    let mut client = database.client().unwrap();
    let [user, writer, onlooker] =
        ["user", "writer", "onlooker"].map(|name| format!("{name}_{}", database.name()));
    client
        .batch_execute(&format!(
            "{VERSION_3}
             CREATE ROLE {user} LOGIN; CREATE ROLE {writer} LOGIN; CREATE ROLE {onlooker} LOGIN;
             GRANT USAGE ON SCHEMA dsync TO {user}, {writer}, {onlooker};
             GRANT USAGE, UPDATE ON SEQUENCE dsync.token TO {user};
             GRANT SELECT, INSERT, UPDATE, DELETE ON dsync.lock, dsync.era, dsync.resignation TO {user};
             GRANT SELECT ON dsync.version, dsync.locks, dsync.waiters TO {user};
             GRANT SELECT, UPDATE ON dsync.lock TO {writer};
             GRANT SELECT ON dsync.locks, dsync.waiters TO {onlooker};
             -- As a careful administrator has it.
             ALTER DEFAULT PRIVILEGES REVOKE EXECUTE ON FUNCTIONS FROM PUBLIC"
        ))
        .unwrap();
    let modest = Config::from_url(&database.url().replace("postgres@", &format!("{user}@"))).unwrap();
    let error = PostgresManager::new(modest.clone()).unwrap().start().unwrap_err();
    assert!(error.to_string().contains("CATALOG_SQL"), "{error}");
    make_catalog(config(&database));
    assert_eq!(count(&mut client, "SELECT version::int8 FROM dsync.version"), 7);
    one_term(&lock(&started(modest), "x"));
    let rights = |client: &mut Client, role: &str| -> (bool, Vec<bool>) {
        let query = "SELECT has_function_privilege($1, 'dsync.fence(text)', 'EXECUTE'),
                            array(SELECT has_table_privilege($1, 'dsync.success', what)
                                  FROM unnest('{SELECT,INSERT,UPDATE,DELETE}'::text[]) AS what)";
        let row = client.query_one(query, &[&role]).unwrap();
        (row.get(0), row.get(1))
    };
    assert_eq!(rights(&mut client, &user), (true, vec![true; 4]));
    assert_eq!(rights(&mut client, &writer), (true, vec![false; 4]));
    assert_eq!(rights(&mut client, &onlooker), (false, vec![false; 4]));
    // What an administrator takes away stays away.
    client.batch_execute(&format!("REVOKE INSERT ON dsync.success FROM {user}")).unwrap();
    client.batch_execute(CATALOG_SQL).unwrap();
    assert_eq!(rights(&mut client, &user), (true, vec![true, false, true, true]));
    for role in [&user, &writer, &onlooker] {
        client.batch_execute(&format!("DROP OWNED BY {role}; DROP ROLE {role}")).unwrap();
    }
}

/// As version 4 made it.
const VERSION_4: &str = include_str!("fixtures/catalog-version-4.sql");

/// The locks that are held meanwhile are as they were.
#[test]
fn a_catalog_of_version_4_is_brought_up_to_date_under_its_locks() {
    let database = Database::fresh().unwrap();
    let mut client = database.client().unwrap();
    client.batch_execute(VERSION_4).unwrap();
    client
        .batch_execute(
            "INSERT INTO dsync.era (place, server)
             VALUES (pg_relation_filepath('dsync.era'), pg_postmaster_start_time());
             INSERT INTO dsync.lock VALUES (7, false, '', '#7', nextval('dsync.token'), NULL, 0, now());
             SELECT pg_advisory_lock(7)",
        )
        .unwrap();
    let manager = started(config(&database));
    let readers = manager.shared_lock(7).unwrap();
    assert!(readers.try_acquire().unwrap().is_none());
    assert_eq!(count(&mut client, "SELECT version::int8 FROM dsync.version"), 7);
    client.batch_execute("SELECT pg_advisory_unlock(7)").unwrap();
    let token = readers.acquire(common::PATIENCE).unwrap().term().token().unwrap();
    assert!(token > 1 && token == count(&mut client, "SELECT readers FROM dsync.lock"));
}

/// As version 5 made it.
const VERSION_5: &str = include_str!("fixtures/catalog-version-5.sql");

#[test]
fn a_catalog_of_version_5_is_brought_up_to_date_and_whoever_could_lock_has_semaphores() {
    let database = Database::fresh().unwrap();
    let mut client = database.client().unwrap();
    client.batch_execute(VERSION_5).unwrap();
    let role = format!("app_{}", database.name());
    client
        .batch_execute(&format!(
            "CREATE ROLE {role} LOGIN; GRANT USAGE ON SCHEMA dsync TO {role};
             GRANT USAGE, UPDATE ON SEQUENCE dsync.token TO {role};
             GRANT SELECT, INSERT, UPDATE, DELETE ON dsync.lock, dsync.era, dsync.resignation, dsync.success TO {role};
             GRANT SELECT ON dsync.version, dsync.locks, dsync.waiters TO {role}"
        ))
        .unwrap();
    make_catalog(config(&database));
    assert_eq!(count(&mut client, "SELECT version::int8 FROM dsync.version"), 7);
    let url = database.url().replace("postgres@", &format!("{role}@"));
    let manager = started(Config::from_url(&url).unwrap());
    let gpus = manager.semaphore("gpu", 2).unwrap();
    let guard = gpus.acquire(PATIENCE).unwrap();
    assert_eq!(gpus.set_permits(3).unwrap(), 2);
    assert_eq!(manager.inspect("gpu").unwrap().holder.unwrap().token, guard.term().token());
    let seen = format!("SET ROLE {role}; SELECT permits, held FROM dsync.semaphores");
    let seen = client.simple_query(&seen).unwrap();
    assert!(
        seen.iter().any(|message| matches!(message, postgres::SimpleQueryMessage::Row(row)
            if (row.get(0), row.get(1)) == (Some("3"), Some("1")))),
        "{seen:?}"
    );
    drop(guard);
    // A role of before that was granted the rights of before has locks, and is told what it lacks.
    client.batch_execute(&format!("RESET ROLE; REVOKE ALL ON dsync.semaphore FROM {role}")).unwrap();
    let error = gpus.try_acquire().unwrap_err();
    assert!(error.kind() == ErrorKind::SessionRefused && error.to_string().contains("semaphore"), "{error}");
    one_term(&lock(&manager, "gpu"));
}

/// As version 6 made it.
const VERSION_6: &str = include_str!("fixtures/catalog-version-6.sql");

/// Its function and its views know other numbers of the locks beside a key.
#[test]
fn a_catalog_of_version_6_is_brought_up_to_date_and_fences_readers() {
    let database = Database::fresh().unwrap();
    let mut client = database.client().unwrap();
    client.batch_execute(VERSION_6).unwrap();
    make_catalog(config(&database));
    assert_eq!(count(&mut client, "SELECT version::int8 FROM dsync.version"), 7);
    let manager = started(config(&database));
    let reader = manager.shared_lock("x").unwrap().acquire(PATIENCE).unwrap();
    let mut transaction = client.transaction().unwrap();
    transaction.execute("SELECT dsync.fence($1)", &[&reader.term().fence_text().unwrap()]).unwrap();
    reader.release().unwrap();
    let other = started(config(&database));
    let writer = other.lock("x").unwrap();
    assert!(writer.try_acquire().unwrap().is_none(), "a transaction that a reader's term fences is open");
    transaction.commit().unwrap();
    drop(writer.try_acquire().unwrap().expect("it is over"));
}

/// Who brings it up to date may be one of several roles that the owner trusts, or an administrator. Else the other roles would not trust
/// what that one has made, and the owner could not use it.
#[test]
fn what_an_older_catalog_lacks_belongs_to_the_owner_of_its_locks() {
    let server = Server::start().unwrap();
    for (older, by_administrator) in [VERSION_2, VERSION_3, VERSION_4, VERSION_5, VERSION_6]
        .into_iter()
        .flat_map(|older| [(older, false), (older, true)])
    {
        let database = server.database().unwrap();
        let mut administrator = database.client().unwrap();
        let name = database.name();
        let roles = ["owner", "first", "second"].map(|role| format!("{role}_{name}"));
        let [owner, first, second] = &roles;
        administrator
            .batch_execute(&format!(
                "CREATE ROLE {owner} LOGIN; CREATE ROLE {first} LOGIN IN ROLE {owner};
                 CREATE ROLE {second} LOGIN IN ROLE {owner}; ALTER DATABASE {name} OWNER TO {owner};
                 SET ROLE {owner}; {older}; RESET ROLE"
            ))
            .unwrap();
        if by_administrator {
            administrator.batch_execute(CATALOG_SQL).unwrap();
        }
        for role in [first, second, owner] {
            let url = database.url().replace("postgres@", &format!("{role}@"));
            // Questions have a quarter of the lease, of which a busy machine may need some seconds.
            let manager = started(Config::from_url(&url).unwrap().lease(Duration::from_secs(60)));
            one_term(&lock(&manager, "x"));
            assert!(!manager.request_resignation("x").unwrap());
            assert!(!manager.forget_success("x").unwrap());
            drop(manager.semaphore("x", 2).unwrap().acquire(PATIENCE).unwrap());
        }
        let query = "SELECT count(*) FROM (
                         SELECT relowner FROM pg_class WHERE relnamespace = 'dsync'::regnamespace
                         UNION ALL SELECT proowner FROM pg_proc WHERE pronamespace = 'dsync'::regnamespace
                     ) AS part (owner) WHERE pg_get_userbyid(owner) <> $1";
        assert_eq!(administrator.query_one(query, &[owner]).unwrap().get::<_, i64>(0), 0);
    }
}

/// What is in the way of a look at the catalog is told, and no host and port are to be checked.
#[test]
fn a_table_of_the_catalog_that_somebody_has_locked_is_told_of() {
    let database = Database::fresh().unwrap();
    one_term(&lock(&started(config(&database)), "x"));
    let ready = started(config(&database).wait_slice(Duration::from_millis(300)));
    let mut client = database.client().unwrap();
    for table in ["version", "lock"] {
        let mut migration = client.transaction().unwrap();
        migration.batch_execute(&format!("LOCK TABLE dsync.{table}")).unwrap();
        let late = PostgresManager::new(config(&database).connect_timeout(Duration::from_secs(2))).unwrap();
        late.start().unwrap();
        // Where no session was to be had in these two seconds, that is told instead.
        eventually("what is in the way of a look", || {
            let error = lock(&late, "x").lock(&Context::timeout(Duration::from_secs(6))).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
            println!("{table}: {error}");
            let text = error.to_string();
            text.contains("locked by another session") && !text.contains("host and port")
        });
        if table == "lock" {
            let error = lock(&ready, "y").lock(&Context::timeout(Duration::from_secs(6))).unwrap_err();
            assert!(error.to_string().contains("locked by another session"), "{error}");
            let error = ready.inspect("x").unwrap_err();
            assert!(error.to_string().contains("locked by another session"), "{error}");
        }
        migration.rollback().unwrap();
        drop(late);
    }
    assert!(lock(&ready, "x").try_lock(&soon()).is_ok());
}

/// Passes on what a client says until it begins to make the catalog, and then nothing, not even that it has gone.
fn cut_off_in_the_making(server: u16) -> (u16, crossbeam_channel::Receiver<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let (cut, is_cut) = crossbeam_channel::unbounded();
    thread::spawn(move || {
        for mut client in listener.incoming().map_while(Result::ok) {
            let mut server = TcpStream::connect(("127.0.0.1", server)).unwrap();
            let (mut answers, mut back) = (server.try_clone().unwrap(), client.try_clone().unwrap());
            thread::spawn(move || {
                let _ = std::io::copy(&mut answers, &mut back);
                let _ = back.shutdown(Close::Both);
            });
            let cut = cut.clone();
            thread::spawn(move || {
                let (mut buffer, mut begun) = ([0; 65536], false);
                while let Ok(length @ 1..) = client.read(&mut buffer) {
                    if begun {
                        let _ = cut.send(());
                        thread::sleep(PATIENCE * 2);
                    }
                    begun = buffer[..length].windows(12).any(|bytes| bytes == b"431500391011");
                    let _ = server.write_all(&buffer[..length]);
                }
                let _ = server.shutdown(Close::Both);
            });
        }
    });
    (port, is_cut)
}

#[test]
fn a_process_that_is_cut_off_while_it_makes_the_catalog_does_not_hold_up_the_others() {
    let database = Database::fresh().unwrap();
    let (port, is_cut) = cut_off_in_the_making(database.server().port());
    let url = database.url_at("127.0.0.1", port);
    let first = common::begin(move || {
        let manager = PostgresManager::new(Config::from_url(&url).unwrap()).unwrap();
        manager.start().unwrap();
    });
    is_cut.recv_timeout(PATIENCE).unwrap();
    let manager = started(config(&database));
    let begun = Instant::now();
    lock(&manager, "x").lock(&soon()).unwrap();
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    first.get();
}

// ---------------------------------------------------------------------------------------------------------------------
// Whose it is
// ---------------------------------------------------------------------------------------------------------------------

/// Somebody who may make schemas, in a database of the test's.
struct Intern<'a> {
    database: &'a Database<'a>,
    name: String,
    client: Client,
}

impl<'a> Intern<'a> {
    fn hire(database: &'a Database<'a>) -> Self {
        let name = format!("intern_{}", database.name());
        let mut administrator = database.client().unwrap();
        administrator
            .batch_execute(&format!(
                "CREATE ROLE {name} LOGIN; GRANT CREATE ON DATABASE {} TO {name}",
                database.name()
            ))
            .unwrap();
        let url = database.url().replace("postgres@", &format!("{name}@"));
        Self { database, client: Client::connect(&url, postgres::NoTls).unwrap(), name }
    }

    fn trap(&self, table: &str) -> String {
        format!(
            "CREATE OR REPLACE FUNCTION dsync.gift() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                 EXECUTE 'ALTER ROLE {} SUPERUSER'; RETURN NEW; EXCEPTION WHEN OTHERS THEN RETURN NEW; END $$;
             CREATE TRIGGER gift BEFORE INSERT OR UPDATE ON dsync.{table} EXECUTE FUNCTION dsync.gift();
             CREATE TRIGGER more BEFORE INSERT OR UPDATE ON dsync.{table} FOR EACH ROW EXECUTE FUNCTION dsync.gift();
             GRANT USAGE ON SCHEMA dsync TO PUBLIC; GRANT ALL ON ALL TABLES IN SCHEMA dsync TO PUBLIC;",
            self.name
        )
    }

    /// That a manager is refused, the owner named, and nothing of the intern's has run.
    fn is_refused(&self, what: &str) {
        let text = start_refused(config(self.database));
        let owner = format!("belongs to the role {}", self.name);
        assert!(text.contains(&owner) && text.contains("Config::schema"), "{what}: {text}");
        self.is_no_superuser(what);
    }

    fn is_no_superuser(&self, what: &str) {
        let query = "SELECT rolsuper FROM pg_roles WHERE rolname = $1";
        let row = self.database.client().unwrap().query_one(query, &[&self.name]).unwrap();
        assert!(!row.get::<_, bool>(0), "{what}");
    }
}

impl Drop for Intern<'_> {
    fn drop(&mut self) {
        let mut administrator = self.database.client().unwrap();
        let name = &self.name;
        let _ = administrator.batch_execute(&format!("DROP OWNED BY {name} CASCADE; DROP ROLE {name}"));
    }
}

fn start_refused(config: Config) -> String {
    let error = PostgresManager::new(config).unwrap().start().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::FailedInitialization);
    let text = error.to_string();
    assert!(text.contains("session refused"), "{text}");
    text
}

#[test]
fn a_schema_that_somebody_else_has_planted_is_refused_and_none_of_its_code_is_run() {
    let database = Database::fresh().unwrap();
    let mut intern = Intern::hire(&database);
    intern.client.batch_execute("CREATE SCHEMA dsync").unwrap();
    intern.is_refused("an empty schema");
    for table in ["lock", "version", "era"] {
        intern.client.batch_execute("DROP SCHEMA dsync CASCADE").unwrap();
        intern.client.batch_execute(&(CATALOG_SQL.to_owned() + &intern.trap(table))).unwrap();
        intern.is_refused(table);
    }
    for view in ["lock", "era", "version"] {
        let trap = format!(
            "DROP TABLE dsync.{view} CASCADE;
             CREATE FUNCTION dsync.trap() RETURNS bool LANGUAGE plpgsql AS $$ BEGIN
                 EXECUTE 'ALTER ROLE {} SUPERUSER'; RETURN true; EXCEPTION WHEN OTHERS THEN RETURN true; END $$;
             CREATE VIEW dsync.{view} AS SELECT 1 AS version WHERE dsync.trap();
             GRANT USAGE ON SCHEMA dsync TO PUBLIC; GRANT ALL ON ALL TABLES IN SCHEMA dsync TO PUBLIC;",
            intern.name
        );
        intern.client.batch_execute("DROP SCHEMA dsync CASCADE").unwrap();
        intern.client.batch_execute(CATALOG_SQL).unwrap();
        intern.client.batch_execute(&trap).unwrap();
        intern.is_refused(view);
    }
    intern.client.batch_execute("DROP SCHEMA dsync CASCADE").unwrap();
    make_catalog(config(&database));
    // Elsewhere, or handed over, it may be used: a part of it alone may not be the intern's either.
    let mut administrator = database.client().unwrap();
    for part in [
        "TABLE dsync.lock",
        "TABLE dsync.era",
        "TABLE dsync.version",
        "SEQUENCE dsync.token",
        "VIEW dsync.locks",
        "TABLE dsync.success",
        "FUNCTION dsync.fence(text)",
    ] {
        administrator.batch_execute(&format!("ALTER {part} OWNER TO {}", intern.name)).unwrap();
        intern.is_refused(part);
        administrator.batch_execute(&format!("ALTER {part} OWNER TO postgres")).unwrap();
    }
    make_catalog(config(&database));
}

/// A call takes the function whose argument fits best: `varchar` is what some drivers send.
#[test]
fn a_function_that_is_planted_beside_the_fence_is_refused() {
    let database = Database::fresh().unwrap();
    let mut intern = Intern::hire(&database);
    let mut administrator = database.client().unwrap();
    for (before, argument) in
        [(true, "text"), (true, "varchar"), (false, "varchar"), (false, "term text, more int4 DEFAULT 1")]
    {
        let schema =
            format!("CREATE SCHEMA IF NOT EXISTS dsync; GRANT ALL ON SCHEMA dsync TO {}", intern.name);
        if before {
            administrator.batch_execute(&schema).unwrap();
        } else {
            administrator.batch_execute(&format!("{CATALOG_SQL}; {schema}")).unwrap();
            make_catalog(config(&database));
        }
        let trap = format!(
            "CREATE FUNCTION dsync.fence({argument}) RETURNS void LANGUAGE plpgsql AS $$ BEGIN
                 EXECUTE 'ALTER ROLE {} SUPERUSER'; EXCEPTION WHEN OTHERS THEN RETURN; END $$",
            intern.name
        );
        intern.client.batch_execute(&trap).unwrap();
        intern.is_refused(argument);
        let error = administrator.batch_execute(CATALOG_SQL).unwrap_err();
        let message = error.as_db_error().unwrap().message().to_owned();
        assert!(message.contains(&format!("belongs to the role {}", intern.name)), "{message}");
        administrator.batch_execute("ROLLBACK; DROP SCHEMA dsync CASCADE").unwrap();
    }
}

/// The schema is in order, but somebody may make tables there, and was faster.
#[test]
fn a_table_that_is_planted_while_the_catalog_is_made_is_refused_too() {
    let database = Database::fresh().unwrap();
    let mut intern = Intern::hire(&database);
    let mut administrator = database.client().unwrap();
    administrator
        .batch_execute(&format!("CREATE SCHEMA dsync; GRANT ALL ON SCHEMA dsync TO {}", intern.name))
        .unwrap();
    intern
        .client
        .batch_execute(
            &("CREATE TABLE dsync.version (sole bool PRIMARY KEY DEFAULT true CHECK (sole), version int4 NOT NULL);"
                .to_owned()
                + &intern.trap("version").replace("GRANT USAGE ON SCHEMA dsync TO PUBLIC;", "")),
        )
        .unwrap();
    intern.is_refused("a table");
    // Nor does the script that an administrator runs touch it.
    let error = administrator.batch_execute(CATALOG_SQL).unwrap_err();
    let message = error.as_db_error().unwrap().message().to_owned();
    assert!(message.contains(&format!("dsync.version belongs to the role {}", intern.name)), "{message}");
    intern.is_no_superuser("the script");
}

#[test]
fn what_the_owner_has_put_onto_the_catalog_is_refused_by_its_name() {
    let database = Database::fresh().unwrap();
    let mut client = database.client().unwrap();
    make_catalog(config(&database));
    client.batch_execute("CREATE DOMAIN public.word AS text; CREATE FUNCTION public.first(text) RETURNS text IMMUTABLE LANGUAGE sql RETURN $1").unwrap();
    let cases = [
        (
            "CREATE TRIGGER audit BEFORE UPDATE ON dsync.lock FOR EACH ROW \
             EXECUTE FUNCTION suppress_redundant_updates_trigger()",
            "dsync.lock has the trigger audit",
        ),
        ("CREATE RULE quiet AS ON INSERT TO dsync.era DO ALSO NOTHING", "dsync.era has the rule quiet"),
        ("CREATE TABLE public.child () INHERITS (dsync.lock)", "dsync.lock is a part of an inheritance"),
        (
            "ALTER TABLE dsync.lock ALTER COLUMN key TYPE public.word",
            "dsync.lock uses what does not come with PostgreSQL: type public.word",
        ),
        (
            "CREATE INDEX ON dsync.lock (public.first(key))",
            "dsync.lock uses what does not come with PostgreSQL: function",
        ),
        (
            "ALTER TABLE dsync.lock ADD CHECK (public.first(key) <> '')",
            "dsync.lock uses what does not come with PostgreSQL",
        ),
        (
            "ALTER TABLE dsync.era ALTER since SET DEFAULT public.first('now')::timestamptz",
            "dsync.era uses what does not",
        ),
        ("ALTER TABLE dsync.era SET LOGGED", "dsync.era is not what the catalog of locks has"),
        ("ALTER TABLE dsync.success SET UNLOGGED", "dsync.success is not what the catalog of locks has"),
        (
            "ALTER FUNCTION dsync.fence SECURITY DEFINER",
            "dsync.fence(term text) is not the one that the catalog",
        ),
        (
            "ALTER FUNCTION dsync.fence RESET search_path",
            "dsync.fence(term text) is not the one that the catalog",
        ),
        (
            "ALTER FUNCTION dsync.fence SET role = 'postgres'",
            "dsync.fence(term text) is not the one that the catalog",
        ),
        (
            "CREATE FUNCTION dsync.fence(varchar) RETURNS void LANGUAGE sql AS ''",
            "dsync.fence(character varying) is not the one that the catalog",
        ),
    ];
    for (change, told) in cases {
        let drop_views =
            if change.contains("TYPE public") { "DROP VIEW dsync.locks, dsync.waiters;" } else { "" };
        client.batch_execute(&format!("{drop_views}{change}")).unwrap();
        let text = start_refused(config(&database));
        assert!(text.contains(told), "{change}: {text}");
        client.batch_execute("DROP SCHEMA dsync CASCADE").unwrap();
        make_catalog(config(&database));
    }
}

#[test]
fn whom_the_role_of_the_locks_trusts() {
    let database = Database::fresh().unwrap();
    let intern = Intern::hire(&database);
    let mut administrator = database.client().unwrap();
    let (group, own) = (format!("group_{}", database.name()), intern.name.clone());
    administrator
        .batch_execute(&format!(
            "CREATE ROLE {group}; GRANT CREATE ON DATABASE {} TO {group}",
            database.name()
        ))
        .unwrap();
    let as_intern = || Config::from_url(&database.url().replace("postgres@", &format!("{own}@"))).unwrap();
    let grants = format!(
        "GRANT USAGE ON SCHEMA dsync TO {own}; GRANT ALL ON ALL TABLES IN SCHEMA dsync TO {own}; \
         GRANT ALL ON dsync.token TO {own};"
    );
    // Itself.
    make_catalog(as_intern());
    administrator.batch_execute("DROP SCHEMA dsync CASCADE").unwrap();
    // A superuser, who is not the owner of the database.
    administrator.batch_execute(&format!("{CATALOG_SQL}; {grants}")).unwrap();
    make_catalog(as_intern());
    administrator.batch_execute("DROP SCHEMA dsync CASCADE").unwrap();
    // A role that it is a member of, and not before.
    administrator.batch_execute(&format!("SET ROLE {group}; {CATALOG_SQL}; {grants}; RESET ROLE")).unwrap();
    assert!(start_refused(as_intern()).contains(&format!("belongs to the role {group}")));
    administrator.batch_execute(&format!("GRANT {group} TO {own}")).unwrap();
    make_catalog(as_intern());
    administrator.batch_execute(&format!("REVOKE {group} FROM {own}")).unwrap();
    // The owner of the database. A superuser is a member of everything, which says nothing.
    assert!(start_refused(config(&database)).contains(&format!("belongs to the role {group}")));
    administrator.batch_execute(&format!("ALTER DATABASE {} OWNER TO {group}", database.name())).unwrap();
    make_catalog(as_intern());
    make_catalog(config(&database));
    administrator
        .batch_execute(&format!(
            "ALTER DATABASE {} OWNER TO postgres; DROP OWNED BY {group} CASCADE; DROP ROLE {group}",
            database.name()
        ))
        .unwrap();
}

// ---------------------------------------------------------------------------------------------------------------------
// In another schema
// ---------------------------------------------------------------------------------------------------------------------

#[test]
fn a_schema_of_another_application_s_is_refused_and_another_name_can_be_chosen() {
    let database = Database::fresh().unwrap();
    let mut client = database.client().unwrap();
    client.batch_execute("CREATE SCHEMA dsync; CREATE TABLE dsync.lock (door int4, shut bool)").unwrap();
    let text = start_refused(config(&database));
    assert!(text.contains("dsync.lock") && text.contains("Config::schema"), "{text}");
    assert_eq!(
        count(&mut client, "SELECT count(*) FROM pg_class WHERE relnamespace = 'dsync'::regnamespace"),
        1
    );
    one_term(&lock(&started(config(&database).schema("locks")), "x"));
}

#[test]
fn the_catalog_may_be_in_a_schema_of_any_name() {
    let database = Database::fresh().unwrap();
    let mut client = database.client().unwrap();
    // Strings are read the old way on the connection of the application's.
    client.batch_execute("SET standard_conforming_strings = off; SET escape_string_warning = off").unwrap();
    let longest = "l".repeat(63);
    for name in ["user", "dsync_2", "Gro\u{df} \"quoted\" it's a \\ schema", longest.as_str()] {
        let in_sql = format!("\"{}\"", name.replace('"', "\"\""));
        let config = config(&database).schema(name);
        // As its administrator would make it, or by itself.
        if name == "user" {
            client.batch_execute(&dsync::catalog_sql(name).unwrap()).unwrap();
        }
        let [first, second] = [(); 2].map(|()| started(config.clone()));
        let (holder, waiter) = (lock(&first, name), lock(&second, name));
        holder.lock(&soon()).unwrap();
        assert_eq!(kind(waiter.try_lock(&soon())), ErrorKind::LockUnavailable);
        let term = holder.term().unwrap();
        let mut transaction = client.transaction().unwrap();
        term.fence(&mut transaction).unwrap();
        transaction.commit().unwrap();
        assert!(term.is_current(&mut client).unwrap());
        let text = term.fence_text().unwrap();
        client.query_one(&format!("SELECT {in_sql}.fence($1)"), &[&text]).unwrap();
        let error = client.query_one(&format!("SELECT {in_sql}.fence('x')"), &[]).unwrap_err();
        assert_eq!(error.code().unwrap().code(), "22023", "{error}");
        assert_eq!(first.inspect(name).unwrap().holder.unwrap().token, term.token());
        assert_eq!(first.inspect_all().unwrap().len(), 1);
        eventually("the waiter", || first.inspect(name).unwrap().waiters.len() == 1);
        for view in ["locks", "waiters"] {
            assert_eq!(count(&mut client, &format!("SELECT count(*) FROM {in_sql}.{view}")), 1, "{view}");
        }
        holder.release().unwrap();
        eventually("the waiter's turn", || waiter.term().is_some());
        waiter.release().unwrap();
        let before = one_term(&holder);
        let error = client.query_one(&format!("SELECT {in_sql}.fence($1)"), &[&text]).unwrap_err();
        assert_eq!(error.code().unwrap().code(), "ZDF01", "{error}");
        client.batch_execute(&format!("DROP SCHEMA {in_sql} CASCADE")).unwrap();
        assert!(one_term(&waiter) > before);
    }
    assert_eq!(count(&mut client, "SELECT count(*) FROM pg_namespace WHERE nspname = 'dsync'"), 0);
    assert_eq!(kind(dsync::catalog_sql("pg_locks")), ErrorKind::InvalidConfig);
    assert_eq!(dsync::catalog_sql("dsync").unwrap(), CATALOG_SQL);
}

/// A claim that follows close on another one does not ask whether the catalog is what it was.
#[test]
fn a_sequence_that_begins_anew_between_two_quick_claims_is_noticed() {
    let database = Database::fresh().unwrap();
    let mut client = database.client().unwrap();
    let manager = started(config(&database));
    let quick = lock(&manager, "quick");
    let terms: Vec<_> = (0..20)
        .map(|round| {
            if round % 5 == 4 {
                client
                    .batch_execute("TRUNCATE dsync.era, dsync.lock; ALTER SEQUENCE dsync.token RESTART")
                    .unwrap();
            }
            one_term(&quick)
        })
        .collect();
    assert!(terms.is_sorted_by(|a, b| a < b), "{terms:?}");
}

/// Operators and functions of somebody else's, in front of PostgreSQL's; and settings in which nothing could be written.
#[test]
fn a_hostile_search_path_and_hostile_defaults_do_not_matter() {
    let database = Database::fresh().unwrap();
    let mut administrator = database.client().unwrap();
    let mut evil = String::from(
        "CREATE ROLE victim LOGIN; CREATE SCHEMA evil; GRANT USAGE ON SCHEMA evil TO victim;
         CREATE FUNCTION evil.bomb() RETURNS bool LANGUAGE plpgsql AS $$ BEGIN RAISE 'boom'; END $$;
         CREATE FUNCTION evil.now() RETURNS timestamptz LANGUAGE plpgsql AS $$ BEGIN RAISE 'boom'; END $$;
         CREATE DOMAIN evil.int8 AS text; CREATE DOMAIN evil.text AS int4; CREATE DOMAIN evil.bool AS int4;
         CREATE TABLE evil.pg_locks (boom int4); CREATE TABLE evil.pg_stat_activity (boom int4);",
    );
    for (operator, left, right) in [
        ("=", "int8", "int8"),
        ("=", "int4", "int4"),
        ("=", "oid", "oid"),
        ("=", "name", "name"),
        ("=", "text", "text"),
        ("=", "bool", "bool"),
        ("=", "int2", "int4"),
        ("<>", "text", "text"),
        ("<", "interval", "interval"),
        (">", "interval", "interval"),
        ("#", "int8", "int8"),
        ("||", "text", "text"),
    ] {
        let name = format!("evil.trap_{left}_{right}");
        evil += &format!(
            "CREATE OR REPLACE FUNCTION {name}(pg_catalog.{left}, pg_catalog.{right}) RETURNS pg_catalog.bool
             LANGUAGE plpgsql AS $$ BEGIN RAISE 'boom'; END $$;
             CREATE OPERATOR evil.{operator} (LEFTARG = pg_catalog.{left}, RIGHTARG = pg_catalog.{right},
                                              FUNCTION = {name});"
        );
    }
    evil += &format!(
        "GRANT CREATE ON DATABASE {} TO victim;
         ALTER ROLE victim SET search_path = evil, pg_catalog;
         ALTER ROLE victim SET default_transaction_isolation = 'serializable';
         ALTER ROLE victim SET default_transaction_deferrable = on;
         ALTER ROLE victim SET default_transaction_read_only = on;
         ALTER ROLE victim SET statement_timeout = '2s';
         ALTER ROLE victim SET idle_session_timeout = '2s';
         ALTER ROLE victim SET synchronous_commit = off;",
        database.name()
    );
    administrator.batch_execute(&evil).unwrap();

    let url = database.url().replace("postgres@", "victim@");
    let [first, second] = [(); 2].map(|()| started(Config::from_url(&url).unwrap()));
    let (one, other) = (lock(&first, "x"), lock(&second, "x"));
    one.lock(&soon()).unwrap();
    assert_eq!(kind(other.try_lock(&soon())), ErrorKind::LockUnavailable);
    eventually("the waiter", || first.inspect("x").unwrap().waiters.len() == 1);
    assert_eq!(first.inspect_all().unwrap()[0].holder.as_ref().unwrap().token, Some(token(&one)));

    let mut victim = Client::connect(&url, postgres::NoTls).unwrap();
    victim.batch_execute("SET default_transaction_read_only = off; SET idle_session_timeout = 0; SET statement_timeout = 0").unwrap();
    assert!(
        victim.batch_execute("SELECT 1::pg_catalog.int8 = 1::pg_catalog.int8").is_err(),
        "the trap works"
    );
    let term = one.term().unwrap();
    let mut transaction = victim.transaction().unwrap();
    term.fence(&mut transaction).unwrap();
    transaction.execute("SELECT dsync.fence($1)", &[&term.fence_text()]).unwrap();
    transaction.commit().unwrap();
    assert!(term.is_current(&mut victim).unwrap());
    for view in ["locks", "waiters"] {
        let rows = victim.query(&format!("SELECT FROM dsync.{view}"), &[]).unwrap();
        assert_eq!(rows.len(), 1, "{view}");
    }
    one.release().unwrap();
    eventually("the waiter's turn", || other.term().is_some());

    // Roles belong to the server that other tests use.
    drop((one, other, first, second, victim));
    administrator.batch_execute("DROP OWNED BY victim CASCADE; DROP ROLE victim").unwrap();
}

const MANY: usize = 200;

#[test]
fn two_hundred_processes_make_one_catalog() {
    let server = Server::builder().max_connections(2 * MANY as u32 + 50).start().unwrap();
    let database = server.database().unwrap();
    let gate = server.folder().join("gate");
    let role = format!("start {} {}", database.url(), gate.display());
    let crowd: Vec<_> =
        (0..MANY).map(|_| Process::start(&mut common::process("catalog::worker", &role))).collect();
    for process in &crowd {
        process.says("ready");
    }
    fs::write(&gate, "").unwrap();
    let tokens: BTreeSet<i64> = crowd
        .iter()
        .map(|process| process.says("token ").rsplit(' ').next().unwrap().parse().unwrap())
        .collect();
    for process in crowd {
        process.succeeds();
    }
    assert_eq!(tokens.len(), MANY);

    let mut client = database.client().unwrap();
    for table in ["version", "era"] {
        assert_eq!(count(&mut client, &format!("SELECT count(*) FROM dsync.{table}")), 1);
    }
    let log = server.log();
    let errors: Vec<_> = log.lines().filter(|line| line.contains("ERROR")).collect();
    assert!(errors.is_empty(), "{errors:#?}");
    assert!(!log.contains("already exists"), "made by one process alone");
}

/// Not a test: the body of the processes that other tests start.
#[test]
#[ignore = "the body of a process, which another test starts"]
fn worker() {
    let Some(role) = common::role() else { return };
    let words: Vec<_> = role.split(' ').collect();
    match words[..] {
        ["start", url, gate] => start_at_once(url, Path::new(gate)),
        ["terms", url, folder, terms] => record_terms(url, Path::new(folder), terms.parse().unwrap()),
        _ => panic!("{role}"),
    }
}

fn start_at_once(url: &str, gate: &Path) {
    println!("ready");
    eventually("the gate", || gate.exists());
    let manager = PostgresManager::new(
        Config::from_url(url).unwrap().max_sessions(2).connect_timeout(PATIENCE).lease(4 * PATIENCE),
    )
    .unwrap();
    manager.start().unwrap();
    let lock = lock(&manager, &format!("key {}", std::process::id() % 7));
    println!("token {}", one_term(&lock));
    manager.stop().unwrap();
}

// ---------------------------------------------------------------------------------------------------------------------
// Tokens
// ---------------------------------------------------------------------------------------------------------------------

const KEYS: [&str; 4] = ["red", "green", "blue", "black"];

/// Many times each of the locks, and the tokens into a file for each, written while it is held.
fn record_terms(url: &str, folder: &Path, terms: usize) {
    thread::scope(|scope| {
        for thread in 0..2 {
            scope.spawn(move || {
                let manager = started(Config::from_url(url).unwrap().release_timeout(PATIENCE));
                let locks = KEYS.map(|key| lock(&manager, key));
                for round in 0..terms / 2 {
                    let index = (round + 2 * thread) % KEYS.len();
                    let guard = locks[index].acquire(soon()).unwrap();
                    let mut file =
                        OpenOptions::new().create(true).append(true).open(folder.join(KEYS[index])).unwrap();
                    writeln!(file, "{}", guard.term().token().unwrap()).unwrap();
                    guard.release().unwrap();
                }
            });
        }
    });
}

#[test]
fn ten_thousand_terms_of_many_processes_have_growing_tokens() {
    const PROCESSES: usize = 8;
    let database = Database::fresh().unwrap();
    let folder = Folder::make();
    let role = format!("terms {} {} {}", database.url(), folder.0.display(), 10_000 / PROCESSES);
    let workers = [(); PROCESSES].map(|()| Process::start(&mut common::process("catalog::worker", &role)));
    for worker in workers {
        worker.succeeds_within(Duration::from_secs(300));
    }
    let mut all = BTreeSet::new();
    for key in KEYS {
        let text = fs::read_to_string(folder.0.join(key)).unwrap();
        let tokens: Vec<i64> = text.lines().map(|line| line.parse().unwrap()).collect();
        assert!(
            tokens.is_sorted_by(|one, next| one < next),
            "{key}: in the order of the terms, each greater"
        );
        all.extend(tokens);
    }
    assert_eq!(all.len(), 10_000, "each token once, for whichever key");
}

struct Folder(PathBuf);

impl Folder {
    fn make() -> Self {
        let folder = std::env::temp_dir().join(format!("dsync-catalog-{}", std::process::id()));
        fs::create_dir(&folder).unwrap();
        Self(folder)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A crash takes back what the sequence has not written to the disk. Here that is as much as can be: the server writes
/// nothing by itself, and the one transaction that logs the values ahead does not end before the crash.
#[test]
fn tokens_grow_over_crashes_of_the_server() {
    let server = Server::builder().durable().setting("wal_writer_delay", "10s").start().unwrap();
    let database = server.database().unwrap();
    let manager = started(at_once(&database.url()));
    let locks = [lock(&manager, "held"), lock(&manager, "other")];
    let mut newest = 0;
    type Crash = (&'static str, fn(&Server));
    let crashes: [Crash; 4] = [
        ("immediate restart", |server| server.restart(Shutdown::Immediate).unwrap()),
        ("kill -9 of all processes", |server| {
            server.kill_hard().unwrap();
            server.start_again().unwrap();
        }),
        ("kill -9 of the postmaster", |server| {
            server.kill_postmaster().unwrap();
            server.start_again().unwrap();
        }),
        ("fast restart", |server| server.restart(Shutdown::Fast).unwrap()),
    ];
    for (name, crash) in crashes {
        locks[0].lock(&soon()).unwrap();
        let lost = locks[0].lost();
        assert!(token(&locks[0]) > newest, "{name}");
        // Until a value that is logged comes first in an open transaction.
        let mut logging = database.client().unwrap();
        logging.batch_execute("BEGIN").unwrap();
        for _ in 0..33 {
            logging.query_one("SELECT nextval('dsync.token')", &[]).unwrap();
        }
        for _ in 0..20 {
            let token = one_term(&locks[1]);
            assert!(token > newest, "{name}");
            newest = token;
        }
        crash(&server);
        common::hear(&lost);
        // The claim on `held` goes on by itself.
        eventually("the lock in the background", || locks[0].term().is_some());
        assert!(token(&locks[0]) > newest, "after {name}");
        let after = one_term(&locks[1]);
        assert!(after > newest, "after {name}");
        newest = after.max(token(&locks[0]));
        locks[0].release().unwrap();
    }
}

/// Nothing in the database remembers what was given out, and the clock is no further than the crashes took.
#[test]
fn tokens_grow_over_a_row_of_quick_crashes_and_the_dropping_of_the_catalog() {
    let server = Server::start().unwrap();
    let manager = started(at_once(&server.url()));
    let lock = lock(&manager, "x");
    let mut terms = vec![one_term(&lock)];
    for _ in 0..5 {
        server.restart(Shutdown::Immediate).unwrap();
        terms.push(one_term(&lock));
    }
    for _ in 0..3 {
        server.client().unwrap().batch_execute("TRUNCATE dsync.era").unwrap();
        terms.push(one_term(&lock));
    }
    server.client().unwrap().batch_execute("DROP SCHEMA dsync CASCADE").unwrap();
    terms.push(one_term(&lock));
    assert!(terms.is_sorted_by(|one, next| one < next), "{terms:?}");
}

/// The clock was set back, so that the sequence is ahead of it for ever.
#[test]
fn tokens_grow_over_crashes_at_a_clock_that_was_set_back() {
    let server = Server::start().unwrap();
    let manager = started(at_once(&server.url()));
    let lock = lock(&manager, "x");
    one_term(&lock);
    let mut client = server.client().unwrap();
    client.batch_execute("SELECT setval('dsync.token', nextval('dsync.token') + 1000000000000)").unwrap();
    let mut terms = vec![one_term(&lock)];
    for _ in 0..3 {
        server.restart(Shutdown::Immediate).unwrap();
        terms.push(one_term(&lock));
    }
    assert!(terms.is_sorted_by(|one, next| one + 1_000_000 < *next), "{terms:?}");
}

/// The program of PostgreSQL's, which must succeed; what it writes.
fn run(database: &Database<'_>, program: &str, arguments: &[&str]) -> String {
    let path = database.server().binaries().program(program);
    let output = std::process::Command::new(path).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn tokens_grow_over_the_restore_of_a_dump() {
    let database = Database::fresh().unwrap();
    let (mut client, mut operator) = (database.client().unwrap(), database.server().client().unwrap());
    let manager = started(at_once(&database.url()));
    let quick = lock(&manager, "x");
    one_term(&quick);
    let file = database.server().folder().join(format!("{}.sql", database.name()));
    let restore = |more: &str| {
        // A `pg_dump` of version 17 or newer sets what an older server does not know.
        let dump =
            run(&database, "pg_dump", &[&database.url()]).replace("SET transaction_timeout = 0;\n", "");
        let after = (0..3).map(|_| one_term(&quick)).next_back().unwrap();
        fs::write(&file, more.to_owned() + &dump).unwrap();
        after
    };
    let psql = |file: &Path| {
        run(
            &database,
            "psql",
            &["-q", "-v", "ON_ERROR_STOP=1", "-f", file.to_str().unwrap(), &database.url()],
        )
    };

    // Into the database where it comes from, while managers are at it.
    let last = restore("DROP SCHEMA dsync CASCADE;");
    psql(&file);
    let old = started(at_once(&database.url()));
    let (first, second) = (one_term(&quick), one_term(&lock(&old, "x")));
    assert!(last < first && first < second, "in place: {last} {first} {second}");

    // Into a new one of the same name.
    let last = restore("");
    drop((client, old));
    let name = database.name();
    operator.batch_execute(&format!("DROP DATABASE {name} WITH (FORCE)")).unwrap();
    operator.batch_execute(&format!("CREATE DATABASE {name}")).unwrap();
    psql(&file);
    let (first, second) = (one_term(&quick), one_term(&lock(&started(at_once(&database.url())), "x")));
    assert!(last < first && first < second, "into a new database: {last} {first} {second}");

    // From a copy that the server made, under the same name later.
    manager.stop().unwrap();
    let end_all =
        format!("SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname = '{name}'");
    operator.batch_execute(&end_all).unwrap();
    operator.batch_execute(&format!("CREATE DATABASE {name}_copy TEMPLATE {name}")).unwrap();
    let manager = started(at_once(&database.url()));
    let last = (0..3).map(|_| one_term(&lock(&manager, "x"))).next_back().unwrap();
    manager.stop().unwrap();
    operator.batch_execute(&format!("DROP DATABASE {name} WITH (FORCE)")).unwrap();
    operator.batch_execute(&format!("ALTER DATABASE {name}_copy RENAME TO {name}")).unwrap();
    let first = one_term(&lock(&started(at_once(&database.url())), "x"));
    assert!(last < first, "from a copy: {last} {first}");
    client = database.client().unwrap();
    assert_eq!(count(&mut client, "SELECT count(*) FROM dsync.era"), 1);
}

/// As if the server's folder had been put back, as it was when the server last stood still: nothing is missing then.
#[test]
fn tokens_grow_over_the_return_of_a_cold_copy_of_the_server() {
    let server = Server::start().unwrap();
    let manager = started(at_once(&server.url()));
    let lock = lock(&manager, "x");
    one_term(&lock);
    let mut client = server.client().unwrap();
    let earlier = count(&mut client, "SELECT last_value FROM dsync.token");
    let last = (0..3).map(|_| one_term(&lock)).next_back().unwrap();
    client.batch_execute(&format!("SELECT setval('dsync.token', {earlier})")).unwrap();
    drop(client);
    server.restart(Shutdown::Fast).unwrap();
    let first = one_term(&lock);
    assert!(last < first, "{last} {first}");
}

/// A role for which the timeline is not to be seen, as some services have it.
#[test]
fn an_era_begins_where_the_timeline_is_refused() {
    let server = Server::start().unwrap();
    let mut client = server.client().unwrap();
    client
        .batch_execute(
            "CREATE ROLE app LOGIN; GRANT CREATE ON DATABASE postgres TO app;
             REVOKE EXECUTE ON FUNCTION pg_walfile_name(pg_lsn), pg_current_wal_lsn() FROM PUBLIC",
        )
        .unwrap();
    let manager = started(at_once(&server.url().replace("postgres@", "app@")));
    let lock = lock(&manager, "x");
    let first = one_term(&lock);
    server.restart(Shutdown::Immediate).unwrap();
    assert!(one_term(&lock) > first);
}

/// The standby misses all that comes after the freezing of the process that sends it, and acquisitions do not wait for it.
#[test]
fn tokens_grow_over_the_promotion_of_a_synchronous_standby() {
    let primary = Server::start().unwrap();
    let standby = primary.standby(Replication::Synchronous).unwrap();
    let ports = format!("{},{}", primary.port(), standby.port());
    let url = format!(
        "host=127.0.0.1,127.0.0.1 port={ports} user=postgres dbname=postgres target_session_attrs=read-write"
    );
    let manager = started(at_once(&url));
    let lock = lock(&manager, "x");
    let mut newest = (0..5).map(|_| one_term(&lock)).next_back().unwrap();
    standby.wait_caught_up(&primary).unwrap();

    let mut client = primary.client().unwrap();
    let sender: i32 = client.query_one("SELECT pid FROM pg_stat_replication", &[]).unwrap().get(0);
    support::process::signal(sender, Signal::Stop).unwrap();
    for _ in 0..100 {
        let token = one_term(&lock);
        assert!(token > newest);
        newest = token;
    }
    lock.lock(&soon()).unwrap();
    let lost = lock.lost();
    newest = token(&lock);
    primary.kill_hard().unwrap();
    common::hear(&lost);
    standby.promote().unwrap();
    eventually("the lock on the new primary", || lock.term().is_some());
    assert!(token(&lock) > newest);
}

#[test]
fn sessions_that_wait_and_that_come_back_get_tokens_too() {
    let database = Database::fresh().unwrap();
    let [first, second] = [(); 2].map(|()| started(config(&database)));
    let (holder, waiter) = (lock(&first, "x"), lock(&second, "x"));
    holder.lock(&soon()).unwrap();
    let mut before = token(&holder);
    let waiting = common::wait_in_thread(&waiter);
    eventually("a waiter", || first.inspect("x").unwrap().waiters.len() == 1);
    holder.release().unwrap();
    waiting.get().unwrap();
    for _ in 0..3 {
        assert!(token(&waiter) > before);
        before = token(&waiter);
        let lost = waiter.lost();
        let pid = second.inspect("x").unwrap().holder.unwrap().pid;
        assert!(database.server().terminate(pid).unwrap());
        common::hear(&lost);
        eventually("the next term", || waiter.term().is_some());
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Round trips
// ---------------------------------------------------------------------------------------------------------------------

/// Between the library and the server: counts how often a client begins to speak after the server has.
struct Wire {
    port: u16,
    flights: Arc<AtomicUsize>,
}

impl Wire {
    fn to(server: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let flights = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&flights);
        thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let server = TcpStream::connect(("127.0.0.1", server)).unwrap();
                let clients_turn = Arc::new(Mutex::new(true));
                for (from, to, counter) in [
                    (client.try_clone().unwrap(), server.try_clone().unwrap(), Some(Arc::clone(&counter))),
                    (server, client, None),
                ] {
                    let clients_turn = Arc::clone(&clients_turn);
                    thread::spawn(move || pass_on(from, to, &clients_turn, counter));
                }
            }
        });
        Self { port, flights }
    }

    /// How many round trips `work` takes.
    fn round_trips<T>(&self, work: impl FnOnce() -> T) -> usize {
        let before = self.flights.load(Ordering::SeqCst);
        work();
        self.flights.load(Ordering::SeqCst) - before
    }
}

fn pass_on(
    mut from: TcpStream,
    mut to: TcpStream,
    clients_turn: &Mutex<bool>,
    counter: Option<Arc<AtomicUsize>>,
) {
    let mut buffer = [0; 65536];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        let mut turn = clients_turn.lock().unwrap();
        if let Some(counter) = &counter
            && *turn
        {
            counter.fetch_add(1, Ordering::SeqCst);
        }
        *turn = counter.is_none();
        drop(turn);
        if to.write_all(&buffer[..length]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Close::Both);
}

#[test]
fn acquiring_with_token_and_annotation_is_one_round_trip_and_releasing_is_one() {
    let database = Database::fresh().unwrap();
    let wire = Wire::to(database.server().port());
    let url = database.url_at("127.0.0.1", wire.port);
    // No heartbeat comes in between.
    let config = Config::from_url(&url).unwrap().lease(Duration::from_secs(600)).max_sessions(1);
    let manager = started(config);
    let options = LockOptions::new().valuer(Arc::new(|| b"note".to_vec()));
    let lock = manager.lock_with("x", options).unwrap();
    one_term(&lock);
    let mut round_trips = Vec::new();
    for _ in 0..20 {
        round_trips.push(wire.round_trips(|| lock.lock(&soon()).unwrap()));
        assert!(lock.term().unwrap().token().is_some());
        round_trips.push(wire.round_trips(|| lock.release().unwrap()));
    }
    // There are four statements, two for claims that follow close on another one. Each is prepared when it is used again.
    let with_preparation = round_trips.iter().filter(|&&count| count != 1).collect::<Vec<_>>();
    assert!(
        with_preparation.len() <= 4 && with_preparation.iter().all(|&&count| count == 2),
        "{round_trips:?}"
    );
    // Another key on the same session, which is kept for the first one for a moment.
    let mut operator = database.client().unwrap();
    let kept = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'dsync x'";
    becomes("the session of the first key", &0, || count(&mut operator, kept));
    let lock = manager.lock("y").unwrap();
    assert_eq!(wire.round_trips(|| lock.try_lock(&soon()).unwrap()), 1);
    let (term, mut client) = (lock.term().unwrap(), Client::connect(&url, postgres::NoTls).unwrap());
    assert_eq!(wire.round_trips(|| term.is_current(&mut client).unwrap()), 2, "with its preparation");
    lock.release().unwrap();
    assert_eq!(wire.round_trips(|| manager.inspect("y").unwrap()), 2, "with its preparation");
}

// ---------------------------------------------------------------------------------------------------------------------
// Annotations
// ---------------------------------------------------------------------------------------------------------------------

#[test]
fn annotations_are_kept_to_the_byte_or_left_out() {
    let database = Database::fresh().unwrap();
    let manager = started(config(&database));
    let mut client = database.client().unwrap();
    let whole = vec![0xfe; MAX_ANNOTATION];
    let cases: [(&str, LockValuer, Option<Vec<u8>>); 7] = [
        (
            "json",
            dsync::json_valuer(&serde_json::json!({"a": "'\\\u{0}"})).unwrap(),
            Some(br#"{"a":"'\\\u0000"}"#.to_vec()),
        ),
        ("not utf-8", Arc::new(|| vec![0xff, 0, 0xfe, b'\\', b'x']), Some(vec![0xff, 0, 0xfe, b'\\', b'x'])),
        ("looks like hex", Arc::new(|| br"\x00ff".to_vec()), Some(br"\x00ff".to_vec())),
        ("empty", Arc::new(Vec::new), Some(Vec::new())),
        ("as long as can be", Arc::new(move || whole.clone()), Some(vec![0xfe; MAX_ANNOTATION])),
        ("too long", Arc::new(|| vec![0; MAX_ANNOTATION + 1]), None),
        ("panics", Arc::new(|| panic!("in a valuer, on purpose")), None),
    ];
    for (name, valuer, wanted) in cases {
        let lock = manager.lock_with(name, LockOptions::new().valuer(valuer)).unwrap();
        lock.lock(&soon()).unwrap();
        assert!(lock.term().unwrap().token().is_some());
        let row = client.query_one("SELECT annotation FROM dsync.locks WHERE key = $1", &[&name]).unwrap();
        assert_eq!(row.get::<_, Option<Vec<u8>>>(0), wanted, "{name}");
        assert_eq!(manager.inspect(name).unwrap().holder.unwrap().annotation, wanted, "{name}");
        lock.release().unwrap();
    }
    // An annotation is of its term only.
    let plain = started(config(&database));
    let lock = lock(&plain, "json");
    lock.lock(&soon()).unwrap();
    assert_eq!(plain.inspect("json").unwrap().holder.unwrap().annotation, None);
}

// ---------------------------------------------------------------------------------------------------------------------
// Two keys with one number
// ---------------------------------------------------------------------------------------------------------------------

/// The number that the name `x` has in the namespace `dsync`. As a key it is another key with the same hash.
fn number_of_x(database: &Database<'_>) -> i64 {
    let query = format!("SELECT {}", number_of("'x'"));
    database.client().unwrap().query_one(&query, &[]).unwrap().get(0)
}

#[test]
fn two_keys_with_one_hash_are_refused_and_never_wait_for_each_other() {
    for same_process in [true, false] {
        for name_first in [true, false] {
            let database = Database::fresh().unwrap();
            let first = started(config(&database));
            let second = if same_process { None } else { Some(started(config(&database))) };
            let second = second.as_ref().unwrap_or(&first);
            let mut keys = [Key::from("x"), Key::from(number_of_x(&database))];
            if !name_first {
                keys.reverse();
            }
            let [one, other] = keys;
            let one = first.lock(one).unwrap();
            let other = second.lock(other).unwrap();

            // While one is held, and while it is free with its row still there.
            for held in [true, false] {
                one.lock(&soon()).unwrap();
                if !held {
                    one.release().unwrap();
                }
                let error = other.try_lock(&soon()).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::InvalidKey, "{error}");
                assert!(error.to_string().contains("the same hash as"), "{error}");
                assert!(error.to_string().contains(one.key()), "{error}");
                assert_eq!(held, one.term().is_some_and(|term| term.is_held()));
                // `lock` waits, as it always does, and says why in the end.
                let error = other.lock(&briefly()).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::TimedOut);
                assert!(error.to_string().contains("the same hash as"), "{error}");
                other.release().unwrap();
                one.release().unwrap();
            }
            // It left nothing behind.
            one.try_lock(&soon()).unwrap();
            one.release().unwrap();
        }
    }
}

#[test]
fn a_number_and_a_pair_of_the_same_bits_are_different_locks() {
    let database = Database::fresh().unwrap();
    let manager = started(config(&database));
    let keys =
        [Key::from((-1, 2)), Key::from(-0x1_0000_0000_i64 + 2), Key::from("#-1:2"), Key::from(i64::MIN)];
    let locks = keys.map(|key| manager.lock(key).unwrap());
    for lock in &locks {
        lock.try_lock(&soon()).unwrap();
    }
    assert_eq!(manager.inspect_all().unwrap().len(), locks.len());
}

/// Two that begin at once: neither sees the other's row when it asks.
#[test]
fn keys_that_collide_at_the_first_moment_do_not_wait_for_ever() {
    // At the same time, since one of the two waits until its time is over.
    thread::scope(|scope| {
        for _ in 0..7 {
            scope.spawn(|| collide_at_the_first_moment(3));
        }
    });
}

fn collide_at_the_first_moment(rounds: usize) {
    let database = Database::fresh().unwrap();
    let manager = started(config(&database).wait_slice(Duration::from_millis(200)));
    let mut client = database.client().unwrap();
    for _ in 0..rounds {
        client.batch_execute("DELETE FROM dsync.lock").unwrap();
        let number = manager.lock(number_of_x(&database)).unwrap();
        let locks = [lock(&manager, "x"), number];
        let begun = locks.each_ref().map(|lock| {
            let lock = Arc::clone(lock);
            common::begin(move || lock.lock(&Context::timeout(Duration::from_secs(5))))
        });
        let outcomes = begun.map(common::Outcome::get);
        assert_eq!(outcomes.iter().filter(|outcome| outcome.is_ok()).count(), 1, "{outcomes:?}");
        let refused = outcomes.iter().find_map(|outcome| outcome.as_ref().err()).unwrap();
        assert!(refused.to_string().contains("the same hash as"), "{refused}");
        for lock in &locks {
            lock.release().unwrap();
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Old rows
// ---------------------------------------------------------------------------------------------------------------------

#[test]
fn old_rows_go_but_not_those_of_held_locks_and_of_fenced_transactions() {
    let database = Database::fresh().unwrap();
    let manager = started(config(&database));
    let locks = ["held", "fenced", "old", "recent"].map(|key| lock(&manager, key));
    for lock in &locks {
        lock.lock(&soon()).unwrap();
    }
    let mut writer = database.client().unwrap();
    let mut transaction = writer.transaction().unwrap();
    locks[1].term().unwrap().fence(&mut transaction).unwrap();
    for lock in &locks[1..] {
        lock.release().unwrap();
    }
    let mut client = database.client().unwrap();
    client
        .batch_execute(
            "UPDATE dsync.lock SET since = now() - interval '25 hours' WHERE key IN ('held', 'old');
             UPDATE dsync.lock SET since = now() - interval '23 hours' WHERE key = 'recent'",
        )
        .unwrap();
    let keys = |client: &mut Client| -> Vec<String> {
        let rows = client.query("SELECT key FROM dsync.lock ORDER BY key", &[]).unwrap();
        rows.iter().map(|row| row.get(0)).collect()
    };
    make_catalog(config(&database));
    assert_eq!(keys(&mut client), ["fenced", "held", "recent"]);

    transaction.commit().unwrap();
    client
        .batch_execute("UPDATE dsync.lock SET since = now() - interval '25 hours' WHERE key = 'fenced'")
        .unwrap();
    let mut transaction = writer.transaction().unwrap();
    transaction.batch_execute("SELECT FROM dsync.lock WHERE key = 'fenced' FOR SHARE").unwrap();
    let begun = Instant::now();
    make_catalog(config(&database));
    assert!(
        begun.elapsed() < Duration::from_secs(20),
        "nobody waits for the transaction: {:?}",
        begun.elapsed()
    );
    assert_eq!(keys(&mut client), ["fenced", "held", "recent"]);
    transaction.commit().unwrap();
    make_catalog(config(&database));
    assert_eq!(keys(&mut client), ["held", "recent"]);

    let term = locks[0].term().unwrap();
    assert!(term.is_current(&mut client).unwrap());
    assert!(one_term(&locks[2]) > term.token().unwrap(), "a row that has gone comes back");
}

/// What nobody has changed is what the next one says who comes.
#[test]
fn semaphores_go_that_nobody_has_used_for_a_day_but_not_what_was_changed() {
    let database = Database::fresh().unwrap();
    let manager = started(config(&database));
    let semaphores = ["held", "changed", "old", "recent"].map(|key| manager.semaphore(key, 2).unwrap());
    let held = semaphores.each_ref().map(|semaphore| semaphore.acquire(PATIENCE).unwrap());
    semaphores[1].set_permits(3).unwrap();
    let [held, others @ ..] = held;
    drop(others);
    let mut client = database.client().unwrap();
    client
        .batch_execute(
            "UPDATE dsync.semaphore SET since = now() - interval '2 days';
             UPDATE dsync.lock SET since = now() - interval '2 days' WHERE key <> 'recent'",
        )
        .unwrap();
    make_catalog(config(&database));
    let rows = client.query("SELECT key FROM dsync.semaphore ORDER BY key", &[]).unwrap();
    let keys: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
    assert_eq!(keys, ["changed", "held", "recent"]);
    assert!(held.term().is_current(&mut client).unwrap());
    assert_eq!(manager.inspect("changed").unwrap().permits, Some(3));
    let other = started(config(&database));
    drop(other.semaphore("old", 5).unwrap().acquire(PATIENCE).unwrap());
}

/// A reader's term does not write the row, so nothing in it tells that the lock has been taken up again since the cleaning looked for those
/// that are held.
#[test]
fn the_row_of_a_reader_that_begins_while_old_rows_go_stays() {
    /// So many that to come to the reader's, which is the last, takes a while.
    const OLD: i32 = 9_000;
    let database = Database::fresh().unwrap();
    let manager = started(config(&database));
    let mut client = database.client().unwrap();
    let reader = manager.shared_lock("x").unwrap();
    let mut cleaned = 0;
    for round in 0..5 {
        client
            .execute(
                "INSERT INTO dsync.lock (id, pair, namespace, key, token, pid, since)
                 SELECT number, false, 'old', number::text, 0, 0, now() - interval '2 days' FROM generate_series(1, $1) AS number
                 ON CONFLICT DO NOTHING",
                &[&OLD],
            )
            .unwrap();
        client.execute("DELETE FROM dsync.lock WHERE key = 'x'", &[]).unwrap();
        reader.acquire(PATIENCE).unwrap().release().unwrap();
        let old = "UPDATE dsync.lock SET since = now() - interval '2 days' WHERE key = 'x'";
        client.execute(old, &[]).unwrap();
        let cleaning = {
            let config = config(&database);
            thread::spawn(move || make_catalog(config))
        };
        let cleans = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%dsync.lock AS gone%' AND state = 'active'
                      AND datname = current_database() AND pid <> pg_backend_pid()";
        while !cleaning.is_finished() && count(&mut client, cleans) == 0 {}
        let guard = reader.acquire(PATIENCE).unwrap();
        cleaning.join().unwrap();
        assert!(guard.term().is_current(&mut client).unwrap(), "round {round}");
        guard.release().unwrap();
        cleaned += i32::from(count(&mut client, "SELECT count(*) FROM dsync.lock") == 1);
    }
    assert!(cleaned > 0);
}
