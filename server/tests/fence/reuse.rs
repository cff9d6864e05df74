//! What a fence has to reach before the pages are somebody else's.

use std::sync::Arc;
use std::time::Duration;

use shootdown_core::{Access, AddrRange, AddressSpaceId, FrameNumber};
use shootdown_proto::error::Reason;
use shootdown_proto::v1;
use shootdown_proto::v1::page_service_client::PageServiceClient;
use shootdown_server::Fencer;
use shootdown_server::source::Outcome;
use tokio::task::JoinHandle;
use tonic::Status;

use super::{long_lease, rule, script};
use crate::common::{Agent, Device, log, pages, soon, until};

/// 15: a session is Fenced, for `PageService`, before a round hears of it, and an access that is going on then ends
/// first. Only then are the pages free, and granted again.
///
/// Each connection has a shard of its own, for what stands still here holds its thread up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fence_reaches_reuse() {
    const PAGES: u64 = 4;
    let folder = tempfile::tempdir().unwrap();
    let program = script(folder.path(), "fence", "exit 0");
    let agent = Agent::start_with(|config| {
        long_lease(config);
        config.shards = 4;
        config.host.fencers = vec![rule("reached", Fencer::Command(program), Duration::from_secs(10))];
    });
    let write_begun = log::stop("reached", "a device writes frames");
    let fenced = log::stop("reached", "a device is fenced");
    let memory = agent.running.as_ref().unwrap().memory().clone();
    let frames = Arc::clone(agent.running.as_ref().unwrap().frames());
    let space = memory.create("reused").unwrap();
    memory.map(space, pages(0, PAGES), Access::Write).unwrap();
    for page in 0..PAGES {
        memory.store(space, page * 4096, b"before").await.unwrap();
    }
    // Its session is the lower one, so that rounds are on its shard.
    let mut other = agent.device("other").await;
    other.subscribe(space, pages(0, PAGES)).await;
    let mut reached = agent.device("reached").await;
    reached.subscribe(space, pages(0, PAGES)).await;
    let granted = granted_frames(&mut reached, space, pages(0, PAGES)).await;
    let lives = || granted.iter().map(|frame| frames.generation(FrameNumber(*frame))).collect::<Vec<_>>();
    let first_lives = lives();
    let (session_id, epoch) = (reached.session, reached.epoch);
    let spans: Vec<_> =
        granted.iter().map(|frame| v1::FrameSpan { frame: *frame, offset: 0, length: 4096 }).collect();
    let data = vec![0x55; PAGES as usize * 4096].into();
    let write = v1::WriteRequest { session_id, epoch, spans: spans.clone(), data };
    let read = v1::ReadRequest { session_id, epoch, spans };
    let mut early = PageServiceClient::new(agent.channel("device.sock").await);
    let mut late = PageServiceClient::new(agent.channel("device.sock").await);

    // An access is going on when the fencer confirms.
    let going_on = tokio::spawn({
        let write = write.clone();
        async move { early.write(write).await }
    });
    until(|| write_begun.is_reached()).await;
    let mut releasing = tokio::spawn({
        let memory = memory.clone();
        async move { memory.unmap(space, pages(0, PAGES)).await }
    });
    other.notice().await;
    other.ack(1).await;
    // It is not the access that goes on which this waits for.
    until(|| fenced.is_reached()).await;

    // The session is over, and no round has heard of it: what would begin now is refused.
    let over =
        |status: Status| assert_eq!(Reason::of_status(&status), Some(Reason::SessionFenced), "{status:?}");
    over(soon(late.write(write.clone())).await.unwrap_err());
    over(soon(late.read(read.clone())).await.unwrap_err());
    assert!(!is_done_in_a_while(&mut releasing).await, "it is over for rounds before it is for accesses");
    fenced.release();

    // Nor does one hear of it while the access is going on.
    assert!(!is_done_in_a_while(&mut releasing).await, "an access of the fenced session is going on");
    assert_eq!(lives(), first_lives, "nothing is freed");
    assert!(memory.map(space, pages(0, PAGES), Access::Write).is_err(), "nothing can be put there");
    let mut content = bytes::BytesMut::new();
    let whole = |frame: &u64| shootdown_proto::message::FrameSpan {
        frame: FrameNumber(*frame),
        offset: 0,
        length: 4096,
    };
    let all: Vec<_> = granted.iter().map(whole).collect();
    frames.read(&all, &mut content).unwrap();
    assert!(content.chunks(4096).all(|page| page.starts_with(b"before")), "it has written nothing yet");
    write_begun.release();
    soon(going_on).await.unwrap().expect("it began before the fence");
    let released = soon(releasing).await.unwrap().unwrap();
    assert_eq!(released.frames as u64, PAGES);
    let targets = &released.rounds[0].targets;
    assert_eq!([targets[0].outcome, targets[1].outcome], [Outcome::Acked, Outcome::Fenced]);
    reached.notice().await;
    let (error, _) = reached.last_word().await;
    assert_eq!(error.reason(), Reason::SessionFenced);

    // The pages are somebody else's.
    memory.map(space, pages(0, PAGES), Access::Write).unwrap();
    let mut again = granted_frames(&mut other, space, pages(0, PAGES)).await;
    again.sort_unstable();
    let mut before = granted.clone();
    before.sort_unstable();
    assert_eq!(again, before, "the same frames");
    for status in [late.write(write).await.unwrap_err(), late.read(read).await.unwrap_err()] {
        assert!(matches!(Reason::of_status(&status), Some(Reason::SessionFenced | Reason::SessionUnknown)));
    }
    content.clear();
    frames.read(&all, &mut content).unwrap();
    assert!(content.iter().all(|byte| *byte == 0), "written through a fenced session");
    assert_eq!(frames.broken_poison(), 0, "written through a fenced session while they were free");
    assert_eq!(log::lines("reached", "a device writes frames").len(), 1, "no other access began");
    assert_eq!(log::lines("reached", "a device reads frames").len(), 0);
}

async fn granted_frames(device: &mut Device, space: AddressSpaceId, range: AddrRange) -> Vec<u64> {
    device.start_fault(space, range).await;
    device.grant().await.translations.iter().map(|granted| granted.frame).collect()
}

/// For what must not happen: it has had many times as long as it takes.
async fn is_done_in_a_while<T>(task: &mut JoinHandle<T>) -> bool {
    tokio::time::timeout(Duration::from_millis(200), task).await.is_ok()
}
