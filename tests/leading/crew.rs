//! Leaders for the tests: what their closures do is decided by the test, and what happens to them is told by channels.

use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded, never, select, unbounded};
use dsync::{Leader, LeaderEvent, LeaderOptions, Lock, MemoryManager, MemoryServer, SyncManager, Tenure};
use parking_lot::Mutex;

use crate::common::{PATIENCE, count_locks, eventually, number_of};

/// A server, and what an operator can do and see there. All leaders want the lock `x`.
pub(crate) trait World: Send + Sync {
    fn new_manager(&self) -> Arc<dyn SyncManager>;

    /// Takes the lock `x` from its holder.
    fn take_away(&self);

    /// How many sessions wait for the lock `x`.
    fn waiting(&self) -> usize;

    /// As [`take_away`](Self::take_away), if there is a holder.
    fn strike(&self);

    /// True if a holder's channel is closed before another one can have the lock, whatever happens.
    fn announces_first(&self) -> bool;
}

impl dyn World + '_ {
    pub(crate) fn manager(&self) -> Arc<dyn SyncManager> {
        let manager = self.new_manager();
        manager.start().unwrap();
        manager
    }

    pub(crate) fn wait_for_waiters(&self, count: usize) {
        eventually(&format!("{count} waiters"), || self.waiting() == count);
    }
}

pub(crate) struct Memory(MemoryServer);

impl Memory {
    pub(crate) fn new() -> Self {
        Self(MemoryServer::new())
    }
}

impl World for Memory {
    fn new_manager(&self) -> Arc<dyn SyncManager> {
        Arc::new(MemoryManager::on(&self.0))
    }

    fn take_away(&self) {
        assert!(self.0.revoke("x"), "somebody holds it");
    }

    fn strike(&self) {
        self.0.revoke("x");
    }

    fn waiting(&self) -> usize {
        self.0.waiting("x")
    }

    fn announces_first(&self) -> bool {
        true
    }
}

/// A database of its own, in which the tests use the key `x` only.
pub(crate) struct Postgres {
    operator: Mutex<::postgres::Client>,
    database: support::Database<'static>,
    /// How many sessions the locks of a manager share.
    shared_sessions: u32,
}

impl Postgres {
    pub(crate) fn new(shared_sessions: u32) -> Self {
        let database = support::Database::fresh().unwrap();
        Self { operator: Mutex::new(database.client().unwrap()), database, shared_sessions }
    }

    pub(crate) fn url(&self) -> String {
        self.database.url()
    }

    pub(crate) fn config(&self) -> dsync::Config {
        let config = dsync::Config::from_url(&self.url()).unwrap();
        // Slices and heartbeats shorter than by default, so that a test sees several of them; and time for a busy machine.
        config
            .wait_slice(Duration::from_secs(1))
            .connect_timeout(Duration::from_secs(30))
            .release_timeout(Duration::from_secs(20))
            .heartbeat(Duration::from_millis(200))
            .shared_sessions(self.shared_sessions)
    }

    pub(crate) fn run(&self, statement: &str) {
        self.operator.lock().batch_execute(statement).unwrap();
    }

    /// Counts what `column` says of the database's advisory locks.
    fn count(&self, column: &str) -> i64 {
        count_locks(&mut self.operator.lock(), column, self.shared_sessions)
    }
}

impl World for Postgres {
    fn new_manager(&self) -> Arc<dyn SyncManager> {
        Arc::new(dsync::PostgresManager::new(self.config()).unwrap())
    }

    fn take_away(&self) {
        // Between two slices one that waits has an advisory lock too, the turnstile.
        let x = number_of("'x'");
        let holder = format!("CASE WHEN granted AND of.id = {x} THEN pg_terminate_backend(pid) END");
        assert_eq!(self.count(&holder), 1, "one holder");
    }

    fn waiting(&self) -> usize {
        self.count("CASE WHEN NOT granted THEN pid END").try_into().unwrap()
    }

    fn strike(&self) {
        self.count("CASE WHEN granted THEN pg_terminate_backend(pid) END");
    }

    /// What is terminated is free at that instant; the holder hears of it some milliseconds later.
    fn announces_first(&self) -> bool {
        false
    }
}

/// A closure that has begun.
pub(crate) struct Begun {
    pub(crate) tenure: Tenure,
    leave: Sender<Exit>,
}

enum Exit {
    Return,
    Panic(&'static str),
}

impl Begun {
    pub(crate) fn returns(&self) {
        self.leave.send(Exit::Return).unwrap();
    }

    pub(crate) fn panics(&self, message: &'static str) {
        self.leave.send(Exit::Panic(message)).unwrap();
    }

    pub(crate) fn token(&self) -> i64 {
        self.tenure.term().token().unwrap()
    }

    /// Waits for the signal to stop.
    #[track_caller]
    pub(crate) fn is_told_to_stop(&self) {
        let heard = self.tenure.stopping().recv_timeout(PATIENCE);
        assert_eq!(heard, Err(RecvTimeoutError::Disconnected), "the signal to stop");
        assert!(self.tenure.must_stop() && self.tenure.wait_timeout(Duration::ZERO));
    }

    pub(crate) fn may_go_on(&self) -> bool {
        !self.tenure.must_stop()
    }
}

/// What a closure does when it is told to stop.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Manner {
    /// It returns.
    Heeds,
    /// It goes on until the test lets it return.
    Ignores,
}

/// A process that wants to lead.
pub(crate) struct Candidate {
    pub(crate) leader: Leader,
    pub(crate) manager: Arc<dyn SyncManager>,
    pub(crate) lock: Arc<dyn Lock>,
    begun: Receiver<Begun>,
    events: Receiver<LeaderEvent>,
}

impl Candidate {
    pub(crate) fn new(world: &dyn World, manner: Manner) -> Self {
        Self::with(world, manner, quick())
    }

    pub(crate) fn with(world: &dyn World, manner: Manner, options: LeaderOptions) -> Self {
        Self::of(world.manager(), manner, options)
    }

    pub(crate) fn of(manager: Arc<dyn SyncManager>, manner: Manner, options: LeaderOptions) -> Self {
        let (tell, events) = unbounded();
        let options = options.on_event(move |event| drop(tell.send(event.clone())));
        Self::silent(manager, manner, options, events)
    }

    /// One whose callback, if it has one, tells by `events`.
    pub(crate) fn silent(
        manager: Arc<dyn SyncManager>,
        manner: Manner,
        options: LeaderOptions,
        events: Receiver<LeaderEvent>,
    ) -> Self {
        let lock = manager.lock("x").unwrap();
        let (sender, begun) = unbounded();
        let work = closure(manner, sender);
        let leader = Leader::start_with(Arc::clone(&lock), options, work).unwrap();
        Self { leader, manager, lock, begun, events }
    }

    /// Waits until the closure begins.
    #[track_caller]
    pub(crate) fn begins(&self) -> Begun {
        self.begun.recv_timeout(PATIENCE).unwrap_or_else(|_| {
            panic!("the closure does not begin: {:?}, {:?}, {:?}", self.leader, self.lock, self.lock.holder())
        })
    }

    pub(crate) fn has_not_begun(&self) -> bool {
        self.begun.is_empty()
    }

    /// The next event. Who else leads is left out: when that is noticed is a matter of time.
    #[track_caller]
    pub(crate) fn next_event(&self) -> LeaderEvent {
        loop {
            match self.events.recv_timeout(PATIENCE).expect("an event") {
                LeaderEvent::AnotherLeads(_) => {}
                event => return event,
            }
        }
    }

    /// The next event, as its name and what is in it.
    #[track_caller]
    pub(crate) fn hears(&self) -> String {
        match self.next_event() {
            LeaderEvent::Gained { .. } => "gained".to_owned(),
            LeaderEvent::Lost(_) => "lost".to_owned(),
            LeaderEvent::SteppedDown => "stepped down".to_owned(),
            LeaderEvent::Returned => "returned".to_owned(),
            LeaderEvent::Panicked(message) => format!("panicked: {message}"),
            LeaderEvent::Error(error) => format!("error: {:?}", error.kind()),
            LeaderEvent::Stopped => "stopped".to_owned(),
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn events(&self) -> &Receiver<LeaderEvent> {
        &self.events
    }
}

/// Options with short pauses.
pub(crate) fn quick() -> LeaderOptions {
    LeaderOptions::new().stand_back(Duration::from_millis(50)).watch_interval(Duration::from_millis(100))
}

pub(crate) fn closure(manner: Manner, begun: Sender<Begun>) -> impl FnMut(&Tenure) + Send + 'static {
    move |tenure| {
        let (leave, left) = bounded(1);
        // Nobody wants to know any more when the test is over.
        let _ = begun.send(Begun { tenure: tenure.clone(), leave });
        let deaf = never();
        let stopping = if manner == Manner::Heeds { tenure.stopping() } else { &deaf };
        select! {
            recv(stopping) -> _ => {}
            recv(left) -> exit => {
                if let Ok(Exit::Panic(message)) = exit {
                    panic!("{message}");
                }
            }
        }
    }
}
