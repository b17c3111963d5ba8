//! The settings of a manager on PostgreSQL: from code, from a URL, or from the environment.

#[cfg(feature = "serde")]
mod deserialize;
mod environment;
mod lease_plan;
mod own_settings;
mod password_file;
mod service_file;
mod setters;
mod settings;
#[cfg(test)]
mod tests;
mod text;
mod tls;
mod tls_settings;
mod validate;

use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use postgres::tls::{MakeTlsConnect, TlsConnect};

use crate::error::{Error, ErrorKind, Result};
use crate::observer::Observer;
use crate::pg::quorum::Quorum;
use crate::pg::sql::schema::Schema;
use crate::pg::stream::{Password, Passwords, Socket, Tls};
use crate::pg::takeover::TakeoverPolicy;
use environment::{Variables, environment, variable};
use settings::{Connection, Given, Origin, Unread};

pub(crate) use lease_plan::LeasePlan;
pub use tls_settings::TlsSettings;

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
/// schemas meanwhile. Sessions that are open go on with the schema that is made next, and do not say again what the managers had agreed on, their lease and
/// [policy](crate::Config::takeover): start such managers anew. Fenced transactions rely on the managers' look; they are for connections to the very same database.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum CatalogMode {
    /// The catalog is made at the first use if it is not there, or brought up to date if it is of an older version. Where it
    /// is not there, the role must be allowed to create a schema.
    #[default]
    Automatic,
    /// The catalog must be there, in this library's version: an administrator has run [`CATALOG_SQL`](crate::CATALOG_SQL).
    MustExist,
    /// There is none, and so neither fencing tokens nor annotations, nor records of what was done when (`once`), nor semaphores, nor a
    /// takeover grace: the only policy is [`TakeoverPolicy::Immediate`](crate::TakeoverPolicy), and
    /// [`Quorum::NamedStandbys`](crate::Quorum::NamedStandbys) is refused. Nobody can be asked to resign, and
    /// [`inspect_all`](crate::PostgresManager::inspect_all) fails. All else works.
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
///
#[doc = include_str!("config/settings.md")]
#[derive(Clone)]
pub struct Config {
    pub(crate) postgres: postgres::Config,
    /// Settings of the connection that are not read, and must be made up for.
    unread: Vec<Unread>,
    tls_settings: TlsSettings,
    /// The application's connector, which comes before the library's own.
    tls: Option<Tls>,
    /// The application's connector was made as `tls_settings` say.
    tls_as_set: bool,
    /// What makes the library's own.
    tls_stack: Option<tls::Stack>,
    pub(crate) password: Option<Password>,
    pub(crate) passwords: Option<Arc<dyn Passwords>>,
    pub(crate) observer: Option<Arc<dyn Observer>>,
    pub(crate) namespace: String,
    pub(crate) service: Option<String>,
    pub(crate) build: Option<String>,
    pub(crate) catalog: CatalogMode,
    takeover: Option<TakeoverPolicy>,
    pub(crate) quorum: Quorum,
    pub(crate) schema: Arc<Schema>,
    pub(crate) max_sessions: u32,
    pub(crate) shared_sessions: u32,
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
    /// | `sslmode` | `disable`, `prefer`, `require`, `verify-ca`, `verify-full` are honoured, [as said below](#tls); `allow` is refused |
    /// | `connect_timeout` (seconds) | honoured, for each address; see [`connect_timeout`](Self::connect_timeout) |
    /// | `keepalives`, `keepalives_idle`, `keepalives_interval`, `keepalives_count` or `keepalives_retries`, `tcp_user_timeout` (in seconds, as in [`postgres::Config`]) | honoured |
    /// | `sslrootcert`, `sslcert`, `sslkey` | honoured, [as said below](#tls). Where they are left out, no such file is read |
    /// | `sslpassword`, `sslcertmode`, `sslcrl`, `sslcrldir`, `sslsni`, `ssl_min_protocol_version`, `ssl_max_protocol_version` | not read: refused when the manager is made, unless a connector is given with [`tls`](Self::tls), which decides instead, or TLS is out of the question (`sslmode=disable`, Unix sockets) |
    /// | `passfile` | honoured, if there is no password, as [`from_env`](Self::from_env) says. Where it is left out, no such file is read |
    /// | `service`, `servicefile` | honoured, as [`from_env`](Self::from_env) says |
    /// | `gssencmode=require`, `min_protocol_version` above 3.0, `oauth_…`, `replication`, `require_auth`, `requirepeer` for a Unix socket, `scram_…_key` | refused |
    /// | `client_encoding`, `gssdelegation`, `gssencmode` otherwise, `gsslib`, `krbsrvname`, `max_protocol_version`, `sslcompression` | without effect on a session for locks |
    ///
    /// Several hosts may be given; with `target_session_attrs=read-write` the one that is the primary is used. A dead one
    /// takes no more than its share of the time: see [`connect_timeout`](Self::connect_timeout). Of
    /// `options`, a session for locks overrides `search_path`, `synchronous_commit`, `plan_cache_mode`, all timeouts and
    /// keepalives, and what is said about transactions.
    ///
    /// # TLS
    ///
    /// One of the features `tls-native-tls`, `tls-rustls-aws-lc-rs` and `tls-rustls-ring` does it; of several, the first in this order. A
    /// connector of the application's own ([`tls`](Self::tls), [`tls_with`](Self::tls_with)) comes before them. Without either, what asks
    /// for TLS is refused when the manager is made. Unix sockets go without TLS.
    ///
    /// | `sslmode` | what it does, [as in libpq](https://www.postgresql.org/docs/current/libpq-ssl.html#LIBPQ-SSL-SSLMODE-STATEMENTS) |
    /// |---|---|
    /// | `disable` | no TLS |
    /// | `prefer`, the default | TLS where the server offers it. A handshake that fails is an error; unlike libpq, no attempt without TLS follows |
    /// | `require` | TLS. **Without `sslrootcert` the server is not verified**: whoever is between us and the server can pretend to be it. With `sslrootcert` as `verify-ca` |
    /// | `verify-ca` | TLS, and the server's certificate must come from an issuer in the file `sslrootcert` |
    /// | `verify-full` | as `verify-ca`, and the certificate must be for the host name of the connection. Unlike libpq, without `sslrootcert` the issuers are those that the operating system trusts |
    ///
    /// `sslrootcert` is a file in PEM, of issuers or of the server's own certificate; it counts with `prefer`, too. `sslrootcert=system` stands for
    /// the issuers that the operating system trusts (also `SSL_CERT_FILE` and `SSL_CERT_DIR`), goes with `verify-full` only, and makes that the
    /// default. `sslcert` and `sslkey` are the client's certificate and its key, in PEM. The key must not be encrypted, nor be open to
    /// others (mode 0600, or 0640 where it belongs to root); for `tls-native-tls` it must be PKCS #8 (`BEGIN PRIVATE KEY`).
    ///
    /// The files are read when the manager is made, and anew when one has changed: for the next session that is opened. If they cannot be used
    /// then, what was read before goes on to be used, and a warning is logged. `sslnegotiation=direct` needs PostgreSQL 17.
    ///
    /// rustls reads certificates of version 3 with the host name in `subjectAltName`, and no others. The `subject`'s common name, which libpq
    /// falls back to, does not count.
    ///
    /// # Errors
    /// [`InvalidConfig`](ErrorKind::InvalidConfig) if the text cannot be understood or names what is refused. The error
    /// repeats nothing of the text, since any piece of it may belong to the password.
    pub fn from_url(url: &str) -> Result<Self> {
        Self::from_text(Given::text(url, Origin::Text)?)
    }

    fn from_text(mut given: Given) -> Result<Self> {
        // Nothing else of the environment counts.
        given.fill_in_service(&|name| if name == "PGSERVICE" { Ok(None) } else { environment(name) })?;
        Self::from_given(&given, &environment)
    }

    fn from_given(given: &Given, get: &Variables<'_>) -> Result<Self> {
        let Connection { postgres, password_file, tls, unread } = given.connection(get)?;
        let passwords = password_file.map(|file| Arc::new(file) as Arc<dyn Passwords>);
        Ok(Self { unread, passwords, tls_settings: tls, ..Self::from_postgres(postgres) })
    }

    /// Settings with a connection that is configured already.
    ///
    /// A notice callback of `postgres` is not used: notices of the lock sessions go to the log. What cannot work is refused
    /// when the manager is made: a host that is no host name, `target_session_attrs` that ask for a standby, and what
    /// else contradicts. With `ssl_mode` `Prefer` or `Require` and no connector, one of the features `tls-…` does TLS, and verifies
    /// nobody; [`from_url`](Self::from_url) has settings for that.
    pub fn from_postgres(postgres: postgres::Config) -> Self {
        Self {
            postgres,
            unread: Vec::new(),
            tls_settings: TlsSettings::default(),
            tls: None,
            tls_as_set: false,
            tls_stack: tls::STACKS.first().copied(),
            password: None,
            passwords: None,
            observer: None,
            namespace: "dsync".to_owned(),
            service: None,
            build: None,
            catalog: CatalogMode::Automatic,
            takeover: None,
            quorum: Quorum::Server,
            schema: Arc::new(Schema::new(Schema::DEFAULT)),
            max_sessions: 20,
            shared_sessions: 0,
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

    /// A TLS connector of the application's own for the sessions, such as those of `postgres-native-tls` or `tokio-postgres-rustls`, or another
    /// one that works with any stream. It comes before the features `tls-…` of the library. It alone decides which certificates are trusted and
    /// shown, and which versions of TLS are spoken, so `sslmode=verify-ca` and `verify-full` are refused beside it; for `sslnegotiation=direct` it
    /// must offer the protocol `postgresql` by ALPN. Defaults to none: then a feature makes one [as the settings say](#tls), and
    /// without a feature `sslmode=prefer`, the default, connects without TLS.
    #[must_use]
    pub fn tls<T>(mut self, connector: T) -> Self
    where
        T: MakeTlsConnect<Socket> + Clone + Send + Sync + 'static,
        T::Stream: Send + 'static,
        T::TlsConnect: Send,
        <T::TlsConnect as TlsConnect<Socket>>::Future: Send,
    {
        self.tls = Some(Tls::new(connector));
        self.tls_as_set = false;
        self
    }

    /// A TLS connector of the application's own, made as the connection's `sslmode`, `sslrootcert`, `sslcert` and `sslkey` ask: see
    /// [`TlsSettings`]. Unlike with [`tls`](Self::tls), `sslmode=verify-ca` and `verify-full` are accepted. `make` is not called where there can
    /// be no TLS: with `sslmode=disable`, and where all hosts are Unix sockets.
    ///
    /// ```no_run
    /// # fn connector(trusted: Option<&std::path::Path>) -> dsync::Result<dsync::postgres::NoTls> { Ok(dsync::postgres::NoTls) }
    /// use dsync::Config;
    ///
    /// let config = Config::from_url("host=db.internal user=app sslmode=verify-full sslrootcert=/etc/ca.pem")?
    ///     .tls_with(|wanted| connector(wanted.sslrootcert.as_deref()))?;
    /// # Ok::<(), dsync::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of `make`.
    pub fn tls_with<T, E>(
        self,
        make: impl FnOnce(&TlsSettings) -> std::result::Result<T, E>,
    ) -> std::result::Result<Self, E>
    where
        T: MakeTlsConnect<Socket> + Clone + Send + Sync + 'static,
        T::Stream: Send + 'static,
        T::TlsConnect: Send,
        <T::TlsConnect as TlsConnect<Socket>>::Future: Send,
    {
        if self.never_tls() {
            return Ok(self);
        }
        let connector = make(&self.tls_settings)?;
        Ok(Self { tls_as_set: true, ..self.tls(connector) })
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

    /// The TLS connector of the sessions, if there is one: the application's, or else the library's own. Refuses files that cannot be used.
    pub(crate) fn connector(&self) -> Result<Option<Tls>> {
        match (&self.tls, self.tls_stack) {
            (Some(connector), _) => Ok(Some(connector.clone())),
            (None, Some(make)) if !self.never_tls() => make(&self.tls_settings).map(Some),
            (None, _) => Ok(None),
        }
    }

    /// What the sessions call themselves in front of the key.
    pub(crate) fn own_name(&self) -> &str {
        self.postgres.get_application_name().unwrap_or("dsync")
    }

    /// How long an attempt to connect may take, over all hosts.
    pub(crate) fn connect_time(&self) -> Duration {
        const USUAL: Duration = Duration::from_secs(5);
        let hosts = self.postgres.get_hosts().len().max(self.postgres.get_hostaddrs().len());
        let all = |each: &Duration| each.saturating_mul(hosts.try_into().unwrap_or(u32::MAX));
        self.connect_timeout.unwrap_or(self.postgres.get_connect_timeout().map_or(USUAL, all).max(USUAL))
    }

    /// The takeover policy, with the default filled in.
    pub(crate) fn takeover_policy(&self) -> TakeoverPolicy {
        self.takeover.unwrap_or(match self.catalog {
            CatalogMode::None => TakeoverPolicy::Immediate,
            _ => TakeoverPolicy::AfterPromotion,
        })
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
            .field("takeover", &self.takeover_policy())
            .field("quorum", &self.quorum)
            .field("schema", &self.schema)
            .field("max_sessions", &self.max_sessions)
            .field("shared_sessions", &self.shared_sessions)
            .field("idle_timeout", &self.idle_timeout)
            .field("connect_timeout", &self.connect_time())
            .field("release_timeout", &self.release_timeout)
            .field("wait_slice", &self.wait_slice)
            .field("lease_plan", &self.lease_plan())
            .finish()
    }
}

fn invalid(message: String) -> Error {
    Error::new(ErrorKind::InvalidConfig, message)
}
