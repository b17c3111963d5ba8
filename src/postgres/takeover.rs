//! Whether a server was taken over, and how long nobody is granted a lock then: pure, without driver and SQL; the clock is passed in.
//!
//! Advisory locks vanish with a restart of the server, and a standby that is promoted never had them. A holder that is cut off
//! believes in its term all the same, until that runs out. So after a takeover nobody is granted a lock for as long as the longest
//! lease: the *takeover grace*. Terms of before were renewed by the server of before, which was gone when the first session saw the
//! takeover; so they are over when one that has counted from then on has come to the end.
//!
//! The database remembers the run of the server that was seen last, and whether the terms of before are over: the [`Record`], in a
//! table that is unlogged, so that a crash and a promotion take it away. [`judge`] compares it with the run that there is. Each
//! process counts on its own clock ([`Graces`]) from when it saw the record's number, which is drawn anew with each record. So
//! a crash in the middle begins the grace again, and a step of the server's clock does not end it.

use std::time::{Duration, Instant};

/// Which events begin a takeover grace, in which nobody is granted a lock before all terms of before are over: see
/// [`Config::takeover`](crate::Config::takeover).
///
/// The later ones are the stronger ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum TakeoverPolicy {
    /// None: locks are granted as soon as the server accepts sessions. A holder that is cut off from a server which is
    /// restarted may believe in its lock for up to a lease while another one has it. All that is possible without the catalog.
    Immediate,
    /// After a promotion of a standby. A crash of the server (an immediate shutdown, a backend that is killed) looks like one, so it
    /// counts too. A clean restart costs nothing, and promises nothing to a holder that is cut off meanwhile.
    AfterPromotion,
    /// After a clean restart as well. There a manager whose term was the last one of a key is granted that lock as soon as the longest lease
    /// has passed since the beginning of that term: mostly at once.
    ///
    /// Each grant costs a connection: a server that is shut down ends its sessions one after the other, and may grant the lock of one that it has
    /// ended to another, which it ends next; but it refuses new ones by then. So a claim has its lock when a new connection to the same
    /// address was asked for a password after the grant, or let in, or refused for another reason. Locks that are granted at once share that.
    /// Through a pooler, which answers by itself, or behind an address that has moved to another server, it shows nothing. A proxy that lets
    /// new connections wait, since it has as many connections as it may have, keeps the lock back until there is a place.
    AfterAnyRestart,
}

impl TakeoverPolicy {
    pub(crate) const ALL: [Self; 3] = [Self::Immediate, Self::AfterPromotion, Self::AfterAnyRestart];

    /// Its name in the catalog.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Immediate => "immediate",
            Self::AfterPromotion => "after promotion",
            Self::AfterAnyRestart => "after any restart",
        }
    }

    /// The one of this name in the catalog.
    pub(crate) fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|policy| policy.name() == name)
    }
}

/// What all managers of a database have agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Agreed {
    pub(crate) policy: TakeoverPolicy,
    /// The longest lease that any of them has had.
    pub(crate) lease: Duration,
    /// The standbys confirm heartbeats.
    pub(crate) quorum: bool,
}

impl Agreed {
    /// What one manager wants. The database has the lease in whole milliseconds, of which it is to be no shorter than it is.
    pub(crate) fn of_manager(policy: TakeoverPolicy, lease: Duration, quorum: bool) -> Self {
        let milliseconds = lease.as_nanos().div_ceil(1_000_000);
        Self { policy, lease: Duration::from_millis(milliseconds.try_into().unwrap_or(u64::MAX)), quorum }
    }
}

/// What is to be done where a manager has its own settings and the database what is agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Agreement {
    Kept,
    /// The manager's settings are stronger, and must be committed before its first term.
    Raise,
    /// The manager's policy is weaker, or it does without the quorum: its terms would begin before those of the others are over.
    TooWeak,
}

pub(crate) fn agree(own: Agreed, known: Option<Agreed>) -> Agreement {
    match known {
        Some(known) if own.policy < known.policy || !own.quorum && known.quorum => Agreement::TooWeak,
        Some(known) if Agreed { lease: known.lease, ..own } == known && own.lease <= known.lease => {
            Agreement::Kept
        }
        _ => Agreement::Raise,
    }
}

/// One run of a server, from its start to its end, as far as it can be told from another. The values are texts, which are compared only.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    /// The number of the database, which another one does not have that was made from its copy or its dump.
    pub(crate) base: String,
    /// When the server was started.
    pub(crate) started: String,
    /// The system identifier and the timeline; `None` where the role may not ask.
    pub(crate) system: Option<String>,
    pub(crate) timeline: Option<String>,
}

/// What the database remembers of the run that was seen last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    /// Drawn anew with each record.
    pub(crate) id: String,
    pub(crate) run: Run,
    /// All terms of before are over.
    pub(crate) over: bool,
}

/// What a session finds that looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The terms of before are over.
    Over,
    /// The grace of this run goes on.
    Pending,
    /// The run is a new one, and is to be recorded; `over` unless it is a takeover that counts.
    Record { over: bool },
}

/// Compares the run of the server with the one that was recorded.
///
/// The timeline rises with a promotion, and the system identifier is another one's; both say nothing of a standby that was started
/// without its signal file, nor of a base backup that was started as a primary. There the record is missing, as after a crash: a crash of
/// one backend, after which the server has the same start time, takes it away too.
pub(crate) fn judge(policy: TakeoverPolicy, now: &Run, record: Option<&Record>) -> Verdict {
    let counts = |by: TakeoverPolicy| Verdict::Record { over: policy < by };
    let Some(Record { run, over, .. }) = record.filter(|record| record.run.base == now.base) else {
        return counts(TakeoverPolicy::AfterPromotion);
    };
    let differs = |then: &Option<String>, now: &Option<String>| matches!((then, now), (Some(then), Some(now)) if then != now);
    let is_other = differs(&run.system, &now.system) || differs(&run.timeline, &now.timeline);
    let is_restarted = run.started != now.started;
    match (is_other, is_restarted, over) {
        (true, ..) => counts(TakeoverPolicy::AfterPromotion),
        // A grace that a clean restart has interrupted.
        (_, true, false) => counts(TakeoverPolicy::AfterPromotion),
        (_, true, true) => counts(TakeoverPolicy::AfterAnyRestart),
        (_, false, false) if policy == TakeoverPolicy::Immediate => Verdict::Record { over: true },
        (_, false, false) => Verdict::Pending,
        // It was recorded where the role could not ask for more.
        (_, false, true) if run.system.is_none() && now.system.is_some() => Verdict::Record { over: true },
        (_, false, true) => Verdict::Over,
    }
}

/// The graces that a manager counts, each on this process's clock from when one of its sessions first saw it.
///
/// Several, since two servers may both say that they are the primary.
#[derive(Debug, Default)]
pub(crate) struct Graces(Vec<Grace>);

#[derive(Debug)]
struct Grace {
    id: String,
    since: Instant,
    lasts: Duration,
    looked_at: Instant,
    is_over: bool,
}

impl Graces {
    /// A session has seen at `now` that this one goes on; `true` for the first one, and where it has become longer: the one that was promoted
    /// may not have known of a lease on which the managers have agreed, as they say when they come.
    ///
    /// A process of this machine first saw it so long ago as `seen` says: so one that does not live for a lease gets locks, too.
    pub(crate) fn goes_on(&mut self, id: &str, lasts: Duration, seen: Duration, now: Instant) -> bool {
        /// More than there can be servers of one manager that are worth counting for.
        const MOST: usize = 8;
        let since = now.checked_sub(seen).unwrap_or(now);
        if let Some(known) = self.0.iter_mut().find(|grace| grace.id == id) {
            known.looked_at = now;
            known.since = known.since.min(since);
            let longest = known.lasts.max(lasts);
            return std::mem::replace(&mut known.lasts, longest) < longest;
        }
        if self.0.len() == MOST {
            self.0.remove(0);
        }
        self.0.push(Grace { id: id.to_owned(), since, lasts, looked_at: now, is_over: false });
        true
    }

    /// It is over, by the database's word; `true` if this was not known, and had been waited for.
    pub(crate) fn ends(&mut self, id: &str) -> bool {
        let grace = self.0.iter_mut().find(|grace| grace.id == id);
        grace.is_some_and(|grace| !std::mem::replace(&mut grace.is_over, true))
    }

    /// What a session is to do at `now` that has found this one. Of many sessions, one looks now and then.
    pub(crate) fn next_step(&mut self, id: &str, now: Instant) -> GraceStep {
        let Some(grace) = self.0.iter_mut().find(|grace| grace.id == id) else { return GraceStep::Look };
        let left = grace.left(now);
        if grace.is_over {
            return GraceStep::Over;
        }
        if left.is_zero() {
            return GraceStep::Mark;
        }
        let look_again = (grace.lasts / 32).clamp(Duration::from_millis(10), Duration::from_millis(500));
        let since = now.saturating_duration_since(grace.looked_at);
        if since >= look_again {
            grace.looked_at = now;
            return GraceStep::Look;
        }
        GraceStep::Wait(GraceLeft { all: left, look_again: left.min(look_again - since) })
    }

    /// How long it lasts in all, if it is counted.
    pub(crate) fn lasts(&self, id: &str) -> Option<Duration> {
        self.0.iter().find(|grace| grace.id == id).map(|grace| grace.lasts)
    }

    /// How long it goes on from `now` on, if it is counted and does.
    pub(crate) fn left(&self, id: &str, now: Instant) -> Option<Duration> {
        let grace = self.0.iter().find(|grace| grace.id == id)?;
        Some(if grace.is_over { Duration::ZERO } else { grace.left(now) })
    }

    /// How long the one that was seen last goes on from `now` on, if it does.
    pub(crate) fn of_newest(&self, now: Instant) -> Option<Duration> {
        // One of a server that was taken over itself meanwhile is never marked as over.
        let newest = self.0.iter().max_by_key(|grace| grace.since).filter(|grace| !grace.is_over)?;
        Some(newest.left(now)).filter(|left| !left.is_zero())
    }
}

/// What a session is to do that has found a takeover grace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum GraceStep {
    /// Ask for its lock: the database has said that the grace is over.
    Over,
    /// Look whether another process has waited it out.
    Look,
    /// Mark it as over: this process has waited it out.
    Mark,
    Wait(GraceLeft),
}

/// How long a takeover grace lasts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct GraceLeft {
    /// At the most.
    pub(crate) all: Duration,
    /// Until it is to be looked at again, since another process may have waited it out.
    pub(crate) look_again: Duration,
}

impl Grace {
    fn left(&self, now: Instant) -> Duration {
        self.lasts.saturating_sub(now.saturating_duration_since(self.since))
    }
}

#[cfg(test)]
mod tests {
    use super::TakeoverPolicy::{AfterAnyRestart, AfterPromotion, Immediate};
    use super::*;

    fn run() -> Run {
        let text = |text: &str| text.to_owned();
        Run { base: text("5"), started: text("100.5"), system: Some(text("7")), timeline: Some(text("1")) }
    }

    fn record(run: Run, over: bool) -> Record {
        Record { id: "a".to_owned(), run, over }
    }

    /// For each policy, whether nobody is granted a lock.
    fn waits(now: &Run, record: Option<&Record>) -> [bool; 3] {
        TakeoverPolicy::ALL.map(|policy| {
            matches!(judge(policy, now, record), Verdict::Pending | Verdict::Record { over: false })
        })
    }

    #[test]
    fn a_missing_record_is_a_takeover_whatever_the_timeline_says() {
        assert_eq!(waits(&run(), None), [false, true, true]);
        let copied = Run { base: "6".to_owned(), ..run() };
        assert_eq!(waits(&copied, Some(&record(run(), true))), [false, true, true]);
    }

    #[test]
    fn a_clean_restart_counts_where_any_restart_does() {
        let now = Run { started: "200.5".to_owned(), ..run() };
        assert_eq!(waits(&now, Some(&record(run(), true))), [false, false, true]);
        assert_eq!(judge(AfterPromotion, &now, Some(&record(run(), true))), Verdict::Record { over: true });
    }

    #[test]
    fn another_timeline_or_system_is_a_takeover() {
        for now in [
            Run { timeline: Some("2".to_owned()), started: "200.5".to_owned(), ..run() },
            Run { system: Some("8".to_owned()), started: "200.5".to_owned(), ..run() },
        ] {
            assert_eq!(waits(&now, Some(&record(run(), true))), [false, true, true], "{now:?}");
            let unknown = Run { system: None, timeline: None, ..now };
            assert_eq!(waits(&unknown, Some(&record(run(), true))), [false, false, true], "{unknown:?}");
        }
    }

    #[test]
    fn a_grace_goes_on_until_it_is_marked_as_over_and_begins_again_after_a_restart() {
        let pending = record(run(), false);
        assert_eq!(judge(AfterPromotion, &run(), Some(&pending)), Verdict::Pending);
        assert_eq!(judge(AfterAnyRestart, &run(), Some(&pending)), Verdict::Pending);
        assert_eq!(judge(Immediate, &run(), Some(&pending)), Verdict::Record { over: true });
        let later = Run { started: "200.5".to_owned(), ..run() };
        assert_eq!(waits(&later, Some(&pending)), [false, true, true]);
        assert_eq!(judge(AfterPromotion, &later, Some(&pending)), Verdict::Record { over: false });
    }

    #[test]
    fn a_run_that_was_recorded_is_no_takeover() {
        for policy in TakeoverPolicy::ALL {
            assert_eq!(judge(policy, &run(), Some(&record(run(), true))), Verdict::Over);
        }
        let less = Run { system: None, timeline: None, ..run() };
        assert_eq!(
            judge(AfterAnyRestart, &run(), Some(&record(less.clone(), true))),
            Verdict::Record { over: true }
        );
        assert_eq!(judge(AfterAnyRestart, &less, Some(&record(run(), true))), Verdict::Over);
    }

    #[test]
    fn the_stronger_policy_and_the_longest_lease_are_agreed_on() {
        let agreed = |policy, lease| Agreed { policy, lease: Duration::from_secs(lease), quorum: false };
        let own = agreed(AfterPromotion, 15);
        let confirmed = Agreed { quorum: true, ..own };
        assert_eq!(agree(own, Some(confirmed)), Agreement::TooWeak);
        assert_eq!(agree(confirmed, Some(confirmed)), Agreement::Kept);
        assert_eq!(agree(confirmed, Some(own)), Agreement::Raise);
        for (known, wanted) in [
            (None, Agreement::Raise),
            (Some(agreed(AfterPromotion, 15)), Agreement::Kept),
            (Some(agreed(AfterPromotion, 60)), Agreement::Kept),
            (Some(agreed(AfterPromotion, 10)), Agreement::Raise),
            (Some(agreed(Immediate, 60)), Agreement::Raise),
            (Some(agreed(AfterAnyRestart, 15)), Agreement::TooWeak),
        ] {
            assert_eq!(agree(own, known), wanted, "{known:?}");
        }
        for policy in TakeoverPolicy::ALL {
            assert_eq!(TakeoverPolicy::named(policy.name()), Some(policy));
        }
    }

    #[test]
    fn a_lease_is_agreed_on_that_is_no_whole_number_of_milliseconds() {
        let own = Agreed::of_manager(AfterPromotion, Duration::from_secs(10) / 3, false);
        assert_eq!(own.lease, Duration::from_millis(3_334));
        let stored = Duration::from_millis(own.lease.as_millis().try_into().unwrap());
        assert_eq!(agree(own, Some(Agreed { lease: stored, ..own })), Agreement::Kept);
        let whole = Agreed::of_manager(AfterPromotion, Duration::from_secs(15), false);
        assert_eq!(whole.lease, Duration::from_secs(15));
    }

    #[test]
    fn a_grace_is_counted_from_the_first_look_at_it() {
        let (mut graces, begin, second) = (Graces::default(), Instant::now(), Duration::from_secs(1));
        let half = second / 2;
        assert_eq!(graces.next_step("a", begin), GraceStep::Look, "nobody counts it");
        assert!(graces.goes_on("a", 16 * second, Duration::ZERO, begin));
        let wait = |all, look_again| GraceStep::Wait(GraceLeft { all, look_again });
        assert_eq!(graces.next_step("a", begin), wait(16 * second, half));
        assert_eq!(graces.next_step("a", begin + half / 2), wait(16 * second - half / 2, half / 2));
        // One session looks, the others wait for what it finds.
        assert_eq!(graces.next_step("a", begin + second), GraceStep::Look);
        assert_eq!(graces.next_step("a", begin + second), wait(15 * second, half));
        assert!(!graces.goes_on("a", 16 * second, Duration::ZERO, begin + 4 * second));
        assert_eq!(graces.next_step("a", begin + 4 * second), wait(12 * second, half));
        assert_eq!(
            graces.next_step("a", begin + 16 * second),
            GraceStep::Mark,
            "only the database says that it is over"
        );
        // A crash in the middle begins it again.
        assert!(graces.goes_on("b", 16 * second, Duration::ZERO, begin + 5 * second));
        assert_eq!(graces.of_newest(begin + 6 * second), Some(15 * second));
        assert_eq!(graces.left("a", begin + 6 * second), Some(10 * second));
        assert_eq!(graces.next_step("b", begin + 20 * second), GraceStep::Look);
        assert!(graces.ends("b") && !graces.ends("b"));
        assert_eq!(graces.next_step("b", begin + 20 * second), GraceStep::Over);
        assert_eq!(graces.of_newest(begin + 6 * second), None);
        assert_eq!(graces.left("b", begin + 6 * second), Some(Duration::ZERO));
        assert!(!graces.ends("unknown") && graces.left("unknown", begin).is_none());
    }

    #[test]
    fn a_manager_keeps_few_graces() {
        let (mut graces, now) = (Graces::default(), Instant::now());
        for number in 0..100 {
            assert!(graces.goes_on(&number.to_string(), Duration::ZERO, Duration::ZERO, now));
        }
        assert_eq!(graces.next_step("99", now), GraceStep::Mark);
        assert_eq!(graces.next_step("0", now), GraceStep::Look);
    }

    #[test]
    fn what_a_process_of_this_machine_has_seen_before_counts() {
        let (mut graces, now, second) = (Graces::default(), Instant::now(), Duration::from_secs(1));
        assert!(graces.goes_on("a", 4 * second, second, now));
        assert_eq!(graces.of_newest(now), Some(3 * second));
        assert!(!graces.goes_on("a", 4 * second, 4 * second, now));
        assert_eq!(graces.next_step("a", now), GraceStep::Mark);
        assert_eq!(graces.lasts("a"), Some(4 * second), "the longest lease is what it was");
        // One that became known later is new.
        assert!(graces.goes_on("a", 9 * second, second, now));
        assert!(!graces.goes_on("a", 4 * second, second, now));
        assert_eq!(graces.lasts("a"), Some(9 * second));
    }
}
