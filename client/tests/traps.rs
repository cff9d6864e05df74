//! How other systems broke, and that this one does not, on the device's side. docs/traps.md has the whole list.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod host;

use std::process::Command;
use std::sync::{Arc, OnceLock};

use host::{FakeHost, TestTlb, notice, number, page, pages, space};
use parking_lot::Mutex;
use shootdown_client::{
    Access, Device, DeviceTlb, FlushAllCause, Flushed, Invalidation, Mapping, Subscription,
};
use shootdown_proto::message::DeviceSays;

/// A TLB whose flush gives up everything of the page: its mapping, the subscription that it is of, and a new
/// fault of its own that it does not wait for.
#[derive(Default)]
struct Quitter {
    device: OnceLock<std::sync::Weak<Device<Quitter>>>,
    mapping: Mutex<Option<Mapping>>,
    subscription: Mutex<Option<Subscription>>,
}

impl DeviceTlb for Quitter {
    async fn invalidate(&self, invalidation: Invalidation) -> Flushed {
        if invalidation.notice.is_some() {
            drop(self.mapping.lock().take());
            if let Some(subscription) = self.subscription.lock().take() {
                // Not waited for here: its answer comes after this flush's ack.
                drop(tokio::spawn(async move { subscription.unsubscribe().await }));
            }
            if let Some(device) = self.device.get().and_then(std::sync::Weak::upgrade) {
                let range = invalidation.range;
                drop(tokio::spawn(async move { device.fault(space(), range, Access::Read).await.map(drop) }));
            }
        }
        Flushed::default()
    }

    async fn flush_all(&self, _: FlushAllCause) {}
}

/// Traps 16 and 31: the library's callback ran under a lock that the freeing thread held, or that it needed
/// itself.
#[tokio::test]
async fn a_flush_may_unsubscribe_drop_its_mapping_and_fault_and_is_acked() {
    let mut host = FakeHost::start();
    let tlb = Arc::new(Quitter::default());
    let (device, mut session) = host.connect(host.config(), &tlb).await;
    let device = Arc::new(device);
    tlb.device.set(Arc::downgrade(&device)).unwrap();
    *tlb.subscription.lock() = Some(session.subscribe(&device, pages(0, 16)).await);
    *tlb.mapping.lock() = Some(session.mapped(&device, 1).await);
    session.notices([notice(1, page(1))]).await;
    let (mut acked, mut unsubscribed) = (false, false);
    while !(acked && unsubscribed) {
        match session.hear().await {
            DeviceSays::Ack { ack, .. } => acked |= ack.through == Some(number(1)),
            DeviceSays::Unsubscribe { .. } => unsubscribed = true,
            DeviceSays::Young { .. } | DeviceSays::Fault(_) => {}
            other => panic!("{other:?}"),
        }
    }
}

/// Trap 33: a child process held the parent's registration. Whatever a device's program starts has no
/// descriptor of its session.
#[tokio::test]
async fn a_child_process_holds_no_session() {
    let mut host = FakeHost::start();
    let tlb = TestTlb::new();
    let (device, mut session) = host.connect(host.config(), &tlb).await;
    let _subscription = session.subscribe(&device, pages(0, 1)).await;
    let sockets = |listed: &str| listed.lines().filter(|line| line.contains("socket:")).count();
    let own = std::fs::read_dir("/proc/self/fd").unwrap();
    let own: Vec<_> = own
        .filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok())
        .map(|target| target.display().to_string())
        .collect();
    assert!(sockets(&own.join("\n")) > 0, "the session is on a socket: {own:?}");
    let child = Command::new("ls").args(["-l", "/proc/self/fd"]).output().unwrap();
    assert!(child.status.success());
    let listed = String::from_utf8(child.stdout).unwrap();
    assert_eq!(sockets(&listed), 0, "{listed}");
}
