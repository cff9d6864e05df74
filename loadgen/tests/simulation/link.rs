//! The way of a source that is on a machine of its own to the host agent: connections, and calls on them.

use std::sync::Arc;

use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use shootdown_core::{Cause, Translation};
use shootdown_proto::v1::notifier_service_client::NotifierServiceClient;
use shootdown_proto::{convert, v1};
use shootdown_server::source::Wait;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};
use turmoil::net::TcpStream;

use crate::cuttable::Cuttable;
use crate::device::AGENTS;
use crate::memory::range_of;
use crate::plan::millis;
use crate::shared::Shared;
use crate::trace::{Called, Pages};

/// Where the host agent listens for sources.
pub const SOURCE_PORT: u16 = 7402;

pub type Client = NotifierServiceClient<Channel>;

/// The connection that new calls are made on.
#[derive(Debug)]
pub struct Link {
    shared: Arc<Shared>,
    newest: Mutex<(u64, Client)>,
}

/// What is asked of the host agent.
#[derive(Debug, Clone)]
pub enum Ask {
    Call { called: Called, pages: Pages, wait: Wait, translation: Option<Translation> },
    Await { space: u64, seq: u64 },
    End { space: u64, seq: u64 },
}

impl Link {
    pub fn new(shared: Arc<Shared>) -> Self {
        let first = connect(&shared);
        Self { shared, newest: Mutex::new((0, first)) }
    }

    /// The connection, and its number.
    pub fn get(&self) -> (u64, Client) {
        self.newest.lock().clone()
    }

    /// Nobody answers on a connection: the next calls are made on another. Those that wait there may wait on.
    pub fn replace(&self, silent: u64) {
        let mut newest = self.newest.lock();
        if newest.0 == silent {
            *newest = (silent + 1, connect(&self.shared));
        }
    }
}

/// A connection that is made when it is needed, and anew when it is lost, to whoever has the name then.
fn connect(shared: &Arc<Shared>) -> Client {
    let shared = Arc::clone(shared);
    let connector = tower::service_fn(move |_| {
        let cut = shared.begin_connection(shared.plan.devices.len());
        let agent = AGENTS[shared.newest.get()];
        async move {
            let stream = TcpStream::connect((agent, SOURCE_PORT)).await?;
            std::io::Result::Ok(TokioIo::new(Cuttable::new(stream, cut)))
        }
    });
    let endpoint = Endpoint::from_static("http://host-agent").connect_timeout(millis(60));
    NotifierServiceClient::new(endpoint.connect_with_connector_lazy(connector))
}

impl Ask {
    pub fn space(&self) -> u64 {
        match self {
            Self::Call { pages, .. } => pages.space,
            Self::Await { space, .. } | Self::End { space, .. } => *space,
        }
    }

    /// The `number`th try, of which the first waits longest.
    pub fn in_less_time(mut self, number: u64) -> Self {
        if let Self::Call { wait: Wait::AtMost(limit), .. } = &mut self {
            *limit /= u32::try_from(number).expect("there are few");
        }
        self
    }

    /// One try of it; an end is answered with nothing.
    pub async fn send(
        self,
        mut client: Client,
        request_id: String,
    ) -> Result<Option<v1::RoundResult>, Status> {
        let address_space_id = self.space();
        let result = match self {
            Self::Call { called, pages, wait, translation } => {
                let range = Some(convert::wire_range(range_of(pages.pages.clone())));
                let deadline_ms = match wait {
                    Wait::AtMost(limit) => Some(limit.as_millis() as u64),
                    Wait::ForTargets | Wait::NotAtAll => None,
                };
                let cause = convert::wire_cause(Cause::Unmap).into();
                match called {
                    Called::RangeStart => {
                        let request = v1::InvalidateRangeStartRequest {
                            address_space_id,
                            range,
                            cause,
                            non_blockable: wait == Wait::NotAtAll,
                            deadline_ms,
                            request_id,
                            ..v1::InvalidateRangeStartRequest::default()
                        };
                        client.invalidate_range_start(request).await?.into_inner().result
                    }
                    Called::Page => {
                        let address = range_of(pages.pages).start();
                        let request = v1::InvalidatePageRequest {
                            address_space_id,
                            address,
                            cause,
                            deadline_ms,
                            request_id,
                            ..v1::InvalidatePageRequest::default()
                        };
                        client.invalidate_page(request).await?.into_inner().result
                    }
                    Called::ChangePte(_) => {
                        let translation = translation.map(convert::wire_translation);
                        let request =
                            v1::ChangePteRequest { address_space_id, translation, deadline_ms, request_id };
                        client.change_pte(request).await?.into_inner().result
                    }
                    Called::ClearFlushYoung => {
                        let request =
                            v1::ClearFlushYoungRequest { address_space_id, range, deadline_ms, request_id };
                        let answer = client.clear_flush_young(request).await?.into_inner();
                        young_together(answer.result, answer.young)
                    }
                    Called::ClearYoung => {
                        let request =
                            v1::ClearYoungRequest { address_space_id, range, deadline_ms, request_id };
                        let answer = client.clear_young(request).await?.into_inner();
                        young_together(answer.result, answer.young)
                    }
                    Called::Release => {
                        let request = v1::ReleaseAddressSpaceRequest { address_space_id, request_id };
                        client.release_address_space(request).await?.into_inner().result
                    }
                }
            }
            Self::Await { seq, .. } => {
                let request =
                    v1::AwaitRoundRequest { address_space_id, seq, ..v1::AwaitRoundRequest::default() };
                client.await_round(request).await?.into_inner().result
            }
            Self::End { seq, .. } => {
                let request = v1::InvalidateRangeEndRequest { seq, request_id, ..end_of(address_space_id) };
                client.invalidate_range_end(request).await?;
                return Ok(None);
            }
        };
        result.map(Some).ok_or_else(|| Status::internal("an answer without a result"))
    }
}

/// What the devices say now, and what the host agent had kept, in one.
fn young_together(result: Option<v1::RoundResult>, young: bool) -> Option<v1::RoundResult> {
    let mut result = result?;
    if let Some(target) = result.targets.first_mut() {
        target.young |= young;
    }
    Some(result)
}

fn end_of(address_space_id: u64) -> v1::InvalidateRangeEndRequest {
    v1::InvalidateRangeEndRequest { address_space_id, ..v1::InvalidateRangeEndRequest::default() }
}
