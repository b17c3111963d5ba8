//! One unbroken stretch of holding a lock, and the fence that its writes stand behind.

use std::convert::Infallible;
use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use crossbeam_channel::Receiver;
use postgres::types::ToSql;
use postgres::{GenericClient, Row, Transaction};

use crate::error::{Error, ErrorKind, Result};
use crate::expiry::Expiry;
use crate::loss::Lost;
use crate::process::Origin;

/// A term: from the moment that the lock was acquired to the moment that it is released or lost.
///
/// [`LockGuard::term`](crate::LockGuard::term) gives that of a guard, [`Tenure::term`](crate::Tenure::term) that of a leader, and
/// [`Lock::term`](crate::Lock::term) the current one of a claim. A term goes on being *that* term when the lock is acquired again:
/// then its [`lost`](Self::lost) channel has disconnected, and its [`fence`](Self::fence) refuses.
///
/// # Fencing
///
/// A lost channel tells a process that runs. A process that is frozen, thawed, and goes on writing does not look at its
/// channels first. What stops it is the database: each term has a **token**, greater than those of all earlier terms of
/// the key, and a write that carries it can be refused when there is a greater one. The terms of those who
/// [share](crate::PostgresManager::shared_lock) a lock have one token, until a writer's term begins.
///
/// Writes to the database that the locks are in are fenced by calling [`fence`](Self::fence) in their transaction:
///
/// ```no_run
/// # use std::time::Duration;
/// # use dsync::PostgresManager;
/// # fn example(manager: PostgresManager, client: &mut dsync::postgres::Client) -> Result<(), Box<dyn std::error::Error>> {
/// let guard = manager.lock("ledger")?.acquire(Duration::from_secs(60))?;
///
/// let mut transaction = client.transaction()?;
/// guard.term().fence(&mut transaction)?; // fails with ErrorKind::Lost if there is, or was, a later holder that it excludes
/// transaction.execute("UPDATE ledger SET balance = balance - 10 WHERE id = 1", &[])?;
/// transaction.commit()?;
/// # Ok(())
/// # }
/// ```
///
/// Transactions of other drivers and languages stand behind the same fence by [`fence_text`](Self::fence_text).
///
/// For a store outside of this database, send the [`token`](Self::token) along with each write, keep the greatest token
/// seen with the data, and refuse a write with a smaller one, in one atomic step (`UPDATE … WHERE token <= $1`, a
/// conditional put). The check belongs where the data is; one that the writer does itself beforehand proves nothing.
#[derive(Clone)]
pub struct Term {
    lost: Lost,
    /// `None` where nobody warns.
    warned: Option<Receiver<Infallible>>,
    token: Option<i64>,
    /// Of a semaphore.
    permit: Option<u32>,
    /// When the term ends unless it is renewed; `None` where nothing has to be renewed.
    expiry: Option<Arc<Expiry>>,
    /// What knows of later terms; `None` where nothing does.
    fence: Option<Arc<dyn Fence>>,
    /// The process that holds the lock.
    origin: Origin,
}

/// What knows the newest term of a key. Each implementation of the contract gives its terms its own.
pub(crate) trait Fence: fmt::Debug + Send + Sync {
    /// Keeps a later term from beginning until the transaction that `ask` speaks in ends; `false` if one has begun.
    fn hold(&self, ask: &mut Ask<'_>, token: i64) -> Result<bool>;

    /// Whether no later term has begun.
    fn is_current(&self, ask: &mut Ask<'_>, token: i64) -> Result<bool>;

    /// As [`hold`](Self::hold), and records in the same transaction that the work under the key which began at `started` has succeeded.
    fn record(&self, ask: &mut Ask<'_>, token: i64, started: SystemTime) -> Result<bool>;

    /// What the catalog's function `fence` is given of the term; `None` where no database knows it.
    fn text(&self, token: i64) -> Option<String>;
}

/// Runs a statement on a connection of the application's; the first row of the answer, if there is one.
pub(crate) type Ask<'a> =
    dyn FnMut(&str, &[&(dyn ToSql + Sync)]) -> std::result::Result<Option<Row>, postgres::Error> + 'a;

impl Term {
    pub(crate) fn new(lost: Lost, token: Option<i64>, fence: Option<Arc<dyn Fence>>) -> Self {
        Self { lost, warned: None, token, permit: None, expiry: None, fence, origin: Origin::here() }
    }

    pub(crate) fn with_permit(self, permit: Option<u32>) -> Self {
        Self { permit, ..self }
    }

    pub(crate) fn with_warning(self, warned: Receiver<Infallible>) -> Self {
        Self { warned: Some(warned), ..self }
    }

    pub(crate) fn with_expiry(self, expiry: Arc<Expiry>) -> Self {
        Self { expiry: Some(expiry), ..self }
    }

    /// The channel that disconnects when this term ends.
    pub fn lost(&self) -> &Lost {
        &self.lost
    }

    /// A channel that disconnects when the term is about to end, for work that needs time to stop: when a renewal is overdue, and the
    /// term ends within the [grace](crate::LockOptions::grace) if none succeeds. At the latest it disconnects at the end of the term,
    /// and so does one of a lock without grace. It disconnects once a term, also if a renewal succeeds after all.
    ///
    /// ```no_run
    /// # use std::time::Duration;
    /// # use dsync::{LockOptions, PostgresManager};
    /// # fn example(manager: &PostgresManager) -> dsync::Result<()> {
    /// let options = LockOptions::new().grace(Duration::from_secs(5));
    /// let guard = manager.lock_with("nightly-report", options)?.acquire(Duration::from_secs(60))?;
    /// dsync::crossbeam_channel::select! {
    ///     recv(guard.term().warned()) -> _ => println!("five seconds to finish"),
    ///     recv(guard.lost()) -> _ => println!("stop at once"),
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn warned(&self) -> &Receiver<Infallible> {
        self.warned.as_ref().unwrap_or_else(|| self.lost.channel())
    }

    /// The fencing token: greater than that of every earlier term of the key that was not shared with this one, also over crashes of the
    /// server, the promotion of a standby, dump and restore, and the dropping of the catalog. Terms that share the lock at the same time have
    /// the same, and at the server all that follow have it, until a writer's term begins. It has sixteen digits, and there are gaps between the tokens of a key. `None` if the manager was told to do without a catalog, or the lock [without a token](crate::LockOptions::without_token).
    ///
    /// A database that was put back to an earlier state does not know what it gave out since. So the tokens go on at the
    /// server's clock, in microseconds since 1970, above which no token was. That fails in two cases: the clock is behind the
    /// one by which the last tokens were given out, by more than the time since then; or the machine was put back together with
    /// its memory, so that the server does not notice (run `DROP SCHEMA dsync CASCADE` then).
    pub fn token(&self) -> Option<i64> {
        self.token
    }

    /// Of a [semaphore](crate::PostgresManager::semaphore), which of its permits this is, from 1 on: nobody else has the permit with that
    /// number while the term lasts. So each holder may have a thing of its own, say the second of three graphics cards. `None` of a lock.
    pub fn permit(&self) -> Option<u32> {
        self.permit
    }

    /// Whether this process still regards the term as going on. It may have ended all the same: see [`fence`](Self::fence).
    /// Once it was `false` it stays so. In a child process of the holder's, after a `fork`, it is `false`.
    #[must_use]
    pub fn is_held(&self) -> bool {
        if !self.origin.is_here() {
            return false;
        }
        // After a freeze of the process this thread may run before the one that closes the channel.
        let in_time = self.expiry.as_ref().is_none_or(|expiry| !expiry.has_passed());
        in_time && !self.lost.is_lost()
    }

    /// Lets `transaction` go on only if no later term has begun, and keeps one from beginning until it ends. Terms that share the lock, with no
    /// writer's between, are one to it: none of them is later, and none waits.
    ///
    /// Call it first of all in the transaction, before its reads too: under `REPEATABLE READ` and `SERIALIZABLE` the
    /// transaction sees the state of its first statement, and one that began to read before the term did is refused. The
    /// transaction may be on any connection to the database that the lock is in, at any isolation level, but not read-only;
    /// its role needs `USAGE` on the schema `dsync`, `SELECT` and `UPDATE` on `dsync.lock`, and to see its rows if row security
    /// is on. What [`CatalogMode`](crate::CatalogMode) says of trust is not looked at once more here. Rolling back to a
    /// savepoint from before the fence takes the fence away. It takes one round trip, and blocks for as long as the connection of the
    /// transaction lets it: that is the application's, and on a server that stands still it has no bound but its own (`tcp_user_timeout`).
    ///
    /// While the transaction is open the next holder waits that does not share the lock. So that a frozen process cannot keep it
    /// waiting for ever, the server is told to end the transaction's session when it pauses for longer than the lease between two statements
    /// (`idle_in_transaction_session_timeout`, for this transaction only; a shorter one stays as it is). A statement that
    /// runs long holds the next holder up for as long: bound it with `statement_timeout`. A transaction that is prepared
    /// (`PREPARE TRANSACTION`) holds it up without a bound, until it is committed or rolled back.
    ///
    /// The database that is asked is the one of the transaction. An old primary, which lives on while a standby of it was promoted, knows nothing of
    /// the terms on the new one: there the fence passes as long as this term lasts, and the commit succeeds unless it waits for the
    /// standby (`synchronous_commit = on`). What it has written is gone with that server's timeline, and is not on the new primary. That this term
    /// ends before the next one begins there takes [`Config::quorum`](crate::Config::quorum); the tokens of the new primary are higher than its own.
    ///
    /// # Errors
    /// - [`Lost`](ErrorKind::Lost): the term is over; or, above `READ COMMITTED`, the transaction began to read before the term did. Roll the
    ///   transaction back. If [`is_held`](Self::is_held) is still true, try again in a new one.
    /// - [`OtherProcess`](ErrorKind::OtherProcess): the term was begun before a `fork`, by the parent process.
    /// - [`InvalidConfig`](ErrorKind::InvalidConfig): the manager keeps no catalog, or no database at all since it is in memory, so
    ///   there is nothing to check.
    /// - [`SessionRefused`](ErrorKind::SessionRefused): the role lacks rights, the transaction is read-only, or its
    ///   connection is to a standby or to another database. The text says which.
    /// - [`SessionUnavailable`](ErrorKind::SessionUnavailable): the statement failed; the source says why. The transaction
    ///   cannot go on.
    pub fn fence(&self, transaction: &mut Transaction<'_>) -> Result<()> {
        self.hold(transaction, |fence, ask, token| fence.hold(ask, token))
    }

    /// As [`fence`](Self::fence), and records in `transaction` that the work which began at `started` has succeeded.
    pub(crate) fn record_success(
        &self,
        transaction: &mut Transaction<'_>,
        started: SystemTime,
    ) -> Result<()> {
        self.hold(transaction, |fence, ask, token| fence.record(ask, token, started))
    }

    fn hold(
        &self,
        transaction: &mut Transaction<'_>,
        hold: impl FnOnce(&dyn Fence, &mut Ask<'_>, i64) -> Result<bool>,
    ) -> Result<()> {
        self.check_process()?;
        if !self.is_held() {
            return Err(over());
        }
        let (fence, token) = self.fenced()?;
        let mut ask =
            |text: &str, parameters: &[&(dyn ToSql + Sync)]| transaction.query_opt(text, parameters);
        // Last again: the term may have ended while the server was at it.
        if hold(fence, &mut ask, token)? && self.is_held() { Ok(()) } else { Err(over()) }
    }

    /// The fence in text, for transactions that are not the `postgres` crate's: of diesel or sqlx, of `psql`, of another language, of a
    /// child process that is given it by its environment. Such a transaction calls a function of the catalog before all else:
    ///
    /// ```sql
    /// BEGIN;
    /// SELECT dsync.fence('fence1:8d5e957f29789348:…');
    /// UPDATE ledger SET balance = balance - 10 WHERE id = 1;
    /// COMMIT;
    /// ```
    ///
    /// The function does what [`fence`](Self::fence) does in the database: the next holder waits until the transaction ends, pauses
    /// are bounded, and where a later term has begun it raises an error, by which the transaction ends. It cannot know what only this
    /// process knows, that the term was lost or released and nobody has the lock yet. Then it lets the transaction go on, and a
    /// later term waits for it.
    ///
    /// | SQLSTATE | meaning |
    /// |---|---|
    /// | `ZDF01` | A later term has begun: roll back, and do not try again. PostgreSQL and the SQL standard use no code that begins with `ZD`. |
    /// | `40001` | Above `READ COMMITTED`: the transaction sees a state from before the term, or from before a later one. Try it again; the next attempt tells which. If it sees a state from before the first term of the key, it gets `ZDF01`. |
    /// | `22023`, `22003` | The text is none that a term has given. `NULL` is none, too. |
    /// | `42501` | The role lacks a right, or row security hides the row; `25006`: the transaction is read-only; `0A000`: the server is a standby. |
    /// | `3F000`, `42883` | There is no such function: this is another database, or the catalog is older than version 4. |
    ///
    /// Its role needs `EXECUTE` on the function, which all roles have by default, and what [`fence`](Self::fence) needs. In autocommit
    /// mode the call protects nothing that comes after it. Where [`Config::schema`](crate::Config::schema) names another schema than `dsync`, call the
    /// function of that one. The text is no secret.
    ///
    /// ```no_run
    /// # use std::process::Command;
    /// # fn example(guard: &dsync::LockGuard) -> Result<(), Box<dyn std::error::Error>> {
    /// let fence = guard.term().fence_text().ok_or("there is no catalog")?;
    /// Command::new("nightly-report.py").env("FENCE", fence).status()?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// `None` if there is no [`token`](Self::token), and for a lock in memory, of which no database knows.
    #[must_use]
    pub fn fence_text(&self) -> Option<String> {
        self.fence.as_deref().zip(self.token).and_then(|(fence, token)| fence.text(token))
    }

    /// Whether no later term has begun, by the database's word at this moment. It proves nothing of the next moment: for
    /// that, there is [`fence`](Self::fence). One round trip.
    ///
    /// # Errors
    /// As [`fence`](Self::fence), but for `Lost`.
    pub fn is_current(&self, client: &mut impl GenericClient) -> Result<bool> {
        self.check_process()?;
        if !self.is_held() {
            return Ok(false);
        }
        let (fence, token) = self.fenced()?;
        let mut ask = |text: &str, parameters: &[&(dyn ToSql + Sync)]| client.query_opt(text, parameters);
        Ok(fence.is_current(&mut ask, token)? && self.is_held())
    }

    /// Fails in a child process of the holder's.
    pub(crate) fn check_process(&self) -> Result<()> {
        self.origin.check(format_args!("the term"))
    }

    fn fenced(&self) -> Result<(&dyn Fence, i64)> {
        self.fence.as_deref().zip(self.token).ok_or_else(|| {
            let message = "fencing needs a token, and the manager was told to do without the catalog, or the lock without a token; set \
                           the catalog to automatic, or leave LockOptions::without_token out";
            Error::new(ErrorKind::InvalidConfig, message)
        })
    }
}

impl fmt::Debug for Term {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let held = self.is_held();
        let mut debug = f.debug_struct("Term");
        debug.field("held", &held).field("token", &self.token);
        if let Some(permit) = self.permit {
            debug.field("permit", &permit);
        }
        // How long the term lasts yet if no heartbeat is answered any more.
        if let Some(expiry) = self.expiry.as_ref().filter(|_| held) {
            debug.field("left", &expiry.left());
        }
        debug.finish()
    }
}

fn over() -> Error {
    Error::new(ErrorKind::Lost, "the term is over; roll back, and wait for the next term")
}
