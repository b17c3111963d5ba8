//! The files that the settings name, read: for each of the stacks.

use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::pg::config::tls_settings::TlsSettings;

/// A setting that cannot be used, and why. Nothing of a value or a file is in it: a path may be a piece of a password, a line of the
/// file a piece of a key.
pub(super) type Problem = (&'static str, String);

pub(super) const ROOT: &str = "sslrootcert (PGSSLROOTCERT)";
pub(super) const CERTIFICATE: &str = "sslcert (PGSSLCERT)";
pub(super) const KEY: &str = "sslkey (PGSSLKEY)";

pub(super) const NO_CERTIFICATE: &str = "the file has no certificate in PEM, or one that cannot be read; convert it (openssl x509 -inform DER), or name another";
pub(super) const WRONG_KEY: &str = "it is not the key of the first certificate in sslcert, or of a kind that is not known here; name the one that fits";

/// What the settings ask, with the files read.
pub(super) struct Material {
    /// Who may have signed the server's certificate; `None` for anybody.
    pub(super) trust: Option<Trust>,
    pub(super) verify_name: bool,
    /// The client's certificate and its key, in PEM.
    pub(super) own: Option<(Vec<u8>, Vec<u8>)>,
}

pub(super) enum Trust {
    System,
    /// In PEM.
    These(Vec<u8>),
}

impl Material {
    pub(super) fn read(settings: &TlsSettings) -> Result<Self, Problem> {
        let trust = match &settings.sslrootcert {
            Some(_) if settings.trusts_system() && !settings.verify_name => {
                let problem =
                    "system goes with sslmode=verify-full only: anybody can have a certificate of some name";
                return Err((ROOT, problem.to_owned()));
            }
            Some(_) if settings.trusts_system() => Some(Trust::System),
            Some(path) => Some(Trust::These(read(ROOT, path, |_| false)?)),
            None if settings.verify_name => Some(Trust::System),
            None if settings.verify_issuer => {
                return Err((ROOT, "sslmode=verify-ca needs it: name the file with the issuer".to_owned()));
            }
            None => None,
        };
        let own = match (&settings.sslcert, &settings.sslkey) {
            (Some(certificate), Some(key)) => {
                let certificate = read(CERTIFICATE, certificate, |_| false)?;
                let key = read(KEY, key, is_open_to_others)?;
                if key.windows(9).any(|word| word == b"ENCRYPTED") {
                    let problem = "the key is encrypted; take that off (openssl pkey -in OLD -out NEW), and the rights of others (chmod 0600)";
                    return Err((KEY, problem.to_owned()));
                }
                Some((certificate, key))
            }
            (Some(_), None) => {
                return Err((
                    CERTIFICATE,
                    "it goes with sslkey, the file with its key; name both".to_owned(),
                ));
            }
            (None, Some(_)) => {
                return Err((
                    KEY,
                    "it goes with sslcert, the file with the certificate; name both".to_owned(),
                ));
            }
            (None, None) => None,
        };
        Ok(Self { trust, verify_name: settings.verify_name, own })
    }
}

/// Whether others than the owner may do something with the file that libpq does not let them.
fn is_open_to_others(metadata: &Metadata) -> bool {
    let forbidden = if metadata.uid() == 0 { 0o037 } else { 0o077 };
    metadata.mode() & forbidden != 0
}

fn read(setting: &'static str, path: &Path, is_too_open: fn(&Metadata) -> bool) -> Result<Vec<u8>, Problem> {
    /// Fifty times what all the issuers that an operating system trusts take.
    const LONGEST: u64 = 16 << 20;
    let unreadable =
        |error: io::Error| (setting, format!("the file cannot be read: {error}; check its path and rights"));
    // Before it is opened: to open a pipe could wait for ever.
    let metadata = path.metadata().map_err(unreadable)?;
    let problem = if !metadata.is_file() || metadata.len() > LONGEST {
        "it is not a plain file of up to 16 MiB"
    } else if is_too_open(&metadata) {
        "others can read or write the file; let nobody else do so (chmod 0600, or 0640 where it belongs to root)"
    } else {
        return fs::read(path).map_err(unreadable);
    };
    Err((setting, problem.to_owned()))
}
