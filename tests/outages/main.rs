//! Servers that fail, and processes that are cut off, frozen or killed.

#![allow(
    clippy::unwrap_used,
    reason = "all of this is test code, in which a panic is the report of a failure"
)]

#[path = "../common/mod.rs"]
mod common;

mod cutoff;
mod failover;
mod lease;
mod partition;
mod quorum;
mod recovery;
mod takeover;
