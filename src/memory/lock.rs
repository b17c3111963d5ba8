//! The handle of a lock in memory.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{at, never, select_biased};
use parking_lot::Mutex;

use super::server::Server;
use super::state::{Annotated, Sight};
use crate::context::Context;
use crate::error::{Error, ErrorKind, Result};
use crate::key::Key;
use crate::lock::{Lock, LockOptions, annotate};
use crate::loss::{Loss, Lost, lost_already};
use crate::term::Term;

pub(super) struct MemoryLock {
    pub(super) server: Arc<Server>,
    /// The manager's number on the server.
    pub(super) manager: u64,
    pub(super) key: Key,
    /// The key in text.
    pub(super) text: String,
    pub(super) options: LockOptions,
    pub(super) last_loss: Mutex<Option<Loss>>,
}

/// How old the annotation of a claim may be for which a thread waits. On a server it is made anew for each slice of a wait.
const SLICE: Duration = Duration::from_secs(1);

impl MemoryLock {
    /// Claims the lock and waits until it is held, or until `refused` makes an error of what is in the way.
    fn acquire(
        &self,
        context: &Context,
        ended: Option<ErrorKind>,
        refused: impl Fn(&Sight) -> Option<Error>,
    ) -> Result<()> {
        if self.is_held() {
            return Ok(());
        }
        let known = self.server.see(|state| state.claim_or_none(self.manager, &self.key))?;
        let claim = match known {
            Some(claim) => claim,
            // Not under the mutex, and before the claim can be given the lock by another thread.
            None => {
                let annotation = self.annotation();
                let claim =
                    self.server.change(|state, _| state.claim(self.manager, &self.key, annotation))?;
                self.options.claim_begun();
                claim
            }
        };
        self.watch(claim, context, ended, refused)
    }

    /// What the valuer makes.
    fn annotation(&self) -> Option<Vec<u8>> {
        self.options.valuer.as_ref().and_then(|valuer| annotate(&self.text, valuer))
    }

    /// What the claim is to have in its next term.
    pub(super) fn annotated(&self, claim: u64) -> Annotated {
        Annotated { claim, annotation: self.annotation() }
    }

    fn look(&self, claim: u64) -> Sight {
        self.server.see(|state| state.look(self.manager, &self.key, claim))
    }

    /// Waits until the claim holds the lock, or until `refused` makes an error of what is in the way. Not at all if the
    /// context had `ended` when the call began.
    fn watch(
        &self,
        claim: u64,
        context: &Context,
        ended: Option<ErrorKind>,
        refused: impl Fn(&Sight) -> Option<Error>,
    ) -> Result<()> {
        let since = Instant::now();
        if let Some(kind) = ended {
            return Err(self.context_ended(kind, since, &self.look(claim)));
        }
        let mut slice_ends = Instant::now() + SLICE;
        loop {
            let sight = self.look(claim);
            if let Some(error) = refused(&sight) {
                return Err(error);
            }
            let change = match &sight {
                Sight::Held => return Ok(()),
                Sight::Gone => return Err(self.claim_ended()),
                Sight::Queued(change) | Sight::Unknown(change) => change,
            };
            let slice = if self.options.valuer.is_some() { at(slice_ends) } else { never() };
            select_biased! {
                recv(change) -> _ => {}
                recv(context.cancelled()) -> _ => {
                    return Err(self.context_ended(ErrorKind::Cancelled, since, &sight));
                }
                recv(context.expires_at().map_or_else(never, at)) -> _ => {
                    return Err(self.context_ended(ErrorKind::TimedOut, since, &sight));
                }
                recv(slice) -> _ => {
                    let annotated = self.annotated(claim);
                    self.server.change(|state, _| state.annotate(&self.key, annotated));
                    slice_ends = Instant::now() + SLICE;
                }
            }
        }
    }

    fn is_held(&self) -> bool {
        self.term().is_some()
    }

    fn claim_ended(&self) -> Error {
        if self.server.see(|state| state.is_stopped(self.manager)) {
            return Error::stopped();
        }
        Error::released(&self.text)
    }

    fn context_ended(&self, kind: ErrorKind, since: Instant, sight: &Sight) -> Error {
        let text = format!("waited {:.1?} for lock {:?}", since.elapsed(), self.text);
        match sight {
            Sight::Queued(_) => Error::new(kind, format!("{text}, which another session holds")),
            Sight::Unknown(_) => {
                let cause = Error::new(ErrorKind::SessionUnavailable, "the memory server is down");
                Error::new(kind, format!("{text}; the server could not be asked")).with_source(cause)
            }
            Sight::Held | Sight::Gone => Error::new(kind, text),
        }
    }
}

impl Lock for MemoryLock {
    fn key(&self) -> &str {
        &self.text
    }

    fn lock(&self, context: &Context) -> Result<()> {
        self.acquire(context, context.ended(), |_| None)
    }

    fn try_lock(&self, context: &Context) -> Result<()> {
        let ended = context.ended();
        // There is one attempt whatever the time, which here takes none, unless nobody can be asked.
        let once = ended == Some(ErrorKind::TimedOut);
        self.acquire(context, ended.filter(|_| !once), |sight| match sight {
            Sight::Queued(_) => Some(Error::lock_unavailable(&self.text)),
            Sight::Unknown(_) if once => Some(self.context_ended(ErrorKind::TimedOut, Instant::now(), sight)),
            Sight::Unknown(_) | Sight::Held | Sight::Gone => None,
        })
    }

    fn wait(&self, context: &Context) -> Result<()> {
        match self.server.see(|state| state.claim_of(self.manager, &self.key)) {
            Some(_) if self.is_held() => Ok(()),
            Some(claim) => self.watch(claim, context, context.ended(), |_| None),
            None if self.server.see(|state| state.is_stopped(self.manager)) => Err(Error::stopped()),
            None => Err(Error::not_claimed(&self.text)),
        }
    }

    fn release(&self) -> Result<()> {
        self.server.change(|state, gone| state.end_claim(self.manager, &self.key, gone));
        Ok(())
    }

    fn lost(&self) -> Lost {
        self.term().map_or_else(lost_already, |term| term.lost().clone())
    }

    fn term(&self) -> Option<Term> {
        self.server.see(|state| state.term(self.manager, &self.key))
    }

    fn last_loss(&self) -> Option<Loss> {
        self.last_loss.lock().clone()
    }
}

impl Drop for MemoryLock {
    fn drop(&mut self) {
        self.server.change(|state, _| state.forget_handle(self));
    }
}

impl fmt::Debug for MemoryLock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryLock").field("key", &self.text).field("term", &self.term()).finish()
    }
}
