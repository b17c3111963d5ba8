//! Measuring several contenders so that whatever else the machine does hits all of them alike.

use fastrand::Rng;

use super::SEED;
use super::statistics::Series;

/// How often to measure.
#[derive(Clone, Copy)]
pub(crate) struct Plan {
    /// The run is cut into this many parts. How far their medians lie apart tells how good the figures are.
    pub(crate) repetitions: usize,
    /// In each round every contender is measured once.
    pub(crate) rounds: usize,
    /// Rounds before the first that counts.
    pub(crate) warm_up: usize,
}

/// One of those who are compared. A measurement gives `K` figures.
pub(crate) struct Contender<'a, const K: usize> {
    name: String,
    run: Box<dyn FnMut() -> [f64; K] + 'a>,
}

impl<'a, const K: usize> Contender<'a, K> {
    pub(crate) fn new(name: impl Into<String>, run: impl FnMut() -> [f64; K] + 'a) -> Self {
        Self { name: name.into(), run: Box::new(run) }
    }
}

/// Measures all, once a round, and gives the series of each contender in the order in which they came.
///
/// The order within a round is drawn by lot, the same in each run: nobody always comes after the same neighbour and finds
/// the caches as that one leaves them.
pub(crate) fn interleave<const K: usize, const N: usize>(
    plan: Plan,
    contenders: [Contender<'_, K>; N],
) -> [[Series; K]; N] {
    let series = interleave_list(plan, contenders.into());
    series.try_into().expect("one for each")
}

/// As [`interleave`], for as many as there are.
pub(crate) fn interleave_list<const K: usize>(
    plan: Plan,
    mut contenders: Vec<Contender<'_, K>>,
) -> Vec<[Series; K]> {
    let mut series: Vec<[Series; K]> = contenders
        .iter()
        .map(|contender| std::array::from_fn(|_| Series::new(contender.name.clone())))
        .collect();
    let mut lots = Rng::with_seed(SEED);
    let mut order: Vec<usize> = (0..contenders.len()).collect();
    for _ in 0..plan.warm_up {
        lots.shuffle(&mut order);
        for &place in &order {
            (contenders[place].run)();
        }
    }
    for _ in 0..plan.repetitions {
        series.iter_mut().flatten().for_each(Series::begin_block);
        for _ in 0..plan.rounds {
            lots.shuffle(&mut order);
            for &place in &order {
                let figures = (contenders[place].run)();
                series[place].iter_mut().zip(figures).for_each(|(series, figure)| series.push(figure));
            }
        }
    }
    series
}
