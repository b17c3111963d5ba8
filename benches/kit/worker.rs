//! Processes of a bench's own: it starts itself again, with arguments that only it knows.
//!
//! A worker and its bench talk in lines: over the worker's standard output, and over its standard input, whose end
//! tells the worker to end too.

use std::io::{self, BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// The argument that makes a process a worker.
const MARK: &str = "worker";

/// In the environment rather than in an argument: it may hold a password.
const URL: &str = "DATABASE_URL";

/// A worker as its bench sees it. Dropping it kills the process.
pub(crate) struct Worker {
    process: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Worker {
    pub(crate) fn start(url: &str, arguments: &[String]) -> Self {
        let mut process = Command::new(std::env::current_exe().expect("our program"))
            .arg(MARK)
            .args(arguments)
            .env(URL, url)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("a worker");
        let input = process.stdin.take();
        let output = BufReader::new(process.stdout.take().expect("its output"));
        Self { process, input, output }
    }

    /// The next line that it says.
    pub(crate) fn hear(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).expect("its output");
        assert!(line.ends_with('\n'), "a worker has ended: {:?}", self.process.wait());
        line.trim_end().to_owned()
    }

    /// The next line, as figures.
    pub(crate) fn figures<const K: usize>(&mut self) -> [f64; K] {
        let line = self.hear();
        let figures: Vec<f64> = line.split(' ').map(|word| word.parse().expect("a figure")).collect();
        figures.try_into().unwrap_or_else(|_| panic!("a worker said {line:?}"))
    }

    pub(crate) fn tell(&mut self, line: &str) {
        let input = self.input.as_mut().expect("its input");
        input.write_all(format!("{line}\n").as_bytes()).expect("its input");
    }

    /// Lets it end, and waits until it has.
    pub(crate) fn end(mut self) {
        self.input = None;
        let status = self.process.wait().expect("its end");
        assert!(status.success(), "a worker ended with {status}");
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // It has ended already, unless the bench has failed.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The address of the database and the arguments, if this process is a worker.
pub(crate) fn orders() -> Option<(String, Vec<String>)> {
    let mut arguments = std::env::args().skip(1);
    (arguments.next()? == MARK).then(|| (std::env::var(URL).expect("a URL"), arguments.collect()))
}

/// Tells the bench a line.
pub(crate) fn say(line: &str) {
    let mut out = io::stdout().lock();
    out.write_all(format!("{line}\n").as_bytes()).and_then(|()| out.flush()).expect("the bench listens");
}

/// Tells the bench figures.
pub(crate) fn say_figures(figures: &[f64]) {
    say(&figures.iter().map(f64::to_string).collect::<Vec<_>>().join(" "));
}

/// Waits for the next line of the bench; the process ends if the bench has gone.
pub(crate) fn wait_for_word() -> String {
    let mut line = String::new();
    match io::stdin().lock().read_line(&mut line) {
        Ok(length) if length > 0 => line.trim_end().to_owned(),
        _ => std::process::exit(0),
    }
}

/// Waits until the bench has heard enough.
pub(crate) fn wait_for_the_end() {
    // An error is an end too.
    let _ = io::copy(&mut io::stdin().lock(), &mut io::sink());
}
