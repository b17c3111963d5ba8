//! Certificates for one server: an authority of its own, and the server's certificate signed by it.

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose};

use crate::error::{Error, Result};

/// All in PEM.
pub(crate) struct Certificates {
    pub(crate) authority: String,
    pub(crate) server: String,
    pub(crate) key: String,
}

impl Certificates {
    /// For the names and addresses in `names`.
    ///
    /// Two certificates rather than a single self-signed one: some TLS libraries refuse an authority's certificate as
    /// a server's.
    pub(crate) fn make(names: Vec<String>) -> Result<Self> {
        make(names).map_err(Error::because("can't make certificates for TLS"))
    }
}

fn make(names: Vec<String>) -> std::result::Result<Certificates, rcgen::Error> {
    let mut authority = CertificateParams::new(Vec::new())?;
    authority.distinguished_name.push(DnType::CommonName, "dsync test authority");
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let authority_key = KeyPair::generate()?;
    let authority_pem = authority.self_signed(&authority_key)?.pem();

    let mut server = CertificateParams::new(names)?;
    server.distinguished_name.push(DnType::CommonName, "dsync test server");
    let key = KeyPair::generate()?;
    let signed = server.signed_by(&key, &Issuer::new(authority, authority_key))?;
    Ok(Certificates { authority: authority_pem, server: signed.pem(), key: key.serialize_pem() })
}
