//! The application's hook that gives the password of each session.

use std::error::Error;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{RecvTimeoutError, Sender, bounded};
use parking_lot::Mutex;

use crate::process::PerProcess;
use crate::telling::discard;

use super::connector::Route;
use super::control::StreamControl;

/// Knows the passwords for hosts, where neither the configuration nor a hook gives one: the user's password file.
pub(crate) trait Passwords: fmt::Debug + Send + Sync {
    fn password_for(&self, route: &Route) -> Option<Vec<u8>>;
}

/// How soon a kill is noticed while the hook is at work, which cannot be interrupted.
const SLICE: Duration = Duration::from_millis(20);

type BoxedError = Box<dyn Error + Send + Sync>;
type Hook = dyn Fn() -> Result<String, BoxedError> + Send + Sync;
type Answer = Result<String, PasswordError>;

/// A hook, and the thread on which it runs while somebody waits for its answer.
///
/// It is code of the application's and may hang, so at most one thread at a time is in it: who asks while a call is under
/// way waits for the next call, with all others that do. An answer is never older than its question.
#[derive(Clone)]
pub(crate) struct Password {
    shared: Arc<Shared>,
}

struct Shared {
    hook: Box<Hook>,
    /// A forked process does not have the thread that may be in a call.
    queue: PerProcess<Mutex<Queue>>,
}

/// Nobody holds its mutex while the hook runs.
#[derive(Default)]
struct Queue {
    /// There is a thread, which will look at `waiting` before it ends.
    at_work: bool,
    /// Who waits for the next call, by the number of the question.
    waiting: Vec<(u64, Sender<Answer>)>,
    asked: u64,
}

impl Password {
    pub(crate) fn new(hook: impl Fn() -> Result<String, BoxedError> + Send + Sync + 'static) -> Self {
        Self { shared: Arc::new(Shared { hook: Box::new(hook), queue: PerProcess::new() }) }
    }

    /// The password for a session that opens now. Waits until `deadline` at the most, or until `control` is killed.
    pub(super) fn ask(&self, control: &StreamControl, deadline: Instant) -> Result<String, BoxedError> {
        let (sender, answer) = bounded(1);
        let (number, idle) = {
            let mut queue = self.shared.queue().lock();
            queue.asked += 1;
            let number = queue.asked;
            queue.waiting.push((number, sender));
            (number, !std::mem::replace(&mut queue.at_work, true))
        };
        if idle {
            let shared = Arc::clone(&self.shared);
            if let Err(error) =
                thread::Builder::new().name("dsync-password".into()).spawn(move || shared.work())
            {
                self.shared.give_up(&PasswordError::NoThread(Arc::new(error)));
            }
        }
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match answer.recv_timeout(left.min(SLICE)) {
                Ok(answer) => return Ok(answer?),
                Err(RecvTimeoutError::Disconnected) => return Err(PasswordError::Panicked.into()),
                Err(RecvTimeoutError::Timeout) => {}
            }
            let error: BoxedError = match control.ended() {
                Some(ended) => ended.into_io().into(),
                None if left.is_zero() => PasswordError::TooLate.into(),
                None => continue,
            };
            self.shared.queue().lock().waiting.retain(|(waiting, _)| *waiting != number);
            return Err(error);
        }
    }
}

impl Shared {
    fn queue(&self) -> &Mutex<Queue> {
        self.queue.get(|_| Mutex::default())
    }

    /// Asks the hook for as long as somebody waits.
    fn work(&self) {
        loop {
            let waiting = {
                let mut queue = self.queue().lock();
                queue.at_work = !queue.waiting.is_empty();
                std::mem::take(&mut queue.waiting)
            };
            if waiting.is_empty() {
                return;
            }
            let answer = match catch_unwind(AssertUnwindSafe(|| (self.hook)())) {
                Ok(answer) => answer.map_err(|error| PasswordError::Failed(error.into())),
                Err(thrown) => {
                    discard(thrown);
                    Err(PasswordError::Panicked)
                }
            };
            for (_, sender) in waiting {
                // Who waited has gone, maybe.
                let _ = sender.send(answer.clone());
            }
        }
    }

    /// There is no thread for whoever waits.
    fn give_up(&self, error: &PasswordError) {
        let waiting = {
            let mut queue = self.queue().lock();
            queue.at_work = false;
            std::mem::take(&mut queue.waiting)
        };
        for (_, sender) in waiting {
            let _ = sender.send(Err(error.clone()));
        }
    }
}

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Password").finish_non_exhaustive()
    }
}

/// Why there is no password. All that waited for one call are told of one failure.
#[derive(Clone, Debug)]
pub(crate) enum PasswordError {
    /// The hook said so.
    Failed(Arc<dyn Error + Send + Sync>),
    Panicked,
    TooLate,
    NoThread(Arc<std::io::Error>),
}

impl fmt::Display for PasswordError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Failed(_) => "the hook that gives the password failed",
            Self::Panicked => "the hook that gives the password panicked",
            Self::TooLate => "the hook that gives the password did not answer within the time for a connect",
            Self::NoThread(_) => {
                "the hook that gives the password has no thread; is the limit of threads reached?"
            }
        })
    }
}

impl Error for PasswordError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Failed(error) => Some(&**error),
            Self::NoThread(error) => Some(&**error),
            Self::Panicked | Self::TooLate => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering::SeqCst};

    use crossbeam_channel::unbounded;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    fn waiting(password: &Password) -> usize {
        password.shared.queue().lock().waiting.len()
    }

    fn until(condition: impl Fn() -> bool) {
        let end = Instant::now() + LONG;
        while !condition() {
            assert!(Instant::now() < end, "it does not come about");
            thread::yield_now();
        }
    }

    #[test]
    fn who_asks_while_a_call_is_under_way_shares_the_next_one() {
        let (calls, (go, gate), (entered, enters)) = (AtomicU32::new(0), unbounded::<()>(), unbounded());
        let password = Password::new(move || {
            let call = calls.fetch_add(1, SeqCst) + 1;
            entered.send(call)?;
            gate.recv()?;
            Ok(format!("answer {call}"))
        });
        let ask = || {
            let password = password.clone();
            thread::spawn(move || password.ask(&StreamControl::new(), Instant::now() + LONG).unwrap())
        };
        let first = ask();
        assert_eq!(enters.recv_timeout(LONG), Ok(1));
        let others = [ask(), ask(), ask()];
        until(|| waiting(&password) == 3);
        go.send(()).unwrap();
        assert_eq!(first.join().unwrap(), "answer 1");
        assert_eq!(enters.recv_timeout(LONG), Ok(2));
        go.send(()).unwrap();
        for other in others {
            assert_eq!(other.join().unwrap(), "answer 2");
        }
        until(|| !password.shared.queue().lock().at_work);
        assert!(enters.is_empty(), "nobody asked for a third");
    }

    #[test]
    fn who_gives_up_leaves_nothing_behind() {
        let (go, gate) = unbounded::<()>();
        let password = Password::new(move || {
            gate.recv()?;
            Ok("late".to_owned())
        });
        let soon = || Instant::now() + Duration::from_millis(50);
        for _ in 0..5 {
            let error = password.ask(&StreamControl::new(), soon()).unwrap_err();
            assert!(matches!(error.downcast_ref(), Some(PasswordError::TooLate)), "{error}");
            assert_eq!(waiting(&password), 0);
        }
        let killed = StreamControl::new();
        killed.kill();
        assert!(password.ask(&killed, Instant::now() + LONG).unwrap_err().is::<std::io::Error>());
        assert_eq!(waiting(&password), 0);
        drop(go);
        until(|| !password.shared.queue().lock().at_work);
        let error = password.ask(&StreamControl::new(), Instant::now() + LONG).unwrap_err();
        assert!(matches!(error.downcast_ref(), Some(PasswordError::Failed(_))), "{error}");
    }
}
