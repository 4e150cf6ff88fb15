//! Objects in, resources out, as nodes decode them.

use super::*;
use crate::watch::{claims::Claims, files::tests::changes};
use culvert_core::{
    mesh::{Balancing, Health, LocalityMode, LocalityScope, Protocol},
    snapshot::Change as Decoded,
};
use culvert_io::xds::decode::decode;
use culvert_proto::type_url;

pub(crate) fn settings() -> Settings {
    Settings {
        trust_domain: "cluster.local".parse().unwrap(),
        cluster_domain: "cluster.local".into(),
        root_namespace: "culvert-system".into(),
        profile: Profile::Medium,
        egress: Egress::Allow,
        mesh_ranges: vec!["10.0.0.0/8".parse().unwrap()],
        resolvers: vec![],
    }
}

pub(crate) const ALL: Taken = at(u64::MAX);

/// Taken by every node a while ago.
pub(crate) const fn at(number: u64) -> Taken {
    Taken {
        now: number,
        settled: number,
    }
}

fn index(yaml: &str) -> (Index, Arc<World>) {
    let mut index = Index::new(settings(), 0, BTreeMap::new());
    let changes = changes(yaml);
    for change in &changes {
        check(change.object.as_ref().unwrap(), &settings()).unwrap();
    }
    let world = index.apply(&changes, vec![], ALL).unwrap();
    (index, world)
}

fn service_of(world: &World, name: &str) -> culvert_core::mesh::Service {
    let resource = world.get(ADDRESS, name).unwrap_or_else(|| panic!("no {name}"));
    match decode(type_url::ADDRESS, &resource.bytes).unwrap() {
        Decoded::Service(service) => *service,
        other => panic!("{other:?}"),
    }
}

fn workload_of(world: &World, name: &str) -> culvert_core::mesh::Workload {
    let resource = world.get(ADDRESS, name).unwrap_or_else(|| panic!("no {name}"));
    match decode(type_url::ADDRESS, &resource.bytes).unwrap() {
        Decoded::Workload(workload) => *workload,
        other => panic!("{other:?}"),
    }
}

use world::ADDRESS;

const CART: &str = "shop/cart.shop.svc.cluster.local";

fn pod(name: &str, ip: &str, more: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop, uid: u-{name}, labels: {{app: {name}}}{more}}}\n\
         spec: {{nodeName: a, containers: [{{name: app, ports: [{{name: http, containerPort: 8080}}]}}]}}\n\
         status: {{phase: Running, podIPs: [{{ip: {ip}}}], conditions: [{{type: Ready, status: 'True'}}]}}\n---\n"
    )
}

const ENROLLED: &str = "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop, labels: {culvert.dev/dataplane-mode: ambient}}\n---\n";

fn cart(spec: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: cart, namespace: shop}}\nspec: {{selector: {{app: cart}}, \
         clusterIP: 10.96.0.1, ports: [{{name: web, port: 80, targetPort: http}}], {spec}}}\n---\n"
    )
}

#[test]
fn every_field_of_a_service_that_kube_proxy_honours_is_carried() {
    use LocalityMode::{Any, Failover, Strict};
    use LocalityScope::{Network, Node, Region, Subzone, Zone};
    let plain = || Balancing {
        use_terminating: true,
        ..Balancing::default()
    };
    let affinity = |seconds| Balancing {
        client_ip_affinity_seconds: Some(seconds),
        ..plain()
    };
    let local = |mode, preferences: &[LocalityScope]| Balancing {
        mode,
        preferences: preferences.into(),
        ..plain()
    };
    for (spec, want) in [
        ("type: ClusterIP", plain()),
        ("sessionAffinity: None", plain()),
        ("sessionAffinity: ClientIP", affinity(10_800)),
        (
            "sessionAffinity: ClientIP, sessionAffinityConfig: {clientIP: {timeoutSeconds: 60}}",
            affinity(60),
        ),
        ("internalTrafficPolicy: Cluster", plain()),
        ("internalTrafficPolicy: Local", local(Strict, &[Node])),
        // It concerns what comes from outside of the cluster alone.
        ("externalTrafficPolicy: Local", plain()),
        (
            "trafficDistribution: PreferClose",
            local(Failover, &[Network, Region, Zone]),
        ),
        (
            "trafficDistribution: PreferSameZone",
            local(Failover, &[Network, Region, Zone]),
        ),
        (
            "trafficDistribution: PreferSameNode",
            local(Failover, &[Network, Region, Zone, Subzone, Node]),
        ),
        // As kube-proxy does, the policy goes before the preference.
        (
            "internalTrafficPolicy: Local, trafficDistribution: PreferClose",
            local(Strict, &[Node]),
        ),
        (
            "publishNotReadyAddresses: true",
            Balancing {
                use_unready: true,
                ..plain()
            },
        ),
    ] {
        let (_, world) = index(&(cart(spec) + &pod("cart", "10.0.0.1", "")));
        let service = service_of(&world, CART);
        assert_eq!(service.balancing, want, "{spec}");
        assert_eq!(service.balancing.mode == Any, want.mode == Any);
        // The named port is the endpoint's own.
        assert_eq!(service.ports[0].target, None);
        assert_eq!(service.port_names[0], ("web".into(), 80));
        let workload = workload_of(&world, "Kubernetes//Pod/shop/cart");
        assert_eq!(workload.target_port(&service, 80), Some(8080), "{spec}");
        assert!(world.aliased("/10.96.0.1").any(|name| &**name == CART));
    }
}

#[test]
fn a_pod_is_as_ready_as_its_object_says() {
    let not_ready = |text: String| text.replace("'True'", "'False'");
    let terminating = ", deletionTimestamp: now";
    for (case, pod, want) in [
        ("ready", pod("cart", "10.0.0.1", ""), Health::Ready),
        (
            "not ready",
            not_ready(pod("cart", "10.0.0.1", "")),
            Health::Unhealthy,
        ),
        (
            "terminating, serving",
            pod("cart", "10.0.0.1", terminating),
            Health::Terminating,
        ),
        (
            "terminating, no longer serving",
            not_ready(pod("cart", "10.0.0.1", terminating)),
            Health::Unhealthy,
        ),
    ] {
        let (_, world) = index(&pod);
        assert_eq!(
            workload_of(&world, "Kubernetes//Pod/shop/cart").health,
            want,
            "{case}"
        );
    }
    let finished = pod("cart", "10.0.0.1", "").replace("Running", "Succeeded");
    let (_, world) = index(&finished);
    assert!(world.get(ADDRESS, "Kubernetes//Pod/shop/cart").is_none());
}

fn slice(name: &str, endpoints: &str) -> String {
    format!(
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: {name}, namespace: shop, labels: \
         {{kubernetes.io/service-name: cart}}}}\naddressType: IPv4\nports: [{{name: web, port: 9090}}]\n\
         endpoints: [{endpoints}]\n---\n"
    )
}

#[test]
fn listed_endpoints_take_the_place_of_selected_ones() {
    let node =
        "apiVersion: v1\nkind: Node\nmetadata: {name: a, labels: {topology.kubernetes.io/zone: z1}}\n---\n";
    let endpoints = "{addresses: [192.0.2.1], nodeName: a}, \
                     {addresses: [192.0.2.2], conditions: {ready: false}}, \
                     {addresses: [192.0.2.3], conditions: {ready: false, serving: true, terminating: true}}, \
                     {addresses: [10.0.0.7]}, {addresses: [10.0.0.8], conditions: {ready: false}}";
    let yaml = ENROLLED.to_owned()
        + node
        + &cart("type: ClusterIP")
        + &pod("cart", "10.0.0.1", "")
        + &pod("till", "10.0.0.7", "")
        + &pod("shut", "10.0.0.8", "");
    let (mut index, world) = index(&yaml);
    let selected = |world: &World| -> Vec<String> {
        let names = world
            .endpoints(CART)
            .map(|name| name.rsplit('/').next().unwrap().to_owned());
        names.collect()
    };
    assert_eq!(selected(&world), ["cart"]);
    let world = index
        .apply(&changes(&slice("one", endpoints)), vec![], ALL)
        .unwrap();
    assert_eq!(selected(&world), ["till", "192.0.2.1", "192.0.2.2", "192.0.2.3"]);
    for (ip, health) in [
        ("192.0.2.1", Health::Ready),
        ("192.0.2.2", Health::Unhealthy),
        ("192.0.2.3", Health::Terminating),
    ] {
        let one = workload_of(
            &world,
            &format!("Kubernetes/discovery.k8s.io/EndpointSlice/shop/cart/{ip}"),
        );
        assert_eq!((one.health, one.protocol), (health, Protocol::Tcp), "{ip}");
        assert!(one.host_network, "{ip} is found through its service alone");
        assert_eq!(one.target_port(&service_of(&world, CART), 80), Some(9090));
        assert_eq!(&*one.locality.zone, if ip == "192.0.2.1" { "z1" } else { "" });
    }
    let till = workload_of(&world, "Kubernetes//Pod/shop/till");
    assert_eq!(till.protocol, Protocol::Hbone, "an enrolled pod stays what it is");
    assert_eq!(till.target_port(&service_of(&world, CART), 80), Some(9090));
    // The selector counts again once no slice is there.
    let mut gone = changes(&slice("one", endpoints));
    gone[0].object = None;
    let world = index.apply(&gone, vec![], ALL).unwrap();
    assert_eq!(selected(&world), ["cart"]);
    let service = "apiVersion: v1\nkind: Service\nmetadata: {name: cart, namespace: shop}\nspec: {ports: [{name: web, port: 80}]}\n";
    index.apply(&changes(&slice("one", "{addresses: [192.0.2.9]}")), vec![], ALL);
    let world = index.apply(&changes(service), vec![], ALL).unwrap();
    assert_eq!(selected(&world), ["192.0.2.9"], "a service without a selector");
}

#[test]
fn what_cannot_be_carried_is_refused_by_name_with_the_remedy() {
    let external = |spec: &str| {
        format!(
            "apiVersion: culvert.dev/v1alpha1\nkind: ExternalService\nmetadata: {{name: x, namespace: shop}}\nspec: {{{spec}}}\n"
        )
    };
    let workload = |spec: &str| {
        format!(
            "apiVersion: culvert.dev/v1alpha1\nkind: Workload\nmetadata: {{name: x, namespace: shop}}\nspec: {{{spec}}}\n"
        )
    };
    for (case, yaml, says) in [
        ("affinity", cart("sessionAffinity: Cookie"), "spec.sessionAffinity: \"Cookie\" is not known"),
        (
            "affinity time",
            cart("sessionAffinity: ClientIP, sessionAffinityConfig: {clientIP: {timeoutSeconds: 0}}"),
            "timeoutSeconds: 0",
        ),
        ("internal policy", cart("internalTrafficPolicy: local"), "it is one of Cluster, Local"),
        ("distribution", cart("trafficDistribution: Near"), "spec.trafficDistribution: \"Near\""),
        ("type", cart("type: Magic"), "spec.type: \"Magic\""),
        ("VIP", cart("type: ClusterIP").replace("10.96.0.1", "10.96.0"), "\"10.96.0\" is no address"),
        ("protocol", cart("type: ClusterIP").replace("port: 80,", "port: 80, protocol: QUIC,"), "\"QUIC\""),
        ("port 0", cart("type: ClusterIP").replace("port: 80,", "port: 0,"), "a port is from 1 to 65535"),
        ("pod address", pod("p", "10.0.0.300", ""), "status.podIPs: \"10.0.0.300\""),
        ("no uid", pod("p", "10.0.0.1", "").replace("uid: u-p", "uid: ''"), "metadata.uid is missing"),
        ("uid of a path", pod("p", "10.0.0.1", "").replace("uid: u-p", "uid: ../u"), "\"../u\" is no UID"),
        (
            "identity that is no SPIFFE ID",
            pod("p", "10.0.0.1", ", annotations: {culvert.dev/identity: 'https://x'}"),
            "culvert.dev/identity: not a SPIFFE ID",
        ),
        (
            "identity of another trust domain",
            pod("p", "10.0.0.1", ", annotations: {culvert.dev/identity: 'spiffe://other/x'}"),
            "is not of trust domain cluster.local",
        ),
        (
            "exclusion",
            pod("p", "10.0.0.1", ", annotations: {culvert.dev/exclude-inbound-ports: 'web'}"),
            "culvert.dev/exclude-inbound-ports: \"web\"",
        ),
        ("workload identity", workload("addresses: [10.1.1.1], identity: 'spiffe:/x'"), "spec.identity"),
        ("workload address", workload("addresses: [ten]"), "spec.addresses: \"ten\" is no address"),
        ("no address", workload("addresses: []"), "at least one"),
        ("slice of names", slice("s", "").replace("IPv4", "FQDN"), "declare names as an ExternalService"),
        ("slice family", slice("s", "{addresses: ['2001:db8::1']}"), "\"2001:db8::1\" is not of IPv4"),
        ("slice loopback", slice("s", "{addresses: [127.0.0.1]}"), "\"127.0.0.1\""),
        (
            "slice of nothing",
            slice("s", "").replace("kubernetes.io/service-name: cart", "a: b"),
            "kubernetes.io/service-name is missing",
        ),
        ("no ports", external("cidrs: [198.51.100.0/24], ports: []"), "at least one port"),
        ("no CIDR", external("cidrs: [198.51.100.0/40], ports: [443]"), "\"198.51.100.0/40\" is no address or CIDR"),
        (
            "a range of the mesh's own",
            external("cidrs: [10.1.0.0/16], ports: [443]"),
            "\"10.1.0.0/16\" overlaps the mesh's own range 10.0.0.0/8",
        ),
        (
            "t53: a name of the cluster's own",
            external("hosts: [cart.shop.svc.cluster.local], ports: [80]"),
            "the cluster's own domain",
        ),
        (
            "a policy in the mesh's own name",
            "apiVersion: culvert.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {name: profile-strict, namespace: shop}\n".to_owned(),
            "choose another",
        ),
    ] {
        let change = changes(&yaml).remove(0);
        let why = check(&change.object.unwrap(), &settings()).expect_err(case);
        assert!(why.contains(says), "{case}: {why}");
    }
}

#[test]
fn two_objects_never_hold_one_thing() {
    let other = |text: &str| text.replace("name: x,", "name: y,");
    let external = |net: &str| {
        format!(
            "apiVersion: culvert.dev/v1alpha1\nkind: ExternalService\nmetadata: {{name: x, namespace: shop}}\nspec: {{cidrs: [{net}], ports: [443]}}\n"
        )
    };
    let workload = "apiVersion: culvert.dev/v1alpha1\nkind: Workload\nmetadata: {name: x, namespace: shop}\nspec: {addresses: [10.0.0.1]}\n";
    for (case, one, two, says) in [
        (
            "one pod twice",
            pod("p", "10.0.0.1", ""),
            pod("p", "10.0.0.2", ""),
            Some("Pod shop/p is defined twice"),
        ),
        (
            "two pods, one address",
            pod("p", "10.0.0.1", ""),
            pod("q", "10.0.0.1", ""),
            Some("both hold address 10.0.0.1"),
        ),
        (
            "a pod and a workload",
            pod("p", "10.0.0.1", ""),
            workload.to_owned(),
            Some("both hold address 10.0.0.1"),
        ),
        (
            "two pods, one uid",
            pod("p", "10.0.0.1", ""),
            pod("q", "10.0.0.2", "").replace("u-q", "u-p"),
            Some("both hold metadata.uid \"u-p\""),
        ),
        (
            "a VIP that is a pod's",
            pod("p", "10.96.0.1", ""),
            cart("type: ClusterIP"),
            Some("both hold address 10.96.0.1"),
        ),
        (
            "two services, one VIP",
            cart("type: ClusterIP"),
            cart("type: ClusterIP").replace("name: cart,", "name: till,"),
            Some("both hold address 10.96.0.1"),
        ),
        (
            "ranges that overlap",
            external("198.51.100.0/24"),
            other(&external("198.51.100.128/25")),
            Some("inside 198.51.100.0/24"),
        ),
        (
            "ranges side by side",
            external("198.51.100.0/25"),
            other(&external("198.51.100.128/25")),
            None,
        ),
        (
            "ranges of two namespaces: each its own",
            external("198.51.100.0/24"),
            other(&external("198.51.100.0/24")).replace("shop", "bank"),
            None,
        ),
        (
            "a finished pod's address is free",
            pod("p", "10.0.0.1", "").replace("Running", "Failed"),
            pod("q", "10.0.0.1", ""),
            None,
        ),
    ] {
        let mut claims = Claims::default();
        for (file, yaml) in [("one.yaml", &one), ("two.yaml", &two)] {
            let change = changes(yaml).remove(0);
            let mut held = check(&change.object.unwrap(), &settings()).unwrap();
            held.push(Claim::Object(change.id.clone()));
            claims.take(file.as_ref(), 1, &change.id, &held);
        }
        let mistakes: Vec<String> = claims.contested().map(|mistake| mistake.to_string()).collect();
        match says {
            None => assert_eq!(mistakes, [""; 0], "{case}"),
            Some(says) => {
                assert_eq!(mistakes.len(), 1, "{case}: {mistakes:?}");
                assert!(mistakes[0].contains(says), "{case}: {mistakes:?}");
                assert!(
                    mistakes[0].starts_with("two.yaml:1:") && mistakes[0].contains("one.yaml:1"),
                    "{case}"
                );
                assert!(
                    mistakes[0].ends_with("remove one of them"),
                    "{case}: {mistakes:?}"
                );
            }
        }
    }
}

fn policy(name: &str, spec: &str) -> String {
    format!(
        "apiVersion: culvert.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}, namespace: shop}}\nspec: {{{spec}}}\n---\n"
    )
}

#[test]
fn a_policy_that_only_observes_takes_no_default_away() {
    for (spec, named) in [
        ("", &["culvert-system/profile-strict"][..]),
        (
            "dryRun: true",
            &["culvert-system/profile-strict", "shop/profile-own-namespace"],
        ),
        (
            "action: DENY",
            &["culvert-system/profile-strict", "shop/profile-own-namespace"],
        ),
    ] {
        let (_, world) = index(&(ENROLLED.to_owned() + &pod("cart", "10.0.0.1", "") + &policy("p", spec)));
        let cart = workload_of(&world, "Kubernetes//Pod/shop/cart");
        let policies: Vec<String> = cart.policies.iter().map(ToString::to_string).collect();
        assert_eq!(policies, named, "{spec:?}");
    }
}

/// What nodes are told of the pod: that it is captured, reached by HBONE, and refuses plaintext.
fn told_of_cart(world: &World) -> (bool, bool, bool) {
    let facts = world.pod("u-cart").unwrap();
    let protocol = workload_of(world, "Kubernetes//Pod/shop/cart").protocol;
    (
        facts.enrolled,
        protocol == Protocol::Hbone,
        facts.refuse_plaintext,
    )
}

#[test]
fn plaintext_is_refused_only_after_every_node_has_taken_hbone() {
    let plain = pod("cart", "10.0.0.1", "");
    let (mut index, _) = index(&plain);
    let state = |capture| {
        vec![Report::State {
            node: "a".into(),
            uid: "u-cart".into(),
            capture,
        }]
    };
    let look = told_of_cart;
    let world = index.apply(&changes(ENROLLED), vec![], at(1)).unwrap();
    assert_eq!(look(&world), (true, false, false), "ordered, not captured");
    let world = index.apply(&[], state(Capture::Captured), at(2)).unwrap();
    assert_eq!(
        look(&world),
        (true, true, false),
        "HBONE is published, both are taken"
    );
    assert!(index.waits());
    assert!(
        index.apply(&[], vec![], at(world.number - 1)).is_none(),
        "a node lacks it"
    );
    let world = index.apply(&[], vec![], at(world.number)).unwrap();
    assert_eq!(look(&world), (true, true, true));
    assert!(!index.waits());
    let world = index
        .apply(&changes(&ENROLLED.replace("ambient", "none")), vec![], at(0))
        .unwrap();
    assert_eq!(look(&world), (true, true, false), "both again");
    let world = index.apply(&[], vec![], at(world.number)).unwrap();
    assert_eq!(
        look(&world),
        (true, false, false),
        "plain is published, both are taken"
    );
    let world = index.apply(&[], vec![], at(world.number)).unwrap();
    assert_eq!(look(&world), (false, false, false));
}

#[test]
fn a_restart_takes_a_pod_up_where_it_was_on_its_way() {
    use Phase::{Both, In, Joining, Leaving, Opening, Out};
    let since = 7;
    let (none, captured) = (Capture::None, Capture::Captured);
    // What was recorded, what is wanted now, what the agent says; what is told at once, then after the agent's
    // word, then after every node's ACK.
    let out = (false, false, false);
    let joining = (true, false, false);
    let both = (true, true, false);
    let all = (true, true, true);
    for (recorded, mode, says, steps) in [
        (Some(Joining), "ambient", none, [joining, joining, joining]),
        (Some(Joining), "ambient", captured, [joining, both, all]),
        (Some(Both { since }), "ambient", captured, [both, both, all]),
        (Some(In), "ambient", captured, [all, all, all]),
        (Some(Out), "ambient", captured, [joining, both, all]),
        (Some(In), "none", captured, [both, both, joining]),
        (Some(Opening { since }), "none", captured, [both, both, joining]),
        (Some(Leaving { since }), "none", captured, [joining, joining, out]),
        (Some(Out), "none", none, [out, out, out]),
        (None, "ambient", none, [all, all, all]),
        (None, "none", none, [out, out, out]),
    ] {
        let case = format!("{recorded:?} {mode} {says:?}");
        let first = 1000;
        let recorded = recorded.map(|phase| ("u-cart".to_owned(), phase));
        let mut index = Index::new(settings(), first, recorded.into_iter().collect());
        let objects = ENROLLED.replace("ambient", mode) + &pod("cart", "10.0.0.1", "");
        // Nodes come back, and have taken nothing yet.
        let mut world = index.apply(&changes(&objects), vec![], at(0)).unwrap();
        let mut told = vec![told_of_cart(&world)];
        let state = Report::State {
            node: "a".into(),
            uid: "u-cart".into(),
            capture: says,
        };
        for (reports, taken) in [(vec![state], at(0)), (vec![], ALL)] {
            world = index.apply(&[], reports, taken).unwrap_or(world);
            told.push(told_of_cart(&world));
        }
        assert_eq!(told, steps, "{case}");
    }
}

#[test]
fn what_a_restart_needs_is_named_when_it_changes() {
    let (mut index, _) = index(&pod("cart", "10.0.0.1", ""));
    let named = |index: &mut Index| {
        let moved = index.moved().into_iter();
        moved
            .map(|(uid, phase)| (uid, phase.map(Phase::name)))
            .collect::<Vec<_>>()
    };
    let of = |phase| vec![("u-cart".to_owned(), phase)];
    assert_eq!(named(&mut index), of(Some("out")));
    index.apply(&changes(ENROLLED), vec![], at(0)).unwrap();
    assert_eq!(named(&mut index), of(Some("joining")));
    index.apply(&[], vec![], at(0));
    assert_eq!(named(&mut index), []);
    let mut gone = changes(&pod("cart", "10.0.0.1", ""));
    gone[0].object = None;
    index.apply(&gone, vec![], at(0)).unwrap();
    assert_eq!(named(&mut index), of(None));
    let left = [("u-old".to_owned(), Phase::In)].into();
    let mut later = Index::new(settings(), 1000, left);
    later.apply(&changes(ENROLLED), vec![], at(0)).unwrap();
    assert_eq!(
        named(&mut later),
        [("u-old".to_owned(), None)],
        "no object has it any more"
    );
}

#[test]
fn after_a_restart_a_pod_stays_healthy_until_its_agent_says_otherwise() {
    let (mut index, world) =
        index(&(ENROLLED.to_owned() + &pod("cart", "10.0.0.1", "") + &pod("new", "10.0.0.2", "")));
    let health =
        |world: &World, name: &str| workload_of(world, &format!("Kubernetes//Pod/shop/{name}")).health;
    assert_eq!(health(&world, "cart"), Health::Ready);
    let hello = Report::Hello {
        node: "a".into(),
        uids: vec!["u-cart".into()],
    };
    let world = index.apply(&[], vec![hello], ALL).unwrap();
    assert_eq!(
        health(&world, "cart"),
        Health::Ready,
        "its agent knows it and will say"
    );
    assert_eq!(
        health(&world, "new"),
        Health::Unhealthy,
        "its agent has never met it"
    );
    let broken = Report::State {
        node: "a".into(),
        uid: "u-cart".into(),
        capture: Capture::Broken,
    };
    let world = index.apply(&[], vec![broken], ALL).unwrap();
    assert_eq!(health(&world, "cart"), Health::Unhealthy);
    let cart = workload_of(&world, "Kubernetes//Pod/shop/cart");
    assert_eq!(cart.protocol, Protocol::Hbone, "never downgraded");
}

/// A small generator: the same numbers on every run.
pub(crate) struct Dice(pub u64);

impl Dice {
    pub fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (self.0 >> 33) % sides
    }

    fn pick<'t>(&mut self, from: &[&'t str]) -> &'t str {
        from[self.roll(from.len() as u64) as usize]
    }
}

pub(crate) fn random_change(dice: &mut Dice) -> Change {
    let label = ["a", "b"];
    let name = format!("n{}", dice.roll(6));
    let text = match dice.roll(9) {
        0 => format!(
            "apiVersion: v1\nkind: Namespace\nmetadata: {{name: {}, labels: {{culvert.dev/dataplane-mode: {}}}}}\n",
            dice.pick(&["shop", "bank"]),
            dice.pick(&["ambient", "none"])
        ),
        1 => format!(
            "apiVersion: v1\nkind: Node\nmetadata: {{name: {}, labels: {{topology.kubernetes.io/zone: {}}}}}\n",
            dice.pick(&["a", "b"]),
            dice.pick(&["z1", "z2"])
        ),
        2 | 3 => format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop, uid: u-{name}-{}, labels: {{app: {}, tier: {}}}}}\n\
             spec: {{nodeName: {}}}\nstatus: {{podIPs: [{{ip: 10.0.0.{}}}], conditions: [{{type: Ready, status: '{}'}}]}}\n",
            dice.roll(2),
            dice.pick(&label),
            dice.pick(&label),
            dice.pick(&["a", "b"]),
            name.trim_start_matches('n'),
            dice.pick(&["True", "False"]),
        ),
        4 => format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\nspec: {{selector: {}, ports: [{{name: w, port: 80}}]}}\n",
            dice.pick(&["{}", "{app: a}", "{app: b, tier: a}"])
        ),
        5 => format!(
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: {name}, namespace: shop, labels: {{kubernetes.io/service-name: n{}}}}}\n\
             addressType: IPv4\nports: [{{name: w, port: {}}}]\nendpoints: [{{addresses: [10.0.0.{}, 192.0.2.{}]}}]\n",
            dice.roll(3),
            80 + dice.roll(2),
            dice.roll(6),
            dice.roll(3)
        ),
        6 | 7 => format!(
            "apiVersion: culvert.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}, namespace: {}}}\nspec: {{{}direction: {}, action: {}}}\n",
            dice.pick(&["shop", "bank", "culvert-system"]),
            dice.pick(&[
                "",
                "selector: {matchLabels: {app: a}}, ",
                "selector: {matchLabels: {tier: b, app: b}}, "
            ]),
            dice.pick(&["Inbound", "Outbound"]),
            dice.pick(&["ALLOW", "DENY"])
        ),
        _ => format!(
            "apiVersion: culvert.dev/v1alpha1\nkind: PeerAuthentication\nmetadata: {{name: {name}, namespace: {}}}\nspec: {{{}mtls: {{mode: {}}}{}}}\n",
            dice.pick(&["shop", "culvert-system"]),
            dice.pick(&["", "selector: {matchLabels: {tier: a}}, "]),
            dice.pick(&["STRICT", "PERMISSIVE"]),
            dice.pick(&["", ", portLevelMtls: {80: {mode: PERMISSIVE}}"])
        ),
    };
    let mut change = changes(&text).remove(0);
    if dice.roll(3) == 0 {
        change.object = None;
    }
    change
}

/// Everything of a world that is served, in an order of its own.
fn content(world: &World) -> Vec<String> {
    let mut all: Vec<String> = (0..4)
        .flat_map(|of| world.all(of).map(move |resource| format!("{of} {resource:?}")))
        .collect();
    for resource in world.all(ADDRESS) {
        for alias in resource.aliases() {
            let names: Vec<_> = world.aliased(alias).collect();
            all.push(format!("alias {alias} {names:?}"));
        }
        let endpoints: Vec<_> = world.endpoints(&resource.name).collect();
        all.push(format!("endpoints of {} {endpoints:?}", resource.name));
    }
    for node in ["a", "b"] {
        all.push(format!("on {node} {:?}", world.on_node(node).collect::<Vec<_>>()));
        all.extend(world.pods_on(node).map(|pod| format!("{pod:?}")));
    }
    all.sort();
    all
}

#[test]
fn f47_what_is_kept_up_by_changes_is_what_is_built_from_scratch() {
    let mut dice = Dice(7);
    let mut kept = Index::new(settings(), 0, BTreeMap::new());
    let mut objects = Objects::default();
    let mut world = kept.apply(&[], vec![], ALL).unwrap();
    for round in 0..1_500 {
        let batch: Vec<Change> = (0..1 + dice.roll(3)).map(|_| random_change(&mut dice)).collect();
        for change in &batch {
            objects.apply(change);
        }
        // Agents and nodes follow at once, so that every pod is in or out.
        let mut reports = vec![];
        for pod in objects.pods.values() {
            reports.push(Report::State {
                node: pod.spec.node_name.clone(),
                uid: pod.metadata.uid.clone(),
                capture: Capture::Captured,
            });
        }
        let mut next = kept.apply(&batch, vec![], ALL);
        loop {
            match next {
                Some(changed) => world = changed,
                None if reports.is_empty() => break,
                None => {}
            }
            next = kept.apply(&[], std::mem::take(&mut reports), ALL);
        }
        if round % 10 != 0 {
            continue;
        }
        let mut all = vec![];
        macro_rules! put {
            ($($map:ident $kind:ident),*) => {$(
                for (key, object) in &objects.$map {
                    let id = crate::watch::objects::ObjectId {
                        kind: crate::watch::objects::Kind::$kind,
                        key: key.clone(),
                    };
                    all.push(Change { id, object: Some(Object::$kind(object.clone())) });
                }
            )*};
        }
        // Another order than the one in which they came.
        put!(policies AuthorizationPolicy, peer_authentications PeerAuthentication, slices EndpointSlice,
             services Service, pods Pod, nodes Node, namespaces Namespace);
        let scratch = Index::new(settings(), 0, BTreeMap::new())
            .apply(&all, vec![], ALL)
            .unwrap();
        let (kept, scratch) = (content(&world), content(&scratch));
        for (kept, scratch) in kept.iter().zip(&scratch) {
            assert_eq!(kept, scratch, "round {round}");
        }
        assert_eq!(kept.len(), scratch.len(), "round {round}");
    }
}
