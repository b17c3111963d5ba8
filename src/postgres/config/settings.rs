//! The settings of a connection by libpq's names: parameters of a connection string, and environment variables.
//!
//! A setting is honoured, or refused by its name, or known to be without effect. None is ignored that would lead `psql`
//! to another server, or let it refuse to connect.
//! <https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-PARAMKEYWORDS>
//! <https://www.postgresql.org/docs/current/libpq-envars.html>

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use postgres::config::{ChannelBinding, LoadBalanceHosts, SslMode, SslNegotiation, TargetSessionAttrs};

use super::password_file::PasswordFile;
use super::tls::NO_TLS;
use super::tls_settings::TlsSettings;
use super::{Variables, invalid, service_file, text, variable};
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
    PasswordFile,
    /// A file for TLS; whoever makes the connector is told of it.
    TlsFile(fn(&mut TlsSettings, PathBuf)),
    /// It changes nothing about a session of ours, or has done its work before the settings are gone through.
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
    /// The connector was made as the settings ask, by `Config::tls_with` or by a feature of the library, or there is no TLS.
    TlsAsSet,
    /// As `TlsAsSet`, or TLS is left to `Config::tls`.
    AnyTls,
    /// No host is a Unix socket.
    Tcp,
}

/// Where a setting came from, for the text of an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// The connection string that the program gave.
    Text,
    /// The field `url` of a file.
    #[cfg(feature = "serde")]
    Url,
    /// The connection string in the environment.
    DatabaseUrl,
    /// The service that one of these named.
    Service,
    /// The variable of its own.
    Variable,
    /// What libpq takes where nobody says anything.
    Usual,
}

/// A setting that is not read, and must be made up for; see [`Unread::check`].
#[derive(Clone, Debug)]
pub(super) struct Unread {
    name: String,
    unless: Unless,
}

impl Unread {
    /// Refuses the setting unless something makes up for it. `has_tls` if there is a connector of any kind.
    pub(super) fn check(&self, has_tls: bool, is_so: impl FnOnce(Unless) -> bool) -> Result<()> {
        if is_so(self.unless) {
            return Ok(());
        }
        let problem = match self.unless {
            Unless::TlsAsSet | Unless::AnyTls if !has_tls => {
                return Err(invalid(format!("{} cannot be used: {NO_TLS}, or unset it", self.name)));
            }
            Unless::Tls | Unless::AnyTls => {
                "this version does not read it; give a TLS connector that is set up so with Config::tls, or unset it"
            }
            Unless::TlsAsSet => {
                "the connector that was given with Config::tls decides alone what is verified; say require, and give one that \
                 verifies it, or make it with Config::tls_with"
            }
            Unless::Tcp => {
                "this version does not read whose process serves a Unix socket; connect with TCP and TLS, or unset it"
            }
        };
        Err(invalid(format!("{} cannot be used: {problem}", self.name)))
    }
}

impl Origin {
    /// The setting, as an error names it.
    fn name(self, setting: &Setting) -> String {
        match self {
            Self::Text => format!("the parameter {} of the connection string", setting.parameter),
            #[cfg(feature = "serde")]
            Self::Url => format!("the parameter {} in url", setting.parameter),
            Self::DatabaseUrl => format!("the parameter {} in DATABASE_URL", setting.parameter),
            Self::Service => format!("the parameter {} of the service", setting.parameter),
            Self::Variable => format!("the environment variable {}", setting.variable),
            Self::Usual => format!("the default of {}", setting.parameter),
        }
    }
}

/// What the settings describe.
pub(super) struct Connection {
    pub(super) postgres: postgres::Config,
    /// Where the password is, if it is not among the settings.
    pub(super) password_file: Option<PasswordFile>,
    pub(super) tls: TlsSettings,
    /// What the program itself must see to.
    pub(super) unread: Vec<Unread>,
}

/// The folders of the local server's socket that are usual; libpq has one of them compiled in.
pub(super) const SOCKET_FOLDERS: [&str; 2] = ["/var/run/postgresql", "/tmp"];

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
                #[cfg(feature = "serde")]
                Origin::Url => invalid(format!("url cannot be understood: {problem}")),
                _ => variable("DATABASE_URL", &problem),
            }
        })?;
        let given = parameters.into_iter().filter(|(_, value)| !value.is_empty());
        Ok(Self(given.map(|(name, value)| (name, (origin, value))).collect()))
    }

    /// A password that stands beside the connection string. `false` if that has one.
    #[cfg(feature = "serde")]
    pub(super) fn set_password(&mut self, password: String) -> bool {
        self.0.insert("password", (Origin::Url, password.into_bytes())).is_none()
    }

    /// What the program calls itself, which gives way to every other setting of that name.
    pub(super) fn call(&mut self, name: &str) {
        self.0.entry("fallback_application_name").or_insert((Origin::Usual, name.into()));
    }

    /// Fills in what a service says, if one is named, and was left out.
    pub(super) fn fill_in_service(&mut self, get: &Variables<'_>) -> Result<()> {
        for (parameter, name) in [("service", "PGSERVICE"), ("servicefile", "PGSERVICEFILE")] {
            if let (Some(value), false) = (get(name)?, self.0.contains_key(parameter)) {
                self.0.insert(parameter, (Origin::Variable, value.into_bytes()));
            }
        }
        let Some((origin, name)) = self.0.get("service") else { return Ok(()) };
        let file = self.0.get("servicefile").map(|(_, path)| PathBuf::from(OsStr::from_bytes(path)));
        let parameters = service_file::look_up(name, file, get)?.map_err(|problem| {
            let service = SETTINGS.iter().find(|setting| setting.parameter == "service");
            let named_by = service.map(|setting| origin.name(setting)).unwrap_or_default();
            invalid(format!("{named_by} cannot be used: {problem}"))
        })?;
        for (name, value) in parameters.into_iter().filter(|(_, value)| !value.is_empty()) {
            self.0.entry(name).or_insert((Origin::Service, value));
        }
        Ok(())
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
            let folder =
                SOCKET_FOLDERS.into_iter().find(|folder| Path::new(folder).is_dir()).unwrap_or("/tmp");
            self.0.insert("host", (Origin::Usual, folder.into()));
        }
        if let Some(home) = get("HOME")? {
            self.fill_in_files(Path::new(&home));
        }
        Ok(())
    }

    /// Fills in the files that libpq looks for in the user's home.
    fn fill_in_files(&mut self, home: &Path) {
        for (parameter, file) in [
            ("passfile", ".pgpass"),
            ("sslrootcert", ".postgresql/root.crt"),
            ("sslcert", ".postgresql/postgresql.crt"),
            ("sslkey", ".postgresql/postgresql.key"),
        ] {
            let file = home.join(file);
            // The password file is looked for at each connect.
            let counts = match parameter {
                "passfile" => true,
                "sslkey" => self.0.contains_key("sslcert") && file.exists(),
                _ => file.exists(),
            };
            if counts && !self.0.contains_key(parameter) {
                self.0.insert(parameter, (Origin::Usual, file.into_os_string().into_vec()));
            }
        }
    }

    /// The connection that they describe. `get` tells who the user is where no setting does.
    pub(super) fn connection(&self, get: &Variables<'_>) -> Result<Connection> {
        let mut connection = Connection {
            postgres: postgres::Config::new(),
            password_file: None,
            tls: TlsSettings::default(),
            unread: Vec::new(),
        };
        let mut file = None;
        for setting in &SETTINGS {
            let Some((origin, value)) = self.0.get(setting.parameter) else { continue };
            let refuse = |problem: &str| -> Error {
                invalid(format!("{} cannot be used: {problem}", origin.name(setting)))
            };
            let unread = |unless| Unread { name: origin.name(setting), unless };
            let path = || PathBuf::from(OsStr::from_bytes(value));
            match &setting.rule {
                Rule::Set(set) => {
                    let text = std::str::from_utf8(value).map_err(|_| refuse("it is not UTF-8"))?;
                    set(&mut connection.postgres, text).map_err(refuse)?;
                    if setting.parameter == "sslmode" && connection.tls.set_mode(text) {
                        connection.unread.push(unread(Unless::TlsAsSet));
                    }
                }
                Rule::Password => {
                    connection.postgres.password(value);
                }
                Rule::PasswordFile => {
                    file = Some((path(), origin.name(setting)));
                }
                Rule::TlsFile(set) => {
                    set(&mut connection.tls, path());
                    // A file that happens to be there does not ask for TLS.
                    if *origin != Origin::Usual {
                        connection.unread.push(unread(Unless::AnyTls));
                    }
                }
                Rule::NoEffect => {}
                Rule::Refused(advice) => return Err(refuse(advice)),
                Rule::Unread(unless) => connection.unread.push(unread(*unless)),
            }
        }
        // As in libpq: what the system trusts says something only of names.
        if connection.tls.trusts_system() && !self.0.contains_key("sslmode") {
            connection.postgres.ssl_mode(SslMode::Require);
            connection.tls.set_mode("verify-full");
        }
        let postgres = &connection.postgres;
        if let (Some((path, named_by)), None) = (file, postgres.get_password()) {
            // The driver asks the system for the name, by a way that it does not share.
            let system = match postgres.get_user() {
                Some(_) => None,
                None => get("LOGNAME")?.map_or_else(|| get("USER"), |name| Ok(Some(name)))?,
            };
            let user = postgres.get_user().or(system.as_deref());
            connection.password_file = Some(PasswordFile::new(path, named_by, user, postgres.get_dbname()));
        }
        Ok(connection)
    }
}

/// The parameter with this name.
pub(super) fn parameter(name: &[u8]) -> Option<&'static str> {
    SETTINGS.iter().map(|setting| setting.parameter).find(|parameter| parameter.as_bytes() == name)
}

#[cfg(test)]
pub(super) fn parameters() -> impl Iterator<Item = &'static str> {
    SETTINGS.iter().map(|setting| setting.parameter)
}

#[cfg(test)]
pub(super) fn variables() -> impl Iterator<Item = &'static str> {
    SETTINGS.iter().map(|setting| setting.variable).filter(|variable| !variable.is_empty())
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
    setting("passfile", "PGPASSFILE", Rule::PasswordFile),
    setting("options", "PGOPTIONS", Rule::Set(|config, options| done(config.options(options)))),
    // In front of the one that it stands in for.
    setting("fallback_application_name", "", Rule::Set(|config, name| done(config.application_name(name)))),
    setting("application_name", "PGAPPNAME", Rule::Set(|config, name| done(config.application_name(name)))),
    setting("connect_timeout", "PGCONNECT_TIMEOUT", Rule::Set(set_connect_timeout)),
    setting("target_session_attrs", "PGTARGETSESSIONATTRS", Rule::Set(set_target_session_attrs)),
    setting("load_balance_hosts", "PGLOADBALANCEHOSTS", Rule::Set(set_load_balance_hosts)),
    // In front of `sslrootcert`, which may ask for more than it does.
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
    setting("sslrootcert", "PGSSLROOTCERT", Rule::TlsFile(TlsSettings::trust)),
    setting("sslcert", "PGSSLCERT", Rule::TlsFile(|tls, path| tls.sslcert = Some(path))),
    setting("sslkey", "PGSSLKEY", Rule::TlsFile(|tls, path| tls.sslkey = Some(path))),
    setting("sslpassword", "", Rule::Unread(Unless::Tls)),
    setting("sslcertmode", "PGSSLCERTMODE", Rule::Unread(Unless::Tls)),
    setting("sslcrl", "PGSSLCRL", Rule::Unread(Unless::Tls)),
    setting("sslcrldir", "PGSSLCRLDIR", Rule::Unread(Unless::Tls)),
    setting("sslsni", "PGSSLSNI", Rule::Unread(Unless::Tls)),
    setting("ssl_min_protocol_version", "PGSSLMINPROTOCOLVERSION", Rule::Unread(Unless::Tls)),
    setting("ssl_max_protocol_version", "PGSSLMAXPROTOCOLVERSION", Rule::Unread(Unless::Tls)),
    // Both are gone through before the others.
    setting("service", "PGSERVICE", Rule::NoEffect),
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
        // Who makes the connector sees to the rest: see `TlsSettings`.
        "require" | "verify-ca" | "verify-full" => SslMode::Require,
        "allow" => return Err("this version does not fall back to TLS; say disable, prefer or require"),
        _ => return Err("it should be one of disable, prefer, require, verify-ca, verify-full"),
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
