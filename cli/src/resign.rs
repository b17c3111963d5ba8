//! `resign`: asks the leader to step down.

use clap::Args;
use dsync::{ErrorKind, Key};

use crate::args::Arguments;
use crate::connect;
use crate::exit::{Failure, NOTHING};
use crate::key;
use crate::out;
use crate::text;

/// Asks the leader of a lock to step down.
///
/// A leader of the library, or a `lead`, hears of it with its next heartbeat (a quarter of its lease by default; a fifth, 9 s, for
/// `lead`), ends its work, and gives the lock back. Others that have a lock do not listen.
#[derive(Args, Debug)]
pub(crate) struct Resign {
    /// The lock of the leadership.
    #[arg(value_name = "KEY", value_parser = key::parse)]
    key: Key,
}

impl Resign {
    pub(crate) fn run(&self, arguments: &Arguments) -> Result<u8, Failure> {
        let manager = connect::manager(&arguments.connection)?;
        let name = text::key(&self.key.to_string());
        if manager.request_resignation(self.key.clone())? {
            out::print([
                format!("asked whoever has {name} to resign"),
                "a leader hears of it with its next heartbeat; others, such as `pgdsync run`, do not listen"
                    .to_owned(),
            ])?;
            return Ok(0);
        }
        let text = match manager.inspect(self.key.clone()) {
            Ok(view) if view.holder.is_some() => {
                format!(
                    "whoever has {name} cannot be asked: its term has no token, or others have it, too; `pgdsync break` ends its session"
                )
            }
            Err(error) if error.kind() == ErrorKind::InvalidKey => return Err(error.into()),
            _ => format!("nobody has the lock {name}"),
        };
        Err(Failure::new(NOTHING, text))
    }
}
