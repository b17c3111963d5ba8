//! What all the claims of one lock have in common.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::lock::{LockValuer, annotate};
use crate::pg::config::LeasePlan;
use crate::pg::pool::Pool;
use crate::pg::sql::Request;

/// What the claims of one lock ask for, and the times that they are given.
pub(crate) struct LockSpec {
    pub(crate) request: Request,
    pub(crate) valuer: Option<LockValuer>,
    /// True if the last call of the valuer took under 1 ms.
    pub(crate) valuer_is_fast: AtomicBool,
    pub(crate) plan: LeasePlan,
    pub(crate) wait_slice: Duration,
    pub(crate) release_timeout: Duration,
    /// The newest term of this lock that is over in this process, with its token and the time of its grant. Whoever has it takes no other mutex.
    pub(crate) last_term: Mutex<Option<(i64, Instant)>>,
    pub(crate) pool: Arc<Pool>,
}

/// How long the server may hold something for a session that was lost without its knowing.
pub(crate) fn uncertainty_window(lease: Duration, wait_slice: Duration) -> Duration {
    // A slice may wait twice: for the lock, and for a predecessor's fenced transactions.
    lease + 2 * wait_slice
}

impl LockSpec {
    /// As the [function](uncertainty_window), for this lock.
    pub(crate) fn uncertainty_window(&self) -> Duration {
        uncertainty_window(self.plan.lease, self.wait_slice)
    }

    /// By when the server must have answered a short statement that begins now.
    pub(crate) fn soon(&self) -> Instant {
        Instant::now() + self.plan.heartbeat_timeout
    }

    /// By when the server must have answered a statement that waits for a slice from now on.
    pub(crate) fn after_slice(&self) -> Instant {
        self.soon() + 2 * self.wait_slice
    }

    /// A term with this token is over for the application, if there was one. It was granted at `began`.
    pub(crate) fn note_term_end(&self, token: Option<i64>, began: Instant) {
        let mut last = self.last_term.lock();
        *last = last.max(token.map(|token| (token, began)));
    }

    /// True if there is no valuer, or if it was fast the last time.
    pub(crate) fn annotates_fast(&self) -> bool {
        self.valuer.is_none() || self.valuer_is_fast.load(Relaxed)
    }

    /// The annotation of a term that is about to begin. Calls the valuer, which is the application's.
    pub(crate) fn annotation(&self, key: &str) -> Option<Vec<u8>> {
        let valuer = self.valuer.as_ref()?;
        let begun = Instant::now();
        let annotation = annotate(key, valuer);
        self.valuer_is_fast.store(begun.elapsed() < Duration::from_millis(1), Relaxed);
        annotation
    }
}

impl fmt::Debug for LockSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LockSpec").field("request", &self.request).finish_non_exhaustive()
    }
}
