//! `run` and `lead`: a command under a lock.
//!
//! Two processes watch over the command, so that no single kill or freeze lets it outlive its lock unseen:
//!
//! - The **front** is what the user started. It starts the command in a process group of its own, passes signals on, shares the terminal
//!   with it, and ends with its exit code.
//! - The **keeper** is this program again, in a session of its own. It has the sessions of the server and the lock, tells the front
//!   until when the lock is held for sure, and gives it back when the command's group is gone.
//!
//! Either ends the group when the other one is gone, or when the term is over and the other one stands still.

mod front;
mod gate;
mod group;
mod job;
pub(crate) mod keeper;
pub(crate) mod options;
mod signals;
mod terminal;
mod wire;

use std::ffi::{OsStr, OsString};
use std::process::ExitCode;

use crate::exit::Failure;
use front::{Front, Plan};
use options::{LeadArguments, RunArguments};

/// The first argument of a keeper.
const KEEP: &str = "__keep";
/// The first argument of what becomes the command.
const BECOME: &str = "__become";

/// What this process is if it is not the one that the user started.
pub(crate) fn inner(arguments: &[OsString]) -> Option<ExitCode> {
    let verb = arguments.get(1)?;
    if verb == OsStr::new(KEEP) {
        return Some(keeper::keep());
    }
    if verb == OsStr::new(BECOME) {
        return Some(gate::become_command(&arguments[2..]));
    }
    None
}

/// `run`.
pub(crate) fn run(arguments: &RunArguments) -> Result<u8, Failure> {
    arguments.check()?;
    let plan = Plan { command: &arguments.command, watch: &arguments.watch, leads: false };
    Front::start(plan)?.watch()
}

/// `lead`.
pub(crate) fn lead(arguments: &LeadArguments) -> Result<u8, Failure> {
    let plan = Plan { command: &arguments.command, watch: &arguments.watch, leads: true };
    Front::start(plan)?.watch()
}
