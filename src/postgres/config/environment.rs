//! Settings from the environment.

use std::env;
use std::sync::atomic::{AtomicBool, Ordering};

use super::own_settings::{OWN_SETTINGS, PREFIX, nearest};
use super::settings::{Given, Origin};
use super::{Config, invalid};
use crate::error::{Error, Result};

impl Config {
    /// Settings from the environment.
    ///
    /// The connection is the one that `psql "$DATABASE_URL"` would open: `DATABASE_URL` is understood as by
    /// [`from_url`](Self::from_url), and what it leaves out, or all of it if it is not set, is filled in from the variables
    /// of PostgreSQL's own programs, and at last by their defaults: the local server. An empty variable counts as one that
    /// is not set.
    ///
    /// | variable | what becomes of it |
    /// |---|---|
    /// | `PGHOST`, `PGHOSTADDR`, `PGPORT`, `PGDATABASE`, `PGUSER`, `PGPASSWORD`, `PGAPPNAME`, `PGOPTIONS`, `PGLOADBALANCEHOSTS`, `PGCHANNELBINDING`, `PGSSLNEGOTIATION` | honoured |
    /// | `PGTARGETSESSIONATTRS`, `PGSSLMODE`, `PGSSLROOTCERT`, `PGSSLCERT`, `PGSSLKEY`, `PGCONNECT_TIMEOUT` (seconds) | as the parameters in `from_url` |
    /// | `PGREQUIRESSL` | `1` is `sslmode=require`, if nothing else says what `sslmode` is |
    /// | `PGSSLCERTMODE`, `PGSSLCRL`, `PGSSLCRLDIR`, `PGSSLSNI`, `PGSSLMINPROTOCOLVERSION`, `PGSSLMAXPROTOCOLVERSION` | not read: refused when the manager is made, unless a connector is given with [`tls`](Self::tls), which decides instead, or TLS is out of the question (`sslmode=disable`, Unix sockets) |
    /// | `PGPASSFILE`, `PGSERVICE`, `PGSERVICEFILE`, `PGSYSCONFDIR` | honoured, see below |
    /// | `PGREQUIREAUTH`, `PGREQUIREPEER` for a Unix socket, `PGGSSENCMODE=require`, `PGMINPROTOCOLVERSION` above 3.0 | refused: unset it, and say what it says in another way |
    /// | `PGCLIENTENCODING`, `PGDATESTYLE`, `PGGEQO`, `PGGSSDELEGATION`, `PGGSSENCMODE` otherwise, `PGGSSLIB`, `PGKRBSRVNAME`, `PGLOCALEDIR`, `PGMAXPROTOCOLVERSION`, `PGOAUTHDEBUG`, `PGSSLCOMPRESSION`, `PGTZ` | without effect on a session for locks |
    ///
    /// The variables of this library itself stand in [the table of its settings](Self#settings), beside the methods that set the same. A
    /// warning is logged, once in a process, for each other variable whose name begins with `DSYNC_`, in whatever case.
    ///
    /// # Files for TLS
    ///
    /// Where no setting names them, `~/.postgresql/root.crt` is the `sslrootcert`, `~/.postgresql/postgresql.crt` the `sslcert`, and
    /// `~/.postgresql/postgresql.key` the `sslkey`, if they are there. So with the first of them the server's certificate is
    /// verified, whatever `sslmode` says. A `~/.postgresql/root.crl` is not read.
    ///
    /// # Password files and services
    ///
    /// Where no password is given, it is looked up for each session in the
    /// [password file](https://www.postgresql.org/docs/current/libpq-pgpass.html): the one of `passfile` or `PGPASSFILE`, or else
    /// `~/.pgpass`. The first line `host:port:database:user:password` counts whose first four fields match; each may be `*`. A file
    /// that others can read or write is not used, and a warning is logged. Where no setting names the user, `LOGNAME` or `USER` does. `~` is
    /// `HOME`, or where that is not set the home that the system knows of the user.
    /// [`password_with`](Self::password_with) comes before the file.
    ///
    /// A [service](https://www.postgresql.org/docs/current/libpq-pgservice.html), which `service` or `PGSERVICE` names, is the lines
    /// `name=value` below `[service]` in the file of `servicefile` or `PGSERVICEFILE`, or else `~/.pg_service.conf`; or else in
    /// `pg_service.conf` in the folder of `PGSYSCONFDIR`, or else in `/etc/postgresql-common` or `/etc/sysconfig/pgsql`. It
    /// fills in what the connection string leaves out, and comes before the other variables. It is read once, by this call.
    /// A line that asks an LDAP server is refused.
    ///
    /// # Errors
    /// [`InvalidConfig`](crate::ErrorKind::InvalidConfig), with the name of the variable that cannot be understood or is refused,
    /// and without its value.
    pub fn from_env() -> Result<Self> {
        Self::from_process(None, None)
    }

    /// Settings for a command-line program that has an option for the connection string: as [`from_env`](Self::from_env), with
    /// `url` in the place of `DATABASE_URL`, if it is given. The sessions call themselves `name`, and the key of a lock behind it,
    /// where no setting has another `application_name`.
    ///
    /// ```
    /// use dsync::Config;
    ///
    /// let config = Config::for_program("nightly", Some("postgres://app@db.internal/app"))?;
    /// # Ok::<(), dsync::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`from_url`](Self::from_url) and `from_env`.
    pub fn for_program(name: &str, url: Option<&str>) -> Result<Self> {
        Self::from_process(Some(name), url)
    }

    fn from_process(program: Option<&str>, url: Option<&str>) -> Result<Self> {
        /// In a process that makes several, each of the same variables is told of once.
        static TOLD: AtomicBool = AtomicBool::new(false);
        let config = Self::from_variables(program, url, &environment)?;
        if !TOLD.swap(true, Ordering::Relaxed) {
            // A typing error in a name would go unnoticed otherwise. Its value may be a secret.
            for (name, _) in env::vars_os() {
                let name = name.to_string_lossy();
                if is_unknown(&name) {
                    let meant = nearest(&name[PREFIX.len()..]);
                    let meant =
                        meant.map(|own| format!(" (did you mean {}?)", own.variable())).unwrap_or_default();
                    log::warn!(
                        "the environment variable {name} is not one that is read{meant}; see Config::from_env"
                    );
                }
            }
        }
        Ok(config)
    }

    pub(super) fn from_variables(
        program: Option<&str>,
        url: Option<&str>,
        get: &Variables<'_>,
    ) -> Result<Self> {
        let mut given = match (url, get("DATABASE_URL")?) {
            (Some(url), _) => Given::text(url, Origin::Text)?,
            (None, Some(url)) => Given::text(&url, Origin::DatabaseUrl)?,
            (None, None) => Given::default(),
        };
        given.fill_in_service(get)?;
        given.fill_in(get)?;
        if let Some(name) = program {
            given.call(name);
        }
        let mut config = Self::from_given(&given, get)?;
        for setting in &OWN_SETTINGS {
            let name = setting.variable();
            if let Some(text) = get(&name)? {
                (setting.set)(&mut config, &text).map_err(|problem| variable(&name, &problem))?;
            }
        }
        Ok(config)
    }
}

/// A variable of this process. An empty one counts as one that is not set. Where `HOME` is not set, as in a unit of systemd's that names no user, the
/// system is asked for the user's home, as libpq does.
pub(super) fn environment(name: &str) -> Result<Option<String>> {
    let by_system = || {
        let home = (name == "HOME").then(env::home_dir).flatten();
        home.and_then(|home| home.into_os_string().into_string().ok()).filter(|home| !home.is_empty())
    };
    match env::var(name) {
        Ok(value) if !value.is_empty() => Ok(Some(value)),
        Ok(_) | Err(env::VarError::NotPresent) => Ok(by_system()),
        Err(env::VarError::NotUnicode(_)) => Err(variable(name, "it is not UTF-8; write it in UTF-8")),
    }
}

/// Looks up a variable; a parameter so that tests need not change the process's environment.
pub(super) type Variables<'a> = dyn Fn(&str) -> Result<Option<String>> + 'a;

/// Whether it looks like one of ours and is not.
fn is_unknown(name: &str) -> bool {
    /// Of the tests, and of the servers that they start.
    const OF_TESTS: [&str; 5] =
        ["DSYNC_PG_BIN", "DSYNC_PG_DOWNLOAD", "DSYNC_PG_VERSION", "DSYNC_UPDATE", "DSYNC_WATCHER"];
    let looks_like_ours = name.get(..PREFIX.len()).is_some_and(|start| start.eq_ignore_ascii_case(PREFIX));
    looks_like_ours && !OF_TESTS.contains(&name) && !OWN_SETTINGS.iter().any(|own| own.variable() == name)
}

pub(super) fn variable(name: &str, problem: &str) -> Error {
    invalid(format!("the environment variable {name} cannot be used: {problem}"))
}
