//! Certificates are revoked while they are in use.

use std::fs;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use culvert_e2e::lab::poll_until;
use culvert_e2e::load::{Failure, Pace, Streams};
use culvert_e2e::mesh::{MeshNode, Options, pages};
use culvert_e2e::traffic::{Server, echo_once};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, DistinguishedName,
    DnType, IsCa, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SerialNumber,
};

use crate::{Shop, WAIT};

/// Live connections of a revoked certificate are closed within this.
const CLOSED_WITHIN: Duration = Duration::from_secs(5);

const INTERMEDIATE: u64 = 4711;

type Ca = CertifiedIssuer<'static, KeyPair>;

/// A root and an intermediate, whose keys the test has, and the file of their lists.
struct Pki {
    folder: PathBuf,
    root: Ca,
    intermediate: Ca,
}

impl Drop for Pki {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

fn ca(name: &str, serial: u64) -> (CertificateParams, KeyPair) {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.serial_number = Some(SerialNumber::from(serial));
    (params, KeyPair::generate().unwrap())
}

impl Pki {
    fn new() -> Self {
        let folder = std::env::temp_dir().join(format!("culvert-pki-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o755)).unwrap();
        let (params, key) = ca("test root", 1);
        let root = Ca::self_signed(params, key).unwrap();
        let (params, key) = ca("test intermediate", INTERMEDIATE);
        let pem = key.serialize_pem();
        let intermediate = Ca::signed_by(params, key, &root).unwrap();
        let pki = Self {
            folder,
            root,
            intermediate,
        };
        pki.write("issuer.pem", &pki.intermediate.pem());
        pki.write("issuer-key.pem", &pem);
        pki.write("root.pem", &pki.root.pem());
        pki.revoke(&[], &[]);
        pki
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    fn write(&self, name: &str, text: &str) {
        let part = self.path("part");
        fs::write(&part, text).unwrap();
        fs::set_permissions(&part, fs::Permissions::from_mode(0o644)).unwrap();
        fs::rename(part, self.path(name)).unwrap();
    }

    /// Puts a list of each issuer in place.
    fn revoke(&self, leaves: &[&str], intermediates: &[u64]) {
        let leaves = leaves.iter().map(|serial| serial_number(serial)).collect();
        let intermediates = intermediates
            .iter()
            .map(|serial| SerialNumber::from(*serial))
            .collect();
        self.write(
            "crl.pem",
            &(list(&self.intermediate, leaves) + &list(&self.root, intermediates)),
        );
    }

    fn options(&self) -> Options {
        let text = |path: &Path| path.to_str().unwrap().to_owned();
        let control_args = [
            ("--ca-cert", "issuer.pem"),
            ("--ca-key", "issuer-key.pem"),
            ("--ca-root", "root.pem"),
        ];
        Options {
            control_args: control_args
                .iter()
                .flat_map(|(option, file)| [(*option).to_owned(), text(&self.path(file))])
                .collect(),
            ztunnel_args: vec!["--crl".to_owned(), text(&self.path("crl.pem"))],
            ..Options::default()
        }
    }
}

fn serial_number(hex: &str) -> SerialNumber {
    let bytes: Vec<u8> = hex
        .split(':')
        .map(|byte| u8::from_str_radix(byte, 16).unwrap())
        .collect();
    SerialNumber::from_slice(&bytes)
}

fn list(issuer: &Ca, serials: Vec<SerialNumber>) -> String {
    let now = SystemTime::now();
    let hour = Duration::from_secs(3600);
    let revoked = serials.into_iter().map(|serial_number| RevokedCertParams {
        serial_number,
        revocation_time: (now - hour).into(),
        reason_code: None,
        invalidity_date: None,
    });
    let params = CertificateRevocationListParams {
        this_update: (now - hour).into(),
        next_update: (now + hour).into(),
        crl_number: SerialNumber::from(1u64),
        issuing_distribution_point: None,
        revoked_certs: revoked.collect(),
        key_identifier_method: KeyIdMethod::Sha256,
    };
    params.signed_by(issuer).unwrap().pem().unwrap()
}

/// The serial number of the leaf that a node has for an account of `shop`.
fn serial(node: &MeshNode, account: &str) -> String {
    let page = node.admin("/config_dump").unwrap();
    let dump: serde_json::Value = serde_json::from_str(&page.body).unwrap();
    let id = format!("spiffe://cluster.local/ns/shop/sa/{account}");
    let all = dump["certificates"].as_array().unwrap();
    let one = all.iter().find(|one| one["identity"] == id.as_str()).unwrap();
    one["certChain"][0]["serialNumber"].as_str().unwrap().to_owned()
}

fn call(shop: &Shop) -> anyhow::Result<()> {
    let socket = shop.web.connect((shop.vip.v4, 80))?;
    socket.set_read_timeout(Some(WAIT))?;
    echo_once(&socket, b"call")
}

fn failing(node: &MeshNode) -> bool {
    node.metrics()
        .unwrap()
        .sum("culvert_revocation_lists_failing", &[])
        == 1.0
}

#[test]
fn t37_f59_a_revoked_certificate_ends_what_it_carries_in_both_directions() {
    let pki = Pki::new();
    let shop = Shop::open_with(pki.options());
    let _echo = Server::echo(shop.cart.listen(8080).unwrap()).unwrap();
    let to = SocketAddr::from((shop.vip.v4, 80));
    let open = || {
        poll_until("calls pass", WAIT, || Ok(call(&shop).ok())).unwrap();
        Streams::start(&shop.web, to, 5, Pace::BUSY).unwrap()
    };
    let streams = open();
    // What is no list changes nothing and is told.
    pki.write(
        "crl.pem",
        "-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n",
    );
    poll_until("the alarm", WAIT, || {
        Ok((failing(&shop.a) && failing(&shop.b)).then_some(()))
    })
    .unwrap();
    call(&shop).unwrap();
    for end in streams.stop().unwrap() {
        assert!(end.failure.is_none(), "{end:?}");
    }
    pki.revoke(&[], &[]);
    poll_until("its end", WAIT, || {
        Ok((!failing(&shop.a) && !failing(&shop.b)).then_some(()))
    })
    .unwrap();

    let (client, server) = (
        serial(&shop.a, &shop.web.spec().service_account),
        serial(&shop.b, &shop.cart.spec().service_account),
    );
    type Revoked<'r> = (&'r str, Vec<&'r str>, Vec<u64>);
    let cases: [Revoked<'_>; 3] = [
        ("the client's leaf", vec![&client], vec![]),
        ("the server's leaf", vec![&server], vec![]),
        ("the intermediate", vec![], vec![INTERMEDIATE]),
    ];
    for (case, leaves, intermediates) in cases {
        let streams = open();
        let revoked = Instant::now();
        pki.revoke(&leaves, &intermediates);
        thread::sleep(CLOSED_WITHIN);
        for end in streams.stop().unwrap() {
            let (at, failure) = end.failure.unwrap_or_else(|| panic!("{case}: a stream lives on"));
            assert_eq!(failure, Failure::Lost(ErrorKind::ConnectionReset), "{case}");
            assert!(at > revoked && at - revoked < CLOSED_WITHIN, "{case}");
        }
        assert!(call(&shop).is_err(), "{case}: a new connection is refused");
        pki.revoke(&[], &[]);
    }
    let streams = open();
    drop(streams.stop().unwrap());

    // A list that is configured and cannot be read: not ready, and nobody is trusted.
    shop.b.kill_ztunnel().unwrap();
    fs::remove_file(pki.path("crl.pem")).unwrap();
    shop.b.start_ztunnel().unwrap();
    let pod = shop.b.ztunnel_pod();
    let readiness = SocketAddr::from((pod.addresses().v4, 15021));
    let ready = || pages::fetch(pod, readiness, "/healthz/ready").map(|page| page.status);
    poll_until("it answers", WAIT, || Ok(ready().ok())).unwrap();
    let until = Instant::now() + Duration::from_secs(3);
    while Instant::now() < until {
        assert_eq!(ready().unwrap(), 503);
        thread::sleep(Duration::from_millis(200));
    }
    let socket = shop.web.connect(to).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    assert!(echo_once(&socket, b"untrusted").is_err(), "no tunnel comes up");
    pki.revoke(&[], &[]);
    shop.b.wait_ready().unwrap();
    poll_until("calls pass", WAIT, || Ok(call(&shop).ok())).unwrap();
}
