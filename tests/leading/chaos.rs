//! Leaders under random blows: work of one term may overlap that of another only where the former was told to stop.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::unbounded;
use dsync::{Leader, Tenure};
use parking_lot::Mutex;

use crate::common::PATIENCE;
use crate::crew::{Memory, Postgres, World, quick};

/// How long the blows go on at least: until all have led, and one after the other.
const LASTS: Duration = Duration::from_secs(6);
const TERMS: u64 = 20;

/// By when a holder hears that its session was terminated, which frees the lock at that instant. By a heartbeat that is not answered it would
/// know after 3.75 s.
const GRACE: Duration = Duration::from_secs(3);

#[test]
fn no_work_overlaps_unannounced_in_memory() {
    chaos(&Memory::new(), Duration::ZERO);
}

#[test]
fn no_work_overlaps_unannounced_while_backends_are_terminated() {
    chaos(&Postgres::new(0), GRACE);
}

fn chaos(world: &dyn World, grace: Duration) {
    // The work that goes on, by its token.
    let at_work: Arc<Mutex<Vec<(i64, Tenure)>>> = Arc::default();
    let (report, reports) = unbounded();
    let managers = [(); 4].map(|()| world.manager());
    let leaders: Vec<_> = (managers.iter().enumerate())
        .map(|(number, manager)| {
            let (at_work, report) = (Arc::clone(&at_work), report.clone());
            let mut random = fastrand::Rng::with_seed(number as u64);
            let work = move |tenure: &Tenure| {
                let token = tenure.term().token().unwrap();
                let others: Vec<_> = {
                    let mut at_work = at_work.lock();
                    let others = at_work.clone();
                    at_work.push((token, tenure.clone()));
                    others
                };
                for (other, theirs) in others {
                    // The earlier one must have been told: ours, if this thread came to run only after its term had been lost.
                    let earlier = if other < token { &theirs } else { tenure };
                    let told = earlier.wait_timeout(grace)
                        && earlier.stopping().try_recv().is_err_and(|e| e.is_disconnected());
                    let _ = report.send((number, token, other, told));
                }
                // Some of the work ignores its signal for a while, some returns by itself, and some panics.
                let piece = Duration::from_millis(random.u64(1..150));
                match random.u8(0..4) {
                    0 => while !tenure.wait_timeout(PATIENCE) {},
                    1 => drop(tenure.wait_timeout(piece)),
                    _ => thread::sleep(piece),
                }
                at_work.lock().retain(|(known, _)| *known != token);
                assert!(random.u8(0..10) > 0, "a panic now and then");
            };
            let options = quick().stand_back(Duration::from_millis(5));
            let options = options.back_off(Duration::from_millis(1), Duration::from_millis(20));
            Leader::start_with(manager.lock("x").unwrap(), options, work).unwrap()
        })
        .collect();
    let mut random = fastrand::Rng::with_seed(42);
    let begun = Instant::now();
    let mut blows = 0;
    let had = || leaders.iter().map(|leader| leader.status().terms).collect::<Vec<_>>();
    let is_enough = |terms: &[u64]| terms.iter().all(|terms| *terms > 0) && terms.iter().sum::<u64>() > TERMS;
    while begun.elapsed() < LASTS || begun.elapsed() < PATIENCE && !is_enough(&had()) {
        thread::sleep(Duration::from_millis(random.u64(1..60)));
        blows += 1;
        match random.u8(0..4) {
            0 => drop(random.choice(&leaders).unwrap().step_down()),
            1 => drop(managers[0].request_resignation("x")),
            _ => world.strike(),
        }
    }
    let terms = had();
    leaders.iter().for_each(|leader| leader.stop(PATIENCE).unwrap());
    drop((leaders, report));
    let overlaps: Vec<_> = reports.iter().collect();
    println!("{blows} blows, {terms:?} terms, {} overlaps", overlaps.len());
    assert!(overlaps.iter().all(|(.., announced)| *announced), "unannounced: {overlaps:?}");
    assert!(is_enough(&terms), "{terms:?}");
    assert!(at_work.lock().is_empty());
}
