//! What a claim asks of a session: to take its lock, with token and row, and to give it back.

use std::time::{Duration, Instant};

use postgres::error::SqlState;
use postgres::types::{ToSql, Type};
use postgres::{Row, Statement};

use crate::key::AdvisoryKey;
use crate::loss::LossReason;
use crate::pg::session::control::SessionControl;
use crate::pg::session::open::Session;
use crate::pg::session::wire::Failure;
use crate::pg::sql::quiet::{self, Told};
use crate::pg::sql::{self, Entry, Request, Shape, Verb};

/// A session keeps lease and name from one claim to the next, where that follows soon.
#[derive(Clone, Copy, Debug)]
struct Leased {
    /// The key that was asked for. For another one, lease and name are set anew.
    key: AdvisoryKey,
    /// How it was asked for.
    shape: Shape,
    /// The newest token, with a catalog.
    token: Option<i64>,
}

/// A shorter wait is a brief one. A session that waited briefly for a key is likely to do so again, where many take and give
/// back one lock in turn; and a block that ends quietly costs the server about 0.1 ms more than a prepared statement.
const BRIEF: Duration = Duration::from_millis(100);

/// What came of asking for the lock.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// It is ours; the token, if there is a catalog.
    Granted { token: Option<i64> },
    /// Another session holds it, and this one has nothing.
    Taken,
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

/// What a session remembers of the locks that it took.
#[derive(Default)]
pub(super) struct Memory {
    /// The statements that it has used, prepared from the second use on.
    prepared: Vec<((Verb, Shape), Option<Statement>)>,
    /// What was asked for since the session was last without lease and name.
    leased: Option<Leased>,
    /// The server does not know the blocks of [`quiet`].
    is_loud: bool,
    /// What has been prepared for such blocks.
    prepared_quietly: Vec<(Verb, Shape)>,
    /// The key for which this session waited last, if that was a short wait.
    waited_briefly: Option<AdvisoryKey>,
}

impl Memory {
    /// The lock that was asked for since the session was last without lease and name.
    pub(super) fn leased_lock(&self) -> Option<(AdvisoryKey, Shape)> {
        self.leased.map(|leased| (leased.key, leased.shape))
    }
}

impl Session {
    /// Whether it kept lease and name from a claim before.
    pub(crate) fn is_leased(&self) -> bool {
        self.memory.leased.is_some()
    }

    /// True if this session waited for the lock with this `key` last, for a short while, and has kept the lease since.
    pub(crate) fn is_contended(&self, key: AdvisoryKey) -> bool {
        self.memory.waited_briefly == Some(key) && self.memory.leased.is_some_and(|leased| leased.key == key)
    }

    /// Asks for the lock. An error may come after the grant, and takes the lease back: then the session must be discarded.
    fn try_anew(&mut self, request: &Request, by: Instant) -> Result<Answer, Failure> {
        // Whatever comes of it; who is refused discards the session.
        self.memory.leased = Some(Leased { key: request.key, shape: request.shape(), token: None });
        self.take_unknown(Verb::Try, request, by)
    }

    /// As [`try_anew`](Self::try_anew), for a session that has the lease from a claim before. Whoever `waits` anyway
    /// is not told why there is no lock, which would take another statement.
    pub(crate) fn try_lock(
        &mut self,
        request: &Request,
        waits: bool,
        by: Instant,
    ) -> Result<Answer, Failure> {
        let former = match self.memory.leased {
            Some(Leased { key, shape, token })
                if (key, shape) == (request.key, request.shape())
                    && (token.is_some() || request.entry.is_none()) =>
            {
                token
            }
            _ => return self.try_anew(request, by),
        };
        if request.entry.is_none() {
            let rows = self.run(Verb::Again, request.shape(), &[(&request.key.id(), Type::INT8)], by)?;
            let granted = only(&rows)?.try_get(0).map_err(Failure::of)?;
            return Ok(if granted { Answer::Granted { token: None } } else { Answer::Taken });
        }
        match self.take_known(Verb::Again, request, by) {
            Ok(Some(token)) if former.is_none_or(|former| former < token) => {
                Ok(Answer::Granted { token: Some(token) })
            }
            Ok(None) if waits => Ok(Answer::NotGranted),
            Ok(_) => self.try_anew(request, by),
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
        self.memory.leased = Some(Leased { key: request.key, shape: request.shape(), token: Some(token) });
        Ok(Some(token))
    }

    /// Queues for the lock until the slice is over or `control` is interrupted.
    pub(crate) fn queue(
        &mut self,
        request: &Request,
        control: &SessionControl,
        by: Instant,
    ) -> Result<Answer, Failure> {
        if !control.begin_slice() {
            return Ok(Answer::NotGranted);
        }
        let begun = Instant::now();
        let follows_a_brief_one = self.memory.waited_briefly.take() == Some(request.key);
        let outcome = if !self.memory.is_loud && !follows_a_brief_one {
            self.queue_quietly(request, by)
        } else {
            self.queue_plainly(request, by)
        };
        if matches!(outcome, Ok(Answer::Granted { .. })) && begun.elapsed() < BRIEF {
            self.memory.waited_briefly = Some(request.key);
        }
        let settled = control.end_slice(by);
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
            None => self.take_unknown(Verb::Queue, request, by),
        }
    }

    /// A slice whose end the server does not log.
    fn queue_quietly(&mut self, request: &Request, by: Instant) -> Result<Answer, Failure> {
        let shape = request.shape();
        for verb in [Verb::QueueAgain, Verb::Queue] {
            if !self.memory.prepared_quietly.contains(&(verb, shape)) {
                let statement = self.schema.apply(&sql::statement(verb, shape));
                self.simple_query(&quiet::preparation(verb, shape, &statement), by)?;
                self.memory.prepared_quietly.push((verb, shape));
            }
            let message = quiet::message(verb, shape, request.key.id(), request.entry.as_ref());
            match self.last_row(&message, by) {
                Ok(row) => {
                    match row.as_ref().and_then(|row| row.try_get(0).ok().flatten()).and_then(quiet::told) {
                        Some(Told::Over) => return Ok(Answer::NotGranted),
                        Some(Told::Granted { token }) => {
                            self.memory.leased =
                                Some(Leased { key: request.key, shape: request.shape(), token });
                            return Ok(Answer::Granted { token });
                        }
                        Some(Told::Nothing) => {}
                        None => return Err(Failure::Lost { reason: LossReason::ServerError, cause: None }),
                    }
                }
                Err(Failure::Refused(error))
                    if error.code().is_some_and(|code| quiet::is_unknown_here(code.code())) =>
                {
                    self.memory.is_loud = true;
                    break;
                }
                Err(failure) => return Err(failure),
            }
        }
        self.queue_plainly(request, by)
    }

    fn take_unknown(&mut self, verb: Verb, request: &Request, by: Instant) -> Result<Answer, Failure> {
        let mut outcome = self.take_unknown_once(verb, request, by);
        // After a crash of the server there is no token before a new era. The lock, if it is ours already, is taken twice.
        if let Ok(Answered::Tokenless) = outcome {
            self.new_era(by)?;
            outcome = self.take_unknown_once(verb, request, by);
        }
        match outcome {
            Ok(Answered::With(answer)) => Ok(answer),
            // Its row is not free yet, or is another key's, as the next slice tells.
            Ok(Answered::Tokenless) => Ok(Answer::NotGranted),
            Err(failure) => Err(failure),
        }
    }

    fn take_unknown_once(&mut self, verb: Verb, request: &Request, by: Instant) -> Result<Answered, Failure> {
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
                self.memory.leased = Some(Leased { key: request.key, shape: request.shape(), token });
                Answer::Granted { token }
            }
            None => Answer::Taken,
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
    pub(crate) fn unlock(&mut self, request: &Request, stays: bool, by: Instant) -> Result<bool, Failure> {
        // The row is not touched, so the statement is the same with and without catalog.
        let (key, shape) = (request.key, Shape { catalog: false, ..request.shape() });
        let verb = if stays { Verb::UnlockOnly } else { Verb::Unlock };
        let rows = self.run(verb, shape, &[(&key.id(), Type::INT8)], by)?;
        if !stays {
            self.memory.leased = None;
        }
        only(&rows)?.try_get(0).map_err(Failure::of)
    }

    /// Leaves the session without any lock, lease and name; whether the server has none of the `lost` backends any more.
    pub(crate) fn settle(&mut self, lost: &[i32], by: Instant) -> Result<bool, Failure> {
        let row = self.simple_query(&sql::settle(lost), by)?;
        self.memory.leased = None;
        Ok(row.and_then(|row| row.try_get(3).ok().flatten().map(|clear| clear == "t")).unwrap_or(false))
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
        let known = self.memory.prepared.iter().position(|(name, _)| *name == (verb, shape));
        let Some(index) = known else {
            let text = self.schema.apply(&sql::statement(verb, shape));
            self.memory.prepared.push(((verb, shape), None));
            return self.wire.call(by, |client| client.query_typed(&text, parameters));
        };
        let statement = match &self.memory.prepared[index].1 {
            Some(statement) => statement.clone(),
            None => {
                let text = self.schema.apply(&sql::statement(verb, shape));
                let statement = self.wire.call(by, |client| client.prepare(&text))?;
                self.memory.prepared[index].1.insert(statement).clone()
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

/// The end of a slice by its timeout, or by a cancel: ours, or an operator's, who then only made the slice shorter.
fn is_end_of_wait(error: &postgres::Error) -> bool {
    matches!(error.code(), Some(&SqlState::LOCK_NOT_AVAILABLE | &SqlState::QUERY_CANCELED))
}
