//! The turn to run the engine goes from thread to thread, and no work is left lying while all sleep.
//!
//! [`Turns`] is the library's; what callers and supervisor do in their turn is `Supervisor::run_engine` and
//! `Supervisor::look` with everything left out but who does what. There is no nap here, which in the library would make up
//! for a call that was missed, up to half a second late.

use std::time::{Duration, Instant};

use loom::sync::{Arc, Mutex};
use loom::thread;

use crate::bell::{ModelBell, later, never, now};
use crate::explore;
use crate::turns::Turns;

/// What a caller comes for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Errand {
    /// Work that it may do itself, if it has the turn.
    Own,
    /// Work for the supervisor, which must look by then.
    Leaves { by: Instant },
    /// Its claim is over; that of another one may have come in.
    Stale,
}

struct World {
    turns: Turns<Runner, ModelBell>,
    /// By the numbers of the callers.
    assigned: Mutex<Vec<(usize, Errand)>>,
    /// How many callers leave work.
    expected: usize,
}

#[derive(Default)]
struct Runner {
    work: Vec<(usize, Errand)>,
    done: usize,
}

impl World {
    fn take_up(&self, runner: &mut Runner) {
        runner.work.append(&mut self.assigned.lock().unwrap());
    }

    fn call(&self, number: usize, errand: Errand) {
        if errand != Errand::Stale {
            self.assigned.lock().unwrap().push((number, errand));
        }
        // In the library it now waits for its claim to change.
        let Some(mut runner) = self.turns.take() else { return };
        self.take_up(&mut runner);
        if errand == Errand::Own {
            let others = runner.work.len();
            runner.work.retain(|(whose, _)| *whose != number);
            runner.done += others - runner.work.len();
        }
        let look_by = match (errand, &*runner.work) {
            (_, []) => None,
            (Errand::Leaves { by }, [(whose, _)]) if *whose == number => Some(by),
            // What is another caller's, the supervisor may have come for meanwhile.
            _ => Some(now()),
        };
        let all_done = runner.done == self.expected;
        self.turns.leave(runner, look_by, None, Duration::ZERO);
        if all_done {
            self.turns.wake();
        }
    }

    fn supervise(&self) {
        // The first sleep ends by time, the others by a call only.
        let mut until = later();
        loop {
            if let Some(mut runner) = self.turns.take_to_look() {
                self.take_up(&mut runner);
                runner.done += std::mem::take(&mut runner.work).len();
                if runner.done == self.expected {
                    return;
                }
            }
            self.turns.sleep(until, None);
            until = never();
        }
    }
}

#[test]
fn work_is_done_by_whoever_has_the_turn_next() {
    let leaves = |by| Errand::Leaves { by };
    for errands in [
        [Errand::Own, Errand::Own],
        [Errand::Own, leaves(now())],
        [Errand::Own, Errand::Stale],
        [leaves(later()), Errand::Stale],
    ] {
        explore(move || {
            let world = Arc::new(World {
                turns: Turns::new(Runner::default(), ModelBell::new()),
                assigned: Mutex::default(),
                expected: errands.iter().filter(|errand| **errand != Errand::Stale).count(),
            });
            let mut number = 0;
            let callers = errands.map(|errand| {
                number += 1;
                let world = Arc::clone(&world);
                thread::spawn(move || world.call(number, errand))
            });
            world.supervise();
            callers.into_iter().for_each(|caller| caller.join().unwrap());
        });
    }
}
