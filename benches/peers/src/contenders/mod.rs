//! Who takes part, and what all of them can be asked to do.

mod by_hand;
mod distributed_lock;
mod ours;
mod redis_lock;
mod sqlx_lock;
mod tokio_by_hand;

use std::fmt;
use std::future::Future;
use std::time::{Duration, Instant};

use dsync::CatalogMode;
use tokio::runtime::{Builder, Runtime};

use crate::machine::version;
use crate::redis::Redis;

pub(crate) use redis_lock::{TTL, losses_by_renewal};

/// The lock that all use who choose a number themselves. They don't meet: only one contender is at work at a time.
const KEY: i64 = 4711;

/// One who locks: with a connection of its own, as if it were alone in its process.
pub(crate) trait Party: Send {
    /// Locks, however long that takes, and says when the call returned.
    fn lock(&mut self) -> Instant;

    /// Releases, and says when that was called.
    fn release(&mut self) -> Instant;

    /// Locks and releases, and says how long both took together.
    fn pair(&mut self) -> Duration {
        let begun = Instant::now();
        self.lock();
        self.release();
        begun.elapsed()
    }

    /// Listens to whatever there is that tells of a loss, and says when it told. None: it has told nothing in time.
    fn hear_of_loss(&mut self, patience: Duration) -> Option<Instant>;
}

/// A [`Party`] of an asynchronous library.
trait AsyncParty: Send {
    async fn lock(&mut self);
    async fn release(&mut self);
    async fn hear_of_loss(&mut self, patience: Duration) -> Option<Instant>;

    /// Lets the library end what it does in the background after a release. Nobody's time is taken here.
    async fn settle(&mut self) {}
}

/// An asynchronous party with a runtime of its own, on the thread that calls. The clock is read inside of the task, so
/// that getting into the runtime and out of it costs the party nothing.
struct OnRuntime<P> {
    runtime: Runtime,
    // There until the end.
    party: Option<P>,
}

impl<P: AsyncParty> OnRuntime<P> {
    fn new(make: impl Future<Output = P>) -> Self {
        // Of tokio's runtimes the one with the shortest way: no other thread has to be woken for an answer.
        let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
        Self { party: Some(runtime.block_on(make)), runtime }
    }

    fn parts(&mut self) -> (&Runtime, &mut P) {
        (&self.runtime, self.party.as_mut().expect("a party"))
    }
}

impl<P> Drop for OnRuntime<P> {
    fn drop(&mut self) {
        // Some connections start a task when they are dropped.
        let _inside = self.runtime.enter();
        drop(self.party.take());
    }
}

impl<P: AsyncParty> Party for OnRuntime<P> {
    fn lock(&mut self) -> Instant {
        let (runtime, party) = self.parts();
        runtime.block_on(async {
            party.lock().await;
            Instant::now()
        })
    }

    fn release(&mut self) -> Instant {
        let (runtime, party) = self.parts();
        runtime.block_on(async {
            let called = Instant::now();
            party.release().await;
            party.settle().await;
            called
        })
    }

    fn pair(&mut self) -> Duration {
        let (runtime, party) = self.parts();
        runtime.block_on(async {
            let begun = Instant::now();
            party.lock().await;
            party.release().await;
            let time = begun.elapsed();
            party.settle().await;
            time
        })
    }

    fn hear_of_loss(&mut self, patience: Duration) -> Option<Instant> {
        let (runtime, party) = self.parts();
        runtime.block_on(party.hear_of_loss(patience))
    }
}

/// How a contender is told that its session has ended.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Signal {
    /// By this, which is measured.
    By(&'static str),
    /// Not at all, and why.
    None(&'static str),
    /// It has no session that could end, and renews a lease instead.
    Renewal(&'static str),
}

/// Where its locks are kept, and so where one sees that somebody waits for one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Keeper {
    PostgreSql,
    Redis,
}

/// One way to a distributed lock.
pub(crate) struct Contender {
    pub(crate) name: String,
    /// How it is used here.
    pub(crate) how: &'static str,
    pub(crate) ours: bool,
    pub(crate) keeper: Keeper,
    pub(crate) signal: Signal,
    join: Box<dyn Fn() -> Box<dyn Party>>,
}

impl Contender {
    /// Connects one more party.
    pub(crate) fn party(&self) -> Box<dyn Party> {
        (self.join)()
    }
}

impl fmt::Debug for Contender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Contender").field("name", &self.name).finish_non_exhaustive()
    }
}

/// All of them. The first is the floor that the others are compared with.
pub(crate) fn all(url: &str, redis: Option<&Redis>) -> Vec<Contender> {
    let mut contenders = vec![
        Contender {
            name: format!("postgres {}, by hand", version("postgres")),
            how: "prepared statements on one warm connection; `Notifications::timeout_iter` as the watch",
            ours: false,
            keeper: Keeper::PostgreSql,
            signal: Signal::By("a thread that reads the connection, which nobody else can use meanwhile"),
            join: on(url, |url| Box::new(by_hand::ByHand::new(url))),
        },
        Contender {
            name: format!("tokio-postgres {}, by hand", version("tokio-postgres")),
            how: "prepared statements on one warm connection; the end of its `Connection` as the watch",
            ours: false,
            keeper: Keeper::PostgreSql,
            signal: Signal::By("the end of the task that drives the connection"),
            join: on(url, |url| Box::new(OnRuntime::new(tokio_by_hand::TokioByHand::new(url)))),
        },
        Contender {
            name: format!("dsync {}, no catalog", version("dsync-postgres")),
            how: "`CatalogMode::None`, all else as it is by default",
            ours: true,
            keeper: Keeper::PostgreSql,
            signal: Signal::By("the closed channel `Lock::lost`"),
            join: on(url, |url| Box::new(ours::Ours::new(url, CatalogMode::None))),
        },
        Contender {
            name: format!("dsync {}, token and row", version("dsync-postgres")),
            how: "as it is by default: each term gets a fencing token and writes its row",
            ours: true,
            keeper: Keeper::PostgreSql,
            signal: Signal::By("the closed channel `Lock::lost`"),
            join: on(url, |url| Box::new(ours::Ours::new(url, CatalogMode::Automatic))),
        },
        Contender {
            name: format!("sqlx {}, PgAdvisoryLock", version("sqlx")),
            how: "on one warm connection, without a pool; `release_now`",
            ours: false,
            keeper: Keeper::PostgreSql,
            signal: Signal::None("its guard has nothing that tells; the next query fails"),
            join: on(url, |url| Box::new(OnRuntime::new(sqlx_lock::Sqlx::new(url)))),
        },
        Contender {
            name: format!("distributed-lock-postgres {}", version("distributed-lock-postgres")),
            how: "session locks, on a pool of sqlx with a single, warm connection and else its defaults, among them a \
                  test of the connection before each use",
            ours: false,
            keeper: Keeper::PostgreSql,
            signal: Signal::By("`LockHandle::lost_token`"),
            join: on(url, |url| {
                Box::new(OnRuntime::new(distributed_lock::DistributedLockPostgres::new(url)))
            }),
        },
    ];
    if let Some(redis) = redis {
        contenders.push(Contender {
            name: format!("rslock {}, Redis", version("rslock")),
            how: "`acquire` with its default pauses between tries, one Redis that keeps nothing on disk",
            ours: false,
            keeper: Keeper::Redis,
            signal: Signal::Renewal("`LockManager::using`, when it next renews the lease"),
            join: on(redis.url(), |url| Box::new(OnRuntime::new(redis_lock::Rslock::new(url)))),
        });
    }
    contenders
}

fn on(url: &str, join: impl Fn(&str) -> Box<dyn Party> + 'static) -> Box<dyn Fn() -> Box<dyn Party>> {
    let url = url.to_owned();
    Box::new(move || join(&url))
}
