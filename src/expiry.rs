//! The time at which a term ends unless it is renewed: moved on by each renewal, and final once somebody has seen it pass.

use std::fmt;
use std::time::Duration;

use crate::clock::Moment;
use crate::sync::{AtomicU64, Ordering::SeqCst};

/// The end of a term by its lease, shared by the threads that renew it and those that look at the clock.
///
/// Once a thread has seen the end pass, it stays passed: a renewal that comes in later fails. Without that an application
/// could be told that its term is over, and then that it goes on.
#[derive(Debug)]
pub(crate) struct Expiry {
    base: Moment,
    end: End,
}

impl Expiry {
    pub(crate) fn new(at: Moment) -> Self {
        let base = Moment::now();
        Self { base, end: End::new(ticks(base, at)) }
    }

    /// Whether the term is over. It stays so.
    pub(crate) fn has_passed(&self) -> bool {
        self.end.has_passed(ticks(self.base, Moment::now()))
    }

    /// Lets the term last until `at`; `false` if it is over already.
    pub(crate) fn move_to(&self, at: Moment) -> bool {
        self.end.move_to(ticks(self.base, at))
    }

    /// How long the term has still to go.
    pub(crate) fn left(&self) -> Duration {
        self.at().map_or(Duration::ZERO, |at| at.saturating_duration_since(Moment::now()))
    }

    /// When there is something to do about the end: at the end, and at a time long ago, always the same, once somebody has seen it pass. Who sees it
    /// first may be an application that asks whether its term goes on, and tells nobody.
    pub(crate) fn due(&self) -> Moment {
        self.at().unwrap_or(self.base)
    }

    /// When the term ends; `None` if it is over.
    pub(crate) fn at(&self) -> Option<Moment> {
        self.end.at().and_then(|ticks| self.base.checked_add(Duration::from_nanos(ticks)))
    }
}

/// Nanoseconds since `base`, less than [`End::PASSED`].
fn ticks(base: Moment, at: Moment) -> u64 {
    let since = at.saturating_duration_since(base).as_nanos();
    u64::try_from(since).unwrap_or(End::PASSED).min(End::PASSED - 1)
}

/// The end of a term in ticks, or [`PASSED`](Self::PASSED). Without a clock, so that all interleavings can be tried.
pub(crate) struct End(AtomicU64);

impl End {
    /// Somebody has seen the end pass.
    pub(crate) const PASSED: u64 = u64::MAX;

    pub(crate) fn new(at: u64) -> Self {
        Self(AtomicU64::new(at))
    }

    pub(crate) fn has_passed(&self, now: u64) -> bool {
        // If a renewal comes in between, the new end is looked at.
        let pass = |end| (end == Self::PASSED || now >= end).then_some(Self::PASSED);
        self.0.fetch_update(SeqCst, SeqCst, pass).is_ok()
    }

    pub(crate) fn move_to(&self, at: u64) -> bool {
        self.0.fetch_update(SeqCst, SeqCst, |end| (end != Self::PASSED).then_some(at)).is_ok()
    }

    pub(crate) fn at(&self) -> Option<u64> {
        Some(self.0.load(SeqCst)).filter(|end| *end != Self::PASSED)
    }
}

impl fmt::Debug for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("End").field(&self.at()).finish()
    }
}
