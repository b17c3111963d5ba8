//! Standard output: how wide it is, whether it has colours, and what becomes of it when nobody reads it any more.

use std::io::{IsTerminal as _, Write as _};
use std::os::fd::AsFd;

use rustix::termios::tcgetwinsize;

use crate::exit::Failure;

/// The width where there is no terminal.
const USUAL_WIDTH: u16 = 80;

/// How many columns a line may have.
pub(crate) fn columns() -> usize {
    size().0.into()
}

/// Columns and rows of the terminal.
fn size() -> (u16, u16) {
    size_of(rustix::stdio::stdout())
}

/// The same of another stream. Some terminals do not know how wide they are.
pub(crate) fn size_of(stream: impl AsFd) -> (u16, u16) {
    match tcgetwinsize(stream) {
        Ok(size) if size.ws_col > 0 => (size.ws_col, size.ws_row),
        _ => (USUAL_WIDTH, u16::MAX),
    }
}

pub(crate) fn is_terminal() -> bool {
    std::io::stdout().is_terminal()
}

/// Whether to write in colours: on a terminal, and without `NO_COLOR` (<https://no-color.org>).
fn has_colours() -> bool {
    std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()) && is_terminal()
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Style {
    Strong,
    Good,
    Bad,
}

/// The text in that style, if there are colours.
pub(crate) fn styled(style: Style, text: &str) -> String {
    let code = match style {
        Style::Strong => 1,
        Style::Good => 32,
        Style::Bad => 31,
    };
    if has_colours() { format!("\u{1b}[{code}m{text}\u{1b}[0m") } else { text.to_owned() }
}

/// Writes lines at once.
pub(crate) fn print<L: AsRef<str>>(lines: impl IntoIterator<Item = L>) -> Result<(), Failure> {
    let mut text = String::new();
    for line in lines {
        text += line.as_ref();
        text.push('\n');
    }
    write(&text)
}

pub(crate) fn write(text: &str) -> Result<(), Failure> {
    let mut output = std::io::stdout().lock();
    output.write_all(text.as_bytes())?;
    Ok(output.flush()?)
}

/// Writes lines in the place of what the terminal shows. Elsewhere, below it.
pub(crate) fn replace(lines: &[String]) -> Result<(), Failure> {
    if !is_terminal() {
        return print(lines);
    }
    let rows = usize::from(size().1).saturating_sub(1);
    // To the upper left, each line to its end, and what is below.
    let mut text = "\u{1b}[H".to_owned();
    for line in lines.iter().take(rows) {
        text += line;
        text += "\u{1b}[K\n";
    }
    write(&(text + "\u{1b}[J"))
}
