//! How many may have a lock at once.

/// The mode of a lock: exclusive, shared, or one permit of a semaphore.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Mode {
    #[default]
    Exclusive,
    /// By all that want it so.
    Shared,
    /// By as many as there are permits. It is another lock than that of the other two modes.
    Permit,
}

impl Mode {
    /// True if others may have the lock at the same time.
    pub(crate) fn is_shared(self) -> bool {
        self != Self::Exclusive
    }

    /// Who keeps others from what they want in this mode, for the text of an error. The key follows.
    pub(crate) fn who_has(self) -> &'static str {
        match self {
            Self::Exclusive => "another session holds",
            Self::Shared => "a writer has, or waits for,",
            Self::Permit => "others have, or wait for, all permits of",
        }
    }

    /// The same, behind the key.
    pub(crate) fn which_has(self) -> &'static str {
        match self {
            Self::Exclusive => "which another session holds",
            Self::Shared => "which a writer has, or waits for",
            Self::Permit => "of which others have, or wait for, all permits",
        }
    }
}
