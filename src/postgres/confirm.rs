//! What must be confirmed before a lock or a heartbeat counts: that the standbys still follow the server, and that the server was not stopping
//! when it granted the lock. One claim asks, for all claims of the manager that wait.

use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde_json::Value;

use crate::clock::Moment;
use crate::error::ErrorKind;
use crate::loss::LossReason;
use crate::pg::knocks::{Knocks, Look};
use crate::pg::quorum::{Confirmations, Follower, Part, Unnamed, named_standbys, obstacle};
use crate::pg::session::open::Session;
use crate::pg::session::refusal::Refusal;
use crate::pg::session::wire::Failure;
use crate::pg::sql;

/// Sees that the standbys can confirm on this server, and which they are; refuses with advice where they cannot.
pub(crate) fn may_confirm(session: &mut Session, by: Instant) -> Result<Vec<String>, Refusal> {
    let row = session.simple_query(sql::MAY_CONFIRM, by).map_err(Refusal::from_failure)?;
    let column = |index| row.as_ref().and_then(|row| row.try_get(index).ok().flatten());
    let lacks = |index| column(index) != Some("t");
    let setting = column(0).unwrap_or_default();
    let refused = |message: String| Refusal::new(ErrorKind::SessionRefused, message);
    let names = named_standbys(setting).map_err(|unnamed| refused(says_not_who(setting, unnamed)))?;
    if lacks(1) {
        return Err(refused(
            "the role may not see how far the standbys are, which are to confirm heartbeats; grant it: GRANT pg_read_all_stats TO the role; \
             or set Config::quorum to Quorum::Server"
                .to_owned(),
        ));
    }
    if lacks(2) {
        return Err(refused(
            "the role may not write the record that the standbys are to confirm; grant it EXECUTE on the functions \
             pg_logical_emit_message; or set Config::quorum to Quorum::Server"
                .to_owned(),
        ));
    }
    Ok(names)
}

/// As [`may_confirm`], for a report: also what is in the way, if anything is.
pub(crate) fn look(session: &mut Session, by: Instant) -> Result<(Vec<String>, Option<String>), Refusal> {
    let names = may_confirm(session, by)?;
    let row = session.simple_query(&sql::look_at_standbys("0/0"), by).map_err(Refusal::from_failure)?;
    let seen = row.as_ref().and_then(|row| row.try_get(1).ok().flatten()).unwrap_or_default();
    let obstacle = obstacle(&names, &followers(seen));
    Ok((names, obstacle))
}

/// Why the server's setting does not say who must confirm, and what to change.
fn says_not_who(setting: &str, unnamed: Unnamed) -> String {
    let problem = match unnamed {
        Unnamed::Nobody => "is empty, so there is no standby that could confirm heartbeats",
        Unnamed::Anybody => {
            "has an asterisk, so the server goes on with any standby when one of them was promoted, and none is known that must confirm"
        }
        Unnamed::Unreadable => "is in a form that is not known here",
    };
    format!(
        "synchronous_standby_names {problem} ({setting:?}); name each standby there that may take the server's place, or set Config::quorum \
         to Quorum::Server"
    )
}

/// For how long to wait.
pub(crate) struct Wait<F> {
    /// At the latest until then.
    pub(crate) until: Instant,
    /// Not any longer when it says so.
    pub(crate) leaves: F,
    /// It may say so all the time, since others use the session. What is about to come is waited for, then.
    pub(crate) is_called_often: bool,
    /// How long the server may take to answer. A statement that has begun before `until` is given that, since a session is of no use any
    /// more whose answer is not waited for.
    pub(crate) patience: Duration,
}

impl<F> Wait<F> {
    fn answer_by(&self) -> Instant {
        Instant::now() + self.patience
    }

    /// Repeats a statement that somebody's cancel request has hit, which says nothing of the session.
    fn until_not_cancelled<T>(
        &self,
        mut run: impl FnMut(Instant) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        loop {
            match run(self.answer_by()) {
                Err(Failure::Refused(error)) if is_cancelled(&error) && Instant::now() < self.until => {}
                outcome => return outcome,
            }
        }
    }
}

/// What came of it.
pub(crate) enum Outcome {
    Confirmed,
    /// It is not confirmed yet, for this reason.
    Missing(Refusal),
    /// The claim does not want to wait for it any longer.
    Left,
}

/// Waits until the standbys have confirmed what was sent at `sent` on this session, for as long as `wait` says; one session asks for all. The
/// server must answer each statement within its patience.
///
/// It waits with short pauses, for the reason of [`see_open`].
pub(crate) fn confirm(
    session: &mut Session,
    confirmations: &Mutex<Confirmations>,
    sent: Moment,
    wait: &Wait<impl Fn() -> bool>,
) -> Result<Outcome, Failure> {
    const SHORTEST: Duration = Duration::from_micros(100);
    const LONGEST: Duration = Duration::from_millis(5);
    let run = run_of(session)?;
    let mut pause = SHORTEST;
    loop {
        let part = confirmations.lock().part(&run, sent, Moment::now());
        match part {
            Part::Given => return Ok(Outcome::Confirmed),
            Part::Ask => return ask(session, confirmations, &run, wait),
            Part::Wait => {}
        }
        if (wait.leaves)() {
            return Ok(Outcome::Left);
        }
        if Instant::now() >= wait.until {
            return Ok(missing(confirmations.lock().obstacle(&run)));
        }
        listen(session, wait)?;
        thread::sleep(pause);
        pause = (2 * pause).min(LONGEST);
    }
}

/// Sees that the server had not begun to stop when it granted what this session holds, the last of it before `granted`: by a newcomer at the
/// same address, which it would refuse then.
///
/// A server that stops ends its sessions one after the other, and may grant the lock of one that it has ended to another, which it ends next.
/// Before it ends the first it refuses new ones: <https://www.postgresql.org/docs/current/server-shutdown.html>. The session must answer
/// once more after that, since the newcomer may have met a server that has stopped and started meanwhile.
///
/// A newcomer takes as long as the server takes to let one in, `connect_timeout` at the most. It goes on when the claim has left, for the next look.
///
/// It waits with short pauses, and not on a condition variable: a process may be forked meanwhile.
pub(crate) fn see_open(
    session: &mut Session,
    knocks: &Mutex<Knocks>,
    granted: Instant,
    connect_timeout: Duration,
    wait: &Wait<impl Fn() -> bool>,
) -> Result<Outcome, Failure> {
    const SHORTEST: Duration = Duration::from_micros(100);
    const LONGEST: Duration = Duration::from_millis(5);
    /// A claim is told so soon that it waits, when a newcomer was refused.
    const PATIENCE: Duration = Duration::from_millis(250);
    let run = run_of(session)?;
    let soon = wait.until.min(Instant::now() + PATIENCE);
    let mut pause = SHORTEST;
    loop {
        let look = knocks.lock().look(&run, granted, Instant::now());
        let stays = match look {
            Look::Open => {
                session.heartbeat(wait.answer_by())?;
                return Ok(Outcome::Confirmed);
            }
            Look::Knock => {
                let began = Instant::now();
                let outcome = session.knock(began + connect_timeout);
                knocks.lock().set_out(&run, began, outcome);
                false
            }
            Look::Wait { answered_within } => wait.is_called_often && !answered_within.is_zero(),
        };
        if (wait.leaves)() && !stays {
            return Ok(Outcome::Left);
        }
        let now = Instant::now();
        if now >= soon
            && let Some(said) = knocks.lock().said(&run)
        {
            return Ok(missing(said));
        }
        if now >= wait.until {
            return Ok(missing(SILENT.to_owned()));
        }
        listen(session, wait)?;
        thread::sleep(pause);
        pause = (2 * pause).min(LONGEST);
    }
}

const SILENT: &str = "the server has granted the lock, and does not answer newcomers, by which it would show that it is not stopping";

/// Which run of the server this is.
fn run_of(session: &Session) -> Result<String, Failure> {
    let run = session.server_run().map(str::to_owned);
    run.ok_or(Failure::Lost { reason: LossReason::ServerError, cause: None })
}

fn has_news(session: &Session) -> bool {
    session.is_over() || session.socket().is_some_and(|socket| socket.has_news())
}

/// Hears what the server has said meanwhile, since nobody else looks at the session.
fn listen(session: &mut Session, wait: &Wait<impl Fn() -> bool>) -> Result<(), Failure> {
    if has_news(session) {
        session.listen(wait.answer_by())?;
    }
    Ok(())
}

/// However asking ends, the next one may ask.
struct Asking<'a> {
    confirmations: &'a Mutex<Confirmations>,
    run: &'a str,
    /// When it began, if it is confirmed.
    began: Option<Moment>,
}

impl<'a> Asking<'a> {
    fn new(confirmations: &'a Mutex<Confirmations>, run: &'a str) -> Self {
        Self { confirmations, run, began: None }
    }
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        self.confirmations.lock().end(self.run, self.began);
    }
}

/// Asks the standbys, for whoever waits.
fn ask(
    session: &mut Session,
    confirmations: &Mutex<Confirmations>,
    run: &str,
    wait: &Wait<impl Fn() -> bool>,
) -> Result<Outcome, Failure> {
    const SHORTEST: Duration = Duration::from_micros(200);
    const LONGEST: Duration = Duration::from_millis(20);
    let mut asking = Asking::new(confirmations, run);
    let began = Moment::now();
    let place = wait
        .until_not_cancelled(|by| session.last_row(sql::WRITE_RECORD, by))?
        .and_then(|row| row.try_get(0).ok().flatten().map(str::to_owned));
    let Some(place) = place else {
        return Err(Failure::Lost { reason: LossReason::ServerError, cause: None });
    };
    let look = sql::look_at_standbys(&place);
    let mut pause = SHORTEST;
    loop {
        // A look of its own, after the record: what the server says in one message it has read before.
        let row = wait.until_not_cancelled(|by| session.simple_query(&look, by))?;
        let column = |index| row.as_ref().and_then(|row| row.try_get(index).ok().flatten());
        let setting = column(0).unwrap_or_default();
        let problem = match named_standbys(setting) {
            Ok(names) => obstacle(&names, &followers(column(1).unwrap_or_default())),
            Err(unnamed) => Some(says_not_who(setting, unnamed)),
        };
        let Some(problem) = problem else {
            asking.began = Some(began);
            return Ok(Outcome::Confirmed);
        };
        let problem = format!(
            "the standbys have not confirmed a heartbeat: {problem}; see pg_stat_replication, and start each standby that \
             synchronous_standby_names names, or take it out there if it cannot be promoted"
        );
        confirmations.lock().heard_of(run, problem.clone(), Moment::now());
        if (wait.leaves)() {
            return Ok(Outcome::Left);
        }
        thread::sleep(pause);
        pause = (2 * pause).min(LONGEST);
        if Instant::now() >= wait.until {
            return Ok(missing(problem));
        }
    }
}

fn missing(obstacle: String) -> Outcome {
    Outcome::Missing(Refusal::new(ErrorKind::SessionUnavailable, obstacle))
}

fn is_cancelled(error: &postgres::Error) -> bool {
    error.code() == Some(&postgres::error::SqlState::QUERY_CANCELED)
}

/// The standbys in the server's answer.
fn followers(answer: &str) -> Vec<Follower> {
    let listed: Vec<Value> = serde_json::from_str(answer).unwrap_or_default();
    let follower = |value: &Value| {
        let (name, has_it) = (value.get(0)?.as_str()?.to_owned(), value.get(1)?.as_bool()?);
        Some(Follower { name, has_it })
    };
    listed.iter().filter_map(follower).collect()
}
