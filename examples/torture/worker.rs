//! One of the processes that fight for the keys, and the work that it does while it holds one.

use std::convert::Infallible;
use std::error::Error;
use std::io::{self, Write};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
use std::{iter, panic, thread};

use crossbeam_channel::{Receiver, RecvTimeoutError, select, unbounded};
use dsync::{
    Config, Context, ErrorKind, Leader, LeaderEvent, LeaderOptions, Lock, Loss, PostgresManager, SyncManager,
    TakeoverPolicy, Tenure, Term,
};
use fastrand::Rng;
use parking_lot::Mutex;
use postgres::{Client, NoTls, Transaction};
use support::process;

use crate::report::{
    Holder, Id, KEYS, LED, LOCKS, Moment, PERMITS, Report, SEMAPHORE, Usage, What, moment, now,
};

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

/// What a question to the server may take: three times the time to connect, of 5 s, and that of a heartbeat.
const QUESTION: Duration = Duration::from_secs(16);

/// What the closure of a leader may take until it returns: the longest term, of 2.5 s, and a unit of work whose connection
/// takes its time, of 2 s.
const LEAVES: Duration = Duration::from_secs(5);

/// The SQLSTATE by which the catalog's function `fence` says that a later term has begun.
const OVER: &str = "ZDF01";

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
        // The strictest: so a restart of the server excuses no overlap but of its last moment.
        .takeover(TakeoverPolicy::AfterAnyRestart)
        .wait_slice(Duration::from_millis(300))
        .release_timeout(RELEASE)
        // Every second process has its locks on one session, as far as it need not wait for them.
        .shared_sessions(u32::from(worker % 2 == 1));
    let manager = PostgresManager::new(config)?;
    manager.start()?;
    // The threads of a process share its claim on a key, so those that want that take turns. Guards keep them apart, but for readers.
    let seats = KEYS[..LOCKS].iter().enumerate().map(|(key, name)| {
        let (lock, shared) = (manager.lock(*name)?, manager.shared_lock(*name)?);
        Ok(Seat { key, lock, shared, claimed: Mutex::new(()) })
    });
    let seats = seats.collect::<dsync::Result<Vec<_>>>()?;
    let permits = Permits { semaphore: manager.semaphore(SEMAPHORE, PERMITS)?, claimed: Mutex::new(()) };
    address.application_name(&format!("work-{worker}")).connect_timeout(Duration::from_secs(2));
    let mut rng = Rng::with_seed(seed);
    let mut fighter = || {
        let writer = Writer { address: address.clone(), client: None };
        Fighter { stop: stop.clone(), rng: rng.fork(), writer, former: None }
    };
    let leaders = seats[..LED].iter().map(|seat| fighter().stand(seat));
    let leaders = leaders.collect::<dsync::Result<Vec<_>>>()?;
    let mut outcomes: Vec<Outcome<()>> = thread::scope(|scope| {
        let fighters: Vec<_> = (0..THREADS)
            .map(|_| {
                let (mut fighter, seats, permits, leaders) = (fighter(), &seats, &permits, &leaders);
                scope.spawn(move || fighter.fight(seats, permits, leaders))
            })
            .collect();
        let joined = fighters.into_iter().map(|fighter| fighter.join());
        joined.map(|outcome| outcome.unwrap_or_else(|_| Err("a thread panicked".into()))).collect()
    });
    for leader in leaders {
        let began = Instant::now();
        let outcome = leader.wait().stop(LEAVES + RELEASE);
        returned("leader-stop", &outcome, began, LEAVES + RELEASE)?;
        outcomes.push(outcome.map_err(Into::into));
    }
    let began = Instant::now();
    let outcome = manager.stop();
    returned("stop", &outcome, began, RELEASE)?;
    outcomes.into_iter().collect()
}

/// One key in this process.
struct Seat {
    key: usize,
    lock: Arc<dyn Lock>,
    /// The same for readers.
    shared: Arc<dyn Lock>,
    /// Whoever has the claim, of either: a process that claimed both would wait for itself.
    claimed: Mutex<()>,
}

/// The semaphore in this process.
struct Permits {
    semaphore: Arc<dyn Lock>,
    claimed: Mutex<()>,
}

/// A term of this process.
struct Held<'a> {
    key: usize,
    holder: Holder,
    term: &'a Term,
    /// `None` if the term has no token.
    id: Option<Id>,
    /// What a leader's closure goes by.
    tenure: Option<&'a Tenure>,
    /// Tells how the term was lost, which has begun at that moment.
    loss: &'a dyn Fn(Moment) -> Option<Loss>,
}

impl<'a> Held<'a> {
    /// One that is no leader's. The key of a permit is told by the term.
    fn new(key: usize, holder: Holder, term: &'a Term, loss: &'a dyn Fn(Moment) -> Option<Loss>) -> Self {
        let key = term.permit().map_or(key, |permit| LOCKS + permit as usize - 1);
        Self { key, holder, term, id: term.token().map(Id::new), tenure: None, loss }
    }

    /// Whether the work must stop: the term is lost, or its leader is told to stop.
    fn must_stop(&self) -> bool {
        self.tenure.map_or_else(|| !self.term.is_held(), Tenure::must_stop)
    }

    /// The channel that says so.
    fn stopping(&self) -> &Receiver<Infallible> {
        self.tenure.map_or_else(|| self.term.lost().channel(), Tenure::stopping)
    }
}

struct Fighter {
    stop: Context,
    rng: Rng,
    writer: Writer,
    /// The last term that this thread had as a reader.
    former: Option<Former>,
}

/// A reader's term that is over, or will be soon.
struct Former {
    key: usize,
    id: Id,
    fence_text: String,
}

#[derive(PartialEq, Eq)]
enum Ended {
    Finished,
    Lost,
}

impl Fighter {
    fn fight(&mut self, seats: &[Seat], permits: &Permits, leaders: &[Arc<OnceLock<Leader>>]) -> Outcome<()> {
        while self.stop.check().is_ok() {
            if self.rng.u8(..20) == 0 {
                let led = self.rng.usize(..LED);
                self.depose(&seats[led], leaders[led].wait())?;
            }
            let seat = seats.get(self.rng.usize(..seats.len() + 2));
            match (seat, self.rng.bool(), self.rng.u8(..3) == 0) {
                (None, _, false) => self.guard(LOCKS, &*permits.semaphore, Holder::PermitGuard)?,
                (None, _, true) => {
                    let claimed = permits.claimed.lock();
                    self.claim(LOCKS, &*permits.semaphore, Holder::PermitClaim)?;
                    drop(claimed);
                }
                (Some(seat), false, false) => self.guard(seat.key, &*seat.lock, Holder::Guard)?,
                (Some(seat), true, false) => self.guard(seat.key, &*seat.shared, Holder::ReaderGuard)?,
                (Some(seat), reads, true) => {
                    let claimed = seat.claimed.lock();
                    let (lock, holder) =
                        if reads { (&seat.shared, Holder::ReaderClaim) } else { (&seat.lock, Holder::Claim) };
                    self.claim(seat.key, &**lock, holder)?;
                    drop(claimed);
                }
            }
            if self.rng.u8(..4) == 0
                && let Some(former) = self.former.take()
            {
                self.writer.late_unit(&former)?;
            }
            thread::sleep(self.millis(0..20));
        }
        Ok(())
    }

    /// One guard, from the attempt to the release.
    fn guard(&mut self, key: usize, lock: &dyn Lock, holder: Holder) -> Outcome<()> {
        let began = Instant::now();
        let outcome = if self.rng.bool() {
            let patience = self.millis(0..2000);
            let outcome = lock.acquire(self.stop.with_timeout(patience)).map(Some);
            // An attempt that failed has released its claim as well.
            returned("acquire", &outcome, began, patience.max(ATTEMPT) + RELEASE)?;
            outcome
        } else {
            let outcome = lock.try_acquire();
            returned("try_acquire", &outcome, began, ATTEMPT + RELEASE)?;
            outcome
        };
        let guard = match outcome {
            Ok(Some(guard)) => guard,
            Ok(None) => return Ok(tell(What::Missed { error: "taken".to_owned() })?),
            Err(error) => return Ok(tell(What::Missed { error: format!("{:?}", error.kind()) })?),
        };
        self.serve(&Held::new(key, holder, guard.term(), &|_| guard.loss()))?;
        let began = Instant::now();
        if self.rng.bool() {
            let outcome = guard.release();
            returned("guard-release", &outcome, began, RELEASE)?;
        } else {
            drop(guard);
            returned("guard-drop", &Ok(()), began, RELEASE)?;
        }
        Ok(())
    }

    /// One claim, from the first attempt to the release.
    fn claim(&mut self, key: usize, lock: &dyn Lock, holder: Holder) -> Outcome<()> {
        let began = Instant::now();
        let (name, patience, outcome) = if self.rng.bool() {
            let patience = self.millis(20..2000);
            ("lock", patience, lock.lock(&self.stop.with_timeout(patience)))
        } else {
            let patience = self.millis(20..500);
            ("try_lock", patience, lock.try_lock(&self.stop.with_timeout(patience)))
        };
        returned(name, &outcome, began, patience)?;
        match &outcome {
            Err(error) => tell(What::Missed { error: format!("{:?}", error.kind()) })?,
            Ok(()) => {
                let loss = |_| lock.last_loss();
                while let Some(term) = lock.term()
                    && self.serve(&Held::new(key, holder, &term, &loss))? == Ended::Lost
                    && self.rng.u8(..3) > 0
                {
                    // The claim goes on in the background, unless it is given up, one time in three.
                    let began = Instant::now();
                    let outcome = lock.lock(&self.stop.with_timeout(Duration::from_secs(2)));
                    returned("relock", &outcome, began, Duration::from_secs(2))?;
                }
            }
        }
        let began = Instant::now();
        let outcome = lock.release();
        Ok(returned("release", &outcome, began, RELEASE)?)
    }

    /// Leads again and again, until the leader is stopped.
    fn stand(mut self, seat: &Seat) -> dsync::Result<Arc<OnceLock<Leader>>> {
        let (key, leader) = (seat.key, Arc::<OnceLock<Leader>>::default());
        let (tell_loss, losses) = unbounded();
        let options = LeaderOptions::new()
            .stand_back(Duration::from_millis(20))
            .back_off(Duration::from_millis(5), Duration::from_millis(50))
            .watch_interval(Duration::from_millis(500))
            .on_event(move |event| {
                // Neither can be told when nobody listens any more.
                if let LeaderEvent::Lost(loss) = event {
                    let _ = tell_loss.send(loss.clone());
                }
                let _ = tell(What::Heard { event: name_of(event) });
            });
        let own = Arc::clone(&leader);
        let work = move |tenure: &Tenure| {
            // Fails when nobody listens any more, and then standard input has ended.
            let _ = self.lead(key, tenure, own.wait(), &losses);
            if self.rng.u8(..50) == 0 {
                // Without the message of the panic hook.
                panic::resume_unwind(Box::new("a panic now and then"));
            }
        };
        // It has not been set before.
        let _ = leader.set(Leader::start_with(Arc::clone(&seat.lock), options, work)?);
        Ok(leader)
    }

    /// One term of a leader. If it is lost, goes on working for a while now and then: a mistake that the fence makes good.
    fn lead(&mut self, key: usize, tenure: &Tenure, leader: &Leader, losses: &Receiver<Loss>) -> Outcome<()> {
        let term = tenure.term();
        // One that comes after the closure of its term had returned is left from before.
        let next = || losses.recv_timeout(SIGNAL).ok();
        let loss = |begun| iter::from_fn(next).find(|loss| moment(loss.at) >= begun);
        let held = Held { tenure: Some(tenure), ..Held::new(key, Holder::Leader, term, &loss) };
        if self.serve(&held)? == Ended::Lost
            && self.rng.bool()
            && let Some(id) = held.id
        {
            let status = leader.status();
            tell(What::Ignores { key, id, shown: status.at_work && !status.leads })?;
            let end = Instant::now() + self.millis(1..200);
            while Instant::now() < end {
                self.writer.unit(&held, id)?;
                thread::sleep(self.millis(0..8));
            }
        }
        Ok(())
    }

    /// Makes the leader of this process step down, or the one that leads in whichever process.
    fn depose(&mut self, seat: &Seat, leader: &Leader) -> Outcome<()> {
        if self.rng.bool() {
            leader.step_down();
            return Ok(());
        }
        let began = Instant::now();
        let outcome = seat.lock.request_resignation();
        Ok(returned("request_resignation", &outcome, began, QUESTION)?)
    }

    /// One term: works or idles for a while, unless it is lost before, or must stop.
    fn serve(&mut self, held: &Held<'_>) -> Outcome<Ended> {
        let &Held { key, holder, term, .. } = held;
        let begun = now();
        // Lost already?
        let Some(id) = held.id.filter(|_| term.is_held()) else { return Ok(Ended::Lost) };
        tell(What::Begun { key, id, holder })?;
        if holder.is_reader() {
            self.former = term.fence_text().map(|fence_text| Former { key, id, fence_text });
        }
        // Some wait for the loss, since a claim without a thread that works is watched all the same. And one leader in eight
        // leads for so long that it can be asked to resign, of which it hears within a heartbeat. One reader in sixteen reads for so long
        // that others come to share.
        let idle = self.rng.u8(..30) == 0;
        let long = idle
            || match holder {
                Holder::Leader => self.rng.u8(..8) == 0,
                Holder::ReaderClaim | Holder::ReaderGuard => self.rng.u8(..16) == 0,
                Holder::Claim | Holder::Guard | Holder::PermitClaim | Holder::PermitGuard => false,
            };
        let end = Instant::now() + if long { self.millis(500..2500) } else { self.millis(1..50) };
        // Whoever is to step down may finish its work: nobody else leads before.
        let finishes = self.rng.bool();
        let mut believed = begun;
        loop {
            let at = now();
            let told = held.must_stop();
            if told && !term.is_held() {
                let reason = reason(held, begun);
                // It has believed in the term for as long as it was not told, whenever the library says that it told.
                let ended = |(heard, name): (Moment, _)| (heard.max(believed).min(at), Some(name));
                let (at, reason) = reason.map_or((at, None), ended);
                tell_at(at, What::Lost { key, id, reason })?;
                return Ok(Ended::Lost);
            }
            believed = at;
            if Instant::now() >= end || told && !finishes || self.stop.check().is_err() {
                tell_at(at, What::Released { key, id })?;
                return Ok(Ended::Finished);
            }
            if !idle {
                self.writer.unit(held, id)?;
            }
            let pause = if idle { end.saturating_duration_since(Instant::now()) } else { self.millis(0..8) };
            let stopping = if told { term.lost().channel() } else { held.stopping() };
            select! {
                recv(stopping) -> _ => {}
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
fn reason(held: &Held<'_>, begun: Moment) -> Option<(Moment, String)> {
    match held.stopping().recv_timeout(SIGNAL) {
        Err(RecvTimeoutError::Disconnected) => {}
        Err(RecvTimeoutError::Timeout) => return None,
    }
    let loss = (held.loss)(begun)?;
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
    fn unit(&mut self, held: &Held<'_>, id: Id) -> Outcome<()> {
        let (key, reads) = (held.key, held.holder.is_reader());
        let outcome = self.transaction(key, id, reads, |transaction| Ok(held.term.fence(transaction)?));
        self.tell_outcome(
            outcome,
            key,
            if reads { What::Read { key } } else { What::Committed { key } },
            What::Refused { key },
        )
    }

    /// A unit of work after a reader's term: a mistake that the fence makes good when a writer's term has begun since. It is given by text,
    /// since the process knows that the term is over.
    fn late_unit(&mut self, former: &Former) -> Outcome<()> {
        let &Former { key, id, ref fence_text } = former;
        let outcome = self.transaction(key, id, true, |transaction| {
            transaction.execute("SELECT dsync.fence($1)", &[fence_text])?;
            Ok(())
        });
        self.tell_outcome(outcome, key, What::Read { key }, What::RefusedLate { key })
    }

    fn tell_outcome(&mut self, outcome: Outcome<()>, key: usize, done: What, refused: What) -> Outcome<()> {
        Ok(tell(match outcome {
            Ok(()) => done,
            Err(error) if is_lost(&*error) => refused,
            Err(_) => {
                self.client = None;
                What::Failed { key }
            }
        })?)
    }

    fn transaction(
        &mut self,
        key: usize,
        id: Id,
        reads: bool,
        fence: impl FnOnce(&mut Transaction<'_>) -> Outcome<()>,
    ) -> Outcome<()> {
        let client = match &mut self.client {
            Some(client) => client,
            none => none.insert(self.address.connect(NoTls)?),
        };
        let mut transaction = client.transaction()?;
        fence(&mut transaction)?;
        // Read and then written, on purpose: if the fence let two in at once, an addition would be missing, or a reader would read what is
        // old by the time that it writes it down.
        let name = KEYS[key];
        let row = transaction.query_one("SELECT value FROM torture_counter WHERE key = $1", &[&name])?;
        let mut value = row.try_get::<_, i64>(0)?;
        if !reads {
            value += 1;
            transaction.execute("UPDATE torture_counter SET value = $2 WHERE key = $1", &[&name, &value])?;
        }
        transaction.execute(
            "INSERT INTO torture_log (key, token, value, reads) VALUES ($1, $2, $3, $4)",
            &[&name, &id.token, &value, &reads],
        )?;
        tell(What::Commits { key, id })?;
        Ok(transaction.commit()?)
    }
}

fn is_lost(error: &(dyn Error + Send + Sync + 'static)) -> bool {
    error.downcast_ref::<dsync::Error>().is_some_and(|error| error.kind() == ErrorKind::Lost)
        || error
            .downcast_ref::<postgres::Error>()
            .is_some_and(|error| error.code().is_some_and(|code| code.code() == OVER))
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

/// The name of the event, without what is in it.
fn name_of(event: &LeaderEvent) -> String {
    let text = format!("{event:?}");
    text.split(|c: char| !c.is_alphanumeric()).next().unwrap_or_default().to_owned()
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
    // What the referee does not understand it does not judge.
    debug_assert!(Report::read(&line).is_some(), "{line}");
    let mut out = io::stdout().lock();
    out.write_all(line.as_bytes())?;
    out.flush()
}
