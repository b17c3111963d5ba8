// Where the README's links lead on docs.rs, which has none of the files beside it. The first definition of a link counts.
//! [apache]: https://docs.rs/crate/dsync-postgres/latest/source/LICENSE-APACHE
//! [architecture]: https://docs.rs/crate/dsync-postgres/latest/source/ARCHITECTURE.md
//! [benchmarks]: https://docs.rs/crate/dsync-postgres/latest/source/BENCHMARKS.md
//! [choosing]: crate::guide::choosing
//! [cli]: https://docs.rs/crate/pgdsync/latest/source/README.md
//! [comparison]: crate::guide::comparison
//! [contributing]: https://docs.rs/crate/dsync-postgres/latest/source/CONTRIBUTING.md
//! [failover]: crate::guide::failover
//! [fencing]: crate::guide::locks#fencing
//! [guide]: crate::guide
//! [incidents]: crate::guide::incidents
//! [kinds]: crate::guide::kinds
//! [limits]: crate::guide::limits
//! [locks]: crate::guide::locks
//! [log lines]: crate::guide::log_lines
//! [mit]: https://docs.rs/crate/dsync-postgres/latest/source/LICENSE-MIT
//! [old primary]: crate::guide::failover#when-the-old-primary-lives-on
//! [operations]: crate::guide::operations
//! [plot]: <data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' width='420' height='20'%3E%3Ctext y='14' font-size='13' fill='%237d8590'%3EThe plot is on the page guide::comparison.%3C/text%3E%3C/svg%3E>
//! [recipes]: crate::guide::recipes
//! [results]: crate::guide::comparison#how-fast
//! [setup]: crate::guide::setup
#![cfg_attr(docsrs, feature(doc_cfg))]
#![doc = ""]
#![doc = include_str!("../README.md")]

mod cancellation;
mod check;
mod clock;
mod context;
mod error;
mod expiry;
mod guard;
// It has nothing but documentation.
#[cfg(any(doc, doctest))]
pub mod guide;
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
mod mode;
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

pub use crate::check::{CheckLine, CheckReport, Verdict};
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
pub use crate::pg::{
    CATALOG_SQL, CatalogMode, Config, PostgresManager, Quorum, Socket, TakeoverPolicy, TlsSettings,
    catalog_sql,
};
pub use crate::pg::{SessionGuard, SessionLock, TransactionLock};
pub use crate::snapshot::{ClaimSnapshot, ClaimState, Snapshot};
pub use crate::term::Term;
pub use crate::view::{Holder, LockView, Waiter};

/// The channels of which [`Lost`] is one: for `select!` and timers, in the version that fits.
pub use ::crossbeam_channel;
/// The driver whose `Config`, `Transaction` and TLS connectors [`Config`] and [`Term`] take, in the version that fits.
pub use ::postgres;
