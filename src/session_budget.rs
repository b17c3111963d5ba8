//! How many sessions of a manager sets of locks may take, so that no two sets wait for each other's sessions.

use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender, at, bounded, never, select_biased};

use crate::context::Context;
use crate::error::ErrorKind;
use crate::local_queue::LocalQueue;
use crate::sync::Mutex;

/// The sessions that a manager may open, as those see them that take several.
///
/// A set of locks keeps the sessions that it has while it waits for the next one. If sets together could want more than there are, each of them could wait for one
/// that another one keeps. So a set takes its share first, all of it at once, first come, first served.
#[derive(Debug)]
pub struct SessionBudget {
    total: usize,
    free: Mutex<usize>,
    /// The first of the queue waits for a share; the others for their turns.
    queue: Arc<LocalQueue>,
    /// Makes the first one look again. Holds one call: more of them say no more.
    look: Sender<()>,
    called: Receiver<()>,
}

/// The right to as many sessions. Given back when dropped.
#[derive(Debug)]
pub(crate) struct Share {
    budget: Arc<SessionBudget>,
    count: usize,
}

impl SessionBudget {
    pub(crate) fn new(total: usize) -> Arc<Self> {
        let (look, called) = bounded(1);
        Arc::new(Self { total, free: Mutex::new(total), queue: Arc::default(), look, called })
    }

    pub(crate) fn total(&self) -> usize {
        self.total
    }

    /// Waits for a share of `count`, which is no more than the total, until `context` ends: then gives how.
    pub(crate) fn take(self: &Arc<Self>, count: usize, context: &Context) -> Result<Share, ErrorKind> {
        let _turn = self.queue.enter(context)?;
        let deadline = context.expires_at().map_or_else(never, at);
        loop {
            if let Some(share) = self.take_now(count) {
                return Ok(share);
            }
            select_biased! {
                recv(self.called) -> _ => {}
                recv(context.cancelled()) -> _ => return Err(ErrorKind::Cancelled),
                recv(deadline) -> _ => return Err(ErrorKind::TimedOut),
            }
        }
    }

    /// A share of `count`, if it is there and nobody waits.
    pub(crate) fn try_take(self: &Arc<Self>, count: usize) -> Option<Share> {
        let _turn = self.queue.try_enter()?;
        self.take_now(count)
    }

    fn take_now(self: &Arc<Self>, count: usize) -> Option<Share> {
        let mut free = self.free.lock();
        *free = free.checked_sub(count)?;
        Some(Share { budget: Arc::clone(self), count })
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        *self.budget.free.lock() += self.count;
        // Full: it has been called and has not looked since.
        let _ = self.budget.look.try_send(());
    }
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::Duration;

    use super::*;

    #[test]
    fn shares_are_never_more_than_there_is_and_a_large_one_is_not_overtaken() {
        let budget = SessionBudget::new(4);
        let three = budget.try_take(3).unwrap();
        assert!(budget.try_take(2).is_none());
        assert_eq!(budget.take(2, &Context::timeout(Duration::ZERO)).unwrap_err(), ErrorKind::TimedOut);
        thread::scope(|scope| {
            let all = scope.spawn(|| budget.take(4, &Context::background()).map(drop));
            while budget.queue.try_enter().is_some() {
                thread::yield_now();
            }
            assert!(budget.try_take(1).is_none(), "somebody waits");
            drop(three);
            all.join().unwrap().unwrap();
        });
        assert!(budget.try_take(4).is_some());
    }
}
