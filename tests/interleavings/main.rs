//! All interleavings of threads that share something, by loom. The files are the library's own, with loom's mutexes and atomics
//! in the place of the real ones.
//!
//! Loom interrupts each run twice at the most. A wake-up that is missed is a sleep that nothing ends, which loom reports as a deadlock.

#![allow(dead_code, unused_imports, unreachable_pub, reason = "the files are used in part")]
#![allow(clippy::unwrap_used, reason = "all of it is a test")]

#[path = "../../src/postgres/claim/alarm.rs"]
mod alarm;
#[path = "../../src/postgres/claim/announce.rs"]
mod announce;
#[path = "../../src/postgres/claim/assignment.rs"]
mod assignment;
mod bell;
mod cancel;
#[path = "../../src/cancellation.rs"]
mod cancellation;
#[path = "../../src/postgres/claim/claim.rs"]
mod claim;
#[path = "../../src/clock.rs"]
mod clock;
#[path = "../../src/error.rs"]
mod error;
#[path = "../../src/expiry.rs"]
mod expiry;
mod hand_over;
#[path = "../../src/postgres/claim/idle.rs"]
mod idle;
mod idle_list;
#[path = "../../src/postgres/claim/interrupt.rs"]
mod interrupt;
#[path = "../../src/loss.rs"]
mod loss;
#[path = "../../src/mode.rs"]
mod mode;
#[path = "../../src/observer.rs"]
mod observer;
#[path = "../../src/snapshot.rs"]
mod snapshot;
mod stand_in;
#[path = "../../src/postgres/claim/status.rs"]
mod status;
mod sync;
#[path = "../../src/telling.rs"]
mod telling;
mod telling_in_order;
mod term_end;
#[path = "../../src/postgres/claim/turns.rs"]
mod turns;
mod wake_up;

/// Where the library has its files, and what of the library is not tried here.
mod pg {
    pub(crate) use crate::stand_in::{session, stream};

    pub(crate) mod claim {
        pub(crate) use crate::idle_list as supervisor;
        pub(crate) use crate::stand_in::spec;
        pub(crate) use crate::{alarm, assignment, claim, idle, interrupt, status};
    }
}
pub(crate) use stand_in::{context, key, term};

/// Runs `model` in all orders in which its threads can, with at most two interruptions that no wait calls for.
fn explore(model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound.get_or_insert(2);
    builder.check(model);
}
