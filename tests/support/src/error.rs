//! The one error of this crate: what failed, why, and what to do about it.

use std::error::Error as StdError;
use std::fmt;

/// Shorthand for results of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What failed, with advice for the person who reads the test's output.
///
/// The text of the causes is part of it. `Debug` prints the same as `Display`: a test that returns `Err` or unwraps one
/// shows it through `Debug`, and nobody should have to decode a struct there.
pub struct Error {
    text: String,
    missing: bool,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl Error {
    pub(crate) fn new(text: impl Into<String>) -> Self {
        Self { text: text.into(), missing: false, source: None }
    }

    /// A program that has to be installed first.
    pub(crate) fn missing(text: impl Into<String>) -> Self {
        Self { text: text.into(), missing: true, source: None }
    }

    /// For `map_err`: says what we were doing when the cause came.
    pub(crate) fn because<E>(text: impl Into<String>) -> impl FnOnce(E) -> Self
    where
        E: StdError + Send + Sync + 'static,
    {
        let text = text.into();
        move |cause| Self {
            text: format!("{text}: {}", said(&cause)),
            missing: false,
            source: Some(Box::new(cause)),
        }
    }

    /// Whether a program isn't installed or the machine lacks what is needed, rather than something having failed.
    #[must_use]
    pub fn is_missing(&self) -> bool {
        self.missing
    }
}

/// An error with its causes on one line: the outermost text alone is often as poor as "db error".
fn said(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let inner_text = inner.to_string();
        if !text.contains(&inner_text) {
            text.push_str(": ");
            text.push_str(&inner_text);
        }
        cause = inner.source();
    }
    text
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_deref().map(|cause| cause as _)
    }
}
