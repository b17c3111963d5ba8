//! A session and the claims that use it: hands what happened from one machine to the others. As pure as they are.

use std::time::Duration;

use crate::loss::LossReason;
use crate::pg::claim::machine::{self as claim, Machine as Claim};
use crate::pg::session::machine::{self as session, Machine as Session, Time, Timing, misplaced};

/// One session and its claims. A dedicated session has one claim.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Lifecycle {
    session: Session,
    claims: Vec<Claim>,
}

/// What is to be done next. The number is the claim's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Action {
    Session(session::Action),
    Claim(usize, claim::Action),
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Event {
    Session(session::Event),
    Claim(usize, claim::Event),
}

/// What is to be announced, and of which claim.
pub(crate) type Notices = Vec<(usize, claim::Notice)>;

impl Lifecycle {
    /// A session that is wanted by one claim, which has the number 0, and may share its lock with other sessions.
    pub(crate) fn dedicated(timing: Timing, uncertainty_window: Duration, shares: bool, seed: u64) -> Self {
        Self { session: Session::new(timing, seed), claims: vec![Claim::new(uncertainty_window, shares)] }
    }

    /// As `dedicated`, with several claims, which are numbered from 0.
    #[cfg(test)]
    pub(crate) fn shared(timing: Timing, uncertainty_window: Duration, seed: u64, claims: usize) -> Self {
        Self {
            session: Session::new(timing, seed),
            claims: vec![Claim::new(uncertainty_window, false); claims],
        }
    }

    /// What to do next: what a claim asks for comes before what the session can wait with.
    pub(crate) fn action(&self) -> Action {
        let urgent = matches!(self.session.action(), session::Action::Renew { .. } | session::Action::Close);
        let mut wanted = self.claims.iter().map(Claim::action).enumerate();
        let claim = wanted.find(|(_, action)| match action {
            claim::Action::Wait => false,
            // It asks for nothing on the session.
            claim::Action::Finish(_) => true,
            _ => !urgent,
        });
        claim.map_or_else(
            || Action::Session(self.session.action()),
            |(number, action)| Action::Claim(number, action),
        )
    }

    /// Takes in what happened, at `now`; says what to announce.
    ///
    /// Whatever the event says: a term does not outlive its time. An answer that comes later does not prolong it.
    pub(crate) fn handle(&mut self, event: Event, now: Time) -> Notices {
        let mut notices = Notices::new();
        let is_release = matches!(event, Event::Claim(_, claim::Event::Release));
        if self.session.lease_is_over(now) && !is_release {
            self.tell_session(session::Event::Lost(LossReason::LeaseNotRenewed), now, &mut notices);
            return notices;
        }
        match event {
            Event::Session(event) => self.tell_session(event, now, &mut notices),
            Event::Claim(number, event) => self.tell_claim(number, event, now, &mut notices),
        }
        notices
    }

    /// Until when the server may hold something for a session of the claim that was lost.
    pub(crate) fn uncertain_until(&self, claim: usize) -> Time {
        self.claims.get(claim).map_or(Time::ZERO, Claim::uncertain_until)
    }

    fn tell_session(&mut self, event: session::Event, now: Time, notices: &mut Notices) {
        let Some(told) = self.session.handle(event, now) else { return };
        for (number, claim) in self.claims.iter_mut().enumerate() {
            notices.extend(claim.handle_session(told, now).map(|notice| (number, notice)));
        }
    }

    fn tell_claim(&mut self, number: usize, event: claim::Event, now: Time, notices: &mut Notices) {
        let Some(claim) = self.claims.get_mut(number) else {
            return misplaced(&"a claim that is not there", &event);
        };
        let held = claim.holds();
        let effects = claim.handle(event, now);
        let holds = claim.holds();
        notices.extend(effects.notice.map(|notice| (number, notice)));
        if held && !holds && !self.claims.iter().any(Claim::holds) {
            self.tell_session(session::Event::LastLockLeft, now, notices);
        }
        if let Some(event) = effects.session {
            self.tell_session(event, now, notices);
        }
        if self.session.is_retiring() && !self.claims.iter().any(Claim::uses_session) {
            self.tell_session(session::Event::Retired, now, notices);
        }
    }
}

#[cfg(test)]
mod tests;
