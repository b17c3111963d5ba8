//! How the claims of a manager stand at one moment, as this process sees it.

use std::fmt;
use std::time::Duration;

use crate::error::{Error, chain};
use crate::loss::Loss;
use crate::observer::Sessions;

/// How a manager and its claims stand: see [`SyncManager::snapshot`](crate::SyncManager::snapshot).
///
/// For people, and for a health check. It is of the past when it arrives: whoever wants to know whether a lock is held asks the
/// lock or the guard.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Snapshot {
    /// True from the manager's start to its stop.
    pub is_running: bool,
    /// All claims, those of guards among them, by key.
    pub claims: Vec<ClaimSnapshot>,
    /// The sessions in use; `None` in memory, and when the manager has stopped.
    pub sessions: Option<Sessions>,
    /// The threads without a claim, which wait for the next one for a second.
    pub idle_supervisors: usize,
}

impl Snapshot {
    /// The claim on the lock that is called `key`, as [`Key`](crate::Key) displays it; of several the one that holds the lock.
    #[must_use]
    pub fn claim(&self, key: &str) -> Option<&ClaimSnapshot> {
        let mut claims = self.claims.iter().filter(|claim| claim.key == key);
        let first = claims.clone().next();
        claims.find(|claim| claim.state == ClaimState::Held).or(first)
    }
}

/// How one claim stands.
#[derive(Clone)]
#[non_exhaustive]
pub struct ClaimSnapshot {
    /// The lock's key, in text.
    pub key: String,
    /// True if it is a guard's, which has one term.
    pub is_guard: bool,
    /// True if others may have the lock at the same time.
    pub is_shared: bool,
    /// How far it has come.
    pub state: ClaimState,
    /// The fencing token of the term, if the lock is held and the term has one.
    pub token: Option<i64>,
    /// How long the term lasts yet if no heartbeat is answered any more; `None` if the lock is not held, and in memory.
    pub time_left: Option<Duration>,
    /// How long the takeover grace lasts at the most, during which nobody is granted a lock; `None` where there is none, and in memory.
    /// See [`Config::takeover`](crate::Config::takeover).
    pub grace_left: Option<Duration>,
    /// Why the last attempt at the lock failed; `None` again when the server has answered.
    pub last_error: Option<Error>,
    /// How the last term of this claim was lost, if one was.
    pub last_loss: Option<Loss>,
    /// How many threads of this process wait for a guard of this lock, behind the one whose turn it is.
    pub waiting_threads: usize,
}

impl fmt::Debug for ClaimSnapshot {
    /// Leaves out what there is not.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            key,
            is_guard,
            is_shared,
            state,
            token,
            time_left,
            grace_left,
            last_error,
            last_loss,
            waiting_threads,
        } = self;
        let mut debug = f.debug_struct("ClaimSnapshot");
        debug.field("key", key).field("is_guard", is_guard);
        if *is_shared {
            debug.field("is_shared", is_shared);
        }
        debug.field("state", state);
        if let Some(token) = token {
            debug.field("token", token);
        }
        if let Some(left) = time_left {
            debug.field("time_left", left);
        }
        if let Some(left) = grace_left {
            debug.field("grace_left", left);
        }
        if let Some(error) = last_error {
            debug.field("last_error", &chain(error));
        }
        if let Some(loss) = last_loss {
            debug.field("last_loss", loss);
        }
        if *waiting_threads > 0 {
            debug.field("waiting_threads", waiting_threads);
        }
        debug.finish()
    }
}

/// How far a claim has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ClaimState {
    /// There is no session yet, or the server has not answered. Or the server has granted the lock, and that is not confirmed yet: see
    /// [`Config::quorum`](crate::Config::quorum) and [`TakeoverPolicy::AfterAnyRestart`](crate::TakeoverPolicy::AfterAnyRestart). A claim that has queued stays
    /// [`Queueing`](Self::Queueing) until then.
    Connecting,
    /// Another session holds the lock.
    Queueing,
    /// Another session holds the lock, and the manager has no session left by which to queue for it at the server, so the claim asks again and
    /// again: see [`Config::shared_sessions`](crate::Config::shared_sessions).
    TakingTurns,
    /// The server was taken over, and nobody is granted a lock for a while: see [`Config::takeover`](crate::Config::takeover).
    InGrace,
    /// The lock is held, as far as this process knows.
    Held,
    /// The claim has ended, and the server is being told.
    Releasing,
}
