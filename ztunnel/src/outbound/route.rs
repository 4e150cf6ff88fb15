//! Where a captured connection goes: a pure function of the snapshot.
//!
//! ```text
//! Snapshot, source workload, original destination ──▶ Route { Tunnel | Direct | Refuse | Ask }
//! ```
//! Invariant: nothing is sent in plaintext to what is enrolled, bound to a waypoint, or not answered for.
//! An enrolled destination is tunnelled or refused, whatever its health (settled D11, D12).

use culvert_core::{
    ids::{NetworkAddress, PolicyKey, SpiffeId},
    mesh::{EgressMode, Health, LocalityMode, MeshConfig, Protocol, Service, Workload},
    policy::{Connection, Denial, Judgement, PeerPlace, Verdict, judge},
    snapshot::{Lookup, Snapshot},
};
use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

/// The tunnel port of every enrolled pod.
pub const HBONE_PORT: u16 = 15008;

/// Ports of our own listeners in a pod; a connection to one of them would come back to us.
pub const OWN_PORTS: [u16; 4] = [15001, 15006, 15008, 15053];

/// Where a connection goes.
#[derive(Debug)]
pub enum Route {
    Tunnel(Hop),
    Direct(Passthrough),
    Refuse(Refusal),
    /// Control has not answered for this address: ask, and route again.
    Ask(NetworkAddress),
}

/// An enrolled endpoint.
#[derive(Debug)]
pub struct Hop {
    pub endpoint: Arc<Workload>,
    pub service: Option<Arc<Service>>,
    /// The endpoint's tunnel listener.
    pub peer: SocketAddr,
    /// What the CONNECT asks for: the endpoint's own address and port.
    pub target: SocketAddr,
    /// The identities one of which the peer must prove.
    pub expected: Box<[SpiffeId]>,
    /// The source's ALLOW policy that admitted it, if one was in force.
    pub policy: Option<PolicyKey>,
    pub would_deny: Option<Denial>,
}

/// A destination that is reached without a tunnel.
#[derive(Debug)]
pub struct Passthrough {
    pub address: SocketAddr,
    pub endpoint: Option<Arc<Workload>>,
    pub service: Option<Arc<Service>>,
    /// The source's ALLOW policy that admitted it, if one was in force.
    pub policy: Option<PolicyKey>,
    pub would_deny: Option<Denial>,
}

/// Why a captured connection is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("{0} is a port of the mesh's own listeners")]
    OwnPort(u16),
    #[error("the mesh's settings have not been received")]
    NoConfig,
    #[error("{0} lies in the mesh's own ranges and nothing has that address")]
    NobodyThere(IpAddr),
    #[error("no answer about {0} from control")]
    Unanswered(IpAddr),
    #[error("{0} is not declared, and egress is limited to declared destinations")]
    Undeclared(IpAddr),
    #[error("egress is denied")]
    EgressDenied,
    #[error("service {service} has no port {port}")]
    NoSuchPort { service: String, port: u16 },
    #[error("service {0} has no usable endpoint")]
    NoEndpoint(String),
    #[error("{0} is bound to a waypoint, and no waypoint is ready for it")]
    NoWaypoint(String),
    #[error("{0}")]
    Denied(Denial),
}

impl Refusal {
    /// The metrics' and log's word for it.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::OwnPort(_) => "own_port",
            Self::NoConfig => "no_config",
            Self::NobodyThere(_) => "nobody_there",
            Self::Unanswered(_) => "unanswered",
            Self::Undeclared(_) => "undeclared",
            Self::EgressDenied => "egress_denied",
            Self::NoSuchPort { .. } => "no_such_port",
            Self::NoEndpoint(_) => "no_endpoint",
            Self::NoWaypoint(_) => "no_waypoint",
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

/// Picks one of the usable endpoints of a service, or none.
pub type Choose<'c> = &'c mut dyn FnMut(&Service, &[Arc<Workload>]) -> Option<usize>;

/// Decides where a connection of `source` to `destination` goes.
pub fn route(snapshot: &Snapshot, source: &Workload, destination: SocketAddr, choose: Choose<'_>) -> Route {
    let Some(config) = snapshot.config() else {
        return Route::Refuse(Refusal::NoConfig);
    };
    if destination.ip().is_loopback() && OWN_PORTS.contains(&destination.port()) {
        return Route::Refuse(Refusal::OwnPort(destination.port()));
    }
    let address = NetworkAddress {
        network: config.network.clone(),
        ip: destination.ip(),
    };
    let routed = match snapshot.lookup(&address, &source.namespace) {
        Lookup::Workload(endpoint) => to_workload(snapshot, endpoint, destination),
        Lookup::Service(service) => to_service(snapshot, config, service, destination, choose),
        Lookup::Unknown => to_stranger(config, destination),
        Lookup::Unanswered => Route::Ask(address),
    };
    with_source_rules(snapshot, source, routed)
}

fn to_workload(snapshot: &Snapshot, endpoint: &Arc<Workload>, destination: SocketAddr) -> Route {
    if endpoint.waypoint.is_some() || port_is_bound(snapshot, endpoint, destination.port()) {
        return Route::Refuse(Refusal::NoWaypoint(endpoint.uid.to_string()));
    }
    to_endpoint(endpoint, None, destination)
}

/// Whether `port` is the target port of one of the endpoint's services that is bound to a waypoint
/// (settled D23).
pub fn port_is_bound(snapshot: &Snapshot, endpoint: &Workload, port: u16) -> bool {
    endpoint.services.iter().any(|(key, ports)| {
        snapshot.service(key).is_some_and(|service| {
            service.waypoint.is_some()
                && ports
                    .iter()
                    .any(|map| endpoint.target_port(service, map.service_port) == Some(port))
        })
    })
}

fn to_service(
    snapshot: &Snapshot,
    config: &MeshConfig,
    service: &Arc<Service>,
    destination: SocketAddr,
    choose: Choose<'_>,
) -> Route {
    if !service.has_port(destination.port()) {
        let service = service.key.to_string();
        return Route::Refuse(Refusal::NoSuchPort {
            service,
            port: destination.port(),
        });
    }
    if service.waypoint.is_some() {
        return Route::Refuse(Refusal::NoWaypoint(service.key.to_string()));
    }
    if service.external || service.balancing.mode == LocalityMode::Passthrough {
        if service.external && config.egress == EgressMode::Deny {
            return Route::Refuse(Refusal::EgressDenied);
        }
        return Route::Direct(Passthrough {
            address: destination,
            endpoint: None,
            service: Some(service.clone()),
            policy: None,
            would_deny: None,
        });
    }
    let usable = usable_endpoints(snapshot, service, destination);
    let chosen = choose(service, &usable).and_then(|index| usable.get(index));
    let target = chosen.and_then(|endpoint| {
        let port = endpoint.target_port(service, destination.port())?;
        Some((
            endpoint,
            SocketAddr::new(address_of(endpoint, service, destination.ip())?, port),
        ))
    });
    match target {
        Some((endpoint, target)) => to_endpoint(endpoint, Some(service), target),
        None => Route::Refuse(Refusal::NoEndpoint(service.key.to_string())),
    }
}

/// Endpoints that serve the port and have an address of a family the service answers with: the ready
/// ones; without any, those being deleted if the service says so; all of them if it publishes unready
/// addresses.
fn usable_endpoints(snapshot: &Snapshot, service: &Service, destination: SocketAddr) -> Vec<Arc<Workload>> {
    let serving = |wanted: Option<Health>| {
        snapshot
            .endpoints(&service.key)
            .iter()
            .filter(|endpoint| wanted.is_none_or(|health| endpoint.health == health))
            .filter(|endpoint| endpoint.target_port(service, destination.port()).is_some())
            .filter(|endpoint| address_of(endpoint, service, destination.ip()).is_some())
            .cloned()
            .collect::<Vec<_>>()
    };
    if service.balancing.use_unready {
        return serving(None);
    }
    let ready = serving(Some(Health::Ready));
    if ready.is_empty() && service.balancing.use_terminating {
        return serving(Some(Health::Terminating));
    }
    ready
}

/// The endpoint's address, of the family that was asked for where it has one.
fn address_of(endpoint: &Workload, service: &Service, asked: IpAddr) -> Option<IpAddr> {
    let admitted = || {
        endpoint
            .addresses
            .iter()
            .copied()
            .filter(|ip| service.families.admits(*ip))
    };
    admitted()
        .find(|ip| ip.is_ipv4() == asked.is_ipv4())
        .or_else(|| admitted().next())
}

fn to_endpoint(endpoint: &Arc<Workload>, service: Option<&Arc<Service>>, target: SocketAddr) -> Route {
    match endpoint.protocol {
        Protocol::Hbone => {
            let alternates = service.map(|s| s.subject_alt_names.iter()).unwrap_or_default();
            Route::Tunnel(Hop {
                endpoint: endpoint.clone(),
                service: service.cloned(),
                peer: SocketAddr::new(target.ip(), HBONE_PORT),
                target,
                expected: std::iter::once(&endpoint.identity)
                    .chain(alternates)
                    .cloned()
                    .collect(),
                policy: None,
                would_deny: None,
            })
        }
        Protocol::Tcp => Route::Direct(Passthrough {
            address: target,
            endpoint: Some(endpoint.clone()),
            service: service.cloned(),
            policy: None,
            would_deny: None,
        }),
    }
}

/// Control has said that it knows nothing there.
fn to_stranger(config: &MeshConfig, destination: SocketAddr) -> Route {
    if config.covers(destination.ip()) {
        return Route::Refuse(Refusal::NobodyThere(destination.ip()));
    }
    match config.egress {
        EgressMode::Allow => Route::Direct(Passthrough {
            address: destination,
            endpoint: None,
            service: None,
            policy: None,
            would_deny: None,
        }),
        EgressMode::RegistryOnly => Route::Refuse(Refusal::Undeclared(destination.ip())),
        EgressMode::Deny => Route::Refuse(Refusal::EgressDenied),
    }
}

/// Judges what the source may reach: the peer of an outbound rule is the destination (settled D21).
fn with_source_rules(snapshot: &Snapshot, source: &Workload, routed: Route) -> Route {
    let (endpoint, address) = match &routed {
        Route::Tunnel(hop) => (Some(&hop.endpoint), hop.target),
        Route::Direct(direct) => (direct.endpoint.as_ref(), direct.address),
        Route::Refuse(_) | Route::Ask(_) => return routed,
    };
    match judge_outbound(snapshot, source, endpoint.map(AsRef::as_ref), address) {
        Judgement {
            verdict: Verdict::Deny(denial),
            ..
        } => Route::Refuse(Refusal::Denied(denial)),
        Judgement {
            verdict: Verdict::Allow(policy),
            would_deny,
        } => match routed {
            Route::Tunnel(hop) => Route::Tunnel(Hop {
                policy,
                would_deny,
                ..hop
            }),
            Route::Direct(direct) => Route::Direct(Passthrough {
                policy,
                would_deny,
                ..direct
            }),
            refused => refused,
        },
    }
}

/// The verdict of the source's own rules on a destination; `recheck` asks the same question.
pub fn judge_outbound(
    snapshot: &Snapshot,
    source: &Workload,
    endpoint: Option<&Workload>,
    address: SocketAddr,
) -> Judgement {
    let place = match endpoint {
        Some(workload) => PeerPlace::Known {
            namespace: &workload.namespace,
            service_account: &workload.service_account,
        },
        None => PeerPlace::Outside,
    };
    let source_ip = source
        .addresses
        .iter()
        .copied()
        .find(|ip| ip.is_ipv4() == address.is_ipv4())
        .unwrap_or(address.ip());
    let connection = Connection {
        identity: endpoint
            .filter(|workload| workload.protocol == Protocol::Hbone)
            .map(|workload| &workload.identity),
        place,
        source_ip,
        destination_ip: address.ip(),
        destination_port: address.port(),
    };
    match snapshot
        .outbound
        .in_force(&source.namespace, &source.outbound_policies)
    {
        Ok(policies) => judge(policies, &connection),
        Err(missing) => Judgement {
            verdict: Verdict::Deny(Denial::Missing(missing.clone())),
            would_deny: None,
        },
    }
}

#[cfg(test)]
mod tests;
