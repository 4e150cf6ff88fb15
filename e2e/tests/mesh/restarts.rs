//! ztunnel goes away and comes back, under load.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use culvert_e2e::load::{Attempt, Attempts, CANARY, Failure, Pace, Streams, all_complete};
use culvert_e2e::mesh::{Mesh, MeshNode, pages};
use culvert_e2e::oracles::Steady;
use culvert_e2e::traffic::{Server, echo_once};

use crate::{Shop, WAIT, full_length};

const PER_SECOND: u32 = 200;

/// After ztunnel is ready again, everything that waited is through in this time.
const CAUGHT_UP: Duration = Duration::from_secs(2);

/// Opens the tunnel and has the certificates, so that a test measures what it is about.
fn warm(shop: &Shop) -> SocketAddr {
    let to = SocketAddr::from((shop.vip.v4, 80));
    let socket = shop.web.connect(to).unwrap();
    socket.set_read_timeout(Some(WAIT)).unwrap();
    echo_once(&socket, b"warm").unwrap();
    to
}

/// Takes out attempts that were under way when ztunnel was killed and have been told so by a reset.
fn cut_at(killed: Instant, attempts: Vec<Attempt>) -> (Vec<Attempt>, Vec<Attempt>) {
    attempts.into_iter().partition(|attempt| {
        attempt.started <= killed && attempt.outcome == Err(Failure::Lost(ErrorKind::ConnectionReset))
    })
}

#[test]
fn f01_attempts_wait_for_a_killed_ztunnel_of_their_own_node() {
    attempts_wait_for(Duration::from_secs(6), |shop| &shop.a);
}

/// Longer than a handshake may take that has begun: the peers' tunnels wait in the listener's queue.
#[test]
fn f01_attempts_wait_for_a_killed_ztunnel_of_their_destination() {
    attempts_wait_for(Duration::from_secs(13), |shop| &shop.b);
}

/// Kills a node's ztunnel under load, and starts it again after `shortened`, at full length after 60 s.
fn attempts_wait_for(shortened: Duration, whose: impl Fn(&Shop) -> &MeshNode) {
    let away = if full_length() {
        Duration::from_secs(60)
    } else {
        shortened
    };
    let shop = Shop::open();
    let node = whose(&shop);
    let _echo = Server::echo(shop.cart.listen(8080).unwrap()).unwrap();
    let to = warm(&shop);
    // What waits must fit into each listener's queue of 4096 and a pod's share of descriptors: six pods share
    // the longer absence.
    let others: Vec<_> = (0..if full_length() { 5 } else { 0 })
        .map(|number| {
            let spec = culvert_e2e::lab::PodSpec::new("shop", &format!("web-{number}"));
            shop.mesh.pod(&shop.a, spec).unwrap()
        })
        .collect();
    let share = PER_SECOND.div_ceil(others.len() as u32 + 1);
    let patience = away + WAIT;
    let link = shop.a.node().capture(&[CANARY]).unwrap();
    let others_links = [shop.b.node(), &*shop.web, &*shop.cart].map(|end| end.capture(&[CANARY]).unwrap());
    let streams = Streams::start(&shop.web, to, 20, Pace::BUSY).unwrap();
    let attempts: Vec<_> = std::iter::once(&shop.web)
        .chain(&others)
        .map(|pod| Attempts::start(pod, to, share, patience).unwrap())
        .collect();
    thread::sleep(Duration::from_secs(1));
    let killed = Instant::now();
    node.kill_ztunnel().unwrap();
    thread::sleep(away);
    node.start_ztunnel().unwrap();
    node.wait_ready().unwrap();
    let ready = Instant::now();
    thread::sleep(Duration::from_secs(if full_length() { 10 } else { 3 }));
    let mut all = Vec::new();
    for attempts in attempts {
        let attempts = attempts.stop().unwrap();
        assert!(
            attempts.len() >= 1000,
            "one pod takes a thousand: {}",
            attempts.len()
        );
        all.extend(attempts);
    }
    let (cut, kept) = cut_at(killed, all);
    all_complete(&kept).unwrap();
    assert!(
        cut.len() < 100,
        "{} attempts were under way at the kill",
        cut.len()
    );
    let waited = kept.iter().filter(|attempt| attempt.started < ready);
    let last = waited
        .map(|attempt| (attempt.started + attempt.took).saturating_duration_since(ready))
        .max()
        .unwrap();
    println!(
        "{} attempts, the last of those that waited {last:?} after readiness",
        kept.len()
    );
    assert!(last < CAUGHT_UP, "an attempt took until {last:?} after readiness");
    for end in streams.stop().unwrap() {
        let (at, failure) = end.failure.expect("a stream has outlived its ztunnel");
        assert_eq!(failure, Failure::Lost(ErrorKind::ConnectionReset));
        assert!(at.saturating_duration_since(killed) < Duration::from_secs(1));
    }
    let recording = link.stop().unwrap();
    assert_eq!(recording.sightings(), [], "plaintext between the nodes");
    for link in others_links {
        assert_eq!(link.stop().unwrap().sightings(), [], "plaintext on a link");
    }
    let cart = shop.cart.addresses().all();
    for flow in recording
        .flows_with_payload()
        .filter(|flow| cart.contains(&flow.server.ip()))
    {
        assert_eq!(flow.server.port(), 15008, "{flow} went around the mesh");
    }
}

#[test]
fn f02_an_upgrade_cuts_nothing_and_refuses_nothing() {
    let shop = Shop::open();
    let _echo = Server::echo(shop.cart.listen(8080).unwrap()).unwrap();
    let to = warm(&shop);
    for node in [&shop.a, &shop.b] {
        let streams = Streams::start(&shop.web, to, 20, Pace::BUSY).unwrap();
        let attempts = Attempts::start(&shop.web, to, PER_SECOND, WAIT).unwrap();
        thread::sleep(Duration::from_secs(1));
        let successor = node.successor().unwrap();
        let readiness = SocketAddr::from((node.ztunnel_pod().addresses().v4, 16021));
        successor
            .poll_until("the successor is ready", WAIT, || {
                let page = pages::fetch(node.ztunnel_pod(), readiness, "/healthz/ready")?;
                Ok((page.status == 200).then_some(()))
            })
            .unwrap();
        // As kubelet does once the new pod is ready.
        node.with_ztunnel(|old| old.terminate()).unwrap().unwrap();
        thread::sleep(Duration::from_secs(3));
        all_complete(&attempts.stop().unwrap()).unwrap();
        for end in streams.stop().unwrap() {
            assert!(
                end.failure.is_none(),
                "a stream was cut on the upgrade of {}: {end:?}",
                node.name()
            );
            assert!(end.blocks > 20, "a stream went on: {end:?}");
        }
        let old = node.replace_ztunnel(successor).expect("there was one before");
        let left = old
            .wait(WAIT)
            .unwrap_or_else(|e| panic!("drained of all, it leaves: {e:#}"));
        assert!(left.success(), "{left}");
    }
}

#[test]
fn f03_a_stopped_ztunnel_holds_connections_and_goes_on() {
    let stopped = Duration::from_secs(if full_length() { 30 } else { 5 });
    let (mesh, a, b) = Mesh::two_nodes().unwrap();
    let load = Steady::start_with(&mesh, [&a, &b], stopped + WAIT).unwrap();
    a.with_ztunnel(|ztunnel| ztunnel.pause()).unwrap().unwrap();
    let paused = Instant::now();
    let ready = a.readiness();
    assert!(ready.is_err(), "a probe flags it: {ready:?}");
    thread::sleep(stopped.saturating_sub(paused.elapsed()));
    a.with_ztunnel(|ztunnel| ztunnel.resume()).unwrap().unwrap();
    let account = load.verdict().unwrap();
    assert_eq!(account.forgiven, 0);
    let longest = account.percentile(100);
    assert!(longest >= stopped / 2, "something has waited for it: {longest:?}");
}
