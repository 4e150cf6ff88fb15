//! The certificate authority: whom it signs for, and how it is replaced while the mesh runs.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::bail;
use culvert_e2e::lab::memory::{Memory, PrivateKey};
use culvert_e2e::lab::{Endpoint, Pod, PodSpec, poll_until};
use culvert_e2e::load::{Attempts, all_complete};
use culvert_e2e::mesh::{CONTROL_NAME, MeshNode, Options, config, token};
use culvert_e2e::traffic::{Server, echo_once};
use culvert_io::control::Control;
use culvert_proto::ca::{
    IstioCertificateRequest, istio_certificate_service_client::IstioCertificateServiceClient,
};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, KeyUsagePurpose};

use crate::{Shop, WAIT, full_length};

/// Asks control for certificates of `ids` with a node's token, as whoever has stolen it may; says which were
/// granted.
fn sweep(from: &Endpoint, shop: &Shop, node: &str, ids: &[String]) -> Vec<bool> {
    let folder = scratch(&format!("sweep-{node}"));
    let file = folder.join("token");
    fs::write(&file, token(node)).unwrap();
    let bundle = folder.join("root.pem");
    fs::copy(shop.mesh.path("/run/culvert/root.pem"), &bundle).unwrap();
    let control = Control {
        address: format!("https://{}:15012", shop.mesh.control_host().addresses().v4),
        bundle,
        name: CONTROL_NAME.to_owned(),
        token: file,
    };
    let ids = ids.to_vec();
    let asking = from.spawn_inside("sweep", move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        runtime.block_on(async {
            let mut ca =
                IstioCertificateServiceClient::with_interceptor(control.channel()?, control.credentials());
            let mut granted = Vec::new();
            for id in ids {
                let csr = CertificateParams::default()
                    .serialize_request(&KeyPair::generate()?)?
                    .pem()?;
                let kind = Some(prost_types::value::Kind::StringValue(id));
                let asked = [("ImpersonatedIdentity".to_owned(), prost_types::Value { kind })];
                let request = IstioCertificateRequest {
                    csr,
                    validity_duration: 600,
                    metadata: Some(prost_types::Struct { fields: asked.into() }),
                };
                granted.push(ca.create_certificate(request).await.is_ok());
            }
            Ok(granted)
        })
    });
    asking.unwrap().join().unwrap().unwrap()
}

/// A folder of this test process's own, which the lab's processes see, too.
fn scratch(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    folder
}

fn id(namespace: &str, account: &str) -> String {
    format!("spiffe://cluster.local/ns/{namespace}/sa/{account}")
}

#[test]
fn tr1_f61_a_stolen_node_token_grants_all_of_the_nodes_identities_and_none_beside() {
    let shop = Shop::open();
    shop.mesh.namespace("bank").unwrap();
    let _teller = shop.mesh.pod(&shop.a, PodSpec::new("bank", "teller")).unwrap();
    let _vault = shop.mesh.pod(&shop.b, PodSpec::new("bank", "vault")).unwrap();
    let thief = shop.mesh.lab().host("thief").unwrap();
    let own = [id("shop", "web"), id("bank", "teller")];
    let others = [
        id("shop", "cart"),
        id("bank", "vault"),
        id("culvert-system", "ztunnel"),
        id("kube-system", "admin"),
        "spiffe://other.example/ns/shop/sa/web".to_owned(),
        String::new(),
    ];
    assert_eq!(sweep(&thief, &shop, "a", &own), [true, true]);
    assert_eq!(sweep(&thief, &shop, "a", &others), [false; 6]);
    let refused = |log: &str| log.matches("certificate refused").count();
    let log = shop.mesh.with_control(|control| control.log()).unwrap();
    assert_eq!(
        refused(&log),
        others.len(),
        "the audit has a line of each refusal"
    );
    // A pod that moves takes its identity along.
    let mut moved = config::pod(&shop.web);
    moved["spec"]["nodeName"] = "b".into();
    let start = Instant::now();
    shop.mesh.apply_object(&moved).unwrap();
    poll_until("the old node is refused", WAIT, || {
        Ok((sweep(&thief, &shop, "a", &own[..1]) == [false]).then_some(()))
    })
    .unwrap();
    assert!(
        start.elapsed() <= Duration::from_secs(2),
        "refused after {:?}",
        start.elapsed()
    );
    assert_eq!(
        sweep(&thief, &shop, "b", &own[..1]),
        [true],
        "the new node has it"
    );
    let start = Instant::now();
    shop.mesh.delete("Pod", "shop", "web").unwrap();
    poll_until("a deleted pod's identity is refused", WAIT, || {
        Ok((sweep(&thief, &shop, "b", &own[..1]) == [false]).then_some(()))
    })
    .unwrap();
    assert!(
        start.elapsed() <= Duration::from_secs(2),
        "refused after {:?}",
        start.elapsed()
    );
}

/// How long a key may stay once the last pod of its identity has left.
const FORGOTTEN: Duration = Duration::from_secs(5);

fn memory(node: &MeshNode) -> Memory {
    node.with_ztunnel(Memory::of).unwrap().unwrap()
}

fn keys_in(node: &MeshNode) -> BTreeSet<PrivateKey> {
    memory(node).private_keys()
}

/// Waits until of `keys` just `left` are anywhere in a ztunnel's memory, in any form and be it a half of them.
fn forgets(node: &MeshNode, keys: &BTreeSet<PrivateKey>, left: usize) {
    poll_until(&format!("only {left} keys are in memory"), FORGOTTEN, || {
        let memory = memory(node);
        let there: Vec<String> = keys
            .iter()
            .filter_map(|key| memory.traces(key).into_iter().next())
            .collect();
        if there.len() > left {
            bail!("{} keys, in {there:?}", there.len());
        }
        Ok(Some(()))
    })
    .unwrap();
}

/// Calls `cart`, so that the pod's key is used.
fn calls(shop: &Shop, pod: &Pod) {
    let socket = pod.connect((shop.vip.v4, 80)).unwrap();
    socket.set_read_timeout(Some(WAIT)).unwrap();
    echo_once(&socket, b"hello").unwrap();
}

#[test]
fn tr1_a_key_is_gone_from_memory_when_its_last_pod_has_left() {
    let shop = Shop::open_with(Options {
        svid_ttl: "16s",
        ..Options::default()
    });
    let _echo = Server::echo(shop.cart.listen(8080).unwrap()).unwrap();
    let api = shop.mesh.pod(&shop.a, PodSpec::new("shop", "api")).unwrap();
    shop.a.wait_published(&api).unwrap();
    for pod in [&shop.web, &api] {
        calls(&shop, pod);
    }
    let first = keys_in(&shop.a);
    assert_eq!(first.len(), 2, "one key of each identity");
    // To a successor they pass over a socket.
    let successor = shop.a.successor().unwrap();
    successor
        .wait_for_log("SVIDs handed over count=2 given=false", WAIT)
        .unwrap();
    // It drains, has nothing to drain, and leaves.
    let old = shop.a.replace_ztunnel(successor).expect("there was one before");
    assert!(old.wait(WAIT).unwrap().success());
    for pod in [&shop.web, &api] {
        calls(&shop, pod);
    }
    let handed = &first | &keys_in(&shop.a);
    shop.mesh.remove(&shop.a, &shop.web).unwrap();
    forgets(&shop.a, &handed, 1);
    // A renewal brings a new key.
    let renewed = poll_until("a renewal", WAIT, || {
        let keys = keys_in(&shop.a);
        Ok((!keys.is_subset(&handed)).then_some(keys))
    });
    calls(&shop, &api);
    let all = &handed | &renewed.unwrap();
    shop.mesh.remove(&shop.a, &api).unwrap();
    forgets(&shop.a, &all, 0);
}

type Ca = CertifiedIssuer<'static, KeyPair>;

fn issuer(name: &str, above: Option<&Ca>) -> Ca {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let key = KeyPair::generate().unwrap();
    match above {
        Some(above) => CertifiedIssuer::signed_by(params, key, above).unwrap(),
        None => CertifiedIssuer::self_signed(params, key).unwrap(),
    }
}

/// The CA's files, as an external PKI would leave them.
struct Files(PathBuf);

impl Files {
    fn path(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }

    fn put(&self, name: &str, text: &str) {
        let part = self.0.join(format!("{name}.part"));
        fs::write(&part, text).unwrap();
        fs::rename(part, self.0.join(name)).unwrap();
    }

    /// One after the other, so that control meets sets that do not hold together.
    fn place(&self, issuer: &Ca, roots: &[&Ca]) {
        self.put("cert.pem", &issuer.pem());
        thread::sleep(Duration::from_millis(20));
        self.put("key.pem", &issuer.key().serialize_pem());
        let roots: String = roots.iter().map(|root| root.pem()).collect();
        self.put("root.pem", &roots);
    }
}

#[test]
fn f10_f11_f12_roots_and_intermediates_rotate_under_load_and_the_old_root_is_refused_after() {
    // Shortened in CI: a step lasts as long as a renewal and control's look at its files.
    let step = Duration::from_secs(if full_length() { 150 } else { 4 });
    let (old, new) = (issuer("old root", None), issuer("new root", None));
    let [first, second] = ["first", "second"].map(|name| issuer(name, Some(&old)));
    let third = issuer("third", Some(&new));
    let files = Files(scratch("ca"));
    files.place(&first, &[&old]);
    let shop = Shop::open_with(Options {
        svid_ttl: "5s",
        control_args: [
            "--ca-cert",
            &files.path("cert.pem"),
            "--ca-key",
            &files.path("key.pem"),
            "--ca-root",
            &files.path("root.pem"),
        ]
        .map(str::to_owned)
        .into(),
        ..Options::default()
    });
    let _echo = Server::echo(shop.cart.listen(8080).unwrap()).unwrap();
    let to = (shop.vip.v4, 80).into();
    let attempts = Attempts::start(&shop.web, to, 100, WAIT).unwrap();
    thread::sleep(step);
    for (issuer, roots) in [
        (&second, &[&old][..]),
        (&second, &[&old, &new]),
        (&third, &[&old, &new]),
        (&third, &[&new]),
    ] {
        files.place(issuer, roots);
        thread::sleep(Duration::from_millis(1_500));
        // What a cluster does with the ConfigMap.
        shop.mesh.distribute_root().unwrap();
        thread::sleep(step);
    }
    all_complete(&attempts.stop().unwrap()).unwrap();
    let log = shop.mesh.with_control(|control| control.log()).unwrap();
    assert_eq!(
        log.matches("issuing from the new ones").count(),
        4,
        "every step was taken"
    );
    // A node that is told of the old root alone is a stranger now.
    shop.mesh
        .lab()
        .partition(shop.a.node(), shop.mesh.control_host())
        .unwrap();
    files.place(&second, &[&old]);
    thread::sleep(Duration::from_millis(1_500));
    shop.mesh.distribute_root().unwrap();
    shop.b.kill_ztunnel().unwrap();
    shop.b.start_ztunnel().unwrap();
    shop.b.wait_ready().unwrap();
    let call = || -> anyhow::Result<()> {
        let socket = shop.web.connect_within(to, Duration::from_secs(2))?;
        socket.set_read_timeout(Some(Duration::from_secs(2)))?;
        echo_once(&socket, b"old")
    };
    for _ in 0..3 {
        assert!(call().is_err(), "the old root is trusted still");
    }
    shop.mesh.lab().heal().unwrap();
    poll_until("both have the old root, and calls pass", WAIT, || {
        call().map(Some)
    })
    .unwrap();
    fs::remove_dir_all(&files.0).unwrap();
}
