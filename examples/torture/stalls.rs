//! When the machine itself held a thread up, so that what nobody could have done in time is not held against a worker.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::report::{Moment, now};

/// How often a thread wakes up to see whether it does so in time.
const STEP: Duration = Duration::from_millis(10);

/// Shorter ones are within what the referee tolerates.
const SHORTEST: Duration = Duration::from_millis(50);

/// From when to when a thread that had nothing else to do could not run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stall {
    pub(crate) from: Moment,
    pub(crate) to: Moment,
}

/// A thread on each processor that notes the stalls: a virtual processor can stand still while the others run.
pub(crate) struct Watch {
    is_over: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Vec<Stall>>>,
}

impl Watch {
    pub(crate) fn start() -> Self {
        let is_over = Arc::new(AtomicBool::new(false));
        let threads = (0..thread::available_parallelism().map_or(1, usize::from))
            .map(|place| {
                let is_over = Arc::clone(&is_over);
                thread::spawn(move || watch(place, &is_over))
            })
            .collect();
        Self { is_over, threads }
    }

    pub(crate) fn end(self) -> Vec<Stall> {
        self.is_over.store(true, Relaxed);
        self.threads.into_iter().flat_map(|thread| thread.join().unwrap_or_default()).collect()
    }
}

fn watch(place: usize, is_over: &AtomicBool) -> Vec<Stall> {
    stay_on(place);
    let mut stalls = Vec::new();
    while !is_over.load(Relaxed) {
        let (from, begun) = (now(), Instant::now());
        thread::sleep(STEP);
        let late = begun.elapsed().saturating_sub(STEP);
        if late >= SHORTEST {
            stalls.push(Stall { from, to: from + STEP + late });
        }
    }
    stalls
}

/// Keeps this thread on one of the processors that the process may use. Where it cannot be kept, the system chooses.
#[cfg(target_os = "linux")]
fn stay_on(place: usize) {
    use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
    let Ok(allowed) = sched_getaffinity(None) else { return };
    if let Some(processor) = (0..CpuSet::MAX_CPU).filter(|processor| allowed.is_set(*processor)).nth(place) {
        let mut one = CpuSet::new();
        one.set(processor);
        let _ = sched_setaffinity(None, &one);
    }
}

#[cfg(not(target_os = "linux"))]
fn stay_on(_: usize) {}
