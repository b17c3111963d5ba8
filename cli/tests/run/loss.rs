//! The command is gone before another has the lock, wherever the lease decides, and soon where the server does.

use std::io::Write as _;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use support::process::{Signal, is_alive, signal};
use support::{Server, wait_for};

use crate::common::{LEASE, Line, PATIENCE, Process, SHORT, becomes, new_file, pgdsync, sessions};

/// Ignores TERM, and so does its child.
pub(crate) const STUBBORN: &str = "trap '' TERM; sleep 1000 & echo command $$ $!; sleep 1000";

/// Looks which of these processes run, at the moment in which it begins itself.
const LOOKS: &str = "for process in $1 $2; do \
    case $(cut -d ' ' -f 3 /proc/$process/stat 2> /dev/null) in ''|Z|X) ;; *) alive=\"$alive $process\" ;; esac; done; echo begun beside: $alive";

/// How much later than its time a process may end, and be seen to have ended, on a busy machine.
const LATE: Duration = Duration::from_secs(3);

/// A lease with a time to end in which the next command begins, on a busy machine too.
const LONGER: [&str; 2] = ["--lease=15s", "--kill-after=3s"];
const TIME_TO_END: Duration = Duration::from_secs(3);

/// The backend of the session that has the lock.
pub(crate) fn holder_of(server: &Server, key: &str) -> i32 {
    let query = "SELECT pid FROM dsync.locks WHERE key = $1";
    server.client().unwrap().query_one(query, &[&key]).unwrap().get(0)
}

/// A process that stands still until this is dropped.
struct Stopped(i32);

impl Stopped {
    fn stop(process: i32) -> Self {
        signal(process, Signal::Stop).unwrap();
        Self(process)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let _ = signal(self.0, Signal::Continue);
    }
}

/// One process whose command runs, and one that waits for the lock.
pub(crate) struct Scene {
    pub(crate) holder: Process,
    competitor: Process,
    dead: JoinHandle<Instant>,
}

impl Scene {
    pub(crate) fn set(server: &Server, holder: &mut std::process::Command) -> Self {
        Self::set_with(server, holder, SHORT)
    }

    fn set_with(server: &Server, holder: &mut std::process::Command, lease: [&str; 2]) -> Self {
        let job = ["k", "--", "sh", "-c", STUBBORN];
        let holder = Process::start(holder.arg("run").args(lease).args(job));
        let (_, line) = holder.says("command");
        let words: Vec<_> = line.split(' ').collect();
        let processes: Vec<i32> = words[1..].iter().map(|word| word.parse().unwrap()).collect();
        assert!(processes.len() == 2 && processes.iter().all(|&process| is_alive(process)));
        let job = ["k", "--", "sh", "-c", LOOKS, "sh", words[1], words[2]];
        let competitor = Process::start(pgdsync(&server.url()).arg("run").args(lease).args(job));
        becomes("the waiters", &1, || sessions(server, false));
        let dead = thread::spawn(move || {
            let are_gone = || (!processes.iter().any(|&process| is_alive(process))).then(Instant::now);
            wait_for("the end of the command and its child", PATIENCE, are_gone).unwrap()
        });
        Self { holder, competitor, dead }
    }

    /// When the command and its child were seen to be dead, when the competitor's command began, and which of the two it saw.
    fn watch(self) -> (Process, Instant, Instant, String) {
        let dead = self.dead.join().unwrap();
        let (begun, seen): Line = self.competitor.says("begun beside:");
        (self.holder, dead, begun, seen["begun beside:".len()..].trim().to_owned())
    }

    /// The command must be dead before the competitor's begins.
    pub(crate) fn dies_before_another_begins(self, what: &str) -> Process {
        let (holder, dead, begun, seen) = self.watch();
        assert_eq!(seen, "", "{what}: alive while another had the lock");
        println!(
            "{what}: dead {} ms before another had the lock",
            begun.saturating_duration_since(dead).as_millis()
        );
        holder
    }

    /// The lock is free at once, and the command has its [`TIME_TO_END`].
    fn dies_in_time(self, what: &str, since: Instant) -> Process {
        let (holder, dead, begun, seen) = self.watch();
        // Otherwise the scene does not show what may happen.
        assert_ne!(seen, "", "{what}");
        println!("{what}: another had the lock after {:.1?}, dead after {:.1?}", begun - since, dead - since);
        assert!(dead - since <= TIME_TO_END + LATE, "{:?}", dead - since);
        assert!(dead - since >= TIME_TO_END, "it had no time to end: {:?}", dead - since);
        holder
    }
}

#[test]
fn a_frozen_server_ends_the_command_before_another_has_the_lock() {
    let server = Server::start().unwrap();
    let scene = Scene::set(&server, &mut pgdsync(&server.url()));
    let frozen = server.freeze().unwrap();
    // A server that stands still gives the lock to nobody: it goes on when the lease is over.
    thread::sleep(LEASE);
    frozen.thaw();
    let mut holder = scene.dies_before_another_begins("a frozen server");
    holder.says("the lock was lost");
    assert_eq!(holder.ends().code(), Some(79));
}

#[test]
fn a_frozen_keeper_ends_the_command_in_time() {
    let server = Server::start().unwrap();
    let scene = Scene::set(&server, &mut pgdsync(&server.url()));
    let keeper = scene.holder.keeper();
    let (stopped, since) = (Stopped::stop(keeper), Instant::now());
    let (mut holder, dead, _, seen) = scene.watch();
    println!("a frozen keeper: dead after {:.1?}", dead - since);
    assert_eq!(seen, "");
    // The front ends the keeper when the command is dead, which frees the lock. Without that the server would have given it away a lease
    // after the last heartbeat.
    assert!(dead - since < LEASE, "{:?}", dead - since);
    holder.says("the process that watches the lock does not answer");
    assert_eq!(holder.ends().code(), Some(79));
    becomes("the keeper's life", &false, || is_alive(keeper));
    drop(stopped);
}

#[test]
fn a_frozen_front_beside_a_frozen_server_ends_the_command_before_another_has_the_lock() {
    let server = Server::start().unwrap();
    let scene = Scene::set(&server, &mut pgdsync(&server.url()));
    scene.holder.signal(Signal::Stop);
    let frozen = server.freeze().unwrap();
    thread::sleep(LEASE);
    frozen.thaw();
    let mut holder = scene.dies_before_another_begins("a frozen front beside a frozen server");
    holder.signal(Signal::Continue);
    assert_eq!(holder.ends().code(), Some(79));
}

/// The lock is held as long as the keeper has it.
#[test]
fn a_frozen_front_alone_changes_nothing() {
    let server = Server::start().unwrap();
    let scene = Scene::set(&server, &mut pgdsync(&server.url()));
    scene.holder.signal(Signal::Stop);
    let before = holder_of(&server, "k");
    thread::sleep(LEASE + Duration::from_secs(1));
    assert_eq!((holder_of(&server, "k"), sessions(&server, false)), (before, 1));
    scene.holder.signal(Signal::Continue);
    scene.holder.signal(Signal::Terminate);
    let mut holder = scene.dies_before_another_begins("a front that was frozen");
    assert_eq!(holder.ends().code(), Some(128 + 9));
}

/// What the keeper says of the renewals has long found no room.
#[test]
#[ignore = "long; run with --ignored"]
fn a_front_that_was_frozen_for_many_renewals_changes_nothing() {
    let server = Server::start().unwrap();
    let fifo = new_file("fifo");
    assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let script = format!("echo begun; read x < {}; echo went on", fifo.display());
    let command = ["run", "--lease=4s", "--kill-after=0", "k", "--", "sh", "-c", &script];
    let mut holder = Process::start(pgdsync(&server.url()).args(command));
    holder.says("begun");
    holder.signal(Signal::Stop);
    // A renewal each 0.8 s, and room for some 280.
    thread::sleep(Duration::from_secs(280));
    holder.signal(Signal::Continue);
    thread::sleep(LEASE);
    assert_eq!(holder.child.try_wait().unwrap(), None);
    std::fs::write(&fifo, "\n").unwrap();
    holder.says("went on");
    assert_eq!(holder.ends().code(), Some(0));
}

/// Both stand still for longer than the lease, as on a machine that is suspended: nothing can be done meanwhile.
#[test]
fn both_frozen_for_longer_than_the_lease_end_the_command_when_they_go_on() {
    let server = Server::start().unwrap();
    let scene = Scene::set(&server, &mut pgdsync(&server.url()));
    let keeper = scene.holder.keeper();
    let both = [Stopped::stop(scene.holder.id()), Stopped::stop(keeper)];
    scene.competitor.says("begun");
    let thawed = Instant::now();
    drop(both);
    let dead = scene.dead.join().unwrap();
    println!("both frozen: dead {:.1?} after they went on", dead - thawed);
    // There is no time left for it to end by itself.
    assert!(dead - thawed < LATE, "{:?}", dead - thawed);
    let mut holder = scene.holder;
    assert_eq!(holder.ends().code(), Some(79));
}

/// As that of a terminal that was stopped.
fn full_pipe() -> (std::io::PipeReader, std::io::PipeWriter) {
    let (reader, mut writer) = std::io::pipe().unwrap();
    rustix::io::ioctl_fionbio(&writer, true).unwrap();
    while writer.write(&[b'x'; 4096]).is_ok() {}
    rustix::io::ioctl_fionbio(&writer, false).unwrap();
    (reader, writer)
}

/// Nobody can be told why the command is ended.
#[test]
fn a_standard_error_that_takes_nothing_keeps_no_command_alive() {
    let (_reader, full) = full_pipe();
    let holder = |server: &Server| {
        let mut command = pgdsync(&server.url());
        command.stderr(full.try_clone().unwrap());
        Scene::set(server, &mut command)
    };
    let server = Server::start().unwrap();
    let scene = holder(&server);
    let stopped = Stopped::stop(scene.holder.keeper());
    let mut ended = scene.dies_before_another_begins("a frozen keeper beside a full pipe");
    assert_eq!(ended.ends().code(), Some(79));
    drop(stopped);
    let server = Server::start().unwrap();
    let scene = holder(&server);
    scene.holder.signal(Signal::Kill);
    scene.dies_before_another_begins("a front that is killed beside a full pipe");
}

/// What the library logs is not said then, and no thread that watches over the lock waits for it.
#[test]
fn a_standard_error_that_takes_nothing_holds_up_no_lock() {
    let (_reader, full) = full_pipe();
    let server = Server::start().unwrap();
    let mut command = pgdsync(&server.url());
    command.env("RUST_LOG", "debug").stderr(full);
    let mut holder =
        Process::start(command.args(["run", "-v", "k", "--", "sh", "-c", "echo had; exec sleep 1000"]));
    holder.says("had");
    holder.signal(Signal::Terminate);
    assert_eq!(holder.ends().code(), Some(143));
}

/// It hears of the beginning of a term and of its renewals at once.
#[test]
fn a_front_that_was_frozen_in_the_wait_begins_under_the_lock_that_it_has() {
    let server = Server::start().unwrap();
    let url = server.url();
    let holder =
        Process::start(pgdsync(&url).args(["run", "k", "--", "sh", "-c", "echo had; exec sleep 1000"]));
    holder.says("had");
    let mut waiter = Process::start(pgdsync(&url).arg("run").args(SHORT).args(["k", "--", "echo", "ran"]));
    becomes("the waiters", &1, || sessions(&server, false));
    waiter.signal(Signal::Stop);
    holder.signal(Signal::Terminate);
    becomes("the waiters", &0, || sessions(&server, false));
    thread::sleep(LEASE);
    waiter.signal(Signal::Continue);
    waiter.says("ran");
    assert_eq!(waiter.ends().code(), Some(0));
}

#[test]
fn a_session_that_an_operator_ends_ends_the_command_in_time() {
    let server = Server::start().unwrap();
    let scene = Scene::set_with(&server, &mut pgdsync(&server.url()), LONGER);
    let since = Instant::now();
    server.terminate(holder_of(&server, "k")).unwrap();
    let mut holder = scene.dies_in_time("a session that an operator ends", since);
    holder.says("the lock was lost: the session was terminated");
    assert_eq!(holder.ends().code(), Some(79));
}

/// That command's group is not the one that the outer call watches.
#[test]
fn the_command_of_a_call_within_another_is_gone_when_the_outer_one_ends() {
    let server = Server::start().unwrap();
    let inner = [env!("CARGO_BIN_EXE_pgdsync"), "run", "--kill-after=1", "inner", "--", "sh", "-c"];
    let script = "trap '' TERM; echo begun $$; while :; do sleep 0.05; done";
    let mut outer = Process::start(
        pgdsync(&server.url()).args(["run", "--kill-after=10", "outer", "--"]).args(inner).arg(script),
    );
    let command: i32 = outer.says("begun").1["begun ".len()..].parse().unwrap();
    server.terminate(holder_of(&server, "outer")).unwrap();
    assert_eq!(outer.ends().code(), Some(79));
    assert!(!is_alive(command));
}

/// It was to say when the lock had gone back.
#[test]
#[ignore = "long; run with --ignored"]
fn a_keeper_that_stands_still_after_a_loss_is_not_waited_for_without_end() {
    let server = Server::start().unwrap();
    let script = "trap '' TERM; echo begun; exec sleep 1000";
    let mut holder =
        Process::start(pgdsync(&server.url()).arg("run").args(SHORT).args(["k", "--", "sh", "-c", script]));
    holder.says("begun");
    let keeper = holder.keeper();
    server.terminate(holder_of(&server, "k")).unwrap();
    holder.says("the lock was lost");
    let stopped = Stopped::stop(keeper);
    // It waits for a minute, and the command is killed before.
    let ended = wait_for("the end of the front", PATIENCE * 2, || holder.child.try_wait().unwrap()).unwrap();
    assert_eq!(ended.code(), Some(79));
    becomes("the keeper's life", &false, || is_alive(keeper));
    drop(stopped);
}

/// As above, of a leader that is told to end.
#[test]
#[ignore = "long; run with --ignored"]
fn a_keeper_that_stands_still_at_the_end_of_a_leader_is_not_waited_for_without_end() {
    let server = Server::start().unwrap();
    let command = ["k", "--", "sh", "-c", "echo begun; exec sleep 1000"];
    let mut leader = Process::start(pgdsync(&server.url()).arg("lead").args(SHORT).args(command));
    leader.says("begun");
    let stopped = Stopped::stop(leader.keeper());
    leader.signal(Signal::Terminate);
    let ended = wait_for("the end of the front", PATIENCE * 2, || leader.child.try_wait().unwrap()).unwrap();
    assert_eq!(ended.code(), Some(79));
    leader.says("the process that watches the lock does not answer");
    drop(stopped);
}

#[test]
fn a_front_that_is_killed_ends_the_command_before_another_has_the_lock() {
    let server = Server::start().unwrap();
    let scene = Scene::set(&server, &mut pgdsync(&server.url()));
    scene.holder.signal(Signal::Kill);
    let holder = scene.dies_before_another_begins("a front that is killed");
    holder.says("pgdsync itself was killed");
    assert_eq!(holder.rest(), Vec::<String>::new());
}

#[test]
fn a_keeper_that_is_killed_ends_the_command_in_time() {
    let server = Server::start().unwrap();
    let scene = Scene::set_with(&server, &mut pgdsync(&server.url()), LONGER);
    let since = Instant::now();
    signal(scene.holder.keeper(), Signal::Kill).unwrap();
    let mut holder = scene.dies_in_time("a keeper that is killed", since);
    holder.says("the process that watches the lock has ended");
    assert_eq!(holder.ends().code(), Some(79));
}

/// Whatever moment of the beginning it is, no command runs that nobody would end.
#[test]
fn a_process_that_is_killed_at_any_moment_leaves_no_command_behind() {
    const ROUNDS: u64 = 24;
    let server = Server::start().unwrap();
    let (url, file) = (server.url(), new_file("processes"));
    let script = format!("echo $$ >> {}; exec sleep 1000", file.display());
    let begun = || std::fs::read_to_string(&file).unwrap_or_default();
    // As long as the beginning takes.
    let since = Instant::now();
    let first = Process::start(pgdsync(&url).args(["run", "k", "--", "sh", "-c", &script]));
    wait_for("the command", PATIENCE, || (!begun().is_empty()).then_some(())).unwrap();
    let length = since.elapsed();
    drop(first);
    let mut count = 0;
    for round in 0..ROUNDS {
        let command = ["run", "--kill-after=0", "k", "--", "sh", "-c", &script];
        let mut process = Process::start(pgdsync(&url).args(command));
        let keeper = if round % 2 == 0 { process.id() } else { process.keeper() };
        thread::sleep(length.mul_f64((round / 2) as f64 * 2.0 / ROUNDS as f64));
        let _ = signal(keeper, Signal::Kill);
        if round % 2 == 1 {
            assert!(matches!(process.ends().code(), Some(69 | 79)));
        }
        // Where the keeper is killed the lock is free before the command is dead; the front has ended it when it ends.
        assert_eq!(crate::common::run(&url, ["run", "k", "--", "true"]).status.code(), Some(0));
        let alive = begun().lines().filter(|line| is_alive(line.parse().unwrap())).count();
        assert_eq!(alive, 0, "round {round}: {}", begun());
        count = begun().lines().count();
    }
    println!("killed {ROUNDS} times within {length:.1?}: {} commands had begun", count - 1);
}

/// It hears of the beginning of a term and of its end at once.
#[test]
fn a_front_that_was_frozen_begins_nothing_under_a_lock_that_is_lost() {
    let server = Server::start().unwrap();
    let (url, file) = (server.url(), new_file("begun"));
    let mut holder =
        Process::start(pgdsync(&url).args(["run", "k", "--", "sh", "-c", "echo had; exec sleep 1000"]));
    holder.says("had");
    let mut waiter = Process::start(pgdsync(&url).args(["run", "k", "--", "touch"]).arg(&file));
    becomes("the waiters", &1, || sessions(&server, false));
    let before = holder_of(&server, "k");
    waiter.signal(Signal::Stop);
    holder.signal(Signal::Terminate);
    holder.ends();
    let query = "SELECT pid FROM dsync.locks WHERE key = 'k'";
    let of_the_waiter =
        || server.client().unwrap().query_opt(query, &[]).unwrap().map(|row| row.get::<_, i32>(0));
    let session =
        wait_for("the next holder", PATIENCE, || of_the_waiter().filter(|pid| *pid != before)).unwrap();
    server.terminate(session).unwrap();
    becomes("the locks", &None, of_the_waiter);
    // What the keeper has said of it is in a socket of the front's, where nobody can look.
    thread::sleep(Duration::from_secs(3));
    waiter.signal(Signal::Continue);
    assert_eq!(waiter.ends().code(), Some(79));
    assert!(!file.exists());
}
