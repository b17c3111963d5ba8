//! What can happen in a world.

use super::process::Worker;
use crate::pg::claim::lifecycle::Event;

/// What can happen; `usize` is the process concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Tick,
    /// The application.
    Claim(usize),
    Release(usize),
    SeeEndOfTerm(usize),
    CancelContext(usize),
    /// The release has taken its time: first its session is killed, then it ends.
    GiveUp(usize),
    /// A fenced transaction.
    FenceLook(usize),
    FenceAsk(usize),
    FenceAnswer(usize),
    FenceEnd(usize),
    /// Whoever works on the claim.
    Thaw(usize, Worker),
    Hear(usize),
    Begin(usize, Worker),
    Conclude(usize, Event),
    Announce(usize),
    /// The supervisor: it looks at the clock and the socket, and makes a caller leave whose context was cancelled.
    Look(usize, Event),
    MakeLeave(usize),
    Kill(usize),
    /// The server.
    Process(usize),
    /// The release's cancel request arrives.
    Cancel(usize),
    /// A session that was terminated is gone.
    Exit(usize),
    /// The same, of a claim that is over.
    ExitOfFormer,
    Fault(Fault, usize),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Fault {
    Frozen {
        worker: Worker,
        /// It has just taken the mutex of the engine.
        with_mutex: bool,
    },
    SessionTerminated,
    NetworkCut,
    ConnectionRefused,
    StatementRefused,
    /// The slice ends in the moment of the grant: the session holds the lock, and is told that it does not.
    SliceEndsInGrant,
    /// By an operator.
    WaitCancelled,
}

impl Step {
    /// The only process that is concerned, if there is one.
    pub(super) fn process(self) -> Option<usize> {
        match self {
            Self::Tick | Self::ExitOfFormer | Self::GiveUp(_) => None,
            Self::Claim(who)
            | Self::Release(who)
            | Self::SeeEndOfTerm(who)
            | Self::CancelContext(who)
            | Self::FenceLook(who)
            | Self::FenceAsk(who)
            | Self::FenceAnswer(who)
            | Self::FenceEnd(who)
            | Self::Thaw(who, _)
            | Self::Hear(who)
            | Self::Begin(who, _)
            | Self::Conclude(who, _)
            | Self::Announce(who)
            | Self::Look(who, _)
            | Self::MakeLeave(who)
            | Self::Kill(who)
            | Self::Process(who)
            | Self::Cancel(who)
            | Self::Exit(who)
            | Self::Fault(_, who) => Some(who),
        }
    }
}
