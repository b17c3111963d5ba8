//! Who leaves something for the supervisor asks whether it attends, and wakes it if not.

use std::time::{Duration, Instant};

use loom::sync::Arc;
use loom::sync::atomic::AtomicUsize;
use loom::sync::atomic::Ordering::Relaxed;
use loom::thread;

use crate::alarm::{Alarm, Woken};
use crate::bell::{ModelBell, later, never, now};
use crate::explore;

const NO_TIME: Duration = Duration::ZERO;

/// What is left is relaxed: the alarm alone sees to it that the supervisor sees it. Three times, since the bell that the
/// first one rings may be silenced late, and with it that of the second.
#[test]
fn what_is_left_for_the_supervisor_is_seen() {
    for waits in [[vec![now(), now()], vec![now()]], [vec![now(), later()], vec![later()]]] {
        explore(move || {
            let alarm = Arc::new(Alarm::new(ModelBell::new()));
            let left = Arc::new(AtomicUsize::new(0));
            let callers = waits.clone().map(|waits| {
                let (alarm, left) = (Arc::clone(&alarm), Arc::clone(&left));
                thread::spawn(move || {
                    for by in waits {
                        left.fetch_add(1, Relaxed);
                        if !alarm.attends(by, None, NO_TIME) {
                            alarm.wake();
                        }
                    }
                })
            });
            // The first sleep ends by time, the others by a call only.
            let mut until = later();
            while left.load(Relaxed) < 3 {
                alarm.sleep(until, None);
                until = never();
            }
            callers.into_iter().for_each(|caller| caller.join().unwrap());
        });
    }
}

/// The session changes while the supervisor sleeps, and then the new one ends.
#[test]
fn the_end_of_a_session_is_seen_that_another_thread_has_opened() {
    explore(|| {
        let bell = std::sync::Arc::new(ModelBell::new());
        let alarm = Arc::new(Alarm::new(std::sync::Arc::clone(&bell)));
        let socket = Arc::new(AtomicUsize::new(0));
        let caller = {
            let (alarm, socket) = (Arc::clone(&alarm), Arc::clone(&socket));
            thread::spawn(move || {
                socket.store(1, Relaxed);
                if !alarm.attends(never(), Some(&1), NO_TIME) {
                    alarm.wake();
                }
            })
        };
        let server = thread::spawn(move || bell.hang_up(1));
        loop {
            let watched = socket.load(Relaxed);
            if alarm.sleep(never(), Some(&watched)) == Woken::Readable {
                assert_eq!(watched, 1);
                break;
            }
        }
        caller.join().unwrap();
        server.join().unwrap();
    });
}

#[test]
fn one_that_is_awake_or_sleeps_for_too_long_attends_to_nothing() {
    explore(|| {
        let alarm = Arc::new(Alarm::new(ModelBell::new()));
        let sleeper = {
            let alarm = Arc::clone(&alarm);
            thread::spawn(move || alarm.sleep(never(), Some(&0)))
        };
        assert!(!alarm.attends(later(), None, NO_TIME), "it sleeps for longer");
        assert!(!alarm.attends(never(), Some(&1), NO_TIME), "it watches another socket");
        alarm.wake();
        assert_eq!(sleeper.join().unwrap(), Woken::Called);
        assert!(!alarm.attends(never(), None, NO_TIME), "it is awake");
    });
}
