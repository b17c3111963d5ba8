//! How the server is found, and what is said when it is not.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

use support::{Database, Server, Shutdown};

use crate::common::{at, hold, pgdsync, run, started};

/// A home of a user, which goes when the value is dropped.
struct Home(PathBuf);

impl Home {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("pgdsync-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn write(&self, name: &str, text: &str, mode: u32) -> String {
        let path = self.0.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        path.to_str().unwrap().to_owned()
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn the_password_and_the_service_are_found_where_psql_finds_them() {
    let server = Server::builder().password_auth().start().unwrap();
    let (port, password) = (server.port(), server.password().unwrap());
    drop(started(&server.url()));
    let home = Home::new("home");
    let bare = format!("postgres://postgres@127.0.0.1:{port}/postgres");
    let list = || {
        let mut command = pgdsync(&["list"]);
        command.env("HOME", &home.0);
        command
    };
    let line = format!("127.0.0.1:{port}:postgres:postgres:{password}\n");

    run(list().args(["--url", &bare])).badly(69, &["password"]);
    home.write(".pgpass", &line, 0o600);
    let empty = "no lock is held or waited for\n";
    assert_eq!(run(list().args(["--url", &bare])).well(), empty);
    assert_eq!(run(list().env("DATABASE_URL", &bare)).well(), empty);
    let job = || pgdsync(&["run", "a", "--", "echo", "ran"]);
    assert_eq!(run(job().env("HOME", &home.0).env("DATABASE_URL", &bare)).well(), "ran\n");
    home.write(".pgpass", &line, 0o644);
    let open = run(list().args(["--url", &bare]));
    assert!(!open.err.contains(password), "{}", open.err);
    open.badly(69, &["chmod 0600", "password"]);
    fs::remove_file(home.0.join(".pgpass")).unwrap();
    let elsewhere = home.write("elsewhere", &line, 0o600);
    assert_eq!(run(list().args(["--url", &bare]).env("PGPASSFILE", &elsewhere)).well(), empty);

    let service = format!(
        "[prod]\nhost=127.0.0.1\nport={port}\nuser=postgres\npassword={password}\n[broken]\n{password}\n"
    );
    home.write(".pg_service.conf", &service, 0o600);
    assert_eq!(run(list().args(["--url", "service=prod dbname=postgres"])).well(), empty);
    assert_eq!(run(list().env("PGSERVICE", "prod")).well(), empty);
    assert_eq!(run(job().env("HOME", &home.0).env("PGSERVICE", "prod")).well(), "ran\n");
    run(list().env("PGSERVICE", "none")).badly(64, &["PGSERVICE", "no service file has"]);
    let broken = run(list().env("PGSERVICE", "broken"));
    assert!(!broken.err.contains(password), "{}", broken.err);
    broken.badly(64, &["PGSERVICE", "line 7 of the service file", "name=value"]);
}

#[test]
fn every_error_names_what_to_change_and_has_the_exit_code_for_it() {
    let server = Server::start().unwrap();
    let url = server.url();
    drop(started(&url));
    let database = server.database().unwrap();
    for (arguments, code, told) in [
        (&["list", "--url", "postgres://app:se@cret@db/app"][..], 64, "%40"),
        (&["list", "--url=host=db sslmode=allow"], 64, "sslmode"),
        (&["list", "--url=host=db sslmode=verify-ca"], 64, "sslrootcert"),
        (&["list", "--url=host=db sslmode=require sslcert=/x"], 64, "sslcert"),
        (&["show"], 64, "<KEY>"),
        (&["show", "#x"], 64, "##x"),
        (&["show", ""], 64, "the key is empty"),
        (&["show", "a", "--namespace", "a\tb", "--schema="], 64, "choose another name"),
        (&["watch", "--interval=never"], 64, "a unit behind a number"),
        (&["watch", "--interval=5ms"], 64, "10ms at least"),
        (&["dance"], 64, "dance"),
        (&["list", "--output=xml"], 64, "json"),
    ] {
        let ran = at(&url, arguments);
        assert!(!ran.err.contains("cret"), "{ran:?}");
        ran.badly(code, &[told]);
    }
    at(&database.url(), &["list"]).badly(
        69,
        &["catalog is not there", "run the SQL that `pgdsync catalog --grant ROLE` prints", "DSYNC_CATALOG"],
    );
    at(&server.url_at("127.0.0.1", 1), &["list"]).badly(69, &["refused", "127.0.0.1:1"]);
    // What comes of a DATABASE_URL that is not set.
    at("host=/nowhere", &["list"]).badly(69, &["/nowhere/.s.PGSQL.5432", "name its host, by DATABASE_URL"]);
    at(&(url.trim_end_matches("postgres").to_owned() + "nowhere"), &["list"])
        .badly(69, &["nowhere", "database"]);
    let version = run(&mut pgdsync(&["--version"])).well();
    assert!(version.starts_with("pgdsync 0."), "{version}");
    assert!(run(&mut pgdsync(&["--help"])).well().contains("watch"));

    drop(database);
    server.stop(Shutdown::Fast).unwrap();
    for verb in
        [&["list"][..], &["show", "a"], &["watch"], &["resign", "a"], &["break", "a", "--yes"], &["bench"]]
    {
        at(&url, verb).badly(69, &["127.0.0.1"]);
    }
}

#[test]
fn certificates_are_verified_as_sslmode_says() {
    if support::skip_without(support::tls::available()) {
        return;
    }
    let server = Server::builder().tls().hba("hostnossl all all all reject").start().unwrap();
    let home = Home::new("tls");
    let pem = server.certificate_pem().unwrap();
    let pem = pem.to_str().unwrap();
    let other_server = Server::builder().tls().start().unwrap();
    let another = fs::read_to_string(other_server.certificate_pem().unwrap()).unwrap();
    let list = |host: &str, more: &str| {
        let url = format!(
            "host={host} hostaddr=127.0.0.1 port={} user=postgres dbname=postgres {more}",
            server.port()
        );
        let mut command = pgdsync(&["show", "a"]);
        command.env("HOME", &home.0).env("DATABASE_URL", url).env("DSYNC_CATALOG", "none");
        run(&mut command)
    };
    for (host, more) in [
        ("elsewhere.example", String::new()),
        ("elsewhere.example", "sslmode=require".to_owned()),
        ("elsewhere.example", format!("sslmode=require sslrootcert={pem}")),
        ("elsewhere.example", format!("sslmode=verify-ca sslrootcert={pem}")),
        ("localhost", format!("sslmode=verify-full sslrootcert={pem}")),
    ] {
        assert!(list(host, &more).well().contains("held by     nobody"), "{more}");
    }
    let verified = format!(
        "host=localhost hostaddr=127.0.0.1 port={} user=postgres dbname=postgres sslmode=verify-full sslrootcert={pem}",
        server.port()
    );
    let mut job = pgdsync(&["run", "a", "--", "echo", "ran"]);
    assert_eq!(run(job.env("HOME", &home.0).env("DATABASE_URL", &verified)).well(), "ran\n");
    list("elsewhere.example", &format!("sslmode=verify-full sslrootcert={pem}"))
        .badly(69, &["certificate", "host name"]);
    list("localhost", "sslmode=verify-full sslrootcert=/secret")
        .badly(64, &["sslrootcert", "cannot be read"]);
    list("localhost", "sslmode=require sslrootcert=system").badly(64, &["verify-full only"]);
    // Nobody that the system trusts has signed it, if it trusts anybody.
    let system = list("localhost", "sslmode=verify-full");
    assert!(
        system.code == Some(69) && system.err.contains("issuer") || system.err.contains("ca-certificates"),
        "{system:?}"
    );
    list("localhost", "sslmode=disable").badly(69, &["encryption"]);
    // What libpq does as well: the user's own file counts wherever no other is named.
    home.write(".postgresql/root.crt", &another, 0o600);
    list("localhost", "sslmode=require").badly(69, &["issuer"]);
    list("localhost", "sslmode=verify-full").badly(69, &["issuer"]);
}

#[test]
fn a_password_in_a_url_is_in_no_output() {
    let database = Database::fresh().unwrap();
    let url = database.url().replace("postgres@", "postgres:hushhush@");
    let manager = started(&url);
    let _guard = hold(&manager, "a");
    for arguments in [&["list"][..], &["show", "a"], &["show", "a", "--output=json"]] {
        let ran = run(pgdsync(arguments).env("DATABASE_URL", &url).env("RUST_LOG", "debug"));
        assert!(ran.code == Some(0) && !format!("{ran:?}").contains("hushhush"), "{ran:?}");
    }
    // In the wrong place.
    let pairs = "host=localhost password=hushhush";
    for arguments in [
        &["doctor", &url][..],
        &["doctor", pairs],
        &[&url],
        &["run", &format!("--lease={url}"), "a", "--", "true"],
    ] {
        let ran = run(&mut pgdsync(arguments));
        assert!(!format!("{ran:?}").contains("hushhush"), "{ran:?}");
        ran.badly(64, &["a connection string"]);
    }
}
