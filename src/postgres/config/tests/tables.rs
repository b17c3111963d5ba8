//! The tables of settings in the documentation are complete and true.

use std::time::Duration;

use crate::error::Error;
use crate::pg::config::own_settings::OWN_SETTINGS;
use crate::pg::config::{Config, invalid, settings};
use crate::pg::takeover::TakeoverPolicy;

/// The cells of the tables in a text, row by row, without the heads.
fn rows(text: &str) -> impl Iterator<Item = Vec<&str>> {
    let lines = text.lines().map(|line| line.trim_start().trim_start_matches("///").trim());
    let rows = lines.filter_map(|line| line.strip_prefix("| ")?.strip_suffix(" |"));
    rows.filter(|row| row.contains('`')).map(|row| row.split(" | ").collect())
}

/// What stands between backticks.
fn quoted(text: &str) -> Vec<&str> {
    text.split('`').skip(1).step_by(2).collect()
}

#[test]
fn the_table_of_settings_is_complete_and_true() {
    let rows: Vec<_> = rows(include_str!("../settings.md")).collect();
    assert_eq!(rows.len(), OWN_SETTINGS.len());
    for (row, setting) in rows.iter().zip(&OWN_SETTINGS) {
        let [link, variable, unit, default, range, _] = row[..] else { panic!("{row:?}") };
        let name = setting.name;
        assert_eq!((quoted(link)[0], quoted(variable)), (name, vec![&*setting.variable()]), "{row:?}");
        let unset = || Config::from_url("host=localhost user=x").unwrap();
        let with = |text: &str| {
            let mut config = unset();
            // So long that every other duration fits in.
            if name != "lease" {
                config = config.lease(Duration::from_secs(24 * 60 * 60));
            }
            // What the takeover policy and the quorum need of each other.
            if name == "quorum" {
                config = config.takeover(TakeoverPolicy::AfterPromotion);
            }
            (setting.set)(&mut config, text).map_err(invalid)?;
            config.validate()
        };
        match quoted(default)[..] {
            [] => assert_eq!(default, "none", "{row:?}"),
            [text, ..] => {
                let mut config = unset();
                (setting.set)(&mut config, text).unwrap();
                assert_eq!(format!("{config:?}"), format!("{:?}", unset()), "{row:?}");
            }
        }
        let ends = quoted(range);
        let is_accepted = |text: &str| with(text).is_ok();
        if unit == "word" {
            assert!(ends.iter().all(|word| is_accepted(word)), "{row:?}");
            let error = with("nonsense").unwrap_err().to_string();
            assert!(error.ends_with(&format!("one of {}", ends.join(", "))), "{error}");
            continue;
        }
        /// The text of a setting that is as many bytes, sessions or milliseconds.
        fn amount(unit: &str, number: u64) -> String {
            match unit {
                "text" => "x".repeat(number.try_into().unwrap()),
                "sessions" => number.to_string(),
                _ => format!("{number}ms"),
            }
        }
        let number = |text: &str| match unit {
            "duration" => humantime::parse_duration(text).unwrap().as_millis().try_into().unwrap(),
            _ => text.parse::<u64>().unwrap(),
        };
        let least = number(ends[0]);
        assert!(is_accepted(&amount(unit, least)), "{row:?}");
        assert!(least == 0 || !is_accepted(&amount(unit, least - 1)), "{row:?}");
        match ends.get(1).map(|end| number(end)) {
            Some(most) => {
                assert!(is_accepted(&amount(unit, most)), "{row:?}");
                // PostgreSQL's 2,147,483,647 ms are not quite 25 days.
                let more = if unit == "duration" { most + 24 * 60 * 60 * 1000 } else { most + 1 };
                assert!(!is_accepted(&amount(unit, more)), "{row:?}");
            }
            None => assert!(!is_accepted("24h"), "{row:?}"),
        }
    }
}

/// Whether `pattern`, in which `…` stands for anything, is this name. What follows the name, like `=require`, does not count.
fn names(pattern: &str, name: &str) -> bool {
    let pattern = pattern.split('=').next().unwrap_or_default();
    match pattern.split_once('…') {
        Some((start, end)) => name.starts_with(start) && name.ends_with(end),
        None => pattern == name,
    }
}

/// A value that shows what becomes of a parameter.
fn telling(parameter: &str) -> &'static str {
    match parameter {
        "host" | "dbname" | "application_name" | "fallback_application_name" | "user" | "password" => "b",
        "hostaddr" => "127.0.0.1",
        "options" => "-c\\ a=b",
        "load_balance_hosts" => "random",
        "channel_binding" | "gssencmode" => "require",
        "target_session_attrs" => "primary",
        "keepalives" => "0",
        "min_protocol_version" => "3.2",
        "replication" => "database",
        _ => "7",
    }
}

/// Those of TLS depend on the connector; `what_makes_the_connection_safer_is_not_ignored_beside_a_url` and others try them.
#[test]
fn the_table_of_parameters_is_complete_and_true() {
    let table: Vec<_> = rows(include_str!("../../config.rs")).filter(|row| row.len() == 2).collect();
    let shown = |text: &str| {
        let config = Config::from_url(text)?;
        config.validate()?;
        let postgres = &config.postgres;
        Ok::<_, Error>(format!("{config:?} {:?} {:?}", postgres.get_password(), config.passwords.is_some()))
    };
    let base = "host=a user=ada";
    for parameter in settings::parameters() {
        let told: Vec<_> = table
            .iter()
            .filter(|row| quoted(row[0]).iter().any(|pattern| names(pattern, parameter)))
            .map(|row| row[1])
            .collect();
        assert!(!told.is_empty(), "{parameter} is missing in the table of Config::from_url");
        if parameter.starts_with("ssl") || matches!(parameter, "service" | "servicefile") {
            continue;
        }
        let is_of_sockets = matches!(parameter, "requirepeer" | "channel_binding");
        let base = if is_of_sockets { "host=/tmp user=ada" } else { base };
        let value = telling(parameter);
        let outcome = shown(&format!("{base} {parameter}={value}"));
        match told[0] {
            told if told.contains("honoured") && parameter == "channel_binding" => {
                assert!(outcome.unwrap_err().to_string().contains("needs TLS"), "{told}");
            }
            told if told.contains("honoured") => {
                assert_ne!(outcome.unwrap(), shown(base).unwrap(), "{parameter}: {told}");
            }
            "refused" => {
                let error = outcome.expect_err(parameter).to_string();
                assert!(error.contains(&format!("the parameter {parameter} ")), "{error}");
            }
            told if told.starts_with("without effect") => {
                assert_eq!(outcome.unwrap(), shown(base).unwrap(), "{parameter}: {told}");
            }
            told if told.starts_with("not read") => {
                assert!(outcome.is_err(), "{parameter}: {told}");
            }
            told => panic!("{parameter}: {told}"),
        }
    }
}

#[test]
fn the_table_of_variables_is_complete() {
    let table: Vec<_> = rows(include_str!("../environment.rs")).filter(|row| row.len() == 2).collect();
    for variable in settings::variables() {
        assert!(
            table.iter().any(|row| quoted(row[0]).iter().any(|pattern| names(pattern, variable))),
            "{variable} is missing in the table of Config::from_env"
        );
    }
    for (number, row) in table.iter().enumerate() {
        for name in quoted(row[0]) {
            let others = table.iter().skip(number + 1).flat_map(|row| quoted(row[0]));
            assert!(!others.into_iter().any(|other| other == name), "{name} is told of twice");
        }
    }
}
