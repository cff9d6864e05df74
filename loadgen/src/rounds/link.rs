//! The two sides of the host agent: a source that calls it, and devices with nothing to flush.

use std::sync::Arc;

use shootdown_client::{
    AddrRange, AddressSpaceId, Device, DeviceConfig, DeviceId, DeviceTlb, Endpoint, FlushAllCause, Flushed,
    Invalidation, PageSize, SubscribeOptions,
};
use shootdown_proto::v1;
use shootdown_proto::v1::notifier_service_client::NotifierServiceClient;
use tonic::transport::Channel;

use super::RoundsError;
use crate::cli::RoundsArgs;

/// Where the rounds' ranges begin.
const REGION: u64 = 0x20_0000_0000;

/// Ranges that rounds take in turn, one behind the other: rounds in flight do not overlap.
const RANGES: u64 = 65_536;

/// A source and its devices.
#[derive(Debug)]
pub(super) struct Link {
    client: NotifierServiceClient<Channel>,
    address_space: AddressSpaceId,
    range_pages: Vec<u32>,
    devices: Vec<Device<Idle>>,
}

/// A device that holds nothing.
#[derive(Debug)]
pub(super) struct Idle;

impl DeviceTlb for Idle {
    async fn invalidate(&self, _: Invalidation) -> Flushed {
        Flushed::default()
    }

    async fn flush_all(&self, _: FlushAllCause) {}
}

impl Link {
    pub(super) async fn open(args: &RoundsArgs) -> Result<Self, RoundsError> {
        let mut client = NotifierServiceClient::new(connect(&args.source).await?);
        let register = v1::RegisterAddressSpaceRequest {
            name: "loadgen-run".to_owned(),
            ..v1::RegisterAddressSpaceRequest::default()
        };
        let registered = client.register_address_space(register).await;
        let registered = registered.map_err(refused("RegisterAddressSpace"))?.into_inner();
        let address_space = AddressSpaceId::new(registered.address_space_id).ok_or(RoundsError::Answer)?;
        let mut link =
            Self { client, address_space, range_pages: args.range_pages.clone(), devices: Vec::new() };
        match link.add_devices(args).await {
            Ok(()) => Ok(link),
            Err(error) => {
                link.close().await;
                Err(error)
            }
        }
    }

    async fn add_devices(&mut self, args: &RoundsArgs) -> Result<(), RoundsError> {
        for index in 0..args.devices {
            let name = DeviceId::new(&format!("loadgen-{}-{index}", std::process::id()))?;
            let config = DeviceConfig::new(name, args.device_endpoint.clone());
            let device = Device::connect(config, Arc::new(Idle)).await?;
            device.subscribe(self.address_space, &[AddrRange::ALL], SubscribeOptions::default()).await?;
            self.devices.push(device);
        }
        Ok(())
    }

    /// The `number`th round: until it is quiesced. Its bracket is ended afterwards, in a call of its own.
    pub(super) async fn round(&self, number: u64) -> Result<Bracket, RoundsError> {
        let invalidate = v1::InvalidateRangeStartRequest {
            address_space_id: self.address_space.get(),
            range: Some(self.range(number)),
            cause: v1::Cause::Unmap.into(),
            ..v1::InvalidateRangeStartRequest::default()
        };
        let mut client = self.client.clone();
        let started = client.invalidate_range_start(invalidate).await;
        let result = started.map_err(refused("InvalidateRangeStart"))?.into_inner().result;
        let result = result.ok_or(RoundsError::Unmeasured)?;
        let acked = v1::TargetOutcome::Acked;
        let targets = result.targets.iter().filter(|target| target.outcome() == acked).count();
        if result.verdict() != v1::Verdict::Quiesced || targets != self.devices.len() {
            // It waited for fewer devices than it was to: its time says nothing.
            return Err(RoundsError::Unmeasured);
        }
        let (address_space_id, seq) = (self.address_space.get(), result.seq);
        Ok(Bracket { client, address_space_id, seq, host_incarnation: result.host_incarnation })
    }

    fn range(&self, number: u64) -> v1::AddressRange {
        let longest = self.range_pages.iter().copied().max().unwrap_or(1);
        let turn = usize::try_from(number).unwrap_or(0) % self.range_pages.len();
        let bytes = |pages: u32| u64::from(pages) * PageSize::BASE.bytes();
        let start = REGION + number % RANGES * bytes(longest);
        v1::AddressRange { start, end: start + bytes(self.range_pages[turn]), all: false }
    }

    /// Ends the address space and the sessions.
    pub(super) async fn close(mut self) {
        let release = v1::ReleaseAddressSpaceRequest {
            address_space_id: self.address_space.get(),
            ..v1::ReleaseAddressSpaceRequest::default()
        };
        // The host agent may be gone: what was measured is told all the same.
        let _ = self.client.release_address_space(release).await;
        for device in self.devices {
            device.leave().await;
        }
    }
}

/// A bracket that is open.
#[derive(Debug)]
pub(super) struct Bracket {
    client: NotifierServiceClient<Channel>,
    address_space_id: u64,
    seq: u64,
    host_incarnation: u64,
}

impl Bracket {
    pub(super) async fn end(mut self) -> Result<(), RoundsError> {
        let end = v1::InvalidateRangeEndRequest {
            address_space_id: self.address_space_id,
            seq: self.seq,
            host_incarnation: self.host_incarnation,
            ..v1::InvalidateRangeEndRequest::default()
        };
        self.client.invalidate_range_end(end).await.map_err(refused("InvalidateRangeEnd"))?;
        Ok(())
    }
}

async fn connect(endpoint: &Endpoint) -> Result<Channel, RoundsError> {
    let target = match endpoint {
        Endpoint::Unix(path) => format!("unix:{}", path.display()),
        Endpoint::Tcp { host, port } => format!("http://{host}:{port}"),
    };
    let failed = |error| RoundsError::Source { endpoint: endpoint.to_string(), error };
    tonic::transport::Endpoint::from_shared(target)
        .map_err(failed)?
        .tcp_nodelay(true)
        .connect()
        .await
        .map_err(failed)
}

fn refused(call: &'static str) -> impl Fn(tonic::Status) -> RoundsError {
    move |status| RoundsError::Refused { call, status: Box::new(status) }
}
