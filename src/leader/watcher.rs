//! The thread that asks the server: who leads, while this process does not; and whether to resign, while it does.
//!
//! Not the heartbeat of the lock's own session: it reads no table, and so a table that somebody has locked or dropped ends no term.

use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};

use super::LeaderEvent;
use super::shared::{Duty, Shared};
use super::teller::Told;
use crate::error::{Error, ErrorKind, Result, chain};
use crate::view::Holder;

pub(super) struct Watcher {
    shared: Arc<Shared>,
    tell: Option<Sender<Told>>,
    /// Something has changed; disconnects at the end of the leader.
    changes: Receiver<()>,
    /// How often to ask whether to resign, and who leads.
    asks: Option<Duration>,
    looks: Option<Duration>,
    /// Who was seen to lead the last time, and who was told of.
    seen: Option<Identity>,
    told: Option<Identity>,
    complaint: Option<ErrorKind>,
}

/// What tells one holder from another: the token and the backend.
type Identity = (Option<i64>, i32);

/// A leader is told of when it is there for this long after it was first seen. Else this process could tell of itself: the server
/// knows of a new term a moment before the holder does.
const CONFIRM: Duration = Duration::from_millis(200);

impl Watcher {
    pub(super) fn new(
        shared: Arc<Shared>,
        tell: Option<Sender<Told>>,
        changes: Receiver<()>,
        asks: Option<Duration>,
        looks: Option<Duration>,
    ) -> Self {
        Self { shared, tell, changes, asks, looks, seen: None, told: None, complaint: None }
    }

    pub(super) fn run(mut self) {
        let mut duty = Duty::Neither;
        let mut pause = None;
        loop {
            let now = self.shared.duty();
            if std::mem::replace(&mut duty, now) != now {
                if let Duty::Leading { .. } = now {
                    // Who leads after this term is another leader, also where that one has no token and the session of before.
                    (self.seen, self.told) = (None, None);
                }
                pause = match now {
                    Duty::Standing => self.looks.map(|every| every.min(CONFIRM)),
                    Duty::Leading { token } => token.and(self.asks),
                    Duty::Neither => None,
                };
            }
            match self.changes.recv_timeout(pause.unwrap_or(Duration::MAX)) {
                Ok(()) => continue,
                Err(RecvTimeoutError::Disconnected) => return,
                Err(RecvTimeoutError::Timeout) => {}
            }
            let outcome = match duty {
                Duty::Standing => self.look(),
                Duty::Leading { token } => self.ask(token),
                Duty::Neither => Ok(None),
            };
            match outcome {
                Ok(next) => (pause, self.complaint) = (next, None),
                Err(error) => {
                    pause = if duty == Duty::Standing { self.looks } else { self.asks };
                    self.complain(error);
                }
            }
        }
    }

    /// Whether to resign; when to ask again.
    fn ask(&mut self, token: Option<i64>) -> Result<Option<Duration>> {
        let Some(token) = token else { return Ok(None) };
        if self.shared.lock.is_asked_to_resign(token)? && self.shared.resign(token) {
            log::info!("leader of {:?}: asked to resign", self.shared.lock.key());
        }
        Ok(self.asks)
    }

    /// Who leads; when to look again.
    fn look(&mut self) -> Result<Option<Duration>> {
        let Some(every) = self.looks else { return Ok(None) };
        let leader = self.shared.lock.holder()?.filter(|holder| !self.shared.was_led_by(holder));
        let identity = leader.as_ref().map(|holder| (holder.token, holder.pid));
        if !self.shared.note_leader(leader.clone()) {
            return Ok(Some(every));
        }
        let before = std::mem::replace(&mut self.seen, identity);
        if identity.is_none() || identity == self.told {
            return Ok(Some(every));
        }
        if identity != before {
            return Ok(Some(CONFIRM));
        }
        self.told = identity;
        if let Some(leader) = leader {
            self.tell_of(leader);
        }
        Ok(Some(every))
    }

    fn tell_of(&self, leader: Holder) {
        let event = LeaderEvent::AnotherLeads(leader);
        let text = event.to_string();
        if let Some(tell) = &self.tell {
            // The runner may have ended, and the teller with it.
            let _ = tell.send((event, None));
        }
        log::info!("leader of {:?}: {text}", self.shared.lock.key());
    }

    /// Tells of an error, unless the one before was of the same kind. That the manager has stopped is for the runner to tell.
    fn complain(&mut self, error: Error) {
        let kind = error.kind();
        if kind == ErrorKind::SyncManagerStopped || self.complaint.replace(kind) == Some(kind) {
            return;
        }
        self.shared.note_error(&error);
        let text = chain(&error);
        if let Some(tell) = &self.tell {
            let _ = tell.send((LeaderEvent::Error(error), None));
        }
        log::warn!("leader of {:?}: the server could not be asked: {text}", self.shared.lock.key());
    }
}
