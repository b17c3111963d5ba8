//! Locks on PostgreSQL. `ARCHITECTURE.md` draws how the rooms fit together.

mod borrowed;
mod catalog;
mod claim;
mod config;
mod handle;
mod inspect;
mod manager;
mod pool;
mod registry;
mod session;
mod sql;
mod stream;
mod watchdog;

pub use borrowed::{SessionGuard, SessionLock, TransactionLock};
pub use catalog::{CATALOG_SQL, catalog_sql};
pub use config::{CatalogMode, Config};
pub use manager::PostgresManager;
pub use stream::Socket;
