//! The pods that this node's agent has handed over, and what each of them holds here.
//!
//! Invariant: everything of a pod (sockets, tunnels, connections, its SVID's lease) hangs on its [`Pod`],
//! so that nothing of it is left when the pod has gone.

use crate::{
    connections::Connections,
    context::Limits,
    inbound::deliver::Ports,
    outbound::{balance::Sessions, tunnel::Tunnels},
    room::Room,
    sockets::Sockets,
    trust::LiveTunnels,
};
use culvert_core::{
    ids::{PodUid, SpiffeId, WorkloadUid},
    mesh::Workload,
    snapshot::Snapshot,
};
use culvert_io::{
    budget::{Budget, Buffers},
    identity::Lease,
    xds::Discovery,
};
use parking_lot::RwLock;
use std::{collections::HashMap, net::IpAddr, sync::Arc, time::Duration};
use tokio::sync::{Semaphore, watch};

/// One enrolled pod of this node.
pub struct Pod {
    pub uid: PodUid,
    pub namespace: String,
    pub name: String,
    pub workload_uid: WorkloadUid,
    pub addresses: Vec<IpAddr>,
    pub netns_cookie: u64,
    /// Ports that it listens on for us.
    pub listeners: usize,
    pub lease: Lease,
    pub sockets: Sockets,
    pub tunnels: Tunnels,
    /// Where its deliveries come from.
    pub ports: Ports,
    /// Where services with session affinity have taken it.
    pub sessions: Sessions,
    /// Every tunnel that is up, of both directions.
    pub live: LiveTunnels,
    pub connections: Connections,
    /// Dials in flight.
    pub pending: Semaphore,
    /// Handshakes in flight, by the peer's address: none of them takes all.
    pub handshakes: Arc<Room<IpAddr>>,
    /// Tunnels that peers have open, by their addresses.
    pub accepted: Arc<Room<IpAddr>>,
    /// Bytes that wait for slow readers.
    pub budget: Arc<Budget>,
    gone: watch::Sender<bool>,
}

/// What the agent says of a pod.
pub struct Introduction {
    pub uid: PodUid,
    pub namespace: String,
    pub name: String,
    pub workload_uid: WorkloadUid,
    pub addresses: Vec<IpAddr>,
    pub netns_cookie: u64,
    pub listeners: usize,
}

/// How long a pod may be unknown to discovery before its connections are refused.
const KNOWN_WITHIN: Duration = Duration::from_secs(5);

impl Pod {
    pub fn new(
        introduction: Introduction,
        lease: Lease,
        sockets: Sockets,
        limits: Limits,
        buffers: &Arc<Buffers>,
    ) -> Self {
        let Introduction {
            uid,
            namespace,
            name,
            workload_uid,
            addresses,
            netns_cookie,
            listeners,
        } = introduction;
        Self {
            uid,
            namespace,
            name,
            workload_uid,
            addresses,
            netns_cookie,
            listeners,
            lease,
            sockets,
            tunnels: Tunnels::default(),
            ports: Ports::default(),
            sessions: Sessions::default(),
            live: LiveTunnels::default(),
            connections: Connections::new(limits.connections),
            pending: Semaphore::new(limits.pending),
            handshakes: Room::new(limits.pending),
            accepted: Room::new(limits.tunnels),
            budget: Budget::new(buffers),
            gone: watch::Sender::new(false),
        }
    }

    pub fn identity(&self) -> &SpiffeId {
        self.lease.id()
    }

    /// This pod as discovery knows it; waits for it for a while after the pod has arrived.
    pub async fn workload(&self, discovery: &Discovery) -> Option<(Arc<Snapshot>, Arc<Workload>)> {
        let find = || {
            let snapshot = discovery.snapshot();
            let workload = snapshot.workload(&self.workload_uid).cloned()?;
            Some((snapshot, workload))
        };
        if let Some(found) = find() {
            return Some(found);
        }
        let mut generations = discovery.generations();
        let arrives = async {
            loop {
                if let Some(found) = find() {
                    return Some(found);
                }
                generations.changed().await.ok()?;
            }
        };
        let waited = Box::pin(tokio::time::timeout(KNOWN_WITHIN, arrives)).await;
        waited.ok().flatten()
    }

    /// Ends everything of the pod: listeners close, connections are reset.
    pub fn leave(&self) {
        self.gone.send_replace(true);
        self.tunnels.close();
        self.connections.cut_all("pod_gone");
    }

    /// Returns once the pod has gone.
    pub async fn left(&self) {
        let _ = self.gone.subscribe().wait_for(|gone| *gone).await;
    }
}

/// All pods of this node.
#[derive(Default)]
pub struct Pods(RwLock<HashMap<PodUid, Arc<Pod>>>);

impl Pods {
    pub fn insert(&self, pod: Arc<Pod>) -> Option<Arc<Pod>> {
        self.0.write().insert(pod.uid.clone(), pod)
    }

    pub fn remove(&self, uid: &PodUid) -> Option<Arc<Pod>> {
        self.0.write().remove(uid)
    }

    pub fn get(&self, uid: &PodUid) -> Option<Arc<Pod>> {
        self.0.read().get(uid).cloned()
    }

    pub fn all(&self) -> Vec<Arc<Pod>> {
        self.0.read().values().cloned().collect()
    }
}
