//! The course of the demonstration: strike the leader, wait for the next one, tell what happens meanwhile.

use std::env;
use std::error::Error;
use std::process::Command;
use std::time::Duration;

use postgres::Client;
use support::{Server, Shutdown};

use crate::blow::{Blow, Takeover};
use crate::crew::{Crew, NAMES, command};
use crate::history::State;
use crate::ledger::{Ledger, connect};
use crate::outcome::one_line;
use crate::report::{Moment, now};
use crate::screen::Screen;
use crate::stage::{ELECTION, Stage};
use crate::verdict::Verdict;
use crate::worker::NAMESPACE;

/// How long a leader leads in peace before the next blow.
const PEACE: Duration = Duration::from_millis(2500);
/// How long after a takeover the former leader comes back.
const RETURN: Duration = Duration::from_millis(1500);

pub(crate) struct Show<'a> {
    /// A session for what an operator does.
    operator: Client,
    /// The server, if it is ours to restart.
    server: Option<&'a Server>,
    // Its workers are dropped before the table that they work in.
    stage: Stage<'a>,
    ledger: Ledger,
    takeovers: Vec<Takeover>,
}

impl<'a> Show<'a> {
    pub(crate) fn new(url: &'a str, server: Option<&'a Server>) -> Result<Self, Box<dyn Error>> {
        let mut operator = connect(url)?;
        // A second show on the same database would stand for election in this one. The session keeps the lock to its end.
        let alone =
            operator.query_one("SELECT pg_try_advisory_lock(hashtext('dsync failover demo'))", &[])?;
        if !alone.try_get::<_, bool>(0)? {
            return Err("another demonstration is running on this database; wait for its end".into());
        }
        let ledger = Ledger::create(url)
            .map_err(|error| format!("cannot make a table for the work: {}", one_line(&error)))?;
        let launch = move |worker| Ok(command(Command::new(env::current_exe()?), worker, url));
        let mut stage = Stage::new(Crew::new(launch), Screen::new("█ leads   ─ stands by   ░ frozen"));
        stage.crew.start(NAMES.len())?;
        Ok(Self { operator, server, stage, ledger, takeovers: Vec::new() })
    }

    /// Runs it all; says whether the library kept its promises.
    pub(crate) fn run(mut self) -> Result<bool, Box<dyn Error>> {
        self.stage.watch(
            "three workers that stand for leader, one of whom leads",
            ELECTION,
            Stage::is_calm,
        )?;
        for blow in Blow::ALL {
            self.stage.watch("a quiet moment", ELECTION, is_at_peace)?;
            if blow == Blow::Restart && self.server.is_none() {
                self.stage.screen.print("\nA restart of the server is left out: this one is not ours.")?;
            } else {
                self.strike(blow)?;
            }
        }
        self.stage.watch("a quiet moment", ELECTION, is_at_peace)?;
        let end = self.stage.end()?;
        let findings = self.ledger.inspect()?;
        let Stage { history, screen, .. } = &mut self.stage;
        let verdict = Verdict { history, takeovers: &self.takeovers, findings: &findings, end };
        Ok(verdict.announce(screen)?)
    }

    /// Does it, waits for the next leader, and then lets the former one come back.
    fn strike(&mut self, blow: Blow) -> Result<(), Box<dyn Error>> {
        let Some((leader, _)) = self.stage.history.leader() else {
            return Err("there is no leader to strike".into());
        };
        let what = blow.describe().replace("the leader's", &format!("{}'s", NAMES[leader]));
        self.stage.screen.blow(now(), &what);
        let at = match blow {
            Blow::Terminate => self.terminate_leader()?,
            Blow::Kill => self.kill(leader)?,
            Blow::Freeze => self.freeze(leader)?,
            Blow::Restart => self.restart_server()?,
        };
        // Somewhat longer than allowed, to be able to tell how late it was.
        let limit = blow.bound() + Duration::from_secs(5);
        let next = |stage: &Stage<'_>| stage.history.leader().filter(|(_, since)| *since > at);
        self.stage.watch("the next leader", limit, |stage| next(stage).is_some())?;
        if let Some((to, gained)) = next(&self.stage) {
            self.takeovers.push(Takeover { blow, at, from: leader, to, took: gained - at });
        }
        match blow {
            Blow::Terminate | Blow::Restart => Ok(()),
            Blow::Kill => self.revive(leader),
            Blow::Freeze => self.thaw(leader),
        }
    }

    fn terminate_leader(&mut self) -> Result<Moment, Box<dyn Error>> {
        // The library's own view shows who holds which lock.
        let row = self.operator.query_opt(
            "SELECT pid FROM dsync.locks WHERE namespace = $1 AND key = 'service/demo/leadership'",
            &[&NAMESPACE],
        )?;
        let row = row.ok_or("the view dsync.locks does not show the leader")?;
        let at = self.stage.begin();
        self.stage.history.excuse(at..=at + Blow::Terminate.bound());
        // No special right is needed: a role may end its own sessions.
        self.operator.query_one("SELECT pg_terminate_backend($1)", &[&row.try_get::<_, i32>(0)?])?;
        Ok(at)
    }

    fn kill(&mut self, leader: usize) -> Result<Moment, Box<dyn Error>> {
        let at = self.stage.begin();
        self.stage.crew.kill(leader)?;
        self.stage.hear_all()?;
        self.stage.history.enter(leader, at, State::Absent);
        Ok(at)
    }

    fn revive(&mut self, worker: usize) -> Result<(), Box<dyn Error>> {
        self.stage.rest(RETURN)?;
        let name = self.stage.screen.name(worker);
        self.stage.screen.event(now(), &format!("{name} is started anew"));
        Ok(self.stage.crew.revive(worker)?)
    }

    fn freeze(&mut self, leader: usize) -> Result<Moment, Box<dyn Error>> {
        let at = self.stage.begin();
        self.stage.crew.freeze(leader)?;
        self.stage.history.enter(leader, at, State::Frozen);
        Ok(at)
    }

    fn thaw(&mut self, worker: usize) -> Result<(), Box<dyn Error>> {
        self.stage.rest(RETURN)?;
        let name = self.stage.screen.name(worker);
        self.stage.screen.event(now(), &format!("{name} is thawed, and knows nothing yet"));
        let at = self.stage.begin();
        // From here on it can act again, and what it believes counts.
        self.stage.history.enter(worker, at, State::Waking);
        self.stage.history.excuse(at..=at);
        Ok(self.stage.crew.thaw(worker)?)
    }

    fn restart_server(&mut self) -> Result<Moment, Box<dyn Error>> {
        let server = self.server.ok_or("this server is not ours to restart")?;
        let at = self.stage.begin();
        let stopped = self.stage.meanwhile("the server has stopped", || server.stop(Shutdown::Fast))?;
        self.stage.history.excuse(at..=stopped);
        self.stage.meanwhile("the server is seen to be up", || server.start_again())?;
        Ok(at)
    }
}

/// Whether it is calm, and has been for a while.
fn is_at_peace(stage: &Stage<'_>) -> bool {
    let led_for = stage.history.leader().map(|(_, since)| now().saturating_sub(since));
    stage.is_calm() && led_for.is_some_and(|length| length >= PEACE)
}
