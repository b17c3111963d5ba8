//! Certificates for TLS: good ones, and those that have something wrong with them.

use std::fmt;
use std::ops::Range;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_ED25519,
    date_time_ymd,
};

use crate::binaries::Binaries;
use crate::error::{Error, Result};

/// Tells whether the server that is installed was built with TLS.
///
/// # Errors
/// [Missing](Error::is_missing) if it was not, or if there is no server.
pub fn available() -> Result<()> {
    let binaries = Binaries::find()?;
    if binaries.has_tls()? {
        return Ok(());
    }
    Err(Error::missing(format!(
        "PostgreSQL {} in {} was built without TLS: `apt-get install postgresql`, or set DSYNC_PG_BIN to the programs of \
         another one",
        binaries.major_version(),
        binaries.folder().display()
    )))
}

/// What is to stand in a certificate.
#[derive(Debug, Clone)]
pub struct Subject<'a> {
    /// The common name, which is a client's user.
    pub name: &'a str,
    /// The host names and addresses of a server.
    pub hosts: &'a [&'a str],
    /// It's valid from the first day of the one year to the first day of the other.
    pub years: Range<i32>,
    /// Whether it may sign others.
    pub is_authority: bool,
    /// Whether its key is one by whose signatures no channel is bound (Ed25519).
    pub is_unbound: bool,
}

impl Default for Subject<'_> {
    fn default() -> Self {
        Self { name: "dsync test", hosts: &[], years: 1975..4096, is_authority: false, is_unbound: false }
    }
}

/// A certificate and its key.
pub struct Certificate {
    params: CertificateParams,
    key: KeyPair,
    pem: String,
}

impl Certificate {
    /// One that has signed itself.
    ///
    /// # Errors
    /// When a host can't be in a certificate.
    pub fn self_signed(subject: &Subject<'_>) -> Result<Self> {
        Self::make(subject, None)
    }

    /// One that is signed by this authority.
    ///
    /// # Errors
    /// When a host can't be in a certificate.
    pub fn sign(&self, subject: &Subject<'_>) -> Result<Self> {
        Self::make(subject, Some(self))
    }

    /// The certificate, in PEM.
    #[must_use]
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// The key, in PEM and PKCS #8.
    #[must_use]
    pub fn key(&self) -> String {
        self.key.serialize_pem()
    }

    fn make(subject: &Subject<'_>, issuer: Option<&Self>) -> Result<Self> {
        make(subject, issuer).map_err(Error::because("can't make a certificate for TLS"))
    }
}

impl fmt::Debug for Certificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Certificate").field("pem", &self.pem).finish_non_exhaustive()
    }
}

fn make(
    subject: &Subject<'_>,
    issuer: Option<&Certificate>,
) -> std::result::Result<Certificate, rcgen::Error> {
    let hosts: Vec<String> = subject.hosts.iter().map(|host| (*host).to_owned()).collect();
    let mut params = CertificateParams::new(hosts)?;
    params.distinguished_name.push(DnType::CommonName, subject.name);
    params.not_before = date_time_ymd(subject.years.start, 1, 1);
    params.not_after = date_time_ymd(subject.years.end, 1, 1);
    if subject.is_authority {
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    }
    // The signature of a certificate is what a channel is bound by, and it's the issuer's.
    let algorithm = if subject.is_unbound { &PKCS_ED25519 } else { &PKCS_ECDSA_P256_SHA256 };
    let key = KeyPair::generate_for(algorithm)?;
    let signed = match issuer {
        Some(issuer) => params.signed_by(&key, &Issuer::from_params(&issuer.params, &issuer.key))?,
        None => params.self_signed(&key)?,
    };
    Ok(Certificate { pem: signed.pem(), params, key })
}
