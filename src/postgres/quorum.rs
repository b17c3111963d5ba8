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

use std::collections::VecDeque;
use std::time::Duration;

use crate::clock::Moment;
use crate::pg::runs::Runs;

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
    /// Up to which place it has flushed the log, if that is known.
    pub(crate) flushed: Option<Lsn>,
}

/// A place in the write-ahead log of a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Lsn(u64);

impl Lsn {
    pub(crate) const FIRST: Self = Self(0);

    /// As PostgreSQL writes it: two hexadecimal numbers, of which the first has the upper 32 bits. See
    /// <https://www.postgresql.org/docs/current/datatype-pg-lsn.html>.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (upper, lower) = text.split_once('/')?;
        let [upper, lower] = [upper, lower].map(|half| u32::from_str_radix(half, 16).map(u64::from));
        Some(Self(upper.ok()? << 32 | lower.ok()?))
    }
}

/// What is in the way of a confirmation, in words; `None` if all standbys of these names have the log up to `place`.
pub(crate) fn obstacle(names: &[String], followers: &[Follower], place: Lsn) -> Option<String> {
    names.iter().find_map(|name| {
        // The server compares them in the same way.
        let mut of_name = followers.iter().filter(|follower| follower.name.eq_ignore_ascii_case(name));
        match (of_name.next(), of_name.next()) {
            (None, _) => Some(format!("no standby with the name {name:?} is connected")),
            // One of them may be promoted, and the other one goes on.
            (Some(_), Some(_)) => Some(format!("several standbys have the name {name:?}")),
            (Some(follower), None) if follower.flushed.is_none_or(|flushed| flushed < place) => {
                Some(format!("the standby {name:?} does not answer"))
            }
            (Some(_), None) => None,
        }
    })
}

/// The confirmations of a manager.
#[derive(Debug, Default)]
pub(crate) struct Confirmations(Runs<Confirmation>);

/// Those on one run of a server.
#[derive(Debug, Default)]
struct Confirmation {
    /// Start of the latest confirmation that was given.
    given: Option<Moment>,
    /// The records that the standbys are to have, in the order in which they began.
    records: VecDeque<Record>,
    /// When to look again whether they have them.
    next: Option<Moment>,
    /// Why they have not, by the last look.
    obstacle: Option<String>,
    /// Since when a session has been asking.
    asked: Option<Moment>,
}

#[derive(Clone, Copy, Debug)]
struct Record {
    /// Before it was written.
    began: Moment,
    place: Lsn,
}

/// What a session is to do that waits for a confirmation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// Nothing: it is given.
    Given,
    /// Write a record, and look whether the standbys have it.
    Write,
    /// Look whether the standbys have the records that there are.
    Look,
    /// Wait for what another session asks for, or for the time to look again.
    Wait,
}

impl Confirmations {
    /// A session that began to ask at most 200 ms ago is waited for.
    const ASKED_LASTS: Duration = Duration::from_millis(200);

    /// What to do at `now` for things that were sent from `first` to `last`, on this run of a server.
    ///
    /// A record that was written before the last of them is not replaced by another, but followed: those that send something all the time would
    /// have each replaced, and a standby that comes back for a moment only has the last one, too.
    pub(crate) fn part(&mut self, run: &str, first: Moment, last: Moment, now: Moment) -> Part {
        let known = self.0.of(run);
        if known.given.is_some_and(|began| began >= first) {
            return Part::Given;
        }
        if known.asked.is_some_and(|at| now.saturating_duration_since(at) < Self::ASKED_LASTS) {
            return Part::Wait;
        }
        let part = match known.next {
            _ if known.is_to_write(last, now) => Part::Write,
            Some(next) if now < next => return Part::Wait,
            _ => Part::Look,
        };
        known.asked = Some(now);
        part
    }

    /// What was last given, for whatever was sent.
    pub(crate) fn given(&mut self, run: &str) -> Option<Moment> {
        self.0.of(run).given
    }

    /// The record was written, after `began`.
    pub(crate) fn written(&mut self, run: &str, began: Moment, place: Lsn) {
        /// As many come in half a minute, if the standbys have none of them.
        const MOST: usize = 100;
        let known = self.0.of(run);
        if known.records.len() == MOST {
            known.records.pop_front();
        }
        // Its answer may come after that of one that began later, whose place in the log is a later one.
        let index = known.records.partition_point(|record| record.began <= began);
        known.records.insert(index, Record { began, place });
    }

    /// What is in the way of each record was looked at.
    pub(crate) fn seen(&mut self, run: &str, obstacle: impl Fn(Lsn) -> Option<String>, now: Moment) {
        const SHORTEST: Duration = Duration::from_micros(200);
        const LONGEST: Duration = Duration::from_millis(20);
        let known = self.0.of(run);
        if let Some(last) = known.records.iter().rposition(|record| obstacle(record.place).is_none()) {
            let had = known.records.drain(..=last).next_back();
            known.given = known.given.max(had.map(|record| record.began));
        }
        let first = known.records.front().copied();
        known.obstacle = first.and_then(|first| obstacle(first.place));
        known.next = first.and_then(|first| {
            let pause = (now.saturating_duration_since(first.began) / 2).clamp(SHORTEST, LONGEST);
            now.checked_add(pause)
        });
    }

    /// The session that asked comes to an end.
    pub(crate) fn end(&mut self, run: &str) {
        self.0.of(run).asked = None;
    }

    /// What is in the way of the record that the standbys are to have, if there is one, as far as is known.
    pub(crate) fn obstacle(&mut self, run: &str) -> Option<String> {
        self.0.of(run).obstacle.clone()
    }
}

impl Confirmation {
    /// Whether what was sent at `last` needs another record. Each is a commit, so they come less and less often.
    fn is_to_write(&self, last: Moment, now: Moment) -> bool {
        const SHORTEST: Duration = Duration::from_millis(20);
        const LONGEST: Duration = Duration::from_millis(500);
        let (Some(oldest), Some(newest)) = (self.records.front(), self.records.back()) else { return true };
        let pause = (now.saturating_duration_since(oldest.began) / 8).clamp(SHORTEST, LONGEST);
        newest.began < last && now.saturating_duration_since(newest.began) >= pause
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
        let place = Lsn::parse("1/A").unwrap();
        let follower = |name: &str, has_it| {
            let flushed = Lsn::parse(if has_it { "1/A" } else { "1/9" });
            Follower { name: name.to_owned(), flushed }
        };
        let problem = |followers: &[Follower]| obstacle(&names, followers, place);
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
        let place = |number| Lsn(number);
        let none_before = |place: u64| move |other: Lsn| (other.0 >= place).then(|| "it is gone".to_owned());
        assert_eq!(known.part("x", at(0), at(0), at(1)), Part::Write);
        // Another heartbeat comes meanwhile, and is none the wiser when the first is confirmed.
        assert_eq!(known.part("x", at(2), at(2), at(3)), Part::Wait);
        assert_eq!(known.part("y", at(0), at(0), at(3)), Part::Write, "another server's");
        known.written("x", at(1), place(1));
        known.end("x");
        // Whoever comes next looks, after a pause that grows.
        assert_eq!(known.part("x", at(2), at(2), at(4)), Part::Look);
        known.seen("x", none_before(1), at(5));
        known.end("x");
        assert_eq!(known.part("x", at(0), at(2), at(6)), Part::Wait);
        assert_eq!(known.part("x", at(0), at(2), at(7)), Part::Look);
        known.seen("x", none_before(2), at(8));
        known.end("x");
        assert_eq!(known.part("x", at(0), at(2), at(8)), Part::Given);
        assert_eq!(known.part("x", at(1), at(1), at(8)), Part::Given);
        assert_eq!(known.part("y", at(0), at(0), at(8)), Part::Wait);
        assert_eq!(known.part("x", at(2), at(2), at(8)), Part::Write);
        // It comes to nothing, and what was known stays known.
        known.end("x");
        assert_eq!(known.part("x", at(1), at(1), at(9)), Part::Given);
        assert_eq!(known.part("x", at(2), at(2), at(9)), Part::Write);
        // A session that is silent is not waited for.
        assert_eq!(known.part("x", at(2), at(2), at(208)), Part::Wait);
        assert_eq!(known.part("x", at(2), at(2), at(209)), Part::Write);
    }

    #[test]
    fn records_follow_each_other_while_the_standbys_have_none_and_the_last_that_they_have_counts() {
        let (mut known, begin) = (Confirmations::default(), Moment::now());
        let at = |millis| begin.checked_add(Duration::from_millis(millis)).unwrap();
        let away = |_| Some("it is gone".to_owned());
        let (mut written, mut looks) = (0, 0);
        // Something is sent every 3 ms, for 10 s.
        for now in (0..10_000).step_by(3) {
            match known.part("x", at(0), at(now), at(now)) {
                Part::Write => {
                    written += 1;
                    known.written("x", at(now), Lsn(now));
                }
                Part::Look => looks += 1,
                Part::Given | Part::Wait => continue,
            }
            known.seen("x", away, at(now));
            known.end("x");
        }
        assert!((30..60).contains(&written), "{written}");
        assert!((300..700).contains(&looks), "{looks}");
        assert_eq!(known.obstacle("x"), away(Lsn::FIRST));
        // Nothing is written for what has its record.
        assert_eq!(known.part("x", at(0), at(10), at(20_000)), Part::Look);
        known.seen("x", |place| (place.0 >= 9_000).then(|| "late".to_owned()), at(20_000));
        known.end("x");
        let given = known.given("x").unwrap();
        assert!((at(8_000)..at(9_000)).contains(&given), "{:?}", given.since(begin));
        assert_eq!(known.obstacle("x").unwrap(), "late");
        known.seen("x", |_| None, at(20_001));
        assert!(known.given("x").unwrap() >= at(9_000));
        assert_eq!(known.obstacle("x"), None);
    }

    /// Records of several sessions, which may come into the log and be answered in any order.
    #[test]
    fn a_record_that_the_standbys_have_confirms_nothing_that_was_sent_after_it() {
        const ORDERS: [[u64; 3]; 6] = [[1, 2, 3], [1, 3, 2], [2, 1, 3], [2, 3, 1], [3, 1, 2], [3, 2, 1]];
        let begin = Moment::now();
        let at = |millis| begin.checked_add(Duration::from_millis(millis)).unwrap();
        for (places, answers) in ORDERS.iter().flat_map(|places| ORDERS.map(|answers| (places, answers))) {
            // How far the standbys are after each of the answers.
            for flushed in (0..64).map(|number| [number % 4, number / 4 % 4, number / 16]) {
                let mut known = Confirmations::default();
                let mut confirmed = None;
                for (round, (began, flushed)) in answers.into_iter().zip(flushed).enumerate() {
                    let place = |began: u64| places[began as usize - 1];
                    known.written("x", at(began), Lsn(place(began)));
                    known.seen("x", |place| (place.0 > flushed).then(|| "promoted".to_owned()), at(9));
                    let had = answers[..=round].iter().filter(|began| place(**began) <= flushed).max();
                    confirmed = confirmed.max(had.copied());
                    let given = known.given("x");
                    assert_eq!(given, confirmed.map(at), "places {places:?}, answers {answers:?}, {flushed}");
                }
            }
        }
    }

    #[test]
    fn a_place_is_read_as_the_server_writes_it() {
        assert_eq!(Lsn::parse("0/0"), Some(Lsn::FIRST));
        assert_eq!(Lsn::parse("16/B374D848"), Some(Lsn(0x16_B374_D848)));
        assert!(Lsn::parse("1/0") > Lsn::parse("0/FFFFFFFF"));
        for text in ["", "16", "16/", "/1", "16/B374D848/0", "1/100000000", "x/1"] {
            assert_eq!(Lsn::parse(text), None, "{text}");
        }
    }
}
