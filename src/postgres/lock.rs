//! The handle of a lock: begins and ends its claims.

use std::fmt;
use std::sync::{Arc, Weak};
use std::thread;
use std::time::Instant;

use parking_lot::Mutex;

use super::catalog::CatalogMode;
use super::claim::{Claim, Patience, Why, stopped};
use super::manager::Core;
use super::session::{Entry, Request};
use super::sql;
use super::supervisor::Supervisor;
use crate::context::Context;
use crate::error::{Error, ErrorKind, Result};
use crate::key::Key;
use crate::lock::{Lock, LockOptions, Lost, lost_already};
use crate::loss::Loss;
use crate::term::{Row, Term};

/// The lock with one key of one manager.
pub(super) struct PostgresLock {
    /// Itself, so that a claim can keep it.
    this: Weak<Self>,
    key: Key,
    text: String,
    options: LockOptions,
    core: Arc<Core>,
    state: Mutex<LockState>,
}

#[derive(Default)]
struct LockState {
    claim: Option<Arc<Claim>>,
    /// The last loss of the claims that have ended.
    last_loss: Option<Loss>,
}

impl PostgresLock {
    pub(super) fn new(key: Key, options: LockOptions, core: Arc<Core>) -> Arc<Self> {
        let text = key.to_string();
        Arc::new_cyclic(|this| Self { this: this.clone(), key, text, options, core, state: Mutex::default() })
    }

    fn acquire(&self, patience: Patience, context: &Context) -> Result<()> {
        self.claim(context)?.acquire(patience, context)
    }

    /// The claim that goes on, or a new one. Waits for one that is ending, no longer than that takes or `context` allows.
    fn claim(&self, context: &Context) -> Result<Arc<Claim>> {
        loop {
            let ending = {
                let mut state = self.state.lock();
                match &state.claim {
                    Some(claim) if claim.is_ending() => Arc::clone(claim),
                    Some(claim) => return Ok(Arc::clone(claim)),
                    None => {
                        let claim = self.begin()?;
                        state.claim = Some(Arc::clone(&claim));
                        return Ok(claim);
                    }
                }
            };
            ending.wait_released(context, self.core.release_by())?;
            self.forget(&ending);
        }
    }

    /// Starts a claim and its supervisor.
    fn begin(&self) -> Result<Arc<Claim>> {
        let pool = self.core.pool()?;
        let config = self.core.config();
        let (claim, commands) = Claim::new(self.text.clone(), config.lease + 2 * config.wait_slice);
        let supervisor = Supervisor {
            request: self.request(),
            valuer: self.options.valuer.clone().filter(|_| config.catalog != CatalogMode::None),
            plan: config.lease_plan(),
            wait_slice: config.wait_slice,
            release_timeout: config.release_timeout,
            pool,
            claim: Arc::clone(&claim),
            commands,
        };
        // A stop that comes in between would not see this claim.
        if let Some(this) = self.this.upgrade()
            && !self.core.keep(&self.key, this)
        {
            return Err(stopped());
        }
        let name = format!("dsync:{}", self.text.replace('\0', ""));
        match thread::Builder::new().name(name).spawn(move || supervisor.run()) {
            Ok(_detached) => Ok(claim),
            Err(error) => {
                drop(self.core.let_go(&self.key));
                let message =
                    "the thread for the lock could not be started; is the limit of threads reached?";
                Err(Error::new(ErrorKind::SessionUnavailable, message).with_source(error))
            }
        }
    }

    /// What the claims of this lock ask for.
    fn request(&self) -> Request {
        let config = self.core.config();
        let namespace = self.key.namespace(&config.namespace);
        let entry = (config.catalog != CatalogMode::None).then(|| Entry {
            namespace: namespace.to_owned(),
            key: self.text.clone(),
            annotation: None,
        });
        let own_name = config.postgres.get_application_name().unwrap_or("dsync");
        Request {
            key: self.key.advisory(&config.namespace),
            lease: config.lease,
            application_name: sql::application_name(own_name, &self.text),
            entry,
        }
    }

    /// Where the catalog keeps the newest token of this lock.
    fn row(&self) -> Option<Row> {
        let config = self.core.config();
        let key = self.key.advisory(&config.namespace);
        let row = Row { id: key.id(), pair: key.is_pair(), longest_pause: config.lease };
        Some(row).filter(|_| config.catalog != CatalogMode::None)
    }

    /// Begins the end of the claim, if there is one. `by` is when it must be over.
    ///
    /// Gives `true` with it if this is the first call: then the caller must [interrupt](Claim::interrupt) it.
    pub(super) fn end(&self, why: Why, by: Instant) -> Option<(bool, Arc<Claim>)> {
        let claim = self.state.lock().claim.clone()?;
        Some((claim.end(why, by), claim))
    }

    /// Forgets a claim that has ended, unless another thread did so before.
    pub(super) fn forget(&self, ended: &Arc<Claim>) {
        let kept = {
            let mut state = self.state.lock();
            if !state.claim.as_ref().is_some_and(|claim| Arc::ptr_eq(claim, ended)) {
                return;
            }
            state.claim = None;
            state.last_loss = ended.last_loss().or(state.last_loss.take());
            self.core.let_go(&self.key)
        };
        // It may be the last one that knows this lock, so it must not be dropped under a mutex.
        drop(kept);
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
        let claim = self.state.lock().claim.clone();
        match claim {
            Some(claim) => claim.acquire(Patience::Lock, context),
            None if self.core.is_stopped() => Err(stopped()),
            None => Err(Error::new(ErrorKind::Released, format!("nobody claims {:?}", self.text))),
        }
    }

    fn release(&self) -> Result<()> {
        let by = self.core.release_by();
        let Some((first, claim)) = self.end(Why::Released, by) else { return Ok(()) };
        if first {
            claim.interrupt(by);
        }
        let outcome = claim.wait_ended(by);
        self.forget(&claim);
        outcome
    }

    fn lost(&self) -> Lost {
        let claim = self.state.lock().claim.clone();
        claim.map_or_else(lost_already, |claim| claim.lost())
    }

    fn term(&self) -> Option<Term> {
        let claim = self.state.lock().claim.clone()?;
        claim.term(self.row())
    }

    fn last_loss(&self) -> Option<Loss> {
        let (claim, before) = {
            let state = self.state.lock();
            (state.claim.clone(), state.last_loss.clone())
        };
        claim.and_then(|claim| claim.last_loss()).or(before)
    }
}

impl Drop for PostgresLock {
    fn drop(&mut self) {
        self.core.forget(&self.key);
    }
}

impl fmt::Debug for PostgresLock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.state.lock();
        f.debug_struct("PostgresLock")
            .field("key", &self.key)
            .field("claim", &state.claim)
            .finish_non_exhaustive()
    }
}
