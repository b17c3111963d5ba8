//! Starts programs in a server's folder so that none can be left behind.

use std::fs::File;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use crate::account::Account;
use crate::error::{Error, Result};
use crate::folder::{Folder, Keeps, last_lines};
use crate::process;
use crate::wait::wait_for;
use crate::watcher::Watcher;

/// For `initdb` and `pg_basebackup`; they need a second, on a busy machine ten.
const TOOL_PATIENCE: Duration = Duration::from_secs(180);

/// Waits for leave to begin: `read` fails when its writer is gone.
const GATE: &str = r#"read -r _ && exec "$@" </dev/null"#;

/// A folder, its watcher, and the user that programs run as in it.
#[derive(Debug)]
pub(crate) struct Workshop {
    // Dropped first: it's the watcher that removes the folder.
    pub(crate) watcher: Watcher,
    pub(crate) folder: Folder,
    account: Account,
    /// The network namespace that programs run in, if it is another one than ours.
    netns: Option<String>,
}

impl Workshop {
    pub(crate) fn open(prefix: &str, account: Account, keeps: Keeps) -> Result<Self> {
        let folder = Folder::plan(prefix, account, keeps)?;
        let watcher = Watcher::over_folder(folder.path())?;
        if let Err(error) = folder.make() {
            // If somebody else has made one of this name, it must stay.
            watcher.tell("nothing", &[])?;
            return Err(error);
        }
        Ok(Self { watcher, folder, account, netns: None })
    }

    /// As [`open`](Self::open), for programs that run in a network namespace.
    pub(crate) fn inside(self, netns: Option<String>) -> Self {
        Self { netns, ..self }
    }

    /// Starts a program whose output goes to the end of `log`, in a process group of its own.
    ///
    /// It begins behind a gate, which opens when the watcher knows its id. Without one, a kill in the moment between
    /// the two would leave a program that nobody looks after.
    pub(crate) fn start(&self, program: &Path, arguments: &[String], log: &str) -> Result<Child> {
        let output = self.folder.append_to(log)?;
        let name = program.display();
        let mut child = self.gated(program, arguments, &output)?.spawn().map_err(Error::because(format!(
            "can't start {name} as the server's user, who needs leave to execute it"
        )))?;
        let opened =
            self.watcher.tell("main", &[process::id_of(&child)]).and_then(|()| match child.stdin.take() {
                Some(mut gate) => {
                    gate.write_all(b"go\n").map_err(Error::because(format!("can't start {name}")))
                }
                None => Ok(()),
            });
        if let Err(error) = opened {
            // Behind its gate it has done nothing yet, so nothing can go wrong with ending it.
            let _ = child.kill();
            let _ = child.wait();
            return Err(error);
        }
        Ok(child)
    }

    /// Tells the watcher that the program it knew of has ended.
    pub(crate) fn has_ended(&self) -> Result<()> {
        self.watcher.tell("main", &[])
    }

    /// Runs a tool to its end.
    pub(crate) fn run(&self, program: &Path, arguments: &[String], log: &str) -> Result<()> {
        let mut child = self.start(program, arguments, log)?;
        let ended =
            wait_for(&program.display().to_string(), TOOL_PATIENCE, || child.try_wait().ok().flatten());
        if ended.is_err() {
            let _ = process::signal_group(process::id_of(&child), process::Signal::Kill);
            let _ = child.wait();
        }
        self.has_ended()?;
        ended.and_then(|status| self.judge(program, status, log))
    }

    fn judge(&self, program: &Path, status: ExitStatus, log: &str) -> Result<()> {
        if status.success() {
            return Ok(());
        }
        let said = last_lines(&self.folder.read(log));
        Err(Error::new(format!("{} failed ({status}); it said:\n{said}", program.display())))
    }

    fn gated(&self, program: &Path, arguments: &[String], output: &File) -> Result<Command> {
        let again = || output.try_clone().map_err(Error::because("can't share a log file"));
        let mut command = match &self.netns {
            None => {
                let mut command = Command::new("/bin/sh");
                self.account.apply(&mut command);
                command
            }
            // Each of these becomes the next one, so the process id is the program's.
            Some(netns) => {
                let mut command = self.account.inside(netns);
                command.arg("/bin/sh");
                command
            }
        };
        command
            .args(["-c", GATE, "gate"])
            .arg(program)
            .args(arguments)
            .process_group(0)
            // The user may not be allowed into ours.
            .current_dir(self.folder.path())
            .env("LC_ALL", "C")
            .env("TZ", "UTC")
            .stdin(Stdio::piped())
            .stdout(again()?)
            .stderr(again()?);
        // PGHOST, PGPORT, PGOPTIONS and their like would send the tools somewhere else.
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("PG")) {
            command.env_remove(name);
        }
        Ok(command)
    }
}
