//! `run`: rounds against a host agent that is already running, and how long they take.
//!
//! ```text
//!   pacer (a thread) --intended time--> a task a round --InvalidateRangeStart--> host agent --> devices
//!                                             |                                  (in this process)
//!                                             +-- answered - intended --> histogram
//! ```
//!
//! Open loop by default: rounds are sent when they are due, whether or not earlier ones are done, and a
//! round's latency begins when it was *to be* sent. A generator that waits for each answer instead sends
//! less where the system is slow, and does not see what it did not send (coordinated omission).

mod link;
mod pacer;
mod loops;
mod report;

use std::io::{self, Write};
use std::path::PathBuf;

use hdrhistogram::serialization::V2DeflateSerializeError;
use hdrhistogram::serialization::interval_log::IntervalLogWriterError;
use shootdown_client::{ConnectError, DeviceIdError, RangeError, SubscribeError};

use tokio::signal::unix::{SignalKind, signal};

use crate::cli::{Output, RoundsArgs};

pub use loops::Measured;

/// Why rounds could not be measured.
#[derive(Debug, thiserror::Error)]
pub enum RoundsError {
    /// The host agent's socket for sources.
    #[error("the host agent does not answer at {endpoint}")]
    Source {
        /// Where.
        endpoint: String,
        /// Why.
        #[source]
        error: tonic::transport::Error,
    },
    /// The host agent refused a call.
    #[error("the host agent refused {call}")]
    Refused {
        /// Which.
        call: &'static str,
        /// Why.
        #[source]
        status: Box<tonic::Status>,
    },
    /// The host agent's answer has no name for the address space.
    #[error("the host agent's answer names no address space")]
    Answer,
    /// A device could not connect.
    #[error("a device could not connect")]
    Connect(#[from] ConnectError),
    /// A device's name.
    #[error("a device's name cannot be used")]
    Name(#[from] DeviceIdError),
    /// A device could not subscribe.
    #[error("a device could not subscribe")]
    Subscribe(#[from] SubscribeError),
    /// A range of a round.
    #[error("the range of a round cannot be used")]
    Range(#[from] RangeError),
    /// No thread.
    #[error("a thread could not be started")]
    Thread(#[source] io::Error),
    /// A round did not wait for every device.
    #[error("a round was answered before each of the devices had acked; a session was lost")]
    Unmeasured,
    /// SIGINT or SIGTERM.
    #[error("stopped by a signal; nothing is reported")]
    Interrupted,
    /// No signal can be waited for.
    #[error("signals cannot be waited for")]
    Signals(#[source] io::Error),
    /// A task was stopped.
    #[error("a task of the generator ended by itself")]
    Task,
    /// The report.
    #[error("the report could not be written")]
    Write(#[source] io::Error),
    /// The .hlog.
    #[error("the histogram log {path} could not be made")]
    Log {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        error: io::Error,
    },
    /// Its content.
    #[error("the histogram log could not be written")]
    LogWrite(#[source] IntervalLogWriterError<V2DeflateSerializeError>),
}

/// Measures, and writes the report to `out`.
///
/// # Errors
/// [`RoundsError`].
pub async fn run(args: &RoundsArgs, out: &mut impl Write) -> Result<Measured, RoundsError> {
    let link = link::Link::open(args).await?;
    let mut terminate = signal(SignalKind::terminate()).map_err(RoundsError::Signals)?;
    let measuring = async {
        match args.closed_loop {
            Some(callers) => loops::closed(&link, args, callers).await,
            None => loops::open(&link, args).await,
        }
    };
    let measured = tokio::select! {
        // Not biased: whichever ends it. The address space is released in each case.
        measured = measuring => measured,
        _ = terminate.recv() => Err(RoundsError::Interrupted),
        _ = tokio::signal::ctrl_c() => Err(RoundsError::Interrupted),
    };
    link.close().await;
    let measured = measured?;
    if let Some(path) = &args.hlog {
        report::write_log(path, &measured)?;
    }
    match args.output {
        Output::Text => report::write_text(out, args, &measured),
        Output::Json => writeln!(out, "{:#}", report::to_json(args, &measured)),
    }
    .map_err(RoundsError::Write)?;
    Ok(measured)
}
