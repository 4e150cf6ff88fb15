//! Services and declared destinations as `istio.workload` resources.
//!
//! Invariant: every field that kube-proxy honours is carried; a value that is not known is refused by name.

use super::{
    Settings, octets,
    world::{About, Name, Resource},
};
use crate::watch::{
    claims::Claim,
    objects::{ExternalService, Key, PortRef, Service, ServicePort},
};
use culvert_proto::{mesh, workload as wire};
use ipnet::IpNet;
use prost::Message;
use std::net::IpAddr;

/// Seconds of `sessionAffinity: ClientIP` unless set, and the most that Kubernetes allows.
const AFFINITY_SECONDS: u32 = 10_800;
const MAX_AFFINITY_SECONDS: u32 = 86_400;

pub fn hostname(key: &Key, settings: &Settings) -> String {
    format!("{}.{}.svc.{}", key.name, key.namespace, settings.cluster_domain)
}

/// The resource's name of a service.
pub fn name(key: &Key, settings: &Settings) -> String {
    format!("{}/{}", key.namespace, hostname(key, settings))
}

/// Whether the mesh carries it: an alias for a name outside is DNS's own matter.
pub fn is_carried(service: &Service) -> bool {
    service.spec.r#type != "ExternalName"
}

pub fn tcp_ports(service: &Service) -> impl Iterator<Item = &ServicePort> {
    let tcp = |port: &&ServicePort| matches!(port.protocol.as_str(), "" | "TCP");
    service.spec.ports.iter().filter(tcp)
}

/// Refuses what cannot be carried; says which addresses the service holds.
pub fn check(service: &Service) -> Result<Vec<Claim>, String> {
    let spec = &service.spec;
    for (field, value, known) in [
        (
            "type",
            &spec.r#type,
            &["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"][..],
        ),
        ("sessionAffinity", &spec.session_affinity, &["None", "ClientIP"]),
        (
            "internalTrafficPolicy",
            &spec.internal_traffic_policy,
            &["Cluster", "Local"],
        ),
        (
            "trafficDistribution",
            &spec.traffic_distribution,
            &["PreferClose", "PreferSameZone", "PreferSameNode"],
        ),
    ] {
        if !value.is_empty() && !known.contains(&value.as_str()) {
            return Err(format!(
                "spec.{field}: {value:?} is not known; it is one of {}",
                known.join(", ")
            ));
        }
    }
    for port in &spec.ports {
        if !matches!(port.protocol.as_str(), "" | "TCP" | "UDP" | "SCTP") {
            return Err(format!(
                "spec.ports: protocol {:?} is none of TCP, UDP, SCTP",
                port.protocol
            ));
        }
        if port.port == 0 || port.target_port == Some(PortRef::Number(0)) {
            return Err(format!(
                "spec.ports: port {:?} is 0; a port is from 1 to 65535",
                port.name
            ));
        }
    }
    let mut numbers: Vec<u16> = tcp_ports(service).map(|port| port.port).collect();
    numbers.sort_unstable();
    if let Some(twice) = numbers.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(format!(
            "spec.ports: TCP port {} is there twice; remove one",
            twice[0]
        ));
    }
    if let Some(seconds) = affinity(service)
        && !(1..=MAX_AFFINITY_SECONDS).contains(&seconds)
    {
        return Err(format!(
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds: {seconds} is not from 1 to {MAX_AFFINITY_SECONDS}"
        ));
    }
    if !is_carried(service) {
        return Ok(vec![]);
    }
    Ok(vips(service)?.into_iter().map(Claim::Address).collect())
}

fn affinity(service: &Service) -> Option<u32> {
    (service.spec.session_affinity == "ClientIP").then(|| {
        let configured = service.spec.session_affinity_config.as_ref();
        let seconds = configured.and_then(|one| one.client_ip.as_ref()?.timeout_seconds);
        seconds.unwrap_or(AFFINITY_SECONDS)
    })
}

fn vips(service: &Service) -> Result<Vec<IpAddr>, String> {
    let spec = &service.spec;
    let mut ips = vec![];
    for text in spec.cluster_ips.iter().chain([&spec.cluster_ip]) {
        if text.is_empty() || text == "None" {
            continue;
        }
        let ip = text.parse().map_err(|_| {
            format!("spec.clusterIPs: {text:?} is no address; write an IPv4 or IPv6 address, or None")
        })?;
        if !ips.contains(&ip) {
            ips.push(ip);
        }
    }
    Ok(ips)
}

/// The resource of a service.
pub fn resource(key: &Key, service: &Service, settings: &Settings) -> Resource {
    let vips = vips(service).unwrap_or_default();
    let options = mesh::ServiceOptions {
        client_ip_affinity_seconds: affinity(service).unwrap_or_default(),
        use_terminating: true,
        port_names: tcp_ports(service)
            .filter(|port| !port.name.is_empty())
            .map(|port| mesh::PortName {
                service_port: port.port.into(),
                name: port.name.clone(),
            })
            .collect(),
    };
    let message = wire::Service {
        name: key.name.clone(),
        namespace: key.namespace.clone(),
        hostname: hostname(key, settings),
        addresses: vips
            .iter()
            .map(|ip| wire::NetworkAddress {
                network: String::new(),
                address: octets(*ip),
                length: None,
            })
            .collect(),
        ports: tcp_ports(service)
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
        ip_families: families(service).into(),
        canonical: true,
        extensions: super::extension("culvert.dev/service", "culvert.mesh.v1.ServiceOptions", &options),
        ..wire::Service::default()
    };
    let about = About::Service {
        aliases: vips.iter().map(|ip| format!("/{ip}").into()).collect(),
        is_range: false,
    };
    encode(name(key, settings).into(), message, about)
}

fn encode(name: Name, message: wire::Service, about: About) -> Resource {
    let message = wire::Address {
        r#type: Some(wire::address::Type::Service(message)),
    };
    Resource::new(name, message.encode_to_vec(), about)
}

fn families(service: &Service) -> wire::IpFamilies {
    let families: Vec<&str> = service.spec.ip_families.iter().map(String::as_str).collect();
    match families.as_slice() {
        ["IPv4"] => wire::IpFamilies::Ipv4Only,
        ["IPv6"] => wire::IpFamilies::Ipv6Only,
        [_, _] => wire::IpFamilies::Dual,
        _ => wire::IpFamilies::Automatic,
    }
}

fn balancing(service: &Service) -> wire::LoadBalancing {
    use wire::load_balancing::{HealthPolicy, Mode, Scope};
    let spec = &service.spec;
    let zone = [Scope::Network, Scope::Region, Scope::Zone];
    let node = [
        Scope::Network,
        Scope::Region,
        Scope::Zone,
        Scope::Subzone,
        Scope::Node,
    ];
    let (mode, preference): (Mode, &[Scope]) = if spec.internal_traffic_policy == "Local" {
        (Mode::Strict, &[Scope::Node])
    } else {
        match spec.traffic_distribution.as_str() {
            "PreferClose" | "PreferSameZone" => (Mode::Failover, &zone),
            "PreferSameNode" => (Mode::Failover, &node),
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

/// Refuses what cannot be carried; says which ranges and names the declaration holds.
pub fn check_external(
    key: &Key,
    external: &ExternalService,
    settings: &Settings,
) -> Result<Vec<Claim>, String> {
    let spec = &external.spec;
    let domain = settings.cluster_domain.to_ascii_lowercase();
    let mut claims = vec![];
    for host in &spec.hosts {
        let lower = host.to_ascii_lowercase();
        if lower == domain || lower.ends_with(&format!(".{domain}")) {
            return Err(format!(
                "spec.hosts: {host:?} is a name of the cluster's own domain, which Services have; name what is outside"
            ));
        }
        claims.push(Claim::Host {
            namespace: key.namespace.clone(),
            host: lower,
        });
    }
    for net in ranges(external)? {
        if let Some(own) = settings
            .mesh_ranges
            .iter()
            .find(|own| own.contains(&net) || net.contains(*own))
        {
            return Err(format!(
                "spec.cidrs: {:?} overlaps the mesh's own range {own}; traffic inside of the mesh is never passed through",
                net.to_string()
            ));
        }
        claims.push(Claim::Range {
            namespace: key.namespace.clone(),
            net,
        });
    }
    Ok(claims)
}

fn ranges(external: &ExternalService) -> Result<Vec<IpNet>, String> {
    let spec = &external.spec;
    if spec.hosts.is_empty() && spec.cidrs.is_empty() {
        return Err("spec has neither hosts nor cidrs; name what is declared".to_owned());
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
            net.map(|net| net.trunc()).map_err(|_| {
                format!("spec.cidrs: {text:?} is no address or CIDR; write 192.0.2.1 or 192.0.2.0/24")
            })
        })
        .collect()
}

fn external_host<'e>(key: &'e Key, external: &'e ExternalService) -> &'e str {
    external.spec.hosts.first().unwrap_or(&key.name)
}

pub fn external_name(key: &Key, external: &ExternalService) -> String {
    format!("{}/{}", key.namespace, external_host(key, external))
}

/// The resource of a declared destination.
pub fn external(key: &Key, external: &ExternalService) -> Resource {
    let ranges = ranges(external).unwrap_or_default();
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
        hostname: external_host(key, external).to_owned(),
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
    let about = About::Service {
        aliases: [].into(),
        is_range: true,
    };
    encode(external_name(key, external).into(), message, about)
}
