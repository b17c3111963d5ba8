//! The pool of sessions: how many there may be, which are free, and what may not come back.

use std::convert::Infallible;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use r2d2::{ManageConnection, NopErrorHandler, PooledConnection};

use super::catalog::{self, CatalogMode};
use super::config::Config;
use super::session::{Failure, Session};
use super::sql::Schema;
use super::state::Rhythm;
use super::stream::{DialError, Dialer, StreamControl};
use crate::error::{Error, ErrorKind, Result, chain};
use crate::loss::LossReason;

/// The sessions of a manager.
///
/// What r2d2 hands out is a [`Slot`]: the right to one session, and that session if it is open. It is opened on the
/// thread of the claim that wants it, not on r2d2's: there its error is a value and not a text, it ends at a deadline,
/// it can be killed, and a server that is down is not called again and again for claims that have ended. The session
/// itself is made by `r2d2_postgres`.
pub(super) struct Pool {
    slots: r2d2::Pool<Slots>,
    dialer: Arc<Dialer>,
    wait_slice: Duration,
    lease: Duration,
    heartbeat: Duration,
    connect_timeout: Duration,
    catalog: CatalogMode,
    schema: Arc<Schema>,
    /// Whether the catalog has been seen to be there.
    catalog_ready: AtomicBool,
    /// Whether the server has been shown to keep sessions apart.
    probed: AtomicBool,
    /// When somebody last found no slot, in milliseconds since `made`; 0 if that has not happened.
    crowded_at: AtomicU64,
    made: Instant,
}

/// A checked-out slot. Back in the pool when dropped; its session only if it is open and not [tainted](Slot::taint).
pub(super) type PooledSlot = PooledConnection<Slots>;

/// What the pool manages: see [`Pool`].
#[derive(Debug)]
pub(super) struct Slots;

/// The right to one session, and the session.
#[derive(Default)]
pub(super) struct Slot {
    session: Option<Session>,
}

impl ManageConnection for Slots {
    type Connection = Slot;
    type Error = Infallible;

    fn connect(&self) -> std::result::Result<Slot, Infallible> {
        Ok(Slot::default())
    }

    fn is_valid(&self, _: &mut Slot) -> std::result::Result<(), Infallible> {
        // Not asked: the first statement of a claim tells, and costs no round trip of its own.
        Ok(())
    }

    fn has_broken(&self, slot: &mut Slot) -> bool {
        slot.session.as_ref().is_none_or(Session::is_over)
    }
}

impl Slot {
    /// The session, if it is open.
    pub(super) fn session(&mut self) -> Option<&mut Session> {
        self.session.as_mut()
    }

    /// Whether there is a session, and it is not known to be useless.
    pub(super) fn is_open(&self) -> bool {
        self.session.as_ref().is_some_and(|session| !session.is_over())
    }

    /// Closes the session and says so to the server, which takes no longer than a goodbye may; after `by`, without a word.
    pub(super) fn close(&mut self, by: Instant) {
        if Instant::now() >= by {
            self.taint();
        }
        self.session = None;
    }

    /// Marks the session as one that must never be used again, and closes it.
    pub(super) fn taint(&mut self) {
        if let Some(session) = self.session.take() {
            session.kill();
        }
    }
}

/// How long to wait for a slot at one time. Short, since a release cannot interrupt it; whoever wants to wait longer comes
/// again.
const PATIENCE: Duration = Duration::from_millis(100);

/// r2d2 makes slots on a thread of its own, which may have to wait for its turn on a busy machine.
const TURNS: u32 = 10;

impl Pool {
    pub(super) fn new(config: &Config) -> Result<Self> {
        let mut postgres = config.postgres.clone();
        if postgres.get_application_name().is_none() {
            postgres.application_name("dsync");
        }
        // An idle session must not stand half-open for the two hours that are the usual default.
        if postgres.get_keepalives_idle() == Duration::from_secs(2 * 60 * 60) {
            postgres.keepalives_idle(Duration::from_secs(10));
        }
        let dialer = Dialer::new(postgres, config.tls.clone()).map_err(|error| {
            Error::new(ErrorKind::InvalidConfig, "the connection's settings do not fit together")
                .with_source(error)
        })?;
        let slots = r2d2::Pool::builder()
            .max_size(config.max_sessions)
            .min_idle(Some(0))
            .max_lifetime(None)
            .idle_timeout(Some(config.idle_timeout))
            .test_on_check_out(false)
            .error_handler(Box::new(NopErrorHandler))
            .build_unchecked(Slots);
        Ok(Self {
            slots,
            dialer: Arc::new(dialer),
            wait_slice: config.wait_slice,
            lease: config.lease,
            heartbeat: config.lease_plan().heartbeat,
            connect_timeout: config.connect_timeout,
            catalog: config.catalog,
            schema: Arc::clone(&config.schema),
            catalog_ready: AtomicBool::new(false),
            probed: AtomicBool::new(false),
            crowded_at: AtomicU64::new(0),
            made: Instant::now(),
        })
    }

    /// A slot with an open session, if there is one at hand.
    pub(super) fn take_open(&self) -> Option<PooledSlot> {
        self.slots.try_get().filter(|slot| slot.is_open())
    }

    /// How many slots nobody has taken.
    pub(super) fn idle(&self) -> usize {
        self.slots.state().idle_connections.try_into().unwrap_or(usize::MAX)
    }

    /// Closes the sessions that nobody uses. Several threads may do it at once, each a part of them.
    pub(super) fn close_idle(&self, by: Instant) {
        // A slot without a session does not go back, so there are fewer each time.
        while let Some(mut slot) = self.slots.try_get() {
            slot.close(by);
        }
    }

    /// The rhythm of heartbeats, for a claim whose time begins at `epoch`.
    pub(super) fn rhythm(&self, epoch: Instant) -> Rhythm {
        Rhythm::of(self.heartbeat, epoch.saturating_duration_since(self.made))
    }

    /// How long it may take to have a slot and to open its session.
    pub(super) fn takes_at_most(&self) -> Duration {
        PATIENCE * TURNS + self.connect_timeout
    }

    /// Whether a slot that is free in all but name is to be given back at once, since others want one.
    pub(super) fn is_crowded(&self) -> bool {
        const LASTS: u64 = 1_000;
        let at = self.crowded_at.load(Ordering::Relaxed);
        at > 0 && self.now() - at.min(self.now()) < LASTS
    }

    /// Milliseconds since the pool was made, and one.
    fn now(&self) -> u64 {
        u64::try_from(self.made.elapsed().as_millis()).unwrap_or(u64::MAX - 1) + 1
    }

    /// Takes a slot, waiting for one until the pool's patience ends.
    pub(super) fn take(&self) -> std::result::Result<PooledSlot, Refusal> {
        if let Some(slot) = self.slots.try_get() {
            return Ok(slot);
        }
        if self.slots.state().connections >= self.slots.max_size() {
            self.crowded_at.store(self.now(), Ordering::Relaxed);
        }
        for _ in 0..TURNS {
            if let Ok(slot) = self.slots.get_timeout(PATIENCE) {
                return Ok(slot);
            }
            if self.slots.state().connections >= self.slots.max_size() {
                break;
            }
        }
        Err(Refusal::new(
            ErrorKind::PoolExhausted,
            format!(
                "all {} sessions are taken by other claims; raise max_sessions, or release locks that are not needed",
                self.slots.max_size()
            ),
        ))
    }

    /// Opens the slot's session if it is not open. `control` can end the attempt.
    pub(super) fn open(&self, slot: &mut Slot, control: &StreamControl) -> std::result::Result<(), Refusal> {
        if slot.is_open() {
            return Ok(());
        }
        slot.taint();
        let by = Instant::now() + self.connect_timeout;
        let mut session = self.open_session(control.clone(), by)?;
        self.probe(&mut session, by)?;
        if !self.catalog_ready.load(Ordering::Relaxed) {
            catalog::ensure(&mut session, self.catalog, by)?;
            self.catalog_ready.store(true, Ordering::Relaxed);
        }
        slot.session = Some(session);
        Ok(())
    }

    fn open_session(&self, control: StreamControl, by: Instant) -> std::result::Result<Session, Refusal> {
        let (dialer, schema) = (Arc::clone(&self.dialer), Arc::clone(&self.schema));
        Session::open(dialer, schema, control, self.wait_slice, self.lease, self.heartbeat, by)
    }

    /// Shows once that two sessions which are open at once are two, and stay what they are.
    ///
    /// A transaction pooler serves both with one and the same backend, or one of them with several, and then two clients
    /// "hold" one lock. A pooler that comes later is noticed by the heartbeat.
    fn probe(&self, session: &mut Session, by: Instant) -> std::result::Result<(), Refusal> {
        if self.probed.load(Ordering::Relaxed) {
            return Ok(());
        }
        // Not all of the time: a pooler in session mode that has one session lets the other one wait, and one will do.
        let soon = Instant::now() + by.saturating_duration_since(Instant::now()) / 2;
        let mut other = match self.open_session(StreamControl::new(), soon) {
            Ok(other) => other,
            // A server that is full for a second session is no proof of anything; the next session asks again.
            Err(refusal) if refusal.is_curable() => return Ok(()),
            Err(refusal) => return Err(refusal),
        };
        if session.backend_pid() == other.backend_pid() {
            return Err(Refusal::pooler());
        }
        for session in [session, &mut other] {
            // Twice in a row: a pooler may take turns with its sessions.
            for _ in 0..2 {
                match session.heartbeat(by) {
                    Err(Failure::Lost { reason: LossReason::SessionChanged, .. }) => {
                        return Err(Refusal::pooler());
                    }
                    outcome => outcome.map_err(Refusal::from_failure)?,
                }
            }
        }
        self.probed.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// A session has turned out to be shared, so a pooler has come after the probe: the next session asks again.
    pub(super) fn sessions_are_shared(&self) {
        self.probed.store(false, Ordering::Relaxed);
    }

    /// A statement has found the catalog missing: someone dropped it, or the whole database.
    pub(super) fn catalog_is_gone(&self) {
        self.catalog_ready.store(false, Ordering::Relaxed);
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").field("state", &self.slots.state()).field("dialer", &self.dialer).finish()
    }
}

/// Why there is no session: an error in the making, with the kind that decides how to go on.
#[derive(Debug)]
pub(super) struct Refusal {
    kind: ErrorKind,
    message: String,
    cause: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Refusal {
    pub(super) fn new(kind: ErrorKind, message: String) -> Self {
        Self { kind, message, cause: None }
    }

    /// Whether waiting may help, without anyone changing a setting.
    pub(super) fn is_curable(&self) -> bool {
        self.kind == ErrorKind::SessionUnavailable
    }

    /// Whether all slots are taken.
    pub(super) fn is_about_slots(&self) -> bool {
        self.kind == ErrorKind::PoolExhausted
    }

    /// Whether the next attempt need not hurry.
    pub(super) fn is_patient(&self) -> bool {
        matches!(self.kind, ErrorKind::SessionRefused | ErrorKind::InvalidKey)
    }

    /// Whether a part of the catalog was found missing: a table, or a column that an older version does not have.
    pub(super) fn is_about_catalog(&self) -> bool {
        let database = self.cause.as_ref().and_then(|cause| cause.downcast_ref::<postgres::Error>());
        matches!(
            database.and_then(postgres::Error::code).map(|code| code.code()),
            Some("3F000" | "42P01" | "42703")
        )
    }

    pub(super) fn into_error(self) -> Error {
        let error = Error::new(self.kind, self.message);
        match self.cause {
            Some(cause) => error.with_source(cause),
            None => error,
        }
    }

    /// Two keys have one hash.
    pub(super) fn collision(key: &str, other: &str) -> Self {
        let message = format!(
            "{key:?} has the same hash as {other:?} (namespace:key), so the two would exclude each other; \
             rename one of them, or put it into another namespace"
        );
        Self::new(ErrorKind::InvalidKey, message)
    }

    pub(super) fn from_dial(error: DialError) -> Self {
        let (kind, advice) = match error.driver() {
            Some(driver) => advise(driver),
            // The hook's or the loopback's: the system is short of something.
            None => (ErrorKind::SessionUnavailable, "check host and port, and that the server runs"),
        };
        Self { kind, message: format!("{error}; {advice}"), cause: Some(Box::new(error)) }
    }

    pub(super) fn from_failure(failure: Failure) -> Self {
        match failure {
            Failure::Lost { reason, cause } => Self {
                kind: ErrorKind::SessionUnavailable,
                message: format!("the session did not come to be: {reason}"),
                cause: cause.map(Into::into),
            },
            Failure::Refused(cause) => {
                let (kind, advice) = advise(&cause);
                Self { kind, message: format!("{}; {advice}", chain(&cause)), cause: Some(cause.into()) }
            }
        }
    }

    fn refused(message: String) -> Self {
        Self::new(ErrorKind::SessionRefused, message)
    }

    pub(super) fn not_postgres() -> Self {
        Self::refused("the server does not answer as PostgreSQL does; check host and port".to_owned())
    }

    pub(super) fn too_old(major: i32) -> Self {
        Self::refused(format!(
            "the server is PostgreSQL {major}, which has no idle_session_timeout to bound a lease; \
             upgrade it to 14 or newer"
        ))
    }

    pub(super) fn standby() -> Self {
        Self::refused(
            "the server is a hot standby, whose locks exclude nobody on the primary; connect to the primary, \
             or name all hosts and say target_session_attrs=read-write"
                .to_owned(),
        )
    }

    pub(super) fn pooler() -> Self {
        Self::refused(SHARED_SESSIONS.to_owned())
    }
}

const SHARED_SESSIONS: &str = "a pooler in transaction or statement mode stands before the server: sessions share a \
                               backend, so a lock would exclude nobody; connect to the server directly, or use \
                               session mode";

/// What kind of trouble an error of the driver is, and what to do about it.
fn advise(error: &postgres::Error) -> (ErrorKind, &'static str) {
    use ErrorKind::{SessionRefused, SessionUnavailable};
    if let Some(code) = error.code() {
        return match code.code() {
            // The catalog went away; it is looked for, and made, with the next session.
            "3F000" | "42P01" | "42703" => (SessionUnavailable, "the catalog of locks is missing"),
            "55P03" => {
                (SessionUnavailable, "a table of the catalog is locked by another session; see pg_locks")
            }
            "28P01" => (SessionRefused, "check user and password"),
            "28000" => (SessionRefused, "check the user, and the server's pg_hba.conf"),
            "3D000" => (SessionRefused, "create the database, or name another one"),
            "42501" => (SessionRefused, "grant the role what it lacks"),
            "53300" => (
                SessionUnavailable,
                "raise the server's max_connections, or lower max_sessions of the services",
            ),
            "57P03" => (SessionUnavailable, "the server is starting or stopping"),
            // A statement that was prepared is not known, or one of another process's is.
            "26000" | "42P05" => (SessionRefused, SHARED_SESSIONS),
            code if code.starts_with("22")
                || code.starts_with("28")
                || code.starts_with("0A")
                || code.starts_with("42") =>
            {
                (SessionRefused, "change what the server objects to")
            }
            _ => (SessionUnavailable, "see the server's log"),
        };
    }
    // The driver does not tell its own kinds apart. What came from the wire has an I/O error among its causes; what
    // remains is about what it was told to do: passwords, TLS, channel binding.
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if error.is::<std::io::Error>() {
            return (SessionUnavailable, "check host and port, and that the server runs");
        }
        cause = error.source();
    }
    if error.is_closed() {
        return (SessionUnavailable, "the server closed the connection; see its log");
    }
    (SessionRefused, "check password, sslmode and channel_binding")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn claims_have_the_rhythm_of_their_manager_whenever_they_begin() {
        let config = Config::from_url("postgres://nobody@localhost").unwrap().lease(Duration::from_secs(8));
        let pool = Pool::new(&config).unwrap();
        for late in [0, 1, 130, 999, 5_000].map(Duration::from_millis) {
            assert_eq!(pool.rhythm(pool.made + late), Rhythm::of(Duration::from_secs(2), late), "{late:?}");
        }
    }
}
