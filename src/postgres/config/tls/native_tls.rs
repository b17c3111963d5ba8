//! By the system's own TLS: OpenSSL on Linux, the Security framework on macOS.

use std::sync::OnceLock;

use native_tls::{Certificate, Identity, Protocol, TlsConnector};
use postgres_native_tls::MakeTlsConnector;

use super::files::{CERTIFICATE, KEY, Material, NO_CERTIFICATE, Problem, ROOT, Trust, WRONG_KEY};

pub(super) fn connector(material: &Material) -> Result<MakeTlsConnector, Problem> {
    /// The one that trusts everybody: OpenSSL reads all the system's authorities for each that is made, which takes it tens of milliseconds.
    static TRUSTING: OnceLock<TlsConnector> = OnceLock::new();
    let is_trusting = material.trust.is_none() && material.own.is_none() && !material.verify_name;
    if is_trusting && let Some(connector) = TRUSTING.get() {
        return Ok(MakeTlsConnector::new(connector.clone()));
    }
    let mut builder = TlsConnector::builder();
    // libpq's default.
    builder.min_protocol_version(Some(Protocol::Tlsv12));
    // What sslnegotiation=direct demands, and libpq offers always.
    builder.request_alpns(&["postgresql"]);
    match &material.trust {
        Some(Trust::System) => {}
        Some(Trust::These(issuers)) => {
            let issuers = Certificate::stack_from_pem(issuers).unwrap_or_default();
            if issuers.is_empty() {
                return Err((ROOT, NO_CERTIFICATE.to_owned()));
            }
            builder.disable_built_in_roots(true);
            for issuer in issuers {
                builder.add_root_certificate(issuer);
            }
        }
        None => {
            builder.danger_accept_invalid_certs(true);
        }
    }
    builder.danger_accept_invalid_hostnames(!material.verify_name);
    if let Some((certificate, key)) = &material.own {
        builder.identity(identity(certificate, key)?);
    }
    // All else that it is made of has been tried by now.
    let connector = builder.build().map_err(|_| (KEY, WRONG_KEY.to_owned()))?;
    if is_trusting {
        let _ = TRUSTING.set(connector.clone());
    }
    Ok(MakeTlsConnector::new(connector))
}

fn identity(certificate: &[u8], key: &[u8]) -> Result<Identity, Problem> {
    const BEGIN: &[u8] = b"-----BEGIN PRIVATE KEY-----";
    const NO_KEY: &str = "the file has no key in PEM and PKCS #8, which the feature tls-native-tls needs; convert it \
                          (openssl pkcs8 -topk8 -nocrypt -in OLD -out NEW), and take away the rights of others (chmod 0600)";
    if !Certificate::stack_from_pem(certificate).is_ok_and(|certificates| !certificates.is_empty()) {
        return Err((CERTIFICATE, NO_CERTIFICATE.to_owned()));
    }
    // It is taken for one only where the file begins with it.
    let begin = key.windows(BEGIN.len()).position(|word| word == BEGIN);
    let key = &key[begin.ok_or((KEY, NO_KEY.to_owned()))?..];
    Identity::from_pkcs8(certificate, key).map_err(|_| (KEY, NO_KEY.to_owned()))
}
