//! The snapshot: one immutable view of the mesh, on which every decision is made.
//!
//! ```text
//! discovery ──Change──▶ Snapshot::apply ──▶ published by reference ──▶ route, admit, dns, recheck
//! ```
//! One writer clones the last snapshot, applies a batch of changes and publishes the result. Invariant:
//! absence deletes nothing. What is gone was named as removed, and what control does not know was named
//! as unknown (settled D12, D18).

use crate::{
    ids::{NetworkAddress, PolicyKey, ServiceKey, WorkloadUid},
    mesh::{MeshConfig, Service, Workload},
    policy::{Policy, Scope},
    shards::Shards,
};
use ipnet::IpNet;
use std::{collections::HashMap, net::IpAddr, sync::Arc};

/// One change to the mesh, as discovery names it.
#[derive(Debug, Clone)]
pub enum Change {
    Workload(Box<Workload>),
    Service(Box<Service>),
    /// A name that control removed: a workload's uid, a service's key, or an address it does not know.
    RemoveWorkload(WorkloadUid),
    RemoveService(ServiceKey),
    /// Control's explicit answer that nothing has this address.
    Unknown(NetworkAddress),
    /// Control's explicit answer that there is no such service.
    UnknownService(ServiceKey),
    /// The answer about a name or an address is no longer kept up to date: it counts as never given.
    Forget(NetworkAddress),
    ForgetService(ServiceKey),
    Policy(Box<Policy>),
    RemovePolicy(PolicyKey),
    OutboundPolicy(Box<Policy>),
    RemoveOutboundPolicy(PolicyKey),
    Config(Box<MeshConfig>),
}

/// The policies of one direction.
#[derive(Debug, Clone, Default)]
pub struct PolicySet {
    by_key: Shards<PolicyKey, Arc<Policy>>,
    global: Arc<Vec<Arc<Policy>>>,
    by_namespace: Arc<HashMap<Box<str>, Vec<Arc<Policy>>>>,
}

impl PolicySet {
    /// The policies in force for a workload of `namespace` that names `named`, or the key of one that it
    /// names and that has not been received.
    pub fn in_force<'s>(
        &'s self,
        namespace: &str,
        named: &'s [PolicyKey],
    ) -> Result<impl Iterator<Item = &'s Policy> + Clone, &'s PolicyKey> {
        if let Some(missing) = named.iter().find(|key| self.by_key.get(*key).is_none()) {
            return Err(missing);
        }
        let of_namespace = self
            .by_namespace
            .get(namespace)
            .map(Vec::as_slice)
            .unwrap_or_default();
        let selected = named.iter().filter_map(|key| self.by_key.get(key));
        Ok(self
            .global
            .iter()
            .chain(of_namespace)
            .chain(selected)
            .map(AsRef::as_ref))
    }

    pub fn get(&self, key: &PolicyKey) -> Option<&Arc<Policy>> {
        self.by_key.get(key)
    }

    pub fn iter(&self) -> impl Iterator<Item = &Arc<Policy>> {
        self.by_key.values()
    }

    pub fn len(&self) -> usize {
        self.by_key.len()
    }

    pub fn is_empty(&self) -> bool {
        self.by_key.is_empty()
    }

    fn insert(&mut self, policy: Policy) {
        let policy = Arc::new(policy);
        self.remove(&policy.key);
        match policy.scope {
            Scope::Global => Arc::make_mut(&mut self.global).push(policy.clone()),
            Scope::Namespace => {
                let all = Arc::make_mut(&mut self.by_namespace);
                all.entry(policy.key.namespace().into())
                    .or_default()
                    .push(policy.clone());
            }
            Scope::Workload => {}
        }
        self.by_key.insert(policy.key.clone(), policy);
    }

    fn remove(&mut self, key: &PolicyKey) {
        let Some(old) = self.by_key.remove(key) else {
            return;
        };
        match old.scope {
            Scope::Global => Arc::make_mut(&mut self.global).retain(|policy| policy.key != *key),
            Scope::Namespace => {
                let all = Arc::make_mut(&mut self.by_namespace);
                if let Some(policies) = all.get_mut(key.namespace()) {
                    policies.retain(|policy| policy.key != *key);
                    if policies.is_empty() {
                        all.remove(key.namespace());
                    }
                }
            }
            Scope::Workload => {}
        }
    }
}

/// What an address is.
#[derive(Debug, Clone, Copy)]
pub enum Lookup<'s> {
    Workload(&'s Arc<Workload>),
    Service(&'s Arc<Service>),
    /// Control has said that it knows nothing there.
    Unknown,
    /// Control has not answered.
    Unanswered,
}

/// One immutable view of the mesh. Clones share structure.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    /// Counts published snapshots; equal numbers mean the same view.
    pub generation: u64,
    config: Option<Arc<MeshConfig>>,
    workloads: Shards<WorkloadUid, Arc<Workload>>,
    by_address: Shards<NetworkAddress, Arc<Workload>>,
    services: Shards<ServiceKey, Arc<Service>>,
    by_vip: Shards<NetworkAddress, Vec<Arc<Service>>>,
    by_hostname: Shards<Arc<str>, Vec<Arc<Service>>>,
    ranges: Arc<Vec<(IpNet, Arc<Service>)>>,
    endpoints: Shards<ServiceKey, Arc<Vec<Arc<Workload>>>>,
    unknown: Shards<NetworkAddress, ()>,
    unknown_services: Shards<ServiceKey, ()>,
    /// In force where a connection arrives.
    pub inbound: PolicySet,
    /// In force where a connection starts.
    pub outbound: PolicySet,
}

impl Snapshot {
    /// Settings of the mesh, once received.
    pub fn config(&self) -> Option<&Arc<MeshConfig>> {
        self.config.as_ref()
    }

    pub fn workload(&self, uid: &WorkloadUid) -> Option<&Arc<Workload>> {
        self.workloads.get(uid)
    }

    /// The workload that has this address (none for host-network pods, which share their node's).
    pub fn workload_at(&self, address: &NetworkAddress) -> Option<&Arc<Workload>> {
        self.by_address.get(address)
    }

    pub fn service(&self, key: &ServiceKey) -> Option<&Arc<Service>> {
        self.services.get(key)
    }

    pub fn workloads(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.workloads.values()
    }

    pub fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.services.values()
    }

    pub fn workload_count(&self) -> usize {
        self.workloads.len()
    }

    pub fn service_count(&self) -> usize {
        self.services.len()
    }

    /// The endpoints of a service, in no order.
    pub fn endpoints(&self, service: &ServiceKey) -> &[Arc<Workload>] {
        self.endpoints
            .get(service)
            .map(|all| all.as_slice())
            .unwrap_or_default()
    }

    /// What `address` is to a client in `namespace`: a workload before a service, a VIP before a range.
    pub fn lookup(&self, address: &NetworkAddress, namespace: &str) -> Lookup<'_> {
        if let Some(workload) = self.by_address.get(address) {
            return Lookup::Workload(workload);
        }
        if let Some(service) = self
            .by_vip
            .get(address)
            .and_then(|all| preferred(all.iter(), namespace))
        {
            return Lookup::Service(service);
        }
        if let Some(service) = self.range_of(address.ip, namespace) {
            return Lookup::Service(service);
        }
        if self.unknown.get(address).is_some() {
            Lookup::Unknown
        } else {
            Lookup::Unanswered
        }
    }

    fn range_of(&self, ip: IpAddr, namespace: &str) -> Option<&Arc<Service>> {
        self.ranges
            .iter()
            .filter(|(range, service)| range.contains(&ip) && service.visible_from(namespace))
            .max_by_key(|(range, service)| {
                (
                    service.namespace() == namespace,
                    range.prefix_len(),
                    service.canonical,
                )
            })
            .map(|(_, service)| service)
    }

    /// Whether control has said that there is no such service.
    pub fn is_unknown(&self, service: &ServiceKey) -> bool {
        self.unknown_services.get(service).is_some()
    }

    /// The service that a client in `namespace` means by `hostname` (lower case, no dot at its end).
    pub fn service_named(&self, hostname: &str, namespace: &str) -> Option<&Arc<Service>> {
        preferred(self.by_hostname.get(hostname)?.iter(), namespace)
    }

    /// Carries out one change.
    pub fn apply(&mut self, change: Change) {
        match change {
            Change::Workload(workload) => self.insert_workload(*workload),
            Change::RemoveWorkload(uid) => self.remove_workload(&uid),
            Change::Service(service) => self.insert_service(*service),
            Change::RemoveService(key) => self.remove_service(&key),
            Change::Unknown(address) => {
                self.unknown.insert(address, ());
            }
            Change::UnknownService(key) => {
                self.unknown_services.insert(key, ());
            }
            Change::Forget(address) => {
                self.unknown.remove(&address);
            }
            Change::ForgetService(key) => {
                self.unknown_services.remove(&key);
            }
            Change::Policy(policy) => self.inbound.insert(*policy),
            Change::RemovePolicy(key) => self.inbound.remove(&key),
            Change::OutboundPolicy(policy) => self.outbound.insert(*policy),
            Change::RemoveOutboundPolicy(key) => self.outbound.remove(&key),
            Change::Config(config) => self.config = Some(Arc::new(*config)),
        }
    }

    fn insert_workload(&mut self, workload: Workload) {
        self.remove_workload(&workload.uid);
        let workload = Arc::new(workload);
        if !workload.host_network {
            for address in addresses(&workload) {
                self.unknown.remove(&address);
                self.by_address.insert(address, workload.clone());
            }
        }
        for (service, _) in &workload.services {
            Arc::make_mut(self.endpoints.entry(service.clone(), Arc::default)).push(workload.clone());
        }
        self.workloads.insert(workload.uid.clone(), workload);
    }

    fn remove_workload(&mut self, uid: &WorkloadUid) {
        let Some(old) = self.workloads.remove(uid) else {
            return;
        };
        for address in addresses(&old) {
            // The address may have passed to another workload, which keeps it.
            if self
                .by_address
                .get(&address)
                .is_some_and(|holder| holder.uid == *uid)
            {
                self.by_address.remove(&address);
            }
        }
        for (service, _) in &old.services {
            let Some(endpoints) = self.endpoints.get(service) else {
                continue;
            };
            if endpoints.len() == 1 && endpoints[0].uid == *uid {
                self.endpoints.remove(service);
            } else {
                Arc::make_mut(self.endpoints.entry(service.clone(), Arc::default))
                    .retain(|endpoint| endpoint.uid != *uid);
            }
        }
    }

    fn insert_service(&mut self, service: Service) {
        self.remove_service(&service.key);
        self.unknown_services.remove(&service.key);
        let service = Arc::new(service);
        for vip in &service.vips {
            self.unknown.remove(vip);
            self.by_vip.entry(vip.clone(), Vec::new).push(service.clone());
        }
        self.by_hostname
            .entry(service.hostname().into(), Vec::new)
            .push(service.clone());
        if !service.ranges.is_empty() {
            let ranges = service.ranges.iter().map(|range| (*range, service.clone()));
            Arc::make_mut(&mut self.ranges).extend(ranges);
        }
        self.services.insert(service.key.clone(), service);
    }

    fn remove_service(&mut self, key: &ServiceKey) {
        let Some(old) = self.services.remove(key) else {
            return;
        };
        for vip in &old.vips {
            leave(&mut self.by_vip, vip.clone(), key);
        }
        leave(&mut self.by_hostname, old.hostname().into(), key);
        if !old.ranges.is_empty() {
            Arc::make_mut(&mut self.ranges).retain(|(_, service)| service.key != *key);
        }
    }
}

fn addresses(workload: &Workload) -> impl Iterator<Item = NetworkAddress> {
    workload.addresses.iter().map(|ip| NetworkAddress {
        network: workload.network.clone(),
        ip: *ip,
    })
}

fn leave<K>(index: &mut Shards<K, Vec<Arc<Service>>>, at: K, key: &ServiceKey)
where
    K: std::hash::Hash + Eq + Clone,
{
    let services = index.entry(at.clone(), Vec::new);
    services.retain(|service| service.key != *key);
    if services.is_empty() {
        index.remove(&at);
    }
}

/// Among services of one name or address: visible ones, the client's own namespace first, then
/// `canonical`, then by key so that every node chooses alike.
fn preferred<'s>(
    services: impl Iterator<Item = &'s Arc<Service>>,
    namespace: &str,
) -> Option<&'s Arc<Service>> {
    services
        .filter(|service| service.visible_from(namespace))
        .min_by_key(|service| (service.namespace() != namespace, !service.canonical, &service.key))
}

#[cfg(test)]
mod tests;
