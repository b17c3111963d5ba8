//! Why there is no session, or why a statement failed: the kind that decides how to go on, and advice for the operator.

use std::error::Error as StdError;
use std::fmt;
use std::io;
use std::iter;
use std::time::Duration;

use crate::check::CheckLine;
use crate::error::{Error, ErrorKind, chain};
use crate::loss::LossReason;
use crate::pg::session::wire::Failure;
use crate::pg::stream::{
    DialError, Ended, HookError, Local, PasswordError, Route, TimedOut, is_alert, lacks_password,
};

/// Why there is no session: an error in the making, with the kind that decides how to go on.
#[derive(Debug)]
pub(crate) struct Refusal {
    kind: ErrorKind,
    message: String,
    /// What to change, where the message does not say it: the text goes on with it.
    advice: String,
    cause: Option<Box<dyn StdError + Send + Sync>>,
    /// An answer did not come in time.
    is_late: bool,
    /// What a report says it under: see [`CheckLine::topic`].
    topic: Option<&'static str>,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        if self.advice.is_empty() { Ok(()) } else { write!(f, "; {}", self.advice) }
    }
}

impl StdError for Refusal {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.cause.as_deref().map(|cause| cause as _)
    }
}

impl Refusal {
    pub(crate) fn new(kind: ErrorKind, message: String) -> Self {
        Self { kind, message, advice: String::new(), cause: None, is_late: false, topic: None }
    }

    /// Says for how long a lock is held all the same.
    pub(crate) fn while_held(mut self, left: Option<Duration>) -> Self {
        if let Some(left) = left {
            self.message.push_str(&format!("; what is held is lost in {left:.1?} if that goes on"));
        }
        self
    }

    /// Says of a refusal for want of time what the time was spent on.
    pub(crate) fn during(mut self, step: &str, time: Duration) -> Self {
        if self.is_late {
            self.message.push_str(&format!(", while we {step}, which may take {time:?}"));
            SLOW_LINK.clone_into(&mut self.advice);
        }
        self
    }

    pub(crate) fn because(self, cause: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        Self { cause: Some(cause.into()), ..self }
    }

    /// True if the server refuses this session, whatever another one is told.
    pub(crate) fn is_refused(&self) -> bool {
        self.kind == ErrorKind::SessionRefused
    }

    /// Whether waiting may help, without anyone changing a setting.
    pub(crate) fn is_curable(&self) -> bool {
        self.kind == ErrorKind::SessionUnavailable
            || self.kind == ErrorKind::PoolExhausted && self.cause.is_some()
    }

    /// Whether all slots are taken.
    pub(crate) fn is_about_slots(&self) -> bool {
        self.kind == ErrorKind::PoolExhausted && self.cause.is_none()
    }

    /// True if somebody must change something first, so that the next attempt need not hurry.
    pub(crate) fn needs_operator(&self) -> bool {
        matches!(self.kind, ErrorKind::SessionRefused | ErrorKind::InvalidKey | ErrorKind::InvalidConfig)
    }

    /// Whether a part of the catalog was found missing: a table, or a column that an older version does not have.
    pub(crate) fn is_about_catalog(&self) -> bool {
        let database = self.cause.as_ref().and_then(|cause| cause.downcast_ref::<postgres::Error>());
        matches!(
            database.and_then(postgres::Error::code).map(|code| code.code()),
            Some("3F000" | "42P01" | "42703")
        )
    }

    /// Adds a sentence to the advice.
    pub(crate) fn saying(mut self, sentence: Option<&str>) -> Self {
        if let Some(sentence) = sentence {
            // The advice may be in the message.
            let text = if self.advice.is_empty() { &mut self.message } else { &mut self.advice };
            text.push_str("; ");
            text.push_str(sentence);
        }
        self
    }

    /// What it is about, if it is about one thing only.
    pub(crate) fn topic(&self) -> Option<&'static str> {
        self.topic
    }

    /// The line of a report on `topic`, with what to change apart from what is wrong.
    pub(crate) fn into_line(self, topic: &'static str) -> CheckLine {
        let mut text = self.message;
        if let Some(cause) = self.cause.map(|cause| chain(&*cause)).filter(|cause| !text.contains(cause)) {
            text = format!("{text}: {cause}");
        }
        if self.advice.is_empty() {
            CheckLine::from_text(topic, text)
        } else {
            CheckLine::wrong(topic, text, self.advice)
        }
    }

    pub(crate) fn into_error(self) -> Error {
        let error = Error::new(self.kind, self.to_string());
        match self.cause {
            Some(cause) => error.with_source(cause),
            None => error,
        }
    }

    /// A claim has found no era of tokens, which its session saw when it was opened.
    pub(crate) fn no_era() -> Self {
        let message = "the table era of the catalog was emptied or rewritten; no fencing token can be given out before another session \
                       has mended that";
        Self::new(ErrorKind::SessionUnavailable, message.to_owned())
    }

    /// Two keys have one hash.
    pub(crate) fn collision(key: &str, other: &str) -> Self {
        let message = format!(
            "{key:?} has the same hash as {other:?} (namespace:key), so the two would exclude each other; \
             rename one of them, or put it into another namespace"
        );
        Self::new(ErrorKind::InvalidKey, message)
    }

    /// A semaphore has another number of permits than the caller says.
    pub(crate) fn other_permits(key: &str, ours: i32, theirs: i32) -> Self {
        let (ours, theirs) = (ours.cast_unsigned(), theirs.cast_unsigned());
        let error = Error::other_permits(key, ours, theirs, "the catalog says");
        Self::new(error.kind(), error.into_message())
    }

    /// This process is short of something.
    pub(crate) fn system(error: Error) -> Self {
        Self::new(ErrorKind::SessionUnavailable, "no session can be opened here".to_owned()).because(error)
    }

    /// What was refused at one address is told, whatever happened at the others: waiting for those would hide it.
    pub(crate) fn from_dial(error: DialError) -> Self {
        let verdicts: Vec<_> = error.failures().map(verdict).collect();
        let is = |wanted| move |(kind, _): &(ErrorKind, _)| *kind == wanted;
        let number = (verdicts.iter().position(is(ErrorKind::SessionRefused)))
            .or_else(|| verdicts.iter().position(is(ErrorKind::PoolExhausted)))
            .unwrap_or(verdicts.len().saturating_sub(1));
        let kind = verdicts.get(number).map_or(ErrorKind::SessionUnavailable, |(kind, _)| *kind);
        let message = error.to_string();
        let mut given: Vec<&str> = Vec::new();
        for (_, advice) in verdicts.iter().filter(|verdict| is(kind)(verdict)) {
            if !advice.is_empty() && !given.contains(advice) {
                given.push(advice);
            }
        }
        let advice = given.join("; ");
        // The preparation's refusal has its cause with it.
        let cause = error.into_failure(number).and_then(|failure| match failure.downcast::<Self>() {
            Ok(refusal) => refusal.cause,
            Err(failure) => Some(failure),
        });
        Self { advice, cause, ..Self::new(kind, message) }
    }

    pub(crate) fn from_failure(failure: Failure) -> Self {
        match failure {
            Failure::Lost { reason, cause } => {
                let message = match reason {
                    LossReason::HeartbeatTimedOut => {
                        "the session could not be opened: a statement was not answered in time".to_owned()
                    }
                    reason => format!("the session could not be opened: {reason}"),
                };
                Self {
                    cause: cause.map(Into::into),
                    is_late: reason == LossReason::HeartbeatTimedOut,
                    ..Self::new(ErrorKind::SessionUnavailable, message)
                }
            }
            Failure::Refused(cause) => {
                let (kind, advice) = advise(&cause);
                let (message, advice) = (chain(&cause), advice.to_owned());
                Self { advice, cause: Some(cause.into()), ..Self::new(kind, message) }
            }
        }
    }

    fn refused(topic: &'static str, message: String) -> Self {
        Self { topic: Some(topic), ..Self::new(ErrorKind::SessionRefused, message) }
    }

    pub(crate) fn not_postgres() -> Self {
        Self::refused(
            "server",
            "the server does not answer as PostgreSQL does; check host and port".to_owned(),
        )
    }

    pub(crate) fn too_old(major: i32) -> Self {
        let message = format!(
            "the server is PostgreSQL {major}, which has no idle_session_timeout to bound a lease; \
             upgrade it to 14 or newer"
        );
        Self::refused("server", message)
    }

    pub(crate) fn standby() -> Self {
        Self::refused(
            "primary",
            "the server is a hot standby, whose locks exclude nobody on the primary; connect to the primary, \
             or name all hosts and say target_session_attrs=read-write"
                .to_owned(),
        )
    }

    pub(crate) fn pooler() -> Self {
        Self::refused("sessions", SHARED_SESSIONS.to_owned())
    }

    /// Two sessions had one lock at once.
    pub(crate) fn stub() -> Self {
        Self::refused(
            "sessions",
            "two sessions were granted one advisory lock at the same time, so locks of this server exclude nobody: it \
             only looks like PostgreSQL; connect to a PostgreSQL server"
                .to_owned(),
        )
    }

    /// A lock that nobody had was not granted, not shared, or not given back.
    pub(crate) fn no_locks(what: &str) -> Self {
        Self::refused(
            "sessions",
            format!("the server {what}: it only looks like PostgreSQL; connect to a PostgreSQL server"),
        )
    }
}

const SHARED_SESSIONS: &str = "a pooler in transaction or statement mode stands before the server: sessions share a \
                               backend, so a lock would exclude nobody; connect to the server directly, or use \
                               session mode";
const NOT_POSTGRES: &str =
    "the server does not speak PostgreSQL's protocol; check host and port, and what stands in front of it";
const UNREACHABLE: &str = "check host and port, and that the server runs";
/// Where a connection names no host, it is a socket that is looked for.
const NO_SOCKET: &str =
    "check that the server runs; if it is not on this machine, name its host, by DATABASE_URL or PGHOST say";
/// What a statement on the catalog can have waited for when its `lock_timeout` is over.
const LOCKED_OR_WAITING: &str = "a table of the catalog is locked by another session, see pg_locks; or a commit there waits for a synchronous \
     standby that is away, see pg_stat_replication";

const SLOW_LINK: &str = "if the link is slow, raise connect_timeout";
const UNREACHABLE_OR_SLOW: &str =
    "check host and port, and that the server runs; if the link is slow, raise connect_timeout";
const CERTIFICATE: &str = "check the server's certificate: this machine must trust its issuer, and it must be for \
                           the host name of the connection";
const TLS: &str = "check what the TLS connector and the server agree on: versions, and a client certificate if the server \
                   asks for one";
const CLIENT_CERTIFICATE: &str = "the server does not take the client certificate: name one with sslcert and sslkey that has not expired, and \
                                  that was signed by an issuer in the server's ssl_ca_file";
const DIRECT_TLS: &str = "sslnegotiation=direct needs PostgreSQL 17 or newer, and where the application gives the TLS connector, one that \
                          offers the protocol \"postgresql\" by ALPN, which only its maker can set; do that, or use \
                          sslnegotiation=postgres";

/// What is wrong with a server's certificate, by the words that rustls and OpenSSL have for it, in lower case; what to do about it.
const CERTIFICATES: [(&[&str], &str); 6] = [
    (
        &["certificate expired", "certificate has expired"],
        "renew the server's certificate, and let the server read it (pg_ctl reload); if it is valid still, correct this machine's clock",
    ),
    (
        &["not valid yet", "not yet valid"],
        "correct the clock of this machine, or that of the certificate's issuer",
    ),
    (
        &["not valid for name", "notvalidforname", "hostname mismatch", "ip address mismatch"],
        "connect by a name that the server's certificate has in its subjectAltName, or let one be issued for the host name of the connection",
    ),
    (
        &["causedasendentity"],
        "rustls takes no certificate of an authority for a server's, unless it is in the file sslrootcert itself: name it there, or let \
         the authority sign one for the server",
    ),
    (
        &["unsupportedcertversion"],
        "rustls reads certificates of version 3 only: let one be issued with a subjectAltName, or use the feature tls-native-tls",
    ),
    (
        &[
            "unknownissuer",
            "badsignature",
            "self-signed certificate",
            "self signed certificate",
            "unable to get local issuer",
            "certificate signature failure",
        ],
        "this machine must trust its issuer: name the file with the issuer's certificate in sslrootcert, or of a self-signed \
         certificate the certificate itself",
    ),
];

/// What to do about a failed handshake, by the text of its error.
fn handshake_advice(text: &str, is_direct: bool) -> &'static str {
    let text = text.to_lowercase();
    // Something else that begins with an S has been taken for a yes.
    if !is_direct && ["corrupt message", "wrong version number"].iter().any(|words| text.contains(words)) {
        return NOT_POSTGRES;
    }
    // Sent by the server, so it is not the server's certificate that is meant.
    if text.contains("alert") {
        return alert_advice(&text).unwrap_or(if is_direct { DIRECT_TLS } else { TLS });
    }
    let known = CERTIFICATES.iter().find(|(words, _)| words.iter().any(|word| text.contains(word)));
    match known {
        Some((_, advice)) => advice,
        None if text.contains("certificate") => CERTIFICATE,
        None if is_direct => DIRECT_TLS,
        None => TLS,
    }
}

/// The same of an alert, in lower case, if it is about the client's certificate.
fn alert_advice(text: &str) -> Option<&'static str> {
    // The last one is what OpenSSL says where another issuer has the same name.
    let words = ["certificate", "unknownca", "unknown ca", "decrypterror", "decrypt error"];
    let is_about_us = words.iter().any(|word| text.contains(word));
    is_about_us.then_some(CLIENT_CERTIFICATE)
}

/// What kind of trouble a failure to open a session is, and what to do about it.
fn verdict(failure: &(dyn StdError + Send + Sync + 'static)) -> (ErrorKind, &'static str) {
    use ErrorKind::{SessionRefused, SessionUnavailable};
    if let Some(refusal) = failure.downcast_ref::<Refusal>() {
        return (refusal.kind, "");
    }
    if let Some(error) = failure.downcast_ref::<postgres::Error>() {
        return advise(error);
    }
    if failure.is::<Local>() {
        return (SessionUnavailable, "");
    }
    if failure.is::<PasswordError>() {
        return (SessionUnavailable, "check the hook of Config::password_with");
    }
    if failure.is::<TimedOut>() {
        return (SessionUnavailable, UNREACHABLE_OR_SLOW);
    }
    match failure.downcast_ref::<HookError>() {
        Some(HookError::NoTlsConnector) => (SessionRefused, ""),
        Some(HookError::Refused) => {
            (SessionRefused, "switch TLS on at the server (ssl = on), or set sslmode=prefer or disable")
        }
        Some(HookError::WeakDirect) => (SessionRefused, "set sslmode=require, or leave sslnegotiation out"),
        Some(HookError::Option { .. }) => (SessionRefused, "correct the value, or leave it out"),
        Some(HookError::Tls { direct, source }) => match broken_connection(&**source) {
            true if *direct => (SessionRefused, DIRECT_TLS),
            true => (SessionUnavailable, UNREACHABLE),
            false => (SessionRefused, handshake_advice(&chain(&**source), *direct)),
        },
        Some(HookError::Connect { source, .. }) if source.kind() == io::ErrorKind::PermissionDenied => (
            SessionRefused,
            "the operating system forbids it; check the rights on the socket, and the firewall",
        ),
        Some(HookError::Connect { route: Route::Unix { .. }, source })
            if source.kind() == io::ErrorKind::NotFound =>
        {
            (SessionUnavailable, NO_SOCKET)
        }
        // The name server's, too.
        _ => (SessionUnavailable, UNREACHABLE),
    }
}

/// The I/O errors among an error and its causes.
fn io_errors<'a>(error: &'a (dyn StdError + 'static)) -> impl Iterator<Item = &'a io::Error> {
    iter::successors(Some(error), |error| (**error).source()).filter_map(|error| error.downcast_ref())
}

/// Whether a connection ended in the midst of something, which says nothing of the reason.
fn broken_connection(error: &(dyn StdError + 'static)) -> bool {
    use io::ErrorKind::{
        BrokenPipe, ConnectionAborted, ConnectionReset, NotConnected, TimedOut, UnexpectedEof,
    };
    io_errors(error).any(|error| {
        matches!(
            error.kind(),
            BrokenPipe | ConnectionAborted | ConnectionReset | NotConnected | TimedOut | UnexpectedEof
        )
    })
}

/// What kind of trouble an error of the driver is, and what to do about it.
///
/// An error that is not known to be temporary is a refusal. [`SessionUnavailable`](ErrorKind::SessionUnavailable) is for those that are:
/// the server starts, stops, fails over, or is asked for the catalog at a bad moment; there `try_lock` waits, since it is
/// soon over. A server without a free connection is [`PoolExhausted`](ErrorKind::PoolExhausted): it passes when somebody
/// leaves, but that may be never, so `lock` waits for it, and `try_lock` does not.
pub(crate) fn advise(error: &postgres::Error) -> (ErrorKind, &'static str) {
    use ErrorKind::{PoolExhausted, SessionRefused, SessionUnavailable};
    const PASSING: &str = "it should pass by itself; see the server's log";
    if let Some(database) = error.as_db_error() {
        let text = database.message();
        return match database.code().code() {
            // The catalog went away; it is looked for, and made, with the next session.
            "3F000" | "42P01" | "42703" => (
                SessionUnavailable,
                "the catalog of locks is missing; the next session looks for it, and makes it where it may",
            ),
            "55P03" => (SessionUnavailable, LOCKED_OR_WAITING),
            "28P01" => (SessionRefused, "check user and password"),
            // The server's texts may be translated; then the last advice is the one.
            "28000" if text.contains("no encryption") || text.contains("SSL off") => (
                SessionRefused,
                "no line of the server's pg_hba.conf lets this host, user and database in without TLS: give a TLS connector (a \
                 feature such as tls-rustls-ring makes one) and set sslmode=require, or let an administrator add a line",
            ),
            "28000" if text.contains("pg_hba.conf") => (
                SessionRefused,
                "let an administrator add a line for this host, user and database to the server's pg_hba.conf",
            ),
            "28000" if text.contains("valid client certificate") => {
                (SessionRefused, "the server demands a client certificate: name one with sslcert and sslkey")
            }
            "28000" if text.contains("certificate authentication failed") => (
                SessionRefused,
                "the name (CN) in the client certificate must be the user, or be mapped to it in the server's pg_ident.conf",
            ),
            "28000" => (SessionRefused, "check the user, and the server's pg_hba.conf"),
            "3D000" => (SessionRefused, "create the database, or name another one"),
            "42501" => (SessionRefused, "grant the role what it lacks"),
            "53300" => (PoolExhausted, more_connections(text)),
            "53200" if text.contains("shared memory") => (
                SessionRefused,
                "the server's table of locks is full: raise its max_locks_per_transaction, and see in pg_locks who \
                 holds so many",
            ),
            // A backend that finds no memory at this moment.
            "53200" => (SessionUnavailable, "the server is out of memory; see its log"),
            "53100" => (SessionRefused, "the server's disk is full: make room there"),
            "55000" => (
                SessionRefused,
                "allow what the server forbids (a database that takes no connections: \
                 ALTER DATABASE ... ALLOW_CONNECTIONS true)",
            ),
            "25006" => (SessionRefused, "the server is read-only; connect to the primary"),
            "57P03" => (SessionUnavailable, "the server is starting or stopping"),
            // Ended by an operator, by the server's end, or by a crash of another backend.
            "57014" | "57P01" | "57P02" | "57P05" => (SessionUnavailable, PASSING),
            // Another transaction was in the way: serialization, deadlock, and
            // another process that makes the catalog at the same moment.
            "40000" | "40001" | "40002" | "40003" | "40P01" | "55006" | "23505" => {
                (SessionUnavailable, PASSING)
            }
            "XX000" if text.contains("tuple concurrently") => (SessionUnavailable, PASSING),
            // A statement that was prepared is not known, or one of another process's is.
            "26000" | "42P05" => (SessionRefused, SHARED_SESSIONS),
            // pgbouncer gives almost everything this code.
            "08P01" if text.contains("no more connections") => (PoolExhausted, more_connections(text)),
            "08P01" if !passes_at_a_pooler(text) => {
                (SessionRefused, "check user, password and database, here and in the pooler's settings")
            }
            code if code.starts_with("08") => {
                (SessionUnavailable, "see the log of the server, and of the pooler if there is one")
            }
            "P0001" => (
                SessionRefused,
                "a trigger of the database, an event trigger perhaps, forbids it; let an administrator allow it, or \
                 do what it forbids (the catalog: dsync::CATALOG_SQL)",
            ),
            code if code.starts_with("XX") => {
                (SessionRefused, "see the log of the server, and of what stands in front of it")
            }
            _ => (SessionRefused, "change what the server objects to"),
        };
    }
    // The driver does not tell its own kinds apart. What came from the wire has an I/O error among its causes; what
    // remains is about what it was told to do: passwords, TLS, channel binding.
    let io = io_errors(error).next();
    // After a handshake that seemed to be well: the server does not like the client's certificate.
    if let Some(alert) = io.filter(|io| is_alert(io)) {
        return (SessionRefused, alert_advice(&alert.to_string().to_lowercase()).unwrap_or(TLS));
    }
    // It was ended by this process; nothing is wrong with the server.
    if Ended::find(error) == Some(Ended::Killed) {
        return (SessionUnavailable, "");
    }
    match io.map(io::Error::kind) {
        // An answer that is no message of PostgreSQL's, or an endless one.
        Some(io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput) => (SessionRefused, NOT_POSTGRES),
        // The driver's own, of the right session to the wrong kind of server.
        Some(io::ErrorKind::PermissionDenied) => (
            SessionUnavailable,
            "target_session_attrs waits for another kind of server: name all hosts, or promote one; or, where the role or the database has \
             default_transaction_read_only, do without read-write",
        ),
        Some(_) => (SessionUnavailable, UNREACHABLE),
        None if error.is_closed() => (SessionUnavailable, "the server closed the connection; see its log"),
        None if chain(error).contains("channel binding") => (
            SessionRefused,
            "channel_binding=require needs TLS, a password that the server asks for by scram-sha-256, and a server's certificate that is \
             signed with RSA or ECDSA; see to that, or leave it out",
        ),
        None if lacks_password(error) => (
            SessionRefused,
            "the server asks for a password: put one into the connection string, or have PGPASSWORD and the password file looked at, by \
             Config::from_env",
        ),
        None => (SessionRefused, "check password, sslmode and channel_binding"),
    }
}

/// Whose limit of connections has been reached. PostgreSQL has one code for all of them.
fn more_connections(text: &str) -> &'static str {
    // "… are reserved for roles with …", says 16.
    if text.contains("reserved") {
        "all connections but the reserved ones are taken: raise the server's max_connections, or lower max_sessions of \
         the services"
    } else if text.contains("for role") {
        "raise the role's limit (ALTER ROLE ... CONNECTION LIMIT), or lower max_sessions of the services"
    } else if text.contains("for database") {
        "raise the database's limit (ALTER DATABASE ... CONNECTION LIMIT), or lower max_sessions of the services"
    } else if text.contains("no more connections") {
        "raise the pooler's max_client_conn, or lower max_sessions of the services"
    } else {
        "raise the server's max_connections, or lower max_sessions of the services"
    }
}

/// Whether what a pooler says (in English, always) is about its own state or the server's, and no objection to us.
fn passes_at_a_pooler(text: &str) -> bool {
    const OBJECTIONS: [&str; 6] =
        ["password", "authentication", "no such", "does not exist", "not allowed", "unsupported"];
    const PASSES: [&str; 11] = [
        "timeout",
        "cannot connect",
        "could not connect",
        "connect failed",
        "shut down",
        "shutting down",
        "server conn crashed",
        "server_login_retry",
        "login has been failing",
        "closed the connection",
        "suspend",
    ];
    !OBJECTIONS.iter().any(|part| text.contains(part)) && PASSES.iter().any(|part| text.contains(part))
}
