//! Objects become the resources that nodes are sent.
//!
//! ```text
//! Changes of objects ─┐
//! agents' reports    ─┼──apply──▶ what is dirty ──derive──▶ World (what changed is written down)
//! nodes' ACKs        ─┘
//! ```
//! Pure: no I/O, no clock. Invariant: the outcome depends on the inputs alone and not on their order, so that a
//! version is a digest of content; a change costs what it touches, not what there is.

mod derive;
mod endpoints;
mod labels;
mod note;
mod phase;
mod policies;
mod selected;
mod services;
mod workloads;
pub mod world;

pub use phase::{Capture, Phase, Taken};
pub use world::{PodFacts, World};

use crate::config::{Config, Egress, Profile};
use crate::watch::{
    claims::Claim,
    objects::{Change, Key, Metadata, Object, Objects},
};
use culvert_core::ids::TrustDomain;
use culvert_proto::{mesh, security, workload as wire};
use ipnet::IpNet;
use labels::{Members, Selectors};
use prost::Message;
use selected::Selecting;
use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::IpAddr,
    sync::Arc,
};
use world::{About, CONFIG, INBOUND, Resource, Step};

const CLUSTER: &str = "Kubernetes";

/// Reports about pods that no object names yet; more are not kept.
const MAX_STRANGERS: usize = 100_000;

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

/// Judges one object by itself: what it holds for itself alone, or why it is not taken.
pub fn check(object: &Object, settings: &Settings) -> Result<Vec<Claim>, String> {
    match object {
        Object::Namespace(_) | Object::Node(_) => Ok(vec![]),
        Object::Pod(pod) => workloads::check_pod(&key_of(&pod.metadata), pod, settings),
        Object::Service(service) => services::check(service),
        Object::EndpointSlice(slice) => endpoints::check(slice).map(|()| vec![]),
        Object::Workload(one) => workloads::check_declared(&key_of(&one.metadata), one, settings),
        Object::ExternalService(one) => services::check_external(&key_of(&one.metadata), one, settings),
        Object::AuthorizationPolicy(one) => {
            policies::check(&key_of(&one.metadata), one, settings).map(|()| vec![])
        }
        Object::PeerAuthentication(_) => Ok(vec![]),
    }
}

fn key_of(metadata: &Metadata) -> Key {
    Key {
        namespace: metadata.namespace.clone(),
        name: metadata.name.clone(),
    }
}

/// What an agent says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Report {
    /// It has come, with these pods.
    Hello {
        node: String,
        uids: Vec<String>,
    },
    State {
        node: String,
        uid: String,
        capture: Capture,
    },
    Gone {
        node: String,
        uid: String,
    },
}

/// Something that is an endpoint and has policies.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Member {
    Pod(Key),
    Declared(Key),
}

/// Where something stands.
#[derive(Debug, Clone, Default, PartialEq)]
struct Place {
    region: String,
    zone: String,
    subzone: String,
}

impl Place {
    fn message(&self) -> Option<wire::Locality> {
        (*self != Self::default()).then(|| wire::Locality {
            region: self.region.clone(),
            zone: self.zone.clone(),
            subzone: self.subzone.clone(),
        })
    }
}

/// What has to be derived again.
#[derive(Default)]
struct Dirty {
    members: BTreeSet<Member>,
    /// Services whose listed endpoints may have changed.
    listed: BTreeSet<Key>,
    step: Step,
}

/// All objects and what follows from them. One task owns it.
pub struct Index {
    settings: Settings,
    objects: Objects,
    members: Members<Member>,
    by_node: HashMap<String, BTreeSet<Member>>,
    by_address: HashMap<IpAddr, Member>,
    selecting: Selecting,
    services: Selectors<Key>,
    /// A service's slices, and the addresses in them.
    slices: BTreeMap<Key, BTreeSet<Key>>,
    listed_at: HashMap<IpAddr, BTreeSet<Key>>,
    /// Names of the resources made for a service's listed addresses.
    made: HashMap<Key, BTreeSet<String>>,
    phases: HashMap<String, Phase>,
    /// Phases that an earlier process has left, of pods not met yet.
    recorded: BTreeMap<String, Phase>,
    /// Pods whose phase has changed, or that are no more.
    moved: Vec<(String, Option<Phase>)>,
    waiting: BTreeSet<Member>,
    captures: HashMap<String, (String, Capture)>,
    /// Nodes whose agent has come since the start.
    attended: HashSet<String>,
    world: World,
    begun: bool,
}

impl Index {
    /// Counts worlds from `number` on, and takes pods up where an earlier process has left them.
    pub fn new(settings: Settings, number: u64, recorded: BTreeMap<String, Phase>) -> Self {
        Self {
            settings,
            objects: Objects::default(),
            members: Members::default(),
            by_node: HashMap::new(),
            by_address: HashMap::new(),
            selecting: Selecting::default(),
            services: Selectors::default(),
            slices: BTreeMap::new(),
            listed_at: HashMap::new(),
            made: HashMap::new(),
            phases: HashMap::new(),
            recorded,
            moved: vec![],
            waiting: BTreeSet::new(),
            captures: HashMap::new(),
            attended: HashSet::new(),
            world: World::at(number),
            begun: false,
        }
    }

    /// Whether a pod waits for nodes' ACKs.
    pub fn waits(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Which pods have come to another phase since the last call, or are no more.
    pub fn moved(&mut self) -> Vec<(String, Option<Phase>)> {
        std::mem::take(&mut self.moved)
    }

    /// Every pod's phase.
    pub fn phases(&self) -> (usize, impl Iterator<Item = (&str, Phase)>) {
        let all = self.phases.iter().map(|(uid, phase)| (uid.as_str(), *phase));
        (self.phases.len(), all)
    }

    /// Takes what is new and gives the world that follows, if it is another one.
    pub fn apply(&mut self, changes: &[Change], reports: Vec<Report>, taken: Taken) -> Option<Arc<World>> {
        let mut dirty = Dirty::default();
        if !self.begun {
            self.begun = true;
            self.world.put(&mut dirty.step, CONFIG, config(&self.settings));
            for resource in policies::mesh_defaults(&self.settings) {
                self.world.put(&mut dirty.step, INBOUND, resource);
            }
        }
        for change in changes {
            let old = self.objects.apply(change);
            self.note(&change.id.key, old.as_ref(), change.object.as_ref(), &mut dirty);
        }
        for report in reports {
            self.hear(report, &mut dirty);
        }
        dirty.members.extend(self.waiting.iter().cloned());
        for service in std::mem::take(&mut dirty.listed) {
            self.derive_listed(&service, &mut dirty);
        }
        for member in std::mem::take(&mut dirty.members) {
            self.derive(&member, taken, &mut dirty.step);
        }
        // The first batch has everything: who is not met in it is no more.
        let unmet = std::mem::take(&mut self.recorded);
        self.moved.extend(unmet.into_keys().map(|uid| (uid, None)));
        let changed = self.world.close(dirty.step);
        changed.then(|| Arc::new(self.world.clone()))
    }

    fn hear(&mut self, report: Report, dirty: &mut Dirty) {
        match report {
            Report::Hello { node, uids } => {
                self.captures
                    .retain(|uid, (of, _)| *of != node || uids.contains(uid));
                for uid in uids {
                    let unknown = (node.clone(), Capture::Unknown);
                    self.captures.entry(uid).or_insert(unknown);
                }
                let own = self.by_node.get(&node).into_iter().flatten();
                dirty.members.extend(own.cloned());
                self.attended.insert(node);
            }
            Report::State { node, uid, capture } => {
                if self.captures.len() < MAX_STRANGERS || self.world.pod(&uid).is_some() {
                    self.touch(&uid, dirty);
                    self.captures.insert(uid, (node, capture));
                }
            }
            Report::Gone { node, uid } => {
                if self.captures.get(&uid).is_some_and(|(of, _)| *of == node) {
                    self.captures.remove(&uid);
                    self.touch(&uid, dirty);
                }
            }
        }
    }

    fn touch(&self, uid: &str, dirty: &mut Dirty) {
        if let Some(pod) = self.world.pod(uid) {
            dirty.members.insert(Member::Pod(Key {
                namespace: pod.namespace.clone(),
                name: pod.name.clone(),
            }));
        }
    }
}

fn config(settings: &Settings) -> Resource {
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
        close_at_expiry: settings.profile == Profile::High,
    };
    Resource::new("mesh".into(), message.encode_to_vec(), About::Config)
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

fn status(healthy: bool) -> i32 {
    if healthy {
        wire::WorkloadStatus::Healthy
    } else {
        wire::WorkloadStatus::Unhealthy
    }
    .into()
}

fn extension(name: &str, kind: &str, options: &impl Message) -> Vec<wire::Extension> {
    let value = options.encode_to_vec();
    if value.is_empty() {
        return vec![];
    }
    let config = prost_types::Any {
        type_url: format!("type.googleapis.com/{kind}"),
        value,
    };
    vec![wire::Extension {
        name: name.to_owned(),
        config: Some(config),
    }]
}

#[cfg(test)]
pub(crate) mod tests;
