//! A small mesh for the decision tables: each function makes one change, with what a test wants different.

use culvert_core::{
    ids::{NetworkAddress, NetworkId},
    mesh::{
        Balancing, EgressMode, Health, IpFamilies, Locality, MeshConfig, PortMap, Protocol, Service,
        Visibility, Workload, WorkloadKind,
    },
    policy::{Action, Clause, Match, Policy, Rule, Scope},
    snapshot::{Change, Snapshot},
};

pub const WEB: &str = "web";
pub const CART: &str = "cart";

pub fn at(ip: &str) -> NetworkAddress {
    NetworkAddress {
        network: NetworkId::from(""),
        ip: ip.parse().unwrap(),
    }
}

pub fn snapshot(changes: impl IntoIterator<Item = Change>) -> Snapshot {
    let mut snapshot = Snapshot::default();
    changes.into_iter().for_each(|change| snapshot.apply(change));
    snapshot
}

/// Mesh ranges 10.0.0.0/16 and 10.96.0.0/16, everything else may be reached.
pub fn config(change: impl FnOnce(&mut MeshConfig)) -> Change {
    let mut config = MeshConfig {
        trust_domain: "cluster.local".parse().unwrap(),
        cluster_domain: "cluster.local".into(),
        ranges: ["10.0.0.0/16".parse().unwrap(), "10.96.0.0/16".parse().unwrap()].into(),
        egress: EgressMode::Allow,
        resolvers: [].into(),
        network: NetworkId::from(""),
        federated: [].into(),
        close_at_expiry: false,
    };
    change(&mut config);
    Change::Config(Box::new(config))
}

/// An enrolled, ready pod of namespace `shop` whose account has its name.
pub fn workload(uid: &str, ip: &str, change: impl FnOnce(&mut Workload)) -> Change {
    let mut workload = Workload {
        uid: uid.into(),
        name: uid.into(),
        namespace: "shop".into(),
        service_account: uid.into(),
        identity: format!("spiffe://cluster.local/ns/shop/sa/{uid}")
            .parse()
            .unwrap(),
        addresses: [ip.parse().unwrap()].into(),
        network: NetworkId::from(""),
        hostname: "".into(),
        protocol: Protocol::Hbone,
        node: "a".into(),
        cluster: "Kubernetes".into(),
        locality: Locality::default(),
        services: [].into(),
        policies: [].into(),
        outbound_policies: [].into(),
        health: Health::Ready,
        capacity: 1,
        waypoint: None,
        host_network: false,
        refuses_plaintext: false,
        canonical_name: uid.into(),
        canonical_revision: "".into(),
        workload_name: uid.into(),
        kind: WorkloadKind::Pod,
    };
    change(&mut workload);
    Change::Workload(Box::new(workload))
}

/// A service with port 80; its host name is its name.
pub fn service(key: &str, vip: &str, change: impl FnOnce(&mut Service)) -> Change {
    let mut service = Service {
        key: key.parse().unwrap(),
        name: key.into(),
        vips: [at(vip)].into(),
        ranges: [].into(),
        ports: [PortMap {
            service_port: 80,
            target: None,
        }]
        .into(),
        port_names: [].into(),
        subject_alt_names: [].into(),
        waypoint: None,
        balancing: Balancing::default(),
        families: IpFamilies::default(),
        canonical: true,
        visibility: Visibility::Public,
        external: false,
    };
    change(&mut service);
    Change::Service(Box::new(service))
}

/// A policy of its namespace with one rule.
pub fn policy(key: &str, action: Action, change: impl FnOnce(&mut Match)) -> Policy {
    let mut one = Match::default();
    change(&mut one);
    Policy {
        key: key.parse().unwrap(),
        scope: Scope::Namespace,
        action,
        rules: [Rule {
            clauses: [Clause {
                matches: [one].into(),
            }]
            .into(),
        }]
        .into(),
        dry_run: false,
        defect: None,
    }
}
