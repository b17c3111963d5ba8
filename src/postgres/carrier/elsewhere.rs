//! How many claims that sessions carry at first may go on with a session of their own.

use std::sync::Arc;

use crate::sync::{AtomicUsize, Ordering::SeqCst};

/// The places on sessions of their own, for all carriers of a manager.
#[derive(Debug)]
pub(crate) struct Elsewhere {
    free: AtomicUsize,
}

/// The right of one claim to a session of its own, until this is dropped.
#[derive(Debug)]
pub(crate) struct OwnSession(Arc<Elsewhere>);

impl Elsewhere {
    pub(crate) fn new(places: usize) -> Arc<Self> {
        Arc::new(Self { free: AtomicUsize::new(places) })
    }

    pub(crate) fn take(self: &Arc<Self>) -> Option<OwnSession> {
        let taken = self.free.fetch_update(SeqCst, SeqCst, |free| free.checked_sub(1));
        taken.is_ok().then(|| OwnSession(Arc::clone(self)))
    }
}

impl Drop for OwnSession {
    fn drop(&mut self) {
        self.0.free.fetch_add(1, SeqCst);
    }
}
