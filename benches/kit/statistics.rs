//! From samples to figures.

/// What one contender was measured to need, in the order of measuring, cut into blocks.
#[derive(Clone, Debug)]
pub(crate) struct Series {
    pub(crate) name: String,
    blocks: Vec<Vec<f64>>,
}

/// What a series amounts to.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Summary {
    pub(crate) name: String,
    /// The median of the blocks' medians: one bad stretch of the run does not move it.
    pub(crate) median: f64,
    /// Over all samples; `None` where each block is one sample, such as a throughput.
    pub(crate) p99: Option<f64>,
    /// The lowest and the highest of the blocks' medians.
    pub(crate) spread: [f64; 2],
    pub(crate) samples: usize,
}

impl Series {
    pub(crate) fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), blocks: Vec::new() }
    }

    pub(crate) fn begin_block(&mut self) {
        self.blocks.push(Vec::new());
    }

    /// Adds a sample to the block that was begun last.
    pub(crate) fn push(&mut self, sample: f64) {
        if self.blocks.is_empty() {
            self.begin_block();
        }
        self.blocks.last_mut().expect("a block").push(sample);
    }

    /// A series of the same samples in another unit.
    pub(crate) fn times(&self, factor: f64) -> Self {
        let blocks = self.blocks.iter().map(|block| block.iter().map(|sample| sample * factor).collect());
        Self { name: self.name.clone(), blocks: blocks.collect() }
    }

    pub(crate) fn summary(&self) -> Summary {
        let medians = self.medians();
        let all: Vec<f64> = self.blocks.iter().flatten().copied().collect();
        let tells_tail = self.blocks.iter().any(|block| block.len() > 1);
        Summary {
            name: self.name.clone(),
            median: median(&medians),
            p99: tells_tail.then(|| quantile(&all, 0.99)),
            spread: range(&medians),
            samples: all.len(),
        }
    }

    /// How many times as much this is as `floor`: the median of what the blocks say, and the range of it.
    pub(crate) fn ratio_to(&self, floor: &Self) -> (f64, [f64; 2]) {
        let ratios: Vec<f64> =
            self.medians().iter().zip(floor.medians()).map(|(ours, floor)| ours / floor).collect();
        (median(&ratios), range(&ratios))
    }

    fn medians(&self) -> Vec<f64> {
        self.blocks.iter().map(|block| median(block)).collect()
    }
}

/// The value in the middle, or between the two in the middle.
pub(crate) fn median(samples: &[f64]) -> f64 {
    let sorted = sorted(samples);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[middle] } else { f64::midpoint(sorted[middle - 1], sorted[middle]) }
}

/// The smallest sample that at least this share of all samples does not exceed. Of fewer than a hundred, the 99th
/// percentile is the largest.
pub(crate) fn quantile(samples: &[f64], share: f64) -> f64 {
    let sorted = sorted(samples);
    let rank = (sorted.len() as f64 * share).ceil() as usize;
    sorted[rank.clamp(1, sorted.len()) - 1]
}

fn range(samples: &[f64]) -> [f64; 2] {
    let sorted = sorted(samples);
    [sorted[0], sorted[sorted.len() - 1]]
}

fn sorted(samples: &[f64]) -> Vec<f64> {
    assert!(!samples.is_empty(), "nothing was measured");
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}
