//! The thread of a manager that looks at every deadline, whatever the threads do that have set them.

use std::fmt;
use std::io;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, OnceLock, Weak};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Something with a deadline.
pub(crate) trait Watched: Send + Sync {
    /// When it is to be looked at; `None` while nothing is bounded.
    fn deadline(&self) -> Option<Instant>;

    /// The deadline has passed. Must not block, nor call application code: the log is the application's, too.
    fn enforce(&self);
}

/// Enforces the deadlines of a manager: the end of each term by its lease, and the end of each call on a session.
///
/// Other threads have the same deadlines in view, but each can be kept busy: by a server that floods it with messages, by a
/// logger that blocks, by a valuer. This thread does nothing else, so a lost channel closes in time.
///
/// To set a deadline costs two atomics. The thread looks at all of them every [interval](Self::new), and says when it
/// will look next; only an earlier deadline wakes it. It starts with the first thing to watch and ends when it is
/// [closed](Self::close) and nothing is bounded any more.
pub(crate) struct Watchdog {
    /// Times are kept as nanoseconds since then, so that they fit an atomic.
    base: Instant,
    interval: Duration,
    /// When the thread looks next.
    looks_at: AtomicU64,
    /// Whether the thread runs.
    on: AtomicBool,
    closed: AtomicBool,
    thread: OnceLock<Thread>,
    watched: Mutex<Vec<Weak<dyn Watched>>>,
}

const NEVER: u64 = u64::MAX;

impl Watchdog {
    /// `interval` should be well below the usual deadlines: each one that is nearer wakes the thread.
    pub(crate) fn new(interval: Duration) -> Arc<Self> {
        Arc::new(Self {
            base: Instant::now(),
            interval,
            looks_at: AtomicU64::new(NEVER),
            on: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            thread: OnceLock::new(),
            watched: Mutex::new(Vec::new()),
        })
    }

    /// Watches `something` for as long as it lives, unless the watchdog is closed.
    ///
    /// # Errors
    /// If the thread could not be started.
    pub(crate) fn watch(self: &Arc<Self>, something: Weak<dyn Watched>) -> io::Result<()> {
        if self.closed.load(SeqCst) {
            return Ok(());
        }
        let mut watched = self.watched.lock();
        if watched.len() == watched.capacity() {
            watched.retain(|one| one.strong_count() > 0);
        }
        watched.push(something);
        if self.thread.get().is_none() {
            let body = Arc::clone(self);
            self.on.store(true, SeqCst);
            match thread::Builder::new().name("dsync-watchdog".to_owned()).spawn(move || body.run()) {
                Ok(handle) => drop(self.thread.set(handle.thread().clone())),
                Err(error) => {
                    self.on.store(false, SeqCst);
                    watched.pop();
                    return Err(error);
                }
            }
        }
        drop(watched);
        self.look_by(Instant::now());
        Ok(())
    }

    /// Whether deadlines are looked at. To be asked after a deadline was set.
    pub(crate) fn is_on(&self) -> bool {
        self.on.load(SeqCst)
    }

    /// A deadline was set: sees to it that it is looked at in time.
    pub(crate) fn look_by(&self, at: Instant) {
        if self.ticks(at) < self.looks_at.load(SeqCst) {
            self.wake();
        }
    }

    /// Lets the thread go when nothing is bounded any more.
    pub(crate) fn close(&self) {
        self.closed.store(true, SeqCst);
        self.wake();
    }

    fn wake(&self) {
        if let Some(thread) = self.thread.get() {
            thread.unpark();
        }
    }

    fn run(&self) {
        loop {
            match self.look() {
                Some(next) => thread::park_timeout(next.saturating_duration_since(Instant::now())),
                None if self.closed.load(SeqCst) => {
                    self.on.store(false, SeqCst);
                    // Who set a deadline before that counts on it; who comes later has a timer.
                    if !self.is_needed() {
                        self.watched.lock().clear();
                        return;
                    }
                    self.on.store(true, SeqCst);
                }
                None => thread::park(),
            }
        }
    }

    /// Enforces what is due; says when to look next, `None` if there is nothing to look for.
    ///
    /// The time of the next look is stored before the look: a deadline that the look misses, since it is set after that, is
    /// compared with it. It only moves closer afterwards, so no deadline is later than the look that is to see it.
    fn look(&self) -> Option<Instant> {
        let mut next = Instant::now() + self.interval;
        self.looks_at.store(self.ticks(next), SeqCst);
        let alive = self.alive();
        for watched in &alive {
            let Some(deadline) = watched.deadline() else { continue };
            if deadline <= Instant::now() {
                // Again in an interval, if whoever must see it is busy elsewhere.
                watched.enforce();
                // After the warning of a term's end comes the end.
                next = watched
                    .deadline()
                    .filter(|later| *later > deadline)
                    .map_or(next, |later| next.min(later));
            } else {
                next = next.min(deadline);
            }
        }
        if alive.is_empty() || (self.closed.load(SeqCst) && !self.is_needed()) {
            // What comes in from now on wakes the thread.
            self.looks_at.store(NEVER, SeqCst);
            return None;
        }
        self.looks_at.store(self.ticks(next), SeqCst);
        Some(next)
    }

    /// Whether anything is bounded now.
    fn is_needed(&self) -> bool {
        self.alive().iter().any(|watched| watched.deadline().is_some())
    }

    /// What is watched. Not under the mutex: it may be the last that holds on to one of them.
    fn alive(&self) -> Vec<Arc<dyn Watched>> {
        let mut watched = self.watched.lock();
        watched.retain(|one| one.strong_count() > 0);
        watched.iter().filter_map(Weak::upgrade).collect()
    }

    fn ticks(&self, at: Instant) -> u64 {
        u64::try_from(at.saturating_duration_since(self.base).as_nanos()).unwrap_or(NEVER)
    }
}

impl fmt::Debug for Watchdog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watchdog")
            .field("on", &self.on.load(SeqCst))
            .field("interval", &self.interval)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crossbeam_channel::{Receiver, Sender, unbounded};

    const LONG: Duration = Duration::from_secs(60);

    /// A deadline that can be moved; tells when it is enforced.
    struct Bounded {
        deadline: Mutex<Option<Instant>>,
        enforced: Sender<Instant>,
    }

    fn bounded(deadline: Option<Instant>) -> (Arc<Bounded>, Receiver<Instant>) {
        let (enforced, enforcements) = unbounded();
        (Arc::new(Bounded { deadline: Mutex::new(deadline), enforced }), enforcements)
    }

    impl Watched for Bounded {
        fn deadline(&self) -> Option<Instant> {
            *self.deadline.lock()
        }

        fn enforce(&self) {
            let _ = self.enforced.send(Instant::now());
        }
    }

    fn watch(watchdog: &Arc<Watchdog>, something: &Arc<Bounded>) {
        let something: Weak<Bounded> = Arc::downgrade(something);
        watchdog.watch(something).unwrap();
    }

    fn ended(watchdog: &Watchdog) -> bool {
        let begun = Instant::now();
        while watchdog.is_on() && begun.elapsed() < LONG {
            thread::yield_now();
        }
        !watchdog.is_on()
    }

    #[test]
    fn a_deadline_is_enforced_in_time_however_seldom_the_watchdog_looks() {
        let watchdog = Watchdog::new(LONG);
        let (idle, _) = bounded(None);
        let (busy, enforced) = bounded(None);
        watch(&watchdog, &idle);
        watch(&watchdog, &busy);
        for _ in 0..200 {
            let deadline = Instant::now() + Duration::from_millis(2);
            *busy.deadline.lock() = Some(deadline);
            watchdog.look_by(deadline);
            let at = enforced.recv_timeout(LONG / 2).expect("it is enforced");
            assert!(at >= deadline);
            *busy.deadline.lock() = None;
            while enforced.try_recv().is_ok() {}
        }
        watchdog.close();
        assert!(ended(&watchdog));
    }

    #[test]
    fn who_does_not_see_its_deadline_is_told_again_and_does_not_keep_the_watchdog_busy() {
        let watchdog = Watchdog::new(Duration::from_millis(20));
        let (stuck, enforced) = bounded(Some(Instant::now()));
        let begun = Instant::now();
        watch(&watchdog, &stuck);
        for _ in 0..5 {
            enforced.recv_timeout(LONG).expect("again");
        }
        let looks = enforced.try_iter().count() + 5;
        let most = begun.elapsed().as_millis() / 20 + 3;
        assert!((looks as u128) <= most, "{looks} looks in {:?}", begun.elapsed());
        watchdog.close();
        assert!(watchdog.is_on(), "not before it has seen it");
        *stuck.deadline.lock() = None;
        assert!(ended(&watchdog));
    }

    #[test]
    fn what_is_gone_is_watched_no_more_and_what_comes_after_the_close_is_not_watched() {
        let watchdog = Watchdog::new(LONG);
        for _ in 0..10_000 {
            watch(&watchdog, &bounded(None).0);
        }
        assert!(watchdog.watched.lock().capacity() < 64);
        watchdog.close();
        assert!(ended(&watchdog));
        let (late, enforced) = bounded(Some(Instant::now()));
        watch(&watchdog, &late);
        assert!(!watchdog.is_on() && enforced.is_empty() && watchdog.watched.lock().is_empty());
    }

    #[test]
    fn the_next_deadline_of_what_was_enforced_is_in_time_too() {
        /// Each enforcement moves the deadline on.
        struct Steps(Mutex<Vec<Instant>>, Sender<Instant>);
        impl Watched for Steps {
            fn deadline(&self) -> Option<Instant> {
                self.0.lock().last().copied()
            }
            fn enforce(&self) {
                let _ = self.0.lock().pop().map(|at| self.1.send(at));
            }
        }
        let watchdog = Watchdog::new(LONG);
        let (enforced, enforcements) = unbounded();
        let now = Instant::now();
        let steps = [20, 10, 0].map(|after| now + Duration::from_millis(after));
        let steps = Arc::new(Steps(Mutex::new(steps.to_vec()), enforced));
        watchdog.watch(Arc::downgrade(&steps) as Weak<dyn Watched>).unwrap();
        for _ in 0..3 {
            enforcements.recv_timeout(LONG / 2).expect("it is enforced");
        }
        watchdog.close();
        assert!(ended(&watchdog));
    }
}
