//! What the driver takes for its TLS connector: makes a [`SessionStream`] of the socket that it is handed.

use std::error::Error;
use std::fmt;
use std::future::{Future, poll_fn};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
use std::time::Instant;

use postgres::Config;
use postgres::config::{SslMode, SslNegotiation};
use postgres::tls::{MakeTlsConnect, TlsConnect};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::control::{StreamControl, Watch};
use super::descriptors::{self, Turn};
use super::session_stream::{Role, SessionStream, Transport};
use super::socket::{Socket, SocketError};
use super::tls::Tls;

/// What all the connections of a dialer have in common.
#[derive(Debug)]
pub(super) struct Plan {
    /// For the options of sockets.
    pub(super) config: Config,
    pub(super) ssl_mode: SslMode,
    pub(super) ssl_negotiation: SslNegotiation,
    pub(super) tls: Option<Tls>,
    pub(super) routes: Vec<Route>,
    pub(super) decoy: Decoy,
    /// With which of the routes the next attempt begins, and with which of its addresses.
    pub(super) begin: parking_lot::Mutex<(usize, Option<SocketAddr>)>,
}

/// One host of the user's configuration.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Route {
    /// `domain` is the name that the server's certificate must bear; `address` is where it is, if that was given.
    Tcp { domain: String, address: Option<IpAddr>, port: u16 },
    /// The socket itself, not its directory.
    Unix { path: PathBuf },
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Route::Tcp { domain, port, .. } => write!(f, "{domain}:{port}"),
            Route::Unix { path } => write!(f, "{}", path.display()),
        }
    }
}

impl Route {
    /// The route, and which of its addresses.
    pub(super) fn at(&self, address: Option<SocketAddr>) -> String {
        match (self, address) {
            (Self::Tcp { domain, .. }, Some(address)) if domain.parse::<IpAddr>().is_err() => {
                format!("{self} ({})", address.ip())
            }
            _ => self.to_string(),
        }
    }
}

/// The host name that the driver is given for the route `index`, and gives to the hook.
///
/// Never a real name: a cancel token keeps it, and so a cancel request finds the way of its session again without
/// being told. The real name is in the [`Route`]. The address that goes with it is the [`Decoy`]'s.
pub(super) fn key(index: usize) -> String {
    format!("route-{index}")
}

impl Plan {
    fn route(&self, key: &str) -> Option<&Route> {
        let index: usize = key.strip_prefix("route-")?.parse().ok()?;
        self.routes.get(index)
    }

    /// Whether TLS begins without asking the server for it.
    pub(super) fn is_direct(&self) -> bool {
        self.ssl_mode != SslMode::Disable && self.ssl_negotiation == SslNegotiation::Direct
    }

    /// Makes a stream over `socket`; what the driver does itself in its `connect_tls`.
    async fn secure(&self, route: &Route, mut socket: Socket) -> Result<Transport, HookError> {
        let Route::Tcp { domain, .. } = route else { return Ok(Transport::Plain(socket)) };
        let required = match self.ssl_mode {
            SslMode::Disable => return Ok(Transport::Plain(socket)),
            SslMode::Prefer => false,
            // The enum may grow; a mode that is not known must not lead to plain text.
            _ => true,
        };
        let tls = match &self.tls {
            Some(tls) => tls,
            None if required => return Err(HookError::NoTlsConnector),
            None => return Ok(Transport::Plain(socket)),
        };
        match self.ssl_negotiation {
            SslNegotiation::Direct if !required => return Err(HookError::WeakDirect),
            SslNegotiation::Direct => {}
            _ => {
                if !ask_for_tls(&mut socket).await.map_err(HookError::Io)? {
                    return if required { Err(HookError::Refused) } else { Ok(Transport::Plain(socket)) };
                }
            }
        }
        let direct = self.is_direct();
        tls.handshake(domain, socket)
            .await
            .map(Transport::Tls)
            .map_err(|source| HookError::Tls { direct, source })
    }
}

/// The `SSLRequest` exchange: whether the server is ready for a TLS handshake.
///
/// Reads one byte and no more: what came with it unencrypted must not be taken for a part of the encrypted stream. And nothing of an
/// answer that is neither yes nor no: an error, which the driver reads and tells where TLS is not demanded.
async fn ask_for_tls(socket: &mut Socket) -> io::Result<bool> {
    const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f];
    socket.write_all(&SSL_REQUEST).await?;
    socket.flush().await?;
    match socket.peek_u8().await? {
        b'S' | b'N' => Ok(socket.read_u8().await? == b'S'),
        _ => Ok(false),
    }
}

/// The loopback listener to which the driver is led for each session.
///
/// The driver opens a socket, and gives it to the connector in a shape that cannot be watched by another thread, nor be
/// connected under a watch. So it is led here; the connector drops what it is given and opens the real socket in its
/// place. The listener never speaks. It is bound on first use and kept, since cancel tokens remember its port.
#[derive(Debug, Default)]
pub(super) struct Decoy {
    listener: Mutex<Option<TcpListener>>,
}

impl Decoy {
    /// Where it listens. The connections that lie in its queue are thrown out first, so that there is room.
    pub(super) fn address(&self) -> io::Result<SocketAddr> {
        self.listening(|listener| {
            throw_out(listener);
            listener.local_addr()
        })
    }

    /// See [`descriptors::reserve`].
    pub(super) fn reserve(&self, by: Instant) -> io::Result<Turn> {
        // Not under the mutex, since another thread may have the turn.
        let listener = self.listening(TcpListener::try_clone)?;
        descriptors::reserve(listener, by)
    }

    fn listening<T>(&self, look: impl FnOnce(&TcpListener) -> io::Result<T>) -> io::Result<T> {
        let mut listener = self.listener.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(listener) = &*listener {
            return look(listener);
        }
        let fresh = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .or_else(|error| TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).map_err(|_| error))?;
        fresh.set_nonblocking(true)?;
        look(listener.insert(fresh))
    }

    fn drain(&self) {
        if let Some(listener) = &*self.listener.lock().unwrap_or_else(PoisonError::into_inner) {
            throw_out(listener);
        }
    }
}

fn throw_out(listener: &TcpListener) {
    while listener.accept().is_ok() {}
}

/// The driver's TLS connector for one attempt to connect, or for one cancel request.
#[derive(Clone, Debug)]
pub(crate) struct Connector {
    plan: Arc<Plan>,
    /// Where the server is, unless a Unix socket leads to it.
    address: Option<SocketAddr>,
    control: StreamControl,
    role: Role,
    setup: Instant,
    progress: Arc<Progress>,
}

/// How far an attempt has come.
#[derive(Debug)]
pub(super) struct Progress {
    step: AtomicU8,
    /// Until the driver has made its runtime.
    turn: parking_lot::Mutex<Option<Turn>>,
}

/// The steps of an attempt, in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub(super) enum Step {
    /// The driver connects to the decoy.
    Loopback,
    /// The socket is being opened.
    Connect,
    /// The server is asked for TLS, or shakes hands.
    Tls,
    /// The driver speaks to the server.
    LogIn,
}

impl Step {
    const ALL: [Self; 4] = [Self::Loopback, Self::Connect, Self::Tls, Self::LogIn];
}

impl Progress {
    pub(super) fn step(&self) -> Step {
        Step::ALL[usize::from(self.step.load(Ordering::SeqCst)).min(Step::ALL.len() - 1)]
    }

    fn come_to(&self, step: Step) {
        self.step.store(step as u8, Ordering::SeqCst);
    }
}

impl Connector {
    /// A connector whose stream obeys `control` and must be a session by `setup`.
    pub(super) fn new(
        plan: Arc<Plan>,
        address: Option<SocketAddr>,
        control: StreamControl,
        role: Role,
        setup: Instant,
        turn: Turn,
    ) -> Self {
        let progress = Progress { step: AtomicU8::new(Step::Loopback as u8), turn: Some(turn).into() };
        Self { plan, address, control, role, setup, progress: Arc::new(progress) }
    }

    /// Opens the socket and makes the stream.
    async fn open(&self, route: &Route) -> Result<Transport, HookError> {
        let socket = match (route, self.address) {
            (Route::Unix { path }, _) => Socket::unix(path).await,
            (Route::Tcp { .. }, Some(address)) => Socket::tcp(address, &self.plan.config).await,
            (Route::Tcp { .. }, None) => return Err(HookError::UnknownRoute),
        };
        let socket = socket.map_err(|error| match error {
            SocketError::Connect(source) => HookError::Connect { route: route.clone(), source },
            SocketError::Option { setting, source } => HookError::Option { setting, source },
        })?;
        self.progress.come_to(Step::Tls);
        if self.role == Role::Session {
            self.control.attach(socket.clone());
        }
        let transport = self.plan.secure(route, socket).await?;
        self.progress.come_to(Step::LogIn);
        Ok(transport)
    }

    pub(super) fn progress(&self) -> Arc<Progress> {
        Arc::clone(&self.progress)
    }
}

impl MakeTlsConnect<postgres::Socket> for Connector {
    type Stream = SessionStream;
    type TlsConnect = Hook;
    type Error = HookError;

    fn make_tls_connect(&mut self, key: &str) -> Result<Hook, HookError> {
        match self.plan.route(key) {
            Some(route) => Ok(Hook { route: route.clone(), connector: self.clone() }),
            None => Err(HookError::UnknownRoute),
        }
    }
}

/// A [`Connector`] that knows its host.
#[derive(Debug)]
pub(crate) struct Hook {
    route: Route,
    connector: Connector,
}

impl TlsConnect<postgres::Socket> for Hook {
    type Stream = SessionStream;
    type Error = HookError;
    type Future = Pin<Box<dyn Future<Output = Result<SessionStream, HookError>> + Send>>;

    fn connect(self, decoy: postgres::Socket) -> Self::Future {
        let Hook { route, connector } = self;
        connector.progress.come_to(Step::Connect);
        drop(decoy);
        // The driver has its runtime by now.
        drop(connector.progress.turn.lock().take());
        connector.plan.decoy.drain();
        Box::pin(async move {
            let mut watch = Watch::new(connector.control.clone(), connector.setup);
            let transport = {
                let mut open = pin!(connector.open(&route));
                poll_fn(|cx| {
                    watch.check(cx).map_err(HookError::Ended)?;
                    match open.as_mut().poll(cx) {
                        Poll::Pending => watch.wait(cx).map(|ended| Err(HookError::Ended(ended))),
                        ready => ready,
                    }
                })
                .await?
            };
            Ok(SessionStream::new(watch, transport, connector.role))
        })
    }
}

/// Why the connector could not make a stream. The driver reports it as the cause of a failed TLS handshake, of which
/// nobody is told.
#[derive(Debug)]
pub(crate) enum HookError {
    /// TLS is demanded and there is nothing to do it with.
    NoTlsConnector,
    /// TLS is demanded and the server will not.
    Refused,
    /// Direct negotiation cannot fall back, so it goes with `require` only.
    WeakDirect,
    /// The cancel token is of another dialer, or of a session that is over.
    UnknownRoute,
    /// The server's socket could not be opened.
    Connect { route: Route, source: io::Error },
    /// The system does not take a value for the option of a socket.
    Option { setting: &'static str, source: io::Error },
    /// The connection broke while TLS was asked for.
    Io(io::Error),
    /// The user's TLS connector failed; `direct` if it began without a question to the server.
    Tls { direct: bool, source: Box<dyn Error + Send + Sync> },
    /// Killed, or out of time; see [`Ended`](super::Ended).
    Ended(io::Error),
}

impl fmt::Display for HookError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            HookError::NoTlsConnector => f.write_str(
                "sslmode=require, but no TLS connector was given: give one, or set sslmode=prefer or disable",
            ),
            HookError::Refused => f.write_str("server does not support TLS, which sslmode demands"),
            HookError::WeakDirect => f.write_str(
                "weak sslmode \"prefer\" may not be used with sslnegotiation=direct (use \"require\")",
            ),
            HookError::UnknownRoute => {
                f.write_str("the session is over, or was opened with another configuration")
            }
            HookError::Connect { route: Route::Unix { path }, .. } => {
                write!(f, "could not open the Unix socket {}", path.display())
            }
            HookError::Connect { .. } => f.write_str("could not connect"),
            HookError::Option { setting, .. } => {
                write!(f, "the operating system does not take the value of {setting}")
            }
            HookError::Io(_) => f.write_str("the connection broke while TLS was negotiated"),
            HookError::Tls { .. } => f.write_str("TLS handshake failed"),
            HookError::Ended(_) => f.write_str("the connect was ended"),
        }
    }
}

impl Error for HookError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            HookError::Connect { source, .. }
            | HookError::Option { source, .. }
            | HookError::Io(source)
            | HookError::Ended(source) => Some(source),
            HookError::Tls { source, .. } => Some(&**source),
            _ => None,
        }
    }
}
