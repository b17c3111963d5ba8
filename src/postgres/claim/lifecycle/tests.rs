//! Timelines of a session and its claims: what happens, and what the lifecycle asks for next.

use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::*;
use crate::loss::LossReason;
use crate::pg::claim::machine::{Action as ClaimAction, End, Event as ClaimEvent, Notice, Obstacle};
use crate::pg::session::machine::{Action as SessionAction, Confirms, Event as SessionEvent, Rhythm};

const HEARTBEAT: Duration = Duration::from_secs(5);
const UNCERTAINTY_WINDOW: Duration = Duration::from_secs(15);

const OPENED: Event = Event::Session(SessionEvent::Opened);
const OPEN_FAILED: Event = Event::Session(SessionEvent::OpenFailed { needs_operator: false });
const TIME_PASSED: Event = Event::Session(SessionEvent::TimePassed);
const WANTED: Event = Event::Session(SessionEvent::Wanted);
const CUT: Event = Event::Session(SessionEvent::Lost(LossReason::ConnectionClosed));
const TERMINATED: Event = Event::Session(SessionEvent::Lost(LossReason::Terminated));
/// What the engine makes of a heartbeat that is refused.
const HEARTBEAT_REFUSED: Event = Event::Session(SessionEvent::Lost(LossReason::ServerError));
const CLOSED: Event = Event::Session(SessionEvent::Closed { gone: false });
const GONE: Event = Event::Session(SessionEvent::Closed { gone: true });
const BUSY: Event = of(0, ClaimEvent::Busy);
const IN_GRACE: Event = of(0, ClaimEvent::Later { until: Duration::from_secs(3), obstacle: Obstacle::Grace });
const GRACE_LOOKED: Event = of(0, ClaimEvent::TimePassed);
const SLICE_OVER: Event = of(0, ClaimEvent::SliceOver);
const REFUSED: Event = of(0, ClaimEvent::Refused { needs_operator: false });
const UNLOCKED: Event = of(0, ClaimEvent::Unlocked { held: true });
const NOT_HELD: Event = of(0, ClaimEvent::Unlocked { held: false });
const SETTLED: Event = of(0, ClaimEvent::Settled { clear: true });
const SETTLED_UNCLEAR: Event = of(0, ClaimEvent::Settled { clear: false });
const RELEASE: Event = of(0, ClaimEvent::Release);

const TRY: Action = Action::Claim(0, ClaimAction::Try);
const IN_GRACE_UNTIL_3: Action = Action::Claim(0, ClaimAction::Pause { until: Duration::from_secs(3) });
const QUEUE: Action = Action::Claim(0, ClaimAction::Queue);
const UNLOCK: Action = Action::Claim(0, ClaimAction::Unlock);
const SETTLE: Action = Action::Claim(0, ClaimAction::Settle);
const OPEN: Action = Action::Session(SessionAction::Open);
const CLOSE: Action = Action::Session(SessionAction::Close);
const CONFIRM: Action = renew(Time::MAX);

const fn of(claim: usize, event: ClaimEvent) -> Event {
    Event::Claim(claim, event)
}

/// The standbys followed, and the server let new connections in, at these seconds.
const fn confirmed(followed: u64, open: u64) -> Event {
    let (followed, open) = (Some(Duration::from_secs(followed)), Some(Duration::from_secs(open)));
    Event::Session(SessionEvent::Confirmed { followed, open })
}

const fn watch(until: Time) -> Action {
    Action::Session(SessionAction::Watch { until })
}

const fn renew(by: Time) -> Action {
    Action::Session(SessionAction::Renew { by })
}

const fn finish(end: End) -> Action {
    Action::Claim(0, ClaimAction::Finish(end))
}

/// Heartbeats are sent at whole seconds.
fn timing() -> Timing {
    Timing {
        term: s(14),
        heartbeat: HEARTBEAT,
        rhythm: Rhythm::of(s(16), Duration::ZERO),
        begins_fresh: false,
        confirms: Confirms::Nothing,
    }
}

fn s(seconds: u64) -> Time {
    Duration::from_secs(seconds)
}

fn granted(sent: u64) -> Event {
    of(0, ClaimEvent::Granted { sent: s(sent) })
}

fn renewed(sent: u64) -> Event {
    Event::Session(SessionEvent::Renewed { sent: s(sent) })
}

fn acquired(until: u64) -> Option<Notice> {
    Some(Notice::Acquired { until: s(until) })
}

fn lost(reason: LossReason) -> Option<Notice> {
    Some(Notice::Lost(reason))
}

fn dedicated() -> Lifecycle {
    Lifecycle::dedicated(timing(), Claim::new(UNCERTAINTY_WINDOW, false), 1)
}

/// Gives the only claim's session an event; what is announced of the claim.
fn tell(lifecycle: &mut Lifecycle, event: Event, now: Time) -> Option<Notice> {
    let notices = lifecycle.handle(event, now);
    assert!(notices.len() <= 1 && notices.iter().all(|(claim, _)| *claim == 0), "{notices:?}");
    notices.first().map(|(_, notice)| *notice)
}

/// One claim on one session, to which these things have happened, at these seconds.
fn after(events: &[(u64, Event)]) -> Lifecycle {
    let mut lifecycle = dedicated();
    for (at, event) in events {
        lifecycle.handle(*event, s(*at));
    }
    lifecycle
}

/// The claim before it does `name`, all at 0 s.
fn at(name: &str) -> Lifecycle {
    let events: &[_] = match name {
        "open" => &[],
        "pause" => &[OPEN_FAILED],
        "try" => &[OPENED],
        "in grace" => &[OPENED, IN_GRACE],
        "queue" => &[OPENED, BUSY],
        "watch" => &[OPENED, granted(0)],
        "unlock" => &[OPENED, granted(0), RELEASE],
        "settle" => &[OPENED, BUSY, REFUSED],
        "settle at the end" => &[OPENED, BUSY, RELEASE],
        "close" => &[OPENED, BUSY, TERMINATED],
        "close at the end" => &[OPENED, BUSY, TERMINATED, RELEASE],
        "finish" => &[RELEASE],
        // These two take time to come to.
        "renew" => return after(&[(0, OPENED), (0, granted(0)), (5, TIME_PASSED)]),
        "confirm" => return after(&[(0, OPENED), (14, granted(0))]),
        _ => panic!("no such state: {name}"),
    };
    after(&events.iter().map(|event| (0, *event)).collect::<Vec<_>>())
}

/// What is done next in the state, after the event at this second, and what is announced.
fn step(name: &str, event: Event, now: u64) -> (Action, Option<Notice>) {
    let mut lifecycle = at(name);
    let notice = tell(&mut lifecycle, event, s(now));
    (lifecycle.action(), notice)
}

#[test]
fn a_lock_that_is_free_is_had_renewed_and_given_back() {
    let mut lifecycle = dedicated();
    assert_eq!(lifecycle.action(), OPEN);
    assert_eq!(tell(&mut lifecycle, OPENED, s(1)), None);
    assert_eq!(lifecycle.action(), TRY);
    // Asked for at 2 s, answered at 3 s: the term counts from the question.
    assert_eq!(tell(&mut lifecycle, granted(2), s(3)), acquired(16));
    assert_eq!(lifecycle.action(), watch(s(7)));
    // Something woke the watch.
    assert_eq!(tell(&mut lifecycle, TIME_PASSED, s(6)), None);
    assert_eq!(lifecycle.action(), watch(s(7)));
    assert_eq!(tell(&mut lifecycle, TIME_PASSED, s(7)), None);
    assert_eq!(lifecycle.action(), renew(s(16)));
    assert_eq!(tell(&mut lifecycle, renewed(8), s(9)), Some(Notice::Renewed { until: s(22) }));
    assert_eq!(lifecycle.action(), watch(s(13)));
    assert_eq!(tell(&mut lifecycle, RELEASE, s(10)), None);
    assert_eq!(lifecycle.action(), UNLOCK);
    assert_eq!(tell(&mut lifecycle, UNLOCKED, s(10)), None);
    assert_eq!(lifecycle.action(), finish(End::Released));
}

/// A grant of a shared lock does not show that no lost session has it.
#[test]
fn a_shared_lock_is_given_back_when_no_lost_session_has_it_either() {
    for (shares, clear) in [(false, true), (true, true), (true, false)] {
        let mut lifecycle = Lifecycle::dedicated(timing(), Claim::new(UNCERTAINTY_WINDOW, shares), 1);
        for event in [OPENED, granted(0), TERMINATED, Event::Session(session::Event::Closed { gone: false })]
        {
            tell(&mut lifecycle, event, s(0));
        }
        while lifecycle.action() != TRY {
            let event = if lifecycle.action() == OPEN { OPENED } else { TIME_PASSED };
            tell(&mut lifecycle, event, s(1));
        }
        for event in [granted(1), RELEASE] {
            tell(&mut lifecycle, event, s(1));
        }
        assert_eq!(lifecycle.action(), UNLOCK);
        tell(&mut lifecycle, UNLOCKED, s(1));
        if shares {
            assert_eq!(lifecycle.action(), Action::Claim(0, claim::Action::Settle));
            tell(&mut lifecycle, Event::Claim(0, claim::Event::Settled { clear }), s(1));
        }
        let end = if clear { End::Released } else { End::Unconfirmed };
        assert_eq!(lifecycle.action(), finish(end), "{shares} {clear}");
    }
}

#[test]
fn a_term_that_begins_fresh_has_its_first_heartbeat_before_it_where_the_wait_was_long() {
    let timing = Timing { begins_fresh: true, ..timing() };
    let after_a_wait_until = |now| {
        let mut lifecycle = Lifecycle::dedicated(timing, Claim::new(UNCERTAINTY_WINDOW, false), 1);
        for event in [OPENED, BUSY] {
            lifecycle.handle(event, s(0));
        }
        let notice = tell(&mut lifecycle, granted(0), s(now));
        (lifecycle, notice)
    };
    assert_eq!(after_a_wait_until(4).1, acquired(14));
    // A heartbeat would have been due at 5 s.
    let (mut lifecycle, notice) = after_a_wait_until(5);
    assert_eq!((notice, lifecycle.action()), (None, renew(Time::MAX)));
    assert_eq!(tell(&mut lifecycle, renewed(5), s(6)), acquired(19));
    assert_eq!(lifecycle.action(), watch(s(10)));
}

#[test]
fn a_term_begins_and_goes_on_only_when_the_standbys_have_confirmed() {
    let timing = Timing { confirms: Confirms::All, ..timing() };
    let confirm = |sent, by, granted: Option<u64>, last| {
        let (sent, granted, last) = (Some(s(sent)), granted.map(s), s(last));
        Action::Session(SessionAction::Confirm { sent, by, granted, last })
    };
    let unconfirmed = Event::Session(SessionEvent::Unconfirmed);
    let mut lifecycle = Lifecycle::dedicated(timing, Claim::new(UNCERTAINTY_WINDOW, false), 1);
    lifecycle.handle(OPENED, s(0));
    assert_eq!(tell(&mut lifecycle, granted(0), s(0)), None);
    assert_eq!(lifecycle.action(), confirm(0, Time::MAX, Some(0), 0));
    // Who waits is told, and a heartbeat comes before the next attempt.
    assert_eq!(tell(&mut lifecycle, unconfirmed, s(5)), Some(Notice::Failed));
    assert_eq!(lifecycle.action(), renew(Time::MAX));
    assert_eq!(tell(&mut lifecycle, renewed(5), s(5)), None);
    assert_eq!(lifecycle.action(), confirm(0, Time::MAX, Some(0), 5));
    // The term is counted from the heartbeat, and not from the confirmation.
    assert_eq!(tell(&mut lifecycle, confirmed(5, 5), s(7)), acquired(19));
    tell(&mut lifecycle, TIME_PASSED, s(10));
    assert_eq!(tell(&mut lifecycle, renewed(10), s(10)), None);
    assert_eq!(lifecycle.action(), confirm(10, s(19), None, 10));
    assert_eq!(tell(&mut lifecycle, unconfirmed, s(15)), None);
    assert_eq!(tell(&mut lifecycle, renewed(15), s(15)), None);
    // A confirmation that began before the last heartbeat serves the one before.
    assert_eq!(lifecycle.action(), confirm(10, s(19), None, 15));
    assert_eq!(tell(&mut lifecycle, confirmed(12, 12), s(16)), Some(Notice::Renewed { until: s(24) }));
    assert_eq!(lifecycle.action(), confirm(15, s(24), None, 15));
    let mut late = lifecycle.clone();
    assert_eq!(tell(&mut lifecycle, confirmed(15, 15), s(18)), Some(Notice::Renewed { until: s(29) }));
    assert_eq!(tell(&mut late, confirmed(15, 15), s(24)), Some(Notice::Lost(LossReason::NotConfirmed)));
    // It was the server that did not answer.
    tell(&mut lifecycle, TIME_PASSED, s(20));
    assert_eq!(lifecycle.action(), renew(s(29)));
    assert_eq!(tell(&mut lifecycle, renewed(20), s(29)), Some(Notice::Lost(LossReason::LeaseNotRenewed)));
}

#[test]
fn where_grants_are_confirmed_a_term_begins_then_and_goes_on_by_heartbeats_alone() {
    let timing = Timing { confirms: Confirms::Grants, ..timing() };
    let confirm = |by| {
        let (sent, by, granted, last) = (None, s(by), Some(Time::ZERO), Time::ZERO);
        Action::Session(SessionAction::Confirm { sent, by, granted, last })
    };
    let unconfirmed = Event::Session(SessionEvent::Unconfirmed);
    let mut lifecycle = Lifecycle::dedicated(timing, Claim::new(UNCERTAINTY_WINDOW, false), 1);
    lifecycle.handle(OPENED, s(0));
    assert_eq!(tell(&mut lifecycle, granted(0), s(0)), None);
    assert_eq!(lifecycle.action(), confirm(5));
    // A heartbeat that is answered says nothing of how the lock was granted.
    assert_eq!(tell(&mut lifecycle, unconfirmed, s(4)), Some(Notice::Failed));
    assert_eq!(lifecycle.action(), confirm(5));
    assert_eq!(tell(&mut lifecycle, TIME_PASSED, s(5)), None);
    assert_eq!(lifecycle.action(), renew(s(14)));
    assert_eq!(tell(&mut lifecycle, renewed(5), s(5)), None);
    assert_eq!(lifecycle.action(), confirm(10));
    assert_eq!(tell(&mut lifecycle, confirmed(6, 0), s(6)), acquired(19));
    tell(&mut lifecycle, TIME_PASSED, s(10));
    assert_eq!(tell(&mut lifecycle, renewed(10), s(10)), Some(Notice::Renewed { until: s(24) }));
    assert_eq!(lifecycle.action(), watch(s(15)));
}

/// Others that are granted locks all the time do not move the time from which a confirmation counts.
#[test]
fn of_grants_those_are_confirmed_that_came_before() {
    for confirms in [Confirms::Grants, Confirms::All] {
        let timing = Timing { confirms, ..timing() };
        let mut lifecycle = Lifecycle::shared(timing, UNCERTAINTY_WINDOW, 1, 3);
        lifecycle.handle(OPENED, s(0));
        for (number, at) in [(0, 1), (1, 2), (2, 3)] {
            lifecycle.handle(of(number, ClaimEvent::Granted { sent: s(at) }), s(at));
        }
        let first = |lifecycle: &Lifecycle| match lifecycle.session_action() {
            SessionAction::Confirm { granted, .. } => granted,
            _ => None,
        };
        assert_eq!(first(&lifecycle), Some(s(1)));
        // Each of the two has to be seen after the grant.
        assert_eq!(lifecycle.handle(confirmed(0, 4), s(4)), []);
        let told = |notices: Notices| notices.into_iter().map(|(number, _)| number).collect::<Vec<_>>();
        let open_before = confirmed(2, 0);
        assert!(told(lifecycle.clone().handle(open_before, s(4))).is_empty());
        assert_eq!(told(lifecycle.handle(confirmed(2, 4), s(4))), [0, 1]);
        assert_eq!(first(&lifecycle), Some(s(3)));
        assert!(told(lifecycle.handle(confirmed(4, 4), s(4))).contains(&2));
        assert_eq!(first(&lifecycle), None);
    }
}

/// What is confirmed need not be asked for again where the term has to wait for a heartbeat's confirmation.
#[test]
fn a_grant_that_is_confirmed_waits_for_the_lease_alone() {
    let timing = Timing { confirms: Confirms::All, ..timing() };
    let mut lifecycle = Lifecycle::carrier(Timing { begins_fresh: true, ..timing }, 1);
    lifecycle.admit(0, Claim::new(UNCERTAINTY_WINDOW, false), s(0));
    lifecycle.handle(OPENED, s(0));
    lifecycle.handle(granted(0), s(0));
    lifecycle.handle(Event::Session(SessionEvent::Unconfirmed), s(5));
    lifecycle.handle(renewed(5), s(5));
    // The record of before has come to the standbys so late that no term is to begin by what was sent before it.
    assert_eq!(lifecycle.handle(confirmed(1, 5), s(6)), []);
    let waits = SessionAction::Confirm { sent: Some(s(5)), by: Time::MAX, granted: None, last: s(5) };
    assert_eq!(lifecycle.session_action(), waits);
    assert_eq!(tell(&mut lifecycle, confirmed(5, 5), s(7)), acquired(19));
}

/// A grant shows nothing of the locks that were granted before.
#[test]
fn heartbeats_are_sent_while_locks_are_granted_and_confirmed_all_the_time() {
    for confirms in [Confirms::Nothing, Confirms::Grants, Confirms::All] {
        let mut lifecycle = Lifecycle::carrier(Timing { confirms, begins_fresh: true, ..timing() }, 1);
        for number in [0, 1] {
            lifecycle.admit(number, Claim::new(UNCERTAINTY_WINDOW, false), s(0));
        }
        lifecycle.handle(OPENED, s(0));
        lifecycle.handle(granted(0), s(0));
        let mut heartbeats = Vec::new();
        for second in 1..=12 {
            // What was granted a second ago is confirmed, and another lock is granted.
            lifecycle.handle(of(1, ClaimEvent::Granted { sent: s(second) }), s(second));
            if confirms != Confirms::Nothing {
                lifecycle.handle(confirmed(second - 1, second - 1), s(second));
            }
            // Time passes for an engine that has nothing to confirm.
            if let SessionAction::Watch { until } = lifecycle.session_action()
                && until <= s(second)
            {
                lifecycle.handle(TIME_PASSED, s(second));
            }
            if let SessionAction::Renew { .. } = lifecycle.session_action() {
                heartbeats.push(second);
                lifecycle.handle(renewed(second), s(second));
            }
            lifecycle.handle(of(1, ClaimEvent::Release), s(second));
            lifecycle.handle(of(1, ClaimEvent::Unlocked { held: true }), s(second));
            lifecycle.admit(1, Claim::new(UNCERTAINTY_WINDOW, false), s(second));
        }
        assert_eq!(heartbeats, [5, 10], "{confirms:?}");
    }
}

#[test]
fn where_grants_are_confirmed_nothing_is_asked_for_a_claim_that_does_not_wait_any_more() {
    let timing = Timing { confirms: Confirms::Grants, ..timing() };
    let mut lifecycle = Lifecycle::shared(timing, UNCERTAINTY_WINDOW, 1, 2);
    lifecycle.handle(OPENED, s(0));
    lifecycle.handle(of(0, ClaimEvent::Granted { sent: s(0) }), s(0));
    lifecycle.handle(confirmed(1, 1), s(1));
    lifecycle.handle(of(1, ClaimEvent::Granted { sent: s(2) }), s(2));
    let confirm = SessionAction::Confirm { sent: None, by: s(5), granted: Some(s(2)), last: s(2) };
    assert_eq!(lifecycle.session_action(), confirm);
    lifecycle.handle(of(1, ClaimEvent::Release), s(3));
    lifecycle.handle(of(1, ClaimEvent::Unlocked { held: true }), s(3));
    assert_eq!(lifecycle.session_action(), SessionAction::Watch { until: s(5) });
}

/// When heartbeats are sent of a session that began `late` after its manager, each `delay` after it is due. All times are the
/// manager's.
fn heartbeats(late: Duration, delay: Duration) -> Vec<Time> {
    let timing = Timing { rhythm: Rhythm::of(HEARTBEAT, late), ..timing() };
    let mut lifecycle = Lifecycle::dedicated(timing, Claim::new(UNCERTAINTY_WINDOW, false), 1);
    let mut now = delay;
    lifecycle.handle(OPENED, now);
    lifecycle.handle(of(0, ClaimEvent::Granted { sent: now }), now);
    let mut sent = vec![late + now];
    for _ in 0..10 {
        let Action::Session(SessionAction::Watch { until }) = lifecycle.action() else {
            panic!("{:?}", lifecycle.action())
        };
        lifecycle.handle(TIME_PASSED, until - Duration::from_nanos(1));
        assert_eq!(lifecycle.action(), watch(until), "not before its time");
        now = until + delay;
        lifecycle.handle(TIME_PASSED, now);
        assert!(matches!(lifecycle.action(), Action::Session(SessionAction::Renew { .. })));
        lifecycle.handle(Event::Session(SessionEvent::Renewed { sent: now }), now);
        sent.push(late + now);
    }
    sent
}

#[test]
fn the_heartbeats_of_sessions_that_began_at_other_times_are_sent_at_the_same_times() {
    /// How many times there are between two heartbeats of one session.
    const SLOTS: u32 = 16;
    let delay = Duration::from_micros(70);
    let times: HashSet<_> = (0..1_000_u64)
        .flat_map(|nth| {
            let sent = heartbeats(Duration::from_micros(nth * 7_919), delay);
            for pair in sent.windows(2) {
                assert!(pair[1] - pair[0] <= HEARTBEAT + delay, "late: {pair:?}");
                assert!(pair[1] - pair[0] > HEARTBEAT - HEARTBEAT / SLOTS, "too early: {pair:?}");
            }
            // From the first one on they keep the pace.
            assert!(sent[1..].windows(2).all(|pair| pair[1] - pair[0] == HEARTBEAT), "{sent:?}");
            sent.into_iter()
                .skip(1)
                .map(|time| Duration::from_nanos_u128(time.as_nanos() % HEARTBEAT.as_nanos()))
        })
        .collect();
    assert_eq!(times.len(), SLOTS as usize);
}

#[test]
fn a_lock_that_is_held_is_queued_for_slice_by_slice() {
    let mut lifecycle = at("try");
    assert_eq!(tell(&mut lifecycle, BUSY, s(1)), Some(Notice::Busy));
    assert_eq!(lifecycle.action(), QUEUE);
    assert_eq!(tell(&mut lifecycle, SLICE_OVER, s(6)), None);
    assert_eq!(lifecycle.action(), QUEUE);
    assert_eq!(tell(&mut lifecycle, granted(6), s(9)), acquired(20));
    assert_eq!(lifecycle.action(), watch(s(11)));
}

#[test]
fn a_term_that_is_lost_is_followed_by_another() {
    let mut lifecycle = at("watch");
    assert_eq!(tell(&mut lifecycle, TERMINATED, s(1)), lost(LossReason::Terminated));
    assert_eq!(lifecycle.action(), CLOSE);
    assert_eq!(tell(&mut lifecycle, CLOSED, s(1)), None);
    // At once: the first failure of a session says nothing about the next.
    assert_eq!(lifecycle.action(), OPEN);
    assert_eq!(tell(&mut lifecycle, OPENED, s(1)), None);
    assert_eq!(tell(&mut lifecycle, granted(1), s(2)), acquired(15));
}

#[test]
fn a_session_that_is_lost_is_replaced_at_once_if_it_had_served_a_claim() {
    let is_at_once = |lifecycle: &Lifecycle| match lifecycle.action() {
        OPEN => true,
        Action::Session(SessionAction::Pause { .. }) => false,
        action => panic!("{action:?}"),
    };
    for (state, served) in
        [("try", false), ("queue", true), ("watch", true), ("renew", true), ("confirm", true)]
    {
        let mut lifecycle = at(state);
        lifecycle.handle(CUT, s(6));
        lifecycle.handle(CLOSED, s(6));
        assert_eq!(is_at_once(&lifecycle), served, "{state}");
        // What one session has served says nothing of the next.
        if served {
            for event in [OPENED, CUT, CLOSED] {
                lifecycle.handle(event, s(6));
            }
            assert!(!is_at_once(&lifecycle), "{state}, the next");
        }
    }
    // One that refused something may refuse it again, whatever it had served.
    let mut lifecycle = at("queue");
    for event in [REFUSED, CUT, CLOSED] {
        lifecycle.handle(event, s(0));
    }
    assert!(!is_at_once(&lifecycle));
}

#[test]
fn a_grant_that_comes_too_late_is_confirmed_first() {
    // In time by a moment.
    let mut lifecycle = at("try");
    assert_eq!(tell(&mut lifecycle, granted(0), s(14) - Duration::from_nanos(1)), acquired(14));

    let mut lifecycle = at("queue");
    assert_eq!(tell(&mut lifecycle, granted(0), s(14)), None);
    // No term has begun, so none limits the heartbeat.
    assert_eq!(lifecycle.action(), CONFIRM);
    // The answer takes too long again.
    assert_eq!(tell(&mut lifecycle, renewed(14), s(28)), None);
    assert_eq!(lifecycle.action(), CONFIRM);
    assert_eq!(tell(&mut lifecycle, renewed(28), s(29)), acquired(42));
    assert_eq!(lifecycle.action(), watch(s(33)));
}

#[test]
fn a_term_ends_by_its_time_whatever_else_is_heard() {
    let by_time = (CLOSE, lost(LossReason::LeaseNotRenewed));
    for event in [TIME_PASSED, renewed(13), HEARTBEAT_REFUSED, CUT, TERMINATED, REFUSED, BUSY] {
        assert_eq!(step("watch", event, 14), by_time, "{event:?}");
        assert_eq!(step("renew", event, 14), by_time, "{event:?}");
    }
    // The application is faster: it does not want the term any more.
    assert_eq!(step("watch", RELEASE, 14), (UNLOCK, None));
    assert_eq!(step("renew", RELEASE, 14), (UNLOCK, None));
}

#[test]
fn a_term_that_was_renewed_ends_by_its_new_time() {
    let mut lifecycle = at("renew");
    lifecycle.handle(renewed(6), s(7));
    lifecycle.handle(TIME_PASSED, s(11));
    assert_eq!(lifecycle.action(), renew(s(20)));
    let mut in_time = lifecycle.clone();
    assert_eq!(tell(&mut in_time, renewed(11), s(19)), Some(Notice::Renewed { until: s(25) }));
    assert_eq!(tell(&mut lifecycle, renewed(11), s(20)), lost(LossReason::LeaseNotRenewed));
}

/// All states, and events of every kind.
const STATES: [&str; 14] = [
    "open",
    "pause",
    "try",
    "in grace",
    "queue",
    "confirm",
    "watch",
    "renew",
    "unlock",
    "settle",
    "settle at the end",
    "close",
    "close at the end",
    "finish",
];

/// A moment in which the state can be.
fn when(state: &str) -> u64 {
    match state {
        "renew" => 5,
        "confirm" => 14,
        _ => 0,
    }
}

#[test]
fn each_event_that_fits_its_state_leads_on() {
    let failed = Some(Notice::Failed);
    let held = watch(s(5));
    let patiently = Event::Session(SessionEvent::OpenFailed { needs_operator: true });
    let heard = [
        ("open", OPENED, 0, TRY, None),
        ("open", WANTED, 0, OPEN, None),
        ("open", RELEASE, 0, finish(End::Released), None),
        ("pause", TIME_PASSED, 1, OPEN, None),
        ("pause", WANTED, 0, OPEN, None),
        ("pause", RELEASE, 0, finish(End::Released), None),
        ("try", granted(0), 0, held, acquired(14)),
        ("try", granted(0), 14, CONFIRM, None),
        ("try", BUSY, 0, QUEUE, Some(Notice::Busy)),
        ("try", REFUSED, 0, SETTLE, failed),
        ("try", IN_GRACE, 0, IN_GRACE_UNTIL_3, Some(Notice::InGrace)),
        // A session from the pool may have died there: nothing to tell.
        ("try", CUT, 0, CLOSE, None),
        ("try", WANTED, 0, TRY, None),
        ("try", RELEASE, 0, finish(End::Released), None),
        ("in grace", GRACE_LOOKED, 2, IN_GRACE_UNTIL_3, None),
        ("in grace", GRACE_LOOKED, 3, TRY, None),
        ("in grace", CUT, 1, CLOSE, failed),
        ("in grace", WANTED, 1, IN_GRACE_UNTIL_3, None),
        ("in grace", RELEASE, 1, finish(End::Released), None),
        ("queue", granted(0), 0, held, acquired(14)),
        ("queue", granted(0), 14, CONFIRM, None),
        ("queue", SLICE_OVER, 0, QUEUE, None),
        ("queue", REFUSED, 0, SETTLE, failed),
        ("queue", CUT, 0, CLOSE, failed),
        ("queue", WANTED, 0, QUEUE, None),
        ("queue", RELEASE, 0, SETTLE, None),
        ("confirm", renewed(14), 14, watch(s(19)), acquired(28)),
        ("confirm", HEARTBEAT_REFUSED, 14, CLOSE, failed),
        ("confirm", CUT, 14, CLOSE, failed),
        ("confirm", WANTED, 14, CONFIRM, None),
        ("confirm", RELEASE, 14, UNLOCK, None),
        ("watch", TIME_PASSED, 1, held, None),
        ("watch", TIME_PASSED, 5, renew(s(14)), None),
        ("watch", CUT, 1, CLOSE, lost(LossReason::ConnectionClosed)),
        ("watch", WANTED, 1, held, None),
        ("watch", RELEASE, 1, UNLOCK, None),
        ("renew", renewed(5), 6, watch(s(10)), Some(Notice::Renewed { until: s(19) })),
        ("renew", HEARTBEAT_REFUSED, 6, CLOSE, lost(LossReason::ServerError)),
        ("renew", CUT, 6, CLOSE, lost(LossReason::ConnectionClosed)),
        ("renew", WANTED, 6, renew(s(14)), None),
        ("renew", RELEASE, 6, UNLOCK, None),
        ("unlock", UNLOCKED, 0, finish(End::Released), None),
        ("unlock", NOT_HELD, 0, finish(End::NotHeld), None),
        ("unlock", REFUSED, 0, CLOSE, None),
        ("unlock", CUT, 0, CLOSE, None),
        ("unlock", WANTED, 0, UNLOCK, None),
        ("unlock", RELEASE, 0, UNLOCK, None),
        ("settle", SETTLED, 0, CLOSE, None),
        ("settle", SETTLED_UNCLEAR, 0, CLOSE, None),
        ("settle", REFUSED, 0, CLOSE, None),
        ("settle", CUT, 0, CLOSE, None),
        ("settle", WANTED, 0, SETTLE, None),
        ("settle", RELEASE, 0, SETTLE, None),
        ("settle at the end", SETTLED, 0, finish(End::Released), None),
        ("settle at the end", SETTLED_UNCLEAR, 0, finish(End::Released), None),
        ("settle at the end", REFUSED, 0, CLOSE, None),
        ("settle at the end", CUT, 0, CLOSE, None),
        ("settle at the end", WANTED, 0, SETTLE, None),
        ("settle at the end", RELEASE, 0, SETTLE, None),
        ("close", CLOSED, 0, OPEN, None),
        ("close", CUT, 0, CLOSE, None),
        ("close", WANTED, 0, CLOSE, None),
        ("close", RELEASE, 0, CLOSE, None),
        ("close at the end", CLOSED, 0, finish(End::Unconfirmed), None),
        ("close at the end", GONE, 0, finish(End::Released), None),
        ("close at the end", CUT, 0, CLOSE, None),
        ("close at the end", WANTED, 0, CLOSE, None),
        ("close at the end", RELEASE, 0, CLOSE, None),
        ("finish", OPENED, 0, finish(End::Released), None),
        ("finish", OPEN_FAILED, 0, finish(End::Released), None),
        ("finish", WANTED, 0, finish(End::Released), None),
        ("finish", RELEASE, 0, finish(End::Released), None),
    ];
    for (state, event, now, action, notice) in heard {
        assert_eq!(step(state, event, now), (action, notice), "{state}: {event:?}");
    }
    // This leads to a pause, the length of which is another matter.
    let (action, announced) = step("open", patiently, 0);
    assert!(matches!(action, Action::Session(SessionAction::Pause { .. })), "{action:?}");
    assert_eq!(announced, failed);

    // All other events, in every state: they are reported, and change nothing.
    let events = [
        OPENED,
        patiently,
        TIME_PASSED,
        WANTED,
        renewed(0),
        CUT,
        CLOSED,
        BUSY,
        IN_GRACE,
        GRACE_LOOKED,
        granted(0),
        SLICE_OVER,
        REFUSED,
        UNLOCKED,
        SETTLED,
        RELEASE,
    ];
    let mut fitting: HashSet<_> = heard.iter().map(|(state, event, ..)| (*state, kind(*event))).collect();
    fitting.insert(("open", kind(patiently)));
    for state in STATES {
        for event in events.iter().filter(|event| !fitting.contains(&(state, kind(**event)))) {
            assert_reported(&at(state), *event, s(when(state)), state);
        }
    }
}

/// Which event of which machine it is, whatever it carries.
fn kind(event: Event) -> String {
    let text = format!("{event:?}");
    text.split(" {").next().unwrap_or_default().split("Lost(").next().unwrap_or_default().to_owned()
}

/// A debug build stops at an event that cannot be, after it was logged; a release build goes on with what was.
fn assert_reported(lifecycle: &Lifecycle, event: Event, now: Time, what: &str) {
    let mut told = lifecycle.clone();
    let outcome = catch_unwind(AssertUnwindSafe(|| told.handle(event, now)));
    if cfg!(debug_assertions) {
        let panic = outcome.expect_err(&format!("{what}: {event:?} was swallowed"));
        let text = panic.downcast_ref::<String>().cloned().unwrap_or_default();
        assert!(text.contains("cannot happen in"), "{what}: {event:?}: {text}");
    } else {
        assert_eq!(outcome.unwrap_or_default(), [], "{what}: {event:?}");
    }
    assert_eq!(told, *lifecycle, "{what}: {event:?}");
}

#[test]
fn an_event_that_cannot_be_is_reported_and_not_swallowed() {
    assert_reported(&at("watch"), OPENED, s(1), "open already");
    assert_reported(&at("watch"), granted(0), s(1), "held already");
    assert_reported(&at("try"), UNLOCKED, s(0), "nothing to unlock");
    assert_reported(&at("pause"), CUT, s(0), "no session to lose");
    assert_reported(&at("finish"), BUSY, s(0), "over");
    assert_reported(&at("watch"), of(1, ClaimEvent::Busy), s(1), "no such claim");
}

#[test]
fn a_pause_is_not_cut_short() {
    let mut lifecycle = at("pause");
    let Action::Session(SessionAction::Pause { until }) = lifecycle.action() else { panic!("{lifecycle:?}") };
    lifecycle.handle(TIME_PASSED, until - Duration::from_nanos(1));
    assert_eq!(lifecycle.action(), Action::Session(SessionAction::Pause { until }));
    lifecycle.handle(TIME_PASSED, until);
    assert_eq!(lifecycle.action(), OPEN);
}

#[test]
fn what_was_lost_is_uncertain_until_the_server_has_let_go_or_for_the_lease() {
    for state in ["try", "queue", "watch", "unlock", "settle at the end"] {
        for reason in [LossReason::Terminated, LossReason::LeaseExpired, LossReason::ConnectionClosed] {
            for (closed, end) in [(CLOSED, End::Unconfirmed), (GONE, End::Released)] {
                let mut lifecycle = at(state);
                lifecycle.handle(Event::Session(SessionEvent::Lost(reason)), s(1));
                lifecycle.handle(RELEASE, s(2));
                assert_eq!(lifecycle.action(), CLOSE);
                lifecycle.handle(closed, s(2));
                assert_eq!(lifecycle.action(), finish(end), "{state}: {reason:?}");
            }
        }
    }
}

/// Nothing was asked for on it.
#[test]
fn nothing_is_uncertain_of_a_session_that_is_lost_in_a_takeover_grace() {
    let mut lifecycle = at("in grace");
    for event in [CUT, RELEASE, CLOSED] {
        lifecycle.handle(event, s(1));
    }
    assert_eq!(lifecycle.action(), finish(End::Released));
}

#[test]
fn nothing_is_uncertain_of_a_lock_that_something_else_unlocked() {
    let mut lifecycle = at("renew");
    let unlocked = LossReason::Unlocked;
    let event = Event::Session(SessionEvent::Lost(unlocked));
    assert_eq!(tell(&mut lifecycle, event, s(6)), lost(unlocked));
    lifecycle.handle(CLOSED, s(6));
    lifecycle.handle(RELEASE, s(6));
    assert_eq!(lifecycle.action(), finish(End::Released));
}

#[test]
fn a_session_that_is_gone_says_nothing_of_one_that_was_lost_before() {
    let mut lifecycle = after(&[(0, OPENED), (0, granted(0)), (2, CUT), (2, CLOSED)]);
    for event in [OPENED, BUSY, TERMINATED, GONE, RELEASE] {
        lifecycle.handle(event, s(3));
    }
    assert_eq!(lifecycle.action(), finish(End::Unconfirmed));
}

#[test]
fn an_uncertainty_ends_with_the_lease_or_the_next_grant() {
    let lost = after(&[(0, OPENED), (0, granted(0)), (2, CUT), (2, CLOSED)]);
    let released = |events: &[(u64, Event)], now| {
        let mut lifecycle = lost.clone();
        for (at, event) in events {
            lifecycle.handle(*event, s(*at));
        }
        lifecycle.handle(RELEASE, s(now));
        match lifecycle.action() {
            UNLOCK => drop(lifecycle.handle(UNLOCKED, s(now))),
            SETTLE => drop(lifecycle.handle(SETTLED_UNCLEAR, s(now))),
            _ => {}
        }
        lifecycle.action()
    };
    assert_eq!(released(&[], 3), finish(End::Unconfirmed));
    assert_eq!(released(&[], 16), finish(End::Unconfirmed));
    assert_eq!(released(&[], 17), finish(End::Released));
    assert_eq!(released(&[(2, OPEN_FAILED)], 16), finish(End::Unconfirmed));
    assert_eq!(released(&[(3, OPENED)], 16), finish(End::Unconfirmed));
    // The session that has the lock may be the one that was lost.
    assert_eq!(released(&[(3, OPENED), (3, BUSY)], 16), finish(End::Unconfirmed));
    assert_eq!(released(&[(3, OPENED), (3, BUSY)], 17), finish(End::Released));
    // Unless the server says that it has that one no more.
    let mut told = lost.clone();
    for event in [OPENED, BUSY, RELEASE, SETTLED] {
        told.handle(event, s(3));
    }
    assert_eq!(told.action(), finish(End::Released));
    // Only one session can have it.
    assert_eq!(released(&[(3, OPENED), (3, granted(3))], 4), finish(End::Released));
}

#[test]
fn a_term_that_ran_out_is_uncertain_unless_the_session_is_gone() {
    for event in [TIME_PASSED, CUT, TERMINATED] {
        for (closed, end) in [(CLOSED, End::Unconfirmed), (GONE, End::Released)] {
            let mut lifecycle = at("watch");
            lifecycle.handle(event, s(20));
            lifecycle.handle(RELEASE, s(20));
            lifecycle.handle(closed, s(20));
            assert_eq!(lifecycle.action(), finish(end), "{event:?}");
        }
    }
}

#[test]
fn a_claim_that_was_refused_leaves_its_session_without_the_lock_and_nothing_is_uncertain() {
    for state in ["try", "queue"] {
        let mut lifecycle = at(state);
        lifecycle.handle(REFUSED, s(15));
        assert_eq!(lifecycle.action(), SETTLE);
        // Its release may come before or after that.
        let mut early = lifecycle.clone();
        early.handle(RELEASE, s(15));
        early.handle(SETTLED, s(15));
        assert_eq!(early.action(), finish(End::Released), "{state}");
        for event in [SETTLED, CLOSED, RELEASE] {
            lifecycle.handle(event, s(15));
        }
        assert_eq!(lifecycle.action(), finish(End::Released), "{state}");
    }
}

#[test]
fn a_refusal_where_the_lock_is_held_leaves_it_uncertain() {
    let cases = [
        ("confirm", HEARTBEAT_REFUSED, 15),
        ("renew", HEARTBEAT_REFUSED, 6),
        ("unlock", REFUSED, 6),
        ("settle", REFUSED, 6),
        ("settle at the end", REFUSED, 6),
    ];
    for (state, refused, now) in cases {
        let mut lifecycle = at(state);
        for event in [refused, RELEASE, CLOSED] {
            lifecycle.handle(event, s(now));
        }
        assert_eq!(lifecycle.action(), finish(End::Unconfirmed), "{state}");
    }
}

/// The pauses of a session whose attempts fail at once, from when the first failed.
fn pauses(seed: u64, needs_operator: bool, outage: Duration) -> Vec<(Time, Duration)> {
    let mut lifecycle = Lifecycle::dedicated(timing(), Claim::new(UNCERTAINTY_WINDOW, false), seed);
    let begun = s(100);
    let (mut now, mut pauses) = (begun, Vec::new());
    while now < begun + outage {
        lifecycle.handle(Event::Session(SessionEvent::OpenFailed { needs_operator }), now);
        let Action::Session(SessionAction::Pause { until }) = lifecycle.action() else {
            panic!("{lifecycle:?}")
        };
        pauses.push((now - begun, until - now));
        now = until;
        lifecycle.handle(TIME_PASSED, now);
    }
    pauses
}

#[test]
fn a_back_off_grows_with_the_outage_within_bounds() {
    let ms = Duration::from_millis;
    for seed in 0..100 {
        for (needs_operator, shortest) in [(false, ms(5)), (true, ms(200))] {
            for (failing, pause) in pauses(seed, needs_operator, s(60)) {
                let longest = (failing / 8).clamp(shortest, s(2));
                // A nanosecond for the rounding.
                let bounds = longest / 2..=longest + Duration::from_nanos(1);
                assert!(bounds.contains(&pause), "after {failing:?}: {pause:?}");
            }
        }
    }
    // A server that restarts is joined again fast, one that stays away is left in peace.
    let attempts = |outage| pauses(1, false, outage).len();
    assert!(attempts(ms(100)) >= 15, "{}", attempts(ms(100)));
    assert!(attempts(s(60)) <= 150, "{}", attempts(s(60)));
}

#[test]
fn many_sessions_do_not_come_back_in_step() {
    let firsts: HashSet<_> = (0..100).map(|seed| pauses(seed, false, s(1))[0].1).collect();
    assert!(firsts.len() > 90, "{}", firsts.len());
    // Nor does one of them in a rhythm of its own.
    let late: Vec<_> = pauses(1, false, s(100)).into_iter().filter(|(failing, _)| *failing > s(16)).collect();
    let distinct: HashSet<_> = late.iter().map(|(_, pause)| *pause).collect();
    assert_eq!(distinct.len(), late.len());
}

#[test]
fn success_makes_the_next_back_off_short_again() {
    let after_outage = |events: &[Event]| {
        let mut lifecycle = after(&[(0, OPEN_FAILED), (1, TIME_PASSED)]);
        for event in events {
            lifecycle.handle(*event, s(100));
        }
        let Action::Session(SessionAction::Pause { until }) = lifecycle.action() else {
            panic!("{lifecycle:?}")
        };
        until - s(100)
    };
    assert!(after_outage(&[OPEN_FAILED]) >= s(1));
    // A connection is not a success yet.
    assert!(after_outage(&[OPENED, REFUSED, SETTLED, CLOSED]) >= s(1));
    for success in [BUSY, granted(100)] {
        let pause = after_outage(&[OPENED, success, TERMINATED, CLOSED, OPEN_FAILED]);
        assert!(pause <= Duration::from_millis(5), "{success:?}: {pause:?}");
    }
}

#[test]
fn the_machines_have_neither_driver_nor_channel_nor_clock() {
    for source in [
        include_str!("../machine.rs"),
        include_str!("../lifecycle.rs"),
        include_str!("../../session/machine.rs"),
    ] {
        for word in ["Instant", "SystemTime", "crossbeam", "parking_lot", "thread", "sleep", "std::net"] {
            assert!(!source.contains(word), "{word}");
        }
        for line in source.lines().filter(|line| line.starts_with("use ") && line.contains("postgres")) {
            assert!(line.starts_with("use crate::pg::") && line.contains("::machine::"), "{line}");
        }
    }
}

mod shared;
