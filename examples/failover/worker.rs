//! One process of the service: stands for leader, and works while it leads. Start reading here to learn the library.

use std::error::Error;
use std::io::{self, Write};
use std::thread;
use std::time::Duration;

use dsync::crossbeam_channel::select;
use dsync::{Config, Context, ErrorKind, Term};

use crate::outcome::one_line;
use crate::report::{Report, What, now};

/// How long the server keeps a silent leader. Short, so that nobody has to watch a frozen one for 15 s, the default.
pub(crate) const LEASE: Duration = Duration::from_secs(3);

/// Keeps the locks of the demonstration apart from others in the same database.
pub(crate) const NAMESPACE: &str = "failover-demo";

/// The pause between two units of work.
const PACE: Duration = Duration::from_millis(10);

/// What became of a unit of work.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    Done,
    /// The fence: a later leader has begun, or this one has lost its term.
    Refused,
    /// The server could not be reached; the next unit tries it with a new connection.
    Failed,
}

pub(crate) fn config(url: &str) -> dsync::Result<Config> {
    Ok(Config::from_url(url)?.service("demo").namespace(NAMESPACE).lease(LEASE))
}

/// Stands for leader until standard input ends, and does `work` while it leads.
pub(crate) fn run(
    name: &str,
    config: Config,
    mut work: impl FnMut(&Term) -> Outcome,
) -> Result<(), Box<dyn Error>> {
    let stop = until_the_parent_is_gone()?;

    dsync::init(config)?;
    tell(What::Standing)?;
    let outcome = stand(&stop, &mut work);

    // Gives the leadership back, so that the next leader need not wait for a lease to end. It must wait if this could not be
    // confirmed; nothing worse comes of it.
    if let Err(error) = dsync::shutdown() {
        log::warn!("{name}: {}", one_line(&error));
    }
    match outcome {
        // The parent is gone, and that is no failure of ours.
        Err(error) if is_broken_pipe(&*error) => Ok(()),
        outcome => outcome,
    }
}

fn is_broken_pipe(error: &(dyn Error + 'static)) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

/// Leads whenever it can. The library stands for election all the time, so there is nothing to do but to wait for it.
fn stand(stop: &Context, work: &mut impl FnMut(&Term) -> Outcome) -> Result<(), Box<dyn Error>> {
    let leadership = dsync::leadership_lock()?;
    loop {
        match leadership.lock(stop) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::Cancelled => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        // None if it was lost again in between.
        let Some(term) = leadership.term() else { continue };
        tell(What::Gained { token: term.token().unwrap_or_default() })?;
        match lead(&term, stop, work)? {
            Ended::Lost => {
                // Its `Display` is a whole sentence, for a log.
                let reason = leadership.last_loss().map(|loss| format!("{:?}", loss.reason));
                tell(What::Lost { reason: reason.unwrap_or_default() })?;
            }
            Ended::Stopped => return Ok(tell(What::Stopped)?),
        }
    }
}

enum Ended {
    Lost,
    Stopped,
}

/// Works, one unit after the other, until the term is lost or the process is told to stop.
fn lead(term: &Term, stop: &Context, work: &mut impl FnMut(&Term) -> Outcome) -> io::Result<Ended> {
    let stopped = stop.cancelled();
    loop {
        select! {
            recv(term.lost()) -> _ => return Ok(Ended::Lost),
            recv(stopped) -> _ => return Ok(Ended::Stopped),
            default(PACE) => {}
        }
        // After a freeze this thread may run before the one that closes the channel; the term looks at the clock as well.
        if !term.is_held() {
            return Ok(Ended::Lost);
        }
        if work(term) == Outcome::Refused {
            tell(What::Refused)?;
        }
    }
}

/// A context that is cancelled when standard input ends: the parent closes it, or is dead.
fn until_the_parent_is_gone() -> io::Result<Context> {
    let (context, canceller) = Context::background().with_cancel();
    thread::Builder::new().name("stdin".to_owned()).spawn(move || {
        // An error is an end too.
        let _ = io::copy(&mut io::stdin().lock(), &mut io::sink());
        canceller.cancel();
    })?;
    Ok(context)
}

/// Not `println!`, which panics when nobody listens any more.
fn tell(what: What) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{}", Report { at: now(), what })?;
    out.flush()
}
