//! Private, throw-away PostgreSQL servers for tests, benches and examples.
//!
//! A test that only needs a database takes one on the [shared](Server::shared) server, which is started at first use:
//!
//! ```
//! let database = support::Database::fresh()?;
//! let mut client = database.client()?;
//! let locked: bool = client.query_one("SELECT pg_try_advisory_lock(1)", &[])?.get(0);
//! assert!(locked);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! A test that stops, kills or freezes a server starts one for itself, in about a second:
//!
//! ```
//! use support::{Server, Shutdown};
//!
//! let server = Server::start()?;
//! server.restart(Shutdown::Immediate)?;
//! let frozen = server.freeze()?;
//! // Now nothing answers, and no connection breaks.
//! frozen.thaw();
//! # Ok::<(), support::Error>(())
//! ```
//!
//! PostgreSQL 14 or newer has to be installed, or is got from a package registry ([`Binaries::find`]); no server has to
//! run. Servers run as the user `postgres` or `nobody` when the tests run as root. They listen on 127.0.0.1 and on a
//! Unix socket in their folder, which is in `/dev/shm` or `/tmp`.
//!
//! Nothing stays behind: not after a panic, not after `exit`, which runs no destructors of statics, and not after
//! `kill -9`. See `watcher.rs`.

#![forbid(unsafe_code)]

mod account;
mod binaries;
pub mod clock;
mod database;
mod download;
mod error;
mod folder;
pub mod netns;
pub mod pgbouncer;
pub mod pgpool;
mod port;
pub mod process;
mod program;
mod random;
mod server;
mod skip;
pub mod tls;
mod wait;
mod watcher;

pub use binaries::Binaries;
pub use database::Database;
pub use error::{Error, Result};
pub use server::{Builder, Frozen, Replication, Server, Shutdown};
pub use skip::{skip, skip_without};
pub use wait::wait_for;
