//! Takes the times. Each round measures every contender once, in an order drawn afresh, so that whatever else the machine
//! does hits all of them alike and nobody always comes after the same one.

use std::thread;
use std::time::{Duration, Instant};

use crate::contenders::{Contender, Keeper, Party, Signal};
use crate::watchers::Watchers;

/// So that whoever listens to a loss does listen when it comes.
const LISTENING: Duration = Duration::from_millis(20);

/// How long a told loss may take. The slowest that is known takes a few milliseconds.
const PATIENCE: Duration = Duration::from_secs(3);

/// How many rounds.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rounds {
    pub(crate) pairs: usize,
    pub(crate) hand_overs: usize,
    pub(crate) losses: usize,
    pub(crate) renewals: u32,
}

impl Rounds {
    pub(crate) const FULL: Self = Self { pairs: 4_000, hand_overs: 300, losses: 100, renewals: 20 };
    pub(crate) const QUICK: Self = Self { pairs: 300, hand_overs: 20, losses: 10, renewals: 5 };
}

/// The times of each contender.
type Times = Vec<Vec<Duration>>;

/// What came of the terminated sessions of one contender.
#[derive(Debug, Clone)]
pub(crate) enum Losses {
    Told(Vec<Duration>),
    /// It has something that should tell, and that told of a loss while the lock was held.
    FalseAlarm,
    /// It has something that should tell, and that did not.
    Silence,
    /// It has nothing.
    NoSignal,
}

pub(crate) fn pairs(contenders: &[Contender], rounds: usize) -> Times {
    let mut parties: Vec<_> = contenders.iter().map(Contender::party).collect();
    in_rounds(contenders.len(), rounds, |number| parties[number].pair())
}

pub(crate) fn hand_overs(contenders: &[Contender], watchers: &mut Watchers, rounds: usize) -> Times {
    let mut parties: Vec<_> =
        contenders.iter().map(|contender| [contender.party(), contender.party()]).collect();
    in_rounds(contenders.len(), rounds, |number| {
        let [holder, waiter] = &mut parties[number];
        hand_over(holder.as_mut(), waiter.as_mut(), contenders[number].keeper, watchers)
    })
}

fn hand_over(
    holder: &mut dyn Party,
    waiter: &mut dyn Party,
    keeper: Keeper,
    watchers: &mut Watchers,
) -> Duration {
    holder.lock();
    watchers.expect_waiter(keeper);
    thread::scope(|scope| {
        let waiter = scope.spawn(|| {
            let locked = waiter.lock();
            waiter.release();
            locked
        });
        watchers.until_somebody_waits(keeper);
        let released = holder.release();
        let locked = waiter.join().expect("the waiter");
        locked.checked_duration_since(released).expect("nobody gets a lock that is held")
    })
}

/// The times of each contender in each round, without the first tenth, which warms up.
fn in_rounds(contenders: usize, rounds: usize, mut measure: impl FnMut(usize) -> Duration) -> Times {
    let mut times = vec![Vec::with_capacity(rounds); contenders];
    let mut order: Vec<usize> = (0..contenders).collect();
    let warm_up = rounds / 10;
    for round in 0..warm_up + rounds {
        fastrand::shuffle(&mut order);
        for &number in &order {
            let time = measure(number);
            if round >= warm_up {
                times[number].push(time);
            }
        }
    }
    times
}

pub(crate) fn losses(contenders: &[Contender], watchers: &mut Watchers, rounds: usize) -> Vec<Losses> {
    let mut losses: Vec<_> = contenders
        .iter()
        .map(|contender| match contender.signal {
            Signal::By(_) => Losses::Told(Vec::new()),
            Signal::None(_) | Signal::Renewal(_) => Losses::NoSignal,
        })
        .collect();
    let mut order: Vec<usize> = (0..contenders.len()).collect();
    // The first one warms up.
    for round in 0..=rounds {
        fastrand::shuffle(&mut order);
        for &number in &order {
            // Who has failed to tell once is not asked again.
            let Losses::Told(times) = &mut losses[number] else { continue };
            match loss(&contenders[number], watchers) {
                Ok(time) if round > 0 => times.push(time),
                Ok(_) => {}
                Err(failed) => losses[number] = failed,
            }
        }
    }
    losses
}

fn loss(contender: &Contender, watchers: &mut Watchers) -> Result<Duration, Losses> {
    let mut party = contender.party();
    watchers.until_nobody_holds();
    party.lock();
    let (asked, heard) = thread::scope(|scope| {
        let listener = scope.spawn(|| party.hear_of_loss(PATIENCE));
        thread::sleep(LISTENING);
        let asked: Instant = watchers.terminate_holder();
        (asked, listener.join().expect("the listener"))
    });
    heard.ok_or(Losses::Silence)?.checked_duration_since(asked).ok_or(Losses::FalseAlarm)
}
