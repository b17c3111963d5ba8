//! What is no task is answered by the usage and the exit code 2.

use std::process::{Command, Output};

fn xtask(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_xtask")).args(arguments).output().expect("it starts")
}

#[test]
fn a_wrong_task_or_argument_prints_the_usage_and_exits_with_2() {
    for arguments in [&[][..], &["chek"], &["lint", "now"], &["torture", "long"], &["loop", "3"]] {
        let output = xtask(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(said.starts_with("usage: cargo xtask TASK"), "{arguments:?}: {said}");
        assert!(output.stdout.is_empty(), "{arguments:?}");
    }
}
