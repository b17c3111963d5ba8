//! How a claim stands: what is under its mutex.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};

use crate::clock::Moment;
use crate::error::{Error, Result};
use crate::expiry::Expiry;
use crate::loss::{Alive, Loss, LossReason, Lost, lost_already};
use crate::pg::session::machine::Confirms;

/// How long a claim goes on by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Span {
    /// Until the application ends it: another term follows on one that was lost.
    UntilReleased,
    /// For one term at the most; if it does not wait for that, until the server says that another session holds the lock. Then it
    /// ends, for which it has `at_most`. A caller that `has_others` does not wait for a session while it has these.
    OneTerm { waits: bool, has_others: bool, at_most: Duration },
}

/// How a claim stands.
#[derive(Debug)]
pub(super) struct Status {
    pub(super) phase: Phase,
    /// Why an attempt failed, most recently, in this phase. The error may have one of the application's in it, whose destructor may ask for
    /// this status: whoever takes it out drops it when the mutex is free.
    pub(super) problem: Option<Error>,
    /// How many attempts have failed so far.
    pub(super) failed_attempts: u64,
    /// The channel of the current term, or of the last one.
    pub(super) lost: Lost,
    /// Of the current term, or of the last one.
    pub(super) token: Option<i64>,
    /// The same, of a semaphore: which of its permits.
    pub(super) permit: Option<u32>,
    pub(super) last_loss: Option<Loss>,
    /// Until when the server may hold something for a session of this claim that was lost.
    pub(super) uncertain_until: Option<Moment>,
    /// The backends of its lost sessions, whose loss the server may not have noticed yet, and when each was lost.
    pub(super) lost_backends: Vec<(Moment, i32)>,
    /// The server has answered what shows that the lock is held, and what must confirm it has not.
    pub(super) unconfirmed: Confirms,
    /// The session at hand was killed while there was no term, so none may begin on it.
    pub(super) session_killed: bool,
    /// Disconnects at the next change; there while somebody waits for it.
    pub(super) changed: Option<(Sender<Infallible>, Receiver<Infallible>)>,
}

/// Which step of its life it is in.
#[derive(Debug)]
pub(super) enum Phase {
    /// No session, or no answer yet.
    Acquiring,
    /// Another session holds the lock. A claim that `takes_turns` has no place in the server's queue.
    Queueing { takes_turns: bool },
    /// The server was taken over: nobody is granted a lock before then.
    InGrace { ends: Instant },
    Held {
        until: Arc<Expiry>,
        /// Dropped at the end of the term, which is the signal.
        _term: Alive,
        warning: Warning,
    },
    /// The application has ended the claim, or one for one term has ended by itself. What must be said to the server must be said by then.
    Ending { reason: EndReason, by: Instant },
    /// All is done.
    Ended { reason: EndReason, outcome: Result<()> },
}

/// What tells that a term is about to end.
#[derive(Debug)]
pub(super) struct Warning {
    /// Dropped to warn, and `None` afterwards; also where nobody wants to be warned.
    pub(super) calm: Option<Sender<Infallible>>,
    pub(super) warned: Option<Receiver<Infallible>>,
}

impl Warning {
    pub(super) fn new(is_wanted: bool) -> Self {
        let (calm, warned) = is_wanted.then(|| bounded(0)).unzip();
        Self { calm, warned }
    }
}

/// Why a claim ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EndReason {
    Released,
    Stopped,
    /// The one term is over.
    Lost,
    /// Another session holds the lock, and the claim does not wait for it.
    Unavailable,
    /// The server was taken over: nobody is granted a lock before then, and the claim does not wait for that.
    InGrace {
        ends: Instant,
    },
    /// The thread that worked on it panicked.
    Failed,
}

impl Status {
    pub(super) fn new() -> Self {
        Self {
            phase: Phase::Acquiring,
            problem: None,
            failed_attempts: 0,
            lost: lost_already(),
            token: None,
            permit: None,
            last_loss: None,
            uncertain_until: None,
            lost_backends: Vec::new(),
            unconfirmed: Confirms::Nothing,
            session_killed: false,
            changed: None,
        }
    }

    /// True until the application ends the claim.
    pub(super) fn is_open(&self) -> bool {
        !matches!(self.phase, Phase::Ending { .. } | Phase::Ended { .. })
    }

    /// Why the time of the term was not prolonged.
    pub(super) fn why_over(&self) -> LossReason {
        if self.unconfirmed == Confirms::All { LossReason::NotConfirmed } else { LossReason::LeaseNotRenewed }
    }

    /// A channel that disconnects at the next change.
    pub(super) fn subscribe(&mut self) -> Receiver<Infallible> {
        self.changed.get_or_insert_with(|| bounded(0)).1.clone()
    }

    pub(super) fn notify(&mut self) {
        self.changed = None;
    }
}
