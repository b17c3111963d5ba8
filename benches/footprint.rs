//! What the library adds to a build: packages, and the time to compile all of them from nothing. Beside it is the same
//! for the driver alone, in the same versions.
//!
//! `cargo bench` leaves this out, since it compiles for minutes: `cargo bench --bench footprint`.

mod kit;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use kit::results::scratch;
use kit::{Bench, Contender, Plan, Row, Series, interleave};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

fn main() {
    let mut bench = Bench::start("footprint");
    let plan = Plan { repetitions: bench.choose(3, 1), rounds: 1, warm_up: 0 };
    let ours = Package::make("ours", &format!("dsync-postgres = {{ path = {ROOT:?} }}"));
    let driver = Package::make("driver", &format!("postgres = {:?}", format!("={}", driver_version())));

    bench.heading("packages");
    let count = |package: &Package| {
        let mut series = Series::new(package.title());
        series.push(package.dependencies().len() as f64);
        series
    };
    let what = "packages of the default build";
    bench.row(Row::compared(what, "packages", &count(&driver), &count(&ours), None));

    let jobs = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    bench.heading(&format!("clean build, {jobs} jobs"));
    for (profile, arguments) in [("debug", &[][..]), ("release", &["--release"][..])] {
        if bench.is_quick() && profile == "release" {
            println!("  the release build is left out of a quick run");
            continue;
        }
        let [[floor], [ours]] = interleave(
            plan,
            [&driver, &ours].map(|package| Contender::new(package.title(), || [package.build(arguments)])),
        );
        let what = format!("clean {profile} build with all packages, {jobs} jobs");
        bench.row(Row::compared(what, "s", &floor, &ours, None));
    }
    bench.finish();
}

/// A package that does nothing but depend on one other.
struct Package {
    name: &'static str,
    folder: PathBuf,
}

impl Package {
    fn make(name: &'static str, dependency: &str) -> Self {
        let folder = scratch().join("footprint").join(name);
        fs::create_dir_all(folder.join("src")).expect("a folder");
        let manifest = format!(
            "[package]\nname = \"footprint-{name}\"\nversion = \"0.0.0\"\nedition = \"2024\"\n\n\
             [dependencies]\n{dependency}\n\n\
             # The folder lies within that of another workspace.\n[workspace]\n"
        );
        fs::write(folder.join("Cargo.toml"), manifest).expect("a manifest");
        fs::write(folder.join("src/lib.rs"), "").expect("a library");
        // The versions that the library is tested with.
        fs::copy(Path::new(ROOT).join("Cargo.lock"), folder.join("Cargo.lock")).expect("the versions");
        let package = Self { name, folder };
        // Now, so that no download is part of a build. Packages for other systems are no concern of ours.
        package.cargo(&["fetch", "--quiet"]);
        package
    }

    fn title(&self) -> &'static str {
        if self.name == "driver" { "the driver alone" } else { "dsync" }
    }

    /// All packages that are compiled in, but for the one that wants them.
    fn dependencies(&self) -> BTreeSet<String> {
        let tree = self.cargo(&["tree", "--edges=normal", "--prefix=none", "--format={p}"]);
        tree.lines()
            .skip(1)
            .map(|line| line.trim_end_matches(" (*)").to_owned())
            .filter(|line| !line.is_empty())
            .collect()
    }

    /// Seconds of a build from nothing.
    fn build(&self, arguments: &[&str]) -> f64 {
        let target = self.folder.join("target");
        if target.exists() {
            fs::remove_dir_all(&target).expect("the last build is gone");
        }
        let begun = Instant::now();
        self.cargo(&[&["build", "--quiet", "--offline"], arguments].concat());
        let taken = begun.elapsed().as_secs_f64();
        fs::remove_dir_all(&target).expect("this build is gone");
        taken
    }

    /// Runs cargo in the package's folder, with a target folder of its own.
    fn cargo(&self, arguments: &[&str]) -> String {
        let mut command = cargo();
        command.args(arguments).current_dir(&self.folder).env("CARGO_TARGET_DIR", self.folder.join("target"));
        run(&mut command)
    }
}

/// The version of the driver that the library is built with.
fn driver_version() -> String {
    let tree =
        run(cargo().current_dir(ROOT).args(["tree", "--package=postgres", "--depth=0", "--format={p}"]));
    let version = tree.split_whitespace().nth(1).expect("a version");
    version.trim_start_matches('v').to_owned()
}

fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    // A cache of compiled packages would be measured instead of the compiler.
    command.env("RUSTC_WRAPPER", "").env("CARGO_INCREMENTAL", "0");
    command
}

fn run(command: &mut Command) -> String {
    let output = command.output().expect("cargo");
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}
