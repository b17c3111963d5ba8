//! How long to wait after failures.

use std::time::Duration;

/// What follows a first pause of zero.
const SHORTEST: Duration = Duration::from_millis(1);

/// The time from one failure to the next attempt: it doubles up to a limit, from 1 ms if the first attempt comes at once.
#[derive(Debug)]
pub(super) struct BackOff {
    first: Duration,
    longest: Duration,
    next: Duration,
}

impl BackOff {
    pub(super) fn new((first, longest): (Duration, Duration)) -> Self {
        Self { first, longest, next: first }
    }

    /// The pause after a failure that followed `lasted` of success.
    pub(super) fn pause(&mut self, lasted: Duration) -> Duration {
        if lasted >= self.longest {
            self.reset();
        }
        let pause = self.next;
        self.next = pause.saturating_mul(2).max(SHORTEST).min(self.longest);
        pause
    }

    pub(super) fn reset(&mut self) {
        self.next = self.first;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_longest_and_begin_anew_after_a_term_that_lasted() {
        let seconds = Duration::from_secs;
        let mut back_off = BackOff::new((seconds(1), seconds(5)));
        let pauses = [0, 0, 4, 0, 0, 5, 0].map(|lasted| back_off.pause(seconds(lasted)).as_secs());
        assert_eq!(pauses, [1, 2, 4, 5, 5, 1, 2]);
        back_off.reset();
        assert_eq!(back_off.pause(Duration::ZERO), seconds(1));
    }

    #[test]
    fn a_first_attempt_may_come_at_once_and_the_next_ones_do_not() {
        let milliseconds = Duration::from_millis;
        let mut back_off = BackOff::new((Duration::ZERO, milliseconds(3)));
        let pauses = [(); 4].map(|()| back_off.pause(Duration::ZERO));
        assert_eq!(pauses, [0, 1, 2, 3].map(milliseconds));
    }

    #[test]
    fn a_pause_without_end_is_no_fault() {
        let mut back_off = BackOff::new((Duration::MAX, Duration::MAX));
        assert_eq!([(); 2].map(|()| back_off.pause(Duration::ZERO)), [Duration::MAX; 2]);
    }
}
