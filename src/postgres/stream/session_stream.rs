//! The stream that the driver reads from and writes to.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use postgres::tls::{ChannelBinding, TlsStream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::control::{Ended, Watch};
use super::socket::Socket;
use super::tls::BoxedStream;

/// A connection to the server that obeys a [`StreamControl`](super::StreamControl), over any transport.
#[derive(Debug)]
pub(crate) struct SessionStream {
    watch: Watch,
    transport: Transport,
    role: Role,
    frames: Frames,
    /// A write has found the connection over, and what the server has said before may not have been read yet.
    is_cut: bool,
    /// How the connection ended, which the driver is not told in the same poll as what came before.
    end: Option<io::Result<()>>,
}

/// Where the messages of the server begin, to know how long one will be before the driver makes room for it: it believes
/// whatever length is announced, up to 2 GiB.
///
/// A message is a byte for its kind, four bytes for its length without that byte, and the rest:
/// <https://www.postgresql.org/docs/current/protocol-overview.html#PROTOCOL-MESSAGE-CONCEPTS>.
#[derive(Debug, Default)]
struct Frames {
    /// The beginning of a message, as far as it has come.
    head: [u8; Self::HEAD],
    known: usize,
    /// How many bytes of the present message are to come.
    left: u64,
}

impl Frames {
    const HEAD: usize = 5;

    /// Takes in what the server has sent; the longest message that it announces.
    fn longest(&mut self, mut bytes: &[u8]) -> u64 {
        let mut longest = 0;
        while !bytes.is_empty() {
            let passed = usize::try_from(self.left).unwrap_or(usize::MAX).min(bytes.len());
            self.left -= passed as u64;
            bytes = &bytes[passed..];
            while self.left == 0 && self.known < Self::HEAD {
                let Some((first, rest)) = bytes.split_first() else { return longest };
                self.head[self.known] = *first;
                self.known += 1;
                bytes = rest;
            }
            if self.known == Self::HEAD {
                let [_, length @ ..] = self.head;
                let length = u64::from(u32::from_be_bytes(length));
                longest = longest.max(length);
                // A length that does not count itself is an error, which the driver finds.
                self.left = length.saturating_sub(4);
                self.known = 0;
            }
        }
        longest
    }
}

/// Whether TLS says what the other end objects to.
pub(crate) fn is_alert(error: &io::Error) -> bool {
    // Of what rustls and OpenSSL say the text is all that they have in common.
    error.to_string().to_lowercase().contains("alert")
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
        Self { watch, transport, role, frames: Frames::default(), is_cut: false, end: None }
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
            // A kill shuts the socket down: what the transport then says of a lost connection is not the reason.
            Poll::Ready(outcome) => Poll::Ready(self.watch.live().and(outcome)),
        }
    }

    /// One poll of a write, which gives `done` also if it has found the connection over.
    ///
    /// A server that ends a session says why and closes; so does one that does not take the client's certificate. A write may find
    /// that out before the next read, and the driver reads no more after a failure. So such a write counts as done: the driver
    /// then reads why, or that there is no more to come.
    fn written<T>(
        &mut self,
        cx: &mut Context<'_>,
        done: T,
        poll: impl FnOnce(Pin<&mut dyn Duplex>, &mut Context<'_>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        use io::ErrorKind::{BrokenPipe, ConnectionReset};
        if self.is_cut {
            return Poll::Ready(self.watch.check(cx).map(|()| done));
        }
        match ready!(self.watched(cx, poll)) {
            Err(error)
                if self.role == Role::Session
                    && matches!(error.kind(), BrokenPipe | ConnectionReset)
                    && Ended::find(&error).is_none() =>
            {
                self.is_cut = true;
                Poll::Ready(Ok(done))
            }
            outcome => Poll::Ready(outcome),
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
        let this = self.get_mut();
        if let Some(end) = this.end.take() {
            return Poll::Ready(this.watch.check(cx).and(end));
        }
        let before = buf.filled().len();
        let outcome = ready!(this.watched(cx, |stream, cx| stream.poll_read(cx, buf)));
        let is_end = match &outcome {
            Ok(()) => buf.filled().len() == before,
            Err(error) => Ended::find(error).is_none(),
        };
        if is_end {
            // The driver forgets why the server ended the session, if that and the end come to it at once: the statement that is
            // under way is given the reason, and nobody asks it any more.
            this.end = Some(outcome);
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        outcome?;
        let new = &buf.filled()[before..];
        this.watch.count(new.len())?;
        if this.frames.longest(new) > this.watch.allowance().saturating_add(new.len() as u64) {
            return Poll::Ready(Err(this.watch.too_much()));
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for SessionStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.get_mut().written(cx, buf.len(), |stream, cx| stream.poll_write(cx, buf))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().written(cx, (), |stream, cx| stream.poll_flush(cx))
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

    use super::super::control::StreamControl;
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

    #[test]
    fn the_length_of_a_message_is_known_however_it_comes_in_pieces() {
        let mut wire = Vec::new();
        for length in [4_u32, 5, 300, 70_000, 4] {
            wire.push(b'D');
            wire.extend(length.to_be_bytes());
            wire.extend(vec![0xff; length as usize - 4]);
        }
        for piece in [1, 2, 3, 5, 7, 64, 4096, wire.len()] {
            let mut frames = Frames::default();
            let longest = wire.chunks(piece).map(|bytes| frames.longest(bytes)).max();
            assert_eq!(longest, Some(70_000), "in pieces of {piece}");
            assert_eq!((frames.left, frames.known), (0, 0), "in pieces of {piece}");
        }
    }

    #[test]
    fn a_server_that_sends_or_announces_too_much_is_cut_off() {
        let huge = [b"D".as_slice(), &0x7fff_fff0_u32.to_be_bytes()].concat();
        for (pieces, what) in [(vec![FROM_SERVER; 3], "sent"), (vec![huge.as_slice()], "announced")] {
            let (mut stream, control) = stream(&pieces);
            control.allow(2 * FROM_SERVER.len() as u64);
            let last = (0..pieces.len()).map(|_| read(&mut stream, 64).unwrap()).last().unwrap();
            assert_eq!(Ended::find(&last.unwrap_err()), Some(Ended::TooMuch), "{what}");
            control.allow(1000);
            assert!(read(&mut stream, 64).unwrap().is_err(), "{what}: it stays ended");
        }
    }

    /// A server that has gone, after it has said why.
    struct Gone {
        said: Option<io::Result<&'static [u8]>>,
    }

    impl AsyncRead for Gone {
        fn poll_read(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            buf: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            Poll::Ready(self.said.take().unwrap_or(Ok(&[])).map(|said| buf.put_slice(said)))
        }
    }

    impl AsyncWrite for Gone {
        fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, _: &[u8]) -> Poll<io::Result<usize>> {
            Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()))
        }
        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()))
        }
        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    impl TlsStream for Gone {
        fn channel_binding(&self) -> ChannelBinding {
            ChannelBinding::none()
        }
    }

    #[test]
    fn what_the_server_has_said_is_read_though_a_write_found_it_gone_first() {
        let alert = || Err(io::Error::other("received fatal alert: UnknownCA"));
        let mut cx = Context::from_waker(Waker::noop());
        for said in [Ok(FROM_SERVER), alert()] {
            let told = said.as_ref().map(|said| said.to_vec()).map_err(ToString::to_string);
            let (mut stream, control) = gone(said, Role::Session);
            let mut writes = || {
                let mut pinned = Pin::new(&mut stream);
                let outcomes = [
                    pinned.as_mut().poll_write(&mut cx, b"x").map_ok(|_| ()),
                    pinned.as_mut().poll_flush(&mut cx),
                ];
                outcomes.map(|outcome| matches!(outcome, Poll::Ready(Ok(()))))
            };
            assert_eq!(writes(), [true; 2]);
            assert_eq!(writes(), [true; 2], "nothing has been read yet");
            let mut next = || read(&mut stream, 64).map(|outcome| outcome.map_err(|error| error.to_string()));
            let (first, second) = (next(), next());
            // How it ended is told in a poll of its own.
            let is_end = told.is_err();
            assert_eq!((first.is_none(), second.is_none()), (is_end, !is_end));
            assert_eq!(first.or(second), Some(told));
            let end = [next(), next()].into_iter().flatten().next();
            assert_eq!(end, Some(Ok(Vec::new())), "that was all");
            control.kill();
            let mut after = Context::from_waker(Waker::noop());
            let outcome = Pin::new(&mut stream).poll_write(&mut after, b"x");
            assert!(matches!(outcome, Poll::Ready(Err(_))), "a kill ends it all the same");
        }
    }

    /// It has not hit what it was meant for, and there is no answer to a cancel request.
    #[test]
    fn a_cancel_request_that_could_not_be_written_has_failed() {
        let (mut stream, _) = gone(Ok(&[]), Role::Cancel);
        let outcome = Pin::new(&mut stream).poll_write(&mut Context::from_waker(Waker::noop()), b"x");
        assert!(matches!(outcome, Poll::Ready(Err(_))), "{outcome:?}");
    }

    fn gone(said: io::Result<&'static [u8]>, role: Role) -> (SessionStream, StreamControl) {
        let control = StreamControl::new();
        control.establish();
        let watch = Watch::new(control.clone(), Instant::now());
        let transport = Transport::Tls(Box::new(Gone { said: Some(said) }));
        (SessionStream::new(watch, transport, role), control)
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

    /// A transport whose socket a kill shuts down while it is polled: it has no bytes to read any more, and takes none.
    struct KilledMeanwhile(StreamControl);

    impl AsyncRead for KilledMeanwhile {
        fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, _: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
            self.0.kill();
            Poll::Ready(Ok(()))
        }
    }

    impl AsyncWrite for KilledMeanwhile {
        fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, _: &[u8]) -> Poll<io::Result<usize>> {
            self.0.kill();
            Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()))
        }
        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            self.0.kill();
            Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()))
        }
        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            self.0.kill();
            Poll::Ready(Err(io::ErrorKind::NotConnected.into()))
        }
    }

    impl TlsStream for KilledMeanwhile {
        fn channel_binding(&self) -> ChannelBinding {
            ChannelBinding::none()
        }
    }

    #[test]
    fn a_kill_in_the_midst_of_a_poll_is_told_as_one() {
        type Do = fn(Pin<&mut SessionStream>, &mut Context<'_>) -> Poll<io::Result<()>>;
        let polls: [(&str, Do); 4] = [
            ("read", |stream, cx| stream.poll_read(cx, &mut ReadBuf::new(&mut [0; 8]))),
            ("write", |stream, cx| stream.poll_write(cx, b"x").map_ok(drop)),
            ("flush", AsyncWrite::poll_flush),
            ("shutdown", AsyncWrite::poll_shutdown),
        ];
        for (name, poll) in polls {
            let control = StreamControl::new();
            control.establish();
            let transport = Transport::Tls(Box::new(KilledMeanwhile(control.clone())));
            let watch = Watch::new(control, Instant::now());
            let mut stream = SessionStream::new(watch, transport, Role::Session);
            let outcome = poll(Pin::new(&mut stream), &mut Context::from_waker(Waker::noop()));
            let Poll::Ready(Err(error)) = outcome else { panic!("{name}: {outcome:?}") };
            assert_eq!(Ended::find(&error), Some(Ended::Killed), "{name}: {error}");
        }
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
