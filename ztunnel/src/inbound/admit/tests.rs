//! Arrivals by tables, and whether they are admitted.

use super::*;
use crate::fixtures::{CART, WEB, at, config, policy, service, snapshot, workload};
use culvert_core::{
    mesh::{Gateway, GatewayDestination, PortMap},
    policy::{Action, StringMatch},
    snapshot::Change,
};

fn mesh(more: impl IntoIterator<Item = Change>) -> Snapshot {
    let cart = workload(CART, "10.0.2.7", |w| {
        w.services = [(
            "shop/cart".parse().unwrap(),
            [PortMap {
                service_port: 80,
                target: Some(8080),
            }]
            .into(),
        )]
        .into();
    });
    let base = [
        config(|_| ()),
        workload(WEB, "10.0.1.5", |_| ()),
        cart,
        service("shop/cart", "10.96.0.1", |_| ()),
    ];
    snapshot(base.into_iter().chain(more))
}

fn asked(snapshot: &Snapshot, authority: &str) -> Result<SocketAddr, Refusal> {
    let web = snapshot.workload(&WEB.into()).unwrap().identity.clone();
    asked_by(snapshot, authority, Some(&web), "10.0.1.5")
}

fn asked_by(
    snapshot: &Snapshot,
    authority: &str,
    identity: Option<&SpiffeId>,
    from: &str,
) -> Result<SocketAddr, Refusal> {
    let authority = authority.parse().unwrap();
    let arrival = Arrival {
        workload: snapshot.workload(&CART.into()).map(AsRef::as_ref),
        accepted_ip: "10.0.2.7".parse().unwrap(),
        peer_ip: from.parse().unwrap(),
        identity,
        target: Target::Authority(&authority),
    };
    admit(snapshot, &arrival).map(|permit| permit.target())
}

#[test]
fn t20_a_connect_reaches_this_pod_and_nothing_else() {
    let snapshot = mesh([]);
    for (authority, want) in [
        ("10.0.2.7:8080", "10.0.2.7:8080"),
        ("shop-cart:80", ""),
        ("10.0.2.7:22", "10.0.2.7:22"),
    ] {
        match asked(&snapshot, authority) {
            Ok(target) => assert_eq!(target, want.parse().unwrap(), "{authority}"),
            Err(refusal) => assert_eq!(want, "", "{authority}: {refusal}"),
        }
    }
    for authority in [
        "127.0.0.1:80",
        "[::1]:80",
        "0.0.0.0:80",
        "169.254.169.254:80",
        "10.0.2.8:8080",
        "10.96.0.1:80",
        "[fd00::7]:8080",
        "172.31.0.2:6443",
    ] {
        let refused = asked(&snapshot, authority).unwrap_err();
        assert!(
            matches!(refused, Refusal::NotThisPod(_)),
            "{authority}: {refused}"
        );
        assert_eq!(refused.status(), StatusCode::BAD_REQUEST);
    }
    for port in OWN_PORTS {
        let refused = asked(&snapshot, &format!("10.0.2.7:{port}")).unwrap_err();
        assert_eq!(refused, Refusal::OwnPort(port));
    }
}

#[test]
fn t20_a_host_name_must_be_a_service_of_this_pod() {
    let snapshot = mesh([service("shop/other", "10.96.0.9", |_| ())]);
    assert_eq!(asked(&snapshot, "cart:80"), Ok("10.0.2.7:8080".parse().unwrap()));
    for authority in ["other:80", "cart:81", "bank:80"] {
        let refused = asked(&snapshot, authority).unwrap_err();
        assert!(
            matches!(refused, Refusal::NotItsService(_)),
            "{authority}: {refused}"
        );
        assert_eq!(refused.status(), StatusCode::SERVICE_UNAVAILABLE);
    }
}

fn only_from(namespace: &str) -> Change {
    Change::Policy(Box::new(policy("shop/only", Action::Allow, |m| {
        m.namespaces = [StringMatch::Exact(namespace.into())].into();
    })))
}

#[test]
fn t24_t29_a_namespace_is_the_peers_only_with_identity_and_address_together() {
    let snapshot = mesh([only_from("shop")]);
    let web: SpiffeId = snapshot.workload(&WEB.into()).unwrap().identity.clone();
    let stranger: SpiffeId = "spiffe://cluster.local/ns/evil/sa/x".parse().unwrap();
    let admitted = |identity: Option<&SpiffeId>, from: &str| {
        asked_by(&snapshot, "10.0.2.7:8080", identity, from).is_ok()
    };
    assert!(admitted(Some(&web), "10.0.1.5"));
    assert!(
        !admitted(Some(&stranger), "10.0.1.5"),
        "another identity at a known address"
    );
    assert!(
        !admitted(Some(&web), "10.0.1.99"),
        "a known identity at an address nobody knows"
    );
    assert!(!admitted(None, "10.0.1.5"), "plaintext from a known address");
}

#[test]
fn a_denial_is_401_and_names_the_policy() {
    let deny = Change::Policy(Box::new(policy("shop/no", Action::Deny, |m| {
        m.destination_ports = [8080].into()
    })));
    let snapshot = mesh([deny]);
    let refused = asked(&snapshot, "10.0.2.7:8080").unwrap_err();
    assert_eq!(refused.status(), StatusCode::UNAUTHORIZED);
    assert_eq!(refused.to_string(), "denied by policy shop/no");
    assert!(asked(&snapshot, "10.0.2.7:9090").is_ok());
}

#[test]
fn a_policy_that_is_named_and_not_there_refuses() {
    let late = workload(CART, "10.0.2.7", |w| {
        w.policies = ["shop/late".parse().unwrap()].into()
    });
    let refused = asked(&mesh([late]), "10.0.2.7:8080").unwrap_err();
    assert_eq!(
        refused,
        Refusal::Denied(Denial::Missing("shop/late".parse().unwrap()))
    );
}

#[test]
fn f43_what_is_bound_to_a_waypoint_is_reached_through_it_alone() {
    let gateway = Gateway {
        destination: GatewayDestination::Address(at("10.9.9.9")),
        hbone_port: 15008,
    };
    let bound = service("shop/cart", "10.96.0.1", |s| s.waypoint = Some(gateway.clone()));
    let snapshot = mesh([bound]);
    for authority in ["10.0.2.7:8080", "cart:80"] {
        assert_eq!(
            asked(&snapshot, authority),
            Err(Refusal::NotFromWaypoint),
            "{authority}"
        );
    }
    assert!(
        asked(&snapshot, "10.0.2.7:9090").is_ok(),
        "a port of no bound service"
    );
}

#[test]
fn a_pod_that_discovery_does_not_know_serves_nobody() {
    let snapshot = mesh([Change::RemoveWorkload(CART.into())]);
    assert_eq!(asked(&snapshot, "10.0.2.7:8080"), Err(Refusal::UnknownPod));
}

#[test]
fn plaintext_is_judged_by_the_same_rules() {
    let strict = Change::Policy(Box::new(policy("shop/strict", Action::Deny, |m| {
        m.not_principals = [StringMatch::Presence].into();
    })));
    let snapshot = mesh([strict]);
    let arrival = Arrival {
        workload: snapshot.workload(&CART.into()).map(AsRef::as_ref),
        accepted_ip: "10.0.2.7".parse().unwrap(),
        peer_ip: "10.0.1.5".parse().unwrap(),
        identity: None,
        target: Target::Plaintext(8080),
    };
    assert!(matches!(
        admit(&snapshot, &arrival),
        Err(Refusal::Denied(Denial::Policy(_)))
    ));
    assert!(asked(&snapshot, "10.0.2.7:8080").is_ok());
    assert_eq!(
        admit(
            &snapshot,
            &Arrival {
                target: Target::Plaintext(15006),
                ..arrival
            }
        ),
        Err(Refusal::OwnPort(15006))
    );
}
