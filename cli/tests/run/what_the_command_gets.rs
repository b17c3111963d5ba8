//! Arguments, environment, streams and descriptors of the command.

use std::ffi::OsStr;
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt as _;
use std::process::{Command, Stdio};

use support::Server;

use crate::common::{clean, pgdsync, run, text};

#[test]
fn arguments_reach_it_unchanged() {
    let database = Server::shared().database().unwrap();
    let words: [&[u8]; 9] = [
        b"",
        b" two words ",
        b"'\"`$HOME\\",
        b"--wait",
        b"--",
        b"-n",
        b"*\n?",
        b"\xff\xfe not UTF-8",
        "ü".as_bytes(),
    ];
    let arguments = ["run", "k", "--", "printf", "%s\\0"].map(OsStr::new);
    let output = run(&database.url(), arguments.into_iter().chain(words.map(OsStr::from_bytes)));
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(output.stdout, words.map(|word| [word, b"\0"].concat()).concat());
}

#[test]
fn it_has_the_key_the_token_and_a_fence_that_works() {
    let database = Server::shared().database().unwrap();
    let script = r#"printf '%s\n' "$PGDSYNC_KEY" "$PGDSYNC_TOKEN" "$PGDSYNC_FENCE" "$PGDSYNC_KEY_2" "$PGDSYNC_TOKEN_2" "$PGDSYNC_FENCE_2""#;
    let output = run(&database.url(), ["run", "b b", "a", "--", "sh", "-c", script]);
    let said = text(&output.stdout);
    let [first, token, fence, second, token_2, fence_2] = said.lines().collect::<Vec<_>>()[..] else {
        panic!("{said}: {}", text(&output.stderr));
    };
    assert_eq!((first, second), ("b b", "a"));
    let mut client = database.client().unwrap();
    for (key, token, fence) in [(first, token, fence), (second, token_2, fence_2)] {
        let row = client.query_one("SELECT token FROM dsync.lock WHERE key = $1", &[&key]).unwrap();
        assert_eq!(row.get::<_, i64>(0).to_string(), token);
        let check = |client: &mut dsync::postgres::Client| {
            let mut transaction = client.transaction().unwrap();
            transaction.execute("SELECT dsync.fence($1)", &[&fence]).map_err(|error| error.code().cloned())
        };
        assert_eq!(check(&mut client), Ok(1));
        // A later holder.
        assert!(run(&database.url(), ["run", key, "--", "true"]).status.success());
        assert_eq!(check(&mut client).unwrap_err().unwrap().code(), "ZDF01");
    }
}

#[test]
fn nothing_is_taken_from_its_environment_and_nothing_of_an_outer_run_is_left() {
    let database = Server::shared().database().unwrap();
    let url = database.url();
    let mut command = pgdsync(&url);
    command
        .env("PGPASSWORD", "p")
        .env("DSYNC_CATALOG", "none")
        .env("PGDSYNC_TOKEN", "1")
        .env("PGDSYNC_KEY_2", "x");
    let output = command.args(["run", "k", "--", "env"]).output().unwrap();
    let said = text(&output.stdout);
    for line in [&format!("DATABASE_URL={url}"), "PGPASSWORD=p", "DSYNC_CATALOG=none", "PGDSYNC_KEY=k"] {
        assert!(said.lines().any(|other| other == line), "{line}: {said}");
    }
    // There is none without a catalog.
    assert!(!said.contains("PGDSYNC_TOKEN") && !said.contains("PGDSYNC_KEY_2"), "{said}");
}

#[test]
fn it_has_the_standard_streams_as_they_are_and_no_descriptor_of_ours() {
    let database = Server::shared().database().unwrap();
    let script = "cat; echo error >&2; echo; for f in /proc/$$/fd/*; do echo ${f##*/}; done";
    let [through_us, by_itself] = [&["run", "k", "--", "sh"][..], &[]].map(|words| {
        let url = database.url();
        let mut command = if words.is_empty() { clean(Command::new("sh"), &url) } else { pgdsync(&url) };
        command.args(words).args(["-c", script]).stdin(Stdio::piped());
        let mut child = command.spawn().unwrap();
        child.stdin.take().unwrap().write_all(b"in\0put").unwrap();
        child.wait_with_output().unwrap()
    });
    assert_eq!(text(&through_us.stdout), text(&by_itself.stdout));
    assert!(text(&through_us.stdout).starts_with("in\0put\n0\n1\n"));
    assert_eq!(text(&through_us.stderr), "error\n");
}

#[test]
fn no_signal_is_blocked_in_it() {
    let database = Server::shared().database().unwrap();
    let output = run(&database.url(), ["run", "k", "--", "grep", "SigBlk", "/proc/self/status"]);
    assert_eq!(text(&output.stdout), "SigBlk:\t0000000000000000\n");
}

#[test]
fn an_annotation_is_seen_by_others() {
    let database = Server::shared().database().unwrap();
    for keys in [&["a"][..], &["b", "c"]] {
        let query = "SELECT string_agg(convert_from(annotation, 'UTF8'), ',') FROM dsync.locks";
        let command = ["--annotation", "host 7", "--", "psql", "-Atc", query, &database.url()];
        let output = run(&database.url(), [&["run"], keys, &command].concat());
        let wanted = vec!["host 7"; keys.len()].join(",");
        assert_eq!(text(&output.stdout).trim(), wanted, "{}", text(&output.stderr));
    }
}
