//! Settings from a section of a file, by serde.
//!
//! An error is made when the whole section has been read, and never at a field: formats show the line at which an error was made, and a
//! line may have a password.

use std::fmt;

use serde_core::de::{Deserialize, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::own_settings::{OWN_SETTINGS, nearest};
use super::settings::{Given, Origin};
use super::{Config, invalid};
use crate::error::Result;

/// The fields in front of those of [`OWN_SETTINGS`].
const URL: usize = 0;
const PASSWORD: usize = 1;

const FIELDS: [&str; 2 + OWN_SETTINGS.len()] = {
    let mut fields = ["url"; 2 + OWN_SETTINGS.len()];
    fields[PASSWORD] = "password";
    let mut number = 0;
    while number < OWN_SETTINGS.len() {
        fields[2 + number] = OWN_SETTINGS[number].name;
        number += 1;
    }
    fields
};

impl<'de> Deserialize<'de> for Config {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        // As a struct, JSON's would refuse what is none by itself, and repeat it.
        let section = deserializer.deserialize_any(SectionVisitor)?;
        section.config().map_err(D::Error::custom)
    }
}

/// What a section says.
struct Section {
    /// In the order of `FIELDS`.
    values: [Option<Value>; FIELDS.len()],
    problem: Option<String>,
}

/// What a field says.
enum Value {
    /// A number is taken as its digits.
    Text(String),
    /// Nothing, like `null`: as if the field were not there.
    Absent,
    Other,
}

impl Section {
    fn config(mut self) -> Result<Config> {
        if let Some(problem) = self.problem.take() {
            return Err(invalid(problem));
        }
        let url = self.text(URL)?.ok_or_else(|| {
            invalid("url is missing: say where the server is, like postgres://app@db.internal/app".to_owned())
        })?;
        let mut given = Given::text(&url, Origin::Url)?;
        if let Some(password) = self.text(PASSWORD)?
            && !given.set_password(password)
        {
            return Err(invalid("password is given in url as well; leave one of the two out".to_owned()));
        }
        let mut config = Config::from_text(given)?;
        for (number, setting) in OWN_SETTINGS.iter().enumerate() {
            if let Some(text) = self.text(2 + number)? {
                (setting.set)(&mut config, &text)
                    .map_err(|problem| invalid(format!("{} cannot be used: {problem}", setting.name)))?;
            }
        }
        Ok(config)
    }

    /// What the field says, and nothing if that is empty, as with a variable.
    fn text(&mut self, field: usize) -> Result<Option<String>> {
        match self.values[field].take() {
            Some(Value::Text(text)) => Ok(Some(text).filter(|text| !text.is_empty())),
            Some(Value::Other) => {
                Err(invalid(format!("{} cannot be used: it should be text", FIELDS[field])))
            }
            Some(Value::Absent) | None => Ok(None),
        }
    }
}

/// The name is shown only if it looks like one.
fn unknown(name: &str) -> String {
    let is_name =
        name.len() <= 40 && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-".contains(&byte));
    let shown = if is_name { format!("the field {name}") } else { "a field".to_owned() };
    let meant = nearest(name).map(|own| format!(" (did you mean {}?)", own.name)).unwrap_or_default();
    format!("{shown} is not known{meant}; the fields are {}", FIELDS.join(", "))
}

struct SectionVisitor;

impl<'de> Visitor<'de> for SectionVisitor {
    type Value = Section;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a section with the settings of dsync")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Section, A::Error> {
        let mut section = Section { values: [const { None }; FIELDS.len()], problem: None };
        while let Some(name) = map.next_key::<Value>()? {
            let Value::Text(name) = name else {
                map.next_value::<IgnoredAny>()?;
                section.problem.get_or_insert_with(|| unknown(""));
                continue;
            };
            let value = map.next_value::<Value>()?;
            match FIELDS.iter().position(|field| *field == name) {
                None => _ = section.problem.get_or_insert_with(|| unknown(&name)),
                Some(field) if section.values[field].replace(value).is_some() => {
                    section.problem.get_or_insert_with(|| format!("{name} is given twice; leave one out"));
                }
                Some(_) => {}
            }
        }
        Ok(section)
    }

    /// Serde's own text would repeat it, and a connection string in the place of the section is an easy mistake.
    fn visit_str<E: serde_core::de::Error>(self, _: &str) -> std::result::Result<Section, E> {
        Err(E::custom("the settings of dsync should be a section with fields, of which url is one"))
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_any(ValueVisitor)
    }
}

/// Takes whatever there is, since an error here would be shown with the line.
struct ValueVisitor;

/// What a value of a type that is no text comes to.
macro_rules! visit {
    ($($visit:ident($type:ty) => $value:expr;)*) => {
        $(fn $visit<E>(self, value: $type) -> std::result::Result<Value, E> {
            Ok($value(value))
        })*
    };
}

impl<'de> Visitor<'de> for ValueVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("text")
    }

    visit! {
        visit_str(&str) => |text: &str| Value::Text(text.to_owned());
        visit_u64(u64) => |number: u64| Value::Text(number.to_string());
        visit_i64(i64) => |number: i64| Value::Text(number.to_string());
        visit_bool(bool) => |_| Value::Other;
        visit_i128(i128) => |_| Value::Other;
        visit_u128(u128) => |_| Value::Other;
        visit_f64(f64) => |_| Value::Other;
        visit_bytes(&[u8]) => |_| Value::Other;
    }

    fn visit_unit<E>(self) -> std::result::Result<Value, E> {
        Ok(Value::Absent)
    }

    fn visit_none<E>(self) -> std::result::Result<Value, E> {
        Ok(Value::Absent)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> std::result::Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }

    fn visit_newtype_struct<D: Deserializer<'de>>(
        self,
        deserializer: D,
    ) -> std::result::Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> std::result::Result<Value, A::Error> {
        while seq.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Value::Other)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Value, A::Error> {
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(Value::Other)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde::Deserialize;

    use super::*;
    use crate::pg::config::CatalogMode;

    /// What an application has in its file.
    #[derive(Debug, Deserialize)]
    struct Settings {
        locks: Config,
    }

    fn from_toml(section: &str) -> std::result::Result<Config, toml::de::Error> {
        toml::from_str::<Settings>(&format!("[locks]\n{section}\n")).map(|settings| settings.locks)
    }

    #[test]
    fn a_section_sets_what_the_environment_sets() {
        let config = from_toml(
            "url = 'postgres://ada@db:7/engine?sslmode=disable'\npassword = 'lace'\nlease = '1m 30s'\n\
             max_sessions = 50\ncatalog = 'must-exist'\nservice = 'billing'\nmargin = ''",
        )
        .unwrap();
        assert_eq!((config.postgres.get_user(), config.postgres.get_ports()), (Some("ada"), &[7][..]));
        assert_eq!(config.postgres.get_password(), Some(&b"lace"[..]));
        assert_eq!((config.lease, config.max_sessions), (Duration::from_secs(90), 50));
        assert_eq!((config.catalog, config.service.as_deref()), (CatalogMode::MustExist, Some("billing")));
        assert_eq!(config.margin, None, "what is empty is not set");
        assert!(config.validate().is_ok());
        let json = r#"{"url": "host=db user=ada", "max_sessions": "7", "build": null, "namespace": "x"}"#;
        let config: Config = serde_json::from_str(json).unwrap();
        assert_eq!((config.max_sessions, config.build.as_deref(), &*config.namespace), (7, None, "x"));
    }

    /// Each is one that the environment has too, and says there and here the same.
    #[test]
    fn each_setting_of_the_environment_is_a_field() {
        for setting in &OWN_SETTINGS {
            let text = match setting.name {
                "catalog" => "none",
                "takeover" => "immediate",
                "quorum" => "named-standbys",
                "max_sessions" | "shared_sessions" => "7",
                name if name.contains("timeout")
                    || matches!(name, "lease" | "margin" | "heartbeat" | "wait_slice") =>
                {
                    "17s"
                }
                _ => "word",
            };
            let of_file =
                from_toml(&format!("url = 'host=db user=ada'\n{} = '{text}'", setting.name)).unwrap();
            let mut set = Config::from_url("host=db user=ada").unwrap();
            (setting.set)(&mut set, text).unwrap();
            assert_eq!(format!("{of_file:?}"), format!("{set:?}"), "{}", setting.name);
            let unset = Config::from_url("host=db user=ada").unwrap();
            assert_ne!(format!("{of_file:?}"), format!("{unset:?}"), "{}", setting.name);
        }
    }

    #[test]
    fn what_is_wrong_is_told_by_its_field_and_no_secret_with_it() {
        let url = "url = 'postgres://ada:s3cret@db/engine'";
        for (section, told) in [
            (
                format!("{url}\nleese = '15s'"),
                "the field leese is not known (did you mean lease?); the fields are url, password,",
            ),
            (format!("{url}\npasswort = 's3cret'"), "the field passwort is not known"),
            (format!("{url}\n's3cret of' = 1"), "a field is not known"),
            (
                format!("{url}\nlease = 's3cret'"),
                "lease cannot be used: it should be a duration, like 15s or 500ms",
            ),
            (format!("{url}\nlease = 15"), "lease cannot be used: it should be a duration"),
            (format!("{url}\nmax_sessions = -3"), "max_sessions cannot be used: it should be a number"),
            (format!("{url}\nmax_sessions = 1.5"), "max_sessions cannot be used: it should be text"),
            (
                format!("{url}\ncatalog = 's3cret'"),
                "catalog cannot be used: it should be one of automatic, must-exist, none",
            ),
            (format!("{url}\npassword = ['s3cret']"), "password cannot be used: it should be text"),
            (format!("{url}\npassword = 's3cret'"), "password is given in url as well"),
            (
                "url = 'postgres://ada:s3cret@d b/engine'".to_owned(),
                "url cannot be understood: the host has characters",
            ),
            ("url = 'postgres://ada@db/engine?sslmode=s3cret'".to_owned(), "the parameter sslmode in url"),
            ("password = 's3cret'".to_owned(), "url is missing"),
        ] {
            let error = from_toml(&section).expect_err(&section);
            assert!(error.message().contains(told), "{section}: {error}");
            assert!(!error.to_string().contains("s3cret"), "{section}: {error}");
        }
        let config = |json: &str| serde_json::from_str::<Config>(json).expect_err(json).to_string();
        let settings = |json: &str| serde_json::from_str::<Settings>(json).expect_err(json).to_string();
        for (error, told) in [
            (config(r#""postgres://ada:s3cret@db/engine""#), "a section with fields"),
            (settings(r#"{"locks": "postgres://ada:s3cret@db/engine"}"#), "a section with fields"),
            (
                config(r#"{"url": "host=db", "password": "s3cret", "password": "s3cret"}"#),
                "password is given twice",
            ),
        ] {
            assert!(error.contains(told) && !error.contains("s3cret"), "{error}");
        }
    }
}
