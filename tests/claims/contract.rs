//! What [`Lock`], [`LockGuard`] and [`SyncManager`] promise, on each implementation: every behaviour is one test named
//! `contract::memory::…` and one named `contract::postgres::…`.
//!
//! Each test has a server to itself and managers that play the part of one process each. A call that should end has
//! half a minute for it, so that a fault is a failed test and not a hung one.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use crossbeam_channel::{Receiver, RecvTimeoutError, bounded, select};
use dsync::{
    Context, Error, ErrorKind, Key, Lock, LockOptions, LossReason, Lost, MemoryManager, MemoryServer,
    MultiGuard, MultiLock, Once, Period, SyncManager, json_valuer,
};
use parking_lot::Mutex;

use crate::common::{count_locks, number_of, on_both};

on_both! {
    // Exclusion, and giving the lock on.
    one_of_two_managers_gets_the_lock
    a_released_lock_goes_to_whoever_asks_next
    a_waiting_call_gets_the_lock_when_it_is_released
    a_held_lock_is_acquired_again_at_once
    threads_exclude_each_other_across_managers
    // How a wait ends.
    a_wait_ends_at_its_deadline
    a_wait_ends_when_another_thread_cancels_it
    a_wait_ends_when_a_parent_context_is_cancelled
    an_ended_context_begins_a_claim_and_never_acquires
    a_cancelled_context_comes_before_what_is_known_of_the_lock
    try_lock_without_time_takes_a_free_lock
    try_lock_without_time_is_told_that_another_has_the_lock
    try_lock_without_time_ends_where_nobody_answers
    try_lock_does_not_wait_for_the_holder
    try_lock_says_so_again_while_its_claim_waits
    // The claim goes on whatever the call returned.
    a_timed_out_claim_gets_the_lock_in_the_background
    a_cancelled_claim_gets_the_lock_in_the_background
    an_unavailable_lock_is_acquired_in_the_background
    a_released_claim_does_not_take_the_lock_later
    a_claim_outlives_its_handle
    // Releasing.
    releasing_without_a_claim_does_nothing
    releasing_twice_is_harmless
    concurrent_releases_all_succeed
    a_release_ends_the_wait_of_other_threads
    a_released_lock_can_be_claimed_again
    one_release_ends_the_claim_of_all_threads
    // The lost channel.
    the_lost_channel_is_open_exactly_while_the_lock_is_held
    the_lost_channel_closes_before_another_has_the_lock
    each_term_has_a_lost_channel_of_its_own
    all_listeners_hear_of_the_end_of_a_term
    the_lost_channel_works_in_select
    // What people read.
    errors_read_the_same_everywhere
    a_lock_and_its_term_are_shown_as_a_person_reads_them
    // Losing the lock.
    a_lost_lock_comes_back_without_another_call
    a_lost_lock_goes_to_a_waiter_and_then_comes_back
    a_lost_claim_can_be_released
    a_release_is_no_loss_and_a_loss_is_remembered
    // Handles and options.
    a_key_has_one_handle_in_a_manager
    later_options_are_ignored
    a_key_without_claim_and_handle_is_forgotten
    the_valuer_is_asked_for_each_term
    a_waiter_is_annotated_with_what_its_valuer_says_while_it_waits
    a_release_does_not_wait_for_the_valuer_of_the_next
    a_panicking_valuer_does_not_cost_the_lock
    odd_values_are_taken_literally
    // Keys.
    names_numbers_and_pairs_are_different_keys
    keys_may_contain_anything_but_nul
    keys_that_cannot_name_a_lock_are_refused
    // The life of a manager.
    locks_work_once_the_manager_is_started
    starting_twice_does_nothing
    stopping_gives_locks_to_others
    stopping_takes_claims_out_of_the_queue
    stopping_ends_waiting_calls
    a_stopped_manager_refuses_everything
    stopping_twice_does_nothing
    a_manager_that_was_never_started_can_be_stopped
    dropping_a_manager_stops_it
    // Guards.
    a_guard_releases_when_dropped
    a_guard_can_be_released_by_hand
    a_guard_that_fails_leaves_no_claim
    a_guard_releases_when_its_thread_panics
    a_lost_guard_does_not_come_back_and_says_so
    a_guard_ends_its_own_term_and_nothing_else
    a_busy_lock_is_not_acquired_by_trying
    try_acquire_ends_where_nobody_answers
    a_guard_without_time_is_tried_once
    threads_take_turns_in_the_order_in_which_they_came
    threads_of_two_managers_all_get_their_turns
    a_wait_for_another_thread_ends_as_its_context_says
    a_lost_guard_keeps_no_thread_out
    a_claim_and_a_guard_keep_each_other_out
    a_claim_has_its_turn_among_the_guards_of_its_process
    a_manager_that_stops_ends_guards_and_those_who_wait_for_them
    work_is_done_under_the_lock_which_is_released_when_it_panics
    guards_work_in_generic_code_and_for_any_key
    a_lock_without_token_excludes_all_the_same
    no_schedule_of_guards_and_claims_breaks_exclusion
    // What an operator does.
    a_broken_lock_is_lost_and_goes_to_who_waits
    // Sharing a lock.
    a_shared_lock_is_had_by_many_and_by_none_of_them_beside_a_writer
    a_reader_that_comes_later_waits_behind_a_writer
    readers_without_a_writer_between_have_one_token
    a_reader_that_is_lost_costs_no_other_the_lock
    claims_share_a_lock_as_guards_do
    who_has_a_lock_one_way_is_refused_it_the_other_way
    what_is_for_one_at_a_time_refuses_a_shared_lock
    no_schedule_of_readers_and_writers_breaks_exclusion
    // Semaphores.
    a_semaphore_is_had_by_as_many_as_it_has_permits
    who_waits_for_a_permit_is_served_in_order_and_not_overtaken
    a_permit_that_is_lost_goes_to_who_waits
    claims_have_permits_as_guards_do
    a_semaphore_and_a_lock_of_one_key_are_two_things
    another_number_of_permits_is_told_and_a_changed_one_runs_in
    the_first_holder_is_that_of_the_first_permit
    who_gets_no_permit_is_told_why
    what_is_for_one_at_a_time_refuses_a_semaphore
    no_schedule_of_permits_goes_above_their_number
    // Several locks at once.
    a_set_of_locks_is_taken_as_a_whole_and_each_key_once
    a_set_of_which_one_lock_is_busy_is_not_taken
    a_set_is_lost_with_the_first_of_its_locks
    a_set_that_cannot_be_one_is_refused
    sets_in_whatever_order_never_wait_for_each_other
    work_is_done_under_all_locks_of_a_set
    a_set_tells_of_each_key_who_has_it_and_who_waits
    // Work that is done once a period.
    work_is_done_once_a_period
    work_that_fails_or_panics_is_due_still
    work_whose_term_is_lost_is_due_still
    work_that_is_being_done_is_left_alone
    who_has_waited_for_the_work_looks_again
    thirty_nights_are_thirty_runs
    a_record_in_the_future_is_ignored
    a_success_can_be_read_and_forgotten
    work_fails_where_nobody_answers
    work_without_a_token_or_in_a_period_that_cannot_be_is_refused
    once_works_in_generic_code_and_for_any_key
}

// ---------------------------------------------------------------------------------------------------------------------
// The two worlds
// ---------------------------------------------------------------------------------------------------------------------

/// A server, and what an operator can do and see there.
trait World {
    /// A manager that was not started.
    fn new_manager(&self) -> Arc<dyn SyncManager>;

    /// Takes the lock `x` from its holder.
    fn take_away(&self);

    /// What [`Lock::last_loss`] says after that.
    fn reason(&self) -> LossReason;

    /// How many sessions wait for the lock `x`.
    fn waiting(&self) -> usize;

    /// How many sessions wait for a permit of the semaphore `x`.
    fn waiting_for_permits(&self) -> usize;

    /// The annotation of the term of `x`.
    fn annotation(&self) -> Option<Vec<u8>>;

    /// A manager that was not started, whose server cannot be reached.
    fn cut_off(&self) -> Arc<dyn SyncManager>;

    /// As if the work of `x` had begun and succeeded at this time.
    fn succeeded_at(&self, time: SystemTime);
}

impl dyn World + '_ {
    fn manager(&self) -> Arc<dyn SyncManager> {
        let manager = self.new_manager();
        manager.start().unwrap();
        manager
    }

    /// A manager of its own for each, with a handle for `x`.
    fn rivals<const COUNT: usize>(&self) -> [Rival; COUNT] {
        std::array::from_fn(|_| {
            let manager = self.manager();
            Rival { lock: x(&*manager), manager }
        })
    }

    fn wait_for_waiters(&self, count: usize) {
        eventually(&format!("{count} waiters"), || self.waiting() == count);
    }
}

struct Memory(MemoryServer);

impl Memory {
    fn new() -> Self {
        Self(MemoryServer::new())
    }
}

impl World for Memory {
    fn new_manager(&self) -> Arc<dyn SyncManager> {
        Arc::new(MemoryManager::on(&self.0))
    }

    fn take_away(&self) {
        assert!(self.0.revoke("x"), "somebody holds it");
    }

    fn reason(&self) -> LossReason {
        LossReason::Revoked
    }

    fn waiting(&self) -> usize {
        self.0.waiting("x")
    }

    fn waiting_for_permits(&self) -> usize {
        self.0.waiting("x")
    }

    fn annotation(&self) -> Option<Vec<u8>> {
        self.0.annotation("x")
    }

    fn cut_off(&self) -> Arc<dyn SyncManager> {
        self.0.go_down();
        self.new_manager()
    }

    fn succeeded_at(&self, time: SystemTime) {
        self.0.set_last_success("x", time);
    }
}

/// A database of its own. A test that looks at the locks there uses one key only.
struct Postgres {
    operator: Mutex<::postgres::Client>,
    database: support::Database<'static>,
    /// How many sessions the locks of a manager share.
    shared_sessions: u32,
}

impl Postgres {
    fn new(shared_sessions: u32) -> Self {
        let database = support::Database::fresh().unwrap();
        Self { operator: Mutex::new(database.client().unwrap()), database, shared_sessions }
    }

    /// Counts what `column` says of the database's advisory locks.
    fn count(&self, column: &str) -> i64 {
        count_locks(&mut self.operator.lock(), column, self.shared_sessions)
    }
}

impl World for Postgres {
    fn new_manager(&self) -> Arc<dyn SyncManager> {
        let config = dsync::Config::from_url(&self.database.url()).unwrap();
        // Shorter slices than by default, so that a test sees several of them; and time for a busy machine.
        let config = config
            .wait_slice(Duration::from_secs(1))
            .connect_timeout(PATIENCE)
            .release_timeout(Duration::from_secs(20))
            .shared_sessions(self.shared_sessions);
        Arc::new(dsync::PostgresManager::new(config).unwrap())
    }

    fn take_away(&self) {
        // Between two slices one that waits has an advisory lock too, the turnstile.
        let x = number_of("'x'");
        let holder = format!("CASE WHEN granted AND of.id = {x} THEN pg_terminate_backend(pid) END");
        assert_eq!(self.count(&holder), 1, "one holder");
    }

    fn reason(&self) -> LossReason {
        LossReason::Terminated
    }

    fn waiting(&self) -> usize {
        self.count("CASE WHEN NOT granted THEN pid END").try_into().unwrap()
    }

    fn waiting_for_permits(&self) -> usize {
        let query = "SELECT waiting FROM dsync.semaphores WHERE key = 'x'";
        self.operator.lock().query_one(query, &[]).unwrap().get::<_, i64>(0).try_into().unwrap()
    }

    fn annotation(&self) -> Option<Vec<u8>> {
        let query = "SELECT annotation FROM dsync.locks WHERE key = 'x'";
        self.operator.lock().query_opt(query, &[]).unwrap()?.get(0)
    }

    fn cut_off(&self) -> Arc<dyn SyncManager> {
        // Nobody listens where somebody has just ceased to.
        let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let config = dsync::Config::from_url(&format!("postgres://nobody@{address}/nothing")).unwrap();
        // All its attempts together would take longer than any test.
        let config = config.connect_timeout(PATIENCE * 4).shared_sessions(self.shared_sessions);
        Arc::new(dsync::PostgresManager::new(config).unwrap())
    }

    fn succeeded_at(&self, time: SystemTime) {
        let statement = "INSERT INTO dsync.success VALUES ('dsync', 'x', $1)
                         ON CONFLICT (namespace, key) DO UPDATE SET started = excluded.started";
        self.operator.lock().execute(statement, &[&time]).unwrap();
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Words for the timelines
// ---------------------------------------------------------------------------------------------------------------------

const PATIENCE: Duration = Duration::from_secs(30);

/// A process that wants the lock `x`.
struct Rival {
    manager: Arc<dyn SyncManager>,
    lock: Arc<dyn Lock>,
}

impl Rival {
    fn lock(&self) {
        self.lock.lock(&soon()).unwrap();
    }

    fn release(&self) {
        self.lock.release().unwrap();
    }

    /// Tries the lock, which another one has; the claim waits from then on.
    fn is_refused(&self) {
        assert_eq!(kind(self.lock.try_lock(&soon())), ErrorKind::LockUnavailable);
    }

    fn is_held(&self) -> bool {
        is_held(&self.lock)
    }

    /// Waits until the lock is held, without a call that would acquire it.
    fn gets_it(&self) {
        eventually("the lock in the background", || self.is_held());
    }

    /// Waits for the lock in a thread, as long as `context` says.
    fn starts_waiting(&self, context: &Context) -> Outcome<Result<(), Error>> {
        let (lock, context) = (Arc::clone(&self.lock), context.clone());
        begin(move || lock.lock(&context))
    }
}

/// What a thread will return.
struct Outcome<T>(Receiver<T>);

impl<T> Outcome<T> {
    fn get(self) -> T {
        self.0.recv_timeout(PATIENCE).expect("the call ends in time and does not panic")
    }

    fn is_ready(&self) -> bool {
        !self.0.is_empty()
    }
}

fn begin<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Outcome<T> {
    let (sender, receiver) = bounded(1);
    thread::spawn(move || sender.send(work()));
    Outcome(receiver)
}

fn soon() -> Context {
    Context::timeout(PATIENCE)
}

/// Long enough for a session to be opened and to begin to wait, on a busy machine too.
fn briefly() -> Context {
    Context::timeout(Duration::from_millis(500))
}

fn x(manager: &dyn SyncManager) -> Arc<dyn Lock> {
    manager.lock("x").unwrap()
}

fn kind<T>(result: Result<T, Error>) -> ErrorKind {
    result.err().expect("an error").kind()
}

fn is_held(lock: &Arc<dyn Lock>) -> bool {
    is_open(&lock.lost())
}

fn is_open(lost: &Lost) -> bool {
    lost.try_recv().is_err_and(|error| error.is_empty())
}

fn hear(lost: &Lost) {
    assert_eq!(lost.recv_timeout(PATIENCE), Err(RecvTimeoutError::Disconnected), "the lost channel closes");
}

/// For what has no event to wait for, since the test is that nobody asks.
fn eventually(what: &str, condition: impl Fn() -> bool) {
    support::wait_for(what, PATIENCE, || condition().then_some(())).unwrap();
}

/// Options whose valuer counts its calls.
fn counting() -> (LockOptions, Arc<AtomicUsize>) {
    let calls = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&calls);
    let valuer = move || {
        counter.fetch_add(1, Ordering::SeqCst);
        b"{}".to_vec()
    };
    (LockOptions::new().valuer(Arc::new(valuer)), calls)
}

/// Nobody has the lock `x` or is in the queue for it.
fn assert_free(world: &dyn World) {
    let manager = world.manager();
    let probe = x(&*manager);
    probe.try_lock(&soon()).expect("the lock is free");
    probe.release().unwrap();
}

// ---------------------------------------------------------------------------------------------------------------------
// Exclusion, and giving the lock on
// ---------------------------------------------------------------------------------------------------------------------

fn one_of_two_managers_gets_the_lock(world: &dyn World) {
    let [first, second] = world.rivals();
    first.lock.try_lock(&soon()).unwrap();
    second.is_refused();
    assert!(first.is_held() && !second.is_held());
}

fn a_released_lock_goes_to_whoever_asks_next(world: &dyn World) {
    let [first, second] = world.rivals();
    for (one, other) in [(&first, &second), (&second, &first), (&first, &second)] {
        one.lock.try_lock(&soon()).unwrap();
        assert!(!other.is_held());
        one.release();
    }
}

fn a_waiting_call_gets_the_lock_when_it_is_released(world: &dyn World) {
    let [first, second] = world.rivals();
    first.lock();
    let waiting = second.starts_waiting(&Context::background());
    world.wait_for_waiters(1);
    first.release();
    waiting.get().unwrap();
    assert!(second.is_held() && !first.is_held());
}

fn a_held_lock_is_acquired_again_at_once(world: &dyn World) {
    let [only] = world.rivals();
    let (cancelled, canceller) = Context::background().with_cancel();
    canceller.cancel();
    only.lock();
    let term = only.lock.lost();
    only.lock();
    only.lock.try_lock(&soon()).unwrap();
    only.lock.lock(&cancelled).unwrap();
    only.lock.try_lock(&Context::timeout(Duration::ZERO)).unwrap();
    assert!(is_open(&term), "the term is still the same");
    only.release();
    assert_free(world);
}

/// 300 acquisitions of two locks by eight threads in each of three managers.
fn threads_exclude_each_other_across_managers(world: &dyn World) {
    /// The managers are the library's affair; the threads of one manager share its lock, and take turns by themselves.
    struct Seat {
        lock: Arc<dyn Lock>,
        turn: Mutex<()>,
    }
    let managers: [_; 3] = std::array::from_fn(|_| world.manager());
    let seats = managers
        .each_ref()
        .map(|manager| ["x", "y"].map(|key| Seat { lock: manager.lock(key).unwrap(), turn: Mutex::new(()) }));
    let occupied = [AtomicBool::new(false), AtomicBool::new(false)];
    let (left, done) = (AtomicI32::new(300), AtomicUsize::new(0));
    thread::scope(|scope| {
        for thread in 0..24 {
            let (seats, occupied, left, done) = (&seats[thread % 3], &occupied, &left, &done);
            scope.spawn(move || {
                let mut key = thread % 2;
                while left.fetch_sub(1, Ordering::SeqCst) > 0 {
                    let _turn = seats[key].turn.lock();
                    let guard = seats[key].lock.acquire(soon()).unwrap();
                    assert!(!occupied[key].swap(true, Ordering::SeqCst), "another one is in here");
                    thread::yield_now();
                    occupied[key].store(false, Ordering::SeqCst);
                    guard.release().unwrap();
                    done.fetch_add(1, Ordering::SeqCst);
                    key = 1 - key;
                }
            });
        }
    });
    assert_eq!(done.load(Ordering::SeqCst), 300);
}

// ---------------------------------------------------------------------------------------------------------------------
// How a wait ends
// ---------------------------------------------------------------------------------------------------------------------

fn a_wait_ends_at_its_deadline(world: &dyn World) {
    let [first, second] = world.rivals();
    first.lock();
    second.is_refused(); // so that it is known already who holds the lock
    let begun = Instant::now();
    let error = second.lock.lock(&briefly()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    assert!(begun.elapsed() >= Duration::from_millis(500));
    let text = error.to_string();
    assert!(text.starts_with("timed out: waited "), "{text}");
    assert!(text.ends_with(r#"for lock "x", which another session holds"#), "{text}");
}

fn a_wait_ends_when_another_thread_cancels_it(world: &dyn World) {
    let [first, second] = world.rivals();
    let (context, canceller) = Context::background().with_cancel();
    first.lock();
    let waiting = second.starts_waiting(&context);
    world.wait_for_waiters(1);
    canceller.cancel();
    assert_eq!(kind(waiting.get()), ErrorKind::Cancelled);
    assert!(first.is_held());
}

fn a_wait_ends_when_a_parent_context_is_cancelled(world: &dyn World) {
    let [first, second] = world.rivals();
    let (shutdown, canceller) = Context::background().with_cancel();
    first.lock();
    let waiting = second.starts_waiting(&shutdown.with_timeout(PATIENCE));
    world.wait_for_waiters(1);
    canceller.cancel();
    assert_eq!(kind(waiting.get()), ErrorKind::Cancelled);
}

/// Contexts that have ended already.
fn cancelled() -> Context {
    let (context, canceller) = Context::background().with_cancel();
    canceller.cancel();
    context
}

fn no_time() -> Context {
    Context::timeout(Duration::ZERO)
}

/// Many rounds, since the background may acquire the lock in the time that the call takes.
fn an_ended_context_begins_a_claim_and_never_acquires(world: &dyn World) {
    let [only] = world.rivals();
    type Call = fn(&dyn Lock, &Context) -> Result<(), Error>;
    let calls: [(Call, Context, ErrorKind); 4] = [
        (|lock, context| lock.lock(context), cancelled(), ErrorKind::Cancelled),
        (|lock, context| lock.lock(context), no_time(), ErrorKind::TimedOut),
        (|lock, context| lock.try_lock(context), cancelled(), ErrorKind::Cancelled),
        (
            |lock, context| lock.try_lock(context),
            cancelled().with_timeout(Duration::ZERO),
            ErrorKind::Cancelled,
        ),
    ];
    for round in 0..200 {
        for (index, (call, context, expected)) in calls.iter().enumerate() {
            assert_eq!(kind(call(&*only.lock, context)), *expected, "call {index} of round {round}");
            only.gets_it();
            call(&*only.lock, context).expect("a lock that is held is had at once");
            only.release();
        }
    }
    assert_eq!(kind(only.lock.wait(&cancelled())), ErrorKind::Released, "there is no claim");
    let guard = only.lock.acquire(cancelled());
    assert_eq!(kind(guard), ErrorKind::Cancelled);
    assert!(!only.is_held());
    assert_free(world);
}

fn a_cancelled_context_comes_before_what_is_known_of_the_lock(world: &dyn World) {
    let [first, second] = world.rivals();
    first.lock();
    second.is_refused();
    assert_eq!(kind(second.lock.try_lock(&cancelled())), ErrorKind::Cancelled);
    assert_eq!(kind(second.lock.lock(&no_time())), ErrorKind::TimedOut);
    assert_eq!(kind(second.lock.wait(&cancelled())), ErrorKind::Cancelled);
    assert_eq!(kind(second.lock.wait(&no_time())), ErrorKind::TimedOut);
    second.manager.stop().unwrap();
    assert_eq!(kind(second.lock.try_lock(&cancelled())), ErrorKind::SyncManagerStopped);
}

fn try_lock_without_time_takes_a_free_lock(world: &dyn World) {
    let [only] = world.rivals();
    for round in 0..50 {
        let passed = Context::deadline(Instant::now().checked_sub(Duration::from_secs(1)).unwrap());
        let (cancellable, _canceller) = no_time().with_cancel();
        for context in [no_time(), passed, cancellable] {
            only.lock.try_lock(&context).unwrap_or_else(|error| panic!("round {round}: {error}"));
            assert!(only.is_held());
            only.release();
        }
    }
    drop(only.lock.try_acquire().unwrap().expect("it is free"));
    drop(only.lock.acquire(no_time()).unwrap());
    assert_free(world);
}

fn try_lock_without_time_is_told_that_another_has_the_lock(world: &dyn World) {
    let [first, second] = world.rivals();
    first.lock();
    for _ in 0..3 {
        assert_eq!(kind(second.lock.try_lock(&no_time())), ErrorKind::LockUnavailable);
    }
    second.release();
    assert!(second.lock.try_acquire().unwrap().is_none());
    world.wait_for_waiters(0);
    assert!(first.is_held());
}

fn try_lock_without_time_ends_where_nobody_answers(world: &dyn World) {
    use std::error::Error as _;
    let manager = world.cut_off();
    manager.start().unwrap();
    let lock = x(&*manager);
    for _ in 0..3 {
        let begun = Instant::now();
        let error = lock.try_lock(&no_time()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        let cause = error.source().and_then(|cause| cause.downcast_ref::<Error>()).map(Error::kind);
        assert_eq!(cause, Some(ErrorKind::SessionUnavailable), "{error:?}");
        assert!(begun.elapsed() < PATIENCE, "it tried more than once: {:?}", begun.elapsed());
    }
    lock.release().unwrap();
}

fn try_lock_does_not_wait_for_the_holder(world: &dyn World) {
    let [first, second] = world.rivals();
    first.lock();
    let lock = Arc::clone(&second.lock);
    let refused = begin(move || lock.try_lock(&Context::background()));
    assert_eq!(kind(refused.get()), ErrorKind::LockUnavailable);
}

fn try_lock_says_so_again_while_its_claim_waits(world: &dyn World) {
    let [first, second] = world.rivals();
    first.lock();
    second.is_refused();
    second.is_refused();
    world.wait_for_waiters(1);
    second.is_refused();
    first.release();
    second.gets_it();
    second.lock.try_lock(&soon()).unwrap();
}

// ---------------------------------------------------------------------------------------------------------------------
// The claim goes on whatever the call returned
// ---------------------------------------------------------------------------------------------------------------------

fn a_timed_out_claim_gets_the_lock_in_the_background(world: &dyn World) {
    let [first, second] = world.rivals();
    first.lock();
    assert_eq!(kind(second.lock.lock(&briefly())), ErrorKind::TimedOut);
    first.release();
    second.gets_it();
    first.is_refused();
}

fn a_cancelled_claim_gets_the_lock_in_the_background(world: &dyn World) {
    let [first, second] = world.rivals();
    let (context, canceller) = Context::background().with_cancel();
    first.lock();
    let waiting = second.starts_waiting(&context);
    world.wait_for_waiters(1);
    canceller.cancel();
    assert_eq!(kind(waiting.get()), ErrorKind::Cancelled);
    first.release();
    second.gets_it();
}

fn an_unavailable_lock_is_acquired_in_the_background(world: &dyn World) {
    let [first, second] = world.rivals();
    first.lock();
    second.is_refused();
    first.release();
    second.gets_it();
    second.release();
    assert_free(world);
}

fn a_released_claim_does_not_take_the_lock_later(world: &dyn World) {
    let [first, refused, timed_out] = world.rivals();
    first.lock();
    refused.is_refused();
    assert_eq!(kind(timed_out.lock.lock(&briefly())), ErrorKind::TimedOut);
    world.wait_for_waiters(2);
    refused.release();
    timed_out.release();
    first.release();
    assert_free(world);
    assert!(!refused.is_held() && !timed_out.is_held());
    world.wait_for_waiters(0);
}

fn a_claim_outlives_its_handle(world: &dyn World) {
    let [first, second] = world.rivals();
    let Rival { manager, lock } = first;
    lock.lock(&soon()).unwrap();
    let term = lock.lost();
    drop(lock);
    second.is_refused();
    assert!(is_open(&term));

    let lock = x(&*manager);
    assert!(is_held(&lock));
    lock.release().unwrap();
    hear(&term);
    second.gets_it();
}

// ---------------------------------------------------------------------------------------------------------------------
// Releasing
// ---------------------------------------------------------------------------------------------------------------------

fn releasing_without_a_claim_does_nothing(world: &dyn World) {
    let [first, second] = world.rivals();
    first.release();
    second.lock();
    first.release();
    assert!(second.is_held(), "it is not ours to release");
}

fn releasing_twice_is_harmless(world: &dyn World) {
    let [first, second] = world.rivals();
    first.lock();
    first.release();
    first.release();
    second.lock();
    first.release();
    assert!(second.is_held());
}

fn concurrent_releases_all_succeed(world: &dyn World) {
    let [first] = world.rivals();
    for _ in 0..5 {
        first.lock();
        let releases = [(); 4].map(|()| {
            let lock = Arc::clone(&first.lock);
            begin(move || lock.release())
        });
        releases.into_iter().for_each(|release| release.get().unwrap());
        assert_free(world);
    }
}

fn a_release_ends_the_wait_of_other_threads(world: &dyn World) {
    let [first, second] = world.rivals();
    first.lock();
    let waiting = [(); 3].map(|()| second.starts_waiting(&Context::background()));
    world.wait_for_waiters(1);
    for wait in waiting {
        // Not one release for all: a thread that is slow to begin finds no claim, and makes another.
        eventually("the end of the wait", || {
            second.release();
            !wait.0.is_empty()
        });
        assert_eq!(kind(wait.get()), ErrorKind::Released);
    }
    assert!(first.is_held() && !second.is_held());
}

fn a_released_lock_can_be_claimed_again(world: &dyn World) {
    let [first, second] = world.rivals();
    for _ in 0..5 {
        first.lock();
        second.is_refused();
        second.release();
        first.release();
    }
    first.lock();
    second.is_refused();
    first.release();
    second.gets_it();
}

fn one_release_ends_the_claim_of_all_threads(world: &dyn World) {
    let [first, second] = world.rivals();
    let calls = [(); 2].map(|()| first.starts_waiting(&soon()));
    calls.into_iter().for_each(|call| call.get().unwrap());
    second.is_refused();
    first.release();
    second.gets_it();
}

// ---------------------------------------------------------------------------------------------------------------------
// The lost channel
// ---------------------------------------------------------------------------------------------------------------------

fn the_lost_channel_is_open_exactly_while_the_lock_is_held(world: &dyn World) {
    let [first, second] = world.rivals();
    let before = second.lock.lost();
    hear(&before);
    first.lock();
    second.is_refused();
    hear(&second.lock.lost());
    first.release();
    second.gets_it();
    assert!(!is_open(&before), "a closed channel never opens again");
    second.release();
    assert!(!second.is_held());
}

fn the_lost_channel_closes_before_another_has_the_lock(world: &dyn World) {
    let [first, second] = world.rivals();
    for (holder, next) in [(&first, &second), (&second, &first)].repeat(10) {
        holder.lock();
        let term = holder.lock.lost();
        let waiting = next.starts_waiting(&Context::background());
        let lock = Arc::clone(&holder.lock);
        let release = begin(move || lock.release());
        waiting.get().unwrap();
        assert!(!is_open(&term), "two would believe that they hold it");
        release.get().unwrap();
        next.release();
    }
}

fn each_term_has_a_lost_channel_of_its_own(world: &dyn World) {
    let [first] = world.rivals();
    first.lock();
    let old = first.lock.lost();
    first.release();
    hear(&old);
    first.lock();
    let new = first.lock.lost();
    assert!(is_open(&new) && !is_open(&old));
    first.release();
    hear(&new);
}

fn all_listeners_hear_of_the_end_of_a_term(world: &dyn World) {
    let [first] = world.rivals();
    first.lock();
    let listeners = [(); 8].map(|()| {
        let lost = first.lock.lost();
        begin(move || lost.recv().is_err())
    });
    world.take_away();
    listeners.into_iter().for_each(|listener| assert!(listener.get()));
}

fn the_lost_channel_works_in_select(world: &dyn World) {
    let [first] = world.rivals();
    first.lock();
    let (work, jobs) = bounded(1);
    work.send("job").unwrap();
    let next = || {
        select! {
            recv(jobs) -> job => job.ok(),
            recv(first.lock.lost()) -> _ => None,
            default(PATIENCE) => panic!("neither a job nor a loss"),
        }
    };
    assert_eq!(next(), Some("job"));
    let lock = Arc::clone(&first.lock);
    let release = begin(move || lock.release());
    assert_eq!(next(), None);
    release.get().unwrap();
}

// ---------------------------------------------------------------------------------------------------------------------
// What people read
// ---------------------------------------------------------------------------------------------------------------------

fn errors_read_the_same_everywhere(world: &dyn World) {
    let [first, second] = world.rivals();
    let text = |outcome: Result<(), Error>| outcome.unwrap_err().to_string();
    assert_eq!(
        text(second.lock.wait(&soon())),
        r#"claim released: nobody in this process claims "x", so there is nothing to wait for; call lock()"#
    );
    first.lock();
    assert_eq!(
        text(second.lock.try_lock(&soon())),
        r#"lock unavailable: another session holds "x"; without a guard, the claim goes on in the background until release()"#
    );
    for (context, begin, end) in [
        (no_time(), "timed out: waited ", r#" for lock "x", which another session holds"#),
        (cancelled(), "cancelled: waited ", r#" for lock "x", which another session holds"#),
    ] {
        let text = text(second.lock.lock(&context));
        assert!(text.starts_with(begin) && text.ends_with(end), "{text}");
    }
    let waiting = second.starts_waiting(&Context::background());
    world.wait_for_waiters(1);
    eventually("the end of the wait", || {
        second.release();
        !waiting.0.is_empty()
    });
    assert_eq!(
        text(waiting.get()),
        r#"claim released: the claim on "x" was released while this call waited"#
    );
    second.manager.stop().unwrap();
    let stopped =
        "sync manager stopped: the manager was stopped, which is for good; make and start a new one";
    assert_eq!(text(second.lock.lock(&soon())), stopped);
    assert_eq!(text(second.lock.wait(&soon())), stopped);
    assert_eq!(text(second.manager.start()), stopped);
    let manager = world.new_manager();
    assert_eq!(
        text(x(&*manager).lock(&soon())),
        "sync manager stopped: the manager has not been started; call start() before the first lock()"
    );
}

fn a_lock_and_its_term_are_shown_as_a_person_reads_them(world: &dyn World) {
    let [only] = world.rivals();
    let lock = |term: &str| {
        let name =
            if format!("{:?}", only.lock).starts_with("Memory") { "MemoryLock" } else { "PostgresLock" };
        format!("{name} {{ key: \"x\", term: {term} }}")
    };
    assert_eq!(format!("{:?}", only.lock), lock("None"));
    only.lock();
    let term = only.lock.term().unwrap();
    let token = term.token().unwrap();
    let shown = format!("{term:?}");
    assert!(shown.starts_with(&format!("Term {{ held: true, token: Some({token})")), "{shown}");
    assert!(shown.len() < 100, "{shown}");
    assert!(format!("{:?}", only.lock).starts_with(&lock("")[..20]), "{:?}", only.lock);
    only.release();
    assert_eq!(format!("{term:?}"), format!("Term {{ held: false, token: Some({token}) }}"));
}

// ---------------------------------------------------------------------------------------------------------------------
// Losing the lock
// ---------------------------------------------------------------------------------------------------------------------

fn a_lost_lock_comes_back_without_another_call(world: &dyn World) {
    let [first, second] = world.rivals();
    first.lock();
    for _ in 0..3 {
        let term = first.lock.lost();
        world.take_away();
        hear(&term);
        assert_eq!(first.lock.last_loss().unwrap().reason, world.reason());
        first.gets_it();
        assert!(!is_open(&term), "the old term stays over");
    }
    second.is_refused();
}

fn a_lost_lock_goes_to_a_waiter_and_then_comes_back(world: &dyn World) {
    let [first, second] = world.rivals();
    first.lock();
    let term = first.lock.lost();
    let waiting = second.starts_waiting(&Context::background());
    world.wait_for_waiters(1);
    world.take_away();
    hear(&term);
    waiting.get().unwrap();
    world.wait_for_waiters(1);
    assert!(!first.is_held());
    second.release();
    first.gets_it();
}

fn a_lost_claim_can_be_released(world: &dyn World) {
    let [first, second] = world.rivals();
    first.lock();
    second.is_refused();
    world.wait_for_waiters(1);
    let term = first.lock.lost();
    world.take_away();
    hear(&term);
    first.release();
    second.gets_it();
    second.release();
    assert_free(world);
    assert!(!first.is_held());
}

fn a_release_is_no_loss_and_a_loss_is_remembered(world: &dyn World) {
    let [first] = world.rivals();
    assert_eq!(first.lock.last_loss(), None);
    first.lock();
    first.release();
    assert_eq!(first.lock.last_loss(), None);

    first.lock();
    let term = first.lock.lost();
    world.take_away();
    hear(&term);
    first.gets_it();
    first.release();
    let loss = first.lock.last_loss().expect("released, and not forgotten");
    assert_eq!(loss.reason, world.reason());
    first.lock();
    assert_eq!(first.lock.last_loss(), Some(loss));
}

// ---------------------------------------------------------------------------------------------------------------------
// Handles and options
// ---------------------------------------------------------------------------------------------------------------------

fn a_key_has_one_handle_in_a_manager(world: &dyn World) {
    let [first, second] = world.rivals();
    assert!(Arc::ptr_eq(&first.lock, &x(&*first.manager)));
    assert!(!Arc::ptr_eq(&first.lock, &second.lock));
    first.lock();
    assert!(Arc::ptr_eq(&first.lock, &x(&*first.manager)));
    let other = first.manager.lock("y").unwrap();
    assert!(!Arc::ptr_eq(&first.lock, &other) && !is_held(&other));
}

fn later_options_are_ignored(world: &dyn World) {
    let manager = world.manager();
    let ((first, asked), (later, ignored)) = (counting(), counting());
    let lock = manager.lock_with("x", first).unwrap();
    manager.lock_with("x", later.clone()).unwrap().lock(&soon()).unwrap();
    drop(lock);
    let lock = manager.lock_with("x", later).unwrap();
    assert!(is_held(&lock), "the claim outlived the handle");
    let term = lock.lost();
    world.take_away();
    hear(&term);
    eventually("the lock again", || is_held(&lock));
    assert!(asked.load(Ordering::SeqCst) >= 2, "once for each term");
    assert_eq!(ignored.load(Ordering::SeqCst), 0);
}

fn a_key_without_claim_and_handle_is_forgotten(world: &dyn World) {
    let manager = world.manager();
    let ((first, forgotten), (later, asked)) = (counting(), counting());
    let lock = manager.lock_with("x", first).unwrap();
    lock.lock(&soon()).unwrap();
    lock.release().unwrap();
    drop(lock);
    let lock = manager.lock_with("x", later).unwrap();
    lock.lock(&soon()).unwrap();
    assert!(asked.load(Ordering::SeqCst) > 0);
    assert_eq!(forgotten.load(Ordering::SeqCst), 1, "it was asked for its own term only");
}

fn the_valuer_is_asked_for_each_term(world: &dyn World) {
    let manager = world.manager();
    let (options, calls) = counting();
    let lock = manager.lock_with("x", options).unwrap();
    for _ in 0..3 {
        let before = calls.load(Ordering::SeqCst);
        lock.lock(&soon()).unwrap();
        let after = calls.load(Ordering::SeqCst);
        assert!(after > before);
        lock.lock(&soon()).unwrap();
        assert_eq!(calls.load(Ordering::SeqCst), after, "the term is still the same");
        lock.release().unwrap();
    }
}

fn a_waiter_is_annotated_with_what_its_valuer_says_while_it_waits(world: &dyn World) {
    let [first] = world.rivals();
    let manager = world.manager();
    let calls = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&calls);
    let valuer = move || (counter.fetch_add(1, Ordering::SeqCst) + 1).to_string().into_bytes();
    let lock = manager.lock_with("x", LockOptions::new().valuer(Arc::new(valuer))).unwrap();
    first.lock();
    let waiter = Arc::clone(&lock);
    let waiting = begin(move || waiter.lock(&soon()));
    eventually("the valuer is asked again and again", || calls.load(Ordering::SeqCst) >= 4);
    first.release();
    waiting.get().unwrap();
    let annotation: usize = String::from_utf8(world.annotation().unwrap()).unwrap().parse().unwrap();
    // The last call may not have returned yet when the lock was released.
    assert!(annotation + 1 >= calls.load(Ordering::SeqCst), "{annotation} is that of the beginning");
}

fn a_release_does_not_wait_for_the_valuer_of_the_next(world: &dyn World) {
    let [first] = world.rivals();
    let manager = world.manager();
    let callers = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&callers);
    let valuer = move || {
        seen.lock().push(thread::current().id());
        Vec::new()
    };
    let lock = manager.lock_with("x", LockOptions::new().valuer(Arc::new(valuer))).unwrap();
    for give_away in [|rival: &Rival| rival.release(), |rival: &Rival| rival.manager.stop().unwrap()] {
        first.lock();
        let waiter = Arc::clone(&lock);
        let waiting = begin(move || waiter.lock(&soon()));
        world.wait_for_waiters(1);
        give_away(&first);
        waiting.get().unwrap();
        lock.release().unwrap();
    }
    let callers = callers.lock();
    assert!(!callers.is_empty() && !callers.contains(&thread::current().id()));
}

fn a_panicking_valuer_does_not_cost_the_lock(world: &dyn World) {
    let [other] = world.rivals();
    let manager = world.manager();
    let lock =
        manager.lock_with("x", LockOptions::new().valuer(Arc::new(|| panic!("no value today")))).unwrap();
    lock.lock(&soon()).unwrap();
    other.is_refused();
    lock.release().unwrap();
    other.gets_it();
}

fn odd_values_are_taken_literally(world: &dyn World) {
    let manager = world.manager();
    let json = json_valuer(&["ü", "'", "\\", "\0"]).unwrap();
    let not_text = Arc::new(|| vec![0, 0xff, b'\'', b'\\']);
    let long = Arc::new(|| vec![b'v'; 100_000]);
    for valuer in [json, not_text, long] {
        let lock = manager.lock_with("x", LockOptions::new().valuer(valuer)).unwrap();
        lock.lock(&soon()).unwrap();
        lock.release().unwrap();
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Keys
// ---------------------------------------------------------------------------------------------------------------------

fn names_numbers_and_pairs_are_different_keys(world: &dyn World) {
    let (ours, theirs) = (world.manager(), world.manager());
    let lock = |manager: &Arc<dyn SyncManager>, key: &Key| manager.lock(key.clone()).unwrap();
    // PostgreSQL shows the number 42 and the pair (0, 42) with the same two halves; and "#42" is how 42 is written.
    let keys = [
        Key::from("42"),
        Key::from("#42"),
        Key::from(42),
        Key::from(-42),
        Key::from((0, 42)),
        Key::from((42, 0)),
    ];
    let ours = keys.each_ref().map(|key| lock(&ours, key));
    for (index, key) in keys.iter().enumerate() {
        ours[index].try_lock(&soon()).unwrap();
        assert_eq!(ours[index].key(), key.to_string());
        let rival = lock(&theirs, key);
        assert_eq!(kind(rival.try_lock(&soon())), ErrorKind::LockUnavailable, "{key} is one lock for all");
        rival.release().unwrap();
    }
}

fn keys_may_contain_anything_but_nul(world: &dyn World) {
    let (ours, theirs) = (world.manager(), world.manager());
    let longest = "k".repeat(Key::MAX_LEN);
    for name in [
        "schlüssel/鍵/🔑",
        "it's",
        r#"a "quoted" key"#,
        r"back\slash\",
        r"C:\x\0",
        "%s %d %n {} {0}",
        "$1; --",
        "two\nlines\r\n\t",
        " ",
        "\u{1}\u{7f}",
        "'); DROP SCHEMA dsync CASCADE; --",
        &longest,
    ] {
        let [one, other] = [&ours, &theirs].map(|manager| manager.lock(name).unwrap());
        assert_eq!(one.key(), name);
        one.lock(&soon()).unwrap();
        assert_eq!(kind(other.try_lock(&soon())), ErrorKind::LockUnavailable, "{name:?}");
        one.release().unwrap();
        other.lock(&soon()).unwrap();
        other.release().unwrap();
    }
}

fn keys_that_cannot_name_a_lock_are_refused(world: &dyn World) {
    let manager = world.manager();
    for name in ["", "nul\0inside", &"k".repeat(Key::MAX_LEN + 1)] {
        assert_eq!(kind(manager.lock(name)), ErrorKind::InvalidKey, "{name:?}");
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The life of a manager
// ---------------------------------------------------------------------------------------------------------------------

fn locks_work_once_the_manager_is_started(world: &dyn World) {
    let manager = world.new_manager();
    let lock = x(&*manager);
    for refusal in [lock.lock(&soon()), lock.try_lock(&soon())] {
        let error = refusal.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::SyncManagerStopped);
        assert!(error.to_string().contains("start"), "it says what to do: {error}");
    }
    lock.release().unwrap();
    assert!(!is_held(&lock));
    manager.start().unwrap();
    assert!(Arc::ptr_eq(&lock, &x(&*manager)));
    lock.lock(&soon()).unwrap();
    assert!(is_held(&lock));
}

fn starting_twice_does_nothing(world: &dyn World) {
    let [first] = world.rivals();
    first.lock();
    let term = first.lock.lost();
    first.manager.start().unwrap();
    assert!(is_open(&term));
}

fn stopping_gives_locks_to_others(world: &dyn World) {
    let [first, second] = world.rivals();
    first.lock();
    let term = first.lock.lost();
    second.is_refused();
    first.manager.stop().unwrap();
    assert!(!is_open(&term));
    assert_eq!(first.lock.last_loss(), None, "it was asked for");
    second.gets_it();
}

fn stopping_takes_claims_out_of_the_queue(world: &dyn World) {
    let [first, second] = world.rivals();
    first.lock();
    second.is_refused();
    world.wait_for_waiters(1);
    second.manager.stop().unwrap();
    first.release();
    assert_free(world);
}

fn stopping_ends_waiting_calls(world: &dyn World) {
    let [first, second] = world.rivals();
    first.lock();
    let waiting = [(); 2].map(|()| second.starts_waiting(&Context::background()));
    world.wait_for_waiters(1);
    second.manager.stop().unwrap();
    for wait in waiting {
        assert_eq!(kind(wait.get()), ErrorKind::SyncManagerStopped);
    }
    assert!(first.is_held());
}

fn a_stopped_manager_refuses_everything(world: &dyn World) {
    let [first] = world.rivals();
    first.lock();
    first.manager.stop().unwrap();
    assert!(!first.is_held());
    assert_eq!(kind(first.lock.lock(&soon())), ErrorKind::SyncManagerStopped);
    assert_eq!(kind(first.lock.try_lock(&soon())), ErrorKind::SyncManagerStopped);
    assert_eq!(kind(first.manager.lock("x")), ErrorKind::SyncManagerStopped);
    assert_eq!(kind(first.manager.lock("y")), ErrorKind::SyncManagerStopped);
    assert_eq!(kind(first.manager.start()), ErrorKind::SyncManagerStopped);
    first.release();
    assert_free(world);
}

fn stopping_twice_does_nothing(world: &dyn World) {
    let [first, second] = world.rivals();
    first.lock();
    first.manager.stop().unwrap();
    second.lock();
    first.manager.stop().unwrap();
    assert!(second.is_held());
}

fn a_manager_that_was_never_started_can_be_stopped(world: &dyn World) {
    let manager = world.new_manager();
    manager.stop().unwrap();
    assert_eq!(kind(manager.start()), ErrorKind::SyncManagerStopped);
    assert_eq!(kind(manager.lock("x")), ErrorKind::SyncManagerStopped);
}

fn dropping_a_manager_stops_it(world: &dyn World) {
    let [first, second] = world.rivals();
    let Rival { manager, lock } = first;
    lock.lock(&soon()).unwrap();
    let term = lock.lost();
    drop(manager);
    assert!(!is_open(&term));
    second.lock();
    assert_eq!(kind(lock.lock(&soon())), ErrorKind::SyncManagerStopped);
    lock.release().unwrap();
}

// ---------------------------------------------------------------------------------------------------------------------
// Guards
// ---------------------------------------------------------------------------------------------------------------------

fn a_guard_releases_when_dropped(world: &dyn World) {
    let [first] = world.rivals();
    let guard = first.lock.acquire(soon()).unwrap();
    let term = guard.lost().clone();
    assert!(is_open(&term) && guard.is_held() && !first.is_held());
    drop(guard);
    assert!(!is_open(&term));
    drop(first.lock.try_acquire().unwrap().expect("it is free"));
    assert_free(world);
}

fn a_guard_can_be_released_by_hand(world: &dyn World) {
    let [first] = world.rivals();
    first.lock.acquire(soon()).unwrap().release().unwrap();
    assert_free(world);
}

fn a_guard_that_fails_leaves_no_claim(world: &dyn World) {
    let [first, second] = world.rivals();
    first.lock();
    assert!(second.lock.try_acquire().unwrap().is_none());
    let attempt = second.lock.acquire(briefly());
    assert_eq!(kind(attempt), ErrorKind::TimedOut);
    world.wait_for_waiters(0);
    first.release();
    assert_free(world);
    assert!(!second.is_held());
}

fn a_guard_releases_when_its_thread_panics(world: &dyn World) {
    let [first] = world.rivals();
    let lock = Arc::clone(&first.lock);
    let work = thread::spawn(move || {
        let _guard = lock.acquire(soon()).unwrap();
        panic!("the work failed");
    });
    assert!(work.join().is_err());
    assert!(!first.is_held());
    assert_free(world);
}

fn a_lost_guard_does_not_come_back_and_says_so(world: &dyn World) {
    let [first, second] = world.rivals();
    let guard = first.lock.acquire(PATIENCE).unwrap();
    assert_eq!(guard.loss(), None);
    world.take_away();
    hear(guard.lost());
    assert_eq!(guard.loss().map(|loss| loss.reason), Some(world.reason()));
    // Nobody but its owner has done anything since.
    let other = second.lock.acquire(PATIENCE).unwrap();
    assert!(!guard.is_held() && !is_open(guard.lost()) && !first.is_held());
    let error = guard.release().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Lost);
    assert!(error.to_string().contains(&world.reason().to_string()), "{error}");
    assert!(other.is_held());
    other.release().unwrap();
    assert_free(world);
}

fn a_guard_ends_its_own_term_and_nothing_else(world: &dyn World) {
    let [only] = world.rivals();
    let lost = only.lock.acquire(PATIENCE).unwrap();
    world.take_away();
    hear(lost.lost());
    let next = only.lock.acquire(PATIENCE).unwrap();
    assert_ne!(lost.term().token(), next.term().token());
    drop(lost);
    assert!(next.is_held());
    only.release();
    assert!(next.is_held());
    next.release().unwrap();
    assert_free(world);
}

fn a_busy_lock_is_not_acquired_by_trying(world: &dyn World) {
    let [first, second, third] = world.rivals();
    let guard = first.lock.acquire(PATIENCE).unwrap();
    let waiting = third.starts_waiting(&soon());
    world.wait_for_waiters(1);
    for _ in 0..20 {
        // In another process, and in another thread of the same one.
        assert!(second.lock.try_acquire().unwrap().is_none());
        assert!(first.lock.try_acquire().unwrap().is_none());
    }
    // Nobody else waits, and nobody's wait was ended. Between two slices nobody is in the queue for a moment.
    world.wait_for_waiters(1);
    assert!(!waiting.is_ready());
    guard.release().unwrap();
    waiting.get().unwrap();
    third.release();
    assert_free(world);
}

fn try_acquire_ends_where_nobody_answers(world: &dyn World) {
    let manager = world.cut_off();
    manager.start().unwrap();
    let error = x(&*manager).try_acquire().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::SessionUnavailable, "{error}");
}

fn a_guard_without_time_is_tried_once(world: &dyn World) {
    let [first, second] = world.rivals();
    let guard = first.lock.acquire(Duration::ZERO).unwrap();
    for lock in [&first.lock, &second.lock] {
        assert_eq!(kind(lock.acquire(Duration::ZERO)), ErrorKind::TimedOut);
    }
    assert!(guard.is_held());
}

fn threads_take_turns_in_the_order_in_which_they_came(world: &dyn World) {
    const THREADS: usize = 12;
    let [only] = world.rivals();
    let first = only.lock.acquire(PATIENCE).unwrap();
    let order = Arc::new(Mutex::new(Vec::new()));
    let threads: Vec<_> = (0..THREADS)
        .map(|number| {
            let (lock, order) = (Arc::clone(&only.lock), Arc::clone(&order));
            let (come, came) = bounded(0);
            let thread = thread::spawn(move || {
                come.send(()).unwrap();
                let guard = lock.acquire(PATIENCE).unwrap();
                order.lock().push((number, guard.term().token().unwrap()));
                guard.release().unwrap();
            });
            came.recv().unwrap();
            // It says so just before it comes.
            becomes_queued(&only.lock, number + 1);
            thread
        })
        .collect();
    assert_eq!(world.waiting(), 0, "they wait in this process");
    first.release().unwrap();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    let order = order.lock();
    assert_eq!(order.iter().map(|(number, _)| *number).collect::<Vec<_>>(), Vec::from_iter(0..THREADS));
    assert!(order.is_sorted_by_key(|(_, token)| *token));
}

fn threads_of_two_managers_all_get_their_turns(world: &dyn World) {
    const THREADS: usize = 8;
    const TURNS: usize = 10;
    let rivals: [Rival; 2] = world.rivals();
    let inside = AtomicUsize::new(0);
    let turns: Vec<_> = (0..2 * THREADS).map(|_| AtomicUsize::new(0)).collect();
    thread::scope(|scope| {
        for (number, count) in turns.iter().enumerate() {
            let (lock, inside) = (&rivals[number % 2].lock, &inside);
            scope.spawn(move || {
                for _ in 0..TURNS {
                    let guard = lock.acquire(PATIENCE).unwrap();
                    assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0, "somebody else is inside");
                    thread::yield_now();
                    assert_eq!(inside.fetch_sub(1, Ordering::SeqCst), 1);
                    count.fetch_add(1, Ordering::SeqCst);
                    guard.release().unwrap();
                }
            });
        }
    });
    assert!(turns.iter().all(|count| count.load(Ordering::SeqCst) == TURNS));
    assert_free(world);
}

fn a_wait_for_another_thread_ends_as_its_context_says(world: &dyn World) {
    let [only] = world.rivals();
    let guard = only.lock.acquire(PATIENCE).unwrap();
    let (context, canceller) = soon().with_cancel();
    let lock = Arc::clone(&only.lock);
    let cancelled = begin(move || lock.acquire(context).map(drop));
    becomes_queued(&only.lock, 1);
    let lock = Arc::clone(&only.lock);
    let patient = begin(move || lock.acquire(PATIENCE).map(drop));
    becomes_queued(&only.lock, 2);
    let error = only.lock.acquire(Duration::from_millis(20)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    assert!(error.to_string().contains("another thread of this process"), "{error}");
    canceller.cancel();
    assert_eq!(kind(cancelled.get()), ErrorKind::Cancelled);
    guard.release().unwrap();
    patient.get().unwrap();
}

fn a_lost_guard_keeps_no_thread_out(world: &dyn World) {
    let [only] = world.rivals();
    let guard = only.lock.acquire(PATIENCE).unwrap();
    let lock = Arc::clone(&only.lock);
    let waiting = begin(move || lock.acquire(PATIENCE));
    becomes_queued(&only.lock, 1);
    world.take_away();
    let next = waiting.get().unwrap();
    assert!(next.is_held() && !guard.is_held());
    assert_eq!(kind(guard.release()), ErrorKind::Lost);
    assert!(next.is_held());
}

fn a_claim_and_a_guard_keep_each_other_out(world: &dyn World) {
    let [only] = world.rivals();
    only.lock();
    only.lock();
    assert!(only.lock.try_acquire().unwrap().is_none());
    assert_eq!(kind(only.lock.acquire(briefly())), ErrorKind::TimedOut);
    only.release();
    let guard = only.lock.acquire(PATIENCE).unwrap();
    only.is_refused();
    assert!(!only.is_held());
    only.release();
    assert!(guard.is_held(), "it was not the claim's");
    only.is_refused();
    guard.release().unwrap();
    only.gets_it();
    only.release();
    assert_free(world);
}

fn a_claim_has_its_turn_among_the_guards_of_its_process(world: &dyn World) {
    const TURNS: usize = 20;
    let [ours] = world.rivals();
    let (inside, over) = (AtomicUsize::new(0), AtomicBool::new(false));
    let visit = || {
        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0, "somebody else is inside");
        thread::yield_now();
        inside.fetch_sub(1, Ordering::SeqCst);
    };
    thread::scope(|scope| {
        let guards = [(); 4].map(|()| {
            scope.spawn(|| {
                let mut turns = 0;
                while !over.load(Ordering::SeqCst) || turns == 0 {
                    let guard = ours.lock.acquire(PATIENCE).unwrap();
                    visit();
                    guard.release().unwrap();
                    turns += 1;
                }
            })
        });
        for _ in 0..TURNS {
            ours.lock();
            visit();
            ours.release();
        }
        over.store(true, Ordering::SeqCst);
        guards.into_iter().for_each(|guard| guard.join().unwrap());
    });
}

fn a_manager_that_stops_ends_guards_and_those_who_wait_for_them(world: &dyn World) {
    let [first, second] = world.rivals();
    let guard = first.lock.acquire(PATIENCE).unwrap();
    let lock = Arc::clone(&first.lock);
    let waiting = begin(move || lock.acquire(PATIENCE).map(drop));
    becomes_queued(&first.lock, 1);
    first.manager.stop().unwrap();
    assert!(!guard.is_held());
    assert_eq!(kind(waiting.get()), ErrorKind::SyncManagerStopped);
    let error = guard.release().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Lost);
    assert!(error.to_string().contains("stopped"), "{error}");
    assert_eq!(kind(first.lock.try_acquire()), ErrorKind::SyncManagerStopped);
    assert!(second.lock.try_acquire().unwrap().is_some());
}

fn work_is_done_under_the_lock_which_is_released_when_it_panics(world: &dyn World) {
    let [first, second] = world.rivals();
    let held = first.lock.with_lock(PATIENCE, |term| {
        assert!(second.lock.try_acquire().unwrap().is_none());
        term.is_held()
    });
    assert!(held.unwrap());
    let lock = Arc::clone(&first.lock);
    let work = thread::spawn(move || lock.with_lock(PATIENCE, |_| panic!("the work failed")));
    assert!(work.join().is_err());
    assert_free(world);
    let lost = first.lock.with_lock(PATIENCE, |term| {
        world.take_away();
        hear(term.lost());
    });
    assert_eq!(kind(lost), ErrorKind::Lost);
    assert_eq!(kind(first.lock.with_lock(cancelled(), |_| unreachable!())), ErrorKind::Cancelled);
}

fn guards_work_in_generic_code_and_for_any_key(world: &dyn World) {
    use dsync::SyncManagerExt;
    fn once<M: SyncManager>(manager: &M) {
        manager.start().unwrap();
        for key in [Key::from(&"text".to_owned()), Key::from(7_u64), Key::from(8_i32), Key::from(9_u32)] {
            assert!(manager.lock(key).unwrap().try_acquire().unwrap().is_some());
        }
        let options = LockOptions::new();
        drop(manager.lock_with("other", options).unwrap().acquire(Instant::now() + PATIENCE).unwrap());
    }
    once(&Wrapped(world.new_manager()));
}

fn a_lock_without_token_excludes_all_the_same(world: &dyn World) {
    let [first, second] = world.rivals();
    let manager = world.manager();
    let lock = manager.lock_with("x", LockOptions::new().without_token()).unwrap();
    let guard = lock.acquire(PATIENCE).unwrap();
    assert_eq!(guard.term().token(), None);
    assert!(first.lock.try_acquire().unwrap().is_none());
    guard.release().unwrap();
    let guard = second.lock.acquire(PATIENCE).unwrap();
    assert!(guard.term().token().is_some());
    assert!(lock.try_acquire().unwrap().is_none());
}

/// A thousand times six threads of three processes do one thing each at the same moment, as lots have it; the terms must not
/// overlap, and none is ended by another's owner.
fn no_schedule_of_guards_and_claims_breaks_exclusion(world: &dyn World) {
    const THREADS: u64 = 6;
    const SCHEDULES: u64 = 1_000;
    let rivals: [Rival; 3] = world.rivals();
    // For the claim of a process, which its threads share.
    let claims = [(); 3].map(|()| Mutex::new(()));
    let inside = AtomicUsize::new(0);
    let visit = || {
        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0, "somebody else is inside");
        thread::yield_now();
        inside.fetch_sub(1, Ordering::SeqCst);
    };
    let one_thing = |mut lots: fastrand::Rng| {
        let index = lots.usize(..rivals.len());
        let lock = &rivals[index].lock;
        let patience = Duration::from_millis(lots.u64(..10));
        let guard = match lots.u8(..4) {
            0 => lock.try_acquire().unwrap(),
            1 => lock.acquire(PATIENCE).map(Some).unwrap(),
            2 => match lock.acquire(patience) {
                Ok(guard) => Some(guard),
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
                    None
                }
            },
            _ => {
                let _mine = claims[index].lock();
                if lock.lock(&Context::timeout(patience)).is_ok() {
                    visit();
                }
                lock.release().unwrap();
                None
            }
        };
        if let Some(guard) = guard {
            visit();
            assert!(guard.is_held(), "somebody else has ended it");
            if lots.bool() {
                guard.release().unwrap();
            }
        }
    };
    for schedule in 0..SCHEDULES {
        thread::scope(|scope| {
            for thread in 0..THREADS {
                let (lots, one_thing) = (fastrand::Rng::with_seed(schedule * THREADS + thread), &one_thing);
                scope.spawn(move || one_thing(lots));
            }
        });
    }
    assert_free(world);
}

// ---------------------------------------------------------------------------------------------------------------------
// What an operator does
// ---------------------------------------------------------------------------------------------------------------------

fn a_broken_lock_is_lost_and_goes_to_who_waits(world: &dyn World) {
    let [ours, theirs] = world.rivals();
    assert!(theirs.manager.break_lock("x").unwrap().is_none(), "nobody holds it");
    let guard = ours.lock.acquire(PATIENCE).unwrap();
    let (lost, token) = (guard.lost().clone(), guard.term().token());
    let waiting = theirs.starts_waiting(&Context::background());
    world.wait_for_waiters(1);
    let operator = world.manager();
    assert_eq!(operator.break_lock("x").unwrap().unwrap().token, token);
    hear(&lost);
    assert_eq!(guard.loss().unwrap().reason, LossReason::Terminated);
    assert_eq!(kind(guard.release()), ErrorKind::Lost);
    waiting.get().unwrap();
    // A claim has it again in its next term, also where it is broken by its own manager.
    let first = theirs.lock.term().unwrap();
    assert_eq!(theirs.lock.break_lock().unwrap().unwrap().token, first.token());
    hear(first.lost());
    theirs.gets_it();
    assert!(theirs.lock.term().unwrap().token() > first.token());
}

// ---------------------------------------------------------------------------------------------------------------------
// Sharing a lock
// ---------------------------------------------------------------------------------------------------------------------

/// A process that wants to share the lock `x`.
fn reader(world: &dyn World) -> Rival {
    let manager = world.manager();
    Rival { lock: manager.shared_lock("x").unwrap(), manager }
}

fn a_shared_lock_is_had_by_many_and_by_none_of_them_beside_a_writer(world: &dyn World) {
    let (one, other, [writer]) = (reader(world), reader(world), world.rivals());
    let waited = [&one.lock, &one.lock, &other.lock].map(|lock| lock.acquire(PATIENCE).unwrap());
    let tried = [&one.lock, &other.lock]
        .map(|lock| lock.try_acquire().unwrap().expect("a reader keeps no reader out"));
    let readers: Vec<_> = waited.into_iter().chain(tried).collect();
    assert!(readers.iter().all(|reader| reader.is_held()));
    assert!(writer.lock.try_acquire().unwrap().is_none());
    assert_eq!(kind(writer.lock.acquire(Duration::ZERO)), ErrorKind::TimedOut);
    let holder = writer.lock.holder().unwrap().unwrap();
    assert!(holder.is_shared && holder.token == readers[0].term().token(), "{holder:?}");

    let waiting = writer.starts_waiting(&Context::background());
    world.wait_for_waiters(1);
    let mut held = readers;
    while let Some(reader) = held.pop() {
        assert!(!waiting.is_ready(), "{} readers have it still", held.len() + 1);
        reader.release().unwrap();
    }
    waiting.get().unwrap();
    assert!(other.lock.try_acquire().unwrap().is_none());
    assert!(!writer.lock.holder().unwrap().unwrap().is_shared);
    writer.release();
    other.lock.try_acquire().unwrap().unwrap().release().unwrap();
}

fn a_reader_that_comes_later_waits_behind_a_writer(world: &dyn World) {
    let (first, later, [writer]) = (reader(world), reader(world), world.rivals());
    let reading = first.lock.acquire(PATIENCE).unwrap();
    let waiting = writer.starts_waiting(&Context::background());
    world.wait_for_waiters(1);
    assert!(later.lock.try_acquire().unwrap().is_none(), "others read, and a writer waits");
    let later_one = later.starts_waiting(&Context::background());
    world.wait_for_waiters(2);
    reading.release().unwrap();
    waiting.get().unwrap();
    assert!(!later_one.is_ready());
    writer.release();
    later_one.get().unwrap();
}

fn readers_without_a_writer_between_have_one_token(world: &dyn World) {
    let (one, other, [writer]) = (reader(world), reader(world), world.rivals());
    let token = |lock: &Arc<dyn Lock>| {
        let guard = lock.acquire(PATIENCE).unwrap();
        (guard.term().token().unwrap(), guard)
    };
    let (before, guard) = token(&writer.lock);
    drop(guard);
    let ((first, first_guard), (second, second_guard)) = (token(&one.lock), token(&other.lock));
    assert!(first > before && second == first, "{before} {first} {second}");
    drop(first_guard);
    let (third, third_guard) = token(&one.lock);
    assert_eq!(third, first);
    drop((second_guard, third_guard));
    assert_eq!(token(&other.lock).0, first, "nobody has written since");
    let (writing, guard) = token(&writer.lock);
    assert!(writing > first);
    drop(guard);
    assert!(token(&one.lock).0 > writing);
}

fn a_reader_that_is_lost_costs_no_other_the_lock(world: &dyn World) {
    let (one, other, [writer]) = (reader(world), reader(world), world.rivals());
    let guards = [one.lock.acquire(PATIENCE).unwrap(), other.lock.acquire(PATIENCE).unwrap()];
    assert!(writer.manager.break_lock("x").unwrap().unwrap().is_shared);
    eventually("the loss of one", || guards.iter().filter(|guard| guard.is_held()).count() == 1);
    assert!(writer.lock.try_acquire().unwrap().is_none(), "the other one has it");
    let released = guards.map(|guard| guard.release().err().map(|error| error.kind()));
    assert!(released.contains(&None) && released.contains(&Some(ErrorKind::Lost)), "{released:?}");
    writer.lock();
}

fn claims_share_a_lock_as_guards_do(world: &dyn World) {
    let (one, other, [writer]) = (reader(world), reader(world), world.rivals());
    one.lock();
    other.lock();
    one.lock();
    writer.is_refused();
    assert!(one.is_held() && other.is_held() && !writer.is_held());
    let snapshot = one.manager.snapshot();
    assert!(snapshot.claim("x").unwrap().is_shared);
    assert_eq!(one.lock.term().unwrap().token(), other.lock.term().unwrap().token());
    one.release();
    other.release();
    writer.gets_it();
    assert_eq!(kind(one.lock.try_lock(&soon())), ErrorKind::LockUnavailable);
    writer.release();
    one.gets_it();
    one.manager.stop().unwrap();
    writer.lock();
}

fn who_has_a_lock_one_way_is_refused_it_the_other_way(world: &dyn World) {
    let manager = world.manager();
    let (reading, writing) = (manager.shared_lock("x").unwrap(), x(&*manager));
    for (first, second) in [(&reading, &writing), (&writing, &reading)] {
        let guard = first.acquire(PATIENCE).unwrap();
        assert_eq!(kind(second.acquire(PATIENCE)), ErrorKind::WouldDeadlock);
        assert_eq!(kind(second.try_acquire()), ErrorKind::WouldDeadlock);
        assert_eq!(kind(second.lock(&soon())), ErrorKind::WouldDeadlock);
        assert_eq!(kind(second.try_lock(&soon())), ErrorKind::WouldDeadlock);
        // Another thread is no reason to refuse, nor is another key.
        let other = Arc::clone(second);
        assert!(begin(move || other.try_acquire().unwrap().is_none()).get());
        drop(manager.lock("y").unwrap().acquire(PATIENCE).unwrap());
        guard.release().unwrap();

        first.lock(&soon()).unwrap();
        assert_eq!(kind(second.lock(&soon())), ErrorKind::WouldDeadlock);
        assert!(second.try_acquire().unwrap().is_none(), "a guard waits for a claim as for another process");
        first.release().unwrap();
        second.lock(&soon()).unwrap();
        second.release().unwrap();
    }
    let guard = reading.acquire(PATIENCE).unwrap();
    let again = reading.acquire(PATIENCE).unwrap();
    drop((guard, again));
    writing.acquire(PATIENCE).unwrap().release().unwrap();
}

fn what_is_for_one_at_a_time_refuses_a_shared_lock(world: &dyn World) {
    let reader = reader(world);
    let lock = &reader.lock;
    assert_eq!(kind(dsync::Leader::start(Arc::clone(lock), |_| ())), ErrorKind::InvalidConfig);
    let outcome = lock.once(DAY, PATIENCE, |_| -> Result<(), Error> { unreachable!() });
    assert_eq!(kind(outcome), ErrorKind::InvalidConfig);
    assert_eq!(kind(lock.request_resignation()), ErrorKind::InvalidConfig);
    // Nor is a reader a leader for whom asks by the other handle.
    let _reading = lock.acquire(PATIENCE).unwrap();
    assert!(!world.manager().request_resignation("x").unwrap());
}

/// Readers count how many they are; a writer finds none.
fn no_schedule_of_readers_and_writers_breaks_exclusion(world: &dyn World) {
    const ROUNDS: usize = 12;
    let managers = [(); 3].map(|()| world.manager());
    let (readers, writers) = (AtomicUsize::new(0), AtomicUsize::new(0));
    thread::scope(|scope| {
        for number in 0..9 {
            let (manager, readers, writers) = (&managers[number % 3], &readers, &writers);
            scope.spawn(move || {
                let writes = number % 3 == 0 || number == 4;
                let lock = if writes { x(&**manager) } else { manager.shared_lock("x").unwrap() };
                for _ in 0..ROUNDS {
                    let guard = lock.acquire(PATIENCE).unwrap();
                    let mine = if writes { writers } else { readers };
                    let count = mine.fetch_add(1, Ordering::SeqCst) + 1;
                    let others = if writes { readers } else { writers }.load(Ordering::SeqCst);
                    assert_eq!(others, 0);
                    assert!(count == 1 || !writes, "{count} writers");
                    thread::sleep(Duration::from_millis(2));
                    mine.fetch_sub(1, Ordering::SeqCst);
                    guard.release().unwrap();
                }
            });
        }
    });
}

// ---------------------------------------------------------------------------------------------------------------------
// Semaphores
// ---------------------------------------------------------------------------------------------------------------------

/// A process that wants a permit of the semaphore `x`, which has so many.
fn one_of(world: &dyn World, permits: u32) -> Rival {
    let manager = world.manager();
    Rival { lock: manager.semaphore("x", permits).unwrap(), manager }
}

fn wait_for_waiters_for_permits(world: &dyn World, count: usize) {
    eventually(&format!("{count} waiters"), || world.waiting_for_permits() == count);
}

fn a_semaphore_is_had_by_as_many_as_it_has_permits(world: &dyn World) {
    let (one, other) = (one_of(world, 3), one_of(world, 3));
    let guards = [&one.lock, &one.lock, &other.lock].map(|lock| lock.acquire(PATIENCE).unwrap());
    assert!(guards.iter().all(|guard| guard.is_held()));
    let tokens = guards.each_ref().map(|guard| guard.term().token().unwrap());
    assert!(tokens[0] < tokens[1] && tokens[1] < tokens[2], "{tokens:?}");
    for lock in [&one.lock, &other.lock] {
        assert!(lock.try_acquire().unwrap().is_none());
        assert_eq!(kind(lock.acquire(Duration::ZERO)), ErrorKind::TimedOut);
        assert_eq!(kind(lock.acquire(Duration::from_millis(50))), ErrorKind::TimedOut);
    }
    let holder = other.lock.holder().unwrap().unwrap();
    assert!(holder.is_shared && tokens.contains(&holder.token.unwrap()), "{holder:?}");
    assert!((1..=3).contains(&holder.permit.unwrap()), "{holder:?}");
    for guard in guards {
        guard.release().unwrap();
        let next = other.lock.try_acquire().unwrap().unwrap();
        assert!(next.term().token().unwrap() > tokens[2]);
        next.release().unwrap();
    }
    assert!(other.lock.holder().unwrap().is_none());
}

fn who_waits_for_a_permit_is_served_in_order_and_not_overtaken(world: &dyn World) {
    let (holder, newcomer) = (one_of(world, 2), one_of(world, 2));
    let mut held = [(); 2].map(|()| holder.lock.acquire(PATIENCE).unwrap()).into_iter().collect::<Vec<_>>();
    let line = [(); 3].map(|()| one_of(world, 2));
    let mut waiting = Vec::new();
    for (number, rival) in line.iter().enumerate() {
        waiting.push(rival.starts_waiting(&Context::background()));
        wait_for_waiters_for_permits(world, number + 1);
    }
    assert!(newcomer.lock.try_acquire().unwrap().is_none());
    let mut line = line.iter().zip(waiting);
    for left in (1..3).rev() {
        let (_, first) = line.next().unwrap();
        held.pop().unwrap().release().unwrap();
        first.get().unwrap();
        assert!(newcomer.lock.try_acquire().unwrap().is_none(), "others wait, and all permits are held");
        wait_for_waiters_for_permits(world, left);
    }
    let (last, waiting) = line.next().unwrap();
    assert!(!waiting.is_ready() && !last.is_held());
}

fn a_permit_that_is_lost_goes_to_who_waits(world: &dyn World) {
    let (ours, theirs) = (one_of(world, 1), one_of(world, 1));
    let guard = ours.lock.acquire(PATIENCE).unwrap();
    let (lost, token) = (guard.lost().clone(), guard.term().token());
    let waiting = theirs.starts_waiting(&Context::background());
    wait_for_waiters_for_permits(world, 1);
    assert_eq!(theirs.lock.break_lock().unwrap().unwrap().token, token);
    hear(&lost);
    assert_eq!(guard.loss().unwrap().reason, LossReason::Terminated);
    assert_eq!(kind(guard.release()), ErrorKind::Lost);
    waiting.get().unwrap();
    // A claim has one again by itself.
    let first = theirs.lock.term().unwrap();
    theirs.lock.break_lock().unwrap().unwrap();
    hear(first.lost());
    theirs.gets_it();
    assert!(theirs.lock.term().unwrap().token() > first.token());
}

fn claims_have_permits_as_guards_do(world: &dyn World) {
    let [one, other, third] = [(); 3].map(|()| one_of(world, 2));
    one.lock();
    other.lock();
    one.lock();
    third.is_refused();
    assert!(one.is_held() && other.is_held() && !third.is_held());
    assert!(one.manager.snapshot().claim("x").unwrap().is_shared);
    assert!(one.lock.try_acquire().unwrap().is_none(), "a guard is one more");
    one.release();
    third.gets_it();
    other.manager.stop().unwrap();
    one.lock();
    assert!(third.is_held());
}

fn a_semaphore_and_a_lock_of_one_key_are_two_things(world: &dyn World) {
    let manager = world.manager();
    let (alone, permit) = (x(&*manager), manager.semaphore("x", 1).unwrap());
    let guards = [alone.acquire(PATIENCE).unwrap(), permit.acquire(PATIENCE).unwrap()];
    assert!(guards.iter().all(|guard| guard.is_held()));
    assert!(!alone.holder().unwrap().unwrap().is_shared && permit.holder().unwrap().unwrap().is_shared);
    drop(guards);
    alone.lock(&soon()).unwrap();
    permit.lock(&soon()).unwrap();
    alone.release().unwrap();
    assert!(is_held(&permit) && !is_held(&alone));
    assert_eq!(kind(alone.set_permits(2)), ErrorKind::InvalidConfig);
}

fn another_number_of_permits_is_told_and_a_changed_one_runs_in(world: &dyn World) {
    let (ours, theirs) = (one_of(world, 2), one_of(world, 3));
    let first = ours.lock.acquire(PATIENCE).unwrap();
    for outcome in [theirs.lock.acquire(PATIENCE), theirs.lock.try_acquire().map(|_| unreachable!())] {
        let error = outcome.unwrap_err();
        assert!(error.kind() == ErrorKind::InvalidConfig, "{error}");
        assert!(
            error.to_string().contains("with 3 permits") && error.to_string().contains("says 2"),
            "{error}"
        );
    }
    assert_eq!(kind(theirs.lock.lock(&soon())), ErrorKind::InvalidConfig);
    theirs.lock.release().unwrap();
    assert_eq!(kind(ours.manager.semaphore("x", 3)), ErrorKind::InvalidConfig);
    assert_eq!(kind(ours.manager.semaphore("y", 0)), ErrorKind::InvalidConfig);
    assert_eq!(kind(ours.manager.semaphore("y", 1024)), ErrorKind::InvalidConfig);
    let without = LockOptions::new().permits(2).without_token();
    assert_eq!(kind(ours.manager.lock_with("y", without)), ErrorKind::InvalidConfig);

    let second = ours.lock.acquire(PATIENCE).unwrap();
    let waiting = ours.starts_waiting(&Context::background());
    wait_for_waiters_for_permits(world, 1);
    assert_eq!(theirs.lock.set_permits(3).unwrap(), 2);
    waiting.get().unwrap();
    assert!(theirs.lock.try_acquire().unwrap().is_none());
    // Those who say two go on, by the new number, until it is changed again.
    assert_eq!(ours.lock.set_permits(1).unwrap(), 3);
    assert_eq!(ours.lock.set_permits(1).unwrap(), 1);
    assert_eq!(kind(one_of(world, 2).lock.acquire(PATIENCE)), ErrorKind::InvalidConfig);
    assert!(first.is_held() && second.is_held() && ours.is_held());
    assert!(theirs.lock.try_acquire().unwrap().is_none());
    drop((first, second));
    ours.release();
    let only = theirs.lock.acquire(PATIENCE).unwrap();
    assert!(one_of(world, 1).lock.try_acquire().unwrap().is_none());
    drop(only);
}

fn the_first_holder_is_that_of_the_first_permit(world: &dyn World) {
    // A manager for each, since those of one may be on one session.
    let processes = [(); 4].map(|()| one_of(world, 3));
    let mut held: Vec<_> = processes[1..].iter().map(|one| one.lock.acquire(PATIENCE).unwrap()).collect();
    held.sort_by_key(|guard| guard.term().permit());
    held.remove(0).release().unwrap();
    // The only one that is free, for who came last.
    let semaphore = &processes[0];
    let first = semaphore.lock.acquire(PATIENCE).unwrap();
    assert_eq!(first.term().permit(), Some(1));
    let holder = semaphore.lock.holder().unwrap().unwrap();
    assert_eq!((holder.permit, holder.token), (Some(1), first.term().token()));
    assert_eq!(semaphore.lock.break_lock().unwrap().unwrap().token, first.term().token());
    hear(first.lost());
    assert!(held.iter().all(|guard| guard.is_held()));
}

fn who_gets_no_permit_is_told_why(world: &dyn World) {
    let (one, other) = (one_of(world, 1), one_of(world, 1));
    one.lock();
    let text = |outcome: Result<(), Error>| outcome.unwrap_err().to_string();
    assert_eq!(
        text(other.lock.try_lock(&soon())),
        r#"lock unavailable: others have, or wait for, all permits of "x"; without a guard, the claim goes on in the background until release()"#
    );
    let ends = r#" for lock "x", of which others have, or wait for, all permits"#;
    let waited = text(other.lock.lock(&briefly()));
    assert!(waited.ends_with(ends), "{waited}");
    assert!(text(one.lock.acquire(briefly()).map(drop)).ends_with(ends));
    let tried = text(one.lock.acquire(no_time()).map(drop));
    assert_eq!(tried, r#"timed out: others have, or wait for, all permits of "x""#);
    // So is who waits to share a lock.
    let (writer, reader) = (world.manager(), world.manager());
    let guard = writer.lock("y").unwrap().acquire(PATIENCE).unwrap();
    let reader = reader.shared_lock("y").unwrap();
    assert!(text(reader.lock(&briefly())).ends_with(r#"for lock "y", which a writer has, or waits for"#));
    assert!(
        text(reader.try_lock(&soon())).starts_with(r#"lock unavailable: a writer has, or waits for, "y"; "#)
    );
    drop(guard);
}

fn what_is_for_one_at_a_time_refuses_a_semaphore(world: &dyn World) {
    let one = one_of(world, 2);
    assert_eq!(kind(dsync::Leader::start(Arc::clone(&one.lock), |_| ())), ErrorKind::InvalidConfig);
    let outcome = one.lock.once(DAY, PATIENCE, |_| -> Result<(), Error> { unreachable!() });
    assert_eq!(kind(outcome), ErrorKind::InvalidConfig);
    assert_eq!(kind(one.lock.request_resignation()), ErrorKind::InvalidConfig);
}

fn no_schedule_of_permits_goes_above_their_number(world: &dyn World) {
    const ROUNDS: usize = 12;
    const PERMITS: u32 = 3;
    let managers = [(); 3].map(|()| world.manager());
    let (working, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
    thread::scope(|scope| {
        for number in 0..9 {
            let (manager, working, most) = (&managers[number % 3], &working, &most);
            scope.spawn(move || {
                let semaphore = manager.semaphore("x", PERMITS).unwrap();
                let mut left = ROUNDS;
                while left > 0 {
                    let guard = match left % 4 {
                        0 => semaphore.try_acquire().unwrap(),
                        _ => Some(semaphore.acquire(PATIENCE).unwrap()),
                    };
                    let Some(guard) = guard else { continue };
                    most.fetch_max(working.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                    // The first ones wait for each other.
                    let all_are_had = || most.load(Ordering::SeqCst) >= PERMITS as usize;
                    eventually("all permits to be had at once", all_are_had);
                    thread::sleep(Duration::from_millis(2));
                    working.fetch_sub(1, Ordering::SeqCst);
                    guard.release().unwrap();
                    left -= 1;
                }
            });
        }
    });
    assert_eq!(most.into_inner(), PERMITS as usize);
}

// ---------------------------------------------------------------------------------------------------------------------
// Several locks at once
// ---------------------------------------------------------------------------------------------------------------------

/// True if nobody has the lock with this key.
fn is_free(manager: &dyn SyncManager, key: &Key) -> bool {
    manager.lock(key.clone()).unwrap().try_acquire().unwrap().is_some()
}

fn a_set_of_locks_is_taken_as_a_whole_and_each_key_once(world: &dyn World) {
    let (ours, theirs) = (world.manager(), world.manager());
    let keys = [Key::from("x"), Key::from(7), Key::from((7, 7)), Key::from("#7")];
    let named = keys.iter().chain(&keys[..2]).cloned();
    let set = ours.multi_lock(named).unwrap();
    assert_eq!(set.keys().count(), keys.len(), "each once");
    let mirrored = theirs.multi_lock(keys.iter().rev().cloned()).unwrap();
    assert!(set.keys().eq(mirrored.keys()), "in one order everywhere");
    for how in [|guard: MultiGuard| guard.release().unwrap(), drop] {
        let guard = set.acquire(PATIENCE).unwrap();
        assert!(guard.is_held() && is_open(guard.lost()) && guard.loss().is_none());
        let tokens = keys.each_ref().map(|key| guard.term(key.clone()).unwrap().token().unwrap());
        assert!((1..tokens.len()).all(|index| !tokens[..index].contains(&tokens[index])), "{tokens:?}");
        assert!(guard.term("z").is_none() && guard.terms().count() == keys.len());
        assert!(keys.iter().all(|key| !is_free(&*theirs, key)));
        let lost = guard.lost().clone();
        how(guard);
        hear(&lost);
        assert!(keys.iter().all(|key| is_free(&*theirs, key)));
    }
}

fn a_set_of_which_one_lock_is_busy_is_not_taken(world: &dyn World) {
    let (ours, theirs) = (world.manager(), world.manager());
    let keys = ["x", "y", "z"];
    let set = ours.multi_lock(keys).unwrap();
    for busy in keys {
        let guard = theirs.lock(busy).unwrap().acquire(PATIENCE).unwrap();
        assert!(set.try_acquire().unwrap().is_none());
        for context in [no_time(), briefly()] {
            let error = set.acquire(context).unwrap_err();
            assert!(error.kind() == ErrorKind::TimedOut && error.to_string().contains(busy), "{error}");
        }
        assert_eq!(kind(set.acquire(cancelled())), ErrorKind::Cancelled);
        for key in keys.into_iter().filter(|key| *key != busy) {
            assert!(is_free(&*theirs, &key.into()), "{key} was kept, {busy} being busy");
        }
        let waiting = {
            let set = set.clone();
            begin(move || set.acquire(PATIENCE).map(|guard| guard.is_held()))
        };
        guard.release().unwrap();
        assert!(waiting.get().unwrap());
        // Given back by the thread that took it.
        eventually("the end of the set", || keys.iter().all(|key| is_free(&*theirs, &(*key).into())));
    }
    set.try_acquire().unwrap().expect("all are free").release().unwrap();
}

fn a_set_is_lost_with_the_first_of_its_locks(world: &dyn World) {
    // One lock, since the operator ends the only holder that there is.
    let manager = world.manager();
    let single = manager.multi_lock(["x"]).unwrap().acquire(PATIENCE).unwrap();
    world.take_away();
    hear(single.lost());
    assert!(!single.is_held());
    assert_eq!(single.loss().unwrap().reason, world.reason());
    assert_eq!(kind(single.release()), ErrorKind::Lost);
    // What a manager that stops ends is lost, too.
    let both = manager.multi_lock(["x", "y"]).unwrap().acquire(PATIENCE).unwrap();
    let lost = both.lost().clone();
    manager.stop().unwrap();
    hear(&lost);
    assert_eq!(kind(both.release()), ErrorKind::Lost);
    assert_free(world);
}

fn a_set_tells_of_each_key_who_has_it_and_who_waits(world: &dyn World) {
    let [ours, theirs, third] = [(); 3].map(|()| world.manager());
    // In whichever order they are taken, one of the two is another one.
    let keys = [Key::from("z"), Key::from("x"), Key::from(7), Key::from((7, 7))];
    let mirrored: Vec<_> = keys.iter().rev().chain(&keys).cloned().collect();
    let shown = |set: &MultiLock| {
        set.inspect().unwrap().into_iter().map(|view| view.key).collect::<Vec<_>>().join(" ")
    };
    let (set, other) = (ours.multi_lock(keys.clone()).unwrap(), ours.multi_lock(mirrored).unwrap());
    assert_eq!([shown(&set), shown(&other)], ["z x #7 #7:7", "#7:7 #7 x z"]);

    let alone = theirs.lock("x").unwrap().acquire(PATIENCE).unwrap();
    let readers = [(); 2].map(|()| theirs.shared_lock(7).unwrap().acquire(PATIENCE).unwrap());
    let permit = theirs.semaphore("z", 1).unwrap().acquire(PATIENCE).unwrap();
    let waiting = Rival { lock: x(&*third), manager: third };
    let waiting_call = waiting.starts_waiting(&Context::background());
    world.wait_for_waiters(1);
    let views = set.inspect().unwrap();
    let tokens: Vec<Vec<_>> =
        views.iter().map(|view| view.holders().map(|holder| holder.token).collect()).collect();
    let of_readers = readers.each_ref().map(|guard| guard.term().token());
    assert_eq!(tokens, [vec![], vec![alone.term().token()], of_readers.to_vec(), vec![]]);
    assert!(
        views[2].holders().all(|holder| holder.is_shared) && !views[1].holder.as_ref().unwrap().is_shared
    );
    let waiters: Vec<_> = views.iter().map(|view| view.waiters.len()).collect();
    assert!(waiters == [0, 1, 0, 0] && views[1].waiters[0].is_shared == Some(false), "{views:?}");
    assert!(views.iter().all(|view| view.permits.is_none() && view.grace_left.is_none()), "{views:?}");
    drop((alone, readers, permit));
    waiting_call.get().unwrap();
    ours.stop().unwrap();
    assert_eq!(kind(set.inspect()), ErrorKind::SyncManagerStopped);
}

fn a_set_that_cannot_be_one_is_refused(world: &dyn World) {
    /// Has a manager for each half of the keys.
    #[derive(Debug)]
    struct Halves([Arc<dyn SyncManager>; 2]);
    impl SyncManager for Halves {
        fn start(&self) -> Result<(), Error> {
            Ok(())
        }
        fn stop(&self) -> Result<(), Error> {
            Ok(())
        }
        fn lock_with_key(&self, key: Key, options: LockOptions) -> Result<Arc<dyn Lock>, Error> {
            let key = key.to_string();
            let (half, key) = key.split_once('/').unwrap();
            self.0[usize::from(half == "right")].lock_with_key(key.into(), options)
        }
    }
    let manager = world.manager();
    let none: [&str; 0] = [];
    assert_eq!(kind(manager.multi_lock(none)), ErrorKind::InvalidKey);
    assert_eq!(kind(manager.multi_lock(["x", ""])), ErrorKind::InvalidKey);
    let halves: Arc<dyn SyncManager> = Arc::new(Halves([manager, world.manager()]));
    assert_eq!(kind(halves.multi_lock(["left/x", "right/x"])), ErrorKind::InvalidConfig);
    let guard = halves.multi_lock(["left/y", "left/x", "left/y"]).unwrap().acquire(PATIENCE).unwrap();
    let token = |key: &str| guard.term(key).unwrap().token();
    assert!(
        guard.terms().count() == 2 && token("left/x") != token("left/y"),
        "by the keys as they are named"
    );
}

/// Threads of two processes take sets of three of five keys, named in an order that lots have.
fn sets_in_whatever_order_never_wait_for_each_other(world: &dyn World) {
    const THREADS: u64 = 4;
    const ROUNDS: usize = 50;
    let managers = [(); 2].map(|()| world.manager());
    let inside = [(); 5].map(|()| AtomicUsize::new(0));
    let names = ["a", "b", "c", "d", "e"];
    thread::scope(|scope| {
        for thread in 0..2 * THREADS {
            let (manager, inside) = (&managers[usize::from(thread >= THREADS)], &inside);
            scope.spawn(move || {
                let mut lots = fastrand::Rng::with_seed(thread);
                for _ in 0..ROUNDS {
                    let mine = lots.choose_multiple(0..names.len(), 3);
                    let set = manager.multi_lock(mine.iter().map(|index| names[*index])).unwrap();
                    let guard = set.acquire(PATIENCE).unwrap();
                    for index in &mine {
                        assert_eq!(
                            inside[*index].fetch_add(1, Ordering::SeqCst),
                            0,
                            "somebody else is inside"
                        );
                    }
                    thread::yield_now();
                    for index in &mine {
                        inside[*index].fetch_sub(1, Ordering::SeqCst);
                    }
                    guard.release().unwrap();
                }
            });
        }
    });
}

fn work_is_done_under_all_locks_of_a_set(world: &dyn World) {
    let (ours, theirs) = (world.manager(), world.manager());
    let set = ours.multi_lock(["x", "y"]).unwrap();
    let held = set.with_lock(PATIENCE, |guard| guard.is_held() && !is_free(&*theirs, &"y".into()));
    assert!(held.unwrap());
    let panics = set.clone();
    thread::spawn(move || panics.with_lock(PATIENCE, |_| panic!("in the middle of the work")))
        .join()
        .unwrap_err();
    assert!(is_free(&*theirs, &"x".into()) && is_free(&*theirs, &"y".into()));
}

// ---------------------------------------------------------------------------------------------------------------------
// Work that is done once a period
// ---------------------------------------------------------------------------------------------------------------------

const HOUR: Duration = Duration::from_secs(60 * 60);
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// Work that succeeds at once; whether it was done.
fn does_it(manager: &dyn SyncManager) -> bool {
    match manager.once("x", DAY, PATIENCE, |_| Ok::<_, Error>(())).unwrap() {
        Once::Ran(()) => true,
        Once::NotDue { .. } => false,
        Once::Busy => panic!("nobody else is at it"),
    }
}

fn work_is_done_once_a_period(world: &dyn World) {
    let [first, second] = [world.manager(), world.manager()];
    let outcome = first.once("x", DAY, PATIENCE, |run| {
        assert!(run.term().is_held() && !run.lost().is_lost());
        assert_eq!(run.last_success(), None);
        // So long that the beginning can be told from the end.
        let begun = SystemTime::now();
        thread::sleep(Duration::from_millis(20));
        assert!(run.started() <= begun);
        Ok::<_, Error>(run.started())
    });
    let Once::Ran(started) = outcome.unwrap() else { panic!("it was due") };
    assert_eq!(second.last_success("x").unwrap(), Some(started), "the beginning is what counts");
    for manager in [&first, &second] {
        let outcome = manager.once("x", DAY, PATIENCE, |_| -> Result<(), Error> { unreachable!() });
        let Once::NotDue { last_success, due_in } = outcome.unwrap() else { panic!("it is not due") };
        assert_eq!(last_success, started);
        assert!(due_in <= DAY * 9 / 10 && due_in > DAY * 9 / 10 - HOUR, "{due_in:?}");
    }
    world.succeeded_at(SystemTime::now() - DAY * 9 / 10 + HOUR);
    assert!(!does_it(&*second));
    world.succeeded_at(SystemTime::now() - DAY * 9 / 10);
    assert!(does_it(&*second));
    assert!(!does_it(&*first));
    // Another time than the default.
    let hourly = Period::every(HOUR).due_after(HOUR / 2);
    world.succeeded_at(SystemTime::now() - HOUR / 2 + HOUR / 10);
    let outcome = first.once("x", hourly, PATIENCE, |_| -> Result<(), Error> { unreachable!() });
    assert!(matches!(outcome.unwrap(), Once::NotDue { .. }));
    world.succeeded_at(SystemTime::now() - HOUR / 2);
    let outcome = first.once("x", hourly, PATIENCE, |run| Ok::<_, Error>(run.last_success().is_some()));
    assert_eq!(outcome.unwrap(), Once::Ran(true));
    assert_free(world);
}

fn work_that_fails_or_panics_is_due_still(world: &dyn World) {
    #[derive(Debug, PartialEq)]
    enum Failure {
        OutOfPaper,
        Lock(ErrorKind),
    }
    impl From<Error> for Failure {
        fn from(error: Error) -> Self {
            Self::Lock(error.kind())
        }
    }
    let [first, second] = [world.manager(), world.manager()];
    let failed = first.once("x", DAY, PATIENCE, |_| Err::<(), _>(Failure::OutOfPaper));
    assert_eq!(failed, Err(Failure::OutOfPaper), "as the work gave it");
    assert_free(world);
    let manager = Arc::clone(&first);
    let work = thread::spawn(move || {
        manager.once("x", DAY, PATIENCE, |_| -> Result<(), Error> { panic!("in the work, on purpose") })
    });
    assert!(work.join().is_err());
    assert_eq!(second.last_success("x").unwrap(), None);
    let refused = first.once("x", Duration::ZERO, PATIENCE, |_| Ok::<_, Failure>(()));
    assert_eq!(refused, Err(Failure::Lock(ErrorKind::InvalidConfig)));
    assert!(does_it(&*second));
    assert_free(world);
}

fn work_whose_term_is_lost_is_due_still(world: &dyn World) {
    let [first, second] = [world.manager(), world.manager()];
    let lost = first.once("x", DAY, PATIENCE, |run| {
        world.take_away();
        hear(run.lost());
        Ok::<_, Error>(())
    });
    let error = lost.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Lost);
    assert!(error.to_string().contains(&world.reason().to_string()), "{error}");
    assert_eq!(first.last_success("x").unwrap(), None);
    // Where another one has done it meanwhile, that is what is recorded.
    let lost = first.once("x", DAY, PATIENCE, |run| {
        world.take_away();
        hear(run.lost());
        assert!(does_it(&*second));
        Ok::<_, Error>(())
    });
    assert_eq!(kind(lost), ErrorKind::Lost);
    assert!(!does_it(&*first));
    assert_free(world);
}

fn work_that_is_being_done_is_left_alone(world: &dyn World) {
    let [first, second] = [world.manager(), world.manager()];
    let outcome = first.once("x", DAY, PATIENCE, |_| {
        // In another process, and in another thread of the same one.
        for manager in [&first, &second] {
            for time in [Duration::ZERO, Duration::from_millis(20)] {
                let outcome = manager.once("x", DAY, time, |_| -> Result<(), Error> { unreachable!() });
                assert_eq!(outcome.unwrap(), Once::Busy, "{time:?}");
            }
            let outcome = manager.once("x", DAY, cancelled(), |_| -> Result<(), Error> { unreachable!() });
            assert_eq!(kind(outcome), ErrorKind::Cancelled);
        }
        Ok::<_, Error>(())
    });
    assert_eq!(outcome.unwrap(), Once::Ran(()));
    assert_free(world);
}

fn who_has_waited_for_the_work_looks_again(world: &dyn World) {
    for succeeds in [false, true] {
        let [first, second] = [world.manager(), world.manager()];
        let mut waiting = None;
        let outcome = first.once("x", DAY, PATIENCE, |_| {
            waiting = Some(begin(move || does_it(&*second)));
            world.wait_for_waiters(1);
            if succeeds { Ok(()) } else { cancelled().check() }
        });
        assert_eq!(outcome.is_ok(), succeeds);
        assert_eq!(waiting.unwrap().get(), !succeeds);
        first.forget_success("x").unwrap();
    }
    assert_free(world);
}

/// Started each night by two machines, a little sooner or later than the night before. If the end counted, or the whole period had to be
/// over, nights would be left out.
fn thirty_nights_are_thirty_runs(world: &dyn World) {
    let machines = [world.manager(), world.manager()];
    let mut lots = fastrand::Rng::with_seed(30);
    let mut jitter = || Duration::from_secs(lots.u64(..2 * 60 * 60));
    let (mut before, mut runs) = (jitter(), 0);
    for night in 0..30 {
        let tonight = jitter();
        if night > 0 {
            world.succeeded_at(SystemTime::now() - (DAY + tonight - before));
        }
        runs += usize::from(does_it(&*machines[night % 2]));
        // The other machine starts up to an hour later.
        world.succeeded_at(SystemTime::now() - jitter() / 2);
        assert!(!does_it(&*machines[(night + 1) % 2]), "night {night}");
        before = tonight;
    }
    assert_eq!(runs, 30);
}

fn a_record_in_the_future_is_ignored(world: &dyn World) {
    let manager = world.manager();
    assert!(does_it(&*manager));
    for ahead in [HOUR, 500 * DAY] {
        world.succeeded_at(SystemTime::now() + ahead);
        assert!(does_it(&*manager));
        assert!(manager.last_success("x").unwrap().unwrap() <= SystemTime::now(), "it is put right");
        assert!(!does_it(&*manager));
    }
}

fn a_success_can_be_read_and_forgotten(world: &dyn World) {
    let [first, second] = [world.manager(), world.manager()];
    assert_eq!(first.last_success("x").unwrap(), None);
    assert!(!first.forget_success("x").unwrap());
    assert!(does_it(&*first));
    let recorded = second.last_success("x").unwrap().unwrap();
    assert!(recorded <= SystemTime::now() && recorded > SystemTime::now() - HOUR);
    assert_eq!(second.last_success("y").unwrap(), None);
    assert!(!second.forget_success("y").unwrap());
    assert!(second.forget_success("x").unwrap() && !second.forget_success("x").unwrap());
    assert_eq!(first.last_success("x").unwrap(), None);
    assert!(does_it(&*first));
    first.stop().unwrap();
    assert_eq!(kind(first.last_success("x")), ErrorKind::SyncManagerStopped);
    let outcome = first.once("x", DAY, PATIENCE, |_| -> Result<(), Error> { unreachable!() });
    assert_eq!(kind(outcome), ErrorKind::SyncManagerStopped);
}

fn work_fails_where_nobody_answers(world: &dyn World) {
    let manager = world.cut_off();
    manager.start().unwrap();
    for (time, wanted) in
        [(Duration::ZERO, ErrorKind::SessionUnavailable), (Duration::from_millis(20), ErrorKind::TimedOut)]
    {
        let outcome = manager.once("x", DAY, time, |_| -> Result<(), Error> { unreachable!() });
        assert_eq!(kind(outcome), wanted);
    }
    assert_eq!(kind(manager.last_success("x")), ErrorKind::SessionUnavailable);
    assert_eq!(kind(manager.forget_success("x")), ErrorKind::SessionUnavailable);
}

fn work_without_a_token_or_in_a_period_that_cannot_be_is_refused(world: &dyn World) {
    let manager = world.manager();
    let lock = manager.lock_with("x", LockOptions::new().without_token()).unwrap();
    for outcome in [
        lock.once(DAY, PATIENCE, |_| -> Result<(), Error> { unreachable!() }),
        // The same handle.
        manager.once("x", DAY, PATIENCE, |_| -> Result<(), Error> { unreachable!() }),
    ] {
        let error = outcome.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidConfig);
        assert!(error.to_string().contains("without_token"), "{error}");
    }
    assert_eq!(kind(lock.last_success()), ErrorKind::InvalidConfig);
    assert_eq!(kind(lock.forget_success()), ErrorKind::InvalidConfig);
    drop(lock);
    for period in [Duration::ZERO.into(), Period::every(HOUR).due_after(DAY)] {
        let outcome = manager.once("x", period, PATIENCE, |_| -> Result<(), Error> { unreachable!() });
        assert_eq!(kind(outcome), ErrorKind::InvalidConfig);
    }
    assert_eq!(kind(manager.once("", DAY, PATIENCE, |_| Ok::<_, Error>(()))), ErrorKind::InvalidKey);
}

fn once_works_in_generic_code_and_for_any_key(world: &dyn World) {
    use dsync::SyncManagerExt;
    fn each_once<M: SyncManager>(manager: &M) {
        manager.start().unwrap();
        let keys = [
            Key::from("#-1:2"),
            Key::from((-1, 2)),
            Key::from("it's \\ \"ours\""),
            Key::from(7_u64),
            Key::from("k".repeat(Key::MAX_LEN)),
        ];
        for key in &keys {
            let outcome = manager.once(key.clone(), DAY, PATIENCE, |_| Ok::<_, Error>(()));
            assert_eq!(outcome.unwrap(), Once::Ran(()), "{key}");
        }
        for key in keys {
            assert!(manager.last_success(key.clone()).unwrap().is_some());
            assert!(manager.forget_success(key).unwrap());
        }
    }
    each_once(&Wrapped(world.new_manager()));
}

/// A manager of the application's, around one of ours.
#[derive(Debug)]
struct Wrapped(Arc<dyn SyncManager>);
impl SyncManager for Wrapped {
    fn start(&self) -> Result<(), Error> {
        self.0.start()
    }
    fn stop(&self) -> Result<(), Error> {
        self.0.stop()
    }
    fn lock_with_key(&self, key: Key, options: LockOptions) -> Result<Arc<dyn Lock>, Error> {
        self.0.lock_with_key(key, options)
    }
}

/// Waits until so many threads wait for guards of this lock in this process.
fn becomes_queued(lock: &Arc<dyn Lock>, count: usize) {
    eventually(&format!("{count} threads in the queue"), || {
        format!("{lock:?}").ends_with(&format!("waiting_threads: {count} }}"))
    });
}
