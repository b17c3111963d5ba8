//! The signals that this process gets. They are blocked, and a thread takes them one by one: so none has a handler, and the command
//! inherits each as it was, when it has been unblocked again.

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::thread;

use nix::sys::signal::{SigSet, Signal, raise};

/// Those that are passed on to the command, and end it.
pub(super) const ENDING: [Signal; 4] = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT];
/// Those that are passed on, and mean what the command takes them for.
pub(super) const OTHERS: [Signal; 2] = [Signal::SIGUSR1, Signal::SIGUSR2];

pub(super) struct Signals {
    numbers: UnixStream,
    /// Those that were not blocked before.
    blocked: SigSet,
}

impl Signals {
    /// Takes signals from now on. Threads and processes that were started before get them in the usual way, so call it first.
    ///
    /// Those that are ignored, by `nohup` say, stay so.
    pub(super) fn take() -> io::Result<Self> {
        let ignored = ignored();
        let mut wanted = SigSet::empty();
        let heeded = [Signal::SIGTSTP, Signal::SIGCONT].into_iter().chain(ENDING).chain(OTHERS);
        heeded.filter(|&signal| !ignored.contains(signal)).for_each(|signal| wanted.add(signal));
        wanted.add(Signal::SIGCHLD);
        // Whoever gives the terminal away without having it gets this one.
        wanted.add(Signal::SIGTTOU);
        let blocked_before = SigSet::thread_get_mask()?;
        let mut blocked = SigSet::empty();
        wanted
            .iter()
            .filter(|&signal| !blocked_before.contains(signal))
            .for_each(|signal| blocked.add(signal));
        wanted.thread_block()?;
        let (mut tell, numbers) = UnixStream::pair()?;
        numbers.set_nonblocking(true)?;
        thread::Builder::new().name("signals".to_owned()).spawn(move || {
            while let Ok(signal) = wanted.wait() {
                let number = u8::try_from(signal as i32).unwrap_or_default();
                if tell.write_all(&[number]).is_err() {
                    return;
                }
            }
        })?;
        Ok(Self { numbers, blocked })
    }

    /// The numbers of the signals that a process must let through again that this one starts, for [`let_through`].
    pub(super) fn blocked(&self) -> String {
        let numbers: Vec<_> = self.blocked.iter().map(|signal| (signal as i32).to_string()).collect();
        numbers.join(",")
    }

    /// Those that have come.
    pub(super) fn come(&mut self) -> Vec<Signal> {
        let mut numbers = [0; 64];
        let count = self.numbers.read(&mut numbers).unwrap_or(0);
        numbers[..count].iter().filter_map(|&number| Signal::try_from(i32::from(number)).ok()).collect()
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.numbers.as_fd()
    }
}

/// Lets a signal have its usual effect on this process: it ends, or it stands still until it is continued.
pub(super) fn suffer(signal: Signal) {
    let set = SigSet::from(signal);
    // Sent to this thread, so that the one that takes signals does not take it.
    if raise(signal).is_ok() && set.thread_unblock().is_ok() {
        let _ = set.thread_block();
    }
}

/// Unblocks these signals, which were blocked when this process was started.
pub(super) fn let_through(numbers: &str) {
    let mut set = SigSet::empty();
    let numbers = numbers.split(',').filter_map(|number| number.parse::<i32>().ok());
    numbers.filter_map(|number| Signal::try_from(number).ok()).for_each(|signal| set.add(signal));
    let _ = set.thread_unblock();
}

/// The signals that have been ignored since this process was started, as Linux tells them.
/// <https://man7.org/linux/man-pages/man5/proc_pid_status.5.html>
fn ignored() -> SigSet {
    let mut ignored = SigSet::empty();
    // The name in it may be cut in the midst of a character.
    let status = fs::read("/proc/self/status").unwrap_or_default();
    let status = String::from_utf8_lossy(&status);
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    for signal in Signal::iterator().filter(|&signal| mask >> (signal as i32 - 1) & 1 == 1) {
        ignored.add(signal);
    }
    ignored
}

/// True if ended children vanish by themselves, so that nobody learns their exit code.
pub(super) fn exit_codes_are_lost() -> bool {
    ignored().contains(Signal::SIGCHLD)
}
