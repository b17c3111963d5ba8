//! The settings of a manager on PostgreSQL: from code, from a URL, or from the environment.

use std::env;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use postgres::config::{ChannelBinding, SslMode, SslNegotiation, TargetSessionAttrs};
use postgres::tls::{MakeTlsConnect, TlsConnect};

use super::catalog::CatalogMode;
use super::sql::Schema;
use super::stream::{Socket, Tls};
use crate::error::{Error, ErrorKind, Result};

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
    pub(crate) tls: Option<Tls>,
    pub(crate) namespace: String,
    pub(crate) service: Option<String>,
    pub(crate) build: Option<String>,
    pub(crate) catalog: CatalogMode,
    pub(crate) schema: Arc<Schema>,
    pub(crate) max_sessions: u32,
    pub(crate) idle_timeout: Duration,
    pub(crate) connect_timeout: Duration,
    pub(crate) release_timeout: Duration,
    pub(crate) wait_slice: Duration,
    pub(crate) lease: Duration,
    pub(crate) margin: Option<Duration>,
    pub(crate) heartbeat: Option<Duration>,
    pub(crate) heartbeat_timeout: Option<Duration>,
}

impl Config {
    /// Settings with the connection given as a URL (`postgres://user@host/database`) or as
    /// `host=… user=… dbname=…`; [`postgres::Config`] lists what may stand in it. Several hosts may be given;
    /// with `target_session_attrs=read-write` the one that is the primary is used.
    ///
    /// # Errors
    /// [`InvalidConfig`](ErrorKind::InvalidConfig) if the text cannot be understood.
    pub fn from_url(url: &str) -> Result<Self> {
        let postgres = url.parse::<postgres::Config>().map_err(|error| {
            let message = "the connection string cannot be understood; it should look like \
                           postgres://user:password@host:5432/database";
            Error::new(ErrorKind::InvalidConfig, message).with_source(error)
        })?;
        Ok(Self::from_postgres(postgres))
    }

    /// Settings with a connection that is configured already.
    ///
    /// A notice callback of `postgres` is not used: notices of the lock sessions go to the log.
    pub fn from_postgres(postgres: postgres::Config) -> Self {
        Self {
            postgres,
            tls: None,
            namespace: "dsync".to_owned(),
            service: None,
            build: None,
            catalog: CatalogMode::Automatic,
            schema: Arc::new(Schema::new(Schema::DEFAULT)),
            max_sessions: 20,
            idle_timeout: Duration::from_secs(60),
            connect_timeout: Duration::from_secs(5),
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
    /// The connection comes from `DATABASE_URL`, or else from the variables that PostgreSQL's own programs read:
    /// `PGHOST`, `PGHOSTADDR`, `PGPORT`, `PGDATABASE`, `PGUSER`, `PGPASSWORD`, `PGAPPNAME`, `PGOPTIONS`,
    /// `PGSSLMODE`, `PGSSLNEGOTIATION`, `PGCHANNELBINDING`, `PGTARGETSESSIONATTRS`, `PGCONNECT_TIMEOUT` (seconds).
    /// Without either it is the default of those programs: the local server.
    ///
    /// `DSYNC_SERVICE`, `DSYNC_BUILD`, `DSYNC_NAMESPACE`, `DSYNC_CATALOG` (`automatic`, `must-exist` or `none`),
    /// `DSYNC_SCHEMA`, `DSYNC_MAX_SESSIONS`, and the durations `DSYNC_LEASE`,
    /// `DSYNC_MARGIN`, `DSYNC_HEARTBEAT`, `DSYNC_HEARTBEAT_TIMEOUT`, `DSYNC_WAIT_SLICE`, `DSYNC_CONNECT_TIMEOUT`,
    /// `DSYNC_RELEASE_TIMEOUT`, `DSYNC_IDLE_TIMEOUT` (`"15s"`, `"500ms"`) set what the methods of the same name set.
    /// An empty variable counts as one that is not set.
    ///
    /// # Errors
    /// [`InvalidConfig`](ErrorKind::InvalidConfig), with the name of the variable that cannot be understood.
    pub fn from_env() -> Result<Self> {
        Self::from_variables(&|name| match env::var(name) {
            Ok(value) if value.is_empty() => Ok(None),
            Ok(value) => Ok(Some(value)),
            Err(env::VarError::NotPresent) => Ok(None),
            Err(env::VarError::NotUnicode(_)) => Err(variable(name, "it is not UTF-8; write it in UTF-8")),
        })
    }

    fn from_variables(get: &Variables<'_>) -> Result<Self> {
        let mut config = match get("DATABASE_URL")? {
            Some(url) => {
                Self::from_url(&url).map_err(|error| variable("DATABASE_URL", "").with_source(error))?
            }
            None => Self::from_postgres(libpq(get)?),
        };
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
                Err(error) => {
                    Err(variable(name, "it should be a duration, like 15s or 500ms").with_source(error))
                }
            },
        };
        for (name, setting) in [
            ("DSYNC_LEASE", &mut config.lease),
            ("DSYNC_WAIT_SLICE", &mut config.wait_slice),
            ("DSYNC_CONNECT_TIMEOUT", &mut config.connect_timeout),
            ("DSYNC_RELEASE_TIMEOUT", &mut config.release_timeout),
            ("DSYNC_IDLE_TIMEOUT", &mut config.idle_timeout),
        ] {
            if let Some(duration) = duration(name)? {
                *setting = duration;
            }
        }
        config.margin = duration("DSYNC_MARGIN")?;
        config.heartbeat = duration("DSYNC_HEARTBEAT")?;
        config.heartbeat_timeout = duration("DSYNC_HEARTBEAT_TIMEOUT")?;
        Ok(config)
    }

    /// The TLS connector for the sessions, such as those of `postgres-native-tls` or `tokio-postgres-rustls`, or another one
    /// that works with any stream. Needed
    /// for `sslmode=require`. Defaults to none: then `sslmode=prefer`, the default, connects without TLS.
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

    /// Keeps locks of one database apart: locks of one name in two namespaces have nothing to do with each other.
    /// Defaults to `"dsync"`.
    #[must_use]
    pub fn namespace(mut self, namespace: impl Into<String>) -> Self {
        self.namespace = namespace.into();
        self
    }

    /// The name of the service, of which one process is to lead; see [`leadership_lock`](crate::leadership_lock).
    #[must_use]
    pub fn service(mut self, service: impl Into<String>) -> Self {
        self.service = Some(service.into());
        self
    }

    /// The version of the service, for the annotation of its leader.
    #[must_use]
    pub fn build(mut self, build: impl Into<String>) -> Self {
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

    /// How many sessions the manager may open; each claim needs one for as long as it lasts. Defaults to 20. The
    /// server's `max_connections` must allow it for every process.
    #[must_use]
    pub fn max_sessions(mut self, sessions: u32) -> Self {
        self.max_sessions = sessions;
        self
    }

    /// How long a session without a claim is kept for the next one. Defaults to 60 s, looked at every 30 s.
    #[must_use]
    pub fn idle_timeout(mut self, timeout: Duration) -> Self {
        self.idle_timeout = timeout;
        self
    }

    /// How long one attempt to open a session may take, over all hosts. Defaults to 5 s.
    #[must_use]
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.connect_timeout = timeout;
        self
    }

    /// How long [`release`](crate::Lock::release), [`stop`](crate::SyncManager::stop), and the dropping of a guard
    /// or of a manager may take at the most. Defaults to 2 s.
    #[must_use]
    pub fn release_timeout(mut self, timeout: Duration) -> Self {
        self.release_timeout = timeout;
        self
    }

    /// How long one statement waits for the lock before the next one does. Defaults to 5 s.
    ///
    /// A statement that waits holds back vacuum's horizon and `CREATE INDEX CONCURRENTLY`; a slice bounds that. Within a
    /// slice, who came first is served first; at the end of its slice a session goes to the end of the queue.
    #[must_use]
    pub fn wait_slice(mut self, slice: Duration) -> Self {
        self.wait_slice = slice;
        self
    }

    /// How long the server keeps the lock for a holder from which it hears nothing (its `idle_session_timeout`).
    /// Defaults to 15 s. A short lease replaces a holder that is cut off sooner; a long one forgives longer pauses.
    #[must_use]
    pub fn lease(mut self, lease: Duration) -> Self {
        self.lease = lease;
        self
    }

    /// By how much, at the least, the holder regards the lock as lost before the server gives it away. Defaults to a
    /// fifteenth of the lease.
    #[must_use]
    pub fn margin(mut self, margin: Duration) -> Self {
        self.margin = Some(margin);
        self
    }

    /// How often a holder renews its lease. Defaults to a quarter of the lease.
    ///
    /// All locks of a manager do so at the same times, of which there are sixteen in each interval: the first heartbeat of a
    /// term comes up to a sixteenth early.
    #[must_use]
    pub fn heartbeat(mut self, interval: Duration) -> Self {
        self.heartbeat = Some(interval);
        self
    }

    /// How long the answer to a heartbeat may take before the lock counts as lost. Defaults to a quarter of the lease.
    #[must_use]
    pub fn heartbeat_timeout(mut self, timeout: Duration) -> Self {
        self.heartbeat_timeout = Some(timeout);
        self
    }

    /// The durations of the lease, with the defaults filled in.
    pub(super) fn lease_plan(&self) -> LeasePlan {
        LeasePlan {
            lease: self.lease,
            margin: self.margin.unwrap_or(self.lease / 15),
            heartbeat: self.heartbeat.unwrap_or(self.lease / 4),
            heartbeat_timeout: self.heartbeat_timeout.unwrap_or(self.lease / 4),
        }
    }

    /// Refuses settings that cannot work, each with what to change.
    pub(super) fn validate(&self) -> Result<()> {
        /// PostgreSQL keeps its timeouts as a 32-bit number of milliseconds.
        const LONGEST: Duration = Duration::from_millis(i32::MAX as u64);
        /// The largest `max_connections` of PostgreSQL. r2d2 reserves memory for that many at once.
        const MOST_SESSIONS: u32 = 262_143;
        let plan = self.lease_plan();
        for (name, value, shortest) in [
            ("connect_timeout", self.connect_timeout, Duration::from_millis(10)),
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
            return Err(invalid("max_sessions is 0; each claim needs a session".to_owned()));
        }
        if self.max_sessions > MOST_SESSIONS {
            return Err(invalid(format!(
                "max_sessions is {}; no server takes more than {MOST_SESSIONS}",
                self.max_sessions
            )));
        }
        for (name, value) in [
            ("namespace", Some(&self.namespace)),
            ("service", self.service.as_ref()),
            ("build", self.build.as_ref()),
        ] {
            if value.is_some_and(|value| value.contains('\0')) {
                return Err(invalid(format!("{name} contains a NUL; remove it")));
            }
        }
        self.schema.validate()?;
        if self.service.as_ref().is_some_and(String::is_empty) {
            return Err(invalid("service is empty; give the service a name or leave it out".to_owned()));
        }
        if self.postgres.get_ssl_mode() == SslMode::Require && self.tls.is_none() {
            let message = "sslmode=require needs a TLS connector: give one with Config::tls, \
                           or say sslmode=disable if the network is trusted";
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
            .field("namespace", &self.namespace)
            .field("service", &self.service)
            .field("build", &self.build)
            .field("catalog", &self.catalog)
            .field("schema", &self.schema)
            .field("max_sessions", &self.max_sessions)
            .field("idle_timeout", &self.idle_timeout)
            .field("connect_timeout", &self.connect_timeout)
            .field("release_timeout", &self.release_timeout)
            .field("wait_slice", &self.wait_slice)
            .field("lease_plan", &self.lease_plan())
            .finish()
    }
}

/// The durations that make a loss known before the lock can be given to another; see the manual's
/// `idle_session_timeout`.
#[derive(Clone, Copy, Debug)]
pub(super) struct LeasePlan {
    pub(super) lease: Duration,
    pub(super) margin: Duration,
    pub(super) heartbeat: Duration,
    pub(super) heartbeat_timeout: Duration,
}

impl LeasePlan {
    /// How long a term lasts, at the most, after the sending of the last heartbeat that was answered.
    ///
    /// The server frees the lock a lease after the last message that it got, which is later than that sending; or, where
    /// its answers are not acknowledged, a lease less one heartbeat after the first such answer (`tcp_user_timeout`),
    /// which may be the very answer that the holder got. Both must be later than the end of the term, by the margin.
    pub(super) fn term(&self) -> Duration {
        self.lease.saturating_sub(self.heartbeat + self.margin)
    }
}

/// Looks up a variable; a parameter so that tests need not change the process's environment.
type Variables<'a> = dyn Fn(&str) -> Result<Option<String>> + 'a;

/// The connection that libpq's environment variables describe.
/// <https://www.postgresql.org/docs/current/libpq-envars.html>
fn libpq(get: &Variables<'_>) -> Result<postgres::Config> {
    let mut config = postgres::Config::new();
    let list = |text: String| text.split(',').map(str::to_owned).collect::<Vec<_>>();
    let hosts = get("PGHOST")?;
    let addresses = get("PGHOSTADDR")?;
    if hosts.is_none() && addresses.is_none() {
        // The usual folders of the local server's socket; libpq has one of them compiled in.
        let folder =
            if std::path::Path::new("/var/run/postgresql").is_dir() { "/var/run/postgresql" } else { "/tmp" };
        config.host(folder);
    }
    for host in hosts.into_iter().flat_map(list) {
        config.host(&host);
    }
    for address in addresses.into_iter().flat_map(list) {
        config.hostaddr(address.parse().map_err(|_| variable("PGHOSTADDR", "it should be an IP address"))?);
    }
    for port in get("PGPORT")?.into_iter().flat_map(list) {
        config.port(port.parse().map_err(|_| variable("PGPORT", "it should be a port number, like 5432"))?);
    }
    if let Some(database) = get("PGDATABASE")? {
        config.dbname(&database);
    }
    if let Some(user) = get("PGUSER")? {
        config.user(&user);
    }
    if let Some(password) = get("PGPASSWORD")? {
        config.password(password);
    }
    if let Some(name) = get("PGAPPNAME")? {
        config.application_name(&name);
    }
    if let Some(options) = get("PGOPTIONS")? {
        config.options(&options);
    }
    if let Some(seconds) = get("PGCONNECT_TIMEOUT")? {
        let seconds =
            seconds.parse().map_err(|_| variable("PGCONNECT_TIMEOUT", "it should be a number of seconds"))?;
        if seconds > 0 {
            config.connect_timeout(Duration::from_secs(seconds));
        }
    }
    choose(get, "PGSSLMODE", &SSL_MODES, |mode| config.ssl_mode(mode))?;
    choose(get, "PGSSLNEGOTIATION", &SSL_NEGOTIATIONS, |how| config.ssl_negotiation(how))?;
    choose(get, "PGCHANNELBINDING", &CHANNEL_BINDINGS, |binding| config.channel_binding(binding))?;
    choose(get, "PGTARGETSESSIONATTRS", &SESSION_ATTRS, |attrs| config.target_session_attrs(attrs))?;
    Ok(config)
}

const CATALOG_MODES: [(&str, CatalogMode); 3] = [
    ("automatic", CatalogMode::Automatic),
    ("must-exist", CatalogMode::MustExist),
    ("none", CatalogMode::None),
];
const SSL_MODES: [(&str, SslMode); 3] =
    [("disable", SslMode::Disable), ("prefer", SslMode::Prefer), ("require", SslMode::Require)];
const SSL_NEGOTIATIONS: [(&str, SslNegotiation); 2] =
    [("postgres", SslNegotiation::Postgres), ("direct", SslNegotiation::Direct)];
const CHANNEL_BINDINGS: [(&str, ChannelBinding); 3] = [
    ("disable", ChannelBinding::Disable),
    ("prefer", ChannelBinding::Prefer),
    ("require", ChannelBinding::Require),
];
const SESSION_ATTRS: [(&str, TargetSessionAttrs); 3] = [
    ("any", TargetSessionAttrs::Any),
    ("read-write", TargetSessionAttrs::ReadWrite),
    ("read-only", TargetSessionAttrs::ReadOnly),
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
            Err(variable(name, &format!("{text:?} is not one of {}", words.join(", "))))
        }
    }
}

fn variable(name: &str, problem: &str) -> Error {
    let separator = if problem.is_empty() { "" } else { ": " };
    invalid(format!("the environment variable {name} cannot be used{separator}{problem}"))
}

fn invalid(message: String) -> Error {
    Error::new(ErrorKind::InvalidConfig, message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use postgres::config::Host;

    fn from(variables: &[(&str, &str)]) -> Result<Config> {
        Config::from_variables(&|name| {
            Ok(variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned()))
        })
    }

    #[test]
    fn a_url_wins_over_the_variables_of_libpq() {
        let config = from(&[
            ("DATABASE_URL", "postgres://ada@example.org/x"),
            ("PGHOST", "other"),
            ("DSYNC_LEASE", "9s"),
            ("DSYNC_SCHEMA", "locks"),
        ])
        .unwrap();
        assert_eq!(format!("{:?}", config.schema), r#""locks""#);
        assert_eq!(config.postgres.get_hosts(), [Host::Tcp("example.org".into())]);
        assert_eq!(config.lease, Duration::from_secs(9));
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
            ("PGCONNECT_TIMEOUT", "3"),
        ])
        .unwrap();
        assert_eq!(config.postgres.get_hosts(), [Host::Tcp("a".into()), Host::Tcp("b".into())]);
        assert_eq!(config.postgres.get_ports(), [1, 2]);
        assert_eq!(config.postgres.get_user(), Some("ada"));
        assert_eq!(config.postgres.get_dbname(), Some("engine"));
        assert_eq!(config.postgres.get_ssl_mode(), SslMode::Disable);
        assert_eq!(config.postgres.get_target_session_attrs(), TargetSessionAttrs::ReadWrite);
        assert_eq!(config.postgres.get_connect_timeout(), Some(&Duration::from_secs(3)));
    }

    #[test]
    fn a_variable_that_cannot_be_understood_is_named() {
        for (name, value) in [
            ("DATABASE_URL", "postgres://["),
            ("PGPORT", "many"),
            ("PGSSLMODE", "verify-full"),
            ("DSYNC_MAX_SESSIONS", "-1"),
            ("DSYNC_LEASE", "15"),
            ("PGHOSTADDR", "localhost"),
            ("DSYNC_CATALOG", "maybe"),
        ] {
            let error = from(&[(name, value)]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidConfig);
            assert!(error.to_string().contains(name), "{error}");
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
        for lease in [500, 2_000, 60_000, 86_400_000] {
            assert!(config().lease(Duration::from_millis(lease)).validate().is_ok(), "{lease}");
        }
    }
}
