//! What the session of a carrier needs to live: heartbeats, their confirmation, the lease, and its end.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Engine;
use crate::loss::LossReason;
use crate::pg::claim::lifecycle::Event;
use crate::pg::confirm::{Outcome, Wait, Wanted};
use crate::pg::session::machine::{self as session, Confirms, Time};

impl Engine {
    /// Does what the session has to do: a heartbeat, a confirmation, the closing.
    pub(crate) fn serve(&mut self, action: session::Action) {
        let event = match action {
            session::Action::Renew { by } => self.renew(by),
            session::Action::Confirm { sent, by, granted, last } => self.confirm(sent, by, granted, last),
            session::Action::Close => self.close(),
            _ => return,
        };
        self.take_in(event);
    }

    fn renew(&mut self, by: Time) -> Event {
        let (sent, by) = (self.now(), self.answer_by().min(self.at(by)));
        self.asked_at = Instant::now();
        match self.session().map(|session| session.heartbeat(by)) {
            Some(Ok(())) => {
                let round_trip = self.now() - sent;
                // One for all, so one of them tells of it.
                if let Some(seated) = self.seats.iter().flatten().next() {
                    let claim = seated.seat.claim();
                    claim.note_heartbeat(round_trip);
                    if claim.is_observed() {
                        self.events.claims.push(Arc::clone(claim));
                    }
                }
                Event::Session(session::Event::Renewed { sent })
            }
            // Also where it was refused: nothing is known of a session that does not say whether it holds its locks.
            Some(Err(failure)) => self.lost(failure),
            None => Event::Session(session::Event::Lost(LossReason::SupervisorFailed)),
        }
    }

    fn confirm(&mut self, sent: Option<Time>, by: Time, granted: Option<Time>, last: Time) -> Event {
        self.asked_at = Instant::now();
        let pool = Arc::clone(&self.pool);
        let carried = Arc::clone(&self.carried);
        let (answer_within, by) = (self.plan.heartbeat_timeout, self.at(by));
        // However often it was called away.
        let first = sent.into_iter().chain(granted).min().unwrap_or_default();
        let since = self.at(first).max(self.told_at);
        // What came while this engine was at work has been taken in, and calls nobody any more.
        let has_work = self.has_work();
        let wait = Wait { since, by, leaves: || has_work || carried.is_called(), answer_within };
        // Where grants alone are to be confirmed, most of the claims wait for none.
        if sent.is_some() {
            self.announce_unconfirmed(Confirms::All);
        }
        let moment = |time: Option<Time>| time.map(|time| self.moment(time));
        let wanted = Wanted { sent: moment(sent), granted: moment(granted), last: self.moment(last) };
        match self.session().map(|session| pool.confirm(session, &wanted, &wait)) {
            Some(Ok(Outcome::Confirmed { followed, open })) => {
                if sent.is_some() && followed >= wanted.sent {
                    self.announce_unconfirmed(Confirms::Nothing);
                }
                if wanted.is_confirmed(followed, open) && self.problem.end() {
                    log::info!("a session for many locks: confirmed; what was in the way is gone");
                }
                let [followed, open] = [followed, open].map(|at| at.and_then(|at| at.since(self.epoch)));
                Event::Session(session::Event::Confirmed { followed, open })
            }
            Some(Ok(Outcome::Missing(refusal))) => {
                self.told_at = Instant::now();
                self.note(refusal.while_held(self.lifecycle.held_for(self.now())).into_error());
                Event::Session(session::Event::Unconfirmed)
            }
            // Others have something to do, or a heartbeat is due, or it is the end of the terms.
            Some(Ok(Outcome::Left)) => Event::Session(session::Event::TimePassed),
            Some(Err(failure)) => self.lost(failure),
            None => Event::Session(session::Event::Lost(LossReason::SupervisorFailed)),
        }
    }

    /// Tells those that hold their locks.
    fn announce_unconfirmed(&self, unconfirmed: Confirms) {
        for (number, seated) in self.seats.iter().enumerate() {
            if let Some(seated) = seated
                && seated.lock.is_some()
                && !self.lifecycle.is_confirming(number)
            {
                seated.seat.claim().announce_unconfirmed(unconfirmed);
            }
        }
    }

    fn close(&mut self) -> Event {
        /// The server is seldom busy with that for longer, and the next attempt would only wait for the same.
        const AT_MOST: Duration = Duration::from_secs(1);
        let by = Instant::now() + AT_MOST;
        let announced = std::mem::take(&mut self.end_announced);
        let gone = announced && self.session().is_some_and(|session| session.wait_gone(by));
        if let Some(mut slot) = self.slot.take() {
            if let Some(session) = slot.session()
                && !gone
            {
                let pid = session.backend_pid();
                for seated in self.seats.iter().flatten() {
                    seated.seat.claim().note_lost_backend(pid);
                }
            }
            slot.taint();
            drop(slot);
            self.note_sessions();
        }
        Event::Session(session::Event::Closed { gone })
    }

    /// Takes the lease off a session on which nothing is held and for which nobody has had a question for some time: no heartbeat
    /// keeps it.
    pub(crate) fn rest(&mut self) {
        if !self.has_lease
            || self.lifecycle.holding() > 0
            || self.asked_at.elapsed() < self.plan.heartbeat / 2
        {
            return;
        }
        let (by, slice) = (self.soon(), self.pool.plan().slice);
        if let Some(outcome) = self.session().map(|session| session.set_lease(None, slice, by)) {
            self.has_lease = false;
            if let Err(failure) = outcome {
                let lost = self.lost(failure);
                self.take_in(lost);
            }
        }
    }

    /// Gives the session back, on which nothing is held, or closes it if the manager `has_stopped`; true if there was one, of which the observer is
    /// to be told.
    pub(crate) fn leave(mut self, has_stopped: bool) -> bool {
        let (by, slice) = (self.soon(), self.pool.plan().slice);
        let rests = match self.session() {
            Some(session) if !has_stopped => {
                session.set_lease(None, slice, by).and_then(|()| session.settle(&[], by)).is_ok()
            }
            _ => false,
        };
        // Not before: if that panics, the session is closed with the engine.
        let Some(mut slot) = self.slot.take() else { return false };
        if has_stopped {
            slot.close(by);
        } else if !rests {
            slot.taint();
        }
        true
    }
}
