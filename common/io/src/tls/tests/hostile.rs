//! Peers that bend certificates and handshakes.

use super::*;
use rcgen::{CustomExtension, GeneralSubtree, NameConstraints};
use rustls::{
    ClientConfig, ClientConnection, HandshakeKind, ServerConfig, ServerConnection, SupportedProtocolVersion,
    client::Resumption,
    crypto::aws_lc_rs,
    sign::{CertifiedKey, SingleCertAndKey},
    version::{TLS12, TLS13},
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

type Change<'c> = &'c dyn Fn(&mut CertificateParams);

/// Signs `links` intermediates, each by the one before and changed by `change`, and a leaf by the last.
fn chain(ca: &Authority, links: usize, change: Change<'_>, leaf: Change<'_>) -> (String, String) {
    let mut intermediates: Vec<CertifiedIssuer<'static, KeyPair>> = vec![];
    for number in 0..links {
        let mut params = ca_params(&format!("intermediate {number}"));
        change(&mut params);
        let above = intermediates.last().unwrap_or(&ca.issuer);
        let issued = CertifiedIssuer::signed_by(params, KeyPair::generate().unwrap(), above).unwrap();
        intermediates.push(issued);
    }
    let mut params = leaf_params(WEB);
    leaf(&mut params);
    let key = KeyPair::generate().unwrap();
    let last = intermediates.last().unwrap_or(&ca.issuer);
    let mut pem = params.signed_by(&key, last).unwrap().pem();
    for intermediate in intermediates.iter().rev() {
        pem.push_str(&intermediate.pem());
    }
    (pem, key.serialize_pem())
}

/// A client's configuration that keeps none of our rules: any server, any version, tickets and early data.
fn lawless((chain, key): &(String, String), versions: &[&'static SupportedProtocolVersion]) -> ClientConfig {
    let trusting = Verifier {
        bundles: Arc::default(),
        expected: Expected::AnyTrusted,
    };
    let chain = CertificateDer::pem_slice_iter(chain.as_bytes())
        .collect::<Result<Vec<_>, _>>()
        .unwrap();
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
    let key = aws_lc_rs::sign::any_supported_type(&key).unwrap();
    // Presented without a look at it.
    let mut config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_protocol_versions(versions)
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anyone(trusting)))
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(CertifiedKey::new(chain, key))));
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.enable_early_data = true;
    config.resumption = Resumption::in_memory_sessions(8);
    config
}

/// Takes every server; signatures are checked as ours are.
#[derive(Debug)]
struct Anyone(Verifier);

impl rustls::client::danger::ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _leaf: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: rustls_pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _leaf: &CertificateDer<'_>,
        _signature: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        rustls::client::danger::ServerCertVerifier::verify_tls13_signature(&self.0, message, leaf, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        rustls::client::danger::ServerCertVerifier::supported_verify_schemes(&self.0)
    }
}

fn client(config: ClientConfig) -> ClientConnection {
    ClientConnection::new(Arc::new(config), ServerName::try_from("unused.example").unwrap()).unwrap()
}

/// Passes bytes to and fro until neither side has more to say; the server's error, if it has one.
fn converse(client: &mut ClientConnection, server: &mut ServerConnection) -> Result<(), rustls::Error> {
    loop {
        let (mut there, mut back) = (vec![], vec![]);
        while client.wants_write() {
            client.write_tls(&mut there).unwrap();
        }
        let mut rest = &there[..];
        while !rest.is_empty() {
            server.read_tls(&mut rest).unwrap();
            server.process_new_packets()?;
        }
        while server.wants_write() {
            server.write_tls(&mut back).unwrap();
        }
        let mut rest = &back[..];
        while !rest.is_empty() {
            client.read_tls(&mut rest).unwrap();
            client.process_new_packets()?;
        }
        if there.is_empty() && back.is_empty() {
            return Ok(());
        }
    }
}

fn server(ca: &Authority) -> Arc<ServerConfig> {
    server_config(&ca.svid(CART), &ca.bundles()).unwrap()
}

fn shakes_hands(
    ca: &Authority,
    config: ClientConfig,
) -> Result<(ClientConnection, ServerConnection), rustls::Error> {
    let (mut client, mut server) = (client(config), ServerConnection::new(server(ca)).unwrap());
    converse(&mut client, &mut server)?;
    Ok((client, server))
}

fn nothing(_: &mut CertificateParams) {}

#[test]
fn t34_an_issuer_that_may_not_is_no_issuer() {
    let ca = Authority::new("cluster.local");
    let uri_constraint = |domain: &str| {
        let length = domain.len() as u8;
        // permittedSubtrees of one URI host (RFC 5280 §4.2.1.10).
        let mut der = vec![0x30, length + 6, 0xa0, length + 4, 0x30, length + 2, 0x86, length];
        der.extend_from_slice(domain.as_bytes());
        let mut extension = CustomExtension::from_oid_content(&[2, 5, 29, 30], der);
        extension.set_criticality(true);
        extension
    };
    let dns = |name: &str| SanType::DnsName(name.try_into().unwrap());
    let permitted = |name: &str| NameConstraints {
        permitted_subtrees: vec![GeneralSubtree::DnsName(name.to_owned())],
        excluded_subtrees: vec![],
    };
    let cases: [(&str, Change<'_>, Change<'_>, bool); 8] = [
        ("an honest intermediate", &nothing, &nothing, true),
        (
            "an intermediate that is no CA",
            &|ca| ca.is_ca = IsCa::ExplicitNoCa,
            &nothing,
            false,
        ),
        (
            "an intermediate that may not sign",
            &|ca| ca.key_usages = vec![KeyUsagePurpose::DigitalSignature],
            &nothing,
            false,
        ),
        (
            "another DNS name than the issuer may sign",
            &|ca| ca.name_constraints = Some(permitted("shop.example")),
            &|leaf| leaf.subject_alt_names.push(dns("bank.example")),
            false,
        ),
        (
            "a URI of another host than the issuer may sign",
            &|ca| ca.custom_extensions = vec![uri_constraint("other.example")],
            &nothing,
            false,
        ),
        (
            "an issuer for servers alone",
            &|ca| ca.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth],
            &nothing,
            false,
        ),
        (
            "a leaf for code signing",
            &nothing,
            &|leaf| leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::CodeSigning],
            false,
        ),
        (
            "a critical extension that nobody knows",
            &nothing,
            &|leaf| {
                let mut unknown =
                    CustomExtension::from_oid_content(&[1, 3, 6, 1, 4, 1, 99999, 1], vec![5, 0]);
                unknown.set_criticality(true);
                leaf.custom_extensions = vec![unknown];
            },
            false,
        ),
    ];
    for (case, intermediate, leaf, admitted) in cases {
        let presented = chain(&ca, 1, intermediate, leaf);
        let outcome = shakes_hands(&ca, lawless(&presented, &[&TLS13]));
        assert_eq!(outcome.is_ok(), admitted, "{case}: {:?}", outcome.err());
    }
}

#[test]
fn t34_a_leaf_out_of_its_time_is_refused() {
    let ca = Authority::new("cluster.local");
    let (past, future) = (rcgen::date_time_ymd(2020, 1, 1), rcgen::date_time_ymd(2120, 1, 1));
    let cases: [(&str, Change<'_>); 2] = [
        ("ended", &|leaf| leaf.not_after = past),
        ("not yet begun", &|leaf| leaf.not_before = future),
    ];
    for (case, change) in cases {
        let presented = chain(&ca, 0, &nothing, change);
        assert!(
            shakes_hands(&ca, lawless(&presented, &[&TLS13])).is_err(),
            "{case}"
        );
    }
}

#[test]
fn t42_chains_are_short_and_cost_little() {
    let ca = Authority::new("cluster.local");
    for (links, admitted) in [(0, true), (4, true), (5, false), (40, false)] {
        let presented = chain(&ca, links, &nothing, &nothing);
        let outcome = shakes_hands(&ca, lawless(&presented, &[&TLS13]));
        assert_eq!(outcome.is_ok(), admitted, "{links}: {:?}", outcome.err());
    }
    // Issuers that all have one name and one key each: every path has to be tried, and none leads to the root.
    let stranger = Authority::new("cluster.local");
    let same = |params: &mut CertificateParams| {
        params.distinguished_name = rcgen::DistinguishedName::new();
        params
            .distinguished_name
            .push(DnType::CommonName, "cluster.local");
    };
    let maze = chain(&stranger, 4, &same, &same);
    // Names by the thousand, for an issuer that constrains them.
    let many = |leaf: &mut CertificateParams| {
        let names = (0..1_500).map(|n| SanType::DnsName(format!("n{n}.shop.example").try_into().unwrap()));
        leaf.subject_alt_names.extend(names);
    };
    let crowd = chain(&stranger, 1, &nothing, &many);
    for (case, presented) in [("a maze", maze), ("a crowd of names", crowd)] {
        let start = Instant::now();
        let refused = shakes_hands(&ca, lawless(&presented, &[&TLS13])).err();
        assert!(refused.is_some(), "{case}");
        assert!(
            start.elapsed() < Duration::from_secs(1),
            "{case}: {:?}",
            start.elapsed()
        );
    }
}

#[test]
fn t41_tls_1_2_is_refused_by_both_ends() {
    let ca = Authority::new("cluster.local");
    let web = ca.leaf(WEB, |_| ());
    let refused = shakes_hands(&ca, lawless(&web, &[&TLS12])).err();
    assert!(
        matches!(refused, Some(rustls::Error::PeerIncompatible(_))),
        "{refused:?}"
    );
    // A server of the old version, and our client.
    let old = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_protocol_versions(&[&TLS12])
        .unwrap()
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(ca.svid(CART).certified())));
    let ours = client_config(&ca.svid(WEB), &ca.bundles(), expect(CART)).unwrap();
    let name = ServerName::try_from("unused.example").unwrap();
    let mut client = ClientConnection::new(ours, name).unwrap();
    let mut old = ServerConnection::new(Arc::new(old)).unwrap();
    assert!(converse(&mut client, &mut old).is_err());
    assert!(client.is_handshaking() && old.is_handshaking());
}

#[test]
fn t35_no_ticket_is_given_and_no_session_resumed() {
    let ca = Authority::new("cluster.local");
    let config = Arc::new(lawless(&ca.leaf(WEB, |_| ()), &[&TLS13]));
    let ours = server(&ca);
    for round in 0..3 {
        let name = ServerName::try_from("unused.example").unwrap();
        let mut client = ClientConnection::new(config.clone(), name).unwrap();
        let mut server = ServerConnection::new(ours.clone()).unwrap();
        assert!(
            client.early_data().is_none(),
            "round {round}: nothing to send early data under"
        );
        converse(&mut client, &mut server).unwrap();
        assert_eq!(
            client.handshake_kind(),
            Some(HandshakeKind::Full),
            "round {round}"
        );
        assert_eq!(
            server.handshake_kind(),
            Some(HandshakeKind::Full),
            "round {round}"
        );
        assert_eq!(client.tls13_tickets_received(), 0, "round {round}");
        assert!(server.early_data().is_none(), "round {round}");
    }
}

/// The extensions of a ClientHello, by number, in a plain walk over RFC 8446 §4.1.2.
fn extensions(hello: &[u8]) -> Vec<(u16, Vec<u8>)> {
    let number = |at: usize| usize::from(u16::from_be_bytes([hello[at], hello[at + 1]]));
    // Record and handshake heads, version, random; then three lists with their lengths.
    let mut at = 5 + 4 + 2 + 32;
    at += 1 + usize::from(hello[at]);
    at += 2 + number(at);
    at += 1 + usize::from(hello[at]);
    let end = at + 2 + number(at);
    at += 2;
    let mut found = vec![];
    while at < end {
        let length = number(at + 2);
        found.push((number(at) as u16, hello[at + 4..at + 4 + length].to_vec()));
        at += 4 + length;
    }
    found
}

#[test]
fn t41_our_client_hello_offers_the_hybrid_group_first_and_no_early_data() {
    let ca = Authority::new("cluster.local");
    let ours = client_config(&ca.svid(WEB), &ca.bundles(), expect(CART)).unwrap();
    let mut client = ClientConnection::new(ours, ServerName::try_from("unused.example").unwrap()).unwrap();
    let mut hello = vec![];
    client.write_tls(&mut hello).unwrap();
    let extensions = extensions(&hello);
    let of = |kind: u16| {
        extensions
            .iter()
            .find(|(found, _)| *found == kind)
            .map(|(_, body)| &body[..])
    };
    for (name, kind) in [("server name", 0), ("pre-shared key", 41), ("early data", 42)] {
        assert_eq!(of(kind), None, "{name}");
    }
    assert_eq!(of(43), Some(&[2, 3, 4][..]), "supported versions: 1.3 alone");
    // Groups and key shares, each after its list's length.
    assert_eq!(of(10).unwrap()[2..4], [0x11, 0xec], "X25519MLKEM768 first");
    assert_eq!(of(51).unwrap()[2..4], [0x11, 0xec], "with a share of it at once");
}

/// Cuts a handshake record into records of `size` bytes.
fn fragmented(record: &[u8], size: usize) -> Vec<u8> {
    let mut cut = vec![];
    for chunk in record[5..].chunks(size) {
        cut.extend([record[0], record[1], record[2]]);
        cut.extend((chunk.len() as u16).to_be_bytes());
        cut.extend_from_slice(chunk);
    }
    cut
}

#[test]
fn t41_a_client_hello_in_pieces_is_one_client_hello() {
    let ca = Authority::new("cluster.local");
    for size in [1, 2, 3, 100, 500] {
        let mut client = client(lawless(&ca.leaf(WEB, |_| ()), &[&TLS13]));
        let mut hello = vec![];
        client.write_tls(&mut hello).unwrap();
        let mut server = ServerConnection::new(server(&ca)).unwrap();
        for byte in fragmented(&hello, size).chunks(7) {
            server.read_tls(&mut &byte[..]).unwrap();
            server
                .process_new_packets()
                .unwrap_or_else(|e| panic!("records of {size}: {e}"));
        }
        converse(&mut client, &mut server).unwrap_or_else(|e| panic!("records of {size}: {e}"));
        assert!(!server.is_handshaking(), "records of {size}");
    }
}

#[tokio::test]
async fn t41_what_comes_instead_of_a_handshake_ends_it() {
    let ca = Authority::new("cluster.local");
    let mut hello = vec![];
    client(lawless(&ca.leaf(WEB, |_| ()), &[&TLS13]))
        .write_tls(&mut hello)
        .unwrap();
    let close_notify = [0x15, 3, 3, 0, 2, 1, 0];
    let warning = [0x15, 3, 3, 0, 2, 1, 90];
    let with = |more: &[u8]| [&hello[..], more].concat();
    for (case, bytes) in [
        ("close_notify first", close_notify.to_vec()),
        ("close_notify after the hello", with(&close_notify)),
        (
            "close_notify in the hello",
            [&hello[..100], &close_notify].concat(),
        ),
        ("warnings without end", with(&warning.repeat(500))),
        ("two hellos", with(&hello)),
        ("application data", with(&[0x17, 3, 3, 0, 1, 0])),
        ("records without content", with(&[0x16, 3, 3, 0, 0].repeat(500))),
        (
            "a record of 65535 bytes",
            [&[0x16, 3, 1, 0xff, 0xff][..], &[0; 65535]].concat(),
        ),
        ("HTTP/1", b"GET / HTTP/1.1\r\nhost: x\r\n\r\n".to_vec()),
        (
            "HTTP/2 in plaintext",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(),
        ),
        ("zeros", vec![0; 4096]),
    ] {
        let (mut near, far) = tokio::io::duplex(256 * 1024);
        let accepting = TlsAcceptor::from(server(&ca)).accept(far);
        near.write_all(&bytes).await.unwrap();
        // Who says no more has ended, too; who only waits meets the handshake's deadline.
        near.shutdown().await.unwrap();
        let ended = tokio::time::timeout(Duration::from_secs(5), async {
            let accepted = accepting.await;
            let mut said = vec![];
            let _ = near.read_to_end(&mut said).await;
            accepted.is_err()
        });
        assert_eq!(ended.await, Ok(true), "{case}");
    }
}
