//! The connection that the command line and the environment describe.

use dsync::{CatalogMode, Config, PostgresManager};

use crate::args::Connection;
use crate::exit::Failure;

/// What the sessions of this process are called in front of the key, by which an operator finds it and we our own.
pub(crate) fn own_name() -> String {
    name_of(std::process::id())
}

/// The same for another process of this machine.
pub(crate) fn name_of(process: u32) -> String {
    /// The server keeps 63 bytes, and some of the key should be among them.
    const LONGEST_HOST: usize = 24;
    let system = rustix::system::uname();
    let host: String = system.nodename().to_string_lossy().chars().take(LONGEST_HOST).collect();
    format!("pgdsync {host}:{process}")
}

/// The settings for whoever takes locks.
pub(crate) fn config(connection: &Connection) -> Result<Config, Failure> {
    config_as(&own_name(), connection)
}

/// The same, by that name.
pub(crate) fn config_as(name: &str, connection: &Connection) -> Result<Config, Failure> {
    let mut config = Config::for_program(name, connection.url.as_deref())?;
    if let Some(namespace) = &connection.namespace {
        config = config.namespace(namespace);
    }
    if let Some(schema) = &connection.schema {
        config = config.schema(schema);
    }
    Ok(config)
}

/// A manager for whoever looks: it makes no catalog, and is not started, so it agrees on nothing with those who take locks.
pub(crate) fn manager(connection: &Connection) -> Result<PostgresManager, Failure> {
    Ok(PostgresManager::new(config_without_making(connection)?)?)
}

/// Settings by which no catalog is made, unless the environment says so.
pub(crate) fn config_without_making(connection: &Connection) -> Result<Config, Failure> {
    let config = config(connection)?;
    Ok(if variable("DSYNC_CATALOG").is_none() { config.catalog(CatalogMode::MustExist) } else { config })
}

/// Whether the environment says that there is to be no catalog.
pub(crate) fn is_without_catalog() -> bool {
    variable("DSYNC_CATALOG").is_some_and(|mode| mode == "none")
}

/// The namespace of keys that are names.
pub(crate) fn namespace(connection: &Connection) -> String {
    connection.namespace.clone().or_else(|| variable("DSYNC_NAMESPACE")).unwrap_or_else(|| "dsync".to_owned())
}

/// The schema of the catalog.
pub(crate) fn schema(connection: &Connection) -> String {
    connection.schema.clone().or_else(|| variable("DSYNC_SCHEMA")).unwrap_or_else(|| "dsync".to_owned())
}

/// What a variable of the environment says; an empty one says nothing.
pub(crate) fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}
