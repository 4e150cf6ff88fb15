//! Who gets in, and who does not: the application of a refused caller's target hears nothing at all.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use culvert_e2e::lab::{Endpoint, Pod, PodSpec, poll_until};
use culvert_e2e::load::{Failure, Pace, Streams};
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

fn deny(app: &str, from: &str) -> String {
    format!(
        "apiVersion: culvert.dev/v1alpha1\nkind: AuthorizationPolicy\n\
         metadata: {{name: deny-{from}, namespace: shop}}\nspec:\n  selector: {{matchLabels: {{app: {app}}}}}\n  \
         action: DENY\n  rules:\n  - from:\n    - source: {{serviceAccounts: [{from}]}}\n"
    )
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

#[test]
fn f46_a_deny_cuts_what_it_matches_at_once_and_nothing_else() {
    const EACH: usize = 500;
    let shop = Shop::open();
    let phone = shop.mesh.pod(&shop.a, PodSpec::new("shop", "phone")).unwrap();
    let listener = shop.cart.listen(8080).unwrap();
    let to = SocketAddr::from((shop.vip.v4, 80));
    // The kept ones share ztunnels, listeners and destination with those that go.
    let kept_echo = Server::echo(shop.cart.listen(9090).unwrap()).unwrap();
    let kept_to = SocketAddr::from((shop.cart.addresses().v4, 9090));
    let kept = Streams::start(
        &phone,
        kept_to,
        EACH,
        Pace {
            every: Duration::from_secs(1),
            ..Pace::IDLE
        },
    )
    .unwrap();
    let [clients, servers]: [Vec<TcpStream>; 2] = pairs(&shop.web, to, &listener, EACH).into_iter().fold(
        [Vec::new(), Vec::new()],
        |mut all, [c, s]| {
            all[0].push(c);
            all[1].push(s);
            all
        },
    );
    shop.mesh.apply(&deny("cart", "web")).unwrap();
    let start = Instant::now();
    let (client_side, server_side) = std::thread::scope(|scope| {
        let clients = scope.spawn(|| resets(&clients, start));
        let servers = scope.spawn(|| resets(&servers, start));
        (clients.join().unwrap(), servers.join().unwrap())
    });
    for (side, took) in [("client", client_side.unwrap()), ("server", server_side.unwrap())] {
        assert!(
            took <= Duration::from_secs(1),
            "the {side}s saw their resets after {took:?}"
        );
    }
    refused(&shop.web, to).unwrap();
    std::thread::sleep(Duration::from_secs(2));
    for end in kept.stop().unwrap() {
        assert!(
            end.failure.is_none() && end.blocks > 0,
            "a stream of another caller: {end:?}"
        );
    }
    assert_eq!(kept_echo.accepted(), EACH as u64);
    shop.mesh
        .delete("AuthorizationPolicy", "shop", "deny-web")
        .unwrap();
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
}

#[test]
fn f46_a_label_that_makes_a_policy_match_cuts_like_an_edit() {
    let shop = Shop::open();
    shop.mesh.apply(&deny("till", "web")).unwrap();
    let _echo = Server::echo(shop.cart.listen(8080).unwrap()).unwrap();
    let to = SocketAddr::from((shop.cart.addresses().v6, 8080));
    let streams = Streams::start(&shop.web, to, 10, Pace::BUSY).unwrap();
    let mut object = culvert_e2e::mesh::config::pod(&shop.cart);
    object["metadata"]["labels"]["app"] = "till".into();
    let start = Instant::now();
    shop.mesh.apply_object(&object).unwrap();
    refused_soon(&shop.web, to);
    // Open streams have a second to be cut in.
    std::thread::sleep(Duration::from_secs(1));
    for end in streams.stop().unwrap() {
        let (at, failure) = end.failure.expect("the policy matches now");
        assert_eq!(failure, Failure::Lost(ErrorKind::ConnectionReset));
        let took = at.saturating_duration_since(start);
        assert!(took <= Duration::from_secs(1), "cut after {took:?}");
    }
}

fn refused_soon(from: &Endpoint, to: SocketAddr) {
    poll_until("new connections are refused", WAIT, || {
        refused(from, to).map(Some)
    })
    .unwrap();
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
