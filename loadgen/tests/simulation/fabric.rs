//! The path from the devices to the host's memory, on which a run of a device agent can be cut off for good.

use std::collections::{BTreeMap, BTreeSet};

use parking_lot::Mutex;

use crate::level::Level;
use crate::trace::{CutOffBy, Span, Trace, What};

/// One run of a device agent, from its start until it is stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct DeviceRun {
    pub device: usize,
    /// Its number among the device's starts, which is its incarnation.
    pub start: u64,
}

#[derive(Debug, Default)]
pub struct Fabric {
    state: Mutex<State>,
    /// How many were cut off.
    cuts: Level<usize>,
}

#[derive(Debug, Default)]
struct State {
    cut_off: BTreeSet<DeviceRun>,
    /// Accesses under way.
    open: BTreeMap<Span, DeviceRun>,
}

impl Fabric {
    /// An access begins; `false`: it does not reach the memory. `begun` is called while nobody can be cut off.
    pub fn begin(&self, run: DeviceRun, span: Span, begun: impl FnOnce()) -> bool {
        let mut state = self.state.lock();
        let reaches = !state.cut_off.contains(&run);
        if reaches {
            state.open.insert(span, run);
            begun();
        }
        reaches
    }

    /// An access has ended; it may have been ended before.
    pub fn end(&self, span: Span, trace: &Trace) {
        if self.state.lock().open.remove(&span).is_some() {
            trace.record(What::UseEnded { span });
        }
    }

    /// No access of the run reaches the memory from now on, not even one that has begun. A second time changes
    /// nothing.
    pub fn cut_off(&self, run: DeviceRun, by: CutOffBy, trace: &Trace) {
        {
            let mut state = self.state.lock();
            if !state.cut_off.insert(run) {
                return;
            }
            trace.record(What::CutOff { device: run.device, start: run.start, by });
            let ended = state.open.extract_if(.., |_, of| *of == run);
            ended.for_each(|(span, _)| trace.record(What::UseEnded { span }));
        }
        self.cuts.change(|cuts| *cuts += 1);
    }

    pub fn is_cut_off(&self, run: DeviceRun) -> bool {
        self.state.lock().cut_off.contains(&run)
    }

    /// Waits until the run is cut off.
    pub async fn until_cut_off(&self, run: DeviceRun) {
        self.cuts.until(|_| self.is_cut_off(run)).await;
    }
}
