//! What other threads may do to the session of a claim: watch it, cancel its wait, kill it. And only while it is that
//! claim's.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};
use postgres::CancelToken;

use crate::error::chain;
use crate::postgres::stream::{Dialer, StreamControl};

/// The lever of one claim on one session.
///
/// A cancel request names a session and hits whatever that runs when it arrives. So a request is sent during a slice
/// only, and the slice is not over before its fate is known; and a link is closed before the session goes back to the
/// pool, so that a late hand on the lever moves nothing.
#[derive(Debug)]
pub(crate) struct Link {
    control: StreamControl,
    dialer: Arc<Dialer>,
    token: Token,
    state: Mutex<LinkState>,
    changed: Condvar,
}

struct Token(Arc<CancelToken>);

#[derive(Debug)]
struct LinkState {
    /// The claim is to end: no further slice begins.
    interrupted: bool,
    slice: Slice,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Slice {
    /// The session does something else, or nothing.
    None,
    /// The session waits for the lock.
    Running,
    /// As `Running`, and another thread is sending a cancel request.
    Cancelling,
    /// The cancel request was sent; `known` is whether the server has dealt with it.
    Cancelled { known: bool },
    /// The session is not this claim's any more.
    Closed,
}

impl Link {
    pub(crate) fn new(control: StreamControl, dialer: Arc<Dialer>, token: Arc<CancelToken>) -> Arc<Self> {
        Arc::new(Self {
            control,
            dialer,
            token: Token(token),
            state: Mutex::new(LinkState { interrupted: false, slice: Slice::None }),
            changed: Condvar::new(),
        })
    }

    /// A thread is about to wait for the lock; `false` if it should not.
    pub(crate) fn begin_slice(&self) -> bool {
        let mut state = self.state.lock();
        if state.interrupted {
            return false;
        }
        state.slice = Slice::Running;
        true
    }

    /// The wait is over; `false` if a cancel request may still be on its way.
    ///
    /// Blocks while another thread is sending one, but not longer than until `by`, should that thread have come to grief.
    pub(crate) fn end_slice(&self, by: Instant) -> bool {
        let mut state = self.state.lock();
        while state.slice == Slice::Cancelling {
            if self.changed.wait_until(&mut state, by).timed_out() {
                break;
            }
        }
        let settled = !matches!(state.slice, Slice::Cancelling | Slice::Cancelled { known: false });
        state.slice = Slice::None;
        self.changed.notify_all();
        settled
    }

    /// Ends the wait for the lock, if there is one, and lets no other begin. Blocks until `by` at the latest.
    pub(crate) fn interrupt(&self, by: Instant) {
        /// A request that finds the session idle has no effect, and the slice may not have reached the server yet.
        const AGAIN_AFTER: Duration = Duration::from_millis(20);
        let mut state = self.state.lock();
        state.interrupted = true;
        match state.slice {
            Slice::Running => {}
            // Whatever else it does ends soon.
            Slice::None | Slice::Cancelling | Slice::Cancelled { .. } | Slice::Closed => return,
        }
        loop {
            state.slice = Slice::Cancelling;
            let outcome =
                MutexGuard::unlocked(&mut state, || self.dialer.cancel(&self.control, &self.token.0, by));
            state.slice = Slice::Cancelled { known: outcome.is_ok() };
            self.changed.notify_all();
            if let Err(error) = outcome {
                // Under the mutex, as in `kill`; the logger, which is the application's, not.
                self.control.kill();
                drop(state);
                log::debug!("could not cancel a wait, so its session will be closed: {}", chain(&error));
                return;
            }
            self.changed.wait_for(&mut state, AGAIN_AFTER);
            if !matches!(state.slice, Slice::Cancelled { .. }) || Instant::now() >= by {
                return;
            }
        }
    }

    /// The stream of the session, to look at.
    pub(crate) fn control(&self) -> &StreamControl {
        &self.control
    }

    /// Ends the session, if it is the claim's still.
    pub(crate) fn kill(&self) {
        if self.state.lock().slice != Slice::Closed {
            self.control.kill();
        }
    }

    /// The session leaves the claim.
    pub(crate) fn close(&self) {
        self.state.lock().slice = Slice::Closed;
    }
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("CancelToken")
    }
}
