//! Programs that cut devices off.

use std::time::Duration;

use shootdown_proto::error::Reason;
use shootdown_proto::v1;
use shootdown_server::Fencer;
use shootdown_server::source::{Outcome, Verdict};

use super::{T_ACK, assert_outlived, lines, long_lease, rule, script, short_lease, silent_targets};
use crate::common::{Agent, quiesced, soon, until};

fn runs(pid: &str) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The state comes after the name, which stands in brackets.
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

#[tokio::test]
async fn exit_status_0_confirms_and_the_round_is_over_before_the_lease() {
    let folder = tempfile::tempdir().unwrap();
    let told = folder.path().join("told");
    let body = format!(
        "echo \"$@\" >> {0}; env | grep -E '^SHOOTDOWN_(DEVICE|EPOCH|HOST|SESSION)' | sort >> {0}",
        told.display()
    );
    let program = script(folder.path(), "fence", &body);
    let agent = Agent::start_with(|config| {
        long_lease(config);
        config.host.fencers = vec![rule("gpu*", Fencer::Command(program), Duration::from_secs(10))];
    });
    let space = agent.space();
    let (mut devices, round) = silent_targets(&agent, space, &["gpu0"]).await;
    let targets = quiesced(round).await;
    assert_eq!(targets[0].outcome, Outcome::Fenced);
    assert!(targets[0].elapsed.unwrap() >= T_ACK, "not before it owed an ack for too long");
    let (error, _) = devices[0].last_word().await;
    assert_eq!(error.reason(), Reason::SessionFenced);
    let (session, epoch) = (devices[0].session, devices[0].epoch);
    let told = lines(&told);
    let arguments = format!(
        "--device-id=gpu0 --device-incarnation=1 --session-id={session} --epoch={epoch} --host-incarnation="
    );
    assert!(told[0].starts_with(&arguments), "{told:#?}");
    let environment = &told[1..];
    assert_eq!(environment[..2], ["SHOOTDOWN_DEVICE_ID=gpu0", "SHOOTDOWN_DEVICE_INCARNATION=1"]);
    assert_eq!(environment[2], format!("SHOOTDOWN_EPOCH={epoch}"));
    assert!(environment[3].starts_with("SHOOTDOWN_HOST_INCARNATION="));
    assert_eq!(environment[4..], [format!("SHOOTDOWN_SESSION_ID={session}")], "asked once");
}

/// Everything that a program can do but exit with 0, one device each. All are asked for again and again; the
/// lease fences them.
#[tokio::test]
async fn no_other_end_of_a_program_confirms() {
    let folder = tempfile::tempdir().unwrap();
    let attempts = |name: &str| folder.path().join(format!("{name}.attempts"));
    let logged = |name: &str, body: &str| {
        script(folder.path(), name, &format!("echo $$ >> {}\n{body}", attempts(name).display()))
    };
    let plain_file = folder.path().join("plain");
    std::fs::write(&plain_file, "exit 0").unwrap();
    let children = folder.path().join("children");
    let hang = format!("sleep 600 & echo $! >> {}\ntrap '' TERM; sleep 600", children.display());
    let programs = [
        ("exit1", logged("exit1", "exit 1")),
        ("exit127", logged("exit127", "exit 127")),
        ("signal", logged("signal", "kill -9 $$")),
        ("hang", logged("hang", &hang)),
        ("missing", folder.path().join("no-such-program")),
        ("not-executable", plain_file),
    ];
    let agent = Agent::start_with(|config| {
        short_lease(config);
        let limit = Duration::from_millis(200);
        let rules =
            programs.iter().map(|(name, program)| rule(name, Fencer::Command(program.clone()), limit));
        config.host.fencers = rules.collect();
    });
    let space = agent.space();
    let (_devices, round) = silent_targets(&agent, space, &programs.each_ref().map(|(name, _)| *name)).await;
    for name in ["exit1", "exit127", "signal", "hang"] {
        until(|| lines(&attempts(name)).len() >= 2).await;
    }
    assert!(!round.is_finished());
    let suspects = agent.listed_sessions().await;
    assert!(suspects.iter().all(|session| session.phase() == v1::SessionPhase::Suspect), "{suspects:#?}");
    assert_outlived(&quiesced(round).await);
    // What hung was killed at its limit, with what it had started.
    let started = [lines(&attempts("hang")), lines(&children)].concat();
    until(|| !started.iter().any(|pid| runs(pid))).await;
}

/// A program that hangs is killed when the host agent is cut, and its children with it.
#[tokio::test]
async fn no_program_outlives_the_host_agent() {
    let folder = tempfile::tempdir().unwrap();
    let pids = folder.path().join("pids");
    let body = format!("sleep 600 & echo $! $$ >> {}; wait", pids.display());
    let program = script(folder.path(), "fence", &body);
    let mut agent = Agent::start_with(|config| {
        long_lease(config);
        config.drain_timeout = Duration::from_millis(100);
        config.host.fencers = vec![rule("*", Fencer::Command(program), Duration::from_secs(600))];
    });
    let space = agent.space();
    let (_devices, round) = silent_targets(&agent, space, &["gpu"]).await;
    until(|| !lines(&pids).is_empty()).await;
    soon(agent.running.take().unwrap().shutdown()).await;
    let result = soon(round).await.unwrap();
    assert_eq!(result.verdict, Verdict::NotQuiesced, "to be cut is not to be confirmed");
    let pids: Vec<String> = lines(&pids)[0].split(' ').map(str::to_owned).collect();
    assert_eq!(pids.len(), 2);
    until(|| !pids.iter().any(|pid| runs(pid))).await;
}
