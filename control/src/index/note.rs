//! One change of an object: the indexes follow it, and what it may have changed elsewhere becomes dirty.

use super::{
    Dirty, Index, Member, endpoints, policies, selected, services, workloads,
    world::{ADDRESS, INBOUND, OUTBOUND},
};
use crate::{
    config::Profile,
    watch::objects::{
        AuthorizationPolicy, EndpointSlice, Key, Kind, Object, PeerAuthentication, Pod, Service, Workload,
    },
};
use selected::signature;
use std::{collections::BTreeMap, net::IpAddr};

/// A member as the indexes have it.
struct Standing<'o> {
    member: Member,
    namespace: &'o str,
    labels: &'o BTreeMap<String, String>,
    node: &'o str,
    addresses: Vec<IpAddr>,
}

impl<'o> Standing<'o> {
    fn of_pod(key: &'o Key, pod: &'o Pod) -> Self {
        Self {
            member: Member::Pod(key.clone()),
            namespace: &key.namespace,
            labels: &pod.metadata.labels,
            node: &pod.spec.node_name,
            addresses: workloads::own_addresses(pod),
        }
    }

    fn of_declared(key: &'o Key, one: &'o Workload) -> Self {
        Self {
            member: Member::Declared(key.clone()),
            namespace: &key.namespace,
            labels: &one.metadata.labels,
            node: &one.spec.node,
            addresses: workloads::declared_addresses(one),
        }
    }
}

impl Index {
    /// Keeps the indexes in step with one change, and notes what follows from it.
    pub(super) fn note(&mut self, key: &Key, old: Option<&Object>, new: Option<&Object>, dirty: &mut Dirty) {
        let kind = new.or(old).map(Object::kind);
        match kind {
            None => {}
            Some(Kind::Namespace) => self.note_namespace(&key.name, new.is_some(), dirty),
            Some(Kind::Node) => self.note_node(&key.name, dirty),
            Some(Kind::Pod) => {
                if let Some(Object::Pod(old)) = old {
                    self.leave_pod(key, old, new, dirty);
                }
                if let Some(Object::Pod(new)) = new {
                    self.join(&Standing::of_pod(key, new), dirty);
                }
            }
            Some(Kind::Workload) => {
                if let Some(Object::Workload(old)) = old {
                    self.leave(&Standing::of_declared(key, old), dirty);
                }
                if let Some(Object::Workload(new)) = new {
                    self.join(&Standing::of_declared(key, new), dirty);
                }
            }
            Some(Kind::Service) => self.note_service(key, old, new, dirty),
            Some(Kind::EndpointSlice) => self.note_slice(key, old, new, dirty),
            Some(Kind::ExternalService) => {
                if let Some(Object::ExternalService(old)) = old {
                    let name = services::external_name(key, old);
                    self.world.remove(&mut dirty.step, ADDRESS, &name);
                }
                if let Some(Object::ExternalService(new)) = new {
                    self.world
                        .put(&mut dirty.step, ADDRESS, services::external(key, new));
                }
            }
            Some(Kind::AuthorizationPolicy) => {
                let of = |object: Option<&Object>| match object {
                    Some(Object::AuthorizationPolicy(one)) => Some(one.clone()),
                    _ => None,
                };
                self.note_policy(key, of(old).as_deref(), of(new).as_deref(), dirty);
            }
            Some(Kind::PeerAuthentication) => self.note_peer(key, old, new, dirty),
        }
    }

    fn note_namespace(&mut self, namespace: &str, is: bool, dirty: &mut Dirty) {
        for resource in policies::namespace_defaults(namespace) {
            if is {
                self.world.put(&mut dirty.step, INBOUND, resource);
            } else {
                self.world.remove(&mut dirty.step, INBOUND, &resource.name);
            }
        }
        dirty.members.extend(self.members.of(namespace).cloned());
    }

    fn note_node(&mut self, node: &str, dirty: &mut Dirty) {
        let own = self.by_node.get(node).into_iter().flatten();
        dirty.members.extend(own.cloned());
        // Nodes change rarely: every service that lists endpoints is looked at.
        dirty.listed.extend(self.slices.keys().cloned());
    }

    fn leave_pod(&mut self, key: &Key, pod: &Pod, new: Option<&Object>, dirty: &mut Dirty) {
        let standing = Standing::of_pod(key, pod);
        self.leave(&standing, dirty);
        let uid = &pod.metadata.uid;
        let stays = matches!(new, Some(Object::Pod(new)) if new.metadata.uid == *uid);
        if !stays {
            if self.phases.remove(uid).is_some() {
                self.moved.push((uid.clone(), None));
            }
            self.waiting.remove(&standing.member);
            self.world.remove_pod(&mut dirty.step, uid);
        }
    }

    fn join(&mut self, standing: &Standing<'_>, dirty: &mut Dirty) {
        let member = &standing.member;
        self.members.insert(standing.namespace, standing.labels, member);
        let own = self.by_node.entry(standing.node.to_owned()).or_default();
        own.insert(member.clone());
        for ip in &standing.addresses {
            self.by_address.insert(*ip, member.clone());
            dirty
                .listed
                .extend(self.listed_at.get(ip).into_iter().flatten().cloned());
        }
        dirty.members.insert(member.clone());
    }

    fn leave(&mut self, standing: &Standing<'_>, dirty: &mut Dirty) {
        let member = &standing.member;
        self.members.remove(standing.namespace, standing.labels, member);
        if let Some(own) = self.by_node.get_mut(standing.node) {
            own.remove(member);
            if own.is_empty() {
                self.by_node.remove(standing.node);
            }
        }
        for ip in &standing.addresses {
            // Within one batch the address may have passed to another already.
            if self.by_address.get(ip) == Some(member) {
                self.by_address.remove(ip);
            }
            dirty
                .listed
                .extend(self.listed_at.get(ip).into_iter().flatten().cloned());
        }
        dirty.members.insert(member.clone());
    }

    fn note_service(&mut self, key: &Key, old: Option<&Object>, new: Option<&Object>, dirty: &mut Dirty) {
        let carried = |object: Option<&Object>| match object {
            Some(Object::Service(service)) if services::is_carried(service) => Some(service.clone()),
            _ => None,
        };
        let (old, new) = (carried(old), carried(new));
        for service in [&old, &new].into_iter().flatten() {
            self.touch_selected(key, service, dirty);
        }
        if let Some(selector) = old
            .as_ref()
            .map(|old| &old.spec.selector)
            .filter(|s| !s.is_empty())
        {
            self.services.remove(&key.namespace, Some(selector), key);
        }
        if let Some(selector) = new
            .as_ref()
            .map(|new| &new.spec.selector)
            .filter(|s| !s.is_empty())
        {
            self.services.insert(&key.namespace, Some(selector), key);
        }
        match new {
            Some(new) => {
                let resource = services::resource(key, &new, &self.settings);
                self.world.put(&mut dirty.step, ADDRESS, resource);
            }
            None => {
                let name = services::name(key, &self.settings);
                self.world.remove(&mut dirty.step, ADDRESS, &name);
            }
        }
        dirty.listed.insert(key.clone());
    }

    /// Members that a service may select.
    fn touch_selected(&self, key: &Key, service: &Service, dirty: &mut Dirty) {
        if !service.spec.selector.is_empty() {
            let candidates = self.members.candidates(&key.namespace, &service.spec.selector);
            dirty.members.extend(candidates);
        }
    }

    fn note_slice(&mut self, key: &Key, old: Option<&Object>, new: Option<&Object>, dirty: &mut Dirty) {
        let service = |object: Option<&Object>| match object {
            Some(Object::EndpointSlice(slice)) => endpoints::service_of(key, slice),
            _ => None,
        };
        let (before, after) = (service(old), service(new));
        if let Some(before) = &before
            && let Some(slices) = self.slices.get_mut(before)
        {
            slices.remove(key);
            if slices.is_empty() {
                self.slices.remove(before);
            }
        }
        if let Some(after) = &after {
            self.slices.entry(after.clone()).or_default().insert(key.clone());
        }
        // A slice may take the place of a selector, and give it back.
        for of in [&before, &after].into_iter().flatten() {
            if let Some(service) = self.objects.services.get(of).cloned() {
                self.touch_selected(of, &service, dirty);
            }
            dirty.listed.insert(of.clone());
        }
        for slice in [old, new].into_iter().flatten() {
            let Object::EndpointSlice(slice) = slice else {
                continue;
            };
            for ip in endpoints::addresses(slice) {
                dirty.members.extend(self.by_address.get(&ip).cloned());
                for of in [&before, &after].into_iter().flatten() {
                    self.relist(ip, of);
                }
            }
        }
    }

    /// Notes whether a slice of the service lists the address.
    fn relist(&mut self, ip: IpAddr, service: &Key) {
        let lists = self
            .slices_of(service)
            .any(|slice| endpoints::addresses(slice).any(|one| one == ip));
        let services = self.listed_at.entry(ip).or_default();
        if lists {
            services.insert(service.clone());
        } else {
            services.remove(service);
            if services.is_empty() {
                self.listed_at.remove(&ip);
            }
        }
    }

    pub(super) fn slices_of(&self, service: &Key) -> impl Iterator<Item = &EndpointSlice> {
        let keys = self.slices.get(service).into_iter().flatten();
        keys.filter_map(|key| self.objects.slices.get(key).map(AsRef::as_ref))
    }

    fn note_policy(
        &mut self,
        key: &Key,
        old: Option<&AuthorizationPolicy>,
        new: Option<&AuthorizationPolicy>,
        dirty: &mut Dirty,
    ) {
        let selector =
            |policy: &AuthorizationPolicy| policy.spec.selector.clone().map(|one| one.match_labels);
        if let Some(old) = old {
            self.selecting
                .policies
                .remove(&key.namespace, selector(old).as_ref(), key);
        }
        let made = new.and_then(|new| policies::resource(key, new, &self.settings).ok());
        for of in [INBOUND, OUTBOUND] {
            if made.as_ref().is_none_or(|(kind, _)| *kind != of) {
                self.world.remove(&mut dirty.step, of, &key.to_string());
            }
        }
        if let Some((of, resource)) = made {
            self.world.put(&mut dirty.step, of, resource);
        }
        if let Some(new) = new {
            self.selecting
                .policies
                .insert(&key.namespace, selector(new).as_ref(), key);
        }
        // What a policy says is its own matter; whom it reaches is theirs.
        if old.map(signature) != new.map(signature) {
            for policy in [old, new].into_iter().flatten() {
                self.touch_reached(key, selector(policy).unwrap_or_default(), dirty);
            }
            let first = self.settings.profile == Profile::Low && old.is_none() != new.is_none();
            if first {
                // A namespace with a policy of its own enforces its defaults.
                dirty.members.extend(self.members.of(&key.namespace).cloned());
            }
        }
    }

    fn touch_reached(&self, key: &Key, selector: BTreeMap<String, String>, dirty: &mut Dirty) {
        if key.namespace == self.settings.root_namespace {
            for namespace in self.members.namespaces() {
                dirty
                    .members
                    .extend(self.members.candidates(namespace, &selector));
            }
        } else {
            dirty
                .members
                .extend(self.members.candidates(&key.namespace, &selector));
        }
    }

    fn note_peer(&mut self, key: &Key, old: Option<&Object>, new: Option<&Object>, dirty: &mut Dirty) {
        let selector = |one: &PeerAuthentication| one.spec.selector.clone().map(|one| one.match_labels);
        if let Some(Object::PeerAuthentication(old)) = old {
            let selector = selector(old);
            self.selecting
                .peers
                .remove(&key.namespace, selector.as_ref(), key);
            self.touch_reached(key, selector.unwrap_or_default(), dirty);
        }
        let mut made = None;
        if let Some(Object::PeerAuthentication(new)) = new {
            let selector = selector(new);
            self.selecting
                .peers
                .insert(&key.namespace, selector.as_ref(), key);
            self.touch_reached(key, selector.unwrap_or_default(), dirty);
            made = policies::of_ports(key, new);
        }
        match made {
            Some(resource) => self.world.put(&mut dirty.step, INBOUND, resource),
            None => {
                let name = policies::peer_key(key).to_string();
                self.world.remove(&mut dirty.step, INBOUND, &name);
            }
        }
    }
}
