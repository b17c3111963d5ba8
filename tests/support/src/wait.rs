//! Waiting for things that offer no event.

use std::thread;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};

/// Short enough not to slow a test, long enough not to take a core from what is waited for.
pub(crate) const PAUSE: Duration = Duration::from_millis(3);

/// Asks again and again until `condition` gives a value; `what` names it in the error.
///
/// # Errors
/// When `timeout` passes first. The condition is asked at least once, and once more after the time is up.
///
/// ```
/// use std::time::Duration;
/// let mut asked = 0;
/// let third = support::wait_for("the third answer", Duration::from_secs(5), || {
///     asked += 1;
///     (asked == 3).then_some(asked)
/// })?;
/// assert_eq!(third, 3);
/// # Ok::<(), support::Error>(())
/// ```
pub fn wait_for<T>(what: &str, timeout: Duration, mut condition: impl FnMut() -> Option<T>) -> Result<T> {
    let started = Instant::now();
    loop {
        let out_of_time = started.elapsed() >= timeout;
        if let Some(value) = condition() {
            return Ok(value);
        }
        if out_of_time {
            return Err(Error::new(format!("waited {timeout:?} in vain for {what}")));
        }
        thread::sleep(PAUSE);
    }
}
