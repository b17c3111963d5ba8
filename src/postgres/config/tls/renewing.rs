//! Follows the files: certificates are renewed while a service runs.

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::Mutex;
use postgres::tls::{MakeTlsConnect, TlsConnect};

use super::files::{Material, Problem};
use crate::error::Result;
use crate::pg::config::invalid;
use crate::pg::config::tls_settings::TlsSettings;
use crate::pg::stream::{Socket, Tls};

type Made<C> = std::result::Result<C, Problem>;

/// A connector by the settings, which `make` makes. It is made anew for a session when one of its files has changed.
pub(super) fn connector<C>(settings: &TlsSettings, make: fn(&Material) -> Made<C>) -> Result<Tls>
where
    C: MakeTlsConnect<Socket> + Clone + Send + 'static,
    C::TlsConnect: Send,
    C::Stream: Send,
    <C::TlsConnect as TlsConnect<Socket>>::Future: Send,
{
    let stamps = stamps(settings);
    let connector = Material::read(settings)
        .and_then(|material| make(&material))
        .map_err(|(setting, problem)| invalid(format!("{setting} cannot be used: {problem}")))?;
    let settings = Arc::new(settings.clone());
    Ok(Tls::new(Renewing { settings, make, made: Arc::new(Mutex::new((stamps, connector))) }))
}

#[derive(Clone)]
struct Renewing<C> {
    settings: Arc<TlsSettings>,
    make: fn(&Material) -> Made<C>,
    made: Arc<Mutex<(Vec<Stamp>, C)>>,
}

/// What changes of a file with its content; `None` of one that is not there.
type Stamp = Option<(u64, u64, i64, i64, u64)>;

impl<C: Clone> Renewing<C> {
    fn current(&self) -> C {
        let (known, connector) = self.made.lock().clone();
        let stamps = stamps(&self.settings);
        if stamps == known {
            return connector;
        }
        match Material::read(&self.settings).and_then(|material| (self.make)(&material)) {
            Ok(connector) => {
                *self.made.lock() = (stamps, connector.clone());
                connector
            }
            // Perhaps they are being written; the next session looks again.
            Err((setting, problem)) => {
                log::warn!(
                    "{setting} has changed and cannot be used; the connection is made with what was there before: {problem}"
                );
                connector
            }
        }
    }
}

fn stamps(settings: &TlsSettings) -> Vec<Stamp> {
    let files: [&Option<PathBuf>; 3] = [&settings.sslrootcert, &settings.sslcert, &settings.sslkey];
    let stamp = |path: &PathBuf| {
        let file = path.metadata().ok()?;
        Some((file.dev(), file.ino(), file.mtime(), file.mtime_nsec(), file.len()))
    };
    files.into_iter().flatten().map(stamp).collect()
}

impl<C> MakeTlsConnect<Socket> for Renewing<C>
where
    C: MakeTlsConnect<Socket> + Clone,
{
    type Stream = C::Stream;
    type TlsConnect = C::TlsConnect;
    type Error = C::Error;

    fn make_tls_connect(&mut self, domain: &str) -> std::result::Result<C::TlsConnect, C::Error> {
        self.current().make_tls_connect(domain)
    }
}
