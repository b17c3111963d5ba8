#![doc = include_str!("../README.md")]

mod cancellation;
mod context;
mod error;
mod expiry;
mod guard;
mod instance;
mod key;
mod leader;
mod leadership;
mod local_queue;
mod lock;
mod loss;
mod manager;
mod memory;
#[cfg(feature = "metrics")]
mod metrics_observer;
mod multi_lock;
pub mod observer;
mod once;
// The folder is called after the server; in the interface, the driver has that name.
#[path = "postgres/mod.rs"]
mod pg;
mod process;
mod snapshot;
mod sync;
mod telling;
mod term;
mod view;

pub use crate::context::{Canceller, Context};
pub use crate::error::{Error, ErrorKind, Result};
pub use crate::guard::LockGuard;
pub use crate::instance::{init, init_with, instance, leadership_lock, lock_with_key, shutdown};
pub use crate::key::Key;
pub use crate::leader::{Leader, LeaderEvent, LeaderOptions, LeaderStatus, Tenure};
pub use crate::lock::{Lock, LockOptions, LockValuer, MAX_ANNOTATION, json_valuer};
pub use crate::loss::{Loss, LossReason, Lost};
pub use crate::manager::{SyncManager, SyncManagerExt};
pub use crate::memory::{MemoryManager, MemoryServer};
#[cfg(feature = "metrics")]
pub use crate::metrics_observer::MetricsObserver;
pub use crate::multi_lock::{MultiGuard, MultiLock};
pub use crate::observer::Observer;
pub use crate::once::{Once, Period, Run};
pub use crate::pg::{CATALOG_SQL, CatalogMode, Config, PostgresManager, Socket, catalog_sql};
pub use crate::pg::{SessionGuard, SessionLock, TransactionLock};
pub use crate::snapshot::{ClaimSnapshot, ClaimState, Snapshot};
pub use crate::term::Term;
pub use crate::view::{Holder, LockView, Waiter};

/// The channels of which [`Lost`] is one: for `select!` and timers, in the version that fits.
pub use ::crossbeam_channel;
/// The driver whose `Config`, `Transaction` and TLS connectors [`Config`] and [`Term`] take, in the version that fits.
pub use ::postgres;
