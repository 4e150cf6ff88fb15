//! What is dirty is made anew from objects, reports and ACKs.

use super::{
    Dirty, Index, Member, Place, endpoints, labels,
    phase::{Capture, Phase, Taken},
    selected::{Subject, select},
    services, workloads,
    workloads::Surroundings,
    world::{ADDRESS, Step},
};
use crate::watch::objects::{Container, Key, Pod, PortRef, Service, ServicePort};
use culvert_proto::workload as wire;
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

impl Index {
    /// Makes the resources of a service's listed addresses that are nobody's.
    pub(super) fn derive_listed(&mut self, key: &Key, dirty: &mut Dirty) {
        let mut made = BTreeSet::new();
        let service = self.objects.services.get(key).cloned();
        if let Some(service) = service.filter(|service| services::is_carried(service)) {
            let service_name = services::name(key, &self.settings);
            let listed = endpoints::listed(&service, self.slices_of(key));
            for (ip, one) in &listed {
                match self.by_address.get(ip) {
                    Some(member) => {
                        dirty.members.insert(member.clone());
                    }
                    None => {
                        let place = self.place(&one.node);
                        let resource = endpoints::resource(key, &service_name, *ip, one, &place);
                        made.insert(resource.name.to_string());
                        self.world.put(&mut dirty.step, ADDRESS, resource);
                    }
                }
            }
        }
        let before = if made.is_empty() {
            self.made.remove(key)
        } else {
            self.made.insert(key.clone(), made.clone())
        };
        for name in before.unwrap_or_default().difference(&made) {
            self.world.remove(&mut dirty.step, ADDRESS, name);
        }
    }

    /// Where a node stands, as the cluster's labels say.
    fn place(&self, node: &str) -> Place {
        let key = Key {
            namespace: String::new(),
            name: node.to_owned(),
        };
        let labels = self.objects.nodes.get(&key).map(|node| &node.metadata.labels);
        let label = |name: &str| labels.and_then(|labels| labels.get(name)).cloned();
        Place {
            region: label("topology.kubernetes.io/region").unwrap_or_default(),
            zone: label("topology.kubernetes.io/zone").unwrap_or_default(),
            subzone: label("topology.istio.io/subzone").unwrap_or_default(),
        }
    }

    pub(super) fn derive(&mut self, member: &Member, taken: Taken, step: &mut Step) {
        match member {
            Member::Pod(key) => match self.objects.pods.get(key).cloned() {
                Some(pod) => self.derive_pod(key, &pod, taken, step),
                None => self.world.remove(step, ADDRESS, &workloads::uid(key)),
            },
            Member::Declared(key) => {
                let made = self.objects.workloads.get(key).and_then(|one| {
                    let containers = workloads::declared_ports(one);
                    let addresses = workloads::declared_addresses(one);
                    let subject = Subject {
                        namespace: &key.namespace,
                        labels: &one.metadata.labels,
                        settled: one.spec.hbone,
                    };
                    let around = self.surroundings(subject, &containers, &addresses, &one.spec.node);
                    workloads::of_declared(key, one, around, &self.settings).ok()
                });
                match made {
                    Some(resource) => self.world.put(step, ADDRESS, resource),
                    None => self.world.remove(step, ADDRESS, &workloads::declared_uid(key)),
                }
            }
        }
    }

    fn derive_pod(&mut self, key: &Key, pod: &Pod, taken: Taken, step: &mut Step) {
        let uid = &pod.metadata.uid;
        let wanted = workloads::wanted(pod, &self.objects);
        let capture = self.capture(uid, &pod.spec.node_name);
        let next = self.world.number + 1;
        let recorded = self.recorded.remove(uid);
        let before = self.phases.get(uid).copied();
        let phase = match before.or_else(|| Some(recorded?.resumed(next))) {
            Some(phase) => phase.step(wanted, capture, next, taken),
            None => Phase::first(wanted),
        };
        if before.or(recorded).map(Phase::name) != Some(phase.name()) {
            self.moved.push((uid.clone(), Some(phase)));
        }
        self.phases.insert(uid.clone(), phase);
        let member = Member::Pod(key.clone());
        if phase.waits() {
            self.waiting.insert(member);
        } else {
            self.waiting.remove(&member);
        }
        let Ok(facts) = workloads::facts(key, pod, &self.objects, phase, &self.settings) else {
            // `check` has refused what has none.
            return;
        };
        if workloads::finished(pod) {
            self.world.remove(step, ADDRESS, &facts.workload_uid);
        } else {
            let subject = Subject {
                namespace: &key.namespace,
                labels: &pod.metadata.labels,
                settled: phase.refuses_plaintext(),
            };
            let addresses = workloads::own_addresses(pod);
            let around = self.surroundings(subject, &pod.spec.containers, &addresses, &facts.node);
            let resource = workloads::of_pod(key, pod, &facts, (phase, capture), around, &self.settings);
            self.world.put(step, ADDRESS, resource);
        }
        self.world.put_pod(step, facts);
    }

    fn capture(&self, uid: &str, node: &str) -> Capture {
        match self.captures.get(uid) {
            Some((of, capture)) if of == node => *capture,
            _ if self.attended.contains(node) => Capture::None,
            _ => Capture::Unknown,
        }
    }

    fn surroundings(
        &self,
        subject: Subject<'_>,
        containers: &[Container],
        addresses: &[IpAddr],
        node: &str,
    ) -> Surroundings {
        Surroundings {
            selected: select(&self.selecting, &self.objects, &self.settings, subject),
            services: self.services_of(subject, containers, addresses),
            place: self.place(node),
        }
    }

    /// The services that a member is an endpoint of, with the ports that it serves them on.
    fn services_of(
        &self,
        subject: Subject<'_>,
        containers: &[Container],
        addresses: &[IpAddr],
    ) -> BTreeMap<String, wire::PortList> {
        let mut all = BTreeMap::new();
        for key in self.services.candidates(subject.namespace, subject.labels) {
            let Some(service) = self.objects.services.get(key) else {
                continue;
            };
            if !self.slices.contains_key(key) && labels::matches(&service.spec.selector, subject.labels) {
                let ports = selected_ports(service, containers);
                all.insert(services::name(key, &self.settings), wire::PortList { ports });
            }
        }
        for ip in addresses {
            for key in self.listed_at.get(ip).into_iter().flatten() {
                let Some(service) = self.objects.services.get(key) else {
                    continue;
                };
                let one = endpoints::listed(service, self.slices_of(key)).remove(ip);
                if let Some(one) = one.filter(|one| one.ready || one.terminating) {
                    let ports = one.ports;
                    all.insert(services::name(key, &self.settings), wire::PortList { ports });
                }
            }
        }
        all
    }
}

fn selected_ports(service: &Service, containers: &[Container]) -> Vec<wire::Port> {
    let target = |port: &ServicePort| match &port.target_port {
        None => Some(port.port),
        Some(PortRef::Number(number)) => Some(*number),
        Some(PortRef::Name(name)) => workloads::named_port(containers, name),
    };
    services::tcp_ports(service)
        .filter_map(|port| {
            Some(wire::Port {
                service_port: port.port.into(),
                target_port: target(port)?.into(),
                app_protocol: 0,
            })
        })
        .collect()
}
