//! `run` and `lead` of the real program, on private servers.

#![allow(
    clippy::unwrap_used,
    reason = "all of this is test code, in which a panic is the report of a failure"
)]

mod common;
mod contention;
mod exit_codes;
mod leading;
mod loss;
mod partition;
mod permits;
mod readme;
mod signals;
mod takeover;
mod terminal;
mod what_the_command_gets;
