//! Leader election on top of a lock: one process of a service leads.

use std::convert::Infallible;
use std::ffi::CStr;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded, select};
use serde_json::json;

use crate::context::{Canceller, Context};
use crate::error::{Error, ErrorKind, Result, chain};
use crate::lock::{Lock, LockOptions, json_valuer};
use crate::manager::SyncManager;

/// The candidacy of this process: a claim on the leadership lock, and a thread that logs what becomes of it.
#[derive(Debug)]
pub(crate) struct Campaign {
    lock: Arc<dyn Lock>,
    canceller: Canceller,
    thread: Option<JoinHandle<()>>,
    /// Disconnects when the thread has nothing left to do.
    ended: Receiver<Infallible>,
}

/// How long to wait for the thread, which may be in the application's logger.
const GOODBYE: Duration = Duration::from_secs(1);

impl Campaign {
    /// Stands for election as the leader of `service`, until the lock is released; its thread goes on, and logs what becomes
    /// of later claims, until the campaign is dropped.
    pub(crate) fn start(manager: &dyn SyncManager, service: &str, build: Option<&str>) -> Result<Self> {
        let (begun, claims) = bounded(1);
        let annotation = json!({
            "service": service,
            "host": host_name(rustix::system::uname().nodename()),
            "pid": std::process::id(),
            "build": build,
        });
        let options = LockOptions::new().valuer(json_valuer(&annotation)?).tell_of_claims(begun);
        let lock = manager.lock_with(format!("service/{service}/leadership"), options)?;
        stand(&*lock)?;
        let (context, canceller) = Context::background().with_cancel();
        let (candidate, service) = (Arc::clone(&lock), service.to_owned());
        let (alive, ended) = bounded(0);
        let thread = thread::Builder::new()
            .name("dsync-leadership".to_owned())
            .spawn(move || {
                let _alive: Sender<Infallible> = alive;
                observe(&*candidate, &claims, &service, &context);
            })
            .map_err(|error| {
                let message =
                    "the thread of the leadership could not be started; is the limit of threads reached?";
                Error::new(ErrorKind::FailedInitialization, message).with_source(error)
            })?;
        Ok(Self { lock, canceller, thread: Some(thread), ended })
    }

    pub(crate) fn lock(&self) -> &Arc<dyn Lock> {
        &self.lock
    }
}

impl Drop for Campaign {
    /// Ends the thread, and waits a second for that at the most. The claim is the manager's, which ends it when it stops.
    fn drop(&mut self) {
        self.canceller.cancel();
        let Some(thread) = self.thread.take() else { return };
        // The logger, which is the application's, may be what drops this.
        if thread.thread().id() == thread::current().id() {
            return;
        }
        match self.ended.recv_timeout(GOODBYE) {
            Err(RecvTimeoutError::Timeout) => {
                log::warn!(
                    "the thread of the leadership has not ended within {GOODBYE:?}; it is left to itself"
                );
            }
            _ if thread.join().is_err() => log::error!("the thread of the leadership panicked"),
            _ => {}
        }
    }
}

/// The name of a host as an annotation gives it, which is text.
fn host_name(name: &CStr) -> &str {
    name.to_str().unwrap_or("unknown")
}

/// Begins the claim, and does not wait for what becomes of it. Here and not in the thread that observes it: a release that
/// came before that thread had its turn would be undone by it.
fn stand(lock: &dyn Lock) -> Result<()> {
    // A claim begins whatever the context says.
    match lock.lock(&Context::timeout(Duration::ZERO)) {
        Err(error) if error.kind() != ErrorKind::TimedOut => Err(error),
        _ => Ok(()),
    }
}

/// Logs each gain and each loss of the leadership, and each time that this process ceases to stand for it. `claims` tells
/// when it stands again.
fn observe(lock: &dyn Lock, claims: &Receiver<()>, service: &str, context: &Context) {
    let cancelled = context.cancelled();
    let mut stands = true;
    loop {
        match lock.wait(context) {
            Ok(()) => {
                stands = true;
                log::info!("this process leads service {service:?}");
            }
            Err(error) if error.kind() == ErrorKind::Released => {
                if std::mem::replace(&mut stands, false) {
                    log::info!("this process does not stand for the leadership of {service:?} any more");
                }
                select! {
                    recv(claims) -> claim => match claim {
                        Ok(()) => continue,
                        // A manager that keeps no options never tells.
                        Err(_) => return,
                    },
                    recv(cancelled) -> _ => return,
                }
            }
            Err(error) => {
                if !matches!(error.kind(), ErrorKind::Cancelled | ErrorKind::SyncManagerStopped) {
                    log::error!("the leadership of {service:?}: {}", chain(&error));
                }
                return;
            }
        }
        let lost = lock.lost();
        select! {
            recv(lost) -> _ => log::info!("this process leads service {service:?} no longer"),
            recv(cancelled) -> _ => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_named_as_the_system_names_it_unless_that_is_no_text() {
        assert_eq!(host_name(c"db-7"), "db-7");
        assert_eq!(host_name(c"bücher"), "bücher");
        assert_eq!(host_name(c""), "");
        assert_eq!(host_name(c"db-\xff"), "unknown");
    }
}
