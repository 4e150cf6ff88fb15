//! Namespaces for the tests of this crate: a pod, and its node, which is also whoever the pod talks to.
//!
//! Invariant: nothing here has a name outside the test, and all of it goes with its descriptors.

use crate::netns::Netns;
use culvert_e2e::prerequisites::{IP, NFT, need};
use nix::sched::{CloneFlags, unshare};
use nlink::{Connection, Route, netlink::link::VethLink};
use std::{
    fs::File,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::AsFd,
    process::{Command, Output},
};

pub const NODE_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 77, 0, 1));
pub const POD_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 77, 0, 2));
/// An address of the node's that is not the pod's neighbour by kind: a client, or a server elsewhere.
pub const FAR_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 77, 0, 9));
pub const NODE_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 1));
pub const POD_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 2));

/// The link's end on the node.
pub const HOST_LINK: &str = "pod0";

/// A pod and its node.
pub struct Lab {
    pub pod: Netns,
    pub node: Netns,
}

impl Lab {
    pub async fn new() -> Self {
        need(&[IP, NFT]).unwrap();
        let (pod, node) = (fresh(), fresh());
        let on_node = Connection::<Route>::new_in(node.as_fd()).unwrap();
        let in_pod = Connection::<Route>::new_in(pod.as_fd()).unwrap();
        let veth = VethLink::new(HOST_LINK, "eth0").peer_netns_fd(pod.as_fd());
        on_node.add_link(veth).await.unwrap();
        // Without `nodad` an IPv6 address is unusable for its first seconds.
        for (netns, link) in [(&node, HOST_LINK), (&pod, "eth0")] {
            let path = format!("/proc/sys/net/ipv6/conf/{link}/accept_dad");
            netns.enter(|| std::fs::write(path, "0")).unwrap().unwrap();
        }
        for (route, link, addresses) in [
            (
                &on_node,
                HOST_LINK,
                vec![(NODE_V4, 24), (FAR_V4, 24), (NODE_V6, 64)],
            ),
            (&in_pod, "eth0", vec![(POD_V4, 24), (POD_V6, 64)]),
        ] {
            route.set_link_up("lo").await.unwrap();
            for (ip, length) in addresses {
                route.add_address_by_name(link, ip, length).await.unwrap();
            }
            route.set_link_up(link).await.unwrap();
        }
        for (netns, link) in [(&node, HOST_LINK), (&pod, "eth0")] {
            settled(netns, link).await;
        }
        Self { pod, node }
    }

    pub fn host_ifindex(&self) -> u32 {
        let index = self.node.enter(|| nix::net::if_::if_nametoindex(HOST_LINK));
        index.unwrap().unwrap()
    }
}

fn fresh() -> Netns {
    let thread = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).expect("these tests make network namespaces: run them as root");
        File::open("/proc/thread-self/ns/net").unwrap()
    });
    Netns::new(thread.join().unwrap().into())
}

/// Waits until no address of the link is tentative.
async fn settled(netns: &Netns, link: &str) {
    let route = Connection::<Route>::new_in(netns.as_fd()).unwrap();
    let within = std::time::Duration::from_secs(5);
    route
        .wait_addresses_settled(Some(link.into()), within)
        .await
        .unwrap();
}

/// Runs a command in a namespace.
pub fn run(netns: &Netns, program: &str, arguments: &[&str]) -> Output {
    let output = netns
        .enter(|| Command::new(program).args(arguments).output())
        .unwrap();
    output.unwrap_or_else(|e| panic!("{program}: {e}"))
}

/// The rules as nftables' own program reads them.
pub fn ruleset(netns: &Netns) -> serde_json::Value {
    let output = run(netns, "nft", &["-j", "list", "ruleset"]);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).unwrap()
}
