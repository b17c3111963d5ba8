//! Supervisors without a claim: given one, let go, or exiting by themselves, in any order.
//!
//! List and assignment are the library's; the supervisor has of the library's only what concerns the two.

use std::sync::Arc;
use std::time::{Duration, Instant};

use loom::thread;

use crate::alarm::Alarm;
use crate::assignment::{AssignmentCell, IdleStep};
use crate::bell::{ModelBell, later, never};
use crate::claim::Claim;
use crate::explore;
use crate::idle::IdleSupervisors;
use crate::key::AdvisoryKey;
use crate::mode::Mode;
use crate::pg::claim::spec::LockSpec;
use crate::status::Span;
use crate::sync::Mutex;

const KEY: AdvisoryKey = AdvisoryKey(1);

#[derive(Debug)]
pub(crate) struct Supervisor {
    assignment: AssignmentCell,
    alarm: Alarm<ModelBell>,
    /// The turn to work on the claim.
    turn: Mutex<()>,
}

impl Supervisor {
    /// One whose first claim has ended.
    fn free() -> Arc<Self> {
        let assignment = AssignmentCell::new(new_claim(), Arc::new(LockSpec));
        assignment.take_up().unwrap();
        assignment.free();
        Arc::new(Self { assignment, alarm: Alarm::new(ModelBell::new()), turn: Mutex::new(()) })
    }

    pub(crate) fn is_free(&self) -> bool {
        self.assignment.is_free()
    }

    pub(crate) fn dismiss(&self) {
        if self.assignment.close_if_free() {
            self.alarm.wake();
        }
    }

    /// What both the supervisor and a caller do with a claim that has come in, in their turn.
    fn serve(&self) {
        if let Some((claim, _)) = self.assignment.take_up() {
            assert!(!claim.is_over(), "it was served before");
            self.assignment.free();
            claim.finish(Ok(()));
        }
    }

    /// Its thread, which exits if it has no claim after a sleep of `until`.
    fn run(&self, idle: &IdleSupervisors, until: Instant) {
        let mut lingered = false;
        loop {
            let orders = {
                let _turn = self.turn.lock();
                self.serve();
                self.assignment.idle_step(lingered)
            };
            match orders {
                IdleStep::TakeUp => {}
                IdleStep::Wait => {
                    self.alarm.sleep(until, None);
                    lingered = until < never();
                }
                IdleStep::Exit | IdleStep::ExitNow => break,
            }
        }
        assert!(self.assignment.close().is_none(), "a claim was given to a thread that exits");
        idle.remove(self);
    }
}

fn new_claim() -> Arc<Claim> {
    Claim::new("key".to_owned(), Mode::Exclusive, Duration::ZERO, Span::UntilReleased, None, None)
}

/// As `PostgresLock::begin`, then a caller's work, then `PostgresLock::forget`.
fn call(idle: &IdleSupervisors) {
    let claim = new_claim();
    while let Some(supervisor) = idle.take(KEY) {
        if supervisor.assignment.assign(&claim, &Arc::new(LockSpec)) {
            {
                let _turn = supervisor.turn.lock();
                supervisor.serve();
            }
            assert!(claim.is_over(), "it was given to one that has exited");
            idle.add(KEY, &supervisor);
            return;
        }
    }
}

#[test]
fn a_claim_is_served_or_turned_away_by_one_that_is_about_to_exit() {
    explore(|| {
        let (idle, supervisor) = (Arc::new(IdleSupervisors::default()), Supervisor::free());
        idle.add(KEY, &supervisor);
        let callers = [(); 2].map(|()| {
            let idle = Arc::clone(&idle);
            thread::spawn(move || call(&idle))
        });
        supervisor.run(&idle, later());
        for caller in callers {
            caller.join().unwrap();
        }
        assert_eq!(idle.len(), 0, "one that has exited is found still");
    });
}

#[test]
fn a_list_that_is_closed_lets_all_go_who_are_on_it_or_come_to_it() {
    explore(|| {
        let (idle, supervisor) = (Arc::new(IdleSupervisors::default()), Supervisor::free());
        let caller = {
            let (idle, supervisor) = (Arc::clone(&idle), Arc::clone(&supervisor));
            thread::spawn(move || {
                idle.add(KEY, &supervisor);
                call(&idle);
            })
        };
        let closer = {
            let idle = Arc::clone(&idle);
            thread::spawn(move || idle.close())
        };
        supervisor.run(&idle, never());
        closer.join().unwrap();
        caller.join().unwrap();
        assert_eq!(idle.len(), 0);
    });
}
