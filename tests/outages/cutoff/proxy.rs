//! A TCP proxy that fails as networks do: it swallows what is sent, in one direction or both, while the sockets stay
//! open; or it closes them. Or it is slow, loses a connection on its way, or keeps an answer back.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar};
use std::thread;
use std::time::Duration;

use parking_lot::Mutex;
use support::netns::Direction;

/// A proxy in front of a server. Inward is towards the client, as in [`support::netns`], where the client is inside.
pub(crate) struct Proxy {
    shared: Arc<Shared>,
    address: SocketAddr,
}

struct Shared {
    server: SocketAddr,
    inward: Valve,
    outward: Valve,
    sockets: Mutex<Vec<TcpStream>>,
    over: AtomicBool,
    /// How long each piece takes in each direction, in milliseconds.
    delay: AtomicU64,
    swallows: AtomicBool,
    kept_back: KeptBack,
}

/// The answers of one connection, from a statement on.
#[derive(Default)]
struct KeptBack {
    /// What the statement has in it, as long as none has come.
    statement: Mutex<Option<&'static str>>,
    valve: Valve,
}

impl Proxy {
    /// In front of a server that listens on 127.0.0.1.
    pub(crate) fn to(port: u16) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            server: ([127, 0, 0, 1], port).into(),
            inward: Valve::default(),
            outward: Valve::default(),
            sockets: Mutex::default(),
            over: AtomicBool::new(false),
            delay: AtomicU64::new(0),
            swallows: AtomicBool::new(false),
            kept_back: KeptBack::default(),
        });
        let served = Arc::clone(&shared);
        thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                if served.over.load(Ordering::SeqCst) {
                    return;
                }
                let shared = Arc::clone(&served);
                thread::spawn(move || shared.serve(client));
            }
        });
        Self { shared, address }
    }

    pub(crate) fn port(&self) -> u16 {
        self.address.port()
    }

    /// From here on nothing gets through, the end of a connection included. What is sent meanwhile is kept, as a sender
    /// does that gets no acknowledgement.
    pub(crate) fn cut(&self, direction: Direction) {
        self.shared.valves(direction).for_each(Valve::shut);
    }

    /// What was kept gets through, and all that follows.
    pub(crate) fn restore(&self) {
        self.shared.valves(Direction::Both).for_each(Valve::open);
    }

    /// From here on each piece takes as long, in each direction.
    pub(crate) fn slow_down(&self, delay: Duration) {
        self.shared.delay.store(delay.as_millis().try_into().unwrap(), Ordering::SeqCst);
    }

    /// The next connection is taken, and that is all that becomes of it.
    pub(crate) fn swallow_next(&self) {
        self.shared.swallows.store(true, Ordering::SeqCst);
    }

    pub(crate) fn has_swallowed(&self) -> bool {
        !self.shared.swallows.load(Ordering::SeqCst)
    }

    /// The answer to the next statement with that in it is kept back, and whatever follows on its connection.
    pub(crate) fn keep_answer_back(&self, statement: &'static str) {
        self.shared.kept_back.valve.shut();
        *self.shared.kept_back.statement.lock() = Some(statement);
    }

    pub(crate) fn keeps_answer_back(&self) -> bool {
        self.shared.kept_back.statement.lock().is_none()
    }

    pub(crate) fn give_answer(&self) {
        self.shared.kept_back.valve.open();
    }

    /// Ends all connections. New ones are taken.
    pub(crate) fn close_all(&self) {
        for socket in self.shared.sockets.lock().drain(..) {
            // It may be closed by now.
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::SeqCst);
        self.restore();
        self.give_answer();
        self.close_all();
        // Lets the listener's thread see that it is over.
        let _ = TcpStream::connect(self.address);
    }
}

impl Shared {
    fn valves(&self, direction: Direction) -> impl Iterator<Item = &Valve> {
        let inward = (direction != Direction::Outward).then_some(&self.inward);
        let outward = (direction != Direction::Inward).then_some(&self.outward);
        inward.into_iter().chain(outward)
    }

    fn serve(self: Arc<Self>, client: TcpStream) {
        if self.swallows.swap(false, Ordering::SeqCst) {
            return self.sockets.lock().push(client);
        }
        // To the server only when a byte may get there: behind a cut it hears nothing of a new connection.
        let mut first = [0];
        if !matches!(client.peek(&mut first), Ok(1)) || !self.outward.pass(|| true) {
            return;
        }
        let Ok(server) = TcpStream::connect(self.server) else { return };
        for socket in [&client, &server] {
            socket.set_nodelay(true).unwrap();
            self.sockets.lock().push(socket.try_clone().unwrap());
        }
        let (from_client, to_client) = (client.try_clone().unwrap(), client);
        let (from_server, to_server) = (server.try_clone().unwrap(), server);
        let outward = Arc::clone(&self);
        let is_kept_back = Arc::new(AtomicBool::new(false));
        let keeps = Arc::clone(&is_kept_back);
        thread::spawn(move || {
            outward.pump(from_client, to_server, &outward.outward, |piece| {
                let has_it = |statement: &mut &str| {
                    piece.windows(statement.len()).any(|text| text == statement.as_bytes())
                };
                if outward.kept_back.statement.lock().take_if(has_it).is_some() {
                    keeps.store(true, Ordering::SeqCst);
                }
            });
        });
        self.pump(from_server, to_client, &self.inward, |_| {
            if is_kept_back.load(Ordering::SeqCst) {
                self.kept_back.valve.pass(|| true);
            }
        });
    }

    /// Carries bytes, and at last the end of them, through a valve, each piece after a look at it.
    fn pump(&self, mut from: TcpStream, mut to: TcpStream, valve: &Valve, look: impl Fn(&[u8])) {
        let mut buffer = [0; 16 * 1024];
        loop {
            let count = match from.read(&mut buffer) {
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(_) => 0,
            };
            look(&buffer[..count]);
            thread::sleep(Duration::from_millis(self.delay.load(Ordering::SeqCst)));
            let goes_on = valve.pass(|| count > 0 && to.write_all(&buffer[..count]).is_ok());
            if !goes_on {
                valve.pass(|| to.shutdown(Shutdown::Write).is_ok());
                return;
            }
        }
    }
}

/// Lets pieces through, or keeps them until it is opened.
#[derive(Default)]
struct Valve {
    state: std::sync::Mutex<ValveState>,
    changed: Condvar,
}

#[derive(Default)]
struct ValveState {
    shut: bool,
    passing: usize,
}

impl Valve {
    fn pass(&self, work: impl FnOnce() -> bool) -> bool {
        let mut state = self.state.lock().unwrap();
        while state.shut {
            state = self.changed.wait(state).unwrap();
        }
        state.passing += 1;
        drop(state);
        let outcome = work();
        self.state.lock().unwrap().passing -= 1;
        self.changed.notify_all();
        outcome
    }

    /// When this returns, nothing is on its way any more.
    fn shut(&self) {
        let mut state = self.state.lock().unwrap();
        state.shut = true;
        while state.passing > 0 {
            state = self.changed.wait(state).unwrap();
        }
    }

    fn open(&self) {
        self.state.lock().unwrap().shut = false;
        self.changed.notify_all();
    }
}
