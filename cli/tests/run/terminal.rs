//! Job control in a terminal, which `script` of util-linux gives to an interactive shell.

use std::io::Write as _;
use std::process::{ChildStdin, Command, Stdio};
use std::thread;

use support::Server;

use crate::common::{LEASE, Process, SHORT, becomes, can_contain, clean, heeding};

/// An interactive shell in a terminal.
struct Shell {
    process: Process,
    keys: ChildStdin,
}

impl Shell {
    fn start(url: &str) -> Option<Self> {
        let mut script = clean(heeding("script"), url);
        script.args(["-qefc", "PS1='$ ' bash --norc --noprofile -i", "/dev/null"]);
        let program = env!("CARGO_BIN_EXE_pgdsync");
        script.env("RUN", format!("{program} run k --")).stdin(Stdio::piped());
        script.env("RUN_SHORT", format!("{program} run {} k --", SHORT.join(" ")));
        let has_both = ["script", "bash"]
            .iter()
            .all(|name| Command::new(name).arg("--version").stdout(Stdio::null()).status().is_ok());
        if !has_both {
            support::skip("there is no script(1) or no bash (`apt-get install bsdutils bash`)");
            return None;
        }
        let mut process = Process::start(&mut script);
        let keys = process.child.stdin.take().unwrap();
        Some(Self { process, keys })
    }

    fn types(&mut self, keys: &str) {
        self.keys.write_all(keys.as_bytes()).unwrap();
    }
}

/// The words that are waited for are put together by the shells, so that what the terminal shows of the keys is not taken for them.
#[test]
fn a_command_that_reads_the_terminal_can_be_stopped_and_goes_on() {
    let database = Server::shared().database().unwrap();
    let Some(mut shell) = Shell::start(&database.url()) else { return };
    shell.types("$RUN sh -c 'echo re''ady; read x; echo \"g\"ot $x; read y; echo \"g\"ot $y'\n");
    shell.process.says("ready");
    shell.types("one\n");
    shell.process.says("got one");
    // Ctrl-Z.
    shell.types("\x1a");
    shell.process.says("Stopped");
    shell.types("echo al$((1+1))ve\n");
    shell.process.says("al2ve");
    shell.types("fg\n");
    shell.types("two\n");
    shell.process.says("got two");
    shell.types("echo code $?$?\n");
    shell.process.says("code 00");
    shell.types("exit\n");
    assert!(shell.process.ends().success());
}

/// As `nano` and the shell's `suspend` do it.
#[test]
fn a_command_that_has_the_terminal_and_stops_itself_gives_way_to_the_shell() {
    let database = Server::shared().database().unwrap();
    let Some(mut shell) = Shell::start(&database.url()) else { return };
    shell.types("$RUN sh -c 'echo re''ady; read x; echo \"g\"ot $x; kill -STOP $$; echo goes \"o\"n; read y; echo \"g\"ot $y'\n");
    shell.process.says("ready");
    shell.types("one\n");
    shell.process.says("got one");
    shell.process.says("Stopped");
    shell.types("fg\n");
    shell.process.says("goes on");
    shell.types("two\n");
    shell.process.says("got two");
    shell.types("exit\n");
    assert!(shell.process.ends().success());
}

/// The keeper does not stand still, and what it says of the renewals is heard only then.
#[test]
fn a_command_that_is_stopped_for_longer_than_a_term_goes_on() {
    let database = Server::shared().database().unwrap();
    let Some(mut shell) = Shell::start(&database.url()) else { return };
    shell.types("$RUN_SHORT sh -c 'echo re''ady; read x; echo \"g\"ot $x; read y; echo \"g\"ot $y'\n");
    shell.process.says("ready");
    shell.types("one\n");
    shell.process.says("got one");
    // Ctrl-Z.
    shell.types("\x1a");
    shell.process.says("Stopped");
    thread::sleep(LEASE);
    shell.types("fg\n");
    shell.types("two\n");
    shell.process.says("got two");
    shell.types("echo code $?$?\n");
    shell.process.says("code 00");
    shell.types("exit\n");
    assert!(shell.process.ends().success());
}

#[test]
fn a_command_in_the_background_is_stopped_when_it_reads_the_terminal_and_goes_on_in_the_foreground() {
    let database = Server::shared().database().unwrap();
    let Some(mut shell) = Shell::start(&database.url()) else { return };
    shell.types("$RUN sh -c 'read x; echo \"g\"ot $x' &\n");
    shell.types("until jobs | grep -q Stopped; do sleep 0.1; done; echo is sto''pped\n");
    shell.process.says("is stopped");
    shell.types("fg\n");
    shell.types("two\n");
    shell.process.says("got two");
    shell.types("exit\n");
    assert!(shell.process.ends().success());
}

/// How many locks are held in the database.
const HELD: &str = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted \
     AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";

/// The shell's groups have no numbers in a container that shares its terminal. Linux, as root.
#[test]
fn a_command_in_a_container_that_cannot_have_the_terminal_is_told_of() {
    if !can_contain() {
        return;
    }
    let database = Server::shared().database().unwrap();
    let Some(mut shell) = Shell::start(&database.url()) else { return };
    shell.types("unshare --pid --fork --mount-proc $RUN sh -c 'read x'; echo code $?$?\n");
    shell.process.says("which pgdsync cannot give it");
    // Ctrl-C.
    shell.types("\x03");
    shell.process.says("code 130130");
    shell.types("exit\n");
    assert!(shell.process.ends().success());
}

#[test]
fn an_interrupt_from_the_terminal_ends_the_command() {
    let database = Server::shared().database().unwrap();
    let Some(mut shell) = Shell::start(&database.url()) else { return };
    for command in ["sleep 1000", "cat"] {
        shell.types(&format!("$RUN sh -c 'echo re''ady; exec {command}'\n"));
        shell.process.says("ready");
        // Ctrl-C. As long as `cat` lives, it may have the next keys.
        shell.types("\x03");
        becomes("the holders", &0_i64, || database.client().unwrap().query_one(HELD, &[]).unwrap().get(0));
        shell.types("echo code $?$?\n");
        shell.process.says("code 130130");
    }
    shell.types("exit\n");
    assert!(shell.process.ends().success());
}

/// A pager has the terminal; the command in front of it does not ask for it.
#[test]
fn a_command_in_a_pipe_does_not_take_the_terminal_away() {
    let database = Server::shared().database().unwrap();
    let Some(mut shell) = Shell::start(&database.url()) else { return };
    shell.types("$RUN sh -c 'echo re''ady; sleep 0.5' | (cat; read x < /dev/tty; echo \"g\"ot $x)\n");
    shell.process.says("ready");
    shell.types("key\n");
    shell.process.says("got key");
    shell.types("exit\n");
    assert!(shell.process.ends().success());
}
