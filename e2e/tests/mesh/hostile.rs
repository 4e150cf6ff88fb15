//! A hostile application: what it can do from inside of its own pod, and how far that reaches.
//!
//! Its plaintext may get as far as its own link, where a packet socket puts it without asking anybody; it is
//! looked for behind the host's guard and at the pod that it was meant for.

use std::io::{self, ErrorKind, IoSlice, Write};
use std::net::{IpAddr, SocketAddr, SocketAddrV6, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};
use std::{fs, thread};

use culvert_e2e::lab::{Pod, PodSpec};
use culvert_e2e::load::{Attempts, all_complete};
use culvert_e2e::mesh::ZTUNNEL_UID;
use culvert_e2e::traffic::{Server, echo_once};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, UnixAddr, connect,
    recv, recvfrom, sendmsg, sendto, setsockopt, socket as unix_or_packet, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};
use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities, set_thread_uid};
use socket2::{Domain, Protocol, Socket, Type};

use crate::{Shop, WAIT};

/// Longer than what fits beside a minimal header.
const CANARY: &[u8] = b"canary-17f0c1e83b-canary-17f0c1e83b-canary-17f0c1e83b";

const SHORT: Duration = Duration::from_secs(2);

const ACK: u8 = 0x10;
const PSH: u8 = 0x08;
const RST: u8 = 0x04;
const SYN: u8 = 0x02;

/// Runs `deed` in the pod as a thread with these capabilities and no other, and as another user if one is
/// named.
fn with_power<T: Send>(
    pod: &Pod,
    uid: Option<u32>,
    power: CapabilitySet,
    deed: impl FnOnce() -> T + Send,
) -> T {
    pod.inside(|| {
        let sets = CapabilitySets {
            effective: power,
            permitted: power,
            inheritable: CapabilitySet::empty(),
        };
        match uid {
            // From root to another user is also the end of all capabilities.
            Some(uid) => set_thread_uid(rustix::process::Uid::from_raw(uid)).unwrap(),
            None => set_capabilities(None, sets).unwrap(),
        }
        deed()
    })
    .unwrap()
}

/// Says the canary over a socket with this mark, if it is taken.
fn by_mark(to: SocketAddr, mark: u32) -> io::Result<()> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
    socket.set_mark(mark)?;
    socket.connect_timeout(&to.into(), SHORT)?;
    (&socket).write_all(CANARY)
}

/// A TCP segment with the canary in it. Its checksum is nobody's: who looks for plaintext does not check it.
fn segment(from: u16, to: u16, flags: u8) -> Vec<u8> {
    let mut segment = Vec::new();
    segment.extend(from.to_be_bytes());
    segment.extend(to.to_be_bytes());
    segment.extend([0, 0, 0, 1, 0, 0, 0, 1, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    segment.extend(CANARY);
    segment
}

/// The segment under a header of its destination's family.
fn packet(from: IpAddr, to: IpAddr, segment: &[u8]) -> Vec<u8> {
    let length = segment.len() as u16;
    let mut packet = Vec::new();
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            packet.extend([0x45, 0]);
            packet.extend((20 + length).to_be_bytes());
            packet.extend([0, 0, 0x40, 0, 64, 6, 0, 0]);
            packet.extend(from.octets());
            packet.extend(to.octets());
            let sum: u32 = packet
                .chunks(2)
                .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]))
                .sum();
            let folded = (sum & 0xffff) + (sum >> 16);
            packet[10..12].copy_from_slice(&(!(folded as u16)).to_be_bytes());
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            packet.extend([0x60, 0, 0, 0]);
            packet.extend(length.to_be_bytes());
            packet.extend([6, 64]);
            packet.extend(from.octets());
            packet.extend(to.octets());
        }
        _ => panic!("{from} and {to} are of two families"),
    }
    packet.extend(segment);
    packet
}

/// Sends packets on the pod's link behind the back of everything that its kernel does with packets.
fn by_packet_socket(packets: &[Vec<u8>], own: IpAddr, node: &UdpSocket) -> io::Result<()> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let open = || {
        unix_or_packet(
            AddressFamily::Packet,
            SockType::Datagram,
            flags,
            SockProtocol::EthAll,
        )
    };
    let socket = open()?;
    setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::milliseconds(2000))?;
    // Where the link leads is learned from what comes over it.
    node.send_to(b"hello", (own, 9))?;
    let gateway = loop {
        let mut heard = [0; 2048];
        let (length, from) = recvfrom::<LinkAddr>(socket.as_raw_fd(), &mut heard)?;
        let family = if own.is_ipv4() { 4 } else { 6 };
        if heard[..length].ends_with(b"hello") && heard[0] >> 4 == family {
            break from.ok_or(ErrorKind::NotFound)?;
        }
    };
    for packet in packets {
        sendto(socket.as_raw_fd(), packet, &gateway, MsgFlags::empty())?;
    }
    Ok(())
}

/// Sends the same by a raw socket, which writes the header itself.
fn by_raw_socket(packets: &[Vec<u8>], to: IpAddr) -> io::Result<()> {
    let socket = Socket::new(
        Domain::for_address((to, 0).into()),
        Type::RAW,
        Some(Protocol::from(255)),
    )?;
    for packet in packets {
        match socket.send_to(packet, &SocketAddr::new(to, 0).into()) {
            // The pod's own rules may say no.
            Err(error) if error.kind() == ErrorKind::InvalidInput => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// All that an application with these capabilities can try on `to`, port 8080.
fn abuse(shop: &Shop, power: CapabilitySet) {
    let web = &shop.web;
    for to in shop.cart.addresses().all() {
        let target = SocketAddr::new(to, 8080);
        let own = web.ip_like(to);
        let packets: Vec<Vec<u8>> = [SYN, ACK, PSH | ACK, RST, RST | ACK, SYN | ACK]
            .into_iter()
            .flat_map(|flags| [8080, 40000].map(|from| packet(own, to, &segment(from, 8080, flags))))
            .collect();
        if power.contains(CapabilitySet::NET_RAW) {
            let node = web.node().udp((web.node().ip_like(to), 0)).unwrap();
            with_power(web, None, power, || by_packet_socket(&packets, own, &node)).unwrap();
            with_power(web, None, power, || by_raw_socket(&packets, to)).unwrap();
            for mark in [1, 0x111, 0x539, 0x7fff_ffff, 0x8000_0000, 0x8000_0001, u32::MAX] {
                // Where it was taken it went through the mesh.
                let _ = with_power(web, None, power, || by_mark(target, mark));
            }
        } else {
            for (domain, protocol) in [
                (Domain::IPV4, Protocol::TCP),
                (Domain::IPV6, Protocol::TCP),
                (Domain::PACKET, Protocol::from(0)),
            ] {
                let made = with_power(web, None, power, || {
                    Socket::new(domain, Type::RAW, Some(protocol))
                });
                assert!(made.is_err(), "{domain:?} without NET_RAW");
            }
            let refused = with_power(web, None, power, || by_mark(target, 1)).unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::PermissionDenied);
        }
        for uid in [ZTUNNEL_UID, 0, 1337] {
            let said = with_power(web, Some(uid), power, || {
                let socket = std::net::TcpStream::connect_timeout(&target, WAIT)?;
                socket.set_read_timeout(Some(WAIT))?;
                echo_once(&socket, CANARY).map_err(io::Error::other)
            });
            said.unwrap_or_else(|e| panic!("as user {uid} through the mesh: {e}"));
        }
        // Ports of the mesh's own listeners, dialled directly.
        for port in [15001, 15006, 15008] {
            let _ = with_power(web, None, power, || {
                let socket = std::net::TcpStream::connect_timeout(&(own, port).into(), SHORT)?;
                (&socket).write_all(CANARY)
            });
        }
        if power.contains(CapabilitySet::NET_ADMIN) {
            // The rules and the wall are the pod's own; the guard is not.
            web.flush_rules().unwrap();
            for priority in [1, 2] {
                unroute(web, to, priority);
            }
            let _ = with_power(web, None, power, || by_mark(target, 0));
            with_power(web, None, power, || by_raw_socket(&packets, to)).unwrap();
            let back = Instant::now() + WAIT;
            while !captured(web, target) {
                assert!(Instant::now() < back, "capture is not repaired");
            }
        }
    }
}

/// Deletes a routing rule, as `ip rule del` does.
fn unroute(pod: &Pod, like: IpAddr, priority: u32) {
    let family = if like.is_ipv4() {
        nlink::AddressFamily::v4()
    } else {
        nlink::AddressFamily::v6()
    };
    let deleted = pod.inside(|| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let route = nlink::Connection::<nlink::Route>::new()?;
            route.del_rule_by_priority(family, priority).await
        })
    });
    deleted.unwrap().unwrap();
}

fn captured(pod: &Pod, to: SocketAddr) -> bool {
    pod.connect_within(to, SHORT)
        .and_then(|socket| {
            socket.set_read_timeout(Some(SHORT))?;
            echo_once(&socket, CANARY).map_err(io::Error::other)
        })
        .is_ok()
}

#[test]
fn tr2_f17_an_application_reaches_nobody_in_plaintext_whatever_it_may_do() {
    let shop = Shop::open();
    let _echo = Server::echo(shop.cart.listen(8080).unwrap()).unwrap();
    let links = [
        ("behind the guard", &**shop.a.node()),
        ("at the target", &*shop.cart),
    ]
    .map(|(name, place)| (name, place.capture(&[CANARY]).unwrap()));
    let own = shop.web.capture(&[CANARY]).unwrap();
    abuse(&shop, CapabilitySet::empty());
    abuse(&shop, CapabilitySet::NET_RAW);
    abuse(&shop, CapabilitySet::NET_RAW | CapabilitySet::NET_ADMIN);
    thread::sleep(Duration::from_millis(300));
    for (name, link) in links {
        assert_eq!(link.stop().unwrap().sightings(), [], "{name}");
    }
    let own = own.stop().unwrap();
    assert!(
        !own.sightings().is_empty(),
        "the packet socket has sent nothing at all"
    );
}

/// Everything that a process could read in a folder.
fn files(folder: &Path, found: &mut Vec<(String, Vec<u8>)>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        let Ok(kind) = entry.file_type() else { continue };
        if kind.is_dir() {
            files(&path, found);
        } else if kind.is_file()
            && let Ok(content) = fs::read(&path)
        {
            found.push((path.display().to_string(), content));
        }
    }
}

#[test]
fn f23_there_is_nothing_of_anothers_identity_to_copy() {
    let shop = Shop::open();
    let _echo = Server::echo(shop.cart.listen(8080).unwrap()).unwrap();
    assert!(captured(&shop.web, (shop.vip.v4, 80).into()), "SVIDs exist");
    // In the pod's network: no page, no socket of ours, under no address.
    for ip in ["127.0.0.1", "::1"] {
        let ip: IpAddr = ip.parse().unwrap();
        for port in [15000, 15012, 15014, 15020, 15021] {
            let refused = shop.web.connect_within((ip, port), SHORT).unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::ConnectionRefused, "{ip} port {port}");
        }
    }
    for node in [&shop.a, &shop.b] {
        let admin = SocketAddr::new(node.ztunnel_pod().addresses().v4.into(), 15000);
        assert!(!answers(&shop.web, admin), "{admin}");
    }
    let names = shop
        .web
        .inside(|| fs::read_to_string("/proc/thread-self/net/unix"))
        .unwrap()
        .unwrap();
    assert!(
        !names.lines().any(|line| line.contains("culvert")),
        "unix sockets in the pod:\n{names}"
    );
    // On the node's disk: no key of a workload, not even for who may read every file.
    let mut found = vec![];
    for node in [&shop.a, &shop.b] {
        files(&node.path(""), &mut found);
    }
    assert!(
        found.iter().any(|(name, _)| name.ends_with("token")),
        "the search works"
    );
    for (name, content) in &found {
        // PEM, and PKCS #8 and SEC 1 of a P-256 key as DER: version, then the curve or the key's own octets.
        for key in [
            &b"PRIVATE KEY"[..],
            &[0x02, 0x01, 0x00, 0x30, 0x13, 0x06, 0x07],
            &[0x02, 0x01, 0x01, 0x04, 0x20],
        ] {
            assert!(
                !content.windows(key.len()).any(|part| part == key),
                "{name} holds a key"
            );
        }
    }
    // Of the processes that hold them: an application has a user of its own, and no hold on ours.
    for node in [&shop.a, &shop.b] {
        let pids = [
            node.with_ztunnel(|ztunnel| ztunnel.pid()).unwrap(),
            node.with_agent(|agent| agent.pid()).unwrap(),
        ];
        for pid in pids {
            for file in ["mem", "environ", "maps", "fd", "root", "cwd"] {
                let path = format!("/proc/{pid}/{file}");
                // Also as ztunnel's own user: the process is not dumpable.
                for uid in [ZTUNNEL_UID, 1000] {
                    let read = with_power(&shop.web, Some(uid), CapabilitySet::empty(), || match file {
                        "fd" => fs::read_dir(&path).map(|_| ()),
                        "root" | "cwd" => fs::read_link(&path).map(|_| ()),
                        _ => fs::read(&path).map(|_| ()),
                    });
                    assert!(read.is_err(), "user {uid} reads {path}");
                }
            }
        }
    }
}

/// Whether anything is said there to a request.
fn answers(from: &Pod, to: SocketAddr) -> bool {
    let Ok(mut socket) = from.connect_within(to, SHORT) else {
        return false;
    };
    socket.set_read_timeout(Some(SHORT)).unwrap();
    let _ = socket.write_all(b"GET / HTTP/1.0\r\n\r\n");
    matches!(io::Read::read(&mut socket, &mut [0; 16]), Ok(1..))
}

#[test]
fn f15_every_form_of_an_address_has_the_same_verdict() {
    let shop = Shop::open();
    let server = Server::echo(shop.cart.listen(8080).unwrap()).unwrap();
    shop.mesh.namespace("bank").unwrap();
    let teller = shop.mesh.pod(&shop.a, PodSpec::new("bank", "teller")).unwrap();
    let mapped =
        |ip: std::net::Ipv4Addr, port| SocketAddr::V6(SocketAddrV6::new(ip.to_ipv6_mapped(), port, 0, 0));
    let (pod, vip) = (shop.cart.addresses(), shop.vip);
    // A headless service's answer is the pod's address.
    let forms = [
        ("pod, IPv4", SocketAddr::from((pod.v4, 8080))),
        ("pod, IPv6", (pod.v6, 8080).into()),
        ("pod, mapped", mapped(pod.v4, 8080)),
        ("VIP, IPv4", (vip.v4, 80).into()),
        ("VIP, IPv6", (vip.v6, 80).into()),
        ("VIP, mapped", mapped(vip.v4, 80)),
    ];
    for (form, to) in forms {
        assert!(captured(&shop.web, to), "{form}: allowed");
    }
    let heard = server.accepted();
    for (form, to) in forms {
        assert!(!captured(&teller, to), "{form}: denied");
    }
    // Outside of the mesh's addresses there is the node's: what it forwards comes as plaintext.
    shop.mesh
        .apply("apiVersion: v1\nkind: Namespace\nmetadata: {name: plain}\n")
        .unwrap();
    let plain = shop.mesh.pod(&shop.b, PodSpec::new("plain", "plain")).unwrap();
    let _plain_echo = Server::echo(plain.listen(8080).unwrap()).unwrap();
    let node = shop.b.node().addresses();
    for ip in node.all() {
        node_ports(&shop, ip, &[(30080, &shop.cart), (30081, &plain)]);
        assert!(
            captured(&teller, (ip, 30081).into()),
            "NodePort {ip} leads somewhere"
        );
        assert!(!captured(&teller, (ip, 30080).into()), "NodePort {ip}: denied");
    }
    assert_eq!(server.accepted(), heard, "the application has heard of it");
}

/// What kube-proxy does for NodePorts.
fn node_ports(shop: &Shop, node: IpAddr, ports: &[(u16, &Pod)]) {
    use nlink::netlink::nftables::{BaseChain, Chain, Family, NatHook, NatStatement, Policy, Priority, Rule};
    let (table, family) = match node {
        IpAddr::V4(_) => ("ports4", Family::Ip),
        IpAddr::V6(_) => ("ports6", Family::Ip6),
    };
    let put = shop.b.node().inside(|| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let nft = nlink::Connection::<nlink::Nftables>::new()?;
            let base = BaseChain::nat(NatHook::Prerouting, Priority::DstNat).policy(Policy::Accept);
            let chain = Chain::new(table, "pre")?.family(family).base(base);
            let mut batch = nft.transaction().add_table(table, family).add_chain(chain);
            for (port, pod) in ports {
                let to = NatStatement::dnat(pod.ip_like(node)).port(8080);
                let rule = Rule::new(table, "pre").match_tcp_dport(*port).nat(to);
                batch = batch.add_rule(rule.family(family));
            }
            batch.commit(&nft).await
        })
    });
    put.unwrap().unwrap();
}

/// Speaks to the agent as whoever this thread is.
///
/// The path leads through the folder's descriptor: another user cannot follow the lab's own.
fn dial_agent(folder: &fs::File, name: &str) -> nix::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let socket = unix_or_packet(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
    setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::milliseconds(1500))?;
    setsockopt(&socket, sockopt::SendTimeout, &TimeVal::milliseconds(1500))?;
    let path = format!("/proc/self/fd/{}/{name}", folder.as_raw_fd());
    connect(socket.as_raw_fd(), &UnixAddr::new(path.as_str())?)?;
    Ok(socket)
}

/// Whether the agent has closed the connection by now.
fn is_closed(socket: &OwnedFd) -> bool {
    let until = Instant::now() + WAIT;
    while Instant::now() < until {
        match recv(socket.as_raw_fd(), &mut [0; 1 << 16], MsgFlags::empty()) {
            Ok(0) | Err(Errno::ECONNRESET | Errno::EPIPE) => return true,
            Ok(_) | Err(Errno::EAGAIN | Errno::EINTR) => {}
            Err(_) => return true,
        }
    }
    false
}

#[test]
fn f65_t57_the_agents_sockets_hold_against_whoever_finds_them() {
    let shop = Shop::open();
    let _echo = Server::echo(shop.cart.listen(8080).unwrap()).unwrap();
    let to = SocketAddr::from((shop.vip.v4, 80));
    assert!(captured(&shop.web, to));
    let folder = fs::File::open(shop.a.agent_socket().parent().unwrap()).unwrap();
    let dial = |name: &str| dial_agent(&folder, name);
    let (ztunnel, cni) = ("ztunnel.sock", "cni.sock");
    let attempts = Attempts::start(&shop.web, to, 50, WAIT).unwrap();
    let descriptors = || {
        let pid = shop.a.with_agent(|agent| agent.pid()).unwrap();
        fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
    };
    let before = descriptors();
    // Users who are neither: the folder's permissions, then the peer's credentials.
    for name in [ztunnel, cni] {
        let refused = with_power(&shop.web, Some(1000), CapabilitySet::empty(), || dial(name));
        assert_eq!(refused.unwrap_err(), Errno::EACCES, "{name}");
    }
    let refused = with_power(&shop.web, Some(ZTUNNEL_UID), CapabilitySet::empty(), || dial(cni));
    assert_eq!(refused.unwrap_err(), Errno::EACCES, "ztunnel is no plugin");
    let root = dial(ztunnel).unwrap();
    let heard = recv(root.as_raw_fd(), &mut [0; 64], MsgFlags::empty());
    assert!(
        matches!(heard, Ok(0) | Err(Errno::ECONNRESET)),
        "not even root is told anything: {heard:?}"
    );
    // As ztunnel's own user, who could be anybody that has taken it over.
    let file = fs::File::open("/dev/null").unwrap();
    let many = vec![file.as_raw_fd(); 200];
    for round in 0u32..24 {
        let hostile = with_power(&shop.web, Some(ZTUNNEL_UID), CapabilitySet::empty(), || {
            dial(ztunnel)
        });
        let hostile = hostile.unwrap();
        let fuzz: Vec<u8> = (0..round * 977 + 1)
            .map(|at| (at.wrapping_mul(0x9e37_79b9 ^ round) >> 7) as u8)
            .collect();
        let rights = [ControlMessage::ScmRights(&many)];
        let control: &[ControlMessage<'_>] = if round % 3 == 0 { &rights } else { &[] };
        let _ = sendmsg::<UnixAddr>(
            hostile.as_raw_fd(),
            &[IoSlice::new(&fuzz)],
            control,
            MsgFlags::MSG_NOSIGNAL,
            None,
        );
        if round % 4 == 0 {
            assert!(is_closed(&hostile), "round {round}");
        }
    }
    // The plugin's socket: no request, nonsense, a descriptor that is no namespace, a name that is a path.
    for (request, fds) in [
        ("", 0),
        ("{", 0),
        (r#"{"cmd":"ADD","uid":"../../x","namespace":"a","name":"b"}"#, 1),
        (r#"{"cmd":"ADD","uid":"x-1","namespace":"a","name":"b"}"#, 0),
        (r#"{"cmd":"ADD","uid":"x-2","namespace":"a","name":"b"}"#, 1),
        (r#"{"cmd":"ADD","uid":"x-3","namespace":"a","name":"b"}"#, 64),
        (r#"{"cmd":"DEL","uid":"../../../etc/passwd"}"#, 0),
    ] {
        let caller = dial(cni).unwrap();
        let rights = [ControlMessage::ScmRights(&many[..fds])];
        let control: &[ControlMessage<'_>] = if fds > 0 { &rights } else { &[] };
        let _ = sendmsg::<UnixAddr>(
            caller.as_raw_fd(),
            &[IoSlice::new(request.as_bytes())],
            control,
            MsgFlags::MSG_NOSIGNAL,
            None,
        );
        assert!(is_closed(&caller), "{request:?} with {fds} descriptors");
    }
    all_complete(&attempts.stop().unwrap()).unwrap();
    // It still does its work.
    let late = shop.mesh.pod(&shop.a, PodSpec::new("shop", "late")).unwrap();
    shop.a.wait_published(&late).unwrap();
    assert!(captured(&late, to));
    let until = Instant::now() + WAIT;
    // The new pod has its own: listeners, a namespace, netlink sockets.
    while descriptors() > before + 24 {
        assert!(
            Instant::now() < until,
            "descriptors: {before}, then {}",
            descriptors()
        );
        thread::sleep(Duration::from_millis(200));
    }
}
