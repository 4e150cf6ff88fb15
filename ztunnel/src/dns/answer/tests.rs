//! Answers from a snapshot, by name and kind.

use super::*;
use crate::fixtures::{CART, WEB, config, service, snapshot, workload};
use culvert_core::{
    mesh::{PortMap, Visibility},
    snapshot::Change,
};

const CART_NAME: &str = "cart.shop.svc.cluster.local";

fn mesh(more: impl IntoIterator<Item = Change>) -> Snapshot {
    let serves = |uid: &str, ip: &str, of: &'static str, host: &'static str| {
        workload(uid, ip, move |w| {
            w.hostname = host.into();
            let ports = [PortMap {
                service_port: 80,
                target: Some(8080),
            }];
            w.services = [(of.parse().unwrap(), ports.into())].into();
        })
    };
    let named = |s: &mut Service| s.port_names = [("http".into(), 80)].into();
    let base = [
        config(|_| ()),
        workload(WEB, "10.0.1.5", |_| ()),
        serves(CART, "10.0.2.7", "shop/cart.shop.svc.cluster.local", ""),
        serves("db-0", "10.0.2.8", "shop/db.shop.svc.cluster.local", "db-0"),
        service("shop/cart.shop.svc.cluster.local", "10.96.0.1", named),
        service("shop/db.shop.svc.cluster.local", "10.96.0.2", |s| {
            s.vips = [].into();
            named(s);
        }),
        service("bank/vault.bank.svc.cluster.local", "10.96.0.3", |s| {
            s.visibility = Visibility::Namespace
        }),
    ];
    snapshot(base.into_iter().chain(more))
}

fn said(snapshot: &Snapshot, name: &str, kind: Kind) -> Answer {
    let web = snapshot.workload(&WEB.into()).unwrap();
    answer(
        snapshot,
        web,
        &Asked {
            name: name.to_owned(),
            kind,
        },
    )
}

fn found(ips: &[&str]) -> Answer {
    Answer::Addresses(ips.iter().map(|ip| ip.parse().unwrap()).collect())
}

#[test]
fn names_of_the_mesh_are_answered_and_the_rest_is_forwarded() {
    let snapshot = mesh([]);
    let ask = |key: &str| Answer::Ask(key.parse().unwrap());
    for (case, name, kind, want) in [
        ("a service", CART_NAME, Kind::A, found(&["10.96.0.1"])),
        ("a family that it has not", CART_NAME, Kind::Aaaa, Answer::Empty),
        (
            "a headless service",
            "db.shop.svc.cluster.local",
            Kind::A,
            found(&["10.0.2.8"]),
        ),
        (
            "one of its pods",
            "db-0.db.shop.svc.cluster.local",
            Kind::A,
            found(&["10.0.2.8"]),
        ),
        (
            "no pod of its",
            "db-1.db.shop.svc.cluster.local",
            Kind::A,
            Answer::Forward,
        ),
        ("outside", "www.example", Kind::A, Answer::Forward),
        ("nothing", "", Kind::A, Answer::Forward),
        (
            "never asked for",
            "new.shop.svc.cluster.local",
            Kind::A,
            ask("shop/new.shop.svc.cluster.local"),
        ),
        (
            "another's private service",
            "vault.bank.svc.cluster.local",
            Kind::A,
            Answer::Forward,
        ),
    ] {
        assert_eq!(said(&snapshot, name, kind), want, "{case}");
    }
}

#[test]
fn what_control_does_not_know_is_the_resolvers_to_deny() {
    let key: ServiceKey = "shop/new.shop.svc.cluster.local".parse().unwrap();
    let snapshot = mesh([Change::UnknownService(key)]);
    assert_eq!(
        said(&snapshot, "new.shop.svc.cluster.local", Kind::A),
        Answer::Forward
    );
}

#[test]
fn srv_names_the_service_or_each_endpoint_of_a_headless_one() {
    let snapshot = mesh([]);
    let Answer::Services(targets) = said(&snapshot, &format!("_http._tcp.{CART_NAME}"), Kind::Srv) else {
        panic!("no SRV")
    };
    assert_eq!((targets[0].host.as_str(), targets[0].port), (CART_NAME, 80));
    let Answer::Services(targets) = said(&snapshot, "_http._tcp.db.shop.svc.cluster.local", Kind::Srv) else {
        panic!("no SRV")
    };
    let [target] = targets.as_slice() else {
        panic!("{targets:?}")
    };
    assert_eq!(
        (target.host.as_str(), target.port),
        ("db-0.db.shop.svc.cluster.local", 8080)
    );
    let unnamed = said(&snapshot, &format!("_grpc._tcp.{CART_NAME}"), Kind::Srv);
    assert_eq!(unnamed, Answer::Forward);
}
