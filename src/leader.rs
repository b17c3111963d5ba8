//! A leader: work that one process of a service does, for as long as that process has the lock.

mod back_off;
mod runner;
mod shared;
mod teller;
mod watcher;

use std::convert::Infallible;
use std::fmt;
use std::sync::Arc;
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant, SystemTime};

use crossbeam_channel::{Receiver, RecvTimeoutError, bounded, unbounded};

use self::back_off::BackOff;
use self::runner::Runner;
use self::shared::{Shared, StopReason};
use self::teller::Teller;
use self::watcher::Watcher;
use crate::error::{Error, ErrorKind, Result, chain};
use crate::lock::Lock;
use crate::loss::Loss;
use crate::process::Origin;
use crate::term::Term;
use crate::view::Holder;

/// Runs a closure while this process leads: while it has a lock that all processes of a service compete for.
///
/// The closure runs on a thread of its own, once in each term, and gets the [`Tenure`]. That tells it when it must stop: when the
/// term is lost, when the leader [steps down](Self::step_down), is [asked to resign](Lock::request_resignation), or is
/// [stopped](Self::stop). **The lock is given back only when the closure has returned**: so no other process leads while it is still
/// at work, unless the term was lost, and of that it has had its signal first.
///
/// ```
/// use std::time::Duration;
/// use dsync::{Leader, MemoryManager, SyncManager};
///
/// let manager = MemoryManager::new();
/// manager.start()?;
/// let (began, begins) = dsync::crossbeam_channel::bounded(1);
///
/// let leader = Leader::start(manager.lock("service/billing/leader")?, move |tenure| {
///     let _ = began.try_send(());
///     // One piece of work each second, until this process must not lead any more.
///     while !tenure.wait_timeout(Duration::from_secs(1)) {
///         println!("sending the invoices that are due, in term {:?}", tenure.term().token());
///     }
/// })?;
///
/// assert!(begins.recv().is_ok() && leader.status().leads);
/// leader.stop(Duration::from_secs(5))?; // waits until the closure has returned and the lock is given back
/// # Ok::<(), dsync::Error>(())
/// ```
///
/// # What ends a term
///
/// | what happens | event | this process stands again |
/// |---|---|---|
/// | the term is lost | [`Lost`](LeaderEvent::Lost), at once | when the closure has returned |
/// | the closure returns by itself | [`Returned`](LeaderEvent::Returned) | after [`stand_back`](LeaderOptions::stand_back) |
/// | [`step_down`](Self::step_down), or another process asked for it | [`SteppedDown`](LeaderEvent::SteppedDown), when the lock was given back | after `stand_back` |
/// | the closure panics | [`Panicked`](LeaderEvent::Panicked) | after a [back-off](LeaderOptions::back_off) that grows |
/// | [`stop`](Self::stop), a drop, or the manager stops | [`Stopped`](LeaderEvent::Stopped), as the last one | never |
///
/// A closure that ignores its signal keeps the lock from all others for as long as the term lasts. After a loss it does not: then
/// another process leads while the closure is still at work here. So let each piece of work be short, look at the tenure between
/// two of them, and put what must not happen twice behind the fence of [`Tenure::term`].
///
/// A clone of the tenure may go to other threads. The closure should wait for these before it returns, since its return is
/// what gives the lock back.
///
/// With a [grace](crate::LockOptions::grace) the term's [`warned`](Term::warned) channel tells of a loss that is near; whether to stop then is
/// up to the closure.
///
/// The lock must not have a claim in this process, by [`Lock::lock`] or as [`leadership_lock`](crate::leadership_lock) has one: the leader would
/// wait for its end.
///
/// # Threads
///
/// A leader has one thread for the closure, named after the lock, and up to two more: one that tells events, and one that asks
/// the server now and then who leads, and whether this process should resign. All methods may be called from any thread, also from the closure
/// and from the callback of events. Several leaders on one lock in one process take turns like those of several processes.
///
/// Dropping it is [stopping](Self::stop) it with a timeout of 1 s; what went wrong is only logged. In a forked child it touches nothing.
#[must_use = "the closure is stopped as soon as the leader is dropped"]
pub struct Leader {
    shared: Arc<Shared>,
    origin: Origin,
    /// Of the closure.
    runner: ThreadId,
    /// Disconnects when the closure has returned for good and the lock was given back.
    ended: Receiver<Infallible>,
    /// Of the callback; and what disconnects when it was told of the last event.
    teller: Option<(ThreadId, Receiver<Infallible>)>,
}

impl Leader {
    /// Begins to stand for the leadership, with the default options. Returns at once.
    ///
    /// The closure is called for each term. It need not be unwind safe: after a panic it is called again for the next term, and must
    /// stand that.
    ///
    /// # Errors
    /// - [`SyncManagerStopped`](ErrorKind::SyncManagerStopped), [`OtherProcess`](ErrorKind::OtherProcess).
    /// - [`SessionUnavailable`](ErrorKind::SessionUnavailable): a thread could not be started.
    /// - [`InvalidConfig`](ErrorKind::InvalidConfig): the lock is shared, or a semaphore.
    pub fn start(lock: Arc<dyn Lock>, work: impl FnMut(&Tenure) + Send + 'static) -> Result<Self> {
        Self::start_with(lock, LeaderOptions::new(), work)
    }

    /// As [`start`](Self::start), with options.
    ///
    /// # Errors
    /// As `start`, and [`InvalidConfig`](ErrorKind::InvalidConfig): an option cannot work.
    pub fn start_with(
        lock: Arc<dyn Lock>,
        options: LeaderOptions,
        work: impl FnMut(&Tenure) + Send + 'static,
    ) -> Result<Self> {
        options.validate()?;
        if lock.is_shared() {
            return Err(Error::is_shared(lock.key(), "leadership"));
        }
        // Fails in a forked child.
        lock.queue()?;
        if lock.is_stopped() {
            return Err(Error::stopped());
        }
        let key = lock.key().to_owned();
        let (callback, watch_interval) = (options.on_event.clone(), options.watch_interval);
        let asks = lock.resignation_interval();
        let shared = Shared::new(lock);

        let (tell, told) = unbounded();
        let tell = callback.is_some().then_some(tell);
        let teller = match callback {
            None => None,
            Some(callback) => {
                let teller = Teller::new(Arc::clone(&shared), callback, told);
                Some(spawn("events", &key, move || teller.run())?)
            }
        };
        let (changed, changes) = bounded(1);
        if tell.is_some() || asks.is_some() {
            let looks = tell.is_some().then_some(watch_interval);
            let watcher = Watcher::new(Arc::clone(&shared), tell.clone(), changes, asks, looks);
            spawn("watch", &key, move || watcher.run())?;
        }
        let runner = Runner {
            shared: Arc::clone(&shared),
            work: Box::new(work),
            tell,
            changed,
            back_off: BackOff::new(options.back_off),
            stand_back: options.stand_back,
        };
        let (runner, ended) = spawn("dsync", &key, move || runner.run())?;
        Ok(Self { shared, origin: Origin::here(), runner, ended, teller })
    }

    /// What this process knows of the leadership, for a health endpoint. Does not block and asks no server.
    ///
    /// In a forked child it is that of a leader which was stopped.
    #[must_use]
    pub fn status(&self) -> LeaderStatus {
        if self.origin.is_here() { self.shared.status() } else { LeaderStatus::default() }
    }

    /// Ends the present term, and lets others lead: the closure is told to stop, the lock is given back when it has returned, and this
    /// process stands again after [`stand_back`](LeaderOptions::stand_back). Gives `false`, and does nothing, if this process does not
    /// lead now. Does not block.
    ///
    /// Those that wait for the lock at that moment have it first. If none does, this process leads again.
    pub fn step_down(&self) -> bool {
        self.origin.is_here() && self.shared.end_term(StopReason::StepDown)
    }

    /// Stops for good: the closure is told to stop, and the lock is given back when it has returned, or nothing stands for it any
    /// more. Waits for that up to `timeout`, and in what is left of it for the callback to be told of the last event.
    ///
    /// To give the lock back takes up to the manager's release timeout (2 s by default). Stopping twice does no harm.
    ///
    /// # Errors
    /// - [`TimedOut`](ErrorKind::TimedOut): the closure has not returned. The lock is given back when it does. Also at once where the
    ///   closure itself calls this.
    /// - [`OtherProcess`](ErrorKind::OtherProcess): the leader was made before a `fork`, by the parent process.
    pub fn stop(&self, timeout: Duration) -> Result<()> {
        self.origin.check(format_args!("the leader"))?;
        self.shared.stop();
        let key = self.shared.lock.key();
        let here = thread::current().id();
        if here == self.runner {
            let text = format!(
                "the closure of {key:?} stops its own leader; the lock is given back when it returns"
            );
            return Err(Error::new(ErrorKind::TimedOut, text));
        }
        let begun = Instant::now();
        if self.ended.recv_timeout(timeout) == Err(RecvTimeoutError::Timeout) {
            let text = format!(
                "the closure of {key:?} has not returned within {timeout:?}; the lock is given back when it does"
            );
            return Err(Error::new(ErrorKind::TimedOut, text));
        }
        if let Some((teller, told)) = &self.teller
            && here != *teller
        {
            // The lock is given back, whatever the callback does.
            let _ = told.recv_timeout(timeout.saturating_sub(begun.elapsed()));
        }
        Ok(())
    }
}

impl Drop for Leader {
    fn drop(&mut self) {
        const GOODBYE: Duration = Duration::from_secs(1);
        if !self.origin.is_here() {
            // A mutex of the parent's may be locked for ever here.
            std::mem::forget((Arc::clone(&self.shared), self.ended.clone(), self.teller.clone()));
        } else if thread::current().id() == self.runner {
            self.shared.stop();
        } else if let Err(error) = self.stop(GOODBYE) {
            log::warn!("stopping a leader: {}", chain(&error));
        }
    }
}

impl fmt::Debug for Leader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Leader")
            .field("key", &self.shared.lock.key())
            .field("status", &self.status())
            .finish_non_exhaustive()
    }
}

/// Starts a thread, and gives what disconnects at its end.
fn spawn(
    what: &str,
    key: &str,
    work: impl FnOnce() + Send + 'static,
) -> Result<(ThreadId, Receiver<Infallible>)> {
    let (alive, ended) = bounded::<Infallible>(0);
    let name = format!("{what}:{}", key.replace('\0', ""));
    let thread = thread::Builder::new().name(name).spawn(move || {
        // Dropped last, and after a panic, too.
        let _alive = alive;
        work();
    });
    let thread = thread.map_err(|error| {
        let message = "a thread of the leader could not be started; is the limit of threads reached?";
        Error::new(ErrorKind::SessionUnavailable, message).with_source(error)
    })?;
    Ok((thread.thread().id(), ended))
}

/// One term of leading, as the closure of a [`Leader`] sees it: with which token it leads, and whether it must stop.
///
/// Clone it for the threads of the closure's work.
#[derive(Clone)]
pub struct Tenure {
    term: Term,
    stopping: Receiver<Infallible>,
}

impl Tenure {
    /// The term, for its fencing token and its fence. Its own [`Lost`](crate::Lost) channel tells of a loss only.
    pub fn term(&self) -> &Term {
        &self.term
    }

    /// True if the work must stop: the term is lost, or the leader steps down or was stopped. It stays so. Does not block.
    #[must_use]
    pub fn must_stop(&self) -> bool {
        // After a freeze of the process this thread may run before the one that closes the channel.
        self.stopping.try_recv().is_err_and(|error| error.is_disconnected()) || !self.term.is_held()
    }

    /// The channel that disconnects when the work must stop, for `select!`. It never carries a message.
    ///
    /// After a loss it disconnects before this process lets go of the lock.
    ///
    /// ```
    /// use std::time::Duration;
    /// use dsync::crossbeam_channel::{select, tick};
    /// use dsync::Tenure;
    ///
    /// fn lead(tenure: &Tenure) {
    ///     let every_minute = tick(Duration::from_secs(60));
    ///     loop {
    ///         select! {
    ///             recv(tenure.stopping()) -> _ => return,
    ///             recv(every_minute) -> _ => { /* one piece of work */ }
    ///         }
    ///     }
    /// }
    /// ```
    pub fn stopping(&self) -> &Receiver<Infallible> {
        &self.stopping
    }

    /// Blocks until the work must stop, or `timeout` has passed; `true` if it must stop.
    #[must_use]
    pub fn wait_timeout(&self, timeout: Duration) -> bool {
        self.stopping.recv_timeout(timeout) == Err(RecvTimeoutError::Disconnected) || self.must_stop()
    }
}

impl fmt::Debug for Tenure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tenure").field("must_stop", &self.must_stop()).field("term", &self.term).finish()
    }
}

/// What a [`Leader`] tells its callback: see [`LeaderOptions::on_event`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum LeaderEvent {
    /// This process leads, and the closure begins. It may be at work before the callback is told: they run on two threads.
    Gained {
        /// The fencing token of the term: see [`Term::token`].
        token: Option<i64>,
    },
    /// The term was lost. The closure may be still at work: [`LeaderStatus::at_work`] tells.
    Lost(Loss),
    /// This process has stepped down: the closure has returned, and the lock was given back.
    SteppedDown,
    /// The closure has returned by itself, and the lock was given back.
    Returned,
    /// The closure has panicked, with this message. The lock was given back, unless it had been lost.
    Panicked(String),
    /// Another process leads: one that was not told of before, or in a new term.
    AnotherLeads(Holder),
    /// Something went wrong. The leader goes on, unless the manager has stopped. What goes wrong again and again in the same way
    /// is told once.
    Error(Error),
    /// The leader was stopped, and does not stand for the lock any more. The last event.
    Stopped,
}

impl fmt::Display for LeaderEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gained { token: Some(token) } => write!(f, "this process leads, with token {token}"),
            Self::Gained { token: None } => f.write_str("this process leads"),
            Self::Lost(loss) => write!(f, "the leadership was lost: {loss}"),
            Self::SteppedDown => f.write_str("this process has stepped down"),
            Self::Returned => f.write_str("the work has returned, and the leadership was given back"),
            Self::Panicked(message) => write!(f, "the work has panicked: {message}"),
            Self::AnotherLeads(holder) => write!(f, "another process leads: {holder}"),
            Self::Error(error) => f.write_str(&chain(error)),
            Self::Stopped => f.write_str("the leader was stopped"),
        }
    }
}

/// What a [`Leader`] is about at one moment: see [`Leader::status`].
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct LeaderStatus {
    /// True if this process leads, as far as it knows.
    pub leads: bool,
    /// The fencing token of the term in which it leads.
    pub token: Option<i64>,
    /// When that term began, by this machine's clock.
    pub since: Option<SystemTime>,
    /// True if the closure runs. If it does while this process does not lead, it has not heeded its signal yet.
    pub at_work: bool,
    /// True until the leader was stopped, or its manager.
    pub stands: bool,
    /// In how many terms this leader has led.
    pub terms: u64,
    /// How the last term was lost that was lost.
    pub last_loss: Option<Loss>,
    /// With which message the closure has panicked the last time.
    pub last_panic: Option<String>,
    /// What went wrong the last time, beside those: while this leader waits for the lock, why the server could not be asked for it.
    pub last_error: Option<Error>,
    /// Who led when this leader looked the last time. It looks only where it has a callback and does not lead itself: see
    /// [`LeaderOptions::watch_interval`].
    pub leader: Option<Holder>,
}

/// What is told of events.
type Callback = Arc<dyn Fn(&LeaderEvent) + Send + Sync>;

/// How a [`Leader`] behaves.
///
/// ```
/// use std::time::Duration;
/// use dsync::LeaderOptions;
///
/// let options = LeaderOptions::new()
///     .on_event(|event| println!("{event}"))
///     .stand_back(Duration::from_secs(5));
/// # drop(options);
/// ```
#[derive(Clone)]
#[must_use]
pub struct LeaderOptions {
    on_event: Option<Callback>,
    stand_back: Duration,
    back_off: (Duration, Duration),
    watch_interval: Duration,
}

impl Default for LeaderOptions {
    fn default() -> Self {
        Self {
            on_event: None,
            stand_back: Duration::from_secs(1),
            back_off: (Duration::from_secs(1), Duration::from_secs(60)),
            watch_interval: Duration::from_secs(5),
        }
    }
}

impl LeaderOptions {
    /// The defaults.
    pub fn new() -> Self {
        Self::default()
    }

    /// Tells `callback` of each [`LeaderEvent`], one after another, in their order.
    ///
    /// It is called on a thread of its own, so it may block, which holds up later events only; and may call the leader. If it
    /// panics, the log says so, and it is called again for the next event. Defaults to none.
    pub fn on_event(mut self, callback: impl Fn(&LeaderEvent) + Send + Sync + 'static) -> Self {
        self.on_event = Some(Arc::new(callback));
        self
    }

    /// How long to let others go first, after the closure has returned by itself or the leader has stepped down. Defaults to 1 s.
    pub fn stand_back(mut self, pause: Duration) -> Self {
        self.stand_back = pause;
        self
    }

    /// How long to wait after a closure has panicked: `first`, and twice as long after each further one, up to `longest`, which
    /// must not be zero. A `first` of zero means at once, and the next pause is 1 ms. A term
    /// that ends otherwise begins anew with `first`, and so does one that lasted for `longest` at least. Defaults to 1 s and 60 s.
    pub fn back_off(mut self, first: Duration, longest: Duration) -> Self {
        self.back_off = (first, longest);
        self
    }

    /// How often to ask who leads, for [`LeaderEvent::AnotherLeads`] and [`LeaderStatus::leader`]: one short statement on a session of the pool,
    /// only while this process does not lead, and only where there is a [callback](Self::on_event). Defaults to 5 s.
    pub fn watch_interval(mut self, interval: Duration) -> Self {
        self.watch_interval = interval;
        self
    }

    fn validate(&self) -> Result<()> {
        let (first, longest) = self.back_off;
        let problem = if first > longest {
            "the first back-off is longer than the longest one"
        } else if longest.is_zero() {
            "the longest back-off is zero; choose some seconds"
        } else if self.watch_interval.is_zero() {
            "the watch interval is zero; choose some seconds"
        } else {
            return Ok(());
        };
        Err(Error::new(ErrorKind::InvalidConfig, problem))
    }
}

impl fmt::Debug for LeaderOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LeaderOptions")
            .field("on_event", &self.on_event.as_ref().map(|_| ".."))
            .field("stand_back", &self.stand_back)
            .field("back_off", &self.back_off)
            .field("watch_interval", &self.watch_interval)
            .finish()
    }
}
