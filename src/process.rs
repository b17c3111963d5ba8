//! Where a call comes from: the process that made an object, and whether the calling thread may drive a session.

use std::fmt;
use std::io;
use std::sync::OnceLock;
use std::thread;

use tokio::runtime::Handle;

use crate::error::{Error, ErrorKind, Result};

/// The process that made an object.
///
/// After a `fork` the child has copies of the parent's locks and sockets, but none of its threads. Whatever the child did
/// with them would end the *parent's* session, or wait for a mutex whose owner is not there. So each object remembers its
/// process, and refuses to work elsewhere before it touches a mutex or a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Origin(u32);

impl Origin {
    /// This process.
    pub(crate) fn here() -> Self {
        Self(std::process::id())
    }

    /// Whether the caller is in the process that made the object. One system call, of some 0.1 µs.
    pub(crate) fn is_here(self) -> bool {
        self == Self::here()
    }

    /// Fails in every process but the one that made the object, which is called `what`.
    pub(crate) fn check(self, what: fmt::Arguments<'_>) -> Result<()> {
        if self.is_here() {
            return Ok(());
        }
        let message = format!(
            "{what} belongs to process {self}, and this is process {}, forked from it; make a manager of its own in \
             each process, after the fork",
            Self::here()
        );
        Err(Error::new(ErrorKind::OtherProcess, message))
    }
}

/// State of the whole process, which a forked child has anew.
///
/// A child must not look at its parent's: a thread that it does not have may have locked that in the moment of the fork.
pub(crate) struct PerProcess<T: 'static> {
    first: OnceLock<Box<Node<T>>>,
}

/// The state of one process, and that of the child in which it is looked at.
struct Node<T: 'static> {
    origin: Origin,
    state: T,
    child: OnceLock<Box<Self>>,
}

impl<T> PerProcess<T> {
    pub(crate) const fn new() -> Self {
        Self { first: OnceLock::new() }
    }

    /// The state of this process. `make` makes it, and is told whether a process from which this one was forked had one.
    pub(crate) fn get(&self, make: impl Fn(bool) -> T) -> &T {
        let (mut link, mut inherited) = (&self.first, false);
        loop {
            match link.get() {
                Some(node) if node.origin.is_here() => return &node.state,
                Some(node) => (link, inherited) = (&node.child, true),
                None => {
                    let node =
                        Node { origin: Origin::here(), state: make(inherited), child: OnceLock::new() };
                    // Another thread may have been faster.
                    drop(link.set(Box::new(node)));
                }
            }
        }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Whether this thread may call the PostgreSQL driver.
///
/// The driver blocks on a tokio runtime of its own, which panics on a thread that drives a runtime already (async code),
/// and on one whose thread-local variables are gone (a destructor at the end of a thread). There a thread of the
/// library's does the work.
pub(crate) fn may_drive() -> bool {
    Handle::try_current().is_err_and(|error| error.is_missing_context())
}

/// A number that no other process draws, from the operating system. A generator that was seeded before a `fork` gives the
/// same numbers in all children, and two sessions of theirs would be taken for one.
///
/// # Errors
/// If the system has no source of random numbers, such as a container without `/dev/urandom` on an old kernel.
pub(crate) fn nonce() -> Result<u64> {
    getrandom::u64().map_err(|error| {
        let message = "the operating system gives no random numbers; see that /dev/urandom is there";
        Error::new(ErrorKind::SessionUnavailable, message).with_source(io::Error::from(error))
    })
}

/// Runs what calls the driver: on this thread if that [may](may_drive), or else on one that is started for it. Blocks as long
/// as that takes.
///
/// # Errors
/// If the thread could not be started, or `work` panicked on it.
pub(crate) fn drive<T: Send>(work: impl FnOnce() -> T + Send) -> io::Result<T> {
    if may_drive() {
        return Ok(work());
    }
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("dsync-call".to_owned()).spawn_scoped(scope, work)?;
        thread.join().map_err(|_| io::Error::other("the call panicked"))
    })
}

/// The error of a call that needed a thread and got none.
pub(crate) fn no_thread(error: io::Error) -> Error {
    let message = "on a thread that drives an async runtime the call needs another thread, which could not be started; \
                   is the limit of threads reached?";
    Error::new(ErrorKind::SessionUnavailable, message).with_source(error)
}

/// Runs `work` on as many threads as there are `pieces`, up to a limit: to give a lock back takes a round trip, and to end a
/// wait a cancel request, which is a connection of its own.
pub(crate) fn in_parallel(pieces: usize, work: impl Fn() + Sync) {
    const AT_ONCE: usize = 32;
    if pieces == 0 {
        return;
    }
    thread::scope(|scope| {
        for _ in 1..pieces.min(AT_ONCE) {
            // Without a thread to spare it is done by fewer.
            if thread::Builder::new().spawn_scoped(scope, &work).is_err() {
                break;
            }
        }
        work();
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    use fork::Fork;
    use parking_lot::Mutex;

    #[test]
    fn an_object_of_another_process_is_refused_by_both_numbers() {
        let ours = Origin::here();
        assert!(ours.is_here() && ours.check(format_args!("the lock")).is_ok());
        let error = Origin(1).check(format_args!("the lock {:?}", "k")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OtherProcess);
        let text = error.to_string();
        assert!(text.contains("process 1,") && text.contains(&ours.to_string()), "{text}");
    }

    #[test]
    fn a_forked_child_does_not_wait_for_what_a_thread_of_its_parent_has_locked() {
        static STATE: PerProcess<Mutex<bool>> = PerProcess::new();
        let get = || STATE.get(Mutex::new);
        let locked = get().lock();
        match fork::fork().unwrap() {
            Fork::Child => {
                // It is told that its parent had a state, and has its own, which it keeps.
                let inherited = get().try_lock().is_some_and(|mut inherited| std::mem::take(&mut *inherited));
                let kept = get().try_lock().is_some_and(|inherited| !*inherited);
                std::process::exit(if inherited && kept { 0 } else { 1 });
            }
            Fork::Parent(child) => assert_eq!(fork::waitpid(child).unwrap(), 0),
        }
        assert!(!*locked, "the parent had none to inherit");
    }

    #[test]
    fn a_thread_that_drives_a_runtime_must_not_call_the_driver() {
        assert!(may_drive());
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        assert!(!runtime.block_on(async { may_drive() }));
        let _entered = runtime.enter();
        assert!(!may_drive());
    }
}
