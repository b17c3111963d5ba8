//! What a leader promises, on each implementation of locks: every behaviour is one test named `contract::memory::…` and one
//! named `contract::postgres::…`.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{bounded, unbounded};
use dsync::{ErrorKind, Leader, LeaderEvent, LeaderOptions, LockOptions, LossReason};

use crate::common::{Lateness, PATIENCE, eventually, kind, on_both, soon};
use crate::crew::Manner::{Heeds, Ignores};
use crate::crew::{Candidate, Memory, Postgres, World, quick};

on_both! {
    // Whose work runs when.
    work_runs_in_each_term_on_a_thread_that_has_the_name_of_the_lock
    the_lock_is_given_back_when_the_work_has_returned_and_not_before
    work_that_returns_lets_others_lead_and_leads_again
    work_that_ignores_its_loss_has_had_its_signal_before_another_begins
    work_that_outlives_its_term_takes_nothing_from_the_next_leader
    a_panic_ends_the_term_and_is_told_and_others_lead
    panics_are_followed_by_growing_pauses
    two_leaders_of_one_process_take_turns
    // Stepping down.
    five_processes_that_step_down_all_get_their_turns
    stepping_down_is_for_leaders_only
    who_comes_while_a_leader_stands_back_leads
    another_process_asks_for_a_resignation
    a_resignation_is_not_for_the_next_term
    // Stopping.
    a_stop_waits_for_the_work_no_longer_than_it_may
    a_candidate_that_waits_stops_at_once
    work_may_stop_its_own_leader
    a_drop_does_not_wait_for_work_that_goes_on
    a_manager_that_stops_ends_its_leaders
    a_manager_that_stops_ends_a_leader_that_pauses
    // What is told.
    a_callback_that_panics_or_blocks_harms_nothing
    a_loss_is_told_while_the_work_ignores_it
    another_leader_is_told_of_once_in_each_term
    another_leader_without_a_token_is_told_of_again_after_a_term_of_one_s_own
    the_status_tells_what_the_leader_is_about
    options_that_cannot_work_are_refused
}

// ---------------------------------------------------------------------------------------------------------------------
// Whose work runs when
// ---------------------------------------------------------------------------------------------------------------------

fn work_runs_in_each_term_on_a_thread_that_has_the_name_of_the_lock(world: &dyn World) {
    let manager = world.manager();
    let (sender, begun) = unbounded();
    let leader = Leader::start(manager.lock("x").unwrap(), move |tenure| {
        let name = thread::current().name().map(str::to_owned);
        sender.send((name, tenure.term().token(), tenure.term().is_held())).unwrap();
        while !tenure.wait_timeout(PATIENCE) {}
    })
    .unwrap();
    let first = begun.recv_timeout(PATIENCE).unwrap();
    assert_eq!((first.0.as_deref(), first.2), (Some("dsync:x"), true));
    assert_eq!(leader.status().token, first.1);
    world.take_away();
    let second = begun.recv_timeout(PATIENCE).unwrap();
    assert!(second.1 > first.1 && second.2);
    leader.stop(PATIENCE).unwrap();
}

fn the_lock_is_given_back_when_the_work_has_returned_and_not_before(world: &dyn World) {
    let first = Candidate::new(world, Ignores);
    let work = first.begins();
    let second = Candidate::new(world, Heeds);
    world.wait_for_waiters(1);
    assert!(first.leader.step_down());
    work.is_told_to_stop();
    // What should happen is nothing: others wait on, and the lock is still had.
    thread::sleep(Duration::from_millis(300));
    assert!(second.has_not_begun() && work.tenure.term().is_held());
    assert!(first.leader.status().at_work);
    work.returns();
    second.begins();
    assert!(!work.tenure.term().is_held());
}

fn work_that_returns_lets_others_lead_and_leads_again(world: &dyn World) {
    let first = Candidate::new(world, Heeds);
    let work = first.begins();
    let second = Candidate::new(world, Heeds);
    world.wait_for_waiters(1);
    work.returns();
    let next = second.begins();
    assert!(next.token() > work.token());
    assert_eq!([first.hears(), first.hears()], ["gained", "returned"]);
    world.wait_for_waiters(1);
    next.returns();
    assert!(first.begins().token() > next.token());
}

fn work_that_ignores_its_loss_has_had_its_signal_before_another_begins(world: &dyn World) {
    let first = Candidate::new(world, Ignores);
    let work = first.begins();
    let (sender, begun) = bounded(1);
    let tenure = work.tenure.clone();
    let manager = world.manager();
    let second = Leader::start_with(manager.lock("x").unwrap(), quick(), move |own| {
        let _ = sender
            .try_send((tenure.must_stop(), tenure.stopping().try_recv().is_err_and(|e| e.is_disconnected())));
        while !own.wait_timeout(PATIENCE) {}
    })
    .unwrap();
    world.wait_for_waiters(1);
    world.take_away();
    let heard = begun.recv_timeout(PATIENCE).unwrap();
    assert!(heard == (true, true) || !world.announces_first(), "{heard:?}");
    work.is_told_to_stop();
    assert!(first.leader.status().at_work && !first.leader.status().leads && second.status().leads);
    work.returns();
}

fn work_that_outlives_its_term_takes_nothing_from_the_next_leader(world: &dyn World) {
    let first = Candidate::new(world, Ignores);
    let work = first.begins();
    let second = Candidate::new(world, Heeds);
    world.wait_for_waiters(1);
    world.take_away();
    work.is_told_to_stop();
    let next = second.begins();
    assert!(first.has_not_begun());
    work.returns();
    // The first one stands again, and what it gave back was not the lock of the second.
    world.wait_for_waiters(1);
    assert!(next.may_go_on() && next.tenure.term().is_held());
    assert!(second.leader.step_down());
    assert!(first.begins().token() > next.token());
    assert_eq!([first.hears(), first.hears(), first.hears()], ["gained", "lost", "gained"]);
    assert_eq!([second.hears(), second.hears()], ["gained", "stepped down"]);
}

fn a_panic_ends_the_term_and_is_told_and_others_lead(world: &dyn World) {
    let options = quick().back_off(Duration::from_millis(1), Duration::from_millis(1));
    let first = Candidate::with(world, Heeds, options);
    let work = first.begins();
    let second = Candidate::new(world, Heeds);
    world.wait_for_waiters(1);
    work.panics("out of paper");
    let next = second.begins();
    assert!(!work.tenure.term().is_held());
    assert_eq!([first.hears(), first.hears()], ["gained", "panicked: out of paper"]);
    assert_eq!(first.leader.status().last_panic.as_deref(), Some("out of paper"));
    world.wait_for_waiters(1);
    next.returns();
    assert!(first.begins().may_go_on(), "it leads again");
}

fn panics_are_followed_by_growing_pauses(world: &dyn World) {
    // A term that lasts for the longest of them, as it may on a busy machine, begins anew with the first.
    let (first, longest) = (Duration::from_millis(600), Duration::from_secs(2));
    let candidate = Candidate::with(world, Heeds, quick().back_off(first, longest));
    let mut work = candidate.begins();
    for pause in [first, first * 2, longest, longest] {
        // The pause begins some moments later.
        let panicked = Instant::now();
        work.panics("again");
        assert_eq!([candidate.hears(), candidate.hears()], ["gained", "panicked: again"]);
        work = candidate.begins();
        let paused = panicked.elapsed();
        assert!(paused >= pause, "{paused:?} instead of {pause:?}");
    }
    work.returns();
    assert_eq!([candidate.hears(), candidate.hears()], ["gained", "returned"]);
    candidate.begins().panics("once");
    candidate.begins();
}

fn two_leaders_of_one_process_take_turns(world: &dyn World) {
    let manager = world.manager();
    let first = Candidate::of(Arc::clone(&manager), Heeds, quick());
    let work = first.begins();
    let second = Candidate::of(manager, Heeds, quick());
    assert!(second.has_not_begun());
    // Threads of one process wait in a line of their own.
    let waits = |candidate: &Candidate| {
        eventually("a waiting thread", || format!("{:?}", candidate.lock).contains("waiting_threads: 1"));
    };
    waits(&second);
    work.returns();
    let next = second.begins();
    waits(&first);
    next.returns();
    first.begins();
}

// ---------------------------------------------------------------------------------------------------------------------
// Stepping down
// ---------------------------------------------------------------------------------------------------------------------

fn five_processes_that_step_down_all_get_their_turns(world: &dyn World) {
    const COUNT: usize = 5;
    let (sender, begun) = unbounded();
    let inside = Arc::new(AtomicUsize::new(0));
    let managers = [(); COUNT].map(|()| world.manager());
    let leaders: Vec<_> = (managers.iter().enumerate())
        .map(|(number, manager)| {
            let (sender, inside) = (sender.clone(), Arc::clone(&inside));
            let work = move |tenure: &dsync::Tenure| {
                let before = inside.fetch_add(1, Ordering::SeqCst);
                let _ = sender.send((number, before));
                while !tenure.wait_timeout(PATIENCE) {}
                inside.fetch_sub(1, Ordering::SeqCst);
            };
            Leader::start_with(manager.lock("x").unwrap(), quick(), work).unwrap()
        })
        .collect();
    world.wait_for_waiters(COUNT - 1);
    let mut turns = [0; COUNT];
    while turns.contains(&0) {
        let (number, before) = begun.recv_timeout(PATIENCE).unwrap();
        assert_eq!(before, 0, "another one is at work");
        turns[number] += 1;
        assert!(turns.iter().sum::<usize>() <= COUNT * COUNT, "somebody is passed over: {turns:?}");
        assert!(leaders[number].step_down());
    }
    println!("turns: {turns:?}");
}

fn stepping_down_is_for_leaders_only(world: &dyn World) {
    let first = Candidate::new(world, Heeds);
    let work = first.begins();
    let second = Candidate::new(world, Heeds);
    world.wait_for_waiters(1);
    assert!(!second.leader.step_down());
    assert!(work.may_go_on());
    assert!(first.leader.step_down());
    second.begins();
    assert_eq!([first.hears(), first.hears()], ["gained", "stepped down"]);
}

fn who_comes_while_a_leader_stands_back_leads(world: &dyn World) {
    for steps_down in [true, false] {
        let options = quick().stand_back(PATIENCE * 10);
        let first = Candidate::with(world, Heeds, options);
        let work = first.begins();
        if steps_down {
            assert!(first.leader.step_down());
        } else {
            work.returns();
        }
        assert_eq!(first.hears(), "gained");
        assert_eq!(first.hears(), if steps_down { "stepped down" } else { "returned" });
        let second = Candidate::new(world, Heeds);
        second.begins();
        assert!(first.has_not_begun());
        first.leader.stop(PATIENCE).unwrap();
    }
}

fn another_process_asks_for_a_resignation(world: &dyn World) {
    let outsider = world.manager();
    assert!(!outsider.request_resignation("x").unwrap(), "nobody leads");
    let first = Candidate::new(world, Heeds);
    let work = first.begins();
    let second = Candidate::new(world, Heeds);
    world.wait_for_waiters(1);
    assert!(outsider.request_resignation("x").unwrap());
    work.is_told_to_stop();
    let next = second.begins();
    assert_eq!([first.hears(), first.hears()], ["gained", "stepped down"]);
    world.wait_for_waiters(1);
    assert!(second.leader.step_down());
    assert!(first.begins().token() > next.token(), "it stands again");
    assert_eq!(kind(outsider.request_resignation("")), ErrorKind::InvalidKey);
}

fn a_resignation_is_not_for_the_next_term(world: &dyn World) {
    let outsider = world.manager();
    // A guard does not listen; whoever leads after it is not meant.
    let guard = outsider.lock("x").unwrap().acquire(soon()).unwrap();
    assert!(outsider.request_resignation("x").unwrap());
    let candidate = Candidate::new(world, Heeds);
    world.wait_for_waiters(1);
    guard.release().unwrap();
    let work = candidate.begins();
    // What should happen is nothing, for some heartbeats.
    thread::sleep(Duration::from_millis(700));
    assert!(work.may_go_on());

    let options = LockOptions::new().without_token();
    let without = world.manager().lock_with("y", options).unwrap();
    assert_eq!(kind(without.request_resignation()), ErrorKind::InvalidConfig);
}

// ---------------------------------------------------------------------------------------------------------------------
// Stopping
// ---------------------------------------------------------------------------------------------------------------------

fn a_stop_waits_for_the_work_no_longer_than_it_may(world: &dyn World) {
    let candidate = Candidate::new(world, Ignores);
    let work = candidate.begins();
    let error = candidate.leader.stop(Duration::from_millis(50)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    assert!(work.tenure.must_stop() && work.tenure.term().is_held(), "{error}");
    assert!(!candidate.leader.status().stands && candidate.leader.status().at_work);
    work.returns();
    candidate.leader.stop(PATIENCE).unwrap();
    assert!(!work.tenure.term().is_held() && candidate.has_not_begun());
    assert_eq!([candidate.hears(), candidate.hears()], ["gained", "stopped"]);
    assert!(candidate.events().recv().is_err(), "the callback is dropped");
    world
        .manager()
        .lock("x")
        .unwrap()
        .try_acquire()
        .unwrap()
        .expect("the lock is given back")
        .release()
        .unwrap();
    candidate.leader.stop(Duration::ZERO).unwrap();
    assert!(!candidate.leader.step_down());
}

fn a_candidate_that_waits_stops_at_once(world: &dyn World) {
    let first = Candidate::new(world, Heeds);
    let work = first.begins();
    let second = Candidate::new(world, Heeds);
    world.wait_for_waiters(1);
    second.leader.stop(PATIENCE).unwrap();
    assert_eq!(second.hears(), "stopped");
    world.wait_for_waiters(0);
    assert!(work.may_go_on());
}

fn work_may_stop_its_own_leader(world: &dyn World) {
    let manager = world.manager();
    let (give, given) = bounded::<Arc<Leader>>(1);
    let (tell, told) = bounded(1);
    let leader = Leader::start(manager.lock("x").unwrap(), move |tenure| {
        let leader = given.recv().unwrap();
        tell.send((leader.stop(PATIENCE * 2), tenure.must_stop())).unwrap();
    })
    .unwrap();
    let leader = Arc::new(leader);
    give.send(Arc::clone(&leader)).unwrap();
    let (outcome, must_stop) = told.recv_timeout(PATIENCE).unwrap();
    assert_eq!((kind(outcome), must_stop), (ErrorKind::TimedOut, true));
    leader.stop(PATIENCE).unwrap();
}

fn a_drop_does_not_wait_for_work_that_goes_on(world: &dyn World) {
    let candidate = Candidate::new(world, Ignores);
    let work = candidate.begins();
    let Candidate { leader, lock, .. } = candidate;
    let dropped = Instant::now();
    drop(leader);
    assert!(dropped.elapsed() < Duration::from_secs(5), "{:?}", dropped.elapsed());
    assert!(work.tenure.must_stop() && work.tenure.term().is_held());
    assert!(lock.try_acquire().unwrap().is_none(), "the lock is not free while the work goes on");
    work.returns();
    lock.acquire(soon()).unwrap().release().unwrap();
}

fn a_manager_that_stops_ends_its_leaders(world: &dyn World) {
    let first = Candidate::new(world, Ignores);
    let work = first.begins();
    let second = Candidate::new(world, Heeds);
    world.wait_for_waiters(1);
    second.manager.stop().unwrap();
    assert_eq!([second.hears(), second.hears()], ["error: SyncManagerStopped", "stopped"]);
    first.manager.stop().unwrap();
    work.is_told_to_stop();
    work.returns();
    assert_eq!(first.hears(), "gained");
    assert_eq!([first.hears(), first.hears()], ["error: SyncManagerStopped", "stopped"]);
    assert!(!first.leader.status().stands);
    let late = Leader::start(Arc::clone(&first.lock), |_| {});
    assert_eq!(kind(late), ErrorKind::SyncManagerStopped);
}

fn a_manager_that_stops_ends_a_leader_that_pauses(world: &dyn World) {
    let candidate = Candidate::with(world, Heeds, quick().back_off(PATIENCE * 10, PATIENCE * 10));
    candidate.begins().panics("for good");
    assert_eq!([candidate.hears(), candidate.hears()], ["gained", "panicked: for good"]);
    candidate.manager.stop().unwrap();
    assert_eq!([candidate.hears(), candidate.hears()], ["error: SyncManagerStopped", "stopped"]);
}

// ---------------------------------------------------------------------------------------------------------------------
// What is told
// ---------------------------------------------------------------------------------------------------------------------

fn a_callback_that_panics_or_blocks_harms_nothing(world: &dyn World) {
    let (tell, events) = unbounded();
    let (go_on, blocked) = bounded::<()>(0);
    let options = quick().on_event(move |event| {
        tell.send(event.clone()).unwrap();
        match event {
            LeaderEvent::Gained { .. } => panic!("at a gain"),
            LeaderEvent::SteppedDown => drop(blocked.recv()),
            _ => {}
        }
    });
    let candidate = Candidate::silent(world.manager(), Heeds, options, events);
    let _work = candidate.begins();
    assert_eq!(candidate.hears(), "gained");
    assert!(candidate.leader.step_down());
    assert_eq!(candidate.hears(), "stepped down");
    // It blocks, and the work goes on, over a loss and to the end.
    let work = candidate.begins();
    world.take_away();
    work.is_told_to_stop();
    let _work = candidate.begins();
    candidate.leader.stop(PATIENCE).unwrap();
    assert!(candidate.events().is_empty());
    drop(go_on);
    let rest: [String; 4] = std::array::from_fn(|_| candidate.hears());
    assert_eq!(rest, ["gained", "lost", "gained", "stopped"]);
}

fn a_loss_is_told_while_the_work_ignores_it(world: &dyn World) {
    let candidate = Candidate::new(world, Ignores);
    let work = candidate.begins();
    assert_eq!(candidate.hears(), "gained");
    world.take_away();
    let LeaderEvent::Lost(loss) = candidate.next_event() else { panic!("a loss") };
    assert!([LossReason::Revoked, LossReason::Terminated].contains(&loss.reason), "{loss:?}");
    let status = candidate.leader.status();
    assert!(status.at_work && !status.leads && status.last_loss == Some(loss), "{status:?}");
    work.returns();
    assert_eq!(candidate.hears(), "gained");
    assert_eq!(candidate.leader.status().terms, 2);
}

fn another_leader_is_told_of_once_in_each_term(world: &dyn World) {
    let annotated = LockOptions::new().valuer(Arc::new(|| b"the first".to_vec()));
    let manager = world.manager();
    // Made before the leader asks for it, so that the options are these.
    let _lock = manager.lock_with("x", annotated).unwrap();
    let first = Candidate::of(manager, Heeds, quick());
    let work = first.begins();
    let second = Candidate::new(world, Heeds);
    let others = || match second.events().recv_timeout(PATIENCE).expect("an event") {
        LeaderEvent::AnotherLeads(holder) => holder,
        other => panic!("{other:?}"),
    };
    let holder = others();
    assert_eq!((holder.token, holder.annotation.as_deref()), (Some(work.token()), Some(&b"the first"[..])));
    assert_eq!(second.leader.status().leader.map(|leader| leader.token), Some(holder.token));
    assert_eq!(second.lock.holder().unwrap().map(|leader| leader.token), Some(holder.token));
    // For some looks nothing is told.
    thread::sleep(Duration::from_millis(500));
    assert!(second.events().is_empty());
    // Neither of itself, unless its thread comes to know of the term only after two looks, which are 200 ms apart.
    let late = Lateness::watch();
    work.returns();
    let next = second.begins();
    let mut event = second.events().recv_timeout(PATIENCE).unwrap();
    if matches!(&event, LeaderEvent::AnotherLeads(own) if own.token == Some(next.token()))
        && late.of_a_take_over() >= 5 * Duration::from_millis(200)
    {
        event = second.events().recv_timeout(PATIENCE).unwrap();
    }
    assert!(matches!(event, LeaderEvent::Gained { token } if token == Some(next.token())), "{event:?}");
    world.wait_for_waiters(1);
    assert_eq!(second.leader.status().leader, None);
    next.returns();
    let again = first.begins();
    assert_eq!(second.hears(), "returned");
    assert_eq!(others().token, Some(again.token()));
    second.leader.stop(PATIENCE).unwrap();
    first.leader.stop(PATIENCE).unwrap();
    assert_eq!(world.manager().lock("x").unwrap().holder().unwrap(), None);
}

fn another_leader_without_a_token_is_told_of_again_after_a_term_of_one_s_own(world: &dyn World) {
    let candidate = || {
        let manager = world.manager();
        // As above.
        let lock = manager.lock_with("x", LockOptions::new().without_token()).unwrap();
        (Candidate::of(manager, Heeds, quick()), lock)
    };
    let (first, _its_lock) = candidate();
    let work = first.begins();
    let (second, _its_lock_too) = candidate();
    let is_told = || matches!(second.events().recv_timeout(PATIENCE), Ok(LeaderEvent::AnotherLeads(_)));
    assert!(is_told());
    work.returns();
    let next = second.begins();
    assert_eq!(second.hears(), "gained");
    world.wait_for_waiters(1);
    next.returns();
    let _again = first.begins();
    assert_eq!(second.hears(), "returned");
    assert!(is_told());
    second.leader.stop(PATIENCE).unwrap();
    first.leader.stop(PATIENCE).unwrap();
}

fn the_status_tells_what_the_leader_is_about(world: &dyn World) {
    let guard = world.manager();
    let guard = guard.lock("x").unwrap().acquire(soon()).unwrap();
    let candidate = Candidate::new(world, Heeds);
    world.wait_for_waiters(1);
    let status = candidate.leader.status();
    assert!(status.stands && !status.leads && !status.at_work && status.terms == 0, "{status:?}");
    guard.release().unwrap();
    let work = candidate.begins();
    let status = candidate.leader.status();
    assert!(status.stands && status.leads && status.at_work && status.terms == 1, "{status:?}");
    assert_eq!(status.token, Some(work.token()));
    assert!(status.since.unwrap().elapsed().unwrap() < PATIENCE && status.last_error.is_none());
    let shown = format!("{:?} {:?}", candidate.leader, work.tenure);
    assert!(shown.contains("key: \"x\"") && shown.contains("must_stop: false"), "{shown}");
    candidate.leader.stop(PATIENCE).unwrap();
    let status = candidate.leader.status();
    assert!(!status.stands && !status.leads && !status.at_work && status.since.is_none(), "{status:?}");
}

fn options_that_cannot_work_are_refused(world: &dyn World) {
    let manager = world.manager();
    let start = |options| kind(Leader::start_with(manager.lock("x").unwrap(), options, |_| {}));
    let (second, minute) = (Duration::from_secs(1), Duration::from_secs(60));
    assert_eq!(start(LeaderOptions::new().back_off(minute, second)), ErrorKind::InvalidConfig);
    assert_eq!(
        start(LeaderOptions::new().back_off(Duration::ZERO, Duration::ZERO)),
        ErrorKind::InvalidConfig
    );
    assert_eq!(start(LeaderOptions::new().watch_interval(Duration::ZERO)), ErrorKind::InvalidConfig);
}
