//! The course of the demonstration: strike the leader, wait for the next one, tell what happens meanwhile.

use std::error::Error;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{bounded, select};
use postgres::Client;
use support::{Server, Shutdown};

use crate::blow::{Blow, Takeover};
use crate::crew::{Crew, Heard, NAMES};
use crate::history::{History, State};
use crate::ledger::{Ledger, connect};
use crate::one_line;
use crate::report::{Moment, What, now};
use crate::screen::{Paint, Screen};
use crate::verdict::Verdict;
use crate::worker::NAMESPACE;

/// How long the first election may take; the library makes its catalog before.
const ELECTION: Duration = Duration::from_secs(10);
/// How long a leader leads in peace before the next blow.
const PEACE: Duration = Duration::from_millis(2500);
/// How long after a takeover the former leader comes back.
const RETURN: Duration = Duration::from_millis(1500);
/// How often the lanes are drawn.
const FRAME: Duration = Duration::from_millis(100);

pub(crate) struct Show<'a> {
    /// A session for what an operator does.
    operator: Client,
    /// The server, if it is ours to restart.
    server: Option<&'a Server>,
    // Dropped before the table that they work in.
    crew: Crew,
    ledger: Ledger,
    history: History,
    screen: Screen,
    takeovers: Vec<Takeover>,
    /// When something was last done to a worker, to tell how fast news of it was.
    struck: Option<Moment>,
}

impl<'a> Show<'a> {
    pub(crate) fn new(url: &str, server: Option<&'a Server>) -> Result<Self, Box<dyn Error>> {
        let mut operator = connect(url)?;
        // A second show on the same database would stand for election in this one. The session keeps the lock to its end.
        let alone =
            operator.query_one("SELECT pg_try_advisory_lock(hashtext('dsync failover demo'))", &[])?;
        if !alone.try_get::<_, bool>(0)? {
            return Err("another demonstration is running on this database; wait for its end".into());
        }
        let ledger = Ledger::create(url)
            .map_err(|error| format!("cannot make a table for the work: {}", one_line(&error)))?;
        let crew = Crew::start(url)?;
        let (history, screen, takeovers) = (History::default(), Screen::new(), Vec::new());
        Ok(Self { operator, server, crew, ledger, history, screen, takeovers, struck: None })
    }

    /// Runs it all; says whether the library kept its promises.
    pub(crate) fn run(mut self) -> Result<bool, Box<dyn Error>> {
        self.watch("three workers that stand for leader, one of whom leads", ELECTION, Self::is_calm)?;
        for blow in Blow::ALL {
            self.watch("a quiet moment", ELECTION, Self::is_at_peace)?;
            if blow == Blow::Restart && self.server.is_none() {
                self.screen.print("\nA restart of the server is left out: this one is not ours.")?;
            } else {
                self.strike(blow)?;
            }
        }
        self.watch("a quiet moment", ELECTION, Self::is_at_peace)?;
        self.crew.dismiss()?;
        self.hear_all()?;
        let end = now();
        let findings = self.ledger.inspect()?;
        let verdict =
            Verdict { history: &self.history, takeovers: &self.takeovers, findings: &findings, end };
        Ok(verdict.announce(&mut self.screen)?)
    }

    /// Does it, waits for the next leader, and then lets the former one come back.
    fn strike(&mut self, blow: Blow) -> Result<(), Box<dyn Error>> {
        let Some((leader, _)) = self.history.leader() else {
            return Err("there is no leader to strike".into());
        };
        let what = blow.describe().replace("the leader's", &format!("{}'s", NAMES[leader]));
        self.screen.blow(now(), &what)?;
        let at = match blow {
            Blow::Terminate => self.terminate_leader()?,
            Blow::Kill => self.kill(leader)?,
            Blow::Freeze => self.freeze(leader)?,
            Blow::Restart => self.restart_server()?,
        };
        // Somewhat longer than allowed, to be able to tell how late it was.
        let limit = blow.bound() + Duration::from_secs(5);
        let next = |show: &Self| show.history.leader().filter(|(_, since)| *since > at);
        self.watch("the next leader", limit, |show| next(show).is_some())?;
        if let Some((to, gained)) = next(self) {
            self.takeovers.push(Takeover { blow, at, from: leader, to, took: gained - at });
        }
        match blow {
            Blow::Terminate | Blow::Restart => Ok(()),
            Blow::Kill => self.revive(leader),
            Blow::Freeze => self.thaw(leader),
        }
    }

    /// Something is done now.
    fn begin(&mut self) -> Moment {
        let at = now();
        self.struck = Some(at);
        at
    }

    fn terminate_leader(&mut self) -> Result<Moment, Box<dyn Error>> {
        // The library's own view shows who holds which lock.
        let row = self.operator.query_opt(
            "SELECT pid FROM dsync.locks WHERE namespace = $1 AND key = 'service/demo/leadership'",
            &[&NAMESPACE],
        )?;
        let row = row.ok_or("the view dsync.locks does not show the leader")?;
        let at = self.begin();
        self.history.excuse(at..=at + Blow::Terminate.bound());
        // No special right is needed: a role may end its own sessions.
        self.operator.query_one("SELECT pg_terminate_backend($1)", &[&row.try_get::<_, i32>(0)?])?;
        Ok(at)
    }

    fn kill(&mut self, leader: usize) -> Result<Moment, Box<dyn Error>> {
        let at = self.begin();
        self.crew.kill(leader)?;
        self.hear_all()?;
        self.history.enter(leader, at, State::Absent);
        Ok(at)
    }

    fn revive(&mut self, worker: usize) -> Result<(), Box<dyn Error>> {
        self.rest(RETURN)?;
        self.screen.event(now(), &format!("{} is started anew", self.screen.name(worker)))?;
        Ok(self.crew.revive(worker)?)
    }

    fn freeze(&mut self, leader: usize) -> Result<Moment, Box<dyn Error>> {
        let at = self.begin();
        self.crew.freeze(leader)?;
        self.history.enter(leader, at, State::Frozen);
        Ok(at)
    }

    fn thaw(&mut self, worker: usize) -> Result<(), Box<dyn Error>> {
        self.rest(RETURN)?;
        self.screen
            .event(now(), &format!("{} is thawed, and knows nothing yet", self.screen.name(worker)))?;
        let at = self.begin();
        // From here on it can act again, and what it believes counts.
        self.history.enter(worker, at, State::Waking);
        self.history.excuse(at..=at);
        Ok(self.crew.thaw(worker)?)
    }

    fn restart_server(&mut self) -> Result<Moment, Box<dyn Error>> {
        let server = self.server.ok_or("this server is not ours to restart")?;
        let at = self.begin();
        let stopped = self.meanwhile("the server has stopped", || server.stop(Shutdown::Fast))?;
        self.history.excuse(at..=stopped);
        self.meanwhile("the server takes connections again", || server.start_again())?;
        Ok(at)
    }

    /// Does something that takes a while in a thread, so that the timeline goes on, and tells `text` in it when that is done. Says when
    /// it was.
    fn meanwhile(
        &mut self,
        text: &str,
        action: impl FnOnce() -> support::Result<()> + Send,
    ) -> Result<Moment, Box<dyn Error>> {
        thread::scope(|scope| {
            let (tell, told) = bounded(1);
            scope.spawn(move || tell.send((action(), now())));
            let heard = self.crew.heard().clone();
            loop {
                select! {
                    recv(told) -> done => {
                        let (outcome, at) = done?;
                        outcome?;
                        self.screen.event(at, text)?;
                        return Ok(at);
                    }
                    recv(heard) -> heard => self.take_in(heard?)?,
                    default(FRAME) => {}
                }
                self.screen.refresh(&self.history)?;
            }
        })
    }

    /// Shows what happens until `done`, for no longer than `limit`.
    fn watch(
        &mut self,
        what: &str,
        limit: Duration,
        done: impl Fn(&Self) -> bool,
    ) -> Result<(), Box<dyn Error>> {
        let deadline = Instant::now() + limit;
        while !done(self) {
            if Instant::now() >= deadline {
                return Err(format!("waited {limit:?} in vain for {what}").into());
            }
            if let Ok(heard) = self.crew.heard().recv_timeout(FRAME) {
                self.take_in(heard)?;
            }
            self.screen.refresh(&self.history)?;
        }
        Ok(())
    }

    fn rest(&mut self, length: Duration) -> Result<(), Box<dyn Error>> {
        let end = Instant::now() + length;
        self.watch("the end of a pause", length + FRAME, |_| Instant::now() >= end)
    }

    fn hear_all(&mut self) -> Result<(), Box<dyn Error>> {
        while let Ok(heard) = self.crew.heard().try_recv() {
            self.take_in(heard)?;
        }
        Ok(())
    }

    fn take_in(&mut self, heard: Heard) -> Result<(), Box<dyn Error>> {
        let (worker, report) = match heard {
            Heard::Report { worker, report } => (worker, report),
            Heard::Nonsense(error) => return Err(error.into()),
            Heard::Left { worker, pid } if self.crew.is_missing(worker, pid) => {
                return Err(format!("{} has ended, and nobody told it to", NAMES[worker]).into());
            }
            Heard::Left { .. } => return Ok(()),
        };
        self.history.hear(worker, &report);
        let name = self.screen.name(worker);
        let later = match self.struck {
            Some(at) => format!(", {:.0} ms later", report.at.saturating_sub(at).as_secs_f64() * 1e3),
            None => String::new(),
        };
        let text = match report.what {
            What::Standing => format!("{name} stands for leader"),
            What::Gained { token } => {
                format!("{name} {}{later} (fencing token {token})", self.screen.paint(Paint::Good, "leads"))
            }
            What::Lost { reason } => format!("{name} leads no longer{later} ({reason})"),
            What::Refused => format!("{name} came too late with some work: the fence refused it"),
            What::Stopped => format!("{name} was told to end and gives the leadership back"),
        };
        Ok(self.screen.event(report.at, &text)?)
    }

    /// Whether one leads and the others stand by.
    fn is_calm(&self) -> bool {
        let states = (0..NAMES.len()).map(|worker| self.history.state_at(worker, Moment::MAX));
        self.history.leader().is_some()
            && states.filter(|state| *state == State::Standing).count() == NAMES.len() - 1
    }

    /// Whether it is calm, and has been for a while.
    fn is_at_peace(&self) -> bool {
        let led_for = self.history.leader().map(|(_, since)| now().saturating_sub(since));
        self.is_calm() && led_for.is_some_and(|length| length >= PEACE)
    }
}
