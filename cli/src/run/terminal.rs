//! The terminal, which one process group has at a time: the front's, or the command's.

use std::fs::{File, OpenOptions};

use nix::unistd::{getpgid, getpgrp, getsid};
use rustix::io::Errno;
use rustix::process::Pid;
use rustix::termios::{tcgetpgrp, tcsetpgrp};

use super::group::Group;

/// The terminal of this session, if it has one.
///
/// The command gets it when it asks for it: the system stops a process that reads the terminal without having it. A command that never does so,
/// in a pipe with a pager say, takes it from nobody.
pub(super) struct Terminal {
    file: Option<File>,
    /// `None` where the group is one of outside of the container, which has no number here.
    own: Option<Pid>,
    is_given: bool,
}

impl Terminal {
    pub(super) fn open() -> Self {
        let file = OpenOptions::new().read(true).write(true).open("/dev/tty").ok();
        Self { file, own: Pid::from_raw(getpgrp().as_raw()), is_given: false }
    }

    /// True if this process's own group has it.
    fn is_ours(&self) -> bool {
        self.own.is_some() && self.file.as_ref().and_then(|file| tcgetpgrp(file).ok()) == self.own
    }

    /// True if it can go from this process to the command and back, whoever has it now.
    pub(super) fn can_be_given(&self) -> bool {
        self.file.is_some() && self.own.is_some()
    }

    /// True if the command has it, as far as is known.
    pub(super) fn is_given(&self) -> bool {
        self.is_given
    }

    /// True if there was one, and the session has it no more: what is read from it then is an error.
    pub(super) fn is_gone(&self) -> bool {
        // The group may also be one of outside of the container, which has no number here.
        let is_gone = |error| error != Errno::OPNOTSUPP;
        self.file.as_ref().is_some_and(|file| tcgetpgrp(file).is_err_and(is_gone))
    }

    /// Looks whether the command has it still, or a group that it made. While this process stood still, the shell may have taken it.
    pub(super) fn look(&mut self) {
        let has_it = self.file.as_ref().and_then(|file| tcgetpgrp(file).ok());
        self.is_given &= has_it.is_some() && has_it != self.own && has_it != shell();
    }

    /// Gives it to the command if it is ours; `true` if the command has it.
    pub(super) fn give(&mut self, group: &Group) -> bool {
        if let Some(file) = self.file.as_ref().filter(|_| self.is_ours()) {
            self.is_given = tcsetpgrp(file, group.id()).is_ok();
        }
        self.look();
        self.is_given
    }

    /// Takes it back if the command has it.
    pub(super) fn take_back(&mut self) -> bool {
        let was_given = std::mem::take(&mut self.is_given);
        if let Some((file, own)) = self.file.as_ref().zip(self.own).filter(|_| was_given) {
            // SIGTTOU is blocked, so this does not stop us.
            let _ = tcsetpgrp(file, own);
        }
        was_given
    }
}

/// The group of the process that leads the session; `None` where it is outside of the container: the system says 0 then.
fn shell() -> Option<Pid> {
    let leader = getsid(None).ok().filter(|leader| leader.as_raw() > 0)?;
    Pid::from_raw(getpgid(Some(leader)).ok()?.as_raw())
}
