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
    FenceLook(usize, usize),
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
    /// The claims of a carrier, by their numbers: one comes, is to be released, is heard, and goes on elsewhere.
    Admit(usize, usize),
    ReleaseOne(usize, usize),
    HearOne(usize, usize),
    Move(usize, usize),
    /// The engine of a carrier: it asks for what claims want, hears the answer, and takes in one part of that; it takes the lease off, and
    /// leaves its session.
    Work(usize, Worker),
    Reply(usize),
    TakeIn(usize, usize),
    Rest(usize),
    Leave(usize),
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
    /// A statement for several claims, since the server refuses what this one asks for.
    OneRefused(usize),
    /// The slice ends in the moment of the grant: the session holds the lock, and is told that it does not.
    SliceEndsInGrant,
    /// By an operator.
    WaitCancelled,
    /// The server was restarted, or another one took its place: of the whole server, whichever process it is counted for. `clean` if the
    /// tables that are unlogged are there still; `told` if the processes are told that their sessions are over; `in_turn` if the holder's is
    /// over before the others'.
    TakenOver {
        clean: bool,
        told: bool,
        in_turn: bool,
    },
    /// A standby was promoted, and the primary of before lives on. The process reaches that one only, all others the new one only.
    Promoted,
}

impl Step {
    /// The only process that is concerned, if there is one.
    pub(super) fn process(self) -> Option<usize> {
        match self {
            Self::Tick
            | Self::ExitOfFormer
            | Self::GiveUp(_)
            | Self::Move(..)
            | Self::Fault(Fault::TakenOver { .. } | Fault::Promoted, _) => None,
            Self::Claim(who)
            | Self::Release(who)
            | Self::SeeEndOfTerm(who)
            | Self::CancelContext(who)
            | Self::FenceLook(who, _)
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
            | Self::Admit(who, _)
            | Self::ReleaseOne(who, _)
            | Self::HearOne(who, _)
            | Self::Work(who, _)
            | Self::Reply(who)
            | Self::TakeIn(who, _)
            | Self::Rest(who)
            | Self::Leave(who)
            | Self::Process(who)
            | Self::Cancel(who)
            | Self::Exit(who)
            | Self::Fault(_, who) => Some(who),
        }
    }
}
