//! One session on the server, and what a claim asks of it. Every call ends at a deadline.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use postgres::error::SqlState;
use postgres::types::{ToSql, Type};
use postgres::{CancelToken, Client, Row, SimpleQueryMessage, SimpleQueryRow, Statement};

use crate::key::AdvisoryKey;
use crate::loss::LossReason;
use crate::postgres::session::cancel::Link;
use crate::postgres::session::refusal::Refusal;
use crate::postgres::session::wire::{Failure, GOODBYE, Wire};
use crate::postgres::sql::quiet::{self, Told};
use crate::postgres::sql::schema::Schema;
use crate::postgres::sql::{self, Shape, Verb};
use crate::postgres::stream::{Dialer, NotReady, StreamControl};
use crate::postgres::watchdog::Watchdog;
use crate::process::nonce;

/// An open session. It is closed when dropped.
pub(crate) struct Session {
    wire: Wire,
    dialer: Arc<Dialer>,
    /// Where the catalog is, or would be.
    schema: Arc<Schema>,
    cancel: Arc<CancelToken>,
    backend_pid: i32,
    /// The server is at the other end of the socket, and no pooler.
    is_direct: bool,
    /// What this session, and no other, has written into its backend.
    mark: u64,
    prepared: Vec<((Verb, Shape), Option<Statement>)>,
    /// What was asked for since the session was last without lease and name.
    leased: Option<Leased>,
    /// Whether the server may know the blocks of [`quiet`].
    is_quiet: bool,
    /// What has been prepared for such blocks.
    prepared_quietly: Vec<(Verb, Shape)>,
    /// The key for which this session waited last, if that was a short wait.
    waited_briefly: Option<AdvisoryKey>,
}

/// A session keeps lease and name from one claim to the next, where that follows soon.
#[derive(Clone, Copy, Debug)]
struct Leased {
    /// The key that was asked for. For another one, lease and name are set anew.
    key: AdvisoryKey,
    /// The newest token, with a catalog.
    token: Option<i64>,
}

/// A wait below that is a short one. Whoever waited briefly for a key is likely to do so again, where many take and give
/// back one lock in turn; and a block that ends quietly costs the server about 0.1 ms more than a prepared statement.
const BRIEF: Duration = Duration::from_millis(100);

/// What a claim asks for.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) key: AdvisoryKey,
    /// How long the server is to keep the lock for a silent holder.
    pub(crate) lease: Duration,
    /// What the session is called while it serves the claim.
    pub(crate) application_name: String,
    /// What the catalog is told; `None` without a catalog.
    pub(crate) entry: Option<Entry>,
}

/// What the catalog is told of a term.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) namespace: String,
    pub(crate) key: String,
    pub(crate) annotation: Option<Vec<u8>>,
}

/// What came of asking for the lock.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Answer {
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
    pub(crate) fn open(
        dialer: Arc<Dialer>,
        schema: Arc<Schema>,
        control: StreamControl,
        slice: Duration,
        lease: Duration,
        heartbeat: Duration,
        by: Instant,
    ) -> Result<Self, Refusal> {
        let mark = nonce().map_err(Refusal::system)?;
        let ready = |client: Client, until: Instant| {
            let cancel = Arc::new(client.cancel_token());
            let mut session = Self {
                wire: Wire::new(client, control.clone()),
                cancel,
                dialer: Arc::clone(&dialer),
                schema: Arc::clone(&schema),
                backend_pid: 0,
                is_direct: false,
                mark,
                prepared: Vec::new(),
                leased: None,
                is_quiet: true,
                prepared_quietly: Vec::new(),
                waited_briefly: None,
            };
            // The dialer ends it earlier, and in a way that leaves the control to the next address.
            let by = until + GOODBYE;
            match session.prepare(slice, lease, heartbeat, by) {
                Ok(()) => Ok(session),
                Err(refusal) => {
                    // No goodbye, whose deadline would be the next session's.
                    session.control().detach();
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
        let port = column(4).and_then(|port| port.parse().ok());
        self.is_direct = self.control().socket().is_some_and(|socket| socket.leads_to(backend_pid, port));
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
    pub(crate) fn backend_pid(&self) -> i32 {
        self.backend_pid
    }

    /// Where the catalog is, or would be.
    pub(crate) fn schema(&self) -> &Schema {
        &self.schema
    }

    /// What other threads may do to this session while a claim uses it.
    pub(crate) fn link(&self) -> Arc<Link> {
        Link::new(self.control().clone(), Arc::clone(&self.dialer), Arc::clone(&self.cancel))
    }

    /// Whether the session is known to be useless, without asking the server.
    pub(crate) fn is_over(&self) -> bool {
        self.wire.is_over()
    }

    fn control(&self) -> &StreamControl {
        self.wire.control()
    }

    /// Lets `watchdog` enforce the deadlines of what follows.
    ///
    /// # Errors
    /// If its thread could not be started.
    pub(crate) fn watch_by(&self, watchdog: &Arc<Watchdog>) -> io::Result<()> {
        self.control().watch_by(watchdog)
    }

    /// Whether it kept lease and name from a claim before.
    pub(crate) fn is_leased(&self) -> bool {
        self.leased.is_some()
    }

    /// Asks for the lock. An error may come after the grant, and takes the lease back: then the session must be discarded.
    pub(crate) fn try_lock(&mut self, request: &Request, by: Instant) -> Result<Answer, Failure> {
        // Whatever comes of it; who is refused discards the session.
        self.leased = Some(Leased { key: request.key, token: None });
        self.acquire(Verb::Try, request, by)
    }

    /// As [`try_lock`](Self::try_lock), for a session that has the lease from a claim before. Whoever `waits` anyway
    /// is not told why there is no lock, which would take another statement.
    pub(crate) fn lock_again(
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
    pub(crate) fn queue(&mut self, request: &Request, link: &Link, by: Instant) -> Result<Answer, Failure> {
        if !link.begin_slice() {
            return Ok(Answer::NotGranted);
        }
        let begun = Instant::now();
        let follows_a_brief_one = self.waited_briefly.take() == Some(request.key);
        let outcome = if self.is_quiet && !follows_a_brief_one {
            self.queue_quietly(request, by)
        } else {
            self.queue_plainly(request, by)
        };
        if matches!(outcome, Ok(Answer::Granted { .. })) && begun.elapsed() < BRIEF {
            self.waited_briefly = Some(request.key);
        }
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

    /// A slice whose end is an error, which the server logs.
    fn queue_plainly(&mut self, request: &Request, by: Instant) -> Result<Answer, Failure> {
        if request.entry.is_none() {
            let granted = self.run(Verb::QueueAgain, request.shape(), &[(&request.key.id(), Type::INT8)], by);
            return granted.map(|_| Answer::Granted { token: None });
        }
        match self.take_known(Verb::QueueAgain, request, by)? {
            Some(token) => Ok(Answer::Granted { token: Some(token) }),
            None => self.acquire(Verb::Queue, request, by),
        }
    }

    /// A slice whose end the server does not log.
    fn queue_quietly(&mut self, request: &Request, by: Instant) -> Result<Answer, Failure> {
        let shape = request.shape();
        for verb in [Verb::QueueAgain, Verb::Queue] {
            if !self.prepared_quietly.contains(&(verb, shape)) {
                let statement = self.schema.apply(&sql::statement(verb, shape));
                self.simple_query(&quiet::preparation(verb, shape, &statement), by)?;
                self.prepared_quietly.push((verb, shape));
            }
            let message = quiet::message(verb, shape, request.key.id(), request.entry.as_ref());
            match self.last_row(&message, by) {
                Ok(row) => {
                    match row.as_ref().and_then(|row| row.try_get(0).ok().flatten()).and_then(quiet::told) {
                        Some(Told::Over) => return Ok(Answer::NotGranted),
                        Some(Told::Granted { token }) => {
                            self.leased = Some(Leased { key: request.key, token });
                            return Ok(Answer::Granted { token });
                        }
                        Some(Told::Nothing) => {}
                        None => return Err(Failure::Lost { reason: LossReason::ServerError, cause: None }),
                    }
                }
                Err(Failure::Refused(error))
                    if error.code().is_some_and(|code| quiet::is_unknown_here(code.code())) =>
                {
                    self.is_quiet = false;
                    break;
                }
                Err(failure) => return Err(failure),
            }
        }
        self.queue_plainly(request, by)
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
    pub(crate) fn new_era(&mut self, by: Instant) -> Result<(), Failure> {
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
    pub(crate) fn unlock(&mut self, key: AdvisoryKey, stays: bool, by: Instant) -> Result<bool, Failure> {
        let shape = Shape { pair: key.is_pair(), catalog: false };
        let verb = if stays { Verb::UnlockOnly } else { Verb::Unlock };
        let rows = self.run(verb, shape, &[(&key.id(), Type::INT8)], by)?;
        if !stays {
            self.leased = None;
        }
        only(&rows)?.try_get(0).map_err(Failure::of)
    }

    /// Leaves the session without any lock, lease and name; whether the server has none of the `lost` backends any more.
    pub(crate) fn settle(&mut self, lost: &[i32], by: Instant) -> Result<bool, Failure> {
        let row = self.simple_query(&sql::settle(lost), by)?;
        self.leased = None;
        Ok(row.and_then(|row| row.try_get(3).ok().flatten().map(|clear| clear == "t")).unwrap_or(false))
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
        let row = self.simple_query(
            &[before, &sql::heartbeat(self.leased.map(|leased| leased.key)), more].concat(),
            by,
        )?;
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
        self.is_direct && self.control().wait_closed(by)
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
    fn last_row(&mut self, text: &str, by: Instant) -> Result<Option<SimpleQueryRow>, Failure> {
        let messages = self.wire.call(by, |client| client.simple_query(text))?;
        Ok(messages.into_iter().rev().find_map(|message| match message {
            SimpleQueryMessage::Row(row) => Some(row),
            _ => None,
        }))
    }

    /// Ends the session for whoever uses it. What was sent is left unanswered.
    pub(crate) fn kill(&self) {
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
            return self.wire.call(by, |client| client.query_typed(&text, parameters));
        };
        let statement = match &self.prepared[index].1 {
            Some(statement) => statement.clone(),
            None => {
                let text = self.schema.apply(&sql::statement(verb, shape));
                let statement = self.wire.call(by, |client| client.prepare(&text))?;
                self.prepared[index].1.insert(statement).clone()
            }
        };
        let values: Vec<_> = parameters.iter().map(|(value, _)| *value).collect();
        self.wire.call(by, |client| client.query(&statement, &values))
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

/// The end of a slice by its timeout, or by a cancel: ours, or an operator's, who then only made the slice shorter.
fn is_end_of_wait(error: &postgres::Error) -> bool {
    matches!(error.code(), Some(&SqlState::LOCK_NOT_AVAILABLE | &SqlState::QUERY_CANCELED))
}
