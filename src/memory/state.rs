//! What a memory server knows: its managers, and a queue of claims for each key.
//!
//! Everything here runs under the server's mutex, so nothing here may call an application's code or drop a handle,
//! whose destructor comes back for the mutex and may run the destructor of an application's valuer. What has to be done
//! once the mutex is free is written into an [`Aftermath`].

use std::collections::{HashMap, VecDeque};
use std::convert::Infallible;
use std::sync::{Arc, Weak};

use crossbeam_channel::{Receiver, Sender, bounded};

use super::lock::MemoryLock;
use crate::error::{Error, ErrorKind, Result};
use crate::key::Key;
use crate::lock::Lost;
use crate::loss::{Loss, LossReason};
use crate::term::Term;

#[derive(Default)]
pub(super) struct State {
    down: bool,
    /// Those that were not stopped: to be absent is to be stopped.
    managers: HashMap<u64, Manager>,
    /// First come, first served. Unless the server is down, the front of a queue has the lock. No queue is empty.
    queues: HashMap<Key, VecDeque<Claim>>,
    last_id: u64,
}

#[derive(Default)]
struct Manager {
    started: bool,
    handles: HashMap<Key, Weak<MemoryLock>>,
}

/// From the first `lock` or `try_lock` to the release.
pub(super) struct Claim {
    id: u64,
    lock: Arc<MemoryLock>,
    stage: Stage,
    changed: Change,
}

/// ```text
///            front of the queue            annotated
/// Waiting ------------------------> Granted --------> Held
///    ^                                 |                |
///    +---------------------------------+----------------+
///               revoked, or the server went down
/// ```
enum Stage {
    Waiting,
    /// The server gave the lock to this claim, and somebody is asking the valuer. No term has begun.
    Granted {
        id: u64,
    },
    Held(HeldTerm),
}

struct HeldTerm {
    /// Dropped at the end of the term, which disconnects `lost`.
    _alive: Sender<Infallible>,
    lost: Lost,
    /// The number of the grant, and so greater than those of all terms before.
    token: u64,
    annotation: Option<Vec<u8>>,
}

/// Wakes those who wait for a claim to change: they listen to a channel that disconnects at the next change.
struct Change {
    _next: Sender<Infallible>,
    listen: Receiver<Infallible>,
}

/// What a caller finds who wants a claim to hold its lock.
pub(super) enum Sight {
    Held,
    /// Another claim has the lock.
    Queued(Receiver<Infallible>),
    /// It is not known yet who has the lock: the server is down, or this claim's term is just beginning.
    Unknown(Receiver<Infallible>),
    /// The claim was released.
    Gone,
}

/// A lock that was given to a claim whose term has not begun.
pub(super) struct Grant {
    pub(super) lock: Arc<MemoryLock>,
    claim: u64,
    id: u64,
}

/// What is left to do when the mutex is free again.
#[derive(Default)]
pub(super) struct Aftermath {
    /// To be annotated, then begun with [`State::begin_term`].
    pub(super) grants: Vec<Grant>,
    /// Only to be dropped.
    pub(super) gone: Vec<Claim>,
}

impl State {
    pub(super) fn is_down(&self) -> bool {
        self.down
    }

    pub(super) fn add_manager(&mut self) -> u64 {
        let id = self.next_id();
        self.managers.insert(id, Manager::default());
        id
    }

    pub(super) fn start_manager(&mut self, manager: u64) -> Result<()> {
        self.managers.get_mut(&manager).ok_or_else(stopped)?.started = true;
        Ok(())
    }

    pub(super) fn stop_manager(&mut self, manager: u64, aftermath: &mut Aftermath) {
        if self.managers.remove(&manager).is_none() {
            return;
        }
        let claimed: Vec<Key> = (self.queues.iter())
            .filter(|(_, queue)| queue.iter().any(|claim| claim.lock.manager == manager))
            .map(|(key, _)| key.clone())
            .collect();
        for key in &claimed {
            self.end_claim(manager, key, aftermath);
        }
    }

    /// The handle that the manager has for the key, or else the one that `make` makes.
    pub(super) fn handle(
        &mut self,
        manager: u64,
        key: &Key,
        make: impl FnOnce() -> Arc<MemoryLock>,
    ) -> Result<Arc<MemoryLock>> {
        let handles = &mut self.managers.get_mut(&manager).ok_or_else(stopped)?.handles;
        if let Some(lock) = handles.get(key).and_then(Weak::upgrade) {
            return Ok(lock);
        }
        let lock = make();
        handles.insert(key.clone(), Arc::downgrade(&lock));
        Ok(lock)
    }

    /// Forgets a handle that is being dropped, unless a new one has taken its place.
    pub(super) fn forget_handle(&mut self, lock: &MemoryLock) {
        let Some(manager) = self.managers.get_mut(&lock.manager) else { return };
        if manager.handles.get(&lock.key).is_some_and(|known| std::ptr::eq(known.as_ptr(), lock)) {
            manager.handles.remove(&lock.key);
        }
    }

    pub(super) fn is_stopped(&self, manager: u64) -> bool {
        !self.managers.contains_key(&manager)
    }

    /// The claim of the manager on the key, and whether it was begun now since there was none.
    pub(super) fn claim(
        &mut self,
        manager: u64,
        key: &Key,
        aftermath: &mut Aftermath,
    ) -> Result<(u64, bool)> {
        let known = self.managers.get(&manager).ok_or_else(stopped)?;
        if !known.started {
            return Err(Error::new(
                ErrorKind::SyncManagerStopped,
                "the manager was not started; call `start` before locking",
            ));
        }
        if let Some(claim) = self.find(manager, key) {
            return Ok((claim.id, false));
        }
        // The caller has the handle in its hands, so it is known unless the manager was stopped.
        let lock = known.handles.get(key).and_then(Weak::upgrade).ok_or_else(stopped)?;
        let id = self.next_id();
        let claim = Claim { id, lock, stage: Stage::Waiting, changed: Change::new() };
        self.queues.entry(key.clone()).or_default().push_back(claim);
        self.grant(key, aftermath);
        Ok((id, true))
    }

    /// The number of the manager's claim on the key, if there is one.
    pub(super) fn claim_of(&self, manager: u64, key: &Key) -> Option<u64> {
        self.find(manager, key).map(|claim| claim.id)
    }

    pub(super) fn look(&self, manager: u64, key: &Key, id: u64) -> Sight {
        match self.find(manager, key).filter(|claim| claim.id == id) {
            None => Sight::Gone,
            Some(Claim { stage: Stage::Held(_), .. }) => Sight::Held,
            Some(Claim { stage: Stage::Waiting, changed, .. }) if !self.down => {
                Sight::Queued(changed.listen.clone())
            }
            Some(claim) => Sight::Unknown(claim.changed.listen.clone()),
        }
    }

    /// The term, if there is one.
    pub(super) fn term(&self, manager: u64, key: &Key) -> Option<Term> {
        match &self.find(manager, key)?.stage {
            Stage::Held(term) => Some(Term::new(term.lost.clone(), i64::try_from(term.token).ok())),
            Stage::Waiting | Stage::Granted { .. } => None,
        }
    }

    /// Ends the manager's claim on the key, if there is one, and gives the lock to the next in the queue.
    pub(super) fn end_claim(&mut self, manager: u64, key: &Key, aftermath: &mut Aftermath) {
        let Some(queue) = self.queues.get_mut(key) else { return };
        let Some(index) = queue.iter().position(|claim| claim.lock.manager == manager) else { return };
        if let Some(mut claim) = queue.remove(index) {
            // The old term ends before the next one begins.
            claim.enter(Stage::Waiting);
            aftermath.gone.push(claim);
        }
        if queue.is_empty() {
            self.queues.remove(key);
        } else {
            self.grant(key, aftermath);
        }
    }

    /// Begins the term of a grant, unless the lock was taken back in the meantime.
    pub(super) fn begin_term(&mut self, grant: &Grant, annotation: Option<Vec<u8>>) {
        let front = self.queues.get_mut(&grant.lock.key).and_then(VecDeque::front_mut);
        if let Some(claim) = front
            && claim.id == grant.claim
            && matches!(claim.stage, Stage::Granted { id } if id == grant.id)
        {
            let (alive, lost) = bounded(0);
            claim.enter(Stage::Held(HeldTerm { _alive: alive, lost, token: grant.id, annotation }));
        }
    }

    pub(super) fn revoke(&mut self, key: &Key, aftermath: &mut Aftermath) -> bool {
        if self.down {
            return false;
        }
        let Some(queue) = self.queues.get_mut(key) else { return false };
        if let Some(mut claim) = queue.pop_front() {
            claim.lose(LossReason::Revoked);
            queue.push_back(claim);
        }
        self.grant(key, aftermath);
        true
    }

    pub(super) fn go_down(&mut self) {
        self.down = true;
        for claim in self.queues.values_mut().flatten() {
            claim.lose(LossReason::ConnectionClosed);
        }
    }

    pub(super) fn come_up(&mut self, aftermath: &mut Aftermath) {
        self.down = false;
        for queue in self.queues.values_mut() {
            // Those who asked `try_lock` can now be told.
            queue.iter_mut().for_each(|claim| claim.changed = Change::new());
        }
        let claimed: Vec<Key> = self.queues.keys().cloned().collect();
        for key in &claimed {
            self.grant(key, aftermath);
        }
    }

    pub(super) fn annotation(&self, key: &Key) -> Option<Vec<u8>> {
        match &self.queues.get(key)?.front()?.stage {
            Stage::Held(term) => term.annotation.clone(),
            Stage::Waiting | Stage::Granted { .. } => None,
        }
    }

    /// The claims on the key that do not have the lock.
    pub(super) fn waiting(&self, key: &Key) -> usize {
        let waits = |claim: &&Claim| matches!(claim.stage, Stage::Waiting);
        self.queues.get(key).map_or(0, |queue| queue.iter().filter(waits).count())
    }

    /// How many keys the server and its managers know of.
    pub(super) fn known_keys(&self) -> usize {
        self.queues.len() + self.managers.values().map(|manager| manager.handles.len()).sum::<usize>()
    }

    /// Gives the lock to the front of the queue, if nobody has it.
    fn grant(&mut self, key: &Key, aftermath: &mut Aftermath) {
        let id = self.next_id();
        let front = self.queues.get_mut(key).and_then(VecDeque::front_mut);
        if let Some(claim) = front
            && !self.down
            && matches!(claim.stage, Stage::Waiting)
        {
            claim.enter(Stage::Granted { id });
            aftermath.grants.push(Grant { lock: Arc::clone(&claim.lock), claim: claim.id, id });
        }
    }

    fn find(&self, manager: u64, key: &Key) -> Option<&Claim> {
        self.queues.get(key)?.iter().find(|claim| claim.lock.manager == manager)
    }

    fn next_id(&mut self) -> u64 {
        self.last_id += 1;
        self.last_id
    }
}

impl Claim {
    fn enter(&mut self, stage: Stage) {
        self.stage = stage;
        self.changed = Change::new();
    }

    /// Ends the term, if there is one, and waits for another.
    fn lose(&mut self, reason: LossReason) {
        if matches!(self.stage, Stage::Held(_)) {
            // Who hears the lost channel may ask for the reason at once.
            *self.lock.last_loss.lock() = Some(Loss::now(reason));
        }
        self.enter(Stage::Waiting);
    }
}

impl Change {
    fn new() -> Self {
        let (next, listen) = bounded(0);
        Self { _next: next, listen }
    }
}

pub(super) fn stopped() -> Error {
    Error::new(ErrorKind::SyncManagerStopped, "the manager was stopped, which is for good; make a new one")
}
