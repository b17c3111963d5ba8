//! The private folder of one server, with everything that it writes.

use std::fs::{self, File, OpenOptions, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::account::Account;
use crate::error::{Error, Result};
use crate::random;

/// What a folder is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Keeps {
    /// Whatever a loss of power may take.
    ForNow,
    /// What the disk has in the end: figures of it are wanted.
    OnDisk,
}

/// A new folder in `/dev/shm` or `/tmp`. The [watcher](crate::watcher) removes it, not a destructor: that works after a kill too.
///
/// These are preferred to `TMPDIR` because a Unix socket's path must fit into about a hundred bytes, and because the
/// server's user must be able to reach it.
#[derive(Debug)]
pub(crate) struct Folder {
    path: PathBuf,
    account: Account,
}

/// Where folders are made. A server is made of a thousand small files, and a test of some servers, so that on many a disk their coming
/// and going takes more time than the test.
fn parent(keeps: Keeps) -> PathBuf {
    /// Linux has it in memory.
    const IN_MEMORY: &str = "/dev/shm";
    /// Much more than two runs of all tests have at once. A container often has 64 MB.
    const ROOM: u64 = 4 << 30;
    let has_room = || {
        rustix::fs::statvfs(IN_MEMORY).is_ok_and(|stat| stat.f_bavail.saturating_mul(stat.f_frsize) >= ROOM)
    };
    if keeps == Keeps::ForNow && has_room() {
        PathBuf::from(IN_MEMORY)
    } else if Path::new("/tmp").is_dir() {
        PathBuf::from("/tmp")
    } else {
        std::env::temp_dir()
    }
}

impl Folder {
    /// Chooses a name that nobody has, and makes nothing yet: the watcher has to know it first, or a kill between the
    /// two would leave a folder behind. This is why the `tempfile` crate, which does both at once, is of no use here.
    pub(crate) fn plan(prefix: &str, account: Account, keeps: Keeps) -> Result<Self> {
        let parent = parent(keeps);
        loop {
            // 48 bits: a path may not be long, and two processes may not choose the same.
            let path = parent.join(format!("{prefix}{:012x}", random::number()? >> 16));
            if !path.exists() {
                return Ok(Self { path, account });
            }
        }
    }

    /// Makes the folder.
    pub(crate) fn make(&self) -> Result<()> {
        fs::create_dir(&self.path).map_err(Error::because(format!(
            "can't make {}; its folder must be writable",
            self.path.display()
        )))?;
        self.hand_over(&self.path, 0o755)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    pub(crate) fn subfolder(&self, name: &str, mode: u32) -> Result<PathBuf> {
        let path = self.join(name);
        fs::create_dir(&path).map_err(Error::because(format!("can't make {}", path.display())))?;
        self.hand_over(&path, mode)?;
        Ok(path)
    }

    /// Writes a file that belongs to the server's user.
    pub(crate) fn write(&self, name: &str, text: &str, mode: u32) -> Result<PathBuf> {
        let path = self.join(name);
        fs::write(&path, text).map_err(Error::because(format!("can't write {}", path.display())))?;
        self.hand_over(&path, mode)?;
        Ok(path)
    }

    /// Opens a file for adding to its end. It's ours: whoever we start gets it open.
    pub(crate) fn append_to(&self, name: &str) -> Result<File> {
        let path = self.join(name);
        OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .map_err(Error::because(format!("can't open {}", path.display())))
    }

    /// The text of a file, or none while it doesn't exist.
    pub(crate) fn read(&self, name: &str) -> String {
        fs::read(self.join(name))
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }

    fn hand_over(&self, path: &Path, mode: u32) -> Result<()> {
        fs::set_permissions(path, Permissions::from_mode(mode))
            .map_err(Error::because(format!("can't set the permissions of {}", path.display())))?;
        self.account.own(path)
    }
}

/// The end of a log, for error messages.
pub(crate) fn last_lines(text: &str) -> String {
    const LINES: usize = 15;
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LINES)..].join("\n")
}
