//! A split brain: a standby is promoted while the primary lives on, and one of the processes reaches only that.
//!
//! The two servers are one [`Server`] whose sessions have a side. The one of before has a lock of its own, no takeover grace, and no standby
//! any more that could confirm.

use super::*;

impl World {
    /// Whether the primary of before can go its own way with this process: once, and while there is something that it could keep.
    pub(super) fn can_split(&self, who: usize) -> bool {
        let is_one = self.processes.iter().all(|process| !process.stays);
        is_one && self.processes[who].connection.is_some()
    }

    pub(super) fn split(&mut self, who: usize) {
        self.server.past.begin_on_standby();
        self.server.sessions.iter_mut().for_each(|session| session.before = true);
        for (number, process) in self.processes.iter_mut().enumerate() {
            process.stays = number == who;
            if let Some(connection) = process.connection.as_mut().filter(|_| number != who) {
                connection.orphaned = true;
                connection.cut();
            }
        }
    }
}

impl Server {
    /// Whether the session is on the primary of before.
    pub(super) fn is_before(&self, id: u8) -> bool {
        self.session(id).is_some_and(|session| session.before)
    }
}

impl Model {
    /// What the standbys say at the moment in which the server has asked them, by a question that was sent at `began`; nothing, if they do not
    /// follow it any more.
    pub(super) fn confirmation(&self, server: &mut Server, id: u8, began: Time) -> Option<Event> {
        let reuses = self.has(Flaw::ConfirmationReused);
        let session = server.session_mut(id)?;
        let is_given = !session.before || session.reuses;
        session.reuses = reuses && is_given;
        let (followed, open) = (Some(began), Some(Time::MAX));
        is_given.then_some(Event::Session(session::Event::Confirmed { followed, open }))
    }
}
