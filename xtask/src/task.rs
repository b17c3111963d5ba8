//! Which tasks there are, how they are asked for, and the commands that each is made of.

use std::env;
use std::thread;

use crate::benches;
use crate::cargo::Cargo;
use crate::gates;
use crate::repeat;
use crate::tools::Tool;

pub(crate) const USAGE: &str = "\
usage: cargo xtask TASK

  check                     before each commit, in two minutes: format, lints, unit tests, a few quick integration tests
  lint                      format, lints and documentation; each feature of the published packages by itself
  test                      all tests: cargo test --workspace --all-features
  versions [MAJOR...]       all tests on each of these versions of PostgreSQL, or on 14 to 18; gets those that are not installed
  ci                        what must pass before a change lands: lint, the packaged files, all tests, some tests of the database on
                            the oldest and the newest version, and no test may skip itself
  gates                     what must pass before a release: the packaged files, the documentation as on docs.rs, the oldest
                            dependencies, unused ones, licences and advisories, the comparison with other libraries, the coverage;
                            tells what it skips for want of a tool
  torture [MINUTES] [SEED]  processes fight for locks while everything around them fails, for 10 minutes
  model                     all interleavings of two claims, in the larger world too; takes minutes and gigabytes
  bench [NAME] [--quick]    all benches or one, such as floor, scale or peers
  loop N TEST... [--busy]   runs the tests whose names contain TEST up to N times, and stops at the first failure
  suite-loop N [--busy]     the same with all tests

--busy keeps all processors busy meanwhile.
";

/// How long a torture lasts if nobody says.
const TORTURE_MINUTES: u64 = 10;

/// The versions of PostgreSQL that the library is for, the oldest first.
const MAJORS: [u32; 5] = [14, 15, 16, 17, 18];

/// What depends on the version most: the catalog and its upgrades, the system's views, the statements of each kind of lock.
/// With the features of all tests, so that nothing is compiled anew.
const ON_EACH_VERSION: [&str; 10] = [
    "test",
    "--workspace",
    "--all-features",
    "--test",
    "database",
    "--",
    "catalog::",
    "introspection::",
    "shared_locks::",
    "semaphores::",
];

/// What the README's command runs, and what needs a feature.
pub(crate) const ALL_TESTS: [&str; 3] = ["test", "--workspace", "--all-features"];

/// Quick tests of each kind: of the machine and its model, of the contract, of the process-wide manager, of a limit of the process,
/// of the benches' figures.
const QUICK: [&[&str]; 3] = [
    &["test", "--lib"],
    &["test", "--test", "claims", "--", "contract::", "stepping_down::"],
    &["test", "--test", "limits", "--test", "bench_figures", "--test", "public_api"],
];

/// The features for TLS that come after `tls-native-tls`, which the tests use that have all of them.
const TLS: [&str; 2] = ["dsync-postgres/tls-rustls-aws-lc-rs", "dsync-postgres/tls-rustls-ring"];

/// The oldest version to which `sslnegotiation=direct` goes.
const DIRECT_TLS: u32 = 17;

#[derive(Debug, PartialEq)]
pub(crate) enum Task<'a> {
    Check,
    Lint,
    Test,
    Versions(Vec<u32>),
    Ci,
    Gates,
    Torture { minutes: u64, seed: Option<u64> },
    Model,
    Bench { name: Option<&'a str>, quick: bool },
    Loop { rounds: u32, tests: Vec<&'a str>, busy: bool },
    SuiteLoop { rounds: u32, busy: bool },
}

impl<'a> Task<'a> {
    /// `None` for what is no task, or has a wrong argument.
    pub(crate) fn parse(arguments: &[&'a str]) -> Option<Self> {
        let (&name, arguments) = arguments.split_first()?;
        match (name, arguments) {
            ("check", []) => Some(Self::Check),
            ("lint", []) => Some(Self::Lint),
            ("test", []) => Some(Self::Test),
            ("ci", []) => Some(Self::Ci),
            ("gates", []) => Some(Self::Gates),
            ("versions", []) => Some(Self::Versions(MAJORS.to_vec())),
            ("versions", majors) => {
                let majors =
                    majors.iter().map(|major| major.parse().ok().filter(|major| MAJORS.contains(major)));
                majors.collect::<Option<_>>().map(Self::Versions)
            }
            ("model", []) => Some(Self::Model),
            ("torture", []) => Some(Self::Torture { minutes: TORTURE_MINUTES, seed: None }),
            ("torture", [minutes]) => Some(Self::Torture { minutes: positive(minutes)?, seed: None }),
            ("torture", [minutes, seed]) => {
                Some(Self::Torture { minutes: positive(minutes)?, seed: Some(seed.parse().ok()?) })
            }
            ("bench", _) => Self::parse_bench(arguments),
            ("loop" | "suite-loop", _) => Self::parse_loop(name, arguments),
            _ => None,
        }
    }

    fn parse_bench(arguments: &[&'a str]) -> Option<Self> {
        let (quick, names) = without("--quick", arguments);
        match names[..] {
            [] => Some(Self::Bench { name: None, quick }),
            [name] => benches::exists(name).then_some(Self::Bench { name: Some(name), quick }),
            _ => None,
        }
    }

    fn parse_loop(name: &str, arguments: &[&'a str]) -> Option<Self> {
        let (busy, arguments) = without("--busy", arguments);
        let (rounds, tests) = arguments.split_first()?;
        let rounds = u32::try_from(positive(rounds)?).ok()?;
        if tests.iter().any(|test| test.starts_with('-')) || tests.is_empty() != (name == "suite-loop") {
            return None;
        }
        Some(match name {
            "loop" => Self::Loop { rounds, tests: tests.to_vec(), busy },
            _ => Self::SuiteLoop { rounds, busy },
        })
    }

    /// What it needs on the machine, beside cargo.
    pub(crate) fn tools(&self) -> &'static [Tool] {
        match self {
            Self::Check | Self::Ci => &Tool::ALL,
            Self::Gates => &[Tool::Clippy, Tool::Compiler, Tool::OpenSsl],
            Self::Lint => &[Tool::Rustfmt, Tool::Clippy, Tool::Compiler, Tool::OpenSsl],
            Self::Model => &[Tool::Compiler],
            Self::Torture { .. } | Self::Bench { .. } => &[Tool::Compiler, Tool::Postgres],
            Self::Test => {
                &[Tool::Compiler, Tool::OpenSsl, Tool::Postgres, Tool::Pgbouncer, Tool::Pgpool, Tool::Ip]
            }
            Self::Loop { .. } | Self::SuiteLoop { .. } => {
                &[Tool::Compiler, Tool::Postgres, Tool::Pgbouncer, Tool::Pgpool, Tool::Ip]
            }
            Self::Versions(_) => &[Tool::Compiler, Tool::Pgbouncer, Tool::Ip],
        }
    }

    pub(crate) fn run(&self) -> Result<(), String> {
        match self {
            Self::Check => check(),
            Self::Lint => lint(&Cargo::default()),
            Self::Test => test(&Cargo::default()),
            Self::Versions(majors) => {
                majors.iter().try_for_each(|major| on_version(*major, &Cargo::default(), &ALL_TESTS))
            }
            Self::Ci => ci(),
            Self::Gates => gates::all(&Cargo::default()),
            Self::Torture { minutes, seed } => {
                let seconds = (minutes * 60).to_string();
                let seed = seed.map(|seed| seed.to_string());
                let mut arguments =
                    vec!["run", "--release", "--example", "torture", "--", "--seconds", &seconds];
                arguments.extend(seed.iter().flat_map(|seed| ["--seed", seed]));
                Cargo::default().run(&arguments)
            }
            Self::Model => Cargo::default().run(&[
                "test",
                "--release",
                "--lib",
                "model",
                "--",
                "--include-ignored",
                "--nocapture",
            ]),
            Self::Bench { name, quick } => benches::run(*name, *quick),
            Self::Loop { rounds, tests, busy } => repeat::tests(*rounds, tests, *busy),
            Self::SuiteLoop { rounds, busy } => repeat::suite(*rounds, *busy),
        }
    }
}

fn check() -> Result<(), String> {
    let cargo = Cargo::default();
    format_and_lints(&cargo)?;
    QUICK.iter().try_for_each(|arguments| cargo.run(arguments))
}

fn format_and_lints(cargo: &Cargo) -> Result<(), String> {
    cargo.run(&["fmt", "--all", "--check"])?;
    cargo.run(&["clippy", "--workspace", "--all-targets", "--all-features", "--", "-D", "warnings"])
}

fn lint(cargo: &Cargo) -> Result<(), String> {
    format_and_lints(cargo)?;
    gates::features(cargo)?;
    let cargo = cargo.clone().env("RUSTDOCFLAGS", "-D warnings");
    cargo.run(&["doc", "--workspace", "--all-features", "--no-deps"])
}

fn ci() -> Result<(), String> {
    // By the first a test knows that it must not skip itself. Nothing is compiled a second time, and a panic says without the others where
    // it was.
    let cargo =
        Cargo::default().env("CI", "true").env("CARGO_INCREMENTAL", "0").env("CARGO_PROFILE_DEV_DEBUG", "0");
    lint(&cargo)?;
    gates::packages(&cargo)?;
    test(&cargo)?;
    side_by_side([MAJORS[0], MAJORS[MAJORS.len() - 1]], &cargo, &ON_EACH_VERSION)?;
    TLS.iter().try_for_each(|features| on_version(DIRECT_TLS, &cargo, &tls(features, "tls::direct")))
}

/// All of them, and those of TLS with each feature.
fn test(cargo: &Cargo) -> Result<(), String> {
    // With all features, of which for TLS the system's own is used then.
    waiting(cargo).run(&ALL_TESTS)?;
    TLS.iter().try_for_each(|features| cargo.run(&tls(features, "tls::")))
}

/// Tests of TLS, with this feature before others. The command line has `tls-rustls-ring` in any case.
fn tls(features: &'static str, tests: &'static str) -> [&'static str; 7] {
    ["test", "--workspace", "--features", features, "--test", "connecting", tests]
}

/// Most tests wait for most of their time, for servers, leases and processes. So more of them run at once than there are processors, if the
/// environment does not say how many.
pub(crate) fn waiting(cargo: &Cargo) -> Cargo {
    const THREADS: &str = "RUST_TEST_THREADS";
    let processors = thread::available_parallelism().map_or(1, usize::from);
    if env::var_os(THREADS).is_some() {
        cargo.clone()
    } else {
        cargo.clone().env(THREADS, &(3 * processors).to_string())
    }
}

/// With a server of that major version, which is got if it is not installed.
fn on_version(major: u32, cargo: &Cargo, arguments: &[&str]) -> Result<(), String> {
    eprintln!("xtask: on PostgreSQL {major}:");
    waiting(cargo).env("DSYNC_PG_VERSION", &major.to_string()).run(arguments)
}

/// As [`on_version`], with both at once, since most of the tests wait. Each one's output comes as a whole.
fn side_by_side(majors: [u32; 2], cargo: &Cargo, arguments: &[&str]) -> Result<(), String> {
    let on = |major: u32| {
        let outcome = waiting(cargo).env("DSYNC_PG_VERSION", &major.to_string()).run_apart(arguments);
        eprintln!("xtask: that was on PostgreSQL {major}");
        outcome
    };
    let [first, second] = majors;
    thread::scope(|scope| {
        let first = scope.spawn(|| on(first));
        let second = on(second);
        first.join().unwrap_or_else(|_| Err("a thread of this program panicked".to_owned())).and(second)
    })
}

fn positive(text: &str) -> Option<u64> {
    text.parse().ok().filter(|number| (1..=1_000_000).contains(number))
}

/// Whether there is the option, and what there is beside it.
fn without<'a>(option: &str, arguments: &[&'a str]) -> (bool, Vec<&'a str>) {
    let rest: Vec<_> = arguments.iter().copied().filter(|argument| *argument != option).collect();
    (rest.len() < arguments.len(), rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &'static str) -> Option<Task<'static>> {
        Task::parse(&line.split_whitespace().collect::<Vec<_>>())
    }

    #[test]
    fn tasks_have_the_arguments_that_the_usage_tells() {
        assert_eq!(parse("check"), Some(Task::Check));
        assert_eq!(parse("gates"), Some(Task::Gates));
        assert_eq!(parse("torture"), Some(Task::Torture { minutes: 10, seed: None }));
        assert_eq!(parse("torture 3 42"), Some(Task::Torture { minutes: 3, seed: Some(42) }));
        assert_eq!(parse("bench --quick"), Some(Task::Bench { name: None, quick: true }));
        assert_eq!(parse("bench floor"), Some(Task::Bench { name: Some("floor"), quick: false }));
        let tests = vec!["fencing::", "lease"];
        assert_eq!(parse("loop 5 fencing:: lease --busy"), Some(Task::Loop { rounds: 5, tests, busy: true }));
        assert_eq!(parse("suite-loop 5"), Some(Task::SuiteLoop { rounds: 5, busy: false }));
        assert_eq!(parse("versions"), Some(Task::Versions(vec![14, 15, 16, 17, 18])));
        assert_eq!(parse("versions 18 14"), Some(Task::Versions(vec![18, 14])));
        assert_eq!(parse("versions 13"), None);
    }

    #[test]
    fn everything_else_is_no_task() {
        for line in [
            "",
            "chek",
            "check --quick",
            "torture now",
            "torture 0",
            "torture 1 2 3",
            "bench flor",
            "bench ../src/lib",
            "bench floor row",
            "loop",
            "loop 5",
            "loop 5 --nocapture",
            "loop lease",
            "suite-loop",
            "suite-loop 5 lease",
        ] {
            assert_eq!(parse(line), None, "{line:?}");
        }
    }
}
