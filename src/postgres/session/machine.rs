//! The life of a session: a pure state machine, without driver, channel or clock.

use std::time::Duration;

use crate::loss::LossReason;

/// A moment, as the time since the engine began. A machine never asks what time it is: it is told.
pub(crate) type Time = Duration;

/// One session, from when it is wanted, over all the connections that it takes to have one.
///
/// ```text
///                ┌───────── back-off over, or wanted ─────────┐
///                ▼                                            │
///   start ──► Opening ─────────────── failed ────────────► BackingOff
///                │ ▲                                          ▲
///         opened │ └── had served ──┐          ┌── had not ───┘
///                ▼                  │          │
///              Open ─── lost, or retired ──► Closing
///                │ ▲                            ▲
///     lock taken │ │ last lock given back       │
///                ▼ │                            │
///              Leased ⇄ Renewing ─── lost, or the lease not renewed in time
/// ```
///
/// Where heartbeats are [to be confirmed](Confirms::All), it is `Confirming` before it is `Leased`: after a lock was taken, and after each
/// heartbeat. From there it goes back to `Renewing` if that was not to be had, or if a heartbeat is due, and is lost as there.
///
/// A claim uses the session while it is `Open`, `Leased`, `Renewing` or `Confirming`: see [`claim::machine`](super::super::claim::machine).
/// The lease is the session's, so it is renewed once for all the locks that are held by it.
///
/// Inputs: [`handle`](Self::handle), which takes what happened and gives what the claims must be told. Output:
/// [`action`](Self::action), what is to be done next; it changes nothing, so it may be asked any number of times.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Machine {
    timing: Timing,
    state: State,
    /// When the attempts began to fail; `None` while they succeed.
    failing_since: Option<Time>,
    /// A claim was told that the lock is free or taken, since this connection was opened.
    has_served: bool,
    /// The session refused a claim something, and is to be closed when that claim has left it; `needs_operator` as in
    /// [`Event::OpenFailed`].
    retiring: Option<Retirement>,
    /// When the first was sent of what was answered since the last confirmation; where that confirmed a part of it, the last.
    unconfirmed: Option<Time>,
    /// When the last statement was sent that showed that all locks are held: the first grant, or a heartbeat. A later grant
    /// shows nothing of the others.
    proved: Time,
    /// Seeds the jitter of the back-off.
    seed: u64,
}

/// The durations that govern a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Timing {
    /// A term lasts this long, at the most, after the sending of the last heartbeat that was answered: the server's lease
    /// less one heartbeat and the margin.
    pub(crate) term: Duration,
    /// A heartbeat is sent this long after the one before, at the latest.
    pub(crate) heartbeat: Duration,
    /// The times at which heartbeats are sent.
    pub(crate) rhythm: Rhythm,
    /// No term begins by an answer after which a heartbeat would be due already, after a long wait: a heartbeat comes first. For an
    /// application that is warned of one that is overdue.
    pub(crate) begins_fresh: bool,
    pub(crate) confirms: Confirms,
}

/// What counts only when it was confirmed: that the standbys still followed the server then, or that it had not begun to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Confirms {
    Nothing,
    /// A lock that was taken.
    Grants,
    /// A heartbeat, too.
    All,
}

/// The times at which heartbeats are sent: at `offset`, and from then on once each `period`.
///
/// All sessions of a manager have one rhythm. So a process that holds many locks wakes up a few times, each time for several
/// of them. With 100 locks, that halves the processor time: the second heartbeat finds in the caches what the first has
/// loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Rhythm {
    offset: Time,
    /// Not zero.
    period: Duration,
}

impl Rhythm {
    /// 16 slots between two heartbeats of one session: coarse enough to batch wake-ups, fine enough to spread 1,000 locks.
    const SLOTS: u32 = 16;

    /// The rhythm of all that send a heartbeat that often, for an engine that begins `late`.
    pub(crate) fn of(heartbeat: Duration, late: Duration) -> Self {
        let period = (heartbeat / Self::SLOTS).max(Duration::from_nanos(1));
        Self { offset: period - remainder(late, period), period }
    }

    /// The last of its times until `by`; if there is none, `by`.
    fn last_until(self, by: Time) -> Time {
        by.checked_sub(self.offset).map_or(by, |since| by - remainder(since, self.period))
    }
}

fn remainder(time: Duration, divisor: Duration) -> Duration {
    const SECOND: u128 = 1_000_000_000;
    let nanos = time.as_nanos() % divisor.as_nanos();
    Duration::new((nanos / SECOND) as u64, (nanos % SECOND) as u32)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum State {
    /// A connection is being opened, or taken from the pool.
    Opening,
    /// None could be had; the next attempt is at this time.
    BackingOff { until: Time },
    /// It is open, and holds no lock.
    Open,
    /// It holds a lock. `renewed` is when the last grant or heartbeat was sent that counts for the term.
    Leased { renewed: Time },
    /// It holds a lock, and a heartbeat is due. Without a time the lock was granted so long ago that its term would be over:
    /// a heartbeat must show that it is held still.
    Renewing { renewed: Option<Time> },
    /// What was sent at `sent`, the last time, shows that it holds a lock, and is to be confirmed. `renewed` is when the last was sent that is
    /// confirmed; as for `Renewing`, no term has begun if that is no time.
    Confirming { renewed: Option<Time>, sent: Time },
    /// The connection is of no use any more and must be closed.
    Closing { then: Next },
}

/// What follows when a connection has been closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Next {
    Open,
    BackOff { needs_operator: bool },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Retirement {
    needs_operator: bool,
}

/// What is to be done next for the session itself. Each is followed by one event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Action {
    /// Take a session from the pool, and open it if need be: `Opened` or `OpenFailed`.
    Open,
    /// Do nothing until then: `TimePassed`, `Wanted`.
    Pause { until: Time },
    /// Whatever the claims ask for.
    Serve,
    /// The same, and watch the session until then: `TimePassed`, `Lost`.
    Watch { until: Time },
    /// Prove that the session is alive and holds its locks, by then at the latest: `Renewed`, `Lost`.
    Renew { by: Time },
    /// Have confirmed what waits for that, by then at the latest. `sent` is when the first statement was sent that waits for the standbys, `granted`
    /// when the first lock was granted that waits: those that come all the time must not move the time from which a confirmation counts. `last` is when
    /// the last of all was.
    /// What follows is `Confirmed` when one of the two is, `Unconfirmed`, `TimePassed`, which says nothing, or `Lost`.
    Confirm { sent: Option<Time>, by: Time, granted: Option<Time>, last: Time },
    /// Close the session without ceremony; if the server has said that it ends it, see whether it has: `Closed`.
    Close,
}

/// What happened to the session. `Lost` may follow each action, and each statement of a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Event {
    /// There is a connection.
    Opened,
    /// There is none. `needs_operator` if the cause will not go away by itself, so that the next attempt need not hurry.
    OpenFailed { needs_operator: bool },
    /// The time that an action was given has passed.
    TimePassed,
    /// Somebody wants an attempt now.
    Wanted,
    /// The server has answered a claim, which does not get the lock now.
    Served,
    /// A claim holds a lock; `sent` is when it was asked for.
    LockGranted { sent: Time },
    /// No claim holds a lock any more.
    LastLockLeft,
    /// The heartbeat sent at `sent` was answered.
    Renewed { sent: Time },
    /// The standbys followed the server at that time, and it was not stopping at the other, as far as the one or the other is asked for.
    Confirmed { followed: Option<Time>, open: Option<Time> },
    /// What waits for that was not confirmed yet.
    Unconfirmed,
    /// The connection is over.
    Lost(LossReason),
    /// A claim was refused something, and is leaving the session.
    Refused { needs_operator: bool },
    /// After `Refused`: no claim uses the session any more.
    Retired,
    /// The connection was closed; `gone` is whether the server has let go of all that it held, as far as is known.
    Closed { gone: bool },
}

/// What the claims on the session must be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Notice {
    /// There is a session.
    Ready,
    /// There was none to be had.
    Unavailable,
    /// What is held by it is held until then at least.
    LeasedUntil(Time),
    /// A lock that was taken, or a heartbeat, is not confirmed yet.
    Unconfirmed,
    /// It is over, and everything that was held by it is lost.
    Lost(LossReason),
    /// No claim uses it any more, and it is being closed since it refused one something.
    Retired,
    /// The lost or retired one was closed.
    Closed { gone: bool },
}

impl State {
    /// True if there is a connection, which is not being closed.
    fn is_connected(self) -> bool {
        match self {
            Self::Open | Self::Leased { .. } | Self::Renewing { .. } | Self::Confirming { .. } => true,
            Self::Opening | Self::BackingOff { .. } | Self::Closing { .. } => false,
        }
    }

    /// When what renewed the lease last was sent; `None` if no term may have begun.
    fn renewed(self) -> Option<Time> {
        match self {
            Self::Leased { renewed } => Some(renewed),
            Self::Renewing { renewed } | Self::Confirming { renewed, .. } => renewed,
            Self::Opening | Self::BackingOff { .. } | Self::Open | Self::Closing { .. } => None,
        }
    }
}

impl Machine {
    /// Begins with a session that is wanted. `seed` decides the jitter of its back-off.
    pub(crate) fn new(timing: Timing, seed: u64) -> Self {
        Self {
            timing,
            state: State::Opening,
            failing_since: None,
            has_served: false,
            retiring: None,
            unconfirmed: None,
            proved: Time::ZERO,
            seed,
        }
    }

    /// What to do next.
    pub(crate) fn action(&self) -> Action {
        match self.state {
            State::Opening => Action::Open,
            State::BackingOff { until } => Action::Pause { until },
            State::Open => Action::Serve,
            State::Leased { .. } => Action::Watch { until: self.heartbeat_due() },
            State::Renewing { renewed: Some(renewed) } => Action::Renew { by: self.term_end(renewed) },
            // There is no term to lose yet, so the answer has the heartbeat's whole time, whenever the sending is.
            State::Renewing { renewed: None } => Action::Renew { by: Time::MAX },
            State::Confirming { renewed, sent } => {
                let by = renewed.map_or(Time::MAX, |renewed| self.term_end(renewed));
                Action::Confirm { sent: self.unconfirmed.or(Some(sent)), by, granted: None, last: sent }
            }
            State::Closing { .. } => Action::Close,
        }
    }

    /// Takes in what happened, at `now`; says what the claims must be told.
    ///
    /// An event that cannot follow the state changes nothing, and is reported: see [`misplaced`].
    pub(crate) fn handle(&mut self, event: Event, now: Time) -> Option<Notice> {
        match (self.state, event) {
            (State::Opening, Event::Opened) => {
                self.has_served = false;
                (self.retiring, self.unconfirmed, self.proved) = (None, None, Time::ZERO);
                self.state = State::Open;
                Some(Notice::Ready)
            }
            (State::Opening, Event::OpenFailed { needs_operator }) => {
                self.back_off(needs_operator, now);
                Some(Notice::Unavailable)
            }

            (State::BackingOff { until }, Event::TimePassed) if now >= until => self.go_to(State::Opening),
            (State::BackingOff { .. }, Event::Wanted) => self.go_to(State::Opening),

            (state, Event::Served) if state.is_connected() => {
                self.failing_since = None;
                self.has_served = true;
                None
            }
            (state, Event::LockGranted { sent }) if state.is_connected() => self.lock_granted(sent, now),
            (
                State::Leased { .. } | State::Renewing { .. } | State::Confirming { .. },
                Event::LastLockLeft,
            ) => {
                (self.unconfirmed, self.proved) = (None, Time::ZERO);
                self.go_to(State::Open)
            }

            (State::Leased { renewed }, Event::TimePassed) if now >= self.heartbeat_due() => {
                self.go_to(State::Renewing { renewed: Some(renewed) })
            }
            (State::Renewing { renewed }, Event::Renewed { sent }) => {
                self.proved = sent;
                match self.timing.confirms {
                    Confirms::All => self.await_confirmation(renewed, sent),
                    Confirms::Nothing | Confirms::Grants => self.lease_from(sent, false, now),
                }
            }
            (State::Confirming { renewed, sent }, Event::Confirmed { followed, .. }) => {
                let notice = self.confirmed(renewed, sent, followed, now);
                self.renew_if_due(now);
                notice
            }
            // Where locks are granted all the time, there is always one more to be confirmed.
            (State::Confirming { renewed, .. }, Event::TimePassed) if now >= self.heartbeat_due() => {
                self.go_to(State::Renewing { renewed })
            }
            // Whoever had to wait for so long asks anew, which also keeps the session from standing idle.
            (State::Confirming { renewed, .. }, Event::Unconfirmed) => {
                self.state = State::Renewing { renewed };
                Some(Notice::Unconfirmed)
            }
            // A lock that was granted is confirmed, or is not, on a session whose heartbeats need none, or have theirs.
            (State::Leased { .. }, Event::Confirmed { .. }) => {
                self.renew_if_due(now);
                None
            }
            (State::Leased { .. }, Event::Unconfirmed) => Some(Notice::Unconfirmed),

            (state, Event::Lost(reason)) if state.is_connected() => self.lose(reason),
            (state, Event::Refused { needs_operator }) if state.is_connected() => {
                self.retiring = Some(Retirement { needs_operator });
                None
            }
            (state, Event::Retired) if state.is_connected() => {
                self.state = State::Closing { then: self.after_closing() };
                Some(Notice::Retired)
            }

            (State::Closing { then }, Event::Closed { gone }) => {
                match then {
                    Next::Open => self.state = State::Opening,
                    Next::BackOff { needs_operator } => self.back_off(needs_operator, now),
                }
                Some(Notice::Closed { gone })
            }

            // Too early: whoever has slept looks again, and so does whoever was called away from a confirmation.
            (
                State::BackingOff { .. } | State::Leased { .. } | State::Confirming { .. },
                Event::TimePassed,
            ) => None,
            // The pause is over already, or has not begun.
            (
                State::Opening
                | State::Open
                | State::Leased { .. }
                | State::Renewing { .. }
                | State::Confirming { .. },
                Event::Wanted,
            ) => None,
            // Its connection is being closed for another reason already.
            (State::Closing { .. }, Event::Wanted | Event::Lost(_) | Event::LastLockLeft) => None,
            (state, event) => {
                misplaced(&state, &event);
                None
            }
        }
    }

    /// Whether there is a session that claims may use.
    pub(crate) fn serves(&self) -> bool {
        self.retiring.is_none() && self.state.is_connected()
    }

    /// Until when what is held by it is held at least; `None` if no term may have begun.
    pub(crate) fn leased_until(&self) -> Option<Time> {
        self.state.renewed().map(|renewed| self.term_end(renewed))
    }

    /// Until when a term lasts at least that begins now; `None` if none may.
    pub(crate) fn begins_until(&self, now: Time) -> Option<Time> {
        match self.state {
            State::Leased { renewed } | State::Confirming { renewed: Some(renewed), .. } => {
                (!self.is_stale(renewed, now)).then(|| self.term_end(renewed))
            }
            _ => None,
        }
    }

    /// What is to be confirmed.
    pub(crate) fn confirms(&self) -> Confirms {
        self.timing.confirms
    }

    /// Whether it is to be closed when no claim uses it any more.
    pub(crate) fn is_retiring(&self) -> bool {
        self.retiring.is_some() && self.state.is_connected()
    }

    /// True if the time of a term on this session is over, whatever else has happened.
    pub(crate) fn lease_is_over(&self, now: Time) -> bool {
        self.leased_until().is_some_and(|until| now >= until)
    }

    /// Why the time of a term was not prolonged.
    pub(crate) fn why_over(&self) -> LossReason {
        if self.unconfirmed.is_some() { LossReason::NotConfirmed } else { LossReason::LeaseNotRenewed }
    }

    /// When a heartbeat is due.
    fn heartbeat_due(&self) -> Time {
        self.heartbeat_after(self.proved)
    }

    /// When a heartbeat is due after a statement that was sent at this time.
    fn heartbeat_after(&self, sent: Time) -> Time {
        self.timing.rhythm.last_until(sent + self.timing.heartbeat)
    }

    /// When a term ends that was renewed by a heartbeat sent at `renewed`.
    fn term_end(&self, renewed: Time) -> Time {
        renewed + self.timing.term
    }

    fn go_to(&mut self, state: State) -> Option<Notice> {
        self.state = state;
        None
    }

    /// A lock was asked for at `sent` and is ours, which renews the lease as a heartbeat does. If that was too long ago (the
    /// wait took its time, the process was frozen before it read the answer) the server may have taken the lock away again:
    /// then a heartbeat must ask first. And so it must if the term is to [begin fresh](Timing::begins_fresh).
    fn lock_granted(&mut self, sent: Time, now: Time) -> Option<Notice> {
        self.failing_since = None;
        self.has_served = true;
        if self.state == State::Open {
            self.proved = sent;
        }
        let before = self.state.renewed();
        if self.timing.confirms == Confirms::All {
            return self.await_confirmation(before, sent);
        }
        self.lease_from(before.map_or(sent, |before| before.max(sent)), before.is_none(), now)
    }

    /// What was sent at `sent` counts when it is confirmed.
    fn await_confirmation(&mut self, renewed: Option<Time>, sent: Time) -> Option<Notice> {
        let (first, last) = match self.state {
            State::Confirming { sent: before, .. } => (sent.min(before), sent.max(before)),
            _ => (sent, sent),
        };
        self.unconfirmed = Some(self.unconfirmed.map_or(first, |before| before.min(first)));
        self.go_to(State::Confirming { renewed, sent: last })
    }

    /// The standbys followed the server at `followed`. Each was promoted later, if it was. So a term that is counted from what was sent before is
    /// over before its takeover grace is.
    fn confirmed(
        &mut self,
        renewed: Option<Time>,
        sent: Time,
        followed: Option<Time>,
        now: Time,
    ) -> Option<Notice> {
        let is_confirmed = |sent: &Time| followed.is_some_and(|followed| followed >= *sent);
        if is_confirmed(&sent) {
            self.unconfirmed = None;
            let newest = renewed.map_or(sent, |renewed| renewed.max(sent));
            return self.lease_from(newest, renewed.is_none(), now);
        }
        let first = self.unconfirmed.filter(is_confirmed)?;
        self.unconfirmed = Some(sent);
        if renewed.is_none() && (self.is_stale(first, now) || now >= self.term_end(first)) {
            return None;
        }
        let renewed = renewed.map_or(first, |renewed| renewed.max(first));
        self.state = State::Confirming { renewed: Some(renewed), sent };
        Some(Notice::LeasedUntil(self.term_end(renewed)))
    }

    fn lease_from(&mut self, renewed: Time, is_first: bool, now: Time) -> Option<Notice> {
        if is_first && self.is_stale(renewed, now) || now >= self.term_end(renewed) {
            return self.go_to(State::Renewing { renewed: None });
        }
        self.state = State::Leased { renewed };
        Some(Notice::LeasedUntil(self.term_end(renewed)))
    }

    /// True if no term is to begin by what was sent at `renewed`: a heartbeat would be due that follows on it.
    fn is_stale(&self, renewed: Time, now: Time) -> bool {
        self.timing.begins_fresh && now >= self.heartbeat_after(renewed)
    }

    /// Sees after a confirmation whether a heartbeat is due: another confirmation may follow at once, and no time pass between the two.
    fn renew_if_due(&mut self, now: Time) {
        if let State::Leased { .. } | State::Confirming { .. } = self.state
            && now >= self.heartbeat_due()
        {
            self.state = State::Renewing { renewed: self.state.renewed() };
        }
    }

    fn lose(&mut self, reason: LossReason) -> Option<Notice> {
        self.state = State::Closing { then: self.after_closing() };
        Some(Notice::Lost(reason))
    }

    /// A session that was refused something may be refused it again, and one that was of no use was perhaps a stale one of
    /// the pool, or the server is going down.
    fn after_closing(&self) -> Next {
        match self.retiring {
            Some(Retirement { needs_operator }) => Next::BackOff { needs_operator },
            None if self.has_served => Next::Open,
            None => Next::BackOff { needs_operator: false },
        }
    }

    /// Waits for a fraction of the time that the attempts have been failing: quick after a short outage, considerate in
    /// a long one. That is exponential growth, with a pace that does not depend on how long an attempt takes.
    fn back_off(&mut self, needs_operator: bool, now: Time) {
        const SHORTEST: Duration = Duration::from_millis(5);
        const SHORTEST_FOR_OPERATOR: Duration = Duration::from_millis(200);
        const LONGEST: Duration = Duration::from_secs(2);
        let since = *self.failing_since.get_or_insert(now);
        let shortest = if needs_operator { SHORTEST_FOR_OPERATOR } else { SHORTEST };
        let pause = ((now - since) / 8).clamp(shortest, LONGEST);
        // Between one half and the whole of it, so that many sessions do not come back in step.
        let jitter = fastrand::Rng::with_seed(self.seed ^ now.subsec_nanos() as u64).f32();
        self.state = State::BackingOff { until: now + pause.mul_f32(0.5 + jitter / 2.0) };
    }
}

/// Reports an event that cannot follow the state: a fault of the library. It stops a debug build; in a release build the
/// machine stays where it is, which the deadlines of its claims bound.
pub(crate) fn misplaced(state: &dyn std::fmt::Debug, event: &dyn std::fmt::Debug) {
    log::error!("{event:?} cannot happen in {state:?}; please report this");
    debug_assert!(false, "{event:?} cannot happen in {state:?}");
}
