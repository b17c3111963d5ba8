//! By rustls, with either of its libraries for cryptography.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{WebPkiServerVerifier, verify_server_name};
use rustls::crypto::{self, CryptoProvider};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::files::{CERTIFICATE, KEY, Material, NO_CERTIFICATE, Problem, ROOT, Trust, WRONG_KEY};

#[cfg(feature = "tls-rustls-ring")]
pub(super) fn with_ring(material: &Material) -> Result<MakeRustlsConnect, Problem> {
    connector(material, crypto::ring::default_provider())
}

#[cfg(feature = "tls-rustls-aws-lc-rs")]
pub(super) fn with_aws_lc_rs(material: &Material) -> Result<MakeRustlsConnect, Problem> {
    connector(material, crypto::aws_lc_rs::default_provider())
}

fn connector(material: &Material, provider: CryptoProvider) -> Result<MakeRustlsConnect, Problem> {
    let provider = Arc::new(provider);
    let verifier = Verifier::new(material, Arc::clone(&provider))?;
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| ("TLS", error.to_string()))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier));
    let mut config = match &material.own {
        Some((certificate, key)) => {
            let certificates = certificates(CERTIFICATE, certificate)?;
            let key = PrivateKeyDer::from_pem_slice(key).map_err(|_| {
                (KEY, "the file has no key in PEM; convert it (openssl pkey -inform DER)".to_owned())
            })?;
            builder.with_client_auth_cert(certificates, key).map_err(|_| (KEY, WRONG_KEY.to_owned()))?
        }
        None => builder.with_no_client_auth(),
    };
    // What sslnegotiation=direct demands, and libpq offers always.
    config.alpn_protocols = vec![b"postgresql".to_vec()];
    Ok(MakeRustlsConnect::new(config))
}

fn certificates(setting: &'static str, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, Problem> {
    let certificates: Vec<_> =
        CertificateDer::pem_slice_iter(pem).collect::<Result<_, _>>().unwrap_or_default();
    if certificates.is_empty() { Err((setting, NO_CERTIFICATE.to_owned())) } else { Ok(certificates) }
}

/// Looks at the server's certificate as the settings say.
#[derive(Debug)]
struct Verifier {
    /// Looks at all of it; `None` if anybody may have signed it.
    strict: Option<Arc<WebPkiServerVerifier>>,
    /// The certificates of the file with whom to trust.
    trusted: Vec<CertificateDer<'static>>,
    verify_name: bool,
    provider: Arc<CryptoProvider>,
}

impl Verifier {
    fn new(material: &Material, provider: Arc<CryptoProvider>) -> Result<Self, Problem> {
        let mut roots = RootCertStore::empty();
        let mut trusted = Vec::new();
        match &material.trust {
            Some(Trust::System) => {
                roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
                if roots.is_empty() {
                    return Err((ROOT, "this system has no trusted certificates; install them (ca-certificates), or name a file".to_owned()));
                }
            }
            Some(Trust::These(issuers)) => {
                trusted = certificates(ROOT, issuers)?;
                for issuer in &trusted {
                    roots.add(issuer.clone()).map_err(|_| (ROOT, NO_CERTIFICATE.to_owned()))?;
                }
            }
            None => {}
        }
        let strict = (!roots.is_empty())
            .then(|| WebPkiServerVerifier::builder_with_provider(roots.into(), Arc::clone(&provider)).build())
            .transpose()
            .map_err(|error| (ROOT, error.to_string()))?;
        Ok(Self { strict, trusted, verify_name: material.verify_name, provider })
    }

    /// Whether the objection is only that the certificate is an authority's own, and it is one of those in the file. The one of the
    /// [manual's example](https://www.postgresql.org/docs/current/ssl-tcp.html#SSL-CERTIFICATE-CREATION) is such, and libpq takes it.
    fn is_trusted_itself(&self, certificate: &CertificateDer<'_>, error: &CertificateError) -> bool {
        let CertificateError::Other(other) = error else { return false };
        // Its dates have been looked at before that.
        other.to_string() == "CaUsedAsEndEntity" && self.trusted.contains(certificate)
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        use CertificateError::{NotValidForName, NotValidForNameContext};
        let Some(strict) = &self.strict else { return Ok(ServerCertVerified::assertion()) };
        match strict.verify_server_cert(certificate, intermediates, name, ocsp, now) {
            // The name is looked at when all the rest was found to be right.
            Err(Error::InvalidCertificate(NotValidForName | NotValidForNameContext { .. }))
                if !self.verify_name => {}
            Err(Error::InvalidCertificate(error)) if self.is_trusted_itself(certificate, &error) => {
                if self.verify_name {
                    verify_server_name(&ParsedCertificate::try_from(certificate)?, name)?;
                }
            }
            outcome => return outcome,
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        crypto::verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
