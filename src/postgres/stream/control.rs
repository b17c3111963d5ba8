//! What other threads hold of a session's stream, and the watch that the stream keeps on it.

use std::error::Error;
use std::fmt;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize};
use std::sync::{Arc, OnceLock, Weak};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures_util::task::AtomicWaker;
use parking_lot::Mutex;
use postgres::error::SqlState;
use tokio::time::{Sleep, sleep_until};

use super::socket::Socket;
use crate::pg::watchdog::{Watchdog, Watched};

/// Why a stream was ended from our side.
///
/// It is the inner error of the `io::Error` that the driver then reports; [`Ended::find`] gets it out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// [`StreamControl::kill`] was called.
    Killed,
    /// The deadline of [`StreamControl::set_deadline`] passed during a call.
    DeadlinePassed,
    /// The session was not ready within the time for one attempt to connect; says nothing of the next attempt.
    ConnectTimedOut,
    /// The server sent more than was [allowed](StreamControl::allow) in answer to one call.
    TooMuch,
}

impl Ended {
    /// Looks for it in an error and all its causes, since the driver wraps it in errors of its own.
    pub(crate) fn find(error: &(dyn Error + 'static)) -> Option<Self> {
        let mut next = Some(error);
        while let Some(error) = next {
            if let Some(&ended) = error.downcast_ref() {
                return Some(ended);
            }
            // `io::Error` leaves out its inner error from the chain and shows only what is behind that one.
            let inner = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
            if let Some(&ended) = inner.and_then(|inner| inner.downcast_ref()) {
                return Some(ended);
            }
            next = match inner {
                Some(inner) => Some(inner),
                None => error.source(),
            };
        }
        None
    }

    pub(super) fn into_io(self) -> io::Error {
        let kind = match self {
            Ended::Killed => io::ErrorKind::ConnectionAborted,
            Ended::DeadlinePassed | Ended::ConnectTimedOut => io::ErrorKind::TimedOut,
            Ended::TooMuch => io::ErrorKind::InvalidData,
        };
        io::Error::new(kind, self)
    }
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Ended::Killed => "the session was killed by this process",
            Ended::DeadlinePassed => "the session was ended because the deadline of a call passed",
            Ended::ConnectTimedOut => "the server did not answer within the time for a connect",
            Ended::TooMuch => {
                "the server sent far more than an answer has; is it PostgreSQL that listens there, and does a trigger \
                 or a proxy send notices?"
            }
        })
    }
}

impl Error for Ended {}

/// The handle by which any thread kills, bounds or watches the session of another; one for each session.
///
/// It may be made and used before the session exists.
#[derive(Clone)]
pub(crate) struct StreamControl {
    shared: Arc<Shared>,
}

struct Shared {
    /// Times are kept as nanoseconds since then, so that they fit an atomic.
    base: Instant,
    /// `LIVE`, or why the stream was ended; once it is not `LIVE` it stays.
    end: AtomicU8,
    /// The deadline, or `NEVER`.
    deadline: AtomicU64,
    /// When the task that waits will look again by itself, or `NEVER`. Spares `set_deadline` a system call.
    looks_again: AtomicU64,
    /// Looks when the deadline passes, so that no timer is needed for it.
    watchdog: OnceLock<Arc<Watchdog>>,
    /// How many bytes the server may still send in answer to the call that is under way.
    allowance: AtomicU64,
    /// The session is ready, so the time for connecting is over.
    established: AtomicBool,
    /// The driver's task. One is enough, since one task does all the reading and writing.
    waker: AtomicWaker,
    /// The socket, from when it is connected until the session is over.
    socket: Mutex<Option<Socket>>,
    /// What a kill ends as well.
    companion: Mutex<Option<StreamControl>>,
    /// By which of the dialer's routes it was opened.
    route: AtomicUsize,
    /// The code of the last notice that the server has sent.
    notice: Mutex<Option<SqlState>>,
}

const LIVE: u8 = 0;
const KILLED: u8 = 1;
const DEADLINE_PASSED: u8 = 2;
const TOO_MUCH: u8 = 3;

const NEVER: u64 = u64::MAX;

/// What a server may send in answer to a short statement, or while a session is opened: 1 MiB. An answer has some hundred
/// bytes; the longest messages are errors and notices. It bounds the memory that a peer can make this process use.
pub(crate) const SHORT_ANSWER: u64 = 1 << 20;

impl StreamControl {
    /// A control for a session that is still to be opened.
    pub(crate) fn new() -> Self {
        Self {
            shared: Arc::new(Shared {
                base: Instant::now(),
                end: AtomicU8::new(LIVE),
                deadline: AtomicU64::new(NEVER),
                looks_again: AtomicU64::new(NEVER),
                watchdog: OnceLock::new(),
                allowance: AtomicU64::new(SHORT_ANSWER),
                established: AtomicBool::new(false),
                waker: AtomicWaker::new(),
                socket: Mutex::new(None),
                companion: Mutex::new(None),
                route: AtomicUsize::new(0),
                notice: Mutex::new(None),
            }),
        }
    }

    /// Ends the stream: whatever the driver does with it, now or later, fails at once with [`Ended::Killed`].
    ///
    /// The server hears of it too, and a thread that watches the socket.
    pub(crate) fn kill(&self) {
        let _ = self.shared.end.compare_exchange(LIVE, KILLED, SeqCst, SeqCst);
        self.shared.waker.wake();
        if let Some(socket) = self.socket() {
            socket.shut_down();
        }
        let companion = self.shared.companion.lock().take();
        if let Some(companion) = companion {
            companion.kill();
        }
    }

    /// A kill ends `other` as well, from now on or, if it has come before, at once.
    pub(crate) fn take_along(&self, other: &Self) {
        *self.shared.companion.lock() = Some(other.clone());
        if self.is_dead() {
            self.kill();
        }
    }

    /// What was taken along goes its own way.
    pub(crate) fn leave_behind(&self) {
        let companion = self.shared.companion.lock().take();
        drop(companion);
    }

    /// Sets, moves or clears the time at which a call on the session fails with [`Ended::DeadlinePassed`].
    ///
    /// It works on a call that is blocked now, too. A call that finds the deadline passed ends the stream for good,
    /// since an answer that nobody read may still come; a deadline that is cleared before had no effect.
    ///
    /// Cheap enough to be set for every statement: two atomics, no system call unless the deadline is earlier than
    /// the one that was waited for last.
    pub(crate) fn set_deadline(&self, deadline: Option<Instant>) {
        let deadline = deadline.map_or(NEVER, |at| self.shared.ticks(at));
        self.shared.deadline.store(deadline, SeqCst);
        // The task stores `looks_again` and then reads `deadline`: one of the two sees the other's store.
        if deadline < self.shared.looks_again.load(SeqCst) {
            self.shared.waker.wake();
        }
        if deadline != NEVER
            && let Some(watchdog) = self.shared.watchdog.get()
        {
            watchdog.look_by(self.shared.instant(deadline));
        }
    }

    /// Bounds what the server may send from now on, in bytes, until this is called again. A stream that gets more is ended
    /// for good, with [`Ended::TooMuch`].
    pub(crate) fn allow(&self, bytes: u64) {
        self.shared.allowance.store(bytes, SeqCst);
    }

    /// Lets `watchdog` enforce the deadlines of this session. Without one, each call has a timer of its own, which is a good
    /// part of what a short statement costs.
    ///
    /// # Errors
    /// If the watchdog's thread could not be started.
    pub(crate) fn watch_by(&self, watchdog: &Arc<Watchdog>) -> io::Result<()> {
        let shared = Arc::downgrade(&self.shared);
        watchdog.watch(shared as Weak<dyn Watched>)?;
        let _ = self.shared.watchdog.set(Arc::clone(watchdog));
        Ok(())
    }

    /// The socket of the session, while there is one.
    pub(crate) fn socket(&self) -> Option<Socket> {
        self.shared.socket.lock().clone()
    }

    /// The code of the last notice that the server has sent, if it has sent one.
    pub(crate) fn notice(&self) -> Option<SqlState> {
        self.shared.notice.lock().clone()
    }

    pub(super) fn set_notice(&self, code: Option<SqlState>) {
        *self.shared.notice.lock() = code;
    }

    /// By which of the dialer's routes it was opened last.
    pub(super) fn route(&self) -> usize {
        self.shared.route.load(SeqCst)
    }

    pub(super) fn set_route(&self, route: usize) {
        self.shared.route.store(route, SeqCst);
    }

    /// The address at the other end of a TCP connection.
    pub(crate) fn peer(&self) -> Option<SocketAddr> {
        self.socket().and_then(|socket| socket.peer())
    }

    /// Whether the server has closed the connection `by` then. It must not be used any more.
    pub(crate) fn wait_closed(&self, by: Instant) -> bool {
        // An end that this process has shut down looks alike.
        self.socket().is_some_and(|socket| !self.is_dead() && socket.wait_closed(by) && !self.is_dead())
    }

    /// The connector has a socket.
    pub(super) fn attach(&self, socket: Socket) {
        *self.shared.socket.lock() = Some(socket);
    }

    /// The session is over. Whoever still watches the socket finds it shut down.
    pub(crate) fn detach(&self) {
        if let Some(socket) = self.shared.socket.lock().take() {
            socket.shut_down();
        }
    }

    /// Why the stream was ended from our side, if it was; nothing of a connection that was lost.
    pub(crate) fn ended(&self) -> Option<Ended> {
        match self.shared.end.load(SeqCst) {
            LIVE => None,
            KILLED => Some(Ended::Killed),
            TOO_MUCH => Some(Ended::TooMuch),
            _ => Some(Ended::DeadlinePassed),
        }
    }

    /// Whether the stream was ended from our side, so that no call on the session can succeed any more.
    pub(crate) fn is_dead(&self) -> bool {
        self.ended().is_some()
    }

    /// The driver has the session ready: the time for connecting is over.
    pub(super) fn establish(&self) {
        self.shared.established.store(true, SeqCst);
    }
}

impl fmt::Debug for StreamControl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StreamControl")
            .field("ended", &self.ended())
            .field("established", &self.shared.established.load(SeqCst))
            .finish_non_exhaustive()
    }
}

impl Shared {
    /// `at` on the scale of the atomics. A time before the control was made counts as its making, long past.
    fn ticks(&self, at: Instant) -> u64 {
        let since = at.saturating_duration_since(self.base).as_nanos();
        u64::try_from(since).unwrap_or(NEVER)
    }

    fn instant(&self, ticks: u64) -> Instant {
        self.base + Duration::from_nanos(ticks)
    }

    fn is_watched(&self) -> bool {
        self.watchdog.get().is_some_and(|watchdog| watchdog.is_on())
    }
}

impl Watched for Shared {
    fn deadline(&self) -> Option<Instant> {
        let deadline = self.deadline.load(SeqCst);
        (deadline != NEVER).then(|| self.instant(deadline))
    }

    /// The task that waits finds that its time is up.
    fn enforce(&self) {
        self.waker.wake();
    }
}

/// The stream's side of a [`StreamControl`]: tells each poll whether to go on, and sees that it is polled again.
///
/// The order in each poll is [`check`](Self::check), the inner stream, and [`wait`](Self::wait) when that is pending.
#[derive(Debug)]
pub(super) struct Watch {
    control: StreamControl,
    /// Until when the session must be ready, in ticks; bounds one attempt and is void afterwards.
    setup: u64,
    /// Made when a poll first has to wait with a deadline, and then kept.
    timer: Option<Pin<Box<Sleep>>>,
}

impl Watch {
    /// A watch for one attempt to connect, that must be done by `setup`.
    pub(super) fn new(control: StreamControl, setup: Instant) -> Self {
        let setup = control.shared.ticks(setup);
        Self { control, setup, timer: None }
    }

    /// Fails if the stream has been ended, or its time is up.
    pub(super) fn check(&self, cx: &Context<'_>) -> io::Result<()> {
        let shared = &self.control.shared;
        // The waker before the flags: what is set after they were read finds the waker.
        shared.waker.register(cx.waker());
        self.live()?;
        let (deadline, setup) = self.limits();
        if deadline.min(setup) == NEVER {
            return Ok(());
        }
        let now = shared.ticks(Instant::now());
        if deadline <= now {
            let _ = shared.end.compare_exchange(LIVE, DEADLINE_PASSED, SeqCst, SeqCst);
            // A kill may have come first, and then it stays one.
            return Err(self.control.ended().unwrap_or(Ended::DeadlinePassed).into_io());
        }
        if setup <= now {
            return Err(Ended::ConnectTimedOut.into_io());
        }
        Ok(())
    }

    /// Fails if the stream has been ended.
    pub(super) fn live(&self) -> io::Result<()> {
        self.control.ended().map_or(Ok(()), |ended| Err(ended.into_io()))
    }

    /// Sees to it that the task is polled again when its time is up. Ready (with the error) if it is up by now.
    ///
    /// A timer that is due too early is left alone: each statement has a later deadline than the one before, and to
    /// be woken once for nothing in a while is cheaper than to move the timer each time.
    ///
    /// Measured on a virtual machine: a statement of 46 µs takes 60 µs with a timer, and the two atomics are 0.04 µs of
    /// that. The rest seems to be the timeout that the runtime then gives to `epoll_wait`. So there is none where the
    /// watchdog looks at the deadline: see [`StreamControl::watch_by`].
    pub(super) fn wait(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        loop {
            let (deadline, setup) = self.limits();
            let limit = deadline.min(setup);
            let looks_again = match limit {
                NEVER => NEVER,
                // The timer goes, too: as long as there is one, each wait of the runtime's has a timeout.
                _ if setup == NEVER && self.control.shared.is_watched() => {
                    self.timer = None;
                    limit
                }
                _ => self.arm(cx, limit),
            };
            let shared = &self.control.shared;
            shared.looks_again.store(looks_again, SeqCst);
            // See `set_deadline`: an earlier one may have been set meanwhile without waking us.
            if looks_again == 0 || shared.deadline.load(SeqCst) < looks_again {
                if let Err(ended) = self.check(cx) {
                    return Poll::Ready(ended);
                }
                continue;
            }
            return Poll::Pending;
        }
    }

    /// Polls a timer that goes off at `limit` or before; gives when, or 0 if it has just gone off.
    fn arm(&mut self, cx: &mut Context<'_>, limit: u64) -> u64 {
        let shared = &self.control.shared;
        let at = shared.instant(limit).into();
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(at)));
        if timer.deadline() > at || timer.is_elapsed() {
            timer.as_mut().reset(at);
        }
        match timer.as_mut().poll(cx) {
            Poll::Ready(()) => 0,
            Poll::Pending => shared.ticks(timer.deadline().into_std()),
        }
    }

    /// So much was read.
    ///
    /// # Errors
    /// If it is more than was allowed.
    pub(super) fn count(&self, bytes: usize) -> io::Result<()> {
        let take = |left: u64| left.checked_sub(bytes as u64);
        match self.control.shared.allowance.fetch_update(SeqCst, SeqCst, take) {
            Ok(_) => Ok(()),
            Err(_) => Err(self.too_much()),
        }
    }

    /// Ends a stream whose server sends, or announces, more than is allowed.
    pub(super) fn too_much(&self) -> io::Error {
        let _ = self.control.shared.end.compare_exchange(LIVE, TOO_MUCH, SeqCst, SeqCst);
        Ended::TooMuch.into_io()
    }

    /// How many bytes may come.
    pub(super) fn allowance(&self) -> u64 {
        self.control.shared.allowance.load(SeqCst)
    }

    /// The deadline of the control and the one of the attempt.
    fn limits(&self) -> (u64, u64) {
        let shared = &self.control.shared;
        let setup = if shared.established.load(SeqCst) { NEVER } else { self.setup };
        (shared.deadline.load(SeqCst), setup)
    }
}
