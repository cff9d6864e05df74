//! The lease on the device's side: what it refuses before a use, and while one is going on.

mod host;

use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use host::{Call, FakeHost, FakeSession, TestTlb, manual_clock, notice, page, soon};
use parking_lot::Mutex;
use shootdown_client::{Device, EndCause, FlushAllCause, Mapping, Moment, UseRefused};
use shootdown_proto::message::{DeviceSays, HostSays};
use tokio::sync::oneshot;

const LEASE: Duration = Duration::from_millis(1000);
const MARGIN: Duration = Duration::from_millis(100);

/// A device with a mapping, on a clock that the test moves.
struct Leased {
    now: Arc<Mutex<Moment>>,
    /// The first moment at which nothing may be used.
    until: Moment,
    mapping: Mapping,
    device: Device<TestTlb>,
    session: FakeSession,
    tlb: Arc<TestTlb>,
    _host: FakeHost,
}

async fn leased() -> Leased {
    let mut host = FakeHost::start();
    let tlb = TestTlb::new();
    let (clock, now) = manual_clock();
    let mut config = host.config();
    config.clock = clock;
    (config.lease_drift_ppm, config.lease_margin) = (0, Some(MARGIN));
    let (device, mut session) = host.connect_with(config, &tlb, |welcome| welcome.lease = LEASE).await;
    drop(session.subscribe(&device, page(1)).await);
    let mapping = session.mapped(&device, 1).await;
    let until = *now.lock() + LEASE - MARGIN;
    Leased { now, until, mapping, device, session, tlb, _host: host }
}

/// The device's half of invariant 14.
#[tokio::test]
async fn uses_are_refused_from_the_moment_at_which_the_lease_runs_out() {
    let mut host = FakeHost::start();
    let tlb = TestTlb::new();
    let (clock, now) = manual_clock();
    let mut config = host.config();
    config.clock = clock;
    (config.lease_drift_ppm, config.lease_margin) = (0, Some(Duration::from_millis(100)));
    let (device, mut session) =
        host.connect_with(config, &tlb, |welcome| welcome.lease = Duration::from_millis(1000)).await;
    let _subscription = session.subscribe(&device, page(1)).await;
    let mapping = session.mapped(&device, 1).await;
    let hello_sent = Moment::from_nanos(1_000_000_000);
    *now.lock() = hello_sent + Duration::from_nanos(899_999_999);
    drop(mapping.begin_use().expect("the lease lasts 1000 ms less the margin"));
    *now.lock() = hello_sent + Duration::from_millis(900);
    // At once, with no timer in between.
    assert_eq!(mapping.begin_use().unwrap_err(), UseRefused::LeaseExpired);
    assert_eq!(device.gate().check(), Err(UseRefused::LeaseExpired));
    tlb.wait_for_flush_all(FlushAllCause::Lost).await;
    session.close().await;
    assert!(matches!(soon(device.lost()).await.cause, EndCause::LeaseExpired));
    assert_eq!(mapping.begin_use().unwrap_err(), UseRefused::SessionEnded);
}

#[tokio::test]
async fn a_lease_counts_from_when_the_heartbeat_was_sent() {
    let mut host = FakeHost::start();
    let tlb = TestTlb::new();
    let (clock, now) = manual_clock();
    let mut config = host.config();
    config.clock = clock;
    (config.lease_drift_ppm, config.lease_margin) = (0, Some(Duration::ZERO));
    let lease = Duration::from_millis(300);
    let (device, mut session) = host.connect_with(config, &tlb, |welcome| welcome.lease = lease).await;
    let gate = device.gate();
    let hello_sent = Moment::from_nanos(1_000_000_000);
    assert_eq!(gate.valid_until(), Some(hello_sent + lease));
    let sent = hello_sent + Duration::from_millis(100);
    *now.lock() = sent;
    let Some(DeviceSays::Heartbeat { request }) = soon(session.next()).await else { panic!("a heartbeat") };
    // The answer is slow; what it grants began when the question was sent.
    *now.lock() = sent + Duration::from_millis(50);
    session.say(HostSays::LeaseRenewed { request, lease }).await;
    session.notices([notice(1, page(1))]).await;
    session.ack().await;
    assert_eq!(gate.valid_until(), Some(sent + lease));
    // An answer to nothing renews nothing.
    let request = request.checked_add(1000).unwrap();
    session.say(HostSays::LeaseRenewed { request, lease: Duration::from_secs(3600) }).await;
    session.notices([notice(2, page(1))]).await;
    session.ack().await;
    assert_eq!(gate.valid_until(), Some(sent + lease));
}

#[tokio::test]
async fn a_use_that_is_going_on_must_be_over_when_the_lease_runs_out() {
    let leased = leased().await;
    let open = leased.mapping.begin_use().unwrap();
    assert_eq!(open.valid_until(), Some(leased.until));
    *leased.now.lock() = leased.until - Duration::from_nanos(1);
    assert_eq!(open.check(), Ok(()));
    *leased.now.lock() = leased.until;
    // At once, with no timer in between.
    assert_eq!(open.check(), Err(UseRefused::LeaseExpired));
    soon(open.expired()).await;
}

#[tokio::test]
async fn a_use_that_is_going_on_outlives_its_notice_and_the_closing_of_its_session() {
    let mut leased = leased().await;
    let open = leased.mapping.begin_use().unwrap();
    leased.session.notices([notice(1, page(1))]).await;
    while !matches!(leased.tlb.call().await, Call::Invalidate(_)) {}
    assert_eq!(open.check(), Ok(()), "its ack waits for the use");
    let leaving = tokio::spawn({
        let device = leased.device.clone();
        async move { device.leave().await }
    });
    leased.tlb.wait_for_flush_all(FlushAllCause::Leaving).await;
    assert_eq!(leased.device.gate().check(), Err(UseRefused::SessionEnded));
    assert_eq!(open.check(), Ok(()), "the flush of everything waits for it, too");
    assert_eq!(open.run_until_expired(async { 7 }).await, Ok(7));
    drop(open);
    let words = leased.session.last_words().await;
    assert_eq!(words.last(), Some(&DeviceSays::Leave));
    drop(soon(leaving).await.unwrap());
}

/// Tells when it is dropped.
struct Dropped(Option<oneshot::Sender<()>>);

impl Drop for Dropped {
    fn drop(&mut self) {
        let _ = self.0.take().map(|tell| tell.send(()));
    }
}

#[tokio::test]
async fn an_access_that_outlasts_the_lease_is_ended_although_no_timer_was_set_for_then() {
    let leased = leased().await;
    let open = leased.mapping.begin_use().unwrap();
    let (tell, dropped) = oneshot::channel();
    let (began, has_begun) = oneshot::channel();
    let access = tokio::spawn(async move {
        let access = async move {
            let _access = Dropped(Some(tell));
            began.send(()).unwrap();
            pending::<()>().await;
        };
        open.run_until_expired(access).await
    });
    soon(has_begun).await.unwrap();
    // As after a sleep of the whole machine: the clock has gone on, the timers have not.
    *leased.now.lock() = leased.until;
    soon(dropped).await.unwrap();
    assert_eq!(soon(access).await.unwrap(), Err(UseRefused::LeaseExpired));
}

#[tokio::test]
async fn an_access_that_is_done_too_late_is_not_believed_and_not_begun_again() {
    let leased = leased().await;
    let open = leased.mapping.begin_use().unwrap();
    let late = async {
        *leased.now.lock() = leased.until;
        "what somebody else wrote"
    };
    assert_eq!(open.run_until_expired(late).await, Err(UseRefused::LeaseExpired));
    let mut polled = false;
    assert_eq!(open.run_until_expired(async { polled = true }).await, Err(UseRefused::LeaseExpired));
    assert!(!polled, "it is refused before its first step");
}

#[tokio::test]
async fn a_renewal_lets_an_access_that_is_going_on_go_on() {
    let mut leased = leased().await;
    let open = leased.mapping.begin_use().unwrap();
    let (done, is_done) = oneshot::channel();
    let access = tokio::spawn(async move { open.run_until_expired(is_done).await });
    let sent = leased.until - Duration::from_nanos(1);
    *leased.now.lock() = sent;
    let request = loop {
        if let Some(DeviceSays::Heartbeat { request }) = soon(leased.session.next()).await {
            break request;
        }
    };
    leased.session.say(HostSays::LeaseRenewed { request, lease: LEASE }).await;
    leased.session.notices([notice(1, page(9))]).await;
    leased.session.ack().await;
    let until = leased.device.gate().valid_until().unwrap();
    assert!(until > leased.until, "{until:?}");
    *leased.now.lock() = until - Duration::from_nanos(1);
    done.send(()).unwrap();
    assert_eq!(soon(access).await.unwrap(), Ok(Ok(())));
}
