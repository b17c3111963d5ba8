//! What a process is told that has no file descriptor left, and that it keeps what it has.
//!
//! One test only, since the limit is the whole process's.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::panic;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::{is_held, lock, soon, started};
use dsync::{Config, Context, Error, ErrorKind};
use support::{Database, process};

/// Whether it tells what there are too few of.
fn names_files(error: &str) -> bool {
    error.contains("open files") || error.contains("descriptor")
}

#[test]
fn at_the_limit_of_open_files_an_error_says_so_and_what_is_held_stays_held() {
    // With `panic = "abort"` the first of them would end the process, caught or not.
    static PANICS: AtomicUsize = AtomicUsize::new(0);
    let usual = panic::take_hook();
    panic::set_hook(Box::new(move |panic| {
        PANICS.fetch_add(1, Ordering::SeqCst);
        usual(panic);
    }));
    let database = Database::fresh().unwrap();
    let manager = started(Config::from_url(&database.url()).unwrap());
    let mut held = vec![lock(&manager, "first")];
    held[0].lock(&soon()).unwrap();
    let mut told = Vec::new();
    // A lock needs five at the end, and some more on the way: each of them is the one that cannot be had.
    for spare in 0..9 {
        // What is held keeps its session and its supervisor, so each lock needs new ones.
        let another = lock(&manager, &format!("{spare} to spare"));
        let open = process::descriptors(process::own()).expect("this system tells of open files");
        process::limit_descriptors(open + spare);
        let attempt = || another.lock(&Context::timeout(Duration::from_millis(300)));
        // In so short a time a busy machine may not have come to what fails.
        let is_untold = |outcome: &Result<(), Error>| {
            outcome
                .as_ref()
                .is_err_and(|error| error.kind() == ErrorKind::TimedOut && !names_files(&error.to_string()))
        };
        let begun = Instant::now();
        let mut outcome = attempt();
        while is_untold(&outcome) && begun.elapsed() < Duration::from_secs(10) {
            outcome = attempt();
        }
        process::raise_descriptor_limit();
        if let Err(error) = outcome {
            let kind = error.kind();
            assert!(matches!(kind, ErrorKind::SessionUnavailable | ErrorKind::TimedOut), "{error}");
            told.push((spare, error.to_string()));
        }
        // When there is room again, nothing stands in the way.
        another.lock(&soon()).unwrap();
        held.push(another);
        assert!(held.iter().all(is_held), "{spare} to spare");
    }
    println!("{told:#?}");
    for (spare, error) in &told {
        assert!(names_files(error), "{spare} to spare: {error}");
    }
    assert!(told.len() >= 4, "{told:#?}");
    assert_eq!(PANICS.load(Ordering::SeqCst), 0, "neither the library nor the driver panics");
}
