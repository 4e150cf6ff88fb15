//! Choices among endpoints: by locality, load, affinity and what has failed.

use super::*;
use crate::{
    fixtures::{WEB, config, service, snapshot, workload},
    outbound::route::{Route, route},
};
use culvert_core::{
    mesh::{Health, IpFamilies, PortMap},
    snapshot::Snapshot,
};
use std::collections::BTreeSet;

const CART: &str = "shop/cart";
const VIP: &str = "10.96.0.1:80";

fn endpoint(uid: &str, ip: &str, change: impl FnOnce(&mut Workload)) -> culvert_core::snapshot::Change {
    workload(uid, ip, |w| {
        let port = PortMap {
            service_port: 80,
            target: Some(8080),
        };
        w.services = [(CART.parse().unwrap(), [port].into())].into();
        change(w);
    })
}

/// `web` on node `a`; endpoints `a`, `b` and `c` on nodes of their names, in zones of their own, and two that
/// are not ready.
fn mesh(change: impl FnOnce(&mut Service)) -> Snapshot {
    snapshot([
        config(|_| ()),
        workload(WEB, "10.0.1.5", |w| w.node = "a".into()),
        endpoint("a", "10.0.2.1", |w| w.node = "a".into()),
        endpoint("b", "10.0.2.2", |w| w.node = "b".into()),
        endpoint("c", "10.0.2.3", |w| {
            w.node = "c".into();
            // A named port, which each endpoint has its own number for.
            let port = PortMap {
                service_port: 80,
                target: Some(9090),
            };
            w.services = [(CART.parse().unwrap(), [port].into())].into();
            w.locality.zone = "far".into();
            w.addresses = ["10.0.2.3".parse().unwrap(), "fd00::3".parse().unwrap()].into();
        }),
        endpoint("ill", "10.0.2.4", |w| {
            w.node = "a".into();
            w.health = Health::Unhealthy;
        }),
        endpoint("leaving", "10.0.2.5", |w| {
            w.node = "a".into();
            w.health = Health::Terminating;
        }),
        service(CART, "10.96.0.1", change),
    ])
}

#[derive(Default)]
struct Client {
    sessions: Sessions,
    failing: Failing,
    avoid: Vec<WorkloadUid>,
}

impl Client {
    fn goes_to(&self, snapshot: &Snapshot) -> Option<String> {
        let web = snapshot.workload(&WEB.into()).unwrap().clone();
        let routed = route(snapshot, &web, VIP.parse().unwrap(), &mut |service, usable| {
            let known = Choice {
                client: &"pod-web".into(),
                sessions: &self.sessions,
                avoid: &self.avoid,
                failing: &self.failing,
                load: &|_| 0,
            };
            choose(service, &web, usable, &known)
        });
        match routed {
            Route::Tunnel(hop) => Some(format!("{} {}", hop.endpoint.uid, hop.target)),
            _ => None,
        }
    }

    /// Every endpoint that any of many connections goes to.
    fn reaches(&self, snapshot: &Snapshot) -> String {
        let reached: BTreeSet<String> = (0..200).filter_map(|_| self.goes_to(snapshot)).collect();
        let names = reached
            .iter()
            .map(|one| one.split(' ').next().unwrap_or_default());
        names.collect::<Vec<_>>().join(" ")
    }
}

#[test]
fn every_field_of_a_service_that_kube_proxy_honours_chooses_among_its_endpoints() {
    type Change = fn(&mut Service);
    let rows: [(&str, Change, &str); 8] = [
        ("ready ones alone", |_| (), "a b c"),
        (
            "internalTrafficPolicy: Local",
            |s| {
                s.balancing.mode = LocalityMode::Strict;
                s.balancing.preferences = [LocalityScope::Node].into();
            },
            "a",
        ),
        (
            "trafficDistribution: PreferSameZone",
            |s| {
                s.balancing.mode = LocalityMode::Failover;
                s.balancing.preferences =
                    [LocalityScope::Network, LocalityScope::Region, LocalityScope::Zone].into();
            },
            "a b",
        ),
        (
            "trafficDistribution: PreferSameNode",
            |s| {
                s.balancing.mode = LocalityMode::Failover;
                s.balancing.preferences = [
                    LocalityScope::Network,
                    LocalityScope::Region,
                    LocalityScope::Zone,
                    LocalityScope::Subzone,
                    LocalityScope::Node,
                ]
                .into();
            },
            "a",
        ),
        (
            "publishNotReadyAddresses",
            |s| s.balancing.use_unready = true,
            "a b c ill leaving",
        ),
        (
            "terminating endpoints, while others are ready",
            |s| s.balancing.use_terminating = true,
            "a b c",
        ),
        ("ipFamilies: IPv6", |s| s.families = IpFamilies::V6, "c"),
        ("a port that nobody has", |s| s.ports = [].into(), ""),
    ];
    for (case, change, want) in rows {
        assert_eq!(Client::default().reaches(&mesh(change)), want, "{case}");
    }
    let only_c = Client {
        avoid: vec!["a".into(), "b".into()],
        ..Client::default()
    };
    assert_eq!(
        only_c.goes_to(&mesh(|_| ())),
        Some("c 10.0.2.3:9090".to_owned()),
        "its own target port"
    );
}

#[test]
fn a_client_with_affinity_stays_where_it_was_until_that_is_gone_or_the_time_is_over() {
    let sticky = |seconds: u32| mesh(move |s| s.balancing.client_ip_affinity_seconds = Some(seconds));
    let snapshot = sticky(60);
    let client = Client::default();
    let first = client.reaches(&snapshot);
    assert_eq!(first.split(' ').count(), 1, "{first}");
    assert_eq!(
        Client::default().reaches(&snapshot),
        first,
        "a ztunnel that starts anew chooses alike"
    );
    let other = ["a", "b", "c"].into_iter().find(|uid| *uid != first).unwrap();
    let cart = snapshot.service(&CART.parse().unwrap()).unwrap().clone();
    client.sessions.used(&cart, &other.into());
    assert_eq!(client.reaches(&snapshot), other, "where the last connection was");
    assert_eq!(client.reaches(&sticky(0)), first, "that was too long ago");
    client.failing.failed(&other.into());
    assert_eq!(
        client.reaches(&snapshot),
        other,
        "one failure elsewhere does not end a session"
    );
    let failed = Client {
        avoid: vec![other.into()],
        ..client
    };
    assert_ne!(failed.reaches(&snapshot), other, "its own failure does");
}

#[test]
fn an_endpoint_that_failed_lately_is_avoided_while_there_are_others() {
    let snapshot = mesh(|_| ());
    let client = Client::default();
    client.failing.failed(&"b".into());
    assert_eq!(client.reaches(&snapshot), "a c");
    for uid in ["a", "c"] {
        client.failing.failed(&uid.into());
    }
    assert_eq!(
        client.reaches(&snapshot),
        "a b c",
        "when all have failed, all are tried"
    );
    client.failing.works(&"c".into());
    assert_eq!(client.reaches(&snapshot), "c");
}
