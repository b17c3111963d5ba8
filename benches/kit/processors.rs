//! On which processors a bench runs.
//!
//! A round trip that changes processors costs what it costs to wake an idle one, and whether it changes is the choice of
//! the system's scheduler. On a virtual machine that can double the time of a pair. So what takes microseconds is compared
//! on one processor.

use std::num::NonZero;
use std::thread;

/// Where something was measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    OneProcessor,
    AllProcessors,
}

impl Place {
    /// The name of a row. What is measured on one processor is the rule where a bench measures on both.
    pub(crate) fn name(self, what: &str) -> String {
        match self {
            Self::OneProcessor => what.to_owned(),
            Self::AllProcessors => format!("{what}, on all processors"),
        }
    }

    /// For the headings of a bench.
    pub(crate) fn heading(self, what: &str) -> String {
        match self {
            Self::OneProcessor => format!("{what}, all on one processor"),
            Self::AllProcessors => self.name(what),
        }
    }
}

/// Whether this process may use more than one processor.
pub(crate) fn are_several() -> bool {
    thread::available_parallelism().is_ok_and(|count| count > NonZero::<usize>::MIN)
}

/// Runs `measure` on one processor, together with all threads and processes that it starts, since they inherit it. Nothing
/// that it uses may have been started before. `false`, and nothing was run, where the system has no such choice.
///
/// This thread stays as it is, and so does what it starts later.
pub(crate) fn on_one(measure: impl FnOnce() + Send) -> bool {
    if !are_several() {
        println!("There is one processor only, on which all was measured.");
        measure();
        return true;
    }
    thread::scope(|scope| {
        let bound = scope.spawn(|| {
            let bound = bind();
            if let Some(processor) = bound {
                println!("Bound to processor {processor}, with all that is started from here.");
                measure();
            } else {
                println!("A thread cannot be bound to a processor here: all processors are in use.");
            }
            bound.is_some()
        });
        bound.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Binds this thread to the last of the processors that it may use: the first one serves most interrupts.
#[cfg(target_os = "linux")]
fn bind() -> Option<usize> {
    use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
    let allowed = sched_getaffinity(None).ok()?;
    let last = (0..CpuSet::MAX_CPU).rev().find(|&processor| allowed.is_set(processor))?;
    let mut one = CpuSet::new();
    one.set(last);
    sched_setaffinity(None, &one).ok()?;
    Some(last)
}

#[cfg(not(target_os = "linux"))]
fn bind() -> Option<usize> {
    None
}
