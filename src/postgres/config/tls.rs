//! TLS as the settings of a connection ask, by the features `tls-…`: which of them does it, and what they have in common.
//!
//! What is trusted and shown is libpq's rule: <https://www.postgresql.org/docs/current/libpq-ssl.html>. One thing differs:
//! `verify-full` without `sslrootcert` trusts the issuers of the operating system, as with `sslrootcert=system`.

#[cfg(feature = "_tls")]
mod files;
#[cfg(feature = "tls-native-tls")]
mod native_tls;
#[cfg(feature = "_tls")]
mod renewing;
#[cfg(feature = "_tls-rustls")]
mod rustls;

use super::tls_settings::TlsSettings;
use crate::error::Result;
use crate::pg::stream::Tls;

/// Makes a connector for the settings.
pub(super) type Stack = fn(&TlsSettings) -> Result<Tls>;

/// The stacks that this build has; the first one is used. Who asks for the system's own TLS, or for aws-lc-rs, has a reason, such as rules on
/// cryptography; ring is for those who only want TLS.
pub(super) const STACKS: &[Stack] = &[
    #[cfg(feature = "tls-native-tls")]
    |settings| renewing::connector(settings, native_tls::connector),
    #[cfg(feature = "tls-rustls-aws-lc-rs")]
    |settings| renewing::connector(settings, rustls::with_aws_lc_rs),
    #[cfg(feature = "tls-rustls-ring")]
    |settings| renewing::connector(settings, rustls::with_ring),
];

/// What is said where there is no stack and no connector.
pub(super) const NO_TLS: &str = "this build of the library has no TLS; switch on one of the features tls-rustls-ring, tls-rustls-aws-lc-rs \
                                 and tls-native-tls of the package dsync-postgres, or give a TLS connector with Config::tls or \
                                 Config::tls_with";
