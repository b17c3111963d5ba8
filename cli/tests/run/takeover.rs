//! The time after a takeover of the server, in which nobody is granted a lock.

use serde_json::Value;
use support::{Server, Shutdown};

use crate::common::{run, text};

#[test]
fn who_does_not_wait_is_told_why_and_for_how_long() {
    const WHY: &str = "the server was restarted or replaced; no lock is granted for ";
    // Nobody is granted a lock for as long, while all of these look.
    const LEASE: [&str; 2] = ["--lease=40s", "--kill-after=1s"];
    let server = Server::start().unwrap();
    let url = server.url();
    let go = |words: &[&str]| run(&url, [&["run"], words, &LEASE, &["k", "--", "echo", "ran"]].concat());
    assert_eq!(text(&go(&[]).stdout), "ran\n");
    // As a crash.
    server.restart(Shutdown::Immediate).unwrap();
    for (words, code) in [
        (&["-n", "-E", "0"][..], 75),
        (&["-n", "-E", "0", "-s"], 75),
        (&["-n", "-E", "0", "j"], 75),
        (&["-w", "1", "-E", "0", "--every=1h"], 75),
        (&["-n"], 75),
        (&["-w", "1"], 75),
        (&["-n", "--every=1h"], 75),
        (&["-n", "--permits=2"], 75),
        (&["-w", "1", "-E", "0", "j"], 75),
    ] {
        let output = go(words);
        let said = text(&output.stderr);
        assert_eq!((output.status.code(), text(&output.stdout)), (Some(code), String::new()), "{said}");
        assert!(said.starts_with(&format!("pgdsync: {WHY}")) && said.trim().ends_with("s at most"), "{said}");
    }
    for words in [&["list"][..], &["show", "k"]] {
        let output = run(&url, words);
        let shown = text(&output.stdout);
        println!("{shown}");
        assert!(shown.contains(WHY.split(';').next().unwrap()), "{words:?}: {shown}");
        assert!(shown.lines().all(|line| line.len() <= 80), "{shown}");
    }
    let output = run(&url, ["list", "--output=json"]);
    assert!(text(&output.stderr).contains(WHY), "{}", text(&output.stderr));
    let output = run(&url, ["doctor"]);
    let shown = text(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{shown}");
    assert!(shown.contains("warning  takeover"), "{shown}");
    let output = run(&url, ["show", "k", "--output=json"]);
    let lock: Value = serde_json::from_str(&text(&output.stdout)).unwrap();
    let left = lock["grace_seconds"].as_f64().unwrap();
    assert!(0.0 < left && left <= 45.0, "{lock}");
    // It passes.
    assert_eq!(text(&go(&[]).stdout), "ran\n");
    let output = run(&url, ["show", "k", "--output=json"]);
    assert!(text(&output.stdout).contains("\"grace_seconds\":null"), "{}", text(&output.stdout));
    assert!(!text(&run(&url, ["doctor"]).stdout).contains("warning  takeover"));
    // The next one would last longer, for all.
    assert!(run(&url, ["run", "--lease=1h", "k", "--", "true"]).status.success());
    let output = run(&url, ["doctor"]);
    let shown = text(&output.stdout).split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(
        shown.contains("good takeover after a crash of the server nobody is granted a lock for 3600s"),
        "{shown}"
    );
}
