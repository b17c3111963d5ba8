//! Who holds a lock and who waits for it, as the server sees it.

use std::net::IpAddr;
use std::time::{Duration, SystemTime};

/// A lock at one moment: see [`PostgresManager::inspect`](crate::PostgresManager::inspect).
///
/// It is news of the past when it arrives. Show it to people; decide nothing by it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LockView {
    /// The namespace of the key; empty for a number and a pair, which have none.
    pub namespace: String,
    /// The key in text, as [`Key`](crate::Key) displays it.
    pub key: String,
    /// The session that has the lock, if one has.
    pub holder: Option<Holder>,
    /// The sessions that wait for it, in the order in which they will get it.
    pub waiters: Vec<Waiter>,
}

/// The session that has a lock.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Holder {
    /// What the holder's [`LockValuer`](crate::LockValuer) said when the term began.
    pub annotation: Option<Vec<u8>>,
    /// The fencing token of the term. `None` if the catalog knows nothing of it: the lock is held by a manager without
    /// catalog, by an application that uses the same number, or since this very instant.
    pub token: Option<i64>,
    /// The process that serves the session, for `pg_terminate_backend` and `pg_stat_activity`.
    pub pid: i32,
    /// Where the session comes from. `None` for a Unix socket, and for the sessions of other roles unless ours is a member
    /// of `pg_read_all_stats`.
    pub client_addr: Option<IpAddr>,
    /// What the session calls itself.
    pub application_name: Option<String>,
    /// When the term began, by the server's clock. `None` where the token is.
    pub since: Option<SystemTime>,
}

/// A session that waits for a lock.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Waiter {
    /// The process that serves the session.
    pub pid: i32,
    /// Where the session comes from; `None` as in [`Holder::client_addr`].
    pub client_addr: Option<IpAddr>,
    /// What the session calls itself.
    pub application_name: Option<String>,
    /// How long the session has had its place in the queue. A claim that waits longer than
    /// [`wait_slice`](crate::Config::wait_slice) takes a new place then.
    pub waiting_for: Duration,
}
