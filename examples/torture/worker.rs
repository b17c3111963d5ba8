//! One of the processes that fight for the keys, and the work that it does while it holds one.

use std::error::Error;
use std::io::{self, Write};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{RecvTimeoutError, select};
use dsync::{Config, Context, ErrorKind, Lock, Loss, PostgresManager, SyncManager, Term};
use fastrand::Rng;
use parking_lot::Mutex;
use postgres::{Client, NoTls};
use support::process;

use crate::report::{KEYS, Moment, Report, Usage, What, moment, now};

/// Threads of one process.
pub(crate) const THREADS: usize = 4;

/// Short, so that many a frozen process outlives its lease.
pub(crate) const LEASE: Duration = Duration::from_secs(2);

/// Keeps the locks apart from others in the same database.
pub(crate) const NAMESPACE: &str = "torture";

/// What `release` and `stop` may take: the default of the library.
const RELEASE: Duration = Duration::from_secs(2);

/// What the one attempt of a guard may take: the time to connect, of 5 s, and that of a heartbeat.
const ATTEMPT: Duration = Duration::from_secs(6);

/// How long a thread waits for the channel of a term that is over by the clock.
const SIGNAL: Duration = Duration::from_secs(5);

/// How long the threads of r2d2's pool may take to end: they do so by themselves, when they look after its sessions
/// the next time, which is every 30 s.
const AFTERMATH: Duration = Duration::from_secs(40);

type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

/// Fights until standard input ends.
pub(crate) fn run(worker: usize, url: &str, seed: u64) -> Outcome<()> {
    // Others may have left a line unfinished.
    writeln!(io::stdout())?;
    let before = usage();
    tell(What::Before(before))?;
    let stop = until_the_parent_is_gone()?;
    fight(worker, url, seed, &stop)?;
    // Whatever is still there at the end is what the referee is told.
    let _ = support::wait_for("what the manager had", AFTERMATH, || (usage() == before).then_some(()));
    Ok(tell(What::After(usage()))?)
}

fn usage() -> Usage {
    let own = process::own();
    Usage {
        threads: process::threads(own).unwrap_or_default(),
        descriptors: process::descriptors(own).unwrap_or_default(),
    }
}

fn fight(worker: usize, url: &str, seed: u64, stop: &Context) -> Outcome<()> {
    let mut address: postgres::Config = url.parse()?;
    address.application_name(&format!("torture-{worker}"));
    // Slices so short that their ends race with grants, faults and releases.
    let config = Config::from_postgres(address.clone())
        .namespace(NAMESPACE)
        .lease(LEASE)
        .wait_slice(Duration::from_millis(300))
        .release_timeout(RELEASE);
    let manager = PostgresManager::new(config)?;
    manager.start()?;
    // The threads of a process share its claim on a key, so those that want that take turns. Guards keep them apart.
    let seats = KEYS
        .iter()
        .enumerate()
        .map(|(key, name)| Ok(Seat { key, lock: manager.lock(*name)?, claimed: Mutex::new(()) }));
    let seats = seats.collect::<dsync::Result<Vec<_>>>()?;
    address.application_name(&format!("work-{worker}")).connect_timeout(Duration::from_secs(2));
    let mut rng = Rng::with_seed(seed);
    let outcomes: Vec<Outcome<()>> = thread::scope(|scope| {
        let fighters: Vec<_> = (0..THREADS)
            .map(|_| {
                let writer = Writer { address: address.clone(), client: None };
                let mut fighter = Fighter { stop, rng: rng.fork(), writer };
                let seats = &seats;
                scope.spawn(move || fighter.fight(seats))
            })
            .collect();
        let joined = fighters.into_iter().map(|fighter| fighter.join());
        joined.map(|outcome| outcome.unwrap_or_else(|_| Err("a thread panicked".into()))).collect()
    });
    let began = Instant::now();
    let outcome = manager.stop();
    returned("stop", &outcome, began, RELEASE)?;
    outcomes.into_iter().collect()
}

/// One key in this process.
struct Seat {
    key: usize,
    lock: Arc<dyn Lock>,
    /// Whoever has the claim.
    claimed: Mutex<()>,
}

struct Fighter<'a> {
    stop: &'a Context,
    rng: Rng,
    writer: Writer,
}

#[derive(PartialEq, Eq)]
enum Ended {
    Finished,
    Lost,
}

impl Fighter<'_> {
    fn fight(&mut self, seats: &[Seat]) -> Outcome<()> {
        while self.stop.check().is_ok() {
            let seat = &seats[self.rng.usize(..seats.len())];
            if self.rng.u8(..3) == 0 {
                let claimed = seat.claimed.lock();
                self.claim(seat)?;
                drop(claimed);
            } else {
                self.guard(seat)?;
            }
            thread::sleep(self.millis(0..20));
        }
        Ok(())
    }

    /// One guard, from the attempt to the release.
    fn guard(&mut self, seat: &Seat) -> Outcome<()> {
        let began = Instant::now();
        let outcome = if self.rng.bool() {
            let patience = self.millis(0..2000);
            let outcome = seat.lock.acquire(self.stop.with_timeout(patience)).map(Some);
            // An attempt that failed has released its claim as well.
            returned("acquire", &outcome, began, patience.max(ATTEMPT) + RELEASE)?;
            outcome
        } else {
            let outcome = seat.lock.try_acquire();
            returned("try_acquire", &outcome, began, ATTEMPT + RELEASE)?;
            outcome
        };
        let guard = match outcome {
            Ok(Some(guard)) => guard,
            Ok(None) => return Ok(tell(What::Missed { error: "taken".to_owned() })?),
            Err(error) => return Ok(tell(What::Missed { error: format!("{:?}", error.kind()) })?),
        };
        self.serve(seat, guard.term(), || guard.loss())?;
        let began = Instant::now();
        if self.rng.bool() {
            let outcome = guard.release();
            returned("release of a guard", &outcome, began, RELEASE)?;
        } else {
            drop(guard);
            returned("drop of a guard", &Ok(()), began, RELEASE)?;
        }
        Ok(())
    }

    /// One claim, from the first attempt to the release.
    fn claim(&mut self, seat: &Seat) -> Outcome<()> {
        let began = Instant::now();
        let (name, patience, outcome) = if self.rng.bool() {
            let patience = self.millis(20..2000);
            ("lock", patience, seat.lock.lock(&self.stop.with_timeout(patience)))
        } else {
            let patience = self.millis(20..500);
            ("try_lock", patience, seat.lock.try_lock(&self.stop.with_timeout(patience)))
        };
        returned(name, &outcome, began, patience)?;
        match &outcome {
            Err(error) => tell(What::Missed { error: format!("{:?}", error.kind()) })?,
            Ok(()) => {
                while let Some(term) = seat.lock.term()
                    && self.serve(seat, &term, || seat.lock.last_loss())? == Ended::Lost
                    && self.rng.u8(..3) > 0
                {
                    // The claim goes on in the background, unless it is given up, one time in three.
                    let began = Instant::now();
                    let outcome = seat.lock.lock(&self.stop.with_timeout(Duration::from_secs(2)));
                    returned("relock", &outcome, began, Duration::from_secs(2))?;
                }
            }
        }
        let began = Instant::now();
        let outcome = seat.lock.release();
        Ok(returned("release", &outcome, began, RELEASE)?)
    }

    /// One term: works or idles for a while, unless it is lost before.
    fn serve(&mut self, seat: &Seat, term: &Term, loss: impl Fn() -> Option<Loss>) -> Outcome<Ended> {
        let key = seat.key;
        let begun = now();
        // Lost already?
        let Some(token) = term.token().filter(|_| term.is_held()) else { return Ok(Ended::Lost) };
        tell(What::Begun { key, token })?;
        // Some wait for the loss, since a claim without a thread that works is watched all the same.
        let idle = self.rng.u8(..30) == 0;
        let end = Instant::now() + if idle { self.millis(500..2500) } else { self.millis(1..50) };
        loop {
            let at = now();
            if !term.is_held() {
                let reason = reason(&loss, term, begun);
                let (at, reason) = reason.map_or((at, None), |(heard, name)| (heard.min(at), Some(name)));
                tell_at(at, What::Lost { key, token, reason })?;
                return Ok(Ended::Lost);
            }
            if Instant::now() >= end || self.stop.check().is_err() {
                tell_at(at, What::Released { key, token })?;
                return Ok(Ended::Finished);
            }
            if !idle {
                self.writer.unit(key, token, term)?;
            }
            let pause = if idle { end.saturating_duration_since(Instant::now()) } else { self.millis(0..8) };
            select! {
                recv(term.lost()) -> _ => {}
                recv(self.stop.cancelled()) -> _ => {}
                default(pause) => {}
            }
        }
    }

    fn millis(&mut self, range: std::ops::Range<u64>) -> Duration {
        Duration::from_millis(self.rng.u64(range))
    }
}

/// When the term was lost, and why, once its channel says so. `None` if it does not, or if nothing is known of that
/// loss.
fn reason(loss: &impl Fn() -> Option<Loss>, term: &Term, begun: Moment) -> Option<(Moment, String)> {
    match term.lost().recv_timeout(SIGNAL) {
        Err(RecvTimeoutError::Disconnected) => {}
        Err(RecvTimeoutError::Timeout) => return None,
    }
    let loss = loss()?;
    let at = moment(loss.at);
    // Not the loss of an earlier term.
    (at >= begun).then(|| (at, format!("{:?}", loss.reason)))
}

/// Writes what a thread does. It has a connection of its own: the sessions of the locks are the library's.
struct Writer {
    address: postgres::Config,
    client: Option<Client>,
}

impl Writer {
    /// One unit of work behind the fence. That it fails is no reason to stop; that it cannot be told is.
    fn unit(&mut self, key: usize, token: i64, term: &Term) -> Outcome<()> {
        let outcome = self.transaction(key, token, term);
        match outcome {
            Ok(()) => tell(What::Committed { key })?,
            Err(error) if is_lost(&*error) => tell(What::Refused { key })?,
            Err(_) => {
                self.client = None;
                tell(What::Failed { key })?;
            }
        }
        Ok(())
    }

    fn transaction(&mut self, key: usize, token: i64, term: &Term) -> Outcome<()> {
        let client = match &mut self.client {
            Some(client) => client,
            none => none.insert(self.address.connect(NoTls)?),
        };
        let mut transaction = client.transaction()?;
        term.fence(&mut transaction)?;
        // Read and then written, on purpose: if the fence let two in at once, an addition would be missing.
        let name = KEYS[key];
        let row = transaction.query_one("SELECT value FROM torture_counter WHERE key = $1", &[&name])?;
        let value = row.try_get::<_, i64>(0)? + 1;
        transaction.execute("UPDATE torture_counter SET value = $2 WHERE key = $1", &[&name, &value])?;
        transaction.execute(
            "INSERT INTO torture_log (key, token, value) VALUES ($1, $2, $3)",
            &[&name, &token, &value],
        )?;
        tell(What::Commits { key, token })?;
        Ok(transaction.commit()?)
    }
}

fn is_lost(error: &(dyn Error + Send + Sync + 'static)) -> bool {
    error.downcast_ref::<dsync::Error>().is_some_and(|error| error.kind() == ErrorKind::Lost)
}

/// A context that is cancelled when standard input ends: the parent closes it, or is dead.
fn until_the_parent_is_gone() -> io::Result<Context> {
    let (context, canceller) = Context::background().with_cancel();
    thread::Builder::new().name("stdin".to_owned()).spawn(move || {
        // An error is an end too.
        let _ = io::copy(&mut io::stdin().lock(), &mut io::sink());
        canceller.cancel();
    })?;
    Ok(context)
}

fn returned<T>(call: &str, outcome: &dsync::Result<T>, began: Instant, limit: Duration) -> io::Result<()> {
    let outcome = outcome.as_ref().map_or_else(|error| format!("{:?}", error.kind()), |_| "ok".to_owned());
    tell(What::Returned { call: call.to_owned(), outcome, took: began.elapsed(), limit })
}

fn tell(what: What) -> io::Result<()> {
    tell_at(now(), what)
}

/// Not `println!`, which panics when nobody listens any more.
fn tell_at(at: Moment, what: What) -> io::Result<()> {
    let line = format!("{}\n", Report { at, what });
    let mut out = io::stdout().lock();
    out.write_all(line.as_bytes())?;
    out.flush()
}
