//! The statements that tell whether the server was taken over, and remember that all terms of before are over.

use super::catalog::TIMELINE;
use super::era;
use crate::clock::MachineTime;
use crate::pg::takeover::Agreed;

/// The number of this database.
const BASE: &str = "(SELECT base.oid FROM pg_database AS base WHERE base.datname = current_database())";

/// The number of the record if it is of this run of the server, and all terms of before are over; otherwise no row. For each
/// session, so it asks for no more than that needs: the timeline is the same as long as the server was not started again.
///
/// It is short: with 130 bytes more, each session took 8 KiB more of the client's memory, by the bench `scale`.
pub(crate) const ARE_TERMS_OVER: &str = "SELECT id FROM dsync.takeover AS past WHERE past.over AND server = pg_postmaster_start_time() \
     AND base = (SELECT oid FROM pg_database WHERE datname = current_database())";

/// As [`ARE_TERMS_OVER`], and what is agreed on: for the first session of a manager.
///
/// No row where no token can be drawn.
pub(crate) const ARE_TERMS_OVER_AND_AGREED: &str = concat!(
    "SELECT takeover.id, policy.takeover, policy.lease, policy.quorum \
     FROM dsync.takeover AS takeover, dsync.policy AS policy \
     WHERE takeover.over AND takeover.server = pg_postmaster_start_time() \
     AND takeover.base = (SELECT base.oid FROM pg_database AS base WHERE base.datname = current_database()) AND ",
    era!()
);

/// What is agreed on, where nothing else is of interest: a text of no meaning, policy, the longest lease in milliseconds, and whether
/// the standbys confirm heartbeats. No row where no token can be drawn.
pub(crate) const AGREED: &str = concat!(
    "SELECT 'immediate', policy.takeover, policy.lease, policy.quorum FROM dsync.policy AS policy WHERE ",
    era!()
);

/// Whether tokens are drawn in this run of the server.
pub(crate) const HAS_ERA: &str = concat!("SELECT ", era!());

/// What a role may ask a server for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Askable {
    /// System identifier and timeline too.
    All,
    /// Some services refuse them.
    Less,
}

impl Askable {
    /// System identifier and timeline.
    fn columns(self) -> (&'static str, &'static str) {
        match self {
            Self::All => ("(SELECT control.system_identifier FROM pg_control_system() AS control)", TIMELINE),
            Self::Less => ("NULL::int8", "NULL::int8"),
        }
    }
}

/// The run of the server, the record, and what is agreed on: database, start, system identifier, timeline; number, the same four, whether all
/// terms of before are over; policy, the longest lease in milliseconds, and whether the standbys confirm heartbeats; and when a process of
/// this machine first saw that they are not over. What there is not, is null. And whether tokens are drawn in this run.
pub(crate) fn look_at_run(ask: Askable, here: Option<&MachineTime>) -> String {
    let (system, timeline) = ask.columns();
    let seen = here.map_or("NULL".to_owned(), |here| format!("takeover.seen ->> '{}'", here.boot));
    let era = era!();
    format!(
        "SELECT {BASE}, extract(epoch FROM pg_postmaster_start_time()), {system}, {timeline}, \
                takeover.id, takeover.base, extract(epoch FROM takeover.server), takeover.system, takeover.timeline, takeover.over, \
                policy.takeover, policy.lease, policy.quorum, {seen}, {era} \
         FROM (VALUES (true)) AS one (sole) \
         LEFT JOIN dsync.takeover AS takeover ON takeover.sole LEFT JOIN dsync.policy AS policy ON policy.sole"
    )
}

/// Records this run of the server in the place of the record with the number `seen`. Gives the new number; no row where another session was
/// faster.
pub(crate) fn record_run(ask: Askable, over: bool, seen: Option<&str>) -> String {
    let (system, timeline) = ask.columns();
    let conflict = seen.map_or_else(
        || "DO NOTHING".to_owned(),
        |seen| {
            format!(
                "DO UPDATE SET id = excluded.id, base = excluded.base, server = excluded.server, system = excluded.system, \
                 timeline = excluded.timeline, over = excluded.over, seen = excluded.seen WHERE takeover.id = '{seen}'"
            )
        },
    );
    format!(
        "INSERT INTO dsync.takeover AS takeover (id, base, server, system, timeline, over) \
         SELECT gen_random_uuid(), {BASE}, pg_postmaster_start_time(), {system}, {timeline}, {over} ON CONFLICT (sole) {conflict} \
         RETURNING takeover.id"
    )
}

/// Remembers when a process of this machine first saw that the terms of before are not over, for those that do not live long enough to
/// wait for that.
pub(crate) fn remember_seen(id: &str, here: &MachineTime) -> String {
    let (machine, time) = (&here.boot, here.as_text());
    format!(
        "UPDATE dsync.takeover AS takeover SET seen = takeover.seen || jsonb_build_object('{machine}', '{time}') \
         WHERE takeover.id = '{id}'"
    )
}

/// Remembers that all terms of before are over, if the record with this number is there still.
pub(crate) fn mark_over(id: &str) -> String {
    format!("UPDATE dsync.takeover SET over = true WHERE id = '{id}' AND server = pg_postmaster_start_time()")
}

/// Agrees on the stronger policy, the longer lease, and the quorum if either has it. The first term waits for the commit: on the disk, and
/// on a synchronous standby, which has to know of it when it is promoted. So it waits as long as such a standby is away.
pub(crate) fn agree_on(own: Agreed) -> String {
    let (policy, lease, quorum) = (own.policy.name(), own.lease.as_millis(), own.quorum);
    format!(
        "SET LOCAL synchronous_commit = on; \
         INSERT INTO dsync.policy AS known (takeover, lease, quorum) VALUES ('{policy}', {lease}, {quorum}) \
         ON CONFLICT (sole) DO UPDATE SET lease = greatest(known.lease, excluded.lease), quorum = known.quorum OR excluded.quorum, \
         takeover = CASE WHEN excluded.takeover = 'after any restart' OR known.takeover = 'immediate' \
                         THEN excluded.takeover ELSE known.takeover END"
    )
}

/// Whether the newest term of a key is the one with the token `$5`: `$1` the key, `$2` whether it is a pair, `$3` namespace, `$4`
/// name, `$6` whether it is shared. The row is unlogged, so it is there after a clean restart only.
pub(crate) const IS_NEWEST_TERM: &str = "SELECT EXISTS (SELECT FROM dsync.lock AS lock \
     WHERE lock.id = $1::int8 AND lock.pair = $2::bool AND lock.namespace = $3::text AND lock.key = $4::text \
     AND lock.token = $5::int8 AND (lock.readers IS NOT DISTINCT FROM lock.token) = $6::bool)";
