//! The life of a claim: a pure state machine, without driver, channel or clock.

use std::time::Duration;

use crate::loss::LossReason;
use crate::pg::session::machine::{self as session, Time, misplaced};

/// One claim on one lock, from its first attempt to its release. It uses a session, which it may share.
///
/// ```text
///   start ──► WantingSession ◄──────────────── closed ────────────── SessionClosing
///                   │ session ready                                        ▲
///                   ▼                                                      │
///    Pausing ⇄ Trying ──────────── busy ──────────► Queueing ⟲ slice over  │
///                   │ granted                             │ granted        │
///                   ▼                                     │                ├── session lost,
///               Confirming ◄──────────────────────────────┘                │   from any of these
///                   │ the lease lasts, and it is confirmed                 │
///                   ▼                                                      │
///                 Held ⟲ the lease was renewed                             │
///
///   release: Confirming, Held ──► Unlocking ──► Ended; of a shared lock, after a loss, by way of Settling
///            Queueing ──► Settling ──► Ended
///            SessionClosing, or the session is lost meanwhile ──► Leaving ── closed ──► Ended
///            WantingSession, Trying, Pausing ──► Ended
///   refused: Trying, Queueing ──► Settling ──► SessionClosing
/// ```
///
/// Inputs: [`handle`](Self::handle) and [`handle_session`](Self::handle_session), which take what happened and give what is to
/// be announced, and what the session's machine must be told. Output: [`action`](Self::action), what is to be done next; it
/// changes nothing, so it may be asked any number of times.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Machine {
    /// How long the server may hold something for a session that was lost without its knowing: a wait, at the end of which
    /// it may be granted the lock, and a lease from then on.
    uncertainty_window: Duration,
    /// Others may hold the lock beside this claim: a lost session of its own, too.
    shares: bool,
    state: State,
    /// Until when the server may hold something for a session of this claim that was lost.
    uncertain_until: Time,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum State {
    /// There is no session.
    WantingSession,
    /// There is a session; the lock has not been asked for.
    Trying,
    /// The session has nothing for this claim, which asks again then: an [`Obstacle`] is in its way.
    Pausing { until: Time },
    /// Another session holds the lock; ours queues for it, a slice of time at once. It may come to hold the lock without
    /// our knowing, when the end of a slice races with the grant.
    Queueing,
    /// The answer that the lock was granted had come at `granted`. It is held if the session's lease lasts still, and if that is confirmed where
    /// grants are to be.
    Confirming { granted: Time },
    /// The lock is held.
    Held,
    /// The lock was held and is being given back.
    Unlocking,
    /// The session may have the lock and must be left without it.
    Settling { then: Next },
    /// The session is being closed, and another one wanted. `uncertain_before` is until when the server may hold something for
    /// those that were lost before this one.
    SessionClosing { uncertain_before: Time },
    /// As `SessionClosing`, and the claim ends with it.
    Leaving { uncertain_before: Time },
    /// The claim is over.
    Ended(End),
}

/// What follows when a session has been left without the lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Next {
    /// Another session, since this one refused something.
    Retry,
    End,
}

/// How a claim ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum End {
    /// The server holds nothing for this claim.
    Released,
    /// The server says that the lock was not held when it was given back.
    NotHeld,
    /// The server could not be told, or did not confirm. It will notice that the session is gone.
    Unconfirmed,
}

/// What is to be done next for the claim. Each is followed by one event, unless the session is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Action {
    /// Whatever the session's machine says.
    Wait,
    /// Ask for the lock without waiting, unless a takeover grace goes on: `Granted`, `Busy`, `Refused`, `Later`.
    Try,
    /// Do nothing until then, and watch the session: `TimePassed`.
    Pause { until: Time },
    /// Queue for the lock for one slice: `Granted`, `SliceOver`, `Refused`.
    Queue,
    /// Give the lock back: `Unlocked`, `Refused`.
    Unlock,
    /// Leave the session without the lock: `Settled`, `Refused`.
    Settle,
    /// Leave the session and end.
    Finish(End),
}

/// What happened to the claim. `Release` may come at any time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Event {
    /// Another session holds the lock.
    Busy,
    /// It is to ask again then, and the session has nothing for it.
    Later { until: Time, obstacle: Obstacle },
    /// The time that a pause was given has passed.
    TimePassed,
    /// The lock is ours; `sent` is when it was asked for.
    Granted { sent: Time },
    /// The slice went by; the lock was not granted, or it was without our knowing.
    SliceOver,
    /// A statement failed, the session did not. `needs_operator` as in [`session::Event::OpenFailed`].
    Refused { needs_operator: bool },
    /// The lock was given back; `held` is whether the server says that it had been held.
    Unlocked { held: bool },
    /// The session is without the lock; `clear` is whether the server also has none of the claim's lost sessions any more.
    Settled { clear: bool },
    /// The application ended the claim.
    Release,
}

/// Why a claim does not go on at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Obstacle {
    /// The server was taken over, and terms of before may last still, so the lock was not asked for.
    Grace,
    /// Another session holds the lock, or another claim on this one; and this session queues for nobody, since others use it.
    Busy,
    /// A statement was refused for this claim, and others use the session.
    Refused,
}

/// What is to be announced to the application, before the next action begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Notice {
    /// The lock is held, until `until` at least.
    Acquired { until: Time },
    /// The term goes on until `until` at least.
    Renewed { until: Time },
    /// Another session holds the lock.
    Busy,
    /// Nobody is granted a lock yet.
    InGrace,
    /// The term is over.
    Lost(LossReason),
    /// An attempt to get a session, or to ask for the lock, failed.
    Failed,
}

/// What comes of an event: what the application is to be told, and what the session's machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Effects {
    pub(crate) notice: Option<Notice>,
    pub(crate) session: Option<session::Event>,
}

impl Effects {
    const NONE: Self = Self { notice: None, session: None };

    fn tell_session(event: session::Event) -> Self {
        Self { notice: None, session: Some(event) }
    }
}

impl Machine {
    /// Begins a claim.
    pub(crate) fn new(uncertainty_window: Duration, shares: bool) -> Self {
        Self { uncertainty_window, shares, state: State::WantingSession, uncertain_until: Time::ZERO }
    }

    /// As [`new`](Self::new), for a claim that had other sessions before, for which the server may hold something until then.
    pub(crate) fn uncertain_until_then(self, uncertain_until: Time) -> Self {
        Self { uncertain_until, ..self }
    }

    /// What to do next.
    pub(crate) fn action(&self) -> Action {
        match self.state {
            State::WantingSession
            | State::Confirming { .. }
            | State::Held
            | State::SessionClosing { .. }
            | State::Leaving { .. } => Action::Wait,
            State::Trying => Action::Try,
            State::Pausing { until } => Action::Pause { until },
            State::Queueing => Action::Queue,
            State::Unlocking => Action::Unlock,
            State::Settling { .. } => Action::Settle,
            State::Ended(end) => Action::Finish(end),
        }
    }

    /// Takes in what happened to the claim, at `now`.
    ///
    /// An event that cannot follow the state changes nothing, and is reported: see [`misplaced`].
    pub(crate) fn handle(&mut self, event: Event, now: Time) -> Effects {
        match (self.state, event) {
            (_, Event::Release) => self.release(now),

            (State::Trying, Event::Busy) => {
                self.state = State::Queueing;
                Effects { notice: Some(Notice::Busy), session: Some(session::Event::Served) }
            }
            (State::Trying, Event::Later { until, obstacle }) => {
                self.state = State::Pausing { until };
                match obstacle {
                    Obstacle::Grace => {
                        Effects { notice: Some(Notice::InGrace), session: Some(session::Event::Served) }
                    }
                    Obstacle::Busy => {
                        Effects { notice: Some(Notice::Busy), session: Some(session::Event::Served) }
                    }
                    Obstacle::Refused => Effects { notice: Some(Notice::Failed), session: None },
                }
            }
            (State::Pausing { until }, Event::TimePassed) => {
                // Too early: whoever has slept looks again.
                if now >= until {
                    self.state = State::Trying;
                }
                Effects::NONE
            }
            (State::Trying | State::Queueing, Event::Granted { sent }) => {
                // Unless it is shared, only one session can have the lock, so no lost one does; and one that queued still would have
                // been served first.
                if !self.shares {
                    self.uncertain_until = Time::ZERO;
                }
                self.state = State::Confirming { granted: now };
                Effects::tell_session(session::Event::LockGranted { sent })
            }
            (State::Queueing, Event::SliceOver) => Effects::NONE,
            // It may have been granted before it was refused; or in a slice before, without our knowing.
            (State::Trying | State::Queueing, Event::Refused { needs_operator }) => {
                self.state = State::Settling { then: Next::Retry };
                Effects {
                    notice: Some(Notice::Failed),
                    session: Some(session::Event::Refused { needs_operator }),
                }
            }

            // A lost session of the claim's may share the lock still: whoever settles asks for it.
            (State::Unlocking, Event::Unlocked { held: true }) if now < self.uncertain_until => {
                self.state = State::Settling { then: Next::End };
                Effects::NONE
            }
            (State::Unlocking, Event::Unlocked { held }) => {
                self.end(if held { End::Released } else { End::NotHeld })
            }
            (State::Unlocking | State::Settling { .. }, Event::Refused { needs_operator }) => {
                let uncertain_before = self.uncertain_until;
                self.uncertain_until = now + self.uncertainty_window;
                self.state = self.without_session(uncertain_before);
                Effects::tell_session(session::Event::Refused { needs_operator })
            }
            // Whether the lock had been granted in passing is of no interest: this session does not hold it now. But the
            // one that does may be a lost one of ours.
            (State::Settling { then: Next::End }, Event::Settled { clear }) => {
                let end = if clear { End::Released } else { self.end_by_time(now) };
                self.end(end)
            }
            // A session that was refused something is not used again: the next one is looked at, and looks at the catalog.
            (State::Settling { then: Next::Retry }, Event::Settled { .. }) => {
                self.state = State::SessionClosing { uncertain_before: self.uncertain_until };
                Effects::NONE
            }

            (state, event) => {
                misplaced(&state, &event);
                Effects::NONE
            }
        }
    }

    /// Takes in what the session's machine has to tell its claims, at `now`; says what to announce.
    pub(crate) fn handle_session(&mut self, notice: session::Notice, now: Time) -> Option<Notice> {
        match (self.state, notice) {
            (State::WantingSession, session::Notice::Ready) => {
                self.state = State::Trying;
                None
            }
            (State::WantingSession, session::Notice::Unavailable) => Some(Notice::Failed),
            // It came while the connection before was being closed.
            (State::WantingSession, session::Notice::Closed { .. }) => None,

            (State::Confirming { .. }, session::Notice::LeasedUntil(until)) => {
                self.state = State::Held;
                Some(Notice::Acquired { until })
            }
            (State::Held, session::Notice::LeasedUntil(until)) => Some(Notice::Renewed { until }),
            // It is no term yet. What has begun goes on until its time is over.
            (State::Confirming { .. }, session::Notice::Unconfirmed) => Some(Notice::Failed),
            (State::Held, session::Notice::Unconfirmed) => None,

            (
                State::Trying
                | State::Queueing
                | State::Confirming { .. }
                | State::Held
                | State::Unlocking
                | State::Settling { .. },
                session::Notice::Lost(reason),
            ) => self.lose_session(reason, now),

            (State::SessionClosing { uncertain_before }, session::Notice::Closed { gone }) => {
                if gone {
                    self.uncertain_until = uncertain_before;
                }
                self.state = State::WantingSession;
                None
            }
            (State::Leaving { uncertain_before }, session::Notice::Closed { gone }) => {
                if gone {
                    self.uncertain_until = uncertain_before;
                }
                self.state = State::Ended(self.end_by_time(now));
                None
            }

            // It has asked for nothing on the session.
            (State::Pausing { .. }, session::Notice::Lost(_)) => {
                self.state = State::SessionClosing { uncertain_before: self.uncertain_until };
                Some(Notice::Failed)
            }

            // It has left the session already, and waits for it to be closed. If it has left something there, that lives as
            // long as the session does, which others may have used until now.
            (
                State::SessionClosing { uncertain_before } | State::Leaving { uncertain_before },
                session::Notice::Lost(_) | session::Notice::Retired,
            ) => {
                if self.uncertain_until > uncertain_before {
                    self.uncertain_until = now + self.uncertainty_window;
                }
                None
            }

            // The lease is renewed for another claim on the session.
            (
                State::Trying
                | State::Pausing { .. }
                | State::Queueing
                | State::Unlocking
                | State::Settling { .. }
                | State::SessionClosing { .. }
                | State::Leaving { .. },
                session::Notice::LeasedUntil(_) | session::Notice::Unconfirmed,
            )
            | (State::Ended(_), _) => None,
            (state, notice) => {
                misplaced(&state, &notice);
                None
            }
        }
    }

    /// Until when the server may hold something for a session that was lost.
    pub(crate) fn uncertain_until(&self) -> Time {
        self.uncertain_until
    }

    /// When the lock was granted that it does not hold before the session's lease lasts, and that is confirmed.
    pub(crate) fn granted_at(&self) -> Option<Time> {
        match self.state {
            State::Confirming { granted } => Some(granted),
            _ => None,
        }
    }

    /// Whether it holds its lock, as far as the session's lease lasts.
    pub(crate) fn holds(&self) -> bool {
        matches!(self.state, State::Confirming { .. } | State::Held)
    }

    /// Whether the session may have something for it, or does something for it.
    pub(crate) fn uses_session(&self) -> bool {
        matches!(
            self.state,
            State::Trying
                | State::Pausing { .. }
                | State::Queueing
                | State::Confirming { .. }
                | State::Held
                | State::Unlocking
                | State::Settling { .. }
        )
    }

    /// It goes on elsewhere, and has nothing on the session.
    pub(crate) fn leave(&mut self) {
        if !matches!(
            self.state,
            State::WantingSession | State::Trying | State::Pausing { .. } | State::Ended(_)
        ) {
            misplaced(&self.state, &"leave");
        }
        self.state = State::Ended(End::Released);
    }

    fn release(&mut self, now: Time) -> Effects {
        self.state = match self.state {
            State::WantingSession | State::Trying | State::Pausing { .. } => {
                State::Ended(self.end_by_time(now))
            }
            State::Queueing | State::Settling { .. } => State::Settling { then: Next::End },
            State::Confirming { .. } | State::Held => State::Unlocking,
            State::SessionClosing { uncertain_before } => State::Leaving { uncertain_before },
            ending @ (State::Unlocking | State::Leaving { .. } | State::Ended(_)) => ending,
        };
        Effects::NONE
    }

    fn lose_session(&mut self, reason: LossReason, now: Time) -> Option<Notice> {
        let notice = match self.state {
            State::Held => Some(Notice::Lost(reason)),
            State::Queueing | State::Confirming { .. } => Some(Notice::Failed),
            _ => None,
        };
        let uncertain_before = self.uncertain_until;
        // Whatever the server has said of the session's end: it lets go of the locks afterwards.
        if reason != LossReason::Unlocked {
            self.uncertain_until = now + self.uncertainty_window;
        }
        self.state = self.without_session(uncertain_before);
        notice
    }

    /// What follows where the session is being closed.
    fn without_session(&self, uncertain_before: Time) -> State {
        match self.state {
            State::Unlocking | State::Settling { then: Next::End } => State::Leaving { uncertain_before },
            _ => State::SessionClosing { uncertain_before },
        }
    }

    fn end(&mut self, end: End) -> Effects {
        self.state = State::Ended(end);
        Effects::NONE
    }

    /// How the claim ends when the session at hand holds nothing: what the server was not told of, it will notice.
    fn end_by_time(&self, now: Time) -> End {
        if now < self.uncertain_until { End::Unconfirmed } else { End::Released }
    }
}
