//! What is explored, and which flaws are found.

use std::time::Instant;

use super::*;

fn explored(model: Model) -> Tally {
    let begun = Instant::now();
    let tally = model.explore().unwrap_or_else(|violation| panic!("{violation:?}"));
    let Model { horizon, faults, claims, fences, callers, carriers, seats, keys, .. } = model;
    let carried = match carriers {
        0 => String::new(),
        _ => format!(", {carriers} carriers with {seats:?} claims on {keys:?}"),
    };
    println!(
        "model, {faults} faults, {claims:?} claims{carried}, {horizon} ticks, {fences} fences, {callers} callers: {tally}; {:.1?}",
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

/// A server that is taken over, in whichever way.
fn taken_over() -> Model {
    Model { only_takeovers: true, horizon: LEASE + 1, ..Model::new() }
}

#[test]
fn there_are_never_two_holders_though_the_server_is_taken_over() {
    let tally = explored(taken_over());
    assert_eq!(tally.faults.len(), 5, "{tally}");
    assert!(tally.graces > 0 && tally.terms_after_grace > 0 && tally.proven > 0, "{tally}");
}

#[test]
#[ignore = "takes minutes and gigabytes: cargo test --release --lib model -- --ignored --nocapture"]
fn there_are_never_two_holders_though_the_server_is_taken_over_again_and_again() {
    explored(Model { faults: 2, horizon: LEASE + 2, ..taken_over() });
    explored(Model { claims: [2, 1], ..taken_over() });
}

#[test]
#[ignore = "takes minutes and gigabytes: cargo test --release --lib model -- --ignored --nocapture"]
fn there_are_never_two_holders_though_the_server_is_taken_over_whatever_else_goes_wrong() {
    explored(Model {
        faults: 2,
        horizon: LEASE,
        with_takeovers: true,
        only_takeovers: false,
        ..taken_over()
    });
}

#[test]
fn locks_that_are_granted_at_once_after_a_takeover_are_found() {
    for flaw in [Flaw::GraceIgnored, Flaw::GraceTooShort] {
        assert!(broken(taken_over().with(flaw)).contains("both believe to hold the lock"), "{flaw:?}");
    }
}

#[test]
#[ignore = "takes minutes and gigabytes: cargo test --release --lib model -- --ignored --nocapture"]
fn a_takeover_grace_that_a_crash_does_not_begin_again_is_found() {
    let flawed = Model { faults: 2, horizon: 2 * LEASE, ..taken_over() }.with(Flaw::GraceOutlivesCrash);
    assert!(broken(flawed).contains("both believe to hold the lock"));
}

#[test]
#[ignore = "takes a minute: cargo test --release --lib model -- --ignored --nocapture"]
fn a_former_holder_that_is_let_back_beside_the_last_one_is_found() {
    let flawed = Model { claims: [2, 1], ..taken_over() }.with(Flaw::ProofOfFormer);
    assert!(broken(flawed).contains("both believe to hold the lock"));
}

#[test]
fn a_holder_of_the_last_moment_that_is_let_back_at_once_is_found() {
    assert!(broken(taken_over().with(Flaw::ProofTooYoung)).contains("both believe to hold the lock"));
}

/// A standby is promoted while the primary lives on, and confirms heartbeats until then.
fn split() -> Model {
    let sound = Model::new();
    let timing = Timing { confirms: Confirms::All, ..sound.timing };
    Model { timing, only_splits: true, horizon: LEASE + 2, ..sound }
}

#[test]
fn there_are_never_two_holders_though_a_standby_is_promoted_beside_its_primary() {
    let tally = explored(split());
    assert_eq!(tally.faults.len(), 1, "{tally}");
    assert!(tally.graces > 0 && tally.terms_after_grace > 0 && tally.losses > 0, "{tally}");
}

#[test]
#[ignore = "takes minutes and gigabytes: cargo test --release --lib model -- --ignored --nocapture"]
fn there_are_never_two_holders_though_a_standby_is_promoted_in_a_larger_world() {
    explored(Model { claims: [2, 1], ..split() });
    explored(Model { horizon: 2 * LEASE, ..split() });
}

#[test]
fn heartbeats_that_an_old_primary_answers_by_itself_are_found() {
    let timing = Timing { confirms: Confirms::Nothing, ..split().timing };
    assert!(broken(Model { timing, ..split() }).contains("both believe to hold the lock"));
    assert!(broken(split().with(Flaw::ConfirmationReused)).contains("both believe to hold the lock"));
    assert!(broken(split().with(Flaw::GraceTooShort)).contains("both believe to hold the lock"));
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

/// One process by itself, whose session carries two claims on two locks.
fn carried() -> Model {
    Model { carriers: 1, claims: [0, 0], horizon: 1, ..Model::new() }
}

/// The same beside a process with a session of its own, which wants one of the locks.
fn carried_beside_another() -> Model {
    Model { claims: [0, 1], moves: true, ..carried() }
}

#[test]
fn two_claims_on_one_session_keep_every_promise_whatever_goes_wrong() {
    let tally = explored(carried());
    assert_eq!(tally.faults.len(), 8, "{tally}");
    assert!(tally.batches > 0 && tally.put_right > 0 && tally.lost_together > 0, "{tally}");
    assert!(tally.ends.contains_key("Released") && tally.ends.contains_key("Unconfirmed"), "{tally}");
    let tally = explored(Model { only_freezes: true, horizon: LEASE, ..carried() });
    assert!(tally.lost_together > 0 && tally.freezes > 0, "{tally}");
}

#[test]
fn two_claims_on_one_session_that_want_the_same_lock_have_it_one_after_the_other() {
    let tally = explored(Model { keys: [0, 0], ..carried() });
    assert!(tally.taken > 0 && tally.terms > 0, "{tally}");
}

#[test]
fn claims_on_one_session_come_again() {
    explored(Model { faults: 0, seats: [2, 2], ..carried() });
}

#[test]
fn claims_on_one_session_keep_every_promise_beside_another_process() {
    let tally = explored(Model { faults: 0, horizon: 0, ..carried_beside_another() });
    assert!(tally.terms > 0 && tally.moved > 0, "{tally}");
}

#[test]
#[ignore = "takes minutes and gigabytes: cargo test --release --lib model -- --ignored --nocapture"]
fn two_claims_on_one_session_keep_every_promise_in_a_larger_world() {
    explored(Model { horizon: LEASE, ..carried() });
    explored(Model { horizon: LEASE, keys: [0, 0], ..carried() });
    explored(Model { horizon: 2, seats: [2, 1], ..carried() });
    explored(Model { callers: 1, ..carried() });
    explored(Model { horizon: 0, fences: 1, ..carried() });
    explored(Model { horizon: 2, moves: true, ..carried() });
}

#[test]
#[ignore = "takes minutes and gigabytes: cargo test --release --lib model -- --ignored --nocapture"]
fn claims_on_one_session_keep_every_promise_beside_another_process_in_a_larger_world() {
    let sound = Model { moves: false, ..carried_beside_another() };
    explored(Model { faults: 0, ..carried_beside_another() });
    explored(Model { faults: 0, horizon: LEASE, ..sound });
    explored(Model { faults: 0, horizon: 0, fences: 1, ..sound });
    explored(Model { faults: 0, horizon: 0, carriers: 2, ..sound });
    explored(Model { horizon: LEASE, only_freezes: true, ..sound });
    explored(sound);
}

#[test]
#[ignore = "takes minutes and gigabytes: cargo test --release --lib model -- --ignored --nocapture"]
fn claims_on_one_session_keep_every_promise_though_the_server_is_taken_over_or_split() {
    let on_carrier = |model| Model { carriers: 1, claims: [0, 0], ..model };
    let tally = explored(on_carrier(taken_over()));
    assert!(tally.graces > 0 && tally.terms_after_grace > 0 && tally.proven > 0, "{tally}");
    explored(on_carrier(split()));
}

#[test]
fn a_loss_that_is_told_to_one_claim_of_the_session_is_found() {
    assert!(broken(carried().with(Flaw::LossToldToOne)).contains("has not heard of its loss"));
}

#[test]
fn a_number_that_a_carrier_keeps_after_the_release_is_found() {
    let flawed = Model { faults: 0, seats: [2, 1], ..carried() }.with(Flaw::NumberKept);
    assert!(broken(flawed).contains("does not get lock 0, which is free"));
}

#[test]
fn a_session_that_is_asked_twice_for_a_lock_is_found() {
    let flawed = Model { faults: 0, keys: [0, 0], ..carried() }.with(Flaw::AskedTwice);
    assert!(broken(flawed).contains("asked twice for one lock"));
}

#[test]
fn a_refused_statement_that_is_not_put_right_is_found() {
    assert!(broken(carried().with(Flaw::NotPutRight)).contains("has a lock that nobody wants"));
}

#[test]
fn a_release_of_the_wrong_claim_is_found() {
    let flawed = Model { faults: 0, ..carried() }.with(Flaw::WrongOneGiven);
    assert!(broken(flawed).contains("given back that the session did not have"));
}

#[test]
fn an_answer_that_outlives_its_session_is_found() {
    let flawed = Model { only_freezes: true, horizon: 2, seats: [1, 0], ..carried() };
    let flawed = flawed.with(Flaw::AnswerOutlivesSession);
    assert!(broken(flawed).contains("believes to hold the lock, and does not"));
}

#[test]
fn a_lock_that_is_called_busy_and_kept_is_found() {
    let flawed = Model { faults: 0, fences: 1, seats: [2, 1], horizon: 0, ..carried() }.with(Flaw::BusyKept);
    assert!(broken(flawed).contains("has a lock that nobody wants"));
}

#[test]
fn an_end_of_terms_that_is_moved_after_it_was_seen_is_found() {
    let flawed = Model { only_freezes: true, horizon: 2, ..carried() }.with(Flaw::SeenEndMoved);
    assert!(broken(flawed).contains("goes on that was seen as over"));
}

#[test]
fn a_claim_that_leaves_its_carrier_and_forgets_what_was_lost_is_found() {
    for flaw in [Flaw::UncertaintyLeft, Flaw::LostForgotten] {
        let flawed = Model { moves: true, horizon: 2, seats: [1, 0], ..carried() }.with(flaw);
        assert!(broken(flawed).contains("released, while the server holds something"), "{flaw:?}");
    }
}
