//! Certificates of every shape against the verifier of both ends.

mod hostile;

use super::{verify::Verifier, *};
use culvert_core::ids::{SpiffeId, TrustDomain};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose, RevokedCertParams, SanType, SerialNumber,
};
use std::sync::Arc;
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// A certificate authority that signs what a test asks for, right or wrong.
pub(crate) struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    trust_domain: TrustDomain,
}

fn ca_params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

fn leaf_params(id: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![SanType::URI(id.try_into().unwrap())];
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ServerAuth,
        ExtendedKeyUsagePurpose::ClientAuth,
    ];
    params
}

impl Authority {
    pub fn new(trust_domain: &str) -> Self {
        let key = KeyPair::generate().unwrap();
        let issuer = CertifiedIssuer::self_signed(ca_params(trust_domain), key).unwrap();
        Self {
            issuer,
            trust_domain: trust_domain.parse().unwrap(),
        }
    }

    pub fn root(&self) -> String {
        self.issuer.pem()
    }

    /// Signs a leaf for the key of a request, with what `change` makes of a good one.
    pub fn sign(&self, id: &str, csr: &str, change: impl FnOnce(&mut CertificateParams)) -> String {
        let mut request = rcgen::CertificateSigningRequestParams::from_pem(csr).unwrap();
        request.params.subject_alt_names = vec![SanType::URI(id.try_into().unwrap())];
        request.params.is_ca = IsCa::ExplicitNoCa;
        request.params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        request.params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        change(&mut request.params);
        request.signed_by(&self.issuer).unwrap().pem()
    }

    pub fn bundles(&self) -> Arc<TrustBundles> {
        Arc::new(
            TrustBundles::default()
                .with_roots(&self.trust_domain, &self.issuer.pem())
                .unwrap(),
        )
    }

    /// A list that revokes these serial numbers (PEM).
    pub fn revoke(&self, serials: &[&str]) -> String {
        list(&self.issuer, serials)
    }

    /// Signs a leaf with what `change` makes of a good one.
    pub fn leaf(&self, id: &str, change: impl FnOnce(&mut CertificateParams)) -> (String, String) {
        let mut params = leaf_params(id);
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        (
            params.signed_by(&key, &self.issuer).unwrap().pem(),
            key.serialize_pem(),
        )
    }

    pub fn svid(&self, id: &str) -> Svid {
        let (chain, key) = self.leaf(id, |_| ());
        Svid::from_pem(&chain, &key).unwrap()
    }
}

fn list(issuer: &CertifiedIssuer<'static, KeyPair>, serials: &[&str]) -> String {
    let now = std::time::SystemTime::now();
    let hour = std::time::Duration::from_secs(3600);
    let revoked = serials.iter().map(|serial| {
        let bytes: Vec<u8> = serial
            .split(':')
            .map(|hex| u8::from_str_radix(hex, 16).unwrap())
            .collect();
        RevokedCertParams {
            serial_number: SerialNumber::from_slice(&bytes),
            revocation_time: (now - hour).into(),
            reason_code: None,
            invalidity_date: None,
        }
    });
    let list = CertificateRevocationListParams {
        this_update: (now - hour).into(),
        next_update: (now + hour).into(),
        crl_number: SerialNumber::from(1u64),
        issuing_distribution_point: None,
        revoked_certs: revoked.collect(),
        key_identifier_method: rcgen::KeyIdMethod::Sha256,
    };
    list.signed_by(issuer).unwrap().pem().unwrap()
}

pub(crate) const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";
pub(crate) const CART: &str = "spiffe://cluster.local/ns/shop/sa/cart";

fn expect(id: &str) -> Expected {
    Expected::OneOf([id.parse::<SpiffeId>().unwrap()].into())
}

/// Shakes hands in memory; the verdict of whichever end refused.
async fn handshake(
    client: &Svid,
    client_trusts: &Arc<TrustBundles>,
    expected: Expected,
    server: &Svid,
    server_trusts: &Arc<TrustBundles>,
) -> Result<(), VerifyError> {
    let (near, far) = tokio::io::duplex(64 * 1024);
    let dial = TlsConnector::from(client_config(client, client_trusts, expected).unwrap());
    let accept = TlsAcceptor::from(server_config(server, server_trusts).unwrap());
    let name = rustls_pki_types::ServerName::try_from("unused.example").unwrap();
    let (dialled, accepted) = tokio::join!(dial.connect(name, near), accept.accept(far));
    for end in [dialled.err(), accepted.err()].into_iter().flatten() {
        if let Some(verdict) = VerifyError::of(&end) {
            return Err(verdict.clone());
        }
    }
    Ok(())
}

#[tokio::test]
async fn both_ends_prove_who_they_are() {
    let ca = Authority::new("cluster.local");
    let (web, cart, trust) = (ca.svid(WEB), ca.svid(CART), ca.bundles());
    assert_eq!(handshake(&web, &trust, expect(CART), &cart, &trust).await, Ok(()));
    assert_eq!(
        handshake(&web, &trust, Expected::AnyTrusted, &cart, &trust).await,
        Ok(())
    );
}

#[tokio::test]
async fn t39_only_an_expected_identity_is_taken() {
    let ca = Authority::new("cluster.local");
    let (web, cart, trust) = (ca.svid(WEB), ca.svid(CART), ca.bundles());
    let unexpected = Err(VerifyError::Unexpected(CART.parse().unwrap()));
    assert_eq!(
        handshake(&web, &trust, expect(WEB), &cart, &trust).await,
        unexpected
    );
    assert_eq!(
        handshake(&web, &trust, Expected::OneOf([].into()), &cart, &trust).await,
        unexpected
    );
}

#[tokio::test]
async fn t36_another_trust_domain_is_not_trusted() {
    let (ours, theirs) = (Authority::new("cluster.local"), Authority::new("other.example"));
    let stranger = theirs.svid("spiffe://other.example/ns/shop/sa/web");
    let cart = ours.svid(CART);
    let verdict = handshake(&stranger, &ours.bundles(), expect(CART), &cart, &ours.bundles()).await;
    assert_eq!(
        verdict,
        Err(VerifyError::UnknownTrustDomain(stranger.id().clone()))
    );
    // A name of our trust domain that another's roots have signed.
    let forged = theirs.svid(WEB);
    let verdict = handshake(&forged, &ours.bundles(), expect(CART), &cart, &ours.bundles()).await;
    assert!(matches!(verdict, Err(VerifyError::Chain { .. })), "{verdict:?}");
}

#[test]
fn t31_t32_t34_a_leaf_that_breaks_a_rule_is_no_svid() {
    let ca = Authority::new("cluster.local");
    let uri = |id: &str| SanType::URI(id.try_into().unwrap());
    let refused = |change: &dyn Fn(&mut CertificateParams)| {
        let (chain, key) = ca.leaf(WEB, |params| change(params));
        match Svid::from_pem(&chain, &key) {
            Err(SvidError::Leaf(reason)) => reason,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(refused(&|leaf| leaf.subject_alt_names.clear()), LeafError::NoName);
    assert_eq!(
        refused(&|leaf| leaf.subject_alt_names.push(uri(CART))),
        LeafError::Uris(2)
    );
    assert_eq!(
        refused(&|leaf| leaf.subject_alt_names.push(uri("https://example"))),
        LeafError::Uris(2)
    );
    assert_eq!(
        refused(&|leaf| leaf.subject_alt_names = vec![SanType::DnsName("web".try_into().unwrap())]),
        LeafError::Uris(0)
    );
    let other = SanType::OtherName((vec![1, 3, 6, 1], "x".into()));
    assert_eq!(
        refused(&|leaf| leaf.subject_alt_names.push(other.clone())),
        LeafError::OtherName
    );
    for bad in [
        "spiffe://cluster.local/a\0b",
        "spiffe://cluster.local",
        "spiffe://CLUSTER.local/a",
    ] {
        assert!(
            matches!(
                refused(&|leaf| leaf.subject_alt_names = vec![uri(bad)]),
                LeafError::Id(_)
            ),
            "{bad:?}"
        );
    }
    assert_eq!(
        refused(&|leaf| leaf.is_ca = IsCa::Ca(BasicConstraints::Unconstrained)),
        LeafError::IsCa
    );
    assert_eq!(refused(&|leaf| leaf.is_ca = IsCa::NoCa), LeafError::IsCa);
    assert_eq!(
        refused(&|leaf| leaf.key_usages.push(KeyUsagePurpose::KeyCertSign)),
        LeafError::KeyUsage
    );
    assert_eq!(refused(&|leaf| leaf.key_usages.clear()), LeafError::KeyUsage);
}

#[tokio::test]
async fn t34_a_leaf_for_the_other_role_is_refused() {
    let ca = Authority::new("cluster.local");
    let trust = ca.bundles();
    let (chain, key) = ca.leaf(WEB, |leaf| {
        leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth]
    });
    let server_only = Svid::from_pem(&chain, &key).unwrap();
    let verdict = handshake(&server_only, &trust, expect(CART), &ca.svid(CART), &trust).await;
    assert!(matches!(verdict, Err(VerifyError::Chain { .. })), "{verdict:?}");
}

#[test]
fn a_key_of_another_certificate_is_refused() {
    let ca = Authority::new("cluster.local");
    let ((chain, _), (_, key)) = (ca.leaf(WEB, |_| ()), ca.leaf(WEB, |_| ()));
    assert!(matches!(Svid::from_pem(&chain, &key), Err(SvidError::OtherKey)));
}

#[tokio::test]
async fn t35_t41_the_tunnel_speaks_tls_13_with_the_hybrid_group_and_no_tickets() {
    let ca = Authority::new("cluster.local");
    let (web, cart, trust) = (ca.svid(WEB), ca.svid(CART), ca.bundles());
    let server = server_config(&cart, &trust).unwrap();
    assert_eq!(server.send_tls13_tickets, 0);
    let (near, far) = tokio::io::duplex(64 * 1024);
    let dial = TlsConnector::from(client_config(&web, &trust, expect(CART)).unwrap());
    let name = rustls_pki_types::ServerName::try_from("unused.example").unwrap();
    let (dialled, _accepted) = tokio::join!(dial.connect(name, near), TlsAcceptor::from(server).accept(far));
    let dialled = dialled.unwrap();
    let session = dialled.get_ref().1;
    assert_eq!(session.protocol_version(), Some(rustls::ProtocolVersion::TLSv1_3));
    assert_eq!(
        session.negotiated_key_exchange_group().map(|group| group.name()),
        Some(rustls::NamedGroup::X25519MLKEM768)
    );
}

#[tokio::test]
async fn t37_f59_a_revoked_leaf_is_refused_and_judged_again_once_it_is_listed() {
    let ca = Authority::new("cluster.local");
    let (web, cart, trust) = (ca.svid(WEB), ca.svid(CART), ca.bundles());
    let listed = |serials: &[&str]| {
        let lists = RevocationLists::from_pem(&ca.revoke(serials)).unwrap();
        Arc::new((*trust).clone().with_lists(&lists))
    };
    let (none, bad) = (listed(&[]), listed(&[web.serial()]));
    assert_eq!(handshake(&web, &none, expect(CART), &cart, &none).await, Ok(()));
    assert_eq!(
        handshake(&web, &none, expect(CART), &cart, &bad).await,
        Err(VerifyError::Revoked(web.id().clone()))
    );
    assert_eq!(still_trusted(&trust, web.chain()), Ok(()));
    assert_eq!(still_trusted(&none, web.chain()), Ok(()));
    assert_eq!(still_trusted(&bad, cart.chain()), Ok(()));
    assert_eq!(
        still_trusted(&bad, web.chain()),
        Err(VerifyError::Revoked(web.id().clone()))
    );
    // Roots that are no longer there vouch for nobody.
    let others = Authority::new("cluster.local").bundles();
    assert!(still_trusted(&others, web.chain()).is_err());
    for broken in ["", "-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n"] {
        assert!(RevocationLists::from_pem(broken).is_err());
    }
}

#[tokio::test]
async fn t37_unknown_status_denies_and_what_is_open_goes_on() {
    let ca = Authority::new("cluster.local");
    let key = KeyPair::generate().unwrap();
    let intermediate = CertifiedIssuer::signed_by(ca_params("intermediate"), key, &ca.issuer).unwrap();
    let key = KeyPair::generate().unwrap();
    let leaf = leaf_params(WEB).signed_by(&key, &intermediate).unwrap().pem();
    let web = Svid::from_pem(&(leaf + &intermediate.pem()), &key.serialize_pem()).unwrap();
    let (cart, trust) = (ca.svid(CART), ca.bundles());
    let other = Authority::new("other.example").revoke(&[]);
    let (of_root, of_intermediate) = (ca.revoke(&[]), list(&intermediate, &[]));
    for (case, lists, admitted) in [
        ("both issuers", [&of_root, &of_intermediate], true),
        ("the root alone", [&of_root, &other], false),
        ("the intermediate alone", [&of_intermediate, &other], false),
        ("neither", [&other, &other], false),
    ] {
        let lists = RevocationLists::from_pem(&lists.map(String::as_str).concat()).unwrap();
        let listed = Arc::new((*trust).clone().with_lists(&lists));
        let verdict = handshake(&web, &trust, expect(CART), &cart, &listed).await;
        let want = if admitted {
            Ok(())
        } else {
            Err(VerifyError::Revoked(web.id().clone()))
        };
        assert_eq!(verdict, want, "lists of {case}");
        assert_eq!(still_trusted(&listed, web.chain()), Ok(()), "lists of {case}");
    }
}
