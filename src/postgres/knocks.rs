//! Newcomers that come to see whether a server stops: one on each run of a server for all claims of the manager that wait, and another where that
//! one has no answer for long.

use std::time::{Duration, Instant};

use crate::clock::Moment;
use crate::pg::runs::Runs;
use crate::pg::session::refusal::Refusal;
use crate::pg::stream::{DialError, Knock};

/// Each newcomer that is refused writes a line into the server's log, so they come less and less often, as sessions do that cannot be opened.
const SHORTEST: Duration = Duration::from_millis(50);
const LONGEST: Duration = Duration::from_secs(2);

/// A session that is to send a newcomer has this long to do so. Then another one may.
const SETS_OUT_WITHIN: Duration = Duration::from_millis(50);

/// A newcomer that has no answer by then may have been lost on its way, and another one follows.
const ANSWERED_WITHIN: Duration = Duration::from_millis(500);

/// What a claim is to do whose grant is to be confirmed.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Look {
    /// The server did not stop then, if it is still the same.
    Open(Moment),
    /// Send a newcomer.
    Knock,
    /// Wait for the next look.
    Wait,
}

/// The newcomers of a manager.
#[derive(Default)]
pub(crate) struct Knocks(Runs<Door>);

/// What is known of one run of a server.
#[derive(Default)]
struct Door {
    /// When the latest newcomer set out that was answered.
    open: Option<Moment>,
    under_way: Vec<(Moment, Knock)>,
    /// When newcomers began to be refused, and when the last one was; `None` if the last one was not.
    shut: Option<(Instant, Instant)>,
    /// Why the last one was refused.
    said: String,
    /// When the next one may come, if not at once.
    next: Option<Instant>,
}

impl Knocks {
    /// For what was granted at `granted`, on this run of a server.
    pub(crate) fn look(&mut self, run: &str, granted: Moment, now: Instant) -> Look {
        /// So many at once.
        const MOST: usize = 8;
        let door = self.0.of(run);
        door.hear(now);
        match door.open {
            Some(began) if began >= granted => Look::Open(began),
            // One that set out before the grant is let go on, since those that are granted locks all the time would have each replaced by another.
            _ if door.under_way.len() < MOST && door.next.is_none_or(|next| now >= next) => {
                door.next = Some(now + SETS_OUT_WITHIN);
                Look::Knock
            }
            _ => Look::Wait,
        }
    }

    /// The newcomer has set out at `began`, or could not.
    pub(crate) fn set_out(&mut self, run: &str, began: Moment, outcome: Result<Knock, DialError>) {
        let now = Instant::now();
        let door = self.0.of(run);
        match outcome {
            Ok(knock) => {
                door.next = Some(now + ANSWERED_WITHIN);
                door.under_way.push((began, knock));
            }
            Err(error) => door.refused(error, now),
        }
    }

    /// Why the last newcomer was refused, if it was.
    pub(crate) fn said(&mut self, run: &str) -> Option<String> {
        let door = self.0.of(run);
        door.shut.map(|_| door.said.clone())
    }

    /// Nobody waits any more.
    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }
}

impl Door {
    /// Takes in what came of the newcomers that are under way.
    fn hear(&mut self, now: Instant) {
        // Nobody has looked for some time: what was said then may not be so any more.
        if self.shut.is_some_and(|(_, last)| now - last > 2 * LONGEST) {
            self.shut = None;
        }
        for (began, knock) in std::mem::take(&mut self.under_way) {
            match knock.outcome() {
                None => self.under_way.push((began, knock)),
                Some(Ok(())) => {
                    (self.open, self.shut, self.next) = (self.open.max(Some(began)), None, None);
                    // Those that set out before have nothing more to tell.
                    self.under_way.clear();
                }
                Some(Err(error)) => self.refused(error, now),
            }
        }
    }

    fn refused(&mut self, error: DialError, now: Instant) {
        let since = self.shut.map_or(now, |(since, _)| since);
        self.shut = Some((since, now));
        self.next = Some(now + ((now - since) / 8).clamp(SHORTEST, LONGEST));
        self.said = Refusal::from_dial(error).to_string();
    }
}
