//! The access log: one record when a connection opens, one when it ends, one when it is refused.
//!
//! Target `access`: `debug` for what opened, `info` for what ended, `warn` for what was refused.
//! Invariant: a refusal leaves exactly one record here, with its reason, both identities as far as they are
//! known, and the rule that refuses. What the peer refuses has the rule at the peer alone, in the record with the
//! same trace id: which rule it is would tell whoever asks how to be let in.

use crate::metrics::{Ends, Flag, Metrics, Party, Reporter};
use culvert_core::{
    hbone::Traceparent,
    ids::{NetworkAddress, PolicyKey, ServiceKey, SpiffeId, WorkloadUid},
    mesh::{Service, Workload},
    snapshot::Snapshot,
};
use culvert_io::copy::{Fault, Flow};
use std::{
    fmt::Display,
    net::SocketAddr,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

/// What is known of a connection, for its records and its counters.
#[derive(Clone)]
pub struct Known {
    pub reporter: Reporter,
    pub source_address: SocketAddr,
    /// Where the connection goes on: the peer's tunnel port, or the destination itself.
    pub destination_address: Option<SocketAddr>,
    /// What was asked for inside the tunnel.
    pub hbone_address: Option<SocketAddr>,
    pub source: Option<Arc<Workload>>,
    pub source_identity: Option<SpiffeId>,
    pub destination: Option<Arc<Workload>>,
    pub destination_identity: Option<SpiffeId>,
    pub service: Option<Served>,
    pub trace: Option<Traceparent>,
}

/// The service that a connection is for. A node knows those of its own pods by name alone, unless somebody on
/// it has called them.
#[derive(Clone)]
pub enum Served {
    Whole(Arc<Service>),
    Named(ServiceKey),
}

impl Served {
    pub fn key(&self) -> &ServiceKey {
        match self {
            Self::Whole(service) => &service.key,
            Self::Named(key) => key,
        }
    }

    /// The object's name, which is the first label of a cluster's host name.
    pub fn name(&self) -> &str {
        match self {
            Self::Whole(service) => &service.name,
            Self::Named(key) => key.hostname().split('.').next().unwrap_or_default(),
        }
    }
}

impl Known {
    pub fn new(reporter: Reporter, source: SocketAddr, destination: Option<SocketAddr>) -> Self {
        Self {
            reporter,
            source_address: source,
            destination_address: destination,
            hbone_address: None,
            source: None,
            source_identity: None,
            destination: None,
            destination_identity: None,
            service: None,
            trace: None,
        }
    }

    /// Fills in the workloads at both ends of what has arrived in a pod, as far as discovery knows them.
    pub fn between(&mut self, snapshot: &Snapshot, own: &WorkloadUid) {
        self.destination = snapshot.workload(own).cloned();
        if let Some(own) = &self.destination {
            let address = NetworkAddress {
                network: own.network.clone(),
                ip: self.source_address.ip(),
            };
            self.source = snapshot.workload_at(&address).cloned();
        }
    }

    /// The counters of its pair.
    pub fn ends(&self, metrics: &Metrics) -> Ends {
        let party = Party {
            source: self.source.as_ref(),
            source_identity: self.source_identity.as_ref(),
            destination: self.destination.as_ref(),
            destination_identity: self.destination_identity.as_ref(),
            service: self.service.as_ref(),
        };
        metrics.ends(self.reporter, &party)
    }
}

/// Writes a record with the fields that all records share, and some of its own.
macro_rules! record {
    ($level:ident, $known:expr, $message:literal, { $($field:tt)* }) => {{
        let known: &Known = $known;
        let (source, destination) = (known.source.as_deref(), known.destination.as_deref());
        tracing::$level!(
            target: "access",
            {
                src.addr = %known.source_address,
                src.workload = source.map(|workload| &*workload.workload_name),
                src.namespace = source.map(|workload| &*workload.namespace),
                src.identity = known.source_identity.as_ref().map(SpiffeId::as_str).unwrap_or("unknown"),
                dst.addr = known.destination_address.map(tracing::field::display),
                dst.hbone_addr = known.hbone_address.map(tracing::field::display),
                dst.service = known.service.as_ref().map(|service| service.key().hostname()),
                dst.workload = destination.map(|workload| &*workload.workload_name),
                dst.namespace = destination.map(|workload| &*workload.namespace),
                dst.identity = known.destination_identity.as_ref().map(SpiffeId::as_str).unwrap_or("unknown"),
                direction = known.reporter.direction(),
                trace_id = known.trace.as_ref().map(|trace| tracing::field::display(trace.trace_id())),
                $($field)*
            },
            $message
        )
    }};
}

/// Why a connection was ended by us after it had opened.
#[derive(Debug, Clone)]
pub struct Cut {
    pub reason: &'static str,
    pub policy: Option<PolicyKey>,
}

impl Cut {
    pub fn because(reason: &'static str) -> Self {
        Self { reason, policy: None }
    }
}

pub fn opened(known: &Known) {
    record!(debug, known, "connection opened", {});
}

/// The end of a connection that had opened; bytes are seen from the reporting pod.
pub fn complete(known: &Known, flow: &Flow, took: Duration, fault: Option<&Fault>, cut: Option<&Cut>) {
    let (received, sent) = (
        flow.received.load(Ordering::Relaxed),
        flow.sent.load(Ordering::Relaxed),
    );
    let (bytes_sent, bytes_recv) = match known.reporter {
        Reporter::Source => (received, sent),
        Reporter::Destination => (sent, received),
    };
    let duration = format_args!("{}ms", took.as_millis());
    match cut {
        Some(cut) => record!(warn, known, "connection cut", {
            bytes_sent, bytes_recv, duration = %duration, reason = cut.reason,
            policy = cut.policy.as_ref().map(PolicyKey::as_str),
            error = fault.map(tracing::field::display)
        }),
        None => record!(info, known, "connection complete", {
            bytes_sent, bytes_recv, duration = %duration, error = fault.map(tracing::field::display)
        }),
    }
}

/// An error that refuses a connection.
pub trait Refusing: Display {
    /// The metrics' and log's word for it.
    fn reason(&self) -> &'static str;
    /// The rule that refuses, if it is a rule.
    fn policy(&self) -> Option<&PolicyKey>;
    fn flag(&self) -> Flag;
}

/// Whoever had asked for the connection has given it up before it was there: nobody refused it.
pub fn given_up(metrics: &Metrics, known: &Known, error: &dyn Refusing) {
    known.ends(metrics).failed(error.flag());
    record!(info, known, "connection given up", { reason = error.reason() });
}

/// Tells of a refusal: one record, and the counters.
pub fn refused(metrics: &Metrics, known: &Known, error: &dyn Refusing) {
    let (direction, reason) = (known.reporter.direction(), error.reason());
    metrics.refused.with_label_values(&[direction, reason]).inc();
    known.ends(metrics).failed(error.flag());
    if let Some(policy) = error.policy() {
        metrics.decisions.count(&[direction, "deny", policy.as_str()]);
    }
    record!(warn, known, "connection failed", {
        reason, policy = error.policy().map(PolicyKey::as_str), error = %error
    });
}

#[cfg(test)]
mod tests;
