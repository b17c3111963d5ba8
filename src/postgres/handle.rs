//! The handle of a lock: begins and ends its claims.

use std::fmt;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant, SystemTime};

use parking_lot::Mutex;

use crate::context::Context;
use crate::error::{Error, ErrorKind, Result};
use crate::guard::{self, Guarded, HeldTerm, Hold};
use crate::key::{AdvisoryKey, HandleKey};
use crate::local_queue::LocalQueue;
use crate::lock::{Lock, LockOptions};
use crate::loss::{Loss, Lost, lost_already};
use crate::mode::Mode;
use crate::once::Successes;
use crate::pg::active_claim::{ActiveClaim, Worker};
use crate::pg::carrier::seat::Seat;
use crate::pg::catalog::fence::RowFence;
use crate::pg::claim::claim::{Claim, Patience};
use crate::pg::claim::spec::{LockSpec, uncertainty_window};
use crate::pg::claim::status::{EndReason, Span};
use crate::pg::claim::supervisor::Supervisor;
use crate::pg::config::CatalogMode;
use crate::pg::inspect::{self, Named};
use crate::pg::pool::Pool;
use crate::pg::registry::Registry;
use crate::pg::sql;
use crate::pg::sql::{Entry, Request};
use crate::snapshot::ClaimSnapshot;
use crate::telling::{Observing, Story};
use crate::term::{Fence, Term};
use crate::view::{Holder, LockView};

/// The lock with one key of one manager.
pub(crate) struct PostgresLock {
    /// Itself, so that a claim can keep it.
    this: Weak<Self>,
    key: HandleKey,
    text: String,
    /// The number by which the server knows the key. The permits of a semaphore have numbers that are made of it.
    number: AdvisoryKey,
    /// The fence of all its terms, but for the number of a permit; `None` without a catalog.
    fence: Option<Arc<RowFence>>,
    options: LockOptions,
    registry: Arc<Registry>,
    /// The threads that want guards.
    queue: Arc<LocalQueue>,
    state: Mutex<LockState>,
}

#[derive(Default)]
struct LockState {
    /// That of `lock` and `try_lock`.
    claim: Option<ActiveClaim>,
    /// Those of guards, of whose turn it is the last one. Of an exclusive lock, the others have lost their terms; of a shared one,
    /// each may hold.
    of_guards: Vec<ActiveClaim>,
    /// Of the last claim, for the next; `None` again when the manager has stopped, since they keep the pool.
    spec: Option<Arc<LockSpec>>,
    /// The last loss of the claims that have ended.
    last_loss: Option<Loss>,
}

impl PostgresLock {
    pub(crate) fn new(key: HandleKey, options: LockOptions, registry: Arc<Registry>) -> Arc<Self> {
        let (text, config) = (key.key.to_string(), registry.config());
        let number = key.advisory(&config.namespace);
        let fence = (config.catalog != CatalogMode::None && !options.without_token).then(|| {
            let schema = Arc::clone(&config.schema);
            Arc::new(RowFence { key: number, longest_pause: config.lease, schema })
        });
        Arc::new_cyclic(|this| Self {
            this: this.clone(),
            key,
            text,
            number,
            fence,
            options,
            registry,
            queue: Arc::default(),
            state: Mutex::default(),
        })
    }

    /// Begins the claim where there is none, and waits as long as `patience` and `context` say. If `context` has ended,
    /// that is known before the claim begins, since the lock may be had in no time.
    fn acquire(&self, patience: Patience, context: &Context) -> Result<()> {
        self.check_process()?;
        let observing = self.registry.observing().filter(|_| self.term().is_none());
        Observing::attempt(observing, &self.text, false, || match (patience, context.ended()) {
            (_, None) => self.claim(context)?.lock(patience, context),
            (_, Some(_)) if self.term().is_some() => Ok(()),
            (Patience::TryLock, Some(ErrorKind::TimedOut)) => {
                let context = context.with_deadline_instead(self.registry.attempt_by());
                self.claim(&context)?.lock(Patience::TryOnce, &context)
            }
            (_, Some(kind)) => Err(self.claim(context)?.left(kind)),
        })
    }

    /// Before any mutex: after a fork it may be locked by a thread that is not there.
    fn check_process(&self) -> Result<()> {
        self.registry.origin().check(format_args!("the lock {:?}", self.text))
    }

    /// The claim that goes on, unless this is another process.
    fn current(&self) -> Option<ActiveClaim> {
        if !self.registry.origin().is_here() {
            return None;
        }
        self.state.lock().claim.clone()
    }

    /// The claim that goes on, or a new one. Waits for one that is ending, no longer than that takes or `context` allows.
    fn claim(&self, context: &Context) -> Result<ActiveClaim> {
        if self.current().is_none() {
            self.check_mode()?;
        }
        loop {
            let ending = {
                let mut state = self.state.lock();
                match &state.claim {
                    Some(active) if active.claim.is_ending() => Arc::clone(&active.claim),
                    Some(active) => return Ok(active.clone()),
                    None => {
                        let active = self.begin(&mut state, Span::UntilReleased, None)?;
                        state.claim = Some(active.clone());
                        self.options.claim_begun();
                        return Ok(active);
                    }
                }
            };
            ending.wait_released(context, self.registry.release_by())?;
            self.forget(&ending);
        }
    }

    /// Refuses a claim if this process has the lock the other way by another one, or this thread by a guard: it would wait for itself.
    fn check_mode(&self) -> Result<()> {
        guard::check_mode(self)?;
        let other = self.key.other_mode().and_then(|key| self.registry.claimed(&key)?.current());
        // One that is ending is not waited for in vain.
        match other.is_some_and(|active| !active.claim.is_ending()) {
            true => Err(Error::would_deadlock(&self.text, "a claim of this process", self.is_shared())),
            false => Ok(()),
        }
    }

    /// Begins a claim, with an idle supervisor if there is one. The lock is wanted since `wanted_since`, or since now.
    fn begin(&self, state: &mut LockState, span: Span, wanted_since: Option<Instant>) -> Result<ActiveClaim> {
        let pool = self.registry.pool()?;
        let config = self.registry.config();
        let story = self.registry.observing().map(|observing| {
            let since = wanted_since.unwrap_or_else(Instant::now);
            Story::new(observing, &self.text, span != Span::UntilReleased, self.is_shared(), since)
        });
        let claim = Claim::new(
            self.text.clone(),
            self.key.mode,
            uncertainty_window(config.lease, config.wait_slice),
            span,
            self.options.grace,
            story,
        );
        // A stop that comes in between would not see this claim.
        if let Some(this) = self.this.upgrade()
            && !self.registry.keep(&self.key, this)
        {
            return Err(Error::stopped());
        }
        // After that, so that a stop finds them and takes them away.
        let others = !state.is_free();
        let spec = state.spec.get_or_insert_with(|| Arc::new(self.spec(pool)));
        let worker = if self.is_carried() {
            self.registry
                .carrier(self.number, &spec.pool)
                .and_then(|carrier| Seat::new(&claim, spec, &carrier))
                .map(Worker::Seat)
        } else {
            Supervisor::begin(&claim, spec, self.registry.idle()).map(Worker::Supervisor)
        };
        match worker {
            Ok(worker) => Ok(ActiveClaim { claim, worker }),
            Err(error) => {
                if !others {
                    drop(self.registry.let_go(&self.key));
                }
                Err(Error::no_thread(error))
            }
        }
    }

    /// What all the claims of this lock have in common.
    fn spec(&self, pool: Arc<Pool>) -> LockSpec {
        let config = self.registry.config();
        LockSpec {
            request: self.request(),
            valuer: self.options.valuer.clone().filter(|_| self.has_row() && self.key.mode != Mode::Shared),
            valuer_is_fast: AtomicBool::new(false),
            plan: config.lease_plan(),
            wait_slice: config.wait_slice,
            release_timeout: config.release_timeout,
            last_term: Mutex::default(),
            pool,
        }
    }

    /// Whether its locks are had on a session that others use, too.
    fn is_carried(&self) -> bool {
        let config = self.registry.config();
        self.options.shared_session.unwrap_or(config.shared_sessions > 0)
    }

    pub(crate) fn options(&self) -> &LockOptions {
        &self.options
    }

    /// True if its terms have a token, and a row in the catalog.
    fn has_row(&self) -> bool {
        self.fence.is_some()
    }

    /// The fence of a term; of a semaphore, of that permit.
    fn fence(&self, permit: Option<u32>) -> Option<Arc<dyn Fence>> {
        let fence = self.fence.as_ref()?;
        Some(match permit {
            Some(permit) => Arc::new(fence.of_permit(permit)),
            None => Arc::clone(fence) as Arc<dyn Fence>,
        })
    }

    /// The fence of its terms, without which nothing is recorded of its work.
    fn recorder(&self) -> Result<&Arc<RowFence>> {
        self.check_process()?;
        self.fence.as_ref().ok_or_else(Error::no_record)
    }

    /// The key as the catalog knows it.
    fn named(&self) -> Named<'_> {
        let namespace = self.key.key.namespace(&self.registry.config().namespace);
        Named { key: self.number, namespace, name: &self.text }
    }

    /// What the claims of this lock ask for.
    fn request(&self) -> Request {
        let config = self.registry.config();
        let namespace = self.key.key.namespace(&config.namespace);
        let entry = self.has_row().then(|| Entry {
            namespace: namespace.to_owned(),
            key: self.text.clone(),
            annotation: None,
        });
        Request {
            key: self.number,
            lease: config.lease,
            application_name: sql::application_name(config.own_name(), &self.text),
            mode: self.key.mode,
            permits: self.options.permits.cast_signed(),
            entry,
        }
    }

    /// Begins the end of all claims, of which `by` is when they must be over.
    ///
    /// Gives `true` with one whose end this has begun: then the caller must [give back](ActiveClaim::give_back) what there is.
    pub(crate) fn end(&self, reason: EndReason, by: Instant) -> Vec<(bool, ActiveClaim)> {
        let state = self.state.lock();
        let claims = state.claim.iter().chain(&state.of_guards);
        claims.map(|active| (active.claim.end(reason, by), active.clone())).collect()
    }

    /// This claim of a guard's, with the worker that works on it; `None` if it was forgotten.
    fn active(&self, claim: &Arc<Claim>) -> Option<ActiveClaim> {
        let state = self.state.lock();
        state.of_guards.iter().find(|active| Arc::ptr_eq(&active.claim, claim)).cloned()
    }

    /// How its claims stand.
    pub(crate) fn snapshots(&self) -> Vec<ClaimSnapshot> {
        let active: Vec<_> = {
            let state = self.state.lock();
            state.claim.iter().chain(&state.of_guards).cloned().collect()
        };
        let waiting_threads = self.queue.waiting();
        let claims = active.iter().filter_map(|active| active.claim.snapshot());
        claims.map(|claim| ClaimSnapshot { waiting_threads, ..claim }).collect()
    }

    /// Lets go of the pool: the manager has stopped, and there will be no other claim.
    pub(crate) fn leave_pool(&self) {
        let spec = self.state.lock().spec.take();
        drop(spec);
    }

    /// Forgets a claim that has ended, unless another thread did so before. Its worker is there for the next one.
    pub(crate) fn forget(&self, ended: &Arc<Claim>) {
        let dropped = {
            let mut state = self.state.lock();
            let Some(active) = state.take(ended) else { return };
            state.last_loss = Loss::last_of(ended.last_loss().into_iter().chain(state.last_loss.take()));
            // Under the mutex, so that the next claim of this very lock finds it.
            if let Some(supervisor) = active.worker.supervisor() {
                self.registry.idle().add(self.number, supervisor);
            }
            (active, state.is_free().then(|| self.registry.let_go(&self.key)))
        };
        // The one may be the last that knows the pool, the other the last that knows this lock, so they must not be dropped
        // under a mutex.
        drop(dropped);
    }
}

impl LockState {
    /// True if there is no claim.
    fn is_free(&self) -> bool {
        self.claim.is_none() && self.of_guards.is_empty()
    }

    /// Takes this claim out, if it is there.
    fn take(&mut self, claim: &Arc<Claim>) -> Option<ActiveClaim> {
        let is_it = |active: &ActiveClaim| Arc::ptr_eq(&active.claim, claim);
        self.claim.take_if(|active| is_it(active)).or_else(|| {
            let index = self.of_guards.iter().position(is_it)?;
            Some(self.of_guards.remove(index))
        })
    }
}

impl Guarded for PostgresLock {
    fn queue(&self) -> Result<&Arc<LocalQueue>> {
        self.check_process()?;
        Ok(&self.queue)
    }

    fn observing(&self) -> Option<&Arc<Observing>> {
        self.registry.observing()
    }

    fn place(&self) -> (bool, i64) {
        self.number.place()
    }

    fn owner(&self) -> (usize, u64) {
        (Arc::as_ptr(&self.registry).addr(), 0)
    }

    fn mode(&self) -> Mode {
        self.key.mode
    }

    fn most_sessions(&self) -> Option<u32> {
        (!self.is_carried()).then(|| self.registry.config().max_sessions)
    }

    fn trouble(&self) -> Option<Error> {
        if !self.registry.origin().is_here() {
            return None;
        }
        let active = self.state.lock().of_guards.last().cloned();
        active?.claim.snapshot()?.last_error
    }

    fn is_stopped(&self) -> bool {
        self.registry.origin().is_here() && self.registry.is_stopped()
    }

    fn resignation_interval(&self) -> Option<Duration> {
        self.has_row().then(|| self.registry.config().lease_plan().heartbeat)
    }

    fn view(&self) -> Result<LockView> {
        self.check_process()?;
        let has_catalog = self.registry.config().catalog != CatalogMode::None;
        self.registry.ask(|pool| inspect::view(pool, &self.named(), self.key.mode, has_catalog))
    }

    fn is_asked_to_resign(&self, token: i64) -> Result<bool> {
        self.check_process()?;
        self.registry.ask(|pool| inspect::is_asked_to_resign(pool, self.number, token))
    }

    fn successes(&self) -> Result<Successes> {
        self.recorder()?;
        self.registry.ask(|pool| inspect::successes(pool, &self.named()))
    }

    fn record_success(&self, term: &Term, started: SystemTime) -> Result<bool> {
        let (fence, token) = (self.recorder()?, term.token().ok_or_else(Error::no_record)?);
        self.registry.ask(|pool| inspect::record_success(pool, fence, token, started))
    }

    fn claim_term(
        &self,
        context: Option<&Context>,
        wanted_since: Instant,
        has_others: bool,
    ) -> Result<HeldTerm> {
        let at_most = self.registry.config().release_timeout;
        let (patience, context) = match context {
            Some(context) => (Patience::Lock, context.clone()),
            None => (Patience::TryOnce, Context::deadline(self.registry.attempt_by())),
        };
        let span = Span::OneTerm { waits: patience == Patience::Lock, has_others, at_most };
        let lock = self.this.upgrade().ok_or_else(Error::stopped)?;
        let active = {
            let mut state = self.state.lock();
            let active = self.begin(&mut state, span, Some(wanted_since))?;
            state.of_guards.push(active.clone());
            active
        };
        let mut claimed = ClaimOfGuard { lock, claim: Arc::clone(&active.claim), is_released: false };
        let outcome = active.lock(patience, &context);
        drop(active);
        let term = claimed.claim.term(|permit| self.fence(permit));
        match (outcome, term) {
            (Ok(()), Some(term)) => Ok(HeldTerm { term, hold: Box::new(claimed) }),
            (outcome, _) => {
                let released = claimed.release(claimed.release_by());
                // The term has begun and ended since, by a stop or a loss.
                let ended = || match claimed.claim.ends_for(EndReason::Stopped) {
                    true => Some(Error::stopped()),
                    false => released.err(),
                };
                Err(outcome.err().or_else(ended).unwrap_or_else(|| Error::lost(&self.text, None)))
            }
        }
    }
}

/// The claim of one guard.
struct ClaimOfGuard {
    lock: Arc<PostgresLock>,
    /// Without its worker, which keeps the pool: after a stop a guard must not.
    claim: Arc<Claim>,
    is_released: bool,
}

impl Hold for ClaimOfGuard {
    fn key(&self) -> &str {
        &self.lock.text
    }

    fn loss(&self) -> Option<Loss> {
        self.claim.last_loss()
    }

    fn release_by(&self) -> Instant {
        self.lock.registry.release_by()
    }

    fn release(&mut self, by: Instant) -> Result<()> {
        self.lock.check_process()?;
        self.is_released = true;
        let claim = &self.claim;
        let outcome = match self.lock.active(claim) {
            Some(active) => active.release(by),
            // A stop was faster.
            None => claim.wait_ended(by),
        };
        self.lock.forget(claim);
        match claim.last_loss() {
            Some(loss) => Err(Error::lost(&self.lock.text, Some(&loss))),
            None if claim.ends_for(EndReason::Stopped) => Err(Error::lost(&self.lock.text, None)),
            None => outcome,
        }
    }
}

impl Drop for ClaimOfGuard {
    /// Only after a panic, of the application's logger say, is there something left to do.
    fn drop(&mut self) {
        if !self.is_released {
            let _ = self.release(self.release_by());
        }
    }
}

impl fmt::Debug for ClaimOfGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClaimOfGuard").field("key", &self.lock.text).finish_non_exhaustive()
    }
}

impl Lock for PostgresLock {
    fn key(&self) -> &str {
        &self.text
    }

    fn lock(&self, context: &Context) -> Result<()> {
        self.acquire(Patience::Lock, context)
    }

    fn try_lock(&self, context: &Context) -> Result<()> {
        self.acquire(Patience::TryLock, context)
    }

    fn wait(&self, context: &Context) -> Result<()> {
        self.check_process()?;
        match (self.current(), context.ended()) {
            (Some(active), Some(kind))
                if active.claim.term(|_| None).is_none() && !active.claim.is_ending() =>
            {
                Err(active.left(kind))
            }
            (Some(active), _) => active.lock(Patience::Lock, context),
            (None, _) if self.registry.is_stopped() => Err(Error::stopped()),
            (None, _) => Err(Error::not_claimed(&self.text)),
        }
    }

    fn release(&self) -> Result<()> {
        self.check_process()?;
        let Some(active) = self.current() else { return Ok(()) };
        let outcome = active.release(self.registry.release_by());
        self.forget(&active.claim);
        outcome
    }

    fn lost(&self) -> Lost {
        self.current().map_or_else(lost_already, |active| active.claim.lost())
    }

    fn term(&self) -> Option<Term> {
        self.current()?.claim.term(|permit| self.fence(permit))
    }

    fn holder(&self) -> Result<Option<Holder>> {
        self.view().map(|view| view.holder)
    }

    fn request_resignation(&self) -> Result<bool> {
        self.check_process()?;
        if self.is_shared() {
            return Err(Error::is_shared(&self.text, "leadership"));
        }
        if !self.has_row() {
            return Err(Error::no_resignations());
        }
        self.registry.ask(|pool| inspect::request_resignation(pool, &self.named()))
    }

    fn break_lock(&self) -> Result<Option<Holder>> {
        self.check_process()?;
        let config = self.registry.config();
        let (has_catalog, at_most) =
            (config.catalog != CatalogMode::None, config.lease_plan().heartbeat_timeout / 2);
        self.registry
            .ask(|pool| inspect::break_lock(pool, &self.named(), self.key.mode, has_catalog, at_most))
    }

    fn last_success(&self) -> Result<Option<SystemTime>> {
        Ok(self.successes()?.last)
    }

    fn forget_success(&self) -> Result<bool> {
        self.recorder()?;
        self.registry.ask(|pool| inspect::forget_success(pool, &self.named()))
    }

    fn set_permits(&self, permits: u32) -> Result<u32> {
        self.check_process()?;
        if self.key.mode != Mode::Permit {
            return Err(Error::no_semaphore(&self.text));
        }
        LockOptions::new().permits(permits).validate(&self.key.key)?;
        self.registry.ask(|pool| inspect::set_permits(pool, &self.named(), self.options.permits, permits))
    }

    fn last_loss(&self) -> Option<Loss> {
        if !self.registry.origin().is_here() {
            return None;
        }
        let state = self.state.lock();
        let claims = state.claim.iter().chain(&state.of_guards);
        let losses = claims.filter_map(|active| active.claim.last_loss());
        Loss::last_of(losses.chain(state.last_loss.clone()))
    }
}

impl Drop for PostgresLock {
    fn drop(&mut self) {
        if self.registry.origin().is_here() {
            self.registry.forget(&self.key);
            return;
        }
        let LockState { claim, of_guards, spec, .. } = std::mem::take(self.state.get_mut());
        std::mem::forget((claim, of_guards, spec, Arc::clone(&self.registry), Arc::clone(&self.queue)));
    }
}

impl fmt::Debug for PostgresLock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = f.debug_struct("PostgresLock");
        debug.field("key", &self.text).field("term", &self.term());
        // After a fork a thread that is not there may have the mutex of the queue.
        let waiting = if self.registry.origin().is_here() { self.queue.waiting() } else { 0 };
        if waiting > 0 {
            debug.field("waiting_threads", &waiting);
        }
        debug.finish()
    }
}
