//! Looks at the server for a report: whether locks will work there, and what to change.

use std::fmt::Display;
use std::str::FromStr;
use std::time::{Duration, Instant};

use postgres::SimpleQueryRow;
use serde_json::Value;

use crate::check::{CheckLine, CheckReport, Verdict};
use crate::loss::LossReason;
use crate::pg::catalog::{self, State};
use crate::pg::config::{CatalogMode, Config};
use crate::pg::confirm;
use crate::pg::pool::Pool;
use crate::pg::quorum::Quorum;
use crate::pg::session::known;
use crate::pg::session::open::Session;
use crate::pg::session::refusal::Refusal;
use crate::pg::session::wire::Failure;
use crate::pg::sql;
use crate::pg::stream::StreamControl;

/// Looks at the server on two sessions of its own, which are no slots of `pool`: where claims have all of these, too.
///
/// It takes three times `connect_timeout` at the most: for the first session, for what is asked on it, and for the other session. A look at the standbys may take three
/// times the heartbeat timeout more.
pub(crate) fn check(pool: &Pool, config: &Config) -> CheckReport {
    let time = config.connect_time();
    let mut lines = Vec::new();
    let opened = Session::open_to_check(pool.plan(), StreamControl::new(), Instant::now() + time);
    let (mut session, refusal) = match opened {
        Ok(opened) => opened,
        Err(refusal) => return CheckReport::of(refusal.into_line("connection")),
    };
    let by = Instant::now() + time;
    let (round_trip, advice) = refusal.is_none().then(|| round_trip(&mut session, by)).flatten().unzip();
    let facts = match ask(&mut session, config, by) {
        Ok(facts) => facts,
        Err(failure) => {
            // Of a session that is no use, this is only what comes of that.
            let refusal =
                refusal.unwrap_or_else(|| Refusal::from_failure(failure).during("asked what it is", time));
            let topic = refusal.topic().unwrap_or(if refusal.is_curable() { "connection" } else { "server" });
            return CheckReport::of(refusal.into_line(topic));
        }
    };
    lines.push(connection(&session, &facts, config, round_trip));
    lines.push(server(&facts, advice.flatten()));
    let refused = refusal.is_some();
    match refusal.map(|refusal| (refusal.topic().unwrap_or("server"), refusal)) {
        Some((topic, refusal)) => {
            lines.retain(|line| line.topic != topic);
            lines.push(refusal.into_line(topic));
        }
        None => {
            lines.push(CheckLine::good("primary", "the server is a primary"));
            lines.push(role(&facts));
            lines.push(catalog(&mut session, &facts, config.catalog, by));
            if config.catalog != CatalogMode::None && facts.is("has_schema") {
                lines.extend(takeover(pool, &mut session, &facts, config.lease, by));
            }
            lines.push(lease(&facts, config));
            lines.push(clients(&facts, config));
        }
    }
    lines.extend(timeouts(&facts));
    lines.push(connections(&facts, config.max_sessions, pool));
    lines.push(locks(&facts, config.max_sessions, config.shared_sessions > 0));
    lines.push(replication(&facts));
    if !refused && config.quorum != Quorum::Server {
        lines.push(quorum(&mut session, by, config.lease_plan().heartbeat_timeout.min(time)));
    }
    if !refused {
        lines.push(sessions(pool, session, Instant::now() + time));
    }
    CheckReport { lines }
}

/// What the server says of itself.
struct Facts {
    row: SimpleQueryRow,
    settings: Value,
}

impl Facts {
    fn text(&self, column: &str) -> &str {
        self.row.try_get(column).ok().flatten().unwrap_or_default()
    }

    fn is(&self, column: &str) -> bool {
        self.text(column) == "t"
    }

    /// A number of the row. One that is not to be known is 0.
    fn number<T: FromStr + Default>(&self, column: &str) -> T {
        self.text(column).parse().unwrap_or_default()
    }

    fn setting(&self, name: &str) -> &str {
        self.settings.get(name).and_then(Value::as_str).unwrap_or_default()
    }

    /// A setting's number. One that the server's version does not have is 0.
    fn count(&self, setting: &str) -> i64 {
        self.setting(setting).parse().unwrap_or_default()
    }
}

fn ask(session: &mut Session, config: &Config, by: Instant) -> Result<Facts, Failure> {
    let statement = session.schema().apply(&sql::check(config.lease, catalog::patience(by)));
    match session.simple_query(&statement, by)? {
        Some(row) => {
            let settings = row.try_get("settings").ok().flatten().unwrap_or_default();
            let settings = serde_json::from_str(settings).unwrap_or_default();
            Ok(Facts { row, settings })
        }
        None => Err(Failure::Lost { reason: LossReason::ServerError, cause: None }),
    }
}

/// How long a round trip takes, and advice on a server that is not one of its own.
fn round_trip(session: &mut Session, by: Instant) -> Option<(Duration, Option<&'static str>)> {
    // Not measured: it finds the server's caches cold.
    let advice = session.heartbeat_and_look(by).ok()?;
    let begun = Instant::now();
    session.heartbeat(by).ok()?;
    Some((begun.elapsed(), advice))
}

fn server(facts: &Facts, advice: Option<&'static str>) -> CheckLine {
    let version = facts.text("version");
    let text = version.split(" on ").next().unwrap_or_default();
    match known::by_version(version).or(advice) {
        Some(advice) => CheckLine::warning("server", text, advice),
        None => CheckLine::good("server", text),
    }
}

fn connection(session: &Session, facts: &Facts, config: &Config, round_trip: Option<Duration>) -> CheckLine {
    /// Of which the opening of a session takes at the most: TCP, TLS, a password, and the preparation.
    const ROUND_TRIPS: u32 = 12;
    let by_way_of = session.peer().map_or_else(|| "a Unix socket".to_owned(), |peer| peer.to_string());
    let (role, database) = (facts.text("role"), facts.text("database"));
    let text = format!("connected as {role} to the database {database} by way of {by_way_of}");
    let Some(round_trip) = round_trip else { return CheckLine::good("connection", text) };
    let text = format!("{text}; a round trip takes {round_trip:.1?}");
    let plan = config.lease_plan();
    if round_trip * ROUND_TRIPS > config.connect_time() {
        let advice = format!(
            "raise connect_timeout, which is {:?}, to twelve round trips and more",
            config.connect_time()
        );
        return CheckLine::warning("connection", text, advice);
    }
    if round_trip * 4 > plan.heartbeat_timeout {
        let advice = format!(
            "raise heartbeat_timeout, which is {:?}, and with it the lease, or pauses that are a little longer will end terms",
            plan.heartbeat_timeout
        );
        return CheckLine::warning("connection", text, advice);
    }
    CheckLine::good("connection", text)
}

fn role(facts: &Facts) -> CheckLine {
    let role = facts.text("role");
    if !facts.is("plpgsql") {
        let text = format!(
            "{role} may not use PL/pgSQL, so each slice of a wait leaves an error in the server's log, and the catalog, if this role \
             makes it, has no function fence() for other languages"
        );
        let advice = format!(
            "CREATE EXTENSION plpgsql, if it was dropped, and GRANT USAGE ON LANGUAGE plpgsql TO {role}"
        );
        return CheckLine::warning("role", text, advice);
    }
    CheckLine::good("role", format!("{role}{}", if facts.is("superuser") { ", a superuser" } else { "" }))
}

fn catalog(session: &mut Session, facts: &Facts, mode: CatalogMode, by: Instant) -> CheckLine {
    const TOPIC: &str = "catalog";
    let schema = session.schema().identifier().to_owned();
    if mode == CatalogMode::None {
        return CheckLine::good(
            TOPIC,
            "none, as the settings say: no tokens, no annotations, no fence, no record of what was done",
        );
    }
    match catalog::found(session, mode, by) {
        Err(refusal) => refusal.into_line(TOPIC),
        Ok(Some(State { has_era: false, .. })) if waits_for_standby(facts) => CheckLine::wrong(
            TOPIC,
            format!(
                "in the schema {schema}, but no lock is granted: that fencing tokens go on in this run of the server is not recorded yet, and the \
                 commit of that waits for a standby that is away"
            ),
            START_STANDBY,
        ),
        Ok(Some(State { has_era: false, .. })) if !facts.setting("synchronous_standby_names").is_empty() => {
            CheckLine::warning(
                TOPIC,
                format!(
                    "in the schema {schema}; that fencing tokens go on in this run of the server is not recorded yet: the first lock is granted \
                     when it is, and the standbys that synchronous_standby_names names have that"
                ),
                "if locks wait, see in pg_stat_replication whether such a standby is away, or stands still",
            )
        }
        Ok(Some(_)) => CheckLine::good(TOPIC, format!("in the schema {schema}, with all rights")),
        Ok(None) if facts.is("has_schema") => CheckLine::warning(
            TOPIC,
            format!(
                "in the schema {schema}, not complete or of an older version; the next start brings it up to date, if the role may"
            ),
            format!("or let an administrator run {} in this database", catalog::SCRIPT),
        ),
        Ok(None) if facts.is("may_make_schemas") => {
            CheckLine::good(TOPIC, format!("not there yet; the next start makes it, in the schema {schema}"))
        }
        Ok(None) => CheckLine::wrong(
            TOPIC,
            format!("not there, and {} may not make a schema in this database", facts.text("role")),
            format!(
                "let an administrator run {} in this database and grant what its first lines name, or GRANT CREATE ON DATABASE; or set \
                 the catalog to none",
                catalog::SCRIPT
            ),
        ),
    }
}

/// What cannot be asked here, the line on the catalog tells of.
fn takeover(
    pool: &Pool,
    session: &mut Session,
    facts: &Facts,
    own_lease: Duration,
    by: Instant,
) -> Option<CheckLine> {
    let longest = match pool.objection(session, waits_for_standby(facts), by).ok()? {
        Ok(longest) => longest,
        Err(refusal) => return Some(refusal.into_line("takeover")),
    };
    let advice = session.schema().apply("UPDATE dsync.policy SET lease = … (milliseconds)");
    let Some((left, is_counted)) = pool.grace_on(session, by).ok()? else {
        let longest = longest.filter(|longest| *longest > own_lease)?;
        let text = format!(
            "after a crash of the server nobody is granted a lock for {longest:?}, the longest lease that was used with this catalog; where \
             nobody uses it any longer, an operator makes that shorter: {advice}"
        );
        return Some(CheckLine::good("takeover", text));
    };
    let until = if is_counted {
        format!("no lock is granted for another {left:.1?} at the most")
    } else {
        format!("locks are granted {left:.1?} after the first request from this machine, at the latest")
    };
    Some(CheckLine::warning(
        "takeover",
        format!(
            "{until}: the server was restarted, or another one took its place, and a holder of before may be cut off"
        ),
        format!(
            "ask for a lock and wait; shorter leases, of all who take locks in the database, make it shorter, with: {advice}"
        ),
    ))
}

fn lease(facts: &Facts, config: &Config) -> CheckLine {
    let plan = config.lease_plan();
    if facts.count("idle_session_timeout").unsigned_abs() as u128 != plan.lease.as_millis() {
        let text = format!(
            "the server does not take {:?} for idle_session_timeout, so it would keep the lock of a silent holder",
            plan.lease
        );
        return CheckLine::wrong("lease", text, "connect to a PostgreSQL server, of version 14 or newer");
    }
    let text = format!(
        "the server ends a session that is silent for {:?}; a holder sends a heartbeat every {:?}, and counts on its lock for {:?}",
        plan.lease,
        plan.heartbeat,
        plan.term()
    );
    CheckLine::good("lease", text)
}

/// Each of them is refused somewhere: see [`sql::notice_dead_clients`].
fn clients(facts: &Facts, config: &Config) -> CheckLine {
    let tcp = facts.is("tcp");
    let without = [
        (
            facts.count("client_connection_check_interval") == 0,
            "client_connection_check_interval, so a waiter that died stays in the queue until its slice ends",
        ),
        (
            tcp && facts.count("tcp_user_timeout") == 0,
            "tcp_user_timeout, so a holder that is heard but hears nothing is replaced one heartbeat later",
        ),
        (
            tcp && facts.count("tcp_keepalives_idle") == 0,
            "tcp_keepalives_idle, so a waiter whose machine died stays in the queue for long",
        ),
    ];
    let without: Vec<_> = without.iter().filter(|(is, _)| *is).map(|(_, text)| *text).collect();
    if without.is_empty() {
        let plan = config.lease_plan();
        let socket = if tcp {
            format!(
                ", and one that acknowledges nothing within {:?}",
                plan.lease.saturating_sub(plan.heartbeat)
            )
        } else {
            String::new()
        };
        return CheckLine::good(
            "clients",
            format!("the server notices a client that is gone within 1s{socket}"),
        );
    }
    let text = format!("the server does without {}", without.join("; without "));
    CheckLine::warning(
        "clients",
        text,
        "run the server on Linux, or a managed one that takes these settings; a shorter wait_slice helps, too",
    )
}

fn timeouts(facts: &Facts) -> Option<CheckLine> {
    let timeouts = facts.text("timeouts");
    (!timeouts.is_empty()).then(|| {
        let text = format!(
            "{timeouts}: not for the manager's sessions, which set their own, but for a transaction_lock, a session_lock and fenced \
             transactions, where your connections have this role and database"
        );
        CheckLine::good("timeouts", text)
    })
}

fn connections(facts: &Facts, wanted: u32, pool: &Pool) -> CheckLine {
    const TOPIC: &str = "connections";
    let wanted = i64::from(wanted);
    // The sessions of this manager, and the one that asks, are among the used ones.
    let own = i64::from(pool.slots().opened()) + 1;
    let most = facts.count("max_connections");
    let mut limits = Vec::new();
    if facts.is("superuser") {
        limits.push((
            most,
            "server_used",
            "the server allows (max_connections)",
            "the server's max_connections",
        ));
    } else {
        let reserved = if facts.is("may_use_reserved") { 0 } else { facts.count("reserved_connections") };
        limits.push((
            most - reserved - facts.count("superuser_reserved_connections"),
            "server_used",
            "the server allows (max_connections, less the reserved ones)",
            "the server's max_connections",
        ));
        for (limit, used, whose, what) in [
            (
                "role_limit",
                "role_used",
                "the role may have",
                "the role's limit (ALTER ROLE ... CONNECTION LIMIT)",
            ),
            (
                "database_limit",
                "database_used",
                "the database allows",
                "the database's limit (ALTER DATABASE ... CONNECTION LIMIT)",
            ),
        ] {
            // -1 is no limit.
            if let Some(limit) = facts.text(limit).parse().ok().filter(|limit| *limit >= 0) {
                limits.push((limit, used, whose, what));
            }
        }
    }
    let advice = |what: &dyn Display| {
        format!("raise {what}, or lower max_sessions; every process that has a manager needs as many")
    };
    if let Some((room, _, whose, what)) = limits.iter().filter(|(room, ..)| *room < wanted).min() {
        let text = format!("this process may open {wanted} sessions, and {whose} {room}");
        return CheckLine::wrong(TOPIC, text, advice(what));
    }
    let others = |used: &str| (facts.number::<i64>(used) - own).max(0);
    let crowded = limits.iter().find(|(room, used, ..)| room - others(used) < wanted);
    if let Some((room, used, whose, what)) = crowded {
        let text = format!(
            "this process may open {wanted} sessions; {whose} {room}, of which others have {} now",
            others(used)
        );
        return CheckLine::warning(TOPIC, text, advice(what));
    }
    let Some((room, used, whose, _)) = limits.iter().min() else {
        return CheckLine::good(TOPIC, format!("this process may open {wanted} sessions"));
    };
    let text = format!(
        "this process may open {wanted} sessions; {whose} {room}, of which others have {} now",
        others(used)
    );
    CheckLine::good(TOPIC, text)
}

fn locks(facts: &Facts, wanted: u32, shares: bool) -> CheckLine {
    /// The lock, the fence locks of writers and of readers, and the turnstile.
    const EACH: i64 = 4;
    let room = facts.count("max_locks_per_transaction")
        * (facts.count("max_connections") + facts.count("max_prepared_transactions"));
    let used: i64 = facts.number("locks");
    let mut text = format!("the server's table of locks has room for {room}, and {used} are in it");
    if shares {
        // A statement that takes many needs room for their fence locks, too.
        let beside = i64::try_from(sql::MOST_TAKEN).unwrap_or(i64::MAX).saturating_mul(EACH - 1);
        let spare = (room - used).saturating_sub(beside).max(0);
        text = format!("{text}; shared sessions can carry some {spare} locks more");
    }
    if room - used < i64::from(wanted) * EACH {
        return CheckLine::warning(
            "locks",
            text,
            "raise the server's max_locks_per_transaction, and see in pg_locks who holds so many",
        );
    }
    CheckLine::good("locks", text)
}

const START_STANDBY: &str = "start the standby, or take its name out of synchronous_standby_names";

/// Whether a synchronous standby is named, and none is connected, as far as the role may see.
fn waits_for_standby(facts: &Facts) -> bool {
    let (standbys, synchronous): (i64, i64) = (facts.number("standbys"), facts.number("synchronous"));
    let is_seen = facts.number::<i64>("standbys_seen") == standbys;
    !facts.setting("synchronous_standby_names").is_empty() && is_seen && synchronous == 0
}

/// Locks wait for no standby: only what is to survive the server does.
fn replication(facts: &Facts) -> CheckLine {
    const TOPIC: &str = "replication";
    let (standbys, names) = (facts.number::<i64>("standbys"), facts.setting("synchronous_standby_names"));
    if waits_for_standby(facts) {
        return CheckLine::warning(
            TOPIC,
            format!(
                "synchronous_standby_names is {names}, and no such standby is connected: commits wait for it, also the record of a \
                 success (once, run --every), the making of the catalog, and that of the first lock after a restart"
            ),
            START_STANDBY,
        );
    }
    let text = match (standbys, names.is_empty()) {
        (0, _) => "no standby is connected".to_owned(),
        (standbys, true) => format!(
            "{standbys} connected, none of them synchronous: a failover may lose the successes that were recorded last"
        ),
        (standbys, false) => format!("{standbys} connected, synchronous_standby_names is {names}"),
    };
    CheckLine::good(TOPIC, text)
}

/// Whether the standbys can confirm heartbeats, and do.
fn quorum(session: &mut Session, by: Instant, patience: Duration) -> CheckLine {
    const TOPIC: &str = "quorum";
    match confirm::look(session, by, patience) {
        Err(refusal) => refusal.into_line(TOPIC),
        Ok((names, None)) => CheckLine::good(
            TOPIC,
            format!("a heartbeat counts when {} has confirmed it", names.join(" and ")),
        ),
        Ok((_, Some(obstacle))) => CheckLine::wrong(
            TOPIC,
            format!(
                "heartbeats are not confirmed in time: {obstacle}; a lock is granted, and kept, only where they are"
            ),
            format!("see pg_stat_replication, and {}", confirm::START_IT),
        ),
    }
}

/// Shows by a second session that two are two, and exclude each other.
fn sessions(pool: &Pool, session: Session, by: Instant) -> CheckLine {
    const TOPIC: &str = "sessions";
    let path = if session.is_direct() {
        "nothing stands between"
    } else {
        "a pooler, a proxy or a translation of addresses stands between"
    };
    let other = match Session::open(pool.plan(), StreamControl::new(), by) {
        Ok(other) => other,
        Err(refusal) if refusal.is_curable() => {
            let mut line = refusal.into_line(TOPIC);
            line.verdict = Verdict::Warning;
            line.text = format!(
                "a second session, to show that two exclude each other, is not to be had: {}",
                line.text
            );
            return line;
        }
        Err(refusal) => return refusal.into_line(TOPIC),
    };
    match pool.probe(session, other, by) {
        Ok(_) => CheckLine::good(TOPIC, format!("two sessions exclude each other; {path}")),
        Err(refusal) => refusal.into_line(TOPIC),
    }
}
