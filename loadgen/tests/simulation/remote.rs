//! A source on a machine of its own: a client of `NotifierService`, which tries again until it knows what became
//! of a call, takes its address spaces back, and answers their faults.
//!
//! ```text
//!   call --> try --answered--------------------> taken, if the run is the newest and knows the address space
//!             |  --no answer for a while-------> another connection, another try; the first may still be answered
//!             |  --the connection is lost------> a pause, another try
//!             +----ADDRESS_SPACE_UNKNOWN-------> registered again, another try
//! ```

mod calling;
mod tries;
mod faults;

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use shootdown_proto::error::Reason;
use shootdown_proto::v1;
use tokio::task::JoinSet;
use tonic::Status;

use crate::calls::{Calls, MOST_CALLS, SPACES};
use crate::link::Link;
use crate::plan::{Broken, millis};
use crate::shared::{Shared, Stage};
use crate::trace::{Op, Pages, What};

/// Its machine.
pub const SOURCE: &str = "source";

#[derive(Clone)]
struct Remote {
    shared: Arc<Shared>,
    link: Arc<Link>,
    calls: Calls,
    spaces: Arc<Mutex<BTreeMap<u64, Known>>>,
    /// The pages of the calls that are going on, and whether they are changed.
    going_on: Arc<Mutex<Vec<(Pages, bool)>>>,
    /// Of each call that was answered: how often its address space had been registered by then.
    taken: Arc<Mutex<BTreeMap<Op, u64>>>,
    /// The newest run of the host agent that has answered.
    newest: Arc<Mutex<u64>>,
    /// Held by whoever registers again.
    registering: Arc<tokio::sync::Mutex<()>>,
    broken: Broken,
}

/// What it knows of an address space.
#[derive(Debug, Clone, Copy, Default)]
struct Known {
    /// How often it was registered.
    registered: u64,
    releasing: bool,
}

/// From here on, for as long as the world lasts.
pub async fn run(shared: Arc<Shared>) -> turmoil::Result {
    let remote = Remote {
        link: Arc::new(Link::new(Arc::clone(&shared))),
        calls: Calls::new(Arc::clone(&shared), 5),
        spaces: Arc::default(),
        going_on: Arc::default(),
        taken: Arc::default(),
        newest: Arc::default(),
        registering: Arc::default(),
        broken: shared.plan.broken,
        shared,
    };
    remote.work().await;
    Ok(())
}

impl Remote {
    async fn work(self) {
        for _ in 0..SPACES {
            self.register().await;
        }
        let mut calls = JoinSet::new();
        while !self.shared.is_past(Stage::Storm) {
            let pause = self.draw(0..self.shared.plan.call_every.as_millis() as u64 * 2);
            tokio::time::sleep(millis(pause)).await;
            while let Some(ended) = calls.try_join_next() {
                ended.expect("a call does not panic");
            }
            if calls.len() < MOST_CALLS {
                calls.spawn(self.clone().call());
            }
        }
        while let Some(ended) = calls.join_next().await {
            ended.expect("a call does not panic");
        }
        self.shared.source_is_done.change(|done| *done = true);
        // Its streams of faults are served until then.
        self.shared.until(Stage::Over).await;
    }

    fn draw(&self, range: Range<u64>) -> u64 {
        self.calls.draw(range)
    }

    /// How long it waits before it tries on another connection: most rounds are over by then.
    fn patience(&self) -> Duration {
        self.shared.plan.ack_timeout + self.shared.plan.latency.most * 4
    }

    async fn pause(&self) {
        tokio::time::sleep(millis(self.draw(2..15))).await;
    }

    /// A new address space. An answer that is lost leaves one that nobody knows the name of.
    async fn register(&self) {
        let space = loop {
            match self.try_register(0).await {
                Ok(space) => break space,
                Err(_) => self.pause().await,
            }
        };
        self.spaces.lock().insert(space, Known { registered: 1, releasing: false });
        self.shared.memory.lock().add_space(space);
        self.shared.trace.record(What::Registered { space });
        tokio::spawn(self.clone().serve_faults(space));
    }

    async fn try_register(&self, address_space_id: u64) -> Result<u64, Status> {
        let request = v1::RegisterAddressSpaceRequest {
            name: "simulated".to_owned(),
            strict: true,
            address_space_id,
            ..v1::RegisterAddressSpaceRequest::default()
        };
        let (number, mut client) = self.link.get();
        match tokio::time::timeout(self.patience(), client.register_address_space(request)).await {
            Ok(answer) => Ok(answer?.into_inner().address_space_id),
            Err(_) => {
                self.link.replace(number);
                Err(Status::deadline_exceeded("nobody answers"))
            }
        }
    }

    fn known(&self, space: u64) -> Known {
        self.spaces.lock()[&space]
    }

    /// The host agent does not know the address space that it knew at the `registered`-th time.
    async fn take_back(&self, space: u64, registered: u64) {
        let _alone = self.registering.lock().await;
        while self.known(space).registered == registered {
            let taken = match self.try_register(space).await {
                Ok(_) => true,
                // By a try whose answer was lost.
                Err(refused) => Reason::of_status(&refused) == Some(Reason::FieldInvalid),
            };
            if taken {
                self.spaces.lock().entry(space).and_modify(|known| known.registered += 1);
                self.shared.trace.record(What::Registered { space });
            } else {
                self.pause().await;
            }
        }
    }
}
