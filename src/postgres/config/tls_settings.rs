//! What the settings of a connection ask of whoever makes the TLS connector.

use std::path::{Path, PathBuf};

/// What the settings of a connection ask of a TLS connector, for [`Config::tls_with`](crate::Config::tls_with). The features `tls-…` of the
/// library do it by themselves.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct TlsSettings {
    /// Whether the server's certificate must be signed by an issuer that is trusted: with `sslmode=verify-ca` and `verify-full`, and whatever
    /// the mode is where `sslrootcert` says who is trusted.
    pub verify_issuer: bool,
    /// Whether the server's certificate must bear the host name of the connection.
    pub verify_name: bool,
    /// The file with the issuers that are trusted, in PEM, or the word `system` for those of the operating system. `None` if no setting
    /// says it.
    pub sslrootcert: Option<PathBuf>,
    /// The file with the client's certificate, and behind it those that lead to its issuer, in PEM. For servers that ask for one.
    pub sslcert: Option<PathBuf>,
    /// The file with the key of `sslcert`, in PEM.
    pub sslkey: Option<PathBuf>,
}

impl TlsSettings {
    /// Takes up an `sslmode`; true if it asks for a verification.
    pub(super) fn set_mode(&mut self, mode: &str) -> bool {
        self.verify_name = mode == "verify-full";
        self.verify_issuer = self.verify_name || mode == "verify-ca";
        self.verify_issuer
    }

    /// Takes up an `sslrootcert`; see libpq's `sslmode=require`.
    pub(super) fn trust(&mut self, issuers: PathBuf) {
        self.verify_issuer = true;
        self.sslrootcert = Some(issuers);
    }

    /// Whether those are trusted that the operating system trusts.
    pub(super) fn trusts_system(&self) -> bool {
        self.sslrootcert.as_deref() == Some(Path::new("system"))
    }
}
