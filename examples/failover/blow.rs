//! What befalls the leaders, and how soon another one must have taken over.

use std::time::Duration;

use crate::report::Moment;
use crate::worker::LEASE;

/// What befalls a leader.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Blow {
    Terminate,
    Kill,
    Freeze,
    Restart,
}

impl Blow {
    pub(crate) const ALL: [Self; 4] = [Self::Terminate, Self::Kill, Self::Freeze, Self::Restart];

    /// For the timeline.
    pub(crate) fn describe(self) -> &'static str {
        match self {
            Self::Terminate => "an operator ends the leader's session (pg_terminate_backend)",
            Self::Kill => "the leader's process is killed (SIGKILL)",
            Self::Freeze => "the leader's process is frozen (SIGSTOP)",
            Self::Restart => "the server is restarted (fast)",
        }
    }

    /// For the table.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Terminate => "session ended by an operator",
            Self::Kill => "process killed",
            Self::Freeze => "process frozen, thawed later",
            Self::Restart => "server restarted",
        }
    }

    /// Within which time there must be a leader again.
    pub(crate) fn bound(self) -> Duration {
        match self {
            Self::Terminate | Self::Kill => Duration::from_secs(2),
            // The promise: the lease plus one second, whatever happens.
            Self::Freeze => LEASE + Duration::from_secs(1),
            // The server itself takes its time.
            Self::Restart => Duration::from_secs(8),
        }
    }
}

/// A leader that took over.
pub(crate) struct Takeover {
    pub(crate) blow: Blow,
    pub(crate) at: Moment,
    pub(crate) from: usize,
    pub(crate) to: usize,
    pub(crate) took: Duration,
}
