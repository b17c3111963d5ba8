//! The life of a session: how it is opened, watched, given deadlines, cancelled, and closed.

pub(crate) mod batch;
pub(crate) mod control;
pub(crate) mod known;
pub(crate) mod locks;
pub(crate) mod machine;
pub(crate) mod open;
pub(crate) mod refusal;
pub(crate) mod wire;
