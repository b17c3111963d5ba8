//! The socket of a session: read and written by the driver, watched and shut down by other threads.

use std::fmt;
use std::io::{self, IoSlice, Read};
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use postgres::Config;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::{TcpStream, UnixStream};

/// A connected socket, of TCP or of the Unix domain: what a TLS connector is handed.
///
/// The connectors for the `postgres` crate that work with any stream work with this one: those of `postgres-native-tls`,
/// `postgres-openssl` and `tokio-postgres-rustls`.
#[derive(Clone)]
pub struct Socket {
    inner: Arc<Inner>,
}

/// Shared, and not duplicated, so that a session takes one descriptor for its socket.
enum Inner {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// Why there is no socket.
pub(super) enum SocketError {
    /// It could not be connected.
    Connect(io::Error),
    /// The system does not take the value of a setting.
    Option { setting: &'static str, source: io::Error },
}

impl From<io::Error> for SocketError {
    fn from(error: io::Error) -> Self {
        Self::Connect(error)
    }
}

/// Calls one and the same method of either stream.
macro_rules! either {
    ($socket:expr, $stream:ident => $call:expr) => {
        match &*$socket.inner {
            Inner::Tcp($stream) => $call,
            Inner::Unix($stream) => $call,
        }
    };
}

impl Socket {
    /// True if `other` is the same socket, and not another one.
    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }

    /// Connects over TCP, with the options of `config` that are the socket's.
    pub(super) async fn tcp(address: SocketAddr, config: &Config) -> Result<Self, SocketError> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let socket = SockRef::from(&stream);
        let option = |setting| move |source| SocketError::Option { setting, source };
        #[cfg(target_os = "linux")]
        if let Some(&timeout) = config.get_tcp_user_timeout() {
            socket.set_tcp_user_timeout(Some(timeout)).map_err(option("tcp_user_timeout"))?;
        }
        if config.get_keepalives() {
            let idle = TcpKeepalive::new().with_time(config.get_keepalives_idle());
            socket.set_tcp_keepalive(&idle).map_err(option("keepalives_idle"))?;
            // One by one, so that the one which is refused can be named.
            if let Some(interval) = config.get_keepalives_interval() {
                let interval = TcpKeepalive::new().with_interval(interval);
                socket.set_tcp_keepalive(&interval).map_err(option("keepalives_interval"))?;
            }
            if let Some(retries) = config.get_keepalives_retries() {
                let retries = TcpKeepalive::new().with_retries(retries);
                socket.set_tcp_keepalive(&retries).map_err(option("keepalives_retries"))?;
            }
        }
        Ok(Self { inner: Arc::new(Inner::Tcp(stream)) })
    }

    /// Connects to the Unix socket at `path`.
    pub(super) async fn unix(path: &Path) -> Result<Self, SocketError> {
        let stream = UnixStream::connect(path).await?;
        Ok(Self { inner: Arc::new(Inner::Unix(stream)) })
    }

    /// The next byte, which stays to be read.
    pub(super) async fn peek_u8(&self) -> io::Result<u8> {
        let mut byte = [0];
        let length = match &*self.inner {
            Inner::Tcp(stream) => stream.peek(&mut byte).await?,
            Inner::Unix(_) => return Err(io::ErrorKind::Unsupported.into()),
        };
        if length == 0 { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(byte[0]) }
    }

    /// The address at the other end, if it is TCP and still connected.
    pub(super) fn peer(&self) -> Option<SocketAddr> {
        match &*self.inner {
            Inner::Tcp(stream) => stream.peer_addr().ok(),
            Inner::Unix(_) => None,
        }
    }

    /// Whether the server's process `backend` is at the other end, and no pooler. By its word its client has the port
    /// `client_port`, or none if it is a Unix socket. `false` also where that cannot be known.
    pub(crate) fn leads_to(&self, backend: i32, client_port: Option<u16>) -> bool {
        match &*self.inner {
            Inner::Tcp(stream) => {
                stream.local_addr().is_ok_and(|address| Some(address.port()) == client_port)
            }
            // A pooler may have Unix sockets at both sides. The one that listens here must have started the backend.
            Inner::Unix(stream) => {
                let listener = stream.peer_cred().ok().and_then(|peer| peer.pid());
                client_port.is_none() && listener.is_some() && listener == parent_of(backend)
            }
        }
    }

    /// Waits until the other end has closed the connection; `false` if it has not `by` then. What it has sent is thrown
    /// away, so nobody must use the connection any more.
    pub(super) fn wait_closed(&self, by: Instant) -> bool {
        let mut space = [0; 1024];
        loop {
            let read = either!(self, stream => (&*SockRef::from(stream)).read(&mut space));
            match read {
                Ok(0) => return true,
                Ok(_) if Instant::now() >= by => return false,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let left = by.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return false;
                    }
                    let left = Timespec::try_from(left).ok();
                    // A signal may end it early, and then it is waited for again.
                    let _ = poll(&mut [PollFd::new(self, PollFlags::IN)], left.as_ref());
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // A reset, by an end that was closed before it had read all.
                Err(error) => return error.kind() == io::ErrorKind::ConnectionReset,
            }
        }
    }

    /// True if there is something to read, or the connection is over. Does not block.
    pub(crate) fn is_readable(&self) -> bool {
        let mut fds = [PollFd::new(self, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
    }

    /// Ends the connection for whoever has the socket, and for the server. A thread that waits for something to read is
    /// woken.
    pub(crate) fn shut_down(&self) {
        // It fails when the connection has ended before.
        let _ = either!(self, stream => SockRef::from(stream).shutdown(std::net::Shutdown::Both));
    }
}

/// The process that has started another one, where `/proc` tells: on Linux, and not of one in another container.
fn parent_of(process: i32) -> Option<i32> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // The name before that, in brackets, may have anything in it.
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        either!(self, stream => stream.as_fd())
    }
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            ready!(either!(self, stream => stream.poll_read_ready(cx)))?;
            let room = buf.remaining();
            match either!(self, stream => stream.try_read(buf.initialize_unfilled())) {
                Ok(length) => {
                    buf.advance(length);
                    if 0 < length && length < room {
                        self.drained();
                    }
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl Socket {
    /// Tells tokio that there is nothing left to read: a read that did not fill its buffer has emptied the socket.
    /// Without this every answer would cost one more read, which finds nothing.
    fn drained(&self) {
        let nothing = || io::Result::<()>::Err(io::ErrorKind::WouldBlock.into());
        let _ = either!(self, stream => stream.try_io(Interest::READABLE, nothing));
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            ready!(either!(self, stream => stream.poll_write_ready(cx)))?;
            match either!(self, stream => stream.try_write(buf)) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                outcome => return Poll::Ready(outcome),
            }
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        loop {
            ready!(either!(self, stream => stream.poll_write_ready(cx)))?;
            match either!(self, stream => stream.try_write_vectored(bufs)) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                outcome => return Poll::Ready(outcome),
            }
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(either!(self, stream => SockRef::from(stream).shutdown(std::net::Shutdown::Write)))
    }
}

impl fmt::Debug for Socket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        either!(self, stream => stream.fmt(f))
    }
}
