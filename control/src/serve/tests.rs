//! The port as a whole, over loopback: who is served and what is refused.

use super::*;
use crate::{
    index::{
        Index,
        tests::{ALL, settings},
    },
    serve::tls::{Certificate, incoming, server_config},
};
use culvert_io::control::Control;
use culvert_proto::{
    ca::{IstioCertificateRequest, istio_certificate_service_client::IstioCertificateServiceClient},
    discovery::{
        DeltaDiscoveryRequest, aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
    },
    node::{NodeReport, node_service_client::NodeServiceClient},
    type_url,
};
use std::{net::SocketAddr, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tonic::{Code, Request, Status};

const TOKEN: &str = "token-of-node-a-000";

struct Port {
    address: SocketAddr,
    folder: tempfile::TempDir,
    _publish: watch::Sender<Arc<World>>,
    _reports: mpsc::Receiver<Report>,
}

async fn open() -> Port {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::generated(folder.path(), Duration::from_secs(3600)).unwrap();
    let certificate = Certificate::new(&authority, "control.example", &[]).unwrap();
    let (publish, world) = watch::channel(
        Index::new(settings(), 0, Default::default())
            .apply(&[], vec![], ALL)
            .unwrap(),
    );
    let (reports, heard) = mpsc::channel(64);
    let tokens = [(TOKEN.to_owned(), "a".to_owned())].into();
    let shared = Arc::new(Shared {
        settings: settings(),
        world,
        source: "test".into(),
        tokens: Tokens::new(tokens).unwrap(),
        authority: ArcSwap::from_pointee(authority),
        limits: Limits::default(),
        acks: Acks::default(),
        record: Record::open(folder.path()).unwrap().0,
        reports,
        metrics: crate::metrics::Metrics::new().unwrap(),
    });
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let config = server_config(Arc::new(certificate)).unwrap();
    tokio::spawn(router(&shared).serve_with_incoming(incoming(listener, config)));
    Port {
        address,
        folder,
        _publish: publish,
        _reports: heard,
    }
}

impl Port {
    fn control(&self, token: &str) -> Control {
        let file = self.folder.path().join(format!("token-{}", token.len()));
        std::fs::write(&file, token).unwrap();
        Control {
            address: format!("https://{}", self.address),
            bundle: self.folder.path().join("root.pem"),
            name: "control.example".into(),
            token: file,
        }
    }

    /// The answers of every API to a caller with this token.
    async fn ask_all(&self, token: &str) -> [Result<(), Status>; 3] {
        let control = self.control(token);
        let (channel, credentials) = (control.channel().unwrap(), control.credentials());
        let mut ca = IstioCertificateServiceClient::with_interceptor(channel.clone(), credentials.clone());
        let mut ads =
            AggregatedDiscoveryServiceClient::with_interceptor(channel.clone(), credentials.clone());
        let mut nodes = NodeServiceClient::with_interceptor(channel, credentials);
        let first = DeltaDiscoveryRequest {
            type_url: type_url::MESH_CONFIG.to_owned(),
            ..DeltaDiscoveryRequest::default()
        };
        use tokio_stream::StreamExt;
        let discovered = async {
            let requests = tokio_stream::iter([first]).chain(tokio_stream::pending());
            let mut answers = ads.delta_aggregated_resources(requests).await?.into_inner();
            answers.message().await.map(|_| ())
        };
        let discovered = discovered.await;
        let attended = async {
            let reports = tokio_stream::pending::<NodeReport>();
            let mut orders = nodes.attend(reports).await?.into_inner();
            orders.message().await.map(|_| ())
        };
        [
            ca.create_certificate(IstioCertificateRequest::default())
                .await
                .map(|_| ()),
            discovered,
            attended.await,
        ]
    }
}

#[tokio::test]
async fn t51_every_api_needs_the_token_of_a_node() {
    let port = open().await;
    for token in ["no-token-of-any-node", "token-of-node-a-00", "x"] {
        for answer in port.ask_all(token).await {
            assert_eq!(answer.unwrap_err().code(), Code::Unauthenticated, "{token:?}");
        }
    }
    let [certificate, discovered, attended] = port.ask_all(TOKEN).await;
    // It asks for no identity.
    assert_eq!(certificate.unwrap_err().message(), "request not granted");
    discovered.unwrap();
    attended.unwrap();
}

#[tokio::test]
async fn t51_t52_there_is_no_plaintext_and_garbage_is_let_go_of() {
    let port = open().await;
    for garbage in [
        &b"GET /debug/pprof HTTP/1.1\r\n\r\n"[..],
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        &[0x16, 0x03, 0x01, 0xff, 0xff, 0x01],
        &[0xff; 4096],
    ] {
        let mut socket = TcpStream::connect(port.address).await.unwrap();
        let _ = socket.write_all(garbage).await;
        let mut answer = vec![];
        let read = tokio::time::timeout(Duration::from_secs(10), socket.read_to_end(&mut answer));
        let _ = read.await.expect("it is let go of within the deadline");
        assert!(!answer.starts_with(b"HTTP"), "{answer:?}");
    }
    port.ask_all(TOKEN).await[1].as_ref().unwrap();
}

#[tokio::test]
async fn t52_messages_without_measure_are_refused_before_they_are_taken_in() {
    let port = open().await;
    let control = port.control(TOKEN);
    let mut ca =
        IstioCertificateServiceClient::with_interceptor(control.channel().unwrap(), control.credentials());
    let huge = IstioCertificateRequest {
        csr: "x".repeat(8 << 20),
        ..IstioCertificateRequest::default()
    };
    let refused = ca.create_certificate(huge).await.unwrap_err();
    assert!(
        matches!(
            refused.code(),
            Code::OutOfRange | Code::ResourceExhausted | Code::Cancelled | Code::Internal
        ),
        "{refused:?}"
    );
    let mut ads =
        AggregatedDiscoveryServiceClient::with_interceptor(control.channel().unwrap(), control.credentials())
            // Whatever were said to them, it would be read here.
            .max_decoding_message_size(64 << 20);
    let name = "x".repeat(1000);
    for (names, code) in [
        (vec!["x".repeat(2_000)], Some(Code::InvalidArgument)),
        (vec![name; 34_000], None),
    ] {
        let huge = DeltaDiscoveryRequest {
            type_url: type_url::ADDRESS.to_owned(),
            resource_names_subscribe: names,
            ..DeltaDiscoveryRequest::default()
        };
        let answered = async {
            let requests = tokio_stream::iter([huge]);
            let mut answers = ads
                .delta_aggregated_resources(Request::new(requests))
                .await?
                .into_inner();
            answers.message().await
        };
        let answered = tokio::time::timeout(Duration::from_secs(10), answered)
            .await
            .unwrap();
        match (answered, code) {
            (Err(status), Some(code)) => assert_eq!(status.code(), code, "{status:?}"),
            // The connection may break before the status has come.
            (answered, _) => assert!(!matches!(answered, Ok(Some(_))), "{answered:?}"),
        }
    }
    port.ask_all(TOKEN).await[1].as_ref().unwrap();
}

#[tokio::test]
async fn t52_deep_nesting_in_a_request_is_refused_before_it_is_read() {
    use prost_types::{ListValue, Struct, Value, value::Kind};
    let nested = |levels: usize| {
        let mut value = Value {
            kind: Some(Kind::BoolValue(true)),
        };
        for _ in 0..levels {
            let values = vec![value];
            value = Value {
                kind: Some(Kind::ListValue(ListValue { values })),
            };
        }
        IstioCertificateRequest {
            metadata: Some(Struct {
                fields: [("ImpersonatedIdentity".to_owned(), value)].into(),
            }),
            ..IstioCertificateRequest::default()
        }
    };
    let port = open().await;
    let control = port.control(TOKEN);
    let mut ca =
        IstioCertificateServiceClient::with_interceptor(control.channel().unwrap(), control.credentials());
    let read = ca.create_certificate(nested(10)).await.unwrap_err();
    assert_eq!(read.message(), "request not granted");
    let unread = ca.create_certificate(nested(200)).await.unwrap_err();
    assert!(unread.message().contains("recursion"), "{unread:?}");
}

/// The head of a gRPC message of a gibibyte, and as much of it as is taken until the port ends the call; how
/// many bytes that were.
async fn a_gibibyte(port: &Port, path: &str) -> usize {
    use rustls_pki_types::{CertificateDer, pem::PemObject};
    let mut roots = rustls::RootCertStore::empty();
    for root in CertificateDer::pem_file_iter(port.folder.path().join("root.pem")).unwrap() {
        roots.add(root.unwrap()).unwrap();
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let socket = TcpStream::connect(port.address).await.unwrap();
    let name = "control.example".try_into().unwrap();
    let tls = tokio_rustls::TlsConnector::from(Arc::new(config))
        .connect(name, socket)
        .await
        .unwrap();
    let (requests, connection) = h2::client::handshake(tls).await.unwrap();
    tokio::spawn(connection);
    let request = http::Request::post(format!("https://control.example{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("authorization", format!("Bearer {TOKEN}"))
        .body(())
        .unwrap();
    let (answer, mut send) = requests
        .ready()
        .await
        .unwrap()
        .send_request(request, false)
        .unwrap();
    send.send_data(bytes::Bytes::from_static(&[0, 0x40, 0, 0, 0]), false)
        .unwrap();
    let mut taken = 0;
    let pour = async {
        while taken < 1 << 30 {
            send.reserve_capacity(64 << 10);
            let Some(Ok(room)) = std::future::poll_fn(|cx| send.poll_capacity(cx)).await else {
                return;
            };
            if send.send_data(vec![b'x'; room].into(), false).is_err() {
                return;
            }
            taken += room;
        }
    };
    let ends = async {
        if let Ok(answer) = answer.await {
            let mut body = answer.into_body();
            while body.data().await.is_some_and(|data| data.is_ok()) {}
        }
    };
    let both = async { tokio::join!(pour, ends) };
    tokio::time::timeout(Duration::from_secs(20), both)
        .await
        .expect("the call is ended");
    taken
}

#[tokio::test]
async fn t52_a_message_of_a_gibibyte_is_refused_by_its_head() {
    let port = open().await;
    for path in [
        "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources",
        "/istio.v1.auth.IstioCertificateService/CreateCertificate",
    ] {
        let taken = a_gibibyte(&port, path).await;
        // What its windows let in at once, and no more.
        assert!(taken < 32 << 20, "{path}: {taken} bytes were taken");
    }
    port.ask_all(TOKEN).await[1].as_ref().unwrap();
}

#[tokio::test]
async fn a_node_that_holds_a_hundred_thousand_workloads_resumes() {
    const HELD: usize = 100_000;
    let port = open().await;
    let control = port.control(TOKEN);
    let (channel, credentials) = (control.channel().unwrap(), control.credentials());
    let mut ads = AggregatedDiscoveryServiceClient::with_interceptor(channel, credentials)
        .max_decoding_message_size(64 << 20);
    let held = |number: usize| {
        let name = format!("Kubernetes//Pod/a-namespace-of-the-mesh/a-workload-of-it-{number:06}");
        (name, format!("{number:016x}"))
    };
    let first = DeltaDiscoveryRequest {
        type_url: type_url::ADDRESS.to_owned(),
        initial_resource_versions: (0..HELD).map(held).collect(),
        ..DeltaDiscoveryRequest::default()
    };
    let size = prost::Message::encoded_len(&first);
    assert!(size > 7 << 20, "{size} bytes");
    use tokio_stream::StreamExt;
    let requests = tokio_stream::iter([first]).chain(tokio_stream::pending());
    let mut answers = ads
        .delta_aggregated_resources(Request::new(requests))
        .await
        .unwrap()
        .into_inner();
    // There is none of them any more, and the node is told of each.
    let mut removed = 0;
    while removed < HELD {
        let answer = answers
            .message()
            .await
            .expect("the node is served")
            .expect("an answer");
        removed += answer.removed_resources.len();
    }
    assert_eq!(removed, HELD);
}

#[tokio::test]
async fn t52_strangers_that_hold_connections_leave_room_for_nodes() {
    let port = open().await;
    let mut held = vec![];
    for _ in 0..300 {
        if let Ok(socket) = TcpStream::connect(port.address).await {
            held.push(socket);
        }
    }
    // Those beyond the address's share are let go of at once, long before the handshake's deadline.
    for mut socket in held.drain(100..) {
        let mut answer = [0; 1];
        let ended = tokio::time::timeout(Duration::from_secs(3), socket.read(&mut answer));
        assert!(matches!(ended.await, Ok(Ok(0) | Err(_))), "it is kept");
    }
    // All of them come from the node's own address, which is the worst case: their deadline is five seconds.
    let started = std::time::Instant::now();
    while started.elapsed() < Duration::from_secs(20) {
        if port.ask_all(TOKEN).await[1].is_ok() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    panic!("a node is not served for {:?}", started.elapsed());
}
