//! A network namespace beside the main one, joined by a cable that can be cut in each direction. Linux, as root.
//!
//! The cable is a pair of virtual interfaces with addresses of their own in 10.213.0.0/16. Nothing routes between
//! them and any other network.

use std::fs;
use std::process::Command;

use crate::error::{Error, Result};
use crate::process;
use crate::random;
use crate::watcher::Watcher;

/// A hardware address that nobody has: what is sent there arrives, and is thrown away without an answer.
const NOWHERE: &str = "02:00:00:00:de:ad";

/// Which way packets travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From the main namespace into the other.
    Inward,
    /// From the other namespace to the main one.
    Outward,
    /// Both ways.
    Both,
}

/// A network namespace with a cable to the main one; dropping it removes both.
#[derive(Debug)]
pub struct Netns {
    number: u8,
    name: String,
    host_hardware: String,
    inside_hardware: String,
    watcher: Watcher,
}

impl Netns {
    /// Whether namespaces can be made here.
    ///
    /// # Errors
    /// When not; the text says what is missing.
    pub fn available() -> Result<()> {
        if !cfg!(target_os = "linux") {
            return Err(Error::missing("network namespaces need Linux"));
        }
        if !rustix::process::geteuid().is_root() {
            return Err(Error::missing("network namespaces need root; run these tests as root"));
        }
        let probe = format!("dsync-probe-{}-{:x}", process::own(), random::number()?);
        ip(&["netns", "add", &probe])
            .and_then(|()| ip(&["netns", "del", &probe]))
            .map_err(Error::because(
                "network namespaces can't be used here (`apt-get install iproute2`, CAP_SYS_ADMIN)",
            ))
            .map_err(|error| Error::missing(error.to_string()))
    }

    /// Makes a namespace and its cable.
    ///
    /// # Errors
    /// Like [`available`](Self::available).
    pub fn new() -> Result<Self> {
        Self::available()?;
        let first = random::number()?;
        let mut last = None;
        // The name of the cable stands for its addresses, and the kernel refuses to make a name twice: so two processes
        // can't get the same.
        for offset in 0..64 {
            let number = u8::try_from((first.wrapping_add(offset)) % 254 + 1).unwrap_or(1);
            match Self::make(number) {
                Ok(netns) => return Ok(netns),
                Err(error) => last = Some(error),
            }
        }
        Err(last.unwrap_or_else(|| Error::new("no free number for a network namespace")))
    }

    fn make(number: u8) -> Result<Self> {
        let name = format!("dsync-{number}");
        let (outer, inner) = (outer_end(number), inner_end(number));
        ip(&["link", "add", &outer, "type", "veth", "peer", "name", &inner])?;
        // Only from here on, since the script would remove another process's namespace of this name.
        let watcher = Watcher::with_script(include_str!("netns.sh"), &[&name, &outer])?;
        let hardware = |end: &str| {
            fs::read_to_string(format!("/sys/class/net/{end}/address"))
                .map(|text| text.trim().to_owned())
                .map_err(Error::because(format!("can't read the hardware address of {end}")))
        };
        let netns = Self {
            number,
            name,
            host_hardware: hardware(&outer)?,
            inside_hardware: hardware(&inner)?,
            watcher,
        };
        ip(&["netns", "add", &netns.name])?;
        ip(&["link", "set", &inner, "netns", &netns.name])?;
        ip(&["address", "add", &format!("{}/30", netns.host_address()), "dev", &outer])?;
        ip(&["link", "set", &outer, "up"])?;
        netns.ip_inside(&["address", "add", &format!("{}/30", netns.inside_address()), "dev", &inner])?;
        netns.ip_inside(&["link", "set", &inner, "up"])?;
        netns.ip_inside(&["link", "set", "lo", "up"])?;
        netns.restore(Direction::Both)?;
        Ok(netns)
    }

    /// The address of the main namespace's end: for [`Builder::listen`](crate::Builder::listen).
    #[must_use]
    pub fn host_address(&self) -> String {
        format!("10.213.{}.1", self.number)
    }

    /// The address of the end inside.
    #[must_use]
    pub fn inside_address(&self) -> String {
        format!("10.213.{}.2", self.number)
    }

    /// A command that will run inside. Its process id is that of `program` itself.
    #[must_use]
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name, program]);
        command
    }

    /// What a server has to know that runs inside.
    pub(crate) fn inside(&self) -> Inside {
        Inside { name: self.name.clone(), address: self.inside_address(), host_address: self.host_address() }
    }

    /// Makes all packets in a direction vanish. Nobody is told: no error, no reset, no closed connection.
    ///
    /// The sender is given a wrong hardware address of the receiver. Unlike a route to nowhere or an interface that is
    /// down, which the sender's own kernel reports to the sender, this looks like a failure far away; and it needs no
    /// firewall.
    ///
    /// # Errors
    /// When `ip` fails.
    pub fn cut(&self, direction: Direction) -> Result<()> {
        self.neighbours(direction, NOWHERE, NOWHERE)
    }

    /// Lets the packets through again.
    ///
    /// # Errors
    /// When `ip` fails.
    pub fn restore(&self, direction: Direction) -> Result<()> {
        self.neighbours(direction, &self.inside_hardware, &self.host_hardware)
    }

    fn neighbours(&self, direction: Direction, inside: &str, host: &str) -> Result<()> {
        if direction != Direction::Outward {
            let outer = outer_end(self.number);
            ip(&[
                "neigh",
                "replace",
                &self.inside_address(),
                "lladdr",
                inside,
                "nud",
                "permanent",
                "dev",
                &outer,
            ])?;
        }
        if direction != Direction::Inward {
            let inner = inner_end(self.number);
            let address = self.host_address();
            self.ip_inside(&[
                "neigh",
                "replace",
                &address,
                "lladdr",
                host,
                "nud",
                "permanent",
                "dev",
                &inner,
            ])?;
        }
        Ok(())
    }

    fn ip_inside(&self, arguments: &[&str]) -> Result<()> {
        ip(&[&["-n", &self.name], arguments].concat())
    }
}

/// What is known of a namespace to what runs in it.
#[derive(Debug, Clone)]
pub(crate) struct Inside {
    pub(crate) name: String,
    /// The address of the end inside.
    pub(crate) address: String,
    /// The address of the main namespace's end.
    pub(crate) host_address: String,
}

impl Drop for Netns {
    fn drop(&mut self) {
        self.watcher.finish();
    }
}

fn outer_end(number: u8) -> String {
    format!("dsync{number}o")
}

fn inner_end(number: u8) -> String {
    format!("dsync{number}i")
}

fn ip(arguments: &[&str]) -> Result<()> {
    let line = format!("`ip {}`", arguments.join(" "));
    let output = Command::new("ip")
        .args(arguments)
        .output()
        .map_err(Error::because(format!("can't run {line}: `apt-get install iproute2`")))?;
    if output.status.success() {
        return Ok(());
    }
    Err(Error::new(format!("{line} failed: {}", String::from_utf8_lossy(&output.stderr).trim())))
}
