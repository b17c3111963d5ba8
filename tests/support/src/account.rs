//! Whose identity servers run under: PostgreSQL refuses to run as root.

use std::fs;
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use crate::error::{Error, Result};

/// The user that owns a server's folder and runs its processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Account {
    /// We aren't root, so the server runs as whoever we are.
    Ourselves,
    /// We are root and step down to this user.
    Other { uid: u32, gid: u32 },
}

impl Account {
    pub(crate) fn choose() -> Result<Self> {
        if !rustix::process::geteuid().is_root() {
            return Ok(Self::Ourselves);
        }
        let passwd = fs::read_to_string("/etc/passwd").map_err(Error::because("can't read /etc/passwd"))?;
        ["postgres", "nobody"].into_iter().find_map(|name| entry(&passwd, name)).ok_or_else(|| {
            Error::missing(
                "PostgreSQL refuses to run as root and /etc/passwd has neither `postgres` nor `nobody`; \
                 run the tests as another user",
            )
        })
    }

    /// Makes the command run as this user.
    pub(crate) fn apply(self, command: &mut Command) {
        if let Self::Other { uid, gid } = self {
            command.uid(uid).gid(gid);
        }
    }

    /// The start of a command that will run as this user in a network namespace, which only root may enter.
    pub(crate) fn inside(self, netns: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", netns]);
        if let Self::Other { uid, gid } = self {
            command.args(["setpriv", &format!("--reuid={uid}"), &format!("--regid={gid}"), "--clear-groups"]);
        }
        command
    }

    /// Gives a file or folder to this user.
    pub(crate) fn own(self, path: &Path) -> Result<()> {
        match self {
            Self::Ourselves => Ok(()),
            Self::Other { uid, gid } => chown(path, Some(uid), Some(gid))
                .map_err(Error::because(format!("can't give {} to the server's user", path.display()))),
        }
    }
}

/// Reads one user from the text of /etc/passwd. A user with the id 0 would be root under another name.
fn entry(passwd: &str, name: &str) -> Option<Account> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        if fields.next()? != name {
            return None;
        }
        let uid = fields.nth(1)?.parse().ok()?;
        let gid = fields.next()?.parse().ok()?;
        (uid != 0).then_some(Account::Other { uid, gid })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_a_user_and_never_root() {
        let passwd = "root:x:0:0::/root:/bin/sh\npostgres:x:101:104:PG:/var/lib/postgresql:/bin/bash\nnobody:x:0:0::/:\n";
        assert_eq!(entry(passwd, "postgres"), Some(Account::Other { uid: 101, gid: 104 }));
        assert_eq!(entry(passwd, "nobody"), None);
        assert_eq!(entry(passwd, "postgre"), None);
    }
}
