//! A private PostgreSQL server: what it is and how to reach it. Its life and its misfortunes are in the files beside.

mod builder;
mod configuration;
mod faults;
mod freeze;
mod life;
mod settings;
mod standby;
mod template;

use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use postgres::{Client, Config, NoTls};

use crate::binaries::Binaries;
use crate::database::Database;
use crate::error::{Error, Result};
use crate::program::Workshop;

pub use builder::Builder;
pub use freeze::Frozen;
pub use life::Shutdown;
pub use standby::Replication;

/// The name of the log in the server's folder.
const LOG: &str = "log";

/// A PostgreSQL server of our own, on 127.0.0.1 and a Unix socket, with the superuser `postgres`.
///
/// Dropping it ends its processes and removes its files. So does the end of this process, however it ends.
#[derive(Debug)]
pub struct Server {
    binaries: Binaries,
    plan: Builder,
    port: u16,
    password: Option<String>,
    /// The postmaster. Signals go out under this lock only, while the process is not yet waited for: so an id can
    /// never be somebody else's.
    postmaster: Mutex<Option<Child>>,
    /// Backends that outlive a postmaster for a moment, which keeps the next one from starting.
    orphans: Mutex<Vec<i32>>,
    /// How often it is frozen at the moment.
    freezes: Mutex<usize>,
    databases: AtomicU64,
    workshop: Workshop,
}

impl Server {
    /// Starts a server with the settings for tests: see [`Builder`].
    ///
    /// # Errors
    /// When PostgreSQL isn't installed or doesn't start.
    pub fn start() -> Result<Self> {
        Self::builder().start()
    }

    /// For a server that isn't like all the others.
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// The server that all tests of this process share, each with a [`database`](Self::database) of its own. It's
    /// started at first use and takes 300 connections. Nobody should stop or freeze it.
    ///
    /// # Panics
    /// When it can't be started: this is how a test fails, and no test could go on. The text says what to install.
    #[must_use]
    pub fn shared() -> &'static Self {
        static SHARED: OnceLock<Result<Server>> = OnceLock::new();
        match SHARED.get_or_init(|| Self::builder().max_connections(300).start()) {
            Ok(server) => server,
            Err(error) => panic!("{error}"),
        }
    }

    /// Makes a new, empty database, which goes when the value is dropped. Advisory locks belong to a database, so tests
    /// that have one each don't meet.
    ///
    /// # Errors
    /// When the server isn't running, or is a standby.
    pub fn database(&self) -> Result<Database<'_>> {
        let number = self.databases.fetch_add(1, Ordering::Relaxed) + 1;
        Database::create(self, format!("test_{number}"))
    }

    /// The address of the database `postgres` over TCP, with the password if there is one. Of a server in a network namespace: by the cable.
    #[must_use]
    pub fn url(&self) -> String {
        let host = self.plan.inside.as_ref().map_or("127.0.0.1", |inside| &inside.address);
        self.url_of("postgres", host, self.port)
    }

    /// Like [`url`](Self::url) for another way to reach this server: a proxy, or an address from
    /// [`Builder::listen`].
    #[must_use]
    pub fn url_at(&self, host: &str, port: u16) -> String {
        self.url_of("postgres", host, port)
    }

    /// The address of the database `postgres` over the Unix socket, which asks no password.
    #[must_use]
    pub fn unix_url(&self) -> String {
        self.unix_url_of("postgres")
    }

    pub(crate) fn url_of(&self, database: &str, host: &str, port: u16) -> String {
        let password = self.password.as_ref().map(|password| format!(":{password}")).unwrap_or_default();
        let host = if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
        format!("postgres://postgres{password}@{host}:{port}/{database}")
    }

    pub(crate) fn unix_url_of(&self, database: &str) -> String {
        let folder = self.socket_dir().to_string_lossy().replace('/', "%2F");
        format!("postgres://postgres@{folder}:{}/{database}", self.port)
    }

    /// The TCP port. It stays the same over restarts.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The superuser's password: with [`Builder::password_auth`] only.
    #[must_use]
    pub fn password(&self) -> Option<&str> {
        self.password.as_deref()
    }

    /// The folder of the Unix socket.
    #[must_use]
    pub fn socket_dir(&self) -> PathBuf {
        self.workshop.folder.join("s")
    }

    /// The data folder.
    #[must_use]
    pub fn data_dir(&self) -> PathBuf {
        self.workshop.folder.join("data")
    }

    /// The folder that holds everything of this server, and goes with it.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.workshop.folder.path()
    }

    /// The certificate to trust, a file in PEM: with [`Builder::tls`] only.
    #[must_use]
    pub fn certificate_pem(&self) -> Option<PathBuf> {
        self.plan.tls.then(|| self.workshop.folder.join("authority.pem"))
    }

    /// The major version, such as 15.
    #[must_use]
    pub fn version(&self) -> u32 {
        self.binaries.major_version()
    }

    /// PostgreSQL's programs.
    #[must_use]
    pub fn binaries(&self) -> &Binaries {
        &self.binaries
    }

    /// The server's log up to now.
    #[must_use]
    pub fn log(&self) -> String {
        self.workshop.folder.read(LOG)
    }

    /// A new connection as superuser to the database `postgres`, over the Unix socket.
    ///
    /// # Errors
    /// When the server isn't running. While it's frozen this waits.
    pub fn client(&self) -> Result<Client> {
        self.client_of("postgres")
    }

    pub(crate) fn client_of(&self, database: &str) -> Result<Client> {
        Config::new()
            .host_path(self.socket_dir())
            .port(self.port)
            .user("postgres")
            .dbname(database)
            .application_name("dsync-test-support")
            .connect_timeout(Duration::from_secs(10))
            .connect(NoTls)
            .map_err(Error::because(format!("can't connect to the test server on port {}", self.port)))
    }

    /// One value from one query.
    pub(crate) fn ask<T>(&self, query: &str) -> Result<T>
    where
        T: for<'a> postgres::types::FromSql<'a>,
    {
        self.client()?
            .query_one(query, &[])
            .and_then(|row| row.try_get(0))
            .map_err(Error::because(format!("the query `{query}` failed")))
    }

    /// For statements that can't run in a transaction block too, one at a time.
    pub(crate) fn execute(&self, statement: &str) -> Result<()> {
        self.client()?.batch_execute(statement).map_err(Error::because(format!("`{statement}` failed")))
    }
}

/// A panic in one test is no reason to leave a server running.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
