//! A socket under the blocking driver that other threads can watch, kill and put a deadline on.
//!
//! A `postgres::Client` blocks its thread inside a tokio runtime of its own, and offers no way in: a query on a network
//! that swallows packets never ends, neither does the `Drop` of such a client, and a thread that waits for the end of the
//! session has it to itself. The driver has one hook, meant for TLS: it hands the connected socket to a connector of ours
//! and from then on speaks only through what that connector returns. So:
//!
//! ```text
//!   Dialer ── one address at a time ──▶ postgres::Config::connect(Connector)
//!                                        │ the driver connects to the decoy, on the loopback interface
//!                                        ▼
//!                                    Connector: the real Socket, SSLRequest, the user's TLS
//!                                        │
//!   StreamControl ── kill, guard ──▶ SessionStream ◀── every read and write of the driver
//!        └── Socket, to be watched by another thread
//! ```
//!
//! The driver calls the hook at once, without a word to the server, when it is told `sslmode=require` and
//! `sslnegotiation=direct`; the user's own two settings are then carried out by the connector. It demands a host name
//! for it, so every session is given one ([`connector`] says which), refuses Unix sockets, and shows nobody the descriptor
//! of its socket. So it is led to a listener of ours, and the connector opens the socket that is used.

mod connector;
mod control;
mod descriptors;
mod dialer;
mod password;
mod resolve;
mod session_stream;
mod socket;
mod tls;

#[cfg(test)]
mod tests;

pub(crate) use connector::{HookError, Route};
pub(crate) use control::{Ended, SHORT_ANSWER, StreamControl};
pub(crate) use dialer::{DialError, Dialer, Local, NotReady, StopProbe, TimedOut, lacks_password};
pub(crate) use password::{Password, PasswordError, Passwords};
pub(crate) use session_stream::is_alert;
pub use socket::Socket;
pub(crate) use tls::Tls;
