//! `doctor`: whether locks work on this server, and what to change.

use clap::Args;
use dsync::{CheckLine, Verdict};
use serde_json::json;

use crate::args::{Arguments, Output};
use crate::exit::{Failure, UNAVAILABLE, USAGE, in_our_words};
use crate::out::{self, Style};
use crate::{connect, text};

/// Tells whether locks work on this server, and what to change.
///
/// Looks at the server and changes nothing: a line for each thing, and below it what to change. The exit code is 0 if nothing is wrong,
/// whatever warnings there are; 64 if a setting is, and 69 if something else is.
#[derive(Args, Debug)]
pub(crate) struct Doctor {}

impl Doctor {
    #[expect(clippy::unused_self, reason = "it is called as the other verbs are")]
    pub(crate) fn run(&self, arguments: &Arguments) -> Result<u8, Failure> {
        let report = connect::config(&arguments.connection)?.check();
        out::print(report.lines.iter().cloned().map(|mut line| {
            line.text = in_our_words(&line.text);
            line.advice = line.advice.as_deref().map(in_our_words);
            match arguments.output {
                Output::Json => json_line(&line),
                Output::Text => text_line(&line),
            }
        }))?;
        let is_setting = report.lines.iter().any(|line| line.topic == "settings");
        Ok(match report.worst() {
            Verdict::Wrong if is_setting => USAGE,
            Verdict::Wrong => UNAVAILABLE,
            _ => 0,
        })
    }
}

/// The verdict in a colour, and the rest as the library arranges it.
fn text_line(line: &CheckLine) -> String {
    let text = line.to_string();
    let text: Vec<String> = text.lines().map(text::harmless).collect();
    let text = text.join("\n");
    let verdict = line.verdict.to_string();
    let style = match line.verdict {
        Verdict::Good => Style::Good,
        Verdict::Wrong => Style::Bad,
        _ => Style::Strong,
    };
    match text.strip_prefix(&verdict) {
        Some(rest) => out::styled(style, &verdict) + rest,
        None => text,
    }
}

fn json_line(line: &CheckLine) -> String {
    let verdict = line.verdict.to_string();
    json!({ "topic": line.topic, "verdict": verdict, "text": line.text, "advice": line.advice }).to_string()
}
