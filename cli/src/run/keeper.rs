//! The process that has the lock, in a session of its own, so that what ends the front's does not end it.

use std::convert::Infallible;
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use clap::Parser as _;
use dsync::crossbeam_channel::{Receiver, Sender, after, bounded, never, select, unbounded};
use dsync::observer::TermLost;
use dsync::{ClaimState, Context, Lock, LockOptions, LossReason, Observer, PostgresManager, Term};
use rustix::process::{Signal, getppid, setsid};

use super::group::Group;
use super::options::Watch;
use super::wire::{self, Frames, Moment, ToFront, ToKeeper};
use crate::args::{Arguments, Connection, Verb};
use crate::exit::{Failure, UNAVAILABLE, USAGE, say_in_passing};
use crate::key::Written;
use crate::{connect, logging};

/// What comes of a run, beside a failure: the exit code, if it is not the command's own; and what to tell the user.
pub(crate) type Done = Result<(Option<u8>, String), Failure>;

/// The body of this process. Its exit code matters to nobody.
pub(super) fn keep() -> ExitCode {
    let _ = setsid();
    #[cfg(target_os = "linux")]
    let _ = rustix::thread::set_name(c"pgdsync");
    let Ok(stream) = io::stdin().as_fd().try_clone_to_owned().map(UnixStream::from) else {
        return ExitCode::FAILURE;
    };
    let mut frames = Frames::default();
    let Some(ToKeeper::Begin(mut arguments)) = frames.wait(&stream).as_deref().and_then(ToKeeper::parse)
    else {
        return ExitCode::FAILURE;
    };
    // The front has the command itself.
    arguments.extend(["--".to_owned(), "command".to_owned()]);
    let (code, message) = match keep_for(&stream, frames, arguments) {
        Ok(done) => done,
        Err(Failure { code, message }) => (Some(code), message),
    };
    let _ = ToFront::Done { code, message }.send(&stream);
    ExitCode::SUCCESS
}

fn keep_for(stream: &UnixStream, frames: Frames, arguments: Vec<String>) -> Done {
    let arguments =
        Arguments::try_parse_from(arguments).map_err(|error| Failure::new(USAGE, error.to_string()))?;
    let stream = Arc::new(stream.try_clone().map_err(cannot_begin)?);
    match &arguments.verb {
        Verb::Run(run) => {
            let keeper = Keeper::connect(stream, frames, &arguments.connection, &run.watch, run.keys.len())?;
            keeper.run(run)
        }
        Verb::Lead(lead) => {
            let keeper = Keeper::connect(stream, frames, &arguments.connection, &lead.watch, 1)?;
            crate::lead::lead(&Arc::new(keeper), lead)
        }
        _ => Err(Failure::new(USAGE, "this verb has no command")),
    }
}

/// What the keeper knows, for all terms.
pub(crate) struct Keeper {
    stream: Arc<UnixStream>,
    /// What the front says.
    told: Receiver<ToKeeper>,
    /// Disconnects when the front is gone, or wants no further term.
    front: Receiver<Infallible>,
    losses: Receiver<LossReason>,
    /// Ends with the front.
    pub(super) context: Context,
    pub(crate) manager: Arc<PostgresManager>,
    /// Until when all locks are held at least, as the front is told; `None` before the first command. The front is told while the
    /// lock is given back, too: a success may take its time to be recorded.
    deadline: Arc<Mutex<Option<Moment>>>,
    kill_after: Duration,
    stop_signal: Signal,
    pub(super) options: LockOptions,
    pub(crate) is_verbose: bool,
    /// The front, and what the sessions are called in front of the key: by its name, since that is whom an operator would end.
    pub(super) front_process: i32,
    pub(super) name: String,
}

/// How the command's time under the lock ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Attended {
    /// The command has succeeded, and the lock was not lost meanwhile.
    pub(crate) succeeded: bool,
    pub(crate) lost: bool,
}

impl Keeper {
    fn connect(
        stream: Arc<UnixStream>,
        mut frames: Frames,
        connection: &Connection,
        watch: &Watch,
        keys: usize,
    ) -> Result<Self, Failure> {
        logging::start_in_passing(if watch.verbose { logging::EVENTS } else { logging::SETTINGS });
        let front_process = getppid().map_or(0, |front| front.as_raw_nonzero().get());
        let name = connect::name_of(front_process.unsigned_abs());
        // A second one for the record of `once`, and for the leaders' questions.
        let sessions = u32::try_from(keys).unwrap_or(u32::MAX).saturating_add(2);
        let (tell_loss, losses) = bounded(keys);
        let config = connect::config_as(&name, connection)?.max_sessions(sessions);
        let config = watch.apply(config).observer(Losses(tell_loss));
        let manager = PostgresManager::connect(config).map_err(|error| {
            let failure = Failure::from(error);
            // About these times, the library would name settings of which nobody has heard.
            let is_about_times =
                ["lengthen lease", "margin is "].iter().any(|text| failure.message.contains(text));
            if watch.fits() || !is_about_times {
                return failure;
            }
            Failure { message: watch.advice(), ..failure }
        })?;
        let manager = Arc::new(manager);
        let (context, canceller) = Context::background().with_cancel();
        let (tell, told) = unbounded();
        let (alive, front) = bounded::<Infallible>(0);
        let reads = Arc::clone(&stream);
        spawn("front", move || {
            let _alive = alive;
            while let Some(frame) = frames.wait(&reads) {
                if ToKeeper::parse(&frame).is_some_and(|message| tell.send(message).is_err()) {
                    return;
                }
            }
            canceller.cancel();
        })?;
        let deadline = Arc::default();
        // After a long wait a term would begin when it is nearly over, since it counts from when the lock was asked for. Of one that has a grace,
        // however short, a heartbeat comes first.
        let mut options = LockOptions::new().grace(Duration::from_millis(1));
        if let Some(text) = watch.annotation.clone() {
            options = options.valuer(Arc::new(move || text.clone().into_bytes()));
        }
        let keeper = Self {
            stream,
            told,
            front,
            losses,
            context,
            manager,
            deadline,
            kill_after: watch.kill_after,
            stop_signal: watch.stop_signal,
            options,
            is_verbose: watch.verbose,
            front_process,
            name,
        };
        keeper.report_deadlines(watch.lease())?;
        Ok(keeper)
    }

    /// Tells the front of each new deadline, from now on.
    fn report_deadlines(&self, lease: Duration) -> Result<(), Failure> {
        let (manager, stream) = (Arc::downgrade(&self.manager), Arc::clone(&self.stream));
        let deadline = Arc::clone(&self.deadline);
        spawn("deadlines", move || {
            let longest = lease / 30;
            let mut is_told = true;
            while let Some(manager) = manager.upgrade() {
                let now = until(&manager);
                drop(manager);
                let Some(now) = now else {
                    is_told = true;
                    thread::sleep(longest);
                    continue;
                };
                let mut deadline = deadline.lock().unwrap_or_else(PoisonError::into_inner);
                // Not before the command begins: who waits for a set of locks may have some of them. Two looks at one deadline differ
                // a little.
                if deadline.is_some_and(|before| now > before.after(Duration::from_millis(10))) {
                    *deadline = Some(now);
                    is_told = false;
                }
                drop(deadline);
                if !is_told {
                    let sent = ToFront::Deadline(now).send(&stream);
                    is_told = sent.map_or_else(|error| error.kind() != io::ErrorKind::WouldBlock, |()| true);
                }
                // The closer the end, the sooner a renewal is told of.
                let pause = (now.left() / 4).clamp(Duration::from_millis(10), longest);
                if is_told {
                    thread::sleep(pause);
                } else {
                    // A front that stood still for long has many of them to hear, and must have the newest soon after.
                    wire::wait_for_room(&stream, pause);
                }
            }
        })
    }

    /// A lock that one has alone.
    pub(crate) fn lock(&self, key: &Written) -> Result<Arc<dyn Lock>, Failure> {
        Ok(self.manager.lock_with(key.key.clone(), self.options.clone())?)
    }

    /// Waits until the front is gone, or wants no further term.
    pub(crate) fn wait_for_front(&self) {
        let _ = self.front.recv();
    }

    pub(crate) fn say(&self, text: &str) {
        let _ = ToFront::Say(text.to_owned()).send(&self.stream);
    }

    /// Lets the front run the command under these terms, and returns when its group is gone. Ends the group when the lock is lost, or must be
    /// given back, or the front is gone.
    pub(crate) fn attend(
        &self,
        terms: &[(&str, Term)],
        lost: &Receiver<Infallible>,
        stopping: &Receiver<Infallible>,
    ) -> Attended {
        if terms.iter().any(|(_, term)| !term.is_held()) {
            self.say(&format!("the lock was lost: {}; the command is not started", self.loss()));
            return Attended { succeeded: false, lost: true };
        }
        // Of an earlier term.
        self.losses.try_iter().for_each(drop);
        if self.is_verbose {
            let held: Vec<_> = (terms.iter())
                .map(|(key, term)| {
                    let permit =
                        term.permit().map(|permit| format!("permit {permit} of ")).unwrap_or_default();
                    let token = term.token().map(|token| format!(" with token {token}")).unwrap_or_default();
                    format!("{permit}{key}{token}")
                })
                .collect();
            self.say(&format!("holds {}", held.join(", ")));
        }
        let mut job = Watched { group: None, is_told: false, kill_at: None };
        let mut front_is_gone = self.start(terms).is_err();
        let mut attended = Attended { succeeded: false, lost: false };
        let (mut told_to_end, mut has_ended): (Option<Moment>, _) = (None, false);
        // Each of these is heard once.
        let (mut told, mut lost, mut stopping) = (self.told.clone(), lost.clone(), stopping.clone());
        loop {
            if (front_is_gone || has_ended) && job.is_gone() {
                return Attended { succeeded: attended.succeeded && !attended.lost, ..attended };
            }
            job.kill_if_due();
            let looks_again = match job.kill_at {
                _ if front_is_gone || has_ended => after(LOOKS_EVERY),
                Some(at) => after(at.left() + Duration::from_millis(1)),
                None => never(),
            };
            let mut is_stopping = false;
            select! {
                recv(told) -> message => match message {
                    Ok(ToKeeper::Started { leader, begun }) => {
                        job.group = Group::known(leader, begun);
                        // It may have been lost before.
                        if std::mem::take(&mut job.is_told) {
                            job.tell_to_end(self.stop_signal);
                        }
                    }
                    Ok(ToKeeper::Ending) => told_to_end = told_to_end.or(Some(Moment::now())),
                    Ok(ToKeeper::Ended { succeeded }) => (attended.succeeded, has_ended) = (succeeded, true),
                    Ok(ToKeeper::Begin(_)) => {}
                    Err(_) => {
                        told = never();
                        front_is_gone = true;
                        if !has_ended && !job.is_gone() {
                            // Whoever told it to end, and then killed it, has little patience left: it may be a pgdsync whose own lock is about
                            // to go. The command may be one, too, and has to hear that it is to end.
                            let patience = told_to_end.map(|at| at.after(HEARD_WITHIN).left());
                            let patience = patience.map_or(self.kill_after, |left| left.min(self.kill_after));
                            job.end(self.stop_signal, Moment::now().after(patience));
                            job.kill_if_due();
                            say_in_passing("pgdsync itself was killed; its command is being ended before the lock goes back");
                        }
                    }
                },
                recv(lost) -> _ => lost = never(),
                recv(stopping) -> _ => (is_stopping, stopping) = (true, never()),
                recv(looks_again) -> _ => {}
            }
            // After a freeze of this process the channels may be late.
            if !attended.lost && terms.iter().any(|(_, term)| !term.is_held()) {
                attended.lost = true;
                let now = Moment::now();
                let end = self.known_deadline().map_or(now, |end| end.min(now));
                job.end(self.stop_signal, end.after(self.kill_after));
                let _ = ToFront::Lost(self.loss()).send(&self.stream);
            } else if is_stopping && !has_ended && !attended.lost {
                job.end(self.stop_signal, Moment::now().after(self.kill_after));
                self.say("asked to give the lock back; the command is being ended");
            }
        }
    }

    /// Has the front start the command. What it is told of later deadlines follows.
    fn start(&self, terms: &[(&str, Term)]) -> io::Result<()> {
        let mut known = self.known_deadline();
        let deadline = until(&self.manager).unwrap_or_else(Moment::now);
        *known = Some(deadline);
        ToFront::Start { deadline, variables: variables(terms) }.send(&self.stream)
    }

    fn known_deadline(&self) -> MutexGuard<'_, Option<Moment>> {
        self.deadline.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why a lock was lost, which is told a moment after the loss itself.
    fn loss(&self) -> String {
        let loss = self.losses.recv_timeout(Duration::from_millis(200));
        loss.map_or_else(|_| "its term is over".to_owned(), |reason| reason.to_string())
    }
}

/// Passes on why a term was lost.
struct Losses(Sender<LossReason>);

impl Observer for Losses {
    fn lost(&self, event: &TermLost<'_>) {
        // Full: nobody asks.
        let _ = self.0.try_send(event.reason);
    }
}

/// How soon a process has heard of a signal, on a busy machine too.
const HEARD_WITHIN: Duration = Duration::from_secs(1);

/// How often to look whether a group is gone.
const LOOKS_EVERY: Duration = Duration::from_millis(20);

/// The command's group, as the keeper knows it.
struct Watched {
    group: Option<Group>,
    /// It was told to end, or will be when it is known.
    is_told: bool,
    kill_at: Option<Moment>,
}

impl Watched {
    /// Tells it to end, unless it was told before; by force at `kill_at`.
    fn end(&mut self, signal: Signal, kill_at: Moment) {
        self.kill_at = Some(self.kill_at.map_or(kill_at, |earlier| earlier.min(kill_at)));
        self.tell_to_end(signal);
    }

    fn tell_to_end(&mut self, signal: Signal) {
        if let Some(group) = self.group.as_ref().filter(|_| !self.is_told) {
            group.tell_to_end(signal);
        }
        self.is_told = true;
    }

    fn kill_if_due(&mut self) {
        if self.kill_at.is_some_and(|at| at.left().is_zero()) {
            if let Some(group) = &self.group {
                group.signal(Signal::KILL);
            }
            self.kill_at = Some(Moment::now().after(LOOKS_EVERY));
        }
    }

    fn is_gone(&self) -> bool {
        self.group.as_ref().is_none_or(Group::is_gone)
    }
}

/// Until when all that is held is held at least. The clock is read first, so that it errs to the early side.
fn until(manager: &PostgresManager) -> Option<Moment> {
    let now = Moment::now();
    let held = manager.snapshot().claims.into_iter().filter(|claim| claim.state == ClaimState::Held);
    held.filter_map(|claim| claim.time_left).min().map(|left| now.after(left))
}

/// What the command is told of its locks; of the first without a number.
fn variables(terms: &[(&str, Term)]) -> Vec<(String, String)> {
    let mut variables = Vec::new();
    for (index, (key, term)) in terms.iter().enumerate() {
        let number = if index == 0 { String::new() } else { format!("_{}", index + 1) };
        variables.push((format!("PGDSYNC_KEY{number}"), (*key).to_owned()));
        variables.extend(term.token().map(|token| (format!("PGDSYNC_TOKEN{number}"), token.to_string())));
        variables.extend(term.fence_text().map(|text| (format!("PGDSYNC_FENCE{number}"), text)));
        variables.extend(term.permit().map(|permit| (format!("PGDSYNC_PERMIT{number}"), permit.to_string())));
    }
    variables
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<(), Failure> {
    thread::Builder::new().name(name.to_owned()).spawn(body).map(drop).map_err(cannot_begin)
}

fn cannot_begin(error: io::Error) -> Failure {
    Failure::new(UNAVAILABLE, format!("the process that watches the lock cannot begin: {error}"))
}
