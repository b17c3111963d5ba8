//! `show`: who has a lock, and who waits for it.

use clap::Args;
use dsync::{Holder, Key, LockView};

use crate::args::{Arguments, Output};
use crate::exit::Failure;
use crate::key::{self, Wanted};
use crate::look::{self, Interval, Looker};
use crate::out::{self, Style};
use crate::signals;
use crate::text;

/// Shows who has a lock, and who waits for it.
#[derive(Args, Debug)]
pub(crate) struct Show {
    /// The lock.
    #[arg(value_name = "KEY", value_parser = key::parse)]
    key: Key,
    /// Goes on looking, and shows it in the same place of the terminal. INT or TERM ends it.
    #[arg(long)]
    watch: bool,
    #[command(flatten)]
    interval: Interval,
}

impl Show {
    pub(crate) fn run(&self, arguments: &Arguments) -> Result<u8, Failure> {
        if self.watch {
            signals::end_well()?;
        }
        let looker = Looker::new(arguments, Wanted::One(self.key.clone()))?;
        let lines = |views: Vec<LockView>| {
            let each = views.iter().flat_map(|view| match arguments.output {
                Output::Json => vec![look::json(view).to_string()],
                Output::Text => describe(view, &looker.usual),
            });
            each.collect::<Vec<_>>()
        };
        if self.watch {
            return looker.keep_looking(self.interval, |views| out::replace(&lines(views)));
        }
        out::print(lines(looker.look()?))?;
        Ok(0)
    }
}

/// All that is known of a lock.
pub(crate) fn describe(view: &LockView, usual: &str) -> Vec<String> {
    let columns = out::columns();
    let key = text::wrap(&look::key_text(view, usual), columns);
    let mut lines: Vec<String> = key.iter().map(|line| out::styled(Style::Strong, line)).collect();
    if let Some(left) = view.grace_left {
        lines.extend(row("grace", &look::grace_text(left), columns));
    }
    match (view.permits, view.sharers.len()) {
        (Some(permits), _) => {
            lines.extend(row("permits", &format!("{} of {permits} held", view.holders().count()), columns));
        }
        (None, 0) => {}
        (None, more) => lines.extend(row("shared by", &(more + 1).to_string(), columns)),
    }
    if view.holder.is_none() {
        lines.extend(row("held by", "nobody", columns));
    }
    for holder in view.holders() {
        lines.extend(describe_holder(view, holder, columns));
    }
    let waiting = match view.grace_left {
        Some(_) if view.waiters.is_empty() => "not seen before that ends".to_owned(),
        _ => view.waiters.len().to_string(),
    };
    lines.extend(row("waiting", &waiting, columns));
    for (place, waiter) in (1..).zip(&view.waiters) {
        let shared = if waiter.is_shared == Some(true) { ", to share it" } else { "" };
        let client = look::waiter_text(view, waiter);
        // The next one to get a permit is in no queue.
        let waiting = match view.permits.filter(|_| waiter.waiting_for.is_zero()) {
            Some(_) => "the next one".to_owned(),
            None => format!("for {}", text::lasting(waiter.waiting_for)),
        };
        lines.extend(row(
            &format!("{place:>7}."),
            &format!("{client}, backend {}, {waiting}{shared}", waiter.pid),
            columns,
        ));
    }
    lines
}

fn describe_holder(view: &LockView, holder: &Holder, columns: usize) -> Vec<String> {
    let client = look::holder_text(view, holder);
    let by = if holder.pid == 0 { client } else { format!("{client}, backend {}", holder.pid) };
    let mut lines = row("held by", &by, columns);
    if let Some(permit) = holder.permit {
        lines.extend(row("permit", &permit.to_string(), columns));
    }
    if let Some(token) = holder.token {
        lines.extend(row("token", &token.to_string(), columns));
    }
    if let Some(since) = holder.since {
        let lasting = text::lasting(text::since(since));
        lines.extend(row("since", &format!("{} ({lasting})", text::date(since)), columns));
    }
    if let Some(annotation) = holder.annotation.as_deref().filter(|annotation| !annotation.is_empty()) {
        lines.extend(row("annotation", &text::annotation(annotation), columns));
    }
    lines
}

/// A name and its value, which goes on below itself.
fn row(name: &str, value: &str, columns: usize) -> Vec<String> {
    const INDENT: usize = 14;
    let lines = text::wrap(value, columns.saturating_sub(INDENT).max(1));
    let name = |number: usize| if number == 0 { format!("  {name:<12}") } else { " ".repeat(INDENT) };
    lines.iter().enumerate().map(|(number, line)| name(number) + line).collect()
}
