//! A session and the claims that use it: hands what happened from one machine to the others. As pure as they are.

#[cfg(test)]
use std::time::Duration;

use crate::pg::claim::machine::{self as claim, Machine as Claim};
use crate::pg::session::machine::{self as session, Confirms, Machine as Session, Time, Timing, misplaced};

/// One session and its claims. A dedicated session has one claim.
///
/// What happens to one claim takes as long whether it is alone or one of thousands; only the beginning and the end of the session
/// are told to all.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Lifecycle {
    session: Session,
    claims: Vec<Claim>,
    /// How many of them hold their locks.
    holding: usize,
    /// How many of them use the session.
    using: usize,
    /// Those that have been granted their locks and do not hold them before the session's lease lasts, and that is confirmed. The first of
    /// them were granted theirs first.
    confirming: Vec<usize>,
    /// What was granted until then is confirmed.
    confirmed: Option<Time>,
    /// The session carries many claims, so those that hold locks are not told one by one that it goes on.
    is_carrier: bool,
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
    /// A session that is wanted by one claim, which has the number 0.
    pub(crate) fn dedicated(timing: Timing, claim: Claim, seed: u64) -> Self {
        Self { claims: vec![claim], is_carrier: false, ..Self::carrier(timing, seed) }
    }

    /// A session that carries claims which [come](Self::admit) later.
    pub(crate) fn carrier(timing: Timing, seed: u64) -> Self {
        Self {
            session: Session::new(timing, seed),
            claims: Vec::new(),
            holding: 0,
            using: 0,
            confirming: Vec::new(),
            confirmed: None,
            is_carrier: true,
        }
    }

    /// Two or more claims, which are numbered from 0, and are told one by one what becomes of the lease.
    #[cfg(test)]
    pub(crate) fn shared(timing: Timing, uncertainty_window: Duration, seed: u64, claims: usize) -> Self {
        let claims = vec![Claim::new(uncertainty_window, false); claims];
        Self { claims, is_carrier: false, ..Self::carrier(timing, seed) }
    }

    /// Takes in another claim, in the place of one that has ended or left, or with the next number.
    pub(crate) fn admit(&mut self, number: usize, mut claim: Claim, now: Time) {
        if self.session.serves() {
            let _ = claim.handle_session(session::Notice::Ready, now);
        }
        self.using += usize::from(claim.uses_session());
        match self.claims.get_mut(number) {
            Some(place) => *place = claim,
            None => self.claims.push(claim),
        }
    }

    /// The claim goes on elsewhere. The session has nothing for it.
    pub(crate) fn dismiss(&mut self, number: usize, now: Time) -> Notices {
        let mut notices = Notices::new();
        if let Some(claim) = self.claims.get_mut(number) {
            self.using -= usize::from(claim.uses_session());
            claim.leave();
            self.retire_if_unused(now, &mut notices);
        }
        notices
    }

    /// True if there is a session that claims may use.
    pub(crate) fn serves(&self) -> bool {
        self.session.serves()
    }

    /// What the session itself has to do next.
    pub(crate) fn session_action(&self) -> session::Action {
        match (self.session.action(), self.unconfirmed()) {
            (session::Action::Confirm { sent, by, last, .. }, Some((first, newest))) => {
                session::Action::Confirm { sent, by, granted: Some(first), last: last.max(newest) }
            }
            // Its heartbeats go on, whatever becomes of what was granted.
            (session::Action::Watch { until }, Some((first, last))) => {
                session::Action::Confirm { sent: None, by: until, granted: Some(first), last }
            }
            (action, _) => action,
        }
    }

    /// When the first of the locks was granted that are to be confirmed, and when the last.
    fn unconfirmed(&self) -> Option<(Time, Time)> {
        if !self.confirms_grants() {
            return None;
        }
        let first = self.confirming.get(self.count_confirmed())?;
        let last = self.confirming.last()?;
        Some((self.claims[*first].granted_at()?, self.claims[*last].granted_at()?))
    }

    /// How many of those that do not hold their locks yet wait for the session's lease alone. They are the first ones.
    fn count_confirmed(&self) -> usize {
        self.confirming.partition_point(|number| self.claims[*number].granted_at() <= self.confirmed)
    }

    /// True if the claim has been granted its lock, and does not hold it yet.
    pub(crate) fn is_confirming(&self, claim: usize) -> bool {
        self.claims.get(claim).is_some_and(|claim| claim.granted_at().is_some())
    }

    fn confirms_grants(&self) -> bool {
        self.session.confirms() != Confirms::Nothing
    }

    /// What one claim has to do next.
    pub(crate) fn claim_action(&self, number: usize) -> claim::Action {
        self.claims.get(number).map_or(claim::Action::Wait, Claim::action)
    }

    /// Until when all that is held by the session is held at least; `None` if no lease lasts.
    pub(crate) fn leased_until(&self) -> Option<Time> {
        self.session.leased_until()
    }

    /// For how long from `now` on a lock is held whose heartbeat is not confirmed; `None` if none is held.
    pub(crate) fn held_for(&self, now: Time) -> Option<Time> {
        self.leased_until().filter(|_| self.holding > 0).map(|until| until.saturating_sub(now))
    }

    /// How many claims hold their locks.
    pub(crate) fn holding(&self) -> usize {
        self.holding
    }

    /// What to do next: what a claim asks for comes before what the session can wait with. Of pauses, the one that is over first.
    pub(crate) fn action(&self) -> Action {
        let session = self.session_action();
        let urgent = matches!(
            session,
            session::Action::Renew { .. } | session::Action::Confirm { .. } | session::Action::Close
        );
        let wanted = || self.claims.iter().map(Claim::action).enumerate();
        let claim = wanted().find(|(_, action)| match action {
            claim::Action::Wait | claim::Action::Pause { .. } => false,
            // It asks for nothing on the session.
            claim::Action::Finish(_) => true,
            _ => !urgent,
        });
        if let Some((number, action)) = claim {
            return Action::Claim(number, action);
        }
        let session_until = match session {
            session::Action::Serve => Time::MAX,
            session::Action::Watch { until } => until,
            _ => return Action::Session(session),
        };
        let pauses = wanted().filter_map(|(number, action)| match action {
            claim::Action::Pause { until } if until <= session_until => Some((until, number)),
            _ => None,
        });
        pauses.min().map_or(Action::Session(session), |(until, number)| {
            Action::Claim(number, claim::Action::Pause { until })
        })
    }

    /// Takes in what happened, at `now`; says what to announce.
    ///
    /// Whatever the event says: a term does not outlive its time. An answer that comes later does not prolong it.
    pub(crate) fn handle(&mut self, event: Event, now: Time) -> Notices {
        let mut notices = Notices::new();
        let is_release = matches!(event, Event::Claim(_, claim::Event::Release));
        if self.session.lease_is_over(now) && !is_release {
            self.tell_session(session::Event::Lost(self.session.why_over()), now, &mut notices);
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
        if let Some(told) = self.session.handle(event, now) {
            self.tell_of_change(told, now, notices);
        }
        if let session::Event::Confirmed { followed, open } = event {
            self.confirmed = self.confirmed.max(followed.min(open));
        }
        if self.confirms_grants()
            && let Some(until) = self.session.begins_until(now)
        {
            let count = self.count_confirmed();
            for number in self.confirming.drain(..count).collect::<Vec<_>>() {
                self.tell_of_session(number, session::Notice::LeasedUntil(until), now, notices);
            }
        }
    }

    fn tell_of_change(&mut self, told: session::Notice, now: Time, notices: &mut Notices) {
        let mut concerned: Vec<_> = match told {
            // What was granted waits for its own confirmation.
            session::Notice::LeasedUntil(_) if self.confirms_grants() => Vec::new(),
            session::Notice::LeasedUntil(_) => std::mem::take(&mut self.confirming),
            session::Notice::Unconfirmed => self.confirming.clone(),
            _ => {
                (self.confirming, self.confirmed) = (Vec::new(), None);
                (0..self.claims.len()).collect()
            }
        };
        let is_of_lease = matches!(told, session::Notice::LeasedUntil(_) | session::Notice::Unconfirmed);
        if is_of_lease && !self.is_carrier {
            let others = (0..self.claims.len()).filter(|number| self.claims[*number].granted_at().is_none());
            concerned.extend(others);
            concerned.sort_unstable();
        }
        for number in concerned {
            self.tell_of_session(number, told, now, notices);
        }
    }

    fn tell_of_session(&mut self, number: usize, told: session::Notice, now: Time, notices: &mut Notices) {
        self.change(number, |claim| {
            let notice = claim.handle_session(told, now);
            notices.extend(notice.map(|notice| (number, notice)));
        });
    }

    fn tell_claim(&mut self, number: usize, event: claim::Event, now: Time, notices: &mut Notices) {
        let held = self.holding;
        let Some(effects) = self.change(number, |claim| claim.handle(event, now)) else {
            return misplaced(&"a claim that is not there", &event);
        };
        notices.extend(effects.notice.map(|notice| (number, notice)));
        if held > 0 && self.holding == 0 {
            self.tell_session(session::Event::LastLockLeft, now, notices);
        }
        if let Some(event) = effects.session {
            self.tell_session(event, now, notices);
        }
        self.retire_if_unused(now, notices);
    }

    fn retire_if_unused(&mut self, now: Time, notices: &mut Notices) {
        if self.session.is_retiring() && self.using == 0 {
            self.tell_session(session::Event::Retired, now, notices);
        }
    }

    /// Changes one of the claims, and what is counted of them.
    fn change<T>(&mut self, number: usize, change: impl FnOnce(&mut Claim) -> T) -> Option<T> {
        let claim = self.claims.get_mut(number)?;
        let was = (claim.holds(), claim.uses_session());
        let was_confirming = claim.granted_at().is_some();
        let outcome = change(claim);
        let is = (claim.holds(), claim.uses_session());
        self.holding = self.holding + usize::from(is.0) - usize::from(was.0);
        self.using = self.using + usize::from(is.1) - usize::from(was.1);
        match (was_confirming, claim.granted_at().is_some()) {
            (false, true) => self.confirming.push(number),
            (true, false) => self.confirming.retain(|confirming| *confirming != number),
            _ => {}
        }
        Some(outcome)
    }
}

#[cfg(test)]
mod tests;
