//! A state directory that goes away, or is none.

use std::os::unix::fs::PermissionsExt as _;

use super::*;

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
    let mut device = Device::on(connect(&place.path("device")).await);
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
    let mut admin = v1::admin_service_client::AdminServiceClient::new(connect(&place.path("admin")).await);
    admin.evict_session(v1::EvictSessionRequest { session_id, is_cut_off: true }).await.unwrap();
    assert_eq!(invalidate(&mut notifier, space, None).await.unwrap().verdict(), v1::Verdict::Quiesced);
    until(|| second.says("accounted for")).await;
}
