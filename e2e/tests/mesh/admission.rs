//! Who gets in, and who does not: the application of a refused caller's target hears nothing at all.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use culvert_e2e::lab::{Endpoint, Pod, PodSpec, poll_until};
use culvert_e2e::load::{Pace, Streams};
use culvert_e2e::traffic::{Server, echo_once};

use crate::{Shop, WAIT};

const CANARY: &[u8] = b"canary-88b7c2d013";

/// Fails unless nothing that `from` sends to `to` is answered.
fn refused(from: &Endpoint, to: SocketAddr) -> Result<()> {
    let Ok(mut socket) = from.connect_within(to, Duration::from_secs(5)) else {
        return Ok(());
    };
    socket.set_read_timeout(Some(Duration::from_secs(5)))?;
    if socket.write_all(CANARY).is_err() {
        return Ok(());
    }
    match socket.read(&mut [0; 64]) {
        Ok(0) => ensure!(
            false,
            "{to} ends the connection as if all were well: a refusal is a reset"
        ),
        Ok(_) => ensure!(false, "{to} has answered"),
        Err(e) if e.kind() == ErrorKind::ConnectionReset => {}
        Err(e) => ensure!(false, "{to} is silent: {e}"),
    }
    Ok(())
}

fn admitted(from: &Endpoint, to: SocketAddr) -> Result<()> {
    let socket = from.connect(to)?;
    socket.set_read_timeout(Some(WAIT))?;
    echo_once(&socket, CANARY)
}

#[test]
fn f19_plaintext_from_outside_of_the_mesh_reaches_no_application() {
    let shop = Shop::open();
    let server = Server::echo(shop.cart.listen(8080).unwrap()).unwrap();
    shop.mesh
        .apply("apiVersion: v1\nkind: Namespace\nmetadata: {name: plain}\n")
        .unwrap();
    let near = shop.mesh.pod(&shop.b, PodSpec::new("plain", "near")).unwrap();
    let far = shop.mesh.pod(&shop.a, PodSpec::new("plain", "far")).unwrap();
    let stranger = shop.mesh.lab().host("stranger").unwrap();
    let outside = shop.mesh.lab().outside("outside").unwrap();
    // A host-network caller on the pod's own node is `b` itself.
    let callers: [&Endpoint; 6] = [&near, &far, shop.a.node(), shop.b.node(), &stranger, &outside];
    for from in callers {
        for ip in shop.cart.addresses().all() {
            refused(from, (ip, 8080).into()).unwrap_or_else(|e| panic!("from {}: {e:#}", from.name()));
        }
    }
    assert_eq!(server.accepted(), 0, "the application has heard of it");
    for ip in shop.cart.addresses().all() {
        admitted(&shop.web, (ip, 8080).into()).unwrap();
    }
}

#[test]
fn another_tenant_is_refused_and_the_own_namespace_is_not() {
    let shop = Shop::open();
    let server = Server::echo(shop.cart.listen(8080).unwrap()).unwrap();
    shop.mesh.namespace("bank").unwrap();
    let teller = shop.mesh.pod(&shop.a, PodSpec::new("bank", "teller")).unwrap();
    let neighbour = shop.mesh.pod(&shop.b, PodSpec::new("bank", "neighbour")).unwrap();
    let targets: Vec<SocketAddr> = shop
        .vip
        .all()
        .map(|ip| (ip, 80).into())
        .into_iter()
        .chain(shop.cart.addresses().all().map(|ip| (ip, 8080).into()))
        .collect();
    for &to in &targets {
        for from in [&teller, &neighbour] {
            refused(from, to).unwrap_or_else(|e| panic!("from {}: {e:#}", from.name()));
        }
    }
    assert_eq!(server.accepted(), 0, "the application has heard of it");
    for &to in &targets {
        admitted(&shop.web, to).unwrap_or_else(|e| panic!("{to}: {e:#}"));
    }
}

/// From `start`, how long until every socket has seen its reset; fails if one sees anything else.
fn resets(sockets: &[TcpStream], start: Instant) -> Result<Duration> {
    for mut socket in sockets {
        match socket.read(&mut [0; 8]) {
            Err(e) if e.kind() == ErrorKind::ConnectionReset => {}
            other => ensure!(false, "no reset, but {other:?}"),
        }
    }
    Ok(start.elapsed())
}

/// `count` connections from `from` to the server behind `listener`; both ends of each.
fn pairs(from: &Pod, to: SocketAddr, listener: &std::net::TcpListener, count: usize) -> Vec<[TcpStream; 2]> {
    (0..count)
        .map(|number| {
            let mut client = from
                .connect(to)
                .unwrap_or_else(|e| panic!("connection {number}: {e}"));
            client.write_all(b"hello").unwrap();
            let (mut server, _) = listener.accept().unwrap();
            for socket in [&client, &server] {
                socket.set_read_timeout(Some(WAIT)).unwrap();
            }
            server.read_exact(&mut [0; 5]).unwrap();
            [client, server]
        })
        .collect()
}

/// A way in which a policy comes to match what it did not match before.
struct Turn {
    case: &'static str,
    /// Objects that are there before, and match nothing of it.
    before: String,
    /// What makes it match.
    cut: serde_json::Value,
    /// What takes that back.
    undo: Undo,
}

enum Undo {
    Apply(serde_json::Value),
    Delete,
}

/// DENY for one port: judged where the connections arrive, or where they start.
fn deny_port(direction: &str, app: &str, port: u16) -> serde_json::Value {
    serde_json::json!({
        "apiVersion": "culvert.dev/v1alpha1", "kind": "AuthorizationPolicy",
        "metadata": { "name": "cut", "namespace": "shop" },
        "spec": {
            "selector": { "matchLabels": { "app": app } },
            "direction": direction,
            "action": "DENY",
            "rules": [{ "to": [{ "operation": { "ports": [port.to_string()] } }] }],
        },
    })
}

fn turns(shop: &Shop) -> Vec<Turn> {
    let mut turns = Vec::new();
    for (direction, pod, cases) in [
        (
            "Inbound",
            &shop.cart,
            [
                "the destination's policy edited",
                "the destination's label changed",
                "the destination's policy attached",
            ],
        ),
        (
            "Outbound",
            &shop.web,
            [
                "the source's rule edited",
                "the source's label changed",
                "the source's rule attached",
            ],
        ),
    ] {
        let app = &pod.spec().name;
        let object = culvert_e2e::mesh::config::pod(pod);
        let mut labelled = object.clone();
        labelled["metadata"]["labels"]["app"] = "till".into();
        let [edited, relabelled, attached] = cases;
        turns.extend([
            Turn {
                case: edited,
                before: deny_port(direction, app, 7).to_string(),
                cut: deny_port(direction, app, 8080),
                undo: Undo::Delete,
            },
            Turn {
                case: relabelled,
                before: deny_port(direction, "till", 8080).to_string(),
                cut: labelled,
                undo: Undo::Apply(object),
            },
            Turn {
                case: attached,
                before: String::new(),
                cut: deny_port(direction, app, 8080),
                undo: Undo::Delete,
            },
        ]);
    }
    turns
}

#[test]
fn f46_whatever_makes_a_policy_match_cuts_500_of_1000_that_share_tunnels() {
    const EACH: usize = 500;
    let shop = Shop::open();
    let ip = shop.cart.addresses().v4;
    let kept_echo = Server::echo(shop.cart.listen(9090).unwrap()).unwrap();
    let listener = shop.cart.listen(8080).unwrap();
    let to = SocketAddr::from((ip, 8080));
    let pace = Pace {
        every: Duration::from_secs(1),
        ..Pace::IDLE
    };
    let mut kept = Vec::new();
    for (number, turn) in turns(&shop).into_iter().enumerate() {
        let case = turn.case;
        if !turn.before.is_empty() {
            shop.mesh.apply(&turn.before).unwrap();
        }
        let [mut clients, mut servers] = [Vec::new(), Vec::new()];
        for _ in 0..10 {
            // By turns, so that every tunnel carries some of both; all from one pod to one pod.
            if number == 0 {
                kept.push(Streams::start(&shop.web, (ip, 9090).into(), EACH / 10, pace).unwrap());
            }
            for [client, server] in pairs(&shop.web, to, &listener, EACH / 10) {
                clients.push(client);
                servers.push(server);
            }
        }
        let start = Instant::now();
        shop.mesh.apply_object(&turn.cut).unwrap();
        let (client_side, server_side) = std::thread::scope(|scope| {
            let clients = scope.spawn(|| resets(&clients, start));
            let servers = scope.spawn(|| resets(&servers, start));
            (clients.join().unwrap(), servers.join().unwrap())
        });
        for (side, took) in [("client", client_side), ("server", server_side)] {
            let took = took.unwrap_or_else(|e| panic!("{case}: a {side}: {e:#}"));
            assert!(
                took <= Duration::from_secs(1),
                "{case}: the {side}s saw their resets after {took:?}"
            );
        }
        refused(&shop.web, to).unwrap_or_else(|e| panic!("{case}: {e:#}"));
        match turn.undo {
            Undo::Apply(object) => {
                shop.mesh.apply_object(&object).unwrap();
                shop.mesh.delete("AuthorizationPolicy", "shop", "cut").unwrap();
            }
            Undo::Delete => shop.mesh.delete("AuthorizationPolicy", "shop", "cut").unwrap(),
        }
        admitted_again(&shop, to, &listener);
    }
    for end in kept.into_iter().flat_map(|streams| streams.stop().unwrap()) {
        assert!(
            end.failure.is_none() && end.blocks > 2,
            "a stream that no policy matched: {end:?}"
        );
    }
    assert_eq!(kept_echo.accepted(), EACH as u64);
    let tunnels = shop
        .a
        .metrics()
        .unwrap()
        .sum("culvert_tunnels_total", &[("outcome", "up")]);
    assert!(tunnels < 100.0, "{tunnels} tunnels for {} streams", 7 * EACH);
}

fn admitted_again(shop: &Shop, to: SocketAddr, listener: &std::net::TcpListener) {
    // An attempt that is still refused never arrives: no waiting for it.
    listener.set_nonblocking(true).unwrap();
    poll_until("admitted again", WAIT, || {
        let mut socket = shop.web.connect(to)?;
        socket.write_all(b"again")?;
        std::thread::sleep(Duration::from_millis(50));
        let (mut server, _) = listener.accept()?;
        Ok(server.read_exact(&mut [0; 5]).map(Some)?)
    })
    .unwrap();
    listener.set_nonblocking(false).unwrap();
    // Whatever of the waiting arrived late.
    while listener_is_ready(listener) {
        drop(listener.accept());
    }
}

fn listener_is_ready(listener: &std::net::TcpListener) -> bool {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use std::os::fd::AsFd;
    let mut fds = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::from(100u8)).is_ok_and(|ready| ready > 0)
}

#[test]
fn f16_an_application_that_binds_a_port_of_the_mesh_first_is_not_enrolled() {
    let shop = Shop::open();
    for port in [15001, 15006, 15008] {
        let squatter = shop
            .b
            .node()
            .pod(PodSpec::new("shop", &format!("squatter-{port}")))
            .unwrap();
        let taken = squatter.listen(port).unwrap();
        let refused = shop.mesh.admit(&shop.b, &squatter).unwrap_err();
        assert!(
            format!("{refused:#}").contains(&port.to_string()),
            "the port is named: {refused:#}"
        );
        drop(taken);
    }
    // One for each resolver of the cluster, by both protocols.
    for (port, udp) in [(15053, false), (15053, true), (15054, true)] {
        let name = format!("squatter-{port}-{udp}");
        let squatter = shop.b.node().pod(PodSpec::new("shop", &name)).unwrap();
        let loopback = ["127.0.0.1", "::1"].map(|ip| ip.parse::<std::net::IpAddr>().unwrap());
        let taken = loopback.map(|ip| (udp.then(|| squatter.udp((ip, port)).unwrap()), ip));
        let listens = (!udp).then(|| squatter.listen(port).unwrap());
        let refused = shop.mesh.admit(&shop.b, &squatter).unwrap_err();
        assert!(
            format!("{refused:#}").contains(&port.to_string()),
            "the port is named: {refused:#}"
        );
        drop((taken, listens));
    }
}

#[test]
fn f16_nobody_binds_beside_the_listeners_of_an_enrolled_pod() {
    let shop = Shop::open();
    for port in [15001, 15006, 15008] {
        for address in ["0.0.0.0", "::", "127.0.0.1", "::1"] {
            let address: std::net::IpAddr = address.parse().unwrap();
            let bound = shop.cart.inside(|| -> std::io::Result<()> {
                let to = SocketAddr::new(address, port);
                let domain = socket2::Domain::for_address(to);
                let socket = socket2::Socket::new(domain, socket2::Type::STREAM, None)?;
                socket.set_reuse_address(true)?;
                socket.set_reuse_port(true)?;
                socket.bind(&to.into())?;
                socket.listen(1)
            });
            let kind = bound.unwrap().unwrap_err().kind();
            assert_eq!(kind, ErrorKind::AddrInUse, "{address} port {port}");
        }
    }
    for (port, address) in [
        (15053, "127.0.0.1"),
        (15053, "0.0.0.0"),
        (15054, "::1"),
        (15054, "::"),
    ] {
        let address: std::net::IpAddr = address.parse().unwrap();
        for kind in [socket2::Type::STREAM, socket2::Type::DGRAM] {
            let bound = shop.cart.inside(|| -> std::io::Result<()> {
                let to = SocketAddr::new(address, port);
                let socket = socket2::Socket::new(socket2::Domain::for_address(to), kind, None)?;
                socket.set_reuse_address(true)?;
                socket.set_reuse_port(true)?;
                socket.bind(&to.into())?;
                if kind == socket2::Type::STREAM {
                    socket.listen(1)?;
                }
                Ok(())
            });
            let error = bound.unwrap().unwrap_err();
            assert_eq!(
                error.kind(),
                ErrorKind::AddrInUse,
                "{address} port {port} {kind:?}"
            );
        }
    }
}
