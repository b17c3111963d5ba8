//! The pool of sessions: opens them for the claims, asks on them, and keeps what all of them have found.

mod probe;
mod slots;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use postgres::Row;
use postgres::types::ToSql;

use self::slots::Slots;
pub(crate) use self::slots::{PooledSlot, Slot};
use crate::clock::Moment;
use crate::error::{Error, ErrorKind, Result};
use crate::loss::LossReason;
use crate::pg::catalog;
use crate::pg::catalog::takeover::{self, Past};
use crate::pg::config::{CatalogMode, Config};
use crate::pg::confirm::{self, Confirmers, Outcome, Wait, Wanted};
use crate::pg::quorum::{Confirmations, Quorum};
use crate::pg::session::machine::{Confirms, Rhythm};
use crate::pg::session::open::{Session, SessionPlan};
use crate::pg::session::refusal::Refusal;
use crate::pg::session::wire::Failure;
use crate::pg::stop_probe::StopProbes;
use crate::pg::stream::{Dialer, StreamControl};
use crate::pg::takeover::{Agreed, GraceLeft, GraceStep, Graces, TakeoverPolicy};
use crate::pg::watchdog::Watchdog;
use crate::telling::Observing;

/// The sessions of a manager.
///
/// What r2d2 hands out is a [`Slot`]: the right to one session, and that session if it is open. It is opened on the
/// thread of the claim that wants it, not on r2d2's: there its error is a value and not a text, it ends at a deadline,
/// it can be killed, and a server that is down is not called again and again for claims that have ended. The session
/// itself is made by `r2d2_postgres`.
pub(crate) struct Pool {
    slots: Slots,
    plan: SessionPlan,
    watchdog: Arc<Watchdog>,
    heartbeat_timeout: Duration,
    connect_timeout: Duration,
    catalog: CatalogMode,
    /// Is told how many sessions are in use.
    observing: Option<Arc<Observing>>,
    /// The takeover policy and the lease, as all managers of the database are to agree on them.
    own: Agreed,
    /// Whoever has it takes no other mutex.
    known_catalog: Mutex<KnownCatalog>,
    /// Those that sessions have found. Whoever has it takes no other mutex.
    graces: Mutex<Graces>,
    /// What the standbys have confirmed. Whoever has it takes no other mutex.
    confirmations: Mutex<Confirmations>,
    /// The connections that show whether a server is stopping. Whoever has it takes no other mutex but those of their streams.
    probes: Mutex<StopProbes>,
    /// Whether the server has been shown to keep sessions apart.
    probed: AtomicBool,
    made: Moment,
}

/// What a manager knows of the catalog.
#[derive(Debug, Default, PartialEq, Eq)]
enum KnownCatalog {
    /// Nothing; or a statement has found since that it is missing.
    #[default]
    Nothing,
    /// It is there.
    Seen,
    /// It is there, and all managers agree on the settings in it, this one among them. They last did in this run of the server,
    /// by its record; there is none where the catalog is not used.
    Agreed { run: Option<String> },
}

/// How often the watchdog looks at all deadlines, at the least. Often enough that hardly a deadline is nearer, which would
/// wake it; and so seldom that it costs nothing.
const LOOKS_EVERY: Duration = Duration::from_millis(500);

impl Pool {
    pub(crate) fn new(config: &Config, observing: Option<Arc<Observing>>) -> Result<Self> {
        let mut postgres = config.postgres.clone();
        postgres.application_name(config.own_name());
        // An idle session must not stand half-open for the two hours that are the usual default.
        if postgres.get_keepalives_idle() == Duration::from_secs(2 * 60 * 60) {
            postgres.keepalives_idle(Duration::from_secs(10));
        }
        let dialer = Dialer::new(postgres, config.connector()?).map_err(|error| {
            Error::new(ErrorKind::InvalidConfig, "the connection's settings do not fit together")
                .with_source(error)
        })?;
        let slots = Slots::new(config.max_sessions, config.idle_timeout)?;
        let plan = SessionPlan {
            dialer: Arc::new(
                dialer.with_password(config.password.clone()).with_passwords(config.passwords.clone()),
            ),
            schema: Arc::clone(&config.schema),
            slice: config.wait_slice,
            lease: config.lease,
            heartbeat: config.lease_plan().heartbeat,
        };
        Ok(Self {
            slots,
            plan,
            watchdog: Watchdog::new((config.lease_plan().heartbeat_timeout / 8).min(LOOKS_EVERY)),
            heartbeat_timeout: config.lease_plan().heartbeat_timeout,
            connect_timeout: config.connect_time(),
            catalog: config.catalog,
            observing,
            own: Agreed::of_manager(config.takeover_policy(), config.lease, config.quorum != Quorum::Server),
            known_catalog: Mutex::default(),
            graces: Mutex::default(),
            confirmations: Mutex::default(),
            probes: Mutex::default(),
            probed: AtomicBool::new(false),
            made: Moment::now(),
        })
    }

    /// Who has the sessions, and how one is taken.
    pub(crate) fn slots(&self) -> &Slots {
        &self.slots
    }

    /// Enforces the deadlines of the sessions and terms.
    pub(crate) fn watchdog(&self) -> &Arc<Watchdog> {
        &self.watchdog
    }

    /// Tells the observer of them. To be called after a slot was taken or given back, under no mutex but that of an engine.
    pub(crate) fn tell_of_sessions(&self) {
        if let Some(observing) = &self.observing {
            observing.sessions(|| self.slots.usage());
        }
    }

    /// True if there is an observer to tell.
    pub(crate) fn is_observed(&self) -> bool {
        self.observing.is_some()
    }

    /// Closes the sessions that nobody uses. Several threads may do it at once, each a part of them.
    pub(crate) fn close_idle(&self, by: Instant) {
        self.probes.lock().clear();
        self.slots.close_idle(by);
    }

    /// The rhythm of heartbeats, for a claim whose time begins at `epoch`.
    pub(crate) fn rhythm(&self, epoch: Moment) -> Rhythm {
        Rhythm::of(self.plan.heartbeat, epoch.saturating_duration_since(self.made))
    }

    /// How long it may take to have a slot and to open its session.
    pub(crate) fn takes_at_most(&self) -> Duration {
        let is_known = self.has_agreed() && self.probed.load(Ordering::Relaxed);
        let attempts = if is_known { 2 } else { 3 };
        Slots::TAKES_AT_MOST + self.connect_timeout * attempts
    }

    /// Opens the slot's session, if there is none that may take locks. `control` can end the attempt.
    ///
    /// It takes `connect_timeout`; as long again for the probe, and once more for the catalog, which may have to be made, and in which it
    /// looks whether the server was taken over.
    pub(crate) fn open(&self, slot: &mut Slot, control: &StreamControl) -> std::result::Result<(), Refusal> {
        if slot.is_ready() {
            return Ok(());
        }
        let mut session = self.connect(slot, control)?;
        let by = Instant::now() + self.connect_timeout;
        if self.own.quorum {
            confirm::may_confirm(&mut session, by)
                .map_err(|refusal| self.during("looked at the standbys", refusal))?;
        }
        self.look_at_catalog(&mut session, by)
            .map_err(|refusal| self.during("looked at the catalog", refusal))?;
        session.set_for_locks();
        slot.session = Some(session);
        Ok(())
    }

    /// Opens the slot's session, if there is none, for a question. It may take no lock: who only looks agrees on nothing for all managers of
    /// the database, is not refused for what it would agree on, and waits for a standby only if the catalog has to be made.
    fn open_to_ask(&self, slot: &mut Slot) -> std::result::Result<(), Refusal> {
        if slot.is_open() {
            return Ok(());
        }
        let control = StreamControl::new();
        if self.catalog == CatalogMode::None {
            return self.open(slot, &control);
        }
        let mut session = self.connect(slot, &control)?;
        let by = Instant::now() + self.connect_timeout;
        let is_known = *self.known_catalog.lock() != KnownCatalog::Nothing;
        if !is_known {
            catalog::ensure(&mut session, self.catalog, by)
                .map_err(|refusal| self.during("looked for the catalog", refusal))?;
            let mut known = self.known_catalog.lock();
            if *known == KnownCatalog::Nothing {
                *known = KnownCatalog::Seen;
            }
        }
        match takeover::peek(&mut session, by).map_err(Refusal::from_failure)? {
            Some(Past::Pending { id, lasts, seen }) => self.grace_goes_on(&id, lasts, seen),
            Some(Past::Over { id }) => {
                self.graces.lock().ends(&id);
            }
            None => {}
        }
        slot.session = Some(session);
        Ok(())
    }

    fn connect(&self, slot: &mut Slot, control: &StreamControl) -> std::result::Result<Session, Refusal> {
        slot.taint();
        let by = Instant::now() + self.connect_timeout;
        let session = if self.probed.load(Ordering::Relaxed) {
            Session::open(&self.plan, control.clone(), by)?
        } else {
            self.open_and_probe(control, by)?
        };
        if let Err(error) = session.watch_by(&self.watchdog) {
            log::debug!("no thread for the watchdog, so each call has a timer of its own: {error}");
        }
        Ok(session)
    }

    /// Sees that the catalog is there, and whether the session may be granted locks.
    ///
    /// Each session asks for itself, once: it does not outlive its server, so what it has found stays true. And as long as a takeover grace
    /// goes on, it remembers that.
    pub(crate) fn look_at_catalog(
        &self,
        session: &mut Session,
        by: Instant,
    ) -> std::result::Result<(), Refusal> {
        if self.catalog == CatalogMode::None {
            *self.known_catalog.lock() = KnownCatalog::Agreed { run: None };
            return Ok(());
        }
        let mut first = !self.has_agreed();
        let over = loop {
            // In a new one there is nothing to be found.
            if first && catalog::ensure(session, self.catalog, by)? {
                break None;
            }
            match takeover::may_ask(session, self.own, first, by).map_err(catalog::failed) {
                // Somebody has dropped it.
                Err(refusal) if refusal.is_about_catalog() && !first => {
                    self.forget_catalog();
                    first = true;
                }
                outcome => break outcome?,
            }
        };
        // In a run of the server that the manager has not seen, it says again what it wants to be agreed on: a standby that was promoted may not know
        // of it, nor a catalog that was made anew.
        let is_told = first || self.own.policy == TakeoverPolicy::Immediate;
        let past = match over {
            Some(id) if is_told || self.has_agreed_in(&id) => Past::Over { id },
            _ => takeover::look_at_past(session, self.own, None, by).map_err(catalog::failed)??,
        };
        self.take_note(session, past);
        Ok(())
    }

    fn has_agreed(&self) -> bool {
        matches!(*self.known_catalog.lock(), KnownCatalog::Agreed { .. })
    }

    /// Whether that was in this run of the server.
    fn has_agreed_in(&self, run: &str) -> bool {
        matches!(&*self.known_catalog.lock(), KnownCatalog::Agreed { run: Some(known) } if known == run)
    }

    /// Keeps in mind what a session has found, and logs what is new about it.
    fn take_note(&self, session: &mut Session, past: Past) {
        let (Past::Over { id } | Past::Pending { id, .. }) = &past;
        *self.known_catalog.lock() = KnownCatalog::Agreed { run: Some(id.clone()) };
        match past {
            Past::Over { id } => {
                self.end_grace(&id);
                session.set_run(id, false);
            }
            Past::Pending { id, lasts, seen } => {
                self.grace_goes_on(&id, lasts, seen);
                session.set_run(id, true);
            }
        }
    }

    fn grace_goes_on(&self, id: &str, lasts: Duration, seen: Duration) {
        let left = lasts.saturating_sub(seen);
        let is_new = self.graces.lock().goes_on(id, lasts, seen, Instant::now());
        if is_new && !left.is_zero() {
            log::warn!(
                "the server was restarted, or another one took its place: locks are granted in {left:.1?}, since a holder of before \
                 may be cut off, and the longest lease is {lasts:?} (takeover policy: {})",
                self.own.policy.name()
            );
        }
    }

    fn end_grace(&self, id: &str) {
        let is_new = self.graces.lock().ends(id);
        if is_new {
            log::info!("all terms from before the takeover of the server are over: locks are granted again");
        }
    }

    /// Looks again at the takeover grace that a session knows of, if it is time for that, and ends one that this process has waited
    /// out. Gives how long it lasts yet; `None` if it is over.
    pub(crate) fn look_at_grace(
        &self,
        session: &mut Session,
        by: Instant,
    ) -> std::result::Result<std::result::Result<Option<GraceLeft>, Refusal>, Failure> {
        loop {
            let Some(id) = session.pending().map(str::to_owned) else { return Ok(Ok(None)) };
            let step = self.graces.lock().next_step(&id, Instant::now());
            let waited_out = match step {
                GraceStep::Over => {
                    session.set_run(id, false);
                    return Ok(Ok(None));
                }
                GraceStep::Wait(left) => return Ok(Ok(Some(left))),
                GraceStep::Mark => Some(id.as_str()),
                GraceStep::Look => None,
            };
            match takeover::look_at_past(session, self.own, waited_out, by)? {
                Ok(past) => self.take_note(session, past),
                Err(refusal) => return Ok(Err(refusal)),
            }
            if Instant::now() >= by {
                return Err(Failure::Lost { reason: LossReason::HeartbeatTimedOut, cause: None });
            }
        }
    }

    /// The longest lease of the time before a takeover, if a session has found its grace.
    pub(crate) fn longest_lease(&self, grace: &str) -> Option<Duration> {
        self.graces.lock().lasts(grace)
    }

    /// How long the takeover grace lasts at the most that goes on, as far as this manager knows.
    pub(crate) fn grace_left(&self) -> Option<Duration> {
        self.graces.lock().of_newest(Instant::now())
    }

    /// How long a takeover grace would last here, as the managers of the database have agreed; or why this one would get no lock: the
    /// others have agreed on something else, or what is agreed on has to be raised and a standby that has to confirm that is away.
    pub(crate) fn objection(
        &self,
        session: &mut Session,
        standby_is_away: bool,
        by: Instant,
    ) -> std::result::Result<std::result::Result<Option<Duration>, Refusal>, Failure> {
        takeover::objection(session, self.own, standby_is_away, by)
    }

    /// How long the takeover grace lasts at the most that goes on, by the word of a session that takes no locks; and whether it is
    /// counted, by this manager or by another process of this machine. To look is not to begin to count: who takes locks does, and logs it.
    pub(crate) fn grace_on(
        &self,
        session: &mut Session,
        by: Instant,
    ) -> std::result::Result<Option<(Duration, bool)>, Failure> {
        let Some(Past::Pending { id, lasts, seen }) = takeover::peek(session, by)? else { return Ok(None) };
        let left = lasts.saturating_sub(seen);
        let by_manager = self.graces.lock().left(&id, Instant::now());
        let is_counted = by_manager.is_some() || !seen.is_zero();
        let left = by_manager.unwrap_or(left).min(left);
        Ok((!left.is_zero()).then_some((left, is_counted)))
    }

    /// What is to be confirmed before it counts.
    pub(crate) fn confirms(&self) -> Confirms {
        match self.own {
            Agreed { quorum: true, .. } => Confirms::All,
            Agreed { policy: TakeoverPolicy::AfterAnyRestart, .. } => Confirms::Grants,
            _ => Confirms::Nothing,
        }
    }

    /// Waits until what is wanted is confirmed. See [`confirm`].
    pub(crate) fn confirm(
        &self,
        session: &mut Session,
        wanted: &Wanted,
        wait: &Wait<impl Fn() -> bool>,
    ) -> std::result::Result<Outcome, Failure> {
        let is_strict = self.own.policy == TakeoverPolicy::AfterAnyRestart;
        let confirmers = Confirmers {
            standbys: self.own.quorum.then_some(&self.confirmations),
            probes: is_strict.then_some(&self.probes),
            connect_timeout: self.connect_timeout,
        };
        confirm::confirm(session, &confirmers, wanted, wait)
    }

    /// What all its sessions have in common.
    pub(crate) fn plan(&self) -> &SessionPlan {
        &self.plan
    }

    /// Asks something on a session of the pool, which goes back there. The statement is written for the schema `dsync`, and may be run
    /// twice: where a session has died while it rested in the pool, a new one is asked.
    pub(crate) fn ask(&self, statement: &str, parameters: &[&(dyn ToSql + Sync)]) -> Result<Vec<Row>> {
        self.ask_on_session(statement, parameters, true)
    }

    /// As [`ask`](Self::ask), for a statement that must not be run twice: an empty one before it finds a session that has died. If the answer
    /// is lost, the error says that nobody knows whether it was done.
    pub(crate) fn ask_once(&self, statement: &str, parameters: &[&(dyn ToSql + Sync)]) -> Result<Vec<Row>> {
        self.ask_on_session(statement, parameters, false)
    }

    fn ask_on_session(
        &self,
        statement: &str,
        parameters: &[&(dyn ToSql + Sync)],
        may_repeat: bool,
    ) -> Result<Vec<Row>> {
        let patience = self.heartbeat_timeout;
        let mut slot = self.slots.take_patiently(self.connect_timeout).map_err(Refusal::into_error)?;
        let refusal = loop {
            let has_rested = slot.is_open();
            self.open_to_ask(&mut slot).map_err(Refusal::into_error)?;
            let Some(session) = slot.session() else { return Err(Refusal::not_postgres().into_error()) };
            let statement = session.schema().apply(statement);
            let seen = if has_rested && !may_repeat {
                session.simple_query("", Instant::now() + patience).map(drop)
            } else {
                Ok(())
            };
            let is_repeated = has_rested && (may_repeat || seen.is_err());
            // Of what may be repeated it is no matter whether it was done, and what was not sent was not done.
            let unknown = if may_repeat || seen.is_err() {
                ""
            } else {
                "; it is not known whether it was done, so look before you repeat it"
            };
            let asked = seen.and_then(|()| session.query(&statement, parameters, Instant::now() + patience));
            let failure = match asked {
                Ok(rows) => return Ok(rows),
                Err(failure) => failure,
            };
            if let Failure::Lost { .. } = failure {
                slot.taint();
            }
            break match failure {
                // It has died while it rested, perhaps without a word from its network.
                Failure::Lost { .. } if is_repeated => continue,
                // It waits for nothing but a table, and where it writes for the standbys.
                Failure::Lost { reason: LossReason::HeartbeatTimedOut, .. } => Refusal::new(
                    ErrorKind::SessionUnavailable,
                    format!(
                        "the server has not answered within {patience:?}; see whether it runs, in pg_locks whether a table of the catalog is \
                         locked by another session, and in pg_stat_activity whether a commit waits for a synchronous standby (SyncRep){unknown}"
                    ),
                ),
                Failure::Lost { reason, cause } => {
                    let text = format!("the session has ended before the answer: {reason}{unknown}");
                    let refusal = Refusal::new(ErrorKind::SessionUnavailable, text);
                    match cause {
                        Some(cause) => refusal.because(cause),
                        None => refusal,
                    }
                }
                failure => Refusal::from_failure(failure),
            };
        };
        if refusal.is_about_catalog() {
            self.forget_catalog();
        }
        Err(refusal.into_error())
    }

    /// Says of a refusal for want of time what the time was spent on.
    fn during(&self, step: &str, refusal: Refusal) -> Refusal {
        refusal.during(step, self.connect_timeout)
    }

    /// A session has turned out to be shared, so a pooler has come after the probe: the next session asks again.
    pub(crate) fn probe_again(&self) {
        self.probed.store(false, Ordering::Relaxed);
    }

    /// A statement has found the catalog missing: someone dropped it, or the whole database.
    pub(crate) fn forget_catalog(&self) {
        *self.known_catalog.lock() = KnownCatalog::Nothing;
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.watchdog.close();
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").field("slots", &self.slots).field("dialer", &self.plan.dialer).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn claims_have_the_rhythm_of_their_manager_whenever_they_begin() {
        let config = Config::from_url("postgres://nobody@localhost").unwrap().lease(Duration::from_secs(8));
        let pool = Pool::new(&config, None).unwrap();
        for late in [0, 1, 130, 999, 5_000].map(Duration::from_millis) {
            assert_eq!(
                pool.rhythm(pool.made.checked_add(late).unwrap()),
                Rhythm::of(Duration::from_secs(2), late),
                "{late:?}"
            );
        }
    }
}
