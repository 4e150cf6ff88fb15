//! Changes applied in turn, and what look-ups answer then.

use super::*;
use crate::{
    ids::NetworkId,
    mesh::{Balancing, Health, IpFamilies, Locality, PortMap, Protocol, Visibility, WorkloadKind},
    policy::Action,
};

fn at(ip: &str) -> NetworkAddress {
    NetworkAddress {
        network: NetworkId::from(""),
        ip: ip.parse().unwrap(),
    }
}

fn workload(uid: &str, ip: &str, services: &[&str]) -> Change {
    Change::Workload(Box::new(Workload {
        uid: uid.into(),
        name: uid.into(),
        namespace: "shop".into(),
        service_account: "default".into(),
        identity: "spiffe://cluster.local/ns/shop/sa/default".parse().unwrap(),
        addresses: [ip.parse().unwrap()].into(),
        network: NetworkId::from(""),
        hostname: "".into(),
        protocol: Protocol::Hbone,
        node: "a".into(),
        cluster: "Kubernetes".into(),
        locality: Locality::default(),
        services: services
            .iter()
            .map(|key| {
                (
                    key.parse().unwrap(),
                    [PortMap {
                        service_port: 80,
                        target: Some(8080),
                    }]
                    .into(),
                )
            })
            .collect(),
        policies: [].into(),
        outbound_policies: [].into(),
        health: Health::Ready,
        capacity: 1,
        waypoint: None,
        host_network: false,
        refuses_plaintext: true,
        canonical_name: "".into(),
        canonical_revision: "".into(),
        workload_name: "".into(),
        kind: WorkloadKind::Pod,
    }))
}

fn service(key: &str, vip: &str) -> Service {
    Service {
        key: key.parse().unwrap(),
        name: "x".into(),
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
        canonical: false,
        visibility: Visibility::Public,
        external: false,
    }
}

fn snapshot(changes: impl IntoIterator<Item = Change>) -> Snapshot {
    let mut snapshot = Snapshot::default();
    changes.into_iter().for_each(|change| snapshot.apply(change));
    snapshot
}

#[test]
fn an_address_is_a_workload_a_service_unknown_or_unanswered() {
    let snapshot = snapshot([
        workload("w", "10.0.0.1", &[]),
        Change::Service(Box::new(service("shop/cart.shop.svc", "10.96.0.1"))),
        Change::Unknown(at("192.0.2.1")),
    ]);
    assert!(matches!(snapshot.lookup(&at("10.0.0.1"), "shop"), Lookup::Workload(w) if w.uid.as_str() == "w"));
    assert!(matches!(
        snapshot.lookup(&at("10.96.0.1"), "shop"),
        Lookup::Service(_)
    ));
    assert!(matches!(
        snapshot.lookup(&at("192.0.2.1"), "shop"),
        Lookup::Unknown
    ));
    assert!(matches!(
        snapshot.lookup(&at("192.0.2.2"), "shop"),
        Lookup::Unanswered
    ));
}

#[test]
fn what_was_unknown_is_known_once_it_arrives() {
    let snapshot = snapshot([Change::Unknown(at("10.0.0.1")), workload("w", "10.0.0.1", &[])]);
    assert!(matches!(
        snapshot.lookup(&at("10.0.0.1"), "shop"),
        Lookup::Workload(_)
    ));
    let mut gone = snapshot.clone();
    gone.apply(Change::RemoveWorkload("w".into()));
    assert!(matches!(gone.lookup(&at("10.0.0.1"), "shop"), Lookup::Unanswered));
}

#[test]
fn endpoints_may_arrive_before_their_service_and_leave_by_name() {
    let mut snapshot = snapshot([
        workload("a", "10.0.0.1", &["shop/cart"]),
        workload("b", "10.0.0.2", &["shop/cart"]),
        Change::Service(Box::new(service("shop/cart", "10.96.0.1"))),
    ]);
    let key: ServiceKey = "shop/cart".parse().unwrap();
    assert_eq!(snapshot.endpoints(&key).len(), 2);
    snapshot.apply(workload("a", "10.0.0.3", &[]));
    assert_eq!(snapshot.endpoints(&key).len(), 1);
    snapshot.apply(Change::RemoveWorkload("b".into()));
    assert!(snapshot.endpoints(&key).is_empty());
    assert!(snapshot.service(&key).is_some());
}

#[test]
fn f24_an_address_belongs_to_its_last_holder() {
    let mut snapshot = snapshot([workload("old", "10.0.0.1", &[]), workload("new", "10.0.0.1", &[])]);
    snapshot.apply(Change::RemoveWorkload("old".into()));
    assert!(matches!(snapshot.lookup(&at("10.0.0.1"), "x"), Lookup::Workload(w) if w.uid.as_str() == "new"));
}

#[test]
fn t53_duplicate_names_are_decided_by_the_clients_namespace_then_canonical() {
    let canonical = Service {
        canonical: true,
        ..service("platform/api.example", "10.96.0.1")
    };
    let hidden = Service {
        visibility: Visibility::Namespace,
        ..service("evil/api.example", "10.96.0.1")
    };
    let snapshot = snapshot(
        [service("aaa/api.example", "10.96.0.1"), hidden, canonical]
            .map(|service| Change::Service(Box::new(service))),
    );
    for (client, want) in [("evil", "evil"), ("aaa", "aaa"), ("shop", "platform")] {
        let Lookup::Service(service) = snapshot.lookup(&at("10.96.0.1"), client) else {
            panic!("no service for {client}")
        };
        assert_eq!(service.namespace(), want, "by address from {client}");
        assert_eq!(
            snapshot.service_named("api.example", client).unwrap().namespace(),
            want,
            "by name"
        );
    }
}

#[test]
fn an_older_snapshot_does_not_see_later_changes() {
    let before = snapshot([workload("w", "10.0.0.1", &["shop/cart"])]);
    let mut after = before.clone();
    after.apply(Change::RemoveWorkload("w".into()));
    assert_eq!((before.workload_count(), after.workload_count()), (1, 0));
    assert_eq!(before.endpoints(&"shop/cart".parse().unwrap()).len(), 1);
}

#[test]
fn policies_are_in_force_by_scope_and_a_missing_one_is_named() {
    let policy = |key: &str, scope| {
        Change::Policy(Box::new(Policy {
            key: key.parse().unwrap(),
            scope,
            action: Action::Deny,
            rules: [].into(),
            dry_run: false,
            defect: None,
        }))
    };
    let mut snapshot = snapshot([
        policy("root/global", Scope::Global),
        policy("shop/all", Scope::Namespace),
        policy("shop/some", Scope::Workload),
    ]);
    let names = |snapshot: &Snapshot, namespace: &str, named: &[&str]| {
        let named: Vec<PolicyKey> = named.iter().map(|key| key.parse().unwrap()).collect();
        match snapshot.inbound.in_force(namespace, &named) {
            Ok(policies) => Ok(policies.map(|policy| policy.key.to_string()).collect::<Vec<_>>()),
            Err(missing) => Err(missing.to_string()),
        }
    };
    assert_eq!(names(&snapshot, "bank", &[]), Ok(vec!["root/global".into()]));
    assert_eq!(
        names(&snapshot, "shop", &["shop/some"]),
        Ok(vec!["root/global".into(), "shop/all".into(), "shop/some".into()])
    );
    assert_eq!(names(&snapshot, "shop", &["shop/late"]), Err("shop/late".into()));
    snapshot.apply(policy("shop/all", Scope::Workload));
    snapshot.apply(Change::RemovePolicy("root/global".parse().unwrap()));
    assert_eq!(names(&snapshot, "shop", &[]), Ok(vec![]));
}
