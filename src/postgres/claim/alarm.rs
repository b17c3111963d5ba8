//! How a supervisor sleeps, and how it is woken: by time, by another thread, or by its socket.

use std::fmt::Debug;
use std::time::{Duration, Instant};

use crate::sync::{AtomicBool, Mutex, Ordering::SeqCst};

/// A supervisor's alarm clock.
///
/// To wake a sleeping thread takes a system call, and the processor that runs the thread. So whoever leaves something to
/// the supervisor asks first whether that is needed: [`attends`](Self::attends) is true if the supervisor comes to see
/// it in time by itself. While the supervisor is awake it attends to nothing, since it may have looked already; whoever wakes it then
/// keeps it from sleeping.
///
/// What the system does is in the [`Bell`], so that all interleavings can be tried.
#[derive(Debug)]
pub(crate) struct Alarm<B: Bell> {
    /// What the supervisor attends to while it sleeps.
    sleep: Mutex<Option<Sleep<B::Socket>>>,
    /// The bell has been rung and not heard yet.
    ringing: AtomicBool,
    bell: B,
}

#[derive(Debug)]
struct Sleep<S> {
    until: Instant,
    watch: Option<S>,
}

/// What a supervisor sleeps on. Once rung it rings until it is silenced.
pub(crate) trait Bell {
    /// What can be watched.
    type Socket: Clone + Debug;

    /// Whether `socket` is the one that is `watched`.
    fn is_same(watched: &Self::Socket, socket: &Self::Socket) -> bool;

    fn ring(&self);

    /// Blocks until `until`, until it rings, or until there is something to read on the socket `watch`. May return earlier, with
    /// neither.
    fn wait(&self, until: Instant, watch: Option<&Self::Socket>) -> Heard;

    fn silence(&self);
}

/// What ended a wait. Both are `false` if it was time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Heard {
    pub(crate) rung: bool,
    pub(crate) readable: bool,
}

/// What ended a sleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Woken {
    /// There is something to read, or the connection is over.
    Readable,
    /// Another thread has called [`Alarm::wake`].
    Called,
    Time,
}

impl<B: Bell> Alarm<B> {
    pub(crate) fn new(bell: B) -> Self {
        Self { sleep: Mutex::new(None), ringing: AtomicBool::new(false), bell }
    }

    /// True if the supervisor looks by `by` without being woken, and watches `socket`, if there is one, until then; a sleep that
    /// ends within `soon` needs to watch nothing. Call it after the change that the supervisor is to see.
    pub(crate) fn attends(&self, by: Instant, socket: Option<&B::Socket>, soon: Duration) -> bool {
        let sleep = self.sleep.lock();
        let Some(Sleep { until, watch }) = &*sleep else { return false };
        let watches = || match (socket, watch) {
            (Some(socket), Some(watch)) => B::is_same(watch, socket),
            (None, _) => true,
            (Some(_), None) => false,
        };
        *until <= by && (watches() || *until <= Instant::now() + soon)
    }

    /// Wakes the supervisor; if it is awake, keeps it from falling asleep.
    pub(crate) fn wake(&self) {
        if !self.ringing.swap(true, SeqCst) {
            self.bell.ring();
        }
    }

    /// Sleeps until `until`, until another thread wakes this one, or until there is something to read on `watch`.
    pub(crate) fn sleep(&self, until: Instant, watch: Option<&B::Socket>) -> Woken {
        *self.sleep.lock() = Some(Sleep { until, watch: watch.cloned() });
        let Heard { rung, readable } = self.bell.wait(until, watch);
        let former = self.sleep.lock().take();
        drop(former);
        if rung {
            self.bell.silence();
        }
        // After the bell is silent, so that the next one to ring it is heard. It is a swap and not a store: a swap reads what
        // the last one wrote who found it ringing, and so this thread sees what that one had changed before.
        self.ringing.swap(false, SeqCst);
        match (readable, rung) {
            (true, _) => Woken::Readable,
            (false, true) => Woken::Called,
            (false, false) => Woken::Time,
        }
    }
}
