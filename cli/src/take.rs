//! `break`: ends the session that has a lock.

use std::io::{BufRead as _, IsTerminal as _, Write as _};

use clap::Args;
use dsync::{Holder, Key};

use crate::args::{Arguments, Output};
use crate::exit::{CONFLICT, Failure, NOTHING, USAGE};
use crate::key;
use crate::text;
use crate::{connect, look, out, show};

/// Ends the session that has a lock, after showing whose it is.
///
/// The server ends the session, and so frees the lock at once: the holder's work may go on for a moment, or for longer if it does not
/// look. Of several that share the lock or have permits, the first one's session is ended. Needs the holder's role, or pg_signal_backend.
#[derive(Args, Debug)]
pub(crate) struct Break {
    /// The lock.
    #[arg(value_name = "KEY", value_parser = key::parse)]
    key: Key,
    /// Does not ask first. Needed where there is no terminal to ask on.
    #[arg(long)]
    yes: bool,
}

impl Break {
    pub(crate) fn run(&self, arguments: &Arguments) -> Result<u8, Failure> {
        let can_ask = std::io::stdin().is_terminal() && std::io::stderr().is_terminal();
        if !self.yes && !can_ask {
            let text = "there is no terminal to ask on whether to end the holder's session; say --yes if it is to be ended";
            return Err(Failure::new(USAGE, text));
        }
        let manager = connect::manager(&arguments.connection)?;
        let nobody =
            || Failure::new(NOTHING, format!("nobody has the lock {}", text::key(&self.key.to_string())));
        let view = manager.inspect(self.key.clone())?;
        let shown = view.holder.as_ref().ok_or_else(nobody)?;
        if arguments.output == Output::Text {
            out::print(show::describe(&view, &connect::namespace(&arguments.connection)))?;
        }
        if !self.yes {
            if !ask() {
                return Err(Failure::new(NOTHING, "nothing was done"));
            }
            // The answer was about that one.
            let now = manager.inspect(self.key.clone())?.holder.ok_or_else(nobody)?;
            if id(&now) != id(shown) {
                return Err(Failure::new(CONFLICT, "another has the lock now; nothing was done"));
            }
        }
        // What was shown: of a key, there may be a lock and a semaphore.
        let broken = match view.permits {
            Some(permits) => manager.semaphore(self.key.clone(), permits)?.break_lock()?,
            None => manager.break_lock(self.key.clone())?,
        };
        let holder = broken.ok_or_else(nobody)?;
        out::print([match arguments.output {
            Output::Json => look::holder_json(&holder).to_string(),
            Output::Text => {
                format!("ended the session of {}, backend {}", look::holder_text(&view, &holder), holder.pid)
            }
        }])?;
        Ok(0)
    }
}

fn id(holder: &Holder) -> (i32, Option<i64>) {
    (holder.pid, holder.token)
}

/// Asks on standard error, since standard output may be a file. Whatever is not yes is no.
fn ask() -> bool {
    let mut terminal = std::io::stderr();
    // Without the question there is no answer either.
    let asked = terminal.write_all(b"End this session? [y/N] ").and_then(|()| terminal.flush());
    let mut answer = String::new();
    asked.and_then(|()| std::io::stdin().lock().read_line(&mut answer)).is_ok()
        && matches!(answer.trim().to_lowercase().as_str(), "y" | "yes")
}
