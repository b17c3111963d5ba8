//! What `run` does in the keeper: it takes the locks, has the command run under them, and says what came of that.

use std::convert::Infallible;
use std::error::Error as _;
use std::io::{self, IsTerminal as _};
use std::sync::Arc;
use std::time::Duration;

use dsync::crossbeam_channel::{Receiver, never};
use dsync::{Context, Error, ErrorKind, Lock, LockGuard, MultiGuard, Once, Period, Term};

use super::group;
use super::keeper::{Attended, Done, Keeper};
use super::options::RunArguments;
use crate::exit::{CONFLICT, Failure, LOST};
use crate::key::Written;
use crate::look;
use crate::progress::Progress;

impl Keeper {
    /// `run`.
    pub(super) fn run(&self, arguments: &RunArguments) -> Done {
        match arguments.every {
            Some(period) => self.run_every(arguments, period),
            None => self.run_now(arguments),
        }
    }

    fn run_now(&self, arguments: &RunArguments) -> Done {
        let (keys, wait) =
            (&arguments.keys, if arguments.nonblock { Some(Duration::ZERO) } else { arguments.wait });
        let held = if let [key] = keys.as_slice() {
            let options = self.options.clone();
            let options = match arguments.permits {
                Some(permits) => options.permits(permits),
                None if arguments.shared => options.shared(),
                None => options,
            };
            let lock = self.manager.lock_with(key.key.clone(), options)?;
            let acquire = |context: &Context| lock.acquire(context);
            Held::One(self.acquire(arguments, keys, wait, || lock.try_acquire(), acquire)?)
        } else {
            // The set takes these handles, and with them their options.
            let handles: Result<Vec<Arc<dyn Lock>>, Error> = keys
                .iter()
                .map(|key| self.manager.lock_with(key.key.clone(), self.options.clone()))
                .collect();
            let _handles = handles?;
            let set = self.manager.multi_lock(keys.iter().map(|key| key.key.clone()))?;
            let acquire = |context: &Context| set.acquire(context);
            Held::Several(self.acquire(arguments, keys, wait, || set.try_acquire(), acquire)?)
        };
        let terms = held.terms(keys);
        let attended = self.attend(&terms, held.lost(), &never());
        match held.release() {
            Ok(()) if attended.lost => Ok((Some(LOST), String::new())),
            Ok(()) => Ok((None, String::new())),
            Err(error) if attended.lost || error.kind() == ErrorKind::Lost => {
                let message = if attended.lost { String::new() } else { Failure::from(error).message };
                Ok((Some(LOST), message))
            }
            Err(error) => {
                let text = Failure::from(error).message;
                Ok((
                    None,
                    format!(
                        "the command ran under the lock to its end, but its release is not confirmed: {text}"
                    ),
                ))
            }
        }
    }

    /// The lock, or the set.
    ///
    /// A first try tells at once whether the server can be reached: to wait would go on trying for ever. A last one tells why the lock was not
    /// to be had, and takes it if it has come free since.
    fn acquire<G>(
        &self,
        arguments: &RunArguments,
        keys: &[Written],
        wait: Option<Duration>,
        try_once: impl FnOnce() -> Result<Option<G>, Error>,
        acquire: impl Fn(&Context) -> Result<G, Error>,
    ) -> Result<G, Failure> {
        let context = wait.map_or_else(|| self.context.clone(), |wait| self.context.with_timeout(wait));
        // A front that has ended meanwhile wants no lock.
        self.context.check().map_err(failure)?;
        if let Some(held) = try_once().map_err(failure)? {
            return Ok(held);
        }
        if wait != Some(Duration::ZERO) {
            let _progress = self.progress(keys);
            match acquire(&context) {
                Err(error) if is_over(&error) => {}
                outcome => return outcome.map_err(failure),
            }
        }
        acquire(&self.context.with_timeout(Duration::ZERO)).map_err(|error| match is_over(&error) {
            true => self.conflict(arguments, keys, error.grace_left()),
            false => failure(error),
        })
    }

    /// That a lock is not to be had, and why. That another has it, `flock` would be silent about. In a takeover grace nobody is granted it, and a
    /// job that nobody does must not pass for one that another does.
    fn conflict(&self, arguments: &RunArguments, keys: &[Written], grace_left: Option<Duration>) -> Failure {
        // Who had it last before the restart may have it back meanwhile. Other readers leave room for one, and permits for others.
        let is_held = || {
            for key in keys {
                // A server that does not answer is not asked again.
                let Ok(view) = self.manager.inspect(key.key.clone()) else { return false };
                if view.holder.is_some_and(|holder| !(arguments.shared && holder.is_shared)) {
                    return true;
                }
            }
            false
        };
        if let Some(left) = grace_left
            && (arguments.permits.is_some() || !is_held())
        {
            return Failure::new(CONFLICT, look::grace_text(left));
        }
        let text = self.aside(|| match (keys, arguments.permits) {
            ([key], None) => {
                let view = self.manager.inspect(key.key.clone()).ok();
                let holder =
                    view.as_ref().and_then(|view| Some(look::holder_text(view, view.holder.as_ref()?)));
                format!(
                    "another has {}{}",
                    key.text,
                    holder.map(|who| format!(": {who}")).unwrap_or_default()
                )
            }
            ([key], Some(permits)) => format!("others have the {permits} permits of {}", key.text),
            _ => format!("another has one of {}", names(keys)),
        });
        Failure::new(arguments.conflict_exit_code.unwrap_or(CONFLICT), text)
    }

    fn run_every(&self, arguments: &RunArguments, period: Duration) -> Done {
        enum Ended {
            Unsuccessful(Attended),
            Failed(Error),
        }
        impl From<Error> for Ended {
            fn from(error: Error) -> Self {
                Self::Failed(error)
            }
        }
        let keys = &arguments.keys[..1];
        let lock = self.lock(&keys[0])?;
        // As for a run that waits: a server that is out of reach is told at once.
        lock.last_success()?;
        let wait = if arguments.nonblock { Some(Duration::ZERO) } else { arguments.wait };
        let context = wait.map_or_else(|| self.context.clone(), |wait| self.context.with_timeout(wait));
        let progress = if wait == Some(Duration::ZERO) { None } else { self.progress(keys) };
        let outcome = lock.once(Period::every(period), &context, move |run| {
            drop(progress);
            let terms = [(keys[0].text.as_str(), run.term().clone())];
            let attended = self.attend(&terms, run.lost(), &never());
            if attended.succeeded { Ok(()) } else { Err(Ended::Unsuccessful(attended)) }
        });
        match outcome {
            Ok(Once::Ran(())) => Ok((None, String::new())),
            Ok(Once::NotDue { due_in, .. }) => {
                let due_in = Duration::from_secs(due_in.as_secs());
                let text =
                    || format!("it has been done; due again in {}", humantime::format_duration(due_in));
                Ok((Some(arguments.done_exit_code), self.aside(text)))
            }
            Ok(Once::Busy) => Err(self.conflict(arguments, keys, None)),
            Err(Ended::Unsuccessful(attended)) => Ok((attended.lost.then_some(LOST), String::new())),
            Err(Ended::Failed(error)) if is_over(&error) || error.grace_left().is_some() => {
                Err(self.conflict(arguments, keys, error.grace_left()))
            }
            Err(Ended::Failed(error)) if error.kind() == ErrorKind::TimedOut => Err(failure(error)),
            // That the work was done comes before why it is not recorded.
            Err(Ended::Failed(error)) => Err(error.into()),
        }
    }

    /// What `flock` would be silent about: scripts ask for it, people want to know.
    fn aside(&self, text: impl FnOnce() -> String) -> String {
        if self.is_verbose || io::stderr().is_terminal() { text() } else { String::new() }
    }

    /// Shows on the terminal who has these locks, until the value is dropped. Not where the front has been put into the background.
    fn progress(&self, keys: &[Written]) -> Option<Progress> {
        let keys = keys.iter().map(|key| key.key.clone()).collect();
        let front = self.front_process;
        Progress::start(&self.manager, keys, &self.name, move || group::is_in_the_foreground(front))
    }
}

/// What is held for `run`.
enum Held {
    One(LockGuard),
    Several(MultiGuard),
}

impl Held {
    /// The terms of these keys, in their order.
    fn terms<'k>(&self, keys: &'k [Written]) -> Vec<(&'k str, Term)> {
        let term = |key: &Written| match self {
            Self::One(guard) => Some(guard.term().clone()),
            Self::Several(guard) => guard.term(key.key.clone()).cloned(),
        };
        keys.iter().filter_map(|key| Some((key.text.as_str(), term(key)?))).collect()
    }

    fn lost(&self) -> &Receiver<Infallible> {
        match self {
            Self::One(guard) => guard.lost().channel(),
            Self::Several(guard) => guard.lost().channel(),
        }
    }

    fn release(self) -> Result<(), Error> {
        match self {
            Self::One(guard) => guard.release(),
            Self::Several(guard) => guard.release(),
        }
    }
}

/// What was in the way at the server, if that is why the time went by.
fn trouble(error: &Error) -> Option<&Error> {
    let causes = std::iter::successors(error.source(), |&cause| cause.source());
    let causes = causes.filter_map(|cause| cause.downcast_ref::<Error>());
    let is_trouble = |cause: &&Error| {
        use ErrorKind as Kind;
        matches!(cause.kind(), Kind::SessionUnavailable | Kind::SessionRefused | Kind::PoolExhausted)
    };
    causes.filter(is_trouble).last()
}

/// True if the time is over, and nothing was in the way at the server.
fn is_over(error: &Error) -> bool {
    error.kind() == ErrorKind::TimedOut && trouble(error).is_none()
}

/// A failure to get the lock. A wait that went by since the server could not be reached is not another's lock.
fn failure(error: Error) -> Failure {
    let trouble = trouble(&error).cloned();
    Failure::from(trouble.unwrap_or(error))
}

fn names(keys: &[Written]) -> String {
    keys.iter().map(|key| key.text.as_str()).collect::<Vec<_>>().join(", ")
}
