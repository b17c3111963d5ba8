//! The stream that the driver reads from and writes to.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use postgres::tls::{ChannelBinding, TlsStream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::control::Watch;
use super::socket::Socket;
use super::tls::BoxedStream;

/// A connection to the server that obeys a [`StreamControl`](super::StreamControl), over any transport.
#[derive(Debug)]
pub(crate) struct SessionStream {
    watch: Watch,
    transport: Transport,
    role: Role,
}

/// What a connection is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// To hold a session.
    Session,
    /// To send one cancel request.
    ///
    /// The driver is done when it has shut the stream down; here that waits for the server to close it, which the
    /// server does after it has sent the signal to the backend. Without that a cancel can hit a later statement.
    Cancel,
}

/// The ways to reach a server.
pub(super) enum Transport {
    /// TCP without TLS, or a Unix socket.
    Plain(Socket),
    /// TLS over TCP.
    Tls(BoxedStream),
}

impl fmt::Debug for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Transport::Plain(_) => "Plain",
            Transport::Tls(_) => "Tls",
        })
    }
}

/// What a transport must be able to do; spares a match in each method.
trait Duplex: AsyncRead + AsyncWrite + Unpin {}
impl<T: AsyncRead + AsyncWrite + Unpin> Duplex for T {}

impl Transport {
    fn pin(&mut self) -> Pin<&mut dyn Duplex> {
        match self {
            Transport::Plain(stream) => Pin::new(stream),
            Transport::Tls(stream) => Pin::new(stream),
        }
    }
}

impl SessionStream {
    pub(super) fn new(watch: Watch, transport: Transport, role: Role) -> Self {
        Self { watch, transport, role }
    }

    /// One poll of the transport under the watch.
    fn watched<T>(
        &mut self,
        cx: &mut Context<'_>,
        poll: impl FnOnce(Pin<&mut dyn Duplex>, &mut Context<'_>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        self.watch.check(cx)?;
        match poll(self.transport.pin(), cx) {
            Poll::Pending => self.watch.wait(cx).map(Err),
            ready => ready,
        }
    }

    /// Reads until the server has closed the connection.
    fn poll_closed(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut space = [0; 64];
            let mut buf = ReadBuf::new(&mut space);
            match ready!(self.watched(cx, |stream, cx| stream.poll_read(cx, &mut buf))) {
                Ok(()) if buf.filled().is_empty() => return Poll::Ready(Ok(())),
                Ok(()) => {}
                // TLS says so of a server that closes the socket without a goodbye.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Poll::Ready(Ok(())),
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl AsyncRead for SessionStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.get_mut().watched(cx, |stream, cx| stream.poll_read(cx, buf))
    }
}

impl AsyncWrite for SessionStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.get_mut().watched(cx, |stream, cx| stream.poll_write(cx, buf))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().watched(cx, |stream, cx| stream.poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        match this.role {
            Role::Session => this.watched(cx, |stream, cx| stream.poll_shutdown(cx)),
            Role::Cancel => this.poll_closed(cx),
        }
    }
}

impl TlsStream for SessionStream {
    fn channel_binding(&self) -> ChannelBinding {
        match &self.transport {
            Transport::Plain(_) => ChannelBinding::none(),
            Transport::Tls(stream) => stream.channel_binding(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::task::Waker;
    use std::time::{Duration, Instant};

    use super::super::control::{Ended, StreamControl};
    use super::*;

    /// A server that sends its pieces one a read, and never takes a byte.
    struct Script(VecDeque<Vec<u8>>);

    impl AsyncRead for Script {
        fn poll_read(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            buf: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            let Some(mut piece) = self.0.pop_front() else { return Poll::Pending };
            let rest = piece.split_off(piece.len().min(buf.remaining()));
            buf.put_slice(&piece);
            if !rest.is_empty() {
                self.0.push_front(rest);
            }
            Poll::Ready(Ok(()))
        }
    }

    impl AsyncWrite for Script {
        fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, _: &[u8]) -> Poll<io::Result<usize>> {
            Poll::Pending
        }
        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Pending
        }
        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Pending
        }
    }

    impl TlsStream for Script {
        fn channel_binding(&self) -> ChannelBinding {
            ChannelBinding::none()
        }
    }

    fn stream(pieces: &[&[u8]]) -> (SessionStream, StreamControl) {
        let control = StreamControl::new();
        control.establish();
        let watch = Watch::new(control.clone(), Instant::now());
        let script =
            Script(pieces.iter().filter(|piece| !piece.is_empty()).map(|piece| piece.to_vec()).collect());
        (SessionStream::new(watch, Transport::Tls(Box::new(script)), Role::Session), control)
    }

    /// One read into `capacity` bytes: what came, or nothing if it would wait.
    fn read(stream: &mut SessionStream, capacity: usize) -> Option<io::Result<Vec<u8>>> {
        let mut space = vec![0; capacity];
        let mut buf = ReadBuf::new(&mut space);
        let mut cx = Context::from_waker(Waker::noop());
        match Pin::new(stream).poll_read(&mut cx, &mut buf) {
            Poll::Pending => None,
            Poll::Ready(outcome) => Some(outcome.map(|()| buf.filled().to_vec())),
        }
    }

    const FROM_SERVER: &[u8] = b"1\0\0\0\x04Z\0\0\0\x05I";

    #[test]
    fn after_a_kill_every_poll_fails() {
        let (mut stream, control) = stream(&[FROM_SERVER]);
        control.kill();
        let mut cx = Context::from_waker(Waker::noop());
        let error = read(&mut stream, 64).unwrap().unwrap_err();
        assert_eq!(Ended::find(&error), Some(Ended::Killed));
        let mut stream = Pin::new(&mut stream);
        assert!(matches!(stream.as_mut().poll_write(&mut cx, b"x"), Poll::Ready(Err(_))));
        assert!(matches!(stream.as_mut().poll_flush(&mut cx), Poll::Ready(Err(_))));
        assert!(matches!(stream.as_mut().poll_shutdown(&mut cx), Poll::Ready(Err(_))));
        assert!(control.is_dead());
    }

    #[test]
    fn a_deadline_that_a_poll_finds_passed_is_final_and_one_that_was_cleared_is_nothing() {
        let (mut stream, control) = stream(&[FROM_SERVER]);
        let past = Instant::now() - Duration::from_millis(1);
        control.set_deadline(Some(past));
        control.set_deadline(None);
        assert!(read(&mut stream, 5).unwrap().is_ok());
        control.set_deadline(Some(past));
        let error = read(&mut stream, 5).unwrap().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert_eq!(Ended::find(&error), Some(Ended::DeadlinePassed));
        control.set_deadline(None);
        control.kill();
        assert!(read(&mut stream, 5).unwrap().is_err());
        assert_eq!(control.ended(), Some(Ended::DeadlinePassed), "the first reason stays");
    }
}
