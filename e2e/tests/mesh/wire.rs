//! D29: what crosses the links between nodes is TLS 1.3 with the hybrid key exchange, and nothing else.

use std::collections::BTreeSet;
use std::net::IpAddr;

use anyhow::{Context, Result, ensure};
use culvert_e2e::lab::capture::Recording;
use culvert_e2e::lab::capture::tls::{TLS13, X25519MLKEM768};
use culvert_e2e::lab::{Pod, PodSpec};
use culvert_e2e::traffic::{Server, echo_once};

use crate::{Shop, WAIT};

const CANARY: &[u8] = b"canary-c41d88e02f";

/// What a link may carry beside TCP: the neighbours finding each other.
const HOUSEKEEPING: [&str; 2] = ["arp", "icmpv6 housekeeping"];

/// Fails unless every flow with payload between `pods` is TLS 1.3 with the hybrid group and there is one at
/// least, and unless there is nothing else but housekeeping and TLS towards control. Returns their number.
fn prove(recording: &Recording, pods: &[&Pod], control: [IpAddr; 2]) -> Result<u64> {
    ensure!(
        recording.sightings().is_empty(),
        "in the clear: {:?}",
        recording.sightings()
    );
    let enrolled: BTreeSet<IpAddr> = pods.iter().flat_map(|pod| pod.addresses().all()).collect();
    let mut tunnels = 0;
    for flow in recording.flows_with_payload() {
        let ends = [flow.client.ip(), flow.server.ip()];
        let between_pods = ends.iter().all(|end| enrolled.contains(end));
        // The nodes have been talking to control since before.
        if !flow.opened && !between_pods && ends.iter().any(|end| control.contains(end)) {
            continue;
        }
        ensure!(flow.opened, "{flow} is older than the capture");
        ensure!(
            flow.missed_bytes() == 0,
            "{flow}: the capture missed {} bytes",
            flow.missed_bytes()
        );
        let hello = flow.server_hello().with_context(|| flow.to_string())?;
        ensure!(hello.version == TLS13, "{flow}: version {:#06x}", hello.version);
        ensure!(
            hello.group == Some(X25519MLKEM768),
            "{flow}: group {:x?}",
            hello.group
        );
        if between_pods {
            ensure!(flow.server.port() == 15008, "{flow} is no tunnel");
            tunnels += 1;
        } else {
            ensure!(
                control.contains(&flow.server.ip()),
                "{flow} is neither between pods nor to control"
            );
        }
    }
    for (other, packets) in recording.others() {
        ensure!(HOUSEKEEPING.contains(&&*other.0), "{packets} packets of {other}");
    }
    ensure!(tunnels > 0, "no tunnel carried anything");
    Ok(tunnels)
}

/// Sends the canary from every pod of `from` to `to`, several times, over both families.
fn converse(from: &[&Pod], to: &Pod) -> Result<()> {
    for pod in from {
        for ip in to.addresses().all() {
            let sockets = (0..8)
                .map(|_| pod.connect((ip, 8080)))
                .collect::<Result<Vec<_>, _>>()?;
            for socket in &sockets {
                socket.set_read_timeout(Some(WAIT))?;
                echo_once(socket, CANARY).with_context(|| format!("{} to {ip}", pod.name()))?;
            }
        }
    }
    Ok(())
}

#[test]
fn every_flow_between_nodes_is_tls_1_3_with_the_hybrid_group() {
    let shop = Shop::open();
    let phone = shop.mesh.pod(&shop.a, PodSpec::new("shop", "phone")).unwrap();
    let control = shop.mesh.control_host().addresses().all();
    let _echo = Server::echo(shop.cart.listen(8080).unwrap()).unwrap();
    let links = [&shop.a, &shop.b].map(|node| (node, node.node().capture(&[CANARY]).unwrap()));
    converse(&[&shop.web, &phone], &shop.cart).unwrap();
    for (node, link) in links {
        let flows = prove(&link.stop().unwrap(), &[&shop.web, &phone, &shop.cart], control);
        let flows = flows.unwrap_or_else(|e| panic!("the link of node {}: {e:#}", node.name()));
        let opened = node
            .metrics()
            .unwrap()
            .sum("culvert_tunnels_total", &[("outcome", "up")]);
        assert_eq!(
            flows as f64,
            opened,
            "flows on the link of {} and tunnels opened there",
            node.name()
        );
    }
}

#[test]
fn the_same_proof_fails_without_capture() {
    let shop = Shop::open();
    let control = shop.mesh.control_host().addresses().all();
    shop.mesh
        .apply("apiVersion: v1\nkind: Namespace\nmetadata: {name: plain}\n")
        .unwrap();
    let caller = shop.mesh.pod(&shop.a, PodSpec::new("plain", "caller")).unwrap();
    let callee = shop.mesh.pod(&shop.b, PodSpec::new("plain", "callee")).unwrap();
    let _echo = Server::echo(callee.listen(8080).unwrap()).unwrap();
    let link = shop.a.node().capture(&[CANARY]).unwrap();
    converse(&[&caller], &callee).unwrap();
    let refuted = prove(&link.stop().unwrap(), &[&caller, &callee], control).unwrap_err();
    assert!(refuted.to_string().starts_with("in the clear"), "{refuted:#}");
}
