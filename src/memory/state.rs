//! What a memory server knows: its managers, and a queue of claims for each key.
//!
//! Everything here runs under the server's mutex, so nothing here may call an application's code or drop a handle,
//! whose destructor comes back for the mutex and may run the destructor of an application's valuer. What is to be dropped
//! once the mutex is free is put among what is [`Gone`].

use std::collections::{HashMap, VecDeque};
use std::convert::Infallible;
use std::sync::{Arc, Weak};

use crossbeam_channel::{Receiver, Sender, bounded};

use super::lock::MemoryLock;
use crate::error::{Error, Result};
use crate::key::Key;
use crate::loss::{Loss, LossReason, Lost};
use crate::term::{Ask, Fence, Term};

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
    /// For the next term. Made before the lock is given to the claim, since whoever gives a lock away must not wait for
    /// the valuer of whoever gets it.
    annotation: Option<Vec<u8>>,
    stage: Stage,
    changed: Change,
}

/// ```text
///             front of the queue
/// Waiting ------------------------> Held
///    ^                                |
///    +--------------------------------+
///      revoked, or the server went down
/// ```
enum Stage {
    Waiting,
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
    /// Nobody can say who has the lock: the server is down.
    Unknown(Receiver<Infallible>),
    /// The claim was released.
    Gone,
}

/// What a claim would have in its next term, made while the mutex was free.
pub(super) struct Annotated {
    pub(super) claim: u64,
    pub(super) annotation: Option<Vec<u8>>,
}

/// What is left to drop when the mutex is free again.
pub(super) type Gone = Vec<Claim>;

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
        self.managers.get_mut(&manager).ok_or_else(Error::stopped)?.started = true;
        Ok(())
    }

    pub(super) fn stop_manager(&mut self, manager: u64, gone: &mut Gone) {
        if self.managers.remove(&manager).is_none() {
            return;
        }
        let claimed: Vec<Key> = (self.queues.iter())
            .filter(|(_, queue)| queue.iter().any(|claim| claim.lock.manager == manager))
            .map(|(key, _)| key.clone())
            .collect();
        for key in &claimed {
            self.end_claim(manager, key, gone);
        }
    }

    /// The handle that the manager has for the key, or else the one that `make` makes.
    pub(super) fn handle(
        &mut self,
        manager: u64,
        key: &Key,
        make: impl FnOnce() -> Arc<MemoryLock>,
    ) -> Result<Arc<MemoryLock>> {
        let handles = &mut self.managers.get_mut(&manager).ok_or_else(Error::stopped)?.handles;
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

    /// The number of the manager's claim on the key, if there is one, for a call that would begin one.
    pub(super) fn claim_or_none(&self, manager: u64, key: &Key) -> Result<Option<u64>> {
        let known = self.managers.get(&manager).ok_or_else(Error::stopped)?;
        if !known.started {
            return Err(Error::not_started());
        }
        Ok(self.claim_of(manager, key))
    }

    /// The claim of the manager on the key; a new one with this `annotation` if there is none.
    pub(super) fn claim(&mut self, manager: u64, key: &Key, annotation: Option<Vec<u8>>) -> Result<u64> {
        if let Some(claim) = self.claim_or_none(manager, key)? {
            return Ok(claim);
        }
        // The caller has the handle in its hands, so it is known unless the manager was stopped.
        let handles = self.managers.get(&manager).map(|known| &known.handles);
        let lock = handles.and_then(|handles| handles.get(key)?.upgrade()).ok_or_else(Error::stopped)?;
        let id = self.next_id();
        let claim = Claim { id, lock, annotation, stage: Stage::Waiting, changed: Change::new() };
        self.queues.entry(key.clone()).or_default().push_back(claim);
        self.grant(key);
        Ok(id)
    }

    /// The number of the manager's claim on the key, if there is one.
    pub(super) fn claim_of(&self, manager: u64, key: &Key) -> Option<u64> {
        self.find(manager, key).map(|claim| claim.id)
    }

    /// Replaces the annotation of a claim that waits still.
    pub(super) fn annotate(&mut self, key: &Key, annotated: Annotated) {
        let claims = self.queues.get_mut(key).into_iter().flatten();
        for claim in claims.filter(|claim| claim.id == annotated.claim) {
            if let Stage::Waiting = claim.stage {
                claim.annotation = annotated.annotation.clone();
            }
        }
    }

    /// The claim that has the lock, if one has.
    pub(super) fn holder(&self, key: &Key) -> Option<(u64, Arc<MemoryLock>)> {
        let front = self.queues.get(key)?.front()?;
        matches!(front.stage, Stage::Held(_)).then(|| (front.id, Arc::clone(&front.lock)))
    }

    /// All claims, on all locks.
    pub(super) fn claims(&self) -> Vec<(u64, Arc<MemoryLock>)> {
        self.queues.values().flatten().map(|claim| (claim.id, Arc::clone(&claim.lock))).collect()
    }

    pub(super) fn look(&self, manager: u64, key: &Key, id: u64) -> Sight {
        match self.find(manager, key).filter(|claim| claim.id == id) {
            None => Sight::Gone,
            Some(Claim { stage: Stage::Held(_), .. }) => Sight::Held,
            Some(claim) if self.down => Sight::Unknown(claim.changed.listen.clone()),
            Some(claim) => Sight::Queued(claim.changed.listen.clone()),
        }
    }

    /// The term, if there is one.
    pub(super) fn term(&self, manager: u64, key: &Key) -> Option<Term> {
        match &self.find(manager, key)?.stage {
            Stage::Held(term) => {
                Some(Term::new(term.lost.clone(), i64::try_from(term.token).ok(), Some(Arc::new(Unfenced))))
            }
            Stage::Waiting => None,
        }
    }

    /// Ends the manager's claim on the key, if there is one, and gives the lock to the next in the queue.
    pub(super) fn end_claim(&mut self, manager: u64, key: &Key, gone: &mut Gone) {
        let Some(queue) = self.queues.get_mut(key) else { return };
        let Some(index) = queue.iter().position(|claim| claim.lock.manager == manager) else { return };
        if let Some(mut claim) = queue.remove(index) {
            // The old term ends before the next one begins.
            claim.enter(Stage::Waiting);
            gone.push(claim);
        }
        if queue.is_empty() {
            self.queues.remove(key);
        } else {
            self.grant(key);
        }
    }

    /// Takes the lock from this claim, if it has it still; the annotation is for its next term.
    pub(super) fn revoke(&mut self, key: &Key, annotated: Annotated) -> bool {
        let Some(queue) = self.queues.get_mut(key) else { return false };
        let held = queue
            .front()
            .is_some_and(|front| front.id == annotated.claim && matches!(front.stage, Stage::Held(_)));
        if held && let Some(mut claim) = queue.pop_front() {
            claim.lose(LossReason::Revoked);
            claim.annotation = annotated.annotation;
            queue.push_back(claim);
        }
        self.grant(key);
        held
    }

    pub(super) fn go_down(&mut self) {
        self.down = true;
        for claim in self.queues.values_mut().flatten() {
            claim.lose(LossReason::ConnectionClosed);
        }
    }

    pub(super) fn come_up(&mut self) {
        self.down = false;
        for queue in self.queues.values_mut() {
            // Those who asked `try_lock` can now be told.
            queue.iter_mut().for_each(|claim| claim.changed = Change::new());
        }
        let claimed: Vec<Key> = self.queues.keys().cloned().collect();
        for key in &claimed {
            self.grant(key);
        }
    }

    pub(super) fn annotation(&self, key: &Key) -> Option<Vec<u8>> {
        match &self.queues.get(key)?.front()?.stage {
            Stage::Held(term) => term.annotation.clone(),
            Stage::Waiting => None,
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
    fn grant(&mut self, key: &Key) {
        let token = self.next_id();
        let front = self.queues.get_mut(key).and_then(VecDeque::front_mut);
        if let Some(claim) = front
            && !self.down
            && matches!(claim.stage, Stage::Waiting)
        {
            let (alive, lost) = bounded(0);
            let annotation = claim.annotation.take();
            claim.enter(Stage::Held(HeldTerm { _alive: alive, lost, token, annotation }));
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

/// In memory no database keeps the tokens, so the end of the term, which [`Term`] itself looks at, is all there is to know.
#[derive(Debug)]
struct Unfenced;

impl Fence for Unfenced {
    fn hold(&self, _: &mut Ask<'_>, _: i64) -> Result<bool> {
        Ok(true)
    }

    fn is_current(&self, _: &mut Ask<'_>, _: i64) -> Result<bool> {
        Ok(true)
    }
}
