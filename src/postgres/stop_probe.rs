//! Connections that show whether a server is stopping, which refuses them then. One is made on each run of a server for all claims of the
//! manager that wait, and another where that one has no answer for long.

use std::time::{Duration, Instant};

use crate::clock::Moment;
use crate::pg::runs::Runs;
use crate::pg::stream::StopProbe;

/// Each probe that is refused writes a line into the server's log, so they come less and less often, as sessions do that cannot be opened.
const SHORTEST: Duration = Duration::from_millis(50);
const LONGEST: Duration = Duration::from_secs(2);

/// A session that is to send a probe has 50 ms to do so. Then another one may.
const SENT_WITHIN: Duration = Duration::from_millis(50);

/// A probe that has no answer after 500 ms may have been lost on its way, and another one follows.
const ANSWERED_WITHIN: Duration = Duration::from_millis(500);

/// What a claim is to do whose grant is to be confirmed.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Look {
    /// The server was not stopping then, if it is still the same.
    Open(Moment),
    /// Send a probe.
    Probe,
    /// Wait for the next look.
    Wait,
}

/// The probes of a manager.
#[derive(Default)]
pub(crate) struct StopProbes(Runs<Probed>);

/// What the probes have shown of one run of a server.
#[derive(Default)]
struct Probed {
    /// When the latest probe was sent that was answered.
    open: Option<Moment>,
    under_way: Vec<(Moment, StopProbe)>,
    /// When probes began to be refused, and when the last one was; `None` if the last one was not.
    refused: Option<(Instant, Instant)>,
    /// Why the last one was refused.
    refusal: String,
    /// When the next one may come, if not at once.
    next: Option<Instant>,
}

impl StopProbes {
    /// What to do for a lock that was granted at `granted`, on this run of a server.
    pub(crate) fn look(&mut self, run: &str, granted: Moment, now: Instant) -> Look {
        /// So many are under way at once.
        const MOST: usize = 8;
        let probed = self.0.of(run);
        probed.take_in(now);
        match probed.open {
            Some(began) if began >= granted => Look::Open(began),
            // One that was sent before the grant is let go on, since those that are granted locks all the time would have each replaced by another.
            _ if probed.under_way.len() < MOST && probed.next.is_none_or(|next| now >= next) => {
                probed.next = Some(now + SENT_WITHIN);
                Look::Probe
            }
            _ => Look::Wait,
        }
    }

    /// The probe was sent at `began`, or could not be.
    pub(crate) fn sent(&mut self, run: &str, began: Moment, outcome: Result<StopProbe, String>) {
        let now = Instant::now();
        let probed = self.0.of(run);
        match outcome {
            Ok(probe) => {
                probed.next = Some(now + ANSWERED_WITHIN);
                probed.under_way.push((began, probe));
            }
            Err(refusal) => probed.note_refused(refusal, now),
        }
    }

    /// Why the last probe was refused, if it was.
    pub(crate) fn refusal(&mut self, run: &str) -> Option<String> {
        let probed = self.0.of(run);
        probed.refused.map(|_| probed.refusal.clone())
    }

    /// Nobody waits any more.
    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }
}

impl Probed {
    /// Takes in what came of the probes that are under way.
    fn take_in(&mut self, now: Instant) {
        // Nobody has looked for some time: the reason of then may be gone.
        if self.refused.is_some_and(|(_, last)| now - last > 2 * LONGEST) {
            self.refused = None;
        }
        for (began, probe) in std::mem::take(&mut self.under_way) {
            match probe.outcome() {
                None => self.under_way.push((began, probe)),
                Some(Ok(())) => {
                    (self.open, self.refused, self.next) = (self.open.max(Some(began)), None, None);
                    // Those that were sent before have nothing more to tell.
                    self.under_way.clear();
                }
                Some(Err(refusal)) => self.note_refused(refusal, now),
            }
        }
    }

    fn note_refused(&mut self, refusal: String, now: Instant) {
        let since = self.refused.map_or(now, |(since, _)| since);
        self.refused = Some((since, now));
        self.next = Some(now + ((now - since) / 8).clamp(SHORTEST, LONGEST));
        self.refusal = refusal;
    }
}
