//! What ends a verb that does not end by itself.

use nix::sys::signal::{SigSet, Signal};

use crate::exit::Failure;

/// Ends the process with 0 when INT or TERM comes: that is how whoever watches ends. To be called before there are other threads.
pub(crate) fn end_well() -> Result<(), Failure> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGTERM);
    let wait = move || {
        while signals.wait().is_err() {}
        std::process::exit(0);
    };
    let failed =
        |what: &str| Failure::new(crate::exit::UNAVAILABLE, format!("cannot wait for signals: {what}"));
    // A process that is the first of a container is not ended by a signal for which it does not wait.
    signals.thread_block().map_err(|error| failed(error.desc()))?;
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(wait)
        .map_err(|error| failed(&error.to_string()))?;
    Ok(())
}
