//! What can befall the workers and their server.

use crate::report::Moment;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// `pg_terminate_backend` for a session that holds a lock.
    TerminateHolder,
    /// The same for any session of the library: one that waits, begins, or is not in use.
    TerminateAny,
    /// `pg_cancel_backend`.
    Cancel,
    /// SIGSTOP, and SIGCONT later.
    FreezeWorker,
    /// SIGKILL, and a new process at once.
    KillWorker,
    /// SIGSTOP for all processes of the server, and SIGCONT later.
    FreezeServer,
    RestartFast,
    RestartImmediate,
}

impl Kind {
    pub(crate) const ALL: [Self; 8] = [
        Self::TerminateHolder,
        Self::TerminateAny,
        Self::Cancel,
        Self::FreezeWorker,
        Self::KillWorker,
        Self::FreezeServer,
        Self::RestartFast,
        Self::RestartImmediate,
    ];

    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::TerminateHolder => "holder terminated",
            Self::TerminateAny => "session terminated",
            Self::Cancel => "query cancelled",
            Self::FreezeWorker => "worker frozen",
            Self::KillWorker => "worker killed",
            Self::FreezeServer => "server frozen",
            Self::RestartFast => "restart fast",
            Self::RestartImmediate => "restart immediate",
        }
    }

    /// Whether a term may end by it in a way that the holder hears of only when another one has begun. A server that is shut down may grant
    /// a lock in its last moment; after a restart the takeover grace comes first.
    pub(crate) fn deposes(self) -> bool {
        match self {
            Self::TerminateHolder | Self::TerminateAny | Self::FreezeWorker | Self::RestartFast => true,
            Self::Cancel | Self::KillWorker | Self::FreezeServer | Self::RestartImmediate => false,
        }
    }
}

/// Who is hit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hit {
    Worker(usize),
    All,
}

impl Hit {
    pub(crate) fn includes(self, worker: usize) -> bool {
        self == Self::All || self == Self::Worker(worker)
    }
}

pub(crate) struct Fault {
    pub(crate) kind: Kind,
    pub(crate) hit: Hit,
    /// Key and token of a writer's term that is surely over.
    pub(crate) term: Option<(usize, i64)>,
    pub(crate) from: Moment,
    /// `Moment::MAX` while it goes on.
    pub(crate) to: Moment,
}
