//! The cable of the holder's network is pulled, for real: both ways, and each way alone. The holder is a process in a
//! network namespace; the server and the competitor are outside.
//!
//! Linux, as root. Elsewhere the tests say that they were skipped; with `CI=true` in the environment they fail.

use std::thread;
use std::time::{Duration, Instant};

use dsync::Quorum;
use support::Server;
use support::netns::{Direction, Netns};

use crate::common::{Lateness, becomes, eventually, in_both_modes, role};
use crate::cutoff::witness::{Event, Role, WITNESS, Witness, testify};
use crate::cutoff::{
    GRACE, LEASE, Party, all_queue, granted, holds, last_of, length, ms, nothing_is_left, now, queues,
};

in_both_modes! {
    a_holder_cut_off_in_both_directions_loses_before_another_gets
    a_holder_that_hears_nothing_loses_before_another_gets
    a_holder_that_is_not_heard_loses_before_another_gets
    a_holder_that_hears_nothing_has_no_more_than_its_lease
}

const COUNT: usize = 20;

/// The body of the processes below; as a test of its own it does nothing.
#[test]
#[ignore = "the body of a process, which another test starts"]
fn a_witness() {
    if let Some(role) = role() {
        testify(&role);
    }
}

pub(crate) fn namespace() -> Option<Netns> {
    if support::skip_without(Netns::available()) {
        return None;
    }
    Some(Netns::new().unwrap())
}

fn a_holder_cut_off_in_both_directions_loses_before_another_gets(shared_sessions: u32) {
    pull_the_cable(Direction::Both, LEASE, shared_sessions);
}

fn a_holder_that_hears_nothing_loses_before_another_gets(shared_sessions: u32) {
    pull_the_cable(Direction::Inward, LEASE, shared_sessions);
}

fn a_holder_that_is_not_heard_loses_before_another_gets(shared_sessions: u32) {
    pull_the_cable(Direction::Outward, LEASE, shared_sessions);
}

/// Such a holder goes on renewing its lease for a while, without knowing. And the end of its connection may not get
/// through: TCP sends nothing new while what was sent before is not acknowledged.
fn a_holder_that_hears_nothing_has_no_more_than_its_lease(shared_sessions: u32) {
    pull_the_cable(Direction::Inward, Duration::from_secs(9), shared_sessions);
}

fn pull_the_cable(direction: Direction, lease: Duration, shared_sessions: u32) {
    let Some(netns) = namespace() else { return };
    let server = Server::builder().listen([netns.host_address()]).start().unwrap();
    let operator = &mut server.client().unwrap();
    let url = server.url_at(&netns.host_address(), server.port());
    let role = Role { url, count: COUNT, lease, wait_slice: LEASE, quorum: Quorum::Server, shared_sessions };
    let mut witness = Witness::start(&role, &mut role.command_inside(&netns, "partition::a_witness"));
    witness.says_of_all("held", Event::held);
    let competitor = Party::steady("competitor", &server.url(), COUNT);
    let had = competitor.wait_for_all();
    all_queue(operator, &competitor);
    // Anywhere between two heartbeats.
    thread::sleep(Duration::from_micros(now().unsigned_abs() % 700_000));

    let late = Lateness::watch();
    let cut_at = now();
    netns.cut(direction).unwrap();
    let done_at = now();
    let last = last_of(&had, COUNT);
    let late = late.of_a_take_over();
    let grants = granted(operator, COUNT);
    let (lost, last_held) =
        (witness.says_of_all("lost", Event::lost), witness.says_of_all("not held", Event::not_held));
    let heard = witness.says_of_all("heard", Event::heard);
    let mut margins: Vec<_> = grants.iter().zip(&lost).map(|((since, _), lost)| since - lost).collect();
    let mut heard_margins: Vec<_> =
        grants.iter().zip(&heard).map(|((since, _), heard)| since - heard).collect();
    for (index, ((since, _), last_held)) in grants.iter().zip(&last_held).enumerate() {
        assert!(
            margins[index] > 0,
            "lock {index}: stolen {:.3} ms before it was lost",
            ms(margins[index], 0)
        );
        assert!(
            last_held < since,
            "lock {index}: said to be held {:.3} ms after it was not",
            ms(*since, *last_held)
        );
    }
    margins.sort_unstable();
    heard_margins.sort_unstable();
    println!(
        "{direction:?}: {COUNT} holders cut off; lost before stolen by {:.3} ms at the least, {:.3} ms in the median \
         (heard by a waiting thread: {:.3} ms at the least); the last competitor had its lock {:.0} ms after the cut",
        ms(0, margins[0]),
        ms(0, margins[COUNT / 2]),
        ms(0, heard_margins[0]),
        ms(done_at, last),
    );
    let bound = length(lease + GRACE + late) + (done_at - cut_at);
    assert!(last - cut_at <= bound, "{:.0} ms, the bound is {:.0} ms", ms(cut_at, last), ms(0, bound));

    netns.restore(direction).unwrap();
    let restored_at = Instant::now();
    becomes("the queue of the witness", &COUNT, || queues(operator, WITNESS));
    println!("{direction:?}: all in the queue {:.1?} after the end of the cut", restored_at.elapsed());
    let released_at = now();
    competitor.release_all();
    assert!(witness.says_of_all("held again", Event::held).iter().all(|&by| by > released_at));
    becomes("the locks of the witness", &COUNT, || holds(operator, WITNESS));
    witness.process.kill();
    nothing_is_left(operator);
}

/// The cut is at the waiter's, which has sessions of its own in either mode; the holder outside goes on.
#[test]
fn a_waiter_whose_cable_is_pulled_is_passed_over_and_queues_again() {
    let Some(netns) = namespace() else { return };
    let server = Server::builder().listen([netns.host_address()]).start().unwrap();
    let operator = &mut server.client().unwrap();
    let url = server.url_at(&netns.host_address(), server.port());
    // How many were told that they have the lock.
    let mut told = |direction| {
        let holder = Party::steady("holder", &server.url(), COUNT);
        holder.lock_all();
        let (url, quorum) = (url.clone(), Quorum::Server);
        let role = Role { url, count: COUNT, lease: LEASE, wait_slice: LEASE, quorum, shared_sessions: 0 };
        let mut witness = Witness::start(&role, &mut role.command_inside(&netns, "partition::a_witness"));
        becomes("the queue of the witness", &COUNT, || queues(operator, WITNESS));
        let next = Party::steady("next", &server.url(), COUNT);
        let had = next.wait_for_all();
        all_queue(operator, &next);

        let late = Lateness::watch();
        netns.cut(direction).unwrap();
        let released_at = now();
        holder.release_all();
        let last = last_of(&had, COUNT);
        println!("{direction:?}: passed over within {:.0} ms", ms(released_at, last));
        let bound = length(LEASE + GRACE + late.of_a_take_over());
        assert!(last - released_at <= bound, "{:.0} ms of {:.0} ms", ms(released_at, last), ms(0, bound));
        let grants = granted(operator, COUNT);
        becomes("the sessions of the witness", &0, || queues(operator, WITNESS) + holds(operator, WITNESS));
        let mut said = witness.rest();
        let lost: Vec<_> =
            said.iter().filter_map(|(number, event, _)| Some((*number, event.lost()?))).collect();
        for (number, lost) in &lost {
            let since = grants[*number].0;
            assert!(*lost < since, "stolen {:.3} ms before it was lost", ms(since, *lost));
        }
        netns.restore(direction).unwrap();
        let restored_at = Instant::now();
        becomes("the queue of the witness", &COUNT, || queues(operator, WITNESS));
        println!("{direction:?}: all in the queue {:.1?} after the end of the cut", restored_at.elapsed());
        if direction != Direction::Outward {
            said.extend(witness.rest());
            assert!(said.iter().all(|(_, event, _)| event.held().is_none()), "two were told: {said:?}");
        }
        witness.process.kill();
        next.release_all();
        nothing_is_left(operator);
        lost.len()
    };
    assert_eq!(told(Direction::Both), 0);
    assert_eq!(told(Direction::Inward), 0);
    // One that hears but is not heard has the lock until it gets no answer: unless its slice ended before, or had begun so long ago that it first
    // asks once more. On a busy machine that may be so of all.
    eventually("a waiter that was told", || told(Direction::Outward) > 0);
}
