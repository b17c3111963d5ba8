//! One session on the server, and what a claim asks of it. Every call ends at a deadline.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use postgres::error::SqlState;
use postgres::types::ToSql;
use postgres::{CancelToken, Client, Row, SimpleQueryMessage, SimpleQueryRow};

use crate::loss::LossReason;
use crate::pg::session::control::SessionControl;
use crate::pg::session::locks::Memory;
use crate::pg::session::refusal::Refusal;
use crate::pg::session::wire::{Failure, GOODBYE, Wire};
use crate::pg::sql;
use crate::pg::sql::schema::Schema;
use crate::pg::stream::{Dialer, NotReady, Socket, StreamControl};
use crate::pg::watchdog::Watchdog;
use crate::process::nonce;

/// An open session. It is closed when dropped.
pub(crate) struct Session {
    pub(super) wire: Wire,
    dialer: Arc<Dialer>,
    /// Where the catalog is, or would be.
    pub(super) schema: Arc<Schema>,
    cancel: Arc<CancelToken>,
    backend_pid: i32,
    /// The server is at the other end of the socket, and no pooler.
    is_direct: bool,
    /// What this session, and no other, has written into its backend.
    session_nonce: u64,
    /// What it remembers of the locks that it took.
    pub(super) memory: Memory,
}

impl Session {
    /// Opens a session, prepares it and checks that it can keep locks.
    pub(crate) fn open(
        dialer: Arc<Dialer>,
        schema: Arc<Schema>,
        control: StreamControl,
        slice: Duration,
        lease: Duration,
        heartbeat: Duration,
        by: Instant,
    ) -> Result<Self, Refusal> {
        let session_nonce = nonce().map_err(Refusal::system)?;
        let ready = |client: Client, until: Instant| {
            let cancel = Arc::new(client.cancel_token());
            let mut session = Self {
                wire: Wire::new(client, control.clone()),
                cancel,
                dialer: Arc::clone(&dialer),
                schema: Arc::clone(&schema),
                backend_pid: 0,
                is_direct: false,
                session_nonce,
                memory: Memory::default(),
            };
            // The dialer ends it earlier, and in a way that leaves the control to the next address.
            let by = until + GOODBYE;
            match session.prepare(slice, lease, heartbeat, by) {
                Ok(()) => Ok(session),
                Err(refusal) => {
                    // No goodbye, whose deadline would be the next session's.
                    session.stream().detach();
                    Err(NotReady { go_on: refusal.is_curable(), error: refusal.into() })
                }
            }
        };
        dialer.connect(&control, by, ready).map_err(Refusal::from_dial)
    }

    fn prepare(
        &mut self,
        slice: Duration,
        lease: Duration,
        heartbeat: Duration,
        by: Instant,
    ) -> Result<(), Refusal> {
        let dead_client_settings = sql::notice_dead_clients(lease, heartbeat);
        let session_nonce = self.session_nonce;
        let (mut all, mut by_locks) = (true, false);
        let row = loop {
            let more = if all { dead_client_settings.as_slice() } else { &[] };
            match self.simple_query(&sql::prepare_session(slice, more, session_nonce, by_locks), by) {
                // One of them, probably: what went before has been taken back with it.
                Err(Failure::Refused(_)) if all => all = false,
                Err(failure) => return Err(Refusal::from_failure(failure)),
                Ok(Some(row)) if row.try_get(3).is_ok_and(|session_nonce| session_nonce.is_none()) => {
                    if by_locks {
                        return Err(Refusal::pooler());
                    }
                    by_locks = true;
                }
                Ok(row) => break row,
            }
        };
        let column = |index| row.as_ref().and_then(|row| row.try_get(index).ok().flatten());
        let number = |index| column(index).and_then(|text| text.parse::<i32>().ok());
        let (Some(backend_pid), Some(in_recovery), Some(version)) = (number(0), column(1), number(2)) else {
            return Err(Refusal::not_postgres());
        };
        if version < 140_000 {
            return Err(Refusal::too_old(version / 10_000));
        }
        if in_recovery == "t" {
            return Err(Refusal::standby());
        }
        self.backend_pid = backend_pid;
        let port = column(4).and_then(|port| port.parse().ok());
        self.is_direct = self.stream().socket().is_some_and(|socket| socket.leads_to(backend_pid, port));
        for (name, value) in dead_client_settings.iter().filter(|_| !all) {
            match self.simple_query(&sql::set(name, value), by) {
                Ok(_) => {}
                Err(Failure::Refused(error)) => {
                    log::debug!("the server does not take {name} = {value}: {}", crate::error::chain(&error));
                }
                Err(failure) => return Err(Refusal::from_failure(failure)),
            }
        }
        Ok(())
    }

    /// The server's process for this session, as it said when the session was opened.
    pub(crate) fn backend_pid(&self) -> i32 {
        self.backend_pid
    }

    /// Where the catalog is, or would be.
    pub(crate) fn schema(&self) -> &Schema {
        &self.schema
    }

    /// What other threads may do to this session while a claim uses it.
    pub(crate) fn control(&self) -> Arc<SessionControl> {
        SessionControl::new(self.stream().clone(), Arc::clone(&self.dialer), Arc::clone(&self.cancel))
    }

    /// Whether the session is known to be useless, without asking the server.
    pub(crate) fn is_over(&self) -> bool {
        self.wire.is_over()
    }

    pub(crate) fn socket(&self) -> Option<Socket> {
        self.stream().socket()
    }

    fn stream(&self) -> &StreamControl {
        self.wire.control()
    }

    /// Lets `watchdog` enforce the deadlines of what follows.
    ///
    /// # Errors
    /// If its thread could not be started.
    pub(crate) fn watch_by(&self, watchdog: &Arc<Watchdog>) -> io::Result<()> {
        self.stream().watch_by(watchdog)
    }

    /// Renews the lease, and proves that the session is what it was, and holds what it took.
    pub(crate) fn heartbeat(&mut self, by: Instant) -> Result<(), Failure> {
        loop {
            match self.heartbeat_with("", "", by) {
                // Somebody's cancel request hit it, which says nothing of the session.
                Err(Failure::Refused(error))
                    if error.code() == Some(&SqlState::QUERY_CANCELED) && Instant::now() < by => {}
                outcome => return outcome.map(drop),
            }
        }
    }

    /// A heartbeat which asks for the lock `key` as well, without waiting; whether it was granted.
    pub(crate) fn heartbeat_and_try(&mut self, key: i64, by: Instant) -> Result<bool, Failure> {
        let row = self.heartbeat_with("", &format!(", pg_catalog.pg_try_advisory_lock({key})"), by)?;
        Ok(row.is_some_and(|row| row.try_get(4).is_ok_and(|granted| granted == Some("t"))))
    }

    /// As [`heartbeat_and_try`](Self::heartbeat_and_try), in a transaction that is left open: the lock goes with it, also if a
    /// pooler gives the next statement to another backend. The server ends it when it stands idle for `longest`.
    pub(crate) fn begin_with_lock(
        &mut self,
        key: i64,
        longest: Duration,
        by: Instant,
    ) -> Result<bool, Failure> {
        let begin =
            format!("BEGIN; SET LOCAL idle_in_transaction_session_timeout = {};", longest.as_millis());
        let row =
            self.heartbeat_with(&begin, &format!(", pg_catalog.pg_try_advisory_xact_lock({key})"), by)?;
        Ok(row.is_some_and(|row| row.try_get(4).is_ok_and(|granted| granted == Some("t"))))
    }

    fn heartbeat_with(
        &mut self,
        before: &str,
        more: &str,
        by: Instant,
    ) -> Result<Option<SimpleQueryRow>, Failure> {
        let row =
            self.simple_query(&[before, &sql::heartbeat(self.memory.leased_lock()), more].concat(), by)?;
        let column = |index| row.as_ref().and_then(|row| row.try_get(index).ok().flatten());
        let lost = |reason| Err(Failure::Lost { reason, cause: None });
        let (pid, session_nonce) = (
            column(0).and_then(|pid| pid.parse().ok()),
            column(2).and_then(|session_nonce| session_nonce.parse().ok()),
        );
        if (pid, session_nonce) != (Some(self.backend_pid), Some(self.session_nonce)) {
            return lost(LossReason::SessionChanged);
        }
        if column(1) != Some("f") {
            return lost(LossReason::ServerIsStandby);
        }
        if column(3) != Some("t") {
            return lost(LossReason::Unlocked);
        }
        Ok(row)
    }

    /// Takes in what the server has said by itself, which is above all that the session is over.
    ///
    /// To be called when there is something to read: it waits a millisecond for it. After `by` it ends in any case.
    pub(crate) fn listen(&mut self, by: Instant) -> Result<(), Failure> {
        // Whatever the server says here, it says of the session, since there is no statement.
        self.wire.listen(by).map_err(|failure| match failure {
            Failure::Refused(cause) => Failure::Lost { reason: LossReason::ServerError, cause: Some(cause) },
            lost => lost,
        })
    }

    /// Whether the server has ended its side of the connection `by` then, and with it the process that served the session:
    /// so it holds nothing any more. PostgreSQL says that it ends a session before it lets go of the locks.
    pub(crate) fn wait_gone(&self, by: Instant) -> bool {
        self.is_direct && self.stream().wait_closed(by)
    }

    /// Asks the server something that is not of a claim.
    pub(crate) fn query(
        &mut self,
        text: &str,
        parameters: &[&(dyn ToSql + Sync)],
        by: Instant,
    ) -> Result<Vec<Row>, Failure> {
        /// A thousand locks with annotations of the greatest length.
        const LONGEST_ANSWER: u64 = 64 << 20;
        self.wire.call_for(LONGEST_ANSWER, by, |client| client.query(text, parameters))
    }

    /// Runs one of the catalog's statements in text; the first row, if there is one.
    pub(crate) fn simple_query(
        &mut self,
        text: &str,
        by: Instant,
    ) -> Result<Option<SimpleQueryRow>, Failure> {
        let messages = self.wire.call(by, |client| client.simple_query(text))?;
        Ok(messages.into_iter().find_map(|message| match message {
            SimpleQueryMessage::Row(row) => Some(row),
            _ => None,
        }))
    }

    /// Runs several statements in one message; the last row of all.
    pub(super) fn last_row(&mut self, text: &str, by: Instant) -> Result<Option<SimpleQueryRow>, Failure> {
        let messages = self.wire.call(by, |client| client.simple_query(text))?;
        Ok(messages.into_iter().rev().find_map(|message| match message {
            SimpleQueryMessage::Row(row) => Some(row),
            _ => None,
        }))
    }

    /// Ends the session for whoever uses it. What was sent is left unanswered.
    pub(crate) fn kill(&self) {
        self.stream().kill();
    }
}
