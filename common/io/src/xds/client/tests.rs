//! The client against scripted responses: what it takes, refuses, answers and keeps.

use super::*;
use culvert_core::{ids::NetworkId, policy::Action};
use culvert_proto::{discovery::DeltaDiscoveryResponse, security, workload as wire};
use prost::Message;

fn client(mode: Mode) -> Client {
    let control = Control {
        address: "https://127.0.0.1:15012".into(),
        bundle: "/nowhere".into(),
        name: "control.example".into(),
        token: "/nowhere".into(),
    };
    let (lookups, _) = mpsc::channel(1);
    let shared = Arc::new(Shared {
        snapshot: ArcSwap::default(),
        generation: watch::Sender::new(0),
        ready: watch::Sender::new(false),
        lookups,
        stats: Stats::default(),
        heard: Mutex::default(),
    });
    Client {
        settings: Settings {
            control,
            node: "a".into(),
            mode,
            state: None,
        },
        shared,
        snapshot: Snapshot::default(),
        types: TYPES.map(|url| (url, TypeState::default())).into(),
        shared_names: decode::Shared::default(),
        questions: Questions::default(),
        source: None,
        recorder: None,
    }
}

fn pod(uid: &str, ip: [u8; 4]) -> Resource {
    let workload = wire::Workload {
        uid: uid.into(),
        namespace: "shop".into(),
        addresses: vec![ip.to_vec().into()],
        ..wire::Workload::default()
    };
    resource(
        uid,
        &wire::Address {
            r#type: Some(wire::address::Type::Workload(workload)),
        },
    )
}

fn resource(name: &str, message: &impl Message) -> Resource {
    let any = prost_types::Any {
        type_url: String::new(),
        value: message.encode_to_vec(),
    };
    Resource {
        name: name.into(),
        version: "1".into(),
        resource: Some(any),
        ..Resource::default()
    }
}

fn response(version: &str, url: &str, resources: Vec<Resource>, removed: &[&str]) -> DeltaDiscoveryResponse {
    DeltaDiscoveryResponse {
        system_version_info: version.into(),
        type_url: url.into(),
        nonce: "7".into(),
        resources,
        removed_resources: removed.iter().map(|name| (*name).to_owned()).collect(),
        control_plane: None,
    }
}

fn refusal(answer: &DeltaDiscoveryRequest) -> &str {
    answer
        .error_detail
        .as_ref()
        .map(|status| status.message.as_str())
        .unwrap_or_default()
}

#[test]
fn t53_an_older_view_of_the_same_source_is_refused_and_changes_nothing() {
    let mut client = client(Mode::Wildcard);
    let first = client.take(response(
        "uid/9",
        type_url::ADDRESS,
        vec![pod("w", [10, 0, 0, 1])],
        &[],
    ));
    assert_eq!((refusal(&first), first.response_nonce.as_str()), ("", "7"));
    let older = client.take(response(
        "uid/8",
        type_url::ADDRESS,
        vec![pod("x", [10, 0, 0, 2])],
        &["w"],
    ));
    assert!(refusal(&older).contains("older"), "{older:?}");
    assert_eq!(client.shared.snapshot.load().workload_count(), 1);
    assert!(client.shared.snapshot.load().workload(&"w".into()).is_some());
    // Another source counts for itself.
    let other = client.take(response(
        "new/1",
        type_url::ADDRESS,
        vec![pod("x", [10, 0, 0, 2])],
        &[],
    ));
    assert_eq!(
        (refusal(&other), client.shared.snapshot.load().workload_count()),
        ("", 2)
    );
}

#[test]
fn t53_f45_absence_deletes_nothing_and_removal_does() {
    let mut client = client(Mode::Wildcard);
    client.take(response(
        "uid/1",
        type_url::ADDRESS,
        vec![pod("w", [10, 0, 0, 1]), pod("x", [10, 0, 0, 2])],
        &[],
    ));
    client.take(response("uid/2", type_url::ADDRESS, vec![], &[]));
    assert_eq!(client.shared.snapshot.load().workload_count(), 2);
    client.take(response("uid/3", type_url::ADDRESS, vec![], &["w"]));
    assert_eq!(client.shared.snapshot.load().workload_count(), 1);
}

#[test]
fn a_bad_resource_is_named_the_good_ones_apply_and_the_last_good_stays() {
    let mut client = client(Mode::Wildcard);
    client.take(response(
        "uid/1",
        type_url::ADDRESS,
        vec![pod("w", [10, 0, 0, 1])],
        &[],
    ));
    let mut bad = pod("w", [10, 0, 0, 9]);
    bad.resource = Some(prost_types::Any {
        type_url: String::new(),
        value: vec![0xff; 7],
    });
    let answer = client.take(response(
        "uid/2",
        type_url::ADDRESS,
        vec![bad, pod("x", [10, 0, 0, 2])],
        &[],
    ));
    assert!(refusal(&answer).starts_with("w: "), "{answer:?}");
    let snapshot = client.shared.snapshot.load();
    let kept = snapshot.workload(&"w".into()).unwrap();
    assert_eq!(kept.addresses[0].to_string(), "10.0.0.1");
    assert!(snapshot.workload(&"x".into()).is_some());
    let held = client.first_request(type_url::ADDRESS).initial_resource_versions;
    assert_eq!(
        held.len(),
        2,
        "a resource that was refused is held as it was before"
    );
}

#[test]
fn t06_a_policy_with_an_unknown_field_is_installed_as_one_that_denies() {
    let mut client = client(Mode::Wildcard);
    let policy = security::Authorization {
        name: "p".into(),
        namespace: "shop".into(),
        ..Default::default()
    };
    let mut one = resource("shop/p", &policy);
    // Field 99 of a newer control plane.
    one.resource.as_mut().unwrap().value.extend([0x98, 0x06, 0x01]);
    let answer = client.take(response("uid/1", type_url::AUTHORIZATION, vec![one], &[]));
    assert_eq!(refusal(&answer), "");
    let snapshot = client.shared.snapshot.load();
    let installed = snapshot.inbound.get(&"shop/p".parse().unwrap()).unwrap();
    assert!(installed.defect.is_some() && installed.action == Action::Deny);
}

#[test]
fn it_is_ready_once_every_type_has_been_listed_even_empty() {
    let mut client = client(Mode::OnDemand);
    for (index, url) in TYPES.into_iter().enumerate() {
        assert!(!*client.shared.ready.borrow(), "{index} of 4");
        client.take(response("uid/1", url, vec![], &[]));
    }
    assert!(*client.shared.ready.borrow());
}

#[test]
fn an_address_is_asked_for_once_and_nothing_there_is_an_answer() {
    let mut client = client(Mode::OnDemand);
    let at = NetworkAddress {
        network: NetworkId::from(""),
        ip: "10.0.0.9".parse().unwrap(),
    };
    let asked = client.ask(Question::Address(at.clone())).unwrap();
    assert_eq!(asked.resource_names_subscribe, ["/10.0.0.9"]);
    assert!(client.ask(Question::Address(at.clone())).is_none(), "once");
    client.take(response("uid/1", type_url::ADDRESS, vec![], &["/10.0.0.9"]));
    assert!(Question::Address(at).is_answered(&client.shared.snapshot.load()));
    // After a reconnect it is still subscribed.
    assert!(
        client
            .first_request(type_url::ADDRESS)
            .resource_names_subscribe
            .contains(&"/10.0.0.9".to_owned())
    );
}

#[test]
fn a_type_that_was_not_asked_for_is_refused() {
    let mut client = client(Mode::Wildcard);
    let answer = client.take(response(
        "uid/1",
        "type.googleapis.com/envoy.config.cluster.v3.Cluster",
        vec![],
        &[],
    ));
    assert!(refusal(&answer).contains("not asked for"));
}

fn service(namespace: &str, vip: [u8; 4]) -> Resource {
    let service = wire::Service {
        name: "cart".into(),
        namespace: namespace.into(),
        hostname: "cart.example".into(),
        addresses: vec![wire::NetworkAddress {
            network: String::new(),
            address: vip.to_vec(),
            length: None,
        }],
        ..wire::Service::default()
    };
    let message = wire::Address {
        r#type: Some(wire::address::Type::Service(service)),
    };
    resource(&format!("{namespace}/cart.example"), &message)
}

#[test]
fn t53_f45_whatever_control_says_the_last_good_view_stays() {
    let mut client = client(Mode::Wildcard);
    client.take(response(
        "uid/5",
        type_url::ADDRESS,
        vec![pod("w", [10, 0, 0, 1])],
        &[],
    ));
    let half = |name: &str| {
        let mut half = pod(name, [10, 0, 0, 9]);
        half.resource.as_mut().unwrap().value.pop();
        half
    };
    let under_another_name = Resource {
        name: "w".into(),
        ..pod("hostile", [10, 0, 0, 1])
    };
    let empty = Resource {
        resource: None,
        ..pod("w", [10, 0, 0, 9])
    };
    for (case, version, resources, removed, says) in [
        ("half of a resource", "uid/6", vec![half("w")], &[][..], "w: "),
        (
            "under another's name",
            "uid/6",
            vec![under_another_name],
            &[],
            "under that name comes \"hostile\"",
        ),
        ("without content", "uid/6", vec![empty], &[], "w: "),
        ("older", "uid/4", vec![pod("w", [10, 0, 0, 9])], &["w"], "older"),
        (
            "huge and wrong",
            "uid/6",
            (0..10_000).map(|_| half("w")).collect(),
            &[],
            "and 9980 more",
        ),
        ("empty", "uid/6", vec![], &[], ""),
        ("a removal of what never was", "uid/6", vec![], &["nobody"], ""),
    ] {
        let answer = client.take(response(version, type_url::ADDRESS, resources, removed));
        assert!(refusal(&answer).contains(says), "{case}: {answer:?}");
        assert_eq!(refusal(&answer).is_empty(), says.is_empty(), "{case}");
        assert!(refusal(&answer).len() < 10_000, "{case}: a NACK stays short");
        let snapshot = client.shared.snapshot.load();
        let kept = snapshot.workload(&"w".into()).unwrap_or_else(|| panic!("{case}"));
        assert_eq!(
            (snapshot.workload_count(), kept.addresses[0].to_string()),
            (1, "10.0.0.1".to_owned()),
            "{case}"
        );
    }
    // Flapping between two views: each newer one is taken, none of the older ones.
    for turn in 0..100u8 {
        let (new, old) = (
            format!("uid/{}", 10 + u32::from(turn)),
            format!("uid/{}", 9 + u32::from(turn)),
        );
        let taken = client.take(response(
            &new,
            type_url::ADDRESS,
            vec![pod("w", [10, 0, 1, turn])],
            &[],
        ));
        let late = client.take(response(&old, type_url::ADDRESS, vec![], &["w"]));
        assert_eq!(
            (refusal(&taken), refusal(&late).is_empty()),
            ("", false),
            "turn {turn}"
        );
        let snapshot = client.shared.snapshot.load();
        let kept = snapshot.workload(&"w".into()).unwrap();
        assert_eq!(kept.addresses[0].to_string(), format!("10.0.1.{turn}"));
    }
}

#[test]
fn t53_a_name_that_two_namespaces_claim_is_its_owners() {
    let mut client = client(Mode::Wildcard);
    let both = vec![service("evil", [10, 96, 0, 1]), service("shop", [10, 96, 0, 1])];
    client.take(response("uid/1", type_url::ADDRESS, both, &[]));
    let snapshot = client.shared.snapshot.load();
    let vip = NetworkAddress {
        network: NetworkId::from(""),
        ip: "10.96.0.1".parse().unwrap(),
    };
    for namespace in ["shop", "evil"] {
        let by_name = snapshot.service_named("cart.example", namespace).unwrap();
        assert_eq!(by_name.namespace(), namespace);
        match snapshot.lookup(&vip, namespace) {
            culvert_core::snapshot::Lookup::Service(service) => assert_eq!(service.namespace(), namespace),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_service_that_was_asked_for_and_goes_is_answered_with_nothing() {
    let mut client = client(Mode::OnDemand);
    let question = Question::Service("shop/cart.example".parse().unwrap());
    client.ask(question.clone()).unwrap();
    client.take(response(
        "uid/1",
        type_url::ADDRESS,
        vec![service("shop", [10, 96, 0, 1])],
        &[],
    ));
    client.take(response(
        "uid/2",
        type_url::ADDRESS,
        vec![],
        &["shop/cart.example"],
    ));
    assert!(question.is_answered(&client.shared.snapshot.load()));
}

#[test]
fn f44_the_next_process_takes_up_what_the_last_one_knew() {
    let folder = tempfile::tempdir().unwrap();
    let mut before = client(Mode::OnDemand);
    let recorder = Recorder::default();
    before.recorder = Some(recorder.clone());
    let asked = |ip: [u8; 4]| {
        Question::Address(NetworkAddress {
            network: NetworkId::from(""),
            ip: std::net::IpAddr::from(ip),
        })
    };
    let (known, stranger) = (asked([10, 0, 0, 1]), asked([192, 0, 2, 7]));
    before.ask(known.clone());
    before.ask(stranger.clone());
    let resources = vec![pod("w", [10, 0, 0, 1]), pod("x", [10, 0, 0, 2])];
    before.take(response("uid/9", type_url::ADDRESS, resources, &["/192.0.2.7"]));
    before.take(response("uid/9", type_url::ADDRESS, vec![], &["x"]));
    recorder.write_now(folder.path()).unwrap();

    let mut after = client(Mode::OnDemand);
    after.restore(last_good::load(folder.path(), SystemTime::now()).unwrap());
    let snapshot = after.shared.snapshot.load_full();
    assert!(*after.shared.ready.borrow());
    assert_eq!(snapshot.workload_count(), 1);
    assert!(known.is_answered(&snapshot) && stranger.is_answered(&snapshot));
    let first = after.first_request(type_url::ADDRESS);
    assert_eq!(first.initial_resource_versions.keys().collect::<Vec<_>>(), ["w"]);
    let mut names = first.resource_names_subscribe;
    names.sort();
    assert_eq!(names, ["*", "/10.0.0.1", "/192.0.2.7"]);
    // An older view of the same source is refused after a restart, too.
    let older = after.take(response("uid/8", type_url::ADDRESS, vec![], &["w"]));
    assert!(refusal(&older).contains("older"), "{older:?}");
    assert!(Discovery(after.shared.clone()).config_age().is_some());
}
