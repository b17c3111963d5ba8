//! Tests that keep the processors busy, apart from those that measure time.

#![allow(
    clippy::unwrap_used,
    reason = "all of this is test code, in which a panic is the report of a failure"
)]

#[path = "../common/mod.rs"]
mod common;

mod exclusion;
mod races;
mod stopping;
