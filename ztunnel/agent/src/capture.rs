//! The rules inside a pod: which connections ztunnel takes.
//!
//! ```text
//! output:      SYN of the app ─nat─▶ 15001     port 53 to a cluster resolver ─nat─▶ 15053…
//! prerouting:  SYN to the app ─nat─▶ 15006     15008, probes, exclusions pass
//! reply route: answers to a source address that ztunnel borrowed come back to it by mark
//! filter:      a SYN that nothing above took is rejected
//! ```
//! Invariant: one transaction puts all of it in place or nothing. Only a first SYN is redirected: a rule
//! that saw later segments would reset connections that were open before it (settled D7).

use crate::{
    listeners::{DNS_PORT, HBONE_PORT, INBOUND_PORT, OUTBOUND_PORT},
    netns::{NetlinkError, Netns},
};
use ipnet::IpNet;
use nlink::{
    Connection, Nftables, Route,
    netlink::{
        nftables::{
            BaseChain, Chain, CtState, Family, Field, FilterHook, Match, NatHook, Policy, Priority, Rule,
            Stmt, TcpFlags, Value,
        },
        route::{Ipv4Route, Ipv6Route},
        rule::RuleBuilder,
        types::route::{RouteScope, RouteType},
    },
};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

const TABLE: &str = "culvert";
/// The routing table of borrowed source addresses.
const REPLY_TABLE: u32 = 100;
const REPLY_PRIORITY: u32 = 32764;

/// The two marks of a pod, random and different from zero and each other.
///
/// `socket` is on ztunnel's sockets and exempts them from capture; `reply` is on connections to the
/// application from a borrowed address, and routes their answers back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Marks {
    pub socket: u32,
    pub reply: u32,
}

impl Marks {
    pub fn random() -> Self {
        let socket = rand::random::<u32>() | 0x8000_0000;
        Self {
            socket,
            reply: socket ^ 1,
        }
    }
}

/// What the rules of a pod depend on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rules {
    pub marks: Marks,
    pub resolvers: Vec<IpAddr>,
    /// Addresses of the node, from which probes come.
    pub node: Vec<IpAddr>,
    pub probe_ports: Vec<u16>,
    pub exclude_inbound_ports: Vec<u16>,
    pub exclude_outbound_ports: Vec<u16>,
    pub exclude_outbound_nets: Vec<IpNet>,
    pub refuse_other_traffic: bool,
}

/// Puts the rules in place, replacing what was there, in one step.
pub fn install(netns: &Netns, rules: &Rules) -> Result<(), NetlinkError> {
    netns.netlink(async || {
        route_replies(rules.marks.reply).await?;
        let nft = Connection::<Nftables>::new()?;
        let mut batch = nft
            .transaction()
            .add_table(TABLE, Family::Inet)
            .del_table(TABLE, Family::Inet)
            .add_table(TABLE, Family::Inet);
        for chain in chains()? {
            batch = batch.add_chain(chain);
        }
        for rule in rules.all() {
            batch = batch.add_rule(rule.family(Family::Inet));
        }
        batch.commit(&nft).await
    })
}

/// Takes everything away again.
pub fn remove(netns: &Netns, marks: Marks) -> Result<(), NetlinkError> {
    netns.netlink(async || {
        let nft = Connection::<Nftables>::new()?;
        nft.del_table_if_exists(TABLE, Family::Inet).await?;
        let route = Connection::<Route>::new()?;
        for rule in reply_rules(marks.reply) {
            route.del_rule_if_exists(rule).await?;
        }
        Ok(())
    })
}

/// How many rules of ours are in the pod now: what [`Rules::count`] says while nobody has touched them.
pub fn installed(netns: &Netns) -> Result<usize, NetlinkError> {
    netns.netlink(async || {
        let nft = Connection::<Nftables>::new()?;
        Ok(nft.list_rules(TABLE, Family::Inet).await?.len())
    })
}

fn chains() -> nlink::Result<Vec<Chain>> {
    let base = |name, base| Ok::<_, nlink::Error>(Chain::new(TABLE, name)?.family(Family::Inet).base(base));
    Ok(vec![
        base(
            "mark-in",
            BaseChain::filter(FilterHook::Prerouting, Priority::Mangle).policy(Policy::Accept),
        )?,
        base(
            "mark-out",
            BaseChain::route(Priority::Mangle).policy(Policy::Accept),
        )?,
        base(
            "prerouting",
            BaseChain::nat(NatHook::Prerouting, Priority::DstNat).policy(Policy::Accept),
        )?,
        base(
            "output",
            BaseChain::nat(NatHook::Output, Priority::Custom(-100)).policy(Policy::Accept),
        )?,
        base(
            "refuse",
            BaseChain::filter(FilterHook::Output, Priority::Filter).policy(Policy::Accept),
        )?,
    ])
}

fn reply_rules(mark: u32) -> [RuleBuilder; 2] {
    [RuleBuilder::v4(), RuleBuilder::v6()]
        .map(|rule| rule.fwmark(mark).table(REPLY_TABLE).priority(REPLY_PRIORITY))
}

async fn route_replies(mark: u32) -> nlink::Result<()> {
    let route = Connection::<Route>::new()?;
    for rule in reply_rules(mark) {
        route.del_rule_if_exists(rule.clone()).await?;
        route.add_rule(rule).await?;
    }
    let v4 = Ipv4Route::from_addr(Ipv4Addr::UNSPECIFIED, 0);
    let v4 = v4
        .dev("lo")
        .route_type(RouteType::Local)
        .scope(RouteScope::Host)
        .table(REPLY_TABLE);
    route.replace_route(v4).await?;
    let v6 = Ipv6Route::from_addr(Ipv6Addr::UNSPECIFIED, 0);
    let v6 = v6.dev("lo").route_type(RouteType::Local).table(REPLY_TABLE);
    route.replace_route(v6).await
}

/// A connection's first segment.
fn first_syn() -> Match {
    let looked_at = TcpFlags::FIN | TcpFlags::SYN | TcpFlags::RST | TcpFlags::ACK;
    Match::eq(
        Field::TcpFlags,
        Value::Masked {
            value: TcpFlags::SYN.bits().into(),
            mask: looked_at.bits().into(),
        },
    )
}

fn to(ip: IpAddr) -> Match {
    Match::eq(
        if ip.is_ipv4() {
            Field::Ip4Daddr
        } else {
            Field::Ip6Daddr
        },
        ip,
    )
}

fn from(ip: IpAddr) -> Match {
    Match::eq(
        if ip.is_ipv4() {
            Field::Ip4Saddr
        } else {
            Field::Ip6Saddr
        },
        ip,
    )
}

fn into_net(net: IpNet) -> Match {
    let field = if net.addr().is_ipv4() {
        Field::Ip4Daddr
    } else {
        Field::Ip6Daddr
    };
    Match::eq(field, Value::Prefix(net.network(), net.prefix_len()))
}

/// Redirected connections end at the pod's own loopback.
fn to_loopback() -> [Match; 2] {
    [
        Match::eq(
            Field::Ip4Daddr,
            Value::Prefix(Ipv4Addr::new(127, 0, 0, 0).into(), 8),
        ),
        Match::eq(Field::Ip6Daddr, IpAddr::V6(Ipv6Addr::LOCALHOST)),
    ]
}

impl Rules {
    /// How many rules [`install`] puts in place.
    pub fn count(&self) -> usize {
        self.all().len()
    }

    fn all(&self) -> Vec<Rule> {
        let mut rules = vec![];
        self.mark(&mut rules);
        self.inbound(&mut rules);
        self.outbound(&mut rules);
        self.refuse(&mut rules);
        rules
    }

    fn mark(&self, rules: &mut Vec<Rule>) {
        let Marks { socket, reply } = self.marks;
        rules.push(
            Rule::new(TABLE, "mark-in")
                .match_mark(socket)
                .then(Stmt::SetCtMark(reply)),
        );
        rules.push(
            Rule::new(TABLE, "mark-out")
                .then(Match::eq(Field::CtMark, reply))
                .then(Stmt::SetMark(reply)),
        );
    }

    fn inbound(&self, rules: &mut Vec<Rule>) {
        let chain = || Rule::new(TABLE, "prerouting");
        rules.push(chain().match_mark(self.marks.socket).accept());
        rules.push(chain().match_iif("lo").accept());
        rules.push(chain().match_tcp_dport(HBONE_PORT).accept());
        for node in &self.node {
            for port in &self.probe_ports {
                rules.push(chain().then(from(*node)).match_tcp_dport(*port).accept());
            }
        }
        for port in &self.exclude_inbound_ports {
            rules.push(chain().match_tcp_dport(*port).accept());
        }
        rules.push(chain().then(first_syn()).then(Stmt::Redirect(Some(INBOUND_PORT))));
    }

    fn outbound(&self, rules: &mut Vec<Rule>) {
        let chain = || Rule::new(TABLE, "output");
        rules.push(chain().match_mark(self.marks.socket).accept());
        rules.push(chain().match_oif("lo").accept());
        for (port, resolver) in (DNS_PORT..).zip(&self.resolvers) {
            rules.push(
                chain()
                    .then(to(*resolver))
                    .match_udp_dport(53)
                    .then(Stmt::Redirect(Some(port))),
            );
            rules.push(
                chain()
                    .then(to(*resolver))
                    .match_tcp_dport(53)
                    .then(Stmt::Redirect(Some(port))),
            );
        }
        self.exclusions(rules, &chain);
        rules.push(
            chain()
                .then(first_syn())
                .then(Stmt::Redirect(Some(OUTBOUND_PORT))),
        );
    }

    fn exclusions(&self, rules: &mut Vec<Rule>, chain: &dyn Fn() -> Rule) {
        for port in &self.exclude_outbound_ports {
            rules.push(chain().match_tcp_dport(*port).accept());
        }
        for net in &self.exclude_outbound_nets {
            rules.push(chain().then(into_net(*net)).accept());
        }
    }

    fn refuse(&self, rules: &mut Vec<Rule>) {
        let chain = || Rule::new(TABLE, "refuse");
        rules.push(chain().match_mark(self.marks.socket).accept());
        rules.push(chain().match_oif("lo").accept());
        for loopback in to_loopback() {
            rules.push(chain().then(loopback).accept());
        }
        rules.push(
            chain()
                .match_ct_state(CtState::ESTABLISHED | CtState::RELATED)
                .accept(),
        );
        self.exclusions(rules, &chain);
        rules.push(chain().then(first_syn()).drop());
        if self.refuse_other_traffic {
            for protocol in [nix::libc::IPPROTO_UDP, nix::libc::IPPROTO_SCTP] {
                // Protocol numbers are small and positive.
                let number = u8::try_from(protocol).unwrap_or_default();
                rules.push(chain().then(Match::eq(Field::L4Proto, number)).drop());
            }
        }
    }
}

#[cfg(test)]
mod tests;
