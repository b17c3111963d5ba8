//! The life of a claim: from the first attempt at a lock to the end of its release.

pub(crate) mod alarm;
mod announce;
pub(crate) mod assignment;
pub(crate) mod bell;
#[expect(clippy::module_inception, reason = "the room is named after what it is about")]
pub(crate) mod claim;
pub(crate) mod engine;
pub(crate) mod idle;
pub(crate) mod interrupt;
pub(crate) mod lifecycle;
pub(crate) mod machine;
#[cfg(test)]
mod model;
pub(crate) mod spec;
pub(crate) mod status;
pub(crate) mod supervisor;
pub(crate) mod turns;
