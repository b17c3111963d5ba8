//! Takes a connection string apart.
//!
//! Not left to the driver, whose errors repeat what they could not understand, which may be a piece of the password: no
//! text here holds anything that came from the string. Besides, the driver's parser does not tell what was given and
//! what was left out, and takes a part of some mistyped passwords for the name of a host.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};

use super::settings;

/// The values that a connection string gives, by the names of their parameters. The last of a name wins, as in libpq.
pub(super) type Parameters = BTreeMap<&'static str, Vec<u8>>;

/// What is wrong with a text, without the text.
pub(super) type Problem = Cow<'static, str>;

const QUOTED: &str = "it stands in quotes, which belong to a shell and not to it; remove them";
const SCHEME: &str = "it has another scheme than postgres:// or postgresql://; write it without the name of a driver \
                      (such as +psycopg2 or jdbc:), and with nothing in front";
const CREDENTIALS: &str = "a character that has a meaning in a URL may stand unencoded in user or password; write \
                           @ as %40, : as %3A, / as %2F, ? as %3F, # as %23 and % as %25 there";
const PAIRS: &str = "it is neither a URL nor pairs like host=db user=app; a value with spaces must stand in single \
                     quotes";
const OPEN_QUOTE: &str =
    "a value begins with a single quote and does not end with one; write ' in a value as \\'";

/// Understands both forms that libpq does: a URL, and `host=… user=…`. White space around it does not count: a mounted
/// secret ends with a newline.
pub(super) fn parse(text: &str) -> Result<Parameters, Problem> {
    let text = text.trim();
    if text.is_empty() {
        return Err("it is empty".into());
    }
    if text.starts_with(['"', '\'', '`', '“', '”', '„', '‘', '’', '«', '»']) {
        return Err(QUOTED.into());
    }
    match text.split_once("://") {
        Some((scheme, rest)) if !scheme.contains(|c: char| c == '=' || c.is_whitespace()) => {
            match scheme.to_ascii_lowercase().as_str() {
                "postgres" | "postgresql" => url(rest),
                _ => Err(SCHEME.into()),
            }
        }
        _ => pairs(text),
    }
}

/// `user:password@host:port,host:port/database?name=value&name=value`
fn url(text: &str) -> Result<Parameters, Problem> {
    let mut parameters = Parameters::new();
    let path = text.find('/').unwrap_or(text.len());
    let text = match text[..path].split_once('@') {
        Some((credentials, _)) => {
            let (user, password) = credentials.split_once(':').unwrap_or((credentials, ""));
            parameters.insert("user", decode(user));
            parameters.insert("password", decode(password));
            &text[credentials.len() + 1..]
        }
        None => text,
    };
    let (text, query) = text.split_once('?').unwrap_or((text, ""));
    let (hosts, database) = text.split_once('/').unwrap_or((text, ""));
    // It is the `@` in front of the host, if that of the password came first.
    if database.contains('@') {
        return Err(CREDENTIALS.into());
    }
    parameters.insert("dbname", decode(database));
    if !hosts.is_empty() {
        let (mut names, mut ports) = (Vec::new(), Vec::new());
        for host in hosts.split(',') {
            let (name, port) = host_and_port(host)?;
            names.push(name);
            ports.push(port);
        }
        parameters.insert("host", names.join(&b','));
        // Without any port it is left to others to name one.
        if ports.iter().any(|port| !port.is_empty()) {
            parameters.insert("port", ports.join(&b','));
        }
    }
    for (index, pair) in query.split('&').enumerate().filter(|(_, pair)| !pair.is_empty()) {
        let (name, value) = pair
            .split_once('=')
            .ok_or_else(|| format!("what follows the ? is not pairs like name=value; {CREDENTIALS}"))?;
        insert(&mut parameters, &decode(name), index + 1, decode(value))?;
    }
    Ok(parameters)
}

/// One host of a URL.
fn host_and_port(text: &str) -> Result<(Vec<u8>, Vec<u8>), Problem> {
    let (name, port) = match text.strip_prefix('[') {
        Some(text) => match text.split_once(']') {
            Some((name, "")) => (name, ""),
            Some((name, port)) => (name, port.strip_prefix(':').ok_or(CREDENTIALS)?),
            None => return Err("the [ of an IPv6 address is without its ]".into()),
        },
        None => text.split_once(':').unwrap_or((text, "")),
    };
    let (name, port) = (decode(name), decode(port));
    let number = std::str::from_utf8(&port).ok().and_then(|port| port.trim().parse::<u16>().ok());
    if !port.is_empty() && number.is_none() {
        return Err(format!(
            "what stands in the place of a port is no number up to 65535; an IPv6 address must stand in [ ]; {CREDENTIALS}"
        )
        .into());
    }
    let is_folder = name.first() == Some(&b'/');
    if !name.is_empty() && !is_folder && !std::str::from_utf8(&name).is_ok_and(is_host_name) {
        return Err(format!("the host has characters that no host name has; {CREDENTIALS}").into());
    }
    Ok((name, port))
}

/// `name=value name='value with spaces'`
fn pairs(text: &str) -> Result<Parameters, Problem> {
    let mut parameters = Parameters::new();
    let (mut rest, mut number) = (text, 0);
    while !rest.is_empty() {
        let (name, after) = rest.split_once('=').ok_or(PAIRS)?;
        let name = name.trim_end();
        if name.contains(char::is_whitespace) {
            return Err(PAIRS.into());
        }
        let (value, after) = value(after.trim_start())?;
        number += 1;
        insert(&mut parameters, name.as_bytes(), number, value)?;
        rest = after.trim_start();
    }
    Ok(parameters)
}

/// A value at the beginning of `text`, and what follows it. A backslash takes the meaning from the character after it.
fn value(text: &str) -> Result<(Vec<u8>, &str), Problem> {
    let quoted = text.strip_prefix('\'');
    let text = quoted.unwrap_or(text);
    let mut value = String::new();
    let mut characters = text.char_indices();
    while let Some((index, character)) = characters.next() {
        match character {
            '\\' => value.extend(characters.next().map(|(_, character)| character)),
            '\'' if quoted.is_some() => return Ok((value.into_bytes(), &text[index + 1..])),
            space if quoted.is_none() && space.is_whitespace() => {
                return Ok((value.into_bytes(), &text[index..]));
            }
            other => value.push(other),
        }
    }
    if quoted.is_some() { Err(OPEN_QUOTE.into()) } else { Ok((value.into_bytes(), "")) }
}

/// Adds the parameter that stands as the `number`th.
fn insert(parameters: &mut Parameters, name: &[u8], number: usize, value: Vec<u8>) -> Result<(), Problem> {
    match (name, &*value) {
        // Two ways to say `sslmode` that libpq knows too.
        (b"ssl", b"true") => parameters.insert("sslmode", b"require".to_vec()),
        (b"requiressl", required) => {
            let mode: &[u8] = if required.starts_with(b"1") { b"require" } else { b"prefer" };
            parameters.insert("sslmode", mode.to_vec())
        }
        _ => match settings::parameter(name) {
            Some(name) => parameters.insert(name, value),
            None => return Err(unknown(name, number)),
        },
    };
    Ok(())
}

/// Names a parameter only if it is one of those that are often seen, since any other word may be a piece of a password.
fn unknown(name: &[u8], number: usize) -> Problem {
    const OF_OTHERS: [&str; 26] = [
        "ApplicationName",
        "DATABASE_URL",
        "charset",
        "connection_limit",
        "currentSchema",
        "encoding",
        "loginTimeout",
        "max_connections",
        "pgbouncer",
        "pool_max_conns",
        "pool_min_conns",
        "pool_mode",
        "pool_size",
        "pool_timeout",
        "prepareThreshold",
        "schema",
        "search_path",
        "socketTimeout",
        "socket_timeout",
        "ssl",
        "sslaccept",
        "sslidentity",
        "statement-cache-capacity",
        "statement_cache_size",
        "statement_timeout",
        "uselibpqcompat",
    ];
    match OF_OTHERS.iter().find(|other| other.as_bytes() == name) {
        Some(&"ssl") => "its parameter ssl can only be true; say sslmode=disable, prefer or require".into(),
        Some(other) => format!("its parameter {other} is not one of PostgreSQL's; remove it").into(),
        None => {
            format!("its parameter number {number} is not one of PostgreSQL's; remove it, or: {CREDENTIALS}")
                .into()
        }
    }
}

/// Takes the percent encoding off. What only looks like it stays as it is.
fn decode(text: &str) -> Vec<u8> {
    let digit = |byte: &u8| char::from(*byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    let mut decoded = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [byte, after @ ..] = rest {
        rest = after;
        match (byte, after) {
            (b'%', [high, low, after @ ..]) if digit(high).is_some() && digit(low).is_some() => {
                decoded.extend(digit(high).zip(digit(low)).map(|(high, low)| high << 4 | low));
                rest = after;
            }
            _ => decoded.push(*byte),
        }
    }
    decoded
}

/// Whether it can be the name of a host or an IP address. What cannot must not be asked a name server for: it may be a
/// piece of a password.
pub(super) fn is_host_name(name: &str) -> bool {
    let is_word = |text: &str| {
        !text.is_empty() && text.chars().all(|c| c.is_alphanumeric() || matches!(c, '-' | '.' | '_'))
    };
    match name.split_once('%') {
        Some((address, zone)) => address.parse::<Ipv6Addr>().is_ok() && is_word(zone),
        None => is_word(name) || name.parse::<IpAddr>().is_ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Config;

    /// Getters that show all of it but the host's socket options, which `Debug` shows.
    fn shown(config: &postgres::Config) -> String {
        let password = config.get_password().map(<[u8]>::to_vec);
        format!("{config:?} {password:?} {:?}", config.get_ssl_negotiation())
    }

    #[test]
    fn what_the_driver_understands_means_the_same_here() {
        for text in [
            "postgres://ada:lace@example.org:5433/engine",
            "postgresql://ada@example.org:5433/engine?connect_timeout=7&application_name=a%20b",
            "postgres://ada:p%40ss%2Fw%23rd%3A%2541%3Fx@example.org:5433/engine",
            "postgres://ada:100%safe%@example.org:5433/engine",
            "postgres://ada:pa:ss#wo?rd@example.org:5433/engine",
            "postgres://ada:%FF%fe@example.org:5433/engine",
            "postgres://ada@a:1,b:2,[::1]:3/engine?target_session_attrs=read-write&load_balance_hosts=random",
            "postgres://ada@%2Fvar%2Frun:5433/engine",
            "postgres:///engine?user=ada&host=/tmp&port=5433&sslmode=disable",
            "postgres://a:5433",
            "postgres://a:5433?",
            "postgres://a:5433/?sslmode=require&sslnegotiation=direct&channel_binding=disable&",
            "host=a,/tmp port=1,2 user=ada password='it s' dbname=engine",
            "host = a  user= 'a b'\tpassword='a\\'b\\\\c' options='-c a=b'",
            "user=a\\ b host=a hostaddr=127.0.0.1 port= 7",
            "host=a,b,c port=1,,3 hostaddr=::1,127.0.0.1,10.0.0.1",
            "host=a keepalives=0 keepalives_idle=5 keepalives_interval=6 keepalives_retries=7 tcp_user_timeout=8",
            "host=a keepalives=1 keepalives_idle=-1 connect_timeout=0 tcp_user_timeout=0",
        ] {
            let theirs: postgres::Config = text.parse().unwrap_or_else(|error| panic!("{text}: {error}"));
            let ours = Config::from_url(text).unwrap_or_else(|error| panic!("{text}: {error}"));
            assert_eq!(shown(&ours.postgres), shown(&theirs), "{text}");
        }
    }

    #[test]
    fn what_libpq_understands_and_the_driver_does_not_is_understood() {
        let understood = |text: &str| shown(&Config::from_url(text).expect(text).postgres);
        let plain = understood("postgres://ada:lace@a:5433/engine");
        for text in [
            " postgres://ada:lace@a:5433/engine\n",
            "POSTGRES://ada:lace@a:5433/engine",
            "postgres://ada:lace@x:1/engine?host=a&port=5433",
            "postgres://ada:lace@a:5433/engine?client_encoding=utf8&gssencmode=prefer&sslmode=",
            "\r\nhost=x host=a port=5433 user=ada password=lace dbname=engine\r\n",
        ] {
            assert_eq!(understood(text), plain, "{text:?}");
        }
        assert_eq!(understood("host=a keepalives_count=3"), understood("host=a keepalives_retries=3"));
        assert_eq!(understood("postgres://a:1?ssl=true"), understood("postgres://a:1?sslmode=require"));
        assert_eq!(understood("host=a requiressl=1"), understood("host=a sslmode=require"));
        assert_eq!(
            understood("host=a application_name=x fallback_application_name=y"),
            understood("host=a application_name=x")
        );
        assert_eq!(understood("postgres://a?host=b,c"), understood("host=b,c"));
    }

    #[test]
    fn what_is_wrong_is_told_with_what_to_change() {
        for (text, told) in [
            ("", "it is empty"),
            ("\"postgres://ada:lovelace@a/engine\"", "quotes"),
            ("'postgres://ada:lovelace@a/engine'", "quotes"),
            ("postgresql+psycopg2://ada:lovelace@a/engine", "another scheme"),
            ("jdbc:postgresql://a/engine?user=ada", "another scheme"),
            ("mysql://ada:lovelace@a/engine", "another scheme"),
            ("psql postgres://ada:lovelace@a/engine", "single quotes"),
            ("ada:lovelace@a/engine", "neither a URL nor pairs"),
            ("DATABASE_URL=postgres://ada:lovelace@a/engine", "DATABASE_URL is not one of PostgreSQL's"),
            ("postgres://ada:la@ce@a/engine", "%40"),
            ("postgres://ada:la@ce#@a/engine", "%40"),
            ("postgres://ada:la/ce@a/engine", "%2F"),
            ("postgres://ada:1/ce@a/engine", "%2F"),
            ("postgres://ada:la@ce/x@a/engine", "%40"),
            ("postgres://ada:la@ce?x@a/engine", "%40"),
            ("postgres://ada:la@ce?x=y@a/engine", "parameter number 1"),
            ("postgres://ada@ce:la@a/engine", "%40"),
            ("postgres://ada@[::1/engine", "without its ]"),
            ("postgres://ada@::1:5432/engine", "[ ]"),
            ("postgres://ada@a:70000/engine", "place of a port"),
            ("postgres://ada@a b/engine", "no host name has"),
            ("postgres://ada@a/engine?schema=public&connection_limit=5", "schema is not one of PostgreSQL's"),
            ("postgres://ada@a/engine?ssl=no", "ssl can only be true"),
            ("host=a sslmode=most", "the parameter sslmode of the connection string"),
            ("host=a sslmode=allow", "disable, prefer or require"),
            ("host=a sslmode=on", "one of disable, prefer, require"),
            ("host=a target_session_attrs=standby", "primary"),
            ("host=a service=prod", "no service file has"),
            ("host=a replication=database", "replication session"),
            ("host=a port=many", "port number"),
            ("host=a hostaddr=b", "IP address"),
            ("host=@dsync", "neither a host name"),
            ("host=a password='lovelace", "single quote"),
            ("host=a password=la ce", "single quotes"),
            ("host", "neither a URL nor pairs"),
            ("host=a =b", "parameter number 2"),
        ] {
            let error = Config::from_url(text).and_then(|config| config.validate()).expect_err(text);
            assert!(error.to_string().contains(told), "{text}: {error}");
            assert!(!format!("{error:?}").contains("lovelace"), "{error:?}");
        }
    }
}
