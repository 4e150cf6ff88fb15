//! Requests for certificates by the tokens of two nodes.

use super::*;
use crate::{
    authority::Authority,
    config::{Egress, Profile},
    index::{
        PodFacts, Settings, World,
        world::{ADDRESS, About, Resource, Step},
    },
    serve::{Tokens, acks::Acks, limits::Limits},
};
use culvert_io::tls::Svid;
use rcgen::{CertificateParams, KeyPair};
use tokio::sync::{mpsc, watch};

const TOKENS: [(&str, &str); 2] = [("token-of-node-a-000", "a"), ("token-of-node-b-000", "b")];

fn pod(name: &str, node: &str, enrolled: bool) -> PodFacts {
    PodFacts {
        uid: format!("{name}-{node}"),
        namespace: "shop".into(),
        name: name.into(),
        service_account: name.into(),
        node: node.into(),
        identity: format!("spiffe://cluster.local/ns/shop/sa/{name}")
            .parse()
            .unwrap(),
        workload_uid: name.into(),
        enrolled,
        refuse_plaintext: enrolled,
        namespace_apart: false,
        probe_ports: vec![],
        exclude_inbound_ports: vec![],
        exclude_outbound_ports: vec![],
        exclude_outbound_nets: vec![],
    }
}

/// Two nodes: `web` and `api` on a, `cart` on b, `both` on each, `plain` on a outside of the mesh, and on b
/// `machine`, which is no pod and speaks HBONE itself.
fn ca() -> (Ca, watch::Sender<Arc<World>>, tempfile::TempDir) {
    let state = tempfile::tempdir().unwrap();
    let mut first = World::default();
    let mut step = Step::default();
    for facts in [
        pod("web", "a", true),
        pod("api", "a", true),
        pod("cart", "b", true),
        pod("plain", "a", false),
        pod("both", "a", true),
        pod("both", "b", true),
    ] {
        first.put_pod(&mut step, facts);
    }
    let machine = About::Workload {
        node: "b".into(),
        namespace: "shop".into(),
        aliases: [].into(),
        services: [].into(),
        policies: [].into(),
        own_tunnel: Some(id("machine").parse().unwrap()),
    };
    first.put(
        &mut step,
        ADDRESS,
        Resource::new("machine".into(), vec![], machine),
    );
    first.close(step);
    let (publish, world) = watch::channel(Arc::new(first));
    let shared = Shared {
        settings: Settings {
            trust_domain: "cluster.local".parse().unwrap(),
            cluster_domain: "cluster.local".into(),
            root_namespace: "culvert-system".into(),
            profile: Profile::Medium,
            egress: Egress::Allow,
            mesh_ranges: vec![],
            resolvers: vec![],
        },
        world,
        source: "test".into(),
        tokens: Tokens::new(
            TOKENS
                .map(|(token, node)| (token.to_owned(), node.to_owned()))
                .into(),
        )
        .unwrap(),
        authority: arc_swap::ArcSwap::from_pointee(
            Authority::generated(state.path(), Duration::from_secs(3600)).unwrap(),
        ),
        limits: Limits::default(),
        record: crate::record::Record::open(state.path()).unwrap().0,
        acks: Acks::default(),
        reports: mpsc::channel(1).0,
        metrics: crate::metrics::Metrics::new().unwrap(),
    };
    (Ca(Arc::new(shared)), publish, state)
}

fn request(token: &str, asked: &str, key: &KeyPair) -> Request<IstioCertificateRequest> {
    let csr = CertificateParams::default()
        .serialize_request(key)
        .unwrap()
        .pem()
        .unwrap();
    let kind = Some(prost_types::value::Kind::StringValue(asked.to_owned()));
    let fields = [("ImpersonatedIdentity".to_owned(), prost_types::Value { kind })].into();
    let mut request = Request::new(IstioCertificateRequest {
        csr,
        validity_duration: 3600,
        metadata: Some(prost_types::Struct { fields }),
    });
    request
        .metadata_mut()
        .insert("authorization", format!("Bearer {token}").parse().unwrap());
    request
}

async fn granted(ca: &Ca, token: &str, asked: &str) -> bool {
    let key = KeyPair::generate().unwrap();
    match ca.create_certificate(request(token, asked, &key)).await {
        Ok(answer) => {
            let chain = answer.into_inner().cert_chain;
            let svid = Svid::from_pem(&chain[0], &key.serialize_pem()).unwrap();
            assert_eq!(svid.id().as_str(), asked, "the leaf is for what was asked");
            true
        }
        Err(refused) => {
            assert_eq!(refused.code(), tonic::Code::Unauthenticated);
            assert!(
                !refused.message().contains("shop"),
                "the reason stays in the log: {refused}"
            );
            false
        }
    }
}

fn id(name: &str) -> String {
    format!("spiffe://cluster.local/ns/shop/sa/{name}")
}

#[tokio::test]
async fn tr_1_f61_a_stolen_node_token_grants_that_nodes_identities_and_no_other() {
    let (ca, _publish, _state) = ca();
    for (name, on_a, on_b) in [
        ("web", true, false),
        ("api", true, false),
        ("cart", false, true),
        ("both", true, true),
        ("plain", false, false),
        ("machine", false, true),
        ("nobody", false, false),
    ] {
        assert_eq!(
            granted(&ca, TOKENS[0].0, &id(name)).await,
            on_a,
            "{name} by node a's token"
        );
        assert_eq!(
            granted(&ca, TOKENS[1].0, &id(name)).await,
            on_b,
            "{name} by node b's token"
        );
    }
}

#[tokio::test]
async fn t38_what_is_not_the_very_text_of_a_pods_identity_is_refused() {
    let (ca, _publish, _state) = ca();
    for asked in [
        "",
        "spiffe://other.example/ns/shop/sa/web",
        "spiffe://cluster.local/ns/shop/sa/web/",
        "spiffe://cluster.local/ns/shop/sa/WEB",
        "spiffe://cluster.local/ns/shop/sa/*",
        "cluster.local/ns/shop/sa/web",
        " spiffe://cluster.local/ns/shop/sa/web",
    ] {
        assert!(!granted(&ca, TOKENS[0].0, asked).await, "{asked:?}");
    }
    for token in ["", "token-of-node-a-00", "token-of-node-a-0000", "a"] {
        assert!(!granted(&ca, token, &id("web")).await, "{token:?}");
    }
}

#[tokio::test]
async fn tr_1_an_identity_is_refused_as_soon_as_its_pod_has_left_the_node() {
    let (ca, publish, _state) = ca();
    assert!(granted(&ca, TOKENS[0].0, &id("web")).await);
    publish.send_replace(Arc::new(World::default()));
    assert!(!granted(&ca, TOKENS[0].0, &id("web")).await);
}

#[tokio::test]
async fn tr_1_f61_a_pod_that_moves_takes_its_identity_with_it() {
    let (ca, publish, _state) = ca();
    let mut moved = World::clone(&publish.borrow());
    let mut step = Step::default();
    moved.remove_pod(&mut step, "web-a");
    moved.put_pod(&mut step, pod("web", "b", true));
    moved.close(step);
    publish.send_replace(Arc::new(moved));
    assert!(
        !granted(&ca, TOKENS[0].0, &id("web")).await,
        "the node that it left"
    );
    assert!(
        granted(&ca, TOKENS[1].0, &id("web")).await,
        "the node that it is on"
    );
}

#[tokio::test]
async fn t52_a_node_that_asks_for_certificates_without_end_is_refused_for_a_while() {
    let (ca, _publish, _state) = ca();
    let key = KeyPair::generate().unwrap();
    let mut codes = std::collections::BTreeMap::<i32, u32>::new();
    for _ in 0..1_500 {
        // Refused ones cost as much as granted ones.
        let answer = ca
            .create_certificate(request(TOKENS[0].0, &id("nobody"), &key))
            .await;
        *codes.entry(answer.unwrap_err().code().into()).or_default() += 1;
    }
    let exhausted = codes.get(&tonic::Code::ResourceExhausted.into()).copied();
    assert!(exhausted.is_some_and(|count| count > 100), "{codes:?}");
    assert!(
        granted(&ca, TOKENS[1].0, &id("cart")).await,
        "another node is served"
    );
}
