//! The verbs that look at locks and act on them: the real program on real servers.

#![allow(
    clippy::unwrap_used,
    reason = "all of this is test code, in which a panic is the report of a failure"
)]

mod common;
mod connecting;
mod doctor;
mod looking;
mod taking;
mod terminal;
mod watching;
mod writing;
