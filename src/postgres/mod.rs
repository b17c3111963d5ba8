//! Locks on PostgreSQL. `ARCHITECTURE.md` draws how the parts work together.

mod alarm;
mod catalog;
mod claim;
mod config;
pub(crate) mod fence;
mod inspect;
mod link;
mod lock;
mod manager;
#[cfg(test)]
mod model;
mod pool;
mod quiet;
mod refusal;
mod resting;
pub(crate) mod schema;
mod session;
mod sql;
mod state;
mod stream;
mod supervisor;
mod watchdog;
mod wire;
mod work;

pub use catalog::{CATALOG_SQL, CatalogMode, catalog_sql};
pub use config::Config;
pub use manager::PostgresManager;
pub use stream::Socket;
