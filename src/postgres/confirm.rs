//! What must be confirmed before a lock or a heartbeat counts: that the standbys still follow the server, and that the server was not stopping
//! when it granted the lock. One claim asks, for all claims of the manager that wait.

use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde_json::Value;

use crate::clock::Moment;
use crate::error::ErrorKind;
use crate::loss::LossReason;
use crate::pg::quorum::{Confirmations, Follower, Lsn, Part, Unnamed, named_standbys, obstacle};
use crate::pg::session::open::Session;
use crate::pg::session::refusal::Refusal;
use crate::pg::session::wire::Failure;
use crate::pg::sql;
use crate::pg::stop_probe::{Look, StopProbes};

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

/// As [`may_confirm`], for a report: also what is in the way, if anything is. For that it has a record confirmed, for which the standbys have as
/// much time as for a heartbeat; one that is not there is told of at once.
pub(crate) fn look(
    session: &mut Session,
    by: Instant,
    answer_within: Duration,
) -> Result<(Vec<String>, Option<String>), Refusal> {
    /// Nobody else has these confirmations.
    const RUN: &str = "";
    const PAUSE: Duration = Duration::from_millis(5);
    let names = may_confirm(session, by)?;
    let row = session.simple_query(sql::LOOK_AT_STANDBYS, by).map_err(Refusal::from_failure)?;
    let seen = row.as_ref().and_then(|row| row.try_get(1).ok().flatten()).unwrap_or_default();
    if let Some(absent) = obstacle(&names, &followers(seen), Lsn::FIRST) {
        return Ok((names, Some(absent)));
    }
    let (confirmations, begun, since) = (Mutex::default(), Moment::now(), Instant::now());
    let wait = Wait { since, by: since + answer_within, leaves: || false, answer_within };
    while since.elapsed() < answer_within {
        ask(session, &confirmations, RUN, [begun; 2], &wait).map_err(Refusal::from_failure)?;
        if confirmations.lock().given(RUN).is_some() {
            return Ok((names, None));
        }
        thread::sleep(PAUSE);
    }
    let obstacle = confirmations.lock().obstacle(RUN);
    Ok((names, Some(obstacle.unwrap_or_else(|| NOT_ASKED.to_owned()))))
}

/// Why the server's setting does not say who must confirm, and what to change.
fn says_not_who(setting: &str, unnamed: Unnamed) -> String {
    let problem = match unnamed {
        Unnamed::Nobody => "is empty, so there is no standby that could confirm heartbeats",
        Unnamed::Anybody => "has an asterisk, which does not say which standbys must confirm",
        Unnamed::Unreadable => "is in a form that is not known here",
    };
    format!(
        "synchronous_standby_names {problem} ({setting:?}); name each standby there that may take the server's place, or set Config::quorum \
         to Quorum::Server"
    )
}

/// For how long to wait.
pub(crate) struct Wait<F> {
    /// When the wait began. What is in the way is told after `answer_within`, and a refusal sooner.
    pub(crate) since: Instant,
    /// When the wait ends.
    pub(crate) by: Instant,
    /// Returns true if the claim must stop waiting.
    pub(crate) leaves: F,
    /// How long the server may take to answer. A statement that has begun before `by` is given that, since a session is of no use any
    /// more whose answer is not waited for.
    pub(crate) answer_within: Duration,
}

impl<F> Wait<F> {
    fn answer_by(&self) -> Instant {
        Instant::now() + self.answer_within
    }

    /// Repeats a statement that somebody's cancel request has hit, which says nothing of the session.
    fn until_not_cancelled<T>(
        &self,
        mut run: impl FnMut(Instant) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        loop {
            match run(self.answer_by()) {
                Err(Failure::Refused(error)) if is_cancelled(&error) && Instant::now() < self.by => {}
                outcome => return outcome,
            }
        }
    }
}

/// What is to be confirmed: when the first of the heartbeats was sent that wait for that, and when the first of the locks was granted; and when
/// the last of all was.
pub(crate) struct Wanted {
    pub(crate) sent: Option<Moment>,
    pub(crate) granted: Option<Moment>,
    pub(crate) last: Moment,
}

impl Wanted {
    /// Whether nothing of it is to be confirmed any more.
    pub(crate) fn is_confirmed(&self, followed: Option<Moment>, open: Option<Moment>) -> bool {
        self.sent.is_none_or(|sent| followed >= Some(sent))
            && self.granted.is_none_or(|granted| followed.min(open) >= Some(granted))
    }

    /// The first of those that came after `followed`.
    fn after(&self, followed: Option<Moment>) -> Option<Moment> {
        [self.sent, self.granted].into_iter().flatten().filter(|at| followed.is_none_or(|it| it < *at)).min()
    }
}

/// By what it is confirmed.
pub(crate) struct Confirmers<'a> {
    /// The standbys, if they are asked.
    pub(crate) standbys: Option<&'a Mutex<Confirmations>>,
    /// The probes that see whether the server stops, if they are sent for what was granted.
    pub(crate) probes: Option<&'a Mutex<StopProbes>>,
    pub(crate) connect_timeout: Duration,
}

/// What came of it.
pub(crate) enum Outcome {
    /// `followed`: the latest time at which all standbys are known to have followed the server. `open`: the latest time at which the server is known
    /// not to have been stopping. What is not asked for counts as now. One of the two that are wanted came before.
    Confirmed { followed: Option<Moment>, open: Option<Moment> },
    /// Neither is confirmed yet, for this reason.
    Missing(Refusal),
    /// The claim does not want to wait for it any longer, or the time is up.
    Left,
}

/// Waits until one of the two that are wanted is confirmed, for as long as `wait` says; one session asks for all. The server must answer each
/// statement within `answer_within`.
///
/// That a server is not stopping is seen by a probe, a new connection to the same address, which it would refuse then. A server that stops ends its sessions one
/// after the other, and may grant the lock of one that it has ended to another, which it ends next.
/// Before it ends the first it refuses new ones: <https://www.postgresql.org/docs/current/server-shutdown.html>. The session must answer
/// once more after that, since the probe may have met a server that has stopped and started meanwhile.
///
/// A probe takes as long as the server takes to let one in, `connect_timeout` at the most. It goes on when the claim has left, for the next look;
/// and so does the record that the standbys are to have.
///
/// It waits with short pauses, and not on a condition variable: a process may be forked meanwhile.
pub(crate) fn confirm(
    session: &mut Session,
    confirmers: &Confirmers<'_>,
    wanted: &Wanted,
    wait: &Wait<impl Fn() -> bool>,
) -> Result<Outcome, Failure> {
    const SHORTEST: Duration = Duration::from_micros(100);
    const LONGEST: Duration = Duration::from_millis(5);
    let run = run_of(session)?;
    let mut pause = SHORTEST;
    loop {
        let followed = confirmers.followed(session, &run, wanted, wait)?;
        let open = confirmers.open(session, &run, wanted.granted);
        let is_confirmed = |at: Option<Moment>, by: Option<Moment>| at.is_some() && by >= at;
        let is_granted = is_confirmed(wanted.granted, followed.min(open));
        if is_granted && confirmers.probes.is_some() {
            session.heartbeat(wait.answer_by())?;
        }
        if is_granted || is_confirmed(wanted.sent, followed) {
            return Ok(Outcome::Confirmed { followed, open });
        }
        if let Some(obstacle) = confirmers.obstacle(&run, wanted.after(followed).is_some(), wait) {
            return Ok(Outcome::Missing(Refusal::new(ErrorKind::SessionUnavailable, obstacle)));
        }
        if (wait.leaves)() || Instant::now() >= wait.by {
            return Ok(Outcome::Left);
        }
        listen(session, wait)?;
        thread::sleep(pause);
        pause = (2 * pause).min(LONGEST);
    }
}

impl Confirmers<'_> {
    /// Asks the standbys, for whoever waits. When they are known to have followed the server the last time.
    fn followed(
        &self,
        session: &mut Session,
        run: &str,
        wanted: &Wanted,
        wait: &Wait<impl Fn() -> bool>,
    ) -> Result<Option<Moment>, Failure> {
        let Some(confirmations) = self.standbys else { return Ok(Some(Moment::now())) };
        let given = || confirmations.lock().given(run);
        if let Some(first) = wanted.after(given()) {
            ask(session, confirmations, run, [first, wanted.last], wait)?;
        }
        Ok(given())
    }

    /// Sends a probe if need be, for whoever waits. When the server is known to have let one in the last time.
    fn open(&self, session: &Session, run: &str, granted: Option<Moment>) -> Option<Moment> {
        let Some(probes) = self.probes else { return Some(Moment::now()) };
        let look = probes.lock().look(run, granted?, Instant::now());
        match look {
            Look::Open(began) => Some(began),
            Look::Probe => {
                let began = Moment::now();
                let outcome = session.probe_stop(Instant::now() + self.connect_timeout);
                probes.lock().sent(run, began, outcome);
                None
            }
            Look::Wait => None,
        }
    }

    /// What is in the way of the standbys, or else of probes, if it is time to tell.
    fn obstacle(&self, run: &str, lacks_standbys: bool, wait: &Wait<impl Fn() -> bool>) -> Option<String> {
        /// One that was refused may have come in the midst of a crash.
        const WORTH_TELLING: Duration = Duration::from_millis(250);
        let waited = wait.since.elapsed();
        let is_silent = waited >= wait.answer_within;
        match (self.standbys, self.probes) {
            (Some(confirmations), _) if lacks_standbys => {
                let obstacle = is_silent.then(|| confirmations.lock().obstacle(run))?;
                Some(obstacle.map_or_else(|| NOT_ASKED.to_owned(), |obstacle| {
                    format!("the standbys have not confirmed a heartbeat: {obstacle}; see pg_stat_replication, and {START_IT}")
                }))
            }
            (_, Some(probes)) if is_silent || waited >= WORTH_TELLING => {
                let refusal = probes.lock().refusal(run);
                refusal.or_else(|| is_silent.then(|| SILENT.to_owned()))
            }
            _ => None,
        }
    }
}

/// What to do about a standby that does not confirm.
pub(crate) const START_IT: &str = "start each standby that synchronous_standby_names names, or take it out there if it cannot be promoted; if one was \
     promoted, the locks are on that one, and this server must not go on as a primary";

const NOT_ASKED: &str =
    "the standbys have not confirmed a heartbeat: the session that asks them has no answer";

const SILENT: &str = "the server has granted the lock, and does not answer new connections, by which it would show that it is not stopping";

/// Which run of the server this is.
fn run_of(session: &Session) -> Result<String, Failure> {
    let run = session.server_run().map(str::to_owned);
    run.ok_or(Failure::Lost { reason: LossReason::ServerError, cause: None })
}

fn is_readable(session: &Session) -> bool {
    session.is_over() || session.socket().is_some_and(|socket| socket.is_readable())
}

/// Hears what the server has said meanwhile, since nobody else looks at the session.
fn listen(session: &mut Session, wait: &Wait<impl Fn() -> bool>) -> Result<(), Failure> {
    if is_readable(session) {
        session.listen(wait.answer_by())?;
    }
    Ok(())
}

/// However asking ends, the next one may ask.
struct Asking<'a> {
    confirmations: &'a Mutex<Confirmations>,
    run: &'a str,
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        self.confirmations.lock().end(self.run);
    }
}

/// Asks the standbys for a confirmation that begins after the first of these moments, and for one that begins after the last; one step of that,
/// if no other session is at it.
fn ask(
    session: &mut Session,
    confirmations: &Mutex<Confirmations>,
    run: &str,
    [first, last]: [Moment; 2],
    wait: &Wait<impl Fn() -> bool>,
) -> Result<(), Failure> {
    let part = confirmations.lock().part(run, first, last, Moment::now());
    if matches!(part, Part::Given | Part::Wait) {
        return Ok(());
    }
    let _asking = Asking { confirmations, run };
    if part == Part::Write {
        let began = Moment::now();
        let place = wait
            .until_not_cancelled(|by| session.last_row(sql::WRITE_RECORD, by))?
            .and_then(|row| Lsn::parse(row.try_get(0).ok().flatten()?));
        let place = place.ok_or(Failure::Lost { reason: LossReason::ServerError, cause: None })?;
        confirmations.lock().written(run, began, place);
    }
    // A look of its own, after the record: what the server says in one message it has read before.
    let row = wait.until_not_cancelled(|by| session.simple_query(sql::LOOK_AT_STANDBYS, by))?;
    let column = |index| row.as_ref().and_then(|row| row.try_get(index).ok().flatten());
    let (setting, followers) = (column(0).unwrap_or_default(), followers(column(1).unwrap_or_default()));
    let names = named_standbys(setting);
    let obstacle = |place| match &names {
        Ok(names) => obstacle(names, &followers, place),
        Err(unnamed) => Some(says_not_who(setting, *unnamed)),
    };
    confirmations.lock().seen(run, obstacle, Moment::now());
    Ok(())
}

fn is_cancelled(error: &postgres::Error) -> bool {
    error.code() == Some(&postgres::error::SqlState::QUERY_CANCELED)
}

/// The standbys in the server's answer.
fn followers(answer: &str) -> Vec<Follower> {
    let listed: Vec<Value> = serde_json::from_str(answer).unwrap_or_default();
    let follower = |value: &Value| {
        let flushed = value.get(1)?.as_str().and_then(Lsn::parse);
        Some(Follower { name: value.get(0)?.as_str()?.to_owned(), flushed })
    };
    listed.iter().filter_map(follower).collect()
}
