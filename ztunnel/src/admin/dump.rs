//! What ztunnel knows and has open, as JSON with the keys that the field's command lines read.
//!
//! Invariant: keys (of certificates) and tokens are never in it.

use crate::{
    connections::{Connection, Way},
    context::Context,
    metrics::Reporter,
    pods::Pod,
};
use culvert_core::{
    ids::SpiffeId,
    mesh::{Gateway, GatewayDestination, Health, LocalityMode, Protocol, Service, Workload, WorkloadKind},
    policy::{Clause, Match, Policy, StringMatch},
    snapshot::{PolicySet, Snapshot},
};
use culvert_io::identity::Credential;
use serde_json::{Map, Value, json};
use std::{sync::atomic::Ordering, time::SystemTime};

/// Everything that decisions depend on.
pub fn config(context: &Context) -> Value {
    let snapshot = context.discovery.snapshot();
    let certificates: Vec<Value> = context
        .identities
        .all()
        .iter()
        .map(|(id, held)| certificate(id, held.as_ref()))
        .collect();
    let pods = context.pods.all();
    let states: Map<String, Value> = pods
        .iter()
        .map(|pod| (pod.uid.to_string(), state(pod, &snapshot)))
        .collect();
    json!({
        "version": { "version": env!("CARGO_PKG_VERSION"), "component": "ztunnel" },
        "generation": snapshot.generation,
        "config": context.settings,
        "mesh": snapshot.config().map(|mesh| json!({
            "trustDomain": mesh.trust_domain.as_str(),
            "clusterDomain": &*mesh.cluster_domain,
            "network": mesh.network.as_str(),
            "egress": format!("{:?}", mesh.egress),
            "ranges": mesh.ranges.iter().map(ToString::to_string).collect::<Vec<_>>(),
            "resolvers": mesh.resolvers,
        })),
        "workloads": snapshot.workloads().map(|one| workload(one)).collect::<Vec<_>>(),
        "services": snapshot.services().map(|one| service(one, &snapshot)).collect::<Vec<_>>(),
        "policies": policies(&snapshot.inbound),
        "outboundPolicies": policies(&snapshot.outbound),
        "stagedServices": {},
        "staticConfig": {},
        "certificates": certificates,
        "workloadState": states,
    })
}

fn workload(workload: &Workload) -> Value {
    json!({
        "uid": workload.uid.as_str(),
        "name": &*workload.name,
        "namespace": &*workload.namespace,
        "serviceAccount": &*workload.service_account,
        "identity": workload.identity.as_str(),
        "trustDomain": workload.identity.trust_domain(),
        "workloadIps": workload.addresses,
        "workloadName": &*workload.workload_name,
        "workloadType": match workload.kind {
            WorkloadKind::Deployment => "deployment",
            WorkloadKind::CronJob => "cronjob",
            WorkloadKind::Pod => "pod",
            WorkloadKind::Job => "job",
        },
        "canonicalName": &*workload.canonical_name,
        "canonicalRevision": &*workload.canonical_revision,
        "protocol": match workload.protocol {
            Protocol::Hbone => "HBONE",
            Protocol::Tcp => "TCP",
        },
        "node": &*workload.node,
        "network": workload.network.as_str(),
        "clusterId": &*workload.cluster,
        "hostname": &*workload.hostname,
        "locality": {
            "region": &*workload.locality.region,
            "zone": &*workload.locality.zone,
            "subzone": &*workload.locality.subzone,
        },
        "status": match workload.health {
            Health::Ready => "Ready",
            Health::Terminating => "Terminating",
            Health::Unhealthy => "Unhealthy",
        },
        "capacity": workload.capacity,
        "waypoint": workload.waypoint.as_ref().map(gateway),
        "services": workload.services.iter().map(|(key, _)| key.as_str()).collect::<Vec<_>>(),
        "authorizationPolicies": workload.policies.iter().map(|key| key.as_str()).collect::<Vec<_>>(),
        "outboundPolicies": workload.outbound_policies.iter().map(|key| key.as_str()).collect::<Vec<_>>(),
    })
}

fn gateway(gateway: &Gateway) -> Value {
    let destination = match &gateway.destination {
        GatewayDestination::Service(key) => key.to_string(),
        GatewayDestination::Address(address) => address.resource_name(),
    };
    json!({ "destination": destination, "hboneMtlsPort": gateway.hbone_port })
}

fn service(service: &Service, snapshot: &Snapshot) -> Value {
    let ports: Map<String, Value> = service
        .ports
        .iter()
        .map(|map| (map.service_port.to_string(), json!(map.target)))
        .collect();
    let endpoints: Map<String, Value> = snapshot
        .endpoints(&service.key)
        .iter()
        .map(|endpoint| {
            let port: Map<String, Value> = service
                .ports
                .iter()
                .filter_map(|map| {
                    let target = endpoint.target_port(service, map.service_port)?;
                    Some((map.service_port.to_string(), json!(target)))
                })
                .collect();
            let value = json!({
                "workloadUid": endpoint.uid.as_str(), "service": service.key.as_str(), "port": port,
            });
            (endpoint.uid.to_string(), value)
        })
        .collect();
    json!({
        "name": &*service.name,
        "namespace": service.namespace(),
        "hostname": service.hostname(),
        "vips": service.vips.iter().map(|vip| vip.resource_name()).collect::<Vec<_>>(),
        "cidrVips": service.ranges.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "ports": ports,
        "endpoints": endpoints,
        "subjectAltNames": service.subject_alt_names.iter().map(SpiffeId::as_str).collect::<Vec<_>>(),
        "waypoint": service.waypoint.as_ref().map(gateway),
        "loadBalancer": {
            "mode": match service.balancing.mode {
                LocalityMode::Any => "Any",
                LocalityMode::Strict => "Strict",
                LocalityMode::Failover => "Failover",
                LocalityMode::Passthrough => "Passthrough",
            },
        },
        "canonical": service.canonical,
        "visibility": format!("{:?}", service.visibility),
        "external": service.external,
    })
}

fn policies(set: &PolicySet) -> Vec<Value> {
    set.iter().map(|one| policy(one)).collect()
}

fn policy(policy: &Policy) -> Value {
    let clause = |clause: &Clause| clause.matches.iter().map(conditions).collect::<Vec<_>>();
    let rules: Vec<Vec<Vec<Value>>> = policy
        .rules
        .iter()
        .map(|rule| rule.clauses.iter().map(clause).collect())
        .collect();
    json!({
        "name": policy.key.name(),
        "namespace": policy.key.namespace(),
        "scope": format!("{:?}", policy.scope),
        "action": format!("{:?}", policy.action),
        "dryRun": policy.dry_run,
        "defect": policy.defect,
        "rules": rules,
    })
}

fn conditions(one: &Match) -> Value {
    let text = |list: &[StringMatch]| {
        list.iter()
            .map(|want| match want {
                StringMatch::Exact(text) => json!({ "Exact": &**text }),
                StringMatch::Prefix(text) => json!({ "Prefix": &**text }),
                StringMatch::Suffix(text) => json!({ "Suffix": &**text }),
                StringMatch::Presence => json!({ "Presence": {} }),
            })
            .collect::<Vec<_>>()
    };
    let nets = |list: &[ipnet::IpNet]| list.iter().map(ToString::to_string).collect::<Vec<_>>();
    let accounts = |list: &[culvert_core::policy::AccountMatch]| {
        list.iter()
            .map(|account| format!("{}/{}", account.namespace, account.service_account))
            .collect::<Vec<_>>()
    };
    let all = json!({
        "namespaces": text(&one.namespaces),
        "notNamespaces": text(&one.not_namespaces),
        "principals": text(&one.principals),
        "notPrincipals": text(&one.not_principals),
        "serviceAccounts": accounts(&one.service_accounts),
        "notServiceAccounts": accounts(&one.not_service_accounts),
        "sourceIps": nets(&one.source_ips),
        "notSourceIps": nets(&one.not_source_ips),
        "destinationIps": nets(&one.destination_ips),
        "notDestinationIps": nets(&one.not_destination_ips),
        "destinationPorts": one.destination_ports,
        "notDestinationPorts": one.not_destination_ports,
    });
    match all {
        Value::Object(fields) => Value::Object(
            fields
                .into_iter()
                .filter(|(_, value)| value.as_array().is_none_or(|list| !list.is_empty()))
                .collect(),
        ),
        other => other,
    }
}

fn certificate(id: &SpiffeId, held: Option<&Credential>) -> Value {
    let chain: Vec<Value> = held
        .iter()
        .flat_map(|held| {
            held.svid.chain().iter().enumerate().map(|(index, der)| {
                let pem = base64(pem(der).as_bytes());
                if index == 0 {
                    json!({
                        "pem": pem,
                        "serialNumber": held.svid.serial(),
                        "validFrom": instant(held.svid.not_before()),
                        "expirationTime": instant(held.svid.not_after()),
                    })
                } else {
                    json!({ "pem": pem })
                }
            })
        })
        .collect();
    let roots = held.iter().flat_map(|held| held.roots());
    json!({
        "identity": id.as_str(),
        "state": if held.is_some() { "Available" } else { "Unavailable" },
        "certChain": chain,
        "rootCerts": roots.map(|der| json!({ "pem": base64(pem(&der).as_bytes()) })).collect::<Vec<_>>(),
    })
}

fn instant(time: SystemTime) -> String {
    let format = &time::format_description::well_known::Rfc3339;
    time::OffsetDateTime::from(time)
        .format(format)
        .unwrap_or_default()
}

fn pem(der: &[u8]) -> String {
    let text = base64(der);
    let mut pem = "-----BEGIN CERTIFICATE-----\n".to_owned();
    let mut rest = text.as_str();
    while !rest.is_empty() {
        let (line, after) = rest.split_at(rest.len().min(64));
        pem.push_str(line);
        pem.push('\n');
        rest = after;
    }
    pem.push_str("-----END CERTIFICATE-----\n");
    pem
}

fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let mut group = [0; 3];
        group[..chunk.len()].copy_from_slice(chunk);
        let bits = u32::from_be_bytes([0, group[0], group[1], group[2]]);
        for index in 0..4 {
            let six = ((bits >> (18 - 6 * index)) & 0x3f) as usize;
            text.push(if index <= chunk.len() {
                char::from(ALPHABET[six])
            } else {
                '='
            });
        }
    }
    text
}

fn state(pod: &Pod, snapshot: &Snapshot) -> Value {
    let mut inbound = vec![];
    let mut outbound = vec![];
    for connection in pod.connections.all() {
        let list = match connection.facts.way.reporter() {
            Reporter::Source => &mut outbound,
            Reporter::Destination => &mut inbound,
        };
        list.push(json!({
            "src": connection.facts.source.to_string(),
            "originalDst": connection.facts.destination.to_string(),
            "actualDst": connection.known.hbone_address.or(connection.known.destination_address)
                .map(|address| address.to_string()),
            "protocol": protocol(&connection),
        }));
    }
    let account = snapshot
        .workload(&pod.workload_uid)
        .map(|workload| workload.service_account.to_string());
    json!({
        "info": { "name": pod.name, "namespace": pod.namespace, "serviceAccount": account },
        "state": "Up",
        "connections": { "inbound": inbound, "outbound": outbound },
    })
}

fn protocol(connection: &Connection) -> &'static str {
    match connection.facts.way {
        Way::OutboundTunnel { .. } | Way::InboundTunnel { .. } => "HBONE",
        Way::OutboundDirect { .. } | Way::InboundPlaintext => "TCP",
    }
}

/// Pods and their open connections.
pub fn connections(context: &Context) -> Value {
    let pods: Vec<_> = context
        .pods
        .all()
        .iter()
        .map(|pod| {
            let open: Vec<_> = pod.connections.all().iter().map(|one| open(one)).collect();
            json!({
                "uid": pod.uid.as_str(),
                "name": pod.name,
                "namespace": pod.namespace,
                "addresses": pod.addresses,
                "tunnels": pod.tunnels.count(),
                "connections": open,
            })
        })
        .collect();
    json!({ "pods": pods })
}

fn open(connection: &Connection) -> Value {
    let known = &connection.known;
    json!({
        "direction": connection.facts.way.direction(),
        "src": connection.facts.source.to_string(),
        "dst": connection.facts.destination.to_string(),
        "peer": connection.facts.way.peer().map(|peer| peer.as_str()),
        "sourceIdentity": known.source_identity.as_ref().map(SpiffeId::as_str),
        "destinationIdentity": known.destination_identity.as_ref().map(SpiffeId::as_str),
        "service": known.service.as_ref().map(|service| service.key().hostname()),
        "traceId": known.trace.as_ref().map(|trace| trace.trace_id().to_string()),
        "protocol": protocol(connection),
        "bytesReceived": connection.flow.received.load(Ordering::Relaxed),
        "bytesSent": connection.flow.sent.load(Ordering::Relaxed),
        "ageSeconds": connection.opened.elapsed().as_secs(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_padded_as_everywhere() {
        for (bytes, want) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(base64(bytes.as_bytes()), want, "{bytes}");
        }
    }
}
