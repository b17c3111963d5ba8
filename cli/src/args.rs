//! The command line.

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::run::options::{LeadArguments, RunArguments};
use crate::{bench, catalog, doctor, list, pages, permits, resign, show, take, watch};

const EXAMPLES: &str = "\
Examples:
  export DATABASE_URL=postgres://app@db/app
  pgdsync doctor
  pgdsync run nightly-report -- report --for yesterday
  pgdsync run -n nightly-report -- report || echo \"code $?: another has it\"
  pgdsync show nightly-report";

/// Runs a job under a distributed lock on PostgreSQL.
///
/// A KEY is the name of a lock, such as `nightly-report`. `#42` is the advisory lock of that number, and `#4:2` the one of these two
/// numbers, as `pg_advisory_lock` takes them; a shell wants quotes around them. A name that begins with `#` is written with one more: `##name`.
#[derive(Debug, Parser)]
#[command(
    name = "pgdsync",
    version,
    max_term_width = 80,
    subcommand_value_name = "VERB",
    subcommand_help_heading = "Verbs",
    after_help = EXAMPLES
)]
pub(crate) struct Arguments {
    #[command(flatten)]
    pub(crate) connection: Connection,
    /// How the verbs that look write what they find: for people, or one JSON object a line.
    #[arg(long, global = true, value_enum, value_name = "FORM", default_value_t, display_order = 990)]
    pub(crate) output: Output,
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

/// How to reach the server. What is not given comes from the environment, as for PostgreSQL's own programs.
#[derive(Args, Debug)]
pub(crate) struct Connection {
    /// Where the database is: `postgres://app@db/app` or `host=db user=app`. The password belongs in PGPASSWORD or a
    /// password file, since everybody on the machine can read a command line. [default: DATABASE_URL, or libpq's variables]
    #[arg(long, global = true, value_name = "URL", help_heading = "Connection")]
    pub(crate) url: Option<String>,
    /// The namespace of the keys. [default: DSYNC_NAMESPACE, or dsync]
    #[arg(long, global = true, value_name = "NAME", help_heading = "Connection")]
    pub(crate) namespace: Option<String>,
    /// The schema of the catalog. [default: DSYNC_SCHEMA, or dsync]
    #[arg(long, global = true, value_name = "NAME", help_heading = "Connection")]
    pub(crate) schema: Option<String>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    #[default]
    Text,
    Json,
}

/// Each is told of in the file that it is in.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    Run(RunArguments),
    Lead(LeadArguments),
    List(list::List),
    Show(show::Show),
    Watch(watch::Watch),
    Resign(resign::Resign),
    Break(take::Break),
    Permits(permits::Permits),
    Doctor(doctor::Doctor),
    Bench(bench::Bench),
    Catalog(catalog::Catalog),
    Completions(pages::Completions),
    Man(pages::Man),
}
