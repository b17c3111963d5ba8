//! The private server of these tests, described in the words that they use.

use std::path::PathBuf;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use support::Frozen;

pub(super) struct Server {
    server: support::Server,
    /// The certificate in DER, if it speaks TLS.
    pub(super) certificate: Option<Vec<u8>>,
}

impl Server {
    /// With TLS where the installed server has that, or else it says that the tests of it are left out.
    pub(super) fn start(tls: bool) -> Self {
        let tls = tls && !support::skip_without(support::tls::available());
        let builder = support::Server::builder().hba("host all scram_user 0.0.0.0/0 scram-sha-256");
        let server = if tls { builder.tls() } else { builder }.start().unwrap();
        let certificate =
            server.certificate_pem().map(|path| CertificateDer::from_pem_file(path).unwrap().to_vec());
        Self { server, certificate }
    }

    pub(super) fn url(&self) -> String {
        format!("host=localhost hostaddr=127.0.0.1 port={} user=postgres", self.port())
    }

    pub(super) fn unix_url(&self) -> String {
        format!("host={} port={} user=postgres", self.folder().display(), self.port())
    }

    pub(super) fn port(&self) -> u16 {
        self.server.port()
    }

    pub(super) fn folder(&self) -> PathBuf {
        self.server.socket_dir()
    }

    /// Stops all the server's processes, so that nothing answers, until the guard is dropped.
    pub(super) fn freeze(&self) -> Frozen<'_> {
        self.server.freeze().unwrap()
    }
}
