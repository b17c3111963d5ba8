//! What is explored, and which flaws are found.

use std::time::Instant;

use super::*;

fn explored(model: Model) -> Tally {
    let begun = Instant::now();
    let tally = model.explore().unwrap_or_else(|violation| panic!("{violation:?}"));
    let Model { horizon, faults, claims, fences, callers, .. } = model;
    println!(
        "model, {faults} faults, {claims:?} claims, {horizon} ticks, {fences} fences, {callers} callers: {tally}; {:.1?}",
        begun.elapsed()
    );
    tally
}

/// The promise that is found broken.
fn broken(model: Model) -> String {
    let begun = Instant::now();
    match model.explore() {
        Ok(tally) => panic!("nothing found: {tally}"),
        Err(violation) => {
            println!("model, {:?}, {:.1?}: {violation:?}", model.flaw, begun.elapsed());
            violation.promise
        }
    }
}

#[test]
fn two_claims_keep_every_promise_whatever_goes_wrong() {
    let tally = explored(Model::new());
    assert!(tally.states > 50_000, "{tally}");
    assert!(tally.terms > 0 && tally.losses > 0 && tally.freezes > 0, "{tally}");
    assert_eq!(tally.faults.len(), 8, "{tally}");
    assert!(tally.ends.contains_key("Released") && tally.ends.contains_key("Unconfirmed"), "{tally}");
}

#[test]
fn two_claims_keep_every_promise_when_they_come_again() {
    explored(Model { faults: 0, claims: [2, 2], ..Model::new() });
}

#[test]
fn a_term_that_outlives_the_lease_is_found() {
    let sound = Model::new();
    let timing = Timing { term: tick(LEASE + 1), ..sound.timing };
    assert!(broken(Model { timing, ..sound }).contains("believes to hold the lock, and does not"));
}

#[test]
fn a_term_counted_from_the_answer_is_found() {
    let flawed = Model::new().with(Flaw::TermFromAnswer);
    assert!(broken(flawed).contains("believes to hold the lock, and does not"));
}

#[test]
fn a_loss_that_is_kept_quiet_is_found() {
    assert!(broken(Model::new().with(Flaw::LossKeptQuiet)).contains("believes to hold the lock"));
}

#[test]
fn a_session_that_is_not_settled_is_found() {
    let flawed = Model::new().with(Flaw::SettleSkipped);
    assert!(broken(flawed).contains("went back to the pool with the lock or the lease"));
}

#[test]
fn a_session_that_is_not_closed_is_found() {
    let flawed = Model::new().with(Flaw::CloseSkipped);
    assert!(broken(flawed).contains("went back to the pool with the lock or the lease"));
}

#[test]
fn a_release_that_is_not_heard_is_found() {
    assert!(broken(Model::new().with(Flaw::Deaf)).contains("does not come to an end"));
}

#[test]
fn a_word_of_the_server_that_is_taken_for_the_end_of_the_session_is_found() {
    let flawed = Model::new().with(Flaw::WordTrusted);
    assert!(broken(flawed).contains("released, while the server holds something"));
}

#[test]
fn an_uncertainty_that_forgets_the_slice_of_a_lost_waiter_is_found() {
    let flawed = Model { uncertainty_window: tick(LEASE), ..Model::new() };
    assert!(broken(flawed).contains("released, while the server holds something"));
}

#[test]
#[ignore = "takes a minute: cargo test --release --lib model -- --ignored --nocapture"]
fn an_uncertainty_that_forgets_the_wait_for_a_fenced_transaction_is_found() {
    let window = tick(LEASE + SLICE - 1);
    let flawed = Model { uncertainty_window: window, fences: 1, horizon: LEASE + 1, ..Model::new() };
    assert!(broken(flawed).contains("released, while the server holds something"));
}

#[test]
fn fenced_transactions_end_before_a_later_term_begins() {
    let tally = explored(Model { fences: 1, faults: 0, horizon: LEASE + 1, ..Model::new() });
    assert!(tally.fences.iter().all(|count| *count > 0) && tally.fence_waits > 0, "{tally}");
    explored(Model { fences: 1, horizon: 0, ..Model::new() });
}

#[test]
fn a_row_that_is_written_after_the_grant_is_found() {
    let flawed = Model { fences: 1, faults: 0, ..Model::new() }.with(Flaw::RowWrittenLater);
    assert!(broken(flawed).contains("after a later term had begun"));
}

#[test]
fn a_term_that_does_not_wait_for_a_fenced_transaction_is_found() {
    let flawed = Model { fences: 1, faults: 0, ..Model::new() }.with(Flaw::GateIgnored);
    assert!(broken(flawed).contains("began while a fenced transaction was open"));
}

#[test]
fn a_fence_that_does_not_look_at_its_term_last_is_found() {
    let flawed =
        Model { fences: 1, faults: 0, horizon: LEASE + 1, ..Model::new() }.with(Flaw::FenceLooksOnce);
    assert!(broken(flawed).contains("let through after a later term had begun"));
}

/// One process by itself, in which a caller works too.
fn alone() -> Model {
    Model { callers: 1, claims: [2, 0], horizon: 2, ..Model::new() }
}

#[test]
fn two_workers_on_a_claim_keep_every_promise() {
    let tally = explored(alone());
    assert!(tally.left > 0 && tally.given_up.iter().all(|count| *count > 0), "{tally}");
}

#[test]
fn two_workers_beside_another_claim_keep_every_promise() {
    let tally = explored(Model { callers: 1, horizon: 1, only_freezes: true, ..Model::new() });
    assert!(tally.left > 0 && tally.given_up.iter().all(|count| *count > 0), "{tally}");
}

#[test]
#[ignore = "takes minutes and gigabytes: cargo test --release --lib model -- --ignored --nocapture"]
fn two_claims_keep_every_promise_in_a_larger_world() {
    explored(Model { horizon: 7, ..Model::new() });
    explored(Model { horizon: 2, claims: [2, 2], ..Model::new() });
    explored(Model { horizon: 1, faults: 2, ..Model::new() });
}

#[test]
#[ignore = "takes minutes and gigabytes: cargo test --release --lib model -- --ignored --nocapture"]
fn fenced_transactions_end_before_a_later_term_begins_in_a_larger_world() {
    explored(Model { fences: 1, ..Model::new() });
    explored(Model { fences: 2, faults: 0, ..Model::new() });
}

#[test]
#[ignore = "takes minutes and gigabytes: cargo test --release --lib model -- --ignored --nocapture"]
fn two_workers_on_a_claim_keep_every_promise_in_a_larger_world() {
    explored(Model { faults: 2, ..alone() });
    explored(Model { horizon: 4, ..alone() });
    explored(Model { callers: 1, horizon: 1, claims: [2, 1], ..Model::new() });
    explored(Model { callers: 2, horizon: 0, ..Model::new() });
}

#[test]
fn a_term_that_begins_after_the_end_of_its_claim_is_found() {
    let flawed = Model { callers: 1, horizon: 1, ..Model::new() }.with(Flaw::EndNotFinal);
    assert!(broken(flawed).contains("a term of a claim that has ended"));
}

#[test]
fn a_late_worker_that_does_not_hear_of_the_end_is_found() {
    let flawed = Model { callers: 1, horizon: 1, ..Model::new() }.with(Flaw::EndUnheard);
    assert!(broken(flawed).contains("does not come to an end"));
}

#[test]
fn a_release_that_is_given_up_and_called_confirmed_is_found() {
    let flawed = Model { callers: 1, horizon: 1, ..Model::new() }.with(Flaw::GivenUpAsReleased);
    assert!(broken(flawed).contains("released, while the server holds something"));
}

#[test]
fn a_term_whose_session_is_killed_for_a_cancelled_caller_is_found() {
    for flaw in [Flaw::TermKilled, Flaw::TermOnKilled] {
        let flawed = Model { callers: 1, horizon: 1, ..Model::new() }.with(flaw);
        assert!(broken(flawed).contains("believes to hold the lock, and does not"));
    }
}

#[test]
fn a_caller_that_is_let_wait_on_is_found() {
    let flawed = Model { callers: 1, horizon: 1, ..Model::new() }.with(Flaw::CallerLeftAlone);
    assert!(broken(flawed).contains("a caller stays whose context was cancelled"));
}
