mod tables;

use postgres::config::{ChannelBinding, Host, LoadBalanceHosts, SslMode, TargetSessionAttrs};

use super::*;

fn from(variables: &[(&str, &str)]) -> Result<Config> {
    Config::from_variables(None, None, &|name| {
        Ok(variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned()))
    })
}

/// As in a build without any of the features `tls-…`.
fn bare(config: Config) -> Config {
    Config { tls_stack: None, ..config }
}

#[test]
fn variables_fill_in_what_a_url_leaves_out_and_nothing_else() {
    let config = from(&[
        ("DATABASE_URL", "postgres://ada@example.org/x?sslmode=disable"),
        ("PGHOST", "other"),
        ("PGUSER", "other"),
        ("PGDATABASE", "other"),
        ("PGSSLMODE", "require"),
        ("PGPORT", "6432"),
        ("PGPASSWORD", "secret"),
        ("PGCHANNELBINDING", "require"),
        ("DSYNC_LEASE", "9s"),
        ("DSYNC_SCHEMA", "locks"),
    ])
    .unwrap();
    assert_eq!(format!("{:?}", config.schema), r#""locks""#);
    assert_eq!(config.postgres.get_hosts(), [Host::Tcp("example.org".into())]);
    assert_eq!(config.postgres.get_user(), Some("ada"));
    assert_eq!(config.postgres.get_dbname(), Some("x"));
    assert_eq!(config.postgres.get_ssl_mode(), SslMode::Disable);
    assert_eq!(config.postgres.get_ports(), [6432]);
    assert_eq!(config.postgres.get_password(), Some(&b"secret"[..]));
    assert_eq!(config.postgres.get_channel_binding(), ChannelBinding::Require);
    assert_eq!(config.lease, Duration::from_secs(9));

    let bare = from(&[("DATABASE_URL", "postgres:///x"), ("PGPORT", "6432")]).unwrap();
    assert!(matches!(bare.postgres.get_hosts(), [Host::Unix(_)]), "the local server");
}

/// Not in plain text where `psql` would refuse to connect.
#[test]
fn what_makes_the_connection_safer_is_not_ignored_beside_a_url() {
    for (name, value) in [
        ("PGSSLMODE", "require"),
        ("PGREQUIRESSL", "1"),
        ("PGCHANNELBINDING", "require"),
        ("PGSSLROOTCERT", "/etc/ca.pem"),
        ("PGSSLCRL", "/etc/crl.pem"),
        ("PGSSLMINPROTOCOLVERSION", "TLSv1.3"),
    ] {
        let config = bare(from(&[("DATABASE_URL", "postgres://ada@example.org/x"), (name, value)]).unwrap());
        let error = config.validate().expect_err(name);
        assert!(error.to_string().contains("Config::tls"), "{name}: {error}");
        // `psql` does without TLS there too.
        for url in ["postgres://ada@%2Ftmp/x", "postgres://ada@example.org/x?sslmode=disable"] {
            let config = from(&[("DATABASE_URL", url), (name, value)]).unwrap();
            for config in [bare(config.clone()), config] {
                let outcome = config.validate();
                assert_eq!(outcome.is_ok(), name != "PGCHANNELBINDING", "{name} {outcome:?}");
            }
        }
        assert!(config.tls(postgres::NoTls).validate().is_ok() || name == "PGCHANNELBINDING", "{name}");
    }
    for (name, value) in [
        ("PGSSLMODE", "verify-full"),
        ("PGSSLMODE", "verify-ca"),
        ("PGREQUIREAUTH", "scram-sha-256"),
        ("PGGSSENCMODE", "require"),
        ("PGMINPROTOCOLVERSION", "3.2"),
        ("PGSERVICE", "prod"),
    ] {
        let error = from(&[("DATABASE_URL", "postgres://ada@example.org/x"), (name, value)])
            .and_then(|config| config.tls(postgres::NoTls).validate())
            .expect_err(name);
        assert!(error.to_string().contains(name), "{error}");
    }
    let config = from(&[("PGREQUIRESSL", "1"), ("PGSSLMODE", "prefer")]).unwrap();
    assert_eq!(config.postgres.get_ssl_mode(), SslMode::Prefer, "PGSSLMODE comes before PGREQUIRESSL");
}

#[test]
fn a_password_file_is_looked_into_only_where_no_password_is_given() {
    let file = ("PGPASSFILE", "/etc/pgpass");
    assert!(from(&[file]).unwrap().passwords.is_some());
    assert!(from(&[("HOME", "/root")]).unwrap().passwords.is_some());
    assert!(from(&[]).unwrap().passwords.is_none());
    assert!(from(&[file, ("PGPASSWORD", "x")]).unwrap().passwords.is_none());
    let url = |text: &str| Config::from_url(text).unwrap().passwords;
    assert!(url("postgres://ada@example.org/x?passfile=/etc/pgpass").is_some());
    assert!(url("postgres://ada@example.org/x").is_none(), "a program's own URL is complete");
    assert!(!format!("{:?}", url("host=a passfile=secret")).contains("secret"));
}

#[test]
fn a_service_comes_behind_the_url_and_before_the_other_variables() {
    let folder = std::env::temp_dir().join(format!("dsync-service-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let own = folder.join(".pg_service.conf");
    std::fs::write(&own, "[prod]\nhost=db\nuser=bob\nport=7\nsslmode=\n[bad]\nport=many\n").unwrap();
    std::fs::write(folder.join("pg_service.conf"), "[prod]\nhost=no\n[all]\nhost=everywhere\n").unwrap();
    let (home, file) = (folder.to_str().unwrap(), own.to_str().unwrap());
    for variables in [
        &[("HOME", home), ("PGSERVICE", "prod")][..],
        &[("PGSERVICEFILE", file), ("PGSERVICE", "prod")],
        &[("HOME", home), ("PGSERVICE", "other"), ("DATABASE_URL", "postgres://?service=prod")],
    ] {
        let more = [("PGHOST", "other"), ("PGPORT", "1"), ("PGDATABASE", "x"), ("PGSSLMODE", "require")];
        let config = from(&[variables, &more].concat()).unwrap();
        assert_eq!(config.postgres.get_hosts(), [Host::Tcp("db".into())]);
        assert_eq!((config.postgres.get_user(), config.postgres.get_dbname()), (Some("bob"), Some("x")));
        assert_eq!(
            (config.postgres.get_ports(), config.postgres.get_ssl_mode()),
            (&[7][..], SslMode::Require)
        );
    }
    let named = format!("postgres://ada@?service=prod&servicefile={file}");
    let config = Config::from_url(&named).unwrap();
    assert_eq!(config.postgres.get_user(), Some("ada"));
    assert_eq!(config.postgres.get_ports(), [7]);
    let of_all = from(&[("PGSERVICE", "all"), ("HOME", home), ("PGSYSCONFDIR", home)]).unwrap();
    assert_eq!(of_all.postgres.get_hosts(), [Host::Tcp("everywhere".into())]);
    for (variables, told) in [
        ([("PGSERVICE", "secret"), ("HOME", home)], "PGSERVICE cannot be used: no service file has"),
        (
            [("PGSERVICE", "prod"), ("PGSERVICEFILE", "/secret")],
            "PGSERVICE cannot be used: the service file that is named",
        ),
        ([("PGSERVICE", "bad"), ("HOME", home)], "the parameter port of the service cannot be used"),
    ] {
        let error = from(&variables).unwrap_err().to_string();
        assert!(error.contains(told) && !error.contains("secret"), "{error}");
    }
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn a_program_names_itself_where_nobody_else_does() {
    let name = |url: Option<&str>, variables: &[(&str, &str)]| {
        let get = |name: &str| {
            Ok(variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned()))
        };
        let config = Config::from_variables(Some("me"), url, &get).unwrap();
        config.postgres.get_application_name().map(str::to_owned)
    };
    assert_eq!(name(None, &[]).as_deref(), Some("me"));
    assert_eq!(name(Some("host=a application_name=x"), &[]).as_deref(), Some("x"));
    assert_eq!(name(Some("host=a fallback_application_name=x"), &[]).as_deref(), Some("x"));
    assert_eq!(name(None, &[("PGAPPNAME", "x")]).as_deref(), Some("x"));
    assert_eq!(name(Some("host=a"), &[("DATABASE_URL", "host=b application_name=y")]).as_deref(), Some("me"));
}

#[test]
fn certificates_are_verified_by_a_connector_that_was_made_for_it() {
    let url = |more: &str| Config::from_url(&format!("host=a user=ada {more}")).unwrap();
    for (more, issuer, name, root) in [
        ("sslmode=verify-full sslrootcert=/x", true, true, Some("/x")),
        ("sslmode=verify-ca", true, false, None),
        ("sslmode=require", false, false, None),
        // Whoever says whom to trust wants it looked at, as in libpq.
        ("sslmode=require sslrootcert=/x", true, false, Some("/x")),
        ("sslrootcert=/x", true, false, Some("/x")),
        ("sslrootcert=system", true, true, Some("system")),
        ("", false, false, None),
    ] {
        let config = url(more).tls_with(|wanted| {
            assert_eq!((wanted.verify_issuer, wanted.verify_name), (issuer, name), "{more}");
            assert_eq!(wanted.sslrootcert.as_deref(), root.map(std::path::Path::new), "{more}");
            Ok::<_, Error>(postgres::NoTls)
        });
        assert!(config.unwrap().validate().is_ok(), "{more}");
    }
    let never = |_: &TlsSettings| -> Result<postgres::NoTls> { panic!("there is no TLS") };
    assert!(url("sslmode=disable").tls_with(never).unwrap().validate().is_ok());
    assert!(
        Config::from_url("host=/tmp sslmode=verify-full")
            .unwrap()
            .tls_with(never)
            .unwrap()
            .validate()
            .is_ok()
    );
    let with = |more| url(more).tls_with(|_| Ok::<_, Error>(postgres::NoTls)).unwrap();
    assert!(with("sslcert=/x sslkey=/y").validate().is_ok());
    for (config, told) in [
        (url("sslmode=verify-full").tls(postgres::NoTls), "Config::tls_with"),
        (with("sslcrl=/x"), "sslcrl"),
        // Of a feature as well: it does not read this either.
        (url("sslcrl=/x"), "sslcrl"),
    ] {
        let error = config.validate().unwrap_err().to_string();
        assert!(error.contains(told), "{error}");
    }
    assert_eq!(url("sslrootcert=system").postgres.get_ssl_mode(), SslMode::Require);
    assert_eq!(url("sslrootcert=system sslmode=prefer").postgres.get_ssl_mode(), SslMode::Prefer);
}

#[test]
fn what_asks_for_tls_is_refused_where_there_is_none_with_the_features_to_switch_on() {
    for (more, named) in [
        ("sslmode=require", "sslmode=require"),
        ("sslmode=verify-ca sslrootcert=/x", "the parameter sslmode"),
        ("sslmode=verify-full", "the parameter sslmode"),
        ("sslrootcert=/x", "the parameter sslrootcert"),
        ("sslrootcert=system", "the parameter sslrootcert"),
        ("sslcert=/x", "the parameter sslcert"),
        ("sslkey=/x", "the parameter sslkey"),
        ("sslmode=require sslnegotiation=direct", "sslmode=require"),
        ("channel_binding=require", "channel_binding=require"),
    ] {
        let url = format!("host=a user=ada password=hush {more}");
        let error = bare(Config::from_url(&url).unwrap()).validate().expect_err(more);
        assert_eq!(error.kind(), ErrorKind::InvalidConfig);
        let text = error.to_string();
        let features = ["tls-native-tls", "tls-rustls-aws-lc-rs", "tls-rustls-ring", "dsync-postgres"];
        assert!(features.iter().all(|feature| text.contains(feature)), "{text}");
        assert!(text.contains(named) && text.contains("Config::tls") && !text.contains("hush"), "{text}");
        let own = Config::from_url(&url).unwrap().tls_with(|_| Ok::<_, Error>(postgres::NoTls)).unwrap();
        assert!(bare(own).validate().is_ok(), "{more}");
    }
}

#[test]
fn the_files_in_the_users_home_count_where_no_other_is_named() {
    let home = std::env::temp_dir().join(format!("dsync-tls-home-{}", std::process::id()));
    let own = home.join(".postgresql");
    std::fs::create_dir_all(&own).unwrap();
    let seen = |more: &[(&str, &str)]| {
        let config = from(&[&[("HOME", home.to_str().unwrap()), ("PGHOST", "a")], more].concat()).unwrap();
        assert!(bare(config.clone()).validate().is_ok(), "no file asks for TLS");
        let TlsSettings { verify_issuer, sslrootcert, sslcert, sslkey, .. } = config.tls_settings;
        let name = |path: Option<std::path::PathBuf>| {
            path.map(|path| path.file_name().unwrap().to_str().unwrap().to_owned())
        };
        (verify_issuer, [name(sslrootcert), name(sslcert), name(sslkey)])
    };
    let names = |names: [&str; 3]| names.map(|name| (!name.is_empty()).then(|| name.to_owned()));
    assert_eq!(seen(&[]), (false, names(["", "", ""])));
    std::fs::write(own.join("postgresql.key"), "").unwrap();
    assert_eq!(seen(&[]), (false, names(["", "", ""])), "a key alone is of no use");
    std::fs::write(own.join("root.crt"), "").unwrap();
    std::fs::write(own.join("postgresql.crt"), "").unwrap();
    assert_eq!(seen(&[]), (true, names(["root.crt", "postgresql.crt", "postgresql.key"])));
    let url = Config::from_url("host=a").unwrap().tls_settings;
    assert!(url.sslrootcert.is_none() && url.sslcert.is_none(), "a program's own URL is complete");
    std::fs::remove_dir_all(home).unwrap();
}

#[test]
fn the_peer_of_a_unix_socket_is_asked_for_only_there() {
    let asked = ("PGREQUIREPEER", "postgres");
    let error = from(&[asked]).unwrap().validate().unwrap_err();
    assert!(error.to_string().contains("PGREQUIREPEER"), "{error}");
    assert!(from(&[asked, ("PGHOST", "localhost")]).unwrap().validate().is_ok());
    assert!(from(&[asked, ("PGHOST", "/tmp"), ("PGHOSTADDR", "127.0.0.1")]).unwrap().validate().is_ok());
}

#[test]
fn variables_without_effect_are_let_be() {
    for (name, value) in [
        ("PGTZ", "Mars"),
        ("PGDATESTYLE", "x"),
        ("PGGEQO", "x"),
        ("PGCLIENTENCODING", "LATIN1"),
        ("PGGSSENCMODE", "prefer"),
        ("PGKRBSRVNAME", "x"),
        ("PGSERVICEFILE", "/nowhere"),
        ("PGSSLCOMPRESSION", "0"),
        ("PGMAXPROTOCOLVERSION", "latest"),
        ("PGMINPROTOCOLVERSION", "3.0"),
        ("PGTARGETSESSIONATTRS", "primary"),
        ("PGREQUIRESSL", "0"),
    ] {
        let config = from(&[(name, value)]).expect(name);
        assert!(config.validate().is_ok(), "{name}");
    }
}

#[test]
fn the_variables_of_libpq_describe_a_connection() {
    let config = from(&[
        ("PGHOST", "a,b"),
        ("PGPORT", "1,2"),
        ("PGUSER", "ada"),
        ("PGDATABASE", "engine"),
        ("PGSSLMODE", "disable"),
        ("PGTARGETSESSIONATTRS", "read-write"),
        ("PGLOADBALANCEHOSTS", "random"),
        ("PGCONNECT_TIMEOUT", "3"),
    ])
    .unwrap();
    assert_eq!(config.postgres.get_hosts(), [Host::Tcp("a".into()), Host::Tcp("b".into())]);
    assert_eq!(config.postgres.get_ports(), [1, 2]);
    assert_eq!(config.postgres.get_user(), Some("ada"));
    assert_eq!(config.postgres.get_dbname(), Some("engine"));
    assert_eq!(config.postgres.get_ssl_mode(), SslMode::Disable);
    assert_eq!(config.postgres.get_target_session_attrs(), TargetSessionAttrs::ReadWrite);
    assert_eq!(config.postgres.get_load_balance_hosts(), LoadBalanceHosts::Random);
    assert_eq!(config.postgres.get_connect_timeout(), Some(&Duration::from_secs(3)));
    assert_eq!(config.connect_time(), Duration::from_secs(6), "three for each of them");
}

#[test]
fn a_variable_that_cannot_be_understood_is_named_and_not_repeated() {
    for name in [
        "DATABASE_URL",
        "PGHOST",
        "PGHOSTADDR",
        "PGPORT",
        "PGCONNECT_TIMEOUT",
        "PGSSLMODE",
        "PGSSLNEGOTIATION",
        "PGCHANNELBINDING",
        "PGTARGETSESSIONATTRS",
        "PGLOADBALANCEHOSTS",
        "PGSERVICE",
        "PGREQUIREAUTH",
        "PGMINPROTOCOLVERSION",
        "DSYNC_CATALOG",
        "DSYNC_TAKEOVER",
        "DSYNC_QUORUM",
        "DSYNC_MAX_SESSIONS",
        "DSYNC_LEASE",
        "DSYNC_MARGIN",
        "DSYNC_CONNECT_TIMEOUT",
    ] {
        let error = from(&[(name, "in#valid")]).expect_err(name);
        assert_eq!(error.kind(), ErrorKind::InvalidConfig);
        assert!(error.to_string().contains(name), "{error}");
        assert!(!format!("{error:?} {error:#}").contains("in#valid"), "{error:?}");
    }
}

#[test]
fn settings_that_cannot_work_are_refused_with_advice() {
    let config = || Config::from_url("host=localhost user=x").unwrap();
    let refusal = |config: Config| config.validate().unwrap_err().to_string();
    assert!(config().validate().is_ok());
    assert!(refusal(config().lease(Duration::from_millis(100))).contains("lease is 100ms"));
    assert!(refusal(config().lease(Duration::MAX)).contains("lease"));
    assert!(refusal(config().heartbeat(Duration::from_secs(10))).contains("lengthen lease"));
    assert!(refusal(config().margin(Duration::from_secs(6))).contains("lengthen lease"));
    assert!(refusal(config().max_sessions(0)).contains("max_sessions"));
    assert!(refusal(config().wait_slice(Duration::ZERO)).contains("wait_slice"));
    let without = || config().catalog(CatalogMode::None);
    assert!(without().validate().is_ok());
    assert!(without().takeover(TakeoverPolicy::Immediate).validate().is_ok());
    for policy in [TakeoverPolicy::AfterPromotion, TakeoverPolicy::AfterAnyRestart] {
        assert!(refusal(without().takeover(policy)).contains("needs the catalog"), "{policy:?}");
    }
    let confirmed = || config().quorum(Quorum::NamedStandbys);
    assert!(confirmed().validate().is_ok());
    assert!(refusal(confirmed().catalog(CatalogMode::None)).contains("set the catalog to automatic"));
    assert!(refusal(confirmed().takeover(TakeoverPolicy::Immediate)).contains("set takeover to"));
    assert_eq!(from(&[("DSYNC_QUORUM", "named-standbys")]).unwrap().quorum, Quorum::NamedStandbys);
    assert!(refusal(config().namespace("a\0b")).contains("NUL"));
    // The text of a number, which is in no namespace, would be a name there.
    assert!(refusal(config().namespace("")).contains("namespace is empty"));
    assert!(refusal(config().service("")).contains("service"));
    for name in ["", "pg_locks", "information_schema", "a\0b", "a\n", "$check$", &"x".repeat(64)] {
        assert!(refusal(config().schema(name)).contains("choose another name"), "{name:?}");
    }
    for name in ["dsync", "user", "Locks of \"app\" 'x' \\", &"x".repeat(63)] {
        assert!(config().schema(name).validate().is_ok(), "{name:?}");
    }
    let require = Config::from_url("host=localhost user=x sslmode=require").unwrap();
    assert!(refusal(bare(require)).contains("Config::tls"));
    assert!(refusal(config().namespace("n".repeat(1_025))).contains("the limit is 1024"));
    assert!(refusal(config().service("s".repeat(1_006))).contains("the limit is 1005"));
    assert!(config().service("s".repeat(1_005)).validate().is_ok());
    let long = Config::from_url("host=localhost user=x connect_timeout=30").unwrap();
    assert_eq!(long.connect_time(), Duration::from_secs(30));
    assert!(refusal(long.connect_timeout(Duration::from_secs(2))).contains("connect_timeout"));
    for (text, told) in [
        ("host=localhost sslnegotiation=direct", "sslmode=require"),
        ("host=/tmp channel_binding=require", "connect over TCP"),
        ("host=localhost port=0", "the port is 0"),
        ("postgres://a%00b@localhost/x", "the user of the connection contains a NUL"),
        ("postgres://a:b%00@localhost/x", "the password contains a NUL"),
    ] {
        assert!(refusal(Config::from_url(text).unwrap()).contains(told), "{text}");
    }
    let mut standby = postgres::Config::new();
    standby.host("localhost").target_session_attrs(TargetSessionAttrs::ReadOnly);
    assert!(refusal(Config::from_postgres(standby)).contains("locks need the primary"));
    for host in
        ["ss#word@db", "a b", "@dsync", "a:b", "[::1]", "", "postgres://db", "db/app", "a\nb", "fe80::1%e h"]
    {
        let mut connection = postgres::Config::new();
        connection.host(host);
        let error = refusal(Config::from_postgres(connection));
        assert!(error.contains("percent-encode") && (host.is_empty() || !error.contains(host)), "{error}");
    }
    for host in
        ["db", "db-1.internal", "my_db", "127.0.0.1", "::1", "fe80::1%eth0", "/tmp", "grün.example", "db."]
    {
        let mut connection = postgres::Config::new();
        connection.host(host);
        assert!(Config::from_postgres(connection).validate().is_ok(), "{host}");
    }
    for lease in [500, 2_000, 60_000, 86_400_000] {
        assert!(config().lease(Duration::from_millis(lease)).validate().is_ok(), "{lease}");
    }
}
