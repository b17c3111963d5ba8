//! The guide: how to think of these locks, which one to take, and how to run them.
//!
//! | page | what it answers |
//! |---|---|
//! | [`locks`] | What is a lease, how does a holder hear of a loss, and what does a fence prove? |
//! | [`choosing`] | Which kind of lock is for this work, and when is none of them? |
//! | [`kinds`] | How is each kind used: several keys, readers, permits, a transaction's lock, thousands on one session, in tests? |
//! | [`recipes`] | Whole programs: a cron job, a single worker, a migration, sharded workers, a rate limit, axum |
//! | [`setup`] | Which features, settings and rights does it need, and do locks work on this server? |
//! | [`failover`] | What becomes of locks when the server is restarted, or a standby takes its place? |
//! | [`operations`] | Server settings, firewalls, poolers, managed services, failover, monitoring, the number of sessions |
//! | [`log_lines`] | What does this line of the log mean, and what is to be done? |
//! | [`incidents`] | What has happened to others, what happens here, and which command shows it |
//! | [`limits`] | What does it not do, and what does it ask of the server? |
//! | [`comparison`] | Other libraries and services, the plot of the benchmarks, frequent questions, and the way from the Go package |
//!
//! The [front page](crate) has the shortest examples. The items themselves have units, errors and bounds.

#[doc = include_str!("guide/choosing.md")]
pub mod choosing {}
#[doc = include_str!("guide/comparison.md")]
#[doc = include_str!("guide/comparison.svg")]
#[doc = include_str!("guide/questions.md")]
pub mod comparison {}
#[doc = include_str!("guide/failover.md")]
pub mod failover {}
#[doc = include_str!("guide/incidents.md")]
pub mod incidents {}
#[doc = include_str!("guide/kinds.md")]
pub mod kinds {}
#[doc = include_str!("guide/limits.md")]
pub mod limits {}
#[doc = include_str!("guide/locks.md")]
pub mod locks {}
#[doc = include_str!("guide/log_lines.md")]
pub mod log_lines {}
#[doc = include_str!("guide/operations.md")]
pub mod operations {}
#[doc = include_str!("guide/recipes.md")]
pub mod recipes {}
#[doc = include_str!("guide/setup.md")]
pub mod setup {}
