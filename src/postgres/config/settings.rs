//! The settings of a connection by libpq's names: parameters of a connection string, and environment variables.
//!
//! A setting is honoured, or refused by its name, or known to be without effect. None is ignored that would lead `psql`
//! to another server, or let it refuse to connect.
//! <https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-PARAMKEYWORDS>
//! <https://www.postgresql.org/docs/current/libpq-envars.html>

use std::collections::BTreeMap;
use std::path::Path;
use std::str::FromStr;
use std::time::Duration;

use postgres::config::{ChannelBinding, LoadBalanceHosts, SslMode, SslNegotiation, TargetSessionAttrs};

use super::{Variables, invalid, text, variable};
use crate::error::{Error, Result};

/// A setting, by its names.
struct Setting {
    parameter: &'static str,
    /// Empty if no environment variable sets it.
    variable: &'static str,
    rule: Rule,
}

/// What becomes of a setting.
enum Rule {
    Set(fn(&mut postgres::Config, &str) -> Outcome),
    Password,
    /// It changes nothing about a session of ours.
    NoEffect,
    /// Nothing but another setting helps; the text says which.
    Refused(&'static str),
    /// Refused as well, unless something makes up for it, which is known only when the program has had its say.
    Unread(Unless),
}

type Outcome = std::result::Result<(), &'static str>;

/// What makes up for a setting that is not read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unless {
    /// TLS is left to `Config::tls`, or there is none.
    Tls,
    /// There is a password, or `Config::password_with`.
    Password,
    /// No host is a Unix socket.
    Tcp,
}

/// Where a setting came from, for the text of an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// The connection string that the program gave.
    Text,
    /// The connection string in the environment.
    DatabaseUrl,
    /// The variable of its own.
    Variable,
}

/// A setting that is not read, and must be made up for; see [`Unread::check`].
#[derive(Clone, Debug)]
pub(super) struct Unread {
    name: String,
    unless: Unless,
}

impl Unread {
    /// Refuses the setting unless something makes up for it.
    pub(super) fn check(&self, is_so: impl FnOnce(Unless) -> bool) -> Result<()> {
        let advice = match self.unless {
            Unless::Tls => "it; give a TLS connector that is set up so with Config::tls, or unset it",
            Unless::Password => {
                "password files; give the password itself, or a hook with Config::password_with, or unset it"
            }
            Unless::Tcp => "whose process serves a Unix socket; connect with TCP and TLS, or unset it",
        };
        if is_so(self.unless) {
            return Ok(());
        }
        Err(invalid(format!("{} cannot be used: this version does not read {advice}", self.name)))
    }
}

impl Origin {
    /// The setting, as an error names it.
    fn name(self, setting: &Setting) -> String {
        match self {
            Self::Text => format!("the parameter {} of the connection string", setting.parameter),
            Self::DatabaseUrl => format!("the parameter {} in DATABASE_URL", setting.parameter),
            Self::Variable => format!("the environment variable {}", setting.variable),
        }
    }
}

/// The settings that were given, by the names of their parameters.
#[derive(Default)]
pub(super) struct Given(BTreeMap<&'static str, (Origin, Vec<u8>)>);

impl Given {
    /// Those of a connection string.
    pub(super) fn text(text: &str, origin: Origin) -> Result<Self> {
        let parameters = text::parse(text).map_err(|problem| {
            let problem =
                format!("{problem}. It should look like postgres://user:password@host:5432/database");
            match origin {
                Origin::Text => invalid(format!("the connection string cannot be understood: {problem}")),
                Origin::DatabaseUrl | Origin::Variable => variable("DATABASE_URL", &problem),
            }
        })?;
        let given = parameters.into_iter().filter(|(_, value)| !value.is_empty());
        Ok(Self(given.map(|(name, value)| (name, (origin, value))).collect()))
    }

    /// Fills in from the environment what was left out, and at last the local server, as libpq does.
    pub(super) fn fill_in(&mut self, get: &Variables<'_>) -> Result<()> {
        for setting in &SETTINGS {
            if setting.variable.is_empty() || matches!(setting.rule, Rule::NoEffect) {
                continue;
            }
            let value = get(setting.variable)?;
            if let (Some(value), false) = (value, self.0.contains_key(setting.parameter)) {
                self.0.insert(setting.parameter, (Origin::Variable, value.into_bytes()));
            }
        }
        if get("PGREQUIRESSL")?.is_some_and(|text| text.starts_with('1')) {
            self.0.entry("sslmode").or_insert((Origin::Variable, b"require".to_vec()));
        }
        if !self.0.contains_key("host") && !self.0.contains_key("hostaddr") {
            // The usual folders of the local server's socket; libpq has one of them compiled in.
            let usual = ["/var/run/postgresql", "/tmp"];
            let folder = usual.into_iter().find(|folder| Path::new(folder).is_dir()).unwrap_or("/tmp");
            self.0.insert("host", (Origin::Variable, folder.into()));
        }
        if !self.0.contains_key("password") && !self.0.contains_key("passfile") {
            let file = get("HOME").ok().flatten().map(|home| Path::new(&home).join(".pgpass"));
            if file.is_some_and(|file| file.exists()) {
                log::info!(
                    "no password is given, and ~/.pgpass is not read: PGPASSWORD or Config::password_with give one"
                );
            }
        }
        Ok(())
    }

    /// The connection that they describe, and what the program itself must see to.
    pub(super) fn connection(&self) -> Result<(postgres::Config, Vec<Unread>)> {
        let (mut connection, mut unread) = (postgres::Config::new(), Vec::new());
        for setting in &SETTINGS {
            let Some((origin, value)) = self.0.get(setting.parameter) else { continue };
            let refuse = |problem: &str| -> Error {
                invalid(format!("{} cannot be used: {problem}", origin.name(setting)))
            };
            match &setting.rule {
                Rule::Set(set) => {
                    let value = std::str::from_utf8(value).map_err(|_| refuse("it is not UTF-8"))?;
                    set(&mut connection, value).map_err(refuse)?;
                }
                Rule::Password => {
                    connection.password(value);
                }
                Rule::NoEffect => {}
                Rule::Refused(advice) => return Err(refuse(advice)),
                Rule::Unread(Unless::Password) if self.0.contains_key("password") => {}
                Rule::Unread(unless) => unread.push(Unread { name: origin.name(setting), unless: *unless }),
            }
        }
        Ok((connection, unread))
    }
}

/// The parameter with this name.
pub(super) fn parameter(name: &[u8]) -> Option<&'static str> {
    SETTINGS.iter().map(|setting| setting.parameter).find(|parameter| parameter.as_bytes() == name)
}

const fn setting(parameter: &'static str, variable: &'static str, rule: Rule) -> Setting {
    Setting { parameter, variable, rule }
}

const UNSET: &str = "this version cannot do it; unset it";
const NUMBER_OF_SECONDS: &str = "it should be a number of seconds";

/// All of libpq's, up to version 18, but for those that no connection string has and that change nothing.
const SETTINGS: [Setting; 51] = [
    setting("host", "PGHOST", Rule::Set(set_host)),
    setting("hostaddr", "PGHOSTADDR", Rule::Set(set_hostaddr)),
    setting("port", "PGPORT", Rule::Set(set_port)),
    setting("dbname", "PGDATABASE", Rule::Set(|config, name| done(config.dbname(name)))),
    setting("user", "PGUSER", Rule::Set(|config, name| done(config.user(name)))),
    setting("password", "PGPASSWORD", Rule::Password),
    setting("passfile", "PGPASSFILE", Rule::Unread(Unless::Password)),
    setting("options", "PGOPTIONS", Rule::Set(|config, options| done(config.options(options)))),
    // In front of the one that it stands in for.
    setting("fallback_application_name", "", Rule::Set(|config, name| done(config.application_name(name)))),
    setting("application_name", "PGAPPNAME", Rule::Set(|config, name| done(config.application_name(name)))),
    setting("connect_timeout", "PGCONNECT_TIMEOUT", Rule::Set(set_connect_timeout)),
    setting("target_session_attrs", "PGTARGETSESSIONATTRS", Rule::Set(set_target_session_attrs)),
    setting("load_balance_hosts", "PGLOADBALANCEHOSTS", Rule::Set(set_load_balance_hosts)),
    setting("sslmode", "PGSSLMODE", Rule::Set(set_sslmode)),
    setting("sslnegotiation", "PGSSLNEGOTIATION", Rule::Set(set_sslnegotiation)),
    setting("channel_binding", "PGCHANNELBINDING", Rule::Set(set_channel_binding)),
    setting("keepalives", "", Rule::Set(|config, text| done(config.keepalives(number::<u64>(text)? != 0)))),
    setting(
        "keepalives_idle",
        "",
        Rule::Set(|config, text| seconds(text, |time| _ = config.keepalives_idle(time))),
    ),
    setting(
        "keepalives_interval",
        "",
        Rule::Set(|config, text| seconds(text, |time| _ = config.keepalives_interval(time))),
    ),
    // The driver's name for it, and libpq's.
    setting(
        "keepalives_retries",
        "",
        Rule::Set(|config, text| done(config.keepalives_retries(number(text)?))),
    ),
    setting("keepalives_count", "", Rule::Set(|config, text| done(config.keepalives_retries(number(text)?)))),
    setting(
        "tcp_user_timeout",
        "",
        Rule::Set(|config, text| seconds(text, |time| _ = config.tcp_user_timeout(time))),
    ),
    setting("sslrootcert", "PGSSLROOTCERT", Rule::Unread(Unless::Tls)),
    setting("sslcert", "PGSSLCERT", Rule::Unread(Unless::Tls)),
    setting("sslkey", "PGSSLKEY", Rule::Unread(Unless::Tls)),
    setting("sslpassword", "", Rule::Unread(Unless::Tls)),
    setting("sslcertmode", "PGSSLCERTMODE", Rule::Unread(Unless::Tls)),
    setting("sslcrl", "PGSSLCRL", Rule::Unread(Unless::Tls)),
    setting("sslcrldir", "PGSSLCRLDIR", Rule::Unread(Unless::Tls)),
    setting("sslsni", "PGSSLSNI", Rule::Unread(Unless::Tls)),
    setting("ssl_min_protocol_version", "PGSSLMINPROTOCOLVERSION", Rule::Unread(Unless::Tls)),
    setting("ssl_max_protocol_version", "PGSSLMAXPROTOCOLVERSION", Rule::Unread(Unless::Tls)),
    setting(
        "service",
        "PGSERVICE",
        Rule::Refused(
            "this version reads no service files; unset it, and give host, port, user and database themselves",
        ),
    ),
    setting("servicefile", "PGSERVICEFILE", Rule::NoEffect),
    setting(
        "require_auth",
        "PGREQUIREAUTH",
        Rule::Refused(
            "this version cannot choose how the server asks for the password; unset it, and let pg_hba.conf or \
         channel_binding=require see to it",
        ),
    ),
    setting("requirepeer", "PGREQUIREPEER", Rule::Unread(Unless::Tcp)),
    setting(
        "gssencmode",
        "PGGSSENCMODE",
        Rule::Set(|_, mode| match mode {
            "require" => Err("this version cannot encrypt with GSSAPI; unset it, and use TLS"),
            _ => Ok(()),
        }),
    ),
    setting(
        "min_protocol_version",
        "PGMINPROTOCOLVERSION",
        Rule::Set(|_, version| match version {
            "3.0" => Ok(()),
            _ => Err("this version speaks protocol 3.0 only; unset it"),
        }),
    ),
    setting(
        "replication",
        "",
        Rule::Set(|_, mode| match mode {
            "false" | "off" | "no" | "0" => Ok(()),
            _ => Err("a replication session cannot take locks; unset it"),
        }),
    ),
    setting("scram_client_key", "", Rule::Refused(UNSET)),
    setting("scram_server_key", "", Rule::Refused(UNSET)),
    setting("oauth_issuer", "", Rule::Refused(UNSET)),
    setting("oauth_client_id", "", Rule::Refused(UNSET)),
    setting("oauth_client_secret", "", Rule::Refused(UNSET)),
    setting("oauth_scope", "", Rule::Refused(UNSET)),
    // The driver speaks UTF-8, whatever else is wanted, and nothing else comes back from the statements of a lock.
    setting("client_encoding", "PGCLIENTENCODING", Rule::NoEffect),
    // Since 3.0, the oldest, is what is spoken.
    setting("max_protocol_version", "PGMAXPROTOCOLVERSION", Rule::NoEffect),
    // Newer versions of libpq ignore it too.
    setting("sslcompression", "PGSSLCOMPRESSION", Rule::NoEffect),
    // Of GSSAPI only, with which no session of ours proves who it is: a server that demands it refuses us.
    setting("krbsrvname", "PGKRBSRVNAME", Rule::NoEffect),
    setting("gsslib", "PGGSSLIB", Rule::NoEffect),
    setting("gssdelegation", "PGGSSDELEGATION", Rule::NoEffect),
];

#[expect(clippy::unnecessary_wraps, reason = "what a setting does must be able to fail")]
fn done(_: &mut postgres::Config) -> Outcome {
    Ok(())
}

fn number<N: FromStr>(text: &str) -> std::result::Result<N, &'static str> {
    text.trim().parse().map_err(|_| "it should be a number")
}

/// Zero and less stand for the default, as in libpq.
fn seconds(text: &str, set: impl FnOnce(Duration)) -> Outcome {
    let seconds = text.trim().parse::<i64>().map_err(|_| NUMBER_OF_SECONDS)?;
    if let Ok(seconds @ 1..) = u64::try_from(seconds) {
        set(Duration::from_secs(seconds));
    }
    Ok(())
}

fn set_connect_timeout(config: &mut postgres::Config, text: &str) -> Outcome {
    seconds(text, |time| _ = config.connect_timeout(time))
}

fn set_host(config: &mut postgres::Config, hosts: &str) -> Outcome {
    for host in hosts.split(',') {
        if !host.starts_with('/') && !text::is_host_name(host) {
            return Err(NO_HOST_NAME);
        }
        config.host(host);
    }
    Ok(())
}

/// A host that cannot be one, wherever it came from.
pub(super) const NO_HOST_NAME: &str =
    "a host is neither a host name, nor an IP address, nor a folder with Unix sockets";

fn set_hostaddr(config: &mut postgres::Config, addresses: &str) -> Outcome {
    for address in addresses.split(',') {
        config.hostaddr(address.trim().parse().map_err(|_| "it should be an IP address")?);
    }
    Ok(())
}

fn set_port(config: &mut postgres::Config, ports: &str) -> Outcome {
    for port in ports.split(',').map(str::trim) {
        let port = if port.is_empty() { Ok(5432) } else { port.parse() };
        config.port(port.map_err(|_| "it should be a port number, like 5432")?);
    }
    Ok(())
}

fn set_sslmode(config: &mut postgres::Config, mode: &str) -> Outcome {
    config.ssl_mode(match mode {
        "disable" => SslMode::Disable,
        "prefer" => SslMode::Prefer,
        "require" => SslMode::Require,
        "verify-ca" | "verify-full" => {
            return Err(
                "this version leaves the verification of certificates to the TLS connector; say require, and give \
                 Config::tls a connector that verifies them",
            );
        }
        "allow" => return Err("this version does not fall back to TLS; say disable, prefer or require"),
        _ => return Err("it should be one of disable, prefer, require"),
    });
    Ok(())
}

fn set_sslnegotiation(config: &mut postgres::Config, how: &str) -> Outcome {
    config.ssl_negotiation(match how {
        "postgres" => SslNegotiation::Postgres,
        "direct" => SslNegotiation::Direct,
        _ => return Err("it should be one of postgres, direct"),
    });
    Ok(())
}

fn set_channel_binding(config: &mut postgres::Config, binding: &str) -> Outcome {
    config.channel_binding(match binding {
        "disable" => ChannelBinding::Disable,
        "prefer" => ChannelBinding::Prefer,
        "require" => ChannelBinding::Require,
        _ => return Err("it should be one of disable, prefer, require"),
    });
    Ok(())
}

/// A standby is refused with `any` too, so the two that ask for a primary differ in nothing here.
fn set_target_session_attrs(config: &mut postgres::Config, wanted: &str) -> Outcome {
    config.target_session_attrs(match wanted {
        "any" => TargetSessionAttrs::Any,
        "read-write" | "primary" => TargetSessionAttrs::ReadWrite,
        "read-only" | "standby" | "prefer-standby" => return Err(NEEDS_PRIMARY),
        _ => return Err("it should be one of any, read-write, primary"),
    });
    Ok(())
}

pub(super) const NEEDS_PRIMARY: &str = "locks need the primary; say read-write";

fn set_load_balance_hosts(config: &mut postgres::Config, how: &str) -> Outcome {
    config.load_balance_hosts(match how {
        "disable" => LoadBalanceHosts::Disable,
        "random" => LoadBalanceHosts::Random,
        _ => return Err("it should be one of disable, random"),
    });
    Ok(())
}
