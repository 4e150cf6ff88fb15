//! Both ends of a tunnel over loopback, with real TLS between them.

use super::*;
use crate::{
    budget::{Budget, Buffers},
    copy::{Fault, Flow, Initiator, relay},
    tls::{
        Expected, client_config, server_config,
        tests::{Authority, CART, WEB},
    },
};
use culvert_core::hbone::{Baggage, Connect, Forwarded};
use http::StatusCode;
use std::sync::Arc;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

fn connect() -> Connect {
    Connect {
        authority: "10.0.0.1:80".parse().unwrap(),
        baggage: Baggage::default(),
        forwarded: Forwarded::default(),
        traceparent: None,
    }
}

async fn socket_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (near, far) = tokio::join!(
        TcpStream::connect(listener.local_addr().unwrap()),
        listener.accept()
    );
    (near.unwrap(), far.unwrap().0)
}

/// A tunnel whose far end accepts everything and relays it to the given application socket.
struct Pair {
    app: TcpStream,
    server: TcpStream,
    near: Arc<Flow>,
    ended: tokio::task::JoinHandle<(Result<(), Fault>, Result<(), Fault>)>,
}

async fn tunnel() -> (Tunnel, Incoming<TcpStream>) {
    let ca = Authority::new("cluster.local");
    let (near, far) = socket_pair().await;
    let budget = Budget::new(&Buffers::new(1 << 30));
    let expected = Expected::OneOf([CART.parse().unwrap()].into());
    let dialling = dial(
        near,
        client_config(&ca.svid(WEB), &ca.bundles(), expected).unwrap(),
        &budget,
    );
    let accepting = accept(
        far,
        server_config(&ca.svid(CART), &ca.bundles()).unwrap(),
        &budget,
    );
    let (dialled, accepted) = tokio::join!(dialling, accepting);
    let (tunnel, driver) = dialled.unwrap();
    tokio::spawn(driver);
    (tunnel, accepted.unwrap())
}

async fn pair() -> Pair {
    let (tunnel, mut incoming) = tunnel().await;
    assert_eq!((tunnel.peer().as_str(), incoming.peer().as_str()), (CART, WEB));
    let (app, captured) = socket_pair().await;
    let (delivered, server) = socket_pair().await;
    let far = tokio::spawn(async move {
        let (asked, responder) = incoming.next().await.unwrap();
        assert_eq!(asked, Ok(connect()));
        let stream = responder.accept().unwrap();
        let flow = Flow::default();
        tokio::spawn(async move { while incoming.next().await.is_some() {} });
        relay(delivered, stream, &flow, Initiator::Stream).await
    });
    let near = Arc::new(Flow::default());
    let flow = near.clone();
    let ended = tokio::spawn(async move {
        let stream = tunnel.open(&connect()).await.unwrap();
        let near = relay(captured, stream, &flow, Initiator::Socket).await;
        drop(tunnel);
        (near, far.await.unwrap())
    });
    Pair {
        app,
        server,
        near,
        ended,
    }
}

#[tokio::test]
async fn f53_bytes_and_half_closes_pass_both_ways() {
    let Pair {
        mut app,
        mut server,
        near,
        ended,
    } = pair().await;
    app.write_all(b"ping").await.unwrap();
    let mut four = [0; 4];
    server.read_exact(&mut four).await.unwrap();
    app.shutdown().await.unwrap();
    assert_eq!(server.read(&mut four).await.unwrap(), 0, "FIN arrives");
    server.write_all(b"late answer").await.unwrap();
    drop(server);
    let mut rest = vec![];
    app.read_to_end(&mut rest).await.unwrap();
    assert_eq!(rest, b"late answer");
    let (near_end, far_end) = ended.await.unwrap();
    assert!(near_end.is_ok() && far_end.is_ok(), "{near_end:?} {far_end:?}");
    use std::sync::atomic::Ordering::Relaxed;
    assert_eq!((near.received.load(Relaxed), near.sent.load(Relaxed)), (4, 11));
}

#[tokio::test]
async fn f53_a_reset_is_a_reset_at_the_other_end() {
    let Pair {
        app,
        mut server,
        ended,
        ..
    } = pair().await;
    crate::copy::reset(&app);
    drop(app);
    let error = server.read(&mut [0; 4]).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    let (near, far) = ended.await.unwrap();
    assert!(
        matches!(near, Err(Fault::Application(_))) && matches!(far, Err(Fault::Tunnel(_))),
        "{near:?} {far:?}"
    );
}

#[tokio::test]
async fn f46_a_cut_resets_both_applications() {
    let Pair {
        mut app,
        mut server,
        near,
        ended,
    } = pair().await;
    app.write_all(b"x").await.unwrap();
    server.read_exact(&mut [0; 1]).await.unwrap();
    near.cut();
    for end in [&mut app, &mut server] {
        let mut byte = [0];
        let read = tokio::time::timeout(Duration::from_secs(5), end.read(&mut byte)).await;
        let ended = read.expect("it is cut").unwrap_err();
        assert_eq!(ended.kind(), std::io::ErrorKind::ConnectionReset);
    }
    assert!(matches!(ended.await.unwrap().0, Err(Fault::Cut)));
}

#[tokio::test]
async fn a_refusal_is_a_status_and_the_tunnel_goes_on() {
    let (tunnel, mut incoming) = tunnel().await;
    tokio::spawn(async move {
        let (_, responder) = incoming.next().await.unwrap();
        responder.refuse(StatusCode::UNAUTHORIZED);
        let (_, responder) = incoming.next().await.unwrap();
        let _stream = responder.accept().unwrap();
        while incoming.next().await.is_some() {}
    });
    let refused = tunnel.open(&connect()).await;
    assert!(
        matches!(refused, Err(OpenError::Refused(StatusCode::UNAUTHORIZED))),
        "{refused:?}"
    );
    tunnel.open(&connect()).await.unwrap();
}

#[tokio::test]
async fn bulk_arrives_whole_and_in_order() {
    let Pair {
        app,
        mut server,
        ended,
        ..
    } = pair().await;
    let (mut app_read, mut app_write) = app.into_split();
    let sender = tokio::spawn(async move {
        for round in 0..512u32 {
            let block: Vec<u8> = (0..32 * 1024u32).map(|i| (i ^ round) as u8).collect();
            app_write.write_all(&block).await.unwrap();
        }
        app_write.shutdown().await.unwrap();
    });
    let mut all = Vec::new();
    server.read_to_end(&mut all).await.unwrap();
    assert_eq!(all.len(), 512 * 32 * 1024);
    for (at, byte) in all.iter().enumerate() {
        let (round, i) = ((at / 32768) as u32, (at % 32768) as u32);
        assert_eq!(*byte, (i ^ round) as u8, "at {at}");
    }
    sender.await.unwrap();
    drop(server);
    assert_eq!(app_read.read(&mut [0; 1]).await.unwrap(), 0);
    assert!(ended.await.unwrap().0.is_ok());
}

/// One connection through a tunnel: the application's end and the server's.
async fn carried(
    tunnel: &Tunnel,
    arrivals: &mut tokio::sync::mpsc::UnboundedReceiver<Responder>,
) -> (TcpStream, TcpStream) {
    let ((app, captured), (delivered, server)) = (socket_pair().await, socket_pair().await);
    let asked = connect();
    let accepted = async { arrivals.recv().await.unwrap().accept().unwrap() };
    let (near, far) = tokio::join!(tunnel.open(&asked), accepted);
    let near = near.unwrap();
    tokio::spawn(async move { relay(captured, near, &Flow::default(), Initiator::Socket).await });
    tokio::spawn(async move { relay(delivered, far, &Flow::default(), Initiator::Stream).await });
    (app, server)
}

/// Writes until nothing is taken any more: the other end does not read.
async fn fill(socket: &TcpStream) {
    let block = vec![0; 64 << 10];
    let silent = std::time::Duration::from_millis(500);
    while let Ok(writable) = tokio::time::timeout(silent, socket.writable()).await {
        writable.unwrap();
        let _ = socket.try_write(&block);
    }
}

/// How long so many bytes take.
async fn transfer(from: &mut TcpStream, to: &mut TcpStream, bytes: usize) -> std::time::Duration {
    let started = std::time::Instant::now();
    let (sent, mut arrived) = (vec![7; bytes], vec![0; bytes]);
    let (written, read) = tokio::join!(from.write_all(&sent), to.read_exact(&mut arrived));
    written.unwrap();
    read.unwrap();
    started.elapsed()
}

/// Settled D16, in both directions: the window of the whole tunnel is never what a stream waits for.
#[tokio::test]
async fn d16_beside_99_stalled_streams_the_100th_goes_at_full_rate() {
    const BYTES: usize = 32 << 20;
    for server_sends in [false, true] {
        let (tunnel, mut incoming) = tunnel().await;
        let (arrived, mut arrivals) = tokio::sync::mpsc::unbounded_channel();
        tokio::spawn(async move {
            while let Some((_, responder)) = incoming.next().await {
                let _ = arrived.send(responder);
            }
        });
        let way = |(app, server)| {
            if server_sends {
                (server, app)
            } else {
                (app, server)
            }
        };
        let (mut from, mut to) = way(carried(&tunnel, &mut arrivals).await);
        let alone = transfer(&mut from, &mut to, BYTES).await;
        let mut stalled = vec![];
        for _ in 0..99 {
            stalled.push(way(carried(&tunnel, &mut arrivals).await));
        }
        futures::future::join_all(stalled.iter().map(|(from, _)| fill(from))).await;
        assert_eq!(tunnel.streams(), 100);
        let bound = alone * 3 + std::time::Duration::from_secs(1);
        let beside = tokio::time::timeout(bound, transfer(&mut from, &mut to, BYTES)).await;
        assert!(
            beside.is_ok(),
            "alone {alone:?}, beside 99 stalled ones not within {bound:?}"
        );
    }
}

/// A peer that behaves as it likes, beneath TLS that is right.
async fn hostile<F: Future<Output = ()> + Send + 'static>(
    behave: impl FnOnce(h2::server::Connection<tokio_rustls::server::TlsStream<TcpStream>, bytes::Bytes>) -> F
    + Send
    + 'static,
    streams: u32,
) -> Tunnel {
    let ca = Authority::new("cluster.local");
    let (near, far) = socket_pair().await;
    let config = server_config(&ca.svid(CART), &ca.bundles()).unwrap();
    tokio::spawn(async move {
        let tls = tokio_rustls::TlsAcceptor::from(config).accept(far).await.unwrap();
        let mut server = h2::server::Builder::new();
        server.max_concurrent_streams(streams);
        behave(server.handshake(tls).await.unwrap()).await;
    });
    let expected = Expected::OneOf([CART.parse().unwrap()].into());
    let config = client_config(&ca.svid(WEB), &ca.bundles(), expected).unwrap();
    let (tunnel, driver) = dial(near, config, &Budget::new(&Buffers::new(1 << 30)))
        .await
        .unwrap();
    tokio::spawn(driver);
    tunnel
}

#[tokio::test]
async fn t43_a_peer_that_takes_its_streams_back_holds_no_caller_up() {
    let all_at_once = std::time::Instant::now();
    let no_room = hostile(
        |mut server| async move { while server.accept().await.is_some() {} },
        0,
    )
    .await;
    // Its settings must have come, or the first stream is sent on trust.
    tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    let opened = no_room.open(&connect()).await;
    assert!(matches!(opened, Err(OpenError::Full)), "{opened:?}");
    let away = hostile(
        |mut server| async move {
            server.graceful_shutdown();
            while server.accept().await.is_some() {}
        },
        100,
    )
    .await;
    tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    let opened = away.open(&connect()).await;
    assert!(matches!(opened, Err(OpenError::Closing(_))), "{opened:?}");
    assert!(all_at_once.elapsed() < std::time::Duration::from_secs(5));
}

#[tokio::test]
async fn a_tunnel_that_is_cut_ends_with_its_streams_at_either_end() {
    for accepting in [false, true] {
        let (tunnel, mut incoming) = tunnel().await;
        let watch = if accepting {
            incoming.watch()
        } else {
            tunnel.watch().clone()
        };
        assert_eq!(watch.peer.id.as_str(), if accepting { WEB } else { CART });
        let far = tokio::spawn(async move {
            let (_, responder) = incoming.next().await.unwrap();
            let mut stream = responder.accept().unwrap();
            tokio::spawn(async move { while incoming.next().await.is_some() {} });
            stream.recv.data().await
        });
        let mut stream = tunnel.open(&connect()).await.unwrap();
        watch.cut();
        assert!(stream.recv.data().await.is_none_or(|data| data.is_err()));
        assert!(far.await.unwrap().is_none_or(|data| data.is_err()));
        assert!(watch.is_closed());
        assert!(tunnel.open(&connect()).await.is_err());
    }
}

#[tokio::test]
async fn a_tunnel_that_is_retired_keeps_its_streams_and_takes_no_new_one() {
    let (tunnel, mut incoming) = tunnel().await;
    let watch = incoming.watch();
    tokio::spawn(async move {
        let mut streams = vec![];
        while let Some((_, responder)) = incoming.next().await {
            streams.push(responder.accept().unwrap());
        }
    });
    let mut stream = tunnel.open(&connect()).await.unwrap();
    watch.retire();
    tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    assert!(matches!(
        tunnel.open(&connect()).await,
        Err(OpenError::Closing(_))
    ));
    let silent = tokio::time::timeout(std::time::Duration::from_millis(200), stream.recv.data()).await;
    assert!(silent.is_err(), "the open stream goes on: {silent:?}");
}

#[tokio::test]
async fn f29_honest_cancels_retire_a_tunnel_before_its_peer_loses_patience() {
    let (tunnel, mut incoming) = tunnel().await;
    tokio::spawn(async move {
        let mut first = None;
        while let Some((_, responder)) = incoming.next().await {
            // It may have been cancelled by now.
            let stream = responder.accept();
            first = first.or(stream.ok());
        }
    });
    let mut kept = tunnel.open(&connect()).await.unwrap();
    let mut cancelled = 0;
    while !tunnel.is_retired() {
        // Half of them before the answer, half after it.
        let connect = connect();
        let opening = tunnel.open(&connect);
        let patience = std::time::Duration::from_millis(if cancelled % 2 == 0 { 0 } else { 1_000 });
        let _ = tokio::time::timeout(patience, opening).await;
        cancelled += 1;
        assert!(cancelled < 10_000, "it is never retired");
    }
    assert!(cancelled > CANCELS.0, "{cancelled}");
    let silent = tokio::time::timeout(std::time::Duration::from_millis(300), kept.recv.data()).await;
    assert!(silent.is_err(), "the open stream goes on: {silent:?}");
    assert!(
        tunnel.open(&connect()).await.is_ok(),
        "the peer has not asked for anything"
    );
}

#[tokio::test]
async fn an_idle_connection_is_small() {
    let (tunnel, mut incoming) = tunnel().await;
    tokio::spawn(async move {
        let mut held = vec![];
        while let Some((_, responder)) = incoming.next().await {
            held.push(responder.accept().unwrap());
        }
    });
    let stream = tunnel.open(&connect()).await.unwrap();
    let (app, _other) = socket_pair().await;
    let flow = Flow::default();
    let size = size_of_val(&relay(app, stream, &flow, Initiator::Socket));
    assert!(size <= 1024, "{size} bytes for as long as the connection lasts");
}
