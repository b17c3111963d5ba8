//! From the name of a lock to PostgreSQL's advisory lock key.

use std::fmt;

use sha2::{Digest, Sha256};

use crate::error::{Error, ErrorKind, Result};
use crate::mode::Mode;

/// What identifies a lock.
///
/// Most locks are named: `"billing/invoice-run".into()`. A number, or a pair of 32-bit numbers, is used as the advisory
/// lock key as it stands, to have a lock in common with an application that calls `pg_advisory_lock` itself, or
/// `pg_advisory_lock_shared`. A name and a number are different keys even where they look alike.
///
/// # From a name to a number
///
/// The advisory lock key of a name is the first eight bytes, read as a big-endian signed number, of
/// `SHA-256(namespace ‖ 0x00 ‖ name)`, both in UTF-8. The rule never changes. In SQL:
///
/// ```sql
/// SELECT ('x' || left(encode(sha256(
///     convert_to('dsync', 'UTF8') || '\x00'::bytea || convert_to('billing/invoice-run', 'UTF8')
/// ), 'hex'), 16))::bit(64)::bigint;
/// ```
///
/// ```
/// use dsync::Key;
/// assert_eq!(Key::from("billing/invoice-run").to_string(), "billing/invoice-run");
/// assert_eq!(Key::from(42).to_string(), "#42");
/// assert_eq!(Key::from((4, 2)).to_string(), "#4:2");
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Key {
    /// A name: 1 to [`Key::MAX_LEN`] bytes of UTF-8 without a NUL.
    Name(String),
    /// An advisory lock key of 64 bits, used as it is; the namespace does not apply.
    Number(i64),
    /// An advisory lock key of twice 32 bits, used as it is. PostgreSQL keeps pairs apart from 64-bit keys.
    Pair(i32, i32),
}

impl Key {
    /// The longest name, in bytes.
    pub const MAX_LEN: usize = 1024;

    /// Refuses what cannot name a lock.
    pub(crate) fn validate(&self) -> Result<()> {
        let Self::Name(name) = self else { return Ok(()) };
        if name.is_empty() {
            return Err(Error::new(ErrorKind::InvalidKey, "the key is empty; give the lock a name"));
        }
        if name.len() > Self::MAX_LEN {
            let message = format!(
                "the key has {} bytes, the limit is {}; shorten it or use a hash of it",
                name.len(),
                Self::MAX_LEN
            );
            return Err(Error::new(ErrorKind::InvalidKey, message));
        }
        if name.contains('\0') {
            let message =
                format!("the key {name:?} contains a NUL, which PostgreSQL's text cannot hold; remove it");
            return Err(Error::new(ErrorKind::InvalidKey, message));
        }
        Ok(())
    }

    /// The number of the semaphore with this key, whose last ten bits are 0: the permits have the numbers that follow.
    pub(crate) fn semaphore(&self, namespace: &str) -> AdvisoryKey {
        // No name has a NUL, so none has the number of a semaphore by more than chance; nor has a semaphore of a number that of a name.
        let text = match self {
            Self::Name(name) => format!("{name}\0semaphore"),
            Self::Number(_) | Self::Pair(..) => format!("{self}\0semaphore of a number"),
        };
        let number = hash(self.namespace(namespace), &text);
        AdvisoryKey::Single(number & !i64::from(MAX_PERMITS))
    }

    /// The namespace that the key is in: a number is the same in all of them.
    pub(crate) fn namespace<'a>(&self, namespace: &'a str) -> &'a str {
        if let Self::Name(_) = self { namespace } else { "" }
    }

    /// The key as PostgreSQL's advisory lock functions take it.
    pub(crate) fn advisory(&self, namespace: &str) -> AdvisoryKey {
        match self {
            Self::Name(name) => AdvisoryKey::Single(hash(namespace, name)),
            Self::Number(number) => AdvisoryKey::Single(*number),
            Self::Pair(first, second) => AdvisoryKey::Pair(*first, *second),
        }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => f.write_str(name),
            Self::Number(number) => write!(f, "#{number}"),
            Self::Pair(first, second) => write!(f, "#{first}:{second}"),
        }
    }
}

impl From<&str> for Key {
    fn from(name: &str) -> Self {
        Self::Name(name.to_owned())
    }
}

impl From<String> for Key {
    fn from(name: String) -> Self {
        Self::Name(name)
    }
}

impl From<&String> for Key {
    fn from(name: &String) -> Self {
        Self::Name(name.clone())
    }
}

impl From<i32> for Key {
    fn from(number: i32) -> Self {
        Self::Number(number.into())
    }
}

impl From<u32> for Key {
    fn from(number: u32) -> Self {
        Self::Number(number.into())
    }
}

/// The number with the same bits: those from 2⁶³ on are negative for PostgreSQL, whose `bigint` has a sign.
impl From<u64> for Key {
    fn from(number: u64) -> Self {
        Self::Number(number.cast_signed())
    }
}

impl From<i64> for Key {
    fn from(number: i64) -> Self {
        Self::Number(number)
    }
}

impl From<(i32, i32)> for Key {
    fn from((first, second): (i32, i32)) -> Self {
        Self::Pair(first, second)
    }
}

/// What a manager tells the handles of its locks apart by.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct HandleKey {
    pub(crate) key: Key,
    pub(crate) mode: Mode,
}

impl HandleKey {
    /// The same for the exclusive and the shared mode. They exclude each other, and share a queue.
    pub(crate) fn lock(&self) -> Self {
        let mode = if self.mode == Mode::Permit { Mode::Permit } else { Mode::Exclusive };
        Self { key: self.key.clone(), mode }
    }

    /// That of the same lock in the other mode, if there is one.
    pub(crate) fn other_mode(&self) -> Option<Self> {
        let mode = match self.mode {
            Mode::Exclusive => Mode::Shared,
            Mode::Shared => Mode::Exclusive,
            Mode::Permit => return None,
        };
        Some(Self { key: self.key.clone(), mode })
    }

    /// The key as PostgreSQL's advisory lock functions take it; of a semaphore, that of none of its permits.
    pub(crate) fn advisory(&self, namespace: &str) -> AdvisoryKey {
        match self.mode {
            Mode::Exclusive | Mode::Shared => self.key.advisory(namespace),
            Mode::Permit => self.key.semaphore(namespace),
        }
    }
}

/// The most permits of a semaphore: as many as the last ten bits of a number count. **Do not change**: they are in the numbers of all semaphores.
pub(crate) const MAX_PERMITS: u32 = 1023;

/// The arguments of `pg_advisory_lock`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum AdvisoryKey {
    Single(i64),
    Pair(i32, i32),
}

impl AdvisoryKey {
    /// The key as one number; of a pair, the first one is the upper half.
    pub(crate) fn id(self) -> i64 {
        match self {
            Self::Single(number) => number,
            Self::Pair(first, second) => i64::from(first) << 32 | i64::from(second.cast_unsigned()),
        }
    }

    /// The key of one of the permits of a semaphore that has this number.
    pub(crate) fn permit(self, permit: u32) -> Self {
        Self::Single(self.id() | i64::from(permit))
    }

    /// The keys of all permits that the semaphore with this number may have.
    pub(crate) fn permits(self) -> impl Iterator<Item = Self> {
        (1..=MAX_PERMITS).map(move |permit| self.permit(permit))
    }

    /// Of the key of a permit, which one it is.
    pub(crate) fn which_permit(self) -> u32 {
        // Only the last ten bits are left.
        (self.id() & i64::from(MAX_PERMITS)) as u32
    }

    /// Its place in the order in which every process takes the locks of a set. **Do not change**: of two processes that take them in
    /// different orders, each may wait for the other.
    pub(crate) fn place(self) -> (bool, i64) {
        (self.is_pair(), self.id())
    }

    pub(crate) fn is_pair(self) -> bool {
        matches!(self, Self::Pair(..))
    }
}

/// **Do not change**: every process of every version must compute the same number for a name, or two of them would
/// hold "the same" lock at once. A NUL stands between the two since neither can contain one, so no pair of different
/// (namespace, name) gives the same bytes.
fn hash(namespace: &str, name: &str) -> i64 {
    let digest = Sha256::new().chain_update(namespace).chain_update([0]).chain_update(name).finalize();
    digest.iter().take(8).fold(0_u64, |number, &byte| number << 8 | u64::from(byte)).cast_signed()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Computed with the SQL of [`Key`]'s documentation on PostgreSQL 15.
    #[test]
    fn golden_values_never_change() {
        assert_eq!(hash("dsync", "billing/invoice-run"), -8_639_657_970_933_492_344);
        assert_eq!(hash("dsync", "service/billing/leadership"), 4_936_083_070_665_430_351);
        assert_eq!(hash("", "x"), 4_359_092_777_751_712_752);
        assert_eq!(hash("dsync", "schlüssel/鍵"), -7_480_283_514_987_209_388);
    }

    #[test]
    fn a_semaphore_has_numbers_of_its_own_that_never_change() {
        let number = |key: Key| key.semaphore("dsync").id();
        assert_eq!(number("gpu".into()), 6_785_985_105_421_607_936);
        assert_eq!(number(7.into()), 4_914_386_018_234_932_224);
        let all = [number("gpu".into()), number("#7".into()), number(7.into()), number((0, 7).into())];
        assert!(all.iter().all(|number| number & 1023 == 0));
        assert!((1..all.len()).all(|index| !all[..index].contains(&all[index])), "{all:?}");
        assert_eq!(AdvisoryKey::Single(-1024).permit(1023).id(), -1);
    }

    #[test]
    fn neither_namespace_nor_name_can_stand_for_the_other() {
        assert_ne!(hash("a", "bc"), hash("ab", "c"));
        assert_ne!(hash("", "abc"), hash("abc", ""));
    }

    #[test]
    fn numbers_are_used_as_they_are() {
        assert_eq!(Key::from(-7).advisory("dsync"), AdvisoryKey::Single(-7));
        assert_eq!(Key::from((1, -2)).advisory("dsync"), AdvisoryKey::Pair(1, -2));
        assert_eq!(AdvisoryKey::Pair(1, -2).id(), 0x1_ffff_fffe);
        assert_eq!(AdvisoryKey::Pair(-1, 2).id(), -0x1_0000_0000 + 2);
        assert!(Key::from(0).validate().is_ok());
    }

    #[test]
    fn what_cannot_name_a_lock_is_refused_with_advice() {
        let refusal = |name: &str| {
            let error = Key::from(name).validate().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidKey);
            error.to_string()
        };
        assert!(refusal("").contains("give the lock a name"));
        assert!(refusal(&"x".repeat(1025)).contains("1025 bytes, the limit is 1024"));
        assert!(refusal("a\0b").contains("NUL"));
        assert!(Key::from("x".repeat(1024)).validate().is_ok());
        assert!(Key::from("schlüssel/鍵").validate().is_ok());
    }
}
