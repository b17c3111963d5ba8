//! The arguments of `run` and `lead`.

use std::ffi::OsString;
use std::str::FromStr as _;
use std::time::Duration;

use clap::Args;
use dsync::{Config, Quorum};
use rustix::process::Signal;

use crate::connect;
use crate::exit::{Failure, USAGE};
use crate::key::Written;
use crate::text;

/// What happens at a loss, as the help and the man page have it, below the exit codes.
macro_rules! after_help {
    ($codes:literal, $variables:literal) => {
        concat!(
            $codes,
            "
When the lock is lost, the command's process group gets TERM at once, and KILL after --kill-after. Where the lease decides (a network \
that is cut, a server or a watching process that stands still), the group is dead before the server can give the lock to another. Where the \
server itself ended the session (an operator, a shutdown), or the watching process was killed, the lock is free at that instant, \
and the command may live for --kill-after beside another holder. What must not happen twice goes behind the fence:

  BEGIN; SELECT dsync.fence('$PGDSYNC_FENCE'); ...; COMMIT;

Not covered: a host that stands still as a whole, a command that waits in the kernel and cannot be killed, processes that leave the \
command's process group or run as another user, work that other systems do for the command, and a kill of both processes at once. A pgdsync that is stopped (kill -STOP, Ctrl-Z) \
keeps its lock until it goes on or is killed.

The command finds PGDSYNC_KEY, PGDSYNC_TOKEN and PGDSYNC_FENCE in its environment",
            $variables
        )
    };
}

const RUN_HELP: &str = after_help!(
    "\
Exit codes:
  the command's own; 128 + N if signal N ended it
  64   the command line or a setting is wrong
  69   the server cannot be reached, or refuses the session; or a process or
       thread cannot be started
  75   another has the lock, or the time to wait is over (or what
       --conflict-exit-code says); or a takeover grace goes on: the server
       was restarted, and nobody is granted a lock yet
  79   the lock was lost before it was given back; the command was ended,
       unless it had ended by itself or was not started yet
  126  the command cannot be executed; 127 it is not there
",
    ", with --permits PGDSYNC_PERMIT as well; of further keys PGDSYNC_KEY_2 and so on."
);

const LEAD_HELP: &str = after_help!(
    "\
Exit codes, when a signal or an error ends it:
  the command's own; 128 + N if signal N ended it
  64   the command line or a setting is wrong
  69   the server cannot be reached at the start, or refuses the session; or
       a process or thread cannot be started
  79   the process that watches the lock was killed or stood still
A command that cannot be executed, or is not there, is tried again after a
pause.
",
    "."
);

/// Runs a command under a lock, or under all of several.
///
/// Waits for the lock unless told otherwise. It goes back when the command and all of its process group have ended.
#[derive(Args, Debug)]
#[command(after_long_help = RUN_HELP)]
pub(crate) struct RunArguments {
    /// The lock's key. Of several, the command runs under all of them.
    #[arg(required = true, value_name = "KEY", value_parser = Written::parse)]
    pub(crate) keys: Vec<Written>,
    /// Fail at once if another has the lock, instead of waiting.
    #[arg(short, long, visible_alias = "nb", conflicts_with = "wait")]
    pub(crate) nonblock: bool,
    /// Fail if the lock is not had within this time: `10` or `10s`, `5m`. Without it there is no limit. A server that cannot be reached at the start is
    /// not waited for.
    #[arg(short, long, visible_alias = "timeout", value_name = "DUR", value_parser = text::duration)]
    pub(crate) wait: Option<Duration>,
    /// Take the lock together with others that share it; nobody has it alone meanwhile.
    #[arg(short, long, conflicts_with = "every")]
    pub(crate) shared: bool,
    /// Run beside others: up to N hold the key at the same time, each a permit. All must say the same N; `pgdsync permits` changes it.
    #[arg(
        long,
        value_name = "N",
        conflicts_with_all = ["shared", "every"],
        value_parser = clap::value_parser!(u32).range(1..=1023)
    )]
    pub(crate) permits: Option<u32>,
    /// The exit code where another has the lock, or the time to wait is over; not in a takeover grace, when nobody does the work. [default: 75]
    #[arg(short = 'E', long, value_name = "N")]
    pub(crate) conflict_exit_code: Option<u8>,
    /// Run the command only if it has not succeeded within this time, wherever: `24h`, `1h`. Success is exit code 0, and counts from
    /// when the command began; it is due again after nine tenths of the time, so that cron may start a little early.
    #[arg(long, value_name = "DUR", value_parser = text::duration)]
    pub(crate) every: Option<Duration>,
    /// The exit code where `--every` finds the work done already.
    #[arg(long, value_name = "N", default_value_t = 0, requires = "every")]
    pub(crate) done_exit_code: u8,
    #[command(flatten)]
    pub(crate) watch: Watch,
    /// The command and its arguments. No shell is between.
    #[arg(last = true, required = true, value_name = "CMD")]
    pub(crate) command: Vec<OsString>,
}

impl RunArguments {
    pub(super) fn check(&self) -> Result<(), Failure> {
        let problem = if self.shared && self.keys.len() > 1 {
            "--shared goes with one key; nest two calls to share one and have the other alone, the outer one with a longer --kill-after"
        } else if self.every.is_some() && self.keys.len() > 1 {
            "--every goes with one key, which names the work; nest a second call for further locks, the outer one with a longer --kill-after"
        } else if self.permits.is_some() && self.keys.len() > 1 {
            "--permits goes with one key; nest two calls to have permits of two, the outer one with a longer --kill-after"
        } else {
            return Ok(());
        };
        Err(Failure::new(USAGE, problem))
    }
}

/// Keeps a command running wherever the leadership is.
///
/// Gives the leadership up when the command ends, and stands again: after 1 s if its exit code was 0, else after a pause that doubles from
/// 1 s to 60 s.
#[derive(Args, Debug)]
#[command(after_long_help = LEAD_HELP)]
pub(crate) struct LeadArguments {
    /// The lock's key.
    #[arg(value_name = "KEY", value_parser = Written::parse)]
    pub(crate) key: Written,
    #[command(flatten)]
    pub(crate) watch: Watch,
    /// The command and its arguments. No shell is between.
    #[arg(last = true, required = true, value_name = "CMD")]
    pub(crate) command: Vec<OsString>,
}

/// How the command is watched.
#[derive(Args, Debug)]
pub(crate) struct Watch {
    /// How long the server keeps the lock for a holder that it does not hear. The longest one that was used in the database is also how long
    /// nobody is granted a lock after a crash of the server. [default: DSYNC_LEASE, or 4.5 times --kill-after, 15 s at least: 45 s]
    #[arg(long, value_name = "DUR", value_parser = text::duration)]
    lease: Option<Duration>,
    /// Hold the lock only while each standby that the server's `synchronous_standby_names` names confirms it: where one is promoted and the
    /// old primary lives on, the command is ended before another may begin. All who take locks in the database must say so.
    #[arg(long)]
    quorum: bool,
    /// How long the command has between TERM and KILL when it must end. 0 kills it at once. Without `--lease` the lease is 4.5 times as long, and so
    /// is a takeover grace, for all who use the database.
    #[arg(long, value_name = "DUR", default_value = "10s", value_parser = text::duration)]
    pub(super) kill_after: Duration,
    /// The signal that tells the command to end when the lock is lost.
    #[arg(long, value_name = "SIGNAL", default_value = "TERM", value_parser = signal)]
    pub(super) stop_signal: Signal,
    /// What others see of this holder beside the key, in `list` and in the view `dsync.locks`.
    #[arg(long, value_name = "TEXT")]
    pub(super) annotation: Option<String>,
    /// Tell on standard error what happens.
    #[arg(short, long)]
    pub(super) verbose: bool,
}

impl Watch {
    /// How much earlier than the server the holder regards the lock as lost: the command's time to end, and some for the kill itself.
    fn margin(&self) -> Duration {
        self.kill_after + Duration::from_secs(1).max(self.lease() / 15)
    }

    pub(super) fn lease(&self) -> Duration {
        // What is no time, or too long a one, the library refuses, which reads the variable as well.
        let by_variable = || humantime::parse_duration(&connect::variable("DSYNC_LEASE")?).ok();
        let by_default = || Duration::from_secs(15).max(self.kill_after.saturating_mul(9) / 2);
        self.lease.or_else(by_variable).unwrap_or_else(by_default)
    }

    /// Sets the times of the lease. Heartbeats are a fifth of it, so that the default `--kill-after` fits into 45 s.
    pub(super) fn apply(&self, config: Config) -> Config {
        let beat = self.lease() / 5;
        let mut config = config.lease(self.lease()).margin(self.margin());
        if self.quorum {
            config = config.quorum(Quorum::NamedStandbys);
        }
        if connect::variable("DSYNC_HEARTBEAT").is_none() {
            config = config.heartbeat(beat);
        }
        if connect::variable("DSYNC_HEARTBEAT_TIMEOUT").is_none() {
            config = config.heartbeat_timeout(beat);
        }
        config
    }

    /// What to change where these times are refused.
    pub(super) fn advice(&self) -> String {
        format!(
            "--lease is {} and --kill-after {} (DSYNC_LEASE counts as --lease): the command could not be ended before another may have the lock; with the usual \
             heartbeats the lease must be more than three times --kill-after, and more than 2.5 times the sum of --kill-after and 1 s",
            humantime::format_duration(self.lease()),
            humantime::format_duration(self.kill_after)
        )
    }

    /// Whether the times can work with the usual heartbeats: three of them and the margin are less than the lease.
    pub(super) fn fits(&self) -> bool {
        self.lease() / 5 * 3 + self.margin() < self.lease()
    }
}

/// A signal by its name, with or without SIG, or by its number.
fn signal(text: &str) -> Result<Signal, String> {
    let name = text.to_ascii_uppercase();
    let name = if name.starts_with("SIG") { name } else { format!("SIG{name}") };
    let number = text
        .parse()
        .ok()
        .or_else(|| nix::sys::signal::Signal::from_str(&name).ok().map(|signal| signal as i32));
    number
        .and_then(Signal::from_named_raw)
        .ok_or_else(|| "it is no signal's name; write TERM, INT or HUP".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watch(lease: Option<u64>, kill_after: u64) -> Watch {
        Watch {
            lease: lease.map(Duration::from_secs),
            kill_after: Duration::from_secs(kill_after),
            stop_signal: Signal::TERM,
            annotation: None,
            quorum: false,
            verbose: false,
        }
    }

    #[test]
    fn the_default_lease_fits_every_time_to_end() {
        for kill_after in [0, 1, 3, 4, 10, 60, 3600] {
            let watch = watch(None, kill_after);
            assert!(watch.fits(), "{watch:?}");
            assert!(watch.apply(Config::from_url("host=h").unwrap()).lease_fits(), "{watch:?}");
        }
        assert_eq!(watch(None, 10).lease(), Duration::from_secs(45));
        assert_eq!(watch(None, 10).margin(), Duration::from_secs(13));
        assert!(watch(Some(31), 10).fits() && !watch(Some(30), 10).fits());
        assert!(!watch(Some(2), 0).fits() && watch(Some(3), 0).fits());
    }

    /// The library has the last word, when a manager is made.
    trait Fits {
        fn lease_fits(self) -> bool;
    }

    impl Fits for Config {
        fn lease_fits(self) -> bool {
            dsync::PostgresManager::new(self).is_ok()
        }
    }

    #[test]
    fn times_are_numbers_of_seconds_or_have_a_unit() {
        assert_eq!(text::duration("1.5"), Ok(Duration::from_millis(1500)));
        assert_eq!(text::duration("5m"), Ok(Duration::from_secs(300)));
        for wrong in ["-1", "soon", "NaN", "inf", "1e19", "1000000001", "40years"] {
            assert!(text::duration(wrong).is_err(), "{wrong}");
        }
        let longest = Watch { kill_after: text::duration("1e9").unwrap(), ..watch(None, 0) };
        assert!(longest.fits(), "the library refuses it, in words");
    }

    #[test]
    fn signals_have_names_and_numbers() {
        for text in ["TERM", "SIGTERM", "term", "15"] {
            assert_eq!(signal(text), Ok(Signal::TERM));
        }
        assert!(signal("STOPIT").is_err() && signal("0").is_err());
    }
}
