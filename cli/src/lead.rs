//! `lead`: the command runs wherever the leadership is, again and again.

use std::panic::resume_unwind;
use std::sync::Arc;
use std::time::Duration;

use dsync::{Leader, LeaderEvent, LeaderOptions};

use crate::run::keeper::{Done, Keeper};
use crate::run::options::LeadArguments;

/// How long to wait for the command to end: it is killed before.
const FOR_EVER: Duration = Duration::MAX;

/// Leads, on the keeper's side, until the front is gone or wants no further term.
pub(crate) fn lead(keeper: &Arc<Keeper>, arguments: &LeadArguments) -> Done {
    let lock = keeper.lock(&arguments.key)?;
    // A server that is out of reach is told at once. Later the leader waits for it.
    lock.holder()?;
    let (told, tells) = (Arc::clone(keeper), keeper.is_verbose);
    let options = LeaderOptions::new().on_event(move |event| match event {
        LeaderEvent::Error(_) => told.say(&event.to_string()),
        LeaderEvent::AnotherLeads(_) | LeaderEvent::SteppedDown if tells => told.say(&event.to_string()),
        _ => {}
    });
    let (attending, key) = (Arc::clone(keeper), arguments.key.text.clone());
    let leader = Leader::start_with(lock, options, move |tenure| {
        let terms = [(key.as_str(), tenure.term().clone())];
        let attended = attending.attend(&terms, tenure.term().lost(), tenure.stopping());
        if !attended.succeeded && !tenure.must_stop() {
            // So that the leader lets others lead, and pauses for longer each time.
            resume_unwind(Box::new("the command has failed"));
        }
    })?;
    keeper.wait_for_front();
    leader.stop(FOR_EVER)?;
    Ok((None, String::new()))
}
