//! Changes settings of a running server.

use std::time::Duration;

use super::Server;
use super::configuration::quoted;
use crate::error::Result;
use crate::tls::Certificate;
use crate::wait::wait_for;

const PATIENCE: Duration = Duration::from_secs(30);

impl Server {
    /// Changes a setting (`ALTER SYSTEM`) and waits until new connections see it; open ones see it a moment later, when
    /// they next wait for a command. Some settings, `max_connections` for one, need a [`restart`](Self::restart).
    ///
    /// # Errors
    /// When the server doesn't answer or doesn't know the setting or the value.
    pub fn set(&self, name: &str, value: &str) -> Result<()> {
        self.execute(&format!("ALTER SYSTEM SET {} = {}", identifier(name), quoted(value)))?;
        self.reload()
    }

    /// Gives a setting the value back that it had at the start.
    ///
    /// # Errors
    /// When the server doesn't answer or doesn't know the setting.
    pub fn reset(&self, name: &str) -> Result<()> {
        self.execute(&format!("ALTER SYSTEM RESET {}", identifier(name)))?;
        self.reload()
    }

    /// Shows another certificate to whoever connects from now on: with [`Builder::tls`](super::Builder::tls) only.
    ///
    /// # Errors
    /// When the server doesn't answer.
    pub fn present(&self, certificate: &Certificate) -> Result<()> {
        self.write_certificate(certificate)?;
        self.reload()
    }

    fn reload(&self) -> Result<()> {
        // A new backend knows when its postmaster last read the files.
        const READ_AT: &str = "SELECT extract(epoch FROM pg_conf_load_time())::float8";
        let before: f64 = self.ask(READ_AT)?;
        self.execute("SELECT pg_reload_conf()")?;
        wait_for("the server to read its settings", PATIENCE, || {
            self.ask::<f64>(READ_AT).is_ok_and(|now| now > before).then_some(())
        })
    }
}

/// Each part in quotes: settings of extensions have two (`dsync.name`).
fn identifier(name: &str) -> String {
    name.split('.').map(|part| format!("\"{}\"", part.replace('"', "\"\""))).collect::<Vec<_>>().join(".")
}
