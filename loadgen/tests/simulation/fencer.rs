//! The fencer's machine: a real `FencerService`, which really cuts devices off, but not each time that it is asked.

use std::sync::Arc;
use std::time::Duration;

use futures_util::stream;
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use shootdown_client::Enforcement;
use shootdown_proto::v1;
use shootdown_proto::v1::fencer_service_server::{FencerService, FencerServiceServer};
use shootdown_server::embed::FencerConnector;
use shootdown_server::{DevicePattern, Fencer, FencerRule};
use tonic::transport::server::Connected;
use tonic::{Request, Response, Status};
use turmoil::net::{TcpListener, TcpStream};

use crate::device;
use crate::device::everywhere;
use crate::fabric::DeviceRun;
use crate::faults::{Fault, Planned};
use crate::plan::{Broken, Plan, STORM, millis};
use crate::shared::{Shared, Stage};
use crate::sockets::{Socket, Sockets};
use crate::trace::{CutOffBy, Reply, What};

/// The fencer's machine.
pub const FENCER: &str = "fencer";

/// Where it listens.
const PORT: u16 = 7402;

/// Keeps what is drawn here apart from what is drawn elsewhere of the same seed.
const OF_ITS_OWN: u64 = 0xF3CE_2000_0000_0001;

/// A fencer of a world.
#[derive(Debug, Clone)]
pub struct FencerPlan {
    /// The devices that it is for.
    pub devices: Vec<usize>,
    /// How long an attempt may take.
    pub time_limit: Duration,
    /// How many in a hundred attempts go wrong, until the faults are over.
    pub unreliable: u32,
}

/// Devices that enforce no lease, fencers, and budgets, in half of the worlds. Nothing that was drawn before it
/// changes.
pub fn vary(plan: &mut Plan) {
    let mut rng = StdRng::seed_from_u64(plan.seed ^ OF_ITS_OWN);
    if rng.random_bool(0.5) {
        return;
    }
    for device in &mut plan.devices {
        if rng.random_bool(0.5) {
            device.enforcement = Enforcement::ByNobody;
        }
    }
    if rng.random_bool(0.6) {
        let all: Vec<usize> = (0..plan.devices.len()).collect();
        plan.fencer = Some(FencerPlan {
            devices: all.into_iter().filter(|_| rng.random_bool(0.7)).collect(),
            // Several round trips of a slow network.
            time_limit: millis(rng.random_range(80..250)),
            unreliable: [0, 50, 90][rng.random_range(0..3)],
        });
        let latest = u64::try_from(STORM.as_millis()).unwrap();
        for _ in 0..rng.random_range(0..3) {
            let (at, lasts) = (millis(rng.random_range(50..latest)), millis(rng.random_range(20..300)));
            plan.faults.push(Planned { at, lasts, fault: Fault::FencerLost });
        }
        plan.faults.sort_by_key(|planned| planned.at);
    }
    if rng.random_bool(0.5) {
        plan.quarantine_pages = rng.random_range(1..7);
    }
}

impl FencerPlan {
    /// How long it may take from when all is well again until it has confirmed. The host agent's pauses grow with the
    /// time for which it was not confirmed, which is at most as long as the faults last.
    pub fn patience(&self) -> Duration {
        millis(1000) + self.time_limit * 2
    }
}

/// What the host agent is told of fencers.
pub fn rules(shared: &Arc<Shared>) -> Vec<FencerRule> {
    let of = |plan: &FencerPlan| {
        let world = Arc::clone(shared);
        let connector = FencerConnector::from_fn(move || connect(Arc::clone(&world)));
        FencerRule {
            devices: plan.devices.iter().map(|index| DevicePattern::new(&device::name(*index))).collect(),
            fencer: Fencer::Embedded(connector),
            time_limit: plan.time_limit,
        }
    };
    shared.plan.fencer.iter().map(of).collect()
}

/// From the host agent's machine.
async fn connect(shared: Arc<Shared>) -> std::io::Result<Socket> {
    let stream = TcpStream::connect((FENCER, PORT)).await?;
    Ok(shared.agents[shared.newest.get()].sockets.add(stream))
}

/// The fencer, which nobody stops.
pub async fn run(shared: Arc<Shared>) -> turmoil::Result {
    let open = (TcpListener::bind(everywhere(PORT)).await?, Sockets::new(Arc::default()));
    let connections = stream::unfold(open, async |(listener, sockets)| {
        let accepted = listener.accept().await.map(|(stream, _)| sockets.add(stream));
        Some((accepted, (listener, sockets)))
    });
    let rng = Arc::new(Mutex::new(shared.rng(4000)));
    let service = FencerServiceServer::new(Switch { shared, rng });
    let serving = tonic::transport::Server::builder().add_service(service).serve_with_incoming(connections);
    Ok(serving.await?)
}

impl Connected for Socket {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

#[derive(Clone)]
struct Switch {
    shared: Arc<Shared>,
    rng: Arc<Mutex<StdRng>>,
}

#[tonic::async_trait]
impl FencerService for Switch {
    async fn fence(&self, request: Request<v1::FenceRequest>) -> Result<Response<v1::FenceResponse>, Status> {
        let request = request.into_inner();
        let run = DeviceRun { device: device::index(&request.device_id), start: request.device_incarnation };
        let (reply, takes) = self.draw();
        self.shared.trace.record(What::FencerAsked { device: run.device, start: run.start, reply });
        let answer =
            |outcome: v1::FenceOutcome| Ok(Response::new(v1::FenceResponse { outcome: outcome.into() }));
        match reply {
            Reply::Confirmed => {
                tokio::time::sleep(takes).await;
                self.cut_off(run);
                answer(v1::FenceOutcome::Confirmed)
            }
            Reply::ConfirmedLate => {
                let limit = self.shared.plan.fencer.as_ref().map_or(takes, |plan| plan.time_limit);
                let switch = self.clone();
                // It goes on when nobody waits for it any more.
                let cut = tokio::spawn(async move {
                    tokio::time::sleep(limit + takes).await;
                    switch.cut_off(run);
                });
                cut.await.map_err(|_| Status::internal("it was stopped"))?;
                answer(v1::FenceOutcome::Confirmed)
            }
            Reply::WordLost => {
                self.cut_off(run);
                Err(Status::unavailable("it is done, and cannot be said"))
            }
            Reply::NotConfirmed => answer(v1::FenceOutcome::NotConfirmed),
            Reply::Unspecified => answer(v1::FenceOutcome::Unspecified),
            Reply::Failed => Err(Status::internal("out of order")),
        }
    }
}

impl Switch {
    fn draw(&self) -> (Reply, Duration) {
        let mut rng = self.rng.lock();
        let takes = millis(rng.random_range(0..12));
        let unreliable = self.shared.plan.fencer.as_ref().map_or(0, |plan| plan.unreliable);
        let is_well = self.shared.stage.get() > Stage::Storm || !rng.random_ratio(unreliable, 100);
        let reply = match rng.random_range(0..5) {
            _ if is_well => Reply::Confirmed,
            0 => Reply::ConfirmedLate,
            1 => Reply::WordLost,
            2 => Reply::NotConfirmed,
            3 => Reply::Unspecified,
            _ => Reply::Failed,
        };
        (reply, takes)
    }

    fn cut_off(&self, run: DeviceRun) {
        if self.shared.plan.broken != Broken::FencerLies {
            self.shared.fabric.cut_off(run, CutOffBy::Fencer, &self.shared.trace);
        }
    }
}
