//! Delta ADS: each node what it asked for, as it changes.
//!
//! Invariant: a resource is sent when its version differs from what the node was last sent, and its name
//! is listed as removed when it no longer is or no longer concerns the node. One response of a type is in
//! flight at a time, so that a slow node costs one response of memory.

use super::Shared;
use crate::index::{Resource, TYPES, World};
use culvert_proto::{
    discovery::{
        DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource as Sent,
        aggregated_discovery_service_server::AggregatedDiscoveryService,
    },
    type_url,
};
use futures::Stream;
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    pin::Pin,
    sync::Arc,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming, async_trait};

pub struct Ads(pub Arc<Shared>);

/// Names one node may subscribe to.
const MAX_SUBSCRIPTIONS: usize = 200_000;

#[async_trait]
impl AggregatedDiscoveryService for Ads {
    type DeltaAggregatedResourcesStream =
        Pin<Box<dyn Stream<Item = Result<DeltaDiscoveryResponse, Status>> + Send>>;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let node = self.0.tokens.node(&request)?;
        let (responses, out) = mpsc::channel(4);
        let subscriber = Subscriber {
            node,
            shared: self.0.clone(),
            responses,
            types: HashMap::new(),
            nonce: 0,
        };
        tokio::spawn(subscriber.run(request.into_inner()));
        Ok(Response::new(Box::pin(ReceiverStream::new(out))))
    }
}

/// One type on one stream.
#[derive(Default)]
struct Subscription {
    wildcard: bool,
    names: BTreeSet<String>,
    /// Name to version, as last sent.
    sent: BTreeMap<String, String>,
    /// Names that the node asked for and was told that nothing has.
    absent: BTreeSet<String>,
    /// The response that is not acknowledged yet.
    in_flight: Option<String>,
    listed: bool,
}

struct Subscriber {
    node: String,
    shared: Arc<Shared>,
    responses: mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>,
    types: HashMap<&'static str, Subscription>,
    nonce: u64,
}

/// The node has closed its stream, or broke its rules.
struct Closed;

impl Subscriber {
    async fn run(mut self, mut requests: Streaming<DeltaDiscoveryRequest>) {
        let mut world = self.shared.world.clone();
        loop {
            let done = tokio::select! {
                request = requests.message() => match request {
                    Ok(Some(request)) => self.take(request).await,
                    Ok(None) | Err(_) => Err(Closed),
                },
                changed = world.changed() => match changed {
                    Ok(()) => self.push_all().await,
                    Err(_) => Err(Closed),
                },
            };
            if done.is_err() {
                return;
            }
        }
    }

    async fn take(&mut self, request: DeltaDiscoveryRequest) -> Result<(), Closed> {
        let Some(url) = TYPES.into_iter().find(|url| *url == request.type_url) else {
            let refusal = Status::invalid_argument(format!("type {} is not served", request.type_url));
            let _ = self.responses.send(Err(refusal)).await;
            return Err(Closed);
        };
        if let Some(error) = &request.error_detail {
            tracing::warn!(
                node = self.node,
                url,
                error = error.message,
                "response refused by the node"
            );
        }
        let first = !self.types.contains_key(url);
        let subscription = self.types.entry(url).or_default();
        if first {
            subscription.wildcard = request.resource_names_subscribe.is_empty();
            subscription.sent = request.initial_resource_versions.into_iter().collect();
        }
        if subscription.in_flight.as_ref() == Some(&request.response_nonce) {
            subscription.in_flight = None;
        }
        for name in request.resource_names_subscribe {
            match name.as_str() {
                "*" => subscription.wildcard = true,
                _ => {
                    // Asked again: answered again.
                    subscription.absent.remove(&name);
                    subscription.names.insert(name);
                }
            }
        }
        for name in request.resource_names_unsubscribe {
            match name.as_str() {
                "*" => subscription.wildcard = false,
                _ => {
                    subscription.names.remove(&name);
                }
            }
        }
        if subscription.names.len() > MAX_SUBSCRIPTIONS {
            let _ = self
                .responses
                .send(Err(Status::resource_exhausted("too many subscriptions")))
                .await;
            return Err(Closed);
        }
        self.push(url).await
    }

    async fn push_all(&mut self) -> Result<(), Closed> {
        for url in TYPES {
            self.push(url).await?;
        }
        Ok(())
    }

    async fn push(&mut self, url: &'static str) -> Result<(), Closed> {
        let world = self.shared.world.borrow().clone();
        let node = self.node.clone();
        let Some(subscription) = self.types.get_mut(url) else {
            return Ok(());
        };
        if subscription.in_flight.is_some() {
            return Ok(());
        }
        let (resources, removed) = subscription.difference(&world, url, &node);
        if resources.is_empty() && removed.is_empty() && subscription.listed {
            return Ok(());
        }
        self.nonce += 1;
        let nonce = self.nonce.to_string();
        subscription.in_flight = Some(nonce.clone());
        subscription.listed = true;
        let response = DeltaDiscoveryResponse {
            system_version_info: format!("{}/{}", self.shared.source, world.number),
            resources,
            type_url: url.to_owned(),
            nonce,
            removed_resources: removed,
        };
        self.responses.send(Ok(response)).await.map_err(|_| Closed)
    }
}

impl Subscription {
    /// What to send so that the node has what concerns it, and takes note of it as sent.
    fn difference(&mut self, world: &World, url: &str, node: &str) -> (Vec<Sent>, Vec<String>) {
        let Some(all) = world.types.get(url) else {
            return (vec![], vec![]);
        };
        let concerns: BTreeMap<&str, &Arc<Resource>> = if self.wildcard {
            all.iter()
                .map(|(name, resource)| (name.as_str(), resource))
                .collect()
        } else {
            self.concerned(world, all, url, node)
        };
        let mut resources = vec![];
        for (name, resource) in &concerns {
            if self.sent.get(*name) != Some(&resource.version) {
                self.sent.insert((*name).to_owned(), resource.version.clone());
                resources.push(encode(url, resource));
            }
        }
        let mut removed: Vec<String> = self
            .sent
            .keys()
            .filter(|name| !concerns.contains_key(name.as_str()))
            .cloned()
            .collect();
        for name in &removed {
            self.sent.remove(name);
        }
        for name in &self.names {
            let known = all.contains_key(name) || world.aliases.contains_key(name);
            if known {
                self.absent.remove(name);
            } else if self.absent.insert(name.clone()) {
                removed.push(name.clone());
            }
        }
        (resources, removed)
    }

    /// On demand: what was asked for by name or address, the endpoints of services asked for, and the
    /// node's own workloads.
    fn concerned<'w>(
        &self,
        world: &'w World,
        all: &'w BTreeMap<String, Arc<Resource>>,
        url: &str,
        node: &str,
    ) -> BTreeMap<&'w str, &'w Arc<Resource>> {
        let mut concerns = BTreeMap::new();
        let mut take = |name: &str| {
            if let Some((name, resource)) = all.get_key_value(name) {
                concerns.insert(name.as_str(), resource);
            }
            for endpoint in world.endpoints.get(name).into_iter().flatten() {
                if let Some((name, resource)) = all.get_key_value(endpoint) {
                    concerns.insert(name.as_str(), resource);
                }
            }
        };
        for name in &self.names {
            take(name);
            world
                .aliases
                .get(name)
                .into_iter()
                .flatten()
                .for_each(|name| take(name));
        }
        if url == type_url::ADDRESS {
            let own = all.iter().filter(|(_, resource)| resource.node == node);
            concerns.extend(own.map(|(name, resource)| (name.as_str(), resource)));
            // Ranges have no address to ask for by.
            let ranges = all.iter().filter(|(_, resource)| resource.is_range);
            concerns.extend(ranges.map(|(name, resource)| (name.as_str(), resource)));
        }
        concerns
    }
}

fn encode(url: &str, resource: &Resource) -> Sent {
    Sent {
        version: resource.version.clone(),
        resource: Some(prost_types::Any {
            type_url: url.to_owned(),
            value: resource.bytes.to_vec(),
        }),
        name: resource.name.clone(),
        aliases: resource.aliases.clone(),
        ..Sent::default()
    }
}
