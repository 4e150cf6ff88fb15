//! What the mesh says about a name: a pure function of the snapshot.
//!
//! ```text
//! Snapshot, asking workload, name and type ──▶ Addresses | Services | Empty | Forward | Ask
//! ```
//! Invariant: a name is answered when a service visible to the asking pod has it, and never with what is
//! not in the snapshot; what the mesh does not know is the cluster resolver's to deny.

use culvert_core::{
    ids::{NetworkId, ServiceKey},
    mesh::{Health, Service, Workload},
    snapshot::Snapshot,
};
use std::{net::IpAddr, sync::Arc};

pub type Address = IpAddr;

/// A question: lower case, no dot at the end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    pub name: String,
    pub kind: Kind,
}

/// Record types that the mesh has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    A,
    Aaaa,
    Srv,
}

/// One SRV record and the addresses of its target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    pub host: String,
    pub port: u16,
    pub addresses: Vec<IpAddr>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    Addresses(Vec<IpAddr>),
    Services(Vec<Target>),
    /// The name exists, without records of that type: NOERROR, not NXDOMAIN, which would deny the name.
    Empty,
    /// The cluster resolver's to say.
    Forward,
    /// Control may know this service and has not been asked.
    Ask(ServiceKey),
}

impl Answer {
    pub fn outcome(&self) -> &'static str {
        match self {
            Self::Addresses(_) | Self::Services(_) => "answered",
            Self::Empty => "empty",
            Self::Forward | Self::Ask(_) => "forwarded",
        }
    }
}

/// Most addresses in one answer: what fits a message by TCP many times over.
const MAX_ADDRESSES: usize = 256;

pub fn answer(snapshot: &Snapshot, own: &Workload, asked: &Asked) -> Answer {
    let ask = |name: &str| -> Answer {
        match cluster_service(snapshot, name) {
            Some(key) if !snapshot.is_unknown(&key) && snapshot.service(&key).is_none() => Answer::Ask(key),
            _ => Answer::Forward,
        }
    };
    if let Some(service) = snapshot.service_named(&asked.name, &own.namespace) {
        return of_service(snapshot, own, service, asked.kind);
    }
    let Some((first, parent)) = asked.name.split_once('.') else {
        return Answer::Forward;
    };
    if let Some(port) = first.strip_prefix('_') {
        let Some(("_tcp", host)) = parent.split_once('.') else {
            return Answer::Forward;
        };
        return match snapshot.service_named(host, &own.namespace) {
            Some(service) if asked.kind == Kind::Srv => srv(snapshot, own, service, port),
            Some(_) => Answer::Forward,
            None => ask(host),
        };
    }
    // `pod.service.namespace.svc.domain`, of a headless service.
    if let Some(service) = snapshot.service_named(parent, &own.namespace) {
        let mut named = endpoints(snapshot, service).filter(|endpoint| *endpoint.hostname == *first);
        return match named.next() {
            Some(endpoint) if is_headless(service) => {
                let all = std::iter::once(endpoint).chain(named);
                addresses(
                    all.flat_map(|endpoint| endpoint.addresses.iter().copied()),
                    asked.kind,
                )
            }
            _ => Answer::Forward,
        };
    }
    match ask(&asked.name) {
        Answer::Forward => ask(parent),
        asks => asks,
    }
}

/// The service that `name` is the cluster's name of, if it has the form of one.
fn cluster_service(snapshot: &Snapshot, name: &str) -> Option<ServiceKey> {
    let domain = &snapshot.config()?.cluster_domain;
    let local = name
        .strip_suffix(&**domain)?
        .strip_suffix('.')?
        .strip_suffix(".svc")?;
    let (service, namespace) = local.split_once('.')?;
    if service.is_empty() || namespace.is_empty() || namespace.contains('.') {
        return None;
    }
    format!("{namespace}/{name}").parse().ok()
}

fn is_headless(service: &Service) -> bool {
    service.vips.is_empty() && !service.external
}

fn of_service(snapshot: &Snapshot, own: &Workload, service: &Service, kind: Kind) -> Answer {
    // A destination outside is declared by ranges or by its name alone: its addresses are the resolver's.
    if service.external && service.vips.is_empty() {
        return Answer::Forward;
    }
    match kind {
        Kind::A | Kind::Aaaa => addresses(addresses_of(snapshot, &own.network, service), kind),
        Kind::Srv => Answer::Forward,
    }
}

fn addresses_of(snapshot: &Snapshot, network: &NetworkId, service: &Service) -> Vec<IpAddr> {
    if is_headless(service) {
        let all = endpoints(snapshot, service).filter(|endpoint| endpoint.network == *network);
        return all
            .flat_map(|endpoint| endpoint.addresses.iter().copied())
            .filter(|ip| service.families.admits(*ip))
            .collect();
    }
    let vips = service.vips.iter().filter(|vip| vip.network == *network);
    vips.map(|vip| vip.ip)
        .filter(|ip| service.families.admits(*ip))
        .collect()
}

/// The endpoints that DNS names: ready ones, or all where the service says so.
fn endpoints<'s>(snapshot: &'s Snapshot, service: &'s Service) -> impl Iterator<Item = &'s Arc<Workload>> {
    let use_unready = service.balancing.use_unready;
    snapshot
        .endpoints(&service.key)
        .iter()
        .filter(move |endpoint| match endpoint.health {
            Health::Ready => true,
            Health::Terminating | Health::Unhealthy => use_unready,
        })
}

fn addresses(all: impl IntoIterator<Item = IpAddr>, kind: Kind) -> Answer {
    let of_kind = |ip: &IpAddr| match kind {
        Kind::A => ip.is_ipv4(),
        Kind::Aaaa => ip.is_ipv6(),
        Kind::Srv => false,
    };
    let mut found: Vec<_> = all.into_iter().filter(of_kind).collect();
    if found.is_empty() {
        return Answer::Empty;
    }
    // Clients take the first: each gets another one.
    let turn = rand::random_range(0..found.len());
    found.rotate_left(turn);
    found.truncate(MAX_ADDRESSES);
    Answer::Addresses(found)
}

/// `_port._tcp.service`: the service itself, or each endpoint of a headless one.
fn srv(snapshot: &Snapshot, own: &Workload, service: &Service, port_name: &str) -> Answer {
    let Some((_, service_port)) = service.port_names.iter().find(|(name, _)| **name == *port_name) else {
        return Answer::Forward;
    };
    let targets: Vec<_> = if is_headless(service) {
        endpoints(snapshot, service)
            .filter(|endpoint| endpoint.network == own.network)
            .filter_map(|endpoint| {
                Some(Target {
                    host: endpoint_name(endpoint, service)?,
                    port: endpoint.target_port(service, *service_port)?,
                    addresses: endpoint.addresses.to_vec(),
                })
            })
            .take(MAX_ADDRESSES)
            .collect()
    } else {
        vec![Target {
            host: service.hostname().to_owned(),
            port: *service_port,
            addresses: addresses_of(snapshot, &own.network, service),
        }]
    };
    if targets.is_empty() {
        Answer::Empty
    } else {
        Answer::Services(targets)
    }
}

/// The name that leads back to one endpoint; endpoints without one are the cluster resolver's to name.
fn endpoint_name(endpoint: &Workload, service: &Service) -> Option<String> {
    (!endpoint.hostname.is_empty()).then(|| format!("{}.{}", endpoint.hostname, service.hostname()))
}

#[cfg(test)]
mod tests;
