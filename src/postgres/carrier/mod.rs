//! Sessions that carry the locks of many claims: one lease, one heartbeat and one thread for all, and one statement for what many
//! claims ask at once.
//!
//! A claim has a [seat](seat::Seat) on a [carrier](carrier::Carrier). Where its lock is taken it moves to a session of its own, on which it
//! queues at the server, and which it keeps. If there is none left it stays and asks again and again.

#[expect(clippy::module_inception, reason = "the room is named after what it is about")]
pub(crate) mod carrier;
pub(crate) mod dedicated;
pub(crate) mod engine;
pub(crate) mod seat;
