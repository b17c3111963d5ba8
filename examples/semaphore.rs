//! Three graphics cards for all machines: a semaphore, whose permits say which card is whose.
//!
//! ```text
//! cargo run --example semaphore
//! ```
//!
//! With `DATABASE_URL` set, run it in two terminals at once; the table `dsync_demo_card` stays in that database. Without, it starts a PostgreSQL
//! server of its own.

use std::env;
use std::error::Error;
use std::process::{self, ExitCode};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use dsync::postgres::{Client, NoTls};
use dsync::{Config, PostgresManager};

/// How many cards there are. All machines say the same.
const CARDS: u32 = 3;
/// Threads of this machine that render pictures, each so many.
const PAINTERS: usize = 5;
const PICTURES: usize = 8;
/// How long it takes to render one.
const RENDERING: Duration = Duration::from_millis(40);
/// How long anybody waits for a card. Who waits for longer ends the example with an error.
const PATIENCE: Duration = Duration::from_secs(30);

type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

/// How many cards this machine uses now, and has used at once.
#[derive(Default)]
struct Use {
    cards: AtomicUsize,
    most: AtomicUsize,
}

fn main() -> ExitCode {
    env_logger::init();
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("semaphore: {error}: {:?}", error.source());
            ExitCode::FAILURE
        }
    }
}

fn run() -> Outcome<()> {
    let server;
    let url = match env::var("DATABASE_URL") {
        Ok(url) => url,
        Err(_) => {
            server = support::Server::start()?;
            server.url()
        }
    };
    // Apart from the locks of whatever else uses the database.
    let config = Config::from_url(&url)?.namespace("dsync-example");
    let manager = PostgresManager::connect(config)?;
    let mut client = Client::connect(&url, NoTls)?;
    manager.lock("cards")?.with_lock(PATIENCE, |_| {
        client.batch_execute(&format!(
            "CREATE TABLE IF NOT EXISTS dsync_demo_card (number int PRIMARY KEY, picture text, done bigint NOT NULL DEFAULT 0);
             INSERT INTO dsync_demo_card SELECT number FROM generate_series(1, {CARDS}) AS number ON CONFLICT DO NOTHING"
        ))
    })??;
    let used = Use::default();
    let outcomes: Vec<Outcome<()>> = thread::scope(|scope| {
        let paint = |number| {
            let (url, manager, used) = (&url, &manager, &used);
            scope.spawn(move || paint(url, manager, number, used))
        };
        let painters: Vec<_> = (0..PAINTERS).map(paint).collect();
        let joined = painters.into_iter().map(|painter| painter.join());
        joined.map(|outcome| outcome.unwrap_or_else(|_| Err("a thread panicked".into()))).collect()
    });
    outcomes.into_iter().collect::<Outcome<()>>()?;
    let (pictures, most) = (PAINTERS * PICTURES, used.most.into_inner());
    println!("all done: {pictures} pictures, on up to {most} cards at once, and no card had two");
    Ok(())
}

/// Renders pictures, each on the card that is free.
fn paint(url: &str, manager: &PostgresManager, number: usize, used: &Use) -> Outcome<()> {
    let mut client = Client::connect(url, NoTls)?;
    for picture in 0..PICTURES {
        let picture = format!("{}/{number}/{picture}", process::id());
        let begun = Instant::now();
        let guard = manager.semaphore("card", CARDS)?.acquire(PATIENCE)?;
        let waited = begun.elapsed();
        // Nobody else has the permit with this number, and so the card.
        let card = guard.term().permit().ok_or("no permit")?.cast_signed();
        used.most.fetch_max(used.cards.fetch_add(1, SeqCst) + 1, SeqCst);

        let mut transaction = client.transaction()?;
        // Fails if the permit was lost and somebody has it.
        guard.term().fence(&mut transaction)?;
        transaction
            .execute("UPDATE dsync_demo_card SET picture = $2 WHERE number = $1", &[&card, &picture])?;
        transaction.commit()?;
        thread::sleep(RENDERING);
        let mut transaction = client.transaction()?;
        guard.term().fence(&mut transaction)?;
        let done =
            "UPDATE dsync_demo_card SET picture = NULL, done = done + 1 WHERE number = $1 AND picture = $2";
        if transaction.execute(done, &[&card, &picture])? != 1 {
            return Err(format!("card {card} was given to another picture than {picture}").into());
        }
        transaction.commit()?;

        used.cards.fetch_sub(1, SeqCst);
        // The picture is done, whatever comes of the permit.
        drop(guard);
        println!("picture {picture} is rendered on card {card}, after {waited:.0?} of waiting");
    }
    Ok(())
}
