//! What is written for other programs: `catalog`, `completions`, `man`; and an output that nobody reads.

use std::fs::File;
use std::io::Write as _;
use std::process::{Command, Stdio};

use dsync::{CatalogMode, Config, PostgresManager};
use support::{Database, Server};

use crate::common::{PATIENCE, at, hold, pgdsync, run, started};

#[test]
fn a_role_may_use_the_catalog_that_an_administrator_has_made_by_it() {
    let server = Server::start().unwrap();
    let role = "it's \"the\" Role; --";
    let schema = "the Locks";
    let mut administrator = server.client().unwrap();
    let quoted = role.replace('"', "\"\"");
    administrator
        .batch_execute(&format!("CREATE ROLE \"{quoted}\" LOGIN; CREATE ROLE second LOGIN"))
        .unwrap();
    let sql = run(&mut pgdsync(&["catalog", "--grant", role, "--grant=second", "--schema", schema])).well();
    // As an administrator runs it.
    let mut psql = Command::new(server.binaries().program("psql"));
    psql.args(["--single-transaction", "--no-psqlrc", "-v", "ON_ERROR_STOP=1", "-f", "-", &server.url()]);
    let mut child = psql.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(sql.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success());
    for user in [role, "second"] {
        let mut postgres: dsync::postgres::Config = server.url().parse().unwrap();
        postgres.user(user);
        let config = Config::from_postgres(postgres).catalog(CatalogMode::MustExist).schema(schema);
        let manager = PostgresManager::connect(config).unwrap();
        let guard = hold(&manager, "a");
        assert!(guard.term().token().is_some());
        guard.release().unwrap();
        // `once` wants one table more.
        manager.once("b", PATIENCE, PATIENCE, |_| Ok::<_, dsync::Error>(())).unwrap();
    }
    run(&mut pgdsync(&["catalog", "--grant", ""])).badly(64, &["--grant"]);
    run(&mut pgdsync(&["catalog", "--schema", "pg_x"])).badly(64, &["pg_x", "choose another name"]);
}

#[test]
fn shells_and_man_read_what_is_written_for_them() {
    for shell in ["bash", "zsh", "fish"] {
        let script = run(&mut pgdsync(&["completions", shell])).well();
        for verb in ["list", "watch", "completions"] {
            assert!(script.contains(verb), "{shell}: {verb}");
        }
    }
    run(&mut pgdsync(&["completions", "tcsh"])).badly(64, &["bash", "fish"]);
    let script = run(&mut pgdsync(&["completions", "bash"])).well();
    let completes = format!(
        "{script}\nCOMP_WORDS=(pgdsync li); COMP_CWORD=1; _pgdsync pgdsync li pgdsync; echo \"${{COMPREPLY[@]}}\""
    );
    let shell = Command::new("bash").args(["-c", &completes]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&shell.stdout).trim(), "list", "{shell:?}");
    let page = run(&mut pgdsync(&["man"])).well();
    assert!(page.contains(".TH pgdsync 1") && page.contains("list"), "{page}");
    let page = run(&mut pgdsync(&["man", "watch"])).well();
    assert!(
        page.contains(".TH pgdsync-watch 1") && page.contains("interval") && page.contains("url"),
        "{page}"
    );
    run(&mut pgdsync(&["man", "x"])).badly(64, &["no verb"]);
}

#[test]
fn an_output_that_nobody_reads_is_no_failure() {
    let database = Database::fresh().unwrap();
    let url = database.url();
    let manager = started(&url);
    let _guard = hold(&manager, "a");
    for arguments in
        [&["catalog"][..], &["list"], &["show", "a"], &["watch"], &["man"], &["completions", "bash"]]
    {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let ran = run(pgdsync(arguments).env("DATABASE_URL", &url).stdout(writer));
        assert!(ran.code == Some(0) && ran.err.is_empty(), "{arguments:?}: {ran:?}");
    }
    for arguments in [&["catalog"][..], &["list"], &["--help"], &["man"]] {
        let ran = run(pgdsync(arguments).env("DATABASE_URL", &url).stdout(full()));
        ran.badly(74, &["pgdsync: standard output cannot be written"]);
    }
}

/// A disk without room.
fn full() -> File {
    File::options().write(true).open("/dev/full").unwrap()
}

#[test]
fn an_error_that_nobody_can_be_told_has_its_exit_code_all_the_same() {
    let nowhere = "--url=postgres://127.0.0.1:1/postgres";
    for (arguments, code) in [
        (&["dance"][..], 64),
        (&["list", nowhere], 69),
        (&["run", nowhere, "a", "--", "true"], 69),
        (&["run", nowhere, "-n", "#x", "--", "true"], 64),
    ] {
        assert_eq!(run(pgdsync(arguments).stderr(full())).code, Some(code), "{arguments:?}");
    }
    let database = Database::fresh().unwrap();
    for (command, code) in [(&["true"][..], 0), (&["false"], 1), (&["there-is-no-such-command"], 127)] {
        let mut run_it = pgdsync(&[&["run", "-v", "a", "--"], command].concat());
        assert_eq!(
            run(run_it.env("DATABASE_URL", database.url()).stderr(full())).code,
            Some(code),
            "{command:?}"
        );
    }
}

#[test]
fn the_help_of_every_verb_says_what_it_does_in_80_columns() {
    let help = run(&mut pgdsync(&["--help"])).well();
    let verbs = help.lines().skip_while(|line| *line != "Verbs:").skip(1).take_while(|line| !line.is_empty());
    let verbs: Vec<_> =
        verbs.filter(|line| !line.starts_with("   ") && !line.starts_with("  help ")).collect();
    assert_eq!(verbs.len(), 13, "{help}");
    for line in verbs {
        let (verb, what) = line.trim().split_once(' ').unwrap();
        let begin = what.trim().split("  ").next().unwrap();
        for wish in ["-h", "--help"] {
            let help = run(&mut pgdsync(&[verb, wish])).well();
            assert!(help.lines().all(|line| line.len() <= 80), "{help}");
            assert!(help.starts_with(begin), "{begin:?}: {help}");
        }
    }
    let ran = run(&mut pgdsync(&["run", "-x", "a", "--", "true"]));
    assert!(ran.err.starts_with("pgdsync: unexpected argument '-x'"), "{ran:?}");
}

#[test]
fn the_bench_is_a_small_table() {
    let database = Database::fresh().unwrap();
    let url = database.url();
    let ran = at(&url, &["bench", "--rounds=20"]);
    assert!(
        ran.code == Some(0)
            && ran.err.contains("with a token is not measured")
            && ran.out.lines().count() == 4,
        "{ran:?}"
    );
    let _manager = started(&url);
    let table = at(&url, &["bench", "--rounds=20"]).well();
    println!("{table}");
    assert!(table.lines().all(|line| line.len() <= 80) && table.lines().count() == 5, "{table}");
    assert!(
        table.contains("round trip") && table.contains("with a token") && table.contains("hand-over"),
        "{table}"
    );
    for line in at(&url, &["bench", "--rounds=20", "--output=json"]).well().lines() {
        let row: serde_json::Value = serde_json::from_str(line).unwrap();
        let [median, p99] = ["median_seconds", "p99_seconds"].map(|name| row[name].as_f64().unwrap());
        assert!(0.0 < median && median <= p99 && p99 < 30.0, "{row}");
        assert!(row["rounds"] == 20 || row["rounds"] == 2, "{row}");
    }
    // A setting that needs a catalog is for the row that has one.
    let mut bench = pgdsync(&["bench", "--rounds=20"]);
    let strict = run(bench.env("DATABASE_URL", &url).env("DSYNC_TAKEOVER", "after-any-restart")).well();
    assert!(strict.contains("with a token"), "{strict}");
    let mut bench = pgdsync(&["bench", "--rounds=20"]);
    let without = run(bench.env("DATABASE_URL", &url).env("DSYNC_CATALOG", "none")).well();
    assert!(without.lines().count() == 4 && !without.contains("with a token"), "{without}");
    assert_eq!(at(&url, &["list"]).well(), "no lock is held or waited for\n");
}
