//! What is asked of a session that carries many claims: to take locks and to give others back, many in one statement.

use std::thread;
use std::time::{Duration, Instant};

use postgres::types::{ToSql, Type};

use crate::key::AdvisoryKey;
use crate::loss::LossReason;
use crate::mode::Mode;
use crate::pg::session::locks::{get, pauses_of_a_reader};
use crate::pg::session::open::Session;
use crate::pg::session::wire::Failure;
use crate::pg::sql::{self, Entry, OpCode, Request, Shape, Verb};

/// What is to be done with the lock of one claim, whose key is that of its request, or of one permit of that.
#[derive(Clone, Copy, Debug)]
pub(crate) enum LockOp<'a> {
    /// Take it, if it is free. The row of its term is written with this annotation.
    Take { key: AdvisoryKey, request: &'a Request, annotation: Option<&'a [u8]> },
    /// Give it back.
    Give { key: AdvisoryKey, request: &'a Request },
}

/// What has come of a [`LockOp`].
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Done {
    /// The lock is this session's; the token, if there is a catalog.
    Granted { token: Option<i64> },
    /// Another session has the lock, or waits for it, or has a fenced transaction open that a former term began. This one has nothing.
    Busy,
    /// The catalog has another key under this number. This session has nothing.
    Collision { other: String },
    /// It was given back, and had been held or not.
    Given { held: bool },
    /// The semaphore has another number of permits than the caller says. This session has nothing.
    OtherPermits { theirs: i32 },
    /// The permit that was found is another claim's of this session by now. There may be another one.
    Missed,
}

impl LockOp<'_> {
    fn lock(&self) -> (AdvisoryKey, &Request) {
        match self {
            Self::Take { key, request, .. } | Self::Give { key, request } => (*key, request),
        }
    }

    /// What the statement is told where there is no row to write.
    fn op_code(&self) -> Option<i16> {
        let (key, request) = self.lock();
        let shared = request.mode == Mode::Shared;
        let code = match self {
            Self::Take { .. } if request.entry.is_some() => return None,
            Self::Take { .. } if shared => OpCode::TakeShared,
            Self::Take { .. } => OpCode::Take,
            Self::Give { .. } if shared => OpCode::GiveShared,
            Self::Give { .. } => OpCode::Give,
        };
        Some(code as i16 + if key.is_pair() { sql::PAIR } else { 0 })
    }
}

/// The longest answer to a batch: a row of some hundred bytes for each of its locks, of which there are some thousands.
const LONGEST_ANSWER: u64 = 4 << 20;

impl Session {
    /// Makes it one that carries claims: gives it its name, and the `witness`, a lock of its own by which its heartbeats see that it has what
    /// it took.
    pub(crate) fn begin_carrying(&mut self, name: &str, witness: i64, by: Instant) -> Result<(), Failure> {
        let row = self.simple_query(&sql::begin_carrying(name, witness), by)?;
        if !row.is_some_and(|row| row.try_get(0).is_ok_and(|taken| taken == Some("t"))) {
            return Err(Failure::Lost { reason: LossReason::SessionChanged, cause: None });
        }
        self.set_leased_lock(AdvisoryKey::Single(witness), Shape::plain(false));
        Ok(())
    }

    /// Puts the lease on it; `None` takes it off. No statement waits for a lock of a table for longer than `longest_wait`.
    pub(crate) fn set_lease(
        &mut self,
        lease: Option<Duration>,
        longest_wait: Duration,
        by: Instant,
    ) -> Result<(), Failure> {
        let lease = lease.map_or(0, |lease| lease.as_millis());
        self.simple_query(&sql::set_lease(lease, longest_wait.as_millis().max(1)), by).map(drop)
    }

    /// Takes locks and gives others back; what came of each, in the same order. No number may be there twice, or be taken that this session
    /// has. It waits for nobody. After a [refusal](Failure::Refused) nothing is known of these locks: the server keeps what it took before.
    ///
    /// Where the era of tokens is gone, it says so to `no_era` and begins a new one, for which it may wait for a standby until `by`.
    pub(crate) fn carry(
        &mut self,
        ops: &[LockOp<'_>],
        by: Instant,
        no_era: impl FnOnce(),
    ) -> Result<Vec<Done>, Failure> {
        let Carried { mut done, has_era, mut late } = self.carry_once(ops, by)?;
        if !has_era {
            // Somebody has rewritten the catalog. What was to have a token has been given back.
            no_era();
            self.new_era(by)?;
            let busy = |place: &usize| ops[*place].op_code().is_none() && done[*place] == Done::Busy;
            late = (0..ops.len()).filter(busy).collect();
        }
        // Others' statements on this session wait for these looks.
        for pause in pauses_of_a_reader(by) {
            if late.is_empty() {
                break;
            }
            thread::sleep(pause);
            let again: Vec<_> = late.iter().map(|place| ops[*place]).collect();
            let now = self.carry_once(&again, by)?;
            for (place, now) in late.iter().zip(now.done) {
                done[*place] = now;
            }
            late = now.late.into_iter().map(|place| late[place]).collect();
        }
        Ok(done)
    }

    /// The same, by one statement.
    fn carry_once(&mut self, ops: &[LockOp<'_>], by: Instant) -> Result<Carried, Failure> {
        let (mut ids, mut codes) = (Vec::new(), Vec::new());
        let mut terms = TermColumns::default();
        // Where the answer to each op stands; those with a row come behind the others.
        let mut places = Vec::with_capacity(ops.len());
        for op in ops {
            match op.op_code() {
                Some(code) => {
                    places.push((false, ids.len()));
                    ids.push(op.lock().0.id());
                    codes.push(code);
                }
                None => {
                    places.push((true, terms.ids.len()));
                    terms.push(op);
                }
            }
        }
        let shape = Shape { catalog: !terms.ids.is_empty(), ..Shape::plain(false) };
        let TermColumns { ids: term_ids, pairs, shared, namespaces, keys, annotations } = &terms;
        let mut parameters: Vec<(&(dyn ToSql + Sync), Type)> =
            vec![(&ids, Type::INT8_ARRAY), (&codes, Type::INT2_ARRAY)];
        if shape.catalog {
            parameters.extend::<[(&(dyn ToSql + Sync), Type); 6]>([
                (term_ids, Type::INT8_ARRAY),
                (pairs, Type::BOOL_ARRAY),
                (shared, Type::BOOL_ARRAY),
                (namespaces, Type::TEXT_ARRAY),
                (keys, Type::TEXT_ARRAY),
                (annotations, Type::BYTEA_ARRAY),
            ]);
        }
        let rows = self.run_for(LONGEST_ANSWER, Verb::Batch, shape, &parameters, by)?;
        let mut answers: Vec<Option<Answered>> = (0..ops.len()).map(|_| None).collect();
        let mut has_era = true;
        for row in &rows {
            let place: i64 = row.try_get(0).map_err(Failure::of)?;
            let mut answer = Answered {
                done: row.try_get(1).map_err(Failure::of)?,
                token: None,
                other: None,
                late: false,
            };
            if shape.catalog {
                let namespace: Option<String> = row.try_get(3).map_err(Failure::of)?;
                let key: Option<String> = row.try_get(4).map_err(Failure::of)?;
                answer.token = row.try_get(2).map_err(Failure::of)?;
                answer.other = namespace.zip(key);
                has_era &= row.try_get::<_, bool>(5).map_err(Failure::of)?;
                answer.late = row.try_get(6).map_err(Failure::of)?;
            }
            let place = usize::try_from(place).ok().and_then(|place| place.checked_sub(1));
            if let Some(slot) = place.and_then(|place| answers.get_mut(place)) {
                *slot = Some(answer);
            }
        }
        let mut carried = Carried { done: Vec::with_capacity(ops.len()), has_era, late: Vec::new() };
        for (number, (op, (is_term, place))) in ops.iter().zip(places).enumerate() {
            let answer = answers[place + if is_term { ids.len() } else { 0 }].take();
            let Answered { done, token, other, late } = answer.ok_or_else(no_answer)?;
            if late {
                carried.late.push(number);
            }
            carried.done.push(match (op, other) {
                (LockOp::Give { .. }, _) => Done::Given { held: done },
                (_, Some((namespace, key))) => Done::Collision { other: format!("{namespace}:{key}") },
                (_, None) if done => Done::Granted { token },
                _ => Done::Busy,
            });
        }
        Ok(carried)
    }

    /// Finds a permit for each of these requests, which is none of `not_these`: its key, or what has come of the request. It was free a moment
    /// ago, and is to be taken by [`carry`](Self::carry). It waits for nobody, and after a refusal the session has nothing more than before.
    pub(crate) fn find_permits(
        &mut self,
        requests: &[&Request],
        not_these: &[AdvisoryKey],
        by: Instant,
    ) -> Result<Vec<Result<AdvisoryKey, Done>>, Failure> {
        let mut found = self.find_permits_once(requests, not_these, by)?;
        let unknown: Vec<_> = (0..requests.len()).filter(|place| found[*place].is_none()).collect();
        if !unknown.is_empty() {
            let unknown_ones: Vec<_> = unknown.iter().map(|place| requests[*place]).collect();
            self.agree(&unknown_ones, by)?;
            let again = self.find_permits_once(&unknown_ones, not_these, by)?;
            for (place, again) in unknown.into_iter().zip(again) {
                found[place] = again;
            }
        }
        // Of what cannot be seen though it was written, a session of its own is to find out more.
        Ok(found.into_iter().map(|found| found.unwrap_or(Err(Done::Busy))).collect())
    }

    /// The same; `None` where nobody has said how many permits there are.
    fn find_permits_once(
        &mut self,
        requests: &[&Request],
        not_these: &[AdvisoryKey],
        by: Instant,
    ) -> Result<Vec<Option<Result<AdvisoryKey, Done>>>, Failure> {
        let Some(first) = requests.first() else { return Ok(Vec::new()) };
        let semaphores = Semaphores::of(requests);
        let not_these: Vec<_> = not_these.iter().map(|key| key.id()).collect();
        let mut parameters = semaphores.parameters().to_vec();
        parameters.push((&not_these, Type::INT8_ARRAY));
        let rows = self.run_for(LONGEST_ANSWER, Verb::FindPermits, first.shape(), &parameters, by)?;
        if rows.len() != requests.len() {
            return Err(no_answer());
        }
        let found = rows.iter().zip(requests).map(|(row, request)| {
            let (namespace, key): (Option<String>, Option<String>) = (get(row, 0)?, get(row, 1)?);
            let (theirs, permit): (Option<i32>, Option<i32>) = (get(row, 2)?, get(row, 3)?);
            let permits: Option<i32> = get(row, 4)?;
            Ok(match (namespace.zip(key), theirs, permit, permits) {
                (Some((namespace, key)), ..) => {
                    Some(Err(Done::Collision { other: format!("{namespace}:{key}") }))
                }
                (None, Some(theirs), ..) => Some(Err(Done::OtherPermits { theirs })),
                (None, None, Some(permit), _) => Some(Ok(request.key.permit(permit.cast_unsigned()))),
                (None, None, None, Some(_)) => Some(Err(Done::Busy)),
                (None, None, None, None) => None,
            })
        });
        found.collect()
    }

    /// Whether the server has none of the `lost` backends any more.
    pub(crate) fn are_gone(&mut self, lost: &[i32], by: Instant) -> Result<bool, Failure> {
        if lost.is_empty() {
            return Ok(true);
        }
        let row = self.simple_query(&sql::are_gone(lost), by)?;
        Ok(row.is_some_and(|row| row.try_get(0).is_ok_and(|gone| gone == Some("t"))))
    }

    /// Of these requests and tokens, the places of those whose token is that of the newest term of the key.
    pub(crate) fn are_newest_terms(
        &mut self,
        terms: &[(&Request, i64)],
        by: Instant,
    ) -> Result<Vec<usize>, Failure> {
        let mut asked = TermColumns::default();
        for (request, _) in terms {
            asked.push(&LockOp::Take { key: request.key, request, annotation: None });
        }
        let tokens: Vec<_> = terms.iter().map(|(_, token)| *token).collect();
        let statement = self.schema.apply(sql::ARE_NEWEST_TERMS);
        let TermColumns { ids, pairs, shared, namespaces, keys, .. } = &asked;
        let rows = self.query(&statement, &[ids, pairs, shared, namespaces, keys, &tokens], by)?;
        let place = |row: &postgres::Row| row.try_get::<_, i64>(0).map_err(Failure::of);
        rows.iter().map(|row| Ok(usize::try_from(place(row)? - 1).unwrap_or(usize::MAX))).collect()
    }
}

struct Answered {
    done: bool,
    token: Option<i64>,
    other: Option<(String, String)>,
    late: bool,
}

/// What one statement has done.
struct Carried {
    done: Vec<Done>,
    /// Whether tokens could be drawn.
    has_era: bool,
    /// The places of readers that have nothing now, and are to ask once more: others were becoming the first readers meanwhile, which takes as
    /// long as a statement.
    late: Vec<usize>,
}

/// What the statement is told of terms, a list for each column.
#[derive(Default)]
struct TermColumns<'a> {
    ids: Vec<i64>,
    pairs: Vec<bool>,
    shared: Vec<bool>,
    namespaces: Vec<&'a str>,
    keys: Vec<&'a str>,
    annotations: Vec<Option<&'a [u8]>>,
}

impl<'a> TermColumns<'a> {
    fn push(&mut self, op: &LockOp<'a>) {
        let LockOp::Take { key, request, annotation } = *op else { return };
        let Some(Entry { namespace, key: name, .. }) = &request.entry else { return };
        self.ids.push(key.id());
        self.pairs.push(key.is_pair());
        self.shared.push(request.mode == Mode::Shared);
        self.namespaces.push(namespace);
        self.keys.push(name);
        self.annotations.push(annotation);
    }
}

/// What the statements about semaphores are told, a list for each column.
pub(super) struct Semaphores<'a> {
    ids: Vec<i64>,
    namespaces: Vec<&'a str>,
    keys: Vec<&'a str>,
    permits: Vec<i32>,
}

impl<'a> Semaphores<'a> {
    pub(super) fn of(requests: &[&'a Request]) -> Self {
        let entry = |request: &&'a Request| request.entry.as_ref();
        Self {
            ids: requests.iter().map(|request| request.key.id()).collect(),
            namespaces: requests.iter().filter_map(entry).map(|entry| &*entry.namespace).collect(),
            keys: requests.iter().filter_map(entry).map(|entry| &*entry.key).collect(),
            permits: requests.iter().map(|request| request.permits).collect(),
        }
    }

    pub(super) fn parameters(&self) -> [(&(dyn ToSql + Sync), Type); 4] {
        [
            (&self.ids, Type::INT8_ARRAY),
            (&self.namespaces, Type::TEXT_ARRAY),
            (&self.keys, Type::TEXT_ARRAY),
            (&self.permits, Type::INT4_ARRAY),
        ]
    }
}

/// A server that does not answer for each is none that can keep locks.
fn no_answer() -> Failure {
    Failure::Lost { reason: LossReason::ServerError, cause: None }
}
