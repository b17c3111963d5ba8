//! The atomics of what `tests/interleavings.rs` tries with others.

pub(crate) use std::sync::atomic::{AtomicU64, Ordering};
