//! What only a real server brings about: cuts, outages, missing catalogs, few sessions.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crossbeam_channel::{bounded, unbounded};
use dsync::{
    CatalogMode, Config, ErrorKind, Leader, LeaderEvent, LeaderOptions, PostgresManager, SyncManager,
};
use support::netns::Direction;
use support::process::{Signal, signal};
use support::{Server, Shutdown};

use crate::common::{PATIENCE, eventually, kind, started};
use crate::crew::Manner::{Heeds, Ignores};
use crate::crew::{Candidate, Postgres, World, quick};
use crate::proxy::Proxy;

/// The work of a process that is cut off has had its signal before another process begins to work.
#[test]
fn work_that_is_cut_off_has_had_its_signal_before_another_begins() {
    let server = Server::start().unwrap();
    let proxy = Proxy::to(server.port());
    // The signal comes two seconds before the server ends the session.
    let lease = Duration::from_secs(6);
    let through = server.url().replace(&format!(":{}", server.port()), &format!(":{}", proxy.port()));
    let first = started(Config::from_url(&through).unwrap().lease(lease));
    let first = Candidate::of(Arc::new(first), Ignores, quick());
    let work = first.begins();
    let tenure = work.tenure.clone();
    let (sender, begun) = bounded(1);
    let manager = started(Config::from_url(&server.url()).unwrap().lease(lease));
    let second = Leader::start_with(manager.lock("x").unwrap(), quick(), move |own| {
        let heard = tenure.stopping().try_recv().is_err_and(|error| error.is_disconnected());
        let _ = sender.try_send(heard && tenure.must_stop());
        while !own.wait_timeout(PATIENCE) {}
    })
    .unwrap();
    let operator = &mut server.client().unwrap();
    let waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted";
    eventually("a waiter", || operator.query_one(waiting, &[]).unwrap().get::<_, i64>(0) == 1);
    proxy.cut(Direction::Both);
    assert!(begun.recv_timeout(PATIENCE).unwrap(), "another one works unannounced");
    assert!(first.leader.status().at_work);
    assert_eq!([first.hears(), first.hears()], ["gained", "lost"]);
    work.returns();
    proxy.restore();
    second.stop(PATIENCE).unwrap();
    first.begins();
}

#[test]
fn the_status_tells_why_a_leader_without_a_callback_does_not_lead() {
    let server = Server::start().unwrap();
    let manager = started(Config::from_url(&server.url()).unwrap());
    server.stop(Shutdown::Fast).unwrap();
    let lock = manager.lock("x").unwrap();
    let leader = Leader::start(lock, |tenure| while !tenure.wait_timeout(PATIENCE) {}).unwrap();
    eventually("the trouble", || leader.status().last_error.is_some());
    let error = leader.status().last_error.unwrap();
    assert_eq!(error.kind(), ErrorKind::SessionUnavailable, "{error}");
    server.start_again().unwrap();
    eventually("the lead", || leader.status().leads);
    assert!(leader.status().last_error.is_none(), "it is over");
    leader.stop(PATIENCE).unwrap();
}

/// A server that is restarted: the leader hears of its loss, tells what is wrong while nobody can be asked, and leads again.
#[test]
fn a_leader_tells_of_an_outage_and_leads_again_after_it() {
    let server = Server::start().unwrap();
    let candidate =
        Candidate::of(Arc::new(started(Config::from_url(&server.url()).unwrap())), Heeds, quick());
    let work = candidate.begins();
    server.stop(Shutdown::Fast).unwrap();
    work.is_told_to_stop();
    assert_eq!([candidate.hears(), candidate.hears()], ["gained", "lost"]);
    assert_eq!(candidate.hears(), "error: SessionUnavailable");
    assert_eq!(
        candidate.leader.status().last_error.map(|error| error.kind()),
        Some(ErrorKind::SessionUnavailable)
    );
    server.start_again().unwrap();
    assert!(candidate.begins().token() > work.token());
    assert_eq!(candidate.hears(), "gained");
}

/// The server has the session of a term for as long as nobody can tell it that the term is over.
#[test]
fn a_leader_is_not_told_of_its_own_former_term() {
    let world = Postgres::new(0);
    let manager = Arc::new(started(world.config().release_timeout(Duration::from_secs(1))));
    let candidate = Candidate::of(manager, Heeds, quick());
    let work = candidate.begins();
    assert_eq!(candidate.hears(), "gained");
    let backend = candidate.lock.holder().unwrap().expect("the leader").pid;
    signal(backend, Signal::Stop).unwrap();
    work.returns();
    let mut told = Vec::new();
    let mut next = || told.push(candidate.events().recv_timeout(PATIENCE).expect("an event"));
    next();
    next();
    // For some looks it stands beside that session.
    thread::sleep(Duration::from_secs(1));
    signal(backend, Signal::Continue).unwrap();
    candidate.begins();
    next();
    assert!(
        matches!(told[..], [LeaderEvent::Returned, LeaderEvent::Error(_), LeaderEvent::Gained { .. }]),
        "{told:?}"
    );
}

/// Without a catalog there are leaders, whom nobody can ask to resign.
#[test]
fn without_a_catalog_leaders_lead_and_cannot_be_asked_to_resign() {
    let world = Postgres::new(0);
    let manager = || Arc::new(started(world.config().catalog(CatalogMode::None)));
    let first = Candidate::of(manager(), Heeds, quick());
    let work = first.begins();
    assert_eq!((work.tenure.term().token(), first.leader.status().token), (None, None));
    let second = Candidate::of(manager(), Heeds, quick());
    (&world as &dyn World).wait_for_waiters(1);
    assert!(
        matches!(second.events().recv_timeout(PATIENCE), Ok(LeaderEvent::AnotherLeads(holder)) if holder.token.is_none())
    );
    assert_eq!(kind(manager().request_resignation("x")), ErrorKind::InvalidConfig);
    // Nobody of whom the catalog knows holds it.
    let outsider = started(world.config());
    assert!(!outsider.request_resignation("x").unwrap());
    assert!(first.leader.step_down());
    second.begins();
}

/// The questions to the server take a session of their own. Where there is none, the leader leads, and says so once.
#[test]
fn a_leader_whose_manager_has_no_second_session_says_so_and_leads() {
    let world = Postgres::new(0);
    let manager = Arc::new(started(world.config().max_sessions(1)));
    let candidate = Candidate::of(manager, Heeds, quick());
    let work = candidate.begins();
    assert_eq!([candidate.hears(), candidate.hears()], ["gained", "error: PoolExhausted"]);
    world.take_away();
    work.is_told_to_stop();
    candidate.begins();
    assert_eq!([candidate.hears(), candidate.hears()], ["lost", "gained"]);
}

/// A table of the catalog that somebody has locked, or dropped, ends no term.
#[test]
fn a_leader_does_without_the_table_of_resignations() {
    let world = Postgres::new(0);
    let candidate = Candidate::new(&world, Heeds);
    let work = candidate.begins();
    world.run("DROP TABLE dsync.resignation");
    assert_eq!(candidate.hears(), "gained");
    // The next session makes the table anew; a question before that fails.
    let outsider = started(world.config());
    assert!(outsider.request_resignation("x").unwrap());
    work.is_told_to_stop();
}

/// In threads that drive a runtime the calls work, too.
#[test]
fn a_leader_is_started_asked_and_stopped_in_async_code() {
    let world = Postgres::new(0);
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        let manager = PostgresManager::connect(world.config()).unwrap();
        let (sender, begun) = unbounded();
        let leader = Leader::start_with(manager.lock("x").unwrap(), LeaderOptions::new(), move |tenure| {
            sender.send(()).unwrap();
            while !tenure.wait_timeout(PATIENCE) {}
        })
        .unwrap();
        begun.recv_timeout(PATIENCE).unwrap();
        let manager: &dyn SyncManager = &manager;
        assert!(manager.lock("x").unwrap().holder().unwrap().is_some());
        assert!(manager.request_resignation("x").unwrap());
        begun.recv_timeout(PATIENCE).unwrap();
        leader.stop(PATIENCE).unwrap();
    });
}
