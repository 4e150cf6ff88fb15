//! What ztunnel holds when control, the CA or the disk is away: the last good state, SVIDs, open streams.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use culvert_e2e::lab::{PodSpec, poll_until};
use culvert_e2e::load::{Attempts, Failure, Pace, Streams, all_complete};
use culvert_e2e::mesh::{MeshNode, Options, cni, pages};
use culvert_e2e::traffic::{Server, echo_once};

use crate::{Shop, WAIT};

fn call(shop: &Shop) -> anyhow::Result<()> {
    let socket = shop.web.connect((shop.vip.v4, 80))?;
    socket.set_read_timeout(Some(WAIT))?;
    echo_once(&socket, b"call")
}

/// Waits until the nodes have written what they know by now: it is on disk a second after a change, and five
/// after the write before.
fn kept(nodes: &[&MeshNode]) {
    thread::sleep(Duration::from_secs(7));
    for node in nodes {
        assert!(
            node.path("state/snapshot").is_file(),
            "{} keeps no state",
            node.name()
        );
    }
}

#[test]
fn f44_f02_nodes_restart_while_control_and_its_ca_are_down() {
    let shop = Shop::open();
    let _echo = Server::echo(shop.cart.listen(8080).unwrap()).unwrap();
    call(&shop).unwrap();
    let to = SocketAddr::from((shop.vip.v4, 80));
    kept(&[&shop.a, &shop.b]);
    shop.mesh.kill_control().unwrap();
    // A pod whose policy nobody knows is held.
    let new = shop.a.node().pod(PodSpec::new("shop", "new")).unwrap();
    let socket = shop.a.cni_socket();
    let held = thread::spawn(move || cni::add(&socket, &new));
    // An upgrade in that time loses nothing: the state is on disk, the SVIDs are handed over.
    for node in [&shop.a, &shop.b] {
        let streams = Streams::start(&shop.web, to, 10, Pace::BUSY).unwrap();
        let attempts = Attempts::start(&shop.web, to, 50, WAIT).unwrap();
        thread::sleep(Duration::from_millis(500));
        let successor = node.successor().unwrap();
        let readiness = SocketAddr::from((node.ztunnel_pod().addresses().v4, 16021));
        successor
            .poll_until("the successor is ready", WAIT, || {
                let page = pages::fetch(node.ztunnel_pod(), readiness, "/healthz/ready")?;
                Ok((page.status == 200).then_some(()))
            })
            .unwrap();
        successor.wait_for_log("SVIDs handed over", WAIT).unwrap();
        node.with_ztunnel(|old| old.terminate()).unwrap().unwrap();
        thread::sleep(Duration::from_secs(2));
        all_complete(&attempts.stop().unwrap()).unwrap();
        for end in streams.stop().unwrap() {
            assert!(
                end.failure.is_none(),
                "cut on the upgrade of {}: {end:?}",
                node.name()
            );
        }
        node.replace_ztunnel(successor).unwrap().wait(WAIT).unwrap();
    }
    // Keys are never written: killed, a ztunnel has none until the CA answers.
    for node in [&shop.a, &shop.b] {
        node.kill_ztunnel().unwrap();
        node.start_ztunnel().unwrap();
        node.wait_ready().unwrap();
    }
    assert!(call(&shop).is_err(), "there is no key to prove an identity with");
    poll_until("it says why", WAIT, || {
        let _ = call(&shop);
        let metrics = shop.a.metrics()?;
        let refused = metrics.sum("culvert_connections_refused_total", &[("reason", "identity")]);
        Ok((refused >= 1.0).then_some(()))
    })
    .unwrap();
    assert!(
        held.join().unwrap().is_err(),
        "a pod that nobody knows is not let in"
    );
    shop.mesh.start_control().unwrap();
    poll_until("calls pass once the CA answers", WAIT, || Ok(call(&shop).ok())).unwrap();
}

#[test]
fn f39_a_full_or_read_only_disk_costs_no_traffic() {
    let shop = Shop::open();
    let _echo = Server::echo(shop.cart.listen(8080).unwrap()).unwrap();
    let read_only = |node: &MeshNode| {
        let folder = node.path("state");
        std::fs::set_permissions(&folder, std::os::unix::fs::PermissionsExt::from_mode(0o555)).unwrap();
        std::os::unix::fs::chown(&folder, Some(0), Some(0)).unwrap();
    };
    read_only(&shop.a);
    // What the other writes next, it writes to a device that is always full.
    let pid = shop
        .b
        .with_ztunnel(|ztunnel| ztunnel.status_field("NSpid"))
        .unwrap()
        .unwrap();
    let pid = pid.split_whitespace().last().unwrap();
    let part = shop.b.path(&format!("state/snapshot.{pid}.part"));
    std::os::unix::fs::symlink("/dev/full", part).unwrap();
    let attempts = Attempts::start(&shop.web, (shop.vip.v4, 80).into(), 100, WAIT).unwrap();
    for node in [&shop.a, &shop.b] {
        let spec = PodSpec::new("shop", &format!("more-on-{}", node.name()));
        shop.mesh.pod(node, spec).unwrap();
        node.with_ztunnel(|ztunnel| ztunnel.wait_for_log("cannot be written; serving on", WAIT))
            .unwrap()
            .unwrap();
    }
    all_complete(&attempts.stop().unwrap()).unwrap();
}

#[test]
fn f10_f13_open_streams_outlive_their_leaf_and_end_with_their_holder() {
    let shop = Shop::open_with(Options {
        svid_ttl: "5s",
        ..Options::default()
    });
    let _echo = Server::echo(shop.cart.listen(8080).unwrap()).unwrap();
    poll_until("the first call", WAIT, || Ok(call(&shop).ok())).unwrap();
    let to = SocketAddr::from((shop.vip.v4, 80));
    let streams = Streams::start(&shop.web, to, 5, Pace::BUSY).unwrap();
    let attempts = Attempts::start(&shop.web, to, 50, WAIT).unwrap();
    let length = if crate::full_length() { 600 } else { 14 };
    thread::sleep(Duration::from_secs(length));
    all_complete(&attempts.stop().unwrap()).unwrap();
    // Without a CA nothing is renewed: new connections end with the leaf, open ones soon after it.
    shop.mesh.kill_control().unwrap();
    let killed = Instant::now();
    thread::sleep(Duration::from_secs(6));
    assert!(call(&shop).is_err(), "both leaves have ended");
    thread::sleep(Duration::from_secs(8));
    for end in streams.stop().unwrap() {
        let (at, failure) = end.failure.expect("a stream has outlived every leaf of its peer");
        assert!(at > killed, "cut while its peer renewed: {end:?}");
        assert_eq!(failure, Failure::Lost(ErrorKind::ConnectionReset));
    }
    shop.mesh.start_control().unwrap();
    poll_until("calls pass again", WAIT, || Ok(call(&shop).ok())).unwrap();
}
