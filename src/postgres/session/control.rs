//! What other threads may do to the session of a claim: watch it, cancel its wait, kill it. And only while it is that
//! claim's.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use postgres::CancelToken;

use crate::error::chain;
use crate::pg::stream::{Dialer, StreamControl};

/// The hold of one claim on one session, for other threads than the one that uses it.
///
/// A cancel request names a session and hits whatever that runs when it arrives. So a request is sent during a slice
/// only, and the slice is not over before its fate is known; and the hold is closed before the session goes back to the
/// pool, so that a thread that comes late changes nothing.
///
/// It waits by means of the standard library, since the process may be forked meanwhile: see `disallowed-types` in `clippy.toml`.
#[derive(Debug)]
pub(crate) struct SessionControl {
    stream: StreamControl,
    dialer: Arc<Dialer>,
    token: Token,
    state: Mutex<ControlState>,
    /// A slice has ended whose end another thread may wait for, or a cancel request has been sent.
    changed: Condvar,
}

struct Token(Arc<CancelToken>);

#[derive(Debug)]
struct ControlState {
    /// The claim is to end: no further slice begins.
    interrupted: bool,
    slice: Slice,
    /// How many slices have begun.
    slices: u64,
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

impl SessionControl {
    pub(crate) fn new(stream: StreamControl, dialer: Arc<Dialer>, token: Arc<CancelToken>) -> Arc<Self> {
        Arc::new(Self {
            stream,
            dialer,
            token: Token(token),
            state: Mutex::new(ControlState { interrupted: false, slice: Slice::None, slices: 0 }),
            changed: Condvar::new(),
        })
    }

    /// A thread is about to wait for the lock; `false` if it should not.
    pub(crate) fn begin_slice(&self) -> bool {
        let mut state = self.state();
        if state.interrupted {
            return false;
        }
        state.slice = Slice::Running;
        state.slices += 1;
        true
    }

    /// The wait is over; `false` if a cancel request may still be on its way.
    ///
    /// Blocks while another thread is sending one, but not longer than until `by`, should that thread have come to grief.
    pub(crate) fn end_slice(&self, by: Instant) -> bool {
        let mut state = self.state();
        while state.slice == Slice::Cancelling && Instant::now() < by {
            state = self.wait(state, by);
        }
        let settled = !matches!(state.slice, Slice::Cancelling | Slice::Cancelled { known: false });
        let before = std::mem::replace(&mut state.slice, Slice::None);
        // Each call of it is a system call, and nobody waits for the end of a slice that nobody has tried to end.
        if before != Slice::Running {
            self.changed.notify_all();
        }
        settled
    }

    /// Ends the wait for the lock, if there is one, and lets no other begin. Blocks until `by` at the latest.
    pub(crate) fn interrupt(&self, by: Instant) {
        let slice = {
            let mut state = self.state();
            state.interrupted = true;
            state.slices
        };
        self.cancel_slice(slice, by);
    }

    /// The number of the slice that is under way, if one is.
    pub(crate) fn slice(&self) -> Option<u64> {
        let state = self.state();
        (!matches!(state.slice, Slice::None | Slice::Closed)).then_some(state.slices)
    }

    /// Ends this wait for the lock, and no later one. Blocks until `by` at the latest; if the wait is not over then, it can be
    /// ended by a kill only. Gives `false` in that case.
    pub(crate) fn cancel_slice(&self, number: u64, by: Instant) -> bool {
        /// A request that finds the session idle has no effect, and the slice may not have reached the server yet. One that is sent again
        /// may hit what ends the slice, which the server logs: so a busy server is given more and more time.
        const AGAIN_AFTER: Duration = Duration::from_millis(50);
        let mut again_after = AGAIN_AFTER;
        let mut state = self.state();
        match state.slice {
            // A request that was sent before may have had no effect.
            Slice::Running | Slice::Cancelled { .. } if state.slices == number => {}
            // It is over, and whatever else the session does ends soon; or another thread is at it.
            _ => return true,
        }
        loop {
            state.slice = Slice::Cancelling;
            drop(state);
            let outcome = self.dialer.cancel(&self.stream, &self.token.0, by);
            state = self.state();
            state.slice = Slice::Cancelled { known: outcome.is_ok() };
            self.changed.notify_all();
            if let Err(error) = outcome {
                // Under the mutex, as in `kill`; the logger, which is the application's, not.
                self.stream.kill();
                drop(state);
                log::debug!("could not cancel a wait, so its session will be closed: {}", chain(&error));
                return true;
            }
            state = self.wait(state, by.min(Instant::now() + again_after));
            again_after *= 2;
            if state.slices != number || !matches!(state.slice, Slice::Cancelled { .. }) {
                return true;
            }
            if Instant::now() >= by {
                return false;
            }
        }
    }

    /// The stream of the session, to look at.
    pub(crate) fn stream(&self) -> &StreamControl {
        &self.stream
    }

    /// Ends the session, if it is the claim's still; whether it was.
    pub(crate) fn kill(&self) -> bool {
        // Under the mutex, so that it is not another claim's when the stream ends.
        let state = self.state();
        let is_ours = state.slice != Slice::Closed;
        if is_ours {
            self.stream.kill();
        }
        is_ours
    }

    /// The session leaves the claim.
    pub(crate) fn close(&self) {
        self.state().slice = Slice::Closed;
    }

    fn state(&self) -> MutexGuard<'_, ControlState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a change, until `by` at the latest.
    fn wait<'a>(&self, state: MutexGuard<'a, ControlState>, by: Instant) -> MutexGuard<'a, ControlState> {
        let at_most = by.saturating_duration_since(Instant::now());
        self.changed.wait_timeout(state, at_most).unwrap_or_else(PoisonError::into_inner).0
    }
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("CancelToken")
    }
}
