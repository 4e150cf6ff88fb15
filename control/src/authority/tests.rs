use super::*;
use culvert_io::tls::Svid;

fn csr(key: &KeyPair, change: impl FnOnce(&mut CertificateParams)) -> String {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    change(&mut params);
    params.serialize_request(key).unwrap().pem().unwrap()
}

fn id() -> SpiffeId {
    "spiffe://cluster.local/ns/shop/sa/web".parse().unwrap()
}

const HOUR: Duration = Duration::from_secs(3600);

#[test]
fn t38_of_a_request_only_the_key_is_used() {
    let state = tempfile::tempdir().unwrap();
    let ca = Authority::generated(state.path(), HOUR).unwrap();
    let key = KeyPair::generate().unwrap();
    let greedy = csr(&key, |params| {
        params.subject_alt_names = vec![
            SanType::URI(
                "spiffe://cluster.local/ns/kube-system/sa/admin"
                    .try_into()
                    .unwrap(),
            ),
            SanType::DnsName("evil.example".try_into().unwrap()),
        ];
        params.distinguished_name.push(DnType::CommonName, "evil");
    });
    let (elements, _) = ca
        .sign(&id(), &greedy, Duration::from_secs(90 * 24 * 3600))
        .unwrap();
    assert_eq!(elements.len(), 2);
    let svid = Svid::from_pem(&elements[0], &key.serialize_pem()).unwrap();
    assert_eq!(*svid.id(), id());
    assert!(
        svid.not_after() <= SystemTime::now() + HOUR,
        "life is bounded by the CA"
    );
    let (_, leaf) = x509_parser::parse_x509_certificate(&svid.chain()[0]).unwrap();
    assert!(leaf.subject().iter().next().is_none() && !leaf.is_ca());
}

#[test]
fn t38_a_bad_request_is_refused() {
    let state = tempfile::tempdir().unwrap();
    let ca = Authority::generated(state.path(), HOUR).unwrap();
    let key = KeyPair::generate().unwrap();
    let good = csr(&key, |_| ());
    // Proof of possession: one bit of the signature turned.
    let mut lines: Vec<String> = good.lines().map(str::to_owned).collect();
    let last = lines.len() - 2;
    let turned = if lines[last].starts_with('A') { "B" } else { "A" };
    lines[last].replace_range(0..1, turned);
    for (case, bad) in [
        ("garbage", "garbage".to_owned()),
        ("empty", String::new()),
        ("turned bit", lines.join("\n")),
    ] {
        assert!(
            matches!(ca.sign(&id(), &bad, HOUR), Err(SignError::Request(_))),
            "{case}"
        );
    }
    let ed25519 = KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
    assert!(matches!(
        ca.sign(&id(), &csr(&ed25519, |_| ()), HOUR),
        Err(SignError::Key)
    ));
}

#[test]
fn the_root_is_made_once_and_its_key_is_private() {
    let state = tempfile::tempdir().unwrap();
    let first = Authority::generated(state.path(), HOUR).unwrap();
    let again = Authority::generated(state.path(), HOUR).unwrap();
    assert_eq!(first.roots(), again.roots());
    let mode = fs::metadata(state.path().join("ca-key.pem"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
}
