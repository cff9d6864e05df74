//! A device that keeps no lease, and of which nothing comes any more.
//!
//! Of one that keeps its lease its end finds that it vanished. The end of this one's is no fence, so a session that
//! owes nothing would be Live until a round waits for it, or the transport finds out.
//!
//! ```text
//!   watchdog: nothing was heard for a lease ---rings---> the session's task, on its shard: is there anything to read?
//!        ^                                                  | yes: heard          | no: a look in vain
//!        +---------------- at its next look ----------------+---------------------+
//!                                                                                 | often enough, and for T_ack
//!                                                                                 v
//!                                                                       the stream is lost
//! ```
//!
//! The watchdog cannot tell by itself: what a healthy device said may lie unread because the shard was starved, or the
//! whole host agent stopped. So it only asks. The answer is of who reads the stream, and after its shard has looked at
//! its sockets; and by several looks, over `T_ack`, because what a device said may also be late on its way.
//!
//! While the host agent does not read a device, which does not read its answers ([`super::MOST_ANSWERS`]), nothing can
//! be heard of it either, and that counts as silence all the same. Each answer that it takes makes room for something
//! that it has said, so it is heard for as long as it reads at all. Where it takes none for a whole lease nothing that
//! is said to it arrives: it is as good as gone, may have vanished, and nobody else would find that. One that enforces
//! its lease loses it by the same, since its heartbeats are not read.

use shootdown_core::Moment;
use shootdown_core::session::{Enforcement, Phase, Session};

/// Looks in vain before a stream is taken for lost: T_ack may be so short that one watch is as long.
const LOOKS_IN_VAIN: u32 = 3;

/// Since when nothing was heard of a session's device.
#[derive(Debug, Clone, Copy)]
pub(super) struct Silence {
    since: Moment,
    in_vain: Option<InVain>,
}

/// Looks for something to read that found nothing, since the silence was longer than a lease.
#[derive(Debug, Clone, Copy)]
struct InVain {
    first: Moment,
    looks: u32,
}

/// Whether a device may still be heard on its stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Hearing {
    Kept,
    /// It should have been heard by now.
    Doubted {
        looks: u32,
    },
    Lost,
}

impl Silence {
    /// Something came at `now`, or the device on another stream.
    pub(super) fn since(now: Moment) -> Self {
        Self { since: now, in_vain: None }
    }

    /// Whether somebody should look if there is anything to read.
    pub(super) fn is_too_long<T>(&self, session: &Session<T>, now: Moment) -> bool {
        session.enforcement() == Enforcement::ByNobody
            // A Suspect one's fencer is asked already, and its ack may still come.
            && session.phase() == Phase::Live
            && now.since(self.since) >= session.config().lease.host_duration()
    }

    /// There was nothing to read.
    pub(super) fn on_nothing_read<T>(&mut self, session: &Session<T>, now: Moment) -> Hearing {
        if !self.is_too_long(session, now) {
            self.in_vain = None;
            return Hearing::Kept;
        }
        let in_vain = self.in_vain.get_or_insert(InVain { first: now, looks: 0 });
        in_vain.looks += 1;
        let looks = in_vain.looks;
        if looks >= LOOKS_IN_VAIN && now.since(in_vain.first) >= session.config().ack_timeout {
            Hearing::Lost
        } else {
            Hearing::Doubted { looks }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use shootdown_core::session::SessionConfig;
    use shootdown_core::{DeviceId, SessionId};

    use super::*;

    fn session(enforcement: Enforcement) -> Session<()> {
        let config = SessionConfig { enforcement, ..SessionConfig::default() };
        Session::new(SessionId::FIRST, DeviceId::new("gpu").unwrap(), config, Moment::ZERO)
    }

    fn doubted(looks: u32) -> Hearing {
        Hearing::Doubted { looks }
    }

    #[test]
    fn a_stream_is_lost_when_nothing_comes_for_a_lease_and_t_ack_and_some_looks() {
        let session = session(Enforcement::ByNobody);
        let (lease, t_ack) = (session.config().lease.host_duration(), session.config().ack_timeout);
        let instant = Duration::from_nanos(1);
        let mut silence = Silence::since(Moment::ZERO);
        let over = Moment::ZERO + lease;
        assert_eq!(silence.on_nothing_read(&session, Moment::ZERO + (lease - instant)), Hearing::Kept);
        // However many looks there are in less than T_ack from the first of them on.
        for looks in 1..=2 * LOOKS_IN_VAIN {
            assert_eq!(silence.on_nothing_read(&session, over), doubted(looks));
        }
        let almost = over + (t_ack - instant);
        assert_eq!(silence.on_nothing_read(&session, almost), doubted(2 * LOOKS_IN_VAIN + 1));
        assert_eq!(silence.on_nothing_read(&session, over + t_ack), Hearing::Lost);
        // However long after its lease they are made: a host agent that was stopped looks several times, too.
        let mut silence = Silence::since(Moment::ZERO);
        let late = Moment::ZERO + lease * 100;
        assert_eq!(silence.on_nothing_read(&session, late), doubted(1));
        assert_eq!(silence.on_nothing_read(&session, late + t_ack * 100), doubted(2));
        assert_eq!(silence.on_nothing_read(&session, late + t_ack * 100), Hearing::Lost);
    }

    #[test]
    fn whatever_is_heard_begins_the_silence_anew() {
        let session = session(Enforcement::ByNobody);
        let over = Moment::ZERO + session.config().lease.host_duration();
        let mut silence = Silence::since(Moment::ZERO);
        assert!(silence.is_too_long(&session, over));
        assert_eq!(silence.on_nothing_read(&session, over), doubted(1));
        assert_eq!(silence.on_nothing_read(&session, over), doubted(2));
        silence = Silence::since(over);
        assert!(!silence.is_too_long(&session, over));
        assert_eq!(silence.on_nothing_read(&session, over + session.config().ack_timeout), Hearing::Kept);
        let over = over + session.config().lease.host_duration();
        assert_eq!(silence.on_nothing_read(&session, over), doubted(1), "looks of before do not count");
    }

    #[test]
    fn a_device_that_keeps_its_lease_is_not_listened_for() {
        let session = session(Enforcement::ByDevice);
        let over = session.lease_expires() + session.config().ack_timeout;
        let mut silence = Silence::since(Moment::ZERO);
        assert!(!silence.is_too_long(&session, over));
        assert!((0..2 * LOOKS_IN_VAIN).all(|_| silence.on_nothing_read(&session, over) == Hearing::Kept));
    }
}
