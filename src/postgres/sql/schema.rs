//! The schema that the catalog is in, and the statements for it.

use std::fmt;

use crate::error::{Error, ErrorKind, Result};
use crate::pg::sql::{IS_CURRENT, fence};

/// The schema of the catalog. All statements are written for the one called `dsync`.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Schema {
    name: String,
    identifier: String,
    /// For a number and for a pair. Made once, since each fenced transaction runs one.
    fences: [String; 2],
    is_current: String,
}

impl Schema {
    pub(crate) const DEFAULT: &str = "dsync";

    pub(crate) fn new(name: &str) -> Self {
        // The others always in quotes: they may be keywords.
        let identifier = if name == Self::DEFAULT {
            name.to_owned()
        } else {
            format!("\"{}\"", name.replace('"', "\"\""))
        };
        let mut schema =
            Self { name: name.to_owned(), identifier, fences: Default::default(), is_current: String::new() };
        schema.fences = [false, true].map(|pair| schema.apply(&fence(pair)));
        schema.is_current = schema.apply(IS_CURRENT);
        schema
    }

    /// Refuses a name that PostgreSQL does not take, or cuts off.
    pub(crate) fn validate(&self) -> Result<()> {
        const LONGEST: usize = 63;
        let name = &self.name;
        let problem = if name.is_empty() {
            "is empty"
        } else if name.len() > LONGEST {
            "has more than 63 bytes"
        } else if name.starts_with("pg_") || name == "information_schema" {
            "is one of PostgreSQL's own"
        // The one would end a comment of the SQL for administrators, the other its last statement.
        } else if name.contains(char::is_control) || name.contains("$check$") {
            "contains a control character, or $check$"
        } else {
            return Ok(());
        };
        Err(Error::new(
            ErrorKind::InvalidConfig,
            format!("schema {name:?} {problem}; choose another name, such as dsync or locks"),
        ))
    }

    /// The name as SQL has it.
    pub(crate) fn identifier(&self) -> &str {
        &self.identifier
    }

    /// Makes a statement that is written for the schema `dsync` one for this schema.
    pub(crate) fn apply(&self, statement: &str) -> String {
        let (mut applied, mut rest) = (String::with_capacity(statement.len()), statement);
        while let Some((before, after)) = rest.split_once(Self::DEFAULT) {
            if let Some(before) = before.strip_suffix('\'') {
                // A string: the bare name, or the beginning of a qualified one.
                let content = if after.starts_with('\'') { &self.name } else { &self.identifier };
                let content = content.replace('\'', "''");
                applied.push_str(before);
                // Whatever `standard_conforming_strings` says on a connection of the application's.
                applied.push_str(if content.contains('\\') { "E'" } else { "'" });
                applied.push_str(&content.replace('\\', "\\\\"));
            } else {
                applied.push_str(before);
                applied.push_str(&self.identifier);
            }
            rest = after;
        }
        applied + rest
    }

    /// See [`fence`].
    pub(crate) fn fence(&self, pair: bool) -> &str {
        &self.fences[usize::from(pair)]
    }

    /// See [`IS_CURRENT`].
    pub(crate) fn is_current(&self) -> &str {
        &self.is_current
    }
}

impl fmt::Debug for Schema {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.name.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_statement_is_made_for_another_schema_wherever_it_names_one() {
        let statement = "SELECT nextval('dsync.token') FROM dsync.lock WHERE 'dsync' = dsync";
        let applied = |name| Schema::new(name).apply(statement);
        assert_eq!(applied("dsync"), statement);
        assert_eq!(
            applied("dsync2"),
            r#"SELECT nextval('"dsync2".token') FROM "dsync2".lock WHERE 'dsync2' = "dsync2""#
        );
        assert_eq!(
            applied(r#"a'"\"#),
            r#"SELECT nextval(E'"a''""\\".token') FROM "a'""\".lock WHERE E'a''"\\' = "a'""\""#
        );
    }
}
