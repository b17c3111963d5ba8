//! Looks at locks, once or again and again, and says in words and in JSON what is there.

use std::thread;
use std::time::Duration;

use clap::Args;
use dsync::{ErrorKind, Holder, LockView, PostgresManager, Waiter};
use serde_json::{Value, json};

use crate::args::Arguments;
use crate::connect;
use crate::exit::{Failure, say};
use crate::key::{self, Wanted};
use crate::text::{self, date, harmless};

/// How often to look.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct Interval {
    /// How often to look, such as 500ms or 5s.
    #[arg(long, value_name = "DUR", default_value = "1s", value_parser = interval)]
    interval: Duration,
}

fn interval(text: &str) -> Result<Duration, String> {
    let time = text::duration(text)?;
    if time < Duration::from_millis(10) {
        return Err("it should be 10ms at least, like 500ms or 5s".to_owned());
    }
    Ok(time)
}

/// What is looked at, and by whom.
pub(crate) struct Looker {
    manager: PostgresManager,
    wanted: Wanted,
    /// Only this one, if it was named.
    namespace: Option<String>,
    /// That of keys which are shown without one.
    pub(crate) usual: String,
}

impl Looker {
    pub(crate) fn new(arguments: &Arguments, wanted: Wanted) -> Result<Self, Failure> {
        Ok(Self {
            manager: connect::manager(&arguments.connection)?,
            wanted,
            namespace: arguments.connection.namespace.clone(),
            usual: connect::namespace(&arguments.connection),
        })
    }

    pub(crate) fn look(&self) -> dsync::Result<Vec<LockView>> {
        if let Wanted::One(key) = &self.wanted {
            return Ok(vec![self.manager.inspect(key.clone())?]);
        }
        let mut views = self.manager.inspect_all()?;
        views.retain(|view| {
            let in_namespace = self
                .namespace
                .as_ref()
                .is_none_or(|wanted| view.namespace == *wanted || view.namespace.is_empty());
            let is_wanted = match &self.wanted {
                Wanted::Some(pattern) => key::matches(pattern, &key::written(view)),
                Wanted::All | Wanted::One(_) => true,
            };
            in_namespace && is_wanted
        });
        Ok(views)
    }

    /// How long the takeover grace lasts that goes on. It is the same for all locks, and there may be none to see.
    pub(crate) fn grace_left(&self, views: &[LockView]) -> Option<Duration> {
        match views.first() {
            Some(view) => view.grace_left,
            None => self.manager.inspect("pgdsync").ok()?.grace_left,
        }
    }

    /// Looks again and again. Once there was an answer, it goes on until there is the next one, and says so.
    pub(crate) fn keep_looking(
        &self,
        interval: Interval,
        mut see: impl FnMut(Vec<LockView>) -> Result<(), Failure>,
    ) -> Result<u8, Failure> {
        let (mut has_seen, mut is_away) = (false, false);
        loop {
            match self.look() {
                Ok(views) => {
                    if std::mem::replace(&mut is_away, false) {
                        say("the server answers again");
                    }
                    has_seen = true;
                    see(views)?;
                }
                Err(error)
                    if !has_seen
                        || matches!(error.kind(), ErrorKind::InvalidKey | ErrorKind::InvalidConfig) =>
                {
                    return Err(error.into());
                }
                Err(error) => {
                    if !std::mem::replace(&mut is_away, true) {
                        say(&format!("{}; asking again until it answers", Failure::from(error).message));
                    }
                }
            }
            thread::sleep(interval.interval);
        }
    }
}

/// Why nobody gets a lock for a while, in a line of 80 columns.
pub(crate) fn grace_text(left: Duration) -> String {
    let left = text::lasting(left + Duration::from_millis(999));
    format!("the server was restarted or replaced; no lock is granted for {left} at most")
}

/// How many have the lock where several may, in front of who they are.
pub(crate) fn count_text(view: &LockView) -> Option<String> {
    let held = view.holders().count();
    match view.permits {
        Some(permits) => Some(format!("{held} of {permits} permits held")),
        None if held > 1 => Some(format!("shared by {held}")),
        None => None,
    }
}

/// Where a session comes from and what it calls itself, without the key that the library puts behind that.
pub(crate) fn client(
    view: &LockView,
    address: Option<std::net::IpAddr>,
    name: Option<&str>,
    pid: i32,
) -> String {
    if pid == 0 {
        return "a prepared transaction".to_owned();
    }
    let name = name.unwrap_or_default();
    // The server keeps the beginning of the key where it is long, in ASCII.
    let key: String =
        view.key.chars().map(|letter| if (' '..='~').contains(&letter) { letter } else { '?' }).collect();
    let mut parts = name.match_indices(' ').map(|(space, _)| (&name[..space], &name[space + 1..]));
    let own = parts.find(|(_, behind)| key.starts_with(behind)).map_or(name, |(own, _)| own);
    // None for a Unix socket, and where the server shows us none of other roles.
    match (address, own) {
        (None, "") => format!("backend {pid}"),
        (None, own) => harmless(own),
        (Some(address), "") => address.to_string(),
        (Some(address), own) => format!("{address} {}", harmless(own)),
    }
}

pub(crate) fn holder_text(view: &LockView, holder: &Holder) -> String {
    client(view, holder.client_addr, holder.application_name.as_deref(), holder.pid)
}

pub(crate) fn waiter_text(view: &LockView, waiter: &Waiter) -> String {
    client(view, waiter.client_addr, waiter.application_name.as_deref(), waiter.pid)
}

/// The key, behind its namespace if that is not the usual one.
pub(crate) fn key_text(view: &LockView, usual: &str) -> String {
    let key = text::key(&key::written(view));
    if view.namespace.is_empty() || view.namespace == usual {
        key
    } else {
        format!("{key} ({})", harmless(&view.namespace))
    }
}

pub(crate) fn json(view: &LockView) -> Value {
    let holders: Vec<Value> = view.holders().map(holder_json).collect();
    let waiters: Vec<Value> = view
        .waiters
        .iter()
        .map(|waiter| {
            json!({
                "backend": waiter.pid,
                "client": waiter.client_addr,
                "application_name": waiter.application_name,
                "waiting_seconds": waiter.waiting_for.as_secs_f64(),
                "shared": waiter.is_shared,
            })
        })
        .collect();
    json!({
        "namespace": view.namespace,
        "key": key::written(view),
        "permits": view.permits,
        "holders": holders,
        "waiters": waiters,
        "grace_seconds": view.grace_left.map(|left| left.as_secs_f64()),
    })
}

pub(crate) fn holder_json(holder: &Holder) -> Value {
    let (text, hex) = match holder.annotation.as_deref().map(|bytes| (str::from_utf8(bytes), bytes)) {
        None => (None, None),
        Some((Ok(text), _)) => (Some(text), None),
        Some((Err(_), bytes)) => {
            (None, Some(bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>()))
        }
    };
    let mut value = json!({
        "backend": (holder.pid != 0).then_some(holder.pid),
        "client": holder.client_addr,
        "application_name": holder.application_name,
        "token": holder.token,
        "since": holder.since.map(date),
        "annotation": text,
        "shared": holder.is_shared,
        "permit": holder.permit,
    });
    if let (Some(hex), Value::Object(fields)) = (hex, &mut value) {
        fields.insert("annotation_hex".to_owned(), hex.into());
    }
    value
}
