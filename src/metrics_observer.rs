//! An observer that feeds the facade `metrics`.

use std::fmt;
use std::time::Duration;

use metrics::{
    Counter, Gauge, Histogram, SharedString, Unit, counter, describe_counter, describe_gauge,
    describe_histogram, gauge, histogram,
};

use crate::error::ErrorKind;
use crate::loss::LossReason;
use crate::observer::{
    Acquired, Attempt, AttemptFailed, Heartbeat, Observer, Released, Sessions, TermLost, ThreadWaited,
    ThreadWaits, Trouble,
};

/// An array of all variants of an enum, in their order. Does not compile where one is missing.
macro_rules! all_variants {
    ($type:ident: $($variant:ident),* $(,)?) => {{
        const _: fn($type) = |it| match it { $($type::$variant)|* => () };
        [$($type::$variant),*]
    }};
}

const KINDS: [ErrorKind; 15] = all_variants! { ErrorKind:
    LockUnavailable,
    TimedOut,
    Cancelled,
    Released,
    SyncManagerStopped,
    FailedInitialization,
    SessionUnavailable,
    SessionRefused,
    PoolExhausted,
    Lost,
    UnlockFailed,
    InvalidKey,
    InvalidConfig,
    WouldDeadlock,
    OtherProcess,
};

const REASONS: [LossReason; 14] = all_variants! { LossReason:
    Terminated,
    ServerCrashed,
    DatabaseDropped,
    LeaseExpired,
    LeaseNotRenewed,
    HeartbeatTimedOut,
    NotConfirmed,
    ConnectionClosed,
    SessionChanged,
    Unlocked,
    ServerIsStandby,
    ServerError,
    Revoked,
    SupervisorFailed,
};

/// Counts and times what happens to the locks of a manager, by the facade [`metrics`](https://docs.rs/metrics): for Prometheus,
/// StatsD and whatever else has an exporter. Comes with the feature `metrics`.
///
/// | name | kind | unit | meaning |
/// |---|---|---|---|
/// | `dsync_attempts_total` | counter | calls | calls of `acquire`, `try_acquire`, `with_lock`, `lock`, `try_lock` that wanted a lock |
/// | `dsync_attempts_failed_total` | counter | calls | those that ended without it; `kind` says why: `lock_unavailable`, `timed_out`, … |
/// | `dsync_terms_total` | counter | terms | terms that have begun |
/// | `dsync_terms_lost_total` | counter | terms | terms that were lost; `reason` says why: `terminated`, `connection_closed`, … |
/// | `dsync_terms_held` | gauge | terms | locks that are held now |
/// | `dsync_wait_seconds` | histogram | seconds | how long a lock was wanted before a term began |
/// | `dsync_hold_seconds` | histogram | seconds | how long a term lasted, whether it was released or lost |
/// | `dsync_troubles_total` | counter | errors | the server could not be asked, or refused, or did not confirm a release; `kind` says which |
/// | `dsync_heartbeat_seconds` | histogram | seconds | round trips of heartbeats |
/// | `dsync_sessions_in_use` | gauge | sessions | sessions that claims have |
/// | `dsync_sessions_limit` | gauge | sessions | how many there may be |
/// | `dsync_threads_waiting` | gauge | threads | threads that wait for a guard of another thread of this process |
/// | `dsync_thread_wait_seconds` | histogram | seconds | how long such a wait was |
///
/// Each has the label `manager`, if the manager was given a [name](Self::named). No label has a key: applications make keys of
/// users and orders, and each would be a series of its own. All series of a counter are there from the beginning, so that the first
/// loss is an increase.
///
/// Install the recorder first: what an observer feeds is what was installed when it was made.
///
/// ```no_run
/// use dsync::{Config, MetricsObserver, PostgresManager};
///
/// # fn example() -> dsync::Result<()> {
/// let config = Config::from_env()?.observer(MetricsObserver::named("billing"));
/// let manager = PostgresManager::connect(config)?;
/// # Ok(())
/// # }
/// ```
pub struct MetricsObserver {
    attempts: Counter,
    attempts_failed: Vec<(ErrorKind, Counter)>,
    terms: Counter,
    terms_lost: Vec<(LossReason, Counter)>,
    terms_held: Gauge,
    wait: Histogram,
    hold: Histogram,
    troubles: Vec<(ErrorKind, Counter)>,
    heartbeat: Histogram,
    sessions_in_use: Gauge,
    sessions_limit: Gauge,
    threads_waiting: Gauge,
    thread_wait: Histogram,
}

/// The labels of a series.
type Labels = Vec<(&'static str, SharedString)>;

impl MetricsObserver {
    /// Feeds the recorder that is installed now, without a label for the manager.
    #[must_use]
    pub fn new() -> Self {
        Self::with(&Labels::new())
    }

    /// As `new`, with the label `manager`: for an application with several managers. Take a name of which there are few.
    #[must_use]
    pub fn named(manager: impl Into<String>) -> Self {
        Self::with(&vec![("manager", SharedString::from(manager.into()))])
    }

    fn with(labels: &Labels) -> Self {
        let one = |name| counter!(name, labels);
        let by_kind = |name: &'static str| {
            let with = |kind: ErrorKind| counter!(name, &and(labels, "kind", kind.label()));
            KINDS.map(|kind| (kind, with(kind))).to_vec()
        };
        let by_reason = |name: &'static str| {
            let with = |reason: LossReason| counter!(name, &and(labels, "reason", reason.label()));
            REASONS.map(|reason| (reason, with(reason))).to_vec()
        };
        let observer = Self {
            attempts: one("dsync_attempts_total"),
            attempts_failed: by_kind("dsync_attempts_failed_total"),
            terms: one("dsync_terms_total"),
            terms_lost: by_reason("dsync_terms_lost_total"),
            terms_held: gauge!("dsync_terms_held", labels),
            wait: histogram!("dsync_wait_seconds", labels),
            hold: histogram!("dsync_hold_seconds", labels),
            troubles: by_kind("dsync_troubles_total"),
            heartbeat: histogram!("dsync_heartbeat_seconds", labels),
            sessions_in_use: gauge!("dsync_sessions_in_use", labels),
            sessions_limit: gauge!("dsync_sessions_limit", labels),
            threads_waiting: gauge!("dsync_threads_waiting", labels),
            thread_wait: histogram!("dsync_thread_wait_seconds", labels),
        };
        describe();
        // A gauge that nobody has set is not shown.
        observer.terms_held.increment(0.0);
        observer.sessions_in_use.increment(0.0);
        observer.threads_waiting.increment(0.0);
        observer
    }

    fn ended(&self, held: Duration) {
        self.terms_held.decrement(1.0);
        self.hold.record(held);
    }
}

impl Default for MetricsObserver {
    fn default() -> Self {
        Self::new()
    }
}

/// What the exporter says of each.
fn describe() {
    describe_counter!("dsync_attempts_total", Unit::Count, "Calls that wanted a lock.");
    describe_counter!("dsync_attempts_failed_total", Unit::Count, "Calls that ended without the lock.");
    describe_counter!("dsync_terms_total", Unit::Count, "Terms of holding a lock that have begun.");
    describe_counter!("dsync_terms_lost_total", Unit::Count, "Terms that were lost.");
    describe_gauge!("dsync_terms_held", Unit::Count, "Locks that are held.");
    describe_histogram!("dsync_wait_seconds", Unit::Seconds, "How long a lock was wanted before it was had.");
    describe_histogram!("dsync_hold_seconds", Unit::Seconds, "How long a lock was held.");
    describe_counter!(
        "dsync_troubles_total",
        Unit::Count,
        "Times that the server could not be asked, refused, or did not confirm a release."
    );
    describe_histogram!("dsync_heartbeat_seconds", Unit::Seconds, "Round trips of heartbeats.");
    describe_gauge!("dsync_sessions_in_use", Unit::Count, "Sessions that claims have.");
    describe_gauge!("dsync_sessions_limit", Unit::Count, "How many sessions there may be.");
    describe_gauge!("dsync_threads_waiting", Unit::Count, "Threads that wait for another thread's guard.");
    describe_histogram!(
        "dsync_thread_wait_seconds",
        Unit::Seconds,
        "How long a thread waited for another thread's guard."
    );
}

/// `labels`, and one more.
fn and(labels: &Labels, name: &'static str, value: &'static str) -> Labels {
    let one_more = (name, SharedString::const_str(value));
    labels.iter().cloned().chain([one_more]).collect()
}

/// Adds one to the counter of `label`.
fn count<L: PartialEq>(counters: &[(L, Counter)], label: &L) {
    if let Some((_, counter)) = counters.iter().find(|(known, _)| known == label) {
        counter.increment(1);
    }
}

impl Observer for MetricsObserver {
    fn attempt(&self, _: &Attempt<'_>) {
        self.attempts.increment(1);
    }

    fn failed(&self, event: &AttemptFailed<'_>) {
        count(&self.attempts_failed, &event.error.kind());
    }

    fn acquired(&self, event: &Acquired<'_>) {
        self.terms.increment(1);
        self.terms_held.increment(1.0);
        self.wait.record(event.waited);
    }

    fn released(&self, event: &Released<'_>) {
        self.ended(event.held);
    }

    fn lost(&self, event: &TermLost<'_>) {
        self.ended(event.held);
        count(&self.terms_lost, &event.reason);
    }

    fn trouble(&self, event: &Trouble<'_>) {
        count(&self.troubles, &event.error.kind());
    }

    fn heartbeat(&self, event: &Heartbeat<'_>) {
        self.heartbeat.record(event.round_trip);
    }

    fn sessions(&self, event: &Sessions) {
        self.sessions_in_use.set(event.in_use);
        self.sessions_limit.set(event.limit);
    }

    fn thread_waits(&self, _: &ThreadWaits<'_>) {
        self.threads_waiting.increment(1.0);
    }

    fn thread_waited(&self, event: &ThreadWaited<'_>) {
        self.threads_waiting.decrement(1.0);
        self.thread_wait.record(event.waited);
    }
}

impl fmt::Debug for MetricsObserver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MetricsObserver").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_kind_and_reason_has_a_counter_and_a_label_of_its_own() {
        for (index, kind) in KINDS.iter().enumerate() {
            assert_eq!(*kind as usize, index);
        }
        for (index, reason) in REASONS.iter().enumerate() {
            assert_eq!(*reason as usize, index);
        }
        let labels: [BTreeSet<_>; 2] =
            [KINDS.map(ErrorKind::label).into(), REASONS.map(LossReason::label).into()];
        assert_eq!(labels.map(|labels| labels.len()), [KINDS.len(), REASONS.len()]);
    }
}
