//! Does harm at random, from a seed, and undoes what must not stay.

use std::error::Error;
use std::thread;
use std::time::{Duration, Instant};

use fastrand::Rng;
use postgres::Client;
use support::{Frozen, Server, Shutdown};

use crate::crew::{Crew, Heard, WORKERS};
use crate::fault::{Fault, Hit, Kind};
use crate::referee::Referee;
use crate::report::{KEYS, Moment, NAME, now};
use crate::worker::NAMESPACE;

type Outcome<T> = Result<T, Box<dyn Error>>;

pub(crate) struct Chaos<'a> {
    server: &'a Server,
    pub(crate) crew: Crew<'a>,
    pub(crate) referee: Referee,
    rng: Rng,
    operator: Option<Client>,
    /// For each worker that is frozen when it thaws, and the number of the fault.
    frozen: [Option<(Instant, usize)>; WORKERS],
    server_frozen: Option<(Instant, usize, Frozen<'a>)>,
    /// When the server is restarted next: fast, and at once.
    restarts: [Instant; 2],
}

impl<'a> Chaos<'a> {
    pub(crate) fn new(server: &'a Server, crew: Crew<'a>, mut rng: Rng) -> Self {
        let restarts = [5_000, 12_000].map(|from| in_millis(rng.u64(from..from + 5_000)));
        Self {
            server,
            crew,
            referee: Referee::default(),
            rng,
            operator: None,
            frozen: [None; WORKERS],
            server_frozen: None,
            restarts,
        }
    }

    /// Does one kind of harm.
    pub(crate) fn strike(&mut self) -> Outcome<()> {
        if let Some(which) = self.restarts.iter().position(|at| *at <= Instant::now()) {
            self.restarts[which] = in_millis(self.rng.u64(20_000..35_000));
            return self.restart(which);
        }
        // While the server is frozen nobody can ask it for anything.
        let choice = if self.server_frozen.is_some() { self.rng.u8(60..90) } else { self.rng.u8(..100) };
        let worker = self.rng.usize(..WORKERS);
        match choice {
            0..25 => self.ask(|chaos| chaos.terminate(true)),
            25..40 => self.ask(|chaos| chaos.terminate(false)),
            40..60 => self.ask(Self::cancel),
            60..80 => self.freeze(worker),
            80..90 => self.kill(worker),
            _ => self.freeze_server(),
        }
    }

    /// Takes in what the workers say, and thaws what it is time to thaw.
    pub(crate) fn attend(&mut self) -> Outcome<()> {
        while let Ok(heard) = self.crew.heard().try_recv() {
            match heard {
                Heard::Report { worker, report } => self.referee.hear(worker, report),
                Heard::Left { worker, pid } if self.crew.is_missing(worker, pid) => {
                    self.referee.violation(format!("worker {worker} has ended, and nobody told it to"));
                }
                Heard::Left { .. } => {}
            }
        }
        let now = Instant::now();
        for worker in 0..WORKERS {
            if self.frozen[worker].is_some_and(|(at, _)| at <= now) {
                self.thaw(worker)?;
            }
        }
        if self.server_frozen.as_ref().is_some_and(|(at, ..)| *at <= now) {
            self.thaw_server();
        }
        Ok(())
    }

    /// Attends for a while.
    pub(crate) fn pass(&mut self, length: Duration) -> Outcome<()> {
        let end = Instant::now() + length;
        loop {
            self.attend()?;
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            thread::sleep(left.min(Duration::from_millis(10)));
        }
    }

    /// Undoes all that lasts.
    pub(crate) fn relent(&mut self) -> Outcome<()> {
        self.thaw_server();
        (0..WORKERS).try_for_each(|worker| self.thaw(worker))
    }

    /// The operator leaves, and the referee has the word.
    pub(crate) fn leave(self) -> Referee {
        self.referee
    }

    /// Lets the server show who holds what.
    pub(crate) fn sample(&mut self) {
        if self.server_frozen.is_none() {
            // It is only a look: an operator whose session is gone takes another one.
            let _ = self.ask(|chaos| {
                let from = now();
                let query = format!(
                    "SELECT {NAME} AS name, token, application_name, shared FROM dsync.locks AS held
                     WHERE namespace = $1 AND token IS NOT NULL ORDER BY name"
                );
                let rows = chaos.operator()?.query(&query, &[&NAMESPACE])?;
                let to = now();
                for row in rows {
                    let name: Option<&str> = row.try_get(2)?;
                    let (key, token, shared) = (row.try_get(0)?, row.try_get(1)?, row.try_get(3)?);
                    chaos.referee.sample(key, token, shared, name.unwrap_or_default(), from, to);
                }
                Ok(())
            });
        }
    }

    /// Does something with the operator's session, which is given up if it fails.
    fn ask(&mut self, what: impl FnOnce(&mut Self) -> Outcome<()>) -> Outcome<()> {
        let outcome = what(self);
        if outcome.is_err() {
            self.operator = None;
        }
        outcome
    }

    fn operator(&mut self) -> Outcome<&mut Client> {
        match &mut self.operator {
            Some(client) => Ok(client),
            none => Ok(none.insert(self.server.client()?)),
        }
    }

    fn terminate(&mut self, holder: bool) -> Outcome<()> {
        let query = format!(
            "SELECT activity.pid, activity.application_name, {NAME}, held.token, held.shared
             FROM pg_stat_activity AS activity LEFT JOIN dsync.locks AS held ON held.pid = activity.pid
             WHERE activity.application_name LIKE 'torture-%' AND (NOT $1 OR held.token IS NOT NULL)"
        );
        let rows = self.operator()?.query(&query, &[&holder])?;
        let Some(row) = self.rng.choice(&rows) else { return Ok(()) };
        let name: &str = row.try_get(1)?;
        let worker = name.split(['-', ' ']).nth(1).and_then(|place| place.parse().ok());
        let key =
            row.try_get::<_, Option<&str>>(2)?.and_then(|key| KEYS.iter().position(|name| *name == key));
        let token: Option<i64> = row.try_get(3)?;
        let from = now();
        let done: bool = self
            .operator()?
            .query_one("SELECT pg_terminate_backend($1)", &[&row.try_get::<_, i32>(0)?])?
            .try_get(0)?;
        if done {
            let kind = if holder { Kind::TerminateHolder } else { Kind::TerminateAny };
            let hit = worker.map_or(Hit::All, Hit::Worker);
            // A reader's token does not tell which of several terms it was.
            let shared = row.try_get::<_, Option<bool>>(4)? == Some(true);
            let term = key.zip(token).filter(|_| holder && !shared);
            self.referee.inflict(Fault { kind, hit, term, from, to: now() });
        }
        Ok(())
    }

    fn cancel(&mut self) -> Outcome<()> {
        let rows = self.operator()?.query(
            "SELECT pid FROM pg_stat_activity
             WHERE state = 'active' AND (application_name LIKE 'torture-%' OR application_name LIKE 'work-%')",
            &[],
        )?;
        let Some(row) = self.rng.choice(&rows) else { return Ok(()) };
        let from = now();
        let done: bool = self
            .operator()?
            .query_one("SELECT pg_cancel_backend($1)", &[&row.try_get::<_, i32>(0)?])?
            .try_get(0)?;
        if done {
            let fault = Fault { kind: Kind::Cancel, hit: Hit::All, term: None, from, to: now() };
            self.referee.inflict(fault);
        }
        Ok(())
    }

    fn freeze(&mut self, worker: usize) -> Outcome<()> {
        if self.frozen[worker].is_some() {
            return Ok(());
        }
        let length = self.rng.u64(100..3_000);
        let from = now();
        self.crew.freeze(worker)?;
        let fault = self.lasting(Kind::FreezeWorker, Hit::Worker(worker), from);
        self.frozen[worker] = Some((in_millis(length), fault));
        Ok(())
    }

    fn thaw(&mut self, worker: usize) -> Outcome<()> {
        if let Some((_, fault)) = self.frozen[worker].take() {
            self.crew.thaw(worker)?;
            self.referee.fault_mut(fault).to = now();
        }
        Ok(())
    }

    fn kill(&mut self, worker: usize) -> Outcome<()> {
        let from = now();
        self.crew.kill(worker)?;
        if let Some((_, fault)) = self.frozen[worker].take() {
            self.referee.fault_mut(fault).to = now();
        }
        let hit = Hit::Worker(worker);
        self.referee.inflict(Fault { kind: Kind::KillWorker, hit, term: None, from, to: now() });
        self.attend()?;
        self.referee.killed(worker);
        Ok(self.crew.revive(worker)?)
    }

    fn freeze_server(&mut self) -> Outcome<()> {
        let length = self.rng.u64(100..3_000);
        let from = now();
        let frozen = self.server.freeze()?;
        let fault = self.lasting(Kind::FreezeServer, Hit::All, from);
        self.server_frozen = Some((in_millis(length), fault, frozen));
        Ok(())
    }

    fn thaw_server(&mut self) {
        if let Some((_, fault, frozen)) = self.server_frozen.take() {
            frozen.thaw();
            self.referee.fault_mut(fault).to = now();
        }
    }

    fn restart(&mut self, which: usize) -> Outcome<()> {
        self.thaw_server();
        self.operator = None;
        let (kind, how) =
            [(Kind::RestartFast, Shutdown::Fast), (Kind::RestartImmediate, Shutdown::Immediate)][which];
        let from = now();
        self.server.stop(how)?;
        self.referee.inflict(Fault { kind, hit: Hit::All, term: None, from, to: now() });
        Ok(self.server.start_again()?)
    }

    fn lasting(&mut self, kind: Kind, hit: Hit, from: Moment) -> usize {
        self.referee.inflict(Fault { kind, hit, term: None, from, to: Moment::MAX })
    }
}

fn in_millis(millis: u64) -> Instant {
    Instant::now() + Duration::from_millis(millis)
}
