//! The command's process group.

use std::cell::Cell;
use std::fs;
use std::sync::LazyLock;

use nix::unistd::getpgid;
use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process_group, test_kill_process_group};

/// A process group, which may have ended, and whose number may be another one's since.
#[derive(Debug)]
pub(super) struct Group {
    id: Pid,
    /// When its leader was started, as the system counts it; `None` where `/proc` does not tell.
    begun: Option<u64>,
    /// A member that ran when it was looked for last, or the leader.
    seen: Cell<i32>,
}

impl Group {
    /// The group of this leader, which runs.
    pub(super) fn of(leader: Pid) -> Self {
        let begun = stat(leader.as_raw_nonzero().get()).map(|stat| stat.begun);
        Self { id: leader, begun, seen: Cell::new(leader.as_raw_nonzero().get()) }
    }

    /// The one that another process knows.
    pub(super) fn known(id: i32, begun: Option<u64>) -> Option<Self> {
        Some(Self { id: Pid::from_raw(id)?, begun, seen: Cell::new(id) })
    }

    pub(super) fn begun(&self) -> Option<u64> {
        self.begun
    }

    pub(super) fn id(&self) -> Pid {
        self.id
    }

    /// Sends a signal to all of it. One that is gone, or that is not ours to signal, gets none.
    pub(super) fn signal(&self, signal: Signal) {
        if !self.is_another() {
            let _ = kill_process_group(self.id, signal);
        }
    }

    /// Tells it to end. One that stands still cannot heed that.
    pub(super) fn tell_to_end(&self, signal: Signal) {
        self.signal(signal);
        self.signal(Signal::CONT);
    }

    /// True if none of its processes runs. Those that have ended, and that nobody has waited for, do not count: in a container there may
    /// be nobody who would.
    pub(super) fn is_gone(&self) -> bool {
        match test_kill_process_group(self.id) {
            Err(Errno::SRCH) => true,
            // Of another user.
            Err(_) => self.is_another(),
            Ok(()) => self.is_another() || self.all_have_ended(),
        }
    }

    /// The system gives a number anew only when no process and no group has it. So a leader that was started at another time leads
    /// another group.
    fn is_another(&self) -> bool {
        let now = stat(self.id.as_raw_nonzero().get()).map(|stat| stat.begun);
        self.begun.zip(now).is_some_and(|(then, now)| then != now)
    }

    /// True if `/proc` shows members, and all of them have ended.
    fn all_have_ended(&self) -> bool {
        // The same ones twice: one that starts another and ends may do both while the list is read, and the other is not in it then.
        self.ended().is_some_and(|ended| !ended.is_empty() && self.ended() == Some(ended))
    }

    /// Its processes, if all of them have ended.
    fn ended(&self) -> Option<Vec<i32>> {
        if hides_processes() {
            return None;
        }
        if self.member(self.seen.get()) == Some(Member::Runs) {
            return None;
        }
        let processes = fs::read_dir("/proc").ok()?.flatten();
        let numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let mut ended = Vec::new();
        for number in numbers {
            match self.member(number) {
                None => {}
                Some(Member::HasEnded) => ended.push(number),
                Some(Member::Runs) => {
                    self.seen.set(number);
                    return None;
                }
            }
        }
        Some(ended)
    }

    /// What is known of this process, if it is one of the group. One that `/proc` does not show, or whose file cannot be read, may run.
    fn member(&self, process: i32) -> Option<Member> {
        let id = self.id.as_raw_nonzero().get();
        let Some(stat) = stat(process) else {
            let group = getpgid(Some(nix::unistd::Pid::from_raw(process)));
            return group.is_ok_and(|group| group.as_raw() == id).then_some(Member::Runs);
        };
        let state = if stat.has_ended { Member::HasEnded } else { Member::Runs };
        (stat.group == id).then_some(state)
    }
}

/// True unless the system tells that this process stands still or is gone, or that another process group has its terminal.
pub(super) fn is_in_the_foreground(process: i32) -> bool {
    match stat(process) {
        // Without a terminal of its session's it may have one all the same, that of a container say.
        Some(stat) => !stat.stands_still && (stat.has_terminal == stat.group || stat.has_terminal < 0),
        None => !has_proc(),
    }
}

/// A process of the group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Member {
    Runs,
    HasEnded,
}

/// What `/proc` says of a process.
struct Stat {
    has_ended: bool,
    stands_still: bool,
    group: i32,
    /// The group that has the terminal of its session.
    has_terminal: i32,
    begun: u64,
}

/// True if `/proc` shows the processes by the numbers that they have here: in a container it may be that of the host.
fn has_proc() -> bool {
    static HAS_PROC: LazyLock<bool> = LazyLock::new(|| {
        let own = fs::read_link("/proc/self").ok();
        own.and_then(|own| own.to_str()?.parse().ok()) == Some(std::process::id())
    });
    *HAS_PROC
}

/// True if `/proc` may leave out processes, those of the same user too, as where it was mounted with `hidepid=2`.
/// <https://docs.kernel.org/filesystems/proc.html#mount-options>
fn hides_processes() -> bool {
    static HIDES_PROCESSES: LazyLock<bool> = LazyLock::new(|| {
        let mounts = fs::read("/proc/self/mountinfo").unwrap_or_default();
        proc_may_hide(&String::from_utf8_lossy(&mounts)) && !sees_all()
    });
    *HIDES_PROCESSES
}

/// True if no process of this container is hidden from this one, as from root.
#[cfg(target_os = "linux")]
fn sees_all() -> bool {
    use rustix::thread::{CapabilitySet, capabilities};
    capabilities(None).is_ok_and(|have| have.effective.contains(CapabilitySet::SYS_PTRACE))
}

#[cfg(not(target_os = "linux"))]
fn sees_all() -> bool {
    false
}

fn proc_may_hide(mounts: &str) -> bool {
    const ALL_ARE_SHOWN: [&str; 4] = ["hidepid=0", "hidepid=off", "hidepid=1", "hidepid=noaccess"];
    let hides = |option: &str| option.starts_with("hidepid=") && !ALL_ARE_SHOWN.contains(&option);
    // The last one that was mounted there is the one that is seen.
    let proc = mounts.lines().rfind(|mount| mount.split(' ').nth(4) == Some("/proc"));
    proc.is_none_or(|mount| mount.split([' ', ',']).any(hides))
}

/// <https://man7.org/linux/man-pages/man5/proc_pid_stat.5.html>
fn stat(process: i32) -> Option<Stat> {
    if !has_proc() {
        return None;
    }
    // A long name is cut, maybe in the midst of a character.
    let text = fs::read(format!("/proc/{process}/stat")).ok()?;
    let text = String::from_utf8_lossy(&text);
    // The name may have spaces and brackets in it.
    let mut fields = text.get(text.rfind(')')? + 1..)?.split_ascii_whitespace();
    let state = fields.next()?;
    let stands_still = matches!(state, "T" | "t");
    let group = fields.nth(1)?.parse().ok()?;
    let has_terminal = fields.nth(2)?.parse().ok()?;
    let threads: u32 = fields.nth(11)?.parse().ok()?;
    let begun = fields.nth(1)?.parse().ok()?;
    // Where only the first thread has ended, the others go on.
    let has_ended = matches!(state, "X" | "x") || state == "Z" && threads <= 1;
    Some(Stat { has_ended, stands_still, group, has_terminal, begun })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::CommandExt as _;
    use std::process::Command;

    #[test]
    fn a_group_is_gone_when_all_of_it_have_ended_waited_for_or_not() {
        let mut child = Command::new("sleep").arg("100").process_group(0).spawn().unwrap();
        let group = Group::of(Pid::from_child(&child));
        assert!(!group.is_gone());
        group.signal(Signal::KILL);
        if cfg!(target_os = "linux") {
            // Nobody has waited for it.
            while !group.is_gone() {
                std::thread::yield_now();
            }
        }
        child.wait().unwrap();
        assert!(group.is_gone());
    }

    #[test]
    fn what_proc_may_hide_is_told_by_how_it_was_mounted() {
        let root = "29 1 254:0 / / rw,relatime shared:1 - ext4 /dev/root rw";
        let proc = |options: &str| format!("23 29 0:21 / /proc rw,nosuid shared:6 - proc proc {options}");
        for (options, may_hide) in [
            ("rw", false),
            ("rw,hidepid=0", false),
            ("rw,gid=7,hidepid=noaccess", false),
            ("rw,hidepid=2", true),
            ("rw,hidepid=invisible,subset=pid", true),
            ("rw,hidepid=ptraceable", true),
        ] {
            assert_eq!(proc_may_hide(&format!("{root}\n{}\n", proc(options))), may_hide, "{options}");
        }
        assert!(proc_may_hide(&format!("{}\n{}", proc("rw"), proc("rw,hidepid=4"))), "the last one");
        assert!(proc_may_hide(root), "none");
    }

    /// A name has fifteen bytes at most, so this one ends in the midst of a character.
    #[test]
    #[cfg(target_os = "linux")]
    fn a_group_is_not_gone_while_a_process_of_it_runs_whose_name_is_cut() {
        let folder = std::env::temp_dir().join(format!("pgdsync-name-{}", std::process::id()));
        fs::create_dir(&folder).unwrap();
        let program = folder.join("quartalsabschl\u{fc}sse");
        std::os::unix::fs::symlink("/bin/sleep", &program).unwrap();
        let mut runs = Command::new(&program).arg0("sleep").arg("1000").process_group(0).spawn().unwrap();
        fs::remove_dir_all(folder).unwrap();
        let group = Group::of(Pid::from_child(&runs));
        let mut ended = Command::new("true").process_group(group.id.as_raw_nonzero().get()).spawn().unwrap();
        let number = i32::try_from(ended.id()).unwrap();
        let has_ended = || (group.member(number) == Some(Member::HasEnded)).then_some(());
        support::wait_for("the end of the other", std::time::Duration::from_secs(60), has_ended).unwrap();
        assert!(!group.is_gone());
        group.signal(Signal::KILL);
        ended.wait().unwrap();
        runs.wait().unwrap();
        assert!(group.is_gone());
    }

    /// Such a process is shown as one that has ended.
    #[test]
    #[cfg(target_os = "linux")]
    fn a_group_is_not_gone_while_a_thread_of_it_runs() {
        // `exit` by itself ends the first thread alone.
        const SCRIPT: &str = "import ctypes, os, platform, threading, time
threading.Thread(target=time.sleep, args=(1000,)).start()
ctypes.CDLL(None).syscall({'x86_64': 60, 'aarch64': 93}[platform.machine()], 0)";
        let Ok(mut child) = Command::new("python3").args(["-c", SCRIPT]).process_group(0).spawn() else {
            support::skip("there is no python3 (`apt-get install python3`)");
            return;
        };
        let group = Group::of(Pid::from_child(&child));
        let status = format!("/proc/{}/status", child.id());
        let has_ended =
            || fs::read_to_string(&status).is_ok_and(|text| text.contains("State:\tZ")).then_some(());
        support::wait_for("the end of the first thread", std::time::Duration::from_secs(60), has_ended)
            .unwrap();
        assert!(!group.is_gone());
        group.signal(Signal::KILL);
        child.wait().unwrap();
        assert!(group.is_gone());
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_process_that_stands_still_or_is_gone_has_no_terminal() {
        // In a session of its own, so that this test's terminal is of no influence.
        let mut child = Command::new("setsid").args(["sleep", "100"]).spawn().unwrap();
        let process = Pid::from_child(&child);
        let number = process.as_raw_nonzero().get();
        let becomes = |wanted| {
            let is_so = || (is_in_the_foreground(number) == wanted).then_some(());
            support::wait_for("the process", std::time::Duration::from_secs(60), is_so).unwrap();
        };
        becomes(true);
        rustix::process::kill_process(process, Signal::STOP).unwrap();
        becomes(false);
        rustix::process::kill_process(process, Signal::CONT).unwrap();
        becomes(true);
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!is_in_the_foreground(number));
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_number_that_another_has_now_is_no_group_of_ours() {
        let mut child = Command::new("sleep").arg("100").process_group(0).spawn().unwrap();
        let mut group = Group::of(Pid::from_child(&child));
        group.begun = group.begun.map(|begun| begun - 1);
        assert!(group.is_gone());
        group.signal(Signal::KILL);
        assert_eq!(child.try_wait().unwrap(), None);
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
