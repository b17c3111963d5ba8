//! The contract of a lock, and its options.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crossbeam_channel::Sender;
use serde_core::Serialize;

use crate::context::Context;
use crate::error::{Error, ErrorKind, Result};
use crate::guard::{Guarded, LockGuard};
use crate::key::{Key, MAX_PERMITS};
use crate::loss::{Loss, Lost};
use crate::mode::Mode;
use crate::once::{self, Once, Period, Run};
use crate::telling::panics;
use crate::term::Term;
use crate::view::Holder;

/// A distributed lock: one for all processes that use the same key on the same database.
///
/// One of them has it at a time; or many do that [share](crate::PostgresManager::shared_lock) it, or as many as a
/// [semaphore](crate::PostgresManager::semaphore) has permits. What is said here goes for all where it does not name one of them.
///
/// Most code needs `acquire` and [`try_acquire`](Self::try_acquire) only, which give a [`LockGuard`]:
///
/// ```
/// use std::time::Duration;
/// use dsync::{MemoryManager, SyncManager};
///
/// # let manager = MemoryManager::new();
/// # manager.start()?;
/// let lock = manager.lock("nightly-report")?;
/// match lock.try_acquire()? {
///     Some(guard) => println!("at work, with the token {:?}", guard.term().token()),
///     None => println!("another one is at it"),
/// }
/// # Ok::<(), dsync::Error>(())
/// ```
///
/// The rest is one level below: a claim that the library keeps up for the process until it is released.
///
/// # Claims and terms
///
/// The first [`lock`](Self::lock) or [`try_lock`](Self::try_lock) begins a **claim**, and the claim lasts until
/// [`release`](Self::release), whatever the call returned: while it lasts, the lock is being acquired, watched and, if it
/// was lost, acquired again in the background. A **term** is one unbroken stretch of holding within a claim. Each term
/// has a [`lost`](Self::lost) channel of its own.
///
/// A claim belongs to the manager, not to the handle: dropping the handle does not end it, and asking the manager for the same key finds it
/// again. Beside a claim, guards of the same lock are as those of another process: they wait for the claim's term to end, and a claim waits
/// for theirs; of a shared lock they have terms at the same time, and of a semaphore each has a permit. A manager has a claim of a key one
/// way, shared or not, and refuses one the other way with [`WouldDeadlock`](ErrorKind::WouldDeadlock).
///
/// # Safety under failure
///
/// It is **not** safe to assume that the lock is held until `release`: the session may be terminated, the network cut,
/// the process frozen. Watch the lost channel, and stop the work when it disconnects.
///
/// # Threads
///
/// All methods may be called from any thread. The lock is held by the *process*, not by a thread: `lock` on a lock that
/// is held returns at once, in any thread, and one `release` ends the claim for all of them. Coordinating threads of one
/// process is the application's task; or that of guards, which exclude threads too, unless the lock is shared or a semaphore.
///
/// This library alone implements it, so that it can grow.
pub trait Lock: Guarded + Send + Sync + fmt::Debug {
    /// The key in text, as [`Key`](crate::Key) displays it.
    fn key(&self) -> &str;

    /// Gives a guard if the lock is free now, and `None` if another session, or another thread of this process, has it or waits for it
    /// here, or while a [takeover grace](crate::Config::takeover) goes on. A shared lock is free for those who share it if no writer has it or
    /// waits for it, and a semaphore if one of its permits is
    /// free and nobody waits for one. It makes one attempt, with the time that an attempt has (`connect_timeout` and `heartbeat_timeout`
    /// together at the most), and leaves nothing behind if that fails.
    ///
    /// # Errors
    /// Those of `acquire` but for `TimedOut` and `Cancelled`; [`SessionUnavailable`](ErrorKind::SessionUnavailable) also where the server
    /// could not be asked; and
    /// - [`SessionRefused`](ErrorKind::SessionRefused): trying again will not help: wrong password, missing database or
    ///   rights, a standby, a transaction pooler.
    /// - [`PoolExhausted`](ErrorKind::PoolExhausted): the manager has no session left.
    /// - [`InvalidKey`](ErrorKind::InvalidKey): another key has the same hash.
    fn try_acquire(&self) -> Result<Option<LockGuard>> {
        LockGuard::try_acquire(self)
    }

    /// True if the claim of this process has the lock, as far as this process knows: see [`Term::is_held`]. A guard is no claim: it
    /// has an [`is_held`](LockGuard::is_held) of its own.
    #[must_use]
    fn is_held(&self) -> bool {
        self.term().is_some_and(|term| term.is_held())
    }

    /// Acquires the lock, waiting until it is held or `context` ends. Returns at once if it is held already, also where
    /// `context` has ended: a loop that is to end with its context must look at [`Context::check`] as well.
    ///
    /// If the lock is not held and `context` has ended before the call, the claim begins and the call fails at once, even
    /// if the lock is free: a cancelled call does not acquire. While the server cannot be reached the call goes on waiting.
    ///
    /// Whatever it returns, the claim goes on in the background until [`release`](Self::release), which must therefore
    /// follow. (Where another thread is releasing the lock at this moment, the call first waits for that; if `context` ends
    /// meanwhile, there is no claim yet.)
    ///
    /// A cancelled call returns at once; where it has to be told by a server that does not answer, within 1 s.
    ///
    /// # Errors
    /// - [`TimedOut`](ErrorKind::TimedOut), [`Cancelled`](ErrorKind::Cancelled): the context ended first; the last problem
    ///   on the way, if any, is the source.
    /// - [`Released`](ErrorKind::Released): another thread released the claim.
    /// - [`SyncManagerStopped`](ErrorKind::SyncManagerStopped).
    /// - [`SessionUnavailable`](ErrorKind::SessionUnavailable): no thread could be started for the claim.
    /// - [`WouldDeadlock`](ErrorKind::WouldDeadlock): this manager has a claim of the key the other way, shared or not, or this thread has taken
    ///   a guard of it that way. No claim has begun.
    /// - [`InvalidConfig`](ErrorKind::InvalidConfig): the semaphore has another number of permits than this handle says. In memory no claim has
    ///   begun then.
    /// - [`OtherProcess`](ErrorKind::OtherProcess): the lock was made before a `fork`, by the parent process.
    fn lock(&self, context: &Context) -> Result<()>;

    /// Begins a claim as [`lock`](Self::lock) does, which **goes on in the background until [`release`](Self::release), also where
    /// this call fails**, but returns as soon as it is known that the lock cannot be had now. To take it or leave it, call
    /// [`try_acquire`](Self::try_acquire).
    ///
    /// It waits, until `context` ends, only while the server cannot be asked. A `context` whose deadline has passed before
    /// the call, as that of `Context::timeout(Duration::ZERO)` has, means *try once*: the call makes one attempt, with the
    /// time that an attempt has (`connect_timeout` and `heartbeat_timeout` together at the most), and takes a free lock. A
    /// cancelled one does not.
    ///
    /// # Errors
    /// Those of `lock`, and
    /// - [`LockUnavailable`](ErrorKind::LockUnavailable): another session holds the lock; or the lock is shared, and a writer holds it or waits for it; or
    ///   all permits of the semaphore are held, or somebody waits for one; or a takeover grace goes on, of which the text tells how long it
    ///   lasts: see [`Config::takeover`](crate::Config::takeover).
    /// - [`SessionRefused`](ErrorKind::SessionRefused): trying again will not help: wrong password, missing database or
    ///   rights, a standby, a transaction pooler.
    /// - [`PoolExhausted`](ErrorKind::PoolExhausted): the manager has no session left for this claim.
    /// - [`InvalidKey`](ErrorKind::InvalidKey): another key has the same hash.
    fn try_lock(&self, context: &Context) -> Result<()>;

    /// Waits until the lock is held, as [`lock`](Self::lock) does, but begins no claim: for threads that observe the work of
    /// another one, which may release the lock at any time.
    ///
    /// # Errors
    /// Those of `lock`; [`Released`](ErrorKind::Released) also where there is no claim, whatever `context` says.
    fn wait(&self, context: &Context) -> Result<()>;

    /// Ends the claim: stops acquiring, and gives the lock back if it is held.
    ///
    /// The [`lost`](Self::lost) channel disconnects before the server is told. Without a claim nothing happens, so
    /// calling it again is harmless. It returns within the manager's release timeout (2 s by default), whatever
    /// server and network do.
    ///
    /// # Errors
    /// [`UnlockFailed`](ErrorKind::UnlockFailed) or [`SessionUnavailable`](ErrorKind::SessionUnavailable): the server
    /// could not be told, or says that the lock was not held. The claim has ended all the same, and the server frees the
    /// lock when it notices that the session is gone, at the latest after the lease and two wait slices (25 s by default).
    fn release(&self) -> Result<()>;

    /// The channel of the claim's current term. It is disconnected if the claim does not hold the lock. A guard has a
    /// [`lost`](LockGuard::lost) of its own.
    fn lost(&self) -> Lost;

    /// The claim's current term, with its fencing token; `None` if the claim does not hold the lock. A guard has a
    /// [`term`](LockGuard::term) of its own.
    fn term(&self) -> Option<Term>;

    /// Who has the lock now, in whichever process: that of this handle's own term, another's, or `None` if nobody has it. Of several that
    /// share it, or have permits, it is the first; [`inspect`](crate::PostgresManager::inspect) shows them all. It is news of the past when
    /// it arrives: show it to people, and decide nothing by it.
    ///
    /// It takes one round trip on a session of the pool. If the server does not answer, it takes up to twice `connect_timeout`
    /// (three times that, for the manager's first session) plus the heartbeat timeout, and that once more if
    /// a session that had rested in the pool has died; on a machine that is too busy to make room for a session, `connect_timeout` more, 1 s at the least. If claims have all the sessions, it fails after 0.2 s.
    ///
    /// # Errors
    /// - [`SyncManagerStopped`](ErrorKind::SyncManagerStopped), [`OtherProcess`](ErrorKind::OtherProcess).
    /// - [`PoolExhausted`](ErrorKind::PoolExhausted): claims have all the sessions.
    /// - [`SessionUnavailable`](ErrorKind::SessionUnavailable), [`SessionRefused`](ErrorKind::SessionRefused).
    fn holder(&self) -> Result<Option<Holder>>;

    /// Asks the [`Leader`](crate::Leader) that has the lock now, in whichever process, to resign: it tells its closure to stop, gives the lock back
    /// when that has returned, and lets others go first. `true` if there is a holder to ask. Anything else than a leader that holds the
    /// lock, a guard say, does not listen.
    ///
    /// The leader hears of it within a heartbeat (by default a quarter of the lease), and a term that begins after this call
    /// is not meant. It takes one or two round trips on a session of the pool, and as long as [`holder`](Self::holder) if the server does not
    /// answer. If the connection is lost before the answer, the error says that it is not known whether the leader was asked.
    ///
    /// # Errors
    /// Those of `holder`, and [`InvalidConfig`](ErrorKind::InvalidConfig): this manager does without the catalog, or this lock without
    /// a token, or this is a semaphore or the lock that others may share, by which nobody leads.
    ///
    /// ```
    /// # use dsync::{MemoryManager, SyncManager};
    /// # let manager = MemoryManager::new();
    /// # manager.start()?;
    /// if !manager.lock("service/billing/leader")?.request_resignation()? {
    ///     println!("nobody leads");
    /// }
    /// # Ok::<(), dsync::Error>(())
    /// ```
    fn request_resignation(&self) -> Result<bool>;

    /// Ends the session that holds the lock, in whichever process, and gives who that was; `None` if nobody holds it. The next that waits
    /// gets the lock, and not the caller. The log names the holder first. For an operator who knows that the holder hangs. The
    /// holder's work goes on, unless it heeds its lost channel.
    ///
    /// A holder of this library hears of it as [`Terminated`](crate::LossReason::Terminated), and its fenced writes are refused from the
    /// next term on that it does not share. A guard is over then, and so is a leader's term; a claim acquires the lock again when its turn comes,
    /// behind those that wait. What else the session does is ended with it: where an application's own session has the lock, that is its
    /// transaction.
    ///
    /// A session that [carries many locks](crate::Config::shared_sessions) is ended with all of them; their claims have them back in a few statements,
    /// and this one waits its turn.
    ///
    /// Of several sessions that share the lock it ends the first, whichever handle it is called on, and a writer waits for the others; of a
    /// semaphore, that of the first permit that is held. [`inspect`](crate::PostgresManager::inspect) and the view `dsync.locks` show them
    /// all. Do not call it until it gives `None`: one that has waited, and has got the lock meanwhile, would lose it too.
    ///
    /// It takes some round trips on a session of the pool, and waits for the end of the holder's session for up to half the heartbeat timeout. If the
    /// server does not answer, it takes as long as [`holder`](Self::holder). If the connection is lost before the answer, the error says that it is
    /// not known whether the session was ended.
    ///
    /// # Errors
    /// Those of `holder`, and
    /// - [`SessionRefused`](ErrorKind::SessionRefused): the role may not end sessions of the holder's role. PostgreSQL lets members of that role and
    ///   of `pg_signal_backend` do so, and superusers alone for a superuser's session ([Server Signaling
    ///   Functions](https://www.postgresql.org/docs/current/functions-admin.html#FUNCTIONS-ADMIN-SIGNAL)). Or a prepared transaction has
    ///   the lock, which has no session.
    /// - [`TimedOut`](ErrorKind::TimedOut): the session was told to end, and has not ended yet. It will when its process comes to look.
    ///
    /// ```
    /// # use dsync::{MemoryManager, SyncManager};
    /// # let manager = MemoryManager::new();
    /// # manager.start()?;
    /// match manager.lock("nightly-report")?.break_lock()? {
    ///     Some(holder) => println!("taken from {holder:?}"),
    ///     None => println!("nobody holds it"),
    /// }
    /// # Ok::<(), dsync::Error>(())
    /// ```
    fn break_lock(&self) -> Result<Option<Holder>>;

    /// When the work under this key began the last time that it succeeded, by the server's clock; `None` if nothing is recorded. See `once`.
    /// It takes as long as [`holder`](Self::holder).
    ///
    /// # Errors
    /// Those of `holder`, and [`InvalidConfig`](ErrorKind::InvalidConfig): this manager does without the catalog, or this lock without
    /// a token.
    fn last_success(&self) -> Result<Option<SystemTime>>;

    /// Forgets the last success, so that the work is due at once. `true` if there was one. Work that is being done now is recorded all
    /// the same when it succeeds. It takes as long as [`holder`](Self::holder). If the connection is lost before the answer, or the server waits
    /// for a synchronous standby for longer than the heartbeat timeout, the error says that it is not known whether it was done.
    ///
    /// # Errors
    /// As [`last_success`](Self::last_success).
    fn forget_success(&self) -> Result<bool>;

    /// Changes how many permits the [semaphore](crate::PostgresManager::semaphore) has, for all processes, and gives how many it had before. More
    /// permits are there for who waits within half a second, and at once for who comes. Of fewer, those that are held run out: nobody has one
    /// taken away, and until they are given back there may be as many holders as there were permits. For half a second more, one of them that
    /// comes free may still go to who waits.
    ///
    /// Processes that say the former number go on, by the new one; so those that run can be given the new number one after the other. The
    /// number before that is refused from now on. It takes as long as [`holder`](Self::holder). If the connection is lost before the answer, the
    /// error says that it is not known whether it was done.
    ///
    /// # Errors
    /// Those of `holder`, and [`InvalidConfig`](ErrorKind::InvalidConfig): this is no semaphore, or it cannot have that many permits.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use dsync::{MemoryManager, SyncManager};
    /// # let manager = MemoryManager::new();
    /// # manager.start()?;
    /// let gpus = manager.semaphore("gpu", 2)?;
    /// let two = [gpus.acquire(Duration::ZERO)?, gpus.acquire(Duration::ZERO)?];
    /// assert_eq!(gpus.set_permits(3)?, 2);
    /// let third = gpus.acquire(Duration::ZERO)?;
    /// # Ok::<(), dsync::Error>(())
    /// ```
    fn set_permits(&self, permits: u32) -> Result<u32>;

    /// How the most recent lost term of this handle ended; `None` if none was lost. A `release` is not a loss.
    fn last_loss(&self) -> Option<Loss>;
}

impl dyn Lock + '_ {
    /// Waits for the lock, and gives a guard of it: for a [`Duration`](std::time::Duration), until an
    /// [`Instant`](std::time::Instant), or as a [`Context`] says. A time of zero, or one that has passed before the call, means
    /// *try once*: the call makes one attempt, with the time that one of [`try_acquire`](Lock::try_acquire) has. A thread that has
    /// a guard of this lock and wants a second one waits for itself; of a shared lock it does where a writer waits, behind which the second one
    /// comes, and of a semaphore where no permit is free.
    ///
    /// An attempt that fails leaves nothing behind, and disturbs no other guard or claim. Where the server has to be told of that,
    /// it takes up to the release timeout longer.
    ///
    /// # Errors
    /// - [`TimedOut`](ErrorKind::TimedOut), [`Cancelled`](ErrorKind::Cancelled): the context ended first; the last problem
    ///   on the way, if any, is the source.
    /// - [`Lost`](ErrorKind::Lost): the lock was had, and lost before this call returned.
    /// - [`WouldDeadlock`](ErrorKind::WouldDeadlock): this thread has taken a guard of the key the other way, shared or not, and that guard is
    ///   there still.
    /// - [`SyncManagerStopped`](ErrorKind::SyncManagerStopped), [`OtherProcess`](ErrorKind::OtherProcess).
    /// - [`InvalidConfig`](ErrorKind::InvalidConfig): the semaphore has another number of permits than this handle says.
    /// - [`SessionUnavailable`](ErrorKind::SessionUnavailable): no thread could be started for the claim.
    /// - If it tries once, also [`SessionRefused`](ErrorKind::SessionRefused), [`PoolExhausted`](ErrorKind::PoolExhausted) and
    ///   [`InvalidKey`](ErrorKind::InvalidKey), as [`try_acquire`](Lock::try_acquire). A call that may wait goes on trying then.
    pub fn acquire(&self, context: impl Into<Context>) -> Result<LockGuard> {
        LockGuard::acquire(self, &context.into())
    }

    /// Waits for the lock as `acquire` does, runs `work` with the term, and releases the lock, also if `work`
    /// panics.
    ///
    /// # Errors
    /// Those of `acquire`; `work` did not run then. And those of [`LockGuard::release`], [`Lost`](ErrorKind::Lost) among them: what
    /// `work` returned is dropped, since the lock did not last as long as the work.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use dsync::{MemoryManager, SyncManager};
    /// # let manager = MemoryManager::new();
    /// # manager.start()?;
    /// let token = manager.lock("ledger")?.with_lock(Duration::from_secs(10), |term| term.token())?;
    /// assert!(token.is_some());
    /// # Ok::<(), dsync::Error>(())
    /// ```
    pub fn with_lock<T>(&self, context: impl Into<Context>, work: impl FnOnce(&Term) -> T) -> Result<T> {
        LockGuard::with(self, &context.into(), work)
    }

    /// Does `work` if it is due by this [`Period`], in one process at a time. The lock is taken for that, as `acquire` does, and given back.
    ///
    /// It is due if nine tenths of the period ([`Period::due_after`]) are over since the work *began* the last time that it succeeded, by the
    /// clock of the server alone. The clocks of those who call play no part. If it has not succeeded yet, it is due; so it is if
    /// the server's clock was set back to before the last success, which the log tells of.
    ///
    /// `context` says how long to wait for another process that does the work now, or for the end of a takeover grace: a `Duration`, an
    /// `Instant`, a [`Context`]. With `Duration::ZERO` neither is waited for. Who has waited looks again, and does the work if the other one has
    /// failed.
    ///
    /// # How often the work is done
    ///
    /// **At least once** by default. When `work` returns `Ok`, its success is recorded in the table `dsync.success`, in a fenced transaction that is on
    /// the disk, and on a synchronous standby, when the call returns. If it returns an error or panics, if its term is lost, or its process dies,
    /// nothing is recorded: the next one that calls does it again. So the work must bear that it is done again after it was done in part, or was
    /// done and not recorded.
    ///
    /// **Exactly once**, as far as the work is one transaction in this database: let that transaction record the success, by [`Run::record`].
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use dsync::{MemoryManager, SyncManager};
    /// use dsync::{Error, Once};
    ///
    /// # let manager = MemoryManager::new();
    /// # manager.start()?;
    /// const DAY: Duration = Duration::from_secs(24 * 60 * 60);
    /// // For two minutes it waits for a machine that is at it, or for the end of a takeover grace.
    /// let outcome = manager.once("nightly-report", DAY, Duration::from_secs(120), |run| {
    ///     for chapter in 1..=100 {
    ///         if run.lost().is_lost() {
    ///             break; // another machine may begin; `once` fails with `Lost`, and records nothing
    ///         }
    ///         // … write the chapter …
    ///     }
    ///     Ok::<_, Error>(100)
    /// })?;
    /// match outcome {
    ///     Once::Ran(chapters) => println!("{chapters} chapters"),
    ///     Once::NotDue { due_in, .. } => println!("done already, due again in {due_in:?}"),
    ///     Once::Busy => println!("another machine is still at it"),
    /// }
    /// # assert_eq!(outcome, Once::Ran(100));
    /// # Ok::<(), dsync::Error>(())
    /// ```
    ///
    /// Exactly once, with an error of the application's:
    ///
    /// ```no_run
    /// # use std::time::Duration;
    /// # use dsync::PostgresManager;
    /// # const DAY: Duration = Duration::from_secs(24 * 60 * 60);
    /// type Failure = Box<dyn std::error::Error>;
    ///
    /// fn interest(manager: &PostgresManager, client: &mut dsync::postgres::Client) -> Result<(), Failure> {
    ///     manager.once("interest", DAY, Duration::from_secs(120), |run| -> Result<(), Failure> {
    ///         let mut transaction = client.transaction()?;
    ///         run.record(&mut transaction)?; // first of all
    ///         transaction.execute("UPDATE account SET balance = balance * 1.0001", &[])?;
    ///         Ok(transaction.commit()?)
    ///     })?;
    ///     Ok(())
    /// }
    /// ```
    ///
    /// # What it takes
    ///
    /// One round trip on a session of the pool if the work is not due. Else the lock has a session, and a second one of the pool is
    /// needed now and then: with `max_sessions` of 1 it fails. The lock is the one that others have under this key by other means, so
    /// keep a key for one piece of work. If the server does not answer, it takes up to three attempts (`connect_timeout` and heartbeat
    /// timeout together) longer than `context` says. `work` runs on this thread, for as long as it takes. While the term lasts, the record
    /// is tried five times, for a heartbeat timeout each where somebody has locked its table or a synchronous standby is away, with pauses of 3 s in all.
    ///
    /// A call for the same key within `work` waits for itself as long as its `context` says, and gives `Busy` then.
    ///
    /// # Errors
    /// Those of `work`, as they are; nothing is recorded then, but what `Run::record` has. Errors of the library come as the same `E`, by `E: From<Error>`:
    /// - [`InvalidConfig`](ErrorKind::InvalidConfig): this manager does without the catalog, or this lock without a token; or others may share
    ///   it; or the period cannot be. The work was not done.
    /// - [`LockUnavailable`](ErrorKind::LockUnavailable): a [takeover grace](crate::Config::takeover) went on until `context` ended, so nobody
    ///   does the work. A longer wait outlasts it: 15 s by default, 45 s where `pgdsync run` or `lead` was used.
    /// - Those of `acquire`, but for another holder; [`SessionUnavailable`](ErrorKind::SessionUnavailable),
    ///   [`PoolExhausted`](ErrorKind::PoolExhausted), [`SessionRefused`](ErrorKind::SessionRefused): the server could not be asked whether the
    ///   work is due, or told that it is done; the text says which.
    /// - [`Lost`](ErrorKind::Lost): the work returned `Ok`, but its term had ended before. Nothing is recorded.
    pub fn once<T, E: From<Error>>(
        &self,
        every: impl Into<Period>,
        context: impl Into<Context>,
        work: impl FnOnce(&Run<'_>) -> std::result::Result<T, E>,
    ) -> std::result::Result<Once<T>, E> {
        once::run(self, every.into(), &context.into(), work)
    }
}

/// Makes the bytes that annotate a lock where an operator can see them: in the view `dsync.locks`.
///
/// It is called for each attempt to acquire the lock, before the lock can be granted: when the attempt begins, and anew for
/// each slice of a wait ([`wait_slice`](crate::Config::wait_slice); half a second for who is the next one to get a permit; in memory each second for which a thread waits). So the
/// annotation of a term is at most a slice older than the term. On a [shared session](crate::Config::shared_sessions) it is made once for each term, when the
/// lock is asked for, and so as old as the wait. A manager without catalog has no place for annotations and
/// calls no valuer.
///
/// It is called on a thread of the library's, or on one that waits for this lock in this process, if it does so without a
/// limit and cannot be cancelled, or if the last call took less than a millisecond; in memory on the one that begins the claim or waits, or that calls
/// [`MemoryServer`](crate::MemoryServer), and the wait may then end later than its context. A thread that gives the lock away never calls it. It must not use the lock that it
/// annotates. What it returns is taken literally, up to [`MAX_ANNOTATION`] bytes; if it returns more, or panics, the term
/// goes without annotation and the log says so.
pub type LockValuer = Arc<dyn Fn() -> Vec<u8> + Send + Sync>;

/// The longest annotation, in bytes.
pub const MAX_ANNOTATION: usize = 64 * 1024;

/// The annotation of a term that begins. A valuer is an application's code, and must not harm the lock.
pub(crate) fn annotate(key: &str, valuer: &LockValuer) -> Option<Vec<u8>> {
    let mut made = None;
    // The logger is the application's code, too.
    if panics(|| made = Some(valuer())) {
        panics(|| log::warn!("lock {key:?}: its valuer panicked; the term goes without annotation"));
    }
    let bytes = made?;
    if bytes.len() <= MAX_ANNOTATION {
        return Some(bytes);
    }
    let length = bytes.len();
    panics(|| {
        log::warn!(
            "lock {key:?}: its annotation has {length} bytes, the limit is {MAX_ANNOTATION}; left out"
        );
    });
    None
}

/// The default valuer: `value` as JSON.
///
/// # Errors
/// [`InvalidConfig`](ErrorKind::InvalidConfig) if `value` cannot be written as JSON (a map with keys that are not text,
/// say).
///
/// ```
/// let valuer = dsync::json_valuer(&serde_json::json!({ "host": "db-7", "pid": 4711 }))?;
/// assert_eq!(valuer(), br#"{"host":"db-7","pid":4711}"#);
/// # Ok::<(), dsync::Error>(())
/// ```
pub fn json_valuer(value: &(impl Serialize + ?Sized)) -> Result<LockValuer> {
    let bytes = serde_json::to_vec(value).map_err(|error| {
        Error::new(ErrorKind::InvalidConfig, "the lock's annotation cannot be written as JSON")
            .with_source(error)
    })?;
    Ok(Arc::new(move || bytes.clone()))
}

/// What can be said about a lock when its handle is first made. Ignored where the handle exists already, but for
/// [`shared`](Self::shared) and [`permits`](Self::permits), which say which of three handles is meant.
#[derive(Clone, Default)]
#[must_use]
#[non_exhaustive]
pub struct LockOptions {
    pub(crate) valuer: Option<LockValuer>,
    pub(crate) without_token: bool,
    /// `None`: as the manager's.
    pub(crate) shared_session: Option<bool>,
    pub(crate) grace: Option<Duration>,
    pub(crate) mode: Mode,
    /// Those of a semaphore.
    pub(crate) permits: u32,
    /// Told whenever a claim has begun, if there is room.
    pub(crate) on_claim: Option<Sender<()>>,
}

impl LockOptions {
    /// No annotation.
    pub fn new() -> Self {
        Self::default()
    }

    /// Does without fencing token, annotation and row of the catalog, which saves the server a third to a half of the work of a
    /// lock. Such a lock excludes others as any does. But [`Term::fence`] fails, `dsync.locks` shows a number for it and no name,
    /// and nobody notices if another key has the same hash. Use it for all holders of a key, readers and writers, or for none: a term without token does
    /// not wait for the fenced transactions of an earlier term, and these do not notice it.
    pub fn without_token(mut self) -> Self {
        self.without_token = true;
        self
    }

    /// Whether the lock is had on a session that other locks of the manager use, too, as
    /// [`Config::shared_sessions`](crate::Config::shared_sessions) says, or on one of its own. Where it is not said, the manager's setting decides;
    /// one that has no shared session opens one for this lock and others of the kind. In memory there are no sessions.
    pub fn shared_session(mut self, shared: bool) -> Self {
        self.shared_session = Some(shared);
        self
    }

    /// Warns before a term ends by its lease: see [`Term::warned`]. For work that needs this long to stop. Defaults to none.
    ///
    /// A heartbeat of such a lock may be answered until the end of the term, and not only within the heartbeat timeout: a server that
    /// is silent ends the term later, and others have to wait no longer for it than the lease. So it is with all locks on a
    /// [session that it shares](Self::shared_session). What ends a term without a lease running out, an operator say, comes without a
    /// warning.
    ///
    /// The manager must have that time: a `grace` that is not shorter than the term that is left when a renewal is due is refused,
    /// with the longest that is possible. Of a lease of 15 s it is 6.5 s. One that is nearly as long warns of each renewal that is
    /// not answered at once.
    pub fn grace(mut self, grace: Duration) -> Self {
        self.grace = Some(grace);
        self
    }

    /// Others may share the lock: see [`shared_lock`](crate::PostgresManager::shared_lock). The lock of a key that others may share, and the one
    /// that is had alone, are two handles, each with options of its own. The valuer of a shared lock is not called.
    ///
    /// ```
    /// use std::time::Duration;
    /// use dsync::{LockOptions, MemoryManager, SyncManager};
    ///
    /// # let manager = MemoryManager::new();
    /// # manager.start()?;
    /// let options = LockOptions::new().shared().grace(Duration::from_secs(5));
    /// let reader = manager.lock_with("prices", options)?.acquire(Duration::from_secs(10))?;
    /// assert!(reader.is_held());
    /// # Ok::<(), dsync::Error>(())
    /// ```
    pub fn shared(mut self) -> Self {
        self.mode = Mode::Shared;
        self
    }

    /// At most `permits` sessions have it at the same time: see [`semaphore`](crate::PostgresManager::semaphore). A semaphore is another
    /// lock than the one that is had alone or [shared](Self::shared) under the same key, with options of its own. Of this and `shared`, the
    /// last one counts.
    ///
    /// ```
    /// use std::time::Duration;
    /// use dsync::{LockOptions, MemoryManager, SyncManager};
    ///
    /// # let manager = MemoryManager::new();
    /// # manager.start()?;
    /// let options = LockOptions::new().permits(3).grace(Duration::from_secs(5));
    /// let permit = manager.lock_with("gpu", options)?.acquire(Duration::from_secs(10))?;
    /// assert!(permit.is_held());
    /// # Ok::<(), dsync::Error>(())
    /// ```
    pub fn permits(mut self, permits: u32) -> Self {
        (self.mode, self.permits) = (Mode::Permit, permits);
        self
    }

    /// Annotates the lock with what `valuer` returns; the bytes are taken literally.
    pub fn valuer(mut self, valuer: LockValuer) -> Self {
        self.valuer = Some(valuer);
        self
    }

    /// Refuses a semaphore that cannot be.
    pub(crate) fn validate(&self, key: &Key) -> Result<()> {
        if self.mode != Mode::Permit {
            return Ok(());
        }
        let problem = if !(1..=MAX_PERMITS).contains(&self.permits) {
            format!("{} permits, and may have 1 to {MAX_PERMITS}", self.permits)
        } else if self.without_token {
            "the option without_token, and its permits have tokens; leave that out".to_owned()
        } else {
            return Ok(());
        };
        Err(Error::new(
            ErrorKind::InvalidConfig,
            format!("the semaphore {:?} has {problem}", key.to_string()),
        ))
    }

    /// Refuses a semaphore of which the manager has a handle with another number of permits.
    pub(crate) fn check_permits(&self, of_the_lock: &Self, key: &str) -> Result<()> {
        match self.permits == of_the_lock.permits {
            true => Ok(()),
            false => {
                let text = format!(
                    "the semaphore {key:?} is asked for with {} permits, and this process has a handle of it that says {}; use that one, also \
                     after set_permits(), or drop it and its guards first",
                    self.permits, of_the_lock.permits
                );
                Err(Error::new(ErrorKind::InvalidConfig, text))
            }
        }
    }

    /// Says so in the log if the lock, which was made before, lacks what these options ask for.
    pub(crate) fn tell_if_ignored(&self, key: &str, of_the_lock: &Self) {
        let grace = self.grace.filter(|_| self.grace != of_the_lock.grace).map(|_| "grace");
        let token = (self.without_token && !of_the_lock.without_token).then_some("without_token");
        for option in grace.into_iter().chain(token) {
            log::warn!(
                "lock {key:?}: the option {option} is ignored, since the handle that is there was made with other options; \
                 give the same options wherever the lock is made"
            );
        }
    }

    pub(crate) fn tell_of_claims(mut self, listener: Sender<()>) -> Self {
        self.on_claim = Some(listener);
        self
    }

    /// A claim has begun.
    pub(crate) fn claim_begun(&self) {
        if let Some(listener) = &self.on_claim {
            // Full: it has not looked since the last one. Closed: nobody listens.
            let _ = listener.try_send(());
        }
    }
}

impl fmt::Debug for LockOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LockOptions")
            .field("valuer", &self.valuer.as_ref().map(|_| ".."))
            .field("without_token", &self.without_token)
            .field("shared_session", &self.shared_session)
            .field("grace", &self.grace)
            .field("shared", &(self.mode == Mode::Shared))
            .field("permits", &(self.mode == Mode::Permit).then_some(self.permits))
            .finish()
    }
}
