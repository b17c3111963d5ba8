//! Heartbeats that the standbys confirm: which standbys those are, and which confirmation serves which heartbeat. Pure, without driver and
//! SQL; the clock is passed in.
//!
//! A primary that is cut off from the rest goes on, and answers the heartbeats of whoever reaches it, while a standby is promoted and
//! grants the same locks to others. A standby that was promoted follows nobody. So when a standby has flushed a record that the primary
//! wrote after a heartbeat was sent, the standby was promoted later than that, if it was; and its takeover grace began later still, and
//! lasts longer than a term that is counted from the sending.
//!
//! That does not depend on which heartbeat the record was written for. So claims of one manager whose heartbeats come together use
//! one confirmation ([`Confirmations`]), which must have *begun* after the heartbeat of each was sent. Nor does it depend on who looks whether
//! the standbys have the record: whoever is called away leaves it to the next.

use std::time::Duration;

use crate::clock::Moment;

/// Who must have a holder's heartbeat before it counts: see [`Config::quorum`](crate::Config::quorum).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Quorum {
    /// The server alone. A holder that reaches an old primary, which is cut off from a promoted standby, believes in its lock while the new
    /// primary grants it to another one.
    Server,
    /// The server, and each standby that its setting `synchronous_standby_names` names, however many of them its commits wait for.
    NamedStandbys,
}

/// Why `synchronous_standby_names` does not say who must confirm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unnamed {
    /// It is empty.
    Nobody,
    /// It has `*`, which stands for whichever standby there is.
    Anybody,
    /// It is in no form that is known.
    Unreadable,
}

/// The standbys in `synchronous_standby_names`: `a, b`, `2 (a, b)`, `FIRST 2 (a, b)` or `ANY 1 (a, b)`, each name perhaps in quotes. See
/// <https://www.postgresql.org/docs/current/runtime-config-replication.html#GUC-SYNCHRONOUS-STANDBY-NAMES>.
pub(crate) fn named_standbys(setting: &str) -> Result<Vec<String>, Unnamed> {
    let setting = setting.trim();
    if setting.is_empty() {
        return Err(Unnamed::Nobody);
    }
    // A name with a bracket is in quotes, which comes before the list of those that have none.
    let list = match setting.find(['(', '"']).filter(|at| setting[*at..].starts_with('(')) {
        Some(open) => setting[open + 1..].strip_suffix(')').ok_or(Unnamed::Unreadable)?,
        None => setting,
    };
    let mut names = Vec::new();
    let mut rest = list;
    loop {
        let (name, after, is_quoted) = first_name(rest).ok_or(Unnamed::Unreadable)?;
        if name == "*" && !is_quoted {
            return Err(Unnamed::Anybody);
        }
        names.push(name);
        match after.trim_start() {
            "" => return Ok(names),
            after => rest = after.strip_prefix(',').ok_or(Unnamed::Unreadable)?,
        }
    }
}

/// The first name of a list, what follows it, and whether it is in quotes.
fn first_name(list: &str) -> Option<(String, &str, bool)> {
    let list = list.trim_start();
    let Some(mut rest) = list.strip_prefix('"') else {
        let end = list.find([',', ' ', '\t', '\n', '\r', '(', ')', '"']).unwrap_or(list.len());
        return (end > 0).then(|| (list[..end].to_owned(), &list[end..], false));
    };
    let mut name = String::new();
    loop {
        let (part, after) = rest.split_once('"')?;
        name.push_str(part);
        match after.strip_prefix('"') {
            Some(more) => {
                name.push('"');
                rest = more;
            }
            None => return Some((name, after, true)),
        }
    }
}

/// A standby that is connected, as the primary sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Follower {
    pub(crate) name: String,
    /// It has flushed the record.
    pub(crate) has_it: bool,
}

/// What is in the way of a confirmation, in words; `None` if all standbys of these names have the record.
pub(crate) fn obstacle(names: &[String], followers: &[Follower]) -> Option<String> {
    names.iter().find_map(|name| {
        // The server compares them in the same way.
        let mut of_name = followers.iter().filter(|follower| follower.name.eq_ignore_ascii_case(name));
        match (of_name.next(), of_name.next()) {
            (None, _) => Some(format!("no standby with the name {name:?} is connected")),
            // One of them may be promoted, and the other one goes on.
            (Some(_), Some(_)) => Some(format!("several standbys have the name {name:?}")),
            (Some(follower), None) if !follower.has_it => {
                Some(format!("the standby {name:?} does not answer"))
            }
            (Some(_), None) => None,
        }
    })
}

/// The confirmations of a manager.
#[derive(Debug, Default)]
pub(crate) struct Confirmations(Vec<Confirmation>);

/// Those on one run of a server. A manager may have sessions on two, which both say that they are the primary.
#[derive(Debug)]
struct Confirmation {
    run: String,
    /// When the one began that began last, of those that were given.
    given: Option<Moment>,
    /// The record that the standbys are to have.
    record: Option<Record>,
    /// A session has a statement for it under way since then.
    asked: Option<Moment>,
}

#[derive(Debug)]
struct Record {
    /// Before it was written.
    began: Moment,
    place: String,
    /// When to look again whether the standbys have it.
    next: Moment,
    /// Why they have not, by the last look.
    obstacle: Option<String>,
}

/// What a session is to do that waits for a confirmation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// Nothing: it is given. It had begun then.
    Given(Moment),
    /// Write a record.
    Write,
    /// Look whether the standbys have the log up to this place.
    Look { place: String },
    /// Wait for what another session asks for, or for the time to look again.
    Wait,
}

impl Confirmations {
    /// Another session is waited for as long as it has been heard of that lately.
    const PATIENCE: Duration = Duration::from_millis(200);

    /// What to do at `now` for something that was sent at `sent`, on this run of a server.
    ///
    /// A record that was written before is not replaced: those that send something all the time would have each replaced by another.
    pub(crate) fn part(&mut self, run: &str, sent: Moment, now: Moment) -> Part {
        let known = self.of(run);
        if let Some(began) = known.given.filter(|began| *began >= sent) {
            return Part::Given(began);
        }
        if known.asked.is_some_and(|at| now.saturating_duration_since(at) < Self::PATIENCE) {
            return Part::Wait;
        }
        let part = match &known.record {
            None => Part::Write,
            Some(record) if now >= record.next => Part::Look { place: record.place.clone() },
            Some(_) => return Part::Wait,
        };
        known.asked = Some(now);
        part
    }

    /// What was last given, for whatever was sent.
    pub(crate) fn given(&mut self, run: &str) -> Option<Moment> {
        self.of(run).given
    }

    /// The record was written, after `began`.
    pub(crate) fn written(&mut self, run: &str, began: Moment, place: String) {
        self.of(run).record = Some(Record { began, place, next: began, obstacle: None });
    }

    /// The standbys have the log up to `place`, or there is an obstacle.
    pub(crate) fn seen(&mut self, run: &str, place: &str, obstacle: Option<String>, now: Moment) {
        const SHORTEST: Duration = Duration::from_micros(200);
        const LONGEST: Duration = Duration::from_millis(20);
        let known = self.of(run);
        let Some(record) = known.record.as_mut().filter(|record| record.place == place) else { return };
        match obstacle {
            None => {
                known.given = known.given.max(Some(record.began));
                known.record = None;
            }
            Some(_) => {
                let pause = (now.saturating_duration_since(record.began) / 2).clamp(SHORTEST, LONGEST);
                record.next = now.checked_add(pause).unwrap_or(now);
                record.obstacle = obstacle;
            }
        }
    }

    /// The session that asked comes to an end.
    pub(crate) fn end(&mut self, run: &str) {
        self.of(run).asked = None;
    }

    /// What is in the way of the record that the standbys are to have, if there is one, as far as is known.
    pub(crate) fn obstacle(&mut self, run: &str) -> Option<String> {
        self.of(run).record.as_ref().and_then(|record| record.obstacle.clone())
    }

    fn of(&mut self, run: &str) -> &mut Confirmation {
        /// More than there can be servers of one manager.
        const MOST: usize = 8;
        let index = self.0.iter().position(|known| known.run == run).unwrap_or_else(|| {
            if self.0.len() == MOST {
                self.0.remove(0);
            }
            self.0.push(Confirmation { run: run.to_owned(), given: None, record: None, asked: None });
            self.0.len() - 1
        });
        &mut self.0[index]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_standby_is_found_in_whatever_form() {
        for setting in
            ["a, b", "2 (a, b)", "FIRST 1 (a, b)", "any 1(a,b)", " \"a\" ,b ", "First 2 (\"a\",\"b\")"]
        {
            assert_eq!(named_standbys(setting).unwrap(), ["a", "b"], "{setting}");
        }
        assert_eq!(named_standbys("\"x (1), \"\"y\"\"\"").unwrap(), ["x (1), \"y\""]);
        assert_eq!(named_standbys("ANY 2 (\"*\", Pg-1)").unwrap(), ["*", "Pg-1"]);
    }

    #[test]
    fn a_setting_that_does_not_say_who_is_told() {
        for (setting, problem) in [
            ("", Unnamed::Nobody),
            ("  ", Unnamed::Nobody),
            ("*", Unnamed::Anybody),
            ("ANY 1 (a, *)", Unnamed::Anybody),
            ("ANY 1 (a", Unnamed::Unreadable),
            ("ANY 1 ()", Unnamed::Unreadable),
            ("a b", Unnamed::Unreadable),
            ("\"a", Unnamed::Unreadable),
            ("a,", Unnamed::Unreadable),
        ] {
            assert_eq!(named_standbys(setting), Err(problem), "{setting}");
        }
    }

    #[test]
    fn each_named_standby_must_have_the_record() {
        let names = ["a", "B"].map(str::to_owned);
        let follower = |name: &str, has_it| Follower { name: name.to_owned(), has_it };
        let problem = |followers: &[Follower]| obstacle(&names, followers);
        assert_eq!(problem(&[follower("A", true), follower("b", true), follower("c", false)]), None);
        assert!(problem(&[follower("a", true)]).unwrap().contains("no standby with the name \"B\""));
        assert!(
            problem(&[follower("a", false), follower("b", true)]).unwrap().contains("\"a\" does not answer")
        );
        let twice = [follower("a", true), follower("b", true), follower("a", true)];
        assert!(problem(&twice).unwrap().contains("several standbys have the name \"a\""));
    }

    #[test]
    fn a_confirmation_serves_what_was_sent_before_it_began_on_the_same_server() {
        let (mut known, begin) = (Confirmations::default(), Moment::now());
        let at = |millis| begin.checked_add(Duration::from_millis(millis)).unwrap();
        let look = |place: &str| Part::Look { place: place.to_owned() };
        let away = || Some("the standby is gone".to_owned());
        assert_eq!(known.part("x", at(0), at(1)), Part::Write);
        // Another heartbeat comes meanwhile, and is none the wiser when the first is confirmed.
        assert_eq!(known.part("x", at(2), at(3)), Part::Wait);
        assert_eq!(known.part("y", at(0), at(3)), Part::Write, "another server's");
        known.written("x", at(1), "0/1".to_owned());
        known.end("x");
        // Whoever comes next looks, after a pause that grows.
        assert_eq!(known.part("x", at(2), at(4)), look("0/1"));
        known.seen("x", "0/1", away(), at(5));
        known.end("x");
        assert_eq!(known.part("x", at(2), at(6)), Part::Wait);
        assert_eq!(known.part("x", at(2), at(7)), look("0/1"));
        known.seen("x", "0/1", None, at(8));
        known.end("x");
        assert_eq!(known.part("x", at(0), at(8)), Part::Given(at(1)));
        assert_eq!(known.part("x", at(1), at(8)), Part::Given(at(1)));
        assert_eq!(known.part("y", at(0), at(8)), Part::Wait);
        assert_eq!(known.part("x", at(2), at(8)), Part::Write);
        // It comes to nothing, and what was known stays known.
        known.end("x");
        assert_eq!(known.part("x", at(1), at(9)), Part::Given(at(1)));
        assert_eq!(known.part("x", at(2), at(9)), Part::Write);
        // A session that is silent is not waited for.
        assert_eq!(known.part("x", at(2), at(208)), Part::Wait);
        assert_eq!(known.part("x", at(2), at(209)), Part::Write);
        known.written("x", at(209), "0/2".to_owned());
        known.end("x");
        assert_eq!(known.part("x", at(2), at(210)), look("0/2"));
        // What is seen of a record that is not the last one says nothing.
        known.seen("x", "0/1", None, at(211));
        known.seen("x", "0/2", away(), at(211));
        assert_eq!(known.given("x"), Some(at(1)));
        assert_eq!([known.obstacle("x"), known.obstacle("y")], [away(), None]);
    }
}
