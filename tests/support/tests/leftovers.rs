//! However the process that holds a server ends, no process and no folder is left behind.

use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use support::netns::Netns;
use support::process::{self, Signal};
use support::{Server, wait_for};

type Outcome = Result<(), Box<dyn std::error::Error>>;

/// Longer than the watcher can take: it waits ten seconds for the program, before it resorts to SIGKILL, and five for the folder. A server that is told to end
/// at once gives its own processes five seconds, which a busy machine may need.
const SOON: Duration = Duration::from_secs(20);

/// A process that holds a server, and what it told about it.
struct Holder {
    process: Child,
    folder: PathBuf,
    servers: Vec<i32>,
    address: String,
}

impl Holder {
    fn start(mode: &str) -> Result<Self, Box<dyn std::error::Error>> {
        let mut process = Command::new(env!("CARGO_BIN_EXE_throwaway-postgres"))
            .arg(mode)
            // Like a job of a terminal, so that the test can press Ctrl-C for it alone.
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut folder = PathBuf::new();
        let mut servers = Vec::new();
        let mut address = String::new();
        for line in BufReader::new(process.stdout.take().ok_or("no output")?).lines() {
            let line = line?;
            match line.split_once(' ') {
                Some(("folder", path)) => folder = path.into(),
                Some(("address", text)) => text.clone_into(&mut address),
                Some(("postmaster", pid)) => servers.push(pid.parse()?),
                _ if line == "ready" => break,
                _ => {}
            }
        }
        servers.extend(process::children(*servers.first().ok_or("no server")?));
        assert!(folder.is_dir() && servers.len() > 3, "{folder:?} {servers:?}");
        Ok(Self { process, folder, servers, address })
    }

    /// Waits until everything is gone, and asserts that it goes.
    fn leaves_nothing(mut self) -> Outcome {
        drop(self.process.stdin.take());
        self.process.wait()?;
        wait_for("the server's processes to end", SOON, || {
            self.servers.iter().all(|&pid| !process::is_alive(pid)).then_some(())
        })?;
        wait_for("the folder to go", SOON, || (!self.folder.exists()).then_some(()))?;
        assert_eq!(processes_naming(&self.folder)?, Vec::<String>::new());
        Ok(())
    }
}

/// The command lines that have to do with a folder: the server's, its backends' and the watcher's.
fn processes_naming(folder: &Path) -> Result<Vec<String>, Box<dyn std::error::Error>> {
    let name = folder.file_name().ok_or("no name")?.to_string_lossy().into_owned();
    let watcher_too = || -> std::io::Result<Vec<String>> {
        let mut found = Vec::new();
        for entry in std::fs::read_dir("/proc")? {
            if let Ok(line) = std::fs::read(entry?.path().join("cmdline")) {
                found.extend(
                    Some(String::from_utf8_lossy(&line).into_owned()).filter(|line| line.contains(&name)),
                );
            }
        }
        Ok(found)
    };
    // The watcher itself ends a moment after its last deed.
    let _ = wait_for("the watcher's end", Duration::from_secs(5), || {
        watcher_too().ok()?.is_empty().then_some(())
    });
    Ok(watcher_too()?)
}

#[test]
fn nothing_is_left_after_a_kill() -> Outcome {
    let mut holder = Holder::start("")?;
    holder.process.kill()?;
    holder.leaves_nothing()
}

#[test]
fn nothing_is_left_after_a_kill_with_the_server_frozen() -> Outcome {
    let mut holder = Holder::start("frozen")?;
    holder.process.kill()?;
    holder.leaves_nothing()
}

#[test]
fn nothing_is_left_after_ctrl_c() -> Outcome {
    let holder = Holder::start("")?;
    // A terminal signals the whole group.
    let group = format!("-{}", holder.process.id());
    assert!(Command::new("kill").args(["-INT", "--", &group]).status()?.success());
    holder.leaves_nothing()
}

#[test]
fn nothing_is_left_after_an_exit_without_destructors() -> Outcome {
    Holder::start("exit")?.leaves_nothing()
}

#[test]
fn nothing_is_left_after_an_ordinary_end() -> Outcome {
    Holder::start("")?.leaves_nothing()
}

#[test]
fn nothing_is_left_after_a_kill_in_the_middle_of_the_start() -> Outcome {
    // At several moments: before there's anything, or as soon as there may be; and once there is a watcher, in initdb, while the postmaster
    // begins, and after it.
    let early = [3, 5, 7, 10, 15, 20].map(|after| (false, after));
    let late = [0, 5, 20, 150, 400, 700].map(|after| (true, after));
    for (is_watched, after) in early.into_iter().chain(late) {
        let mut process = Command::new(env!("CARGO_BIN_EXE_throwaway-postgres"))
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()?;
        let pid = process::id_of(&process);
        let watchers =
            || -> Vec<PathBuf> { process::children(pid).into_iter().filter_map(watched_folder).collect() };
        if is_watched {
            wait_for("a watcher", SOON, || (!watchers().is_empty()).then_some(()))?;
        }
        std::thread::sleep(Duration::from_millis(after));
        let watchers = watchers();
        assert!(!is_watched || !watchers.is_empty(), "the watcher has gone before its process");
        process.kill()?;
        process.wait()?;
        for folder in watchers {
            wait_for("the folder to go", SOON, || (!folder.exists()).then_some(()))?;
            assert_eq!(processes_naming(&folder)?, Vec::<String>::new());
        }
    }
    Ok(())
}

/// The folder that a process watches over, if it's a watcher.
fn watched_folder(pid: i32) -> Option<PathBuf> {
    let line = String::from_utf8(std::fs::read(format!("/proc/{pid}/cmdline")).ok()?).ok()?;
    let mut words = line.split('\0');
    words.by_ref().find(|&word| word == "dsync-test-watcher")?;
    words.next().map(PathBuf::from)
}

#[test]
fn a_network_namespace_goes_after_a_kill() -> Outcome {
    if support::skip_without(Netns::available()) {
        return Ok(());
    }
    let mut holder = Holder::start("netns")?;
    let address = holder.address.clone();
    assert!(TcpListener::bind((address.as_str(), 0)).is_ok(), "{address}");
    holder.process.kill()?;
    holder.leaves_nothing()?;
    wait_for("the address to go", SOON, || TcpListener::bind((address.as_str(), 0)).is_err().then_some(()))?;
    Ok(())
}

#[test]
fn nothing_is_left_after_a_drop_and_a_drop_in_every_state() -> Outcome {
    let running = Server::start()?;
    let folder = running.folder().to_owned();
    let processes = running.processes();
    drop(running);
    assert!(!folder.exists());
    assert!(processes.iter().all(|&pid| !process::is_alive(pid)));

    let killed = Server::start()?;
    let folder = killed.folder().to_owned();
    killed.kill_postmaster()?;
    drop(killed);
    assert!(!folder.exists());

    // A guard that is forgotten must not keep a frozen server alive.
    let frozen = Server::start()?;
    let folder = frozen.folder().to_owned();
    let processes = frozen.processes();
    std::mem::forget(frozen.freeze()?);
    drop(frozen);
    assert!(!folder.exists());
    assert!(processes.iter().all(|&pid| !process::is_alive(pid)));
    Ok(())
}

#[test]
fn a_child_of_the_test_does_not_keep_the_server_alive() -> Outcome {
    // It starts while the server is there, so it would inherit the pipe to the watcher if it could.
    let server = Server::start()?;
    let folder = server.folder().to_owned();
    let mut child = Command::new("sleep").arg("60").spawn()?;
    let pid = process::id_of(&child);
    let watcher = process::children(process::own())
        .into_iter()
        .find(|&child| watched_folder(child).as_deref() == Some(&folder))
        .ok_or("no watcher")?;
    let pipe = std::fs::read_link(format!("/proc/{watcher}/fd/0"))?;
    assert!(open_files(process::own())?.contains(&pipe), "we hold its other end");
    assert!(!open_files(pid)?.contains(&pipe));
    drop(server);
    assert!(!folder.exists());
    process::signal(pid, Signal::Kill)?;
    child.wait()?;
    Ok(())
}

/// What the descriptors of a process lead to. Both ends of a pipe have one name.
fn open_files(pid: i32) -> std::io::Result<Vec<PathBuf>> {
    std::fs::read_dir(format!("/proc/{pid}/fd"))?
        .filter_map(|entry| entry.ok().map(|entry| std::fs::read_link(entry.path())))
        // Some are closed while we look.
        .filter(|link| !link.as_ref().is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound))
        .collect()
}

/// Of System V's shared memory there is a fixed number of pieces, so a few thousand servers that are killed would use them up.
#[test]
#[cfg(target_os = "linux")]
fn no_shared_memory_is_left_of_a_server_that_was_killed() -> Outcome {
    let pieces = || -> std::io::Result<Vec<String>> {
        let list = std::fs::read_to_string("/proc/sysvipc/shm")?;
        Ok(list.lines().filter_map(|line| line.split_ascii_whitespace().nth(1).map(str::to_owned)).collect())
    };
    let server = Server::start()?;
    let told = std::fs::read_to_string(server.data_dir().join("postmaster.pid"))?;
    let piece =
        told.lines().nth(6).and_then(|line| line.split_ascii_whitespace().nth(1)).ok_or("no number")?;
    server.kill_hard()?;
    assert!(pieces()?.iter().any(|other| other == piece), "{piece} of {:?}", pieces()?);
    drop(server);
    assert!(!pieces()?.iter().any(|other| other == piece), "{piece} is left");
    Ok(())
}
