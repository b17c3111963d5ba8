//! Asks the database whether the server was taken over, and tells it what a manager has seen.

use std::time::{Duration, Instant};

use postgres::SimpleQueryRow;

use super::{code, is_late, no_era, patience};
use crate::clock::MachineTime;
use crate::error::ErrorKind;
use crate::loss::LossReason;
use crate::pg::session::open::Session;
use crate::pg::session::refusal::Refusal;
use crate::pg::session::wire::Failure;
use crate::pg::sql::{self, Askable};
use crate::pg::takeover::{Agreed, Agreement, Record, Run, TakeoverPolicy, Verdict, agree, judge};

/// What is known of the terms of before on the server of a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Past {
    /// All are over.
    Over { id: String },
    /// Nobody is granted a lock yet; `lasts` is how long from the first look on, which a process of this machine took so long ago as `seen` says.
    Pending { id: String, lasts: Duration, seen: Duration },
}

/// A short look whether locks may be asked for: the number of the record by which all terms of before are over, or `None` if a full look is
/// needed. With `first`, it also checks that all managers have agreed on the settings of this one. Under *immediate* it
/// checks that each time and nothing else, and the number has no meaning.
pub(crate) fn may_ask(
    session: &mut Session,
    own: Agreed,
    first: bool,
    by: Instant,
) -> Result<Option<String>, Failure> {
    let (statement, is_told) = match (own.policy, first) {
        (TakeoverPolicy::Immediate, _) => (sql::AGREED, true),
        (_, true) => (sql::ARE_TERMS_OVER_AND_AGREED, true),
        (_, false) => (sql::ARE_TERMS_OVER, false),
    };
    let row = if is_told {
        ask(session, statement, by)?
    } else {
        session.simple_query(&session.schema().apply(statement), by)?
    };
    let column = |index: usize| row.as_ref()?.try_get(index).ok().flatten().map(str::to_owned);
    if is_told && agree(own, agreed(column(1), column(2), column(3))) != Agreement::Kept {
        return Ok(None);
    }
    Ok(column(0))
}

/// What is agreed on, by the columns of a row.
fn agreed(policy: Option<String>, lease: Option<String>, quorum: Option<String>) -> Option<Agreed> {
    let (policy, lease) = (TakeoverPolicy::named(&policy?)?, lease?.parse().ok()?);
    let quorum = quorum.as_deref() == Some("t");
    Some(Agreed { policy, lease: Duration::from_millis(lease), quorum })
}

/// Compares the run of the server with the record, and writes the record where there is a new run; before that, sees that the manager's
/// settings are no weaker than what all have agreed on, and agrees on them if they are stronger. First remembers that the grace with the
/// number `waited_out` is over, if there is one.
///
/// It takes one round trip, and one for each thing that is to be written and that no other session has written: the era of tokens in this run of
/// the server, what is agreed on, and the run. The first two wait for the synchronous standbys.
pub(crate) fn look_at_past(
    session: &mut Session,
    own: Agreed,
    waited_out: Option<&str>,
    by: Instant,
) -> Result<Result<Past, Refusal>, Failure> {
    let mut look = look(session, waited_out.map(sql::mark_over), by)?;
    if !look.has_era {
        // A claim would begin it, but with its lock, which the server would keep as long as that waits for a standby.
        match session.new_era(by) {
            Err(failure) if is_late(&failure) => return Ok(Err(no_era())),
            outcome => outcome?,
        }
    }
    loop {
        let agreement = agree(own, look.agreed);
        if let (Agreement::TooWeak, Some(agreed)) = (agreement, look.agreed) {
            return Ok(Err(too_weak(session, own, agreed)));
        }
        let (verdict, seen) = (judge(own.policy, &look.run, look.record.as_ref()), look.record);
        match (agreement, look.agreed, verdict, &seen) {
            (Agreement::Kept, Some(_), Verdict::Over, Some(Record { id, .. })) => {
                return Ok(Ok(Past::Over { id: id.clone() }));
            }
            (Agreement::Kept, Some(Agreed { lease, .. }), Verdict::Pending, Some(Record { id, .. })) => {
                if let (None, Some(here)) = (look.seen, &look.here) {
                    ask(session, &sql::remember_seen(id, here), by)?;
                }
                let seen = look.seen.unwrap_or_default();
                return Ok(Ok(Past::Pending { id: id.clone(), lasts: lease, seen }));
            }
            (Agreement::Kept, Some(Agreed { lease, .. }), Verdict::Record { over }, _) => {
                let seen = seen.as_ref().map(|seen| seen.id.as_str());
                let row = ask(session, &sql::record_run(look.askable, over, seen), by)?;
                if let Some(id) = row.and_then(|row| row.try_get(0).ok().flatten().map(str::to_owned)) {
                    if over {
                        return Ok(Ok(Past::Over { id }));
                    }
                    if let Some(here) = &look.here {
                        ask(session, &sql::remember_seen(&id, here), by)?;
                    }
                    return Ok(Ok(Past::Pending { id, lasts: lease, seen: Duration::ZERO }));
                }
            }
            _ => {}
        }
        // By itself, since it may wait for a standby, and must not keep others from recording the run of the server meanwhile.
        if agreement == Agreement::Raise {
            match ask(session, &sql::agree_on(own), by) {
                Err(failure) if is_late(&failure) => return Ok(Err(not_agreed(own))),
                outcome => drop(outcome?),
            }
        }
        if Instant::now() >= by {
            return Err(Failure::Lost { reason: LossReason::HeartbeatTimedOut, cause: None });
        }
        // What another session has written meanwhile counts too, so both are looked at once more.
        look = self::look(session, None, by)?;
    }
}

fn not_agreed(own: Agreed) -> Refusal {
    Refusal::new(
        ErrorKind::SessionUnavailable,
        format!(
            "this manager has a stronger takeover policy or a longer lease ({:?}) than those of this database before it, and could not record \
             that in time: the commit waits for the synchronous standbys, so that one that is promoted knows of it; start each standby that \
             synchronous_standby_names names (see pg_stat_replication), or set policy and lease to those of the others (see the table \
             policy of the catalog); if no standby is away, see in pg_locks who has that table locked",
            own.lease
        ),
    )
}

/// What is found by somebody who takes no lock: agrees on nothing, and records nothing. `None` where nothing is agreed on, or the role may not
/// see it.
pub(crate) fn peek(session: &mut Session, by: Instant) -> Result<Option<Past>, Failure> {
    let look = match look(session, None, by) {
        Err(Failure::Refused(_)) => return Ok(None),
        look => look?,
    };
    let Some(Agreed { policy, lease: lasts, .. }) = look.agreed else { return Ok(None) };
    Ok(match (judge(policy, &look.run, look.record.as_ref()), look.record) {
        (Verdict::Pending, Some(Record { id, .. })) => {
            Some(Past::Pending { id, lasts, seen: look.seen.unwrap_or_default() })
        }
        // Nobody has recorded it yet.
        (Verdict::Record { over: false }, _) => {
            Some(Past::Pending { id: look.run.started, lasts, seen: Duration::ZERO })
        }
        (_, record) => record.map(|Record { id, .. }| Past::Over { id }),
    })
}

/// How long a takeover grace would last here, as the managers of the database have agreed; or why a manager with these settings would
/// get no lock: the others have agreed on something else, or what is agreed on has to be raised and a standby that has to confirm
/// that is away. As [`peek`].
pub(crate) fn objection(
    session: &mut Session,
    own: Agreed,
    standby_is_away: bool,
    by: Instant,
) -> Result<Result<Option<Duration>, Refusal>, Failure> {
    let look = match look(session, None, by) {
        Err(Failure::Refused(_)) => return Ok(Ok(None)),
        look => look?,
    };
    let Some(agreed) = look.agreed else { return Ok(Ok(None)) };
    Ok(match agree(own, Some(agreed)) {
        Agreement::TooWeak => Err(too_weak(session, own, agreed)),
        Agreement::Raise if standby_is_away => Err(not_agreed(own)),
        _ => Ok(Some(agreed.lease).filter(|_| agreed.policy != TakeoverPolicy::Immediate)),
    })
}

fn too_weak(session: &Session, own: Agreed, known: Agreed) -> Refusal {
    let (own, known) = match (own, known) {
        (own, known) if own.policy < known.policy => (own.policy, known.policy),
        _ => {
            let advice = session.schema().apply("UPDATE dsync.policy SET quorum = false");
            return Refusal::new(
                ErrorKind::SessionRefused,
                format!(
                    "the managers of this database have agreed that the standbys confirm heartbeats, and those of this manager are not \
                     confirmed: others could be granted its locks while it believes in them; set Config::quorum to Quorum::NamedStandbys, or DSYNC_QUORUM to named-standbys; or, when no manager \
                     wants it any longer, let an operator run: {advice}"
                ),
            );
        }
    };
    let advice = session.schema().apply(&format!("UPDATE dsync.policy SET takeover = '{}'", own.name()));
    Refusal::new(
        ErrorKind::SessionRefused,
        format!(
            "the takeover policy of this manager, {:?}, is weaker than the one that the managers of this database have agreed on, {:?}: \
             its locks would be granted while terms of others may last; set DSYNC_TAKEOVER to {} (in a program, Config::takeover to \
             TakeoverPolicy::{known:?}), or, when no manager wants it any longer, let an operator run: {advice}",
            own.name(),
            known.name(),
            known.name().replace(' ', "-")
        ),
    )
}

/// What the database says.
struct Look {
    run: Run,
    record: Option<Record>,
    agreed: Option<Agreed>,
    askable: Askable,
    /// From before the question.
    here: Option<MachineTime>,
    /// How long ago a process of this machine first saw this record, before the terms of before were over.
    seen: Option<Duration>,
    /// Tokens are drawn in this run.
    has_era: bool,
}

/// Looks, after the statements of `write`, in one transaction.
fn look(session: &mut Session, write: Option<String>, by: Instant) -> Result<Look, Failure> {
    // The session is open, so the server of before is gone.
    let here = MachineTime::now();
    let mut ask = |askable| {
        let looks = sql::look_at_run(askable, here.as_ref());
        let statements = write.as_ref().map_or(looks.clone(), |write| format!("{write}; {looks}"));
        ask(session, &statements, by)
    };
    let (row, askable) = match ask(Askable::All) {
        Err(Failure::Refused(error)) if code(&error) == "42501" => (ask(Askable::Less)?, Askable::Less),
        answer => (answer?, Askable::All),
    };
    let column = |index: usize| row.as_ref()?.try_get(index).ok().flatten().map(str::to_owned);
    let run = |first: usize| -> Option<Run> {
        Some(Run {
            base: column(first)?,
            started: column(first + 1)?,
            system: column(first + 2),
            timeline: column(first + 3),
        })
    };
    let now = run(0).ok_or(Failure::Lost { reason: LossReason::ServerError, cause: None })?;
    let record = column(4).zip(run(5)).map(|(id, run)| {
        let over = column(9).as_deref() == Some("t");
        Record { id, run, over }
    });
    let seen = here.as_ref().zip(column(13)).and_then(|(here, text)| here.since(&text));
    Ok(Look {
        run: now,
        record,
        agreed: agreed(column(10), column(11), column(12)),
        askable,
        here,
        seen,
        has_era: column(14).as_deref() == Some("t"),
    })
}

/// The last row that statements on the catalog give.
fn ask(session: &mut Session, statements: &str, by: Instant) -> Result<Option<SimpleQueryRow>, Failure> {
    let message = sql::wait_for_tables(patience(by)) + &session.schema().apply(statements);
    session.last_row(&message, by)
}
