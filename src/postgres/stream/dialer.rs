//! Opens sessions, and sends their cancel requests.

use std::error::Error;
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use postgres::config::{Host, LoadBalanceHosts, SslMode, SslNegotiation};
use postgres::{CancelToken, Client, Config};
use r2d2::ManageConnection;
use r2d2_postgres::PostgresConnectionManager;

use super::connector::{Bait, Connector, HookError, Plan, Route, key};
use super::control::{Ended, StreamControl};
use super::password::{Password, PasswordError};
use super::session_stream::Role;
use super::tls::Tls;

/// The time for one attempt to connect to one address where the user gave no `connect_timeout`.
///
/// The driver would wait for as long as the operating system does, which is minutes.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How soon a kill is noticed while a name is being resolved, which cannot be interrupted.
const RESOLVE_SLICE: Duration = Duration::from_millis(20);

/// Opens sessions with a configuration of the user's, each with a stream that obeys a [`StreamControl`].
///
/// Stands in for `postgres::Config::connect`, which it calls for one address at a time, since the driver is told a
/// bounded time for the TCP connect alone and would spend all of it on the first host that hangs later.
#[derive(Clone, Debug)]
pub(crate) struct Dialer {
    plan: Arc<Plan>,
    /// Gives the password of each session, in place of the configuration's.
    password: Option<Password>,
}

impl Dialer {
    /// Checks the hosts of the configuration. `tls` is needed for `sslmode=require` and used for `prefer`.
    ///
    /// The configuration's `notice_callback` is not kept, since it cannot be read back; notices go to the log.
    pub(crate) fn new(config: Config, tls: Option<Tls>) -> Result<Self, DialError> {
        let routes = routes(&config).map_err(|text| DialError::one("configuration", text))?;
        let plan = Plan {
            config: config.clone(),
            ssl_mode: config.get_ssl_mode(),
            ssl_negotiation: config.get_ssl_negotiation(),
            tls,
            routes,
            bait: Bait::default(),
        };
        Ok(Self { plan: Arc::new(plan), password: None })
    }

    /// Has the hook asked for the password of each session, if there is one.
    pub(crate) fn with_password(self, password: Option<Password>) -> Self {
        Self { password, ..self }
    }

    /// Opens a session on the first host that gives one, and not later than `deadline`.
    ///
    /// Each address has the time that the user set as `connect_timeout`, or 5 s, for all that it takes until the
    /// session is ready, as in libpq. Give each session a control of its own.
    ///
    /// # Errors
    /// The error of the last address tried, and in its text those of all. A killed control ends the search.
    pub(crate) fn connect(&self, control: &StreamControl, deadline: Instant) -> Result<Client, DialError> {
        let shuffled = self.plan.config.get_load_balance_hosts() == LoadBalanceHosts::Random;
        let mut order: Vec<usize> = (0..self.plan.routes.len()).collect();
        if shuffled {
            fastrand::shuffle(&mut order);
        }
        let mut failed = DialError::default();
        for index in order {
            let route = &self.plan.routes[index];
            let mut addresses = match self.addresses(route, control, deadline) {
                Ok(addresses) => addresses,
                Err(error) => {
                    failed.add(route, error);
                    continue;
                }
            };
            if shuffled {
                fastrand::shuffle(&mut addresses);
            }
            for address in addresses {
                if let Some(ended) = control.ended() {
                    failed.add(route, ended.into_io());
                    return Err(failed);
                }
                let now = Instant::now();
                if now >= deadline {
                    failed.add(route, Ended::ConnectTimedOut.into_io());
                    return Err(failed);
                }
                match self.attempt(index, address, control, now, deadline) {
                    Ok(client) => {
                        control.establish();
                        return Ok(client);
                    }
                    Err(error) => failed.add(route, error),
                }
            }
        }
        Err(failed)
    }

    /// One address, through the driver.
    fn attempt(
        &self,
        index: usize,
        address: Option<SocketAddr>,
        control: &StreamControl,
        now: Instant,
        deadline: Instant,
    ) -> Result<Client, BoxedError> {
        let wanted = self.plan.config.get_connect_timeout().copied().unwrap_or(CONNECT_TIMEOUT);
        let time = wanted.min(deadline.saturating_duration_since(now));
        let password = self.password.as_ref().map(|hook| hook.ask(control, now + time)).transpose()?;
        let bait = self.bait()?;
        let connector =
            Connector::new(Arc::clone(&self.plan), address, control.clone(), Role::Session, now + time);
        let reached = connector.reached();
        let mut config = self.single_host(index, bait, time);
        if let Some(password) = password {
            config.password(password);
        }
        let manager = PostgresConnectionManager::new(config, connector);
        // The driver unwraps the making of its runtime, which fails when the process has no file descriptor left.
        match catch_unwind(AssertUnwindSafe(|| manager.connect())) {
            Ok(Ok(client)) => Ok(client),
            Ok(Err(error)) if reached.load(Ordering::SeqCst) => Err(error.into()),
            Ok(Err(error)) => Err(LoopbackError(error.into()).into()),
            Err(_) => Err(DRIVER_PANICKED.into()),
        }
    }

    /// Where the driver is led to.
    fn bait(&self) -> Result<SocketAddr, LoopbackError> {
        self.plan.bait.address().map_err(|error| LoopbackError(error.into()))
    }

    /// The user's configuration with the host `index` alone, at the `bait`, and our hook switched on.
    fn single_host(&self, index: usize, bait: SocketAddr, connect_timeout: Duration) -> Config {
        let from = &self.plan.config;
        let mut to = Config::new();
        to.host(&key(index))
            .hostaddr(bait.ip())
            .port(bait.port())
            .ssl_mode(SslMode::Require)
            .ssl_negotiation(SslNegotiation::Direct)
            .connect_timeout(connect_timeout)
            .keepalives(false)
            .target_session_attrs(from.get_target_session_attrs())
            .channel_binding(from.get_channel_binding());
        if let Some(user) = from.get_user() {
            to.user(user);
        }
        if let Some(password) = from.get_password() {
            to.password(password);
        }
        if let Some(dbname) = from.get_dbname() {
            to.dbname(dbname);
        }
        if let Some(options) = from.get_options() {
            to.options(options);
        }
        if let Some(application_name) = from.get_application_name() {
            to.application_name(application_name);
        }
        to
    }

    /// Where the server of a route may be.
    fn addresses(
        &self,
        route: &Route,
        control: &StreamControl,
        deadline: Instant,
    ) -> Result<Vec<Option<SocketAddr>>, BoxedError> {
        match route {
            Route::Tcp { address: Some(ip), port, .. } => Ok(vec![Some((*ip, *port).into())]),
            Route::Tcp { domain, port, .. } => {
                Ok(resolve(domain, *port, control, deadline)?.into_iter().map(Some).collect())
            }
            Route::Unix { .. } => Ok(vec![None]),
        }
    }

    /// Cancels the statement that the session with this control and token is running; done when the server has sent the
    /// signal.
    ///
    /// So a statement that is sent after this has returned `Ok` is not hit by it. A pooler between us and the server
    /// may close the connection earlier, and then it may be.
    ///
    /// # Errors
    /// When the server could not be reached, or had not closed the connection by `deadline`; then the cancel may
    /// still take effect at any time, and the session should be discarded.
    pub(crate) fn cancel(
        &self,
        session: &StreamControl,
        token: &CancelToken,
        deadline: Instant,
    ) -> Result<(), DialError> {
        const WHAT: &str = "cancel request";
        // The driver connects for as long as the session's configuration says, and unwraps the making of a runtime;
        // a thread of its own keeps us from both.
        let control = StreamControl::new();
        control.set_deadline(Some(deadline));
        let connector =
            Connector::new(Arc::clone(&self.plan), session.peer(), control.clone(), Role::Cancel, deadline);
        // Makes room in the queue of the bait.
        self.bait().map_err(|error| DialError::one(WHAT, error))?;
        let (done, outcome) = mpsc::sync_channel(1);
        let token = token.clone();
        thread::Builder::new()
            .name("dsync-cancel".into())
            .spawn(move || {
                // Nobody listens any more when the deadline has passed.
                let _ = done.send(token.cancel_query(connector));
            })
            .map_err(|error| DialError::one(WHAT, error))?;
        match outcome.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(DialError::one(WHAT, error)),
            Err(RecvTimeoutError::Timeout) => {
                control.kill();
                Err(DialError::one(WHAT, Ended::DeadlinePassed.into_io()))
            }
            Err(RecvTimeoutError::Disconnected) => Err(DialError::one(WHAT, DRIVER_PANICKED)),
        }
    }
}

/// The hosts of a configuration, paired with their addresses and ports by the driver's rules.
fn routes(config: &Config) -> Result<Vec<Route>, String> {
    let (hosts, addresses, ports) = (config.get_hosts(), config.get_hostaddrs(), config.get_ports());
    let count = hosts.len().max(addresses.len());
    if count == 0 {
        return Err("both host and hostaddr are missing".into());
    }
    if !hosts.is_empty() && !addresses.is_empty() && hosts.len() != addresses.len() {
        return Err(format!(
            "number of hosts ({}) is different from number of hostaddrs ({})",
            hosts.len(),
            addresses.len()
        ));
    }
    if ports.len() > 1 && ports.len() != count {
        return Err(format!("number of ports ({}) is different from number of hosts ({count})", ports.len()));
    }
    let route = |index: usize| {
        let port = ports.get(index).or(ports.first()).copied().unwrap_or(5432);
        let address = addresses.get(index).copied();
        match (hosts.get(index), address) {
            (Some(Host::Tcp(name)), _) => Some(Route::Tcp { domain: name.clone(), address, port }),
            // An address beside the directory of a Unix socket wins, as in libpq.
            (_, Some(ip)) => Some(Route::Tcp { domain: ip.to_string(), address, port }),
            (Some(Host::Unix(directory)), None) => {
                Some(Route::Unix { path: directory.join(format!(".s.PGSQL.{port}")) })
            }
            (None, None) => None,
        }
    };
    Ok((0..count).filter_map(route).collect())
}

/// Resolves a host name, but not for longer than `deadline`.
///
/// The system's resolver can hang for minutes and cannot be interrupted, and the driver's runtime would wait for it
/// even when it is dropped. So it runs in a thread, which is left to itself when the time is up.
fn resolve(
    name: &str,
    port: u16,
    control: &StreamControl,
    deadline: Instant,
) -> Result<Vec<SocketAddr>, BoxedError> {
    if let Ok(ip) = name.parse::<IpAddr>() {
        return Ok(vec![(ip, port).into()]);
    }
    let (done, outcome) = mpsc::sync_channel(1);
    let name = name.to_owned();
    thread::Builder::new().name("dsync-resolve".into()).spawn(move || {
        // Nobody listens any more when the deadline has passed.
        let _ = done.send((name.as_str(), port).to_socket_addrs().map(Vec::from_iter));
    })?;
    loop {
        if let Some(ended) = control.ended() {
            return Err(ended.into_io().into());
        }
        let left = deadline.saturating_duration_since(Instant::now());
        match outcome.recv_timeout(left.min(RESOLVE_SLICE)) {
            Ok(Ok(addresses)) if addresses.is_empty() => return Err("the host name has no address".into()),
            Ok(Ok(addresses)) => return Ok(addresses),
            Ok(Err(error)) => return Err(error.into()),
            Err(RecvTimeoutError::Timeout) if left.is_zero() => {
                let text = "the host name was not resolved in time";
                return Err(io::Error::new(io::ErrorKind::TimedOut, text).into());
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Err("the resolver panicked".into()),
        }
    }
}

type BoxedError = Box<dyn Error + Send + Sync>;

const DRIVER_PANICKED: &str = "the PostgreSQL driver panicked; it does when it cannot make a runtime: is the limit of open files reached?";

/// The bait could not be bound or reached.
#[derive(Debug)]
struct LoopbackError(BoxedError);

impl fmt::Display for LoopbackError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("sessions need the loopback interface (127.0.0.1), whatever host they go to")
    }
}

impl Error for LoopbackError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        Some(&*self.0)
    }
}

/// Why no session could be opened: one failure for each address that was tried.
///
/// Its source is that of the last one.
#[derive(Debug, Default)]
pub(crate) struct DialError {
    failures: Vec<(String, BoxedError)>,
}

impl DialError {
    fn one(what: &str, error: impl Into<BoxedError>) -> Self {
        Self { failures: vec![(what.to_owned(), error.into())] }
    }

    fn add(&mut self, route: &Route, error: impl Into<BoxedError>) {
        let error = error.into();
        log::debug!("could not connect to {route}: {}", Chain(&*error));
        self.failures.push((route.to_string(), error));
    }

    /// The last failure.
    fn last(&self) -> Option<&(dyn Error + Send + Sync + 'static)> {
        self.failures.last().map(|(_, error)| &**error)
    }

    /// The driver's error, if the last failure is one; it has the server's message and SQLSTATE.
    pub(crate) fn driver(&self) -> Option<&postgres::Error> {
        self.last()?.downcast_ref()
    }

    /// Whether the hook that gives the password failed last.
    pub(crate) fn is_about_password(&self) -> bool {
        self.last().is_some_and(|error| error.is::<PasswordError>())
    }

    /// Whether it was us who ended the last attempt, and why.
    #[cfg(test)]
    pub(crate) fn ended(&self) -> Option<Ended> {
        Ended::find(self.last()?)
    }
}

impl fmt::Display for DialError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (what, error)) in self.failures.iter().enumerate() {
            let separator = if index == 0 { "" } else { "; " };
            write!(f, "{separator}{what}: {}", Chain(&**error))?;
        }
        Ok(())
    }
}

impl Error for DialError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.last().map(|error| error as _)
    }
}

/// An error with its causes.
struct Chain<'a>(&'a (dyn Error + 'static));

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut first = self.0;
        // The driver calls whatever our hook reports a failed TLS handshake, which would mislead the reader.
        if let Some(hook) = first.source().filter(|source| source.is::<HookError>()) {
            first = hook;
        }
        write!(f, "{first}")?;
        let mut next = first.source();
        while let Some(error) = next {
            write!(f, ": {error}")?;
            next = error.source();
        }
        Ok(())
    }
}
