//! How a session is kept and how it ends; subscriptions and pages, which end with it.

mod host;

use std::sync::Arc;

use host::{Call, FakeHost, TestTlb, notice, notice_of, number, page, pages, soon, space};
use parking_lot::Mutex;
use shootdown_client::{
    Access, CommitError, Connector, Counts, EndCause, FaultError, FlushAllCause, FrameNumber, FrameSpan,
    SubscriptionId, Translation, UseRefused,
};
use shootdown_core::NoticeKind;
use shootdown_proto::message::{DeviceSays, HostSays};

#[tokio::test]
async fn uses_are_refused_when_the_session_is_lost() {
    let mut host = FakeHost::start();
    let tlb = TestTlb::new();
    let (device, mut session) = host.subscribed(host.config(), &tlb).await;
    let mapping = session.mapped(&device, 1).await;
    drop(mapping.begin_use().unwrap());
    let (grant, ()) = tokio::join!(soon(device.fault_ticketed(space(), pages(2, 2), Access::Read)), async {
        let fault = session.fault().await;
        session.grant(&fault).await;
    });
    let [one, two] = grant.unwrap().tickets.try_into().unwrap();
    let held = tlb.hold_flush_all();
    drop(session);
    tlb.wait_for_flush_all(FlushAllCause::Lost).await;
    assert_eq!(mapping.begin_use().unwrap_err(), UseRefused::SessionEnded);
    assert_eq!(device.gate().check(), Err(UseRefused::SessionEnded));
    assert!(!device.is_live());
    assert_eq!(one.commit().unwrap_err(), CommitError::Closed);
    assert_eq!(two.commit_raw().unwrap_err(), CommitError::Closed, "nothing would ask the gate for it");
    let faulted = device.fault(space(), page(2), Access::Read).await;
    assert!(matches!(faulted, Err(FaultError::NotLive(_))));
    held.send(()).unwrap();
    assert!(matches!(soon(device.lost()).await.cause, EndCause::Closed | EndCause::Transport(_)));
}

#[tokio::test]
async fn a_session_is_lost_when_its_host_is_killed() {
    let mut host = FakeHost::start();
    let tlb = TestTlb::new();
    let (device, session) = host.subscribed(host.config(), &tlb).await;
    let faulting = soon(device.fault(space(), page(1), Access::Read));
    let (faulted, ()) = tokio::join!(faulting, async {
        host.kill();
        drop(session);
    });
    assert!(matches!(faulted, Err(FaultError::NotLive(_))));
    soon(device.lost()).await;
}

#[tokio::test]
async fn a_connector_of_ones_own_carries_session_and_pages() {
    let mut host = FakeHost::start();
    let tlb = TestTlb::new();
    let mut config = host.config();
    let asked = Arc::new(Mutex::new(Vec::new()));
    let (shootdown_client::Endpoint::Unix(path), seen) = (config.endpoint.clone(), Arc::clone(&asked)) else {
        panic!("the host of these tests listens on a Unix socket");
    };
    // A place that only the connector knows of.
    config.endpoint = "tcp://tunnel:1".parse().unwrap();
    config.connector = Connector::from_fn(move |endpoint| {
        seen.lock().push(endpoint.to_string());
        tokio::net::UnixStream::connect(path.clone())
    });
    let (device, mut session) = host.subscribed(config, &tlb).await;
    let mapping = session.mapped(&device, 1).await;
    let in_use = mapping.begin_use().unwrap();
    let span = FrameSpan { frame: in_use.frame(), offset: 0, length: 8 };
    let read = soon(device.pages().unwrap().read(&[span])).await.unwrap();
    assert_eq!(read, vec![0; 8]);
    assert_eq!(*asked.lock(), ["tcp://tunnel:1", "tcp://tunnel:1"], "one connection for each");
}

#[tokio::test]
async fn lost_waits_for_the_uses_that_are_open() {
    let mut host = FakeHost::start();
    let tlb = TestTlb::new();
    let (device, mut session) = host.subscribed(host.config(), &tlb).await;
    let open = session.mapped(&device, 1).await.begin_use().unwrap();
    drop(session);
    tlb.wait_for_flush_all(FlushAllCause::Lost).await;
    let mut lost = Box::pin(device.lost());
    assert!(futures_util::poll!(&mut lost).is_pending());
    drop(open);
    soon(lost).await;
}

/// A clock that the test sets.
#[tokio::test]
async fn leaving_flushes_everything_before_it_says_so() {
    let mut host = FakeHost::start();
    let tlb = TestTlb::new();
    let (device, mut session) = host.subscribed(host.config(), &tlb).await;
    let mapping = session.mapped(&device, 1).await;
    let open = mapping.begin_use().unwrap();
    let held = tlb.hold_flush_all();
    let leaving = tokio::spawn({
        let device = device.clone();
        async move { device.leave().await }
    });
    tlb.wait_for_flush_all(FlushAllCause::Leaving).await;
    assert!(mapping.begin_use().is_err() && device.fault(space(), page(2), Access::Read).await.is_err());
    device.pages().unwrap().write(&[span(1)], vec![9; 8].into()).await.expect("dirty bytes may go back");
    // Asked after the flush was held: what follows shows that nothing was said meanwhile.
    session.notices([notice(1, page(1))]).await;
    held.send(()).unwrap();
    drop(open);
    let words = session.last_words().await;
    assert_eq!(words.last(), Some(&DeviceSays::Leave));
    assert_eq!(words.iter().filter(|it| **it == DeviceSays::Leave).count(), 1);
    assert!(
        words.contains(&DeviceSays::Young { address_space: space(), ranges: vec![page(1)] }),
        "{words:?}"
    );
    let written = device.pages().unwrap().write(&[span(1)], vec![9; 8].into()).await;
    assert!(written.is_err(), "after Leave nothing goes back any more");
    drop(session);
    assert!(matches!(soon(leaving).await.unwrap().cause, EndCause::Left));
}

fn span(frame: u64) -> shootdown_client::FrameSpan {
    shootdown_client::FrameSpan { frame: FrameNumber(frame), offset: 0, length: 8 }
}

#[tokio::test]
async fn a_device_whose_last_handle_is_dropped_leaves() {
    let mut host = FakeHost::start();
    let tlb = TestTlb::new();
    let (device, mut session) = host.connect(host.config(), &tlb).await;
    let (gate, second) = (device.gate(), device.clone());
    drop(device);
    assert_eq!(gate.check(), Ok(()));
    drop(second);
    assert_eq!(gate.check(), Err(UseRefused::SessionEnded));
    assert_eq!(session.last_words().await, [DeviceSays::Leave]);
}

#[tokio::test]
async fn pages_are_read_and_written_by_frame() {
    let mut host = FakeHost::start();
    let tlb = TestTlb::new();
    let (device, _session) = host.connect(host.config(), &tlb).await;
    let pages = device.pages().unwrap();
    pages.write(&[span(4), span(5)], (0..16).collect::<Vec<u8>>().into()).await.unwrap();
    assert_eq!(pages.read(&[span(5), span(4)]).await.unwrap()[..4], [8, 9, 10, 11]);
    assert!(pages.read(&[]).await.is_err());
    assert!(pages.write(&[span(4)], vec![0; 7].into()).await.is_err(), "a byte is missing");
}

/// Invariant 6, as far as a device can hold it.
#[tokio::test]
async fn unsubscribe_barrier() {
    let mut host = FakeHost::start();
    let tlb = TestTlb::new();
    let (device, mut session) = host.connect(host.config(), &tlb).await;
    let subscription = session.subscribe(&device, pages(0, 16)).await;
    let mapping = session.mapped(&device, 1).await;
    let open = mapping.begin_use().unwrap();
    // A fault that is on its way when the subscription is ended.
    let mut faulting = Box::pin(device.fault(space(), page(2), Access::Read));
    let fault = tokio::select! {
        biased;
        _ = &mut faulting => panic!("nobody granted it"),
        fault = session.fault() => fault,
    };
    tlb.calls().await;
    let mut leaving = Box::pin(subscription.unsubscribe());
    assert!(futures_util::poll!(&mut leaving).is_pending());
    assert!(
        matches!(tlb.call().await, Call::Invalidate(it) if it.range == pages(0, 16) && it.notice.is_none())
    );
    assert_eq!(mapping.begin_use().unwrap_err(), UseRefused::Revoked);
    session.grant(&fault).await;
    assert!(
        matches!(soon(faulting).await, Err(FaultError::NotSubscribed)),
        "nobody would be told of its end"
    );
    assert!(matches!(device.fault(space(), page(3), Access::Read).await, Err(FaultError::NotSubscribed)));
    // The host agent hears of it when the use has ended, not before: the ack of another notice comes first.
    session.notices([notice(1, page(900))]).await;
    assert_eq!(session.ack().await.through, Some(number(1)));
    assert!(futures_util::poll!(&mut leaving).is_pending());
    drop(open);
    let (left, ()) = tokio::join!(soon(leaving), async {
        assert!(matches!(session.hear().await, DeviceSays::Young { .. }));
        let DeviceSays::Unsubscribe { request, subscription } = session.hear().await else {
            panic!("an end")
        };
        session.say(HostSays::Unsubscribed { request, subscription }).await;
    });
    left.unwrap();
    assert_eq!(device.counts(), Counts::default());
}

#[tokio::test]
async fn a_subscription_that_nobody_waits_for_is_ended_again() {
    let mut host = FakeHost::start();
    let tlb = TestTlb::new();
    let (device, mut session) = host.connect(host.config(), &tlb).await;
    let request = {
        let ranges = [page(1)];
        let mut subscribing = Box::pin(device.subscribe(space(), &ranges, Default::default()));
        let asked = tokio::select! {
            biased;
            _ = &mut subscribing => panic!("nobody answered it"),
            asked = session.hear() => asked,
        };
        let DeviceSays::Subscribe(subscribe) = asked else { panic!("{asked:?}") };
        subscribe.request
    };
    let subscription = SubscriptionId::FIRST;
    session.say(HostSays::Subscribed { request, subscription, seq: None }).await;
    let ended = session.hear().await;
    assert!(
        matches!(ended, DeviceSays::Unsubscribe { subscription: it, .. } if it == subscription),
        "{ended:?}"
    );
}

/// The host agent counts a subscription as cover as soon as it is made; the device may not, until `subscribe`
/// has returned it: ended again because nobody took it, it takes no flush with it.
#[tokio::test]
async fn nothing_is_faulted_on_a_subscription_that_nobody_has_taken() {
    let mut host = FakeHost::start();
    let tlb = TestTlb::new();
    let (device, mut session) = host.connect(host.config(), &tlb).await;
    let faulted = device.fault(space(), page(1), Access::Read).await;
    assert!(matches!(faulted, Err(FaultError::NotSubscribed)), "{faulted:?}");

    let ranges = [page(1)];
    let mut subscribing = Box::pin(device.subscribe(space(), &ranges, Default::default()));
    let asked = tokio::select! {
        biased;
        _ = &mut subscribing => panic!("nobody answered it"),
        asked = session.hear() => asked,
    };
    let DeviceSays::Subscribe(subscribe) = asked else { panic!("{asked:?}") };
    let (request, subscription) = (subscribe.request, SubscriptionId::FIRST);
    session.say(HostSays::Subscribed { request, subscription, seq: None }).await;
    // The answer is here, and whoever asked has not looked at it.
    session.notices([notice(1, page(900))]).await;
    session.ack().await;
    let faulted = soon(device.fault(space(), page(1), Access::Read)).await;
    assert!(matches!(faulted, Err(FaultError::NotSubscribed)), "{faulted:?}");
    drop(subscribing);
    assert!(matches!(session.hear().await, DeviceSays::Unsubscribe { .. }));
    assert_eq!(device.counts().mappings, 0, "nothing outlives it");
}

/// As above, with the replacement of a CHANGE_PTE in the place of a grant, and a subscription that is ended.
#[tokio::test]
async fn no_replacement_is_taken_that_no_subscription_covers() {
    let mut host = FakeHost::start();
    let tlb = TestTlb::new();
    let (device, mut session) = host.connect(host.config(), &tlb).await;
    let subscription = session.subscribe(&device, page(1)).await;
    let translation = Translation { range: page(1), frame: FrameNumber(70), access: Access::Read };
    let replacement = |number| notice_of(number, NoticeKind::ChangePte(translation), page(1));
    tlb.calls().await;
    session.notices([replacement(1)]).await;
    session.ack().await;
    assert!(matches!(tlb.calls().await[..], [Call::ChangePte(_)]));
    let mut leaving = Box::pin(subscription.unsubscribe());
    assert!(futures_util::poll!(&mut leaving).is_pending());
    tlb.calls().await;
    session.notices([replacement(2)]).await;
    let mut words = Vec::new();
    while !words.iter().any(|says| matches!(says, DeviceSays::Ack { .. })) {
        words.push(session.hear().await);
    }
    assert!(matches!(tlb.calls().await[..], [Call::Invalidate(_)]), "it may only drop what it has");
}
