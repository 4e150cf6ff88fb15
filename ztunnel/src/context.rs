//! What every part of the data path shares.

use crate::{metrics::Metrics, node_protocol::Declarations, pods::Pods};
use culvert_io::{identity::Identities, xds::Discovery};
use std::time::Duration;
use tokio::sync::watch;

/// Shared by reference by all workers.
pub struct Context {
    pub discovery: Discovery,
    pub identities: Identities,
    pub pods: Pods,
    pub metrics: Metrics,
    pub declarations: Declarations,
    pub limits: Limits,
    /// Turns true once: no new connections from then on.
    pub drain: watch::Sender<bool>,
}

/// Bounds of one workload.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    pub connections: usize,
    /// Dials and handshakes in flight.
    pub pending: usize,
}

/// How long a connect may take, to a peer or to the application.
pub const CONNECT_DEADLINE: Duration = Duration::from_secs(10);

/// How long a connection waits for its pod's first SVID.
pub const IDENTITY_PATIENCE: Duration = Duration::from_secs(5);

impl Context {
    /// Returns once no new connections are taken.
    pub async fn draining(&self) {
        // The sender lives as long as `self`.
        let _ = self.drain.subscribe().wait_for(|drain| *drain).await;
    }
}
