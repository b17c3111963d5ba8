//! What is different on a terminal: colours, a question, and a picture that is renewed in its place.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::thread;

use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use support::Database;
use support::process::Signal;
use unicode_width::UnicodeWidthStr as _;

use crate::common::{PATIENCE, hold, pgdsync, started};

/// A terminal, and what was written to it.
struct Terminal {
    ours: File,
    theirs: File,
    text: Arc<Mutex<String>>,
}

impl Terminal {
    fn open() -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap().into_string().unwrap();
        let theirs = File::options().read(true).write(true).open(name).unwrap();
        tcsetwinsize(&theirs, Winsize { ws_row: 24, ws_col: 60, ws_xpixel: 0, ws_ypixel: 0 }).unwrap();
        let (ours, text) = (File::from(master), Arc::new(Mutex::new(String::new())));
        let (mut reader, read) = (ours.try_clone().unwrap(), Arc::clone(&text));
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = reader.read(&mut bytes) {
                read.lock().unwrap().push_str(&String::from_utf8_lossy(&bytes[..count]));
            }
        });
        Self { ours, theirs, text }
    }

    /// Lets a program have it for all its streams.
    fn give_to<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        let one = || self.theirs.try_clone().unwrap();
        command.stdin(one()).stdout(one()).stderr(one())
    }

    fn text(&self) -> String {
        self.text.lock().unwrap().clone()
    }

    fn shows(&self, text: &str) {
        let shown = support::wait_for(text, PATIENCE, || self.text().contains(text).then_some(()));
        assert!(shown.is_ok(), "{text:?} is missing: {}", self.text());
    }
}

#[test]
fn a_lock_is_broken_by_who_answers_yes_to_the_question_and_not_otherwise() {
    let database = Database::fresh().unwrap();
    let url = database.url();
    let manager = started(&url);
    let guard = hold(&manager, "a");
    for (answer, code) in [("\n", 1), ("n\n", 1), ("yes\n", 0)] {
        let mut terminal = Terminal::open();
        let mut child = terminal.give_to(pgdsync(&["break", "a"]).env("DATABASE_URL", &url)).spawn().unwrap();
        terminal.shows("End this session? [y/N]");
        assert!(
            guard.is_held() && terminal.text().contains("held by     127.0.0.1 dsync"),
            "{}",
            terminal.text()
        );
        terminal.ours.write_all(answer.as_bytes()).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(code), "{answer:?}: {}", terminal.text());
    }
    assert!(guard.lost().wait_timeout(PATIENCE));
}

/// Who answers has seen another holder than the one that would be struck.
#[test]
fn an_answer_counts_for_the_holder_that_was_shown() {
    let database = Database::fresh().unwrap();
    let url = database.url();
    let (manager, other) = (started(&url), started(&url));
    let guard = hold(&manager, "a");
    let mut terminal = Terminal::open();
    let mut child = terminal.give_to(pgdsync(&["break", "a"]).env("DATABASE_URL", &url)).spawn().unwrap();
    terminal.shows("End this session? [y/N]");
    guard.release().unwrap();
    let next = hold(&other, "a");
    terminal.ours.write_all(b"y\n").unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(75), "{}", terminal.text());
    terminal.shows("another has the lock now; nothing was done");
    next.release().unwrap();
}

/// Nobody waits for a terminal that was stopped, to take away what was shown on it.
#[test]
fn a_command_begins_though_the_terminal_was_stopped_while_the_lock_was_waited_for() {
    let database = Database::fresh().unwrap();
    let url = database.url();
    let manager = started(&url);
    let guard = hold(&manager, "a");
    let mut terminal = Terminal::open();
    let mut command = pgdsync(&["run", "a", "--", "true"]);
    let mut child = terminal.give_to(command.env("DATABASE_URL", &url)).spawn().unwrap();
    terminal.shows("waiting for a");
    // Ctrl-S.
    terminal.ours.write_all(b"\x13").unwrap();
    guard.release().unwrap();
    let ended = support::wait_for("the end of the command", PATIENCE, || child.try_wait().unwrap());
    let _ = child.kill();
    assert_eq!(ended.unwrap().code(), Some(0));
}

#[test]
fn who_waits_with_a_command_sees_who_has_the_lock() {
    let database = Database::fresh().unwrap();
    let url = database.url();
    let (manager, other) = (started(&url), started(&url));
    let guards = [hold(&manager, "a"), hold(&other, "b")];
    for arguments in [
        &["run", "a", "--", "echo", "ran"][..],
        &["run", "--every=1h", "a", "--", "echo", "ran"],
        // Of several, the one that is waited for, also where others have all of them.
        &["run", "0", "a", "--", "echo", "ran"],
        &["run", "a", "b", "--", "echo", "ran"],
        &["run", "b", "a", "--", "echo", "ran"],
    ] {
        let terminal = Terminal::open();
        let mut child = terminal.give_to(pgdsync(arguments).env("DATABASE_URL", &url)).spawn().unwrap();
        terminal.shows(if arguments.contains(&"b") {
            "\rwaiting for "
        } else {
            "\rwaiting for a: 127.0.0.1 dsync has it for "
        });
        terminal.shows("s; 0 before us\u{1b}[K");
        assert!(!terminal.text().contains("ran"), "{:?}", terminal.text());
        support::process::signal(support::process::id_of(&child), Signal::Interrupt).unwrap();
        assert_eq!(child.wait().unwrap().code(), None);
    }
    let terminal = Terminal::open();
    let mut run = pgdsync(&["run", "a", "--", "echo", "ran"]);
    let mut child = terminal.give_to(run.env("DATABASE_URL", &url)).spawn().unwrap();
    terminal.shows("; 0 before us\u{1b}[K");
    drop(guards);
    terminal.shows("\r\u{1b}[Kran\r\n");
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn the_picture_of_a_lock_is_renewed_in_its_place_and_fits_the_terminal() {
    let database = Database::fresh().unwrap();
    let url = database.url();
    let manager = started(&url);
    let key = "a".to_owned() + &"鍵".repeat(60);
    for verb in [&["show", &key, "--watch", "--interval=50ms"][..], &["list", "--watch", "--interval=50ms"]] {
        let terminal = Terminal::open();
        let mut child = terminal.give_to(pgdsync(verb).env("DATABASE_URL", &url)).spawn().unwrap();
        terminal.shows("\u{1b}[H");
        let guard = hold(&manager, &key);
        terminal.shows("127.0.0.1");
        println!("{:?}", terminal.text());
        assert!(terminal.text().contains("\u{1b}[1m"), "colours");
        guard.release().unwrap();
        support::process::signal(support::process::id_of(&child), Signal::Interrupt).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(0));
        // What is written to a terminal of 60 columns, without the sequences that the terminal does not show.
        let text = terminal.text();
        let mut parts = text.split("\u{1b}[");
        let begun = parts.next().unwrap_or_default().to_owned();
        let shown = parts
            .fold(begun, |shown, part| shown + part.trim_start_matches(char::is_numeric).get(1..).unwrap());
        let widest = shown.lines().map(|line| line.width()).max();
        assert!(Some(50) < widest && widest <= Some(60), "{widest:?}: {shown}");
    }
}

#[test]
fn a_change_of_holder_fits_the_terminal() {
    let database = Database::fresh().unwrap();
    let url = database.url();
    let key = "a".to_owned() + &"鍵".repeat(60);
    let manager = started(&url);
    let guard = hold(&manager, &key);
    let terminal = Terminal::open();
    let mut child = terminal.give_to(pgdsync(&["watch"]).env("DATABASE_URL", &url)).spawn().unwrap();
    terminal.shows("held by 127");
    support::process::signal(support::process::id_of(&child), Signal::Interrupt).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
    let text = terminal.text();
    let widest = text.lines().map(|line| line.width()).max();
    assert!(text.contains('…') && Some(50) < widest && widest <= Some(60), "{widest:?}: {text}");
    guard.release().unwrap();
}

#[test]
fn there_are_no_colours_where_nobody_wants_them() {
    let database = Database::fresh().unwrap();
    let url = database.url();
    let manager = started(&url);
    let _guard = hold(&manager, "a");
    for (wish, has_colours) in [("1", false), ("", true)] {
        let terminal = Terminal::open();
        let mut list = pgdsync(&["list"]);
        let mut child =
            terminal.give_to(list.env("DATABASE_URL", &url).env("NO_COLOR", wish)).spawn().unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(0));
        terminal.shows("127.0.0.1 dsync");
        assert_eq!(terminal.text().contains('\u{1b}'), has_colours, "{:?}", terminal.text());
    }
}
