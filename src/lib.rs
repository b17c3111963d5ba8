#![doc = include_str!("../README.md")]

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
mod postgres;
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
pub use crate::postgres::{CATALOG_SQL, CatalogMode, Config, PostgresManager, Socket, catalog_sql};
pub use crate::term::Term;
pub use crate::view::{Holder, LockView, Waiter};
