//! What a claim asks of a session: to take its lock, with token and row, and to give it back.

use std::time::{Duration, Instant};
use std::{iter, thread};

use postgres::error::SqlState;
use postgres::types::{ToSql, Type};
use postgres::{Row, Statement};

use crate::key::AdvisoryKey;
use crate::loss::LossReason;
use crate::mode::Mode;
use crate::pg::session::batch::Semaphores;
use crate::pg::session::control::SessionControl;
use crate::pg::session::open::Session;
use crate::pg::session::wire::Failure;
use crate::pg::sql::quiet::{self, Told};
use crate::pg::sql::{self, Entry, Place, Request, Shape, Verb};
use crate::pg::stream::SHORT_ANSWER;

/// A session keeps lease and name from one claim to the next, where that follows soon.
#[derive(Clone, Copy, Debug)]
struct Leased {
    /// The key that was asked for. For another one, lease and name are set anew.
    key: AdvisoryKey,
    /// How it was asked for.
    shape: Shape,
    /// The newest token, with a catalog.
    token: Option<i64>,
    /// The permit of a semaphore that is held, or was last.
    permit: Option<u32>,
}

impl Leased {
    /// What is held on the server.
    fn held(&self) -> AdvisoryKey {
        self.permit.map_or(self.key, |permit| self.key.permit(permit))
    }
}

/// A shorter wait is a brief one. A session that waited briefly for a key is likely to do so again, where many take and give
/// back one lock in turn; and a block that ends quietly costs the server about 0.1 ms more than a prepared statement.
const BRIEF: Duration = Duration::from_millis(100);

/// The pauses between the looks of a reader that has the lock, but not the row, which another reader may be making theirs: to say that a writer is there
/// would be wrong then. They are 100 ms in all, and counted, not timed: on a busy machine the first reader's statement takes longer, too. Half of the
/// time until `by` is left for the last look, since a session is lost that does not answer in time.
pub(super) fn pauses_of_a_reader(by: Instant) -> impl Iterator<Item = Duration> {
    const SHORTEST: Duration = Duration::from_micros(500);
    const LONGEST: Duration = Duration::from_millis(16);
    const LOOKS: usize = 10;
    let pauses = iter::successors(Some(SHORTEST), |pause| Some((2 * *pause).min(LONGEST)));
    let end = by - by.saturating_duration_since(Instant::now()) / 2;
    pauses.take(LOOKS).take_while(move |_| Instant::now() + LONGEST < end)
}

/// What came of asking for the lock.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// It is ours; the token, if there is a catalog, and of a semaphore which permit.
    Granted { token: Option<i64>, permit: Option<u32> },
    /// Another session holds it, and this one has nothing.
    Busy,
    /// Another session holds it. Or it was granted in the last moment of a slice without our knowing, or a transaction of
    /// the former holder's is open still.
    NotGranted,
    /// The catalog has another key under this number. The lock may be ours, and must not stay so.
    Collision { other: String },
    /// The semaphore has another number of permits than the caller says. The session has nothing.
    OtherPermits { theirs: i32 },
    /// No token can be drawn before a new era has begun, for which a session is to be opened. The lock may be ours.
    NoEra,
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
    /// Where it stands that has waited for its lock since it was last without any.
    place: Place,
    /// It has waited for a slice in vain, or somebody has who was there before. It asks for the turnstile next.
    wants_turnstile: bool,
    /// Since when it looks for a permit, with the turnstile; or looked for its last one.
    looks_since: Option<Instant>,
}

impl Memory {
    /// The session has been left without any lock, or has got its own and given back the turnstile.
    fn begin_anew(&mut self) {
        (self.place, self.wants_turnstile) = (Place::Newcomer, false);
    }

    /// The lock that was asked for since the session was last without lease and name; of a semaphore, the permit that it was granted.
    pub(super) fn leased_lock(&self) -> Option<(AdvisoryKey, Shape)> {
        self.leased.map(|leased| (leased.held(), leased.shape))
    }
}

impl Session {
    /// Whether it kept lease and name from a claim before.
    pub(crate) fn is_leased(&self) -> bool {
        self.memory.leased.is_some()
    }

    /// The lock by which heartbeats see that it has its locks, of a session that carries many.
    pub(super) fn set_leased_lock(&mut self, key: AdvisoryKey, shape: Shape) {
        self.memory.leased = Some(Leased { key, shape, token: None, permit: None });
    }

    /// True if this session waited for the lock with this `key` last, for a short while, and has kept the lease since, for one that is asked
    /// for in the same way.
    pub(crate) fn is_contended(&self, key: AdvisoryKey, shape: Shape) -> bool {
        let leased = self.memory.leased.map(|leased| (leased.key, leased.shape));
        self.memory.waited_briefly == Some(key) && leased == Some((key, shape))
    }

    /// Asks for the lock. An error may come after the grant, and takes the lease back: then the session must be discarded.
    fn try_anew(&mut self, request: &Request, by: Instant) -> Result<Answer, Failure> {
        self.memory.looks_since = None;
        // Whatever comes of it; who is refused discards the session.
        self.memory.leased =
            Some(Leased { key: request.key, shape: request.shape(), token: None, permit: None });
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
        if request.mode == Mode::Permit {
            return match self.take_known_permit(request, by) {
                Ok(Some(answer)) => Ok(answer),
                Ok(None) => self.try_anew(request, by),
                Err(Failure::Refused(error)) if is_end_of_wait(&error) => Ok(Answer::NotGranted),
                Err(failure) => Err(failure),
            };
        }
        let former = match self.memory.leased {
            Some(Leased { key, shape, token, .. })
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
            return Ok(if granted { Answer::Granted { token: None, permit: None } } else { Answer::Busy });
        }
        match self.take_known(Verb::Again, request, by) {
            // Readers have one token for many terms.
            Ok(Some(token))
                if former.is_none_or(|former| {
                    former < token || request.mode == Mode::Shared && former == token
                }) =>
            {
                Ok(Answer::Granted { token: Some(token), permit: None })
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
        self.memory.leased =
            Some(Leased { key: request.key, shape: request.shape(), token: Some(token), permit: None });
        Ok(Some(token))
    }

    /// Takes the permit that the session had last, if it did not have to wait for that.
    fn take_known_permit(&mut self, request: &Request, by: Instant) -> Result<Option<Answer>, Failure> {
        let known = self.memory.leased.filter(|leased| {
            (leased.key, leased.shape) == (request.key, request.shape()) && self.memory.looks_since.is_none()
        });
        let (Some(leased), Some(Entry { namespace, key, annotation })) = (known, &request.entry) else {
            return Ok(None);
        };
        let (Some(permit), Some(former)) = (leased.permit, leased.token) else { return Ok(None) };
        let parameters: [(&(dyn ToSql + Sync), Type); 5] = [
            (&request.key.permit(permit).id(), Type::INT8),
            (namespace, Type::TEXT),
            (key, Type::TEXT),
            (annotation, Type::BYTEA),
            (&request.permits, Type::INT4),
        ];
        let rows = self.run(Verb::Again, request.shape(), &parameters, by)?;
        let Some(token) = rows.first().map(|row| get::<i64>(row, 0)).transpose()? else { return Ok(None) };
        self.memory.leased = Some(Leased { token: Some(token), ..leased });
        // If it is no greater, somebody has made the catalog anew.
        Ok((former < token).then_some(Answer::Granted { token: Some(token), permit: Some(permit) }))
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
        let is_quiet = !self.memory.is_loud && !follows_a_brief_one;
        let outcome = match (self.memory.wants_turnstile, is_quiet) {
            _ if request.mode == Mode::Permit => self.wait_for_permit(request, by),
            (true, _) => self.enter_turnstile(request, by).map(|()| Answer::NotGranted),
            (false, true) => self.queue_quietly(request, by),
            (false, false) => self.queue_plainly(request, by),
        };
        match outcome {
            Ok(Answer::Granted { .. }) => {
                self.memory.begin_anew();
                if begun.elapsed() < BRIEF && request.mode != Mode::Permit {
                    self.memory.waited_briefly = Some(request.key);
                }
            }
            // Whoever has the turnstile keeps it, and asks for nothing but the lock.
            _ if self.memory.place == Place::Newcomer => self.memory.wants_turnstile = true,
            _ => {}
        }
        let settled = control.end_slice(by);
        if !settled {
            // A cancel that nobody knows the fate of may hit whatever comes next.
            return Err(Failure::Lost { reason: LossReason::ConnectionClosed, cause: None });
        }
        match outcome {
            Err(Failure::Refused(error)) if is_end_of_wait(&error) => Ok(Answer::NotGranted),
            // There is somebody at the turnstile.
            Ok(Answer::Busy) => Ok(Answer::NotGranted),
            outcome => outcome,
        }
    }

    /// Waits for the turnstile, for a slice.
    fn enter_turnstile(&mut self, request: &Request, by: Instant) -> Result<(), Failure> {
        // It is the same with and without catalog.
        let shape = request.shape().bare();
        let id = request.key.id();
        let told =
            if self.memory.is_loud { None } else { self.run_quietly(Verb::Turnstile, shape, request, by)? };
        let is_had = match told {
            Some(told) => told == Told::Front,
            None => !self.run(Verb::Turnstile, shape, &[(&id, Type::INT8)], by)?.is_empty(),
        };
        if is_had {
            (self.memory.place, self.memory.wants_turnstile) = (Place::Front, false);
            self.memory.looks_since = Some(Instant::now());
        }
        Ok(())
    }

    /// Waits for the turnstile, or, with it, looks for a permit: each for one slice.
    fn wait_for_permit(&mut self, request: &Request, by: Instant) -> Result<Answer, Failure> {
        if self.memory.place == Place::Newcomer {
            self.enter_turnstile(request, by)?;
        }
        if self.memory.place == Place::Newcomer {
            return Ok(Answer::NotGranted);
        }
        let outcome = self.look_for_permit(request, by);
        if !matches!(outcome, Ok(Answer::Granted { .. } | Answer::Busy)) {
            // It may have been granted one without our knowing. Whoever asks for the turnstile lets go of all first.
            self.memory.begin_anew();
        }
        outcome
    }

    fn look_for_permit(&mut self, request: &Request, by: Instant) -> Result<Answer, Failure> {
        let (shape, verb) = (request.shape(), Verb::QueueAgain(Place::Front));
        let told = if self.memory.is_loud { None } else { self.run_quietly(verb, shape, request, by)? };
        match told {
            Some(Told::Granted { token, permit }) => {
                self.memory.leased = Some(Leased { key: request.key, shape, token, permit });
                Ok(Answer::Granted { token, permit })
            }
            Some(Told::Over) => Ok(Answer::NotGranted),
            // One look more, which tells what else there may be than that none is free.
            Some(Told::Nothing) => self.take_unknown(Verb::Queue(Place::Front), request, by),
            Some(Told::Front) => Err(Failure::Lost { reason: LossReason::ServerError, cause: None }),
            None => self.take_unknown(verb, request, by),
        }
    }

    /// A slice whose end is an error, which the server logs.
    fn queue_plainly(&mut self, request: &Request, by: Instant) -> Result<Answer, Failure> {
        let place = self.memory.place;
        let verb = Verb::QueueAgain(place);
        if request.entry.is_none() {
            let rows = self.run(verb, request.shape(), &[(&request.key.id(), Type::INT8)], by)?;
            let granted = only(&rows)?.try_get(0).map_err(Failure::of)?;
            return Ok(if granted { Answer::Granted { token: None, permit: None } } else { Answer::Busy });
        }
        match self.take_known(verb, request, by)? {
            Some(token) => Ok(Answer::Granted { token: Some(token), permit: None }),
            None => self.take_unknown(Verb::Queue(place), request, by),
        }
    }

    /// A slice whose end the server does not log.
    fn queue_quietly(&mut self, request: &Request, by: Instant) -> Result<Answer, Failure> {
        let (shape, place) = (request.shape(), self.memory.place);
        for verb in [Verb::QueueAgain(place), Verb::Queue(place)] {
            let Some(told) = self.run_quietly(verb, shape, request, by)? else {
                return self.queue_plainly(request, by);
            };
            match told {
                Told::Over => return Ok(Answer::NotGranted),
                Told::Granted { token, permit } => {
                    self.memory.leased = Some(Leased { key: request.key, shape, token, permit });
                    return Ok(Answer::Granted { token, permit });
                }
                Told::Nothing if request.entry.is_none() => return Ok(Answer::Busy),
                Told::Nothing => {}
                Told::Front => return Err(Failure::Lost { reason: LossReason::ServerError, cause: None }),
            }
        }
        self.take_unknown(Verb::Queue(place), request, by)
    }

    /// What a slice says whose end the server does not log; `None` if the server does not know such slices.
    fn run_quietly(
        &mut self,
        verb: Verb,
        shape: Shape,
        request: &Request,
        by: Instant,
    ) -> Result<Option<Told>, Failure> {
        if !self.memory.prepared_quietly.contains(&(verb, shape)) {
            self.simple_query(&quiet::preparation(verb, shape, &self.schema), by)?;
            self.memory.prepared_quietly.push((verb, shape));
        }
        let entry = request.entry.as_ref().filter(|_| shape.catalog);
        let looks = (request.permits, self.looked_for());
        match self.last_row(&quiet::message(verb, shape, request.key.id(), entry, looks), by) {
            Ok(row) => {
                let told = row.as_ref().and_then(|row| row.try_get(0).ok().flatten()).and_then(quiet::told);
                told.map(Some).ok_or(Failure::Lost { reason: LossReason::ServerError, cause: None })
            }
            Err(Failure::Refused(error))
                if error.code().is_some_and(|code| quiet::is_unknown_here(code.code())) =>
            {
                self.memory.is_loud = true;
                Ok(None)
            }
            Err(failure) => Err(failure),
        }
    }

    /// For how many milliseconds it has looked for a permit, with the turnstile.
    fn looked_for(&self) -> i32 {
        let looks_since = self.memory.looks_since.filter(|_| self.memory.place == Place::Front);
        looks_since.map_or(0, |since| i32::try_from(since.elapsed().as_millis()).unwrap_or(i32::MAX))
    }

    fn take_unknown(&mut self, verb: Verb, request: &Request, by: Instant) -> Result<Answer, Failure> {
        let mut outcome = self.take_unknown_once(verb, request, by);
        if request.mode == Mode::Shared && matches!(outcome, Ok(Answered::Tokenless)) {
            // Another reader has made the row theirs meanwhile.
            outcome = self.take_unknown_once(verb, request, by);
        }
        if let Ok(Answered::Tokenless) = outcome {
            // Somebody has rewritten the catalog. The new era waits for the synchronous standbys; a caller who did not want to wait any longer would
            // cancel that, and so end it without them.
            if !self.has_era(by)? {
                return Ok(Answer::NoEra);
            }
            // The lock, if it is ours already, is taken twice.
            outcome = self.take_unknown_once(verb, request, by);
        }
        if request.mode == Mode::Shared {
            for pause in pauses_of_a_reader(by) {
                let Ok(Answered::Tokenless) = outcome else { break };
                thread::sleep(pause);
                outcome = self.take_unknown_once(verb, request, by);
            }
        }
        match outcome {
            Ok(Answered::With(answer)) => Ok(answer),
            // Its row is not free yet, or is another key's, as the next slice tells.
            Ok(Answered::Tokenless) => Ok(Answer::NotGranted),
            Err(failure) => Err(failure),
        }
    }

    fn take_unknown_once(&mut self, verb: Verb, request: &Request, by: Instant) -> Result<Answered, Failure> {
        let (id, looked_for) = (request.key.id(), self.looked_for());
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
        if request.mode == Mode::Permit {
            parameters.extend::<[(&(dyn ToSql + Sync), Type); 2]>([
                (&request.permits, Type::INT4),
                (&looked_for, Type::INT4),
            ]);
        }
        let rows = self.run(verb, request.shape(), &parameters, by)?;
        let row = only(&rows)?;
        if request.mode == Mode::Permit {
            return self.permit_in(row, request, by);
        }
        let granted: bool = row.try_get(0).map_err(Failure::of)?;
        let token: Option<i64> = row.try_get(1).map_err(Failure::of)?;
        let namespace: Option<String> = row.try_get(2).map_err(Failure::of)?;
        let key: Option<String> = row.try_get(3).map_err(Failure::of)?;
        Ok(Answered::With(match namespace.zip(key) {
            Some((namespace, key)) => Answer::Collision { other: format!("{namespace}:{key}") },
            None if granted && token.is_none() && request.entry.is_some() => return Ok(Answered::Tokenless),
            None if granted => {
                self.memory.leased =
                    Some(Leased { key: request.key, shape: request.shape(), token, permit: None });
                Answer::Granted { token, permit: None }
            }
            None => Answer::Busy,
        }))
    }

    /// What a look for a permit says. Where nobody has said how many there are, this session does.
    fn permit_in(&mut self, row: &Row, request: &Request, by: Instant) -> Result<Answered, Failure> {
        let (permit, token): (Option<i32>, Option<i64>) = (get(row, 0)?, get(row, 1)?);
        let (namespace, key): (Option<String>, Option<String>) = (get(row, 2)?, get(row, 3)?);
        let permits: Option<i32> = get(row, 4)?;
        let (is_so, has_era): (Option<bool>, Option<bool>) = (get(row, 5)?, get(row, 6)?);
        let permit = permit.map(i32::cast_unsigned);
        Ok(Answered::With(match (namespace.zip(key), permits, permit, token) {
            (Some((namespace, key)), ..) => Answer::Collision { other: format!("{namespace}:{key}") },
            (None, Some(theirs), ..) if is_so != Some(true) => Answer::OtherPermits { theirs },
            (None, Some(_), Some(_), Some(_)) => {
                self.memory.leased = Some(Leased { key: request.key, shape: request.shape(), token, permit });
                Answer::Granted { token, permit }
            }
            (None, Some(_), None, _) if has_era == Some(true) => Answer::Busy,
            (None, Some(_), ..) => return Ok(Answered::Tokenless),
            (None, None, ..) => {
                self.agree(&[request], by)?;
                return Ok(Answered::Tokenless);
            }
        }))
    }

    /// Says how many permits there are, where nobody has before.
    pub(super) fn agree(&mut self, requests: &[&Request], by: Instant) -> Result<(), Failure> {
        let Some(first) = requests.first() else { return Ok(()) };
        self.run(Verb::Agree, first.shape(), &Semaphores::of(requests).parameters(), by).map(drop)
    }

    /// Whether tokens are drawn.
    fn has_era(&mut self, by: Instant) -> Result<bool, Failure> {
        let row = self.simple_query(&self.schema.apply(sql::HAS_ERA), by)?;
        Ok(row.is_some_and(|row| row.try_get(0).is_ok_and(|has| has == Some("t"))))
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
        let shape = request.shape().bare();
        let key = self.memory.leased.map_or(request.key, |leased| leased.held());
        let verb = if stays { Verb::UnlockOnly } else { Verb::Unlock };
        let rows = self.run(verb, shape, &[(&key.id(), Type::INT8)], by)?;
        self.memory.begin_anew();
        if !stays {
            self.memory.leased = None;
        }
        only(&rows)?.try_get(0).map_err(Failure::of)
    }

    /// Whether the newest term of the key is the one with this `token`, as the catalog knows.
    pub(crate) fn is_newest_term(
        &mut self,
        request: &Request,
        token: i64,
        by: Instant,
    ) -> Result<bool, Failure> {
        let Some(Entry { namespace, key, .. }) = &request.entry else { return Ok(false) };
        let statement = self.schema.apply(sql::IS_NEWEST_TERM);
        let (id, pair) = (request.key.id(), request.key.is_pair());
        let rows = self.query(
            &statement,
            &[&id, &pair, namespace, key, &token, &(request.mode == Mode::Shared)],
            by,
        )?;
        only(&rows)?.try_get(0).map_err(Failure::of)
    }

    /// Leaves the session without any lock, lease and name; whether the server has none of the `lost` backends any more.
    pub(crate) fn settle(&mut self, lost: &[i32], by: Instant) -> Result<bool, Failure> {
        let row = self.simple_query(&sql::settle(lost), by)?;
        self.memory.begin_anew();
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
        self.run_for(SHORT_ANSWER, verb, shape, parameters, by)
    }

    /// As [`run`](Self::run), for an answer of at most `bytes`.
    pub(super) fn run_for(
        &mut self,
        bytes: u64,
        verb: Verb,
        shape: Shape,
        parameters: &[(&(dyn ToSql + Sync), Type)],
        by: Instant,
    ) -> Result<Vec<Row>, Failure> {
        let known = self.memory.prepared.iter().position(|(name, _)| *name == (verb, shape));
        let Some(index) = known else {
            let text = self.schema.apply(&sql::statement(verb, shape));
            self.memory.prepared.push(((verb, shape), None));
            return self.wire.call_for(bytes, by, |client| client.query_typed(&text, parameters));
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
        self.wire.call_for(bytes, by, |client| client.query(&statement, &values))
    }
}

/// The row of a statement that gives one whatever happens. A server that does not is none that can keep locks.
fn only(rows: &[Row]) -> Result<&Row, Failure> {
    rows.first().ok_or(Failure::Lost { reason: LossReason::ServerError, cause: None })
}

pub(super) fn get<'a, T: postgres::types::FromSql<'a>>(row: &'a Row, column: usize) -> Result<T, Failure> {
    row.try_get(column).map_err(Failure::of)
}

/// The end of a slice by its timeout, or by a cancel: ours, or an operator's, who then only made the slice shorter.
fn is_end_of_wait(error: &postgres::Error) -> bool {
    matches!(error.code(), Some(&SqlState::LOCK_NOT_AVAILABLE | &SqlState::QUERY_CANCELED))
}
