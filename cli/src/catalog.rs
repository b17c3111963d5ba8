//! `catalog`: the SQL that makes the catalog, and the grants for roles.

use clap::Args;

use crate::args::Arguments;
use crate::exit::{Failure, USAGE};
use crate::{connect, out};

/// Prints the SQL that makes the catalog, for an administrator to run.
///
/// For `psql --set ON_ERROR_STOP=1 --single-transaction --file -`, in the database of the locks, as its owner. Running it again does no harm.
#[derive(Args, Debug)]
pub(crate) struct Catalog {
    /// Also prints what a role needs that takes locks. May be given several times. The name is written as it is called, without quotes.
    #[arg(long, value_name = "ROLE")]
    grant: Vec<String>,
}

impl Catalog {
    pub(crate) fn run(&self, arguments: &Arguments) -> Result<u8, Failure> {
        let mut sql = dsync::catalog_sql(&connect::schema(&arguments.connection))?;
        let grants = grants(&sql);
        for role in &self.grant {
            if role.is_empty() || role.contains(char::is_control) {
                return Err(Failure::new(
                    USAGE,
                    "the role of --grant is empty, or has a control character; name the role",
                ));
            }
            let quoted = format!("\"{}\"", role.replace('"', "\"\""));
            for grant in &grants {
                sql += &format!("{grant}{quoted};\n");
            }
        }
        out::write(&sql)?;
        Ok(0)
    }
}

/// The grants that the head of the script names, as far as to the name of the role.
fn grants(sql: &str) -> Vec<String> {
    let lines = sql.lines().filter_map(|line| line.strip_prefix("--     ")?.strip_suffix("role;"));
    lines.map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_grants_are_those_that_the_script_names() {
        let found = grants(dsync::CATALOG_SQL);
        assert_eq!(found.len(), 6);
        assert!(
            found.iter().all(|grant| grant.starts_with("GRANT ") && grant.ends_with(" TO ")),
            "{found:?}"
        );
    }
}
