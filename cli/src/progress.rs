//! What is shown on a terminal while a lock is waited for.

use std::io::{IsTerminal as _, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use dsync::crossbeam_channel::{RecvTimeoutError, Sender, bounded};
use dsync::{Key, LockView, PostgresManager};

use crate::exit::{Failure, takes_output};
use crate::{look, out, text};

/// A lock that is had at once needs no word.
const FIRST_LOOK: Duration = Duration::from_millis(500);
const LOOKS_EVERY: Duration = Duration::from_secs(1);

/// The terminal, for as long as it may be written to.
type Terminal = Arc<Mutex<Option<Line>>>;

/// Shows on standard error, if that is a terminal, who has a lock, since when, and how many are before us. The line goes when this is
/// dropped, which waits for no look that is under way.
pub(crate) struct Progress {
    terminal: Terminal,
    /// Dropped to end the thread.
    _stop: Sender<()>,
}

impl Progress {
    /// Begins to look. The thread has the manager for as long as a look takes that is under way.
    ///
    /// Of several locks it shows the one that is waited for. Our sessions are called `own` in front of the key. Nothing is written while
    /// `may_write` says so.
    pub(crate) fn start(
        manager: &Arc<PostgresManager>,
        keys: Vec<Key>,
        own: &str,
        may_write: impl Fn() -> bool + Send + 'static,
    ) -> Option<Self> {
        let columns = || usize::from(out::size_of(rustix::stdio::stderr()).0);
        let line = Line {
            terminal: Box::new(std::io::stderr()),
            columns: Box::new(columns),
            // Nobody is to wait for a terminal that was stopped.
            may_write: Box::new(move || takes_output(Duration::ZERO) && may_write()),
            is_shown: false,
        };
        std::io::stderr().is_terminal().then(|| Self::on(line, manager, keys, own))
    }

    fn on(line: Line, manager: &Arc<PostgresManager>, keys: Vec<Key>, own: &str) -> Self {
        let terminal = Arc::new(Mutex::new(Some(line)));
        let (stop, stopped) = bounded(0);
        let (manager, own, to) = (Arc::clone(manager), own.to_owned(), Arc::clone(&terminal));
        let show = move || {
            let mut pause = FIRST_LOOK;
            while stopped.recv_timeout(pause) == Err(RecvTimeoutError::Timeout) {
                pause = LOOKS_EVERY;
                let text = look_for(&manager, &keys, &own);
                if let Some(line) = &mut *to.lock().unwrap_or_else(PoisonError::into_inner) {
                    line.show(&text);
                }
            }
        };
        // Without a thread nothing is shown, which is no reason to do nothing else.
        if let Err(error) = thread::Builder::new().name("progress".into()).spawn(show) {
            log::debug!("no thread to show who has the lock: {error}");
        }
        Self { terminal, _stop: stop }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        let mut terminal = self.terminal.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(mut line) = terminal.take() {
            line.clear();
        }
    }
}

/// The line of the terminal that is renewed in its place.
struct Line {
    terminal: Box<dyn Write + Send>,
    columns: Box<dyn Fn() -> usize + Send>,
    may_write: Box<dyn Fn() -> bool + Send>,
    is_shown: bool,
}

impl Line {
    fn show(&mut self, text: &str) {
        let text = text::cut(text, (self.columns)().saturating_sub(1).max(1));
        self.is_shown = self.write(&format!("\r{text}\x1b[K"));
    }

    /// Takes away what is shown, if it may be there still.
    fn clear(&mut self) {
        if self.is_shown {
            self.write("\r\x1b[K");
        }
    }

    fn write(&mut self, text: &str) -> bool {
        // Nobody is left to tell of a terminal that has gone.
        (self.may_write)()
            && self.terminal.write_all(text.as_bytes()).and_then(|()| self.terminal.flush()).is_ok()
    }
}

/// Of the lock for which we are in the queue; else of the first one that others have.
fn look_for(manager: &PostgresManager, keys: &[Key], own: &str) -> String {
    let mut found = None;
    for key in keys {
        match manager.inspect(key.clone()) {
            Ok(view) if place(&view, own).is_some() => return describe(&view, own),
            Ok(view) => {
                let is_others =
                    view.holders().any(|holder| !is_ours(holder.application_name.as_deref(), own));
                if found.is_none() || is_others {
                    found = Some(describe(&view, own));
                }
            }
            Err(error) => {
                let key = text::key(&key.to_string());
                return format!("waiting for {key}: {}", text::harmless(&Failure::from(error).message));
            }
        }
    }
    found.unwrap_or_default()
}

fn is_ours(name: Option<&str>, own: &str) -> bool {
    name.and_then(|name| name.strip_prefix(own)).is_some_and(|rest| rest.starts_with(' '))
}

/// How many are before us in the queue.
fn place(view: &LockView, own: &str) -> Option<usize> {
    view.waiters.iter().position(|waiter| is_ours(waiter.application_name.as_deref(), own))
}

fn describe(view: &LockView, own: &str) -> String {
    let key = look::key_text(view, &view.namespace);
    if let Some(left) = view.grace_left {
        // The time first, since the line may be cut.
        let left = text::lasting(left + Duration::from_millis(999));
        return format!("no lock for {left} at most, since the server was restarted or replaced: {key}");
    }
    let holder = match (&view.holder, look::count_text(view)) {
        (_, Some(count)) => count,
        (None, None) => "nobody has it".to_owned(),
        (Some(holder), None) => {
            let since = holder.since.map(|since| format!(" for {}", text::lasting(text::since(since))));
            format!("{} has it{}", look::holder_text(view, holder), since.unwrap_or_default())
        }
    };
    let queue = match place(view, own) {
        Some(before) => format!("{before} before us"),
        // The sessions have another name, or ours does not wait at this moment.
        None => format!("{} wait", view.waiters.len()),
    };
    format!("waiting for {key}: {holder}; {queue}")
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use dsync::Context;
    use support::Database;

    use super::*;
    use crate::args::Connection;
    use crate::connect;

    const PATIENCE: Duration = Duration::from_secs(60);

    /// A terminal that keeps what it is told.
    struct Paper(Arc<Mutex<Vec<u8>>>);

    impl Write for Paper {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn who_waits_sees_who_has_the_lock_and_its_own_place_and_no_more_when_it_is_over() {
        let database = Database::fresh().unwrap();
        let url = database.url();
        let others = [(); 2].map(|()| {
            let config = dsync::Config::from_url(&url).unwrap().wait_slice(PATIENCE);
            PostgresManager::connect(config).unwrap()
        });
        let key = Key::from("a\x1b");
        let guard = others[0].lock(key.clone()).unwrap().acquire(PATIENCE).unwrap();
        let connection = Connection { url: Some(url), namespace: None, schema: None };
        let ours = connect::config(&connection).unwrap().wait_slice(PATIENCE);
        let ours = Arc::new(PostgresManager::connect(ours).unwrap());
        for manager in [&others[1], &*ours] {
            assert!(manager.lock(key.clone()).unwrap().try_lock(&Context::background()).is_err());
            let waits = || manager.inspect(key.clone()).unwrap().waiters.len();
            let before = if std::ptr::eq(manager, &*ours) { 2 } else { 1 };
            support::wait_for("a place", PATIENCE, || (waits() == before).then_some(())).unwrap();
        }

        let paper = Arc::new(Mutex::new(Vec::new()));
        let shown = || String::from_utf8(paper.lock().unwrap().clone()).unwrap();
        let shows = |text: &str| {
            let found = support::wait_for(text, PATIENCE, || shown().contains(text).then_some(()));
            assert!(found.is_ok(), "{text:?} is missing: {:?}", shown());
        };
        let own = connect::own_name();
        let may_write = Arc::new(AtomicBool::new(true));
        let line = |columns| {
            let may_write = Arc::clone(&may_write);
            Line {
                terminal: Box::new(Paper(Arc::clone(&paper))),
                columns: Box::new(move || columns),
                may_write: Box::new(move || may_write.load(Ordering::Relaxed)),
                is_shown: false,
            }
        };
        // We have one of them.
        let has = ours.lock("had").unwrap().acquire(PATIENCE).unwrap();
        let keys = || vec![Key::from("had"), key.clone()];
        let progress = Progress::on(line(80), &ours, keys(), &own);
        shows("\rwaiting for $'a\\x1b': 127.0.0.1 dsync has it for ");
        shows("; 1 before us\x1b[K");
        guard.release().unwrap();
        shows("; 0 before us\x1b[K");
        println!("{:?}", shown());
        drop(progress);
        let last = shown();
        assert!(last.ends_with("\r\x1b[K"), "{last:?}");
        let narrow = Progress::on(line(10), &ours, keys(), &own);
        shows("\rwaiting …\x1b[K");
        // What is there then is somebody else's.
        may_write.store(false, Ordering::Relaxed);
        let last = shown();
        drop(narrow);
        assert_eq!(shown(), last);
        drop(has);
    }
}
