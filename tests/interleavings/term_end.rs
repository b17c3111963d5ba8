//! The end of a term by its time, and its renewal.

use loom::sync::Arc;
use loom::thread;

use crate::expiry::End;

#[test]
fn a_term_that_was_seen_as_over_never_comes_back() {
    loom::model(|| {
        let end = Arc::new(End::new(10));
        let renewing = {
            let end = Arc::clone(&end);
            thread::spawn(move || end.move_to(20))
        };
        let looking = {
            let end = Arc::clone(&end);
            // Two looks, the second at an earlier time than the renewed end.
            thread::spawn(move || (end.has_passed(12), end.has_passed(13)))
        };
        let (first, second) = looking.join().unwrap();
        let renewed = renewing.join().unwrap();
        assert!(!first || second, "over, and then not");
        assert!(!(first && renewed), "the renewal was taken for good by one, and the end by the other");
        assert_eq!(end.has_passed(14), first || second);
        assert_eq!(renewed, !end.has_passed(15));
    });
}

#[test]
fn a_term_ends_once_for_all_who_look() {
    loom::model(|| {
        let end = Arc::new(End::new(10));
        let others: Vec<_> = [9, 11]
            .map(|now| {
                let end = Arc::clone(&end);
                thread::spawn(move || end.has_passed(now))
            })
            .into_iter()
            .collect();
        let renewed = end.move_to(30);
        let seen = others.into_iter().map(|other| other.join().unwrap()).fold(false, |any, one| any | one);
        assert_eq!(renewed, !seen);
        assert_eq!(end.at(), renewed.then_some(30));
    });
}
