//! A device that keeps no lease, and of which nothing comes any more.
//!
//! Of one that keeps its lease its end finds that it vanished. The end of this one's is no fence, so a session that
//! owes nothing would be Live until a round waits for it, or the transport finds out.

use shootdown_core::Moment;
use shootdown_core::session::{Enforcement, Phase, Session};

/// Looks in vain before a stream is taken for lost. It is looks that are counted, and not the time alone: a host agent
/// that was stopped itself has heard nothing either, and reads before the next look what came meanwhile.
const LOOKS_IN_VAIN: u32 = 3;

/// Since when nothing was heard of a session's device.
#[derive(Debug, Clone, Copy)]
pub(super) struct Silence {
    since: Moment,
    /// How often it was found to be longer than a lease.
    looks: u32,
}

/// Whether a device may still be heard on its stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Hearing {
    Kept,
    Lost,
}

impl Silence {
    /// Something came at `now`, or the device on another stream.
    pub(super) fn since(now: Moment) -> Self {
        Self { since: now, looks: 0 }
    }

    pub(super) fn on_tick<T>(&mut self, session: &Session<T>, now: Moment) -> Hearing {
        let is_silent = session.enforcement() == Enforcement::ByNobody
            // A Suspect one's fencer is asked already, and its ack may still come.
            && session.phase() == Phase::Live
            && now.since(self.since) >= session.config().lease.host_duration();
        self.looks = if is_silent { self.looks + 1 } else { 0 };
        if self.looks < LOOKS_IN_VAIN { Hearing::Kept } else { Hearing::Lost }
    }
}

#[cfg(test)]
mod tests {
    use shootdown_core::session::SessionConfig;
    use shootdown_core::{DeviceId, SessionId};

    use super::*;

    fn session(enforcement: Enforcement) -> Session<()> {
        let config = SessionConfig { enforcement, ..SessionConfig::default() };
        Session::new(SessionId::FIRST, DeviceId::new("gpu").unwrap(), config, Moment::ZERO)
    }

    #[test]
    fn a_stream_is_lost_when_nothing_comes_for_a_lease_and_for_some_looks_more() {
        let session = session(Enforcement::ByNobody);
        let over = Moment::ZERO + session.config().lease.host_duration();
        let mut silence = Silence::since(Moment::ZERO);
        assert_eq!(silence.on_tick(&session, Moment::ZERO), Hearing::Kept);
        // A host agent that was stopped for long: the heartbeat of meanwhile is read after its first look.
        assert_eq!(silence.on_tick(&session, over), Hearing::Kept);
        assert_eq!(silence.on_tick(&session, over), Hearing::Kept);
        silence = Silence::since(over);
        for _ in 0..LOOKS_IN_VAIN {
            assert_eq!(silence.on_tick(&session, over), Hearing::Kept);
        }
        let over = over + session.config().lease.host_duration();
        let looks: Vec<_> = (0..LOOKS_IN_VAIN).map(|_| silence.on_tick(&session, over)).collect();
        assert_eq!(looks, [Hearing::Kept, Hearing::Kept, Hearing::Lost]);
    }

    #[test]
    fn a_device_that_keeps_its_lease_is_not_listened_for() {
        let session = session(Enforcement::ByDevice);
        let over = session.lease_expires();
        let mut silence = Silence::since(Moment::ZERO);
        assert!((0..2 * LOOKS_IN_VAIN).all(|_| silence.on_tick(&session, over) == Hearing::Kept));
    }
}
