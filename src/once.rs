//! Work that is done once a period, by whichever process comes first.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use postgres::Transaction;

use crate::context::Context;
use crate::error::{Error, ErrorKind, Result, chain};
use crate::guard::LockGuard;
use crate::lock::Lock;
use crate::loss::Lost;
use crate::term::Term;

/// How often work is to be done: what `once` of a [manager](crate::SyncManager) or of a [lock](crate::Lock) is told.
///
/// A `Duration` is one: of a day, the work is due again 21.6 hours after it began the last time that it succeeded. It is less than
/// the period, so that a job that is started each night, now a little sooner and now a little later, is not left out in any.
///
/// ```
/// use std::time::Duration;
/// use dsync::Period;
///
/// const HOUR: Duration = Duration::from_secs(60 * 60);
/// let nightly: Period = (24 * HOUR).into();
/// // It starts at 03:00. If that failed, and somebody starts it at noon, it is due again at 03:00, 15 hours later.
/// let nightly = Period::every(24 * HOUR).due_after(12 * HOUR);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct Period {
    every: Duration,
    due_after: Duration,
}

impl Period {
    /// For work that is started about once in each `period`, by cron say. It is due again nine tenths of `period` after the last success
    /// began. A caller that asks more often gives [`due_after(period)`](Self::due_after); else the work is done each nine tenths of `period`.
    pub fn every(period: Duration) -> Self {
        Self { every: period, due_after: period - period / 10 }
    }

    /// How long after the beginning of the last success the work is due again. Defaults to nine tenths of the period. `once` refuses
    /// a time that is longer than the period.
    pub fn due_after(self, time: Duration) -> Self {
        Self { due_after: time, ..self }
    }

    fn validate(&self) -> Result<()> {
        let Self { every, due_after } = self;
        let problem = if due_after.is_zero() {
            "so the work would never have been done; give a longer one"
        } else if due_after > every {
            "which is longer, so that turns would be left out; give a shorter time to Period::due_after"
        } else {
            return Ok(());
        };
        let text =
            format!("work is to be done every {every:?} and is due again after {due_after:?}, {problem}");
        Err(Error::new(ErrorKind::InvalidConfig, text))
    }

    /// How long it takes until the work is due; `None` if it is now.
    fn due_in(&self, seen: &Successes) -> Option<Duration> {
        // A record in the future tells nothing.
        let ago = seen.now.duration_since(seen.last?).ok()?;
        self.due_after.checked_sub(ago).filter(|left| !left.is_zero())
    }
}

impl From<Duration> for Period {
    fn from(period: Duration) -> Self {
        Self::every(period)
    }
}

/// What came of work that is to be done once a period.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Once<T> {
    /// This call has done the work, and its success is recorded, if the work did not choose to do that [itself](Run::record). What the work
    /// returned.
    Ran(T),
    /// It has been done, by this process or another one.
    NotDue {
        /// When it began the last time that it succeeded, by the server's clock.
        last_success: SystemTime,
        /// How long it takes until it is due again.
        due_in: Duration,
    },
    /// Another process, or another thread of this one, had the lock until `context` ended.
    Busy,
}

/// What is known of the last success.
#[derive(Clone, Copy, Debug)]
pub struct Successes {
    /// When the work began that succeeded last.
    pub(crate) last: Option<SystemTime>,
    /// What the clock that tells so says now.
    pub(crate) now: SystemTime,
}

/// Work that is being done for `once`: what its closure is given.
#[derive(Debug)]
pub struct Run<'a> {
    guard: &'a LockGuard,
    seen: Successes,
    is_recorded: AtomicBool,
}

impl Run<'_> {
    /// The term in which the work is done, for its fence.
    pub fn term(&self) -> &Term {
        self.guard.term()
    }

    /// The channel of that term. Stop when it disconnects: another process may begin, and the success of this one is not recorded.
    pub fn lost(&self) -> &Lost {
        self.guard.lost()
    }

    /// When this run began, by the server's clock. This is what is recorded if it succeeds.
    pub fn started(&self) -> SystemTime {
        self.seen.now
    }

    /// When the work began the last time that it succeeded, by the server's clock; `None` if nothing is recorded.
    pub fn last_success(&self) -> Option<SystemTime> {
        self.seen.last
    }

    /// Records the success in `transaction`, which is [fenced](Term::fence) by this: then the work and the record are committed
    /// together or not at all, and the work is done exactly once, as far as it consists of what this transaction writes. Call it first of
    /// all in the transaction, and in one transaction at a time: a second one waits for the first. After it, `once` records nothing itself, also if the transaction is not committed.
    ///
    /// The transaction may be on any connection to the database that the lock is in. Its role needs what
    /// [`Term::fence`] asks for, and `SELECT`, `INSERT` and `UPDATE` on `dsync.success`. It takes one round trip.
    ///
    /// # Errors
    /// As [`Term::fence`]. The transaction cannot go on.
    pub fn record(&self, transaction: &mut Transaction<'_>) -> Result<()> {
        self.term().record_success(transaction, self.started())?;
        self.is_recorded.store(true, Ordering::Relaxed);
        Ok(())
    }
}

/// Does the work under the lock if it is due.
pub(crate) fn run<L: Lock + ?Sized, T, E: From<Error>>(
    lock: &L,
    period: Period,
    context: &Context,
    work: impl FnOnce(&Run<'_>) -> std::result::Result<T, E>,
) -> std::result::Result<Once<T>, E> {
    period.validate()?;
    if lock.is_shared() {
        return Err(Error::is_shared(lock.key(), "work that is done once a period").into());
    }
    let waits = context.ended().is_none();
    // It mostly is not, and then nobody need take the lock.
    match lock.successes() {
        Ok(seen) => {
            if let Some(outcome) = not_due(&period, &seen) {
                return Ok(outcome);
            }
        }
        // Who may wait for the lock may wait for a server.
        Err(error) if waits && may_pass(&error) => {
            if let Some(kind) = context.ended() {
                let text =
                    format!("whether the work under {:?} is due could not be asked in time", lock.key());
                return Err(Error::new(kind, text).with_source(error).into());
            }
            log::debug!("lock {:?}: whether the work is due is not known yet: {}", lock.key(), chain(&error));
        }
        Err(error) => return Err(error.into()),
    }
    let Some(guard) = acquire(lock, context)? else { return Ok(Once::Busy) };
    // Somebody may have done it since.
    let seen = lock.successes()?;
    if let Some(outcome) = not_due(&period, &seen) {
        return Ok(outcome);
    }
    if let Some(ahead) =
        seen.last.and_then(|last| last.duration_since(seen.now).ok()).filter(|ahead| !ahead.is_zero())
    {
        log::warn!(
            "lock {:?}: its last success is recorded for a time that is {ahead:.1?} ahead of the server's clock, which may have been set \
             back; the record is ignored, and the work is done",
            lock.key()
        );
    }
    let run = Run { guard: &guard, seen, is_recorded: AtomicBool::new(false) };
    let value = work(&run)?;
    if !run.is_recorded.into_inner() {
        record(lock, &guard, seen.now)?;
    }
    // The guard is dropped: what comes of the release is no matter any more.
    Ok(Once::Ran(value))
}

fn not_due<T>(period: &Period, seen: &Successes) -> Option<Once<T>> {
    let (last_success, due_in) = (seen.last?, period.due_in(seen)?);
    Some(Once::NotDue { last_success, due_in })
}

/// A guard; `None` if another session or thread has the lock when the time is over.
fn acquire<L: Lock + ?Sized>(lock: &L, context: &Context) -> Result<Option<LockGuard>> {
    let mut outcome = match context.ended() {
        Some(ErrorKind::TimedOut) => LockGuard::acquire_if_free(lock),
        _ => LockGuard::acquire(lock, context),
    };
    if let Err(error) = &outcome
        && error.kind() == ErrorKind::TimedOut
    {
        // A try tells whether that was because of another holder, or of the server.
        outcome = match LockGuard::acquire_if_free(lock) {
            Err(why) if why.kind() != ErrorKind::LockUnavailable => {
                outcome.map_err(|error| error.with_source(why))
            }
            tried => tried,
        };
    }
    // Work that nobody does must not pass for work that another one does. In a grace the holder of before may have the lock back.
    let has_holder =
        |error: &Error| error.grace_left().is_none() || lock.holder().is_ok_and(|holder| holder.is_some());
    match outcome {
        Err(error) if error.kind() == ErrorKind::LockUnavailable && has_holder(&error) => Ok(None),
        outcome => outcome.map(Some),
    }
}

/// Records that the work has succeeded. It is done, so it is worth some attempts.
fn record<L: Lock + ?Sized>(lock: &L, guard: &LockGuard, started: SystemTime) -> Result<()> {
    /// A session may end in that moment, another claim have the last one for a while, or the server be full.
    const ATTEMPTS: u32 = 5;
    /// After the first attempt. Each further one is twice as long: 3 s in all, longer than a rush for sessions mostly lasts.
    const PAUSE: Duration = Duration::from_millis(200);
    let mut trouble = None;
    for attempt in 0..ATTEMPTS {
        let is_lost = attempt > 0 && guard.lost().wait_timeout(PAUSE * 2_u32.pow(attempt - 1));
        if is_lost || !guard.is_held() {
            return Err(lost(lock.key(), guard));
        }
        match lock.record_success(guard.term(), started) {
            Ok(true) => return Ok(()),
            Ok(false) => return Err(lost(lock.key(), guard)),
            Err(error) if may_pass(&error) => trouble = Some(error),
            Err(error) => return Err(unrecorded(lock.key(), error)),
        }
    }
    Err(trouble.map_or_else(Error::stopped, |error| unrecorded(lock.key(), error)))
}

fn lost(key: &str, guard: &LockGuard) -> Error {
    let why = guard.loss().map_or_else(|| "a later one has begun".to_owned(), |loss| loss.to_string());
    let text = format!(
        "the work under {key:?} has ended, but its term had ended before: {why}; it counts as not done, and another holder may be at it"
    );
    Error::new(ErrorKind::Lost, text)
}

fn unrecorded(key: &str, error: Error) -> Error {
    let text = format!(
        "the work under {key:?} has been done, but it is not known whether that could be recorded; it may be done again"
    );
    Error::new(error.kind(), text).with_source(error)
}

/// True if the same may succeed a moment later.
fn may_pass(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::SessionUnavailable | ErrorKind::PoolExhausted)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: Duration = Duration::from_secs(24 * 60 * 60);

    fn seen(ago: Duration) -> Successes {
        let now = SystemTime::UNIX_EPOCH + 1000 * DAY;
        Successes { last: Some(now - ago), now }
    }

    #[test]
    fn work_is_due_from_nine_tenths_of_the_period_on() {
        let period = Period::from(DAY);
        let nine_tenths = DAY * 9 / 10;
        for (ago, due_in) in [
            (Duration::ZERO, Some(nine_tenths)),
            (nine_tenths - Duration::from_nanos(1), Some(Duration::from_nanos(1))),
            (nine_tenths, None),
            (DAY, None),
            (500 * DAY, None),
        ] {
            assert_eq!(period.due_in(&seen(ago)), due_in, "{ago:?}");
        }
        assert_eq!(period.due_after(DAY).due_in(&seen(nine_tenths)), Some(DAY / 10));
    }

    #[test]
    fn without_a_record_and_with_one_in_the_future_it_is_due() {
        let never = Successes { last: None, ..seen(DAY) };
        assert_eq!(Period::from(DAY).due_in(&never), None);
        let now = seen(DAY).now;
        let ahead = Successes { last: Some(now + Duration::from_nanos(1)), now };
        assert_eq!(Period::from(DAY).due_in(&ahead), None);
    }

    #[test]
    fn periods_that_cannot_be_are_refused() {
        assert!(Period::every(DAY).validate().is_ok());
        assert!(Period::every(DAY).due_after(DAY).validate().is_ok());
        for period in
            [Period::every(Duration::ZERO), Period::every(DAY).due_after(DAY + Duration::from_nanos(1))]
        {
            assert_eq!(period.validate().unwrap_err().kind(), ErrorKind::InvalidConfig);
        }
        assert!(Period::every(Duration::MAX).validate().is_ok());
    }
}
