//! Shows once for each manager that two sessions of the server are two: that nothing between serves both with one.

use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, bounded};

use super::Pool;
use crate::error::{ErrorKind, chain};
use crate::loss::LossReason;
use crate::pg::session::open::Session;
use crate::pg::session::refusal::Refusal;
use crate::pg::session::wire::Failure;
use crate::pg::sql::Probe;
use crate::pg::stream::StreamControl;
use crate::process::nonce;

impl Pool {
    /// Opens two sessions at once, and shows that they are two which exclude each other. Gives the one that obeys
    /// `control`; the other one if there can be only one.
    ///
    /// At once, since on a slow link the time is not enough for one after the other.
    pub(super) fn open_and_probe(
        &self,
        control: &StreamControl,
        by: Instant,
    ) -> std::result::Result<Session, Refusal> {
        // Each waits for the other one for half of the time that is left when it is open itself: a pooler in session mode
        // that has one session gives it to one of the two.
        let half_time = move || Instant::now() + by.saturating_duration_since(Instant::now()) / 2;
        let other_control = StreamControl::new();
        let (hand_over, others) = bounded(0);
        let opens_other = {
            let (plan, control) = (self.plan.clone(), other_control.clone());
            move || {
                let outcome = Session::open(&plan, control, by);
                // Closed if nobody wants it by then.
                let _ = hand_over.send_deadline(outcome, half_time());
            }
        };
        thread::Builder::new().name("dsync-probe".into()).spawn(opens_other).map_err(|error| {
            let message = "there is no thread for a second session, by which the server is checked; \
                           raise the limit of threads";
            Refusal::new(ErrorKind::SessionUnavailable, message.to_owned()).because(error)
        })?;
        let session = Session::open(&self.plan, control.clone(), by);
        let other = match &session {
            Err(refusal) if refusal.is_refused() => None,
            _ => await_other(&others, control, half_time()),
        };
        let Some(other) = other else {
            other_control.kill();
            return session;
        };
        control.take_along(&other_control);
        let outcome = match (session, other) {
            (Ok(session), Ok(other)) => self.probe(session, other, Instant::now() + self.connect_timeout),
            // A server that is full for a second session is no proof of anything; the next session asks again.
            (Ok(session), Err(refusal)) if refusal.is_curable() => Ok(session),
            (Ok(_), Err(refusal)) => Err(refusal),
            // Which of the two has the last place is a matter of luck.
            (Err(refusal), Ok(other)) if refusal.is_curable() && !control.is_dead() => Ok(other),
            (Err(refusal), _) => Err(refusal),
        };
        control.leave_behind();
        outcome
    }

    /// Shows once that two sessions which are open at once are two, stay what they are, and exclude each other by locks of each kind.
    ///
    /// A transaction pooler serves both with one and the same backend, or one of them with several, and then two clients
    /// "hold" one lock. A pooler that comes later is noticed by the heartbeat. And there are servers that look like
    /// PostgreSQL, whose advisory locks always succeed.
    pub(crate) fn probe(
        &self,
        mut session: Session,
        mut other: Session,
        by: Instant,
    ) -> std::result::Result<Session, Refusal> {
        let verdict = self.contend(&mut session, &mut other, by);
        if let Err(refusal) = verdict {
            return Err(session.explain_both(&mut other, refusal, by));
        }
        self.probed.store(true, Ordering::Relaxed);
        Ok(session)
    }

    fn contend(
        &self,
        session: &mut Session,
        other: &mut Session,
        by: Instant,
    ) -> std::result::Result<(), Refusal> {
        let told = |failure| match failure {
            Failure::Lost { reason: LossReason::SessionChanged, .. } => Refusal::pooler(),
            // What pgbouncer says in statement mode.
            Failure::Lost { cause: Some(error), .. } | Failure::Refused(error)
                if chain(&error).contains("transaction blocks not allowed") =>
            {
                Refusal::pooler()
            }
            failure => self.during("checked that sessions are not shared", Refusal::from_failure(failure)),
        };
        if session.backend_pid() == other.backend_pid() {
            return Err(Refusal::pooler());
        }
        let probe = Probe::new(nonce().map_err(Refusal::system)?);
        // Twice in a row: a pooler may take turns with its sessions. Then the other one at once: a pooler may serve it by
        // the backend that was free last.
        if let Some(advice) = session.heartbeat_and_look(by).map_err(told)? {
            log::warn!("about this server: {advice}");
        }
        session.heartbeat(by).map_err(told)?;
        other.heartbeat(by).map_err(told)?;
        let held = other.hold(probe, self.connect_timeout, by);
        // Only against locks that are held: what a pooler's backend was granted might stay there.
        let contended = match held {
            Ok(true) => session.contend(probe, by).map(Some),
            _ => Ok(None),
        };
        let given_back = other.give_back(probe, matches!(held, Ok(true)), by);
        if !held.map_err(told)? {
            return Err(Refusal::no_locks("does not grant a lock that nobody has"));
        }
        match contended.map_err(told)? {
            Some((true, _)) => Err(Refusal::stub()),
            Some((false, false)) => Err(Refusal::no_locks("does not let two sessions share a lock")),
            _ if given_back.map_err(told)? => Ok(()),
            _ => Err(Refusal::no_locks("does not give back a lock that was held")),
        }
    }
}

/// The second session, when it has been opened; `None` if `control` was killed, or the time is up.
fn await_other<T>(others: &Receiver<T>, control: &StreamControl, until: Instant) -> Option<T> {
    /// How soon a kill is noticed.
    const SLICE: Duration = Duration::from_millis(20);
    loop {
        let now = Instant::now();
        match others.recv_deadline(until.min(now + SLICE)) {
            Ok(other) => return Some(other),
            Err(RecvTimeoutError::Timeout) if now < until && !control.is_dead() => {}
            Err(_) => return None,
        }
    }
}
