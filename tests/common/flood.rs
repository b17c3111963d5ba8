//! A proxy that speaks in the server's place: floods of messages to the client, or a statement of its own to the server.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use parking_lot::Mutex;

/// What the client gets instead of what the server says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flood {
    Notices,
    Notifications,
    Parameters,
    /// Rows that nobody has asked for.
    Rows,
    /// A notice at a time, 3,000 a second.
    SlowNotices,
    /// A message that is announced to be of 2 GiB, and comes without end.
    HugeMessage,
    /// As before, but only the beginning comes.
    HalfMessage,
    Garbage,
}

impl Flood {
    pub(crate) const ALL: [Self; 8] = [
        Self::Notices,
        Self::Notifications,
        Self::Parameters,
        Self::Rows,
        Self::SlowNotices,
        Self::HugeMessage,
        Self::HalfMessage,
        Self::Garbage,
    ];

    /// The first bytes, and those that follow again and again.
    fn bytes(self) -> (Vec<u8>, Vec<u8>) {
        let notice = message(b'N', b"SNOTICE\0VNOTICE\0C00000\0Ma notice of the proxy's\0\0");
        match self {
            Self::Notices => (Vec::new(), notice.repeat(1_000)),
            Self::SlowNotices => (Vec::new(), notice),
            Self::Notifications => {
                (Vec::new(), message(b'A', b"\0\0\0\x07channel\0a payload of some length\0").repeat(1_000))
            }
            Self::Parameters => (Vec::new(), message(b'S', b"TimeZone\0UTC\0").repeat(1_000)),
            Self::Rows => {
                let value = [&[0, 1, 0, 0, 0x3, 0xe8][..], &[b'1'; 1_000]].concat();
                (Vec::new(), message(b'D', &value).repeat(60))
            }
            Self::HugeMessage => ([&b"D"[..], &0x7fff_fff0_u32.to_be_bytes()].concat(), vec![7; 65_536]),
            Self::HalfMessage => (vec![b'D', 0, 0, 0, 50, 0, 1], Vec::new()),
            Self::Garbage => (Vec::new(), (0..4_096_u32).map(|n| (n.wrapping_mul(167) >> 3) as u8).collect()),
        }
    }
}

fn message(kind: u8, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len() + 4).unwrap();
    [&[kind][..], &length.to_be_bytes(), body].concat()
}

/// A proxy in front of a server on 127.0.0.1. Connections through it are without TLS.
pub(crate) struct Proxy {
    port: u16,
    shared: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    flood: Option<Flood>,
    /// To each connection.
    injections: Vec<Sender<(String, Sender<()>)>>,
}

impl Proxy {
    pub(crate) fn start(server: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let shared = Arc::<Mutex<State>>::default();
        let serving = Arc::clone(&shared);
        thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let Ok(server) = TcpStream::connect(("127.0.0.1", server)) else { continue };
                let (sender, injections) = unbounded();
                serving.lock().injections.push(sender);
                let (from, to) = (client.try_clone().unwrap(), server.try_clone().unwrap());
                thread::spawn(move || pump(from, to));
                let state = Arc::clone(&serving);
                thread::spawn(move || answer(server, client, &state, &injections));
            }
        });
        Self { port, shared }
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// From now on all clients are flooded; with `None` the server is heard again, on connections that are left or new.
    pub(crate) fn flood(&self, flood: Option<Flood>) {
        self.shared.lock().flood = flood;
    }

    /// Runs a statement in each session, of which the client hears nothing.
    pub(crate) fn inject(&self, statement: &str) {
        let injections = std::mem::take(&mut self.shared.lock().injections);
        for injection in injections {
            let (done, ran) = bounded(1);
            // A connection may be over.
            if injection.send((statement.to_owned(), done)).is_ok() && ran.recv().is_ok() {
                self.shared.lock().injections.push(injection);
            }
        }
    }
}

fn pump(mut from: TcpStream, mut to: TcpStream) {
    let mut space = [0; 65_536];
    while let Ok(length @ 1..) = from.read(&mut space) {
        if to.write_all(&space[..length]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Both);
    let _ = from.shutdown(Shutdown::Both);
}

/// Takes what the server says to the client, message by message, or floods the client.
fn answer(
    mut server: TcpStream,
    mut client: TcpStream,
    state: &Mutex<State>,
    injections: &Receiver<(String, Sender<()>)>,
) {
    server.set_read_timeout(Some(Duration::from_millis(5))).unwrap();
    let mut flooding = None;
    loop {
        let flood = state.lock().flood;
        let outcome = match flood {
            Some(flood) => {
                let (first, next) = flood.bytes();
                let begun = flooding.replace(flood) == Some(flood);
                if flood == Flood::SlowNotices || next.is_empty() {
                    thread::sleep(Duration::from_micros(300));
                }
                client.write_all(if begun { &next } else { &first })
            }
            None => match injections.try_recv() {
                Ok((statement, done)) => {
                    let body = [statement.as_bytes(), b"\0"].concat();
                    let outcome = server.write_all(&message(b'Q', &body)).and_then(|()| {
                        while read_message(&mut server)?.is_none_or(|message| message[0] != b'Z') {}
                        Ok(())
                    });
                    let _ = done.send(());
                    outcome
                }
                Err(_) => read_message(&mut server)
                    .and_then(|message| message.map_or(Ok(()), |message| client.write_all(&message))),
            },
        };
        if outcome.is_err() {
            break;
        }
    }
    let _ = server.shutdown(Shutdown::Both);
    let _ = client.shutdown(Shutdown::Both);
}

/// A message of the server's; `None` if there is none now.
fn read_message(server: &mut TcpStream) -> std::io::Result<Option<Vec<u8>>> {
    let mut head = [0; 5];
    match server.peek(&mut head[..1]) {
        Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
        Ok(_) => {}
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => return Ok(None),
        Err(error) => return Err(error),
    }
    // The rest is on its way.
    server.set_read_timeout(None)?;
    server.read_exact(&mut head)?;
    let [_, length @ ..] = head;
    let mut message = head.to_vec();
    message.resize(u32::from_be_bytes(length) as usize + 1, 0);
    server.read_exact(&mut message[5..])?;
    server.set_read_timeout(Some(Duration::from_millis(5)))?;
    Ok(Some(message))
}
