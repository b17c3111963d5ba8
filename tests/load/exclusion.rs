//! No two are inside at once: four processes of four threads each want three locks, 10,000 times in all.

use std::fs::{self, OpenOptions};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use dsync::{Config, ErrorKind, Lock, LockGuard, SyncManager};
use support::Database;

use crate::common::{self, PATIENCE, Process, lock, soon, started};

const PROCESSES: usize = 4;
const THREADS: usize = 4;
const KEYS: [&str; 3] = ["red", "green", "blue"];
const ACQUISITIONS: usize = 10_000;

#[test]
fn no_two_are_inside_at_once() {
    let database = Database::fresh().unwrap();
    let room = Room::make(&database);
    let role = format!("{} {}", database.url(), room.0.display());
    let workers = [(); PROCESSES].map(|()| Process::start(&mut common::process("exclusion::worker", &role)));
    for worker in workers {
        // It takes less than 20 s on two cores that have nothing else to do.
        worker.succeeds_within(Duration::from_secs(300));
    }
    let inside: usize = KEYS.iter().map(|key| room.read(key).0).sum();
    assert_eq!(inside, ACQUISITIONS, "an entry was written over by another");
}

/// Not a test: the body of the processes that [`no_two_are_inside_at_once`] starts. It is told a server and a folder.
#[test]
#[ignore = "the body of a process, which another test starts"]
fn worker() {
    let Some(role) = common::role() else { return };
    let (url, folder) = role.split_once(' ').unwrap();
    let room = Room(folder.into());
    // Slices so short that their ends race with the grants all the time.
    let config = Config::from_url(url).unwrap().wait_slice(Duration::from_millis(20));
    let manager = started(config.release_timeout(PATIENCE));
    // The threads of one process share its handle of a lock, and its guards keep them apart.
    let seats = KEYS.map(|key| lock(&manager, key));
    thread::scope(|scope| {
        for thread in 0..THREADS {
            let (seats, room) = (&seats, &room);
            scope.spawn(move || {
                for round in 0..ACQUISITIONS / PROCESSES / THREADS {
                    let index = (round + thread) % KEYS.len();
                    let seat = &seats[index];
                    // In one round of eight with little patience, so that claims are given up at all their stages.
                    let guard = if round % 8 == 0 { impatiently(seat) } else { patiently(seat) };
                    room.visit(KEYS[index], guard.term().token().expect("there is a catalog"));
                    assert!(guard.term().is_held(), "nothing was to end it");
                    guard.release().unwrap();
                }
            });
        }
    });
    manager.stop().unwrap();
}

fn patiently(lock: &Arc<dyn Lock>) -> LockGuard {
    lock.acquire(soon()).unwrap()
}

/// Gives up and tries again until it has the lock.
fn impatiently(lock: &Arc<dyn Lock>) -> LockGuard {
    for patience in 1.. {
        match lock.acquire(Duration::from_millis(patience)) {
            Ok(guard) => return guard,
            Err(error) => assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}"),
        }
    }
    unreachable!("the patience grows")
}

/// The witness, which knows nothing of PostgreSQL. For each key it has a door, a file that is there while somebody is
/// inside and that two cannot make, and a journal, which is read and written back while inside.
struct Room(PathBuf);

impl Room {
    /// An empty one. It goes with the server that the database is on.
    fn make(database: &Database) -> Self {
        let folder = database.server().folder().join("room");
        fs::create_dir(&folder).unwrap();
        let room = Self(folder);
        for key in KEYS {
            fs::write(room.journal(key), "0 0").unwrap();
        }
        room
    }

    fn journal(&self, key: &str) -> PathBuf {
        self.0.join(format!("{key}.journal"))
    }

    /// How many have been inside, and the token of the last.
    fn read(&self, key: &str) -> (usize, i64) {
        let text = fs::read_to_string(self.journal(key)).unwrap();
        let (count, token) = text.split_once(' ').unwrap();
        (count.parse().unwrap(), token.parse().unwrap())
    }

    fn visit(&self, key: &str, token: i64) {
        let door = self.0.join(format!("{key}.door"));
        let entered = OpenOptions::new().write(true).create_new(true).open(&door);
        assert!(entered.is_ok(), "another one is inside: {entered:?}");
        let (count, last) = self.read(key);
        assert!(token > last, "the token {token} comes after {last}");
        // Whoever is allowed in by mistake has time for it now.
        thread::yield_now();
        fs::write(self.journal(key), format!("{} {token}", count + 1)).unwrap();
        fs::remove_file(&door).unwrap();
    }
}
