//! What a memory server knows: its managers, and a queue of claims for each key.
//!
//! Everything here runs under the server's mutex, so nothing here may call an application's code or drop a handle,
//! whose destructor comes back for the mutex and may run the destructor of an application's valuer. What is to be dropped
//! once the mutex is free is put among what is [`Gone`].

use std::collections::{HashMap, VecDeque};
use std::convert::Infallible;
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Instant, SystemTime};

use crossbeam_channel::{Receiver, Sender, bounded};

use super::lock::MemoryLock;
use crate::error::{Error, ErrorKind, Result};
use crate::key::{HandleKey, Key};
use crate::loss::{Alive, Loss, LossReason, Lost};
use crate::mode::Mode;
use crate::once::Successes;
use crate::snapshot::{ClaimSnapshot, ClaimState};
use crate::telling::Story;
use crate::term::{Ask, Fence, Term};
use crate::view::{Holder, LockView, Waiter};

#[derive(Default)]
pub(super) struct State {
    down: bool,
    /// Those that were not stopped: to be absent is to be stopped.
    managers: HashMap<u64, Manager>,
    /// First come, first served. Unless the server is down, the front of a queue has the lock, and shares it with those behind it as far as
    /// all of them may. No queue is empty.
    ///
    /// Of a semaphore, those at the front have its permits.
    queues: HashMap<HandleKey, VecDeque<Claim>>,
    last_id: u64,
    /// The token of the last readers of a key, if no writer's term has begun since.
    readers: HashMap<Key, u64>,
    /// How many permits the semaphores have.
    semaphores: HashMap<Key, Permits>,
    /// When the work under a key began that succeeded last. Over an outage they stay, as on a server.
    successes: HashMap<Key, SystemTime>,
    /// What observers are to be told once the mutex is free.
    untold: Vec<Arc<Story>>,
}

#[derive(Clone, Copy)]
struct Permits {
    now: u32,
    /// Before it was changed. Who says so goes on, by the new number.
    former: Option<u32>,
}

#[derive(Default)]
struct Manager {
    started: bool,
    handles: HashMap<HandleKey, Weak<MemoryLock>>,
}

/// From the first `lock` or `try_lock` to the release.
pub(super) struct Claim {
    id: u64,
    lock: Arc<MemoryLock>,
    /// It is a guard's, which is told here how its term was lost, and ends with its term.
    for_one_term: Option<Arc<OnceLock<Loss>>>,
    /// For the next term. Made before the lock is given to the claim, since whoever gives a lock away must not wait for
    /// the valuer of whoever gets it.
    annotation: Option<Vec<u8>>,
    stage: Stage,
    /// Since when it has had its place in the queue.
    queued_since: Instant,
    changed: Change,
    story: Option<Arc<Story>>,
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
    _alive: Alive,
    lost: Lost,
    /// The number of the grant, and so greater than those of all terms before.
    token: u64,
    /// Of a semaphore, which permit.
    permit: Option<u32>,
    annotation: Option<Vec<u8>>,
    since: SystemTime,
    /// Somebody has asked the holder to resign.
    asked_to_resign: bool,
    /// Dropped to warn of the end of the term, and `None` afterwards.
    calm: Option<Sender<Infallible>>,
    warned: Receiver<Infallible>,
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
        let claimed: Vec<HandleKey> = (self.queues.iter())
            .filter(|(_, queue)| queue.iter().any(|claim| claim.lock.manager == manager))
            .map(|(key, _)| key.clone())
            .collect();
        for key in &claimed {
            self.end_where(key, gone, |claim| claim.lock.manager == manager);
        }
    }

    /// The handle that the manager has for the key, or else the one that `make` makes.
    pub(super) fn handle(
        &mut self,
        manager: u64,
        key: &HandleKey,
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
    pub(super) fn claim_or_none(&self, manager: u64, key: &HandleKey) -> Result<Option<u64>> {
        self.check_started(manager)?;
        Ok(self.claim_of(manager, key))
    }

    /// Fails if the manager was stopped, or was not started.
    pub(super) fn check_started(&self, manager: u64) -> Result<()> {
        let known = self.managers.get(&manager).ok_or_else(Error::stopped)?;
        if !known.started {
            return Err(Error::not_started());
        }
        Ok(())
    }

    /// The claim of the manager on the key; a new one with this `annotation` if there is none.
    pub(super) fn claim(
        &mut self,
        manager: u64,
        key: &HandleKey,
        annotation: Option<Vec<u8>>,
        story: Option<Arc<Story>>,
    ) -> Result<u64> {
        if let Some(claim) = self.claim_or_none(manager, key)? {
            return Ok(claim);
        }
        if key.other_mode().is_some_and(|other| self.claim_of(manager, &other).is_some()) {
            let (text, wants_shared) = (key.key.to_string(), key.mode.is_shared());
            return Err(Error::would_deadlock(&text, "a claim of this process", wants_shared));
        }
        // The caller has the handle in its hands, so it is known unless the manager was stopped.
        self.begin(manager, key, annotation, story, None)
    }

    /// A claim of a guard's, for one term.
    pub(super) fn claim_term(
        &mut self,
        manager: u64,
        key: &HandleKey,
        annotation: Option<Vec<u8>>,
        loss: Arc<OnceLock<Loss>>,
        story: Option<Arc<Story>>,
    ) -> Result<u64> {
        self.check_started(manager)?;
        self.begin(manager, key, annotation, story, Some(loss))
    }

    fn begin(
        &mut self,
        manager: u64,
        key: &HandleKey,
        annotation: Option<Vec<u8>>,
        story: Option<Arc<Story>>,
        for_one_term: Option<Arc<OnceLock<Loss>>>,
    ) -> Result<u64> {
        let handles = self.managers.get(&manager).map(|known| &known.handles);
        let lock = handles.and_then(|handles| handles.get(key)?.upgrade()).ok_or_else(Error::stopped)?;
        if key.mode == Mode::Permit {
            self.agree(&key.key, lock.options.permits)?;
        }
        let (id, place) = (self.next_id(), lock.place.clone());
        let (stage, changed) = (Stage::Waiting, Change::new());
        let queued_since = Instant::now();
        let claim = Claim { id, lock, for_one_term, annotation, stage, queued_since, changed, story };
        self.queues.entry(place.clone()).or_default().push_back(claim);
        self.grant(&place);
        Ok(id)
    }

    /// Agrees on a number of permits if nobody has before. Fails where the semaphore has another one.
    fn agree(&mut self, key: &Key, said: u32) -> Result<()> {
        let known = *self.semaphores.entry(key.clone()).or_insert(Permits { now: said, former: None });
        match said == known.now || Some(said) == known.former {
            true => Ok(()),
            false => Err(Error::other_permits(&key.to_string(), said, known.now, "the server says")),
        }
    }

    /// Gives the semaphore another number of permits; how many it had, or was `said` to have if nobody has asked for one yet.
    pub(super) fn set_permits(
        &mut self,
        manager: u64,
        key: &HandleKey,
        said: u32,
        permits: u32,
    ) -> Result<u32> {
        self.check_up(manager)?;
        let known = self.semaphores.get(&key.key).copied().unwrap_or(Permits { now: said, former: None });
        let former = if known.now == permits { known.former } else { Some(known.now) };
        self.semaphores.insert(key.key.clone(), Permits { now: permits, former });
        self.grant(key);
        Ok(known.now)
    }

    /// The queue of the lock with this key; or of the semaphore, if nobody is in the other one.
    pub(super) fn place(&self, key: Key) -> HandleKey {
        let lock = HandleKey { key, mode: Mode::Exclusive };
        if self.queues.contains_key(&lock) { lock } else { HandleKey { mode: Mode::Permit, ..lock } }
    }

    /// The number of the manager's claim on the key, if there is one.
    pub(super) fn claim_of(&self, manager: u64, key: &HandleKey) -> Option<u64> {
        self.find(manager, key).map(|claim| claim.id)
    }

    /// Replaces the annotation of a claim that waits still.
    pub(super) fn annotate(&mut self, key: &HandleKey, annotated: Annotated) {
        let claims = self.queues.get_mut(key).into_iter().flatten();
        for claim in claims.filter(|claim| claim.id == annotated.claim) {
            if let Stage::Waiting = claim.stage {
                claim.annotation = annotated.annotation.clone();
            }
        }
    }

    /// The claim that has the lock, if one has; of several, the first in the queue, or the one that has the first permit.
    fn first(&self, key: &HandleKey) -> Option<&Claim> {
        let claims = self.queues.get(key)?.iter();
        claims.filter(|claim| matches!(claim.stage, Stage::Held(_))).min_by_key(|claim| claim.permit())
    }

    /// The number and the lock of that claim.
    pub(super) fn holder(&self, key: &HandleKey) -> Option<(u64, Arc<MemoryLock>)> {
        self.first(key).map(|first| (first.id, Arc::clone(&first.lock)))
    }

    /// True if the manager runs, and how its claims stand.
    pub(super) fn snapshot(&self, manager: u64) -> (bool, Vec<(Arc<MemoryLock>, ClaimSnapshot)>) {
        let is_running = self.managers.get(&manager).is_some_and(|known| known.started);
        let claims = self.queues.values().flatten().filter(|claim| claim.lock.manager == manager);
        let snapshot = |claim: &Claim| ClaimSnapshot {
            key: claim.lock.text.clone(),
            is_guard: claim.is_for_one_term(),
            is_shared: claim.is_shared(),
            state: match claim.stage {
                Stage::Held(_) => ClaimState::Held,
                Stage::Waiting if self.down => ClaimState::Connecting,
                Stage::Waiting => ClaimState::Queueing,
            },
            token: claim.term().and_then(|term| term.token()),
            time_left: None,
            grace_left: None,
            last_error: None,
            last_loss: None,
            waiting_threads: 0,
        };
        (is_running, claims.map(|claim| (Arc::clone(&claim.lock), snapshot(claim))).collect())
    }

    /// What is to be told when the mutex is free.
    pub(super) fn untold(&mut self) -> Vec<Arc<Story>> {
        std::mem::take(&mut self.untold)
    }

    /// What a manager is told of who has the lock.
    pub(super) fn holder_seen_by(&self, manager: u64, key: &HandleKey) -> Result<Option<Holder>> {
        self.check_up(manager)?;
        Ok(self.first(key).and_then(Claim::holder))
    }

    /// What a manager is told of who has the lock and who waits for it.
    pub(super) fn view(&self, manager: u64, key: &HandleKey) -> Result<LockView> {
        self.check_up(manager)?;
        let claims = || self.queues.get(key).into_iter().flatten();
        let mut holders: Vec<_> = claims().filter_map(Claim::holder).collect();
        holders.sort_by_key(|holder| holder.permit);
        let mut holders = holders.into_iter();
        let permits = self.semaphores.get(&key.key).filter(|_| key.mode == Mode::Permit);
        Ok(LockView {
            namespace: String::new(),
            key: key.key.to_string(),
            holder: holders.next(),
            sharers: holders.collect(),
            waiters: claims().filter_map(Claim::waiter).collect(),
            permits: permits.map(|permits| permits.now),
            grace_left: None,
        })
    }

    /// Fails if a manager cannot ask the server. One that was not started can, since it takes no locks.
    fn check_up(&self, manager: u64) -> Result<()> {
        if self.is_stopped(manager) {
            return Err(Error::stopped());
        }
        match self.down {
            true => Err(Error::new(ErrorKind::SessionUnavailable, "the memory server is down")),
            false => Ok(()),
        }
    }

    /// Asks the holder to resign; `false` if there is none that has a token.
    pub(super) fn request_resignation(&mut self, manager: u64, key: &HandleKey) -> Result<bool> {
        let holder = self.holder_seen_by(manager, key)?;
        let front = self.queues.get_mut(key).and_then(VecDeque::front_mut);
        match front.map(|claim| &mut claim.stage) {
            Some(Stage::Held(term))
                if holder.is_some_and(|holder| holder.token.is_some() && !holder.is_shared) =>
            {
                term.asked_to_resign = true;
                Ok(true)
            }
            _ => Ok(false),
        }
    }

    /// Whether the holder of the term with this token was asked to resign.
    pub(super) fn is_asked_to_resign(&self, key: &HandleKey, token: i64) -> bool {
        match self.queues.get(key).and_then(VecDeque::front).map(|claim| &claim.stage) {
            Some(Stage::Held(term)) => term.asked_to_resign && i64::try_from(term.token) == Ok(token),
            _ => false,
        }
    }

    /// When the work under the key began that succeeded last, and the time of this machine, which stands in for the server's.
    pub(super) fn successes(&self, manager: u64, key: &Key) -> Result<Successes> {
        self.check_up(manager)?;
        Ok(Successes { last: self.successes.get(key).copied(), now: SystemTime::now() })
    }

    /// Records a success, if the term with this token has not ended; whether that is so.
    pub(super) fn record_success(
        &mut self,
        manager: u64,
        key: &HandleKey,
        token: i64,
        started: SystemTime,
    ) -> Result<bool> {
        self.check_up(manager)?;
        let holder = self.queues.get(key).and_then(VecDeque::front).and_then(Claim::holder);
        let is_current = holder.is_some_and(|holder| holder.token == Some(token));
        if is_current {
            self.set_success(&key.key, Some(started));
        }
        Ok(is_current)
    }

    /// Sets or forgets when the work under the key began that succeeded last; whether there was a record.
    pub(super) fn set_success(&mut self, key: &Key, started: Option<SystemTime>) -> bool {
        match started {
            Some(started) => self.successes.insert(key.clone(), started).is_some(),
            None => self.successes.remove(key).is_some(),
        }
    }

    /// All claims, on all locks.
    pub(super) fn claims(&self) -> Vec<(u64, Arc<MemoryLock>)> {
        self.queues.values().flatten().map(|claim| (claim.id, Arc::clone(&claim.lock))).collect()
    }

    pub(super) fn look(&self, key: &HandleKey, id: u64) -> Sight {
        match self.claim_with(key, id) {
            None => Sight::Gone,
            Some(Claim { stage: Stage::Held(_), .. }) => Sight::Held,
            Some(claim) if self.down => Sight::Unknown(claim.changed.listen.clone()),
            Some(claim) => Sight::Queued(claim.changed.listen.clone()),
        }
    }

    /// The term of the manager's claim on the key, if there is one.
    pub(super) fn term(&self, manager: u64, key: &HandleKey) -> Option<Term> {
        self.find(manager, key)?.term()
    }

    /// The term of this claim, if it has one.
    pub(super) fn term_of(&self, key: &HandleKey, id: u64) -> Option<Term> {
        self.claim_with(key, id)?.term()
    }

    /// Ends the manager's claim on the key, if there is one, and gives the lock to the next in the queue. Gives what the observer is told of the claim.
    pub(super) fn end_claim(&mut self, manager: u64, key: &HandleKey, gone: &mut Gone) -> Option<Arc<Story>> {
        let before = gone.len();
        self.end_where(&key.lock(), gone, |claim| claim.is_of(manager, key));
        gone.get(before).and_then(|claim| claim.story.clone())
    }

    /// Ends this claim; `false` if it has ended before.
    pub(super) fn end(&mut self, key: &HandleKey, id: u64, gone: &mut Gone) -> bool {
        self.end_where(key, gone, |claim| claim.id == id)
    }

    /// Ends all such claims on the key, and gives the lock to the next in the queue; `false` if there is none.
    fn end_where(&mut self, key: &HandleKey, gone: &mut Gone, ends: impl Fn(&Claim) -> bool) -> bool {
        let Some(queue) = self.queues.get_mut(key) else { return false };
        let before = gone.len();
        while let Some(index) = queue.iter().position(&ends)
            && let Some(mut claim) = queue.remove(index)
        {
            // The old term ends before the next one begins.
            claim.enter(Stage::Waiting);
            note(&mut self.untold, &claim, Story::released);
            gone.push(claim);
        }
        self.serve(key);
        gone.len() > before
    }

    /// Gives the lock to the next in the queue, or forgets a queue that is empty.
    fn serve(&mut self, key: &HandleKey) {
        if self.queues.get(key).is_some_and(VecDeque::is_empty) {
            self.queues.remove(key);
        } else {
            self.grant(key);
        }
    }

    /// Takes the lock from this claim, if it has it still; the annotation is for its next term.
    pub(super) fn revoke(
        &mut self,
        key: &HandleKey,
        annotated: Annotated,
        reason: LossReason,
        gone: &mut Gone,
    ) -> bool {
        let Some(queue) = self.queues.get_mut(key) else { return false };
        let is_it = |claim: &Claim| claim.id == annotated.claim && matches!(claim.stage, Stage::Held(_));
        let index = queue.iter().position(is_it);
        if let Some(mut claim) = index.and_then(|index| queue.remove(index)) {
            claim.lose(reason, &mut self.untold);
            claim.annotation = annotated.annotation;
            if claim.is_for_one_term() {
                gone.push(claim);
            } else {
                queue.push_back(claim);
            }
        }
        self.serve(key);
        index.is_some()
    }

    /// Warns the holder; `false` if there is none, or it gave no grace.
    pub(super) fn warn(&mut self, key: &HandleKey) -> bool {
        let Some(first) = self.first(key).map(|first| first.id) else { return false };
        let first =
            self.queues.get_mut(key).and_then(|queue| queue.iter_mut().find(|claim| claim.id == first));
        match first.filter(|first| first.lock.options.grace.is_some()).map(|first| &mut first.stage) {
            Some(Stage::Held(term)) => {
                term.calm = None;
                true
            }
            _ => false,
        }
    }

    pub(super) fn go_down(&mut self, gone: &mut Gone) {
        self.down = true;
        for queue in self.queues.values_mut() {
            for mut claim in std::mem::take(queue) {
                let ends = claim.is_for_one_term() && claim.term().is_some();
                claim.lose(LossReason::ConnectionClosed, &mut self.untold);
                if ends {
                    gone.push(claim);
                } else {
                    queue.push_back(claim);
                }
            }
        }
        self.queues.retain(|_, queue| !queue.is_empty());
    }

    pub(super) fn come_up(&mut self) {
        self.down = false;
        for queue in self.queues.values_mut() {
            // Those who asked `try_lock` can now be told.
            queue.iter_mut().for_each(|claim| claim.changed = Change::new());
        }
        let claimed: Vec<HandleKey> = self.queues.keys().cloned().collect();
        for key in &claimed {
            self.grant(key);
        }
    }

    pub(super) fn annotation(&self, key: &HandleKey) -> Option<Vec<u8>> {
        match &self.first(key)?.stage {
            Stage::Held(term) => term.annotation.clone(),
            Stage::Waiting => None,
        }
    }

    /// The claims on the key that do not have the lock.
    pub(super) fn waiting(&self, key: &HandleKey) -> usize {
        let waits = |claim: &&Claim| matches!(claim.stage, Stage::Waiting);
        self.queues.get(key).map_or(0, |queue| queue.iter().filter(waits).count())
    }

    /// How many keys the server and its managers know of.
    pub(super) fn known_keys(&self) -> usize {
        self.queues.len() + self.managers.values().map(|manager| manager.handles.len()).sum::<usize>()
    }

    /// Gives the lock to the front of the queue, and to those behind it that may have it at the same time.
    fn grant(&mut self, key: &HandleKey) {
        let next = self.next_id();
        let Some(queue) = self.queues.get_mut(key).filter(|_| !self.down) else { return };
        let Some(front) = queue.front() else { return };
        let mode = front.lock.key.mode;
        let holders = match mode {
            Mode::Exclusive => 1,
            Mode::Shared => queue.iter().take_while(|claim| claim.is_shared()).count(),
            Mode::Permit => queue.len(),
        };
        let mut token = match mode {
            Mode::Shared => *self.readers.entry(key.key.clone()).or_insert(next),
            Mode::Exclusive | Mode::Permit => next,
        };
        if mode == Mode::Exclusive && matches!(front.stage, Stage::Waiting) {
            self.readers.remove(&key.key);
        }
        let held: Vec<_> = queue.iter().filter_map(|claim| claim.permit()).collect();
        let permits = self.semaphores.get(&key.key).map_or(0, |permits| permits.now);
        let mut free = (1..=permits).filter(|permit| !held.contains(permit));
        for claim in queue.iter_mut().take(holders) {
            if let Stage::Held(_) = claim.stage {
                continue;
            }
            let permit = if mode == Mode::Permit { free.next() } else { None };
            if mode == Mode::Permit && permit.is_none() {
                break;
            }
            let (alive, lost) = Lost::pair();
            let annotation = claim.annotation.take().filter(|_| mode != Mode::Shared);
            let (calm, warned) = bounded(0);
            claim.enter(Stage::Held(HeldTerm {
                _alive: alive,
                lost,
                token,
                permit,
                annotation,
                since: SystemTime::now(),
                asked_to_resign: false,
                calm: Some(calm),
                warned,
            }));
            let known = claim.term().and_then(|term| term.token());
            note(&mut self.untold, claim, |story| story.acquired(known, permit));
            if mode == Mode::Permit {
                // Each has its own.
                self.last_id += 1;
                token = self.last_id;
            }
        }
    }

    fn find(&self, manager: u64, key: &HandleKey) -> Option<&Claim> {
        self.queues.get(&key.lock())?.iter().find(|claim| claim.is_of(manager, key))
    }

    fn claim_with(&self, key: &HandleKey, id: u64) -> Option<&Claim> {
        self.queues.get(key)?.iter().find(|claim| claim.id == id)
    }

    fn next_id(&mut self) -> u64 {
        self.last_id += 1;
        self.last_id
    }
}

/// Notes what the observer of `claim` is to be told, if there is one.
fn note(untold: &mut Vec<Arc<Story>>, claim: &Claim, what: impl FnOnce(&Story)) {
    if let Some(story) = &claim.story {
        what(story);
        untold.push(Arc::clone(story));
    }
}

impl Claim {
    fn is_for_one_term(&self) -> bool {
        self.for_one_term.is_some()
    }

    fn is_shared(&self) -> bool {
        self.lock.key.mode.is_shared()
    }

    /// True if it is the manager's claim of `lock`, and not of a guard.
    fn is_of(&self, manager: u64, key: &HandleKey) -> bool {
        self.lock.manager == manager && !self.is_for_one_term() && self.lock.key == *key
    }

    fn permit(&self) -> Option<u32> {
        let Stage::Held(term) = &self.stage else { return None };
        term.permit
    }

    fn term(&self) -> Option<Term> {
        let Stage::Held(term) = &self.stage else { return None };
        let fence = Arc::new(Unfenced);
        let known = Term::new(term.lost.clone(), self.token(term), Some(fence)).with_permit(term.permit);
        Some(known.with_warning(term.warned.clone()))
    }

    fn token(&self, term: &HeldTerm) -> Option<i64> {
        i64::try_from(term.token).ok().filter(|_| !self.lock.options.without_token)
    }

    /// The claim as a holder, if it is one. All are in this process.
    fn holder(&self) -> Option<Holder> {
        let Stage::Held(term) = &self.stage else { return None };
        let token = self.token(term);
        Some(Holder {
            annotation: term.annotation.clone().filter(|_| token.is_some()),
            token,
            pid: std::process::id().cast_signed(),
            client_addr: None,
            application_name: None,
            since: token.map(|_| term.since).filter(|_| self.lock.key.mode != Mode::Shared),
            is_shared: self.is_shared(),
            permit: term.permit,
        })
    }

    /// The claim as a waiter, if it is one.
    fn waiter(&self) -> Option<Waiter> {
        matches!(self.stage, Stage::Waiting).then(|| Waiter {
            pid: std::process::id().cast_signed(),
            client_addr: None,
            application_name: None,
            waiting_for: self.queued_since.elapsed(),
            is_shared: Some(self.is_shared()),
        })
    }

    fn enter(&mut self, stage: Stage) {
        self.stage = stage;
        self.changed = Change::new();
    }

    /// Ends the term, if there is one, and waits for another.
    fn lose(&mut self, reason: LossReason, untold: &mut Vec<Arc<Story>>) {
        if matches!(self.stage, Stage::Held(_)) {
            // Who hears the lost channel may ask for the reason at once.
            let loss = Loss::now(reason);
            if let Some(told) = &self.for_one_term {
                // It has one term to lose.
                let _ = told.set(loss.clone());
            }
            *self.lock.last_loss.lock() = Some(loss);
            note(untold, self, |story| story.lost(reason));
        }
        self.queued_since = Instant::now();
        self.enter(Stage::Waiting);
    }
}

impl Change {
    fn new() -> Self {
        let (next, listen) = bounded(0);
        Self { _next: next, listen }
    }
}

/// No database keeps the tokens, so none can check one.
#[derive(Debug)]
struct Unfenced;

impl Unfenced {
    fn refuses<T>() -> Result<T> {
        let message = "the term is of a lock in memory, of which no database knows, so nothing in one can be fenced by it; use a \
                       PostgresManager in tests of fenced writes";
        Err(Error::new(ErrorKind::InvalidConfig, message))
    }
}

impl Fence for Unfenced {
    fn hold(&self, _: &mut Ask<'_>, _: i64) -> Result<bool> {
        Self::refuses()
    }

    fn is_current(&self, _: &mut Ask<'_>, _: i64) -> Result<bool> {
        Self::refuses()
    }

    fn record(&self, _: &mut Ask<'_>, _: i64, _: SystemTime) -> Result<bool> {
        Self::refuses()
    }

    fn text(&self, _: i64) -> Option<String> {
        None
    }
}
