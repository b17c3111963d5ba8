//! Heartbeats that the standbys confirm: while a standby is promoted and the old primary lives on, a holder there loses its lock before
//! another one is granted it on the new primary. The tests of one mode are about what is asked of standbys and settings, which is the same for all
//! sessions.

use std::thread;
use std::time::{Duration, Instant};

use dsync::crossbeam_channel::{TryRecvError, bounded};
use dsync::{Config, Context, ErrorKind, LossReason, PostgresManager, Quorum, SyncManager, Term, Verdict};
use postgres::Client;
use support::netns::{Direction, Netns};
use support::process::{self as system, Signal};
use support::{Replication, Server};

use crate::common::{
    Lateness, PATIENCE, Process, becomes, begin, eventually, hear, in_both_modes, is_held, is_open, kind,
    lock, process, role, soon, started,
};
use crate::cutoff::proxy::Proxy;
use crate::cutoff::witness::{Event, Role, Witness, testify};
use crate::cutoff::{Party, config, granted, last_of, micros, ms, now, releases_are_short};
use crate::partition::namespace;
use crate::takeover::{LOGGED, Logger};

in_both_modes! {
    nobody_gets_the_lock_of_a_holder_on_an_old_primary_that_lives_on
    #[ignore = "takes minutes: cargo test --test outages quorum -- --ignored --nocapture"]
    nobody_gets_the_lock_of_a_holder_on_an_old_primary_in_fifty_promotions
    a_holder_that_stands_still_during_the_promotion_has_lost_its_lock_when_it_goes_on
    an_old_primary_comes_back_as_a_copy_of_the_new_one_and_so_do_the_locks
    a_cancelled_heartbeat_and_a_setting_that_is_emptied_confirm_nothing
    a_standby_that_goes_away_ends_the_term_in_time_and_the_lock_comes_back_with_it
    the_log_tells_of_a_standby_that_is_away_for_a_short_time
}

/// Long enough for a promotion within a term, on a busy machine too.
const LEASE: Duration = Duration::from_secs(5);

/// How many locks the holder has: as many runs.
const LOCKS: usize = 5;

/// How the old primary comes to be apart from its standby.
#[derive(Clone, Copy, Debug)]
enum Split {
    /// The standby is promoted, and tells the old primary.
    Told,
    /// As `Told`, and the old primary has another standby that goes on: one of the two, chosen in this way, is enough for its commits.
    OneOfTwo(&'static str),
    /// The process of the old primary that sends to the standby stands still: it hears nothing of the promotion, and shows the standby as
    /// connected.
    Untold,
    /// The old primary is in a network namespace, and the holder reaches it by its Unix socket. The cable to the standby and to the competitors
    /// is cut, in both directions or in one. (Linux, root.)
    CutOff,
}

/// What came of the holders.
#[derive(Default)]
struct Found {
    /// The locks that another one was granted before the holder had lost them.
    overlaps: usize,
    /// From the loss to the next grant, in milliseconds.
    margins: Vec<f64>,
}

fn settings(name: &str, server: &Server, quorum: Quorum) -> Config {
    config(name, &server.url(), LOCKS).lease(LEASE).quorum(quorum)
}

/// The servers, before and after they are apart.
struct Site {
    split: Split,
    primary: Server,
    standby: Server,
    /// The one that is not promoted.
    _other: Option<Server>,
    /// Where the primary is in one.
    netns: Option<Netns>,
}

impl Site {
    fn new(split: Split) -> Self {
        let netns = matches!(split, Split::CutOff).then(|| Netns::new().unwrap());
        let builder = netns.iter().fold(Server::builder(), |builder, netns| builder.inside(netns));
        let primary = builder.start().unwrap();
        let standby = primary.standby(Replication::Synchronous).unwrap();
        let other = if let Split::OneOfTwo(which) = split { Some(another(&primary, which)) } else { None };
        Self { split, primary, standby, _other: other, netns }
    }

    /// The settings of somebody whom no cut keeps from the primary.
    fn beside_primary(&self, name: &str, count: usize, quorum: Quorum) -> Config {
        let Self { primary, netns, .. } = self;
        let url = if netns.is_some() { primary.unix_url() } else { primary.url() };
        config(name, &url, count).lease(LEASE).quorum(quorum)
    }

    /// The direction is that of a cut cable.
    fn split(&self, direction: Direction) {
        if let Some(netns) = &self.netns {
            netns.cut(direction).unwrap();
        }
        if let Split::Untold = self.split {
            senders(&self.primary).iter().for_each(|pid| system::signal(*pid, Signal::Stop).unwrap());
        }
    }
}

/// Another standby, before the first one in the order of the setting: by `FIRST 1` it is the one that commits wait for.
fn another(primary: &Server, which: &str) -> Server {
    let standby = primary.standby(Replication::Asynchronous).unwrap();
    let [first, second] = <[String; 2]>::try_from(names(primary)).unwrap();
    primary.set("synchronous_standby_names", &format!("{which} (\"{second}\", \"{first}\")")).unwrap();
    standby
}

/// The processes of the server that send to standbys.
fn senders(server: &Server) -> Vec<i32> {
    let rows = server.client().unwrap().query("SELECT pid FROM pg_stat_replication", &[]).unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

/// The holder is on the old primary and stays there, a competitor comes to the promoted standby.
fn split_brain(split: Split, quorum: Quorum, rounds: usize, shared_sessions: u32) -> Found {
    let mut found = Found::default();
    for round in 0..rounds {
        let site = Site::new(split);
        let (primary, standby) = (&site.primary, &site.standby);
        let settings_of_holder =
            site.beside_primary("holder", LOCKS, quorum).shared_sessions(shared_sessions);
        let holder = Party::with("holder", LOCKS, settings_of_holder);
        let lost = holder.lock_all();
        if quorum == Quorum::Server {
            // What it needs is there; with the quorum, its first confirmation has shown that.
            standby.wait_caught_up(primary).unwrap();
        }
        site.split([Direction::Both, Direction::Inward, Direction::Outward][round % 3]);
        standby.promote().unwrap();
        assert_eq!(holder.held(), LOCKS, "it believes in its locks");
        let operator = &mut standby.client().unwrap();
        // A competitor with the quorum would wait for a standby of this one; without, it is there as early as can be.
        operator.batch_execute("UPDATE dsync.policy SET quorum = false").unwrap();
        let competitor = Party::with("competitor", LOCKS, settings("competitor", standby, Quorum::Server));
        last_of(&competitor.wait_for_all(), LOCKS);
        for (((since, _), lock), lost) in granted(operator, LOCKS).into_iter().zip(&holder.locks).zip(&lost) {
            if quorum == Quorum::Server {
                found.overlaps += usize::from(is_held(lock));
                continue;
            }
            hear(lost);
            let loss = lock.last_loss().unwrap();
            assert_eq!(loss.reason, LossReason::NotConfirmed);
            let lost_at = micros(loss.at);
            found.overlaps += usize::from(since < lost_at);
            found.margins.push(ms(lost_at, since));
        }
    }
    found
}

fn no_overlap(rounds: usize, shared_sessions: u32) {
    // Most of it is waiting.
    let ways = splits().into_iter().map(|split| {
        let found = move || split_brain(split, Quorum::NamedStandbys, rounds, shared_sessions);
        (split, thread::spawn(found))
    });
    for (split, found) in ways.collect::<Vec<_>>() {
        let Found { overlaps, mut margins } = found.join().unwrap();
        margins.sort_unstable_by(f64::total_cmp);
        println!(
            "{split:?}: {overlaps} overlaps in {rounds} promotions with {LOCKS} locks each; granted {:.0} ms after the loss at the least, \
             {:.0} ms in the median",
            margins[0],
            margins[margins.len() / 2]
        );
        assert_eq!((overlaps, margins.len()), (0, rounds * LOCKS), "{split:?}");
    }
}

fn nobody_gets_the_lock_of_a_holder_on_an_old_primary_that_lives_on(shared_sessions: u32) {
    no_overlap(1, shared_sessions);
}

fn nobody_gets_the_lock_of_a_holder_on_an_old_primary_in_fifty_promotions(shared_sessions: u32) {
    no_overlap(50, shared_sessions);
}

/// The ways that there can be here.
fn splits() -> Vec<Split> {
    let cut_off = namespace().map(|_| Split::CutOff);
    let others = [Split::OneOfTwo("FIRST 1"), Split::OneOfTwo("ANY 1"), Split::Told, Split::Untold];
    others.into_iter().chain(cut_off).collect()
}

/// So the tests above can fail.
#[test]
fn without_the_quorum_the_lock_has_two_holders() {
    without_quorum(1);
}

#[test]
#[ignore = "takes minutes: cargo test --test outages quorum -- --ignored --nocapture"]
fn without_the_quorum_the_lock_has_two_holders_in_ten_promotions() {
    without_quorum(10);
}

fn without_quorum(rounds: usize) {
    // The last one is the most like what happens.
    let split = splits().pop().unwrap();
    let Found { overlaps, .. } = split_brain(split, Quorum::Server, rounds, 0);
    println!(
        "{split:?}, without the quorum: {overlaps} overlaps in {rounds} promotions with {LOCKS} locks each"
    );
    assert_eq!(overlaps, rounds * LOCKS);
}

/// The body of the processes below; as a test of its own it does nothing.
#[test]
#[ignore = "the body of a process, which another test starts"]
fn a_witness() {
    if let Some(role) = role() {
        testify(&role);
    }
}

/// When a holder goes on that stands still while the standby is promoted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Thaw {
    /// Before its terms are over.
    Early,
    /// When others have its locks.
    Late,
}

fn frozen_meanwhile(thaw: Thaw, shared_sessions: u32) {
    let site = Site::new(splits().pop().unwrap());
    let Site { primary, standby, netns, .. } = &site;
    let url = primary.url_at("127.0.0.1", primary.port());
    let quorum = Quorum::NamedStandbys;
    let role = Role { url, count: LOCKS, lease: LEASE, wait_slice: LEASE, quorum, shared_sessions };
    let body = "quorum::a_witness";
    let mut command = match netns {
        Some(netns) => role.command_inside(netns, body),
        None => role.command(body),
    };
    let mut witness = Witness::start(&role, &mut command);
    witness.says_of_all("held", Event::held);
    let goes_on = |witness: &Witness| {
        system::signal(witness.process.id(), Signal::Continue).unwrap();
        now()
    };
    site.split(Direction::Both);
    system::signal(witness.process.id(), Signal::Stop).unwrap();
    let frozen_at = now();
    standby.promote().unwrap();
    let mut thawed_at = None;
    if thaw == Thaw::Early {
        thawed_at = Some(goes_on(&witness));
        println!("goes on {:.0} ms after it was frozen", ms(frozen_at, now()));
    }
    let operator = &mut standby.client().unwrap();
    operator.batch_execute("UPDATE dsync.policy SET quorum = false").unwrap();
    let competitor = Party::with("competitor", LOCKS, settings("competitor", standby, Quorum::Server));
    last_of(&competitor.wait_for_all(), LOCKS);
    let grants = granted(operator, LOCKS);
    let thawed_at = thawed_at.unwrap_or_else(|| goes_on(&witness));
    let last_held = witness.says_of_all("not held", Event::not_held);
    let lost = witness.says_of_all("lost", Event::lost);
    let margins: Vec<_> = grants.iter().zip(&last_held).map(|((since, _), held)| ms(*held, *since)).collect();
    println!("{thaw:?}: granted {margins:.0?} ms after it was last said to be held");
    assert!(margins.iter().all(|margin| *margin > 0.0), "{thaw:?}: stolen: {margins:?}");
    match thaw {
        // Its own deadline has announced it, and not the thaw.
        Thaw::Early => assert!(grants.iter().zip(&lost).all(|((since, _), lost)| lost < since)),
        Thaw::Late => assert!(last_held.iter().all(|held| *held < thawed_at)),
    }
    // It wants its locks still, the old primary grants them, and nobody confirms that.
    let again = witness.rest().into_iter().find(|(_, event, _)| event.held().is_some());
    assert_eq!(again, None);
    witness.process.kill();
}

fn a_holder_that_stands_still_during_the_promotion_has_lost_its_lock_when_it_goes_on(shared_sessions: u32) {
    let ways =
        [Thaw::Early, Thaw::Late].map(|thaw| thread::spawn(move || frozen_meanwhile(thaw, shared_sessions)));
    ways.into_iter().for_each(|way| way.join().unwrap());
}

/// A way to make a standby of a primary out of its former primary.
type ComeBack = fn(&Server, &Server, Replication) -> support::Result<()>;

fn an_old_primary_comes_back_as_a_copy_of_the_new_one_and_so_do_the_locks(shared_sessions: u32) {
    there_and_back(Server::follow, shared_sessions);
}

#[test]
fn an_old_primary_is_rewound_to_the_new_one_and_so_do_the_locks_come_back() {
    there_and_back(Server::rewind, 0);
}

/// The old primary is refused as a standby, and confirms what is granted on the new one, whose place it takes in the end.
fn there_and_back(come_back: ComeBack, shared_sessions: u32) {
    let settings = ["wal_log_hints", "full_page_writes"];
    let builder = settings.iter().fold(Server::builder(), |builder, name| builder.setting(name, "on"));
    let first = builder.start().unwrap();
    let second = first.standby(Replication::Synchronous).unwrap();
    let url = format!(
        "host=127.0.0.1,127.0.0.1 port={},{} user=postgres dbname=postgres target_session_attrs=read-write",
        first.port(),
        second.port()
    );
    let confirmed = |url: &str| {
        let config = Config::from_url(url).unwrap().lease(2 * LEASE).quorum(Quorum::NamedStandbys);
        config.shared_sessions(shared_sessions)
    };
    first.client().unwrap().batch_execute("CREATE TABLE ledger (entry text)").unwrap();
    let manager = started(confirmed(&url));
    let x = lock(&manager, "x");
    x.lock(&soon()).unwrap();
    let mut kept = Vec::new();
    for (primary, standby) in [(&first, &second), (&second, &first)] {
        let term = x.term().unwrap();
        standby.promote().unwrap();
        // As long as the term lasts, its fence passes on the old primary. A commit that waits for the standby would never come to an end.
        let operator = &mut primary.client().unwrap();
        operator.batch_execute("SET synchronous_commit = local").unwrap();
        enter(operator, &term, "gone with the timeline").unwrap();
        assert_eq!(entries(primary).len(), kept.len() + 1);
        hear(term.lost());

        if let Err(reason) = come_back(primary, standby, Replication::Synchronous) {
            assert!(reason.is_missing(), "{reason}");
            return support::skip(reason);
        }
        let error = PostgresManager::connect(confirmed(&primary.url())).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::FailedInitialization);
        assert!(error.to_string().contains("hot standby"), "{error}");
        let begun = Instant::now();
        eventually("the lock on the new primary", || is_held(&x));
        println!("held again {:.1?} after the old primary came back", begun.elapsed());
        let next = x.term().unwrap();
        assert!(next.token() > term.token() && !is_open(term.lost()));
        let advisory = |server: &Server| -> i64 {
            let query = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'";
            server.client().unwrap().query_one(query, &[]).unwrap().get(0)
        };
        assert_eq!((advisory(primary), advisory(standby) > 0), (0, true));
        let operator = &mut standby.client().unwrap();
        kept.push(format!("by token {}", next.token().unwrap()));
        enter(operator, &next, kept.last().unwrap()).unwrap();
        // The write of before is not there, on either of them.
        assert_eq!(entries(standby), kept);
        becomes("what the old primary has", &kept, || entries(primary));
    }
    // Confirmed by the one that was the primary last: it is missed when it stands still.
    let lost = x.lost();
    let _frozen = second.freeze().unwrap();
    hear(&lost);
}

/// Writes in a fenced transaction.
fn enter(operator: &mut Client, term: &Term, entry: &str) -> Result<(), dsync::Error> {
    let mut transaction = operator.transaction().unwrap();
    term.fence(&mut transaction)?;
    transaction.execute("INSERT INTO ledger VALUES ($1)", &[&entry]).unwrap();
    transaction.commit().unwrap();
    Ok(())
}

fn entries(server: &Server) -> Vec<String> {
    let rows = server.client().unwrap().query("SELECT entry FROM ledger ORDER BY entry", &[]).unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

/// The fence asks the server that it is on. As long as the term lasts it passes there, and what is written is nowhere else.
#[test]
fn what_a_fence_lets_through_on_an_old_primary_is_not_on_the_new_one() {
    let primary = Server::start().unwrap();
    let standby = primary.standby(Replication::Synchronous).unwrap();
    let manager = started(settings("holder", &primary, Quorum::NamedStandbys).lease(3 * LEASE));
    let operator = &mut primary.client().unwrap();
    operator.batch_execute("CREATE TABLE ledger (entry text)").unwrap();
    let x = lock(&manager, "x");
    x.lock(&soon()).unwrap();
    let (lost, term) = (x.lost(), x.term().unwrap());
    standby.promote().unwrap();
    // A commit that waits for the standby would never come to an end.
    operator.batch_execute("SET synchronous_commit = local").unwrap();
    enter(operator, &term, "paid").unwrap();
    hear(&lost);
    assert!(enter(operator, &term, "paid").is_err());
    assert_eq!((entries(&primary).len(), entries(&standby).len()), (1, 0));

    // Who has the lock next is on the new one, with a higher token.
    let promoted = &mut standby.client().unwrap();
    promoted.batch_execute("UPDATE dsync.policy SET quorum = false").unwrap();
    let next = started(settings("next", &standby, Quorum::Server));
    let guard = lock(&next, "x").acquire(PATIENCE).unwrap();
    assert!(guard.term().token() > term.token(), "{:?} after {term:?}", guard.term());
    enter(promoted, guard.term(), "paid").unwrap();
    assert_eq!((entries(&primary).len(), entries(&standby).len()), (1, 1));
}

/// The names of the standbys, in the order of their start.
fn names(server: &Server) -> Vec<String> {
    let query = "SELECT application_name FROM pg_stat_replication ORDER BY backend_start";
    server.client().unwrap().query(query, &[]).unwrap().iter().map(|row| row.get(0)).collect()
}

fn the_log_tells_of_a_standby_that_is_away_for_a_short_time(shared_sessions: u32) {
    Process::start(&mut process("quorum::telling_the_log", &shared_sessions.to_string())).succeeds();
}

/// The body of [`the_log_tells_of_a_standby_that_is_away_for_a_short_time`], in a process of its own, for its logger.
#[test]
#[ignore = "the body of a process, which another test starts"]
fn telling_the_log() {
    let Some(shared_sessions) = role() else { return };
    log::set_logger(&Logger).unwrap();
    log::set_max_level(log::LevelFilter::Info);
    let primary = Server::start().unwrap();
    let standby = primary.standby(Replication::Synchronous).unwrap();
    // The warning comes after a quarter, and the loss after more than half.
    let config = settings("it", &primary, Quorum::NamedStandbys).lease(3 * LEASE);
    let manager = started(config.shared_sessions(shared_sessions.parse().unwrap()));
    let held = lock(&manager, "held").acquire(PATIENCE).unwrap();
    let says =
        |texts: [&str; 2]| LOGGED.lock().iter().any(|line| texts.iter().all(|text| line.contains(text)));
    let frozen = standby.freeze().unwrap();
    eventually("a warning", || {
        says(["the standbys have not confirmed a heartbeat: the standby ", "what is held is lost in "])
    });
    frozen.thaw();
    eventually("the end of it", || says(["confirmed; what was in the way is gone"; 2]));
    held.release().unwrap();
}

/// The answer to the record of one session comes late; the record of another has followed meanwhile, which the standby does not have, since it was
/// promoted in between. The lock that was asked for after that is not confirmed by the first record.
#[test]
fn a_record_whose_answer_is_late_confirms_no_lock_that_was_asked_for_after_it() {
    const SHORT: Duration = Duration::from_millis(200);
    let primary = Server::start().unwrap();
    let standby = primary.standby(Replication::Synchronous).unwrap();
    let proxy = Proxy::to(primary.port());
    let settings = config("it", &primary.url_at("127.0.0.1", proxy.port()), 4).quorum(Quorum::NamedStandbys);
    // The first session has time for its answer.
    let manager = started(
        settings.lease(2 * LEASE).heartbeat(SHORT).heartbeat_timeout(3 * LEASE / 2).margin(SHORT / 2),
    );
    let held = lock(&manager, "held");
    held.lock(&soon()).unwrap();
    let lost = held.lost();
    lock(&manager, "late").acquire(PATIENCE).unwrap().release().unwrap();

    let operator = &mut primary.client().unwrap();
    proxy.keep_answer_back("pg_logical_emit_message");
    eventually("a record", || proxy.keeps_answer_back());
    let has_all = "SELECT bool_and(flush_lsn = pg_current_wal_lsn()) FROM pg_stat_replication";
    eventually("it at the standby", || operator.query_one(has_all, &[]).unwrap().get(0));
    // From here on the primary hears nothing of its standby, which is connected still.
    let senders = operator.query("SELECT pid FROM pg_stat_replication", &[]).unwrap();
    let send = |signal| senders.iter().for_each(|row| system::signal(row.get(0), signal).unwrap());
    send(Signal::Stop);
    standby.promote().unwrap();
    let end = "SELECT pg_current_wal_lsn()::text";
    let before: String = operator.query_one(end, &[]).unwrap().get(0);
    let late = lock(&manager, "late");
    let call = begin(move || late.acquire(LEASE).map(drop));
    eventually("the other record", || operator.query_one(end, &[]).unwrap().get::<_, String>(0) != before);
    thread::sleep(SHORT);
    assert!(is_held(&held), "its session is there still");
    proxy.give_answer();
    let error = call.get().unwrap_err();
    send(Signal::Continue);
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
    hear(&lost);
    assert_eq!(held.last_loss().unwrap().reason, LossReason::NotConfirmed);
}

/// A standby that stands still is connected for as long as `wal_sender_timeout`.
#[test]
fn a_report_tells_of_a_standby_that_does_not_confirm() {
    let primary = Server::start().unwrap();
    let standby = primary.standby(Replication::Synchronous).unwrap();
    let manager = started(settings("it", &primary, Quorum::NamedStandbys));
    let verdict = || {
        let report = manager.check();
        let line = report.lines.iter().find(|line| line.topic == "quorum").unwrap();
        (line.verdict, line.to_string())
    };
    assert_eq!(verdict().0, Verdict::Good, "{}", verdict().1);
    let frozen = standby.freeze().unwrap();
    let (frozen_verdict, text) = verdict();
    assert!(frozen_verdict == Verdict::Wrong && text.contains("does not answer"), "{text}");
    frozen.thaw();
    eventually("its confirmation", || verdict().0 == Verdict::Good);
}

#[test]
fn of_two_standbys_the_one_that_is_promoted_is_missed() {
    // Most of it is waiting.
    let ways = [("FIRST 1", true), ("ANY 1", true), ("FIRST 2", false)]
        .map(|(which, commits_go_on)| thread::spawn(move || one_of_two_is_missed(which, commits_go_on)));
    ways.into_iter().for_each(|way| way.join().unwrap());
}

/// The other standby goes on, and so do commits on the old primary that one of the two is enough for.
fn one_of_two_is_missed(which: &str, commits_go_on: bool) {
    let primary = Server::start().unwrap();
    let standby = primary.standby(Replication::Asynchronous).unwrap();
    let first = names(&primary).remove(0);
    let _other = another(&primary, which);
    let holder = Party::with("holder", LOCKS, settings("holder", &primary, Quorum::NamedStandbys));
    let lost = holder.lock_all();
    standby.promote().unwrap();
    let promoted = Instant::now();
    lost.iter().for_each(hear);
    assert!(promoted.elapsed() < LEASE, "{which}: {:?}", promoted.elapsed());
    for lock in &holder.locks {
        assert_eq!(lock.last_loss().unwrap().reason, LossReason::NotConfirmed);
    }
    if commits_go_on {
        let mut operator = primary.client().unwrap();
        operator.batch_execute("CREATE TABLE x (); DROP TABLE x").unwrap();
    }
    let problem = format!("no standby with the name {first:?}");
    let error = holder.locks[0].lock(&Context::timeout(LEASE / 2)).unwrap_err();
    assert!(error.to_string().contains(&problem), "{which}: {error}");
    let report = holder.manager.check();
    let line = report.lines.iter().find(|line| line.topic == "quorum").unwrap();
    assert!(line.verdict == Verdict::Wrong && line.text.contains(&problem), "{which}: {report}");
}

/// Cancels whatever the sessions of a party are in.
fn cancel(operator: &mut Client, party: &str) {
    let query = "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE application_name LIKE $1 || ' %'";
    operator.query(query, &[&party]).unwrap();
}

/// What makes a commit that waits for a standby go on without it.
fn a_cancelled_heartbeat_and_a_setting_that_is_emptied_confirm_nothing(shared_sessions: u32) {
    let primary = Server::start().unwrap();
    let standby = primary.standby(Replication::Synchronous).unwrap();
    let setting = format!("\"{}\"", names(&primary)[0]);
    let settings = settings("holder", &primary, Quorum::NamedStandbys).shared_sessions(shared_sessions);
    let holder = Party::with("holder", LOCKS, settings);
    let operator = &mut primary.client().unwrap();
    for empties in [false, true] {
        let lost = holder.lock_all();
        let frozen = standby.freeze().unwrap();
        let begun = Instant::now();
        if empties {
            primary.set("synchronous_standby_names", "").unwrap();
        }
        while lost.iter().any(is_open) {
            if !empties {
                cancel(operator, "holder");
            }
            assert!(begun.elapsed() < LEASE, "confirmed by a standby that stands still");
            thread::sleep(Duration::from_millis(1));
        }
        for lock in &holder.locks {
            // A cancel may have hit the heartbeat, or the question who has confirmed it.
            let reason = lock.last_loss().unwrap().reason;
            assert!(
                reason == LossReason::NotConfirmed || !empties && reason == LossReason::ServerError,
                "{reason:?}"
            );
            assert_eq!(kind(lock.lock(&Context::timeout(LEASE / 4))), ErrorKind::TimedOut);
        }
        frozen.thaw();
        primary.set("synchronous_standby_names", &setting).unwrap();
        becomes("what the holder holds", &LOCKS, || holder.held());
    }
}

fn a_standby_that_goes_away_ends_the_term_in_time_and_the_lock_comes_back_with_it(shared_sessions: u32) {
    let primary = Server::start().unwrap();
    let standby = primary.standby(Replication::Synchronous).unwrap();
    let settings = settings("holder", &primary, Quorum::NamedStandbys).shared_sessions(shared_sessions);
    let holder = Party::with("holder", LOCKS, settings);
    let lost = holder.lock_all();

    let line = |manager: &PostgresManager| {
        manager.check().lines.into_iter().find(|line| line.topic == "quorum").unwrap()
    };
    let good = line(&holder.manager);
    assert!(good.verdict == Verdict::Good && good.text.contains(&names(&primary)[0]), "{good:?}");

    // A short outage is forgiven: here it is over as soon as a heartbeat has missed it.
    let frozen = standby.freeze().unwrap();
    eventually("a heartbeat that is not confirmed", || {
        holder
            .manager
            .snapshot()
            .claims
            .iter()
            .any(|claim| claim.time_left.is_some_and(|left| left < LEASE / 2 - Duration::from_millis(100)))
    });
    frozen.thaw();
    eventually("a heartbeat that is confirmed", || {
        holder
            .manager
            .snapshot()
            .claims
            .iter()
            .all(|claim| claim.time_left.is_some_and(|left| left > LEASE / 2))
    });
    assert!(lost.iter().all(is_open));

    let frozen = standby.freeze().unwrap();
    let begun = Instant::now();
    lost.iter().for_each(hear);
    println!("lost {:.1?} after the standby stood still", begun.elapsed());
    assert!(begun.elapsed() < LEASE, "{:?}", begun.elapsed());
    // The server grants the lock, and it is not announced. A claim can be given back all the same, and says so to the server.
    let x = lock(&holder.manager, "x");
    let error = x.try_acquire().unwrap_err();
    assert!(error.to_string().contains("have not confirmed"), "{error}");
    let error = holder.locks[0].lock(&Context::timeout(LEASE / 2)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    assert!(error.to_string().contains("have not confirmed"), "{error}");
    let (late, begun) = (Lateness::watch(), Instant::now());
    holder.locks[0].release().unwrap();
    late.allow(begun.elapsed(), Duration::from_secs(2));
    frozen.thaw();
    holder.locks[0].lock(&soon()).unwrap();
    becomes("what the holder holds", &LOCKS, || holder.held());
}

/// Calls on a shared session all the time put off neither the confirmation of a lock nor that of a heartbeat, however far away the standby is.
#[test]
fn standbys_that_are_far_away_confirm_beside_others_that_call_all_the_time() {
    const CALLERS: usize = 3;
    let primary = Server::start().unwrap();
    let proxy = Proxy::to(primary.port());
    let _standby = primary.standby_by_way_of("127.0.0.1", proxy.port(), Replication::Synchronous).unwrap();
    let made = |name| started(settings(name, &primary, Quorum::NamedStandbys).shared_sessions(1));
    let (other, manager) = (made("other"), made("holder"));
    let taken: Vec<_> = (0..CALLERS).map(|number| format!("taken {number}")).collect();
    let theirs: Vec<_> = taken.iter().map(|key| lock(&other, key).acquire(PATIENCE).unwrap()).collect();
    proxy.slow_down(Duration::from_millis(20));
    let held = lock(&manager, "held").acquire(PATIENCE).unwrap();
    thread::scope(|scope| {
        let (over, is_over) = bounded::<()>(0);
        for key in &taken {
            let (wanted, is_over) = (lock(&manager, key), is_over.clone());
            scope.spawn(move || {
                while is_over.try_recv() == Err(TryRecvError::Empty) {
                    assert!(wanted.try_acquire().unwrap().is_none());
                }
            });
        }
        let begun = Instant::now();
        for number in 0.. {
            let begun_one = Instant::now();
            lock(&manager, &format!("free {number}")).acquire(PATIENCE).unwrap().release().unwrap();
            assert!(begun_one.elapsed() < LEASE, "{:?}", begun_one.elapsed());
            // The held lock needs heartbeats.
            if begun.elapsed() > 2 * LEASE {
                println!("{number} locks in {:.1?}", begun.elapsed());
                break;
            }
        }
        drop(over);
    });
    assert!(held.is_held(), "{:?}", held.loss());
    held.release().unwrap();
    drop(theirs);
}

#[test]
fn releases_are_short_beside_a_lock_that_the_standbys_do_not_confirm() {
    let primary = Server::start().unwrap();
    let standby = primary.standby(Replication::Synchronous).unwrap();
    let config = config("holder", &primary.url(), LOCKS).quorum(Quorum::NamedStandbys).shared_sessions(1);
    let holder = started(config.lease(PATIENCE / 4));
    releases_are_short(&mut primary.client().unwrap(), &holder, || standby.freeze().unwrap());
}

/// The numbers of transactions that the server has given out.
fn transactions(operator: &mut Client) -> i64 {
    let query = "SELECT pg_snapshot_xmax(pg_current_snapshot())::text::int8";
    operator.query_one(query, &[]).unwrap().get(0)
}

#[test]
fn the_locks_of_a_manager_share_confirmations() {
    const MANY: usize = 30;
    let primary = Server::start().unwrap();
    let _standby = primary.standby(Replication::Synchronous).unwrap();
    let config = config("holder", &primary.url(), MANY)
        .lease(LEASE)
        .heartbeat(Duration::from_secs(1))
        .quorum(Quorum::NamedStandbys);
    let holder = Party::with("holder", MANY, config);
    holder.lock_all();
    let operator = &mut primary.client().unwrap();
    let before = transactions(operator);
    let begun = Instant::now();
    // Each lock has one a second.
    eventually("as many heartbeats", || {
        begun.elapsed() >= LEASE || transactions(operator) - before > 4 * MANY as i64
    });
    let (used, beats) = (transactions(operator) - before, begun.elapsed().as_secs_f64() * MANY as f64);
    println!("{used} confirmations for some {beats:.0} heartbeats");
    assert_eq!(holder.held(), MANY);
    assert!(used > 0 && (used as f64) < beats / 1.5, "{used} for {beats:.0}");
}

#[test]
fn where_it_cannot_hold_the_quorum_is_refused_with_advice() {
    let server = Server::start().unwrap();
    let refusal = |config: Config| {
        let error = PostgresManager::connect(config).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::FailedInitialization);
        error.to_string()
    };
    let confirmed = || settings("it", &server, Quorum::NamedStandbys);
    let text = refusal(confirmed());
    assert!(text.contains("is empty") && text.contains("name each standby"), "{text}");
    server.set("synchronous_standby_names", "ANY 1 (a, *)").unwrap();
    assert!(refusal(confirmed()).contains("asterisk"));
    let operator = &mut server.client().unwrap();
    // There is no standby to wait for.
    operator.batch_execute("SET synchronous_commit = local; CREATE ROLE app LOGIN").unwrap();
    server.set("synchronous_standby_names", "a").unwrap();
    let as_app = server.url().replace("postgres@", "app@");
    assert_ne!(as_app, server.url());
    let text = refusal(config("it", &as_app, 1).quorum(Quorum::NamedStandbys));
    assert!(text.contains("GRANT pg_read_all_stats"), "{text}");
}

/// One that is not confirmed would defeat the others.
#[test]
fn a_manager_without_the_quorum_is_refused_where_others_have_it() {
    let primary = Server::start().unwrap();
    let _standby = primary.standby(Replication::Synchronous).unwrap();
    let with = started(settings("with", &primary, Quorum::NamedStandbys));
    lock(&with, "x").acquire(PATIENCE).unwrap().release().unwrap();
    let error = PostgresManager::connect(settings("without", &primary, Quorum::Server)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::FailedInitialization);
    let way_out = "UPDATE dsync.policy SET quorum = false";
    assert!(error.to_string().contains(way_out), "{error}");
    let report = PostgresManager::new(settings("without", &primary, Quorum::Server)).unwrap().check();
    let line = report.lines.iter().find(|line| line.topic == "takeover").unwrap();
    assert_eq!(line.verdict, Verdict::Wrong);
    assert!(line.advice.as_ref().unwrap().contains(way_out), "{line:?}");
    with.stop().unwrap();
    primary.client().unwrap().batch_execute("UPDATE dsync.policy SET quorum = false").unwrap();
    drop(started(settings("without", &primary, Quorum::Server)));
}
