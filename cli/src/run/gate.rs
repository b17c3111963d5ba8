//! The process that becomes the command: it waits until the keeper has been told of its group.

use std::ffi::OsString;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::process::{Command, ExitCode};

use rustix::cmsg_space;
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

use super::signals;
use crate::exit::{CANNOT_EXECUTE, NOT_FOUND, say};

/// Becomes the command. The arguments are the signals to let through, and the command.
pub(super) fn become_command(arguments: &[OsString]) -> ExitCode {
    let [signals, program, rest @ ..] = arguments else { return ExitCode::from(CANNOT_EXECUTE) };
    match take_standard_input() {
        Ok(true) => {}
        // The front has ended, or wants no command any more.
        Ok(false) => return ExitCode::from(CANNOT_EXECUTE),
        Err(error) => {
            say(&format!("cannot run {}: its standard input cannot be taken: {error}", program.display()));
            return ExitCode::from(CANNOT_EXECUTE);
        }
    }
    signals::let_through(&signals.to_string_lossy());
    let error = Command::new(program).args(rest).exec();
    say(&format!("cannot run {}: {error}", program.display()));
    ExitCode::from(if error.kind() == io::ErrorKind::NotFound { NOT_FOUND } else { CANNOT_EXECUTE })
}

/// Lets the process go on that waits at the other end of this socket, with this standard input.
pub(super) fn open(gate: impl AsFd, standard_input: BorrowedFd<'_>) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
    let mut message = SendAncillaryBuffer::new(&mut space);
    let files = [standard_input];
    message.push(SendAncillaryMessage::ScmRights(&files));
    retry_on_intr(|| sendmsg(&gate, &[IoSlice::new(b"!")], &mut message, SendFlags::empty()))?;
    Ok(())
}

/// Waits for what [`open`] sends: until then the standard input is the socket. `false` if the other end is gone.
fn take_standard_input() -> io::Result<bool> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
    let mut message = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let socket = rustix::stdio::stdin();
    let received = retry_on_intr(|| {
        recvmsg(socket, &mut [IoSliceMut::new(&mut byte)], &mut message, RecvFlags::empty())
    })?;
    if received.bytes == 0 {
        return Ok(false);
    }
    let file: Option<OwnedFd> = message.drain().find_map(|part| match part {
        RecvAncillaryMessage::ScmRights(mut files) => files.next(),
        _ => None,
    });
    // The original is closed when this returns, so that the command has it once.
    rustix::stdio::dup2_stdin(file.ok_or(Errno::MFILE)?)?;
    Ok(true)
}
