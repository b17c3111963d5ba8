//! Servers and services that look like PostgreSQL, by their names: one sentence of advice on each.

/// On a server whose function `version` says this.
pub(crate) fn by_version(version: &str) -> Option<&'static str> {
    if version.contains("CockroachDB") {
        return Some("CockroachDB has functions for advisory locks that do nothing");
    }
    if let Some((_, yugabyte)) = version.split_once("-YB-") {
        // "2.25.1.0-b0", and since 2025 "2025.1.0.0-b0".
        let mut numbers = yugabyte.split(['.', '-']).map_while(|number| number.parse::<u32>().ok());
        let since = (numbers.next().unwrap_or_default(), numbers.next().unwrap_or_default());
        return Some(if since < (2025, 1) {
            "YugabyteDB has advisory locks since 2025.1: upgrade it"
        } else {
            "YugabyteDB has advisory locks where they are switched on: see its setting ysql_yb_enable_advisory_locks"
        });
    }
    if version.contains("Redshift") {
        return Some("Amazon Redshift has no advisory locks");
    }
    if version.contains("PGlite") || version.contains("emcc") || version.contains("Emscripten") {
        return Some("PGlite is one session that all its clients share");
    }
    None
}

/// On a server that has one of these extensions, of which the first is told.
pub(crate) fn by_extension(names: &str) -> Option<&'static str> {
    names.split_whitespace().find_map(|name| match name {
        "bdr" => Some(
            "the server is a node of BDR (EDB Postgres Distributed), which keeps advisory locks on each node by itself: let all \
             processes connect to the same node, the write leader",
        ),
        "spock" => Some(
            "the server is a node of spock, which keeps advisory locks on each node by itself: let all processes connect to the same \
             node",
        ),
        _ => None,
    })
}

/// On a worker of Citus.
pub(crate) const CITUS_WORKER: &str = "the server is a worker of Citus, and advisory locks are kept on each node \
                                       by itself: let all processes connect to the coordinator";

/// On poolers, of which a host name tells.
pub(crate) fn by_host(host: &str) -> Option<&'static str> {
    // Those of Neon, Supabase and AWS.
    if host.contains("-pooler.") {
        return Some("the host's name says that it is a pooler: leave out \"-pooler\"");
    }
    if host.contains(".pooler.") {
        return Some(
            "the host's name says that it is a pooler: use its port for session mode, or the server's own name",
        );
    }
    if host.contains(".proxy-") && host.contains(".rds.") {
        return Some(
            "the host's name says that it is an RDS Proxy: use the endpoint of the instance or of the cluster's writer",
        );
    }
    None
}

/// On a server that says of itself that it is a standby, and for another statement that it is none.
pub(crate) const LOAD_BALANCER: &str = "something between here and the server sends statements that only read to a \
                                        standby: connect to the primary directly, or, with Pgpool-II, leave \
                                        write_function_list and read_only_function_list empty or set \
                                        load_balance_mode = off";

/// On two sessions that are served by two servers.
pub(crate) const TWO_SERVERS: &str = "the two sessions are on two servers, between which a load balancer or the host's \
                                      name chooses: name one server, or all of them with \
                                      target_session_attrs=read-write if one is the primary of the others";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_are_known_by_their_names_and_postgresql_is_none_of_them() {
        for (version, told) in [
            ("CockroachDB CCL v24.1.0 (x86_64-pc-linux-gnu, built 2024/05/15)", Some("CockroachDB")),
            ("PostgreSQL 11.2-YB-2.18.0.0-b0 on x86_64-pc-linux-gnu", Some("since 2025.1: upgrade")),
            ("PostgreSQL 15.2-YB-2025.1.0.0-b168 on x86_64-pc-linux-gnu", Some("switched on")),
            ("PostgreSQL 15.2-YB-2024.2.1.0-b1 on x86_64-pc-linux-gnu", Some("since 2025.1: upgrade")),
            ("PostgreSQL 8.0.2 on i686-pc-linux-gnu, compiled by GCC, Redshift 1.0.4272", Some("Redshift")),
            ("PostgreSQL 17.5 (PGlite 0.3.7) on x86_64-pc-linux-gnu, compiled by emcc", Some("PGlite")),
            ("PostgreSQL 15.18 (Debian 15.18-0+deb12u1) on x86_64-pc-linux-gnu, compiled by gcc", None),
        ] {
            let advice = by_version(version);
            assert_eq!(advice.is_some(), told.is_some(), "{version}");
            assert!(told.is_none_or(|told| advice.is_some_and(|advice| advice.contains(told))), "{advice:?}");
        }
        assert_eq!((by_extension(""), by_extension("citus plpgsql")), (None, None));
        assert!(by_extension("citus spock").is_some_and(|advice| advice.contains("spock")));
        for (host, told) in [
            ("ep-cool-1.eu.aws.neon.tech", false),
            ("ep-cool-1-pooler.eu.aws.neon.tech", true),
            ("aws-0-eu-west-1.pooler.supabase.com", true),
            ("app.proxy-abc.eu-west-1.rds.amazonaws.com", true),
            ("app.cluster-abc.eu-west-1.rds.amazonaws.com", false),
        ] {
            assert_eq!(by_host(host).is_some(), told, "{host}");
        }
    }
}
