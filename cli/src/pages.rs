//! `completions` and `man`: what a package installs beside the program.

use clap::{Args, Command, CommandFactory as _};
use clap_complete::Shell;

use crate::args::Arguments;
use crate::exit::{Failure, USAGE};
use crate::out;

/// Prints a script that completes the words of a command line.
///
/// For bash: `pgdsync completions bash > /etc/bash_completion.d/pgdsync`. For zsh, `_pgdsync` in a folder of `$fpath`; for fish,
/// `~/.config/fish/completions/pgdsync.fish`.
#[derive(Args, Debug)]
pub(crate) struct Completions {
    /// The shell.
    #[arg(value_name = "SHELL", value_parser = ["bash", "zsh", "fish"])]
    shell: String,
}

impl Completions {
    pub(crate) fn run(&self) -> Result<u8, Failure> {
        let shell: Shell = self.shell.parse().map_err(|error: String| Failure::new(USAGE, error))?;
        let mut script = Vec::new();
        clap_complete::generate(shell, &mut Arguments::command(), "pgdsync", &mut script);
        out::write(&String::from_utf8_lossy(&script))?;
        Ok(0)
    }
}

/// Prints a page of the manual.
///
/// For `man -l -`, or a file such as `/usr/local/share/man/man1/pgdsync.1`.
#[derive(Args, Debug)]
pub(crate) struct Man {
    /// The page of this verb instead of the program's.
    #[arg(value_name = "VERB")]
    verb: Option<String>,
}

impl Man {
    pub(crate) fn run(&self) -> Result<u8, Failure> {
        let mut program = Arguments::command();
        // Gives the verbs the options that all of them have, and their names in full.
        program.build();
        let command: Command = match &self.verb {
            None => program,
            Some(verb) => {
                let found = program.find_subcommand(verb).cloned();
                let unknown =
                    || Failure::new(USAGE, format!("there is no verb {verb:?}; `pgdsync --help` lists them"));
                found.map(|found| found.version(env!("CARGO_PKG_VERSION"))).ok_or_else(unknown)?
            }
        };
        let mut page = Vec::new();
        let source = concat!("pgdsync ", env!("CARGO_PKG_VERSION"));
        clap_mangen::Man::new(command).source(source).render(&mut page)?;
        // Pages have these headings in capitals.
        let page = String::from_utf8_lossy(&page)
            .replace("\n.SH Verbs\n", "\n.SH VERBS\n")
            .replace("\n.SH EXTRA\n", "\n.SH NOTES\n");
        out::write(&page)?;
        Ok(0)
    }
}
