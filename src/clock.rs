//! The clock by which terms are counted: it runs while the machine is suspended, as the server's does.

use std::time::{Duration, Instant};

/// A time on that clock: an [`Instant`], moved on by how long the machine has been suspended. That stands still meanwhile on Linux and
/// macOS, so by it alone a laptop or a virtual machine that was asleep for an hour would count on a lock that others had since.
///
/// Where the system does not tell of suspends (all but Linux), it is an `Instant` and no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Moment(Instant);

impl Moment {
    pub(crate) fn now() -> Self {
        let (now, suspended) = look();
        Self(now + suspended)
    }

    pub(crate) fn checked_add(self, time: Duration) -> Option<Self> {
        self.0.checked_add(time).map(Self)
    }

    pub(crate) fn checked_sub(self, time: Duration) -> Option<Self> {
        self.0.checked_sub(time).map(Self)
    }

    pub(crate) fn saturating_duration_since(self, earlier: Self) -> Duration {
        self.0.saturating_duration_since(earlier.0)
    }

    /// How long after `earlier` it was; `None` if it was before.
    pub(crate) fn since(self, earlier: Self) -> Option<Duration> {
        self.0.checked_duration_since(earlier.0)
    }

    pub(crate) fn elapsed(self) -> Duration {
        Self::now().saturating_duration_since(self)
    }

    /// When it will be that time if the machine is not suspended until then: to wait for. As long as it is not, the same moment gives the
    /// same instant, so that who compares two of them is not misled by two looks at a clock.
    pub(crate) fn instant(self) -> Instant {
        let (now, suspended) = look();
        self.0.checked_sub(suspended).unwrap_or(now)
    }
}

/// A clock that all processes of this machine share, that nobody can set, and that runs while the machine is suspended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MachineTime {
    /// The machine's run, from its start to its end, and whose clock on it this is. Letters, digits and hyphens.
    pub(crate) boot: String,
    /// Since its start.
    pub(crate) time: Duration,
    /// When that was, by the clock that can be set, since 1970.
    started: Duration,
}

impl MachineTime {
    /// As another process of this machine reads it with [`since`](Self::since): milliseconds, without a space.
    pub(crate) fn as_text(&self) -> String {
        format!("{}/{}", self.time.as_millis(), self.started.as_millis())
    }

    /// How long ago it was what the text says. `None` if that was by another clock: that of a virtual machine which was copied while it ran
    /// has the same run, and started at another time. So has this one if its clock was set meanwhile.
    pub(crate) fn since(&self, text: &str) -> Option<Duration> {
        const SAME: Duration = Duration::from_secs(2);
        let (time, started) = text.split_once('/')?;
        let [time, started] = [time, started].map(|text| text.parse().map(Duration::from_millis));
        (self.started.abs_diff(started.ok()?) < SAME).then_some(self.time.checked_sub(time.ok()?)).flatten()
    }

    /// Now; `None` where the system has no such clock (all but Linux).
    pub(crate) fn now() -> Option<Self> {
        #[cfg(target_os = "linux")]
        {
            use std::time::SystemTime;

            use rustix::time::{ClockId, clock_gettime};
            let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
            // Processes in another time namespace have another clock.
            let namespace = std::fs::read_link("/proc/self/ns/time").unwrap_or_default();
            let boot =
                format!("{}-{}", boot.trim(), namespace.to_string_lossy().replace([':', '[', ']'], ""));
            let is_known =
                !boot.starts_with('-') && boot.chars().all(|c| c.is_ascii_alphanumeric() || c == '-');
            let time = Duration::try_from(clock_gettime(ClockId::Boottime)).ok()?;
            let started = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).ok()?.checked_sub(time)?;
            is_known.then_some(Self { boot, time, started })
        }
        #[cfg(not(target_os = "linux"))]
        None
    }
}

/// Now, and for how long the machine has been suspended since this process first asked.
#[cfg(target_os = "linux")]
fn look() -> (Instant, Duration) {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

    use rustix::time::{ClockId, clock_gettime};

    /// Each suspend takes longer.
    const SHORTEST: u64 = 1_000_000;
    static FIRST: OnceLock<(Duration, Instant)> = OnceLock::new();
    static NOTICED: AtomicU64 = AtomicU64::new(0);

    let boot_time = || Duration::try_from(clock_gettime(ClockId::Boottime)).unwrap_or_default();
    // In this order: a thread that is interrupted in between sees too little, and the next look puts that right.
    let (with_suspends, now) = (boot_time(), Instant::now());
    let (first_with_suspends, first) = *FIRST.get_or_init(|| (with_suspends, now));
    let (with_suspends, without) =
        (with_suspends.saturating_sub(first_with_suspends), now.saturating_duration_since(first));
    let seen = u64::try_from(with_suspends.saturating_sub(without).as_nanos()).unwrap_or(u64::MAX);
    let noticed = NOTICED.load(Relaxed);
    let total = if seen > noticed.saturating_add(SHORTEST) {
        NOTICED.fetch_max(seen, Relaxed).max(seen)
    } else {
        noticed
    };
    (now, Duration::from_nanos(total) + pretended())
}

#[cfg(not(target_os = "linux"))]
fn look() -> (Instant, Duration) {
    (Instant::now(), pretended())
}

#[cfg(not(test))]
fn pretended() -> Duration {
    Duration::ZERO
}

#[cfg(test)]
fn pretended() -> Duration {
    tests::PRETENDED.with(std::cell::Cell::get)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::cell::Cell;

    thread_local! {
        pub(super) static PRETENDED: Cell<Duration> = const { Cell::new(Duration::ZERO) };
    }

    /// From now on this thread, and no other, sees a machine that was suspended for as long.
    pub(crate) fn pretend_suspend(time: Duration) {
        PRETENDED.with(|pretended| pretended.set(pretended.get() + time));
    }

    #[test]
    fn it_runs_on_as_an_instant_does_and_one_moment_is_one_instant() {
        let (moment, instant) = (Moment::now(), Instant::now());
        let later = moment.checked_add(Duration::from_secs(5)).unwrap();
        assert!(later.instant() <= instant + Duration::from_secs(5));
        assert_eq!(later.instant(), later.instant());
        let (by_moment, by_instant) = (moment.elapsed(), instant.elapsed());
        assert!(by_moment < by_instant + Duration::from_secs(1), "{by_moment:?} {by_instant:?}");
        while moment.elapsed().is_zero() {}
        assert!(Moment::now() > moment);
    }

    #[test]
    fn a_time_counts_for_the_same_clock_only() {
        let second = Duration::from_secs(1);
        let here = |time: u32, started: u32| MachineTime {
            boot: "b".to_owned(),
            time: time * second,
            started: started * second,
        };
        let text = here(100, 5000).as_text();
        assert_eq!(here(107, 5000).since(&text), Some(7 * second));
        assert_eq!(here(107, 5001).since(&text), Some(7 * second), "as it is read a moment later");
        assert_eq!(here(107, 5060).since(&text), None, "a copy");
        assert_eq!(here(107, 4000).since(&text), None, "its clock was set");
        assert_eq!(here(99, 5000).since(&text), None, "a copy from before");
        assert_eq!(here(107, 5000).since("100"), None);
    }

    #[test]
    fn a_suspend_counts() {
        const HOUR: Duration = Duration::from_secs(3600);
        let begun = Moment::now();
        let ends = begun.checked_add(2 * HOUR).unwrap();
        let wait = ends.instant();
        pretend_suspend(HOUR);
        assert!((HOUR..HOUR + HOUR / 2).contains(&begun.elapsed()));
        assert_eq!(wait - ends.instant(), HOUR, "the wait that is left is shorter");
        pretend_suspend(HOUR);
        assert!(ends <= Moment::now() && ends.instant() <= Instant::now());
    }
}
