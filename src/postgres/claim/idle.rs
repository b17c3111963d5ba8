//! The supervisors without a claim, which wait for the next one of the manager.

use std::ptr;
use std::sync::Arc;

use crate::key::AdvisoryKey;
use crate::pg::claim::supervisor::Supervisor;
use crate::sync::Mutex;

/// The supervisors of a manager that have no claim.
///
/// To start a thread takes longer than a claim. So one whose claim has ended waits here for the next, on whatever key and
/// by whatever handle; after a second it leaves, and takes itself off the list. A supervisor knows the list only weakly.
#[derive(Debug, Default)]
pub(crate) struct IdleSupervisors {
    list: Mutex<List>,
}

#[derive(Debug, Default)]
struct List {
    /// With the key that each served last; who became idle last is at the end.
    supervisors: Vec<(AdvisoryKey, Arc<Supervisor>)>,
    /// The manager has stopped: nobody comes for one any more.
    closed: bool,
}

impl IdleSupervisors {
    /// Takes in a supervisor whose claim has ended, if it is free for another one.
    pub(crate) fn add(&self, key: AdvisoryKey, supervisor: &Arc<Supervisor>) {
        {
            let mut list = self.list.lock();
            if !list.closed {
                // Asked under the mutex: one that is free still finds itself on the list when it leaves.
                if supervisor.is_free() {
                    list.supervisors.push((key, Arc::clone(supervisor)));
                }
                return;
            }
        }
        supervisor.dismiss();
    }

    /// The one that served `key` last, which may have its session still; else the one that has been idle for the shortest
    /// time, so that those who are too many come to leave. It may be about to leave.
    pub(crate) fn take(&self, key: AdvisoryKey) -> Option<Arc<Supervisor>> {
        let supervisors = &mut self.list.lock().supervisors;
        let same = supervisors.iter().rposition(|(former, _)| *former == key);
        let index = same.or(supervisors.len().checked_sub(1))?;
        Some(supervisors.remove(index).1)
    }

    /// Takes a supervisor that accepts no more claims off the list.
    pub(crate) fn remove(&self, supervisor: &Supervisor) {
        let removed = {
            let supervisors = &mut self.list.lock().supervisors;
            let index = supervisors.iter().position(|(_, idle)| ptr::eq(&raw const **idle, supervisor));
            let removed = index.map(|index| supervisors.remove(index));
            // A thousand locks that were released at once must not keep room for their supervisors for ever.
            if supervisors.len() < supervisors.capacity() / 4 {
                supervisors.shrink_to_fit();
            }
            removed
        };
        // What a supervisor has is not closed under the mutex.
        drop(removed);
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.list.lock().supervisors.len()
    }

    /// Lets all go, and whoever comes later.
    pub(crate) fn close(&self) {
        let supervisors = {
            let mut list = self.list.lock();
            list.closed = true;
            std::mem::take(&mut list.supervisors)
        };
        supervisors.iter().for_each(|(_, supervisor)| supervisor.dismiss());
    }
}
