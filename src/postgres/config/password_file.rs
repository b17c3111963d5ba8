//! The password file, by libpq's rules.
//!
//! It is read anew for each session, so that a password which has been changed there is used from then on.
//! <https://www.postgresql.org/docs/current/libpq-pgpass.html>

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::pg::stream::{Passwords, Route};

/// Where the passwords are, and whose is wanted. `Debug` shows neither.
#[derive(Clone)]
pub(super) struct PasswordFile {
    path: PathBuf,
    /// What named the file, for the log: its path may come from a connection string, and be a piece of a password.
    named_by: String,
    /// Without a name only lines match that are for all users.
    user: Option<String>,
    database: Option<String>,
}

impl PasswordFile {
    /// `user` is the role, and `database` what was asked for; the server takes the role's name where that was left out.
    pub(super) fn new(path: PathBuf, named_by: String, user: Option<&str>, database: Option<&str>) -> Self {
        let [user, database] = [user, database.or(user)].map(|name| name.map(str::to_owned));
        Self { path, named_by, user, database }
    }

    /// The text of the file; `None` where it is not there, or not to be trusted.
    fn read(&self) -> Option<Vec<u8>> {
        /// More than anybody writes by hand.
        const LONGEST: u64 = 1 << 20;
        let read = || -> io::Result<Option<Vec<u8>>> {
            // Before it is opened: to open a pipe could wait for ever.
            let metadata = self.path.metadata()?;
            let problem = if !metadata.is_file() {
                "is not a plain file"
            } else if metadata.permissions().mode() & 0o077 != 0 {
                "can be read or written by others; let nobody else do so (chmod 0600)"
            } else {
                let mut text = Vec::new();
                File::open(&self.path)?.take(LONGEST).read_to_end(&mut text)?;
                return Ok(Some(text));
            };
            log::warn!(
                "no password is read from the password file that {} names: it {problem}",
                self.named_by
            );
            Ok(None)
        };
        match read() {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                log::warn!("the password file that {} names cannot be read: {error}", self.named_by);
                None
            }
        }
    }
}

impl Passwords for PasswordFile {
    fn password_for(&self, route: &Route) -> Option<Vec<u8>> {
        let (hosts, port) = match route {
            Route::Tcp { domain, port, .. } => (vec![&**domain], port.to_string()),
            Route::Unix { path } => {
                let folder = path.parent().and_then(Path::to_str).unwrap_or_default();
                let port = path.extension().and_then(|port| port.to_str()).unwrap_or_default();
                // libpq takes the folder that it was built with for `localhost`, which is one of these.
                let usual = super::settings::SOCKET_FOLDERS.contains(&folder).then_some("localhost");
                ([folder].into_iter().chain(usual).collect(), port.to_owned())
            }
        };
        find(&self.read()?, &hosts, &port, self.database.as_deref(), self.user.as_deref())
    }
}

impl fmt::Debug for PasswordFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PasswordFile").finish_non_exhaustive()
    }
}

/// The password of the first line, `host:port:database:user:password`, whose first four fields match.
fn find(
    text: &[u8],
    hosts: &[&str],
    port: &str,
    database: Option<&str>,
    user: Option<&str>,
) -> Option<Vec<u8>> {
    let database = database.into_iter().collect::<Vec<_>>();
    let user = user.into_iter().collect::<Vec<_>>();
    let wanted = [hosts, &[port], &database, &user];
    let password = text.split(|byte| *byte == b'\n').find_map(|line| {
        let mut rest = line.strip_suffix(b"\r").unwrap_or(line);
        if rest.starts_with(b"#") {
            return None;
        }
        for wanted in wanted {
            let (is_any, field, after) = field(rest);
            let matches = is_any || wanted.iter().any(|name| name.as_bytes() == field);
            rest = after.filter(|_| matches)?;
        }
        Some(field(rest).1)
    })?;
    (!password.is_empty()).then_some(password)
}

/// The field at the beginning: whether it is a lone `*`, its value, and what follows its colon. A backslash takes the meaning
/// from the character behind it.
fn field(text: &[u8]) -> (bool, Vec<u8>, Option<&[u8]>) {
    let mut value = Vec::new();
    let mut rest = text;
    while let Some((&byte, after)) = rest.split_first() {
        match (byte, after.split_first()) {
            (b':', _) => return (text.starts_with(b"*:"), value, Some(after)),
            (b'\\', Some((&next, after))) => {
                value.push(next);
                rest = after;
            }
            _ => {
                value.push(byte);
                rest = after;
            }
        }
    }
    (text == b"*", value, None)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(text: &str, host: &str, user: Option<&str>) -> Option<String> {
        find(text.as_bytes(), &[host], "5432", Some("app"), user)
            .map(|found| String::from_utf8(found).unwrap())
    }

    #[test]
    fn the_first_line_that_matches_has_the_password() {
        let text = "# db:5432:app:ada:comment\nelse:5432:app:ada:no\ndb:1:app:ada:no\ndb:5432:x:ada:no\n\
                    db:5432:app:bob:no\ndb:5432:app:ada:yes\r\n*:*:*:*:late\n";
        assert_eq!(found(text, "db", Some("ada")).as_deref(), Some("yes"));
        assert_eq!(found(text, "other", Some("ada")).as_deref(), Some("late"));
        assert_eq!(found(text, "db", None).as_deref(), Some("late"), "who is not known is anybody only");
        assert_eq!(found("db:5432:app:ada:\n", "db", Some("ada")), None, "an empty one is none");
        assert_eq!(found("db:5432:app:ada", "db", Some("ada")), None);
        assert_eq!(found("", "db", Some("ada")), None);
    }

    #[test]
    fn colons_and_backslashes_stand_behind_a_backslash() {
        assert_eq!(found(r"\:\:1:*:*:*:a\:b\\c:d", "::1", None).as_deref(), Some(r"a:b\c"));
        assert_eq!(found(r"\*:*:*:*:x", "db", None), None, "this star is a letter");
        assert_eq!(found(r"*:*:app\\:*:x", "db", None), None);
        assert_eq!(found(r"*:*:*:ad\a:x\", "db", Some("ada")).as_deref(), Some(r"x\"));
    }
}
