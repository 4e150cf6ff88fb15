//! The connections open now, of one pod.
//!
//! Invariant: a connection is listed for exactly as long as it lives. Dropping its [`Open`] takes it off
//! the list and, if it had opened, writes its closing record, so cancellation counts too. Who waits to be
//! carried has a seat already, and as many seats are all that a pod has.

use crate::{
    access::{self, Cut, Known, Refusing},
    metrics::{Ends, Flag, Metrics, OpenSockets, Reporter},
};
use culvert_core::{
    hbone::Authority,
    ids::{PolicyKey, ServiceKey, SpiffeId, WorkloadUid},
};
use culvert_io::copy::{Fault, Flow};
use parking_lot::Mutex;
use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, AtomicUsize, Ordering},
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
    pub fn reporter(&self) -> Reporter {
        match self {
            Self::OutboundTunnel { .. } | Self::OutboundDirect { .. } => Reporter::Source,
            Self::InboundTunnel { .. } | Self::InboundPlaintext => Reporter::Destination,
        }
    }

    pub fn direction(&self) -> &'static str {
        self.reporter().direction()
    }

    pub fn peer(&self) -> Option<&SpiffeId> {
        match self {
            Self::OutboundTunnel { peer, .. } | Self::InboundTunnel { peer, .. } => Some(peer),
            Self::OutboundDirect { .. } | Self::InboundPlaintext => None,
        }
    }

    /// Sockets that it holds here: the pod's own, and in plaintext the other end's.
    fn sockets(&self) -> i64 {
        match self {
            Self::OutboundTunnel { .. } | Self::InboundTunnel { .. } => 1,
            Self::OutboundDirect { .. } | Self::InboundPlaintext => 2,
        }
    }
}

/// One open connection.
pub struct Connection {
    pub facts: Facts,
    pub known: Known,
    pub flow: Flow,
    pub opened: Instant,
    ends: Ends,
    /// Bytes that the pair's counters have been told of, each way.
    told: Mutex<(u64, u64)>,
    cut: OnceLock<Box<Cut>>,
}

impl Connection {
    /// Resets it on both sides, and keeps why.
    pub fn cut(&self, why: Cut) {
        // The first reason is the one.
        let _ = self.cut.set(Box::new(why));
        self.flow.cut();
    }

    /// Tells the counters of its pair what it has moved since it last did.
    pub fn tell(&self) {
        let mut told = self.told.lock();
        let now = (
            self.flow.received.load(Ordering::Relaxed),
            self.flow.sent.load(Ordering::Relaxed),
        );
        self.ends.moved(now.0 - told.0, now.1 - told.1);
        *told = now;
    }
}

/// The open connections of a pod, bounded.
pub struct Connections {
    limit: usize,
    seats: AtomicUsize,
    next: AtomicU64,
    open: Mutex<HashMap<u64, Arc<Connection>>>,
}

/// The place of one connection, open or waiting, until dropped.
pub struct Seat<'c>(&'c Connections);

impl Drop for Seat<'_> {
    fn drop(&mut self) {
        self.0.seats.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The pod has as many connections as it may.
#[derive(Debug, thiserror::Error)]
#[error("the workload has {0} connections open or waiting, its limit")]
pub struct AtLimit(usize);

/// The workload has its share of what the node has for connections.
#[derive(Debug, thiserror::Error)]
#[error("the workload has its share of this node's descriptors")]
pub struct NoRoom;

/// Neither says anything of a peer or a rule.
macro_rules! no_room {
    ($($error:ty),*) => {$(
        impl Refusing for $error {
            fn reason(&self) -> &'static str {
                "limit"
            }

            fn policy(&self) -> Option<&PolicyKey> {
                None
            }

            fn flag(&self) -> Flag {
                Flag::Connect
            }
        }
    )*};
}

no_room!(AtLimit, NoRoom);

impl Connections {
    pub fn new(limit: usize) -> Self {
        Self {
            limit,
            seats: AtomicUsize::new(0),
            next: AtomicU64::new(0),
            open: Mutex::default(),
        }
    }

    /// A place for one more connection, before anything is done for it.
    pub fn enter(&self) -> Result<Seat<'_>, AtLimit> {
        let more = |seats| (seats < self.limit).then_some(seats + 1);
        self.seats
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, more)
            .map_err(|_| AtLimit(self.limit))?;
        Ok(Seat(self))
    }

    /// Connections that are open or wait.
    pub fn held(&self) -> usize {
        self.seats.load(Ordering::Relaxed)
    }

    /// Lists a connection that has a seat; from now on it can be cut.
    pub fn open<'c>(&'c self, facts: Facts, known: &Known, metrics: &Metrics) -> Open<'c> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (reporter, sockets) = (facts.way.reporter(), facts.way.sockets());
        let connection = Arc::new(Connection {
            facts,
            known: known.clone(),
            flow: Flow::default(),
            opened: Instant::now(),
            ends: known.ends(metrics),
            told: Mutex::default(),
            cut: OnceLock::new(),
        });
        self.open.lock().insert(id, connection.clone());
        Open {
            all: self,
            id,
            connection,
            _gauge: metrics.open(reporter, sockets),
            has_opened: false,
            fault: None,
        }
    }

    pub fn count(&self) -> usize {
        self.open.lock().len()
    }

    pub fn all(&self) -> Vec<Arc<Connection>> {
        self.open.lock().values().cloned().collect()
    }

    pub fn cut_all(&self, reason: &'static str) {
        self.all()
            .iter()
            .for_each(|connection| connection.cut(Cut::because(reason)));
    }
}

/// A listed connection.
pub struct Open<'c> {
    all: &'c Connections,
    id: u64,
    pub connection: Arc<Connection>,
    _gauge: OpenSockets,
    has_opened: bool,
    fault: Option<Fault>,
}

impl Open<'_> {
    /// Both ends are connected: it counts, and will have a closing record.
    pub fn opened(&mut self) {
        self.has_opened = true;
        self.connection.ends.opened();
        access::opened(&self.connection.known);
    }

    /// Says how it ended; without this, as cancelled.
    pub fn ended(mut self, outcome: Result<(), Fault>) {
        self.fault = outcome.err();
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.all.open.lock().remove(&self.id);
        if !self.has_opened {
            return;
        }
        let connection = &*self.connection;
        connection.tell();
        let cut = connection.cut.get().map(AsRef::as_ref);
        connection
            .ends
            .closed(cut.map_or(Flag::None, |cut| match cut.policy {
                Some(_) => Flag::Deny,
                None => Flag::None,
            }));
        let took = connection.opened.elapsed();
        access::complete(
            &connection.known,
            &connection.flow,
            took,
            self.fault.as_ref(),
            cut,
        );
    }
}
