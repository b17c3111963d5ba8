//! A private Redis, which keeps nothing and leaves nothing behind.

use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use redis::Connection;
use support::wait_for;
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(10);

/// Starts the server and ends it when nobody holds the other end of its standard input any more. That happens when we
/// are gone, however we went. A Redis that keeps nothing leaves its folder empty.
const KEEPER: &str = r#"
    folder=$1; shift
    "$@" & server=$!
    read -r _
    kill "$server"; wait "$server"
    rmdir "$folder"
"#;

/// A Redis server on 127.0.0.1. Dropping it ends it.
#[derive(Debug)]
pub(crate) struct Redis {
    keeper: Child,
    url: String,
    version: String,
    folder: TempDir,
}

impl Redis {
    /// None where there is no such program.
    pub(crate) fn start() -> Option<Self> {
        let version = match Command::new("redis-server").arg("--version").output() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
            said => String::from_utf8_lossy(&said.expect("redis-server's version").stdout).into_owned(),
        };
        let version =
            version.split_whitespace().find_map(|word| word.strip_prefix("v=")).unwrap_or("?").to_owned();
        // Somebody else may be quicker to take the port.
        Some((0..5).find_map(|_| Self::on_a_free_port(&version)).expect("redis-server starts"))
    }

    fn on_a_free_port(version: &str) -> Option<Self> {
        let folder = tempfile::tempdir().expect("a folder");
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .and_then(|listener| listener.local_addr())
            .expect("a free port")
            .port();
        let keeper = Command::new("/bin/sh")
            .args(["-c", KEEPER, "redis-keeper"])
            .arg(folder.path())
            .args(["redis-server", "--bind", "127.0.0.1"])
            .args(["--port", &port.to_string(), "--save", "", "--appendonly", "no", "--dir"])
            .arg(folder.path())
            // A Ctrl-C at the terminal must not reach the one that cleans up.
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("a shell");
        let redis =
            Self { keeper, url: format!("redis://127.0.0.1:{port}/"), version: version.to_owned(), folder };
        wait_for("redis-server", PATIENCE, || redis.is_ours().then_some(())).ok().map(|()| redis)
    }

    /// Whether it answers, and is no other server that took the port.
    fn is_ours(&self) -> bool {
        let folder = self.folder.path().to_string_lossy();
        redis::Client::open(self.url())
            .and_then(|client| client.get_connection())
            .and_then(|mut connection| {
                redis::cmd("CONFIG").arg("GET").arg("dir").query::<Vec<String>>(&mut connection)
            })
            .is_ok_and(|answer| answer.get(1).is_some_and(|dir| dir.ends_with(&*folder)))
    }

    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    pub(crate) fn version(&self) -> &str {
        &self.version
    }

    /// A connection of ours, beside those of the contenders.
    pub(crate) fn connection(&self) -> Connection {
        redis::Client::open(self.url())
            .and_then(|client| client.get_connection())
            .expect("a connection to Redis")
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        drop(self.keeper.stdin.take());
        // Nothing could be done about a failure. The folder goes after this.
        let _ = self.keeper.wait();
    }
}
