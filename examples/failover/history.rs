//! Who was in which state at which time, and whether two ever led at once.

use std::ops::RangeInclusive;
use std::time::Duration;

use crate::crew::NAMES;
use crate::report::{Moment, Report, What};

/// How long two may believe that they lead when the former one *could not know better*: an operator has ended its session,
/// alone or by a shutdown of the server, or it was thawed long after its term had run out.
///
/// A server that is told to end a session frees its locks in that moment, and the next in line may read of its luck
/// before the former leader has read of its loss: they are two processes, and it takes as long as the scheduler takes to
/// run both. (A shutdown ends the sessions one after the other, so that one that waits may even lead for a moment.) And a
/// thawed process runs for a moment before it can look at a clock. On an idle machine both are a matter of a millisecond
/// or two; the rest is for busy ones. What a leader writes in that moment is refused by the fence: see `ledger.rs`.
///
/// In all other cases, a process that dies or is frozen, nothing is tolerated: the one term has ended *before* the next one
/// begins.
pub(crate) const NEWS: Duration = Duration::from_millis(100);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Absent,
    Standing,
    Leading,
    Frozen,
    /// Thawed, and still of the belief that it leads.
    Waking,
}

/// A worker has entered a state.
struct Change {
    at: Moment,
    worker: usize,
    state: State,
}

/// A time in which a worker believed that it led and could act on it.
pub(crate) struct Stretch {
    pub(crate) worker: usize,
    pub(crate) from: Moment,
    pub(crate) to: Moment,
}

/// Two workers that led at the same time.
pub(crate) struct Overlap {
    pub(crate) one: usize,
    pub(crate) other: usize,
    pub(crate) from: Moment,
    pub(crate) length: Duration,
    pub(crate) tolerated: bool,
}

#[derive(Default)]
pub(crate) struct History {
    /// In the order of time.
    changes: Vec<Change>,
    /// When an overlap may begin that is no longer than [`NEWS`].
    excused: Vec<RangeInclusive<Moment>>,
    /// How often the fence stopped a unit of work that came too late.
    pub(crate) refused: usize,
}

impl History {
    /// Takes in what a worker reports.
    pub(crate) fn hear(&mut self, worker: usize, report: &Report) {
        match report.what {
            What::Standing | What::Lost { .. } | What::Stopped => {
                self.enter(worker, report.at, State::Standing)
            }
            What::Gained { .. } => self.enter(worker, report.at, State::Leading),
            What::Refused => self.refused += 1,
        }
    }

    pub(crate) fn enter(&mut self, worker: usize, at: Moment, state: State) {
        // The reports of two processes need not come in the order of their times.
        let place = self.changes.partition_point(|change| change.at <= at);
        self.changes.insert(place, Change { at, worker, state });
    }

    /// Something happens in this time of which a leader cannot know before it is told; see [`NEWS`].
    pub(crate) fn excuse(&mut self, time: RangeInclusive<Moment>) {
        self.excused.push(time);
    }

    pub(crate) fn state_at(&self, worker: usize, at: Moment) -> State {
        let mut changes = self.changes.iter().rev();
        let last = changes.find(|change| change.worker == worker && change.at <= at);
        last.map_or(State::Absent, |change| change.state)
    }

    /// The one leader, if the last that was heard is that one leads, and since when.
    pub(crate) fn leader(&self) -> Option<(usize, Moment)> {
        let mut open = self.stretches(Moment::MAX).into_iter().filter(|stretch| stretch.to == Moment::MAX);
        let leader = open.next()?;
        open.next().is_none().then_some((leader.worker, leader.from))
    }

    /// All times in which somebody led; those that go on end at `end`.
    pub(crate) fn stretches(&self, end: Moment) -> Vec<Stretch> {
        let mut stretches = Vec::new();
        for worker in 0..NAMES.len() {
            let mut changes = self.changes.iter().filter(|change| change.worker == worker).peekable();
            while let Some(change) = changes.next() {
                if matches!(change.state, State::Leading | State::Waking) {
                    let to = changes.peek().map_or(end, |next| next.at);
                    stretches.push(Stretch { worker, from: change.at, to });
                }
            }
        }
        stretches
    }

    /// Every pair of workers that led at the same time, up to `end`.
    pub(crate) fn overlaps(&self, end: Moment) -> Vec<Overlap> {
        let stretches = self.stretches(end);
        let mut overlaps = Vec::new();
        for (index, one) in stretches.iter().enumerate() {
            for other in stretches.iter().skip(index + 1).filter(|other| other.worker != one.worker) {
                let (from, to) = (one.from.max(other.from), one.to.min(other.to));
                if from < to {
                    let length = to - from;
                    let excused = self.excused.iter().any(|time| time.contains(&from));
                    overlaps.push(Overlap {
                        one: one.worker,
                        other: other.worker,
                        from,
                        length,
                        tolerated: excused && length <= NEWS,
                    });
                }
            }
        }
        overlaps
    }
}
