//! Discovery's messages become the mesh model, checked; generated types stop here.
//!
//! Invariant: a resource is taken whole or refused by name. A policy that cannot be read whole is still
//! installed, as one that denies.

use super::walker::{self, unknown_field};
use culvert_core::{
    ids::{IdError, NetworkAddress, NetworkId, PolicyKey, ServiceKey, SpiffeId, TrustDomain},
    mesh::{
        Balancing, EgressMode, Gateway, GatewayDestination, Health, IpFamilies, Locality, LocalityMode,
        LocalityScope, MeshConfig, PortMap, Protocol, Service, Visibility, Workload, WorkloadKind,
    },
    policy::{AccountMatch, Action, Clause, Match, Policy, Rule, Scope, StringMatch},
    snapshot::Change,
};
use culvert_proto::{mesh as own, security, type_url, workload as wire};
use ipnet::IpNet;
use prost::Message;
use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
    sync::Arc,
};

/// Types in the order in which they are asked for: settings and policies before what names them.
pub(super) const TYPES: [&str; 4] = [
    type_url::MESH_CONFIG,
    type_url::AUTHORIZATION,
    type_url::OUTBOUND_POLICY,
    type_url::ADDRESS,
];

/// Why a resource is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    #[error("not the message that its type says: {0}")]
    Malformed(String),
    #[error("{field}: {reason}")]
    Field { field: &'static str, reason: String },
    #[error(transparent)]
    Id(#[from] IdError),
    #[error("under that name comes {0:?}")]
    Name(String),
    #[error("type {0} is not one of ours")]
    Type(String),
}

fn field(field: &'static str, reason: impl ToString) -> DecodeError {
    DecodeError::Field {
        field,
        reason: reason.to_string(),
    }
}

fn message<M: Message + Default>(bytes: &[u8]) -> Result<M, DecodeError> {
    M::decode(bytes).map_err(|error| DecodeError::Malformed(error.to_string()))
}

/// Reads one resource of an ADS stream.
pub fn decode(type_url: &str, bytes: &[u8]) -> Result<Change, DecodeError> {
    decode_sharing(type_url, bytes, &mut Shared::default())
}

/// Reads one resource, whose strings share memory with those of others that `shared` has seen.
pub fn decode_sharing(type_url: &str, bytes: &[u8], shared: &mut Shared) -> Result<Change, DecodeError> {
    match type_url {
        type_url::ADDRESS => match message::<wire::Address>(bytes)?.r#type {
            Some(wire::address::Type::Workload(one)) => {
                Ok(Change::Workload(Box::new(workload(one, shared)?)))
            }
            Some(wire::address::Type::Service(one)) => Ok(Change::Service(Box::new(service(one)?))),
            None => Err(field("type", "neither a workload nor a service")),
        },
        type_url::AUTHORIZATION => Ok(Change::Policy(Box::new(authorization(bytes)?))),
        type_url::OUTBOUND_POLICY => Ok(Change::OutboundPolicy(Box::new(outbound(bytes)?))),
        type_url::MESH_CONFIG => Ok(Change::Config(Box::new(config(message(bytes)?)?))),
        other => Err(DecodeError::Type(other.to_owned())),
    }
}

pub(super) fn address(name: &'static str, bytes: &[u8]) -> Result<IpAddr, DecodeError> {
    if let Ok(four) = <[u8; 4]>::try_from(bytes) {
        return Ok(Ipv4Addr::from(four).into());
    }
    <[u8; 16]>::try_from(bytes)
        .map(|sixteen| Ipv6Addr::from(sixteen).into())
        .map_err(|_| {
            field(
                name,
                format!("{} bytes, where an address has 4 or 16", bytes.len()),
            )
        })
}

fn net(name: &'static str, bytes: &[u8], length: u32) -> Result<IpNet, DecodeError> {
    let ip = address(name, bytes)?;
    u8::try_from(length)
        .ok()
        .and_then(|length| IpNet::new(ip, length).ok())
        .map(|net| net.trunc())
        .ok_or_else(|| field(name, format!("prefix length {length} does not fit {ip}")))
}

fn port(name: &'static str, number: u32) -> Result<u16, DecodeError> {
    match u16::try_from(number) {
        Ok(port) if port != 0 => Ok(port),
        _ => Err(field(name, format!("{number} is not a port"))),
    }
}

fn ports(ports: &[wire::Port]) -> Result<Box<[PortMap]>, DecodeError> {
    ports
        .iter()
        .map(|one| {
            let target = if one.target_port == 0 {
                None
            } else {
                Some(port("target_port", one.target_port)?)
            };
            Ok(PortMap {
                service_port: port("service_port", one.service_port)?,
                target,
            })
        })
        .collect()
}

fn gateway(one: wire::GatewayAddress) -> Result<Gateway, DecodeError> {
    use wire::gateway_address::Destination;
    let destination = match one.destination {
        Some(Destination::Hostname(name)) => {
            GatewayDestination::Service(format!("{}/{}", name.namespace, name.hostname).parse()?)
        }
        Some(Destination::Address(at)) => GatewayDestination::Address(NetworkAddress {
            network: NetworkId::from(at.network),
            ip: address("waypoint.address", &at.address)?,
        }),
        None => return Err(field("waypoint", "no destination")),
    };
    Ok(Gateway {
        destination,
        hbone_port: port("waypoint.hbone_mtls_port", one.hbone_mtls_port)?,
    })
}

fn extension<M: Message + Default>(all: &[wire::Extension], name: &str) -> Result<M, DecodeError> {
    match all
        .iter()
        .find(|one| one.name == name)
        .and_then(|one| one.config.as_ref())
    {
        Some(config) => message(&config.value),
        None => Ok(M::default()),
    }
}

fn workload(one: wire::Workload, shared: &mut Shared) -> Result<Workload, DecodeError> {
    fn or<'t>(text: &'t str, default: &'t str) -> &'t str {
        if text.is_empty() { default } else { text }
    }
    let extra: own::WorkloadOptions = extension(&one.extensions, "culvert.dev/workload")?;
    if one.uid.is_empty() {
        return Err(field("uid", "empty"));
    }
    let service_account = shared.text(or(&one.service_account, "default"));
    let identity = if extra.spiffe_id.is_empty() {
        let trust_domain: TrustDomain = or(&one.trust_domain, "cluster.local").parse()?;
        let id = SpiffeId::template(&trust_domain, &one.namespace, &service_account);
        shared.identity(&id)?
    } else {
        shared.identity(&extra.spiffe_id)?
    };
    let protocol = match wire::TunnelProtocol::try_from(one.tunnel_protocol) {
        Ok(wire::TunnelProtocol::NoTunnel) => Protocol::Tcp,
        Ok(wire::TunnelProtocol::Hbone) => Protocol::Hbone,
        other => return Err(field("tunnel_protocol", format!("{other:?} is not spoken"))),
    };
    let health = match wire::WorkloadStatus::try_from(one.status) {
        _ if extra.terminating => Health::Terminating,
        Ok(wire::WorkloadStatus::Healthy) => Health::Ready,
        Ok(wire::WorkloadStatus::Unhealthy) | Err(_) => Health::Unhealthy,
    };
    let keys = |names: Vec<String>| {
        names
            .iter()
            .map(|name| name.parse())
            .collect::<Result<Box<[_]>, _>>()
    };
    let locality = one.locality.unwrap_or_default();
    Ok(Workload {
        uid: one.uid.into(),
        name: one.name.into(),
        namespace: shared.text(&one.namespace),
        service_account,
        identity,
        addresses: one
            .addresses
            .iter()
            .map(|bytes| address("addresses", bytes))
            .collect::<Result<_, _>>()?,
        network: shared.text(&one.network).into(),
        hostname: shared.text(&extra.hostname),
        protocol,
        node: shared.text(&one.node),
        cluster: shared.text(or(&one.cluster_id, "Kubernetes")),
        locality: Locality {
            region: shared.text(&locality.region),
            zone: shared.text(&locality.zone),
            subzone: shared.text(&locality.subzone),
        },
        services: one
            .services
            .into_iter()
            .map(|(key, list)| Ok((shared.service(&key)?, ports(&list.ports)?)))
            .collect::<Result<_, DecodeError>>()?,
        policies: keys(one.authorization_policies)?,
        outbound_policies: keys(extra.outbound_policies)?,
        health,
        capacity: one.capacity.unwrap_or(1),
        waypoint: one.waypoint.map(gateway).transpose()?,
        host_network: one.network_mode == i32::from(wire::NetworkMode::HostNetwork),
        refuses_plaintext: extra.plaintext_refused,
        canonical_name: shared.text(&one.canonical_name),
        canonical_revision: shared.text(&one.canonical_revision),
        workload_name: shared.text(&one.workload_name),
        kind: match wire::WorkloadType::try_from(one.workload_type) {
            Ok(wire::WorkloadType::Cronjob) => WorkloadKind::CronJob,
            Ok(wire::WorkloadType::Pod) => WorkloadKind::Pod,
            Ok(wire::WorkloadType::Job) => WorkloadKind::Job,
            Ok(wire::WorkloadType::Deployment) | Err(_) => WorkloadKind::Deployment,
        },
    })
}

/// What workloads have in common, kept once: of a hundred thousand of them most strings are the same few.
#[derive(Debug, Default)]
pub struct Shared {
    texts: HashSet<Arc<str>>,
    identities: HashMap<Box<str>, SpiffeId>,
    services: HashMap<Box<str>, ServiceKey>,
}

impl Shared {
    /// Most of a kind that are remembered. Beyond it all are forgotten, which costs sharing and nothing else.
    const MOST: usize = 1 << 16;

    fn text(&mut self, text: &str) -> Arc<str> {
        if let Some(known) = self.texts.get(text) {
            return known.clone();
        }
        if self.texts.len() >= Self::MOST {
            self.texts.clear();
        }
        let new: Arc<str> = text.into();
        self.texts.insert(new.clone());
        new
    }

    fn identity(&mut self, text: &str) -> Result<SpiffeId, IdError> {
        known_or_parsed(&mut self.identities, text)
    }

    fn service(&mut self, text: &str) -> Result<ServiceKey, IdError> {
        known_or_parsed(&mut self.services, text)
    }
}

fn known_or_parsed<T>(known: &mut HashMap<Box<str>, T>, text: &str) -> Result<T, IdError>
where
    T: Clone + FromStr<Err = IdError>,
{
    if let Some(known) = known.get(text) {
        return Ok(known.clone());
    }
    if known.len() >= Shared::MOST {
        known.clear();
    }
    let new: T = text.parse()?;
    known.insert(text.into(), new.clone());
    Ok(new)
}

fn service(one: wire::Service) -> Result<Service, DecodeError> {
    let extra: own::ServiceOptions = extension(&one.extensions, "culvert.dev/service")?;
    let external = one
        .extensions
        .iter()
        .any(|extension| extension.name == "culvert.dev/external");
    let mut vips = vec![];
    let mut ranges = vec![];
    for at in &one.addresses {
        match at.length {
            Some(length) => ranges.push(net("addresses", &at.address, length)?),
            None => vips.push(NetworkAddress {
                network: NetworkId::from(at.network.as_str()),
                ip: address("addresses", &at.address)?,
            }),
        }
    }
    Ok(Service {
        key: format!("{}/{}", one.namespace, one.hostname.to_ascii_lowercase()).parse()?,
        name: one.name.into(),
        vips: vips.into(),
        ranges: ranges.into(),
        ports: ports(&one.ports)?,
        port_names: extra
            .port_names
            .iter()
            .map(|named| {
                Ok((
                    named.name.to_ascii_lowercase().into(),
                    port("port_names", named.service_port)?,
                ))
            })
            .collect::<Result<_, DecodeError>>()?,
        subject_alt_names: one
            .subject_alt_names
            .iter()
            .map(|id| id.parse())
            .collect::<Result<_, _>>()?,
        waypoint: one.waypoint.map(gateway).transpose()?,
        balancing: balancing(one.load_balancing.unwrap_or_default(), &extra)?,
        families: match wire::IpFamilies::try_from(one.ip_families) {
            Ok(wire::IpFamilies::Automatic) => IpFamilies::Automatic,
            Ok(wire::IpFamilies::Ipv4Only) => IpFamilies::V4,
            Ok(wire::IpFamilies::Ipv6Only) => IpFamilies::V6,
            Ok(wire::IpFamilies::Dual) => IpFamilies::Dual,
            Err(_) => return Err(field("ip_families", "unknown value")),
        },
        canonical: one.canonical,
        // An unknown visibility is the narrow one.
        visibility: match wire::Visibility::try_from(one.visibility) {
            Ok(wire::Visibility::Public) => Visibility::Public,
            Ok(wire::Visibility::Namespace) | Err(_) => Visibility::Namespace,
        },
        external,
    })
}

fn balancing(one: wire::LoadBalancing, extra: &own::ServiceOptions) -> Result<Balancing, DecodeError> {
    use wire::load_balancing::{HealthPolicy, Mode, Scope};
    let preferences = one
        .routing_preference
        .iter()
        .map(|scope| match Scope::try_from(*scope) {
            Ok(Scope::Region) => Ok(LocalityScope::Region),
            Ok(Scope::Zone) => Ok(LocalityScope::Zone),
            Ok(Scope::Subzone) => Ok(LocalityScope::Subzone),
            Ok(Scope::Node) => Ok(LocalityScope::Node),
            Ok(Scope::Cluster) => Ok(LocalityScope::Cluster),
            Ok(Scope::Network) => Ok(LocalityScope::Network),
            Ok(Scope::UnspecifiedScope) | Err(_) => Err(field("routing_preference", "unknown value")),
        })
        .collect::<Result<_, _>>()?;
    Ok(Balancing {
        mode: match Mode::try_from(one.mode) {
            Ok(Mode::UnspecifiedMode) => LocalityMode::Any,
            Ok(Mode::Strict) => LocalityMode::Strict,
            Ok(Mode::Failover) => LocalityMode::Failover,
            Ok(Mode::Passthrough) => LocalityMode::Passthrough,
            Err(_) => return Err(field("load_balancing.mode", "unknown value")),
        },
        preferences,
        use_unready: one.health_policy == i32::from(HealthPolicy::AllowAll),
        use_terminating: extra.use_terminating,
        client_ip_affinity_seconds: Some(extra.client_ip_affinity_seconds).filter(|seconds| *seconds != 0),
    })
}

fn config(one: own::MeshConfig) -> Result<MeshConfig, DecodeError> {
    Ok(MeshConfig {
        trust_domain: one.trust_domain.parse()?,
        cluster_domain: one.cluster_domain.to_ascii_lowercase().into(),
        ranges: one
            .mesh_ranges
            .iter()
            .map(|range| net("mesh_ranges", &range.address, range.length))
            .collect::<Result<_, _>>()?,
        egress: match own::EgressMode::try_from(one.egress) {
            Ok(own::EgressMode::AllowAny) => EgressMode::Allow,
            Ok(own::EgressMode::RegistryOnly) => EgressMode::RegistryOnly,
            Ok(own::EgressMode::DenyAll) => EgressMode::Deny,
            Err(_) => return Err(field("egress", "unknown value")),
        },
        resolvers: one
            .resolvers
            .iter()
            .map(|bytes| address("resolvers", bytes))
            .collect::<Result<_, _>>()?,
        network: NetworkId::from(one.network),
        federated: one
            .federated
            .into_iter()
            .map(|other| Ok((other.trust_domain.parse()?, other.roots_pem.into())))
            .collect::<Result<_, DecodeError>>()?,
        close_at_expiry: one.close_at_expiry,
    })
}

/// A policy that denies, because it could not be read whole.
fn defective(key: PolicyKey, scope: Scope, why: &str) -> Policy {
    Policy {
        key,
        scope,
        action: Action::Deny,
        rules: [].into(),
        dry_run: false,
        defect: Some(why.into()),
    }
}

fn scope(number: i32) -> Result<Scope, DecodeError> {
    match security::Scope::try_from(number) {
        Ok(security::Scope::Global) => Ok(Scope::Global),
        Ok(security::Scope::Namespace) => Ok(Scope::Namespace),
        Ok(security::Scope::WorkloadSelector) => Ok(Scope::Workload),
        Err(_) => Err(field("scope", "unknown value")),
    }
}

fn action(number: i32) -> Result<Action, DecodeError> {
    match security::Action::try_from(number) {
        Ok(security::Action::Allow) => Ok(Action::Allow),
        Ok(security::Action::Deny) => Ok(Action::Deny),
        Err(_) => Err(field("action", "unknown value")),
    }
}

fn authorization(bytes: &[u8]) -> Result<Policy, DecodeError> {
    let one: security::Authorization = message(bytes)?;
    let key: PolicyKey = format!("{}/{}", one.namespace, one.name).parse()?;
    // A scope that is not known is the widest: what it was meant for stays denied.
    let scope = scope(one.scope).unwrap_or(Scope::Global);
    if let Some(why) = unknown_field(bytes, walker::AUTHORIZATION) {
        return Ok(defective(key, scope, &why));
    }
    let read = || -> Result<(Action, Box<[Rule]>), DecodeError> {
        self::scope(one.scope)?;
        Ok((
            action(one.action)?,
            one.rules.iter().map(rule).collect::<Result<_, _>>()?,
        ))
    };
    match read() {
        Ok((action, rules)) => Ok(Policy {
            key,
            scope,
            action,
            rules,
            dry_run: one.dry_run,
            defect: None,
        }),
        Err(why) => Ok(defective(key, scope, &why.to_string())),
    }
}

fn rule(one: &security::Rule) -> Result<Rule, DecodeError> {
    let clause = |clause: &security::Clause| {
        Ok(Clause {
            matches: clause.matches.iter().map(one_match).collect::<Result<_, _>>()?,
        })
    };
    Ok(Rule {
        clauses: one
            .clauses
            .iter()
            .map(clause)
            .collect::<Result<_, DecodeError>>()?,
    })
}

fn texts(all: &[security::StringMatch]) -> Result<Box<[StringMatch]>, DecodeError> {
    use security::string_match::MatchType;
    all.iter()
        .map(|one| match &one.match_type {
            Some(MatchType::Exact(text)) => Ok(StringMatch::Exact(text.as_str().into())),
            Some(MatchType::Prefix(text)) => Ok(StringMatch::Prefix(text.as_str().into())),
            Some(MatchType::Suffix(text)) => Ok(StringMatch::Suffix(text.as_str().into())),
            Some(MatchType::Presence(())) => Ok(StringMatch::Presence),
            None => Err(field("match_type", "unknown kind of comparison")),
        })
        .collect()
}

fn nets(name: &'static str, all: &[security::Address]) -> Result<Box<[IpNet]>, DecodeError> {
    all.iter()
        .map(|one| net(name, &one.address, one.length))
        .collect()
}

fn port_list(name: &'static str, all: &[u32]) -> Result<Box<[u16]>, DecodeError> {
    all.iter().map(|number| port(name, *number)).collect()
}

fn accounts(all: &[security::ServiceAccountMatch]) -> Box<[AccountMatch]> {
    all.iter()
        .map(|one| AccountMatch {
            namespace: one.namespace.as_str().into(),
            service_account: one.service_account.as_str().into(),
        })
        .collect()
}

fn one_match(one: &security::Match) -> Result<Match, DecodeError> {
    Ok(Match {
        namespaces: texts(&one.namespaces)?,
        not_namespaces: texts(&one.not_namespaces)?,
        principals: texts(&one.principals)?,
        not_principals: texts(&one.not_principals)?,
        source_ips: nets("source_ips", &one.source_ips)?,
        not_source_ips: nets("not_source_ips", &one.not_source_ips)?,
        destination_ips: nets("destination_ips", &one.destination_ips)?,
        not_destination_ips: nets("not_destination_ips", &one.not_destination_ips)?,
        destination_ports: port_list("destination_ports", &one.destination_ports)?,
        not_destination_ports: port_list("not_destination_ports", &one.not_destination_ports)?,
        service_accounts: accounts(&one.service_accounts),
        not_service_accounts: accounts(&one.not_service_accounts),
    })
}

/// An outbound rule is one match whose peer is the destination.
fn outbound(bytes: &[u8]) -> Result<Policy, DecodeError> {
    let one: own::OutboundPolicy = message(bytes)?;
    let key: PolicyKey = format!("{}/{}", one.namespace, one.name).parse()?;
    let scope = scope(one.scope).unwrap_or(Scope::Global);
    if let Some(why) = unknown_field(bytes, walker::OUTBOUND_POLICY) {
        return Ok(defective(key, scope, &why));
    }
    let rule = |rule: &own::OutboundRule| {
        let one = Match {
            namespaces: texts(&rule.namespaces)?,
            not_namespaces: texts(&rule.not_namespaces)?,
            principals: texts(&rule.principals)?,
            not_principals: texts(&rule.not_principals)?,
            destination_ips: nets("ips", &rule.ips)?,
            not_destination_ips: nets("not_ips", &rule.not_ips)?,
            destination_ports: port_list("ports", &rule.ports)?,
            not_destination_ports: port_list("not_ports", &rule.not_ports)?,
            ..Match::default()
        };
        // A rule without any field means any destination.
        let clauses: Box<[Clause]> = if one == Match::default() {
            [].into()
        } else {
            [Clause {
                matches: [one].into(),
            }]
            .into()
        };
        Ok(Rule { clauses })
    };
    let read = || -> Result<(Action, Box<[Rule]>), DecodeError> {
        self::scope(one.scope)?;
        Ok((
            action(one.action)?,
            one.rules.iter().map(rule).collect::<Result<_, DecodeError>>()?,
        ))
    };
    match read() {
        Ok((action, rules)) => Ok(Policy {
            key,
            scope,
            action,
            rules,
            dry_run: one.dry_run,
            defect: None,
        }),
        Err(why) => Ok(defective(key, scope, &why.to_string())),
    }
}
