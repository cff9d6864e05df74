//! A state directory that is damaged, full, gone, or none.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;

use shootdown_proto::error::Reason;
use shootdown_proto::v1;
use shootdown_proto::v1::session_request::Message as Ask;
use shootdown_proto::v1::session_response::Message as Say;

use crate::common::daemon::{DAEMON, Daemon};
use crate::common::{Device, pages, soon, until, wire};
use crate::place::{Place, SHORT, SHORT_ON_THE_HOST, invalidate, now, register};

/// Whoever is started now does not know of its devices, so it must not be started at once: it is no successor.
#[tokio::test]
async fn a_host_agent_whose_journal_is_removed_stops_and_says_how_long_to_wait() {
    type Step = fn(&Place);
    let steps: [Step; 2] = [
        |place| std::fs::remove_dir_all(place.path("state")).unwrap(),
        |place| std::fs::rename(place.journal(), place.path("moved away")).unwrap(),
    ];
    for step in steps {
        let place = Place::new();
        let mut daemon = place.start(&["--lease", "60s"]);
        let mut notifier = place.notifier().await;
        let space = register(&mut notifier).await;
        let mut device = place.hello("gpu").await;
        device.settled().await;
        step(&place);
        // Nobody is told that devices have stopped: one that starts now may have granted anything.
        let refused = invalidate(&mut notifier, space, None).await.unwrap_err();
        let reason = Reason::of_status(&refused).unwrap();
        assert!(matches!(reason, Reason::HostSuperseded | Reason::Draining), "{refused:?}");
        assert_eq!(device.last_word().await.0.reason(), Reason::HostSuperseded);
        assert_eq!(daemon.exit_code().await, Some(78), "75 is for a successor");
        until(|| daemon.says("the longest lease")).await;
        assert!(!daemon.says("successor"));
    }
}

/// Exit codes that a service manager does not answer with another try.
#[test]
fn a_state_directory_that_cannot_be_written_is_a_wrong_setting() {
    let place = Place::new();
    std::fs::write(place.path("file"), "").unwrap();
    let with = |state: &Path| {
        let listen = format!("unix:{}", place.path("device").display());
        Command::new(DAEMON).args(["--listen", &listen, "--state-dir"]).arg(state).output().unwrap()
    };
    let mut refused = vec![with(&place.path("file").join("state")), with(Path::new("/proc/state"))];
    let closed = place.path("closed");
    std::fs::create_dir(&closed).unwrap();
    std::fs::set_permissions(&closed, std::fs::Permissions::from_mode(0o500)).unwrap();
    if std::fs::write(closed.join("probe"), "").is_err() {
        refused.push(with(&closed));
    } else {
        eprintln!("not tested as root: permissions");
    }
    for refused in refused {
        assert_eq!(refused.status.code(), Some(78), "{refused:?}");
    }
}

/// Nobody knows whose the torn record was; where it may be one whose lease ends nothing, time does not either.
#[tokio::test]
async fn a_torn_record_that_may_be_of_a_device_without_a_lease_waits_for_a_person() {
    let place = Place::new();
    let first = place.start(&SHORT);
    let hello = v1::Hello {
        capabilities: Some(v1::Capabilities { enforces_lease: false, change_pte: false }),
        ..Device::hello_of("nic")
    };
    let mut device = place.device().await;
    device.welcomed(hello).await;
    first.kill();
    let journal = place.journal();
    let bytes = std::fs::read(&journal).unwrap();
    std::fs::write(&journal, &bytes[..bytes.len() - 3]).unwrap();

    // A fencer that knows no such device is not asked.
    let second = place.start(&["--lease", "600ms", "--lease-margin", "50ms", "--fence-command", "/bin/true"]);
    let mut notifier = place.notifier().await;
    let space = register(&mut notifier).await;
    let twice_its_lease = SHORT_ON_THE_HOST * 2;
    let patience = Some(u64::try_from(twice_its_lease.as_millis()).unwrap());
    let waits = invalidate(&mut notifier, space, patience).await.unwrap();
    assert_eq!(waits.verdict(), v1::Verdict::NotQuiesced);
    assert_eq!(waits.targets[0].device_id, "unnamed:torn-journal");
    let session_id = place.sessions().await[0].session_id;
    let mut admin = place.admin().await;
    admin.evict_session(v1::EvictSessionRequest { session_id, is_cut_off: true }).await.unwrap();
    assert_eq!(invalidate(&mut notifier, space, None).await.unwrap().verdict(), v1::Verdict::Quiesced);
    until(|| second.says("accounted for")).await;
}

#[tokio::test]
async fn a_torn_journal_is_started_from_and_a_damaged_one_is_not() {
    let place = Place::new();
    place.one_that_is_killed(&SHORT).await;
    let journal = place.journal();
    let bytes = std::fs::read(&journal).unwrap();
    // Cut in its last record, which was that of the device.
    std::fs::write(&journal, &bytes[..bytes.len() - 3]).unwrap();
    let started = now();
    let second = place.start(&["--lease", "60s"]);
    let mut notifier = place.notifier().await;
    let space = register(&mut notifier).await;
    let result = invalidate(&mut notifier, space, None).await.unwrap();
    assert!(now().since(started) >= SHORT_ON_THE_HOST, "the longest lease is waited for");
    assert_eq!(result.targets[0].device_id, "unnamed:torn-journal");
    second.kill();

    let journal = place.journal();
    let mut bytes = std::fs::read(&journal).unwrap();
    bytes[50] ^= 1;
    std::fs::write(&journal, &bytes).unwrap();
    for more in [&[][..], &["--take-over"]] {
        let refused = place.run(more);
        assert_eq!(refused.status.code(), Some(78), "{refused:?}");
        let text = String::from_utf8(refused.stderr).unwrap();
        assert!(text.contains(journal.to_str().unwrap()) && text.contains("at byte 24"), "{text}");
    }
    assert_eq!(std::fs::read(&journal).unwrap(), bytes, "nothing was changed");
}

/// A disk that is full: the kernel refuses what goes beyond the limit on the size of a file.
#[tokio::test]
async fn a_session_that_cannot_be_written_down_is_refused_and_the_others_go_on() {
    let place = Place::new();
    let mut command = Command::new("sh");
    let limited = "trap '' XFSZ; ulimit -f 16; exec \"$0\" \"$@\"";
    command.args(["-c", limited, DAEMON]).args(place.arguments()).args(["--memory-frames", "1"]);
    let _daemon = Daemon::start(command);
    let mut notifier = place.notifier().await;
    let space = register(&mut notifier).await;
    let mut first = place.hello("first").await;
    first.try_subscribe(space, vec![wire(pages(0, 4))]).await.unwrap();
    let mut welcome = Vec::new();
    let refused = loop {
        assert!(welcome.len() < 400, "8 KiB hold fewer");
        let mut device = place.device().await;
        device.ask(Ask::Hello(Device::hello_of(&format!("gpu{}", welcome.len())))).await;
        match device.say().await {
            Say::Welcome(_) => welcome.push(device),
            Say::Error(error) => break error,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(refused.reason(), Reason::StoreFailed);
    assert!(welcome.len() > 50, "{} fitted", welcome.len());
    // Who is there goes on.
    let round = tokio::spawn({
        let mut notifier = notifier.clone();
        async move { invalidate(&mut notifier, space, None).await.unwrap() }
    });
    let notice = first.notice().await;
    first.ack(notice.number).await;
    assert_eq!(soon(round).await.unwrap().verdict(), v1::Verdict::Quiesced);
    // Room again: those who left take up none.
    for device in &welcome {
        device.ask(Ask::Leave(v1::Leave {})).await;
    }
    soon(async {
        loop {
            let mut device = place.device().await;
            device.ask(Ask::Hello(Device::hello_of("patient"))).await;
            if matches!(device.say().await, Say::Welcome(_)) {
                break;
            }
        }
    })
    .await;
}
