//! Callers whose context is cancelled while they ask the server themselves: they leave at once, and the claim goes on.

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::bounded;
use dsync::{Config, Context, ErrorKind, Lock, LockOptions, SyncManager};
use support::Server;
use support::process::{Signal, signal};

use crate::common::{Outcome, PATIENCE, SilentHost, becomes, begin, eventually, kind, lock, soon, started};

/// A caller that is in the midst of a short statement is given 100 ms to end it; the rest is for a busy machine. Without the cancellation the
/// shortest of these waits takes 10 s, the share that one of two hosts has of a connect.
const AT_ONCE: Duration = Duration::from_secs(8);

/// A server that does not answer has this long to end a wait.
const REQUEST: Duration = Duration::from_secs(1);

/// The slice of a wait and the timeout of a heartbeat are far longer than what a cancellation may take.
fn config(server: &Server) -> Config {
    Config::from_url(&server.url())
        .unwrap()
        .lease(Duration::from_secs(120))
        .wait_slice(Duration::from_secs(30))
        .release_timeout(Duration::from_secs(20))
}

/// A call that waits in a thread of its own.
fn call(lock: &Arc<dyn Lock>, context: Context) -> Outcome<dsync::Result<()>> {
    let lock = Arc::clone(lock);
    begin(move || lock.lock(&context))
}

fn waiters(server: &Server) -> usize {
    let statement = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted";
    let count: i64 = server.client().unwrap().query_one(statement, &[]).unwrap().get(0);
    count.try_into().unwrap()
}

#[test]
fn a_cancelled_wait_ends_at_once_and_the_claim_goes_on() {
    let server = Server::start().unwrap();
    let config = || config(&server);
    let (holding, waiting) = (started(config()), started(config()));
    let (holder, waiter) = (lock(&holding, "x"), lock(&waiting, "x"));
    for round in 0..5 {
        holder.lock(&soon()).unwrap();
        let (context, canceller) = Context::background().with_cancel();
        let wait = call(&waiter, context);
        becomes("the queue", &1, || waiters(&server));
        let begun = Instant::now();
        canceller.cancel();
        assert_eq!(kind(wait.get()), ErrorKind::Cancelled);
        assert!(begun.elapsed() < AT_ONCE, "round {round}: {:?}", begun.elapsed());
        // In the background, by the thread that ended the call's wait.
        becomes("the queue", &1, || waiters(&server));
        holder.release().unwrap();
        waiter.wait(&soon()).unwrap();
        waiter.release().unwrap();
    }
}

#[test]
fn a_cancelled_caller_does_not_end_the_wait_of_another_one() {
    let server = Server::start().unwrap();
    let config = || config(&server);
    let (holding, waiting) = (started(config()), started(config()));
    let (holder, waiter) = (lock(&holding, "x"), lock(&waiting, "x"));
    holder.lock(&soon()).unwrap();
    let mut cancellers = Vec::new();
    let calls: Vec<_> = (0..4)
        .map(|_| {
            let (context, canceller) = soon().with_cancel();
            cancellers.push(canceller);
            call(&waiter, context)
        })
        .collect();
    becomes("the queue", &1, || waiters(&server));
    let patient = call(&waiter, soon());
    for (wait, canceller) in calls.into_iter().zip(cancellers) {
        let begun = Instant::now();
        canceller.cancel();
        assert_eq!(kind(wait.get()), ErrorKind::Cancelled);
        assert!(begun.elapsed() < AT_ONCE, "{:?}", begun.elapsed());
        assert!(!patient.is_ready());
    }
    holder.release().unwrap();
    patient.get().unwrap();
    waiter.release().unwrap();
}

/// A statement that the server does not answer cannot be cancelled at the server, so the session goes.
#[test]
fn a_call_is_cancelled_while_the_server_does_not_answer() {
    let server = Server::start().unwrap();
    let manager = started(config(&server));
    let lock = lock(&manager, "x");
    lock.lock(&soon()).unwrap();
    lock.release().unwrap();
    let frozen = server.freeze().unwrap();
    let (context, canceller) = Context::background().with_cancel();
    let wait = call(&lock, context);
    // There is nothing to be seen of a statement that nobody answers.
    thread::sleep(Duration::from_millis(50));
    let begun = Instant::now();
    canceller.cancel();
    assert_eq!(kind(wait.get()), ErrorKind::Cancelled);
    assert!(begun.elapsed() < AT_ONCE, "{:?}", begun.elapsed());
    frozen.thaw();
    lock.wait(&soon()).unwrap();
    lock.release().unwrap();
}

/// Nor does it heed the cancel request that is to end a wait.
#[test]
fn a_wait_is_cancelled_while_the_server_does_not_answer() {
    let server = Server::start().unwrap();
    let config = || config(&server);
    let (holding, waiting) = (started(config()), started(config()));
    let (holder, waiter) = (lock(&holding, "x"), lock(&waiting, "x"));
    holder.lock(&soon()).unwrap();
    let (context, canceller) = Context::background().with_cancel();
    let wait = call(&waiter, context);
    becomes("the queue", &1, || waiters(&server));
    let frozen = server.freeze().unwrap();
    let begun = Instant::now();
    canceller.cancel();
    assert_eq!(kind(wait.get()), ErrorKind::Cancelled);
    assert!(begun.elapsed() < REQUEST + AT_ONCE, "{:?}", begun.elapsed());
    frozen.thaw();
    let _ = holder.release();
    waiter.wait(&soon()).unwrap();
    waiter.release().unwrap();
}

#[test]
fn a_call_is_cancelled_while_it_connects() {
    let silent = SilentHost::new();
    let server = Server::start().unwrap();
    let url = format!(
        "host=127.0.0.1,127.0.0.1 port={},{} user=postgres dbname=postgres",
        silent.port(),
        server.port()
    );
    let config = Config::from_url(&url).unwrap().connect_timeout(Duration::from_secs(20));
    let manager = dsync::PostgresManager::new(config).unwrap();
    let manager = Arc::new(manager);
    let starting = {
        let manager = Arc::clone(&manager);
        begin(move || manager.start())
    };
    // Before the start has begun, a call says so instead.
    becomes("the start", &ErrorKind::Cancelled, || kind(manager.lock("x").unwrap().try_lock(&cancelled())));
    let lock = lock(&manager, "x");
    let (context, canceller) = Context::background().with_cancel();
    let wait = call(&lock, context);
    thread::sleep(Duration::from_millis(50));
    let begun = Instant::now();
    canceller.cancel();
    assert_eq!(kind(wait.get()), ErrorKind::Cancelled);
    assert!(begun.elapsed() < AT_ONCE, "{:?}", begun.elapsed());
    manager.stop().unwrap();
    let _ = starting.get();
}

fn cancelled() -> Context {
    let (context, canceller) = Context::background().with_cancel();
    canceller.cancel();
    context
}

/// Whenever the cancellation comes: before the call, at the beginning of a statement, at its end, or too late.
#[test]
fn a_cancellation_is_heard_whenever_it_comes() {
    let server = Server::start().unwrap();
    let config = || config(&server);
    let (holding, waiting) = (started(config()), started(config()));
    let (holder, waiter) = (lock(&holding, "x"), lock(&waiting, "x"));
    for round in 0..300_u64 {
        holder.lock(&soon()).unwrap();
        let (context, canceller) = Context::background().with_cancel();
        let wait = call(&waiter, context);
        let until = Instant::now() + Duration::from_micros(round * 7);
        while Instant::now() < until {
            std::hint::spin_loop();
        }
        let begun = Instant::now();
        canceller.cancel();
        assert_eq!(kind(wait.get()), ErrorKind::Cancelled);
        assert!(begun.elapsed() < AT_ONCE, "round {round}: {:?}", begun.elapsed());
        // On a machine that is so busy that the caller could not leave by itself, its session was closed.
        if let Err(error) = waiter.release() {
            assert_eq!(error.kind(), ErrorKind::UnlockFailed, "{error}");
        }
        holder.release().unwrap();
    }
    waiter.lock(&soon()).unwrap();
    waiter.release().unwrap();
}

/// The server takes the request, and the session that it is for does not answer.
#[test]
fn a_wait_is_cancelled_while_only_its_own_session_does_not_answer() {
    let server = Server::start().unwrap();
    let config = || config(&server);
    let (holding, waiting) = (started(config()), started(config()));
    let (holder, waiter) = (lock(&holding, "x"), lock(&waiting, "x"));
    holder.lock(&soon()).unwrap();
    let (context, canceller) = Context::background().with_cancel();
    let wait = call(&waiter, context);
    becomes("the queue", &1, || waiters(&server));
    let statement = "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND NOT granted";
    let pid: i32 = server.client().unwrap().query_one(statement, &[]).unwrap().get(0);
    signal(pid, Signal::Stop).unwrap();
    let begun = Instant::now();
    canceller.cancel();
    let outcome = kind(wait.get());
    let took = begun.elapsed();
    signal(pid, Signal::Continue).unwrap();
    assert_eq!(outcome, ErrorKind::Cancelled);
    assert!(took < REQUEST + AT_ONCE, "{took:?}");
    holder.release().unwrap();
    waiter.wait(&soon()).unwrap();
    waiter.release().unwrap();
}

#[test]
fn a_slow_valuer_does_not_outlast_a_cancellation() {
    let server = Server::start().unwrap();
    let manager = started(Config::from_url(&server.url()).unwrap());
    let (entered, enters) = bounded(1);
    let (leave, left) = bounded::<()>(0);
    let valuer = Arc::new(move || {
        let _ = entered.try_send(());
        let _ = left.recv();
        Vec::new()
    });
    let lock = manager.lock_with("x", LockOptions::new().valuer(valuer)).unwrap();
    let (context, canceller) = Context::background().with_cancel();
    let wait = call(&lock, context);
    enters.recv_timeout(PATIENCE).unwrap();
    let begun = Instant::now();
    canceller.cancel();
    assert_eq!(kind(wait.get()), ErrorKind::Cancelled);
    assert!(begun.elapsed() < AT_ONCE, "{:?}", begun.elapsed());
    drop(leave);
    lock.wait(&soon()).unwrap();
    lock.release().unwrap();
}

#[test]
fn a_cancellation_does_not_use_up_the_one_attempt_of_another_caller() {
    let server = Server::start().unwrap();
    let manager = started(Config::from_url(&server.url()).unwrap().connect_timeout(Duration::from_secs(20)));
    // It takes the session of the start.
    let other = lock(&manager, "other");
    other.lock(&soon()).unwrap();
    let lock = lock(&manager, "x");
    let frozen = server.freeze().unwrap();
    let (context, canceller) = Context::background().with_cancel();
    let cancelled = call(&lock, context);
    // Nothing is to be seen of an attempt to connect to a server that does not answer.
    thread::sleep(Duration::from_millis(100));
    let once = {
        let lock = Arc::clone(&lock);
        begin(move || lock.try_lock(&Context::timeout(Duration::ZERO)))
    };
    thread::sleep(Duration::from_millis(100));
    canceller.cancel();
    assert_eq!(kind(cancelled.get()), ErrorKind::Cancelled);
    frozen.thaw();
    once.get().unwrap();
    lock.release().unwrap();
}

/// A thread that has had to wait for the lock asks by a statement that waits. Who asks beside it is told the truth.
#[test]
fn try_lock_beside_a_thread_that_has_waited_before_is_not_told_of_a_holder_that_is_not_there() {
    let server = Server::start().unwrap();
    let config = || config(&server);
    let (ours, theirs) = (started(config()), started(config()));
    let (lock, rival) = (lock(&ours, "x"), lock(&theirs, "x"));
    let (done, turns) = (AtomicBool::new(false), AtomicUsize::new(0));
    thread::scope(|scope| {
        let taking_turns = |lock: Arc<dyn Lock>, until: &'static str| {
            let (done, turns) = (&done, &turns);
            scope.spawn(move || {
                for turn in 0.. {
                    match lock.lock(&soon()) {
                        Ok(()) => drop(lock.release()),
                        Err(error) => assert_eq!(error.kind(), ErrorKind::Released),
                    }
                    turns.fetch_add(1, SeqCst);
                    if done.load(SeqCst) || (until == "fifty" && turn == 50) {
                        break;
                    }
                }
            })
        };
        let mine = taking_turns(Arc::clone(&lock), "done");
        taking_turns(rival, "fifty").join().unwrap();
        theirs.stop().unwrap();
        // From here on nobody else wants the key. Who waited for the other one may not have read yet that it has the lock.
        let before = turns.load(SeqCst);
        eventually("a turn of its own", || turns.load(SeqCst) > before);
        let is_fine = |outcome: &Result<(), ErrorKind>| matches!(outcome, Ok(()) | Err(ErrorKind::Released));
        let outcomes = (0..2_000).map(|_| lock.try_lock(&soon()).map_err(|error| error.kind()));
        let others: Vec<_> = outcomes.filter(|outcome| !is_fine(outcome)).collect();
        done.store(true, SeqCst);
        mine.join().unwrap();
        assert_eq!(others, []);
    });
}

/// A thread that has had to wait before is waiting when somebody asks, its server process does not heed that, and then it is
/// cancelled.
#[test]
fn a_wait_is_cancelled_after_a_request_that_had_no_effect() {
    let server = Server::start().unwrap();
    let config = || config(&server);
    let (ours, theirs) = (started(config()), started(config()));
    let (lock, rival) = (lock(&ours, "x"), lock(&theirs, "x"));
    let (context, canceller) = Context::background().with_cancel();
    let rivals_turns = {
        let rival = Arc::clone(&rival);
        begin(move || {
            for _ in 0..50 {
                rival.lock(&soon()).unwrap();
                thread::sleep(Duration::from_millis(1));
                rival.release().unwrap();
            }
            rival.lock(&soon()).unwrap();
        })
    };
    let call = {
        let lock = Arc::clone(&lock);
        begin(move || {
            loop {
                if let Err(error) = lock.lock(&context) {
                    return error.kind();
                }
                lock.release().unwrap();
            }
        })
    };
    rivals_turns.get();
    becomes("the queue", &1, || waiters(&server));
    let statement = "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND NOT granted";
    let pid: i32 = server.client().unwrap().query_one(statement, &[]).unwrap().get(0);
    signal(pid, Signal::Stop).unwrap();
    let asked = kind(lock.try_lock(&Context::timeout(Duration::from_millis(1_500))));
    let begun = Instant::now();
    canceller.cancel();
    let outcome = call.get();
    let took = begun.elapsed();
    signal(pid, Signal::Continue).unwrap();
    // Where the thread had asked without a wait before, as it does on a session that was not kept, the answer is known.
    assert!(matches!(asked, ErrorKind::TimedOut | ErrorKind::LockUnavailable), "{asked:?}");
    assert_eq!(outcome, ErrorKind::Cancelled);
    // Without the cancellation it is for ever.
    assert!(took < REQUEST + 2 * AT_ONCE, "{took:?}");
    rival.release().unwrap();
    lock.wait(&soon()).unwrap();
    lock.release().unwrap();
}
