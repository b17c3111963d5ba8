//! One session on the server: how it is opened and checked, its heartbeats, and calls in text. Every call ends at a deadline.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use postgres::error::SqlState;
use postgres::types::ToSql;
use postgres::{CancelToken, Client, Row, SimpleQueryMessage, SimpleQueryRow};

use crate::loss::LossReason;
use crate::pg::session::control::SessionControl;
use crate::pg::session::known;
use crate::pg::session::locks::Memory;
use crate::pg::session::refusal::Refusal;
use crate::pg::session::wire::{Failure, GOODBYE, Wire};
use crate::pg::sql::schema::Schema;
use crate::pg::sql::{self, Probe};
use crate::pg::stream::{Dialer, NotReady, Socket, StopProbe, StreamControl};
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
    /// The number of the record of this run of its server, and whether the takeover grace goes on, as far as it knows.
    run: Option<(String, bool)>,
    /// It has seen what must be seen before a lock is asked for.
    is_for_locks: bool,
}

/// What all sessions of a manager have in common.
#[derive(Clone, Debug)]
pub(crate) struct SessionPlan {
    pub(crate) dialer: Arc<Dialer>,
    pub(crate) schema: Arc<Schema>,
    pub(crate) slice: Duration,
    pub(crate) lease: Duration,
    pub(crate) heartbeat: Duration,
}

/// What a server says of itself.
struct Identity {
    version: String,
    in_recovery: bool,
    /// When it was started, in text. Empty if it does not say.
    started: String,
}

fn is_true(row: Option<&SimpleQueryRow>, column: usize) -> bool {
    row.is_some_and(|row| row.try_get(column).is_ok_and(|text| text == Some("t")))
}

impl Session {
    /// Opens a session, prepares it and checks that it can keep locks.
    pub(crate) fn open(plan: &SessionPlan, control: StreamControl, by: Instant) -> Result<Self, Refusal> {
        Self::open_unless(|_| true, plan, control, by).map(|(session, _)| session)
    }

    /// As [`open`](Self::open), for somebody who wants to know why: gives a session that cannot keep locks as well, and the reason.
    pub(crate) fn open_to_check(
        plan: &SessionPlan,
        control: StreamControl,
        by: Instant,
    ) -> Result<(Self, Option<Refusal>), Refusal> {
        Self::open_unless(|refusal| !refusal.is_refused(), plan, control, by)
    }

    fn open_unless(
        is_in_the_way: fn(&Refusal) -> bool,
        plan: &SessionPlan,
        control: StreamControl,
        by: Instant,
    ) -> Result<(Self, Option<Refusal>), Refusal> {
        let session_nonce = nonce().map_err(Refusal::system)?;
        let ready = |client: Client, until: Instant| {
            let cancel = Arc::new(client.cancel_token());
            let mut session = Self {
                wire: Wire::new(client, control.clone()),
                cancel,
                dialer: Arc::clone(&plan.dialer),
                schema: Arc::clone(&plan.schema),
                backend_pid: 0,
                is_direct: false,
                session_nonce,
                memory: Memory::default(),
                run: None,
                is_for_locks: false,
            };
            // The dialer ends it earlier, and in a way that leaves the control to the next address.
            let by = until + GOODBYE;
            let refusal = session.prepare(plan, by).err();
            match refusal.map(|refusal| session.explain(refusal, by)) {
                Some(refusal) if is_in_the_way(&refusal) => {
                    // No goodbye, whose deadline would be the next session's.
                    session.stream().detach();
                    Err(NotReady { go_on: refusal.is_curable(), error: refusal.into() })
                }
                refusal => Ok((session, refusal)),
            }
        };
        plan.dialer.connect(&control, by, ready).map_err(Refusal::from_dial)
    }

    fn prepare(&mut self, plan: &SessionPlan, by: Instant) -> Result<(), Refusal> {
        let dead_client_settings = sql::notice_dead_clients(plan.lease, plan.heartbeat);
        let session_nonce = self.session_nonce;
        let (mut all, mut by_locks) = (true, false);
        let row = loop {
            let more = if all { dead_client_settings.as_slice() } else { &[] };
            match self.simple_query(&sql::prepare_session(plan.slice, more, session_nonce, by_locks), by) {
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

    /// The number of the takeover grace that goes on, as far as is known: no lock may be asked for.
    pub(crate) fn pending(&self) -> Option<&str> {
        self.run.as_ref().filter(|(_, is_pending)| *is_pending).map(|(id, _)| id.as_str())
    }

    /// The number of the record of this run of the server; `None` without a catalog.
    pub(crate) fn server_run(&self) -> Option<&str> {
        self.run.as_ref().map(|(id, _)| id.as_str())
    }

    /// Whether the takeover grace goes on in this run of the server.
    pub(crate) fn set_run(&mut self, id: String, is_pending: bool) {
        self.run = Some((id, is_pending));
    }

    /// Whether it may ask for locks: it has seen the catalog, the takeovers of the server, and the standbys where they are to confirm.
    pub(crate) fn is_for_locks(&self) -> bool {
        self.is_for_locks
    }

    pub(crate) fn set_for_locks(&mut self) {
        self.is_for_locks = true;
    }

    /// Whether the server is known to be at the other end of the socket, and no pooler.
    pub(crate) fn is_direct(&self) -> bool {
        self.is_direct
    }

    /// The address of the other end; `None` for a Unix socket.
    pub(crate) fn peer(&self) -> Option<SocketAddr> {
        self.stream().peer()
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

    /// A heartbeat in a transaction that is left open, which takes the locks of the probe as well; whether all were granted. A pooler
    /// gives the statements of a transaction to one backend. The server ends it when it stands idle for `longest`.
    pub(crate) fn hold(&mut self, probe: Probe, longest: Duration, by: Instant) -> Result<bool, Failure> {
        let begin =
            format!("BEGIN; SET LOCAL idle_in_transaction_session_timeout = {};", longest.as_millis());
        let row = self.heartbeat_with(&begin, &probe.hold(), by)?;
        Ok(is_true(row.as_ref(), 4))
    }

    /// A heartbeat which asks for what another session [holds](Self::hold): whether it was granted any of it that it must not have, and
    /// whether it was granted all that it may share.
    pub(crate) fn contend(&mut self, probe: Probe, by: Instant) -> Result<(bool, bool), Failure> {
        let row = self.heartbeat_with("", &probe.contend(), by)?;
        Ok((is_true(row.as_ref(), 4), is_true(row.as_ref(), 5)))
    }

    /// Ends what [`hold`](Self::hold) has begun; whether the session had all of it until now.
    pub(crate) fn give_back(&mut self, probe: Probe, held: bool, by: Instant) -> Result<bool, Failure> {
        let row = self.simple_query(&probe.give_back(held), by)?;
        Ok(is_true(row.as_ref(), 0))
    }

    /// A heartbeat which looks whether the server is one node of several; one sentence of advice if it is.
    pub(crate) fn heartbeat_and_look(&mut self, by: Instant) -> Result<Option<&'static str>, Failure> {
        let row = self.heartbeat_with("", sql::IS_NODE, by)?;
        Ok(if is_true(row.as_ref(), 4) { self.node(by) } else { None })
    }

    /// What cannot be asked is none.
    fn node(&mut self, by: Instant) -> Option<&'static str> {
        let row = self.simple_query(sql::EXTENSIONS, by).ok().flatten()?;
        let names = row.try_get(0).ok().flatten()?;
        if names.contains("citus") {
            let row = self.simple_query(sql::CITUS_GROUP, by).ok().flatten()?;
            return row.try_get(0).is_ok_and(|group| group != Some("0")).then_some(known::CITUS_WORKER);
        }
        known::by_extension(names)
    }

    /// Says of a refusal what the server, or what stands in front of it, probably is. Asks the server only if the refusal is for good.
    pub(crate) fn explain(&mut self, refusal: Refusal, by: Instant) -> Refusal {
        if !refusal.is_refused() {
            return refusal;
        }
        let identity = self.identity(by);
        let sentence = identity.as_ref().and_then(|identity| {
            let is_balanced = refusal.topic() == Some("primary") && !identity.in_recovery;
            if is_balanced { Some(known::LOAD_BALANCER) } else { known::by_version(&identity.version) }
        });
        let is_about_sessions = refusal.topic() == Some("sessions");
        let by_host = || self.dialer.host_names().find_map(known::by_host).filter(|_| is_about_sessions);
        refusal.saying(sentence.or_else(by_host))
    }

    /// Says of a refusal of two sessions what it probably comes from.
    pub(crate) fn explain_both(&mut self, other: &mut Self, refusal: Refusal, by: Instant) -> Refusal {
        if refusal.is_refused()
            && let (Some(mine), Some(others)) = (self.identity(by), other.identity(by))
            && mine.started != others.started
        {
            return refusal.saying(Some(known::TWO_SERVERS));
        }
        self.explain(refusal, by)
    }

    /// Sees whether its server takes new sessions; in words if it cannot be seen.
    pub(crate) fn probe_stop(&self, by: Instant) -> Result<StopProbe, String> {
        let tell = |error| Refusal::from_dial(error).to_string();
        self.dialer.probe_stop(self.stream(), tell, by).map_err(tell)
    }

    fn identity(&mut self, by: Instant) -> Option<Identity> {
        let row = match self.simple_query(sql::IDENTITY, by) {
            Ok(row) => row,
            Err(Failure::Refused(_)) => self.simple_query(sql::VERSION, by).ok().flatten(),
            Err(Failure::Lost { .. }) => None,
        }?;
        let text = |column| row.try_get(column).ok().flatten().unwrap_or_default().to_owned();
        Some(Identity { version: text(0), in_recovery: text(1) != "f", started: text(2) })
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
    /// so it holds nothing any more, or nobody is granted it before all sessions are over, after a crash. PostgreSQL says that it ends a session before
    /// it lets go of the locks.
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

    /// Runs statements in text; the first row, if there is one.
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
    pub(crate) fn last_row(&mut self, text: &str, by: Instant) -> Result<Option<SimpleQueryRow>, Failure> {
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
