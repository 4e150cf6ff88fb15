//! SVIDs against a scripted CA: what is taken, kept, renewed and refused.

use super::*;
use crate::tls::tests::{Authority, CART, WEB};
use culvert_proto::ca::{
    IstioCertificateResponse,
    istio_certificate_service_server::{IstioCertificateService, IstioCertificateServiceServer},
};
use rcgen::ExtendedKeyUsagePurpose;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use tokio_stream::StreamExt;
use tonic::{Request, Response, Status};

/// How a CA answers a request of an identity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Answer {
    Good,
    OtherId,
    OtherKey,
    Expired,
    NotYet,
    LongChain,
    OtherRoot,
    NoRoots,
    Garbage,
    Nothing,
}

const BAD: [Answer; 9] = [
    Answer::OtherId,
    Answer::OtherKey,
    Answer::Expired,
    Answer::NotYet,
    Answer::LongChain,
    Answer::OtherRoot,
    Answer::NoRoots,
    Answer::Garbage,
    Answer::Nothing,
];

const LIFE: Duration = Duration::from_secs(6);

impl Answer {
    fn elements(self, ca: &Authority, csr: &str) -> Vec<String> {
        let now = SystemTime::now();
        let life = |params: &mut CertificateParams, from: SystemTime, to: SystemTime| {
            params.not_before = from.into();
            params.not_after = to.into();
        };
        let good = || ca.sign(WEB, csr, |params| life(params, now, now + LIFE));
        let hour = Duration::from_secs(3600);
        match self {
            Self::Good => vec![good(), ca.root()],
            Self::OtherId => vec![
                ca.sign(CART, csr, |params| life(params, now, now + LIFE)),
                ca.root(),
            ],
            Self::OtherKey => vec![ca.leaf(WEB, |_| ()).0, ca.root()],
            Self::Expired => vec![
                ca.sign(WEB, csr, |params| life(params, now - hour, now - LIFE)),
                ca.root(),
            ],
            Self::NotYet => vec![
                ca.sign(WEB, csr, |params| life(params, now + hour, now + hour + LIFE)),
                ca.root(),
            ],
            Self::LongChain => vec![good(), ca.root().repeat(29), ca.root()],
            Self::OtherRoot => vec![good(), Authority::new("cluster.local").root()],
            Self::NoRoots => vec![good()],
            Self::Garbage => vec!["garbage".into(), "garbage".into()],
            Self::Nothing => vec![],
        }
    }
}

#[test]
fn f14_an_answer_that_is_not_what_was_asked_for_is_discarded() {
    let ca = Authority::new("cluster.local");
    let id: SpiffeId = WEB.parse().unwrap();
    let taken = |answer: Answer| {
        let key = NewKey::generate().unwrap();
        let csr = CertificateParams::default()
            .serialize_request(&key)
            .unwrap()
            .pem()
            .unwrap();
        accept_answer(&id, &answer.elements(&ca, &csr), &key.der())
    };
    assert_eq!(taken(Answer::Good).unwrap().svid.id(), &id);
    for answer in BAD {
        assert!(taken(answer).is_err(), "{answer:?}");
    }
}

/// A CA that answers well once, and never again.
struct Treacherous {
    ca: Authority,
    asked: Arc<Mutex<Vec<Answer>>>,
}

#[tonic::async_trait]
impl IstioCertificateService for Treacherous {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let mut asked = self.asked.lock();
        let answer = match asked.len() {
            0 => Answer::Good,
            number => BAD[(number - 1) % BAD.len()],
        };
        asked.push(answer);
        let cert_chain = answer.elements(&self.ca, &request.into_inner().csr);
        Ok(Response::new(IstioCertificateResponse { cert_chain }))
    }
}

#[tokio::test]
async fn f14_the_svid_in_hand_stays_while_the_ca_answers_badly() {
    let root = Authority::new("cluster.local");
    let (chain, key) = root.leaf(WEB, |params| {
        params.subject_alt_names = vec![SanType::DnsName("control.example".try_into().unwrap())];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    });
    let folder = tempfile::tempdir().unwrap();
    let (bundle, token) = (folder.path().join("root.pem"), folder.path().join("token"));
    std::fs::write(&bundle, root.root()).unwrap();
    std::fs::write(&token, "token").unwrap();
    let mut tls =
        rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(
                vec![CertificateDer::from_pem_slice(chain.as_bytes()).unwrap()],
                PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap(),
            )
            .unwrap();
    tls.alpn_protocols = vec![b"h2".to_vec()];
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(tls));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener).then(move |socket| {
        let acceptor = acceptor.clone();
        async move {
            let mut tls = acceptor.accept(socket?).await?;
            // The server takes no TLS stream as it is.
            let (ours, mut theirs) = tokio::io::duplex(64 * 1024);
            tokio::spawn(async move { tokio::io::copy_bidirectional(&mut tls, &mut theirs).await });
            Ok::<_, std::io::Error>(ours)
        }
    });
    let asked = Arc::<Mutex<Vec<Answer>>>::default();
    let ca = IstioCertificateServiceServer::new(Treacherous {
        ca: Authority::new("cluster.local"),
        asked: asked.clone(),
    });
    let serving = tonic::transport::Server::builder()
        .add_service(ca)
        .serve_with_incoming(incoming);
    tokio::spawn(serving);

    let control = Control {
        address: format!("https://{address}"),
        bundle,
        name: "control.example".into(),
        token,
    };
    let identities = Identities::new(&control).unwrap();
    let lease = identities.acquire(&WEB.parse().unwrap());
    let first = lease
        .wait(Duration::from_secs(10))
        .await
        .expect("the good answer is taken");
    let until = SystemTime::now() + Duration::from_millis(4_800);
    while SystemTime::now() < until {
        tokio::time::sleep(Duration::from_millis(50)).await;
        let held = lease.current().expect("it is valid until it ends");
        assert_eq!(
            held.svid.serial(),
            first.svid.serial(),
            "after {:?}",
            asked.lock()
        );
    }
    assert!(asked.lock().len() >= 3, "{:?}", asked.lock());
    tokio::time::sleep(LIFE).await;
    assert!(lease.current().is_none(), "nothing is used past its end");
}
