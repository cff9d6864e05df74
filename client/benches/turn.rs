//! One notice and its ack over a Unix socket, both ends on one thread: what the SDK adds to an echo of the
//! gRPC library. `cargo bench -p shootdown-client`.
#![allow(missing_docs, reason = "criterion's macros")]
#![allow(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

#[path = "../tests/host/mod.rs"]
mod host;

use std::sync::Arc;

use criterion::{Criterion, criterion_group, criterion_main};
use futures_util::StreamExt as _;
use host::{FakeHost, FakeSession, notice, number, page};
use shootdown_client::{DeviceTlb, Endpoint, FlushAllCause, Flushed, Invalidation};
use shootdown_core::Ack;
use shootdown_proto::message::DeviceSays;
use shootdown_proto::v1;
use shootdown_proto::v1::device_service_client::DeviceServiceClient;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

/// Flushes at once, or after its task has been scheduled once.
struct Quick {
    yields: usize,
}

impl DeviceTlb for Quick {
    async fn invalidate(&self, _: Invalidation) -> Flushed {
        for _ in 0..self.yields {
            tokio::task::yield_now().await;
        }
        Flushed::default()
    }

    async fn flush_all(&self, _: FlushAllCause) {}
}

/// One turn: a notice goes out, its ack comes in.
async fn turn(session: &mut FakeSession, last: &mut u64) {
    *last += 1;
    session.notices([notice(*last, page(*last))]).await;
    while session.ack().await.through != Some(number(*last)) {}
}

/// As many notices in one message as a busy host agent merges.
async fn batch(session: &mut FakeSession, last: &mut u64) {
    let first = *last + 1;
    *last += 256;
    session.notices((first..=*last).map(|n| notice(n, page(n)))).await;
    while session.ack().await.through != Some(number(*last)) {}
}

/// The floor: a client that answers each message with an ack made beforehand, and knows nothing.
async fn echo(endpoint: Endpoint) {
    let Endpoint::Unix(path) = endpoint else { unreachable!("the fake host listens on a Unix socket") };
    let channel = tonic::transport::Endpoint::from_shared(format!("unix:{}", path.display())).unwrap();
    let mut client = DeviceServiceClient::new(channel.connect().await.unwrap());
    let (answers, outbound) = mpsc::channel(64);
    let mut inbound = client.session(ReceiverStream::new(outbound)).await.unwrap().into_inner();
    while let Some(Ok(v1::SessionResponse { message: Some(message) })) = inbound.next().await {
        let v1::session_response::Message::Notices(notices) = message else { continue };
        let through = notices.notices.last().map(|it| number(it.number));
        let ack = DeviceSays::Ack {
            session: shootdown_client::SessionId::new(7),
            ack: Ack { through, ..Ack::default() },
        };
        answers.send(ack.into()).await.unwrap();
    }
}

fn turns(criterion: &mut Criterion) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut group = criterion.benchmark_group("turn");
    let mut measure = |name: &str, session: FakeSession, last: u64| {
        let state = std::cell::RefCell::new((session, last));
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                let (session, last) = &mut *state.borrow_mut();
                runtime.block_on(turn(session, last));
            });
        });
        group.bench_function(format!("{name}, 256 notices"), |bencher| {
            bencher.iter(|| {
                let (session, last) = &mut *state.borrow_mut();
                runtime.block_on(batch(session, last));
            });
        });
    };

    let session = runtime.block_on(async {
        let mut host = FakeHost::start();
        tokio::spawn(echo(host.endpoint.clone()));
        let session = host.session().await;
        drop(host.keep());
        session
    });
    measure("raw echo", session, 0);

    for (name, yields) in [("sdk, flush ready at once", 0), ("sdk, flush that waits", 1)] {
        let (device, session) = runtime.block_on(async {
            let mut host = FakeHost::start();
            let connected = host.connect(host.config(), &Arc::new(Quick { yields })).await;
            drop(host.keep());
            connected
        });
        measure(name, session, 0);
        drop(device);
    }
    group.finish();
}

criterion_group!(benches, turns);
criterion_main!(benches);
