//! The SQL of the library, with the reasons.
//!
//! A role may come with any `search_path`. The lock sessions set one of their own, so their statements need not care; what
//! runs on a connection of the application's names schemas, types and operators in full. All statements are written for the
//! schema `dsync`: see [`schema`].

mod advisory;
mod batch;
mod catalog;
mod check;
mod claim;
mod fence;
mod inspect;
mod probe;
pub(crate) mod quiet;
mod quorum;
mod resignation;
pub(crate) mod schema;
mod semaphore;
mod session;
mod success;
mod takeover;

pub(crate) use advisory::*;
pub(crate) use batch::*;
pub(crate) use catalog::*;
pub(crate) use check::*;
pub(crate) use claim::*;
pub(crate) use fence::*;
pub(crate) use inspect::*;
pub(crate) use probe::*;
pub(crate) use quorum::*;
pub(crate) use resignation::*;
pub(crate) use semaphore::*;
pub(crate) use session::*;
pub(crate) use success::*;
pub(crate) use takeover::*;

use std::time::Duration;

use crate::key::AdvisoryKey;
use crate::mode::Mode;

/// What a claim asks for.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    /// Of a semaphore, the one that the keys of its permits are made of.
    pub(crate) key: AdvisoryKey,
    /// How long the server is to keep the lock for a silent holder.
    pub(crate) lease: Duration,
    /// What the session is called while it serves the claim.
    pub(crate) application_name: String,
    /// How the lock is to be had.
    pub(crate) mode: Mode,
    /// How many permits the semaphore is said to have.
    pub(crate) permits: i32,
    /// What the catalog is told; `None` without a catalog.
    pub(crate) entry: Option<Entry>,
}

/// What the catalog is told of a term.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) namespace: String,
    pub(crate) key: String,
    pub(crate) annotation: Option<Vec<u8>>,
}

impl Request {
    /// What the statements of the claim depend on.
    pub(crate) fn shape(&self) -> Shape {
        Shape {
            pair: self.key.is_pair(),
            catalog: self.entry.is_some(),
            shared: self.mode == Mode::Shared,
            permit: self.mode == Mode::Permit,
        }
    }
}

/// What the statements of a claim depend on, beside their parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    /// The key is a pair of 32-bit numbers. It is given as one number all the same: the first is its upper half.
    pub(crate) pair: bool,
    /// Each term is written into the catalog.
    pub(crate) catalog: bool,
    /// Others may share the lock.
    pub(crate) shared: bool,
    /// It is a permit of a semaphore.
    pub(crate) permit: bool,
}

impl Shape {
    /// A lock as any statement of an application's takes it.
    pub(crate) fn plain(pair: bool) -> Self {
        Self { pair, catalog: false, shared: false, permit: false }
    }

    /// The same for statements that do not touch the catalog, and know the number of the permit.
    pub(crate) fn bare(self) -> Self {
        Self { catalog: false, permit: false, ..self }
    }

    /// The arguments of an advisory lock's functions for a key that is one number in SQL. With whatever search path.
    pub(crate) fn numbers(self, number: &str) -> String {
        if self.pair {
            format!(
                "(({number}) OPERATOR(pg_catalog.>>) 32)::pg_catalog.int4, \
                 (({number}) OPERATOR(pg_catalog.<<) 32 OPERATOR(pg_catalog.>>) 32)::pg_catalog.int4"
            )
        } else {
            number.to_owned()
        }
    }

    /// Takes the lock if it is free, twice: see [`heartbeat`].
    pub(crate) fn try_lock(self) -> String {
        let key = self.numbers("$1::pg_catalog.int8");
        let once = format!("pg_catalog.pg_try_advisory_lock{}({key})", self.suffix());
        format!("CASE WHEN {once} THEN {once} ELSE false END")
    }

    /// Waits for the lock, and takes it twice. The type of the function's result is `void`, which is the empty text.
    pub(crate) fn wait_for_lock(self) -> String {
        let (key, suffix) = (self.numbers("$1::pg_catalog.int8"), self.suffix());
        format!(
            "CASE WHEN (pg_catalog.pg_advisory_lock{suffix}({key}))::text = '' \
             THEN pg_catalog.pg_try_advisory_lock{suffix}({key}) ELSE false END"
        )
    }

    /// Gives the lock back once; whether it was held.
    pub(crate) fn unlock(self, number: &str) -> String {
        format!("pg_catalog.pg_advisory_unlock{}({})", self.suffix(), self.numbers(number))
    }

    /// Gives the lock back once and takes it again, which succeeds only if it was held: see [`heartbeat`].
    pub(crate) fn prove(self, number: &str) -> String {
        let (unlock, key) = (self.unlock(number), self.numbers(number));
        let suffix = self.suffix();
        format!("CASE WHEN {unlock} THEN pg_catalog.pg_try_advisory_lock{suffix}({key}) ELSE false END")
    }

    /// What the names of the functions end with.
    fn suffix(self) -> &'static str {
        if self.shared { "_shared" } else { "" }
    }

    /// What the prepared statements of this shape are called.
    pub(crate) fn name(self) -> String {
        let Self { pair, catalog, shared, permit } = self;
        let parts = [(pair, "_pair"), (catalog, "_row"), (shared, "_shared"), (permit, "_permit")];
        parts.iter().filter(|(is, _)| *is).map(|(_, name)| *name).collect()
    }

    /// The fence lock: an advisory lock that a fenced transaction shares, and that a term takes for itself for a moment at its beginning.
    /// So a term knows at once, without a look at its row, whether it has to wait for fenced transactions.
    ///
    /// That a key of the application's has this number, or that those of two keys are one, is as unlikely as that two names have one hash.
    pub(crate) fn fence_lock(self) -> String {
        self.numbers(&format!("$1::pg_catalog.int8 OPERATOR(pg_catalog.#) {FENCE_LOCK}::pg_catalog.int8"))
    }

    /// The fence lock of readers. A reader that begins takes that of writers only, so that it is in no other reader's way.
    pub(crate) fn readers_fence_lock(self) -> String {
        self.numbers(&format!(
            "$1::pg_catalog.int8 OPERATOR(pg_catalog.#) {READERS_FENCE_LOCK}::pg_catalog.int8"
        ))
    }

    /// The turnstile: an advisory lock that whoever has waited in vain for a slice has for itself until it is granted the lock, and
    /// that everybody passes who begins to wait. At the end of a slice a session leaves the server's queue, and others that came
    /// later would overtake it: readers that share the lock, without end.
    pub(crate) fn turnstile(self) -> String {
        self.numbers(&format!("$1::pg_catalog.int8 OPERATOR(pg_catalog.#) {TURNSTILE}::pg_catalog.int8"))
    }

    /// Whether nobody has the turnstile, who would have to be let go first.
    pub(crate) fn pass_turnstile(self) -> String {
        Self::pass(&self.turnstile())
    }

    /// The same of a turnstile with these numbers.
    fn pass(turnstile: &str) -> String {
        format!(
            "CASE WHEN pg_catalog.pg_try_advisory_lock_shared({turnstile}) \
             THEN pg_catalog.pg_advisory_unlock_shared({turnstile}) ELSE false END"
        )
    }
}

/// Whether the era has begun: its row names the file that it is in, which tells this database and this table from all
/// others, and the time when the server was started. Neither can come out of a dump, or out of a copy of the database or of
/// its folder, though the row itself may.
macro_rules! era {
    () => {
        "EXISTS (SELECT FROM dsync.era AS era \
         WHERE era.place = pg_catalog.pg_relation_filepath('dsync.era') \
         AND era.server = pg_catalog.pg_postmaster_start_time())"
    };
}

/// "dsync ga" in ASCII, of no meaning. The function `fence` of the catalog has it, too.
const FENCE_LOCK: i64 = 0x6473_796e_6320_6761;

/// By lot, as [`TURNSTILE`]: two keys that differ by what two of these three differ by would have a lock in common. The keys that applications
/// choose, 1 and 18 say, differ in some of their last bits. The function `fence` has it, too.
const READERS_FENCE_LOCK: i64 = 0x2e78_7881_26de_cfd1;

/// By lot. The views of the catalog have it, too.
pub(crate) const TURNSTILE: i64 = 0x1666_ec68_e0d6_27b4;

use era;

#[cfg(test)]
mod tests {
    use super::*;

    /// A database may have an encoding without the characters of others, and refuses a script that has one even in a comment.
    #[test]
    fn the_catalog_can_be_made_in_any_encoding() {
        assert!(CATALOG.is_ascii());
    }

    #[test]
    fn the_function_of_the_catalog_shares_the_fence_lock() {
        assert!(CATALOG.contains(&format!("ELSE {FENCE_LOCK} END")));
        assert!(CATALOG.contains(&format!("THEN {READERS_FENCE_LOCK} ELSE")));
        assert!(CATALOG.contains(&format!("THEN {TURNSTILE} ELSE")));
        assert!(CATALOG.contains(&format!("number.id # {TURNSTILE}, NULL")));
    }

    /// Keys that are numbers are mostly small, and so are the two halves of pairs.
    #[test]
    fn the_locks_beside_a_key_are_far_from_it_and_from_each_other() {
        let numbers = [0, FENCE_LOCK, READERS_FENCE_LOCK, TURNSTILE];
        for (one, other) in (0..4).flat_map(|one| (0..one).map(move |other| (numbers[one], numbers[other]))) {
            let difference = (one ^ other).cast_unsigned();
            let halves = [difference >> 32, difference & u64::from(u32::MAX)];
            assert!(halves.iter().all(|half| *half >= 1 << 28), "{difference:x}");
        }
    }
}
