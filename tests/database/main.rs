//! What locks write into the database and read there, and what else is there.

#![allow(
    clippy::unwrap_used,
    reason = "all of this is test code, in which a panic is the report of a failure"
)]

#[path = "../common/mod.rs"]
mod common;

mod catalog;
mod fencing;
mod hostile;
mod introspection;
mod neighbours;
mod semaphores;
mod server_log;
mod session_locks;
mod shared_locks;
mod transaction_locks;
