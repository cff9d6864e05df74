//! Rounds, as the histories of pages tell of them.

use std::sync::Arc;

use shootdown_client::{AddrRange, AddressSpaceId, Seq};
use shootdown_server::source::memory::Twin;
use shootdown_server::source::{RoundResult, TargetReport};

use super::young::Watch;
use crate::check::history::{Happened, Histories, PageName, WaitedFor};

/// Which part a round had in its operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    /// The operation waited for it.
    Awaited,
    /// The operation was answered in the host agent's place, and nobody asks.
    NeverAsked,
    /// The operation was answered in the host agent's place, and devices are asked behind its back.
    AnsweredFirst,
    /// That asking.
    Behind,
}

/// Writes rounds into the histories of their pages. A clone writes into the same.
#[derive(Debug, Clone)]
pub(super) struct Told {
    watch: Arc<Watch>,
    histories: Arc<Histories>,
}

impl Told {
    pub(super) fn new(watch: Arc<Watch>, histories: Arc<Histories>) -> Self {
        Self { watch, histories }
    }

    /// A round of `twin` over `range` was answered.
    pub(super) fn on_round(
        &self,
        address_space: AddressSpaceId,
        range: AddrRange,
        twin: Twin,
        part: Part,
        round: &RoundResult,
    ) {
        self.push(self.watch.pages_in(address_space, range), address_space, twin, part, round);
    }

    /// What tells of a round that is to go on behind the back of `twin`, which may end the address space before.
    pub(super) fn behind(
        &self,
        address_space: AddressSpaceId,
        range: AddrRange,
        twin: Option<Twin>,
    ) -> impl FnOnce(&RoundResult) + use<> {
        let (told, pages) = (self.clone(), self.watch.pages_in(address_space, range));
        move |round| {
            if let Some(twin) = twin {
                told.push(pages, address_space, twin, Part::Behind, round);
            }
        }
    }

    fn push(
        &self,
        pages: Vec<PageName>,
        address_space: AddressSpaceId,
        twin: Twin,
        part: Part,
        round: &RoundResult,
    ) {
        for page in pages {
            self.histories.push(page, happened(address_space, twin, part, round));
        }
    }
}

fn happened(address_space: AddressSpaceId, twin: Twin, part: Part, round: &RoundResult) -> Happened {
    let (what, at) = match part {
        Part::Awaited => (format!("round of {twin}"), round.times.answered),
        Part::NeverAsked => (format!("{twin} goes on and never asked"), round.times.answered),
        Part::AnsweredFirst => (format!("{twin} goes on before it has asked"), round.times.answered),
        // Its answer comes when nobody waits for it: what counts is when devices were asked.
        Part::Behind => (format!("round behind {twin}"), round.times.dispatched),
    };
    Happened {
        at: at.as_nanos(),
        what,
        address_space: address_space.get(),
        // A sequence that was invented is nobody's.
        seq: match part {
            Part::Awaited | Part::Behind => round.seq.map(Seq::get),
            Part::NeverAsked | Part::AnsweredFirst => None,
        },
        version: None,
        device: None,
        waited_for: Some(round.targets.iter().map(waited_for).collect()),
    }
}

fn waited_for(target: &TargetReport) -> WaitedFor {
    let micros = |after: std::time::Duration| u64::try_from(after.as_micros()).unwrap_or(u64::MAX);
    WaitedFor {
        device: target.device.as_str().to_owned(),
        outcome: target.outcome.name().to_owned(),
        after_us: target.elapsed.map(micros),
    }
}
