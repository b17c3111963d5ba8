//! What an observer is told, while one thread notes and tells and another does so too.

use std::sync::Arc as StdArc;
use std::time::{Duration, Instant};

use loom::sync::{Arc, Mutex};
use loom::thread;

use crate::explore;
use crate::loss::LossReason;
use crate::observer::{Acquired, Heartbeat, Observer, TermLost};
use crate::telling::{Observing, Story};

/// Loom may change threads where it takes the mutex: between the moment that an event is taken and the one that it is told.
#[derive(Debug, Default)]
struct Listener(Mutex<Vec<&'static str>>);

impl Observer for Listener {
    fn acquired(&self, _: &Acquired<'_>) {
        self.0.lock().unwrap().push("acquired");
    }

    fn heartbeat(&self, _: &Heartbeat<'_>) {
        self.0.lock().unwrap().push("heartbeat");
    }

    fn lost(&self, _: &TermLost<'_>) {
        self.0.lock().unwrap().push("lost");
    }
}

/// The thread that runs the engine notes and tells. The watchdog only notes a loss, which whoever comes next tells.
#[test]
fn all_is_told_once_and_in_its_order_whoever_tells() {
    explore(|| {
        let listener = StdArc::new(Listener::default());
        let observing = Observing::new(StdArc::new(StdArc::clone(&listener)));
        let story = Arc::new(Story::new(&observing, "key", false, false, Instant::now()));
        story.acquired(None, None);
        let watchdog = {
            let story = Arc::clone(&story);
            thread::spawn(move || story.lost(LossReason::LeaseNotRenewed))
        };
        let releasing = {
            let story = Arc::clone(&story);
            thread::spawn(move || story.tell())
        };
        story.heartbeat(Duration::ZERO);
        // Twice, of which one has an effect.
        story.lost(LossReason::HeartbeatTimedOut);
        story.tell();
        releasing.join().unwrap();
        watchdog.join().unwrap();
        story.tell();
        let told = listener.0.lock().unwrap().clone();
        let possible = [["acquired", "heartbeat", "lost"], ["acquired", "lost", "heartbeat"]];
        assert!(possible.iter().any(|possible| told == possible), "{told:?}");
    });
}

/// Whoever notes something and tells finds it told, or being told, when the thread returns that was at it.
#[test]
fn what_is_noted_while_another_thread_tells_is_not_left_untold() {
    explore(|| {
        let listener = StdArc::new(Listener::default());
        let observing = Observing::new(StdArc::new(StdArc::clone(&listener)));
        let story = Arc::new(Story::new(&observing, "key", false, false, Instant::now()));
        story.acquired(None, None);
        let other = {
            let story = Arc::clone(&story);
            thread::spawn(move || {
                story.lost(LossReason::Terminated);
                story.tell();
            })
        };
        story.tell();
        other.join().unwrap();
        assert_eq!(*listener.0.lock().unwrap(), ["acquired", "lost"]);
    });
}
