//! Who holds a lock and who waits for it, as the server sees it.

use std::fmt;
use std::net::IpAddr;
use std::time::{Duration, SystemTime};

use crate::loss::date;

/// A lock at one moment: see [`PostgresManager::inspect`](crate::PostgresManager::inspect) and [`MultiLock::inspect`](crate::MultiLock::inspect).
///
/// It is news of the past when it arrives. Show it to people; decide nothing by it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LockView {
    /// The namespace of the key; empty for a number and a pair, which have none, and in memory.
    pub namespace: String,
    /// The key in text, as [`Key`](crate::Key) displays it.
    pub key: String,
    /// The session that has the lock, if one has. Of several that share it, the first; of a semaphore, that of the first permit that is held.
    pub holder: Option<Holder>,
    /// The others that share the lock with that one, or have the other permits.
    pub sharers: Vec<Holder>,
    /// The sessions that wait for it, in the order in which they will get it.
    pub waiters: Vec<Waiter>,
    /// Of a [semaphore](crate::PostgresManager::semaphore), how many permits there are. As many are held as there are
    /// [`holders`](Self::holders); more than this where it was lowered and former ones are held still. `None` of a lock.
    pub permits: Option<u32>,
    /// How long the takeover grace lasts at the most, as this manager counts it: nobody is granted a lock meanwhile, and those who want one
    /// are not among the waiters. `None` if there is none. See [`Config::takeover`](crate::Config::takeover).
    pub grace_left: Option<Duration>,
}

impl LockView {
    /// All that have the lock: the holder, and those that share it or have the other permits.
    pub fn holders(&self) -> impl Iterator<Item = &Holder> {
        self.holder.iter().chain(&self.sharers)
    }
}

/// The session that has a lock.
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Holder {
    /// What the holder's [`LockValuer`](crate::LockValuer) said when the term began. `None` of a holder that shares a lock.
    pub annotation: Option<Vec<u8>>,
    /// The fencing token of the term, which is one for all that share a lock, and another one for each permit of a semaphore. `None` if the
    /// catalog knows nothing of it: the lock is held by a manager without catalog, by an application that uses the same number, or since
    /// this very instant.
    pub token: Option<i64>,
    /// The process that serves the session, for `pg_terminate_backend` and `pg_stat_activity`. 0 if a prepared transaction has the lock,
    /// which has no session: see `pg_prepared_xacts`.
    pub pid: i32,
    /// Where the session comes from. `None` for a Unix socket, and for the sessions of other roles unless ours is a member
    /// of `pg_read_all_stats`.
    pub client_addr: Option<IpAddr>,
    /// What the session calls itself.
    pub application_name: Option<String>,
    /// When the term began, by the server's clock. `None` where the token is, and of a holder that shares a lock.
    pub since: Option<SystemTime>,
    /// True if others may have the lock at the same time.
    pub is_shared: bool,
    /// Of a semaphore, which of its permits, from 1 on. `None` of a lock.
    pub permit: Option<u32>,
}

impl fmt::Debug for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { annotation, token, pid, client_addr, application_name, since, is_shared, permit } = self;
        // The quotes and escapes are those of a text; what comes from another process must not break a line of the log.
        let annotation = annotation.as_deref().map(|bytes| match str::from_utf8(bytes) {
            Ok(text) => format!("{text:?}"),
            Err(_) => format!("b\"{}\"", bytes.escape_ascii()),
        });
        let since = since.map(date);
        let mut debug = f.debug_struct("Holder");
        debug
            .field("annotation", &Shown(annotation))
            .field("token", token)
            .field("pid", pid)
            .field("client_addr", client_addr)
            .field("application_name", application_name)
            .field("since", &Shown(since));
        if *is_shared {
            debug.field("is_shared", is_shared);
        }
        if let Some(permit) = permit {
            debug.field("permit", permit);
        }
        debug.finish()
    }
}

/// Who that is, for a person: `"billing leader" at 10.0.0.7 (backend 4711, token 42)`.
impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.application_name {
            // What comes from another process must not break a line.
            Some(name) => write!(f, "{name:?}")?,
            None => f.write_str("a session")?,
        }
        if let Some(address) = self.client_addr {
            write!(f, " at {address}")?;
        }
        write!(f, " (backend {}", self.pid)?;
        if let Some(token) = self.token {
            write!(f, ", token {token}")?;
        }
        f.write_str(")")
    }
}

/// A text that is shown as it is.
struct Shown(Option<String>);

impl fmt::Debug for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Some(text) => write!(f, "Some({text})"),
            None => f.write_str("None"),
        }
    }
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
    /// [`wait_slice`](crate::Config::wait_slice) takes a new place then. Zero of the one that is the next to get a permit of a semaphore, which
    /// is in no queue.
    pub waiting_for: Duration,
    /// Whether it wants to share the lock. `None` of one that has waited for longer than that, unless it is the first of those that have:
    /// what the others wait for does not tell.
    pub is_shared: Option<bool>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_holder_is_shown_as_a_person_reads_it() {
        let mut holder = Holder {
            annotation: Some(br#"{"pid":7}"#.to_vec()),
            token: Some(42),
            pid: 7,
            client_addr: Some(IpAddr::from([127, 0, 0, 1])),
            application_name: Some("app".to_owned()),
            since: Some(SystemTime::UNIX_EPOCH + Duration::from_millis(1_500)),
            is_shared: false,
            permit: None,
        };
        let shown = r#"Holder { annotation: Some("{\"pid\":7}"), token: Some(42), pid: 7, client_addr: Some(127.0.0.1), application_name: Some("app"), since: Some(1970-01-01T00:00:01.500Z) }"#;
        assert_eq!(format!("{holder:?}"), shown);
        assert_eq!(holder.to_string(), r#""app" at 127.0.0.1 (backend 7, token 42)"#);
        holder.annotation = Some(vec![0xff, b'x', b'\n']);
        assert!(format!("{holder:?}").contains(r#"annotation: Some(b"\xffx\n")"#), "{holder:?}");
    }
}
