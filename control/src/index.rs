//! Objects become the resources that nodes are sent.
//!
//! ```text
//! Objects + capture states + settings ──build──▶ World { resources by type and name, endpoints, pods }
//! ```
//! Pure: no I/O, no clock. Invariant: equal inputs give byte-equal resources, so that a version is a digest
//! of content and nothing is sent twice.

mod policies;
mod workloads;

pub use policies::check;

use crate::config::{Config, Egress, Profile};
use crate::watch::objects::Objects;
use bytes::Bytes;
use culvert_core::ids::{SpiffeId, TrustDomain};
use culvert_proto::{mesh, security, type_url};
use ipnet::IpNet;
use prost::Message;
use sha2::{Digest, Sha256};
use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    sync::Arc,
};

/// What does not come from objects.
#[derive(Debug, Clone)]
pub struct Settings {
    pub trust_domain: TrustDomain,
    pub cluster_domain: String,
    pub root_namespace: String,
    pub profile: Profile,
    pub egress: Egress,
    pub mesh_ranges: Vec<IpNet>,
    pub resolvers: Vec<IpAddr>,
}

impl From<&Config> for Settings {
    fn from(config: &Config) -> Self {
        let default = match config.profile {
            Profile::Low => Egress::Allow,
            Profile::Medium | Profile::High => Egress::RegistryOnly,
        };
        Self {
            trust_domain: config.trust_domain.clone(),
            cluster_domain: config.cluster_domain.clone(),
            root_namespace: config.root_namespace.clone(),
            profile: config.profile,
            egress: config.egress.unwrap_or(default),
            mesh_ranges: config.mesh_range.clone(),
            resolvers: config.resolver.clone(),
        }
    }
}

/// How far a pod's capture is, as its node's agent reports it (settled D11).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Capture {
    #[default]
    None,
    Captured,
    Broken,
}

/// One resource, encoded once.
#[derive(Debug, PartialEq, Eq)]
pub struct Resource {
    pub name: String,
    /// A digest of the content.
    pub version: String,
    pub bytes: Bytes,
    /// Names that it is also found by: `network/ip`.
    pub aliases: Vec<String>,
    /// The node that a workload runs on.
    pub node: String,
    /// A service of ranges, which no single address leads to.
    pub is_range: bool,
}

/// One enrolled or plain pod, for node orders and the CA.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodFacts {
    pub uid: String,
    pub namespace: String,
    pub name: String,
    pub service_account: String,
    pub node: String,
    pub identity: SpiffeId,
    pub workload_uid: String,
    pub enrolled: bool,
    /// It ran outside of the mesh before: its callers still speak plaintext to it until HBONE is published
    /// (settled D11). A pod that was in the mesh from its start is never reached in plaintext.
    pub born_outside: bool,
    /// Its namespace as a whole takes no part.
    pub namespace_apart: bool,
    pub probe_ports: Vec<u16>,
    pub exclude_inbound_ports: Vec<u16>,
    pub exclude_outbound_ports: Vec<u16>,
    pub exclude_outbound_nets: Vec<IpNet>,
}

/// Everything that is served, as of one change.
#[derive(Debug, Default)]
pub struct World {
    pub number: u64,
    pub types: HashMap<&'static str, BTreeMap<String, Arc<Resource>>>,
    /// `network/ip` to the names of Address resources.
    pub aliases: HashMap<String, Vec<String>>,
    /// A service's resource name to its endpoints' names.
    pub endpoints: HashMap<String, Vec<String>>,
    pub pods: BTreeMap<String, PodFacts>,
}

/// Types in the order in which nodes ask for them.
pub const TYPES: [&str; 4] = [
    type_url::MESH_CONFIG,
    type_url::AUTHORIZATION,
    type_url::OUTBOUND_POLICY,
    type_url::ADDRESS,
];

/// Builds the world from scratch; unchanged resources are shared with `before`.
pub fn build(
    objects: &Objects,
    captures: &HashMap<String, Capture>,
    settings: &Settings,
    before: &World,
) -> World {
    let mut builder = Builder {
        before,
        world: World {
            number: before.number + 1,
            ..World::default()
        },
    };
    for url in TYPES {
        builder.world.types.insert(url, BTreeMap::new());
    }
    builder.config(settings);
    let selected = policies::build(objects, settings, &mut builder);
    workloads::build(objects, captures, settings, &selected, &mut builder);
    builder.world
}

struct Builder<'b> {
    before: &'b World,
    world: World,
}

impl Builder<'_> {
    fn add(&mut self, url: &'static str, name: String, message: &impl Message) {
        self.add_with(url, name, message, |_| ());
    }

    /// Adds a resource with what `more` fills in beside its content.
    fn add_with(
        &mut self,
        url: &'static str,
        name: String,
        message: &impl Message,
        more: impl FnOnce(&mut Resource),
    ) {
        let bytes = Bytes::from(message.encode_to_vec());
        let digest = Sha256::digest(&bytes);
        let version = digest[..8]
            .iter()
            .fold(String::new(), |text, byte| format!("{text}{byte:02x}"));
        let mut resource = Resource {
            name: name.clone(),
            version,
            bytes,
            aliases: vec![],
            node: String::new(),
            is_range: false,
        };
        more(&mut resource);
        let known = self.before.types.get(url).and_then(|all| all.get(&name));
        let shared = match known {
            Some(known) if **known == resource => known.clone(),
            _ => Arc::new(resource),
        };
        for alias in &shared.aliases {
            self.world
                .aliases
                .entry(alias.clone())
                .or_default()
                .push(name.clone());
        }
        self.world.types.entry(url).or_default().insert(name, shared);
    }

    fn config(&mut self, settings: &Settings) {
        let message = mesh::MeshConfig {
            trust_domain: settings.trust_domain.to_string(),
            cluster_domain: settings.cluster_domain.clone(),
            mesh_ranges: settings.mesh_ranges.iter().map(|net| address(*net)).collect(),
            egress: match settings.egress {
                Egress::Allow => mesh::EgressMode::AllowAny,
                Egress::RegistryOnly => mesh::EgressMode::RegistryOnly,
                Egress::Deny => mesh::EgressMode::DenyAll,
            }
            .into(),
            resolvers: settings.resolvers.iter().map(|ip| octets(*ip)).collect(),
            network: String::new(),
            federated: vec![],
            other_traffic: match settings.profile {
                Profile::Low | Profile::Medium => mesh::OtherTraffic::PassAndLog,
                Profile::High => mesh::OtherTraffic::Refuse,
            }
            .into(),
            enrolment_grace_seconds: grace_seconds(settings.profile),
        };
        self.add(type_url::MESH_CONFIG, "mesh".to_owned(), &message);
    }
}

/// How long connections that were open at enrolment may go on (settled D8).
pub fn grace_seconds(profile: Profile) -> u32 {
    match profile {
        Profile::Low | Profile::Medium => 60,
        Profile::High => 0,
    }
}

/// An address as the wire has it: 4 or 16 bytes.
pub fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

fn address(net: IpNet) -> security::Address {
    security::Address {
        address: octets(net.network()),
        length: net.prefix_len().into(),
    }
}
