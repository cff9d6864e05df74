//! The smallest device: it maps one page, reads it, and gives it back whenever the host asks.
//!
//!     cargo run -p shootdown-client --example smallest_device -- unix:/run/shootdown/device.sock 1 0x10000

#![allow(clippy::print_stdout, reason = "it shows what it read")]

use std::sync::Arc;

use shootdown_client::{
    Access, AddrRange, AddressSpaceId, Device, DeviceConfig, DeviceId, DeviceTlb, FlushAllCause, Flushed,
    FrameSpan, Invalidation, PageSize, SubscribeOptions,
};

/// It has no TLB of its own: it asks the SDK before every use, and the SDK refuses what was withdrawn and
/// acks only when no use is open. A device with a TLB drops the range here, and waits for its DMAs.
struct NoTlb;

impl DeviceTlb for NoTlb {
    async fn invalidate(&self, _: Invalidation) -> Flushed {
        Flushed::default()
    }

    async fn flush_all(&self, _: FlushAllCause) {}
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [endpoint, space, address] = &arguments[..] else {
        anyhow::bail!("usage: smallest_device ENDPOINT ADDRESS_SPACE ADDRESS")
    };
    let space =
        AddressSpaceId::new(space.parse()?).ok_or_else(|| anyhow::anyhow!("address spaces begin at 1"))?;
    let address = u64::from_str_radix(address.trim_start_matches("0x"), 16)?;
    let page = AddrRange::page_of(address, PageSize::BASE);

    // A session: from here on the host waits for this device before it reuses a page.
    let config = DeviceConfig::new(DeviceId::new("smallest")?, endpoint.parse()?);
    let device = Device::connect(config, Arc::new(NoTlb)).await?;
    device.subscribe(space, &[page], SubscribeOptions::default()).await?;

    // A translation: good until the host takes it back, then it must be faulted again.
    let mapping = device.fault(space, page, Access::Read).await?.remove(0);
    {
        // A use: while the guard lives the host waits, so it must not live long. Past the lease the host does not
        // wait any more, so then it must be over.
        let page_in_use = mapping.begin_use()?;
        let span = FrameSpan { frame: page_in_use.frame(), offset: 0, length: 16 };
        let pages = device.pages()?;
        let bytes = page_in_use.run_until_expired(pages.read(&[span])).await??;
        println!("{address:#x}: {bytes:?}");
    }

    // Everything flushed, and the host told so.
    device.leave().await;
    Ok(())
}
