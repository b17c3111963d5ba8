//! A lock for the length of a transaction of the application's own.

use postgres::Transaction;

use super::Wanted;
use crate::context::Context;
use crate::error::Result;

/// A lock that a transaction of the application's own takes, and that ends with it.
///
/// [`PostgresManager::transaction_lock`](crate::PostgresManager::transaction_lock) makes it. It is for work that is one transaction:
/// the lock needs no session beside the application's, and nobody can forget to release it.
///
/// ```no_run
/// # use std::time::Duration;
/// # use dsync::PostgresManager;
/// # fn example(manager: &PostgresManager, client: &mut dsync::postgres::Client) -> Result<(), Box<dyn std::error::Error>> {
/// let mut transaction = client.transaction()?;
/// manager.transaction_lock("invoices")?.acquire(&mut transaction, Duration::from_secs(5))?;
/// transaction.execute("INSERT INTO invoice SELECT coalesce(max(number), 0) + 1 FROM invoice", &[])?;
/// transaction.commit()?; // or a rollback: either ends the lock
/// # Ok(())
/// # }
/// ```
///
/// # Whom it excludes
///
/// All who want the same key in the same namespace and the same database: guards, claims and leaders of whichever process, session
/// locks, and other transactions. A [shared](Self::shared) one goes beside shared ones. That the connection is to the database of
/// the manager's is not checked. Nor is it noticed if another key has the same hash; the two exclude each other then.
///
/// It is taken as PostgreSQL takes [advisory locks](https://www.postgresql.org/docs/current/explicit-locking.html#ADVISORY-LOCKS): a
/// session is granted at once what it has already, and the lock goes to others after the commit is visible to them. A rollback
/// to a savepoint from before the lock takes it away; so does the end of a nested [`Transaction`] that is not committed.
/// A transaction that waits for a guard of its own process waits in vain if the guard's thread waits for the transaction.
///
/// # What it is not
///
/// It is no term: it has no token and no lost channel. None is needed within the transaction, since a commit succeeds only on
/// the session that has the lock. What is done outside of the database is protected only for as long as the session lives, which
/// nothing watches.
///
/// It fences out no earlier term: a holder that has lost its lock without knowing, and writes in a transaction with
/// [`Term::fence`](crate::Term::fence), is refused only after a later *term*, and not after a transaction that had this lock.
/// Where a former holder must be refused, let all who write use guards.
///
/// Observers, metrics and snapshots do not show it; [`inspect`](crate::PostgresManager::inspect) shows the session that has it.
/// [`MemoryManager`](crate::MemoryManager) has none, since it has no transactions.
///
/// # How it waits
///
/// A lock that is free takes one round trip. Otherwise it waits in the server's queue, in one statement with a
/// savepoint around it: one round trip more if the lock is granted. A wait that is longer than [`wait_slice`](crate::Config::wait_slice)
/// (5 s by default) is cut into slices of that length, and one whose context can be cancelled into slices of 1 s, between which it looks
/// at the context. Each further slice takes two round trips, is logged by the server as an error, and begins at the end of the queue. A
/// cancelled call returns within 1 s.
///
/// `lock_timeout` is as before when the call returns, and does not count; `statement_timeout` is left as it is, and counts for each
/// slice. Nothing is prepared, so it works through poolers in transaction mode. A network or a server that does not answer is
/// noticed when the connection itself notices it, since it is the application's: give it `tcp_user_timeout`. A transaction that waits is an
/// open one, for which `CREATE INDEX CONCURRENTLY` waits; so take the lock before anything else, and do not wait for long.
#[derive(Clone, Debug)]
pub struct TransactionLock {
    wanted: Wanted,
}

impl TransactionLock {
    pub(crate) fn new(wanted: Wanted) -> Self {
        Self { wanted }
    }

    /// The same lock, to be held with others that share it: readers go beside readers, and exclude those who want the lock for
    /// themselves.
    ///
    /// A transaction that shares the lock and then wants it for itself waits for all that share it; two that do so are a deadlock,
    /// which the server ends for one of them. Who waits for the lock for itself is served before those who want to share it and come
    /// later; but with each slice of its wait it comes later itself, so readers that overlap without end keep it waiting. A guard
    /// that waits for such readers fares no better: they do not stand in the line of which [`shared_lock`](crate::PostgresManager::shared_lock)
    /// tells.
    #[must_use]
    pub fn shared(mut self) -> Self {
        self.wanted.advisory.shared = true;
        self
    }

    /// Takes the lock until `transaction` ends, if it is free now. `false` if another session has it: the transaction goes on
    /// without the lock. One round trip.
    ///
    /// ```no_run
    /// # fn example(manager: &dsync::PostgresManager, client: &mut dsync::postgres::Client) -> Result<(), Box<dyn std::error::Error>> {
    /// let mut transaction = client.transaction()?;
    /// if manager.transaction_lock("outbox")?.try_acquire(&mut transaction)? {
    ///     transaction.execute("DELETE FROM outbox WHERE sent", &[])?;
    ///     transaction.commit()?;
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// - [`SessionRefused`](crate::ErrorKind::SessionRefused), which the text explains. The transaction goes on without the lock if it is
    ///   above `READ COMMITTED` (it would not see what the former holder has committed) or on a hot standby. Else it cannot go on.
    /// - [`SessionUnavailable`](crate::ErrorKind::SessionUnavailable): the connection has ended, an earlier statement of the
    ///   transaction has failed, or this one did; the source says why. The transaction cannot go on.
    pub fn try_acquire(&self, transaction: &mut Transaction<'_>) -> Result<bool> {
        self.wanted.try_acquire(transaction).map(|(granted, _)| granted)
    }

    /// Waits for the lock, and takes it until `transaction` ends. `context` is a [`Duration`](std::time::Duration), an
    /// [`Instant`](std::time::Instant) or a [`Context`]; a time of zero, or one that has passed, means *try once*.
    ///
    /// Where the error leaves the transaction able to go on, it is as before the call: no lock of this call is left, and
    /// `lock_timeout` is the old one.
    ///
    /// # Errors
    /// - [`TimedOut`](crate::ErrorKind::TimedOut): the time was over, or `statement_timeout` was before it (the text says so, and
    ///   [`sqlstate`](crate::Error::sqlstate) is 57014 then). The transaction can go on.
    /// - [`Cancelled`](crate::ErrorKind::Cancelled): the context was cancelled, or somebody cancelled the statement. The transaction can
    ///   go on.
    /// - [`LockUnavailable`](crate::ErrorKind::LockUnavailable): the server found a deadlock. The transaction can go on, and the
    ///   others wait for it: best roll it back.
    /// - Those of [`try_acquire`](Self::try_acquire). If the statement that waited failed in another way, the text says whether
    ///   the transaction can go on.
    pub fn acquire(&self, transaction: &mut Transaction<'_>, context: impl Into<Context>) -> Result<()> {
        self.wanted.acquire(transaction, &context.into()).map(|_| ())
    }
}
