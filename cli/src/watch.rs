//! `watch`: a line for each change of holder.

use std::collections::{BTreeMap, BTreeSet};
use std::io::IsTerminal as _;
use std::time::SystemTime;

use clap::Args;
use dsync::LockView;
use serde_json::{Value, json};

use crate::args::{Arguments, Output};
use crate::exit::{Failure, say};
use crate::key::{self, Wanted};
use crate::look::{self, Interval, Looker};
use crate::{out, signals, text};

/// Writes a line for each change of holder, until INT or TERM ends it.
///
/// It begins with who has the locks now. What begins and ends between two looks is not seen. While the server is away it keeps asking,
/// and says so on standard error. INT and TERM end it with the exit code 0.
#[derive(Args, Debug)]
pub(crate) struct Watch {
    /// A key, or a pattern: `*` stands for any characters and `?` for one; a backslash takes their meaning away. [default: all locks]
    #[arg(value_name = "KEY|PATTERN", value_parser = Wanted::parse)]
    wanted: Option<Wanted>,
    #[command(flatten)]
    interval: Interval,
}

/// Namespace and key of a lock; of a semaphore, which is another one under the same key, also how many permits it has.
type Id = (String, String, Option<u32>);

/// Who has a lock: backend and token of each.
type Holders = Vec<(i32, Option<i64>)>;

impl Watch {
    pub(crate) fn run(&self, arguments: &Arguments) -> Result<u8, Failure> {
        signals::end_well()?;
        let wanted = self.wanted.clone().unwrap_or(Wanted::All);
        // That a lock is free is worth the first line where there is no other.
        let is_one = matches!(wanted, Wanted::One(_));
        let looker = Looker::new(arguments, wanted)?;
        let mut known: BTreeMap<Id, Holders> = BTreeMap::new();
        // Whose holder has the lock since this very instant, and its token not yet: the next look tells it.
        let mut new: BTreeSet<Id> = BTreeSet::new();
        let (mut is_first, mut in_grace) = (true, false);
        looker.keep_looking(self.interval, |views| {
            let mut lines = Vec::new();
            let grace = looker.grace_left(&views);
            if let Some(left) = grace.filter(|_| !in_grace) {
                say(&look::grace_text(left));
            }
            in_grace = grace.is_some();
            let mut gone = known.clone();
            let known_as_new = std::mem::take(&mut new);
            for view in &views {
                let id = (view.namespace.clone(), view.key.clone(), view.permits);
                let holders: Holders = view.holders().map(|holder| (holder.pid, holder.token)).collect();
                let before = gone.remove(&id).unwrap_or_default();
                let has_changed = !is_same(&before, &holders);
                let lacks_token = holders.iter().any(|(_, token)| token.is_none());
                if has_changed && lacks_token && !known_as_new.contains(&id) {
                    new.insert(id);
                    continue;
                }
                if has_changed || is_first && is_one {
                    lines.push(line(view, arguments.output, &looker.usual));
                }
                known.insert(id, holders);
            }
            // Neither held nor waited for.
            for (id, before) in gone {
                known.remove(&id);
                if !before.is_empty() {
                    lines.push(free(&id, arguments.output, &looker.usual));
                }
            }
            known.retain(|_, holders| !holders.is_empty());
            is_first &= !new.is_empty();
            out::print(lines)
        })
    }
}

/// Whether nobody has come or gone. The token of one that has just come may not have been known yet.
fn is_same(before: &Holders, now: &Holders) -> bool {
    before.len() == now.len()
        && now.iter().all(|(pid, token)| {
            before
                .iter()
                .any(|(other, known)| pid == other && (token == known || known.is_none() || token.is_none()))
        })
}

fn line(view: &LockView, output: Output, usual: &str) -> String {
    if output == Output::Json {
        return json_line(
            &view.namespace,
            &key::written(view),
            view.permits,
            view.holders().map(look::holder_json).collect(),
            view.waiters.len(),
        );
    }
    let what = match &view.holder {
        None => {
            let count = look::count_text(view).unwrap_or_else(|| "free".to_owned());
            if view.waiters.is_empty() { count } else { format!("{count}, {} wait", view.waiters.len()) }
        }
        Some(holder) => {
            let token = holder.token.map(|token| format!(", token {token}")).unwrap_or_default();
            match look::count_text(view) {
                None => format!("held by {}{token}", look::holder_text(view, holder)),
                Some(count) if view.permits.is_some() => count,
                Some(count) => count + &token,
            }
        }
    };
    text_line(&look::key_text(view, usual), &what)
}

fn free((namespace, key, permits): &Id, output: Output, usual: &str) -> String {
    let hash = if key.starts_with('#') && !namespace.is_empty() { "#" } else { "" };
    let written = format!("{hash}{key}");
    if output == Output::Json {
        return json_line(namespace, &written, *permits, Vec::new(), 0);
    }
    let of = if namespace.is_empty() || namespace == usual {
        String::new()
    } else {
        format!(" ({})", text::harmless(namespace))
    };
    let what = permits.map_or_else(|| "free".to_owned(), |permits| format!("0 of {permits} permits held"));
    text_line(&(text::key(&written) + &of), &what)
}

fn text_line(key: &str, what: &str) -> String {
    const SHORTEST_KEY: usize = 16;
    let now = text::date(SystemTime::now());
    if !std::io::stdout().is_terminal() {
        return format!("{now} {key}: {what}");
    }
    // A blank behind the time, and a colon and a blank behind the key.
    let left = out::columns().saturating_sub(text::width(&now) + 3);
    let key = text::cut(key, left.saturating_sub(text::width(what)).max(SHORTEST_KEY));
    let what = text::cut(what, left.saturating_sub(text::width(&key)));
    format!("{now} {key}: {what}")
}

fn json_line(
    namespace: &str,
    key: &str,
    permits: Option<u32>,
    holders: Vec<Value>,
    waiters: usize,
) -> String {
    json!({
        "at": text::date(SystemTime::now()),
        "namespace": namespace,
        "key": key,
        "permits": permits,
        "holders": holders,
        "waiters": waiters,
    })
    .to_string()
}
