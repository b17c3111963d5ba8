//! The way to a server, and what is refused there.

#![allow(
    clippy::unwrap_used,
    reason = "all of this is test code, in which a panic is the report of a failure"
)]

#[path = "../common/mod.rs"]
mod common;

mod bad_input;
mod checking;
mod connection;
mod dialing;
mod lookalikes;
mod refusals;
#[cfg(feature = "_tls")]
mod tls;
mod verdicts;
