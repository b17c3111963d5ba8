//! Writes the server's configuration files.

use std::fmt::Write as _;
use std::fs::OpenOptions;
use std::io::Write as _;

use super::Server;
use crate::error::{Error, Result};
use crate::tls::{Certificate, Subject};

/// For all servers. Everything is in the file and nothing on the command line, which `ALTER SYSTEM` couldn't override.
const COMMON: &str = "
log_line_prefix = '%m [%p] %a '
lc_messages = 'C'
shared_buffers = '32MB'
# In the server's folder, so that one that is killed leaves nothing elsewhere.
dynamic_shared_memory_type = 'mmap'
# Standbys start from a copy and then ask for what came after it.
wal_keep_size = '64MB'
# A server that stops waits this long for a client that was accepted meanwhile and says nothing, a frozen one for
# example. The default of 60 s is as long as the patience for a stop.
authentication_timeout = '10s'
jit = off
";

/// What a crash of the machine would make matter.
const UNSAFE: &str = "
fsync = off
full_page_writes = off
";

impl Server {
    /// Writes all files anew but postgresql.conf, where a later line wins over an earlier one.
    pub(super) fn configure(&self) -> Result<()> {
        self.workshop.folder.write("data/pg_hba.conf", &self.hba(), 0o600)?;
        if self.plan.tls {
            let mut names = vec!["localhost".to_owned(), "127.0.0.1".to_owned(), "::1".to_owned()];
            names.extend(self.plan.listen.iter().cloned());
            let hosts: Vec<&str> = names.iter().map(String::as_str).collect();
            // Two certificates rather than a single self-signed one: some TLS libraries refuse an authority's
            // certificate as a server's.
            let authority = Certificate::self_signed(&Subject {
                name: "dsync test authority",
                is_authority: true,
                ..Subject::default()
            })?;
            let server = authority.sign(&Subject {
                name: "dsync test server",
                hosts: &hosts,
                ..Subject::default()
            })?;
            self.workshop.folder.write("authority.pem", authority.pem(), 0o644)?;
            self.write_certificate(&server)?;
        }
        self.append("postgresql.conf", &self.parameters())
    }

    pub(super) fn write_certificate(&self, certificate: &Certificate) -> Result<()> {
        self.workshop.folder.write("server.pem", certificate.pem(), 0o644)?;
        self.workshop.folder.write("server.key", &certificate.key(), 0o600)?;
        Ok(())
    }

    /// Adds lines to a file in the data folder, which keeps its owner.
    pub(super) fn append(&self, file: &str, lines: &str) -> Result<()> {
        let path = self.data_dir().join(file);
        OpenOptions::new()
            .append(true)
            .open(&path)
            .and_then(|mut file| file.write_all(format!("\n{lines}").as_bytes()))
            .map_err(Error::because(format!("can't write {}", path.display())))
    }

    /// The lines that say where the server listens.
    pub(super) fn place(&self) -> String {
        format!("port = {}\n", self.port)
    }

    fn parameters(&self) -> String {
        let mut text = COMMON.to_owned();
        if !self.plan.durable {
            text.push_str(UNSAFE);
        }
        let mut set = |name: &str, value: &str| {
            // Writing to a string can't fail.
            let _ = writeln!(text, "{name} = {}", quoted(value));
        };
        let mut addresses = vec!["127.0.0.1".to_owned()];
        addresses.extend(self.plan.listen.iter().cloned());
        set("listen_addresses", &addresses.join(","));
        set("unix_socket_directories", &self.socket_dir().to_string_lossy());
        set("max_connections", &self.plan.max_connections.to_string());
        // Shown in the titles of the processes: tells whose they are.
        set("cluster_name", &self.folder().file_name().unwrap_or_default().to_string_lossy());
        if self.plan.tls {
            set("ssl", "on");
            set("ssl_cert_file", &self.workshop.folder.join("server.pem").to_string_lossy());
            set("ssl_key_file", &self.workshop.folder.join("server.key").to_string_lossy());
        }
        for (name, value) in &self.plan.settings {
            set(name, value);
        }
        text + &self.place()
    }

    fn hba(&self) -> String {
        let method = if self.plan.password { "scram-sha-256" } else { "trust" };
        let mut lines =
            vec!["local all postgres trust".to_owned(), "local replication postgres trust".to_owned()];
        lines.extend(self.plan.hba.iter().cloned());
        lines.push("local all all trust".to_owned());
        lines.push(format!("host all all samehost {method}"));
        lines.push(format!("host replication all samehost {method}"));
        if !self.plan.listen.is_empty() {
            lines.push(format!("host all all samenet {method}"));
            lines.push(format!("host replication all samenet {method}"));
        }
        lines.join("\n") + "\n"
    }
}

/// A value as postgresql.conf wants it; numbers and words may be quoted as well.
pub(super) fn quoted(value: &str) -> String {
    format!("'{}'", value.replace('\'', "''"))
}
