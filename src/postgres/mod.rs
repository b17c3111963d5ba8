//! Locks on PostgreSQL. `ARCHITECTURE.md` draws how the rooms fit together.

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

pub use catalog::{CATALOG_SQL, catalog_sql};
pub use config::{CatalogMode, Config};
pub use manager::PostgresManager;
pub use stream::Socket;
