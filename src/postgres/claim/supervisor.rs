//! The thread of a claim: watches what is held, does what nobody else does, and looks after those who do it themselves.

use std::io;
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::context::Context;
use crate::postgres::claim::alarm::{Alarm, Woken};
use crate::postgres::claim::engine::{Help, Terms, Work};
use crate::postgres::claim::idle::Resting;
use crate::postgres::claim::machine::Action;
use crate::postgres::claim::shared::{Claim, Patience};
use crate::postgres::pool::{Pool, PooledSlot};
use crate::postgres::stream::Socket;
use crate::postgres::watchdog::Watched;
use crate::process::may_drive;

/// How long what other threads do is left alone; and so how old a term of theirs may be when its watch begins. More often
/// would tell sooner of a session that is lost just then, and disturb those who are at work on the same processors.
const TICK: Duration = Duration::from_millis(1);

/// How long the supervisor goes on ticking after the last thing that happened. A claim that follows within this is quick:
/// nobody needs to be woken for it, and the session is kept for the next.
const QUICK: Duration = Duration::from_millis(20);

/// How long a thread without a claim waits for the next.
const LINGER: Duration = Duration::from_secs(1);

/// How long a thread that waits for the lock has to take over the work.
const HANDING_OVER: Duration = Duration::from_millis(2);

/// How often the supervisor looks at least while another thread is at work, which rings when there is something to do.
const ROUND: Duration = Duration::from_millis(500);

/// The supervisor of one claim, or of none, until the next comes or it has rested for long enough. The claims that it has
/// one after the other are on whatever keys of one manager.
///
/// An application thread that wants the lock, or gives it back, does the work itself if it can: that spares two changes of
/// threads, which take longer than the statement. The work is under a mutex, and whoever has it works. All that takes its
/// time is the supervisor's: to connect, to pause, to watch, to renew; and to wait for the lock for a caller whose patience
/// may end before.
pub(crate) struct Supervisor {
    pool: Arc<Pool>,
    /// How long the server may take to answer a short statement.
    heartbeat_timeout: Duration,
    /// Where it waits for the next claim, and is to be found no more when it leaves.
    resting: Weak<Resting>,
    alarm: Alarm,
    desk: Arc<Desk>,
    work: Mutex<Bench>,
}

/// What a supervisor has to do, for those who give it a claim, and for the watchdog.
struct Desk(Mutex<Assignment>);

enum Assignment {
    /// Nothing; the thread waits for a claim.
    Free,
    /// A claim that nobody has begun to work on.
    New { claim: Arc<Claim>, terms: Arc<Terms> },
    /// A claim that is worked on.
    Taken(Arc<Claim>),
    /// The thread takes no more claims.
    Closed,
}

/// The claim that is worked on, and what is kept between two.
#[derive(Default)]
struct Bench {
    work: Option<Work>,
    /// A session that has kept its lease.
    slot: Option<PooledSlot>,
    /// When the last claim ended.
    ended_at: Option<Instant>,
}

/// What the thread remembers from one look to the next.
struct Rounds {
    /// The key of the claim that it looked after last, by which it is called.
    served: String,
    /// A thread that waits has been told to take over, and is not to be told again before something was done.
    handed_over: bool,
}

/// What the supervisor does next.
enum Next {
    Sleep { until: Instant, watch: Option<Socket> },
    Leave,
}

impl Next {
    fn sleep(time: Duration) -> Self {
        Self::Sleep { until: Instant::now() + time, watch: None }
    }
}

impl Supervisor {
    /// Starts the thread, with a claim to work on.
    ///
    /// # Errors
    /// When the process has no descriptor or no thread left.
    pub(crate) fn start(
        claim: &Arc<Claim>,
        terms: &Arc<Terms>,
        resting: &Arc<Resting>,
    ) -> io::Result<Arc<Self>> {
        let supervisor = Arc::new(Self {
            pool: Arc::clone(&terms.pool),
            heartbeat_timeout: terms.plan.heartbeat_timeout,
            resting: Arc::downgrade(resting),
            alarm: Alarm::new()?,
            desk: Arc::new(Desk(Mutex::new(Assignment::New {
                claim: Arc::clone(claim),
                terms: Arc::clone(terms),
            }))),
            work: Mutex::default(),
        });
        let desk = Arc::downgrade(&supervisor.desk);
        terms.pool.watchdog().watch(desk as Weak<dyn Watched>)?;
        let body = Arc::clone(&supervisor);
        let served = claim.key().to_owned();
        thread::Builder::new().name(thread_name(&served)).spawn(move || body.run(served))?;
        Ok(supervisor)
    }

    /// Gives it another claim; `false` if it is not free for one.
    pub(crate) fn assign(&self, claim: &Arc<Claim>, terms: &Arc<Terms>) -> bool {
        let mut desk = self.desk.0.lock();
        let free = matches!(*desk, Assignment::Free);
        if free {
            *desk = Assignment::New { claim: Arc::clone(claim), terms: Arc::clone(terms) };
        }
        free
    }

    /// Whether it takes another claim.
    pub(crate) fn is_free(&self) -> bool {
        matches!(*self.desk.0.lock(), Assignment::Free)
    }

    /// Lets the thread go if it has no claim: the manager has stopped.
    pub(crate) fn dismiss(&self) {
        {
            let mut desk = self.desk.0.lock();
            if !matches!(*desk, Assignment::Free) {
                return;
            }
            *desk = Assignment::Closed;
        }
        self.alarm.ring();
    }

    // What application threads do.

    /// Blocks until the lock is held, or it is known that it will not be.
    pub(crate) fn acquire(
        &self,
        claim: &Claim,
        terms: &Terms,
        patience: Patience,
        context: &Context,
    ) -> crate::Result<()> {
        let patient = patience == Patience::Lock;
        if patience == Patience::TryOnce {
            claim.hurry();
            self.alarm.ring();
        }
        if context.can_be_cancelled() || !may_drive() {
            // To be woken by a cancellation this thread must wait for one.
            self.alarm.ring();
            return claim.acquire(patience, context, false, || false);
        }
        let until = context.expires_at();
        let volunteers = patient && terms.may_wait(until);
        let help = Help::Acquire { until, patient };
        claim.acquire(patience, context, volunteers, || self.help(claim, help))
    }

    /// Makes the thread look at a claim that nobody waits for.
    pub(crate) fn wake(&self) {
        self.alarm.ring();
    }

    /// Gives back what there is; `false` if another thread is at work, which must be interrupted.
    pub(crate) fn release(&self, claim: &Claim) -> bool {
        let ended = may_drive() && self.help(claim, Help::Release);
        if !ended {
            self.alarm.ring();
        }
        ended
    }

    /// Does what this thread may do now; `false` if there was nothing.
    fn help(&self, claim: &Claim, help: Help) -> bool {
        let Some(mut bench) = self.work.try_lock() else {
            // It may be the supervisor that has it, about to sleep without a look at this claim.
            self.alarm.ring();
            return false;
        };
        self.take_up(&mut bench);
        let mut helped = false;
        let wanted: Option<Instant> = loop {
            // The claim may have ended long ago, and another one be worked on.
            let Some(work) =
                bench.work.as_mut().filter(|work| std::ptr::eq(&raw const **work.claim(), claim))
            else {
                break None;
            };
            let action = work.next();
            if let Action::Finish(_) = action {
                self.finish(&mut bench);
                self.alarm.stir();
                helped = true;
                // A session that was kept is not kept for longer.
                break bench.slot.is_some().then(|| Instant::now() + QUICK);
            }
            if work.allows(help, action).is_none() {
                break match action {
                    Action::Watch { .. } => Some(Instant::now() + TICK),
                    _ => Some(Instant::now()),
                };
            }
            self.alarm.stir();
            self.guarded(&mut bench, |work| work.perform(action));
            helped = true;
        };
        drop(bench);
        self.alarm.stir();
        if let Some(by) = wanted
            && !self.alarm.looks_by(by)
        {
            self.alarm.ring();
        }
        helped
    }

    // What the thread does.

    /// `served` is the key by which the thread is called.
    fn run(&self, served: String) {
        /// Whatever becomes of the thread, no further claim is to wait for it, and nobody is to find it.
        struct Closing<'a>(&'a Supervisor);
        impl Drop for Closing<'_> {
            fn drop(&mut self) {
                let former = std::mem::replace(&mut *self.0.desk.0.lock(), Assignment::Closed);
                if let Assignment::New { claim, terms } = former {
                    drop(Work::begin(&terms, claim, None, false));
                }
                if let Some(resting) = self.0.resting.upgrade() {
                    resting.remove(self.0);
                }
            }
        }
        let _closing = Closing(self);
        let mut seen = self.alarm.news();
        let mut quick_until = Instant::now() + QUICK;
        let mut woken = Woken::Bell;
        let mut rounds = Rounds { served, handed_over: false };
        loop {
            let news = self.alarm.news();
            let now = Instant::now();
            let stirred = std::mem::replace(&mut seen, news) != news;
            if stirred {
                quick_until = now + QUICK;
            }
            let next = if stirred && woken == Woken::Time {
                // Others are at it.
                Next::sleep(TICK)
            } else {
                self.look(woken, now < quick_until, &mut rounds)
            };
            match next {
                Next::Sleep { until, watch } => woken = self.alarm.sleep(seen, watch.as_ref(), until),
                Next::Leave => return,
            }
        }
    }

    fn look(&self, woken: Woken, quick: bool, rounds: &mut Rounds) -> Next {
        let Some(mut bench) = self.work.try_lock() else {
            // A statement that takes more than a tick waits for something; and who is at it rings when a term begins.
            return self.leave_to_other(quick && woken != Woken::Time, rounds);
        };
        self.take_up(&mut bench);
        if let Some(work) = &bench.work {
            rounds.serve(work.claim());
        }
        let mut readable = woken == Woken::Socket;
        loop {
            let Some(work) = &mut bench.work else { return self.idle(&mut bench, quick) };
            match work.next() {
                Action::Finish(_) => self.finish(&mut bench),
                Action::Pause { until } | Action::Watch { until } if work.is_due(until) => {
                    self.guarded(&mut bench, Work::wait_is_over);
                }
                Action::Pause { .. } if work.claim().wants_attempt() => {
                    self.guarded(&mut bench, Work::is_wanted);
                }
                Action::Pause { until } => return Next::Sleep { until: work.at(until), watch: None },
                Action::Watch { .. } if readable || work.is_cut_off() => {
                    readable = false;
                    self.guarded(&mut bench, Work::listen);
                }
                Action::Watch { until } => {
                    let socket = work.socket();
                    return Next::Sleep { until: work.at(until), watch: socket };
                }
                Action::Try | Action::Queue if !rounds.handed_over && work.claim().call_volunteer() => {
                    rounds.handed_over = true;
                    return Next::sleep(HANDING_OVER);
                }
                action => {
                    rounds.handed_over = false;
                    self.guarded(&mut bench, |work| work.perform(action));
                }
            }
        }
    }

    /// Another thread is at work.
    fn leave_to_other(&self, quick: bool, rounds: &mut Rounds) -> Next {
        if let Some(claim) = self.desk.claim() {
            rounds.serve(&claim);
        }
        Next::sleep(if quick { TICK } else { ROUND })
    }

    fn idle(&self, bench: &mut Bench, quick: bool) -> Next {
        let since = *bench.ended_at.get_or_insert_with(Instant::now);
        if bench.slot.is_some() && (since.elapsed() >= QUICK || self.pool.is_crowded()) {
            self.give_back(bench);
        }
        let mut desk = self.desk.0.lock();
        match *desk {
            Assignment::Free if since.elapsed() >= LINGER => {
                *desk = Assignment::Closed;
                Next::Leave
            }
            Assignment::Closed => {
                drop(desk);
                if let Some(slot) = &mut bench.slot.take() {
                    slot.close(Instant::now() + self.heartbeat_timeout);
                }
                Next::Leave
            }
            // It has just come in.
            Assignment::New { .. } => Next::sleep(Duration::ZERO),
            _ if quick || bench.slot.is_some() => Next::sleep(TICK),
            _ => Next::Sleep { until: since + LINGER, watch: None },
        }
    }

    /// Takes lease and name off a session that nobody has come back for, and gives it to the pool.
    fn give_back(&self, bench: &mut Bench) {
        let Some(mut slot) = bench.slot.take() else { return };
        let by = Instant::now() + self.heartbeat_timeout;
        if let Some(session) = slot.session()
            && session.settle(&[], by).is_err()
        {
            slot.taint();
        }
    }

    // What both do.

    /// Begins the work on a claim that has come in.
    fn take_up(&self, bench: &mut Bench) {
        if bench.work.is_some() {
            return;
        }
        let (claim, terms) = {
            let mut desk = self.desk.0.lock();
            let Assignment::New { claim, terms } = &*desk else { return };
            let (claim, terms) = (Arc::clone(claim), Arc::clone(terms));
            *desk = Assignment::Taken(Arc::clone(&claim));
            (claim, terms)
        };
        let is_quick = bench.ended_at.is_some_and(|at| at.elapsed() < QUICK);
        bench.work = Some(Work::begin(&terms, claim, bench.slot.take(), is_quick));
    }

    /// Runs what might panic, in which case the claim is over.
    fn guarded(&self, bench: &mut Bench, run: impl FnOnce(&mut Work)) {
        /// The work is dropped with this, which ends the claim, unless it goes back.
        struct Away<'a> {
            supervisor: &'a Supervisor,
            work: Option<Work>,
        }
        impl Drop for Away<'_> {
            fn drop(&mut self) {
                if self.work.is_some() {
                    // No claim comes in between that nobody would watch.
                    *self.supervisor.desk.0.lock() = Assignment::Closed;
                    self.supervisor.alarm.ring();
                }
            }
        }
        let mut away = Away { supervisor: self, work: bench.work.take() };
        if let Some(work) = &mut away.work {
            run(work);
        }
        bench.work = away.work.take();
    }

    /// The claim has come to its end.
    fn finish(&self, bench: &mut Bench) {
        let Some(mut work) = bench.work.take() else { return };
        if let Action::Finish(end) = work.next() {
            bench.ended_at = Some(Instant::now());
            work.finish(end, |slot| {
                bench.slot = slot;
                self.free();
            });
        }
    }

    /// There is room for another claim.
    fn free(&self) {
        let mut desk = self.desk.0.lock();
        if matches!(*desk, Assignment::Taken(_)) {
            *desk = Assignment::Free;
        }
    }
}

impl Desk {
    fn claim(&self) -> Option<Arc<Claim>> {
        match &*self.0.lock() {
            Assignment::New { claim, .. } | Assignment::Taken(claim) => Some(Arc::clone(claim)),
            Assignment::Free | Assignment::Closed => None,
        }
    }
}

impl Watched for Desk {
    fn deadline(&self) -> Option<Instant> {
        self.claim()?.term_ends_at()
    }

    fn enforce(&self) {
        if let Some(claim) = self.claim() {
            claim.expire();
        }
    }
}

impl Rounds {
    /// Calls the thread after the lock that it looks after now. Whoever looks at a process sees which lock it is that hangs.
    fn serve(&mut self, claim: &Claim) {
        if self.served != claim.key() {
            claim.key().clone_into(&mut self.served);
            rename_thread(&self.served);
        }
    }
}

fn thread_name(key: &str) -> String {
    format!("dsync:{}", key.replace('\0', ""))
}

/// Renames this thread, for those who look from outside; what the standard library calls it stays.
#[cfg(target_os = "linux")]
fn rename_thread(key: &str) {
    if let Ok(name) = std::ffi::CString::new(thread_name(key)) {
        // A name is for people, and the former one does no harm.
        let _ = rustix::thread::set_name(&name);
    }
}

/// Elsewhere it keeps the name of the lock that it was started for.
#[cfg(not(target_os = "linux"))]
fn rename_thread(_: &str) {}

impl std::fmt::Debug for Supervisor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Supervisor").field("alarm", &self.alarm).finish_non_exhaustive()
    }
}
