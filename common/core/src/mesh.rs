//! The mesh model: workloads, services and settings, as discovery names them.
//!
//! Built once by the discovery decoder and shared by reference from then on. Invariant: a value here is
//! checked. Ports are ports, identities are SPIFFE IDs, a prefix fits its family; decisions need no
//! second look.

use crate::ids::{NetworkAddress, NetworkId, PolicyKey, ServiceKey, SpiffeId, TrustDomain, WorkloadUid};
use ipnet::IpNet;
use std::{net::IpAddr, sync::Arc};

/// How a workload is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// Not enrolled: plain TCP.
    Tcp,
    /// Enrolled: HBONE, and nothing else.
    Hbone,
}

/// Whether new connections go to a workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Health {
    Ready,
    /// Being deleted and still serving: used when a service says so and nothing is ready.
    Terminating,
    /// Not ready, or enrolled with its capture broken: refused.
    Unhealthy,
}

/// Where a workload runs, from coarse to fine.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Locality {
    pub region: Arc<str>,
    pub zone: Arc<str>,
    pub subzone: Arc<str>,
}

/// What made a workload; telemetry only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WorkloadKind {
    Deployment,
    CronJob,
    Pod,
    Job,
}

/// A port of a service and the one behind it. `target` is absent for a named port: each endpoint has its
/// own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PortMap {
    pub service_port: u16,
    pub target: Option<u16>,
}

/// A waypoint or network gateway.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Gateway {
    pub destination: GatewayDestination,
    pub hbone_port: u16,
}

/// How a gateway is named.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum GatewayDestination {
    Service(ServiceKey),
    Address(NetworkAddress),
}

/// One workload: a pod, or what a `Workload` object describes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Workload {
    pub uid: WorkloadUid,
    pub name: Arc<str>,
    pub namespace: Arc<str>,
    pub service_account: Arc<str>,
    pub identity: SpiffeId,
    pub addresses: Box<[IpAddr]>,
    pub network: NetworkId,
    /// Its DNS label under headless services; empty if it has none.
    pub hostname: Arc<str>,
    pub protocol: Protocol,
    pub node: Arc<str>,
    pub cluster: Arc<str>,
    pub locality: Locality,
    /// The services it is an endpoint of, with the ports it serves them on.
    pub services: Box<[(ServiceKey, Box<[PortMap]>)]>,
    /// Policies that select it. Namespace and global ones are not named.
    pub policies: Box<[PolicyKey]>,
    pub outbound_policies: Box<[PolicyKey]>,
    pub health: Health,
    /// Its share beside other endpoints; 1 unless set.
    pub capacity: u32,
    pub waypoint: Option<Gateway>,
    /// Shares its node's addresses, so it is not found by address.
    pub host_network: bool,
    pub refuses_plaintext: bool,
    pub canonical_name: Arc<str>,
    pub canonical_revision: Arc<str>,
    pub workload_name: Arc<str>,
    pub kind: WorkloadKind,
}

impl Workload {
    /// The port that this workload serves `service_port` of `service` on.
    pub fn target_port(&self, service: &Service, service_port: u16) -> Option<u16> {
        let own = self
            .services
            .iter()
            .find(|(key, _)| *key == service.key)
            .and_then(|(_, ports)| ports.iter().find(|map| map.service_port == service_port))
            .and_then(|map| map.target);
        own.or_else(|| {
            service
                .ports
                .iter()
                .find(|map| map.service_port == service_port)
                .and_then(|map| map.target)
        })
    }
}

/// How far a service's traffic may go for an endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LocalityScope {
    Region,
    Zone,
    Subzone,
    Node,
    Cluster,
    Network,
}

/// How strictly the preferences of a service are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum LocalityMode {
    /// All endpoints alike.
    #[default]
    Any,
    /// Only endpoints that match every preference.
    Strict,
    /// The endpoints that match the longest prefix of the preferences.
    Failover,
    /// The original address is dialled.
    Passthrough,
}

/// Load balancing of a service.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Balancing {
    pub mode: LocalityMode,
    pub preferences: Box<[LocalityScope]>,
    /// Endpoints that are not ready are used as well (`publishNotReadyAddresses`).
    pub use_unready: bool,
    /// Endpoints that are being deleted are used when none is ready.
    pub use_terminating: bool,
    /// `sessionAffinity: ClientIP`, for so many seconds.
    pub client_ip_affinity_seconds: Option<u32>,
}

/// Address families a service answers with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum IpFamilies {
    #[default]
    Automatic,
    V4,
    V6,
    Dual,
}

impl IpFamilies {
    pub fn admits(self, ip: IpAddr) -> bool {
        match self {
            Self::Automatic | Self::Dual => true,
            Self::V4 => ip.is_ipv4(),
            Self::V6 => ip.is_ipv6(),
        }
    }
}

/// Who may see a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Visibility {
    Public,
    Namespace,
}

/// One service: a VIP, a headless name, or a declared external destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    pub key: ServiceKey,
    pub name: Arc<str>,
    pub vips: Box<[NetworkAddress]>,
    /// Ranges of a declared external destination.
    pub ranges: Box<[IpNet]>,
    pub ports: Box<[PortMap]>,
    /// The ports that have names, as SRV queries ask for them.
    pub port_names: Box<[(Arc<str>, u16)]>,
    /// Identities that are accepted beside the endpoint's own.
    pub subject_alt_names: Box<[SpiffeId]>,
    pub waypoint: Option<Gateway>,
    pub balancing: Balancing,
    pub families: IpFamilies,
    /// Wins a tie over names and addresses outside the client's namespace.
    pub canonical: bool,
    pub visibility: Visibility,
    /// Outside the mesh, declared so that registry-only egress reaches it.
    pub external: bool,
}

impl Service {
    pub fn namespace(&self) -> &str {
        self.key.namespace()
    }

    pub fn hostname(&self) -> &str {
        self.key.hostname()
    }

    pub fn has_port(&self, port: u16) -> bool {
        self.ports.iter().any(|map| map.service_port == port)
    }

    pub fn visible_from(&self, namespace: &str) -> bool {
        match self.visibility {
            Visibility::Public => true,
            Visibility::Namespace => self.namespace() == namespace,
        }
    }
}

/// What happens to a destination that control says it does not know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum EgressMode {
    Allow,
    RegistryOnly,
    Deny,
}

/// Settings of the whole mesh.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MeshConfig {
    pub trust_domain: TrustDomain,
    pub cluster_domain: Arc<str>,
    /// Pod and Service ranges: what is in them and has no answer is refused.
    pub ranges: Box<[IpNet]>,
    pub egress: EgressMode,
    pub resolvers: Box<[IpAddr]>,
    pub network: NetworkId,
    /// Other trust domains whose identities are accepted, with their roots (PEM).
    pub federated: Box<[(TrustDomain, Arc<str>)]>,
    /// Streams end with the leaf that their tunnel came up with, renewed or not (settled D14).
    pub close_at_expiry: bool,
}

impl MeshConfig {
    /// Whether an address lies in the mesh's own ranges.
    pub fn covers(&self, ip: IpAddr) -> bool {
        self.ranges.iter().any(|range| range.contains(&ip))
    }
}
