//! Delta ADS: each node what concerns it, as it changes.
//!
//! ```text
//! World's log ──names──▶ Subscription (per type: what is stale) ──▶ response ──▶ node
//!                                  ▲ ACK or NACK ◀──────────────────────┘
//! ```
//! Invariant: a resource is sent when its version differs from what the node was last sent, and its name is
//! listed as removed when it no longer is or no longer concerns the node. One response of a type is in flight
//! at a time, so that a slow node costs one response of memory. A workload is never sent before a policy that
//! it names, and a policy never leaves or narrows before the workloads that named it have been sent.

mod scope;
mod subscription;
mod view;

use super::{Shared, acks, limits::Budget};
use crate::index::world::TYPES;
use culvert_proto::discovery::{
    ControlPlane, DeltaDiscoveryRequest, DeltaDiscoveryResponse,
    aggregated_discovery_service_server::AggregatedDiscoveryService,
};
use futures::Stream;
use std::{
    pin::Pin,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use tokio::{sync::mpsc, time::Instant};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming, async_trait};
use view::View;

pub struct Ads(pub Arc<Shared>);

/// How long a node may take to acknowledge a response. A stream that takes longer is ended: whoever waits for
/// every node's ACK must not wait for one that has stopped (settled D11).
const ACK_DEADLINE: Duration = acks::PATIENCE;

/// Longest text of a NACK that is logged.
const MAX_REASON: usize = 500;

#[async_trait]
impl AggregatedDiscoveryService for Ads {
    type DeltaAggregatedResourcesStream =
        Pin<Box<dyn Stream<Item = Result<DeltaDiscoveryResponse, Status>> + Send>>;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let node = self.0.tokens.node(&request)?;
        self.0.limits.spend(&node, Budget::Streams, 1)?;
        let Some(entry) = self.0.acks.enter(&node) else {
            return Err(Status::resource_exhausted("too many streams of this node"));
        };
        if let Err(error) = self.0.record.node(&node) {
            tracing::error!(node, %error, "a restart will not wait for this node");
        }
        let (responses, out) = mpsc::channel(4);
        let subscriber = Subscriber {
            view: View::new(node, self.0.source.clone()),
            acks: entry,
            shared: self.0.clone(),
            responses,
        };
        tokio::spawn(subscriber.run(request.into_inner()));
        Ok(Response::new(Box::pin(ReceiverStream::new(out))))
    }
}

/// One stream.
struct Subscriber {
    view: View,
    shared: Arc<Shared>,
    responses: mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>,
    acks: acks::Entry,
}

/// The stream has ended: with a reason for the node, or because the node is gone.
struct Closed(Option<Status>);

impl Subscriber {
    async fn run(mut self, mut requests: Streaming<DeltaDiscoveryRequest>) {
        let mut published = self.shared.world.clone();
        let _open = self.shared.metrics.stream("discovery");
        self.view.advance(&published.borrow_and_update().clone());
        loop {
            let deadline = self.view.sent_at().map(|at| at + ACK_DEADLINE);
            let done = tokio::select! {
                request = requests.message() => match request {
                    Ok(Some(request)) => match self.take(request) {
                        Ok(()) => self.push(None).await,
                        refused => refused,
                    },
                    Ok(None) | Err(_) => Err(Closed(None)),
                },
                changed = published.changed() => match changed {
                    Ok(()) => {
                        let world = published.borrow_and_update().clone();
                        let (at, since) = self.shared.metrics.published();
                        self.view.advance(&world);
                        let pushed = self.push(Some(at)).await;
                        self.shared.metrics.push_seconds.observe(since.elapsed().as_secs_f64());
                        pushed
                    }
                    Err(_) => Err(Closed(None)),
                },
                () = tokio::time::sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => {
                    tracing::warn!(node = self.view.node(), "a response is not acknowledged in time; ending the stream");
                    Err(Closed(Some(Status::deadline_exceeded("response not acknowledged in time"))))
                }
            };
            if let Err(Closed(reason)) = done {
                if let Some(reason) = reason {
                    let _ = self.responses.try_send(Err(reason));
                }
                return;
            }
        }
    }

    fn take(&mut self, request: DeltaDiscoveryRequest) -> Result<(), Closed> {
        let node = self.view.node();
        let names = request.resource_names_subscribe.len() + request.resource_names_unsubscribe.len();
        let cost = u32::try_from(names).unwrap_or(u32::MAX);
        self.shared
            .limits
            .spend(node, Budget::Names, cost)
            .map_err(|status| Closed(Some(status)))?;
        if let Some(error) = &request.error_detail {
            let reason: String = error.message.chars().take(MAX_REASON).collect();
            if let Some(url) = TYPES.iter().find(|url| **url == request.type_url) {
                self.shared.metrics.nacks.with_label_values(&[url]).inc();
            }
            tracing::warn!(
                node,
                type_url = request.type_url,
                reason,
                "resources refused by the node"
            );
        }
        self.view.take(request).map_err(|status| Closed(Some(status)))?;
        self.acknowledge();
        Ok(())
    }

    fn count(&self, response: &DeltaDiscoveryResponse) {
        let (metrics, url) = (&self.shared.metrics, response.type_url.as_str());
        metrics.responses.with_label_values(&[url]).inc();
        for (change, names) in [
            ("sent", response.resources.len()),
            ("removed", response.removed_resources.len()),
        ] {
            let resources = metrics.resources.with_label_values(&[url, change]);
            resources.inc_by(names as u64);
        }
    }

    fn acknowledge(&self) {
        if let Some(number) = self.view.taken() {
            self.acks.taken(number);
        }
    }

    /// Sends what may be sent now; `published` is when the change that asks for it was.
    async fn push(&mut self, published: Option<SystemTime>) -> Result<(), Closed> {
        while let Some(mut response) = self.view.next() {
            self.count(&response);
            let published = published.and_then(|at| at.duration_since(UNIX_EPOCH).ok());
            response.control_plane = published.map(|at| ControlPlane {
                identifier: format!("culvert published={}", at.as_millis()),
            });
            self.responses
                .send(Ok(response))
                .await
                .map_err(|_| Closed(None))?;
        }
        self.acknowledge();
        Ok(())
    }
}
