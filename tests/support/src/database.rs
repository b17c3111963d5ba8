//! A database of one test.

use postgres::Client;

use crate::error::{Error, Result};
use crate::server::Server;

/// A new, empty database on a [`Server`]. Dropping it ends all its sessions and drops the database, if the server
/// still runs.
#[derive(Debug)]
pub struct Database<'a> {
    server: &'a Server,
    name: String,
}

impl<'a> Database<'a> {
    /// A new database on the [shared](Server::shared) server.
    ///
    /// # Errors
    /// When it can't be made.
    ///
    /// # Panics
    /// Like [`Server::shared`].
    pub fn fresh() -> Result<Database<'static>> {
        Server::shared().database()
    }

    pub(crate) fn create(server: &'a Server, name: String) -> Result<Self> {
        // Nobody can be connected to template0, which would be in the way.
        server.execute(&format!("CREATE DATABASE {name} TEMPLATE template0"))?;
        Ok(Self { server, name })
    }

    /// Its name, which needs no quotes.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The server that it's on.
    #[must_use]
    pub fn server(&self) -> &'a Server {
        self.server
    }

    /// Its address over TCP.
    #[must_use]
    pub fn url(&self) -> String {
        self.url_at("127.0.0.1", self.server.port())
    }

    /// Its address by another way: a proxy, or an address from [`Builder::listen`](crate::Builder::listen).
    #[must_use]
    pub fn url_at(&self, host: &str, port: u16) -> String {
        self.server.url_of(&self.name, host, port)
    }

    /// Its address over the Unix socket.
    #[must_use]
    pub fn unix_url(&self) -> String {
        self.server.unix_url_of(&self.name)
    }

    /// A new connection as superuser, over the Unix socket.
    ///
    /// # Errors
    /// When the server doesn't take it.
    pub fn client(&self) -> Result<Client> {
        self.server.client_of(&self.name)
    }

    fn remove(&self) -> Result<()> {
        let mut client = self.server.client()?;
        // A bound, since this is called by a destructor.
        client
            .batch_execute("SET statement_timeout = '10s'")
            .and_then(|()| client.batch_execute(&format!("DROP DATABASE {} WITH (FORCE)", self.name)))
            .map_err(Error::because(format!("can't drop the database {}", self.name)))
    }
}

impl Drop for Database<'_> {
    fn drop(&mut self) {
        // A frozen server wouldn't answer, and one that is gone has taken the database along.
        if !self.server.is_frozen() && self.server.is_running() {
            let _ = self.remove();
        }
    }
}
