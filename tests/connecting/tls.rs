//! TLS by the features `tls-…`: what `sslmode` and its like promise, with good and bad certificates. Which of the features it is, is
//! for whoever builds the tests: `cargo xtask test` has each of them.

use std::error::Error as StdError;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

use dsync::{CatalogMode, Config, Error, ErrorKind, PostgresManager, SyncManager};
use support::Server;
use support::tls::{self, Certificate, Subject};

use crate::common::{hear, lock, soon};
use crate::connection::{Variables, lock_in};

/// A password, and a part of the path of each file. No text may have it.
const HUSH: &str = "hushhush";

/// A folder for files that a connection names, removed with the value.
struct Files(PathBuf);

impl Files {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("dsync-{name}-{}-{HUSH}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    /// Writes a file that only its owner can read.
    fn write(&self, name: &str, text: &str) -> String {
        let path = self.0.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        path.to_str().unwrap().to_owned()
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A server that takes nobody without TLS: the role `app` by a certificate of its own, `bound` by the password, and others at once.
fn server() -> Server {
    let hba = "hostnossl all all all reject\nhostssl all app all cert\nhostssl all bound all scram-sha-256";
    Server::builder().tls().hba(hba).start().unwrap()
}

/// An authority like no other, but for its name.
fn authority(name: &str) -> Certificate {
    Certificate::self_signed(&Subject { name, is_authority: true, ..Subject::default() }).unwrap()
}

fn for_localhost() -> Subject<'static> {
    Subject { name: "server", hosts: &["localhost", "127.0.0.1"], ..Subject::default() }
}

fn config(server: &Server, more: &str) -> Config {
    let port = server.port();
    let url = format!("host=localhost hostaddr=127.0.0.1 port={port} dbname=postgres password={HUSH} {more}");
    let user = if more.contains("user=") { "" } else { " user=postgres" };
    Config::from_url(&(url + user))
        .unwrap()
        .catalog(CatalogMode::None)
        .release_timeout(crate::common::PATIENCE)
}

/// What the manager says that could not be made or started; nothing if it could.
fn said(config: Config) -> String {
    match PostgresManager::new(config) {
        Ok(manager) => said_at_start(&manager),
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::InvalidConfig, "{error}");
            shown(&error)
        }
    }
}

fn said_at_start(manager: &PostgresManager) -> String {
    let Err(error) = manager.start() else { return String::new() };
    let cause = error.source().and_then(|cause| cause.downcast_ref::<Error>()).expect("the cause is kept");
    assert_eq!(cause.kind(), ErrorKind::SessionRefused, "{error}");
    shown(&error)
}

/// As people get to see it. It gives away no secret, and sends nobody after a password that is right.
fn shown(error: &Error) -> String {
    let text = format!("{error:#}");
    assert!(!format!("{text} {error:?}").contains(HUSH), "{text}");
    assert!(!text.contains("check password"), "{text}");
    text
}

fn assert_says(case: &str, said: &str, wanted: &str) {
    assert_eq!(said.is_empty(), wanted.is_empty(), "{case}: {said}");
    assert!(said.contains(wanted), "{case} should say {wanted:?}: {said}");
}

#[test]
fn each_mode_takes_the_certificates_that_it_takes_in_libpq() {
    if support::skip_without(tls::available()) {
        return;
    }
    let (server, files) = (server(), Files::new("modes"));
    let authority = authority("authority");
    let trusted = files.write("authority.pem", authority.pem());
    let named = for_localhost();
    let signed = |subject: Subject<'_>| authority.sign(&subject).unwrap();
    let own = Certificate::self_signed(&named).unwrap();
    // What `openssl req -x509` makes.
    let own_authority = Certificate::self_signed(&Subject { is_authority: true, ..named.clone() }).unwrap();
    let [foreign, namesake] =
        ["another", "authority"].map(|name| self::authority(name).sign(&named).unwrap());
    // What each mode says, in the order of the modes below; nothing where it connects.
    let cases = [
        ("good", signed(named.clone()), ["", "", "", "", ""]),
        (
            "expired",
            signed(Subject { years: 2000..2001, ..named.clone() }),
            ["", "", "renew the server's", "renew the server's", "renew the server's"],
        ),
        (
            "not valid yet",
            signed(Subject { years: 4000..4001, ..named.clone() }),
            ["", "", "correct the clock", "correct the clock", "correct the clock"],
        ),
        (
            "another host's",
            signed(Subject { hosts: &["elsewhere.example"], ..named.clone() }),
            ["", "", "", "", "subjectAltName"],
        ),
        ("another authority's", foreign, ["", "", "in sslrootcert", "in sslrootcert", "in sslrootcert"]),
        ("its namesake's", namesake, ["", "", "in sslrootcert", "in sslrootcert", "in sslrootcert"]),
        ("self-signed", own, ["", "", "in sslrootcert", "in sslrootcert", "in sslrootcert"]),
        ("an authority's own", own_authority, ["", "", "sslrootcert", "sslrootcert", "sslrootcert"]),
    ];
    for (what, certificate, outcomes) in &cases {
        server.present(certificate).unwrap();
        let modes = [
            "sslmode=prefer".to_owned(),
            "sslmode=require".to_owned(),
            format!("sslmode=require sslrootcert={trusted}"),
            format!("sslmode=verify-ca sslrootcert={trusted}"),
            format!("sslmode=verify-full sslrootcert={trusted}"),
        ];
        for (mode, outcome) in modes.iter().zip(outcomes) {
            assert_says(&format!("{what}, {mode}"), &said(config(&server, mode)), outcome);
        }
    }
    // A certificate that is trusted itself.
    for (what, certificate, _) in &cases[6..] {
        server.present(certificate).unwrap();
        let itself = files.write("itself.pem", certificate.pem());
        for mode in ["require", "verify-ca", "verify-full"] {
            let more = format!("sslmode={mode} sslrootcert={itself}");
            assert_says(&format!("{what}, {mode}"), &said(config(&server, &more)), "");
        }
    }
    for is_authority in [false, true] {
        for (subject, wanted) in [
            (Subject { years: 2000..2001, ..named.clone() }, "renew the server's"),
            (Subject { hosts: &["elsewhere.example"], ..named.clone() }, "subjectAltName"),
        ] {
            let certificate = Certificate::self_signed(&Subject { is_authority, ..subject }).unwrap();
            server.present(&certificate).unwrap();
            let more =
                format!("sslmode=verify-full sslrootcert={}", files.write("itself.pem", certificate.pem()));
            assert_says(&format!("itself, {is_authority}"), &said(config(&server, &more)), wanted);
        }
    }
}

#[test]
fn files_that_cannot_be_used_are_told_before_anything_is_sent() {
    if support::skip_without(tls::available()) {
        return;
    }
    let (server, files) = (server(), Files::new("files"));
    let authority = authority("authority");
    let client = authority.sign(&Subject { name: "app", ..Subject::default() }).unwrap();
    let trusted = files.write("authority.pem", authority.pem());
    let (certificate, key) = (files.write("app.crt", client.pem()), files.write("app.key", &client.key()));
    let open = files.write("open.key", &client.key());
    fs::set_permissions(&open, fs::Permissions::from_mode(0o644)).unwrap();
    let other = files.write("other.key", &authority.key());
    let encrypted = client.key().replace("PRIVATE KEY", "ENCRYPTED PRIVATE KEY");
    let encrypted = files.write("encrypted.key", &encrypted);
    let nonsense = files.write("nonsense", &format!("-----BEGIN {HUSH}\n{HUSH}"));
    let folder = files.0.display();
    for (setting, more, wanted) in [
        ("sslrootcert", format!("sslrootcert={folder}/none"), "cannot be read"),
        ("sslrootcert", format!("sslrootcert={folder}"), "not a plain file"),
        ("sslrootcert", format!("sslrootcert={nonsense}"), "no certificate in PEM"),
        ("sslrootcert", format!("sslrootcert={key}"), "no certificate in PEM"),
        ("sslrootcert", "sslmode=verify-ca".to_owned(), "name the file with the issuer"),
        ("sslrootcert", "sslmode=require sslrootcert=system".to_owned(), "verify-full only"),
        ("sslcert", format!("sslcert={certificate}"), "name both"),
        ("sslkey", format!("sslkey={key}"), "name both"),
        ("sslcert", format!("sslcert={folder}/none sslkey={key}"), "cannot be read"),
        ("sslcert", format!("sslcert={nonsense} sslkey={key}"), "no certificate in PEM"),
        ("sslkey", format!("sslcert={certificate} sslkey={folder}/none"), "cannot be read"),
        ("sslkey", format!("sslcert={certificate} sslkey={open}"), "chmod 0600"),
        ("sslkey", format!("sslcert={certificate} sslkey={other}"), "not the key of the first certificate"),
        ("sslkey", format!("sslcert={certificate} sslkey={encrypted}"), "encrypted"),
        ("sslkey", format!("sslcert={certificate} sslkey={nonsense}"), "no key in PEM"),
        ("sslkey", format!("sslcert={certificate} sslkey={certificate}"), "no key in PEM"),
    ] {
        let error = PostgresManager::new(config(&server, &more)).expect_err(&more);
        assert_eq!(error.kind(), ErrorKind::InvalidConfig);
        assert_says(
            &more,
            &shown(&error),
            &format!("{setting} (PG{}) cannot be used", setting.to_uppercase()),
        );
        assert_says(&more, &shown(&error), wanted);
        // Where there is no TLS, no file is read.
        let config = config(&server, &format!("{more} sslmode=disable"));
        assert!(PostgresManager::new(config).is_ok(), "{more}");
    }
    let all = format!("sslrootcert={trusted} sslcert={certificate} sslkey={key}");
    assert!(PostgresManager::new(config(&server, &all)).is_ok());
}

#[test]
fn a_client_certificate_is_shown_and_one_that_is_renewed_is_used() {
    if support::skip_without(tls::available()) {
        return;
    }
    let (server, files) = (server(), Files::new("client"));
    let authority = authority("authority");
    server.client().unwrap().batch_execute("CREATE ROLE app LOGIN").unwrap();
    let issuers = files.write("issuers.pem", authority.pem());
    // The server reads it, which runs as somebody else.
    fs::set_permissions(&issuers, fs::Permissions::from_mode(0o644)).unwrap();
    server.set("ssl_ca_file", &issuers).unwrap();

    let app = Subject { name: "app", ..Subject::default() };
    let (certificate, key) = (files.0.join("app.crt"), files.0.join("app.key"));
    let more = format!("user=app sslmode=require sslcert={} sslkey={}", certificate.display(), key.display());
    let write = |certificate: &Certificate| {
        files.write("app.crt", certificate.pem());
        files.write("app.key", &certificate.key());
    };
    let good = authority.sign(&app).unwrap();
    let bad = [
        (self::authority("another").sign(&app).unwrap(), "the server does not take the client certificate"),
        (self::authority("authority").sign(&app).unwrap(), "the server does not take the client certificate"),
        (
            authority.sign(&Subject { years: 2000..2001, ..app.clone() }).unwrap(),
            "the server does not take the client certificate",
        ),
        (authority.sign(&Subject { name: "other", ..app.clone() }).unwrap(), "pg_ident.conf"),
    ];
    assert_says("none", &said(config(&server, "user=app sslmode=require")), "name one with sslcert");
    for (certificate, wanted) in &bad {
        write(certificate);
        assert_says(wanted, &said(config(&server, &more)), wanted);
    }
    // The same manager, when the file has changed.
    let manager = PostgresManager::new(config(&server, &more)).unwrap();
    assert_says("another user's", &said_at_start(&manager), "pg_ident.conf");
    write(&good);
    assert_says("renewed", &said_at_start(&manager), "");
    // While one is being written.
    files.write("app.key", "");
    let held = lock(&manager, "x");
    held.lock(&soon()).unwrap();
    let ended = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE usename = 'app'";
    let lost = held.lost();
    assert!(server.client().unwrap().query_one(ended, &[]).unwrap().get::<_, i64>(0) > 0);
    hear(&lost);
    held.lock(&soon()).unwrap();
    held.release().unwrap();
}

#[test]
fn a_channel_is_bound_where_the_certificate_allows_it() {
    if support::skip_without(tls::available()) {
        return;
    }
    let (server, authority) = (server(), authority("authority"));
    let password = format!("CREATE ROLE bound LOGIN PASSWORD '{HUSH}'");
    server.client().unwrap().batch_execute(&password).unwrap();
    let bound =
        |more: &str| said(config(&server, &format!("sslmode=require channel_binding=require {more}")));
    server.present(&authority.sign(&for_localhost()).unwrap()).unwrap();
    assert_says("SCRAM", &bound("user=bound"), "");
    assert_says("no password is asked for", &bound("user=postgres"), "asks for by scram-sha-256");
    let unbound =
        Certificate::self_signed(&Subject { is_authority: true, is_unbound: true, ..Subject::default() });
    server.present(&unbound.unwrap().sign(&for_localhost()).unwrap()).unwrap();
    assert_says("Ed25519", &bound("user=bound"), "signed with RSA or ECDSA");
}

#[test]
fn direct_negotiation_works_where_the_server_has_it() {
    if support::skip_without(tls::available()) {
        return;
    }
    let server = server();
    let text = said(config(&server, "sslmode=require sslnegotiation=direct"));
    assert_says("direct", &text, if server.version() < 17 { "needs PostgreSQL 17" } else { "" });
}

#[test]
fn a_server_without_tls_is_told_apart_and_a_connector_of_ones_own_comes_first() {
    let plain = Server::shared();
    for mode in ["require", "verify-full"] {
        let text = said(config(plain, &format!("sslmode={mode}")));
        assert_says(mode, &text, "switch TLS on at the server (ssl = on)");
    }
    assert_says("prefer", &said(config(plain, "sslmode=prefer")), "");
    if support::skip_without(tls::available()) {
        return;
    }
    let server = server();
    let own = config(&server, "sslmode=require").tls(postgres::NoTls);
    assert_says("the application's connector", &said(own), "no TLS implementation");
}

#[test]
fn the_environment_says_whom_to_trust() {
    if support::skip_without(tls::available()) {
        return;
    }
    let (server, files) = (server(), Files::new("environment"));
    let authority = authority("authority");
    server.present(&authority.sign(&for_localhost()).unwrap()).unwrap();
    let trusted = files.write("authority.pem", authority.pem());
    let port = server.port().to_string();
    let address = [
        ("PGHOST", "localhost"),
        ("PGHOSTADDR", "127.0.0.1"),
        ("PGPORT", &*port),
        ("PGUSER", "postgres"),
        ("HOME", files.0.to_str().unwrap()),
    ];
    let stranger = files.write("stranger/.postgresql/root.crt", self::authority("another").pem());
    let [stranger, friend] = [stranger, files.write("friend/.postgresql/root.crt", authority.pem())]
        .map(|path| path.strip_suffix("/.postgresql/root.crt").unwrap().to_owned());
    let cases: [(Variables<'_>, &str); 8] = [
        (&[("PGSSLMODE", "verify-full"), ("PGSSLROOTCERT", &trusted)], "locked"),
        (&[("PGSSLROOTCERT", "system"), ("SSL_CERT_FILE", &trusted)], "locked"),
        (
            &[("PGSSLROOTCERT", "system"), ("SSL_CERT_FILE", &format!("{stranger}/.postgresql/root.crt"))],
            "in sslrootcert",
        ),
        (&[("PGSSLMODE", "require"), ("HOME", &stranger)], "in sslrootcert"),
        (&[("PGSSLMODE", "verify-full"), ("HOME", &friend)], "locked"),
        (&[("PGSSLMODE", "require"), ("HOME", &stranger), ("PGSSLROOTCERT", &trusted)], "locked"),
        (&[("HOME", &friend)], "locked"),
        (&[("PGSSLMODE", "disable")], "without TLS"),
    ];
    for (variables, wanted) in cases {
        let said = lock_in(&[&address, variables].concat());
        assert!(said.contains(wanted), "{variables:?}: {said}");
        assert_eq!(said.contains("locked"), wanted == "locked", "{variables:?}: {said}");
    }
}
