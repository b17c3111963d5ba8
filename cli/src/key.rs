//! How a key is written on the command line, and in what is shown.

use dsync::{Key, LockView};

/// Reads a key: `#42`, `#4:2`, or a name, of which one that begins with `#` has one more in front.
pub(crate) fn parse(text: &str) -> Result<Key, String> {
    let Some(rest) = text.strip_prefix('#') else { return Ok(Key::from(text)) };
    if rest.starts_with('#') {
        return Ok(Key::from(rest));
    }
    let number = || match rest.split_once(':') {
        Some((first, second)) => Some(Key::from((first.parse::<i32>().ok()?, second.parse::<i32>().ok()?))),
        None => Some(Key::from(rest.parse::<i64>().ok()?)),
    };
    number().ok_or_else(|| {
        format!("after # comes a number (#42) or two of 32 bits (#4:2); the name {text} is written #{text}")
    })
}

/// A key as somebody has written it, which is also what a command is told.
#[derive(Clone, Debug)]
pub(crate) struct Written {
    pub(crate) text: String,
    pub(crate) key: Key,
}

impl Written {
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        parse(text).map(|key| Self { text: text.to_owned(), key })
    }
}

/// The key as `parse` reads it.
pub(crate) fn written(view: &LockView) -> String {
    // Only numbers are in no namespace.
    if view.key.starts_with('#') && !view.namespace.is_empty() {
        return format!("#{}", view.key);
    }
    view.key.clone()
}

/// Which of the locks are asked for.
#[derive(Clone, Debug)]
pub(crate) enum Wanted {
    All,
    One(Key),
    /// Those whose written key matches.
    Some(String),
}

impl Wanted {
    /// A key, or a pattern if `*` or `?` is in it.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let mut plain = String::new();
        let mut characters = text.chars().peekable();
        while let Some(character) = characters.next() {
            match character {
                '*' | '?' => return Ok(Self::Some(text.to_owned())),
                '\\' => plain.push(characters.next_if(|next| has_meaning(*next)).unwrap_or('\\')),
                other => plain.push(other),
            }
        }
        parse(&plain).map(Self::One)
    }
}

/// Whether it means something else in a pattern than itself. A backslash before anything else is a backslash.
fn has_meaning(letter: char) -> bool {
    matches!(letter, '*' | '?' | '\\')
}

/// Whether the whole text matches: `*` stands for any characters, `?` for one, and a backslash takes the meaning from the next.
pub(crate) fn matches(pattern: &str, text: &str) -> bool {
    let (pattern, text): (Vec<char>, Vec<char>) = (pattern.chars().collect(), text.chars().collect());
    let (mut at, mut place) = (0, 0);
    // Where the last star stands, and the place from which it takes one character more if the rest does not match.
    let mut star: Option<(usize, usize)> = None;
    while place < text.len() {
        let step = match pattern.get(at) {
            Some('*') => {
                star = Some((at, place));
                at += 1;
                continue;
            }
            Some('?') => Some(1),
            Some('\\') if pattern.get(at + 1).is_some_and(|next| has_meaning(*next)) => {
                (pattern[at + 1] == text[place]).then_some(2)
            }
            Some(letter) if *letter == text[place] => Some(1),
            _ => None,
        };
        match (step, &mut star) {
            (Some(step), _) => (at, place) = (at + step, place + 1),
            (None, Some((from, taken))) => {
                *taken += 1;
                (at, place) = (*from + 1, *taken);
            }
            (None, None) => return false,
        }
    }
    pattern[at..].iter().all(|letter| *letter == '*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_a_name_a_number_or_a_pair_and_never_two_of_them() {
        assert_eq!(parse("a/b"), Ok(Key::from("a/b")));
        assert_eq!(parse("42"), Ok(Key::from("42")));
        assert_eq!(parse("#42"), Ok(Key::from(42)));
        assert_eq!(parse("#-9223372036854775808"), Ok(Key::from(i64::MIN)));
        assert_eq!(parse("#4:-2"), Ok(Key::from((4, -2))));
        assert_eq!(parse("##42"), Ok(Key::from("#42")));
        for wrong in ["#", "#x", "#4:", "#4:2:1", "#9223372036854775808", "#4:4294967296", "# 4"] {
            assert!(parse(wrong).unwrap_err().contains(&format!("written #{wrong}")), "{wrong}");
        }
    }

    #[test]
    fn a_pattern_matches_the_whole_key() {
        for (pattern, text, does) in [
            ("*", "", true),
            ("a*", "abc", true),
            ("*c", "abc", true),
            ("a*b*c", "a-b-b-c", true),
            ("a*b*c", "a-b-b-d", false),
            ("a?c", "abc", true),
            ("a?c", "ac", false),
            ("ä?", "äö", true),
            ("a", "ab", false),
            (r"\**", "*x", true),
            (r"\**", "x", false),
            (r"a\\?", r"a\b", true),
            (r"a\b*", r"a\bc", true),
            (r"a\b*", "abc", false),
            (r"*\", r"a\", true),
        ] {
            assert_eq!(matches(pattern, text), does, "{pattern} {text}");
        }
        assert!(matches!(Wanted::parse(r"a\*"), Ok(Wanted::One(key)) if key == Key::from("a*")));
        assert!(matches!(Wanted::parse(r"a\b\\"), Ok(Wanted::One(key)) if key == Key::from(r"a\b\")));
        assert!(matches!(Wanted::parse("#4*"), Ok(Wanted::Some(_))));
        assert!(Wanted::parse("#x").is_err());
    }
}
