//! A target for each decoder of what comes from others, of those that other crates can call. DNS messages
//! have theirs beside ztunnel's decoder, signing requests and objects beside control's.
#![expect(clippy::unwrap_used, reason = "a test fails where it stands")]

use std::net::{IpAddr, Ipv4Addr};

use culvert_core::hbone::{Baggage, Connect, Forwarded, Traceparent};
use culvert_core::ids::{SpiffeId, TrustDomain};
use culvert_core::policy::{self, Denial, PeerPlace, Policy, Verdict};
use culvert_core::snapshot::{Change, Snapshot};
use culvert_fuzz::{fuzz, kind, seed};
use culvert_io::tls::Svid;
use culvert_io::xds::decode::decode;
use culvert_io::xds::walker;
use culvert_proto::agent::{FromAgent, FromZtunnel};
use culvert_proto::{mesh, security, type_url, workload};
use http::{HeaderName, HeaderValue, Method, Request};
use prost::Message;
use rcgen::{CertificateParams, IsCa, KeyPair, KeyUsagePurpose, SanType};
use rustls_pki_types::CertificateDer;

/// The head that HTTP/2 would hand over: an authority, then `name: value` lines.
fn head(input: &[u8]) -> Option<http::request::Parts> {
    let mut lines = input.split(|byte| *byte == b'\n');
    let uri = std::str::from_utf8(lines.next()?).ok()?;
    let mut request = Request::builder()
        .method(Method::CONNECT)
        .uri(uri)
        .body(())
        .ok()?;
    for line in lines {
        let colon = line.iter().position(|byte| *byte == b':')?;
        let name = HeaderName::from_bytes(&line[..colon]).ok()?;
        let value = HeaderValue::from_bytes(line[colon + 1..].trim_ascii()).ok()?;
        request.headers_mut().append(name, value);
    }
    Some(request.into_parts().0)
}

#[test]
fn fuzz_connect_head() {
    let outcomes = fuzz("connect_head", 40_000, |input| {
        let Some(head) = head(input) else {
            return "no head".into();
        };
        match Connect::decode(&head) {
            Ok(connect) => {
                let again = connect.encode().unwrap().into_parts().0;
                let again = Connect::decode(&again).unwrap();
                assert_eq!(
                    again.authority, connect.authority,
                    "it says where to as it was said"
                );
                format!(
                    "{} {} {}",
                    connect.forwarded.source.is_some(),
                    connect.forwarded.host.is_some(),
                    connect.traceparent.is_some()
                )
            }
            Err(error) => kind(&error),
        }
    });
    assert!(outcomes > 5, "{outcomes} outcomes");
}

fn value(input: &[u8]) -> Option<HeaderValue> {
    HeaderValue::from_bytes(input).ok()
}

#[test]
fn fuzz_baggage() {
    fuzz("baggage", 40_000, |input| {
        let mut headers = http::HeaderMap::new();
        for part in input.split(|byte| *byte == b'\n') {
            let Some(value) = value(part) else {
                return "no header".into();
            };
            headers.append("baggage", value);
        }
        let read = Baggage::decode(&headers);
        let Some(written) = read.encode() else {
            return "empty".into();
        };
        let once = http::HeaderMap::from_iter([(HeaderName::from_static("baggage"), written)]);
        assert_eq!(Baggage::decode(&once), read, "what is passed on is what was read");
        "read".into()
    });
}

#[test]
fn fuzz_forwarded() {
    let outcomes = fuzz("forwarded", 40_000, |input| {
        let Some(value) = value(input) else {
            return "no header".into();
        };
        let read = Forwarded::decode(&value);
        if let Some(written) = read.encode() {
            assert_eq!(Forwarded::decode(&written), read);
        }
        format!("{} {}", read.source.is_some(), read.host.is_some())
    });
    assert_eq!(outcomes, 5);
}

#[test]
fn fuzz_traceparent() {
    let outcomes = fuzz("traceparent", 40_000, |input| {
        let Some(value) = value(input) else {
            return "no header".into();
        };
        match Traceparent::decode(&value) {
            Some(read) => {
                assert_eq!(Traceparent::decode(&read.encode()), Some(read));
                "read".into()
            }
            None => "replaced".into(),
        }
    });
    assert_eq!(outcomes, 3);
}

#[test]
fn fuzz_spiffe_id() {
    let outcomes = fuzz("spiffe_id", 40_000, |input| {
        let Ok(text) = std::str::from_utf8(input) else {
            return "no text".into();
        };
        match text.parse::<SpiffeId>() {
            Ok(id) => {
                assert_eq!(id.as_str(), text, "an ID is what it was, letter by letter");
                assert!(text.len() <= 2048 && text.is_ascii());
                id.trust_domain().parse::<TrustDomain>().unwrap();
                assert_eq!(format!("spiffe://{}", id.principal()), text);
                "read".into()
            }
            Err(error) => kind(&error),
        }
    });
    assert!(outcomes > 4, "{outcomes} outcomes");
}

/// Leaves of several kinds: one as it must be, and some that must be refused.
fn certificates() -> Vec<(&'static str, Vec<u8>)> {
    let certificate = |names: Vec<SanType>, ca: IsCa| {
        let mut params = CertificateParams::default();
        params.subject_alt_names = names;
        params.is_ca = ca;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        let key = KeyPair::generate().unwrap();
        params.self_signed(&key).unwrap().der().to_vec()
    };
    let uri = |text: &str| SanType::URI(text.try_into().unwrap());
    let web = "spiffe://cluster.local/ns/shop/sa/web";
    let ip = SanType::IpAddress(Ipv4Addr::LOCALHOST.into());
    let dns = SanType::DnsName("web.shop".try_into().unwrap());
    vec![
        ("svid", certificate(vec![uri(web)], IsCa::ExplicitNoCa)),
        ("with-dns", certificate(vec![uri(web), dns], IsCa::ExplicitNoCa)),
        (
            "two-uris",
            certificate(vec![uri(web), uri("spiffe://other/x")], IsCa::ExplicitNoCa),
        ),
        ("with-ip", certificate(vec![uri(web), ip], IsCa::ExplicitNoCa)),
        ("no-name", certificate(vec![], IsCa::ExplicitNoCa)),
        ("no-constraints", certificate(vec![uri(web)], IsCa::NoCa)),
        (
            "https",
            certificate(vec![uri("https://cluster.local/x")], IsCa::ExplicitNoCa),
        ),
    ]
}

#[test]
fn fuzz_certificate_sans() {
    for (name, der) in certificates() {
        seed("certificate_sans", name, &der);
    }
    let key = KeyPair::generate().unwrap().serialize_der();
    let outcomes = fuzz("certificate_sans", 20_000, |input| {
        let key = rustls_pki_types::PrivateKeyDer::try_from(key.clone()).unwrap();
        let leaf = CertificateDer::from(input.to_vec());
        match culvert_io::tls::leaf_identity(&leaf) {
            Ok(id) => {
                id.as_str().parse::<SpiffeId>().unwrap();
                // Somebody else's key makes no SVID of it.
                let error = Svid::from_der(vec![leaf], &key).unwrap_err();
                format!("identity, {}", kind(&error))
            }
            Err(error) => kind(&error),
        }
    });
    assert!(outcomes > 6, "{outcomes} outcomes");
}

fn full_policy() -> security::Authorization {
    use security::string_match::MatchType;
    let text = |kind| {
        vec![security::StringMatch {
            match_type: Some(kind),
        }]
    };
    let net = |a| {
        vec![security::Address {
            address: vec![10, 0, 0, a],
            length: 32,
        }]
    };
    let account = || {
        vec![security::ServiceAccountMatch {
            namespace: "shop".into(),
            service_account: "web".into(),
        }]
    };
    let one = security::Match {
        namespaces: text(MatchType::Exact("shop".into())),
        not_namespaces: text(MatchType::Presence(())),
        principals: text(MatchType::Prefix("cluster.local/".into())),
        not_principals: text(MatchType::Suffix("/root".into())),
        source_ips: net(1),
        not_source_ips: net(2),
        destination_ips: net(3),
        not_destination_ips: net(4),
        destination_ports: vec![8080],
        not_destination_ports: vec![22],
        service_accounts: account(),
        not_service_accounts: account(),
        extensions: vec![],
    };
    security::Authorization {
        name: "full".into(),
        namespace: "shop".into(),
        scope: 1,
        action: 0,
        rules: vec![security::Rule {
            clauses: vec![security::Clause { matches: vec![one] }],
        }],
        dry_run: false,
        extensions: vec![],
    }
}

/// A connection that a policy may allow or deny.
fn judged(policy: &Policy) -> Verdict {
    let identity: SpiffeId = "spiffe://cluster.local/ns/shop/sa/web".parse().unwrap();
    let connection = policy::Connection {
        identity: Some(&identity),
        place: PeerPlace::Known {
            namespace: "shop",
            service_account: "web",
        },
        source_ip: IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1)),
        destination_ip: IpAddr::V4(Ipv4Addr::new(10, 0, 0, 3)),
        destination_port: 8080,
    };
    policy::judge([policy].into_iter(), &connection).verdict
}

/// What is not read whole denies (settled D19).
fn policy_target(input: &[u8], url: &str, shape: &walker::Shape) -> String {
    let (Change::Policy(policy) | Change::OutboundPolicy(policy)) = (match decode(url, input) {
        Ok(change) => change,
        Err(error) => return kind(&error),
    }) else {
        panic!("another change");
    };
    let verdict = judged(&policy);
    if walker::unknown_field(input, shape).is_some() {
        assert!(policy.defect.is_some(), "a field that is not known makes it deny");
    }
    if policy.defect.is_some() {
        assert!(matches!(verdict, Verdict::Deny(Denial::Defective(_))));
        return "defective".into();
    }
    format!("{:?} {verdict:.8?}", policy.action)
}

#[test]
fn fuzz_policy() {
    let full = full_policy();
    seed("policy", "full", &full.encode_to_vec());
    let mut wide = full.clone();
    wide.rules[0].clauses[0].matches[0] = security::Match {
        destination_ports: vec![8080],
        ..security::Match::default()
    };
    seed("policy", "wide", &wide.encode_to_vec());
    wide.action = 1;
    seed("policy", "deny", &wide.encode_to_vec());
    // Field 99 in a match, and at the top.
    seed(
        "policy",
        "unknown",
        &[&full.encode_to_vec()[..], &[0x98, 0x06, 1]].concat(),
    );
    let outcomes = fuzz("policy", 40_000, |input| {
        policy_target(input, type_url::AUTHORIZATION, walker::AUTHORIZATION)
    });
    assert!(outcomes > 4, "{outcomes} outcomes");
}

#[test]
fn fuzz_outbound_policy() {
    use security::string_match::MatchType;
    let rule = mesh::OutboundRule {
        namespaces: vec![security::StringMatch {
            match_type: Some(MatchType::Exact("bank".into())),
        }],
        ports: vec![443],
        ..mesh::OutboundRule::default()
    };
    let policy = mesh::OutboundPolicy {
        name: "no-bank".into(),
        namespace: "shop".into(),
        action: 1,
        rules: vec![rule],
        ..mesh::OutboundPolicy::default()
    };
    seed("outbound_policy", "deny", &policy.encode_to_vec());
    fuzz("outbound_policy", 40_000, |input| {
        policy_target(input, type_url::OUTBOUND_POLICY, walker::OUTBOUND_POLICY)
    });
}

fn workload_seed() -> workload::Workload {
    workload::Workload {
        uid: "Kubernetes//Pod/shop/web".into(),
        name: "web".into(),
        namespace: "shop".into(),
        addresses: vec![vec![10, 1, 0, 2].into(), vec![0xfd; 16].into()],
        tunnel_protocol: 1,
        trust_domain: "cluster.local".into(),
        service_account: "web".into(),
        node: "a".into(),
        services: [(
            "shop/web.shop.svc.cluster.local".to_owned(),
            workload::PortList {
                ports: vec![workload::Port {
                    service_port: 80,
                    target_port: 8080,
                    app_protocol: 0,
                }],
            },
        )]
        .into(),
        authorization_policies: vec!["shop/full".into()],
        ..workload::Workload::default()
    }
}

fn service_seed() -> workload::Service {
    workload::Service {
        name: "web".into(),
        namespace: "shop".into(),
        hostname: "web.shop.svc.cluster.local".into(),
        addresses: vec![workload::NetworkAddress {
            network: String::new(),
            address: vec![10, 96, 0, 1],
            length: None,
        }],
        ports: vec![workload::Port {
            service_port: 80,
            target_port: 8080,
            app_protocol: 0,
        }],
        load_balancing: Some(workload::LoadBalancing {
            routing_preference: vec![6, 1, 2],
            mode: 2,
            health_policy: 0,
        }),
        subject_alt_names: vec!["spiffe://cluster.local/ns/shop/sa/other".into()],
        canonical: true,
        ..workload::Service::default()
    }
}

#[test]
fn fuzz_xds_resources() {
    use workload::address::Type;
    let address = |one: Type| workload::Address { r#type: Some(one) }.encode_to_vec();
    seed(
        "xds_address",
        "workload",
        &address(Type::Workload(workload_seed())),
    );
    seed("xds_address", "service", &address(Type::Service(service_seed())));
    let mut range = service_seed();
    range.addresses[0].length = Some(24);
    seed("xds_address", "range", &address(Type::Service(range)));
    let outcomes = fuzz("xds_address", 40_000, |input| {
        match decode(type_url::ADDRESS, input) {
            Ok(change) => {
                let mut snapshot = Snapshot::default();
                let clone = decode(type_url::ADDRESS, input).unwrap();
                snapshot.apply(change);
                // Said twice is said once.
                snapshot.apply(clone);
                assert_eq!(snapshot.workload_count() + snapshot.service_count(), 1);
                format!("{} workloads", snapshot.workload_count())
            }
            Err(error) => kind(&error),
        }
    });
    assert!(outcomes > 6, "{outcomes} outcomes");
}

#[test]
fn fuzz_xds_mesh_config() {
    let config = mesh::MeshConfig {
        trust_domain: "cluster.local".into(),
        cluster_domain: "cluster.local".into(),
        mesh_ranges: vec![security::Address {
            address: vec![10, 0, 0, 0],
            length: 10,
        }],
        egress: 1,
        resolvers: vec![vec![172, 31, 1, 2]],
        ..mesh::MeshConfig::default()
    };
    seed("xds_mesh_config", "full", &config.encode_to_vec());
    fuzz("xds_mesh_config", 40_000, |input| {
        match decode(type_url::MESH_CONFIG, input) {
            Ok(change) => {
                let mut snapshot = Snapshot::default();
                snapshot.apply(change);
                assert!(snapshot.config().is_some());
                "read".into()
            }
            Err(error) => kind(&error),
        }
    });
}

/// The bytes of a message mean the same once they are written again.
fn agent_target<M: Message + Default + PartialEq>(input: &[u8]) -> String {
    match M::decode(input) {
        Ok(message) => {
            assert!(M::decode(message.encode_to_vec().as_slice()).unwrap() == message);
            // Which of the messages it is.
            format!("{:?}", message.encode_to_vec().first())
        }
        Err(error) => kind(&error),
    }
}

#[test]
fn fuzz_agent_message() {
    use culvert_proto::agent::{
        AddPod, AgentHello, Declare, ListenerFd, Pod, Ready, ReturnListeners, Sockets, WantSockets,
        ZtunnelHello, from_agent, from_ztunnel,
    };
    let ours = |message| {
        FromZtunnel {
            message: Some(message),
        }
        .encode_to_vec()
    };
    let theirs = |message| {
        FromAgent {
            message: Some(message),
        }
        .encode_to_vec()
    };
    let uid = || "c4a760a8-dbcf-4e14-9f8e-b6dd2fe0b5d5".to_owned();
    for (name, bytes) in [
        (
            "hello",
            ours(from_ztunnel::Message::Hello(ZtunnelHello {
                version: 1,
                instance: 7,
            })),
        ),
        ("ready", ours(from_ztunnel::Message::Ready(Ready {}))),
        (
            "want",
            ours(from_ztunnel::Message::WantSockets(WantSockets {
                uid: uid(),
                count: 64,
                ..WantSockets::default()
            })),
        ),
        (
            "declare",
            ours(from_ztunnel::Message::Declare(Declare {
                id: 3,
                uid: uid(),
                address: vec![203, 0, 113, 1],
                port: 443,
            })),
        ),
        (
            "return",
            ours(from_ztunnel::Message::ReturnListeners(ReturnListeners {
                uid: uid(),
                netns_cookie: 4711,
                listeners: vec![
                    ListenerFd {
                        kind: 1,
                        resolver: vec![172, 31, 1, 2],
                        ..ListenerFd::default()
                    };
                    3
                ],
            })),
        ),
    ] {
        seed("agent_from_ztunnel", name, &bytes);
    }
    for (name, bytes) in [
        (
            "hello",
            theirs(from_agent::Message::Hello(AgentHello {
                version: 1,
                return_listeners: true,
            })),
        ),
        (
            "pod",
            theirs(from_agent::Message::AddPod(AddPod {
                pod: Some(Pod {
                    uid: uid(),
                    namespace: "shop".into(),
                    name: "web".into(),
                    service_account: "web".into(),
                    spiffe_id: "spiffe://cluster.local/ns/shop/sa/web".into(),
                    workload_uid: "Kubernetes//Pod/shop/web".into(),
                    addresses: vec![vec![10, 1, 0, 2], vec![0xfd; 16]],
                    netns_cookie: 4711,
                    refuse_plaintext: true,
                    probe_ports: vec![8081],
                }),
                listeners: vec![
                    ListenerFd {
                        kind: 1,
                        resolver: vec![],
                        ..ListenerFd::default()
                    };
                    3
                ],
            })),
        ),
        (
            "sockets",
            theirs(from_agent::Message::Sockets(Sockets {
                uid: uid(),
                ..Sockets::default()
            })),
        ),
    ] {
        seed("agent_from_agent", name, &bytes);
    }
    let from_ztunnel = fuzz("agent_from_ztunnel", 30_000, agent_target::<FromZtunnel>);
    let from_agent = fuzz("agent_from_agent", 30_000, agent_target::<FromAgent>);
    assert!(
        from_ztunnel > 4 && from_agent > 4,
        "{from_ztunnel} and {from_agent} outcomes"
    );
}
