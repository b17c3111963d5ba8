//! The process that the user started: it starts the command and waits for it.

use std::env;
use std::ffi::OsString;
use std::io;
use std::iter;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use nix::sys::signal::Signal as Caught;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus, getpid, kill_process, wait, waitpid};

use super::gate;
use super::group::Group;
use super::options::Watch;
use super::signals::{self, ENDING, OTHERS, Signals};
use super::terminal::Terminal;
use super::wire::{Frames, Moment, ToFront, ToKeeper};
use super::{BECOME, KEEP};
use crate::exit::{CANNOT_EXECUTE, Failure, LOST, NOT_FOUND, UNAVAILABLE, USAGE, say, say_in_passing};

/// How long the keeper may be silent after the end of a term, or after it was heard last. It tells of the end itself, unless it stands still.
/// Shorter than what the margin has beside the command's time to end, which is a second at the least.
const PATIENCE: Duration = Duration::from_millis(250);

/// How often to look whether a group is gone: the end of a process that is not a child of this one is no event.
const LOOKS_EVERY: Duration = Duration::from_millis(50);

/// As [`PATIENCE`], once the command has ended: the keeper gives the lock back, and records a success, at a server that may not answer. Nothing
/// is left then that it watches over.
const PATIENCE_AT_THE_END: Duration = Duration::from_secs(60);

/// How long the command's group may be there after the command before the user is told.
const SILENT_FOR: Duration = Duration::from_secs(1);

/// What is to be run, and how.
pub(super) struct Plan<'a> {
    pub(super) command: &'a [OsString],
    pub(super) watch: &'a Watch,
    /// The command runs again in the next term.
    pub(super) leads: bool,
}

pub(super) struct Front<'a> {
    plan: Plan<'a>,
    signals: Signals,
    terminal: Terminal,
    keeper: KeeperProcess,
    /// Until when the lock is held for sure; `None` until it was had.
    deadline: Option<Moment>,
    is_lost: bool,
    /// The keeper said nothing when the term was over.
    keeper_is_silent: bool,
    /// The variables of a command that is to be started, until its term is known not to be over.
    begins: Option<Vec<(String, String)>>,
    /// The last signal to end that came.
    told_to_end: Option<Caught>,
    /// The signal that ended the wait for the lock.
    ended_by: Option<Caught>,
    job: Option<Job>,
    /// The exit code of the last command; until one has run, that of a lost lock.
    code: u8,
}

/// The other process.
struct KeeperProcess {
    process: Pid,
    stream: UnixStream,
    frames: Frames,
    /// When it was heard last.
    heard: Moment,
    /// It has closed its end.
    is_gone: bool,
    /// What it said last.
    done: Option<(Option<u8>, String)>,
}

/// The command, until its whole group is gone.
struct Job {
    group: Group,
    /// Its exit code, once it has ended.
    code: Option<u8>,
    /// When to end what is left of the group by force.
    kill_at: Option<Moment>,
    /// What stopped it, if it stands still.
    stopped_by: Option<Signal>,
    /// It has asked for the terminal.
    wants_terminal: bool,
    /// When to tell the user that the group outlives the command; `None` once told.
    tell_at: Option<Moment>,
}

impl<'a> Front<'a> {
    /// Starts the keeper, which asks for the lock.
    pub(super) fn start(plan: Plan<'a>) -> Result<Self, Failure> {
        if signals::exit_codes_are_lost() {
            let message = "the signal CHLD is ignored here, so the command's exit code could not be had; start pgdsync by \
                           `env --default-signal=CHLD pgdsync ...`";
            return Err(Failure::new(USAGE, message));
        }
        // Orphans of the command's become children of this process, which then waits for them.
        #[cfg(target_os = "linux")]
        let _ = rustix::process::set_child_subreaper(Some(getpid()));
        let signals = Signals::take().map_err(no_process)?;
        let keeper = KeeperProcess::start().map_err(no_process)?;
        let terminal = Terminal::open();
        Ok(Self {
            plan,
            signals,
            terminal,
            keeper,
            deadline: None,
            is_lost: false,
            keeper_is_silent: false,
            begins: None,
            told_to_end: None,
            ended_by: None,
            job: None,
            code: LOST,
        })
    }

    /// Waits for the lock, runs the command, and gives the exit code.
    pub(super) fn watch(mut self) -> Result<u8, Failure> {
        loop {
            self.pause();
            // This process may stand still in any of the lines that follow. What the keeper said meanwhile is heard in the next round, and
            // the keeper was not silent.
            let now = Moment::now();
            self.hear()?;
            for signal in self.signals.come() {
                self.heed(signal);
            }
            self.wait_for_children();
            self.look_at_the_clock(now);
            if self.job.as_ref().is_some_and(Job::is_over) {
                self.end_job();
            }
            if self.job.is_none()
                && let Some(outcome) = self.outcome()
            {
                // It may not know yet.
                let _ = self.keeper.stream.shutdown(Shutdown::Write);
                self.keeper.leave();
                return outcome;
            }
        }
    }

    /// Waits until there is something to do.
    fn pause(&self) {
        let mut left = Vec::new();
        if let Some(job) = &self.job {
            left.extend(job.kill_at.map(Moment::left));
            left.extend(job.code.map(|_| LOOKS_EVERY));
        }
        left.extend(self.silent_until().map(Moment::left));
        // A millisecond more, so that the moment is over and not about to be.
        let timeout = left.into_iter().min().map(|left| left + Duration::from_millis(1));
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        let mut sources = vec![PollFd::new(&self.signals, PollFlags::IN)];
        if !self.keeper.is_gone {
            sources.push(PollFd::new(&self.keeper.stream, PollFlags::IN));
        }
        // An error is no reason to end: whatever there is to do is looked for next.
        let _ = poll(&mut sources, timeout.as_ref());
    }

    /// Until when the keeper may be silent; `None` while that is of no interest.
    fn silent_until(&self) -> Option<Moment> {
        // After a loss it has nothing to say until the command has ended.
        let watches =
            (!self.is_lost || self.is_finishing()) && !self.keeper.is_gone && self.keeper.done.is_none();
        let end = self.deadline.filter(|_| watches && !self.waits_for_the_next_term())?;
        // What was heard last may have waited for this process to go on, and what is newer is on its way.
        let patience = if self.is_finishing() { PATIENCE_AT_THE_END } else { PATIENCE };
        Some(end.max(self.keeper.heard).after(patience))
    }

    /// True between two terms of a leader.
    fn waits_for_the_next_term(&self) -> bool {
        self.plan.leads && self.told_to_end.is_none() && self.job.is_none() && self.begins.is_none()
    }

    /// Hears what the keeper said, and starts the command if it is time for that.
    fn hear(&mut self) -> Result<(), Failure> {
        self.listen();
        if self.begins.is_some() && (self.is_lost || self.told_to_end.is_some()) {
            // A front that stood still may hear of a whole term at once. Nor does a command begin that would be told to end.
            self.begins = None;
            let _ = ToKeeper::Ended { succeeded: false }.send(&self.keeper.stream);
        }
        // Of a term that is over by what was heard it will be heard in a moment that it was renewed or lost.
        if !self.is_over() && !self.keeper.is_gone && self.begins.is_some() {
            self.start_job()?;
        }
        Ok(())
    }

    fn listen(&mut self) {
        self.keeper.is_gone = self.keeper.is_gone || !self.keeper.frames.take_in(&self.keeper.stream);
        let mut has_come = false;
        while let Some(frame) = self.keeper.frames.next() {
            has_come = true;
            match ToFront::parse(&frame) {
                Some(ToFront::Start { deadline, variables }) => {
                    self.deadline = Some(deadline);
                    self.is_lost = false;
                    self.begins = Some(variables);
                }
                // One that was noted before `Start` may come after it.
                Some(ToFront::Deadline(deadline)) => self.deadline = self.deadline.max(Some(deadline)),
                Some(ToFront::Lost(why)) => {
                    self.note_loss();
                    say_in_passing(&format!("the lock was lost: {why}; {}", self.consequence()));
                }
                Some(ToFront::Say(text)) => say_in_passing(&text),
                Some(ToFront::Done { code, message }) => self.keeper.done = Some((code, message)),
                None => {}
            }
        }
        if has_come {
            self.keeper.heard = Moment::now();
        }
    }

    /// What becomes of the command without the lock.
    fn consequence(&self) -> &'static str {
        if self.begins.is_some() {
            "the command is not started"
        } else if self.job.is_some() {
            "the command is being ended"
        } else {
            "the command is not running"
        }
    }

    /// True if the term is over, unless it has been renewed without the front's knowing.
    fn is_over(&self) -> bool {
        self.deadline.is_none_or(|end| end.left().is_zero())
    }

    /// Starts what becomes the command, and lets it go on when the keeper will know of it, whatever becomes of this process.
    ///
    /// It waits for a message and not for SIGCONT, which anybody may send to all processes of a service.
    fn start_job(&mut self) -> Result<(), Failure> {
        let (open, gate) = UnixStream::pair().map_err(no_process)?;
        let mut command = Command::new(own_program().map_err(no_process)?);
        command
            .arg0("pgdsync")
            .arg(BECOME)
            .arg(self.signals.blocked())
            .args(self.plan.command)
            .stdin(OwnedFd::from(gate))
            .process_group(0);
        for (name, _) in env::vars_os().filter(|(name, _)| name.to_str().is_some_and(is_variable)) {
            // Of a pgdsync around this one.
            command.env_remove(name);
        }
        command.envs(self.begins.iter().flatten().map(|(name, value)| (name, value)));
        let leader = Pid::from_child(&command.spawn().map_err(no_process)?);
        let group = Group::of(leader);
        // What was sent is read, even if this process is killed now.
        let started = ToKeeper::Started { leader: leader.as_raw_nonzero().get(), begun: group.begun() };
        let is_told = started.send(&self.keeper.stream).is_ok();
        // That may have taken long.
        self.listen();
        if !is_told || self.keeper.is_gone || self.is_lost || self.is_over() {
            // What becomes of that is looked at next.
            group.signal(Signal::KILL);
            return Ok(());
        }
        self.begins = None;
        let opened = gate::open(&open, rustix::stdio::stdin());
        if opened.is_err() {
            group.signal(Signal::KILL);
        }
        self.job = Some(Job {
            group,
            code: None,
            kill_at: None,
            stopped_by: None,
            wants_terminal: false,
            tell_at: None,
        });
        opened.map_err(no_process)
    }

    /// Passes a signal on, or lets it have its effect where there is no command.
    fn heed(&mut self, signal: Caught) {
        let ends = ENDING.contains(&signal);
        let Some(job) = &mut self.job else {
            match signal {
                Caught::SIGCHLD | Caught::SIGCONT | Caught::SIGTTOU => {}
                // Meant for a command, which is not there.
                _ if OTHERS.contains(&signal) => {}
                Caught::SIGTSTP => signals::suffer(signal),
                // The command has ended, and the keeper gives the lock back. The second time, it takes too long.
                _ if ends && self.told_to_end.is_none() && self.is_finishing() => {
                    self.told_to_end = Some(signal)
                }
                // Ends this process, and with it the wait for the lock.
                _ => {
                    signals::suffer(signal);
                    // The first process of a container does not end so.
                    self.ended_by = Some(signal);
                }
            }
            return;
        };
        match signal {
            Caught::SIGCHLD | Caught::SIGTTOU => {}
            Caught::SIGCONT => self.resume(),
            _ => {
                let Some(passed) = Signal::from_named_raw(signal as i32) else { return };
                if ends {
                    self.told_to_end = Some(signal);
                    job.kill_by(Moment::now().after(self.plan.watch.kill_after));
                    // Before the command, which may be a pgdsync, and end this one's own.
                    let _ = ToKeeper::Ending.send(&self.keeper.stream);
                    job.group.tell_to_end(passed);
                } else {
                    job.group.signal(passed);
                }
            }
        }
    }

    /// True if the command has ended, or was not to begin, and will not run again.
    fn is_finishing(&self) -> bool {
        let is_last = !self.plan.leads || self.told_to_end.is_some();
        is_last && self.deadline.is_some() && self.begins.is_none() && self.job.is_none()
    }

    /// Lets a command that stands still go on.
    fn resume(&mut self) {
        let Some(job) = &mut self.job else { return };
        self.terminal.look();
        let Some(stopped_by) = job.stopped_by.take() else { return };
        let has_terminal = job.wants_terminal && self.terminal.give(&job.group);
        if matches!(stopped_by, Signal::TTIN | Signal::TTOU) && !has_terminal && !self.terminal.is_gone() {
            // It would be stopped again at once.
            job.stopped_by = Some(stopped_by);
        } else {
            job.group.signal(Signal::CONT);
        }
    }

    fn wait_for_children(&mut self) {
        while let Ok(Some((process, status))) = wait(WaitOptions::NOHANG | WaitOptions::UNTRACED) {
            let Some(job) = self.job.as_mut().filter(|job| job.group.id() == process) else { continue };
            match status.stopping_signal().and_then(Signal::from_named_raw) {
                None if status.stopped() => {}
                None => job.note_end(status),
                // An operator's, who will let it go on; or its own, by which a program in the terminal gives way to the shell.
                Some(Signal::STOP) if !self.terminal.is_given() => {}
                Some(signal) => {
                    job.stopped_by = Some(signal);
                    let wants_terminal = matches!(signal, Signal::TTIN | Signal::TTOU);
                    job.wants_terminal |= wants_terminal;
                    if !wants_terminal || !self.terminal.give(&job.group) && self.terminal.can_be_given() {
                        // As the command does, so that the shell takes over.
                        self.terminal.take_back();
                        signals::suffer(Caught::SIGTSTP);
                    }
                    // Where nobody could continue this process the system does not stop it; a STOP may be an operator's then.
                    if signal != Signal::STOP {
                        self.resume();
                    }
                    if wants_terminal && self.job.as_ref().is_some_and(|job| job.stopped_by.is_some()) {
                        say_in_passing(
                            "the command stands still: it wants the terminal, which pgdsync cannot give it; bring pgdsync to the \
                             foreground, or give it another standard input, or the container a terminal of its own",
                        );
                    }
                }
            }
        }
    }

    /// Ends the command if the keeper had said nothing for too long by `heard_until`, and by force when its time to end is over.
    fn look_at_the_clock(&mut self, heard_until: Moment) {
        let is_silent = self.silent_until().is_some_and(|end| end <= heard_until);
        self.keeper_is_silent |= is_silent;
        let is_gone = self.keeper.is_gone && self.keeper.done.is_none();
        if (is_silent || is_gone)
            && !self.is_lost
            && self.deadline.is_some()
            && !self.waits_for_the_next_term()
        {
            if let Some(job) = &self.job {
                job.group.tell_to_end(self.plan.watch.stop_signal);
            }
            self.note_loss();
            let how = if is_gone { "has ended" } else { "does not answer" };
            let what = match self.is_finishing() {
                true => "whether the lock lasted until the command had ended is not known",
                false => self.consequence(),
            };
            say_in_passing(&format!("the process that watches the lock {how}; {what}"));
        }
        let Some(job) = &mut self.job else { return };
        if job.kill_at.is_some_and(|at| at.left().is_zero()) {
            job.group.signal(Signal::KILL);
            job.kill_at = Some(Moment::now().after(LOOKS_EVERY));
        }
        if job.code.is_some() && job.tell_at.is_some_and(|at| at.left().is_zero()) && !job.is_over() {
            say_in_passing(
                "the command has ended; the lock is held until the processes that it left behind have ended, too",
            );
            job.tell_at = None;
        }
    }

    /// The command must be gone when its time is over, counted from the end of the term or from now.
    fn note_loss(&mut self) {
        self.is_lost = true;
        let now = Moment::now();
        let end = self.deadline.map_or(now, |deadline| deadline.min(now));
        if let Some(job) = &mut self.job {
            job.kill_by(end.after(self.plan.watch.kill_after));
        }
    }

    fn end_job(&mut self) {
        let Some(job) = self.job.take() else { return };
        self.terminal.take_back();
        self.code = job.code.unwrap_or(LOST);
        let ended = ToKeeper::Ended { succeeded: self.code == 0 };
        let _ = ended.send(&self.keeper.stream);
        if self.plan.leads && self.told_to_end.is_none() && !self.is_lost && self.code != 0 {
            let what = match self.code {
                NOT_FOUND => "the command is not there".to_owned(),
                CANNOT_EXECUTE => "the command cannot be executed".to_owned(),
                code => format!("the command has ended with code {code}"),
            };
            say_in_passing(&format!("{what}; it runs again after a pause"));
        }
        if self.plan.leads && self.told_to_end.is_some() {
            // The last term.
            let _ = self.keeper.stream.shutdown(Shutdown::Write);
        }
    }

    /// How it all ended, if it did; there is no command now.
    fn outcome(&mut self) -> Option<Result<u8, Failure>> {
        if let Some(signal) = self.ended_by {
            return Some(Ok(u8::try_from(128 + signal as i32).unwrap_or(u8::MAX)));
        }
        if let Some((code, message)) = self.keeper.done.take() {
            let code = match code {
                Some(code) => code,
                None if self.is_lost && !self.plan.leads => LOST,
                None => self.code,
            };
            if !message.is_empty() {
                say(&message);
            }
            return Some(Ok(code));
        }
        if self.keeper.is_gone && self.deadline.is_none() {
            let message = "the process that watches the lock has ended before it had the lock";
            return Some(Err(Failure::new(UNAVAILABLE, message)));
        }
        if self.keeper.is_gone {
            return Some(Ok(LOST));
        }
        if self.keeper_is_silent {
            // It stands still. Nothing is left that it could watch over.
            let _ = kill_process(self.keeper.process, Signal::KILL);
            return Some(Ok(LOST));
        }
        None
    }
}

impl KeeperProcess {
    fn start() -> io::Result<Self> {
        let (stream, theirs) = UnixStream::pair()?;
        // It inherits that signals are blocked, so that none ends it that is meant for all processes of a service: the front has them.
        let mut command = Command::new(own_program()?);
        command.arg0("pgdsync").arg(KEEP).stdin(Stdio::from(OwnedFd::from(theirs))).stdout(Stdio::null());
        let process = Pid::from_child(&command.spawn()?);
        // The command line may have a password in it, which the list of processes is not to show once more.
        let arguments = env::args_os().skip(1).take_while(|argument| argument != "--");
        let arguments = iter::once("pgdsync".into()).chain(arguments).map(OsString::into_string);
        let arguments: Result<_, _> = arguments.collect();
        let arguments = arguments.map_err(|_| io::Error::other("an argument before -- is not UTF-8"))?;
        ToKeeper::Begin(arguments).send(&stream)?;
        Ok(Self {
            process,
            stream,
            frames: Frames::default(),
            heard: Moment::now(),
            is_gone: false,
            done: None,
        })
    }

    /// Waits for its end, which follows its last word. Where the first process of a container waits for nobody it would stay as a zombie.
    fn leave(&self) {
        const PAUSE: Duration = Duration::from_millis(2);
        for _ in 0..500 {
            match waitpid(Some(self.process), WaitOptions::NOHANG) {
                Ok(None) => thread::sleep(PAUSE),
                _ => return,
            }
        }
    }
}

impl Job {
    fn note_end(&mut self, status: WaitStatus) {
        let by_signal = status.terminating_signal().map(|signal| 128 + signal);
        let code = status.exit_status().or(by_signal).and_then(|code| u8::try_from(code).ok());
        self.code = Some(code.unwrap_or(u8::MAX));
        self.tell_at = Some(Moment::now().after(SILENT_FOR));
    }

    fn kill_by(&mut self, at: Moment) {
        self.kill_at = Some(self.kill_at.map_or(at, |earlier| earlier.min(at)));
    }

    /// True if the command has ended, and all of its group.
    fn is_over(&self) -> bool {
        self.code.is_some() && self.group.is_gone()
    }
}

/// True for the names of the variables that a command is given.
fn is_variable(name: &str) -> bool {
    ["PGDSYNC_KEY", "PGDSYNC_TOKEN", "PGDSYNC_FENCE", "PGDSYNC_PERMIT"].iter().any(|own| {
        let number = name.strip_prefix(own).map(|rest| rest.strip_prefix('_').unwrap_or(rest));
        number.is_some_and(|number| number.bytes().all(|byte| byte.is_ascii_digit()))
    })
}

/// This program. On Linux it is the very file that runs, also after an upgrade.
fn own_program() -> io::Result<PathBuf> {
    let exact = PathBuf::from("/proc/self/exe");
    if exact.exists() { Ok(exact) } else { env::current_exe() }
}

fn no_process(error: io::Error) -> Failure {
    let advice = match Errno::from_io_error(&error) {
        Some(Errno::TOOBIG) => {
            let message = format!(
                "cannot run the command: {error}; pgdsync adds some arguments and variables, so give it fewer"
            );
            return Failure::new(CANNOT_EXECUTE, message);
        }
        Some(Errno::AGAIN | Errno::NOMEM | Errno::MFILE | Errno::NFILE | Errno::TOOMANYREFS) => {
            "; is a limit reached?"
        }
        _ => "",
    };
    Failure::new(UNAVAILABLE, format!("a process or thread cannot be started: {error}{advice}"))
}
