use std::sync::Barrier;
use std::time::Duration;

use shootdown_core::round::Outcome;
use shootdown_core::{Cause, CauseSet, PageSize};
use shootdown_proto::message::{Hello, PROTOCOL_VERSIONS, Subscribe};

use super::*;
use crate::config::Settings;
use crate::host::Host;
use crate::source::rpc::RpcSource;
use crate::source::{Invalidation, Notifier as _, Wait};
use crate::vigil::Vigil;

/// Invariant 15: a session is Fenced, and what it has begun to read or write is over, before a round hears of
/// it. Here an access stands still for as long as the test likes.
#[tokio::test]
async fn fence_reaches_reuse() {
    let settings = Settings { listen: vec!["127.0.0.1:0".parse().unwrap()], ..Settings::default() };
    let host = Host::new(settings.resolve().unwrap().host, tokio::runtime::Handle::current());
    let vigil = Arc::new(Vigil::new(Duration::ZERO, host.clock()));
    let shard = Shard { index: 0, runtime: tokio::runtime::Handle::current(), vigil };
    let hello = Hello {
        device: DeviceId::new("gpu").unwrap(),
        incarnation: Incarnation::FIRST,
        versions: PROTOCOL_VERSIONS.to_vec(),
        window: None,
        page_sizes: vec![PageSize::BASE],
        enforces_lease: true,
        change_pte: false,
        resume: None,
        clock_id: String::new(),
    };
    let opened = handshake::open(&host, &hello, shard).await.unwrap();
    let (session, line) = (opened.handle, opened.line);
    let address_space = host.register("reused", Arc::new(RpcSource::default())).unwrap();
    let ranges = vec![AddrRange::ALL];
    let ask = Subscribe {
        request: RequestId::MIN,
        address_space,
        ranges,
        causes: CauseSet::EVERY,
        wants_end: false,
    };
    session.subscribe(&host, line, ask);
    let (range, wait) = (AddrRange::page_of(0, PageSize::BASE), Wait::ForTargets);
    let unmap =
        Invalidation { address_space, range, cause: Cause::Unmap, owner: None, wait, resident_pages: None };
    let source = host.clone();
    let round = tokio::spawn(async move { source.invalidate_range_start(unmap).await.unwrap() });
    while host.rounds_in_flight() == 0 {
        tokio::task::yield_now().await;
    }

    let (begun, end) = (Arc::new(Barrier::new(2)), Arc::new(Barrier::new(2)));
    let accessing = std::thread::spawn({
        let (session, begun, end) = (Arc::clone(&session), Arc::clone(&begun), Arc::clone(&end));
        move || {
            session.access(|| {
                begun.wait();
                end.wait();
            })
        }
    });
    begun.wait();
    let fencing = std::thread::spawn({
        let session = Arc::clone(&session);
        move || session.fence()
    });
    while session.phase() != Phase::Fenced {
        tokio::task::yield_now().await;
    }
    for _ in 0..50 {
        tokio::time::sleep(Duration::from_millis(1)).await;
        assert!(!round.is_finished(), "an access of the fenced session is going on");
    }
    end.wait();
    let result = tokio::time::timeout(Duration::from_secs(20), round).await.unwrap().unwrap();
    assert!(result.is_quiesced() && result.targets[0].outcome == Outcome::Fenced);
    assert!(accessing.join().unwrap().is_some(), "it had begun before");
    fencing.join().unwrap();
    assert!(session.access(|| ()).is_none(), "none begins any more");
}
