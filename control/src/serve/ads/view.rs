//! What one stream has been sent of the world, and what comes next. Pure: no I/O.
//!
//! Invariant: see [`super`]; the order in which [`View::next`] gives responses is what keeps it.

use super::{scope::Scope, subscription::Subscription};
use crate::index::world::{ADDRESS, CONFIG, INBOUND, OUTBOUND, TYPES, Type, World};
use culvert_proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use std::sync::Arc;
use tokio::time::Instant;
use tonic::Status;

/// Names one node may subscribe to.
const MAX_SUBSCRIPTIONS: usize = 200_000;

/// Longest name of a resource: the longest are a namespace's and a name's together (63 and 253 bytes), twice.
const MAX_NAME: usize = 1024;

pub struct View {
    node: String,
    source: String,
    types: [Option<Subscription>; 4],
    /// Which policies concern the node.
    scope: Scope,
    nonce: u64,
    /// The world that the subscriptions have heard of.
    world: Arc<World>,
}

impl View {
    /// `source` names the control plane in versions.
    pub fn new(node: String, source: String) -> Self {
        Self {
            node,
            source,
            types: [const { None }; 4],
            scope: Scope::default(),
            nonce: 0,
            world: Arc::default(),
        }
    }

    pub fn node(&self) -> &str {
        &self.node
    }

    /// When the oldest response in flight was sent.
    pub fn sent_at(&self) -> Option<Instant> {
        self.types
            .iter()
            .flatten()
            .filter_map(Subscription::sent_at)
            .min()
    }

    /// The number of the world of which the node has every workload that concerns it. None while it has never
    /// asked for workloads, or something is on its way.
    pub fn taken(&self) -> Option<u64> {
        let address = self.types[ADDRESS].as_ref()?;
        if address.is_settled() {
            Some(self.world.number)
        } else if address.was_never_settled() {
            // It may hold workloads from before.
            Some(0)
        } else {
            None
        }
    }

    /// Notes what a new world may mean for the node.
    pub fn advance(&mut self, world: &Arc<World>) {
        let Some(steps) = world.since(self.world.number) else {
            self.world = world.clone();
            self.scope.look(world, &self.node);
            for (of, subscription) in self.types.iter_mut().enumerate() {
                if let Some(subscription) = subscription {
                    subscription.doubt_all(world, of);
                }
            }
            return;
        };
        let mut look = false;
        for step in steps {
            look |= self.scope.is_touched(world, step.resources(ADDRESS), &self.node);
            for (of, subscription) in self.types.iter_mut().enumerate() {
                if let Some(subscription) = subscription {
                    subscription.doubt(step.resources(of));
                    if of == ADDRESS {
                        subscription.doubt_aliases(step.aliases());
                    }
                }
            }
        }
        self.world = world.clone();
        if look {
            let moved = self.scope.look(world, &self.node);
            for subscription in self.types[INBOUND..=OUTBOUND].iter_mut().flatten() {
                subscription.doubt(&moved);
            }
        }
    }

    /// Takes a request: a subscription, an ACK or a NACK.
    pub fn take(&mut self, request: DeltaDiscoveryRequest) -> Result<(), Status> {
        let Some(of) = TYPES.iter().position(|url| *url == request.type_url) else {
            let kind: String = request.type_url.chars().take(100).collect();
            return Err(Status::invalid_argument(format!("type {kind:?} is not served")));
        };
        let held = request.initial_resource_versions.keys();
        let mut names = held
            .chain(&request.resource_names_subscribe)
            .chain(&request.resource_names_unsubscribe);
        if names.any(|name| name.len() > MAX_NAME) {
            return Err(Status::invalid_argument(format!(
                "a name of more than {MAX_NAME} bytes is no resource's"
            )));
        }
        let subscription = match &mut self.types[of] {
            Some(known) => known,
            none => {
                let mut new = Subscription::begin(&request);
                new.doubt_all(&self.world, of);
                none.insert(new)
            }
        };
        subscription.acknowledge(&request.response_nonce);
        subscription.subscribe(&self.world, of, request.resource_names_subscribe);
        subscription.unsubscribe(&self.world, of, request.resource_names_unsubscribe);
        if subscription.names() > MAX_SUBSCRIPTIONS {
            return Err(Status::resource_exhausted("too many subscriptions"));
        }
        Ok(())
    }

    /// The next response that may be sent now.
    pub fn next(&mut self) -> Option<DeltaDiscoveryResponse> {
        for of in [CONFIG, INBOUND, OUTBOUND] {
            if let Some(response) = self.respond(of, false) {
                return Some(response);
            }
        }
        if self.types[INBOUND..=OUTBOUND]
            .iter()
            .flatten()
            .any(Subscription::has_news)
        {
            return None;
        }
        if let Some(response) = self.respond(ADDRESS, false) {
            return Some(response);
        }
        if self.types[ADDRESS].as_ref().is_some_and(Subscription::has_news) {
            return None;
        }
        [INBOUND, OUTBOUND]
            .into_iter()
            .find_map(|of| self.respond(of, true))
    }

    /// What is stale of one type; `late` takes what waits for the workloads.
    fn respond(&mut self, of: Type, late: bool) -> Option<DeltaDiscoveryResponse> {
        let scope = (of == INBOUND || of == OUTBOUND).then_some(&self.scope);
        let subscription = self.types[of].as_mut()?;
        let (resources, removed) = subscription.next(&self.world, of, &self.node, scope, late)?;
        self.nonce += 1;
        let nonce = self.nonce.to_string();
        subscription.in_flight(nonce.clone());
        Some(DeltaDiscoveryResponse {
            system_version_info: format!("{}/{}", self.source, self.world.number),
            resources,
            type_url: TYPES[of].to_owned(),
            nonce,
            removed_resources: removed,
            ..DeltaDiscoveryResponse::default()
        })
    }
}

#[cfg(test)]
mod tests;
