//! What the library costs above the driver used by hand: lock and release, a lock in a transaction, and the hand-over to a waiter.
//!
//! Each round measures every contender once, so that whatever else the machine does hits all of them alike; the figures
//! to look at are the ratios. All is measured on one processor, where they do not depend on which contender the scheduler
//! wakes on which one; then the main rows again on all, for comparison, without a target.

mod kit;

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::bounded;
use dsync::{Canceller, CatalogMode, Config, Context, Lock, PostgresManager, Quorum};
use kit::raw::{self, Raw, Watcher};
use kit::{Bench, Contender, Place, Plan, Row, Series, Target, interleave_list, micros, processors, time};
use postgres::{Client, SimpleQueryMessage};
use support::Replication;

/// Keys of the driver by hand.
const KEY: i64 = 4711;
const KEY_WITH_ROW: i64 = 4712;
/// That of readers, with a row.
const SHARED_KEY: i64 = 4716;
/// Those of the permits of a semaphore are the three behind it.
const PERMITS_KEY: i64 = 4720;
/// Those of a set.
const SET: RangeInclusive<i64> = 4713..=4715;

/// Long enough never to end a call here.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a pair is to reach without the catalog, and with it; each beside the same by hand.
const PAIR: [Target; 2] = [Target::Ratio(1.05), Target::Ratio(1.10)];
/// What a hand-over is to reach, beside the same by hand.
const HAND_OVER: Target = Target::Ratio(1.10);

/// Without the catalog, and with it: the order of everything that there is two of.
const MODES: [CatalogMode; 2] = [CatalogMode::None, CatalogMode::Automatic];
const NAMES: [&str; 2] = ["no catalog", "with token and row"];

/// How an application begins to hold the lock.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Call {
    Lock,
    Deadline,
    Cancellable,
    CancellableDeadline,
    TryLock,
    Guard,
}

impl Call {
    const OF_A_PAIR: [Self; 6] = [
        Self::Lock,
        Self::Deadline,
        Self::Cancellable,
        Self::CancellableDeadline,
        Self::TryLock,
        Self::Guard,
    ];
    const OF_A_WAITER: [Self; 4] = [Self::Lock, Self::Deadline, Self::Cancellable, Self::CancellableDeadline];

    /// Those that are measured a second time on all processors: the plain one, and what a service does.
    fn is_main(self) -> bool {
        matches!(self, Self::Lock | Self::CancellableDeadline)
    }

    fn name_of_pair(self) -> &'static str {
        match self {
            Self::Lock => "lock + release",
            Self::Deadline => "lock with a deadline + release",
            Self::Cancellable => "lock with a cancellable context + release",
            Self::CancellableDeadline => "lock with a deadline in a cancellable context + release",
            Self::TryLock => "try_lock + release",
            Self::Guard => "guard: acquire + release",
        }
    }

    fn name_of_hand_over(self) -> &'static str {
        match self {
            Self::Deadline => "hand-over to a waiter with a deadline",
            Self::Cancellable => "hand-over to a waiter with a cancellable context",
            Self::CancellableDeadline => "hand-over to a waiter with a deadline in a cancellable context",
            _ => "hand-over",
        }
    }

    /// Takes the lock, does `held`, and gives it back.
    fn pair(self, lock: &Arc<dyn Lock>, shutdown: &Shutdown, held: impl FnOnce()) {
        // Made each time, as an application makes it.
        let context = match self {
            Self::Lock | Self::Guard => Context::background(),
            Self::Deadline | Self::TryLock => Context::timeout(PATIENCE),
            Self::Cancellable => shutdown.context.clone(),
            Self::CancellableDeadline => shutdown.context.with_timeout(PATIENCE),
        };
        if self == Self::Guard {
            let guard = lock.acquire(&context).expect("the lock");
            held();
            guard.release().expect("the release");
            return;
        }
        match self {
            Self::TryLock => lock.try_lock(&context),
            _ => lock.lock(&context),
        }
        .expect("the lock");
        held();
        lock.release().expect("the release");
    }
}

/// By which a service tells all its threads to end: made once, and never used here.
struct Shutdown {
    context: Context,
    _canceller: Canceller,
}

impl Shutdown {
    fn new() -> Self {
        let (context, canceller) = Context::background().with_cancel();
        Self { context, _canceller: canceller }
    }
}

fn main() {
    let mut bench = Bench::start("floor");
    let bound = processors::on_one(|| measure(&mut bench, Place::OneProcessor));
    if !bound || processors::are_several() {
        measure(&mut bench, Place::AllProcessors);
    }
    bench.finish();
}

/// The server, too, is started at the place.
fn measure(bench: &mut Bench, place: Place) {
    let server = kit::server();
    let database = server.database().expect("a database");
    pairs(bench, place, &database.url());
    tries(bench, place, &database.url());
    if place == Place::OneProcessor {
        readers(bench, place, &database.url());
        permits(bench, place, &database.url());
        sets(bench, place, &database.url());
    }
    transactions(bench, place, &database.url());
    hand_overs(bench, place, &database.url());
    drop(database);
    drop(server);
    confirmed(bench, place);
}

fn managers(url: &str) -> [PostgresManager; 2] {
    MODES.map(|mode| kit::manager(url, mode, 2))
}

fn lock(manager: &PostgresManager) -> Arc<dyn Lock> {
    manager.lock_with("bench", kit::annotated()).expect("a lock")
}

fn pairs(bench: &mut Bench, place: Place, url: &str) {
    let plan = bench.choose(
        Plan { repetitions: 7, rounds: 1_000, warm_up: 200 },
        Plan { repetitions: 3, rounds: 50, warm_up: 20 },
    );
    let managers = managers(url);
    let locks = managers.each_ref().map(lock);
    let observed_managers = MODES.map(|mode| kit::observed_manager(url, mode, 2));
    let observed = observed_managers.each_ref().map(lock);
    let shutdown = Shutdown::new();
    let by_hand = |name, mut raw: Raw, key: i64| {
        Contender::new(name, move || {
            let taken = time(|| {
                raw.lock(key);
                raw.unlock(key);
            });
            [micros(taken)]
        })
    };
    let mut contenders = vec![
        by_hand(raw::NAME, Raw::connect(url), KEY),
        by_hand(raw::NAME_WITH_ROW, Raw::with_row(url, KEY_WITH_ROW), KEY_WITH_ROW),
    ];
    for lock in &locks {
        contenders.extend(Call::OF_A_PAIR.map(|call| {
            let shutdown = &shutdown;
            Contender::new("dsync", move || [micros(time(|| call.pair(lock, shutdown, || ())))])
        }));
    }
    contenders.extend(observed.iter().map(|lock| {
        let shutdown = &shutdown;
        Contender::new("dsync", move || [micros(time(|| Call::Guard.pair(lock, shutdown, || ())))])
    }));
    let series = interleave_list(plan, contenders);
    let (floors, ours) = series.split_at(MODES.len());
    let (ours, observed) = ours.split_at(MODES.len() * Call::OF_A_PAIR.len());
    bench.heading(&place.heading("lock and release, nobody else there"));
    compare(bench, place, floors, ours, &Call::OF_A_PAIR, Call::name_of_pair, PAIR);
    if place == Place::OneProcessor {
        for (mode, [ours]) in observed.iter().enumerate() {
            let name = Call::name_of_pair(Call::Guard);
            let what = place.name(&format!("{name}, with an observer, {}", NAMES[mode]));
            bench.row(Row::compared(what, "µs", &floors[mode][0], ours, Some(PAIR[mode])));
        }
    }
}

/// What it costs that a standby confirms: a heartbeat, by hand, and a lock, whose term begins with a confirmation. The library asks the
/// standby once for all locks of a manager whose heartbeats come together.
fn confirmed(bench: &mut Bench, place: Place) {
    let plan = bench.choose(
        Plan { repetitions: 7, rounds: 500, warm_up: 100 },
        Plan { repetitions: 3, rounds: 50, warm_up: 20 },
    );
    let primary = kit::server();
    let _standby = primary.standby(Replication::Synchronous).expect("a standby");
    // All managers of a database have the quorum, or none.
    let databases = [(); 2].map(|()| primary.database().expect("a database"));
    let managers = [(Quorum::Server, &databases[0]), (Quorum::NamedStandbys, &databases[1])];
    let managers = managers.map(|(quorum, database)| {
        let config = Config::from_url(&database.url()).expect("a URL").max_sessions(2).quorum(quorum);
        PostgresManager::connect(config).expect("a server")
    });
    let [plain, with_quorum] = managers.each_ref().map(lock);
    let shutdown = Shutdown::new();
    let pair = |lock: Arc<dyn Lock>| {
        let shutdown = &shutdown;
        Contender::new("dsync", move || [micros(time(|| Call::Lock.pair(&lock, shutdown, || ())))])
    };
    let mut clients = [(); 2].map(|()| raw::connect(&databases[0].url()));
    let [beats, confirms] = &mut clients;
    let contenders = vec![
        Contender::new("a heartbeat by hand", move || [micros(time(|| beat(beats)))]),
        Contender::new("by hand", move || {
            [micros(time(|| {
                beat(confirms);
                be_confirmed(confirms);
            }))]
        }),
        pair(plain),
        pair(with_quorum),
    ];
    let series = interleave_list(plan, contenders);
    let [[beat], [confirmed], [plain], [with_quorum]] = &series[..] else { return };
    bench.heading(&place.heading("a standby on the same machine confirms"));
    for (what, plain, confirmed) in [
        ("heartbeat and its confirmation, by hand", beat, confirmed),
        ("lock + release, with token and row, the beginning confirmed", plain, with_quorum),
    ] {
        bench.row(Row::compared(place.name(what), "µs", plain, confirmed, None));
    }
}

fn beat(client: &mut Client) {
    client.simple_query("SELECT pg_backend_pid(), pg_is_in_recovery()").expect("an answer");
}

/// A record in the server's log, and looks until the standby has it.
fn be_confirmed(client: &mut Client) {
    let record =
        "SET LOCAL synchronous_commit = local; SELECT pg_logical_emit_message(true, 'bench', ''::text)";
    let answers = client.simple_query(record).expect("a record");
    let place = answers.iter().find_map(|answer| match answer {
        SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
        _ => None,
    });
    let place = place.expect("its place");
    let look = format!("SELECT FROM pg_stat_replication WHERE flush_lsn >= '{place}'");
    while client.query(&look, &[]).expect("an answer").is_empty() {}
}

/// A lock that another session has, and what it takes to be told so.
fn tries(bench: &mut Bench, place: Place, url: &str) {
    let plan = bench.choose(
        Plan { repetitions: 7, rounds: 1_000, warm_up: 200 },
        Plan { repetitions: 3, rounds: 50, warm_up: 20 },
    );
    let ([holder, _], others) = (managers(url), managers(url));
    let _guard = lock(&holder).acquire(PATIENCE).expect("the lock");
    let mut raw_holder = Raw::connect(url);
    raw_holder.lock(KEY);
    let mut raw = raw::connect(url);
    let statement = raw.prepare("SELECT pg_try_advisory_lock($1)").expect("a statement");
    let mut contenders = vec![Contender::new(raw::NAME, move || {
        [micros(time(|| {
            let row = raw.query_one(&statement, &[&KEY]).expect("an answer");
            assert!(!row.get::<_, bool>(0), "another session has it");
        }))]
    })];
    contenders.extend(others.each_ref().map(lock).map(|lock| {
        Contender::new("dsync", move || {
            [micros(time(|| assert!(lock.try_acquire().expect("an answer").is_none())))]
        })
    }));
    let series = interleave_list(plan, contenders);
    let (floor, ours) = (&series[0][0], &series[1..]);
    bench.heading(&place.heading("try_acquire, another session has the lock"));
    for (mode, [ours]) in ours.iter().enumerate() {
        let what = place.name(&format!("try_acquire of a busy lock, {}", NAMES[mode]));
        bench.row(Row::compared(what, "µs", floor, ours, None));
    }
}

/// A lock that others might share.
fn readers(bench: &mut Bench, place: Place, url: &str) {
    let plan = bench.choose(
        Plan { repetitions: 7, rounds: 1_000, warm_up: 200 },
        Plan { repetitions: 3, rounds: 50, warm_up: 20 },
    );
    let managers = managers(url);
    let by_hand =
        |name, mut raw: Raw, key: i64| Contender::new(name, move || [micros(time(|| raw.pair(key)))]);
    let mut contenders = vec![
        by_hand(raw::NAME, Raw::shared(url), KEY),
        by_hand(raw::NAME_WITH_ROW, Raw::shared_with_row(url, SHARED_KEY), SHARED_KEY),
    ];
    contenders.extend(managers.each_ref().map(|manager| {
        let lock = manager.shared_lock("bench").expect("a lock");
        Contender::new("dsync", move || {
            [micros(time(|| lock.acquire(PATIENCE).expect("the lock").release().expect("the release")))]
        })
    }));
    let series = interleave_list(plan, contenders);
    let (floors, ours) = series.split_at(MODES.len());
    bench.heading(&place.heading("shared lock: acquire and release, nobody else there"));
    for (mode, [ours]) in ours.iter().enumerate() {
        let what = place.name(&format!("shared lock: acquire + release, {}", NAMES[mode]));
        bench.row(Row::compared(what, "µs", &floors[mode][0], ours, None));
    }
}

/// A permit of a semaphore: alone, and handed over to a waiter, who looks for it. The latter beside the hand-over of a lock.
fn permits(bench: &mut Bench, place: Place, url: &str) {
    let plan = bench.choose(
        Plan { repetitions: 7, rounds: 1_000, warm_up: 200 },
        Plan { repetitions: 3, rounds: 50, warm_up: 20 },
    );
    let [[_, holder], [_, waiter]] = [managers(url), managers(url)];
    let semaphore =
        |manager: &PostgresManager, permits| manager.lock_with("bench", kit::annotated().permits(permits));
    let permit = holder.lock_with("bench/three", kit::annotated().permits(3)).expect("a semaphore");
    let mut raw = Raw::permit_with_row(url, PERMITS_KEY);
    let series = interleave_list(
        plan,
        vec![
            Contender::new(raw::NAME_WITH_ROW, move || [micros(time(|| raw.pair(PERMITS_KEY)))]),
            Contender::new("dsync", move || {
                [micros(time(|| permit.acquire(PATIENCE).expect("a permit").release().expect("the release")))]
            }),
        ],
    );
    bench.heading(&place.heading("semaphore: a permit of three, nobody else there"));
    let what = place.name("permit: acquire + release, with token and row");
    bench.row(Row::compared(what, "µs", &series[0][0], &series[1][0], None));

    let plan = bench.choose(
        Plan { repetitions: 7, rounds: 150, warm_up: 20 },
        Plan { repetitions: 3, rounds: 10, warm_up: 3 },
    );
    let hand_over = |[holder, waiter]: [Arc<dyn Lock>; 2], mut watcher: Watcher| {
        Contender::new("dsync", move || {
            let guard = holder.acquire(PATIENCE).expect("the lock");
            let waiter = &waiter;
            let wait = move |granted: &dyn Fn()| {
                let guard = waiter.acquire(PATIENCE).expect("the lock");
                granted();
                guard.release().expect("the release");
            };
            [micros(hand_over(&mut watcher, || guard.release().expect("the release"), wait))]
        })
    };
    let managers = [&holder, &waiter];
    let series = interleave_list(
        plan,
        vec![
            hand_over(managers.map(lock), Watcher::connect(url)),
            hand_over(
                managers.map(|manager| semaphore(manager, 1).expect("a semaphore")),
                Watcher::of_permits(url),
            ),
        ],
    );
    bench.heading(&place.heading("hand-over of a permit, beside that of a lock"));
    let what = place.name("permit: hand-over, beside that of a guard of a lock, with token and row");
    bench.row(Row::compared(what, "µs", &series[0][0], &series[1][0], None));
}

/// Three locks at once. By hand they are three on one session.
fn sets(bench: &mut Bench, place: Place, url: &str) {
    let plan = bench.choose(
        Plan { repetitions: 7, rounds: 500, warm_up: 100 },
        Plan { repetitions: 3, rounds: 30, warm_up: 10 },
    );
    let managers = MODES.map(|mode| kit::manager(url, mode, 4));
    let by_hand = |name, mut raw: Raw| {
        Contender::new(name, move || {
            [micros(time(|| {
                SET.for_each(|key| raw.lock(key));
                SET.for_each(|key| raw.unlock(key));
            }))]
        })
    };
    let mut contenders = vec![
        by_hand(raw::NAME, Raw::connect(url)),
        by_hand(raw::NAME_WITH_ROW, Raw::with_row_each(url, SET)),
    ];
    contenders.extend(managers.each_ref().map(|manager| {
        let set = manager.multi_lock(["bench/a", "bench/b", "bench/c"]).expect("a set");
        Contender::new("dsync", move || {
            [micros(time(|| set.acquire(PATIENCE).expect("the locks").release().expect("the release")))]
        })
    }));
    let series = interleave_list(plan, contenders);
    let (floors, ours) = series.split_at(MODES.len());
    bench.heading(&place.heading("three locks at once, nobody else there"));
    for (mode, [ours]) in ours.iter().enumerate() {
        let what = place.name(&format!("multi_lock of three: acquire + release, {}", NAMES[mode]));
        bench.row(Row::compared(what, "µs", &floors[mode][0], ours, None));
    }
}

/// A lock that nobody else wants, on a connection that is there already.
fn transactions(bench: &mut Bench, place: Place, url: &str) {
    let plan = bench.choose(
        Plan { repetitions: 7, rounds: 1_000, warm_up: 200 },
        Plan { repetitions: 3, rounds: 50, warm_up: 20 },
    );
    let [mut client, mut raw] = [(); 2].map(|()| raw::connect(url));
    let statement = raw.prepare("SELECT pg_advisory_xact_lock($1)").expect("a statement");
    let [manager, _] = managers(url);
    let lock = manager.transaction_lock("bench").expect("a lock");
    let contenders = vec![
        Contender::new(raw::NAME, move || {
            [micros(time(|| {
                let mut transaction = raw.transaction().expect("a transaction");
                transaction.execute(&statement, &[&KEY]).expect("the lock");
                transaction.commit().expect("the commit");
            }))]
        }),
        Contender::new("dsync", move || {
            [micros(time(|| {
                let mut transaction = client.transaction().expect("a transaction");
                lock.acquire(&mut transaction, PATIENCE).expect("the lock");
                transaction.commit().expect("the commit");
            }))]
        }),
    ];
    let series = interleave_list(plan, contenders);
    bench.heading(&place.heading("transaction lock, nobody else there"));
    let what = place.name("transaction lock: begin + acquire + commit");
    bench.row(Row::compared(what, "µs", &series[0][0], &series[1][0], None));
}

fn hand_overs(bench: &mut Bench, place: Place, url: &str) {
    let plan = bench.choose(
        Plan { repetitions: 7, rounds: 150, warm_up: 20 },
        Plan { repetitions: 3, rounds: 10, warm_up: 3 },
    );
    // Holder and waiter are two processes in life, so they have a manager each.
    let pairs_of_managers = [managers(url), managers(url)];
    let [holders, waiters] = pairs_of_managers.each_ref().map(|managers| managers.each_ref().map(lock));
    let shutdown = Shutdown::new();
    let by_hand = |name, [mut holder, mut waiter]: [Raw; 2], key: i64| {
        let mut watcher = Watcher::connect(url);
        Contender::new(name, move || {
            holder.lock(key);
            let waiter = &mut waiter;
            let wait = move |granted: &dyn Fn()| {
                waiter.lock(key);
                granted();
                waiter.unlock(key);
            };
            let taken = hand_over(&mut watcher, || holder.unlock(key), wait);
            [micros(taken)]
        })
    };
    let mut contenders = vec![
        by_hand(raw::NAME, [(); 2].map(|()| Raw::connect(url)), KEY),
        by_hand(raw::NAME_WITH_ROW, [(); 2].map(|()| Raw::with_row(url, KEY_WITH_ROW)), KEY_WITH_ROW),
    ];
    for (holder, waiter) in holders.iter().zip(&waiters) {
        contenders.extend(Call::OF_A_WAITER.map(|call| {
            let shutdown = &shutdown;
            let mut watcher = Watcher::connect(url);
            Contender::new("dsync", move || {
                holder.lock(&Context::background()).expect("the lock");
                let wait = |granted: &dyn Fn()| call.pair(waiter, shutdown, granted);
                let taken = hand_over(&mut watcher, || holder.release().expect("the release"), wait);
                [micros(taken)]
            })
        }));
    }
    let series = interleave_list(plan, contenders);
    let (floors, ours) = series.split_at(MODES.len());
    bench.heading(
        &place.heading("hand-over: the holder's release is called -> the waiter's lock has returned"),
    );
    compare(bench, place, floors, ours, &Call::OF_A_WAITER, Call::name_of_hand_over, [HAND_OVER; 2]);
}

/// The rows: each mode beside its floor, and what the row adds to the plain floor. `ours` has all calls of the one mode, and
/// then all of the other.
fn compare(
    bench: &mut Bench,
    place: Place,
    floors: &[[Series; 1]],
    ours: &[[Series; 1]],
    calls: &[Call],
    name: impl Fn(Call) -> &'static str,
    targets: [Target; 2],
) {
    // Judged is what does not depend on luck.
    let is_judged = place == Place::OneProcessor;
    for (mode, ours) in ours.chunks(calls.len()).enumerate() {
        for (&call, [ours]) in calls.iter().zip(ours) {
            if !is_judged && !call.is_main() {
                continue;
            }
            let what = place.name(&format!("{}, {}", name(call), NAMES[mode]));
            let target = is_judged.then_some(targets[mode]);
            bench.row(Row::compared(what, "µs", &floors[mode][0], ours, target));
        }
    }
    let what =
        place.name(&format!("{}, with token and row, beside the plain lock by hand", name(Call::Lock)));
    bench.row(Row::compared(what, "µs", &floors[0][0], &ours[calls.len()][0], None));
}

/// The time from the holder's release to the waiter's lock. The lock is held when this begins, and free at its end.
/// `wait` is to take the lock, say so, and give it back.
fn hand_over(watcher: &mut Watcher, release: impl FnOnce(), wait: impl FnOnce(&dyn Fn()) + Send) -> Duration {
    thread::scope(|scope| {
        let (done, granted) = bounded(1);
        scope.spawn(move || wait(&|| done.send(Instant::now()).expect("the bench")));
        watcher.wait_for_waiter();
        let released = Instant::now();
        release();
        granted.recv().expect("the waiter") - released
    })
}
