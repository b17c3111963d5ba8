//! The handle of a lock in memory.

use std::fmt;
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant, SystemTime};

use crossbeam_channel::{at, never, select_biased};
use parking_lot::Mutex;

use super::server::Server;
use super::state::{Annotated, Sight, State};
use crate::context::Context;
use crate::error::{Error, ErrorKind, Result};
use crate::guard::{self, Guarded, HeldTerm, Hold};
use crate::key::HandleKey;
use crate::local_queue::LocalQueue;
use crate::lock::{Lock, LockOptions, annotate};
use crate::loss::{Loss, LossReason, Lost, lost_already};
use crate::mode::Mode;
use crate::once::Successes;
use crate::telling::{Observing, Story};
use crate::term::Term;
use crate::view::{Holder, LockView};

pub(super) struct MemoryLock {
    /// Itself, so that a guard can keep it.
    pub(super) this: Weak<Self>,
    pub(super) server: Arc<Server>,
    /// The manager's number on the server.
    pub(super) manager: u64,
    pub(super) key: HandleKey,
    /// The queue that its claims are in.
    pub(super) place: HandleKey,
    /// The key in text.
    pub(super) text: String,
    pub(super) options: LockOptions,
    pub(super) last_loss: Mutex<Option<Loss>>,
    /// The threads that want guards.
    pub(super) queue: Arc<LocalQueue>,
    /// The manager's observer.
    pub(super) observing: Option<Arc<Observing>>,
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
        Observing::attempt(self.observing.as_ref(), &self.text, false, || {
            let known = self.server.see(|state| state.claim_or_none(self.manager, &self.key))?;
            let claim = match known {
                Some(claim) => claim,
                None => {
                    guard::check_mode(self)?;
                    // Not under the mutex, and before the claim can be given the lock by another thread.
                    let (annotation, story) = (self.annotation(), self.story(false, Instant::now()));
                    let claim = self
                        .server
                        .change(|state, _| state.claim(self.manager, &self.key, annotation, story))?;
                    self.options.claim_begun();
                    claim
                }
            };
            self.watch(claim, context, ended, refused)
        })
    }

    /// What the observer is to be told of a new claim.
    fn story(&self, is_guard: bool, wanted_since: Instant) -> Option<Arc<Story>> {
        let observing = self.observing.as_ref()?;
        Some(Arc::new(Story::new(observing, &self.text, is_guard, self.is_shared(), wanted_since)))
    }

    /// What the valuer makes.
    fn annotation(&self) -> Option<Vec<u8>> {
        let valuer = self.options.valuer.as_ref().filter(|_| self.key.mode != Mode::Shared);
        valuer.and_then(|valuer| annotate(&self.text, valuer))
    }

    /// What the claim is to have in its next term.
    pub(super) fn annotated(&self, claim: u64) -> Annotated {
        Annotated { claim, annotation: self.annotation() }
    }

    fn look(&self, claim: u64) -> Sight {
        self.server.see(|state| state.look(&self.place, claim))
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
                    self.server.change(|state, _| state.annotate(&self.place, annotated));
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
            Sight::Queued(_) => Error::new(kind, format!("{text}, {}", self.key.mode.which_has())),
            Sight::Unknown(_) => {
                let cause = Error::new(ErrorKind::SessionUnavailable, "the memory server is down");
                Error::new(kind, format!("{text}; the server could not be asked")).with_source(cause)
            }
            Sight::Held | Sight::Gone => Error::new(kind, text),
        }
    }
}

impl Guarded for MemoryLock {
    fn queue(&self) -> Result<&Arc<LocalQueue>> {
        Ok(&self.queue)
    }

    fn observing(&self) -> Option<&Arc<Observing>> {
        self.observing.as_ref()
    }

    fn place(&self) -> (bool, i64) {
        // All managers of a server in memory are in one namespace.
        self.key.advisory("").place()
    }

    fn owner(&self) -> (usize, u64) {
        (Arc::as_ptr(&self.server).addr(), self.manager)
    }

    fn mode(&self) -> Mode {
        self.key.mode
    }

    fn trouble(&self) -> Option<Error> {
        let is_down = self.server.see(|state| state.is_down());
        is_down.then(|| Error::new(ErrorKind::SessionUnavailable, "the memory server is down"))
    }

    fn is_stopped(&self) -> bool {
        self.server.see(|state| state.is_stopped(self.manager))
    }

    fn resignation_interval(&self) -> Option<Duration> {
        /// A look takes no time here.
        const LOOKS_EVERY: Duration = Duration::from_millis(50);
        (!self.options.without_token).then_some(LOOKS_EVERY)
    }

    fn view(&self) -> Result<LockView> {
        self.server.see(|state| state.view(self.manager, &self.place))
    }

    fn is_asked_to_resign(&self, token: i64) -> Result<bool> {
        Ok(self.server.see(|state| state.is_asked_to_resign(&self.place, token)))
    }

    fn successes(&self) -> Result<Successes> {
        if self.options.without_token {
            return Err(Error::no_record());
        }
        self.server.see(|state| state.successes(self.manager, &self.key.key))
    }

    fn record_success(&self, term: &Term, started: SystemTime) -> Result<bool> {
        let token = term.token().ok_or_else(Error::no_record)?;
        self.server.change(|state, _| state.record_success(self.manager, &self.place, token, started))
    }

    fn claim_term(&self, context: Option<&Context>, wanted_since: Instant, _: bool) -> Result<HeldTerm> {
        let lock = self.this.upgrade().ok_or_else(Error::stopped)?;
        self.server.see(|state| state.check_started(self.manager))?;
        // Not under the mutex, and before the claim can be given the lock by another thread.
        let (annotation, story) = (self.annotation(), self.story(true, wanted_since));
        let loss = Arc::new(OnceLock::new());
        let claim = |state: &mut State| {
            state.claim_term(self.manager, &self.key, annotation, Arc::clone(&loss), story.clone())
        };
        let id = self.server.change(|state, _| claim(state))?;
        let mut claimed = ClaimOfGuard { lock, id, loss, story };
        let outcome = match context {
            Some(context) => self.watch(id, context, None, |_| None),
            None => self.watch(id, &Context::background(), None, |sight| match sight {
                Sight::Queued(_) => Some(Error::lock_unavailable(&self.text, self.key.mode)),
                Sight::Unknown(_) => Some(self.context_ended(ErrorKind::TimedOut, Instant::now(), sight)),
                Sight::Held | Sight::Gone => None,
            }),
        };
        let term = self.server.see(|state| state.term_of(&self.place, id));
        match (outcome, term) {
            (Ok(()), Some(term)) => Ok(HeldTerm { term, hold: Box::new(claimed) }),
            (outcome, _) => {
                let released = claimed.release(claimed.release_by());
                // A guard's claim is released by nobody else, so one that is gone was lost.
                let failed = outcome.err().filter(|error| error.kind() != ErrorKind::Released);
                let ended = || match self.server.see(|state| state.is_stopped(self.manager)) {
                    true => Some(Error::stopped()),
                    false => released.err(),
                };
                Err(failed.or_else(ended).unwrap_or_else(|| Error::lost(&self.text, None)))
            }
        }
    }
}

/// Another thread may be about to tell that this claim was granted the lock, or lost it. What happens to the next claim is told after that.
fn tell_and_wait(story: Option<&Arc<Story>>) {
    if let Some(story) = story {
        story.tell_and_wait();
    }
}

/// The claim of one guard.
#[derive(Debug)]
struct ClaimOfGuard {
    lock: Arc<MemoryLock>,
    id: u64,
    /// How its term was lost, if it was.
    loss: Arc<OnceLock<Loss>>,
    story: Option<Arc<Story>>,
}

impl Hold for ClaimOfGuard {
    fn key(&self) -> &str {
        &self.lock.text
    }

    fn loss(&self) -> Option<Loss> {
        self.loss.get().cloned()
    }

    fn release_by(&self) -> Instant {
        // It takes no time.
        Instant::now()
    }

    fn release(&mut self, _: Instant) -> Result<()> {
        let Self { lock, id, loss, story } = self;
        let was_there = lock.server.change(|state, gone| state.end(&lock.place, *id, gone));
        tell_and_wait(story.as_ref());
        if was_there {
            return Ok(());
        }
        // What is not there any more and was not lost, a stop has ended.
        Err(Error::lost(&lock.text, loss.get()))
    }
}

impl Drop for ClaimOfGuard {
    /// Only after a panic, of the application's logger say, is there something left to end.
    fn drop(&mut self) {
        let Self { lock, id, .. } = self;
        lock.server.change(|state, gone| state.end(&lock.place, *id, gone));
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
            Sight::Queued(_) => Some(Error::lock_unavailable(&self.text, self.key.mode).in_background()),
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
        let story = self.server.change(|state, gone| state.end_claim(self.manager, &self.key, gone));
        tell_and_wait(story.as_ref());
        Ok(())
    }

    fn lost(&self) -> Lost {
        self.term().map_or_else(lost_already, |term| term.lost().clone())
    }

    fn term(&self) -> Option<Term> {
        self.server.see(|state| state.term(self.manager, &self.key))
    }

    fn holder(&self) -> Result<Option<Holder>> {
        self.server.see(|state| state.holder_seen_by(self.manager, &self.place))
    }

    fn request_resignation(&self) -> Result<bool> {
        if self.is_shared() {
            return Err(Error::is_shared(&self.text, "leadership"));
        }
        if self.options.without_token {
            return Err(Error::no_resignations());
        }
        self.server.change(|state, _| state.request_resignation(self.manager, &self.place))
    }

    fn break_lock(&self) -> Result<Option<Holder>> {
        let holder = self.holder()?;
        Ok(holder.filter(|_| self.server.take_away(&self.place, LossReason::Terminated)))
    }

    fn last_success(&self) -> Result<Option<SystemTime>> {
        Ok(self.successes()?.last)
    }

    fn forget_success(&self) -> Result<bool> {
        self.successes()?;
        Ok(self.server.change(|state, _| state.set_success(&self.key.key, None)))
    }

    fn set_permits(&self, permits: u32) -> Result<u32> {
        if self.key.mode != Mode::Permit {
            return Err(Error::no_semaphore(&self.text));
        }
        LockOptions::new().permits(permits).validate(&self.key.key)?;
        self.server
            .change(|state, _| state.set_permits(self.manager, &self.key, self.options.permits, permits))
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
        let mut debug = f.debug_struct("MemoryLock");
        debug.field("key", &self.text).field("term", &self.term());
        let waiting = self.queue.waiting();
        if waiting > 0 {
            debug.field("waiting_threads", &waiting);
        }
        debug.finish()
    }
}
