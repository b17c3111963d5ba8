//! The handle of a lock in memory.

use std::convert::Infallible;
use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use crossbeam_channel::{Receiver, at, never, select_biased};
use parking_lot::Mutex;

use super::server::Server;
use super::state::{Sight, stopped};
use crate::context::Context;
use crate::error::{Error, ErrorKind, Result};
use crate::key::Key;
use crate::lock::{Lock, LockValuer, Lost, lost_already};
use crate::loss::Loss;
use crate::term::Term;

pub(super) struct MemoryLock {
    pub(super) server: Arc<Server>,
    /// The manager's number on the server.
    pub(super) manager: u64,
    pub(super) key: Key,
    /// The key in text.
    pub(super) text: String,
    pub(super) valuer: Option<LockValuer>,
    pub(super) last_loss: Mutex<Option<Loss>>,
}

impl MemoryLock {
    /// Claims the lock and waits until it is held, or until `refused` makes an error of what is in the way.
    fn acquire(&self, context: &Context, refused: impl Fn(&Sight) -> Option<Error>) -> Result<()> {
        if self.is_held() {
            return Ok(());
        }
        let since = Instant::now();
        let (claim, begun) =
            self.server.change(|state, aftermath| state.claim(self.manager, &self.key, aftermath))?;
        // A real server takes its time to answer a new claim, so a context that has ended already comes first.
        if begun && let Err(error) = context.check() {
            return Err(self.context_ended(error.kind(), since, &self.look(claim)));
        }
        self.watch(claim, context, since, refused)
    }

    fn look(&self, claim: u64) -> Sight {
        self.server.see(|state| state.look(self.manager, &self.key, claim))
    }

    /// Waits until the claim holds the lock, or until `refused` makes an error of what is in the way.
    fn watch(
        &self,
        claim: u64,
        context: &Context,
        since: Instant,
        refused: impl Fn(&Sight) -> Option<Error>,
    ) -> Result<()> {
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
            if let Err(kind) = wait_for_change(change, context) {
                return Err(self.context_ended(kind, since, &sight));
            }
        }
    }

    fn is_held(&self) -> bool {
        self.term().is_some()
    }

    fn claim_ended(&self) -> Error {
        if self.server.see(|state| state.is_stopped(self.manager)) {
            return stopped();
        }
        let text =
            format!("lock {:?} was released by another thread while this one waited for it", self.text);
        Error::new(ErrorKind::Released, text)
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
        self.acquire(context, |_| None)
    }

    fn try_lock(&self, context: &Context) -> Result<()> {
        self.acquire(context, |sight| {
            let Sight::Queued(_) = sight else { return None };
            let text = format!(
                "another session holds lock {:?}; the claim goes on in the background until it is released",
                self.text
            );
            Some(Error::new(ErrorKind::LockUnavailable, text))
        })
    }

    fn wait(&self, context: &Context) -> Result<()> {
        match self.server.see(|state| state.claim_of(self.manager, &self.key)) {
            Some(claim) => self.watch(claim, context, Instant::now(), |_| None),
            None => Err(self.claim_ended()),
        }
    }

    fn release(&self) -> Result<()> {
        self.server.change(|state, aftermath| state.end_claim(self.manager, &self.key, aftermath));
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
        f.debug_struct("MemoryLock").field("key", &self.key).field("held", &self.is_held()).finish()
    }
}

/// Waits for a change; fails if the context ends before one.
fn wait_for_change(change: &Receiver<Infallible>, context: &Context) -> std::result::Result<(), ErrorKind> {
    select_biased! {
        recv(change) -> _ => Ok(()),
        recv(context.cancelled()) -> _ => Err(ErrorKind::Cancelled),
        recv(context.expires_at().map_or_else(never, at)) -> _ => Err(ErrorKind::TimedOut),
    }
}
