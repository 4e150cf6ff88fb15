//! Everything that is served, as of one change.
//!
//! ```text
//! Index ──put, remove──▶ World ──clone (shares structure)──▶ streams: which names have changed since n?
//! ```
//! Invariant: a published world never changes, and says what it changed against each of those before it, as
//! far back as its log goes.

use bytes::Bytes;
use culvert_core::{ids::SpiffeId, shards::Shards};
use culvert_proto::type_url;
use ipnet::IpNet;
use sha2::{Digest, Sha256};
use std::{
    collections::{BTreeSet, VecDeque},
    sync::Arc,
};

/// Types in the order in which they are sent: policies before what names them.
pub const TYPES: [&str; 4] = [
    type_url::MESH_CONFIG,
    type_url::AUTHORIZATION,
    type_url::OUTBOUND_POLICY,
    type_url::ADDRESS,
];

/// Index of a type in [`TYPES`].
pub type Type = usize;
pub const CONFIG: Type = 0;
pub const INBOUND: Type = 1;
pub const OUTBOUND: Type = 2;
pub const ADDRESS: Type = 3;

/// Changes that are remembered: a stream that is further behind compares everything.
const LOG: usize = 512;

pub type Name = Arc<str>;
pub type Names = BTreeSet<Name>;

/// One resource, encoded once.
#[derive(Debug, PartialEq, Eq)]
pub struct Resource {
    pub name: Name,
    /// A digest of the content.
    pub version: u64,
    pub bytes: Bytes,
    pub about: About,
}

/// What decides which nodes a resource concerns.
#[derive(Debug, PartialEq, Eq)]
pub enum About {
    Config,
    Policy {
        namespace: Name,
        reach: Reach,
    },
    Workload {
        node: Name,
        namespace: Name,
        /// `network/ip` names that it is also found by.
        aliases: Box<[Name]>,
        services: Box<[Name]>,
        /// Policies that it names, of both directions.
        policies: Box<[Name]>,
        /// Who it is when it has no Pod and terminates HBONE itself: its node's token gets it a certificate.
        own_tunnel: Option<SpiffeId>,
    },
    Service {
        aliases: Box<[Name]>,
        /// Of ranges, which no single address leads to.
        is_range: bool,
    },
}

/// How far a policy reaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reach {
    Workloads,
    Namespace,
    Mesh,
}

impl Resource {
    pub fn new(name: Name, bytes: Vec<u8>, about: About) -> Self {
        let digest = Sha256::digest(&bytes);
        let mut first = [0; 8];
        first.copy_from_slice(&digest[..8]);
        Self {
            name,
            version: u64::from_be_bytes(first),
            bytes: bytes.into(),
            about,
        }
    }

    pub fn aliases(&self) -> &[Name] {
        match &self.about {
            About::Workload { aliases, .. } | About::Service { aliases, .. } => aliases,
            About::Config | About::Policy { .. } => &[],
        }
    }

    fn services(&self) -> &[Name] {
        match &self.about {
            About::Workload { services, .. } => services,
            About::Config | About::Policy { .. } | About::Service { .. } => &[],
        }
    }
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
    /// It takes part: its agent captures it, and its identity is issued.
    pub enrolled: bool,
    pub refuse_plaintext: bool,
    /// Its namespace as a whole takes no part.
    pub namespace_apart: bool,
    pub probe_ports: Vec<u16>,
    pub exclude_inbound_ports: Vec<u16>,
    pub exclude_outbound_ports: Vec<u16>,
    pub exclude_outbound_nets: Vec<IpNet>,
}

/// What one published change touched.
#[derive(Debug, Default)]
pub struct Step {
    number: u64,
    resources: [Names; 4],
    /// Aliases that lead elsewhere than before.
    aliases: Names,
    pods: Names,
}

impl Step {
    pub fn resources(&self, of: Type) -> &Names {
        &self.resources[of]
    }

    pub fn aliases(&self) -> &Names {
        &self.aliases
    }

    pub fn pods(&self) -> &Names {
        &self.pods
    }

    fn is_empty(&self) -> bool {
        self.resources.iter().all(BTreeSet::is_empty) && self.pods.is_empty()
    }
}

/// Sets of names by name.
type Index = Shards<Name, Arc<Names>>;

/// Everything that is served. Clones share structure.
#[derive(Debug, Clone, Default)]
pub struct World {
    pub number: u64,
    types: [Shards<Name, Arc<Resource>>; 4],
    aliases: Index,
    endpoints: Index,
    by_node: Index,
    /// Policies of reach `Namespace`.
    by_namespace: Index,
    pods: Shards<Name, Arc<PodFacts>>,
    pods_by_node: Index,
    log: VecDeque<Arc<Step>>,
}

impl World {
    pub fn at(number: u64) -> Self {
        Self {
            number,
            ..Self::default()
        }
    }

    /// Whether anything has been published yet.
    pub fn is_begun(&self) -> bool {
        !self.log.is_empty()
    }

    pub fn get(&self, of: Type, name: &str) -> Option<&Arc<Resource>> {
        self.types[of].get(name)
    }

    pub fn all(&self, of: Type) -> impl Iterator<Item = &Arc<Resource>> {
        self.types[of].values()
    }

    pub fn aliased(&self, alias: &str) -> impl Iterator<Item = &Name> {
        names(&self.aliases, alias)
    }

    pub fn endpoints(&self, service: &str) -> impl Iterator<Item = &Name> {
        names(&self.endpoints, service)
    }

    /// The Address resources of a node's own workloads.
    pub fn on_node(&self, node: &str) -> impl Iterator<Item = &Name> {
        names(&self.by_node, node)
    }

    /// Policies of both directions that reach a whole namespace.
    pub fn of_namespace(&self, namespace: &str) -> impl Iterator<Item = &Name> {
        names(&self.by_namespace, namespace)
    }

    pub fn pod(&self, uid: &str) -> Option<&Arc<PodFacts>> {
        self.pods.get(uid)
    }

    pub fn pods_on(&self, node: &str) -> impl Iterator<Item = &Arc<PodFacts>> {
        names(&self.pods_by_node, node).filter_map(|uid| self.pods.get(uid))
    }

    /// Identities on a node that no pod has.
    pub fn own_tunnels_on(&self, node: &str) -> impl Iterator<Item = &SpiffeId> {
        self.on_node(node)
            .filter_map(|name| match &self.get(ADDRESS, name)?.about {
                About::Workload { own_tunnel, .. } => own_tunnel.as_ref(),
                About::Config | About::Policy { .. } | About::Service { .. } => None,
            })
    }

    pub fn pod_count(&self) -> usize {
        self.pods.len()
    }

    /// The steps after `number`, oldest first; none if the log does not go back that far.
    pub fn since(&self, number: u64) -> Option<impl Iterator<Item = &Step>> {
        let oldest = self.log.front().map_or(self.number, |step| step.number - 1);
        (number >= oldest).then(|| {
            self.log
                .iter()
                .filter(move |step| step.number > number)
                .map(AsRef::as_ref)
        })
    }

    /// Puts a resource in place; nothing happens if it is there already.
    pub fn put(&mut self, step: &mut Step, of: Type, resource: Resource) {
        if self.types[of].get(&resource.name).map(AsRef::as_ref) == Some(&resource) {
            return;
        }
        let name = resource.name.clone();
        self.remove(step, of, &name);
        let resource = Arc::new(resource);
        for alias in resource.aliases() {
            join(&mut self.aliases, alias, &name);
            step.aliases.insert(alias.clone());
        }
        for service in resource.services() {
            join(&mut self.endpoints, service, &name);
        }
        match &resource.about {
            About::Workload { node, .. } => join(&mut self.by_node, node, &name),
            About::Policy {
                namespace,
                reach: Reach::Namespace,
            } => join(&mut self.by_namespace, namespace, &name),
            About::Policy { .. } | About::Service { .. } | About::Config => {}
        }
        step.resources[of].insert(name.clone());
        self.types[of].insert(name, resource);
    }

    pub fn remove(&mut self, step: &mut Step, of: Type, name: &str) {
        let Some(old) = self.types[of].remove(name) else {
            return;
        };
        for alias in old.aliases() {
            leave(&mut self.aliases, alias, name);
            step.aliases.insert(alias.clone());
        }
        for service in old.services() {
            leave(&mut self.endpoints, service, name);
        }
        match &old.about {
            About::Workload { node, .. } => leave(&mut self.by_node, node, name),
            About::Policy {
                namespace,
                reach: Reach::Namespace,
            } => leave(&mut self.by_namespace, namespace, name),
            About::Policy { .. } | About::Service { .. } | About::Config => {}
        }
        step.resources[of].insert(old.name.clone());
    }

    pub fn put_pod(&mut self, step: &mut Step, facts: PodFacts) {
        let uid: Name = facts.uid.as_str().into();
        if self.pods.get(&uid).map(AsRef::as_ref) == Some(&facts) {
            return;
        }
        self.remove_pod(step, &uid);
        join(&mut self.pods_by_node, &facts.node.as_str().into(), &uid);
        step.pods.insert(uid.clone());
        self.pods.insert(uid, Arc::new(facts));
    }

    pub fn remove_pod(&mut self, step: &mut Step, uid: &str) {
        if let Some(old) = self.pods.remove(uid) {
            leave(&mut self.pods_by_node, &old.node, uid);
            step.pods.insert(uid.into());
        }
    }

    /// Counts one further if the step touched anything, or if nothing has been published yet.
    pub fn close(&mut self, mut step: Step) -> bool {
        if step.is_empty() && !self.log.is_empty() {
            return false;
        }
        self.number += 1;
        step.number = self.number;
        self.log.push_back(Arc::new(step));
        if self.log.len() > LOG {
            self.log.pop_front();
        }
        true
    }
}

fn names<'w>(index: &'w Index, at: &str) -> impl Iterator<Item = &'w Name> + use<'w> {
    index.get(at).into_iter().flat_map(|names| names.iter())
}

fn join(index: &mut Index, at: &Name, name: &Name) {
    Arc::make_mut(index.entry(at.clone(), Arc::default)).insert(name.clone());
}

fn leave(index: &mut Index, at: &str, name: &str) {
    let Some(names) = index.get(at) else {
        return;
    };
    if names.len() == 1 && names.contains(name) {
        index.remove(at);
    } else {
        Arc::make_mut(index.entry(at.into(), Arc::default)).remove(name);
    }
}
