//! Makes sure that the driver finds the file descriptors which it takes for granted.
//!
//! It unwraps the making of its runtime, which fails at the limit of open files: that would be a panic, and the end of
//! a process built with `panic = "abort"`.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use parking_lot::Mutex;
use tokio::runtime;

use crate::process::PerProcess;

/// Descriptors beyond those of a runtime that must be free: the driver's own socket, that of the session, and one that
/// another thread of the application may take at this moment.
const SPARE: usize = 3;

/// After this time a thread goes on all the same. The driver takes microseconds to make its runtime.
const LONGEST: Duration = Duration::from_secs(1);

/// Who has the turn to make a runtime.
struct RuntimeTurns {
    /// Until when a thread has it; `None` if nobody has it.
    taken_until: Mutex<Option<Instant>>,
    /// A message for one that waits, each time that the turn is given back.
    freed: (Sender<()>, Receiver<()>),
}

fn turns() -> &'static RuntimeTurns {
    static TURNS: PerProcess<RuntimeTurns> = PerProcess::new();
    TURNS.get(|_| RuntimeTurns { taken_until: Mutex::default(), freed: bounded(1) })
}

/// The right to let the driver make a runtime. One thread of the process has it at a time, or else several would each
/// find the same descriptors free. Given back when dropped.
#[derive(Debug)]
pub(super) struct Turn(Instant);

/// Waits for the turn, for 1 s at the most and not beyond `by`, and looks whether there are descriptors for a runtime and [`SPARE`] more.
///
/// `any` is an open file to make duplicates of.
///
/// # Errors
/// That of the operating system if a descriptor cannot be had.
pub(super) fn reserve(any: impl AsFd, by: Instant) -> io::Result<Turn> {
    let turn = Turn::take(by);
    let spare: Vec<OwnedFd> =
        (0..SPARE).map(|_| any.as_fd().try_clone_to_owned()).collect::<io::Result<_>>()?;
    // In the background, since a plain drop panics on a thread that drives another runtime.
    runtime::Builder::new_current_thread().enable_all().build()?.shutdown_background();
    drop(spare);
    Ok(turn)
}

impl Turn {
    fn take(by: Instant) -> Self {
        let turns = turns();
        let by = by.min(Instant::now() + LONGEST);
        loop {
            let mut taken_until = turns.taken_until.lock();
            let now = Instant::now();
            match *taken_until {
                Some(until) if now < until.min(by) => {
                    drop(taken_until);
                    let _ = turns.freed.1.recv_deadline(until.min(by));
                }
                _ => {
                    let until = now + LONGEST;
                    *taken_until = Some(until);
                    return Self(until);
                }
            }
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let turns = turns();
        let mut taken_until = turns.taken_until.lock();
        // Whoever came too late to give it back leaves the next one's alone.
        if *taken_until == Some(self.0) {
            *taken_until = None;
            // Full: the message of before will do.
            let _ = turns.freed.0.try_send(());
        }
    }
}
