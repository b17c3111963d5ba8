//! The driver's client: no call without a deadline and a bound on the answer, and an end that harms nobody.

use std::fmt;
use std::mem;
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use postgres::Client;
use postgres::error::{Severity, SqlState};
use postgres::fallible_iterator::FallibleIterator;

use crate::loss::LossReason;
use crate::pg::stream::{Ended, SHORT_ANSWER, StreamControl};
use crate::process::{Origin, PerProcess, may_drive};

/// How long a session that is closed may take to say so to the server.
pub(crate) const GOODBYE: Duration = Duration::from_millis(100);

/// Why a call on a session failed.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The session is of no use any more.
    Lost { reason: LossReason, cause: Option<postgres::Error> },
    /// The server refused the statement; the session lives.
    Refused(postgres::Error),
}

/// The connection of a session.
///
/// Nothing reaches the driver's client but through [`call`](Self::call), so no call can be without a deadline. Dropping it
/// closes the session, which takes no longer than [`GOODBYE`] whatever the server does.
pub(crate) struct Wire {
    /// `None` once closed.
    client: Option<Client>,
    control: StreamControl,
    origin: Origin,
}

impl Wire {
    pub(crate) fn new(client: Client, control: StreamControl) -> Self {
        Self { client: Some(client), control, origin: Origin::here() }
    }

    pub(crate) fn control(&self) -> &StreamControl {
        &self.control
    }

    /// Whether the connection is known to be over, without asking the server.
    pub(crate) fn is_over(&self) -> bool {
        self.control.is_dead() || self.client.as_ref().is_none_or(Client::is_closed)
    }

    /// Runs a statement, which fails if it is not over `by` then. The server may answer with [`SHORT_ANSWER`] bytes.
    pub(crate) fn call<T>(
        &mut self,
        by: Instant,
        call: impl FnOnce(&mut Client) -> Result<T, postgres::Error>,
    ) -> Result<T, Failure> {
        self.call_for(SHORT_ANSWER, by, call)
    }

    /// As [`call`](Self::call), for an answer of at most `bytes`.
    pub(crate) fn call_for<T>(
        &mut self,
        bytes: u64,
        by: Instant,
        call: impl FnOnce(&mut Client) -> Result<T, postgres::Error>,
    ) -> Result<T, Failure> {
        let client = match &mut self.client {
            // Whoever calls on another thread has not asked before, and must not be punished with a panic.
            Some(client) if may_drive() => client,
            _ => {
                debug_assert!(self.client.is_none(), "a thread calls the driver that cannot");
                return Err(Failure::Lost { reason: LossReason::ConnectionClosed, cause: None });
            }
        };
        self.control.allow(bytes);
        self.control.set_deadline(Some(by));
        let outcome = call(client);
        self.control.set_deadline(None);
        // Nobody listens for notifications, and the driver keeps them.
        let mut notifications = client.notifications();
        for _ in 0..notifications.len() {
            let _ = notifications.iter().next();
        }
        drop(notifications);
        outcome.map_err(|cause| match Failure::of(cause) {
            Failure::Lost { reason: LossReason::ConnectionClosed, cause } => self.closed(cause),
            failure => failure,
        })
    }

    /// The connection is over, without an error of the server's.
    ///
    /// A server that ends all sessions at once, after a crash of one or for a shutdown in immediate mode, says so in a notice and not in an
    /// error (`quickdie` in its `tcop/postgres.c`).
    fn closed(&self, cause: Option<postgres::Error>) -> Failure {
        let said = self.control.notice().and_then(|code| reason_of(&code));
        let is_ours = self.control.is_dead();
        let reason = said.filter(|_| !is_ours).unwrap_or(LossReason::ConnectionClosed);
        Failure::Lost { reason, cause }
    }

    /// Takes in what the server has said by itself, which is above all that the session is over.
    ///
    /// To be called when there is something to read: it waits a millisecond for it. After `by` it ends in any case.
    pub(crate) fn listen(&mut self, by: Instant) -> Result<(), Failure> {
        self.call(by, |client| client.notifications().timeout_iter(Duration::from_millis(1)).next())?;
        // Silence stands for a timeout, and for a connection that was closed without a word.
        if self.is_over() {
            return Err(self.closed(None));
        }
        Ok(())
    }

    fn close(&mut self) {
        if let Some(client) = self.client.take() {
            // The driver's own drop waits for the server.
            self.control.set_deadline(Some(Instant::now() + GOODBYE));
            drop(client);
        }
        self.control.detach();
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        if !self.origin.is_here() {
            // The socket is the parent's, and so is what the system has registered for it. A copy of the parent's memory is
            // all that this process has of its own, and that is what it leaves behind.
            mem::forget(self.client.take());
            mem::forget(self.control.clone());
        } else if may_drive() {
            self.close();
        } else {
            let left =
                Self { client: self.client.take(), control: self.control.clone(), origin: self.origin };
            close_elsewhere(left);
        }
    }
}

/// Closes a session on a thread of its own, since this one cannot.
fn close_elsewhere(wire: Wire) {
    /// Where sessions wait for a thread that closes them: if none could be started, the next one takes these along.
    static LEFT: PerProcess<Mutex<Vec<Wire>>> = PerProcess::new();
    let left = LEFT.get(|_| Mutex::default());
    // The server must not wait for that.
    wire.control.kill();
    left.lock().push(wire);
    let close = || {
        let closed = mem::take(&mut *left.lock());
        drop(closed);
    };
    if let Err(error) = thread::Builder::new().name("dsync-close".to_owned()).spawn(close) {
        log::warn!("a session is cut off, and its memory kept, for want of a thread: {error}");
    }
}

impl fmt::Debug for Wire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Wire").field("control", &self.control).finish_non_exhaustive()
    }
}

impl Failure {
    pub(crate) fn of(cause: postgres::Error) -> Self {
        if let Some(error) = cause.as_db_error() {
            let ends_session = matches!(error.parsed_severity(), Some(Severity::Fatal | Severity::Panic))
                || cause.is_closed();
            return match reason_of(error.code()) {
                Some(reason) => Self::Lost { reason, cause: Some(cause) },
                None if ends_session => Self::Lost { reason: LossReason::ServerError, cause: Some(cause) },
                None => Self::Refused(cause),
            };
        }
        let reason = match Ended::find(&cause) {
            Some(Ended::DeadlinePassed) => LossReason::HeartbeatTimedOut,
            Some(Ended::TooMuch) => LossReason::ServerError,
            Some(Ended::Killed | Ended::ConnectTimedOut) | None => LossReason::ConnectionClosed,
        };
        Self::Lost { reason, cause: Some(cause) }
    }
}

/// The codes by which the server says that it ends the session:
/// <https://www.postgresql.org/docs/current/errcodes-appendix.html>, class 57.
fn reason_of(code: &SqlState) -> Option<LossReason> {
    match code.code() {
        "57P01" => Some(LossReason::Terminated),
        "57P02" => Some(LossReason::ServerCrashed),
        "57P04" => Some(LossReason::DatabaseDropped),
        "57P05" => Some(LossReason::LeaseExpired),
        _ => None,
    }
}
