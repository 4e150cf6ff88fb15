//! Wires: veth pairs, a bridge, addresses, routes and sysctls, all by netlink.
//!
//! ```text
//! routed end:   eth0 10.1.0.2/32 ──veth── p2 in the host namespace, which routes 10.1.0.2/32 to it
//! bridged end:  fab0 172.31.0.1/16 ──veth── port of the fabric's bridge
//! ```
//! Invariant: an address works as soon as it is set (no duplicate address detection), and a namespace
//! answers only for what it was given.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context, Result};
use nlink::netlink::addr::{Ipv4Address, Ipv6Address};
use nlink::netlink::link::{BridgeLink, VethLink};
use nlink::netlink::route::{Ipv4Route, Ipv6Route};
use nlink::netlink::types::addr::Scope;
use nlink::netlink::types::route::RouteScope;
use nlink::{Connection, Route};

use super::namespaces::NetNs;

/// An address of each family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Addresses {
    pub v4: Ipv4Addr,
    pub v6: Ipv6Addr,
}

impl Addresses {
    pub fn all(self) -> [IpAddr; 2] {
        [self.v4.into(), self.v6.into()]
    }
}

/// A block of addresses of each family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Block {
    pub v4: (Ipv4Addr, u8),
    pub v6: (Ipv6Addr, u8),
}

/// Whether a namespace passes packets on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Router,
    Endpoint,
}

/// What every routed end has as its gateway; the host ends answer for it.
pub const GATEWAY: Addresses = Addresses {
    v4: Ipv4Addr::new(169, 254, 1, 1),
    v6: Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1),
};

/// The bridge of the fabric, and the end of a routed wire inside its endpoint.
pub const BRIDGE: &str = "br0";
/// Without an address of its own a bridge takes the lowest of its ports', which changes as ports come: neighbours
/// that know the old one would lose their router.
const BRIDGE_ADDRESS: [u8; 6] = [0x02, 0, 0, 0, 0, 0xfe];
pub const ENDPOINT_LINK: &str = "eth0";

/// Runs `work` against rtnetlink in `ns`.
pub fn in_ns<T: Send>(
    ns: &NetNs,
    work: impl AsyncFnOnce(&Connection<Route>) -> nlink::Result<T> + Send,
) -> Result<T> {
    ns.run(|| -> Result<T> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let done = runtime.block_on(async { work(&Connection::<Route>::new()?).await })?;
        Ok(done)
    })?
}

/// Prepares a new namespace: loopback, forwarding, and none of the automatic configuration.
pub fn prepare(ns: &NetNs, role: Role) -> Result<()> {
    ns.run(|| -> Result<()> {
        let forward = if role == Role::Router { "1" } else { "0" };
        let mut settings = vec![
            ("ipv4/ip_forward".to_owned(), forward),
            ("ipv6/conf/all/forwarding".to_owned(), forward),
        ];
        for conf in ["all", "default"] {
            for (name, value) in [
                ("rp_filter", "0"),
                ("send_redirects", "0"),
                ("accept_redirects", "0"),
            ] {
                settings.push((format!("ipv4/conf/{conf}/{name}"), value));
            }
            for (name, value) in [
                ("disable_ipv6", "0"),
                ("accept_dad", "0"),
                ("dad_transmits", "0"),
                ("accept_ra", "0"),
                ("accept_redirects", "0"),
                ("router_solicitations", "0"),
            ] {
                settings.push((format!("ipv6/conf/{conf}/{name}"), value));
            }
        }
        for (name, value) in settings {
            sysctl(&name, value)?;
        }
        Ok(())
    })??;
    in_ns(ns, async |netlink| netlink.set_link_up("lo").await).context("loopback")
}

/// Sets `net/NAME` of the namespace that the calling thread is in.
pub fn sysctl(name: &str, value: &str) -> Result<()> {
    let path = format!("/proc/sys/net/{name}");
    std::fs::write(&path, value).with_context(|| path)
}

/// Makes the bridge in the fabric's namespace and gives it `own`.
pub fn bridge(fabric: &NetNs, own: Addresses, block: Block) -> Result<()> {
    in_ns(fabric, async |netlink| {
        netlink
            .add_link(
                BridgeLink::new(BRIDGE)
                    .forward_delay_ms(0)
                    .address(BRIDGE_ADDRESS),
            )
            .await?;
        set_addresses(netlink, BRIDGE, own, block).await
    })
    .context("the fabric's bridge")
}

/// Joins `endpoint` to the fabric's bridge by a veth pair `link` (inside) and `port` (on the bridge).
pub fn join(
    endpoint: &NetNs,
    link: &str,
    own: Addresses,
    block: Block,
    fabric: &NetNs,
    port: &str,
) -> Result<()> {
    in_ns(fabric, async |netlink| {
        netlink
            .add_link(VethLink::new(port, link).peer_netns_fd(endpoint))
            .await?;
        netlink.set_link_master(port, BRIDGE).await?;
        netlink.set_link_up(port).await
    })
    .with_context(|| format!("port {port} of the fabric"))?;
    in_ns(endpoint, async |netlink| {
        set_addresses(netlink, link, own, block).await
    })
    .with_context(|| format!("{link} at the other end of {port}"))
}

/// Joins `endpoint` to `host` by a routed veth pair and returns the index of its end in `host`.
pub fn route_to_endpoint(
    host: &NetNs,
    host_link: &str,
    host_own: Addresses,
    endpoint: &NetNs,
    own: Addresses,
) -> Result<u32> {
    let index = in_ns(host, async |netlink| {
        netlink
            .add_link(VethLink::new(host_link, ENDPOINT_LINK).peer_netns_fd(endpoint))
            .await?;
        let index = index_of(netlink, host_link).await?;
        let gateway = Ipv4Address::with_index(index, GATEWAY.v4, 32).scope(Scope::Link);
        netlink.add_address(gateway).await?;
        netlink
            .add_address(Ipv6Address::with_index(index, GATEWAY.v6, 64).nodad())
            .await?;
        netlink.set_link_up(host_link).await?;
        let v4 = Ipv4Route::new(own.v4, 32)
            .dev_index(index)
            .scope(RouteScope::Link)
            .prefsrc(host_own.v4);
        netlink.add_route(v4).await?;
        netlink
            .add_route(Ipv6Route::new(own.v6, 128).dev_index(index).prefsrc(host_own.v6))
            .await?;
        Ok(index)
    })
    .with_context(|| format!("host end {host_link}"))?;
    in_ns(endpoint, async |netlink| {
        let inside = index_of(netlink, ENDPOINT_LINK).await?;
        netlink
            .add_address(Ipv4Address::with_index(inside, own.v4, 32))
            .await?;
        netlink
            .add_address(Ipv6Address::with_index(inside, own.v6, 128).nodad())
            .await?;
        netlink.set_link_up(ENDPOINT_LINK).await?;
        let to_gateway = Ipv4Route::new(GATEWAY.v4, 32)
            .dev_index(inside)
            .scope(RouteScope::Link);
        netlink.add_route(to_gateway).await?;
        netlink
            .add_route(Ipv4Route::default_route().gateway(GATEWAY.v4).dev_index(inside))
            .await?;
        netlink
            .add_route(Ipv6Route::default_route().gateway(GATEWAY.v6).dev_index(inside))
            .await
    })
    .with_context(|| format!("inside end of {host_link}"))?;
    Ok(index)
}

/// Sends `block` (the default route if none) by way of `via`.
pub fn route_via(ns: &NetNs, block: Option<Block>, via: Addresses) -> Result<()> {
    in_ns(ns, async |netlink| {
        let (v4, v6) = match block {
            Some(block) => (
                Ipv4Route::new(block.v4.0, block.v4.1),
                Ipv6Route::new(block.v6.0, block.v6.1),
            ),
            None => (Ipv4Route::default_route(), Ipv6Route::default_route()),
        };
        netlink.add_route(v4.gateway(via.v4)).await?;
        netlink.add_route(v6.gateway(via.v6)).await
    })
    .context("a route between nodes")
}

/// Takes away `link`, and with it its peer, its addresses and its routes.
pub fn cut(ns: &NetNs, link: &str) -> Result<()> {
    in_ns(ns, async |netlink| netlink.del_link_if_exists(link).await).map(drop)
}

pub fn set_mtu(ns: &NetNs, link: &str, mtu: u32) -> Result<()> {
    in_ns(ns, async |netlink| netlink.set_link_mtu(link, mtu).await).with_context(|| format!("MTU of {link}"))
}

pub fn index(ns: &NetNs, link: &str) -> Result<u32> {
    in_ns(ns, async |netlink| index_of(netlink, link).await).with_context(|| format!("index of {link}"))
}

async fn set_addresses(
    netlink: &Connection<Route>,
    link: &str,
    own: Addresses,
    block: Block,
) -> nlink::Result<()> {
    netlink
        .add_address(Ipv4Address::new(link, own.v4, block.v4.1))
        .await?;
    netlink
        .add_address(Ipv6Address::new(link, own.v6, block.v6.1).nodad())
        .await?;
    netlink.set_link_up(link).await
}

async fn index_of(netlink: &Connection<Route>, link: &str) -> nlink::Result<u32> {
    let found = netlink.get_link_by_name(link).await?;
    found
        .map(|link| link.ifindex())
        .ok_or_else(|| nlink::Error::from(std::io::Error::other(format!("no link {link}"))))
}
