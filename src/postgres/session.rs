//! One session on the server, and what a claim asks of it. Every call ends at a deadline.

use std::sync::Arc;
use std::time::{Duration, Instant};

use postgres::error::{Severity, SqlState};
use postgres::fallible_iterator::FallibleIterator;
use postgres::types::{ToSql, Type};
use postgres::{CancelToken, Client, Row, SimpleQueryMessage, SimpleQueryRow, Statement};

use super::link::Link;
use super::pool::Refusal;
use super::sql::{self, Schema, Shape, Verb};
use super::stream::{Dialer, Ended, StreamControl};
use crate::key::AdvisoryKey;
use crate::loss::LossReason;

/// An open session. It is closed when dropped, which takes no longer than [`GOODBYE`] whatever the server does.
pub(super) struct Session {
    client: Client,
    /// After the client, which says goodbye when it is dropped.
    control: Socketed,
    dialer: Arc<Dialer>,
    /// Where the catalog is, or would be.
    schema: Arc<Schema>,
    cancel: Arc<CancelToken>,
    backend_pid: i32,
    /// What this session, and no other, has written into its backend.
    mark: u64,
    prepared: Vec<((Verb, Shape), Option<Statement>)>,
    /// What was asked for since the session was last without lease and name.
    leased: Option<Leased>,
}

/// A session keeps lease and name from one claim to the next, where that follows soon.
#[derive(Clone, Copy, Debug)]
struct Leased {
    /// The key that was asked for. For another one, lease and name are set anew.
    key: AdvisoryKey,
    /// The newest token, with a catalog.
    token: Option<i64>,
}

/// How long a session that is closed may take to say so to the server.
const GOODBYE: Duration = Duration::from_millis(100);

/// Why a call on a session failed.
#[derive(Debug)]
pub(super) enum Failure {
    /// The session is of no use any more.
    Lost { reason: LossReason, cause: Option<postgres::Error> },
    /// The server refused the statement; the session lives.
    Refused(postgres::Error),
}

/// What a claim asks for.
#[derive(Clone, Debug)]
pub(super) struct Request {
    pub(super) key: AdvisoryKey,
    /// How long the server is to keep the lock for a silent holder.
    pub(super) lease: Duration,
    /// What the session is called while it serves the claim.
    pub(super) application_name: String,
    /// What the catalog is told; `None` without a catalog.
    pub(super) entry: Option<Entry>,
}

/// What the catalog is told of a term.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) namespace: String,
    pub(super) key: String,
    pub(super) annotation: Option<Vec<u8>>,
}

/// What came of asking for the lock.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// It is ours; the token, if there is a catalog.
    Granted { token: Option<i64> },
    /// Another session holds it. Or it was granted in the last moment of a slice without our knowing, or a transaction of
    /// the former holder's is open still.
    NotGranted,
    /// The catalog has another key under this number. The lock may be ours, and must not stay so.
    Collision { other: String },
}

/// What the statement says.
enum Answered {
    With(Answer),
    /// The lock was granted, but its row was not written, without which no term begins.
    Tokenless,
}

impl Session {
    /// Opens a session, prepares it and checks that it can keep locks.
    pub(super) fn open(
        dialer: Arc<Dialer>,
        schema: Arc<Schema>,
        control: StreamControl,
        slice: Duration,
        lease: Duration,
        heartbeat: Duration,
        by: Instant,
    ) -> Result<Self, Refusal> {
        let client = dialer.connect(&control, by).map_err(Refusal::from_dial)?;
        let mut session = Self {
            cancel: Arc::new(client.cancel_token()),
            client,
            control: Socketed(control),
            dialer,
            schema,
            backend_pid: 0,
            mark: fastrand::u64(..),
            prepared: Vec::new(),
            leased: None,
        };
        session.prepare(slice, lease, heartbeat, by)?;
        Ok(session)
    }

    fn prepare(
        &mut self,
        slice: Duration,
        lease: Duration,
        heartbeat: Duration,
        by: Instant,
    ) -> Result<(), Refusal> {
        let niceties = sql::notice_dead_clients(lease, heartbeat);
        let mark = self.mark;
        let (mut all, mut by_locks) = (true, false);
        let row = loop {
            let more = if all { niceties.as_slice() } else { &[] };
            match self.simple_query(&sql::prepare_session(slice, more, mark, by_locks), by) {
                // One of them, probably: what went before has been taken back with it.
                Err(Failure::Refused(_)) if all => all = false,
                Err(failure) => return Err(Refusal::from_failure(failure)),
                Ok(Some(row)) if row.try_get(3).is_ok_and(|mark| mark.is_none()) => {
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
        for (name, value) in niceties.iter().filter(|_| !all) {
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

    /// The process that serves this session, by its own word at the start.
    pub(super) fn backend_pid(&self) -> i32 {
        self.backend_pid
    }

    /// Where the catalog is, or would be.
    pub(super) fn schema(&self) -> &Schema {
        &self.schema
    }

    /// What other threads may do to this session while a claim uses it.
    pub(super) fn link(&self) -> Arc<Link> {
        Link::new(self.control().clone(), Arc::clone(&self.dialer), Arc::clone(&self.cancel))
    }

    /// Whether the session is known to be useless, without asking the server.
    pub(super) fn is_over(&self) -> bool {
        self.control().is_dead() || self.client.is_closed()
    }

    fn control(&self) -> &StreamControl {
        &self.control.0
    }

    /// Whether it kept lease and name from a claim before.
    pub(super) fn is_leased(&self) -> bool {
        self.leased.is_some()
    }

    /// Says whether another thread looks at the deadlines of what follows.
    pub(super) fn guard(&self, guarded: bool) {
        self.control().guard(guarded);
    }

    /// Asks for the lock. An error may come after the grant, and takes the lease back: then the session must be discarded.
    pub(super) fn try_lock(&mut self, request: &Request, by: Instant) -> Result<Answer, Failure> {
        // Whatever comes of it; who is refused discards the session.
        self.leased = Some(Leased { key: request.key, token: None });
        self.acquire(Verb::Try, request, by)
    }

    /// As [`try_lock`](Self::try_lock), for a session that has the lease from a claim before. Whoever `waits` anyway
    /// is not told why there is no lock, which would take another statement.
    pub(super) fn lock_again(
        &mut self,
        request: &Request,
        waits: bool,
        by: Instant,
    ) -> Result<Answer, Failure> {
        let former = match self.leased {
            Some(Leased { key, token })
                if key == request.key && (token.is_some() || request.entry.is_none()) =>
            {
                token
            }
            _ => return self.try_lock(request, by),
        };
        if request.entry.is_none() {
            let rows = self.run(Verb::Again, request.shape(), &[(&request.key.id(), Type::INT8)], by)?;
            let granted = only(&rows)?.try_get(0).map_err(Failure::of)?;
            return Ok(if granted { Answer::Granted { token: None } } else { Answer::NotGranted });
        }
        match self.take_known(Verb::Again, request, by) {
            Ok(Some(token)) if former.is_none_or(|former| former < token) => {
                Ok(Answer::Granted { token: Some(token) })
            }
            Ok(None) if waits => Ok(Answer::NotGranted),
            Ok(_) => self.try_lock(request, by),
            // Somebody else's transaction has the row.
            Err(Failure::Refused(error)) if is_end_of_wait(&error) => Ok(Answer::NotGranted),
            Err(failure) => Err(failure),
        }
    }

    /// Lock, token and row where the key has a row; the token.
    fn take_known(&mut self, verb: Verb, request: &Request, by: Instant) -> Result<Option<i64>, Failure> {
        let Some(Entry { namespace, key, annotation }) = &request.entry else { return Ok(None) };
        let parameters: [(&(dyn ToSql + Sync), Type); 4] = [
            (&request.key.id(), Type::INT8),
            (namespace, Type::TEXT),
            (key, Type::TEXT),
            (annotation, Type::BYTEA),
        ];
        let rows = self.run(verb, request.shape(), &parameters, by)?;
        let Some(row) = rows.first() else { return Ok(None) };
        let token: i64 = row.try_get(0).map_err(Failure::of)?;
        self.leased = Some(Leased { key: request.key, token: Some(token) });
        Ok(Some(token))
    }

    /// Queues for the lock until the slice is over or `link` is interrupted.
    pub(super) fn queue(&mut self, request: &Request, link: &Link, by: Instant) -> Result<Answer, Failure> {
        if !link.begin_slice() {
            return Ok(Answer::NotGranted);
        }
        let outcome = if request.entry.is_none() {
            let granted = self.run(Verb::QueueAgain, request.shape(), &[(&request.key.id(), Type::INT8)], by);
            granted.map(|_| Answer::Granted { token: None })
        } else {
            match self.take_known(Verb::QueueAgain, request, by) {
                Ok(Some(token)) => Ok(Answer::Granted { token: Some(token) }),
                Ok(None) => self.acquire(Verb::Queue, request, by),
                Err(failure) => Err(failure),
            }
        };
        let settled = link.end_slice(by);
        if !settled {
            // A cancel that nobody knows the fate of may hit whatever comes next.
            return Err(Failure::Lost { reason: LossReason::ConnectionClosed, cause: None });
        }
        match outcome {
            Err(Failure::Refused(error)) if is_end_of_wait(&error) => Ok(Answer::NotGranted),
            outcome => outcome,
        }
    }

    fn acquire(&mut self, verb: Verb, request: &Request, by: Instant) -> Result<Answer, Failure> {
        let mut outcome = self.acquire_once(verb, request, by);
        // After a crash of the server there is no token before a new era. The lock, if it is ours already, is taken twice.
        if let Ok(Answered::Tokenless) = outcome {
            self.new_era(by)?;
            outcome = self.acquire_once(verb, request, by);
        }
        match outcome {
            Ok(Answered::With(answer)) => Ok(answer),
            // Its row is not free yet, or is another key's, as the next slice tells.
            Ok(Answered::Tokenless) => Ok(Answer::NotGranted),
            Err(failure) => Err(failure),
        }
    }

    fn acquire_once(&mut self, verb: Verb, request: &Request, by: Instant) -> Result<Answered, Failure> {
        let id = request.key.id();
        let lease = request.lease.as_millis().to_string();
        let mut parameters: Vec<(&(dyn ToSql + Sync), Type)> =
            vec![(&id, Type::INT8), (&lease, Type::TEXT), (&request.application_name, Type::TEXT)];
        if let Some(Entry { namespace, key, annotation }) = &request.entry {
            parameters.extend::<[(&(dyn ToSql + Sync), Type); 3]>([
                (namespace, Type::TEXT),
                (key, Type::TEXT),
                (annotation, Type::BYTEA),
            ]);
        }
        let rows = self.run(verb, request.shape(), &parameters, by)?;
        let row = only(&rows)?;
        let granted: bool = row.try_get(0).map_err(Failure::of)?;
        let token: Option<i64> = row.try_get(1).map_err(Failure::of)?;
        let namespace: Option<String> = row.try_get(2).map_err(Failure::of)?;
        let key: Option<String> = row.try_get(3).map_err(Failure::of)?;
        Ok(Answered::With(match namespace.zip(key) {
            Some((namespace, key)) => Answer::Collision { other: format!("{namespace}:{key}") },
            None if granted && token.is_none() && request.entry.is_some() => return Ok(Answered::Tokenless),
            None if granted => {
                self.leased = Some(Leased { key: request.key, token });
                Answer::Granted { token }
            }
            None => Answer::NotGranted,
        }))
    }

    /// Lets tokens go on after a crash. Does nothing where that has been done. It may take a second more than a statement.
    pub(super) fn new_era(&mut self, by: Instant) -> Result<(), Failure> {
        let outcome = self.simple_query(&self.schema.apply(&sql::new_era(sql::TIMELINE)), by);
        match outcome {
            // The timeline is not for this role, or the catalog is not, as the next attempt tells.
            Err(Failure::Refused(error)) if error.code() == Some(&SqlState::INSUFFICIENT_PRIVILEGE) => {
                self.simple_query(&self.schema.apply(&sql::new_era("1")), by).map(drop)
            }
            outcome => outcome.map(drop),
        }
    }

    /// Gives the lock back; whether it was held. If it `stays` with the key, it keeps lease and name.
    pub(super) fn unlock(&mut self, key: AdvisoryKey, stays: bool, by: Instant) -> Result<bool, Failure> {
        let shape = Shape { pair: key.is_pair(), catalog: false };
        let verb = if stays { Verb::UnlockOnly } else { Verb::Unlock };
        let rows = self.run(verb, shape, &[(&key.id(), Type::INT8)], by)?;
        if !stays {
            self.leased = None;
        }
        only(&rows)?.try_get(0).map_err(Failure::of)
    }

    /// Leaves the session without any lock, lease and name; whether the server has none of the `lost` backends any more.
    pub(super) fn settle(&mut self, lost: &[i32], by: Instant) -> Result<bool, Failure> {
        let row = self.simple_query(&sql::settle(lost), by)?;
        self.leased = None;
        Ok(row.and_then(|row| row.try_get(3).ok().flatten().map(|clear| clear == "t")).unwrap_or(false))
    }

    /// Renews the lease.
    pub(super) fn heartbeat(&mut self, by: Instant) -> Result<(), Failure> {
        let row = self.simple_query(sql::HEARTBEAT, by)?;
        let column = |index| row.as_ref().and_then(|row| row.try_get(index).ok().flatten());
        let lost = |reason| Err(Failure::Lost { reason, cause: None });
        let (pid, mark) =
            (column(0).and_then(|pid| pid.parse().ok()), column(2).and_then(|mark| mark.parse().ok()));
        if (pid, mark) != (Some(self.backend_pid), Some(self.mark)) {
            return lost(LossReason::SessionChanged);
        }
        if column(1) != Some("f") {
            return lost(LossReason::ServerIsStandby);
        }
        Ok(())
    }

    /// Takes in what the server has said by itself, which is above all that the session is over.
    ///
    /// To be called when there is something to read: it waits a millisecond for it.
    pub(super) fn listen(&mut self) -> Result<(), Failure> {
        let heard = self.client.notifications().timeout_iter(Duration::from_millis(1)).next();
        match heard {
            Ok(Some(_)) => Ok(()),
            // `None` stands for a timeout and for a connection that was closed without a word.
            Ok(None) if self.client.is_closed() => {
                Err(Failure::Lost { reason: LossReason::ConnectionClosed, cause: None })
            }
            Ok(None) => Ok(()),
            // Whatever the server says here, it says of the session, since there is no statement.
            Err(cause) => Err(match Failure::of(cause) {
                Failure::Refused(cause) => {
                    Failure::Lost { reason: LossReason::ServerError, cause: Some(cause) }
                }
                lost => lost,
            }),
        }
    }

    /// Asks the server something that is not of a claim.
    pub(super) fn query(
        &mut self,
        text: &str,
        parameters: &[&(dyn ToSql + Sync)],
        by: Instant,
    ) -> Result<Vec<Row>, Failure> {
        self.bounded(by, |client| client.query(text, parameters))
    }

    /// Runs one of the catalog's statements in text; the first row, if there is one.
    pub(super) fn simple_query(
        &mut self,
        text: &str,
        by: Instant,
    ) -> Result<Option<SimpleQueryRow>, Failure> {
        let messages = self.bounded(by, |client| client.simple_query(text))?;
        Ok(messages.into_iter().find_map(|message| match message {
            SimpleQueryMessage::Row(row) => Some(row),
            _ => None,
        }))
    }

    /// Ends the session for whoever uses it. What was sent is left unanswered.
    pub(super) fn kill(&self) {
        self.control().kill();
    }

    /// Runs a statement; it is prepared when it is used for the second time. Many a session serves one claim only, and for
    /// that one the preparation would be a round trip more.
    fn run(
        &mut self,
        verb: Verb,
        shape: Shape,
        parameters: &[(&(dyn ToSql + Sync), Type)],
        by: Instant,
    ) -> Result<Vec<Row>, Failure> {
        let known = self.prepared.iter().position(|(name, _)| *name == (verb, shape));
        let Some(index) = known else {
            let text = self.schema.apply(&sql::statement(verb, shape));
            self.prepared.push(((verb, shape), None));
            return self.bounded(by, |client| client.query_typed(&text, parameters));
        };
        let statement = match &self.prepared[index].1 {
            Some(statement) => statement.clone(),
            None => {
                let text = self.schema.apply(&sql::statement(verb, shape));
                let statement = self.bounded(by, |client| client.prepare(&text))?;
                self.prepared[index].1.insert(statement).clone()
            }
        };
        let values: Vec<_> = parameters.iter().map(|(value, _)| *value).collect();
        self.bounded(by, |client| client.query(&statement, &values))
    }

    fn bounded<T>(
        &mut self,
        by: Instant,
        call: impl FnOnce(&mut Client) -> Result<T, postgres::Error>,
    ) -> Result<T, Failure> {
        self.control().set_deadline(Some(by));
        let outcome = call(&mut self.client);
        self.control().set_deadline(None);
        outcome.map_err(Failure::of)
    }
}

/// The row of a statement that gives one whatever happens. A server that does not is none that can keep locks.
fn only(rows: &[Row]) -> Result<&Row, Failure> {
    rows.first().ok_or(Failure::Lost { reason: LossReason::ServerError, cause: None })
}

impl Request {
    fn shape(&self) -> Shape {
        Shape { pair: self.key.is_pair(), catalog: self.entry.is_some() }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // The driver's own drop, which follows, waits for the server.
        self.guard(false);
        self.control().set_deadline(Some(Instant::now() + GOODBYE));
    }
}

/// The control of a session whose socket ends with it, though other threads may have hold of it still.
struct Socketed(StreamControl);

impl Drop for Socketed {
    fn drop(&mut self) {
        self.0.detach();
    }
}

impl Failure {
    pub(super) fn of(cause: postgres::Error) -> Self {
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

/// The end of a slice by its timeout, or by a cancel: ours, or an operator's, who then only made the slice shorter.
fn is_end_of_wait(error: &postgres::Error) -> bool {
    matches!(error.code(), Some(&SqlState::LOCK_NOT_AVAILABLE | &SqlState::QUERY_CANCELED))
}
