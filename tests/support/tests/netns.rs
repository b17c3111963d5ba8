//! The cable between two network namespaces. Needs root: without it, the tests assert that the refusal says so.

use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

use postgres::NoTls;
use support::netns::{Direction, Netns};
use support::{Replication, Server, wait_for};

type Outcome = Result<(), Box<dyn std::error::Error>>;

/// A namespace, or none where there can't be one.
fn namespace() -> Result<Option<Netns>, support::Error> {
    match Netns::available() {
        Ok(()) => Netns::new().map(Some),
        Err(reason) => {
            assert!(reason.is_missing() && reason.to_string().contains("network namespaces"), "{reason}");
            support::skip(reason);
            Ok(None)
        }
    }
}

#[test]
fn a_server_is_reached_from_inside_until_the_cable_is_cut() -> Outcome {
    let Some(netns) = namespace()? else { return Ok(()) };
    let server = Server::builder().listen([netns.host_address()]).start()?;
    let url = server.url_at(&netns.host_address(), server.port());
    let ask = || -> std::io::Result<Output> {
        netns
            .command(&server.binaries().program("psql").display().to_string())
            .args(["-XAtc", "SELECT host(inet_client_addr())", &url])
            .env("PGCONNECT_TIMEOUT", "2")
            .output()
    };
    let answered = |output: &Output| String::from_utf8_lossy(&output.stdout).trim() == netns.inside_address();
    let first = ask()?;
    assert!(answered(&first), "{}", String::from_utf8_lossy(&first.stderr));
    for direction in [Direction::Inward, Direction::Outward, Direction::Both] {
        netns.cut(direction)?;
        let started = Instant::now();
        let output = ask()?;
        assert!(!answered(&output), "{direction:?}");
        // A refusal or an error of the sender's kernel would have come at once.
        assert!(
            started.elapsed() > Duration::from_secs(1),
            "{direction:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        netns.restore(direction)?;
        assert!(answered(&ask()?), "{direction:?}");
    }
    Ok(())
}

#[test]
fn a_server_inside_and_its_standby_outside_are_parted_by_a_cut() -> Outcome {
    let Some(netns) = namespace()? else { return Ok(()) };
    let primary = Server::builder().inside(&netns).start()?;
    let standby = primary.standby(Replication::Synchronous)?;
    let dial = |server: &Server| {
        let config: postgres::Config = server.url().parse()?;
        config.clone().connect_timeout(Duration::from_millis(500)).connect(NoTls)
    };
    dial(&primary)?.batch_execute("CREATE TABLE letters (letter text)")?;
    netns.cut(Direction::Both)?;
    assert!(dial(&primary).is_err() && dial(&standby).is_ok());
    // By the Unix socket.
    let mut inside = primary.client()?;
    inside.batch_execute("SET synchronous_commit = local; INSERT INTO letters VALUES ('a')")?;
    standby.promote()?;
    let letters = |server: &Server| -> Result<i64, Box<dyn std::error::Error>> {
        Ok(server.client()?.query_one("SELECT count(*) FROM letters", &[])?.try_get(0)?)
    };
    assert_eq!((letters(&primary)?, letters(&standby)?), (1, 0));

    // What it has written by itself is gone.
    netns.restore(Direction::Both)?;
    primary.follow(&standby, Replication::Synchronous)?;
    assert!(primary.is_in_recovery()? && dial(&primary).is_ok());
    assert_eq!((letters(&primary)?, letters(&standby)?), (0, 0));
    Ok(())
}

#[test]
fn each_direction_is_cut_by_itself() -> Outcome {
    let Some(netns) = namespace()? else { return Ok(()) };
    let outside = std::net::UdpSocket::bind((netns.host_address(), 0))?;
    outside.set_read_timeout(Some(Duration::from_secs(3)))?;
    let to = outside.local_addr()?;
    // Sends one word outward, and says whether an answer comes inward within 3 s.
    let script =
        format!("exec 3<>/dev/udp/{}/{}; echo out >&3; read -r -t 3 -u 3 && echo got", to.ip(), to.port());
    let exchange = || -> Result<(bool, bool), Box<dyn std::error::Error>> {
        let child = netns.command("bash").args(["-c", &script]).stdout(Stdio::piped()).spawn()?;
        let mut word = [0; 16];
        let heard = match outside.recv_from(&mut word) {
            Ok((_, from)) => {
                // A single byte, since a shell reads byte by byte, and the rest of a datagram is lost.
                outside.send_to(b"\n", from)?;
                true
            }
            Err(_) => false,
        };
        let output = child.wait_with_output()?;
        Ok((heard, String::from_utf8_lossy(&output.stdout).contains("got")))
    };
    assert_eq!(exchange()?, (true, true));
    netns.cut(Direction::Inward)?;
    assert_eq!(exchange()?, (true, false));
    netns.restore(Direction::Inward)?;
    netns.cut(Direction::Outward)?;
    assert_eq!(exchange()?, (false, false));
    netns.restore(Direction::Both)?;
    assert_eq!(exchange()?, (true, true));
    Ok(())
}

#[test]
fn dropped_it_leaves_nothing() -> Outcome {
    let Some(netns) = namespace()? else { return Ok(()) };
    let address = netns.host_address();
    assert!(std::net::TcpListener::bind((address.as_str(), 0)).is_ok());
    drop(netns);
    wait_for("the address to go", Duration::from_secs(5), || {
        std::net::TcpListener::bind((address.as_str(), 0)).is_err().then_some(())
    })?;
    Ok(())
}
