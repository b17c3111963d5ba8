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
    of(claim, ClaimEvent::Refused { needs_operator: false })
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
    // One heartbeat for both, which is due as before: nothing has shown that the first lock is still held.
    assert_eq!(lifecycle.action(), watch(s(5)));
    lifecycle.handle(TIME_PASSED, s(8));
    let both = [(0, Notice::Renewed { until: s(22) }), (1, Notice::Renewed { until: s(22) })];
    assert_eq!(lifecycle.handle(renewed(8), s(9)), both);
}

/// One statement took both, and its answer came late: the grant of the second does not make the first one fresh.
#[test]
fn terms_that_begin_together_and_fresh_have_their_first_heartbeat_before_them() {
    let timing = Timing { begins_fresh: true, ..timing() };
    let mut lifecycle = Lifecycle::shared(timing, UNCERTAINTY_WINDOW, 1, 2);
    lifecycle.handle(OPENED, s(0));
    for claim in [0, 1] {
        assert_eq!(lifecycle.handle(granted_to(claim, 0), s(5)), []);
        assert_eq!(lifecycle.session_action(), SessionAction::Renew { by: Time::MAX });
    }
    let both = [0, 1].map(|claim| (claim, Notice::Acquired { until: s(19) }));
    assert_eq!(lifecycle.handle(renewed(5), s(6)), both);
}

/// The first was let back at once, the second waits for the end of the takeover grace.
#[test]
fn of_a_heartbeat_and_the_end_of_a_pause_the_earlier_comes_first() {
    let in_grace = |until| of(1, ClaimEvent::Later { until: s(until), obstacle: Obstacle::Grace });
    let pause = |until| Action::Claim(1, ClaimAction::Pause { until: s(until) });
    let mut lifecycle = two(&[(0, OPENED), (0, granted_to(0, 0))]);
    assert_eq!(lifecycle.handle(in_grace(3), s(1)), [(1, Notice::InGrace)]);
    assert_eq!(lifecycle.action(), pause(3));
    lifecycle.handle(of(1, ClaimEvent::TimePassed), s(3));
    assert_eq!(lifecycle.action(), Action::Claim(1, ClaimAction::Try));
    lifecycle.handle(in_grace(6), s(3));
    assert_eq!(lifecycle.action(), watch(s(5)));
    lifecycle.handle(TIME_PASSED, s(5));
    assert_eq!(lifecycle.action(), renew(s(14)));
    lifecycle.handle(renewed(5), s(5));
    assert_eq!(lifecycle.action(), pause(6));
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
        assert_eq!(lifecycle.session.action(), SessionAction::Watch { until: s(5) });
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

#[test]
fn nor_does_it_where_the_standbys_confirm() {
    let timing = Timing { confirms: Confirms::All, ..timing() };
    let mut lifecycle = Lifecycle::shared(timing, UNCERTAINTY_WINDOW, 1, 2);
    for (at, event) in [(0, OPENED), (5, granted_to(0, 5)), (6, confirmed(6, 6)), (7, granted_to(1, 1))] {
        lifecycle.handle(event, s(at));
    }
    assert_eq!(lifecycle.leased_until(), Some(s(19)));
    lifecycle.handle(confirmed(8, 8), s(8));
    assert_eq!(lifecycle.leased_until(), Some(s(19)));
}

/// A session that carries claims, which come, go on elsewhere and end, whatever happens: what is counted of them is true, and whoever holds is told
/// of each loss.
#[test]
fn a_carrier_counts_its_claims_and_tells_each_of_its_loss_whatever_happens() {
    const CLAIMS: usize = 4;
    for (seed, confirms) in (0..60).flat_map(|seed| {
        [Confirms::Nothing, Confirms::Grants, Confirms::All].map(|confirms| (seed, confirms))
    }) {
        let mut rng = fastrand::Rng::with_seed(seed);
        let timing = Timing { confirms, ..timing() };
        let new = |rng: &mut fastrand::Rng| Claim::new(UNCERTAINTY_WINDOW, rng.bool());
        let mut lifecycle = Lifecycle::carrier(timing, seed);
        let mut now = Duration::ZERO;
        for number in 0..CLAIMS {
            lifecycle.admit(number, new(&mut rng), now);
        }
        // Whether the application has been told that it holds.
        let mut told = [false; CLAIMS];
        // When each was granted its lock, and for when a confirmation was given last.
        let (mut granted, mut seen) = ([Time::ZERO; CLAIMS], Time::ZERO);
        for _ in 0..2_000 {
            now += Duration::from_millis(rng.u64(..1_500));
            let number = rng.usize(..CLAIMS);
            let of = |event| Event::Claim(number, event);
            let of_session = |event| Event::Session(event);
            let lost = of_session(SessionEvent::Lost(LossReason::ConnectionClosed));
            let event = if rng.bool() {
                match lifecycle.session_action() {
                    SessionAction::Open if rng.bool() => OPENED,
                    SessionAction::Open => OPEN_FAILED,
                    SessionAction::Pause { .. } => TIME_PASSED,
                    SessionAction::Serve if rng.u8(..20) == 0 => lost,
                    SessionAction::Serve => continue,
                    SessionAction::Watch { .. } if rng.u8(..20) == 0 => lost,
                    SessionAction::Watch { .. } => TIME_PASSED,
                    SessionAction::Renew { .. } if rng.u8(..10) == 0 => lost,
                    SessionAction::Renew { .. } => of_session(SessionEvent::Renewed { sent: now }),
                    SessionAction::Confirm { .. } if rng.u8(..10) == 0 => lost,
                    SessionAction::Confirm { .. } if rng.bool() => TIME_PASSED,
                    SessionAction::Confirm { .. } if rng.bool() => of_session(SessionEvent::Unconfirmed),
                    SessionAction::Confirm { sent, granted, .. } => {
                        // What is asked for is not known yet.
                        assert!(granted > lifecycle.confirmed || granted.is_none());
                        seen = now - Duration::from_millis(rng.u64(..1_500)).min(now);
                        let first = sent.into_iter().chain(granted).min();
                        seen = seen.max(first.unwrap_or_default());
                        let [seen, later] = [Some(seen), Some(now)];
                        let (followed, open) = if rng.bool() { (seen, later) } else { (later, seen) };
                        of_session(SessionEvent::Confirmed { followed, open })
                    }
                    SessionAction::Close => of_session(SessionEvent::Closed { gone: rng.bool() }),
                }
            } else {
                match lifecycle.claim_action(number) {
                    _ if rng.u8(..12) == 0 => of(ClaimEvent::Release),
                    ClaimAction::Wait => continue,
                    ClaimAction::Try if rng.u8(..3) > 0 => of(ClaimEvent::Granted { sent: now }),
                    ClaimAction::Try => {
                        let all = [Obstacle::Grace, Obstacle::Busy, Obstacle::Refused];
                        let obstacle = all[rng.usize(..all.len())];
                        of(ClaimEvent::Later { until: now + s(1), obstacle })
                    }
                    ClaimAction::Pause { .. } if rng.bool() => {
                        assert_eq!(lifecycle.dismiss(number, now), []);
                        lifecycle.admit(number, new(&mut rng), now);
                        continue;
                    }
                    ClaimAction::Pause { .. } => of(ClaimEvent::TimePassed),
                    ClaimAction::Unlock => of(ClaimEvent::Unlocked { held: true }),
                    ClaimAction::Settle => of(ClaimEvent::Settled { clear: rng.bool() }),
                    ClaimAction::Finish(_) => {
                        lifecycle.admit(number, new(&mut rng), now);
                        continue;
                    }
                    ClaimAction::Queue => panic!("a carrier queues for nobody"),
                }
            };
            if event == of(ClaimEvent::Release) {
                told[number] = false;
            }
            if event == of(ClaimEvent::Granted { sent: now }) {
                granted[number] = now;
            }
            for (number, notice) in lifecycle.handle(event, now) {
                match notice {
                    Notice::Acquired { until } => {
                        assert!(until > now && !told[number]);
                        assert!(confirms == Confirms::Nothing || granted[number] <= seen);
                        told[number] = true;
                    }
                    Notice::Lost(_) => assert!(std::mem::take(&mut told[number]), "lost what it had"),
                    Notice::Renewed { .. } => panic!("not one by one"),
                    Notice::Busy | Notice::InGrace | Notice::Failed => assert!(!told[number]),
                }
            }
            let holding = lifecycle.claims.iter().filter(|claim| claim.holds()).count();
            let using = lifecycle.claims.iter().filter(|claim| claim.uses_session()).count();
            assert_eq!((lifecycle.holding, lifecycle.using), (holding, using));
            // Whoever believes that it holds does so for as long as the lease lasts.
            assert!(!told.contains(&true) || lifecycle.leased_until().is_some(), "{lifecycle:?}");
            for (number, claim) in lifecycle.claims.iter().enumerate() {
                assert_eq!(claim.granted_at().is_some(), lifecycle.confirming.contains(&number));
            }
        }
    }
}

#[test]
fn a_claim_that_comes_while_the_session_is_being_closed_waits_for_the_next_session() {
    let mut lifecycle = both_hold();
    lifecycle.handle(CUT, s(2));
    lifecycle.admit(2, Claim::new(UNCERTAINTY_WINDOW, false), s(2));
    assert_eq!(lifecycle.action(), CLOSE);
    assert_eq!(lifecycle.handle(GONE, s(3)), []);
    assert_eq!(lifecycle.action(), OPEN);
    lifecycle.handle(OPENED, s(3));
    assert_eq!(lifecycle.claim_action(2), ClaimAction::Try);
    assert_eq!(lifecycle.uncertain_until(2), Time::ZERO, "the lost session had nothing for it");
}
