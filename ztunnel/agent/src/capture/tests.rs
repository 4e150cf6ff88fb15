//! Rules and routes of a real pod's namespace, tried with real connections.

use super::{rules::OTHER_TRANSPORTS, *};
use crate::{
    lab::{FAR_V4, Lab, NODE_V4, NODE_V6, POD_V4, POD_V6, ruleset, run},
    listeners::{DNS_PORT, INBOUND_PORT, Kept, ListenError, OUTBOUND_PORT, Wanted, listen, outbound_sockets},
};
use culvert_proto::agent::Listener;
use socket2::{Domain, SockRef, Socket, Type};
use std::{
    io::{self, Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    time::Duration,
};

const SOON: Duration = Duration::from_secs(3);

fn plain(marks: Marks) -> Rules {
    Rules {
        marks,
        resolvers: vec![NODE_V4],
        node: vec![NODE_V4, NODE_V6],
        probe_ports: vec![8080],
        exclude_inbound_ports: vec![2222],
        exclude_outbound_ports: vec![3333],
        exclude_outbound_nets: vec![],
        refuse_other_traffic: false,
        spare_older: false,
    }
}

struct Captured {
    lab: Lab,
    kept: Vec<Kept>,
    capture: Capture,
}

async fn captured() -> Captured {
    captured_by(plain(Marks::random())).await
}

async fn captured_by(rules: Rules) -> Captured {
    let lab = Lab::new().await;
    let kept = listen(&lab.pod, rules.marks.socket, &rules.resolvers).unwrap();
    let capture = Capture::install(&lab.pod, rules).await.unwrap();
    Captured { lab, kept, capture }
}

impl Captured {
    fn listener(&self, kind: Listener) -> TcpListener {
        let kept = self.kept.iter().find(|kept| kept.what.kind() == kind).unwrap();
        let listener = TcpListener::from(kept.socket.try_clone().unwrap());
        listener.set_nonblocking(false).unwrap();
        listener
    }
}

/// Waits for a connection, but not for ever.
fn accept(listener: &TcpListener) -> Option<TcpStream> {
    listener.set_nonblocking(true).unwrap();
    for _ in 0..60 {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false).unwrap();
                stream.set_read_timeout(Some(SOON)).unwrap();
                return Some(stream);
            }
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
    None
}

fn serve(netns: &Netns, ip: IpAddr, port: u16) -> TcpListener {
    netns
        .enter(|| TcpListener::bind(SocketAddr::new(ip, port)))
        .unwrap()
        .unwrap()
}

fn dial(netns: &Netns, to: (IpAddr, u16)) -> io::Result<TcpStream> {
    let stream = netns
        .enter(|| TcpStream::connect_timeout(&to.into(), SOON))
        .unwrap()?;
    stream.set_read_timeout(Some(SOON))?;
    Ok(stream)
}

fn original(stream: &TcpStream) -> SocketAddr {
    let socket = SockRef::from(stream);
    let v4_mapped = match stream.local_addr().unwrap() {
        SocketAddr::V4(_) => true,
        SocketAddr::V6(address) => address.ip().to_ipv4_mapped().is_some(),
    };
    let original = if v4_mapped {
        socket.original_dst_v4()
    } else {
        socket.original_dst_v6()
    };
    original.unwrap().as_socket().unwrap()
}

fn same_pipe(one: &mut TcpStream, other: &mut TcpStream) {
    one.write_all(b"ping").unwrap();
    let mut buffer = [0; 4];
    other.read_exact(&mut buffer).unwrap();
    assert_eq!(&buffer, b"ping");
    other.write_all(b"pong").unwrap();
    one.read_exact(&mut buffer).unwrap();
    assert_eq!(&buffer, b"pong");
}

#[tokio::test]
async fn a_new_connection_of_the_app_is_taken_and_knows_where_it_was_going() {
    let pod = captured().await;
    let outbound = pod.listener(Listener::Outbound);
    for to in [(NODE_V4, 80), (FAR_V4, 443), (NODE_V6, 80)] {
        let mut app = dial(&pod.lab.pod, to).unwrap();
        let mut taken = accept(&outbound).expect("captured");
        assert_eq!(original(&taken), SocketAddr::from(to));
        assert_eq!(app.peer_addr().unwrap(), SocketAddr::from(to));
        let own = if to.0.is_ipv4() { POD_V4 } else { POD_V6 };
        assert_eq!(app.local_addr().unwrap().ip(), own, "the pod's own address");
        same_pipe(&mut app, &mut taken);
    }
}

#[tokio::test]
async fn excluded_ports_and_loopback_are_not_taken() {
    let pod = captured().await;
    let server = serve(&pod.lab.node, NODE_V4, 3333);
    let app = dial(&pod.lab.pod, (NODE_V4, 3333)).unwrap();
    let direct = accept(&server).expect("direct");
    assert_eq!(direct.peer_addr().unwrap(), app.local_addr().unwrap());
    let loopback = ["127.0.0.1", "::1"].map(|ip| ip.parse().unwrap());
    for ip in loopback.into_iter().chain([POD_V4, POD_V6]) {
        let own = serve(&pod.lab.pod, ip, 4444);
        let _app = dial(&pod.lab.pod, (ip, 4444)).unwrap();
        assert!(accept(&own).is_some(), "{ip}");
    }
}

#[tokio::test]
async fn f17_another_mark_is_no_way_round_capture() {
    let pod = captured().await;
    let outbound = pod.listener(Listener::Outbound);
    let _server = serve(&pod.lab.node, NODE_V4, 80);
    let marks = pod.capture.rules().marks;
    // The last two are in the pod's routing rules for everybody to read.
    for mark in [0x539, 1, marks.socket ^ 0x10, 0x8000_0000, 0x8000_0001] {
        let dialled = pod.lab.pod.enter(|| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
            socket.set_mark(mark)?;
            socket.connect_timeout(&SocketAddr::from((NODE_V4, 80)).into(), SOON)
        });
        // With the mark of answers to a borrowed address, the route to itself has no source address.
        assert_eq!(
            dialled.unwrap().is_ok(),
            accept(&outbound).is_some(),
            "mark {mark:#x}"
        );
    }
}

#[tokio::test]
async fn a_connection_to_the_app_is_taken_and_reaches_it_from_the_clients_address() {
    let pod = captured().await;
    let inbound = pod.listener(Listener::InboundPlaintext);
    for to in [POD_V4, POD_V6] {
        let app = serve(&pod.lab.pod, to, 80);
        let client = dial(&pod.lab.node, (to, 80)).unwrap();
        let taken = accept(&inbound).expect("captured");
        assert_eq!(original(&taken), SocketAddr::from((to, 80)));
        let mark = pod.capture.rules().marks.socket;
        let client = client.local_addr().unwrap().ip();
        let (mut proxy, mut delivered) = deliver(&pod.lab, mark, client, (to, 80), &app);
        same_pipe(&mut proxy, &mut delivered);
    }
}

#[tokio::test]
async fn hbone_and_excluded_ports_are_reached_directly() {
    let pod = captured().await;
    let hbone = pod.listener(Listener::InboundHbone);
    let client = dial(&pod.lab.node, (POD_V4, 15008)).unwrap();
    assert_eq!(
        accept(&hbone).unwrap().peer_addr().unwrap().port(),
        client.local_addr().unwrap().port()
    );
    let app = serve(&pod.lab.pod, POD_V4, 2222);
    let _client = dial(&pod.lab.node, (POD_V4, 2222)).unwrap();
    assert!(accept(&app).is_some());
}

#[tokio::test]
async fn probes_reach_declared_ports_from_the_node_alone() {
    let pod = captured().await;
    let app = serve(&pod.lab.pod, POD_V4, 8080);
    let inbound = pod.listener(Listener::InboundPlaintext);
    let _probe = dial(&pod.lab.node, (POD_V4, 8080)).unwrap();
    assert!(accept(&app).is_some(), "a probe from the node");
    let elsewhere = pod.lab.node.enter(|| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        socket.bind(&SocketAddr::new(FAR_V4, 0).into())?;
        socket.connect_timeout(&SocketAddr::from((POD_V4, 8080)).into(), SOON)?;
        Ok::<_, io::Error>(socket)
    });
    let _elsewhere = elsewhere.unwrap().unwrap();
    assert!(accept(&inbound).is_some(), "not from the node: captured");
    let _other = dial(&pod.lab.node, (POD_V4, 8081)).unwrap();
    assert!(accept(&inbound).is_some(), "not a probe port: captured");
}

#[tokio::test]
async fn dns_to_a_cluster_resolver_is_answered_here_under_the_resolvers_address() {
    let pod = captured().await;
    let kept = pod.kept.iter().find(|k| k.what.kind() == Listener::DnsUdp);
    let dns = UdpSocket::from(kept.unwrap().socket.try_clone().unwrap());
    dns.set_nonblocking(false).unwrap();
    dns.set_read_timeout(Some(SOON)).unwrap();
    assert_eq!(dns.local_addr().unwrap().port(), DNS_PORT);
    let app = pod.lab.pod.enter(|| UdpSocket::bind("0.0.0.0:0"));
    let app = app.unwrap().unwrap();
    app.set_read_timeout(Some(SOON)).unwrap();
    app.send_to(b"who", (NODE_V4, 53)).unwrap();
    let mut buffer = [0; 16];
    let (length, asker) = dns.recv_from(&mut buffer).unwrap();
    assert_eq!(&buffer[..length], b"who");
    dns.send_to(b"me", asker).unwrap();
    let (length, from) = app.recv_from(&mut buffer).unwrap();
    assert_eq!(
        (&buffer[..length], from),
        (&b"me"[..], SocketAddr::from((NODE_V4, 53)))
    );
    let tcp = pod.listener(Listener::DnsTcp);
    let _app = dial(&pod.lab.pod, (NODE_V4, 53)).unwrap();
    assert!(accept(&tcp).is_some(), "and over TCP");
    let elsewhere = pod.lab.node.enter(|| UdpSocket::bind((FAR_V4, 53))).unwrap();
    let elsewhere = elsewhere.unwrap();
    elsewhere.set_read_timeout(Some(SOON)).unwrap();
    app.send_to(b"who", (FAR_V4, 53)).unwrap();
    assert!(
        elsewhere.recv_from(&mut buffer).is_ok(),
        "no resolver of the cluster's"
    );
}

#[tokio::test]
async fn udp_goes_out_or_is_refused_as_the_node_is_set() {
    for refuse in [false, true] {
        let mut rules = plain(Marks::random());
        rules.refuse_other_traffic = refuse;
        let pod = captured_by(rules).await;
        let server = pod.lab.node.enter(|| UdpSocket::bind((NODE_V4, 999))).unwrap();
        let server = server.unwrap();
        server.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        let app = pod
            .lab
            .pod
            .enter(|| UdpSocket::bind("0.0.0.0:0"))
            .unwrap()
            .unwrap();
        let _ = app.send_to(b"x", (NODE_V4, 999));
        assert_eq!(server.recv_from(&mut [0; 8]).is_err(), refuse);
    }
}

#[tokio::test]
async fn f18_other_transports_go_out_or_are_refused_as_the_node_is_set_and_icmp_goes_out() {
    use nix::libc;
    // An echo request: its kind, and a checksum over the rest.
    let echo = [8, 0, 0xf7, 0xff, 0, 0, 0, 0];
    for refuse in [false, true] {
        let mut rules = plain(Marks::random());
        rules.refuse_other_traffic = refuse;
        let pod = captured_by(rules).await;
        for protocol in OTHER_TRANSPORTS.into_iter().chain([libc::IPPROTO_ICMP as u8]) {
            let raw = || Socket::new(Domain::IPV4, Type::RAW, Some(i32::from(protocol).into()));
            let (there, app) = (pod.lab.node.enter(raw).unwrap(), pod.lab.pod.enter(raw).unwrap());
            let (there, app) = (there.unwrap(), app.unwrap());
            there.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
            let to = SocketAddr::from((NODE_V4, 0));
            let _ = app.send_to(&echo, &to.into());
            let arrived = (&there).read(&mut [0; 64]).is_ok();
            let icmp = i32::from(protocol) == libc::IPPROTO_ICMP;
            assert_eq!(arrived, icmp || !refuse, "protocol {protocol}, refused: {refuse}");
        }
    }
}

#[tokio::test]
async fn tr10_3_a_connection_that_nothing_took_is_refused_not_let_out() {
    let pod = captured().await;
    let server = serve(&pod.lab.node, NODE_V4, 80);
    let bypass = "add table inet aside; \
        add chain inet aside out { type nat hook output priority -150; }; \
        add rule inet aside out ip daddr 10.77.0.1 dnat ip to 10.77.0.1";
    assert!(run(&pod.lab.pod, "nft", &[bypass]).status.success());
    let refused = dial(&pod.lab.pod, (NODE_V4, 80)).unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    assert!(accept(&server).is_none());
}

#[tokio::test]
async fn f09_connections_live_through_enrolment_and_through_leaving() {
    let lab = Lab::new().await;
    let server = serve(&lab.node, NODE_V4, 80);
    let mut before = dial(&lab.pod, (NODE_V4, 80)).unwrap();
    let mut before_served = accept(&server).unwrap();
    same_pipe(&mut before, &mut before_served);
    let mut rules = plain(Marks::random());
    rules.resolvers.clear();
    rules.spare_older = true;
    let kept = listen(&lab.pod, rules.marks.socket, &[]).unwrap();
    let capture = Capture::install(&lab.pod, rules.clone()).await.unwrap();
    let mut pod = Captured { lab, kept, capture };
    same_pipe(&mut before, &mut before_served);
    rules.spare_older = false;
    pod.capture.replace(rules).await.unwrap();
    same_pipe(&mut before, &mut before_served);
    let mut during = dial(&pod.lab.pod, (NODE_V4, 80)).unwrap();
    let mut during_taken = accept(&pod.listener(Listener::Outbound)).unwrap();
    same_pipe(&mut during, &mut during_taken);
    pod.capture.drain().await.unwrap();
    same_pipe(&mut before, &mut before_served);
    same_pipe(&mut during, &mut during_taken);
    let mut after = dial(&pod.lab.pod, (NODE_V4, 80)).unwrap();
    let mut after_served = accept(&server).expect("new connections go directly");
    same_pipe(&mut after, &mut after_served);
    Capture::remove(&pod.lab.pod, pod.capture.rules.marks)
        .await
        .unwrap();
    let ended = during.read(&mut [0; 8]).unwrap_err();
    assert_eq!(
        ended.kind(),
        io::ErrorKind::ConnectionReset,
        "what is left is reset"
    );
    let ended = during_taken.read(&mut [0; 8]).unwrap_err();
    assert_eq!(
        ended.kind(),
        io::ErrorKind::ConnectionAborted,
        "from ztunnel's end"
    );
    same_pipe(&mut before, &mut before_served);
    same_pipe(&mut after, &mut after_served);
    for listing in [&["rule"][..], &["-6", "rule"], &["route", "show", "table", "all"]] {
        let listed = String::from_utf8(run(&pod.lab.pod, "ip", listing).stdout).unwrap();
        let ours = ["lookup 100", "lookup 101", "table 100", "table 101"];
        assert!(ours.iter().all(|ours| !listed.contains(ours)), "{listed}");
    }
    assert!(
        ruleset(&pod.lab.pod)["nftables"].as_array().unwrap().len() <= 1,
        "nothing is left"
    );
}

#[tokio::test]
async fn f07_a_change_of_the_rules_is_seen_and_repaired() {
    let mut pod = captured().await;
    let whole = ruleset(&pod.lab.pod);
    for change in [
        "flush ruleset",
        "delete table inet culvert",
        "flush chain inet culvert output",
        "insert rule inet culvert output accept",
        "add rule inet culvert refuse drop",
    ] {
        assert!(pod.capture.is_intact().await.unwrap(), "before {change}");
        assert!(run(&pod.lab.pod, "nft", &[change]).status.success(), "{change}");
        assert!(!pod.capture.is_intact().await.unwrap(), "{change}");
        pod.capture.repair().await.unwrap();
        assert!(pod.capture.is_intact().await.unwrap(), "after {change}");
        assert_eq!(shape(&ruleset(&pod.lab.pod)), shape(&whole), "{change}");
    }
    let other = "add table inet someone";
    assert!(run(&pod.lab.pod, "nft", &[other]).status.success());
    assert!(
        pod.capture.is_intact().await.unwrap(),
        "another's table is another's"
    );
    for arguments in [
        "rule del priority 1",
        "rule del priority 2",
        "-6 rule del priority 1",
        "-6 rule del priority 2",
        "route flush table 100",
        "route flush table 101",
        "-6 route flush table 101",
        "route change default dev lo scope link src 127.0.0.1 table 101",
        "link set lo down",
    ] {
        assert!(pod.capture.is_intact().await.unwrap(), "before {arguments:?}");
        let words: Vec<&str> = arguments.split(' ').collect();
        assert!(run(&pod.lab.pod, "ip", &words).status.success(), "{arguments:?}");
        for _ in 0..2 {
            assert!(!pod.capture.is_intact().await.unwrap(), "{arguments:?}");
        }
        run(&pod.lab.pod, "ip", &["link", "set", "lo", "up"]);
        pod.capture.repair().await.unwrap();
        assert!(pod.capture.is_intact().await.unwrap(), "after {arguments:?}");
    }
}

/// Everything that crosses the node's end of the pod's link.
struct Tap(Socket);

impl Tap {
    fn open(lab: &Lab) -> Self {
        // Every protocol there is, in the order of the wire.
        let every = i32::from(3u16.to_be());
        let open = || Socket::new(Domain::PACKET, Type::RAW, Some(every.into()));
        let tap = lab.node.enter(open).unwrap().unwrap();
        tap.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        Self(tap)
    }

    /// Packets with `canary` in them, until nothing more comes.
    fn sightings(&mut self, canary: &[u8]) -> usize {
        let (mut packet, mut seen) = ([0; 65536], 0);
        while let Ok(length) = self.0.read(&mut packet) {
            seen += usize::from(packet[..length].windows(canary.len()).any(|part| part == canary));
        }
        seen
    }
}

#[tokio::test]
async fn f07_with_the_rules_gone_nothing_of_a_captured_connection_leaves_the_pod() {
    let mut pod = captured().await;
    let outbound = pod.listener(Listener::Outbound);
    let mut tap = Tap::open(&pod.lab);
    let mut open = vec![];
    for to in [(FAR_V4, 443), (NODE_V6, 443)] {
        let mut app = dial(&pod.lab.pod, to).unwrap();
        let mut taken = accept(&outbound).unwrap();
        same_pipe(&mut app, &mut taken);
        open.push((app, taken));
    }
    let server = serve(&pod.lab.pod, POD_V4, 80);
    let mark = pod.capture.rules().marks.socket;
    let (mut proxy, mut delivered) = deliver(&pod.lab, mark, FAR_V4, (POD_V4, 80), &server);
    same_pipe(&mut proxy, &mut delivered);
    assert!(run(&pod.lab.pod, "nft", &["flush ruleset"]).status.success());
    for (app, _) in &mut open {
        app.write_all(b"canary").unwrap();
    }
    delivered.write_all(b"canary").unwrap();
    for (from, to) in [
        (&pod.lab.pod, (FAR_V4, 443)),
        (&pod.lab.pod, (NODE_V6, 443)),
        (&pod.lab.node, (POD_V4, 80)),
    ] {
        let within = Duration::from_millis(200);
        let dialled = from.enter(|| TcpStream::connect_timeout(&to.into(), within));
        assert!(dialled.unwrap().is_err(), "{to:?}: a new one");
    }
    assert_eq!(tap.sightings(b"canary"), 0);
    pod.capture.repair().await.unwrap();
    let mut heard = [0; 6];
    open[0]
        .1
        .read_exact(&mut heard)
        .expect("it goes on with the rules");
    assert_eq!(&heard, b"canary");
    proxy.read_exact(&mut heard).expect("so does what was delivered");
    assert_eq!(tap.sightings(b"canary"), 0);
}

#[tokio::test]
async fn what_was_silent_during_its_grace_is_reset_afterwards() {
    let lab = Lab::new().await;
    let server = serve(&lab.node, NODE_V4, 80);
    let mut older = dial(&lab.pod, (NODE_V4, 80)).unwrap();
    let _served = accept(&server).unwrap();
    let _capture = Capture::install(&lab.pod, plain(Marks::random())).await.unwrap();
    older.write_all(b"late").unwrap();
    let ended = older.read(&mut [0; 8]).unwrap_err();
    assert_eq!(ended.kind(), io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn a_strict_reverse_path_filter_does_not_keep_callers_out() {
    let lab = Lab::new().await;
    for link in ["all", "eth0"] {
        let path = format!("/proc/sys/net/ipv4/conf/{link}/rp_filter");
        lab.pod.enter(|| std::fs::write(path, "1")).unwrap().unwrap();
    }
    let rules = plain(Marks::random());
    let kept = listen(&lab.pod, rules.marks.socket, &rules.resolvers).unwrap();
    let capture = Capture::install(&lab.pod, rules).await.unwrap();
    let pod = Captured { lab, kept, capture };
    let mut client = dial(&pod.lab.node, (POD_V4, 15008)).unwrap();
    let mut taken = accept(&pod.listener(Listener::InboundHbone)).unwrap();
    same_pipe(&mut client, &mut taken);
}

#[tokio::test]
async fn f17_segments_of_a_raw_socket_end_in_the_wall() {
    let pod = captured().await;
    let mut tap = Tap::open(&pod.lab);
    // Source port, destination port, sequence, acknowledgement, PSH|ACK, window; the checksum is nobody's.
    let mut segment = vec![
        0x1f, 0x90, 0, 80, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x18, 0xff, 0xff, 0, 0, 0, 0,
    ];
    segment.extend(b"canary");
    let sent = pod.lab.pod.enter(|| {
        let socket = Socket::new(Domain::IPV4, Type::RAW, Some(socket2::Protocol::TCP))?;
        socket.send_to(&segment, &SocketAddr::from((NODE_V4, 0)).into())
    });
    // The kernel may say that it was rejected.
    let _ = sent.unwrap();
    let mut packet = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, 6, 0, 0, 10, 77, 0, 2, 10, 77, 0, 1];
    packet.extend(&segment);
    let sent = pod.lab.pod.enter(|| {
        let socket = Socket::new(Domain::IPV4, Type::RAW, Some(socket2::Protocol::from(255)))?;
        socket.send_to(&packet, &SocketAddr::from((NODE_V4, 0)).into())
    });
    let _ = sent.unwrap();
    assert_eq!(tap.sightings(b"canary"), 0);
}

/// Connects to the application as ztunnel does, from `client`'s address and without any capability.
fn deliver(
    lab: &Lab,
    mark: u32,
    client: IpAddr,
    to: (IpAddr, u16),
    app: &TcpListener,
) -> (TcpStream, TcpStream) {
    let wanted = Wanted {
        v6: to.0.is_ipv6(),
        datagram: false,
        count: 1,
    };
    let socket = outbound_sockets(&lab.pod, mark, wanted).unwrap().pop().unwrap();
    let socket = Socket::from(socket);
    socket.set_nonblocking(false).unwrap();
    socket.bind(&SocketAddr::new(client, 0).into()).unwrap();
    socket
        .connect_timeout(&SocketAddr::from(to).into(), SOON)
        .unwrap();
    let delivered = accept(app).expect("delivered");
    assert_eq!(
        delivered.peer_addr().unwrap().ip(),
        client,
        "the app sees the client"
    );
    let proxy = TcpStream::from(socket);
    proxy.set_read_timeout(Some(SOON)).unwrap();
    (proxy, delivered)
}

/// A rule set without its handles, which are new each time.
fn shape(ruleset: &serde_json::Value) -> String {
    fn strip(value: &mut serde_json::Value) {
        match value {
            serde_json::Value::Object(map) => {
                map.remove("handle");
                map.values_mut().for_each(strip);
            }
            serde_json::Value::Array(items) => items.iter_mut().for_each(strip),
            _ => {}
        }
    }
    let mut ruleset = ruleset.clone();
    strip(&mut ruleset);
    ruleset.to_string()
}

#[tokio::test]
async fn f16_app_binds_the_port_first() {
    for port in [OUTBOUND_PORT, INBOUND_PORT, 15008] {
        let lab = Lab::new().await;
        let _app = serve(&lab.pod, IpAddr::from([0, 0, 0, 0]), port);
        match listen(&lab.pod, 7, &[]) {
            Err(ListenError::Taken { port: taken, .. }) => assert_eq!(taken, port),
            other => panic!("{port}: {other:?}"),
        }
    }
}

#[tokio::test]
async fn f16_app_cannot_bind_beside_us_later() {
    let pod = captured().await;
    for port in [OUTBOUND_PORT, INBOUND_PORT, 15008] {
        let bound = pod.lab.pod.enter(|| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
            socket.set_reuse_port(true)?;
            socket.set_reuse_address(true)?;
            socket.bind(&SocketAddr::from(([0, 0, 0, 0], port)).into())?;
            socket.listen(1)
        });
        let error = bound.unwrap().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse, "{port}");
    }
}

#[tokio::test]
async fn f08_a_listener_that_was_shut_down_is_seen_and_revived() {
    let pod = captured().await;
    for kept in &pod.kept {
        assert!(kept.works());
        if kept.what.kind() == Listener::DnsUdp {
            continue;
        }
        let copy = SockRef::from(&kept.socket).try_clone().unwrap();
        copy.shutdown(std::net::Shutdown::Both).unwrap();
        assert!(!kept.works(), "{:?}", kept.what);
        kept.revive();
        assert!(kept.works(), "{:?}", kept.what);
    }
}
