//! How a supervisor sleeps, and how it is woken: by time, by another thread, or by something to read on a socket.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{read, write};

use crate::postgres::stream::Socket;

/// A supervisor's alarm clock.
///
/// To wake a sleeping thread costs a system call, and the processor that runs the thread. So whoever has news asks first
/// whether it is needed: [`stir`](Self::stir) leaves word that there is something new, and
/// [`looks_by`](Self::looks_by) tells whether the supervisor comes to see it in time by itself. One of the two threads
/// sees what the other did: the supervisor says when it will look *before* it asks for news a last time.
#[derive(Debug)]
pub(crate) struct Alarm {
    /// Times are kept as nanoseconds since then, so that they fit an atomic.
    base: Instant,
    /// Counts the news.
    news: AtomicU64,
    /// When the supervisor looks at the latest.
    looks_at: AtomicU64,
    /// The bell has been rung and not heard yet.
    ringing: AtomicBool,
    bell: Bell,
}

/// What ended a sleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Woken {
    /// There is something to read, or the connection is over.
    Socket,
    Bell,
    /// By the time, or by news that came in before.
    Time,
}

impl Alarm {
    /// # Errors
    /// When the process has no file descriptor left.
    pub(crate) fn new() -> std::io::Result<Self> {
        Ok(Self {
            base: Instant::now(),
            news: AtomicU64::new(0),
            // The thread that is being started looks at once.
            looks_at: AtomicU64::new(0),
            ringing: AtomicBool::new(false),
            bell: Bell::new()?,
        })
    }

    /// Leaves word that something has changed. It wakes nobody.
    pub(crate) fn stir(&self) {
        self.news.fetch_add(1, SeqCst);
    }

    /// Whether the supervisor looks by then. To be asked after [`stir`](Self::stir).
    pub(crate) fn looks_by(&self, by: Instant) -> bool {
        self.looks_at.load(SeqCst) <= self.ticks(by)
    }

    /// Wakes the supervisor.
    pub(crate) fn ring(&self) {
        self.stir();
        if !self.ringing.swap(true, SeqCst) {
            self.bell.ring();
        }
    }

    /// How much there has been told so far.
    pub(crate) fn news(&self) -> u64 {
        self.news.load(SeqCst)
    }

    /// Sleeps until then, or until the bell is rung, or there is something to read on `socket`. If there has been news
    /// since `seen`, not at all.
    pub(crate) fn sleep(&self, seen: u64, socket: Option<&Socket>, until: Instant) -> Woken {
        self.looks_at.store(self.ticks(until), SeqCst);
        if self.news() != seen {
            return Woken::Time;
        }
        let timeout = timespec(until.saturating_duration_since(Instant::now()));
        let mut fds = Vec::with_capacity(2);
        fds.push(PollFd::new(&self.bell.listening, PollFlags::IN));
        fds.extend(socket.map(|socket| PollFd::new(socket, PollFlags::IN)));
        // A signal may interrupt it, and that is no news: the caller looks, and sleeps again.
        let _ = poll(&mut fds, Some(&timeout));
        let [rung, readable] = [0, 1].map(|index| fds.get(index).is_some_and(|fd| !fd.revents().is_empty()));
        if rung {
            self.bell.hear();
        }
        // After the bell is silent, so that the next one to ring it is heard; and whoever found it ringing still has
        // changed before what the supervisor looks at after this.
        self.ringing.store(false, SeqCst);
        match (readable, rung) {
            (true, _) => Woken::Socket,
            (false, true) => Woken::Bell,
            (false, false) => Woken::Time,
        }
    }

    fn ticks(&self, at: Instant) -> u64 {
        u64::try_from(at.saturating_duration_since(self.base).as_nanos()).unwrap_or(u64::MAX)
    }
}

fn timespec(time: Duration) -> Timespec {
    Timespec { tv_sec: time.as_secs().try_into().unwrap_or(i64::MAX), tv_nsec: time.subsec_nanos().into() }
}

/// A descriptor that another one makes readable. Linux has one that is both.
#[derive(Debug)]
struct Bell {
    listening: OwnedFd,
    #[cfg(not(target_os = "linux"))]
    ringing: OwnedFd,
}

impl Bell {
    #[cfg(target_os = "linux")]
    fn new() -> std::io::Result<Self> {
        use rustix::event::{EventfdFlags, eventfd};
        Ok(Self { listening: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)? })
    }

    #[cfg(not(target_os = "linux"))]
    fn new() -> std::io::Result<Self> {
        let (listening, ringing) = std::os::unix::net::UnixStream::pair()?;
        listening.set_nonblocking(true)?;
        ringing.set_nonblocking(true)?;
        Ok(Self { listening: listening.into(), ringing: ringing.into() })
    }

    fn ring(&self) {
        #[cfg(target_os = "linux")]
        let ringing = self.listening.as_fd();
        #[cfg(not(target_os = "linux"))]
        let ringing = self.ringing.as_fd();
        // It fails where it is full, and then it is ringing.
        let _ = write(ringing, &1_u64.to_ne_bytes());
    }

    fn hear(&self) {
        let _ = read(&self.listening, &mut [0_u8; 64]);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::thread;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn a_ring_is_heard_whenever_it_comes() {
        let alarm = Arc::new(Alarm::new().unwrap());
        let ringer = {
            let alarm = Arc::clone(&alarm);
            thread::spawn(move || {
                for _ in 0..10_000 {
                    alarm.ring();
                    thread::yield_now();
                }
            })
        };
        let begun = Instant::now();
        let mut seen = 0;
        while seen < 10_000 {
            // As a supervisor does: it takes note of the news, looks around, and sleeps.
            alarm.sleep(seen, None, Instant::now() + LONG);
            seen = alarm.news();
        }
        ringer.join().unwrap();
        assert!(begun.elapsed() < LONG, "a ring was missed");
    }

    #[test]
    fn news_without_a_bell_keeps_from_sleeping_and_does_not_wake() {
        let alarm = Alarm::new().unwrap();
        alarm.stir();
        let begun = Instant::now();
        alarm.sleep(0, None, begun + LONG);
        assert!(begun.elapsed() < LONG);
        assert!(alarm.looks_by(begun + 2 * LONG) && !alarm.looks_by(begun));
        let until = Instant::now() + Duration::from_millis(5);
        alarm.sleep(alarm.news(), None, until);
        assert!(Instant::now() >= until);
    }
}
