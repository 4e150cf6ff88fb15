//! Peers that send more than work: idle sockets, handshakes without end, frames without payload, headers
//! that swell, readers that do not read. Others notice nothing, and memory stays.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use culvert_e2e::hostile::frames::{self, END_HEADERS, END_STREAM, frame};
use culvert_e2e::hostile::{Answer, Svid, Tunnel};
use culvert_e2e::lab::{Endpoint, PodSpec, poll_until};
use culvert_e2e::load::{Attempts, Pace, Streams, all_complete, percentile};
use culvert_e2e::mesh::{MeshNode, Options};
use culvert_e2e::oracles::Steady;
use culvert_e2e::traffic::{Server, echo_once};

use crate::tunnel_abuse::Siege;
use crate::{AtEnd, Shop, WAIT, full_length};

/// A debug build on a loaded machine; the requirement is that every attempt is complete.
const PATIENCE: Duration = Duration::from_secs(15);

/// Resident memory of a node's ztunnel, in KiB.
fn resident(node: &MeshNode) -> u64 {
    let text = node
        .with_ztunnel(|ztunnel| ztunnel.status_field("VmRSS"))
        .unwrap()
        .unwrap();
    text.trim_end_matches("kB").trim().parse().unwrap()
}

/// Open connections between others than the attacker, and attempts of theirs, for as long as it lasts.
struct Honest {
    streams: Streams,
    attempts: Attempts,
}

impl Honest {
    fn start(shop: &Shop) -> Self {
        let to = SocketAddr::from((shop.vip.v4, 80));
        Self {
            streams: Streams::start(&shop.web, to, 10, Pace::BUSY).unwrap(),
            attempts: Attempts::start(&shop.web, to, 20, PATIENCE).unwrap(),
        }
    }

    /// Everything was carried; the time that 99 of 100 attempts did not exceed.
    fn stop(self, case: &str) -> Duration {
        let attempts = self.attempts.stop().unwrap();
        all_complete(&attempts).unwrap_or_else(|e| panic!("{case}: {e:#}"));
        assert!(!attempts.is_empty(), "{case}: no attempt was made");
        for end in self.streams.stop().unwrap() {
            assert!(end.failure.is_none() && end.blocks > 0, "{case}: {end:?}");
        }
        percentile(&attempts, 99)
    }
}

#[test]
fn f25_f26_peers_that_never_finish_a_handshake_keep_nobody_out() {
    let siege = Siege::lay(Shop::open());
    let shop = &siege.shop;
    let _echo = Server::echo(shop.cart.listen(8080).unwrap()).unwrap();
    let phone = shop.mesh.pod(&shop.a, PodSpec::new("shop", "phone")).unwrap();
    shop.a.wait_published(&phone).unwrap();
    let alone = Honest::start(shop);
    thread::sleep(Duration::from_secs(2));
    let alone = alone.stop("alone");
    let honest = Honest::start(shop);
    let stranger = shop.mesh.lab().host("stranger").unwrap();
    let to = siege.port();
    let idle = if full_length() { 10_000 } else { 1_500 };
    let over = AtomicBool::new(false);
    let started = Instant::now();
    // Sockets that say nothing, that say half a ClientHello, and that say a byte at a time.
    let silent: Vec<TcpStream> = [(&*siege.hostile, idle), (&stranger, idle / 5)]
        .into_iter()
        .flat_map(|(from, count)| crowd(from, to, count))
        .collect();
    let hello = client_hello(&siege);
    let fresh = thread::scope(|scope| {
        let _end = AtEnd(&over);
        for mut socket in silent.iter().take(100) {
            let _ = socket.write_all(&hello[..hello.len() / 2]);
        }
        scope.spawn(|| {
            for byte in &hello {
                if over.load(Ordering::Relaxed) {
                    return;
                }
                for mut socket in silent.iter().skip(100).take(50) {
                    let _ = socket.write_all(&[*byte]);
                }
                thread::sleep(Duration::from_secs(1));
            }
        });
        // Handshakes that cost a signature and end in a refusal, as many as two threads can.
        for _ in 0..2 {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    let _ = Tunnel::shake_hands(&stranger, to, Svid::anonymous().unwrap());
                }
            });
        }
        // Who comes now still gets a tunnel of its own.
        let fresh = Attempts::start(&phone, to_cart(shop), 10, PATIENCE).unwrap();
        // Past the handshake's deadline nothing of it is left.
        for (number, mut socket) in silent.iter().enumerate() {
            let left = Duration::from_secs(25).saturating_sub(started.elapsed());
            socket
                .set_read_timeout(Some(left.max(Duration::from_millis(10))))
                .unwrap();
            match socket.read(&mut [0; 64]) {
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    panic!("socket {number} is still open after {:?}", started.elapsed())
                }
                _ => {}
            }
        }
        let fresh = fresh.stop().unwrap();
        all_complete(&fresh).unwrap();
        percentile(&fresh, 99)
    });
    let beside = honest.stop("beside idle sockets and handshakes");
    eprintln!("p99 alone {alone:?}; beside the floods {beside:?}, of a pod that comes meanwhile {fresh:?}");
    // Twice as long is the requirement; below a second this machine's own noise is most of it.
    let bound = (2 * alone).max(Duration::from_secs(1));
    assert!(
        beside <= bound && fresh <= bound,
        "p99 alone {alone:?}, beside {beside:?} and {fresh:?}"
    );
    let metrics = shop.b.metrics().unwrap();
    let refused = |outcome| {
        metrics.sum(
            "culvert_tunnels_total",
            &[("direction", "inbound"), ("outcome", outcome)],
        )
    };
    assert!(
        refused("limit") >= idle as f64 / 2.0,
        "{} were shed at once",
        refused("limit")
    );
    assert!(
        refused("handshake") >= 100.0,
        "{} ended at the deadline",
        refused("handshake")
    );
}

fn to_cart(shop: &Shop) -> SocketAddr {
    (shop.cart.addresses().v4, 8080).into()
}

fn crowd(from: &Endpoint, to: SocketAddr, count: usize) -> Vec<TcpStream> {
    from.inside(|| {
        (0..count)
            .filter_map(|_| TcpStream::connect_timeout(&to, WAIT).ok())
            .collect()
    })
    .unwrap()
}

/// The first flight of a client.
fn client_hello(siege: &Siege) -> Vec<u8> {
    let name = rustls_pki_types::ServerName::try_from("unused.example").unwrap();
    let config = std::sync::Arc::new(siege.svid.client().unwrap());
    let mut client = rustls::ClientConnection::new(config, name).unwrap();
    let mut hello = Vec::new();
    client.write_tls(&mut hello).unwrap();
    hello
}

/// One way to keep a peer busy: what is sent again and again, given the next free stream.
struct Flood {
    name: &'static str,
    /// Frames of one turn, and how many streams they use up.
    turn: fn(&Siege, u32) -> (Vec<u8>, u32),
    /// More turns than any peer should bear.
    turns: u32,
}

const FLOODS: &[Flood] = &[
    Flood {
        name: "PING",
        turn: |_, _| (frame(frames::PING, 0, 0, &[7; 8]).repeat(200), 0),
        turns: 500,
    },
    Flood {
        name: "SETTINGS",
        turn: |_, _| (frames::settings(&[(4, 70_000)]).repeat(200), 0),
        turns: 500,
    },
    Flood {
        name: "PRIORITY",
        turn: |_, _| (frame(frames::PRIORITY, 0, 1, &[0, 0, 0, 0, 16]).repeat(200), 0),
        turns: 500,
    },
    Flood {
        name: "WINDOW_UPDATE",
        turn: |_, _| (frames::window_update(0, 1).repeat(1_000), 0),
        turns: 2_000,
    },
    Flood {
        name: "unknown frames",
        turn: |_, _| (frame(0x42, 0, 0, &[1; 64]).repeat(200), 0),
        turns: 500,
    },
    Flood {
        name: "DATA without payload",
        turn: |_, _| (frame(frames::DATA, 0, 1, &[]).repeat(200), 0),
        turns: 500,
    },
    Flood {
        name: "rapid reset",
        turn: |siege, next| {
            let mut bytes = Vec::new();
            for stream in (next..).step_by(2).take(50) {
                bytes.extend(frames::connect(stream, &siege.authority()));
                bytes.extend(frames::reset(stream, frames::CANCEL));
            }
            (bytes, 100)
        },
        turns: 400,
    },
    Flood {
        name: "made you reset",
        turn: |siege, next| {
            let mut bytes = Vec::new();
            for stream in (next..).step_by(2).take(50) {
                bytes.extend(frames::connect(stream, &siege.authority()));
                // No window grows beyond 2^31 - 1: an error of this stream, which its receiver has to reset.
                bytes.extend(frames::window_update(stream, i32::MAX as u32));
            }
            (bytes, 100)
        },
        turns: 400,
    },
    Flood {
        name: "CONTINUATION",
        turn: |siege, next| {
            let head = frames::block(&[(":method", "CONNECT"), (":authority", &siege.authority())]);
            let mut bytes = frame(frames::HEADERS, 0, next, &head);
            let more = frames::block(&[("x", &"y".repeat(1_000))]);
            bytes.extend(frame(frames::CONTINUATION, 0, next, &more).repeat(1_000));
            (bytes, 2)
        },
        turns: 20,
    },
];

#[test]
fn f27_a_peer_that_floods_loses_its_tunnel_and_nobody_else_does() {
    let siege = Siege::lay(Shop::open());
    let shop = &siege.shop;
    let _echo = Server::echo(shop.cart.listen(8080).unwrap()).unwrap();
    drop(siege.admitted());
    let honest = Honest::start(shop);
    let load = Steady::start(&shop.mesh, [&shop.a, &shop.b]).unwrap();
    // Another tunnel of the very peer: its floods are the other tunnels' affair.
    let mut beside = siege.admitted();
    let mut before = 0;
    for flood in FLOODS {
        let mut tunnel = siege.admitted();
        let mut next = 3;
        for _ in 0..flood.turns {
            let (bytes, streams) = (flood.turn)(&siege, next);
            next += streams;
            if tunnel.write(&bytes).is_err() {
                break;
            }
            tunnel.drain();
            if tunnel.is_ended() || tunnel.goaway().is_some_and(|code| code != 0) {
                break;
            }
        }
        tunnel.pump(WAIT, |tunnel| tunnel.goaway().is_some_and(|code| code != 0));
        let end = tunnel.goaway();
        assert!(
            end.is_some_and(|code| code != 0),
            "{}: {end:?} is the last word",
            flood.name
        );
        let after = resident(&shop.b);
        // The first has made room for what the rest need again.
        assert!(
            before == 0 || after < before + (32 << 10),
            "{}: {before} KiB before, {after} KiB after",
            flood.name
        );
        before = before.max(after);
    }
    beside.write(&frame(frames::DATA, 0, 1, b"still")).unwrap();
    beside.pump(WAIT, |tunnel| tunnel.data(1) == b"still");
    assert_eq!(beside.data(1), b"still", "another tunnel of the same peer");
    assert_eq!(beside.goaway(), None);
    honest.stop("beside floods");
    drop(beside);
    load.verdict().unwrap();
    let flooded = shop.b.metrics().unwrap().sum(
        "culvert_tunnels_total",
        &[("direction", "inbound"), ("outcome", "flood")],
    );
    // The rest are noticed by the HTTP/2 engine itself.
    assert!(flooded >= 4.0, "{flooded} floods were noticed");
    assert!(!siege.logged("its frames were more than its work").is_empty());
}

#[test]
fn f28_headers_that_swell_are_refused_before_they_are_stored() {
    let siege = Siege::lay(Shop::open());
    let shop = &siege.shop;
    let _echo = Server::echo(shop.cart.listen(8080).unwrap()).unwrap();
    drop(siege.admitted());
    let honest = Honest::start(shop);
    let authority = siege.authority();
    let pseudo = frames::block(&[(":method", "CONNECT"), (":authority", &authority)]);
    // An entry of 4000 bytes that one byte repeats: 4000 times what is sent.
    let mut bomb = pseudo.clone();
    bomb.push(0x40);
    frames::text(&mut bomb, b"a");
    frames::text(&mut bomb, &[b'b'; 4000]);
    bomb.resize(16_000, 0xbe);
    // Crumbs of cookies, each of which is stored by itself before they are joined.
    let mut cookies = pseudo.clone();
    while cookies.len() < 16_000 {
        frames::integer(&mut cookies, 4, 0, 32);
        frames::text(&mut cookies, b"");
    }
    let long = frames::block(&[
        (":method", "CONNECT"),
        (":authority", &authority),
        ("x", &"y".repeat(70_000)),
    ]);
    let many: Vec<(String, String)> = (0..2_000).map(|n| (format!("x-{n}"), "y".repeat(30))).collect();
    let mut fields = vec![(":method", "CONNECT"), (":authority", authority.as_str())];
    fields.extend(many.iter().map(|(name, value)| (&**name, &**value)));
    let many = frames::block(&fields);
    let mut tables = pseudo.clone();
    // A table larger than any that was agreed on.
    frames::integer(&mut tables, 5, 0x20, 1 << 30);
    let warm = resident(&shop.b);
    for (case, block) in [
        ("a bomb", &bomb),
        ("cookies", &cookies),
        ("a header of 70 kB", &long),
        ("2000 headers", &many),
        ("a table of 1 GiB", &tables),
        ("an index of nothing", &vec![0xff, 0xff, 0x7f]),
        ("an integer without end", &vec![0xff; 64]),
    ] {
        for _ in 0..20 {
            let mut tunnel = siege.tunnel();
            let mut bytes = Vec::new();
            let mut chunks = block.chunks(16_000).peekable();
            let mut kind = frames::HEADERS;
            while let Some(chunk) = chunks.next() {
                let flags = if chunks.peek().is_none() { END_HEADERS } else { 0 };
                bytes.extend(frame(kind, flags, 1, chunk));
                kind = frames::CONTINUATION;
            }
            let answer = tunnel.ask(1, &bytes);
            assert!(answer.is_refusal(), "{case}: {answer:?}");
        }
    }
    honest.stop("beside swollen headers");
    let after = resident(&shop.b);
    assert!(after < warm + (32 << 10), "{warm} KiB before, {after} KiB after");
}

#[test]
fn f29_an_application_that_cancels_a_lot_disturbs_nobody() {
    let shop = Shop::open();
    let _echo = Server::echo(shop.cart.listen(8080).unwrap()).unwrap();
    let phone = shop.mesh.pod(&shop.a, PodSpec::new("shop", "phone")).unwrap();
    shop.a.wait_published(&phone).unwrap();
    let to = SocketAddr::from((shop.vip.v4, 80));
    let others = Streams::start(&phone, to, 20, Pace::BUSY).unwrap();
    let own = Streams::start(&shop.web, to, 20, Pace::BUSY).unwrap();
    let attempts = Attempts::start(&phone, to, 20, PATIENCE).unwrap();
    let cancels = if full_length() { 100_000 } else { 30_000 };
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                shop.web
                    .inside(|| {
                        for number in 0..cancels / 4 {
                            let Ok(mut socket) = TcpStream::connect_timeout(&to, WAIT) else {
                                continue;
                            };
                            if number % 2 == 0 {
                                let _ = socket.write_all(b"never mind");
                            }
                            socket2::SockRef::from(&socket)
                                .set_linger(Some(Duration::ZERO))
                                .unwrap();
                        }
                    })
                    .unwrap();
            });
        }
    });
    let socket = shop.web.connect(to).unwrap();
    socket.set_read_timeout(Some(WAIT)).unwrap();
    echo_once(&socket, b"and now for real").unwrap();
    all_complete(&attempts.stop().unwrap()).unwrap();
    for (whose, streams) in [("another pod's", others), ("its own", own)] {
        for end in streams.stop().unwrap() {
            assert!(end.failure.is_none() && end.blocks > 0, "{whose} stream: {end:?}");
        }
    }
    poll_until(
        "nothing is left of what was cancelled",
        Duration::from_secs(60),
        || {
            let open = [&shop.a, &shop.b].map(|node| {
                node.metrics()
                    .map(|page| page.sum("culvert_connections_open", &[]))
            });
            let [a, b] = open;
            Ok((a? <= 1.0 && b? <= 1.0).then_some(()))
        },
    )
    .unwrap();
}

#[test]
fn f30_readers_that_do_not_read_hold_no_more_than_their_share() {
    const BUFFERED: u64 = 32 << 20;
    let options = Options {
        ztunnel_args: vec!["--max-buffered".to_owned(), BUFFERED.to_string()],
        ..Options::default()
    };
    let siege = Siege::lay(Shop::open_with(options));
    let shop = &siege.shop;
    let _echo = Server::echo(shop.cart.listen(8080).unwrap()).unwrap();
    // A server that sends for as long as anybody takes it, and one that takes nothing.
    let _faucet = Server::start(shop.cart.listen(7070).unwrap(), |mut socket, _| async move {
        use tokio::io::AsyncWriteExt;
        socket2::SockRef::from(&socket).set_send_buffer_size(16 << 10)?;
        let failed = loop {
            if let Err(failed) = socket.write_all(&[0x55; 16 << 10]).await {
                break failed;
            }
        };
        std::io::Result::<()>::Err(failed)
    })
    .unwrap();
    let drain = shop.cart.listen(6060).unwrap();
    socket2::SockRef::from(&drain)
        .set_recv_buffer_size(16 << 10)
        .unwrap();
    let _deaf = Server::start(drain, |socket, _| async move {
        let _socket = socket;
        tokio::time::sleep(Duration::from_secs(120)).await;
        Ok(())
    })
    .unwrap();
    drop(siege.admitted());
    let honest = Honest::start(shop);
    let load = Steady::start(&shop.mesh, [&shop.a, &shop.b]).unwrap();
    let (tunnels, streams) = if full_length() { (50, 190) } else { (10, 60) };
    let base = resident(&shop.b);
    let mut peak = base;
    let cart = shop.cart.addresses().v4;
    let mut held = Vec::new();
    for number in 0..tunnels {
        let mut tunnel = siege.tunnel();
        let deaf = number % 2 == 0;
        let authority = format!("{cart}:{}", if deaf { 6060 } else { 7070 });
        // All the windows that there are: what bounds the sender now is its own.
        tunnel.write(&frames::settings(&[(4, i32::MAX as u32)])).unwrap();
        tunnel.write(&frames::window_update(0, 1 << 30)).unwrap();
        // It never reads.
        for stream in (1..).step_by(2).take(streams) {
            let mut bytes = frames::connect(stream, &authority);
            if deaf {
                // A window's worth that the application never reads.
                let chunk = frame(frames::DATA, 0, stream, &[0xaa; 16 << 10]);
                bytes.extend(chunk.repeat(16));
            }
            if tunnel.write(&bytes).is_err() {
                break;
            }
        }
        peak = peak.max(resident(&shop.b));
        held.push(tunnel);
    }
    for _ in 0..20 {
        thread::sleep(Duration::from_millis(100));
        peak = peak.max(resident(&shop.b));
    }
    // A tunnel whose streams hold their share gets no further ones; its peer may try on another.
    let answer = held[1].connect(2 * streams as u32 + 1, &format!("{cart}:7070"));
    assert_eq!(answer, Answer::Reset(frames::REFUSED_STREAM));
    assert!(!siege.logged("buffer all that they may").is_empty());
    honest.stop("beside readers that do not read");
    // What waits, and as much again for the frames, sockets and tasks around it.
    let bound = base + 2 * (BUFFERED >> 10) + (24 << 10);
    assert!(
        peak < bound,
        "{base} KiB before, {peak} KiB at the most, bound {bound}"
    );
    drop(held);
    load.verdict().unwrap();
    let mut tunnel = siege.tunnel();
    assert_eq!(tunnel.connect(1, &siege.authority()), Answer::Status(200));
    let ended = frame(frames::DATA, END_STREAM, 1, b"after all");
    tunnel.write(&ended).unwrap();
    tunnel.pump(WAIT, |tunnel| tunnel.data(1) == b"after all");
    assert_eq!(tunnel.data(1), b"after all");
}
