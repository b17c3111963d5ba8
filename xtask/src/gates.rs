//! What users of the packages meet and the tests do not: features alone and together, the packaged files, the oldest
//! dependencies that the manifests admit; and what others say of the dependencies.

use std::fs;

use crate::cargo::{Cargo, root};
use crate::task;
use crate::tools;

/// A package that is published.
struct Published {
    name: &'static str,
    /// The folder of its manifest.
    folder: &'static str,
}

impl Published {
    fn manifest(&self) -> Result<String, String> {
        let path = format!("{}/Cargo.toml", self.folder);
        fs::read_to_string(root().join(&path)).map_err(|error| format!("{path} cannot be read: {error}"))
    }

    /// The folder into which cargo unpacks what it has packaged.
    fn unpacked(&self) -> Result<String, String> {
        let manifest = self.manifest()?;
        let mut versions = manifest.lines().filter_map(|line| line.strip_prefix("version = "));
        let version = versions.next().ok_or_else(|| format!("{} has no version", self.name))?;
        Ok(format!("target/package/{}-{}", self.name, version.trim_matches('"')))
    }
}

/// The library first, since the program depends on it.
const PUBLISHED: [Published; 2] =
    [Published { name: "dsync-postgres", folder: "." }, Published { name: "pgdsync", folder: "cli" }];

/// All of them, the quick ones first.
pub(crate) fn all(cargo: &Cargo) -> Result<(), String> {
    unused_dependencies(cargo)?;
    what_dependencies_may_be(cargo)?;
    features(cargo)?;
    packages(cargo)?;
    documentation(cargo)?;
    oldest_dependencies(cargo)?;
    peers(cargo)?;
    coverage(cargo)
}

fn unused_dependencies(cargo: &Cargo) -> Result<(), String> {
    let what = "dependencies that nothing uses";
    if !tools::cargo_has("shear") {
        skip(what, "cargo-shear is not installed: cargo install --locked cargo-shear");
        return Ok(());
    }
    cargo.run(&["shear"])
}

/// By `deny.toml`.
fn what_dependencies_may_be(cargo: &Cargo) -> Result<(), String> {
    let what = "licences and sources of the dependencies, and what is known against them";
    if !tools::cargo_has("deny") {
        skip(what, "cargo-deny is not installed: cargo install --locked cargo-deny");
        return Ok(());
    }
    cargo.run(&["deny", "--workspace", "check", "bans", "licenses", "sources"])?;
    if cargo.run(&["deny", "fetch", "db"]).is_err() {
        skip("what is known against the dependencies", "the list of advisories cannot be fetched");
        return Ok(());
    }
    cargo.run(&["deny", "--workspace", "check", "--disable-fetch", "advisories"])
}

fn skip(what: &str, why: &str) {
    eprintln!("xtask: skipped: {what}; {why}");
}

/// Each published package compiles by itself without features, and with each of them alone. All together are what `lint` begins with.
pub(crate) fn features(cargo: &Cargo) -> Result<(), String> {
    for package in PUBLISHED {
        let manifest = package.manifest()?;
        let each = features_of(&manifest).into_iter().map(Some);
        for feature in [None].into_iter().chain(each) {
            let mut arguments = vec!["clippy", "--package", package.name, "--no-default-features"];
            arguments.extend(feature.iter().flat_map(|feature| ["--features", feature]));
            arguments.extend(["--", "-D", "warnings"]);
            cargo.run(&arguments)?;
        }
    }
    Ok(())
}

/// The names in the section `[features]` of a manifest, but for the default, and for what is a part of others: such names begin with `_`.
fn features_of(manifest: &str) -> Vec<&str> {
    let section = manifest.lines().skip_while(|line| *line != "[features]").skip(1);
    section
        .take_while(|line| !line.starts_with('['))
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split_once(" = ").map(|(name, _)| name))
        .filter(|name| *name != "default" && !name.starts_with('_'))
        .collect()
}

/// The packages build from the files that are in them.
///
/// The program finds the library of this tree, and not a published one: cargo puts what it packages together into a registry of its
/// own, from version 1.90 on. By the name of the folder it compiles them where the tests are compiled, and each dependency once; else each
/// package would have a folder of its own, with all of them.
pub(crate) fn packages(cargo: &Cargo) -> Result<(), String> {
    let cargo = cargo.clone().env("CARGO_TARGET_DIR", &root().join("target").to_string_lossy());
    let names = PUBLISHED.iter().flat_map(|package| ["--package", package.name]);
    let arguments: Vec<_> = ["package", "--allow-dirty"].into_iter().chain(names).collect();
    cargo.run(&arguments)
}

/// The documentation builds as docs.rs builds it.
fn documentation(cargo: &Cargo) -> Result<(), String> {
    // Only a nightly rustdoc names the features that an item wants, or one that is told to be one.
    let cargo = cargo.clone().env("RUSTC_BOOTSTRAP", "1").env("RUSTDOCFLAGS", "--cfg docsrs -D warnings");
    let cargo = cargo.env("CARGO_TARGET_DIR", "target/docs.rs");
    cargo.run(&["doc", "--package", PUBLISHED[0].name, "--all-features", "--no-deps"])
}

/// All tests, for the share of the lines that they reach. Processes that are killed count for nothing.
fn coverage(cargo: &Cargo) -> Result<(), String> {
    if !tools::cargo_has("llvm-cov") {
        skip(
            "which lines the tests reach",
            "cargo-llvm-cov is not installed: rustup component add llvm-tools, cargo install --locked cargo-llvm-cov",
        );
        return Ok(());
    }
    task::waiting(cargo).run(&["llvm-cov", "--workspace", "--all-features", "--summary-only"])
}

/// What [`packages`] has unpacked compiles with the oldest versions of its dependencies that the manifests admit.
fn oldest_dependencies(cargo: &Cargo) -> Result<(), String> {
    // Only a nightly cargo chooses versions so, or one that is told to be one.
    let cargo = cargo.clone().env("RUSTC_BOOTSTRAP", "1").env("CARGO_TARGET_DIR", "target/oldest");
    let library = format!("patch.crates-io.dsync-postgres.path=\"{}\"", PUBLISHED[0].unpacked()?);
    for package in PUBLISHED {
        let folder = package.unpacked()?;
        let lock = format!("{folder}/Cargo.lock");
        fs::remove_file(root().join(&lock)).map_err(|error| format!("{lock} cannot be removed: {error}"))?;
        let manifest = format!("{folder}/Cargo.toml");
        let arguments = ["check", "--all-features", "--manifest-path", &manifest, "--config", &library];
        cargo.run(&[&arguments[..], &["-Z", "direct-minimal-versions"]].concat())?;
    }
    Ok(())
}

/// The comparison with other libraries compiles. It is no member of the workspace.
fn peers(cargo: &Cargo) -> Result<(), String> {
    cargo.run(&["clippy", "--manifest-path", "benches/peers/Cargo.toml", "--", "-D", "warnings"])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_features_of_a_manifest_are_found() {
        let manifest = "[package]\nname = \"x\"\n\n[features]\ndefault = [\"a\"]\n# For b.\nb = [\"_d\"]\na = [\"dep:c\"]\n_d = []\n\n[lints]\nw = true\n";
        assert_eq!(features_of(manifest), ["b", "a"]);
        assert!(features_of("[package]\nname = \"x\"\n").is_empty());
        for (package, feature) in PUBLISHED.iter().zip(["metrics", "tls"]) {
            assert!(features_of(&package.manifest().unwrap()).contains(&feature), "{}", package.name);
        }
    }
}
