//! A socket under the blocking driver that other threads can wake, kill and put a deadline on.
//!
//! A `postgres::Client` blocks its thread inside a tokio runtime of its own, and offers no way in: a thread that
//! waits for a notification cannot be told anything, a query on a network that swallows packets never ends, and
//! neither does the `Drop` of such a client. The driver has one hook, meant for TLS: it hands the connected socket to
//! a connector of ours and from then on speaks only through what that connector returns. So:
//!
//! ```text
//!   Dialer ── one host at a time ──▶ postgres::Config::connect(Connector)
//!                                        │ the driver opens a TCP socket and hands it over
//!                                        ▼
//!                                    Connector: SSLRequest, the user's TLS, or the Unix socket
//!                                        │
//!   StreamControl ── wake, kill ───▶ SessionStream ◀── every read and write of the driver
//! ```
//!
//! The driver calls the hook at once, without a word to the server, when it is told `sslmode=require` and
//! `sslnegotiation=direct`; the user's own two settings are then carried out by the connector. It demands a host name
//! for it, so every session is given one ([`connector`] says which), and it refuses Unix sockets, so for those it is
//! led to a listener on the loopback interface and the connector exchanges the socket.

mod connector;
mod control;
mod dialer;
mod framing;
mod session_stream;
mod tls;

#[cfg(test)]
mod tests;

pub(crate) use control::{Ended, StreamControl};
pub(crate) use dialer::{DialError, Dialer};
pub(crate) use tls::Tls;
