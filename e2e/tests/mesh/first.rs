//! One captured connection, through both ztunnels.

use std::net::SocketAddr;

use culvert_e2e::traffic::{Server, echo_once};

use crate::{Shop, WAIT};

const CANARY: &[u8] = b"canary-5e0b71c9aa";

#[test]
fn a_captured_connection_goes_through_both_ztunnels() {
    let shop = Shop::open();
    let _echo = Server::echo(shop.cart.listen(8080).unwrap()).unwrap();
    let between = shop.a.node().capture(&[CANARY]).unwrap();
    for ip in shop.vip.all() {
        let socket = shop.web.connect((ip, 80)).unwrap();
        socket.set_read_timeout(Some(WAIT)).unwrap();
        echo_once(&socket, CANARY).unwrap_or_else(|e| panic!("service address {ip}: {e:#}"));
    }
    for ip in shop.cart.addresses().all() {
        let socket = shop.web.connect((ip, 8080)).unwrap();
        socket.set_read_timeout(Some(WAIT)).unwrap();
        echo_once(&socket, CANARY).unwrap_or_else(|e| panic!("pod address {ip}: {e:#}"));
    }
    let recording = between.stop().unwrap();
    assert_eq!(recording.sightings(), [], "nothing crosses in the clear");
    let tunnels: Vec<_> = recording
        .flows_with_payload()
        .filter(|flow| flow.server.port() == 15008 && shop.cart.addresses().all().contains(&flow.server.ip()))
        .collect();
    assert!(
        !tunnels.is_empty(),
        "{:?}",
        recording.flows().map(ToString::to_string).collect::<Vec<_>>()
    );
    for tunnel in tunnels {
        assert!(
            shop.web.addresses().all().contains(&tunnel.client.ip()),
            "{tunnel}: from the pod's address"
        );
    }
    for (node, reporter) in [(&shop.a, "source"), (&shop.b, "destination")] {
        let metrics = node.metrics().unwrap();
        let opened = metrics.sum("istio_tcp_connections_opened_total", &[("reporter", reporter)]);
        assert_eq!(opened, 4.0, "connections that node {} reports", node.name());
    }
}

#[test]
fn the_application_sees_the_address_of_its_client() {
    let shop = Shop::open();
    let _greeting = Server::greet(shop.cart.listen(8080).unwrap()).unwrap();
    for (to, port) in [(shop.vip, 80), (shop.cart.addresses(), 8080)] {
        for ip in to.all() {
            let socket = shop.web.connect(SocketAddr::new(ip, port)).unwrap();
            socket.set_read_timeout(Some(WAIT)).unwrap();
            let mut line = String::new();
            std::io::BufRead::read_line(&mut std::io::BufReader::new(socket), &mut line).unwrap();
            assert_eq!(line, format!("220 {}\r\n", shop.web.ip_like(ip)), "asked at {ip}");
        }
    }
}
