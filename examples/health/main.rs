//! A service whose locks can be seen: Prometheus asks it for `/metrics`, the load balancer for `/health`.
//!
//! ```text
//! cargo run --example health --features metrics
//! curl localhost:9464/health
//! curl localhost:9464/metrics
//! ```
//!
//! Without `DATABASE_URL` it starts a PostgreSQL server of its own and prints the address for a second process. `HEALTH_ADDRESS`
//! says where to listen, by default at 127.0.0.1:9464; a second process on the same machine needs another port. Beside this file
//! are rules for alerts, `alerts.yml`, and a dashboard for Grafana, `dashboard.json`.

use std::env;
use std::error::Error;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use dsync::crossbeam_channel::{after, select};
use dsync::{ClaimState, Config, Context, MetricsObserver, PostgresManager};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};

/// The lock of the one process that does the work.
const LEADER: &str = "billing-leader";

/// Bounds of the histograms' buckets, in seconds: from a round trip on one machine to a night's work.
const BUCKETS: [f64; 12] = [0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 30.0, 300.0, 3600.0];

fn main() -> ExitCode {
    env_logger::init();
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("health: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let server;
    let url = match env::var("DATABASE_URL") {
        Ok(url) => url,
        Err(_) => {
            server = support::Server::start()?;
            println!("in another terminal:\n  DATABASE_URL={} \\", server.url());
            println!("  HEALTH_ADDRESS=127.0.0.1:9465 cargo run --example health --features metrics");
            server.url()
        }
    };
    // First the recorder, then the observer that feeds it.
    let metrics = PrometheusBuilder::new().set_buckets(&BUCKETS)?.install_recorder()?;
    // Apart from the locks of whatever else uses the database.
    let config =
        Config::from_url(&url)?.namespace("dsync-example").observer(MetricsObserver::named("billing"));
    let manager = PostgresManager::connect(config)?;

    let address = env::var("HEALTH_ADDRESS").unwrap_or_else(|_| "127.0.0.1:9464".to_owned());
    let listener = TcpListener::bind(&address).map_err(|error| {
        format!(
            "cannot listen at {address}: {error}; set HEALTH_ADDRESS to a free one, such as 127.0.0.1:9465"
        )
    })?;
    println!("http://{0}/health and http://{0}/metrics", listener.local_addr()?);
    thread::scope(|scope| {
        scope.spawn(|| {
            // Only a stopped manager ends it, and this one is not.
            if let Err(error) = lead(&manager) {
                eprintln!("health: the leader's work ended: {error}");
            }
        });
        for stream in listener.incoming().flatten() {
            // A client that goes away is no reason to end.
            let _ = answer(stream, &manager, &metrics);
        }
    });
    Ok(())
}

/// Waits until this process leads, works until it does not, and begins anew.
fn lead(manager: &PostgresManager) -> dsync::Result<()> {
    let (leader, ledger) = (manager.lock(LEADER)?, manager.lock("billing-ledger")?);
    loop {
        leader.lock(&Context::background())?;
        let lost = leader.lost();
        while !lost.is_lost() {
            // What a leader does, now and then with another lock.
            if let Ok(guard) = ledger.acquire(Duration::from_secs(1)) {
                thread::sleep(Duration::from_millis(20));
                drop(guard);
            }
            select! {
                recv(lost) -> _ => {}
                recv(after(Duration::from_millis(200))) -> _ => {}
            }
        }
    }
}

/// Whether this process leads, or can when its turn comes; and a line for each claim.
fn health(manager: &PostgresManager) -> (bool, String) {
    let snapshot = manager.snapshot();
    let is_well = snapshot.is_running
        && snapshot.claim(LEADER).is_some_and(|claim| match claim.state {
            ClaimState::Held | ClaimState::Queueing | ClaimState::TakingTurns | ClaimState::InGrace => true,
            // For a moment that is how each claim begins.
            ClaimState::Connecting => claim.last_error.is_none(),
            _ => false,
        });
    let mut text = if is_well { "well\n".to_owned() } else { "not well\n".to_owned() };
    for claim in &snapshot.claims {
        let _ = writeln!(text, "{claim:?}");
    }
    (is_well, text)
}

/// Answers one request.
fn answer(stream: TcpStream, manager: &PostgresManager, metrics: &PrometheusHandle) -> std::io::Result<()> {
    const PATIENCE: Option<Duration> = Some(Duration::from_secs(1));
    stream.set_read_timeout(PATIENCE)?;
    stream.set_write_timeout(PATIENCE)?;
    let mut request = BufReader::new(&stream).lines();
    let first = request.next().unwrap_or_else(|| Ok(String::new()))?;
    // What is not read yet would make the end of the connection an abrupt one.
    while request.next().is_some_and(|line| line.is_ok_and(|line| !line.is_empty())) {}
    let (status, text) = match first.split(' ').nth(1) {
        Some("/metrics") => ("200 OK", metrics.render()),
        Some("/health") => match health(manager) {
            (true, text) => ("200 OK", text),
            (false, text) => ("503 Service Unavailable", text),
        },
        _ => ("404 Not Found", "there are /health and /metrics\n".to_owned()),
    };
    let length = text.len();
    let head = format!("HTTP/1.1 {status}\r\ncontent-type: text/plain; version=0.0.4; charset=utf-8\r\n");
    write!(&stream, "{head}content-length: {length}\r\nconnection: close\r\n\r\n{text}")
}
