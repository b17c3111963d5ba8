//! The user's TLS connector, with its types taken off.

use std::error::Error;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use postgres::tls::{MakeTlsConnect, TlsConnect, TlsStream};

use super::socket::Socket;

/// A TLS stream of any make.
pub(super) type BoxedStream = Box<dyn TlsStream + Send + Unpin>;
type Outcome = Result<BoxedStream, Box<dyn Error + Send + Sync>>;
type Handshake = Pin<Box<dyn Future<Output = Outcome> + Send>>;

/// Any of the TLS connectors that work with the `postgres` crate.
///
/// Its type is erased, so that nothing in the library needs a type parameter for the user's choice.
#[derive(Clone)]
pub(crate) struct Tls(Arc<dyn Handshaker>);

impl Tls {
    /// Takes a connector as `postgres::Config::connect` would.
    pub(crate) fn new<T>(connector: T) -> Self
    where
        T: MakeTlsConnect<Socket> + Clone + Send + Sync + 'static,
        T::TlsConnect: Send,
        T::Stream: Send,
        <T::TlsConnect as TlsConnect<Socket>>::Future: Send,
    {
        Self(Arc::new(connector))
    }

    /// The handshake with the server that must prove to be `domain`.
    pub(super) fn handshake(&self, domain: &str, socket: Socket) -> Handshake {
        self.0.handshake(domain, socket)
    }
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls").finish_non_exhaustive()
    }
}

trait Handshaker: Send + Sync {
    fn handshake(&self, domain: &str, socket: Socket) -> Handshake;
}

impl<T> Handshaker for T
where
    T: MakeTlsConnect<Socket> + Clone + Send + Sync + 'static,
    T::TlsConnect: Send,
    T::Stream: Send,
    <T::TlsConnect as TlsConnect<Socket>>::Future: Send,
{
    fn handshake(&self, domain: &str, socket: Socket) -> Handshake {
        let connect = self.clone().make_tls_connect(domain).map_err(Into::into);
        Box::pin(async move {
            match connect?.connect(socket).await {
                Ok(stream) => Ok(Box::new(stream) as BoxedStream),
                Err(error) => Err(error.into()),
            }
        })
    }
}
