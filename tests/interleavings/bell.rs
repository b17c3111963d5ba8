//! A bell that is no descriptor, and a time that passes when nothing else happens.

use std::sync::LazyLock;
use std::time::{Duration, Instant};

use loom::sync::{Condvar, Mutex};

use crate::alarm::{Bell, Heard};

/// Sockets are known by their numbers.
pub(crate) const SOCKETS: usize = 2;

/// The same in all runs.
static START: LazyLock<Instant> = LazyLock::new(Instant::now);

/// A time that has come.
pub(crate) fn now() -> Instant {
    *START
}

/// A time that comes while somebody sleeps.
pub(crate) fn later() -> Instant {
    *START + Duration::from_secs(3_600)
}

/// A time that does not come.
pub(crate) fn never() -> Instant {
    *START + Duration::from_secs(1_000 * 3_600)
}

/// What a model's supervisor sleeps on.
#[derive(Debug)]
pub(crate) struct ModelBell {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    rung: bool,
    /// Which connections are over.
    over: [bool; SOCKETS],
}

impl ModelBell {
    pub(crate) fn new() -> Self {
        Self { state: Mutex::default(), changed: Condvar::new() }
    }

    /// Ends the connection of `socket`.
    pub(crate) fn hang_up(&self, socket: usize) {
        self.state.lock().unwrap().over[socket] = true;
        self.changed.notify_all();
    }

    pub(crate) fn is_over(&self, socket: usize) -> bool {
        self.state.lock().unwrap().over[socket]
    }
}

impl Bell for ModelBell {
    type Socket = usize;

    fn is_same(watched: &usize, socket: &usize) -> bool {
        watched == socket
    }

    fn ring(&self) {
        self.state.lock().unwrap().rung = true;
        self.changed.notify_all();
    }

    fn wait(&self, until: Instant, watch: Option<&usize>) -> Heard {
        let mut state = self.state.lock().unwrap();
        loop {
            let heard = Heard { rung: state.rung, readable: watch.is_some_and(|socket| state.over[*socket]) };
            if heard.rung || heard.readable || until < never() {
                return heard;
            }
            state = self.changed.wait(state).unwrap();
        }
    }

    fn silence(&self) {
        self.state.lock().unwrap().rung = false;
    }
}

/// A bell that the alarm and the model share.
impl<B: Bell> Bell for std::sync::Arc<B> {
    type Socket = B::Socket;

    fn is_same(watched: &B::Socket, socket: &B::Socket) -> bool {
        B::is_same(watched, socket)
    }

    fn ring(&self) {
        (**self).ring();
    }

    fn wait(&self, until: Instant, watch: Option<&B::Socket>) -> Heard {
        (**self).wait(until, watch)
    }

    fn silence(&self) {
        (**self).silence();
    }
}
