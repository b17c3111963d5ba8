//! The benches: those of cargo, and the comparison with other libraries, which is a package of its own.

use crate::cargo::{Cargo, root};

const PEERS: &str = "peers";

pub(crate) fn exists(name: &str) -> bool {
    let is_word = name.chars().all(|letter| letter.is_ascii_lowercase() || letter == '_');
    name == PEERS || is_word && root().join("benches").join(format!("{name}.rs")).is_file()
}

pub(crate) fn run(name: Option<&str>, quick: bool) -> Result<(), String> {
    let mut arguments = match name {
        None => vec!["bench"],
        Some(PEERS) => vec!["run", "--release", "--manifest-path", "benches/peers/Cargo.toml"],
        Some(name) => vec!["bench", "--bench", name],
    };
    if quick {
        arguments.extend(["--", "--quick"]);
    }
    Cargo::default().run(&arguments)
}
