//! Finds a TCP port for a server.

use std::net::{Ipv4Addr, TcpListener};

use crate::error::{Error, Result};
use crate::random;

/// Below the ports that Linux (32768 and up) and macOS (49152 and up) hand out to outgoing connections.
///
/// Asking the system for "any port" (port 0) would give one of those, and then a server that a test has stopped can
/// lose its port to somebody's outgoing connection. Worse, a client that keeps on trying a closed port of that range
/// may at last be connected to itself.
const RANGE: std::ops::Range<u16> = 10_000..32_000;

/// A port that is free on 127.0.0.1 at this moment. Somebody else can still be quicker: the caller tries again.
pub(crate) fn free() -> Result<u16> {
    for _ in 0..200 {
        let width = u64::from(RANGE.end - RANGE.start);
        #[expect(clippy::cast_possible_truncation, reason = "less than the width, which is a u16")]
        let candidate = RANGE.start + (random::number()? % width) as u16;
        if TcpListener::bind((Ipv4Addr::LOCALHOST, candidate)).is_ok() {
            return Ok(candidate);
        }
    }
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
        .and_then(|listener| listener.local_addr())
        .map(|address| address.port())
        .map_err(Error::because("no free TCP port on 127.0.0.1; end some of the servers that are running"))
}
