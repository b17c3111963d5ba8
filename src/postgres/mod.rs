//! Locks on PostgreSQL. `ARCHITECTURE.md` draws how the rooms fit together.

mod active_claim;
mod borrowed;
mod carrier;
mod catalog;
mod check;
mod claim;
mod config;
mod confirm;
mod handle;
mod inspect;
mod manager;
mod pool;
mod problem;
mod quorum;
mod registry;
mod runs;
mod session;
mod sql;
mod stop_probe;
mod stream;
mod takeover;
mod watchdog;

pub use borrowed::{SessionGuard, SessionLock, TransactionLock};
pub use catalog::{CATALOG_SQL, catalog_sql};
pub use config::{CatalogMode, Config, TlsSettings};
pub use manager::PostgresManager;
pub use quorum::Quorum;
pub use stream::Socket;
pub use takeover::TakeoverPolicy;
