//! `doctor`.

use serde_json::Value;
use support::pgbouncer::{self, PoolMode};
use support::{Replication, Server, Shutdown};
use unicode_width::UnicodeWidthStr as _;

use crate::common::{Ran, at, started};

/// A report in 80 columns, whose line on the topic begins with the verdict and has all of these.
#[track_caller]
fn says(ran: &Ran, code: i32, line: &str, texts: &[&str]) {
    println!("{}", ran.out);
    assert!(ran.code == Some(code) && ran.err.is_empty(), "{ran:#?}");
    let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    let begins = |text: &&str| words(text).starts_with(line);
    let mut lines = ran.out.lines().skip_while(|text| !begins(text));
    let first = lines.next().unwrap_or_else(|| panic!("no {line:?}: {}", ran.out));
    let rest = lines.take_while(|line| line.starts_with(' '));
    let found = words(&[first].into_iter().chain(rest).collect::<Vec<_>>().join(" "));
    for text in texts {
        assert!(found.contains(text), "{text:?} is missing: {found}");
    }
    assert!(ran.out.lines().all(|line| line.width() <= 80), "{}", ran.out);
}

#[test]
fn a_good_server_has_a_good_report_and_a_stopped_one_is_told_of() {
    let server = Server::start().unwrap();
    let url = server.url();
    drop(started(&url));
    // A round trip may take a twelfth of it.
    let ran = at(&format!("{url}?connect_timeout=60"), &["doctor"]);
    says(&ran, 0, "good connection", &["postgres"]);
    says(&ran, 0, "good catalog", &[]);
    assert!(!ran.out.contains("wrong"), "{}", ran.out);
    let lines = at(&url, &["doctor", "--output=json"]).well();
    for line in lines.lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        assert!(line["verdict"] != "wrong" && line["text"].is_string(), "{line}");
    }
    server.stop(Shutdown::Fast).unwrap();
    says(&at(&url, &["doctor"]), 69, "wrong connection", &["refused", "->"]);
    says(&at(&format!("{url}?sslcert=/x"), &["doctor"]), 64, "wrong settings", &["sslcert", "->"]);
}

#[test]
fn a_pooler_and_a_standby_are_told_of() {
    if support::skip_without(pgbouncer::available()) {
        return;
    }
    let server = Server::start().unwrap();
    drop(started(&server.url()));
    let pooler = pgbouncer::start(&server, PoolMode::Transaction).unwrap();
    says(&at(&pooler.url("postgres"), &["doctor"]), 69, "wrong sessions", &["->"]);
    let standby = server.standby(Replication::Asynchronous).unwrap();
    says(&at(&standby.url(), &["doctor"]), 69, "wrong primary", &["standby", "->"]);
}

#[test]
fn a_role_that_may_do_too_little_is_told_what_it_lacks() {
    let server = Server::start().unwrap();
    server.client().unwrap().batch_execute("CREATE ROLE poor LOGIN").unwrap();
    let poor = server.url().replace("postgres@", "poor@");
    says(&at(&poor, &["doctor"]), 69, "wrong catalog", &["->", "`pgdsync catalog --grant ROLE`"]);
    let sql = at(&server.url(), &["catalog", "--grant=poor"]).well();
    server.client().unwrap().batch_execute(&sql).unwrap();
    says(&at(&poor, &["doctor"]), 0, "good catalog", &[]);
}
