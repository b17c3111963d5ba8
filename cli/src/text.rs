//! Text for a terminal: what comes from other processes made harmless, and fitted into columns.

use std::time::{Duration, SystemTime};

use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

/// The text without what moves a cursor, changes a colour, breaks a line, or turns the direction of writing: that is escaped.
pub(crate) fn harmless(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for letter in text.chars() {
        if is_unseen(letter) {
            shown.extend(letter.escape_default());
        } else {
            shown.push(letter);
        }
    }
    shown
}

fn is_unseen(letter: char) -> bool {
    letter.is_control()
        || matches!(letter, '\u{ad}' | '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

/// A key, as a shell reads it again: where something in it is not shown as it is, in the quotes of bash, `$'…'`, so that no two look alike.
pub(crate) fn key(text: &str) -> String {
    if harmless(text) == text && !text.starts_with("$'") {
        return text.to_owned();
    }
    let mut shown = "$'".to_owned();
    for letter in text.chars() {
        match letter {
            '\\' | '\'' => shown.extend(['\\', letter]),
            '\n' => shown.push_str("\\n"),
            '\r' => shown.push_str("\\r"),
            '\t' => shown.push_str("\\t"),
            letter if !is_unseen(letter) => shown.push(letter),
            letter if letter.is_ascii() => shown += &format!("\\x{:02x}", u32::from(letter)),
            letter => shown += &format!("\\U{:08x}", u32::from(letter)),
        }
    }
    shown + "'"
}

/// An annotation, which may be anything.
pub(crate) fn annotation(bytes: &[u8]) -> String {
    match str::from_utf8(bytes) {
        Ok(text) => harmless(text),
        Err(_) => bytes.escape_ascii().to_string(),
    }
}

/// A time with a unit, or a number of seconds as `flock` takes it. Not so long that a sum of some of them could not be told.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    const LONGEST: Duration = Duration::from_secs(1_000_000_000);
    let time = match text.parse::<f64>() {
        Ok(seconds) => Duration::try_from_secs_f64(seconds).ok(),
        Err(_) => humantime::parse_duration(text).ok(),
    };
    time.filter(|time| *time <= LONGEST).ok_or_else(|| {
        "it is no time from 0 to 30 years; write seconds, or a unit behind a number: 10, 10s, 5m, 24h"
            .to_owned()
    })
}

/// How many columns the text takes.
pub(crate) fn width(text: &str) -> usize {
    text.width()
}

/// The text in so many columns at the most; the last one tells that something is missing.
pub(crate) fn cut(text: &str, columns: usize) -> String {
    if width(text) <= columns {
        return text.to_owned();
    }
    let mut shown = String::new();
    let mut left = columns.saturating_sub(1);
    for letter in text.chars() {
        let wide = letter.width().unwrap_or(0);
        if wide > left {
            break;
        }
        left -= wide;
        shown.push(letter);
    }
    shown + "…"
}

/// The text in lines of so many columns at the most: broken behind a space, or anywhere in what is one long word. Nothing is left out.
pub(crate) fn wrap(text: &str, columns: usize) -> Vec<String> {
    let (mut lines, mut line, mut used) = (Vec::new(), String::new(), 0);
    for letter in text.chars() {
        let wide = letter.width().unwrap_or(0);
        if used + wide > columns && !line.is_empty() {
            let next = line.rfind(' ').map_or(String::new(), |space| line.split_off(space + 1));
            used = next.width();
            lines.push(std::mem::replace(&mut line, next));
        }
        used += wide;
        line.push(letter);
    }
    lines.push(line);
    lines
}

/// A column of a table.
pub(crate) struct Column {
    pub(crate) title: &'static str,
    pub(crate) is_number: bool,
}

/// The lines of a table, the titles first, which take so many columns at the most: the widest ones give way. Numbers stay whole.
pub(crate) fn table(columns: &[Column], rows: &[Vec<String>], most: usize) -> Vec<String> {
    const GAP: usize = 2;
    const NARROWEST: usize = 4;
    let mut widths: Vec<usize> = columns.iter().map(|column| width(column.title)).collect();
    for row in rows {
        for (wide, cell) in widths.iter_mut().zip(row) {
            *wide = width(cell).max(*wide);
        }
    }
    let gaps = GAP * columns.len().saturating_sub(1);
    while widths.iter().sum::<usize>() + gaps > most {
        let widest = widths
            .iter_mut()
            .zip(columns)
            .filter(|(_, column)| !column.is_number)
            .map(|(wide, _)| wide)
            .max();
        match widest {
            Some(wide) if *wide > NARROWEST => *wide -= 1,
            _ => break,
        }
    }
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let mut line = String::new();
        for ((cell, &wide), column) in cells.zip(&widths).zip(columns) {
            let cell = if column.is_number { cell.to_owned() } else { cut(cell, wide) };
            let space = " ".repeat(wide.saturating_sub(width(&cell)));
            line += &if column.is_number { space + &cell } else { cell + &space };
            line += &" ".repeat(GAP);
        }
        line.trim_end().to_owned()
    };
    let titles = line(&mut columns.iter().map(|column| column.title));
    [titles].into_iter().chain(rows.iter().map(|row| line(&mut row.iter().map(String::as_str)))).collect()
}

/// A moment, to the second. The server may tell of one that no calendar of four-digit years since 1970 has: whoever takes locks can write it.
pub(crate) fn date(time: SystemTime) -> String {
    const YEAR_9999: Duration = Duration::from_secs(253_370_764_800);
    match time.duration_since(SystemTime::UNIX_EPOCH) {
        Ok(since) if since < YEAR_9999 => humantime::format_rfc3339_seconds(time).to_string(),
        Ok(_) => "after 9998".to_owned(),
        Err(_) => "before 1970".to_owned(),
    }
}

/// How long it is since then; nothing if the clocks do not agree.
pub(crate) fn since(time: SystemTime) -> Duration {
    time.elapsed().unwrap_or_default()
}

/// A time in its two largest units.
pub(crate) fn lasting(time: Duration) -> String {
    let seconds = time.as_secs();
    let (minutes, hours, days) = (seconds / 60, seconds / 3_600, seconds / 86_400);
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3_600 => format!("{minutes}m {}s", seconds % 60),
        3_600..86_400 => format!("{hours}h {}m", minutes % 60),
        _ => format!("{days}d {}h", hours % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_of_others_reaches_the_terminal_unescaped() {
        assert_eq!(
            harmless("a\u{1b}[31m\r\nb\t\u{9b}\u{202e}ß鍵"),
            "a\\u{1b}[31m\\r\\nb\\t\\u{9b}\\u{202e}ß鍵"
        );
        assert_eq!(annotation(b"\xff\x1b"), "\\xff\\x1b");
    }

    #[test]
    fn no_two_keys_look_alike_and_bash_reads_them_again() {
        let names = ["x\ny", r"x\ny", "$'x\\ny'", "it's", "it's\t", "\u{1b}a\u{9b}\u{202e}ß鍵", "tab\there"];
        let shown = names.map(key);
        assert_eq!(&shown[..4], [r"$'x\ny'", r"x\ny", r"$'$\'x\\ny\''", "it's"]);
        for (name, shown) in names.iter().zip(&shown) {
            assert_eq!(&harmless(shown), shown);
            if !shown.starts_with("$'") {
                assert_eq!(shown, name);
                continue;
            }
            let said = std::process::Command::new("bash")
                .env("LC_ALL", "C.UTF-8")
                .args(["-c", &format!("printf %s {shown}")])
                .output();
            // Where there is none, it is enough that they differ.
            if let Ok(said) = said {
                assert_eq!(String::from_utf8(said.stdout).unwrap(), *name, "{shown}");
            }
        }
        let different: std::collections::HashSet<_> = shown.iter().collect();
        assert_eq!(different.len(), names.len());
    }

    #[test]
    fn wide_characters_count_twice() {
        assert_eq!((width("鍵"), width("ab")), (2, 2));
        assert_eq!(cut("abcdef", 4), "abc…");
        assert_eq!(cut("鍵鍵鍵", 5), "鍵鍵…");
        assert_eq!(cut("鍵鍵鍵", 4), "鍵…");
        assert_eq!(wrap("鍵鍵鍵", 5), ["鍵鍵", "鍵"]);
        assert_eq!(wrap("", 5), [""]);
        assert_eq!(wrap("for 45s at most", 11), ["for 45s at ", "most"]);
        assert_eq!(wrap("a longword", 5), ["a ", "longw", "ord"]);
    }

    #[test]
    fn a_table_gives_way_where_it_is_widest_and_never_in_its_numbers() {
        let columns = [
            Column { title: "KEY", is_number: false },
            Column { title: "BY", is_number: false },
            Column { title: "N", is_number: true },
        ];
        let rows = [
            vec!["k".repeat(30), "鍵".repeat(10), "123456".into()],
            vec!["x".into(), "y".into(), "1".into()],
        ];
        let lines = table(&columns, &rows, 40);
        assert!(lines.iter().all(|line| width(line) <= 40), "{lines:#?}");
        assert!(lines[1].ends_with("123456") && lines[2].ends_with("     1"), "{lines:#?}");
        assert_eq!(table(&columns, &rows[1..], 40), ["KEY  BY  N", "x    y   1"]);
    }

    #[test]
    fn a_time_has_its_two_largest_units() {
        let texts =
            [0, 59, 60, 3_599, 3_600, 86_399, 90_000].map(|seconds| lasting(Duration::from_secs(seconds)));
        assert_eq!(texts, ["0s", "59s", "1m 0s", "59m 59s", "1h 0m", "23h 59m", "1d 1h"]);
    }
}
