//! What the calls of the interface do, in one process and in several.

#![allow(
    clippy::unwrap_used,
    reason = "all of this is test code, in which a panic is the report of a failure"
)]

#[path = "../common/mod.rs"]
mod common;

mod any_thread;
mod cancelling;
mod contract;
mod ending;
mod forking;
mod guard_edges;
mod guards;
mod instance;
mod multi;
mod observing;
mod once;
mod stepping_down;
mod threads;
