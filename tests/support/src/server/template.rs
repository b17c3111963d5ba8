//! One `initdb` for all servers of this process: a copy of its result takes a fraction of the time.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::account::Account;
use crate::binaries::Binaries;
use crate::error::{Error, Result};
use crate::folder::Keeps;
use crate::program::Workshop;

/// What `initdb` made, never started. Never dropped either: the watcher removes it when the process has ended.
struct Template {
    binaries: Binaries,
    workshop: Workshop,
}

/// Fills `data` with a new database cluster.
///
/// Copies have one system identifier in common, by which PostgreSQL tells that a standby belongs to another primary.
/// Nothing here joins a standby to any server but the one that it was copied from.
pub(super) fn fill(workshop: &Workshop, binaries: &Binaries, data: &Path) -> Result<()> {
    static TEMPLATE: OnceLock<Result<Template>> = OnceLock::new();
    match TEMPLATE.get_or_init(|| Template::make(binaries)) {
        Ok(template) if template.binaries == *binaries => {
            let arguments = [PathBuf::from("-R"), template.workshop.folder.join("data"), data.to_owned()]
                .map(|argument| argument.display().to_string());
            workshop.run(Path::new("/bin/cp"), &arguments, "initdb.log")
        }
        // DSYNC_PG_BIN has changed since.
        Ok(_) => initialise(workshop, binaries, data, &[]),
        Err(error) => Err(Error::new(error.to_string())),
    }
}

/// Runs `initdb` itself.
pub(super) fn initialise(
    workshop: &Workshop,
    binaries: &Binaries,
    data: &Path,
    more: &[String],
) -> Result<()> {
    let mut arguments: Vec<String> =
        ["-U", "postgres", "-E", "UTF8", "--no-locale", "--no-sync", "-A", "trust", "-D"]
            .map(str::to_owned)
            .to_vec();
    arguments.push(data.display().to_string());
    arguments.extend_from_slice(more);
    workshop.run(&binaries.program("initdb"), &arguments, "initdb.log")
}

impl Template {
    fn make(binaries: &Binaries) -> Result<Self> {
        let workshop = Workshop::open("dsync-pg-", Account::choose()?, Keeps::ForNow)?;
        initialise(&workshop, binaries, &workshop.folder.join("data"), &[])?;
        Ok(Self { binaries: binaries.clone(), workshop })
    }
}
