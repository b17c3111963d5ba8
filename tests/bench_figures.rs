//! What the benches make of their samples: a wrong figure would look like any other.

#[path = "../benches/kit/mod.rs"]
mod kit;

use kit::statistics::{median, quantile};
use kit::{Contender, Place, Plan, Row, Series, Target, interleave, processors, text};

fn series(name: &str, blocks: &[&[f64]]) -> Series {
    let mut series = Series::new(name);
    for block in blocks {
        series.begin_block();
        block.iter().for_each(|sample| series.push(*sample));
    }
    series
}

#[test]
fn the_median_is_in_the_middle_and_the_99th_percentile_is_a_sample() {
    assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
    assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
    let hundred: Vec<f64> = (1..=100).rev().map(f64::from).collect();
    assert_eq!(quantile(&hundred, 0.99), 99.0);
    assert_eq!(quantile(&hundred[..50], 0.99), 100.0);
    assert_eq!(quantile(&[7.0], 0.99), 7.0);
}

#[test]
fn one_bad_stretch_moves_the_spread_and_not_the_median() {
    let summary = series("one", &[&[1.0, 2.0, 3.0], &[2.0, 2.0, 2.0], &[90.0, 95.0, 99.0]]).summary();
    assert_eq!((summary.median, summary.spread, summary.p99), (2.0, [2.0, 95.0], Some(99.0)));
    assert_eq!(summary.samples, 9);
}

#[test]
fn a_block_of_one_sample_has_no_99th_percentile() {
    assert_eq!(series("one", &[&[1.0], &[2.0]]).summary().p99, None);
}

#[test]
fn ratios_are_taken_block_by_block() {
    // The machine was twice as slow in the second half, for both.
    let floor = series("floor", &[&[10.0], &[20.0], &[20.0]]);
    let ours = series("ours", &[&[11.0], &[22.0], &[24.0]]);
    let row = Row::compared("pair", "µs", &floor, &ours, Some(Target::Ratio(1.10)));
    assert_eq!((row.ratio, row.ratio_spread, row.reached), (Some(1.1), Some([1.1, 1.2]), Some(true)));
    assert_eq!(row.target.as_deref(), Some("≤ 1.10 × floor"));
}

#[test]
fn a_target_is_reached_or_missed_by_what_it_names() {
    let floor = series("floor", &[&[1.0, 1.0]]);
    let ours = series("ours", &[&[4.0, 4.0, 6.0]]);
    let judge = |target| Row::compared("loss", "ms", &floor, &ours, Some(target)).reached;
    assert_eq!(judge(Target::Median(5.0)), Some(true));
    assert_eq!(judge(Target::P99(5.0)), Some(false));
    assert_eq!(judge(Target::Ratio(1.10)), Some(false));
    assert_eq!(judge(Target::Ratio(4.0)), Some(true));
    assert_eq!(judge(Target::RatioAtLeast(4.1)), Some(false));
    assert_eq!(judge(Target::RatioAtLeast(4.0)), Some(true));
}

#[test]
fn a_table_has_every_row_and_a_verdict_names_what_was_missed() {
    let floor = series("by hand", &[&[1_000.0], &[1_200.0]]);
    let ours = series("ours", &[&[2_000.0], &[2_400.0]]);
    let rows = [
        Row::compared("pair", "µs", &floor, &ours, Some(Target::Ratio(1.10))),
        Row::new("alone", "KiB", &series("ours", &[&[0.5]])),
    ];
    let table = text::table(&rows);
    let lines: Vec<&str> = table.lines().skip(2).collect();
    assert_eq!(
        lines,
        [
            "| pair | µs | **1,100** (1,000 – 1,200) (by hand) | **2,200** (2,000 – 2,400) | 2.00 (2.00 – 2.00) \
             | ≤ 1.10 × floor | **missed** |",
            "| alone | KiB | – | **0.500** (0.500 – 0.500) | – | – |  |",
        ]
    );
    assert_eq!(text::verdict(&rows), "0 of 1 targets are reached. Missed: pair.");
}

#[test]
fn every_contender_is_measured_once_a_round_and_warming_up_does_not_count() {
    let (mut one, mut two) = (0, 0);
    let plan = Plan { repetitions: 3, rounds: 4, warm_up: 5 };
    let [[first], [second]] = interleave(
        plan,
        [
            Contender::new("one", || {
                one += 1;
                [f64::from(one)]
            }),
            Contender::new("two", || {
                two += 1;
                [f64::from(two)]
            }),
        ],
    );
    assert_eq!((one, two), (17, 17));
    assert_eq!((first.summary().samples, second.summary().samples), (12, 12));
    // The first that counts is the sixth.
    assert_eq!(first.summary().spread, [7.5, 15.5]);
}

#[test]
fn a_bench_bound_to_one_processor_starts_everything_there_and_stays_as_it_was_itself() {
    let count = || std::thread::available_parallelism().expect("a number").get();
    let before = count();
    let (mut own, mut of_a_thread) = (0, 0);
    let bound = processors::on_one(|| {
        own = count();
        of_a_thread = std::thread::spawn(count).join().expect("a thread");
    });
    if cfg!(target_os = "linux") {
        assert_eq!((bound, own, of_a_thread), (true, 1, 1));
    }
    assert_eq!(count(), before);
}

#[test]
fn a_row_tells_on_what_it_was_measured() {
    assert_eq!(Place::OneProcessor.name("pair"), "pair");
    assert_eq!(Place::AllProcessors.name("pair"), "pair, on all processors");
}
