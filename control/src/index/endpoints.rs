//! EndpointSlices: endpoints of a Service that are listed instead of selected.
//!
//! ```text
//! Service + its slices ──listed──▶ address ▶ ports, conditions ──▶ a pod's or workload's own resource gains the
//!                                                                  service, or the address has a resource itself
//! ```
//! Invariant: what is listed is reached through its Service alone. A slice gives no address a meaning of its own,
//! so it cannot draw traffic that others send there.

use super::{
    Place, extension, octets, services,
    world::{About, Resource},
};
use crate::watch::objects::{EndpointSlice, Key, SERVICE_NAME, Service};
use culvert_proto::{mesh, workload as wire};
use prost::Message;
use std::{collections::BTreeMap, net::IpAddr};

/// One address that slices list for a service.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Listed {
    pub ready: bool,
    /// Being deleted, still serving.
    pub terminating: bool,
    pub ports: Vec<wire::Port>,
    pub node: String,
    zone: String,
    hostname: String,
}

/// The service of a slice.
pub fn service_of(key: &Key, slice: &EndpointSlice) -> Option<Key> {
    let name = slice.metadata.labels.get(SERVICE_NAME)?;
    Some(Key {
        namespace: key.namespace.clone(),
        name: name.clone(),
    })
}

/// Refuses what cannot be carried.
pub fn check(slice: &EndpointSlice) -> Result<(), String> {
    if !slice.metadata.labels.contains_key(SERVICE_NAME) {
        return Err(format!(
            "metadata.labels: {SERVICE_NAME} is missing; it names the Service"
        ));
    }
    let v4 = match slice.address_type.as_str() {
        "IPv4" => true,
        "IPv6" => false,
        other => {
            return Err(format!(
                "addressType: {other:?} is neither IPv4 nor IPv6; declare names as an ExternalService"
            ));
        }
    };
    for text in slice.endpoints.iter().flat_map(|endpoint| &endpoint.addresses) {
        match text.parse::<IpAddr>() {
            Ok(ip) if ip.is_ipv4() != v4 => {
                return Err(format!(
                    "endpoints.addresses: {text:?} is not of {}",
                    slice.address_type
                ));
            }
            Ok(ip) if ip.is_loopback() || ip.is_unspecified() || ip.is_multicast() => {
                return Err(format!(
                    "endpoints.addresses: {text:?} is no address of an endpoint"
                ));
            }
            Ok(_) => {}
            Err(_) => {
                return Err(format!(
                    "endpoints.addresses: {text:?} is no address; write an {} address",
                    slice.address_type
                ));
            }
        }
    }
    for port in &slice.ports {
        if port.port == 0 {
            return Err("ports: port 0 is none; a port is from 1 to 65535".to_owned());
        }
    }
    Ok(())
}

pub fn addresses(slice: &EndpointSlice) -> impl Iterator<Item = IpAddr> {
    let all = slice.endpoints.iter().flat_map(|endpoint| &endpoint.addresses);
    all.filter_map(|text| text.parse().ok())
}

/// What the slices list for a service, by address.
pub fn listed<'s>(
    service: &Service,
    slices: impl Iterator<Item = &'s EndpointSlice>,
) -> BTreeMap<IpAddr, Listed> {
    let mut all: BTreeMap<IpAddr, Listed> = BTreeMap::new();
    for slice in slices {
        let ports = ports(service, slice);
        for endpoint in &slice.endpoints {
            let conditions = endpoint.conditions;
            let ready = conditions.ready.unwrap_or(true);
            let serving = conditions.serving.unwrap_or(ready);
            for ip in endpoint.addresses.iter().filter_map(|text| text.parse().ok()) {
                let one = all.entry(ip).or_default();
                one.ready |= ready;
                one.terminating |= serving && conditions.terminating == Some(true);
                one.ports.extend(ports.iter().cloned());
                one.node = endpoint.node_name.clone().unwrap_or_default();
                one.zone = endpoint.zone.clone().unwrap_or_default();
                one.hostname = endpoint.hostname.clone().unwrap_or_default();
            }
        }
    }
    all
}

/// The service's ports, each where the slice has a port of the same name.
fn ports(service: &Service, slice: &EndpointSlice) -> Vec<wire::Port> {
    services::tcp_ports(service)
        .filter_map(|port| {
            let behind = slice.ports.iter().find(|behind| {
                behind.name.as_deref().unwrap_or_default() == port.name
                    && matches!(behind.protocol.as_deref(), None | Some("" | "TCP"))
            })?;
            Some(wire::Port {
                service_port: port.port.into(),
                target_port: behind.port.into(),
                app_protocol: 0,
            })
        })
        .collect()
}

/// The name of the resource of an address that no pod or workload has.
pub fn name(service: &Key, ip: IpAddr) -> String {
    format!(
        "{}/discovery.k8s.io/EndpointSlice/{}/{}/{ip}",
        super::CLUSTER,
        service.namespace,
        service.name
    )
}

/// The resource of an address that no pod or workload has.
pub fn resource(service: &Key, service_name: &str, ip: IpAddr, one: &Listed, place: &Place) -> Resource {
    let healthy = one.ready || one.terminating;
    let options = mesh::WorkloadOptions {
        terminating: one.terminating && !one.ready,
        hostname: one.hostname.clone(),
        ..mesh::WorkloadOptions::default()
    };
    let name = name(service, ip);
    let zone = if one.zone.is_empty() {
        &place.zone
    } else {
        &one.zone
    };
    let message = wire::Workload {
        uid: name.clone(),
        name: format!("{}-{ip}", service.name),
        namespace: service.namespace.clone(),
        addresses: vec![octets(ip).into()],
        node: one.node.clone(),
        canonical_name: service.name.clone(),
        workload_name: service.name.clone(),
        services: [(
            service_name.to_owned(),
            wire::PortList {
                ports: one.ports.clone(),
            },
        )]
        .into(),
        status: super::status(healthy),
        cluster_id: super::CLUSTER.to_owned(),
        // Found as an endpoint, never by its address.
        network_mode: wire::NetworkMode::HostNetwork.into(),
        locality: Some(wire::Locality {
            region: place.region.clone(),
            zone: zone.clone(),
            subzone: place.subzone.clone(),
        }),
        extensions: extension(
            "culvert.dev/workload",
            "culvert.mesh.v1.WorkloadOptions",
            &options,
        ),
        ..wire::Workload::default()
    };
    let about = About::Workload {
        // It is on no node of ours: no ztunnel serves it.
        node: "".into(),
        namespace: service.namespace.as_str().into(),
        aliases: [].into(),
        services: [service_name.into()].into(),
        policies: [].into(),
        own_tunnel: None,
    };
    let message = wire::Address {
        r#type: Some(wire::address::Type::Workload(message)),
    };
    Resource::new(name.into(), message.encode_to_vec(), about)
}
