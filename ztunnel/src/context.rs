//! What every part of the data path shares.

use crate::{
    metrics::Metrics, node_protocol::Declarations, outbound::balance::Failing, pods::Pods, room::Room,
    workers::Workers,
};
use culvert_core::ids::PodUid;
use culvert_io::{budget::Buffers, identity::Identities, log::Log, xds::Discovery};
use culvert_proto::agent::AgentStats;
use parking_lot::Mutex;
use std::{
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::watch;

/// Shared by reference by all workers.
pub struct Context {
    pub discovery: Discovery,
    pub identities: Identities,
    pub pods: Pods,
    pub workers: Workers,
    pub metrics: Metrics,
    pub agent: AgentReport,
    pub log: Log,
    /// The command line as it was understood, for the admin page.
    pub settings: serde_json::Value,
    pub declarations: Declarations,
    pub limits: Limits,
    /// Endpoints that failed a connection lately.
    pub failing: Failing,
    /// Handshakes of peers in flight, by the pod that they are for.
    pub handshakes: Arc<Room<PodUid>>,
    /// Descriptors of connections, by the pod that they are of.
    pub descriptors: Arc<Room<PodUid>>,
    /// Bytes that wait for slow readers.
    pub buffers: Arc<Buffers>,
    /// Turns true once: no new connections from then on.
    pub drain: watch::Sender<bool>,
}

/// What the agent last said of itself, and when. It has no port of its own: its counters go out with ours.
#[derive(Default)]
pub struct AgentReport(Mutex<Option<(Instant, AgentStats)>>);

impl AgentReport {
    pub fn take(&self, stats: AgentStats) {
        *self.0.lock() = Some((Instant::now(), stats));
    }

    /// The last report and its age.
    pub fn last(&self) -> Option<(Duration, AgentStats)> {
        let last = self.0.lock();
        last.as_ref().map(|(at, stats)| (at.elapsed(), stats.clone()))
    }
}

/// Bounds of one workload.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    pub connections: usize,
    /// Dials in flight, and handshakes of peers.
    pub pending: usize,
    /// Tunnels that peers have open to it.
    pub tunnels: usize,
    /// Sockets that it has in stock.
    pub batch: u32,
}

/// How long a connect may take, to a peer or to the application.
pub const CONNECT_DEADLINE: Duration = Duration::from_secs(10);

/// How long a connection waits for its pod's first SVID.
pub const IDENTITY_PATIENCE: Duration = Duration::from_secs(5);

impl Context {
    /// Returns once there is a snapshot, and the revocation lists that are demanded have been read.
    pub async fn ready(&self) {
        self.discovery.ready().await;
        self.identities.lists_read().await;
    }

    /// Whether connections are served.
    pub fn is_ready(&self) -> bool {
        self.discovery.is_ready() && self.identities.are_lists_read()
    }

    /// Returns once no new connections are taken.
    pub async fn draining(&self) {
        // The sender lives as long as `self`.
        let _ = self.drain.subscribe().wait_for(|drain| *drain).await;
    }
}
