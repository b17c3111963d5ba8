//! `permits`: how many may hold a key at the same time.

use clap::Args;
use dsync::Key;

use crate::args::Arguments;
use crate::exit::Failure;
use crate::{connect, key, out, text};

/// Changes how many permits a key has, on which all agree who say `run --permits`.
///
/// More are there at once for who comes, and within half a second for who waits. Of fewer, those that are held run out: until they are given
/// back there may be as many holders as before. Who still says the former number goes on, by the new one; the number before that is refused.
#[derive(Args, Debug)]
pub(crate) struct Permits {
    /// The key of the permits.
    #[arg(value_name = "KEY", value_parser = key::parse)]
    key: Key,
    /// How many there are from now on.
    #[arg(value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1023))]
    number: u32,
}

impl Permits {
    pub(crate) fn run(&self, arguments: &Arguments) -> Result<u8, Failure> {
        let manager = connect::manager(&arguments.connection)?;
        let before = manager.semaphore(self.key.clone(), self.number)?.set_permits(self.number)?;
        let key = text::key(&self.key.to_string());
        let former = if before == self.number { String::new() } else { format!(", and had {before}") };
        let permits = if self.number == 1 { "permit" } else { "permits" };
        out::print([format!("{key} has {} {permits}{former}", self.number)])?;
        Ok(0)
    }
}
