//! Leaders: whose work runs when, and that nobody works on unannounced.

#![allow(
    clippy::unwrap_used,
    reason = "all of this is test code, in which a panic is the report of a failure"
)]

#[path = "../common/mod.rs"]
mod common;

#[path = "../outages/cutoff/proxy.rs"]
#[allow(dead_code, reason = "a part of it is used")]
mod proxy;

mod chaos;
mod contract;
mod crew;
mod processes;
mod server;
