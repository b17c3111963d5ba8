//! A lock for the length of a scope, on a session of the application's own.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::time::Duration;

use postgres::Client;
use postgres::error::{Severity, SqlState};

use super::{Wanted, first, rows};
use crate::context::Context;
use crate::error::{Error, ErrorKind, Result, chain};
use crate::pg::sql::answer;
use crate::process::{Origin, drive, no_thread};

/// A lock that a connection of the application's own takes, over any number of its transactions.
///
/// [`PostgresManager::session_lock`](crate::PostgresManager::session_lock) makes it. It is for work on one connection that is more than one
/// transaction: migrations, temporary tables, transactions at `SERIALIZABLE`.
///
/// ```no_run
/// # use std::time::Duration;
/// # use dsync::PostgresManager;
/// # fn example(manager: &PostgresManager, client: &mut dsync::postgres::Client) -> Result<(), Box<dyn std::error::Error>> {
/// let mut client = manager.session_lock("migrations")?.acquire(client, Duration::from_secs(60))?;
/// client.batch_execute("ALTER TABLE invoice ADD COLUMN paid bool")?;
/// client.batch_execute("UPDATE invoice SET paid = false")?;
/// client.release()?; // fails if the lock did not last until here
/// # Ok(())
/// # }
/// ```
///
/// **Run no `CREATE INDEX CONCURRENTLY` on this connection.** That statement waits for all transactions that are older, those among them
/// that wait for this very lock, and PostgreSQL ends one of the two as a deadlock. Hold a [guard](crate::LockGuard) instead, and build
/// the index on another connection.
///
/// It excludes whom a [`TransactionLock`](crate::TransactionLock) excludes, by the same rules, and waits in the same way: the lock
/// ends with the session, is no term, and fences out nobody. What was said there of observers and
/// [`MemoryManager`](crate::MemoryManager) holds here.
///
/// Nothing watches the session and nothing renews a lease. If the connection breaks, the next statement on it fails, and until then
/// nobody tells. A process that is frozen or cut off keeps the lock for as long as the server keeps its session: hours, with the
/// server's defaults. A [guard](crate::LockGuard) has neither trouble.
///
/// # Poolers
///
/// **Not through a pooler in transaction or statement mode.** There the lock stays with a session of the server's that others use, and
/// nobody can give it back. That cannot be known for certain from here, so it is not refused;
/// [`release`](SessionGuard::release) says so when it meets another session than before. `DISCARD ALL` and
/// `pg_advisory_unlock_all()` take the lock away without a word: a pool of connections may send them when a connection comes back.
#[derive(Clone, Debug)]
pub struct SessionLock {
    wanted: Wanted,
    release_timeout: Duration,
}

impl SessionLock {
    pub(crate) fn new(wanted: Wanted, release_timeout: Duration) -> Self {
        Self { wanted, release_timeout }
    }

    /// The same lock, to be held with others that share it: see [`TransactionLock::shared`](crate::TransactionLock::shared).
    #[must_use]
    pub fn shared(mut self) -> Self {
        self.wanted.advisory.shared = true;
        self
    }

    /// Takes the lock if it is free now, and gives a guard that lends the client back; `None` if another session has the lock. One round
    /// trip.
    ///
    /// # Errors
    /// - [`SessionRefused`](ErrorKind::SessionRefused): a transaction is open on the connection, which is to be ended first; or
    ///   the connection is to a hot standby; or what the text says.
    /// - [`SessionUnavailable`](ErrorKind::SessionUnavailable): the connection has ended, or the statement failed; the source says
    ///   why.
    ///
    /// The text says whether the connection can be used as before. If not, close it, since it may have the lock.
    pub fn try_acquire<'a>(&self, client: &'a mut Client) -> Result<Option<SessionGuard<'a>>> {
        let (granted, backend) = self.wanted.try_acquire(client)?;
        Ok(granted.then(|| self.guard(client, backend)))
    }

    /// Waits for the lock, and gives a guard that lends the client back. `context` is a [`Duration`], an
    /// [`Instant`](std::time::Instant) or a [`Context`]; a time of zero, or one that has passed, means *try once*.
    ///
    /// It waits as a [`TransactionLock`](crate::TransactionLock#how-it-waits) does, without a savepoint, and `lock_timeout` is as before.
    ///
    /// # Errors
    /// - [`TimedOut`](ErrorKind::TimedOut): the time was over, or `statement_timeout` was before it (the text says so, and
    ///   [`sqlstate`](Error::sqlstate) is 57014 then).
    /// - [`Cancelled`](ErrorKind::Cancelled): the context was cancelled, or somebody cancelled the statement.
    /// - [`LockUnavailable`](ErrorKind::LockUnavailable): the server found a deadlock.
    /// - Those of [`try_acquire`](Self::try_acquire).
    pub fn acquire<'a>(
        &self,
        client: &'a mut Client,
        context: impl Into<Context>,
    ) -> Result<SessionGuard<'a>> {
        let backend = self.wanted.acquire(client, &context.into())?;
        Ok(self.guard(client, backend))
    }

    fn guard<'a>(&self, client: &'a mut Client, backend: i32) -> SessionGuard<'a> {
        SessionGuard { client, lock: self.clone(), backend, is_held: true, origin: Origin::here() }
    }
}

/// Holds the lock and lends the client: use it as the `Client`. Releases the lock when dropped. [`SessionLock`] makes it.
#[must_use = "the lock is released as soon as the guard is dropped"]
pub struct SessionGuard<'a> {
    client: &'a mut Client,
    lock: SessionLock,
    /// The server's session that has the lock.
    backend: i32,
    /// Until it is released.
    is_held: bool,
    origin: Origin,
}

impl SessionGuard<'_> {
    /// Releases the lock, and says whether it was held until then.
    ///
    /// It takes two round trips: the first asks for a sign of life, so that the call ends within the release timeout
    /// ([`Config::release_timeout`](crate::Config::release_timeout), 2 s by default) where the server does not answer. Only if it falls
    /// silent between the two does the call take as long as the connection lets it.
    ///
    /// # Errors
    /// - [`Lost`](ErrorKind::Lost): the lock had ended before: the connection has, or somebody has sent `DISCARD ALL`, say.
    ///   Another holder may have been at work meanwhile.
    /// - [`UnlockFailed`](ErrorKind::UnlockFailed): the server did not answer, or refused. The session has the lock still, so close
    ///   the connection.
    /// - [`OtherProcess`](ErrorKind::OtherProcess): the lock was taken before a `fork`. Nothing is touched.
    /// - [`SessionUnavailable`](ErrorKind::SessionUnavailable): in async code, if no thread could be started for the call. The
    ///   session has the lock still.
    pub fn release(mut self) -> Result<()> {
        self.give_back()
    }

    fn give_back(&mut self) -> Result<()> {
        self.is_held = false;
        let key = &self.lock.wanted.key;
        self.origin.check(format_args!("the session lock {key:?}"))?;
        drive(|| unlock(self.client, &self.lock, self.backend)).unwrap_or_else(|error| Err(no_thread(error)))
    }
}

/// Gives the lock back, on a thread that may call the driver.
fn unlock(client: &mut Client, lock: &SessionLock, backend: i32) -> Result<()> {
    let SessionLock { wanted, release_timeout } = lock;
    let error = |kind, why: &str| Error::new(kind, format!("the session lock {:?}: {why}", wanted.key));
    let lost = |why: &str| {
        let text = format!("{why}; another holder may have been at work meanwhile");
        error(ErrorKind::Lost, &format!("the lock did not last until its release: {text}"))
    };
    /// A cancel request that was meant for a statement before may come late, and strike this one. More of them do not come by accident.
    const ATTEMPTS: usize = 5;
    let mut strikes = 0;
    let answer = loop {
        let answer =
            client.is_valid(*release_timeout).and_then(|()| rows(client, &wanted.advisory.unlock(backend)));
        match answer {
            Err(cause) if cause.code() == Some(&SqlState::QUERY_CANCELED) && strikes + 1 < ATTEMPTS => {
                strikes += 1;
            }
            answer => break answer,
        }
    };
    match answer {
        Ok(rows) => match first(&rows) {
            Some(answer::GRANTED) => Ok(()),
            Some(answer::OTHER_BACKEND) => Err(lost(
                "the connection has another session of the server's now, and the former one may have the lock for good: a pooler in \
                 transaction or statement mode stands before the server; connect to the server directly, or use a transaction lock",
            )),
            _ if strikes > 0 => Err(lost(
                "the session does not have it; a cancel request struck the release, which may have given it back before, or else \
                 somebody has sent DISCARD ALL or pg_advisory_unlock",
            )),
            _ => Err(lost("the session does not have it; see who sends DISCARD ALL or pg_advisory_unlock")),
        },
        Err(cause) if client.is_closed() || ends_session(&cause) => {
            Err(lost("the connection has ended").with_source(cause))
        }
        Err(cause) => {
            let text = format!(
                "the server could not be told: {}; close the connection, which has the lock still",
                chain(&cause)
            );
            Err(error(ErrorKind::UnlockFailed, &text).with_source(cause))
        }
    }
}

/// Whether the server's last word is among its errors. The driver notices the end of the connection after it.
fn ends_session(error: &postgres::Error) -> bool {
    error
        .as_db_error()
        .is_some_and(|error| matches!(error.parsed_severity(), Some(Severity::Fatal | Severity::Panic)))
}

impl Deref for SessionGuard<'_> {
    type Target = Client;

    fn deref(&self) -> &Client {
        self.client
    }
}

impl DerefMut for SessionGuard<'_> {
    fn deref_mut(&mut self) -> &mut Client {
        self.client
    }
}

impl Drop for SessionGuard<'_> {
    /// Releases the lock as [`release`](SessionGuard::release) does. A failure is logged; the session may have the lock then, for as long
    /// as the connection lasts.
    fn drop(&mut self) {
        if self.is_held
            && let Err(error) = self.give_back()
            && error.kind() != ErrorKind::OtherProcess
        {
            log::warn!("a session lock could not be given back: {}", chain(&error));
        }
    }
}

impl fmt::Debug for SessionGuard<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SessionGuard")
            .field("key", &self.lock.wanted.key)
            .field("backend", &self.backend)
            .finish_non_exhaustive()
    }
}
