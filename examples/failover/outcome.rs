//! How the program ends.

use std::error::Error;
use std::process::ExitCode;

/// 0 if all went as it should, 1 if not or if something failed, 2 if there is no PostgreSQL to start.
pub(crate) fn exit(program: &str, outcome: Result<bool, Box<dyn Error>>) -> ExitCode {
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{program}: {}", one_line(&*error));
            let missing = error.downcast_ref::<support::Error>().is_some_and(support::Error::is_missing);
            ExitCode::from(if missing { 2 } else { 1 })
        }
    }
}

/// An error with its causes.
pub(crate) fn one_line(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let part = error.to_string();
        if !text.contains(&part) {
            text.push_str(&format!(": {part}"));
        }
        cause = error.source();
    }
    text.replace('\n', " | ")
}
