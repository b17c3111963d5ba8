//! rslock, on Redis.

use std::future::pending;
use std::thread;
use std::time::{Duration, Instant};

use rslock::{LockGuard, LockManager};
use tokio::runtime::Builder;

use super::AsyncParty;
use crate::redis::Redis;

/// How long a lock lives that is not renewed: the longest that the crate's own examples use.
pub(crate) const TTL: Duration = Duration::from_secs(10);

/// How often `using` renews: half a second before the end, and a hundredth of the whole is taken off for slow clocks.
const BETWEEN_RENEWALS: Duration = Duration::from_millis(9_400);

pub(super) struct Rslock {
    manager: LockManager,
    held: Option<LockGuard>,
}

impl Rslock {
    pub(super) async fn new(url: &str) -> Self {
        Self { manager: LockManager::new(vec![url]), held: None }
    }
}

impl AsyncParty for Rslock {
    async fn lock(&mut self) {
        self.held = Some(self.manager.acquire("peers", TTL).await.expect("the lock"));
    }

    async fn release(&mut self) {
        self.held.take().expect("it is held").release().await;
    }

    async fn hear_of_loss(&mut self, _patience: Duration) -> Option<Instant> {
        None
    }
}

/// From the deletion of a lock's key to the return of `using`, which renews it. Nothing but the moment of the deletion
/// decides, so the deletions are spread evenly over the time between two renewals; all at once, since they only wait.
pub(crate) fn losses_by_renewal(redis: &Redis, count: u32) -> Vec<Duration> {
    let mut operator = redis.connection();
    let keys: Vec<String> = (0..count).map(|number| format!("lost-{number}")).collect();
    thread::scope(|scope| {
        let holders: Vec<_> = keys
            .iter()
            .map(|key| {
                scope.spawn(move || {
                    let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
                    runtime.block_on(async {
                        let manager = LockManager::new(vec![redis.url()]);
                        let outcome =
                            manager.using(key.as_bytes(), TTL, async || pending::<()>().await).await;
                        assert!(outcome.is_err(), "the work itself never ends");
                        Instant::now()
                    })
                })
            })
            .collect();
        while redis::cmd("EXISTS").arg(&keys).query::<u32>(&mut operator).expect("an answer") < count {
            thread::sleep(Duration::from_millis(1));
        }
        let begun = Instant::now();
        let deletions = keys.iter().zip(0..).map(|(key, number)| {
            let moment = begun + BETWEEN_RENEWALS * (2 * number + 1) / (2 * count);
            thread::sleep(moment.saturating_duration_since(Instant::now()));
            let deleted = Instant::now();
            let gone: u32 = redis::cmd("DEL").arg(key).query(&mut operator).expect("an answer");
            assert_eq!(gone, 1, "it was held");
            deleted
        });
        let deletions: Vec<Instant> = deletions.collect();
        holders
            .into_iter()
            .zip(deletions)
            .map(|(holder, deleted)| holder.join().expect("a holder") - deleted)
            .collect()
    })
}
