//! A process that wants locks and says at each moment whether it has them, for a parent that freezes it, kills it, or
//! cuts its network.

use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use dsync::{Context, Lock, Quorum};
use support::netns::Netns;

use super::{Micros, Party, config, micros, now};
use crate::common::{PATIENCE, Process, is_open, process};

/// What a witness is to do.
#[derive(Clone, Debug)]
pub(crate) struct Role {
    pub(crate) url: String,
    pub(crate) count: usize,
    pub(crate) lease: Duration,
    /// Longer than the test where the order of the queue matters.
    pub(crate) wait_slice: Duration,
    pub(crate) quorum: Quorum,
    /// How many sessions its locks share.
    pub(crate) shared_sessions: u32,
}

/// The name of its sessions.
pub(crate) const WITNESS: &str = "witness";

impl Role {
    /// A command that runs this program again, as the witness. `body` is the test that calls [`testify`].
    pub(crate) fn command(&self, body: &str) -> Command {
        let [lease, slice] = [self.lease, self.wait_slice].map(|duration| duration.as_millis());
        let quorum = if self.quorum == Quorum::Server { "server" } else { "standbys" };
        let Self { count, shared_sessions, url, .. } = self;
        process(body, &format!("{count} {lease} {slice} {quorum} {shared_sessions} {url}"))
    }

    /// As [`command`](Self::command), in a network namespace.
    pub(crate) fn command_inside(&self, netns: &Netns, body: &str) -> Command {
        let outside = self.command(body);
        let mut command = netns.command(outside.get_program().to_str().unwrap());
        command.args(outside.get_args());
        for (name, value) in outside.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn parse(text: &str) -> Self {
        let mut words = text.split(' ');
        let mut next = || words.next().unwrap();
        let (count, lease, slice, quorum, shared, url) = (next(), next(), next(), next(), next(), next());
        let [lease, wait_slice] = [lease, slice].map(|text| Duration::from_millis(text.parse().unwrap()));
        let quorum = if quorum == "server" { Quorum::Server } else { Quorum::NamedStandbys };
        let (count, shared_sessions) = (count.parse().unwrap(), shared.parse().unwrap());
        Self { count, lease, wait_slice, quorum, shared_sessions, url: url.to_owned() }
    }
}

/// What a witness says of one of its locks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// A call that ended at `by` was the first to say that the lock is held.
    Held { by: Micros },
    /// A call that began at `from` was the last to say so.
    NotHeld { from: Micros },
    /// The library says that it closed the channel at this time.
    Lost { at: Micros },
    /// A thread that listened to the term's channel heard its end at this time.
    Heard { at: Micros },
}

impl Event {
    pub(crate) fn held(self) -> Option<Micros> {
        if let Self::Held { by } = self { Some(by) } else { None }
    }

    pub(crate) fn not_held(self) -> Option<Micros> {
        if let Self::NotHeld { from } = self { Some(from) } else { None }
    }

    pub(crate) fn lost(self) -> Option<Micros> {
        if let Self::Lost { at } = self { Some(at) } else { None }
    }

    pub(crate) fn heard(self) -> Option<Micros> {
        if let Self::Heard { at } = self { Some(at) } else { None }
    }
}

/// The body of the process: asks all that can be asked, again and again, until it is killed.
pub(crate) fn testify(role: &str) {
    let role = Role::parse(role);
    let config = config(WITNESS, &role.url, role.count)
        .lease(role.lease)
        .heartbeat_timeout(role.lease * 2 / 5)
        .wait_slice(role.wait_slice)
        .quorum(role.quorum)
        .shared_sessions(role.shared_sessions);
    let party = Party::with(WITNESS, role.count, config);
    println!("\n@ 0 started 0");
    let _waiting = party.wait_for_all();
    let no_time = Context::deadline(Instant::now());
    let mut last_held: Vec<Option<Micros>> = vec![None; role.count];
    // A parent that is no more kills nobody.
    let until = Instant::now() + 2 * PATIENCE;
    while Instant::now() < until {
        for (index, (lock, last_held)) in party.locks.iter().zip(&mut last_held).enumerate() {
            let from = now();
            let (lost, term) = (lock.lost(), lock.term());
            // Each at its own moment, so they need not agree.
            let held = is_open(&lost) | term.is_some() | lock.lock(&no_time).is_ok();
            match (held, *last_held) {
                (true, before) => {
                    *last_held = Some(from);
                    if before.is_none() {
                        println!("@ {index} held {}", now());
                        listen(index, lock);
                    }
                }
                (false, Some(before)) => {
                    *last_held = None;
                    let loss = lock.last_loss().expect("a loss is remembered");
                    println!("@ {index} not-held {before}");
                    println!("@ {index} lost {} {:?}", micros(loss.at), loss.reason);
                }
                (false, None) => {}
            }
        }
        thread::sleep(Duration::from_micros(50));
    }
}

/// Tells when the term ends that goes on now.
fn listen(index: usize, lock: &Arc<dyn Lock>) {
    let lost = lock.lost();
    thread::spawn(move || {
        let _ = lost.recv();
        println!("@ {index} heard {}", now());
    });
}

/// A witness, from its parent's side.
pub(crate) struct Witness {
    pub(crate) process: Process,
    count: usize,
    /// All it said, in order; with the text that stood behind the time.
    said: Vec<(usize, Event, String)>,
}

impl Witness {
    pub(crate) fn start(role: &Role, command: &mut Command) -> Self {
        let process = Process::start(command);
        process.says("@ 0 started");
        Self { process, count: role.count, said: Vec::new() }
    }

    /// Waits until it has said `wanted` of each of its locks, since the call before; the events, by lock.
    pub(crate) fn says_of_all<T>(&mut self, what: &str, wanted: impl Fn(Event) -> Option<T>) -> Vec<T> {
        let mut found: Vec<Option<T>> = (0..self.count).map(|_| None).collect();
        let mut kept = Vec::new();
        let mut earlier = std::mem::take(&mut self.said).into_iter();
        while found.iter().any(Option::is_none) {
            let (index, event, text) = earlier.next().unwrap_or_else(|| self.next(what));
            match wanted(event) {
                Some(value) if found[index].is_none() => found[index] = Some(value),
                _ => kept.push((index, event, text)),
            }
        }
        kept.extend(earlier);
        self.said = kept;
        found.into_iter().flatten().collect()
    }

    /// What it has said and nobody has asked for.
    pub(crate) fn rest(&mut self) -> Vec<(usize, Event, String)> {
        while let Ok(line) = self.process.lines.try_recv() {
            self.said.extend(parse(&line));
        }
        std::mem::take(&mut self.said)
    }

    fn next(&self, what: &str) -> (usize, Event, String) {
        loop {
            let line = self.process.lines.recv_timeout(PATIENCE);
            let line = line.unwrap_or_else(|_| panic!("the witness does not say {what} of all its locks"));
            match parse(&line) {
                Some(event) => return event,
                None => println!("witness: {line}"),
            }
        }
    }
}

fn parse(line: &str) -> Option<(usize, Event, String)> {
    let mut words = line.split_once("@ ")?.1.split(' ');
    let (index, what, time) = (words.next()?.parse().ok()?, words.next()?, words.next()?.parse().ok()?);
    let event = match what {
        "held" => Event::Held { by: time },
        "not-held" => Event::NotHeld { from: time },
        "lost" => Event::Lost { at: time },
        "heard" => Event::Heard { at: time },
        _ => return None,
    };
    Some((index, event, words.next().unwrap_or_default().to_owned()))
}
