//! Whether an arriving connection reaches the application: a pure function of the snapshot.
//!
//! ```text
//! Snapshot, pod, peer, CONNECT ──▶ Permit | Refusal
//! ```
//! Invariant: a [`Permit`] is made here alone, and the dialler takes nothing else. The same function
//! admits a connection and judges it again after every update.

use super::super::outbound::route::{OWN_PORTS, port_is_bound};
use culvert_core::{
    hbone::Authority,
    ids::{NetworkAddress, PolicyKey, ServiceKey, SpiffeId},
    mesh::Workload,
    policy::{Connection, Denial, PeerPlace, Verdict, judge},
    snapshot::Snapshot,
};
use http::StatusCode;
use std::net::{IpAddr, SocketAddr};

/// What is known of an arriving connection.
#[derive(Debug, Clone, Copy)]
pub struct Arrival<'a> {
    /// The pod it arrived in, as discovery knows it.
    pub workload: Option<&'a Workload>,
    /// The address it was accepted on: the pod's own.
    pub accepted_ip: IpAddr,
    pub peer_ip: IpAddr,
    /// The identity the peer's certificate proves; none for plaintext.
    pub identity: Option<&'a SpiffeId>,
    pub target: Target<'a>,
}

/// What the peer asks for.
#[derive(Debug, Clone, Copy)]
pub enum Target<'a> {
    /// The CONNECT's authority.
    Authority(&'a Authority),
    /// The original destination port of a captured plaintext connection.
    Plaintext(u16),
}

/// The right to dial the application, for this connection alone.
#[derive(Debug, PartialEq, Eq)]
pub struct Permit {
    target: SocketAddr,
    pub service: Option<ServiceKey>,
    /// The ALLOW policy that admitted it, if one was in force.
    pub policy: Option<PolicyKey>,
    pub would_deny: Option<Denial>,
}

impl Permit {
    /// Where the application listens: always the pod's own address.
    pub fn target(&self) -> SocketAddr {
        self.target
    }
}

/// Why an arriving connection is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("discovery does not know this pod")]
    UnknownPod,
    #[error("authority {0} is not this pod")]
    NotThisPod(String),
    #[error("authority {0} is no service of this pod")]
    NotItsService(String),
    #[error("{0} is a port of the mesh's own listeners")]
    OwnPort(u16),
    #[error("only its waypoint may reach this pod")]
    NotFromWaypoint,
    #[error("{0}")]
    Denied(Denial),
}

impl Refusal {
    /// What the peer is told.
    pub fn status(&self) -> StatusCode {
        match self {
            Self::NotThisPod(_) => StatusCode::BAD_REQUEST,
            Self::UnknownPod | Self::NotItsService(_) | Self::OwnPort(_) => StatusCode::SERVICE_UNAVAILABLE,
            Self::NotFromWaypoint | Self::Denied(_) => StatusCode::UNAUTHORIZED,
        }
    }

    /// The metrics' and log's word for it.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::UnknownPod => "unknown_pod",
            Self::NotThisPod(_) => "not_this_pod",
            Self::NotItsService(_) => "not_its_service",
            Self::OwnPort(_) => "own_port",
            Self::NotFromWaypoint => "not_from_waypoint",
            Self::Denied(_) => "denied",
        }
    }

    /// The rule that refuses, if it was a rule.
    pub fn policy(&self) -> Option<&PolicyKey> {
        match self {
            Self::Denied(denial) => Some(denial.policy()),
            _ => None,
        }
    }
}

/// Decides whether an arriving connection reaches the application.
pub fn admit(snapshot: &Snapshot, arrival: &Arrival<'_>) -> Result<Permit, Refusal> {
    let workload = arrival.workload.ok_or(Refusal::UnknownPod)?;
    let (port, service) = match arrival.target {
        Target::Plaintext(port) => (port, None),
        Target::Authority(Authority::Address(address)) => {
            if address.ip() != arrival.accepted_ip {
                return Err(Refusal::NotThisPod(address.to_string()));
            }
            (address.port(), None)
        }
        Target::Authority(Authority::Host { name, port }) => {
            let (service, port) = own_service(snapshot, workload, name, *port)
                .ok_or_else(|| Refusal::NotItsService(format!("{name}:{port}")))?;
            (port, Some(service))
        }
    };
    if OWN_PORTS.contains(&port) {
        return Err(Refusal::OwnPort(port));
    }
    if workload.waypoint.is_some() || port_is_bound(snapshot, workload, port) {
        return Err(Refusal::NotFromWaypoint);
    }
    let connection = Connection {
        identity: arrival.identity,
        place: place_of(snapshot, workload, arrival),
        source_ip: arrival.peer_ip,
        destination_ip: arrival.accepted_ip,
        destination_port: port,
    };
    let policies = snapshot
        .inbound
        .in_force(&workload.namespace, &workload.policies)
        .map_err(|missing| Refusal::Denied(Denial::Missing(missing.clone())))?;
    let judgement = judge(policies, &connection);
    match judgement.verdict {
        Verdict::Deny(denial) => Err(Refusal::Denied(denial)),
        Verdict::Allow(policy) => Ok(Permit {
            target: SocketAddr::new(arrival.accepted_ip, port),
            service,
            policy,
            would_deny: judgement.would_deny,
        }),
    }
}

/// The namespace and account of the peer: of the workload at its address, if that workload has the
/// identity that the peer proved.
fn place_of<'s>(snapshot: &'s Snapshot, workload: &Workload, arrival: &Arrival<'_>) -> PeerPlace<'s> {
    let Some(identity) = arrival.identity else {
        return PeerPlace::Outside;
    };
    let address = NetworkAddress {
        network: workload.network.clone(),
        ip: arrival.peer_ip,
    };
    match snapshot.workload_at(&address) {
        Some(peer) if peer.identity == *identity => PeerPlace::Known {
            namespace: &peer.namespace,
            service_account: &peer.service_account,
        },
        _ => PeerPlace::Unknown,
    }
}

/// The service that a host-name authority means, which must be one of the pod's own, and the pod's port
/// behind it.
fn own_service(snapshot: &Snapshot, workload: &Workload, name: &str, port: u16) -> Option<(ServiceKey, u16)> {
    workload
        .services
        .iter()
        .filter_map(|(key, _)| snapshot.service(key))
        .filter(|service| service.hostname() == name)
        .find_map(|service| Some((service.key.clone(), workload.target_port(service, port)?)))
}

#[cfg(test)]
mod tests;
