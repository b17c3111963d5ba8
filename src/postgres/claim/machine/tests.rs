use std::collections::HashSet;

use super::*;

const HEARTBEAT: Duration = Duration::from_secs(5);

/// Heartbeats are sent at whole seconds.
const TIMING: Timing = Timing {
    term: Duration::from_secs(14),
    doubt: Duration::from_secs(15),
    heartbeat: HEARTBEAT,
    rhythm: Rhythm { offset: Duration::ZERO, period: Duration::from_secs(1) },
};

const REFUSED: Event = Event::Refused { patient: false };
const CUT: Event = Event::SessionLost(LossReason::ConnectionClosed);
const DISCARDED: Event = Event::Discarded { gone: false };
const GONE: Event = Event::Discarded { gone: true };
const TERMINATED: Event = Event::SessionLost(LossReason::Terminated);

fn s(seconds: u64) -> Time {
    Duration::from_secs(seconds)
}

fn granted(sent: u64) -> Event {
    Event::Granted { sent: s(sent) }
}

fn renewed(sent: u64) -> Event {
    Event::Renewed { sent: s(sent) }
}

fn acquired(until: u64) -> Option<Notice> {
    Some(Notice::Acquired { until: s(until) })
}

fn lost(reason: LossReason) -> Option<Notice> {
    Some(Notice::Lost(reason))
}

/// A machine to which these things have happened, at these seconds.
fn after(events: &[(u64, Event)]) -> Machine {
    let mut machine = Machine::new(TIMING, 1);
    for (at, event) in events {
        machine.handle(*event, s(*at));
    }
    machine
}

/// The machine in the state before which it does `name`, all at 0 s.
fn at(name: &str) -> Machine {
    let events: &[_] = match name {
        "connect" => &[],
        "pause" => &[Event::ConnectFailed { patient: false }],
        "try" => &[Event::Connected],
        "queue" => &[Event::Connected, Event::Busy],
        "watch" => &[Event::Connected, granted(0)],
        "unlock" => &[Event::Connected, granted(0), Event::Release],
        "settle" => &[Event::Connected, Event::Busy, REFUSED],
        "settle at the end" => &[Event::Connected, Event::Busy, Event::Release],
        "discard" => &[Event::Connected, TERMINATED],
        "discard at the end" => &[Event::Connected, TERMINATED, Event::Release],
        "finish" => &[Event::Release],
        // These two take time to come to.
        "renew" => return after(&[(0, Event::Connected), (0, granted(0)), (5, Event::Quiet)]),
        "confirm" => return after(&[(0, Event::Connected), (14, granted(0))]),
        _ => panic!("no such state: {name}"),
    };
    after(&events.iter().map(|event| (0, *event)).collect::<Vec<_>>())
}

/// What a machine in the state does next, after the event at this second, and what it announces.
fn step(name: &str, event: Event, now: u64) -> (Action, Option<Notice>) {
    let mut machine = at(name);
    let notice = machine.handle(event, s(now));
    (machine.action(), notice)
}

#[test]
fn a_lock_that_is_free_is_had_renewed_and_given_back() {
    let mut machine = Machine::new(TIMING, 1);
    assert_eq!(machine.action(), Action::Connect);
    assert_eq!(machine.handle(Event::Connected, s(1)), None);
    assert_eq!(machine.action(), Action::Try);
    // Asked for at 2 s, answered at 3 s: the term counts from the question.
    assert_eq!(machine.handle(granted(2), s(3)), acquired(16));
    assert_eq!(machine.action(), Action::Watch { until: s(7) });
    // Something woke the watch.
    assert_eq!(machine.handle(Event::Quiet, s(6)), None);
    assert_eq!(machine.action(), Action::Watch { until: s(7) });
    assert_eq!(machine.handle(Event::Quiet, s(7)), None);
    assert_eq!(machine.action(), Action::Renew { by: s(16) });
    assert_eq!(machine.handle(renewed(8), s(9)), Some(Notice::Renewed { until: s(22) }));
    assert_eq!(machine.action(), Action::Watch { until: s(13) });
    assert_eq!(machine.handle(Event::Release, s(10)), None);
    assert_eq!(machine.action(), Action::Unlock);
    assert_eq!(machine.handle(Event::Unlocked { held: true }, s(10)), None);
    assert_eq!(machine.action(), Action::Finish(End::Released));
}

/// When heartbeats are sent of a claim that began `late` after its manager, each `delay` after it is due. All times are the
/// manager's.
fn heartbeats(late: Duration, delay: Duration) -> Vec<Time> {
    let timing = Timing { rhythm: Rhythm::of(HEARTBEAT, late), ..TIMING };
    let mut machine = Machine::new(timing, 1);
    let mut now = delay;
    machine.handle(Event::Connected, now);
    machine.handle(Event::Granted { sent: now }, now);
    let mut sent = vec![late + now];
    for _ in 0..10 {
        let Action::Watch { until } = machine.action() else { panic!("{:?}", machine.action()) };
        machine.handle(Event::Quiet, until - Duration::from_nanos(1));
        assert_eq!(machine.action(), Action::Watch { until }, "not before its time");
        now = until + delay;
        machine.handle(Event::Quiet, now);
        assert!(matches!(machine.action(), Action::Renew { .. }));
        machine.handle(Event::Renewed { sent: now }, now);
        sent.push(late + now);
    }
    sent
}

#[test]
fn the_heartbeats_of_claims_that_began_at_other_times_are_sent_at_the_same_times() {
    let delay = Duration::from_micros(70);
    let times: HashSet<_> = (0..1_000_u64)
        .flat_map(|nth| {
            let sent = heartbeats(Duration::from_micros(nth * 7_919), delay);
            for pair in sent.windows(2) {
                assert!(pair[1] - pair[0] <= HEARTBEAT + delay, "late: {pair:?}");
                assert!(pair[1] - pair[0] > HEARTBEAT - HEARTBEAT / Rhythm::TIMES, "too early: {pair:?}");
            }
            // From the first one on they keep the pace.
            assert!(sent[1..].windows(2).all(|pair| pair[1] - pair[0] == HEARTBEAT), "{sent:?}");
            sent.into_iter()
                .skip(1)
                .map(|time| Duration::from_nanos_u128(time.as_nanos() % HEARTBEAT.as_nanos()))
        })
        .collect();
    assert_eq!(times.len(), Rhythm::TIMES as usize);
}

#[test]
fn a_lock_that_is_held_is_queued_for_slice_by_slice() {
    let mut machine = at("try");
    assert_eq!(machine.handle(Event::Busy, s(1)), Some(Notice::Busy));
    assert_eq!(machine.action(), Action::Queue);
    assert_eq!(machine.handle(Event::SliceOver, s(6)), None);
    assert_eq!(machine.action(), Action::Queue);
    assert_eq!(machine.handle(granted(6), s(9)), acquired(20));
    assert_eq!(machine.action(), Action::Watch { until: s(11) });
}

#[test]
fn a_term_that_is_lost_is_followed_by_another() {
    let mut machine = at("watch");
    assert_eq!(machine.handle(TERMINATED, s(1)), lost(LossReason::Terminated));
    assert_eq!(machine.action(), Action::Discard);
    assert_eq!(machine.handle(DISCARDED, s(1)), None);
    // At once: the first failure of a session says nothing about the next.
    assert_eq!(machine.action(), Action::Connect);
    assert_eq!(machine.handle(Event::Connected, s(1)), None);
    assert_eq!(machine.handle(granted(1), s(2)), acquired(15));
}

#[test]
fn a_grant_that_comes_too_late_is_confirmed_first() {
    // In time by a moment.
    let mut machine = at("try");
    assert_eq!(machine.handle(granted(0), s(14) - Duration::from_nanos(1)), acquired(14));

    let mut machine = at("queue");
    assert_eq!(machine.handle(granted(0), s(14)), None);
    // No term has begun, so none limits the heartbeat.
    assert_eq!(machine.action(), Action::Renew { by: Time::MAX });
    // The answer takes too long again.
    assert_eq!(machine.handle(renewed(14), s(28)), None);
    assert_eq!(machine.action(), Action::Renew { by: Time::MAX });
    assert_eq!(machine.handle(renewed(28), s(29)), acquired(42));
    assert_eq!(machine.action(), Action::Watch { until: s(33) });
}

#[test]
fn a_term_ends_by_its_time_whatever_else_is_heard() {
    let by_time = (Action::Discard, lost(LossReason::LeaseNotRenewed));
    for event in [Event::Quiet, renewed(13), REFUSED, CUT, TERMINATED, Event::Busy] {
        assert_eq!(step("watch", event, 14), by_time, "{event:?}");
        assert_eq!(step("renew", event, 14), by_time, "{event:?}");
    }
    // The application is faster: it does not want the term any more.
    assert_eq!(step("watch", Event::Release, 14), (Action::Unlock, None));
    assert_eq!(step("renew", Event::Release, 14), (Action::Unlock, None));
}

#[test]
fn a_term_that_was_renewed_ends_by_its_new_time() {
    let mut machine = at("renew");
    machine.handle(renewed(6), s(7));
    machine.handle(Event::Quiet, s(11));
    assert_eq!(machine.action(), Action::Renew { by: s(20) });
    assert_eq!(machine.clone().handle(renewed(11), s(19)), Some(Notice::Renewed { until: s(25) }));
    assert_eq!(machine.handle(renewed(11), s(20)), lost(LossReason::LeaseNotRenewed));
}

#[test]
fn each_event_that_fits_its_state_leads_on() {
    use Action::{Connect, Discard, Finish, Queue, Renew, Settle, Try, Unlock, Watch};
    let failed = Some(Notice::Failed);
    let watch = Watch { until: s(5) };
    let connect_failed = Event::ConnectFailed { patient: true };
    let (held, not_held) = (Event::Unlocked { held: true }, Event::Unlocked { held: false });
    let confirm = Renew { by: Time::MAX };
    let heard = [
        ("connect", Event::Connected, 0, Try, None),
        ("connect", Event::Release, 0, Finish(End::Released), None),
        ("pause", Event::Quiet, 1, Connect, None),
        ("pause", Event::Wanted, 0, Connect, None),
        ("pause", Event::Release, 0, Finish(End::Released), None),
        ("try", granted(0), 0, watch, acquired(14)),
        ("try", granted(0), 14, confirm, None),
        ("try", Event::Busy, 0, Queue, Some(Notice::Busy)),
        ("try", REFUSED, 0, Settle, failed),
        // A session from the pool may have died there: nothing to tell.
        ("try", CUT, 0, Discard, None),
        ("try", Event::Release, 0, Finish(End::Released), None),
        ("queue", granted(0), 0, watch, acquired(14)),
        ("queue", granted(0), 14, confirm, None),
        ("queue", Event::SliceOver, 0, Queue, None),
        ("queue", REFUSED, 0, Settle, failed),
        ("queue", CUT, 0, Discard, failed),
        ("queue", Event::Release, 0, Settle, None),
        ("confirm", renewed(14), 14, Watch { until: s(19) }, acquired(28)),
        ("confirm", REFUSED, 14, Settle, failed),
        ("confirm", CUT, 14, Discard, failed),
        ("confirm", Event::Release, 14, Unlock, None),
        ("watch", Event::Quiet, 5, Renew { by: s(14) }, None),
        ("watch", REFUSED, 1, Discard, lost(LossReason::ServerError)),
        ("watch", CUT, 1, Discard, lost(LossReason::ConnectionClosed)),
        ("watch", Event::Release, 1, Unlock, None),
        ("renew", renewed(5), 6, Watch { until: s(10) }, Some(Notice::Renewed { until: s(19) })),
        ("renew", REFUSED, 6, Discard, lost(LossReason::ServerError)),
        ("renew", CUT, 6, Discard, lost(LossReason::ConnectionClosed)),
        ("renew", Event::Release, 6, Unlock, None),
        ("unlock", held, 0, Finish(End::Released), None),
        ("unlock", not_held, 0, Finish(End::NotHeld), None),
        ("unlock", REFUSED, 0, Discard, None),
        ("unlock", CUT, 0, Discard, None),
        ("settle", Event::Settled { clear: true }, 0, Discard, None),
        ("settle", Event::Settled { clear: false }, 0, Discard, None),
        ("settle", REFUSED, 0, Discard, None),
        ("settle", CUT, 0, Discard, None),
        ("settle", Event::Release, 0, Settle, None),
        ("settle at the end", Event::Settled { clear: true }, 0, Finish(End::Released), None),
        ("settle at the end", Event::Settled { clear: false }, 0, Finish(End::Released), None),
        ("settle at the end", REFUSED, 0, Discard, None),
        ("settle at the end", CUT, 0, Discard, None),
        ("discard", Event::Release, 0, Discard, None),
        ("discard at the end", DISCARDED, 0, Finish(End::Unconfirmed), None),
        ("discard at the end", GONE, 0, Finish(End::Released), None),
    ];
    for (state, event, now, action, notice) in heard {
        assert_eq!(step(state, event, now), (action, notice), "{state}: {event:?}");
    }
    // These lead to a pause, the length of which is another matter.
    for (state, event, notice) in [("connect", connect_failed, failed), ("discard", DISCARDED, None)] {
        let (action, announced) = step(state, event, 0);
        assert!(matches!(action, Action::Pause { .. }), "{state}: {event:?}");
        assert_eq!(announced, notice, "{state}: {event:?}");
    }

    // All other events, in every state: nothing changes.
    let states = [
        "connect",
        "pause",
        "try",
        "queue",
        "confirm",
        "watch",
        "renew",
        "unlock",
        "settle",
        "settle at the end",
        "discard",
        "discard at the end",
        "finish",
    ];
    let events = [
        Event::Connected,
        connect_failed,
        Event::Busy,
        granted(0),
        Event::SliceOver,
        REFUSED,
        renewed(0),
        Event::Quiet,
        Event::Wanted,
        CUT,
        held,
        DISCARDED,
        Event::Release,
    ];
    let kind = std::mem::discriminant::<Event>;
    let mut fitting: HashSet<_> = heard.iter().map(|(state, event, ..)| (*state, kind(event))).collect();
    fitting.insert(("connect", kind(&connect_failed)));
    fitting.insert(("discard", kind(&DISCARDED)));
    for state in states {
        for event in events.iter().filter(|event| !fitting.contains(&(state, kind(event)))) {
            let mut machine = at(state);
            let now = if state == "renew" { s(5) } else { Time::ZERO };
            assert_eq!(machine.handle(*event, now), None, "{state}: {event:?}");
            assert_eq!(machine, at(state), "{state}: {event:?}");
        }
    }
}

#[test]
fn a_pause_is_not_cut_short() {
    let mut machine = at("pause");
    let Action::Pause { until } = machine.action() else { panic!("{machine:?}") };
    machine.handle(Event::Quiet, until - Duration::from_nanos(1));
    assert_eq!(machine.action(), Action::Pause { until });
    machine.handle(Event::Quiet, until);
    assert_eq!(machine.action(), Action::Connect);
}

#[test]
fn what_was_lost_is_in_doubt_until_the_server_has_let_go_or_for_the_lease() {
    for state in ["try", "queue", "watch", "unlock", "settle at the end"] {
        for reason in [LossReason::Terminated, LossReason::LeaseExpired, LossReason::ConnectionClosed] {
            for (discarded, end) in [(DISCARDED, End::Unconfirmed), (GONE, End::Released)] {
                let mut machine = at(state);
                machine.handle(Event::SessionLost(reason), s(1));
                machine.handle(Event::Release, s(2));
                assert_eq!(machine.action(), Action::Discard);
                machine.handle(discarded, s(2));
                assert_eq!(machine.action(), Action::Finish(end), "{state}: {reason:?}");
            }
        }
    }
}

#[test]
fn a_lock_that_something_else_unlocked_is_in_no_doubt() {
    let mut machine = at("renew");
    let unlocked = LossReason::Unlocked;
    assert_eq!(machine.handle(Event::SessionLost(unlocked), s(6)), lost(unlocked));
    machine.handle(DISCARDED, s(6));
    machine.handle(Event::Release, s(6));
    assert_eq!(machine.action(), Action::Finish(End::Released));
}

#[test]
fn a_session_that_is_gone_says_nothing_of_one_that_was_lost_before() {
    let mut machine = after(&[(0, Event::Connected), (0, granted(0)), (2, CUT), (2, DISCARDED)]);
    for event in [Event::Connected, Event::Busy, TERMINATED, GONE, Event::Release] {
        machine.handle(event, s(3));
    }
    assert_eq!(machine.action(), Action::Finish(End::Unconfirmed));
}

#[test]
fn a_doubt_ends_with_the_lease_or_the_next_grant() {
    let lost = after(&[(0, Event::Connected), (0, granted(0)), (2, CUT), (2, DISCARDED)]);
    let released = |events: &[(u64, Event)], now| {
        let mut machine = lost.clone();
        for (at, event) in events {
            machine.handle(*event, s(*at));
        }
        machine.handle(Event::Release, s(now));
        machine.handle(Event::Unlocked { held: true }, s(now));
        machine.handle(Event::Settled { clear: false }, s(now));
        machine.action()
    };
    assert_eq!(released(&[], 3), Action::Finish(End::Unconfirmed));
    assert_eq!(released(&[], 16), Action::Finish(End::Unconfirmed));
    assert_eq!(released(&[], 17), Action::Finish(End::Released));
    let failed = (2, Event::ConnectFailed { patient: false });
    assert_eq!(released(&[failed], 16), Action::Finish(End::Unconfirmed));
    assert_eq!(released(&[(3, Event::Connected)], 16), Action::Finish(End::Unconfirmed));
    // The session that has the lock may be the one that was lost.
    assert_eq!(released(&[(3, Event::Connected), (3, Event::Busy)], 16), Action::Finish(End::Unconfirmed));
    assert_eq!(released(&[(3, Event::Connected), (3, Event::Busy)], 17), Action::Finish(End::Released));
    // Unless the server says that it has that one no more.
    let mut told = lost.clone();
    for event in [Event::Connected, Event::Busy, Event::Release, Event::Settled { clear: true }] {
        told.handle(event, s(3));
    }
    assert_eq!(told.action(), Action::Finish(End::Released));
    // Only one session can have it.
    assert_eq!(released(&[(3, Event::Connected), (3, granted(3))], 4), Action::Finish(End::Released));
}

#[test]
fn a_term_that_ran_out_is_in_doubt_unless_the_session_is_gone() {
    for event in [Event::Quiet, CUT, TERMINATED] {
        for (discarded, end) in [(DISCARDED, End::Unconfirmed), (GONE, End::Released)] {
            let mut machine = at("watch");
            machine.handle(event, s(20));
            machine.handle(Event::Release, s(20));
            machine.handle(discarded, s(20));
            assert_eq!(machine.action(), Action::Finish(end), "{event:?}");
        }
    }
}

#[test]
fn a_claim_that_was_refused_leaves_its_session_without_the_lock_and_is_in_no_doubt() {
    for state in ["try", "queue", "confirm"] {
        let mut machine = at(state);
        machine.handle(REFUSED, s(15));
        assert_eq!(machine.action(), Action::Settle);
        // Its release may come before or after that.
        let mut early = machine.clone();
        early.handle(Event::Release, s(15));
        early.handle(Event::Settled { clear: true }, s(15));
        assert_eq!(early.action(), Action::Finish(End::Released), "{state}");
        for event in [Event::Settled { clear: true }, DISCARDED, Event::Release] {
            machine.handle(event, s(15));
        }
        assert_eq!(machine.action(), Action::Finish(End::Released), "{state}");
    }
}

#[test]
fn a_refusal_where_the_lock_is_held_is_in_doubt() {
    for state in ["watch", "renew", "unlock", "settle", "settle at the end"] {
        let mut machine = at(state);
        for event in [REFUSED, Event::Release, DISCARDED] {
            machine.handle(event, s(6));
        }
        assert_eq!(machine.action(), Action::Finish(End::Unconfirmed), "{state}");
    }
}

/// The pauses of a machine whose attempts fail at once, from when the first failed.
fn pauses(seed: u64, patient: bool, outage: Duration) -> Vec<(Time, Duration)> {
    let mut machine = Machine::new(TIMING, seed);
    let begun = s(100);
    let (mut now, mut pauses) = (begun, Vec::new());
    while now < begun + outage {
        machine.handle(Event::ConnectFailed { patient }, now);
        let Action::Pause { until } = machine.action() else { panic!("{machine:?}") };
        pauses.push((now - begun, until - now));
        now = until;
        machine.handle(Event::Quiet, now);
    }
    pauses
}

#[test]
fn a_back_off_grows_with_the_outage_within_bounds() {
    let ms = Duration::from_millis;
    for seed in 0..100 {
        for (patient, shortest) in [(false, ms(5)), (true, ms(200))] {
            for (failing, pause) in pauses(seed, patient, s(60)) {
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
fn many_claims_do_not_come_back_in_step() {
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
        let mut machine = after(&[(0, Event::ConnectFailed { patient: false }), (1, Event::Quiet)]);
        for event in events {
            machine.handle(*event, s(100));
        }
        let Action::Pause { until } = machine.action() else { panic!("{machine:?}") };
        until - s(100)
    };
    let failed = Event::ConnectFailed { patient: false };
    assert!(after_outage(&[failed]) >= s(1));
    // A connection is not a success yet.
    assert!(after_outage(&[Event::Connected, REFUSED, Event::Settled { clear: true }, DISCARDED]) >= s(1));
    for success in [Event::Busy, granted(100)] {
        let pause = after_outage(&[Event::Connected, success, TERMINATED, DISCARDED, failed]);
        assert!(pause <= Duration::from_millis(5), "{success:?}: {pause:?}");
    }
}

#[test]
fn the_machine_has_neither_driver_nor_channel_nor_clock() {
    let source = include_str!("../machine.rs");
    for word in
        ["Instant", "SystemTime", "postgres::", "crossbeam", "parking_lot", "thread", "sleep", "std::net"]
    {
        assert!(!source.contains(word), "{word}");
    }
}
