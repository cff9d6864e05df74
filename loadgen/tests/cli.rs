//! The command line: what is refused, and how.

mod util;

use util::run;

#[test]
fn a_wrong_command_line_is_refused_with_what_would_do() {
    let cases: [(&[&str], &str); 13] = [
        (&[], "Usage"),
        (&["bogus"], "bogus"),
        (&["check", "--paths", "mumap"], "munmap"),
        (&["check", "--break", "nothing"], "release-before-ack"),
        (&["check", "--break", "nothing"], "mprotect-write-kept"),
        (&["check", "--all", "--paths", "cow"], "cannot be used with"),
        (&["check", "--seconds", "0"], "more than 0"),
        (&["check", "--devices", "0"], "1..=64"),
        (&["check", "--write-ratio", "2"], "0 to 1"),
        (&["demo", "--flush-time", "often"], "fixed:500us"),
        (&["demo", "--output", "yaml"], "json"),
        (&["run"], "--source"),
        (&["run", "--source", "nowhere", "--device-endpoint", "unix:/d"], "unix:/PATH"),
    ];
    for (args, told) in cases {
        let run = run(args);
        assert_eq!(run.code, Some(2), "{args:?}: {run:#?}");
        assert!(run.stderr.contains(told), "{args:?} does not tell of {told}: {run:#?}");
    }
}

#[test]
fn an_open_and_a_closed_loop_exclude_each_other() {
    let ends = ["--source", "unix:/s", "--device-endpoint", "unix:/d"];
    let run = run(&[&["run", "--rate", "5", "--closed-loop", "2"], &ends[..]].concat());
    assert_eq!(run.code, Some(2), "{run:#?}");
}

#[test]
fn help_tells_of_no_hidden_process() {
    let output = util::program(&["--help"]).output().unwrap();
    let help = String::from_utf8(output.stdout).unwrap();
    assert!(help.contains("demo") && help.contains("check") && !help.contains("host-agent"), "{help}");
}

#[test]
fn a_host_agent_that_is_not_there_is_a_failure_and_not_a_wrong_command_line() {
    let dir = tempfile::tempdir().unwrap();
    let socket = format!("unix:{}", dir.path().join("none").display());
    let run = run(&["run", "--source", &socket, "--device-endpoint", &socket]);
    assert_eq!(run.code, Some(70), "{run:#?}");
    assert!(run.stderr.contains("does not answer"), "{run:#?}");
}
