//! Randomness from the operating system, for passwords and for where to begin a search.

use std::fs::File;
use std::io::Read;

use crate::error::{Error, Result};

pub(crate) fn number() -> Result<u64> {
    let mut bytes = [0; 8];
    File::open("/dev/urandom")
        .and_then(|mut source| source.read_exact(&mut bytes))
        .map_err(Error::because("can't read /dev/urandom"))?;
    Ok(u64::from_ne_bytes(bytes))
}

/// 128 bits in hexadecimal, so that it needs no escaping in an URL.
pub(crate) fn password() -> Result<String> {
    Ok(format!("{:016x}{:016x}", number()?, number()?))
}
