//! Opens sessions, and sends their cancel requests.

use std::error::Error;
use std::fmt;
use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError, TryRecvError};
use std::thread;
use std::time::{Duration, Instant};

use postgres::config::{Host, LoadBalanceHosts, SslMode, SslNegotiation, TargetSessionAttrs};
use postgres::error::SqlState;
use postgres::{CancelToken, Client, Config};
use r2d2::ManageConnection;
use r2d2_postgres::PostgresConnectionManager;

use super::connector::{Connector, Decoy, HookError, Plan, Progress, Route, Step, key};
use super::control::{Ended, SHORT_ANSWER, StreamControl};
use super::password::{Password, Passwords};
use super::resolve::resolve;
use super::session_stream::Role;
use super::tls::Tls;
use crate::error::chain;

/// Opens sessions with a configuration of the user's, each with a stream that obeys a [`StreamControl`].
///
/// Stands in for `postgres::Config::connect`, which it calls for one address at a time, since the driver is told a
/// bounded time for the TCP connect alone and would spend all of it on the first host that hangs later.
#[derive(Clone, Debug)]
pub(crate) struct Dialer {
    plan: Arc<Plan>,
    /// Gives the password of each session, in place of the configuration's.
    password: Option<Password>,
    /// Give it where neither does.
    passwords: Option<Arc<dyn Passwords>>,
}

/// Why a session that is open cannot be used.
#[derive(Debug)]
pub(crate) struct NotReady {
    pub(crate) error: BoxedError,
    /// Whether another address may be tried.
    pub(crate) go_on: bool,
}

impl Dialer {
    /// Checks the hosts of the configuration. `tls` is needed for `sslmode=require` and used for `prefer`.
    ///
    /// The configuration's `notice_callback` is not kept, since it cannot be read back; notices go to the log and to the control.
    pub(crate) fn new(config: Config, tls: Option<Tls>) -> Result<Self, DialError> {
        let routes = routes(&config).map_err(|text| DialError::one("configuration", text))?;
        let plan = Plan {
            config: config.clone(),
            ssl_mode: config.get_ssl_mode(),
            ssl_negotiation: config.get_ssl_negotiation(),
            tls,
            routes,
            decoy: Decoy::default(),
            begin: parking_lot::Mutex::default(),
        };
        Ok(Self { plan: Arc::new(plan), password: None, passwords: None })
    }

    /// Has the hook asked for the password of each session, if there is one.
    pub(crate) fn with_password(self, password: Option<Password>) -> Self {
        Self { password, ..self }
    }

    /// The names of the hosts.
    pub(crate) fn host_names(&self) -> impl Iterator<Item = &str> {
        self.plan.config.get_hosts().iter().filter_map(|host| match host {
            Host::Tcp(name) => Some(name.as_str()),
            Host::Unix(_) => None,
        })
    }

    /// Has passwords looked up for each session, if neither the configuration nor a hook gives one.
    pub(crate) fn with_passwords(self, passwords: Option<Arc<dyn Passwords>>) -> Self {
        Self { passwords, ..self }
    }

    /// Opens a session at the first address that gives one which is `ready`, and not later than `deadline`.
    ///
    /// Each address has its share for all that it takes until then: the time that is left, divided by the number of
    /// addresses still to be tried, and never more than the `connect_timeout` in the user's settings, which counts for
    /// each address as in libpq. A name has one share for being looked up; its addresses divide what is left anew.
    ///
    /// The first address tried is the one that worked last, or else the one after that at which the last attempt
    /// ended, so that attempts which are ended early reach all of them in time. In random order where the user wants that.
    ///
    /// `ready` is told when its time is up, and need not look: its calls fail then. Give each session a control of its own.
    ///
    /// # Errors
    /// What happened at each address that was tried. A killed control ends the search.
    pub(crate) fn connect<T>(
        &self,
        control: &StreamControl,
        deadline: Instant,
        mut ready: impl FnMut(Client, Instant) -> Result<T, NotReady>,
    ) -> Result<T, DialError> {
        let shuffled = self.plan.config.get_load_balance_hosts() == LoadBalanceHosts::Random;
        let (first, first_address) = *self.plan.begin.lock();
        let mut order: Vec<usize> = (0..self.plan.routes.len()).collect();
        if shuffled {
            fastrand::shuffle(&mut order);
        } else {
            order.rotate_left(first);
        }
        let mut failed = DialError::default();
        for (position, &index) in order.iter().enumerate() {
            let route = &self.plan.routes[index];
            let to_come = order.len() - position - 1;
            let next_route = ((index + 1) % self.plan.routes.len(), None);
            let name = || route.to_string();
            let Some(until) = self.share(control, deadline, 1 + to_come, name, &mut failed) else { break };
            let mut addresses = match addresses(route, control, until) {
                Ok(addresses) => addresses,
                Err(error) => {
                    *self.plan.begin.lock() = next_route;
                    failed.add(route.to_string(), error);
                    continue;
                }
            };
            if shuffled {
                fastrand::shuffle(&mut addresses);
            } else if index == first
                && let Some(begin) = addresses.iter().position(|address| *address == first_address)
            {
                addresses.rotate_left(begin);
            }
            for (tried, &address) in addresses.iter().enumerate() {
                let left = addresses.len() - tried + to_come;
                let Some(until) = self.share(control, deadline, left, || route.at(address), &mut failed)
                else {
                    return Err(failed);
                };
                let begun = Instant::now();
                let progress = &mut None;
                let outcome = self
                    .attempt(index, address, control, until, progress)
                    .map_err(|error| NotReady { error, go_on: true })
                    .and_then(|client| ready(client, until));
                match outcome {
                    Ok(session) => {
                        *self.plan.begin.lock() = (index, address);
                        control.establish();
                        return Ok(session);
                    }
                    Err(NotReady { error, go_on }) => {
                        let next = addresses.get(tried + 1).map_or(next_route, |next| (index, *next));
                        *self.plan.begin.lock() = next;
                        failed.add(route.at(address), explain(error, progress.as_deref(), begun));
                        if !go_on {
                            return Err(failed);
                        }
                    }
                }
            }
        }
        Err(failed)
    }

    /// Until when the next of `count` addresses, of this `name`, may be tried; `None`, with the reason in `failed`, if none may.
    fn share(
        &self,
        control: &StreamControl,
        deadline: Instant,
        count: usize,
        name: impl FnOnce() -> String,
        failed: &mut DialError,
    ) -> Option<Instant> {
        // Of the session before, which said goodbye.
        control.set_deadline(None);
        control.allow(SHORT_ANSWER);
        let left = deadline.saturating_duration_since(Instant::now());
        let ended = control.ended().or_else(|| left.is_zero().then_some(Ended::ConnectTimedOut));
        if let Some(ended) = ended {
            if ended == Ended::Killed {
                failed.add("connect".to_owned(), ended.into_io());
            } else if failed.failures.is_empty() {
                // The time was over before the first one was tried.
                failed.add(name(), ended.into_io());
            }
            return None;
        }
        let share = left / u32::try_from(count).unwrap_or(u32::MAX);
        let share = self.plan.config.get_connect_timeout().map_or(share, |&longest| share.min(longest));
        Some(Instant::now() + share)
    }

    /// One address, through the driver.
    fn attempt(
        &self,
        index: usize,
        address: Option<SocketAddr>,
        control: &StreamControl,
        until: Instant,
        progress: &mut Option<Arc<Progress>>,
    ) -> Result<Client, BoxedError> {
        control.set_route(index);
        control.set_notice(None);
        let password = self.password.as_ref().map(|hook| hook.ask(control, until)).transpose()?;
        let decoy = self.plan.decoy.address().map_err(|error| Local::Loopback(error.into()))?;
        let turn = self.plan.decoy.reserve(until).map_err(Local::Descriptors)?;
        let connector =
            Connector::new(Arc::clone(&self.plan), address, control.clone(), Role::Session, until, turn);
        let progress = &**progress.insert(connector.progress());
        let time = until.saturating_duration_since(Instant::now());
        let mut config = self.single_host(index, decoy, time);
        if let Some(password) = password {
            config.password(password);
        } else if let Some(password) = self.plan.config.get_password() {
            config.password(password);
        } else if let Some(passwords) = &self.passwords
            && let Some(password) = passwords.password_for(&self.plan.routes[index])
        {
            config.password(password);
        }
        let noticed = control.clone();
        config.notice_callback(move |notice| {
            noticed.set_notice(Some(notice.code().clone()));
            // Why it ends a session is in the line of the loss, if there was a lock. A logger may block, and here the loss has not been told yet.
            if !notice.code().code().starts_with("57P") {
                log::info!("the server says: {}: {}", notice.severity(), notice.message());
            }
        });
        let manager = PostgresConnectionManager::new(config, connector);
        // The driver unwraps the making of its runtime; another program's thread may have had the last descriptor.
        match catch_unwind(AssertUnwindSafe(|| manager.connect())) {
            Ok(Ok(client)) => Ok(client),
            Ok(Err(error)) if progress.step() == Step::Loopback => Err(Local::Loopback(error.into()).into()),
            Ok(Err(error)) => {
                let error = own(error);
                // Without a word: the reason is in the server's log only.
                let hung_up = error.downcast_ref().is_some_and(is_end_of_stream);
                if self.plan.is_direct() && progress.step() == Step::LogIn && hung_up {
                    return Err(HookError::Tls { direct: true, source: error }.into());
                }
                Err(error)
            }
            Err(_) => Err(DRIVER_PANICKED.into()),
        }
    }

    /// The user's configuration with the host `index` alone, at the `decoy`, without a password, and our hook switched on.
    fn single_host(&self, index: usize, decoy: SocketAddr, connect_timeout: Duration) -> Config {
        let from = &self.plan.config;
        let mut to = Config::new();
        to.host(&key(index))
            .hostaddr(decoy.ip())
            .port(decoy.port())
            .ssl_mode(SslMode::Require)
            .ssl_negotiation(SslNegotiation::Direct)
            .connect_timeout(connect_timeout)
            .keepalives(false)
            .target_session_attrs(from.get_target_session_attrs())
            .channel_binding(from.get_channel_binding());
        if let Some(user) = from.get_user() {
            to.user(user);
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

    /// Sees, on a thread of its own, whether the server of the session with this control takes new sessions: whether it has asked a new connection for
    /// a password, has let one in, or has refused it for another reason than that it stops. No password is given.
    ///
    /// That thread has `tell` make a text of what is in the way, since a text is all that one may drop under a mutex: the error may be the
    /// application's own.
    ///
    /// # Errors
    /// When no thread could be started, or no socket opened.
    pub(crate) fn probe_stop(
        &self,
        session: &StreamControl,
        tell: fn(DialError) -> String,
        deadline: Instant,
    ) -> Result<StopProbe, DialError> {
        let (index, address) = (session.route(), session.peer());
        let Some(route) = self.plan.routes.get(index) else {
            return Err(DialError::one(STOP_PROBE, DRIVER_PANICKED));
        };
        let at = route.at(address);
        let decoy = self.plan.decoy.address();
        let decoy = decoy.map_err(|error| DialError::one(STOP_PROBE, Local::Loopback(error.into())))?;
        let turn = self
            .plan
            .decoy
            .reserve(deadline)
            .map_err(|error| DialError::one(STOP_PROBE, Local::Descriptors(error)))?;
        let control = StreamControl::new();
        control.set_deadline(Some(deadline));
        let connector =
            Connector::new(Arc::clone(&self.plan), address, control.clone(), Role::Session, deadline, turn);
        let progress = connector.progress();
        let time = deadline.saturating_duration_since(Instant::now());
        let mut config = self.single_host(index, decoy, time);
        // One that is let in has its answer, and asks nothing: a pooler may have no session for that.
        config.target_session_attrs(TargetSessionAttrs::Any);
        let (done, outcome) = mpsc::sync_channel(1);
        let ended = control.clone();
        thread::Builder::new()
            .name("dsync-stopping".into())
            .spawn(move || {
                let manager = PostgresConnectionManager::new(config, connector);
                let opened = catch_unwind(AssertUnwindSafe(|| manager.connect().map(drop)));
                let outcome = match opened {
                    Ok(Err(error)) if !is_answer(&error, &progress) => Err(DialError::one(&at, own(error))),
                    Ok(_) => Ok(()),
                    Err(_) => Err(DialError::one(&at, DRIVER_PANICKED)),
                };
                // It is looked at later, or never: neither is the server to wait for the password until then, nor this process to keep the socket.
                ended.kill();
                ended.detach();
                // Nobody listens any more if it is not wanted.
                let _ = done.send(outcome.map_err(tell));
            })
            .map_err(|error| DialError::one(STOP_PROBE, error))?;
        Ok(StopProbe { control, outcome })
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
        // The driver connects for as long as the session's configuration says; a thread of its own keeps us from that.
        let control = StreamControl::new();
        control.set_deadline(Some(deadline));
        // Makes room in the queue of the decoy.
        self.plan.decoy.address().map_err(|error| DialError::one(WHAT, Local::Loopback(error.into())))?;
        let turn = self
            .plan
            .decoy
            .reserve(deadline)
            .map_err(|error| DialError::one(WHAT, Local::Descriptors(error)))?;
        let plan = Arc::clone(&self.plan);
        let connector = Connector::new(plan, session.peer(), control.clone(), Role::Cancel, deadline, turn);
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
            Ok(Err(error)) => Err(DialError::one(WHAT, own(error))),
            Err(RecvTimeoutError::Timeout) => {
                control.kill();
                Err(DialError::one(WHAT, Ended::DeadlinePassed.into_io()))
            }
            Err(RecvTimeoutError::Disconnected) => Err(DialError::one(WHAT, DRIVER_PANICKED)),
        }
    }
}

const STOP_PROBE: &str = "a look at whether the server stops";

/// A [probe](Dialer::probe_stop) that is under way. It is given up when this is dropped.
pub(crate) struct StopProbe {
    control: StreamControl,
    outcome: mpsc::Receiver<Result<(), String>>,
}

impl StopProbe {
    /// What came of it, if that is known.
    pub(crate) fn outcome(&self) -> Option<Result<(), String>> {
        match self.outcome.try_recv() {
            Ok(outcome) => Some(outcome),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => {
                Some(Err(DialError::one(STOP_PROBE, DRIVER_PANICKED).to_string()))
            }
        }
    }
}

impl Drop for StopProbe {
    fn drop(&mut self) {
        self.control.kill();
    }
}

/// Whether the server has shown that it does not stop: it says no more than that to a new connection while it does.
fn is_answer(error: &postgres::Error, progress: &Progress) -> bool {
    match error.as_db_error() {
        Some(refused) => *refused.code() != SqlState::CANNOT_CONNECT_NOW,
        // What the driver says by itself when it is asked for a password, and not of the connection.
        None => progress.step() == Step::LogIn && lacks_password(error),
    }
}

/// Whether the server has asked for a password, and there was none to give.
pub(crate) fn lacks_password(error: &postgres::Error) -> bool {
    // The driver's words, of which it has no type.
    error.source().is_some_and(|source| source.to_string() == "password missing")
}

/// The hosts of a configuration, paired with their addresses and ports by the driver's rules.
fn routes(config: &Config) -> Result<Vec<Route>, String> {
    let (hosts, addresses, ports) = (config.get_hosts(), config.get_hostaddrs(), config.get_ports());
    let count = hosts.len().max(addresses.len());
    if count == 0 {
        return Err("no host is named: name one, or the folder of the server's Unix socket".into());
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

/// Where the server of a route may be.
fn addresses(
    route: &Route,
    control: &StreamControl,
    by: Instant,
) -> Result<Vec<Option<SocketAddr>>, BoxedError> {
    match route {
        Route::Tcp { address: Some(ip), port, .. } => Ok(vec![Some((*ip, *port).into())]),
        Route::Tcp { domain, port, .. } => {
            let with_port = |ip| Some(SocketAddr::new(ip, *port));
            Ok(resolve(domain, control, by)?.into_iter().map(with_port).collect())
        }
        Route::Unix { .. } => Ok(vec![None]),
    }
}

pub(crate) type BoxedError = Box<dyn Error + Send + Sync>;

/// The error of our hook, if the driver's is that. The driver calls all of them failed TLS handshakes, which would mislead the
/// reader.
fn own(error: postgres::Error) -> BoxedError {
    if !error.source().is_some_and(|source| source.is::<HookError>()) {
        return error.into();
    }
    error.into_source().unwrap_or_else(|| DRIVER_PANICKED.into())
}

/// Whether the server closed the connection without a word.
fn is_end_of_stream(error: &postgres::Error) -> bool {
    use std::io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    let io = error.source().and_then(|source| source.downcast_ref::<std::io::Error>());
    error.is_closed()
        || io.is_some_and(|io| matches!(io.kind(), UnexpectedEof | ConnectionReset | BrokenPipe))
}

/// What is told of an attempt that failed.
fn explain(error: BoxedError, progress: Option<&Progress>, begun: Instant) -> BoxedError {
    if Ended::find(&*error) != Some(Ended::ConnectTimedOut) {
        return error;
    }
    // Only the preparation of a session has errors of another type.
    let prepares = !error.is::<HookError>() && !error.is::<postgres::Error>();
    let step = match progress.map(Progress::step) {
        _ if prepares => "prepared a session",
        Some(Step::LogIn) => "logged in",
        Some(Step::Tls) => "negotiated TLS",
        _ => "opened the connection",
    };
    TimedOut { time: begun.elapsed(), step }.into()
}

/// The time for one address was up.
#[derive(Debug)]
pub(crate) struct TimedOut {
    time: Duration,
    /// What we did at that moment.
    step: &'static str,
}

impl fmt::Display for TimedOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the server did not answer within {:.1?}, while we {}", self.time, self.step)
    }
}

impl Error for TimedOut {}

const DRIVER_PANICKED: &str = "the PostgreSQL driver panicked; it does when it cannot make a runtime: is the limit of open files reached?";

/// This machine is the reason that there is no session.
#[derive(Debug)]
pub(crate) enum Local {
    /// There is no room for the driver's runtime.
    Descriptors(std::io::Error),
    /// The decoy could not be bound or reached.
    Loopback(BoxedError),
}

impl fmt::Display for Local {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Descriptors(_) => {
                "there are not enough file descriptors for a session; raise the limit of open files (ulimit -n), \
                 or close some"
            }
            Self::Loopback(_) => "sessions need the loopback interface (127.0.0.1), whatever host they go to",
        })
    }
}

impl Error for Local {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Descriptors(source) => Some(source),
            Self::Loopback(source) => Some(&**source),
        }
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

    fn add(&mut self, what: String, error: impl Into<BoxedError>) {
        let error = error.into();
        log::debug!("could not connect to {what}: {}", chain(&*error));
        self.failures.push((what, error));
    }

    /// What happened at each address.
    pub(crate) fn failures(&self) -> impl Iterator<Item = &(dyn Error + Send + Sync + 'static)> {
        self.failures.iter().map(|(_, error)| &**error)
    }

    /// One of the [failures](Self::failures), by its number.
    pub(crate) fn into_failure(mut self, number: usize) -> Option<BoxedError> {
        (number < self.failures.len()).then(|| self.failures.swap_remove(number).1)
    }

    /// Whether it was us who ended the last attempt, and why.
    #[cfg(test)]
    pub(crate) fn ended(&self) -> Option<Ended> {
        let last = self.failures().last()?;
        if last.is::<TimedOut>() { Some(Ended::ConnectTimedOut) } else { Ended::find(last) }
    }
}

impl fmt::Display for DialError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (what, error)) in self.failures.iter().enumerate() {
            let separator = if index == 0 { "" } else { "; " };
            write!(f, "{separator}{what}: {}", chain(&**error))?;
        }
        Ok(())
    }
}

impl Error for DialError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.failures().last().map(|error| error as _)
    }
}
