//! Newcomers that come to see whether a server stops: one at a time on each run of a server, for all claims of the manager that wait.

use std::time::{Duration, Instant};

use crate::pg::session::refusal::Refusal;
use crate::pg::stream::{DialError, Knock};

/// What a claim is to do whose grant is to be confirmed.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Look {
    /// The server did not stop when the lock was granted, if it is still the same.
    Open,
    /// Send a newcomer.
    Knock,
    /// Wait for the next look; one that came after the grant is to be answered within this time, as far as is known and no call waits for too long.
    Wait { answered_within: Duration },
}

/// The newcomers of a manager.
#[derive(Default)]
pub(crate) struct Knocks(Vec<Door>);

/// What is known of one run of a server. A manager may have sessions on two.
struct Door {
    run: String,
    /// When the newcomer set out that did so last, of those that were answered.
    open: Option<Instant>,
    /// How long that one's answer took.
    took: Duration,
    under_way: Option<(Instant, Knock)>,
    /// When newcomers began to be refused; `None` if the last one was not.
    shut_since: Option<Instant>,
    /// Why the last one was refused.
    said: String,
    /// When the next one may come.
    next: Instant,
}

impl Knocks {
    /// For what was granted at `granted`, on this run of a server.
    pub(crate) fn look(&mut self, run: &str, granted: Instant, now: Instant) -> Look {
        /// So long nobody else sends one.
        const SETS_OUT_WITHIN: Duration = Duration::from_millis(50);
        /// Releases on the same session wait as long.
        const MOST: Duration = Duration::from_millis(50);
        let door = self.of(run, now);
        door.hear(now);
        if door.open.is_some_and(|began| began >= granted) {
            return Look::Open;
        }
        match &door.under_way {
            Some((began, _)) if *began >= granted => {
                Look::Wait { answered_within: (2 * door.took).min(MOST).saturating_sub(now - *began) }
            }
            None if now >= door.next => {
                door.next = now + SETS_OUT_WITHIN;
                Look::Knock
            }
            _ => Look::Wait { answered_within: Duration::ZERO },
        }
    }

    /// The newcomer has set out at `began`, or could not.
    pub(crate) fn set_out(&mut self, run: &str, began: Instant, outcome: Result<Knock, DialError>) {
        let now = Instant::now();
        let door = self.of(run, now);
        match outcome {
            Ok(knock) => door.under_way = Some((began, knock)),
            Err(error) => door.refused(error, now),
        }
    }

    /// Why the last newcomer was refused, if it was.
    pub(crate) fn said(&mut self, run: &str) -> Option<String> {
        let door = self.of(run, Instant::now());
        door.shut_since.map(|_| door.said.clone())
    }

    /// Nobody waits any more.
    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }

    fn of(&mut self, run: &str, now: Instant) -> &mut Door {
        /// More than there can be servers of one manager.
        const MOST: usize = 8;
        let index = self.0.iter().position(|door| door.run == run).unwrap_or_else(|| {
            if self.0.len() == MOST {
                self.0.remove(0);
            }
            self.0.push(Door {
                run: run.to_owned(),
                open: None,
                took: Duration::ZERO,
                under_way: None,
                shut_since: None,
                said: String::new(),
                next: now,
            });
            self.0.len() - 1
        });
        &mut self.0[index]
    }
}

impl Door {
    /// Takes in what came of the newcomer that is under way.
    fn hear(&mut self, now: Instant) {
        let Some((began, knock)) = &self.under_way else { return };
        let Some(outcome) = knock.outcome() else { return };
        let began = *began;
        self.under_way = None;
        match outcome {
            Ok(took) => {
                (self.open, self.took) = (Some(began), took);
                (self.shut_since, self.next) = (None, now);
            }
            Err(error) => self.refused(error, now),
        }
    }

    /// Each newcomer that is refused writes a line into the server's log, so they come less and less often, as sessions do that cannot be opened.
    fn refused(&mut self, error: DialError, now: Instant) {
        const SHORTEST: Duration = Duration::from_millis(50);
        const LONGEST: Duration = Duration::from_secs(2);
        let since = *self.shut_since.get_or_insert(now);
        self.next = now + ((now - since) / 8).clamp(SHORTEST, LONGEST);
        self.said = Refusal::from_dial(error).to_string();
    }
}
