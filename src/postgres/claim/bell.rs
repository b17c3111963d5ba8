//! The bell of a supervisor or of a carrier's thread: a descriptor that other threads make readable, and `poll(2)`.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{read, write};

use crate::pg::claim::alarm::{Bell, Heard};
use crate::pg::stream::Socket;

/// A descriptor that other threads make readable: an `eventfd` on Linux, elsewhere one end of a pair of sockets.
#[derive(Debug)]
pub(crate) struct PollBell {
    listening: OwnedFd,
    #[cfg(not(target_os = "linux"))]
    ringing: OwnedFd,
}

impl PollBell {
    /// # Errors
    /// When the process has no file descriptor left.
    #[cfg(target_os = "linux")]
    pub(crate) fn new() -> std::io::Result<Self> {
        use rustix::event::{EventfdFlags, eventfd};
        Ok(Self { listening: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)? })
    }

    /// # Errors
    /// When the process has no file descriptor left.
    #[cfg(not(target_os = "linux"))]
    pub(crate) fn new() -> std::io::Result<Self> {
        let (listening, ringing) = std::os::unix::net::UnixStream::pair()?;
        listening.set_nonblocking(true)?;
        ringing.set_nonblocking(true)?;
        Ok(Self { listening: listening.into(), ringing: ringing.into() })
    }
}

impl Bell for PollBell {
    type Socket = Socket;

    fn is_same(watched: &Socket, socket: &Socket) -> bool {
        watched.is(socket)
    }

    fn ring(&self) {
        #[cfg(target_os = "linux")]
        let ringing = self.listening.as_fd();
        #[cfg(not(target_os = "linux"))]
        let ringing = self.ringing.as_fd();
        // It fails only if it is full, and then the bell rings already.
        let _ = write(ringing, &1_u64.to_ne_bytes());
    }

    fn wait(&self, until: Instant, watch: Option<&Socket>) -> Heard {
        let timeout = timespec(until.saturating_duration_since(Instant::now()));
        let mut fds = Vec::with_capacity(2);
        fds.push(PollFd::new(&self.listening, PollFlags::IN));
        fds.extend(watch.map(|socket| PollFd::new(socket, PollFlags::IN)));
        // A signal may interrupt it: the caller then looks, and sleeps again.
        let _ = poll(&mut fds, Some(&timeout));
        let [rung, readable] = [0, 1].map(|index| fds.get(index).is_some_and(|fd| !fd.revents().is_empty()));
        Heard { rung, readable }
    }

    fn silence(&self) {
        let _ = read(&self.listening, &mut [0_u8; 64]);
    }
}

fn timespec(time: Duration) -> Timespec {
    Timespec { tv_sec: time.as_secs().try_into().unwrap_or(i64::MAX), tv_nsec: time.subsec_nanos().into() }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicU64;
    use std::sync::atomic::Ordering::SeqCst;
    use std::thread;

    use super::*;
    use crate::pg::claim::alarm::{Alarm, Woken};

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn a_call_is_heard_whenever_it_comes() {
        const CALLS: u64 = 10_000;
        let (alarm, said) = (Arc::new(Alarm::new(PollBell::new().unwrap())), Arc::new(AtomicU64::new(0)));
        let caller = {
            let (alarm, said) = (Arc::clone(&alarm), Arc::clone(&said));
            thread::spawn(move || {
                for _ in 0..CALLS {
                    said.fetch_add(1, SeqCst);
                    if !alarm.attends(Instant::now(), None, Duration::ZERO) {
                        alarm.wake();
                    }
                    thread::yield_now();
                }
            })
        };
        let begun = Instant::now();
        // As a supervisor does: it looks around, and sleeps.
        while said.load(SeqCst) < CALLS {
            alarm.sleep(Instant::now() + LONG, None);
        }
        caller.join().unwrap();
        assert!(begun.elapsed() < LONG, "a call was missed");
    }

    #[test]
    fn one_that_is_awake_attends_to_nothing() {
        let alarm = Arc::new(Alarm::new(PollBell::new().unwrap()));
        assert!(!alarm.attends(Instant::now() + LONG, None, LONG));
        let sleeper = {
            let alarm = Arc::clone(&alarm);
            thread::spawn(move || alarm.sleep(Instant::now() + LONG, None))
        };
        let begun = Instant::now();
        while !alarm.attends(begun + 2 * LONG, None, Duration::ZERO) {
            assert!(begun.elapsed() < LONG);
            thread::yield_now();
        }
        assert!(!alarm.attends(begun, None, Duration::ZERO));
        alarm.wake();
        assert_eq!(sleeper.join().unwrap(), Woken::Called);
        assert!(begun.elapsed() < LONG);
    }
}
