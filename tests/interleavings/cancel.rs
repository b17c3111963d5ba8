//! A thread that works on a claim is interrupted when its context is cancelled, or the claim ends, whenever that comes.

use std::sync::{Arc, Weak};
use std::time::Duration;

use loom::thread;

use crate::alarm::Alarm;
use crate::bell::{ModelBell, never, now};
use crate::cancellation::{Child, Node, OnCancel};
use crate::claim::Claim;
use crate::explore;
use crate::interrupt::LeaveRequest;
use crate::mode::Mode;
use crate::pg::stream::StreamControl;
use crate::status::{EndReason, Span};
use crate::sync::{AtomicBool, Ordering::SeqCst};

fn new_claim() -> Arc<Claim> {
    Claim::new("key".to_owned(), Mode::Exclusive, Duration::ZERO, Span::UntilReleased, None, None)
}

/// The caller as in `Supervisor::run_engine`, the supervisor as in `Supervisor::leave_to_other`.
#[test]
fn a_cancelled_caller_does_not_begin_or_is_made_to_leave() {
    explore(|| {
        let (claim, alarm) = (new_claim(), Arc::new(Alarm::new(ModelBell::new())));
        let (context, has_left) = (Node::new(None), Arc::new(AtomicBool::new(false)));
        let caller = {
            let (claim, alarm, context) = (Arc::clone(&claim), Arc::clone(&alarm), Arc::clone(&context));
            let has_left = Arc::clone(&has_left);
            thread::spawn(move || {
                let request = {
                    let alarm = Arc::clone(&alarm);
                    LeaveRequest::new(move || alarm.wake())
                };
                context.adopt(Child::Hook(Arc::downgrade(&request) as Weak<dyn OnCancel>));
                claim.set_caller(Some(Arc::clone(&request)));
                if !request.is_made() {
                    let stream = StreamControl::new();
                    claim.announce_connecting(stream.clone());
                    stream.read();
                    claim.announce_no_session();
                }
                claim.set_caller(None);
                has_left.store(true, SeqCst);
                alarm.wake();
            })
        };
        let canceller = thread::spawn(move || context.cancel());
        while !has_left.load(SeqCst) {
            // Again and again: the caller may have looked before, and begin now.
            if claim.make_caller_leave(Duration::MAX, now()) {
                thread::yield_now();
            } else {
                alarm.sleep(never(), None);
            }
        }
        caller.join().unwrap();
        canceller.join().unwrap();
    });
}

/// Whoever ends the claim interrupts, and whoever works on it says by what it can be interrupted and then looks.
#[test]
fn a_claim_that_ends_interrupts_whoever_works_on_it() {
    explore(|| {
        let claim = new_claim();
        let worker = {
            let claim = Arc::clone(&claim);
            thread::spawn(move || {
                let stream = StreamControl::new();
                if claim.announce_connecting(stream.clone()) {
                    stream.read();
                }
                claim.announce_no_session();
                claim.finish(Ok(()));
            })
        };
        assert!(claim.end(EndReason::Released, now()));
        claim.interrupt(now());
        worker.join().unwrap();
        assert!(claim.is_over());
    });
}
