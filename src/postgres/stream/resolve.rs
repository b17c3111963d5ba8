//! Host names to addresses, in bounded time and with a bounded number of threads.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::convert::Infallible;
use std::error::Error;
use std::fmt;
use std::io;
use std::net::{IpAddr, ToSocketAddrs};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use parking_lot::{Mutex, MutexGuard};

use super::control::StreamControl;
use crate::process::PerProcess;

/// How soon a kill is noticed while a name is being resolved.
const SLICE: Duration = Duration::from_millis(20);

type Outcome = Result<Vec<IpAddr>, Arc<io::Error>>;

/// A look-up that is under way.
struct LookUp {
    outcome: OnceLock<Outcome>,
    /// Closed as soon as there is an outcome.
    done: Receiver<Infallible>,
}

type LookUps = HashMap<String, Arc<LookUp>>;

/// One for each name at the most, in the whole process: the system's resolver can hang for minutes and cannot be
/// interrupted, so each look-up has a thread, which is left to itself when the time is up.
fn under_way() -> MutexGuard<'static, LookUps> {
    static UNDER_WAY: PerProcess<Mutex<LookUps>> = PerProcess::new();
    UNDER_WAY.get(|_| Mutex::default()).lock()
}

/// The addresses of a host name, at least one; not later than `by`.
///
/// Whoever asks for a name that is being looked up waits for the answer of that look-up.
pub(super) fn resolve(name: &str, control: &StreamControl, by: Instant) -> Result<Vec<IpAddr>, BoxedError> {
    resolve_with(name, control, by, |name| {
        let mut addresses: Vec<IpAddr> = Vec::new();
        for address in (name, 0).to_socket_addrs()? {
            if !addresses.contains(&address.ip()) {
                addresses.push(address.ip());
            }
        }
        Ok(addresses)
    })
}

fn resolve_with(
    name: &str,
    control: &StreamControl,
    by: Instant,
    resolver: impl FnOnce(&str) -> io::Result<Vec<IpAddr>> + Send + 'static,
) -> Result<Vec<IpAddr>, BoxedError> {
    if let Ok(ip) = name.parse() {
        return Ok(vec![ip]);
    }
    let begun = Instant::now();
    let look_up = look_up(name, resolver)?;
    loop {
        match look_up.outcome.get() {
            Some(Ok(addresses)) if addresses.is_empty() => return Err("the host name has no address".into()),
            Some(Ok(addresses)) => return Ok(addresses.clone()),
            Some(Err(error)) => return Err(Arc::clone(error).into()),
            None => {}
        }
        if let Some(ended) = control.ended() {
            return Err(ended.into_io().into());
        }
        let now = Instant::now();
        if now >= by {
            return Err(Unanswered(now - begun).into());
        }
        let _ = look_up.done.recv_deadline(by.min(now + SLICE));
    }
}

/// The look-up of a name that is under way, or a new one.
fn look_up(
    name: &str,
    resolver: impl FnOnce(&str) -> io::Result<Vec<IpAddr>> + Send + 'static,
) -> io::Result<Arc<LookUp>> {
    let (_done, done) = bounded(0);
    let look_up = match under_way().entry(name.to_owned()) {
        Entry::Occupied(entry) => return Ok(Arc::clone(entry.get())),
        Entry::Vacant(entry) => Arc::clone(entry.insert(Arc::new(LookUp { outcome: OnceLock::new(), done }))),
    };
    let ending = Ending { name: name.to_owned(), look_up: Arc::clone(&look_up), _done };
    thread::Builder::new().name("dsync-resolve".into()).spawn(move || {
        let outcome = resolver(&ending.name);
        let _ = ending.look_up.outcome.set(outcome.map_err(Arc::new));
    })?;
    Ok(look_up)
}

/// Ends a look-up when dropped: with its thread, or because there is no thread to be had.
struct Ending {
    name: String,
    look_up: Arc<LookUp>,
    _done: Sender<Infallible>,
}

impl Drop for Ending {
    fn drop(&mut self) {
        // First off the list, so that nobody joins one that is over.
        under_way().remove(&self.name);
        let unanswered = || Err(Arc::new(io::Error::other("the look-up of the host name failed")));
        self.look_up.outcome.get_or_init(unanswered);
    }
}

type BoxedError = Box<dyn Error + Send + Sync>;

/// No name server has answered yet.
#[derive(Debug)]
struct Unanswered(Duration);

impl fmt::Display for Unanswered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "no name server answered within {:.1?}", self.0)
    }
}

impl Error for Unanswered {}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc;

    use super::*;

    fn in_(milliseconds: u64) -> Instant {
        Instant::now() + Duration::from_millis(milliseconds)
    }

    #[test]
    fn a_silent_name_server_costs_one_thread_a_name_and_each_caller_its_own_time_only() {
        static CALLS: AtomicUsize = AtomicUsize::new(0);
        let name = "silent.example";
        let (answer, question) = mpsc::channel::<io::Result<Vec<IpAddr>>>();
        let control = StreamControl::new();
        let mut silent = Some(move |_: &str| {
            CALLS.fetch_add(1, Ordering::SeqCst);
            question.recv().unwrap()
        });
        for _ in 0..5 {
            let begun = Instant::now();
            let error = match silent.take() {
                Some(silent) => resolve_with(name, &control, in_(50), silent),
                None => resolve_with(name, &control, in_(50), |_| {
                    CALLS.fetch_add(1, Ordering::SeqCst);
                    Ok(Vec::new())
                }),
            };
            let error = error.unwrap_err().to_string();
            assert!(error.contains("no name server answered within"), "{error}");
            assert!(begun.elapsed() >= Duration::from_millis(50));
        }
        let killed = StreamControl::new();
        killed.kill();
        assert!(resolve_with(name, &killed, in_(60_000), |_| Ok(Vec::new())).is_err());
        // Its thread may begin late.
        while CALLS.load(Ordering::SeqCst) == 0 {
            thread::yield_now();
        }
        assert_eq!(CALLS.load(Ordering::SeqCst), 1, "one look-up is under way");

        // Who waits has the answer of the look-up that another one began.
        let address: IpAddr = "192.0.2.1".parse().unwrap();
        thread::scope(|scope| {
            let waiter =
                scope.spawn(|| resolve_with(name, &control, in_(60_000), |_| Ok(Vec::new())).unwrap());
            let waits = || {
                let under_way = under_way();
                let look_up = under_way.get(name);
                look_up.is_some_and(|look_up| Arc::strong_count(look_up) > 2)
            };
            while !waits() {
                thread::yield_now();
            }
            answer.send(Ok(vec![address])).unwrap();
            assert_eq!(waiter.join().unwrap(), [address]);
        });
        // Then the next one asks anew.
        let other: IpAddr = "192.0.2.2".parse().unwrap();
        let again = || resolve_with(name, &control, in_(60_000), move |_| Ok(vec![other])).unwrap();
        while again() != [other] {
            thread::yield_now();
        }
    }

    #[test]
    fn a_resolver_that_panics_is_an_error() {
        let outcome = resolve_with("panic.example", &StreamControl::new(), in_(60_000), |_| panic!("no"));
        assert!(outcome.unwrap_err().to_string().contains("look-up"));
    }
}
