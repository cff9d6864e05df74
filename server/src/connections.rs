//! What connections of devices may take: a descriptor each, of a number that others need as well.
//!
//! Anybody who reaches the port can open one and say nothing, and an HTTP/2 server has no limit for that: neither
//! hyper nor tonic counts connections, and their time limits begin with a request. So both are here. A connection
//! beyond [`ConnectionLimits::most`] is closed at once, and one on which nothing is asked for
//! [`ConnectionLimits::first_request_within`] by itself.
//!
//! A connection that was used once may stay idle for as long as its other end is there, which TCP's keepalive looks
//! after (see [`crate::listen`]): a device may read no bytes for hours, and to close what may be written to at that
//! moment would lose a call. It costs a descriptor, and those are counted.
//!
//! Which of them are of devices is not known before they speak: whoever opens many and asks for little on each
//! keeps devices out until it is stopped elsewhere. It keeps no source out, and no administrator.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use parking_lot::Mutex;
use rustix::process::{Resource, getrlimit};
use shootdown_core::Moment;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, SetOnce};
use tokio::time::Sleep;

use crate::clock::Clock;

/// What connections of devices may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConnectionLimits {
    /// The most of them, over all listeners for devices.
    pub most: usize,
    /// How long one may be open before anything is asked on it.
    pub first_request_within: Duration,
}

/// As long as for a Hello: a client that connects has something to ask.
pub(crate) const FIRST_REQUEST_WITHIN: Duration = Duration::from_secs(10);

/// A device has one for its session and one for bytes, and may open both anew before the old ones are known to be
/// dead.
const CONNECTIONS_A_DEVICE: usize = 4;

/// What a thread's runtime has open, and who is not a device: sources, administrators, fencers, the journal.
const FILES_A_THREAD: u64 = 4;
const FILES_FOR_OTHERS: u64 = 64;
/// The threads that are no shards.
const OTHER_THREADS: u64 = 3;

/// The most connections that leave room for everybody else under the limit of open files.
pub(crate) fn room_for_devices(shards: usize) -> usize {
    let threads = u64::try_from(shards).unwrap_or(u64::MAX).saturating_add(OTHER_THREADS);
    let others = FILES_A_THREAD.saturating_mul(threads).saturating_add(FILES_FOR_OTHERS);
    // None: as many as the system has.
    let files = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    usize::try_from(files.saturating_sub(others.max(files / 4))).unwrap_or(usize::MAX).max(1)
}

/// As many as the sessions that there may be need, where there is room for them.
pub(crate) fn most_by_default(sessions: usize, room: usize) -> usize {
    sessions.saturating_mul(CONNECTIONS_A_DEVICE).min(room).min(Semaphore::MAX_PERMITS)
}

/// The connections that devices have.
#[derive(Debug)]
pub(crate) struct Connections {
    limits: ConnectionLimits,
    places: Arc<Semaphore>,
    turned_away: Mutex<TurnedAway>,
    clock: Clock,
}

/// Those that are closed at once, told now and then: whoever opens many must not fill the log.
#[derive(Debug, Default)]
struct TurnedAway {
    since_told: u64,
    told: Option<Moment>,
}

const TELL_EVERY: Duration = Duration::from_secs(10);

impl TurnedAway {
    /// How many to tell of, if it is time.
    fn on_one_more(&mut self, now: Moment) -> Option<u64> {
        self.since_told += 1;
        if self.told.is_some_and(|told| now.since(told) < TELL_EVERY) {
            return None;
        }
        self.told = Some(now);
        Some(std::mem::take(&mut self.since_told))
    }
}

impl Connections {
    pub(crate) fn new(limits: ConnectionLimits, clock: Clock) -> Arc<Self> {
        tracing::info!(max_connections = limits.most, "places for connections of devices");
        let places = Arc::new(Semaphore::new(limits.most.min(Semaphore::MAX_PERMITS)));
        Arc::new(Self { limits, places, turned_away: Mutex::default(), clock })
    }

    /// A place for a connection that was accepted; `None`: it is to be closed.
    pub(crate) fn try_admit(&self) -> Option<Place> {
        if let Ok(permit) = Arc::clone(&self.places).try_acquire_owned() {
            return Some(Place { _permit: permit, first_request_within: self.limits.first_request_within });
        }
        let tell = self.turned_away.lock().on_one_more(self.clock.now());
        if let Some(connections) = tell {
            tracing::warn!(
                max_connections = self.limits.most,
                connections,
                "devices have as many connections as they may; more are closed at once"
            );
        }
        None
    }
}

/// One of the connections that there may be, until it is dropped.
#[derive(Debug)]
pub(crate) struct Place {
    _permit: OwnedSemaphorePermit,
    first_request_within: Duration,
}

/// Set by the first request on a connection.
pub(crate) type Asked = Arc<SetOnce<()>>;

/// A connection's place, and how long it may still be silent.
#[derive(Debug)]
pub(crate) struct Tenancy {
    _place: Place,
    asked: Asked,
    /// Gone when something was asked: a shard has no timer for a connection that is in use.
    time_is_up: Option<Pin<Box<Sleep>>>,
}

impl Tenancy {
    /// Must be called in a runtime: the time counts from now on.
    pub(crate) fn begin(place: Place, asked: Asked) -> Self {
        let time_is_up = Some(Box::pin(tokio::time::sleep(place.first_request_within)));
        Self { _place: place, asked, time_is_up }
    }

    /// To be called whenever the connection is polled.
    ///
    /// # Errors
    /// [`io::ErrorKind::TimedOut`]: nothing was asked on it for too long.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        let Some(time_is_up) = &mut self.time_is_up else { return Ok(()) };
        if self.asked.initialized() {
            self.time_is_up = None;
            return Ok(());
        }
        match time_is_up.as_mut().poll(cx) {
            Poll::Pending => Ok(()),
            Poll::Ready(()) => {
                tracing::info!("a connection is closed on which a device asked nothing");
                Err(io::Error::new(io::ErrorKind::TimedOut, "nothing was asked on it"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_leave_room_for_the_others_and_take_what_their_sessions_need() {
        let room = room_for_devices(1);
        assert!(room >= 1);
        if let Some(files) = getrlimit(Resource::Nofile).current {
            assert!(u64::try_from(room).unwrap() <= (files - files / 4).max(1));
            assert_eq!(room_for_devices(usize::MAX), 1, "there is none, and one must be");
        }
        assert_eq!(most_by_default(10, 1000), 40);
        assert_eq!(most_by_default(4096, 700), 700);
    }

    #[test]
    fn connections_that_are_turned_away_are_told_of_together() {
        let at = |seconds| Moment::ZERO + Duration::from_secs(seconds);
        let mut turned_away = TurnedAway::default();
        assert_eq!(turned_away.on_one_more(at(1)), Some(1));
        assert_eq!(turned_away.on_one_more(at(2)), None);
        assert_eq!(turned_away.on_one_more(at(3)), None);
        assert_eq!(turned_away.on_one_more(at(11)), Some(3));
    }
}
