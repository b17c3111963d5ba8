//! Two sites, each with a server, and what is between them.

use std::env;
use std::io;
use std::process::Command;

use support::netns::{Direction, Netns};
use support::{Replication, Result, Server};

use crate::crew::command;
use crate::proxy::Proxy;

/// The worker that is at the site of the primary. The others are at the site of the standby.
pub(crate) const LEADER: usize = 0;

/// How the two sites are cut off from each other.
#[derive(Clone, Copy)]
pub(crate) enum Cut {
    Namespace,
    Proxies,
}

/// The servers are dropped before the namespace that one of them is in.
pub(crate) struct Sites {
    pub(crate) primary: Server,
    pub(crate) standby: Server,
    between: Between,
}

enum Between {
    /// The site of the primary is inside.
    Cable(Netns),
    /// All that one site wants of the other goes through them.
    Proxies { to_primary: Proxy, to_standby: Proxy },
}

impl Sites {
    /// The standby is a synchronous one.
    pub(crate) fn build(cut: Cut) -> Result<Self> {
        let replication = Replication::Synchronous;
        match cut {
            Cut::Namespace => {
                let netns = Netns::new()?;
                let primary = Server::builder().inside(&netns).start()?;
                let standby = primary.standby(replication)?;
                Ok(Self { primary, standby, between: Between::Cable(netns) })
            }
            Cut::Proxies => {
                let primary = Server::start()?;
                let to_primary = Proxy::to(primary.port());
                let standby = primary.standby_by_way_of("127.0.0.1", to_primary.port(), replication)?;
                let to_standby = Proxy::to(standby.port());
                Ok(Self { primary, standby, between: Between::Proxies { to_primary, to_standby } })
            }
        }
    }

    /// What starts a worker at its site. It knows both servers, and wants the primary.
    pub(crate) fn launch(&self, worker: usize) -> io::Result<Command> {
        let program = env::current_exe()?;
        let program = match &self.between {
            Between::Cable(netns) if worker == LEADER => netns.command(&program.to_string_lossy()),
            _ => Command::new(program),
        };
        let (primary, standby) = (self.primary.port(), self.standby.port());
        let local = "127.0.0.1".to_owned();
        let (hosts, ports) = match &self.between {
            Between::Cable(netns) => ([netns.inside_address(), netns.host_address()], [primary, standby]),
            Between::Proxies { to_standby, .. } if worker == LEADER => {
                ([local.clone(), local], [primary, to_standby.port()])
            }
            Between::Proxies { to_primary, .. } => ([local.clone(), local], [to_primary.port(), standby]),
        };
        let url = format!(
            "host={} port={},{} user=postgres dbname=postgres target_session_attrs=read-write",
            hosts.join(","),
            ports[0],
            ports[1]
        );
        Ok(command(program, worker, &url))
    }

    /// From here on nothing gets from one site to the other, and nobody is told.
    pub(crate) fn cut(&self) -> Result<()> {
        match &self.between {
            Between::Cable(netns) => netns.cut(Direction::Both),
            Between::Proxies { to_primary, to_standby } => {
                [to_primary, to_standby].iter().for_each(|proxy| proxy.cut(Direction::Both));
                Ok(())
            }
        }
    }
}
