//! The course of an act: cut the leader off, promote the standby, and see who leads when; and what is to be made of it.

use std::error::Error;
use std::time::Duration;

use support::{Replication, Server};

use crate::crew::{Crew, NAMES};
use crate::history::{Overlap, State};
use crate::report::{Moment, now};
use crate::screen::{Paint, Screen};
use crate::sites::{Cut, LEADER, Sites};
use crate::stage::{ELECTION, Stage};
use crate::worker::LEASE;

/// How long all is well before the cut.
const PEACE: Duration = Duration::from_secs(1);
/// How long the next leader leads before the end.
const AFTER: Duration = Duration::from_secs(1);
/// Within which time there must be a next leader: those who waited on the old primary notice that it is cut off, and the takeover
/// grace on the new one is as long as the lease.
const NEXT: Duration = Duration::from_secs(30);

pub(crate) struct Act {
    /// Whether the standby confirms heartbeats.
    pub(crate) quorum: bool,
    pub(crate) cut: Cut,
}

/// What came of an act.
pub(crate) struct Found {
    quorum: bool,
    /// From the cut to when the leader of before stood down, if it did by itself.
    stood_down: Option<Duration>,
    /// From the cut to when the next one began.
    next: Duration,
    overlaps: Vec<Overlap>,
}

impl Act {
    pub(crate) fn play(&self) -> Result<Found, Box<dyn Error>> {
        let sites = Sites::build(self.cut)?;
        let launch = |worker| {
            let mut command = sites.launch(worker)?;
            command.env_remove(crate::QUORUM);
            if self.quorum {
                command.env(crate::QUORUM, "named-standbys");
            }
            Ok(command)
        };
        let mut stage = Stage::new(Crew::new(launch), Screen::new("█ leads   ─ stands by"));
        stage.crew.start(1)?;
        stage.watch("the leader", ELECTION, |stage| stage.history.leader().is_some())?;
        stage.crew.start(NAMES.len() - 1)?;
        stage.watch("those who stand by", ELECTION, Stage::is_calm)?;
        stage.rest(PEACE)?;

        let name = NAMES[LEADER];
        stage.screen.blow(now(), &format!("{name} and the primary are cut off from all others"));
        let cut_at = stage.begin();
        sites.cut()?;
        stage.meanwhile("the standby is promoted: two primaries now", || sites.standby.promote())?;
        // As a failover manager would. It is to confirm heartbeats in its turn.
        let mut spare: Option<Server> = None;
        if self.quorum {
            stage.meanwhile("the new primary has a standby of its own", || {
                spare = Some(sites.standby.standby(Replication::Synchronous)?);
                Ok(())
            })?;
        }
        let next = |stage: &Stage<'_>| {
            let stretches = stage.history.stretches(Moment::MAX);
            let others = stretches.iter().filter(|stretch| stretch.worker != LEADER && stretch.from > cut_at);
            others.map(|stretch| stretch.from).min()
        };
        stage.watch("the next leader", NEXT, |stage| next(stage).is_some())?;
        stage.rest(AFTER)?;
        let led_to_the_end = stage.history.state_at(LEADER, Moment::MAX) == State::Leading;
        let next = next(&stage).ok_or("the next leader was none")?;
        let end = stage.end()?;
        stage.screen.finish(&stage.history)?;
        let left = stage.history.stretches(end).into_iter().filter(|stretch| stretch.worker == LEADER);
        let left = left.map(|stretch| stretch.to).max().filter(|_| !led_to_the_end);
        Ok(Found {
            quorum: self.quorum,
            stood_down: left.map(|at| at.saturating_sub(cut_at)),
            next: next - cut_at,
            overlaps: stage.history.overlaps(end),
        })
    }
}

/// Shows what was found; says whether it is what was promised.
pub(crate) fn judge(found: &[Found]) -> Result<bool, Box<dyn Error>> {
    let mut screen = Screen::new("");
    let name = NAMES[LEADER];
    let led = format!("{name} led for");
    let [what, next, both] = ["after the cut", "the next one after", "two led"];
    screen.print(&format!("{what:<20} {led:>12} {next:>19} {both:>9}"))?;
    let mut faults = Vec::new();
    for Found { quorum, stood_down, next, overlaps } in found {
        let longest = overlaps.iter().map(|overlap| overlap.length).max();
        let what = if *quorum { "with the quorum" } else { "without" };
        let led = stood_down.map_or("to the end".to_owned(), seconds);
        let both = longest.map_or("never".to_owned(), seconds);
        screen.print(&format!("{what:<20} {led:>12} {:>19} {both:>9}", seconds(*next)))?;
        match (quorum, longest) {
            (true, Some(_)) => faults.push("two led at the same time, with the quorum"),
            (true, None) if stood_down.is_none_or(|at| at >= *next) => {
                faults.push("the leader did not stand down, with the quorum");
            }
            (false, None) => faults.push("two never led without the quorum, so nothing is shown"),
            _ => {}
        }
    }
    screen.print("")?;
    for fault in &faults {
        screen.print(&screen.paint(Paint::Bad, &format!("VIOLATION: {fault}")))?;
    }
    if faults.is_empty() {
        let text = "With the quorum, the leader had stood down before the next one began.";
        screen.print(&screen.paint(Paint::Good, text))?;
        screen.print(&format!(
            "A lease is {}. Without the quorum both lead until the cut is over.",
            seconds(LEASE)
        ))?;
    }
    Ok(faults.is_empty())
}

fn seconds(length: Duration) -> String {
    format!("{:.1} s", length.as_secs_f64())
}
