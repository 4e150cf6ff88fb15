//! Pods, workloads and services as `istio.workload` resources.
//!
//! Invariant: HBONE is published for what its agent reports as captured, and a pod whose capture is broken
//! is published as unhealthy, never as plaintext (settled D11).

use super::{
    Builder, Capture, PodFacts, Settings, octets,
    policies::{Selected, Subject},
};
use crate::watch::objects::{
    Container, ExternalService, Key, Objects, Pod, PortRef, Service, Workload as Declared,
};
use culvert_core::ids::SpiffeId;
use culvert_proto::{mesh, type_url, workload as wire};
use ipnet::IpNet;
use prost::Message;
use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
};

const ENROL: &str = "culvert.dev/dataplane-mode";
const EXCLUDE_INBOUND: &str = "culvert.dev/exclude-inbound-ports";
const EXCLUDE_OUTBOUND: &str = "culvert.dev/exclude-outbound-ports";
const EXCLUDE_CIDRS: &str = "culvert.dev/exclude-outbound-cidrs";
const IDENTITY: &str = "culvert.dev/identity";
const CLUSTER: &str = "Kubernetes";

pub(super) fn build(
    objects: &Objects,
    captures: &HashMap<String, Capture>,
    settings: &Settings,
    selected: &Selected<'_>,
    builder: &mut Builder<'_>,
) {
    for (key, service) in &objects.services {
        if service.spec.r#type != "ExternalName" {
            add_service(key, service, settings, builder);
        }
    }
    for (key, external) in &objects.externals {
        add_external(key, external, builder);
    }
    for (key, pod) in &objects.pods {
        let Ok(mut facts) = facts(key, pod, objects, settings) else {
            continue;
        };
        let before = builder.before.pods.get(&facts.uid);
        facts.born_outside = before.is_some_and(|before| !before.enrolled || before.born_outside);
        if !finished(pod) {
            let capture = captures.get(&facts.uid).copied().unwrap_or_default();
            let message = of_pod(key, pod, &facts, capture, objects, settings, selected);
            add_workload(message, builder);
        }
        builder.world.pods.insert(facts.uid.clone(), facts);
    }
    for (key, declared) in &objects.workloads {
        if let Ok(message) = of_declared(key, declared, objects, settings, selected) {
            add_workload(message, builder);
        }
    }
}

/// Refuses what cannot be converted.
pub(super) fn check(objects: &Objects, settings: &Settings) -> Result<(), String> {
    let mut holders: BTreeMap<IpAddr, String> = BTreeMap::new();
    let mut hold = |ip: IpAddr, who: String| match holders.insert(ip, who.clone()) {
        Some(other) if other != who => Err(format!("{who} and {other} both have address {ip}; one must go")),
        _ => Ok(()),
    };
    let mut uids: BTreeMap<&str, &Key> = BTreeMap::new();
    for (key, pod) in &objects.pods {
        let who = format!("Pod {}/{}", key.namespace, key.name);
        facts(key, pod, objects, settings).map_err(|why| format!("{who}: {why}"))?;
        if let Some(other) = uids.insert(&pod.metadata.uid, key) {
            return Err(format!(
                "{who} has the uid of Pod {}/{}",
                other.namespace, other.name
            ));
        }
        if !pod.spec.host_network && !finished(pod) {
            for ip in pod_ips(pod).map_err(|why| format!("{who}: {why}"))? {
                hold(ip, who.clone())?;
            }
        }
    }
    for (key, declared) in &objects.workloads {
        let who = format!("Workload {}/{}", key.namespace, key.name);
        identity(
            key,
            &declared.spec.service_account,
            declared.spec.identity.as_deref(),
            settings,
        )
        .map_err(|why| format!("{who}: {why}"))?;
        for text in &declared.spec.addresses {
            let ip = text
                .parse()
                .map_err(|_| format!("{who}: spec.addresses: {text:?} is no address"))?;
            hold(ip, who.clone())?;
        }
    }
    for (key, service) in &objects.services {
        let who = format!("Service {}/{}", key.namespace, key.name);
        for ip in vips(service).map_err(|why| format!("{who}: {why}"))? {
            hold(ip, who.clone())?;
        }
    }
    for (key, external) in &objects.externals {
        ranges(external).map_err(|why| format!("ExternalService {}/{}: {why}", key.namespace, key.name))?;
    }
    Ok(())
}

/// Whether the pod takes part: its own label, else its namespace's.
fn enrolled(pod: &Pod, objects: &Objects) -> bool {
    let own = pod.metadata.labels.get(ENROL);
    let namespace = objects
        .namespaces
        .get(&pod.metadata.namespace)
        .and_then(|one| one.metadata.labels.get(ENROL));
    !pod.spec.host_network && own.or(namespace).is_some_and(|mode| mode == "ambient")
}

fn namespace_takes_part(objects: &Objects, namespace: &str) -> bool {
    let labels = objects.namespaces.get(namespace).map(|one| &one.metadata.labels);
    labels
        .and_then(|labels| labels.get(ENROL))
        .is_some_and(|mode| mode == "ambient")
}

fn finished(pod: &Pod) -> bool {
    matches!(pod.status.phase.as_str(), "Succeeded" | "Failed")
}

fn or<'t>(text: &'t str, default: &'t str) -> &'t str {
    if text.is_empty() { default } else { text }
}

fn identity(key: &Key, account: &str, asked: Option<&str>, settings: &Settings) -> Result<SpiffeId, String> {
    let id = match asked {
        Some(id) => id.parse::<SpiffeId>().map_err(|error| error.to_string())?,
        None => SpiffeId::from_template(&settings.trust_domain, &key.namespace, or(account, "default"))
            .map_err(|error| error.to_string())?,
    };
    if id.trust_domain() != settings.trust_domain.as_str() {
        return Err(format!("{id} is not of trust domain {}", settings.trust_domain));
    }
    Ok(id)
}

fn facts(key: &Key, pod: &Pod, objects: &Objects, settings: &Settings) -> Result<PodFacts, String> {
    if pod.metadata.uid.is_empty() {
        return Err("metadata.uid is missing".to_owned());
    }
    let account = or(&pod.spec.service_account_name, "default").to_owned();
    let annotation = |name: &str| pod.metadata.annotations.get(name).map(String::as_str);
    Ok(PodFacts {
        uid: pod.metadata.uid.clone(),
        namespace: key.namespace.clone(),
        name: key.name.clone(),
        identity: identity(key, &account, annotation(IDENTITY), settings)?,
        service_account: account,
        node: pod.spec.node_name.clone(),
        workload_uid: uid(key),
        enrolled: enrolled(pod, objects) && !finished(pod),
        born_outside: false,
        namespace_apart: !namespace_takes_part(objects, &key.namespace),
        probe_ports: probe_ports(pod),
        exclude_inbound_ports: list(EXCLUDE_INBOUND, annotation(EXCLUDE_INBOUND))?,
        exclude_outbound_ports: list(EXCLUDE_OUTBOUND, annotation(EXCLUDE_OUTBOUND))?,
        exclude_outbound_nets: list(EXCLUDE_CIDRS, annotation(EXCLUDE_CIDRS))?,
    })
}

fn list<T: std::str::FromStr>(name: &str, value: Option<&str>) -> Result<Vec<T>, String> {
    value
        .unwrap_or_default()
        .split(',')
        .map(str::trim)
        .filter(|part| !part.is_empty())
        .map(|part| {
            part.parse()
                .map_err(|_| format!("annotation {name}: {part:?} is not understood"))
        })
        .collect()
}

fn uid(key: &Key) -> String {
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

fn named_port(containers: &[Container], name: &str) -> Option<u16> {
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
            .map_err(|_| format!("status.podIPs: {text:?} is no address"))?;
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

fn of_pod(
    key: &Key,
    pod: &Pod,
    facts: &PodFacts,
    capture: Capture,
    objects: &Objects,
    settings: &Settings,
    selected: &Selected<'_>,
) -> wire::Workload {
    let joining = facts.born_outside && capture == Capture::None;
    let hbone = facts.enrolled && !joining;
    let subject = Subject {
        namespace: &key.namespace,
        labels: &pod.metadata.labels,
        enrolled: hbone,
    };
    let healthy = ready(pod) && (!hbone || capture == Capture::Captured);
    let options = mesh::WorkloadOptions {
        spiffe_id: own_identity(
            &facts.identity,
            &facts.namespace,
            &facts.service_account,
            settings,
        ),
        terminating: pod.metadata.deletion_timestamp.is_some(),
        hostname: pod.spec.hostname.clone(),
        plaintext_refused: false,
        outbound_policies: selected.outbound(subject),
    };
    let labels = &pod.metadata.labels;
    let label = |names: [&str; 2]| {
        names
            .iter()
            .find_map(|name| labels.get(*name))
            .cloned()
            .unwrap_or_default()
    };
    wire::Workload {
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
        services: services_of(objects, settings, &key.namespace, labels, &pod.spec.containers),
        authorization_policies: selected.inbound(subject),
        status: status(healthy),
        cluster_id: CLUSTER.to_owned(),
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
    }
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

fn status(healthy: bool) -> i32 {
    if healthy {
        wire::WorkloadStatus::Healthy
    } else {
        wire::WorkloadStatus::Unhealthy
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

fn of_declared(
    key: &Key,
    declared: &Declared,
    objects: &Objects,
    settings: &Settings,
    selected: &Selected<'_>,
) -> Result<wire::Workload, String> {
    let spec = &declared.spec;
    let account = or(&spec.service_account, "default");
    let id = identity(key, account, spec.identity.as_deref(), settings)?;
    let labels = &declared.metadata.labels;
    let subject = Subject {
        namespace: &key.namespace,
        labels,
        enrolled: spec.hbone,
    };
    let containers = [Container {
        ports: spec.ports.clone(),
        ..Container::default()
    }];
    let options = mesh::WorkloadOptions {
        spiffe_id: own_identity(&id, &key.namespace, account, settings),
        outbound_policies: selected.outbound(subject),
        ..mesh::WorkloadOptions::default()
    };
    let ips = spec
        .addresses
        .iter()
        .filter_map(|text| text.parse().ok())
        .collect();
    Ok(wire::Workload {
        uid: format!("{CLUSTER}/culvert.dev/Workload/{}/{}", key.namespace, key.name),
        name: key.name.clone(),
        namespace: key.namespace.clone(),
        addresses: addresses(ips),
        tunnel_protocol: protocol(spec.hbone),
        trust_domain: settings.trust_domain.to_string(),
        service_account: account.to_owned(),
        node: spec.node.clone(),
        canonical_name: key.name.clone(),
        workload_name: key.name.clone(),
        services: services_of(objects, settings, &key.namespace, labels, &containers),
        authorization_policies: selected.inbound(subject),
        status: status(true),
        cluster_id: CLUSTER.to_owned(),
        extensions: extension(
            "culvert.dev/workload",
            "culvert.mesh.v1.WorkloadOptions",
            &options,
        ),
        ..wire::Workload::default()
    })
}

fn hostname(key: &Key, settings: &Settings) -> String {
    format!("{}.{}.svc.{}", key.name, key.namespace, settings.cluster_domain)
}

/// The services that select these labels, with the ports that the workload serves them on.
fn services_of(
    objects: &Objects,
    settings: &Settings,
    namespace: &str,
    labels: &BTreeMap<String, String>,
    containers: &[Container],
) -> BTreeMap<String, wire::PortList> {
    let from = Key {
        namespace: namespace.to_owned(),
        name: String::new(),
    };
    objects
        .services
        .range(from..)
        .take_while(|(key, _)| key.namespace == namespace)
        .filter(|(_, service)| !service.spec.selector.is_empty() && service.spec.r#type != "ExternalName")
        .filter(|(_, service)| {
            service
                .spec
                .selector
                .iter()
                .all(|(name, value)| labels.get(name) == Some(value))
        })
        .map(|(key, service)| {
            let ports = service
                .spec
                .ports
                .iter()
                .filter(|port| matches!(port.protocol.as_str(), "" | "TCP"))
                .filter_map(|port| {
                    let target = match &port.target_port {
                        None => Some(port.port),
                        Some(PortRef::Number(number)) => Some(*number),
                        Some(PortRef::Name(name)) => named_port(containers, name),
                    }?;
                    Some(wire::Port {
                        service_port: port.port.into(),
                        target_port: target.into(),
                        app_protocol: 0,
                    })
                })
                .collect();
            (
                format!("{}/{}", key.namespace, hostname(key, settings)),
                wire::PortList { ports },
            )
        })
        .collect()
}

fn add_workload(message: wire::Workload, builder: &mut Builder<'_>) {
    let name = message.uid.clone();
    for service in message.services.keys() {
        builder
            .world
            .endpoints
            .entry(service.clone())
            .or_default()
            .push(name.clone());
    }
    let host_network = message.network_mode == i32::from(wire::NetworkMode::HostNetwork);
    let aliases = if host_network {
        vec![]
    } else {
        message
            .addresses
            .iter()
            .filter_map(|bytes| alias(&message.network, bytes))
            .collect()
    };
    let node = message.node.clone();
    let message = wire::Address {
        r#type: Some(wire::address::Type::Workload(message)),
    };
    builder.add_with(type_url::ADDRESS, name, &message, |resource| {
        resource.aliases = aliases;
        resource.node = node;
    });
}

fn alias(network: &str, bytes: &[u8]) -> Option<String> {
    let ip = match bytes.len() {
        4 => IpAddr::from(<[u8; 4]>::try_from(bytes).ok()?),
        16 => IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?),
        _ => return None,
    };
    Some(format!("{network}/{ip}"))
}

fn vips(service: &Service) -> Result<Vec<IpAddr>, String> {
    let spec = &service.spec;
    let mut ips = vec![];
    for text in spec.cluster_ips.iter().chain([&spec.cluster_ip]) {
        if text.is_empty() || text == "None" {
            continue;
        }
        let ip = text
            .parse()
            .map_err(|_| format!("spec.clusterIPs: {text:?} is no address"))?;
        if !ips.contains(&ip) {
            ips.push(ip);
        }
    }
    Ok(ips)
}

fn add_service(key: &Key, service: &Service, settings: &Settings, builder: &mut Builder<'_>) {
    let spec = &service.spec;
    let vips = vips(service).unwrap_or_default();
    let hostname = hostname(key, settings);
    let name = format!("{}/{hostname}", key.namespace);
    let affinity = (spec.session_affinity == "ClientIP").then(|| {
        let configured = spec
            .session_affinity_config
            .as_ref()
            .and_then(|one| one.client_ip.as_ref());
        configured.and_then(|one| one.timeout_seconds).unwrap_or(10_800)
    });
    let options = mesh::ServiceOptions {
        client_ip_affinity_seconds: affinity.unwrap_or_default(),
        use_terminating: true,
        port_names: spec
            .ports
            .iter()
            .filter(|port| !port.name.is_empty() && matches!(port.protocol.as_str(), "" | "TCP"))
            .map(|port| mesh::PortName {
                service_port: port.port.into(),
                name: port.name.clone(),
            })
            .collect(),
    };
    let message = wire::Service {
        name: key.name.clone(),
        namespace: key.namespace.clone(),
        hostname,
        addresses: vips
            .iter()
            .map(|ip| wire::NetworkAddress {
                network: String::new(),
                address: octets(*ip),
                length: None,
            })
            .collect(),
        ports: spec
            .ports
            .iter()
            .filter(|port| matches!(port.protocol.as_str(), "" | "TCP"))
            .map(|port| wire::Port {
                service_port: port.port.into(),
                target_port: match &port.target_port {
                    None => port.port.into(),
                    Some(PortRef::Number(number)) => (*number).into(),
                    Some(PortRef::Name(_)) => 0,
                },
                app_protocol: 0,
            })
            .collect(),
        load_balancing: Some(balancing(service)),
        canonical: true,
        extensions: extension("culvert.dev/service", "culvert.mesh.v1.ServiceOptions", &options),
        ..wire::Service::default()
    };
    let aliases = vips.iter().map(|ip| format!("/{ip}")).collect();
    let message = wire::Address {
        r#type: Some(wire::address::Type::Service(message)),
    };
    builder.add_with(type_url::ADDRESS, name, &message, |resource| {
        resource.aliases = aliases
    });
}

fn balancing(service: &Service) -> wire::LoadBalancing {
    use wire::load_balancing::{HealthPolicy, Mode, Scope};
    let spec = &service.spec;
    let (mode, preference): (Mode, &[Scope]) = if spec.internal_traffic_policy == "Local" {
        (Mode::Strict, &[Scope::Node])
    } else {
        match spec.traffic_distribution.as_str() {
            "PreferClose" | "PreferSameZone" => {
                (Mode::Failover, &[Scope::Network, Scope::Region, Scope::Zone])
            }
            "PreferSameNode" => (
                Mode::Failover,
                &[
                    Scope::Network,
                    Scope::Region,
                    Scope::Zone,
                    Scope::Subzone,
                    Scope::Node,
                ],
            ),
            _ => (Mode::UnspecifiedMode, &[]),
        }
    };
    let health = if spec.publish_not_ready_addresses {
        HealthPolicy::AllowAll
    } else {
        HealthPolicy::OnlyHealthy
    };
    wire::LoadBalancing {
        routing_preference: preference.iter().map(|scope| (*scope).into()).collect(),
        mode: mode.into(),
        health_policy: health.into(),
    }
}

fn ranges(external: &ExternalService) -> Result<Vec<IpNet>, String> {
    let spec = &external.spec;
    if spec.hosts.is_empty() && spec.cidrs.is_empty() {
        return Err("spec has neither hosts nor cidrs".to_owned());
    }
    if spec.ports.is_empty() || spec.ports.contains(&0) {
        return Err("spec.ports must name at least one port from 1 to 65535".to_owned());
    }
    spec.cidrs
        .iter()
        .map(|text| {
            let net = text
                .parse::<IpNet>()
                .or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
            net.map(|net| net.trunc())
                .map_err(|_| format!("spec.cidrs: {text:?} is no address or CIDR"))
        })
        .collect()
}

fn add_external(key: &Key, external: &ExternalService, builder: &mut Builder<'_>) {
    let ranges = ranges(external).unwrap_or_default();
    let hostname = external
        .spec
        .hosts
        .first()
        .cloned()
        .unwrap_or_else(|| key.name.clone());
    let name = format!("{}/{hostname}", key.namespace);
    let options = mesh::ExternalOptions {
        hosts: external.spec.hosts.clone(),
        ..mesh::ExternalOptions::default()
    };
    let config = prost_types::Any {
        type_url: "type.googleapis.com/culvert.mesh.v1.ExternalOptions".to_owned(),
        value: options.encode_to_vec(),
    };
    let message = wire::Service {
        name: key.name.clone(),
        namespace: key.namespace.clone(),
        hostname,
        addresses: ranges
            .iter()
            .map(|net| wire::NetworkAddress {
                network: String::new(),
                address: octets(net.network()),
                length: Some(net.prefix_len().into()),
            })
            .collect(),
        ports: external
            .spec
            .ports
            .iter()
            .map(|port| wire::Port {
                service_port: (*port).into(),
                target_port: (*port).into(),
                app_protocol: 0,
            })
            .collect(),
        extensions: vec![wire::Extension {
            name: "culvert.dev/external".to_owned(),
            config: Some(config),
        }],
        ..wire::Service::default()
    };
    let message = wire::Address {
        r#type: Some(wire::address::Type::Service(message)),
    };
    builder.add_with(type_url::ADDRESS, name, &message, |resource| {
        resource.is_range = true
    });
}
