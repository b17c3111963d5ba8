//! What is to be made of it: how fast each takeover was, and whether a former leader ever did work.

use std::io;
use std::time::Duration;

use crate::blow::Takeover;
use crate::crew::NAMES;
use crate::history::{History, NEWS, Overlap};
use crate::ledger::Findings;
use crate::report::Moment;
use crate::screen::{Paint, Screen};
use crate::worker::LEASE;

/// All that is known at the end.
pub(crate) struct Verdict<'a> {
    pub(crate) history: &'a History,
    pub(crate) takeovers: &'a [Takeover],
    pub(crate) findings: &'a Findings,
    pub(crate) end: Moment,
}

impl Verdict<'_> {
    /// Shows it; says whether all is well.
    pub(crate) fn announce(&self, screen: &mut Screen) -> io::Result<bool> {
        let overlaps = self.history.overlaps(self.end);
        screen.finish(self.history)?;
        self.table(&overlaps, screen)?;

        let faults = self.faults(&overlaps);
        screen.print("")?;
        for fault in &faults {
            screen.print(&screen.paint(Paint::Bad, &format!("VIOLATION: {fault}")))?;
        }
        if faults.is_empty() {
            screen.print(&screen.paint(Paint::Good, "No unit of work was done by a former leader."))?;
        }
        let Findings { units, terms, out_of_order, .. } = self.findings;
        screen.print(&format!(
            "{units} units of work in {terms} terms; {out_of_order} were done after a later term had begun."
        ))?;
        if self.history.refused > 0 {
            screen.print(&format!(
                "{} more came too late, and the fence refused them.",
                self.history.refused
            ))?;
        }
        if let Some(longest) = longest(overlaps.iter().filter(|overlap| overlap.tolerated)) {
            screen.print(&format!(
                "A leader that an operator or a shutdown deposed, or that was thawed, hears\n\
                 of it when it runs. Until then two believed to lead: {} at most\n\
                 ({} tolerated). What the former one writes then, the fence keeps out.",
                millis(longest),
                NEWS.as_millis()
            ))?;
        } else {
            screen.print("At no time did two believe to lead.")?;
        }
        Ok(faults.is_empty())
    }

    fn table(&self, overlaps: &[Overlap], screen: &mut Screen) -> io::Result<()> {
        let heading = ["what happened", "leader", "takeover", "bound", "two believed"];
        let [what, leader, takeover, bound, both] = heading;
        screen.print(&format!("     {what:<28} {leader:<11} {takeover:>9} {bound:>6}  {both}"))?;
        for (index, Takeover { blow, at, from, to, took }) in self.takeovers.iter().enumerate() {
            let next = self.takeovers.get(index + 1).map_or(self.end, |next| next.at);
            let here = overlaps.iter().filter(|overlap| (*at..next).contains(&overlap.from));
            let both = longest(here).map_or("never".to_owned(), |length| format!("for {}", millis(length)));
            let leader = format!("{} → {}", NAMES[*from], NAMES[*to]);
            let (number, what) = (index + 1, blow.title());
            let (took, bound) =
                (format!("{:.0} ms", took.as_secs_f64() * 1e3), format!("{} s", blow.bound().as_secs()));
            screen.print(&format!("  {number}  {what:<28} {leader:<11} {took:>9} {bound:>6}  {both}"))?;
        }
        screen.print(&format!(
            "The bound of a frozen leader is the lease, {} s here, and 1 s. Who dies or has\n\
             no session is replaced at once; 2 s leave room for a busy machine. A server\n\
             takes its own time to stop and to start.",
            LEASE.as_secs()
        ))
    }

    fn faults(&self, overlaps: &[Overlap]) -> Vec<String> {
        let mut faults = Vec::new();
        for (index, Takeover { blow, took, .. }) in self.takeovers.iter().enumerate() {
            if *took > blow.bound() {
                let allowed = blow.bound();
                faults.push(format!("takeover {} took {took:.1?}, and {allowed:?} are allowed", index + 1));
            }
        }
        for Overlap { one, other, length, .. } in overlaps.iter().filter(|overlap| !overlap.tolerated) {
            let (one, other) = (NAMES[*one], NAMES[*other]);
            faults.push(format!("{one} and {other} led at the same time, for {}", millis(*length)));
        }
        let Findings { units, out_of_order, shared, .. } = self.findings;
        if *units == 0 {
            faults.push("no work was done, so nothing is proven".to_owned());
        }
        if *out_of_order > 0 {
            faults.push(format!("{out_of_order} units of work were done after a later leader had begun"));
        }
        if *shared > 0 {
            faults.push(format!("two workers had the same fencing token, {shared} times"));
        }
        faults
    }
}

fn longest<'a>(overlaps: impl Iterator<Item = &'a Overlap>) -> Option<Duration> {
    overlaps.map(|overlap| overlap.length).max()
}

fn millis(length: Duration) -> String {
    format!("{:.1} ms", length.as_secs_f64() * 1e3)
}
