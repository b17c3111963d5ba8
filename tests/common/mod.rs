//! What several files of tests share: words for their timelines, and processes of their own.

#![allow(dead_code, reason = "each file uses a part of it")]

pub(crate) mod flood;

use std::convert::Infallible;
use std::fmt::Debug;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded, unbounded};
use dsync::{Context, Error, ErrorKind, Lock, Lost, PostgresManager, SyncManager};
use parking_lot::Mutex;
use postgres::Client;
use socket2::SockRef;

/// What should happen has this long, so that a fault is a failed test and not a hung one.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Makes tests of the functions named, once for each implementation: the `Memory` and the `Postgres` of the file, the latter also with a session
/// that all locks of a manager share. One that is forgotten here is dead code, which the compiler reports.
#[allow(unused_macros, reason = "not every program of tests has such functions")]
macro_rules! on_both {
    ($($behaviour:ident)*) => {
        mod memory {
            $(#[test] fn $behaviour() { super::$behaviour(&super::Memory::new()); })*
        }
        mod postgres {
            $(#[test] fn $behaviour() { super::$behaviour(&super::Postgres::new(0)); })*
        }
        mod shared_session {
            $(#[test] fn $behaviour() { super::$behaviour(&super::Postgres::new(1)); })*
        }
    };
}
#[allow(unused_imports, reason = "as above")]
pub(crate) use on_both;

/// Makes tests of the functions named, once where each lock of a manager has a session of its own, and once where all of them share one. They are
/// told how many sessions are shared.
#[allow(unused_macros, reason = "as above")]
macro_rules! in_both_modes {
    ($($(#[$attribute:meta])* $behaviour:ident)*) => {
        mod dedicated {
            $(#[test] $(#[$attribute])* fn $behaviour() { super::$behaviour(0); })*
        }
        mod shared_session {
            $(#[test] $(#[$attribute])* fn $behaviour() { super::$behaviour(1); })*
        }
    };
}
#[allow(unused_imports, reason = "as above")]
pub(crate) use in_both_modes;

/// Whether the library does TLS without a connector of the application's.
pub(crate) const HAS_TLS: bool = cfg!(feature = "_tls");

pub(crate) fn soon() -> Context {
    Context::timeout(PATIENCE)
}

/// Long enough for a session to be opened and to begin to wait, on a busy machine too.
pub(crate) fn briefly() -> Context {
    Context::timeout(Duration::from_millis(1_500))
}

pub(crate) fn lock(manager: &PostgresManager, key: &str) -> Arc<dyn Lock> {
    manager.lock(key).unwrap()
}

pub(crate) fn started(config: dsync::Config) -> PostgresManager {
    let manager = PostgresManager::new(config).unwrap();
    manager.start().unwrap();
    manager
}

/// Has a manager make the catalog, or bring it up to date. A start alone ends well too where a session is not to be had in time, and then makes nothing.
pub(crate) fn make_catalog(config: dsync::Config) {
    let manager = started(config);
    becomes("what is in the way of a session", &None, || {
        manager.inspect("nobody's").err().map(|error| error.to_string())
    });
}

/// The number of the advisory lock whose name an expression of SQL gives.
pub(crate) fn number_of(name: &str) -> String {
    format!(
        "('x' || left(encode(sha256('dsync'::bytea || '\\x00'::bytea || convert_to({name}, 'UTF8')), 'hex'), 16))::bit(64)::int8"
    )
}

/// Counts what `column` says of the advisory locks of the operator's database; where sessions are shared, without the lock by which the heartbeats of
/// such a session see that it has what it took, and which is nobody's.
pub(crate) fn count_locks(operator: &mut Client, column: &str, shared_sessions: u32) -> i64 {
    let witness = match shared_sessions {
        0 => "false",
        _ => {
            "NOT EXISTS (SELECT FROM dsync.lock WHERE id >> 10 IN (of.id >> 10, (of.id # 1614237451651786676) >> 10))"
        }
    };
    let query = format!(
        "SELECT count({column}) FROM pg_locks AS locks CROSS JOIN LATERAL (SELECT classid::int8 << 32 | objid::int8 AS id) AS of
         JOIN pg_database AS databases ON databases.oid = database
         WHERE datname = current_database() AND locktype = 'advisory' AND NOT (granted AND {witness})"
    );
    operator.query_one(&query, &[]).unwrap().get(0)
}

pub(crate) fn kind<T>(result: Result<T, Error>) -> ErrorKind {
    result.err().expect("an error").kind()
}

pub(crate) fn is_open(lost: &Lost) -> bool {
    lost.try_recv().is_err_and(|error| error.is_empty())
}

pub(crate) fn is_held(lock: &Arc<dyn Lock>) -> bool {
    is_open(&lock.lost())
}

pub(crate) fn hear(lost: &Lost) {
    assert_eq!(lost.recv_timeout(PATIENCE), Err(RecvTimeoutError::Disconnected), "the lost channel closes");
}

/// For what has no event to wait for, since the test is that nobody asks.
pub(crate) fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    support::wait_for(what, PATIENCE, || condition().then_some(())).unwrap();
}

/// Like [`eventually`], and tells the last value if it never becomes `wanted`.
pub(crate) fn becomes<T: PartialEq + Debug>(what: &str, wanted: &T, mut value: impl FnMut() -> T) {
    let mut last = None;
    let outcome = support::wait_for(what, PATIENCE, || (last.insert(value()) == wanted).then_some(()));
    assert!(outcome.is_ok(), "{what} should become {wanted:?} and stays {last:?}");
}

/// How late this machine lets threads run, by one that sleeps and looks at the clock.
///
/// Nobody promises anything of a machine that is too busy to run the server, and the tests of times are run on such machines, too.
pub(crate) struct Lateness {
    /// How late it was at the most, and when the nap began that is under way.
    seen: Arc<Mutex<(Duration, Instant)>>,
    _watched: Sender<Infallible>,
}

/// How long that thread sleeps at a time.
const NAP: Duration = Duration::from_millis(2);

impl Lateness {
    pub(crate) fn watch() -> Self {
        let (watched, over) = bounded(0);
        let seen = Arc::new(Mutex::new((Duration::ZERO, Instant::now())));
        let shared = Arc::clone(&seen);
        thread::spawn(move || {
            while over.recv_timeout(NAP) == Err(RecvTimeoutError::Timeout) {
                let mut seen = shared.lock();
                *seen = (worst_of(*seen), Instant::now());
            }
        });
        Self { seen, _watched: watched }
    }

    fn worst(&self) -> Duration {
        worst_of(*self.seen.lock())
    }

    /// What the steps from the end of a session to the word of the next holder may take longer for that: those of the system, of the
    /// server's process that ends, of the one that waits, of the supervisor, and of the thread that is told. A call has no more of them.
    pub(crate) fn of_a_take_over(&self) -> Duration {
        5 * self.worst()
    }

    /// What a holder may take longer for that to know of its loss: the thread that is to see it, and the one that has its mutex.
    pub(crate) fn of_a_loss(&self) -> Duration {
        2 * self.worst()
    }

    /// Fails if a call took longer than `bound` and what the machine may be blamed for.
    #[track_caller]
    pub(crate) fn allow(&self, took: Duration, bound: Duration) {
        let late = self.of_a_take_over();
        assert!(
            took < bound + late,
            "{took:.0?}, the bound is {bound:.0?}, and {late:.0?} for a busy machine"
        );
    }
}

fn worst_of((worst, begun): (Duration, Instant)) -> Duration {
    worst.max(begun.elapsed().saturating_sub(NAP))
}

/// What a thread will return.
pub(crate) struct Outcome<T>(Receiver<T>);

impl<T> Outcome<T> {
    pub(crate) fn get(self) -> T {
        self.get_within(PATIENCE)
    }

    pub(crate) fn get_within(self, bound: Duration) -> T {
        self.0.recv_timeout(bound).expect("the call ends in time and does not panic")
    }

    pub(crate) fn is_ready(&self) -> bool {
        !self.0.is_empty()
    }
}

pub(crate) fn begin<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Outcome<T> {
    let (sender, receiver) = bounded(1);
    thread::spawn(move || sender.send(work()));
    Outcome(receiver)
}

/// Waits for the lock in a thread.
pub(crate) fn wait_in_thread(lock: &Arc<dyn Lock>) -> Outcome<Result<(), Error>> {
    let lock = Arc::clone(lock);
    begin(move || lock.lock(&Context::background()))
}

/// A host that swallows packets: its kernel answers no connect any more.
pub(crate) struct SilentHost {
    listener: TcpListener,
    _queued: Vec<TcpStream>,
}

impl SilentHost {
    pub(crate) fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        SockRef::from(&listener).listen(0).unwrap();
        let address = listener.local_addr().unwrap();
        let mut queued = Vec::new();
        while let Ok(stream) = TcpStream::connect_timeout(&address, Duration::from_millis(200)) {
            queued.push(stream);
            assert!(queued.len() < 10, "the queue does not fill");
        }
        Self { listener, _queued: queued }
    }

    pub(crate) fn port(&self) -> u16 {
        self.listener.local_addr().unwrap().port()
    }
}

/// A logger that panics when it is told next that a lock was acquired, if it is armed.
pub(crate) struct Bomb {
    text: OnceLock<&'static str>,
    armed: AtomicBool,
}

impl Bomb {
    /// For a process of its own. Goes off when a lock is acquired.
    pub(crate) fn set() -> &'static Self {
        Self::set_at("acquired")
    }

    /// Goes off at a line with this text.
    pub(crate) fn set_at(text: &'static str) -> &'static Self {
        static BOMB: Bomb = Bomb { text: OnceLock::new(), armed: AtomicBool::new(false) };
        BOMB.text.set(text).unwrap();
        log::set_logger(&BOMB).unwrap();
        log::set_max_level(log::LevelFilter::Debug);
        &BOMB
    }

    pub(crate) fn arm(&self, armed: bool) {
        self.armed.store(armed, SeqCst);
    }

    pub(crate) fn is_armed(&self) -> bool {
        self.armed.load(SeqCst)
    }
}

impl log::Log for Bomb {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        let text = record.args().to_string();
        if text.contains(self.text.get().unwrap()) && self.armed.swap(false, SeqCst) {
            panic!("the logger failed at {text:?}");
        }
    }

    fn flush(&self) {}
}

/// The threads of this process that are the library's.
pub(crate) fn library_threads() -> Vec<String> {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let names = tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok());
    let mut names: Vec<_> = names.filter(|name| name.starts_with("dsync")).collect();
    names.sort();
    names
}

// ---------------------------------------------------------------------------------------------------------------------
// Processes
// ---------------------------------------------------------------------------------------------------------------------

/// By this variable a test that is the body of a process knows that it is to run, and what it is to do.
const ROLE: &str = "TEST_ROLE";

/// What this process is to do, if another test has started it with [`process`].
pub(crate) fn role() -> Option<String> {
    std::env::var(ROLE).ok()
}

/// This very program again, as a process that runs the test `body` only, with an environment that is of no influence.
pub(crate) fn process(body: &str, role: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", body, "--include-ignored", "--nocapture", "--test-threads=1"]).env(ROLE, role);
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        // Which PostgreSQL the tests use is still to be known.
        let is_ours = text.starts_with("DSYNC_") && !text.starts_with("DSYNC_PG_");
        if is_ours || text.starts_with("PG") || text == "DATABASE_URL" || text == "RUST_LOG" {
            command.env_remove(&name);
        }
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// A process of ours, killed when dropped. What it says comes line by line.
pub(crate) struct Process {
    child: Child,
    pub(crate) lines: Receiver<String>,
}

impl Process {
    pub(crate) fn start(command: &mut Command) -> Self {
        let mut child = command.spawn().unwrap();
        let (sender, lines) = unbounded();
        let outputs: [Box<dyn Read + Send>; 2] =
            [Box::new(child.stdout.take().unwrap()), Box::new(child.stderr.take().unwrap())];
        for output in outputs {
            let sender = sender.clone();
            thread::spawn(move || {
                for line in BufReader::new(output).lines().map_while(Result::ok) {
                    let _ = sender.send(line);
                }
            });
        }
        Self { child, lines }
    }

    pub(crate) fn id(&self) -> i32 {
        support::process::id_of(&self.child)
    }

    /// Waits for a line with `text` in it.
    pub(crate) fn says(&self, text: &str) -> String {
        let mut heard = Vec::new();
        loop {
            match self.lines.recv_timeout(PATIENCE) {
                Ok(line) if line.contains(text) => return line,
                Ok(line) => heard.push(line),
                Err(_) => panic!("the process does not say {text:?}, but:\n{}", heard.join("\n")),
            }
        }
    }

    /// Waits for its end, which must be a good one. What it said.
    pub(crate) fn succeeds(self) -> String {
        // What it waits for itself has to fail first, since it knows best what that was.
        self.succeeds_within(PATIENCE * 2)
    }

    pub(crate) fn succeeds_within(mut self, bound: Duration) -> String {
        let mut said = Vec::new();
        let end = Instant::now() + bound;
        loop {
            match self.lines.recv_deadline(end) {
                Ok(line) => said.push(line),
                // Both its outputs are closed.
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    panic!("the process does not end; it said:\n{}", said.join("\n"))
                }
            }
        }
        let (status, said) = (self.child.wait().unwrap(), said.join("\n"));
        assert!(status.success(), "the process failed ({status}); it said:\n{said}");
        assert!(said.contains("1 passed"), "the process ran nothing; it said:\n{said}");
        said
    }

    /// Gives a process that waits for it a line on its standard input, which must be a pipe.
    pub(crate) fn go_on(&mut self) {
        self.child.stdin.as_mut().expect("a pipe").write_all(b"\n").unwrap();
    }

    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
