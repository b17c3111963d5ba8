//! The in-process implementation, for an application's own tests.

mod lock;
mod manager;
mod server;
mod state;
#[cfg(test)]
mod tests;

pub use manager::MemoryManager;
pub use server::MemoryServer;
