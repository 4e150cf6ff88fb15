//! Names: what a pod asks of the cluster's resolver.

use std::net::{IpAddr, Ipv4Addr};
use std::process::Command;

use crate::Shop;

/// What the cluster's resolver says of `elsewhere.example`; it denies every other name.
const ELSEWHERE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 55);

#[test]
fn names_of_the_mesh_are_answered_and_the_rest_is_asked_of_the_pods_resolver() {
    let shop = Shop::open();
    let resolver = shop.mesh.resolver();
    let socket = resolver.udp((IpAddr::from(resolver.addresses().v4), 53)).unwrap();
    // It ends with the process: a socket needs no thread inside.
    std::thread::spawn(move || {
        let mut query = [0; 512];
        while let Ok((length, client)) = socket.recv_from(&mut query) {
            let _ = socket.send_to(&answer(&query[..length]), client);
        }
    });
    let lookup = |name: &str| {
        let mut getent = Command::new("getent");
        getent.args(["ahostsv4", name]);
        let output = shop.web.run(getent).unwrap();
        String::from_utf8_lossy(&output.stdout)
            .split_whitespace()
            .next()
            .unwrap_or_default()
            .to_owned()
    };
    // Completed by the pod's search list.
    for name in ["cart", "cart.shop", "cart.shop.svc.cluster.local"] {
        assert_eq!(lookup(name), shop.vip.v4.to_string(), "{name}");
    }
    assert_eq!(lookup("elsewhere.example."), ELSEWHERE.to_string());
}

/// A reply with [`ELSEWHERE`] for the one name, without records for its other types, and NXDOMAIN for the
/// rest.
fn answer(query: &[u8]) -> Vec<u8> {
    let mut reply = query.to_vec();
    if reply.len() < 17 {
        return reply;
    }
    // The question ends with its name's last label, type and class; what follows (EDNS) is not repeated.
    let name = reply[12..].iter().position(|&byte| byte == 0).unwrap_or(0);
    reply.truncate(12 + name + 5);
    let asks_a = reply[12 + name + 1..12 + name + 3] == [0, 1];
    let known = reply[12..].starts_with(b"\x09elsewhere\x07example\0");
    let asks_a = asks_a && known;
    reply[2..4].copy_from_slice(&[0x81, if known { 0x80 } else { 0x83 }]);
    reply[4..12].copy_from_slice(&[0, 1, 0, u8::from(asks_a), 0, 0, 0, 0]);
    if asks_a {
        reply.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 5, 0, 4]);
        reply.extend(ELSEWHERE.octets());
    }
    reply
}
