//! How many claims that sessions carry at first may go on with a session of their own.

use std::sync::Arc;

use crate::sync::{AtomicUsize, Ordering::SeqCst};

/// The places on sessions of their own, for all carriers of a manager.
#[derive(Debug)]
pub(crate) struct DedicatedQuota {
    free: AtomicUsize,
}

/// The right of one claim to a session of its own, until this is dropped.
#[derive(Debug)]
pub(crate) struct DedicatedPermit(Arc<DedicatedQuota>);

impl DedicatedQuota {
    pub(crate) fn new(places: usize) -> Arc<Self> {
        Arc::new(Self { free: AtomicUsize::new(places) })
    }

    pub(crate) fn take(self: &Arc<Self>) -> Option<DedicatedPermit> {
        let taken = self.free.fetch_update(SeqCst, SeqCst, |free| free.checked_sub(1));
        taken.is_ok().then(|| DedicatedPermit(Arc::clone(self)))
    }
}

impl Drop for DedicatedPermit {
    fn drop(&mut self) {
        self.0.free.fetch_add(1, SeqCst);
    }
}
