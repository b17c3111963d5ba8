//! What `MetricsObserver` feeds, and that its documentation, the alerts and the dashboard name what there is.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::collections::BTreeSet;
use std::time::Duration;

use common::{begin, eventually, hear, soon};
use dsync::{Config, ErrorKind, MetricsObserver, PostgresManager, SyncManager};
use metrics_exporter_prometheus::PrometheusBuilder;
use support::Database;

/// What an exporter shows after everything has happened once that an observer is told.
fn shown_after_a_busy_day() -> String {
    let database = Database::fresh().unwrap();
    let recorder = PrometheusBuilder::new().set_buckets(&[0.001, 1.0]).unwrap().build_recorder();
    // For this thread only, since other tests have a recorder too.
    let observer = metrics::with_local_recorder(&recorder, || MetricsObserver::named("test"));
    let config = Config::from_url(&database.url()).unwrap().heartbeat(Duration::from_millis(50));
    let manager = PostgresManager::connect(config.max_sessions(2).observer(observer)).unwrap();
    let shown = || recorder.handle().render();

    // A guard, for which another thread waits, and a third one in vain.
    let lock = manager.lock("x").unwrap();
    let guard = lock.acquire(soon()).unwrap();
    let waiting = {
        let lock = lock.clone();
        begin(move || lock.acquire(soon()).unwrap().release())
    };
    eventually("a thread waits", || shown().contains("dsync_threads_waiting{manager=\"test\"} 1\n"));
    assert!(lock.try_acquire().unwrap().is_none());
    eventually("a heartbeat", || shown().contains("dsync_heartbeat_seconds_count"));
    guard.release().unwrap();
    waiting.get().unwrap();
    // A claim that loses its term and comes to another one, beside one that takes the other session.
    lock.lock(&soon()).unwrap();
    let lost = lock.lost();
    let other = manager.lock("y").unwrap().acquire(soon()).unwrap();
    assert_eq!(manager.lock("z").unwrap().try_acquire().unwrap_err().kind(), ErrorKind::PoolExhausted);
    let terminate = "SELECT pg_terminate_backend(pid) FROM dsync.locks WHERE key = 'x' AND pid IS NOT NULL";
    database.client().unwrap().execute(terminate, &[]).unwrap();
    hear(&lost);
    lock.wait(&soon()).unwrap();
    eventually("the next term is told", || shown().contains("dsync_terms_held{manager=\"test\"} 2\n"));
    drop(other);
    lock.release().unwrap();
    manager.stop().unwrap();
    shown()
}

/// The value of a series.
fn value(shown: &str, series: &str) -> f64 {
    let line = shown.lines().find(|line| line.strip_prefix(series).is_some_and(|rest| rest.starts_with(' ')));
    let line = line.unwrap_or_else(|| panic!("no {series} in:\n{shown}"));
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

/// The names in a text that begin as ours do, without what the kind of a histogram adds.
fn names(text: &str) -> BTreeSet<&str> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    let ours = words.filter(|word| word.starts_with("dsync_"));
    ours.map(|name| {
        let histogram = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end));
        histogram.filter(|name| name.ends_with("_seconds")).unwrap_or(name)
    })
    .collect()
}

/// The values that a text compares the labels `kind` and `reason` with.
fn labels(text: &str) -> BTreeSet<(&'static str, &str)> {
    let of = |label: &'static str| {
        let pieces = text.split(label).skip(1);
        let quoted = pieces.filter_map(|rest| {
            let rest = rest.trim_start_matches(['=', '~', '!']).trim_start_matches('\\');
            rest.strip_prefix('"')?.split(['"', '\\']).next()
        });
        quoted.flat_map(|values| values.split('|')).map(move |value| (label, value))
    };
    of("kind").chain(of("reason")).collect()
}

#[test]
fn what_happens_is_counted_and_timed() {
    let shown = shown_after_a_busy_day();
    let count = |name: &str, label: &str| value(&shown, &format!("{name}{{manager=\"test\"{label}}}"));
    assert_eq!(count("dsync_attempts_total", ""), 6.0, "{shown}");
    assert_eq!(count("dsync_attempts_failed_total", ",kind=\"lock_unavailable\""), 1.0, "{shown}");
    assert_eq!(count("dsync_attempts_failed_total", ",kind=\"pool_exhausted\""), 1.0, "{shown}");
    assert_eq!(count("dsync_attempts_failed_total", ",kind=\"timed_out\""), 0.0, "{shown}");
    assert_eq!(count("dsync_terms_total", ""), 5.0, "{shown}");
    assert_eq!(count("dsync_terms_lost_total", ",reason=\"terminated\""), 1.0, "{shown}");
    assert_eq!(count("dsync_terms_lost_total", ",reason=\"heartbeat_timed_out\""), 0.0, "{shown}");
    assert_eq!(count("dsync_terms_held", ""), 0.0, "{shown}");
    assert_eq!(count("dsync_wait_seconds_count", ""), 5.0, "{shown}");
    assert_eq!(count("dsync_hold_seconds_count", ""), 5.0, "{shown}");
    let held = count("dsync_hold_seconds_sum", "");
    assert!((0.05..60.0).contains(&held), "in seconds: {held}");
    assert!(count("dsync_troubles_total", ",kind=\"pool_exhausted\"") >= 1.0, "{shown}");
    assert!(count("dsync_heartbeat_seconds_count", "") >= 1.0, "{shown}");
    assert_eq!(count("dsync_sessions_limit", ""), 2.0, "{shown}");
    assert_eq!(count("dsync_sessions_in_use", ""), 0.0, "{shown}");
    assert_eq!(count("dsync_threads_waiting", ""), 0.0, "{shown}");
    assert_eq!(count("dsync_thread_wait_seconds_count", ""), 1.0, "{shown}");
    for key in ["\"x\"", "\"y\"", "\"z\""] {
        assert!(!shown.contains(key), "no key is a label:\n{shown}");
    }
}

#[test]
fn the_documentation_the_alerts_and_the_dashboard_name_what_there_is() {
    let shown = shown_after_a_busy_day();
    let there = names(&shown);
    let rows = include_str!("../src/metrics_observer.rs").lines().filter(|line| line.starts_with("/// | `"));
    let documented: Vec<_> = rows.collect();
    assert_eq!(names(&documented.join("\n")), there, "the table of MetricsObserver");
    for row in documented {
        let cells: Vec<_> = row.split('|').map(str::trim).collect();
        let kind = format!("# TYPE {} {}\n", cells[1].trim_matches('`'), cells[2]);
        assert!(shown.contains(&kind), "{row} is wrong about the kind:\n{shown}");
    }
    let alerts = include_str!("../examples/health/alerts.yml");
    let dashboard = include_str!("../examples/health/dashboard.json");
    let json: serde_json::Value = serde_json::from_str(dashboard).unwrap();
    assert!(json["panels"].as_array().is_some_and(|panels| panels.len() > 5));
    for (file, text) in [("alerts.yml", alerts), ("dashboard.json", dashboard)] {
        let unknown: Vec<_> = names(text).difference(&there).copied().collect();
        assert!(unknown.is_empty(), "{file} names what there is not: {unknown:?}");
        assert!(names(text).len() > 5, "{file}: {:?}", names(text));
        for (label, value) in labels(text) {
            assert!(shown.contains(&format!("{label}=\"{value}\"")), "{file}: no {label} is {value:?}");
        }
    }
    assert_eq!(names(dashboard), there, "the dashboard shows all");
    assert!(labels(alerts).contains(&("kind", "invalid_key")), "{:?}", labels(alerts));
}
