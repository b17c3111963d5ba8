//! What processes use, and signals to them. Figures come from `/proc`: elsewhere than on Linux they are `None`.

use std::fs;
use std::path::Path;
use std::process::{Child, Command};
use std::time::Duration;

use rustix::process::Pid;

use crate::error::{Error, Result};
use crate::wait::wait_for;

/// A signal takes effect in no time; a machine under load may need some.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// The signals that the tests need.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Signal {
    Hangup,
    Interrupt,
    Quit,
    Terminate,
    Kill,
    Stop,
    Continue,
    TerminalStop,
    User1,
}

impl Signal {
    fn raw(self) -> rustix::process::Signal {
        match self {
            Self::Hangup => rustix::process::Signal::HUP,
            Self::Interrupt => rustix::process::Signal::INT,
            Self::Quit => rustix::process::Signal::QUIT,
            Self::Terminate => rustix::process::Signal::TERM,
            Self::Kill => rustix::process::Signal::KILL,
            Self::Stop => rustix::process::Signal::STOP,
            Self::Continue => rustix::process::Signal::CONT,
            Self::TerminalStop => rustix::process::Signal::TSTP,
            Self::User1 => rustix::process::Signal::USR1,
        }
    }
}

/// Sends a signal to one process. One that is stopped stands still when this returns: on a busy machine its threads go on
/// for some milliseconds after the signal was sent.
///
/// # Errors
/// When there's no such process, or it isn't ours to signal, or it goes on after a stop.
pub fn signal(pid: i32, signal: Signal) -> Result<()> {
    send(pid, signal)?;
    match signal {
        Signal::Stop => wait_for("a process to stand still", PATIENCE, || is_still(pid).then_some(())),
        _ => Ok(()),
    }
}

/// As [`signal`], without waiting for anything.
pub(crate) fn send(pid: i32, signal: Signal) -> Result<()> {
    rustix::process::kill_process(valid(pid)?, signal.raw())
        .map_err(Error::because(format!("can't send {signal:?} to process {pid}")))
}

/// Sends a signal to all processes of a group.
pub(crate) fn signal_group(leader: i32, signal: Signal) -> Result<()> {
    rustix::process::kill_process_group(valid(leader)?, signal.raw())
        .map_err(Error::because(format!("can't send {signal:?} to process group {leader}")))
}

/// Ids below 1 mean groups or everybody, and 1 is the system: no test wants to hit those.
fn valid(pid: i32) -> Result<Pid> {
    Pid::from_raw(pid)
        .filter(|_| pid > 1)
        .ok_or_else(|| Error::new(format!("{pid} is no process to send a signal to")))
}

/// The id of this process, as a pid the functions here take.
#[must_use]
pub fn own() -> i32 {
    rustix::process::getpid().as_raw_nonzero().get()
}

/// A child's id in the type that signals and SQL use; no system has ids beyond it.
#[must_use]
pub fn id_of(child: &Child) -> i32 {
    i32::try_from(child.id()).unwrap_or_default()
}

/// How many threads a process has.
#[must_use]
pub fn threads(pid: i32) -> Option<usize> {
    Some(fs::read_dir(format!("/proc/{pid}/task")).ok()?.count())
}

/// How many file descriptors a process has open.
#[must_use]
pub fn descriptors(pid: i32) -> Option<usize> {
    let count = fs::read_dir(format!("/proc/{pid}/fd")).ok()?.count();
    // Reading our own list takes one.
    Some(if pid == own() { count.saturating_sub(1) } else { count })
}

/// How much memory of a process is in RAM.
#[must_use]
pub fn resident_bytes(pid: i32) -> Option<u64> {
    let statm = fs::read_to_string(format!("/proc/{pid}/statm")).ok()?;
    let pages: u64 = statm.split_whitespace().nth(1)?.parse().ok()?;
    Some(pages * u64::try_from(rustix::param::page_size()).ok()?)
}

/// How much memory a process takes up: pages that it shares with others count in part (PSS).
#[must_use]
pub fn proportional_bytes(pid: i32) -> Option<u64> {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:"))?;
    let kibibytes: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kibibytes * 1024)
}

/// Lets this process open as many files as it may: the limit that it starts with is often 1024.
pub fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    // Whoever opens too many files will hear of it then.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
}

/// Lets this process have no file open with a number from `limit` on, until it is told otherwise.
pub fn limit_descriptors(limit: usize) {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    // More than the system allows is no limit.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: Some(limit as u64), maximum });
}

/// Lets this process have so many bytes of addresses more than it has now, and no more: so threads with a stack larger than
/// that (`RUST_MIN_STACK`) cannot be started. `false` if the system does not tell how many it has.
pub fn limit_address_space(more: u64) -> bool {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let used = || {
        let statm = fs::read_to_string("/proc/self/statm").ok()?;
        let pages: u64 = statm.split_whitespace().next()?.parse().ok()?;
        Some(pages * u64::try_from(rustix::param::page_size()).ok()?)
    };
    let Some(used) = used() else { return false };
    let Rlimit { maximum, .. } = getrlimit(Resource::As);
    setrlimit(Resource::As, Rlimit { current: Some(used + more), maximum }).is_ok()
}

/// Takes that limit off.
pub fn raise_address_space_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { maximum, .. } = getrlimit(Resource::As);
    let _ = setrlimit(Resource::As, Rlimit { current: maximum, maximum });
}

/// The processor time that this process has used, in user mode and in the kernel, to the nanosecond.
#[must_use]
pub fn own_cpu_time() -> Duration {
    let used = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::try_from(used).unwrap_or_default()
}

/// The processor time that a process has used, in user mode and in the kernel. Its unit is commonly 10 ms.
#[must_use]
pub fn cpu_time(pid: i32) -> Option<Duration> {
    let stat = Stat::read(pid)?;
    let user: u64 = stat.field(14)?.parse().ok()?;
    let kernel: u64 = stat.field(15)?.parse().ok()?;
    Some(Duration::from_millis((user + kernel) * 1000 / rustix::param::clock_ticks_per_second().max(1)))
}

/// Whether a process exists and isn't just waiting for its parent to take note of its end.
#[must_use]
pub fn is_alive(pid: i32) -> bool {
    if let Some(stat) = Stat::read(pid) {
        return !matches!(stat.field(3), Some("Z" | "X") | None);
    }
    !cfg!(target_os = "linux") && valid(pid).is_ok_and(|pid| rustix::process::test_kill_process(pid).is_ok())
}

/// Whether all threads of a process are stopped (SIGSTOP) or gone, so that it does nothing any more. Elsewhere than on Linux:
/// assumed.
pub(crate) fn is_still(pid: i32) -> bool {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return true;
    };
    threads
        .filter_map(|thread| Stat::in_folder(&thread.ok()?.path()))
        .all(|stat| matches!(stat.field(3), Some("T" | "t" | "Z" | "X") | None))
}

/// The children of a process.
#[must_use]
pub fn children(parent: i32) -> Vec<i32> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return children_by_ps(parent);
    };
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|&pid| Stat::read(pid).and_then(|stat| stat.field(4)?.parse().ok()) == Some(parent))
        .collect()
}

fn children_by_ps(parent: i32) -> Vec<i32> {
    let Ok(output) = Command::new("ps").args(["-axo", "pid=,ppid="]).output() else {
        return Vec::new();
    };
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| {
            let mut ids = line.split_whitespace().map_while(|id| id.parse::<i32>().ok());
            let child = ids.next()?;
            (ids.next()? == parent).then_some(child)
        })
        .collect()
}

/// The text of `/proc/PID/stat` after the program's name, which may hold blanks and brackets itself.
struct Stat(String);

impl Stat {
    fn read(pid: i32) -> Option<Self> {
        Self::in_folder(Path::new(&format!("/proc/{pid}")))
    }

    fn in_folder(folder: &Path) -> Option<Self> {
        let text = fs::read_to_string(folder.join("stat")).ok()?;
        Some(Self(text.rsplit_once(')')?.1.to_owned()))
    }

    /// A field by its number in proc(5); the third is the first after the name.
    fn field(&self, number: usize) -> Option<&str> {
        self.0.split_whitespace().nth(number.checked_sub(3)?)
    }
}
