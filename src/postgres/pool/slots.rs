//! The slots of a pool: how many sessions there may be, who has them, and who waits for one.

use std::convert::Infallible;
use std::fmt;
use std::panic::catch_unwind;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{RecvTimeoutError, Sender, bounded};
use parking_lot::Mutex;
use r2d2::{ManageConnection, NopErrorHandler, PooledConnection};
use scheduled_thread_pool::{OnPoolDropBehavior, ScheduledThreadPool};

use crate::clock::Moment;
use crate::context::Context;
use crate::error::{Error, ErrorKind, Result};
use crate::local_queue::LocalQueue;
use crate::observer::Sessions;
use crate::pg::session::open::Session;
use crate::pg::session::refusal::Refusal;
use crate::pg::stream::Socket;
use crate::process::PerProcess;

/// The slots of a pool, and the line of those who wait for one.
pub(crate) struct Slots {
    pool: r2d2::Pool<SlotMaker>,
    /// Those who wait for a slot, first come, first served. The first one looks for it.
    line: Arc<LocalQueue>,
    idle_thread: IdleThread,
    /// When somebody last found no slot, in milliseconds since `made`; 0 if that has not happened.
    crowded_at: AtomicU64,
    made: Moment,
}

/// A checked-out slot. Back in the pool when dropped; its session only if it is open and not [tainted](Slot::taint).
pub(crate) type PooledSlot = PooledConnection<SlotMaker>;

/// Makes slots without a session.
#[derive(Debug)]
pub(crate) struct SlotMaker;

/// The right to one session, and the session.
#[derive(Default)]
pub(crate) struct Slot {
    pub(super) session: Option<Session>,
}

impl ManageConnection for SlotMaker {
    type Connection = Slot;
    type Error = Infallible;

    fn connect(&self) -> std::result::Result<Slot, Infallible> {
        Ok(Slot::default())
    }

    fn is_valid(&self, _: &mut Slot) -> std::result::Result<(), Infallible> {
        // Not asked: the first statement of a claim tells, and costs no round trip of its own.
        Ok(())
    }

    fn has_broken(&self, slot: &mut Slot) -> bool {
        slot.session.as_ref().is_none_or(Session::is_over)
    }
}

impl Slot {
    /// The session, if it is open.
    pub(crate) fn session(&mut self) -> Option<&mut Session> {
        self.session.as_mut()
    }

    /// The socket of the session.
    pub(crate) fn socket(&self) -> Option<Socket> {
        self.session.as_ref().and_then(Session::socket)
    }

    /// Whether there is a session, and it is not known to be useless.
    pub(super) fn is_open(&self) -> bool {
        self.session.as_ref().is_some_and(|session| !session.is_over())
    }

    /// Whether there is one that may take locks.
    pub(crate) fn is_ready(&self) -> bool {
        self.is_open() && self.session.as_ref().is_some_and(Session::is_for_locks)
    }

    /// Closes the session and says so to the server, which takes no longer than a goodbye may; after `by`, without a word.
    pub(crate) fn close(&mut self, by: Instant) {
        if Instant::now() >= by {
            self.taint();
        }
        self.session = None;
    }

    /// Marks the session as one that must never be used again, and closes it.
    pub(crate) fn taint(&mut self) {
        if let Some(session) = self.session.take() {
            session.kill();
        }
    }
}

/// How long to wait for a slot at one time. Short, since a release cannot interrupt it; whoever wants to wait longer comes
/// again.
const SLOT_WAIT: Duration = Duration::from_millis(100);

/// How long a slot is waited for where there is room for one: the thread on which r2d2 makes slots may come late to that on a busy machine.
const MAKES_ROOM_WITHIN: Duration = Duration::from_secs(1);

/// How soon to see whether there is a slot, or work for the thread that makes slots, where somebody waits for one.
const SLOT_LOOKS_EVERY: Duration = Duration::from_micros(200);

impl Slots {
    /// How long it may take to have one.
    pub(super) const TAKES_AT_MOST: Duration = MAKES_ROOM_WITHIN.saturating_add(SLOT_WAIT.saturating_mul(2));

    /// At most `limit` of them; a session that nobody has used for `idle_timeout` is closed.
    pub(super) fn new(limit: u32, idle_timeout: Duration) -> Result<Self> {
        let threads = thread_pool()?;
        let idle_thread = IdleThread::new(&threads);
        let pool = r2d2::Pool::builder()
            .max_size(limit)
            .min_idle(Some(0))
            .max_lifetime(None)
            .idle_timeout(Some(idle_timeout))
            .test_on_check_out(false)
            .error_handler(Box::new(NopErrorHandler))
            .thread_pool(Arc::new(threads))
            .build_unchecked(SlotMaker);
        Ok(Self {
            pool,
            line: Arc::default(),
            idle_thread,
            crowded_at: AtomicU64::new(0),
            made: Moment::now(),
        })
    }

    /// Takes a slot; if `waits`, also one that comes back within 100 ms, when its turn in the line has come.
    pub(crate) fn take(&self, waits: bool) -> std::result::Result<PooledSlot, Refusal> {
        self.take_within(MAKES_ROOM_WITHIN, waits)
    }

    /// As [`take`](Self::take) for one who waits, and who also waits longer for the thread that makes room: for who cannot come again.
    pub(super) fn take_patiently(
        &self,
        makes_room_within: Duration,
    ) -> std::result::Result<PooledSlot, Refusal> {
        self.take_within(makes_room_within.max(MAKES_ROOM_WITHIN), true)
    }

    fn take_within(
        &self,
        makes_room_within: Duration,
        waits: bool,
    ) -> std::result::Result<PooledSlot, Refusal> {
        let mut turn = self.line.try_enter();
        if turn.is_some()
            && let Some(slot) = self.pool.try_get()
        {
            return Ok(slot);
        }
        if self.is_full() {
            self.crowded_at.store(self.now(), Ordering::Relaxed);
        }
        let by = Instant::now() + makes_room_within;
        while waits || !self.is_full() {
            // One that comes back is for the first in the line. Where there is room for all in it, and one more, nobody waits for them.
            let may_look = self.has_room_beside(1 + self.line.waiting()) || {
                turn = turn.or_else(|| self.line.enter(&Context::timeout(SLOT_WAIT)).ok());
                turn.is_some()
            };
            if may_look && let Some(slot) = self.await_slot() {
                return Ok(slot);
            }
            if self.is_full() {
                break;
            }
            if Instant::now() >= by {
                let text =
                    "this process has not made room for another session in time: its machine is too busy";
                return Err(Refusal::new(ErrorKind::SessionUnavailable, text.to_owned()));
            }
        }
        Err(self.exhausted())
    }

    /// That there is no slot.
    pub(crate) fn exhausted(&self) -> Refusal {
        Refusal::new(
            ErrorKind::PoolExhausted,
            format!(
                "all {} sessions of this manager are taken; raise max_sessions, or release locks that are not needed",
                self.pool.max_size()
            ),
        )
    }

    /// A slot that is new or comes back within the pool's patience. For the first in the line, and for whoever finds that there is room.
    ///
    /// r2d2 would wait for it in `parking_lot`, and supervisors take slots whenever they like, so also while the process is being
    /// forked: see [`IdleThread`]. It does so here only for the moment in which it is asked for a new slot.
    fn await_slot(&self) -> Option<PooledSlot> {
        let (begun, mut nap, mut is_asked) = (Instant::now(), SLOT_LOOKS_EVERY, false);
        loop {
            let mut slot = self.pool.try_get();
            // Each time that r2d2 is asked it makes another one.
            if slot.is_none() && !is_asked && self.has_room_beside(0) {
                is_asked = true;
                self.idle_thread.call();
                slot = self.pool.get_timeout(Duration::ZERO).ok();
                // It may have looked before there was something to do.
                self.idle_thread.call();
            }
            if slot.is_some() || begun.elapsed() >= SLOT_WAIT {
                return slot;
            }
            thread::sleep(nap);
            nap = (2 * nap).min(SLOT_LOOKS_EVERY * 10);
        }
    }

    /// True if there may be another session.
    pub(crate) fn has_room(&self) -> bool {
        !self.is_full()
    }

    /// True if somebody has taken each slot that there may be.
    fn is_full(&self) -> bool {
        let Sessions { in_use, limit } = self.usage();
        in_use >= limit
    }

    /// True if another slot can be made, also when so many others have been.
    fn has_room_beside(&self, others: usize) -> bool {
        let (made, limit) = (self.pool.state().connections, self.pool.max_size());
        u32::try_from(others).is_ok_and(|others| made.saturating_add(others) < limit)
    }

    /// A slot with an open session, if there is one at hand.
    pub(crate) fn take_open(&self) -> Option<PooledSlot> {
        let _turn = self.line.try_enter()?;
        self.pool.try_get().filter(|slot| slot.is_ready())
    }

    /// How many sessions are in use: the slots that somebody has taken.
    pub(crate) fn usage(&self) -> Sessions {
        let state = self.pool.state();
        let in_use = state.connections.saturating_sub(state.idle_connections);
        Sessions { in_use, limit: self.pool.max_size() }
    }

    /// How many sessions are open, at the most: in use, or at rest.
    pub(crate) fn opened(&self) -> u32 {
        self.pool.state().connections
    }

    /// How many slots nobody has taken.
    pub(crate) fn idle(&self) -> usize {
        self.pool.state().idle_connections.try_into().unwrap_or(usize::MAX)
    }

    /// Closes the sessions that nobody uses. Several threads may do it at once, each a part of them.
    pub(super) fn close_idle(&self, by: Instant) {
        // A slot without a session does not go back, so there are fewer each time.
        while let Some(mut slot) = self.pool.try_get() {
            slot.close(by);
        }
    }

    /// Whether a slot that is free in all but name is to be given back at once, since others want one.
    pub(crate) fn is_crowded(&self) -> bool {
        const LASTS: u64 = 1_000;
        let at = self.crowded_at.load(Ordering::Relaxed);
        at > 0 && self.now() - at.min(self.now()) < LASTS
    }

    /// Milliseconds since the first slot could be taken, and one.
    fn now(&self) -> u64 {
        u64::try_from(self.made.elapsed().as_millis()).unwrap_or(u64::MAX - 1) + 1
    }
}

impl fmt::Debug for Slots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slots").field("state", &self.pool.state()).finish_non_exhaustive()
    }
}

/// The thread on which r2d2 makes slots and closes idle sessions. It ends with the pool; r2d2's own are three, and stay for
/// 30 s.
fn thread_pool() -> Result<ScheduledThreadPool> {
    /// The system counts a thread that has ended for a moment longer, so one more than is needed.
    const SPARE: usize = 2;
    /// What one thread has found to be spare another one must not use up meanwhile.
    static ONE_AT_A_TIME: PerProcess<Mutex<()>> = PerProcess::new();
    let failed = || {
        let message = "the thread of the session pool could not be started; is the limit of threads reached?";
        Error::new(ErrorKind::FailedInitialization, message)
    };
    let _turn = ONE_AT_A_TIME.get(|_| Mutex::default()).lock();
    // The pool's maker panics where there is no thread to be had, so that is tried before.
    let (hold, held) = bounded::<Infallible>(0);
    let spare = [(); SPARE].map(|()| {
        let held = held.clone();
        thread::Builder::new().name("dsync-spare".to_owned()).spawn(move || {
            let _ = held.recv();
        })
    });
    drop(hold);
    for thread in spare {
        // It does nothing that could panic.
        let _ = thread.map_err(|error| failed().with_source(error))?.join();
    }
    catch_unwind(|| {
        ScheduledThreadPool::builder()
            .num_threads(1)
            .thread_name_pattern("dsync-pool")
            .on_drop_behavior(OnPoolDropBehavior::DiscardPendingScheduled)
            .build()
    })
    .map_err(|_| failed())
}

/// Keeps the pool's thread, while it has nothing to do, in a wait of the standard library's; tells it when r2d2 has something.
///
/// By itself it would wait in `parking_lot`, which keeps all waiting threads in one table of the process. A forked child inherits
/// the table and not the thread. If a thread of the child then waits in the same place, at the same address, the table is broken,
/// and the child crashes or hangs.
struct IdleThread(Sender<()>);

impl IdleThread {
    fn new(threads: &ScheduledThreadPool) -> Self {
        /// r2d2 closes idle sessions on this thread, which it looks for every 30 s.
        const AT_MOST: Duration = Duration::from_secs(10);
        /// Whoever has called gives r2d2 its work a moment later, so for so long it makes room for that often.
        const FOR_WORK: Duration = Duration::from_millis(20);
        let (call, called) = bounded(1);
        let mut works_until = Instant::now();
        threads.execute_with_dynamic_delay(Duration::ZERO, move || {
            let at_most = if Instant::now() < works_until { SLOT_LOOKS_EVERY } else { AT_MOST };
            match called.recv_timeout(at_most) {
                Err(RecvTimeoutError::Disconnected) => return None,
                Ok(()) => works_until = Instant::now() + FOR_WORK,
                Err(RecvTimeoutError::Timeout) => {}
            }
            // Behind the work that is due by now. A longer delay would be a wait of the pool's own.
            Some(Duration::ZERO)
        });
        Self(call)
    }

    /// r2d2 is about to have work for the thread.
    fn call(&self) {
        // If it is full the thread has been called already.
        let _ = self.0.try_send(());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slots(limit: u32) -> Slots {
        Slots::new(limit, Duration::from_secs(60)).unwrap()
    }

    /// Whoever gives one back and wants one again is quicker than whoever waits and looks now and then.
    #[test]
    fn a_slot_that_comes_back_is_for_the_first_in_the_line() {
        let slots = slots(1);
        // The thread that makes room may come late to that on a busy machine.
        let take = || slots.take_patiently(Duration::from_secs(60));
        for round in 0..20 {
            let slot = take().unwrap();
            thread::scope(|scope| {
                let begun = Instant::now();
                let waits = scope.spawn(|| take().map(drop));
                while !waits.is_finished() && slots.line.try_enter().is_some() {
                    thread::sleep(Duration::from_millis(1));
                }
                drop(slot);
                // On a busy machine it may have given up.
                let waits_still = begun.elapsed() < SLOT_WAIT;
                let again = slots.take(true);
                // For longer than the other one waits.
                thread::sleep(2 * SLOT_WAIT);
                drop(again);
                let outcome = waits.join().unwrap();
                assert!(outcome.is_ok() || !waits_still, "overtaken in round {round}");
            });
        }
    }

    /// Each is a session of the server, which one that is not needed costs until it has rested for long.
    #[test]
    fn no_more_slots_are_made_than_are_wanted() {
        for _ in 0..50 {
            let slots = slots(10);
            let begun = Instant::now();
            let taken = [(), ()].map(|()| slots.take_patiently(Duration::from_secs(60)).unwrap());
            let made = slots.pool.state().connections;
            // Whoever has waited for long asks again.
            assert!(made == 2 || begun.elapsed() >= SLOT_WAIT, "{made}");
            drop(taken);
        }
    }
}
