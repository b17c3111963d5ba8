#![doc = include_str!("../README.md")]

mod cancellation;
mod context;
mod error;
mod expiry;
mod instance;
mod key;
mod leadership;
mod lock;
mod loss;
mod manager;
mod memory;
// The folder is called after the server; in the interface, the driver has that name.
#[path = "postgres/mod.rs"]
mod pg;
mod process;
mod sync;
mod term;
mod view;

pub use crate::context::{Canceller, Context};
pub use crate::error::{Error, ErrorKind, Result};
pub use crate::instance::{init, init_with, leadership_lock, lock_with_key, shutdown};
pub use crate::key::Key;
pub use crate::lock::{Lock, LockGuard, LockOptions, LockValuer, MAX_ANNOTATION, json_valuer};
pub use crate::loss::{Loss, LossReason, Lost};
pub use crate::manager::SyncManager;
pub use crate::memory::{MemoryManager, MemoryServer};
pub use crate::pg::{CATALOG_SQL, CatalogMode, Config, PostgresManager, Socket, catalog_sql};
pub use crate::term::Term;
pub use crate::view::{Holder, LockView, Waiter};

/// The channels of which [`Lost`] is one: for `select!` and timers, in the version that fits.
pub use ::crossbeam_channel;
/// The driver whose `Config`, `Transaction` and TLS connectors [`Config`] and [`Term`] take, in the version that fits.
pub use ::postgres;
