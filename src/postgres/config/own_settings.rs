//! The settings of this library itself, by their names: one table for the environment and for files. `settings.md`, which a test compares
//! with it, is the same for people.

use std::time::Duration;

use super::{CatalogMode, Config};
use crate::pg::quorum::Quorum;
use crate::pg::sql::schema::Schema;
use crate::pg::takeover::TakeoverPolicy;

/// What the names of this library's variables begin with.
pub(super) const PREFIX: &str = "DSYNC_";

/// A setting that text can set.
pub(super) struct OwnSetting {
    /// The field of a file; the environment's variable is made of it.
    pub(super) name: &'static str,
    pub(super) set: fn(&mut Config, &str) -> Outcome,
}

/// What the text should be, if it cannot be understood. It does not repeat the text.
pub(super) type Outcome = Result<(), String>;

impl OwnSetting {
    pub(super) fn variable(&self) -> String {
        PREFIX.to_owned() + &self.name.to_ascii_uppercase()
    }
}

/// The setting of that field, whose value `understand` makes of the text.
macro_rules! own {
    ($field:ident, $understand:expr) => {
        OwnSetting {
            name: stringify!($field),
            set: |config, text| {
                config.$field = $understand(text)?.into();
                Ok(())
            },
        }
    };
}

pub(super) static OWN_SETTINGS: [OwnSetting; 17] = [
    own!(namespace, any),
    own!(service, any),
    own!(build, any),
    own!(catalog, catalog_mode),
    own!(schema, schema),
    own!(takeover, takeover_policy),
    own!(quorum, quorum),
    own!(max_sessions, number),
    own!(shared_sessions, number),
    own!(lease, duration),
    own!(margin, duration),
    own!(heartbeat, duration),
    own!(heartbeat_timeout, duration),
    own!(wait_slice, duration),
    own!(connect_timeout, duration),
    own!(release_timeout, duration),
    own!(idle_timeout, duration),
];

#[expect(clippy::unnecessary_wraps, reason = "what a setting does must be able to fail")]
fn any(text: &str) -> Result<String, String> {
    Ok(text.to_owned())
}

#[expect(clippy::unnecessary_wraps, reason = "what a setting does must be able to fail")]
fn schema(text: &str) -> Result<Schema, String> {
    Ok(Schema::new(text))
}

fn catalog_mode(text: &str) -> Result<CatalogMode, String> {
    use CatalogMode::{Automatic, MustExist, None};
    one_of(&[("automatic", Automatic), ("must-exist", MustExist), ("none", None)], text)
}

fn takeover_policy(text: &str) -> Result<TakeoverPolicy, String> {
    use TakeoverPolicy::{AfterAnyRestart, AfterPromotion, Immediate};
    let policies = [
        ("immediate", Immediate),
        ("after-promotion", AfterPromotion),
        ("after-any-restart", AfterAnyRestart),
    ];
    one_of(&policies, text)
}

fn quorum(text: &str) -> Result<Quorum, String> {
    one_of(&[("server", Quorum::Server), ("named-standbys", Quorum::NamedStandbys)], text)
}

fn one_of<T: Copy>(choices: &[(&str, T)], text: &str) -> Result<T, String> {
    let chosen = choices.iter().find(|(word, _)| *word == text).map(|(_, value)| *value);
    chosen.ok_or_else(|| {
        let words: Vec<_> = choices.iter().map(|(word, _)| *word).collect();
        format!("it should be one of {}", words.join(", "))
    })
}

fn number(text: &str) -> Result<u32, String> {
    text.parse().map_err(|_| "it should be a number, like 20".to_owned())
}

fn duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text).map_err(|_| "it should be a duration, like 15s or 500ms".to_owned())
}

/// The setting whose name is most like this one, if one is: for typing errors.
pub(super) fn nearest(name: &str) -> Option<&'static OwnSetting> {
    let name = name.to_ascii_lowercase().replace('-', "_");
    let distances = OWN_SETTINGS.iter().map(|setting| (distance(&name, setting.name), setting));
    let (least, setting) = distances.min_by_key(|(distance, _)| *distance)?;
    // Two letters of five, which are those of a pair that is the wrong way round.
    (least * 5 <= setting.name.len() * 2).then_some(setting)
}

/// How many letters must be put in, left out or changed to make one of the other (Levenshtein's distance).
fn distance(one: &str, other: &str) -> usize {
    let mut row: Vec<usize> = (0..=other.len()).collect();
    for (number, letter) in one.bytes().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], number + 1);
        for (column, of_other) in other.bytes().enumerate() {
            let changed = diagonal + usize::from(letter != of_other);
            diagonal = row[column + 1];
            row[column + 1] = changed.min(diagonal + 1).min(row[column] + 1);
        }
    }
    row[other.len()]
}
