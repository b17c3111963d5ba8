//! `list` and `show`.

use std::sync::Arc;

use dsync::{Key, LockOptions};
use serde_json::Value;
use support::Database;
use unicode_width::UnicodeWidthStr as _;

use crate::common::{PATIENCE, at, hold, queue, started};

#[track_caller]
fn assert_fits(text: &str) {
    for line in text.lines() {
        assert!(line.width() <= 80, "{} columns: {line}", line.width());
        assert!(!line.contains(char::is_control), "{line:?}");
    }
}

fn json(line: &str) -> Value {
    serde_json::from_str(line).unwrap()
}

/// Whoever takes locks can write when their terms began.
#[test]
fn a_time_that_no_calendar_has_is_shown_all_the_same() {
    let database = Database::fresh().unwrap();
    let url = database.url();
    let manager = started(&url);
    let _guard = hold(&manager, "a");
    let forever = "UPDATE dsync.lock SET since = 'infinity'";
    assert_eq!(database.client().unwrap().execute(forever, &[]).unwrap(), 1);
    assert!(at(&url, &["show", "a"]).well().contains("after 9998"));
    for arguments in [&["list", "--output=json"][..], &["show", "a", "--output=json"]] {
        assert!(at(&url, arguments).well().contains("\"after 9998\""), "{arguments:?}");
    }
}

#[test]
fn keys_that_would_look_alike_are_shown_apart_and_found_by_what_is_shown() {
    let database = Database::fresh().unwrap();
    let url = database.url();
    let manager = started(&url);
    let _held = ["x\ny", r"x\ny"].map(|key| hold(&manager, key));
    let listed = at(&url, &["list"]).well();
    let starts = [r"$'x\ny' ", r"x\ny "];
    assert!(starts.iter().all(|start| listed.lines().any(|line| line.starts_with(start))), "{listed}");
    for (key, start) in ["x\ny", r"x\ny"].into_iter().zip(starts) {
        let found = at(&url, &["list", key]).well();
        assert!(found.lines().count() == 2 && found.lines().any(|line| line.starts_with(start)), "{found}");
    }
}

#[test]
fn three_hold_and_five_wait_and_all_of_it_is_shown_in_80_columns() {
    let database = Database::fresh().unwrap();
    let url = database.url();
    let manager = started(&url);
    assert_eq!(at(&url, &["list"]).well(), "no lock is held or waited for\n");

    let annotation =
        "{\"host\":\"web1\"}\u{1b}[31m red\r\nsecond line \u{202e}".to_owned() + &"x".repeat(200);
    let note = annotation.clone();
    let options = LockOptions::new().valuer(Arc::new(move || note.clone().into_bytes()));
    let noted = manager.lock_with("nightly-report", options).unwrap().acquire(PATIENCE).unwrap();
    let long = format!("{}\u{1b}[2J\n{}", "鍵".repeat(60), "a very long name ".repeat(8));
    let wide = hold(&manager, &long);
    let number = hold(&manager, (4, -2));
    let others = [(); 5].map(|()| started(&url));
    let keys =
        [(); 3].map(|()| Key::from("nightly-report")).into_iter().chain([(4, -2).into(), (&long).into()]);
    let waiting: Vec<_> = others.iter().zip(keys).map(|(other, key)| queue(other, &key)).collect();

    let listed = at(&url, &["list"]).well();
    println!("{listed}");
    assert_fits(&listed);
    let lines: Vec<_> = listed.lines().collect();
    assert_eq!(lines.len(), 4, "{listed}");
    assert!(lines[0].starts_with("KEY") && lines[0].ends_with("WAIT"), "{listed}");
    let find = |start: &str| *lines.iter().find(|line| line.starts_with(start)).expect(start);
    assert!(find("nightly-report").contains(&noted.term().token().unwrap().to_string()), "{listed}");
    assert!(find("nightly-report").ends_with("  3") && find("nightly-report").contains("127.0.0.1 dsync"));
    assert!(find("#4:-2").ends_with("  1") && find("$'鍵").contains('…'), "{listed}");

    let shown = at(&url, &["show", "nightly-report"]).well();
    println!("{shown}");
    assert_fits(&shown);
    let all = shown.lines().map(|line| line.get(14..).unwrap_or_default()).collect::<String>();
    assert!(all.contains("\\u{1b}[31m red\\r\\nsecond line \\u{202e}xxx"), "{all}");
    let view = manager.inspect("nightly-report").unwrap();
    let backends: Vec<_> = view.waiters.iter().map(|waiter| format!("backend {},", waiter.pid)).collect();
    let places: Vec<_> = backends.iter().map(|backend| shown.find(backend).expect(backend)).collect();
    assert!(places.is_sorted() && shown.contains("waiting     3"), "{shown}");
    assert!(shown.contains(&format!("backend {}\n", view.holder.as_ref().unwrap().pid)), "{shown}");
    assert!(shown.contains("since") && shown.contains(" 1. ") && shown.contains(" 3. "), "{shown}");
    let shown = at(&url, &["show", &long]).well();
    println!("{shown}");
    assert_fits(&shown);
    let key: String = shown.lines().take_while(|line| !line.starts_with(' ')).collect();
    assert!(key.contains(&"鍵".repeat(60)) && key.contains("\\x1b[2J\\n"), "{shown}");

    // What it shows is a key again.
    assert_eq!(at(&url, &["list", "#4:-2"]).well().lines().count(), 2);
    assert_eq!(at(&url, &["list", "#*"]).well().lines().count(), 2);
    assert_eq!(at(&url, &["list", "nightly-????rt"]).well().lines().count(), 2);
    for words in [&["list", "nightly"][..], &["list", "--namespace", "other", "n*"]] {
        assert_eq!(at(&url, words).well(), "no lock that matches is held or waited for\n");
    }

    // The same for programs, and there nothing is missing.
    let listed = at(&url, &["list", "--output", "json"]).well();
    let found: Vec<Value> = listed.lines().map(json).collect();
    assert_eq!(found.len(), 3);
    assert!(found.iter().any(|lock| lock["key"] == *long), "{listed}");
    let lock = json(&at(&url, &["show", "nightly-report", "--output=json"]).well());
    assert_eq!(lock["holders"][0]["annotation"], annotation);
    assert_eq!(lock["holders"][0]["token"], noted.term().token().unwrap());
    assert_eq!(lock["namespace"], "dsync");
    let order: Vec<_> =
        lock["waiters"].as_array().unwrap().iter().map(|waiter| waiter["backend"].as_i64()).collect();
    assert_eq!(order, view.waiters.iter().map(|waiter| Some(waiter.pid.into())).collect::<Vec<_>>());

    waiting.iter().for_each(|lock| lock.release().unwrap());
    drop((noted, wide, number));
}

#[test]
fn locks_that_are_shared_or_of_another_namespace_are_told_apart() {
    let database = Database::fresh().unwrap();
    let url = database.url();
    let (one, other) = (started(&url), started(&url));
    let readers =
        [&one, &other].map(|manager| manager.shared_lock("prices").unwrap().acquire(PATIENCE).unwrap());
    let elsewhere = dsync::Config::from_url(&url).unwrap().namespace("else");
    let elsewhere = dsync::PostgresManager::connect(elsewhere).unwrap();
    let guard = hold(&elsewhere, "##x");

    let listed = at(&url, &["list"]).well();
    println!("{listed}");
    assert!(listed.contains("shared by 2: 127.0.0.1 dsync, …"), "{listed}");
    assert!(listed.contains("###x (else)"), "{listed}");
    assert!(
        at(&url, &["list", "--namespace", "else"]).well().contains("###x  "),
        "there it is the usual one"
    );
    assert_eq!(at(&url, &["list", "--namespace", "dsync"]).well().lines().count(), 2);
    assert!(
        at(&url, &["show", "###x", "--namespace=else"])
            .well()
            .contains("held by     127.0.0.1 dsync, backend")
    );
    assert!(at(&url, &["show", "###x"]).well().contains("held by     nobody"));
    let shown = at(&url, &["show", "prices"]).well();
    println!("{shown}");
    assert!(shown.contains("shared by   2") && shown.matches("held by").count() == 2, "{shown}");
    drop((readers, guard));
}
