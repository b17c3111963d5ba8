//! Leader election on top of a lock: one process of a service leads.

use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crossbeam_channel::select;
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
}

impl Campaign {
    /// Stands for election as the leader of `service`, until the campaign is ended or the lock released.
    pub(crate) fn start(manager: &dyn SyncManager, service: &str, build: Option<&str>) -> Result<Self> {
        let annotation = json!({
            "service": service,
            "host": whoami::hostname().unwrap_or_else(|_| "unknown".to_owned()),
            "pid": std::process::id(),
            "build": build,
        });
        let options = LockOptions::new().valuer(json_valuer(&annotation)?);
        let lock = manager.lock(format!("service/{service}/leadership"), options)?;
        stand(&*lock)?;
        let (context, canceller) = Context::background().with_cancel();
        let (candidate, service) = (Arc::clone(&lock), service.to_owned());
        let thread = thread::Builder::new()
            .name("dsync-leadership".to_owned())
            .spawn(move || observe(&*candidate, &service, &context))
            .map_err(|error| {
                let message =
                    "the thread of the leadership could not be started; is the limit of threads reached?";
                Error::new(ErrorKind::FailedInitialization, message).with_source(error)
            })?;
        Ok(Self { lock, canceller, thread: Some(thread) })
    }

    pub(crate) fn lock(&self) -> &Arc<dyn Lock> {
        &self.lock
    }
}

impl Drop for Campaign {
    /// Ends the thread. The claim is the manager's, which ends it when it stops.
    fn drop(&mut self) {
        self.canceller.cancel();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the thread of the leadership panicked");
        }
    }
}

/// Begins the claim, and does not wait for what becomes of it. Here and not in the thread that observes it: a release that
/// came before that thread had its turn would be undone by it.
fn stand(lock: &dyn Lock) -> Result<()> {
    match lock.try_lock(&Context::timeout(Duration::ZERO)) {
        Err(error) if !matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::LockUnavailable) => Err(error),
        _ => Ok(()),
    }
}

/// Logs each gain and each loss of the leadership, until the lock is released.
fn observe(lock: &dyn Lock, service: &str, context: &Context) {
    let cancelled = context.cancelled();
    loop {
        match lock.wait(context) {
            Ok(()) => log::info!("this process leads service {service:?}"),
            Err(error) => {
                match error.kind() {
                    ErrorKind::Cancelled | ErrorKind::SyncManagerStopped => {}
                    ErrorKind::Released => {
                        log::info!("this process does not stand for the leadership of {service:?} any more");
                    }
                    _ => log::error!("the leadership of {service:?}: {}", chain(&error)),
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
