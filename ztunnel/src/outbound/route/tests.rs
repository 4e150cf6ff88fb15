//! Routes by tables: a snapshot, a source and a destination, and what is decided.

use super::*;
use crate::fixtures::{CART, WEB, at, config, policy, service, snapshot, workload};
use culvert_core::{
    mesh::{Gateway, GatewayDestination, PortMap},
    policy::{Action, StringMatch},
    snapshot::Change,
};

/// What a route is, in a word and its destination.
fn said(route: Route) -> String {
    match route {
        Route::Tunnel(hop) => format!("tunnel {} for {}", hop.peer, hop.target),
        Route::Direct(direct) => format!("direct {}", direct.address),
        Route::Refuse(refusal) => format!("refuse {}", refusal.reason()),
        Route::Ask(address) => format!("ask {}", address.resource_name()),
    }
}

fn routed(snapshot: &Snapshot, to: &str) -> String {
    let web = snapshot.workload(&WEB.into()).unwrap().clone();
    said(route(snapshot, &web, to.parse().unwrap(), &mut |_, usable| {
        (!usable.is_empty()).then_some(0)
    }))
}

fn gateway() -> Gateway {
    Gateway {
        destination: GatewayDestination::Address(at("10.9.9.9")),
        hbone_port: 15008,
    }
}

#[test]
fn where_a_connection_goes_depends_on_what_is_known_of_its_destination() {
    let plain = workload("plain", "10.0.2.9", |w| w.protocol = Protocol::Tcp);
    let snapshot = snapshot([
        config(|_| ()),
        workload(WEB, "10.0.1.5", |_| ()),
        workload(CART, "10.0.2.7", |w| {
            w.services = [(
                "shop/cart".parse().unwrap(),
                [PortMap {
                    service_port: 80,
                    target: Some(8080),
                }]
                .into(),
            )]
            .into();
        }),
        plain,
        service("shop/cart", "10.96.0.1", |_| ()),
        service("shop/empty", "10.96.0.2", |_| ()),
        Change::Unknown(at("192.0.2.1")),
        Change::Unknown(at("10.0.9.9")),
    ]);
    for (case, to, want) in [
        (
            "an enrolled pod",
            "10.0.2.7:9090",
            "tunnel 10.0.2.7:15008 for 10.0.2.7:9090",
        ),
        (
            "a service",
            "10.96.0.1:80",
            "tunnel 10.0.2.7:15008 for 10.0.2.7:8080",
        ),
        (
            "a port that the service has not",
            "10.96.0.1:81",
            "refuse no_such_port",
        ),
        (
            "a service without endpoints",
            "10.96.0.2:80",
            "refuse no_endpoint",
        ),
        ("a pod outside of the mesh", "10.0.2.9:80", "direct 10.0.2.9:80"),
        ("a stranger outside", "192.0.2.1:443", "direct 192.0.2.1:443"),
        (
            "nobody inside the mesh's ranges",
            "10.0.9.9:80",
            "refuse nobody_there",
        ),
        ("no answer yet", "192.0.2.2:80", "ask /192.0.2.2"),
        ("our own listener", "127.0.0.1:15008", "refuse own_port"),
    ] {
        assert_eq!(routed(&snapshot, to), want, "{case}");
    }
}

#[test]
fn egress_modes_decide_about_strangers() {
    for (mode, want) in [
        (EgressMode::Allow, "direct 192.0.2.1:443"),
        (EgressMode::RegistryOnly, "refuse undeclared"),
        (EgressMode::Deny, "refuse egress_denied"),
    ] {
        let snapshot = snapshot([
            config(|config| config.egress = mode),
            workload(WEB, "10.0.1.5", |_| ()),
            Change::Unknown(at("192.0.2.1")),
        ]);
        assert_eq!(routed(&snapshot, "192.0.2.1:443"), want, "{mode:?}");
    }
}

#[test]
fn an_enrolled_pod_is_never_reached_in_plaintext_whatever_its_health() {
    for health in [Health::Ready, Health::Terminating, Health::Unhealthy] {
        let snapshot = snapshot([
            config(|_| ()),
            workload(WEB, "10.0.1.5", |_| ()),
            workload(CART, "10.0.2.7", |w| w.health = health),
        ]);
        assert_eq!(
            routed(&snapshot, "10.0.2.7:80"),
            "tunnel 10.0.2.7:15008 for 10.0.2.7:80",
            "{health:?}"
        );
    }
}

#[test]
fn what_is_bound_to_a_waypoint_is_refused_by_every_address() {
    let bound = |w: &mut Workload| {
        w.services = [(
            "shop/cart".parse().unwrap(),
            [PortMap {
                service_port: 80,
                target: Some(8080),
            }]
            .into(),
        )]
        .into();
    };
    let by_service = snapshot([
        config(|_| ()),
        workload(WEB, "10.0.1.5", |_| ()),
        workload(CART, "10.0.2.7", bound),
        service("shop/cart", "10.96.0.1", |s| s.waypoint = Some(gateway())),
    ]);
    assert_eq!(routed(&by_service, "10.96.0.1:80"), "refuse no_waypoint");
    assert_eq!(
        routed(&by_service, "10.0.2.7:8080"),
        "refuse no_waypoint",
        "its target port by pod address"
    );
    assert_eq!(
        routed(&by_service, "10.0.2.7:9090"),
        "tunnel 10.0.2.7:15008 for 10.0.2.7:9090"
    );
    let by_workload = snapshot([
        config(|_| ()),
        workload(WEB, "10.0.1.5", |_| ()),
        workload(CART, "10.0.2.7", |w| w.waypoint = Some(gateway())),
    ]);
    assert_eq!(routed(&by_workload, "10.0.2.7:9090"), "refuse no_waypoint");
}

#[test]
fn source_rules_are_judged_at_the_source() {
    let changes = |deny: &str| {
        [
            config(|_| ()),
            workload(WEB, "10.0.1.5", |_| ()),
            workload(CART, "10.0.2.7", |_| ()),
            Change::OutboundPolicy(Box::new(policy("shop/out", Action::Deny, |m| {
                m.namespaces = [StringMatch::Exact(deny.into())].into();
            }))),
        ]
    };
    assert_eq!(routed(&snapshot(changes("shop")), "10.0.2.7:80"), "refuse denied");
    assert_eq!(
        routed(&snapshot(changes("bank")), "10.0.2.7:80"),
        "tunnel 10.0.2.7:15008 for 10.0.2.7:80"
    );
    // A rule that names the pod and has not arrived refuses everything.
    let waiting = snapshot([
        config(|_| ()),
        workload(WEB, "10.0.1.5", |w| {
            w.outbound_policies = ["shop/late".parse().unwrap()].into()
        }),
        workload(CART, "10.0.2.7", |_| ()),
    ]);
    assert_eq!(routed(&waiting, "10.0.2.7:80"), "refuse denied");
}

#[test]
fn without_settings_nothing_goes_anywhere() {
    let snapshot = snapshot([
        workload(WEB, "10.0.1.5", |_| ()),
        workload(CART, "10.0.2.7", |_| ()),
    ]);
    assert_eq!(routed(&snapshot, "10.0.2.7:80"), "refuse no_config");
}

#[test]
fn f15_the_tunnel_expects_the_endpoints_identity_and_the_services_alternates() {
    let alternate: SpiffeId = "spiffe://cluster.local/ns/shop/sa/old".parse().unwrap();
    let snapshot = snapshot([
        config(|_| ()),
        workload(WEB, "10.0.1.5", |_| ()),
        workload(CART, "10.0.2.7", |w| {
            w.services = [(
                "shop/cart".parse().unwrap(),
                [PortMap {
                    service_port: 80,
                    target: Some(80),
                }]
                .into(),
            )]
            .into();
        }),
        service("shop/cart", "10.96.0.1", |s| {
            s.subject_alt_names = [alternate.clone()].into()
        }),
    ]);
    let web = snapshot.workload(&WEB.into()).unwrap().clone();
    let to = "10.96.0.1:80".parse().unwrap();
    let Route::Tunnel(hop) = route(&snapshot, &web, to, &mut |_, _| Some(0)) else {
        panic!("no tunnel")
    };
    assert_eq!(&*hop.expected, [hop.endpoint.identity.clone(), alternate]);
}
