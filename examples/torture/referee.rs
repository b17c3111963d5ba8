//! Judges by what the workers report, what was done to them, and what the server shows.

use std::collections::BTreeMap;
use std::time::Duration;

use postgres::Client;

use crate::crew::WORKERS;
use crate::fault::{Fault, Hit, Kind};
use crate::report::{Holder, Id, KEYS, LOCKS, Moment, Report, Usage, What};
use crate::stalls::Stall;

/// How long a holder may go on believing, *after* an operator has ended its session (alone or by a shutdown of the
/// server) or after it was thawed.
///
/// The server frees the locks of a session that it is told to end in that moment, and the next in line may run before
/// the former holder has read of its loss: they are two processes. And a thawed process runs for a moment before it
/// has looked at a clock. On an idle machine both are a matter of a few milliseconds, and 30 on a busy one; the rest
/// is for two slow cores and twenty threads. In all other cases (killed workers, frozen servers, cancelled queries,
/// nothing at all) nothing is tolerated.
const NEWS: Duration = Duration::from_millis(250);

/// What a call may take beyond its documented bound, on two slow cores.
const SLACK: Duration = Duration::from_millis(1000);

/// How many violations are told in full.
const TOLD: usize = 20;

#[derive(Debug)]
enum How {
    Released,
    Lost,
    /// Its process was killed. What counts as the end is the last that it did in this term.
    Killed,
}

#[derive(Debug)]
struct Term {
    worker: usize,
    holder: Holder,
    begun: Moment,
    /// The last time that something was done in it.
    seen: Moment,
    end: Option<(Moment, How)>,
}

/// What the server said: between these times this token was held.
struct Sample {
    key: usize,
    token: i64,
    shared: bool,
    worker: Option<usize>,
    from: Moment,
    to: Moment,
}

#[derive(Default)]
struct Units {
    /// Commits that were begun.
    begun: i64,
    /// Commits that the server has confirmed.
    confirmed: i64,
}

#[derive(Default)]
pub(crate) struct Referee {
    /// By key; in the order of the tokens.
    terms: [BTreeMap<Id, Term>; KEYS.len()],
    units: [Units; KEYS.len()],
    faults: Vec<Fault>,
    stalls: Vec<Stall>,
    samples: Vec<Sample>,
    /// How often the server showed one more holder beside another one.
    shown_together: usize,
    /// Key, token, and when the last unit of that was written, by the server.
    written: Vec<(usize, i64, Moment)>,
    /// Calls that took longer than they may; perhaps since the worker was frozen.
    late: Vec<(usize, Moment, String, Duration, Duration)>,
    before: [Option<Usage>; WORKERS],
    after: [Option<Usage>; WORKERS],
    losses: BTreeMap<String, usize>,
    missed: BTreeMap<String, usize>,
    failures: BTreeMap<String, usize>,
    /// Units of readers.
    reads: usize,
    refused: usize,
    /// The same, of readers after their terms.
    refused_late: usize,
    failed: usize,
    /// Leaders' closures that worked on after the loss that they were told of.
    ignored: usize,
    /// What leaders have told.
    events: BTreeMap<String, usize>,
    violations: Vec<String>,
}

/// A term that one worker believed in when another one had a later term already.
#[derive(Default)]
struct Overlaps {
    explained: usize,
    unexplained: usize,
    longest: Duration,
    /// How long after the news of its end was to be had a term ended at the latest.
    latest: Duration,
}

/// Readers' terms at one time.
#[derive(Default)]
struct Together {
    /// Those that began when a reader of another process had the key.
    terms: usize,
    /// How many had one key at once.
    most: usize,
}

impl Referee {
    pub(crate) fn violation(&mut self, text: impl Into<String>) {
        self.violations.push(text.into());
    }

    pub(crate) fn acquisitions(&self) -> usize {
        self.terms.iter().map(BTreeMap::len).sum()
    }

    pub(crate) fn lost(&self) -> usize {
        self.losses.values().sum()
    }

    pub(crate) fn faults(&self) -> usize {
        self.faults.len()
    }

    pub(crate) fn count(&self, kind: Kind) -> usize {
        self.faults.iter().filter(|fault| fault.kind == kind).count()
    }

    pub(crate) fn is_clean(&self) -> bool {
        self.violations.is_empty()
    }

    /// The keys of which no writer's term has begun since then, or no reader's; and the permits of which no term has.
    pub(crate) fn idle_since(&self, then: Moment) -> Vec<&'static str> {
        let begun = |terms: &BTreeMap<Id, Term>, reads| {
            terms.values().rev().take(200).any(|term| term.holder.is_reader() == reads && term.begun > then)
        };
        let idle = |(key, terms): &(usize, &BTreeMap<_, _>)| {
            !begun(terms, false) || *key < LOCKS && !begun(terms, true)
        };
        self.terms.iter().enumerate().filter(idle).map(|(key, _)| KEYS[key]).collect()
    }

    /// Takes in a fault. It may go on: see [`fault_mut`](Self::fault_mut).
    pub(crate) fn inflict(&mut self, fault: Fault) -> usize {
        self.faults.push(fault);
        self.faults.len() - 1
    }

    pub(crate) fn fault_mut(&mut self, index: usize) -> &mut Fault {
        &mut self.faults[index]
    }

    /// The server has shown that the term was held at some time in between.
    pub(crate) fn sample(
        &mut self,
        holder: &str,
        token: i64,
        shared: bool,
        name: &str,
        from: Moment,
        to: Moment,
    ) {
        let Some(key) = KEYS.iter().position(|key| *key == holder) else {
            return self.violation(format!("the server shows a lock {holder:?} of nobody"));
        };
        // The same look.
        if let Some(other) = self.samples.last().filter(|other| (other.key, other.from) == (key, from)) {
            self.shown_together += 1;
            if !(shared && other.shared) {
                self.violation(format!(
                    "the server shows a writer of {holder} beside another holder at {}",
                    micros(from)
                ));
            }
        }
        let place = name.strip_prefix("torture-").and_then(|rest| rest.split(' ').next());
        let worker = place.and_then(|place| place.parse().ok());
        self.samples.push(Sample { key, token, shared, worker, from, to });
    }

    /// Takes in what a worker reports.
    pub(crate) fn hear(&mut self, worker: usize, report: Report) {
        let at = report.at;
        match report.what {
            What::Before(usage) => self.before[worker] = Some(usage),
            What::After(usage) => self.after[worker] = Some(usage),
            What::Begun { key, id, holder } => {
                let mut others = self.terms[key].range(Id::with(id.token)).map(|(_, other)| other.holder);
                // Only readers may have one token.
                if let Some(other) = others.find(|other| !(holder.is_reader() && other.is_reader())) {
                    self.violation(format!(
                        "{}: token {} was given out twice, to a {} and to a {} of worker {worker}",
                        KEYS[key],
                        id.token,
                        other.name(),
                        holder.name()
                    ));
                }
                self.terms[key].insert(id, Term { worker, holder, begun: at, seen: at, end: None });
            }
            What::Commits { key, id } => {
                let Some(term) = self.terms[key].get_mut(&id) else { return };
                let reads = term.holder.is_reader();
                // A reader's unit after its term is judged by when it was written.
                if reads && term.end.is_some() {
                    return;
                }
                term.seen = at;
                self.units[key].begun += i64::from(!reads);
                if term.end.is_some() {
                    self.violation(format!(
                        "{}: worker {worker} works in term {}, which it had told the end of, and the fence lets it",
                        KEYS[key], id.token
                    ));
                }
            }
            What::Committed { key } => self.units[key].confirmed += 1,
            What::Read { .. } => self.reads += 1,
            What::Refused { .. } => self.refused += 1,
            What::RefusedLate { .. } => self.refused_late += 1,
            What::Failed { .. } => self.failed += 1,
            What::Released { key, id } => self.end(worker, key, id, at, How::Released),
            What::Lost { key, id, reason } => {
                if reason.is_none() {
                    self.violation(format!(
                        "{}: worker {worker} lost term {} and was not told",
                        KEYS[key], id.token
                    ));
                }
                *self.losses.entry(reason.unwrap_or_else(|| "silent".to_owned())).or_default() += 1;
                self.end(worker, key, id, at, How::Lost);
            }
            What::Ignores { key, id, shown } => {
                self.ignored += 1;
                if !shown {
                    self.violation(format!(
                        "{}: worker {worker} works on after the loss of term {}, and its leader's status does not show it",
                        KEYS[key], id.token
                    ));
                }
            }
            What::Heard { event } => *self.events.entry(event).or_default() += 1,
            What::Missed { error } => *self.missed.entry(error).or_default() += 1,
            What::Returned { call, outcome, took, limit } => {
                if took > limit + SLACK {
                    self.late.push((worker, at, call.clone(), took, limit));
                }
                if outcome != "ok" && matches!(&*call, "release" | "stop") {
                    *self.failures.entry(format!("{call} {outcome}")).or_default() += 1;
                }
            }
        }
    }

    fn end(&mut self, worker: usize, key: usize, id: Id, at: Moment, how: How) {
        match self.terms[key].get_mut(&id) {
            Some(term) if term.worker == worker && term.end.is_none() => term.end = Some((at, how)),
            _ => self.violation(format!(
                "{}: worker {worker} ends term {}, which it does not have",
                KEYS[key], id.token
            )),
        }
    }

    /// A worker was killed, and all that it said has been heard.
    pub(crate) fn killed(&mut self, worker: usize) {
        for term in self.terms.iter_mut().flat_map(BTreeMap::values_mut) {
            if term.worker == worker && term.end.is_none() {
                term.end = Some((term.seen, How::Killed));
            }
        }
    }

    /// What is on the tables. The server runs, and no worker does.
    pub(crate) fn inspect(&mut self, client: &mut Client) -> Result<(), postgres::Error> {
        for (key, name) in KEYS.iter().enumerate() {
            let row = client.query_one(
                "SELECT (SELECT value FROM torture_counter WHERE key = $1), count(*) FILTER (WHERE NOT reads),
                        count(*) FILTER (WHERE token < newest), count(*) FILTER (WHERE value <> place)
                 FROM (SELECT token, value, reads, max(token) OVER (ORDER BY seq) AS newest,
                              count(*) FILTER (WHERE NOT reads) OVER (ORDER BY seq) AS place
                       FROM torture_log WHERE key = $1) AS work",
                &[name],
            )?;
            let [counter, rows, backwards, misplaced] = [0, 1, 2, 3].map(|column| row.get::<_, i64>(column));
            if backwards > 0 {
                self.violation(format!("{name}: {backwards} units were done after a later term had worked"));
            }
            if counter != rows || misplaced > 0 {
                self.violation(format!("{name}: the counter says {counter}, the log has {rows} rows, {misplaced} of them out of place: two worked at once"));
            }
            let Units { begun, confirmed } = self.units[key];
            if !(confirmed..=begun).contains(&counter) {
                self.violation(format!(
                    "{name}: {counter} units counted, {confirmed} confirmed, {begun} begun"
                ));
            }
            let last = "SELECT token, (extract(epoch FROM max(at)) * 1000000)::int8 FROM torture_log WHERE key = $1 GROUP BY token";
            for row in client.query(last, &[name])? {
                let at = Moment::from_micros(row.get::<_, i64>(1).unsigned_abs());
                self.written.push((key, row.get(0), at));
            }
        }
        Ok(())
    }

    /// Takes in when the machine held up whoever would run.
    pub(crate) fn machine_stood_still(&mut self, stalls: Vec<Stall>) {
        self.stalls = stalls;
    }

    /// When a holder must have heard of what befell it: soon after, or soon after it was thawed or the machine went on.
    fn must_know(&self, worker: usize, from: Moment, to: Moment) -> Moment {
        let mut by = to + NEWS;
        loop {
            let deaf = self.faults.iter().filter(|fault| match fault.kind {
                Kind::FreezeWorker => fault.hit == Hit::Worker(worker),
                // A session that it was told to end before may end only now.
                Kind::FreezeServer => true,
                _ => false,
            });
            let later = deaf
                .map(|fault| (fault.from, fault.to))
                .chain(self.stalls.iter().map(|stall| (stall.from, stall.to)))
                .filter(|(since, until)| *since <= by && from <= *until)
                .map(|(_, until)| until.saturating_add(NEWS))
                .max();
            match later {
                Some(later) if later > by => by = later,
                _ => return by,
            }
        }
    }

    /// Whether a holder may have believed until `end` although another one had begun: how long after the news was to
    /// be had.
    fn explanation(&self, worker: usize, begun: Moment, end: Moment) -> Option<Duration> {
        let suspects = self
            .faults
            .iter()
            .filter(|fault| fault.kind.deposes() && fault.hit.includes(worker) && fault.from <= begun);
        let late = suspects.filter_map(|fault| {
            let by = self.must_know(worker, fault.from, fault.to);
            (end <= by).then(|| end.saturating_sub(by.saturating_sub(NEWS)))
        });
        late.min()
    }

    /// Compares the terms of each key, and those with what the server has shown.
    fn overlaps(&mut self) -> Overlaps {
        let mut overlaps = Overlaps::default();
        let mut violations = Vec::new();
        for (key, name) in KEYS.iter().enumerate() {
            let terms: Vec<_> = self.terms[key]
                .iter()
                .filter_map(|(id, term)| Some((id.token, term, term.end.as_ref()?.0)))
                .collect();
            // From each term on, the one that was first to begin.
            let mut first: Option<(i64, &Term)> = None;
            let mut firsts: Vec<_> = terms
                .iter()
                .rev()
                .filter_map(|(token, term, _)| {
                    if first.is_none_or(|(_, other)| term.begun < other.begun) {
                        first = Some((*token, term));
                    }
                    first
                })
                .collect();
            firsts.reverse();
            // Terms with one token are readers', which may overlap.
            let first_after =
                |token| firsts.get(terms.partition_point(|(other, _, _)| *other <= token)).copied();
            for (token, term, end) in &terms {
                if let Some((later, other)) = first_after(*token)
                    && other.begun < *end
                {
                    overlaps.longest = overlaps.longest.max(*end - other.begun.max(term.begun).min(*end));
                    if let Some(late) = self.explanation(term.worker, other.begun, *end) {
                        overlaps.explained += 1;
                        overlaps.latest = overlaps.latest.max(late);
                    } else {
                        overlaps.unexplained += 1;
                        violations.push(format!(
                            "{name}: worker {} held term {token} ({}) from {} to {} ({:?}), and worker {} had begun term {later} ({}) at {}\n{}",
                            term.worker,
                            term.holder.name(),
                            micros(term.begun),
                            micros(*end),
                            term.end.as_ref().map(|(_, how)| how),
                            other.worker,
                            other.holder.name(),
                            micros(other.begun),
                            self.history(term.worker, other.begun, *end)
                        ));
                    }
                }
            }
            for (_, token, at) in self.written.iter().filter(|(of, ..)| *of == key) {
                if let Some((later, other)) = first_after(*token).filter(|(_, other)| other.begun < *at) {
                    violations.push(format!(
                        "{name}: a unit of term {token} was written at {}, and worker {} had begun term {later} ({}) at {}",
                        micros(*at),
                        other.worker,
                        other.holder.name(),
                        micros(other.begun)
                    ));
                }
            }
            // The latest end up to each term, to stop looking back at.
            let mut latest = Moment::ZERO;
            let ends: Vec<Moment> = terms
                .iter()
                .map(|(_, _, end)| {
                    latest = latest.max(*end);
                    latest
                })
                .collect();
            for sample in self.samples.iter().filter(|sample| sample.key == key) {
                let Sample { token, from, to, .. } = *sample;
                // A reader that the server shows need not be one that has told yet that it has begun.
                if let (Some((_, term)), Some(worker)) =
                    (self.terms[key].range(Id::with(token)).next(), sample.worker)
                    && !term.holder.is_reader()
                    && term.worker != worker
                {
                    violations.push(format!("{name}: the server shows worker {worker} as the holder in term {token}, which worker {} claims", term.worker));
                }
                let place = terms.partition_point(|(other, _, _)| *other < token);
                for index in (0..place).rev().take_while(|index| ends[*index] > to) {
                    let (earlier, term, end) = &terms[index];
                    if *end > to && self.explanation(term.worker, to, *end).is_none() {
                        violations.push(format!("{name}: the server showed term {token} at {}, and worker {} held term {earlier} until {}\n{}", micros(to), term.worker, micros(*end), self.history(term.worker, to, *end)));
                    }
                }
                if first_after(token).is_some_and(|(_, other)| other.begun < from) {
                    violations.push(format!(
                        "{name}: the server showed term {token} at {}, when a later one had begun",
                        micros(from)
                    ));
                }
            }
        }
        self.violations.extend(violations);
        overlaps
    }

    /// How readers shared.
    fn together(&self) -> Together {
        let mut together = Together::default();
        for terms in &self.terms {
            let terms: Vec<_> = terms.iter().filter(|(_, term)| term.holder.is_reader()).collect();
            for group in terms.chunk_by(|(one, _), (other, _)| one.token == other.token) {
                let mut group: Vec<_> = group.iter().map(|(_, term)| term).collect();
                group.sort_by_key(|term| term.begun);
                let mut at_once: Vec<&Term> = Vec::new();
                for term in group {
                    let goes_on = |other: &&Term| other.end.as_ref().is_none_or(|(end, _)| *end > term.begun);
                    at_once.retain(goes_on);
                    together.terms += usize::from(at_once.iter().any(|other| other.worker != term.worker));
                    at_once.push(term);
                    together.most = together.most.max(at_once.len());
                }
            }
        }
        together
    }

    /// The faults of that time that concern a worker.
    fn history(&self, worker: usize, from: Moment, to: Moment) -> String {
        let around = Duration::from_secs(3);
        let near = |fault: &&Fault| {
            fault.hit.includes(worker) && fault.from < to + around && from < fault.to.saturating_add(around)
        };
        let lines = self.faults.iter().filter(near).map(|fault| {
            format!(
                "      {:?} {:?} from {} to {}",
                fault.kind,
                fault.hit,
                micros(fault.from),
                micros(fault.to)
            )
        });
        lines.collect::<Vec<_>>().join("\n")
    }

    /// No loss went unheard: of a session that was ended, and of all that a shutdown ended.
    fn unheard(&mut self) {
        let mut violations = Vec::new();
        for fault in &self.faults {
            let terms: Vec<(usize, i64, &Term)> = match (fault.kind, fault.term) {
                (Kind::TerminateHolder, Some((key, token))) => {
                    let all = self.terms[key].range(Id::with(token)).map(|(_, term)| (key, token, term));
                    all.filter(|(_, _, term)| !term.holder.is_reader()).collect()
                }
                (Kind::RestartFast | Kind::RestartImmediate, _) => {
                    let all = self.terms.iter().enumerate();
                    all.flat_map(|(key, terms)| terms.iter().map(move |(id, term)| (key, id.token, term)))
                        .collect()
                }
                _ => continue,
            };
            for (key, token, term) in terms.into_iter().filter(|(_, _, term)| term.begun < fault.from) {
                let Some((end, How::Released | How::Lost)) = term.end else { continue };
                if end > fault.to && end > self.must_know(term.worker, fault.from, fault.to) {
                    violations.push(format!(
                        "{}: worker {} believed in term {token} until {}, and {:?} had ended it at {}\n{}",
                        KEYS[key],
                        term.worker,
                        micros(end),
                        fault.kind,
                        micros(fault.to),
                        self.history(term.worker, fault.from, end)
                    ));
                }
            }
        }
        self.violations.extend(violations);
    }

    /// Nothing hung, but for the time in which it was frozen.
    fn bounds(&mut self) {
        for (worker, at, call, took, limit) in std::mem::take(&mut self.late) {
            let from = at.saturating_sub(took);
            let frozen: Duration = self
                .faults
                .iter()
                .filter(|fault| fault.kind == Kind::FreezeWorker && fault.hit == Hit::Worker(worker))
                .map(|fault| fault.to.min(at).saturating_sub(fault.from.max(from)))
                .sum();
            if took > limit + SLACK + frozen {
                self.violation(format!(
                    "worker {worker}: {call} took {took:.1?} and not {limit:?} until {}; frozen for {frozen:.1?}", micros(at)
                ));
            }
        }
    }

    /// Shows the figures; says whether all is well.
    pub(crate) fn judge(mut self, seed: u64, length: Duration) -> bool {
        let (overlaps, together) = (self.overlaps(), self.together());
        self.unheard();
        self.bounds();
        for (key, terms) in KEYS.iter().zip(&self.terms) {
            let open = terms.values().filter(|term| term.end.is_none()).count();
            if open > 0 {
                self.violations.push(format!("{key}: {open} terms ended without a word"));
            }
        }
        for (worker, (before, after)) in self.before.into_iter().zip(self.after).enumerate() {
            if before.is_none() || before != after {
                self.violation(format!("worker {worker} had {before:?} at first and {after:?} at last"));
            }
        }
        if self.acquisitions() == 0 || self.units.iter().any(|units| units.confirmed == 0) {
            self.violation("no work was done on some key, so nothing is proven");
        }
        if (self.faults.len() as u64) < length.as_secs() / 2 {
            self.violation("there was less than one fault in two seconds, so little is proven");
        }
        let holders = Holder::ALL.map(|holder| {
            let all = self.terms.iter().flat_map(BTreeMap::values);
            (holder.name().to_owned(), all.filter(|term| term.holder == holder).count())
        });
        if holders.iter().any(|(_, count)| *count == 0) {
            self.violation("no claim, guard or leader, or no reader or permit by claim or guard, was ever had, so nothing is proven of it");
        }
        if together.terms == 0 {
            self.violation("no two readers ever had a key together, so nothing is proven of them");
        }
        let units: i64 = self.units.iter().map(|units| units.confirmed).sum();
        let doubtful: i64 = self.units.iter().map(|units| units.begun - units.confirmed).sum();
        println!("seed {seed}, {:.0} s", length.as_secs_f64());
        println!(
            "acquisitions         {}: {}; and {} attempts that got nothing: {}",
            self.acquisitions(),
            list(&holders.into()),
            self.missed.values().sum::<usize>(),
            list(&self.missed)
        );
        let kinds = Kind::ALL.map(|kind| format!("{} {}", kind.title(), self.count(kind)));
        println!("faults               {}: {}", self.faults.len(), kinds.join(", "));
        println!("losses signalled     {}: {}", self.lost(), list(&self.losses));
        println!("told by leaders      {}; {} worked on after a loss", list(&self.events), self.ignored);
        println!("unconfirmed releases {}: {}", self.failures.values().sum::<usize>(), list(&self.failures));
        println!(
            "units of work        {units}, {doubtful} in doubt, {} of readers, {} failed, {} refused by the fence, {} of readers after their terms",
            self.reads, self.failed, self.refused, self.refused_late
        );
        println!(
            "readers together     {} terms began beside one of another process, {} at once at the most",
            together.terms, together.most
        );
        println!(
            "holders sampled      {}, {} of them beside another one",
            self.samples.len(),
            self.shown_together
        );
        println!(
            "overlaps             {} explained (longest {:.1} ms, up to {:.1} ms after the news was to be had), {} unexplained",
            overlaps.explained,
            overlaps.longest.as_secs_f64() * 1e3,
            overlaps.latest.as_secs_f64() * 1e3,
            overlaps.unexplained
        );
        let stood_still = self.stalls.iter().map(|stall| stall.to.saturating_sub(stall.from)).max();
        println!(
            "machine stood still  {} times, {:.0} ms at the longest",
            self.stalls.len(),
            stood_still.unwrap_or_default().as_secs_f64() * 1e3
        );
        for violation in self.violations.iter().take(TOLD) {
            println!("VIOLATION: {violation}");
        }
        println!("violations           {}", self.violations.len());
        self.violations.is_empty()
    }
}

fn list(counts: &BTreeMap<String, usize>) -> String {
    let parts: Vec<_> = counts.iter().map(|(name, count)| format!("{name} {count}")).collect();
    if parts.is_empty() { "none".to_owned() } else { parts.join(", ") }
}

fn micros(moment: Moment) -> String {
    format!("{:.6}", moment.as_secs_f64() % 10_000.0)
}
