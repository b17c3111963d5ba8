//! What a supervisor does next: a pure state machine of one claim, without driver, channel or clock.

use std::time::Duration;

use crate::loss::LossReason;

/// A moment, as the time since the supervisor began. The machine never asks what time it is: it is told.
pub(crate) type Time = Duration;

/// One claim on one lock, from its first attempt to its release.
///
/// ```text
///                 ┌──────────── back-off over ───────────┐
///                 ▼                                      │
///  start ──► Connecting ──── no session ──────────► BackingOff
///                 │ ▲                                    ▲
///       connected │ └────────────── Discarding ──────────┘ (after a failed attempt)
///                 ▼                     ▲
///              Trying ── busy ──► Waiting ⟲ slice over
///                 │ granted          │ granted
///                 ▼                  ▼
///     Confirming ◄─ too late ─► Held ⇄ Renewing ─── session lost, lease over ──► Discarding
///                                    │
///  release: with a lock ──► Unlocking ──► Ended;  after waiting ──► Settling ──► Ended;  else ──► Ended
///
///  a statement that is refused while the session lives: Trying, Waiting, Confirming ──► Settling ──► Discarding
/// ```
///
/// Inputs: [`handle`](Self::handle), which takes what happened and gives what is to be announced. Output:
/// [`action`](Self::action), what is to be done next; it changes nothing, so it may be asked any number of times.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Machine {
    timing: Timing,
    state: State,
    /// When the attempts began to fail, `None` while they succeed.
    failing_since: Option<Time>,
    /// Until when the server may hold something for a session of this claim that was lost.
    in_doubt_until: Time,
    /// Seeds the jitter of the back-off.
    seed: u64,
}

/// The durations that govern a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Timing {
    /// How long a term lasts, at the most, after the sending of the last heartbeat that was answered: the server's
    /// lease less one heartbeat and the margin.
    pub(crate) term: Duration,
    /// How long the server may hold something for a session that was lost without its knowing: a wait, at the end of
    /// which it may be granted the lock, and a lease from then on.
    pub(crate) doubt: Duration,
    /// A heartbeat is sent this long after the one before, at the latest.
    pub(crate) heartbeat: Duration,
    /// At which times.
    pub(crate) rhythm: Rhythm,
}

/// The times at which heartbeats are sent: at `offset`, and from then on once each `period`.
///
/// All claims of a manager have one rhythm. So a process that holds many locks is woken a few times, and then for several
/// of them. Measured with a hundred locks, that halves the processor time: what follows on something alike finds all it
/// needs in the processor's caches, and what is done alone does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Rhythm {
    offset: Time,
    /// Not zero.
    period: Duration,
}

impl Rhythm {
    /// How many times there are between two heartbeats of one claim: few enough for company, and so many that a thousand
    /// locks do not all come at once.
    const TIMES: u32 = 16;

    /// The rhythm of all that send a heartbeat that often, for a claim that begins `late`.
    pub(crate) fn of(heartbeat: Duration, late: Duration) -> Self {
        let period = (heartbeat / Self::TIMES).max(Duration::from_nanos(1));
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
    /// A session is being opened, or taken from the pool.
    Connecting,
    /// No session could be had; the next attempt is at this time.
    BackingOff { until: Time },
    /// A session is there; the lock has not been asked for.
    Trying,
    /// Another session holds the lock; ours queues for it, a slice of time at once. It may come to hold the lock without
    /// our knowing, when the end of a slice races with the grant.
    Waiting,
    /// The lock was granted so long ago that the term would be over: a heartbeat must show that it is ours still.
    Confirming,
    /// The lock is held; `renewed` is when the last answered heartbeat was sent.
    Held { renewed: Time },
    /// As `Held`, and a heartbeat is due.
    Renewing { renewed: Time },
    /// The lock was held and is being given back.
    Unlocking,
    /// The session may have the lock and must be left without it.
    Settling { then: After },
    /// The session is of no use any more and must be closed. `doubt_before` is until when the server may hold something for
    /// sessions that were lost before this one.
    Discarding { then: After, doubt_before: Time },
    /// The claim is over.
    Ended(End),
}

/// What follows when a session has been discarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum After {
    Connect,
    BackOff {
        patient: bool,
    },
    /// The end of the claim, [`Released`](End::Released) or `Unconfirmed` as the doubt then is.
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

/// What the supervisor does next. Each is followed by one event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Action {
    /// Take a session from the pool, and open it if need be: `Connected` or `ConnectFailed`.
    Connect,
    /// Do nothing until then: `Quiet`, `Wanted`.
    Pause { until: Time },
    /// Ask for the lock without waiting: `Granted`, `Busy`.
    Try,
    /// Queue for the lock for one slice: `Granted`, `SliceOver`.
    Queue,
    /// Watch the session until then: `Quiet`.
    Watch { until: Time },
    /// Prove that the session is alive, by then at the latest: `Renewed`.
    Renew { by: Time },
    /// Give the lock back: `Unlocked`.
    Unlock,
    /// Leave the session without any lock: `Settled`.
    Settle,
    /// Close the session without ceremony; if the server has said that it ends it, see whether it has: `Discarded`.
    Discard,
    /// Put the session back into the pool and end.
    Finish(End),
}

/// What happened. `SessionLost` may follow each action that uses a session, `Release` may come at any time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Event {
    Connected,
    /// No session. `patient` if the cause will not go away by itself, so that the next attempt need not hurry.
    ConnectFailed {
        patient: bool,
    },
    /// Another session holds the lock.
    Busy,
    /// The lock is ours; `sent` is when it was asked for.
    Granted {
        sent: Time,
    },
    /// The slice went by; the lock was not granted, or it was without our knowing.
    SliceOver,
    /// A statement failed, the session did not. `patient` as with `ConnectFailed`.
    Refused {
        patient: bool,
    },
    /// The heartbeat sent at `sent` was answered.
    Renewed {
        sent: Time,
    },
    /// Nothing happened until the time given.
    Quiet,
    /// Somebody wants an attempt now.
    Wanted,
    SessionLost(LossReason),
    /// The lock was given back; `held` is whether the server says that it had been held.
    Unlocked {
        held: bool,
    },
    /// The session is without any lock; `clear` is whether the server also has none of the claim's lost sessions any more.
    Settled {
        clear: bool,
    },
    /// The session was closed; `gone` is whether the server has let go of all that it held, as far as is known.
    Discarded {
        gone: bool,
    },
    /// The application ended the claim.
    Release,
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
    /// The term is over.
    Lost(LossReason),
    /// An attempt to get a session, or to ask for the lock, failed.
    Failed,
}

impl Machine {
    /// Begins a claim. `seed` decides the jitter of its back-off.
    pub(crate) fn new(timing: Timing, seed: u64) -> Self {
        Self { timing, state: State::Connecting, failing_since: None, in_doubt_until: Time::ZERO, seed }
    }

    /// What to do next.
    pub(crate) fn action(&self) -> Action {
        match self.state {
            State::Connecting => Action::Connect,
            State::BackingOff { until } => Action::Pause { until },
            State::Trying => Action::Try,
            State::Waiting => Action::Queue,
            // There is no term to lose yet, so the answer has the heartbeat's whole time, whenever the sending is.
            State::Confirming => Action::Renew { by: Time::MAX },
            State::Held { renewed } => Action::Watch { until: self.heartbeat_after(renewed) },
            State::Renewing { renewed } => Action::Renew { by: self.term_end(renewed) },
            State::Unlocking => Action::Unlock,
            State::Settling { .. } => Action::Settle,
            State::Discarding { .. } => Action::Discard,
            State::Ended(end) => Action::Finish(end),
        }
    }

    /// Takes in what happened, at `now`; says what to announce. An event that does not fit the state changes nothing.
    pub(crate) fn handle(&mut self, event: Event, now: Time) -> Option<Notice> {
        // Whatever the event says: a term does not outlive its time. An answer that comes later does not prolong it.
        let term_over = matches!(self.state, State::Held { renewed } | State::Renewing { renewed }
            if now >= self.term_end(renewed) && event != Event::Release);
        let doubt_before = self.in_doubt_until;
        // Whatever the server has said of the session's end: it lets go of the locks afterwards.
        let may_be_held = matches!(event, Event::SessionLost(reason) if reason != LossReason::Unlocked);
        if term_over || (may_be_held && self.may_hold()) {
            self.in_doubt_until = now + self.timing.doubt;
        }
        let discard = |then| State::Discarding { then, doubt_before };
        if term_over {
            self.state = discard(After::Connect);
            return Some(Notice::Lost(LossReason::LeaseNotRenewed));
        }
        match (self.state, event) {
            (_, Event::Release) => self.release(now),

            (State::Connecting, Event::Connected) => self.become_(State::Trying),
            (State::Connecting, Event::ConnectFailed { patient }) => {
                self.back_off(patient, now);
                Some(Notice::Failed)
            }
            (State::BackingOff { until }, Event::Quiet) if now >= until => self.become_(State::Connecting),
            (State::BackingOff { .. }, Event::Wanted) => self.become_(State::Connecting),

            (State::Trying, Event::Busy) => {
                self.failing_since = None;
                self.state = State::Waiting;
                Some(Notice::Busy)
            }
            (State::Trying | State::Waiting, Event::Granted { sent }) => self.grant(sent, now),
            (State::Confirming, Event::Renewed { sent }) => self.grant(sent, now),
            // It may have been granted before it was refused; or in a slice before, without our knowing.
            (State::Trying | State::Waiting | State::Confirming, Event::Refused { patient }) => {
                self.become_(State::Settling { then: After::BackOff { patient } });
                Some(Notice::Failed)
            }
            (State::Trying, Event::SessionLost(_)) => {
                self.become_(discard(After::BackOff { patient: false }))
            }
            (State::Waiting | State::Confirming, Event::SessionLost(_)) => {
                self.become_(discard(After::Connect));
                Some(Notice::Failed)
            }

            (State::Held { renewed }, Event::Quiet) if now >= self.heartbeat_after(renewed) => {
                self.become_(State::Renewing { renewed })
            }
            (State::Renewing { .. }, Event::Renewed { sent }) => {
                self.state = State::Held { renewed: sent };
                Some(Notice::Renewed { until: self.term_end(sent) })
            }
            (State::Held { .. } | State::Renewing { .. }, Event::SessionLost(reason)) => {
                self.state = discard(After::Connect);
                Some(Notice::Lost(reason))
            }
            (State::Held { .. } | State::Renewing { .. }, Event::Refused { .. }) => {
                self.in_doubt_until = now + self.timing.doubt;
                self.state = discard(After::Connect);
                Some(Notice::Lost(LossReason::ServerError))
            }

            (State::Unlocking, Event::Unlocked { held }) => {
                self.become_(State::Ended(if held { End::Released } else { End::NotHeld }))
            }
            (State::Unlocking, Event::SessionLost(_)) => self.become_(discard(After::End)),
            (State::Settling { then }, Event::SessionLost(_)) => self.become_(discard(then)),
            (State::Unlocking | State::Settling { .. }, Event::Refused { .. }) => {
                self.in_doubt_until = now + self.timing.doubt;
                let then = if let State::Settling { then } = self.state { then } else { After::End };
                self.become_(discard(then))
            }
            // Whether the lock had been granted in passing is of no interest: this session does not hold it now. But the
            // one that does may be a lost one of ours.
            (State::Settling { then: After::End }, Event::Settled { clear }) => {
                let end = if clear { End::Released } else { self.end(now) };
                self.become_(State::Ended(end))
            }
            // A session that was refused something is not used again: the next one is looked at, and looks at the catalog.
            (State::Settling { then }, Event::Settled { .. }) => self.become_(discard(then)),

            (State::Discarding { then, doubt_before }, Event::Discarded { gone }) => {
                if gone {
                    self.in_doubt_until = doubt_before;
                }
                match then {
                    After::Connect => self.state = State::Connecting,
                    After::BackOff { patient } => self.back_off(patient, now),
                    After::End => self.state = State::Ended(self.end(now)),
                }
                None
            }
            // An event of an action that a release has overtaken.
            _ => None,
        }
    }

    /// Until when the server may hold something for a session that was lost.
    pub(crate) fn in_doubt_until(&self) -> Time {
        self.in_doubt_until
    }

    /// When a heartbeat is due after one that was sent at `renewed`.
    fn heartbeat_after(&self, renewed: Time) -> Time {
        self.timing.rhythm.last_until(renewed + self.timing.heartbeat)
    }

    /// When a term ends that was renewed by a heartbeat sent at `renewed`.
    fn term_end(&self, renewed: Time) -> Time {
        renewed + self.timing.term
    }

    fn become_(&mut self, state: State) -> Option<Notice> {
        self.state = state;
        None
    }

    /// The lock was asked for at `sent` and is ours. If that was too long ago (the slice took its time, the process was
    /// frozen before it read the answer) the server may have taken it away again: then ask first.
    fn grant(&mut self, sent: Time, now: Time) -> Option<Notice> {
        self.failing_since = None;
        // Only one session can have it, so no lost one does; and one that queued still would have been served first.
        self.in_doubt_until = Time::ZERO;
        let until = self.term_end(sent);
        if now >= until {
            return self.become_(State::Confirming);
        }
        self.state = State::Held { renewed: sent };
        Some(Notice::Acquired { until })
    }

    /// Whether the server may hold the lock for the session of this state.
    fn may_hold(&self) -> bool {
        matches!(
            self.state,
            State::Trying
                | State::Waiting
                | State::Confirming
                | State::Held { .. }
                | State::Renewing { .. }
                | State::Unlocking
                | State::Settling { .. }
        )
    }

    fn release(&mut self, now: Time) -> Option<Notice> {
        self.state = match self.state {
            State::Connecting | State::BackingOff { .. } | State::Trying => State::Ended(self.end(now)),
            State::Waiting | State::Settling { .. } => State::Settling { then: After::End },
            State::Confirming | State::Held { .. } | State::Renewing { .. } => State::Unlocking,
            State::Discarding { doubt_before, .. } => State::Discarding { then: After::End, doubt_before },
            ending => ending,
        };
        None
    }

    /// How the claim ends when the session at hand holds nothing: what the server was not told of, it will notice.
    fn end(&self, now: Time) -> End {
        if now < self.in_doubt_until { End::Unconfirmed } else { End::Released }
    }

    /// Waits for a fraction of the time that the attempts have been failing: quick after a short outage, considerate in
    /// a long one. That is exponential growth, with a pace that does not depend on how long an attempt takes.
    fn back_off(&mut self, patient: bool, now: Time) {
        const SHORTEST: Duration = Duration::from_millis(5);
        const SHORTEST_IF_PATIENT: Duration = Duration::from_millis(200);
        const LONGEST: Duration = Duration::from_secs(2);
        let since = *self.failing_since.get_or_insert(now);
        let shortest = if patient { SHORTEST_IF_PATIENT } else { SHORTEST };
        let pause = ((now - since) / 8).clamp(shortest, LONGEST);
        // Between one half and the whole of it, so that many claims do not come back in step.
        let jitter = fastrand::Rng::with_seed(self.seed ^ now.subsec_nanos() as u64).f32();
        self.state = State::BackingOff { until: now + pause.mul_f32(0.5 + jitter / 2.0) };
    }
}

#[cfg(test)]
mod tests;
