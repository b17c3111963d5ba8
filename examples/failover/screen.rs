//! The timeline: what happened as lines of text, and below them one lane a worker, drawn anew as time goes by.

use std::env;
use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use crate::crew::NAMES;
use crate::history::{History, State};
use crate::report::{Moment, now};

/// How much time a column of the lanes stands for, at first.
const COLUMN: Duration = Duration::from_millis(400);
/// How long a line of the timeline waits for one that was earlier and is heard later: the processes tell by pipes.
const LATE: Duration = Duration::from_secs(1);
/// How many columns there may be before each has to stand for more.
const COLUMNS: u32 = 66;

#[derive(Clone, Copy)]
pub(crate) enum Paint {
    Worker(usize),
    Blow,
    Good,
    Bad,
    Dim,
}

pub(crate) struct Screen {
    start: Moment,
    colour: bool,
    /// Whether lanes can be drawn again and again in the same place.
    live: bool,
    /// How many lines of lanes stand at the end of the screen.
    drawn: usize,
    /// When each of the blows fell.
    marks: Vec<Moment>,
    /// What is not shown yet of the timeline, in its order.
    pending: Vec<(Moment, String)>,
    legend: &'static str,
}

impl Screen {
    /// `legend` explains what there is in the lanes.
    pub(crate) fn new(legend: &'static str) -> Self {
        let terminal = io::stdout().is_terminal() && env::var_os("TERM").is_none_or(|term| term != "dumb");
        let colour = terminal && env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        // A log on the same terminal and a picture that is drawn again would spoil each other.
        let live = terminal && env::var_os("RUST_LOG").is_none();
        Self { start: now(), colour, live, drawn: 0, marks: Vec::new(), pending: Vec::new(), legend }
    }

    pub(crate) fn paint(&self, paint: Paint, text: &str) -> String {
        let code = match paint {
            Paint::Worker(worker) => ["36", "33", "35"][worker % 3],
            Paint::Blow => "1",
            Paint::Good => "1;32",
            Paint::Bad => "1;31",
            Paint::Dim => "2",
        };
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    pub(crate) fn name(&self, worker: usize) -> String {
        self.paint(Paint::Worker(worker), NAMES[worker])
    }

    /// A line without a time, behind all that has happened.
    pub(crate) fn print(&mut self, line: &str) -> io::Result<()> {
        self.print_up_to(Moment::MAX)?;
        self.put(&format!("{line}\n"))
    }

    /// A line of the timeline, soon.
    pub(crate) fn event(&mut self, at: Moment, text: &str) {
        self.note(at, format!("{}     {text}\n", self.time(at)));
    }

    /// A line of the timeline that gets a number, and a mark below the lanes.
    pub(crate) fn blow(&mut self, at: Moment, text: &str) {
        self.marks.push(at);
        let text = self.paint(Paint::Blow, &format!("{} {text}", self.marks.len()));
        self.note(at, format!("\n{}  {text}\n", self.time(at)));
    }

    fn note(&mut self, at: Moment, line: String) {
        let place = self.pending.partition_point(|(other, _)| *other <= at);
        self.pending.insert(place, (at, line));
    }

    /// Prints the lines of the timeline up to a moment.
    fn print_up_to(&mut self, end: Moment) -> io::Result<()> {
        let ready = self.pending.partition_point(|(at, _)| *at <= end);
        let text: String = self.pending.drain(..ready).map(|(_, line)| line).collect();
        if text.is_empty() { Ok(()) } else { self.put(&text) }
    }

    fn time(&self, at: Moment) -> String {
        self.paint(Paint::Dim, &format!("{:7.3} s", at.saturating_sub(self.start).as_secs_f64()))
    }

    /// Prints what has waited for long enough, and draws the lanes as they are now, where they can be drawn again.
    pub(crate) fn refresh(&mut self, history: &History) -> io::Result<()> {
        self.print_up_to(now().saturating_sub(LATE))?;
        if !self.live {
            return Ok(());
        }
        let mut picture = vec![String::new()];
        picture.extend(self.lanes(history));
        // Without wrapping, or a narrow window would shift the lines.
        self.put(&format!("\x1b[?7l{}\x1b[?7h\n", picture.join("\n")))?;
        self.drawn = picture.len();
        Ok(())
    }

    /// Draws the lanes for good.
    pub(crate) fn finish(&mut self, history: &History) -> io::Result<()> {
        let lanes = self.lanes(history).join("\n");
        self.print(&format!("\n{lanes}\n"))
    }

    /// Writes in the place of the lanes, in one go, so that nothing flickers.
    fn put(&mut self, text: &str) -> io::Result<()> {
        let drawn = std::mem::take(&mut self.drawn);
        let erase = if drawn > 0 { format!("\x1b[{drawn}A\x1b[J") } else { String::new() };
        let mut out = io::stdout().lock();
        out.write_all((erase + text).as_bytes())?;
        out.flush()
    }

    /// One line a worker, then one with the marks.
    fn lanes(&self, history: &History) -> Vec<String> {
        let elapsed = now().saturating_sub(self.start);
        let mut column = COLUMN;
        while elapsed > column * COLUMNS {
            column *= 2;
        }
        let place = |at: Moment| (at.saturating_sub(self.start).as_millis() / column.as_millis()) as usize;
        let columns = place(self.start + elapsed) + 1;

        let mut lines = Vec::new();
        for (worker, name) in NAMES.iter().enumerate() {
            let mut line = format!("  {} ", self.paint(Paint::Worker(worker), &format!("{name:<5}")));
            // A column shows the state at its end, so that no two can seem to lead that did not.
            let ends = (1_u32..).take(columns).map(|number| self.start + (column * number).min(elapsed));
            for at in ends {
                line.push_str(&match history.state_at(worker, at) {
                    State::Absent => " ".to_owned(),
                    State::Standing => self.paint(Paint::Dim, "─"),
                    State::Leading => self.paint(Paint::Worker(worker), "█"),
                    State::Frozen | State::Waking => self.paint(Paint::Dim, "░"),
                });
            }
            lines.push(line);
        }
        let mut marks = " ".repeat(8);
        for (index, at) in self.marks.iter().enumerate() {
            let gap = (8 + place(*at)).saturating_sub(marks.chars().count());
            marks.push_str(&format!("{}{}", " ".repeat(gap), index + 1));
        }
        lines.push(marks);
        let legend = format!("{}   one column is {column:?}", self.legend);
        lines.push(format!("        {}", self.paint(Paint::Dim, &legend)));
        lines
    }
}
