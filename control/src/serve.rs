//! What nodes are served, on one port: discovery, certificates, node orders.
//!
//! ```text
//! TLS 1.3 ──token──▶ Caller { node } ──▶ ads (delta) | ca (CSR → SVID) | nodes (pods ⇄ orders)
//! ```
//! Invariant: every call is a node's, and which node it is comes from its token alone (settled D17).

pub mod acks;
mod ads;
mod ca;
mod caller;
pub mod limits;
mod nodes;
mod tls;

pub use caller::Tokens;
pub use tls::{Certificate, incoming, server_config};

use crate::{
    authority::Authority,
    index::{Report, Settings, World},
    metrics::Metrics,
    record::Record,
};
use acks::Acks;
use arc_swap::ArcSwap;
use culvert_proto::{
    ca::istio_certificate_service_server::IstioCertificateServiceServer,
    discovery::aggregated_discovery_service_server::AggregatedDiscoveryServiceServer,
    node::node_service_server::NodeServiceServer,
};
use limits::Limits;
use std::sync::Arc;
use tokio::sync::{mpsc, watch};
use tonic::transport::server::Router;

/// What the services share.
pub struct Shared {
    pub settings: Settings,
    pub world: watch::Receiver<Arc<World>>,
    /// Names this control plane in versions, so that nodes tell an older view from another source's.
    pub source: String,
    pub tokens: Tokens,
    /// Replaced while its roots rotate.
    pub authority: ArcSwap<Authority>,
    pub limits: Limits,
    /// What every node has taken.
    pub acks: Acks,
    pub record: Record,
    /// What agents say.
    pub reports: mpsc::Sender<Report>,
    pub metrics: Metrics,
}

/// Largest request for discovery that is read. A node that resumes names all that it holds, each name with a
/// version (D18): 7.5 MiB for 100,000 workloads.
const MAX_DISCOVERY: usize = 32 * 1024 * 1024;

/// Largest report of an agent that is read.
const MAX_REPORT: usize = 4 * 1024 * 1024;

/// Largest request for a certificate that is read.
const MAX_CSR: usize = 64 * 1024;

/// All services of the port.
pub fn router(shared: &Arc<Shared>) -> Router {
    let ads = AggregatedDiscoveryServiceServer::new(ads::Ads(shared.clone()));
    let ca = IstioCertificateServiceServer::new(ca::Ca(shared.clone()));
    let nodes = NodeServiceServer::new(nodes::Nodes(shared.clone()));
    tonic::transport::Server::builder()
        .http2_keepalive_interval(Some(std::time::Duration::from_secs(10)))
        .http2_keepalive_timeout(Some(std::time::Duration::from_secs(10)))
        .max_concurrent_streams(Some(256))
        .add_service(ads.max_decoding_message_size(MAX_DISCOVERY))
        .add_service(ca.max_decoding_message_size(MAX_CSR))
        .add_service(nodes.max_decoding_message_size(MAX_REPORT))
}

#[cfg(test)]
mod tests;
