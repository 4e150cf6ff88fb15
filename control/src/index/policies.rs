//! Policies: what users write, and the profile's defaults, as `Authorization` resources.
//!
//! Invariant: nothing widens. A condition that this layer cannot judge makes an ALLOW rule never match and
//! is taken out of a DENY rule, which then denies more; what cannot be read is refused before it comes
//! here ([`check`]).

use super::{
    Settings, address,
    world::{About, INBOUND, OUTBOUND, Reach, Resource, Type},
};
use crate::watch::objects::{
    Action, AuthorizationPolicy, Direction, Key, MtlsMode, Operation, PeerAuthentication, Rule, Source, When,
};
use culvert_proto::{
    mesh, security,
    security::{Clause, Match, ServiceAccountMatch, StringMatch, string_match::MatchType},
};
use ipnet::IpNet;
use prost::Message;
use std::net::IpAddr;

/// A policy's type and resource.
pub fn resource(
    key: &Key,
    policy: &AuthorizationPolicy,
    settings: &Settings,
) -> Result<(Type, Resource), String> {
    let reach = match scope(key, policy, settings) {
        security::Scope::WorkloadSelector => Reach::Workloads,
        security::Scope::Namespace => Reach::Namespace,
        security::Scope::Global => Reach::Mesh,
    };
    Ok(match policy.spec.direction {
        Direction::Inbound => (INBOUND, encode(key, &inbound(key, policy, settings)?, reach)),
        Direction::Outbound => (OUTBOUND, encode(key, &outbound(key, policy, settings)?, reach)),
    })
}

fn encode(key: &Key, message: &impl Message, reach: Reach) -> Resource {
    let about = About::Policy {
        namespace: key.namespace.as_str().into(),
        reach,
    };
    Resource::new(key.to_string().into(), message.encode_to_vec(), about)
}

/// The resource of a PeerAuthentication with ports of its own; others need none.
pub fn of_ports(key: &Key, one: &PeerAuthentication) -> Option<Resource> {
    if one.spec.port_level_mtls.is_empty() {
        return None;
    }
    Some(encode(&peer_key(key), &port_level(key, one), Reach::Workloads))
}

/// The name of that resource.
pub fn peer_key(key: &Key) -> Key {
    Key {
        namespace: key.namespace.clone(),
        name: format!("peer-{}", key.name),
    }
}

/// The profile's defaults for the whole mesh.
pub fn mesh_defaults(settings: &Settings) -> Vec<Resource> {
    let root = &settings.root_namespace;
    let strict = default(
        root,
        "profile-strict",
        security::Action::Deny,
        vec![rule(vec![plaintext()])],
    );
    let nothing = default(root, "profile-nothing", security::Action::Allow, vec![]);
    strict.into_iter().chain(nothing).collect()
}

/// The profile's defaults for one namespace.
pub fn namespace_defaults(namespace: &str) -> [Resource; 2] {
    let own = Match {
        namespaces: vec![exact(namespace)],
        ..Match::default()
    };
    default(
        namespace,
        "profile-own-namespace",
        security::Action::Allow,
        vec![rule(vec![own])],
    )
}

/// A default and its dry-run twin.
fn default(
    namespace: &str,
    name: &str,
    action: security::Action,
    rules: Vec<security::Rule>,
) -> [Resource; 2] {
    [("", false), ("-dry-run", true)].map(|(suffix, dry_run)| {
        let key = Key {
            namespace: namespace.to_owned(),
            name: format!("{name}{suffix}"),
        };
        let message = security::Authorization {
            name: key.name.clone(),
            namespace: key.namespace.clone(),
            scope: security::Scope::WorkloadSelector.into(),
            action: action.into(),
            rules: rules.clone(),
            dry_run,
            extensions: vec![],
        };
        encode(&key, &message, Reach::Workloads)
    })
}

fn plaintext() -> Match {
    Match {
        not_principals: vec![StringMatch {
            match_type: Some(MatchType::Presence(())),
        }],
        ..Match::default()
    }
}

fn rule(matches: Vec<Match>) -> security::Rule {
    security::Rule {
        clauses: vec![Clause { matches }],
    }
}

fn exact(text: &str) -> StringMatch {
    StringMatch {
        match_type: Some(MatchType::Exact(text.to_owned())),
    }
}

/// A port-level override: strict ports refuse plaintext there; a strict workload refuses it everywhere but
/// on its exempt ports.
fn port_level(key: &Key, one: &PeerAuthentication) -> security::Authorization {
    let strict = one.spec.mtls.mode == MtlsMode::Strict || one.spec.mtls.mode == MtlsMode::Unset;
    let ports = |wanted: bool| {
        one.spec
            .port_level_mtls
            .iter()
            .filter(|(_, mtls)| (mtls.mode == MtlsMode::Strict) == wanted)
            .map(|(port, _)| u32::from(*port))
            .collect::<Vec<_>>()
    };
    let only = if strict {
        Match {
            not_destination_ports: ports(false),
            ..plaintext()
        }
    } else {
        Match {
            destination_ports: ports(true),
            ..plaintext()
        }
    };
    let nothing = !strict && only.destination_ports.is_empty();
    security::Authorization {
        name: peer_key(key).name,
        namespace: key.namespace.clone(),
        scope: security::Scope::WorkloadSelector.into(),
        action: security::Action::Deny.into(),
        rules: if nothing { vec![] } else { vec![rule(vec![only])] },
        dry_run: false,
        extensions: vec![],
    }
}

/// Refuses what cannot be converted, by name and with the remedy.
pub fn check(key: &Key, policy: &AuthorizationPolicy, settings: &Settings) -> Result<(), String> {
    reserved(key)?;
    resource(key, policy, settings).map(|_| ())
}

/// Names that the mesh's own policies have.
pub fn reserved(key: &Key) -> Result<(), String> {
    let taken = ["profile-", "peer-"]
        .iter()
        .any(|prefix| key.name.starts_with(prefix));
    if taken {
        return Err(format!(
            "metadata.name {:?}: names that begin with profile- or peer- are the mesh's own; choose another",
            key.name
        ));
    }
    Ok(())
}

fn scope(key: &Key, policy: &AuthorizationPolicy, settings: &Settings) -> security::Scope {
    match &policy.spec.selector {
        Some(_) => security::Scope::WorkloadSelector,
        None if key.namespace == settings.root_namespace => security::Scope::Global,
        None => security::Scope::Namespace,
    }
}

fn action(policy: &AuthorizationPolicy) -> i32 {
    match policy.spec.action {
        Action::Allow => security::Action::Allow,
        Action::Deny => security::Action::Deny,
    }
    .into()
}

fn inbound(
    key: &Key,
    policy: &AuthorizationPolicy,
    settings: &Settings,
) -> Result<security::Authorization, String> {
    let mut rules = vec![];
    for (index, one) in policy.spec.rules.iter().flatten().enumerate() {
        let at = |why: String| format!("spec.rules[{index}].{why}");
        if policy.spec.action == Action::Allow && needs_l7(one) {
            continue;
        }
        rules.push(inbound_rule(key, one).map_err(at)?);
    }
    Ok(security::Authorization {
        name: key.name.clone(),
        namespace: key.namespace.clone(),
        scope: scope(key, policy, settings).into(),
        action: action(policy),
        rules,
        dry_run: policy.spec.dry_run,
        extensions: vec![],
    })
}

/// Whether a rule has a condition that only a waypoint can judge.
fn needs_l7(rule: &Rule) -> bool {
    let source = |s: &Source| {
        [
            &s.request_principals,
            &s.not_request_principals,
            &s.remote_ip_blocks,
            &s.not_remote_ip_blocks,
        ]
        .iter()
        .any(|list| !list.is_empty())
    };
    let operation = |o: &Operation| {
        [
            &o.hosts,
            &o.not_hosts,
            &o.methods,
            &o.not_methods,
            &o.paths,
            &o.not_paths,
        ]
        .iter()
        .any(|list| !list.is_empty())
    };
    rule.from.iter().any(|from| source(&from.source))
        || rule.to.iter().any(|to| operation(&to.operation))
        || rule.when.iter().any(|when| !L4_KEYS.contains(&when.key.as_str()))
}

const L4_KEYS: [&str; 5] = [
    "source.ip",
    "source.namespace",
    "source.principal",
    "destination.ip",
    "destination.port",
];

/// Clauses in the order `to`, `from`, each `when`. A part of which nothing is left at L4 constrains
/// nothing: it is left out, and the DENY is wider for it.
fn inbound_rule(key: &Key, rule: &Rule) -> Result<security::Rule, String> {
    let mut clauses = vec![];
    let mut push = |matches: Vec<Match>| {
        if !matches.is_empty() && matches.iter().all(|one| *one != Match::default()) {
            clauses.push(Clause { matches });
        }
    };
    let to = rule
        .to
        .iter()
        .map(|to| to_match(&to.operation))
        .collect::<Result<_, _>>()
        .map_err(|why: String| format!("to.operation.{why}"))?;
    push(to);
    let from = rule
        .from
        .iter()
        .map(|from| source_match(key, &from.source))
        .collect::<Result<_, _>>()
        .map_err(|why: String| format!("from.source.{why}"))?;
    push(from);
    for when in rule
        .when
        .iter()
        .filter(|when| L4_KEYS.contains(&when.key.as_str()))
    {
        let one = when_match(when).map_err(|why| format!("when[{}]: {why}", when.key))?;
        push(vec![one]);
    }
    Ok(security::Rule { clauses })
}

fn to_match(operation: &Operation) -> Result<Match, String> {
    for (name, list) in [
        ("principals", &operation.principals),
        ("namespaces", &operation.namespaces),
        ("ipBlocks", &operation.ip_blocks),
    ] {
        if !list.is_empty() {
            return Err(format!(
                "{name} is for policies of direction: Outbound alone; here from.source says who may call"
            ));
        }
    }
    Ok(Match {
        destination_ports: ports("ports", &operation.ports)?,
        not_destination_ports: ports("notPorts", &operation.not_ports)?,
        ..Match::default()
    })
}

fn source_match(key: &Key, source: &Source) -> Result<Match, String> {
    Ok(Match {
        principals: texts("principals", &source.principals)?,
        not_principals: texts("notPrincipals", &source.not_principals)?,
        namespaces: texts("namespaces", &source.namespaces)?,
        not_namespaces: texts("notNamespaces", &source.not_namespaces)?,
        service_accounts: accounts("serviceAccounts", key, &source.service_accounts)?,
        not_service_accounts: accounts("notServiceAccounts", key, &source.not_service_accounts)?,
        source_ips: nets("ipBlocks", &source.ip_blocks)?,
        not_source_ips: nets("notIpBlocks", &source.not_ip_blocks)?,
        ..Match::default()
    })
}

fn when_match(when: &When) -> Result<Match, String> {
    if when.values.is_empty() && when.not_values.is_empty() {
        return Err("has neither values nor notValues; give one of them".to_owned());
    }
    let mut one = Match::default();
    match when.key.as_str() {
        "source.ip" => {
            one.source_ips = nets("values", &when.values)?;
            one.not_source_ips = nets("notValues", &when.not_values)?;
        }
        "source.namespace" => {
            one.namespaces = texts("values", &when.values)?;
            one.not_namespaces = texts("notValues", &when.not_values)?;
        }
        "source.principal" => {
            one.principals = texts("values", &when.values)?;
            one.not_principals = texts("notValues", &when.not_values)?;
        }
        "destination.ip" => {
            one.destination_ips = nets("values", &when.values)?;
            one.not_destination_ips = nets("notValues", &when.not_values)?;
        }
        _ => {
            one.destination_ports = ports("values", &when.values)?;
            one.not_destination_ports = ports("notValues", &when.not_values)?;
        }
    }
    Ok(one)
}

fn outbound(
    key: &Key,
    policy: &AuthorizationPolicy,
    settings: &Settings,
) -> Result<mesh::OutboundPolicy, String> {
    let mut rules = vec![];
    for (index, rule) in policy.spec.rules.iter().flatten().enumerate() {
        if !rule.from.is_empty() || !rule.when.is_empty() || needs_l7(rule) {
            return Err(format!(
                "spec.rules[{index}]: a rule of direction: Outbound has only to.operation with ports, principals, \
                 namespaces and ipBlocks; its sources are the pods that the policy selects"
            ));
        }
        let at = |why: String| format!("spec.rules[{index}].to.operation.{why}");
        if rule.to.is_empty() {
            rules.push(mesh::OutboundRule::default());
        }
        for to in &rule.to {
            rules.push(outbound_rule(&to.operation).map_err(at)?);
        }
    }
    Ok(mesh::OutboundPolicy {
        name: key.name.clone(),
        namespace: key.namespace.clone(),
        scope: scope(key, policy, settings).into(),
        action: action(policy),
        rules,
        dry_run: policy.spec.dry_run,
    })
}

fn outbound_rule(operation: &Operation) -> Result<mesh::OutboundRule, String> {
    Ok(mesh::OutboundRule {
        namespaces: texts("namespaces", &operation.namespaces)?,
        not_namespaces: texts("notNamespaces", &operation.not_namespaces)?,
        principals: texts("principals", &operation.principals)?,
        not_principals: texts("notPrincipals", &operation.not_principals)?,
        ips: nets("ipBlocks", &operation.ip_blocks)?,
        not_ips: nets("notIpBlocks", &operation.not_ip_blocks)?,
        ports: ports("ports", &operation.ports)?,
        not_ports: ports("notPorts", &operation.not_ports)?,
    })
}

/// `*` is any, `x*` a prefix, `*x` a suffix; a star elsewhere is refused rather than taken literally.
fn texts(field: &str, values: &[String]) -> Result<Vec<StringMatch>, String> {
    values
        .iter()
        .map(|value| {
            let kind = if value == "*" {
                MatchType::Presence(())
            } else if let Some(suffix) = value.strip_prefix('*') {
                MatchType::Suffix(suffix.to_owned())
            } else if let Some(prefix) = value.strip_suffix('*') {
                MatchType::Prefix(prefix.to_owned())
            } else {
                MatchType::Exact(value.strip_prefix("spiffe://").unwrap_or(value).to_owned())
            };
            let inner = match &kind {
                MatchType::Exact(text) | MatchType::Prefix(text) | MatchType::Suffix(text) => text.as_str(),
                MatchType::Presence(()) => "x",
            };
            if inner.is_empty() || inner.contains('*') {
                return Err(format!(
                    "{field}: {value:?}: a star stands alone, first or last; name what is in between"
                ));
            }
            Ok(StringMatch {
                match_type: Some(kind),
            })
        })
        .collect()
}

/// `name` in the policy's own namespace, or `namespace/name`.
fn accounts(field: &str, key: &Key, values: &[String]) -> Result<Vec<ServiceAccountMatch>, String> {
    values
        .iter()
        .map(|value| {
            let (namespace, name) = value.split_once('/').unwrap_or((&key.namespace, value));
            if namespace.is_empty() || name.is_empty() || name.contains('/') || value.contains('*') {
                return Err(format!(
                    "{field}: {value:?} is no service account: write name or namespace/name"
                ));
            }
            Ok(ServiceAccountMatch {
                namespace: namespace.to_owned(),
                service_account: name.to_owned(),
            })
        })
        .collect()
}

fn nets(field: &str, values: &[String]) -> Result<Vec<security::Address>, String> {
    values
        .iter()
        .map(|value| {
            let net = value
                .parse::<IpNet>()
                .or_else(|_| value.parse::<IpAddr>().map(IpNet::from));
            net.map(|net| address(net.trunc())).map_err(|_| {
                format!("{field}: {value:?} is no address or CIDR; write 10.0.0.1 or 10.0.0.0/8")
            })
        })
        .collect()
}

fn ports(field: &str, values: &[String]) -> Result<Vec<u32>, String> {
    values
        .iter()
        .map(|value| match value.parse::<u16>() {
            Ok(port) if port != 0 => Ok(port.into()),
            _ => Err(format!(
                "{field}: {value:?} is no port; a port is from 1 to 65535"
            )),
        })
        .collect()
}
