//! What a server can be asked to be like.

use super::Server;
use crate::error::Result;
use crate::netns::{Inside, Netns};

/// Describes a server before it's started. The defaults are for tests: fast, open to everybody on this machine, and
/// not safe against a crash of the machine.
#[derive(Debug, Clone)]
#[must_use = "nothing runs before `start`"]
pub struct Builder {
    pub(super) settings: Vec<(String, String)>,
    pub(super) hba: Vec<String>,
    pub(super) listen: Vec<String>,
    pub(super) inside: Option<Inside>,
    pub(super) max_connections: u32,
    pub(super) tls: bool,
    pub(super) password: bool,
    pub(super) durable: bool,
}

impl Default for Builder {
    fn default() -> Self {
        Self {
            settings: Vec::new(),
            hba: Vec::new(),
            listen: Vec::new(),
            inside: None,
            max_connections: 100,
            tls: false,
            password: false,
            durable: false,
        }
    }
}

impl Builder {
    /// Sets a parameter of postgresql.conf. The last one of a name wins.
    pub fn setting(mut self, name: &str, value: &str) -> Self {
        self.settings.push((name.to_owned(), value.to_owned()));
        self
    }

    /// How many connections the server takes, three of them for superusers only. Defaults to 100.
    pub fn max_connections(mut self, count: u32) -> Self {
        self.max_connections = count;
        self
    }

    /// Offers TLS, with a certificate for localhost, 127.0.0.1, ::1 and the addresses of [`listen`](Self::listen); see
    /// [`Server::certificate_pem`]. Connections without TLS go on working: to refuse them, add
    /// `hostnossl all all all reject` by [`hba`](Self::hba).
    pub fn tls(mut self) -> Self {
        self.tls = true;
        self
    }

    /// Adds lines to pg_hba.conf in front of the default ones, so that they win. Only the superuser's way in over the
    /// Unix socket, which this crate needs itself, comes before them.
    pub fn hba(mut self, lines: &str) -> Self {
        self.hba.extend(lines.lines().map(str::to_owned));
        self
    }

    /// Adds addresses to listen on. They must exist on this machine. Defaults to 127.0.0.1 only.
    pub fn listen<A: AsRef<str>>(mut self, addresses: impl IntoIterator<Item = A>) -> Self {
        self.listen.extend(addresses.into_iter().map(|address| address.as_ref().to_owned()));
        self
    }

    /// Runs the server in a network namespace, where it listens on 127.0.0.1 and at the namespace's end of the cable. From outside it is
    /// reached by the cable, and by its Unix socket, which no cut is in the way of. Its standbys are outside, and follow by the cable.
    ///
    /// Drop the server before the namespace.
    pub fn inside(mut self, netns: &Netns) -> Self {
        let inside = netns.inside();
        self.listen.push(inside.address.clone());
        self.inside = Some(inside);
        self
    }

    /// Asks a password (scram-sha-256) on TCP: a random one for `postgres`. By default nobody is asked any.
    pub fn password_auth(mut self) -> Self {
        self.password = true;
        self
    }

    /// Waits for the disk as a production server does. By default it does not: what a killed *server* has committed is kept, what a
    /// crashed machine has is not.
    pub fn durable(mut self) -> Self {
        self.durable = true;
        self
    }

    /// Makes the server and waits until it takes connections.
    ///
    /// # Errors
    /// When PostgreSQL isn't installed or doesn't start. The text ends with the last lines of its log.
    pub fn start(self) -> Result<Server> {
        Server::create(self)
    }
}
