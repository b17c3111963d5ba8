//! The course of a run: peace, chaos, peace again, and the end.

use std::error::Error;
use std::process::Command;
use std::time::{Duration, Instant};

use fastrand::Rng;
use support::Server;

use crate::chaos::Chaos;
use crate::crew::{Crew, WORKERS};
use crate::report::{KEYS, now};
use crate::stalls::Watch;
use crate::worker::{LEASE, THREADS};

/// How soon all keys must be had, at first and when chaos has ended: what a frozen or dead holder had is free after the
/// lease, and so is everything after a restart of the server; a waiting claim may be in a back-off of 2 s, and the rest is for two slow cores.
const CALM: Duration = Duration::from_secs(15);

/// How soon the sessions of dead workers must be gone: the lease and one second.
const GONE: Duration = LEASE.saturating_add(Duration::from_secs(1));

const PROGRESS: Duration = Duration::from_secs(5);

/// Runs it all; says whether there was no violation. `recruit` makes the command of a worker from its place, the
/// address of the server, and a seed.
pub(crate) fn run(
    seed: u64,
    length: Duration,
    recruit: impl Fn(usize, &str, u64) -> std::io::Result<Command>,
) -> Result<bool, Box<dyn Error>> {
    let server = Server::builder().max_connections(200).start()?;
    println!(
        "torture: seed {seed}, {} s; {WORKERS} processes of {THREADS} threads, {} keys, lease {LEASE:?}; PostgreSQL {}",
        length.as_secs(),
        KEYS.len(),
        server.version()
    );
    prepare(&server)?;
    let mut rng = Rng::with_seed(seed);
    let (url, seeds) = (server.url(), std::cell::RefCell::new(rng.fork()));
    let recruit = |worker| recruit(worker, &url, seeds.borrow_mut().u64(..));
    let crew = Crew::start(&recruit)?;
    let mut chaos = Chaos::new(&server, crew, rng.fork());

    let (began, watch) = (Instant::now(), Watch::start());
    calm(&mut chaos, "at first")?;
    let mut progress = Instant::now() + PROGRESS;
    while began.elapsed() < length && chaos.referee.is_clean() {
        chaos.pass(Duration::from_millis(rng.u64(50..400)))?;
        chaos.sample();
        // That the operator's own session is hit by a fault is to be expected.
        if let Err(error) = chaos.strike() {
            println!("the operator could not strike: {error}");
        }
        if Instant::now() >= progress {
            progress += PROGRESS;
            println!(
                "{:5.0} s: {} acquisitions, {} faults, {} losses",
                began.elapsed().as_secs_f64(),
                chaos.referee.acquisitions(),
                chaos.referee.faults(),
                chaos.referee.lost()
            );
        }
    }
    chaos.relent()?;
    calm(&mut chaos, "after the last fault")?;
    let length = began.elapsed();
    for fault in chaos.crew.dismiss() {
        chaos.referee.violation(fault);
    }
    chaos.attend()?;

    let mut referee = chaos.leave();
    referee.machine_stood_still(watch.end());
    let mut client = server.client()?;
    referee.inspect(&mut client)?;
    let query = "SELECT (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'),
                        (SELECT count(*) FROM pg_stat_activity
                         WHERE backend_type = 'client backend' AND pid <> pg_backend_pid())";
    let mut left = (0, 0);
    let gone = support::wait_for("the sessions' end", GONE, || {
        let row = client.query_one(query, &[]).ok()?;
        left = (row.get::<_, i64>(0), row.get::<_, i64>(1));
        (left == (0, 0)).then_some(())
    });
    if gone.is_err() {
        referee.violation(format!("{} advisory locks and {} sessions are left", left.0, left.1));
    }
    Ok(referee.judge(seed, length))
}

/// Waits until each key is had anew, by a writer and by a reader. That it never is would be a violation.
fn calm(chaos: &mut Chaos<'_>, when: &str) -> Result<(), Box<dyn Error>> {
    let (since, deadline) = (now(), Instant::now() + CALM);
    loop {
        chaos.pass(Duration::from_millis(50))?;
        let idle = chaos.referee.idle_since(since);
        if idle.is_empty() {
            return Ok(());
        }
        if Instant::now() >= deadline {
            chaos.referee.violation(format!("no writer or no reader had {idle:?} within {CALM:?} {when}"));
            return Ok(());
        }
    }
}

fn prepare(server: &Server) -> Result<(), Box<dyn Error>> {
    let mut client = server.client()?;
    client.batch_execute(
        "CREATE TABLE torture_counter (key text PRIMARY KEY, value int8 NOT NULL);
         CREATE TABLE torture_log (seq bigserial PRIMARY KEY, key text NOT NULL, token int8 NOT NULL, value int8 NOT NULL,
                                   reads bool NOT NULL, at timestamptz NOT NULL DEFAULT clock_timestamp())",
    )?;
    for key in KEYS {
        client.execute("INSERT INTO torture_counter VALUES ($1, 0)", &[&key])?;
    }
    Ok(())
}
