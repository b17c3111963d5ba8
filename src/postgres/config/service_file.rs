//! Service files, by libpq's rules: the settings of a connection under a name.
//!
//! <https://www.postgresql.org/docs/current/libpq-pgservice.html>

use std::borrow::Cow;
use std::fs;
use std::path::{Path, PathBuf};

use super::{Variables, settings};
use crate::error::Result;

/// The file for the whole machine where `PGSYSCONFDIR` does not say it: libpq has one folder compiled in, that of Debian or
/// that of Red Hat, say.
const USUAL_FOLDERS: [&str; 2] = ["/etc/postgresql-common", "/etc/sysconfig/pgsql"];

/// What is wrong, without anything that came from a file or a setting.
pub(super) type Problem = Cow<'static, str>;

/// The settings of a service.
pub(super) type Parameters = Vec<(&'static str, Vec<u8>)>;

/// Looks for the service in `file`, or in the user's own where none is named, and then in the one for the whole machine.
pub(super) fn look_up(
    name: &[u8],
    file: Option<PathBuf>,
    get: &Variables<'_>,
) -> Result<std::result::Result<Parameters, Problem>> {
    let own = match &file {
        Some(_) => file.clone(),
        None => get("HOME")?.map(|home| Path::new(&home).join(".pg_service.conf")),
    };
    let of_all = match get("PGSYSCONFDIR")? {
        Some(folder) => vec![PathBuf::from(folder)],
        None => USUAL_FOLDERS.map(PathBuf::from).to_vec(),
    };
    let of_all = of_all.into_iter().map(|folder| folder.join("pg_service.conf"));
    for (path, is_named) in
        own.into_iter().map(|path| (path, file.is_some())).chain(of_all.map(|path| (path, false)))
    {
        let which = if is_named { "the service file that is named" } else { "the service file" };
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if !is_named && error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => {
                return Ok(Err(format!(
                    "{which} cannot be read ({}); correct its name or its rights",
                    error.kind()
                )
                .into()));
            }
        };
        match find(&text, name) {
            Ok(Some(parameters)) => return Ok(Ok(parameters)),
            Ok(None) => {}
            Err((number, problem)) => {
                return Ok(Err(format!("line {number} of {which} {problem}").into()));
            }
        }
    }
    Ok(Err("no service file has a service of this name; add it to ~/.pg_service.conf, or name the file by PGSERVICEFILE".into()))
}

/// The settings of the service in the text of a file: the lines below `[name]`, as far as to the next name. The first of a
/// setting counts. An error has the number of its line.
fn find(text: &[u8], name: &[u8]) -> std::result::Result<Option<Parameters>, (usize, &'static str)> {
    let mut found: Option<Parameters> = None;
    for (number, line) in (1..).zip(text.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii)) {
        if line.is_empty() || line.starts_with(b"#") {
            continue;
        }
        if let Some(title) = line.strip_prefix(b"[") {
            if found.is_some() {
                break;
            }
            found = (title.strip_suffix(b"]") == Some(name)).then(Parameters::new);
            continue;
        }
        let Some(found) = &mut found else { continue };
        if line.starts_with(b"ldap") {
            return Err((
                number,
                "has the address of an LDAP server, which this version does not ask; write the settings there",
            ));
        }
        let Some(equals) = line.iter().position(|byte| *byte == b'=') else {
            return Err((number, "is not like name=value; correct it"));
        };
        let (key, value) = (&line[..equals], &line[equals + 1..]);
        match settings::parameter(key) {
            Some("service" | "servicefile") => {
                return Err((number, "names another service, which libpq does not follow either; remove it"));
            }
            Some(key) if found.iter().any(|(known, _)| *known == key) => {}
            Some(key) => found.push((key, value.to_vec())),
            None => {
                return Err((
                    number,
                    "has a name that is not one of libpq's parameters; correct it, without spaces around the =",
                ));
            }
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_has_the_lines_below_its_name() {
        let text = b"host=x\n# [prod]\n[other]\nhost=no\n\n  [prod]\r\n  host=db  \nport=1\n#port=2\nhost=late\npassword= a=b\n[prod]\nuser=no\n";
        let found = find(text, b"prod").unwrap().unwrap();
        let shown: Vec<_> =
            found.iter().map(|(name, value)| (*name, str::from_utf8(value).unwrap())).collect();
        assert_eq!(shown, [("host", "db"), ("port", "1"), ("password", " a=b")]);
        assert_eq!(find(text, b"pro"), Ok(None));
        assert_eq!(find(b"[prod]\n", b"prod"), Ok(Some(Vec::new())));
    }

    #[test]
    fn what_is_wrong_is_told_by_the_number_of_its_line() {
        for (text, told) in [
            ("[p]\nhost db", "not like name=value"),
            ("[p]\nhost = db", "without spaces"),
            ("[p]\nsecret=x", "not one of libpq's"),
            ("[p]\nservice=x", "another service"),
            ("[p]\nldap://x", "LDAP"),
        ] {
            let (number, problem) = find(text.as_bytes(), b"p").unwrap_err();
            assert!(number == 2 && problem.contains(told), "{text}: {problem}");
            assert_eq!(find(text.as_bytes(), b"q"), Ok(None), "{text}");
        }
    }
}
