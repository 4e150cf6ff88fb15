//! What the CA signs, and what of a request it takes.

use super::*;

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
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::Any, ExtendedKeyUsagePurpose::CodeSigning];
        params.not_after = (SystemTime::now() + Duration::from_secs(90 * 24 * 3600)).into();
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
    let usage = leaf.key_usage().unwrap().unwrap().value;
    assert!(usage.digital_signature() && !usage.key_cert_sign() && !usage.crl_sign());
    let extended = leaf.extended_key_usage().unwrap().unwrap().value;
    assert!(extended.server_auth && extended.client_auth && !extended.any && !extended.code_signing);
}

#[test]
fn t38_a_key_that_is_weak_or_of_another_kind_is_refused() {
    let state = tempfile::tempdir().unwrap();
    let ca = Authority::generated(state.path(), HOUR).unwrap();
    for (case, request) in [
        ("RSA 1024", include_str!("requests/rsa1024.pem")),
        ("RSA 2048", include_str!("requests/rsa2048.pem")),
        ("DSA", include_str!("requests/dsa.pem")),
        ("P-224", include_str!("requests/p224.pem")),
        ("P-521", include_str!("requests/p521.pem")),
        ("secp256k1", include_str!("requests/k256.pem")),
        ("P-384 signed as P-256", include_str!("requests/p384_sha256.pem")),
    ] {
        let refused = ca.sign(&id(), request, HOUR);
        assert!(
            matches!(refused, Err(SignError::Key | SignError::Request(_))),
            "{case}"
        );
    }
    let p384 = KeyPair::generate_for(&PKCS_ECDSA_P384_SHA384).unwrap();
    ca.sign(&id(), &csr(&p384, |_| ()), HOUR).unwrap();
}

#[test]
fn t38_the_life_is_what_was_asked_for_and_never_more_than_the_cas() {
    let state = tempfile::tempdir().unwrap();
    let ca = Authority::generated(state.path(), HOUR).unwrap();
    let key = KeyPair::generate().unwrap();
    for (asked, most) in [(600, 600), (3_600, 3_600), (u64::MAX / 4, 3_600), (0, 1)] {
        let (elements, _) = ca
            .sign(&id(), &csr(&key, |_| ()), Duration::from_secs(asked))
            .unwrap();
        let svid = Svid::from_pem(&elements[0], &key.serialize_pem()).unwrap();
        let life = svid
            .not_after()
            .duration_since(SystemTime::now())
            .unwrap_or_default();
        assert!(life <= Duration::from_secs(most), "asked {asked}: {life:?}");
    }
}

/// A CA's certificate and key, signed by `above` or by itself.
fn issuer(
    name: &str,
    above: Option<&CertifiedIssuer<'static, KeyPair>>,
) -> CertifiedIssuer<'static, KeyPair> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let key = KeyPair::generate().unwrap();
    match above {
        Some(above) => CertifiedIssuer::signed_by(params, key, above).unwrap(),
        None => CertifiedIssuer::self_signed(params, key).unwrap(),
    }
}

#[test]
fn f11_f12_files_that_do_not_belong_together_are_refused() {
    let (old, new) = (issuer("old", None), issuer("new", None));
    let below_old = issuer("below old", Some(&old));
    let both = format!("{}{}", old.pem(), new.pem());
    let key = |of: &CertifiedIssuer<'static, KeyPair>| of.key().serialize_pem();
    let td = "cluster.local".parse().unwrap();
    for (case, cert, key, roots, good) in [
        ("a root that issues", old.pem(), key(&old), old.pem(), true),
        (
            "an intermediate",
            below_old.pem(),
            key(&below_old),
            old.pem(),
            true,
        ),
        ("the new root added", old.pem(), key(&old), both.clone(), true),
        ("issuing switched", new.pem(), key(&new), both, true),
        ("another's key", old.pem(), key(&new), old.pem(), false),
        ("a root that is not there", old.pem(), key(&old), new.pem(), false),
        (
            "an intermediate of another root",
            below_old.pem(),
            key(&below_old),
            new.pem(),
            false,
        ),
        ("no certificate", String::new(), key(&old), old.pem(), false),
        ("no root", old.pem(), key(&old), String::new(), false),
        (
            "a leaf that issues",
            String::from("garbage"),
            key(&old),
            old.pem(),
            false,
        ),
    ] {
        let checked = Authority::from_pem(&cert, &key, &roots, HOUR).and_then(|ca| ca.check(&td));
        assert_eq!(checked.is_ok(), good, "{case}: {checked:?}");
    }
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
