//! Two claims on one session.

use super::*;

/// Two claims, to which these things have happened, at these seconds.
fn two(events: &[(u64, Event)]) -> Lifecycle {
    let mut lifecycle = Lifecycle::shared(timing(), UNCERTAINTY_WINDOW, 1, 2);
    for (at, event) in events {
        lifecycle.handle(*event, s(*at));
    }
    lifecycle
}

/// Both hold: the first since 0 s, the second since 1 s.
fn both_hold() -> Lifecycle {
    two(&[(0, OPENED), (0, granted_to(0, 0)), (1, granted_to(1, 1))])
}

fn granted_to(claim: usize, sent: u64) -> Event {
    of(claim, ClaimEvent::Granted { sent: s(sent) })
}

fn refused(claim: usize) -> Event {
    of(claim, ClaimEvent::Refused { patient: false })
}

fn unlocked(claim: usize) -> Event {
    of(claim, ClaimEvent::Unlocked { held: true })
}

fn release(claim: usize) -> Event {
    of(claim, ClaimEvent::Release)
}

fn settled(claim: usize) -> Event {
    of(claim, ClaimEvent::Settled { clear: true })
}

/// What the claims ask for.
fn wants(lifecycle: &Lifecycle) -> [ClaimAction; 2] {
    [lifecycle.claims[0].action(), lifecycle.claims[1].action()]
}

#[test]
fn a_lock_that_is_taken_beside_another_renews_the_lease_of_both() {
    let mut lifecycle = two(&[(0, OPENED)]);
    assert_eq!(lifecycle.action(), TRY);
    assert_eq!(lifecycle.handle(granted_to(0, 0), s(0)), [(0, Notice::Acquired { until: s(14) })]);
    assert_eq!(lifecycle.action(), Action::Claim(1, ClaimAction::Try));
    let both = [(0, Notice::Renewed { until: s(17) }), (1, Notice::Acquired { until: s(17) })];
    assert_eq!(lifecycle.handle(granted_to(1, 3), s(4)), both);
    // One heartbeat for both.
    assert_eq!(lifecycle.action(), watch(s(8)));
    lifecycle.handle(TIME_PASSED, s(8));
    let both = [(0, Notice::Renewed { until: s(22) }), (1, Notice::Renewed { until: s(22) })];
    assert_eq!(lifecycle.handle(renewed(8), s(9)), both);
}

#[test]
fn an_answer_that_was_asked_for_before_the_last_heartbeat_does_not_shorten_the_lease() {
    let mut lifecycle = two(&[(0, OPENED), (0, granted_to(0, 0)), (0, of(1, ClaimEvent::Busy))]);
    lifecycle.handle(TIME_PASSED, s(5));
    lifecycle.handle(renewed(5), s(6));
    let both = [(0, Notice::Renewed { until: s(19) }), (1, Notice::Acquired { until: s(19) })];
    assert_eq!(lifecycle.handle(granted_to(1, 2), s(7)), both);
}

#[test]
fn both_terms_are_lost_at_once_with_the_session_or_by_their_time() {
    let reasons = [
        (CUT, 2, LossReason::ConnectionClosed),
        (TERMINATED, 2, LossReason::Terminated),
        (TIME_PASSED, 15, LossReason::LeaseNotRenewed),
    ];
    for (event, now, reason) in reasons {
        let mut lifecycle = both_hold();
        assert_eq!(
            lifecycle.handle(event, s(now)),
            [(0, Notice::Lost(reason)), (1, Notice::Lost(reason))],
            "{event:?}"
        );
        assert_eq!(lifecycle.action(), CLOSE);
        lifecycle.handle(CLOSED, s(now));
        assert_eq!(lifecycle.action(), OPEN);
        lifecycle.handle(OPENED, s(now));
        assert_eq!(wants(&lifecycle), [ClaimAction::Try; 2]);
        for claim in [0, 1] {
            assert_eq!(lifecycle.uncertain_until(claim), s(now) + UNCERTAINTY_WINDOW);
        }
    }
}

#[test]
fn a_loss_is_told_to_each_claim_as_it_concerns_it() {
    // The first holds; the second queues, or is giving back what it had.
    let mut queueing = two(&[(0, OPENED), (0, granted_to(0, 0)), (0, of(1, ClaimEvent::Busy))]);
    let reason = LossReason::ConnectionClosed;
    assert_eq!(queueing.handle(CUT, s(1)), [(0, Notice::Lost(reason)), (1, Notice::Failed)]);

    let mut unlocking = both_hold();
    unlocking.handle(release(1), s(1));
    assert_eq!(unlocking.handle(CUT, s(1)), [(0, Notice::Lost(reason))]);
    assert_eq!(unlocking.handle(CLOSED, s(1)), []);
    assert_eq!(wants(&unlocking), [ClaimAction::Wait, ClaimAction::Finish(End::Unconfirmed)]);
}

#[test]
fn the_release_of_one_claim_leaves_the_lease_of_the_other_alone() {
    for (leaves, stays) in [(0, 1), (1, 0)] {
        let mut lifecycle = both_hold();
        assert_eq!(lifecycle.handle(release(leaves), s(2)), []);
        assert_eq!(wants(&lifecycle)[leaves], ClaimAction::Unlock);
        assert_eq!(lifecycle.session.action(), SessionAction::Watch { until: s(6) });
        assert_eq!(lifecycle.handle(unlocked(leaves), s(2)), []);
        assert_eq!(wants(&lifecycle)[leaves], ClaimAction::Finish(End::Released));
        // The lease goes on being renewed, and enforced.
        let mut frozen = lifecycle.clone();
        assert_eq!(frozen.handle(TIME_PASSED, s(15)), [(stays, Notice::Lost(LossReason::LeaseNotRenewed))]);
        lifecycle.handle(TIME_PASSED, s(6));
        assert_eq!(lifecycle.handle(renewed(6), s(6)), [(stays, Notice::Renewed { until: s(20) })]);
        // With the last lock the lease goes.
        assert_eq!(lifecycle.handle(release(stays), s(7)), []);
        assert_eq!(lifecycle.session.action(), SessionAction::Serve);
        assert_eq!(lifecycle.handle(unlocked(stays), s(30)), []);
        assert_eq!(wants(&lifecycle)[stays], ClaimAction::Finish(End::Released));
        assert_eq!(lifecycle.session.action(), SessionAction::Serve);
    }
}

#[test]
fn a_heartbeat_that_is_due_comes_before_the_unlock_of_another_claim() {
    let mut lifecycle = both_hold();
    lifecycle.handle(TIME_PASSED, s(6));
    lifecycle.handle(release(0), s(6));
    assert_eq!(lifecycle.action(), renew(s(15)));
    lifecycle.handle(renewed(6), s(6));
    assert_eq!(lifecycle.action(), UNLOCK);
}

#[test]
fn a_late_grant_is_confirmed_by_the_grant_of_another_claim() {
    let mut lifecycle = two(&[(0, OPENED), (14, granted_to(0, 0))]);
    assert_eq!(lifecycle.action(), CONFIRM);
    // The session that was asked at 14 s had not ended then, and so had the first lock still.
    let both = [(0, Notice::Acquired { until: s(28) }), (1, Notice::Acquired { until: s(28) })];
    assert_eq!(lifecycle.handle(granted_to(1, 14), s(15)), both);
}

#[test]
fn a_claim_that_was_refused_something_closes_the_session_when_the_other_has_left_it() {
    let mut lifecycle = two(&[(0, OPENED), (0, granted_to(0, 0))]);
    assert_eq!(lifecycle.handle(refused(1), s(1)), [(1, Notice::Failed)]);
    assert_eq!(wants(&lifecycle), [ClaimAction::Wait, ClaimAction::Settle]);
    assert_eq!(lifecycle.handle(settled(1), s(1)), []);
    assert_eq!(wants(&lifecycle), [ClaimAction::Wait; 2]);
    // The other one holds on.
    lifecycle.handle(TIME_PASSED, s(5));
    assert_eq!(lifecycle.handle(renewed(5), s(5)), [(0, Notice::Renewed { until: s(19) })]);
    lifecycle.handle(release(0), s(6));
    assert_eq!(lifecycle.action(), UNLOCK);
    assert_eq!(lifecycle.session.action(), SessionAction::Serve);
    lifecycle.handle(unlocked(0), s(6));
    assert_eq!(lifecycle.session.action(), SessionAction::Close);
    lifecycle.handle(CLOSED, s(6));
    assert!(matches!(lifecycle.session.action(), SessionAction::Pause { .. }));
    lifecycle.handle(WANTED, s(6));
    lifecycle.handle(OPENED, s(6));
    assert_eq!(wants(&lifecycle), [ClaimAction::Finish(End::Released), ClaimAction::Try]);
}

#[test]
fn a_refusal_does_not_outlive_the_session_that_it_was_of() {
    let mut lifecycle =
        two(&[(0, OPENED), (0, granted_to(0, 0)), (1, refused(1)), (1, settled(1)), (2, CUT)]);
    lifecycle.handle(CLOSED, s(2));
    lifecycle.handle(WANTED, s(2));
    for event in
        [OPENED, granted_to(0, 3), granted_to(1, 3), release(0), unlocked(0), release(1), unlocked(1)]
    {
        lifecycle.handle(event, s(3));
    }
    assert_eq!(lifecycle.session.action(), SessionAction::Serve);
}

#[test]
fn what_could_not_be_given_back_is_uncertain_from_when_the_session_ends() {
    let lease_over = s(30) + UNCERTAINTY_WINDOW;
    let refuse = |claim| {
        let mut lifecycle = both_hold();
        lifecycle.handle(release(claim), s(2));
        lifecycle.handle(refused(claim), s(2));
        // The other one keeps the session, and with it what was not given back.
        for second in [6, 11, 16, 21, 26] {
            lifecycle.handle(TIME_PASSED, s(second));
            lifecycle.handle(renewed(second), s(second));
        }
        lifecycle
    };
    for (leaves, stays) in [(0, 1), (1, 0)] {
        let mut lost = refuse(leaves);
        assert_eq!(wants(&lost), [ClaimAction::Wait; 2]);
        lost.handle(CUT, s(30));
        assert_eq!(lost.uncertain_until(leaves), lease_over);
        lost.handle(CLOSED, s(30));
        assert_eq!(wants(&lost)[leaves], ClaimAction::Finish(End::Unconfirmed));

        let mut left = refuse(leaves);
        left.handle(release(stays), s(30));
        left.handle(unlocked(stays), s(30));
        assert_eq!(left.uncertain_until(leaves), lease_over);
        left.handle(CLOSED, s(30));
        assert_eq!(wants(&left)[leaves], ClaimAction::Finish(End::Unconfirmed));
        assert_eq!(wants(&left)[stays], ClaimAction::Finish(End::Released));
    }
}

#[test]
fn nothing_is_uncertain_of_a_claim_that_left_nothing_on_the_session_when_that_ends() {
    let mut lifecycle = two(&[(0, OPENED), (0, granted_to(0, 0)), (1, refused(1)), (1, settled(1))]);
    lifecycle.handle(release(1), s(2));
    lifecycle.handle(CUT, s(3));
    lifecycle.handle(CLOSED, s(3));
    assert_eq!(wants(&lifecycle)[1], ClaimAction::Finish(End::Released));
}
