//! The thread of a lock: watches what is held, does what nobody else does, and looks after those who do it themselves.

use std::io;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::alarm::{Alarm, Woken};
use super::claim::{Claim, Patience};
use super::pool::PooledSlot;
use super::state::Action;
use super::stream::Socket;
use super::work::{Help, Terms, Work};
use crate::context::Context;

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

/// How often the supervisor looks at least where a statement of another thread's may hang.
const ROUND: Duration = Duration::from_millis(500);

/// The supervisor of one lock, claimed or lately claimed.
///
/// An application thread that wants the lock, or gives it back, does the work itself if it can: that spares two changes of
/// threads, which take longer than the statement. The work is under a mutex, and whoever has it works. All that takes its
/// time is the supervisor's: to connect, to pause, to watch, to renew; and to wait for the lock for a caller whose patience
/// may end before.
pub(super) struct Supervisor {
    terms: Arc<Terms>,
    alarm: Alarm,
    desk: Mutex<Desk>,
    work: Mutex<Bench>,
}

/// What is to be done.
enum Desk {
    /// Nothing; the thread waits for a claim.
    Free,
    /// A claim that nobody has begun to work on.
    New(Arc<Claim>),
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
    pub(super) fn start(terms: Terms, claim: &Arc<Claim>) -> io::Result<Arc<Self>> {
        let supervisor = Arc::new(Self {
            terms: Arc::new(terms),
            alarm: Alarm::new()?,
            desk: Mutex::new(Desk::New(Arc::clone(claim))),
            work: Mutex::default(),
        });
        let name = format!("dsync:{}", claim.key().replace('\0', ""));
        let body = Arc::clone(&supervisor);
        thread::Builder::new().name(name).spawn(move || body.run())?;
        Ok(supervisor)
    }

    /// Gives it another claim; `false` if it is not free for one.
    pub(super) fn assign(&self, claim: &Arc<Claim>) -> bool {
        let mut desk = self.desk.lock();
        let free = matches!(*desk, Desk::Free);
        if free {
            *desk = Desk::New(Arc::clone(claim));
        }
        free
    }

    /// Lets the thread go if it has no claim.
    pub(super) fn dismiss(&self) {
        {
            let mut desk = self.desk.lock();
            if !matches!(*desk, Desk::Free) {
                return;
            }
            *desk = Desk::Closed;
        }
        self.alarm.ring();
    }

    // What application threads do.

    /// Blocks until the lock is held, or it is known that it will not be.
    pub(super) fn acquire(&self, claim: &Claim, patience: Patience, context: &Context) -> crate::Result<()> {
        let patient = patience == Patience::Lock;
        if context.can_be_cancelled() {
            // To be woken by a cancellation this thread must wait for one.
            self.alarm.ring();
            return claim.acquire(patience, context, false, || false);
        }
        let until = context.expires_at();
        let volunteers = patient && self.terms.may_wait(until);
        let help = Help::Acquire { until, patient };
        claim.acquire(patience, context, volunteers, || self.help(claim, help))
    }

    /// Gives back what there is; `false` if another thread is at work, which must be interrupted.
    pub(super) fn release(&self, claim: &Claim) -> bool {
        let ended = self.help(claim, Help::Release);
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
                break None;
            }
            let Some(by) = work.allows(help, action) else {
                break match action {
                    Action::Watch { .. } => Some(Instant::now() + TICK),
                    _ => Some(Instant::now()),
                };
            };
            self.alarm.stir();
            if !self.alarm.looks_by(by) {
                self.alarm.ring();
            }
            self.guarded(&mut bench, |work| work.perform(action, true));
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

    fn run(&self) {
        /// Whatever becomes of the thread, no further claim is to wait for it.
        struct Closing<'a>(&'a Supervisor);
        impl Drop for Closing<'_> {
            fn drop(&mut self) {
                let former = std::mem::replace(&mut *self.0.desk.lock(), Desk::Closed);
                if let Desk::New(claim) = former {
                    drop(Work::begin(&self.0.terms, claim, None, false));
                }
            }
        }
        let _closing = Closing(self);
        let mut seen = self.alarm.news();
        let mut quick_until = Instant::now() + QUICK;
        let mut woken = Woken::Bell;
        let mut handed_over = false;
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
                self.look(woken, now < quick_until, &mut handed_over)
            };
            match next {
                Next::Sleep { until, watch } => woken = self.alarm.sleep(seen, watch.as_ref(), until),
                Next::Leave => return,
            }
        }
    }

    fn look(&self, woken: Woken, quick: bool, handed_over: &mut bool) -> Next {
        let Some(mut bench) = self.work.try_lock() else { return self.look_after_other(quick) };
        self.take_up(&mut bench);
        let mut readable = woken == Woken::Socket;
        loop {
            let Some(work) = &mut bench.work else { return self.idle(&mut bench, quick) };
            match work.next() {
                Action::Finish(_) => self.finish(&mut bench),
                Action::Pause { until } | Action::Watch { until } if work.is_due(until) => {
                    self.guarded(&mut bench, Work::wait_is_over);
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
                Action::Try | Action::Queue if !*handed_over && work.claim().call_volunteer() => {
                    *handed_over = true;
                    return Next::sleep(HANDING_OVER);
                }
                action => {
                    *handed_over = false;
                    self.guarded(&mut bench, |work| work.perform(action, false));
                }
            }
        }
    }

    /// Another thread is at work: sees to it that it does not hang.
    fn look_after_other(&self, quick: bool) -> Next {
        let now = Instant::now();
        let mut until = now + if quick { TICK } else { ROUND };
        let claim = self.desk.lock().claim();
        let deadline = claim.and_then(|claim| claim.link()).and_then(|link| {
            let deadline = link.control().guarded_deadline()?;
            if deadline <= now {
                link.control().enforce();
            }
            Some(deadline)
        });
        if let Some(deadline) = deadline.filter(|deadline| *deadline > now) {
            until = if quick { until.min(deadline) } else { deadline };
        }
        Next::Sleep { until, watch: None }
    }

    fn idle(&self, bench: &mut Bench, quick: bool) -> Next {
        let since = *bench.ended_at.get_or_insert_with(Instant::now);
        if bench.slot.is_some() && (since.elapsed() >= QUICK || self.terms.pool.is_crowded()) {
            give_back(bench, &self.terms);
        }
        let mut desk = self.desk.lock();
        match *desk {
            Desk::Free if since.elapsed() >= LINGER => {
                *desk = Desk::Closed;
                Next::Leave
            }
            Desk::Closed => {
                drop(desk);
                give_back(bench, &self.terms);
                Next::Leave
            }
            // It has just come in.
            Desk::New(_) => Next::sleep(Duration::ZERO),
            _ if quick || bench.slot.is_some() => Next::sleep(TICK),
            _ => Next::Sleep { until: since + LINGER, watch: None },
        }
    }

    // What both do.

    /// Begins the work on a claim that has come in.
    fn take_up(&self, bench: &mut Bench) {
        if bench.work.is_some() {
            return;
        }
        let claim = {
            let mut desk = self.desk.lock();
            let Desk::New(claim) = &*desk else { return };
            let claim = Arc::clone(claim);
            *desk = Desk::Taken(Arc::clone(&claim));
            claim
        };
        let is_quick = bench.ended_at.is_some_and(|at| at.elapsed() < QUICK);
        bench.work = Some(Work::begin(&self.terms, claim, bench.slot.take(), is_quick));
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
                    *self.supervisor.desk.lock() = Desk::Closed;
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
        let mut desk = self.desk.lock();
        if matches!(*desk, Desk::Taken(_)) {
            *desk = Desk::Free;
        }
    }
}

impl Desk {
    fn claim(&self) -> Option<Arc<Claim>> {
        match self {
            Desk::New(claim) | Desk::Taken(claim) => Some(Arc::clone(claim)),
            Desk::Free | Desk::Closed => None,
        }
    }
}

/// Takes lease and name off a session that nobody has come back for, and gives it to the pool.
fn give_back(bench: &mut Bench, terms: &Terms) {
    let Some(mut slot) = bench.slot.take() else { return };
    let by = Instant::now() + terms.plan.heartbeat_timeout;
    if let Some(session) = slot.session() {
        session.guard(false);
        if session.settle(&[], by).is_err() {
            slot.taint();
        }
    }
}

impl std::fmt::Debug for Supervisor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Supervisor").field("alarm", &self.alarm).finish_non_exhaustive()
    }
}
