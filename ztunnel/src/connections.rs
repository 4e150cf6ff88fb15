//! The connections open now, of one pod.
//!
//! Invariant: a connection is listed for exactly as long as it lives. Dropping its [`Open`] takes it off
//! the list and writes its closing record, so cancellation counts too.

use crate::metrics::{Ends, Metrics};
use culvert_core::{
    hbone::Authority,
    ids::{ServiceKey, SpiffeId, WorkloadUid},
};
use culvert_io::copy::{Fault, Flow};
use parking_lot::Mutex;
use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

/// What a connection is, for judging it again and for showing it.
#[derive(Debug, Clone)]
pub struct Facts {
    pub source: SocketAddr,
    pub destination: SocketAddr,
    pub way: Way,
}

/// Which way a connection goes, with what its verdict depended on.
#[derive(Debug, Clone)]
pub enum Way {
    /// Through a tunnel to an enrolled endpoint.
    OutboundTunnel {
        endpoint: WorkloadUid,
        peer: SpiffeId,
        target: SocketAddr,
        service: Option<ServiceKey>,
    },
    /// In plaintext to what is outside the mesh.
    OutboundDirect {
        endpoint: Option<WorkloadUid>,
        target: SocketAddr,
    },
    /// From a tunnel to the application.
    InboundTunnel {
        peer: SpiffeId,
        authority: Authority,
        accepted_ip: IpAddr,
    },
    /// Plaintext to the application.
    InboundPlaintext,
}

impl Way {
    pub fn direction(&self) -> &'static str {
        match self {
            Self::OutboundTunnel { .. } | Self::OutboundDirect { .. } => "outbound",
            Self::InboundTunnel { .. } | Self::InboundPlaintext => "inbound",
        }
    }

    pub fn peer(&self) -> Option<&SpiffeId> {
        match self {
            Self::OutboundTunnel { peer, .. } | Self::InboundTunnel { peer, .. } => Some(peer),
            Self::OutboundDirect { .. } | Self::InboundPlaintext => None,
        }
    }
}

/// One open connection.
pub struct Connection {
    pub facts: Facts,
    pub flow: Flow,
    pub opened: Instant,
}

/// The open connections of a pod, bounded.
pub struct Connections {
    limit: usize,
    next: AtomicU64,
    open: Mutex<HashMap<u64, Arc<Connection>>>,
}

/// The pod has as many connections as it may.
#[derive(Debug, thiserror::Error)]
#[error("the workload has {0} connections open, its limit")]
pub struct AtLimit(usize);

impl Connections {
    pub fn new(limit: usize) -> Self {
        Self {
            limit,
            next: AtomicU64::new(0),
            open: Mutex::default(),
        }
    }

    /// Lists a connection.
    pub fn open<'c>(
        &'c self,
        facts: Facts,
        identity: &SpiffeId,
        ends: Ends,
        metrics: &Metrics,
    ) -> Result<Open<'c>, AtLimit> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let connection = Arc::new(Connection {
            facts,
            flow: Flow::default(),
            opened: Instant::now(),
        });
        {
            let mut open = self.open.lock();
            if open.len() >= self.limit {
                return Err(AtLimit(self.limit));
            }
            open.insert(id, connection.clone());
        }
        ends.opened.inc();
        metrics
            .open
            .with_label_values(&[connection.facts.way.direction()])
            .inc();
        let gauge = metrics
            .open
            .with_label_values(&[connection.facts.way.direction()]);
        tracing::debug!(target: "access", source = %connection.facts.source, destination = %connection.facts.destination,
            direction = connection.facts.way.direction(), "connection opened");
        Ok(Open {
            all: self,
            id,
            connection,
            ends,
            gauge,
            identity: identity.clone(),
            error: None,
        })
    }

    pub fn count(&self) -> usize {
        self.open.lock().len()
    }

    pub fn all(&self) -> Vec<Arc<Connection>> {
        self.open.lock().values().cloned().collect()
    }

    pub fn cut_all(&self) {
        self.all().iter().for_each(|connection| connection.flow.cut());
    }
}

/// A listed connection.
pub struct Open<'c> {
    all: &'c Connections,
    id: u64,
    pub connection: Arc<Connection>,
    ends: Ends,
    gauge: prometheus::IntGauge,
    identity: SpiffeId,
    error: Option<String>,
}

impl Open<'_> {
    /// Says how it ended; without this, as cancelled.
    pub fn ended(mut self, outcome: Result<(), Fault>) {
        self.error = outcome.err().map(|fault| fault.to_string());
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.all.open.lock().remove(&self.id);
        self.gauge.dec();
        let Connection { facts, flow, opened } = &*self.connection;
        let (received, sent) = (
            flow.received.load(Ordering::Relaxed),
            flow.sent.load(Ordering::Relaxed),
        );
        self.ends.closed.inc();
        self.ends.received.inc_by(received);
        self.ends.sent.inc_by(sent);
        let (own, peer) = (
            self.identity.as_str(),
            facts.way.peer().map(SpiffeId::as_str).unwrap_or_default(),
        );
        let outbound = facts.way.direction() == "outbound";
        let (source, destination) = if outbound { (own, peer) } else { (peer, own) };
        tracing::info!(
            target: "access", { src.addr = %facts.source,
            src.identity = source,
            dst.addr = %facts.destination,
            dst.identity = destination,
            direction = facts.way.direction(),
            bytes_recv = received,
            bytes_sent = sent,
            duration = %format_args!("{}ms", opened.elapsed().as_millis()),
            error = self.error.as_deref() }, "connection complete");
    }
}
