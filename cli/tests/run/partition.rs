//! The cable of the holder's network is pulled. Linux, as root; elsewhere the tests say that they were skipped, and fail with `CI=true`.

use std::process::Command;

use support::Server;
use support::netns::{Direction, Netns};

use crate::common::clean;
use crate::loss::Scene;

#[test]
fn a_network_that_is_cut_ends_the_command_before_another_has_the_lock() {
    pull_the_cable(Direction::Both);
}

#[test]
fn a_network_that_lets_nothing_in_ends_the_command_before_another_has_the_lock() {
    pull_the_cable(Direction::Inward);
}

fn pull_the_cable(direction: Direction) {
    if support::skip_without(Netns::available()) {
        return;
    }
    let netns = Netns::new().unwrap();
    let server = Server::builder().listen([netns.host_address()]).start().unwrap();
    let url = server.url_at(&netns.host_address(), server.port());
    let mut inside: Command = clean(netns.command(env!("CARGO_BIN_EXE_pgdsync")), &url);
    let scene = Scene::set(&server, &mut inside);
    netns.cut(direction).unwrap();
    let mut holder = scene.dies_before_another_begins(&format!("a cable that is cut ({direction:?})"));
    holder.says("the lock was lost");
    assert_eq!(holder.ends().code(), Some(79));
}
