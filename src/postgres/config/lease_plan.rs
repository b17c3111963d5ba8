//! How the durations of a lease belong together.

use std::time::Duration;

use crate::error::{Error, ErrorKind, Result};

/// The durations that make a loss known before the lock can be given to another; see the manual's
/// `idle_session_timeout`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LeasePlan {
    pub(crate) lease: Duration,
    pub(crate) margin: Duration,
    pub(crate) heartbeat: Duration,
    pub(crate) heartbeat_timeout: Duration,
}

impl LeasePlan {
    /// How long a term lasts, at the most, after the sending of the last heartbeat that was answered.
    ///
    /// The server frees the lock a lease after the last message that it got, which is later than that sending; or, where
    /// its answers are not acknowledged, a lease less one heartbeat after the first such answer (`tcp_user_timeout`),
    /// which may be the very answer that the holder got. Both must be later than the end of the term, by the margin.
    pub(crate) fn term(&self) -> Duration {
        self.lease.saturating_sub(self.heartbeat + self.margin)
    }

    /// Refuses a grace for which a term would be warned of before a renewal is overdue.
    pub(crate) fn check_grace(&self, grace: Duration) -> Result<()> {
        let longest = self.term().saturating_sub(self.heartbeat);
        if grace < longest {
            return Ok(());
        }
        let message = format!(
            "a grace of {grace:?} must be shorter than {longest:?}, which is what a term has left when its renewal is due; \
             shorten it, or set a longer lease, or heartbeats that come sooner"
        );
        Err(Error::new(ErrorKind::InvalidConfig, message))
    }
}
