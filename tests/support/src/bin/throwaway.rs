//! Starts a server, prints where it is, and keeps it until its standard input ends.
//!
//! For trying things by hand (`cargo run -p dsync-test-support`, then Ctrl-D or Ctrl-C), and for the tests that kill a
//! server's holder. With the argument `frozen` the server is frozen; with `netns` there is a network namespace too; with
//! `exit` the process leaves by `exit`, which runs no destructor.

use std::io::Read;

use support::netns::Netns;
use support::{Error, Server};

fn main() -> Result<(), Error> {
    let mode = std::env::args().nth(1).unwrap_or_default();
    let server = Server::start()?;
    println!("url {}", server.url());
    println!("folder {}", server.folder().display());
    println!("postmaster {}", server.postmaster_pid().unwrap_or_default());
    let frozen = if mode == "frozen" { Some(server.freeze()?) } else { None };
    let netns = if mode == "netns" { Some(Netns::new()?) } else { None };
    if let Some(netns) = &netns {
        println!("address {}", netns.host_address());
    }
    println!("ready");
    if mode.is_empty() {
        eprintln!("Ctrl-D or Ctrl-C stops the server and removes it.");
    }
    // The end of the input is all that matters, and an error is an end too.
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
    if mode == "exit" {
        std::process::exit(0);
    }
    drop(frozen);
    Ok(())
}
