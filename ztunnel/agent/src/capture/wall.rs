//! The wall: with no mark of ours, TCP ends at the pod's own loopback.
//!
//! ```text
//! rule 1: marked as an answer to a borrowed address ─▶ table 100: everything is local
//! rule 2: TCP without a mark of ours                ─▶ table 101: everything by way of `lo`
//! rest:   as the pod was
//! ```
//! A flush of nftables leaves routes alone. Afterwards a captured connection is no longer translated, and
//! nothing gives its segments the mark that would let them out: IPv4 discards them at `lo`, and the
//! connection goes on once the rules are back; IPv6 answers with a reset. (IPv6 makes an unreachable route
//! of every other kind of route to `lo`, which would refuse the application's `connect` itself. So while
//! the rules are gone an application may reach its own listener under any IPv6 address, and nobody else.)
//!
//! Invariant: the routes name the pod's own address as the source, since the application's socket takes it
//! from here, and the link's MTU.

use super::{changes::Changes, rules::BACK};
use crate::{
    marks::OURS,
    netns::{NetlinkError, Netns},
};
use nix::libc;
use nlink::{
    Connection, Route,
    netlink::{
        devconf::Ipv4Devconf,
        messages::{RouteMessage, RuleMessage},
        netconf::NetconfDevice,
        route::{Ipv4Route, Ipv6Route, RouteMetrics},
        rule::RuleBuilder,
        types::{
            addr::Scope,
            route::{RouteScope, RouteType},
        },
    },
};
use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::AsFd,
};

const BACK_TABLE: u32 = 100;
const WALL_TABLE: u32 = 101;

/// Before any rule that routes by source address, as some networks have in pods; after the local table.
const BACK_PRIORITY: u32 = 1;
const WALL_PRIORITY: u32 = 2;

/// Loose reverse path filtering. The kernel checks where an answer to a packet would go, and an answer
/// without a mark goes to `lo`: the strict check would drop whatever comes in.
const LOOSE: u32 = 2;

const AF_INET: u8 = libc::AF_INET as u8;
const AF_INET6: u8 = libc::AF_INET6 as u8;

/// Where the application's sockets of one family take their source address and MTU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Uplink {
    source: IpAddr,
    mtu: Option<u32>,
}

impl Uplink {
    fn family(self) -> u8 {
        match self.source {
            IpAddr::V4(_) => AF_INET,
            IpAddr::V6(_) => AF_INET6,
        }
    }
}

/// The routes and rules of one pod.
pub struct Wall {
    route: Connection<Route>,
    changes: Changes,
}

impl Wall {
    pub fn new(netns: &Netns) -> Result<Self, NetlinkError> {
        Ok(Self {
            route: Connection::<Route>::new_in(netns.as_fd())?,
            changes: netns.enter(Changes::of_routes)??,
        })
    }

    /// Puts up what is missing.
    pub async fn build(&self) -> Result<(), NetlinkError> {
        self.changes.seen();
        let rules = self.route.get_rules().await?;
        for uplink in self.uplinks().await? {
            if uplink.source.is_ipv4() {
                self.loosen_reverse_path().await?;
            }
            self.build_routes(uplink).await?;
            for rule in wanted_rules(uplink.family()) {
                if !rules.iter().any(|present| rule.is(present)) {
                    self.route.add_rule(rule.builder()).await?;
                }
            }
        }
        // What has just been put up is no news.
        self.changes.seen();
        Ok(())
    }

    /// Takes all of it down.
    pub async fn remove(&self) -> Result<(), NetlinkError> {
        for present in self.route.get_rules().await? {
            for rule in [AF_INET, AF_INET6].into_iter().flat_map(wanted_rules) {
                if rule.is(&present) {
                    self.route.del_rule_if_exists(rule.builder()).await?;
                }
            }
        }
        for route in self.routes().await? {
            let table = route.table_id();
            if route.is_ipv4() {
                let ours = Ipv4Route::from_addr(Ipv4Addr::UNSPECIFIED, 0)
                    .route_type(route.route_type())
                    .scope(route.scope())
                    .table(table);
                self.route.del_route_if_exists(ours).await?;
            } else {
                let ours = Ipv6Route::from_addr(Ipv6Addr::UNSPECIFIED, 0).table(table);
                self.route.del_route_if_exists(ours.dev("lo")).await?;
            }
        }
        Ok(())
    }

    /// Whether it stands. It is looked at only if something about routes, rules, addresses or links in the
    /// pod has changed.
    pub async fn is_intact(&self) -> Result<bool, NetlinkError> {
        if !self.changes.seen() {
            return Ok(true);
        }
        let stands = self.stands().await?;
        if !stands {
            // Until it does, every look is a thorough one.
            self.changes.remember();
        }
        Ok(stands)
    }

    async fn stands(&self) -> Result<bool, NetlinkError> {
        let rules = self.route.get_rules().await?;
        let routes = self.routes().await?;
        let uplinks = self.uplinks().await?;
        Ok(uplinks.iter().all(|uplink| {
            let ruled = wanted_rules(uplink.family())
                .iter()
                .all(|rule| rules.iter().any(|present| rule.is(present)));
            let way = if uplink.source.is_ipv4() {
                RouteType::Unicast
            } else {
                RouteType::Local
            };
            let routed = |table, kind, source: Option<IpAddr>| {
                routes.iter().any(|route| {
                    route.table_id() == table
                        && route.is_ipv4() == uplink.source.is_ipv4()
                        && route.route_type() == kind
                        && source.is_none_or(|source| route.prefsrc() == Some(&source))
                })
            };
            ruled
                && routed(WALL_TABLE, way, Some(uplink.source))
                && routed(BACK_TABLE, RouteType::Local, None)
        }))
    }

    async fn routes(&self) -> Result<Vec<RouteMessage>, NetlinkError> {
        let mut routes = self.route.get_routes().await?;
        routes.retain(|route| [WALL_TABLE, BACK_TABLE].contains(&route.table_id()));
        Ok(routes)
    }

    async fn build_routes(&self, uplink: Uplink) -> Result<(), NetlinkError> {
        let metrics = match uplink.mtu {
            Some(mtu) => RouteMetrics::new().mtu(mtu),
            None => RouteMetrics::new(),
        };
        match uplink.source {
            IpAddr::V4(source) => {
                let everything = || Ipv4Route::from_addr(Ipv4Addr::UNSPECIFIED, 0).dev("lo");
                let wall = everything()
                    .scope(RouteScope::Link)
                    .prefsrc(source)
                    .metrics(metrics)
                    .table(WALL_TABLE);
                self.route.replace_route(wall).await?;
                let back = everything()
                    .route_type(RouteType::Local)
                    .scope(RouteScope::Host)
                    .table(BACK_TABLE);
                self.route.replace_route(back).await?;
            }
            IpAddr::V6(source) => {
                let everything = || {
                    Ipv6Route::from_addr(Ipv6Addr::UNSPECIFIED, 0)
                        .dev("lo")
                        .route_type(RouteType::Local)
                };
                let wall = everything().prefsrc(source).metrics(metrics).table(WALL_TABLE);
                self.route.replace_route(wall).await?;
                self.route.replace_route(everything().table(BACK_TABLE)).await?;
            }
        }
        Ok(())
    }

    /// The first address of each family that the pod can be reached at. A family without one has nothing
    /// to wall in.
    async fn uplinks(&self) -> Result<Vec<Uplink>, NetlinkError> {
        let links = self.route.get_links().await?;
        let addresses = self.route.get_addresses().await?;
        let of = |family: u8| {
            addresses
                .iter()
                .filter(|a| a.family() == family && a.scope() == Scope::Universe && !a.is_tentative())
                .find_map(|a| {
                    let link = links.iter().find(|link| link.ifindex() == a.ifindex())?;
                    let source = *a.local().or(a.address())?;
                    (!link.is_loopback()).then_some(Uplink {
                        source,
                        mtu: link.mtu(),
                    })
                })
        };
        Ok([AF_INET, AF_INET6].into_iter().filter_map(of).collect())
    }

    async fn loosen_reverse_path(&self) -> Result<(), NetlinkError> {
        let settings = self.route.get_netconf(nlink::AddressFamily::v4()).await?;
        let strict = |device: NetconfDevice| {
            settings
                .iter()
                .any(|s| s.device() == Some(device) && s.rp_filter() == Some(1))
        };
        for link in self.route.get_links().await? {
            let index = link.ifindex();
            let checked = strict(NetconfDevice::All) || strict(NetconfDevice::Index(index));
            if checked && !link.is_loopback() {
                let loose = [(Ipv4Devconf::RpFilter, LOOSE)];
                self.route.set_ipv4_devconf_by_index(index, &loose).await?;
            }
        }
        Ok(())
    }
}

/// One of the two rules, in one family.
#[derive(Debug, Clone, Copy)]
struct WantedRule {
    family: u8,
    table: u32,
}

fn wanted_rules(family: u8) -> [WantedRule; 2] {
    [BACK_TABLE, WALL_TABLE].map(|table| WantedRule { family, table })
}

impl WantedRule {
    fn builder(self) -> RuleBuilder {
        let rule = RuleBuilder::new(self.family).table(self.table);
        match self.table {
            BACK_TABLE => rule.fwmark(BACK).priority(BACK_PRIORITY),
            // Not an inverted rule: that would be inverted as a whole, and wall in what is no TCP.
            _ => rule.fwmark_mask(0, OURS).tcp().priority(WALL_PRIORITY),
        }
    }

    fn is(self, rule: &RuleMessage) -> bool {
        let same = rule.family() == self.family && rule.table_id() == self.table;
        let same = same && rule.is_lookup() && !rule.is_invert();
        let plain = rule.source().is_none() && rule.destination().is_none() && rule.oifname().is_none();
        same && plain
            && match self.table {
                BACK_TABLE => rule.priority() == BACK_PRIORITY && rule.fwmark() == Some(BACK),
                _ => {
                    rule.priority() == WALL_PRIORITY
                        && rule.fwmark().unwrap_or(0) == 0
                        && rule.fwmask() == Some(OURS)
                        && rule.ip_proto() == Some(libc::IPPROTO_TCP as u8)
                }
            }
    }
}
