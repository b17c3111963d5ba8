//! What all shows have in common: hears the workers, and tells and draws what happens meanwhile.

use std::error::Error;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{bounded, select};

use crate::crew::{Crew, Heard, NAMES};
use crate::history::{History, State};
use crate::report::{Moment, What, now};
use crate::screen::{Paint, Screen};

/// How long the first election may take; the library makes its catalog before.
pub(crate) const ELECTION: Duration = Duration::from_secs(10);
/// How often the lanes are drawn.
const FRAME: Duration = Duration::from_millis(100);

pub(crate) struct Stage<'a> {
    pub(crate) crew: Crew<'a>,
    pub(crate) history: History,
    pub(crate) screen: Screen,
    /// When something was last done to a worker, to tell how fast news of it was.
    struck: Option<Moment>,
}

impl<'a> Stage<'a> {
    pub(crate) fn new(crew: Crew<'a>, screen: Screen) -> Self {
        Self { crew, history: History::default(), screen, struck: None }
    }

    /// Something is done now.
    pub(crate) fn begin(&mut self) -> Moment {
        let at = now();
        self.struck = Some(at);
        at
    }

    /// Does something that takes a while in a thread, so that the timeline goes on, and tells `text` in it when that is done. Says when
    /// it was.
    pub(crate) fn meanwhile(
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
                        self.screen.event(at, text);
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
    pub(crate) fn watch(
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

    pub(crate) fn rest(&mut self, length: Duration) -> Result<(), Box<dyn Error>> {
        let end = Instant::now() + length;
        self.watch("the end of a pause", length + FRAME, |_| Instant::now() >= end)
    }

    /// Lets all workers end, and hears the last of them.
    pub(crate) fn end(&mut self) -> Result<Moment, Box<dyn Error>> {
        self.crew.dismiss()?;
        self.hear_all()?;
        Ok(now())
    }

    pub(crate) fn hear_all(&mut self) -> Result<(), Box<dyn Error>> {
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
        self.screen.event(report.at, &text);
        Ok(())
    }

    /// Whether one leads and the others stand by.
    pub(crate) fn is_calm(&self) -> bool {
        let states = (0..NAMES.len()).map(|worker| self.history.state_at(worker, Moment::MAX));
        self.history.leader().is_some()
            && states.filter(|state| *state == State::Standing).count() == NAMES.len() - 1
    }
}
