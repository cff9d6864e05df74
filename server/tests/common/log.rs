//! What the host agents of this process log about devices. A test reads it, and stops the thread that says something
//! where it stands: no other way shows that nothing happens meanwhile without chance.

use std::fmt::Debug;
use std::sync::{Arc, LazyLock};

use parking_lot::{Condvar, Mutex};
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::{Context, Layer, SubscriberExt as _};

use super::BOUND;

/// One for the process: devices of tests that run in it at the same time have names of their own.
static LOG: LazyLock<Arc<Log>> = LazyLock::new(|| {
    let log = Arc::new(Log::default());
    let of_the_host_agent = Targets::new().with_target("shootdown_server", Level::TRACE);
    let layer = Collect(Arc::clone(&log)).with_filter(of_the_host_agent);
    tracing::subscriber::set_global_default(tracing_subscriber::registry().with(layer)).unwrap();
    log
});

#[derive(Default)]
struct Log {
    lines: Mutex<Vec<Line>>,
    stops: Mutex<Vec<(&'static str, &'static str, Arc<Gate>)>>,
}

/// A line of the log.
#[derive(Debug, Clone, Default)]
pub struct Line(Vec<(&'static str, String)>);

impl Line {
    /// A field of it; empty where it has none of that name.
    pub fn field(&self, name: &str) -> &str {
        self.0.iter().find(|(field, _)| *field == name).map_or("", |(_, value)| value)
    }

    fn is(&self, device: &str, message: &str) -> bool {
        self.field("device") == device && self.field("message") == message
    }
}

/// The lines about a device that say `message`; none of before the first call of this or of [`stop`].
pub fn lines(device: &str, message: &str) -> Vec<Line> {
    LOG.lines.lock().iter().filter(|line| line.is(device, message)).cloned().collect()
}

/// The next thread that says `message` about the device stands still there, until the stop is released or dropped.
pub fn stop(device: &'static str, message: &'static str) -> Stop {
    let gate = Arc::new(Gate::default());
    LOG.stops.lock().push((device, message, Arc::clone(&gate)));
    Stop(gate)
}

/// Where a thread stands still.
pub struct Stop(Arc<Gate>);

#[derive(Default)]
struct Gate {
    at: Mutex<At>,
    changed: Condvar,
}

#[derive(Default, PartialEq, Eq)]
enum At {
    #[default]
    OnTheWay,
    Stopped,
    Released,
}

impl Stop {
    pub fn is_reached(&self) -> bool {
        *self.0.at.lock() == At::Stopped
    }

    pub fn release(&self) {
        *self.0.at.lock() = At::Released;
        self.0.changed.notify_all();
    }
}

impl Drop for Stop {
    /// A test that failed ends, too.
    fn drop(&mut self) {
        self.release();
    }
}

impl Gate {
    fn pass(&self) {
        let mut at = self.at.lock();
        if *at == At::OnTheWay {
            *at = At::Stopped;
            // Past the bound the test has failed already.
            self.changed.wait_while_for(&mut at, |at| *at == At::Stopped, BOUND * 2);
        }
    }
}

struct Collect(Arc<Log>);

impl<S: Subscriber> Layer<S> for Collect {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut line = Line::default();
        event.record(&mut line);
        let gate = {
            let mut stops = self.0.stops.lock();
            let at = stops.iter().position(|(device, message, _)| line.is(device, message));
            at.map(|at| stops.remove(at).2)
        };
        self.0.lines.lock().push(line);
        if let Some(gate) = gate {
            gate.pass();
        }
    }
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.0.push((field.name(), format!("{value:?}")));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.push((field.name(), value.to_owned()));
    }
}
