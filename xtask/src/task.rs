//! Which tasks there are, how they are asked for, and the commands that each is made of.

use crate::benches;
use crate::cargo::Cargo;
use crate::repeat;
use crate::tools::Tool;

pub(crate) const USAGE: &str = "\
usage: cargo xtask TASK

  check                     before each commit, in two minutes: format, lints, unit tests, a few quick integration tests
  lint                      format, lints and documentation
  test                      all tests: cargo test --workspace
  ci                        what must pass before a change lands: lint and test, and no test may skip itself
  torture [MINUTES] [SEED]  processes fight for locks while everything around them fails, for 10 minutes
  model                     all interleavings of two claims, in the larger world too; takes minutes and gigabytes
  bench [NAME] [--quick]    all benches or one, such as floor, scale or peers
  loop N TEST... [--busy]   runs the tests whose names contain TEST up to N times, and stops at the first failure
  suite-loop N [--busy]     the same with all tests

--busy keeps all processors busy meanwhile.
";

/// How long a torture lasts if nobody says.
const TORTURE_MINUTES: u64 = 10;

/// Quick tests of each kind: of the machine and its model, of the contract, of the process-wide manager, of a limit of the process,
/// of the benches' figures.
const QUICK: [&[&str]; 3] = [
    &["test", "--lib"],
    &["test", "--test", "claims", "--", "contract::", "stepping_down::"],
    &["test", "--test", "limits", "--test", "bench_figures"],
];

#[derive(Debug, PartialEq)]
pub(crate) enum Task<'a> {
    Check,
    Lint,
    Test,
    Ci,
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
            Self::Lint => &[Tool::Rustfmt, Tool::Clippy, Tool::Compiler],
            Self::Model => &[Tool::Compiler],
            Self::Torture { .. } | Self::Bench { .. } => &[Tool::Compiler, Tool::Postgres],
            Self::Test | Self::Loop { .. } | Self::SuiteLoop { .. } => {
                &[Tool::Compiler, Tool::Postgres, Tool::Pgbouncer, Tool::Ip]
            }
        }
    }

    pub(crate) fn run(&self) -> Result<(), String> {
        match self {
            Self::Check => check(),
            Self::Lint => lint(&Cargo::default()),
            Self::Test => test(&Cargo::default()),
            Self::Ci => {
                // By this variable a test knows that it must not skip itself.
                let cargo = Cargo::default().env("CI", "true");
                lint(&cargo)?;
                test(&cargo)
            }
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
    cargo.run(&["clippy", "--workspace", "--all-targets", "--all-features", "--", "-D", "warnings"])?;
    // Without features there is less that uses what is there.
    cargo.run(&["clippy", "--lib", "--", "-D", "warnings"])
}

fn lint(cargo: &Cargo) -> Result<(), String> {
    format_and_lints(cargo)?;
    let cargo = cargo.clone().env("RUSTDOCFLAGS", "-D warnings");
    cargo.run(&["doc", "--workspace", "--all-features", "--no-deps"])
}

/// As the README says it, and what needs a feature.
fn test(cargo: &Cargo) -> Result<(), String> {
    cargo.run(&["test", "--workspace"])?;
    // For a test by name cargo builds no examples.
    cargo.run(&["build", "--features", "metrics", "--examples"])?;
    cargo.run(&["test", "--features", "metrics", "--test", "metrics", "--test", "examples"])?;
    cargo.run(&["test", "--features", "metrics", "--lib", "metrics_observer"])
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
        assert_eq!(parse("torture"), Some(Task::Torture { minutes: 10, seed: None }));
        assert_eq!(parse("torture 3 42"), Some(Task::Torture { minutes: 3, seed: Some(42) }));
        assert_eq!(parse("bench --quick"), Some(Task::Bench { name: None, quick: true }));
        assert_eq!(parse("bench floor"), Some(Task::Bench { name: Some("floor"), quick: false }));
        let tests = vec!["fencing::", "lease"];
        assert_eq!(parse("loop 5 fencing:: lease --busy"), Some(Task::Loop { rounds: 5, tests, busy: true }));
        assert_eq!(parse("suite-loop 5"), Some(Task::SuiteLoop { rounds: 5, busy: false }));
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
