//! The handle of a lock: begins and ends its claims.

use std::fmt;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Weak};
use std::time::Instant;

use parking_lot::Mutex;

use crate::context::Context;
use crate::error::{Error, ErrorKind, Result};
use crate::key::{AdvisoryKey, Key};
use crate::lock::{Lock, LockOptions};
use crate::loss::{Loss, Lost, lost_already};
use crate::pg::catalog::fence::RowFence;
use crate::pg::claim::caller::ActiveClaim;
use crate::pg::claim::shared::{Claim, EndReason, Patience};
use crate::pg::claim::spec::LockSpec;
use crate::pg::claim::supervisor::Supervisor;
use crate::pg::config::CatalogMode;
use crate::pg::pool::Pool;
use crate::pg::registry::Registry;
use crate::pg::sql;
use crate::pg::sql::{Entry, Request};
use crate::term::{Fence, Term};

/// The lock with one key of one manager.
pub(crate) struct PostgresLock {
    /// Itself, so that a claim can keep it.
    this: Weak<Self>,
    key: Key,
    text: String,
    /// The number by which the server knows the key.
    number: AdvisoryKey,
    /// The fence of all its terms; `None` without a catalog.
    fence: Option<Arc<dyn Fence>>,
    options: LockOptions,
    registry: Arc<Registry>,
    state: Mutex<LockState>,
}

#[derive(Default)]
struct LockState {
    claim: Option<ActiveClaim>,
    /// Of the last claim, for the next; `None` again when the manager has stopped, since they keep the pool.
    spec: Option<Arc<LockSpec>>,
    /// The last loss of the claims that have ended.
    last_loss: Option<Loss>,
}

impl PostgresLock {
    pub(crate) fn new(key: Key, options: LockOptions, registry: Arc<Registry>) -> Arc<Self> {
        let (text, config) = (key.to_string(), registry.config());
        let number = key.advisory(&config.namespace);
        let fence = (config.catalog != CatalogMode::None).then(|| {
            let schema = Arc::clone(&config.schema);
            Arc::new(RowFence { key: number, longest_pause: config.lease, schema }) as Arc<dyn Fence>
        });
        Arc::new_cyclic(|this| Self {
            this: this.clone(),
            key,
            text,
            number,
            fence,
            options,
            registry,
            state: Mutex::default(),
        })
    }

    /// Begins the claim where there is none, and waits as long as `patience` and `context` say. If `context` has ended,
    /// that is known before the claim begins, since the lock may be had in no time.
    fn acquire(&self, patience: Patience, context: &Context) -> Result<()> {
        self.check_process()?;
        match (patience, context.ended()) {
            (_, None) => self.claim(context)?.lock(patience, context),
            (_, Some(_)) if self.term().is_some() => Ok(()),
            (Patience::TryLock, Some(ErrorKind::TimedOut)) => {
                let context = context.with_deadline_instead(self.registry.attempt_by());
                self.claim(&context)?.lock(Patience::TryOnce, &context)
            }
            (_, Some(kind)) => Err(self.claim(context)?.left(kind)),
        }
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
        loop {
            let ending = {
                let mut state = self.state.lock();
                match &state.claim {
                    Some(active) if active.claim.is_ending() => Arc::clone(&active.claim),
                    Some(active) => return Ok(active.clone()),
                    None => {
                        let active = self.begin(&mut state.spec)?;
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

    /// Begins a claim, with an idle supervisor if there is one.
    fn begin(&self, spec: &mut Option<Arc<LockSpec>>) -> Result<ActiveClaim> {
        let pool = self.registry.pool()?;
        let config = self.registry.config();
        let claim = Claim::new(self.text.clone(), config.lease + 2 * config.wait_slice);
        // A stop that comes in between would not see this claim.
        if let Some(this) = self.this.upgrade()
            && !self.registry.keep(&self.key, this)
        {
            return Err(Error::stopped());
        }
        // After that, so that a stop finds them and takes them away.
        let spec = spec.get_or_insert_with(|| Arc::new(self.spec(pool)));
        let active = |supervisor| ActiveClaim { claim: Arc::clone(&claim), supervisor };
        let idle = self.registry.idle();
        while let Some(supervisor) = idle.take(spec.request.key) {
            if supervisor.assign(&claim, spec) {
                return Ok(active(supervisor));
            }
        }
        match Supervisor::start(&claim, spec, idle) {
            Ok(supervisor) => Ok(active(supervisor)),
            Err(error) => {
                drop(self.registry.let_go(&self.key));
                let message = "the thread for the lock could not be started; is the limit of threads, or of open files, reached?";
                Err(Error::new(ErrorKind::SessionUnavailable, message).with_source(error))
            }
        }
    }

    /// What all the claims of this lock have in common.
    fn spec(&self, pool: Arc<Pool>) -> LockSpec {
        let config = self.registry.config();
        LockSpec {
            request: self.request(),
            valuer: self.options.valuer.clone().filter(|_| config.catalog != CatalogMode::None),
            valuer_is_fast: AtomicBool::new(false),
            plan: config.lease_plan(),
            wait_slice: config.wait_slice,
            release_timeout: config.release_timeout,
            pool,
        }
    }

    /// What the claims of this lock ask for.
    fn request(&self) -> Request {
        let config = self.registry.config();
        let namespace = self.key.namespace(&config.namespace);
        let entry = (config.catalog != CatalogMode::None).then(|| Entry {
            namespace: namespace.to_owned(),
            key: self.text.clone(),
            annotation: None,
        });
        let own_name = config.postgres.get_application_name().unwrap_or("dsync");
        Request {
            key: self.number,
            lease: config.lease,
            application_name: sql::application_name(own_name, &self.text),
            entry,
        }
    }

    /// Begins the end of the claim, if there is one. `by` is when it must be over.
    ///
    /// Gives `true` with it if this is the first call: then the caller must [give back](Self::give_back) what there is.
    pub(crate) fn end(&self, reason: EndReason, by: Instant) -> Option<(bool, ActiveClaim)> {
        let active = self.state.lock().claim.clone()?;
        Some((active.claim.end(reason, by), active))
    }

    /// Lets go of the pool: the manager has stopped, and there will be no other claim.
    pub(crate) fn leave_pool(&self) {
        let spec = self.state.lock().spec.take();
        drop(spec);
    }

    /// Forgets a claim that has ended, unless another thread did so before. Its supervisor is there for the next one.
    pub(crate) fn forget(&self, ended: &Arc<Claim>) {
        let dropped = {
            let mut state = self.state.lock();
            let Some(active) = state.claim.take_if(|active| Arc::ptr_eq(&active.claim, ended)) else {
                return;
            };
            state.last_loss = ended.last_loss().or(state.last_loss.take());
            // Under the mutex, so that the next claim of this very lock finds it.
            self.registry.idle().add(self.number, &active.supervisor);
            (active, self.registry.let_go(&self.key))
        };
        // The one may be the last that knows the pool, the other the last that knows this lock, so they must not be dropped
        // under a mutex.
        drop(dropped);
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
            (Some(active), Some(kind)) if active.claim.term(None).is_none() && !active.claim.is_ending() => {
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
        self.current()?.claim.term(self.fence.clone())
    }

    fn last_loss(&self) -> Option<Loss> {
        if !self.registry.origin().is_here() {
            return None;
        }
        let (active, before) = {
            let state = self.state.lock();
            (state.claim.clone(), state.last_loss.clone())
        };
        active.and_then(|active| active.claim.last_loss()).or(before)
    }
}

impl Drop for PostgresLock {
    fn drop(&mut self) {
        if self.registry.origin().is_here() {
            self.registry.forget(&self.key);
            return;
        }
        let LockState { claim, spec, .. } = std::mem::take(self.state.get_mut());
        std::mem::forget((claim, spec, Arc::clone(&self.registry)));
    }
}

impl fmt::Debug for PostgresLock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PostgresLock").field("key", &self.text).field("term", &self.term()).finish()
    }
}
