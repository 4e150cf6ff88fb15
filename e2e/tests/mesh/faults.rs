//! The network and the pods misbehave; bytes and identities do not.

use std::io::{ErrorKind, Read};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use culvert_e2e::lab::capture::{Recording, Sighting};
use culvert_e2e::lab::{Effect, Pod, PodSpec, poll_until};
use culvert_e2e::load::{Attempts, Failure, all_complete};
use culvert_e2e::mesh::{Mesh, MeshNode, Options, config};
use culvert_e2e::oracles::Steady;
use culvert_e2e::traffic::{Server, echo_once, send_pattern};

use crate::{Shop, WAIT};

const CANARY: &[u8] = b"canary-f07d5510be";
const PLAIN: &[u8] = b"plain-0915a7c3d2ee";

fn no_canary(recording: &Recording, link: &str) {
    assert_eq!(recording.sightings(), [], "on {link}");
}

/// Says the canary over connections that are open and over new ones, until told to stop; returns how many
/// echoes were complete.
fn say_the_canary(shop: &Shop, until: &AtomicBool) -> u64 {
    let to = SocketAddr::from((shop.vip.v4, 80));
    let said = AtomicU64::new(0);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while !until.load(Ordering::Relaxed) {
                    let Ok(socket) = shop.web.connect_within(to, Duration::from_secs(1)) else {
                        continue;
                    };
                    socket.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
                    // Open for a while, so that some are at any moment.
                    for _ in 0..20 {
                        if echo_once(&socket, CANARY).is_err() {
                            break;
                        }
                        said.fetch_add(1, Ordering::Relaxed);
                        thread::sleep(Duration::from_millis(10));
                    }
                }
            });
        }
    });
    said.into_inner()
}

#[test]
fn f07_flushed_rules_come_back_and_nothing_leaves_a_pod_meanwhile() {
    let shop = Shop::open();
    let _echo = Server::echo(shop.cart.listen(8080).unwrap()).unwrap();
    let done = AtomicBool::new(false);
    let links = [
        ("the caller's link", &*shop.web),
        ("the server's link", &*shop.cart),
        ("the link between the nodes", shop.a.node()),
    ]
    .map(|(name, place)| (name, place.capture(&[CANARY]).unwrap()));
    let older = shop.web.connect((shop.vip.v4, 80)).unwrap();
    older.set_read_timeout(Some(WAIT)).unwrap();
    echo_once(&older, CANARY).unwrap();
    let said = thread::scope(|scope| {
        let end = crate::AtEnd(&done);
        let speaker = scope.spawn(|| say_the_canary(&shop, &done));
        thread::sleep(Duration::from_secs(1));
        for pod in [&shop.web, &shop.cart] {
            pod.flush_rules().unwrap();
            echo_once(&older, CANARY).unwrap_or_else(|e| panic!("an open connection goes on: {e:#}"));
            thread::sleep(Duration::from_secs(2));
        }
        drop(end);
        speaker.join().unwrap()
    });
    assert!(said > 100, "the canary was said {said} times");
    for (name, link) in links {
        no_canary(&link.stop().unwrap(), name);
    }
    for ip in shop.vip.all() {
        let socket = shop.web.connect((ip, 80)).unwrap();
        socket.set_read_timeout(Some(WAIT)).unwrap();
        echo_once(&socket, CANARY).unwrap_or_else(|e| panic!("after the repair, {ip}: {e:#}"));
    }
}

/// Says `text` over one connection until it ends or the time is over.
fn keep_saying(socket: &TcpStream, text: &[u8], until: &AtomicBool) {
    while !until.load(Ordering::Relaxed) && echo_once(socket, text).is_ok() {
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn f09_what_was_said_in_the_mesh_never_shows_when_a_pod_leaves_it() {
    let turns = if crate::full_length() { 100 } else { 4 };
    let shop = Shop::open_with(Options {
        agent_args: vec!["--drain-seconds".into(), "1".into()],
        ..Options::default()
    });
    let _echo = Server::echo(shop.cart.listen(8080).unwrap()).unwrap();
    let links = [&shop.web, &shop.cart].map(|pod| (pod, pod.capture(&[CANARY, PLAIN]).unwrap()));
    for turn in 0..turns {
        // The destination and the source leave in turn, over one family and the other.
        let (pod, node) = [(&shop.cart, &shop.b), (&shop.web, &shop.a)][turn % 2];
        let to = SocketAddr::from((shop.vip.all()[turn / 2 % 2], 80));
        let enrol = |mode: &str| {
            let mut object = config::pod(pod);
            object["metadata"]["labels"][config::ENROL] = mode.into();
            shop.mesh.apply_object(&object).unwrap();
            speaks(node, pod, if mode == "none" { "TCP" } else { "HBONE" });
        };
        let open: Vec<_> = (0..6)
            .map(|_| {
                let socket = shop.web.connect(to).unwrap();
                socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
                echo_once(&socket, CANARY).unwrap_or_else(|e| panic!("turn {turn}: {e:#}"));
                socket
            })
            .collect();
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            let end = crate::AtEnd(&done);
            for socket in &open {
                scope.spawn(|| keep_saying(socket, CANARY, &done));
            }
            // What opens meanwhile may be in the mesh or not, by the user's own wish.
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    let Ok(socket) = shop.web.connect_within(to, Duration::from_secs(1)) else {
                        continue;
                    };
                    socket.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
                    for _ in 0..10 {
                        if echo_once(&socket, PLAIN).is_err() {
                            break;
                        }
                    }
                    thread::sleep(Duration::from_millis(10));
                }
            });
            enrol("none");
            thread::sleep(Duration::from_secs(2));
            enrol("ambient");
            drop(end);
        });
    }
    for (pod, link) in links {
        let recording = link.stop().unwrap();
        let (canaries, plain): (Vec<_>, Vec<_>) = recording
            .sightings()
            .iter()
            .partition(|sighting| sighting.canary.as_bytes() == CANARY);
        assert_eq!(canaries, Vec::<&Sighting>::new(), "on the link of {}", pod.name());
        assert!(
            !plain.is_empty(),
            "outside of the mesh {} is in the clear",
            pod.name()
        );
    }
}

/// Waits until `node` knows the pod as one that is spoken to in this way.
pub(crate) fn speaks(node: &MeshNode, pod: &Pod, protocol: &str) {
    poll_until(&format!("{} speaks {protocol}", pod.name()), WAIT, || {
        let dump: serde_json::Value = serde_json::from_str(&node.admin("/config_dump")?.body)?;
        let known = dump["workloads"].as_array().is_some_and(|all| {
            all.iter()
                .any(|one| one["name"] == pod.spec().name && one["protocol"] == protocol)
        });
        Ok(known.then_some(()))
    })
    .unwrap();
}

#[test]
fn f24_an_address_that_changes_hands_never_delivers_to_the_wrong_identity() {
    let shop = Shop::open();
    let load = Steady::start(&shop.mesh, [&shop.a, &shop.b]).unwrap();
    let addresses = shop.cart.addresses();
    let mut pod = shop.cart.clone();
    let turns = if crate::full_length() { 100 } else { 10 };
    for turn in 0..turns {
        shop.mesh.remove(&shop.b, &pod).unwrap();
        // The next owner of the address is another tenant's, whom `web` may not call.
        let namespace = if turn % 2 == 0 { "bank" } else { "shop" };
        if turn == 0 {
            shop.mesh.namespace("bank").unwrap();
        }
        let name = format!("owner-{turn}");
        pod = shop
            .b
            .node()
            .pod_at(PodSpec::new(namespace, &name), addresses)
            .unwrap();
        let server = Server::greet(pod.listen(8080).unwrap()).unwrap();
        shop.mesh.admit(&shop.b, &pod).unwrap();
        let heard = poll_until("a verdict", WAIT, || {
            let mut socket = shop
                .web
                .connect_within((addresses.v4, 8080), Duration::from_secs(2))?;
            socket.set_read_timeout(Some(Duration::from_secs(2)))?;
            Ok(match (namespace, socket.read(&mut [0; 64])) {
                ("bank", Ok(0) | Err(_)) => Some(false),
                ("shop", Ok(1..)) => Some(true),
                ("bank", Ok(_)) => panic!("turn {turn}: the bank has answered the shop"),
                // The new owner's identity is not everywhere yet.
                _ => None,
            })
        });
        assert_eq!(heard.unwrap(), namespace == "shop");
        assert_eq!(
            server.accepted() > 0,
            namespace == "shop",
            "turn {turn}: what {namespace} has heard"
        );
    }
    load.verdict().unwrap();
}

#[test]
fn f48_a_partition_heals_without_help() {
    let (mesh, a, b) = Mesh::two_nodes().unwrap();
    let load = Steady::start(&mesh, [&a, &b]).unwrap();
    let lab = mesh.lab();
    load.outage(|| {
        lab.partition(a.node(), b.node()).unwrap();
        thread::sleep(Duration::from_secs(5));
        lab.heal().unwrap();
    });
    // Control away: what is known goes on, and nothing is forgiven.
    for node in [&a, &b] {
        lab.partition(node.node(), mesh.control_host()).unwrap();
    }
    thread::sleep(Duration::from_secs(3));
    lab.heal().unwrap();
    let longest = load.verdict().unwrap().percentile(100);
    assert!(
        longest > Duration::from_secs(3),
        "nothing has noticed the partition: {longest:?}"
    );
}

#[test]
fn f49_a_bad_link_costs_time_and_no_bytes() {
    let shop = Shop::open();
    let _digest = Server::digest(shop.cart.listen(8080).unwrap()).unwrap();
    let lab = shop.mesh.lab();
    let transfer = |bytes: u64, case: &str| {
        let socket = shop
            .web
            .connect((shop.vip.v4, 80))
            .unwrap_or_else(|e| panic!("{case}: {e}"));
        socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let sent = send_pattern(&socket, bytes, 5).unwrap_or_else(|e| panic!("{case}: {e:#}"));
        let mut arrived = String::new();
        (&socket)
            .read_to_string(&mut arrived)
            .unwrap_or_else(|e| panic!("{case}: {e}"));
        assert_eq!(arrived, sent, "{case}");
    };
    let (a, b) = (shop.a.node(), shop.b.node());
    transfer(8 << 20, "a good link");
    for (per_mille, bytes) in [(10, 8 << 20), (50, 2 << 20)] {
        for (from, to) in [(a, b), (b, a)] {
            lab.disturb(from, to, per_mille, Effect::Lost).unwrap();
        }
        transfer(bytes, &format!("{per_mille} of 1000 lost"));
        lab.heal().unwrap();
    }
    for node in [a, b] {
        lab.limit_rate(node, Some(1_000_000)).unwrap();
    }
    transfer(256 << 10, "1 Mbit/s");
    for node in [a, b] {
        lab.limit_rate(node, None).unwrap();
        node.set_mtu(576).unwrap();
    }
    transfer(2 << 20, "MTU 576");
}

#[test]
fn f49_a_third_lost_and_a_tenth_reset_are_outlasted() {
    let shop = Shop::open();
    let _digest = Server::digest(shop.cart.listen(8080).unwrap()).unwrap();
    let _echo = Server::echo(shop.cart.listen(8081).unwrap()).unwrap();
    let lab = shop.mesh.lab();
    let (a, b) = (shop.a.node(), shop.b.node());
    let disturb = |per_mille, effect| {
        for (from, to) in [(a, b), (b, a)] {
            lab.disturb(from, to, per_mille, effect).unwrap();
        }
    };
    let echo = SocketAddr::from((shop.cart.addresses().v4, 8081));
    let patience = Duration::from_secs(60);
    // The tunnel itself is dialled over the bad link.
    disturb(300, Effect::Lost);
    let attempts = Attempts::start(&shop.web, echo, 10, patience).unwrap();
    let healed = thread::scope(|scope| {
        let transfer = scope.spawn(|| {
            let socket = shop.web.connect_within((shop.vip.v4, 80), patience).unwrap();
            socket.set_read_timeout(Some(patience)).unwrap();
            let sent = send_pattern(&socket, 4 << 20, 6).unwrap();
            let mut arrived = String::new();
            (&socket).read_to_string(&mut arrived).unwrap();
            assert_eq!(arrived, sent);
        });
        thread::sleep(Duration::from_secs(6));
        lab.heal().unwrap();
        let healed = Instant::now();
        transfer.join().unwrap();
        healed.elapsed()
    });
    assert!(
        healed < Duration::from_secs(20),
        "a transfer stood for {healed:?} after the link was whole"
    );
    all_complete(&attempts.stop().unwrap()).unwrap();
    // A reset ends a connection and is said to be one: nothing hangs, nothing is garbled.
    disturb(100, Effect::Reset);
    let attempts = Attempts::start(&shop.web, echo, 20, patience).unwrap();
    thread::sleep(Duration::from_secs(4));
    lab.heal().unwrap();
    for attempt in attempts.stop().unwrap() {
        match attempt.outcome {
            // The reset of a connection that has just come about may be seen as the end of its connect.
            Ok(())
            | Err(Failure::Lost(ErrorKind::ConnectionReset) | Failure::Connect(ErrorKind::ConnectionReset)) =>
                {}
            other => panic!("{other:?}"),
        }
    }
    let attempts = Attempts::start(&shop.web, echo, 20, WAIT).unwrap();
    thread::sleep(Duration::from_secs(1));
    all_complete(&attempts.stop().unwrap()).unwrap();
}
