//! What a program sets by itself.

use std::sync::Arc;
use std::time::Duration;

use super::{CatalogMode, Config};
use crate::pg::quorum::Quorum;
use crate::pg::sql::schema::Schema;
use crate::pg::takeover::TakeoverPolicy;

impl Config {
    /// Keeps locks of one database apart: locks of one name in two namespaces have nothing to do with each other.
    /// Defaults to `"dsync"`. Not empty, and at most [`Key::MAX_LEN`](crate::Key::MAX_LEN) bytes without a NUL.
    #[must_use]
    pub fn namespace(mut self, namespace: impl Into<String>) -> Self {
        self.namespace = namespace.into();
        self
    }

    /// The name of the service, of which one process is to lead; see [`leadership_lock`](crate::leadership_lock).
    /// 1 to 1,005 bytes without a NUL. Defaults to none: then no process leads.
    #[must_use]
    pub fn service(mut self, service: impl Into<String>) -> Self {
        self.service = Some(service.into());
        self
    }

    /// The version of the service, for the annotation of its leader. At most 1,024 bytes without a NUL. Defaults to none.
    #[must_use]
    pub fn service_build(mut self, build: impl Into<String>) -> Self {
        self.build = Some(build.into());
        self
    }

    /// Whether tokens and annotations are kept in the database. Defaults to [`CatalogMode::Automatic`].
    #[must_use]
    pub fn catalog(mut self, mode: CatalogMode) -> Self {
        self.catalog = mode;
        self
    }

    /// After what takeover of the server nobody is granted a lock for a while, the *takeover grace*: so long that a holder that was cut off
    /// before has lost its term when another one gets the lock. Defaults to [`TakeoverPolicy::AfterPromotion`], and without a catalog to
    /// [`Immediate`](TakeoverPolicy::Immediate), which is all that is possible there.
    ///
    /// Advisory locks vanish with a restart of the server, and a promoted standby never had them. So with one of the other two policies
    /// locks are granted again when the longest lease that any manager of this database has had (15 s by default) has passed since
    /// the first session for locks on the new server: the start of a manager, or the next attempt of one that runs. Meanwhile [`lock`](crate::Lock::lock) waits, and [`try_lock`](crate::Lock::try_lock) fails with
    /// [`LockUnavailable`](crate::ErrorKind::LockUnavailable) and a text that says so; the log, [`ClaimSnapshot::grace_left`](crate::ClaimSnapshot),
    /// [`LockView::grace_left`](crate::LockView) and [`check`](Self::check) tell of it too. It lasts 15 s by default, 45 s where `pgdsync run` or `lead` was used: a wait should be longer.
    ///
    /// The policy and the longest lease belong to the *database*: they are in the catalog (`dsync.policy`), and committed before a manager's
    /// first term. A manager with a stronger policy or a longer lease raises them, one with a weaker policy is
    /// [refused](crate::ErrorKind::SessionRefused), since its locks would be granted while terms of others last. An operator lowers them
    /// when no manager wants more any longer: `UPDATE dsync.policy SET lease = 15000`, in milliseconds.
    ///
    /// A database that was made from a copy or a dump of another one counts as taken over, too: its locks come after one lease.
    ///
    /// What it does not cover: managers without a catalog, and locks on the application's own connections, which look at nothing of
    /// this; an old primary that lives on, and that its holders reach still; a policy or lease that was
    /// raised so shortly before a promotion that an asynchronous standby does not have it.
    ///
    /// ```
    /// use dsync::{Config, TakeoverPolicy};
    ///
    /// let config = Config::from_url("postgres://app@db.internal/app")?.takeover(TakeoverPolicy::AfterAnyRestart);
    /// # Ok::<(), dsync::Error>(())
    /// ```
    #[must_use]
    pub fn takeover(mut self, policy: TakeoverPolicy) -> Self {
        self.takeover = Some(policy);
        self
    }

    /// Who must have a holder's heartbeat before it counts. Defaults to [`Quorum::Server`].
    ///
    /// With [`Quorum::NamedStandbys`], each standby that the server's setting
    /// [`synchronous_standby_names`](https://www.postgresql.org/docs/current/runtime-config-replication.html#GUC-SYNCHRONOUS-STANDBY-NAMES)
    /// names must show, after a lock was taken and after each heartbeat, that it still follows the server. So when a standby is promoted while
    /// the old primary lives on, a holder there loses its term, with [`NotConfirmed`](crate::LossReason::NotConfirmed), before anybody is granted
    /// the lock on the new primary, whose [takeover grace](Self::takeover) comes first. All names count, however many of them commits
    /// wait for (`FIRST 1 (a, b)`, `ANY 1 (a, b)`). **Each standby that may be promoted must be named there**, by a name that no other one has,
    /// on whichever server is the primary; one that is not named must not be promoted while the old primary may live.
    ///
    /// The price: while a named standby is away no lock is granted, and a term ends when its time is over, 10 s after the last confirmation
    /// at the default lease; both come back with the standby. A confirmation costs a commit on the server's disk and the way to
    /// the standby and back, for the claims of a manager together where their heartbeats are. No commit of a heartbeat waits for a
    /// standby, so none hangs.
    ///
    /// A manager is [refused](crate::ErrorKind::SessionRefused) where it cannot work: `synchronous_standby_names` is empty or has a `*`; or the role
    /// does not see how far the standbys are, for which it must be a member of `pg_read_all_stats`. It needs the catalog, and a takeover policy
    /// that is not immediate. That heartbeats are confirmed belongs to the *database*, as the takeover policy does: a manager without it is
    /// refused from then on when it connects, until an operator says `UPDATE dsync.policy SET quorum = false`.
    ///
    /// What it does not cover: a fenced transaction on the old primary succeeds there, and its writes are gone with that server's timeline. And a
    /// standby that was promoted must not follow the old primary again before a lease has passed.
    ///
    /// ```
    /// use dsync::{Config, Quorum};
    ///
    /// let config = Config::from_url("postgres://app@db.internal/app")?.quorum(Quorum::NamedStandbys);
    /// # Ok::<(), dsync::Error>(())
    /// ```
    #[must_use]
    pub fn quorum(mut self, quorum: Quorum) -> Self {
        self.quorum = quorum;
        self
    }

    /// The schema that tokens and annotations are kept in, if they are. Defaults to `"dsync"`. For databases in which another
    /// application has a schema of this name; up to 63 bytes, written as it is called, without quotes.
    ///
    /// All who use the same locks must name the same schema, since each has tokens of its own.
    #[must_use]
    pub fn schema(mut self, name: impl AsRef<str>) -> Self {
        self.schema = Arc::new(Schema::new(name.as_ref()));
        self
    }

    /// How many sessions the manager may open, 1 to 262,143; each claim needs one for as long as it lasts. Defaults to 20.
    /// Guards that share a lock, or have permits of a semaphore, have one each; where sessions are [shared](Self::shared_sessions), permits have not,
    /// and of the readers of one lock the first has none of its own. The server's `max_connections` must allow it for every process.
    #[must_use]
    pub fn max_sessions(mut self, sessions: u32) -> Self {
        self.max_sessions = sessions;
        self
    }

    /// How many sessions the locks of this manager share, below [`max_sessions`](Self::max_sessions). Defaults to 0: each lock that is held or waited for
    /// has a session of its own.
    ///
    /// With 1 or more a session carries thousands of locks, with one lease, one heartbeat and no thread for each. What many threads ask for at
    /// once goes to the server in one statement. All promises of a lock stay true but one, which is weaker: see *heartbeats* below. What is different:
    ///
    /// - **The locks of a session are lost together**: when an operator terminates it, say, or when its lease ends. They are had back in a few
    ///   statements.
    /// - **A lock that is taken is waited for on a session of its own**, and held there. When there are no more of these
    ///   (`max_sessions` less this number) the claim asks again and again, after 5 to 500 ms, and may be overtaken by those who queue at the
    ///   server. A [snapshot](crate::SyncManager::snapshot) calls that [`TakingTurns`](crate::ClaimState::TakingTurns).
    /// - **Several readers of one lock have a session each**, but the first. Where there is none, `try_acquire` fails with
    ///   [`PoolExhausted`](crate::ErrorKind::PoolExhausted), and who waits takes turns.
    /// - **Heartbeats look for one lock**, which the session has taken to that end, and not for each: what lets go of all of them is noticed, a single
    ///   one that something else unlocks on our connection is not.
    /// - [`break_lock`](crate::Lock::break_lock) ends the session of the holder, with all its locks.
    /// - The permits of a [semaphore](crate::PostgresManager::semaphore) are found by one statement and taken by a second one. Several of one semaphore may be on
    ///   one session.
    ///
    /// Each lock that is held takes a place in the server's table of locks, which has `max_locks_per_transaction` × (`max_connections` +
    /// `max_prepared_transactions`) of them, and some more: <https://www.postgresql.org/docs/current/runtime-config-locks.html>. One shared session is
    /// enough for most; a second one helps where two processors of the server have work.
    ///
    /// A lock may differ: see [`LockOptions::shared_session`](crate::LockOptions::shared_session).
    ///
    /// ```
    /// use dsync::Config;
    ///
    /// let config = Config::from_url("postgres://app@db.internal/app")?.shared_sessions(1);
    /// # Ok::<(), dsync::Error>(())
    /// ```
    #[must_use]
    pub fn shared_sessions(mut self, sessions: u32) -> Self {
        self.shared_sessions = sessions;
        self
    }

    /// How long a session without a claim is kept for the next one, 1 ms to 24 days. Defaults to 60 s, looked at every 30 s.
    #[must_use]
    pub fn idle_timeout(mut self, timeout: Duration) -> Self {
        self.idle_timeout = timeout;
        self
    }

    /// How long one attempt to open a session may take, over all hosts, from 10 ms to 24 days. Defaults to 5 s, or to the
    /// time that the connection's own `connect_timeout` gives all its hosts, if that is longer. A session may take as long
    /// again for a look at the catalog, and the first one of a manager once more for a check of the server.
    ///
    /// Each address of each host has its share: the time that is left, divided by the number of addresses still to be
    /// tried. So of `n` addresses that do not answer the last one is tried after `(n - 1) / n` of this time, and a session
    /// is had within this time if one address gives it within an `n`th. An attempt begins with the address that gave the
    /// last session, or else after the one at which the last attempt ended. The connection's own `connect_timeout` bounds
    /// each share, and must not be longer than this time.
    ///
    /// To open a session takes five round trips (a password and TCP among them), two more with TLS, and one more where it is
    /// only preferred and the server has none. At a round trip above 400 ms, raise it.
    #[must_use]
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.connect_timeout = Some(timeout);
        self
    }

    /// How long [`release`](crate::Lock::release), [`stop`](crate::SyncManager::stop), and the dropping of a guard
    /// or of a manager may take at the most, 10 ms to 24 days. Defaults to 2 s.
    #[must_use]
    pub fn release_timeout(mut self, timeout: Duration) -> Self {
        self.release_timeout = timeout;
        self
    }

    /// How long one statement waits for the lock before the next one does, 10 ms to 24 days. Defaults to 5 s.
    ///
    /// A statement that waits holds back vacuum's horizon and `CREATE INDEX CONCURRENTLY`; a slice bounds that. Within a
    /// slice, who came first is served first. At the end of its slice a session goes to the end of the line of those that have waited for a
    /// slice, and the first of these is served before all that come newly.
    ///
    /// At default settings the server logs nothing of the wait of a claim or a guard, where the role may use PL/pgSQL. With `log_lock_waits` or
    /// `log_min_duration_statement` it logs every slice; a superuser turns them off for the role of the locks by
    /// `ALTER ROLE … SET log_lock_waits = off` and `ALTER ROLE … SET log_min_duration_statement = -1`.
    #[must_use]
    pub fn wait_slice(mut self, slice: Duration) -> Self {
        self.wait_slice = slice;
        self
    }

    /// How long the server keeps the lock for a holder from which it hears nothing (its `idle_session_timeout`), 500 ms to
    /// 24 days. Defaults to 15 s. A short lease replaces a holder that is cut off sooner; a long one forgives longer pauses.
    #[must_use]
    pub fn lease(mut self, lease: Duration) -> Self {
        self.lease = lease;
        self
    }

    /// By how much, at the least, the holder regards the lock as lost before the server gives it away, 10 ms at
    /// least. Defaults to a fifteenth of the lease. Twice the heartbeat, the heartbeat's timeout and the margin together must
    /// be less than the lease.
    #[must_use]
    pub fn margin(mut self, margin: Duration) -> Self {
        self.margin = Some(margin);
        self
    }

    /// How often a holder renews its lease, 10 ms at least. Defaults to a quarter of the lease.
    ///
    /// All locks of a manager do so at the same times, of which there are sixteen in each interval: the first heartbeat of a
    /// term comes up to a sixteenth early.
    #[must_use]
    pub fn heartbeat(mut self, interval: Duration) -> Self {
        self.heartbeat = Some(interval);
        self
    }

    /// How long the answer to a heartbeat may take before the lock counts as lost, 10 ms at least. Defaults to a quarter of
    /// the lease.
    #[must_use]
    pub fn heartbeat_timeout(mut self, timeout: Duration) -> Self {
        self.heartbeat_timeout = Some(timeout);
        self
    }
}
