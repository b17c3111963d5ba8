//! The settings of a manager on PostgreSQL: from code, from a URL, or from the environment.

mod settings;
mod text;

use std::cell::RefCell;
use std::collections::HashSet;
use std::env;
use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use postgres::config::{ChannelBinding, Host, SslMode, SslNegotiation, TargetSessionAttrs};
use postgres::tls::{MakeTlsConnect, TlsConnect};

use crate::error::{Error, ErrorKind, Result};
use crate::key::Key;
use crate::observer::Observer;
use crate::pg::sql::schema::Schema;
use crate::pg::stream::{Password, Socket, Tls};
use settings::{Given, Origin, Unless, Unread};

/// Whether tokens and annotations are kept in the database, in the schema `dsync` or the one that
/// [`Config::schema`](crate::Config::schema) names.
///
/// # Whom the catalog is trusted from
///
/// Whoever owns a table can attach code to it, which runs with the rights of those who write there. So the schema and what
/// the catalog has in it must belong to the role of the locks, to one that this role is a member of, to the owner of the
/// database, or to a superuser; and there must be no triggers, no rules, no inheritance, and nothing that does not come with
/// PostgreSQL, on the tables, and no other function of the name `fence`. Everything else is [refused](crate::ErrorKind::SessionRefused), with the name of the owner and
/// of the object. This is looked at in PostgreSQL's own tables before the first statement on the schema: with the manager's
/// first session, and again when a part of the catalog was found missing.
///
/// Those who are trusted may change it all at any time: so an operator who drops the schema while managers run should let nobody make
/// schemas meanwhile. Fenced transactions rely on the managers' look; they are for connections to the very same database.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum CatalogMode {
    /// The catalog is made at the first use if it is not there, or brought up to date if it is of an older version. The role
    /// must be allowed to create a schema.
    #[default]
    Automatic,
    /// The catalog must be there, in this library's version: an administrator has run [`CATALOG_SQL`](crate::CATALOG_SQL).
    MustExist,
    /// There is none, and so neither fencing tokens nor annotations, nor records of what was done when (`once`). All else works.
    None,
}

/// How to reach PostgreSQL, and how locks behave there.
///
/// All settings have defaults that suit a service on a local network. They are checked together when a manager is made.
///
/// ```
/// use std::time::Duration;
/// use dsync::Config;
///
/// let config = Config::from_url("postgres://app@db.internal/app")?
///     .service("billing")
///     .lease(Duration::from_secs(10))
///     .max_sessions(50);
/// # Ok::<(), dsync::Error>(())
/// ```
#[derive(Clone)]
pub struct Config {
    pub(crate) postgres: postgres::Config,
    /// Settings of the connection that are not read, and must be made up for.
    unread: Vec<Unread>,
    pub(crate) tls: Option<Tls>,
    pub(crate) password: Option<Password>,
    pub(crate) observer: Option<Arc<dyn Observer>>,
    pub(crate) namespace: String,
    pub(crate) service: Option<String>,
    pub(crate) build: Option<String>,
    pub(crate) catalog: CatalogMode,
    pub(crate) schema: Arc<Schema>,
    pub(crate) max_sessions: u32,
    pub(crate) idle_timeout: Duration,
    connect_timeout: Option<Duration>,
    pub(crate) release_timeout: Duration,
    pub(crate) wait_slice: Duration,
    pub(crate) lease: Duration,
    pub(crate) margin: Option<Duration>,
    pub(crate) heartbeat: Option<Duration>,
    pub(crate) heartbeat_timeout: Option<Duration>,
}

impl Config {
    /// Settings with the connection given as a URL (`postgres://user:password@host:5432/database`) or as
    /// `host=… user=… dbname=…`. White space around it does not count.
    ///
    /// The parameters are those of PostgreSQL's own programs,
    /// [as its manual lists them](https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-PARAMKEYWORDS):
    ///
    /// | parameter | what becomes of it |
    /// |---|---|
    /// | `host`, `hostaddr`, `port`, `dbname`, `user`, `password`, `options`, `application_name`, `fallback_application_name`, `load_balance_hosts`, `channel_binding`, `sslnegotiation` | honoured |
    /// | `target_session_attrs` | `any`, `read-write` and `primary` (which means `read-write` here) are honoured; what asks for a standby is refused, since locks need the primary |
    /// | `sslmode` | `disable`, `prefer`, `require` are honoured, the latter two as [`tls`](Self::tls) says; `allow`, `verify-ca`, `verify-full` are refused: say `require`, and give a connector that verifies certificates |
    /// | `connect_timeout` (seconds) | honoured, for each address; see [`connect_timeout`](Self::connect_timeout) |
    /// | `keepalives`, `keepalives_idle`, `keepalives_interval`, `keepalives_count` or `keepalives_retries`, `tcp_user_timeout` (in seconds, as in [`postgres::Config`]) | honoured |
    /// | `sslrootcert`, `sslcert`, `sslkey`, `sslpassword`, `sslcertmode`, `sslcrl`, `sslcrldir`, `sslsni`, `ssl_min_protocol_version`, `ssl_max_protocol_version` | not read: refused when the manager is made, unless a connector is given with [`tls`](Self::tls), which decides instead, or TLS is out of the question (`sslmode=disable`, Unix sockets) |
    /// | `passfile` | not read: refused when the manager is made, unless a password or [`password_with`](Self::password_with) is given |
    /// | `gssencmode=require`, `min_protocol_version` above 3.0, `oauth_…`, `replication`, `require_auth`, `requirepeer` for a Unix socket, `scram_…_key`, `service` | refused |
    /// | `client_encoding`, `gssdelegation`, `gssencmode` otherwise, `gsslib`, `krbsrvname`, `max_protocol_version`, `servicefile`, `sslcompression` | without effect on a session for locks |
    ///
    /// Several hosts may be given; with `target_session_attrs=read-write` the one that is the primary is used. A dead one
    /// takes no more than its share of the time: see [`connect_timeout`](Self::connect_timeout). Of
    /// `options`, a session for locks overrides `search_path`, `synchronous_commit`, `plan_cache_mode`, all timeouts and
    /// keepalives, and what is said about transactions.
    ///
    /// # Errors
    /// [`InvalidConfig`](ErrorKind::InvalidConfig) if the text cannot be understood or names what is refused. The error
    /// repeats nothing of the text, since any piece of it may belong to the password.
    pub fn from_url(url: &str) -> Result<Self> {
        Self::from_given(&Given::text(url, Origin::Text)?)
    }

    fn from_given(given: &Given) -> Result<Self> {
        let (postgres, unread) = given.connection()?;
        Ok(Self { unread, ..Self::from_postgres(postgres) })
    }

    /// Settings with a connection that is configured already.
    ///
    /// A notice callback of `postgres` is not used: notices of the lock sessions go to the log. What cannot work is refused
    /// when the manager is made: a host that is no host name, `target_session_attrs` that ask for a standby, and what
    /// else contradicts.
    pub fn from_postgres(postgres: postgres::Config) -> Self {
        Self {
            postgres,
            unread: Vec::new(),
            tls: None,
            password: None,
            observer: None,
            namespace: "dsync".to_owned(),
            service: None,
            build: None,
            catalog: CatalogMode::Automatic,
            schema: Arc::new(Schema::new(Schema::DEFAULT)),
            max_sessions: 20,
            idle_timeout: Duration::from_secs(60),
            connect_timeout: None,
            release_timeout: Duration::from_secs(2),
            wait_slice: Duration::from_secs(5),
            lease: Duration::from_secs(15),
            margin: None,
            heartbeat: None,
            heartbeat_timeout: None,
        }
    }

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
    /// | `PGTARGETSESSIONATTRS`, `PGSSLMODE`, `PGCONNECT_TIMEOUT` (seconds) | honoured, but for the values that `from_url` refuses as well |
    /// | `PGREQUIRESSL` | `1` is `sslmode=require`, if nothing else says what `sslmode` is |
    /// | `PGSSLROOTCERT`, `PGSSLCERT`, `PGSSLKEY`, `PGSSLCERTMODE`, `PGSSLCRL`, `PGSSLCRLDIR`, `PGSSLSNI`, `PGSSLMINPROTOCOLVERSION`, `PGSSLMAXPROTOCOLVERSION` | not read: refused when the manager is made, unless a connector is given with [`tls`](Self::tls), which decides instead, or TLS is out of the question (`sslmode=disable`, Unix sockets) |
    /// | `PGPASSFILE` | not read: refused when the manager is made, unless a password or [`password_with`](Self::password_with) is given. The file `~/.pgpass` is not read either |
    /// | `PGSERVICE`, `PGREQUIREAUTH`, `PGREQUIREPEER` for a Unix socket, `PGGSSENCMODE=require`, `PGMINPROTOCOLVERSION` above 3.0 | refused: unset it, and say what it says in another way |
    /// | `PGCLIENTENCODING`, `PGDATESTYLE`, `PGGEQO`, `PGGSSDELEGATION`, `PGGSSENCMODE` otherwise, `PGGSSLIB`, `PGKRBSRVNAME`, `PGLOCALEDIR`, `PGMAXPROTOCOLVERSION`, `PGOAUTHDEBUG`, `PGSERVICEFILE`, `PGSSLCOMPRESSION`, `PGSYSCONFDIR`, `PGTZ` | without effect on a session for locks |
    ///
    /// `DSYNC_SERVICE`, `DSYNC_BUILD`, `DSYNC_NAMESPACE`, `DSYNC_CATALOG` (`automatic`, `must-exist` or `none`),
    /// `DSYNC_SCHEMA`, `DSYNC_MAX_SESSIONS`, and the durations `DSYNC_LEASE`,
    /// `DSYNC_MARGIN`, `DSYNC_HEARTBEAT`, `DSYNC_HEARTBEAT_TIMEOUT`, `DSYNC_WAIT_SLICE`, `DSYNC_CONNECT_TIMEOUT`,
    /// `DSYNC_RELEASE_TIMEOUT`, `DSYNC_IDLE_TIMEOUT` (`"15s"`, `"500ms"`) set what the methods of the same name set. A
    /// warning is logged for each other variable whose name begins with `DSYNC_`, in whatever case.
    ///
    /// # Errors
    /// [`InvalidConfig`](ErrorKind::InvalidConfig), with the name of the variable that cannot be understood or is refused,
    /// and without its value.
    pub fn from_env() -> Result<Self> {
        let asked = RefCell::new(HashSet::new());
        let config = Self::from_variables(&|name| {
            asked.borrow_mut().insert(name.to_owned());
            match env::var(name) {
                Ok(value) if value.is_empty() => Ok(None),
                Ok(value) => Ok(Some(value)),
                Err(env::VarError::NotPresent) => Ok(None),
                Err(env::VarError::NotUnicode(_)) => {
                    Err(variable(name, "it is not UTF-8; write it in UTF-8"))
                }
            }
        })?;
        // A typing error in a name would go unnoticed otherwise. Its value may be a secret.
        for (name, _) in env::vars_os() {
            let name = name.to_string_lossy();
            if name.to_ascii_uppercase().starts_with("DSYNC_") && !asked.borrow().contains(&*name) {
                log::warn!("the environment variable {name} is not one that is read; see Config::from_env");
            }
        }
        Ok(config)
    }

    fn from_variables(get: &Variables<'_>) -> Result<Self> {
        let mut given = match get("DATABASE_URL")? {
            Some(url) => Given::text(&url, Origin::DatabaseUrl)?,
            None => Given::default(),
        };
        given.fill_in(get)?;
        let mut config = Self::from_given(&given)?;
        config.service = get("DSYNC_SERVICE")?;
        config.build = get("DSYNC_BUILD")?;
        if let Some(namespace) = get("DSYNC_NAMESPACE")? {
            config.namespace = namespace;
        }
        choose(get, "DSYNC_CATALOG", &CATALOG_MODES, |mode| config.catalog = mode)?;
        if let Some(schema) = get("DSYNC_SCHEMA")? {
            config = config.schema(schema);
        }
        if let Some(number) = get("DSYNC_MAX_SESSIONS")? {
            config.max_sessions = number
                .parse()
                .map_err(|_| variable("DSYNC_MAX_SESSIONS", "it should be a number, like 20"))?;
        }
        let duration = |name: &str| match get(name)? {
            None => Ok(None),
            Some(text) => match humantime::parse_duration(&text) {
                Ok(duration) => Ok(Some(duration)),
                Err(_) => Err(variable(name, "it should be a duration, like 15s or 500ms")),
            },
        };
        for (name, setting) in [
            ("DSYNC_LEASE", &mut config.lease),
            ("DSYNC_WAIT_SLICE", &mut config.wait_slice),
            ("DSYNC_RELEASE_TIMEOUT", &mut config.release_timeout),
            ("DSYNC_IDLE_TIMEOUT", &mut config.idle_timeout),
        ] {
            if let Some(duration) = duration(name)? {
                *setting = duration;
            }
        }
        config.connect_timeout = duration("DSYNC_CONNECT_TIMEOUT")?;
        config.margin = duration("DSYNC_MARGIN")?;
        config.heartbeat = duration("DSYNC_HEARTBEAT")?;
        config.heartbeat_timeout = duration("DSYNC_HEARTBEAT_TIMEOUT")?;
        Ok(config)
    }

    /// The TLS connector for the sessions, such as those of `postgres-native-tls` or `tokio-postgres-rustls`, or another one
    /// that works with any stream. Needed for `sslmode=require`, unless all hosts are Unix sockets, and for
    /// `channel_binding=require`. It alone decides which certificates are trusted and shown, and which versions of TLS are
    /// spoken; for `sslnegotiation=direct` it must offer the protocol `postgresql` by ALPN. Defaults to none: then
    /// `sslmode=prefer`, the default, connects without TLS.
    #[must_use]
    pub fn tls<T>(mut self, connector: T) -> Self
    where
        T: MakeTlsConnect<Socket> + Clone + Send + Sync + 'static,
        T::Stream: Send + 'static,
        T::TlsConnect: Send,
        <T::TlsConnect as TlsConnect<Socket>>::Future: Send,
    {
        self.tls = Some(Tls::new(connector));
        self
    }

    /// A hook that gives the password of each session, for passwords that expire: tokens of a cloud's identity service,
    /// leases of a vault, a file that is mounted anew. It is asked before each attempt to connect, and its answer
    /// takes the place of the connection's password. Defaults to none. A manager's first session asks for it twice, and
    /// claims that cannot connect ask again after each pause, of 5 ms to 2 s: keep a password that is costly to get.
    ///
    /// It runs on a thread of the library's, one call at a time; an attempt that begins meanwhile gets the answer of the next call.
    /// Its time is a part of the connect's: a call that takes longer fails that attempt, and a later attempt waits for it
    /// to end. An error, a panic or a call that takes too long makes the attempt fail as an unreachable server does, so that
    /// claims try again; its text stands in theirs and in the log, so it should not contain the password.
    ///
    /// ```
    /// use dsync::Config;
    ///
    /// let config = Config::from_url("postgres://app@db.internal/app")?
    ///     .password_with(|| Ok(std::fs::read_to_string("/run/secrets/database")?.trim_end().to_owned()));
    /// # Ok::<(), dsync::Error>(())
    /// ```
    #[must_use]
    pub fn password_with<F>(mut self, hook: F) -> Self
    where
        F: Fn() -> std::result::Result<String, Box<dyn StdError + Send + Sync>> + Send + Sync + 'static,
    {
        self.password = Some(Password::new(hook));
        self
    }

    /// Is told what happens to the locks: attempts, terms and how they end, heartbeats, sessions. Defaults to none. The page of
    /// [`Observer`] says on which threads, and what it may do. `MetricsObserver`, which comes with the feature `metrics`, counts
    /// and times all of it for Prometheus and others.
    #[must_use]
    pub fn observer(mut self, observer: impl Observer + 'static) -> Self {
        self.observer = Some(Arc::new(observer));
        self
    }

    /// Keeps locks of one database apart: locks of one name in two namespaces have nothing to do with each other.
    /// Defaults to `"dsync"`. At most [`Key::MAX_LEN`](crate::Key::MAX_LEN) bytes without a NUL.
    #[must_use]
    pub fn namespace(mut self, namespace: impl Into<String>) -> Self {
        self.namespace = namespace.into();
        self
    }

    /// The name of the service, of which one process is to lead; see [`leadership_lock`](crate::leadership_lock).
    /// 1 to 1,005 bytes without a NUL. Defaults to none: then no process leads.
    #[must_use]
    pub fn service(mut self, service: impl Into<String>) -> Self {
        self.service = Some(service.into());
        self
    }

    /// The version of the service, for the annotation of its leader. At most 1,024 bytes without a NUL. Defaults to none.
    #[must_use]
    pub fn service_build(mut self, build: impl Into<String>) -> Self {
        self.build = Some(build.into());
        self
    }

    /// Whether tokens and annotations are kept in the database. Defaults to [`CatalogMode::Automatic`].
    #[must_use]
    pub fn catalog(mut self, mode: CatalogMode) -> Self {
        self.catalog = mode;
        self
    }

    /// The schema that tokens and annotations are kept in, if they are. Defaults to `"dsync"`. For databases in which another
    /// application has a schema of this name; up to 63 bytes, written as it is called, without quotes.
    ///
    /// All who use the same locks must name the same schema, since each has tokens of its own.
    #[must_use]
    pub fn schema(mut self, name: impl AsRef<str>) -> Self {
        self.schema = Arc::new(Schema::new(name.as_ref()));
        self
    }

    /// How many sessions the manager may open, 1 to 262,143; each claim needs one for as long as it lasts. Defaults to 20.
    /// Guards that share a lock have one each. The server's `max_connections` must allow it for every process.
    #[must_use]
    pub fn max_sessions(mut self, sessions: u32) -> Self {
        self.max_sessions = sessions;
        self
    }

    /// How long a session without a claim is kept for the next one, 1 ms to 24 days. Defaults to 60 s, looked at every 30 s.
    #[must_use]
    pub fn idle_timeout(mut self, timeout: Duration) -> Self {
        self.idle_timeout = timeout;
        self
    }

    /// How long one attempt to open a session may take, over all hosts, from 10 ms to 24 days. Defaults to 5 s, or to the
    /// time that the connection's own `connect_timeout` gives all its hosts, if that is longer. The first session of a
    /// manager may take as long again for a check of the server, and once more for the catalog.
    ///
    /// Each address of each host has its share: the time that is left, divided by the number of addresses still to be
    /// tried. So of `n` addresses that do not answer the last one is tried after `(n - 1) / n` of this time, and a session
    /// is had within this time if one address gives it within an `n`th. An attempt begins with the address that gave the
    /// last session, or else after the one at which the last attempt ended. The connection's own `connect_timeout` bounds
    /// each share, and must not be longer than this time.
    ///
    /// To open a session takes five round trips (a password and TCP among them), two more with TLS. At a round trip above
    /// 400 ms, raise it.
    #[must_use]
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.connect_timeout = Some(timeout);
        self
    }

    /// How long [`release`](crate::Lock::release), [`stop`](crate::SyncManager::stop), and the dropping of a guard
    /// or of a manager may take at the most, 10 ms to 24 days. Defaults to 2 s.
    #[must_use]
    pub fn release_timeout(mut self, timeout: Duration) -> Self {
        self.release_timeout = timeout;
        self
    }

    /// How long one statement waits for the lock before the next one does, 10 ms to 24 days. Defaults to 5 s.
    ///
    /// A statement that waits holds back vacuum's horizon and `CREATE INDEX CONCURRENTLY`; a slice bounds that. Within a
    /// slice, who came first is served first. At the end of its slice a session goes to the end of the line of those that have waited for a
    /// slice, and the first of these is served before all that come newly.
    ///
    /// At default settings the server logs nothing of a wait, where the role may use PL/pgSQL. With `log_lock_waits` or
    /// `log_min_duration_statement` it logs every slice; a superuser turns them off for the role of the locks by
    /// `ALTER ROLE … SET log_lock_waits = off` and `ALTER ROLE … SET log_min_duration_statement = -1`.
    #[must_use]
    pub fn wait_slice(mut self, slice: Duration) -> Self {
        self.wait_slice = slice;
        self
    }

    /// How long the server keeps the lock for a holder from which it hears nothing (its `idle_session_timeout`), 500 ms to
    /// 24 days. Defaults to 15 s. A short lease replaces a holder that is cut off sooner; a long one forgives longer pauses.
    #[must_use]
    pub fn lease(mut self, lease: Duration) -> Self {
        self.lease = lease;
        self
    }

    /// By how much, at the least, the holder regards the lock as lost before the server gives it away, 10 ms at
    /// least. Defaults to a fifteenth of the lease. Twice the heartbeat, the heartbeat's timeout and the margin together must
    /// be less than the lease.
    #[must_use]
    pub fn margin(mut self, margin: Duration) -> Self {
        self.margin = Some(margin);
        self
    }

    /// How often a holder renews its lease, 10 ms at least. Defaults to a quarter of the lease.
    ///
    /// All locks of a manager do so at the same times, of which there are sixteen in each interval: the first heartbeat of a
    /// term comes up to a sixteenth early.
    #[must_use]
    pub fn heartbeat(mut self, interval: Duration) -> Self {
        self.heartbeat = Some(interval);
        self
    }

    /// How long the answer to a heartbeat may take before the lock counts as lost, 10 ms at least. Defaults to a quarter of
    /// the lease.
    #[must_use]
    pub fn heartbeat_timeout(mut self, timeout: Duration) -> Self {
        self.heartbeat_timeout = Some(timeout);
        self
    }

    /// How long an attempt to connect may take, over all hosts.
    pub(crate) fn connect_time(&self) -> Duration {
        const USUAL: Duration = Duration::from_secs(5);
        let hosts = self.postgres.get_hosts().len().max(self.postgres.get_hostaddrs().len());
        let all = |each: &Duration| each.saturating_mul(hosts.try_into().unwrap_or(u32::MAX));
        self.connect_timeout.unwrap_or(self.postgres.get_connect_timeout().map_or(USUAL, all).max(USUAL))
    }

    /// The durations of the lease, with the defaults filled in.
    pub(crate) fn lease_plan(&self) -> LeasePlan {
        LeasePlan {
            lease: self.lease,
            margin: self.margin.unwrap_or(self.lease / 15),
            heartbeat: self.heartbeat.unwrap_or(self.lease / 4),
            heartbeat_timeout: self.heartbeat_timeout.unwrap_or(self.lease / 4),
        }
    }

    /// Refuses settings that cannot work, each with what to change.
    pub(crate) fn validate(&self) -> Result<()> {
        /// PostgreSQL keeps its timeouts as a 32-bit number of milliseconds.
        const LONGEST: Duration = Duration::from_millis(i32::MAX as u64);
        /// The largest `max_connections` of PostgreSQL. r2d2 reserves memory for that many at once.
        const MOST_SESSIONS: u32 = 262_143;
        let plan = self.lease_plan();
        for (name, value, shortest) in [
            ("connect_timeout", self.connect_time(), Duration::from_millis(10)),
            ("release_timeout", self.release_timeout, Duration::from_millis(10)),
            ("wait_slice", self.wait_slice, Duration::from_millis(10)),
            ("idle_timeout", self.idle_timeout, Duration::from_millis(1)),
            ("lease", plan.lease, Duration::from_millis(500)),
            ("margin", plan.margin, Duration::from_millis(10)),
            ("heartbeat", plan.heartbeat, Duration::from_millis(10)),
            ("heartbeat_timeout", plan.heartbeat_timeout, Duration::from_millis(10)),
        ] {
            if !(shortest..=LONGEST).contains(&value) {
                return Err(invalid(format!(
                    "{name} is {value:?}; it must be between {shortest:?} and {LONGEST:?}"
                )));
            }
        }
        if plan.heartbeat + plan.heartbeat_timeout >= plan.term() {
            return Err(invalid(format!(
                "twice heartbeat ({:?}), heartbeat_timeout ({:?}) and margin ({:?}) together must be less than lease \
                 ({:?}), or a term could end before a heartbeat has had its time; lengthen lease",
                plan.heartbeat, plan.heartbeat_timeout, plan.margin, plan.lease
            )));
        }
        if self.max_sessions == 0 {
            return Err(invalid(
                "max_sessions is 0; set at least 1, since each claim needs a session".to_owned(),
            ));
        }
        if self.max_sessions > MOST_SESSIONS {
            return Err(invalid(format!(
                "max_sessions is {}; no server takes more than {MOST_SESSIONS}",
                self.max_sessions
            )));
        }
        // The key of the leadership is made of the service's name.
        let longest_service = Key::MAX_LEN - "service//leadership".len();
        for (name, value, longest) in [
            ("namespace", Some(&self.namespace), Key::MAX_LEN),
            ("service", self.service.as_ref(), longest_service),
            ("build", self.build.as_ref(), Key::MAX_LEN),
        ] {
            let Some(value) = value else { continue };
            if value.contains('\0') {
                return Err(invalid(format!("{name} contains a NUL; remove it")));
            }
            if value.len() > longest {
                return Err(invalid(format!(
                    "{name} has {} bytes, the limit is {longest}; shorten it",
                    value.len()
                )));
            }
        }
        self.schema.validate()?;
        if self.service.as_ref().is_some_and(String::is_empty) {
            return Err(invalid("service is empty; give the service a name or leave it out".to_owned()));
        }
        self.validate_connection()
    }

    /// Refuses what is wrong with the connection, wherever it came from. No text repeats a value.
    fn validate_connection(&self) -> Result<()> {
        let postgres = &self.postgres;
        let over_unix = |host: &Host| matches!(host, Host::Unix(_));
        // An address beside the folder of a Unix socket wins.
        let has_unix = postgres.get_hostaddrs().is_empty() && postgres.get_hosts().iter().any(over_unix);
        let has_tcp = !postgres.get_hostaddrs().is_empty() || !postgres.get_hosts().iter().all(over_unix);
        let (mode, no_tls) = (postgres.get_ssl_mode(), self.tls.is_none());
        for unread in &self.unread {
            unread.check(|unless| match unless {
                Unless::Tls => !no_tls || mode == SslMode::Disable || !has_tcp,
                Unless::Password => self.password.is_some() || postgres.get_password().is_some(),
                Unless::Tcp => !has_unix,
            })?;
        }
        for host in postgres.get_hosts() {
            let can_be = match host {
                Host::Tcp(name) => text::is_host_name(name),
                Host::Unix(folder) => folder.is_absolute(),
            };
            if !can_be {
                let advice = "if it is a part of the password, percent-encode @ : / ? # and % there";
                return Err(invalid(format!("{}; {advice}", settings::NO_HOST_NAME)));
            }
        }
        if postgres.get_ports().contains(&0) {
            return Err(invalid("the port is 0; give the one that the server listens on".to_owned()));
        }
        let texts = [
            ("user", postgres.get_user()),
            ("database's name", postgres.get_dbname()),
            ("options", postgres.get_options()),
            ("application_name", postgres.get_application_name()),
        ];
        let with_nul = texts.iter().find(|(_, text)| text.is_some_and(|text| text.contains('\0')));
        if let Some((name, _)) = with_nul {
            return Err(invalid(format!("the {name} of the connection contains a NUL; remove it")));
        }
        if postgres.get_password().is_some_and(|password| password.contains(&0)) {
            return Err(invalid("the password contains a NUL; no password of PostgreSQL's does".to_owned()));
        }
        if postgres.get_target_session_attrs() == TargetSessionAttrs::ReadOnly {
            return Err(invalid(format!("target_session_attrs is read-only: {}", settings::NEEDS_PRIMARY)));
        }
        if let (Some(all), Some(&each)) = (self.connect_timeout, postgres.get_connect_timeout())
            && each > all
        {
            return Err(invalid(format!(
                "Config::connect_timeout is {all:?} for all hosts together, the connection's own connect_timeout \
                 {each:?} for each address; raise the first or lower the second"
            )));
        }
        // A Unix socket goes without TLS, whatever is said, as with libpq.
        if mode == SslMode::Require && no_tls && has_tcp {
            let message = "sslmode=require needs a TLS connector: give one with Config::tls, \
                           or say sslmode=disable if the network is trusted";
            return Err(invalid(message.to_owned()));
        }
        if postgres.get_ssl_negotiation() == SslNegotiation::Direct && mode != SslMode::Require {
            return Err(invalid(
                "sslnegotiation=direct goes with sslmode=require only; say so too".to_owned(),
            ));
        }
        if postgres.get_channel_binding() == ChannelBinding::Require && (no_tls || mode == SslMode::Disable) {
            let message = "channel_binding=require needs TLS: give a TLS connector with Config::tls, and say \
                           sslmode=require";
            return Err(invalid(message.to_owned()));
        }
        Ok(())
    }
}

impl fmt::Debug for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Config")
            .field("postgres", &self.postgres)
            .field("tls", &self.tls.is_some())
            .field("password_with", &self.password.is_some())
            .field("observer", &self.observer.is_some())
            .field("namespace", &self.namespace)
            .field("service", &self.service)
            .field("build", &self.build)
            .field("catalog", &self.catalog)
            .field("schema", &self.schema)
            .field("max_sessions", &self.max_sessions)
            .field("idle_timeout", &self.idle_timeout)
            .field("connect_timeout", &self.connect_time())
            .field("release_timeout", &self.release_timeout)
            .field("wait_slice", &self.wait_slice)
            .field("lease_plan", &self.lease_plan())
            .finish()
    }
}

/// The durations that make a loss known before the lock can be given to another; see the manual's
/// `idle_session_timeout`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LeasePlan {
    pub(crate) lease: Duration,
    pub(crate) margin: Duration,
    pub(crate) heartbeat: Duration,
    pub(crate) heartbeat_timeout: Duration,
}

impl LeasePlan {
    /// How long a term lasts, at the most, after the sending of the last heartbeat that was answered.
    ///
    /// The server frees the lock a lease after the last message that it got, which is later than that sending; or, where
    /// its answers are not acknowledged, a lease less one heartbeat after the first such answer (`tcp_user_timeout`),
    /// which may be the very answer that the holder got. Both must be later than the end of the term, by the margin.
    pub(crate) fn term(&self) -> Duration {
        self.lease.saturating_sub(self.heartbeat + self.margin)
    }

    /// Refuses a grace for which a term would be warned of before a renewal is overdue.
    pub(crate) fn check_grace(&self, grace: Duration) -> Result<()> {
        let longest = self.term().saturating_sub(self.heartbeat);
        if grace < longest {
            return Ok(());
        }
        let message = format!(
            "a grace of {grace:?} must be shorter than {longest:?}, which is what a term has left when its renewal is due; \
             shorten it, or set a longer lease, or heartbeats that come sooner"
        );
        Err(Error::new(ErrorKind::InvalidConfig, message))
    }
}

/// Looks up a variable; a parameter so that tests need not change the process's environment.
type Variables<'a> = dyn Fn(&str) -> Result<Option<String>> + 'a;

const CATALOG_MODES: [(&str, CatalogMode); 3] = [
    ("automatic", CatalogMode::Automatic),
    ("must-exist", CatalogMode::MustExist),
    ("none", CatalogMode::None),
];

/// Sets one of a few named values.
fn choose<T: Copy, R>(
    get: &Variables<'_>,
    name: &str,
    choices: &[(&str, T)],
    set: impl FnOnce(T) -> R,
) -> Result<()> {
    let Some(text) = get(name)? else { return Ok(()) };
    match choices.iter().find(|(word, _)| *word == text) {
        Some((_, value)) => {
            set(*value);
            Ok(())
        }
        None => {
            let words: Vec<_> = choices.iter().map(|(word, _)| *word).collect();
            Err(variable(name, &format!("it should be one of {}", words.join(", "))))
        }
    }
}

fn variable(name: &str, problem: &str) -> Error {
    invalid(format!("the environment variable {name} cannot be used: {problem}"))
}

fn invalid(message: String) -> Error {
    Error::new(ErrorKind::InvalidConfig, message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use postgres::config::LoadBalanceHosts;

    fn from(variables: &[(&str, &str)]) -> Result<Config> {
        Config::from_variables(&|name| {
            Ok(variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned()))
        })
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
            let config = from(&[("DATABASE_URL", "postgres://ada@example.org/x"), (name, value)]).unwrap();
            let error = config.validate().expect_err(name);
            assert!(error.to_string().contains("Config::tls"), "{name}: {error}");
            // `psql` does without TLS there too.
            for url in ["postgres://ada@%2Ftmp/x", "postgres://ada@example.org/x?sslmode=disable"] {
                let outcome = from(&[("DATABASE_URL", url), (name, value)]).unwrap().validate();
                assert_eq!(outcome.is_ok(), name != "PGCHANNELBINDING", "{name} {outcome:?}");
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
            let error =
                from(&[("DATABASE_URL", "postgres://ada@example.org/x"), (name, value)]).expect_err(name);
            assert!(error.to_string().contains(name), "{error}");
        }
        let config = from(&[("PGREQUIRESSL", "1"), ("PGSSLMODE", "prefer")]).unwrap();
        assert_eq!(config.postgres.get_ssl_mode(), SslMode::Prefer, "PGSSLMODE comes before PGREQUIRESSL");
    }

    #[test]
    fn a_password_file_is_refused_only_where_it_would_be_read() {
        let file = ("PGPASSFILE", "/etc/pgpass");
        let error = from(&[file]).unwrap().validate().unwrap_err();
        assert!(error.to_string().contains("PGPASSFILE"), "{error}");
        assert!(from(&[file, ("PGPASSWORD", "x")]).unwrap().validate().is_ok());
        assert!(from(&[file]).unwrap().password_with(|| Ok("x".to_owned())).validate().is_ok());
        let url = Config::from_url("postgres://ada@example.org/x?passfile=/etc/pgpass").unwrap();
        assert!(url.validate().unwrap_err().to_string().contains("the parameter passfile"));
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
        assert!(refusal(config().namespace("a\0b")).contains("NUL"));
        assert!(refusal(config().service("")).contains("service"));
        for name in ["", "pg_locks", "information_schema", "a\0b", "a\n", "$check$", &"x".repeat(64)] {
            assert!(refusal(config().schema(name)).contains("choose another name"), "{name:?}");
        }
        for name in ["dsync", "user", "Locks of \"app\" 'x' \\", &"x".repeat(63)] {
            assert!(config().schema(name).validate().is_ok(), "{name:?}");
        }
        let require = Config::from_url("host=localhost user=x sslmode=require").unwrap();
        assert!(refusal(require).contains("Config::tls"));
        assert!(refusal(config().namespace("n".repeat(1_025))).contains("the limit is 1024"));
        assert!(refusal(config().service("s".repeat(1_006))).contains("the limit is 1005"));
        assert!(config().service("s".repeat(1_005)).validate().is_ok());
        let long = Config::from_url("host=localhost user=x connect_timeout=30").unwrap();
        assert_eq!(long.connect_time(), Duration::from_secs(30));
        assert!(refusal(long.connect_timeout(Duration::from_secs(2))).contains("connect_timeout"));
        for (text, told) in [
            ("host=localhost sslnegotiation=direct", "sslmode=require"),
            ("host=localhost channel_binding=require", "Config::tls"),
            ("host=localhost port=0", "the port is 0"),
            ("postgres://a%00b@localhost/x", "the user of the connection contains a NUL"),
            ("postgres://a:b%00@localhost/x", "the password contains a NUL"),
        ] {
            assert!(refusal(Config::from_url(text).unwrap()).contains(told), "{text}");
        }
        let mut standby = postgres::Config::new();
        standby.host("localhost").target_session_attrs(TargetSessionAttrs::ReadOnly);
        assert!(refusal(Config::from_postgres(standby)).contains("locks need the primary"));
        for host in [
            "ss#word@db",
            "a b",
            "@dsync",
            "a:b",
            "[::1]",
            "",
            "postgres://db",
            "db/app",
            "a\nb",
            "fe80::1%e h",
        ] {
            let mut connection = postgres::Config::new();
            connection.host(host);
            let error = refusal(Config::from_postgres(connection));
            assert!(
                error.contains("percent-encode") && (host.is_empty() || !error.contains(host)),
                "{error}"
            );
        }
        for host in [
            "db",
            "db-1.internal",
            "my_db",
            "127.0.0.1",
            "::1",
            "fe80::1%eth0",
            "/tmp",
            "grün.example",
            "db.",
        ] {
            let mut connection = postgres::Config::new();
            connection.host(host);
            assert!(Config::from_postgres(connection).validate().is_ok(), "{host}");
        }
        for lease in [500, 2_000, 60_000, 86_400_000] {
            assert!(config().lease(Duration::from_millis(lease)).validate().is_ok(), "{lease}");
        }
    }
}
