//! The thread that calls the callback: apart, so that whatever this does holds up no term.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use crossbeam_channel::{Receiver, never, select_biased};

use super::runner::message_of;
use super::shared::Shared;
use super::{Callback, LeaderEvent};
use crate::loss::Lost;

pub(super) struct Teller {
    shared: Arc<Shared>,
    callback: Callback,
    events: Receiver<Told>,
}

/// An event, and the channel of the term that begins with it.
pub(super) type Told = (LeaderEvent, Option<Lost>);

impl Teller {
    pub(super) fn new(shared: Arc<Shared>, callback: Callback, events: Receiver<Told>) -> Self {
        Self { shared, callback, events }
    }

    /// Tells of a loss when it happens, whatever the closure is doing; and of the other events as they come.
    pub(super) fn run(self) {
        let mut lost = never();
        loop {
            select_biased! {
                recv(self.events) -> event => {
                    let Ok((event, begun)) = event else { return };
                    if let Some(begun) = begun {
                        lost = begun.channel().clone();
                    }
                    self.tell(&event);
                    if let LeaderEvent::Stopped = event {
                        return;
                    }
                }
                recv(lost) -> _ => {
                    let ended = std::mem::replace(&mut lost, never());
                    if let Some(loss) = self.shared.loss_to_tell(&ended) {
                        self.tell(&LeaderEvent::Lost(loss));
                    }
                }
            }
        }
    }

    fn tell(&self, event: &LeaderEvent) {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| (self.callback)(event))) {
            let key = self.shared.lock.key();
            let message = message_of(panic);
            log::error!("leader of {key:?}: the callback panicked at {event:?}: {message}");
        }
    }
}
