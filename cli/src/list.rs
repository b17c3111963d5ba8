//! `list`: the locks that are held or waited for.

use clap::Args;
use dsync::LockView;

use crate::args::{Arguments, Output};
use crate::exit::{Failure, say};
use crate::key::Wanted;
use crate::look::{self, Interval, Looker};
use crate::out::{self, Style};
use crate::signals;
use crate::text::{self, Column};

/// Shows the locks that are held or waited for.
///
/// Of all namespaces, unless one is named. A lock that has never been held is not among them.
#[derive(Args, Debug)]
pub(crate) struct List {
    /// A key, or a pattern: `*` stands for any characters and `?` for one; a backslash takes their meaning away.
    #[arg(value_name = "KEY|PATTERN", value_parser = Wanted::parse)]
    wanted: Option<Wanted>,
    /// Goes on looking, and shows it in the same place of the terminal. INT or TERM ends it.
    #[arg(long)]
    watch: bool,
    #[command(flatten)]
    interval: Interval,
}

impl List {
    pub(crate) fn run(&self, arguments: &Arguments) -> Result<u8, Failure> {
        if self.watch {
            signals::end_well()?;
        }
        let looker = Looker::new(arguments, self.wanted.clone().unwrap_or(Wanted::All))?;
        let is_filtered = self.wanted.is_some() || arguments.connection.namespace.is_some();
        let lines = |mut views: Vec<LockView>| -> Vec<String> {
            views.retain(|view| view.holder.is_some() || !view.waiters.is_empty());
            match arguments.output {
                Output::Json => views.iter().map(|view| look::json(view).to_string()).collect(),
                Output::Text => {
                    let grace = looker
                        .grace_left(&views)
                        .map(|left| text::cut(&look::grace_text(left), out::columns()));
                    let which = if is_filtered { "no lock that matches" } else { "no lock" };
                    let none = if grace.is_none() {
                        format!("{which} is held or waited for")
                    } else {
                        format!("{which} is held; who waits is not seen before that ends")
                    };
                    grace.into_iter().chain(table(&views, &looker.usual, &none)).collect()
                }
            }
        };
        if self.watch {
            return looker.keep_looking(self.interval, |views| out::replace(&lines(views)));
        }
        let views = looker.look()?;
        // There may be no lock that could say so.
        if arguments.output == Output::Json
            && let Some(left) = looker.grace_left(&views)
        {
            say(&look::grace_text(left));
        }
        out::print(lines(views))?;
        Ok(0)
    }
}

fn table(views: &[LockView], usual: &str, none: &str) -> Vec<String> {
    if views.is_empty() {
        return vec![none.to_owned()];
    }
    let columns = [
        Column { title: "KEY", is_number: false },
        Column { title: "HELD BY", is_number: false },
        Column { title: "TOKEN", is_number: true },
        Column { title: "FOR", is_number: true },
        Column { title: "WAIT", is_number: true },
    ];
    let none = || "-".to_owned();
    let rows: Vec<_> = views
        .iter()
        .map(|view| {
            let holder = view.holder.as_ref();
            let client = holder.map_or_else(none, |holder| look::holder_text(view, holder));
            let more = if view.sharers.is_empty() { "" } else { ", …" };
            // Of permits, each has a token and a time of its own.
            let holder = holder.filter(|_| view.permits.is_none() || view.sharers.is_empty());
            vec![
                look::key_text(view, usual),
                match (look::count_text(view), &view.holder) {
                    (Some(count), Some(_)) => format!("{count}: {client}{more}"),
                    (Some(count), None) => count,
                    (None, _) => client,
                },
                holder.and_then(|holder| holder.token).map_or_else(none, |token| token.to_string()),
                holder
                    .and_then(|holder| holder.since)
                    .map_or_else(none, |time| text::lasting(text::since(time))),
                view.waiters.len().to_string(),
            ]
        })
        .collect();
    let mut lines = text::table(&columns, &rows, out::columns());
    lines[0] = out::styled(Style::Strong, &lines[0]);
    lines
}
