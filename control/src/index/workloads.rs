//! Pods and declared workloads as `istio.workload` resources.
//!
//! Invariant: the protocol follows enrolment, never the state of capture: a pod whose capture is broken is
//! published as unhealthy, never as plaintext (settled D11).

use super::{
    CLUSTER, Place, Settings, extension, octets,
    phase::{Capture, Phase},
    selected::Selected,
    status,
    world::{About, PodFacts, Resource},
};
use crate::watch::{
    claims::Claim,
    objects::{Container, Key, Objects, Pod, PortRef, Workload as Declared},
};
use culvert_core::ids::SpiffeId;
use culvert_proto::{mesh, workload as wire};
use prost::Message;
use std::{collections::BTreeMap, net::IpAddr};

const ENROL: &str = "culvert.dev/dataplane-mode";
const EXCLUDE_INBOUND: &str = "culvert.dev/exclude-inbound-ports";
const EXCLUDE_OUTBOUND: &str = "culvert.dev/exclude-outbound-ports";
const EXCLUDE_CIDRS: &str = "culvert.dev/exclude-outbound-cidrs";
const IDENTITY: &str = "culvert.dev/identity";

const PORT: &str = "port; write ports from 1 to 65535, with commas between them";
const CIDR: &str = "CIDR; write ranges such as 10.0.0.0/8, with commas between them";

/// Refuses what cannot be converted; says what the pod holds for itself alone.
pub fn check_pod(key: &Key, pod: &Pod, settings: &Settings) -> Result<Vec<Claim>, String> {
    facts(key, pod, &Objects::default(), Phase::Out, settings)?;
    let mut claims = vec![Claim::PodUid(pod.metadata.uid.clone())];
    let ips = pod_ips(pod)?;
    if !pod.spec.host_network && !finished(pod) {
        claims.extend(ips.into_iter().map(Claim::Address));
    }
    Ok(claims)
}

pub fn check_declared(key: &Key, declared: &Declared, settings: &Settings) -> Result<Vec<Claim>, String> {
    let spec = &declared.spec;
    identity(key, &spec.service_account, spec.identity.as_deref(), settings)
        .map_err(|why| format!("spec.identity: {why}"))?;
    if spec.addresses.is_empty() {
        return Err("spec.addresses is empty; a workload has at least one".to_owned());
    }
    let claim = |text: &String| match text.parse() {
        Ok(ip) => Ok(Claim::Address(ip)),
        Err(_) => Err(format!(
            "spec.addresses: {text:?} is no address; write an IPv4 or IPv6 address"
        )),
    };
    spec.addresses.iter().map(claim).collect()
}

/// Whether the pod shall take part: its own label, else its namespace's.
pub fn wanted(pod: &Pod, objects: &Objects) -> bool {
    let own = pod.metadata.labels.get(ENROL);
    let asked = match own {
        Some(mode) => mode == "ambient",
        None => namespace_takes_part(objects, &pod.metadata.namespace),
    };
    asked && !pod.spec.host_network && !finished(pod)
}

fn namespace_takes_part(objects: &Objects, namespace: &str) -> bool {
    let key = Key {
        namespace: String::new(),
        name: namespace.to_owned(),
    };
    let labels = objects.namespaces.get(&key).map(|one| &one.metadata.labels);
    labels
        .and_then(|labels| labels.get(ENROL))
        .is_some_and(|mode| mode == "ambient")
}

pub fn finished(pod: &Pod) -> bool {
    matches!(pod.status.phase.as_str(), "Succeeded" | "Failed")
}

/// The addresses by which others may know the pod.
pub fn own_addresses(pod: &Pod) -> Vec<IpAddr> {
    if pod.spec.host_network || finished(pod) {
        return vec![];
    }
    pod_ips(pod).unwrap_or_default()
}

pub fn declared_addresses(declared: &Declared) -> Vec<IpAddr> {
    let texts = declared.spec.addresses.iter();
    texts.filter_map(|text| text.parse().ok()).collect()
}

fn or<'t>(text: &'t str, default: &'t str) -> &'t str {
    if text.is_empty() { default } else { text }
}

fn identity(key: &Key, account: &str, asked: Option<&str>, settings: &Settings) -> Result<SpiffeId, String> {
    let id = match asked {
        Some(id) => id
            .parse::<SpiffeId>()
            .map_err(|error| format!("{error}; write spiffe://{}/PATH", settings.trust_domain))?,
        None => SpiffeId::from_template(&settings.trust_domain, &key.namespace, or(account, "default"))
            .map_err(|error| error.to_string())?,
    };
    if id.trust_domain() != settings.trust_domain.as_str() {
        let domain = &settings.trust_domain;
        return Err(format!(
            "{:?} is not of trust domain {domain}, whose identities alone are issued here; write spiffe://{domain}/PATH",
            id.as_str(),
        ));
    }
    Ok(id)
}

/// What agents and the CA need of a pod.
pub fn facts(
    key: &Key,
    pod: &Pod,
    objects: &Objects,
    phase: Phase,
    settings: &Settings,
) -> Result<PodFacts, String> {
    if pod.metadata.uid.is_empty() {
        return Err("metadata.uid is missing; the node's agent knows the pod by it".to_owned());
    }
    if !is_uid(&pod.metadata.uid) {
        return Err(format!(
            "metadata.uid: {:?} is no UID; agents take 1 to 128 of a-z, A-Z, 0-9, '-' and '_'",
            pod.metadata.uid
        ));
    }
    let account = or(&pod.spec.service_account_name, "default").to_owned();
    let annotation = |name: &str| pod.metadata.annotations.get(name).map(String::as_str);
    Ok(PodFacts {
        uid: pod.metadata.uid.clone(),
        namespace: key.namespace.clone(),
        name: key.name.clone(),
        identity: identity(key, &account, annotation(IDENTITY), settings)
            .map_err(|why| format!("metadata.annotations: {IDENTITY}: {why}"))?,
        service_account: account,
        node: pod.spec.node_name.clone(),
        workload_uid: uid(key),
        enrolled: phase.captures(),
        refuse_plaintext: phase.refuses_plaintext(),
        namespace_apart: !namespace_takes_part(objects, &key.namespace),
        probe_ports: probe_ports(pod),
        exclude_inbound_ports: list(EXCLUDE_INBOUND, annotation(EXCLUDE_INBOUND), PORT)?,
        exclude_outbound_ports: list(EXCLUDE_OUTBOUND, annotation(EXCLUDE_OUTBOUND), PORT)?,
        exclude_outbound_nets: list(EXCLUDE_CIDRS, annotation(EXCLUDE_CIDRS), CIDR)?,
    })
}

/// What agents take: it names files of theirs.
fn is_uid(uid: &str) -> bool {
    let fits = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
    uid.len() <= 128 && uid.bytes().all(fits)
}

/// A list with commas; `what` says what its items are.
fn list<T: std::str::FromStr>(name: &str, value: Option<&str>, what: &str) -> Result<Vec<T>, String> {
    value
        .unwrap_or_default()
        .split(',')
        .map(str::trim)
        .filter(|part| !part.is_empty())
        .map(|part| {
            part.parse()
                .map_err(|_| format!("metadata.annotations: {name}: {part:?} is no {what}"))
        })
        .collect()
}

pub fn uid(key: &Key) -> String {
    format!("{CLUSTER}//Pod/{}/{}", key.namespace, key.name)
}

fn probe_ports(pod: &Pod) -> Vec<u16> {
    let of = |container: &Container| {
        [
            &container.liveness_probe,
            &container.readiness_probe,
            &container.startup_probe,
        ]
        .into_iter()
        .flatten()
        .flat_map(|probe| [&probe.http_get, &probe.tcp_socket, &probe.grpc])
        .flatten()
        .filter_map(|one| match &one.port {
            PortRef::Number(port) => Some(*port),
            PortRef::Name(name) => named_port(&pod.spec.containers, name),
        })
        .collect::<Vec<_>>()
    };
    let mut ports: Vec<u16> = pod.spec.containers.iter().flat_map(of).collect();
    ports.sort_unstable();
    ports.dedup();
    ports
}

pub fn named_port(containers: &[Container], name: &str) -> Option<u16> {
    containers
        .iter()
        .flat_map(|container| &container.ports)
        .find(|port| port.name == name)
        .map(|port| port.container_port)
}

fn pod_ips(pod: &Pod) -> Result<Vec<IpAddr>, String> {
    let all = pod.status.pod_ips.iter().map(|one| one.ip.as_str());
    let one = Some(pod.status.pod_ip.as_str()).filter(|ip| !ip.is_empty());
    let mut ips = vec![];
    for text in all.chain(one) {
        let ip = text
            .parse()
            .map_err(|_| format!("status.podIPs: {text:?} is no address; write an IPv4 or IPv6 address"))?;
        if !ips.contains(&ip) {
            ips.push(ip);
        }
    }
    Ok(ips)
}

fn ready(pod: &Pod) -> bool {
    pod.status
        .conditions
        .iter()
        .any(|one| one.r#type == "Ready" && one.status == "True")
}

/// What of the mesh a workload's resource needs beside its own object.
pub struct Surroundings {
    pub selected: Selected,
    pub services: BTreeMap<String, wire::PortList>,
    pub place: Place,
}

/// A pod's resource.
pub fn of_pod(
    key: &Key,
    pod: &Pod,
    facts: &PodFacts,
    (phase, capture): (Phase, Capture),
    around: Surroundings,
    settings: &Settings,
) -> Resource {
    let hbone = phase.speaks_hbone();
    let captured = matches!(capture, Capture::Captured | Capture::Unknown);
    let healthy = ready(pod) && (!hbone || captured);
    let options = mesh::WorkloadOptions {
        spiffe_id: own_identity(
            &facts.identity,
            &facts.namespace,
            &facts.service_account,
            settings,
        ),
        terminating: healthy && pod.metadata.deletion_timestamp.is_some(),
        hostname: pod.spec.hostname.clone(),
        plaintext_refused: false,
        outbound_policies: around.selected.outbound.clone(),
    };
    let labels = &pod.metadata.labels;
    let label = |names: [&str; 2]| {
        names
            .iter()
            .find_map(|name| labels.get(*name))
            .cloned()
            .unwrap_or_default()
    };
    let message = wire::Workload {
        uid: facts.workload_uid.clone(),
        name: key.name.clone(),
        namespace: key.namespace.clone(),
        addresses: addresses(pod_ips(pod).unwrap_or_default()),
        tunnel_protocol: protocol(hbone),
        trust_domain: settings.trust_domain.to_string(),
        service_account: facts.service_account.clone(),
        node: facts.node.clone(),
        canonical_name: or(&label(["app.kubernetes.io/name", "app"]), &key.name).to_owned(),
        canonical_revision: or(&label(["app.kubernetes.io/version", "version"]), "latest").to_owned(),
        workload_type: wire::WorkloadType::Pod.into(),
        workload_name: key.name.clone(),
        services: around.services,
        authorization_policies: around.selected.inbound,
        status: status(healthy),
        cluster_id: CLUSTER.to_owned(),
        locality: around.place.message(),
        network_mode: if pod.spec.host_network {
            wire::NetworkMode::HostNetwork.into()
        } else {
            wire::NetworkMode::Standard.into()
        },
        extensions: extension(
            "culvert.dev/workload",
            "culvert.mesh.v1.WorkloadOptions",
            &options,
        ),
        ..wire::Workload::default()
    };
    resource(message, around.selected.outbound)
}

/// Encodes a workload that names these outbound policies.
fn resource(message: wire::Workload, outbound: Vec<String>) -> Resource {
    let host_network = message.network_mode == i32::from(wire::NetworkMode::HostNetwork);
    let aliases = if host_network {
        [].into()
    } else {
        let all = message.addresses.iter();
        all.filter_map(|bytes| alias(&message.network, bytes).map(Into::into))
            .collect()
    };
    let names = |texts: &mut dyn Iterator<Item = &String>| texts.map(|text| text.as_str().into()).collect();
    let about = About::Workload {
        node: message.node.as_str().into(),
        namespace: message.namespace.as_str().into(),
        aliases,
        services: names(&mut message.services.keys()),
        policies: names(&mut message.authorization_policies.iter().chain(&outbound)),
        own_tunnel: None,
    };
    let name = message.uid.as_str().into();
    let message = wire::Address {
        r#type: Some(wire::address::Type::Workload(message)),
    };
    Resource::new(name, message.encode_to_vec(), about)
}

fn alias(network: &str, bytes: &[u8]) -> Option<String> {
    let ip = match bytes.len() {
        4 => IpAddr::from(<[u8; 4]>::try_from(bytes).ok()?),
        16 => IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?),
        _ => return None,
    };
    Some(format!("{network}/{ip}"))
}

fn addresses(ips: Vec<IpAddr>) -> Vec<bytes::Bytes> {
    ips.into_iter().map(|ip| octets(ip).into()).collect()
}

fn protocol(hbone: bool) -> i32 {
    if hbone {
        wire::TunnelProtocol::Hbone
    } else {
        wire::TunnelProtocol::NoTunnel
    }
    .into()
}

/// The full ID, if it is not what the template gives.
fn own_identity(id: &SpiffeId, namespace: &str, account: &str, settings: &Settings) -> String {
    let template = SpiffeId::from_template(&settings.trust_domain, namespace, account);
    if template.as_ref() == Ok(id) {
        String::new()
    } else {
        id.to_string()
    }
}

pub fn declared_uid(key: &Key) -> String {
    format!("{CLUSTER}/culvert.dev/Workload/{}/{}", key.namespace, key.name)
}

/// The ports of a declared workload, as a container's.
pub fn declared_ports(declared: &Declared) -> [Container; 1] {
    [Container {
        ports: declared.spec.ports.clone(),
        ..Container::default()
    }]
}

/// A declared workload's resource.
pub fn of_declared(
    key: &Key,
    declared: &Declared,
    around: Surroundings,
    settings: &Settings,
) -> Result<Resource, String> {
    let spec = &declared.spec;
    let account = or(&spec.service_account, "default");
    let id = identity(key, account, spec.identity.as_deref(), settings)?;
    let options = mesh::WorkloadOptions {
        spiffe_id: own_identity(&id, &key.namespace, account, settings),
        outbound_policies: around.selected.outbound.clone(),
        ..mesh::WorkloadOptions::default()
    };
    let message = wire::Workload {
        uid: declared_uid(key),
        name: key.name.clone(),
        namespace: key.namespace.clone(),
        addresses: addresses(declared_addresses(declared)),
        tunnel_protocol: protocol(spec.hbone),
        trust_domain: settings.trust_domain.to_string(),
        service_account: account.to_owned(),
        node: spec.node.clone(),
        canonical_name: key.name.clone(),
        workload_name: key.name.clone(),
        services: around.services,
        authorization_policies: around.selected.inbound,
        status: status(true),
        cluster_id: CLUSTER.to_owned(),
        locality: around.place.message(),
        extensions: extension(
            "culvert.dev/workload",
            "culvert.mesh.v1.WorkloadOptions",
            &options,
        ),
        ..wire::Workload::default()
    };
    let mut resource = resource(message, around.selected.outbound);
    if let About::Workload { own_tunnel, .. } = &mut resource.about {
        *own_tunnel = (spec.hbone && !spec.node.is_empty()).then_some(id);
    }
    Ok(resource)
}
