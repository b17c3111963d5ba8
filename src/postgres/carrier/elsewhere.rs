//! How many claims that sessions carry at first may go on with a session of their own.

use std::sync::Arc;

use crate::sync::{AtomicUsize, Ordering::SeqCst};

/// The places on sessions of their own, for all carriers of a manager.
#[derive(Debug)]
pub(crate) struct Elsewhere {
    free: AtomicUsize,
}

/// A place that is taken until this is dropped.
#[derive(Debug)]
pub(crate) struct Place(Arc<Elsewhere>);

impl Elsewhere {
    pub(crate) fn new(places: usize) -> Arc<Self> {
        Arc::new(Self { free: AtomicUsize::new(places) })
    }

    pub(crate) fn take(self: &Arc<Self>) -> Option<Place> {
        let taken = self.free.fetch_update(SeqCst, SeqCst, |free| free.checked_sub(1));
        taken.is_ok().then(|| Place(Arc::clone(self)))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.free.fetch_add(1, SeqCst);
    }
}
