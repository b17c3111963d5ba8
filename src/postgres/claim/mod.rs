//! The life of a claim: from the first attempt at a lock to the end of its release.

pub(crate) mod alarm;
pub(crate) mod assignment;
pub(crate) mod bell;
pub(crate) mod engine;
pub(crate) mod idle;
pub(crate) mod lifecycle;
pub(crate) mod machine;
#[cfg(test)]
mod model;
pub(crate) mod shared;
pub(crate) mod spec;
pub(crate) mod supervisor;
pub(crate) mod turns;
