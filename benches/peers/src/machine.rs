//! What the figures were taken on.

use std::fs;
use std::process::Command;
use std::thread;

/// The newest version of a package that is built into this program.
pub(crate) fn version(package: &str) -> &'static str {
    versions(package).last().unwrap_or("?")
}

/// All its versions, the oldest first, as Cargo sorts them.
pub(crate) fn versions(package: &str) -> impl Iterator<Item = &'static str> {
    let name = format!("name = \"{package}\"");
    let lines = include_str!("../Cargo.lock").lines();
    lines.clone().zip(lines.skip(1)).filter(move |(line, _)| *line == name).filter_map(|(_, next)| {
        next.strip_prefix("version = \"").and_then(|version| version.strip_suffix('"'))
    })
}

/// Facts of the machine and of what runs on it, each with its name. What isn't known is left out.
pub(crate) fn facts() -> Vec<(&'static str, String)> {
    let cores = thread::available_parallelism().map_or(0, usize::from);
    let processor = named("/proc/cpuinfo", "model name", ':').unwrap_or_else(|| "unknown".to_owned());
    let mut facts = vec![("processor", format!("{processor}, {cores} usable"))];
    let system = named("/etc/os-release", "PRETTY_NAME", '=');
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").ok();
    let system = [system, kernel].into_iter().flatten();
    let system: Vec<_> = system.map(|text| text.trim().trim_matches('"').to_owned()).collect();
    facts.push((
        "system",
        if system.is_empty() { std::env::consts::OS.to_owned() } else { system.join(", ") },
    ));
    if let Ok(load) = fs::read_to_string("/proc/loadavg") {
        let averages: Vec<_> = load.split(' ').take(3).collect();
        facts.push(("load at the start", format!("{} (of 1, 5 and 15 minutes)", averages.join(", "))));
    }
    if let Ok(said) = Command::new("rustc").arg("--version").output() {
        facts.push(("compiler", String::from_utf8_lossy(&said.stdout).trim().to_owned()));
    }
    facts
}

/// A value from a file of names and values.
fn named(path: &str, name: &str, separator: char) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    text.lines().find_map(|line| {
        let (key, value) = line.split_once(separator)?;
        (key.trim() == name).then(|| value.trim().to_owned())
    })
}
