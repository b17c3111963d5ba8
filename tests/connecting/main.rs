//! The way to a server, and what is refused there.

#![allow(
    clippy::unwrap_used,
    reason = "all of this is test code, in which a panic is the report of a failure"
)]

#[path = "../common/mod.rs"]
mod common;

mod bad_input;
mod connection;
mod dialing;
mod refusals;
mod verdicts;
