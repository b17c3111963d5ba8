//! Several at once: `run --permits`, and how the other verbs show and change them.

use serde_json::Value;
use support::Database;

use crate::common::{Process, pgdsync, run, text};

fn holder(url: &str) -> (Process, String) {
    let script = "echo permit $PGDSYNC_PERMIT of $PGDSYNC_KEY; exec sleep 1000";
    let holder = Process::start(pgdsync(url).args(["run", "--permits=2", "gpu", "--", "sh", "-c", script]));
    let (_, line) = holder.says("permit");
    (holder, line)
}

/// What a verb writes that succeeds.
#[track_caller]
fn shown(url: &str, arguments: &[&str]) -> String {
    let output = run(url, arguments);
    assert!(output.status.success(), "{arguments:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

#[test]
fn as_many_commands_as_there_are_permits_run_at_once() {
    let database = Database::fresh().unwrap();
    let url = database.url();
    // Of another lock, though it has the same name.
    let alone =
        Process::start(pgdsync(&url).args(["run", "gpu", "--", "sh", "-c", "echo alone; sleep 1000"]));
    alone.says("alone");
    drop(alone);
    let [(first, permit), (second, other)] = [(); 2].map(|()| holder(&url));
    let mut numbers = [&permit, &other];
    numbers.sort();
    assert_eq!(numbers, ["permit 1 of gpu", "permit 2 of gpu"]);
    let another = |permits: &str| run(&url, ["run", "-n", "-v", permits, "gpu", "--", "echo", "ran"]);
    let output = another("--permits=2");
    let said = text(&output.stderr);
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(75), String::new()), "{said}");
    assert!(said.contains("others have the 2 permits of gpu"), "{said}");
    let output = another("--permits=3");
    assert_eq!(output.status.code(), Some(64), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("`pgdsync permits KEY N`"), "{}", text(&output.stderr));

    let listed = shown(&url, &["list"]);
    println!("{listed}");
    assert!(listed.contains("2 of 2 permits held: 127.0.0.1 pgdsync "), "{listed}");
    let show = shown(&url, &["show", "gpu"]);
    println!("{show}");
    assert!(show.contains("permits     2 of 2 held") && show.contains("permit      2\n"), "{show}");
    // Whom an operator would end.
    for process in [&first, &second] {
        assert!(show.contains(&format!(":{}, backend", process.id())), "{}: {show}", process.id());
    }
    let json = |arguments: &[&str]| -> Value { serde_json::from_str(&shown(&url, arguments)).unwrap() };
    let lock = json(&["show", "gpu", "--output=json"]);
    assert_eq!((&lock["permits"], &lock["holders"][1]["permit"]), (&2.into(), &2.into()));
    assert_eq!(json(&["list", "--output=json"])["permits"], 2);
    let watching = Process::start(pgdsync(&url).args(["watch", "--interval=50ms"]));
    let json_watching = Process::start(pgdsync(&url).args(["watch", "--interval=50ms", "--output=json"]));
    watching.says("gpu: 2 of 2 permits held");
    json_watching.says("\"permits\":2");
    drop(second);
    watching.says("gpu: 1 of 2 permits held");
    json_watching.says("\"permits\":2");

    assert_eq!(shown(&url, &["permits", "gpu", "3"]), "gpu has 3 permits, and had 2\n");
    assert_eq!(shown(&url, &["permits", "gpu", "3"]), "gpu has 3 permits\n");
    assert!(shown(&url, &["show", "gpu"]).contains("1 of 3 held"));
    let output = another("--permits=3");
    assert_eq!(text(&output.stdout), "ran\n", "{}", text(&output.stderr));
    assert!(
        text(&output.stderr).contains("holds permit ")
            && text(&output.stderr).contains(" of gpu with token 1"),
        "{}",
        text(&output.stderr)
    );
    // A semaphore has no leader.
    let output = run(&url, ["resign", "gpu"]);
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
    let broken = shown(&url, &["break", "gpu", "--yes"]);
    assert!(broken.contains("ended the session of 127.0.0.1 pgdsync"), "{broken}");
    first.says("the lock was lost");
    drop(first);
    watching.says("gpu: 0 of 3 permits held");
}
