//! Refuses settings that cannot work, before a manager is made of them.

use std::time::Duration;

use postgres::config::{ChannelBinding, Host, SslMode, SslNegotiation, TargetSessionAttrs};

use super::settings::{self, Unless};
use super::{CatalogMode, Config, invalid, text, tls};
use crate::error::Result;
use crate::key::Key;
use crate::pg::quorum::Quorum;
use crate::pg::takeover::TakeoverPolicy;

impl Config {
    /// Refuses settings that cannot work, each with what to change.
    pub(crate) fn validate(&self) -> Result<()> {
        /// PostgreSQL keeps its timeouts as a 32-bit number of milliseconds.
        const LONGEST: Duration = Duration::from_millis(i32::MAX as u64);
        /// A day. Nobody means a longer one.
        const LONG: Duration = Duration::from_secs(24 * 60 * 60);
        /// The largest `max_connections` of PostgreSQL. r2d2 reserves memory for that many at once.
        const MOST_SESSIONS: u32 = 262_143;
        let plan = self.lease_plan();
        for (name, value, shortest) in [
            ("connect_timeout", self.connect_time(), Duration::from_millis(10)),
            ("release_timeout", self.release_timeout, Duration::from_millis(10)),
            ("wait_slice", self.wait_slice, Duration::from_millis(10)),
            ("idle_timeout", self.idle_timeout, Duration::from_millis(1)),
            ("lease", plan.lease, Duration::from_millis(500)),
            ("margin", plan.margin, Duration::from_millis(10)),
            ("heartbeat", plan.heartbeat, Duration::from_millis(10)),
            ("heartbeat_timeout", plan.heartbeat_timeout, Duration::from_millis(10)),
        ] {
            if !(shortest..=LONGEST).contains(&value) {
                return Err(invalid(format!(
                    "{name} is {value:?}; it must be between {shortest:?} and {LONGEST:?}"
                )));
            }
        }
        if plan.heartbeat + plan.heartbeat_timeout >= plan.term() {
            return Err(invalid(format!(
                "twice heartbeat ({:?}), heartbeat_timeout ({:?}) and margin ({:?}) together must be less than lease \
                 ({:?}), or a term could end before a heartbeat has had its time; lengthen lease, or shorten the others",
                plan.heartbeat, plan.heartbeat_timeout, plan.margin, plan.lease
            )));
        }
        if plan.lease > LONG {
            log::warn!(
                "lease is {:.1} days: for so long nobody is granted the locks of a machine that is gone, and after a crash of the server no lock at all; \
                 if that is not meant, shorten it, and let an operator run: {}",
                plan.lease.as_secs_f64() / LONG.as_secs_f64(),
                self.schema.apply("UPDATE dsync.policy SET lease = … (milliseconds)")
            );
        }
        if self.catalog == CatalogMode::None && self.takeover_policy() != TakeoverPolicy::Immediate {
            return Err(invalid(format!(
                "the takeover policy {:?} needs the catalog, where the last run of the server is recorded; set the catalog to automatic, or \
                 takeover to immediate",
                self.takeover_policy().name()
            )));
        }
        if self.quorum != Quorum::Server && self.takeover_policy() == TakeoverPolicy::Immediate {
            let lacks = match self.catalog {
                CatalogMode::None => "the catalog; set the catalog to automatic",
                _ => "a takeover grace on the server that takes over; set takeover to after-promotion",
            };
            return Err(invalid(format!("the quorum {:?} needs {lacks}, or quorum to server", self.quorum)));
        }
        if self.max_sessions == 0 {
            return Err(invalid(
                "max_sessions is 0; set at least 1, since each claim needs a session".to_owned(),
            ));
        }
        if self.max_sessions > MOST_SESSIONS {
            return Err(invalid(format!(
                "max_sessions is {}; no server takes more than {MOST_SESSIONS}",
                self.max_sessions
            )));
        }
        if self.shared_sessions >= self.max_sessions {
            return Err(invalid(format!(
                "shared_sessions is {}, and max_sessions {}; lower the first, or raise the second: a lock that is taken is waited for on a session \
                 beside the shared ones",
                self.shared_sessions, self.max_sessions
            )));
        }
        // The key of the leadership is made of the service's name.
        let longest_service = Key::MAX_LEN - "service//leadership".len();
        for (name, value, longest) in [
            ("namespace", Some(&self.namespace), Key::MAX_LEN),
            ("service", self.service.as_ref(), longest_service),
            ("build", self.build.as_ref(), Key::MAX_LEN),
        ] {
            let Some(value) = value else { continue };
            if value.contains('\0') {
                return Err(invalid(format!("{name} contains a NUL; remove it")));
            }
            if value.len() > longest {
                return Err(invalid(format!(
                    "{name} has {} bytes, the limit is {longest}; shorten it",
                    value.len()
                )));
            }
        }
        self.schema.validate()?;
        if self.namespace.is_empty() {
            return Err(invalid(
                "namespace is empty; give it a name or leave it out: keys that are numbers have no namespace, and a name without one could \
                 be taken for a number"
                    .to_owned(),
            ));
        }
        if self.service.as_ref().is_some_and(String::is_empty) {
            return Err(invalid("service is empty; give the service a name or leave it out".to_owned()));
        }
        self.validate_connection()
    }

    /// True unless all hosts are Unix sockets.
    fn has_tcp(&self) -> bool {
        !self.postgres.get_hostaddrs().is_empty() || !self.postgres.get_hosts().iter().all(is_unix)
    }

    /// Whether TLS is out of the question. A Unix socket goes without, whatever is said, as with libpq.
    pub(super) fn never_tls(&self) -> bool {
        self.postgres.get_ssl_mode() == SslMode::Disable || !self.has_tcp()
    }

    /// Refuses what is wrong with the connection, wherever it came from. No text repeats a value.
    fn validate_connection(&self) -> Result<()> {
        let postgres = &self.postgres;
        // An address beside the folder of a Unix socket wins.
        let has_unix = postgres.get_hostaddrs().is_empty() && postgres.get_hosts().iter().any(is_unix);
        let (mode, never_tls) = (postgres.get_ssl_mode(), self.never_tls());
        let has_tls = self.tls.is_some() || self.tls_stack.is_some();
        for unread in &self.unread {
            unread.check(has_tls, |unless| match unless {
                // A connector that was made as the settings say was told of a part of them only.
                Unless::Tls => self.tls.is_some() && !self.tls_as_set || never_tls,
                Unless::TlsAsSet => has_tls && (self.tls.is_none() || self.tls_as_set) || never_tls,
                Unless::AnyTls => has_tls || never_tls,
                Unless::Tcp => !has_unix,
            })?;
        }
        for host in postgres.get_hosts() {
            let can_be = match host {
                Host::Tcp(name) => text::is_host_name(name),
                Host::Unix(folder) => folder.is_absolute(),
            };
            if !can_be {
                let advice = "if it is a part of the password, percent-encode @ : / ? # and % there";
                return Err(invalid(format!("{}; {advice}", settings::NO_HOST_NAME)));
            }
        }
        if postgres.get_ports().contains(&0) {
            return Err(invalid("the port is 0; give the one that the server listens on".to_owned()));
        }
        let texts = [
            ("user", postgres.get_user()),
            ("database's name", postgres.get_dbname()),
            ("options", postgres.get_options()),
            ("application_name", postgres.get_application_name()),
        ];
        let with_nul = texts.iter().find(|(_, text)| text.is_some_and(|text| text.contains('\0')));
        if let Some((name, _)) = with_nul {
            return Err(invalid(format!("the {name} of the connection contains a NUL; remove it")));
        }
        if postgres.get_password().is_some_and(|password| password.contains(&0)) {
            return Err(invalid("the password contains a NUL; no password of PostgreSQL's does".to_owned()));
        }
        if postgres.get_target_session_attrs() == TargetSessionAttrs::ReadOnly {
            return Err(invalid(format!("target_session_attrs is read-only: {}", settings::NEEDS_PRIMARY)));
        }
        if let (Some(all), Some(&each)) = (self.connect_timeout, postgres.get_connect_timeout())
            && each > all
        {
            return Err(invalid(format!(
                "the time to connect, Config::connect_timeout or DSYNC_CONNECT_TIMEOUT, is {all:?} for all hosts together, and the \
                 connection's own connect_timeout {each:?} for each address; raise the first or lower the second"
            )));
        }
        if mode == SslMode::Require && !has_tls && !never_tls {
            return Err(invalid(format!(
                "sslmode=require cannot be used: {}, or say sslmode=disable if the network is trusted",
                tls::NO_TLS
            )));
        }
        if postgres.get_ssl_negotiation() == SslNegotiation::Direct && mode != SslMode::Require {
            return Err(invalid(
                "sslnegotiation=direct goes with sslmode=require only; say so too".to_owned(),
            ));
        }
        if postgres.get_channel_binding() == ChannelBinding::Require {
            if never_tls {
                let message = "channel_binding=require needs TLS: connect over TCP, and say sslmode=require";
                return Err(invalid(message.to_owned()));
            }
            if !has_tls {
                return Err(invalid(format!(
                    "channel_binding=require cannot be used: {}, or unset it",
                    tls::NO_TLS
                )));
            }
        }
        Ok(())
    }
}

fn is_unix(host: &Host) -> bool {
    matches!(host, Host::Unix(_))
}
